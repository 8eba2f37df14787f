"""`mirage train`: one stage of training, as a YAML file says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ..optional import import_extra


@dataclass(frozen=True)
class Options:
    """Train the memory adapter, LoRA, or a small model, as a YAML file says.

    Resumes the run in the file's `out`, if there is one. On several GPUs under
    `accelerate launch -m mirage train FILE.yaml`.
    """

    config: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE.yaml")]
    """configuration, see configs/"""
    overrides: Annotated[tyro.conf.Positional[list[str]], tyro.conf.arg(metavar="[key=value ...]")] = field(
        default_factory=list
    )
    """in place of the file's, such as data.frames=33"""


def run(options: Options) -> int:
    """Train a stage and print a summary."""
    import_training()
    from ..training.config import load_config
    from ..training.loop import train

    config = load_config(options.config, options.overrides)
    report = train(config)
    loss = "" if report["loss"] is None else f", loss {report['loss']:.4g}"
    if saved := ", ".join(report["saved"]):  # of several processes, one
        print(f"{report['steps']} steps{loss}, {report['seconds']:.0f} s; {saved} in {config.out}")
    return 0


def import_training() -> None:
    """Import what training needs, now rather than after a minute.

    Raises:
        MissingExtraError: a package of the extra `train` is not installed.
    """
    for module in ("diffusers", "transformers", "accelerate", "peft", "pydantic", "yaml", "tqdm", "ftfy"):
        import_extra(module, "train")

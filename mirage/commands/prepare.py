"""`mirage prepare`: encode the clips of a training file once."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .train import import_training


@dataclass(frozen=True, kw_only=True)
class Options:
    """Encode the clips of a training file once.

    Clips that are in DIR already are left alone. A source of kind `packed` reads them.
    """

    config: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE.yaml")]
    """configuration of training, whose data and models are taken"""
    overrides: Annotated[tyro.conf.Positional[list[str]], tyro.conf.arg(metavar="[key=value ...]")] = field(
        default_factory=list
    )
    """in place of the file's, such as data.frames=33"""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """where to write"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to encode"""


def run(options: Options) -> int:
    """Encode clips, print how many, and which were broken."""
    import_training()
    from ..training.config import load_config
    from ..training.data import list_broken
    from ..training.prepare import prepare

    report = prepare(load_config(options.config, options.overrides), options.out, options.device)
    for name, reason in report["broken"].items():
        print(f"skipped {list_broken({name: reason})}", file=sys.stderr)
    print(f"{report['written']} clips written to {options.out}, {report['present']} were there already")
    return 0

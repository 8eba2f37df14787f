"""Assemble mirage-tiny from what `make tiny` has trained, and write its model card.

    python -m mirage.training.release --runs runs/tiny              assemble the model and write its card
    python -m mirage.training.release --report out/report.json      add an evaluation to the card

What the card is made of lies in benchmarks/results/mirage-tiny: training.json, what the runs say of themselves, and
evaluation-97.json and the like, reports of `mirage evaluate`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from huggingface_hub import ModelCard, ModelCardData

from mirage_kernels.io import replace_bytes, replace_text

from ..evaluation.report import format_table
from ..models.adapter import MirageMemoryAdapter
from ..models.latent_depth import LatentDepth
from ..models.transformer import MirageTransformer3DModel
from ..pipeline.pipeline import MiragePipeline
from ..zoo import LORA, MIRAGE_TINY, MIRAGE_TINY_FOLDER, tiny_random_pipeline
from .loop import SUMMARY
from .record import CONFIG

CARD, FACTS, EVALUATION = "README.md", "training.json", "evaluation-{frames}.json"
RESULTS = Path("benchmarks", "results", MIRAGE_TINY)
"""Where facts and evaluations lie, from the root of the repository."""

STAGES = {
    "vae": "VAE, on single frames",
    "vae-video": "VAE, on thirteen frames",
    "vae-shifted": "VAE, with latents read between the tokens",
    "vae-steady": "VAE, with latents that keep little of the motion, in rooms of weak patterns",
    "backbone": "transformer and depth head, without a memory",
    "adapter": "memory adapter and depth head, transformer frozen",
    "lora": "LoRA on the transformer, adapter and depth head",
}
LAST = "lora"
"""The last of the stages, and with a memory's name behind it that memory's."""

SHIPPED = ("none",)
"""Of the memories to compare with, those whose weights are in the package: the demo's. There is room for no more."""

_TEXT_LENGTH = 96  # as of configs/tiny
_MAX_BYTES = 40_000_000


def assemble_mirage_tiny(
    runs: Path,
    folder: Path = MIRAGE_TINY_FOLDER,
    results: Path = RESULTS,
    memories: Sequence[str] = SHIPPED,
) -> int:
    """Put together what configs/tiny has trained into `runs`, in bfloat16, with its card.

    Args:
        runs: folders named as the files of configs/tiny.
        folder: where to write the model and its card.
        results: where to write training.json, and where evaluations lie; made if need be.
        memories: to compare with, whose adapters, LoRAs and depth heads go into `memories/`, as far as they exist.

    Returns:
        Its bytes.

    Raises:
        OSError, ValueError: a part is missing, the parts do not belong together, or they are too large to ship.
    """
    base = tiny_random_pipeline(with_memory=False, with_depth=False)
    base.tokenizer.model_max_length = _TEXT_LENGTH
    pipeline = MiragePipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=AutoencoderKLWan.from_pretrained(runs / "vae-steady" / "vae"),
        scheduler=base.scheduler,
        transformer=MirageTransformer3DModel.from_pretrained(runs / "backbone" / "transformer"),
        memory_adapter=MirageMemoryAdapter.from_pretrained(runs / LAST / "memory_adapter"),
        latent_depth=LatentDepth.from_pretrained(runs / LAST / "latent_depth"),
    )
    facts = gather_facts(runs)
    lora = (runs / LAST / LORA).read_bytes()
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    replace_bytes(folder / LORA, lora)
    shutil.rmtree(folder / "memories", ignore_errors=True)
    for name in memories:
        run, memory = runs / f"{LAST}-{name}", folder / "memories" / name
        if not run.is_dir():
            continue
        for part in ("memory_adapter", "latent_depth"):
            shutil.copytree(run / part, memory / part, dirs_exist_ok=True)
        shutil.copyfile(run / LORA, memory / LORA)
    results.mkdir(parents=True, exist_ok=True)
    replace_text(results / FACTS, json.dumps(facts, indent=1) + "\n")
    write_card(folder, results)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > _MAX_BYTES:
        raise ValueError(f"{folder}: must be at most {_MAX_BYTES:,} bytes to ship, got {size:,}")
    return size


def gather_facts(runs: Path) -> dict[str, Any]:
    """Collect what the runs in a folder say of themselves: {stages: [..], torch, machine}.

    Raises:
        OSError: the run of one of :data:`STAGES` is not there.
    """
    memories = sorted(path.name.removeprefix("lora-") for path in runs.glob("lora-*"))
    stages = []
    for name, what in STAGES.items():
        stages.append(_describe_run(runs / name, what))
    for memory in memories:
        shown = "the cameras' rays instead of a memory" if memory == "none" else f"memory: {memory}"
        if (runs / f"adapter-{memory}").is_dir():
            stages += [_describe_run(runs / f"{name}-{memory}", f"as {name}, {shown}") for name in ("adapter", "lora")]
        else:
            stages.append(_describe_run(runs / f"lora-{memory}", f"lora continued, {shown}"))
    return {
        "stages": stages,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _describe_run(run: Path, what: str) -> dict[str, Any]:
    config = json.loads((run / CONFIG).read_text(encoding="utf-8"))
    summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    return {
        "run": run.name,
        "what": what,
        "batch": config["batch_size"],
        "optimizer": config.get("optimizer", "adamw"),
        "learning_rate": config["learning_rate"],
        "seed": config["seed"],
        **summary,
    }


def add_evaluation(results: Path, report: dict[str, Any]) -> None:
    """Put a report of `mirage evaluate` into `results`, in the place of one of as many frames."""
    replace_text(results / EVALUATION.format(frames=report["frames"]), json.dumps(report, indent=1) + "\n")


def load_evaluations(results: Path) -> list[dict[str, Any]]:
    """Load the reports of :func:`add_evaluation`, those of the shortest loops first."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in results.glob(EVALUATION.format(frames="*"))]
    return sorted(reports, key=lambda report: report["frames"])


def write_card(folder: Path, results: Path) -> None:
    """Write README.md of the model in `folder` from the training.json and the evaluations in `results`.

    Raises:
        OSError: there is no training.json.
    """
    facts = json.loads((results / FACTS).read_text(encoding="utf-8"))
    replace_text(folder / CARD, format_card(facts, load_evaluations(results)))


def format_card(facts: dict[str, Any], reports: list[dict[str, Any]]) -> str:
    """Format the card: YAML for the hub, then Markdown.

    Args:
        facts: of :func:`gather_facts`.
        reports: of `mirage evaluate`.
    """
    data = ModelCardData(license="apache-2.0", library_name="diffusers", pipeline_tag="image-to-video")
    minutes = sum(stage["seconds"] for stage in facts["stages"] if stage["run"] in STAGES) / 60
    lines = [
        "# mirage-tiny",
        "",
        "A world model with a spatial memory, small enough for a laptop's CPU: the architecture of Wan2.2-TI2V-5B (a"
        " VAE of 48 channels, 16x in space and 4x in time; a video transformer; memory adapter; LoRA) and a depth head,"
        " trained from scratch on rooms that `mirage.scenes.synthetic` makes. `--model mirage-tiny` names it in every"
        " command. It shows the memory at work and is there to test with; it knows nothing but such rooms, at 96x160.",
        "",
        "## Training",
        "",
        f"`make tiny` and `make tiny-memories`, files in configs/tiny: {minutes:.0f} minutes of steps for the model"
        f" itself on {facts['machine']}, torch {facts['torch']}. Data: rooms of seeds 0 to"
        " 999 (VAE), 1200 to 1499 (backbone and adapter) and 1200 to 1799 (lora), one clip of 65 frames each, patterns"
        " of a quarter of their contrast, some things move. Every stage is saved in bfloat16; the next starts from"
        " what was saved.",
        "",
        "| run | trained | steps | batch | optimizer, rate | seed | minutes | loss |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {stage['run']} | {stage['what']} | {stage['steps']:,} | {stage['batch']} |"
        f" {stage['optimizer']}, {stage['learning_rate']:g} | {stage['seed']} | {stage['seconds'] / 60:.0f} |"
        f" {stage['loss']:.4f} |"
        for stage in facts["stages"]
    ]
    lines += ["", "## Evaluation", ""]
    if not reports:
        lines.append("Not measured yet: `make evaluate`.")
    for report in reports:
        lines += [
            f"`mirage evaluate`, loops of {report['frames']} frames in {report['rooms']} rooms that were not trained on"
            f" (seeds {report['seeds'][0]}:{report['seeds'][1]}); decibels, ± the standard error over rooms.",
            "",
            *format_table(report),
            "",
        ]
    text = "\n".join(lines).rstrip()
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def main() -> None:
    """Assemble mirage-tiny, or add evaluations to its card."""
    parser = argparse.ArgumentParser(prog="python -m mirage.training.release", description=main.__doc__)
    parser.add_argument("--runs", type=Path, help="what `make tiny` has trained, runs/tiny")
    parser.add_argument("--report", type=Path, action="append", default=[], help="a report.json of `mirage evaluate`")
    asked = parser.parse_args()
    if asked.runs is not None:
        print(f"{assemble_mirage_tiny(asked.runs):,} bytes in {MIRAGE_TINY_FOLDER}")
    for path in asked.report:
        add_evaluation(RESULTS, json.loads(path.read_text(encoding="utf-8")))
    write_card(MIRAGE_TINY_FOLDER, RESULTS)


if __name__ == "__main__":
    main()

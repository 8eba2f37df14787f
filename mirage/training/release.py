"""The model card of mirage-tiny: what it was trained on and how long, and what `mirage evaluate` says of it."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from ..evaluation.report import format_table
from .data import write_bytes
from .loop import CONFIG, SUMMARY

CARD, FACTS, EVALUATION = "README.md", "training.json", "evaluation-{frames}.json"

STAGES = {
    "vae": "VAE, on pictures",
    "vae-video": "VAE, on thirteen frames",
    "vae-shifted": "VAE, with latents read between the tokens",
    "vae-steady": "VAE, with latents that keep little of the motion, in rooms of weak patterns",
    "backbone": "transformer and depth head, without a memory",
    "adapter": "memory adapter and depth head, transformer frozen",
    "lora": "LoRA on the transformer, adapter and depth head",
}


def gather_facts(runs: Path) -> dict[str, Any]:
    """What the runs in a folder say of themselves: {stages: [..], torch, machine}.

    Raises:
        OSError: the run of one of :data:`STAGES` is not there.
    """
    memories = sorted(path.name.removeprefix("lora-") for path in runs.glob("lora-*"))
    stages = []
    for name, what in STAGES.items():
        stages.append(_stage(runs / name, what))
    for memory in memories:
        shown = "the cameras' rays instead of a memory" if memory == "none" else f"memory: {memory}"
        if (runs / f"adapter-{memory}").is_dir():
            stages += [_stage(runs / f"{name}-{memory}", f"as {name}, {shown}") for name in ("adapter", "lora")]
        else:
            stages.append(_stage(runs / f"lora-{memory}", f"lora goes on, {shown}"))
    return {
        "stages": stages,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _stage(run: Path, what: str) -> dict[str, Any]:
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


def add_evaluation(folder: Path, report: dict[str, Any]) -> None:
    """Put a report of `mirage evaluate` beside the model, in the place of one of as many frames."""
    path = folder / EVALUATION.format(frames=report["frames"])
    write_bytes(path, (json.dumps(report, indent=1) + "\n").encode())


def write_card(folder: Path) -> None:
    """README.md of the model in `folder`, from its training.json and what evaluations lie beside it.

    Raises:
        OSError: there is no training.json.
    """
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(EVALUATION.format(frames="*"))]
    write_bytes(folder / CARD, format_card(facts, sorted(reports, key=lambda one: one["frames"])).encode())


def format_card(facts: dict[str, Any], reports: list[dict[str, Any]]) -> str:
    """The card's Markdown."""
    minutes = sum(stage["seconds"] for stage in facts["stages"] if stage["run"] in STAGES) / 60
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: diffusers",
        "pipeline_tag: image-to-video",
        "---",
        "",
        "# mirage-tiny",
        "",
        "A world model with a spatial memory, small enough for a laptop's CPU: the architecture of Wan2.2-TI2V-5B (a"
        " VAE of 48 channels, 16x in space and 4x in time; a video transformer; memory adapter; LoRA) and a depth head,"
        " trained from nothing on rooms that `mirage.scenes.synthetic` makes. `--model mirage-tiny` names it in every"
        " command. It shows the memory at work and is there to test with; it knows nothing but such rooms, at 96x160.",
        "",
        "## Training",
        "",
        f"`make tiny` and `make tiny-memories`, files in configs/tiny: {minutes:.0f} minutes of steps for the model"
        f" itself on {facts['machine']}, torch {facts['torch']}. Data: rooms of seeds 0 to"
        " 999 (VAE), 1200 to 1499 (backbone and adapter) and 1200 to 1799 (lora), one clip of 65 frames each, patterns"
        " of a quarter of their contrast, some things move. Every stage is saved in bfloat16; the next goes on from"
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
    return "\n".join(lines).rstrip() + "\n"

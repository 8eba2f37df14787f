"""`mirage demo`: remember a real scene and see it from elsewhere; then let mirage-tiny generate a walk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ... import zoo
from ...optional import MissingExtraError
from . import memory, walk
from .report import format_report


@dataclass(frozen=True)
class Options:
    """Remember a real scene and see it from elsewhere."""

    rgbd: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """RGB-D frames with poses, in the layout of 7-Scenes"""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("mirage-demo")
    """where to write"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to run"""


def run(options: Options) -> int:
    """Run the demo, print its table and where its files are."""
    report = memory.run_demo(options.out, options.rgbd, options.device)
    files = f"{memory.CONTACT} {memory.LOOP} {memory.CACHE} {memory.REPORT}"
    print(format_report(report))
    print(f"\n{report['seconds']:.1f} s, written to {options.out}: {files}\n")
    return 0 if options.rgbd else _run_walk(options)


def _run_walk(options: Options) -> int:
    """Run the part of the demo that needs a trained model: a walk with a memory and without."""
    if not (zoo.MIRAGE_TINY_FOLDER / "memories" / "none").is_dir():
        print("mirage-tiny is not in this installation: `make tiny` and `make tiny-memories` train it")
        return 0
    try:
        report = walk.run_walk(options.out, device=options.device)
    except MissingExtraError as error:
        print(f"to see mirage-tiny generate a walk: {error}")
        return 0
    files = f"{walk.WORLD_SHEET} {walk.WORLD_VIDEO} {walk.WORLD_REPORT}"
    print(walk.format_walk(report))
    print(f"\n{report['seconds']:.1f} s, written to {options.out}: {files}")
    return 0

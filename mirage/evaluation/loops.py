"""What `mirage evaluate` is asked for: options, the loops through rooms, and where each room's results lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mirage_kernels import Cameras

from ..pipeline.memory import MEMORIES
from ..scenes.synthetic import SyntheticRoom

REPORT, TABLE, PLOTS, CONTACT, VIDEO = "report.json", "report.md", "plots", "contact.png", "side_by_side.mp4"
DEPTHS = ("true", "head")
LOOPS = ("walk-and-back", "orbit-and-back", "pan-and-back", "laps")
"""Out and back, bit for bit the same views on both ways, or twice around a circle; by the seed."""
CEILING = "codec"
"""The true images, encoded and decoded: what no memory can be better than."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure on closed loops in synthetic rooms what a memory is worth.

    Generates loops with each memory and compares them with themselves and with the truth. Resumes what is in DIR.
    Weights of a memory are those of --weights, or of MODEL/memories/NAME, else the model's own.
    """

    model: str
    """folder or hub id of a Wan2.2 or Mirage pipeline, mirage-tiny, or tiny-random"""
    out: Path = Path("mirage-evaluation")
    """where to write"""
    adapter: str | None = None
    """memory adapter of the model's own memory: folder, hub id, or a file of the published release"""
    lora: str | None = None
    """LoRA of the model's own memory: file, folder or hub id"""
    weights: dict[str, Path] = field(default_factory=dict)
    """what a memory's model was trained to: a folder as `mirage train` leaves it"""
    seeds: range = range(10_000, 10_032)
    """rooms never trained on"""
    frames: int = 97
    """of a loop, 4 n + 1"""
    memory: tuple[str, ...] = tuple(MEMORIES)
    """which of the memories"""
    depth: tuple[str, ...] = DEPTHS
    """whose depth is written: true, head"""
    size: tuple[int, int] = (96, 160)
    """of the frames, multiples of 32"""
    steps: int | None = None
    """denoising steps; default 20, with mirage-tiny 2"""
    guidance: float = 1.0
    """guidance scale; 1 is none"""
    chunk_frames: int = 33
    """frames at a time, 4 n + 1"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to generate"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of the models; default bfloat16 on cuda, float32 on cpu"""
    write_policy: Literal["append", "bounded"] = "append"
    """of the aligned memory: keep everything, as the others do, or bounded"""
    texture: float = 0.25
    """contrast of the rooms' patterns, 0 to 1; mirage-tiny's are 0.25"""


def make_loop(
    seed: int, frames: int, size: Sequence[int], texture: float = EvaluateOptions.texture
) -> tuple[SyntheticRoom, str, Cameras]:
    """Make the room of a seed, the kind of its loop, and the loop's cameras."""
    room, kind = SyntheticRoom(seed, moving=0, texture=texture), LOOPS[seed % len(LOOPS)]
    return room, kind, room.path(kind, frames, size)


def room_path(options: EvaluateOptions, depth: str, name: str, seed: int) -> Path:
    """Give the path of a room's results; its video lies beside it."""
    depth = options.depth[0] if name == "none" else "true" if name == CEILING else depth
    return options.out / "rooms" / depth / name / f"{seed:06d}.json"

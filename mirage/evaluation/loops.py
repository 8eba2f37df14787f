"""What `mirage evaluate` is asked for: options, the loops through rooms, and where each room's results lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mirage_kernels import Cameras

from ..pipeline.memory import MEMORIES, STEPS
from ..scenes.synthetic import SyntheticRoom

REPORT, TABLE, PLOTS, CONTACT, VIDEO = "report.json", "report.md", "plots", "contact.png", "side_by_side.mp4"
DEPTHS = ("true", "head")
LOOPS = ("walk-and-back", "orbit-and-back", "pan-and-back", "laps")
"""Out and back, bit for bit the same views on both ways, or twice around a circle; by the seed."""
CEILING = "codec"
"""The true pictures, encoded and decoded: what no memory can be better than."""


@dataclass(frozen=True)
class EvaluateOptions:
    """What `mirage evaluate` is asked for; :func:`mirage.commands.cli.make_parser` says what each is."""

    out: Path
    model: str
    adapter: str | None = None
    lora: str | None = None
    weights: dict[str, Path] = field(default_factory=dict)
    seeds: range = range(10_000, 10_032)
    frames: int = 97
    memory: tuple[str, ...] = MEMORIES
    depth: tuple[str, ...] = DEPTHS
    size: tuple[int, int] = (96, 160)
    steps: int = STEPS
    guidance: float = 1.0
    chunk_frames: int = 33
    device: str = "cpu"
    dtype: str | None = None
    write_policy: str = "append"
    texture: float = 0.25


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

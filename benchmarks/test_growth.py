"""Measure time and bytes as a memory grows: 50 chunks of new rooms, and 50 laps of one loop, 8 frames each.

At sampled chunks the next chunk is read and 8 frames are written, both timed on the memory as it is then. ``in view``
are the bytes of the tokens (or points) in the read views' frustums, occluded or not: what a read cannot do without.

A read grows by hundredths, and the machine's speed drifts by more from minute to minute. So a second memory
of the first chunk alone is kept, and at the end the two are read in turns: ``read beside`` and ``first chunk beside``.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from mirage_kernels import Cameras, LatentCache
from mirage_kernels.cache import WRITE_POLICIES

from . import memories, scenes
from .pixel_memory import BYTES_PER_POINT
from .reference_memory import ReferenceMemory
from .report import BESIDE
from .scenes import Size

pytestmark = pytest.mark.full

CHUNKS = 50
SAMPLED = (1, 2, 5, 10, 20, 30, 40, 50)
FEW, SLOW = (1, 10, 50), ("pixel, plain", "reference")  # where one read takes seconds
# Walks by name: does every chunk enter a new room; does the camera look back along the row, at every room so far?
WALKS = {"new rooms": (True, False), "new rooms, looking back": (True, True), "closed loop": (False, False)}
# All sides at both; on a CPU the pixels of the large one do not fit.
LARGE, SMALL = Size(8, 704, 1280), Size(8, 176, 320)
SIDES = [f"latent, bf16{'' if policy == 'append' else f', {policy}'}" for policy in WRITE_POLICIES] + ["reference"]
PIXELS = ["pixel, plain", "pixel, kernels nearest"]
CASES = [(side, size) for size in (LARGE, SMALL) for side in SIDES + PIXELS]


class _Side:
    """Put one memory behind the same three calls."""

    def __init__(self, variant: str, device: torch.device, size: Size) -> None:
        self.size, self.pixel = size, variant.startswith("pixel")
        if self.pixel:
            self.memory: Any = memories.PIXELS[variant](device=device)
        elif variant == "reference":
            self.memory = ReferenceMemory(scenes.CHANNELS, device)
        else:
            policy = variant.removeprefix("latent, bf16").removeprefix(", ") or "append"
            self.memory = LatentCache(scenes.CHANNELS, dtype=torch.bfloat16, device=device, write_policy=policy)

    def write(self, frames: torch.Tensor, depth: torch.Tensor, cameras: Cameras) -> None:
        if isinstance(self.memory, ReferenceMemory):
            self.memory.write(frames, depth, cameras.intrinsics, cameras.cam2world)
        else:
            self.memory.write(frames, depth, cameras)

    def read(self, cameras: Cameras) -> Any:
        if self.pixel:
            return self.memory.render(cameras, self.size.image)
        views = scenes.latent_views(cameras).resized(self.size.grid)
        if isinstance(self.memory, ReferenceMemory):
            return self.memory.read(views.intrinsics, views.cam2world, self.size.grid)
        return self.memory.read(views, self.size.grid, splat="nearest")

    def points(self) -> torch.Tensor:
        return self.memory.points

    @property
    def nbytes(self) -> int:
        if isinstance(self.memory, ReferenceMemory):
            return self.memory.points.nbytes + self.memory.features.nbytes
        return self.memory.nbytes


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize(("variant", "stored"), CASES, ids=[f"{v}-{s.height}x{s.width}" for v, s in CASES])
def test_growth(walk: str, variant: str, stored: Size, bench: Any) -> None:
    size = stored
    if bench.quick and (size is LARGE or walk != "new rooms"):
        pytest.skip("a quick run grows the small memories only")
    if variant.startswith("pixel") and size is LARGE and bench.device.type == "cpu":
        pytest.skip("50 chunks at this size are too many points for a CPU")
    new_rooms, looking_back = WALKS[walk]
    if looking_back and (variant.startswith("pixel") or size is SMALL):
        pytest.skip("looking back is for latent and reference memories at the large size")
    sampled = SAMPLED[:3] if bench.quick else FEW if variant in SLOW else SAMPLED
    # One lap of 8 frames, the same in every room; the chunk read next begins where it ends.
    path = scenes.camera_path(scenes.WRITE_VIEWS).resized(size.image)
    ahead = scenes.camera_path(scenes.CHUNK_FRAMES, laps=0.15, phase=0.5).resized(size.image)
    if looking_back:
        ahead = scenes.camera_path(scenes.CHUNK_FRAMES, laps=0.05, phase=0.85 / 0.05 * scenes.CHUNK_FRAMES)
        ahead = ahead.resized(size.image)
    depth = scenes.render_depth(path).to(bench.device)
    side = _Side(variant, bench.device, size)
    frames = scenes.images(path, depth.cpu()) if side.pixel else scenes.latents(scenes.WRITE_VIEWS, size.grid)
    frames = frames.to(bench.device)
    slow = side.pixel or variant == "reference"
    first = None if slow else _Side(variant, bench.device, size)
    if first is not None:
        first.write(frames, depth, path.to(bench.device))
    for chunk in range(1, sampled[-1] + 1):
        room = chunk - 1 if new_rooms else 0
        cameras = scenes.moved_room(path, room).to(bench.device)
        if chunk not in sampled:
            side.write(frames, depth, cameras)
            continue
        label = f"chunk {chunk} of {size.height}x{size.width}"
        written = bench.once(functools.partial(side.write, frames, depth, cameras))
        views = scenes.moved_room(ahead, room).to(bench.device)
        rounds = (1 if variant == "pixel, plain" else 3) if slow else 21
        read = bench.seconds(functools.partial(side.read, views), rounds, warmup=0 if slow else 2)
        bench.file("growth", f"{walk}: write", variant, label, None, [written])
        bench.file("growth", f"{walk}: read", variant, label, None, read)
        bench.record("growth", f"{walk}: held", variant, label, nbytes=side.nbytes)
        if not slow:
            seen = memories.count_in_view(side.points(), scenes.latent_views(views), size.grid)
            in_view = side.nbytes * seen // max(len(side.memory), 1)
            bench.record("growth", f"{walk}: in view", variant, label, nbytes=in_view)
        if first is not None and chunk == sampled[-1]:
            alone = functools.partial(first.read, scenes.moved_room(ahead, 0).to(bench.device))
            beside = bench.seconds_of_both(functools.partial(side.read, views), alone, 101, warmup=5)
            for name, taken in zip(BESIDE, beside, strict=True):
                bench.file("growth", f"{walk}: {name}", variant, label, None, taken)
    if variant == "pixel, plain":
        assert side.nbytes == sampled[-1] * size.pixels * BYTES_PER_POINT

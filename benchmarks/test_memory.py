"""Reading and writing the memory, ours beside the plain PyTorch baseline, in one run: ``make bench``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mirage_kernels import Cameras, LatentCache, splat

from . import scenes
from .conftest import Scene

WRITE_VIEWS = 8
READ_VARIANTS = ("operator", "cache", "bfloat16 operator", "aligned cache", "baseline")
WRITE_VARIANTS = ("median", "median, noisy", "bilinear", "baseline")


def _cache_of(scene: Scene, room: int = 0) -> LatentCache:
    """A LatentCache that holds the scene's very tokens."""
    cache = LatentCache(scenes.CHANNELS, device=scene.points.device, capacity=scene.tokens + room)
    frames = scene.tokens // (scenes.GRID[0] * scenes.GRID[1])
    device = scene.points.device
    cache._fill(
        {
            "points": scene.points,
            "features": scene.features,
            "frame_ids": torch.arange(frames, dtype=torch.int32, device=device).repeat_interleave(
                scenes.GRID[0] * scenes.GRID[1]
            ),
            "frame_centers": torch.zeros(frames, 3, device=device),
        }
    )
    return cache


@pytest.mark.parametrize("variant", READ_VARIANTS)
def test_read(scene: Scene, variant: str, measure: Any) -> None:
    """9 views of 44x80x48 out of N tokens."""
    grid = scene.read_cameras.resized(scenes.GRID)
    half = variant.startswith("bfloat16")
    features = scene.features.bfloat16() if half else scene.features
    cells = len(grid) * scenes.GRID[0] * scenes.GRID[1]
    seen = splat(scene.points, features, grid.intrinsics, grid.cam2world, scenes.GRID).mask
    assert float(seen.float().mean()) > 0.5
    if variant.endswith("cache"):
        cache = _cache_of(scene)
        mode = "aligned" if variant.startswith("aligned") else "nearest"

        def run() -> Any:
            return cache.read(scene.read_cameras, scenes.GRID, splat=mode)

    elif variant == "baseline":

        def run() -> Any:
            return scene.baseline.read(grid.intrinsics, grid.cam2world, scenes.GRID)

    else:

        def run() -> Any:
            return splat(scene.points, features, grid.intrinsics, grid.cam2world, scenes.GRID)

    # Least: every point once, a row per seen cell in, and the latents, mask, depth and index out.
    row = scenes.CHANNELS * features.element_size()
    nbytes = scene.points.nbytes + int(seen.sum()) * row + cells * (row + 1 + 4 + 8)
    rounds = 9 if variant == "baseline" and scene.tokens > 10**6 else 41
    measure("memory", "read", variant, f"{scene.tokens} tokens", nbytes, run, rounds)


@pytest.mark.parametrize("variant", WRITE_VARIANTS)
def test_write(scene: Scene, variant: str, measure: Any, device: torch.device) -> None:
    """8 frames of 704x1280 depth to 44x80 tokens, into a memory that holds N tokens."""
    cameras = Cameras(*scenes.camera_path(WRITE_VIEWS, laps=0.1, phase=0.3), scenes.IMAGE_SIZE).to(device)
    depth = scenes.render_depth(cameras.intrinsics.cpu(), cameras.cam2world.cpu(), scenes.IMAGE_SIZE)
    if variant == "median, noisy":
        # Independent 1 % noise at every pixel is the hard case of a median: no surface left to interpolate.
        generator = torch.Generator().manual_seed(1)
        depth = depth * (1 + 0.01 * torch.randn(depth.shape, generator=generator))
    depth = depth.to(device)
    latents = scenes.latents(WRITE_VIEWS, seed=1).to(device)
    tokens = WRITE_VIEWS * scenes.GRID[0] * scenes.GRID[1]
    if variant == "baseline":
        memory = scene.baseline
        held = memory.points, memory.features

        def setup() -> None:
            memory.points, memory.features = held

        def run() -> None:
            memory.write(latents, depth, cameras.intrinsics, cameras.cam2world)

    else:
        cache = _cache_of(scene, room=tokens)
        frames = cache.num_frames

        def setup() -> None:
            cache._count.fill_(scene.tokens)
            cache._num_frames = frames

        def run() -> None:
            cache.write(latents, depth, cameras, depth_sampling=variant.split(",")[0])

    row = scenes.CHANNELS * 4
    nbytes = depth.nbytes + latents.nbytes + tokens * (row + 16 + 4)
    try:
        measure("memory", "write", variant, f"{scene.tokens} tokens", nbytes, run, 21, setup)
        if variant == "baseline":
            assert memory.points.shape[0] > scene.tokens
        else:
            assert len(cache) == scene.tokens + tokens
    finally:
        setup()

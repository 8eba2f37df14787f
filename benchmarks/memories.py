"""Fill the memories side by side with the same frames of the same room; the last size built is kept."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirage_kernels import Cameras, LatentCache, back_project
from mirage_kernels.geometry import in_view, make_projection, project_points

from . import scenes
from .pixel_memory import KernelPixelMemory, PlainPixelMemory
from .reference_memory import ReferenceMemory
from .scenes import Size

PIXELS: dict[str, Callable[..., Any]] = {
    "pixel, plain": PlainPixelMemory,
    "pixel, kernels bilinear": functools.partial(KernelPixelMemory, "bilinear"),
    "pixel, kernels nearest": functools.partial(KernelPixelMemory, "nearest"),
}
# The most points of a pixel memory that a run has the time and memory for.
_MOST_PIXELS = {"cpu": 10_000_000, "cuda": 400_000_000}
_FRAMES_AT_ONCE = 8
_VIEWED_AT_ONCE = 1 << 20


class Tokens(NamedTuple):
    """Hold ``points`` (N, 4) and ``features`` (N, C) float32 of the stored frames."""

    points: Tensor
    features: Tensor


@functools.lru_cache(maxsize=1)
def tokens(size: Size, device: torch.device) -> Tokens:
    # Depth is rendered at the token grid: reading needs the tokens, not thousands of full depth maps.
    cameras = scenes.stored_cameras(size).resized(size.grid)
    lifted = back_project(scenes.render_depth(cameras), cameras.intrinsics, cameras.cam2world, size.grid)
    assert bool(lifted.valid.all())
    generator = torch.Generator(device).manual_seed(0)
    features = torch.randn(size.tokens, scenes.CHANNELS, generator=generator, device=device)
    return Tokens(lifted.points.reshape(-1, 4).to(device), features)


def latent_cache(size: Size, device: torch.device, dtype: torch.dtype, room: int = 0) -> LatentCache:
    """Make a cache that holds the scene's tokens, with room for so many more."""
    points, features = tokens(size, device)
    cache = LatentCache(scenes.CHANNELS, dtype=dtype, device=device, capacity=size.tokens + room, write_policy="append")
    ids = torch.arange(size.frames, dtype=torch.int32, device=device).repeat_interleave(size.grid[0] * size.grid[1])
    centers = scenes.stored_cameras(size).centers.float().to(device)
    cache.buffers.fill({"points": points, "features": features, "frame_ids": ids, "frame_centers": centers})
    return cache


def reference_memory(size: Size, device: torch.device) -> ReferenceMemory:
    points, features = tokens(size, device)
    memory = ReferenceMemory(scenes.CHANNELS, device)
    memory.points, memory.features = points[:, :3].contiguous(), features
    return memory


def pixels_fit(size: Size, device: torch.device) -> bool:
    return size.pixels <= _MOST_PIXELS[device.type]


@functools.lru_cache(maxsize=1)
def pixel_memory(variant: str, size: Size, device: torch.device) -> Any:
    """Make one of PIXELS that holds every pixel of the stored frames."""
    gc.collect()
    memory = PIXELS[variant](device=device)
    cameras = scenes.stored_cameras(size)
    for start in range(0, size.frames, _FRAMES_AT_ONCE):
        part = cameras[start : start + _FRAMES_AT_ONCE]
        depth = scenes.render_depth(part)
        memory.write(scenes.images(part, depth).to(device), depth.to(device), part)
    return memory


def count_in_view(points: Tensor, cameras: Cameras, size: tuple[int, int]) -> int:
    """Count the points (N, >= 3) that at least one camera has in its frustum, occluded or not."""
    grid = cameras.to(points.device).resized(size)
    projections = make_projection(grid.intrinsics, grid.cam2world, torch.float32)
    total = 0
    for part in points.split(_VIEWED_AT_ONCE):
        seen = torch.zeros(part.shape[0], dtype=torch.bool, device=points.device)
        for projection in projections:
            seen |= in_view(*project_points(part, projection), size, 0.05)
        total += int(seen.sum())
    return total


@functools.lru_cache(maxsize=1)
def tokens_in_view(size: Size, device: torch.device) -> int:
    views = scenes.latent_views(scenes.chunk_cameras(size))
    return count_in_view(tokens(size, device).points, views, size.grid)


def read_bytes(size: Size, device: torch.device, seen: int, dtype: torch.dtype) -> int:
    """Count the least bytes of a read: points in view, a row per seen cell, and latents, mask, depth and index out."""
    row, cells = scenes.CHANNELS * dtype.itemsize, scenes.READ_VIEWS * size.grid[0] * size.grid[1]
    return 16 * tokens_in_view(size, device) + seen * row + cells * (row + 1 + 4 + 8)


def render_bytes(size: Size, device: torch.device, seen: int, variant: str) -> int:
    """Count the least bytes of a rasterisation: points in view, a colour per seen pixel, float32 image and mask out.

    Points in view are counted with the tokens, whose every cell stands for 256 pixels.
    """
    point, colour = (12, 12) if variant == "pixel, plain" else (16, 16)
    in_view_points = tokens_in_view(size, device) * scenes.CELL**2
    return point * in_view_points + colour * seen + scenes.CHUNK_FRAMES * size.height * size.width * (12 + 1)

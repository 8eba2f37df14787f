"""Measure a write of 8 frames, with depth at the image's size, into a memory that holds so much already."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mirage_kernels import Cameras

from . import memories, scenes
from .scenes import Size

NAME = "8 frames"
LATENT = {
    "latent, f32": (torch.float32, "median", 0.0),
    "latent, bf16": (torch.bfloat16, "median", 0.0),
    # Independent noise at every pixel is the hard case of a median: no surface left to interpolate.
    "latent, bf16, 1 % depth noise": (torch.bfloat16, "median", 0.01),
    "latent, bf16, bilinear depth": (torch.bfloat16, "bilinear", 0.0),
}


def _frames(size: Size, device: torch.device, noise: float = 0.0) -> tuple[Cameras, Tensor]:
    cameras = scenes.camera_path(scenes.WRITE_VIEWS, laps=0.1, phase=0.3).resized(size.image)
    depth = scenes.render_depth(cameras)
    depth = depth * (1 + noise * torch.randn(depth.shape, generator=torch.Generator().manual_seed(1)))
    return cameras.to(device), depth.to(device)


def _bytes(size: Size, depth: Tensor, dtype: torch.dtype) -> int:
    """Count the least bytes of a latent write: depth and latents in, a point, a row and a frame id a token out."""
    row = scenes.CHANNELS * dtype.itemsize
    return depth.nbytes + scenes.WRITE_VIEWS * size.grid[0] * size.grid[1] * (2 * row + 16 + 4)


@pytest.mark.parametrize("variant", LATENT)
def test_latent(size: Size, variant: str, bench: Any) -> None:
    dtype, sampling, noise = LATENT[variant]
    cameras, depth = _frames(size, bench.device, noise)
    latents = scenes.latents(scenes.WRITE_VIEWS, size.grid, seed=1).to(bench.device, dtype)
    tokens = scenes.WRITE_VIEWS * size.grid[0] * size.grid[1]
    cache = memories.latent_cache(size, bench.device, dtype, room=tokens)

    def forget() -> None:
        cache.buffers.count.fill_(size.tokens)
        cache.buffers.num_frames = size.frames

    bench.measure(
        "write", NAME, variant, size.label, _bytes(size, depth, dtype),
        lambda: cache.write(latents, depth, cameras, depth_sampling=sampling), rounds=41, setup=forget, graph=True,
    )  # fmt: skip
    assert len(cache) == size.tokens + tokens


def test_reference(size: Size, bench: Any) -> None:
    cameras, depth = _frames(size, bench.device)
    latents = scenes.latents(scenes.WRITE_VIEWS, size.grid, seed=1).to(bench.device)
    memory = memories.reference_memory(size, bench.device)
    held = memory.points, memory.features

    def forget() -> None:
        memory.points, memory.features = held

    bench.measure(
        "write", NAME, "reference", size.label, _bytes(size, depth, torch.float32),
        lambda: memory.write(latents, depth, cameras.intrinsics, cameras.cam2world), rounds=21, setup=forget,
    )  # fmt: skip
    assert memory.points.shape[0] == size.tokens + scenes.WRITE_VIEWS * size.grid[0] * size.grid[1]


@pytest.mark.parametrize("variant", [name for name in memories.PIXELS if "bilinear" not in name])
def test_pixel(size: Size, variant: str, bench: Any) -> None:
    """Write where buffers have room: what lies in a pixel memory already costs a write nothing, so it is empty here."""
    if not memories.pixels_fit(Size(scenes.WRITE_VIEWS, size.height, size.width), bench.device):
        pytest.skip("too many points for a run on this device")
    cameras, depth = _frames(size, bench.device)
    rgb = scenes.images(cameras.to("cpu"), depth.cpu()).to(bench.device)
    memory: Any = memories.PIXELS[variant](device=bench.device)
    memory.write(rgb, depth, cameras)
    point = 24 if variant == "pixel, plain" else 16 + 16 + 4

    name = "pixel, kernels" if variant != "pixel, plain" else variant
    bench.measure(
        "write", NAME, name, size.label, depth.nbytes + rgb.nbytes + depth.numel() * point,
        lambda: memory.write(rgb, depth, cameras), rounds=9, setup=memory.clear,
    )  # fmt: skip
    assert len(memory) == depth.numel()

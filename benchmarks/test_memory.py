"""Measure bytes: what a memory holds of the same frames, and the most that one chunk's read takes on top."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import memories, scenes
from .pixel_memory import BYTES_PER_POINT_UINT8
from .scenes import Size
from .timing import peak_bytes

LATENT = {"latent, f32": torch.float32, "latent, bf16": torch.bfloat16}


def _peak(bench: Any, name: str, variant: str, size: Size, function: Any) -> None:
    with torch.inference_mode():
        peak = peak_bytes(function, bench.device)
    if peak is not None:
        bench.record("memory", name, variant, size.label, nbytes=peak)


@pytest.mark.parametrize("variant", LATENT)
def test_latent(size: Size, variant: str, bench: Any) -> None:
    cache = memories.latent_cache(size, bench.device, LATENT[variant])
    views = scenes.latent_views(scenes.chunk_cameras(size)).to(bench.device).resized(size.grid)
    bench.record("memory", "held", variant, size.label, nbytes=cache.nbytes)
    _peak(bench, "peak of one chunk's read", variant, size, lambda: cache.read(views, size.grid, splat="nearest"))


def test_reference(size: Size, bench: Any) -> None:
    memory = memories.reference_memory(size, bench.device)
    views = scenes.latent_views(scenes.chunk_cameras(size)).to(bench.device).resized(size.grid)
    held = memory.points.nbytes + memory.features.nbytes
    bench.record("memory", "held", "reference", size.label, nbytes=held)
    _peak(
        bench, "peak of one chunk's read", "reference", size,
        lambda: memory.read(views.intrinsics, views.cam2world, size.grid),
    )  # fmt: skip


@pytest.mark.parametrize("variant", memories.PIXELS)
def test_pixel(size: Size, variant: str, bench: Any) -> None:
    if not memories.pixels_fit(size, bench.device):
        pytest.skip(f"{size.pixels / 1e6:.0f} million points are too many for a run on this device")
    memory = memories.pixel_memory(variant, size, bench.device)
    cameras = scenes.chunk_cameras(size).to(bench.device)
    if "nearest" not in variant:
        bench.record("memory", "held", variant.replace(" bilinear", ""), size.label, nbytes=memory.nbytes)
    if variant == "pixel, plain":
        nbytes = len(memory) * BYTES_PER_POINT_UINT8
        bench.record("memory", "held", "pixel, plain, 8-bit colours", size.label, nbytes=nbytes)
    _peak(bench, "peak of one chunk's images", variant, size, lambda: memory.render(cameras, size.image))

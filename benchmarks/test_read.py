"""Measure a read of what one chunk's cameras see: 9 latent views, or the 33 images that a pixel memory renders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mirage_kernels.cache import SPLATS

from . import memories, scenes
from .scenes import Size
from .timing import flush_cpu_caches

LATENT = [("latent, f32", torch.float32, "nearest"), ("latent, bf16", torch.bfloat16, "nearest")]
LATENT += [(f"latent, bf16, {splat}", torch.bfloat16, splat) for splat in SPLATS if splat != "nearest"]


@pytest.mark.parametrize(("variant", "dtype", "splat"), LATENT, ids=[name for name, _, _ in LATENT])
def test_latent(size: Size, variant: str, dtype: torch.dtype, splat: str, bench: Any) -> None:
    cache = memories.latent_cache(size, bench.device, dtype)
    views = scenes.latent_views(scenes.chunk_cameras(size)).to(bench.device).resized(size.grid)
    seen = int(cache.read(views, size.grid, splat="nearest").mask.sum())
    assert seen > 0.5 * len(views) * size.grid[0] * size.grid[1]
    nbytes = memories.read_bytes(size, bench.device, seen, dtype)
    if variant == "latent, bf16":
        fraction = memories.tokens_in_view(size, bench.device) / size.tokens
        bench.record("read", "tokens in view", "", size.label, value=fraction)
    bench.measure(
        "read", "9 latent views", variant, size.label, nbytes, lambda: cache.read(views, size.grid, splat=splat),
        rounds=101, warmup=5, graph=True,
    )  # fmt: skip


def test_latent_with_cold_caches(size: Size, bench: Any) -> None:
    """Read as after a denoiser, when nothing of the memory is left in the processor's caches."""
    if bench.device.type == "cuda":
        pytest.skip("on a GPU every variant is measured warm and cold")
    cache = memories.latent_cache(size, bench.device, torch.bfloat16)
    views = scenes.latent_views(scenes.chunk_cameras(size)).resized(size.grid)
    seen = int(cache.read(views, size.grid, splat="nearest").mask.sum())
    nbytes = memories.read_bytes(size, bench.device, seen, torch.bfloat16)
    bench.measure(
        "read", "9 latent views", "latent, bf16, cold caches", size.label, nbytes,
        lambda: cache.read(views, size.grid, splat="nearest"), rounds=21, setup=flush_cpu_caches,
    )  # fmt: skip


def test_reference(size: Size, bench: Any) -> None:
    memory = memories.reference_memory(size, bench.device)
    views = scenes.latent_views(scenes.chunk_cameras(size)).to(bench.device).resized(size.grid)
    seen = int(memory.read(views.intrinsics, views.cam2world, size.grid)[1].sum())
    nbytes = memories.read_bytes(size, bench.device, seen, torch.float32)
    bench.measure(
        "read", "9 latent views", "reference", size.label, nbytes,
        lambda: memory.read(views.intrinsics, views.cam2world, size.grid),
        rounds=9 if size.tokens > 10**6 else 21, warmup=1,
    )  # fmt: skip


def test_reference_is_not_exact(size: Size, bench: Any) -> None:
    """Record the fractions of seen cells that hold a farther token's latents, and that change from run to run."""
    memory = memories.reference_memory(size, bench.device)
    views = scenes.latent_views(scenes.chunk_cameras(size)).to(bench.device).resized(size.grid)
    wrong, changed = memory.read_exactness(views.intrinsics, views.cam2world, size.grid)
    bench.record("read", "cells wrong", "reference", size.label, value=wrong)
    bench.record("read", "cells that change", "reference", size.label, value=changed)
    cache = memories.latent_cache(size, bench.device, torch.float32)
    reads = [cache.read(views, size.grid, splat="nearest") for _ in range(5)]
    same = [torch.equal(view.latents, reads[0].latents) and torch.equal(view.index, reads[0].index) for view in reads]
    assert all(same)
    bench.record("read", "cells that change", "latent, f32", size.label, value=0.0)


@pytest.mark.parametrize("variant", memories.PIXELS)
def test_pixel(size: Size, variant: str, bench: Any) -> None:
    """Measure rasterising alone; encoding is in `condition`."""
    if not memories.pixels_fit(size, bench.device):
        pytest.skip(f"{size.pixels / 1e6:.0f} million points are too many for a run on this device")
    memory = memories.pixel_memory(variant, size, bench.device)
    cameras = scenes.chunk_cameras(size).to(bench.device)
    seen = int(memory.render(cameras, size.image).seen.sum())
    assert seen > 0.3 * scenes.CHUNK_FRAMES * size.height * size.width
    nbytes = memories.render_bytes(size, bench.device, seen, variant)
    bench.measure(
        "read", "33 images", variant, size.label, nbytes, lambda: memory.render(cameras, size.image),
        rounds=7 if "nearest" in variant else 3 if bench.full or size == scenes.GOAL else 1, warmup=0,
    )  # fmt: skip

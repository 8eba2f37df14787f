"""Measure all that one chunk needs before denoising: the latent grid of what is remembered, mask, reference frames.

The latent side is measured with and without choosing reference frames (``view_overlap`` over the stored views): the
pixel side chooses none here, which is in its favour. Its time is rasterising plus encoding.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from mirage_kernels import Cameras

from . import memories, scenes
from .comparison import ENCODER_NEEDS
from .memories import pixels_fit
from .pixel_memory import FULL_WIDTH, encode, make_encoder
from .scenes import GOAL, QUICK, Size
from .timing import peak_bytes, summarise, synchronize

NAME = "one chunk"
CANDIDATES = 20  # stored views that reference frames are chosen from
REFERENCES = 4
QUICK_WIDTH = 16
PART = 5  # images of a chunk that are encoded where all of them would take minutes


def _control(latents: Tensor, mask: Tensor) -> Tensor:
    """Make what the denoiser takes: 48 channels of latents and 48 of scores, both 0 in holes; (9, 96, h, w)."""
    return torch.cat([latents, mask[:, None].to(latents.dtype).expand_as(latents)], dim=1)


def _candidates(size: Size, device: torch.device) -> Cameras:
    step = max(1, size.frames // CANDIDATES)
    return scenes.stored_cameras(size)[::step][:CANDIDATES].to(device).resized(size.grid)


@pytest.mark.parametrize("references", [True, False], ids=["with references", "without"])
def test_latent(size: Size, references: bool, bench: Any) -> None:
    cache = memories.latent_cache(size, bench.device, torch.bfloat16)
    views = scenes.latent_views(scenes.chunk_cameras(size)).to(bench.device).resized(size.grid)
    candidates = _candidates(size, bench.device)

    def condition() -> Any:
        view = cache.read(views, size.grid, splat="nearest")
        control = _control(view.latents, view.mask)
        if not references:
            return control
        scores = cache.view_overlap(candidates, views, size.grid)
        return control, scores.topk(min(REFERENCES, len(candidates))).indices

    seen = int(cache.read(views, size.grid, splat="nearest").mask.sum())
    nbytes = memories.read_bytes(size, bench.device, seen, torch.bfloat16)
    variant = "latent, bf16" if references else "latent, bf16, no reference frames"
    bench.measure("condition", NAME, variant, size.label, nbytes, condition, rounds=41, graph=not references)


@pytest.mark.parametrize("references", [True, False], ids=["with references", "without"])
def test_reference(size: Size, references: bool, bench: Any) -> None:
    memory = memories.reference_memory(size, bench.device)
    views = scenes.latent_views(scenes.chunk_cameras(size)).to(bench.device).resized(size.grid)
    candidates = _candidates(size, bench.device)

    def condition() -> Any:
        control = _control(*memory.read(views.intrinsics, views.cam2world, size.grid))
        if not references:
            return control
        scores = memory.overlap(
            candidates.intrinsics, candidates.cam2world, views.intrinsics, views.cam2world, size.grid
        )
        return control, scores.topk(min(REFERENCES, len(candidates))).indices

    seen = int(memory.read(views.intrinsics, views.cam2world, size.grid)[1].sum())
    nbytes = memories.read_bytes(size, bench.device, seen, torch.float32)
    variant = "reference" if references else "reference, no reference frames"
    bench.measure(
        "condition", NAME, variant, size.label, nbytes, condition, rounds=3 if size.tokens > 10**6 else 7, warmup=1
    )


@pytest.mark.parametrize("side", ["latent, bf16", "reference"])
def test_choosing_reference_frames(size: Size, side: str, bench: Any) -> None:
    """Measure the overlap of the stored views with the chunk's, alone."""
    views = scenes.latent_views(scenes.chunk_cameras(size)).to(bench.device).resized(size.grid)
    candidates = _candidates(size, bench.device)
    # The least: every token's position once.
    nbytes = size.tokens * (16 if side != "reference" else 12)
    name = f"overlap of {len(candidates)} views"
    if side == "reference":
        memory = memories.reference_memory(size, bench.device)
        cameras = (candidates.intrinsics, candidates.cam2world, views.intrinsics, views.cam2world)
        bench.measure(
            "condition", name, side, size.label, nbytes, lambda: memory.overlap(*cameras, size.grid),
            rounds=3 if size.tokens > 10**6 else 7, warmup=0,
        )  # fmt: skip
    else:
        cache = memories.latent_cache(size, bench.device, torch.bfloat16)
        bench.measure(
            "condition", name, side, size.label, nbytes, lambda: cache.view_overlap(candidates, views, size.grid),
            rounds=21,
        )  # fmt: skip


def test_pixel(size: Size, bench: Any) -> None:
    """Rasterise and encode. On a CPU encoding takes minutes: it runs once, at one size.

    With --full its time is added to each rasteriser's. Without, it encodes the chunk's first PART images at full width:
    no more than a lower bound of what a chunk takes, and nothing is concluded from it about the rest.
    """
    if not pixels_fit(size, bench.device):
        pytest.skip(f"{size.pixels / 1e6:.0f} million points are too many for a run on this device")
    gpu = bench.device.type == "cuda"
    if not gpu and size not in (GOAL, QUICK):
        pytest.skip(f"encoding at {size.height}x{size.width} takes too long on a CPU")
    pytest.importorskip("diffusers", reason=ENCODER_NEEDS)
    width, dtype = (
        (QUICK_WIDTH, torch.float32) if bench.quick else (FULL_WIDTH, torch.bfloat16 if gpu else torch.float32)
    )
    vae = make_encoder(width, bench.device, dtype)
    cameras = scenes.chunk_cameras(size).to(bench.device)
    encoder = f"encoder of width {width}"
    if not (bench.full or bench.quick):
        memory = memories.pixel_memory("pixel, kernels nearest", size, bench.device)
        rendered = memory.render(cameras[:PART], size.image)
        seconds = bench.seconds(lambda: encode(vae, rendered), 1, warmup=0)
        name = f"encoding {PART} of {scenes.CHUNK_FRAMES} images"
        bench.file("condition", name, f"pixel, {encoder}", size.label, None, seconds)
        return
    medians = {}
    for variant in memories.PIXELS:
        memory = memories.pixel_memory(variant, size, bench.device)
        seconds = bench.seconds(
            functools.partial(memory.render, cameras, size.image), 1 if bench.quick else 3, warmup=0
        )
        medians[variant] = summarise(seconds).median
        rendered = memory.render(cameras, size.image)
        if gpu:  # as a whole
            both = bench.seconds(
                lambda memory=memory: encode(vae, memory.render(cameras, size.image)), 5, warmup=1
            )  # fmt: skip
            bench.file("condition", NAME, f"{variant}, {encoder}", size.label, None, both)
    seconds = []

    def run() -> None:
        once = bench.seconds(lambda: encode(vae, rendered), 5 if gpu else 1, warmup=1 if gpu else 0)
        seconds.extend(once)
        synchronize(bench.device)

    peak = peak_bytes(run, bench.device)
    bench.file("condition", "encoding alone", f"pixel, {encoder}", size.label, None, seconds)
    if peak is not None:
        bench.record("memory", "peak of one chunk's encoding", f"pixel, {encoder}", size.label, nbytes=peak)
    if not gpu:
        for variant, median in medians.items():
            total = [median + second for second in seconds]
            bench.file("condition", NAME, f"{variant}, {encoder}", size.label, None, total)

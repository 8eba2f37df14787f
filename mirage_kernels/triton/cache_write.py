"""`cache_write`: lift the tokens, judge and count them by blocks, prefix sum over the blocks, append in order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import BLOCK, TILE
from .back_project import CLASSES, KEPT, MASKED, NON_FINITE, OUT_OF_RANGE, UNKNOWN_DEPTH, lift_tokens
from .block_bounds import bound_tiles, store_box
from .features import is_storable, magnitude_bits, raw, store_features, token_scale
from .launch import EXACT, cdiv, device_of, implements, power_of_2

_CLASSES = tl.constexpr(CLASSES)
_KEPT = tl.constexpr(KEPT)
_MASKED = tl.constexpr(MASKED)
_UNKNOWN_DEPTH = tl.constexpr(UNKNOWN_DEPTH)
_OUT_OF_RANGE = tl.constexpr(OUT_OF_RANGE)
_NON_FINITE = tl.constexpr(NON_FINITE)

# Latents are read along 64 tokens (128 or 256 contiguous bytes a channel) and stored along a token's channels.
TOKENS = 64
_CHANNELS = 64
# One program scans all blocks: a chunk of 9 frames of 44x80 has 495 of them, one step.
_SCAN = 1024


@triton.jit(do_not_specialize=["token_blocks", "blocks"])
def judge_kernel(
    latents,
    features,
    state,
    counts,
    channels,
    cells,
    token_blocks,
    blocks,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Finds tokens with a latent that is not finite once stored, and counts every class within the block."""
    block = tl.program_id(0)
    view = (block // token_blocks).to(tl.int64)
    token = (block % token_blocks) * TOKENS + tl.arange(0, TOKENS)
    inside = token < cells
    becomes = tl.load(state + view * cells + token, inside, other=_CLASSES).to(tl.int32)
    bad = tl.zeros((CHANNELS, TOKENS), tl.int32)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        # Of all tokens, dropped ones too: a mask that knows no data lets a thread load 16 bytes at once.
        read = (channel < channels)[:, None] & inside[None, :]
        source = latents + view * channels * cells + channel.to(tl.int64)[:, None] * cells + token[None, :]
        value = tl.load(source, read, other=0.0)
        bad |= tl.where(is_storable(value, features.dtype.element_ty), 0, 1)
    becomes = tl.where((becomes == _KEPT) & (tl.max(bad, axis=0) > 0), _NON_FINITE, becomes)
    tl.store(state + view * cells + token, becomes.to(tl.uint8), inside)
    for one in tl.static_range(_CLASSES):
        tl.store(counts + tl.cast(blocks, tl.int64) * one + block, tl.sum((becomes == one).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["blocks", "capacity"])
def scan_kernel(counts, offsets, count, report, blocks, capacity, SCAN: tl.constexpr):
    """Where each block's first kept token goes, the report, and the new count: one program, so there is one order."""
    live = tl.load(count)
    # A count that is none leaves no room: nobody looked at it on the host, and nothing may be written out of bounds.
    start = tl.where(live < 0, tl.cast(capacity, tl.int64), live)
    blocks = tl.cast(blocks, tl.int64)
    kept = start - start
    masked, unknown_depth, out_of_range, non_finite = kept, kept, kept, kept
    for first in range(0, blocks, SCAN):
        block = first + tl.arange(0, SCAN)
        inside = block < blocks
        here = tl.load(counts + blocks * _KEPT + block, inside, other=0).to(tl.int64)
        tl.store(offsets + block, start + kept + tl.cumsum(here, axis=0) - here, inside)
        kept += tl.sum(here, axis=0)
        masked += tl.sum(tl.load(counts + blocks * _MASKED + block, inside, other=0).to(tl.int64), axis=0)
        unknown_depth += tl.sum(tl.load(counts + blocks * _UNKNOWN_DEPTH + block, inside, other=0).to(tl.int64), axis=0)
        out_of_range += tl.sum(tl.load(counts + blocks * _OUT_OF_RANGE + block, inside, other=0).to(tl.int64), axis=0)
        non_finite += tl.sum(tl.load(counts + blocks * _NON_FINITE + block, inside, other=0).to(tl.int64), axis=0)
    written = tl.minimum(kept, tl.maximum(capacity - start, 0))
    tl.store(count, live + written)
    tl.store(report + 0, written)
    tl.store(report + 1, kept - written)
    tl.store(report + 2, masked)
    tl.store(report + 3, unknown_depth)
    tl.store(report + 4, out_of_range)
    tl.store(report + 5, non_finite)


@triton.jit
def load_latents(latents, view, token, channel, channels, cells, mask):
    """(TOKENS, CHANNELS) of the latents (T, C, h w) of one view."""
    source = latents + view * channels * cells + channel.to(tl.int64)[None, :] * cells + token[:, None]
    return tl.load(source, mask, other=0.0)


@triton.jit(do_not_specialize=["first_frame", "capacity", "token_blocks"])
def append_kernel(
    lifted,
    latents,
    state,
    offsets,
    points,
    features,
    scales,
    frame_ids,
    first_frame,
    capacity,
    channels,
    cells,
    token_blocks,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    block = tl.program_id(0)
    view = (block // token_blocks).to(tl.int64)
    token = (block % token_blocks) * TOKENS + tl.arange(0, TOKENS)
    inside = token < cells
    kept = tl.load(state + view * cells + token, inside, other=_CLASSES) == _KEPT
    row = tl.load(offsets + block) + tl.cumsum(kept.to(tl.int32), axis=0) - 1
    fits = kept & (row < capacity)

    part = tl.arange(0, 4)[None, :]
    point = tl.load(lifted + (view * cells + token)[:, None] * 4 + part, inside[:, None], other=0.0)
    tl.store(points + row[:, None] * 4 + part, point, fits[:, None])
    tl.store(frame_ids + row, tl.zeros((TOKENS,), tl.int32) + (first_frame + view).to(tl.int32), fits)
    scale = tl.zeros((TOKENS,), tl.int32)
    if scales is not None:
        for first in range(0, channels, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            real = inside[:, None] & (channel < channels)[None, :]
            value = load_latents(latents, view, token, channel, channels, cells, real)
            scale = tl.maximum(scale, tl.max(magnitude_bits(value), axis=1))
        scale = token_scale(scale)
        tl.store(scales + row, scale.to(tl.uint8), fits)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        real = (channel < channels)[None, :]
        value = load_latents(latents, view, token, channel, channels, cells, inside[:, None] & real)
        store_features(features, row, channel, channels, value, scale, fits[:, None] & real)


def judge_tokens(
    features: Tensor,
    latents: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    mask: Tensor | None,
    bilinear: bool,
    min_depth: float,
    max_depth: float,
    depths: Tensor | None = None,
    nearest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Points (T, h, w, 4) as :func:`lift_tokens` gives them, classes (T, h, w), and their counts, by blocks.

    ``latents`` are contiguous, ``features`` give the dtype that they will be stored in.
    """
    views, channels, height, width = latents.shape
    cells, token_blocks = height * width, cdiv(height * width, TOKENS)
    blocks = views * token_blocks
    state = torch.empty((views, height, width), dtype=torch.uint8, device=depth.device)
    camera = intrinsics, cam2world, mask, height, width, bilinear, min_depth, max_depth
    lifted = lift_tokens(depth, *camera, state, depths, nearest)
    counts = torch.empty((CLASSES, blocks), dtype=torch.int32, device=depth.device)
    if blocks > 0:
        with device_of(depth):
            judge_kernel[(blocks,)](
                latents, raw(features), state, counts, channels, cells, token_blocks, blocks, **token_tile(channels)
            )
    return lifted, state, counts


def token_tile(channels: int) -> dict[str, Any]:
    """What kernels over tokens and their channels are compiled with."""
    # No smaller than the 128 threads: where several hold one element, one may read what another has already updated.
    return {"TOKENS": TOKENS, "CHANNELS": min(_CHANNELS, power_of_2(max(channels, 2))), "num_warps": 4, **EXACT}


@triton.jit
def appended_bounds_kernel(points, count, report, bounds, POINTS: tl.constexpr):
    """The boxes of the blocks appended to, from the one that the first new token went to."""
    end = tl.load(count)
    written = tl.load(report)
    block = (end - written) // POINTS + tl.program_id(0)
    if (written > 0) & (block * POINTS < end):
        store_box(points, end, block, bounds, POINTS)


@implements("cache_write")
def cache_write(
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    count: Tensor,
    latents: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    mask: Tensor | None,
    first_frame: int,
    bilinear: bool,
    min_depth: float,
    max_depth: float,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    channels, cells, capacity = latents.shape[1], latents.shape[2] * latents.shape[3], points.shape[0]
    latents = latents.contiguous()
    judged = latents, depth, intrinsics, cam2world, mask, bilinear, min_depth, max_depth
    lifted, state, counts = judge_tokens(features, *judged)
    blocks = counts.shape[1]
    offsets = torch.empty(blocks, dtype=torch.int64, device=points.device)
    report = torch.empty(6, dtype=torch.int64, device=points.device)
    with device_of(points):
        scan_kernel[(1,)](counts, offsets, count, report, blocks, capacity, SCAN=_SCAN, num_warps=4, **EXACT)
        if blocks > 0:
            append_kernel[(blocks,)](
                lifted,
                latents,
                state,
                offsets,
                points,
                raw(features),
                scales,
                frame_ids,
                first_frame,
                capacity,
                channels,
                cells,
                cdiv(cells, TOKENS),
                **token_tile(channels),
            )
        if blocks > 0 and bounds is not None:
            appended_bounds_kernel[(cdiv(latents.shape[0] * cells, BLOCK) + 1,)](
                points, count, report, bounds, POINTS=BLOCK, num_warps=2, **EXACT
            )
            bound_tiles(count, report, bounds, capacity, cdiv(latents.shape[0] * cells, BLOCK * TILE) + 1)
    return report

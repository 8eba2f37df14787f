"""`cache_write`: lift the tokens, classify and count them by blocks, prefix sum over the blocks, append in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...constants import BLOCK_TOKENS, TILE_BLOCKS, TokenStatus
from ..common.triton.block_boxes import bound_tiles, store_box
from ..common.triton.feature_rows import magnitude_bits, raw, store_features, token_scale
from ..common.triton.launching import EXACT, cdiv, device_of
from ..common.triton.token_status import STATUSES, TOKENS, classify_tokens, load_latents, token_tile
from ..operator import implements

_STATUSES = tl.constexpr(STATUSES)
_KEPT = tl.constexpr(int(TokenStatus.KEPT))
_MASKED = tl.constexpr(int(TokenStatus.MASKED))
_UNKNOWN_DEPTH = tl.constexpr(int(TokenStatus.UNKNOWN_DEPTH))
_OUT_OF_RANGE = tl.constexpr(int(TokenStatus.OUT_OF_RANGE))
_NON_FINITE = tl.constexpr(int(TokenStatus.NON_FINITE))

# One program scans all blocks: a chunk of 9 frames of 44x80 has 495 of them, one step.
_SCAN = 1024


@triton.jit(do_not_specialize=["blocks", "capacity"])
def scan_kernel(counts, offsets, count, report, blocks, capacity, SCAN: tl.constexpr):
    """Find where each block's first kept token goes, the report, and the new count: one program, one order."""
    live = tl.load(count)
    # A count that is none leaves no room: the host never checks it, and nothing may be written out of bounds.
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


@triton.jit(do_not_specialize=["first_frame", "capacity", "token_blocks"])
def append_kernel(
    lifted,
    latents,
    status,
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
    kept = tl.load(status + view * cells + token, inside, other=_STATUSES) == _KEPT
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


@triton.jit
def appended_bounds_kernel(points, count, report, bounds, POINTS: tl.constexpr):
    """Write the boxes of the blocks appended to, from the one that the first new token went to."""
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
    offered = latents, depth, intrinsics, cam2world, mask, bilinear, min_depth, max_depth
    lifted, status, counts = classify_tokens(features, *offered)
    blocks = counts.shape[1]
    offsets = torch.empty(blocks, dtype=torch.int64, device=points.device)
    report = torch.empty(6, dtype=torch.int64, device=points.device)
    with device_of(points):
        scan_kernel[(1,)](counts, offsets, count, report, blocks, capacity, SCAN=_SCAN, num_warps=4, **EXACT)
        if blocks > 0:
            append_kernel[(blocks,)](
                lifted,
                latents,
                status,
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
            appended_bounds_kernel[(cdiv(latents.shape[0] * cells, BLOCK_TOKENS) + 1,)](
                points, count, report, bounds, POINTS=BLOCK_TOKENS, num_warps=2, **EXACT
            )
            bound_tiles(count, report, bounds, capacity, cdiv(latents.shape[0] * cells, BLOCK_TOKENS * TILE_BLOCKS) + 1)
    return report

"""`splat` in three launches: prepare (matrices, empty keys), nearest (z-buffer), resolve (gather), and its backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...constants import BLOCK_TOKENS
from ..common.triton.camera import PROJECTION_SIZE, convert, in_view, load_points, make_projection, project, widen
from ..common.triton.culling import cull, may_hold, own_tokens
from ..common.triton.feature_rows import load_features, raw
from ..common.triton.launching import EXACT, cdiv, device_of, float32, power_of_2
from ..operator import implements

# The key of a cell is (float bits of z) << 32 | index. For z > 0 float bits order as z does, so the least key is the
# nearest token and, at equal depth, the one with the lowest index, in whatever order they come. Depth is finite, so the
# key is never negative as int64 and never this one:
_EMPTY_KEY = tl.constexpr(2**63 - 1)

# One warp: the few programs that compose matrices use one lane a view.
_PREPARE_KEYS = 256
_PREPARE_VIEWS = 32
# 4 points a thread at 2 warps: several depth tests in flight each, and programs so small that the 31,680 tokens of one
# written chunk make 124 of them.
_NEAREST_POINTS = BLOCK_TOKENS
# A row of 32 cells is 64 or 128 contiguous bytes to store, and 9 views of 44x80 make 990 programs: this kernel waits
# for memory latency, so many small programs beat few large ones.
_RESOLVE_CELLS = 32
_CHANNELS = 64


@triton.jit
def prepare_kernel(intrinsics, cam2world, projections, keys, views, total, KEYS: tl.constexpr, VIEWS: tl.constexpr):
    program = tl.program_id(0)
    if program * VIEWS < views:
        view = program * VIEWS + tl.arange(0, VIEWS)
        make_projection(intrinsics, cam2world, projections, view, view < views)
    key = program.to(tl.int64) * KEYS + tl.arange(0, KEYS)
    tl.store(keys + key, tl.full((KEYS,), _EMPTY_KEY, tl.int64), key < total)


@triton.jit(do_not_specialize=["points_total", "views", "blocks"])
def nearest_kernel(
    points,
    num_points,
    masks,
    numbers,
    listed,
    blocks,
    projections,
    keys,
    points_total,
    views,
    cells,
    height,
    width,
    near,
    POINTS: tl.constexpr,
):
    """Find the nearest: each program holds its points in registers, and visits all views that may see their block."""
    live = tl.cast(points_total, tl.int64)
    if num_points is not None:
        live = tl.minimum(live, tl.load(num_points))
    begin, real = own_tokens(numbers, listed, live, POINTS=POINTS)
    # The buffers of a cache are longer than what lives in them: programs past the end have nothing to do.
    if real:
        index = begin + tl.arange(0, POINTS)
        x, y, z = load_points(points, index, index < live, POINTS)
        projection = projections
        grid = keys
        for view in range(views):
            sees = True
            if masks is not None:
                sees = may_hold(masks, blocks, begin, view)
            if sees:
                u, v, depth = project(projection, x, y, z)
                visible = (index < live) & in_view(u, v, depth, height, width, near)
                # Only what is in view is converted: a float outside the range of int32 has no defined conversion.
                row = tl.where(visible, v, 0.0).to(tl.int32)
                column = tl.where(visible, u, 0.0).to(tl.int32)
                cell = row * width + column
                key = (depth.to(tl.int32, bitcast=True).to(tl.int64) << 32) | index
                # Early depth test. A key only ever falls, so a stale one costs an atomic too many and never a winner;
                # from L2, since the copy in L1 stays as it was at the first touch.
                closer = visible & (key < tl.load(grid + cell, visible, other=0, cache_modifier=".cg"))
                tl.atomic_min(grid + cell, key, closer, sem="relaxed")
            projection += 12
            grid += cells


@triton.jit(do_not_specialize=["cell_blocks", "channel_blocks"])
def resolve_kernel(
    keys,
    features,
    scales,
    latents,
    mask,
    depth,
    index,
    channels,
    cells,
    cell_blocks,
    channel_blocks,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    program = tl.program_id(0)
    block = program // channel_blocks
    view = (block // cell_blocks).to(tl.int64)
    cell = (block % cell_blocks) * CELLS + tl.arange(0, CELLS)
    inside = cell < cells
    key = tl.load(keys + view * cells + cell, inside, other=_EMPTY_KEY)
    seen = key != _EMPTY_KEY
    winner = key & 0xFFFFFFFF
    if program % channel_blocks == 0:
        z = (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(index + view * cells + cell, tl.where(seen, winner, -1), inside)
        tl.store(depth + view * cells + cell, tl.where(seen, z, 0.0), inside)
        tl.store(mask + view * cells + cell, seen, inside)
    channel = (program % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    # Read along a token's channels, stored along a channel's cells: the tile turns in shared memory between the two.
    row = load_features(features, scales, winner, channel, channels, seen)
    target = latents + view * channels * cells + channel.to(tl.int64)[None, :] * cells + cell[:, None]
    tl.store(target, convert(row, latents.dtype.element_ty), inside[:, None] & (channel < channels)[None, :])


@triton.jit(do_not_specialize=["view", "num_points", "channel_blocks"])
def backward_kernel(
    grad_latents,
    index,
    grad,
    view,
    num_points,
    channels,
    cells,
    channel_blocks,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add one view. Within a view a token wins one cell at most, so no two lanes meet at a row."""
    program = tl.program_id(0)
    cell = (program // channel_blocks) * CELLS + tl.arange(0, CELLS)
    channel = (program % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    view = tl.cast(view, tl.int64)
    winner = tl.load(index + view * cells + cell, cell < cells, other=-1)
    real = (channel < channels)[None, :]
    valid = ((winner >= 0) & (winner < num_points))[:, None] & real
    source = grad_latents + view * channels * cells + channel.to(tl.int64)[None, :] * cells + cell[:, None]
    target = grad + winner[:, None] * channels + channel[None, :]
    add = widen(tl.load(source, (cell < cells)[:, None] & real, other=0.0))
    tl.store(target, tl.load(target, valid, other=0.0) + add, valid)


@implements("splat")
def splat(
    points: Tensor,
    features: Tensor,
    num_points: Tensor | None,
    intrinsics: Tensor,
    cam2world: Tensor,
    height: int,
    width: int,
    near: float,
    dtype: torch.dtype,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    views, cells, channels = cam2world.shape[0], height * width, features.shape[1]
    latents = features.new_empty((views, channels, height, width), dtype=dtype)
    mask = features.new_empty((views, height, width), dtype=torch.bool)
    depth = features.new_empty((views, height, width), dtype=torch.float32)
    index = features.new_empty((views, height, width), dtype=torch.int64)
    if views == 0:
        return latents, mask, depth, index
    keys = torch.empty_like(index)
    projections = points.new_empty((views, PROJECTION_SIZE))
    cell_blocks, channel_block = cdiv(cells, _RESOLVE_CELLS), min(_CHANNELS, power_of_2(max(channels, 1)))
    channel_blocks = max(1, cdiv(channels, channel_block))
    with device_of(points):
        prepare_kernel[(max(cdiv(views * cells, _PREPARE_KEYS), cdiv(views, _PREPARE_VIEWS)),)](
            intrinsics.contiguous(),
            cam2world.contiguous(),
            projections,
            keys,
            views,
            views * cells,
            KEYS=_PREPARE_KEYS,
            VIEWS=_PREPARE_VIEWS,
            num_warps=1,
            **EXACT,
        )
        if points.shape[0] > 0:
            seen = cull(bounds, points, num_points, projections, height, width, float32(near), 0)
            nearest_kernel[(cdiv(points.shape[0], _NEAREST_POINTS),)](
                points.contiguous(),
                num_points,
                *seen,
                projections,
                keys,
                points.shape[0],
                views,
                cells,
                height,
                width,
                float32(near),
                POINTS=_NEAREST_POINTS,
                num_warps=2,
                **EXACT,
            )
        resolve_kernel[(views * cell_blocks * channel_blocks,)](
            keys,
            raw(features.contiguous()),
            None if scales is None else scales.contiguous(),
            latents,
            mask,
            depth,
            index,
            channels,
            cells,
            cell_blocks,
            channel_blocks,
            CELLS=_RESOLVE_CELLS,
            CHANNELS=channel_block,
            num_warps=4,
            **EXACT,
        )
    return latents, mask, depth, index


@implements("splat_backward")
def splat_backward(grad_latents: Tensor, index: Tensor, num_points: int, dtype: torch.dtype) -> Tensor:
    views, channels, height, width = grad_latents.shape
    cells = height * width
    grad = grad_latents.new_zeros((num_points, channels), dtype=torch.float32)
    if num_points > 0 and channels > 0:
        grad_latents, index = grad_latents.contiguous(), index.contiguous()
        channel_block = min(_CHANNELS, power_of_2(channels))
        channel_blocks = cdiv(channels, channel_block)
        with device_of(grad):
            # One launch a view: their order is the order of the sum.
            for view in range(views):
                backward_kernel[(cdiv(cells, _RESOLVE_CELLS) * channel_blocks,)](
                    grad_latents,
                    index,
                    grad,
                    view,
                    num_points,
                    channels,
                    cells,
                    channel_blocks,
                    CELLS=_RESOLVE_CELLS,
                    CHANNELS=channel_block,
                    num_warps=4,
                    **EXACT,
                )
    return grad.to(dtype)

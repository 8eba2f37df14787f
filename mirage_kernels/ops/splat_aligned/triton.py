"""`splat_aligned`: nearest depths, depths in the holes they leave, best tokens of each cell, their blend, its backward.

The maths is that of ``csrc/core/alignment_score.h``, in the same order of operations and with the same names.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...constants import (
    BLEND_TOKENS,
    DEPTH_TOLERANCE,
    DIRECTION_WEIGHT,
    HOLE_REACH_CELLS,
    MAX_FOOTPRINT_RATIO,
    TOKEN_REACH,
)
from ..common.triton.alignment_score import (
    NO_DEPTH,
    NO_TOKEN,
    align_tokens,
    cell_distance,
    dot,
    footprint_ratio,
    load_tokens,
    prepare,
)
from ..common.triton.camera import convert, floor_int, project, widen
from ..common.triton.culling import cull, may_hold, own_tokens
from ..common.triton.feature_rows import load_features, raw
from ..common.triton.launching import EXACT, cdiv, device_of, float32, power_of_2
from ..operator import implements

_NO_TOKEN = tl.constexpr(NO_TOKEN)
_NO_DEPTH = tl.constexpr(NO_DEPTH)
_BLEND_TOKENS = tl.constexpr(BLEND_TOKENS)
_TOKEN_REACH = tl.constexpr(TOKEN_REACH)
_DEPTH_TOLERANCE = tl.constexpr(float32(DEPTH_TOLERANCE))
_MAX_FOOTPRINT_RATIO = tl.constexpr(MAX_FOOTPRINT_RATIO)
_DIRECTION_WEIGHT = tl.constexpr(DIRECTION_WEIGHT)
_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
# A footprint is looked for in 5 x 5 = 25 cells.
_MARGIN = tl.constexpr(HOLE_REACH_CELLS)

_POINTS = 128
_READ_CELLS = 32
_CHANNELS = 64
_GATHER_POINTS = 32


@triton.jit
def around_view(u, v, z, height, width, near):
    limit_u, limit_v = tl.cast(width, tl.float32) + _MARGIN, tl.cast(height, tl.float32) + _MARGIN
    return (z > near) & (z <= _FLOAT_MAX) & (u > -_MARGIN) & (u < limit_u) & (v > -_MARGIN) & (v < limit_v)


@triton.jit
def floor_cell(value, mask):
    # Only what is around the view is converted: a float outside the range of int32 has no defined conversion.
    return floor_int(tl.where(mask, value, 0.0))


@triton.jit
def in_grid(column, row, height, width):
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def lower_depth(depths, cell, z, mask):
    # A depth only ever falls, so a stale one, from L2, costs an atomic too many and loses none.
    bits = z.to(tl.int32, bitcast=True)
    closer = mask & (bits < tl.load(depths + cell, mask, other=0, cache_modifier=".cg"))
    tl.atomic_min(depths + cell, bits, closer, sem="relaxed")


@triton.jit(do_not_specialize=["points_total", "views", "frames", "blocks"])
def nearest_kernel(
    points,
    num_points,
    masks,
    numbers,
    listed,
    blocks,
    frame_ids,
    frame_centers,
    frames,
    projections,
    readers,
    narrow,
    wide,
    points_total,
    views,
    cells,
    height,
    width,
    near,
    HOLES: tl.constexpr,
    POINTS: tl.constexpr,
):
    """Find the least depths of the tokens that reach a cell; with HOLES, of those whose footprint reaches a hole."""
    live = tl.cast(points_total, tl.int64)
    if num_points is not None:
        live = tl.minimum(live, tl.load(num_points))
    begin, real = own_tokens(numbers, listed, live, POINTS=POINTS)
    if real:
        index = begin + tl.arange(0, POINTS)
        x, y, z, footprint, wx, wy, wz = load_tokens(
            points, frame_ids, frame_centers, frames, index, index < live, POINTS
        )
        for view in range(views):
            sees = True
            if masks is not None:
                sees = may_hold(masks, blocks, begin, view)
            if sees:
                u, v, depth, radius, _ = align_tokens(
                    projections + view * 12, readers + view * 4, x, y, z, footprint, wx, wy, wz
                )
                seen = (index < live) & around_view(u, v, depth, height, width, near)
                grid = tl.cast(view, tl.int64) * cells
                if HOLES:
                    seen = seen & (radius > _TOKEN_REACH)
                    if tl.max(seen.to(tl.int32), axis=0) > 0:
                        home_column, home_row = floor_cell(u, seen), floor_cell(v, seen)
                        for k in range(25):
                            column, row = home_column + (k % 5 - 2), home_row + (k // 5 - 2)
                            meets = seen & in_grid(column, row, height, width)
                            meets = meets & (cell_distance(u, v, column, row) <= radius * radius)
                            cell = grid + row * width + column
                            hole = meets & (tl.load(narrow + cell, meets, other=0) == _NO_DEPTH)
                            lower_depth(wide, cell, depth, hole)
                else:
                    left, top = floor_cell(u - 0.5, seen), floor_cell(v - 0.5, seen)
                    for k in range(4):
                        column, row = left + k % 2, top + k // 2
                        meets = seen & in_grid(column, row, height, width)
                        meets = meets & (cell_distance(u, v, column, row) <= _TOKEN_REACH * _TOKEN_REACH)
                        lower_depth(narrow, grid + row * width + column, depth, meets)


@triton.jit
def insert_keys(keys, cell, key, mask):
    """Insert keys into the lists of cells, whose least keys stay, in order, whichever way the insertions mix.

    Every place of a list keeps the lesser key and hands the greater on.
    """
    place = keys + cell * _BLEND_TOKENS
    mask = mask & (key < tl.load(place + (_BLEND_TOKENS - 1), mask, other=0, cache_modifier=".cg"))
    for k in tl.static_range(_BLEND_TOKENS):
        held = tl.atomic_min(place + k, key, mask, sem="relaxed")
        key = tl.where(mask & (held > key), held, key)
        mask = mask & (key != _NO_TOKEN)


@triton.jit(do_not_specialize=["points_total", "views", "frames", "blocks"])
def best_kernel(
    points,
    num_points,
    masks,
    numbers,
    listed,
    blocks,
    frame_ids,
    frame_centers,
    frames,
    projections,
    readers,
    narrow,
    wide,
    keys,
    points_total,
    views,
    cells,
    height,
    width,
    near,
    POINTS: tl.constexpr,
):
    live = tl.cast(points_total, tl.int64)
    if num_points is not None:
        live = tl.minimum(live, tl.load(num_points))
    begin, real = own_tokens(numbers, listed, live, POINTS=POINTS)
    if real:
        index = begin + tl.arange(0, POINTS)
        x, y, z, footprint, wx, wy, wz = load_tokens(
            points, frame_ids, frame_centers, frames, index, index < live, POINTS
        )
        for view in range(views):
            sees = True
            if masks is not None:
                sees = may_hold(masks, blocks, begin, view)
            if sees:
                u, v, depth, radius, score_bias = align_tokens(
                    projections + view * 12, readers + view * 4, x, y, z, footprint, wx, wy, wz
                )
                seen = (index < live) & around_view(u, v, depth, height, width, near)
                grid = tl.cast(view, tl.int64) * cells
                left, top = floor_cell(u - 0.5, seen), floor_cell(v - 0.5, seen)
                for k in range(4):
                    column, row = left + k % 2, top + k // 2
                    distance = cell_distance(u, v, column, row)
                    meets = seen & in_grid(column, row, height, width) & (distance <= _TOKEN_REACH * _TOKEN_REACH)
                    cell = grid + row * width + column
                    surface = tl.load(narrow + cell, meets, other=0).to(tl.float32, bitcast=True)
                    score = (distance + score_bias).to(tl.int32, bitcast=True).to(tl.int64)
                    insert_keys(keys, cell, (score << 32) | index, meets & (depth <= _DEPTH_TOLERANCE * surface))
                seen = seen & (radius > _TOKEN_REACH)
                if tl.max(seen.to(tl.int32), axis=0) > 0:
                    home_column, home_row = floor_cell(u, seen), floor_cell(v, seen)
                    for k in range(25):
                        column, row = home_column + (k % 5 - 2), home_row + (k // 5 - 2)
                        distance = cell_distance(u, v, column, row)
                        meets = seen & in_grid(column, row, height, width) & (distance <= radius * radius)
                        cell = grid + row * width + column
                        meets = meets & (tl.load(narrow + cell, meets, other=0) == _NO_DEPTH)
                        surface = tl.load(wide + cell, meets, other=0).to(tl.float32, bitcast=True)
                        score = (distance + score_bias).to(tl.int32, bitcast=True).to(tl.int64)
                        insert_keys(keys, cell, (score << 32) | index, meets & (depth <= _DEPTH_TOLERANCE * surface))


@triton.jit
def load_candidate(keys, cell, k: tl.constexpr, mask):
    """Load token and score of the k-th best of cells, and whether there is one."""
    key = tl.load(keys + cell * _BLEND_TOKENS + k, mask, other=_NO_TOKEN)
    held = key != _NO_TOKEN
    return key & 0xFFFFFFFF, tl.where(held, (key >> 32).to(tl.int32).to(tl.float32, bitcast=True), 0.0), held


@triton.jit
def weight_base(score, best, sharpness):
    return 1.0 - (sharpness * (score - best)) * 0.125


@triton.jit
def raw_weight(score, best, held, sharpness):
    base = weight_base(score, best, sharpness)
    base = tl.where(held & (base > 0.0), base, 0.0)
    square = base * base
    fourth = square * square
    return fourth * fourth


@triton.jit
def load_blend(keys, cell, sharpness, mask):
    """Load tokens, scores and weights of the four best of cells."""
    tl.static_assert(_BLEND_TOKENS == 4)
    token0, score0, held0 = load_candidate(keys, cell, 0, mask)
    token1, score1, held1 = load_candidate(keys, cell, 1, mask)
    token2, score2, held2 = load_candidate(keys, cell, 2, mask)
    token3, score3, held3 = load_candidate(keys, cell, 3, mask)
    raw0 = held0.to(tl.float32)
    raw1 = raw_weight(score1, score0, held1, sharpness)
    raw2 = raw_weight(score2, score0, held2, sharpness)
    raw3 = raw_weight(score3, score0, held3, sharpness)
    total = ((raw0 + raw1) + raw2) + raw3
    total = tl.where(total > 0.0, total, 1.0)
    tokens = (token0, token1, token2, token3)
    scores = (score0, score1, score2, score3)
    weights = (
        tl.math.div_rn(raw0, total),
        tl.math.div_rn(raw1, total),
        tl.math.div_rn(raw2, total),
        tl.math.div_rn(raw3, total),
    )
    return tokens, scores, weights


@triton.jit
def load_values(features, scales, token, weight, channel, channels):
    """Load (CELLS, CHANNELS) float32, 0 where the weight is 0."""
    return widen(load_features(features, scales, token, channel, channels, weight > 0.0))


@triton.jit
def add_rows(sum, features, scales, token, weight, channel, channels):
    rows = load_values(features, scales, token, weight, channel, channels)
    return tl.where((weight > 0.0)[:, None], sum + weight[:, None] * rows, sum)


@triton.jit(do_not_specialize=["cell_blocks", "channel_blocks"])
def readout_kernel(
    keys,
    points,
    projections,
    features,
    scales,
    latents,
    mask,
    depth,
    index,
    sharpness,
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
    at = view * cells + cell
    tokens, _scores, weights = load_blend(keys, at, sharpness, inside)
    seen = weights[0] > 0.0
    if program % channel_blocks == 0:
        x = tl.load(points + tokens[0] * 4, seen, other=0.0)
        y = tl.load(points + tokens[0] * 4 + 1, seen, other=0.0)
        z = tl.load(points + tokens[0] * 4 + 2, seen, other=0.0)
        _u, _v, own_depth = project(projections + view * 12, x, y, z)
        tl.store(index + at, tl.where(seen, tokens[0], -1), inside)
        tl.store(depth + at, tl.where(seen, own_depth, 0.0), inside)
        tl.store(mask + at, seen, inside)
    channel = (program % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    rows = load_values(features, scales, tokens[0], weights[0], channel, channels)
    sum = tl.where(seen[:, None], weights[0][:, None] * rows, 0.0)
    sum = add_rows(sum, features, scales, tokens[1], weights[1], channel, channels)
    sum = add_rows(sum, features, scales, tokens[2], weights[2], channel, channels)
    sum = add_rows(sum, features, scales, tokens[3], weights[3], channel, channels)
    target = latents + view * channels * cells + channel.to(tl.int64)[None, :] * cells + cell[:, None]
    tl.store(target, convert(sum, latents.dtype.element_ty), inside[:, None] & (channel < channels)[None, :])


@triton.jit
def score_slope(score, best, weight, dot, mean, best_weight, sharpness):
    base = weight_base(score, best, sharpness)
    square = base * base
    slope = -(sharpness * ((square * square) * (square * base))) * ((dot - mean) * best_weight)
    return tl.where(weight > 0.0, slope, 0.0)


@triton.jit(do_not_specialize=["total"])
def weight_kernel(
    grad_rows,
    keys,
    features,
    scales,
    weights_out,
    slopes_out,
    sharpness,
    channels,
    total,
    OF_POINTS: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Write the weights of every place and, for points, the slopes of its score."""
    cell = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    inside = cell < total
    tokens, scores, weights = load_blend(keys, cell, sharpness, inside)
    for k in tl.static_range(_BLEND_TOKENS):
        tl.store(weights_out + cell * _BLEND_TOKENS + k, weights[k], inside)
    if OF_POINTS:
        dot0 = tl.zeros((CELLS,), tl.float32)
        dot1, dot2, dot3 = dot0, dot0, dot0
        for first in range(0, channels, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            real = inside[:, None] & (channel < channels)[None, :]
            grad = tl.load(grad_rows + cell[:, None] * channels + channel[None, :], real, other=0.0)
            dot0 += tl.sum(grad * load_values(features, scales, tokens[0], weights[0], channel, channels), axis=1)
            dot1 += tl.sum(grad * load_values(features, scales, tokens[1], weights[1], channel, channels), axis=1)
            dot2 += tl.sum(grad * load_values(features, scales, tokens[2], weights[2], channel, channels), axis=1)
            dot3 += tl.sum(grad * load_values(features, scales, tokens[3], weights[3], channel, channels), axis=1)
        mean = ((weights[0] * dot0 + weights[1] * dot1) + weights[2] * dot2) + weights[3] * dot3
        slope1 = score_slope(scores[1], scores[0], weights[1], dot1, mean, weights[0], sharpness)
        slope2 = score_slope(scores[2], scores[0], weights[2], dot2, mean, weights[0], sharpness)
        slope3 = score_slope(scores[3], scores[0], weights[3], dot3, mean, weights[0], sharpness)
        tl.store(slopes_out + cell * _BLEND_TOKENS, ((0.0 - slope1) - slope2) - slope3, inside)
        tl.store(slopes_out + cell * _BLEND_TOKENS + 1, slope1, inside)
        tl.store(slopes_out + cell * _BLEND_TOKENS + 2, slope2, inside)
        tl.store(slopes_out + cell * _BLEND_TOKENS + 3, slope3, inside)


@triton.jit
def alignment_gradient(projection, reader, x, y, z, footprint, wx, wy, wz, u, v, depth, slope_u, slope_v, slope):
    """Return gradients to x, y, z and footprint of one view, as ``add_alignment_gradient`` of csrc/core does."""
    inverse = tl.math.div_rn(1.0, depth)
    focal = tl.load(reader)
    ratio = footprint_ratio(footprint, focal, inverse)
    free = (ratio > 1.0 / _MAX_FOOTPRINT_RATIO) & (ratio < _MAX_FOOTPRINT_RATIO)
    slope_ratio = tl.where(free, slope * (1.0 - tl.math.div_rn(1.0, ratio * ratio)), 0.0)

    wx, wy, wz = x - wx, y - wy, z - wz
    rx, ry, rz = x - tl.load(reader + 1), y - tl.load(reader + 2), z - tl.load(reader + 3)
    written_2, read_2 = dot(wx, wy, wz, wx, wy, wz), dot(rx, ry, rz, rx, ry, rz)
    lengths = written_2 * read_2
    known = (lengths > 0.0) & (lengths <= _FLOAT_MAX)
    norm = tl.math.sqrt_rn(tl.where(known, lengths, 1.0))
    cosine = tl.math.div_rn(dot(wx, wy, wz, rx, ry, rz), norm)
    penalized = known & (1.0 - cosine > 0.0)
    slope_direction = slope * _DIRECTION_WEIGHT
    gx = _axis_gradient(projection, 0, u, v, slope_u, slope_v, inverse, slope_ratio, ratio)
    gx -= tl.where(penalized, slope_direction * _direction_slope(wx, rx, norm, cosine, written_2, read_2), 0.0)
    gy = _axis_gradient(projection, 1, u, v, slope_u, slope_v, inverse, slope_ratio, ratio)
    gy -= tl.where(penalized, slope_direction * _direction_slope(wy, ry, norm, cosine, written_2, read_2), 0.0)
    gz = _axis_gradient(projection, 2, u, v, slope_u, slope_v, inverse, slope_ratio, ratio)
    gz -= tl.where(penalized, slope_direction * _direction_slope(wz, rz, norm, cosine, written_2, read_2), 0.0)
    return gx, gy, gz, slope_ratio * (focal * inverse)


@triton.jit
def _axis_gradient(projection, axis: tl.constexpr, u, v, slope_u, slope_v, inverse, slope_ratio, ratio):
    m0, m1, m2 = tl.load(projection + axis), tl.load(projection + 4 + axis), tl.load(projection + 8 + axis)
    position = (slope_u * (m0 - u * m2) + slope_v * (m1 - v * m2)) * inverse
    return position - slope_ratio * ((ratio * inverse) * m2)


@triton.jit
def _direction_slope(written, read, norm, cosine, written_2, read_2):
    along = tl.math.div_rn(written, written_2) + tl.math.div_rn(read, read_2)
    return tl.math.div_rn(written + read, norm) - cosine * along


@triton.jit(do_not_specialize=["points_total", "views", "frames", "channel_blocks"])
def gather_kernel(
    points,
    frame_ids,
    frame_centers,
    frames,
    projections,
    readers,
    keys,
    grad_rows,
    weights,
    slopes,
    grad_features,
    grad_points,
    points_total,
    views,
    channels,
    cells,
    height,
    width,
    channel_blocks,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sum at each token over the places it has, in order of view and cell: no two lanes add to one number."""
    program = tl.program_id(0)
    index = (program // channel_blocks).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    live = index < points_total
    channel = (program % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    x, y, z, footprint, wx, wy, wz = load_tokens(points, frame_ids, frame_centers, frames, index, live, POINTS)
    sum = tl.zeros((POINTS, CHANNELS), tl.float32)
    grad_x = tl.zeros((POINTS,), tl.float32)
    grad_y, grad_z, grad_footprint = grad_x, grad_x, grad_x
    for view in range(views):
        projection, reader = projections + view * 12, readers + view * 4
        u, v, depth, radius, _ = align_tokens(projection, reader, x, y, z, footprint, wx, wy, wz)
        seen = live & around_view(u, v, depth, height, width, 0.0)
        grid = tl.cast(view, tl.int64) * cells
        slope = tl.zeros((POINTS,), tl.float32)
        slope_u, slope_v = slope, slope
        if tl.max(seen.to(tl.int32), axis=0) > 0:
            home_column, home_row = floor_cell(u, seen), floor_cell(v, seen)
            for k in range(25):
                column, row = home_column + (k % 5 - 2), home_row + (k // 5 - 2)
                meets = seen & in_grid(column, row, height, width)
                meets = meets & (cell_distance(u, v, column, row) <= radius * radius)
                if tl.max(meets.to(tl.int32), axis=0) > 0:
                    cell = grid + row * width + column
                    for n in range(_BLEND_TOKENS):
                        key = tl.load(keys + cell * _BLEND_TOKENS + n, meets, other=_NO_TOKEN)
                        mine = meets & (key != _NO_TOKEN) & ((key & 0xFFFFFFFF) == index)
                        weight = tl.load(weights + cell * _BLEND_TOKENS + n, mine, other=0.0)
                        mine = mine & (weight > 0.0)
                        real = mine[:, None] & (channel < channels)[None, :]
                        rows = tl.load(grad_rows + cell[:, None] * channels + channel[None, :], real, other=0.0)
                        sum = tl.where(mine[:, None], sum + weight[:, None] * rows, sum)
                        if grad_points is not None:
                            s = tl.load(slopes + cell * _BLEND_TOKENS + n, mine, other=0.0)
                            slope_u += tl.where(mine, s * (2.0 * (u - (column.to(tl.float32) + 0.5))), 0.0)
                            slope_v += tl.where(mine, s * (2.0 * (v - (row.to(tl.float32) + 0.5))), 0.0)
                            slope += s
            if grad_points is not None:
                gx, gy, gz, gf = alignment_gradient(
                    projection, reader, x, y, z, footprint, wx, wy, wz, u, v, depth, slope_u, slope_v, slope
                )
                any_slope = seen & ((slope_u != 0.0) | (slope_v != 0.0) | (slope != 0.0))
                grad_x += tl.where(any_slope, gx, 0.0)
                grad_y += tl.where(any_slope, gy, 0.0)
                grad_z += tl.where(any_slope, gz, 0.0)
                grad_footprint += tl.where(any_slope, gf, 0.0)
    target = grad_features + index[:, None] * channels + channel[None, :]
    tl.store(target, convert(sum, grad_features.dtype.element_ty), live[:, None] & (channel < channels)[None, :])
    if grad_points is not None:  # noqa: SIM102  # the first is decided when this is compiled
        if program % channel_blocks == 0:
            tl.store(grad_points + index * 4, grad_x, live)
            tl.store(grad_points + index * 4 + 1, grad_y, live)
            tl.store(grad_points + index * 4 + 2, grad_z, live)
            tl.store(grad_points + index * 4 + 3, grad_footprint, live)


@implements("splat_aligned")
def splat_aligned(
    points: Tensor,
    features: Tensor,
    num_points: Tensor | None,
    frame_ids: Tensor,
    frame_centers: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    height: int,
    width: int,
    near: float,
    sharpness: float,
    dtype: torch.dtype,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    views, cells, channels = cam2world.shape[0], height * width, features.shape[1]
    latents = features.new_empty((views, channels, height, width), dtype=dtype)
    mask = features.new_empty((views, height, width), dtype=torch.bool)
    depth = features.new_empty((views, height, width), dtype=torch.float32)
    index = features.new_empty((views, height, width), dtype=torch.int64)
    keys = features.new_empty((views, height, width, BLEND_TOKENS), dtype=torch.int64)
    if views == 0:
        return latents, mask, depth, index, keys
    narrow, wide = (torch.empty_like(index, dtype=torch.int32) for _ in range(2))
    points, frame_ids, frame_centers = points.contiguous(), frame_ids.contiguous(), frame_centers.contiguous()
    total, frames = points.shape[0], frame_centers.shape[0]
    cell_blocks, channel_block = cdiv(cells, _READ_CELLS), min(_CHANNELS, power_of_2(max(channels, 1)))
    channel_blocks = max(1, cdiv(channels, channel_block))
    with device_of(points):
        projections, readers = prepare(intrinsics, cam2world, narrow, wide, keys, points)
        if total > 0:
            seen = cull(bounds, points, num_points, projections, height, width, float32(near), _MARGIN.value)
            tokens = points, num_points, *seen, frame_ids, frame_centers, frames, projections, readers, narrow, wide
            shape = total, views, cells, height, width, float32(near)
            for holes in (False, True):
                nearest_kernel[(cdiv(total, _POINTS),)](
                    *tokens, *shape, HOLES=holes, POINTS=_POINTS, num_warps=4, **EXACT
                )
            best_kernel[(cdiv(total, _POINTS),)](*tokens, keys, *shape, POINTS=_POINTS, num_warps=4, **EXACT)
        readout_kernel[(views * cell_blocks * channel_blocks,)](
            keys,
            points,
            projections,
            raw(features.contiguous()),
            None if scales is None else scales.contiguous(),
            latents,
            mask,
            depth,
            index,
            float32(sharpness),
            channels,
            cells,
            cell_blocks,
            channel_blocks,
            CELLS=_READ_CELLS,
            CHANNELS=channel_block,
            num_warps=4,
            **EXACT,
        )
    return latents, mask, depth, index, keys


@implements("splat_aligned_backward")
def splat_aligned_backward(
    grad_latents: Tensor,
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    frame_centers: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    keys: Tensor,
    sharpness: float,
    of_points: bool,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    views, channels, height, width = grad_latents.shape
    cells, total = height * width, points.shape[0]
    # Features with scales have no gradient: none of their channels is summed.
    summed = channels if scales is None else 0
    grad_features = features.new_empty((total if scales is None else 0, channels))
    grad_points = points.new_empty((total if of_points else 0, 4))
    if total == 0 or views == 0:
        return grad_features.zero_(), grad_points.zero_()
    rows = grad_latents.flatten(2).transpose(1, 2).to(torch.float32).contiguous()
    weights, slopes = (points.new_empty((views, cells, BLEND_TOKENS)) for _ in range(2))
    features, keys, points = features.contiguous(), keys.contiguous(), points.contiguous()
    channel_block = min(_CHANNELS, power_of_2(max(channels, 1)))
    channel_blocks = max(1, cdiv(summed, channel_block))
    with device_of(points):
        projections, readers = prepare(intrinsics, cam2world, None, None, keys, points)
        weight_kernel[(cdiv(views * cells, _READ_CELLS),)](
            rows,
            keys,
            raw(features),
            None if scales is None else scales.contiguous(),
            weights,
            slopes,
            float32(sharpness),
            channels,
            views * cells,
            OF_POINTS=of_points,
            CELLS=_READ_CELLS,
            CHANNELS=channel_block,
            num_warps=4,
            **EXACT,
        )
        gather_kernel[(cdiv(total, _GATHER_POINTS) * channel_blocks,)](
            points,
            frame_ids.contiguous(),
            frame_centers.contiguous(),
            frame_centers.shape[0],
            projections,
            readers,
            keys,
            rows,
            weights,
            slopes,
            grad_features if scales is None else rows,
            grad_points if of_points else None,
            total,
            views,
            summed,
            cells,
            height,
            width,
            channel_blocks,
            POINTS=_GATHER_POINTS,
            CHANNELS=channel_block,
            num_warps=4,
            **EXACT,
        )
    return grad_features, grad_points

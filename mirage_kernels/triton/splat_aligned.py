"""`splat_aligned`: nearest depths, depths in the holes they leave, best fits of every cell, their blend, its backward.

The maths is that of ``csrc/core/fit.h``, in the same order of operations and with the same names.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import FITS, GATE, LARGEST_RATIO, RAY_WEIGHT, REACH, WIDEST
from .camera import PROJECTION_SIZE, convert, floor_int, load_rows, make_projection, project, widen
from .cull import cull, may_hold, own_tokens
from .features import load_features, raw
from .launch import EXACT, cdiv, device_of, float32, implements, power_of_2

# A fit's key is made like a depth's in `splat`: float bits of the score above, index below. Scores are small, so every
# key is less than this one (csrc/core/fit.h).
_NO_FIT = tl.constexpr(0x7F7F7F7F7F7F7F7F)
_NO_DEPTH = tl.constexpr(0x7F7FFFFF + 1)  # bits of infinity: no depth in view has them, every one is less
_FITS = tl.constexpr(FITS)
_REACH = tl.constexpr(REACH)
_WIDEST = tl.constexpr(WIDEST)
_GATE = tl.constexpr(float32(GATE))
_RATIO = tl.constexpr(LARGEST_RATIO)
_RAY_WEIGHT = tl.constexpr(RAY_WEIGHT)
_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
# Whole cells that WIDEST * REACH spans to either side of a token's own: a footprint is looked for in 5 x 5 = 25 cells.
_MARGIN = tl.constexpr(2)

_PREPARE_CELLS = 256
_PREPARE_VIEWS = 32
_POINTS = 128
_READ_CELLS = 32
_CHANNELS = 64
_GATHER_POINTS = 32


@triton.jit
def prepare_kernel(
    intrinsics,
    cam2world,
    projections,
    readers,
    narrow,
    wide,
    keys,
    views,
    total,
    CELLS: tl.constexpr,
    VIEWS: tl.constexpr,
):
    program = tl.program_id(0)
    if program * VIEWS < views:
        view = program * VIEWS + tl.arange(0, VIEWS)
        mask = view < views
        make_projection(intrinsics, cam2world, projections, view, mask)
        reader = readers + view.to(tl.int64) * 4
        focal = tl.load(intrinsics + view.to(tl.int64) * 9, mask, other=0.0)
        tl.store(reader, focal.to(tl.float32), mask)
        for axis in tl.static_range(3):
            center = tl.load(cam2world + view.to(tl.int64) * 16 + axis * 4 + 3, mask, other=0.0)
            tl.store(reader + 1 + axis, center.to(tl.float32), mask)
    cell = program.to(tl.int64) * CELLS + tl.arange(0, CELLS)
    if narrow is not None:
        tl.store(narrow + cell, tl.full((CELLS,), _NO_DEPTH, tl.int32), cell < total)
        tl.store(wide + cell, tl.full((CELLS,), _NO_DEPTH, tl.int32), cell < total)
        for k in tl.static_range(_FITS):
            tl.store(keys + cell * _FITS + k, tl.full((CELLS,), _NO_FIT, tl.int64), cell < total)


@triton.jit
def load_tokens(points, frame_ids, frame_centers, frames, index, mask, POINTS: tl.constexpr):
    """x, y, z, footprint, and the centre of the writing camera: NaN where it is unknown."""
    x, y, z, footprint = load_rows(points, index, mask, POINTS)
    frame = tl.load(frame_ids + index, mask, other=-1)
    known = (frame >= 0) & (frame < frames)
    center = frame_centers + tl.where(known, frame, 0).to(tl.int64) * 3
    nan = float("nan")
    writer_x = tl.load(center, known, other=nan)
    writer_y = tl.load(center + 1, known, other=nan)
    writer_z = tl.load(center + 2, known, other=nan)
    return x, y, z, footprint, writer_x, writer_y, writer_z


@triton.jit
def dot(ax, ay, az, bx, by, bz):
    return (ax * bx + ay * by) + az * bz


@triton.jit
def footprint_ratio(footprint, focal, inverse):
    ratio = (footprint * focal) * inverse
    # Written so that NaN falls to the least.
    return tl.where(ratio > 1.0 / _RATIO, tl.where(ratio < _RATIO, ratio, _RATIO), 1.0 / _RATIO)


@triton.jit
def fit_tokens(projection, reader, x, y, z, footprint, writer_x, writer_y, writer_z):
    """Columns, rows and depths in one view; the radius to close holes within; and what lacks in any cell."""
    u, v, depth = project(projection, x, y, z)
    ratio = footprint_ratio(footprint, tl.load(reader), tl.math.div_rn(1.0, depth))
    radius = tl.where(ratio > 1.0, ratio, 1.0)
    radius = _REACH * tl.where(radius < _WIDEST, radius, _WIDEST)
    scale = tl.math.div_rn((ratio - 1.0) * (ratio - 1.0), ratio)

    wx, wy, wz = x - writer_x, y - writer_y, z - writer_z
    rx, ry, rz = x - tl.load(reader + 1), y - tl.load(reader + 2), z - tl.load(reader + 3)
    lengths = dot(wx, wy, wz, wx, wy, wz) * dot(rx, ry, rz, rx, ry, rz)
    known = (lengths > 0.0) & (lengths <= _FLOAT_MAX)
    turn = 1.0 - tl.math.div_rn(dot(wx, wy, wz, rx, ry, rz), tl.math.sqrt_rn(tl.where(known, lengths, 1.0)))
    turn = tl.where(known & (turn > 0.0), turn, 0.0)
    return u, v, depth, radius, scale + _RAY_WEIGHT * turn


@triton.jit
def around_view(u, v, z, height, width, near):
    limit_u, limit_v = tl.cast(width, tl.float32) + _MARGIN, tl.cast(height, tl.float32) + _MARGIN
    return (z > near) & (z <= _FLOAT_MAX) & (u > -_MARGIN) & (u < limit_u) & (v > -_MARGIN) & (v < limit_v)


@triton.jit
def floor_cell(value, mask):
    # Only what is around the view is converted: a float outside the range of int32 has no defined conversion.
    return floor_int(tl.where(mask, value, 0.0))


@triton.jit
def cell_distance(u, v, column, row):
    dx, dy = u - (column.to(tl.float32) + 0.5), v - (row.to(tl.float32) + 0.5)
    return dx * dx + dy * dy


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
    """Depths of the tokens that reach a cell; with HOLES, of those whose footprint reaches a hole. View after view."""
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
                u, v, depth, radius, _ = fit_tokens(
                    projections + view * 12, readers + view * 4, x, y, z, footprint, wx, wy, wz
                )
                seen = (index < live) & around_view(u, v, depth, height, width, near)
                grid = tl.cast(view, tl.int64) * cells
                if HOLES:
                    seen = seen & (radius > _REACH)
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
                        meets = meets & (cell_distance(u, v, column, row) <= _REACH * _REACH)
                        lower_depth(narrow, grid + row * width + column, depth, meets)


@triton.jit
def insert_keys(keys, cell, key, mask):
    """Every place of a list keeps the lesser key and hands the greater on: its least keys stay, in order, whichever way
    the insertions mix."""
    place = keys + cell * _FITS
    mask = mask & (key < tl.load(place + (_FITS - 1), mask, other=0, cache_modifier=".cg"))
    for k in tl.static_range(_FITS):
        held = tl.atomic_min(place + k, key, mask, sem="relaxed")
        key = tl.where(mask & (held > key), held, key)
        mask = mask & (key != _NO_FIT)


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
                u, v, depth, radius, lack = fit_tokens(
                    projections + view * 12, readers + view * 4, x, y, z, footprint, wx, wy, wz
                )
                seen = (index < live) & around_view(u, v, depth, height, width, near)
                grid = tl.cast(view, tl.int64) * cells
                left, top = floor_cell(u - 0.5, seen), floor_cell(v - 0.5, seen)
                for k in range(4):
                    column, row = left + k % 2, top + k // 2
                    distance = cell_distance(u, v, column, row)
                    meets = seen & in_grid(column, row, height, width) & (distance <= _REACH * _REACH)
                    cell = grid + row * width + column
                    surface = tl.load(narrow + cell, meets, other=0).to(tl.float32, bitcast=True)
                    score = (distance + lack).to(tl.int32, bitcast=True).to(tl.int64)
                    insert_keys(keys, cell, (score << 32) | index, meets & (depth <= _GATE * surface))
                seen = seen & (radius > _REACH)
                if tl.max(seen.to(tl.int32), axis=0) > 0:
                    home_column, home_row = floor_cell(u, seen), floor_cell(v, seen)
                    for k in range(25):
                        column, row = home_column + (k % 5 - 2), home_row + (k // 5 - 2)
                        distance = cell_distance(u, v, column, row)
                        meets = seen & in_grid(column, row, height, width) & (distance <= radius * radius)
                        cell = grid + row * width + column
                        meets = meets & (tl.load(narrow + cell, meets, other=0) == _NO_DEPTH)
                        surface = tl.load(wide + cell, meets, other=0).to(tl.float32, bitcast=True)
                        score = (distance + lack).to(tl.int32, bitcast=True).to(tl.int64)
                        insert_keys(keys, cell, (score << 32) | index, meets & (depth <= _GATE * surface))


@triton.jit
def load_fit(keys, cell, k: tl.constexpr, mask):
    """Token and score of the k-th fit of cells, and whether there is one."""
    key = tl.load(keys + cell * _FITS + k, mask, other=_NO_FIT)
    held = key != _NO_FIT
    return key & 0xFFFFFFFF, tl.where(held, (key >> 32).to(tl.int32).to(tl.float32, bitcast=True), 0.0), held


@triton.jit
def fit_base(score, best, sharpness):
    return 1.0 - (sharpness * (score - best)) * 0.125


@triton.jit
def fit_weight(score, best, held, sharpness):
    base = fit_base(score, best, sharpness)
    base = tl.where(held & (base > 0.0), base, 0.0)
    square = base * base
    fourth = square * square
    return fourth * fourth


@triton.jit
def load_blend(keys, cell, sharpness, mask):
    """Tokens, scores and shares of the four fits of cells."""
    tl.static_assert(_FITS == 4)
    token0, score0, held0 = load_fit(keys, cell, 0, mask)
    token1, score1, held1 = load_fit(keys, cell, 1, mask)
    token2, score2, held2 = load_fit(keys, cell, 2, mask)
    token3, score3, held3 = load_fit(keys, cell, 3, mask)
    weight0 = held0.to(tl.float32)
    weight1 = fit_weight(score1, score0, held1, sharpness)
    weight2 = fit_weight(score2, score0, held2, sharpness)
    weight3 = fit_weight(score3, score0, held3, sharpness)
    total = ((weight0 + weight1) + weight2) + weight3
    total = tl.where(total > 0.0, total, 1.0)
    tokens = (token0, token1, token2, token3)
    scores = (score0, score1, score2, score3)
    shares = (
        tl.math.div_rn(weight0, total),
        tl.math.div_rn(weight1, total),
        tl.math.div_rn(weight2, total),
        tl.math.div_rn(weight3, total),
    )
    return tokens, scores, shares


@triton.jit
def load_values(features, scales, token, share, channel, channels):
    """(CELLS, CHANNELS) float32, 0 where there is no share."""
    return widen(load_features(features, scales, token, channel, channels, share > 0.0))


@triton.jit
def add_rows(sum, features, scales, token, share, channel, channels):
    rows = load_values(features, scales, token, share, channel, channels)
    return tl.where((share > 0.0)[:, None], sum + share[:, None] * rows, sum)


@triton.jit(do_not_specialize=["cell_blocks", "channel_blocks"])
def read_out_kernel(
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
    tokens, _scores, shares = load_blend(keys, at, sharpness, inside)
    seen = shares[0] > 0.0
    if program % channel_blocks == 0:
        x = tl.load(points + tokens[0] * 4, seen, other=0.0)
        y = tl.load(points + tokens[0] * 4 + 1, seen, other=0.0)
        z = tl.load(points + tokens[0] * 4 + 2, seen, other=0.0)
        _u, _v, own_depth = project(projections + view * 12, x, y, z)
        tl.store(index + at, tl.where(seen, tokens[0], -1), inside)
        tl.store(depth + at, tl.where(seen, own_depth, 0.0), inside)
        tl.store(mask + at, seen, inside)
    channel = (program % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    rows = load_values(features, scales, tokens[0], shares[0], channel, channels)
    sum = tl.where(seen[:, None], shares[0][:, None] * rows, 0.0)
    sum = add_rows(sum, features, scales, tokens[1], shares[1], channel, channels)
    sum = add_rows(sum, features, scales, tokens[2], shares[2], channel, channels)
    sum = add_rows(sum, features, scales, tokens[3], shares[3], channel, channels)
    target = latents + view * channels * cells + channel.to(tl.int64)[None, :] * cells + cell[:, None]
    tl.store(target, convert(sum, latents.dtype.element_ty), inside[:, None] & (channel < channels)[None, :])


@triton.jit
def fit_slope(score, best, share, dot, mean, best_share, sharpness):
    base = fit_base(score, best, sharpness)
    square = base * base
    slope = -(sharpness * ((square * square) * (square * base))) * ((dot - mean) * best_share)
    return tl.where(share > 0.0, slope, 0.0)


@triton.jit(do_not_specialize=["total"])
def share_kernel(
    grad_rows,
    keys,
    features,
    scales,
    shares_out,
    slopes_out,
    sharpness,
    channels,
    total,
    OF_POINTS: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Shares of every place and, for points, the slopes of its score."""
    cell = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    inside = cell < total
    tokens, scores, shares = load_blend(keys, cell, sharpness, inside)
    for k in tl.static_range(_FITS):
        tl.store(shares_out + cell * _FITS + k, shares[k], inside)
    if OF_POINTS:
        dot0 = tl.zeros((CELLS,), tl.float32)
        dot1, dot2, dot3 = dot0, dot0, dot0
        for first in range(0, channels, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            real = inside[:, None] & (channel < channels)[None, :]
            grad = tl.load(grad_rows + cell[:, None] * channels + channel[None, :], real, other=0.0)
            dot0 += tl.sum(grad * load_values(features, scales, tokens[0], shares[0], channel, channels), axis=1)
            dot1 += tl.sum(grad * load_values(features, scales, tokens[1], shares[1], channel, channels), axis=1)
            dot2 += tl.sum(grad * load_values(features, scales, tokens[2], shares[2], channel, channels), axis=1)
            dot3 += tl.sum(grad * load_values(features, scales, tokens[3], shares[3], channel, channels), axis=1)
        mean = ((shares[0] * dot0 + shares[1] * dot1) + shares[2] * dot2) + shares[3] * dot3
        slope1 = fit_slope(scores[1], scores[0], shares[1], dot1, mean, shares[0], sharpness)
        slope2 = fit_slope(scores[2], scores[0], shares[2], dot2, mean, shares[0], sharpness)
        slope3 = fit_slope(scores[3], scores[0], shares[3], dot3, mean, shares[0], sharpness)
        tl.store(slopes_out + cell * _FITS, ((0.0 - slope1) - slope2) - slope3, inside)
        tl.store(slopes_out + cell * _FITS + 1, slope1, inside)
        tl.store(slopes_out + cell * _FITS + 2, slope2, inside)
        tl.store(slopes_out + cell * _FITS + 3, slope3, inside)


@triton.jit
def fit_gradient(projection, reader, x, y, z, footprint, wx, wy, wz, u, v, depth, slope_u, slope_v, slope):
    """Gradients to x, y, z and footprint of one view, see ``add_fit_gradient`` in csrc/core/fit.h."""
    inverse = tl.math.div_rn(1.0, depth)
    focal = tl.load(reader)
    ratio = footprint_ratio(footprint, focal, inverse)
    free = (ratio > 1.0 / _RATIO) & (ratio < _RATIO)
    slope_ratio = tl.where(free, slope * (1.0 - tl.math.div_rn(1.0, ratio * ratio)), 0.0)

    wx, wy, wz = x - wx, y - wy, z - wz
    rx, ry, rz = x - tl.load(reader + 1), y - tl.load(reader + 2), z - tl.load(reader + 3)
    written_2, read_2 = dot(wx, wy, wz, wx, wy, wz), dot(rx, ry, rz, rx, ry, rz)
    lengths = written_2 * read_2
    known = (lengths > 0.0) & (lengths <= _FLOAT_MAX)
    norm = tl.math.sqrt_rn(tl.where(known, lengths, 1.0))
    cosine = tl.math.div_rn(dot(wx, wy, wz, rx, ry, rz), norm)
    turned = known & (1.0 - cosine > 0.0)
    slope_turn = slope * _RAY_WEIGHT
    gx = _axis_gradient(projection, 0, u, v, slope_u, slope_v, inverse, slope_ratio, ratio)
    gx -= tl.where(turned, slope_turn * _turn(wx, rx, norm, cosine, written_2, read_2), 0.0)
    gy = _axis_gradient(projection, 1, u, v, slope_u, slope_v, inverse, slope_ratio, ratio)
    gy -= tl.where(turned, slope_turn * _turn(wy, ry, norm, cosine, written_2, read_2), 0.0)
    gz = _axis_gradient(projection, 2, u, v, slope_u, slope_v, inverse, slope_ratio, ratio)
    gz -= tl.where(turned, slope_turn * _turn(wz, rz, norm, cosine, written_2, read_2), 0.0)
    return gx, gy, gz, slope_ratio * (focal * inverse)


@triton.jit
def _axis_gradient(projection, axis: tl.constexpr, u, v, slope_u, slope_v, inverse, slope_ratio, ratio):
    m0, m1, m2 = tl.load(projection + axis), tl.load(projection + 4 + axis), tl.load(projection + 8 + axis)
    position = (slope_u * (m0 - u * m2) + slope_v * (m1 - v * m2)) * inverse
    return position - slope_ratio * ((ratio * inverse) * m2)


@triton.jit
def _turn(written, read, norm, cosine, written_2, read_2):
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
    shares,
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
    """Tokens find the places they have, in order of view and cell, and sum there: no two lanes add to one number."""
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
        u, v, depth, radius, _ = fit_tokens(projection, reader, x, y, z, footprint, wx, wy, wz)
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
                    for n in range(_FITS):
                        key = tl.load(keys + cell * _FITS + n, meets, other=_NO_FIT)
                        mine = meets & (key != _NO_FIT) & ((key & 0xFFFFFFFF) == index)
                        share = tl.load(shares + cell * _FITS + n, mine, other=0.0)
                        mine = mine & (share > 0.0)
                        real = mine[:, None] & (channel < channels)[None, :]
                        rows = tl.load(grad_rows + cell[:, None] * channels + channel[None, :], real, other=0.0)
                        sum = tl.where(mine[:, None], sum + share[:, None] * rows, sum)
                        if grad_points is not None:
                            s = tl.load(slopes + cell * _FITS + n, mine, other=0.0)
                            slope_u += tl.where(mine, s * (2.0 * (u - (column.to(tl.float32) + 0.5))), 0.0)
                            slope_v += tl.where(mine, s * (2.0 * (v - (row.to(tl.float32) + 0.5))), 0.0)
                            slope += s
            if grad_points is not None:
                gx, gy, gz, gf = fit_gradient(
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


def prepare(
    intrinsics: Tensor, cam2world: Tensor, narrow: Tensor | None, wide: Tensor | None, keys: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Projections (T, 12), and focal lengths and centres (T, 4); empties the buffers, if given."""
    views, total = cam2world.shape[0], keys.numel() // FITS if narrow is not None else 0
    projections = like.new_empty((views, PROJECTION_SIZE), dtype=torch.float32)
    readers = like.new_empty((views, 4), dtype=torch.float32)
    prepare_kernel[(max(cdiv(total, _PREPARE_CELLS), cdiv(views, _PREPARE_VIEWS)),)](
        intrinsics.contiguous(),
        cam2world.contiguous(),
        projections,
        readers,
        narrow,
        wide,
        keys,
        views,
        total,
        CELLS=_PREPARE_CELLS,
        VIEWS=_PREPARE_VIEWS,
        num_warps=1,
        **EXACT,
    )
    return projections, readers


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
    keys = features.new_empty((views, height, width, FITS), dtype=torch.int64)
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
        read_out_kernel[(views * cell_blocks * channel_blocks,)](
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
    shares, slopes = (points.new_empty((views, cells, FITS)) for _ in range(2))
    features, keys, points = features.contiguous(), keys.contiguous(), points.contiguous()
    channel_block = min(_CHANNELS, power_of_2(max(channels, 1)))
    channel_blocks = max(1, cdiv(summed, channel_block))
    with device_of(points):
        projections, readers = prepare(intrinsics, cam2world, None, None, keys, points)
        share_kernel[(cdiv(views * cells, _READ_CELLS),)](
            rows,
            keys,
            raw(features),
            None if scales is None else scales.contiguous(),
            shares,
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
            shares,
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

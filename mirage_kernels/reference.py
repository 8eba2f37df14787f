"""The definition of every operator, in plain PyTorch, for float32 and float64.

What this file computes is what is true: the C++, CUDA and Triton kernels are held to it bit for bit in float32. It is
written to be read. Camera matrices are composed in float64 and rounded once; per-point work then runs in the working
dtype, one rounded operation at a time, in the order the kernels use (see ``csrc/core/camera.h``). Reads here take no
bounds of blocks: those spare kernels work and change no result.

Conventions: OpenCV axes (x right, y down, z forward); pixel coordinates are continuous, column j covers [j, j + 1).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

VOXEL_LIMIT = 2**20
BLOCK = 256  # consecutive rows of points that share one box; the kernels' copy is kBlockTokens in csrc/core/frustum.h
TILE = 64  # consecutive blocks that share one box; kTileBlocks there


# Features of one byte: float8 e4m3 (OCP 8-bit floating point, 1.0; torch.float8_e4m3fn) and one scale a token, a power
# of two stored as its biased exponent in a byte, like the E8M0 scales of the OCP Microscaling formats, 1.0.
FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
SCALE_BIAS = 127
# From here up no value is a subnormal float32, and a latent that is one is no more than half a step.
LEAST_SCALE = 11
# The greatest at which 448 is a finite float32: 2^119.
GREATEST_SCALE = 246
LARGEST_QUANTISED = FLOAT8_MAX * 2.0 ** (GREATEST_SCALE - SCALE_BIAS)


def _power_of_2(biased_exponent: Tensor) -> Tensor:
    """2^(biased_exponent - 127) in float32, from integers in [0, 255]: 0 gives 0, 255 Inf."""
    return (biased_exponent.int() << 23).view(torch.float32)


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of tokens as float8 e4m3 and a scale each.

    The scale is the least at which the token's largest magnitude is no more than 448, so above 224, but for the limits
    [11, 246]: nothing saturates. A token of zeros has the least. Values are rounded to nearest even: to four
    significant bits, and below 2^-6 of the scale, at most 1/14336 of the largest magnitude, to multiples of 2^-9 of it.

    Args:
        rows: (N, C) float. What rounds to more than 448 * 2^119, 2.98e38, in magnitude becomes NaN.

    Returns:
        (N, C) float8_e4m3fn and (N,) uint8: value = float8 * 2^(scale - 127).
    """
    rows = rows.to(torch.float32)
    largest = rows.abs().amax(1) if rows.shape[1] > 0 else rows.new_zeros(rows.shape[0])
    # largest / 448 = mantissa / 1.75 * 2^(exponent - 8): a mantissa above 1.75 carries into the exponent.
    bits = largest.view(torch.int32).long()
    scales = (((bits + 0x1FFFFF) >> 23) - 8).clamp(LEAST_SCALE, GREATEST_SCALE)
    # Exact, but for what is far below half a step.
    scaled = rows * _power_of_2(2 * SCALE_BIAS - scales)[:, None]
    exponent = ((scaled.view(torch.int32) >> 23) & 0xFF).clamp(min=SCALE_BIAS - 6)
    # On multiples of a step, which float8 has all of, so that its own rounding has nothing left to decide.
    rounded = (scaled * _power_of_2(2 * SCALE_BIAS + 3 - exponent)).round() * _power_of_2(exponent - 3)
    fits = rounded.abs() <= FLOAT8_MAX
    codes = torch.where(fits, rounded, 0.0).to(FLOAT8).view(torch.uint8)
    codes = torch.where(fits, codes, torch.where(rounded.signbit(), 0xFF, 0x7F)).to(torch.uint8)
    return codes.view(FLOAT8), scales.to(torch.uint8)


def dequantise_rows(features: Tensor, scales: Tensor) -> Tensor:
    """(N, C) float32 values of float8 features: float8 * 2^(scale - 127), one float32 product.

    Exact, and no subnormal, at every scale that :func:`quantise_rows` gives; exact in bfloat16 as well.
    """
    return features.to(torch.float32) * _power_of_2(scales)[:, None]


def store_rows(features: Tensor, scales: Tensor | None, where: slice | Tensor, rows: Tensor) -> None:
    """Write latents of tokens (M, C) as the features, and scales if there are any, of the rows ``where``."""
    if scales is None:
        features[where] = rows.to(features.dtype)
    else:
        quantised, scales[where] = quantise_rows(rows)
        features.view(torch.uint8)[where] = quantised.view(torch.uint8)


def storable(latents: Tensor, dtype: torch.dtype) -> Tensor:
    """True where a latent is finite once stored in ``dtype``: one of float32 may be too large for the others."""
    if dtype == FLOAT8:
        return latents.to(torch.float32).abs() <= LARGEST_QUANTISED  # fails for NaN
    return torch.isfinite(latents.to(dtype))


def make_projection(intrinsics: Tensor, cam2world: Tensor, dtype: torch.dtype) -> Tensor:
    """World-to-grid matrices ``K @ inverse(cam2world)``.

    Args:
        intrinsics: (T, 3, 3) float64, in cells of the target grid.
        cam2world: (T, 4, 4) float64, any invertible affine matrix.
        dtype: dtype of the result; the composition itself is float64.

    Returns:
        (T, 3, 4): ``(a, b, z) = M (x, y, z, 1)``, a point lies at column a / z and row b / z.
    """
    (a00, a01, a02, t0), (a10, a11, a12, t1), (a20, a21, a22, t2) = (
        tuple(cam2world[:, i, j] for j in range(4)) for i in range(3)
    )
    cofactors = (
        (a11 * a22 - a12 * a21, a02 * a21 - a01 * a22, a01 * a12 - a02 * a11),
        (a12 * a20 - a10 * a22, a00 * a22 - a02 * a20, a02 * a10 - a00 * a12),
        (a10 * a21 - a11 * a20, a01 * a20 - a00 * a21, a00 * a11 - a01 * a10),
    )
    determinant = (a00 * cofactors[0][0] + a01 * cofactors[1][0]) + a02 * cofactors[2][0]
    rows = []
    for c0, c1, c2 in cofactors:
        r0, r1, r2 = c0 / determinant, c1 / determinant, c2 / determinant
        rows.append((r0, r1, r2, -((r0 * t0 + r1 * t1) + r2 * t2)))
    fx, cx = intrinsics[:, 0, 0], intrinsics[:, 0, 2]
    fy, cy = intrinsics[:, 1, 1], intrinsics[:, 1, 2]
    projection = (
        tuple(fx * rows[0][j] + cx * rows[2][j] for j in range(4)),
        tuple(fy * rows[1][j] + cy * rows[2][j] for j in range(4)),
        rows[2],
    )
    return torch.stack([torch.stack(row, dim=-1) for row in projection], dim=-2).to(dtype)


def project_points(points: Tensor, projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns u, rows v and depths z of points (N, >= 3) under one (3, 4) projection; (N,) each."""
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    a, b, depth = (((row[0] * x + row[1] * y) + row[2] * z) + row[3] for row in projection)
    inverse = 1.0 / depth
    return a * inverse, b * inverse, depth


def in_view(u: Tensor, v: Tensor, z: Tensor, size: tuple[int, int], near: float) -> Tensor:
    """True where a projection falls into a cell of the grid, in front of ``near``. NaN never passes."""
    height, width = size
    finite = z <= torch.finfo(z.dtype).max
    return (z > near) & finite & (u >= 0) & (u < width) & (v >= 0) & (v < height)


def _cell_pixels(cells: int, pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixel indices of every cell, padded: (cells, longest) int64, and which of them are real.

    Pixel r belongs to cell floor((r + 0.5) * cells / pixels).
    """
    cell = torch.arange(cells + 1, device=device)
    begin = (2 * cell * pixels + cells - 1) // (2 * cells)
    longest = (pixels + cells - 1) // cells + 1
    index = begin[:-1, None] + torch.arange(longest, device=device)
    return index.clamp(max=pixels - 1), index < begin[1:, None]


def _gather_cells(image: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(T, H, W) to (T, h, w, K): the K pixels of each cell, padded, and (h, w, K) bool marking the real ones."""
    rows, real_rows = _cell_pixels(size[0], image.shape[1], image.device)
    columns, real_columns = _cell_pixels(size[1], image.shape[2], image.device)
    pixels = image[:, rows[:, None, :, None], columns[None, :, None, :]]
    real = real_rows[:, None, :, None] & real_columns[None, :, None, :]
    return pixels.flatten(3), real.flatten(2)


def pool_depth(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Token depth: the lower median of the valid depths in each cell; 0 where under half of them are valid.

    Args:
        depth: (T, H, W) float; 0, negative, NaN and Inf mean unknown.
        size: the token grid (h, w), at most (H, W).
    """
    pixels, real = _gather_cells(depth, size)
    valid = real & (pixels > 0) & torch.isfinite(pixels)
    count = valid.sum(-1)
    ordered = torch.where(valid, pixels, torch.inf).sort(dim=-1).values
    median = ordered.gather(-1, ((count - 1) // 2).clamp(min=0)[..., None])[..., 0]
    known = (2 * count >= real.sum(-1)) & (count > 0)
    return torch.where(known, median, 0.0)


def resize_depth_bilinear(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear depth without antialiasing, as ``F.interpolate(mode="bilinear", align_corners=False)``.

    For parity with the published code: it blends the zeros of unknown pixels into real surfaces.
    """

    def taps(cells: int, pixels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Half-pixel source positions; weights rounded once to the working dtype.
        position = (torch.arange(cells, device=depth.device, dtype=torch.float64) + 0.5) * (pixels / cells) - 0.5
        position = position.clamp(min=0)
        low = position.long().clamp(max=pixels - 1)
        weight = (position - low).to(depth.dtype)
        return low, (low + 1).clamp(max=pixels - 1), 1 - weight, weight

    top, bottom, weight_top, weight_bottom = taps(size[0], depth.shape[1])
    left, right, weight_left, weight_right = taps(size[1], depth.shape[2])
    upper = weight_left * depth[:, top[:, None], left] + weight_right * depth[:, top[:, None], right]
    lower = weight_left * depth[:, bottom[:, None], left] + weight_right * depth[:, bottom[:, None], right]
    return weight_top[:, None] * upper + weight_bottom[:, None] * lower


def pool_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(T, H, W) bool, True = static, to (T, h, w): a token is static only if all its pixels are."""
    pixels, real = _gather_cells(mask, size)
    return (pixels | ~real).all(-1)


def _lift(depth: Tensor, z: Tensor, intrinsics: Tensor, cam2world: Tensor) -> Tensor:
    """Token depths z (T, h, w) of a depth map (T, H, W) to (T, h, w, 4): x, y, z, footprint."""
    height, width = z.shape[1:]
    sy, sx = height / depth.shape[1], width / depth.shape[2]

    def parameter(values: Tensor) -> Tensor:
        return values.to(z.dtype)[:, None, None]

    fx, cx = parameter(intrinsics[:, 0, 0] * sx), parameter(intrinsics[:, 0, 2] * sx)
    fy, cy = parameter(intrinsics[:, 1, 1] * sy), parameter(intrinsics[:, 1, 2] * sy)
    column = torch.arange(width, device=z.device, dtype=z.dtype) + 0.5
    row = torch.arange(height, device=z.device, dtype=z.dtype)[:, None] + 0.5
    x = (column - cx) / fx * z
    y = (row - cy) / fy * z
    m = [[parameter(cam2world[:, i, j]) for j in range(4)] for i in range(3)]
    world = [((m[i][0] * x + m[i][1] * y) + m[i][2] * z) + m[i][3] for i in range(3)]
    return torch.stack([*world, z / fx], dim=-1)


def _token_depth(depth: Tensor, size: tuple[int, int], depth_sampling: str) -> tuple[Tensor, Tensor]:
    z = resize_depth_bilinear(depth, size) if depth_sampling == "bilinear" else pool_depth(depth, size)
    return z, (z > 0) & torch.isfinite(z)


def back_project(
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    mask: Tensor | None,
    size: tuple[int, int],
    depth_sampling: str,
) -> tuple[Tensor, Tensor]:
    """Definition of :func:`mirage_kernels.back_project`: points (T, h, w, 4), 0 if not valid, and valid (T, h, w)."""
    z, valid = _token_depth(depth, size, depth_sampling)
    points = _lift(depth, z, intrinsics, cam2world)
    valid = valid & torch.isfinite(points).all(-1)
    if mask is not None:
        valid = valid & pool_mask(mask, size)
    return torch.where(valid[..., None], points, 0.0), valid


def splat(
    points: Tensor,
    features: Tensor,
    num_points: Tensor | None,
    intrinsics: Tensor,
    cam2world: Tensor,
    size: tuple[int, int],
    near: float,
    dtype: torch.dtype,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Definition of :func:`mirage_kernels.splat`: latents, mask, depth, index.

    Per view: the smallest z in each cell, then the lowest index among the points that have it. Differentiable to
    ``features``.
    """
    if scales is not None:
        features = dequantise_rows(features, scales)
    height, width = size
    cells, count = height * width, points.shape[0]
    number = torch.arange(count, device=points.device)
    live = torch.ones_like(number, dtype=torch.bool) if num_points is None else number < num_points
    projections = make_projection(intrinsics, cam2world, points.dtype)
    depths, indices = [], []
    for projection in projections:
        u, v, z = project_points(points, projection)
        visible = live & in_view(u, v, z, size, near)
        # Points out of view go to a bin of their own behind the grid.
        cell = torch.where(
            visible, torch.where(visible, v, 0).long() * width + torch.where(visible, u, 0).long(), cells
        )
        nearest = z.new_full((cells + 1,), torch.inf).scatter_reduce(
            0, cell, torch.where(visible, z, torch.inf), "amin"
        )
        wins = visible & (z == nearest[cell])
        winner = number.new_full((cells + 1,), count).scatter_reduce(0, cell, torch.where(wins, number, count), "amin")
        depths.append(nearest[:cells])
        indices.append(winner[:cells])
    shape = (projections.shape[0], height, width)
    index = torch.stack(indices).view(shape) if indices else number.new_empty(shape)
    depth = torch.stack(depths).view(shape) if depths else points.new_empty(shape)
    mask = index < count
    index = torch.where(mask, index, -1)
    latents = _ReadOut.apply(features, index, dtype)
    return latents, mask, torch.where(mask, depth, 0.0), index


class _ReadOut(torch.autograd.Function):
    """Gather of the winners' features; a backward of its own, as PyTorch's sums duplicates in any order."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_points, ctx.dtype = features.shape[0], features.dtype
        # A row of zeros behind the features is what holes read.
        padded = torch.cat([features, features.new_zeros(1, features.shape[1])]).to(dtype)
        return padded[torch.where(index < 0, features.shape[0], index)].permute(0, 3, 1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, grad_latents: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return splat_backward(grad_latents, index, ctx.num_points, ctx.dtype), None, None


def splat_backward(grad_latents: Tensor, index: Tensor, num_points: int, dtype: torch.dtype) -> Tensor:
    """Gradient of the read-out to features (num_points, C): the sum over the cells each token won, view by view.

    Summed in float32 (float64 where either side is) and rounded once. Within a view a token wins one cell at most, so
    adding view after view is free of collisions and has one order.
    """
    double = torch.float64 in (grad_latents.dtype, dtype)
    rows = grad_latents.flatten(2).transpose(1, 2).to(torch.float64 if double else torch.float32)
    # Holes add to a row of their own behind the tokens.
    total = rows.new_zeros(num_points + 1, rows.shape[2])
    for t in range(rows.shape[0]):
        winners = index[t].flatten()
        winners = torch.where(winners < 0, num_points, winners)
        total = total.index_put((winners,), total[winners] + rows[t])
    return total[:num_points].to(dtype)


# What `splat_aligned` weighs by, measured on a real room (benchmarks/fidelity.py). The kernels' copies of these numbers
# are in csrc/core/fit.h and triton/splat_aligned.py.
FITS = 4  # tokens that a cell blends at most
REACH = 0.75  # how far a token reaches from its centre, in cells: the corners of a cell are at 0.71
WIDEST = 3.0  # cells that a footprint counts for at most, where it closes holes
LARGEST_RATIO = 16.0  # between footprint and cell, either way
GATE = 1.1  # tokens past this multiple of the nearest depth in a cell belong to another surface
RAY_WEIGHT = 16.0  # of 1 - cos of the angle between viewing rays, against squared distances in cells
_HOLE_REACH = 2  # whole cells that WIDEST * REACH spans to either side of a token's own


def _fit(
    points: Tensor, writers: Tensor, projection: Tensor, focal: Tensor, reader: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """How tokens (M, 4), written by cameras at ``writers`` (M, 3), would fit a view: one for all, or one each.

    Returns:
        Columns u, rows v and depths z; the radius, in cells, within which a token may close a hole; and what it lacks
        in any cell: (ratio - 1)^2 / ratio, which is ln^2 ratio near 1, of ratio = footprint / cell size, plus the turn
        between the rays. (M,) each. Without a footprint the ratio is the least there is, without a writing camera the
        turn is 0.
    """
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    a, b, depth = (
        ((projection[..., i, 0] * x + projection[..., i, 1] * y) + projection[..., i, 2] * z) + projection[..., i, 3]
        for i in range(3)
    )
    inverse = 1.0 / depth

    ratio = (points[:, 3] * focal) * inverse
    least, most = torch.full_like(ratio, 1 / LARGEST_RATIO), torch.full_like(ratio, LARGEST_RATIO)
    ratio = torch.where(ratio > least, torch.where(ratio < most, ratio, most), least)
    scale = ((ratio - 1.0) * (ratio - 1.0)) / ratio

    def dot(p: Tensor, q: Tensor) -> Tensor:
        return (p[:, 0] * q[:, 0] + p[:, 1] * q[:, 1]) + p[:, 2] * q[:, 2]

    rays = points[:, :3] - writers, points[:, :3] - reader
    lengths = dot(rays[0], rays[0]) * dot(rays[1], rays[1])
    known = (lengths > 0) & (lengths <= torch.finfo(lengths.dtype).max)
    written, read = (torch.where(known[:, None], ray, 1.0) for ray in rays)
    # Rooted in float64 and rounded once: PyTorch's float32 root is a last bit off on some processors.
    norm = (dot(written, written) * dot(read, read)).double().sqrt().to(x.dtype)
    turn = 1.0 - dot(written, read) / norm
    turn = torch.where(turn > 0, turn, 0.0)
    return a * inverse, b * inverse, depth, REACH * ratio.clamp(1.0, WIDEST), scale + RAY_WEIGHT * turn


def _distance(u: Tensor, v: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """Squared distances, in cells, from projections to the centres of cells."""
    dx, dy = u - (column.to(u.dtype) + 0.5), v - (row.to(v.dtype) + 0.5)
    return dx * dx + dy * dy


def _writers(frame_ids: Tensor, frame_centers: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, 3): the centre of each token's writing camera, NaN for a frame that the table lacks."""
    frames = frame_centers.shape[0]
    known = (frame_ids >= 0) & (frame_ids < frames)
    table = torch.cat([frame_centers, frame_centers.new_full((1, 3), torch.nan)]).to(dtype)
    return table[torch.where(known, frame_ids.long(), frames)]


def _best_fits(
    points: Tensor,
    writers: Tensor,
    projection: Tensor,
    focal: Tensor,
    reader: Tensor,
    size: tuple[int, int],
    near: float,
) -> Tensor:
    """(h w, FITS) int64: the tokens that each cell of one view blends, best first; -1 where there are fewer."""
    height, width = size
    cells = height * width
    u, v, z, radius, lack = _fit(points, writers, projection, focal, reader)
    around = (u > -_HOLE_REACH) & (u < width + _HOLE_REACH) & (v > -_HOLE_REACH) & (v < height + _HOLE_REACH)
    token = ((z > near) & (z <= torch.finfo(z.dtype).max) & around).nonzero()[:, 0]
    u, v, z, radius, lack = (value[token] for value in (u, v, z, radius, lack))

    # Every pair of a token and a cell whose centre is within the token's radius.
    offsets = range(-_HOLE_REACH, _HOLE_REACH + 1)
    found = []
    for row, column in ((v.floor().long() + i, u.floor().long() + j) for i in offsets for j in offsets):
        distance = _distance(u, v, column, row)
        meet = (distance <= radius * radius) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        which = meet.nonzero()[:, 0]
        found.append((which, (row * width + column)[which], distance[which]))
    which, cell, distance = (torch.cat(parts) for parts in zip(*found, strict=True))
    token, z, score = token[which], z[which], distance + lack[which]

    def nearest(chosen: Tensor) -> Tensor:
        return z.new_full((cells,), torch.inf).scatter_reduce(0, cell[chosen], z[chosen], "amin")

    # Tokens count as one cell large where they reach; as large as they are only in the holes that leaves.
    narrow = distance <= REACH * REACH
    surface = nearest(narrow)
    hole = surface == torch.inf
    surface = torch.where(hole, nearest(~narrow), surface)
    keep = (narrow | hole[cell]) & (z <= GATE * surface[cell])
    cell, token, score = cell[keep], token[keep], score[keep]

    # In order of cell, then score, then index.
    order = token.argsort(stable=True)
    order = order[score[order].argsort(stable=True)]
    order = order[cell[order].argsort(stable=True)]
    cell, token = cell[order], token[order]
    rank = torch.arange(len(cell), device=cell.device) - torch.searchsorted(cell, cell)
    first = rank < FITS
    fits = token.new_full((cells * FITS,), -1)
    fits[cell[first] * FITS + rank[first]] = token[first]
    return fits.view(cells, FITS)


def fit_shares(scores: Tensor, held: Tensor, sharpness: float) -> Tensor:
    """Scores (.., FITS), least first, to shares of the blend that sum to 1; 0 where not ``held``.

    The weight of a score is (1 - x / 8)^8 with x = sharpness (score - least): that is e^-x up to a few hundredths, by
    multiplications alone, and 0 from x = 8 on, so that what fits far worse is not even looked at.
    """
    behind = scores[..., 1:] - scores[..., :1]
    if math.isinf(sharpness):
        # A step: infinity times 0 is NaN and counts as 0; there is no slope, where the formula has such products too.
        rest = torch.zeros_like(behind) * behind
    else:
        steepness = torch.tensor(sharpness, dtype=scores.dtype, device=scores.device)
        rest = 1.0 - (steepness * behind) * 0.125
        rest = torch.where(held[..., 1:] & (rest > 0), rest, 0.0)
    base = torch.cat([held[..., :1].to(scores.dtype), rest], -1)
    square = base * base
    fourth = square * square
    weights = fourth * fourth
    total = weights[..., 0]
    for k in range(1, FITS):
        total = total + weights[..., k]
    return weights / torch.where(total > 0, total, 1.0)[..., None]


class _GatherRows(torch.autograd.Function):
    """rows[index]; a backward of its own, as PyTorch sums duplicates in any order: here in order of position."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = rows.shape[0]
        return rows[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.count, grad.shape[1])
        target, order = index.sort(stable=True)
        turn = torch.arange(len(target), device=index.device) - torch.searchsorted(target, target)
        for repeat in range(int(turn.max()) + 1 if len(turn) > 0 else 0):
            now = turn == repeat
            total = total.index_put((target[now],), total[target[now]] + grad[order[now]])
        return total, None


def splat_aligned(
    points: Tensor,
    features: Tensor,
    num_points: Tensor | None,
    frame_ids: Tensor,
    frame_centers: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    size: tuple[int, int],
    near: float,
    sharpness: float,
    dtype: torch.dtype,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Definition of :func:`mirage_kernels.splat_aligned`: latents, mask, depth, index.

    Which tokens a cell blends is decided without gradients. Given them, the read-out is a differentiable function of
    features and points, written as such below: the gradients are what follows from it.
    """
    if scales is not None:
        features = dequantise_rows(features, scales)
    (height, width), views = size, cam2world.shape[0]
    cells = height * width
    projections = make_projection(intrinsics, cam2world, points.dtype)
    focals, readers = intrinsics[:, 0, 0].to(points.dtype), cam2world[:, :3, 3].to(points.dtype)
    writers = _writers(frame_ids, frame_centers, points.dtype)
    live = points.shape[0] if num_points is None else max(0, min(int(num_points), points.shape[0]))
    index = torch.empty(views, cells, FITS, dtype=torch.int64, device=points.device)
    with torch.no_grad():
        for t in range(views):
            camera = projections[t], focals[t], readers[t]
            index[t] = _best_fits(points[:live], writers[:live], *camera, size, near)
    held = index >= 0

    view, cell, slot = held.nonzero(as_tuple=True)
    token = index[view, cell, slot]
    u, v, z, _, lack = _fit(
        _GatherRows.apply(points, token), writers[token], projections[view], focals[view], readers[view]
    )
    score = _distance(u, v, cell % width, cell // width) + lack
    scores = points.new_zeros(held.shape).index_put((view, cell, slot), score)
    working = torch.float64 if torch.float64 in (points.dtype, features.dtype, dtype) else torch.float32
    shares = fit_shares(scores, held, sharpness).to(working)

    # A row of zeros behind the features is what empty places read.
    padded = torch.cat([features, features.new_zeros(1, features.shape[1])])
    rows = _GatherRows.apply(padded.to(working), torch.where(held, index, features.shape[0]).flatten())
    rows = rows.view(views, cells, FITS, features.shape[1])
    latents = shares[..., 0, None] * rows[..., 0, :]
    for k in range(1, FITS):
        share = shares[..., k, None]
        row = torch.where(share > 0, rows[..., k, :], 0.0)  # what has no share does not count, NaN or not
        latents = torch.where(share > 0, latents + share * row, latents)
    latents = latents.to(dtype).transpose(1, 2).reshape(views, features.shape[1], height, width).contiguous()

    depth = torch.zeros(held.shape, dtype=points.dtype, device=points.device).index_put((view, cell, slot), z.detach())
    shape = (views, height, width)
    mask, best = held[..., 0].reshape(shape).contiguous(), index[..., 0].reshape(shape).contiguous()
    return latents, mask, depth[..., 0].reshape(shape).contiguous(), best


def _judge(
    latents: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
    depth_sampling: str,
    min_depth: float,
    max_depth: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What T views give to write, for features stored as ``dtype``.

    Returns:
        Lifted tokens (T, h, w, 4); their depths (T, h, w), 0 where unknown; which of them are worth keeping (T, h, w);
        and how many are not: (4,) masked, of unknown depth, out of range, not finite.
    """
    size = (latents.shape[2], latents.shape[3])
    z, known = _token_depth(depth, size, depth_sampling)
    lifted = _lift(depth, z, intrinsics, cam2world)
    static = torch.ones_like(known) if mask is None else pool_mask(mask, size)
    in_range = (z >= min_depth) & (z <= max_depth)
    finite = torch.isfinite(lifted).all(-1) & storable(latents, dtype).all(1)
    rejected = [~static, static & ~known, static & known & ~in_range, static & known & in_range & ~finite]
    keep = static & known & in_range & finite
    return lifted, torch.where(known, z, 0.0), keep, torch.stack([one.sum() for one in rejected])


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
    depth_sampling: str,
    min_depth: float,
    max_depth: float,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Definition of :func:`mirage_kernels.cache_write`: appends in token order, returns the six report counts."""
    lifted, _, keep, rejected = _judge(
        latents, depth, intrinsics, cam2world, mask, features.dtype, depth_sampling, min_depth, max_depth
    )

    start, capacity = int(count), points.shape[0]
    rows = latents.permute(0, 2, 3, 1)[keep]
    # A count from outside may be anything: nothing is written past the buffers, or before them.
    fits = min(rows.shape[0], max(capacity - start, 0) if start >= 0 else 0)
    frames = torch.arange(first_frame, first_frame + latents.shape[0], device=keep.device)[:, None, None]
    if fits > 0:
        points[start : start + fits] = lifted[keep][:fits].to(points.dtype)
        store_rows(features, scales, slice(start, start + fits), rows[:fits])
        frame_ids[start : start + fits] = frames.expand_as(keep)[keep][:fits].to(frame_ids.dtype)
    count += fits
    if bounds is not None and fits > 0:
        first, last, blocks = start // BLOCK, -(-(start + fits) // BLOCK), -(-capacity // BLOCK)
        bounds[first:last] = _block_boxes(points[first * BLOCK : start + fits])
        tile = first // TILE
        bounds[blocks + tile : blocks + -(-last // TILE)] = _boxes_around(bounds[tile * TILE : last], TILE)
    return torch.cat([torch.tensor([fits, rows.shape[0] - fits], device=keep.device), rejected])


# What `bounded_write` and `cache_compact` decide by, measured on a real room (benchmarks/fidelity.py). The kernels'
# copies # of these numbers are in csrc/core/bound.h and triton/bounded_write.py.
COVERED = 0.2  # a token that fits a cell of the new view with this score, or a better one, shows what is there
SAME_LOOK = 0.05  # so does one that lacks no more than this, wherever in the cell it lies
FRESH = 0.02  # up to this score the look is the same, and the newer one takes its place
CLOSER = 1.25  # so does one written from this many times as near
CARVE_GATE = 1.05  # a view sees through what lies before what it shows by more than this
MOST_MERGED = 16  # looks that a mean remembers, so that it can follow a change
DEAD = 255  # in the place of votes: carved away
WRITE_REPORT = (
    "written",
    "replaced",
    "merged",
    "covered",
    "refused",
    "masked",
    "unknown_depth",
    "out_of_range",
    "non_finite",
    "carved",
    "evicted",
)


def z_order(size: tuple[int, int]) -> Tensor:
    """(h w,) int32: the cells of a grid along a Z-order curve, so that neighbours in the order are so in the grid."""
    cell = torch.arange(size[0] * size[1])
    row, column, code = cell // size[1], cell % size[1], torch.zeros_like(cell)
    for bit in range(16):
        code |= ((column >> bit & 1) << 2 * bit) | ((row >> bit & 1) << 2 * bit + 1)
    return code.argsort().int()


def token_voxels(points: Tensor) -> Tensor:
    """(N,) int64: the voxel of each token (N, 4). Its edge is the power of two nearest to the footprint, as a ratio.

    7 bits of level, held to [-62, 62]; 19 bits an axis, what lies outside shares the border voxels.
    """
    # The exponent, and one more where the rest is past the square root of two.
    bits = points[:, 3].float().view(torch.int32)
    level = ((bits >> 23 & 0xFF) - 127 + ((bits & 0x7FFFFF) > 0x3504F3).int()).clamp(-62, 62)
    inverse = ((127 - level) << 23).view(torch.float32).to(points.dtype)
    scaled = (points[:, :3] * inverse[:, None]).floor().nan_to_num(nan=-(2.0**18)).clamp(-(2**18), 2**18 - 1)
    x, y, z = (scaled.long() + 2**18).unbind(-1)
    return ((level.long() + 62) << 57) | (x << 38) | (y << 19) | z


def nearest_depth(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """(T, H, W) to (T, h, w): the least valid depth of each cell, infinite where there is none."""
    pixels, real = _gather_cells(depth, size)
    return torch.where(real & (pixels > 0) & torch.isfinite(pixels), pixels, torch.inf).amin(-1)


def _seen_through(nearest: Tensor, surface: Tensor, u: Tensor, v: Tensor, depths: Tensor) -> Tensor:
    """Whether a view that shows `surface` (h, w), and nothing nearer than `nearest` in a cell, sees through tokens.

    It shows something clearly behind in the token's own cell, and nothing at its depth in the four cells whose centres
    surround (u, v), past the border those at it. What a cell shows is its least depth, or its surface where something
    hangs clearly before the token.
    """
    height, width = surface.shape
    through = depths * CARVE_GATE < surface[v.long(), u.long()]
    column, row = (u - 0.5).floor().long(), (v - 0.5).floor().long()
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        cell = (row + i).clamp(0, height - 1), (column + j).clamp(0, width - 1)
        shown = nearest[cell]
        shown = torch.where(shown * CARVE_GATE < depths, surface[cell], shown)
        through = through & ((depths * CARVE_GATE < shown) | (shown * CARVE_GATE < depths))
    return through


def bounded_write(
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    votes: Tensor,
    looks: Tensor | None,
    count: Tensor,
    frame_centers: Tensor,
    latents: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    mask: Tensor | None,
    order: Tensor,
    first_frame: int,
    depth_sampling: str,
    min_depth: float,
    max_depth: float,
    near: float,
    views_per_voxel: int,
    carve_views: int,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Definition of :func:`mirage_kernels.bounded_write`: view after view, in place; returns the report."""
    size = (latents.shape[2], latents.shape[3])
    height, width = size
    cells, capacity = height * width, points.shape[0]
    lifted, z, keep, rejected = _judge(
        latents, depth, intrinsics, cam2world, mask, features.dtype, depth_sampling, min_depth, max_depth
    )
    nearest = nearest_depth(depth, size) if carve_views > 0 else None
    grid = intrinsics.clone()
    grid[:, 0] *= width / depth.shape[2]
    grid[:, 1] *= height / depth.shape[1]
    projections = make_projection(grid, cam2world, torch.float32)
    focals, readers = grid[:, 0, 0].float(), cam2world[:, :3, 3].float()
    place = torch.empty(cells, dtype=torch.int64, device=order.device)  # of each cell in the order
    place[order.long()] = torch.arange(cells, device=order.device)
    report = dict.fromkeys(WRITE_REPORT, 0)

    for t in range(latents.shape[0]):
        live = int(count)
        old, new, worth = points[:live], lifted[t].view(cells, 4), keep[t].flatten()
        rows = latents[t].permute(1, 2, 0).reshape(cells, -1)
        writers = _writers(frame_ids[:live], frame_centers, torch.float32)
        u, v, depths, _, lack = _fit(old, writers, projections[t], focals[t], readers[t])
        alive = votes[:live] != DEAD
        visible = alive & in_view(u, v, depths, size, near)
        u, v = torch.where(visible, u, 0.0), torch.where(visible, v, 0.0)
        cell = v.long() * width + u.long()
        surface = z[t].flatten()[cell]
        on_surface = visible & (surface > 0) & (depths <= GATE * surface) & (surface <= GATE * depths)

        if nearest is not None:
            through = visible & _seen_through(nearest[t], z[t], u, v, depths)
            voted = torch.where(through, votes[:live].int() + 1, torch.where(on_surface, 0, votes[:live].int()))
            carved = alive & through & (voted >= carve_views)
            votes[:live] = torch.where(alive, torch.where(carved, DEAD, voted), DEAD).to(votes.dtype)
            report["carved"] += int(carved.sum())
            alive = alive & ~carved

        # The token that shows best what each cell does: the least score, then the lowest index.
        score = _distance(u, v, cell % width, cell // width) + lack
        shows = alive & on_surface & worth[cell] & ((score <= COVERED) | (lack <= SAME_LOOK))
        least = score.new_full((cells,), torch.inf).scatter_reduce(
            0, cell, torch.where(shows, score, torch.inf), "amin"
        )
        number = torch.arange(live, device=cell.device)
        best = number.new_full((cells,), live).scatter_reduce(
            0, cell, torch.where(shows & (score == least[cell]), number, live), "amin"
        )
        shown = worth & (best < live)
        held = torch.cat([old, old.new_zeros(1, 4)])[best]

        # Whether a voxel has room for what would come to it, first come, first served.
        voxels = token_voxels(new)
        replaces = shown & ((least <= FRESH) | (held[:, 3] >= CLOSER * new[:, 3])) & (looks is None)
        moves = replaces & (token_voxels(held) != voxels)
        comes = (worth & ~shown) | moves
        has_room = torch.zeros_like(comes)
        at = comes.nonzero()[:, 0]
        at = at[place[at].argsort()]
        taken, order_of = token_voxels(old[alive]).sort().values, voxels[at].argsort(stable=True)
        sought = voxels[at][order_of]
        before = torch.searchsorted(taken, sought, right=True) - torch.searchsorted(taken, sought)
        before = before + torch.arange(len(at), device=at.device) - torch.searchsorted(sought, sought)
        has_room[at[order_of]] = before < views_per_voxel

        frame = first_frame + t
        chosen = (replaces & (has_room | ~moves)).nonzero()[:, 0]
        slot = best[chosen]
        points[slot], frame_ids[slot], votes[slot] = new[chosen], frame, 0
        store_rows(features, scales, slot, rows[chosen])
        report["replaced"] += len(chosen)
        covered = int(shown.sum()) - len(chosen)
        if looks is not None:
            chosen = shown.nonzero()[:, 0]
            slot = best[chosen]
            number = looks[slot].float()[:, None]
            mean = (points[slot] * number + new[chosen]) / (number + 1.0)
            stays = token_voxels(mean) == token_voxels(points[slot])
            points[slot] = torch.where(stays[:, None], mean, points[slot])
            stored = features[slot].float() if scales is None else dequantise_rows(features[slot], scales[slot])
            store_rows(features, scales, slot, (stored * number + rows[chosen].float()) / (number + 1.0))
            frame_ids[slot], votes[slot] = frame, 0
            looks[slot] = (looks[slot].int() + 1).clamp(max=MOST_MERGED).to(looks.dtype)
            report["merged"] += len(chosen)
        else:
            report["covered"] += covered

        added = (worth & ~shown & has_room).nonzero()[:, 0]
        added = added[place[added].argsort()][: max(capacity - live, 0)]
        end = live + len(added)
        points[live:end], frame_ids[live:end], votes[live:end] = new[added], frame, 0
        store_rows(features, scales, slice(live, end), rows[added])
        if looks is not None:
            looks[live:end] = 1
        count += len(added)
        report["written"] += len(added)
        report["refused"] += int((worth & ~shown).sum()) - len(added)

    if bounds is not None:
        block_bounds(points, count, bounds)
    report.update(zip(("masked", "unknown_depth", "out_of_range", "non_finite"), rejected.tolist(), strict=True))
    return torch.tensor(list(report.values()), device=points.device)


def cache_compact(
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    votes: Tensor | None,
    looks: Tensor | None,
    count: Tensor,
    max_tokens: int,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Definition of :func:`mirage_kernels.cache_compact`: survivors move together, in order; returns how many went."""
    live = int(count)
    alive = torch.ones(live, dtype=torch.bool, device=points.device) if votes is None else votes[:live] != DEAD
    held = alive.nonzero()[:, 0]
    excess = max(len(held) - max_tokens, 0)
    oldest = frame_ids[held].argsort(stable=True)
    survivors = held[oldest[excess:]].sort().values
    words = features.view(torch.uint8) if features.dtype == FLOAT8 else features  # which PyTorch can index
    for buffer in (points, words, frame_ids, votes, looks, scales):
        if buffer is not None:
            buffer[: len(survivors)] = buffer[survivors]
    count.fill_(len(survivors))
    if bounds is not None:
        block_bounds(points, count, bounds)
    return torch.tensor(excess, device=points.device)


def block_bounds(points: Tensor, num_points: Tensor | None, bounds: Tensor) -> None:
    """Definition of :func:`mirage_kernels.block_bounds`: writes bounds (:func:`bounds_rows` of N, 6).

    A point with a coordinate that is not finite does not count: no camera sees it. -0 becomes 0.
    """
    if num_points is not None:
        live = torch.arange(points.shape[0], device=points.device) < num_points
        points = torch.where(live[:, None], points, torch.nan)
    boxes = _block_boxes(points)
    bounds[: len(boxes)] = boxes
    bounds[len(boxes) :] = _boxes_around(boxes, TILE)


def _block_boxes(points: Tensor) -> Tensor:
    counts = torch.isfinite(points[:, :3]).all(-1, keepdim=True)
    sides = [torch.where(counts, points[:, :3], empty) + 0.0 for empty in (torch.inf, -torch.inf)]
    return _boxes_around(torch.cat(sides, 1), BLOCK)


def _boxes_around(boxes: Tensor, number: int) -> Tensor:
    """(ceil(B / number), 6) of (B, 6): what every so many boxes lie in."""
    rows = -(-len(boxes) // number)
    padding = (0, 0, 0, rows * number - len(boxes))
    low = torch.nn.functional.pad(boxes[:, :3], padding, value=torch.inf).view(rows, number, 3)
    high = torch.nn.functional.pad(boxes[:, 3:], padding, value=-torch.inf).view(rows, number, 3)
    return torch.cat([low.amin(1), high.amax(1)], 1)


def bounds_rows(points: int) -> int:
    """Rows of the bounds of so many points: B = ceil(N / BLOCK) boxes of blocks, then ceil(B / TILE) of tiles."""
    blocks = -(-points // BLOCK)
    return blocks + -(-blocks // TILE)


def voxel_keys(points: Tensor, voxel_size: float) -> Tensor:
    """(N,) int64: floor(coordinate / voxel_size) per axis, 21 bits each; what lies outside shares the border voxels."""
    size = torch.tensor(voxel_size, dtype=points.dtype, device=points.device)
    scaled = (points[:, :3] / size).nan_to_num(nan=-VOXEL_LIMIT).clamp(-VOXEL_LIMIT, VOXEL_LIMIT - 1)
    x, y, z = (scaled.floor().long() + VOXEL_LIMIT).unbind(-1)
    return (x << 42) | (y << 21) | z


def view_overlap(
    points: Tensor,
    num_points: Tensor | None,
    intrinsics: Tensor,
    cam2world: Tensor,
    target_intrinsics: Tensor,
    target_cam2world: Tensor,
    size: tuple[int, int],
    voxel_size: float,
    near: float,
) -> Tensor:
    """Definition of :func:`mirage_kernels.view_overlap`: (V, 2) int64, voxels seen by both and by either.

    A voxel is seen by a view when a point in it projects into the view's grid; the targets count as one view.
    """
    number = torch.arange(points.shape[0], device=points.device)
    live = torch.ones_like(number, dtype=torch.bool) if num_points is None else number < num_points
    keys, order = voxel_keys(points, voxel_size).sort(stable=True)
    new = torch.ones_like(keys)
    new[1:] = (keys[1:] != keys[:-1]).long()
    voxel = torch.empty_like(keys)
    voxel[order] = new.cumsum(0) - 1

    def seen(projection: Tensor) -> Tensor:
        visible = live & in_view(*project_points(points, projection), size, near)
        return torch.zeros_like(live).scatter_reduce(0, voxel, visible, "amax")

    target = torch.zeros_like(live)
    for projection in make_projection(target_intrinsics, target_cam2world, points.dtype):
        target = target | seen(projection)
    counts = []
    for projection in make_projection(intrinsics, cam2world, points.dtype):
        view = seen(projection)
        counts.append(torch.stack([(view & target).sum(), (view | target).sum()]))
    return torch.stack(counts) if counts else keys.new_empty((0, 2))

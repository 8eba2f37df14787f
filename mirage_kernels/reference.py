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
REPORT_FIELDS = ("written", "refused", "masked", "unknown_depth", "out_of_range", "non_finite")


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Definition of :func:`mirage_kernels.splat`: latents, mask, depth, index.

    Per view: the smallest z in each cell, then the lowest index among the points that have it. Differentiable to
    ``features``.
    """
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Definition of :func:`mirage_kernels.splat_aligned`: latents, mask, depth, index.

    Which tokens a cell blends is decided without gradients. Given them, the read-out is a differentiable function of
    features and points, written as such below: the gradients are what follows from it.
    """
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
) -> Tensor:
    """Definition of :func:`mirage_kernels.cache_write`: appends in token order, returns the six report counts."""
    size = (latents.shape[2], latents.shape[3])
    z, known = _token_depth(depth, size, depth_sampling)
    lifted = _lift(depth, z, intrinsics, cam2world)
    static = torch.ones_like(known) if mask is None else pool_mask(mask, size)
    in_range = (z >= min_depth) & (z <= max_depth)
    # As they will be stored: a float32 latent can be too large for float16.
    finite = torch.isfinite(lifted).all(-1) & torch.isfinite(latents.to(features.dtype)).all(1)
    keep = static & known & in_range & finite

    start, capacity = int(count), points.shape[0]
    rows = latents.permute(0, 2, 3, 1)[keep]
    # A count from outside may be anything: nothing is written past the buffers, or before them.
    fits = min(rows.shape[0], max(capacity - start, 0) if start >= 0 else 0)
    frames = torch.arange(first_frame, first_frame + latents.shape[0], device=keep.device)[:, None, None]
    if fits > 0:
        points[start : start + fits] = lifted[keep][:fits].to(points.dtype)
        features[start : start + fits] = rows[:fits].to(features.dtype)
        frame_ids[start : start + fits] = frames.expand_as(keep)[keep][:fits].to(frame_ids.dtype)
    count += fits
    if bounds is not None and fits > 0:
        first, end = start // BLOCK, start + fits
        block_bounds(points[first * BLOCK : end], None, bounds[first : (end - 1) // BLOCK + 1])
    return torch.stack(
        [
            torch.tensor(fits, device=keep.device),
            torch.tensor(rows.shape[0] - fits, device=keep.device),
            (~static).sum(),
            (static & ~known).sum(),
            (static & known & ~in_range).sum(),
            (static & known & in_range & ~finite).sum(),
        ]
    )


def block_bounds(points: Tensor, num_points: Tensor | None, bounds: Tensor) -> None:
    """Definition of :func:`mirage_kernels.block_bounds`: writes bounds (ceil(N / BLOCK), 6).

    A point with a coordinate that is not finite does not count: no camera sees it. -0 becomes 0.
    """
    count = points.shape[0]
    number = torch.arange(count, device=points.device)
    live = torch.ones_like(number, dtype=torch.bool) if num_points is None else number < num_points
    counts = (live & torch.isfinite(points[:, :3]).all(-1))[:, None]
    for side, reduce, empty in ((slice(0, 3), "amin", torch.inf), (slice(3, 6), "amax", -torch.inf)):
        bounds[:, side] = empty
        block = (number // BLOCK)[:, None].expand(count, 3)
        bounds[:, side].scatter_reduce_(0, block, torch.where(counts, points[:, :3], empty) + 0.0, reduce)


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

"""The definition of `splat_aligned`, in plain PyTorch.

Bounds change no result, and are not used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...constants import BLEND_TOKENS, DEPTH_TOLERANCE, HOLE_REACH_CELLS, TOKEN_REACH
from ...geometry import make_projection
from ...quantization import dequantize_rows
from ..common.alignment_score import align_tokens, cell_distance, writing_centers


def _best_tokens(
    points: Tensor,
    writers: Tensor,
    projection: Tensor,
    focal: Tensor,
    reader: Tensor,
    size: tuple[int, int],
    near: float,
) -> Tensor:
    """Find the tokens that each cell of one view blends, (h w, BLEND_TOKENS) int64: best first, -1 past the last."""
    height, width = size
    cells = height * width
    u, v, z, radius, score_bias = align_tokens(points, writers, projection, focal, reader)
    around = (
        (u > -HOLE_REACH_CELLS)
        & (u < width + HOLE_REACH_CELLS)
        & (v > -HOLE_REACH_CELLS)
        & (v < height + HOLE_REACH_CELLS)
    )
    token = ((z > near) & (z <= torch.finfo(z.dtype).max) & around).nonzero()[:, 0]
    u, v, z, radius, score_bias = (value[token] for value in (u, v, z, radius, score_bias))

    # Every pair of a token and a cell whose centre is within the token's radius.
    offsets = range(-HOLE_REACH_CELLS, HOLE_REACH_CELLS + 1)
    found = []
    for row, column in ((v.floor().long() + i, u.floor().long() + j) for i in offsets for j in offsets):
        distance = cell_distance(u, v, column, row)
        meet = (distance <= radius * radius) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        which = meet.nonzero()[:, 0]
        found.append((which, (row * width + column)[which], distance[which]))
    which, cell, distance = (torch.cat(parts) for parts in zip(*found, strict=True))
    token, z, score = token[which], z[which], distance + score_bias[which]

    def nearest(chosen: Tensor) -> Tensor:
        return z.new_full((cells,), torch.inf).scatter_reduce(0, cell[chosen], z[chosen], "amin")

    # Tokens count as one cell large where they reach; as large as they are only in the holes that leaves.
    narrow = distance <= TOKEN_REACH * TOKEN_REACH
    surface = nearest(narrow)
    hole = surface == torch.inf
    surface = torch.where(hole, nearest(~narrow), surface)
    keep = (narrow | hole[cell]) & (z <= DEPTH_TOLERANCE * surface[cell])
    cell, token, score = cell[keep], token[keep], score[keep]

    # In order of cell, then score, then index.
    order = token.argsort(stable=True)
    order = order[score[order].argsort(stable=True)]
    order = order[cell[order].argsort(stable=True)]
    cell, token = cell[order], token[order]
    rank = torch.arange(len(cell), device=cell.device) - torch.searchsorted(cell, cell)
    first = rank < BLEND_TOKENS
    best = token.new_full((cells * BLEND_TOKENS,), -1)
    best[cell[first] * BLEND_TOKENS + rank[first]] = token[first]
    return best.view(cells, BLEND_TOKENS)


def blend_weights(scores: Tensor, held: Tensor, sharpness: float) -> Tensor:
    """Turn scores (.., BLEND_TOKENS), least first, into weights that sum to 1; 0 where not ``held``.

    A weight is in proportion to (1 - x / 8)^8 with x = sharpness (score - least): that is e^-x up to a few hundredths,
    by multiplications alone, and 0 from x = 8 on, so that what is aligned far worse need not be read.
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
    raw = fourth * fourth
    total = raw[..., 0]
    for k in range(1, BLEND_TOKENS):
        total = total + raw[..., k]
    return raw / torch.where(total > 0, total, 1.0)[..., None]


class _GatherRows(torch.autograd.Function):
    """Gather rows[index]; the backward sums duplicates in order of position, where PyTorch's own has no order."""

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
        rank = torch.arange(len(target), device=index.device) - torch.searchsorted(target, target)
        for repeat in range(int(rank.max()) + 1 if len(rank) > 0 else 0):
            now = rank == repeat
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
    height: int,
    width: int,
    near: float,
    sharpness: float,
    dtype: torch.dtype,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read latents, mask, depth and index.

    Which tokens a cell blends is decided without gradients. Given them, the readout is a differentiable function of
    features and points, written as such below: the gradients are what follows from it.
    """
    if scales is not None:
        features = dequantize_rows(features, scales)
    views = cam2world.shape[0]
    cells = height * width
    projections = make_projection(intrinsics, cam2world, points.dtype)
    focals, readers = intrinsics[:, 0, 0].to(points.dtype), cam2world[:, :3, 3].to(points.dtype)
    writers = writing_centers(frame_ids, frame_centers, points.dtype)
    live = points.shape[0] if num_points is None else max(0, min(int(num_points), points.shape[0]))
    index = torch.empty(views, cells, BLEND_TOKENS, dtype=torch.int64, device=points.device)
    with torch.no_grad():
        for t in range(views):
            camera = projections[t], focals[t], readers[t]
            index[t] = _best_tokens(points[:live], writers[:live], *camera, (height, width), near)
    held = index >= 0

    view, cell, slot = held.nonzero(as_tuple=True)
    token = index[view, cell, slot]
    u, v, z, _, score_bias = align_tokens(
        _GatherRows.apply(points, token), writers[token], projections[view], focals[view], readers[view]
    )
    score = cell_distance(u, v, cell % width, cell // width) + score_bias
    scores = points.new_zeros(held.shape).index_put((view, cell, slot), score)
    working = torch.float64 if torch.float64 in (points.dtype, features.dtype, dtype) else torch.float32
    weights = blend_weights(scores, held, sharpness).to(working)

    # A row of zeros behind the features is what empty places read.
    padded = torch.cat([features, features.new_zeros(1, features.shape[1])])
    rows = _GatherRows.apply(padded.to(working), torch.where(held, index, features.shape[0]).flatten())
    rows = rows.view(views, cells, BLEND_TOKENS, features.shape[1])
    latents = weights[..., 0, None] * rows[..., 0, :]
    for k in range(1, BLEND_TOKENS):
        weight = weights[..., k, None]
        row = torch.where(weight > 0, rows[..., k, :], 0.0)  # what has no weight does not count, NaN or not
        latents = torch.where(weight > 0, latents + weight * row, latents)
    latents = latents.to(dtype).transpose(1, 2).reshape(views, features.shape[1], height, width).contiguous()

    depth = torch.zeros(held.shape, dtype=points.dtype, device=points.device).index_put((view, cell, slot), z.detach())
    shape = (views, height, width)
    mask, best = held[..., 0].reshape(shape).contiguous(), index[..., 0].reshape(shape).contiguous()
    return latents, mask, depth[..., 0].reshape(shape).contiguous(), best

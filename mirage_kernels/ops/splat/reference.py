"""The definition of `splat`, in plain PyTorch.

Bounds change no result, and are not used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...geometry import in_view, make_projection, project_points
from ...quantization import dequantize_rows


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
    """Read latents, mask, depth and index.

    Per view: the smallest z in each cell, then the lowest index among the points that have it. Differentiable to
    ``features``.
    """
    if scales is not None:
        features = dequantize_rows(features, scales)
    cells, count = height * width, points.shape[0]
    number = torch.arange(count, device=points.device)
    live = torch.ones_like(number, dtype=torch.bool) if num_points is None else number < num_points
    projections = make_projection(intrinsics, cam2world, points.dtype)
    depths, indices = [], []
    for projection in projections:
        u, v, z = project_points(points, projection)
        visible = live & in_view(u, v, z, (height, width), near)
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
    latents = _GatherWinners.apply(features, index, dtype)
    return latents, mask, torch.where(mask, depth, 0.0), index


class _GatherWinners(torch.autograd.Function):
    """Gather the winners' features; the backward is its own, as PyTorch's sums duplicates in any order."""

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
    """Return the gradient to features (num_points, C): the sum over the cells each token won, view by view.

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

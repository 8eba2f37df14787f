"""Boxes of blocks of tokens, and of tiles of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ...constants import BLOCK_TOKENS, TILE_BLOCKS


def write_bounds(points: Tensor, num_points: Tensor | None, bounds: Tensor) -> None:
    """Write the bounds (:func:`~mirage_kernels.geometry.bounds_rows` of N, 6) of the live points, in place.

    A point with a coordinate that is not finite does not count: no camera sees it. -0 becomes 0.
    """
    if num_points is not None:
        live = torch.arange(points.shape[0], device=points.device) < num_points
        points = torch.where(live[:, None], points, torch.nan)
    boxes = block_boxes(points)
    bounds[: len(boxes)] = boxes
    bounds[len(boxes) :] = boxes_around(boxes, TILE_BLOCKS)


def block_boxes(points: Tensor) -> Tensor:
    """Return the boxes of blocks of points (N, >= 3), (B, 6): least x, y, z, greatest x, y, z."""
    counts = torch.isfinite(points[:, :3]).all(-1, keepdim=True)
    sides = [torch.where(counts, points[:, :3], empty) + 0.0 for empty in (torch.inf, -torch.inf)]
    return boxes_around(torch.cat(sides, 1), BLOCK_TOKENS)


def boxes_around(boxes: Tensor, number: int) -> Tensor:
    """Return the boxes around every so many boxes (B, 6): (ceil(B / number), 6)."""
    rows = -(-len(boxes) // number)
    padding = (0, 0, 0, rows * number - len(boxes))
    low = torch.nn.functional.pad(boxes[:, :3], padding, value=torch.inf).view(rows, number, 3)
    high = torch.nn.functional.pad(boxes[:, 3:], padding, value=-torch.inf).view(rows, number, 3)
    return torch.cat([low.amin(1), high.amax(1)], 1)

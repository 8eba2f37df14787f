"""How well tokens are aligned with the cells of a view: position, scale and viewing ray."""

from __future__ import annotations

import torch
from torch import Tensor

from ...constants import DIRECTION_WEIGHT, MAX_FOOTPRINT_CELLS, MAX_FOOTPRINT_RATIO, TOKEN_REACH


def align_tokens(
    points: Tensor, writers: Tensor, projection: Tensor, focal: Tensor, reader: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Align tokens (M, 4), written by cameras at ``writers`` (M, 3), with a view: one for all, or one each.

    Returns:
        Columns u, rows v and depths z; the radius, in cells, within which a token may close a hole; and its score bias,
        the same in any cell: (ratio - 1)^2 / ratio, which is ln^2 ratio near 1, of ratio = footprint / cell size, plus
        the direction penalty of the angle between the rays. (M,) each. Without a footprint the ratio is the least there
        is, without a writing camera the direction penalty is 0.
    """
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    a, b, depth = (
        ((projection[..., i, 0] * x + projection[..., i, 1] * y) + projection[..., i, 2] * z) + projection[..., i, 3]
        for i in range(3)
    )
    inverse = 1.0 / depth

    ratio = (points[:, 3] * focal) * inverse
    least, most = torch.full_like(ratio, 1 / MAX_FOOTPRINT_RATIO), torch.full_like(ratio, MAX_FOOTPRINT_RATIO)
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
    direction_penalty = 1.0 - dot(written, read) / norm
    direction_penalty = torch.where(direction_penalty > 0, direction_penalty, 0.0)
    return (
        a * inverse,
        b * inverse,
        depth,
        TOKEN_REACH * ratio.clamp(1.0, MAX_FOOTPRINT_CELLS),
        scale + DIRECTION_WEIGHT * direction_penalty,
    )


def cell_distance(u: Tensor, v: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """Return squared distances, in cells, from projections to the centres of cells."""
    dx, dy = u - (column.to(u.dtype) + 0.5), v - (row.to(v.dtype) + 0.5)
    return dx * dx + dy * dy


def writing_centers(frame_ids: Tensor, frame_centers: Tensor, dtype: torch.dtype) -> Tensor:
    """Look up the centre of each token's writing camera, (N, 3): NaN for a frame that the table lacks."""
    frames = frame_centers.shape[0]
    known = (frame_ids >= 0) & (frame_ids < frames)
    table = torch.cat([frame_centers, frame_centers.new_full((1, 3), torch.nan)]).to(dtype)
    return table[torch.where(known, frame_ids.long(), frames)]

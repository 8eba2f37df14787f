"""The definition of `back_project`, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...geometry import lift_depth, pool_mask, sample_depth


def back_project(
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    mask: Tensor | None,
    height: int,
    width: int,
    bilinear: bool,
) -> tuple[Tensor, Tensor]:
    """Lift depth to points (T, h, w, 4), 0 if not valid, and ``valid`` (T, h, w)."""
    z, valid = sample_depth(depth, (height, width), bilinear)
    points = lift_depth(depth, z, intrinsics, cam2world)
    valid = valid & torch.isfinite(points).all(-1)
    if mask is not None:
        valid = valid & pool_mask(mask, (height, width))
    return torch.where(valid[..., None], points, 0.0), valid

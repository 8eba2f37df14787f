"""`back_project` in two launches, see :mod:`..common.triton.lift`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.triton.lift import lift_tokens
from ..operator import implements


@implements("back_project")
def back_project(
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    mask: Tensor | None,
    height: int,
    width: int,
    bilinear: bool,
) -> tuple[Tensor, Tensor]:
    valid = depth.new_empty((depth.shape[0], height, width), dtype=torch.bool)
    points = lift_tokens(depth, intrinsics, cam2world, mask, height, width, bilinear, 0.0, float("inf"), valid)
    return points, valid

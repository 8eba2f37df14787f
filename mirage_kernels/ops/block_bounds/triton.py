"""`block_bounds`, see :mod:`..common.triton.block_boxes`."""

from __future__ import annotations

from torch import Tensor

from ..common.triton.block_boxes import update_bounds
from ..operator import implements


@implements("block_bounds")
def block_bounds(points: Tensor, num_points: Tensor | None, bounds: Tensor) -> None:
    update_bounds(points.contiguous(), num_points, None, bounds)

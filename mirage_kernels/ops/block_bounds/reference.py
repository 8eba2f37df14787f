"""The definition of `block_bounds`, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..common.block_boxes import write_bounds


def block_bounds(points: Tensor, num_points: Tensor | None, bounds: Tensor) -> None:
    """Write the boxes of blocks and tiles of the live points, in place."""
    write_bounds(points, num_points, bounds)

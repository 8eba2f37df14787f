"""`block_bounds`: the boxes by which reads pass over what no camera sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...geometry import bounds_rows
from ..checks import check_bounds, check_points, describe, plain
from ..operator import Operator
from . import reference


def _fake(**_: Any) -> None:
    return None


launch = Operator(
    "block_bounds",
    "(Tensor points, Tensor? num_points, Tensor(a!) bounds) -> ()",
    fake=_fake,
    reference=reference.block_bounds,
    device="points",
).launch


def block_bounds(points: Tensor, *, num_points: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Compute the boxes of blocks of 256 consecutive points, and of 64 such blocks.

    By them reads pass over what no camera sees. Least x, y, z and greatest x, y, z over the live points of each block
    whose coordinates are finite (no camera sees the others); a block without any has +inf and -inf. Exact, and the same
    bits on every backend, with 0 for -0. With B = ceil(N / 256) blocks, row b < B is the box of points 256 b to
    256 b + 255, row B + k that of blocks 64 k to 64 k + 63.

    Args:
        points: (N, 4) float32: x, y, z, footprint.
        num_points: one int64 on the device of ``points``, read there: only so many first rows are live.
        out: (B + ceil(B / 64), 6) float32, written in place; None makes a new one.

    Returns:
        (B + ceil(B / 64), 6) float32, ``out`` where there is one. No part of a graph.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; nothing has been written then.
    """
    points = plain(check_points(points, num_points, differentiable=True))  # or not: boxes are no part of a graph
    if points.dtype != torch.float32:
        raise TypeError(f"points must be (N, 4) float32: x, y, z, footprint, got {describe(points)}")
    if out is None:
        out = points.new_empty((bounds_rows(points.shape[0]), 6))
    check_bounds(out, points, "out", in_place=True)
    launch(points=points, num_points=num_points, bounds=plain(out))
    return out

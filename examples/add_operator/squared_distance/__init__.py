"""`squared_distance`: squared distances of tokens to a camera centre, the example of docs/adding-an-operator.md."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mirage_kernels.ops.checks import check_points, require, require_tensor
from mirage_kernels.ops.operator import Operator

from . import reference


def _fake(*, points: Tensor, **_: Any) -> Tensor:
    return points.new_empty(points.shape[0])


launch = Operator(
    "squared_distance",
    "(Tensor points, Tensor center, Tensor? num_points) -> Tensor",
    fake=_fake,
    reference=reference.squared_distance,
    device="points",
    precision=("points",),
).launch


def squared_distance(points: Tensor, center: Tensor, *, num_points: Tensor | None = None) -> Tensor:
    """Compute the squared distance of each token to a camera centre.

    Args:
        points: (N, 4) float32: x, y, z, footprint in world units (float64 is computed by the definition).
        center: (3,) of the dtype and on the device of ``points``, in world units.
        num_points: one int64 on the device of ``points``, read there: only so many first rows are live.

    Returns:
        (N,) squared world units, ((x - cx)^2 + (y - cy)^2) + (z - cz)^2; 0 for rows that are not live. Not
        differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    points = check_points(points, num_points)
    expected = "(3,) like points"
    require_tensor("center", center, expected)
    require(center.shape == (3,) and center.dtype == points.dtype, "center", expected, center)
    require(center.device == points.device, "center", expected, center)
    return launch(points=points, center=center.detach(), num_points=num_points)

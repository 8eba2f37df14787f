"""The definition of `squared_distance`, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def squared_distance(points: Tensor, center: Tensor, num_points: Tensor | None) -> Tensor:
    """Compute (N,) squared distances, one rounded operation at a time, in the order that the kernels use."""
    live = points.shape[0] if num_points is None else max(0, min(int(num_points), points.shape[0]))
    distances = points.new_zeros(points.shape[0])
    dx, dy, dz = (points[:live, axis] - center[axis] for axis in range(3))
    distances[:live] = (dx * dx + dy * dy) + dz * dz
    return distances

"""`view_overlap`: how much of what some views see other views see too."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...constants import NEAR
from ...geometry import check_size
from ..checks import check_bounds, check_cameras, check_near, check_points
from ..operator import Operator
from . import reference


def _fake(*, points: Tensor, cam2world: Tensor, **_: Any) -> Tensor:
    return points.new_empty((cam2world.shape[0], 2), dtype=torch.int64)


def _iou(counts: Tensor) -> Tensor:
    return (counts[:, 0].double() / counts[:, 1].clamp(min=1).double()).float()


launch = Operator(
    "view_overlap",
    (
        "(Tensor points, Tensor? num_points, Tensor intrinsics, Tensor cam2world, Tensor target_intrinsics,"
        " Tensor target_cam2world, SymInt height, SymInt width, float voxel_size, float near, Tensor? bounds=None)"
        " -> Tensor"
    ),
    fake=_fake,
    reference=reference.view_overlap,
    device="points",
    precision=("points",),
    result=_iou,
).launch


def view_overlap(
    points: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    target_intrinsics: Tensor,
    target_cam2world: Tensor,
    size: tuple[int, int],
    *,
    num_points: Tensor | None = None,
    bounds: Tensor | None = None,
    voxel_size: float = 0.1,
    near: float = NEAR,
) -> Tensor:
    """Measure how much of what the target views see each earlier view sees too: IoU of voxel sets.

    A view's set holds the voxels floor(p / voxel_size) of the points that project into its grid in front of ``near``,
    occluded or not; the targets' set is the union over all target views (the published code's way of choosing reference
    frames, with voxels of 0.1). Computed on the device of ``points``, for all views at once, exactly.

    Args:
        points: (N, 4) float32 (float64 by the definition).
        intrinsics, cam2world: (V, 3, 3) and (V, 4, 4) float, the earlier views, in cells of the grid.
        target_intrinsics, target_cam2world: (T, 3, 3) and (T, 4, 4) float, likewise.
        size: (h, w) of the grid.
        num_points: one int64 on the device: only the first ``num_points`` rows are live.
        bounds: (B + ceil(B / 64), 6) float32, as for :func:`splat`: spares work, changes no result.
        voxel_size: edge in world units. Coordinates past 2^20 voxels from the origin share the border voxels.
        near: least depth, in world units.

    Returns:
        (V,) float32 in [0, 1]; 0 where neither sees anything.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    height, width = check_size(size)
    points = check_points(points, num_points)
    bounds = check_bounds(bounds, points)
    intrinsics, cam2world = check_cameras(intrinsics, cam2world, points.device, "points")
    target_intrinsics, target_cam2world = check_cameras(
        target_intrinsics, target_cam2world, points.device, "points", "target_"
    )
    near = check_near(near)
    if not 0 < voxel_size < math.inf:
        raise ValueError(f"voxel_size must be a finite length > 0 in world units, got {voxel_size!r}")
    return launch(
        points=points,
        num_points=num_points,
        intrinsics=intrinsics,
        cam2world=cam2world,
        target_intrinsics=target_intrinsics,
        target_cam2world=target_cam2world,
        height=height,
        width=width,
        voxel_size=voxel_size,
        near=near,
        bounds=bounds,
    )

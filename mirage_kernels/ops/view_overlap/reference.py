"""The definition of `view_overlap`, in plain PyTorch.

Bounds change no result, and are not used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...geometry import in_view, make_projection, project_points, voxel_keys


def view_overlap(
    points: Tensor,
    num_points: Tensor | None,
    intrinsics: Tensor,
    cam2world: Tensor,
    target_intrinsics: Tensor,
    target_cam2world: Tensor,
    height: int,
    width: int,
    voxel_size: float,
    near: float,
    bounds: Tensor | None = None,
) -> Tensor:
    """Count the voxels seen by both and by either, (V, 2) int64.

    A voxel is seen by a view when a point in it projects into the view's grid; the targets count as one view.
    """
    number = torch.arange(points.shape[0], device=points.device)
    live = torch.ones_like(number, dtype=torch.bool) if num_points is None else number < num_points
    keys, order = voxel_keys(points, voxel_size).sort(stable=True)
    new = torch.ones_like(keys)
    new[1:] = (keys[1:] != keys[:-1]).long()
    voxel = torch.empty_like(keys)
    voxel[order] = new.cumsum(0) - 1

    def seen(projection: Tensor) -> Tensor:
        visible = live & in_view(*project_points(points, projection), (height, width), near)
        return torch.zeros_like(live).scatter_reduce(0, voxel, visible, "amax")

    target = torch.zeros_like(live)
    for projection in make_projection(target_intrinsics, target_cam2world, points.dtype):
        target = target | seen(projection)
    counts = []
    for projection in make_projection(intrinsics, cam2world, points.dtype):
        view = seen(projection)
        counts.append(torch.stack([(view & target).sum(), (view | target).sum()]))
    return torch.stack(counts) if counts else keys.new_empty((0, 2))

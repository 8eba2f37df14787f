"""A furnished room with exact depth, ray-cast: axis-aligned boxes, seen from inside; y is down."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_kernels import Cameras

SIZE = (176, 320)
ROOM = ((-3.0, -1.5, -3.0), (3.0, 1.5, 3.0))
# A table, a cabinet at the wall, and a pillar: lower and upper corner.
FURNITURE = [
    ((-0.6, 0.5, 0.2), (0.8, 1.5, 1.2)),
    ((1.8, -0.8, 2.2), (2.8, 1.5, 3.0)),
    ((-2.0, -1.5, 1.4), (-1.6, 1.5, 1.8)),
]


def look_at(eye: tuple[float, float, float], target: tuple[float, float, float]) -> Tensor:
    position, forward = (torch.tensor(value, dtype=torch.float64) for value in (eye, target))
    forward = F.normalize(forward - position, dim=0)
    right = F.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), forward), dim=0)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3] = torch.stack([right, torch.linalg.cross(forward, right), forward, position], dim=1)
    return pose


def path(start: float, views: int, step: float = 0.15, target: tuple[float, float, float] = (0.0, 0.2, 2.0)) -> Cameras:
    """Cameras that walk along x and look at the furniture."""
    intrinsics = torch.tensor([[200.0, 0, SIZE[1] / 2], [0, 200.0, SIZE[0] / 2], [0, 0, 1]], dtype=torch.float64)
    return Cameras(
        intrinsics, torch.stack([look_at((start + step * k, 0.0, -2.2), target) for k in range(views)]), SIZE
    )


def rays(cameras: Cameras) -> Tensor:
    """(T, H, W, 3): through the pixel centres, with z = 1 in the camera."""
    height, width = cameras.image_size
    columns, rows = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
    k = cameras.intrinsics[0]
    x, y = (columns - k[0, 2]) / k[0, 0], (rows - k[1, 2]) / k[1, 1]
    directions = torch.stack(torch.broadcast_tensors(x, y, torch.ones(1, 1, dtype=torch.float64)), -1)
    return torch.einsum("tij,hwj->thwi", cameras.cam2world[:, :3, :3], directions)


def cast(cameras: Cameras, boxes: Any) -> tuple[Tensor, Tensor]:
    """z at which rays enter and leave boxes (2, 3), or one box a view (T, 2, 3): (T, H, W) each, the slab method."""
    corners = torch.as_tensor(boxes, dtype=torch.float64).expand(len(cameras), 2, 3)
    origins, directions = cameras.centers[:, None, None], rays(cameras)
    low, high = ((corners[:, i, None, None] - origins) / directions for i in (0, 1))
    return torch.minimum(low, high).amax(-1), torch.maximum(low, high).amin(-1)


def render(cameras: Cameras, moving: Tensor | None = None, furniture: Any = FURNITURE) -> tuple[Tensor, Tensor]:
    """Depth (T, H, W) of the furnished room and which pixels show the moving box (T, 2, 3)."""
    depth = cast(cameras, ROOM)[1]
    for box in furniture:
        enter, leave = cast(cameras, box)
        depth = torch.where((enter < leave) & (enter > 0), torch.minimum(depth, enter), depth)
    shows = torch.zeros_like(depth, dtype=torch.bool)
    if moving is not None:
        enter, leave = cast(cameras, moving)
        shows = (enter < leave) & (enter > 0) & (enter < depth)
        depth = torch.where(shows, enter, depth)
    return depth.float(), shows

"""The scene of the benchmarks: a camera walking through a furnished box room, exact depth, random latents, one seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GRID = (44, 80)
IMAGE_SIZE = (704, 1280)
CHANNELS = 48
TOKENS = (31_680, 285_120, 1_411_520)  # 9, 81 and 401 frames of 44x80
READ_VIEWS = 9

_ROOM = torch.tensor([[-4.0, -1.5, -3.0], [4.0, 1.5, 3.0]])
_BOXES = torch.tensor(
    [
        [[-3.5, 0.6, -2.0], [-2.0, 1.5, 1.0]],
        [[1.0, 0.3, 1.5], [2.5, 1.5, 2.6]],
        [[2.8, -0.5, -2.6], [3.8, 1.5, -1.4]],
        [[-0.6, 0.8, -0.4], [0.6, 1.5, 0.4]],
    ]
)


def camera_path(views: int, laps: float = 1.0, phase: float = 0.0) -> tuple[Tensor, Tensor]:
    """Intrinsics (T, 3, 3) for IMAGE_SIZE and cam2world (T, 4, 4), float64: an ellipse walked while looking around."""
    height, width = IMAGE_SIZE
    t = (torch.arange(views, dtype=torch.float64) + phase) / max(views, 1) * 2 * math.pi * laps
    yaw = 2.0 * t
    pose = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    pose[:, 0, 0], pose[:, 0, 2] = yaw.cos(), yaw.sin()
    pose[:, 2, 0], pose[:, 2, 2] = -yaw.sin(), yaw.cos()
    pose[:, 0, 3], pose[:, 1, 3], pose[:, 2, 3] = 1.8 * t.cos(), -0.2 + 0.2 * (3 * t).sin(), 1.2 * t.sin()
    focal = 0.7 * width
    k = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float64)
    return k.repeat(views, 1, 1), pose


def render_depth(intrinsics: Tensor, cam2world: Tensor, size: tuple[int, int]) -> Tensor:
    """Exact z depth (T, H, W) float32 of the room; intrinsics in pixels of ``size``."""
    height, width = size
    depths = []
    for k, pose in zip(intrinsics.float(), cam2world.float(), strict=True):
        x = (torch.arange(width) + 0.5 - k[0, 2]) / k[0, 0]
        y = (torch.arange(height)[:, None] + 0.5 - k[1, 2]) / k[1, 1]
        rays = torch.stack([x.expand(height, width), y.expand(height, width), torch.ones(height, width)], dim=-1)
        direction, origin = rays @ pose[:3, :3].T, pose[:3, 3]
        depth = torch.maximum((_ROOM[0] - origin) / direction, (_ROOM[1] - origin) / direction).amin(-1)
        for low, high in _BOXES:
            a, b = (low - origin) / direction, (high - origin) / direction
            enter, leave = torch.minimum(a, b).amax(-1), torch.maximum(a, b).amin(-1)
            depth = torch.where((enter > 0.05) & (enter < leave), torch.minimum(depth, enter), depth)
        depths.append(depth)
    return torch.stack(depths) if depths else torch.empty(0, height, width)


def latents(views: int, channels: int = CHANNELS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(views, channels, *GRID, generator=generator)

"""Draws from a generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mirage_kernels import Cameras


def draw_below(rng: torch.Generator, count: int) -> int:
    """Draw a whole number in [0, count), 0 for count <= 1."""
    return int(torch.randint(max(count, 1), (), generator=rng))


def happens(rng: torch.Generator, probability: float) -> bool:
    """Draw whether something of this probability happens."""
    return bool(torch.rand((), generator=rng) < probability)


def draw_patches(rng: torch.Generator, draw: Callable[..., Tensor], count: int, rows: int, columns: int) -> Tensor:
    """Draw (count, rows, columns) values by `draw`, torch.rand or torch.randn, equal in patches of 2 x 2."""
    coarse = draw(count, (rows + 1) // 2, (columns + 1) // 2, generator=rng)
    return coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :rows, :columns]


def perturb_cameras(rng: torch.Generator, cameras: Cameras, metres: float) -> Cameras:
    """Move and turn cameras at random: standard deviations of `metres`, and of a tenth of it in radians."""
    count = len(cameras)
    turn, step = torch.randn(2, count, 3, generator=rng, dtype=torch.float64) * metres
    turn = 0.1 * turn
    skew = torch.zeros(count, 3, 3, dtype=torch.float64)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        skew[:, i, j], skew[:, j, i] = -turn[:, k], turn[:, k]
    poses = cameras.cam2world.cpu().clone()
    poses[:, :3, :3] = poses[:, :3, :3] @ torch.linalg.matrix_exp(skew)
    poses[:, :3, 3] += step
    return cameras.to("cpu").with_cam2world(poses)

"""Inputs of the record: the same bits on every machine.

Only uniform random numbers and correctly rounded arithmetic (+, -, *, /, square root): sines, logarithms and normal
numbers differ in their last bit between processors and versions of numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

UNKNOWN = (0.0, -1.5, float("nan"), float("inf"), float("-inf"))


def poses(rng: np.random.Generator, views: int, turn: float = 0.08, move: float = 0.3) -> Tensor:
    """(views, 4, 4) float64 cam2world near the origin that look along z; a rotation is that of a quaternion."""
    cam2world = np.tile(np.eye(4), (views, 1, 1))
    for t in range(views):
        x, y, z = (rng.random(3) * 2 - 1) * turn
        scale = 2 / (1 + x * x + y * y + z * z)
        cam2world[t, :3, :3] += scale * np.array(
            [[-(y * y + z * z), x * y - z, x * z + y], [x * y + z, -(x * x + z * z), y * z - x], [0, 0, 0]]
        )
        cam2world[t, 2, :3] += scale * np.array([x * z - y, y * z + x, -(x * x + y * y)])
        cam2world[t, :3, 3] = (rng.random(3) * 2 - 1) * move
    return torch.from_numpy(cam2world)


def intrinsics(rng: np.random.Generator, views: int, size: tuple[int, int]) -> Tensor:
    """(views, 3, 3) float64 in cells or pixels of `size`: about a right angle wide, off-centre."""
    height, width = size
    random = rng.random((views, 4))
    matrix = np.zeros((views, 3, 3))
    matrix[:, 0, 0], matrix[:, 1, 1] = (0.5 + 0.4 * random[:, 0]) * width, (0.5 + 0.4 * random[:, 1]) * height
    matrix[:, 0, 2], matrix[:, 1, 2] = (0.4 + 0.2 * random[:, 2]) * width, (0.4 + 0.2 * random[:, 3]) * height
    matrix[:, 2, 2] = 1
    return torch.from_numpy(matrix)


def features(rng: np.random.Generator, count: int, channels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Features (count, channels), with their scales where they are float8."""
    values = torch.from_numpy((rng.random((count, channels)) * 2 - 1) * 4).float()
    if dtype != torch.float8_e4m3fn:
        return {"features": values.to(dtype)}
    scales = torch.from_numpy(rng.integers(120, 134, count)).to(torch.uint8)
    return {"features": (values * 64).to(dtype), "scales": scales}


def tokens(seed: int, count: int, channels: int, width: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Buffers as a cache holds them, and 12 camera centres, one of them NaN.

    One token in ten is behind the cameras, some are alike, some not finite; footprints are from a quarter of a cell to
    four cells large.
    """
    rng = np.random.default_rng(seed)
    points = rng.random((count, 4)) * (6, 6, 6, 0) + (-3, -3, 1, 0)
    points[rng.random(count) < 0.1, 2] *= -1
    points[:, 3] = np.abs(points[:, 2]) / (0.7 * width) * 2.0 ** rng.integers(-2, 3, count)
    if count > 40:
        points[20:30] = points[:10]
        points[30:34, :3] = [[np.nan, 0, 2], [0, np.inf, 2], [0, 0, -np.inf], [1e38, 0, 2]]
    centers = torch.from_numpy(rng.random((12, 3)) * 2 - 1).float()
    centers[5] = torch.nan
    frame_ids = torch.from_numpy(rng.integers(-1, 13, count)).int()
    held = features(rng, count, channels, dtype)
    return {"points": torch.from_numpy(points).float(), "frame_ids": frame_ids, **held}, centers


def depth_maps(rng: np.random.Generator, views: int, size: tuple[int, int], unknown: float) -> Tensor:
    """(views, H, W) float32 around 3, a fraction `unknown` of it 0, negative, NaN or infinite."""
    depth = 3 + 0.2 * rng.random((views, *size))
    holes = rng.random(depth.shape) < unknown
    depth[holes] = np.array(UNKNOWN)[rng.integers(0, len(UNKNOWN), int(holes.sum()))]
    return torch.from_numpy(depth).float()


def scene(seed: int, views: int, size: tuple[int, int], box: bool, shift: float = 0.0) -> Any:
    """Depth, intrinsics and cam2world of a wall at 3, with a box at 2 before it or not, seen from almost one place.

    What was written of the box is seen through by later views without it.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    depth = depth_maps(rng, views, size, 0.05)
    if box:
        depth[:, height // 4 : height // 2, width // 4 : width // 2] -= 1
    cam2world = poses(rng, views, turn=0.01, move=0.05)
    cam2world[:, 0, 3] += shift
    matrix = torch.tensor([[0.7 * width, 0, 0.5 * width], [0, 0.7 * width, 0.5 * height], [0, 0, 1]])
    return depth, matrix.double().expand(views, 3, 3).contiguous(), cam2world


def latents(seed: int, views: int, channels: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.random((views, channels, *size)) * 2 - 1) * 4).to(dtype)


def masks(seed: int, views: int, size: tuple[int, int]) -> Tensor:
    """(views, H, W) bool, 3 % of it moving."""
    return torch.from_numpy(np.random.default_rng(seed).random((views, *size)) >= 0.03)


def buffers(capacity: int, channels: int, dtype: torch.dtype, *more: str) -> dict[str, Tensor]:
    """Empty buffers, filled with a pattern so that a stray write shows; `more`: votes, looks."""
    made = {
        "points": torch.arange(capacity * 4, dtype=torch.float32).reshape(capacity, 4) + 0.25,
        "features": (torch.arange(capacity * channels) % 97 + 0.5).to(dtype).reshape(capacity, channels),
        "frame_ids": -torch.arange(1, capacity + 1, dtype=torch.int32),
        "count": torch.zeros(1, dtype=torch.int64),
    }
    if dtype == torch.float8_e4m3fn:
        made["scales"] = torch.full((capacity,), 99, dtype=torch.uint8)
    return made | {name: torch.full((capacity,), 7, dtype=torch.uint8) for name in more}

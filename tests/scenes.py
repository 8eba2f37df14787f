"""Random scenes for the operator tests, the same for the same seed on every machine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

UNKNOWN = (0.0, -1.5, float("nan"), float("inf"), float("-inf"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORED = (*DTYPES, torch.float8_e4m3fn)  # of features in a cache


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Choose combinations of the factors' values, such that any two values of two factors meet in one of them.

    Of two factors that is their full product. What three values do together is left to chance.
    """
    product = [*itertools.product(*(range(len(factor)) for factor in factors))]
    pairs = {row: {*itertools.combinations(enumerate(row), 2)} for row in product}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        row = max(product, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[row]
        chosen.append(tuple(factor[k] for factor, k in zip(factors, row, strict=True)))
    return chosen


def each_once(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Choose combinations in which every value of every factor has its turn: as many as the longest has values."""
    longest = max(len(factor) for factor in factors)
    return [tuple(factor[k % len(factor)] for factor in factors) for k in range(longest)]


def poses(rng: np.random.Generator, views: int, angle: float = 0.15, rigid: bool = False) -> Tensor:
    """(views, 4, 4) float64 cam2world near the origin, looking along z; rotations as far from exact as real ones."""
    cam2world = np.tile(np.eye(4), (views, 1, 1))
    for t in range(views):
        axis = rng.normal(size=3)
        axis /= np.linalg.norm(axis)
        theta = rng.uniform(-angle, angle)
        cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
        rotation = np.eye(3) + np.sin(theta) * cross + (1 - np.cos(theta)) * cross @ cross
        cam2world[t, :3, :3] = rotation + (0 if rigid else rng.uniform(-4e-4, 4e-4, (3, 3)))
        cam2world[t, :3, 3] = rng.uniform(-0.5, 0.5, 3)
    return torch.from_numpy(cam2world)


def intrinsics(rng: np.random.Generator, views: int, image_size: tuple[int, int]) -> Tensor:
    """(views, 3, 3) float64 in pixels of ``image_size``: a field of view of about a right angle, off-centre."""
    height, width = image_size
    matrix = np.zeros((views, 3, 3))
    matrix[:, 0, 0] = rng.uniform(0.5, 0.9, views) * width
    matrix[:, 1, 1] = rng.uniform(0.5, 0.9, views) * height
    matrix[:, 0, 2] = rng.uniform(0.4, 0.6, views) * width
    matrix[:, 1, 2] = rng.uniform(0.4, 0.6, views) * height
    matrix[:, 2, 2] = 1
    return torch.from_numpy(matrix)


def cloud(
    rng: np.random.Generator, count: int, channels: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Points (count, 4) float32, one in ten behind the cameras, and features (count, channels), none zero."""
    points = rng.uniform((-3, -3, 1.0, 0.01), (3, 3, 7, 0.1), (count, 4))
    behind = rng.random(count) < 0.1
    points[behind, 2] *= -1
    features = rng.uniform(0.5, 2, (count, channels)) * rng.choice((-1, 1), (count, channels))
    return torch.from_numpy(points).float(), torch.from_numpy(features).to(dtype)


def written_cloud(
    rng: np.random.Generator, count: int, channels: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A :func:`cloud` as a cache holds it, for grids of ``width`` columns: with frame_ids and frame_centers.

    Footprints are from a fifth of a cell to five cells large; some frames are not in the table, one centre is NaN.
    """
    points, features = cloud(rng, count, channels, dtype)
    cells = np.exp(rng.uniform(np.log(0.2), np.log(5), count))
    points[:, 3] = points[:, 2].abs() / (0.7 * width) * torch.from_numpy(cells).float()
    frame_ids = torch.from_numpy(rng.integers(-1, 13, count)).int()
    centers = torch.from_numpy(rng.normal(size=(12, 3))).float()
    centers[5] = torch.nan
    return points, features, frame_ids, centers


def depth_maps(
    rng: np.random.Generator, views: int, image_size: tuple[int, int], unknown: float = 0.2, noise: float = 0.5
) -> Tensor:
    """(views, H, W) float32, a fraction ``unknown`` of it 0, negative, NaN or infinite."""
    depth = rng.uniform(2, 2 + noise, (views, *image_size))
    holes = rng.random(depth.shape) < unknown
    depth[holes] = rng.choice(UNKNOWN, int(holes.sum()))
    return torch.from_numpy(depth).float()


def static_masks(rng: np.random.Generator, views: int, image_size: tuple[int, int], moving: float = 0.02) -> Tensor:
    """(views, H, W) bool, a fraction ``moving`` of it False."""
    return torch.from_numpy(rng.random((views, *image_size)) >= moving)


def strided(tensor: Tensor) -> Tensor:
    """The same values as a view that is contiguous in no dimension longer than one."""
    wide = torch.zeros([2 * side + 1 for side in tensor.shape], dtype=tensor.dtype, device=tensor.device)
    view = wide[tuple(slice(1, 2 * side + 1, 2) for side in tensor.shape)]
    view.copy_(tensor)
    assert view.numel() < 2 or not view.is_contiguous()
    return view


def buffers(
    capacity: int, channels: int, dtype: torch.dtype = torch.float32, held: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(points, features, frame_ids, count) for ``cache_write``, filled with a pattern so that a stray write shows."""
    points = torch.arange(capacity * 4, dtype=torch.float32).reshape(capacity, 4) + 0.25
    features = (torch.arange(capacity * channels) % 97 + 0.5).to(dtype).reshape(capacity, channels)
    frame_ids = -torch.arange(1, capacity + 1, dtype=torch.int32)
    return points, features, frame_ids, torch.tensor([held])

"""Rotations and poses in float64, from angles in degrees; OpenCV axes (x right, y down, z forward)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pose(rotation: Tensor, centre: Sequence[float]) -> Tensor:
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = rotation
    pose[:3, 3] = torch.tensor(centre, dtype=torch.float64)
    return pose


def yaw(degrees: float) -> Tensor:
    """Turn right, about y."""
    sine, cosine = sine_cosine(degrees)
    return torch.tensor([[cosine, 0.0, sine], [0.0, 1.0, 0.0], [-sine, 0.0, cosine]], dtype=torch.float64)


def pitch(degrees: float) -> Tensor:
    """Tilt up, about x."""
    sine, cosine = sine_cosine(degrees)
    return torch.tensor([[1.0, 0.0, 0.0], [0.0, cosine, -sine], [0.0, sine, cosine]], dtype=torch.float64)


def facing(x: float, y: float, z: float) -> Tensor:
    """Look along (x, y, z), z > 0, with the x axis kept level."""
    length, level = math.hypot(x, y, z), math.hypot(x, z)
    forward, right = (x / length, y / length, z / length), (z / level, 0.0, -x / level)
    # down = forward x right
    down = (
        forward[1] * right[2],
        forward[2] * right[0] - forward[0] * right[2],
        -forward[1] * right[0],
    )
    return torch.tensor([right, down, forward], dtype=torch.float64).T


def sine_cosine(degrees: float) -> tuple[float, float]:
    """Compute sine and cosine; the reduction in degrees is exact, so that multiples of 360 give 0 and 1."""
    angle = math.radians(math.remainder(degrees, 360.0))
    return math.sin(angle), math.cos(angle)

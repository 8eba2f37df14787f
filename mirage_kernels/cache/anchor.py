"""`Anchor`: the least depth and the origin of a scene, settled by the first write that knows a depth.

Nothing else in a cache depends on the unit that depth and poses come in, nor on where their world begins: a scene in
millimetres, or in the metres of a map, is held and read as one in metres at the origin is. A unit or an offset that is
a power of two changes no bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..constants import NEAR, NEAR_FRACTION

_ZERO = (0.0, 0.0, 0.0)
_FAR = 64.0  # depths from the origin: up to here float32 holds a position to 4e-6 of the depth, and all counts from 0
_SAMPLES = 128  # rows and columns of a depth map that are looked at, or up to twice as many


class Anchor(NamedTuple):
    """Hold what the first write settles."""

    near: float
    """least depth that a camera sees, world units"""
    origin: tuple[float, float, float] = _ZERO
    """where positions in the buffers count from, world coordinates"""


UNSETTLED = Anchor(NEAR)
"""Of caches that nothing was written into, and of files from before there were anchors."""


def find_anchor(
    depth: Tensor, cam2world: Tensor, near: float | None, origin: tuple[float, float, float] | None
) -> Anchor | None:
    """Find the anchor of a scene from its first view of known depth; None where no view has any. Waits for the device.

    Args:
        depth: (T, H, W) float, z; 0, negative, NaN and Inf mean unknown.
        cam2world: (T, 4, 4) float64.
        near: None: NEAR_FRACTION of the view's median depth.
        origin: None: 0 where the camera is within 64 median depths of it, else its centre, rounded to the power of two
            at or below that depth.
    """
    down, across = (max(side // _SAMPLES, 1) for side in depth.shape[1:])
    sample = depth[:, down // 2 :: down, across // 2 :: across].flatten(1).double()
    known = (sample > 0) & (sample < torch.inf)
    ordered = torch.where(known, sample, torch.inf).sort(1).values  # torch.median has no order on a GPU
    middle = ((known.sum(1) - 1) // 2).clamp(min=0)
    facts = torch.cat([ordered.gather(1, middle[:, None]), cam2world[:, :3, 3]], 1)
    for median, *center in facts.tolist():
        if median < math.inf:
            return Anchor(
                NEAR_FRACTION * median if near is None else near,
                find_origin(center, median) if origin is None else origin,
            )
    return None


def find_anchor_of_points(
    points: Tensor, near: float | None, origin: tuple[float, float, float] | None
) -> Anchor | None:
    """Find the anchor of a scene from points (N, 4) float64: x, y, z, footprint; None where none is finite. Waits.

    A view of 64 focal lengths to the cell writes tokens of a footprint of 1/64 of their depth: the median footprint is
    the least depth, as it is by :func:`find_anchor` there.
    """
    finite = points[torch.isfinite(points).all(1)]
    if not len(finite):
        return None
    *center, footprint = finite.sort(0).values[(len(finite) - 1) // 2].tolist()
    return Anchor(
        footprint if near is None else near,
        find_origin(center, footprint / NEAR_FRACTION) if origin is None else origin,
    )


def find_origin(center: list[float], depth: float) -> tuple[float, float, float]:
    """Choose the origin for a camera that sees things at this depth, see :func:`find_anchor`."""
    if not _FAR * depth < max(map(abs, center)) < math.inf:
        return _ZERO
    grid = math.ldexp(0.5, math.frexp(depth)[1])
    x, y, z = (round(side / grid) * grid for side in center)
    return x, y, z

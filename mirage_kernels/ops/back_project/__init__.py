"""`back_project`: depth maps to world points on the token grid."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...geometry import check_size
from ..checks import check_cameras, check_depth, describe
from ..operator import Operator
from . import reference


class BackProjection(NamedTuple):
    """Lifted tokens: ``points`` (T, h, w, 4) x, y, z, footprint in world units; ``valid`` (T, h, w) bool."""

    points: Tensor
    valid: Tensor


def _fake(*, depth: Tensor, height: int, width: int, **_: Any) -> tuple[Tensor, Tensor]:
    views = depth.shape[0]
    return (
        depth.new_empty((views, height, width, 4), dtype=torch.float32),
        depth.new_empty((views, height, width), dtype=torch.bool),
    )


launch = Operator(
    "back_project",
    (
        "(Tensor depth, Tensor intrinsics, Tensor cam2world, Tensor? mask, SymInt height, SymInt width, bool bilinear)"
        " -> (Tensor points, Tensor valid)"
    ),
    fake=_fake,
    reference=reference.back_project,
    device="depth",
    precision=("depth",),
    result=BackProjection._make,
).launch


def back_project(
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    size: tuple[int, int],
    mask: Tensor | None = None,
    depth_sampling: str = "median",
) -> BackProjection:
    """Lift depth maps to world points on the latent token grid, in one pass.

    Token (i, j) has its centre at (j + 0.5, i + 0.5) of the grid; its cell covers the pixels r with
    floor((r + 0.5) h / H) = i, columns alike. x_cam = (j + 0.5 - cx) z / fx with the intrinsics scaled to the grid,
    world = R x_cam + t (Hartley & Zisserman, Multiple View Geometry, eq. 6.8).

    Args:
        depth: (T, H, W) float32 (half precisions are widened; float64 is computed by the definition), z along the
            optical axis in world units. 0, negative, NaN and Inf mean unknown.
        intrinsics: (T, 3, 3) float, in pixels of the depth map.
        cam2world: (T, 4, 4) float, OpenCV axes.
        size: (h, w) of the token grid, at most (H, W).
        mask: (T, H', W') bool, True = static, of any resolution no coarser than the grid; a token is static only if
            all its pixels are.
        depth_sampling: ``"median"``: the lower median of the valid depths in a cell, unknown where under half of them
            are valid. ``"bilinear"``: for parity with the published code, blends raw values: zeros of unknown pixels
            mix into surfaces, and NaN or Inf makes every token it touches unknown.

    Returns:
        ``points`` (T, h, w, 4) float32: x, y, z and footprint z / fx in world units, 0 where not valid;
        ``valid`` (T, h, w) bool. Not differentiable: depth and cameras may not ask for a gradient.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    height, width = check_size(size)
    depth, mask = check_depth(depth, mask, (height, width), depth_sampling)
    intrinsics, cam2world = check_cameras(intrinsics, cam2world, depth.device, "depth")
    if intrinsics.shape[0] != depth.shape[0]:
        raise ValueError(
            f"intrinsics must be (T, 3, 3) with the T of depth, {depth.shape[0]}, got {describe(intrinsics)}"
        )
    return launch(
        depth=depth,
        intrinsics=intrinsics,
        cam2world=cam2world,
        mask=mask,
        height=height,
        width=width,
        bilinear=depth_sampling == "bilinear",
    )

"""Arrays of cameras in the shapes and conventions that people have, and as `Cameras` holds them.

In: tensors, numpy arrays or nested lists. Out: float64 copies on their device, OpenCV axes, pixel centres at j + 0.5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CONVENTIONS = ("opencv", "opengl")
PIXEL_CENTERS = ("half", "integer")


def as_float64(name: str, value: Any) -> Tensor:
    """Make a contiguous float64 copy of `value`, on its device."""
    if isinstance(value, (list, tuple)):
        if any(hasattr(item, "shape") for item in value):  # one array per view
            views = [as_float64(f"{name}[{i}]", item) for i, item in enumerate(value)]
            for i, view in enumerate(views):
                if view.shape != views[0].shape or view.device != views[0].device:
                    like = f"{tuple(views[0].shape)} on {views[0].device} as {name}[0]"
                    raise ValueError(f"{name}[{i}] must be {like}, got {tuple(view.shape)} on {view.device}")
            return torch.stack(views)
        try:
            return torch.tensor(value, dtype=torch.float64)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{name} must be a float tensor, array or nested lists, got: {error}") from None
    if not isinstance(value, Tensor):
        dtype = getattr(value, "dtype", None)
        if getattr(dtype, "kind", None) != "f":
            got = type(value).__name__ if dtype is None else str(dtype)
            raise TypeError(f"{name} must be a float tensor, array or nested lists, got {got}")
        # By numpy's own cast: torch takes no negative strides, foreign byte orders or long doubles.
        return torch.from_numpy(value.astype("float64", order="C"))
    if value.layout is not torch.strided or value.is_nested:
        got = "a nested one" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense float tensor, array or nested lists, got {got}")
    if not value.is_floating_point():
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be a float tensor, array or nested lists, got {got}")
    return torch.empty(value.shape, dtype=torch.float64, device=value.device).copy_(value.detach())


def as_views(name: str, value: Any) -> tuple[Tensor, tuple[int, ...]]:
    """Make a float64 copy (T, 4, 4) of poses (..., 3 or 4, 4), and return their leading axes."""
    poses = as_float64(name, value)
    if poses.ndim < 2 or poses.shape[-2:] not in ((3, 4), (4, 4)):
        raise ValueError(f"{name} must be (..., 3, 4) or (..., 4, 4), got {tuple(poses.shape)}")
    leading = tuple(poses.shape[:-2])
    poses = poses.reshape(-1, *poses.shape[-2:])
    if poses.shape[1] == 3:
        row = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64, device=poses.device)
        poses = torch.cat([poses, row.expand(len(poses), 1, 4)], 1)
    return poses, leading


def as_matrices(
    intrinsics: Any, leading: tuple[int, ...], size: tuple[int, int], pixel_centers: str, normalized: bool
) -> Tensor:
    """Make intrinsics of poses with these leading axes (T, 3, 3) in pixels of `size`, in our convention."""
    if pixel_centers not in PIXEL_CENTERS:
        raise ValueError(f"pixel_centers must be one of {', '.join(PIXEL_CENTERS)}, got {pixel_centers!r}")
    values = as_float64("intrinsics", intrinsics)
    if values.shape[-2:] == (3, 3):
        matrices = values
    elif values.shape[-1:] == (4,):
        matrices = torch.eye(3, dtype=torch.float64, device=values.device).repeat(*values.shape[:-1], 1, 1)
        for k, (i, j) in enumerate(((0, 0), (1, 1), (0, 2), (1, 2))):
            matrices[..., i, j] = values[..., k]
    else:
        raise ValueError(f"intrinsics must be (..., 3, 3) or (..., 4): fx, fy, cx, cy, got {tuple(values.shape)}")
    if normalized:
        matrices[..., 0, :] *= size[1]
        matrices[..., 1, :] *= size[0]
    if pixel_centers == "integer":
        matrices[..., :2, 2] += 0.5
    try:
        return matrices.expand(*leading, 3, 3).reshape(-1, 3, 3)
    except RuntimeError:
        expected = f"of one view, or of leading axes {leading} as the poses"
        raise ValueError(f"intrinsics must be {expected}, got {tuple(values.shape)}") from None


def is_opengl(convention: str) -> bool:
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    return convention == "opengl"


def as_poses(cam2world: Any) -> Tensor:
    """Make a float64 copy (T, 4, 4)."""
    poses = as_float64("cam2world", cam2world)
    if poses.ndim != 3 or poses.shape[1:] != (4, 4):
        hint = ": from_c2w takes (..., 3, 4) and (..., 4, 4)" if poses.shape[-1:] == (4,) else ""
        raise ValueError(f"cam2world must be (T, 4, 4), got {tuple(poses.shape)}{hint}")
    return poses


def invert(poses: Tensor) -> Tensor:
    """Invert (T, 4, 4) rigid poses, by the general inverse."""
    rotation = torch.linalg.inv(poses[:, :3, :3])
    inverse = poses.clone()
    inverse[:, :3, :3] = rotation
    inverse[:, :3, 3:] = rotation @ -poses[:, :3, 3:]
    return inverse


def with_bottom_row(poses: Tensor) -> Tensor:
    """Make the bottom row exact, in place."""
    poses[:, 3, :3] = 0.0
    poses[:, 3, 3] = 1.0
    return poses

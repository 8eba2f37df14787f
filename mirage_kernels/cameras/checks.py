"""Checks of cameras: values that are no camera, and intrinsics, images, depth, masks and latents of different sizes.

In: tensors on the host, or sizes (height, width). Each check raises a ValueError that names the argument, what was
expected and what came. This is the one place that knows what a plausible camera is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

ROTATION_TOLERANCE = 1e-2  # real poses deviate by 4e-4
BOTTOM_ROW_TOLERANCE = 1e-6
SKEW_TOLERANCE = 1e-6  # of the focal length: what float32 arithmetic and optimisers leave
PIXEL_ASPECT_TOLERANCE = 1.1  # between fx and fy: less than between any two of the common aspects 4:3, 3:2 and 16:9
_OTHER_SCALE = 1.3  # the principal point of an image larger by this, or smaller, in both directions alike
_NEAR_CENTER = 0.25  # of the distance from the centre, where that of (width, height) is so much nearer: swapped


class _Check(NamedTuple):
    """One condition on intrinsics: which views fail it, what was expected of them, and what came."""

    bad: np.ndarray
    expected: str
    got: Callable[[int], str]
    allowed_by: str | None = None  # the argument that allows it


def check_image_size(name: str, size: Any) -> tuple[int, int]:
    """Validate a (height, width) of two positive ints."""
    try:
        height, width = size
        if isinstance(height, bool) or isinstance(width, bool):
            raise TypeError
        height, width = operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be two ints (height, width), got {size!r}") from None
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be a positive (height, width), got {(height, width)}")
    return height, width


def check_intrinsics(
    intrinsics: Tensor, size: tuple[int, int], square_pixels: bool = True, off_center: bool = False
) -> None:
    """Refuse values that are no intrinsics of images of this size.

    Args:
        intrinsics: (T, 3, 3) or (3, 3) float64 on the host, in pixels of `size`.
        size: (height, width).
        square_pixels: refuse fx and fy that differ by more than a tenth.
        off_center: accept any principal point.
    """
    shared = intrinsics.ndim == 2
    values = intrinsics.numpy()[None] if shared else intrinsics.numpy()
    if not len(values):
        return
    checks = [*_find_malformed(values), *_find_implausible(values, size)]
    allowed = {None: True, "square_pixels": square_pixels, "off_center": not off_center}
    checks = [check for check in checks if allowed[check.allowed_by]]
    for check in checks:
        if check.bad.any():
            i = int(check.bad.argmax())
            name = "intrinsics" if shared else f"intrinsics[{i}]"
            raise ValueError(f"{name} must {check.expected}, got {check.got(i)}")


def find_allowances(intrinsics: Tensor, size: tuple[int, int]) -> dict[str, bool]:
    """Return the arguments that `Cameras` needs beside these valid intrinsics, (T, 3, 3) on the host: {} for most."""
    needed = {check.allowed_by for check in _find_implausible(intrinsics.numpy(), size) if check.bad.any()}
    return {name: name == "off_center" for name in ("square_pixels", "off_center") if name in needed}


def _find_malformed(values: np.ndarray) -> list[_Check]:
    """Find what is no pinhole camera in intrinsics (T, 3, 3)."""
    skew = np.stack([values[:, 0, 1], values[:, 1, 0]], 1)
    focal = np.stack([values[:, 0, 0], values[:, 1, 1]], 1)
    corner = np.abs(values[:, 2] - (0.0, 0.0, 1.0)).max(1)
    finite: np.ndarray = np.isfinite(values).all((1, 2))
    return [
        _Check(np.asarray(~finite), "be finite", lambda i: str(values[i].tolist())),
        _Check(
            np.asarray(finite & (corner > BOTTOM_ROW_TOLERANCE)),
            "have the bottom row (0, 0, 1)",
            lambda i: str(tuple(values[i, 2].tolist())),
        ),
        _Check(
            np.asarray((np.abs(skew) > SKEW_TOLERANCE * np.abs(focal)).any(1)),
            "have no skew (K[0, 1] = K[1, 0] = 0)",
            lambda i: "{:g} and {:g}".format(*skew[i]),
        ),
        _Check(
            np.asarray((focal <= 0).any(1)),
            "have positive focal lengths",
            lambda i: "fx={:g}, fy={:g}".format(*focal[i]),
        ),
    ]


def _find_implausible(values: np.ndarray, size: tuple[int, int]) -> list[_Check]:
    """Find what is no camera of images of this size in intrinsics (T, 3, 3) of pinhole cameras."""
    height, width = size
    fx, fy, cx, cy = values[:, 0, 0], values[:, 1, 1], values[:, 0, 2], values[:, 1, 2]
    across, down = 2 * cx / width, 2 * cy / height  # 1 at the centre
    # A principal point far from the centre, which would be near it if height and width were exchanged: crops have no
    # such ones, as both sides of a crop are at most the image's.
    offset = np.maximum(np.abs(across - 1), np.abs(down - 1))
    turned = np.maximum(np.abs(2 * cx / height - 1), np.abs(2 * cy / width - 1))
    larger, smaller = np.maximum(across, down), np.minimum(across, down)
    scaled = (larger - smaller <= 0.05 * larger) & ((larger < 1 / _OTHER_SCALE) | (smaller > _OTHER_SCALE))
    ratio = fy / np.where(fx == 0, 1, fx)
    of = f"of image_size {height}x{width} (height x width)"

    def point(i: int) -> str:
        return f"the principal point ({cx[i]:g}, {cy[i]:g})"

    return [
        _Check(
            (np.maximum(cx, cy) <= 1) & (np.minimum(cx, cy) > 0) & (min(size) > 2),
            f"be in pixels {of}: normalized=True of Cameras.from_w2c and from_c2w takes fractions of it",
            lambda i: f"fx={fx[i]:g}, fy={fy[i]:g} and {point(i)}",
        ),
        _Check(
            (offset > 0.2) & (turned < _NEAR_CENTER * offset),
            f"be {of}, not (width, height)",
            lambda i: f"{point(i)}, which is that of {width}x{height}",
            "off_center",
        ),
        _Check(
            scaled,
            f"be {of}, not of another size (off_center=True accepts any principal point)",
            lambda i: f"{point(i)}, the centre of about {2 * cy[i]:.0f}x{2 * cx[i]:.0f}",
            "off_center",
        ),
        _Check(
            (cx < 0) | (cx > width) | (cy < 0) | (cy > height),
            f"have the principal point inside the image, {of} (off_center=True accepts it, as of a crop)",
            lambda i: f"({cx[i]:g}, {cy[i]:g})",
            "off_center",
        ),
        _Check(
            (ratio > PIXEL_ASPECT_TOLERANCE) | (ratio * PIXEL_ASPECT_TOLERANCE < 1),
            "have nearly square pixels (square_pixels=False accepts those of stretched images)",
            lambda i: f"fx={fx[i]:g} and fy={fy[i]:g} {of}",
            "square_pixels",
        ),
    ]


def check_poses(name: str, poses: Tensor) -> None:
    """Refuse values that are no rigid poses: (T, 4, 4) float64 on the host."""
    values = poses.numpy()
    if not len(values):
        return
    bottom, rotation = values[:, 3], values[:, :3, :3]
    finite = np.isfinite(values).all((1, 2))
    with np.errstate(all="ignore"):  # what overflows is bad
        deviation = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
        determinant = np.linalg.det(rotation)
    rigid = "be a rigid pose (rotation within 1e-2 of orthonormal)"
    for bad, expected, got in (
        (~finite, "be finite", lambda i: str(values[i].tolist())),
        (
            (np.abs(bottom - (0.0, 0.0, 0.0, 1.0)) > BOTTOM_ROW_TOLERANCE).any(1),
            "have the bottom row (0, 0, 0, 1)",
            lambda i: str(tuple(bottom[i].tolist())),
        ),
        # Written so that NaN, from an overflow, is bad.
        (~(deviation <= ROTATION_TOLERANCE), rigid, lambda i: f"deviation {deviation[i]:.3g}"),
        (
            determinant <= 0,
            "be a rigid pose (right-handed, determinant 1)",
            lambda i: f"a reflection, determinant {determinant[i]:.3g}",
        ),
    ):
        if bad.any():
            i = int(bad.argmax())
            raise ValueError(f"{name}[{i}] must {expected}, got {got(i)}")


def fits_grid(size: tuple[int, int], grid: tuple[int, int]) -> bool:
    """Return whether an image of this size (height, width) has the aspect of a grid of tokens, within one token."""
    off = abs(grid[0] * size[1] - size[0] * grid[1])  # of equal aspects 0
    return off <= size[1] or off <= size[0]  # one token more or less along either side


def check_fits_grid(name: str, size: tuple[int, int], grid: tuple[int, int], of: str = "the latents") -> None:
    """Refuse an image size (height, width) whose aspect differs from that of a grid by more than a token."""
    if not fits_grid(size, grid):
        swapped = " (height and width exchanged?)" if fits_grid((size[1], size[0]), grid) else ""
        expected = f"have the aspect of {of}, {grid[0]}x{grid[1]}, within one token"
        raise ValueError(f"{name} must {expected}, got {size[0]}x{size[1]}{swapped}")

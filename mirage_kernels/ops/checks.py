"""Checks of arguments, on the host and by metadata only (shapes, dtypes, devices): they never wait for a GPU.

Each raises a ValueError or a TypeError that names the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..cameras import Cameras
from ..cameras.checks import check_fits_grid
from ..geometry import bounds_rows, check_size
from ..quantization import FLOAT8

FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORED_DTYPES = (*FEATURE_DTYPES, FLOAT8)  # of features; the last with a scale a token, and not of latents
DEPTH_SAMPLINGS = ("median", "bilinear")
_FLOATS = (torch.float64, *FEATURE_DTYPES)


def describe(value: object) -> str:
    """Describe what came in place of what was expected: a shape and a dtype, or a type and a value."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if hasattr(value, "shape"):
        return f"{type(value).__name__} {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 40 and "\n" not in text else type(value).__name__


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise a ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {describe(value)}")


def require_tensor(name: str, value: object, expected: str) -> None:
    """Raise a TypeError unless the value is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, {expected}, got {describe(value)}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, {expected}, got one of layout {layout}")


def require_dtype(name: str, value: Tensor, expected: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise a TypeError unless the tensor has one of the dtypes."""
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {expected}, got {describe(value)}")


def require_device(name: str, value: Tensor, device: torch.device, like: str) -> None:
    """Raise a ValueError unless the tensor is on the device, which is that of the argument `like`."""
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like {like}, got {value.device}")


def require_contiguous(name: str, value: Tensor) -> None:
    """Raise a ValueError unless the tensor, which is written in place, is contiguous."""
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, it is written in place, got strides {value.stride()}")


def plain(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the tensor without its gradient, in another dtype if need be; itself where there is nothing to do."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor if dtype is None or tensor.dtype == dtype else tensor.to(dtype)


def refuse_gradient(name: str, tensor: Tensor) -> Tensor:
    """Raise a ValueError where a gradient is asked for that the operator does not give; return the tensor detached."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require a gradient, for none flows to it, got one that does: pass {name}.detach(), or"
            " call this under torch.no_grad()"
        )
    return plain(tensor)


def check_count(name: str, value: Any, least: int, most: int) -> int:
    """Check an int in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be an int from {least} to {most}, got {value!r}")
    return value


def check_near(near: float) -> float:
    """Check a least depth, finite and not negative."""
    # Comparisons, not math.isfinite: under torch.compile these numbers may be symbols.
    if isinstance(near, bool) or not isinstance(near, (int, float, torch.SymFloat)) or not 0 <= near < math.inf:
        raise ValueError(f"near must be a finite depth >= 0 in world units, got {near!r}")
    return near


def check_sharpness(sharpness: float) -> float:
    """Check a sharpness, not negative; infinity is allowed."""
    # A comparison that NaN fails.
    if isinstance(sharpness, bool) or not isinstance(sharpness, (int, float, torch.SymFloat)) or not sharpness >= 0:
        raise ValueError(f"sharpness must be a number >= 0, infinity included, got {sharpness!r}")
    return sharpness


def check_first_frame(first_frame: int, views: int) -> None:
    """Check that the frame ids of so many views are those of int32."""
    if not 0 <= first_frame or first_frame + views >= 2**31:
        raise ValueError(f"first_frame must be an int >= 0 with room for {views} frames in int32, got {first_frame!r}")


def check_cameras(
    intrinsics: Tensor, cam2world: Tensor, device: torch.device, like: str, prefix: str = ""
) -> tuple[Tensor, Tensor]:
    """Check the cameras of T views, and return them in float64."""
    for name, value, side in ((f"{prefix}intrinsics", intrinsics, 3), (f"{prefix}cam2world", cam2world, 4)):
        expected = f"(T, {side}, {side}) float"
        require_tensor(name, value, expected)
        require(value.dim() == 3 and value.shape[1:] == (side, side), name, expected, value)
        require_dtype(name, value, expected, _FLOATS)
        require_device(name, value, device, like)
    if intrinsics.shape[0] != cam2world.shape[0]:
        raise ValueError(
            f"{prefix}cam2world must be (T, 4, 4) with the T of {prefix}intrinsics, {intrinsics.shape[0]},"
            f" got {describe(cam2world)}"
        )
    intrinsics = refuse_gradient(f"{prefix}intrinsics", intrinsics)
    cam2world = refuse_gradient(f"{prefix}cam2world", cam2world)
    # Exact: no float32 pose changes when it is widened.
    return plain(intrinsics, torch.float64), plain(cam2world, torch.float64)


def check_depth(
    depth: Tensor, mask: Tensor | None, size: tuple[int, int], depth_sampling: str
) -> tuple[Tensor, Tensor | None]:
    """Check depth maps and static masks, and return them as kernels take them."""
    require_tensor("depth", depth, "(T, H, W) float")
    require(depth.dim() == 3, "depth", "(T, H, W) float", depth)
    require_dtype("depth", depth, "(T, H, W) float", _FLOATS)
    if depth_sampling not in DEPTH_SAMPLINGS:
        raise ValueError(f"depth_sampling must be one of {', '.join(DEPTH_SAMPLINGS)}, got {depth_sampling!r}")
    if depth_sampling == "median" and (depth.shape[1] < size[0] or depth.shape[2] < size[1]):
        raise ValueError(f"depth must be (T, H, W) at least as fine as the token grid {size}, got {describe(depth)}")
    require(depth.shape[1] > 0 and depth.shape[2] > 0, "depth", "(T, H, W) with at least one pixel", depth)
    if mask is not None:
        require_tensor("mask", mask, "(T, H, W) bool, True = static")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be (T, H, W) bool, True = static, got {describe(mask)}")
        require(mask.dim() == 3, "mask", "(T, H, W) bool, True = static", mask)
        require_device("mask", mask, depth.device, "depth")
        if mask.shape[0] != depth.shape[0]:
            raise ValueError(f"mask must be (T, H, W) with the T of depth, {depth.shape[0]}, got {describe(mask)}")
        if mask.shape[1] < size[0] or mask.shape[2] < size[1]:
            raise ValueError(f"mask must be (T, H, W) at least as fine as the token grid {size}, got {describe(mask)}")
    depth = refuse_gradient("depth", depth)
    return plain(depth, None if depth.dtype == torch.float64 else torch.float32), mask


def check_points(points: Tensor, num_points: Tensor | None, differentiable: bool = False) -> Tensor:
    """Check tokens' positions and the number of live ones; refuse a gradient to positions that get none."""
    expected = "(N, 4) float32: x, y, z, footprint"
    require_tensor("points", points, expected)
    require(points.dim() == 2 and points.shape[1] == 4, "points", expected, points)
    require_dtype("points", points, expected, (torch.float32, torch.float64))
    if points.shape[0] >= 2**32 - 1:
        raise ValueError(f"points must hold fewer than 2^32 - 1 tokens, got {points.shape[0]}")
    if num_points is not None:
        require_tensor("num_points", num_points, "one int64 on the device of points")
        require(num_points.dtype == torch.int64 and num_points.numel() == 1, "num_points", "one int64", num_points)
        require_device("num_points", num_points, points.device, "points")
    return points if differentiable else refuse_gradient("points", points)


def check_scales(features: Tensor, scales: Tensor | None, device: torch.device, like: str) -> None:
    """Check that float8 features, and only those, have a scale a row."""
    if features.dtype != FLOAT8:
        if scales is not None:
            raise ValueError(f"scales must be None but for float8_e4m3fn features, got {describe(scales)}")
        return
    expected = f"({features.shape[0]},) uint8, one for each row of float8_e4m3fn features"
    require_tensor("scales", scales, expected)
    assert scales is not None
    require(scales.shape == features.shape[:1] and scales.dtype == torch.uint8, "scales", expected, scales)
    require_device("scales", scales, device, like)


def check_features(features: Tensor, scales: Tensor | None, points: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Check features, their scales and the dtype asked for, and return the dtype of the latents."""
    require_tensor("features", features, "(N, C) float")
    require(features.dim() == 2, "features", "(N, C) float", features)
    if features.shape[0] != points.shape[0]:
        raise ValueError(f"features must be (N, C) with the N of points, {points.shape[0]}, got {describe(features)}")
    require_dtype("features", features, "(N, C) float", (torch.float64, *STORED_DTYPES))
    require_device("features", features, points.device, "points")
    check_scales(features, scales, points.device, "points")
    if dtype is None:
        dtype = readout_dtype(features.dtype)
    if dtype not in _FLOATS:
        raise TypeError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    if features.dtype == FLOAT8 and features.requires_grad and torch.is_grad_enabled():
        raise ValueError("features must not require a gradient in float8_e4m3fn: rounded to that, they have none")
    return dtype


def readout_dtype(stored: torch.dtype) -> torch.dtype:
    """Return the dtype of latents read from features of this dtype, where none is asked for."""
    return torch.bfloat16 if stored == FLOAT8 else stored


def check_bounds(bounds: Tensor | None, points: Tensor, name: str = "bounds", in_place: bool = False) -> Tensor | None:
    """Check the bounds of blocks of points, and return them detached."""
    if bounds is None:
        return None
    expected = "(B + ceil(B / 64), 6) float32 with B = ceil(N / 256) blocks of the N points"
    require_tensor(name, bounds, expected)
    require(bounds.shape == (bounds_rows(points.shape[0]), 6), name, expected, bounds)
    require_dtype(name, bounds, expected, (torch.float32,))
    require_device(name, bounds, points.device, "points")
    if in_place:
        require_contiguous(name, bounds)
    return plain(bounds)


def check_write_inputs(
    latents: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    mask: Tensor | None,
    depth_sampling: str,
    min_depth: float,
    max_depth: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Check what a write lifts; return depth, intrinsics, cam2world and mask as kernels take them."""
    require_tensor("latents", latents, "(T, C, h, w) float")
    require(latents.dim() == 4, "latents", "(T, C, h, w) float", latents)
    require_dtype("latents", latents, "(T, C, h, w) float32, float16 or bfloat16", FEATURE_DTYPES)
    refuse_gradient("latents", latents)
    size = check_size(tuple(latents.shape[2:]), "the grid of latents")
    depth, mask = check_depth(depth, mask, size, depth_sampling)
    views = latents.shape[0]
    if depth.dtype == torch.float64:
        raise TypeError(f"depth must be (T, H, W) float32, float16 or bfloat16, got {describe(depth)}")
    if depth.shape[0] != views:
        raise ValueError(f"depth must be (T, H, W) with the T of latents, {views}, got {describe(depth)}")
    require_device("depth", depth, latents.device, "latents")
    intrinsics, cam2world = check_cameras(intrinsics, cam2world, latents.device, "latents")
    if intrinsics.shape[0] != views:
        raise ValueError(f"intrinsics must be (T, 3, 3) with the T of latents, {views}, got {describe(intrinsics)}")
    if not (0 <= min_depth <= max_depth):
        raise ValueError(f"min_depth must be in [0, max_depth], got min_depth={min_depth!r}, max_depth={max_depth!r}")
    return depth, intrinsics, cam2world, mask


def check_write_aspects(latents: Any, depth: Any, cameras: Cameras, mask: Any, depth_sampling: str) -> None:
    """Check that what is written shows views of one aspect, that of the grid of latents within a token.

    What is no (T, C, h, w) or (T, H, W), or coarser than the grid, is left to :func:`check_write_inputs`.
    """
    if getattr(latents, "ndim", 0) != 4 or 0 in latents.shape[2:]:
        return
    grid = (latents.shape[2], latents.shape[3])
    check_fits_grid("cameras", cameras.image_size, grid)
    for name, maps, coarse in (("depth", depth, depth_sampling == "bilinear"), ("mask", mask, False)):
        if getattr(maps, "ndim", 0) == 3 and 0 not in maps.shape[1:]:
            rows, columns = maps.shape[1:]
            if coarse or (rows >= grid[0] and columns >= grid[1]):
                check_fits_grid(name, (rows, columns), grid)


def check_buffers(
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    count: Tensor,
    channels: int | None,
    device: torch.device | None,
    scales: Tensor | None,
    **bytes_per_token: Tensor | None,
) -> None:
    """Check buffers that are written in place; `channels` and `device` are those of what is written into them.

    `bytes_per_token` are more buffers of one uint8 a token, by name.
    """
    points = check_points(points, None, differentiable=True)  # or not: what a write changes leaves any graph
    capacity = points.shape[0]
    like = "points" if device is None else "latents"
    device = points.device if device is None else device
    for name, buffer in (("features", features), ("frame_ids", frame_ids), ("count", count), *bytes_per_token.items()):
        if buffer is not None or name not in bytes_per_token:
            require_tensor(name, buffer, "written in place")
    rows = features.shape[1:] if channels is None and features.dim() == 2 else (channels or 0,)
    buffers: list[tuple[str, Tensor, tuple[int, ...], tuple[torch.dtype, ...]]] = [
        ("points", points, (capacity, 4), (torch.float32,)),
        ("features", features, (capacity, *rows), STORED_DTYPES),
        ("frame_ids", frame_ids, (capacity,), (torch.int32,)),
        ("count", count, tuple(count.shape), (torch.int64,)),
    ]
    buffers += [(name, kept, (capacity,), (torch.uint8,)) for name, kept in bytes_per_token.items() if kept is not None]
    for name, buffer, shape, dtypes in buffers:
        kinds = " or ".join(str(kind).removeprefix("torch.") for kind in dtypes)
        require(tuple(buffer.shape) == shape and buffer.dtype in dtypes, name, f"{shape} {kinds}", buffer)
        require_device(name, buffer, device, like)
        require_contiguous(name, buffer)
    require(count.numel() == 1, "count", "one int64", count)
    check_scales(features, scales, device, like)
    if scales is not None:
        require_contiguous("scales", scales)

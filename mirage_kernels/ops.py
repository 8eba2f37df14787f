"""The operators: checks, and the choice of a backend.

Checks look at metadata only (shapes, dtypes, devices), on the host, before anything is computed or written; they never
wait for a GPU. Values are validated once by :class:`~mirage_kernels.Cameras`; an operator given a degenerate camera or
a NaN depth writes or shows nothing there, and never reads or writes out of bounds.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .backends import choose_backend
from .reference import FLOAT8
from .schemas import private_operator

NEAR = 0.05
SHARPNESS = 30.0
VIEWS_PER_VOXEL, MOST_VIEWS = 4, 64
CARVE_VIEWS = 2
FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORED_DTYPES = (*FEATURE_DTYPES, FLOAT8)  # of features; the last with a scale a token, and not of latents
DEPTH_SAMPLINGS = ("median", "bilinear")


class BackProjection(NamedTuple):
    """Lifted tokens: ``points`` (T, h, w, 4) x, y, z, footprint in world units; ``valid`` (T, h, w) bool."""

    points: Tensor
    valid: Tensor


class Readout(NamedTuple):
    """What cameras see of the tokens; a hole has latents 0, mask False, depth 0, index -1.

    ``latents`` (T, C, h, w); ``mask`` (T, h, w) bool; ``depth`` (T, h, w) z along the optical axis in world units;
    ``index`` (T, h, w) int64, the row of the winning token.
    """

    latents: Tensor
    mask: Tensor
    depth: Tensor
    index: Tensor  # type: ignore[assignment]  # the field hides tuple.index, which nobody needs here


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if hasattr(value, "shape"):
        return f"{type(value).__name__} {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 40 and "\n" not in text else type(value).__name__


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {_describe(value)}")


def _require_tensor(name: str, value: object, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, {expected}, got {_describe(value)}")


def _require_float(name: str, value: Tensor, expected: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {expected}, got {_describe(value)}")


def _require_device(name: str, value: Tensor, device: torch.device, like: str) -> None:
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like {like}, got {value.device}")


def _require_contiguous(name: str, value: Tensor) -> None:
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, it is written in place, got strides {value.stride()}")


def check_size(size: object, name: str = "size") -> tuple[int, int]:
    """A grid (height, width) of two positive integers."""
    if not isinstance(size, (tuple, list, torch.Size)) or len(size) != 2:
        raise ValueError(f"{name} must be (height, width), two positive integers, got {size!r}")
    height, width = size
    for side in (height, width):
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)) or side < 1:
            raise ValueError(f"{name} must be (height, width), two positive integers, got {tuple(size)!r}")
    if height * width >= 2**31:
        raise ValueError(f"{name} must have fewer than 2^31 cells, got {tuple(size)!r}")
    return height, width


def _check_cameras(
    intrinsics: Tensor, cam2world: Tensor, device: torch.device, like: str, prefix: str = ""
) -> tuple[Tensor, Tensor]:
    floats = (torch.float64, *FEATURE_DTYPES)
    for name, value, side in ((f"{prefix}intrinsics", intrinsics, 3), (f"{prefix}cam2world", cam2world, 4)):
        expected = f"(T, {side}, {side}) float"
        _require_tensor(name, value, expected)
        _require(value.dim() == 3 and value.shape[1:] == (side, side), name, expected, value)
        _require_float(name, value, expected, floats)
        _require_device(name, value, device, like)
    if intrinsics.shape[0] != cam2world.shape[0]:
        raise ValueError(
            f"{prefix}cam2world must be (T, 4, 4) with the T of {prefix}intrinsics, {intrinsics.shape[0]},"
            f" got {_describe(cam2world)}"
        )
    # Exact: no float32 pose changes when it is widened.
    return _plain(intrinsics, torch.float64), _plain(cam2world, torch.float64)


def _plain(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor without its gradient, in another dtype if need be; itself where there is nothing to do."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor if dtype is None or tensor.dtype == dtype else tensor.to(dtype)


def _check_depth(
    depth: Tensor, mask: Tensor | None, size: tuple[int, int], depth_sampling: str
) -> tuple[Tensor, Tensor | None]:
    _require_tensor("depth", depth, "(T, H, W) float")
    _require(depth.dim() == 3, "depth", "(T, H, W) float", depth)
    _require_float("depth", depth, "(T, H, W) float", (torch.float64, *FEATURE_DTYPES))
    if depth_sampling not in DEPTH_SAMPLINGS:
        raise ValueError(f"depth_sampling must be one of {', '.join(DEPTH_SAMPLINGS)}, got {depth_sampling!r}")
    if depth_sampling == "median" and (depth.shape[1] < size[0] or depth.shape[2] < size[1]):
        raise ValueError(f"depth must be (T, H, W) at least as fine as the token grid {size}, got {_describe(depth)}")
    _require(depth.shape[1] > 0 and depth.shape[2] > 0, "depth", "(T, H, W) with at least one pixel", depth)
    if mask is not None:
        _require_tensor("mask", mask, "(T, H, W) bool, True = static")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be (T, H, W) bool, True = static, got {_describe(mask)}")
        _require(mask.dim() == 3, "mask", "(T, H, W) bool, True = static", mask)
        _require_device("mask", mask, depth.device, "depth")
        if mask.shape[0] != depth.shape[0]:
            raise ValueError(f"mask must be (T, H, W) with the T of depth, {depth.shape[0]}, got {_describe(mask)}")
        if mask.shape[1] < size[0] or mask.shape[2] < size[1]:
            raise ValueError(f"mask must be (T, H, W) at least as fine as the token grid {size}, got {_describe(mask)}")
    return _plain(depth, None if depth.dtype == torch.float64 else torch.float32), mask


def _check_points(points: Tensor, num_points: Tensor | None, differentiable: bool = False) -> Tensor:
    expected = "(N, 4) float32: x, y, z, footprint"
    _require_tensor("points", points, expected)
    _require(points.dim() == 2 and points.shape[1] == 4, "points", expected, points)
    _require_float("points", points, expected, (torch.float32, torch.float64))
    if points.shape[0] >= 2**32 - 1:
        raise ValueError(f"points must hold fewer than 2^32 - 1 tokens, got {points.shape[0]}")
    if num_points is not None:
        _require_tensor("num_points", num_points, "one int64 on the device of points")
        _require(num_points.dtype == torch.int64 and num_points.numel() == 1, "num_points", "one int64", num_points)
        _require_device("num_points", num_points, points.device, "points")
    return points if differentiable else _plain(points)


def _check_features(features: Tensor, scales: Tensor | None, points: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the latents, after checks of the features, of their scales, and of that."""
    _require_tensor("features", features, "(N, C) float")
    _require(features.dim() == 2, "features", "(N, C) float", features)
    if features.shape[0] != points.shape[0]:
        raise ValueError(f"features must be (N, C) with the N of points, {points.shape[0]}, got {_describe(features)}")
    _require_float("features", features, "(N, C) float", (torch.float64, *STORED_DTYPES))
    _require_device("features", features, points.device, "points")
    _check_scales(features, scales, points.device, "points")
    if dtype is None:
        dtype = torch.bfloat16 if features.dtype == FLOAT8 else features.dtype
    if dtype not in (torch.float64, *FEATURE_DTYPES):
        raise TypeError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    if features.dtype == FLOAT8 and features.requires_grad and torch.is_grad_enabled():
        raise ValueError("features must not require a gradient in float8_e4m3fn: rounded to that, they have none")
    return dtype


def _check_bounds(bounds: Tensor | None, points: Tensor, name: str = "bounds", in_place: bool = False) -> Tensor | None:
    if bounds is None:
        return None
    expected = "(B + ceil(B / 64), 6) float32 with B = ceil(N / 256) blocks of the N points"
    _require_tensor(name, bounds, expected)
    fits = bounds.shape == (reference.bounds_rows(points.shape[0]), 6)
    _require(fits, name, expected, bounds)
    _require_float(name, bounds, expected, (torch.float32,))
    _require_device(name, bounds, points.device, "points")
    if in_place and not bounds.is_contiguous():
        raise ValueError(f"{name} must be contiguous, it is written in place, got strides {bounds.stride()}")
    return _plain(bounds)


def _check_scales(features: Tensor, scales: Tensor | None, device: torch.device, like: str) -> None:
    if features.dtype != FLOAT8:
        if scales is not None:
            raise ValueError(f"scales must be None but for float8_e4m3fn features, got {_describe(scales)}")
        return
    expected = f"({features.shape[0]},) uint8, one for each row of float8_e4m3fn features"
    _require_tensor("scales", scales, expected)
    assert scales is not None
    _require(scales.shape == features.shape[:1] and scales.dtype == torch.uint8, "scales", expected, scales)
    _require_device("scales", scales, device, like)


def _check_near(near: float) -> float:
    # Comparisons, not math.isfinite: under torch.compile these numbers may be symbols.
    if isinstance(near, bool) or not isinstance(near, (int, float, torch.SymFloat)) or not 0 <= near < math.inf:
        raise ValueError(f"near must be a finite depth >= 0 in world units, got {near!r}")
    return near


def _family(backend: str) -> str:
    return "triton" if backend == "triton" else "compiled"


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
        ``valid`` (T, h, w) bool. Not differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    height, width = check_size(size)
    depth, mask = _check_depth(depth, mask, (height, width), depth_sampling)
    intrinsics, cam2world = _check_cameras(intrinsics, cam2world, depth.device, "depth")
    if intrinsics.shape[0] != depth.shape[0]:
        raise ValueError(
            f"intrinsics must be (T, 3, 3) with the T of depth, {depth.shape[0]}, got {_describe(intrinsics)}"
        )
    backend = choose_backend(depth.device, depth.dtype)
    if backend == "reference":
        return BackProjection(
            *reference.back_project(depth, intrinsics, cam2world, mask, (height, width), depth_sampling)
        )
    operator = private_operator("back_project", _family(backend))
    return BackProjection(*operator(depth, intrinsics, cam2world, mask, height, width, depth_sampling == "bilinear"))


def splat(
    points: Tensor,
    features: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    size: tuple[int, int],
    *,
    scales: Tensor | None = None,
    num_points: Tensor | None = None,
    bounds: Tensor | None = None,
    near: float = NEAR,
    dtype: torch.dtype | None = None,
) -> Readout:
    """Splat tokens onto the latent grids of T cameras: z-buffer, then gather.

    A token falls into cell (floor(v), floor(u)) of its projection when z > ``near``; in each cell the smallest z wins,
    at equal z the lowest index. The same bits on every backend, run and thread count (only which NaN a NaN feature
    turns into, in another dtype, is up to the processor). On a GPU it neither waits for the device nor allocates by
    data, so it can be captured in a CUDA graph.

    Args:
        points: (N, 4) float32: x, y, z, footprint in world units (float64 is computed by the definition). Points with a
            NaN or Inf coordinate are seen by no camera.
        features: (N, C) float32, float16, bfloat16 or float8_e4m3fn (float64 by the definition).
        intrinsics: (T, 3, 3) float, in cells of the target grid (``Cameras.resized(size)``).
        cam2world: (T, 4, 4) float, OpenCV axes.
        size: (h, w) of the target grid.
        scales: (N,) uint8, with float8_e4m3fn features and only with them: a feature's value is
            float8 * 2^(scale - 127), as :func:`cache_write` stores it.
        num_points: one int64 on the device of ``points``, read there: only so many first rows are live.
        bounds: (B + ceil(B / 64), 6) float32, as of :func:`block_bounds`: the promise that the live points of each of
            its B blocks and of each 64 blocks lie within their boxes. What no camera sees is then passed over by
            blocks; no result changes.
        near: least depth, in world units.
        dtype: of the latents, any of these but float8_e4m3fn; default that of ``features``, bfloat16 for float8_e4m3fn.

    Returns:
        :class:`Readout`. ``latents`` carries a gradient to ``features``, deterministic too; nothing else does, and
        float8_e4m3fn features may not ask for one.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    height, width = check_size(size)
    points = _check_points(points, num_points)
    bounds = _check_bounds(bounds, points)
    dtype = _check_features(features, scales, points, dtype)
    intrinsics, cam2world = _check_cameras(intrinsics, cam2world, points.device, "points")
    near = _check_near(near)
    working = torch.float64 if torch.float64 in (points.dtype, features.dtype, dtype) else torch.float32
    backend = choose_backend(points.device, working)
    if backend == "reference":
        size = (height, width)
        return Readout(*reference.splat(points, features, num_points, intrinsics, cam2world, size, near, dtype, scales))
    operator = private_operator("splat", _family(backend))
    arguments = (points, features, num_points, intrinsics, cam2world, height, width, near, dtype, bounds, scales)
    if torch.compiler.is_compiling() or (features.requires_grad and torch.is_grad_enabled()):
        return Readout(*operator(*arguments))
    # Reads in inference skip the autograd layer, which is Python: half of the 36 microseconds of an empty call.
    with torch._C._AutoDispatchBelowAutograd():
        return Readout(*operator(*arguments))


def check_sharpness(sharpness: float) -> float:
    # A comparison that NaN fails; infinity is allowed.
    if isinstance(sharpness, bool) or not isinstance(sharpness, (int, float, torch.SymFloat)) or not sharpness >= 0:
        raise ValueError(f"sharpness must be a number >= 0, infinity included, got {sharpness!r}")
    return sharpness


def splat_aligned(
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    frame_centers: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    size: tuple[int, int],
    *,
    scales: Tensor | None = None,
    num_points: Tensor | None = None,
    bounds: Tensor | None = None,
    near: float = NEAR,
    sharpness: float = SHARPNESS,
    dtype: torch.dtype | None = None,
) -> Readout:
    """Splat tokens onto the latent grids of T cameras: a cell shows what fits it best, not what is nearest.

    A latent is no colour: moved by half a token, seen from another distance or from another side it is another latent.
    So a cell blends the tokens that were written most nearly as the cell sees them:

    - A token reaches the cells whose centres are within 0.75 cells of its projection. Cells that none reaches are
      holes; tokens whose footprint is larger than a cell close them, reaching 0.75 of their footprint, taken as at most
      3 cells. The projection must lie at z > ``near``.
    - Of those, the tokens up to 10 % behind the nearest belong to the surface seen; the others are hidden.
    - A token's score is d^2 + (r - 1)^2 / r + 16 (1 - cos a), the less the better: d is the distance from its
      projection to the centre of the cell, in cells; r its footprint over the size of a cell at its depth, z / fx,
      held to [1/16, 16] ((r - 1)^2 / r is ln^2 r near 1); a the angle between the rays along which the camera that
      wrote it and the one that reads see it, 0 where the writing camera is unknown.
    - The four best are blended, with weights (1 - x / 8)^8, 0 past x = 8, of x = ``sharpness`` (score - best score):
      that is e^-x up to a few hundredths. Sharpness 0 takes their mean, infinity the best alone.

    The numbers were chosen on a real room (``benchmarks/fidelity.py``); the form is this project's own. The same bits
    on every backend, run and thread count (but for which NaN a NaN turns into). On a GPU it neither waits for the
    device nor allocates by data, so it can be captured in a CUDA graph.

    Args:
        points: (N, 4) float32: x, y, z, footprint in world units (float64 is computed by the definition). Points with a
            NaN or Inf coordinate are seen by no camera; a footprint that is NaN or not positive counts as the least r.
        features: (N, C) float32, float16, bfloat16 or float8_e4m3fn (float64 by the definition).
        frame_ids: (N,) int32, the row of ``frame_centers`` that wrote each token; unknown where there is no such row.
        frame_centers: (F, 3) float32, centres of the writing cameras in world units.
        intrinsics: (T, 3, 3) float, in cells of the target grid (``Cameras.resized(size)``).
        cam2world: (T, 4, 4) float, OpenCV axes.
        size: (h, w) of the target grid.
        scales: (N,) uint8, with float8_e4m3fn features and only with them: a feature's value is
            float8 * 2^(scale - 127), as :func:`cache_write` stores it.
        num_points: one int64 on the device of ``points``, read there: only so many first rows are live.
        bounds: (B + ceil(B / 64), 6) float32, as of :func:`block_bounds`: the promise that the live points of each of
            its B blocks and of each 64 blocks lie within their boxes. What no camera sees is then passed over by
            blocks; no result changes.
        near: least depth, in world units.
        sharpness: how much better a fit must be to count for more; a number >= 0, or infinity.
        dtype: of the latents, any of these but float8_e4m3fn; default that of ``features``, bfloat16 for float8_e4m3fn.

    Returns:
        :class:`Readout`. ``depth`` and ``index`` are those of the best fit. ``latents`` carries gradients to
        ``features``
        and, with the choice of tokens held fixed, to ``points``; they are deterministic too, equal on every backend up
        to rounding. Nothing else carries one, and float8_e4m3fn features may not ask for one.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    height, width = check_size(size)
    points = _check_points(points, num_points, differentiable=True)
    bounds = _check_bounds(bounds, points)
    dtype = _check_features(features, scales, points, dtype)
    for name, value, shape, kind in (
        ("frame_ids", frame_ids, (points.shape[0],), torch.int32),
        ("frame_centers", frame_centers, None, torch.float32),
    ):
        expected = "(N,) int32 with the N of points" if shape else "(F, 3) float32"
        _require_tensor(name, value, expected)
        fits = value.shape == shape if shape else value.dim() == 2 and value.shape[1] == 3
        _require(fits and value.dtype == kind, name, expected, value)
        _require_device(name, value, points.device, "points")
    frame_centers = _plain(frame_centers)
    intrinsics, cam2world = _check_cameras(intrinsics, cam2world, points.device, "points")
    near, sharpness = _check_near(near), check_sharpness(sharpness)
    working = torch.float64 if torch.float64 in (points.dtype, features.dtype, dtype) else torch.float32
    backend = choose_backend(points.device, working)
    tensors = (points, features, num_points, frame_ids, frame_centers, intrinsics, cam2world)
    if backend == "reference":
        return Readout(*reference.splat_aligned(*tensors, (height, width), near, sharpness, dtype, scales))
    operator = private_operator("splat_aligned", _family(backend))
    arguments = (*tensors, height, width, near, sharpness, dtype, bounds, scales)
    wanted = (features.requires_grad or points.requires_grad) and torch.is_grad_enabled()
    if torch.compiler.is_compiling() or wanted:
        return Readout(*operator(*arguments)[:4])
    with torch._C._AutoDispatchBelowAutograd():  # as in `splat`
        return Readout(*operator(*arguments)[:4])


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
    """The checks of :func:`cache_write` on its inputs; depth, intrinsics, cam2world and mask as kernels take them."""
    _require_tensor("latents", latents, "(T, C, h, w) float")
    _require(latents.dim() == 4, "latents", "(T, C, h, w) float", latents)
    _require_float("latents", latents, "(T, C, h, w) float32, float16 or bfloat16", FEATURE_DTYPES)
    size = check_size(tuple(latents.shape[2:]), "the grid of latents")
    depth, mask = _check_depth(depth, mask, size, depth_sampling)
    views = latents.shape[0]
    if depth.dtype == torch.float64:
        raise TypeError(f"depth must be (T, H, W) float32, float16 or bfloat16, got {_describe(depth)}")
    if depth.shape[0] != views:
        raise ValueError(f"depth must be (T, H, W) with the T of latents, {views}, got {_describe(depth)}")
    _require_device("depth", depth, latents.device, "latents")
    intrinsics, cam2world = _check_cameras(intrinsics, cam2world, latents.device, "latents")
    if intrinsics.shape[0] != views:
        raise ValueError(f"intrinsics must be (T, 3, 3) with the T of latents, {views}, got {_describe(intrinsics)}")
    if not (0 <= min_depth <= max_depth):
        raise ValueError(f"min_depth must be in [0, max_depth], got min_depth={min_depth!r}, max_depth={max_depth!r}")
    return depth, intrinsics, cam2world, mask


def _check_buffers(
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    count: Tensor,
    channels: int | None,
    device: torch.device | None,
    scales: Tensor | None,
    **bytes_per_token: Tensor | None,
) -> None:
    """Buffers of a cache, written in place; ``channels`` and ``device`` are those of what is written into them."""
    points = _check_points(points, None)
    capacity = points.shape[0]
    like = "points" if device is None else "latents"
    device = points.device if device is None else device
    for name, buffer in (("features", features), ("frame_ids", frame_ids), ("count", count), *bytes_per_token.items()):
        if buffer is not None or name not in ("votes", "looks"):
            _require_tensor(name, buffer, "written in place")
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
        _require(tuple(buffer.shape) == shape and buffer.dtype in dtypes, name, f"{shape} {kinds}", buffer)
        _require_device(name, buffer, device, like)
        _require_contiguous(name, buffer)
    _require(count.numel() == 1, "count", "one int64", count)
    _check_scales(features, scales, device, like)
    if scales is not None:
        _require_contiguous("scales", scales)


def _check_first_frame(first_frame: int, views: int) -> None:
    if not 0 <= first_frame or first_frame + views >= 2**31:
        raise ValueError(f"first_frame must be an int >= 0 with room for {views} frames in int32, got {first_frame!r}")


def cache_write(
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    count: Tensor,
    latents: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    *,
    scales: Tensor | None = None,
    mask: Tensor | None = None,
    bounds: Tensor | None = None,
    first_frame: int = 0,
    depth_sampling: str = "median",
    min_depth: float = 0.0,
    max_depth: float = math.inf,
) -> Tensor:
    """Lift the tokens of T views, keep those worth keeping, and append them to preallocated buffers, in place.

    Kept: static (``mask``), of known depth (see :func:`back_project`), within [``min_depth``, ``max_depth``], and with
    finite position and latents. They are appended in order of view, row, column: the same input gives the same bits. It
    never allocates room: what does not fit is counted as refused.

    Args:
        points: (capacity, 4) float32, written in place: x, y, z, footprint.
        features: (capacity, C) float32, float16, bfloat16 or float8_e4m3fn, written in place.
        frame_ids: (capacity,) int32, written in place: ``first_frame`` + t.
        count: one int64, the live tokens on entry and on return.
        latents: (T, C, h, w) float32, float16 or bfloat16.
        depth: (T, H, W) float, as in :func:`back_project`.
        intrinsics: (T, 3, 3) float, in pixels of the depth map.
        cam2world: (T, 4, 4) float.
        scales: (capacity,) uint8, written in place, with float8_e4m3fn features and only with them: a token is scaled
            by a power of two, so that its largest magnitude is within float8's 448 and none saturates
            (``reference.quantise_rows`` is the rule); one above 448 * 2^119, 2.98e38, counts as not finite.
        mask: (T, H', W') bool, True = static.
        bounds: as of :func:`block_bounds`, written in place: the boxes of the blocks appended to, and around them.
        first_frame: frame id of view 0.
        depth_sampling: ``"median"`` or ``"bilinear"``, as in :func:`back_project`.
        min_depth, max_depth: range of token depths kept, world units.

    Returns:
        (6,) int64 on the device: written, refused (no room), masked, unknown_depth, out_of_range, non_finite. Each
        token is counted once, under the first that applies of masked, unknown_depth, out_of_range, non_finite, refused,
        written.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; nothing has been written then.
    """
    depth, intrinsics, cam2world, mask = check_write_inputs(
        latents, depth, intrinsics, cam2world, mask, depth_sampling, min_depth, max_depth
    )
    _check_buffers(points, features, frame_ids, count, latents.shape[1], latents.device, scales)
    _check_first_frame(first_frame, latents.shape[0])
    points = _plain(points)
    bounds = _check_bounds(bounds, points, in_place=True)
    arguments = (points, _plain(features), frame_ids, count, _plain(latents), depth, intrinsics, cam2world, mask)
    backend = choose_backend(latents.device, torch.float32)
    if backend == "reference":
        return reference.cache_write(*arguments, first_frame, depth_sampling, min_depth, max_depth, bounds, scales)
    operator = private_operator("cache_write", _family(backend))
    return operator(*arguments, first_frame, depth_sampling == "bilinear", min_depth, max_depth, bounds, scales)


def block_bounds(points: Tensor, *, num_points: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Boxes of blocks of 256 consecutive points, and of 64 such blocks, by which reads pass over what no camera sees.

    Least x, y, z and greatest x, y, z over the live points of each block whose coordinates are finite (no camera sees
    the others); a block without any has +inf and -inf. Exact, and the same bits on every backend, with 0 for -0. With
    B = ceil(N / 256) blocks, row b < B is the box of points 256 b to 256 b + 255, row B + k that of blocks 64 k to
    64 k + 63.

    Args:
        points: (N, 4) float32: x, y, z, footprint.
        num_points: one int64 on the device of ``points``, read there: only so many first rows are live.
        out: (B + ceil(B / 64), 6) float32, written in place; None makes a new one.

    Returns:
        (B + ceil(B / 64), 6) float32, ``out`` where there is one. Not differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; nothing has been written then.
    """
    points = _check_points(points, num_points)
    if points.dtype != torch.float32:
        raise TypeError(f"points must be (N, 4) float32: x, y, z, footprint, got {_describe(points)}")
    if out is None:
        out = points.new_empty((reference.bounds_rows(points.shape[0]), 6))
    _check_bounds(out, points, "out", in_place=True)
    backend = choose_backend(points.device, torch.float32)
    if backend == "reference":
        reference.block_bounds(points, num_points, _plain(out))
    else:
        private_operator("block_bounds", _family(backend))(points, num_points, _plain(out))
    return out


def check_count(name: str, value: Any, least: int, most: int) -> int:
    """An int in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be an int from {least} to {most}, got {value!r}")
    return value


@functools.lru_cache(maxsize=16)
def _order(size: tuple[int, int], device: torch.device) -> Tensor:
    return reference.z_order(size).to(device)


def bounded_write(
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    votes: Tensor,
    count: Tensor,
    frame_centers: Tensor,
    latents: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    *,
    looks: Tensor | None = None,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
    mask: Tensor | None = None,
    first_frame: int = 0,
    depth_sampling: str = "median",
    min_depth: float = 0.0,
    max_depth: float = math.inf,
    near: float = NEAR,
    views_per_voxel: int = VIEWS_PER_VOXEL,
    carve_views: int = CARVE_VIEWS,
) -> Tensor:
    """Lift the tokens of T views and write what the buffers do not show yet, in place.

    Tokens are judged as by :func:`cache_write`. Then view after view, so that writing T views at once or one by one is
    the same:

    - An older token that projects into a cell of the view, within 10 % of the depth seen there, *shows* what the new
      token of that cell does when it fits the cell with a score of at most 0.2 (the score of :func:`splat_aligned`), or
      lacks at most 0.05 in scale and viewing ray, wherever in the cell it lies. The best of those is kept, and the new
      token is not written (``covered``); but the new one takes its place (``replaced``) where it is the same look (a
      score of at most 0.02), or one from 1.25 times as near or nearer. Given ``looks``, the two are averaged instead
      (``merged``), as the mean of up to 16 looks; the position moves only within its voxel.
    - What no token shows is ``written`` while its voxel holds fewer than ``views_per_voxel`` tokens, else ``refused``.
      A voxel's edge is the power of two that is nearest, as a ratio, to the token's footprint: scale-free. Tokens that
      come to one voxel in one view come in the order of a Z-order curve over the grid, as they are stored.
    - ``carve_views`` > 0: a view sees through a token that projects into a cell whose depth is more than 5 % behind it,
      where none of the four cells around shows anything within 5 % of its depth: neither by its least depth nor, where
      that belongs to something more than 5 % before the token, by its own. A token that so many views have seen through
      since a view last saw it in its place is ``carved`` by the last of them: marked dead, for :func:`cache_compact` to
      remove.

    Every decision is by minima, counts and ranks that no order of threads can change: the same bits on every backend.

    Args:
        points: (capacity, 4) float32, written in place: x, y, z, footprint.
        features: (capacity, C) float32, float16, bfloat16 or float8_e4m3fn, written in place.
        frame_ids: (capacity,) int32, written in place: the view that wrote a token last.
        votes: (capacity,) uint8, written in place: views that saw through a token; 255 marks a dead one.
        count: one int64, the rows in use on entry and on return, dead ones included.
        frame_centers: (F, 3) float32, camera centres by frame id, those of these views included.
        latents: (T, C, h, w) float32, float16 or bfloat16.
        depth: (T, H, W) float, as in :func:`back_project`.
        intrinsics: (T, 3, 3) float, in pixels of the depth map.
        cam2world: (T, 4, 4) float.
        looks: (capacity,) uint8, written in place: looks averaged in each token. None keeps tokens as they were seen.
        bounds: (B + ceil(B / 64), 6) float32, as of :func:`block_bounds`, written in place: what is far from the
            views is then passed over, by Triton only in reads that follow; no result changes.
        scales: (capacity,) uint8, written in place, with float8_e4m3fn features and only with them, as in
            :func:`cache_write`.
        mask: (T, H', W') bool, True = static.
        first_frame: frame id of view 0.
        depth_sampling: ``"median"`` or ``"bilinear"``, as in :func:`back_project`.
        min_depth, max_depth: range of token depths kept, world units.
        near: tokens nearer to a view than this, in world units, are not in it.
        views_per_voxel: tokens that a voxel holds at most, 1 to 64.
        carve_views: views that must see through a token, up to 254; 0 carves nothing.

    Returns:
        (11,) int64 on the device: written, replaced, merged, covered, refused, masked, unknown_depth, out_of_range,
        non_finite, of the new tokens, each counted once; carved and evicted (0), of those held before.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; nothing has been written then.
    """
    depth, intrinsics, cam2world, mask = check_write_inputs(
        latents, depth, intrinsics, cam2world, mask, depth_sampling, min_depth, max_depth
    )
    _require_tensor("votes", votes, "written in place")
    _check_buffers(
        points, features, frame_ids, count, latents.shape[1], latents.device, scales, votes=votes, looks=looks
    )
    _check_first_frame(first_frame, latents.shape[0])
    _require_tensor("frame_centers", frame_centers, "(F, 3) float32")
    expected = f"(F, 3) float32, at least {first_frame + latents.shape[0]} rows"
    fits = frame_centers.dim() == 2 and frame_centers.shape[1] == 3
    enough = fits and frame_centers.shape[0] >= first_frame + latents.shape[0]
    _require(enough and frame_centers.dtype == torch.float32, "frame_centers", expected, frame_centers)
    _require_device("frame_centers", frame_centers, latents.device, "latents")
    check_count("views_per_voxel", views_per_voxel, 1, MOST_VIEWS)
    check_count("carve_views", carve_views, 0, reference.DEAD - 1)
    near = _check_near(near)
    order = _order((latents.shape[2], latents.shape[3]), latents.device)
    held = (_plain(points), _plain(features), frame_ids, votes, looks, count, _plain(frame_centers))
    inputs = (_plain(latents), depth, intrinsics, cam2world, mask, order, first_frame)
    bounds = _check_bounds(bounds, points, in_place=True)
    rest = (min_depth, max_depth, near, views_per_voxel, carve_views, bounds, scales)
    backend = choose_backend(latents.device, torch.float32)
    if backend == "reference":
        return reference.bounded_write(*held, *inputs, depth_sampling, *rest)
    operator = private_operator("bounded_write", _family(backend))
    return operator(*held, *inputs, depth_sampling == "bilinear", *rest)


def cache_compact(
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    count: Tensor,
    *,
    votes: Tensor | None = None,
    looks: Tensor | None = None,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """Remove dead tokens, and the oldest of what is too many; the others move together, in order, in place.

    Evicted first: what was written, replaced or merged by the earliest view (the least frame id); within a view, the
    lowest row.

    Args:
        points, features, frame_ids, count, votes, looks, bounds, scales: as in :func:`bounded_write`; without ``votes``
            none is dead.
        max_tokens: how many may stay, >= 0; None: any number.

    Returns:
        One int64 on the device: the tokens evicted, dead ones not counted.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; nothing has changed then.
    """
    _check_buffers(points, features, frame_ids, count, None, None, scales, votes=votes, looks=looks)
    most = 2**62 if max_tokens is None else check_count("max_tokens", max_tokens, 0, 2**62)
    bounds = _check_bounds(bounds, points, in_place=True)
    arguments = (_plain(points), _plain(features), frame_ids, votes, looks, count, most, bounds, scales)
    backend = choose_backend(points.device, torch.float32)
    if backend == "reference":
        return reference.cache_compact(*arguments)
    return private_operator("cache_compact", _family(backend))(*arguments)


def view_overlap(
    points: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    target_intrinsics: Tensor,
    target_cam2world: Tensor,
    size: tuple[int, int],
    *,
    num_points: Tensor | None = None,
    bounds: Tensor | None = None,
    voxel_size: float = 0.1,
    near: float = NEAR,
) -> Tensor:
    """How much of what the target views see is also seen by each earlier view: IoU of voxel sets.

    A view's set holds the voxels floor(p / voxel_size) of the points that project into its grid in front of ``near``,
    occluded or not; the targets' set is the union over all target views (the published code's way of choosing reference
    frames, with voxels of 0.1). Computed on the device of ``points``, for all views at once, exactly.

    Args:
        points: (N, 4) float32 (float64 by the definition).
        intrinsics, cam2world: (V, 3, 3) and (V, 4, 4) float, the earlier views, in cells of the grid.
        target_intrinsics, target_cam2world: (T, 3, 3) and (T, 4, 4) float, likewise.
        size: (h, w) of the grid.
        num_points: one int64 on the device: only the first ``num_points`` rows are live.
        bounds: (B + ceil(B / 64), 6) float32, as for :func:`splat`: spares work, changes no result.
        voxel_size: edge in world units. Coordinates past 2^20 voxels from the origin share the border voxels.
        near: least depth, in world units.

    Returns:
        (V,) float32 in [0, 1]; 0 where neither sees anything.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    height, width = check_size(size)
    points = _check_points(points, num_points)
    bounds = _check_bounds(bounds, points)
    intrinsics, cam2world = _check_cameras(intrinsics, cam2world, points.device, "points")
    targets = _check_cameras(target_intrinsics, target_cam2world, points.device, "points", "target_")
    near = _check_near(near)
    if not 0 < voxel_size < math.inf:
        raise ValueError(f"voxel_size must be a finite length > 0 in world units, got {voxel_size!r}")
    backend = choose_backend(points.device, points.dtype)
    if backend == "reference":
        counts = reference.view_overlap(
            points, num_points, intrinsics, cam2world, *targets, (height, width), voxel_size, near
        )
    else:
        operator = private_operator("view_overlap", _family(backend))
        counts = operator(points, num_points, intrinsics, cam2world, *targets, height, width, voxel_size, near, bounds)
    return (counts[:, 0].double() / counts[:, 1].clamp(min=1).double()).float()

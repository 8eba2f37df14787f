"""`splat`: the nearest token of every cell, by a z-buffer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...constants import NEAR
from ...geometry import check_size
from ..checks import check_bounds, check_cameras, check_features, check_near, check_points
from ..operator import Autograd, Operator
from ..readout import Readout, fake_readout
from . import reference


def _fake(
    *, features: Tensor, cam2world: Tensor, height: int, width: int, dtype: torch.dtype, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_readout(features, cam2world.shape[0], height, width, dtype)


def _fake_backward(*, grad_latents: Tensor, num_points: int, dtype: torch.dtype, **_: Any) -> Tensor:
    return grad_latents.new_empty((num_points, grad_latents.shape[1]), dtype=dtype)


def _setup(ctx: Any, output: tuple[Tensor, ...], *, features: Tensor, **_: Any) -> None:
    mask, depth, index = output[1:]
    ctx.save_for_backward(index)
    ctx.num_points, ctx.dtype = features.shape[0], features.dtype
    ctx.mark_non_differentiable(mask, depth, index)


def _backward(ctx: Any, family: str, needed: set[str], grad_latents: Tensor, *unused: Any) -> dict[str, Tensor]:
    if "features" not in needed:
        return {}
    (index,) = ctx.saved_tensors
    gradient = SPLAT_BACKWARD.overloads[family](
        grad_latents=grad_latents.contiguous(), index=index, num_points=ctx.num_points, dtype=ctx.dtype
    )
    return {"features": gradient}


SPLAT_BACKWARD = Operator(
    "splat_backward",
    "(Tensor grad_latents, Tensor index, SymInt num_points, ScalarType dtype) -> Tensor",
    fake=_fake_backward,
    reference=reference.splat_backward,
    device="grad_latents",
    precision=("grad_latents", "dtype"),
)

launch = Operator(
    "splat",
    (
        "(Tensor points, Tensor features, Tensor? num_points, Tensor intrinsics, Tensor cam2world,"
        " SymInt height, SymInt width, float near, ScalarType dtype, Tensor? bounds=None, Tensor? scales=None)"
        " -> (Tensor latents, Tensor mask, Tensor depth, Tensor index)"
    ),
    fake=_fake,
    reference=reference.splat,
    device="points",
    precision=("points", "features", "dtype"),
    autograd=Autograd(("features",), _setup, _backward),
    result=Readout._make,
).launch


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
        :class:`Readout`. ``latents`` carries a gradient to ``features``, deterministic too. Nothing else carries or
        gets one: points, cameras and float8_e4m3fn features may not ask for it. Kernels have no second derivative.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: in the backward pass, a second derivative was asked for that a kernel does not have.
    """
    height, width = check_size(size)
    points = check_points(points, num_points)
    bounds = check_bounds(bounds, points)
    dtype = check_features(features, scales, points, dtype)
    intrinsics, cam2world = check_cameras(intrinsics, cam2world, points.device, "points")
    return launch(
        points=points,
        features=features,
        num_points=num_points,
        intrinsics=intrinsics,
        cam2world=cam2world,
        height=height,
        width=width,
        near=check_near(near),
        dtype=dtype,
        bounds=bounds,
        scales=scales,
    )

"""`splat_aligned`: a blend of the tokens that are aligned best with every cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...constants import BLEND_TOKENS, NEAR, SHARPNESS
from ...geometry import check_size
from ..checks import (
    check_bounds,
    check_cameras,
    check_features,
    check_near,
    check_points,
    check_sharpness,
    plain,
    require,
    require_device,
    require_tensor,
)
from ..operator import Autograd, Operator
from ..readout import Readout, fake_readout
from . import reference


def _fake(
    *, features: Tensor, cam2world: Tensor, height: int, width: int, dtype: torch.dtype, **_: Any
) -> tuple[Tensor, ...]:
    views = cam2world.shape[0]
    keys = features.new_empty((views, height, width, BLEND_TOKENS), dtype=torch.int64)
    return (*fake_readout(features, views, height, width, dtype), keys)


def _fake_backward(
    *, points: Tensor, features: Tensor, of_points: bool, scales: Tensor | None, **_: Any
) -> tuple[Tensor, Tensor]:
    count = points.shape[0]
    return (
        # Features with scales have no gradient.
        features.new_empty((count if scales is None else 0, features.shape[1])),
        points.new_empty((count if of_points else 0, 4), dtype=torch.float32),
    )


def _setup(ctx: Any, output: tuple[Tensor, ...], *, sharpness: float, **arguments: Any) -> None:
    mask, depth, index, keys = output[1:]
    names = ("points", "features", "frame_ids", "frame_centers", "intrinsics", "cam2world", "scales")
    ctx.save_for_backward(keys, *(arguments[name] for name in names))
    ctx.names, ctx.sharpness = ("keys", *names), sharpness
    ctx.mark_non_differentiable(mask, depth, index, keys)


def _backward(ctx: Any, family: str, needed: set[str], grad_latents: Tensor, *unused: Any) -> dict[str, Tensor]:
    if not needed & {"points", "features"}:
        return {}
    grad_features, grad_points = SPLAT_ALIGNED_BACKWARD.overloads[family](
        grad_latents=grad_latents.contiguous(),
        sharpness=ctx.sharpness,
        of_points="points" in needed,
        **dict(zip(ctx.names, ctx.saved_tensors, strict=True)),
    )
    gradients = {"features": grad_features, "points": grad_points}
    return {name: gradient for name, gradient in gradients.items() if name in needed}


def _readout(results: tuple[Tensor, ...]) -> Readout:
    # The kernels also return the keys that the backward pass starts from.
    return Readout._make(results[:4])


SPLAT_ALIGNED_BACKWARD = Operator(
    "splat_aligned_backward",
    (
        "(Tensor grad_latents, Tensor points, Tensor features, Tensor frame_ids, Tensor frame_centers,"
        " Tensor intrinsics, Tensor cam2world, Tensor keys, float sharpness, bool of_points,"
        " Tensor? scales=None) -> (Tensor grad_features, Tensor grad_points)"
    ),
    fake=_fake_backward,
    device="grad_latents",
)

launch = Operator(
    "splat_aligned",
    (
        "(Tensor points, Tensor features, Tensor? num_points, Tensor frame_ids, Tensor frame_centers,"
        " Tensor intrinsics, Tensor cam2world, SymInt height, SymInt width, float near, float sharpness,"
        " ScalarType dtype, Tensor? bounds=None, Tensor? scales=None)"
        " -> (Tensor latents, Tensor mask, Tensor depth, Tensor index, Tensor keys)"
    ),
    fake=_fake,
    reference=reference.splat_aligned,
    device="points",
    precision=("points", "features", "dtype"),
    autograd=Autograd(("points", "features"), _setup, _backward),
    result=_readout,
).launch


def check_frames(frame_ids: Tensor, frame_centers: Tensor, points: Tensor) -> None:
    """Check which frame wrote each token, and the centres of the writing cameras."""
    for name, value, shape, kind in (
        ("frame_ids", frame_ids, (points.shape[0],), torch.int32),
        ("frame_centers", frame_centers, None, torch.float32),
    ):
        expected = "(N,) int32 with the N of points" if shape else "(F, 3) float32"
        require_tensor(name, value, expected)
        right = value.shape == shape if shape else value.dim() == 2 and value.shape[1] == 3
        require(right and value.dtype == kind, name, expected, value)
        require_device(name, value, points.device, "points")


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
    """Splat tokens onto the latent grids of T cameras: a cell shows what is aligned best, not what is nearest.

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
    on every backend, run and thread count (except which NaN a NaN turns into). On a GPU it neither waits for the
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
        sharpness: how much better a score must be to count for more; a number >= 0, or infinity.
        dtype: of the latents, any of these but float8_e4m3fn; default that of ``features``, bfloat16 for float8_e4m3fn.

    Returns:
        :class:`Readout`. ``depth`` and ``index`` are those of the best aligned token. ``latents`` carries gradients to
        ``features`` and, with the choice of tokens held fixed, to ``points``; they are deterministic too, equal on
        every backend up to rounding. Nothing else carries or gets one: cameras and float8_e4m3fn features may not ask
        for it. Kernels have no second derivative.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: in the backward pass, tokens that it needs have been overwritten since, or a second derivative was
            asked for that a kernel does not have.
    """
    height, width = check_size(size)
    points = check_points(points, num_points, differentiable=True)
    bounds = check_bounds(bounds, points)
    dtype = check_features(features, scales, points, dtype)
    check_frames(frame_ids, frame_centers, points)
    frame_centers = plain(frame_centers)
    intrinsics, cam2world = check_cameras(intrinsics, cam2world, points.device, "points")
    return launch(
        points=points,
        features=features,
        num_points=num_points,
        frame_ids=frame_ids,
        frame_centers=frame_centers,
        intrinsics=intrinsics,
        cam2world=cam2world,
        height=height,
        width=width,
        near=check_near(near),
        sharpness=check_sharpness(sharpness),
        dtype=dtype,
        bounds=bounds,
        scales=scales,
    )

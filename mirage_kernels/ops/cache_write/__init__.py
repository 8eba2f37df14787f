"""`cache_write`: lift tokens and append those worth keeping, in place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...constants import APPEND_REPORT
from ..checks import check_bounds, check_buffers, check_first_frame, check_write_inputs, plain
from ..operator import Operator
from . import reference


def _fake(*, points: Tensor, **_: Any) -> Tensor:
    return points.new_empty((len(APPEND_REPORT),), dtype=torch.int64)


launch = Operator(
    "cache_write",
    (
        "(Tensor(a!) points, Tensor(b!) features, Tensor(c!) frame_ids, Tensor(d!) count, Tensor latents, Tensor depth,"
        " Tensor intrinsics, Tensor cam2world, Tensor? mask, int first_frame, bool bilinear,"
        " float min_depth, float max_depth, Tensor(e!)? bounds=None, Tensor(f!)? scales=None) -> Tensor"
    ),
    fake=_fake,
    reference=reference.cache_write,
    device="latents",
).launch


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
    never allocates room: what does not fit is counted as refused. A write is no part of a graph: what is written may
    not ask for a gradient, and a backward pass that needs what was overwritten raises an error.

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
            (``quantization.quantize_rows`` is the rule); one above 448 * 2^119, 2.98e38, counts as not finite.
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
    check_buffers(points, features, frame_ids, count, latents.shape[1], latents.device, scales)
    check_first_frame(first_frame, latents.shape[0])
    bounds = check_bounds(bounds, points, in_place=True)
    return launch(
        points=plain(points),
        features=plain(features),
        frame_ids=frame_ids,
        count=count,
        latents=plain(latents),
        depth=depth,
        intrinsics=intrinsics,
        cam2world=cam2world,
        mask=mask,
        first_frame=first_frame,
        bilinear=depth_sampling == "bilinear",
        min_depth=min_depth,
        max_depth=max_depth,
        bounds=bounds,
        scales=scales,
    )

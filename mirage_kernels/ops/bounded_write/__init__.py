"""`bounded_write`: lift tokens and write what the buffers do not show yet, in place."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...constants import CARVE_VIEWS, INVALID, MAX_VIEWS_PER_VOXEL, NEAR, VIEWS_PER_VOXEL, WRITE_REPORT
from ...geometry import z_order
from ..checks import (
    check_bounds,
    check_buffers,
    check_count,
    check_first_frame,
    check_near,
    check_write_inputs,
    plain,
    require,
    require_device,
    require_tensor,
)
from ..operator import Operator
from . import reference


def _fake(*, points: Tensor, **_: Any) -> Tensor:
    return points.new_empty((len(WRITE_REPORT),), dtype=torch.int64)


launch = Operator(
    "bounded_write",
    (
        "(Tensor(a!) points, Tensor(b!) features, Tensor(c!) frame_ids, Tensor(d!) free_space_violations,"
        " Tensor(e!)? num_observations,"
        " Tensor(f!) count, Tensor frame_centers, Tensor latents, Tensor depth, Tensor intrinsics, Tensor cam2world,"
        " Tensor? mask, Tensor order, int first_frame, bool bilinear, float min_depth, float max_depth, float near,"
        " int views_per_voxel, int carve_views, Tensor(g!)? bounds=None, Tensor(h!)? scales=None) -> Tensor"
    ),
    fake=_fake,
    reference=reference.bounded_write,
    device="latents",
).launch


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # it outlives any
def cell_order(size: tuple[int, int], device: torch.device) -> Tensor:
    """Return the order in which the cells of a grid are written, :func:`~mirage_kernels.geometry.z_order`."""
    return z_order(size).to(device)


def bounded_write(
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    free_space_violations: Tensor,
    count: Tensor,
    frame_centers: Tensor,
    latents: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    *,
    num_observations: Tensor | None = None,
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

    Tokens are classified as by :func:`cache_write`. Then view after view, so that writing T views at once or one by one
    is the same:

    - An older token that projects into a cell of the view, within 10 % of the depth seen there, *shows* what the new
      token of that cell does when its score there (that of :func:`splat_aligned`) is at most 0.2, or its score bias, of
      scale and viewing ray, at most 0.05, wherever in the cell it lies. The best of those is kept, and the new token is
      not written (``covered``); but the new one takes its place (``replaced``) where it is the same observation (a
      score of at most 0.02), or one from 1.25 times as near or nearer. Given ``num_observations``, the two are averaged
      instead (``merged``), as the mean of up to 16 observations; the position moves only within its voxel.
    - What no token shows is ``written`` while its voxel holds fewer than ``views_per_voxel`` tokens, else ``refused``.
      A voxel's edge is the power of two that is nearest, as a ratio, to the token's footprint: scale-free. Tokens that
      come to one voxel in one view come in the order of a Z-order curve over the grid, as they are stored.
    - ``carve_views`` > 0: a view sees through a token that projects into a cell whose depth is more than 5 % behind it,
      where none of the four cells around shows anything within 5 % of its depth: neither by its least depth nor, where
      that belongs to something more than 5 % before the token, by its own. A token that so many views have seen through
      since a view last saw it in its place is ``carved`` by the last of them: marked invalid, for
      :func:`cache_compact` to remove.

    Every decision is by minima, counts and ranks that no order of threads can change: the same bits on every backend.
    As to gradients, see :func:`cache_write`.

    Args:
        points: (capacity, 4) float32, written in place: x, y, z, footprint.
        features: (capacity, C) float32, float16, bfloat16 or float8_e4m3fn, written in place.
        frame_ids: (capacity,) int32, written in place: the view that wrote a token last.
        free_space_violations: (capacity,) uint8, written in place: views that saw through a token; 255 marks an invalid
            one.
        count: one int64, the rows in use on entry and on return, invalid ones included.
        frame_centers: (F, 3) float32, camera centres by frame id, those of these views included.
        latents: (T, C, h, w) float32, float16 or bfloat16.
        depth: (T, H, W) float, as in :func:`back_project`.
        intrinsics: (T, 3, 3) float, in pixels of the depth map.
        cam2world: (T, 4, 4) float.
        num_observations: (capacity,) uint8, written in place: observations averaged in each token. None keeps tokens as
            they were seen.
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
    require_tensor("free_space_violations", free_space_violations, "written in place")
    check_buffers(
        points,
        features,
        frame_ids,
        count,
        latents.shape[1],
        latents.device,
        scales,
        free_space_violations=free_space_violations,
        num_observations=num_observations,
    )
    check_first_frame(first_frame, latents.shape[0])
    require_tensor("frame_centers", frame_centers, "(F, 3) float32")
    expected = f"(F, 3) float32, at least {first_frame + latents.shape[0]} rows"
    enough = frame_centers.dim() == 2 and frame_centers.shape[1] == 3
    enough = enough and frame_centers.shape[0] >= first_frame + latents.shape[0]
    require(enough and frame_centers.dtype == torch.float32, "frame_centers", expected, frame_centers)
    require_device("frame_centers", frame_centers, latents.device, "latents")
    check_count("views_per_voxel", views_per_voxel, 1, MAX_VIEWS_PER_VOXEL)
    check_count("carve_views", carve_views, 0, INVALID - 1)
    bounds = check_bounds(bounds, points, in_place=True)
    return launch(
        points=plain(points),
        features=plain(features),
        frame_ids=frame_ids,
        free_space_violations=free_space_violations,
        num_observations=num_observations,
        count=count,
        frame_centers=plain(frame_centers),
        latents=plain(latents),
        depth=depth,
        intrinsics=intrinsics,
        cam2world=cam2world,
        mask=mask,
        order=cell_order((latents.shape[2], latents.shape[3]), latents.device),
        first_frame=first_frame,
        bilinear=depth_sampling == "bilinear",
        min_depth=min_depth,
        max_depth=max_depth,
        near=check_near(near),
        views_per_voxel=views_per_voxel,
        carve_views=carve_views,
        bounds=bounds,
        scales=scales,
    )

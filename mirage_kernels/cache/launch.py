"""The operators on the buffers of a cache: what is passed to each.

In: buffers, and arguments that :class:`~mirage_kernels.LatentCache` has checked. Out: what the operator returns.
Nothing here is checked again, neither those arguments nor what the cache guarantees of its own buffers.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..cameras import Cameras
from ..constants import INVALID, MAX_VIEWS_PER_VOXEL, WRITE_REPORT
from ..ops import Readout
from ..ops.bounded_write import cell_order
from ..ops.bounded_write import launch as launch_bounded_write
from ..ops.cache_compact import launch as launch_cache_compact
from ..ops.cache_write import launch as launch_cache_write
from ..ops.checks import plain
from ..ops.splat import launch as launch_splat
from ..ops.splat_aligned import launch as launch_splat_aligned
from ..ops.view_overlap import launch as launch_view_overlap
from .buffers import TokenBuffers, find_bounds
from .config import CacheConfig
from .offload import Offloaded, rows_of
from .voxels import limit_voxels

_NO_LIMIT = 2**62


class Tokens(Protocol):
    """Tokens to read: all of the buffers, or some."""

    @property
    def points(self) -> Tensor: ...
    @property
    def features(self) -> Tensor: ...
    @property
    def frame_ids(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor | None: ...
    @property
    def frame_centers(self) -> Tensor: ...
    @property
    def bounds(self) -> Tensor: ...
    @property
    def count(self) -> Tensor | None: ...


def read_aligned(
    buffers: Tokens,
    intrinsics: Tensor,
    cam2world: Tensor,
    size: tuple[int, int],
    near: float,
    sharpness: float,
    dtype: torch.dtype,
) -> Readout:
    """Read a blend of the tokens that are aligned best with each cell, see :func:`mirage_kernels.splat_aligned`."""
    readout: Readout = launch_splat_aligned(
        points=buffers.points,
        features=buffers.features,
        num_points=buffers.count,
        frame_ids=buffers.frame_ids,
        frame_centers=buffers.frame_centers,
        intrinsics=intrinsics,
        cam2world=cam2world,
        height=size[0],
        width=size[1],
        near=near,
        sharpness=sharpness,
        dtype=dtype,
        bounds=buffers.bounds,
        scales=buffers.scales,
    )
    return readout


def read_nearest(
    buffers: Tokens,
    intrinsics: Tensor,
    cam2world: Tensor,
    size: tuple[int, int],
    near: float,
    dtype: torch.dtype,
) -> Readout:
    """Read the nearest token of each cell, see :func:`mirage_kernels.splat`."""
    readout: Readout = launch_splat(
        points=buffers.points,
        features=buffers.features,
        num_points=buffers.count,
        intrinsics=intrinsics,
        cam2world=cam2world,
        height=size[0],
        width=size[1],
        near=near,
        dtype=dtype,
        bounds=buffers.bounds,
        scales=buffers.scales,
    )
    return readout


def write(
    buffers: TokenBuffers,
    config: CacheConfig,
    offloaded: Offloaded | None,
    *,
    latents: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    mask: Tensor | None,
    bilinear: bool,
    min_depth: float,
    max_depth: float,
    near: float,
) -> tuple[Tensor, Offloaded | None]:
    """Make room, write T views, and remove what the config does not want kept.

    Returns:
        The counts of :class:`WriteReport`, and what is off the device then.
    """
    views, size = latents.shape[0], (latents.shape[2], latents.shape[3])
    tokens = views * size[0] * size[1]
    buffers.reserve(tokens)
    buffers.reserve_frames(views)
    buffers.frame_centers[buffers.num_frames : buffers.num_frames + views] = cam2world[:, :3, 3]
    violations = buffers.free_space_violations
    held, kept = _written_in_place(buffers)
    views_of: dict[str, Any] = dict(
        latents=latents,
        depth=depth,
        intrinsics=intrinsics,
        cam2world=cam2world,
        mask=mask,
        first_frame=buffers.num_frames,
        bilinear=bilinear,
        min_depth=min_depth,
        max_depth=max_depth,
    )
    if violations is not None:
        bounded = partial(
            launch_bounded_write,
            **held,
            **kept,
            frame_centers=plain(buffers.frame_centers),
            order=cell_order(size, latents.device),
            near=near,
            carve_views=config.carve_views if config.carve else 0,
        )
        counts: Tensor
        if config.voxel_size is None:
            counts = bounded(**views_of, views_per_voxel=config.views_per_voxel)
        else:
            counts = latents.new_zeros(len(WRITE_REPORT), dtype=torch.int64)
            for t in range(views):
                live, frame = buffers.count_live(), buffers.num_frames + t
                one = {name: x[t : t + 1] if isinstance(x, Tensor) else x for name, x in views_of.items()}
                counts += bounded(**{**one, "first_frame": frame}, views_per_voxel=MAX_VIEWS_PER_VOXEL)
                counts += limit_voxels(buffers, config, live, frame)
        if offloaded is not None:
            # Invalid tokens are all on the device: what is off it moves up by those before it.
            valid = torch.nn.functional.pad((violations != INVALID).cumsum(0), (1, 0))
            offloaded = offloaded._replace(before=valid[offloaded.before])
    else:
        appended = launch_cache_write(**held, **views_of)
        counts = appended.new_zeros(len(WRITE_REPORT))
        # Slices: a list of places would be copied to the device, and no graph could capture the write.
        counts[:1], counts[4:9] = appended[:1], appended[1:]
    if config.changes_in_place:
        counts[-1] = compact(buffers, config)
    buffers.num_frames += views
    buffers.max_live = min(buffers.max_live + tokens, buffers.rows)
    return counts, offloaded


def compact(buffers: TokenBuffers, config: CacheConfig) -> Tensor:
    """Remove invalid tokens, and the oldest beyond what the config allows; return how many of the latter."""
    held, kept = _written_in_place(buffers)
    max_tokens = _NO_LIMIT if config.max_tokens is None else config.max_tokens
    evicted: Tensor = launch_cache_compact(**held, **kept, max_tokens=max_tokens)
    return evicted


def _written_in_place(buffers: TokenBuffers) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what any write changes in place, and what a bounded write does besides."""
    held = dict(
        points=plain(buffers.points),
        features=plain(buffers.features),
        frame_ids=buffers.frame_ids,
        count=buffers.count,
        bounds=buffers.bounds,
        scales=buffers.scales,
    )
    kept = dict(free_space_violations=buffers.free_space_violations, num_observations=buffers.num_observations)
    return held, kept


def view_overlap(
    buffers: TokenBuffers,
    offloaded: Offloaded | None,
    touched: set[int],
    cameras: Cameras,
    targets: Cameras,
    voxel_size: float,
    near: float,
) -> Tensor:
    """Measure the overlap of views, whose image size is the grid; of the host's runs the `touched` ones count too."""
    points, count, bounds = buffers.points, buffers.count, buffers.bounds
    if offloaded is not None:
        runs = [rows_of(offloaded.runs[k], buffers)["points"] for k in touched]
        brought = (rows.to(buffers.device, non_blocking=True) for rows in runs)
        points = torch.cat([points[: buffers.count_live()], *brought])
        count, bounds = torch.full_like(count, len(points)), find_bounds(points, None)
    height, width = cameras.image_size
    overlap: Tensor = launch_view_overlap(
        points=plain(points),
        num_points=count,
        intrinsics=cameras.intrinsics,
        cam2world=cameras.cam2world,
        target_intrinsics=targets.intrinsics,
        target_cam2world=targets.cam2world,
        height=height,
        width=width,
        voxel_size=voxel_size,
        near=near,
        bounds=bounds,
    )
    return overlap

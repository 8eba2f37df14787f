"""Writing points that come from no depth map: surfels, a scan, another system's cloud.

In: points with features, checked. Out: the counts of a :class:`WriteReport`. There is no view here that could tell what
is covered or seen through, so a bounded cache keeps to what voxels hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..constants import WRITE_REPORT
from ..ops.checks import (
    FEATURE_DTYPES,
    check_first_frame,
    plain,
    refuse_gradient,
    require,
    require_device,
    require_dtype,
    require_tensor,
)
from ..quantization import storable, store_rows
from . import launch
from .buffers import TokenBuffers
from .config import CacheConfig
from .inputs import Array, as_tensor
from .voxels import has_room


class LoosePoints(NamedTuple):
    """Hold tokens to be written, and the view that they belong to."""

    points: Tensor
    """(N, 4) float64: x, y, z, footprint, world coordinates"""
    features: Tensor
    """(N, C) float"""
    frame: int
    center: Tensor | None
    """(3,) float64 of the camera of a view that is new; None: unknown"""


def as_points(
    points: Array,
    features: Array,
    footprint: float | Array,
    frame: int | None,
    center: Array | Sequence[float] | None,
    channels: int,
    num_frames: int,
    device: torch.device,
) -> LoosePoints:
    """Check the arguments of :meth:`LatentCache.write_points`; looks at the footprints' values.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    rows: list[Tensor] = []
    for name, value, width in (("points", points, 3), ("features", features, channels)):
        tensor, expected = as_tensor(name, value, device), f"(N, {width}) float"
        require_tensor(name, tensor, expected)
        require(tensor.dim() == 2 and tensor.shape[1] == width, name, expected, tensor)
        require_dtype(name, tensor, expected, (torch.float64, *FEATURE_DTYPES))
        require_device(name, tensor, device, "the cache")
        tensor = refuse_gradient(name, tensor)
        wide = tensor.dtype == torch.float64
        rows.append(plain(tensor, torch.float64 if name == "points" else torch.float32 if wide else None))
    count = rows[0].shape[0]
    if rows[1].shape[0] != count:
        raise ValueError(f"features must be ({count}, {channels}) like points, got {tuple(rows[1].shape)}")
    sizes = torch.as_tensor(as_tensor("footprint", footprint, device), dtype=torch.float32, device=device)
    if sizes.shape not in ((), (count,)) or not bool(((sizes > 0) & (sizes < torch.inf)).all()):
        got = repr(footprint) if sizes.dim() == 0 else f"{tuple(sizes.shape)} from {sizes.min():g} to {sizes.max():g}"
        raise ValueError(f"footprint must be a length > 0 in world units, one for all points or ({count},), got {got}")
    known = frame is None or (isinstance(frame, int) and not isinstance(frame, bool) and 0 <= frame < num_frames)
    if not known:
        raise ValueError(f"frame must be None or the number of one of the {num_frames} views written, got {frame!r}")
    at = None
    if center is not None:
        if frame is not None:
            raise ValueError(f"center must be None where frame is given, whose centre is known, got {center!r}")
        at = torch.as_tensor(as_tensor("center", center, device), dtype=torch.float64, device=device)
        if at.shape != (3,) or not bool(torch.isfinite(at).all()):
            raise ValueError(f"center must be (3,) finite world coordinates, got {center!r}")
    if frame is None:
        check_first_frame(num_frames, 1)
    packed = torch.cat([rows[0], sizes.detach().double().expand(count)[:, None]], 1)
    return LoosePoints(packed, rows[1], num_frames if frame is None else frame, at)


def write_points(buffers: TokenBuffers, config: CacheConfig, new: LoosePoints) -> Tensor:
    """Append tokens, by the rules of :meth:`LatentCache.write_points`; waits for the device.

    Returns:
        (11,) int64, the counts of :class:`WriteReport`.
    """
    report = dict.fromkeys(WRITE_REPORT, 0)
    points, features = buffers.from_world(new.points), new.features
    finite = torch.isfinite(points).all(1) & storable(features, config.dtype).all(1)
    rows = finite.nonzero()[:, 0]
    report["non_finite"] = len(points) - len(rows)
    live = buffers.count_live()
    if config.bounded:
        rows = rows[has_room(buffers.points[:live], points[rows], config)]
    buffers.reserve(len(rows))
    rows = rows[: buffers.rows - live]
    report["written"] = len(rows)
    report["refused"] = len(points) - report["non_finite"] - len(rows)
    if new.frame == buffers.num_frames:
        buffers.reserve_frames(1)
        buffers.frame_centers[new.frame] = torch.nan if new.center is None else buffers.from_world(new.center)
        buffers.num_frames += 1
    end = live + len(rows)
    buffers.points[live:end], buffers.frame_ids[live:end] = points[rows], new.frame
    store_rows(buffers.features, buffers.scales, slice(live, end), features[rows])
    if buffers.free_space_violations is not None:
        buffers.free_space_violations[live:end] = 0
    if buffers.num_observations is not None:
        buffers.num_observations[live:end] = 1
    buffers.set_live(end)
    counts = torch.tensor(list(report.values()), device=points.device)
    if config.changes_in_place:
        counts[-1] = launch.compact(buffers, config)
    return counts

"""Reads of a part of the tokens, and which tokens a view shows.

In: the buffers of a cache, and what renders tokens. Out: readouts whose rows are those of the buffers. All of it waits
for the device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cameras import Cameras
from ..geometry import in_view, make_projection, project_points
from ..ops import Readout
from .buffers import TokenBuffers, find_bounds


@dataclass(frozen=True)
class TokenRows:
    """Hold some rows of the buffers, as the operators take them."""

    points: Tensor
    features: Tensor
    frame_ids: Tensor
    scales: Tensor | None
    frame_centers: Tensor
    bounds: Tensor
    count: None = None
    """All rows are live."""


def check_frames(frames: Iterable[int], num_frames: int) -> list[int]:
    """Check numbers of written views.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    try:
        numbers = [operator.index(frame) for frame in frames]
    except TypeError:
        raise TypeError(f"frames must be ints, numbers of written views, got {frames!r}") from None
    for number in numbers:
        if not 0 <= number < num_frames:
            raise ValueError(f"frames must be numbers of the {num_frames} views written, from 0 on, got {number}")
    return numbers


def read_frames(
    buffers: TokenBuffers, frames: Sequence[int], per_frame: bool, render: Callable[[TokenRows], Readout]
) -> Readout:
    """Render the tokens that some frames wrote: those of all together, or with a leading axis those of each apart."""
    ids = buffers.frame_ids[: buffers.count_live()]
    if not per_frame:
        chosen = torch.zeros(buffers.num_frames, dtype=torch.bool)
        chosen[list(frames)] = True
        rows = chosen.to(ids.device)[ids.long()].nonzero()[:, 0]
        readout = render(_take(buffers, rows))
        return readout._replace(index=_rows_of(readout.index, rows))
    # Tokens of appending writes are in the order of their frames already: slices then, and no copy.
    order = None if bool((ids[1:] >= ids[:-1]).all()) else ids.argsort(stable=True)
    grouped = ids if order is None else ids[order]
    numbers = torch.arange(buffers.num_frames + 1, dtype=ids.dtype, device=ids.device)
    starts: list[int] = torch.searchsorted(grouped, numbers).tolist()
    readouts = []
    for frame in frames:
        part = slice(starts[frame], starts[frame + 1])
        rows = torch.arange(part.start, part.stop, device=ids.device) if order is None else order[part]
        readout = render(_take(buffers, part if order is None else rows))
        readouts.append(readout._replace(index=_rows_of(readout.index, rows)))
    if not readouts:  # shapes and dtypes are those of any readout
        return Readout._make(field[None][:0] for field in render(_take(buffers, slice(0, 0))))
    return Readout._make(torch.stack(fields) for fields in zip(*readouts, strict=True))


def _take(buffers: TokenBuffers, rows: slice | Tensor) -> TokenRows:
    points = buffers.points[rows]
    features = buffers.features
    if not isinstance(rows, slice) and buffers.scales is not None:  # float8 cannot be gathered everywhere, bytes can
        features = features.view(torch.uint8)[rows].view(features.dtype)
    else:
        features = features[rows]
    return TokenRows(
        points=points,
        features=features,
        frame_ids=buffers.frame_ids[rows],
        scales=None if buffers.scales is None else buffers.scales[rows],
        frame_centers=buffers.frame_centers,
        bounds=find_bounds(points, None),
    )


def _rows_of(index: Tensor, rows: Tensor) -> Tensor:
    """Turn places among the rows into these rows; -1 stays."""
    if len(rows) == 0:
        return index
    return torch.where(index < 0, index, rows[index.clamp(min=0)])


def winners(index: Tensor, tokens: int) -> Tensor:
    """Turn the rows that T views show (T, h, w), -1 in holes, into (T, tokens) bool."""
    shown = torch.zeros(index.shape[0], tokens + 1, dtype=torch.bool, device=index.device)
    return shown.scatter_(1, torch.where(index < 0, tokens, index).flatten(1), True)[:, :tokens]


def near_the_surface(points: Tensor, depth: Tensor, cameras: Cameras, near: float, tolerance: float) -> Tensor:
    """Return (T, N) bool: which points (N, 4) lie in a cell of T views, at most so much deeper than it shows.

    Args:
        depth: (T, h, w), of the nearest token of each cell.
        cameras: T views, whose image size is the grid.
        tolerance: as a part of the depth shown.
    """
    size = cameras.image_size
    shown = torch.zeros(len(depth), len(points), dtype=torch.bool, device=points.device)
    for t, projection in enumerate(make_projection(cameras.intrinsics, cameras.cam2world, points.dtype)):
        u, v, z = project_points(points, projection)
        visible = in_view(u, v, z, size, near)
        u, v = torch.where(visible, u, 0.0), torch.where(visible, v, 0.0)
        shown[t] = visible & (z <= (1.0 + tolerance) * depth[t][v.long(), u.long()])
    return shown

"""What voxels hold: which of the tokens that come to them find room.

In: buffers and the config of a bounded cache. Out: masks and counts. Voxels are those of :func:`bounded_write`, of
about a token's size, or cubes of a fixed edge where the config names one, counted from where positions are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..constants import INVALID, WRITE_REPORT
from ..geometry import token_voxels, voxel_keys
from .buffers import TokenBuffers
from .config import CacheConfig


def has_room(held: Tensor, points: Tensor, config: CacheConfig) -> Tensor:
    """Return (N,) bool: whether the voxel of each point (N, 4) has room beside those held, first come, first served."""
    if len(points) == 0:
        return torch.ones(0, dtype=torch.bool, device=points.device)
    taken, sought = _keys(held, config), _keys(points, config)
    order = sought.argsort(stable=True)
    sought = sought[order]
    first = torch.searchsorted(sought, sought)
    at = torch.searchsorted(sought, taken).clamp(max=len(sought) - 1)
    numbers = at[sought[at] == taken].bincount(minlength=len(sought))
    before = numbers[first] + torch.arange(len(sought), device=sought.device) - first
    room = torch.empty(len(sought), dtype=torch.bool, device=sought.device)
    room[order] = before < config.views_per_voxel
    return room


def limit_voxels(buffers: TokenBuffers, config: CacheConfig, live: int, frame: int) -> Tensor:
    """Mark as invalid what a view has brought to voxels that were full; waits for the device.

    Args:
        live: rows in use before the view was written.
        frame: of the view.

    Returns:
        (11,) int64 to be added to the view's counts.
    """
    assert buffers.free_space_violations is not None
    end = buffers.count_live()
    violations, points = buffers.free_space_violations[:end], buffers.points[:end]
    valid = violations != INVALID
    brought = valid & (buffers.frame_ids[:end] == frame)
    rows = brought.nonzero()[:, 0]
    refused = rows[~has_room(points[valid & ~brought], points[rows], config)]
    violations[refused] = INVALID
    added = int((refused >= live).sum())
    changed = "replaced" if buffers.num_observations is None else "merged"
    counts = {"written": -added, changed: added - len(refused), "refused": len(refused)}
    return torch.tensor([counts.get(name, 0) for name in WRITE_REPORT], device=buffers.device)


def _keys(points: Tensor, config: CacheConfig) -> Tensor:
    return token_voxels(points) if config.voxel_size is None else voxel_keys(points, config.voxel_size)

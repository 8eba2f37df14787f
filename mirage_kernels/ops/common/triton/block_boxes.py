"""Boxes of blocks of tokens and of tiles of blocks, a program each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ....constants import BLOCK_TOKENS, TILE_BLOCKS
from .camera import is_finite, load_points
from .launching import EXACT, cdiv, device_of


@triton.jit
def store_side(side, coordinate, counts, SIDE: tl.constexpr):
    # Adding 0 makes 0 of -0, whose place among zeros is anyone's guess.
    tl.store(side + SIDE, tl.min(tl.where(counts, coordinate, float("inf")), axis=0) + 0.0)
    tl.store(side + 3 + SIDE, tl.max(tl.where(counts, coordinate, -float("inf")), axis=0) + 0.0)


@triton.jit
def store_box(points, live, block, bounds, POINTS: tl.constexpr):
    """Write least x, y, z and greatest x, y, z of one block of the first ``live`` points, those that are finite."""
    block = tl.cast(block, tl.int64)
    index = block * POINTS + tl.arange(0, POINTS)
    x, y, z = load_points(points, index, index < live, POINTS)
    counts = (index < live) & is_finite(x) & is_finite(y) & is_finite(z)
    store_side(bounds + block * 6, x, counts, 0)
    store_side(bounds + block * 6, y, counts, 1)
    store_side(bounds + block * 6, z, counts, 2)


@triton.jit(do_not_specialize=["points_total"])
def bounds_kernel(points, num_points, touched, bounds, points_total, POINTS: tl.constexpr):
    """Write the boxes of all blocks or, given ``touched``, of those whose byte is not 0."""
    live = tl.cast(points_total, tl.int64)
    if num_points is not None:
        live = tl.minimum(live, tl.load(num_points))
    block = tl.program_id(0)
    wanted = True
    if touched is not None:
        wanted = tl.load(touched + block) != 0
    if wanted:
        store_box(points, live, block, bounds, POINTS)


@triton.jit
def around(bounds, block, counts, SIDE: tl.constexpr, box):
    low = tl.load(bounds + block * 6 + SIDE, mask=counts, other=float("inf"))
    high = tl.load(bounds + block * 6 + 3 + SIDE, mask=counts, other=-float("inf"))
    tl.store(box + SIDE, tl.min(low, axis=0) + 0.0)
    tl.store(box + 3 + SIDE, tl.max(high, axis=0) + 0.0)


@triton.jit(do_not_specialize=["points_total"])
def tiles_kernel(num_points, report, bounds, points_total, POINTS: tl.constexpr, BLOCKS: tl.constexpr):
    """Write the boxes of all tiles or, given a write's ``report``, of those that hold blocks it appended to."""
    live = tl.cast(points_total, tl.int64)
    blocks = (live + POINTS - 1) // POINTS
    if num_points is not None:
        live = tl.minimum(live, tl.load(num_points))
    tile = tl.cast(tl.program_id(0), tl.int64)
    wanted = True
    if report is not None:
        written = tl.load(report)
        tile += (live - written) // (POINTS * BLOCKS)
        wanted = (written > 0) & (tile * BLOCKS * POINTS < live)
    if wanted:
        block = tile * BLOCKS + tl.arange(0, BLOCKS)
        box = bounds + (blocks + tile) * 6
        around(bounds, block, block * POINTS < live, 0, box)
        around(bounds, block, block * POINTS < live, 1, box)
        around(bounds, block, block * POINTS < live, 2, box)


def bound_tiles(num_points: Tensor | None, report: Tensor | None, bounds: Tensor, points: int, tiles: int) -> None:
    """Launch :func:`tiles_kernel`; ``bounds`` has room for ``points``, and no more than ``tiles`` are to be written."""
    tiles_kernel[(tiles,)](
        num_points, report, bounds, points, POINTS=BLOCK_TOKENS, BLOCKS=TILE_BLOCKS, num_warps=2, **EXACT
    )


def update_bounds(points: Tensor, num_points: Tensor | None, touched: Tensor | None, bounds: Tensor) -> None:
    """Write boxes of ``points`` (N, 4), contiguous, into ``bounds``; ``touched`` (blocks,) uint8 picks blocks."""
    if points.shape[0] > 0:
        with device_of(points):
            bounds_kernel[(cdiv(points.shape[0], BLOCK_TOKENS),)](
                points, num_points, touched, bounds, points.shape[0], POINTS=BLOCK_TOKENS, num_warps=2, **EXACT
            )
            bound_tiles(num_points, None, bounds, points.shape[0], cdiv(points.shape[0], BLOCK_TOKENS * TILE_BLOCKS))

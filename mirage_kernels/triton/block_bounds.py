"""`block_bounds`: the box of every block of tokens, a program each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..reference import BLOCK
from .camera import is_finite, load_points
from .launch import EXACT, cdiv, device_of, implements


@triton.jit
def store_side(side, coordinate, counts, SIDE: tl.constexpr):
    # Adding 0 makes 0 of -0, whose place among zeros is anyone's guess.
    tl.store(side + SIDE, tl.min(tl.where(counts, coordinate, float("inf")), axis=0) + 0.0)
    tl.store(side + 3 + SIDE, tl.max(tl.where(counts, coordinate, -float("inf")), axis=0) + 0.0)


@triton.jit
def store_box(points, live, block, bounds, POINTS: tl.constexpr):
    """Least x, y, z and greatest x, y, z of one block of the first ``live`` points, those that are finite."""
    block = tl.cast(block, tl.int64)
    index = block * POINTS + tl.arange(0, POINTS)
    x, y, z = load_points(points, index, index < live, POINTS)
    counts = (index < live) & is_finite(x) & is_finite(y) & is_finite(z)
    store_side(bounds + block * 6, x, counts, 0)
    store_side(bounds + block * 6, y, counts, 1)
    store_side(bounds + block * 6, z, counts, 2)


@triton.jit(do_not_specialize=["points_total"])
def bounds_kernel(points, num_points, touched, bounds, points_total, POINTS: tl.constexpr):
    """The boxes of all blocks or, given ``touched``, of those whose byte is not 0."""
    live = tl.cast(points_total, tl.int64)
    if num_points is not None:
        live = tl.minimum(live, tl.load(num_points))
    block = tl.program_id(0)
    wanted = True
    if touched is not None:
        wanted = tl.load(touched + block) != 0
    if wanted:
        store_box(points, live, block, bounds, POINTS)


def update_bounds(points: Tensor, num_points: Tensor | None, touched: Tensor | None, bounds: Tensor) -> None:
    """Boxes of ``points`` (N, 4), contiguous, into ``bounds``; ``touched`` (blocks,) uint8 picks blocks."""
    if points.shape[0] > 0:
        with device_of(points):
            bounds_kernel[(cdiv(points.shape[0], BLOCK),)](
                points, num_points, touched, bounds, points.shape[0], POINTS=BLOCK, num_warps=2, **EXACT
            )


@implements("block_bounds")
def block_bounds(points: Tensor, num_points: Tensor | None, bounds: Tensor) -> None:
    update_bounds(points.contiguous(), num_points, None, bounds)

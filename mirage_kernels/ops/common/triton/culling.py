"""Which blocks of tokens which views may see, never wrong towards "not seen": the twin of ``csrc/core/frustum.h``.

One kernel tests the boxes of all blocks against all views; the reading kernels then start from the list it leaves. How
long that is only the device knows: they are launched for all blocks, and programs past the end return at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....constants import BLOCK_TOKENS, CULL_FAR, CULL_SLACK, CULL_TINY
from .launching import EXACT, cdiv

_TOKENS = tl.constexpr(BLOCK_TOKENS)
_FAR = tl.constexpr(CULL_FAR)
_SLACK = tl.constexpr(CULL_SLACK)
_TINY = tl.constexpr(CULL_TINY)
# Views a word of a block: with 31 `view_overlap` marks the same views in its own words, beside the targets' bit.
WORD_VIEWS = 31
_WORD_VIEWS = tl.constexpr(WORD_VIEWS)
_BLOCKS = 128  # one a thread


@triton.jit
def beyond(n0, n1, n2, n3, g0, g1, g2, g3, x0, y0, z0, x1, y1, z1, reach):
    """Return whether boxes lie on the negative side of n . (x, y, z, 1); g are the magnitudes of the terms of n."""
    corner = n0 * tl.where(n0 < 0, x0, x1) + n1 * tl.where(n1 < 0, y0, y1) + n2 * tl.where(n2 < 0, z0, z1)
    most = tl.maximum(g0, tl.maximum(g1, g2))
    # An infinite or NaN bound is not negative, and where a magnitude is NaN the corner is, too.
    slack = tl.where(tl.maximum(most, g3) <= _FAR, _SLACK * most + _TINY, float("inf"))
    return (n3 + (_SLACK * g3 + _TINY)) + slack * reach + corner < 0


@triton.jit
def beyond_side(sign, limit, share, side, projection, x0, y0, z0, x1, y1, z1, reach):
    """Return whether boxes lie beyond a side: sign u z + limit z < 0, or with side 1 sign v z + limit z < 0."""
    m0, m1, m2, m3 = (
        tl.load(projection + 4 * side),
        tl.load(projection + 4 * side + 1),
        tl.load(projection + 4 * side + 2),
        tl.load(projection + 4 * side + 3),
    )
    d0, d1, d2, d3 = (
        tl.load(projection + 8),
        tl.load(projection + 9),
        tl.load(projection + 10),
        tl.load(projection + 11),
    )
    return beyond(
        sign * m0 + limit * d0,
        sign * m1 + limit * d1,
        sign * m2 + limit * d2,
        sign * m3 + limit * d3,
        tl.abs(m0) + share * tl.abs(d0),
        tl.abs(m1) + share * tl.abs(d1),
        tl.abs(m2) + share * tl.abs(d2),
        tl.abs(m3) + share * tl.abs(d3),
        x0, y0, z0, x1, y1, z1, reach,
    )  # fmt: skip


@triton.jit
def may_see(projection, height, width, near, x0, y0, z0, x1, y1, z1, reach, MARGIN: tl.constexpr):
    """Return whether one view, wider by MARGIN cells, may see a point of boxes."""
    d0, d1, d2, d3 = (
        tl.load(projection + 8),
        tl.load(projection + 9),
        tl.load(projection + 10),
        tl.load(projection + 11),
    )
    sizes = tl.abs(d0), tl.abs(d1), tl.abs(d2), tl.abs(d3) + near
    out = (x0 > x1) | (y0 > y1) | (z0 > z1)
    out |= beyond(d0, d1, d2, d3 - near, *sizes, x0, y0, z0, x1, y1, z1, reach)
    low = 0.0 + MARGIN
    share = low + 1e-3  # where u or v underflows, a share of z covers it
    right, bottom = tl.cast(width, tl.float32) + MARGIN, tl.cast(height, tl.float32) + MARGIN
    out |= beyond_side(1.0, low, share, 0, projection, x0, y0, z0, x1, y1, z1, reach)
    out |= beyond_side(-1.0, right, right, 0, projection, x0, y0, z0, x1, y1, z1, reach)
    out |= beyond_side(1.0, low, share, 1, projection, x0, y0, z0, x1, y1, z1, reach)
    out |= beyond_side(-1.0, bottom, bottom, 1, projection, x0, y0, z0, x1, y1, z1, reach)
    return out == 0


@triton.jit(do_not_specialize=["points_total", "views", "blocks"])
def cull_kernel(
    bounds,
    num_points,
    projections,
    masks,
    numbers,
    listed,
    points_total,
    views,
    blocks,
    height,
    width,
    near,
    MARGIN: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write masks (words, blocks): bit t % 31 of word t // 31 is set where view t may see the block; the numbers of
    the blocks that some view may see, in any order; and how many those are."""
    live = tl.cast(points_total, tl.int64)
    if num_points is not None:
        live = tl.minimum(live, tl.load(num_points))
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    real = block.to(tl.int64) * _TOKENS < live
    box = bounds + block.to(tl.int64) * 6
    x0, y0, z0 = tl.load(box, real, other=0.0), tl.load(box + 1, real, other=0.0), tl.load(box + 2, real, other=0.0)
    x1, y1, z1 = tl.load(box + 3, real, other=0.0), tl.load(box + 4, real, other=0.0), tl.load(box + 5, real, other=0.0)
    # |x| + |y| + |z| of the points of a box, at most. Sums and not maxima, which would drop a NaN.
    reach = (tl.abs(x0) + tl.abs(x1)) + (tl.abs(y0) + tl.abs(y1)) + (tl.abs(z0) + tl.abs(z1))
    reach = tl.where(reach <= _FAR, reach, float("inf"))
    some = tl.zeros((BLOCKS,), tl.int32)
    for first in range(0, views, _WORD_VIEWS):
        mask = tl.zeros((BLOCKS,), tl.int32)
        for view in range(first, tl.minimum(first + _WORD_VIEWS, views)):
            projection = projections + view * 12
            seen = real & may_see(projection, height, width, near, x0, y0, z0, x1, y1, z1, reach, MARGIN=MARGIN)
            mask |= seen.to(tl.int32) << (view - first)
        tl.store(masks + tl.cast(first // _WORD_VIEWS, tl.int64) * blocks + block, mask, block < blocks)
        some |= mask
    listing = (some != 0).to(tl.int32)
    place = tl.atomic_add(listed, tl.sum(listing, axis=0), sem="relaxed") + tl.cumsum(listing, axis=0) - 1
    tl.store(numbers + place, block, some != 0)


@triton.jit
def own_tokens(numbers, listed, live, POINTS: tl.constexpr):
    """Find the first of this program's POINTS tokens, of the listed blocks or of all, and whether one is live."""
    program = tl.program_id(0)
    parts: tl.constexpr = _TOKENS // POINTS
    begin = program.to(tl.int64) * POINTS
    real = begin < live
    if numbers is not None:
        real = program // parts < tl.load(listed)
        begin = tl.load(numbers + program // parts, real, other=0).to(tl.int64) * _TOKENS + program % parts * POINTS
        real = real & (begin < live)
    return begin, real


@triton.jit
def may_hold(masks, blocks, token, view):
    """Return whether a view may see the block of a token."""
    view = tl.cast(view, tl.int64)
    word = tl.load(masks + view // _WORD_VIEWS * blocks + token // _TOKENS)
    return ((word >> (view % _WORD_VIEWS)) & 1) != 0


def cull(
    bounds: Tensor | None,
    points: Tensor,
    num_points: Tensor | None,
    projections: Tensor,
    height: int,
    width: int,
    near: float,
    margin: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """Compute ``masks``, ``numbers``, ``listed`` of :func:`cull_kernel` and the number of blocks; None without bounds.

    ``margin`` is how many cells beyond its grid a view sees.
    """
    views, total = projections.shape[0], points.shape[0]
    if bounds is None or views == 0 or total == 0:
        return None, None, None, 0
    blocks = cdiv(total, BLOCK_TOKENS)
    masks = torch.empty((cdiv(views, WORD_VIEWS), blocks), dtype=torch.int32, device=points.device)
    numbers = torch.empty(blocks, dtype=torch.int32, device=points.device)
    listed = torch.zeros(1, dtype=torch.int32, device=points.device)
    cull_kernel[(cdiv(blocks, _BLOCKS),)](
        bounds.contiguous(),
        num_points,
        projections,
        masks,
        numbers,
        listed,
        total,
        views,
        blocks,
        height,
        width,
        near,
        MARGIN=margin,
        BLOCKS=_BLOCKS,
        num_warps=4,
        **EXACT,
    )
    return masks, numbers, listed, blocks

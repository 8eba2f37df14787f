"""Lifting of depth maps to tokens, in two launches: camera parameters, then one pass over the pixels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ....constants import TokenStatus
from .camera import LIFT_SIZE, cell_begin, is_finite, lift_token, make_lift, store_points
from .launching import EXACT, cdiv, device_of, float32, power_of_2

_KEPT = tl.constexpr(int(TokenStatus.KEPT))
_MASKED = tl.constexpr(int(TokenStatus.MASKED))
_UNKNOWN_DEPTH = tl.constexpr(int(TokenStatus.UNKNOWN_DEPTH))
_OUT_OF_RANGE = tl.constexpr(int(TokenStatus.OUT_OF_RANGE))
_NON_FINITE = tl.constexpr(int(TokenStatus.NON_FINITE))
_INFINITY_BITS = tl.constexpr(0x7F800000)
_NO_DEPTH = tl.constexpr(0x7FFFFFFF)
_LIFT = tl.constexpr(LIFT_SIZE)

_LIFT_VIEWS = 32
# Pixels that one program holds in registers: 32 a thread of its single warp. With one warp every count is a warp
# reduction, without shared memory or a barrier in the search.
_TILE = 1024
_MOST_TOKENS = 128
# Larger cells, 32x32 and up, are read again in each step of the search, from cache, by more warps.
_LARGEST_CELL = 2048
_CHUNK = 2048


@triton.jit
def lift_kernel(intrinsics, cam2world, lifts, views, depth_height, depth_width, height, width, VIEWS: tl.constexpr):
    view = tl.program_id(0) * VIEWS + tl.arange(0, VIEWS)
    make_lift(intrinsics, cam2world, lifts, view, view < views, depth_height, depth_width, height, width)


@triton.jit
def cell_pixels(row, column, inside, height, width, image_height, image_width, WIDE: tl.constexpr):
    """Return the offset of each cell's first pixel in its image, and its rows and columns, 0 outside the grid."""
    if WIDE:  # some product below passes 2^31
        row, column = row.to(tl.int64), column.to(tl.int64)
    top, left = cell_begin(row, height, image_height), cell_begin(column, width, image_width)
    rows = cell_begin(row + 1, height, image_height) - top
    columns = cell_begin(column + 1, width, image_width) - left
    return top * image_width + left, tl.where(inside, rows, 0), tl.where(inside, columns, 0)


@triton.jit
def chunk_offsets(chunk, rows, columns, stride, COLUMNS: tl.constexpr, PIXELS: tl.constexpr):
    """Return offsets of one chunk of the pixels of every cell from its first, (TOKENS, PIXELS), and which are real."""
    pixel = chunk * PIXELS + tl.arange(0, PIXELS)
    row, column = (pixel // COLUMNS)[None, :], (pixel % COLUMNS)[None, :]
    real = (row < rows[:, None]) & (column < columns[:, None])
    return row.to(rows.dtype) * stride + column, real


@triton.jit
def load_depth_bits(image, start, chunk, rows, columns, stride, COLUMNS: tl.constexpr, PIXELS: tl.constexpr):
    """Load the float bits of one chunk of depths; those that are unknown become the largest integer."""
    offset, real = chunk_offsets(chunk, rows, columns, stride, COLUMNS, PIXELS)
    # As signed integers, negative depths are negative, and Inf and NaN are from Inf's bits up.
    bits = tl.load(image + start[:, None] + offset, real, other=0.0).to(tl.int32, bitcast=True)
    return tl.where((bits > 0) & (bits < _INFINITY_BITS), bits, _NO_DEPTH)


@triton.jit
def median_depth(
    image, start, rows, columns, stride, COLUMNS: tl.constexpr, PIXELS: tl.constexpr, CHUNKS: tl.constexpr
):
    """Find the lower median of the valid depths of each cell; 0 where under half of them are valid.

    Positive floats order as their bits, so this is a binary search for the least integer that half of the depths do not
    exceed: only comparisons and counts, no sorting. It starts between the least and the greatest depth, which share
    their leading bits where a cell shows one surface: then about 20 steps are left of 31.
    """
    bits = load_depth_bits(image, start, 0, rows, columns, stride, COLUMNS, PIXELS)
    valid = bits != _NO_DEPTH
    count = tl.sum(valid.to(tl.int32), axis=1)
    low = tl.min(bits, axis=1)
    high = tl.max(tl.where(valid, bits, 0), axis=1)
    for chunk in range(1, CHUNKS):
        more = load_depth_bits(image, start, chunk, rows, columns, stride, COLUMNS, PIXELS)
        valid = more != _NO_DEPTH
        count += tl.sum(valid.to(tl.int32), axis=1)
        low = tl.minimum(low, tl.min(more, axis=1))
        high = tl.maximum(high, tl.max(tl.where(valid, more, 0), axis=1))
    low = tl.where(count > 0, low, 0)
    rank = (count + 1) // 2
    span = tl.max(high - low, axis=0)
    while span > 0:  # each step halves the widest span
        middle = low + ((high - low) >> 1)
        below = tl.sum((bits <= middle[:, None]).to(tl.int32), axis=1)
        for chunk in range(1, CHUNKS):
            more = load_depth_bits(image, start, chunk, rows, columns, stride, COLUMNS, PIXELS)
            below += tl.sum((more <= middle[:, None]).to(tl.int32), axis=1)
        reached = below >= rank
        high = tl.where(reached, middle, high)
        low = tl.where(reached, low, middle + 1)
        span = span >> 1
    known = (2 * count >= rows * columns) & (count > 0)
    return tl.where(known, low, 0).to(tl.float32, bitcast=True)


@triton.jit
def least_depth(image, start, rows, columns, stride, COLUMNS: tl.constexpr, PIXELS: tl.constexpr, CHUNKS: tl.constexpr):
    """Find the least valid depth of each cell, infinite where there is none."""
    least = tl.zeros_like(rows).to(tl.int32) + _INFINITY_BITS
    for chunk in range(CHUNKS):
        bits = load_depth_bits(image, start, chunk, rows, columns, stride, COLUMNS, PIXELS)
        least = tl.minimum(least, tl.min(bits, axis=1))
    return least.to(tl.float32, bitcast=True)


@triton.jit
def bilinear_taps(cell, cells, pixels):
    """Find the two pixels around a cell's centre and their weights: positions in float64, weights rounded once."""
    ratio = tl.cast(pixels, tl.float64) / tl.cast(cells, tl.float64)
    position = (cell.to(tl.float64) + 0.5) * ratio - 0.5
    position = tl.where(position > 0.0, position, 0.0)
    low = tl.minimum(position.to(tl.int64), pixels - 1)
    weight = (position - low.to(tl.float64)).to(tl.float32)
    return low, tl.minimum(low + 1, pixels - 1), 1.0 - weight, weight


@triton.jit
def bilinear_depth(image, row, column, inside, height, width, image_height, image_width):
    top, bottom, weight_top, weight_bottom = bilinear_taps(row, height, image_height)
    left, right, weight_left, weight_right = bilinear_taps(column, width, image_width)
    top_left = tl.load(image + top * image_width + left, inside, other=0.0)
    top_right = tl.load(image + top * image_width + right, inside, other=0.0)
    bottom_left = tl.load(image + bottom * image_width + left, inside, other=0.0)
    bottom_right = tl.load(image + bottom * image_width + right, inside, other=0.0)
    upper = weight_left * top_left + weight_right * top_right
    lower = weight_left * bottom_left + weight_right * bottom_right
    return weight_top * upper + weight_bottom * lower


@triton.jit
def all_static(mask, start, rows, columns, stride, COLUMNS: tl.constexpr, PIXELS: tl.constexpr, CHUNKS: tl.constexpr):
    """Return True where every pixel of the cell is."""
    moving = tl.zeros_like(rows).to(tl.int32)
    for chunk in range(CHUNKS):
        offset, real = chunk_offsets(chunk, rows, columns, stride, COLUMNS, PIXELS)
        static = tl.load(mask + start[:, None] + offset, real, other=1)
        moving += tl.sum((static == 0).to(tl.int32), axis=1)
    return moving == 0


@triton.jit
def tokens_kernel(
    depth,
    mask,
    lifts,
    points,
    status,
    depths,
    nearest,
    min_depth,
    max_depth,
    token_blocks,
    height,
    width,
    depth_height,
    depth_width,
    mask_height,
    mask_width,
    BILINEAR: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHUNKS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    MASK_PIXELS: tl.constexpr,
    MASK_CHUNKS: tl.constexpr,
):
    """Write points of some tokens of one view, 0 where not kept, and their statuses (to a bool tensor: whether kept).

    For those who want them: their depths, 0 where unknown, and the least depths of their cells.
    """
    view = (tl.program_id(0) // token_blocks).to(tl.int64)
    token = (tl.program_id(0) % token_blocks) * TOKENS + tl.arange(0, TOKENS)
    inside = token < height * width
    row, column = token // width, token % width
    target = view * height * width + token

    image = depth + view * depth_height * depth_width
    start, rows, columns = cell_pixels(row, column, inside, height, width, depth_height, depth_width, WIDE)
    if BILINEAR:
        z = bilinear_depth(image, row, column, inside, height, width, depth_height, depth_width)
    else:
        z = median_depth(image, start, rows, columns, depth_width, COLUMNS, PIXELS, CHUNKS)
    if nearest is not None:
        least = least_depth(image, start, rows, columns, depth_width, COLUMNS, PIXELS, CHUNKS)
        tl.store(nearest + target, least, inside)
    x, y, world_z, footprint = lift_token(lifts + view * _LIFT, row, column, z)

    finite = is_finite(x) & is_finite(y) & is_finite(world_z) & is_finite(footprint)
    becomes = tl.where(finite, _KEPT, _NON_FINITE)
    becomes = tl.where((z >= min_depth) & (z <= max_depth), becomes, _OUT_OF_RANGE)
    known = (z > 0.0) & is_finite(z)
    becomes = tl.where(known, becomes, _UNKNOWN_DEPTH)
    if depths is not None:
        tl.store(depths + target, tl.where(known, z, 0.0), inside)
    if mask is not None:
        start, rows, columns = cell_pixels(row, column, inside, height, width, mask_height, mask_width, WIDE)
        mask_image = mask + view * mask_height * mask_width
        static = all_static(mask_image, start, rows, columns, mask_width, MASK_COLUMNS, MASK_PIXELS, MASK_CHUNKS)
        becomes = tl.where(static, becomes, _MASKED)

    kept = becomes == _KEPT
    x, y = tl.where(kept, x, 0.0), tl.where(kept, y, 0.0)
    world_z, footprint = tl.where(kept, world_z, 0.0), tl.where(kept, footprint, 0.0)
    store_points(points, target, x, y, world_z, footprint, inside, TOKENS)
    if status.dtype.element_ty == tl.int1:
        tl.store(status + target, kept, inside)
    else:
        tl.store(status + target, becomes.to(tl.uint8), inside)


def _tiling(height: int, width: int, image_height: int, image_width: int) -> tuple[int, int, int, int]:
    """Return columns and pixels of the largest cell; pixels a chunk and number of chunks."""
    columns = cdiv(image_width, width)
    pixels = cdiv(image_height, height) * columns
    chunk = power_of_2(pixels) if pixels <= _LARGEST_CELL else _CHUNK
    return columns, pixels, chunk, cdiv(pixels, chunk)


def lift_tokens(
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    mask: Tensor | None,
    height: int,
    width: int,
    bilinear: bool,
    min_depth: float,
    max_depth: float,
    status: Tensor,
    depths: Tensor | None = None,
    nearest: Tensor | None = None,
) -> Tensor:
    """Lift to points (T, h, w, 4), 0 where not kept; fill ``status`` (T, h, w), uint8 or bool, True where kept.

    ``depths`` (T, h, w), if given, with token depths, 0 where unknown; ``nearest`` (T, h, w) with the least valid depth
    in each cell, infinite where there is none.
    """
    views, depth_height, depth_width = depth.shape
    points = depth.new_empty((views, height, width, 4))
    if views == 0:
        return points
    mask_height, mask_width = (height, width) if mask is None else mask.shape[1:]
    counts_pixels = not bilinear or nearest is not None
    columns, _, pixels, chunks = _tiling(height, width, depth_height, depth_width) if counts_pixels else (1, 1, 1, 1)
    mask_columns, _, mask_pixels, mask_chunks = _tiling(height, width, mask_height, mask_width)
    tokens = min(_MOST_TOKENS, max(1, _TILE // max(pixels, mask_pixels)))
    token_blocks = cdiv(height * width, tokens)
    wide = any(
        max(2 * (cells + 1) * side, image) >= 2**31
        for cells, side, image in (
            (height, depth_height, depth_height * depth_width),
            (width, depth_width, depth_height * depth_width),
            (height, mask_height, mask_height * mask_width),
            (width, mask_width, mask_height * mask_width),
        )
    )
    lifts = depth.new_empty((views, LIFT_SIZE))
    with device_of(depth):
        lift_kernel[(cdiv(views, _LIFT_VIEWS),)](
            intrinsics.contiguous(),
            cam2world.contiguous(),
            lifts,
            views,
            depth_height,
            depth_width,
            height,
            width,
            VIEWS=_LIFT_VIEWS,
            num_warps=1,
            **EXACT,
        )
        tokens_kernel[(views * token_blocks,)](
            depth.contiguous(),
            None if mask is None else mask.contiguous(),
            lifts,
            points,
            status,
            depths,
            nearest,
            float32(min_depth),
            float32(max_depth),
            token_blocks,
            height,
            width,
            depth_height,
            depth_width,
            mask_height,
            mask_width,
            BILINEAR=bilinear,
            WIDE=wide,
            TOKENS=tokens,
            COLUMNS=columns,
            PIXELS=pixels,
            CHUNKS=chunks,
            MASK_COLUMNS=mask_columns,
            MASK_PIXELS=mask_pixels,
            MASK_CHUNKS=mask_chunks,
            num_warps=1 if max(chunks, mask_chunks) == 1 else 4,
            **EXACT,
        )
    return points

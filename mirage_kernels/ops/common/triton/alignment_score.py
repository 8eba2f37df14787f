"""How well tokens are aligned with the cells of a view: position, scale and viewing ray.

The maths is that of ``csrc/core/alignment_score.h``, in the same order of operations and with the same names.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....constants import BLEND_TOKENS, DIRECTION_WEIGHT, MAX_FOOTPRINT_CELLS, MAX_FOOTPRINT_RATIO, TOKEN_REACH
from .camera import PROJECTION_SIZE, load_rows, make_projection, project
from .launching import EXACT, cdiv

# The key of a token in a cell is made like a depth's in `splat`: float bits of the score above, index below. Scores are
# small, so every key is less than this one.
NO_TOKEN = 0x7F7F7F7F7F7F7F7F
NO_DEPTH = 0x7F7FFFFF + 1  # bits of infinity: no depth in view has them, every one is less
_NO_TOKEN = tl.constexpr(NO_TOKEN)
_NO_DEPTH = tl.constexpr(NO_DEPTH)
_BLEND_TOKENS = tl.constexpr(BLEND_TOKENS)
_TOKEN_REACH = tl.constexpr(TOKEN_REACH)
_MAX_FOOTPRINT_CELLS = tl.constexpr(MAX_FOOTPRINT_CELLS)
_MAX_FOOTPRINT_RATIO = tl.constexpr(MAX_FOOTPRINT_RATIO)
_DIRECTION_WEIGHT = tl.constexpr(DIRECTION_WEIGHT)
_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)

_PREPARE_CELLS = 256
_PREPARE_VIEWS = 32


@triton.jit
def prepare_kernel(
    intrinsics,
    cam2world,
    projections,
    readers,
    narrow,
    wide,
    keys,
    views,
    total,
    CELLS: tl.constexpr,
    VIEWS: tl.constexpr,
):
    program = tl.program_id(0)
    if program * VIEWS < views:
        view = program * VIEWS + tl.arange(0, VIEWS)
        mask = view < views
        make_projection(intrinsics, cam2world, projections, view, mask)
        reader = readers + view.to(tl.int64) * 4
        focal = tl.load(intrinsics + view.to(tl.int64) * 9, mask, other=0.0)
        tl.store(reader, focal.to(tl.float32), mask)
        for axis in tl.static_range(3):
            center = tl.load(cam2world + view.to(tl.int64) * 16 + axis * 4 + 3, mask, other=0.0)
            tl.store(reader + 1 + axis, center.to(tl.float32), mask)
    cell = program.to(tl.int64) * CELLS + tl.arange(0, CELLS)
    if narrow is not None:
        tl.store(narrow + cell, tl.full((CELLS,), _NO_DEPTH, tl.int32), cell < total)
        tl.store(wide + cell, tl.full((CELLS,), _NO_DEPTH, tl.int32), cell < total)
        for k in tl.static_range(_BLEND_TOKENS):
            tl.store(keys + cell * _BLEND_TOKENS + k, tl.full((CELLS,), _NO_TOKEN, tl.int64), cell < total)


@triton.jit
def load_tokens(points, frame_ids, frame_centers, frames, index, mask, POINTS: tl.constexpr):
    """Load x, y, z, footprint, and the centre of the writing camera: NaN where it is unknown."""
    x, y, z, footprint = load_rows(points, index, mask, POINTS)
    frame = tl.load(frame_ids + index, mask, other=-1)
    known = (frame >= 0) & (frame < frames)
    center = frame_centers + tl.where(known, frame, 0).to(tl.int64) * 3
    nan = float("nan")
    writer_x = tl.load(center, known, other=nan)
    writer_y = tl.load(center + 1, known, other=nan)
    writer_z = tl.load(center + 2, known, other=nan)
    return x, y, z, footprint, writer_x, writer_y, writer_z


@triton.jit
def dot(ax, ay, az, bx, by, bz):
    return (ax * bx + ay * by) + az * bz


@triton.jit
def footprint_ratio(footprint, focal, inverse):
    ratio = (footprint * focal) * inverse
    # Written so that NaN falls to the least.
    return tl.where(
        ratio > 1.0 / _MAX_FOOTPRINT_RATIO,
        tl.where(ratio < _MAX_FOOTPRINT_RATIO, ratio, _MAX_FOOTPRINT_RATIO),
        1.0 / _MAX_FOOTPRINT_RATIO,
    )


@triton.jit
def align_tokens(projection, reader, x, y, z, footprint, writer_x, writer_y, writer_z):
    """Align tokens with one view: columns, rows and depths, the radius to close holes within, and the score bias."""
    u, v, depth = project(projection, x, y, z)
    ratio = footprint_ratio(footprint, tl.load(reader), tl.math.div_rn(1.0, depth))
    radius = tl.where(ratio > 1.0, ratio, 1.0)
    radius = _TOKEN_REACH * tl.where(radius < _MAX_FOOTPRINT_CELLS, radius, _MAX_FOOTPRINT_CELLS)
    scale = tl.math.div_rn((ratio - 1.0) * (ratio - 1.0), ratio)

    wx, wy, wz = x - writer_x, y - writer_y, z - writer_z
    rx, ry, rz = x - tl.load(reader + 1), y - tl.load(reader + 2), z - tl.load(reader + 3)
    lengths = dot(wx, wy, wz, wx, wy, wz) * dot(rx, ry, rz, rx, ry, rz)
    known = (lengths > 0.0) & (lengths <= _FLOAT_MAX)
    direction_penalty = 1.0 - tl.math.div_rn(
        dot(wx, wy, wz, rx, ry, rz), tl.math.sqrt_rn(tl.where(known, lengths, 1.0))
    )
    direction_penalty = tl.where(known & (direction_penalty > 0.0), direction_penalty, 0.0)
    return u, v, depth, radius, scale + _DIRECTION_WEIGHT * direction_penalty


@triton.jit
def cell_distance(u, v, column, row):
    dx, dy = u - (column.to(tl.float32) + 0.5), v - (row.to(tl.float32) + 0.5)
    return dx * dx + dy * dy


def prepare(
    intrinsics: Tensor, cam2world: Tensor, narrow: Tensor | None, wide: Tensor | None, keys: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Compose projections (T, 12), and focal lengths and centres (T, 4); empty the buffers, if given."""
    views, total = cam2world.shape[0], keys.numel() // BLEND_TOKENS if narrow is not None else 0
    projections = like.new_empty((views, PROJECTION_SIZE), dtype=torch.float32)
    readers = like.new_empty((views, 4), dtype=torch.float32)
    prepare_kernel[(max(cdiv(total, _PREPARE_CELLS), cdiv(views, _PREPARE_VIEWS)),)](
        intrinsics.contiguous(),
        cam2world.contiguous(),
        projections,
        readers,
        narrow,
        wide,
        keys,
        views,
        total,
        CELLS=_PREPARE_CELLS,
        VIEWS=_PREPARE_VIEWS,
        num_warps=1,
        **EXACT,
    )
    return projections, readers

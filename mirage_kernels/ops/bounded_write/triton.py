"""`bounded_write`: classify all tokens, then view after view: what held tokens show, ranks in voxels, slots, rows.

Held tokens take part by minima and counts alone, and ranks are prefix sums in one order, so no schedule of programs
shows in the results. The maths is that of ``csrc/core/bounded_write_rules.h``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...constants import (
    CARVE_TOLERANCE,
    COVERAGE_BIAS,
    COVERAGE_THRESHOLD,
    DEPTH_TOLERANCE,
    DUPLICATE_THRESHOLD,
    INVALID,
    MAX_OBSERVATIONS,
    RESOLUTION_GAIN,
    WRITE_REPORT,
    TokenStatus,
)
from ..common.triton.alignment_score import align_tokens, cell_distance, load_tokens, prepare
from ..common.triton.block_boxes import update_bounds
from ..common.triton.camera import PROJECTION_SIZE, floor_int, in_view, load_rows, store_points, widen
from ..common.triton.feature_rows import load_features, magnitude_bits, raw, store_features, token_scale
from ..common.triton.launching import EXACT, cdiv, device_of, float32
from ..common.triton.token_status import TOKENS, classify_tokens, load_latents, token_tile
from ..operator import implements

_KEPT = tl.constexpr(int(TokenStatus.KEPT))
_INVALID = tl.constexpr(INVALID)
_DEPTH_TOLERANCE = tl.constexpr(float32(DEPTH_TOLERANCE))
_COVERAGE_THRESHOLD = tl.constexpr(float32(COVERAGE_THRESHOLD))
_COVERAGE_BIAS = tl.constexpr(float32(COVERAGE_BIAS))
_DUPLICATE_THRESHOLD = tl.constexpr(float32(DUPLICATE_THRESHOLD))
_RESOLUTION_GAIN = tl.constexpr(float32(RESOLUTION_GAIN))
_CARVE_TOLERANCE = tl.constexpr(float32(CARVE_TOLERANCE))
_MAX_OBSERVATIONS = tl.constexpr(MAX_OBSERVATIONS)
_PROJECTION = tl.constexpr(PROJECTION_SIZE)
# As in `splat_aligned`: float bits of the score above, index below; every key is less than this one.
_NOT_SHOWN = tl.constexpr(0x7F7F7F7F7F7F7F7F)

# Voxel keys: 7 bits of level, then 19 bits an axis.
_MOST_LEVEL = tl.constexpr(62)
_AXIS_BITS = tl.constexpr(19)
_AXIS_LIMIT = tl.constexpr(2**18)

# Flags of what becomes of a cell. A shown one that takes and comes moves its token to another voxel.
_COMES = tl.constexpr(1)  # a voxel must have room
_SHOWN = tl.constexpr(2)
_TAKES = tl.constexpr(4)  # the place of the token that shows it, or a weight in it

_WRITTEN, _REPLACED, _MERGED, _COVERED, _REFUSED, _CARVED = (
    tl.constexpr(WRITE_REPORT.index(name)) for name in ("written", "replaced", "merged", "covered", "refused", "carved")
)
_REJECTED = WRITE_REPORT.index("masked")

# No fewer than the 128 threads of a program, see `token_tile`: they are updated in place.
_WALK = 256
_CELLS = 128
# One program scans all cells: a grid of 44x80 in four steps.
_SCAN = 1024


@triton.jit
def voxel_axis(coordinate, inverse):
    scaled = coordinate * inverse
    # Written so that NaN falls to the lower border.
    low = tl.where(scaled >= -_AXIS_LIMIT, scaled, -_AXIS_LIMIT)
    clamped = tl.where(low <= _AXIS_LIMIT - 1, low, _AXIS_LIMIT - 1)
    return (floor_int(clamped) + _AXIS_LIMIT).to(tl.int64)


@triton.jit
def token_voxel(x, y, z, footprint):
    """Key the voxel whose edge is the power of two nearest, as a ratio, to the footprint."""
    bits = footprint.to(tl.int32, bitcast=True)
    # The exponent, and one more where the rest is past the square root of two.
    level = ((bits >> 23) & 0xFF) - 127 + ((bits & 0x7FFFFF) > 0x3504F3).to(tl.int32)
    level = tl.minimum(tl.maximum(level, -_MOST_LEVEL), _MOST_LEVEL)
    inverse = ((127 - level) << 23).to(tl.float32, bitcast=True)
    upper = ((level + _MOST_LEVEL).to(tl.int64) << (3 * _AXIS_BITS)) | (voxel_axis(x, inverse) << (2 * _AXIS_BITS))
    return upper | (voxel_axis(y, inverse) << _AXIS_BITS) | voxel_axis(z, inverse)


@triton.jit
def find_voxel(sorted_voxels, cells, voxel, mask, STEPS: tl.constexpr):
    """Find the first place in a view's sorted voxels that is not less; STEPS bits count them."""
    place = tl.zeros_like(voxel).to(tl.int32)
    for k in tl.static_range(STEPS):
        next_place = place + (1 << (STEPS - 1 - k))
        # Short of a step that would leave: every place up to here is less, so this one exists.
        probe = mask & (next_place <= cells)
        less = probe & (tl.load(sorted_voxels + next_place - 1, probe, other=0) < voxel)
        place = tl.where(less, next_place, place)
    return place


@triton.jit(do_not_specialize=["blocks"])
def voxel_kernel(lifted, order, voxels, cells, blocks, CELLS: tl.constexpr):
    """Key the voxels of the tokens of all views, in the order in which they come."""
    view = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * CELLS + tl.arange(0, CELLS)
    inside = place < cells
    cell = tl.load(order + place, inside, other=0)
    x, y, z, footprint = load_rows(lifted, view * cells + cell, inside, CELLS)
    tl.store(voxels + view * cells + place, token_voxel(x, y, z, footprint), inside)


@triton.jit
def seen_through(nearest, depths, u, v, depth, surface, height, width, visible):
    """Return whether the surface lies clearly behind, and the four cells around (u, v) show nothing at this depth."""
    left, top = floor_int(u - 0.5), floor_int(v - 0.5)
    through = visible & (depth * _CARVE_TOLERANCE < surface)
    for k in tl.static_range(4):
        column = tl.minimum(tl.maximum(left + k % 2, 0), width - 1)
        row = tl.minimum(tl.maximum(top + k // 2, 0), height - 1)
        cell = row * width + column
        shown = tl.load(nearest + cell, through, other=0.0)
        shown = tl.where(shown * _CARVE_TOLERANCE < depth, tl.load(depths + cell, through, other=0.0), shown)
        through = through & ((depth * _CARVE_TOLERANCE < shown) | (shown * _CARVE_TOLERANCE < depth))
    return through


@triton.jit
def carve_tokens(free_space_violations, index, held, valid, visible, on_surface, through, carve_views, report):
    """Count views that see through tokens, mark those that enough do, and return which are still valid."""
    violations = tl.where(through, held + 1, tl.where(on_surface, 0, held))
    carved = through & (violations >= carve_views)
    violations = tl.where(carved, _INVALID, violations)
    tl.store(free_space_violations + index, violations.to(tl.uint8), valid & (violations != held))
    number = tl.sum(carved.to(tl.int32), axis=0)
    if number > 0:
        tl.atomic_add(report + _CARVED, number.to(tl.int64), sem="relaxed")
    return valid & (violations != _INVALID)


@triton.jit
def walk_tokens(
    points,
    frame_ids,
    free_space_violations,
    frame_centers,
    frames,
    index,
    mask,
    projection,
    reader,
    depths,
    nearest,
    status,
    keys,
    voxels,
    taken,
    report,
    cells,
    height,
    width,
    near,
    carve_views,
    STEPS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Find what some held tokens show of one view, carve those seen through, count places taken in its voxels."""
    x, y, z, footprint, wx, wy, wz = load_tokens(points, frame_ids, frame_centers, frames, index, mask, TOKENS)
    u, v, depth, _, score_bias = align_tokens(projection, reader, x, y, z, footprint, wx, wy, wz)
    held = tl.load(free_space_violations + index, mask, other=_INVALID).to(tl.int32)
    valid = held != _INVALID
    visible = valid & in_view(u, v, depth, height, width, near)
    u, v = tl.where(visible, u, 0.0), tl.where(visible, v, 0.0)
    column, row = u.to(tl.int32), v.to(tl.int32)
    cell = row * width + column
    surface = tl.load(depths + cell, visible, other=0.0)
    on_surface = (
        visible & (surface > 0.0) & (depth <= _DEPTH_TOLERANCE * surface) & (surface <= _DEPTH_TOLERANCE * depth)
    )
    if nearest is not None:
        through = seen_through(nearest, depths, u, v, depth, surface, height, width, visible)
        valid = carve_tokens(
            free_space_violations, index, held, valid, visible, on_surface, through, carve_views, report
        )

    score = cell_distance(u, v, column, row) + score_bias
    worth = tl.load(status + cell, visible, other=_KEPT + 1) == _KEPT
    shows = valid & on_surface & worth & ((score <= _COVERAGE_THRESHOLD) | (score_bias <= _COVERAGE_BIAS))
    key = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | index
    # A key only ever falls, so a stale one, from L2, costs an atomic too many and loses none.
    shows = shows & (key < tl.load(keys + cell, shows, other=0, cache_modifier=".cg"))
    tl.atomic_min(keys + cell, key, shows, sem="relaxed")

    voxel = token_voxel(x, y, z, footprint)
    place = find_voxel(voxels, cells, voxel, valid, STEPS)
    found = valid & (place < cells)
    found = found & (tl.load(voxels + place, found, other=0) == voxel)
    tl.atomic_add(taken + place, 1, found, sem="relaxed")


@triton.jit(do_not_specialize=["view", "capacity", "frames"])
def walk_kernel(
    points,
    frame_ids,
    free_space_violations,
    count,
    frame_centers,
    frames,
    projections,
    readers,
    depths,
    nearest,
    status,
    keys,
    voxels,
    taken,
    report,
    view,
    capacity,
    cells,
    height,
    width,
    near,
    carve_views,
    STEPS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    live = tl.load(count)
    # A count that is none holds nothing: the host never checks it.
    live = tl.where(live <= capacity, live, 0)
    begin = tl.program_id(0).to(tl.int64) * TOKENS
    view = tl.cast(view, tl.int64)
    grid = view * cells
    if nearest is not None:
        nearest += grid
    if begin < live:
        index = begin + tl.arange(0, TOKENS)
        walk_tokens(
            points,
            frame_ids,
            free_space_violations,
            frame_centers,
            frames,
            index,
            index < live,
            projections + view * _PROJECTION,
            readers + view * 4,
            depths + grid,
            nearest,
            status + grid,
            keys + grid,
            voxels + grid,
            taken + grid,
            report,
            cells,
            height,
            width,
            near,
            carve_views,
            STEPS,
            TOKENS,
        )


@triton.jit
def mean_with(held, number, added):
    return tl.math.div_rn(held * number + added, number + 1.0)


@triton.jit(do_not_specialize=["view"])
def rank_kernel(
    points,
    num_observations,
    lifted,
    status,
    keys,
    sorted_voxels,
    sorting,
    order,
    flags,
    ranks,
    targets,
    numbers,
    view,
    cells,
    SCAN: tl.constexpr,
):
    """Decide cells, voxel after voxel, in order within each, and count those that come before. One program.

    Given ``num_observations``: also what positions become, and how many are averaged already, -1 where
    none.
    """
    grid = tl.cast(view, tl.int64) * cells
    before = grid - grid
    for first in range(0, cells, SCAN):
        sorted_place = first + tl.arange(0, SCAN)
        inside = sorted_place < cells
        place = tl.load(sorting + grid + sorted_place, inside, other=0)
        cell = tl.load(order + place, inside, other=0)
        worth = inside & (tl.load(status + grid + cell, inside, other=_KEPT + 1) == _KEPT)
        key = tl.load(keys + grid + cell, worth, other=_NOT_SHOWN)
        shown = key != _NOT_SHOWN
        index = key & 0xFFFFFFFF
        x, y, z, footprint = load_rows(lifted, grid + cell, inside, SCAN)
        held_x, held_y, held_z, held_footprint = load_rows(points, index, shown, SCAN)
        held_voxel = token_voxel(held_x, held_y, held_z, held_footprint)
        if num_observations is not None:
            takes, moves = shown, tl.zeros_like(shown)
            number = tl.load(num_observations + index, shown, other=0).to(tl.float32)
            mean_x, mean_y = mean_with(held_x, number, x), mean_with(held_y, number, y)
            mean_z, mean_footprint = mean_with(held_z, number, z), mean_with(held_footprint, number, footprint)
            stays = shown & (token_voxel(mean_x, mean_y, mean_z, mean_footprint) == held_voxel)
            x = tl.where(shown, tl.where(stays, mean_x, held_x), x)
            y = tl.where(shown, tl.where(stays, mean_y, held_y), y)
            z = tl.where(shown, tl.where(stays, mean_z, held_z), z)
            footprint = tl.where(shown, tl.where(stays, mean_footprint, held_footprint), footprint)
            store_points(targets, cell, x, y, z, footprint, inside, SCAN)
            tl.store(numbers + cell, tl.where(shown, number, -1.0), inside)
        else:
            score = (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            takes = shown & ((score <= _DUPLICATE_THRESHOLD) | (held_footprint >= _RESOLUTION_GAIN * footprint))
            moves = takes & (tl.load(sorted_voxels + grid + sorted_place, inside, other=0) != held_voxel)
        comes = (worth & ~shown) | moves
        flag = tl.where(comes, _COMES, 0) + tl.where(shown, _SHOWN, 0) + tl.where(takes, _TAKES, 0)
        tl.store(flags + place, flag.to(tl.uint8), inside)
        here = comes.to(tl.int64)
        tl.store(ranks + place, before + tl.cumsum(here, axis=0) - here, inside)
        before += tl.sum(here, axis=0)


@triton.jit(do_not_specialize=["view", "capacity"])
def slot_kernel(
    count,
    keys,
    voxels,
    sorted_voxels,
    sorting,
    taken,
    order,
    flags,
    ranks,
    slots,
    report,
    view,
    capacity,
    cells,
    views_per_voxel,
    MERGES: tl.constexpr,
    STEPS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Assign the row that each cell is written to, or -1, in their order; update the count and the report."""
    live = tl.load(count)
    # A count that is none leaves no room.
    start = tl.where((live >= 0) & (live <= capacity), live, tl.cast(capacity, tl.int64))
    grid = tl.cast(view, tl.int64) * cells
    added, used, shown_cells, refused = live - live, live - live, live - live, live - live
    for first in range(0, cells, SCAN):
        place = first + tl.arange(0, SCAN)
        inside = place < cells
        flag = tl.load(flags + place, inside, other=0).to(tl.int32)
        comes, shown, takes = (flag & _COMES) != 0, (flag & _SHOWN) != 0, (flag & _TAKES) != 0
        voxel = tl.load(voxels + grid + place, inside, other=0)
        head = find_voxel(sorted_voxels + grid, cells, voxel, inside, STEPS)
        first_rank = tl.load(ranks + tl.load(sorting + grid + head, comes, other=0), comes, other=0)
        held = tl.load(taken + grid + head, comes, other=0) + (tl.load(ranks + place, comes, other=0) - first_rank)
        accepted = tl.where(comes, held < views_per_voxel, takes)
        here = (accepted & ~shown).to(tl.int64)
        row = start + added + tl.cumsum(here, axis=0) - here
        cell = tl.load(order + place, inside, other=0)
        best = tl.load(keys + grid + cell, shown, other=0) & 0xFFFFFFFF
        slot = tl.where(shown, best, row)
        tl.store(slots + cell, tl.where(accepted & (slot < capacity), slot, -1), inside)
        added += tl.sum(here, axis=0)
        used += tl.sum((accepted & shown).to(tl.int64), axis=0)
        shown_cells += tl.sum(shown.to(tl.int64), axis=0)
        refused += tl.sum((comes & ~shown).to(tl.int64), axis=0)
    written = tl.minimum(added, capacity - start)
    tl.store(count, live + written)
    tl.atomic_add(report + _WRITTEN, written, sem="relaxed")
    tl.atomic_add(report + (_MERGED if MERGES else _REPLACED), used, sem="relaxed")
    tl.atomic_add(report + _COVERED, shown_cells - used, sem="relaxed")
    tl.atomic_add(report + _REFUSED, refused - written, sem="relaxed")


@triton.jit
def load_new(latents, features, scales, numbers, view, token, slot, channel, channels, cells, inside, merges):
    """Load (TOKENS, CHANNELS) of new features: latents of one view or, given ``numbers``, means with those held."""
    real = inside[:, None] & (channel < channels)[None, :]
    value = load_latents(latents, view, token, channel, channels, cells, real)
    if numbers is not None:
        value = widen(value)
        number = tl.load(numbers + token, inside, other=-1.0)
        held = widen(load_features(features, scales, slot, channel, channels, merges))
        value = tl.where(merges[:, None], mean_with(held, number[:, None], value), value)
    return value


@triton.jit(do_not_specialize=["frame", "view"])
def write_kernel(
    targets,
    latents,
    slots,
    numbers,
    points,
    features,
    scales,
    frame_ids,
    free_space_violations,
    num_observations,
    frame,
    view,
    channels,
    cells,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < cells
    slot = tl.load(slots + token, inside, other=-1)
    stores = slot >= 0
    view = tl.cast(view, tl.int64)
    if num_observations is None:
        targets += view * cells * 4
    x, y, z, footprint = load_rows(targets, token.to(tl.int64), inside, TOKENS)
    store_points(points, slot, x, y, z, footprint, stores, TOKENS)
    tl.store(frame_ids + slot, tl.zeros((TOKENS,), tl.int32) + frame, stores)
    tl.store(free_space_violations + slot, tl.zeros((TOKENS,), tl.uint8), stores)
    if num_observations is not None:
        number = tl.load(numbers + token, inside, other=-1.0)
        merges = stores & (number >= 0.0)
        more = tl.minimum(number.to(tl.int32) + 1, _MAX_OBSERVATIONS)
        tl.store(num_observations + slot, tl.where(merges, more, 1).to(tl.uint8), stores)
    else:
        merges = stores
    scale = tl.zeros((TOKENS,), tl.int32)
    if scales is not None:
        for first in range(0, channels, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            value = load_new(
                latents, features, scales, numbers, view, token, slot, channel, channels, cells, inside, merges
            )
            scale = tl.maximum(scale, tl.max(magnitude_bits(value), axis=1))
        scale = token_scale(scale)
        tl.debug_barrier()  # nothing is stored before all have read
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        value = load_new(
            latents, features, scales, numbers, view, token, slot, channel, channels, cells, inside, merges
        )
        real = stores[:, None] & (channel < channels)[None, :]
        store_features(features, slot, channel, channels, value, scale, real)
    if scales is not None:
        tl.debug_barrier()
        tl.store(scales + slot, scale.to(tl.uint8), stores)


@implements("bounded_write")
def bounded_write(
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    free_space_violations: Tensor,
    num_observations: Tensor | None,
    count: Tensor,
    frame_centers: Tensor,
    latents: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    mask: Tensor | None,
    order: Tensor,
    first_frame: int,
    bilinear: bool,
    min_depth: float,
    max_depth: float,
    near: float,
    views_per_voxel: int,
    carve_views: int,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    views, channels, height, width = latents.shape
    cells, capacity = height * width, points.shape[0]
    report = torch.zeros(len(WRITE_REPORT), dtype=torch.int64, device=points.device)
    if views == 0:
        return report
    latents, frame_centers, order = latents.contiguous(), frame_centers.contiguous(), order.contiguous()
    depths = depth.new_empty((views, height, width))
    nearest = torch.empty_like(depths) if carve_views > 0 else None
    offered = latents, depth, intrinsics, cam2world, mask, bilinear, min_depth, max_depth, depths, nearest
    lifted, status, counts = classify_tokens(features, *offered)
    report[_REJECTED : _REJECTED + 4] = counts[1:].sum(1)

    intrinsics = intrinsics.clone()
    intrinsics[:, 0] *= width / depth.shape[2]
    intrinsics[:, 1] *= height / depth.shape[1]
    voxels = torch.empty((views, cells), dtype=torch.int64, device=points.device)
    keys = torch.full_like(voxels, _NOT_SHOWN.value)
    taken = torch.zeros_like(voxels, dtype=torch.int32)
    ranks, slots = (torch.empty_like(voxels[0]) for _ in range(2))
    flags = torch.empty_like(ranks, dtype=torch.uint8)
    targets = numbers = None
    if num_observations is not None:
        targets, numbers = lifted.new_empty((cells, 4)), lifted.new_empty(cells)
    steps, scan = cells.bit_length(), {"SCAN": _SCAN, "num_warps": 4, **EXACT}
    with device_of(points):
        projections, readers = prepare(intrinsics, cam2world, None, None, keys, points)
        blocks = cdiv(cells, _CELLS)
        voxel_kernel[(views * blocks,)](lifted, order, voxels, cells, blocks, CELLS=_CELLS, num_warps=4, **EXACT)
        in_order, sorting = voxels.sort(dim=1, stable=True)
        for view in range(views):
            if capacity > 0:
                walk_kernel[(cdiv(capacity, _WALK),)](
                    points,
                    frame_ids,
                    free_space_violations,
                    count,
                    frame_centers,
                    frame_centers.shape[0],
                    projections,
                    readers,
                    depths,
                    nearest,
                    status,
                    keys,
                    in_order,
                    taken,
                    report,
                    view,
                    capacity,
                    cells,
                    height,
                    width,
                    float32(near),
                    carve_views,
                    STEPS=steps,
                    TOKENS=_WALK,
                    num_warps=4,
                    **EXACT,
                )
            rank_kernel[(1,)](
                points,
                num_observations,
                lifted,
                status,
                keys,
                in_order,
                sorting,
                order,
                flags,
                ranks,
                targets,
                numbers,
                view,
                cells,
                **scan,
            )
            slot_kernel[(1,)](
                count,
                keys,
                voxels,
                in_order,
                sorting,
                taken,
                order,
                flags,
                ranks,
                slots,
                report,
                view,
                capacity,
                cells,
                views_per_voxel,
                MERGES=num_observations is not None,
                STEPS=steps,
                **scan,
            )
            write_kernel[(cdiv(cells, TOKENS),)](
                lifted if targets is None else targets,
                latents,
                slots,
                numbers,
                points,
                raw(features),
                scales,
                frame_ids,
                free_space_violations,
                num_observations,
                first_frame + view,
                view,
                channels,
                cells,
                **token_tile(channels),
            )
    if bounds is not None:
        update_bounds(points, count, None, bounds)
    return report

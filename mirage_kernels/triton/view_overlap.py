"""`view_overlap`: group the points by voxel, mark in one word per voxel which views see it, count the marks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .camera import PROJECTION_SIZE, in_view, load_points, make_projection, project, voxel_key
from .cull import cull, may_hold
from .launch import EXACT, cdiv, device_of, float32, implements

# A word marks 31 views and, in its sign bit, the targets: memory stays bounded however many views there are.
_WORD_VIEWS = 31

# One warp: the few programs that compose matrices use one lane a view.
_PREPARE_POINTS = 256
_PREPARE_VIEWS = 32
_MARK_POINTS = 512
# 16 words a thread, so that a program adds to a view's counts once for 4096 voxels.
_COUNT_WORDS = 4096


@triton.jit(do_not_specialize=["points_total", "views", "targets"])
def prepare_kernel(
    points,
    intrinsics,
    cam2world,
    target_intrinsics,
    target_cam2world,
    keys,
    projections,
    target_projections,
    points_total,
    views,
    targets,
    voxel_size,
    POINTS: tl.constexpr,
    VIEWS: tl.constexpr,
):
    program = tl.program_id(0)
    view = program * VIEWS + tl.arange(0, VIEWS)
    if program * VIEWS < views:
        make_projection(intrinsics, cam2world, projections, view, view < views)
    if program * VIEWS < targets:
        make_projection(target_intrinsics, target_cam2world, target_projections, view, view < targets)
    index = program.to(tl.int64) * POINTS + tl.arange(0, POINTS)
    x, y, z = load_points(points, index, index < points_total, POINTS)
    tl.store(keys + index, voxel_key(x, y, z, voxel_size), index < points_total)


@triton.jit(do_not_specialize=["points_total", "views", "targets", "first", "blocks"])
def mark_kernel(
    points,
    num_points,
    masks,
    target_masks,
    blocks,
    first,
    order,
    voxels,
    projections,
    target_projections,
    marks,
    points_total,
    views,
    targets,
    height,
    width,
    near,
    POINTS: tl.constexpr,
):
    """Points in the order of their voxels, so that the marks of neighbours lie together."""
    rank = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    inside = rank < points_total
    index = tl.load(order + rank, inside, other=0)
    voxel = tl.load(voxels + rank, inside, other=0)
    live = inside
    if num_points is not None:
        live = inside & (index < tl.load(num_points))
    x, y, z = load_points(points, index, live, POINTS)
    seen = tl.zeros((POINTS,), tl.int32)
    for target in range(targets):
        sees = True
        if target_masks is not None:
            sees = tl.max(may_hold(target_masks, blocks, index, target, live).to(tl.int32), axis=0) > 0
        if sees:
            u, v, depth = project(target_projections + target * 12, x, y, z)
            seen |= in_view(u, v, depth, height, width, near).to(tl.int32)
    word = seen << 31
    for view in range(views):
        sees = True
        if masks is not None:
            sees = tl.max(may_hold(masks, blocks, index, first + view, live).to(tl.int32), axis=0) > 0
        if sees:
            u, v, depth = project(projections + view * 12, x, y, z)
            word |= in_view(u, v, depth, height, width, near).to(tl.int32) << view
    tl.atomic_or(marks + voxel, word, live & (word != 0), sem="relaxed")


@triton.jit(do_not_specialize=["voxels_total", "views"])
def count_kernel(marks, counts, voxels_total, views, WORDS: tl.constexpr):
    voxel = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    word = tl.load(marks + voxel, voxel < voxels_total, other=0)
    target = (word < 0).to(tl.int32)
    for view in range(views):
        seen = (word >> view) & 1
        both = tl.sum(seen & target, axis=0).to(tl.int64)
        either = tl.sum(seen | target, axis=0).to(tl.int64)
        tl.atomic_add(counts + view * 2, both, sem="relaxed")
        tl.atomic_add(counts + view * 2 + 1, either, sem="relaxed")


@implements("view_overlap")
def view_overlap(
    points: Tensor,
    num_points: Tensor | None,
    intrinsics: Tensor,
    cam2world: Tensor,
    target_intrinsics: Tensor,
    target_cam2world: Tensor,
    height: int,
    width: int,
    voxel_size: float,
    near: float,
    bounds: Tensor | None = None,
) -> Tensor:
    total, views, targets = points.shape[0], cam2world.shape[0], target_cam2world.shape[0]
    counts = torch.zeros((views, 2), dtype=torch.int64, device=points.device)
    if total == 0 or views == 0:
        return counts
    points = points.contiguous()
    keys = torch.empty(total, dtype=torch.int64, device=points.device)
    projections = points.new_empty((views, PROJECTION_SIZE))
    target_projections = points.new_empty((targets, PROJECTION_SIZE))
    with device_of(points):
        prepare_kernel[(max(cdiv(total, _PREPARE_POINTS), cdiv(max(views, targets), _PREPARE_VIEWS)),)](
            points,
            intrinsics.contiguous(),
            cam2world.contiguous(),
            target_intrinsics.contiguous(),
            target_cam2world.contiguous(),
            keys,
            projections,
            target_projections,
            total,
            views,
            targets,
            float32(voxel_size),
            POINTS=_PREPARE_POINTS,
            VIEWS=_PREPARE_VIEWS,
            num_warps=1,
            **EXACT,
        )
        keys, order = keys.sort(stable=True)
        # Numbers of the voxels in the order of their keys; as many words as points, since only the device knows how few
        # voxels there are.
        begins = torch.zeros_like(keys)
        torch.ne(keys[1:], keys[:-1], out=begins[1:])
        voxels = begins.cumsum(0)
        marks = torch.empty(total, dtype=torch.int32, device=points.device)
        view = height, width, float32(near), 0
        seen_by_views, _, _, blocks = cull(bounds, points, num_points, projections, *view)
        seen_by_targets, *_ = cull(bounds, points, num_points, target_projections, *view)
        for first in range(0, views, _WORD_VIEWS):
            here = min(_WORD_VIEWS, views - first)
            marks.zero_()
            mark_kernel[(cdiv(total, _MARK_POINTS),)](
                points,
                num_points,
                seen_by_views,
                seen_by_targets,
                blocks,
                first,
                order,
                voxels,
                projections[first:],
                target_projections,
                marks,
                total,
                here,
                targets,
                height,
                width,
                float32(near),
                POINTS=_MARK_POINTS,
                num_warps=4,
                **EXACT,
            )
            count_kernel[(cdiv(total, _COUNT_WORDS),)](
                marks, counts[first:], total, here, WORDS=_COUNT_WORDS, num_warps=8, **EXACT
            )
    return counts

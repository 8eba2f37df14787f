"""`view_overlap`: group the points by voxel, mark in one word per voxel which views see it, count the marks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...constants import BLOCK_TOKENS
from ..common.triton.camera import PROJECTION_SIZE, in_view, load_points, make_projection, project, voxel_key
from ..common.triton.culling import WORD_VIEWS, cull
from ..common.triton.launching import EXACT, cdiv, device_of, float32
from ..operator import implements

# A word marks 31 views and, in its sign bit, the targets: memory stays bounded however many views there are.
_WORD_VIEWS = tl.constexpr(WORD_VIEWS)
_TOKENS = tl.constexpr(BLOCK_TOKENS)

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


@triton.jit
def join_bits(a, b):
    return a | b


@triton.jit
def views_of(held, projections, views, x, y, z, height, width, near, POINTS: tl.constexpr):
    """Set bit t of a word a point where view t sees it. ``held`` says likewise which may; None, that all may."""
    word = tl.zeros((POINTS,), tl.int32)
    if held is not None:
        some = tl.reduce(held, 0, join_bits)
    for view in range(views):
        sees = True
        if held is not None:
            sees = ((some >> view) & 1) != 0
        if sees:
            u, v, depth = project(projections + view * 12, x, y, z)
            word |= in_view(u, v, depth, height, width, near).to(tl.int32) << view
    if held is not None:
        word &= held
    return word


@triton.jit(do_not_specialize=["points_total", "views", "targets", "blocks"])
def mark_kernel(
    points,
    num_points,
    masks,
    target_masks,
    order,
    voxels,
    projections,
    target_projections,
    marks,
    points_total,
    views,
    targets,
    blocks,
    height,
    width,
    near,
    POINTS: tl.constexpr,
):
    """Mark points in the order of their voxels, so that neighbours' marks lie together. Masks: ``cull_kernel``."""
    rank = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    inside = rank < points_total
    index = tl.load(order + rank, inside, other=0)
    voxel = tl.load(voxels + rank, inside, other=0)
    live = inside
    if num_points is not None:
        live = inside & (index < tl.load(num_points))
    held = None
    if masks is not None:
        # Points lie scattered in this order: those of blocks that nothing sees are not fetched.
        held = tl.load(masks + index // _TOKENS, live, other=0)
        some = held
        if target_masks is not None:
            for first in range(0, targets, _WORD_VIEWS):
                row = target_masks + tl.cast(first // _WORD_VIEWS, tl.int64) * blocks
                some |= tl.load(row + index // _TOKENS, live, other=0)
        live = some != 0
    x, y, z = load_points(points, index, live, POINTS)
    seen = tl.zeros((POINTS,), tl.int32)
    for first in range(0, targets, _WORD_VIEWS):
        target_held = None
        if target_masks is not None:
            row = target_masks + tl.cast(first // _WORD_VIEWS, tl.int64) * blocks
            target_held = tl.load(row + index // _TOKENS, live, other=0)
        here = tl.minimum(_WORD_VIEWS, targets - first)
        seen |= views_of(
            target_held, target_projections + first * 12, here, x, y, z, height, width, near, POINTS=POINTS
        )
    word = (seen != 0).to(tl.int32) << 31
    word |= views_of(held, projections, views, x, y, z, height, width, near, POINTS=POINTS)
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
        view = height, width, float32(near)
        masks, _, _, blocks = cull(bounds, points, num_points, projections, *view, 0)
        target_masks, *_ = cull(bounds, points, num_points, target_projections, *view, 0)
        for word, first in enumerate(range(0, views, WORD_VIEWS)):
            here = min(WORD_VIEWS, views - first)
            marks.zero_()
            mark_kernel[(cdiv(total, _MARK_POINTS),)](
                points,
                num_points,
                None if masks is None else masks[word:],
                target_masks,
                order,
                voxels,
                projections[first:],
                target_projections,
                marks,
                total,
                here,
                targets,
                blocks,
                *view,
                POINTS=_MARK_POINTS,
                num_warps=4,
                **EXACT,
            )
            count_kernel[(cdiv(total, _COUNT_WORDS),)](
                marks, counts[first:], total, here, WORDS=_COUNT_WORDS, num_warps=8, **EXACT
            )
    return counts

"""The definition of `bounded_write`, in plain PyTorch."""

from __future__ import annotations

import torch
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
)
from ...geometry import in_view, make_projection, nearest_depth, token_voxels
from ...quantization import dequantize_rows, store_rows
from ..common.alignment_score import align_tokens, cell_distance, writing_centers
from ..common.block_boxes import write_bounds
from ..common.token_status import classify_tokens


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
    """Write view after view, in place; return the report."""
    size = (latents.shape[2], latents.shape[3])
    height, width = size
    cells, capacity = height * width, points.shape[0]
    lifted, z, keep, rejected = classify_tokens(
        latents, depth, intrinsics, cam2world, mask, features.dtype, bilinear, min_depth, max_depth
    )
    nearest = nearest_depth(depth, size) if carve_views > 0 else None
    grid = intrinsics.clone()
    grid[:, 0] *= width / depth.shape[2]
    grid[:, 1] *= height / depth.shape[1]
    projections = make_projection(grid, cam2world, torch.float32)
    focals, readers = grid[:, 0, 0].float(), cam2world[:, :3, 3].float()
    place = torch.empty(cells, dtype=torch.int64, device=order.device)  # of each cell in the order
    place[order.long()] = torch.arange(cells, device=order.device)
    report = dict.fromkeys(WRITE_REPORT, 0)

    for t in range(latents.shape[0]):
        live = int(count)
        old, new, worth = points[:live], lifted[t].view(cells, 4), keep[t].flatten()
        rows = latents[t].permute(1, 2, 0).reshape(cells, -1)
        writers = writing_centers(frame_ids[:live], frame_centers, torch.float32)
        u, v, depths, _, score_bias = align_tokens(old, writers, projections[t], focals[t], readers[t])
        valid = free_space_violations[:live] != INVALID
        visible = valid & in_view(u, v, depths, size, near)
        u, v = torch.where(visible, u, 0.0), torch.where(visible, v, 0.0)
        cell = v.long() * width + u.long()
        surface = z[t].flatten()[cell]
        on_surface = (
            visible & (surface > 0) & (depths <= DEPTH_TOLERANCE * surface) & (surface <= DEPTH_TOLERANCE * depths)
        )

        if nearest is not None:
            through = visible & _seen_through(nearest[t], z[t], u, v, depths)
            violations = torch.where(
                through,
                free_space_violations[:live].int() + 1,
                torch.where(on_surface, 0, free_space_violations[:live].int()),
            )
            carved = valid & through & (violations >= carve_views)
            free_space_violations[:live] = torch.where(valid, torch.where(carved, INVALID, violations), INVALID).to(
                free_space_violations.dtype
            )
            report["carved"] += int(carved.sum())
            valid = valid & ~carved

        # The token that shows best what each cell does: the least score, then the lowest index.
        score = cell_distance(u, v, cell % width, cell // width) + score_bias
        shows = valid & on_surface & worth[cell] & ((score <= COVERAGE_THRESHOLD) | (score_bias <= COVERAGE_BIAS))
        least = score.new_full((cells,), torch.inf).scatter_reduce(
            0, cell, torch.where(shows, score, torch.inf), "amin"
        )
        number = torch.arange(live, device=cell.device)
        best = number.new_full((cells,), live).scatter_reduce(
            0, cell, torch.where(shows & (score == least[cell]), number, live), "amin"
        )
        shown = worth & (best < live)
        held = torch.cat([old, old.new_zeros(1, 4)])[best]

        # Whether a voxel has room for what would come to it, first come, first served.
        voxels = token_voxels(new)
        replaces = (
            shown
            & ((least <= DUPLICATE_THRESHOLD) | (held[:, 3] >= RESOLUTION_GAIN * new[:, 3]))
            & (num_observations is None)
        )
        moves = replaces & (token_voxels(held) != voxels)
        comes = (worth & ~shown) | moves
        has_room = torch.zeros_like(comes)
        at = comes.nonzero()[:, 0]
        at = at[place[at].argsort()]
        taken, order_of = token_voxels(old[valid]).sort().values, voxels[at].argsort(stable=True)
        sought = voxels[at][order_of]
        before = torch.searchsorted(taken, sought, right=True) - torch.searchsorted(taken, sought)
        before = before + torch.arange(len(at), device=at.device) - torch.searchsorted(sought, sought)
        has_room[at[order_of]] = before < views_per_voxel

        frame = first_frame + t
        chosen = (replaces & (has_room | ~moves)).nonzero()[:, 0]
        slot = best[chosen]
        points[slot], frame_ids[slot], free_space_violations[slot] = new[chosen], frame, 0
        store_rows(features, scales, slot, rows[chosen])
        report["replaced"] += len(chosen)
        covered = int(shown.sum()) - len(chosen)
        if num_observations is not None:
            chosen = shown.nonzero()[:, 0]
            slot = best[chosen]
            number = num_observations[slot].float()[:, None]
            mean = (points[slot] * number + new[chosen]) / (number + 1.0)
            stays = token_voxels(mean) == token_voxels(points[slot])
            points[slot] = torch.where(stays[:, None], mean, points[slot])
            stored = features[slot].float() if scales is None else dequantize_rows(features[slot], scales[slot])
            store_rows(features, scales, slot, (stored * number + rows[chosen].float()) / (number + 1.0))
            frame_ids[slot], free_space_violations[slot] = frame, 0
            num_observations[slot] = (
                (num_observations[slot].int() + 1).clamp(max=MAX_OBSERVATIONS).to(num_observations.dtype)
            )
            report["merged"] += len(chosen)
        else:
            report["covered"] += covered

        added = (worth & ~shown & has_room).nonzero()[:, 0]
        added = added[place[added].argsort()][: max(capacity - live, 0)]
        end = live + len(added)
        points[live:end], frame_ids[live:end], free_space_violations[live:end] = new[added], frame, 0
        store_rows(features, scales, slice(live, end), rows[added])
        if num_observations is not None:
            num_observations[live:end] = 1
        count += len(added)
        report["written"] += len(added)
        report["refused"] += int((worth & ~shown).sum()) - len(added)

    if bounds is not None:
        write_bounds(points, count, bounds)
    report.update(zip(("masked", "unknown_depth", "out_of_range", "non_finite"), rejected.tolist(), strict=True))
    return torch.tensor(list(report.values()), device=points.device)


def _seen_through(nearest: Tensor, surface: Tensor, u: Tensor, v: Tensor, depths: Tensor) -> Tensor:
    """Return whether a view sees through tokens that shows `surface` (h, w), and in a cell nothing before `nearest`.

    It shows something clearly behind in the token's own cell, and nothing at its depth in the four cells whose centres
    surround (u, v), past the border those at it. What a cell shows is its least depth, or its surface where something
    hangs clearly before the token.
    """
    height, width = surface.shape
    through = depths * CARVE_TOLERANCE < surface[v.long(), u.long()]
    column, row = (u - 0.5).floor().long(), (v - 0.5).floor().long()
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        cell = (row + i).clamp(0, height - 1), (column + j).clamp(0, width - 1)
        shown = nearest[cell]
        shown = torch.where(shown * CARVE_TOLERANCE < depths, surface[cell], shown)
        through = through & ((depths * CARVE_TOLERANCE < shown) | (shown * CARVE_TOLERANCE < depths))
    return through

"""The definition of `cache_write`, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...constants import BLOCK_TOKENS, TILE_BLOCKS
from ...quantization import store_rows
from ..common.block_boxes import block_boxes, boxes_around
from ..common.token_status import classify_tokens


def cache_write(
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    count: Tensor,
    latents: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    mask: Tensor | None,
    first_frame: int,
    bilinear: bool,
    min_depth: float,
    max_depth: float,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Append in token order, in place; return the six counts of the report."""
    lifted, _, keep, rejected = classify_tokens(
        latents, depth, intrinsics, cam2world, mask, features.dtype, bilinear, min_depth, max_depth
    )

    start, capacity = int(count), points.shape[0]
    rows = latents.permute(0, 2, 3, 1)[keep]
    # A count from outside may be anything: nothing is written past the buffers, or before them.
    fits = min(rows.shape[0], max(capacity - start, 0) if start >= 0 else 0)
    frames = torch.arange(first_frame, first_frame + latents.shape[0], device=keep.device)[:, None, None]
    if fits > 0:
        points[start : start + fits] = lifted[keep][:fits].to(points.dtype)
        store_rows(features, scales, slice(start, start + fits), rows[:fits])
        frame_ids[start : start + fits] = frames.expand_as(keep)[keep][:fits].to(frame_ids.dtype)
    count += fits
    if bounds is not None and fits > 0:
        first, last, blocks = start // BLOCK_TOKENS, -(-(start + fits) // BLOCK_TOKENS), -(-capacity // BLOCK_TOKENS)
        bounds[first:last] = block_boxes(points[first * BLOCK_TOKENS : start + fits])
        tile = first // TILE_BLOCKS
        bounds[blocks + tile : blocks + -(-last // TILE_BLOCKS)] = boxes_around(
            bounds[tile * TILE_BLOCKS : last], TILE_BLOCKS
        )
    return torch.cat([torch.tensor([fits, rows.shape[0] - fits], device=keep.device), rejected])

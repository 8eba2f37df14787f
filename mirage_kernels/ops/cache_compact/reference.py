"""The definition of `cache_compact`, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...constants import INVALID
from ...quantization import FLOAT8
from ..common.block_boxes import write_bounds


def cache_compact(
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    free_space_violations: Tensor | None,
    num_observations: Tensor | None,
    count: Tensor,
    max_tokens: int,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Move the survivors together, in order, in place; return how many were evicted."""
    live = int(count)
    valid = (
        torch.ones(live, dtype=torch.bool, device=points.device)
        if free_space_violations is None
        else free_space_violations[:live] != INVALID
    )
    held = valid.nonzero()[:, 0]
    excess = max(len(held) - max_tokens, 0)
    oldest = frame_ids[held].argsort(stable=True)
    survivors = held[oldest[excess:]].sort().values
    words = features.view(torch.uint8) if features.dtype == FLOAT8 else features  # which PyTorch can index
    for buffer in (points, words, frame_ids, free_space_violations, num_observations, scales):
        if buffer is not None:
            buffer[: len(survivors)] = buffer[survivors]
    count.fill_(len(survivors))
    if bounds is not None:
        write_bounds(points, count, bounds)
    return torch.tensor(excess, device=points.device)

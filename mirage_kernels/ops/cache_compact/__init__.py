"""`cache_compact`: remove invalid tokens and the oldest of too many, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_bounds, check_buffers, check_count, plain
from ..operator import Operator
from . import reference


def _fake(*, points: Tensor, **_: Any) -> Tensor:
    return points.new_empty((), dtype=torch.int64)


launch = Operator(
    "cache_compact",
    (
        "(Tensor(a!) points, Tensor(b!) features, Tensor(c!) frame_ids, Tensor(d!)? free_space_violations,"
        " Tensor(e!)? num_observations,"
        " Tensor(f!) count, int max_tokens, Tensor(g!)? bounds=None, Tensor(h!)? scales=None) -> Tensor"
    ),
    fake=_fake,
    reference=reference.cache_compact,
    device="points",
).launch


def cache_compact(
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    count: Tensor,
    *,
    free_space_violations: Tensor | None = None,
    num_observations: Tensor | None = None,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """Remove invalid tokens, and the oldest of what is too many; the others move together, in order, in place.

    Evicted first: what was written, replaced or merged by the earliest view (the least frame id); within a view, the
    lowest row.

    Args:
        points, features, frame_ids, count, free_space_violations, num_observations, bounds, scales: as in
            :func:`bounded_write`; without ``free_space_violations`` every token is valid.
        max_tokens: how many may stay, >= 0; None: any number.

    Returns:
        One int64 on the device: the tokens evicted, invalid ones not counted.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; nothing has changed then.
    """
    check_buffers(
        points,
        features,
        frame_ids,
        count,
        None,
        None,
        scales,
        free_space_violations=free_space_violations,
        num_observations=num_observations,
    )
    most = 2**62 if max_tokens is None else check_count("max_tokens", max_tokens, 0, 2**62)
    bounds = check_bounds(bounds, points, in_place=True)
    return launch(
        points=plain(points),
        features=plain(features),
        frame_ids=frame_ids,
        free_space_violations=free_space_violations,
        num_observations=num_observations,
        count=count,
        max_tokens=most,
        bounds=bounds,
        scales=scales,
    )

"""What a read returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Readout(NamedTuple):
    """Latents, mask, depth and index that cameras read from tokens.

    A hole has latents 0, mask False, depth 0, index -1.

    ``latents`` (T, C, h, w); ``mask`` (T, h, w) bool; ``depth`` (T, h, w) z along the optical axis in world units;
    ``index`` (T, h, w) int64, the row of the winning token.
    """

    latents: Tensor
    mask: Tensor
    depth: Tensor
    index: Tensor  # type: ignore[assignment]  # the field hides tuple.index, which is not needed here


def fake_readout(
    features: Tensor, views: int, height: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return empty latents, mask, depth and index, as reads of these features give them."""
    shape = (views, height, width)
    return (
        features.new_empty((views, features.shape[1], height, width), dtype=dtype),
        features.new_empty(shape, dtype=torch.bool),
        features.new_empty(shape, dtype=torch.float32),
        features.new_empty(shape, dtype=torch.int64),
    )

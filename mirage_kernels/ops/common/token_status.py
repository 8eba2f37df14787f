"""What becomes of the tokens that are offered to a write."""

from __future__ import annotations

import torch
from torch import Tensor

from ...geometry import lift_depth, pool_mask, sample_depth
from ...quantization import storable


def classify_tokens(
    latents: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
    bilinear: bool,
    min_depth: float,
    max_depth: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Classify the tokens of T views, for features stored as ``dtype``.

    Returns:
        Lifted tokens (T, h, w, 4); their depths (T, h, w), 0 where unknown; which of them are worth keeping (T, h, w);
        and how many are not: (4,) masked, of unknown depth, out of range, not finite.
    """
    size = (latents.shape[2], latents.shape[3])
    z, known = sample_depth(depth, size, bilinear)
    lifted = lift_depth(depth, z, intrinsics, cam2world)
    static = torch.ones_like(known) if mask is None else pool_mask(mask, size)
    in_range = (z >= min_depth) & (z <= max_depth)
    finite = torch.isfinite(lifted).all(-1) & storable(latents, dtype).all(1)
    rejected = [~static, static & ~known, static & known & ~in_range, static & known & in_range & ~finite]
    keep = static & known & in_range & finite
    return lifted, torch.where(known, z, 0.0), keep, torch.stack([one.sum() for one in rejected])

"""What becomes of the tokens that are offered to a write: their statuses, and the counts of each by blocks."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....constants import TokenStatus
from .feature_rows import is_storable, raw
from .launching import EXACT, cdiv, device_of, power_of_2
from .lift import lift_tokens

STATUSES = len(TokenStatus)
_STATUSES = tl.constexpr(STATUSES)
_KEPT = tl.constexpr(int(TokenStatus.KEPT))
_NON_FINITE = tl.constexpr(int(TokenStatus.NON_FINITE))

# Latents are read along 64 tokens (128 or 256 contiguous bytes a channel) and stored along a token's channels.
TOKENS = 64
_CHANNELS = 64


@triton.jit(do_not_specialize=["token_blocks", "blocks"])
def classify_kernel(
    latents,
    features,
    status,
    counts,
    channels,
    cells,
    token_blocks,
    blocks,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Find tokens with a latent that is not finite once stored, and count every status within the block."""
    block = tl.program_id(0)
    view = (block // token_blocks).to(tl.int64)
    token = (block % token_blocks) * TOKENS + tl.arange(0, TOKENS)
    inside = token < cells
    becomes = tl.load(status + view * cells + token, inside, other=_STATUSES).to(tl.int32)
    bad = tl.zeros((CHANNELS, TOKENS), tl.int32)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        # Of all tokens, dropped ones too: a mask that knows no data lets a thread load 16 bytes at once.
        read = (channel < channels)[:, None] & inside[None, :]
        source = latents + view * channels * cells + channel.to(tl.int64)[:, None] * cells + token[None, :]
        value = tl.load(source, read, other=0.0)
        bad |= tl.where(is_storable(value, features.dtype.element_ty), 0, 1)
    becomes = tl.where((becomes == _KEPT) & (tl.max(bad, axis=0) > 0), _NON_FINITE, becomes)
    tl.store(status + view * cells + token, becomes.to(tl.uint8), inside)
    for one in tl.static_range(_STATUSES):
        tl.store(counts + tl.cast(blocks, tl.int64) * one + block, tl.sum((becomes == one).to(tl.int32), axis=0))


@triton.jit
def load_latents(latents, view, token, channel, channels, cells, mask):
    """Load (TOKENS, CHANNELS) of the latents (T, C, h w) of one view."""
    source = latents + view * channels * cells + channel.to(tl.int64)[None, :] * cells + token[:, None]
    return tl.load(source, mask, other=0.0)


def classify_tokens(
    features: Tensor,
    latents: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    mask: Tensor | None,
    bilinear: bool,
    min_depth: float,
    max_depth: float,
    depths: Tensor | None = None,
    nearest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return points (T, h, w, 4) as :func:`lift_tokens` gives them, statuses (T, h, w), and their counts by blocks.

    ``latents`` are contiguous, ``features`` give the dtype that they will be stored in.
    """
    views, channels, height, width = latents.shape
    cells, token_blocks = height * width, cdiv(height * width, TOKENS)
    blocks = views * token_blocks
    status = torch.empty((views, height, width), dtype=torch.uint8, device=depth.device)
    camera = intrinsics, cam2world, mask, height, width, bilinear, min_depth, max_depth
    lifted = lift_tokens(depth, *camera, status, depths, nearest)
    counts = torch.empty((STATUSES, blocks), dtype=torch.int32, device=depth.device)
    if blocks > 0:
        with device_of(depth):
            classify_kernel[(blocks,)](
                latents, raw(features), status, counts, channels, cells, token_blocks, blocks, **token_tile(channels)
            )
    return lifted, status, counts


def token_tile(channels: int) -> dict[str, Any]:
    """Return what kernels over tokens and their channels are compiled with."""
    # No smaller than the 128 threads: where several hold one element, one may read what another has already updated.
    return {"TOKENS": TOKENS, "CHANNELS": min(_CHANNELS, power_of_2(max(channels, 2))), "num_warps": 4, **EXACT}

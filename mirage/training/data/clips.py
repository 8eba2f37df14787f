"""A clip to train on: frames or latents of one scene, with the depth, masks and cameras of its latent frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_kernels import Cameras
from mirage_kernels.geometry import pool_depth, pool_mask

from ...pipeline.chunks import TEMPORAL_COMPRESSION

TOKEN_PIXELS = 16
"""Pixels along a side of a token."""


@dataclass(frozen=True)
class Clip:
    """4 n + 1 frames of one scene; F = n + 1 latent frames.

    Attributes:
        name: for messages.
        prompt: what there is to see.
        depth: (F, h, w) float32, z of each token in world units; 0 where unknown.
        static: (F, h, w) bool, False where anything in a token moves in any of its frames.
        cameras: of the F latent frames, image size of the frames.
        frames: (N, 3, H, W) float32 in [0, 1]; None where there are latents.
        latents: (F, C, h, w) float32, normalised; None where there are frames.
        static_latent: (C, h, w) float32, beside latents: the first frame's, as a static camera sees it, see
            :func:`~mirage.models.vae.encode_static_frame`.
        prompt_embeds: (L, D), where they were encoded.
        vae: fingerprint of the VAE that has encoded the latents.
    """

    name: str
    prompt: str
    depth: Tensor
    static: Tensor
    cameras: Cameras
    frames: Tensor | None = None
    latents: Tensor | None = None
    static_latent: Tensor | None = None
    prompt_embeds: Tensor | None = None
    vae: str | None = None


def make_clip(
    name: str, prompt: str, frames: Tensor, depth: Tensor, static: Tensor, cameras: Cameras, size: Sequence[int]
) -> Clip:
    """Make a clip of N = 4 n + 1 frames, resized to cover `size` (height, width) and cropped to it about the centre.

    Args:
        frames, depth, static: (N, 3, H, W) in [0, 1], (N, H, W), (N, H, W) bool.
        cameras: of the N frames.

    Raises:
        ValueError: another number of frames, or not finite.
    """
    count = len(frames)
    if count % TEMPORAL_COMPRESSION != 1 or not count == len(depth) == len(static) == len(cameras):
        got = f"{count}, {len(depth)}, {len(static)} and {len(cameras)}"
        raise ValueError(f"{name}: frames, depth, static and cameras must be 4 n + 1 of one number, got {got}")
    if not frames.isfinite().all():
        raise ValueError(f"{name}: frames must be finite")
    height, width = size
    rows, columns = cameras.image_size
    scale = max(height / rows, width / columns)
    grown = (max(round(rows * scale), height), max(round(columns * scale), width))
    top, left = (grown[0] - height) // 2, (grown[1] - width) // 2
    if grown != (rows, columns):
        frames = F.interpolate(frames, grown, mode="bilinear", antialias=True).clamp(0, 1)
        depth = F.interpolate(depth[:, None], grown, mode="nearest-exact")[:, 0]
        static = F.interpolate(static[:, None].float(), grown, mode="nearest-exact")[:, 0] > 0
        cameras = cameras.resized(grown)
    window = (slice(None), slice(top, top + height), slice(left, left + width))
    intrinsics = cameras.intrinsics.clone()
    intrinsics[:, 0, 2] -= left
    intrinsics[:, 1, 2] -= top
    cameras = Cameras.trusted(intrinsics, cameras.cam2world, (height, width))
    tokens = (height // TOKEN_PIXELS, width // TOKEN_PIXELS)
    kept = pool_mask(static[window], tokens)
    kept = torch.cat([kept[:1], kept[1:].unflatten(0, (-1, TEMPORAL_COMPRESSION)).all(1)])
    return Clip(
        name,
        prompt,
        depth=pool_depth(depth[window][::TEMPORAL_COMPRESSION].float(), tokens),
        static=kept,
        cameras=cameras[::TEMPORAL_COMPRESSION],
        frames=frames[:, :, window[1], window[2]].contiguous(),
    )

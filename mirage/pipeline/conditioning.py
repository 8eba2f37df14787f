"""The conditioning of a chunk: how its frames, their noise and the memory are laid out for the transformer.

Generation and training both go through here, so that what is trained is what is generated with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from mirage_kernels import Cameras, LatentCache

from ..models.latent_depth import pluecker_rays
from ..models.vae import encode_frames
from .chunks import TEMPORAL_COMPRESSION


@dataclass(frozen=True)
class CleanFrames:
    """The frames of a chunk that are given: along time [references | first, .. | preceding].

    Attributes:
        first: (B, C, 1, h, w), the target's first frame.
        references, preceding: (B, C, R, h, w), (B, C, P, h, w); R and P may be 0.
    """

    first: Tensor
    references: Tensor
    preceding: Tensor

    def around(self, latents: Tensor) -> Tensor:
        """Return (B, C, R + T + P, h, w) of target latents (B, C, T, h, w), whose first frame is replaced."""
        return torch.cat([self.references, self.first, latents[:, :, 1:], self.preceding], dim=2)

    def denoised(self, num_latents: int) -> Tensor:
        """Return (R + T + P,) float32: 1 for frames that carry noise, 0 for clean ones, to multiply time steps by."""
        references, preceding = self.references.shape[2], self.preceding.shape[2]
        denoised = torch.zeros(references + num_latents + preceding, device=self.first.device)
        denoised[references + 1 : references + num_latents] = 1.0
        return denoised

    def target(self, frames: Tensor, num_latents: int) -> Tensor:
        """Cut the target's (B, C, T, h, w) out of what the transformer gives for all frames."""
        references = self.references.shape[2]
        return frames[:, :, references : references + num_latents]


def make_memory_context(readout: Tensor, visible: Tensor, scores: Tensor | None) -> Tensor:
    """Return what the adapter is given, (B, control channels, F, h, w).

    Args:
        readout: (B, C, F, h, w) float32, what the memory shows at target and preceding frames.
        visible: (B, F, h, w) bool, where it shows something.
        scores: (1, C, F, h, w) of :func:`make_scores`, for an adapter of "scores"; None gives visibility, for "mask".
    """
    extra = visible[:, None] if scores is None else scores.expand_as(readout)
    return torch.cat([readout, extra.to(readout)], dim=1)


def show_rays(cameras: Cameras, size: tuple[int, int], channels: int) -> tuple[Tensor, Tensor]:
    """Return what an adapter is shown that steers a model without a memory: the cameras' rays, in a readout's place.

    Args:
        cameras: F of them, of target and preceding frames; the first one is where the others are seen from.
        size: (h, w) of the latents.
        channels: C of a readout, at least 6.

    Returns:
        (F, C, h, w) float32, Plücker rays (:func:`~mirage.models.latent_depth.pluecker_rays`) in the first six
        channels and zeros in the others; (F, h, w) bool, all False, for nothing is remembered. Moments are in world
        units: a model knows the unit that it was trained in.

    Raises:
        ValueError: fewer channels.
    """
    if channels < 6:
        raise ValueError(f"channels must be at least 6 to hold a ray, got {channels}")
    rays = pluecker_rays(cameras, size).movedim(1, 0)
    shown = rays.new_zeros(len(cameras), channels, *size)
    shown[:, :6] = rays
    return shown, torch.zeros(len(cameras), *size, dtype=torch.bool, device=rays.device)


def make_scores(vae: AutoencoderKLWan, frames: int, height: int, width: int) -> Tensor:
    """Encode an all-ones video to (1, C, F, h, w) latents, the published score channels.

    They depend on the shape alone. The VAE is causal: those of fewer frames are the first ones of those of more.
    """
    ratio = vae.config.scale_factor_spatial
    return encode_frames(vae, torch.ones(1, 3, TEMPORAL_COMPRESSION * (frames - 1) + 1, height * ratio, width * ratio))


def choose_references(
    cache: LatentCache,
    past: Cameras,
    targets: Cameras,
    size: tuple[int, int],
    max_frames: int,
    threshold: float,
    voxel_size: float | None,
) -> tuple[list[int], list[float]]:
    """Choose the latent frames that see most of what the targets will see, best first, and return their overlaps.

    Args:
        cache: the memory.
        past: cameras of the latent frames so far.
        targets: of the chunk's target frames.
        size: (h, w) of the latents.
        max_frames: how many to choose at most.
        threshold: least overlap, IoU of voxel sets.
        voxel_size: edge of these voxels in world units; None: of the scene, see `LatentCache.view_overlap`.
    """
    if not max_frames:
        return [], []
    overlaps = cache.view_overlap(past, targets, size, voxel_size=voxel_size).cpu()
    best = overlaps.argsort(descending=True, stable=True)[:max_frames].tolist()
    chosen = [frame for frame in best if overlaps[frame] >= threshold]
    return chosen, [overlaps[frame].item() for frame in chosen]

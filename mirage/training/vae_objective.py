"""How a VAE is trained: its batches, its loss, and the statistics of its latents."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn

from ..pipeline.chunks import TEMPORAL_COMPRESSION
from .config import TrainConfig
from .data import Clip, Sample
from .models import Models
from .randomness import draw_below, happens
from .seeds import derive_seed


class VideoBatchMaker:
    """Make batches for a VAE: short videos (B, 3, N, H, W) in [-1, 1], and the seed of the posterior's noise."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.seed, self.frames, self.device = config.seed, config.vae.frames, device

    def __call__(self, samples: Sequence[Sample]) -> tuple[Tensor, int]:
        """Cut a video out of each clip.

        Raises:
            ValueError: a clip of latents.
        """
        rng = torch.Generator().manual_seed(derive_seed(self.seed, "video", samples[0].number))
        videos = []
        for sample in samples:
            if sample.clip.frames is None:
                raise ValueError(f"{sample.clip.name}: the VAE is trained on frames, and this clip has latents")
            begin = draw_below(rng, len(sample.clip.frames) - self.frames + 1)
            videos.append(sample.clip.frames[begin : begin + self.frames].movedim(0, 1))
        return torch.stack(videos).to(self.device) * 2.0 - 1.0, derive_seed(self.seed, "posterior", samples[0].number)


class VaeObjective(nn.Module):
    """Absolute and squared error of the reconstruction, and a little divergence from a standard normal.

    Sub-token shift: in some of the steps latents are moved by a part of a token before they are decoded, by bilinear
    interpolation, and the frames by as many pixels, as a memory does that is read from another place than it was
    written at. A decoder and latents that agree with it are also easier to generate (EQ-VAE, arXiv 2502.09509, which
    scales and rotates them).

    Motion invariance, with a weight: latents are drawn towards those of a static camera, as what a memory shows was
    seen in another motion than it is read in.
    """

    def __init__(self, config: TrainConfig, models: Models) -> None:
        super().__init__()
        self.vae, self.kl_weight, self.shift_probability = models.vae, config.vae.kl_weight, config.vae.shifted
        self.motion_weight = config.vae.steady
        if config.vae.frames == 1:
            _convolve_single_frames(self.vae)

    def forward(self, videos: tuple[Tensor, int]) -> dict[str, Tensor]:
        """Compute `loss`, and its parts; `psnr` in dB of pixels in [0, 1]."""
        video, seed = videos
        rng = torch.Generator().manual_seed(seed)
        posterior = self.vae.encode(video).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng)
        latents = posterior.mean + posterior.std * noise.to(posterior.mean)
        if self.shift_probability and happens(rng, self.shift_probability):
            side = video.shape[-1] // latents.shape[-1]
            down, right = draw_below(rng, side), draw_below(rng, side)
            latents = between_tokens(latents, down / side, right / side)
            rows, columns = (side * count for count in latents.shape[-2:])
            video = video[..., down : down + rows, right : right + columns]
        decoded = self.vae.decode(latents).sample.float()
        squared = F.mse_loss(decoded, video)
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).float().mean()
        loss = F.l1_loss(decoded, video) + squared + self.kl_weight * divergence
        parts = {"divergence": divergence, "psnr": -10.0 * (0.25 * squared.detach()).log10()}
        if self.motion_weight:
            parts["unsteady"] = self._motion_in_latents(videos[0], posterior.mean)
            loss = loss + self.motion_weight * parts["unsteady"]
        return {"loss": loss, **parts}

    def _motion_in_latents(self, video: Tensor, latents: Tensor) -> Tensor:
        """Measure what latents have of the camera's motion: their squared distance from static latents of the same
        keyframes, over the variance of these."""
        keyframes = video[:, :, ::TEMPORAL_COMPRESSION][:, :, 1:].movedim(2, 1).flatten(0, 1)
        static = self.vae.encode(
            keyframes[:, :, None].expand(-1, -1, 1 + TEMPORAL_COMPRESSION, -1, -1)
        ).latent_dist.mean[:, :, 1]
        static = static.unflatten(0, (len(video), -1)).movedim(1, 2).float()
        return F.mse_loss(latents[:, :, 1:].float(), static) / static.detach().var()


def between_tokens(latents: Tensor, down: float, right: float) -> Tensor:
    """Interpolate (..., h, w) latents at [0, 1) of a token further down and to the right: (..., h - 1, w - 1)."""
    upper = torch.lerp(latents[..., :-1, :-1], latents[..., :-1, 1:], right)
    lower = torch.lerp(latents[..., 1:, :-1], latents[..., 1:, 1:], right)
    return torch.lerp(upper, lower, down)


def _convolve_single_frames(vae: AutoencoderKLWan) -> None:
    """Let a VAE's causal convolutions of a single frame leave out their taps on the zeros before it, two of three.

    The sums are the same, except for those zeros.
    """

    def convolve(self: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if cache_x is not None or x.shape[2] != 1 or self.stride != (1, 1, 1):
            return type(self).forward(self, x, cache_x)
        columns, _, rows, _, *_ = self._padding
        weight, frame = self.weight[:, :, -1], x[:, :, 0]
        return F.conv2d(frame, weight, self.bias, padding=(rows, columns))[:, :, None]

    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            module.forward = MethodType(convolve, module)  # type: ignore[method-assign]


@torch.no_grad()
def measure_latents(models: Models, clips: Sequence[Clip], device: torch.device) -> tuple[list[float], list[float]]:
    """Measure mean and standard deviation per channel of the VAE's latents, not normalised."""
    total: Any = 0.0
    squares: Any = 0.0
    count = 0
    for clip in clips:
        assert clip.frames is not None
        video = clip.frames.movedim(0, 1)[None].to(device) * 2.0 - 1.0
        values = models.vae.encode(video.to(models.vae.dtype)).latent_dist.mode()[0].double().flatten(1).cpu()
        total, squares, count = total + values.sum(1), squares + values.square().sum(1), count + values.shape[1]
    mean = total / count
    return mean.tolist(), (squares / count - mean.square()).clamp(min=1e-12).sqrt().tolist()

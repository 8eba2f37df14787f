"""`LatentDepth`: token depth of a chunk from its latents, its cameras and what the memory sees of it, so that a chunk
can be written to the memory without decoding it.

A small network corrects the memory's depth and fills its holes. It never sees an absolute length: depths and camera
translations are divided by the chunk's own scale, the median of the memory's depth, and its answer is multiplied by
it. Poses enter relative to the chunk's first camera only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from mirage_kernels import Cameras, Readout

RELATIVE_ERROR = 0.05
"""`confidence` is the probability that a token's relative depth error is below this."""

_GROUPS = 8
_LEVELS = 4  # grids of 1, 1/2, 1/4 and 1/8: at 44x80 every token sees half of the grid or more
_MAX_LOG_RESIDUAL = 8.0  # a factor of 3,000: keeps depth positive and finite, whatever the network says


@dataclass
class LatentDepthOutput(BaseOutput):
    """Token depth of a chunk; each (B, F, h, w) float32, without B from :meth:`LatentDepth.predict`.

    Attributes:
        depth: z along the optical axis of each frame's camera, in world units, positive.
        confidence: in [0, 1], the predicted probability that the relative error of `depth` is below 5 %.
        confidence_logits: its logit, for the loss.
    """

    depth: Tensor
    confidence: Tensor
    confidence_logits: Tensor


class LatentDepth(ModelMixin, ConfigMixin):
    """Latents, rays and the memory's depth to token depth and its confidence.

    Depth is base * exp(residual): base is the memory's depth where known and the chunk's scale elsewhere, and the
    residual is the network's. Its last layer starts at zero, so that untrained it returns the memory's depth.

    Scale: multiply the memory's depth and the cameras' translations by s, and depth is multiplied by s (to rounding;
    to the bit where s is a power of two). Where the memory knows nothing of a chunk, there is no such scale to be had:
    it is then 1 world unit, and depth comes in the units of the training data.

    The network is a U of residual blocks of two 3x3x3 convolutions, all of one width, on grids of 1, 1/2, 1/4 and 1/8
    of the tokens; time is not resampled. It takes any F, h, w >= 1. Its dtype may be a half one; scale, logarithms and
    depth are float32.

    Args:
        latent_channels: C of the latents.
        width: channels of the network, a multiple of 8. 64 makes 1.8 M parameters, 16 makes 0.1 M.
    """

    @register_to_config
    def __init__(self, latent_channels: int = 48, width: int = 64) -> None:
        super().__init__()
        if width < 1 or width % _GROUPS:
            raise ValueError(f"width must be a positive multiple of {_GROUPS}, got {width}")
        self.conv_in = nn.Conv3d(latent_channels + 8, width, 3, padding=1)
        self.down = nn.ModuleList(_Block(width) for _ in range(_LEVELS))
        self.shrink = nn.ModuleList(
            nn.Conv3d(width, width, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)) for _ in range(_LEVELS - 1)
        )
        self.up = nn.ModuleList(_Block(width) for _ in range(_LEVELS - 1))
        self.norm_out = nn.GroupNorm(_GROUPS, width)
        self.conv_out = nn.Conv3d(width, 2, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, latents: Tensor, rays: Tensor, memory_depth: Tensor, memory_mask: Tensor) -> LatentDepthOutput:
        """Estimate the depth of B chunks, differentiably.

        Args:
            latents: (B, C, F, h, w) float, normalised as the diffusion model holds them.
            rays: (B, 6, F, h, w) float32 of :func:`pluecker_rays`.
            memory_depth: (B, F, h, w) float, what the memory sees from the chunk's cameras, in world units.
            memory_mask: (B, F, h, w) bool, True where `memory_depth` is known; a value there that is not positive and
                finite counts as unknown.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        self._check(latents, rays, memory_depth, memory_mask)
        memory_depth = memory_depth.float()
        known = memory_mask & (memory_depth > 0) & (memory_depth < math.inf)
        scale = _median(memory_depth, known).view(-1, 1, 1, 1)
        base = torch.where(known, memory_depth, scale)
        geometry = [
            (base / scale).log()[:, None],  # 0 where unknown
            known.float()[:, None],
            rays[:, :3].float(),
            rays[:, 3:].float() / scale[:, None],
        ]
        features = torch.cat([latents, *(part.to(latents.dtype) for part in geometry)], dim=1).to(self.dtype)
        residual, logits = self._network(features).float().unbind(1)
        depth = base * residual.clamp(-_MAX_LOG_RESIDUAL, _MAX_LOG_RESIDUAL).exp()
        return LatentDepthOutput(depth=depth, confidence=logits.sigmoid(), confidence_logits=logits)

    def _network(self, x: Tensor) -> Tensor:
        x = self.down[0](self.conv_in(x))
        skips = []
        for shrink, block in zip(self.shrink, self.down[1:], strict=True):
            skips.append(x)
            x = block(shrink(x))
        for block in self.up:
            skip = skips.pop()
            x = block(skip + F.interpolate(x, size=skip.shape[2:], mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))

    @torch.no_grad()
    def predict(self, latents: Tensor, cameras: Cameras, readout: Readout | None = None) -> LatentDepthOutput:
        """Estimate the depth of one chunk, in the shapes that `LatentCache.write` takes.

        Args:
            latents: (F, C, h, w) float, normalised as the diffusion model holds them.
            cameras: of the F latent frames, of any image size.
            readout: what the memory sees from these cameras on the grid of the latents, `cache.read(cameras, (h, w))`;
                None where there is no memory yet.

        Returns:
            :class:`LatentDepthOutput`, each (F, h, w) float32 on the device of the model.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        channels, views = self.config.latent_channels, len(cameras)
        if latents.ndim != 4 or latents.shape[:2] != (views, channels):
            expected = f"(F, {channels}, h, w) with the F of cameras, {views}"
            raise ValueError(f"latents must be {expected}, got {tuple(latents.shape)}")
        grid = (views, *latents.shape[2:])
        depth = latents.new_zeros(grid) if readout is None else readout.depth
        mask = depth > 0 if readout is None else readout.mask
        if depth.shape != grid:
            raise ValueError(f"readout must be of the frames and the grid of latents, {grid}, got {tuple(depth.shape)}")
        rays = pluecker_rays(cameras, (grid[1], grid[2]))
        chunk = (latents.transpose(0, 1), rays, depth, mask)
        output = self(*(part[None].to(self.device) for part in chunk))
        return LatentDepthOutput(**{name: value[0] for name, value in output.items()})

    def _check(self, latents: Tensor, rays: Tensor, memory_depth: Tensor, memory_mask: Tensor) -> None:
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            expected = f"(B, {channels}, F, h, w), none of them 0"
            raise ValueError(f"latents must be {expected}, got {tuple(latents.shape)}")
        batch, _, *grid = latents.shape
        for name, value, shape in (
            ("rays", rays, (batch, 6, *grid)),
            ("memory_depth", memory_depth, (batch, *grid)),
            ("memory_mask", memory_mask, (batch, *grid)),
        ):
            if value.shape != shape:
                raise ValueError(f"{name} must be {shape} as latents, got {tuple(value.shape)}")
        for name, value in (("latents", latents), ("rays", rays), ("memory_depth", memory_depth)):
            if not value.is_floating_point():
                raise TypeError(f"{name} must be float, got {value.dtype}")
        if memory_mask.dtype != torch.bool:
            raise TypeError(f"memory_mask must be bool, got {memory_mask.dtype}")


class _Block(nn.Module):
    """Add two normalised 3x3x3 convolutions; (B, width, F, h, w) in and out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, width)
        self.conv1 = nn.Conv3d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(_GROUPS, width)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


def pluecker_rays(cameras: Cameras, size: tuple[int, int]) -> Tensor:
    """Return Plücker coordinates of the rays through the token centres, in the axes of the first camera.

    The ray of token (i, j) passes through (j + 0.5, i + 0.5) of the grid. With o its camera's centre and d its unit
    direction, both seen from the first camera, its coordinates are (d, o x d): the same for every point o on the ray.

    Args:
        cameras: F >= 1 views; their intrinsics are resized to the grid.
        size: (h, w) of the token grid.

    Returns:
        (6, F, h, w) float32 on the cameras' device: d, then the moment o x d in world units. Computed in float64.
    """
    cameras = cameras.resized(size)
    centers = (torch.arange(side, dtype=torch.float64, device=cameras.device) + 0.5 for side in size)
    v, u = torch.meshgrid(*centers, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)]).flatten(1)  # (3, h w)
    to_first = cameras.world2cam[:1] @ cameras.cam2world
    directions = F.normalize(to_first[:, :3, :3] @ torch.linalg.inv(cameras.intrinsics) @ pixels, dim=1)
    moments = torch.linalg.cross(to_first[:, :3, 3:].expand_as(directions), directions, dim=1)
    return torch.cat([directions, moments], dim=1).transpose(0, 1).unflatten(2, size).float()


def latent_depth_loss(output: LatentDepthOutput, depth: Tensor, valid: Tensor) -> Tensor:
    """Return |log error| of depth, plus the binary cross-entropy of confidence against whether the error is below 5 %.

    Both are means over the valid tokens. What confidence is held to is a fact about the prediction, without gradient:
    it does not pull at depth.

    Args:
        output: of :meth:`LatentDepth.forward`.
        depth: (B, F, h, w) float, true depth in world units, positive and finite where valid.
        valid: (B, F, h, w) bool.

    Returns:
        A scalar, float32; 0 where nothing is valid.
    """
    true = torch.where(valid, depth, 1.0).float()
    log_error = (output.depth.log() - true.log()).abs()
    right = (output.depth.detach() / true - 1).abs() < RELATIVE_ERROR
    doubt = F.binary_cross_entropy_with_logits(output.confidence_logits, right.float(), reduction="none")
    return torch.where(valid, log_error + doubt, 0.0).sum() / valid.sum().clamp(min=1)


def _median(values: Tensor, known: Tensor) -> Tensor:
    """Return the (B,) lower median of the known of each row of `values` (B, ...), 1 where none is, without waiting."""
    ordered = torch.where(known, values, math.inf).flatten(1).sort(dim=1).values
    middle = (known.flatten(1).sum(1, keepdim=True) - 1).clamp(min=0) // 2
    median = ordered.gather(1, middle)[:, 0]
    return torch.where(median < math.inf, median, 1.0)

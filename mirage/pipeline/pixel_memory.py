"""A memory of RGB points, to compare with: every pixel of every written frame, rasterised and encoded for each chunk.

Points lie in a :class:`~mirage_kernels.LatentCache` of their own whose tokens are pixels; its channels are red, green,
blue, and an unused one, so that a row is one 16-byte load. Everything is appended. A chunk's images are read at full
resolution by the same operator as latents are, `splat_aligned`, which closes the gaps between points and blends those
that fit; holes are black. The VAE encodes the images, all frames of the chunk and not the keyframes alone.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from mirage_kernels import Cameras, LatentCache, Readout, WriteReport
from mirage_kernels.geometry import pool_depth

from ..models.vae import encode_frames
from .chunks import TEMPORAL_COMPRESSION

CHANNELS = 4

_EDGE = 1.1  # depths of neighbouring tokens with a greater ratio are of two surfaces


def make_pixel_cache(device: torch.device | str = "cpu", near: float | None = None) -> LatentCache:
    """Make an empty cloud of pixels, with the least depth of :class:`~mirage_kernels.LatentCache`."""
    return LatentCache(CHANNELS, dtype=torch.float32, device=device, write_policy="append", near=near)


def write_pixels(
    cache: LatentCache, frames: Tensor, depth: Tensor, cameras: Cameras, static: Tensor | None = None
) -> WriteReport:
    """Append every static pixel of known depth.

    Args:
        cache: of :func:`make_pixel_cache`.
        frames: (T, 3, H, W) float in [0, 1].
        depth: (T, H', W') float, z in world units; where coarser than the frames, as a depth head gives it, see
            :func:`refine_depth`.
        cameras: T views.
        static: (T, H', W') bool, True = static, keep; None keeps everything.

    Raises:
        ValueError, TypeError: as of `LatentCache.write`.
    """
    size = (frames.shape[2], frames.shape[3])
    if depth.shape[1] < size[0] or depth.shape[2] < size[1]:
        depth = refine_depth(depth, size)
        if static is not None:
            static = F.interpolate(static[:, None].float(), size, mode="nearest-exact")[:, 0] > 0
    rows = F.pad(frames.float(), (0, 0, 0, 0, 0, CHANNELS - 3))
    return cache.write(rows.to(cache.device), depth.to(cache.device), cameras, static)


def read_pixels(cache: LatentCache, vae: AutoencoderKLWan, cameras: Cameras) -> Readout:
    """Read what 4 n + 1 views see of the points, on the latent grid: rasterised, then encoded.

    Args:
        cache: of :func:`make_pixel_cache`.
        vae: whose encoder is used.
        cameras: of 4 n + 1 consecutive frames; their image size is that of the images, multiples of 16.

    Returns:
        :class:`~mirage_kernels.Readout` of the n + 1 latent frames. Latents are float32, normalised, and those of the
        black of a hole where there is one. The mask is True where half of the pixels of its up to four images show
        a point, and those of its keyframe; depth is that of :func:`~mirage_kernels.reference.pool_depth` there. There
        is no index: it is -1.

    Raises:
        ValueError: another number of views.
    """
    if len(cameras) % TEMPORAL_COMPRESSION != 1:
        raise ValueError(f"cameras must be 4 n + 1 views, got {len(cameras)}")
    seen = cache.read(cameras, cameras.image_size)
    images = seen.latents[:, :3].movedim(0, 1)[None]
    latents = encode_frames(vae, images * 2.0 - 1.0)[0].movedim(1, 0).to(cache.device)
    size = (latents.shape[2], latents.shape[3])
    weight = F.adaptive_avg_pool2d(seen.mask[:, None].float(), size)[:, 0]
    weight = torch.cat([weight[:1], weight[1:].unflatten(0, (-1, TEMPORAL_COMPRESSION)).mean(1)])
    depth = pool_depth(torch.where(seen.mask, seen.depth, 0.0)[::TEMPORAL_COMPRESSION], size)
    mask = (weight >= 0.5) & (depth > 0)
    return Readout(latents, mask, torch.where(mask, depth, 0.0), torch.full(mask.shape, -1, device=cache.device))


def refine_depth(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Refine token depth (T, h, w) to pixels (T, H, W).

    Inverse depth is linear on a plane, and interpolated linearly where neighbours are of one surface; at edges and
    unknown tokens each pixel takes its token's.

    Args:
        depth: float, z in world units; 0 and negative mean unknown.
        size: (H, W), at least (h, w).
    """
    depth = depth[:, None].float().nan_to_num(0.0, 0.0, 0.0).clamp(min=0.0)
    around = F.pad(depth, (1, 1, 1, 1), mode="replicate")
    high, low = F.max_pool2d(around, 3, 1), -F.max_pool2d(-around, 3, 1)
    smooth = ((low > 0) & (high < low * _EDGE)).float()
    nearest = F.interpolate(depth, size, mode="nearest-exact")
    inverse = F.interpolate(1.0 / torch.where(depth > 0, depth, 1.0), size, mode="bilinear", align_corners=False)
    inside = F.interpolate(smooth, size, mode="nearest-exact") > 0
    return torch.where(inside, 1.0 / inverse, nearest)[:, 0]


def between(cameras: Cameras) -> Cameras:
    """Interpolate views of every frame, 4 (F - 1) + 1, between F >= 1 keyframes, which are kept as they are.

    Centres lie on the line between their keyframes; rotations are the nearest ones to the blend of theirs, which is
    the shortest turn for the small turns of neighbouring keyframes.
    """
    between_two = TEMPORAL_COMPRESSION - 1
    steps = torch.arange(1, TEMPORAL_COMPRESSION, dtype=torch.float64, device=cameras.device)[:, None, None]
    weights = steps / TEMPORAL_COMPRESSION
    poses, lenses = [cameras.cam2world[:1]], [cameras.intrinsics[:1]]
    for (before, after), (wide, narrow) in zip(
        pairwise(cameras.cam2world.unbind()), pairwise(cameras.intrinsics.unbind()), strict=True
    ):
        blend = torch.lerp(before.expand(between_two, 4, 4), after.expand(between_two, 4, 4), weights)
        left, _, right = torch.linalg.svd(blend[:, :3, :3])
        blend[:, :3, :3] = left @ right
        poses += [blend, after[None]]
        lenses += [torch.lerp(wide.expand(between_two, 3, 3), narrow.expand(between_two, 3, 3), weights), narrow[None]]
    return Cameras.trusted(torch.cat(lenses), torch.cat(poses), cameras.image_size)

"""Hold RGB points, rasterise and encode them for every chunk: the other side of the comparison.

Every pixel of every stored frame is lifted to a coloured point. For each of a chunk's images (33, not the 9 of the
latent side) the points are rasterised at full resolution with a z-buffer and bilinear weights; what no point reaches is
a hole; the VAE encoder turns the images into the latent grid that the latent memory reads directly.

The bilinear image is defined once. A point lies between four pixel centres and is a candidate at each, except where
its weight along a row or column is under MARGIN (or the noise of a camera that comes back exactly would make holes). In
each quadrant of a pixel the nearest candidate wins, quadrants reaching MARGIN past the centre lines. The pixel blends
its at most four winners that lie within DEPTH_TOLERANCE of the nearest of them, by their bilinear weights. Published
systems add up *every* candidate near the surface, which takes four more scattered sums over all points: this definition
favours the pixel side.

Two versions. :class:`PlainPixelMemory` is PyTorch as such systems write it. :class:`KernelPixelMemory` rasterises with
this project's own ``splat``: ``bilinear`` is the definition, ``nearest`` keeps one point a pixel, which is cheaper
still; ratios are taken against whichever version is fastest.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_kernels import Cameras, LatentCache, splat
from mirage_kernels.geometry import make_projection

NEAR = 0.05
DEPTH_TOLERANCE = 0.05
MARGIN = 0.1
BYTES_PER_POINT = 24  # float32 position and colour, as published systems hold them
BYTES_PER_POINT_UINT8 = 15  # float32 position, 8-bit colour
FULL_WIDTH = 160  # base_dim of Wan2.2's encoder
_EMPTY = 0x7F800000 << 32  # the key of depth infinity
_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # down, right: which of the four pixels around a point
_FRAMES_AT_ONCE = 4


class Images(NamedTuple):
    """Hold rendered frames: ``rgb`` (F, 3, H, W) float32 in [0, 1], ``seen`` (F, H, W) bool; 0 and False in holes."""

    rgb: Tensor
    seen: Tensor


def _blend_weights(du: Tensor, dv: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
    """Weigh each of a pixel's four winners, and say which pixels have any: (4, H, W) and bool (H, W).

    ``du`` and ``dv`` (4, H, W) are distances to the pixel's centre along rows and columns, signed, overwritten;
    ``depth`` (4, H, W) is infinite where a quadrant is empty.
    """
    limit = depth.amin(0)
    seen = limit < math.inf
    weight = du.abs_().neg_().add_(1).mul_(dv.abs_().neg_().add_(1))
    weight.masked_fill_((depth > limit.mul_(1 + DEPTH_TOLERANCE)).logical_or_(~seen), 0)
    return weight.div_(weight.sum(0).masked_fill_(~seen, 1)), seen


class PlainPixelMemory:
    """Keep points and colours in plain PyTorch, on any device.

    Kept in buffers that grow by half, coordinates one row each (a matrix product with (3, N) is a third faster than
    with (N, 3)), and projected into a buffer that all frames share.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._count = 0
        self._positions = torch.empty(3, 0, device=device)
        self._colours = torch.empty(0, 3, device=device)
        self._projected = torch.empty(3, 0, device=device)

    def __len__(self) -> int:
        return self._count

    @property
    def points(self) -> Tensor:
        """Return the positions (N, 3)."""
        return self._positions[:, : self._count].T

    @property
    def nbytes(self) -> int:
        """Return the bytes of positions and colours."""
        return self._count * BYTES_PER_POINT

    def clear(self) -> None:
        """Forget every point and keep the buffers."""
        self._count = 0

    def write(self, rgb: Tensor, depth: Tensor, cameras: Cameras) -> None:
        """Lift and append every pixel of known depth: rgb (T, 3, H, W) in [0, 1], depth (T, H, W)."""
        height, width = depth.shape[1:]
        cameras = cameras.to(depth.device).resized((height, width))
        columns = torch.arange(width, device=depth.device) + 0.5
        rows = torch.arange(height, device=depth.device)[:, None] + 0.5
        self._reserve(depth.numel())
        for image, z, k, pose in zip(rgb, depth, cameras.intrinsics.float(), cameras.cam2world.float(), strict=True):
            x = (columns - k[0, 2]) / k[0, 0] * z
            y = (rows - k[1, 2]) / k[1, 1] * z
            known = ((z > 0) & torch.isfinite(z)).flatten().nonzero()[:, 0]
            camera = torch.stack([x, y, z]).flatten(1).index_select(1, known)
            end = self._count + known.numel()
            self._positions[:, self._count : end] = torch.addmm(pose[:3, 3:], pose[:3, :3], camera)
            self._colours[self._count : end] = image.flatten(1).index_select(1, known).T
            self._count = end

    def _reserve(self, points: int) -> None:
        needed = self._count + points
        if needed > self._positions.shape[1]:
            room = max(needed, self._positions.shape[1] * 3 // 2)
            positions, colours = self._positions.new_empty(3, room), self._colours.new_empty(room, 3)
            positions[:, : self._count] = self._positions[:, : self._count]
            colours[: self._count] = self._colours[: self._count]
            self._positions, self._colours = positions, colours

    def render(self, cameras: Cameras, size: tuple[int, int]) -> Images:
        """Render F images of ``size`` = (height, width)."""
        cameras = cameras.to(self._positions.device).resized(size)
        projections = make_projection(cameras.intrinsics, cameras.cam2world, torch.float32)
        rgb = self._colours.new_empty(len(cameras), 3, *size)
        seen = torch.empty(len(cameras), *size, dtype=torch.bool, device=rgb.device)
        if self._projected.shape[1] < self._count:
            self._projected = self._positions.new_empty(3, self._positions.shape[1])
        for t, projection in enumerate(projections):
            colour, seen[t] = self._render_one(projection, size)
            rgb[t] = colour.permute(2, 0, 1)
        return Images(rgb, seen)

    def _render_one(self, projection: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        height, width = size
        positions, projected = self._positions[:, : self._count], self._projected[:, : self._count]
        torch.addmm(projection[:, 3:], projection[:, :3], positions, out=projected)
        # From here on pixel centres are at whole numbers.
        u, v, z = projected[0].div_(projected[2]).sub_(0.5), projected[1].div_(projected[2]).sub_(0.5), projected[2]
        index = ((z > NEAR) & (u >= -1) & (u < width) & (v >= -1) & (v < height)).nonzero()[:, 0]
        if index.numel() == 0:
            return z.new_zeros(height, width, 3), torch.zeros(height, width, dtype=torch.bool, device=z.device)
        u, v, z = projected.index_select(1, index)
        # One cell of margin on every side, so that no corner needs a test.
        stride = width + 2
        columns = ((u + MARGIN).floor_().long() + 1, (u - MARGIN).floor_().long() + 2)
        rows = (((v + MARGIN).floor_().long() + 1) * stride, ((v - MARGIN).floor_().long() + 2) * stride)
        key = (z.view(torch.int32).long() << 32) | torch.arange(index.numel(), device=z.device)
        keys = torch.full((4, (height + 2) * stride), _EMPTY, device=z.device)
        for corner, (down, right) in zip(keys, _CORNERS, strict=True):
            corner.scatter_reduce_(0, rows[down] + columns[right], key, "amin")
        keys = keys.view(4, height + 2, stride)[:, 1:-1, 1:-1]
        winner = (keys & 0xFFFFFFFF).flatten()
        depth = (keys >> 32).int().view(torch.float32)
        du = u.index_select(0, winner).view(depth.shape).sub_(torch.arange(width, device=z.device))
        dv = v.index_select(0, winner).view(depth.shape).sub_(torch.arange(height, device=z.device)[:, None])
        weights, seen = _blend_weights(du, dv, depth)
        colour = self._colours.index_select(0, index.index_select(0, winner)).view(*depth.shape, 3)
        return (weights[..., None] * colour).sum(0), seen


class KernelPixelMemory:
    """Keep the same memory on this project's kernels: a ``LatentCache`` of pixels, whose latents are RGB.

    Colours are rows of four float32, the last unused: a row is then one 16-byte load, and none has to be converted.
    Of rows of 3, 4 and 8 float32 or float16 this was the fastest, by up to half.

    Args:
        splat: ``"bilinear"``, the definition: four splats an image, each shifted by half a pixel, in one call.
            ``"nearest"``: one splat, the nearest point of each pixel.
    """

    def __init__(self, splat: str = "nearest", device: torch.device | str = "cpu", capacity: int | None = None) -> None:
        self.splat = splat
        self.cache = LatentCache(4, dtype=torch.float32, device=device, capacity=capacity, write_policy="append")
        self._rows = torch.empty(0)  # colours and the unused channel, kept from write to write

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def points(self) -> Tensor:
        """Return positions and footprints (N, 4)."""
        return self.cache.points

    @property
    def nbytes(self) -> int:
        """Return the bytes that the cache holds."""
        return self.cache.nbytes

    def clear(self) -> None:
        """Forget every point and keep the buffers."""
        self.cache.clear()

    def write(self, rgb: Tensor, depth: Tensor, cameras: Cameras) -> None:
        """Lift and append every pixel of known depth: rgb (T, 3, H, W) in [0, 1], depth (T, H, W)."""
        if self._rows.shape != (len(rgb), 4, *rgb.shape[2:]):
            self._rows = rgb.new_zeros(len(rgb), 4, *rgb.shape[2:])
        self._rows[:, :3] = rgb
        # Where the grid is the depth map itself, either sampling gives each pixel its own depth; this one is the
        # faster, and asks only that what is unknown be 0.
        depth = depth.nan_to_num(0.0, 0.0, 0.0)
        self.cache.write(self._rows, depth, cameras, depth_sampling="bilinear")

    def render(self, cameras: Cameras, size: tuple[int, int]) -> Images:
        """Render F images of ``size`` = (height, width)."""
        if self.splat == "nearest":
            view = self.cache.read(cameras, size, splat="nearest", near=NEAR)
            return Images(view.latents[:, :3], view.mask)
        cameras = cameras.to(self.cache.device).resized(size)
        rgb = torch.zeros(len(cameras), 3, *size, device=self.cache.device)
        seen = torch.zeros(len(cameras), *size, dtype=torch.bool, device=self.cache.device)
        if len(self) > 0:
            for t in range(0, len(cameras), _FRAMES_AT_ONCE):
                part = slice(t, t + _FRAMES_AT_ONCE)
                self._render_bilinear(cameras[part], size, rgb[part], seen[part])
        return Images(rgb, seen)

    def _render_bilinear(self, cameras: Cameras, size: tuple[int, int], rgb: Tensor, seen: Tensor) -> None:
        buffers, frames = self.cache.buffers, len(cameras)
        points = buffers.points
        # Moving the principal point by about half a pixel makes `floor` name one of the four pixels around a point.
        intrinsics = cameras.intrinsics.repeat(4, 1, 1)
        for corner, (down, right) in zip(intrinsics.split(frames), _CORNERS, strict=True):
            corner[:, 0, 2] += (0.5 - MARGIN) * (2 * right - 1)
            corner[:, 1, 2] += (0.5 - MARGIN) * (2 * down - 1)
        poses = cameras.cam2world.repeat(4, 1, 1)
        view = splat(points, buffers.features, intrinsics, poses, size, num_points=buffers.count, near=NEAR)
        columns = torch.arange(size[1], device=points.device) + 0.5
        rows = torch.arange(size[0], device=points.device)[:, None] + 0.5
        # Frame by frame, so that what one operation writes the next finds in the cache.
        for t, projection in enumerate(make_projection(cameras.intrinsics, cameras.cam2world, torch.float32)):
            depth = view.depth[t::frames].masked_fill(~view.mask[t::frames], math.inf)
            winner = points.index_select(0, view.index[t::frames].clamp(min=0).flatten())
            a, b = torch.addmm(projection[:2, 3:], projection[:2, :3], winner[:, :3].T).view(2, *depth.shape)
            weights, seen[t] = _blend_weights(a.div_(depth).sub_(columns), b.div_(depth).sub_(rows), depth)
            torch.sum(view.latents[t::frames, :3] * weights[:, None], 0, out=rgb[t])


def make_encoder(
    base_dim: int = FULL_WIDTH,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    decoder_base_dim: int = 16,
) -> Any:
    """Make diffusers' ``AutoencoderKLWan`` in Wan2.2's configuration; random weights take as long as trained ones.

    ``base_dim`` below FULL_WIDTH is a smaller encoder, for runs that must be quick; rows name it. ``decoder_base_dim``
    is 256 in Wan2.2; the pixel memory never decodes.

    Raises:
        RuntimeError: diffusers is not installed.
    """
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise RuntimeError(f"the VAE encoder needs diffusers: pip install 'mirage-world[bench]' ({error})") from error
    vae: Any = AutoencoderKLWan(
        base_dim=base_dim,
        decoder_base_dim=decoder_base_dim,
        z_dim=48,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
    )
    return vae.to(device=device, dtype=dtype).eval().requires_grad_(False)


@torch.inference_mode()
def encode(vae: Any, images: Images) -> tuple[Tensor, Tensor]:
    """Encode 1 + 4n images to what the latent memory reads: latents (n + 1, 48, h, w), mask (n + 1, h, w).

    A latent cell is seen where at least half of its pixels are, over the up to four images it stands for.
    """
    video = images.rgb.mul(2).sub_(1).permute(1, 0, 2, 3)[None].to(vae.dtype)
    latents = vae.encode(video).latent_dist.mode()[0].permute(1, 0, 2, 3)
    seen = F.avg_pool2d(images.seen[:, None].float(), 16)[:, 0]
    seen = torch.cat([seen[:1], seen[1:].unflatten(0, (-1, 4)).mean(1)])
    return latents, seen >= 0.5

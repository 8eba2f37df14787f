"""What `mirage demo` measures: the memory beside a point cloud of the same frames, its readouts beside the truth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from mirage_kernels import Cameras, LatentCache, back_project, splat

from ...media import upsample
from ...scenes.patch_pca import PatchCodec
from ...scenes.rgbd import RGBDFrames

PATCH = 16
"""Pixels along a side of a token."""

_CLOUD_BYTES, _CLOUD_BYTES_UINT8 = 24, 15  # a point: float32 xyz, and rgb as float32 or as uint8


def compare_with_point_cloud(
    cache: LatentCache,
    frames: RGBDFrames,
    camera: Cameras,
    grid: tuple[int, int],
    step: Callable[[str], None],
) -> dict[str, float]:
    """Measure a point cloud of the same frames beside the cache: its bytes, and the time to show `camera`.

    Args:
        grid: height and width of the latent grid.
        step: called with what is done next.
    """
    points, colours = [], []
    for i in range(len(frames)):
        step("make the point cloud")
        frame, view = frames[[i]], frames.cameras[i].to(camera.device)
        depth = frame.depth.to(camera.device)
        lifted = back_project(depth, view.intrinsics, view.cam2world, view.image_size)
        points.append(lifted.points[lifted.valid])
        colours.append(frame.images.to(camera.device).permute(0, 2, 3, 1)[lifted.valid])
    xyz, rgb = torch.cat(points), torch.cat(colours)
    del points, colours
    read_ms = _milliseconds(lambda: cache.read(camera, size=grid), camera.device)
    rasterise_ms = _milliseconds(
        lambda: splat(xyz, rgb, camera.intrinsics, camera.cam2world, camera.image_size), camera.device
    )
    return {
        "cloud_points": len(xyz),
        "cloud_bytes": len(xyz) * _CLOUD_BYTES,
        "cloud_bytes_uint8": len(xyz) * _CLOUD_BYTES_UINT8,
        "memory_ratio": len(xyz) * _CLOUD_BYTES / cache.nbytes,
        "memory_ratio_uint8": len(xyz) * _CLOUD_BYTES_UINT8 / cache.nbytes,
        "read_ms": read_ms,
        "rasterise_ms": rasterise_ms,
        "speed_ratio": rasterise_ms / read_ms,
    }


def _milliseconds(function: Callable[[], object], device: torch.device) -> float:
    """Measure the median of up to 50 calls in up to two seconds, at least three, after one to warm up."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    function()
    times: list[float] = []
    while len(times) < 3 or (len(times) < 50 and sum(times) < 2.0):
        began = now()
        function()
        times.append(now() - began)
    return 1e3 * median(times)


@dataclass(frozen=True)
class Comparison:
    """One held-out view beside what the memory shows there, on the CPU, and sums that can be pooled."""

    truth: Tensor  # (3, H, W) in [0, 1]
    decoded: Tensor  # (3, H, W) in [0, 1]
    mask: Tensor  # (h, w) bool
    depth: Tensor  # (h, w) metres
    latent_error: float  # squared, over covered cells
    latent_energy: float  # of the truth, over covered cells
    pixel_error: float  # squared, over covered pixels
    codec_error: float  # the same, of the truth encoded and decoded

    @property
    def error(self) -> float:
        """Return the relative error of the readout; infinite where nothing is covered."""
        return self.latent_error / self.latent_energy if self.latent_energy else math.inf


def compare(cache: LatentCache, codec: PatchCodec, frame: RGBDFrames, grid: tuple[int, int]) -> Comparison:
    """Read the cache at one held-out frame, and compare with it."""
    device = codec.mean.device
    truth = frame.images.to(device)
    true_latents = codec.encode(truth)
    readout = cache.read(frame.cameras.to(device), size=grid)
    latents = readout.latents.float()
    decoded = codec.decode(latents)
    cells = readout.mask[:, None]
    pixels = upsample(cells, frame.cameras.image_size)

    def energy(values: Tensor, where: Tensor) -> float:
        return (values.double().square() * where).sum().item()

    return Comparison(
        truth=truth[0].cpu(),
        decoded=decoded[0].cpu(),
        mask=readout.mask[0].cpu(),
        depth=readout.depth[0].cpu(),
        latent_error=energy(latents - true_latents, cells),
        latent_energy=energy(true_latents, cells),
        pixel_error=energy(decoded - truth, pixels),
        codec_error=energy(codec.decode(true_latents) - truth, pixels),
    )


def pool(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Pool figures over all cells of these views; at least one is covered."""
    covered = sum(int(view.mask.sum()) for view in comparisons)

    def decibels(squared_error: float) -> float:
        return -10.0 * math.log10(squared_error / (covered * 3 * PATCH**2))

    energy = sum(view.latent_energy for view in comparisons)
    return {
        "coverage": covered / sum(view.mask.numel() for view in comparisons),
        "readout_error": sum(view.latent_error for view in comparisons) / energy,
        "psnr_db": decibels(sum(view.pixel_error for view in comparisons)),
        "codec_psnr_db": decibels(sum(view.codec_error for view in comparisons)),
    }

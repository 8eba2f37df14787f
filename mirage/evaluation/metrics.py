"""How alike two videos are, and how well one agrees with known geometry. Images are float32 in [0, 1].

PSNR and SSIM (Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03) are per frame. LPIPS is the
package of that name, where it is installed.

Photometric and reprojection consistency follow what WorldScore (arXiv 2504.00983) asks for, with the true depth and
poses of a synthetic room in the place of estimated flow and SLAM: a frame is warped onto an earlier one, and the two
are compared where both see the same surface. A video of one colour is perfectly consistent: read these beside PSNR.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_kernels import Cameras

MOST_PSNR = 60.0
"""dB; equal frames have it, so that means stay finite."""

LAG = 8
"""Frames between the two of a pair whose consistency is measured."""

REACH = 4
"""Pixels to either side in which a displaced patch is looked for."""

_WINDOW, _SIGMA = 11, 1.5
_PATCH = 7
_NO_BETTER = 1e-6  # squared error by which a patch must match better to count as moved further
_SAME_SURFACE = 0.02  # relative depth
_TEXTURE = 1e-3  # least of the smaller eigenvalues of a patch's structure tensor


def psnr(left: Tensor, right: Tensor) -> Tensor:
    """Compute PSNR (N,) in dB of N pairs (N, 3, H, W), at most :data:`MOST_PSNR`."""
    error = (left - right).square().flatten(1).mean(1)
    return -10.0 * error.clamp(min=10.0 ** (-MOST_PSNR / 10.0)).log10()


def ssim(left: Tensor, right: Tensor) -> Tensor:
    """Compute SSIM (N,) of N pairs (N, C, H, W): the mean over channels and all windows that lie in the image."""
    side = torch.arange(_WINDOW, dtype=left.dtype) - _WINDOW // 2
    line = torch.exp(-side.square() / (2.0 * _SIGMA**2))
    line = (line / line.sum()).to(left.device)
    channels = left.shape[1]

    def blur(image: Tensor) -> Tensor:
        kernel = line.expand(channels, 1, 1, _WINDOW)
        return F.conv2d(F.conv2d(image, kernel, groups=channels), kernel.transpose(2, 3), groups=channels)

    mean, other = blur(left), blur(right)
    variance = blur(left * left) - mean * mean
    variance_other = blur(right * right) - other * other
    covariance = blur(left * right) - mean * other
    c1, c2 = 0.01**2, 0.03**2
    alike = (2 * mean * other + c1) * (2 * covariance + c2)
    return (alike / ((mean * mean + other * other + c1) * (variance + variance_other + c2))).flatten(1).mean(1)


def load_lpips(device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor] | None:
    """Load LPIPS (AlexNet) as a function like :func:`psnr`; None where the package `lpips` is not installed."""
    if importlib.util.find_spec("lpips") is None:
        return None
    network = importlib.import_module("lpips").LPIPS(net="alex", verbose=False).eval().requires_grad_(False).to(device)

    def distance(left: Tensor, right: Tensor) -> Tensor:
        pairs = zip(left.split(8), right.split(8), strict=True)
        return torch.cat([network(a.to(device) * 2 - 1, b.to(device) * 2 - 1).flatten().cpu() for a, b in pairs])

    return distance


def find_revisits(cameras: Cameras, apart: int) -> list[tuple[int, int]]:
    """Find (first visit, revisit) of every view whose pose an earlier one had, `apart` frames before or more.

    Poses are the same to 1e-6 in each entry of the rotation, and in position to 1e-6 of the path's extent. Of several
    earlier views the first is taken.
    """
    poses = _comparable_poses(cameras)
    pairs = []
    for j in range(apart, len(poses)):
        same = ((poses[: j - apart + 1] - poses[j]).abs() < 1e-6).all(1).nonzero()
        if len(same):
            pairs.append((int(same[0]), j))
    return pairs


def find_first_visits(cameras: Cameras) -> list[int]:
    """Find the views whose pose no earlier one had, except the first, by the measure of :func:`find_revisits`."""
    poses = _comparable_poses(cameras)
    return [j for j in range(1, len(poses)) if not ((poses[:j] - poses[j]).abs() < 1e-6).all(1).any()]


def _comparable_poses(cameras: Cameras) -> Tensor:
    """Return poses (T, 16) float64 on the host whose positions are parts of the path's extent, from its first view."""
    poses = cameras.cam2world.cpu().clone()
    if len(poses):
        centers = poses[:, :3, 3] - poses[0, :3, 3]
        extent = float(centers.norm(dim=1).max())
        poses[:, :3, 3] = centers / extent if extent > 0 else centers
    return poses.flatten(1)


def consistency(frames: Tensor, true: Tensor, depth: Tensor, cameras: Cameras) -> dict[str, float | None]:
    """Measure the consistency of a video with known geometry.

    Args:
        frames: (N, 3, H, W), the video.
        true: (N, 3, H, W), as it should be: says where there is texture.
        depth: (N, H, W), true z in world units; 0 where unknown.
        cameras: of the N frames.

    Returns:
        photometric: mean absolute difference of colours between each LAG-th frame and the one LAG later, at pixels
        where both see the same surface. reprojection: pixels between where geometry puts a patch of 7 x 7 and where it
        matches best, at most REACH to either side; over textured patches. None where no pixel counts.
    """
    cameras = cameras.resized((depth.shape[1], depth.shape[2])).to("cpu")
    colour, moved = [], []
    for a in range(0, len(frames) - LAG, LAG):
        b = a + LAG
        grid, both = _correspondence(depth[a], depth[b], cameras[a], cameras[b])
        warped = F.grid_sample(frames[b][None], grid[None], padding_mode="border", align_corners=False)[0]
        colour.append((frames[a] - warped).abs().mean(0)[both])
        whole = F.avg_pool2d(both[None].float(), _PATCH, 1, _PATCH // 2)[0] > 0.999
        moved.append(_displacement(frames[a], warped)[whole & _textured(true[a])])
    return {"photometric": _mean(torch.cat(colour)), "reprojection": _mean(torch.cat(moved))}


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def _correspondence(z: Tensor, z_other: Tensor, camera: Cameras, other: Cameras) -> tuple[Tensor, Tensor]:
    """Find where each pixel of a view lies in another, as `grid_sample` takes it, and whether both see its surface."""
    height, width = z.shape
    v, u = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) + 0.5, torch.arange(width, dtype=torch.float64) + 0.5, indexing="ij"
    )
    rays = torch.linalg.inv(camera.intrinsics[0]) @ torch.stack([u, v, torch.ones_like(u)]).flatten(1)
    pose = other.world2cam[0] @ camera.cam2world[0]
    points = pose[:3, :3] @ (rays * z.double().flatten()) + pose[:3, 3:]
    ahead = points[2] > 0
    at = (other.intrinsics[0] @ points)[:2] / torch.where(ahead, points[2], 1.0)
    grid = torch.stack([at[0] * 2 / width - 1, at[1] * 2 / height - 1], -1).view(height, width, 2).float()
    seen = F.grid_sample(z_other[None, None], grid[None], mode="nearest", align_corners=False)[0, 0]
    depth = points[2].view(height, width).float()
    inside = (grid.abs() < 1).all(-1) & ahead.view(height, width)
    return grid, inside & (z > 0) & (seen > 0) & ((seen - depth).abs() < _SAME_SURFACE * depth)


def _displacement(image: Tensor, other: Tensor) -> Tensor:
    """Measure (H, W): how far each patch of (3, H, W) has to be moved to match best; the shortest way of equals."""
    steps = [(y, x) for y in range(-REACH, REACH + 1) for x in range(-REACH, REACH + 1)]
    steps.sort(key=lambda step: step[0] ** 2 + step[1] ** 2)
    padded = F.pad(other[None], (REACH,) * 4, mode="replicate")[0]
    height, width = image.shape[1:]
    best = torch.full((height, width), torch.inf)
    length = torch.zeros(height, width)
    for y, x in steps:
        shifted = padded[:, REACH + y : REACH + y + height, REACH + x : REACH + x + width]
        cost = F.avg_pool2d((image - shifted).square().sum(0)[None], _PATCH, 1, _PATCH // 2)[0]
        better = cost < best - _NO_BETTER
        best = torch.where(better, cost, best)
        length = torch.where(better, float((y * y + x * x) ** 0.5), length)
    return length


def _textured(image: Tensor) -> Tensor:
    """Find patches of (3, H, W) that differ wherever they are moved (Shi and Tomasi 1994), (H, W) bool."""
    grey = F.pad(image.mean(0)[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    along = (grey[1:-1, 2:] - grey[1:-1, :-2]) / 2
    down = (grey[2:, 1:-1] - grey[:-2, 1:-1]) / 2
    xx, yy, xy = F.avg_pool2d(torch.stack([along * along, down * down, along * down]), _PATCH, 1, _PATCH // 2)
    return (xx + yy) / 2 - (((xx - yy) / 2).square() + xy * xy).sqrt() > _TEXTURE

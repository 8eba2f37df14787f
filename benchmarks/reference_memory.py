"""The memory as published systems write it in PyTorch, in our own words: the side of each comparison that is not ours.

Lift: depth resized bilinearly, one frame at a time, appended by concatenation. Read: one view at a time, tokens in view
sorted by descending depth, then stored by index so that the nearest is meant to land last. PyTorch leaves the order of
duplicate indices undefined, so with several threads some cells keep a farther surface: see ``wrong_cells``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class ConcatenatedMemory:
    """Points (N, 3), features (N, C) float32, grown with ``torch.cat``."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.points = torch.empty(0, 3, device=device)
        self.features = torch.empty(0, channels, device=device)

    def write(self, latents: Tensor, depth: Tensor, intrinsics: Tensor, cam2world: Tensor) -> None:
        """Append T views: latents (T, C, h, w), depth (T, H, W), intrinsics in pixels of the depth map."""
        height, width = latents.shape[-2:]
        columns = torch.arange(width, device=depth.device) + 0.5
        rows = torch.arange(height, device=depth.device)[:, None] + 0.5
        points, features = [], []
        for latent, image, k, pose in zip(latents, depth, intrinsics.float(), cam2world.float(), strict=True):
            z = F.interpolate(image[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
            sx, sy = width / image.shape[1], height / image.shape[0]
            x = (columns - k[0, 2] * sx) * z / (k[0, 0] * sx)
            y = (rows - k[1, 2] * sy) * z / (k[1, 1] * sy)
            lifted = torch.stack([x, y, z], dim=-1).reshape(-1, 3) @ pose[:3, :3].T + pose[:3, 3]
            valid = z.reshape(-1) > 0
            points.append(lifted[valid])
            features.append(latent.permute(1, 2, 0).reshape(-1, latent.shape[0])[valid])
        self.points = torch.cat([self.points, *points])
        self.features = torch.cat([self.features, *features])

    def read(self, intrinsics: Tensor, cam2world: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Latents (T, C, h, w) and mask (T, h, w); intrinsics in cells of the grid."""
        views = [self._read_one(k, pose, size) for k, pose in zip(intrinsics.float(), cam2world.float(), strict=True)]
        return torch.stack([latents for latents, _ in views]), torch.stack([mask for _, mask in views])

    def _read_one(self, k: Tensor, pose: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        height, width = size
        world2cam = torch.linalg.inv(pose)
        camera = self.points @ world2cam[:3, :3].T + world2cam[:3, 3]
        z = camera[:, 2]
        column = torch.floor(camera[:, 0] * k[0, 0] / z + k[0, 2]).long()
        row = torch.floor(camera[:, 1] * k[1, 1] / z + k[1, 2]).long()
        seen = (z > 0.05) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        z, cell, features = z[seen], (row * width + column)[seen], self.features[seen]
        order = torch.argsort(z, descending=True)
        latents = self.points.new_zeros(self.features.shape[1], height * width)
        nearest = self.points.new_full((height * width,), torch.inf)
        latents[:, cell[order]] = features[order].T
        nearest[cell[order]] = z[order]
        return latents.view(-1, height, width), (nearest < torch.inf).view(height, width)

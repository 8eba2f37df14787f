"""Run the published latent memory's algorithm, in our own words: what "reference" means in every table.

Lift: depth resized bilinearly, one frame at a time, appended by concatenation. Read: one view at a time, tokens in view
sorted by descending depth, then stored by index so that the nearest is meant to land last. PyTorch leaves the order of
duplicate indices undefined, so with several threads some cells keep a farther surface: see :meth:`read_exactness`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class ReferenceMemory:
    """Keep points (N, 3) and features (N, C) float32, grown with ``torch.cat``."""

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
        """Read latents (T, C, h, w) and mask (T, h, w); intrinsics in cells of the grid."""
        views = [self._read_one(k, pose, size) for k, pose in zip(intrinsics.float(), cam2world.float(), strict=True)]
        return torch.stack([latents for latents, _ in views]), torch.stack([near < torch.inf for _, near in views])

    def _project(self, k: Tensor, pose: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Project the tokens; return depth, cell and features of those in view."""
        height, width = size
        world2cam = torch.linalg.inv(pose)
        camera = self.points @ world2cam[:3, :3].T + world2cam[:3, 3]
        z = camera[:, 2]
        column = torch.floor(camera[:, 0] * k[0, 0] / z + k[0, 2]).long()
        row = torch.floor(camera[:, 1] * k[1, 1] / z + k[1, 2]).long()
        seen = (z > 0.05) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        return z[seen], (row * width + column)[seen], self.features[seen]

    def _read_one(self, k: Tensor, pose: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        z, cell, features = self._project(k, pose, size)
        order = torch.argsort(z, descending=True)
        latents = self.points.new_zeros(self.features.shape[1], size[0] * size[1])
        nearest = self.points.new_full((size[0] * size[1],), torch.inf)
        latents[:, cell[order]] = features[order].T
        nearest[cell[order]] = z[order]
        return latents.view(-1, *size), nearest.view(size)

    def read_exactness(
        self, intrinsics: Tensor, cam2world: Tensor, size: tuple[int, int], repeats: int = 5
    ) -> tuple[float, float]:
        """Measure the fractions of seen cells whose latents are a farther token's, and that change from run to run.

        Wrong: not the latents of any token at the least depth that falls into the cell, by this class's own
        projection; the mean over ``repeats`` reads. Changing: different bits in at least two of them.
        """
        wrong = changed = total = 0
        for k, pose in zip(intrinsics.float(), cam2world.float(), strict=True):
            z, cell, features = self._project(k, pose, size)
            nearest = z.new_full((size[0] * size[1],), torch.inf).scatter_reduce_(0, cell, z, "amin")
            reads = [self._read_one(k, pose, size)[0].flatten(1) for _ in range(repeats)]
            front = z == nearest[cell]
            for latents in reads:
                right = (latents[:, cell[front]] == features[front].T).all(0)
                hit = torch.zeros_like(nearest, dtype=torch.bool)
                hit[cell[front][right]] = True
                wrong += int(((nearest < torch.inf) & ~hit).sum())
            changed += int(torch.stack([(latents != reads[0]).any(0) for latents in reads[1:]]).any(0).sum())
            total += int((nearest < torch.inf).sum())
        return wrong / max(total * repeats, 1), changed / max(total, 1)

    def overlap(
        self,
        intrinsics: Tensor,
        cam2world: Tensor,
        target_intrinsics: Tensor,
        target_cam2world: Tensor,
        size: tuple[int, int],
        voxel_size: float = 0.1,
    ) -> Tensor:
        """Compute the overlap (V,) of earlier views with the targets together: IoU of the sets of voxels in view."""

        def voxels(k: Tensor, pose: Tensor) -> Tensor:
            world2cam = torch.linalg.inv(pose)
            camera = self.points @ world2cam[:3, :3].T + world2cam[:3, 3]
            z = camera[:, 2]
            u, v = camera[:, 0] * k[0, 0] / z + k[0, 2], camera[:, 1] * k[1, 1] / z + k[1, 2]
            seen = (z > 0.05) & (u >= 0) & (u < size[1]) & (v >= 0) & (v < size[0])
            index = torch.floor(self.points[seen] / voxel_size).long() + (1 << 20)
            return torch.unique((index[:, 0] << 42) | (index[:, 1] << 21) | index[:, 2])

        targets = [voxels(k, pose) for k, pose in zip(target_intrinsics.float(), target_cam2world.float(), strict=True)]
        target = torch.unique(torch.cat(targets))
        scores = []
        for k, pose in zip(intrinsics.float(), cam2world.float(), strict=True):
            view = voxels(k, pose)
            both = torch.isin(view, target, assume_unique=True).sum()
            scores.append(both / (view.numel() + target.numel() - both).clamp(min=1))
        return torch.stack(scores)

"""``LatentPointCloud``: the calls and results of the published release (microsoft/LatentSpatialMemory), on our kernels.

Its pixel convention included: it lifts from integer pixel positions and rounds projections to the nearest integer, with
principal points scaled by the plain ratio. In our convention, where cell j covers [j, j + 1), that is a principal point
half a cell further on, for lifting and for projecting alike.

Where the release leaves results undefined (its indexed store with duplicate indices, on more than one thread), this
class gives what it gives on one thread: the nearest token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from .cache import LatentCache
from .geometry import check_size
from .io import replace_file

_Array = np.ndarray | Tensor


def _as_tensor(name: str, value: Any, shape: str, device: torch.device | str, add_axis: bool = False) -> Tensor:
    """Make ``value`` float32 on ``device``, of as many axes as ``shape`` names; ``add_axis`` accepts one fewer."""
    tensor = torch.as_tensor(value, dtype=torch.float32, device=device)
    axes = shape.count(",") + 1
    if add_axis and tensor.dim() == axes - 1:
        tensor = tensor[None]
    if tensor.dim() != axes:
        raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    return tensor


def _check_matrix(name: str, value: Tensor, side: int) -> None:
    """Refuse matrices of another size."""
    if tuple(value.shape[-2:]) != (side, side):
        raise ValueError(f"{name} must be ({side}, {side}) matrices, got {tuple(value.shape)}")


def _shifted(intrinsics: Tensor, cell_width: float, cell_height: float) -> Tensor:
    """Move principal points by half a cell, in float64 so that the shift itself rounds nothing."""
    moved = intrinsics.to(torch.float64).clone()
    moved[..., 0, 2] += 0.5 * cell_width
    moved[..., 1, 2] += 0.5 * cell_height
    return moved


class LatentPointCloud:
    """Hold a point cloud of latents, with the published interface.

    Args:
        points_world: (N, 3) float positions.
        features: (N, C) float latents.
        valid_mask: (N,) bool; the others are kept but never seen.
        intrinsics_latent: (3, 3), in cells of the latent grid.
        latent_hw: (h, w) of the latent grid.
    """

    def __init__(
        self,
        points_world: Tensor,
        features: Tensor,
        valid_mask: Tensor,
        intrinsics_latent: Tensor,
        latent_hw: tuple[int, int],
    ) -> None:
        count = points_world.shape[0]
        if tuple(points_world.shape) != (count, 3):
            raise ValueError(f"points_world must be (N, 3), got {tuple(points_world.shape)}")
        if features.dim() != 2 or features.shape[0] != count:
            raise ValueError(f"features must be ({count}, C) like points_world, got {tuple(features.shape)}")
        if tuple(valid_mask.shape) != (count,):
            raise ValueError(f"valid_mask must be ({count},) like points_world, got {tuple(valid_mask.shape)}")
        self.intrinsics_latent = intrinsics_latent
        self.latent_hw = check_size(tuple(latent_hw), "latent_hw")
        # The tokens given here are kept as they are, invalid ones included; the cache holds the valid ones, then all
        # that `update` appends.
        self._first_points = points_world.float()
        self._first_features = features.float()
        self._first_valid = valid_mask.to(device=points_world.device, dtype=torch.bool)
        kept = self._first_points[self._first_valid]
        tokens = {
            "points": torch.nn.functional.pad(kept, (0, 1)),
            "features": self._first_features[self._first_valid],
            "frame_ids": torch.zeros(kept.shape[0], dtype=torch.int32, device=kept.device),
            "frame_centers": kept.new_empty((0, 3)),
        }
        self._cache = LatentCache.from_tensors(
            tokens, points_world.device, channels=features.shape[1], dtype=torch.float32, write_policy="append"
        )
        self._first_kept = kept.shape[0]

    @property
    def points_world(self) -> Tensor:
        """(N, 3) float32 positions: the first frame's tokens, invalid ones included, then those appended."""
        return torch.cat([self._first_points, self._cache.points[self._first_kept :]])

    @property
    def features(self) -> Tensor:
        """(N, C) float32 latents, in the order of ``points_world``."""
        return torch.cat([self._first_features, self._cache.features[self._first_kept :]])

    @property
    def valid_mask(self) -> Tensor:
        """(N,) bool, in the order of ``points_world``; what `update` appends is valid."""
        appended = len(self._cache) - self._first_kept
        return torch.cat([self._first_valid, self._first_valid.new_ones(appended)])

    @classmethod
    def from_geometry(
        cls,
        depth: _Array,
        intrinsics: _Array,
        cam2world: _Array,
        latent: Tensor,
        mask: _Array | None = None,
        device: str | torch.device = "cuda",
    ) -> LatentPointCloud:
        """Build from one frame.

        Args:
            depth: (H, W) z depth; 0 or less is invalid. Resized bilinearly, as published.
            intrinsics: (3, 3) in pixels of the depth map, integer pixel centres.
            cam2world: (4, 4).
            latent: (C, 1, h, w).
            mask: (H, W), non-zero = exclude; sampled at the nearest pixel.
            device: where the cloud lives.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        if latent.dim() != 4 or latent.shape[1] != 1:
            raise ValueError(f"latent must be (C, 1, h, w), got {tuple(latent.shape)}")
        size = (latent.shape[2], latent.shape[3])
        latent = latent.float().to(device)
        depth_tensor = _as_tensor("depth", depth, "(H, W)", device)
        k = _as_tensor("intrinsics", intrinsics, "(3, 3)", device)
        pose = _as_tensor("cam2world", cam2world, "(4, 4)", device)
        _check_matrix("intrinsics", k, 3)
        _check_matrix("cam2world", pose, 4)
        height, width = depth_tensor.shape
        lifted = ops.back_project(
            depth_tensor[None],
            _shifted(k, width / size[1], height / size[0])[None],
            pose[None],
            size,
            depth_sampling="bilinear",
        )
        # A token of depth 0 lies at the camera's centre, as published.
        points = torch.where(lifted.valid[0, ..., None], lifted.points[0, ..., :3], pose[:3, 3])
        valid = lifted.valid[0]
        if mask is not None:
            valid = valid & _sampled_keep(_as_tensor("mask", mask, "(H, W)", device)[None], (height, width), size)[0]
        scale = torch.tensor([[size[1] / width], [size[0] / height], [1.0]], device=k.device)
        return cls(
            points_world=points.reshape(-1, 3),
            features=latent[:, 0].permute(1, 2, 0).reshape(-1, latent.shape[0]),
            valid_mask=valid.reshape(-1),
            intrinsics_latent=k * scale,
            latent_hw=size,
        )

    def update(
        self,
        depths: _Array,
        intrinsics: _Array,
        cam2worlds: _Array,
        latents: Tensor,
        masks: _Array | None = None,
    ) -> None:
        """Append T frames; one frame may come without its leading axis.

        Args:
            depths: (T, H, W); intrinsics: (T, 3, 3); cam2worlds: (T, 4, 4); latents: (T, C, h, w);
            masks: (T, H, W), non-zero = exclude.

        Raises:
            ValueError: naming the argument, what was expected and what came; nothing has been appended then.
        """
        device = self._cache.device
        latents = _as_tensor("latents", latents, "(T, C, h, w)", device, add_axis=True)
        depths = _as_tensor("depths", depths, "(T, H, W)", device, add_axis=True)
        k = _as_tensor("intrinsics", intrinsics, "(T, 3, 3)", device, add_axis=True)
        poses = _as_tensor("cam2worlds", cam2worlds, "(T, 4, 4)", device, add_axis=True)
        _check_matrix("intrinsics", k, 3)
        _check_matrix("cam2worlds", poses, 4)
        for name, value in (("depths", depths), ("intrinsics", k), ("cam2worlds", poses)):
            if value.shape[0] != latents.shape[0]:
                raise ValueError(f"{name} must have {latents.shape[0]} frames like latents, got {value.shape[0]}")
        height, width = depths.shape[1:]
        size = (latents.shape[2], latents.shape[3])
        keep = None
        if masks is not None:
            keep = _sampled_keep(_as_tensor("masks", masks, "(T, H, W)", device, add_axis=True), (height, width), size)
        self._cache.write_views(
            latents,
            depths,
            _shifted(k, width / size[1], height / size[0]),
            poses,
            keep,
            "bilinear",
            0.0,
            float("inf"),
        )

    def project(self, cam2world: _Array, intrinsics: _Array | None = None) -> tuple[Tensor, Tensor]:
        """Render the cloud from one camera: latents (C, h, w) float32, 0 in holes, and (h, w) bool, True where seen.

        Args:
            cam2world: (4, 4).
            intrinsics: (3, 3) in cells of the latent grid; None takes ``intrinsics_latent``.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        device = self._cache.device
        pose = _as_tensor("cam2world", cam2world, "(4, 4)", device)
        k = _as_tensor("intrinsics", self.intrinsics_latent if intrinsics is None else intrinsics, "(3, 3)", device)
        _check_matrix("cam2world", pose, 4)
        _check_matrix("intrinsics", k, 3)
        buffers = self._cache.buffers
        readout = ops.splat(
            buffers.points,
            buffers.features,
            _shifted(k, 1.0, 1.0)[None],
            pose[None],
            self.latent_hw,
            num_points=buffers.count,
            bounds=buffers.bounds,
            near=0.0,
        )
        return readout.latents[0], readout.mask[0]

    def save(self, path: str | Path) -> None:
        """Save in the published file format (``torch.save`` of a dict of tensors), atomically."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        state = {
            "points_world": self.points_world,
            "features": self.features,
            "valid_mask": self.valid_mask,
            "intrinsics_latent": self.intrinsics_latent,
            "latent_hw": self.latent_hw,
        }
        replace_file(path, lambda temporary: torch.save(state, temporary))

    @classmethod
    def from_file(cls, path: str | Path, map_location: str | torch.device | None = None) -> LatentPointCloud:
        """Load a file written by :meth:`save` or by the release itself; reads tensors only, never code.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, or with missing entries.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no point cloud file at {path}")
        try:
            state = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: not a readable point cloud file ({type(error).__name__}: {error})") from error
        names = ("points_world", "features", "valid_mask", "intrinsics_latent", "latent_hw")
        missing = [name for name in names if not isinstance(state, dict) or name not in state]
        if missing:
            raise ValueError(f"{path}: a point cloud file must hold {', '.join(names)}, missing {', '.join(missing)}")
        return cls(**{name: state[name] for name in names})


def _sampled_keep(masks: Tensor, depth_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Sample (T, H, W) non-zero = exclude to (T, h, w) True = keep, at the nearest pixel as ``F.interpolate`` does."""
    if tuple(masks.shape[1:]) != tuple(depth_size):
        raise ValueError(f"mask must be {tuple(depth_size)} like depth, got {tuple(masks.shape[1:])}")
    return ~(torch.nn.functional.interpolate(masks[:, None], size=size, mode="nearest")[:, 0] > 0)

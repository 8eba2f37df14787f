"""``LatentPointCloud``: the calls and results of the published release (microsoft/LatentSpatialMemory), on our kernels.

Its pixel convention included: it lifts from integer pixel positions and rounds projections to the nearest integer, with
principal points scaled by the plain ratio. In our convention, where cell j covers [j, j + 1), that is a principal point
half a cell further on, for lifting and for projecting alike.

Where the release leaves results undefined (its indexed store with duplicate indices, on more than one thread), this
class gives what it gives on one thread: the nearest token. Where the depths of two tokens in a cell differ by less than
float32 rounds away, rounding decides which is the nearest, here and there: such a cell may show the other one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import ops
from .geometry import check_size
from .io import replace_file

_Array = np.ndarray | Tensor
_GROWTH = 1.5
_EXIF_ORIENTATION = 0x0112


class _Packed(NamedTuple):
    """Keep positions as the operators take them, and what they were made of: an edit changes a tensor's version."""

    points: Tensor
    """(N, 4) float32, NaN where a token is not valid"""
    bounds: Tensor
    sources: tuple[Tensor, ...]
    versions: list[tuple[int, int]] | None

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        """Return whether it was made of these tensors as they are now."""
        same = all(held is source for held, source in zip(self.sources, sources, strict=True))
        return same and self.versions is not None and self.versions == _versions(sources)


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


def _versions(tensors: tuple[Tensor, ...]) -> list[tuple[int, int]] | None:
    """Say in which state tensors are; None of those made in inference mode, which count no edits."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


def _as_float32_array(value: _Array) -> np.ndarray:
    """Make a float32 array on the host."""
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=np.float32)


def _shifted(intrinsics: Tensor, cell_width: float, cell_height: float) -> Tensor:
    """Move principal points by half a cell, in float64 so that the shift itself rounds nothing."""
    moved = intrinsics.to(torch.float64).clone()
    moved[..., 0, 2] += 0.5 * cell_width
    moved[..., 1, 2] += 0.5 * cell_height
    return moved


class LatentPointCloud:
    """Hold a point cloud of latents, with the published interface.

    ``points_world``, ``features`` and ``valid_mask`` are plain attributes: edit them in place, or set others. What is
    written to them around PyTorch (through ``.numpy()`` or ``.data``) is seen once the attribute is set again.

    Args:
        points_world: (N, 3) float positions.
        features: (N, C) float latents.
        valid_mask: (N,) bool; the others are kept but never seen.
        intrinsics_latent: (3, 3), in cells of the latent grid.
        latent_hw: (h, w) of the latent grid.
    """

    points_world: Tensor
    """(N, 3) float32 positions: the first frame's tokens, invalid ones included, then those appended."""
    features: Tensor
    """(N, C) float32 latents, in the order of ``points_world``."""
    valid_mask: Tensor
    """(N,) bool, in the order of ``points_world``; what `update` appends is valid."""
    intrinsics_latent: Tensor
    """(3, 3), in cells of the latent grid."""
    latent_hw: tuple[int, int]
    """(h, w) of the latent grid."""

    def __init__(
        self,
        points_world: Tensor,
        features: Tensor,
        valid_mask: Tensor,
        intrinsics_latent: Tensor,
        latent_hw: tuple[int, int],
    ) -> None:
        self.points_world, self.features = points_world.float(), features.float()
        self.valid_mask = valid_mask.to(device=points_world.device, dtype=torch.bool)
        self.intrinsics_latent = intrinsics_latent
        self.latent_hw = check_size(tuple(latent_hw), "latent_hw")
        self._packed: _Packed | None = None
        # By attribute: the tensor handed out, and the one with room to grow whose first rows it is.
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}
        self._check_attributes()

    def _check_attributes(self) -> None:
        """Refuse attributes that do not belong together, as they may after some were set."""
        points, features, valid = self.points_world, self.features, self.valid_mask
        count = points.shape[0]
        if tuple(points.shape) != (count, 3):
            raise ValueError(f"points_world must be (N, 3), got {tuple(points.shape)}")
        if features.dim() != 2 or features.shape[0] != count:
            raise ValueError(f"features must be ({count}, C) like points_world, got {tuple(features.shape)}")
        if tuple(valid.shape) != (count,):
            raise ValueError(f"valid_mask must be ({count},) like points_world, got {tuple(valid.shape)}")
        for name, value in (("features", features), ("valid_mask", valid)):
            if value.device != points.device:
                raise ValueError(f"{name} must be on {points.device} like points_world, got {value.device}")

    def _pack(self) -> _Packed:
        """Return the positions as operators take them, made again where an attribute was set or edited."""
        self._check_attributes()
        sources = self.points_world, self.valid_mask
        if self._packed is None or not self._packed.is_of(sources):
            points = torch.nn.functional.pad(self.points_world.detach().float(), (0, 1))
            points[~self.valid_mask.bool()] = torch.nan
            self._packed = _Packed(points, ops.block_bounds(points), sources, _versions(sources))
        return self._packed

    def _append(self, name: str, rows: Tensor) -> None:
        """Append rows to an attribute; it becomes the first rows of a tensor that has room for more."""
        held: Tensor = getattr(self, name)
        if held.requires_grad or held.is_inference():
            setattr(self, name, torch.cat([held, rows]))
            return
        count, total = held.shape[0], held.shape[0] + rows.shape[0]
        handed_out, room = self._rooms.get(name, (None, held))
        if handed_out is not held or room.shape[0] < total:
            room = held.new_empty((int(total * _GROWTH), *held.shape[1:]))
            room[:count] = held
        room[count:total] = rows
        self._rooms[name] = room[:total], room
        setattr(self, name, self._rooms[name][0])

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

    @classmethod
    def from_video_geometry(
        cls,
        geometry: Any,
        frame_idx: int,
        latent: Tensor,
        mask: _Array | None = None,
        device: str | torch.device = "cuda",
    ) -> LatentPointCloud:
        """Build from one frame of a video's geometry: of its ``depths``, ``intrinsics`` and ``poses_c2w``.

        The other arguments are those of :meth:`from_geometry`.
        """
        return cls.from_geometry(
            depth=geometry.depths[frame_idx],
            intrinsics=geometry.intrinsics[frame_idx],
            cam2world=geometry.poses_c2w[frame_idx],
            latent=latent,
            mask=mask,
            device=device,
        )

    @classmethod
    def from_image_path(
        cls,
        image_path: str | Path,
        vae: Any,
        intrinsics: _Array | None = None,
        cam2world: _Array | None = None,
        mask: _Array | None = None,
        device: str | torch.device = "cuda",
        mapanything_model: Any = None,
    ) -> LatentPointCloud:
        """Build from one photograph, whose depth and camera MapAnything estimates.

        Args:
            image_path: of the photograph.
            vae: whose ``encode([video])`` takes (3, 1, H, W) in [-1, 1] on ``device`` and gives one (C, 1, h, w).
            intrinsics: (3, 3) in pixels of the photograph, where they are known.
            cam2world: (4, 4), where it is known.
            mask: of MapAnything's depth map, non-zero = exclude, as :meth:`from_geometry` takes it.
            device: where the cloud lives.
            mapanything_model: to use again; None loads ``facebook/map-anything``.

        Raises:
            ImportError: the packages ``mapanything`` and ``pillow`` are not installed.
            ValueError: the file says that the photograph must be turned, or as :meth:`from_geometry`.
        """
        try:
            from mapanything.utils.image import load_images, preprocess_inputs
            from PIL import Image
        except ImportError as error:
            raise ImportError(
                f"from_image_path needs the packages mapanything and pillow ({error}); with depth and camera of your"
                " own, call from_geometry"
            ) from error
        with Image.open(image_path) as file:
            if file.getexif().get(_EXIF_ORIENTATION, 1) != 1:
                # The estimator would turn it and the VAE would not.
                raise ValueError(f"{image_path} must be stored upright, got one that its EXIF orientation turns")
            image = np.array(file.convert("RGB"))
        if mapanything_model is None:
            from mapanything.models import MapAnything

            mapanything_model = MapAnything.from_pretrained("facebook/map-anything").to(device)
        known = {"intrinsics": intrinsics, "camera_poses": cam2world}
        view = {name: _as_float32_array(value) for name, value in known.items() if value is not None}
        views = preprocess_inputs([{"img": image, **view}]) if view else load_images([str(image_path)])
        estimate = mapanything_model.infer(
            views, memory_efficient_inference=True, use_amp=True, amp_dtype="bf16", apply_mask=True, mask_edges=True
        )[0]
        video = torch.from_numpy(image).to(device).permute(2, 0, 1)[:, None].float() / 255.0
        with torch.no_grad():
            latent = vae.encode([video * 2.0 - 1.0])[0]
        return cls.from_geometry(
            depth=estimate["depth_z"][0, :, :, 0],
            intrinsics=estimate["intrinsics"][0],
            cam2world=estimate["camera_poses"][0],
            latent=latent,
            mask=mask,
            device=device,
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
        self._check_attributes()
        device = self.points_world.device
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
        channels, tokens = self.features.shape[1], latents.shape[0] * size[0] * size[1]
        if latents.shape[1] != channels:
            raise ValueError(f"latents must be (T, {channels}, h, w), got {tuple(latents.shape)}")
        new: dict[str, Any] = {
            "points": latents.new_empty((tokens, 4)),
            "features": latents.new_empty((tokens, channels)),
            "frame_ids": torch.empty(tokens, dtype=torch.int32, device=device),
            "count": torch.zeros(1, dtype=torch.int64, device=device),
        }
        moved = _shifted(k, width / size[1], height / size[0])
        ops.cache_write(
            **new,
            latents=latents,
            depth=depths,
            intrinsics=moved,
            cam2world=poses,
            mask=keep,
            depth_sampling="bilinear",
        )
        count = int(new["count"])
        self._append("points_world", new["points"][:count, :3])
        self._append("features", new["features"][:count])
        self._append("valid_mask", torch.ones(count, dtype=torch.bool, device=device))

    def project(self, cam2world: _Array, intrinsics: _Array | None = None) -> tuple[Tensor, Tensor]:
        """Render the cloud from one camera: latents (C, h, w) float32, 0 in holes, and (h, w) bool, True where seen.

        Args:
            cam2world: (4, 4).
            intrinsics: (3, 3) in cells of the latent grid; None takes ``intrinsics_latent``.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        packed = self._pack()
        device = packed.points.device
        pose = _as_tensor("cam2world", cam2world, "(4, 4)", device)
        k = _as_tensor("intrinsics", self.intrinsics_latent if intrinsics is None else intrinsics, "(3, 3)", device)
        _check_matrix("cam2world", pose, 4)
        _check_matrix("intrinsics", k, 3)
        readout = ops.splat(
            packed.points,
            self.features,
            _shifted(k, 1.0, 1.0)[None],
            pose[None],
            self.latent_hw,
            bounds=packed.bounds,
            near=0.0,
            dtype=torch.float32,
        )
        return readout.latents[0], readout.mask[0]

    def save(self, path: str | Path) -> None:
        """Save in the published file format (``torch.save`` of a dict of tensors), atomically."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._check_attributes()
        state = {
            # Copies: views of tensors with room to grow would bring that along.
            **{name: getattr(self, name).detach().clone() for name in ("points_world", "features", "valid_mask")},
            "intrinsics_latent": self.intrinsics_latent,
            "latent_hw": self.latent_hw,
        }

        def write(draft: str) -> None:
            with open(draft, "wb") as file:  # with torch's own, a full disk is no OSError
                torch.save(state, file)

        replace_file(path, write)

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

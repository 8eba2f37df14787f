"""Learned depth estimators, by name: Depth Anything V2 and 3, Depth Pro, MapAnything."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirage_kernels import Cameras

from ..optional import MissingExtraError, import_extra
from .depth import DepthEstimator


class _LearnedDepth:
    """What the learned estimators share: checks, batches, devices, and 0 for all that is unknown."""

    needs_frames = True
    alignment = "scale"

    def __init__(self, model: Any, device: torch.device | str, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be a positive int, got {batch_size!r}")
        self.model = model.eval()
        self.batch_size = batch_size
        self.to(device)

    @property
    def device(self) -> torch.device:
        """Where the model is; frames are moved there batch by batch, and depth back to theirs."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> _LearnedDepth:
        """Move the model; returns self."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, frames: Tensor, cameras: Cameras, frame_numbers: Sequence[int]) -> Tensor:
        """Estimate depth, see `DepthEstimator`; it is (T, H, W).

        Raises:
            ValueError: shapes or counts that do not belong together, or the network gives nothing that is finite.
        """
        size = cameras.image_size
        expected = (len(cameras), 3, *size)
        if frames.shape != expected or frames.dtype != torch.float32:
            got = f"{tuple(frames.shape)} {str(frames.dtype).removeprefix('torch.')}"
            raise ValueError(f"frames must be {expected} float32 as cameras say, got {got}")
        if len(frame_numbers) != len(cameras):
            raise ValueError(f"frame_numbers must be {len(cameras)} ints as cameras, got {len(frame_numbers)}")
        result = frames.new_empty((len(cameras), *size))
        for begin in range(0, len(cameras), self.batch_size):
            batch = slice(begin, begin + self.batch_size)
            depth = self._estimate(frames[batch], cameras[batch])
            if not bool(depth.isfinite().any()):
                raise ValueError(f"depth from {type(self).__name__} must be finite, got NaN or Inf everywhere")
            result[batch] = torch.where(depth.isfinite() & (depth > 0), depth, 0.0)
        return result

    def _estimate(self, frames: Tensor, cameras: Cameras) -> Tensor:
        """Estimate (B, H, W) float depth of a batch, on any device."""
        raise NotImplementedError


class DepthAnythingV2(_LearnedDepth):
    """Depth Anything V2, a metric checkpoint (Yang et al., NeurIPS 2024), by transformers.

    Frame by frame, without regard to the cameras. Scale and shift are fitted to the memory.

    Args:
        model: name or folder of a checkpoint, or a loaded `DepthAnythingForDepthEstimation` (then with `processor`).
            Outdoors: ``"depth-anything/Depth-Anything-V2-Metric-Outdoor-Large-hf"``.
        processor: the checkpoint's image processor, where it is loaded already.
        device, dtype: where and in what precision the model runs.
        batch_size: frames at a time.

    Raises:
        MissingExtraError: transformers is not installed.
        ValueError: the checkpoint predicts relative depth: disparity up to an unknown scale and shift, which is no
            depth until both are known, and a first frame has nothing to learn them from.
    """

    alignment = "scale_shift"

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module = "depth-anything/Depth-Anything-V2-Metric-Indoor-Large-hf",
        processor: Any = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 4,
    ) -> None:
        transformers = import_extra("transformers", "generate")
        loaded: Any = model
        if isinstance(model, nn.Module):
            if processor is None:
                raise ValueError("processor must be the image processor of the loaded model, got None")
            _require_metric(loaded.config)
        else:
            _require_metric(transformers.AutoConfig.from_pretrained(model))  # before gigabytes of weights
            processor = processor or transformers.AutoImageProcessor.from_pretrained(model)
            loaded = transformers.AutoModelForDepthEstimation.from_pretrained(model)
        self.processor = processor
        super().__init__(loaded.to(dtype=dtype), device, batch_size)

    def _estimate(self, frames: Tensor, cameras: Cameras) -> Tensor:
        inputs = self.processor(images=list(_to_bytes(frames)), input_data_format="channels_last", return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device, next(self.model.parameters()).dtype)
        return _resize(self.model(pixel_values=pixels).predicted_depth, cameras.image_size, "bilinear")


def _require_metric(config: Any) -> None:
    kind = getattr(config, "depth_estimation_type", None)
    if kind != "metric":
        raise ValueError(
            f"model must be a metric checkpoint (depth_estimation_type 'metric'), got {kind!r}: its output is disparity"
            " up to scale and shift. The metric ones are called depth-anything/Depth-Anything-V2-Metric-*-hf"
        )


class DepthPro(_LearnedDepth):
    """Depth Pro (Bochkovskii et al., ICLR 2025), by transformers, with the focal length of the cameras.

    The network predicts canonical inverse depth C, and z = fx / (W C) (section 3.1 there). fx is ours, so its own
    guess at the field of view is never loaded. Frame by frame; the scale is fitted to the memory.

    Args:
        model: name or folder of a checkpoint, or a loaded `DepthProForDepthEstimation`.
        device, dtype: where and in what precision the model runs.
        batch_size: frames at a time; each is seen as 35 patches of 384 x 384.

    Raises:
        MissingExtraError: transformers is not installed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module = "apple/DepthPro-hf",
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 1,
    ) -> None:
        transformers = import_extra("transformers", "generate")
        loaded: Any = model
        if not isinstance(model, nn.Module):
            loaded = transformers.DepthProForDepthEstimation.from_pretrained(model, use_fov_model=False)
        super().__init__(loaded.to(dtype=dtype), device, batch_size)
        config = loaded.config
        self._side = round(config.patch_size / min(config.scaled_images_ratios))  # 1536: any frame becomes a square

    def _estimate(self, frames: Tensor, cameras: Cameras) -> Tensor:
        # As the checkpoint's processor does (which needs torchvision): [-1, 1], then bilinear without antialiasing.
        pixels = F.interpolate(frames.to(self.device) * 2 - 1, (self._side, self._side), mode="bilinear")
        canonical = self.model(pixel_values=pixels.to(next(self.model.parameters()).dtype)).predicted_depth
        width = cameras.image_size[1]
        scale = (width / cameras.intrinsics[:, 0, 0]).to(canonical.device, torch.float32)
        inverse = _resize(canonical, cameras.image_size, "bilinear") * scale[:, None, None]
        return 1 / inverse.clamp(1e-4, 1e4)  # the limits of its authors


class MapAnything(_LearnedDepth):
    """MapAnything (Keetha et al., 3DV 2026), told the intrinsics and poses of the cameras.

    The frames of a batch are reconstructed together. Ambiguous pixels (sky) and depth edges are unknown. The unit
    of the poses is taken for metres; what scale is left over is fitted to the memory. Runs in bfloat16 where its
    authors' autocast does.

    Args:
        model: name or folder of a checkpoint, or a loaded `mapanything.models.MapAnything`. The default is licensed
            CC BY-NC 4.0; ``"facebook/map-anything-apache"`` is Apache-2.0.
        device: where the model runs.
        batch_size: most frames seen together.

    Raises:
        MissingExtraError: the package mapanything is not installed.
    """

    marks_sky = True

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module = "facebook/map-anything",
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
    ) -> None:
        source = "mapanything @ git+https://github.com/facebookresearch/map-anything.git"
        models = _import_foreign("mapanything.models", source)
        self._preprocess = _import_foreign("mapanything.utils.image", source).preprocess_inputs
        loaded = model if isinstance(model, nn.Module) else models.MapAnything.from_pretrained(model)
        super().__init__(loaded, device, batch_size)

    def _estimate(self, frames: Tensor, cameras: Cameras) -> Tensor:
        # To a size the network takes as it is: its own preparation would cut the frame to one of a few aspects.
        height, width = _network_size(cameras.image_size, longest=518, multiple=14)
        images = _to_bytes(F.interpolate(frames, (height, width), mode="bilinear", antialias=True))
        cameras = cameras.resized((height, width))
        intrinsics = cameras.intrinsics.cpu().float().numpy()
        intrinsics[:, :2, 2] -= 0.5  # its first pixel's centre is 0, ours is 0.5
        cam2world = cameras.cam2world.cpu().float().numpy()
        views = [
            {"img": image, "intrinsics": matrix, "camera_poses": pose, "is_metric_scale": torch.tensor([True])}
            for image, matrix, pose in zip(images, intrinsics, cam2world, strict=True)
        ]
        predictions = self.model.infer(
            self._preprocess(views, resize_mode="fixed_size", size=(width, height)),
            memory_efficient_inference=True,
            use_amp=True,
            amp_dtype="bf16",
            apply_mask=True,
            mask_edges=True,
        )
        depth = torch.stack([prediction["depth_z"][0, ..., 0] for prediction in predictions])
        # Not blended: 0 where it is masked.
        return _resize(depth, (frames.shape[2], frames.shape[3]), "nearest-exact")


class DepthAnything3(_LearnedDepth):
    """Depth Anything 3 (Lin et al., 2025), a monocular metric checkpoint, with the focal length of the cameras.

    Frame by frame: z = f / 300 times the network's output, f the mean focal length in pixels of the network's image
    (the authors' `apply_metric_scaling`). Sky is unknown. The scale is fitted to the memory. The any-view
    checkpoints are refused: their scale comes from matching predicted camera centres to the given ones, which is
    undefined for one frame or a straight path, and a forward path is straight.

    Args:
        model: name or folder of a checkpoint, or a loaded `depth_anything_3.api.DepthAnything3`.
        device: where the model runs.
        batch_size: frames at a time.

    Raises:
        MissingExtraError: the package depth-anything-3 is not installed.
        ValueError: not a ``da3metric`` model.
    """

    marks_sky = True

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module = "depth-anything/DA3METRIC-LARGE",
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 4,
    ) -> None:
        source = "depth-anything-3 @ git+https://github.com/ByteDance-Seed/Depth-Anything-3.git"
        api = _import_foreign("depth_anything_3.api", source)
        loaded: Any = model if isinstance(model, nn.Module) else api.DepthAnything3.from_pretrained(model)
        name = loaded.model_name
        if not name.startswith("da3metric"):
            raise ValueError(f"model must be a monocular metric checkpoint, da3metric-*, got {name}")
        super().__init__(loaded, device, batch_size)

    def to(self, device: torch.device | str) -> DepthAnything3:
        """Move the model; returns self."""
        self.model.device = torch.device(device)  # it remembers where it first ran
        super().to(device)
        return self

    def _estimate(self, frames: Tensor, cameras: Cameras) -> Tensor:
        prediction = self.model.inference(list(_to_bytes(frames)))
        height, width = prediction.depth.shape[1:]
        intrinsics = cameras.resized((height, width)).intrinsics.cpu()
        focal = (intrinsics[:, 0, 0] + intrinsics[:, 1, 1]) / 2
        depth = torch.from_numpy(prediction.depth).float() * (focal.float() / 300)[:, None, None]
        if prediction.sky is not None:
            depth[torch.from_numpy(prediction.sky) >= 0.3] = 0  # its authors' threshold
        # Not blended: 0 where there is sky.
        return _resize(depth, cameras.image_size, "nearest-exact")


DEPTH_ESTIMATORS: dict[str, Callable[..., DepthEstimator]] = {
    "depth-anything-v2": DepthAnythingV2,
    "depth-pro": DepthPro,
    "map-anything": MapAnything,
    "depth-anything-3": DepthAnything3,
}


def make_depth_estimator(name: str, **options: Any) -> DepthEstimator:
    """Make a learned estimator by its name in `DEPTH_ESTIMATORS`; `options` are those of its class.

    Raises:
        ValueError: no such name.
        MissingExtraError: a package it needs is not installed; nothing has been loaded then.
    """
    if name not in DEPTH_ESTIMATORS:
        raise ValueError(f"name must be one of {', '.join(DEPTH_ESTIMATORS)}, got {name!r}")
    return DEPTH_ESTIMATORS[name](**options)


def _import_foreign(module: str, requirement: str) -> ModuleType:
    """Import a module of a package in none of our extras: it is installed from its repository."""
    top = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != top:
            raise  # it is installed, but something it needs is not
        raise MissingExtraError(f'{top} is needed and not installed: pip install "{requirement}"') from None


def _to_bytes(frames: Tensor) -> np.ndarray:
    """Convert (T, 3, H, W) in [0, 1] to (T, H, W, 3) uint8, as every estimator's preparation takes images."""
    return (frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _resize(depth: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize (T, h, w) to (T, H, W) float32."""
    return F.interpolate(depth.float()[:, None], size, mode=mode)[:, 0]


def _network_size(size: tuple[int, int], longest: int, multiple: int) -> tuple[int, int]:
    """Find the size nearest to `size` scaled to a longest side, each side a multiple."""
    height, width = (max(round(side * longest / max(size) / multiple), 1) * multiple for side in size)
    return height, width

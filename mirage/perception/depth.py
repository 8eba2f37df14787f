"""Depth of newly generated frames: where it comes from, and how it is made to agree with what the memory holds.

A `DepthEstimator` turns frames into depth maps; `make_depth_estimator` makes the learned ones by name, `GivenDepth`
hands out the user's own. `align_depth` then fits scale and shift of each new map to the depth the cache shows at the
same view, so that a chunk lands on the surfaces written before it. Depth is z along the optical axis in world units
everywhere; 0, negative, NaN and Inf mean unknown.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirage_kernels import Cameras, back_project

from ..optional import MissingExtraError, import_extra


@runtime_checkable
class DepthEstimator(Protocol):
    """What the generation loop asks for the depth of its new frames.

    Attributes:
        needs_frames: whether it looks at `frames`; where False the loop need not decode them.
        alignment: ``"none"``, ``"scale"`` or ``"scale_shift"``: what is to be fitted to the memory, the `mode` of
            `align_depth`.
    """

    needs_frames: bool
    alignment: str

    def __call__(self, frames: Tensor, cameras: Cameras, frame_numbers: Sequence[int]) -> Tensor:
        """Depth of T frames.

        Args:
            frames: (T, 3, H, W) float32 in [0, 1], one per latent frame.
            cameras: of the T frames, image size (H, W).
            frame_numbers: T positions in the whole video, from 0.

        Returns:
            (T, H', W') float32 on the device of `frames`, z in world units; 0 or NaN where it is unknown. H' x W' is
            H x W for every estimator but `GivenDepth`.
        """
        ...


class GivenDepth:
    """The user's own depth, handed out frame by frame as it is.

    Args:
        depth: (H', W') of frame 0, or (N, H', W') of frames 0..N-1: a float tensor or array on any device (a memory
            map too). Only the frames asked for are read and copied.

    Raises:
        TypeError, ValueError: not floats, or another number of axes.
    """

    needs_frames = False
    alignment = "none"

    def __init__(self, depth: Tensor | np.ndarray) -> None:
        if isinstance(depth, Tensor):
            floats = depth.is_floating_point()
        else:
            floats = isinstance(depth, np.ndarray) and depth.dtype.kind == "f"
        if not floats:
            got = getattr(depth, "dtype", type(depth).__name__)
            raise TypeError(f"depth must be a float tensor or array, (H, W) or (N, H, W), got {got}")
        if depth.ndim not in (2, 3):
            raise ValueError(f"depth must be (H, W) or (N, H, W) float, got {tuple(depth.shape)}")
        self._depth = depth if depth.ndim == 3 else depth[None]

    @property
    def num_frames(self) -> int:
        """Frames it holds, from frame 0 on."""
        return self._depth.shape[0]

    def __call__(self, frames: Tensor | None, cameras: Cameras, frame_numbers: Sequence[int]) -> Tensor:
        """See `DepthEstimator`; `frames` only say the device, without them it is that of `cameras`.

        Raises:
            ValueError: a frame beyond the given ones, or an aspect other than that of the cameras' images.
        """
        if len(frame_numbers) != len(cameras):
            raise ValueError(f"frame_numbers must be {len(cameras)} ints as cameras, got {len(frame_numbers)}")
        count, *size = self._depth.shape
        for number in frame_numbers:
            if not 0 <= number < count:
                raise ValueError(f"depth must hold frame {number}, got {count} frame{'s' * (count != 1)}, from 0")
        (height, width), (image_height, image_width) = size, cameras.image_size
        off_by_rows = abs(height - width * image_height / image_width)
        off_by_columns = abs(width - height * image_width / image_height)
        if min(off_by_rows, off_by_columns) > 1:
            image = f"{image_height}x{image_width} images of cameras"
            raise ValueError(f"depth must have the aspect of the {image}, got {height}x{width}")
        asked = self._depth[list(frame_numbers)]
        if not isinstance(asked, Tensor):
            asked = torch.from_numpy(asked.astype(np.float32))
        return asked.to(cameras.device if frames is None else frames.device, torch.float32)


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
        """See `DepthEstimator`; the depth is (T, H, W).

        Raises:
            ValueError: shapes or counts that do not belong together.
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
            result[batch] = torch.where(depth.isfinite() & (depth > 0), depth, 0.0)
        return result

    def _estimate(self, frames: Tensor, cameras: Cameras) -> Tensor:
        """(B, H, W) float depth of a batch, on any device."""
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
    """A learned estimator by its name in `DEPTH_ESTIMATORS`; `options` are those of its class.

    Raises:
        ValueError: no such name.
        MissingExtraError: a package it needs is not installed; nothing has been loaded then.
    """
    if name not in DEPTH_ESTIMATORS:
        raise ValueError(f"name must be one of {', '.join(DEPTH_ESTIMATORS)}, got {name!r}")
    return DEPTH_ESTIMATORS[name](**options)


def _import_foreign(module: str, requirement: str) -> ModuleType:
    """The module called `module`, of a package in none of our extras: it is installed from its repository."""
    top = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != top:
            raise  # it is installed, but something it needs is not
        raise MissingExtraError(f'{top} is needed and not installed: pip install "{requirement}"') from None


def _to_bytes(frames: Tensor) -> np.ndarray:
    """(T, 3, H, W) in [0, 1] to (T, H, W, 3) uint8, the form in which every estimator's preparation takes images."""
    return (frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _resize(depth: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(T, h, w) to (T, H, W) float32."""
    return F.interpolate(depth.float()[:, None], size, mode=mode)[:, 0]


def _network_size(size: tuple[int, int], longest: int, multiple: int) -> tuple[int, int]:
    """The size nearest to `size` scaled to a longest side, each side a multiple."""
    height, width = (max(round(side * longest / max(size) / multiple), 1) * multiple for side in size)
    return height, width


# Alignment. Fewer common cells than these tell nothing about a view.
MIN_CELLS = 32
MIN_SHARE = 0.01  # of the cells of the grid
MIN_INLIERS = 0.5  # of the common cells: what the start of the fit withstands
SCALE_RANGE = (0.01, 100.0)
MIN_DEPTH_RATIO = 1.3  # 90th over 10th percentile of depth, under which a shift cannot be told from a scale
_SIGMA_RANGE = (0.002, 0.05)  # spread of the inliers' relative residuals
_CUT = 3.0  # in sigmas, where an inlier ends
_STEPS = 10
_LINES = 128  # pairs of cells that are tried as a start
_JUDGES = 1024  # cells that choose among them


@dataclass(frozen=True)
class DepthAlignment:
    """New depth, made to agree with the memory.

    Attributes:
        depth: (T, H, W) float32 on the device of the depth given: scale * depth + shift, 0 where it is unknown.
        scale: (T,) float64 on the CPU, within [0.01, 100].
        shift: (T,) float64 on the CPU, world units.
        inlier_fraction: (T,) float64 on the CPU: the share of the cells of `overlap` that the fit explains.
        overlap: (T,) int64 on the CPU: cells whose depth is known to both sides, which the fit was made from: of the
            view itself, or of the pool; 0 where there was no fit.
        source: T of ``"own"``; ``"pooled"``: the view shares too little with the memory, or no fit explains half of
            what it shares, and takes that of the chunk; ``"none"``: neither was to be had, scale 1 and shift 0.
    """

    depth: Tensor
    scale: Tensor
    shift: Tensor
    inlier_fraction: Tensor
    overlap: Tensor
    source: tuple[str, ...]


@dataclass(frozen=True)
class _Fit:
    scale: float
    shift: float
    inliers: np.ndarray  # (n,) bool


def align_depth(depth: Tensor, memory_depth: Tensor, memory_mask: Tensor, mode: str = "scale_shift") -> DepthAlignment:
    """Fit scale and shift of each new depth map to what the memory shows at its view, and apply them.

    New token depth (the lower median of a cell's valid pixels, unknown where under half are valid: what the cache
    would store) is compared with the memory's in every cell where both are known. Up to 40 % of these may be anything:
    moving things, new occluders, far surfaces seen through gaps. The fit minimises Tukey's biweight of the relative
    residual (scale * new + shift - memory) / memory by reweighted least squares, from a least-median-of-squares start
    (Rousseeuw, JASA 1984); without shift that is the middle of the shortest half of the log ratios. The same bits on
    every run and at any thread count.

    A view is fitted by itself when it has at least 32 common cells, 1 % of the grid, and the fit explains half of them
    with a scale in [0.01, 100]. Otherwise it takes the one fit of all cells of the views that are (of all views where
    none is). Where the 90th percentile of the inliers' memory depth is under 1.3 times the 10th, scale alone is fitted.

    Args:
        depth: (T, H, W) float, z; 0, negative, NaN and Inf mean unknown.
        memory_depth: (T, h, w) float, `LatentCache.read(...).depth` at the cameras of `depth`, h <= H, w <= W.
        memory_mask: (T, h, w) bool, `LatentCache.read(...).mask`.
        mode: ``"scale_shift"`` or ``"scale"``.

    Returns:
        `DepthAlignment`. Pixels that a shift would put at or behind the camera become unknown.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if mode not in ("scale", "scale_shift"):
        raise ValueError(f"mode must be one of scale, scale_shift, got {mode!r}")
    if memory_depth.ndim != 3 or memory_depth.shape[0] != depth.shape[0]:
        raise ValueError(f"memory_depth must be ({depth.shape[0]}, h, w) as depth, got {tuple(memory_depth.shape)}")
    if memory_mask.shape != memory_depth.shape or memory_mask.dtype != torch.bool:
        got = f"{tuple(memory_mask.shape)} {str(memory_mask.dtype).removeprefix('torch.')}"
        raise ValueError(f"memory_mask must be {tuple(memory_depth.shape)} bool as memory_depth, got {got}")
    depth = depth.float()
    views, (height, width) = depth.shape[0], memory_depth.shape[1:]
    new = _token_depth(depth, (height, width)).cpu().double().numpy()
    memory = memory_depth.cpu().double().numpy()
    common = memory_mask.cpu().numpy() & (new > 0) & (memory > 0) & np.isfinite(memory)
    cells = [(new[t][common[t]], memory[t][common[t]]) for t in range(views)]
    least = max(MIN_CELLS, MIN_SHARE * height * width)

    own = [_fit(*pair, mode, least) for pair in cells]
    good = [pair for pair, fit in zip(cells, own, strict=True) if fit]
    pooled = None
    if len(good) < views:
        new_pool, memory_pool = (np.concatenate(side) for side in zip(*(good or cells), strict=True))
        pooled = _fit(new_pool, memory_pool, mode, least)
    fits = [fit or pooled for fit in own]

    scale = torch.tensor([fit.scale if fit else 1.0 for fit in fits], dtype=torch.float64)
    shift = torch.tensor([fit.shift if fit else 0.0 for fit in fits], dtype=torch.float64)
    factor, term = (value.to(depth)[:, None, None] for value in (scale, shift))
    aligned = (depth * factor).add_(term).nan_to_num_(0.0, 0.0, 0.0)
    aligned.masked_fill_(aligned <= term.clamp(min=0.0), 0.0)  # an unknown 0 has become the shift
    return DepthAlignment(
        depth=aligned,
        scale=scale,
        shift=shift,
        inlier_fraction=torch.tensor([fit.inliers.mean() if fit else 0.0 for fit in fits], dtype=torch.float64),
        overlap=torch.tensor([len(fit.inliers) if fit else 0 for fit in fits], dtype=torch.int64),
        source=tuple("own" if mine else "pooled" if fit else "none" for mine, fit in zip(own, fits, strict=True)),
    )


def _token_depth(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """(T, h, w): the depth that `LatentCache.write` would store, by the same kernel; 0 where unknown."""
    eye = torch.eye(4, dtype=torch.float64, device=depth.device).expand(len(depth), 4, 4)
    return back_project(depth, eye[:, :3, :3], eye, size).points[..., 2]


def _fit(new: np.ndarray, memory: np.ndarray, mode: str, least: float) -> _Fit | None:
    """memory = scale * new + shift over n cells, (n,) float64 each; None where they do not tell."""
    if len(new) < least:
        return None
    if mode == "scale_shift":
        start = _least_median_line(new, memory)
        fit = _reweighted(new, memory, *start, with_shift=True) if start else None
        if fit:
            near, far = np.percentile(memory[fit.inliers], (10, 90))
            if far >= MIN_DEPTH_RATIO * near:
                return fit
    return _reweighted(new, memory, _shortest_half_ratio(new, memory), 0.0, with_shift=False)


def _shortest_half_ratio(new: np.ndarray, memory: np.ndarray) -> float:
    """Least median of squares of log(memory / new): the middle of the shortest interval with half of them."""
    ratio = np.sort(np.log(memory / new))
    half = len(ratio) // 2
    begin = int(np.argmin(ratio[half:] - ratio[: len(ratio) - half]))
    return float(np.exp((ratio[begin] + ratio[begin + half]) / 2))


def _least_median_line(new: np.ndarray, memory: np.ndarray) -> tuple[float, float] | None:
    """Scale and shift, of the lines through pairs of cells, whose median relative residual is least."""
    order = np.argsort(new, kind="stable")
    x, y = new[order], memory[order]
    half = len(x) // 2
    first = np.linspace(0, half - 1, min(half, _LINES)).astype(int)
    second = first + len(x) - half  # half the cells apart in depth: steep noise is rare, and any inliers form pairs
    far_enough = x[second] > x[first] * (1 + 1e-6)
    first, second = first[far_enough], second[far_enough]
    scale = (y[second] - y[first]) / (x[second] - x[first])
    sane = (scale >= SCALE_RANGE[0]) & (scale <= SCALE_RANGE[1])
    if not sane.any():
        return None
    scale = scale[sane]
    shift = y[first][sane] - scale * x[first][sane]
    judges = np.linspace(0, len(x) - 1, min(len(x), _JUDGES)).astype(int)
    x, y = x[judges], y[judges]
    residual = np.abs(scale[:, None] * x + shift[:, None] - y) / y
    best = int(np.argmin(np.median(residual, axis=1)))
    return float(scale[best]), float(shift[best])


def _reweighted(new: np.ndarray, memory: np.ndarray, scale: float, shift: float, with_shift: bool) -> _Fit | None:
    """Tukey's biweight of the relative residual from a start near the answer; None where it explains too little."""
    x, one = new / memory, 1 / memory  # residual = scale * x + shift * one - 1
    residual = np.abs(scale * x + shift * one - 1)
    sigma = np.median(residual) * 1.4826
    for _ in range(_STEPS):
        sigma = np.clip(sigma, *_SIGMA_RANGE)
        weight = np.clip(1 - (residual / (_CUT * sigma)) ** 2, 0, None) ** 2
        # Sums, not matrix products: theirs depend on the number of threads.
        xx, xo, oo = (weight * x * x).sum(), (weight * x * one).sum(), (weight * one * one).sum()
        bx, bo = (weight * x).sum(), (weight * one).sum()
        determinant = xx * oo - xo * xo
        if with_shift and determinant > 1e-12 * xx * oo:
            scale, shift = (bx * oo - bo * xo) / determinant, (bo * xx - bx * xo) / determinant
        elif xx > 0:
            scale, shift = bx / xx, 0.0
        residual = np.abs(scale * x + shift * one - 1)
        inliers = residual <= _CUT * sigma
        if inliers.mean() < MIN_INLIERS or not SCALE_RANGE[0] <= scale <= SCALE_RANGE[1]:
            return None
        sigma = np.median(residual[inliers]) * 1.4826
    return _Fit(float(scale), float(shift), inliers)

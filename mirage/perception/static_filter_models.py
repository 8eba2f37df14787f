"""Static filters with a network (sky, SAM 2, SAM 3), and `make_static_filter`, which makes filters by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirage_kernels.geometry import check_size, pool_mask

from ..optional import MissingExtraError, import_extra
from .static_filter import AllOf, AllStatic, ChunkViews, ConfidenceFilter, GeometricFilter, StaticFilter


class _LearnedFilter:
    """What the filters with a network share: the model and its device, and batches of pixel frames."""

    needs_frames = True

    def __init__(self, model: Any, device: torch.device | str, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be a positive int, got {batch_size!r}")
        self.model = model.eval()
        self.batch_size = batch_size
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, views: ChunkViews) -> Tensor:
        frames = _require_frames(views, self)
        free = []
        for batch in frames.split(self.batch_size):
            free.append(_pool(~self._mark(batch).to(views.depth.device), views.depth.shape[1:]))
        groups = torch.cat(free).split(list(views.frames_per_latent))
        return torch.stack([group.all(0) for group in groups])

    def _mark(self, frames: Tensor) -> Tensor:
        """Mark (B, H, W) bool on any device: which pixels of (B, 3, H, W) must not be remembered."""
        raise NotImplementedError

    @property
    def _like(self) -> Tensor:
        """A tensor of the model's device and dtype."""
        return next(self.model.parameters())


def _pool(static: Tensor, size: Sequence[int]) -> Tensor:
    """Pool (B, H, W) bool to another size: a cell is static only if all its pixels are."""
    finer = [max(sides) for sides in zip(static.shape[1:], size, strict=True)]
    if static.shape[1:] != tuple(finer):
        static = F.interpolate(static[:, None].float(), finer, mode="nearest-exact")[:, 0] > 0
    return static if finer == list(size) else pool_mask(static, check_size(tuple(size)))


def _require_frames(views: ChunkViews, wants: StaticFilter) -> Tensor:
    if views.frames is None:
        raise ValueError(f"frames must be given to {type(wants).__name__}, which looks at them, got None")
    return views.frames


class SkyFilter(_LearnedFilter):
    """Not static is what a semantic segmentation network calls sky in any of a latent frame's pixel frames.

    Sky has no depth to be remembered at: what an estimator gives there is a wall that the camera would run into. The
    sky is not widened: a token goes if a single one of its pixels is sky, which is a margin of its own.

    Args:
        model: name or folder of a checkpoint, or a loaded model for semantic segmentation (then with `processor`).
        processor: the checkpoint's image processor, where it is loaded already.
        labels: names of the classes to drop, in any case; a class of several names ("sky, clouds") has each of them.
        device, dtype: where and in what precision the model runs.
        batch_size: frames at a time.

    Raises:
        MissingExtraError: transformers is not installed.
        ValueError: the model knows no class of a name in `labels`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module = "nvidia/segformer-b0-finetuned-ade-512-512",
        processor: Any = None,
        *,
        labels: Sequence[str] = ("sky",),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 4,
    ) -> None:
        transformers = import_extra("transformers", "generate")
        loaded: Any = model
        if isinstance(model, nn.Module):
            if processor is None:
                raise ValueError("processor must be the image processor of the loaded model, got None")
        else:
            processor = processor or transformers.AutoImageProcessor.from_pretrained(model)
            loaded = transformers.AutoModelForSemanticSegmentation.from_pretrained(model)
        self.processor = processor
        self.classes = _find_classes(loaded.config.id2label, labels)
        super().__init__(loaded.to(dtype=dtype), device, batch_size)

    def _mark(self, frames: Tensor) -> Tensor:
        images = (frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        inputs = self.processor(images=list(images), input_data_format="channels_last", return_tensors="pt")
        logits = self.model(pixel_values=inputs["pixel_values"].to(self._like)).logits.float()
        # The lead over the best other class is resized, not the logits of every class: 540 MB a frame of 704x1280.
        wanted = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        wanted[self.classes] = True
        lead = logits[:, wanted].amax(1, keepdim=True) - logits[:, ~wanted].amax(1, keepdim=True)
        return _resize(lead, frames.shape[2:])[:, 0] > 0


def _find_classes(id2label: dict[int, str], labels: Sequence[str]) -> list[int]:
    if isinstance(labels, str) or not labels:
        raise ValueError(f"labels must be a sequence of class names, got {labels!r}")
    names = {int(i): {part.strip().lower() for part in label.split(",")} for i, label in id2label.items()}
    for label in labels:
        if not any(label.lower() in parts for parts in names.values()):
            known = ", ".join(list(id2label.values())[:8])
            raise ValueError(f"labels must be classes of the model ({known}, ...), got {label!r}")
    classes = sorted(i for i, parts in names.items() if parts & {label.lower() for label in labels})
    if len(classes) == len(names):
        raise ValueError(f"labels must leave at least one class of the model, got {tuple(labels)!r}")
    return classes


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def _prepare(frames: Tensor, side: int, mean: Sequence[float], std: Sequence[float], like: Tensor) -> Tensor:
    """Prepare frames side x side for a SAM, as the checkpoints' processors do, which need torchvision."""
    resized = F.interpolate(frames.to(like.device), (side, side), mode="bilinear", antialias=True)
    scale, shift = (resized.new_tensor(values)[:, None, None] for values in (std, mean))
    return ((resized - shift) / scale).to(like.dtype)


class Sam3Filter(_LearnedFilter):
    """Not static are things that can move, by name: SAM 3 (Carion et al., "Segment Anything with Concepts", 2025).

    It finds all instances of each prompt in each pixel frame, whether they move now or not.

    Args:
        model: name or folder of a checkpoint, or a loaded `Sam3Model` (then with `tokenizer`). Weights are handed out
            on request by their authors.
        tokenizer: the checkpoint's tokenizer, where it is loaded already.
        prompts: noun phrases.
        threshold: least score of an instance; 0.3 is the value of the checkpoint's own processor.
        device, dtype: where and in what precision the model runs.
        batch_size: frames at a time.

    Raises:
        MissingExtraError: transformers is not installed, or is older than SAM 3.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module = "facebook/sam3",
        tokenizer: Any = None,
        *,
        prompts: Sequence[str] = ("person", "animal", "vehicle"),
        threshold: float = 0.3,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 1,
    ) -> None:
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts must be a sequence of noun phrases, got {prompts!r}")
        transformers = _transformers_with("Sam3Model", "5.0")
        loaded: Any = model
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise ValueError("tokenizer must be the tokenizer of the loaded model, got None")
        else:
            tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(model)
            loaded = transformers.Sam3Model.from_pretrained(model)
        self.prompts = tuple(prompts)
        self.threshold = threshold
        length = loaded.config.text_config.max_position_embeddings
        self._text = tokenizer(
            list(self.prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        super().__init__(loaded.to(dtype=dtype), device, batch_size)

    def _mark(self, frames: Tensor) -> Tensor:
        side = self.model.config.image_size
        pixels = _prepare(frames, side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), self._like)
        seen = self.model.get_vision_features(pixel_values=pixels)
        marked = torch.zeros((len(frames), *frames.shape[2:]), dtype=torch.bool, device=pixels.device)
        for ids, attention in zip(self._text["input_ids"], self._text["attention_mask"], strict=True):
            ids, attention = (row.to(pixels.device).expand(len(frames), -1) for row in (ids, attention))
            found = self.model(vision_embeds=seen, input_ids=ids, attention_mask=attention)
            scores = found.pred_logits.sigmoid() * found.presence_logits.sigmoid()
            # One by one: all 200 queries at the size of the frames would be 720 MB a frame of 704x1280.
            for frame, query in (scores > self.threshold).nonzero().tolist():
                mask = found.pred_masks[frame, query].float().sigmoid()
                marked[frame] |= _resize(mask[None, None], frames.shape[2:])[0, 0] > 0.5
        return marked


class Sam2Filter:
    """Whole things of which a part moved: SAM 2 (Ravi et al., 2024) sharpens the geometric test to outlines.

    Points at which the geometric test fails are prompts; of the segments that SAM 2 offers for each, those of which
    more than `least_part` failed are dropped whole. Nothing that failed is kept. Where nothing fails the network does
    not run. It looks at the last pixel frame of each latent frame, the one with depth.

    Args:
        model: name or folder of a checkpoint, or a loaded `Sam2Model`.
        geometric: the test; default `GeometricFilter()`.
        least_part: in [0, 1).
        least_iou: segments whose quality the network itself predicts to be lower are ignored.
        max_prompts: points a frame, spread evenly over those that failed; bounds the work.
        device, dtype: where and in what precision the model runs.

    Raises:
        MissingExtraError: transformers is not installed, or is older than SAM 2.
    """

    needs_frames = True

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module = "facebook/sam2.1-hiera-small",
        geometric: GeometricFilter | None = None,
        *,
        least_part: float = 0.5,
        least_iou: float = 0.7,
        max_prompts: int = 32,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 0 <= least_part < 1:
            raise ValueError(f"least_part must be in [0, 1), got {least_part!r}")
        if max_prompts < 1:
            raise ValueError(f"max_prompts must be a positive int, got {max_prompts!r}")
        transformers = _transformers_with("Sam2Model", "4.56")
        loaded: Any = model if isinstance(model, nn.Module) else transformers.Sam2Model.from_pretrained(model)
        self.model = loaded.to(device=device, dtype=dtype).eval()
        self.geometric = geometric or GeometricFilter()
        self.least_part = least_part
        self.least_iou = least_iou
        self.max_prompts = max_prompts

    @torch.no_grad()
    def __call__(self, views: ChunkViews) -> Tensor:
        frames = _require_frames(views, self)
        static = self.geometric(views)
        known = (views.depth > 0) & views.depth.isfinite()
        last = torch.tensor(views.frames_per_latent).cumsum(0) - 1
        for t, frame in enumerate(last.tolist()):
            moving = ~static[t] & known[t]
            if moving.any():
                static[t] &= ~self._outline(frames[frame], moving, known[t])
        return static

    def _outline(self, frame: Tensor, moving: Tensor, known: Tensor) -> Tensor:
        """Outline (H', W') bool: the segments of one frame (3, H, W) that are moving for the greater part."""
        like, size = next(self.model.parameters()), tuple(moving.shape)
        side = self.model.config.prompt_encoder_config.image_size
        failed = moving.nonzero()
        failed = failed[:: (len(failed) - 1) // self.max_prompts + 1]
        to_input = failed.new_tensor([side / size[0], side / size[1]], dtype=torch.float32)
        prompts = ((failed + 0.5) * to_input).flip(1)[None, :, None]  # x, y
        found = self.model(
            pixel_values=_prepare(frame[None], side, _IMAGENET_MEAN, _IMAGENET_STD, like),
            input_points=prompts.to(like.device, like.dtype),
            multimask_output=True,
        )
        logits = found.pred_masks[0].flatten(0, 1).float()
        segments = logits > 0
        seen, gone = (
            F.interpolate(one[None, None].float(), tuple(logits.shape[1:]), mode="nearest-exact")[0, 0].to(like.device)
            for one in (known, moving)
        )
        area, part = ((segments * one).sum((1, 2)) for one in (seen, gone))
        dropped = (part > self.least_part * area) & (found.iou_scores[0].flatten() >= self.least_iou)
        outline = torch.zeros_like(moving)
        for segment in logits[dropped]:
            outline |= (_resize(segment[None, None], size)[0, 0] > 0).to(moving.device)
        return outline


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _transformers_with(name: str, version: str) -> Any:
    transformers = import_extra("transformers", "generate")
    if not hasattr(transformers, name):
        raise MissingExtraError(
            f'{name} needs a newer transformers than {transformers.__version__}: pip install "transformers>={version}"'
        )
    return transformers


_FILTERS: dict[str, Callable[[torch.device | str], StaticFilter]] = {
    "none": lambda device: AllStatic(),
    "geometric": lambda device: GeometricFilter(),
    "confidence": lambda device: ConfidenceFilter(),
    "sky": lambda device: SkyFilter(device=device),
    "sam2": lambda device: Sam2Filter(device=device),
    "sam3": lambda device: Sam3Filter(device=device),
}

STATIC_FILTERS = tuple(_FILTERS)


def make_static_filter(names: str, device: torch.device | str = "cpu") -> StaticFilter:
    """Make a filter by its name in `STATIC_FILTERS`, or several joined by "+", as ``"sky+geometric"``.

    Args:
        names: "sam2" includes "geometric"; "none" stands alone.
        device: of the filters that have a network.

    Raises:
        ValueError: an unknown name, a name twice, or "none" beside another.
        MissingExtraError: a package is missing; the message says which.
    """
    parts = [part.strip() for part in names.split("+")]
    for part in parts:
        if part not in _FILTERS:
            raise ValueError(f'names must be of {", ".join(STATIC_FILTERS)}, joined by "+", got {names!r}')
    if len(set(parts)) < len(parts) or ("none" in parts and len(parts) > 1):
        raise ValueError(f'names must be different, and "none" alone, got {names!r}')
    filters = [_FILTERS[part](device) for part in parts]
    return filters[0] if len(filters) == 1 else AllOf(filters)

"""Static filters: which pixels of a new chunk may be remembered. Sky and what moves must never reach the cache.

A `StaticFilter` looks at a `ChunkViews`, all that is known of a chunk before it is written, and returns the mask that
`LatentCache.write` takes: True = static, keep. `make_static_filter` makes filters by name and joins several; each may
only take tokens away. The cache drops a token if any of its pixels is not static, so no filter needs a margin for
pixels of two kinds in one token.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirage_kernels import Cameras, LatentCache, back_project
from mirage_kernels.ops import NEAR, check_size
from mirage_kernels.reference import in_view, make_projection, pool_mask, project_points

from ..optional import MissingExtraError, import_extra


@dataclass(frozen=True)
class ChunkViews:
    """A new chunk of T latent frames, before it is written.

    Attributes:
        frames: (N, 3, H, W) float32 in [0, 1], all new pixel frames; None where nothing was decoded.
        frames_per_latent: T counts, which sum to N: how many of the frames belong to each latent frame, in order, as
            (1, 4, 4) at the start of a video and (4, 4, 4) later. The last of each is the one of `depth` and `cameras`.
        depth: (T, H', W') float32, z in world units, aligned to the memory; 0, negative, NaN and Inf mean unknown.
            H' x W' is at least h x w: the size of the frames, of the latents, or that of given depth.
        cameras: T views.
        cache: the memory before the chunk is written.
        past: cameras of the views in the memory, in order of time; None where there are none.
        latent_size: (h, w) of the latents.
        confidence: (T, H', W') float32 in [0, 1] of a depth head; None where it gives none.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came. Values are not looked at.
    """

    frames: Tensor | None
    frames_per_latent: tuple[int, ...]
    depth: Tensor
    cameras: Cameras
    cache: LatentCache
    past: Cameras | None
    latent_size: tuple[int, int]
    confidence: Tensor | None = None

    def __post_init__(self) -> None:
        for name, expected in (("cameras", Cameras), ("cache", LatentCache)):
            if not isinstance(getattr(self, name), expected):
                got = type(getattr(self, name)).__name__
                raise TypeError(f"{name} must be {expected.__name__}, got {got}")
        if self.past is not None and not isinstance(self.past, Cameras):
            raise TypeError(f"past must be Cameras or None, got {type(self.past).__name__}")
        count, (height, width) = len(self.cameras), check_size(self.latent_size, "latent_size")
        if len(self.frames_per_latent) != count or any(frames < 1 for frames in self.frames_per_latent):
            expected_counts = f"{count} positive ints, one per view of cameras"
            raise ValueError(f"frames_per_latent must be {expected_counts}, got {self.frames_per_latent!r}")
        if self.frames is not None:
            total = sum(self.frames_per_latent)
            if self.frames.dim() != 4 or self.frames.shape[:2] != (total, 3) or self.frames.dtype != torch.float32:
                expected_frames = f"({total}, 3, H, W) float32 as frames_per_latent says"
                raise ValueError(f"frames must be {expected_frames}, got {_describe(self.frames)}")
            if self.frames.shape[2] < height or self.frames.shape[3] < width:
                expected_frames = f"at least as fine as latent_size {(height, width)}"
                raise ValueError(f"frames must be {expected_frames}, got {_describe(self.frames)}")
        depth = self.depth
        if depth.dim() != 3 or depth.shape[0] != count or depth.dtype != torch.float32:
            raise ValueError(f"depth must be ({count}, H', W') float32 as cameras say, got {_describe(depth)}")
        if depth.shape[1] < height or depth.shape[2] < width:
            raise ValueError(f"depth must be at least as fine as latent_size {(height, width)}, got {_describe(depth)}")
        if depth.device != self.cache.device:
            raise ValueError(f"depth must be on {self.cache.device} like cache, got {depth.device}")
        if self.confidence is not None and (
            self.confidence.shape != depth.shape or self.confidence.dtype != torch.float32
        ):
            raise ValueError(
                f"confidence must be {tuple(depth.shape)} float32 like depth, got {_describe(self.confidence)}"
            )


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


@runtime_checkable
class StaticFilter(Protocol):
    """What the generation loop asks which pixels may be remembered.

    Attributes:
        needs_frames: whether it looks at `ChunkViews.frames`; where False the loop need not decode them.
    """

    needs_frames: bool

    def __call__(self, views: ChunkViews) -> Tensor:
        """(T, H', W') bool on the device of `views.depth`, at its size: True = static. The same for the same input."""
        ...


class AllStatic:
    """No filter: everything is static. For scenes known to be so; with sky or people in them the memory fills up."""

    needs_frames = False

    def __call__(self, views: ChunkViews) -> Tensor:
        return torch.ones_like(views.depth, dtype=torch.bool)


class AllOf:
    """Static is what every one of `filters` says is static."""

    def __init__(self, filters: Sequence[StaticFilter]) -> None:
        if not filters:
            raise ValueError("filters must hold at least one filter (AllStatic filters nothing), got none")
        self.filters = tuple(filters)
        self.needs_frames = any(one.needs_frames for one in self.filters)

    def __call__(self, views: ChunkViews) -> Tensor:
        static = self.filters[0](views)
        for one in self.filters[1:]:
            static = static & one(views)
        return static


class ConfidenceFilter:
    """Static is where the depth head's confidence reaches `threshold`: depth it doubts lands in the wrong place.

    Args:
        threshold: in [0, 1].
    """

    needs_frames = False

    def __init__(self, threshold: float = 0.5) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold!r}")
        self.threshold = threshold

    def __call__(self, views: ChunkViews) -> Tensor:
        if views.confidence is None:
            raise ValueError("confidence must be given to ConfidenceFilter: this depth estimator has none, got None")
        return views.confidence >= self.threshold


# Depth is tested at so many points along either side of a token. In the real room below, before growing, 1 caught
# 95.8 % of the moving cube and marked 0.02 % of the room; 2: 97.1 % and 0.10 %; 4: 97.8 % and 0.39 %, at four times
# the work.
_CELLS_PER_TOKEN = 2
_OVERLAP_SAMPLE = 2048  # points that choose among earlier views


class GeometricFilter:
    """Not static is what other views saw through: a free-space test, without a network and without frames.

    Each token is lifted at 2 x 2 points, which are projected into witnesses: the other views of the chunk with their
    own depth, and up to `max_past_views` earlier views with the depth that the cache shows there. A witness votes

    - against the point, where all surfaces it shows in the 3x3 cells about it lie behind the point, by more than
      `tolerance` of its depth: light came through where the point is;
    - for it, where the point's depth lies between those surfaces, within `tolerance`;
    - not at all, where it shows nearer surfaces (they hide the point: a side never seen is no evidence), a hole, or
      nothing as the point is out of view. Silhouettes and surfaces seen at a grazing angle have near and far
      neighbours, and therefore never speak against a point.

    A point is moving with at least `min_views` votes against it, and more than for it. What moves is marked in the
    next view of the chunk too, at the place it comes from, because the pixel frames between the two share that view's
    latents; then all is grown by one cell, half a token, for cells of which it covers less than half.

    What it cannot see: motion within `tolerance` of what is behind (feet on a floor), things that do not move before
    its eyes, what crosses a view within the pixel frames of one latent frame, and where things of the chunk before
    stood when it ended.

    Measured on 120 real RGB-D frames of a static room (7-Scenes, 640x480, 30x40 tokens, chunks of 8, each written as
    filtered before the next): 0.10 % of the tokens are marked, 1.1 % in the worst chunk. With a cube of 0.35 m added
    to the depth that moves 0.5 m a view through each chunk, 97.8 % of the tokens it covers at least half (0.2 m a
    view: 94.2 %; chunks of 3: 91.5 %), and 1.0 % of those it neither touches nor left. With every view's depth scaled
    by a random 2 %, as an imperfect alignment does, 0.10 % of the static room, with 4 %, 3.2 %; at a tolerance of
    0.05, 0.7 % and 10 %. In a ray-cast room (8 views, a cube of 0.5 m, 0.6 m a view): nothing of the static room; of
    the cube 97 % at first sight, 100 % against a memory. 8 views of 704x1280 and 64 earlier ones take 0.17 s of one
    CPU thread.

    Args:
        tolerance: relative depth error to allow.
        min_views: votes needed.
        max_past_views: earlier views that testify, spread in time; bounds the work.
    """

    needs_frames = False

    def __init__(self, *, tolerance: float = 0.08, min_views: int = 2, max_past_views: int = 8) -> None:
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {tolerance!r}")
        if min_views < 1:
            raise ValueError(f"min_views must be a positive int, got {min_views!r}")
        if max_past_views < 0:
            raise ValueError(f"max_past_views must be an int >= 0, got {max_past_views!r}")
        self.tolerance = tolerance
        self.min_views = min_views
        self.max_past_views = max_past_views

    def __call__(self, views: ChunkViews) -> Tensor:
        points, known, cameras = _lift(views)
        own_depth = points[..., 3] * cameras.intrinsics[:, 0, 0, None, None].to(points.dtype)
        against = torch.zeros_like(known, dtype=torch.int32)
        agreeing = torch.zeros_like(against)
        for t, projection in enumerate(_projections(cameras)):
            opposed, agreed = self._votes(points, known, projection, own_depth[t])
            opposed[t] = agreed[t] = False  # no view testifies on itself
            against += opposed
            agreeing += agreed
        past = self._choose_past(views.past, points[known])
        if past is not None:
            shown = views.cache.read(past, views.latent_size, splat="nearest").depth
            for t, projection in enumerate(_projections(past.resized(views.latent_size))):
                opposed, agreed = self._votes(points, known, projection, shown[t])
                against += opposed
                agreeing += agreed
        moving = (against >= self.min_views) & (against > agreeing)
        moving = moving | _carried(moving, points, cameras)
        moving = F.max_pool2d(moving[:, None].float(), 3, 1, 1)
        return F.interpolate(moving, tuple(views.depth.shape[1:]), mode="nearest-exact")[:, 0] == 0

    def _votes(self, points: Tensor, known: Tensor, projection: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
        """One witness's votes against and for each of points (T, h, w, 4); `shown` is its depth, 0 for a hole."""
        surface = shown > 0
        nearest = -F.max_pool2d(torch.where(surface, -shown, -torch.inf)[None], 3, 1, 1)[0]
        farthest = F.max_pool2d(shown[None], 3, 1, 1)[0]
        z, cell, inside = (each.view(known.shape) for each in _project(points, projection, shown.shape))
        speaks = inside & known & surface.flatten()[cell]
        through = z * (1 + self.tolerance) < nearest.flatten()[cell]
        hidden = z * (1 - self.tolerance) > farthest.flatten()[cell]
        return speaks & through, speaks & ~through & ~hidden

    def _choose_past(self, past: Cameras | None, points: Tensor) -> Cameras | None:
        """Of each of `max_past_views` stretches of time the view that has most of the points (N, 4) in its image.

        Spread in time, as neighbours in time would repeat the same evidence: what moves slowly stands before all of
        them. None where no view has any.
        """
        if past is None or not len(past) or not len(points) or not self.max_past_views:
            return None
        past = past.to(points.device)
        sample = points[:: len(points) // _OVERLAP_SAMPLE + 1]
        projections = _projections(past).permute(1, 2, 0)[..., None]  # broadcasts to (views, points)
        in_image = _project(sample, projections, past.image_size)[2].sum(1)
        stretches = torch.arange(len(past), device=points.device).tensor_split(min(self.max_past_views, len(past)))
        chosen = [int(stretch[in_image[stretch].argmax()]) for stretch in stretches]
        chosen = [view for view in chosen if in_image[view] > 0]
        return past[chosen] if chosen else None


def _lift(views: ChunkViews) -> tuple[Tensor, Tensor, Cameras]:
    """Points (T, h, w, 4) of the chunk on the grid they are tested on, which are known (T, h, w), and its cameras."""
    sides = zip(views.latent_size, views.depth.shape[1:], strict=True)
    grid = check_size(tuple(min(cells * _CELLS_PER_TOKEN, side) for cells, side in sides))
    cameras = views.cameras.to(views.depth.device).resized(views.depth.shape[1:])
    points, known = back_project(views.depth, cameras.intrinsics, cameras.cam2world, grid)
    return points, known, cameras.resized(grid)


def _projections(cameras: Cameras) -> Tensor:
    return make_projection(cameras.intrinsics, cameras.cam2world, torch.float32)


def _project(points: Tensor, projection: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Depth, cell (row-major, 0 if outside) and whether inside the image of points (..., 4), flat."""
    height, width = size
    u, v, z = project_points(points.reshape(-1, 4), projection)
    inside = in_view(u, v, z, (height, width), NEAR)
    cell = torch.where(inside, v, 0).long() * width + torch.where(inside, u, 0).long()
    return z, cell, inside


def _carried(moving: Tensor, points: Tensor, cameras: Cameras) -> Tensor:
    """(T, h, w): where the moving points of each view lie in the view after it."""
    carried, projections = torch.zeros_like(moving), _projections(cameras)
    for t in range(1, len(cameras)):
        _, cell, inside = _project(points[t - 1][moving[t - 1]], projections[t], cameras.image_size)
        carried[t].view(-1)[cell[inside]] = True
    return carried


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
        """(B, H, W) bool on any device: which pixels of (B, 3, H, W) must not be remembered."""
        raise NotImplementedError

    @property
    def _like(self) -> Tensor:
        """A tensor of the model's device and dtype."""
        return next(self.model.parameters())


def _pool(static: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H, W) bool to another size: a cell is static only if all its pixels are."""
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
    """Frames as a SAM takes them, side x side. As the checkpoints' processors do, which need torchvision for it."""
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
        """(H', W') bool: the segments of one frame (3, H, W) that are moving for the greater part."""
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
    """A filter by its name in `STATIC_FILTERS`, or several joined by "+", as ``"sky+geometric"``.

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

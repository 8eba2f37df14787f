"""Static filters: which pixels of a new chunk may be remembered. Sky and what moves must never reach the cache.

A `StaticFilter` looks at a `ChunkViews`, all that is known of a chunk before it is written, and returns the mask that
`LatentCache.write` takes: True = static, keep. The cache drops a token if any of its pixels is not static, so no filter
needs a margin for pixels of two kinds in one token. `mirage.perception.static_filter_models` has those with a network,
and makes filters by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_kernels import Cameras, LatentCache, back_project
from mirage_kernels.geometry import check_size, in_view, make_projection, project_points


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
        """Mark what is static: (T, H', W') bool on the device of `views.depth`, at its size, True = static.

        The same for the same input.
        """
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
        # Positions are kept in float32: they count from where the memory's do.
        origin = views.cache.anchor_for(views.depth, views.cameras.to(views.depth.device)).origin
        points, known, cameras = _lift(views, origin)
        own_depth = points[..., 3] * cameras.intrinsics[:, 0, 0, None, None].to(points.dtype)
        against = torch.zeros_like(known, dtype=torch.int32)
        agreeing = torch.zeros_like(against)
        for t, projection in enumerate(_projections(cameras)):
            opposed, agreed = self._votes(points, known, projection, own_depth[t])
            opposed[t] = agreed[t] = False  # no view testifies on itself
            against += opposed
            agreeing += agreed
        past = self._choose_past(views.past, points[known], origin)
        if past is not None:
            shown = views.cache.read(past, views.latent_size, splat="nearest").depth
            for t, projection in enumerate(_projections(_from(origin, past).resized(views.latent_size))):
                opposed, agreed = self._votes(points, known, projection, shown[t])
                against += opposed
                agreeing += agreed
        moving = (against >= self.min_views) & (against > agreeing)
        moving = moving | _carried(moving, points, cameras)
        moving = F.max_pool2d(moving[:, None].float(), 3, 1, 1)
        return F.interpolate(moving, tuple(views.depth.shape[1:]), mode="nearest-exact")[:, 0] == 0

    def _votes(self, points: Tensor, known: Tensor, projection: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
        """Count one view's evidence against and for each of points (T, h, w, 4); `shown` is its depth, 0 for a hole."""
        surface = shown > 0
        nearest = -F.max_pool2d(torch.where(surface, -shown, -torch.inf)[None], 3, 1, 1)[0]
        farthest = F.max_pool2d(shown[None], 3, 1, 1)[0]
        z, cell, inside = (each.view(known.shape) for each in _project(points, projection, shown.shape))
        speaks = inside & known & surface.flatten()[cell]
        through = z * (1 + self.tolerance) < nearest.flatten()[cell]
        hidden = z * (1 - self.tolerance) > farthest.flatten()[cell]
        return speaks & through, speaks & ~through & ~hidden

    def _choose_past(
        self, past: Cameras | None, points: Tensor, origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ) -> Cameras | None:
        """Choose from each of `max_past_views` stretches of time the view that has most of the points (N, 4) in its
        image.

        Spread in time, as neighbours in time would repeat the same evidence: what moves slowly stands before all of
        them. None where no view has any.
        """
        if past is None or not len(past) or not len(points) or not self.max_past_views:
            return None
        past = past.to(points.device)
        sample = points[:: len(points) // _OVERLAP_SAMPLE + 1]
        projections = _projections(_from(origin, past)).permute(1, 2, 0)[..., None]  # broadcasts to (views, points)
        in_image = _project(sample, projections, past.image_size)[2].sum(1)
        stretches = torch.arange(len(past), device=points.device).tensor_split(min(self.max_past_views, len(past)))
        chosen = [int(stretch[in_image[stretch].argmax()]) for stretch in stretches]
        chosen = [view for view in chosen if in_image[view] > 0]
        return past[chosen] if chosen else None


def _from(origin: tuple[float, float, float], cameras: Cameras) -> Cameras:
    """Return cameras of a world that begins at a point of theirs."""
    if not any(origin):
        return cameras
    poses = cameras.cam2world.clone()
    poses[:, :3, 3] -= torch.tensor(origin, dtype=poses.dtype, device=poses.device)
    return Cameras.trusted(cameras.intrinsics, poses, cameras.image_size)


def _lift(views: ChunkViews, origin: tuple[float, float, float]) -> tuple[Tensor, Tensor, Cameras]:
    """Lift the chunk to points (T, h, w, 4) on the grid of the test; also which are known (T, h, w), and cameras.

    Points and cameras count from the origin.
    """
    sides = zip(views.latent_size, views.depth.shape[1:], strict=True)
    grid = check_size(tuple(min(cells * _CELLS_PER_TOKEN, side) for cells, side in sides))
    cameras = _from(origin, views.cameras.to(views.depth.device)).resized(views.depth.shape[1:])
    points, known = back_project(views.depth, cameras.intrinsics, cameras.cam2world, grid)
    return points, known, cameras.resized(grid)


def _projections(cameras: Cameras) -> Tensor:
    return make_projection(cameras.intrinsics, cameras.cam2world, torch.float32)


def _project(points: Tensor, projection: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Project points: depth, cell (row-major, 0 if outside) and whether inside the image of points (..., 4), flat."""
    height, width = size
    u, v, z = project_points(points.reshape(-1, 4), projection)
    inside = in_view(u, v, z, (height, width), near=0.0)
    cell = torch.where(inside, v, 0).long() * width + torch.where(inside, u, 0).long()
    return z, cell, inside


def _carried(moving: Tensor, points: Tensor, cameras: Cameras) -> Tensor:
    """Carry on to the next view: (T, h, w), where the moving points of each view lie in the view after it."""
    carried, projections = torch.zeros_like(moving), _projections(cameras)
    for t in range(1, len(cameras)):
        _, cell, inside = _project(points[t - 1][moving[t - 1]], projections[t], cameras.image_size)
        carried[t].view(-1)[cell[inside]] = True
    return carried

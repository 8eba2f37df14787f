"""LatentCache: latent tokens in world space, written once per chunk and read for any camera.

Buffers: ``points`` (capacity, 4) float32 x, y, z, footprint; ``features`` (capacity, C); ``frame_ids`` (capacity,)
int32; with float8 features ``scales`` (capacity,) uint8; the bounds of every 256 tokens, by which reads pass over what
no camera sees; a table of frames' camera centres (F, 3); and the live count, one int64 beside them on the device. The
read path looks at the count on the device only: it never waits, so a captured read stays valid while the cache grows
within its buffers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .cameras import Cameras
from .ops import CARVE_VIEWS, MOST_VIEWS, NEAR, SHARPNESS, STORED_DTYPES, VIEWS_PER_VOXEL, View
from .reference import BLOCK, DEAD, FLOAT8, WRITE_REPORT, dequantise_rows
from .storage import load_cache, save_cache

WRITE_POLICIES = ("bounded", "append")
MERGES = ("keep", "mean")
SPLATS = ("aligned", "nearest")
_GROWTH = 1.5
_FRAMES = 1024  # rows of the table of frames to begin with, 12 KB


class WriteReport:
    """What became of the T x h x w tokens of one write; each is counted once. Reading a count may wait for the device.

    ``written``; ``replaced`` (took the place of an older one), ``merged`` (averaged with it) or ``covered`` (it shows
    as much already, and stays); ``refused`` (its voxel is full, or a fixed capacity is); ``masked`` (not static);
    ``unknown_depth``; ``out_of_range`` (outside [min_depth, max_depth]); ``non_finite`` (NaN or Inf in position or
    latents). And of the tokens held before: ``carved`` (seen through) and ``evicted`` (too many).
    """

    __slots__ = ("counts",)

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts
        """(11,) int64 on the cache's device, in the order of the properties."""

    def as_dict(self) -> dict[str, int]:
        return dict(zip(WRITE_REPORT, self.counts.tolist(), strict=True))

    @property
    def written(self) -> int:
        return self.as_dict()["written"]

    @property
    def replaced(self) -> int:
        return self.as_dict()["replaced"]

    @property
    def merged(self) -> int:
        return self.as_dict()["merged"]

    @property
    def covered(self) -> int:
        return self.as_dict()["covered"]

    @property
    def refused(self) -> int:
        return self.as_dict()["refused"]

    @property
    def masked(self) -> int:
        return self.as_dict()["masked"]

    @property
    def unknown_depth(self) -> int:
        return self.as_dict()["unknown_depth"]

    @property
    def out_of_range(self) -> int:
        return self.as_dict()["out_of_range"]

    @property
    def non_finite(self) -> int:
        return self.as_dict()["non_finite"]

    @property
    def carved(self) -> int:
        return self.as_dict()["carved"]

    @property
    def evicted(self) -> int:
        return self.as_dict()["evicted"]

    def __repr__(self) -> str:
        return f"WriteReport({', '.join(f'{name}={count}' for name, count in self.as_dict().items())})"


class CacheMark(NamedTuple):
    """A state to go back to, of :meth:`LatentCache.checkpoint`."""

    tokens: int
    frames: int
    held: dict[str, Tensor] | None
    """Copies of what a write may change in place; None where it only appends."""


class LatentCache:
    """Spatial memory of latent tokens.

    Args:
        channels: C of the latents.
        dtype: of the stored features: float32, float16, bfloat16 or float8_e4m3fn. The last takes C + 21 bytes a token,
            69 at 48 channels where bfloat16 takes 116: latents are rounded to four significant bits, with one scale a
            token (:func:`mirage_kernels.cache_write`).
        device: where the tokens live.
        capacity: fixed number of tokens: buffers are allocated once, a captured read stays valid for good, and a write
            that does not fit reports what it refused. None: buffers grow by half when full; growing moves them and
            bumps ``generation``, after which a CUDA graph must be captured again. (The table of frames' camera centres,
            which ``splat="aligned"`` reads, has room for 1,024 frames and doubles when full, in either case.)
        write_policy: ``"bounded"`` writes what the memory does not show yet, see :func:`mirage_kernels.bounded_write`:
            it stays small over any number of laps through a scene. ``"append"`` keeps every token written (the
            published memory). What the next three say holds for ``"bounded"`` only.
        views_per_voxel: tokens that a voxel of about a token's size holds at most, 1 to 64.
        merge: ``"keep"`` keeps tokens as they were seen; ``"mean"`` averages what shows the same, up to 16 looks. With
            ``views_per_voxel=1`` that is the smallest memory, and the smoothest.
        carve: whether tokens that later views see through are removed, as when something was taken away.
        carve_views: views that must see through a token, 1 to 254, without one between that sees it in its place.
        max_tokens: after each write, the oldest tokens beyond so many are evicted: those written, replaced or merged by
            the earliest view, within a view those of the lowest row. None: any number. A write needs room for all that
            it adds before it evicts.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        channels: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int | None = None,
        write_policy: str = "bounded",
        views_per_voxel: int = VIEWS_PER_VOXEL,
        merge: str = "keep",
        carve: bool = True,
        carve_views: int = CARVE_VIEWS,
        max_tokens: int | None = None,
    ) -> None:
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels must be a positive int, got {channels!r}")
        if dtype not in STORED_DTYPES:
            raise TypeError(f"dtype must be float32, float16, bfloat16 or float8_e4m3fn, got {dtype}")
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0):
            raise ValueError(f"capacity must be None or an int >= 0, got {capacity!r}")
        if write_policy not in WRITE_POLICIES:
            raise ValueError(f"write_policy must be one of {', '.join(WRITE_POLICIES)}, got {write_policy!r}")
        ops.check_count("views_per_voxel", views_per_voxel, 1, MOST_VIEWS)
        ops.check_count("carve_views", carve_views, 1, DEAD - 1)
        if merge not in MERGES:
            raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}")
        if not isinstance(carve, bool):
            raise TypeError(f"carve must be a bool, got {carve!r}")
        if max_tokens is not None:
            ops.check_count("max_tokens", max_tokens, 0, 2**62)
        self._channels = channels
        self._dtype = dtype
        self._fixed_capacity = capacity
        self._write_policy = write_policy
        self._views_per_voxel, self._merge = views_per_voxel, merge
        self._carve, self._carve_views, self._max_tokens = carve, carve_views, max_tokens
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        self._at_most = 0  # bound on the count that the host knows without asking the device
        self._generation = 0
        self._num_frames = 0
        self._take_buffers(self._new_buffers(capacity or 0))
        self._bounds = self._no_bounds()
        self._frame_centers = torch.empty((_FRAMES, 3), dtype=torch.float32, device=self.device)

    def _new_buffers(self, capacity: int) -> dict[str, Tensor]:
        """A row a token of each; the names are those of the saved file."""
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "points": ((capacity, 4), torch.float32),
            "features": ((capacity, self._channels), self._dtype),
            "frame_ids": ((capacity,), torch.int32),
        }
        if self._dtype == FLOAT8:
            shapes["scales"] = ((capacity,), torch.uint8)
        if self._write_policy == "bounded":
            shapes["votes"] = ((capacity,), torch.uint8)
            if self._merge == "mean":
                shapes["looks"] = ((capacity,), torch.uint8)
        return {name: torch.empty(size, dtype=kind, device=self.device) for name, (size, kind) in shapes.items()}

    def _take_buffers(self, buffers: dict[str, Tensor]) -> None:
        self._points, self._features, self._frame_ids = (buffers[name] for name in ("points", "features", "frame_ids"))
        self._scales, self._votes, self._looks = (buffers.get(name) for name in ("scales", "votes", "looks"))

    def _no_bounds(self) -> Tensor:
        """Bounds of blocks without a token, see :func:`mirage_kernels.block_bounds`."""
        bounds = torch.full((-(-self.capacity // BLOCK), 6), torch.inf, device=self.device)
        bounds[:, 3:] = -torch.inf
        return bounds

    # What it is.

    @property
    def channels(self) -> int:
        return self._channels

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored features."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._count.device

    @property
    def write_policy(self) -> str:
        return self._write_policy

    @property
    def merge(self) -> str:
        return self._merge

    @property
    def max_tokens(self) -> int | None:
        return self._max_tokens

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments it was made with, but for the device; also what a saved file keeps."""
        return {
            "channels": self._channels,
            "dtype": str(self._dtype).removeprefix("torch."),
            "write_policy": self._write_policy,
            "capacity": self._fixed_capacity,
            "views_per_voxel": self._views_per_voxel,
            "merge": self._merge,
            "carve": self._carve,
            "carve_views": self._carve_views,
            "max_tokens": self._max_tokens,
        }

    @property
    def capacity(self) -> int:
        """Tokens the buffers hold before they must grow, or refuse."""
        return self._points.shape[0]

    @property
    def generation(self) -> int:
        """Changes whenever the buffers move: capture CUDA graphs of :meth:`read` again then."""
        return self._generation

    @property
    def num_frames(self) -> int:
        """Views written so far."""
        return self._num_frames

    # What it holds. These may wait for the device: they need the live count on the host.

    def __len__(self) -> int:
        """Live tokens."""
        self._at_most = int(self._count)
        return self._at_most

    @property
    def points(self) -> Tensor:
        """(N, 3) float32 world positions of the live tokens, a view of the buffer."""
        return self._points[: len(self), :3]

    @property
    def footprints(self) -> Tensor:
        """(N,) float32 world size of a cell at each token, z / fx, a view of the buffer."""
        return self._points[: len(self), 3]

    @property
    def features(self) -> Tensor:
        """(N, C) features of the live tokens, a view of the buffer; of a float8 cache their values, a float32 copy."""
        live = len(self)
        if self._scales is not None:
            return dequantise_rows(self._features[:live], self._scales[:live])
        return self._features[:live]

    @property
    def frame_ids(self) -> Tensor:
        """(N,) int32: which written view each token came from, counted from 0."""
        return self._frame_ids[: len(self)]

    @property
    def frame_centers(self) -> Tensor:
        """(num_frames, 3) float32 camera centres of the written views."""
        return self._frame_centers[: self._num_frames]

    @property
    def nbytes(self) -> int:
        """Bytes of the live tokens, their bounds, and frames."""
        per_token = sum(buffer[:1].nbytes if self.capacity else 0 for buffer in self._buffers().values())
        blocks = -(-len(self) // BLOCK)
        return len(self) * per_token + self._bounds[:blocks].nbytes + self.frame_centers.nbytes

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of all buffers, the unused part included."""
        tables = self._bounds, self._frame_centers, self._count
        return sum(buffer.nbytes for buffer in (*self._buffers().values(), *tables))

    def _buffers(self) -> dict[str, Tensor]:
        buffers = {"points": self._points, "features": self._features, "frame_ids": self._frame_ids}
        more = {"scales": self._scales, "votes": self._votes, "looks": self._looks}
        return {**buffers, **{name: buffer for name, buffer in more.items() if buffer is not None}}

    # What it does.

    def write(
        self,
        latents: Tensor,
        depth: Tensor,
        cameras: Cameras,
        mask: Tensor | None = None,
        *,
        depth_sampling: str = "median",
        min_depth: float = 0.0,
        max_depth: float = math.inf,
    ) -> WriteReport:
        """Lift the tokens of T views, and keep of the static ones of known depth what the write policy wants.

        Args:
            latents: (T, C, h, w) float32, float16 or bfloat16 on the cache's device.
            depth: (T, H, W) float, z in world units, H >= h and W >= w; 0, negative, NaN and Inf mean unknown.
            cameras: of the T views; moved to the cache's device and resized to the depth map where they differ.
            mask: (T, H', W') bool, True = static, keep; None keeps everything.
            depth_sampling: ``"median"`` or ``"bilinear"``, see :func:`mirage_kernels.back_project`.
            min_depth, max_depth: token depths outside are not written.

        Returns:
            :class:`WriteReport`.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came; the cache is as it was.
        """
        self._check_cameras(cameras)
        if isinstance(latents, Tensor) and latents.dim() == 4 and len(cameras) != latents.shape[0]:
            raise ValueError(f"cameras must be {latents.shape[0]} views like latents, got {len(cameras)}")
        cameras = cameras.to(self.device)
        if isinstance(depth, Tensor) and depth.dim() == 3 and 0 not in depth.shape[1:]:
            cameras = cameras.resized((depth.shape[1], depth.shape[2]))
        return self._write_views(
            latents, depth, cameras.intrinsics, cameras.cam2world, mask, depth_sampling, min_depth, max_depth
        )

    def _write_views(
        self,
        latents: Tensor,
        depth: Tensor,
        intrinsics: Tensor,
        cam2world: Tensor,
        mask: Tensor | None,
        depth_sampling: str,
        min_depth: float,
        max_depth: float,
    ) -> WriteReport:
        """:meth:`write` with plain camera tensors, intrinsics in pixels of the depth map."""
        # Everything that can be refused is refused before anything grows or moves.
        arguments = ops.check_write_inputs(
            latents, depth, intrinsics, cam2world, mask, depth_sampling, min_depth, max_depth
        )
        if latents.device != self.device:
            raise ValueError(f"latents must be on {self.device} like the cache, got {latents.device}")
        if latents.shape[1] != self._channels:
            raise ValueError(f"latents must be (T, {self._channels}, h, w), got {tuple(latents.shape)}")
        views = latents.shape[0]
        tokens = views * latents.shape[2] * latents.shape[3]
        self._reserve(tokens)
        self._reserve_frames(views)
        depth, intrinsics, cam2world, mask = arguments
        self._frame_centers[self._num_frames : self._num_frames + views] = cam2world[:, :3, 3]
        options: dict[str, Any] = dict(
            mask=mask,
            bounds=self._bounds,
            scales=self._scales,
            first_frame=self._num_frames,
            depth_sampling=depth_sampling,
            min_depth=min_depth,
            max_depth=max_depth,
        )
        views_of = latents, depth, intrinsics, cam2world
        buffers = self._points, self._features, self._frame_ids
        if self._votes is not None:
            counts = ops.bounded_write(
                *(*buffers, self._votes, self._count, self._frame_centers, *views_of),
                looks=self._looks,
                views_per_voxel=self._views_per_voxel,
                carve_views=self._carve_views if self._carve else 0,
                **options,
            )
        else:
            appended = ops.cache_write(*buffers, self._count, *views_of, **options)
            counts = appended.new_zeros(len(WRITE_REPORT))
            # Slices: a list of places would be copied to the device, and no graph could capture the write.
            counts[:1], counts[4:9] = appended[:1], appended[1:]
        if self._votes is not None or self._max_tokens is not None:
            counts[-1] = ops.cache_trim(
                *(*buffers, self._count),
                votes=self._votes,
                looks=self._looks,
                bounds=self._bounds,
                scales=self._scales,
                max_tokens=self._max_tokens,
            )
        self._num_frames += views
        self._at_most = min(self._at_most + tokens, self.capacity)
        return WriteReport(counts)

    def _reserve(self, tokens: int) -> None:
        """Room for so many more tokens, unless the capacity is fixed. Waits for the device only if it may be full."""
        if self._fixed_capacity is not None or self._at_most + tokens <= self.capacity:
            return
        live = len(self)
        needed = live + tokens
        if needed <= self.capacity:
            return
        grown = self._new_buffers(max(needed, int(self.capacity * _GROWTH)))
        for name, old in self._buffers().items():
            grown[name][:live] = old[:live]
        self._take_buffers(grown)
        known, self._bounds = self._bounds, self._no_bounds()
        self._bounds[: len(known)] = known
        self._generation += 1

    def _reserve_frames(self, views: int) -> None:
        needed, room = self._num_frames + views, self._frame_centers.shape[0]
        if needed > room:
            grown = self._frame_centers.new_empty((max(needed, 2 * room), 3))
            grown[: self._num_frames] = self.frame_centers
            self._frame_centers = grown
            self._generation += 1

    def read(
        self,
        cameras: Cameras,
        size: tuple[int, int],
        *,
        splat: str = "aligned",
        sharpness: float = SHARPNESS,
        near: float = NEAR,
        dtype: torch.dtype | None = None,
    ) -> View:
        """What T cameras see of the cache, on a latent grid.

        Never waits for the device, and can be captured in a CUDA graph when the cameras are on the cache's device.

        Args:
            cameras: T views; their intrinsics are resized to the grid.
            size: (h, w) of the grid.
            splat: ``"aligned"``: a blend of the tokens that fit each cell best in position, scale and viewing ray, see
                :func:`mirage_kernels.splat_aligned`; ``"nearest"``: the nearest token of each cell (the published
                memory), several times as fast.
            sharpness: of ``"aligned"``: 0 is a blur, infinity the best token alone.
            near: least depth, world units.
            dtype: of the latents returned, float32, float16 or bfloat16; default the cache's, bfloat16 of a float8 one.

        Returns:
            :class:`View`: latents (T, C, h, w), mask, depth and index (T, h, w); holes are 0, False, 0 and -1. Depth
            and index are those of the nearest token, or of the one that fits best.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        if splat not in SPLATS:
            raise ValueError(f"splat must be one of {', '.join(SPLATS)}, got {splat!r}")
        ops.check_sharpness(sharpness)
        self._check_cameras(cameras)
        size = ops.check_size(size)
        cameras = cameras.to(self.device).resized(size)
        if splat == "aligned":
            return ops.splat_aligned(
                self._points,
                self._features,
                self._frame_ids,
                self._frame_centers,
                cameras.intrinsics,
                cameras.cam2world,
                size,
                scales=self._scales,
                num_points=self._count,
                bounds=self._bounds,
                near=near,
                sharpness=sharpness,
                dtype=dtype,
            )
        return ops.splat(
            self._points,
            self._features,
            cameras.intrinsics,
            cameras.cam2world,
            size,
            scales=self._scales,
            num_points=self._count,
            bounds=self._bounds,
            near=near,
            dtype=dtype,
        )

    def view_overlap(
        self, cameras: Cameras, targets: Cameras, size: tuple[int, int], *, voxel_size: float = 0.1, near: float = NEAR
    ) -> Tensor:
        """How much of what the targets see each earlier camera sees too, for choosing reference frames.

        Args:
            cameras: V earlier views.
            targets: T views about to be generated, taken together.
            size: (h, w) of the grid.
            voxel_size: edge in world units.
            near: least depth, world units.

        Returns:
            (V,) float32, IoU of voxel sets, see :func:`mirage_kernels.view_overlap`.
        """
        self._check_cameras(cameras)
        self._check_cameras(targets, "targets")
        size = ops.check_size(size)
        cameras, targets = (one.to(self.device).resized(size) for one in (cameras, targets))
        return ops.view_overlap(
            self._points,
            cameras.intrinsics,
            cameras.cam2world,
            targets.intrinsics,
            targets.cam2world,
            size,
            num_points=self._count,
            bounds=self._bounds,
            voxel_size=voxel_size,
            near=near,
        )

    def clear(self) -> None:
        """Forget every token and frame; buffers stay where they are."""
        self._count.zero_()
        self._bounds.copy_(self._no_bounds())
        self._at_most = 0
        self._num_frames = 0

    def checkpoint(self) -> CacheMark:
        """A mark for :meth:`rollback`. Waits for the device; unless tokens are only appended, it copies them."""
        tokens = len(self)
        in_place = self._votes is not None or self._max_tokens is not None
        held = {name: buffer[:tokens].clone() for name, buffer in self._buffers().items()} if in_place else None
        return CacheMark(tokens, self._num_frames, held)

    def rollback(self, mark: CacheMark) -> None:
        """Forget what was written since :meth:`checkpoint` gave `mark`; buffers stay where they are.

        Raises:
            ValueError: `mark` is of another cache, or of before a :meth:`clear`.
        """
        tokens, frames, held = mark
        fits = (
            tokens <= len(self) if held is None else held.keys() == self._buffers().keys() and tokens <= self.capacity
        )
        if not fits or frames > self._num_frames:
            raise ValueError(
                f"mark must be of this cache, which holds {len(self)} tokens of {self._num_frames} frames,"
                f" got one of {tokens} tokens of {frames} frames"
            )
        for name, kept in (held or {}).items():
            self._buffers()[name][:tokens] = kept
        self._count.fill_(tokens)
        ops.block_bounds(self._points, num_points=self._count, out=self._bounds)
        self._at_most = tokens
        self._num_frames = frames

    def to(self, device: torch.device | str) -> LatentCache:
        """The cache on another device: itself where it is there already, else a copy."""
        target = torch.empty(0, device=device).device  # "cuda" means the current one
        if target == self.device:
            return self
        return self._rebuild(target, {name: tensor.to(target) for name, tensor in self._live().items()})

    def _live(self) -> dict[str, Tensor]:
        live = len(self)
        return {
            **{name: buffer[:live] for name, buffer in self._buffers().items()},
            "frame_centers": self.frame_centers,
        }

    def _rebuild(self, device: torch.device | str, tensors: dict[str, Tensor]) -> LatentCache:
        copy = LatentCache(**{**self.settings, "dtype": self._dtype}, device=device)
        copy._fill(tensors)
        return copy

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        """Take over tensors of :meth:`_live`'s form into an empty cache."""
        live, frames = tensors["points"].shape[0], tensors["frame_centers"].shape[0]
        if self._fixed_capacity is None:
            self._take_buffers(self._new_buffers(live))
        for name, buffer in self._buffers().items():
            buffer[:live] = tensors[name]
        self._frame_centers = tensors["frame_centers"].clone()
        self._count.fill_(live)
        self._bounds = ops.block_bounds(self._points, num_points=self._count)
        self._at_most, self._num_frames = live, frames

    def save(self, path: str | Path) -> None:
        """Save as safetensors. Written beside ``path`` and renamed onto it: a crash leaves the old file."""
        save_cache(path, self._live(), self.settings)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> LatentCache:
        """Load a saved cache onto ``device``, with the settings it was saved with.

        Raises:
            FileNotFoundError: no such file.
            ValueError: truncated, not a cache, of an unknown version, or with missing or misshapen tensors.
        """
        tensors, settings = load_cache(path, device)
        try:
            cache = cls(**{**settings, "dtype": getattr(torch, settings["dtype"])}, device=device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: settings this package does not know: {error}") from error
        if cache._fixed_capacity is not None and tensors["points"].shape[0] > cache._fixed_capacity:
            raise ValueError(
                f"{path}: points must fit the saved capacity, {cache._fixed_capacity}, got {tensors['points'].shape[0]}"
            )
        cache._fill(tensors)
        return cache

    @staticmethod
    def _check_cameras(cameras: object, name: str = "cameras") -> None:
        if not isinstance(cameras, Cameras):
            raise TypeError(f"{name} must be mirage_kernels.Cameras, got {type(cameras).__name__}")

    def __repr__(self) -> str:
        dtype = str(self._dtype).removeprefix("torch.")
        return (
            f"LatentCache({len(self)} tokens of {self._channels} {dtype} channels from {self._num_frames} frames,"
            f" {self.nbytes / 2**20:.1f} MiB on {self.device}, write_policy={self._write_policy!r})"
        )

"""LatentCache: latent tokens in world space, written once per chunk and read for any camera.

Buffers: ``points`` (capacity, 4) float32 x, y, z, footprint; ``features`` (capacity, C); ``frame_ids`` (capacity,)
int32; with float8 features ``scales`` (capacity,) uint8; the bounds of every 256 tokens and of every 16,384, by which
reads pass over what no camera sees; a table of frames' camera centres (F, 3); and the live count, one int64 beside them
on the device. The read path looks at the count on the device only: it never waits, so a captured read stays valid while
the cache grows within its buffers. What :meth:`LatentCache.offload` moved to the host is in no buffer; the rows of
those that stay keep their order, see ``offload.py``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .cameras import Cameras
from .offload import Offloaded, Plan, Run, make_plan, make_store, may_touch, offloaded
from .ops import CARVE_VIEWS, MOST_VIEWS, NEAR, SHARPNESS, STORED_DTYPES, VIEWS_PER_VOXEL, Readout
from .reference import BLOCK, DEAD, FLOAT8, WRITE_REPORT, bounds_rows, dequantise_rows
from .storage import load_cache, save_cache

WRITE_POLICIES = ("bounded", "append")
MERGES = ("keep", "mean")
SPLATS = ("aligned", "nearest")
_GROWTH = 1.5
_AHEAD = (32, 32)  # the grid that `offload` takes margins for: finer ones need less
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
    held: tuple[dict[str, Tensor], Offloaded | None] | None
    """Copies of what a write may change in place, and what was offloaded; None where it only appends."""


def _by_alignment(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Wide elements first: rows of any number, one buffer after the other, are then aligned."""
    return dict(sorted(buffers.items(), key=lambda item: -item[1].element_size()))


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
        self._out: Offloaded | None = None
        self._take_buffers(self._new_buffers(capacity or 0))
        self._bounds = self._no_bounds()
        self._frame_centers = torch.empty((_FRAMES, 3), dtype=torch.float32, device=self.device)

    def _new_buffers(self, capacity: int, device: torch.device | None = None) -> dict[str, Tensor]:
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
        device = device or self.device
        return {name: torch.empty(size, dtype=kind, device=device) for name, (size, kind) in shapes.items()}

    def _take_buffers(self, buffers: dict[str, Tensor]) -> None:
        self._points, self._features, self._frame_ids = (buffers[name] for name in ("points", "features", "frame_ids"))
        self._scales, self._votes, self._looks = (buffers.get(name) for name in ("scales", "votes", "looks"))

    def _no_bounds(self) -> Tensor:
        """Bounds of buffers without a token, see :func:`mirage_kernels.block_bounds`."""
        bounds = torch.full((bounds_rows(self._room), 6), torch.inf, device=self.device)
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
        """Tokens the cache holds before its buffers must grow, or refuse; those offloaded included."""
        return self._room + self.num_offloaded

    @property
    def _room(self) -> int:
        """Rows of the buffers."""
        return self._points.shape[0]

    @property
    def generation(self) -> int:
        """Changes whenever the buffers move: capture CUDA graphs of :meth:`read` again then."""
        return self._generation

    @property
    def num_frames(self) -> int:
        """Views written so far."""
        return self._num_frames

    @property
    def num_offloaded(self) -> int:
        """Tokens that :meth:`offload` moved to the host, and that are there still."""
        return self._out.tokens if self._out is not None else 0

    @property
    def nbytes_offloaded(self) -> int:
        """Bytes of the tokens that :meth:`offload` moved to the host."""
        return self.num_offloaded * self._token_nbytes

    # What it holds. These may wait for the device: they need the live count on the host. Those that hand out rows of
    # the buffers bring back first what was offloaded.

    def __len__(self) -> int:
        """Live tokens, wherever they are."""
        return self._resident() + self.num_offloaded

    def _resident(self) -> int:
        """Live tokens on the device."""
        self._at_most = int(self._count)
        return self._at_most

    @property
    def points(self) -> Tensor:
        """(N, 3) float32 world positions of the live tokens, a view of the buffer."""
        self.fetch()
        return self._points[: len(self), :3]

    @property
    def footprints(self) -> Tensor:
        """(N,) float32 world size of a cell at each token, z / fx, a view of the buffer."""
        self.fetch()
        return self._points[: len(self), 3]

    @property
    def features(self) -> Tensor:
        """(N, C) features of the live tokens, a view of the buffer; of a float8 cache their values, a float32 copy."""
        self.fetch()
        live = len(self)
        if self._scales is not None:
            return dequantise_rows(self._features[:live], self._scales[:live])
        return self._features[:live]

    @property
    def frame_ids(self) -> Tensor:
        """(N,) int32: which written view each token came from, counted from 0."""
        self.fetch()
        return self._frame_ids[: len(self)]

    @property
    def frame_centers(self) -> Tensor:
        """(num_frames, 3) float32 camera centres of the written views."""
        return self._frame_centers[: self._num_frames]

    @property
    def nbytes(self) -> int:
        """Bytes of the live tokens, wherever they are, their bounds, and frames."""
        live = len(self)
        bounds = bounds_rows(live) * self._bounds.element_size() * self._bounds.shape[1]
        return live * self._token_nbytes + bounds + self.frame_centers.nbytes

    @property
    def _token_nbytes(self) -> int:
        return sum(buffer.element_size() * math.prod(buffer.shape[1:]) for buffer in self._buffers().values())

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of all buffers on the device, the unused part included; what is offloaded takes none of them."""
        tables = [self._bounds, self._frame_centers, self._count]
        if self._out is not None:
            tables += [self._out.before, self._out.shift]
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

        While tokens are offloaded, a bounded write waits for the device to bring back first those it depends on: what
        the views may see, and what may share a voxel with the new. One that may evict brings back everything.

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
        self._fetch_for_write(*arguments[:3], size=(latents.shape[2], latents.shape[3]))
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
        out = self._out
        if out is not None and self._votes is not None:
            # The dead are all on the device: what is off it moves up by those before it.
            alive = torch.nn.functional.pad((self._votes != DEAD).cumsum(0), (1, 0))
            out = out._replace(before=alive[out.before])
        if self._votes is not None or self._max_tokens is not None:
            counts[-1] = ops.cache_compact(
                *(*buffers, self._count),
                votes=self._votes,
                looks=self._looks,
                bounds=self._bounds,
                scales=self._scales,
                max_tokens=self._max_tokens,
            )
        self._out = out
        self._num_frames += views
        self._at_most = min(self._at_most + tokens, self._room)
        return WriteReport(counts)

    def _reserve(self, tokens: int) -> None:
        """Room for so many more tokens, unless the capacity is fixed. Waits for the device only if it may be full."""
        if self._fixed_capacity is not None or self._at_most + tokens <= self._room:
            return
        live = self._resident()
        needed = live + tokens
        if needed <= self._room:
            return
        grown = self._new_buffers(max(needed, int(self._room * _GROWTH)))
        for name, old in self._buffers().items():
            grown[name][:live] = old[:live]
        self._take_buffers(grown)
        self._bounds = ops.block_bounds(self._points, num_points=self._count)
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
    ) -> Readout:
        """What T cameras see of the cache, on a latent grid.

        Never waits for the device, and can be captured in a CUDA graph when the cameras are on the cache's device. But
        while tokens are offloaded, what the cameras may see of them is brought back first, for which it waits.

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
            :class:`Readout`: latents (T, C, h, w), mask, depth and index (T, h, w); holes are 0, False, 0 and -1. Depth
            and index are those of the nearest token, or of the one that fits best.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
            RuntimeError: captured in a CUDA graph while tokens are offloaded.
        """
        if splat not in SPLATS:
            raise ValueError(f"splat must be one of {', '.join(SPLATS)}, got {splat!r}")
        ops.check_sharpness(sharpness)
        self._check_cameras(cameras)
        size = ops.check_size(size)
        cameras = cameras.resized(size)
        self._move(set(), self._touched(cameras))
        cameras = cameras.to(self.device)
        if splat == "aligned":
            view = ops.splat_aligned(
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
        else:
            view = ops.splat(
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
        return view if self._out is None else view._replace(index=self._out.all_rows(view.index))

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
            (V,) float32, IoU of voxel sets, see :func:`mirage_kernels.view_overlap`. Of what is offloaded it brings
            the positions alone, waits for them, and keeps none.
        """
        self._check_cameras(cameras)
        self._check_cameras(targets, "targets")
        size = ops.check_size(size)
        cameras, targets = cameras.resized(size), targets.resized(size)
        points, count, bounds = self._points, self._count, self._bounds
        if self._out is not None:
            touched = [self._rows(self._out.runs[k])["points"] for k in self._touched(cameras, targets)]
            brought = (rows.to(self.device, non_blocking=True) for rows in touched)
            points = torch.cat([points[: self._resident()], *brought])
            count, bounds = torch.full_like(count, len(points)), ops.block_bounds(points)
        cameras, targets = cameras.to(self.device), targets.to(self.device)
        return ops.view_overlap(
            points,
            cameras.intrinsics,
            cameras.cam2world,
            targets.intrinsics,
            targets.cam2world,
            size,
            num_points=count,
            bounds=bounds,
            voxel_size=voxel_size,
            near=near,
        )

    def offload(self, cameras_ahead: Cameras) -> None:
        """Move to the host what is far from the path ahead, and bring back what is near it.

        Whole blocks of 256 tokens go that none of the cameras may see: to pinned memory beside a GPU, beside the CPU to
        a memory-mapped file in the system's temporary directory. The buffers shrink by them, and what the cameras may
        see of earlier ones comes back; ``generation`` changes if anything moved.

        No result changes by a bit, whatever is where: a read or a write that depends on tokens offloaded brings them
        back itself, at the price of waiting then, and of copying what is on the device. Call this with the cameras of
        the next reads and writes, and they find what they need. (On latent grids coarser than 32 x 32 they may need a
        little more than it foresees.) ``points``, ``footprints``, ``features``, ``frame_ids``, and copying by
        :mod:`copy`, bring back everything; :meth:`save`, :meth:`to` and :meth:`checkpoint` leave it where it is.

        It waits for the device, and while it copies, the old buffers and the new take memory together. The file has no
        name. It is gone with the cache and its marks, or when all of its tokens are back, and does not shrink before.
        Where the temporary directory is itself in memory, it frees none: the environment's TMPDIR names another.

        Args:
            cameras_ahead: T views of the coming reads and writes, on any device; with T = 0 all whole blocks may go.

        Raises:
            TypeError: `cameras_ahead` is no Cameras.
            OSError, RuntimeError: the temporary directory cannot be written to, the disk is full, memory ran out. The
                cache is as it was.
        """
        self._check_cameras(cameras_ahead, "cameras_ahead")
        views = cameras_ahead.resized(_AHEAD)
        blocks = self._resident() // BLOCK
        far = ~may_touch(self._bounds[:blocks].cpu(), views.intrinsics, views.cam2world, _AHEAD)
        if self._votes is not None:
            # Only tokens that have the voxel they lie in to themselves: the border's hold all that is beyond.
            tokens = self._points[: blocks * BLOCK].view(blocks, BLOCK, 4)
            footprint, most = tokens[..., 3], tokens[..., :3].abs().amax(2)
            far &= ((footprint > 1e-15) & (footprint < 1e15) & (most < 1e5 * footprint)).all(1).cpu()
        self._move(set(far.nonzero()[:, 0].tolist()), self._touched(views))

    def fetch(self) -> None:
        """Bring back all that :meth:`offload` moved to the host. If memory runs out, the cache is as it was."""
        if self._out is not None:
            self._move(set(), set(range(len(self._out.runs))))

    def _touched(self, *views: Cameras) -> set[int]:
        """Runs that the views, whose image size is the grid, may see or may write to."""
        if self._out is None:
            return set()
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the cache must have all tokens on the device while a CUDA graph is captured, got {self.num_offloaded}"
                " offloaded: call fetch() first"
            )
        boxes = self._out.boxes
        touched = [may_touch(boxes, one.intrinsics, one.cam2world, one.image_size) for one in views]
        return set(torch.stack(touched).any(0).nonzero()[:, 0].tolist())

    def _fetch_for_write(self, depth: Tensor, intrinsics: Tensor, cam2world: Tensor, size: tuple[int, int]) -> None:
        """Bring back what a write depends on; intrinsics in pixels of the depth map."""
        if self._out is None:
            return
        most, tokens = self._max_tokens, depth.shape[0] * size[0] * size[1]
        if most is not None and len(self) + tokens > most:
            self.fetch()
        elif self._votes is not None:
            views = Cameras._unchecked(intrinsics.double(), cam2world.double(), (depth.shape[1], depth.shape[2]))
            self._move(set(), self._touched(views.resized(size)))

    def _move(self, go: set[int], come: set[int]) -> None:
        """Blocks of the buffers to the host, runs from there; the cache is as it was if anything raises."""
        if not go and not come:
            return
        if self._out is None:
            store, runs, before = make_store(BLOCK * self._token_nbytes, self.device), list[Run](), list[int]()
        else:
            store, runs, before = self._out.store, self._out.runs, self._out.before.tolist()
        plan = make_plan(self._resident(), before, runs, go, come)
        boxes, held = self._bounds.cpu(), _by_alignment(self._buffers())
        gone = []
        for start, stop in plan.goes:
            slot = store.put([buffer[start:stop].reshape(-1).view(torch.uint8) for buffer in held.values()])
            gone.append(Run(store, slot, stop - start, boxes[start // BLOCK]))
        # A fixed capacity holds in all; buffers that grow get no more room to grow than growing gives.
        room = self._room - sum(run.tokens for run in gone) + sum(run.tokens for run, _ in plan.comes)
        if self._fixed_capacity is None:
            room = min(room, int(plan.rows * _GROWTH))
        moved = self._gathered(plan, room, self.device)
        count = torch.full_like(self._count, plan.rows)
        bounds = ops.block_bounds(moved["points"], num_points=count)
        goes = iter(gone)
        off = [run or next(goes) for run, _ in plan.off]
        out = offloaded(store, off, [rows for _, rows in plan.off], self.device)
        self._count.copy_(count)
        self._take_buffers(moved)
        self._bounds, self._out, self._at_most = bounds, out, plan.rows
        self._generation += 1

    def _gathered(self, plan: Plan, capacity: int, device: torch.device) -> dict[str, Tensor]:
        """New buffers, with the tokens that the plan has on the device."""
        buffers = self._new_buffers(capacity, device)
        for name, held in self._buffers().items():
            for start, stop, row in plan.stays:
                buffers[name][row : row + stop - start] = held[start:stop]
        if plan.comes and device != self.device and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what is on its way to the host is there then
        for run, row in plan.comes:
            for name, rows in self._rows(run).items():
                buffers[name][row : row + run.tokens].copy_(rows, non_blocking=True)
        return buffers

    def _rows(self, run: Run) -> dict[str, Tensor]:
        """A run's rows of each buffer, on the host, to be copied while the run is referred to."""
        rows, rest = {}, run.store.get(run.slot)
        for name, buffer in _by_alignment(self._buffers()).items():
            nbytes = run.tokens * buffer.element_size() * math.prod(buffer.shape[1:])
            rows[name] = rest[:nbytes].view(buffer.dtype).view(run.tokens, *buffer.shape[1:])
            rest = rest[nbytes:]
        return rows

    def _set_room(self, rows: int) -> None:
        """Buffers of so many rows, which hold nothing yet."""
        if rows != self._room:
            self._take_buffers(self._new_buffers(rows))
            self._bounds = self._no_bounds()
            self._generation += 1

    def clear(self) -> None:
        """Forget every token and frame; buffers stay where they are, unless a part of a fixed capacity is offloaded."""
        if self._fixed_capacity is not None:
            self._set_room(self._fixed_capacity)
        self._out = None
        self._count.zero_()
        self._bounds.copy_(self._no_bounds())
        self._at_most = 0
        self._num_frames = 0

    def checkpoint(self) -> CacheMark:
        """A mark for :meth:`rollback`. Waits for the device; unless tokens are only appended, copies those on it."""
        tokens, live = len(self), self._at_most
        in_place = self._votes is not None or self._max_tokens is not None
        held = {name: buffer[:live].clone() for name, buffer in self._buffers().items()} if in_place else None
        return CacheMark(tokens, self._num_frames, None if held is None else (held, self._out))

    def rollback(self, mark: CacheMark) -> None:
        """Forget what was written since :meth:`checkpoint` gave `mark`.

        Buffers stay where they are, unless tokens were offloaded or brought back since. Tokens that were only appended
        stay where they are now, others are where they were.

        Raises:
            ValueError: `mark` is of another cache, or of before a :meth:`clear`.
        """
        tokens, frames, held = mark
        if held is None:
            fits = tokens <= len(self)
        else:
            most = tokens if self._fixed_capacity is None else self._fixed_capacity
            fits = held[0].keys() == self._buffers().keys() and tokens <= most
        if not fits or frames > self._num_frames:
            raise ValueError(
                f"mark must be of this cache, which holds {len(self)} tokens of {self._num_frames} frames,"
                f" got one of {tokens} tokens of {frames} frames"
            )
        if held is None:
            self._fetch_from(tokens)
            live = tokens - self.num_offloaded
        else:
            kept, out = held
            live = len(kept["points"])
            if self._fixed_capacity is not None:
                self._set_room(self._fixed_capacity - (tokens - live))
            elif live > self._room:
                self._set_room(live)
            for name, rows in kept.items():
                self._buffers()[name][:live] = rows
            self._out = out
        self._count.fill_(live)
        ops.block_bounds(self._points, num_points=self._count, out=self._bounds)
        self._at_most = live
        self._num_frames = frames

    def _fetch_from(self, tokens: int) -> None:
        """Bring back every run that has any but the first so many of all tokens."""
        if self._out is not None:
            ends = (self._out.before + self._out.shift[1:]).tolist()
            self._move(set(), {k for k, end in enumerate(ends) if end > tokens})

    def to(self, device: torch.device | str) -> LatentCache:
        """The cache on another device: itself where it is there already, else a copy."""
        target = torch.empty(0, device=device).device  # "cuda" means the current one
        if target == self.device:
            return self
        return self._rebuild(target, self._live(target))

    def _live(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """All tokens and frames on a device, by default the cache's own; views of the buffers where they can be."""
        device = device or self.device
        if self._out is None:
            live = {name: buffer[: len(self)].to(device) for name, buffer in self._buffers().items()}
        else:
            before, runs = self._out.before.tolist(), self._out.runs
            plan = make_plan(self._resident(), before, runs, set(), set(range(len(runs))))
            live = self._gathered(plan, plan.rows, device)
        return {**live, "frame_centers": self.frame_centers.to(device)}

    def __getstate__(self) -> dict[str, Any]:
        self.fetch()  # what is on the host cannot be copied with it
        return self.__dict__.copy()

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
        save_cache(path, self._live(torch.device("cpu")), self.settings)

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
        offloaded = f", {self.nbytes_offloaded / 2**20:.1f} MiB of them offloaded" if self._out is not None else ""
        return (
            f"LatentCache({len(self)} tokens of {self._channels} {dtype} channels from {self._num_frames} frames,"
            f" {self.nbytes / 2**20:.1f} MiB on {self.device}{offloaded}, write_policy={self._write_policy!r})"
        )

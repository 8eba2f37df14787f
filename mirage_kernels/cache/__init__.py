"""LatentCache: latent tokens in world space, written once per chunk and read for any camera.

Its tensors are in ``buffers.py``: the read path looks at the live count on the device only and never waits, so a
captured read stays valid while the cache grows within its buffers. What :meth:`LatentCache.offload` moved to the host
is in no buffer, and the rows of those that stay keep their order: ``offload.py``. Files are ``storage.py``. Threads
take turns by ``lock.py``: methods that others call here have an underscore, and hold no lock of their own.

Arguments are checked here, once: operators are launched without checks of their own, on buffers that this package made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..cameras import Cameras
from ..cameras.checks import check_fits_grid
from ..constants import CARVE_VIEWS, NEAR, SHARPNESS, VIEWS_PER_VOXEL
from ..geometry import bounds_rows, check_size
from ..ops import Readout
from ..ops.checks import (
    check_first_frame,
    check_near,
    check_sharpness,
    check_write_aspects,
    check_write_inputs,
    plain,
    readout_dtype,
)
from ..quantization import dequantize_rows
from . import launch
from .anchor import UNSETTLED, Anchor, find_anchor, find_anchor_of_points
from .buffers import TokenBuffers
from .config import MERGES, READOUT_DTYPES, WRITE_POLICIES, CacheConfig
from .inputs import Array, as_write_inputs
from .lock import CacheLock
from .loose_points import as_points, write_points
from .mark import CacheMark
from .offload import Offloaded, find_far, find_touched, gather_all, move
from .report import WriteReport
from .selection import check_frames, near_the_surface, read_frames, winners
from .storage import load_cache, save_cache

__all__ = [
    "MERGES",
    "SPLATS",
    "WRITE_POLICIES",
    "CacheConfig",
    "CacheMark",
    "LatentCache",
    "TokenBuffers",
    "WriteReport",
]

SPLATS = ("aligned", "nearest")
VOXEL_NEARS = 2.0  # least depths that the edge of a voxel of `view_overlap` has
_OFFLOAD_GRID = (32, 32)  # that `offload` takes margins for: finer ones need less
_OWN = ("_config", "_buffers", "_offloaded", "_lock", "_readout_dtype")  # attributes of a cache
_NEW_NAMES = {"generation": "buffer_version", "fetch": "onload", "settings": "config"}


class LatentCache:
    """Remember latent tokens in world space.

    Threads may use one cache together: reads run side by side, a write runs alone, and each sees the state between two
    writes. On a GPU that is the order in which work is queued: threads with streams of their own order these by events,
    as with any tensor. A cache is sent to another process by :mod:`pickle`, as a copy.

    Args:
        channels: C of the latents; 0 keeps positions only, for visibility and retrieval.
        dtype: of the stored features: float32, float16, bfloat16 or float8_e4m3fn. The last takes C + 21 bytes a token,
            69 at 48 channels where bfloat16 takes 116: latents are rounded to four significant bits, with one scale a
            token (:func:`mirage_kernels.cache_write`).
        device: where the tokens live.
        capacity: fixed number of tokens: buffers are allocated once, a captured read stays valid for good, and a write
            that does not fit reports what it refused. None: buffers grow by half when full; growing moves them and
            changes ``buffer_version``, after which a CUDA graph must be captured again. (The table of frames' camera
            centres, which ``splat="aligned"`` reads, has room for 1,024 frames and doubles when full, in either case.)
        write_policy: ``"bounded"`` writes what the memory does not show yet, see :func:`mirage_kernels.bounded_write`:
            it stays small however often a scene is revisited. ``"append"`` keeps every token written (the
            published memory). What the next three say holds for ``"bounded"`` only.
        views_per_voxel: tokens that a voxel of about a token's size holds at most, 1 to 64.
        merge: ``"keep"`` keeps tokens as they were seen; ``"mean"`` averages what shows the same, up to 16
            observations. With ``views_per_voxel=1`` that is the smallest memory, and the smoothest.
        carve: whether tokens that later views see through are removed, as when something was taken away.
        carve_views: views that must see through a token, 1 to 254, without one between that sees it in its place.
        max_tokens: after each write, the oldest tokens beyond so many are evicted: those written, replaced or merged by
            the earliest view, within a view those of the lowest row. None: any number. A write needs room for all that
            it adds before it evicts.
        voxel_size: edge of the voxels of ``"bounded"``, world units, for a fixed density of tokens however finely they
            are seen. None: of about a token's size. A write then waits for the device after each view, needs room for
            all that the view adds, brings back what is offloaded, and looks at all tokens held; what comes to a full
            voxel counts as refused, an older token that it would have replaced included.
        near: least depth, world units, that writes see, and reads where they are not given another. None: 1/64 of the
            median depth of the first view written whose depth is known. World units are then any: metres, millimetres,
            whatever depth and poses come in.
        origin: (x, y, z) that positions are counted from, so that float32 holds them where the world begins far away,
            as in coordinates of a map. None: (0, 0, 0) where that first view's camera is within 64 median depths of
            it, else near that camera.

    What the first write settles of these two is kept, in files too, until :meth:`clear`. For it that write waits for
    the device, and cannot be captured in a CUDA graph; with both given it does neither.

    A cache is no part of a graph of gradients: a write takes none and a read carries none. It may be made under
    ``torch.inference_mode()`` and be written outside it.

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
        voxel_size: float | None = None,
        near: float | None = None,
        origin: tuple[float, float, float] | None = None,
    ) -> None:
        self._config = config = CacheConfig(
            channels=channels,
            dtype=dtype,
            write_policy=write_policy,
            capacity=capacity,
            views_per_voxel=views_per_voxel,
            merge=merge,
            carve=carve,
            carve_views=carve_views,
            max_tokens=max_tokens,
            voxel_size=voxel_size,
            near=near,
            origin=origin,
        )
        self._buffers = TokenBuffers(
            channels,
            dtype,
            device,
            rows=capacity or 0,
            bounded=config.bounded,
            mean=config.bounded and merge == "mean",
            may_grow=capacity is None,
        )
        self._buffers.settle(config.anchor)
        self._offloaded: Offloaded | None = None
        self._lock = CacheLock()
        self._readout_dtype = readout_dtype(dtype)

    if not TYPE_CHECKING:  # type checkers report unknown names themselves

        def __getattr__(self, name: str) -> Any:
            if name in _NEW_NAMES:
                raise AttributeError(f"LatentCache.{name} is called {_NEW_NAMES[name]} now")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # What it is.

    @property
    def channels(self) -> int:
        return self._config.channels

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored features."""
        return self._config.dtype

    @property
    def device(self) -> torch.device:
        return self._buffers.device

    @property
    def write_policy(self) -> str:
        return self._config.write_policy

    @property
    def merge(self) -> str:
        return self._config.merge

    @property
    def max_tokens(self) -> int | None:
        return self._config.max_tokens

    @property
    def near(self) -> float | None:
        """Least depth, world units, that views see; None until it is settled."""
        return self._config.near if self._buffers.anchor is None else self._buffers.anchor.near

    @property
    def origin(self) -> tuple[float, float, float]:
        """World coordinates that the buffers' positions are counted from; zeros until it is settled."""
        return (self._buffers.anchor or UNSETTLED).origin

    def anchor_for(self, depth: Tensor, cameras: Cameras) -> Anchor:
        """Return near and origin as settled, or as a write of T such views would settle them; may wait for the device.

        Args:
            depth: (T, H, W) float, as :meth:`write` takes it.
            cameras: T views on the same device.
        """
        found = self._buffers.anchor
        if found is None:
            found = find_anchor(depth, cameras.cam2world, self._config.near, self._config.origin)
        return found or UNSETTLED

    @property
    def config(self) -> dict[str, Any]:
        """The arguments it was made with, except the device; also what a saved file keeps."""
        return self._config.as_dict()

    @property
    def capacity(self) -> int:
        """Tokens the cache holds before its buffers must grow, or refuse; those offloaded included."""
        with self._lock:
            return self._buffers.rows + self._num_offloaded()

    @property
    def buffers(self) -> TokenBuffers:
        """The tensors on the device, for calling operators on them; rows past the live count are unspecified."""
        return self._buffers

    @property
    def buffer_version(self) -> int:
        """Changes whenever the buffers move: capture CUDA graphs of :meth:`read` again then."""
        return self._buffers.version

    @property
    def num_frames(self) -> int:
        """Views written so far."""
        return self._buffers.num_frames

    @property
    def num_offloaded(self) -> int:
        """Tokens that :meth:`offload` moved to the host, and that are there still."""
        with self._lock:
            return self._num_offloaded()

    @property
    def nbytes_offloaded(self) -> int:
        """Bytes of the tokens that :meth:`offload` moved to the host."""
        return self.num_offloaded * self._buffers.token_nbytes

    # What it holds. These may wait for the device: they need the live count on the host. Those that hand out rows of
    # the buffers bring back first what was offloaded.

    def __len__(self) -> int:
        """Count the live tokens, wherever they are."""
        with self._lock:
            return self._buffers.count_live() + self._num_offloaded()

    @property
    def points(self) -> Tensor:
        """(N, 3) float32 world positions of the live tokens, a view of the buffer; float64 where `origin` is not 0."""
        with self._lock.exclusive():
            return self._buffers.in_world(self._buffers.points[: self._onload(), :3])

    @property
    def footprints(self) -> Tensor:
        """(N,) float32 world size of a cell at each token, z / fx, a view of the buffer."""
        with self._lock.exclusive():
            return self._buffers.points[: self._onload(), 3]

    @property
    def features(self) -> Tensor:
        """(N, C) features of the live tokens, a view of the buffer; of a float8 cache their values, a float32 copy."""
        with self._lock.exclusive():
            live, buffers = self._onload(), self._buffers
            if buffers.scales is not None:
                return dequantize_rows(buffers.features[:live], buffers.scales[:live])
            return buffers.features[:live]

    @property
    def frame_ids(self) -> Tensor:
        """(N,) int32: which written view each token came from, counted from 0."""
        with self._lock.exclusive():
            return self._buffers.frame_ids[: self._onload()]

    @property
    def frame_centers(self) -> Tensor:
        """(num_frames, 3) float32 camera centres of the written views; float64 where `origin` is not 0."""
        with self._lock:
            return self._buffers.in_world(self._buffers.frame_centers[: self._buffers.num_frames])

    @property
    def nbytes(self) -> int:
        """Bytes of the live tokens, wherever they are, their bounds, and frames."""
        with self._lock:
            live, bounds = len(self), self._buffers.bounds
        bounds_nbytes = bounds_rows(live) * bounds.element_size() * bounds.shape[1]
        return live * self._buffers.token_nbytes + bounds_nbytes + 12 * self.num_frames

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of all buffers on the device, the unused part included; what is offloaded takes none of them."""
        with self._lock:
            return self._buffers.nbytes + (self._offloaded.nbytes_on_device if self._offloaded is not None else 0)

    # What it does.

    def write(
        self,
        latents: Array,
        depth: Array,
        cameras: Cameras,
        mask: Array | None = None,
        *,
        depth_sampling: str = "median",
        min_depth: float = 0.0,
        max_depth: float = math.inf,
    ) -> WriteReport:
        """Lift the tokens of T views, and keep of the static ones of known depth what the write policy wants.

        While tokens are offloaded, a bounded write waits for the device to bring back first those it depends on: what
        the views may see, and what may share a voxel with the new. One that may evict brings back everything.

        Args:
            latents: (T, C, h, w) float on the cache's device, or (1, C, T, h, w) as pipelines give them.
            depth: (T, H, W) or (T, 1, H, W) float, z in world units, H >= h and W >= w; 0, negative, NaN and Inf mean
                unknown.
            cameras: of the T views; moved to the cache's device and resized to the depth map where they differ.
            mask: (T, H', W') or (T, 1, H', W'), True = static, keep; None keeps everything. Bool, or 0 and 1 in any
                other dtype, which are looked at: that waits for the device.

            Cameras, depth and mask have the aspect of the latents, within a token.
            Numpy arrays are moved to the cache's device; float64 is rounded to float32.
            depth_sampling: ``"median"`` or ``"bilinear"``, see :func:`mirage_kernels.back_project`.
            min_depth, max_depth: token depths outside are not written.

        Returns:
            :class:`WriteReport`.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came; the cache is as it was.
        """
        _check_cameras(cameras)
        views = len(cameras)
        tokens, depths, static = as_write_inputs(latents, depth, mask, views, self.channels, self.device)
        if isinstance(tokens, Tensor) and tokens.dim() == 4 and views != tokens.shape[0]:
            raise ValueError(f"cameras must be {tokens.shape[0]} views like latents, got {views}")
        check_write_aspects(tokens, depths, cameras, static, depth_sampling)
        cameras = cameras.to(self.device)
        if isinstance(depths, Tensor) and depths.dim() == 3 and 0 not in depths.shape[1:]:
            cameras = cameras.resized((depths.shape[1], depths.shape[2]))
        return self.write_views(
            tokens, depths, cameras.intrinsics, cameras.cam2world, static, depth_sampling, min_depth, max_depth
        )

    def write_views(
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
        """Write as :meth:`write` does, with plain camera tensors: intrinsics in pixels of the depth map."""
        # Everything that can be refused is refused before anything grows or moves.
        depth, intrinsics, cam2world, mask = check_write_inputs(
            latents, depth, intrinsics, cam2world, mask, depth_sampling, min_depth, max_depth
        )
        if latents.device != self.device:
            raise ValueError(f"latents must be on {self.device} like the cache, got {latents.device}")
        if latents.shape[1] != self.channels:
            raise ValueError(f"latents must be (T, {self.channels}, h, w), got {tuple(latents.shape)}")
        given = self._config.near, self._config.origin
        with self._lock.exclusive(), self._settling(lambda: find_anchor(depth, cam2world, *given)):
            check_first_frame(self.num_frames, latents.shape[0])
            poses = self._buffers.from_origin(cam2world)
            self._onload_for_write(depth, intrinsics, poses, size=(latents.shape[2], latents.shape[3]))
            counts, self._offloaded = launch.write(
                self._buffers,
                self._config,
                self._offloaded,
                latents=plain(latents),
                depth=depth,
                intrinsics=intrinsics,
                cam2world=poses,
                mask=mask,
                bilinear=depth_sampling == "bilinear",
                min_depth=min_depth,
                max_depth=max_depth,
                near=(self._buffers.anchor or UNSETTLED).near,
            )
        return WriteReport(counts)

    def write_points(
        self,
        points: Array,
        features: Array,
        *,
        footprint: float | Array,
        frame: int | None = None,
        center: Array | Sequence[float] | None = None,
    ) -> WriteReport:
        """Write tokens that come from no depth map: surfels, a scan, another system's cloud.

        No view says what they cover or see through. A bounded cache writes, in their order, those whose voxel holds
        fewer than ``views_per_voxel`` tokens, and refuses the others; nothing is replaced, merged or carved. It waits
        for the device, and brings back what was offloaded where it may evict or refuse. Where nothing was written
        before, the median footprint is the cache's least depth, and its origin lies amid the points.

        Args:
            points: (N, 3) float, world positions.
            features: (N, C) float.
            footprint: world size of what a token stands for, such as a surfel's diameter: one for all, or (N,).
            frame: number of the written view that they belong to; None counts them as one view more, and
                :attr:`frame_ids` has its number.
            center: (3,), the camera's centre of such a view, from which aligned reads know the side that the points
                were seen from; None: unknown.

        Returns:
            :class:`WriteReport`: ``written``, ``refused``, ``non_finite``, ``evicted``.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came; the cache is as it was.
        """
        given = self._config.near, self._config.origin
        with self._lock.exclusive():
            rows = as_points(points, features, footprint, frame, center, self.channels, self.num_frames, self.device)
            if self._config.changes_in_place:
                self._onload()
            with self._settling(lambda: find_anchor_of_points(rows.points, *given)):
                return WriteReport(write_points(self._buffers, self._config, rows))

    @contextmanager
    def _settling(self, find: Callable[[], Anchor | None]) -> Iterator[None]:
        """Settle the anchor that is found, if there is none, for the write in the block; not if that fails."""
        buffers = self._buffers
        if buffers.anchor is not None:
            yield
            return
        if buffers.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the first write must not be captured in a CUDA graph, for it looks at depth and poses: write once"
                " before, or give the cache near= and origin="
            )
        buffers.settle(find())
        try:
            yield
        except BaseException:
            buffers.settle(None)
            raise

    def read(
        self,
        cameras: Cameras,
        size: tuple[int, int],
        *,
        splat: str = "aligned",
        sharpness: float = SHARPNESS,
        near: float | None = None,
        dtype: torch.dtype | None = None,
        frames: Sequence[int] | None = None,
        per_frame: bool = False,
    ) -> Readout:
        """Render what T cameras see of the cache, on a latent grid.

        Never waits for the device, and can be captured in a CUDA graph when the cameras are on the cache's device. But
        while tokens are offloaded, what the cameras may see of them is brought back first, for which it waits.

        Args:
            cameras: T views; their intrinsics are resized to the grid, whose aspect they have within one cell.
            size: (h, w) of the grid.
            splat: ``"aligned"``: a blend of the tokens that fit each cell best in position, scale and viewing ray, see
                :func:`mirage_kernels.splat_aligned`; ``"nearest"``: the nearest token of each cell (the published
                memory), several times as fast.
            sharpness: of ``"aligned"``: 0 is a blur, infinity the best token alone.
            near: least depth, world units; None: the cache's.
            dtype: of the latents returned, float32, float16 or bfloat16; default the cache's, bfloat16 of a float8 one.
            frames: numbers of written views; only the tokens that these wrote are there. None: all. Given, it waits for
                the device, and so does ``per_frame``.
            per_frame: render the tokens of each written view apart, as if the cache held no others: all results get a
                leading axis of the ``frames``, by default of the ``num_frames`` written.

        Returns:
            :class:`Readout`: latents (T, C, h, w), mask, depth and index (T, h, w); holes are 0, False, 0 and -1. Depth
            and index are those of the nearest token, or of the one that fits best.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
            RuntimeError: captured in a CUDA graph while tokens are offloaded.
        """
        if splat not in SPLATS:
            raise ValueError(f"splat must be one of {', '.join(SPLATS)}, got {splat!r}")
        check_sharpness(sharpness)
        _check_cameras(cameras)
        size = check_size(size)
        check_fits_grid("cameras", cameras.image_size, size, "the grid to read")
        if near is not None:
            check_near(near)
        if dtype is None:
            dtype = self._readout_dtype
        elif dtype not in READOUT_DTYPES:
            raise TypeError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
        if per_frame or frames is not None:
            frames = check_frames(range(self.num_frames) if frames is None else frames, self.num_frames)
        arguments = cameras, size, splat, sharpness, near, dtype, frames, per_frame
        if torch.compiler.is_compiling():  # which knows no locks
            return self._read(*arguments)
        with self._lock:
            if self._offloaded is None or not self._touched(self._from_origin(cameras.resized(size))):
                return self._read(*arguments)
        with self._lock.exclusive():
            self._move(set(), self._touched(self._from_origin(cameras.resized(size))))
            return self._read(*arguments)

    def _read(
        self,
        cameras: Cameras,
        size: tuple[int, int],
        splat: str,
        sharpness: float,
        near: float | None,
        dtype: torch.dtype,
        frames: Sequence[int] | None,
        per_frame: bool,
    ) -> Readout:
        """Read where all that the cameras may see is on the device."""
        buffers, intrinsics = self._buffers, cameras.intrinsics_at(size)
        anchor = buffers.read_anchor()
        near, cam2world = anchor.near if near is None else near, buffers.from_origin(cameras.cam2world)
        if cam2world.device != buffers.device:
            intrinsics, cam2world = intrinsics.to(buffers.device), cam2world.to(buffers.device)
        if frames is not None:
            views: dict[str, Any] = dict(intrinsics=intrinsics, cam2world=cam2world, size=size, near=near, dtype=dtype)
            aligned = partial(launch.read_aligned, sharpness=sharpness, **views)
            render = aligned if splat == "aligned" else partial(launch.read_nearest, **views)
            readout = read_frames(buffers, frames, per_frame, render)
        elif splat == "aligned":
            readout = launch.read_aligned(buffers, intrinsics, cam2world, size, near, sharpness, dtype)
        else:
            readout = launch.read_nearest(buffers, intrinsics, cam2world, size, near, dtype)
        if self._offloaded is not None:
            readout = readout._replace(index=self._offloaded.all_rows(readout.index))
        return readout

    def visible(
        self, cameras: Cameras, size: tuple[int, int], *, depth_tolerance: float = 0.0, near: float | None = None
    ) -> Tensor:
        """Say which tokens T cameras see, for matching views or counting what they share. Waits for the device.

        A token is visible to a camera if it is the nearest of the cell that it falls into, as ``splat="nearest"`` reads
        it: at equal depth the one of the lowest row. With a tolerance, so is what lies in the same cell and is at most
        so much deeper, which on a coarse grid is the rest of the same surface.

        Args:
            cameras: T views; their intrinsics are resized to the grid.
            size: (h, w) of the grid.
            depth_tolerance: as a part of the nearest depth; 0.01 is one percent.
            near: least depth, world units; None: the cache's.

        Returns:
            (T, N) bool, in the order of :attr:`points`.
        """
        if not 0 <= depth_tolerance < math.inf:
            raise ValueError(f"depth_tolerance must be a finite part >= 0 of the depth, got {depth_tolerance!r}")
        with self._lock.exclusive():  # the readout and the rows are of one state
            near = self._buffers.read_anchor().near if near is None else near
            nearest = self.read(cameras, size, splat="nearest", near=near)
            shown = winners(nearest.index, len(self))
            if depth_tolerance > 0:
                points = self._buffers.points[: self._buffers.count_live()]
                rows = torch.arange(len(points), device=self.device)
                if self._offloaded is not None:
                    rows = self._offloaded.all_rows(rows)
                views = self._from_origin(cameras.resized(size)).to(self.device)
                shown[:, rows] |= near_the_surface(points, nearest.depth, views, near, depth_tolerance)
            return shown

    def view_overlap(
        self,
        cameras: Cameras,
        targets: Cameras,
        size: tuple[int, int],
        *,
        voxel_size: float | None = None,
        near: float | None = None,
    ) -> Tensor:
        """Measure how much of what the targets see each earlier camera sees too, for choosing reference frames.

        Args:
            cameras: V earlier views.
            targets: T views about to be generated, taken together.
            size: (h, w) of the grid.
            voxel_size: edge in world units; None: twice the cache's least depth, about 1/32 of the scene's depth.
            near: least depth, world units; None: the cache's.

        Returns:
            (V,) float32, IoU of voxel sets, see :func:`mirage_kernels.view_overlap`. Of what is offloaded it brings
            the positions alone, waits for them, and keeps none.
        """
        _check_cameras(cameras)
        _check_cameras(targets, "targets")
        size = check_size(size)
        for name, views in (("cameras", cameras), ("targets", targets)):
            check_fits_grid(name, views.image_size, size, "the grid")
        if near is not None:
            check_near(near)
        if voxel_size is not None and not 0 < voxel_size < math.inf:
            raise ValueError(f"voxel_size must be a finite length > 0 in world units, got {voxel_size!r}")
        with self._lock:
            anchor = self._buffers.read_anchor()
            near = anchor.near if near is None else near
            voxel_size = VOXEL_NEARS * (anchor.near or NEAR) if voxel_size is None else voxel_size
            cameras, targets = map(self._from_origin, (cameras.resized(size), targets.resized(size)))
            touched = self._touched(cameras, targets)
            cameras, targets = cameras.to(self.device), targets.to(self.device)
            return launch.view_overlap(self._buffers, self._offloaded, touched, cameras, targets, voxel_size, near)

    def offload(self, cameras_ahead: Cameras) -> None:
        """Move to the host what is far from the path ahead, and bring back what is near it.

        Whole blocks of 256 tokens go that none of the cameras may see: to pinned memory beside a GPU, beside the CPU to
        a memory-mapped file in the system's temporary directory. The buffers shrink by them, and what the cameras may
        see of earlier ones comes back; ``buffer_version`` changes if anything moved.

        No result changes by a bit, whatever is where: a read or a write that depends on tokens offloaded brings them
        back itself, at the price of waiting then, and of copying what is on the device. Call this with the cameras of
        the next reads and writes, and they find what they need. (On latent grids coarser than 32 x 32 they may need a
        little more than it foresees.) ``points``, ``footprints``, ``features`` and ``frame_ids`` bring back everything;
        :meth:`save`, :meth:`to`, :meth:`checkpoint` and copies leave it where it is.

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
        _check_cameras(cameras_ahead, "cameras_ahead")
        with self._lock.exclusive():
            views = self._from_origin(cameras_ahead.resized(_OFFLOAD_GRID))
            self._move(find_far(self._buffers, views), self._touched(views))

    def onload(self) -> None:
        """Bring back all that :meth:`offload` moved to the host. If memory runs out, the cache is as it was."""
        with self._lock.exclusive():
            self._onload()

    def _onload(self) -> int:
        """Bring back everything; returns how many tokens there are."""
        if self._offloaded is not None:
            self._move(set(), set(range(len(self._offloaded.runs))))
        return self._buffers.count_live()

    def _num_offloaded(self) -> int:
        return self._offloaded.tokens if self._offloaded is not None else 0

    def _from_origin(self, cameras: Cameras) -> Cameras:
        """Return cameras as the buffers' positions count."""
        moved = self._buffers.from_origin(cameras.cam2world)
        return cameras if moved is cameras.cam2world else Cameras.trusted(cameras.intrinsics, moved, cameras.image_size)

    def _touched(self, *views: Cameras) -> set[int]:
        """Find the runs off the device that the views, whose image size is the grid, may see or may write to."""
        return set() if self._offloaded is None else find_touched(self._buffers, self._offloaded, views)

    def _onload_for_write(self, depth: Tensor, intrinsics: Tensor, cam2world: Tensor, size: tuple[int, int]) -> None:
        """Bring back what a write depends on; intrinsics in pixels of the depth map."""
        if self._offloaded is None:
            return
        most, tokens = self.max_tokens, depth.shape[0] * size[0] * size[1]
        by_edge = self._config.bounded and self._config.voxel_size is not None
        if by_edge or (most is not None and len(self) + tokens > most):
            self._onload()
        elif self._buffers.free_space_violations is not None:
            views = Cameras.trusted(intrinsics.double(), cam2world.double(), (depth.shape[1], depth.shape[2]))
            self._move(set(), self._touched(views.resized(size)))

    def _move(self, go: set[int], come: set[int]) -> None:
        """Move blocks of the buffers to the host, runs from there; the cache is as it was if anything raises."""
        self._offloaded = move(self._buffers, self._offloaded, go, come, self._config.capacity)

    def clear(self) -> None:
        """Forget every token and frame; buffers stay where they are, unless a part of a fixed capacity is offloaded."""
        with self._lock.exclusive():
            if self._config.capacity is not None:
                self._buffers.resize_empty(self._config.capacity)
            self._offloaded = None
            self._buffers.clear()
            self._buffers.settle(self._config.anchor)

    def checkpoint(self) -> CacheMark:
        """Mark the state, for :meth:`rollback`. Waits for the device; unless tokens are only appended, copies them."""
        with self._lock:
            tokens, buffers = len(self), self._buffers
            if not self._config.changes_in_place:
                return CacheMark(tokens, buffers.num_frames, None, buffers.anchor)
            copies = {name: tensor[: buffers.max_live].clone() for name, tensor in buffers.tensors().items()}
            return CacheMark(tokens, buffers.num_frames, (copies, self._offloaded), buffers.anchor)

    def rollback(self, mark: CacheMark) -> None:
        """Forget what was written since :meth:`checkpoint` gave `mark`.

        Buffers stay where they are, unless tokens were offloaded or brought back since. Tokens that were only appended
        stay where they are now, others are where they were.

        Raises:
            ValueError: `mark` is of another cache, or of before a :meth:`clear`.
        """
        tokens, frames, held, _ = mark
        with self._lock.exclusive():
            if not mark.fits(self._buffers, self._config, len(self)):
                raise ValueError(
                    f"mark must be of this cache, which holds {len(self)} tokens of {self.num_frames} frames,"
                    f" got one of {tokens} tokens of {frames} frames"
                )
            if held is None:
                self._onload_past(tokens)
            self._offloaded = mark.restore(self._buffers, self._config, self._offloaded)

    def _onload_past(self, tokens: int) -> None:
        """Bring back every run that has any but the first so many of all tokens."""
        if self._offloaded is not None:
            ends = (self._offloaded.before + self._offloaded.shift[1:]).tolist()
            self._move(set(), {k for k, end in enumerate(ends) if end > tokens})

    def to(self, device: torch.device | str) -> LatentCache:
        """Return the cache on another device: itself where it is there already, else a copy."""
        target = torch.empty(0, device=device).device  # "cuda" means the current one
        if target == self.device:
            return self
        copy = LatentCache(**self._config.__dict__, device=target)
        return copy._filled(self.tensors(target), self._buffers.anchor)

    def tensors(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """Return all tokens and frames on a device, by default the cache's own; views of the buffers where they can be.

        A row a token of ``points`` (N, 4), ``features``, ``frame_ids`` and, where the cache has them, ``scales``,
        ``free_space_violations`` and ``num_observations``; and ``frame_centers`` (F, 3). Positions count from
        :attr:`origin`.
        """
        device = device or self.device
        with self._lock:
            if self._offloaded is None:
                live = len(self)
                tensors = {name: tensor[:live].to(device) for name, tensor in self._buffers.tensors().items()}
            else:
                tensors = gather_all(self._buffers, self._offloaded, device)
            return {**tensors, "frame_centers": self._buffers.frame_centers[: self.num_frames].to(device)}

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], device: torch.device | str = "cpu", **arguments: Any
    ) -> LatentCache:
        """Make a cache that holds copies of tensors as :meth:`tensors` returns them, which are not checked.

        ``arguments`` are those of :class:`LatentCache`. Without an ``origin`` positions count from 0, and without
        ``near`` that of the operators holds, 0.05, if there is any token.
        """
        return cls(**arguments, device=device)._filled(tensors, None)

    def _filled(self, tensors: dict[str, Tensor], anchor: Anchor | None) -> LatentCache:
        """Return the cache itself, which holds nothing, with these tokens; None: with the anchor that it was given."""
        if anchor is None and len(tensors["points"]):
            near, origin = self._config.near, self._config.origin
            anchor = Anchor(UNSETTLED.near if near is None else near, origin or UNSETTLED.origin)
        self._buffers.settle(anchor or self._config.anchor)
        self._buffers.fill(tensors)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentCache:
        with self._lock:
            return self._rebuild(
                self.tensors(), self.device, self._config, self._buffers.anchor, deepcopy(self._others(), memo)
            )

    def __copy__(self) -> LatentCache:
        with self._lock:
            return self._rebuild(self.tensors(), self.device, self._config, self._buffers.anchor, self._others())

    def __reduce__(self) -> tuple[Any, ...]:
        # Bytes, not tensors: these would be shared with the other process, in memory of which there may be little, and
        # only while this one lives.
        with self._lock:
            content = save_tensors(self.tensors(torch.device("cpu")))
            return self._rebuild, (content, self.device, self._config, self._buffers.anchor, self._others())

    def _others(self) -> dict[str, Any]:
        """Return the attributes that a subclass or its user added."""
        return {name: value for name, value in self.__dict__.items() if name not in _OWN}

    @classmethod
    def _rebuild(
        cls,
        content: bytes | dict[str, Tensor],
        device: torch.device,
        config: CacheConfig,
        anchor: Anchor | None,
        others: dict[str, Any],
    ) -> LatentCache:
        """Make a copy of a cache."""
        tensors = load_tensors(content) if isinstance(content, bytes) else content
        cache = cls(**config.__dict__, device=device)._filled(tensors, anchor)
        cache.__dict__.update(others)
        return cache

    def save(self, path: str | Path) -> None:
        """Save as safetensors. Written beside ``path`` and renamed onto it: a crash leaves the old file."""
        with self._lock:
            save_cache(path, self.tensors(torch.device("cpu")), self.config, self._buffers.anchor)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> LatentCache:
        """Load a saved cache onto ``device``, with the config it was saved with.

        Raises:
            FileNotFoundError: no such file.
            PermissionError, OSError: it cannot be read.
            ValueError: truncated or damaged, not a cache, of an unknown version, or with missing or misshapen tensors.
        """
        saved = load_cache(path)
        try:
            return cls(**saved.config.__dict__, device=device)._filled(saved.tensors, saved.anchor)
        except (RuntimeError, MemoryError) as error:
            capacity = saved.config.capacity
            if capacity is None:
                raise
            raise ValueError(f"{path}: capacity must fit into memory, got {capacity} tokens ({error})") from error

    def __repr__(self) -> str:
        where = f"{self.nbytes / 2**20:.1f} MiB on {self.device}"
        if self._offloaded is not None:
            where += f", {self.nbytes_offloaded / 2**20:.1f} MiB of them offloaded"
        tokens = f"{len(self)} tokens of {self.channels} {self._config.dtype_name} channels"
        return f"LatentCache({tokens} from {self.num_frames} frames, {where}, write_policy={self.write_policy!r})"


def _check_cameras(cameras: object, name: str = "cameras") -> None:
    if not isinstance(cameras, Cameras):
        raise TypeError(f"{name} must be mirage_kernels.Cameras, got {type(cameras).__name__}")

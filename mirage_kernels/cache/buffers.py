"""The buffers of a cache: tokens in preallocated rows on one device, how they grow, and the counts beside them.

In: how many tokens and frames a write is about to add. Out: tensors with room for them, as operators take them. Rows
past the live count are unspecified. The live count is on the device, where reads and writes look at it; the host knows
an upper bound of it, so that it waits for the device only where the buffers may be full.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..geometry import bounds_rows
from ..ops.block_bounds import launch as launch_block_bounds
from ..ops.checks import plain
from ..quantization import FLOAT8
from .anchor import UNSETTLED, Anchor

GROWTH = 1.5
_FRAME_ROWS = 1024  # rows of the table of frames to begin with, 12 KB
_normal = torch.inference_mode(False)
"""Marks what makes tensors of a cache: those of inference mode could not be written outside it."""
_MAX_ROWS = 2**32 - 2  # kernels keep a row in 32 bits, of which one value stands for none


class TokenBuffers:
    """Hold the tokens of a cache, a row each, and the camera centres of the frames that wrote them.

    Args:
        channels: C of the features.
        dtype: of the features; float8_e4m3fn ones come with a scale a row.
        device: where the buffers live.
        rows: to begin with; where the buffers may not grow, these are all there are.
        bounded: whether bounded writes fill them, which count the free-space violations of each token.
        mean: whether these average observations, whose number they count then.
        may_grow: whether :meth:`reserve` makes room.

    Raises:
        ValueError: more rows than kernels can address.
    """

    points: Tensor
    """(rows, 4) float32: x, y, z, footprint in world units; x, y, z from the anchor's origin"""
    features: Tensor
    """(rows, C)"""
    frame_ids: Tensor
    """(rows,) int32, rows of `frame_centers`"""
    scales: Tensor | None
    """(rows,) uint8, of float8 features only"""
    free_space_violations: Tensor | None
    """(rows,) uint8: views that saw through each token, of bounded writes only"""
    num_observations: Tensor | None
    """(rows,) uint8: observations averaged in each token, where they are"""
    bounds: Tensor
    """(B + ceil(B / 64), 6) float32, see :func:`mirage_kernels.block_bounds`"""
    frame_centers: Tensor
    """(F, 3) float32 camera centres, from the anchor's origin too, of which the first `num_frames` are known"""

    @_normal
    def __init__(
        self,
        channels: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        rows: int,
        bounded: bool,
        mean: bool,
        may_grow: bool,
    ) -> None:
        self._layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "points": ((4,), torch.float32),
            "features": ((channels,), dtype),
            "frame_ids": ((), torch.int32),
        }
        if dtype == FLOAT8:
            self._layout["scales"] = ((), torch.uint8)
        if bounded:
            self._layout["free_space_violations"] = ((), torch.uint8)
            if mean:
                self._layout["num_observations"] = ((), torch.uint8)
        self._may_grow = may_grow
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        """One int64 on the device: the live tokens. It never moves."""
        self.device = self.count.device
        self.max_live = 0
        """Upper bound of the live tokens, which the host knows without asking the device."""
        self.num_frames = 0
        self.version = 0
        """Changes whenever a tensor moves, or the anchor that reads were made with."""
        self.anchor: Anchor | None = None
        """None until it is settled."""
        self._read_with: Anchor | None = None
        self._last = UNSETTLED
        self._origins: tuple[Tensor, ...] = ()
        self.token_nbytes = sum(kind.itemsize * math.prod(tail) for tail, kind in self._layout.values())
        self.adopt(self.allocate(rows))
        self.bounds = self.empty_bounds()
        self.frame_centers = torch.empty((_FRAME_ROWS, 3), dtype=torch.float32, device=self.device)

    @property
    def rows(self) -> int:
        """Tokens that the buffers have room for."""
        return self.points.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, the unused part included."""
        tensors = (*self.tensors().values(), self.bounds, self.frame_centers, self.count)
        return sum(tensor.nbytes for tensor in tensors)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that hold a row a token, by name, as they are."""
        return {name: getattr(self, name) for name in self._layout}

    @_normal
    def allocate(self, rows: int, device: torch.device | None = None) -> dict[str, Tensor]:
        """Make other tensors of so many rows, of unspecified content."""
        device = device or self.device
        return {
            name: torch.empty((rows, *tail), dtype=kind, device=device) for name, (tail, kind) in self._layout.items()
        }

    def adopt(self, tensors: dict[str, Tensor]) -> None:
        """Put these in the place of :meth:`tensors`; bounds and counts stay.

        Raises:
            ValueError: more rows than kernels can address; nothing has changed then.
        """
        if tensors["points"].shape[0] > _MAX_ROWS:
            raise ValueError(f"points must hold fewer than 2^32 - 1 tokens, got {tensors['points'].shape[0]}")
        self.points, self.features, self.frame_ids = (tensors[name] for name in ("points", "features", "frame_ids"))
        self.scales = tensors.get("scales")
        self.free_space_violations = tensors.get("free_space_violations")
        self.num_observations = tensors.get("num_observations")

    @_normal
    def empty_bounds(self) -> Tensor:
        """Make the bounds of buffers without a token."""
        bounds = torch.full((bounds_rows(self.rows), 6), torch.inf, device=self.device)
        bounds[:, 3:] = -torch.inf
        return bounds

    @_normal
    def settle(self, anchor: Anchor | None) -> None:
        """Take this anchor, by which tokens are placed, if there are any."""
        old, new = ((one or UNSETTLED).origin for one in (self.anchor, anchor))
        if old != new:
            if self.num_frames:  # views without a token
                centers = self.frame_centers[: self.num_frames]
                moved = centers.double() + torch.tensor(old, dtype=torch.float64, device=self.device)
                centers.copy_(moved - torch.tensor(new, dtype=torch.float64, device=self.device))
            host = torch.tensor(new, dtype=torch.float64, device="cpu")
            self._origins = (host, host.to(self.device))
        if anchor is not None and self._read_with not in (None, anchor):
            self.version += 1
        self.anchor, self._last = anchor, anchor or self._last

    def read_anchor(self) -> Anchor:
        """Return the anchor for a read, which may be captured: another changes `version`."""
        self._read_with = anchor = self.anchor or self._last
        return anchor

    def from_origin(self, cam2world: Tensor) -> Tensor:
        """Return poses (T, 4, 4) float64, on the host or the cache's device, as seen from the anchor's origin."""
        if self.anchor is None or not any(self.anchor.origin):
            return cam2world
        host, device = self._origins
        moved = cam2world.clone()
        moved[:, :3, 3] -= host if cam2world.device == host.device else device
        return moved

    def from_world(self, positions: Tensor) -> Tensor:
        """Return world positions (.., >= 3) float64 on the device as the buffers hold them, float32."""
        if self.anchor is not None and any(self.anchor.origin):
            positions = positions.clone()
            positions[..., :3] -= self._origins[1]
        return positions.float()

    def in_world(self, positions: Tensor) -> Tensor:
        """Return positions (N, 3) of the buffers in world coordinates: as they are, or float64 where they count from
        elsewhere.
        """
        if self.anchor is None or not any(self.anchor.origin):
            return positions
        return positions.double() + self._origins[1]

    def count_live(self) -> int:
        """Read the number of live tokens; waits for the device."""
        self.max_live = int(self.count)
        return self.max_live

    def set_live(self, live: int) -> None:
        """State that the first so many rows are live, and recompute their bounds, in place."""
        self.count.fill_(live)
        find_bounds(self.points, self.count, self.bounds)
        self.max_live = live

    @_normal
    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens, unless there may be no more. Waits only if the buffers may be full."""
        if not self._may_grow or self.max_live + tokens <= self.rows:
            return
        live = self.count_live()
        needed = live + tokens
        if needed <= self.rows:
            return
        grown = self.allocate(max(needed, int(self.rows * GROWTH)))
        for name, old in self.tensors().items():
            grown[name][:live] = old[:live]
        self.adopt(grown)
        self.bounds = find_bounds(self.points, self.count)
        self.version += 1

    @_normal
    def reserve_frames(self, views: int) -> None:
        """Make room for the camera centres of so many more frames."""
        needed, room = self.num_frames + views, self.frame_centers.shape[0]
        if needed > room:
            grown = self.frame_centers.new_empty((max(needed, 2 * room), 3))
            grown[: self.num_frames] = self.frame_centers[: self.num_frames]
            self.frame_centers = grown
            self.version += 1

    def resize_empty(self, rows: int) -> None:
        """Take tensors of so many rows, of unspecified content, where there are not so many already."""
        if rows != self.rows:
            self.adopt(self.allocate(rows))
            self.bounds = self.empty_bounds()
            self.version += 1

    def clear(self) -> None:
        """Forget every token and frame; all tensors stay where they are."""
        self.count.zero_()
        self.bounds.copy_(self.empty_bounds())
        self.max_live = 0
        self.num_frames = 0

    @_normal
    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copy live tokens and frames into buffers that hold none: those of :meth:`tensors` and ``frame_centers``."""
        live, frames = tensors["points"].shape[0], tensors["frame_centers"].shape[0]
        if live and self.anchor is None:
            self.settle(UNSETTLED)
        if self._may_grow:
            self.adopt(self.allocate(live))
        for name, buffer in self.tensors().items():
            buffer[:live] = tensors[name]
        self.frame_centers = tensors["frame_centers"].clone()
        self.count.fill_(live)
        self.bounds = find_bounds(self.points, self.count)
        self.max_live, self.num_frames = live, frames


@_normal
def find_bounds(points: Tensor, count: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Find the boxes of blocks of a cache's own tokens, see :func:`mirage_kernels.block_bounds`, without checks."""
    bounds = points.new_empty((bounds_rows(points.shape[0]), 6)) if out is None else out
    launch_block_bounds(points=plain(points), num_points=count, bounds=plain(bounds))
    return bounds

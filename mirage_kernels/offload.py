"""Runs of a cache's tokens in host memory, and the test of which of them a view may touch.

In: rows of the cache's buffers, as bytes, and the boxes they lie in. Out: the same bytes, and where among the rows that
stay on the device each run belongs. A run is 256 consecutive tokens or fewer and takes a slot of fixed size: of pinned
memory beside a GPU, of a memory-mapped file without a name beside the CPU.
"""

from __future__ import annotations

import mmap
import tempfile
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import BLOCK, make_projection

_SLAB = 64  # slots that pinned memory grows by
_SLACK, _TINY, _FAR = 1e-5, 1e-25, 1e15  # as in csrc/core/frustum.h, which says what they cover
_READ_MARGIN = 2.0  # cells around a grid from which an aligned read still blends, kHoleReach in csrc/core/fit.h
_VOXEL_REACH = 2.6  # footprints between tokens that share a voxel, at most


class HostStore:
    """Slots of `nbytes` each in host memory. One that was freed is used again; all go when the store does."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._slots = 0
        self._free: list[int] = []

    def put(self, parts: list[Tensor]) -> int:
        """Keep uint8 tensors (n,), `nbytes` at most in all, one after the other: the slot. If it raises, none."""
        if not self._free:
            self._grow()
        self._write(self._free[-1], parts)
        return self._free.pop()

    def get(self, slot: int) -> Tensor:
        """(nbytes,) uint8 in host memory, to be copied before the slot is free."""
        raise NotImplementedError

    def free(self, slot: int) -> None:
        self._free.append(slot)

    def _add_slots(self, number: int) -> None:
        self._free += reversed(range(self._slots, self._slots + number))
        self._slots += number

    def _grow(self) -> None:
        raise NotImplementedError

    def _write(self, slot: int, parts: list[Tensor]) -> None:
        raise NotImplementedError


class MemoryStore(HostStore):
    """In memory, pinned for a GPU: copies either way are queued on its current stream, in order, and nothing waits."""

    def __init__(self, nbytes: int, pinned: bool = True) -> None:
        super().__init__(nbytes)
        self._pinned = pinned
        self._slabs: list[Tensor] = []

    def get(self, slot: int) -> Tensor:
        return self._slabs[slot // _SLAB][slot % _SLAB]

    def _grow(self) -> None:
        self._slabs.append(torch.empty((_SLAB, self.nbytes), dtype=torch.uint8, pin_memory=self._pinned))
        self._add_slots(_SLAB)

    def _write(self, slot: int, parts: list[Tensor]) -> None:
        room = self.get(slot)
        for part in parts:
            room[: len(part)].copy_(part, non_blocking=True)
            room = room[len(part) :]


class FileStore(HostStore):
    """In a file of the system's temporary directory, which has no name and is gone with the store or the process.

    Written as a file, so that a full disk is an OSError and no fault; read through a map.
    """

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self._file = tempfile.TemporaryFile(prefix="mirage-offload-", buffering=0)  # noqa: SIM115  # it lives on
        self._map: mmap.mmap | None = None

    def get(self, slot: int) -> Tensor:
        end = self._slots * self.nbytes
        if self._map is None or len(self._map) < end:
            self._file.truncate(end)  # the last slot may be written in part
            self._map = mmap.mmap(self._file.fileno(), end)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=self.nbytes, offset=slot * self.nbytes)

    def _grow(self) -> None:
        self._add_slots(1)

    def _write(self, slot: int, parts: list[Tensor]) -> None:
        self._file.seek(slot * self.nbytes)
        for part in parts:
            rest = part.numpy().data
            while rest:
                rest = rest[self._file.write(rest) :]


def make_store(nbytes: int, device: torch.device) -> HostStore:
    return FileStore(nbytes) if device.type == "cpu" else MemoryStore(nbytes)


class Run:
    """Consecutive tokens in a slot, which never change. The slot is free when nothing refers to the run any more."""

    __slots__ = ("box", "slot", "store", "tokens")

    def __init__(self, store: HostStore, slot: int, tokens: int, box: Tensor) -> None:
        self.store, self.slot = store, slot
        self.tokens = tokens
        self.box = box
        """(6,) float32 on the host, in which they lie: least x, y, z, greatest x, y, z."""

    def __del__(self) -> None:
        self.store.free(self.slot)


class Offloaded(NamedTuple):
    """The K runs that are not on the device, in the order of their rows."""

    store: HostStore
    runs: list[Run]
    boxes: Tensor
    """(K, 6) float32 on the host"""
    before: Tensor
    """(K,) int64 on the device: how many of the rows there come before each."""
    shift: Tensor
    """(K + 1,) int64 on the device: how many tokens the first k runs hold."""

    @property
    def tokens(self) -> int:
        return sum(run.tokens for run in self.runs)

    def all_rows(self, index: Tensor) -> Tensor:
        """Rows on the device to rows among all tokens; -1 stays."""
        return torch.where(index < 0, index, index + self.shift[torch.searchsorted(self.before, index, right=True)])


def offloaded(store: HostStore, runs: list[Run], before: list[int], device: torch.device) -> Offloaded | None:
    """None where there is no run."""
    if not runs:
        return None
    shift = [0, *accumulate(run.tokens for run in runs)]
    boxes = torch.stack([run.box for run in runs])
    return Offloaded(store, runs, boxes, *(torch.tensor(rows, device=device) for rows in (before, shift)))


class Plan(NamedTuple):
    """What goes where when `rows` tokens will be on the device."""

    rows: int
    stays: list[tuple[int, int, int]]
    """start, stop; the new row of start"""
    comes: list[tuple[Run, int]]
    """a run; the new row of its first token"""
    goes: list[tuple[int, int]]
    """start, stop"""
    off: list[tuple[Run | None, int]]
    """off the device then: a run, or None for the next of `goes`; how many of the new rows come before it"""


def make_plan(live: int, before: list[int], runs: list[Run], go: set[int], come: set[int]) -> Plan:
    """For `live` rows on the device and the runs off it: the blocks `go` leave the device, the runs `come` return."""
    rows, k = 0, 0
    stays: list[tuple[int, int, int]] = []
    comes: list[tuple[Run, int]] = []
    goes: list[tuple[int, int]] = []
    off: list[tuple[Run | None, int]] = []
    cuts = sorted({0, live, *before, *(BLOCK * block + side for block in go for side in (0, BLOCK))})
    for start, stop in zip(cuts, [*cuts[1:], live], strict=True):
        while k < len(runs) and before[k] == start:
            if k in come:
                comes.append((runs[k], rows))
                rows += runs[k].tokens
            else:
                off.append((runs[k], rows))
            k += 1
        if stop > start and start // BLOCK in go:
            goes.append((start, stop))
            off.append((None, rows))
        elif stop > start:
            stays.append((start, stop, rows))
            rows += stop - start
    return Plan(rows, stays, comes, goes, off)


def may_touch(boxes: Tensor, intrinsics: Tensor, cam2world: Tensor, size: tuple[int, int]) -> Tensor:
    """Which boxes may hold a token that a read or a bounded write of the views depends on; never wrong towards "none".

    Args:
        boxes: (K, 6) float32 on the host: least x, y, z, greatest x, y, z.
        intrinsics, cam2world: (T, 3, 3) and (T, 4, 4) float, in cells of the grid, on any device; of a GPU's it waits.
        size: (h, w) of the grid.

    Returns:
        (K,) bool on the host.

    A read sees tokens of z > near that project at most 2 cells outside the grid. A write also counts those that share a
    voxel with a new token p, whose footprint f is z / fx. A voxel's edge is at most sqrt(2) f, so they lie within
    sqrt(6) f of p: within 2.6 f, rotations being orthonormal to 1e-2 and tokens, within 1e5 f of the origin, rounded by
    far less. With q = 2.6 / fx their depth is at least (1 - q) z, and their u is off that of p, which is in the grid,
    by at most (q |u - cx| + 2.6) / (1 - q); v likewise, with 2.6 fy / fx. From q = 1 on they may be anywhere.
    """
    boxes, intrinsics, cam2world = boxes.double(), intrinsics.double().cpu(), cam2world.double().cpu()
    height, width = size
    low, high = boxes[:, :3], boxes[:, 3:]
    reach = torch.maximum(low.abs(), high.abs())
    touched = ~(reach.sum(1) <= _FAR)  # NaN and empty boxes as well
    for k, m in zip(intrinsics, make_projection(intrinsics, cam2world, torch.float64), strict=True):
        fx, fy, cx, cy = (float(k[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
        q = _VOXEL_REACH / fx
        if not 0 < q < 1:
            return torch.ones_like(touched)
        du = max(_READ_MARGIN, (q * max(abs(cx), abs(width - cx)) + _VOXEL_REACH) / (1 - q))
        dv = max(_READ_MARGIN, (q * max(abs(cy), abs(height - cy)) + _VOXEL_REACH * fy / fx) / (1 - q))
        a, b, z = m
        # z > 0, u >= -du, u <= width + du, and v likewise, each multiplied by z; and the terms' magnitudes.
        planes = torch.stack([z, a + du * z, (width + du) * z - a, b + dv * z, (height + dv) * z - b])
        a, b, z = m.abs()
        shares = [(side + 1e-3) * z for side in (du, width + du, dv, height + dv)]
        terms = torch.stack([z, *(share + x for share, x in zip(shares, (a, a, b, b), strict=True))])
        farthest = high @ planes[:, :3].clamp(min=0).T + low @ planes[:, :3].clamp(max=0).T + planes[:, 3]
        slack = _SLACK * (reach @ terms[:, :3].T + terms[:, 3]) + _TINY
        touched |= ~(farthest + slack < 0).any(1) | ~(terms <= _FAR).all()
    return touched

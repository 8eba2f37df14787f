"""Runs of a cache's tokens in host memory, and the test of which of them a view may touch.

In: rows of the cache's buffers, as bytes, and the boxes they lie in. Out: the same bytes, and where among the rows that
stay on the device each run belongs. A run is 256 consecutive tokens or fewer and takes a slot of fixed size: pinned
memory beside a GPU, a nameless memory-mapped file beside the CPU, which is gone with the process that made it.
"""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import BLOCK, make_projection

_SLAB = 64  # slots that pinned memory grows by
_SLACK, _TINY, _FAR = 1e-5, 1e-25, 1e15  # as in csrc/core/frustum.h, which says what they cover
_READ_MARGIN = 2.0  # cells around a grid from which an aligned read still blends
_VOXEL_REACH = 2.6  # footprints between tokens that share a voxel, at most


class HostStore:
    """Slots of `nbytes` each in host memory. A slot that was freed is used again; all go when the store does."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._free: list[int] = []
        self._slots = 0

    def put(self, parts: list[Tensor]) -> int:
        """Keep uint8 tensors (n,), one after the other, at most `nbytes` of them: the slot. Nothing is kept if it raises."""
        if not self._free:
            self._grow()
        self._copy_in(self._free[-1], parts)
        return self._free.pop()

    def get(self, slot: int) -> Tensor:
        """(nbytes,) uint8 in host memory, to be copied before anything else is put."""
        raise NotImplementedError

    def free(self, slots: list[int]) -> None:
        self._free += slots

    def _add_slots(self, number: int) -> None:
        self._free += reversed(range(self._slots, self._slots + number))
        self._slots += number

    def _grow(self) -> None:
        raise NotImplementedError

    def _copy_in(self, slot: int, parts: list[Tensor]) -> None:
        raise NotImplementedError


class MemoryStore(HostStore):
    """In memory, pinned for a GPU: copies either way are queued on its current stream, and nothing waits."""

    def __init__(self, nbytes: int, pinned: bool) -> None:
        super().__init__(nbytes)
        self._pinned, self._slabs = pinned, list[Tensor]()

    def get(self, slot: int) -> Tensor:
        return self._slabs[slot // _SLAB][slot % _SLAB]

    def _grow(self) -> None:
        self._slabs.append(torch.empty((_SLAB, self.nbytes), dtype=torch.uint8, pin_memory=self._pinned))
        self._add_slots(_SLAB)

    def _copy_in(self, slot: int, parts: list[Tensor]) -> None:
        room = self.get(slot)
        for part in parts:
            room[: len(part)].copy_(part, non_blocking=True)
            room = room[len(part) :]


class FileStore(HostStore):
    """In a file of `directory` (default: the system's temporary one). Written as a file, so that a full disk is an
    OSError and not a fault; read through a map."""

    def __init__(self, nbytes: int, directory: str | Path | None) -> None:
        super().__init__(nbytes)
        self._file = tempfile.TemporaryFile(prefix="mirage-offload-", dir=directory, buffering=0)
        self._map: mmap.mmap | None = None

    def get(self, slot: int) -> Tensor:
        end = self._slots * self.nbytes
        if self._map is None or len(self._map) < end:
            self._file.truncate(end)  # the last slot may be written in part
            self._map = mmap.mmap(self._file.fileno(), end)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=self.nbytes, offset=slot * self.nbytes)

    def _grow(self) -> None:
        self._add_slots(1)

    def _copy_in(self, slot: int, parts: list[Tensor]) -> None:
        self._file.seek(slot * self.nbytes)
        for part in parts:
            rest = memoryview(part.numpy())
            while rest:
                rest = rest[self._file.write(rest) :]


def make_store(nbytes: int, device: torch.device, directory: str | Path | None) -> HostStore:
    return MemoryStore(nbytes, pinned=True) if device.type == "cuda" else FileStore(nbytes, directory)


class Offloaded(NamedTuple):
    """K runs that are not on the device, in the order of their rows."""

    store: HostStore
    slots: list[int]
    sizes: list[int]  # tokens of each
    boxes: Tensor  # (K, 6) float32 on the host, in which each lies
    before: Tensor  # (K,) int64 on the device: the rows there that come before each
    shift: Tensor  # (K + 1,) int64 on the device: the tokens of the first k runs

    @property
    def tokens(self) -> int:
        return sum(self.sizes)

    def all_rows(self, index: Tensor) -> Tensor:
        """Rows on the device to rows among all tokens; -1 stays."""
        rows = index + self.shift[torch.searchsorted(self.before, index, right=True)]
        return torch.where(index < 0, index, rows)


class Plan(NamedTuple):
    """What goes where when `rows` tokens will be on the device."""

    rows: int
    stays: list[tuple[int, int, int]]  # start, stop; the new row of start
    comes: list[tuple[int, int]]  # run; the new row of its first token
    goes: list[tuple[int, int]]  # start, stop
    runs: list[tuple[int, int]]  # off the device then: run, or -1 for the next of `goes`; the new rows before it


def make_plan(live: int, before: list[int], sizes: list[int], go: set[int], come: set[int]) -> Plan:
    """For `live` rows on the device and the runs off it: the blocks `go` leave it, the runs `come` return."""
    cuts = sorted({0, live, *before, *(BLOCK * block + side for block in go for side in (0, BLOCK))})
    rows, run = 0, 0
    stays, comes, goes, runs = list[tuple[int, int, int]](), *(list[tuple[int, int]]() for _ in range(3))
    for start, stop in zip(cuts, [*cuts[1:], live], strict=True):
        while run < len(before) and before[run] == start:
            if run in come:
                comes.append((run, rows))
                rows += sizes[run]
            else:
                runs.append((run, rows))
            run += 1
        if stop > start and start // BLOCK in go:
            goes.append((start, stop))
            runs.append((-1, rows))
        elif stop > start:
            stays.append((start, stop, rows))
            rows += stop - start
    return Plan(rows, stays, comes, goes, runs)


def may_touch(boxes: Tensor, intrinsics: Tensor, cam2world: Tensor, size: tuple[int, int]) -> Tensor:
    """Which boxes may hold a token that a read or a bounded write of the views depends on; never wrong towards "none".

    Args:
        boxes: (K, 6) float32 on the host: least x, y, z, greatest x, y, z.
        intrinsics, cam2world: (T, 3, 3) and (T, 4, 4) float64, in cells of the grid, on any device.
        size: (h, w) of the grid.

    Returns:
        (K,) bool on the host.

    A read sees tokens of z > near that project at most 2 cells outside the grid. A write also counts those that share a
    voxel with a new token p, whose footprint f is z / fx. A voxel's edge is at most sqrt(2) f, so they lie within
    sqrt(6) f of p: within 2.6 f, rotations being orthonormal to 1e-2 and tokens, within 1e5 f of the origin, rounded by
    far less. With q = 2.6 / fx their depth is at least (1 - q) z, and their u is off that of p, which is in the grid, by
    at most (q |u - cx| + 2.6) / (1 - q); v likewise, with 2.6 fy / fx. From q = 1 on they may be anywhere.
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

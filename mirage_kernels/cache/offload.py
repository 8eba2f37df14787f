"""Runs of a cache's tokens in host memory: which of them a view may touch, and moving them there and back.

In: rows of the cache's buffers, as bytes, and the boxes they lie in. Out: the same bytes, and where among the rows that
stay on the device each run belongs. A run is 256 consecutive tokens or fewer and takes a slot of fixed size: of pinned
memory beside a GPU, of a memory-mapped file without a name beside the CPU.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from ..cameras import Cameras
from ..constants import BLOCK_TOKENS, CULL_FAR, CULL_SLACK, CULL_TINY, HOLE_REACH_CELLS
from ..geometry import make_projection
from .buffers import GROWTH, TokenBuffers, find_bounds

_SLAB = 64  # slots that pinned memory grows by
_VOXEL_REACH = 2.6  # footprints between tokens that share a voxel, at most


class HostStore:
    """Hold slots of `nbytes` each in host memory. One that was freed is used again; all go when the store does."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.shared = False
        """Whether two processes may read it, one a fork of the other: then neither puts anything there any more."""
        self._slots = 0
        self._free: list[int] = []

    def put(self, parts: list[Tensor]) -> int:
        """Keep uint8 tensors (n,), `nbytes` at most in all, one after the other, in the slot returned."""
        if not self._free:
            self._grow()
        slot = self._free.pop()  # at once: another may become free while this one is written
        try:
            self._write(slot, parts)
        except BaseException:
            self.free(slot)
            raise
        return slot

    def get(self, slot: int) -> Tensor:
        """Return (nbytes,) uint8 in host memory, to be copied before the slot is free."""
        raise NotImplementedError

    def free(self, slot: int) -> None:
        """Let the slot be used again."""
        self._free.append(slot)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a mark of a cache whose tokens are offloaded cannot be copied or sent: call onload() before it"
        )

    def _add_slots(self, number: int) -> None:
        self._free += reversed(range(self._slots, self._slots + number))
        self._slots += number

    def _grow(self) -> None:
        raise NotImplementedError

    def _write(self, slot: int, parts: list[Tensor]) -> None:
        raise NotImplementedError


class MemoryStore(HostStore):
    """Hold slots in memory, pinned for a GPU: copies are queued on its current stream, in order, and nothing waits."""

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
    """Hold slots in a file of the system's temporary directory, without a name: it goes with the store or the process.

    Written as a file, so that a full disk is an OSError and no fault; read through a map.
    """

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self._file = tempfile.TemporaryFile(prefix="mirage-offload-", buffering=0)  # noqa: SIM115  # it lives on
        self._map: mmap.mmap | None = None
        _file_stores.add(self)

    def get(self, slot: int) -> Tensor:
        end, held = self._slots * self.nbytes, self._map
        if held is None or len(held) < end:
            self._file.truncate(end)  # the last slot may be written in part
            held = self._map = mmap.mmap(self._file.fileno(), end)
        return torch.frombuffer(held, dtype=torch.uint8, count=self.nbytes, offset=slot * self.nbytes)

    def _grow(self) -> None:
        self._add_slots(1)

    def _write(self, slot: int, parts: list[Tensor]) -> None:
        self._file.seek(slot * self.nbytes)
        for part in parts:
            rest = part.numpy().data
            while rest:
                rest = rest[self._file.write(rest) :]


_file_stores: WeakSet[FileStore] = WeakSet()


def _share_file_stores() -> None:
    for store in list(_file_stores):
        store.shared = True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_parent=_share_file_stores, after_in_child=_share_file_stores)


def make_store(nbytes: int, device: torch.device) -> HostStore:
    """Make the store for slots of `nbytes` of a cache on the device."""
    return FileStore(nbytes) if device.type == "cpu" else MemoryStore(nbytes)


class Run:
    """Hold consecutive tokens in a slot, which never change. It is free when nothing refers to the run any more."""

    __slots__ = ("box", "slot", "store", "tokens")

    def __init__(self, store: HostStore, slot: int, tokens: int, box: Tensor) -> None:
        self.store, self.slot = store, slot
        self.tokens = tokens
        self.box = box
        """(6,) float32 on the host, in which they lie: least x, y, z, greatest x, y, z."""

    def __del__(self) -> None:
        self.store.free(self.slot)


class Offloaded(NamedTuple):
    """Hold the K runs that are not on the device, in the order of their rows."""

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
        """How many tokens are not on the device."""
        return sum(run.tokens for run in self.runs)

    @property
    def nbytes_on_device(self) -> int:
        """Bytes of the tensors on the device."""
        return self.before.nbytes + self.shift.nbytes

    def all_rows(self, index: Tensor) -> Tensor:
        """Turn rows on the device into rows among all tokens; -1 stays."""
        return torch.where(index < 0, index, index + self.shift[torch.searchsorted(self.before, index, right=True)])


def _describe(store: HostStore, runs: list[Run], before: list[int], device: torch.device) -> Offloaded | None:
    """Describe the runs off the device; None where there is none."""
    if not runs:
        return None
    shift = [0, *accumulate(run.tokens for run in runs)]
    boxes = torch.stack([run.box for run in runs])
    return Offloaded(store, runs, boxes, *(torch.tensor(rows, device=device) for rows in (before, shift)))


class Plan(NamedTuple):
    """Say what goes where when `rows` tokens will be on the device."""

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
    """Plan for `live` rows on the device and runs off it: the blocks `go` leave the device, the runs `come` return."""
    rows, k = 0, 0
    stays: list[tuple[int, int, int]] = []
    comes: list[tuple[Run, int]] = []
    goes: list[tuple[int, int]] = []
    off: list[tuple[Run | None, int]] = []
    cuts = sorted({0, live, *before, *(BLOCK_TOKENS * block + side for block in go for side in (0, BLOCK_TOKENS))})
    for start, stop in zip(cuts, [*cuts[1:], live], strict=True):
        while k < len(runs) and before[k] == start:
            if k in come:
                comes.append((runs[k], rows))
                rows += runs[k].tokens
            else:
                off.append((runs[k], rows))
            k += 1
        if stop > start and start // BLOCK_TOKENS in go:
            goes.append((start, stop))
            off.append((None, rows))
        elif stop > start:
            stays.append((start, stop, rows))
            rows += stop - start
    return Plan(rows, stays, comes, goes, off)


def may_touch(boxes: Tensor, intrinsics: Tensor, cam2world: Tensor, size: tuple[int, int]) -> Tensor:
    """Find the boxes that may hold a token that a read or a bounded write of the views depends on, and miss none.

    Args:
        boxes: (K, 6) float32 on the host: least x, y, z, greatest x, y, z.
        intrinsics, cam2world: (T, 3, 3) and (T, 4, 4) float, in cells of the grid, on any device; of a GPU's it waits.
        size: (h, w) of the grid.

    Returns:
        (K,) bool on the host.

    A read blends tokens of z > near that project at most HOLE_REACH_CELLS outside the grid. A write also counts those
    that share a voxel with a new token p, whose footprint f is z / fx. A voxel's edge is at most sqrt(2) f, so they lie
    within sqrt(6) f of p: within 2.6 f, rotations being orthonormal to 1e-2 and tokens, within 1e5 f of the origin,
    rounded by far less. With q = 2.6 / fx their depth is at least (1 - q) z, and their u is off that of p, which is in
    the grid, by at most (q |u - cx| + 2.6) / (1 - q); v likewise, with 2.6 fy / fx. From q = 1 on they may be anywhere.
    """
    boxes, intrinsics, cam2world = boxes.double(), intrinsics.double().cpu(), cam2world.double().cpu()
    height, width = size
    low, high = boxes[:, :3], boxes[:, 3:]
    reach = torch.maximum(low.abs(), high.abs())
    touched = ~(reach.sum(1) <= CULL_FAR)  # NaN and empty boxes as well
    for k, m in zip(intrinsics, make_projection(intrinsics, cam2world, torch.float64), strict=True):
        fx, fy, cx, cy = (float(k[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
        q = _VOXEL_REACH / fx
        if not 0 < q < 1:
            return torch.ones_like(touched)
        du = max(HOLE_REACH_CELLS, (q * max(abs(cx), abs(width - cx)) + _VOXEL_REACH) / (1 - q))
        dv = max(HOLE_REACH_CELLS, (q * max(abs(cy), abs(height - cy)) + _VOXEL_REACH * fy / fx) / (1 - q))
        a, b, z = m
        # z > 0, u >= -du, u <= width + du, and v likewise, each multiplied by z; and the terms' magnitudes.
        planes = torch.stack([z, a + du * z, (width + du) * z - a, b + dv * z, (height + dv) * z - b])
        a, b, z = m.abs()
        sides = [(side + 1e-3) * z for side in (du, width + du, dv, height + dv)]
        terms = torch.stack([z, *(side + x for side, x in zip(sides, (a, a, b, b), strict=True))])
        farthest = high @ planes[:, :3].clamp(min=0).T + low @ planes[:, :3].clamp(max=0).T + planes[:, 3]
        slack = CULL_SLACK * (reach @ terms[:, :3].T + terms[:, 3]) + CULL_TINY
        touched |= ~(farthest + slack < 0).any(1) | ~(terms <= CULL_FAR).all()
    return touched


def find_far(buffers: TokenBuffers, views: Cameras) -> set[int]:
    """Find the whole blocks of the buffers that no view, whose image size is the grid, may touch; waits."""
    blocks = buffers.count_live() // BLOCK_TOKENS
    boxes = buffers.bounds[:blocks].cpu()
    far = ~may_touch(boxes, views.intrinsics, views.cam2world, views.image_size)
    if buffers.free_space_violations is not None:
        # Only tokens that have the voxel they lie in to themselves: the border's hold all that is beyond.
        tokens = buffers.points[: blocks * BLOCK_TOKENS].view(blocks, BLOCK_TOKENS, 4)
        footprint, farthest = tokens[..., 3], tokens[..., :3].abs().amax(2)
        far &= ((footprint > 1e-15) & (footprint < 1e15) & (farthest < 1e5 * footprint)).all(1).cpu()
    return set(far.nonzero()[:, 0].tolist())


def find_touched(buffers: TokenBuffers, held: Offloaded, views: tuple[Cameras, ...]) -> set[int]:
    """Find the runs off the device that views, whose image size is the grid, may see or may write to.

    Raises:
        RuntimeError: a CUDA graph is captured, which could not wait for them.
    """
    if buffers.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the cache must have all tokens on the device while a CUDA graph is captured, got {held.tokens}"
            " offloaded: call onload() first"
        )
    touched = [may_touch(held.boxes, one.intrinsics, one.cam2world, one.image_size) for one in views]
    return set(torch.stack(touched).any(0).nonzero()[:, 0].tolist())


def move(
    buffers: TokenBuffers, held: Offloaded | None, go: set[int], come: set[int], capacity: int | None
) -> Offloaded | None:
    """Move blocks of the buffers to the host, and runs from there; if anything raises, nothing has changed.

    Args:
        buffers: of the cache, given new tensors and a new version if anything moves.
        held: what is off the device now.
        go: blocks of the buffers, by number, that leave the device.
        come: runs of `held`, by number, that return.
        capacity: fixed number of tokens of the cache, or None.

    Returns:
        What is off the device then.
    """
    if not go and not come:
        return held
    runs, before = (list[Run](), list[int]()) if held is None else (held.runs, held.before.tolist())
    if held is None or held.store.shared:
        store = make_store(BLOCK_TOKENS * buffers.token_nbytes, buffers.device)
    else:
        store = held.store
    plan = make_plan(buffers.count_live(), before, runs, go, come)
    boxes, tensors = buffers.bounds.cpu(), _by_alignment(buffers.tensors())
    gone = []
    for start, stop in plan.goes:
        slot = store.put([tensor[start:stop].reshape(-1).view(torch.uint8) for tensor in tensors.values()])
        gone.append(Run(store, slot, stop - start, boxes[start // BLOCK_TOKENS]))
    # A fixed capacity holds in all; buffers that grow get no more room to grow than growing gives.
    rows = buffers.rows - sum(run.tokens for run in gone) + sum(run.tokens for run, _ in plan.comes)
    if capacity is None:
        rows = min(rows, int(plan.rows * GROWTH))
    moved = gather(buffers, plan, rows, buffers.device)
    count = torch.full_like(buffers.count, plan.rows)
    bounds = find_bounds(moved["points"], count)
    goes = iter(gone)
    off = [run or next(goes) for run, _ in plan.off]
    left = _describe(store, off, [rows for _, rows in plan.off], buffers.device)
    buffers.adopt(moved)
    buffers.count.copy_(count)
    buffers.bounds, buffers.max_live = bounds, plan.rows
    buffers.version += 1
    return left


def gather(buffers: TokenBuffers, plan: Plan, rows: int, device: torch.device) -> dict[str, Tensor]:
    """Make tensors of so many rows on a device, and copy to them the tokens that the plan has on the cache's."""
    gathered = buffers.allocate(rows, device)
    for name, tensor in buffers.tensors().items():
        for start, stop, row in plan.stays:
            gathered[name][row : row + stop - start] = tensor[start:stop]
    if plan.comes and device != buffers.device and buffers.device.type == "cuda":
        torch.cuda.synchronize(buffers.device)  # what is on its way to the host is there then
    for run, row in plan.comes:
        for name, part in rows_of(run, buffers).items():
            gathered[name][row : row + run.tokens].copy_(part, non_blocking=True)
    return gathered


def gather_all(buffers: TokenBuffers, held: Offloaded, device: torch.device) -> dict[str, Tensor]:
    """Copy all live tokens to a device, those off the cache's included; nothing of the cache moves."""
    come = set(range(len(held.runs)))
    plan = make_plan(buffers.count_live(), held.before.tolist(), held.runs, set(), come)
    return gather(buffers, plan, plan.rows, device)


def rows_of(run: Run, buffers: TokenBuffers) -> dict[str, Tensor]:
    """Return a run's rows of each tensor, on the host, to be copied while the run is referred to."""
    parts, rest = {}, run.store.get(run.slot)
    for name, tensor in _by_alignment(buffers.tensors()).items():
        nbytes = run.tokens * tensor.element_size() * math.prod(tensor.shape[1:])
        parts[name] = rest[:nbytes].view(tensor.dtype).view(run.tokens, *tensor.shape[1:])
        rest = rest[nbytes:]
    return parts


def _by_alignment(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put wide elements first: rows of any number, one tensor after the other, are then aligned."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))

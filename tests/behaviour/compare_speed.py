"""Compare the speed of two checkouts: ``python tests/behaviour/compare_speed.py OLD NEW [--rounds 15]``.

Both are built working trees. Each runs in a process of its own that lives throughout; rounds alternate, old, new, old,
new, so that what else the machine does falls on both. Printed are the medians in milliseconds and their ratio, and for
the aligned read of 9 views of 1,000 tokens the thread's CPU time of the Python around the operator: that of a read less
that within the private operator.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

VIEWS, GRID, CHANNELS = 9, (44, 80), 48
TOKENS = (1_000, 31_680, 285_120)
CALLS = {1_000: 20, 31_680: 4, 285_120: 1}  # of a block, which is one measurement
AROUND, AROUND_CALLS = "python around an aligned read of 1,000, us", 100


# In each of the two processes.


class Bench:
    """The benchmarks of one checkout, by old names or new ones."""

    def __init__(self) -> None:
        import torch

        import mirage_kernels

        self.torch, self.kernels = torch, mirage_kernels
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self.cameras = self._cameras(VIEWS, GRID)
        self.written = self._cameras(8, (176, 320))
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(8, CHANNELS, *GRID, generator=generator)
        self.depth = 3 + 0.2 * torch.rand(8, 176, 320, generator=generator)
        self.caches = {count: self._cache(count, generator) for count in TOKENS}

    def _cameras(self, views: int, size: tuple[int, int]) -> Any:
        torch = self.torch
        height, width = size
        matrix = torch.tensor([[0.6 * width, 0, 0.5 * width], [0, 0.6 * width, 0.5 * height], [0, 0, 1]]).double()
        poses = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
        poses[:, 0, 3] = 0.05 * torch.arange(views)
        return self.kernels.Cameras(matrix, poses, size)

    def _cache(self, count: int, generator: Any) -> Any:
        """A cache of so many tokens, all in view: one of what is written, repeated, and cut off."""
        torch = self.torch
        cache = self.kernels.LatentCache(CHANNELS, write_policy="append", capacity=count)
        while len(cache) < count:
            latents = torch.randn(8, CHANNELS, *GRID, generator=generator)
            cache.write(latents, self.depth + 0.1 * len(cache) / count, self.written)
        return cache

    def _read(self, count: int, kind: str) -> Any:
        """A function that reads; the argument that says how has had two names."""
        cache, cameras = self.caches[count], self.cameras
        for name in ("splat", "readout"):
            try:
                cache.read(cameras, GRID, **{name: kind})
            except TypeError:
                continue
            return lambda: cache.read(cameras, GRID, **{name: kind})
        raise TypeError("LatentCache.read takes neither splat nor readout")

    def _write(self, policy: str) -> Any:
        cache = self.kernels.LatentCache(CHANNELS, write_policy=policy, capacity=8 * GRID[0] * GRID[1])

        def write() -> None:
            cache.clear()
            cache.write(self.latents, self.depth, self.written)

        return write

    def _overlap(self, count: int) -> Any:
        overlap, cameras, points = self.kernels.view_overlap, self.cameras, self.caches[count].points
        points = self.torch.nn.functional.pad(points, (0, 1)).contiguous()
        matrix, poses = cameras.intrinsics, cameras.cam2world
        return lambda: overlap(points, matrix, poses, matrix[:1], poses[:1], GRID)

    def blocks(self) -> dict[str, Any]:
        """What is measured: a function and how often it is called in a block."""
        made = {}
        for count in TOKENS:
            for kind in ("nearest", "aligned"):
                made[f"{kind} read of {count:,}"] = self._read(count, kind), CALLS[count]
        for policy in ("append", "bounded"):
            made[f"{policy} write of 8 frames"] = self._write(policy), 2
        for count in TOKENS[:2]:
            made[f"view_overlap of {count:,}"] = self._overlap(count), CALLS[count]
        return made


class Own:
    """The thread's CPU time within the aligned read's private operator, in microseconds, while this is installed."""

    def __init__(self) -> None:
        import torch

        self.spent, self._inside = 0.0, False
        for cls in (torch._ops.OpOverload, torch._ops.OpOverloadPacket):
            setattr(cls, "__call__", self._timed(cls.__call__))  # noqa: B010  # mypy takes no assignment to a method

    def _timed(self, call: Any) -> Any:
        def timed(operator: Any, /, *args: Any, **kwargs: Any) -> Any:
            if self._inside or "splat_aligned" not in str(operator):
                return call(operator, *args, **kwargs)
            self._inside, began = True, time.thread_time_ns()
            try:
                return call(operator, *args, **kwargs)
            finally:
                self.spent += (time.thread_time_ns() - began) / 1e3
                self._inside = False

        return timed

    def around(self, read: Any) -> float:
        """What one read takes around the operator, without the freeing of what it returns."""
        self.spent, began = 0.0, time.thread_time_ns()
        view = read()
        total = (time.thread_time_ns() - began) / 1e3
        if not self.spent:
            raise RuntimeError("the aligned read calls no operator of torch.ops whose name holds splat_aligned")
        del view
        return total - self.spent


def serve() -> None:
    """A line of standard input names what to measure, a line of standard output says how long it took."""
    bench = Bench()
    blocks = bench.blocks()
    read, own = bench._read(1_000, "aligned"), None
    for function, _ in blocks.values():
        function()
    print(json.dumps(list(blocks)), flush=True)
    for line in sys.stdin:
        name = line.rstrip("\n")
        if name == AROUND:
            own = own or Own()  # the last measurement: from now on every operator is called through a wrapper
            print(json.dumps([own.around(read) for _ in range(AROUND_CALLS)]), flush=True)
            continue
        function, calls = blocks[name]
        began = time.perf_counter()
        for _ in range(calls):
            function()
        print(json.dumps((time.perf_counter() - began) / calls), flush=True)


# In the process that compares.


class Side:
    """One checkout's process."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(folder)}
        environment.setdefault("OMP_NUM_THREADS", "1")
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment,
        )
        self.names: list[str] = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the benchmarks of {self.process.args} ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, name: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(old: Path, new: Path, rounds: int, around: int) -> None:
    sides = [Side(old), Side(new)]
    print(f"{'':44}{'old':>10}{'new':>10}{'new/old':>9}")
    try:
        for name in sides[0].names:
            taken: list[list[float]] = [[], []]
            for _ in range(rounds):
                for side, seconds in zip(sides, taken, strict=True):
                    seconds.append(side.ask(name) * 1e3)
            _print(f"{name}, ms", *map(statistics.median, taken))
        spent: list[list[float]] = [[], []]
        for _ in range(max(around // AROUND_CALLS, 1)):
            for side, microseconds in zip(sides, spent, strict=True):
                microseconds += side.ask(AROUND)
        _print(AROUND, *map(statistics.median, spent))
    finally:
        for side in sides:
            side.close()


def _print(name: str, old: float, new: float) -> None:
    print(f"{name:44}{old:10.3f}{new:10.3f}{new / old:9.3f}", flush=True)


def main() -> None:
    if sys.argv[1:] == ["--serve"]:
        return serve()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", type=Path, help="a built checkout")
    parser.add_argument("new", type=Path, help="another")
    parser.add_argument("--rounds", type=int, default=15, help="of each benchmark")
    parser.add_argument("--around", type=int, default=2000, help="calls of which the CPU time around is the median")
    options = parser.parse_args()
    compare(options.old.resolve(), options.new.resolve(), options.rounds, options.around)


if __name__ == "__main__":
    main()

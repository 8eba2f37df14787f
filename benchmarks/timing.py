"""Measure bandwidth, times on CPU and GPU, and the most memory that a call takes.

On a GPU an eager time runs from an idle device to the end of the last kernel, with what the host needs for launching in
it; a CUDA graph's time is the device's alone (the device sleeps while the host enqueues). Warm: the same call has
just run. Cold: a buffer twice the size of the second-level cache has just been overwritten.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

_CPU_FLUSH_BYTES = 128 << 20  # past any last-level cache of one socket's share
_SLEEP_CYCLES = 1_000_000


class Times(NamedTuple):
    """Hold seconds: the median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def summarise(seconds: list[float]) -> Times:
    p20, median, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    ).tolist()  # fmt: skip
    return Times(median, p20, p80)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes a second of a large copy, read and written bytes both counted; the median of a dozen."""
    source = torch.randn(64 << 20 if device.type == "cuda" else 16 << 20, device=device)
    target = torch.empty_like(source)
    if device.type == "cuda":
        seconds = time_cuda(lambda: target.copy_(source), 12, graph=False, cold=True)
    else:
        seconds = time_cpu(lambda: target.copy_(source), 12)
    return 2 * source.nbytes / summarise(seconds).median


def time_cpu(
    function: Callable[[], Any], rounds: int, *, warmup: int = 1, setup: Callable[[], Any] | None = None
) -> list[float]:
    """Measure the seconds of each round."""
    seconds = []
    for k in range(warmup + rounds):
        if setup is not None:
            setup()
        start = time.perf_counter()
        function()
        if k >= warmup:
            seconds.append(time.perf_counter() - start)
    return seconds


_best_probe = float("inf")
_probe = torch.zeros(1 << 18)


def wait_for_quiet(limit_s: float = 10.0) -> bool:
    """Wait until all threads of this process get their cores at once, at most ``limit_s``; return
    whether they did.

    On a machine that others use too, a call of microseconds on two threads may otherwise take two time slices. Probes
    with a small multi-threaded operation, against the best that this process has seen.
    """
    global _best_probe
    start = time.perf_counter()
    first = _best_probe == float("inf")
    while True:
        seconds = summarise(time_cpu(lambda: _probe.add_(1), 40, warmup=5))
        _best_probe = min(_best_probe, seconds.p20)
        waited = time.perf_counter() - start
        if waited > limit_s:
            return seconds.p80 < 4 * _best_probe
        if first and waited < limit_s / 3:  # what quiet looks like is not known yet
            continue
        if seconds.p80 < 4 * _best_probe:
            return True
        time.sleep(0.2)


def time_once(function: Callable[[], Any], device: torch.device) -> float:
    """Measure the seconds of one call that cannot be repeated, by the host's clock."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def time_cuda(
    function: Callable[[], Any],
    rounds: int,
    *,
    graph: bool,
    cold: bool,
    warmup: int = 3,
    setup: Callable[[], Any] | None = None,
) -> list[float]:
    """Measure the seconds of each round by device events, see the module; ``setup`` runs before each, untimed."""
    prepare = setup or (lambda: None)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            prepare()
            function()
    torch.cuda.current_stream().wait_stream(side)
    call = function
    if graph:
        captured = torch.cuda.CUDAGraph()
        prepare()
        with torch.cuda.graph(captured):
            kept = function()  # its memory belongs to the graph, which must outlive it
        call = captured.replay
    flush = _twice_the_l2_cache()
    seconds = []
    for _ in range(rounds):
        if cold:
            prepare()
            flush.zero_()
        else:
            prepare()
            call()
            prepare()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if graph:
            torch.cuda._sleep(_SLEEP_CYCLES)
        start.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) * 1e-3)
    if graph:
        del kept
    return seconds


def _twice_the_l2_cache() -> torch.Tensor:
    return torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")


def flush_cpu_caches() -> None:
    """Push everything else out of the processor's caches."""
    _flush_buffer().add_(1)


_buffer: torch.Tensor | None = None


def _flush_buffer() -> torch.Tensor:
    global _buffer
    if _buffer is None:
        _buffer = torch.zeros(_CPU_FLUSH_BYTES // 8, dtype=torch.int64)
    return _buffer


def _process_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """Measure the most memory that ``function`` takes beyond what was held before it, its results included.

    On a GPU what torch's allocator handed out; on the CPU the process's resident memory, None where the system cannot
    reset that high-water mark.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del result
        return peak
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or pages that are free again, but still resident, would not count
        Path("/proc/self/clear_refs").write_text("5")
        before = _process_bytes("VmRSS")
    except (OSError, AttributeError):
        function()
        return None
    result = function()
    peak = _process_bytes("VmHWM") - before
    del result
    return max(peak, 0)

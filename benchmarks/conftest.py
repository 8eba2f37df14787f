"""Declare the options of the benchmarks and the fixture that measures, and report the results.

A run measures what two cores do in minutes: two sizes, read, write, condition, memory, exactness. ``--full`` measures
everything, which a GPU does anyway.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from . import comparison, report, scenes, timing
from .scenes import Size

LEFT_FOR_FULL = "81 and 401 frames, the encoder on a whole chunk, a whole chunk, growth, the drop-in loop"
_DETAILS = Path(__file__).parent.parent / "out" / "benchmarks"

_rows: list[report.Row] = []
_load_at_start = os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device the benchmarks run on: cpu or cuda")
    parser.addoption("--quick", action="store_true", help="tiny sizes, few rounds, a small encoder: does it all run?")
    parser.addoption("--full", action="store_true", help=f"half an hour on two cores: {LEFT_FOR_FULL} too")
    parser.addoption("--save", action="store_true", help="write the results into benchmarks/results/<machine>")
    parser.addoption("--results", default=None, help="write the results into this folder; without it out/benchmarks")


def _is_full(config: pytest.Config) -> bool:
    """Say whether everything is measured: on request, and on a GPU, for which it is little."""
    return not config.getoption("--quick") and (
        config.getoption("--full") or config.getoption("--device").startswith("cuda")
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse options that exclude each other, and leave pytest-benchmark's own tables to ``-v``."""
    config.addinivalue_line("markers", "full: takes longer than a run of minutes has; with --full, --quick or a GPU")
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install 'mirage-world[bench]'")
    if config.getoption("--full") and config.getoption("--quick"):
        raise pytest.UsageError("--full excludes --quick")
    if config.getoption("--save") and not _is_full(config):
        raise pytest.UsageError("--save needs --full: the tables are made of all sizes")
    config.option.benchmark_quiet = True  # -v takes precedence


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes longer than minutes."""
    if _is_full(config) or config.getoption("--quick"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


class Bench:
    """Measure one benchmark's variants and file their rows."""

    patience: ClassVar[float] = 30.0
    """Seconds that all measurements of a run that is not full may still wait for the machine to be quiet."""

    def __init__(self, request: pytest.FixtureRequest, device: torch.device, bandwidth: float) -> None:
        self._request, self.device, self.bandwidth = request, device, bandwidth
        self.quick, self.full = request.config.getoption("--quick"), _is_full(request.config)

    def measure(
        self,
        group: str,
        name: str,
        variant: str,
        size: str,
        nbytes: int | None,
        function: Callable[[], Any],
        *,
        rounds: int = 41,
        warmup: int = 3,
        setup: Callable[[], Any] | None = None,
        graph: bool = False,
    ) -> None:
        """Time one variant; once a test. On a GPU eager and, where ``graph``, captured; warm and cold each."""
        if self.quick:
            rounds, warmup = min(rounds, 1 if rounds < 9 else 3), min(warmup, 1)
        if self.device.type == "cuda":
            for captured in (False, True) if graph else (False,):
                for cold in (False, True):
                    seconds = timing.time_cuda(
                        function, rounds, graph=captured, cold=cold, warmup=max(warmup, 1), setup=setup
                    )
                    how = f"{'graph' if captured else 'eager'}, {'cold' if cold else 'warm'}"
                    self.file(group, name, f"{variant}, {how}", size, nbytes, seconds)
            return
        self._wait()
        benchmark = self._request.getfixturevalue("benchmark")
        benchmark.group = f"{group}: {name}, {size}"
        benchmark.pedantic(lambda: (function(), None)[1], setup=setup, rounds=rounds, warmup_rounds=warmup)
        self.file(group, name, variant, size, nbytes, benchmark.stats.stats.data)

    def seconds(
        self, function: Callable[[], Any], rounds: int, *, warmup: int = 1, setup: Callable[[], Any] | None = None
    ) -> list[float]:
        """Measure the seconds of so many rounds, for tests that file many rows."""
        if self.device.type == "cuda":
            return timing.time_cuda(function, rounds, graph=False, cold=False, warmup=max(warmup, 1), setup=setup)
        self._wait()
        return timing.time_cpu(function, rounds, warmup=warmup, setup=setup)

    def seconds_of_both(
        self, one: Callable[[], Any], other: Callable[[], Any], rounds: int, *, warmup: int = 1
    ) -> tuple[list[float], list[float]]:
        """Measure the seconds of two functions that take turns, so that what else the machine does is alike."""
        both: tuple[list[float], list[float]] = ([], [])
        self._wait()
        for k in range(warmup + rounds):
            for function, seconds in zip((one, other), both, strict=True):
                if self.device.type == "cuda":
                    taken = timing.time_cuda(function, 1, graph=False, cold=False, warmup=1 if k == 0 else 0)
                else:
                    taken = timing.time_cpu(function, 1, warmup=0)
                seconds += taken if k >= warmup else []
        return both

    def _wait(self) -> None:
        if self.full:
            timing.wait_for_quiet()
        elif not self.quick and Bench.patience > 0:
            start = time.perf_counter()
            timing.wait_for_quiet(min(10.0, Bench.patience))
            Bench.patience -= time.perf_counter() - start

    def once(self, function: Callable[[], Any]) -> float:
        """Measure the seconds of one call that cannot be repeated."""
        return timing.time_once(function, self.device)

    def file(self, group: str, name: str, variant: str, size: str, nbytes: int | None, seconds: list[float]) -> None:
        """File a row of times."""
        times = timing.summarise(list(seconds))
        _rows.append(report.make_row(group, name, variant, size, times=times, nbytes=nbytes, bandwidth=self.bandwidth))

    def record(
        self, group: str, name: str, variant: str, size: str, *, nbytes: int | None = None, value: float | None = None
    ) -> None:
        """File a row that is no time: bytes held, or a fraction."""
        _rows.append(report.make_row(group, name, variant, size, nbytes=nbytes, value=value))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    name = request.config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.fail(f"--device {name}: torch {torch.__version__} sees no CUDA device")
    return torch.device(name)


@pytest.fixture(scope="session")
def bandwidth(device: torch.device) -> float:
    return timing.copy_bandwidth(device)


@pytest.fixture
def bench(request: pytest.FixtureRequest, device: torch.device, bandwidth: float) -> Any:
    yield Bench(request, device, bandwidth)
    gc.collect()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let ``size`` run over the sizes of the device, or those that a shorter run has time for."""
    if "size" in metafunc.fixturenames:
        config = metafunc.config
        sizes: tuple[Size, ...] = scenes.GPU_SIZES if config.getoption("--device").startswith("cuda") else scenes.SIZES
        if config.getoption("--quick"):
            sizes = (scenes.QUICK,)
        elif not _is_full(config):
            sizes = scenes.SHORT_SIZES
        metafunc.parametrize("size", sizes, ids=[size.label.replace(" ", "-") for size in sizes], scope="session")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print every row with --full or -v, the comparison, and where the details are; write the results there."""
    if not _rows:
        return
    if config.getoption("--full") or config.option.verbose > 0:
        terminalreporter.section("medians, and how many times the floor")
        for row in _rows:
            median, spread, nbytes, _, ratio = report.row_text(row)
            names = f"{row['group']:<10} {row['name']:<22} {row['size']:<26} {row['variant']:<34}"
            terminalreporter.write_line(f"{names} {median:>10}  {spread:>20}  {nbytes:>9} {ratio:>8}".rstrip())
    terminalreporter.section("comparison: medians, and how many times the latent memory's")
    for line in comparison.compare(_rows):
        terminalreporter.write_line(line)
    facts = report.machine_facts(torch.device(config.getoption("--device")))
    facts["load_average_at_start"] = _load_at_start
    folder = report.RESULTS / facts["machine"] if config.getoption("--save") else _DETAILS
    path = report.write_results(Path(config.getoption("--results") or folder), facts, _rows)
    terminalreporter.write_line(f"every row, with its spread and floor: {path.with_suffix('.md')}")
    if not _is_full(config):
        terminalreporter.write_line(f"with --full: {LEFT_FOR_FULL}")

"""Options of the benchmarks, the fixture that measures, and what becomes of the results."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from . import report, scenes, timing
from .scenes import Size

_rows: list[report.Row] = []
_load_at_start = os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device the benchmarks run on: cpu or cuda")
    parser.addoption("--quick", action="store_true", help="tiny sizes, few rounds, a small encoder: does it all run?")
    parser.addoption("--save", action="store_true", help="write the results into benchmarks/results/<machine>")
    parser.addoption("--results", default=None, help="write the results into this folder instead")


class Bench:
    """Measures one benchmark's variants and files their rows."""

    def __init__(self, request: pytest.FixtureRequest, device: torch.device, quick: bool, bandwidth: float) -> None:
        self._request, self.device, self.quick, self.bandwidth = request, device, quick, bandwidth

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
        """Seconds of so many rounds, for tests that file many rows."""
        if self.device.type == "cuda":
            return timing.time_cuda(function, rounds, graph=False, cold=False, warmup=max(warmup, 1), setup=setup)
        self._wait()
        return timing.time_cpu(function, rounds, warmup=warmup, setup=setup)

    def seconds_of_both(
        self, one: Callable[[], Any], other: Callable[[], Any], rounds: int, *, warmup: int = 1
    ) -> tuple[list[float], list[float]]:
        """Seconds of two functions that take turns, so that what else the machine does is alike for both."""
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
        if not self.quick:
            timing.wait_for_quiet()

    def once(self, function: Callable[[], Any]) -> float:
        """Seconds of one call that cannot be repeated."""
        return timing.time_once(function, self.device)

    def file(self, group: str, name: str, variant: str, size: str, nbytes: int | None, seconds: list[float]) -> None:
        times = timing.summarise(list(seconds))
        _rows.append(report.make_row(group, name, variant, size, times=times, nbytes=nbytes, bandwidth=self.bandwidth))

    def record(
        self, group: str, name: str, variant: str, size: str, *, nbytes: int | None = None, value: float | None = None
    ) -> None:
        """A row that is no time: bytes held, or a fraction."""
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
    yield Bench(request, device, request.config.getoption("--quick"), bandwidth)
    gc.collect()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``size`` runs over the sizes of the device, or the one tiny size of a quick run."""
    if "size" in metafunc.fixturenames:
        config = metafunc.config
        sizes: tuple[Size, ...] = scenes.GPU_SIZES if config.getoption("--device").startswith("cuda") else scenes.SIZES
        if config.getoption("--quick"):
            sizes = (scenes.QUICK,)
        metafunc.parametrize("size", sizes, ids=[size.label.replace(" ", "-") for size in sizes], scope="session")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _rows:
        return
    terminalreporter.section("medians, and how many times the floor")
    for row in _rows:
        median, spread, nbytes, _, ratio = report.row_text(row)
        names = f"{row['group']:<10} {row['name']:<22} {row['size']:<26} {row['variant']:<34}"
        terminalreporter.write_line(f"{names} {median:>10}  {spread:>20}  {nbytes:>9} {ratio:>8}".rstrip())
    named = config.getoption("--results")
    if not named and not config.getoption("--save"):
        return
    facts = report.machine_facts(torch.device(config.getoption("--device")))
    facts["load_average_at_start"] = _load_at_start
    path = report.write_results(Path(named) if named else report.RESULTS / facts["machine"], facts, _rows)
    terminalreporter.write_line(f"written to {path}")

"""Scenes shared by the benchmarks, and what becomes of their results: a table of ratios, and one JSON file.

``make bench`` writes ``benchmarks/results/<machine>/memory.json`` in the form design documents of this project fix:
``{machine, cpu, gpu, torch, cuda, commit, command, rows: [{group, name, variant, size, median_s, p20_s, p80_s, bytes,
floor_s}]}``. ``floor_s`` is ``bytes``, the least a variant must move, over the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mirage_kernels import Cameras, back_project

from . import scenes
from .baseline import ConcatenatedMemory

_rows: list[dict[str, Any]] = []


class Scene(NamedTuple):
    """``tokens`` tokens of the room and the cameras that read them, on one device."""

    tokens: int
    points: Tensor  # (N, 4)
    features: Tensor  # (N, C) float32
    read_cameras: Cameras  # 9 views, at the image's size
    baseline: ConcatenatedMemory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device the benchmarks run on: cpu or cuda")
    parser.addoption("--results", default=None, help="folder for the JSON; default benchmarks/results/<machine>")
    parser.addoption("--quick", action="store_true", help="smallest size and few rounds: shows that everything runs")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session", params=scenes.TOKENS, ids=lambda tokens: f"{tokens}tokens")
def scene(request: pytest.FixtureRequest, device: torch.device) -> Scene:
    tokens = request.param
    if request.config.getoption("--quick") and tokens != min(scenes.TOKENS):
        pytest.skip("--quick runs the smallest size only")
    views = tokens // (scenes.GRID[0] * scenes.GRID[1])
    # Depth is rendered at the token grid: the benchmark of reading needs the tokens, not 400 full depth maps.
    cameras = Cameras(*scenes.camera_path(views), scenes.IMAGE_SIZE).resized(scenes.GRID)
    depth = scenes.render_depth(cameras.intrinsics, cameras.cam2world, scenes.GRID)
    lifted = back_project(depth, cameras.intrinsics, cameras.cam2world, scenes.GRID)
    assert bool(lifted.valid.all())
    features = scenes.latents(views).permute(0, 2, 3, 1).reshape(tokens, scenes.CHANNELS).contiguous().to(device)
    points = lifted.points.reshape(-1, 4).to(device)
    baseline = ConcatenatedMemory(scenes.CHANNELS, device)
    baseline.points, baseline.features = points[:, :3].contiguous(), features
    read = Cameras(*scenes.camera_path(scenes.READ_VIEWS, laps=0.15, phase=0.5), scenes.IMAGE_SIZE).to(device)
    return Scene(tokens, points, features, read, baseline)


@pytest.fixture(scope="session")
def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written bytes both counted."""
    source = torch.randn(64 << 20 if device.type == "cuda" else 16 << 20, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / sorted(times)[len(times) // 2]


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any, device: torch.device, copy_bandwidth: float) -> Any:
    """Times one variant and files its row: measure(group, name, variant, size, bytes, function, rounds, setup=None)."""

    def run(
        group: str, name: str, variant: str, size: str, nbytes: int, function: Any, rounds: int, setup: Any = None
    ) -> None:
        def timed(*args: Any) -> None:
            function(*args)
            if device.type == "cuda":
                torch.cuda.synchronize()

        quick = request.config.getoption("--quick")
        benchmark.group = f"{group}: {name} {size}"
        benchmark.pedantic(timed, setup=setup, rounds=3 if quick else rounds, warmup_rounds=1 if quick else 3)
        times = torch.tensor(benchmark.stats.stats.data, dtype=torch.float64)
        p20, median, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        row = {"group": group, "name": name, "variant": variant, "size": size, "median_s": median, "p20_s": p20}
        _rows.append({**row, "p80_s": p80, "bytes": nbytes, "floor_s": nbytes / copy_bandwidth})

    return run


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        return f"{found[1] if found else platform.processor()}, {torch.get_num_threads()} threads"
    except OSError:
        return platform.processor()


def _facts(device: str) -> dict[str, Any]:
    gpu = None
    if device.startswith("cuda"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
        gpu = {"name": torch.cuda.get_device_name(), "driver": driver}
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = re.sub(r"[^a-z0-9]+", "-", (gpu["name"] if gpu else f"cpu-{platform.machine()}").lower()).strip("-")
    return {
        "machine": f"{machine}-{torch.get_num_threads()}threads" if gpu is None else machine,
        "cpu": _cpu_name(),
        "gpu": gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": head.stdout.strip() or None,
        "command": " ".join(["pytest", *sys.argv[1:]]),
    }


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _rows:
        return
    terminalreporter.section("medians, and how many times the baseline's time over ours")
    baselines = {(row["name"], row["size"]): row["median_s"] for row in _rows if row["variant"] == "baseline"}
    for row in _rows:
        base = baselines.get((row["name"], row["size"]))
        ratio = f"{base / row['median_s']:8.1f}x" if base and row["variant"] != "baseline" else " " * 9
        terminalreporter.write_line(
            f"{row['name']:<6} {row['size']:<18} {row['variant']:<16} {row['median_s'] * 1e3:9.3f} ms"
            f"  [{row['p20_s'] * 1e3:.3f}, {row['p80_s'] * 1e3:.3f}] {ratio}"
        )
    if config.getoption("--quick"):
        return
    facts = _facts(config.getoption("--device"))
    folder = Path(config.getoption("--results") or Path(__file__).parent / "results" / facts["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "memory.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**facts, "rows": _rows}, indent=1) + "\n")
    os.replace(temporary, path)
    terminalreporter.write_line(f"written to {path}")

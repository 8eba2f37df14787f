"""Measure ``mirage_kernels.compat.LatentPointCloud`` in a loop of the release's shape, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import report, scenes
from .scenes import Size
from .timing import summarise

pytestmark = pytest.mark.full

VARIANTS = {"compat": "latent, f32", "reference": "reference"}


@pytest.mark.parametrize("memory", VARIANTS)
def test_loop(memory: str, bench: Any) -> None:
    size = scenes.QUICK if bench.quick else Size(scenes.READ_VIEWS, 704, 1280)
    chunks = 2 if bench.quick else 10
    command = [sys.executable, "-m", "benchmarks.drop_in", "--memory", memory, "--device", str(bench.device)]
    for name, value in (("frames", size.frames), ("height", size.height), ("width", size.width), ("chunks", chunks)):
        command += [f"--{name}", str(value)]
    printed = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(report.__file__).parent.parent
    ).stdout
    result = json.loads(printed)
    tokens = size.grid[0] * size.grid[1] * (1 + chunks * size.frames)
    assert result["tokens"] == tokens
    label = f"{chunks} chunks of {size.label}"
    for name in ("project", "update"):
        seconds = result[f"{name}_s"]
        assert len(seconds) == chunks and summarise(seconds).median > 0
        bench.file("drop_in", f"{name}, median chunk", VARIANTS[memory], label, None, seconds)
    last = [result["project_s"][-1] + result["update_s"][-1]]
    bench.file("drop_in", "memory's share, last chunk", VARIANTS[memory], label, None, last)

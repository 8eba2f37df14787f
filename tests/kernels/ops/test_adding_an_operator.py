"""The worked example of docs/adding-an-operator.md: compiled, and held to its definition on every backend of a CPU."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mirage_kernels
from mirage_kernels.environment import triton_interpreted
from mirage_kernels.ops.operator import OPERATORS

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "add_operator"
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
INCLUDES = ["-isystem", str(TORCH / "include"), "-I", str(ROOT / "csrc")]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The operator, with its C++ kernel where there is a compiler; listed with the others by these tests alone."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        module = importlib.import_module("squared_distance")
        if triton_interpreted():
            importlib.import_module("squared_distance.triton")
    finally:
        sys.path.remove(str(EXAMPLE))
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]):
        library = tmp_path_factory.mktemp("example") / "squared_distance.so"
        source = str(EXAMPLE / "squared_distance.cpp")
        link = ["-shared", "-o", str(library), f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-Wno-psabi"]
        command = [*compiler.split(), *FLAGS, *DEFINES, *INCLUDES, source, *link]
        subprocess.run(command, check=True, capture_output=True, text=True)
        torch.ops.load_library(str(library))
    yield module
    del OPERATORS["squared_distance"]


BACKENDS = ["reference", "cpu"] + (["triton"] if triton_interpreted() else [])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("live", [None, 0, 700, 5000])
def test_equals_a_loop(example: ModuleType, backend: str, live: int | None) -> None:
    if not mirage_kernels.available_backends()[backend]:
        pytest.skip(f"backend {backend!r} is not available")
    points = torch.randn(1000, 4, generator=torch.Generator().manual_seed(1))
    center = torch.tensor([0.25, -1.0, 2.0])
    count = None if live is None else torch.tensor([live])
    with mirage_kernels.use_backend(backend):
        distances = example.squared_distance(points, center, num_points=count)
    expected = torch.zeros(1000)
    for i in range(1000 if live is None else min(live, 1000)):
        dx, dy, dz = (points[i, k] - center[k] for k in range(3))
        expected[i] = (dx * dx + dy * dy) + dz * dz
    assert torch.equal(distances, expected)


@pytest.mark.slow
def test_bad_input_is_named(example: ModuleType) -> None:
    with pytest.raises(ValueError, match="center must be .3,. like points, got .2,. float32"):
        example.squared_distance(torch.zeros(5, 4), torch.zeros(2))
    with pytest.raises(TypeError, match="points must be"):
        example.squared_distance(torch.zeros(5, 4, dtype=torch.int32), torch.zeros(3))


@pytest.mark.slow
def test_opcheck(example: ModuleType) -> None:
    operator = example.launch.__self__.overloads["compiled"]
    torch.library.opcheck(operator, (torch.randn(300, 4), torch.randn(3), None))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_cuda_kernel_compiles(tmp_path: Path) -> None:
    flags = ["-std=c++20", "-fmad=false", "-DUSE_CUDA", "-arch=sm_90", "-Werror=all-warnings", "-Xcompiler=-fPIC"]
    command = [
        "nvcc",
        *flags,
        *DEFINES,
        *INCLUDES,
        "-c",
        str(EXAMPLE / "squared_distance.cu"),
        "-o",
        str(tmp_path / "o"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

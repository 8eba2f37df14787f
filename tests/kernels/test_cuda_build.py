"""What nvcc makes of the CUDA operators: for every architecture of the list, without a GPU.

The build is the one of ``make cuda`` in its folder, so that after it (as in .ci/run) nothing is compiled here again.
The list is ``TORCH_CUDA_ARCH_LIST``, else setup.py's own.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from mirage_kernels.ops.operator import OPERATORS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
LIST = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0 8.6 8.9 9.0 10.0 12.0+PTX")
ARCHS = {"sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in LIST.split()}
KERNELS = {
    "appended_bounds_kernel", "back_project_kernel", "best_kernel", "bounds_kernel", "classify_kernel", "commit_kernel",
    "count_kept_kernel", "count_kernel", "cull_kernel", "digit_kernel", "fill_keys_kernel", "gather_kernel",
    "heads_kernel", "hole_kernel", "insert_voxels_kernel", "keys_kernel", "lift_kernel", "make_lifts_kernel",
    "make_projections_kernel", "make_view_cameras_kernel", "mark_kernel", "move_kernel", "nearest_kernel",
    "observe_kernel", "place_kernel", "readout_kernel", "request_kernel", "scan_kernel", "splat_backward_kernel",
    "sum_kernel", "tiles_kernel", "weight_kernel",
}  # fmt: skip


@pytest.fixture(scope="module")
def module() -> Path:
    """The compiled module: nvcc's and ptxas' warnings, spills and local memory among them, are errors of the build."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if shutil.which("nvcc") is None and not (home and (Path(home) / "bin" / "nvcc").exists()):
        pytest.skip("no nvcc: not on PATH, and CUDA_HOME names none")
    if not os.access(ROOT, os.W_OK):
        pytest.skip(f"the repository {ROOT} is read-only: nowhere to build")
    environment = os.environ | {"MIRAGE_BUILD_CUDA": "1", "MIRAGE_BUILD_CPU": "0"}
    folders = ["--build-lib", str(BUILD / "cuda"), "--build-temp", str(BUILD / "cuda-temp")]
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / "cuda.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes side by side must not build side by side
        command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    (found,) = (BUILD / "cuda" / "mirage_kernels").glob(f"_cuda.{sys.implementation.cache_tag}*.so")
    return found


def cuobjdump(*arguments: str) -> str:
    """The output of cuobjdump: the toolkit's, or the one that Triton brings."""
    tool = shutil.which("cuobjdump")
    if tool is None and (triton := importlib.util.find_spec("triton")) is not None:
        tool = shutil.which("cuobjdump", path=str(Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin"))
    if tool is None:
        pytest.skip("no cuobjdump: neither on PATH nor in an installed Triton")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def test_every_kernel_is_there_for_every_architecture_without_local_memory(module: Path) -> None:
    report = cuobjdump("-res-usage", str(module))
    found = set()
    for part in report.split("arch = ")[1:]:
        arch = part.split()[0]
        for function, usage in re.findall(r"Function (\S+):\s+(.*)", part):
            (kernel,) = (name for name in KERNELS if re.search(rf"\d{name}", function))
            found.add((arch, kernel))
            sizes = dict(re.findall(r"(STACK|LOCAL|SHARED):(\d+)", usage))
            assert sizes["STACK"] == sizes["LOCAL"] == "0", f"{kernel} on {arch}: {usage}"
            assert int(sizes["SHARED"]) <= 48 << 10
    assert found == {(arch, kernel) for arch in ARCHS for kernel in KERNELS}


def test_arithmetic_is_rounded_after_every_operation(module: Path) -> None:
    if "+PTX" not in LIST:
        pytest.skip(f"TORCH_CUDA_ARCH_LIST={LIST} asks for no PTX")
    # In PTX an operation that states its rounding is never fused by what translates PTX; and division is exact.
    ptx = cuobjdump("-ptx", str(module))
    operations = Counter(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]+\S*\.f(?:16|32|64)) ", ptx, re.MULTILINE))
    assert operations["mul.rn.f32"] > 100 and operations["div.rn.f32"] > 0 and operations["rcp.rn.f32"] > 0
    for operation in operations:
        name = operation.split(".")[0]
        assert name not in ("fma", "mad"), f"{operation}: a fused multiply-add"
        assert not re.search(r"\.(ftz|approx|full|sat)\b", operation), f"{operation}: not IEEE arithmetic"
        if name in ("add", "sub", "mul", "div", "rcp", "sqrt"):
            assert ".rn." in operation, f"{operation}: its rounding is left open"


def test_projection_fuses_nothing_on_any_architecture(module: Path) -> None:
    # A point takes 9 products, 9 sums, a reciprocal and 2 products more. The reciprocal's own steps are fused or FTZ.
    seen = set()
    (name,) = set(re.findall(r"Function (\S*16fill_keys_kernel\S*):", cuobjdump("-res-usage", str(module))))
    for part in cuobjdump("-sass", "-fun", name, str(module)).split("arch = ")[1:]:
        for function in part.split("Function : ")[1:]:
            code = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", function, re.MULTILINE))
            products, sums = code["FMUL"] + 2 * code["FMUL2"], code["FADD"] + 2 * code["FADD2"]
            assert products > 0 and 9 * products == 11 * sums, f"{part.split()[0]}: {code}"
            seen.add(part.split()[0])
    assert seen == ARCHS


STUB = """
extern "C" {
int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
int torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char**) { return 1; }
void torch_c10_cuda_free_error_msg(char*) {}
}
"""
LOAD = """
import sys, torch
from mirage_kernels.ops.operator import OPERATORS
torch.ops.load_library(sys.argv[1])
for name in OPERATORS:
    print(name, torch._C._dispatch_has_kernel_for_dispatch_key(f"mirage::{name}_compiled", "CUDA"))
"""


def test_module_loads_and_registers_every_operator(module: Path, tmp_path: Path) -> None:
    # Torch's CUDA functions are in libtorch_cuda, which the module must name itself. A torch without CUDA gets one here
    # that has the functions' names.
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    if torch.version.cuda is None:
        (tmp_path / "stub.cpp").write_text(STUB)
        library = str(tmp_path / "libtorch_cuda.so")
        compiler = (os.environ.get("CXX") or "c++").split()
        command = [
            *compiler,
            "-shared",
            "-fPIC",
            "-Wl,-soname,libtorch_cuda.so",
            "-o",
            library,
            str(tmp_path / "stub.cpp"),
        ]
        subprocess.run(command, check=True)
        environment["LD_LIBRARY_PATH"] = os.pathsep.join([str(tmp_path), os.environ.get("LD_LIBRARY_PATH", "")])
    command = [sys.executable, "-c", LOAD, str(module)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{name} True" for name in OPERATORS]

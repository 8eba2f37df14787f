"""Turns the .cu files into a shared library for the CPU: a few textual changes, then the C++ compiler.

The sources are copied with their tree, so that their own ``#include "../core/..."`` work, into ``build/cuda_emulator``
under a hash of everything that goes in: a second run loads what the first one built.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CXX = (os.environ.get("CXX") or "c++").split()
TORCH = Path(torch.__file__).parent
NAMESPACE = "mirage_emulated"
# The operators as they are, on sm_80, and a variant: as on GPUs before it, with constants so small that loops which
# only a huge input enters twice go round often. Suffix of the namespace: (architecture, files, replacements).
OPERATORS = ("back_project", "block_bounds", "bounded_write", "cache_compact", "cache_write", "splat", "splat_aligned")
VARIANTS = {
    "": (800, (*OPERATORS, "view_overlap", "faults"), ()),
    "_small": (
        750,
        ("back_project", "cache_compact", "cache_write"),
        (
            ("kScanThreads = 1024", "kScanThreads = 64"),
            ("kThreads = 1024", "kThreads = 256"),
            ("kCopyBytes = 32 << 20", "kCopyBytes = 20000"),
        ),
    ),
}

FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing", "-w"]
TORCH_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA"]
TORCH_FLAGS += ["-isystem", str(TORCH / "include")]
INSTRUMENTED = ["-fsanitize=thread", "-DEMULATED_CUDACC"]


class NotSupported(RuntimeError):
    """There is no compiler here that could build the emulator."""


def _closing(text: str, start: int) -> int:
    """Index just past the parenthesis that closes the one before ``start``."""
    depth = 1
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    raise ValueError("unbalanced parentheses")


def _rewrite_launches(text: str) -> str:
    launch = re.compile(r"(\w+)(<[^<>;]*>)?\s*<<<(.*?)>>>\s*\(", re.DOTALL)
    while (found := launch.search(text)) is not None:
        end = _closing(text, found.end())
        name, types, configuration = found[1], found[2] or "", found[3]
        arguments = text[found.end() : end - 1]
        kernel = f"[=](auto... parameters) {{ {name}{types}(parameters...); }}"
        call = f'::emulator::launch("{name}", {configuration}, {kernel}, {arguments})'
        text = text[: found.start()] + call + text[end:]
    return text


def rewrite(text: str, suffix: str) -> str:
    """CUDA C++ as the host compiler takes it."""
    text = re.sub(
        r"__shared__\s+([^;=]+?)\s+(\w+)((?:\[[^\]]*\])*);", r'auto& \2 = ::emulator::shared<\1\3>("\2");', text
    )
    text = _rewrite_launches(text)
    for old, new in (
        ("STABLE_TORCH_LIBRARY_IMPL(mirage, CUDA,", f"STABLE_TORCH_LIBRARY_IMPL({NAMESPACE}{suffix}, CPU,"),
        ("mirage::cuda", f"mirage::cuda{suffix}"),
        ("torch::stable::accelerator::DeviceGuard", "::emulator::Operator"),
        ("torch::stable::new_empty(", "::emulator::new_empty("),
        (".is_cuda()", ".is_cpu()"),
        ("__CUDA_ARCH__", "EMULATED_CUDA_ARCH"),
        ("__CUDACC__", "EMULATED_CUDACC"),
    ):
        text = text.replace(old, new)
    text = re.sub(r"(\w+)\.const_data_ptr\(\)", r"::emulator::readable(\1)", text)
    return re.sub(r"(\w+)\.mutable_data_ptr\(\)", r"::emulator::writable(\1)", text)


def _sources() -> dict[str, str]:
    """Every file that goes in, by its place under the build folder."""
    files = {}
    for folder in ("core", "cuda"):
        for path in sorted((ROOT / "csrc" / folder).iterdir()):
            if path.suffix in (".h", ".cuh", ".cu"):
                files[f"{folder}/{path.name}"] = path.read_text()
    for path in sorted(HERE.iterdir()):
        if path.suffix in (".h", ".cpp"):
            files[f"emulator/{path.name}"] = path.read_text()
        elif path.suffix == ".cu":
            files[f"cuda/{path.name}"] = path.read_text()
    return files


def _compile(folder: Path, source: str, output: str, flags: list[str]) -> str:
    command = [*CXX, *FLAGS, *TORCH_FLAGS, f"-I{folder / 'emulator'}", *flags, "-c", source, "-o", output]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"compiling {source} for the emulator failed:\n{result.stdout}{result.stderr}")
    return output


def _build(files: dict[str, str], base: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=base) as name:
        folder = Path(name)
        tasks = [("emulator/emulator.cpp", "emulator.o", [])]
        for suffix, (arch, stems, replacements) in VARIANTS.items():
            for place, text in files.items():
                path = folder / (place.replace("cuda/", f"cuda{suffix}/", 1))
                path.parent.mkdir(exist_ok=True)
                for old, new in replacements:
                    text = text.replace(old, new)
                path.write_text(text if place.startswith("emulator/") else rewrite(text, suffix))
                if path.suffix == ".cu" and path.stem in stems:
                    flags = ["-x", "c++", *INSTRUMENTED, f"-DEMULATED_CUDA_ARCH={arch}", "-include", "memory.h"]
                    tasks.append((str(path.relative_to(folder)), f"{path.stem}{suffix}.o", flags))
        tasks[1:] = sorted(tasks[1:], key=lambda task: "splat" not in task[0])  # the longest first
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 2) as pool:
            objects = list(pool.map(lambda task: _compile(folder, *task), tasks))
        # The emulator first: of what both use of the standard library, the linker then takes the uninstrumented copy.
        linked = folder / "emulated.so"
        link = ["-shared", *objects, "-o", linked.name, "-Wl,-Bsymbolic", f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
        result = subprocess.run([*CXX, *link], cwd=folder, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"linking the emulator failed:\n{result.stdout}{result.stderr}")
        library.parent.mkdir(exist_ok=True)
        os.replace(linked, library)
    for other in base.iterdir():
        if other.is_dir() and other != library.parent and re.fullmatch(r"[0-9a-f]{16}", other.name):
            shutil.rmtree(other, ignore_errors=True)


def build() -> Path:
    """The shared library, built if it is not there yet.

    Raises:
        NotSupported: no C++ compiler.
        RuntimeError: a file does not compile, with the compiler's words.
    """
    if shutil.which(CXX[0]) is None:
        raise NotSupported(f"no C++ compiler: {CXX[0]!r} is not on PATH")
    files = _sources()
    version = subprocess.run([*CXX, "--version"], capture_output=True, text=True, check=True).stdout
    ingredients = [version, torch.__version__, str(TORCH), Path(__file__).read_text(), *files.keys(), *files.values()]
    digest = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:16]
    base = ROOT / "build" / "cuda_emulator"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError:
        base = Path(tempfile.gettempdir()) / "mirage_cuda_emulator"
        base.mkdir(parents=True, exist_ok=True)
    library = base / digest / "emulated.so"
    with open(base / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes side by side build once
        if not library.exists():
            _build(files, base, library)
    return library

"""Builds the compiled modules of mirage_kernels; everything else is in pyproject.toml.

Environment:
    MIRAGE_BUILD_CUDA       1 builds the CUDA operators, 0 does not; unset: where there is nvcc and a torch with CUDA
    MIRAGE_BUILD_CPU        0 leaves the C++ operators out; unset: where there is a C++ compiler
    MIRAGE_SANITIZE         1 builds with address and undefined-behaviour sanitizers (make asan)
    TORCH_CUDA_ARCH_LIST    default "8.0 8.6 8.9 9.0 10.0 12.0+PTX"
    MAX_JOBS                parallel compile jobs
    CXX, CUDA_HOME          as usual
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_FLOOR = (2, 11)
DEFAULT_ARCHS = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"

try:
    import torch
except ImportError:
    sys.exit(
        "mirage-kernels needs torch >= 2.11 at build time and it is not importable here: install torch first, then run"
        " `pip install --no-build-isolation mirage-kernels`."
    )
if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < TORCH_FLOOR:
    sys.exit(f"mirage-kernels needs torch >= 2.11 (LibTorch stable ABI), found torch {torch.__version__}.")


def flag(name: str) -> bool | None:
    value = os.environ.get(name, "").strip().lower()
    return None if value == "" else value not in ("0", "false", "off", "no")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def gencode(arch_list: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, "8.0 9.0 12.0+PTX" or with semicolons, as nvcc flags."""
    flags = []
    for arch in re.split(r"[ ;]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", arch)
        if match is None:
            sys.exit(f'TORCH_CUDA_ARCH_LIST must be like "8.0 9.0 12.0+PTX", got {arch!r}.')
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


CXX = os.environ.get("CXX") or "c++"
CXX_FOUND = shutil.which(CXX.split()[0]) is not None
NVCC = find_nvcc()
ARCH_LIST = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
SANITIZE = bool(flag("MIRAGE_SANITIZE"))
BUILD_CPU = CXX_FOUND and flag("MIRAGE_BUILD_CPU") is not False
BUILD_CUDA = flag("MIRAGE_BUILD_CUDA")
if BUILD_CUDA is None:
    BUILD_CUDA = NVCC is not None and CXX_FOUND and torch.version.cuda is not None
if BUILD_CUDA and NVCC is None:
    sys.exit("MIRAGE_BUILD_CUDA=1 needs nvcc: put it on PATH or set CUDA_HOME.")

# Contraction off and no fast-math: the kernels equal the definition bit for bit. The other two flags change no result,
# they let comparisons be vectorised.
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
CXX_FLAGS += ["-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-DUSE_CUDA", "--expt-relaxed-constexpr", "--threads=2"]
NVCC_FLAGS += ["-Xptxas=-warn-spills,-warn-lmem-usage", "-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden"]
TORCH_DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]

# Torch's headers are not ours to warn about.
TORCH_INCLUDES = ["-isystem", str(Path(torch.__file__).parent / "include")]
TORCH_LIB = str(Path(torch.__file__).parent / "lib")


def run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def build_facts() -> dict[str, str]:
    compiler = run([*CXX.split(), "--version"]).splitlines()[0] if CXX_FOUND else ""
    cuda = re.search(r"release ([\d.]+)", run([NVCC, "--version"]))[1] if BUILD_CUDA else ""
    return {
        "TORCH_VERSION": torch.__version__,
        "CUDA_VERSION": cuda,
        "CUDA_ARCHS": ARCH_LIST if BUILD_CUDA else "",
        "COMPILER": compiler,
        "FLAGS": " ".join(CXX_FLAGS[:7] + (["sanitizers"] if SANITIZE else [])),
    }


class NinjaBuild(build_ext):
    """Compiles all modules in one ninja run, so that MAX_JOBS spans them and only what changed is rebuilt."""

    def build_extensions(self) -> None:
        build = Path(self.build_temp).resolve() / ("sanitized" if SANITIZE else "plain")
        build.mkdir(parents=True, exist_ok=True)
        rules = [
            "rule cxx\n  command = $cxx $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule nvcc\n  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $cxx -shared $in -o $out $flags",
        ]
        lines = [f"cxx = {CXX}", f"nvcc = {NVCC or ''}", *rules]
        targets = {}
        for extension in self.extensions:
            objects = []
            for source in extension.sources:
                cuda = source.endswith(".cu")
                object_file = build / (source.replace("/", "_") + ".o")
                flags = " ".join(escape(argument) for argument in compile_flags(extension, cuda))
                lines.append(f"build {object_file}: {'nvcc' if cuda else 'cxx'} {ROOT / source}\n  flags = {flags}")
                objects.append(str(object_file))
            target = build / Path(self.get_ext_filename(extension.name)).name
            flags = " ".join(escape(argument) for argument in link_flags(extension, build))
            lines.append(f"build {target}: link {' '.join(objects)}\n  flags = {flags}")
            targets[extension.name] = target
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [find_ninja(), "-C", str(build)]
        if os.environ.get("MAX_JOBS"):
            command.append(f"-j{int(os.environ['MAX_JOBS'])}")
        subprocess.run(command, check=True)
        for name, target in targets.items():
            destination = Path(self.get_ext_fullpath(name))
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, destination)


def find_ninja() -> str:
    found = shutil.which("ninja")
    if found:
        return found
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


def escape(argument: str) -> str:
    """One shell word inside a ninja variable."""
    quoted = argument if re.fullmatch(r"[\w@%+=:,./-]+", argument) else "'" + argument.replace("'", "'\\''") + "'"
    return quoted.replace("$", "$$")


def compile_flags(extension: Extension, cuda: bool) -> list[str]:
    if extension.name.endswith("_build_info"):
        import sysconfig

        import pybind11

        includes = [
            part for path in (pybind11.get_include(), sysconfig.get_paths()["include"]) for part in ("-isystem", path)
        ]
        defines = [f'-DMIRAGE_{name}="{value}"' for name, value in build_facts().items()]
        return [*CXX_FLAGS, *includes, *defines]
    if cuda:
        return [*NVCC_FLAGS, *TORCH_DEFINES, *TORCH_INCLUDES, *gencode(ARCH_LIST)]
    sanitize = [*SANITIZERS, "-DMIRAGE_NO_CLONES"] if SANITIZE else []
    return [*CXX_FLAGS, *TORCH_DEFINES, *TORCH_INCLUDES, *sanitize]


def link_flags(extension: Extension, build: Path) -> list[str]:
    if extension.name.endswith("_build_info"):
        return []
    libraries = [f"-L{TORCH_LIB}", "-ltorch_cpu"]
    if extension.name.endswith("_cuda"):
        home = Path(NVCC).resolve().parent.parent if NVCC else Path("/usr/local/cuda")
        directories = [
            directory
            for directory in (cuda_home() / "lib64", cuda_home() / "lib", home / "lib64")
            if directory.is_dir()
        ]
        libraries += [f"-L{directory}" for directory in directories]
        libraries += [f"-L{torch_cuda_folder(build)}", "-Wl,--no-as-needed", "-ltorch_cuda"]
        libraries += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    return libraries + (SANITIZERS[:1] if SANITIZE else [])


def torch_cuda_folder(build: Path) -> Path:
    """Where libtorch_cuda.so is: in torch, or, for a torch without CUDA, an empty library of that name.

    The module must name it as needed: that torch has loaded it does not let the loader find its functions.
    """
    if (Path(TORCH_LIB) / "libtorch_cuda.so").exists():
        return Path(TORCH_LIB)
    stub = build / "stub" / "libtorch_cuda.so"
    stub.parent.mkdir(exist_ok=True)
    run([*CXX.split(), "-shared", "-x", "c++", os.devnull, "-o", str(stub), "-Wl,-soname,libtorch_cuda.so"])
    return stub.parent


def cuda_home() -> Path:
    """The toolkit nvcc belongs to, also where nvcc on PATH is a wrapper script."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    dryrun = subprocess.run([NVCC, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"#\$ TOP=(.*)", dryrun)
    return Path(top[1].strip()).resolve() if top else Path(NVCC).resolve().parent.parent


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


extensions = []
if CXX_FOUND:
    extensions.append(Extension("mirage_kernels._build_info", ["csrc/build_info.cpp"]))
if BUILD_CPU:
    extensions.append(Extension("mirage_kernels._cpu", sources("cpu", ".cpp")))
else:
    print(
        "mirage-kernels: no C++ compiler, installing without compiled CPU operators (plain PyTorch and Triton remain)."
    )
if BUILD_CUDA:
    extensions.append(Extension("mirage_kernels._cuda", sources("cuda", ".cu")))
elif platform.system() == "Linux":
    print("mirage-kernels: building without CUDA operators (needs nvcc and a torch with CUDA, or MIRAGE_BUILD_CUDA=1).")

setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})

"""Builds the compiled modules of mirage_kernels; everything else is in pyproject.toml.

Where torch >= 2.11 or a C++ compiler is missing, a package of pure Python and Triton is built instead, which says why
at run time (`python -m mirage_kernels`). ninja is used where it is installed.

Environment:
    MIRAGE_BUILD_CUDA       1 demands the CUDA operators, 0 leaves them out; unset: where nvcc and torch have one CUDA
    MIRAGE_BUILD_CPU        1 demands the C++ operators, 0 leaves them out; unset: where there is a C++ compiler
    MIRAGE_SANITIZE         1 builds with address and undefined-behaviour sanitizers (make asan)
    TORCH_CUDA_ARCH_LIST    default "8.0 8.6 8.9 9.0 10.0 12.0+PTX"; what nvcc does not know is left out
    MAX_JOBS                parallel compile jobs
    CXX, CUDA_HOME          as usual
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PACKAGE = "mirage_kernels"
SETUPTOOLS_FLOOR = 77  # reads license = "Apache-2.0"
TORCH_FLOOR = (2, 11)
DEFAULT_ARCHS = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"
REINSTALL = "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps mirage-kernels"

if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS_FLOOR:
    sys.exit(
        f"mirage-kernels needs setuptools >= {SETUPTOOLS_FLOOR} to build, found {setuptools.__version__}:"
        f' run `pip install "setuptools>={SETUPTOOLS_FLOOR}"` first.'
    )


def run(command: list[str]) -> str | None:
    """What a command prints, or None where it cannot be run or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def flag(name: str) -> bool | None:
    value = os.environ.get(name, "").strip().lower()
    return None if value == "" else value not in ("0", "false", "off", "no")


def find_torch() -> tuple[Any, str]:
    """torch, or None and why nothing can be compiled against it."""
    try:
        import torch
    except ImportError:
        return None, f"torch could not be imported at build time: install torch first, then `{REINSTALL}`"
    except Exception as error:
        return None, f"importing torch failed at build time: {type(error).__name__}: {error}"
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < TORCH_FLOOR:
        return None, (
            f"it needs torch >= 2.11 at build time (LibTorch stable ABI), found torch {torch.__version__}:"
            f" upgrade torch, then `{REINSTALL}`"
        )
    return torch, ""


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def cuda_release() -> str:
    """nvcc's version, "13.0"; empty where it does not say."""
    found = re.search(r"release ([\d.]+)", run([NVCC, "--version"]) or "") if NVCC else None
    return found[1] if found else ""


TORCH, TORCH_MISSING = find_torch()
CXX = shlex.split(os.environ.get("CXX") or "c++")
COMPILER = (run([*CXX, "--version"]) or "").partition("\n")[0]
CXX_MISSING = "" if COMPILER else f"no C++ compiler at build time: `{shlex.join(CXX)} --version` does not run"
NVCC = find_nvcc()
NVCC_RELEASE = cuda_release()
SANITIZE = bool(flag("MIRAGE_SANITIZE"))


def cpu_missing() -> str:
    """Why the C++ operators are not built, or nothing."""
    if flag("MIRAGE_BUILD_CPU") is False:
        return "MIRAGE_BUILD_CPU=0 left it out at build time"
    reason = TORCH_MISSING or CXX_MISSING
    if reason and flag("MIRAGE_BUILD_CPU"):
        sys.exit(f"MIRAGE_BUILD_CPU=1, but {reason}.")
    return reason


def cuda_missing() -> str:
    """Why the CUDA operators are not built, or nothing."""
    wanted = flag("MIRAGE_BUILD_CUDA")
    if wanted is False:
        return "MIRAGE_BUILD_CUDA=0 left it out at build time"
    if wanted and NVCC is None:
        sys.exit("MIRAGE_BUILD_CUDA=1 needs nvcc: put it on PATH or set CUDA_HOME.")
    reason = TORCH_MISSING or CXX_MISSING or ("" if NVCC else "no nvcc at build time, neither on PATH nor in CUDA_HOME")
    if not reason:
        # A torch without CUDA is compiled against on request: its headers are the same.
        if TORCH.version.cuda is None:
            reason = "" if wanted else f"torch {TORCH.__version__} had no CUDA at build time"
        elif NVCC_RELEASE and NVCC_RELEASE.split(".")[0] != TORCH.version.cuda.split(".")[0]:
            reason = (
                f"nvcc is of CUDA {NVCC_RELEASE} and torch {TORCH.__version__} of CUDA {TORCH.version.cuda}:"
                f" set CUDA_HOME to a toolkit of CUDA {TORCH.version.cuda.split('.')[0]}"
            )
    if reason and wanted:
        sys.exit(f"MIRAGE_BUILD_CUDA=1, but {reason}.")
    return reason


def choose_archs() -> str:
    """The architectures to compile for: those asked for that nvcc knows."""
    asked = [arch for arch in re.split(r"[ ;]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if arch]
    asked = asked or DEFAULT_ARCHS.split()
    for arch in asked:
        if re.fullmatch(r"\d+\.\d+[a-z]?(\+PTX)?", arch) is None:
            sys.exit(f'TORCH_CUDA_ARCH_LIST must be like "8.0 9.0 12.0+PTX", got {arch!r}.')
    known = set(re.findall(r"compute_(\d+)", run([str(NVCC), "--list-gpu-arch"]) or ""))
    kept = [arch for arch in asked if not known or "".join(re.findall(r"\d+", arch)) in known]
    if not kept:
        sys.exit(f"nvcc of CUDA {NVCC_RELEASE} knows none of the architectures {' '.join(asked)}.")
    if len(kept) < len(asked):
        if not any(arch.endswith("+PTX") for arch in kept) and any(arch.endswith("+PTX") for arch in asked):
            newest = max(kept, key=lambda arch: [int(part) for part in re.findall(r"\d+", arch)])
            kept[kept.index(newest)] += "+PTX"  # later GPUs still run something
        print(f"mirage-kernels: nvcc of CUDA {NVCC_RELEASE} knows {' '.join(kept)} of {' '.join(asked)}.")
    return " ".join(kept)


def gencode(archs: str) -> list[str]:
    """Architectures, "8.0 9.0 12.0+PTX", as nvcc flags."""
    flags = []
    for arch in archs.split():
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


MISSING = {"_cpu": cpu_missing(), "_cuda": cuda_missing()}
ARCHS = "" if MISSING["_cuda"] else choose_archs()

# Contraction off and no fast-math: the kernels equal the definition bit for bit. The other two flags change no result,
# they let comparisons be vectorised.
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
CXX_FLAGS += ["-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-DUSE_CUDA", "--expt-relaxed-constexpr", "--threads=2"]
NVCC_FLAGS += ["-Xptxas=-warn-spills,-warn-lmem-usage", "-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden"]
TORCH_DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]

# Torch's headers are not ours to warn about.
TORCH_FOLDER = Path(TORCH.__file__).parent if TORCH else Path()
TORCH_INCLUDES = ["-isystem", str(TORCH_FOLDER / "include")]
TORCH_LIB = TORCH_FOLDER / "lib"


def write_build_info(folder: Path) -> None:
    """Write `_build_info.py`: what this build was made with, and why what it lacks was not built."""
    facts = {
        "torch_version": TORCH.__version__ if TORCH else "",
        "cuda_version": "" if MISSING["_cuda"] else NVCC_RELEASE,
        "cuda_archs": ARCHS,
        "compiler": COMPILER if TORCH else "",
        "flags": " ".join(CXX_FLAGS[:7] + (["sanitizers"] if SANITIZE else [])) if TORCH and COMPILER else "",
        "missing": {stem: reason for stem, reason in MISSING.items() if reason},
    }
    lines = ['"""Facts about this build, written by setup.py."""', ""]
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines + [f"{name} = {value!r}" for name, value in facts.items()]) + "\n"
    (folder / "_build_info.py").write_text(text, encoding="utf-8")


class BuildPackage(build_py):
    """The Python files, without those that an earlier build left in the build folder, and the facts of the build."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            write_build_info(ROOT / PACKAGE)
            return
        # A wheel holds all that lies there: modules that were moved since, and in old checkouts the package `mirage`.
        for stale in (PACKAGE, "mirage"):
            shutil.rmtree(Path(self.build_lib) / stale, ignore_errors=True)
        super().run()
        write_build_info(Path(self.build_lib) / PACKAGE)


class Step(NamedTuple):
    """One command: a compiler ("cxx", "nvcc") makes an object of a source, or "link" a module of objects."""

    rule: str
    inputs: list[str]
    output: str
    flags: list[str]


class BuildModules(build_ext):
    """Compiles all modules in one ninja run, so that MAX_JOBS spans them and only what changed is rebuilt.

    Without ninja every file is compiled, by as many compilers at a time.
    """

    def run(self) -> None:
        super().run()
        write_build_info(Path(self.get_ext_fullpath(f"{PACKAGE}._build_info")).parent)

    def build_extensions(self) -> None:
        build = Path(self.build_temp).resolve() / ("sanitized" if SANITIZE else "plain")
        build.mkdir(parents=True, exist_ok=True)
        steps, targets = [], {}
        for extension in self.extensions:
            objects = []
            for source in extension.sources:
                rule = "nvcc" if source.endswith(".cu") else "cxx"
                objects.append(source.replace("/", "_") + ".o")
                # By its relative path, in which no folder of the user's, with a space in its name, occurs.
                steps.append(Step(rule, [os.path.relpath(ROOT / source, build)], objects[-1], compile_flags(rule)))
            targets[extension.name] = Path(self.get_ext_filename(extension.name)).name
            steps.append(Step("link", objects, targets[extension.name], link_flags(extension, build)))
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        ninja = find_ninja()
        if ninja is None:
            run_steps(steps, build, jobs)
        else:
            write_ninja(steps, build / "build.ninja")
            parallel = [f"-j{jobs}"] if os.environ.get("MAX_JOBS") else []
            subprocess.run([*ninja, "-C", str(build), *parallel], check=True)
        for name, target in targets.items():
            destination = Path(self.get_ext_fullpath(name))
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(build / target, destination)


def find_ninja() -> list[str] | None:
    found = shutil.which("ninja")
    if found:
        return [found]
    try:
        import ninja
    except ImportError:
        return None
    return [str(Path(ninja.BIN_DIR) / "ninja")]


def write_ninja(steps: list[Step], path: Path) -> None:
    compile_rule = "  command = ${0} $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
    lines = [f"cxx = {escape_value(shlex.join(CXX))}", f"nvcc = {escape_value(shlex.quote(NVCC or ''))}"]
    lines += [f"rule {name}\n" + compile_rule.format(name) for name in ("cxx", "nvcc")]
    lines.append("rule link\n  command = $cxx -shared $in -o $out $flags")
    for step in steps:
        inputs = " ".join(map(escape_path, step.inputs))
        lines.append(f"build {escape_path(step.output)}: {step.rule} {inputs}")
        lines.append(f"  flags = {escape_value(shlex.join(step.flags))}")
    path.write_text("\n".join(lines) + "\n")


def escape_value(text: str) -> str:
    return text.replace("$", "$$")


def escape_path(text: str) -> str:
    return re.sub(r"([$ :])", r"$\1", text)


def run_steps(steps: list[Step], build: Path, jobs: int) -> None:
    """All steps without ninja: the compilers side by side, then the linkers."""

    def run_step(step: Step) -> None:
        if step.rule == "link":
            command = [*CXX, "-shared", *step.inputs, "-o", step.output, *step.flags]
        else:
            compiler = [str(NVCC)] if step.rule == "nvcc" else CXX
            command = [*compiler, *step.flags, "-c", *step.inputs, "-o", step.output]
        print(shlex.join(command), flush=True)
        subprocess.run(command, cwd=build, check=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run_step, (step for step in steps if step.rule != "link")))
        list(pool.map(run_step, (step for step in steps if step.rule == "link")))


def compile_flags(rule: str) -> list[str]:
    if rule == "nvcc":
        return [*NVCC_FLAGS, *TORCH_DEFINES, *TORCH_INCLUDES, *gencode(ARCHS)]
    sanitize = [*SANITIZERS, "-DMIRAGE_NO_CLONES"] if SANITIZE else []
    return [*CXX_FLAGS, *TORCH_DEFINES, *TORCH_INCLUDES, *sanitize]


def link_flags(extension: Extension, build: Path) -> list[str]:
    libraries = [f"-L{TORCH_LIB}", "-ltorch_cpu"]
    if extension.name.endswith("_cuda"):
        home = Path(str(NVCC)).resolve().parent.parent
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
    if (TORCH_LIB / "libtorch_cuda.so").exists():
        return TORCH_LIB
    stub = build / "stub" / "libtorch_cuda.so"
    stub.parent.mkdir(exist_ok=True)
    command = [*CXX, "-shared", "-x", "c++", os.devnull, "-o", str(stub), "-Wl,-soname,libtorch_cuda.so"]
    subprocess.run(command, check=True)
    return stub.parent


def cuda_home() -> Path:
    """The toolkit nvcc belongs to, also where nvcc on PATH is a wrapper script."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    command = [str(NVCC), "--dryrun", "-x", "cu", os.devnull]
    dryrun = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = re.search(r"#\$ TOP=(.*)", dryrun)
    return Path(top[1].strip()).resolve() if top else Path(str(NVCC)).resolve().parent.parent


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


SOURCES = {"_cpu": ("cpu", ".cpp"), "_cuda": ("cuda", ".cu")}
extensions = [Extension(f"{PACKAGE}.{stem}", sources(*SOURCES[stem])) for stem, reason in MISSING.items() if not reason]
for stem, reason in MISSING.items():
    if reason:
        operators = "compiled CPU operators" if stem == "_cpu" else "CUDA operators"
        print(f"mirage-kernels: building without {operators}: {reason}. Plain PyTorch and Triton remain.")

setup(ext_modules=extensions, cmdclass={"build_py": BuildPackage, "build_ext": BuildModules})

"""What setup.py says and does where something is missing, and the facts the installed package reports.

What is built and installed in fresh environments is in test_distributions.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mirage_kernels
from mirage_kernels.__main__ import build_facts
from mirage_kernels.backends import choose_backend, runs_code_for

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.py").exists())


def run_setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "setup.py"), *arguments]
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("MIRAGE_BUILD", "TORCH_CUDA", "CUDA"))
    }
    return subprocess.run(command, cwd=ROOT, env=env | environment, capture_output=True, text=True, check=False)


def fake_torch(tmp_path: Path, cuda: str | None = None) -> str:
    """A PYTHONPATH with what setup.py reads of torch, which takes less time to import."""
    text = f"import types\n__version__ = '2.13.0'\nversion = types.SimpleNamespace(cuda={cuda!r})\n"
    (tmp_path / "torch.py").write_text(text)
    return str(tmp_path)


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    return run_setup("build_ext", *folders, **environment)


def missing(tmp_path: Path) -> dict[str, str]:
    """What the build of `build` says it lacks, and why."""
    spec = importlib.util.spec_from_file_location("facts", tmp_path / "lib" / "mirage_kernels" / "_build_info.py")
    assert spec is not None and spec.loader is not None
    facts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(facts)
    found: dict[str, str] = facts.missing
    return found


@pytest.mark.parametrize(
    ("torch_module", "words"),
    [
        ("raise ImportError('no torch here')", ("install torch first", "--no-build-isolation")),
        ("raise OSError('libcudart is missing')", ("importing torch failed", "libcudart is missing")),
        ("__version__ = '2.9.1'", ("torch >= 2.11", "2.9.1")),
    ],
)
def test_without_a_torch_to_compile_against_a_pure_package_is_built_that_says_why(
    tmp_path: Path, torch_module: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "torch.py").write_text(torch_module)
    result = build(tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.rglob("*.so"))
    for stem in ("_cpu", "_cuda"):
        assert all(word in missing(tmp_path)[stem] for word in words)
    assert all(word in result.stdout for word in words)

    result = build(tmp_path, PYTHONPATH=str(tmp_path), MIRAGE_BUILD_CPU="1")
    assert result.returncode != 0
    assert all(word in result.stderr for word in ("MIRAGE_BUILD_CPU=1", *words)) and "Traceback" not in result.stderr


@pytest.mark.slow
def test_an_old_setuptools_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools" / "command").mkdir()
    (tmp_path / "setuptools" / "__init__.py").write_text(
        "__version__ = '65.5.0'\nExtension = setup = find_packages = 0"
    )
    (tmp_path / "setuptools" / "command" / "__init__.py").write_text("")
    for command in ("build_ext", "build_py", "sdist"):
        (tmp_path / "setuptools" / "command" / f"{command}.py").write_text(f"{command} = 0")
    for folder in (ROOT, ROOT / "packages" / "mirage-world"):
        result = subprocess.run(
            [sys.executable, "setup.py", "--version"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode != 0
        assert "setuptools >= 77" in result.stderr and "65.5.0" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["no-compiler", "/bin/false"])
def test_without_a_compiler_the_build_succeeds_and_says_what_remains(tmp_path: Path, compiler: str) -> None:
    result = build(tmp_path, CXX=compiler, PYTHONPATH=fake_torch(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "without compiled CPU operators: no C++ compiler" in result.stdout and "Triton remain" in result.stdout
    assert compiler in missing(tmp_path)["_cpu"]
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
def test_cuda_without_nvcc_is_an_error(tmp_path: Path) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    result = build(tmp_path, MIRAGE_BUILD_CUDA="1", PATH=str(binaries), CUDA_HOME="", PYTHONPATH=fake_torch(tmp_path))
    assert result.returncode != 0
    assert "needs nvcc" in result.stderr


def fake_nvcc(tmp_path: Path, release: str, archs: str = "") -> str:
    """A PATH on which nvcc only says its release and the architectures it knows."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    known = "".join(f"echo compute_{arch};" for arch in archs.split())
    cases = f"--version) echo release {release}, V{release};; --list-gpu-arch) {known}:;;"
    nvcc.write_text(f'#!/bin/sh\ncase $1 in {cases} *) echo "$@" >> {tmp_path}/log;; esac\n')
    nvcc.chmod(0o755)
    return f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.slow
def test_a_wrong_arch_list_is_named(tmp_path: Path) -> None:
    path = fake_nvcc(tmp_path, "13.0")
    result = build(
        tmp_path, MIRAGE_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0 ampere", PATH=path, PYTHONPATH=fake_torch(tmp_path)
    )
    assert result.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST" in result.stderr and "ampere" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("known", "asked", "chosen"),
    [
        ("75 80 86 89 90 100 120 121", "", "8.0 8.6 8.9 9.0 10.0 12.0+PTX"),
        ("75 80 86 89 90", "", "8.0 8.6 8.9 9.0+PTX"),  # what is later still runs something
        ("75 80 86 89 90", "6.1;9.0a;8.0", "9.0a 8.0"),
        ("", "8.0 9.0", "8.0 9.0"),  # an nvcc that does not say
    ],
)
def test_architectures_are_those_that_nvcc_knows(tmp_path: Path, known: str, asked: str, chosen: str) -> None:
    path = fake_nvcc(tmp_path, "12.4", known)
    arguments = {"MIRAGE_BUILD_CPU": "0", "MIRAGE_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": asked, "PATH": path}
    result = build(tmp_path, **arguments, PYTHONPATH=fake_torch(tmp_path))  # fails: nothing was compiled
    expected = " ".join(
        f"-gencode=arch=compute_{number},code={code}_{number}"
        for arch in chosen.split()
        for number in [arch.removesuffix("+PTX").replace(".", "")]
        for code in (("sm", "compute") if arch.endswith("+PTX") else ("sm",))
    )
    calls = [line for line in (tmp_path / "log").read_text().splitlines() if "-gencode" in line]
    assert calls, result.stdout + result.stderr
    for line in calls:
        assert " ".join(word for word in line.split() if word.startswith("-gencode")) == expected
    assert ("knows" in result.stdout) == (len(chosen.split()) < len(asked.replace(";", " ").split() or "123456"))


@pytest.mark.slow
def test_no_architecture_that_nvcc_knows_is_an_error(tmp_path: Path) -> None:
    path = fake_nvcc(tmp_path, "13.0", "75 80")
    result = build(
        tmp_path, MIRAGE_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="5.0", PATH=path, PYTHONPATH=fake_torch(tmp_path)
    )
    assert result.returncode != 0
    assert "13.0 knows none of the architectures 5.0" in result.stderr


@pytest.mark.slow
def test_an_nvcc_of_another_cuda_than_torch_is_named(tmp_path: Path) -> None:
    path = fake_nvcc(tmp_path, "12.4")
    arguments = {"PYTHONPATH": fake_torch(tmp_path, cuda="13.0"), "PATH": path, "MIRAGE_BUILD_CPU": "0"}
    result = build(tmp_path, **arguments)
    assert result.returncode == 0, result.stderr
    assert "nvcc is of CUDA 12.4 and torch 2.13.0 of CUDA 13.0" in missing(tmp_path)["_cuda"]
    result = build(tmp_path, **arguments, MIRAGE_BUILD_CUDA="1")
    assert result.returncode != 0
    assert "MIRAGE_BUILD_CUDA=1, but nvcc is of CUDA 12.4" in result.stderr and "toolkit of CUDA 13" in result.stderr


def test_build_facts_name_what_matters() -> None:
    facts = build_facts()
    assert facts["torch"] == torch.__version__
    if mirage_kernels.available_backends()["cpu"]:
        assert facts["SIMD"] in ("avx512f", "avx2", "sse2", "neon", "scalar")
        assert "-ffp-contract=off" in facts["flags"]
        assert int(facts["hardware threads"]) >= 1


@pytest.mark.slow
def test_the_module_prints_facts_and_backends() -> None:
    command = [sys.executable, "-m", "mirage_kernels"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for word in ("torch", "compiler", "backends", "reference", "plain PyTorch"):
        assert word in printed


def test_versions_agree() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert version("mirage-kernels") == mirage_kernels.__version__
    except PackageNotFoundError:
        pytest.skip("the package is imported from its sources, not installed")


def test_a_module_that_does_not_load_is_a_warning_not_a_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mirage_kernels import backends

    (tmp_path / "_cpu.so").write_bytes(b"no library")
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
    with pytest.warns(UserWarning, match=r"loading _cpu\.so failed"):
        assert "failed" in str(backends._load_module("_cpu"))


@pytest.mark.slow
def test_compiled_modules_ask_for_their_torch_at_run_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mirage_kernels import backends

    (tmp_path / "_cpu.so").write_bytes(b"no library")
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
    monkeypatch.setattr(torch, "__version__", "2.10.0+cu128")
    assert backends._load_module("_cpu") == (
        "compiled modules need torch >= 2.11 (LibTorch stable ABI), found torch 2.10.0+cu128"
    )


@pytest.mark.slow
def test_a_module_that_was_not_built_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mirage_kernels import backends

    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
    facts = SimpleNamespace(missing={"_cpu": "no C++ compiler at build time"})
    monkeypatch.setitem(sys.modules, "mirage_kernels._build_info", facts)
    assert backends._load_module("_cpu") == "it was not built: no C++ compiler at build time"
    monkeypatch.setitem(sys.modules, "mirage_kernels._build_info", None)
    assert str(backends._load_module("_cpu")).startswith("it was not built: no compiler at install time")


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        ("8.0 9.0", (8, 0), True),
        ("8.0 9.0", (8, 9), True),  # a later minor version
        ("8.9 9.0", (8, 6), False),  # an earlier one
        ("8.0 9.0", (7, 5), False),
        ("8.0 9.0", (10, 0), False),
        ("8.0 9.0+PTX", (10, 0), True),
        ("8.0+PTX 9.0", (12, 1), True),
        ("9.0a", (9, 0), True),
        ("10.0a+PTX", (10, 3), False),  # code of an architecture with a letter runs there alone
        ("12.0+PTX", (9, 0), False),
    ],
)
def test_code_runs_where_cuda_says_it_does(archs: str, capability: tuple[int, int], runs: bool) -> None:
    assert runs_code_for(archs, capability) is runs


@pytest.mark.parametrize("triton", [True, False])
def test_a_gpu_that_nothing_was_compiled_for_uses_the_next_backend(
    monkeypatch: pytest.MonkeyPatch, triton: bool
) -> None:
    from mirage_kernels import backends

    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setitem(sys.modules, "mirage_kernels._build_info", SimpleNamespace(cuda_archs="8.0 9.0+PTX"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(backends, "triton_interpreted", lambda: False)
    monkeypatch.setitem(backends._automatic, "cuda", "cuda")
    monkeypatch.setitem(backends._status, "triton", backends.Backend(triton, ""))
    monkeypatch.setattr(backends, "_without_code", {})
    assert choose_backend(torch.device("cuda", 0), torch.float32) == "cuda"
    expected = "triton" if triton else "reference"
    with pytest.warns(RuntimeWarning, match=rf"8\.0 9\.0\+PTX and GPU 1, Tesla T4, is 7\.5: it uses '{expected}'"):
        assert choose_backend(torch.device("cuda", 1), torch.float32) == expected
    assert choose_backend(torch.device("cuda"), torch.float32) == expected  # the current one, and said once

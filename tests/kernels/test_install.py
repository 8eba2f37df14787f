"""What setup.py says and does where something is missing, and the facts the installed package reports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mirage_kernels
from mirage_kernels.__main__ import build_facts

ROOT = Path(__file__).parents[2]


def run_setup(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "setup.py"), *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_missing_torch_is_explained_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    result = run_setup(tmp_path, "--version", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "install torch first" in result.stderr and "--no-build-isolation" in result.stderr
    assert "Traceback" not in result.stderr


def test_old_torch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("__version__ = '2.9.1'")
    result = run_setup(tmp_path, "--version", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "torch >= 2.11" in result.stderr and "2.9.1" in result.stderr


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    return run_setup(tmp_path, "build_ext", *folders, **environment)


def test_without_a_compiler_the_build_succeeds_and_says_what_remains(tmp_path: Path) -> None:
    result = build(tmp_path, CXX=str(tmp_path / "no-compiler"))
    assert result.returncode == 0, result.stderr
    assert "without compiled CPU operators" in result.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_cuda_without_nvcc_is_an_error(tmp_path: Path) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    result = build(tmp_path, MIRAGE_BUILD_CUDA="1", PATH=str(binaries), CUDA_HOME="", CUDA_PATH="")
    assert result.returncode != 0
    assert "needs nvcc" in result.stderr


def test_a_wrong_arch_list_is_named(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho release 13.0, V13.0\n")
    nvcc.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = build(tmp_path, MIRAGE_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0 ampere", PATH=path)
    assert result.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST" in result.stderr and "ampere" in result.stderr


def test_build_facts_name_what_matters() -> None:
    facts = build_facts()
    assert facts["torch"] == torch.__version__
    if mirage_kernels.available_backends()["cpu"]:
        assert facts["SIMD"] in ("avx512f", "avx2", "sse2", "neon", "scalar")
        assert "-ffp-contract=off" in facts["flags"]
        assert int(facts["hardware threads"]) >= 1


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

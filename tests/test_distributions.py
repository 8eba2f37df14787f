"""mirage-kernels and mirage-world built and installed as their users do, in environments that hold neither.

Nothing is downloaded: a fresh environment sees what the tests' own has, less the two distributions and less what a
build may not need. Weights are left out of the copied checkout, which only makes it smaller.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from mirage_kernels import __version__

pytestmark = pytest.mark.slow

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.py").exists())
WORLD = "packages/mirage-world"
OURS = ("mirage", "__editable__", "_mirage")
NOT_NEEDED = ("ninja", "pybind11", "wheel")  # a build from a fresh environment must do without


class Environment(NamedTuple):
    """A fresh virtual environment, whose commands run outside the checkout and without our environment variables."""

    folder: Path

    @property
    def site_packages(self) -> Path:
        return self.folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"

    def run(self, *command: str | Path, cwd: Path | None = None, **variables: str) -> str:
        dropped = ("PYTHONPATH", "MIRAGE_", "TORCH_CUDA", "CUDA_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        result = subprocess.run(
            [self.folder / "bin" / command[0], *command[1:]],
            cwd=cwd or self.folder,
            env={**environment, "OMP_NUM_THREADS": "1", **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
        return result.stdout

    def pip(self, *arguments: str | Path, cwd: Path | None = None, **variables: str) -> str:
        variables = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1", **variables}
        return self.run("python", "-m", "pip", *arguments, cwd=cwd, **variables)


def make_environment(folder: Path) -> Environment:
    """A virtual environment that sees what this one has installed, by links, but for our own packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    links = folder / "linked"
    links.mkdir()
    for path in map(Path, sys.path):
        if path.name in ("site-packages", "dist-packages") and path.is_dir():
            for entry in path.iterdir():
                other = not entry.name.startswith((*OURS, *NOT_NEEDED)) and entry.suffix != ".pth"
                if other and not (links / entry.name).exists():
                    (links / entry.name).symlink_to(entry)
    environment = Environment(folder)
    (environment.site_packages / "linked.pth").write_text(f"{links}\n")
    return environment


def copy_checkout(folder: Path) -> Path:
    """What a fresh clone holds of what is built, and leftovers of a build before mirage moved out of mirage-kernels."""

    def copy(source: str, target: str) -> None:
        if source.endswith(".safetensors"):
            Path(target).write_bytes(b"weights")
        else:
            shutil.copy(source, target)

    ignore = shutil.ignore_patterns("*.so", "*.pyc", "__pycache__", "_build_info.py", "build", "*.egg-info")
    for name in ("mirage", "mirage_kernels", "csrc", "configs", "packages"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore, copy_function=copy)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    compiled = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for place in (
        "build/lib/mirage",
        "build/lib/mirage_kernels",
        f"build/{compiled}/mirage",
        f"{WORLD}/build/lib/mirage",
    ):
        (folder / place).mkdir(parents=True)
        (folder / place / "stale.py").write_text("")
    (folder / "mirage_kernels.egg-info").mkdir()
    (folder / "mirage_kernels.egg-info" / "SOURCES.txt").write_text("mirage/__init__.py\nmirage_kernels/__init__.py\n")
    return folder


class Distributions(NamedTuple):
    """Paths of what was built, and the environment and the checkout it was built with."""

    environment: Environment
    checkout: Path
    kernels_sdist: Path
    kernels_wheel: Path  # of the sdist, compiled without ninja
    world_sdist: Path
    world_wheel: Path  # of the sdist
    world_wheel_of_checkout: Path


BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def without_torch(folder: Path) -> str:
    """A PYTHONPATH on which torch cannot be imported: builds then take less time."""
    folder.mkdir(exist_ok=True)
    (folder / "torch.py").write_text("raise ImportError")
    return str(folder)


def build_all(folder: Path) -> None:
    environment = make_environment(folder / "environment")
    checkout = copy_checkout(folder / "a checkout: of $HOME")
    quick = {"PYTHONPATH": without_torch(folder / "quick")}
    environment.run("python", "-c", BUILD_SDIST, folder / "kernels-sdist", cwd=checkout, **quick)
    environment.run("python", "-c", BUILD_SDIST, folder / "world-sdist", cwd=checkout / WORLD)
    wheel = ("wheel", "-q", "--no-deps", "--no-build-isolation", "-w")
    (world_sdist,) = (folder / "world-sdist").iterdir()
    environment.pip(*wheel, folder / "world-wheel", world_sdist)
    environment.pip(*wheel, folder / "world-wheel-of-checkout", checkout / WORLD)

    # A compiler that takes less time, as for `make asan`, and a PATH without ninja. pip unpacks into TMPDIR.
    compiler = folder / "a compiler"
    found = shlex.quote(str(shutil.which((os.environ.get("CXX") or "c++").split()[0])))
    compiler.write_text(f'#!/bin/sh\nPATH={shlex.quote(os.environ["PATH"])} exec {found} "$@" -O1 -DMIRAGE_NO_CLONES\n')
    compiler.chmod(0o755)
    (folder / "a temporary folder").mkdir()
    variables = {
        "CXX": shlex.quote(str(compiler)),
        "PATH": str(folder),
        "TMPDIR": str(folder / "a temporary folder"),
        "MIRAGE_BUILD_CPU": "1",
        "MIRAGE_BUILD_CUDA": "0",
    }
    (kernels_sdist,) = (folder / "kernels-sdist").iterdir()
    environment.pip(*wheel, folder / "kernels-wheel", kernels_sdist, **variables)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Both distributions, built once, also where several processes run the tests."""
    if shutil.which((os.environ.get("CXX") or "c++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributions"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            build_all(folder)
            (folder / "done").touch()
    names = ("kernels-sdist", "kernels-wheel", "world-sdist", "world-wheel", "world-wheel-of-checkout")
    files = [next((folder / name).iterdir()) for name in names]
    return Distributions(Environment(folder / "environment"), folder / "a checkout: of $HOME", *files)


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def metadata_of(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return archive.read(name).decode()


def sources(package: str) -> set[str]:
    """Every file of a package in the repository that belongs into its wheel."""
    generated = ("_build_info.py", ".so", ".pyc")
    files = (path for path in (ROOT / package).rglob("*") if path.is_file() and not path.name.endswith(generated))
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_each_wheel_holds_all_of_its_package_and_nothing_else(built: Distributions) -> None:
    kernels, world = files_of(built.kernels_wheel), files_of(built.world_wheel)
    compiled = {name for name in kernels if name.endswith(".so")}
    assert len(compiled) == 1
    assert kernels - compiled == sources("mirage_kernels") | {"mirage_kernels/_build_info.py"}
    assert world == sources("mirage")
    assert files_of(built.world_wheel_of_checkout) == world
    assert f"\nVersion: {__version__}\n" in metadata_of(built.kernels_wheel)
    assert f"\nVersion: {__version__}\n" in metadata_of(built.world_wheel)
    assert f"\nRequires-Dist: mirage-kernels=={__version__}\n" in metadata_of(built.world_wheel)


def test_no_sdist_holds_a_module_of_the_other(built: Distributions) -> None:
    modules = []
    for sdist in (built.kernels_sdist, built.world_sdist):
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        assert "LICENSE" in names and not any(".." in name for name in names)
        modules.append({name for name in names if name.startswith("mirage") and name.endswith(".py")})
    assert {name.partition("/")[0] for name in modules[0]} == {"mirage_kernels"}
    assert {name.partition("/")[0] for name in modules[1]} == {"mirage"}


def test_both_licences_are_one() -> None:
    assert (ROOT / WORLD / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


USE = """
import torch, mirage, mirage_kernels
from mirage_kernels import Cameras, LatentCache
cache = LatentCache(channels=8)
intrinsics = torch.tensor([[[50.0, 0, 32], [0, 50, 32], [0, 0, 1]]])
cameras = Cameras(intrinsics, torch.eye(4)[None], (64, 64))
cache.write(torch.randn(1, 8, 4, 4), torch.full((1, 64, 64), 2.0), cameras)
assert cache.read(cameras, size=(4, 4)).mask.all()
assert mirage_kernels.available_backends()["cpu"], mirage_kernels.available_backends()
print(mirage.__file__, mirage_kernels.__file__)
"""


def test_wheels_work_in_a_fresh_environment_outside_the_checkout(built: Distributions, tmp_path: Path) -> None:
    environment = make_environment(tmp_path / "an environment")
    environment.pip("install", "-q", "--no-deps", built.kernels_wheel, built.world_wheel)
    for place in environment.run("python", "-c", USE).split(".py"):
        assert place.strip() == "" or place.strip().startswith(str(environment.site_packages))
    assert "mirage_kernels" not in environment.run("mirage", "--help").splitlines()[0]
    assert __version__ in environment.run("mirage", "--version")
    printed = environment.run("python", "-m", "mirage_kernels")
    assert "compiled C++ operators" in printed and "SIMD" in printed
    assert "MIRAGE_BUILD_CUDA=0 left it out" in printed or "has no CUDA" in printed
    complaints = subprocess.run(
        [environment.folder / "bin" / "python", "-m", "pip", "check"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    assert not [line for line in complaints if line.startswith("mirage")]


def make_foreign_wheel(folder: Path) -> Path:
    """A wheel of another project whose package is called mirage too."""
    texts = {
        "mirage/__init__.py": "WHOSE = 'theirs'\n",
        "mirage/memory.py": "",
        "theirs-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n",
        "theirs-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},\n"
        for name, text in texts.items()
    )
    path = folder / "theirs-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in texts.items():
            archive.writestr(name, text)
        archive.writestr("theirs-1.0.dist-info/RECORD", record + "theirs-1.0.dist-info/RECORD,,\n")
    return path


def test_another_package_called_mirage_lives_beside_mirage_kernels(built: Distributions, tmp_path: Path) -> None:
    environment = make_environment(tmp_path / "environment")
    wheels = {"theirs": make_foreign_wheel(tmp_path), "mirage-kernels": built.kernels_wheel}
    expected = {
        "theirs": {"mirage/__init__.py", "mirage/memory.py"},
        "mirage-kernels": files_of(built.kernels_wheel),
    }

    def installed() -> set[str]:
        packages = [environment.site_packages / name for name in ("mirage", "mirage_kernels")]
        files = {
            path for package in packages for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"
        }
        return {path.relative_to(environment.site_packages).as_posix() for path in files}

    for first, second in (("theirs", "mirage-kernels"), ("mirage-kernels", "theirs")):
        for removed, kept in ((first, second), (second, first)):
            environment.pip("install", "-q", "--no-deps", wheels[first])
            environment.pip("install", "-q", "--no-deps", wheels[second])
            assert installed() == expected["theirs"] | expected["mirage-kernels"]
            assert (environment.site_packages / "mirage" / "__init__.py").read_text() == "WHOSE = 'theirs'\n"
            environment.pip("uninstall", "-q", "-y", removed)
            assert installed() == expected[kept]
            environment.pip("uninstall", "-q", "-y", kept)
            assert not installed()


def test_editable_installs_use_the_checkout(built: Distributions, tmp_path: Path) -> None:
    environment = make_environment(tmp_path / "environment")
    quick = {"PYTHONPATH": without_torch(tmp_path / "quick")}
    arguments = ("install", "-q", "--no-deps", "--no-build-isolation", "-e", ".", "-e", f"./{WORLD}")
    environment.pip(*arguments, cwd=built.checkout, **quick)
    code = (
        "import importlib.util as u; print(*(u.find_spec(n).origin for n in ('mirage', 'mirage_kernels')), sep='\\n')"
    )
    found = environment.run("python", "-c", code).splitlines()
    assert [Path(line).resolve() for line in found] == [
        (built.checkout / name / "__init__.py").resolve() for name in ("mirage", "mirage_kernels")
    ]
    # Only the two packages: not the tests, nor whatever else lies in the repository's folder.
    listed = environment.run("python", "-c", "import importlib.util as u; print(u.find_spec('csrc'))")
    assert listed.strip() == "None"
    facts = (built.checkout / "mirage_kernels" / "_build_info.py").read_text()
    assert "install torch first" in facts


def test_ninja_builds_where_paths_hold_spaces(built: Distributions, tmp_path: Path) -> None:
    ninja = shutil.which("ninja", path=os.pathsep.join((os.environ["PATH"], str(Path(sys.executable).parent))))
    if ninja is None:
        pytest.skip("no ninja on PATH")
    checkout = tmp_path / "a $checkout: again"
    shutil.copytree(built.checkout, checkout, ignore=shutil.ignore_patterns("mirage", "build"))
    for source in (checkout / "csrc" / "cpu").glob("*.cpp"):  # one file is enough
        if source.name != "build_info.cpp":
            source.unlink()
    variables = {
        "PATH": os.pathsep.join((str(Path(ninja).parent), os.environ["PATH"])),
        "MIRAGE_BUILD_CUDA": "0",
        "MIRAGE_BUILD_CPU": "1",
    }
    command = ("python", "setup.py", "build_ext", "--inplace")
    built.environment.run(*command, cwd=checkout, **variables)
    assert len(list((checkout / "mirage_kernels").glob("_cpu*.so"))) == 1
    assert "no work to do" in built.environment.run(*command, cwd=checkout, **variables)

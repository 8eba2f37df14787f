"""Finds the package `mirage` of mirage-world: at the root of the repository, or beside this file in an sdist.

The version has one source, mirage_kernels/version.py, and mirage-world depends on the mirage-kernels of that version.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).parent.resolve()
UNPACKED = (HERE / "PKG-INFO").exists()  # an sdist, which holds its own sources
ROOT = HERE if UNPACKED else HERE.parents[1]
SETUPTOOLS_FLOOR = 77  # reads license = "Apache-2.0"

if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS_FLOOR:
    sys.exit(
        f"mirage-world needs setuptools >= {SETUPTOOLS_FLOOR} to build, found {setuptools.__version__}:"
        f' run `pip install "setuptools>={SETUPTOOLS_FLOOR}"` first.'
    )
if not (ROOT / "mirage" / "__init__.py").exists():
    sys.exit(f"mirage-world builds from the whole repository, and there is no package mirage in {ROOT}.")


def version() -> str:
    if UNPACKED:
        return str(email.message_from_string((HERE / "PKG-INFO").read_text(encoding="utf-8"))["Version"])
    found = re.search(r'__version__ = "(.+)"', (ROOT / "mirage_kernels" / "version.py").read_text(encoding="utf-8"))
    if found is None:
        sys.exit("mirage_kernels/version.py must say __version__.")
    return found[1]


class BuildPackage(build_py):
    """The package, without files that an earlier build left in the build folder: a wheel holds all that lies there."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "mirage", ignore_errors=True)
        super().run()


class SelfContained(sdist):
    """An sdist with the package in it, at its top, and the configurations beside it."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        outside = [name for name in files if name.startswith(os.pardir)]
        super().make_release_tree(base_dir, [name for name in files if name not in set(outside)])
        if UNPACKED:
            return
        configs = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
        for source in [(HERE / name).resolve() for name in outside] + configs:
            target = Path(base_dir) / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


setup(
    version=version(),
    packages=find_packages(str(ROOT), include=["mirage", "mirage.*"]),
    package_dir={"mirage": Path(os.path.relpath(ROOT / "mirage", HERE)).as_posix()},
    package_data={"mirage": ["py.typed", "mirage-tiny/**"]},
    include_package_data=False,
    install_requires=[f"mirage-kernels=={version()}", "tyro>=1.0,<2"],
    cmdclass={"build_py": BuildPackage, "sdist": SelfContained},
)

"""A pytest plugin: one line of JSON for everything that happens to a test, in the file ``$MUTATION_RECORD``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings


def write(event: str, test: str, message: str = "") -> None:
    with open(os.environ["MUTATION_RECORD"], "a") as file:
        file.write(json.dumps({"event": event, "test": test, "message": message}) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    import mirage_kernels

    if not Path(mirage_kernels.__file__).is_relative_to(config.rootpath):
        pytest.exit(f"mirage_kernels is not that of {config.rootpath}, but {mirage_kernels.__file__}", returncode=3)


def pytest_collection() -> None:
    # A failing example is enough: the search for a smaller one takes minutes.
    settings.register_profile("mutation", settings.default, phases=(Phase.explicit, Phase.generate))
    settings.load_profile("mutation")


def pytest_runtest_logstart(nodeid: str, location: object) -> None:
    write("start", nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        lines = str(report.longrepr).splitlines()
        write("failed" if report.when == "call" else "error", report.nodeid, "\n".join(lines[-12:]))
    elif report.passed and report.when == "call":
        write("passed", report.nodeid)

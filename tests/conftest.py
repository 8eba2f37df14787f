"""Fixtures of the whole suite: the shared data, and the backends every operator test runs on.

An operator test asks for ``backend`` and runs once per backend: ``reference`` always; ``cpu`` (skipped with the reason
where it was not built, a failure when MIRAGE_REQUIRE_CPU=1); ``triton`` on CPU tensors under TRITON_INTERPRET=1; and,
marked ``cuda``, both GPU backends on CUDA tensors, skipped with the reason where there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings

from mirage_kernels import available_backends, use_backend
from mirage_kernels.environment import triton_interpreted

settings.register_profile(
    "mirage",
    max_examples=25,
    deadline=None,
    derandomize=True,
    # The `backend` fixture is the same for every example of a test, so sharing it between them is safe.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("mirage")


class Target(NamedTuple):
    """A forced backend and the device its tensors live on."""

    name: str
    device: torch.device

    def put(self, value: Any) -> Any:
        """Tensors to the device, anything else as it is."""
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    def sync(self) -> None:
        """Wait for the device, so that a fault in a kernel surfaces in the test that caused it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


TARGETS = [("reference", "cpu"), ("cpu", "cpu")]
if triton_interpreted():
    TARGETS.append(("triton", "cpu"))
GPU_TARGETS = [("cuda", "cuda"), ("triton", "cuda")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first, so that the others run beside it.
    items.sort(key=lambda item: item.name != "test_comparisons_in_the_interpreter")


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Here and not in a fixture, so that pytest folds all these skips into one line of its summary.
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip(f"no GPU: torch {torch.__version__} sees no CUDA device")


def _params(targets: list[tuple[str, str]]) -> list[Any]:
    return [
        pytest.param(
            target,
            id=target[0] if target[0] == target[1] or target[1] == "cpu" else "-".join(target),
            marks=[pytest.mark.cuda] if target[1] == "cuda" else [],
        )
        for target in targets
    ]


def require_target(name: str, device: str) -> Target:
    """The target, or a skip that says why not; a failure when this run promised the backend."""
    status = available_backends()[name]
    if not status:
        reason = f"backend {name!r} is not available: {status.reason}"
        if name == "cpu" and os.environ.get("MIRAGE_REQUIRE_CPU") == "1":
            pytest.fail(f"MIRAGE_REQUIRE_CPU=1, but {reason}")
        pytest.skip(reason)
    return Target(name, torch.device(device))


@pytest.fixture(params=_params(TARGETS + GPU_TARGETS))
def backend(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend in turn, forced while the test runs."""
    target = require_target(*request.param)
    with use_backend(target.name):
        yield target


@pytest.fixture(params=_params([target for target in TARGETS + GPU_TARGETS if target[0] != "reference"]))
def kernels(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend but the definition, forced while the test runs."""
    target = require_target(*request.param)
    with use_backend(target.name):
        yield target


@pytest.fixture
def cpu_backend() -> Iterator[Target]:
    """The compiled CPU operators, forced while the test runs."""
    target = require_target("cpu", "cpu")
    with use_backend("cpu"):
        yield target


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The project's shared data: ``$MIRAGE_SHARED``, else ``../shared`` beside the repository root."""
    named = os.environ.get("MIRAGE_SHARED")
    path = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        where = "which $MIRAGE_SHARED names" if named else "and $MIRAGE_SHARED is not set"
        pytest.skip(f"shared data absent: no directory {path}, {where}")
    return path


@pytest.fixture
def threads() -> Iterator[Any]:
    """``torch.set_num_threads``, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

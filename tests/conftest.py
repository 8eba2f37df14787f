"""Fixtures of the whole suite: the shared data, and the backends every operator test runs on.

An operator test asks for ``backend`` and runs once per backend: ``reference`` always; ``cpu`` (skipped with the reason
where it was not built, a failure when MIRAGE_REQUIRE_CPU=1); ``emulated``, the CUDA sources run on the CPU in an order
of threads that the test's name chooses; ``triton`` on CPU tensors under TRITON_INTERPRET=1; and, marked ``cuda``, both
GPU backends on CUDA tensors, where there is a GPU or MIRAGE_GPU_TESTS=1 asks for them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cuda_emulator.build import VARIANTS, NotSupported
from emulated import Order, choose_order, load_emulated
from hypothesis import HealthCheck, settings

from mirage_kernels import available_backends, use_backend
from mirage_kernels.environment import triton_interpreted
from mirage_kernels.ops.operator import OPERATORS

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
    """A forced backend and the device its tensors live on.

    ``emulated``: what the backend ``cpu`` would run is done by the CUDA kernels in the emulator.
    """

    name: str
    device: torch.device
    emulated: bool = False

    @property
    def slow(self) -> bool:
        """Whether every thread of a kernel is one of the interpreter's or the emulator's: small scenes only."""
        return self.emulated or (self.name == "triton" and self.device.type == "cpu")

    def put(self, value: Any) -> Any:
        """Tensors to the device, anything else as it is."""
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    def sync(self) -> None:
        """Wait for the device, so that a fault in a kernel surfaces in the test that caused it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


GPU_TESTS = torch.cuda.is_available() or os.environ.get("MIRAGE_GPU_TESTS") == "1"
NATIVE = [("cpu", "cpu")]
"""The kernels that PyTorch knows as the package's: not those in the emulator."""
if triton_interpreted():
    NATIVE.append(("triton", "cpu"))
if GPU_TESTS:
    NATIVE += [("cuda", "cuda"), ("triton", "cuda")]
# Under an address sanitizer (`make asan`) it is the C++ operators that run: the emulator has checks of its own.
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")
KERNELS = [NATIVE[0], *([] if SANITIZED else [("emulated", "cpu")]), *NATIVE[1:]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first, so that the others run beside it.
    items.sort(key=lambda item: item.name != "test_comparisons_in_the_interpreter")


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Here and not in a fixture, so that pytest folds all these skips into one line of its summary.
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip(f"no GPU: torch {torch.__version__} sees no CUDA device")


# What is not checked where tests are skipped: a part of the reason, and how the summary says it.
REASONS = {
    "shared data absent": "no shared data",
    "no GPU": "no GPU",
    "needs a GPU": "no GPU",
    "need a GPU": "no GPU",
    "is not installed": "a package is missing",
    "No module named": "a package is missing",
    "could not import": "a package is missing",
    "was not built": "no compiled CPU operators",
    "is not available": "no compiled CPU operators",
    "no C++ compiler": "no C++ compiler",
}


@pytest.hookimpl(wrapper=True, tryfirst=True)  # its line is the last
def pytest_terminal_summary(terminalreporter: Any) -> Iterator[None]:
    """Say in one line what this run did not check, and why."""
    yield
    missing: dict[str, dict[str, int]] = {} if GPU_TESTS else {"no GPU": {"GPU backends": 0}}
    for report in terminalreporter.stats.get("skipped", []):
        said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = next((short for part, short in REASONS.items() if part in said), said.removeprefix("Skipped: "))
        what = Path(report.nodeid.partition("::")[0]).stem.removeprefix("test_").replace("_", " ")
        if "[room" in report.nodeid and what == "golden":
            what = "golden parity on the real room"
        count = missing.setdefault(reason, {})
        count[what] = count.get(what, 0) + 1
    if missing:
        parts = [
            ", ".join(f"{what} ({number} tests)" if number else what for what, number in by.items()) + f" ({reason})"
            for reason, by in sorted(missing.items())
        ]
        terminalreporter.write_line("not checked here: " + "; ".join(parts), yellow=True)


def _params(targets: list[tuple[str, str]]) -> list[Any]:
    return [
        pytest.param(
            target,
            id=target[0] if target[0] == target[1] or target[1] == "cpu" else "-".join(target),
            # The emulator is slow to build and to run: what the fast tests know is the definition and C++.
            marks=[pytest.mark.cuda] * (target[1] == "cuda") + [pytest.mark.slow] * (target[0] == "emulated"),
        )
        for target in targets
    ]


def require_target(name: str, device: str) -> Target:
    """Return the target, or skip and say why not; fail when this run promised the backend."""
    status = available_backends()[name]
    if not status:
        reason = f"backend {name!r} is not available: {status.reason}"
        if name == "cpu" and os.environ.get("MIRAGE_REQUIRE_CPU") == "1":
            pytest.fail(f"MIRAGE_REQUIRE_CPU=1, but {reason}")
        pytest.skip(reason)
    return Target(name, torch.device(device))


@contextmanager
def emulate(order: Order, variant: str = "") -> Iterator[Target]:
    """Have the public functions run the emulated CUDA kernels; the operators that ``variant`` lacks are the usual ones.

    Skips where there is no compiler to build the emulator.
    """
    require_target("cpu", "cpu")
    try:
        emulated = load_emulated()
    except NotSupported as reason:
        pytest.skip(str(reason))
    with pytest.MonkeyPatch.context() as patch, use_backend("cpu"):
        for name in OPERATORS:
            chosen = variant if variant and name in VARIANTS[variant][1] else ""
            patch.setitem(OPERATORS[name].overloads, "compiled", emulated.overload(f"{name}_compiled", order, chosen))
        yield Target("cpu", torch.device("cpu"), emulated=True)


@contextmanager
def forced(name: str, device: str, test: str) -> Iterator[Target]:
    """Force a target while a test runs."""
    if name == "emulated":
        with emulate(choose_order(test)) as target:
            yield target
        return
    target = require_target(name, device)
    with use_backend(target.name):
        yield target


@pytest.fixture(params=_params([("reference", "cpu"), *KERNELS]))
def backend(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend in turn, forced while the test runs."""
    with forced(*request.param, request.node.name) as target:
        yield target


@pytest.fixture(params=_params(KERNELS))
def kernels(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend but the definition, forced while the test runs."""
    with forced(*request.param, request.node.name) as target:
        yield target


@pytest.fixture(params=_params(NATIVE))
def native_kernels(request: pytest.FixtureRequest) -> Iterator[Target]:
    """As ``kernels``, but for the emulator: for tests of what PyTorch is told about the operators."""
    with forced(*request.param, request.node.name) as target:
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

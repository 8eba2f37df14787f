"""Which kernels run: found once at import, chosen by the tensors' device, forced with :class:`use_backend`.

And on how many threads in a process that is a fork of another, :func:`settle_threads`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import threading
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch

from .environment import triton_interpreted

BACKENDS = ("cuda", "triton", "cpu", "reference")
COMPILED_TORCH_FLOOR = (2, 11)  # of the stable ABI that the compiled modules use; setup.py has it too


class Backend(NamedTuple):
    """Whether a backend can be used here, and why (not). Truthy when it can."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


_status: dict[str, Backend] = {}
_automatic: dict[str, str] = {}  # device type: the best backend there
_without_code: dict[int, bool] = {}  # GPU: whether it is of no architecture that was compiled for, where that was asked
_forced: ContextVar[str | None] = ContextVar("mirage_kernels.backend", default=None)


class _Traced(threading.local):
    """The backend that this thread forced last: `torch.compile` knows thread-locals, but no context variables."""

    def __init__(self) -> None:  # in every thread that asks
        self.forced: str | None = None


_traced = _Traced()
_threads_at_fork: int | None = None  # in a process that was forked, until its threads are settled


def find_module(stem: str) -> Path | None:
    """Find the file of a compiled module, ``_cpu`` or ``_cuda``; None where it was not built."""
    folder = Path(__file__).parent
    found = sorted(folder.glob(f"{stem}.*so")) + sorted(folder.glob(f"{stem}.*pyd"))
    return found[0] if found else None


def _why_not_built(stem: str) -> str:
    try:
        missing = importlib.import_module("mirage_kernels._build_info").missing
    except (ImportError, AttributeError):
        missing = {}
    reason = missing.get(stem, "no compiler at install time (see `python -m mirage_kernels`)")
    return f"it was not built: {reason}"


def _load_module(stem: str) -> str | None:
    """Load a compiled module's registrations; returns why that failed, or None."""
    path = find_module(stem)
    if path is None:
        return _why_not_built(stem)
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < COMPILED_TORCH_FLOOR:
        return f"compiled modules need torch >= 2.11 (LibTorch stable ABI), found torch {torch.__version__}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # Not built is a choice; built and not loading is a fault, which slower kernels must not hide.
        warnings.warn(f"mirage_kernels: loading {path.name} failed, falling back: {error}", stacklevel=2)
        return f"loading {path.name} failed: {error}"
    return None


def _find_cpu() -> Backend:
    failure = _load_module("_cpu")
    return Backend(failure is None, failure or "compiled C++ operators")


def _find_cuda() -> Backend:
    if torch.version.cuda is None:
        return Backend(False, f"torch {torch.__version__} has no CUDA")
    failure = _load_module("_cuda")
    if failure is not None:
        return Backend(False, failure.replace("no compiler", "no nvcc"))
    if not torch.cuda.is_available():
        return Backend(False, "built, but no CUDA device is visible")
    return Backend(True, "compiled CUDA operators")


def runs_code_for(archs: str, capability: tuple[int, int]) -> bool:
    """Return whether a module compiled for some architectures has code for a GPU of a compute capability.

    Machine code runs on GPUs of the same major version and at least the same minor one, that of an architecture with a
    letter ("9.0a") on this one alone; PTX is compiled by the driver, for any later GPU (CUDA's binary compatibility).

    Args:
        archs: as setup.py lists them, "8.0 9.0a 12.0+PTX".
        capability: (major, minor).
    """
    for arch in archs.split():
        number = arch.removesuffix("+PTX")
        major, minor = (int(part) for part in re.findall(r"\d+", number))
        specific = not number[-1].isdigit()
        if (major, minor) == capability or (not specific and major == capability[0] and minor < capability[1]):
            return True
        if arch.endswith("+PTX") and not specific and (major, minor) < capability:
            return True
    return False


def _lacks_code(index: int) -> bool:
    """Return whether the compiled CUDA operators have no code for a GPU, and say so once. Starts CUDA."""
    if index not in _without_code:
        archs = str(getattr(importlib.import_module("mirage_kernels._build_info"), "cuda_archs", ""))
        capability = torch.cuda.get_device_capability(index)
        _without_code[index] = bool(archs) and not runs_code_for(archs, capability)
        if _without_code[index]:
            number = ".".join(map(str, capability))
            warnings.warn(
                f"mirage_kernels: the CUDA operators were compiled for {archs} and GPU {index},"
                f" {torch.cuda.get_device_name(index)}, is {number}: it uses {_beside_cuda()!r} instead, slower."
                f' Install again with TORCH_CUDA_ARCH_LIST="{number}"',
                RuntimeWarning,
                stacklevel=2,
            )
    return _without_code[index]


def _beside_cuda() -> str:
    """Return the best backend for CUDA tensors without the compiled operators."""
    return "triton" if _status["triton"] and not triton_interpreted() else "reference"


def _find_triton(import_kernels: Callable[[], None]) -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend(False, "the package `triton` is not installed")
    if not triton_interpreted() and not torch.cuda.is_available():
        return Backend(False, "no GPU is visible; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly")
    try:
        import_kernels()
    except Exception as error:  # a broken Triton must not break the import of the package
        return Backend(False, f"importing the Triton kernels failed: {type(error).__name__}: {error}")
    return Backend(True, "Triton interpreter" if triton_interpreted() else "Triton kernels")


def find_backends(import_triton_kernels: Callable[[], None]) -> None:
    """Load what is installed. Called once, at import of the package."""
    _status["cuda"] = _find_cuda()
    _status["triton"] = _find_triton(import_triton_kernels)
    _status["cpu"] = _find_cpu()
    _status["reference"] = Backend(True, "plain PyTorch, the definition")
    for device, order in (("cuda", ("cuda", "triton", "reference")), ("cpu", ("cpu", "reference"))):
        _automatic[device] = next(name for name in order if _status[name])


def available_backends() -> dict[str, Backend]:
    """Return the backends by name, best first: ``(available, reason)``, the reason saying why not where it is not.

    CUDA tensors use ``cuda``, else ``triton``, else ``reference``; CPU tensors use ``cpu``, else ``reference``. A GPU
    that ``cuda`` was not compiled for uses the next one, which is found, and said in a warning, at the first call on it
    (not within ``torch.compile``). float64 tensors are always computed by ``reference``: the kernels work in float32.
    """
    return dict(_status)


class use_backend:
    """Force one backend in the current context, until undone or until the ``with`` block ends.

    ``use_backend("reference")`` as a statement, or ``with use_backend("triton"):``; ``use_backend(None)`` chooses by
    device again. Other threads keep theirs. A thread that is started while a backend is forced begins without one,
    unless it runs in a copy of the context (``contextvars.copy_context().run``, as ``asyncio.to_thread`` does); an
    asyncio task begins with that of its creator. Code that :func:`torch.compile` compiled is compiled again where its
    thread has forced another one; it knows threads, but no copies of contexts.

    Raises:
        ValueError: ``name`` is no backend.
        RuntimeError: the backend is not available here; the message says why.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            if name not in BACKENDS:
                raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")
            if not _status[name]:
                raise RuntimeError(f"backend {name!r} is not available: {_status[name].reason}")
        self._previous = _forced.get()
        self._set(name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        self._set(self._previous)  # and not by a token: a generator may be closed in another context

    @staticmethod
    def _set(name: str | None) -> None:
        _forced.set(name)
        _traced.forced = name


def choose_backend(device: torch.device, dtype: torch.dtype, compiling: bool = False) -> str:
    """Choose the backend for tensors of this device and working dtype; `compiling`, for `torch.compile` to trace.

    Raises:
        RuntimeError: the forced backend cannot take them.
    """
    if compiling:
        forced = _traced.forced
    else:
        forced = _forced.get()
        if _threads_at_fork is not None:
            settle_threads()
    if forced is not None:
        if forced == "reference":
            return forced
        if dtype == torch.float64:
            raise RuntimeError(
                f"backend {forced!r} works in float32, got float64: only 'reference' computes in float64"
            )
        runs_on = {"cuda": ("cuda",), "cpu": ("cpu",), "triton": ("cuda", "cpu") if triton_interpreted() else ("cuda",)}
        if device.type not in runs_on[forced]:
            raise RuntimeError(f"backend {forced!r} runs on {' or '.join(runs_on[forced])} tensors, got {device}")
        return forced
    if dtype == torch.float64:
        return "reference"
    backend = _automatic.get(device.type, "reference")
    # Not at import: asking a GPU starts CUDA, which a process that forks later must not. Nor where code is traced.
    if backend == "cuda" and not compiling:
        index = torch.cuda.current_device() if device.index is None else device.index
        if _without_code.get(index, True) and _lacks_code(index):
            return _beside_cuda()
    return backend


def settle_threads() -> None:
    """Have torch compute on one thread, in a process forked from one where it had several: it would wait for ever.

    OpenMP's threads are not in the child, and GNU's library does not notice. Where the number of threads was set since
    the fork, as a DataLoader's worker does, it stays.
    """
    global _threads_at_fork
    before, _threads_at_fork = _threads_at_fork, None
    if before is not None and before > 1 and torch.get_num_threads() == before:
        torch.set_num_threads(1)
        warnings.warn(
            "mirage_kernels: this process is a fork of one in which torch had several threads, which are not here: it"
            " uses one from now on. Start it by spawn or forkserver to have several",
            RuntimeWarning,
            stacklevel=2,
        )


def _note_fork() -> None:
    global _threads_at_fork
    _threads_at_fork = torch.get_num_threads()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_note_fork)

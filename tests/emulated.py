"""The CUDA operators' own source files as operators of PyTorch, run on the CPU by ``cuda_emulator``.

The emulator stops at every race, unwritten value and access out of bounds, in an order of threads that can be chosen.
It cannot check what only a GPU has: its compiler, its memory model, its speed.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from cuda_emulator.build import NAMESPACE, VARIANTS, build

from mirage_kernels.ops.operator import OPERATORS


class Order(NamedTuple):
    """The order in which threads and blocks run, and the byte that memory holds before anything is written."""

    policy: int
    seed: int = 0
    poison: int = 0xCD
    processors: int = 1


ASCENDING, DESCENDING = Order(0), Order(1, poison=0xFF)
ORDERS = (ASCENDING, DESCENDING, Order(2, seed=1), Order(2, seed=2, poison=0x00, processors=3))
NAMES = {ASCENDING: "ascending", DESCENDING: "descending", ORDERS[2]: "random 1", ORDERS[3]: "random 2"}


def choose_order(test: str) -> Order:
    """Choose one of the orders by a test's name, always the same: over the suite all have their turn."""
    return ORDERS[zlib.crc32(test.encode()) % len(ORDERS)]


class Emulated:
    """The operators of the emulated library."""

    def __init__(self, path: str) -> None:
        self._configure = ctypes.CDLL(path).emulator_configure

    def run(self, name: str, *arguments: Any, order: Order = ASCENDING, variant: str = "") -> Any:
        """Run an operator of the library in an order of threads; ``name`` has its suffix, ``_compiled``."""
        return self.overload(name, order, variant)(*arguments)

    def overload(self, name: str, order: Order, variant: str = "") -> Callable[..., Any]:
        """Make a function of an operator of the library that always runs in this order of threads."""
        operator = getattr(getattr(torch.ops, NAMESPACE + variant), name).default

        def run(*arguments: Any, **named: Any) -> Any:
            self._configure(order.policy, order.seed, order.processors, order.poison)
            return operator(*arguments, **named)

        return run


_libraries: list[torch.library.Library] = []  # a torch library is gone when its object is


@cache
def load_emulated() -> Emulated:
    """Load the emulated library, built if need be.

    Raises:
        NotSupported: no C++ compiler.
    """
    path = str(build())
    for suffix in VARIANTS:
        library = torch.library.Library(NAMESPACE + suffix, "DEF")
        for name, operator in OPERATORS.items():
            library.define(f"{name}_compiled{operator.schema}")
        _libraries.append(library)
    _libraries[0].define("run_faulty(Tensor input, int which) -> Tensor")
    torch.ops.load_library(path)
    for name, operator in OPERATORS.items():
        operator.register_autograd(f"{NAMESPACE}::{name}_compiled", "compiled")
    return Emulated(path)

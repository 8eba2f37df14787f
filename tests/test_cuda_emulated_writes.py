"""``bounded_write`` and ``cache_trim`` on CUDA, run on the CPU by ``cuda_emulator``: every test that the other backends
pass, in several orders of threads, and what only CUDA can get wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Target, require_target
from test_bounded_write import *  # noqa: F403  # its tests, with the backend below
from test_cuda_emulated import ORDERS, Emulated, Order, emulated, names  # noqa: F401

from mirage_kernels import ops, use_backend


def emulate(emulated: Emulated, monkeypatch: pytest.MonkeyPatch, order: Order, variant: str) -> None:  # noqa: F811
    """From here on the public functions run the emulated kernels where they would have run those of the CPU."""

    def operator(name: str, family: str) -> Callable[..., Any]:
        return lambda *arguments: emulated.run(f"{name}_compiled", *arguments, order=order, variant=variant)

    monkeypatch.setattr(ops, "private_operator", operator)


@pytest.fixture(params=[(order, "") for order in ORDERS[:3]], ids=lambda param: names[param[0]])
def backend(request: pytest.FixtureRequest, emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:  # noqa: F811
    target = require_target("cpu", "cpu")
    emulate(emulated, monkeypatch, *request.param)
    with use_backend("cpu"):
        yield target

"""How the operators are registered and launched."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import triton_interpreted
from ..schemas import NAMESPACE

# Without contraction into fused multiply-adds, float32 results equal the definition bit for bit.
EXACT = {"enable_fp_fusion": False}

_library = torch.library.Library(NAMESPACE, "IMPL")


def implements(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as ``mirage::{name}_triton``, for the devices that Triton runs on here."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for key in ("CUDA", "CPU") if triton_interpreted() else ("CUDA",):
            _library.impl(f"{name}_triton", function, key)
        return function

    return register


def device_of(tensor: Tensor) -> torch.cuda.device:
    """Makes the tensor's GPU current, which is where Triton launches; does nothing for a CPU tensor."""
    return torch.cuda.device(tensor.get_device())


def float32(value: float) -> float:
    """A Python float rounded once to float32, as a comparison with a float32 tensor rounds it; past its range, Inf."""
    return ctypes.c_float(value).value


def cdiv(total: int, part: int) -> int:
    """How many parts cover the total."""
    return -(-total // part)


def power_of_2(value: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (value - 1).bit_length()

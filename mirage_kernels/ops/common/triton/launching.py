"""Helpers of the functions that launch Triton kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

# Without contraction into fused multiply-adds, float32 results equal the definition bit for bit.
EXACT = {"enable_fp_fusion": False}


def device_of(tensor: Tensor) -> torch.cuda.device:
    """Make the tensor's GPU current, which is where Triton launches; do nothing for a CPU tensor."""
    return torch.cuda.device(tensor.get_device())


def float32(value: float) -> float:
    """Round a Python float once to float32, as a comparison with a float32 tensor rounds it; past its range, Inf."""
    return ctypes.c_float(value).value


def cdiv(total: int, part: int) -> int:
    """Count the parts that cover the total."""
    return -(-total // part)


def power_of_2(value: int) -> int:
    """Return the least power of two that is not smaller."""
    return 1 << (value - 1).bit_length()

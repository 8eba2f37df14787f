"""The arrays that a write is given, in the layouts and types that people have them in, as the operators take them.

In: tensors or numpy arrays. Out: the same values as tensors; what cannot be meant in one way only is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.checks import describe, require_tensor

Array = Tensor | np.ndarray


def as_write_inputs(
    latents: Array, depth: Array, mask: Array | None, views: int, channels: int, device: torch.device
) -> tuple[Any, Any, Any]:
    """Return latents (T, C, h, w), depth (T, H, W) and mask (T, H', W') as the operators take them, of T `views`.

    What is of no known layout or type is returned as it is: the checks of the operators say what is wrong.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    latents = as_tensor("latents", latents, device)
    if isinstance(latents, Tensor):
        if latents.dim() == 5:
            latents = _frames_first(latents, views, channels)
        if latents.dtype == torch.float64:
            latents = latents.float()
    depth = _without_channel(as_tensor("depth", depth, device))
    if isinstance(depth, Tensor):
        if depth.dtype == torch.float64:
            depth = depth.float()
        elif not depth.is_floating_point():
            raise TypeError(
                f"depth must be (T, H, W) float in world units, got {describe(depth)}: integers come in a unit of their"
                " own, millimetres for instance; divide by it"
            )
    return latents, depth, None if mask is None else as_mask(_without_channel(as_tensor("mask", mask, device)))


def as_tensor(name: str, value: Any, device: torch.device) -> Any:
    """Make a tensor on the device of a numpy array; return anything else as it is.

    Raises:
        TypeError: an array of no numbers, or a sparse or nested tensor.
    """
    if isinstance(value, Tensor):
        require_tensor(name, value, "of numbers")
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be of numbers, got an array of {value.dtype}")
    kind = np.dtype("float64") if value.dtype.itemsize > 8 else value.dtype.newbyteorder("=")
    plain = value.dtype == kind and value.flags.c_contiguous and value.flags.writeable
    # A copy where torch would refuse to share: negative strides, foreign byte orders, long doubles, read-only arrays.
    return torch.from_numpy(value if plain else np.array(value, dtype=kind, order="C")).to(device)


def as_mask(mask: Any) -> Any:
    """Make a mask of 0 and 1 bool. Looking at its values waits for the device; a mask of bool needs no look.

    Raises:
        ValueError: other values.
    """
    if not isinstance(mask, Tensor) or mask.dtype == torch.bool or mask.is_complex():
        return mask
    static = mask != 0
    if not bool(((mask == 1) | ~static).all()):
        span = f"values from {mask.min().item():g} to {mask.max().item():g}"
        raise ValueError(f"mask must be bool, or 0 and 1 with 1 = static, got {describe(mask)} with {span}")
    return static


def _without_channel(images: Any) -> Any:
    """Drop the channel of (T, 1, H, W)."""
    if isinstance(images, Tensor) and images.dim() == 4 and images.shape[1] == 1:
        return images[:, 0]
    return images


def _frames_first(latents: Tensor, views: int, channels: int) -> Tensor:
    """Turn latents (1, C, T, h, w), as pipelines give them, into (T, C, h, w)."""
    expected = f"(T, C, h, w), or (1, C, T, h, w) as pipelines give them, of C = {channels} and T = {views}"
    if latents.shape[0] != 1:
        raise ValueError(f"latents must be {expected}, got {describe(latents)}: a cache holds one scene")
    if tuple(latents.shape[1:3]) != (channels, views):
        raise ValueError(f"latents must be {expected}, got {describe(latents)}")
    if channels == views:
        raise ValueError(
            f"latents must be (T, C, h, w) where T and C are equal, got {describe(latents)}, which may be"
            " (1, C, T, h, w) or (1, T, C, h, w): pass latents[0].transpose(0, 1) or latents[0]"
        )
    return latents[0].transpose(0, 1)

"""Weights that files keep in 8 bits: multiplied by their scales, or refused, and never taken for the values themselves.

Three layouts are known: `NAME.scale_weight` beside `NAME.weight`, with a `scaled_fp8` marker (ComfyUI's first);
`NAME.weight_scale`, with a `NAME.comfy_quant` description (its second); and the same without one (LightX2V's).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_STORED = (*FLOAT8, torch.int8)
_SCALES = {"scale_weight": "weight", "weight_scale": "weight"}
_ACTIVATION_SCALES = ("scale_input", "input_scale")  # of layers computed in 8 bits, which ours are not
_MARKER = "scaled_fp8"
_DESCRIPTION = "comfy_quant"
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_FOREIGN = ("weight_scale_2", "quant_state", "absmax", "qweight", "qzeros")


def is_scaled(names: Mapping[str, Any]) -> bool:
    """Return whether a state dict keeps weights as numbers that must be multiplied by scales."""
    ends = {name.rpartition(".")[2] for name in names}
    return bool(ends & {*_SCALES, _MARKER, _DESCRIPTION, *_FOREIGN})


def restore_weights(label: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict whose 8-bit weights are what they stand for.

    Scaled ones become float32, the product of number and scale; float8 without a scale becomes bfloat16, which holds
    each of its values. Nothing else changes, except that scales and markers are gone.

    Args:
        label: what to call the source in errors.
        state: names to tensors.

    Raises:
        ValueError: a scale without its weight or of a shape that does not fit it, a weight without its scale, or a
            format that is not known.
    """
    for name, value in state.items():
        end = name.rpartition(".")[2]
        if end in _FOREIGN or ".quant_state." in name:
            raise ValueError(
                f"{label}: {name} belongs to a quantised format that is not read here: give unquantised or fp8 weights"
            )
        if end == _DESCRIPTION:
            _check_format(label, name, value)
    restored = {}
    scaled = set()
    for name, value in state.items():
        stem, _, end = name.rpartition(".")
        if end in _SCALES:
            weight = f"{stem}.{_SCALES[end]}"
            scaled.add(weight)
            restored[weight] = _product(label, name, value, weight, state.get(weight))
    marked = is_scaled(state)
    for name, value in state.items():
        end = name.rpartition(".")[2]
        if name in scaled or end in (*_SCALES, *_ACTIVATION_SCALES, _MARKER, _DESCRIPTION):
            continue
        if isinstance(value, Tensor) and value.dtype in FLOAT8:
            if marked and value.ndim > 1:
                raise ValueError(f"{label}: {name} must have a scale, as other weights of this file have, got none")
            value = value.to(torch.bfloat16)
        restored[name] = value
    return restored


def _product(label: str, scale_name: str, scale: Any, name: str, weight: Any) -> Tensor:
    if not isinstance(weight, Tensor) or not isinstance(scale, Tensor):
        raise ValueError(f"{label}: {scale_name} must scale a tensor {name}, which is not there")
    if weight.dtype not in _STORED and not weight.is_floating_point():
        raise ValueError(f"{label}: {name} must be fp8 or int8 where it has a scale, got {weight.dtype}")
    if not scale.float().isfinite().all():
        raise ValueError(f"{label}: {scale_name} must be finite")
    rows = weight.shape[0] if weight.ndim else 1
    if scale.numel() == 1:
        factor = scale.float().reshape(())
    elif scale.numel() == rows and scale.shape[0] == rows:  # one scale a row
        factor = scale.float().reshape(rows, *[1] * (weight.ndim - 1))
    else:
        raise ValueError(
            f"{label}: {scale_name} must be one scale or one a row of {name} {tuple(weight.shape)}, got"
            f" {tuple(scale.shape)}"
        )
    return weight.float() * factor


def _check_format(label: str, name: str, value: Any) -> None:
    try:
        described = json.loads(bytes(value.to(torch.uint8).flatten().tolist()))
        found = described.get("format")
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{label}: {name} must be a description in JSON ({error})") from error
    if found not in _FORMATS:
        raise ValueError(f"{label}: {name} must name one of the formats {', '.join(_FORMATS)}, got {found!r}")

"""Features of one byte a channel: float8 e4m3 (``torch.float8_e4m3fn``) with one power-of-two scale a token."""

from __future__ import annotations

import torch
from torch import Tensor

from .constants import FLOAT8_MAX, MAX_QUANTIZED, MAX_SCALE, MIN_SCALE, SCALE_BIAS

FLOAT8 = torch.float8_e4m3fn


def _power_of_2(biased_exponent: Tensor) -> Tensor:
    """Return 2^(biased_exponent - 127) in float32, from integers in [0, 255]: 0 gives 0, 255 Inf."""
    return (biased_exponent.int() << 23).view(torch.float32)


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize latents of tokens to float8 e4m3 and a scale each.

    The scale is the least at which the token's largest magnitude is no more than 448, so above 224, except at the
    limits [11, 246]: nothing saturates. A token of zeros has the least. Values are rounded to nearest even: to four
    significant bits, and below 2^-6 of the scale, at most 1/14336 of the largest magnitude, to multiples of 2^-9 of it.

    Args:
        rows: (N, C) float. What rounds to more than 448 * 2^119, 2.98e38, in magnitude becomes NaN.

    Returns:
        (N, C) float8_e4m3fn and (N,) uint8: value = float8 * 2^(scale - 127).
    """
    rows = rows.to(torch.float32)
    largest = rows.abs().amax(1) if rows.shape[1] > 0 else rows.new_zeros(rows.shape[0])
    # largest / 448 = mantissa / 1.75 * 2^(exponent - 8): a mantissa above 1.75 carries into the exponent.
    bits = largest.view(torch.int32).long()
    scales = (((bits + 0x1FFFFF) >> 23) - 8).clamp(MIN_SCALE, MAX_SCALE)
    # Exact, except what is far below half a step.
    scaled = rows * _power_of_2(2 * SCALE_BIAS - scales)[:, None]
    exponent = ((scaled.view(torch.int32) >> 23) & 0xFF).clamp(min=SCALE_BIAS - 6)
    # On multiples of a step, which float8 has all of, so that its own rounding has nothing left to decide.
    rounded = (scaled * _power_of_2(2 * SCALE_BIAS + 3 - exponent)).round() * _power_of_2(exponent - 3)
    fits = rounded.abs() <= FLOAT8_MAX
    codes = torch.where(fits, rounded, 0.0).to(FLOAT8).view(torch.uint8)
    codes = torch.where(fits, codes, torch.where(rounded.signbit(), 0xFF, 0x7F)).to(torch.uint8)
    return codes.view(FLOAT8), scales.to(torch.uint8)


def dequantize_rows(features: Tensor, scales: Tensor) -> Tensor:
    """Return the (N, C) float32 values of float8 features: float8 * 2^(scale - 127), one float32 product.

    Exact, and no subnormal, at every scale that :func:`quantize_rows` gives; exact in bfloat16 as well.
    """
    return features.to(torch.float32) * _power_of_2(scales)[:, None]


def store_rows(features: Tensor, scales: Tensor | None, where: slice | Tensor, rows: Tensor) -> None:
    """Write latents of tokens (M, C) as the features, and scales if there are any, of the rows ``where``."""
    if scales is None:
        features[where] = rows.to(features.dtype)
    else:
        quantized, scales[where] = quantize_rows(rows)
        features.view(torch.uint8)[where] = quantized.view(torch.uint8)


def storable(latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return True where a latent is finite once stored in ``dtype``: one of float32 may be too large for the others."""
    if dtype == FLOAT8:
        return latents.to(torch.float32).abs() <= MAX_QUANTIZED  # fails for NaN
    return torch.isfinite(latents.to(dtype))

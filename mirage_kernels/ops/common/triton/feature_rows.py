"""Rows of features as a cache stores them, to floats and back; of float8 the twin of ``csrc/core/float8.h``.

Kernels get float8 features as their bytes (:func:`raw`): Triton's own conversions are not on every GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....constants import MAX_SCALE, MIN_SCALE
from ....quantization import FLOAT8
from .camera import convert, is_finite, widen

_MIN_SCALE = tl.constexpr(MIN_SCALE)
_MAX_SCALE = tl.constexpr(MAX_SCALE)
_MAX_QUANTIZED = tl.constexpr(0x7F600000)  # bits of the greatest magnitude that is finite once stored


def raw(features: Tensor) -> Tensor:
    """View features as kernels take them: float8 as bytes."""
    return features.view(torch.uint8) if features.dtype == FLOAT8 else features


@triton.jit
def magnitude_bits(value):
    return widen(value).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def token_scale(largest):
    """Choose the scales of tokens from the bits of their largest magnitudes."""
    scale = ((largest + 0x1FFFFF) >> 23) - 8  # a mantissa above that of 448 carries
    return tl.minimum(tl.maximum(scale, _MIN_SCALE), _MAX_SCALE)


@triton.jit
def encode_float8(scaled):
    """Round latents over their scale to nearest even; what rounds to more than 448 becomes NaN."""
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Below 2^-6, multiples of 2^-9: those are what a sum with 2^14 is rounded to.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    large = tl.minimum(normal, 0x7F)
    return (tl.where(magnitude < 0x3C800000, small, large) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode_float8(code):
    bits = code.to(tl.int32)
    magnitude = (bits & 0x7F) << 20
    # Without the leading one: a difference, as no subnormal may come up.
    small = ((magnitude + 0x3C800000).to(tl.float32, bitcast=True) - 0.015625).to(tl.int32, bitcast=True)
    finite = tl.where(magnitude < 0x00800000, small, magnitude + 0x3C000000)
    value = tl.where(magnitude == 0x07F00000, 0x7FC00000, finite) | ((bits & 0x80) << 24)
    return value.to(tl.float32, bitcast=True)


@triton.jit
def load_features(features, scales, row, channel, channels, mask):
    """Load (ROWS, CHANNELS) of the rows of features (capacity, C) where ``mask`` (ROWS,), else 0.

    In their own dtype, with ``scales`` in float32.
    """
    real = mask[:, None] & (channel < channels)[None, :]
    if scales is None:
        return tl.load(features + row[:, None] * channels + channel[None, :], real, other=0.0)
    else:
        code = tl.load(features + row[:, None] * channels + channel[None, :], real, other=0)
        scale = tl.load(scales + row, mask, other=0).to(tl.int32)
        return decode_float8(code) * (scale << 23).to(tl.float32, bitcast=True)[:, None]


@triton.jit
def store_features(features, row, channel, channels, value, scale, mask):
    """Store (ROWS, CHANNELS) to the rows of features (capacity, C); those of bytes in float8 of ``scale`` (ROWS,)."""
    target = features + row[:, None] * channels + channel[None, :]
    if features.dtype.element_ty == tl.uint8:
        inverse = ((254 - scale) << 23).to(tl.float32, bitcast=True)
        tl.store(target, encode_float8(widen(value) * inverse[:, None]), mask)
    else:
        tl.store(target, convert(value, features.dtype.element_ty), mask)


@triton.jit
def is_storable(value, dtype: tl.constexpr):
    """Return False where a latent is not finite once stored: one of float32 may be too large for the others."""
    if dtype == tl.uint8:
        return magnitude_bits(value) <= _MAX_QUANTIZED
    else:
        return is_finite(widen(convert(value, dtype)))

// Features of one byte: float8 e4m3 codes, and per token one scale, a power of two. mirage_kernels/quantization.py says
// what they mean and why the scales end where they do. Everything is integer arithmetic, except sums and products that
// are exact, so every processor gives the same bits, whether or not it has float8 conversions of its own.
#pragma once

#include "constants.h"
#include "macros.h"

namespace mirage {

struct Float8 {
  uint8_t code;
};

// The scale of a token, from the bits of its largest magnitude.
MIRAGE_HD uint8_t token_scale(uint32_t largest) {
  const int scale = static_cast<int>((largest + 0x1fffffu) >> 23) - 8;  // a mantissa above that of 448 carries
  return static_cast<uint8_t>(scale < kMinScale ? kMinScale : (scale > kMaxScale ? kMaxScale : scale));
}

MIRAGE_HD float scale_factor(uint8_t scale) { return bits_float(static_cast<uint32_t>(scale) << 23); }

MIRAGE_HD float inverse_factor(uint8_t scale) { return bits_float((254u - scale) << 23); }

// Rounds a latent over its scale to the nearest code, ties to even; what rounds to more than 448 becomes NaN.
MIRAGE_HD uint32_t encode_float8(float scaled) {
  const uint32_t bits = float_bits(scaled), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  // Below 2^-6 codes are multiples of 2^-9, and a sum with 2^14 is rounded to just those.
  const uint32_t small = float_bits(bits_float(magnitude) + 16384.0f) - 0x46800000u;
  const uint32_t large = normal < 0x7fu ? normal : 0x7fu;
  return (magnitude < 0x3c800000u ? small : large) | ((bits >> 24) & 0x80u);
}

MIRAGE_HD float decode_float8(uint32_t code) {
  const uint32_t magnitude = (code & 0x7fu) << 20;
  const uint32_t normal = magnitude + 0x3c000000u;
  // Codes without a leading one are computed as a difference: no subnormal appears, which a processor might flush to 0.
  const uint32_t small = float_bits(bits_float(magnitude + 0x3c800000u) - bits_float(0x3c800000u));
  const uint32_t finite = magnitude < 0x00800000u ? small : normal;
  return bits_float((magnitude == 0x07f00000u ? 0x7fc00000u : finite) | ((code & 0x80u) << 24));
}

}  // namespace mirage

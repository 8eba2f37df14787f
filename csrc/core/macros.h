// How functions that host and device share are declared, and how both read the bits of a float. No tensors here.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MIRAGE_HD __host__ __device__ __forceinline__
#else
#define MIRAGE_HD inline __attribute__((always_inline))
#endif

namespace mirage {

// Depth, points and features carry 64-bit offsets: a cache of 45 million tokens of 48 channels is past 2^31 elements.
using index_t = int64_t;

MIRAGE_HD uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

MIRAGE_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

// Without libm: all exponent bits set means Inf or NaN. This works even where -ffast-math would fold isfinite away.
MIRAGE_HD bool is_finite(float value) { return (float_bits(value) & 0x7f800000u) != 0x7f800000u; }

}  // namespace mirage

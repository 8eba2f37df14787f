// Rows of float8 features to floats and back: the loops that are compiled for several instruction sets.
//
// In: a row of C codes and its scale, or C latents. Out: C values, or codes and scale.
#include "feature_rows.h"

namespace mirage::cpu {
namespace {

template <typename T>
MIRAGE_INLINE void quantize(const T* latents, index_t channels, Float8* __restrict__ row, uint8_t* scale) {
  uint32_t largest = 0;
  for (index_t c = 0; c < channels; ++c) {
    const uint32_t magnitude = float_bits(static_cast<float>(latents[c])) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  *scale = token_scale(largest);
  const float inverse = inverse_factor(*scale);
  for (index_t c = 0; c < channels; ++c)
    row[c].code = static_cast<uint8_t>(encode_float8(static_cast<float>(latents[c]) * inverse));
}

// Calls f(c, bits) for every sixteen channels; the last sixteen may overlap the ones before. Returns false if the row
// does not allow that.
template <typename F>
MIRAGE_INLINE bool decode_row(const Float8* row, uint8_t scale, index_t channels, const F& f) {
  if (channels < kCodes || !in_cache(scale)) return false;
  for (index_t c = 0; c < channels; c += kCodes) {
    const index_t at = std::min(c, channels - kCodes);
    f(at, decode_codes(row + at, scale));
  }
  return true;
}

template <typename Out>
void load_one_by_one(const Float8* row, uint8_t scale, index_t channels, Out* out) {
  for (index_t c = 0; c < channels; ++c) out[c] = static_cast<Out>(feature_value(row[c], scale));
}

}  // namespace

MIRAGE_SIMD
void load_row(const Float8* __restrict__ row, uint8_t scale, index_t channels, float* __restrict__ out) {
  const bool done = decode_row(row, scale, channels, [&](index_t c, const CodeBits& bits) {
    for (int half = 0; half < 2; ++half) {
      const CodeFloats values = widen_codes(bits, half);
      __builtin_memcpy(out + c + half * kCodes / 2, &values, sizeof(values));
    }
  });
  if (!done) load_one_by_one(row, scale, channels, out);
}

MIRAGE_SIMD
void load_row(const Float8* __restrict__ row, uint8_t scale, index_t channels, BFloat16* __restrict__ out) {
  const bool done = decode_row(
      row, scale, channels, [&](index_t c, const CodeBits& bits) { __builtin_memcpy(out + c, &bits, sizeof(bits)); });
  if (!done) load_one_by_one(row, scale, channels, out);
}

void load_row(const Float8* __restrict__ row, uint8_t scale, index_t channels, Half* __restrict__ out) {
  load_one_by_one(row, scale, channels, out);
}

MIRAGE_SIMD
void store_row(const float* latents, index_t channels, Float8* __restrict__ row, uint8_t* scale) {
  quantize(latents, channels, row, scale);
}

MIRAGE_SIMD
void store_row(const Half* latents, index_t channels, Float8* __restrict__ row, uint8_t* scale) {
  quantize(latents, channels, row, scale);
}

MIRAGE_SIMD
void store_row(const BFloat16* latents, index_t channels, Float8* __restrict__ row, uint8_t* scale) {
  quantize(latents, channels, row, scale);
}

}  // namespace mirage::cpu

// Rows of features as a cache stores them, converted to floats and back: C channels per token.
#pragma once

#include "../core/float8.h"
#include "common.h"

namespace mirage::cpu {

// Features (N, C), with the scales (N,) that only Float8 has.
template <typename T>
struct FeatureRows {
  const T* rows;
  const uint8_t* scales;
  index_t channels;

  const T* row(index_t token) const { return rows + token * channels; }

  uint8_t scale(index_t token) const {
    if constexpr (std::is_same_v<T, Float8>) {
      return scales[token];
    } else {
      return 0;
    }
  }

  void prefetch(index_t token) const {
    const char* bytes = reinterpret_cast<const char*>(row(token));
    for (index_t offset = 0; offset < channels * static_cast<index_t>(sizeof(T)); offset += 64)
      __builtin_prefetch(bytes + offset);
    if constexpr (std::is_same_v<T, Float8>) __builtin_prefetch(scales + token);
  }
};

// Calls f with a value of the C++ type of a feature dtype, including Float8.
template <typename F>
inline void for_stored_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float8_e4m3fn) return f(Float8{});
  for_feature_type(dtype, f);
}

// The scales of features, contiguous; nullopt where the dtype has none.
inline std::optional<Tensor> checked_scales(const Tensor& features, const std::optional<Tensor>& scales) {
  const bool needed = features.scalar_type() == ScalarType::Float8_e4m3fn;
  STD_TORCH_CHECK(needed == scales.has_value(), "scales must be given with float8_e4m3fn features, and only with them");
  if (!needed) return std::nullopt;
  STD_TORCH_CHECK(scales->dim() == 1 && scales->size(0) == features.size(0), "scales must be one a row of features");
  return checked(*scales, ScalarType::Byte, "scales");
}

// Calls f with the FeatureRows of contiguous tensors.
template <typename F>
inline void for_features(const Tensor& features, const std::optional<Tensor>& scales_, const F& f) {
  const std::optional<Tensor> scales = checked_scales(features, scales_);
  for_stored_type(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    f(FeatureRows<T>{input<T>(features), scales.has_value() ? input<uint8_t>(*scales) : nullptr, features.size(1)});
  });
}

// The value of one feature in a row with this scale.
template <typename T>
MIRAGE_INLINE float feature_value(T stored, uint8_t scale) {
  if constexpr (std::is_same_v<T, Float8>) {
    return decode_float8(stored.code) * scale_factor(scale);
  } else {
    return static_cast<float>(stored);
  }
}

// Codes are decoded sixteen at a time to bits of bfloat16, which represents their values exactly at every scale in a
// cache.
constexpr int kCodes = 16;
typedef int16_t CodeBits __attribute__((vector_size(2 * kCodes)));

inline bool in_cache(uint8_t scale) { return scale >= kMinScale && scale <= kMaxScale; }

// Bits of bfloat16 rise by 16 with each step of a code's magnitude, except for codes without a leading one: those lie
// on steeper lines, and the slope doubles with every place that the leading digit is further right.
MIRAGE_INLINE CodeBits decode_codes(const Float8* from, uint8_t scale) {
  typedef int8_t Codes __attribute__((vector_size(kCodes)));
  Codes codes;
  __builtin_memcpy(&codes, from, sizeof(codes));
  const CodeBits wide = __builtin_convertvector(codes, CodeBits), once = (wide << 4) & int16_t{0x7f0};
  const CodeBits twice = once + once - int16_t{128}, four = twice + twice, eight = four + four + int16_t{128};
  const CodeBits low = once < twice ? once : twice, high = four < eight ? four : eight;
  CodeBits bits = (low < high ? low : high) + static_cast<int16_t>((scale - 7) << 7);
  bits &= ~(once == int16_t{0});
  bits |= (once == int16_t{0x7f0}) & int16_t{0x7fc0};  // NaN
  return bits | (wide & static_cast<int16_t>(0x8000));
}

// One half of a row of decoded codes, in order.
typedef float CodeFloats __attribute__((vector_size(2 * kCodes)));
MIRAGE_INLINE CodeFloats widen_codes(const CodeBits& bits, int half) {
  typedef uint16_t Half8 __attribute__((vector_size(kCodes)));
  typedef int32_t Words __attribute__((vector_size(2 * kCodes)));
  Half8 part;
  __builtin_memcpy(&part, reinterpret_cast<const char*>(&bits) + half * sizeof(part), sizeof(part));
  return reinterpret_cast<CodeFloats>(__builtin_convertvector(part, Words) << 16);
}

// Converts a row of Float8 to another type.
void load_row(const Float8* __restrict__ row, uint8_t scale, index_t channels, float* __restrict__ out);
void load_row(const Float8* __restrict__ row, uint8_t scale, index_t channels, Half* __restrict__ out);
void load_row(const Float8* __restrict__ row, uint8_t scale, index_t channels, BFloat16* __restrict__ out);

// Converts a row to another type.
template <typename In, typename Out>
inline void load_row(const In* row, uint8_t, index_t channels, Out* out) {
  for (index_t c = 0; c < channels; ++c) out[c] = static_cast<Out>(static_cast<float>(row[c]));
}

// Stores a token's latents as features, with their scale.
void store_row(const float* latents, index_t channels, Float8* __restrict__ row, uint8_t* scale);
void store_row(const Half* latents, index_t channels, Float8* __restrict__ row, uint8_t* scale);
void store_row(const BFloat16* latents, index_t channels, Float8* __restrict__ row, uint8_t* scale);

// Stores a token's latents as features; there is no scale.
template <typename In, typename Out>
inline void store_row(const In* latents, index_t channels, Out* row, uint8_t*) {
  load_row(latents, uint8_t{0}, channels, row);
}

}  // namespace mirage::cpu

// Rows of features as a cache stores them, to floats and back: one token, C channels.
#pragma once

#include "../core/float8.h"
#include "common.cuh"

namespace mirage::cuda {

// Calls f with a value of the device type of a feature dtype, Float8 among them.
template <typename F>
inline void for_stored_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float8_e4m3fn) return f(Float8{});
  for_feature_type(dtype, f);
}

// The scales that belong to features, contiguous; none where none do.
inline std::optional<Tensor> checked_scales(const Tensor& features, const std::optional<Tensor>& scales) {
  const bool needed = features.scalar_type() == ScalarType::Float8_e4m3fn;
  STD_TORCH_CHECK(needed == scales.has_value(), "scales must be given with float8_e4m3fn features, and only with them");
  if (!needed) return std::nullopt;
  STD_TORCH_CHECK(scales->dim() == 1 && scales->size(0) == features.size(0), "scales must be one a row of features");
  return checked(*scales, ScalarType::Byte, "scales");
}

inline const uint8_t* scale_pointer(const std::optional<Tensor>& scales) {
  return scales.has_value() ? input<uint8_t>(*scales) : nullptr;
}

// What the values of a row are multiplied by.
template <typename T>
__device__ __forceinline__ float row_factor(const uint8_t* scales, index_t row) {
  if constexpr (std::is_same_v<T, Float8>) {
    return scale_factor(__ldg(scales + row));
  } else {
    return 1.0f;
  }
}

// The value of one feature of a row with this factor.
template <typename T>
__device__ __forceinline__ float feature_value(T stored, float factor) {
  if constexpr (std::is_same_v<T, Float8>) {
    return decode_float8(stored.code) * factor;
  } else {
    return to_float(stored);
  }
}

}  // namespace mirage::cuda

// Rows of features as a cache stores them, converted to floats and back: C channels per token.
#pragma once

#include "../core/float8.h"
#include "common.cuh"

namespace mirage::cuda {

// Calls f with a value of the device type of a feature dtype, including Float8.
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

inline const uint8_t* scale_pointer(const std::optional<Tensor>& scales) {
  return scales.has_value() ? input<uint8_t>(*scales) : nullptr;
}

// The factor by which the values of a row are multiplied.
template <typename T>
__device__ __forceinline__ float row_factor(const uint8_t* scales, index_t row) {
  if constexpr (std::is_same_v<T, Float8>) {
    return scale_factor(__ldg(scales + row));
  } else {
    return 1.0f;
  }
}

// The value of one feature in a row with this factor.
template <typename T>
__device__ __forceinline__ float feature_value(T stored, float factor) {
  if constexpr (std::is_same_v<T, Float8>) {
    return decode_float8(stored.code) * factor;
  } else {
    return to_float(stored);
  }
}

// False where a latent is not finite once stored: a float32 value may be too large for the other dtypes.
template <typename Out>
__device__ __forceinline__ bool is_storable(float latent) {
  if constexpr (std::is_same_v<Out, Float8>) {
    return (float_bits(latent) & 0x7fffffffu) <= kMaxQuantizedBits;
  } else {
    return is_finite(to_float(from_float<Out>(latent)));
  }
}

constexpr int kTransposedTokens = 32;    // tokens transposed at a time
constexpr int kTransposedChannels = 64;  // channels transposed at a time
using Tile = float[kTransposedChannels][kTransposedTokens + 1];

// Stores the latents of up to kTransposedTokens tokens as their rows of features, with scales. For row r, from[r] is
// the offset of the token's first channel and to[r] the row; blend(r, value, at) is the value to store at offset `at`
// of `features`: it may read what they hold there so far, but no scale. A whole thread block of kThreads must call it,
// after a barrier.
template <int kThreads, typename In, typename Out, typename Blend>
__device__ __forceinline__ void store_rows(const In* __restrict__ latents, index_t cells, int channels, int rows,
                                           const index_t* from, const index_t* to, Out* features, uint8_t* scales,
                                           Tile& tile, const Blend& blend) {
  constexpr bool kScaled = std::is_same_v<Out, Float8>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __shared__ int largest[kTransposedTokens];  // magnitude bits in each row
  const auto load = [&](int channel, int number) {
    if (lane < rows) {
      const In* at = latents + from[lane] + channel * cells;
      for (int c = warp; c < number; c += kThreads / 32) tile[c][lane] = to_float(at[c * cells]);
    }
    __syncthreads();
  };
  if constexpr (kScaled) {
    // Each warp has rows of its own, each lane every 32nd channel of them.
    if (threadIdx.x < kTransposedTokens) largest[threadIdx.x] = 0;
    for (int channel = 0; channel < channels; channel += kTransposedChannels) {
      const int number = min(kTransposedChannels, channels - channel);
      load(channel, number);
      for (int r = warp; r < rows; r += kThreads / 32) {
        int most = 0;
        for (int c = lane; c < number; c += 32) {
          const float value = blend(r, tile[c][r], to[r] * channels + channel + c);
          most = max(most, static_cast<int>(float_bits(value) & 0x7fffffffu));
        }
        most = warp_max(most);
        if (lane == 0) largest[r] = max(largest[r], most);
      }
      __syncthreads();
    }
    if (threadIdx.x < rows) scales[to[threadIdx.x]] = token_scale(static_cast<uint32_t>(largest[threadIdx.x]));
  }
  for (int channel = 0; channel < channels; channel += kTransposedChannels) {
    const int number = min(kTransposedChannels, channels - channel);
    if (!kScaled || channels > kTransposedChannels) load(channel, number);  // otherwise it is there already
    for (int k = threadIdx.x; k < rows * number; k += kThreads) {
      const int r = k / number, c = k % number;
      const index_t at = to[r] * channels + channel + c;
      const float value = blend(r, tile[c][r], at);
      if constexpr (kScaled) {
        const float inverse = inverse_factor(token_scale(static_cast<uint32_t>(largest[r])));
        features[at].code = static_cast<uint8_t>(encode_float8(value * inverse));
      } else {
        features[at] = from_float<Out>(value);
      }
    }
    __syncthreads();
  }
}

}  // namespace mirage::cuda

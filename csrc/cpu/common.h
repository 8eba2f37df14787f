// Shared by all CPU operators: stable-ABI tensors in, plain pointers out; threads come from torch's own pool.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../core/tensor.h"
#include "simd.h"

namespace mirage::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

inline Tensor checked(const Tensor& tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype, name, " has another dtype or device than declared");
  return as_contiguous(tensor);
}

inline Tensor new_tensor(std::vector<int64_t> size, ScalarType dtype) {
  return allocate(size, "out of memory", [&] { return torch::stable::empty(size, dtype); });
}

// Calls f with a value of the C++ type of a feature dtype.
template <typename F>
inline void for_feature_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "features must be float32, float16 or bfloat16");
  }
}

// Rows in use: the count in device memory where there is one, never more than the buffer holds.
inline index_t live_points(const std::optional<Tensor>& num_points, index_t capacity) {
  if (!num_points.has_value()) return capacity;
  return std::clamp<index_t>(*input<int64_t>(*num_points), 0, capacity);
}

}  // namespace mirage::cpu

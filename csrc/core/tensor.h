// Tensors of the stable ABI as the operators of both backends use them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <exception>
#include <string>
#include <vector>

#include "macros.h"

namespace mirage {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Returns what `make` allocates. What torch says when it cannot does not pass the stable ABI, so it is said here;
// `why` is what may have happened.
template <typename F>
inline Tensor allocate(const std::vector<int64_t>& size, const char* why, const F& make) {
  try {
    return make();
  } catch (const std::exception&) {
    std::string shape;
    for (const int64_t side : size) shape += (shape.empty() ? "" : ", ") + std::to_string(side);
    STD_TORCH_CHECK(false, why, ": could not allocate a tensor of (", shape, ")");
  }
}

template <typename T>
inline const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
inline T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline index_t divide_up(index_t a, index_t b) { return (a + b - 1) / b; }

}  // namespace mirage

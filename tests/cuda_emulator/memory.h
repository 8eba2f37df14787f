// Device memory as the rewritten operators ask for it: tensors on the CPU, whose extents the emulator is told.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "emulator.h"

namespace emulator {

void begin_operator();
void end_operator();
// Tells the extent of a tensor that kernels are handed. `fresh`: its contents are poison until written.
void know_memory(const void* memory, size_t bytes, size_t element_bytes, bool writable, bool fresh);

// Stands for the device guard, which every operator begins with: what it knows of memory ends with the operator.
struct Operator {
  explicit Operator(int) { begin_operator(); }
  ~Operator() { end_operator(); }
};

inline size_t bytes_of(const torch::stable::Tensor& tensor) {
  return static_cast<size_t>(tensor.numel()) * tensor.element_size();
}

inline const void* readable(const torch::stable::Tensor& tensor) {
  know_memory(tensor.const_data_ptr(), bytes_of(tensor), tensor.element_size(), false, false);
  return tensor.const_data_ptr();
}

inline void* writable(const torch::stable::Tensor& tensor) {
  know_memory(tensor.mutable_data_ptr(), bytes_of(tensor), tensor.element_size(), true, false);
  return tensor.mutable_data_ptr();
}

// Kept until the operator ends, so that no other tensor takes a place whose history is known.
void keep(torch::stable::Tensor tensor);

inline torch::stable::Tensor new_empty(const torch::stable::Tensor& like, const std::vector<int64_t>& size,
                                       torch::headeronly::ScalarType dtype) {
  torch::stable::Tensor tensor = torch::stable::new_empty(like, size, dtype);
  know_memory(tensor.mutable_data_ptr(), bytes_of(tensor), tensor.element_size(), true, true);
  keep(tensor);
  return tensor;
}

}  // namespace emulator

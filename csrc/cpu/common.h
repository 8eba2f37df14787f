// What every CPU operator shares: stable-ABI tensors in, plain pointers out; threads through torch's own pool.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../core/frustum.h"

// Hot loops are compiled for several instruction sets and chosen when the library is loaded, so that one build is fast
// on every machine. Width changes no result: each lane is IEEE arithmetic in the same order, without contraction.
// Sanitizers cannot run before the loader has resolved the clones.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(MIRAGE_NO_CLONES)
#define MIRAGE_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MIRAGE_SIMD
#endif

namespace mirage::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor checked(const Tensor& tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype, name, " has another dtype or device than declared");
  return as_contiguous(tensor);
}

template <typename T>
inline const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
inline T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor new_tensor(std::vector<int64_t> size, ScalarType dtype) { return torch::stable::empty(size, dtype); }

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

// Live rows: the device-side count where there is one, never more than the buffer holds.
inline index_t live_points(const std::optional<Tensor>& num_points, index_t capacity) {
  if (!num_points.has_value()) return capacity;
  return std::clamp<index_t>(*input<int64_t>(*num_points), 0, capacity);
}

inline std::vector<Projection> make_projections(const Tensor& intrinsics, const Tensor& cam2world) {
  const double* k = input<double>(intrinsics);
  const double* pose = input<double>(cam2world);
  std::vector<Projection> projections(intrinsics.size(0));
  for (size_t t = 0; t < projections.size(); ++t) projections[t] = make_projection(k + t * 9, pose + t * 16);
  return projections;
}

inline index_t divide_up(index_t a, index_t b) { return (a + b - 1) / b; }

// Bounds that are written in place: the boxes of all blocks and tiles of `capacity` points.
void check_bounds(const Tensor& bounds, index_t capacity);

// The boxes of blocks first, .., last - 1 of the first `count` points or, given `touched`, of those whose byte is not 0;
// and of the tiles they are in. No block from the last on has a live point.
void update_bounds(const float* points, index_t count, index_t first, index_t last, const uint8_t* touched,
                   index_t capacity, float* bounds);

// The numbers of the blocks that some of the views may see, in order; without bounds, of all blocks.
class SeenBlocks {
 public:
  SeenBlocks(const std::optional<Tensor>& bounds, index_t capacity, index_t count,
             const std::vector<Frustum>& frusta);

  index_t size() const { return static_cast<index_t>(numbers_.size()); }
  const uint32_t* from(index_t k) const { return numbers_.data() + k; }

  // Whether view t may see one of the blocks from the first-th to before the last-th.
  bool by(index_t t, index_t first, index_t last) const {
    if (seen_.empty()) return true;
    for (index_t k = first; k < last; ++k)
      if (seen_[t * tiles_ + numbers_[k] / kTileBlocks] >> (numbers_[k] % kTileBlocks) & 1) return true;
    return false;
  }

 private:
  std::vector<uint32_t> numbers_;
  index_t tiles_ = 0;
  std::vector<uint64_t> seen_;  // (views, tiles), a bit a block; empty without bounds
};

// Points of a few blocks, one array per coordinate, so that the loop over views is pure vector arithmetic, and a bounding
// sphere for every group of consecutive points. Tokens are written row by row of a frame, so a group is a short strip of
// surface: most groups lie outside most views, and one test of the sphere spares kGroup projections.
constexpr int kGroup = 16;
constexpr int kBlocks = 4;  // taken at once
constexpr int kBatch = kBlocks * kBlockTokens;
constexpr int kGroups = kBatch / kGroup;

struct GroupBounds {
  alignas(64) float centre_x[kGroups], centre_y[kGroups], centre_z[kGroups], radius[kGroups], reach[kGroups];
  int groups;
  uint32_t first[kBlocks];  // rows that the blocks begin at

  uint32_t row(int group) const {
    return first[group / (kBlockTokens / kGroup)] + group % (kBlockTokens / kGroup) * kGroup;
  }
};

struct PointBatch : GroupBounds {
  alignas(64) float x[kBatch], y[kBatch], z[kBatch];
};

// `number` blocks of the first `count` points, in order. Points past `count` are NaN: no view sees them.
void load_blocks(const float* points, index_t count, const uint32_t* blocks, index_t number, PointBatch& batch);

// The groups that the view may see, in order; never leaves out a group with a point in view.
int visible_groups(const GroupBounds& bounds, const Frustum& frustum, int32_t* groups);

// For point i of the k-th listed group: cell[k * kGroup + i] = row * width + column, or -1 out of view, and its z.
void project_groups(const PointBatch& batch, const int32_t* groups, int count, const Projection& projection, float near,
                    int width, int height, int32_t* cell, float* depth);

}  // namespace mirage::cpu

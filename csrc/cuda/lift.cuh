// Lifts a depth map to tokens, one warp per token: shared by back_project, cache_write and bounded_write.
#pragma once

#include "common.cuh"

namespace mirage::cuda {

struct DepthSource {
  const float* depth;  // (T, H, W)
  index_t depth_height, depth_width;
  const bool* mask;  // (T, H', W') or null
  index_t mask_height, mask_width;
  index_t views, height, width;  // token grid
  bool bilinear;
};

inline DepthSource make_source(const Tensor& depth, const std::optional<Tensor>& mask, index_t height, index_t width,
                               bool bilinear) {
  DepthSource source{};
  source.depth = input<float>(depth);
  source.depth_height = depth.size(1);
  source.depth_width = depth.size(2);
  if (mask.has_value()) {
    source.mask = input<bool>(*mask);
    source.mask_height = mask->size(1);
    source.mask_width = mask->size(2);
  }
  source.views = depth.size(0);
  source.height = height;
  source.width = width;
  source.bilinear = bilinear;
  return source;
}

static __global__ void make_lifts_kernel(const double* intrinsics, const double* cam2world, DepthSource source,
                                         Lift* lifts) {
  const index_t t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t < source.views)
    lifts[t] = make_lift(intrinsics + t * 9, cam2world + t * 16, source.depth_height, source.depth_width, source.height,
                         source.width);
}

inline Tensor make_lifts(const Tensor& intrinsics, const Tensor& cam2world, const DepthSource& source,
                         cudaStream_t stream) {
  static_assert(sizeof(Lift) == 16 * sizeof(float));
  Tensor lifts = new_tensor(cam2world, {source.views, 16}, ScalarType::Float);
  if (source.views == 0) return lifts;
  make_lifts_kernel<<<static_cast<unsigned>(divide_up(source.views, 64)), 64, 0, stream>>>(
      input<double>(intrinsics), input<double>(cam2world), source, output<Lift>(lifts));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return lifts;
}

constexpr int32_t kInfinity = 0x7f800000;  // bits of +Inf: past every valid depth
constexpr int kRegisterPixels = 8;         // that a lane keeps: enough for cells up to 16 x 16

// Distributes a cell's pixels over the lanes of a warp: of a narrow cell, several rows at once.
struct CellWalk {
  const int32_t* pixels;  // bits of the depth at the cell's first pixel
  index_t stride;
  int rows, columns;
  int lane_row, lane_column, rows_at_once, columns_at_once;

  __device__ __forceinline__ CellWalk(const DepthSource& source, index_t t, index_t i, index_t j, int lane) {
    const index_t top = cell_begin(i, source.height, source.depth_height);
    const index_t left = cell_begin(j, source.width, source.depth_width);
    rows = static_cast<int>(cell_begin(i + 1, source.height, source.depth_height) - top);
    columns = static_cast<int>(cell_begin(j + 1, source.width, source.depth_width) - left);
    stride = source.depth_width;
    pixels = reinterpret_cast<const int32_t*>(source.depth) + (t * source.depth_height + top) * stride + left;
    columns_at_once = columns >= 32 ? 32 : (columns <= 1 ? 1 : 1 << (32 - __clz(columns - 1)));
    rows_at_once = 32 / columns_at_once;
    lane_row = lane / columns_at_once;
    lane_column = lane % columns_at_once;
  }

  // Depths as signed integers, invalid ones as +Inf: zero, negative, Inf and NaN all fall outside (0, kInfinity).
  __device__ __forceinline__ int32_t load(int r, int c) const {
    if (r >= rows || c >= columns) return kInfinity;
    const int32_t value = __ldg(pixels + r * stride + c);
    return value > 0 && value < kInfinity ? value : kInfinity;
  }

  template <typename F>
  __device__ __forceinline__ void each(const F& f) const {
    for (int r = lane_row; r < rows; r += rows_at_once)
      for (int c = lane_column; c < columns; c += columns_at_once) f(load(r, c));
  }
};

// Finds the element of the given rank by counting passes; csrc/cpu/lift.cpp explains the choice of pivots.
template <typename WriteReport, typename Greatest>
__device__ __forceinline__ int32_t select_rank(int rank, int32_t low, int32_t high, int valid, const WriteReport& count,
                                               const Greatest& greatest) {
  int below_low = 0, up_to_high = valid;
  bool interpolate = true;
  while (low < high) {
    const int32_t range = high - low;
    int32_t pivot = low + range / 2;
    if (interpolate) {
      const float fraction = (static_cast<float>(rank - below_low) + 0.5f) / static_cast<float>(up_to_high - below_low);
      pivot = min(low + static_cast<int32_t>(fraction * static_cast<float>(range)), high - 1);
    }
    const int below = warp_sum(count(pivot));
    if (below == rank + 1) return warp_max(greatest(pivot));
    if (below > rank) {
      high = pivot;
      up_to_high = below;
    } else {
      low = pivot + 1;
      below_low = below;
    }
    interpolate = !interpolate || high - low <= range / 2;
  }
  return low;
}

// The lower median of the valid depths of a cell, 0 where under half of them are valid; and the bits of the least of
// them, kInfinity where none is valid. All lanes return both.
__device__ __forceinline__ float median_depth(const DepthSource& source, index_t t, index_t i, index_t j, int lane,
                                              int32_t& least) {
  const CellWalk walk(source, t, i, j, lane);
  const bool in_registers =
      walk.columns <= 32 && (walk.rows + walk.rows_at_once - 1) / walk.rows_at_once <= kRegisterPixels;
  int32_t values[kRegisterPixels];
  int valid = 0;
  int32_t greatest = 0;
  least = kInfinity;
  const auto collect = [&](int32_t value) {
    const bool ok = value < kInfinity;
    valid += ok;
    least = min(least, value);
    greatest = max(greatest, ok ? value : 0);
  };
  if (in_registers) {
#pragma unroll
    for (int k = 0; k < kRegisterPixels; ++k)
      values[k] = walk.load(walk.lane_row + k * walk.rows_at_once, walk.lane_column);
#pragma unroll
    for (int k = 0; k < kRegisterPixels; ++k) collect(values[k]);
  } else {
    walk.each(collect);
  }
  valid = warp_sum(valid);
  least = warp_min(least);
  greatest = warp_max(greatest);
  if (valid == 0 || 2 * static_cast<index_t>(valid) < static_cast<index_t>(walk.rows) * walk.columns) return 0.0f;

  const auto count = [&](int32_t pivot) {
    int below = 0;
    if (in_registers) {
#pragma unroll
      for (int k = 0; k < kRegisterPixels; ++k) below += values[k] <= pivot;
    } else {
      walk.each([&](int32_t value) { below += value <= pivot; });
    }
    return below;
  };
  const auto greatest_up_to = [&](int32_t pivot) {
    int32_t result = 0;
    const auto keep = [&](int32_t value) { result = value <= pivot ? max(result, value) : result; };
    if (in_registers) {
#pragma unroll
      for (int k = 0; k < kRegisterPixels; ++k) keep(values[k]);
    } else {
      walk.each(keep);
    }
    return result;
  };
  return bits_float(static_cast<uint32_t>(select_rank((valid - 1) / 2, least, greatest, valid, count, greatest_up_to)));
}

struct Tap {
  index_t low, high;
  float weight_low, weight_high;

  __device__ __forceinline__ Tap(index_t i, index_t cells, index_t pixels) {
    const double scale = static_cast<double>(pixels) / static_cast<double>(cells);
    const double position = fmax((static_cast<double>(i) + 0.5) * scale - 0.5, 0.0);
    low = min(static_cast<index_t>(position), pixels - 1);
    high = min(low + 1, pixels - 1);
    weight_high = static_cast<float>(position - static_cast<double>(low));
    weight_low = 1.0f - weight_high;
  }
};

__device__ __forceinline__ float bilinear_depth(const DepthSource& source, index_t t, index_t i, index_t j) {
  const Tap row(i, source.height, source.depth_height), column(j, source.width, source.depth_width);
  const float* image = source.depth + t * source.depth_height * source.depth_width;
  const float* top = image + row.low * source.depth_width;
  const float* bottom = image + row.high * source.depth_width;
  const float upper = column.weight_low * top[column.low] + column.weight_high * top[column.high];
  const float lower = column.weight_low * bottom[column.low] + column.weight_high * bottom[column.high];
  const float value = row.weight_low * upper + row.weight_high * lower;
  return value > 0.0f && is_finite(value) ? value : 0.0f;
}

// Bits of the least valid depth of a cell, kInfinity where none is valid; a whole warp must call it.
__device__ __forceinline__ int32_t least_depth(const DepthSource& source, index_t t, index_t i, index_t j, int lane) {
  int32_t least = kInfinity;
  CellWalk(source, t, i, j, lane).each([&](int32_t value) { least = min(least, value); });
  return warp_min(least);
}

// Depth of token (t, i, j), 0 where unknown; a whole warp must call it. `least` is set only where the median is taken.
__device__ __forceinline__ float token_depth(const DepthSource& source, index_t t, index_t i, index_t j, int lane,
                                             int32_t& least) {
  return source.bilinear ? bilinear_depth(source, t, i, j) : median_depth(source, t, i, j, lane, least);
}

// True where all mask pixels of the token are set; a whole warp must call it.
__device__ __forceinline__ bool token_static(const DepthSource& source, index_t t, index_t i, index_t j, int lane) {
  if (source.mask == nullptr) return true;
  const index_t top = cell_begin(i, source.height, source.mask_height);
  const index_t left = cell_begin(j, source.width, source.mask_width);
  const int rows = static_cast<int>(cell_begin(i + 1, source.height, source.mask_height) - top);
  const int columns = static_cast<int>(cell_begin(j + 1, source.width, source.mask_width) - left);
  const bool* pixels = source.mask + (t * source.mask_height + top) * source.mask_width + left;
  bool all = true;
  for (int k = lane; k < rows * columns; k += 32)
    all = all && pixels[static_cast<index_t>(k / columns) * source.mask_width + k % columns];
  return __all_sync(kFullWarp, all);
}

__device__ __forceinline__ bool is_finite_token(const LiftedToken& p) {
  return is_finite(p.x) && is_finite(p.y) && is_finite(p.z) && is_finite(p.footprint);
}

constexpr int kLiftThreads = 256;  // eight tokens a thread block

}  // namespace mirage::cuda

// Boxes of blocks of tokens: a thread block a box.
#pragma once

#include "../core/frustum.h"
#include "common.cuh"

namespace mirage::cuda {

// Float bits as integers in the order of the floats, -0 before 0; its own inverse.
__device__ __forceinline__ int ordered(int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// Writes the box of one block of the first `count` points; all kBlockTokens threads of a thread block call it together.
__device__ __forceinline__ void write_box(const float4* points, index_t count, index_t block, float* bounds) {
  __shared__ int sides[kBoxSize][kBlockTokens / 32];
  const index_t i = block * kBlockTokens + threadIdx.x;
  float4 p = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (i < count) p = points[i];
  const bool counts = i < count && is_finite(p.x) && is_finite(p.y) && is_finite(p.z);
  const float xyz[3] = {p.x, p.y, p.z};
  for (int j = 0; j < 3; ++j) {
    const int low = warp_min(ordered(static_cast<int>(counts ? float_bits(xyz[j]) : 0x7f800000u)));
    const int high = warp_max(ordered(static_cast<int>(counts ? float_bits(xyz[j]) : 0xff800000u)));
    if (threadIdx.x % 32 == 0) {
      sides[j][threadIdx.x / 32] = low;
      sides[3 + j][threadIdx.x / 32] = high;
    }
  }
  __syncthreads();
  if (threadIdx.x < kBoxSize) {
    int side = sides[threadIdx.x][0];
    for (int w = 1; w < kBlockTokens / 32; ++w)
      side = threadIdx.x < 3 ? min(side, sides[threadIdx.x][w]) : max(side, sides[threadIdx.x][w]);
    bounds[block * kBoxSize + threadIdx.x] = bits_float(static_cast<uint32_t>(ordered(side))) + 0.0f;  // no -0
  }
  __syncthreads();
}

// The boxes of all blocks or, given `touched`, of those whose word is not 0.
static __global__ void __launch_bounds__(kBlockTokens)
    bounds_kernel(const float4* __restrict__ points, const int64_t* __restrict__ num_points, index_t capacity,
                  const unsigned* __restrict__ touched, float* __restrict__ bounds) {
  const index_t count = live_points(num_points, capacity);
  for (index_t b = blockIdx.x; b * kBlockTokens < capacity; b += gridDim.x)
    if (touched == nullptr || touched[b] != 0) write_box(points, count, b, bounds);
}

inline void update_bounds(const Tensor& points, const int64_t* num_points, const unsigned* touched, const Tensor& bounds,
                          cudaStream_t stream) {
  const index_t capacity = points.size(0);
  if (capacity == 0) return;
  bounds_kernel<<<grid_for(capacity, kBlockTokens, 8), kBlockTokens, 0, stream>>>(
      input<float4>(points), num_points, capacity, touched, output<float>(bounds));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Bounds that are written in place: a box for every block of `capacity` points.
inline void check_bounds(const Tensor& bounds, index_t capacity) {
  STD_TORCH_CHECK(bounds.is_cuda() && bounds.scalar_type() == ScalarType::Float && bounds.is_contiguous() &&
                      bounds.numel() == divide_up(capacity, kBlockTokens) * kBoxSize,
                  "bounds must be contiguous float32 with a box for every 256 points: they are written in place");
}

}  // namespace mirage::cuda

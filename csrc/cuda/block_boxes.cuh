// Bounding boxes of blocks of tokens, and of tiles of blocks: one thread block per box.
#pragma once

#include "../core/frustum.h"
#include "common.cuh"

namespace mirage::cuda {

// Float bits as integers in the order of the floats, with -0 before 0. The function is its own inverse.
__device__ __forceinline__ int ordered(int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// Writes the box around the points that the kThreads threads of a thread block pass; a thread without `counts` has
// none. All threads call it together.
template <int kThreads>
__device__ __forceinline__ void write_around(bool counts, const float (&low)[3], const float (&high)[3], float* box) {
  __shared__ int sides[kBoxSize][kThreads / 32];
  for (int j = 0; j < 3; ++j) {
    const int least = warp_min(ordered(static_cast<int>(counts ? float_bits(low[j]) : 0x7f800000u)));
    const int greatest = warp_max(ordered(static_cast<int>(counts ? float_bits(high[j]) : 0xff800000u)));
    if (threadIdx.x % 32 == 0) {
      sides[j][threadIdx.x / 32] = least;
      sides[3 + j][threadIdx.x / 32] = greatest;
    }
  }
  __syncthreads();
  if (threadIdx.x < kBoxSize) {
    int side = sides[threadIdx.x][0];
    for (int w = 1; w < kThreads / 32; ++w)
      side = threadIdx.x < 3 ? min(side, sides[threadIdx.x][w]) : max(side, sides[threadIdx.x][w]);
    box[threadIdx.x] = bits_float(static_cast<uint32_t>(ordered(side))) + 0.0f;  // no -0
  }
  __syncthreads();
}

// Writes the box of one block of the first `count` points; all kBlockTokens threads of a thread block call it together.
__device__ __forceinline__ void write_box(const float4* points, index_t count, index_t block, float* bounds) {
  const index_t i = block * kBlockTokens + threadIdx.x;
  float4 p = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (i < count) p = points[i];
  const float xyz[3] = {p.x, p.y, p.z};
  const bool counts = i < count && is_finite(p.x) && is_finite(p.y) && is_finite(p.z);
  write_around<kBlockTokens>(counts, xyz, xyz, bounds + block * kBoxSize);
}

constexpr int kTileThreads = 32;

// Updates the boxes of tiles from those of their blocks: of all tiles or, given `touched`, of those with a block whose
// word is not 0 or, given the report of a write, of those with blocks it appended to, counted from the first of them.
static __global__ void __launch_bounds__(kTileThreads)
    tiles_kernel(const int64_t* __restrict__ num_points, const unsigned* __restrict__ touched,
                 const int64_t* __restrict__ report, index_t capacity, float* __restrict__ bounds) {
  const index_t count = live_points(num_points, capacity), written = report == nullptr ? count : report[0];
  const index_t tile = (count - written) / (kBlockTokens * kTileBlocks) + blockIdx.x;
  if (report != nullptr && (written <= 0 || tile * kTileBlocks * kBlockTokens >= count)) return;
  const index_t blocks = (capacity + kBlockTokens - 1) / kBlockTokens;
  const float infinity = bits_float(0x7f800000u);
  float low[3] = {infinity, infinity, infinity}, high[3] = {-infinity, -infinity, -infinity};
  int asked = touched == nullptr;
  for (int k = threadIdx.x; k < kTileBlocks; k += kTileThreads) {
    const index_t block = tile * kTileBlocks + k;
    if (touched != nullptr && block < blocks && touched[block] != 0) asked = 1;
    if (block * kBlockTokens >= count) continue;
    for (int j = 0; j < 3; ++j) {
      low[j] = fminf(low[j], bounds[block * kBoxSize + j]);
      high[j] = fmaxf(high[j], bounds[block * kBoxSize + 3 + j]);
    }
  }
  if (warp_max(asked) != 0) write_around<kTileThreads>(true, low, high, bounds + (blocks + tile) * kBoxSize);
}

// Updates the boxes of all blocks or, given `touched`, of those whose word is not 0.
static __global__ void __launch_bounds__(kBlockTokens)
    bounds_kernel(const float4* __restrict__ points, const int64_t* __restrict__ num_points, index_t capacity,
                  const unsigned* __restrict__ touched, float* __restrict__ bounds) {
  const index_t count = live_points(num_points, capacity);
  for (index_t b = blockIdx.x; b * kBlockTokens < capacity; b += gridDim.x)
    if (touched == nullptr || touched[b] != 0) write_box(points, count, b, bounds);
}

inline void update_bounds(const Tensor& points, const int64_t* num_points, const unsigned* touched,
                          const Tensor& bounds, cudaStream_t stream) {
  const index_t capacity = points.size(0);
  if (capacity == 0) return;
  bounds_kernel<<<grid_for(capacity, kBlockTokens, 8), kBlockTokens, 0, stream>>>(
      input<float4>(points), num_points, capacity, touched, output<float>(bounds));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  tiles_kernel<<<static_cast<unsigned>(divide_up(capacity, kBlockTokens * kTileBlocks)), kTileThreads, 0, stream>>>(
      num_points, touched, nullptr, capacity, output<float>(bounds));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Checks bounds that are written in place: they must hold the boxes of all blocks and tiles of `capacity` points.
inline void check_bounds(const Tensor& bounds, index_t capacity) {
  STD_TORCH_CHECK(bounds.is_cuda() && bounds.scalar_type() == ScalarType::Float && bounds.is_contiguous() &&
                      bounds.numel() == bounds_rows(capacity) * kBoxSize,
                  "bounds must be contiguous float32 with the boxes of ", capacity,
                  " points: they are written in place");
}

}  // namespace mirage::cuda

// How kernels that read points go over them: block by block, and only where a view may see the block.
#pragma once

#include "../core/frustum.h"
#include "common.cuh"

namespace mirage::cuda {

constexpr int kSharedViews = 16;  // in shared memory, where all lanes read the same one at once
constexpr int kWordViews = 32;    // one bit each in a word per block
constexpr int kCullThreads = 128;

// Without bounds all pointers are null: then every view may see every block.
struct VisibleBlocks {
  const unsigned* masks;  // (words, blocks): bit t % 32 of word t / 32 says whether view t may see the block
  const int* numbers;     // of the blocks that some view may see, in any order
  const int* listed;      // how many numbers there are
  index_t blocks;

  __device__ __forceinline__ unsigned mask(int word, index_t block) const {
    return masks == nullptr ? ~0u : masks[word * blocks + block];
  }
};

// One thread per block: this costs very little compared with reading the points of blocks that no view sees. `cameras`
// begin with their projection and are `stride` floats apart.
static __global__ void __launch_bounds__(kCullThreads)
    cull_kernel(const float* __restrict__ bounds, const int64_t* __restrict__ num_points, index_t capacity,
                const float* __restrict__ cameras, int stride, int views, int height, int width, int margin, float near,
                unsigned* __restrict__ masks, int* __restrict__ numbers, int* listed) {
  __shared__ Frustum frusta[kWordViews];
  const index_t blocks = (capacity + kBlockTokens - 1) / kBlockTokens;
  const index_t block = static_cast<index_t>(blockIdx.x) * kCullThreads + threadIdx.x;
  const bool live = block * kBlockTokens < live_points(num_points, capacity);
  float box[kBoxSize] = {};
  if (live)
    for (int j = 0; j < kBoxSize; ++j) box[j] = __ldg(bounds + block * kBoxSize + j);
  bool any = false;
  for (int first = 0; first < views; first += kWordViews) {
    const int number = min(kWordViews, views - first);
    __syncthreads();
    if (threadIdx.x < number) {
      Projection projection;
      for (int k = 0; k < 12; ++k) projection.m[k / 4][k % 4] = __ldg(cameras + (first + threadIdx.x) * stride + k);
      frusta[threadIdx.x] = make_frustum(projection, near, width, height, margin);
    }
    __syncthreads();
    unsigned mask = 0;
    for (int t = 0; live && t < number; ++t) mask |= (may_see(frusta[t], box) ? 1u : 0u) << t;
    if (block < blocks) masks[first / kWordViews * blocks + block] = mask;
    any |= mask != 0;
  }
  const unsigned visible = __ballot_sync(kFullWarp, any);
  const int lane = threadIdx.x % 32;
  int place = 0;
  if (lane == 0 && visible != 0) place = atomicAdd(listed, __popc(visible));
  place = __shfl_sync(kFullWarp, place, 0) + __popc(visible & ((1u << lane) - 1u));
  if (any) numbers[place] = static_cast<int>(block);
}

// Finds which views may see which blocks, and owns what VisibleBlocks points to.
class CulledBlocks {
 public:
  CulledBlocks(const std::optional<Tensor>& bounds_, const Tensor& points, const int64_t* num_points,
               const Tensor& cameras, index_t height, index_t width, int margin, double near, cudaStream_t stream) {
    const index_t capacity = points.size(0), blocks = divide_up(capacity, kBlockTokens);
    const int views = static_cast<int>(cameras.size(0));
    if (!bounds_.has_value() || capacity == 0) return;
    const Tensor bounds = checked(*bounds_, ScalarType::Float, "bounds");
    STD_TORCH_CHECK(bounds.numel() == bounds_rows(capacity) * kBoxSize, "bounds must hold the boxes of ", capacity,
                    " points");
    masks_ = new_tensor(points, {divide_up(views, kWordViews), blocks}, ScalarType::Int);
    numbers_ = new_tensor(points, {blocks}, ScalarType::Int);
    listed_ = new_tensor(points, {1}, ScalarType::Int);
    fill_bytes(listed_, 0, stream);
    cull_kernel<<<static_cast<unsigned>(divide_up(blocks, kCullThreads)), kCullThreads, 0, stream>>>(
        input<float>(bounds), num_points, capacity, input<float>(cameras), static_cast<int>(cameras.size(1)), views,
        static_cast<int>(height), static_cast<int>(width), margin, static_cast<float>(near), output<unsigned>(masks_),
        output<int>(numbers_), output<int>(listed_));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    visible = {input<unsigned>(masks_), input<int>(numbers_), input<int>(listed_), blocks};
  }

  VisibleBlocks visible{nullptr, nullptr, nullptr, 0};

 private:
  Tensor masks_, numbers_, listed_;
};

struct Points {
  const float4* points;
  const int64_t* num_points;
  index_t capacity;
  VisibleBlocks visible;
};

// Each thread takes a point with one 16-byte load and passes it to every view that may see its block: f(i, point, t,
// view). For kernels of kBlockTokens threads a thread block; `shared` holds kSharedViews views.
template <typename View, typename F>
__device__ __forceinline__ void for_each_point(const Points& points, const View* views, int count, View* shared,
                                               const F& f) {
  constexpr int kWords = sizeof(View) / 4;
  const VisibleBlocks& visible = points.visible;
  const index_t live = live_points(points.num_points, points.capacity);
  const int listed =
      visible.listed == nullptr ? static_cast<int>((live + kBlockTokens - 1) / kBlockTokens) : *visible.listed;
  for (int first = 0; first < count; first += kSharedViews) {
    const int number = min(kSharedViews, count - first);
    __syncthreads();
    for (int k = threadIdx.x; k < number * kWords; k += kBlockTokens)
      reinterpret_cast<float*>(shared)[k] = reinterpret_cast<const float*>(views + first)[k];
    __syncthreads();
    for (int k = blockIdx.x; k < listed; k += gridDim.x) {
      const int block = visible.listed == nullptr ? k : visible.numbers[k];
      const index_t i = index_t{block} * kBlockTokens + threadIdx.x;
      unsigned mask = visible.mask(first / kWordViews, block) >> (first % kWordViews) & ((1u << number) - 1u);
      if (mask == 0 || i >= live) continue;
      const float4 p = __ldg(points.points + i);
      for (; mask != 0; mask &= mask - 1) {
        const int t = __ffs(static_cast<int>(mask)) - 1;
        f(i, p, first + t, shared[t]);
      }
    }
  }
}

}  // namespace mirage::cuda

// splat on CUDA: one pass over the points for all views, a 64-bit minimum per cell, then a gather of the winners.
//
// In: points (N, 4), features (N, C), cameras of T views. Out: latents (T, C, h, w), mask, depth, index (T, h, w).
#include "../core/depth_key.h"
#include "feature_rows.cuh"
#include "culling.cuh"

namespace mirage::cuda {
namespace {

constexpr int kCells = 32;     // cells per readout block: a warp's store is one 128-byte line of float32
constexpr int kChannels = 64;  // channels staged at a time
constexpr int kReadThreads = 256;

// The plain load before the atomic can only be stale towards "farther", so it saves atomics and loses no token.
__global__ void __launch_bounds__(kBlockTokens, 6)  // 40 registers a thread
    fill_keys_kernel(Points points, const Projection* __restrict__ projections, int views, int height, int width,
                     float near, unsigned long long* keys) {
  __shared__ Projection shared[kSharedViews];
  const index_t cells = static_cast<index_t>(height) * width;
  const float limit_u = static_cast<float>(width), limit_v = static_cast<float>(height);
  for_each_point(points, projections, views, shared, [&](index_t i, const float4& p, int t, const Projection& view) {
    const Projected q = project_point(view, p.x, p.y, p.z);
    if (!in_view(q, near, limit_u, limit_v)) return;
    const index_t cell = static_cast<index_t>(static_cast<int>(q.v)) * width + static_cast<int>(q.u);
    unsigned long long* at = keys + t * cells + cell;
    const unsigned long long key = make_key(q.z, static_cast<uint32_t>(i));
    if (key < __ldcg(at)) atomicMin(at, key);
  });
}

// A thread block reads out kCells neighbouring cells of one view. Rows of winners come in as whole 4-byte words (16
// bytes at a time where rows are aligned), are transposed in shared memory, and go out along the cells. Rows there are
// an odd number of words apart, so that neither direction has bank conflicts.
template <typename In, typename Out, bool kAligned>
__global__ void __launch_bounds__(kReadThreads)
    readout_kernel(const uint64_t* __restrict__ keys, const In* __restrict__ features,
                   const uint8_t* __restrict__ scales, int channels, index_t cells, Out* __restrict__ latents,
                   bool* __restrict__ mask, float* __restrict__ depth, int64_t* __restrict__ index) {
  constexpr int kWords = kChannels * static_cast<int>(sizeof(In)) / 4;
  __shared__ uint32_t tile[kCells][kWords + 1];
  __shared__ int64_t winner[kCells];
  __shared__ float factors[kCells];
  const index_t tiles = (cells + kCells - 1) / kCells;
  const index_t view = blockIdx.x / tiles, first = blockIdx.x % tiles * kCells;
  const int count = static_cast<int>(min(static_cast<index_t>(kCells), cells - first));
  if (threadIdx.x < count) {
    const index_t at = view * cells + first + threadIdx.x;
    const uint64_t key = keys[at];
    const bool seen = key != kEmptyKey;
    winner[threadIdx.x] = seen ? static_cast<int64_t>(key_index(key)) : -1;
    factors[threadIdx.x] = seen ? row_factor<In>(scales, key_index(key)) : 1.0f;
    mask[at] = seen;
    depth[at] = seen ? key_depth(key) : 0.0f;
    index[at] = winner[threadIdx.x];
  }
  __syncthreads();
  for (int base = 0; base < channels; base += kChannels) {
    const int number = min(kChannels, channels - base);
    if constexpr (kAligned) {
      constexpr int kPerLoad = 16 / static_cast<int>(sizeof(In));
      const int loads = number / kPerLoad;
      for (int k = threadIdx.x; k < count * loads; k += kReadThreads) {
        const int cell = k / loads, part = k % loads;
        uint4 words = make_uint4(0, 0, 0, 0);
        if (winner[cell] >= 0)
          words = __ldg(reinterpret_cast<const uint4*>(features + winner[cell] * channels + base) + part);
        tile[cell][4 * part] = words.x;
        tile[cell][4 * part + 1] = words.y;
        tile[cell][4 * part + 2] = words.z;
        tile[cell][4 * part + 3] = words.w;
      }
    } else {
      for (int k = threadIdx.x; k < count * number; k += kReadThreads) {
        const int cell = k / number, c = k % number;
        In value{};
        if (winner[cell] >= 0) value = features[winner[cell] * channels + base + c];
        reinterpret_cast<In*>(tile[cell])[c] = value;
      }
    }
    __syncthreads();
    const int cell = threadIdx.x % kCells;
    if (cell < count) {
      for (int c = threadIdx.x / kCells; c < number; c += kReadThreads / kCells) {
        const In value = reinterpret_cast<const In*>(tile[cell])[c];
        Out& latent = latents[(view * channels + base + c) * cells + first + cell];
        if constexpr (std::is_same_v<In, Out>) {
          latent = value;  // converting to float and back would not keep the bits of a NaN
        } else {
          latent = from_float<Out>(feature_value(value, factors[cell]));
        }
      }
    }
    __syncthreads();
  }
}

// The gradient of one view. Within a view a token wins at most one cell, so plain additions do not collide.
template <typename In>
__global__ void __launch_bounds__(kReadThreads)
    splat_backward_kernel(const In* __restrict__ grad, const int64_t* __restrict__ index, int channels, index_t cells,
                          float* __restrict__ sums) {
  __shared__ float tile[kCells][kChannels + 1];
  __shared__ int64_t winner[kCells];
  const index_t first = static_cast<index_t>(blockIdx.x) * kCells;
  const int count = static_cast<int>(min(static_cast<index_t>(kCells), cells - first));
  if (threadIdx.x < count) winner[threadIdx.x] = index[first + threadIdx.x];
  for (int base = 0; base < channels; base += kChannels) {
    const int number = min(kChannels, channels - base);
    __syncthreads();
    const int column = threadIdx.x % kCells;
    if (column < count)
      for (int c = threadIdx.x / kCells; c < number; c += kReadThreads / kCells)
        tile[column][c] = to_float(grad[(base + c) * cells + first + column]);
    __syncthreads();
    for (int k = threadIdx.x; k < count * number; k += kReadThreads) {
      const int cell = k / number, c = k % number;
      if (winner[cell] >= 0) sums[winner[cell] * channels + base + c] += tile[cell][c];
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> splat(const Tensor& points_, const Tensor& features_,
                                                 const std::optional<Tensor>& num_points, const Tensor& intrinsics_,
                                                 const Tensor& cam2world_, int64_t height, int64_t width, double near,
                                                 ScalarType dtype, const std::optional<Tensor>& bounds,
                                                 const std::optional<Tensor>& scales_) {
  const torch::stable::accelerator::DeviceGuard guard(points_.get_device_index());
  const Tensor points = checked_points(points_);
  const Tensor features = as_contiguous(features_);
  const std::optional<Tensor> scales = checked_scales(features, scales_);
  const Tensor intrinsics = checked(intrinsics_, ScalarType::Double, "intrinsics");
  const Tensor cam2world = checked(cam2world_, ScalarType::Double, "cam2world");
  const cudaStream_t stream = current_stream(points);
  const index_t views = cam2world.size(0), channels = features.size(1), cells = height * width;
  const index_t capacity = points.size(0);

  Tensor latents = new_tensor(points, {views, channels, height, width}, dtype);
  Tensor mask = new_tensor(points, {views, height, width}, ScalarType::Bool);
  Tensor depth = new_tensor(points, {views, height, width}, ScalarType::Float);
  Tensor index = new_tensor(points, {views, height, width}, ScalarType::Long);
  if (views * cells == 0) return {latents, mask, depth, index};

  Tensor keys = new_tensor(points, {views, cells}, ScalarType::Long);
  fill_bytes(keys, 0xff, stream);
  if (capacity > 0) {
    const Tensor projections = make_projections(intrinsics, cam2world, stream);
    const int64_t* count = count_pointer(num_points);
    const CulledBlocks culled(bounds, points, count, projections, height, width, 0, near, stream);
    fill_keys_kernel<<<grid_for(capacity, kBlockTokens, 16), kBlockTokens, 0, stream>>>(
        Points{input<float4>(points), count, capacity, culled.visible}, input<Projection>(projections),
        static_cast<int>(views), static_cast<int>(height), static_cast<int>(width), static_cast<float>(near),
        output<unsigned long long>(keys));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  const index_t blocks = views * divide_up(cells, kCells);
  STD_TORCH_CHECK(blocks < (index_t{1} << 31), "size and the number of views must stay below 2^31 blocks of 32 cells");
  for_stored_type(features.scalar_type(), [&](auto in) {
    using In = decltype(in);
    const bool aligned = channels * sizeof(In) % 16 == 0 && reinterpret_cast<uintptr_t>(features.data_ptr()) % 16 == 0;
    for_feature_type(dtype, [&](auto out) {
      using Out = decltype(out);
      const auto launch = [&](auto kernel) {
        kernel<<<static_cast<unsigned>(blocks), kReadThreads, 0, stream>>>(
            input<uint64_t>(keys), input<In>(features), scale_pointer(scales), static_cast<int>(channels), cells,
            output<Out>(latents), output<bool>(mask), output<float>(depth), output<int64_t>(index));
      };
      if (aligned) {
        launch(readout_kernel<In, Out, true>);
      } else {
        launch(readout_kernel<In, Out, false>);
      }
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {latents, mask, depth, index};
}

Tensor splat_backward(const Tensor& grad_latents_, const Tensor& index_, int64_t num_points, ScalarType dtype) {
  const torch::stable::accelerator::DeviceGuard guard(grad_latents_.get_device_index());
  const Tensor grad_latents = as_contiguous(grad_latents_);
  const Tensor index = checked(index_, ScalarType::Long, "index");
  const cudaStream_t stream = current_stream(grad_latents);
  const index_t views = grad_latents.size(0), channels = grad_latents.size(1);
  const index_t cells = grad_latents.size(2) * grad_latents.size(3);
  Tensor sums = new_tensor(grad_latents, {num_points, channels}, ScalarType::Float);
  fill_bytes(sums, 0, stream);
  if (num_points > 0 && cells > 0) {
    for_feature_type(grad_latents.scalar_type(), [&](auto in) {
      using In = decltype(in);
      for (index_t t = 0; t < views; ++t) {
        splat_backward_kernel<<<static_cast<unsigned>(divide_up(cells, kCells)), kReadThreads, 0, stream>>>(
            input<In>(grad_latents) + t * channels * cells, input<int64_t>(index) + t * cells,
            static_cast<int>(channels), cells, output<float>(sums));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
    });
  }
  return dtype == ScalarType::Float ? sums : torch::stable::to(sums, dtype);
}

}  // namespace mirage::cuda

STABLE_TORCH_LIBRARY_IMPL(mirage, CUDA, m) {
  m.impl("splat_compiled", TORCH_BOX(&mirage::cuda::splat));
  m.impl("splat_backward_compiled", TORCH_BOX(&mirage::cuda::splat_backward));
}

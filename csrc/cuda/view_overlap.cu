// view_overlap on CUDA: a stable sort groups points by voxel, each voxel collects a bit per view that sees it, and the
// bits are counted.
//
// In: points (N, 4), cameras of V earlier and T target views. Out: (V, 2), voxels seen by both and by either.
#include "../core/voxel.h"
#include "culling.cuh"

namespace mirage::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void keys_kernel(const float4* __restrict__ points, index_t count, float voxel_size,
                            int64_t* __restrict__ keys) {
  const index_t stride = static_cast<index_t>(gridDim.x) * kThreads;
  for (index_t i = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    const float4 p = points[i];
    keys[i] = static_cast<int64_t>(voxel_key(p.x, p.y, p.z, voxel_size));
  }
}

__global__ void heads_kernel(const int64_t* __restrict__ sorted, index_t count, int64_t* __restrict__ heads) {
  const index_t stride = static_cast<index_t>(gridDim.x) * kThreads;
  for (index_t i = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride)
    heads[i] = i == 0 || sorted[i] != sorted[i - 1];
}

// seen[voxel] |= one bit per view that has a point of the voxel in its grid. OR does not depend on order. voxel counts
// from 1.
__global__ void __launch_bounds__(kThreads)
    mark_kernel(Points points, int word, const int64_t* __restrict__ order, const int64_t* __restrict__ voxel,
                const Projection* __restrict__ projections, int views, int height, int width, float near,
                unsigned* seen) {
  __shared__ Projection shared[kWordViews];
  for (int k = threadIdx.x; k < views * 12; k += kThreads)
    reinterpret_cast<float*>(shared)[k] = reinterpret_cast<const float*>(projections)[k];
  __syncthreads();
  const index_t capacity = points.capacity, live = live_points(points.num_points, capacity);
  const float limit_u = static_cast<float>(width), limit_v = static_cast<float>(height);
  const index_t stride = static_cast<index_t>(gridDim.x) * kThreads;
  for (index_t i = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x; i < capacity; i += stride) {
    const index_t token = order[i];
    if (token >= live) continue;
    const unsigned mask = points.visible.mask(word, token / kBlockTokens);
    if (mask == 0) continue;
    const float4 p = __ldg(points.points + token);
    unsigned bits = 0;
    for (int v = 0; v < views; ++v)
      if (mask >> v & 1u)
        bits |= (in_view(project_point(shared[v], p.x, p.y, p.z), near, limit_u, limit_v) ? 1u : 0u) << v;
    if (bits == 0) continue;
    unsigned* at = seen + voxel[i] - 1;
    if ((__ldcg(at) & bits) != bits) atomicOr(at, bits);
  }
}

// Lane v of each warp counts for view v: voxels seen by it and by a target, and by either.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const unsigned* __restrict__ seen, const unsigned* __restrict__ target, index_t voxels, int views,
                 unsigned long long* counts) {
  const int lane = threadIdx.x % 32;
  const index_t warps = static_cast<index_t>(gridDim.x) * (kThreads / 32);
  unsigned long long both = 0, either = 0;
  for (index_t first = (static_cast<index_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32) * 32; first < voxels;
       first += warps * 32) {
    const index_t m = first + lane;
    const unsigned word = m < voxels ? seen[m] : 0u;
    const unsigned targets = __ballot_sync(kFullWarp, m < voxels && target[m] != 0);
    for (int v = 0; v < views; ++v) {
      const unsigned view = __ballot_sync(kFullWarp, (word >> v) & 1u);
      if (lane == v) {
        both += __popc(view & targets);
        either += __popc(view | targets);
      }
    }
  }
  if (lane < views) {
    if (both != 0) atomicAdd(counts + 2 * lane, both);
    if (either != 0) atomicAdd(counts + 2 * lane + 1, either);
  }
}

std::tuple<Tensor, Tensor> stable_sort(const Tensor& keys) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(keys), torch::stable::detail::from(std::optional(true)),
                                    torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Tensor running_sum(const Tensor& values) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(values), torch::stable::detail::from(int64_t{0}),
                                    torch::stable::detail::from(std::optional<ScalarType>())};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

Tensor view_overlap(const Tensor& points_, const std::optional<Tensor>& num_points, const Tensor& intrinsics_,
                    const Tensor& cam2world_, const Tensor& target_intrinsics_, const Tensor& target_cam2world_,
                    int64_t height, int64_t width, double voxel_size, double near,
                    const std::optional<Tensor>& bounds) {
  const torch::stable::accelerator::DeviceGuard guard(points_.get_device_index());
  const Tensor points = checked_points(points_);
  const Tensor intrinsics = checked(intrinsics_, ScalarType::Double, "intrinsics");
  const Tensor cam2world = checked(cam2world_, ScalarType::Double, "cam2world");
  const Tensor target_intrinsics = checked(target_intrinsics_, ScalarType::Double, "target_intrinsics");
  const Tensor target_cam2world = checked(target_cam2world_, ScalarType::Double, "target_cam2world");
  const cudaStream_t stream = current_stream(points);
  const index_t capacity = points.size(0), views = cam2world.size(0), targets = target_cam2world.size(0);
  Tensor counts = new_tensor(points, {views, 2}, ScalarType::Long);
  fill_bytes(counts, 0, stream);
  if (capacity == 0 || views == 0) return counts;

  const unsigned grid = grid_for(capacity, kThreads, 16);
  Tensor keys = new_tensor(points, {capacity}, ScalarType::Long);
  keys_kernel<<<grid, kThreads, 0, stream>>>(input<float4>(points), capacity, static_cast<float>(voxel_size),
                                             output<int64_t>(keys));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const auto [sorted, order] = stable_sort(keys);
  heads_kernel<<<grid, kThreads, 0, stream>>>(input<int64_t>(sorted), capacity, output<int64_t>(keys));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const Tensor voxel = running_sum(keys);

  Tensor target_seen = new_tensor(points, {capacity}, ScalarType::Int);
  Tensor seen = new_tensor(points, {capacity}, ScalarType::Int);
  const auto mark = [&](const Tensor& projections, index_t number, const Tensor& into) {
    const CulledBlocks culled(number > 0 ? bounds : std::nullopt, points, count_pointer(num_points), projections,
                              height, width, 0, near, stream);
    const Points all{input<float4>(points), count_pointer(num_points), capacity, culled.visible};
    for (index_t first = 0; first < number; first += kWordViews) {
      const int batch = static_cast<int>(std::min<index_t>(kWordViews, number - first));
      mark_kernel<<<grid, kThreads, 0, stream>>>(all, static_cast<int>(first / kWordViews), input<int64_t>(order),
                                                 input<int64_t>(voxel), input<Projection>(projections) + first, batch,
                                                 static_cast<int>(height), static_cast<int>(width),
                                                 static_cast<float>(near), output<unsigned>(into));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      if (&into == &target_seen) continue;
      count_kernel<<<grid, kThreads, 0, stream>>>(input<unsigned>(seen), input<unsigned>(target_seen), capacity, batch,
                                                  output<unsigned long long>(counts) + 2 * first);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      fill_bytes(seen, 0, stream);
    }
  };
  fill_bytes(target_seen, 0, stream);
  fill_bytes(seen, 0, stream);
  mark(make_projections(target_intrinsics, target_cam2world, stream), targets, target_seen);
  mark(make_projections(intrinsics, cam2world, stream), views, seen);
  return counts;
}

}  // namespace mirage::cuda

STABLE_TORCH_LIBRARY_IMPL(mirage, CUDA, m) { m.impl("view_overlap_compiled", TORCH_BOX(&mirage::cuda::view_overlap)); }

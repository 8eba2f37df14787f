// squared_distance on CUDA: one thread a token, on the current stream, nothing waits.
//
// In: points (N, 4), center (3,). Out: (N,), 0 past the live rows.
#include "cuda/common.cuh"

namespace mirage::cuda {

__global__ void squared_distance_kernel(const float4* points, const float* center, const int64_t* count, float* out,
                                        index_t total) {
  const index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= total) return;
  const index_t live = count == nullptr ? total : *count;
  const float4 p = points[i];
  const float dx = p.x - center[0], dy = p.y - center[1], dz = p.z - center[2];
  out[i] = i < live ? (dx * dx + dy * dy) + dz * dz : 0.0f;
}

Tensor squared_distance(const Tensor& points_, const Tensor& center_, const std::optional<Tensor>& num_points) {
  const torch::stable::accelerator::DeviceGuard guard(points_.get_device_index());
  const Tensor points = checked_points(points_), center = checked(center_, ScalarType::Float, "center");
  const index_t total = points.size(0);
  Tensor distances = new_tensor(points, {total}, ScalarType::Float);
  if (total == 0) return distances;
  squared_distance_kernel<<<divide_up(total, 256), 256, 0, current_stream(points)>>>(
      input<float4>(points), input<float>(center), count_pointer(num_points), output<float>(distances), total);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return distances;
}

}  // namespace mirage::cuda

STABLE_TORCH_LIBRARY_IMPL(mirage, CUDA, m) {
  m.impl("squared_distance_compiled", TORCH_BOX(&mirage::cuda::squared_distance));
}

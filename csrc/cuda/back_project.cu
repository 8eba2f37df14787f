// back_project on CUDA: one warp per token, one pass over the depth map.
//
// In: depth (T, H, W), cameras, mask. Out: points (T, h, w, 4), 0 where not valid, and valid (T, h, w).
#include "lift.cuh"

namespace mirage::cuda {
namespace {

__global__ void __launch_bounds__(kLiftThreads)
    back_project_kernel(DepthSource source, const Lift* __restrict__ lifts, float4* __restrict__ points,
                        bool* __restrict__ valid) {
  const int lane = threadIdx.x % 32;
  const index_t token = static_cast<index_t>(blockIdx.x) * (kLiftThreads / 32) + threadIdx.x / 32;
  const index_t cells = source.height * source.width;
  if (token >= source.views * cells) return;
  const index_t t = token / cells, i = token % cells / source.width, j = token % source.width;
  int32_t least;
  const float z = token_depth(source, t, i, j, lane, least);
  const bool is_static = token_static(source, t, i, j, lane);
  if (lane != 0) return;
  const LiftedToken p = lift_token(lifts[t], static_cast<int>(i), static_cast<int>(j), z);
  const bool keep = is_static && z > 0.0f && is_finite_token(p);
  points[token] = keep ? make_float4(p.x, p.y, p.z, p.footprint) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  valid[token] = keep;
}

}  // namespace

std::tuple<Tensor, Tensor> back_project(const Tensor& depth_, const Tensor& intrinsics_, const Tensor& cam2world_,
                                        const std::optional<Tensor>& mask_, int64_t height, int64_t width,
                                        bool bilinear) {
  const torch::stable::accelerator::DeviceGuard guard(depth_.get_device_index());
  const Tensor depth = checked(depth_, ScalarType::Float, "depth");
  const Tensor intrinsics = checked(intrinsics_, ScalarType::Double, "intrinsics");
  const Tensor cam2world = checked(cam2world_, ScalarType::Double, "cam2world");
  std::optional<Tensor> mask;
  if (mask_.has_value()) mask = checked(*mask_, ScalarType::Bool, "mask");
  const cudaStream_t stream = current_stream(depth);
  const DepthSource source = make_source(depth, mask, height, width, bilinear);
  Tensor points = new_tensor(depth, {source.views, height, width, 4}, ScalarType::Float);
  Tensor valid = new_tensor(depth, {source.views, height, width}, ScalarType::Bool);
  const index_t tokens = source.views * height * width;
  if (tokens == 0) return {points, valid};
  const Tensor lifts = make_lifts(intrinsics, cam2world, source, stream);
  back_project_kernel<<<static_cast<unsigned>(divide_up(tokens, kLiftThreads / 32)), kLiftThreads, 0, stream>>>(
      source, input<Lift>(lifts), output<float4>(points), output<bool>(valid));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {points, valid};
}

}  // namespace mirage::cuda

STABLE_TORCH_LIBRARY_IMPL(mirage, CUDA, m) { m.impl("back_project_compiled", TORCH_BOX(&mirage::cuda::back_project)); }

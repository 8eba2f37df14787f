// Shared by all CUDA operators: the current stream, launch checks, warp reductions, cameras made on the device.
//
// Operators work on the current stream only, never wait for the host, and allocate through torch by shape alone: they
// can be captured in a CUDA graph.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../core/camera.h"
#include "../core/tensor.h"

namespace mirage::cuda {

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Tensor checked(const Tensor& tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.scalar_type() == dtype, name,
                  " has another dtype or device than declared");
  return as_contiguous(tensor);
}

// Points are loaded 16 bytes at a time, but a tensor may begin anywhere in its storage.
inline bool is_aligned(const Tensor& points) { return reinterpret_cast<uintptr_t>(points.const_data_ptr()) % 16 == 0; }

inline Tensor checked_points(const Tensor& points_) {
  const Tensor points = checked(points_, ScalarType::Float, "points");
  return is_aligned(points) ? points : torch::stable::clone(points);
}

inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> size, ScalarType dtype) {
  return allocate(size, "out of memory, or an earlier kernel failed",
                  [&] { return torch::stable::new_empty(like, size, dtype); });
}

inline void fill_bytes(const Tensor& tensor, int byte, cudaStream_t stream) {
  const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
  if (bytes > 0) STD_CUDA_CHECK(cudaMemsetAsync(tensor.mutable_data_ptr(), byte, bytes, stream));
}

// Calls f with a value of the device type of a feature dtype.
template <typename F>
inline void for_feature_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(__half{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, "features must be float32, float16 or bfloat16");
  }
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ int warp_sum(int value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kFullWarp, value);
#else
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
#endif
}

__device__ __forceinline__ int warp_min(int value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_min_sync(kFullWarp, value);
#else
  for (int offset = 16; offset > 0; offset /= 2) value = min(value, __shfl_xor_sync(kFullWarp, value, offset));
  return value;
#endif
}

__device__ __forceinline__ int warp_max(int value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kFullWarp, value);
#else
  for (int offset = 16; offset > 0; offset /= 2) value = max(value, __shfl_xor_sync(kFullWarp, value, offset));
  return value;
#endif
}

// The sum over this thread and those before it in a thread block of kThreads; `totals` holds one value per warp. There
// must be a barrier between two calls with the same `totals`.
template <int kThreads, typename T>
__device__ __forceinline__ T sum_up_to(T own, T (&totals)[kThreads / 32]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T sum = own;
  for (int offset = 1; offset < 32; offset *= 2) {
    const T other = __shfl_up_sync(kFullWarp, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) totals[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += totals[w];
  return sum;
}

// Rows in use: the count in device memory where there is one, never more than the buffer holds.
__device__ __forceinline__ index_t live_points(const int64_t* num_points, index_t capacity) {
  if (num_points == nullptr) return capacity;
  const index_t count = *num_points;
  return count < 0 ? 0 : (count < capacity ? count : capacity);
}

inline const int64_t* count_pointer(const std::optional<Tensor>& num_points) {
  return num_points.has_value() ? input<int64_t>(*num_points) : nullptr;
}

// Thread blocks for a grid-stride loop over `items`: enough to fill the device several times over, and no more, so that
// a buffer far larger than its live part costs nothing.
inline unsigned grid_for(index_t items, int threads, int blocks_per_processor) {
  int device = 0, processors = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const index_t wanted = divide_up(items, threads);
  return static_cast<unsigned>(std::clamp<index_t>(wanted, 1, index_t{processors} * blocks_per_processor));
}

static __global__ void make_projections_kernel(const double* intrinsics, const double* cam2world, int views,
                                               Projection* projections) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t < views) projections[t] = make_projection(intrinsics + t * 9, cam2world + t * 16);
}

// Matrices are composed on the device, in float64, once per call: cameras may come from a network and never reach the
// host.
inline Tensor make_projections(const Tensor& intrinsics, const Tensor& cam2world, cudaStream_t stream) {
  const int views = static_cast<int>(cam2world.size(0));
  Tensor projections = new_tensor(cam2world, {views, 12}, ScalarType::Float);
  if (views == 0) return projections;
  make_projections_kernel<<<(views + 63) / 64, 64, 0, stream>>>(input<double>(intrinsics), input<double>(cam2world),
                                                                views, output<Projection>(projections));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return projections;
}

}  // namespace mirage::cuda

// Kernels with one fault each, and a few without: what the emulator must stop, and what it must let pass.
//
// In: which kernel, a tensor of 64 int32. Out: a tensor of 64 int32.
#include "common.cuh"

namespace mirage::cuda {
namespace {

constexpr int kCount = 64;

__global__ void correct(const int* in, int* out) {
  __shared__ int shared[kCount];
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const int mirrored = shared[kCount - 1 - threadIdx.x];
  const int above = __shfl_up_sync(kFullWarp, mirrored, 1);
  out[threadIdx.x] = above + __shfl_xor_sync(kFullWarp, mirrored, 1);
}

__global__ void early_exit_between_barriers(const int* in, int* out) {
  __shared__ int shared[kCount];
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] += shared[threadIdx.x + 32];
}

__global__ void racing_atomics(const int* in, unsigned long long* least) {
  const unsigned long long key = static_cast<unsigned long long>(in[threadIdx.x]);
  if (key < __ldcg(least)) atomicMin(least, key);
}

__global__ void missing_barrier(const int* in, int* out) {
  __shared__ int shared[kCount];
  shared[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = shared[kCount - 1 - threadIdx.x];
}

__global__ void missing_second_barrier(const int* in, int* out) {
  __shared__ int shared[kCount];
  int sum = 0;
  for (int k = 0; k < 2; ++k) {
    shared[threadIdx.x] = in[threadIdx.x] + k;
    __syncthreads();
    sum += shared[kCount - 1 - threadIdx.x];
  }
  out[threadIdx.x] = sum;
}

__global__ void barrier_in_a_branch(const int* in, int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void barrier_and_collective(const int* in, int* out) {
  if (threadIdx.x % 32 == 3) {
    __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
  } else {
    out[threadIdx.x] = static_cast<int>(__ballot_sync(kFullWarp, in[threadIdx.x] > 0));
    __syncthreads();
  }
}

__global__ void collective_after_exit(const int* in, int* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = warp_sum(in[threadIdx.x]);
}

__global__ void divergent_collectives(const int* in, int* out) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __all_sync(kFullWarp, in[threadIdx.x] > 0);
  } else {
    out[threadIdx.x] = static_cast<int>(__ballot_sync(kFullWarp, in[threadIdx.x] > 0));
  }
}

__global__ void reads_past_the_end(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }

__global__ void writes_past_the_end(const int* in, int* out) { out[threadIdx.x + 1] = in[threadIdx.x]; }

__global__ void runs_off_shared(const int* in, int* out) {
  __shared__ int shared[kCount];
  __shared__ int behind[kCount];
  shared[threadIdx.x + 1] = in[threadIdx.x];
  behind[threadIdx.x] = 0;
  out[threadIdx.x] = behind[threadIdx.x];
}

__global__ void reads_unwritten_shared(const int* in, int* out) {
  __shared__ int shared[kCount];
  if (threadIdx.x < kCount - 1) shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void reads_unwritten_global(const int* in, int* out) { out[threadIdx.x] += in[threadIdx.x]; }

__global__ void writes_an_input(const int* in, int* out) {
  const_cast<int*>(in)[threadIdx.x] = 0;
  out[threadIdx.x] = 0;
}

__global__ void misaligned(const int* in, int* out) {
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(in + 1));
  out[threadIdx.x] = static_cast<int>(words.x);
}

__global__ void stale_cache(const int* in, int* out) {
  out[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = __ldg(out + threadIdx.x) + 1;
}

__global__ void blocks_meet(const int* in, int* out) { out[threadIdx.x] = in[blockIdx.x]; }

__global__ void plain_beside_atomic(const int* in, unsigned long long* least) {
  if (threadIdx.x == 0) {
    *least = 0;
  } else {
    atomicMin(least, static_cast<unsigned long long>(in[threadIdx.x]));
  }
}

Tensor run_faulty(const Tensor& in, int64_t which) {
  const torch::stable::accelerator::DeviceGuard guard(in.get_device_index());
  const cudaStream_t stream = current_stream(in);
  Tensor out = new_tensor(in, {kCount}, ScalarType::Int);
  using Kernel = void (*)(const int*, int*);
  const Kernel kernels[] = {correct,           early_exit_between_barriers, missing_barrier,       missing_second_barrier,
                            barrier_in_a_branch, barrier_and_collective,    collective_after_exit, divergent_collectives,
                            reads_past_the_end, writes_past_the_end,        runs_off_shared,       reads_unwritten_shared,
                            reads_unwritten_global, writes_an_input,        misaligned,            stale_cache};
  constexpr int64_t kKernels = sizeof(kernels) / sizeof(kernels[0]);
  if (which < kKernels) {
    const Kernel kernel = kernels[which];
    kernel<<<1, kCount, 0, stream>>>(input<int>(in), output<int>(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  } else if (which == kKernels) {
    blocks_meet<<<2, kCount, 0, stream>>>(input<int>(in), output<int>(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  } else if (which == kKernels + 1 || which == kKernels + 2) {
    fill_bytes(out, 0x7f, stream);
    const auto kernel = which == kKernels + 1 ? racing_atomics : plain_beside_atomic;
    kernel<<<1, kCount, 0, stream>>>(input<int>(in), output<unsigned long long>(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  } else if (which == kKernels + 3) {
    correct<<<1, kCount, 0, nullptr>>>(input<int>(in), output<int>(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  } else if (which == kKernels + 4) {
    correct<<<0, kCount, 0, stream>>>(input<int>(in), output<int>(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  } else {
    correct<<<1, kCount, 0, stream>>>(input<int>(in), output<int>(out));
    correct<<<1, kCount, 0, stream>>>(input<int>(in), output<int>(out));
  }
  return out;
}

}  // namespace
}  // namespace mirage::cuda

STABLE_TORCH_LIBRARY_IMPL(mirage, CUDA, m) { m.impl("run_faulty", TORCH_BOX(&mirage::cuda::run_faulty)); }

// Classifies the tokens of T views by whether they are worth writing: shared by cache_write and bounded_write.
#pragma once

#include "../core/constants.h"
#include "feature_rows.cuh"
#include "lift.cuh"

namespace mirage::cuda {

constexpr int kTokens = 256;  // tokens per thread block of classify_kernel

// `depths` (0 where unknown) and `nearest` (least valid depth, infinite where there is none) may be null.
static __global__ void __launch_bounds__(kLiftThreads)
    lift_kernel(DepthSource source, const Lift* __restrict__ lifts, float low, float high, float4* __restrict__ points,
                uint8_t* __restrict__ statuses, float* __restrict__ depths, float* __restrict__ nearest) {
  const int lane = threadIdx.x % 32;
  const index_t token = static_cast<index_t>(blockIdx.x) * (kLiftThreads / 32) + threadIdx.x / 32;
  const index_t cells = source.height * source.width;
  if (token >= source.views * cells) return;
  const index_t t = token / cells, i = token % cells / source.width, j = token % source.width;
  const bool is_static = token_static(source, t, i, j, lane);
  int32_t least = kInfinity;
  const float z = token_depth(source, t, i, j, lane, least);
  if (nearest != nullptr && source.bilinear) least = least_depth(source, t, i, j, lane);
  if (lane != 0) return;
  const LiftedToken p = lift_token(lifts[t], static_cast<int>(i), static_cast<int>(j), z);
  points[token] = make_float4(p.x, p.y, p.z, p.footprint);
  if (depths != nullptr) depths[token] = z;
  if (nearest != nullptr) nearest[token] = bits_float(static_cast<uint32_t>(least));
  statuses[token] = !is_static                 ? kMasked
                    : !(z > 0.0f)              ? kUnknownDepth
                    : !(z >= low && z <= high) ? kOutOfRange
                    : !is_finite_token(p)      ? kNonFinite
                                               : kKept;
}

// One thread per token: neighbouring threads read neighbouring cells of each channel. Kept tokens are counted by thread
// block, where the caller asks for it; rejections are summed at `rejections[status]` with integer atomics, whose order
// cannot matter.
template <typename In, typename Out>
__global__ void __launch_bounds__(kTokens)
    classify_kernel(const In* __restrict__ latents, index_t tokens, index_t cells, int channels,
                    uint8_t* __restrict__ statuses, int* __restrict__ block_counts, unsigned long long* rejections) {
  __shared__ int kept;
  __shared__ int rejected[kAppendReportSize];
  if (threadIdx.x == 0) kept = 0;
  if (threadIdx.x < kAppendReportSize) rejected[threadIdx.x] = 0;
  __syncthreads();
  const index_t token = static_cast<index_t>(blockIdx.x) * kTokens + threadIdx.x;
  uint8_t status = 255;
  if (token < tokens) {
    status = statuses[token];
    if (status == kKept) {
      const In* at = latents + token / cells * channels * cells + token % cells;
      bool bad = false;
      for (int c = 0; c < channels; ++c) bad |= !is_storable<Out>(to_float(at[c * cells]));
      if (bad) {
        status = kNonFinite;
        statuses[token] = status;
      }
    }
  }
  const unsigned keep = __ballot_sync(kFullWarp, status == kKept);
  if (threadIdx.x % 32 == 0) atomicAdd(&kept, __popc(keep));
  if (status != kKept && status != 255) atomicAdd(&rejected[status], 1);
  __syncthreads();
  if (threadIdx.x == 0 && block_counts != nullptr) block_counts[blockIdx.x] = kept;
  if (threadIdx.x >= kMasked && threadIdx.x < kAppendReportSize && rejected[threadIdx.x] > 0)
    atomicAdd(rejections + threadIdx.x, static_cast<unsigned long long>(rejected[threadIdx.x]));
}

}  // namespace mirage::cuda

// Which tokens of T views are worth writing: shared by cache_write and bounded_write.
#pragma once

#include "feature_rows.cuh"
#include "lift.cuh"

namespace mirage::cuda {

enum Verdict : uint8_t { kKeep = 0, kMasked = 2, kUnknown = 3, kOutOfRange = 4, kNonFinite = 5 };

constexpr int kTokens = 256;  // tokens of one judging block

// `depths` (0 where unknown) and `nearest` (least valid depth, infinite where there is none) may be null.
static __global__ void __launch_bounds__(kLiftThreads)
    lift_kernel(DepthSource source, const Lift* __restrict__ lifts, float low, float high,
                float4* __restrict__ points, uint8_t* __restrict__ verdicts, float* __restrict__ depths,
                float* __restrict__ nearest) {
  const int lane = threadIdx.x % 32;
  const index_t token = static_cast<index_t>(blockIdx.x) * (kLiftThreads / 32) + threadIdx.x / 32;
  const index_t cells = source.height * source.width;
  if (token >= source.views * cells) return;
  const index_t t = token / cells, i = token % cells / source.width, j = token % source.width;
  const bool still = token_static(source, t, i, j, lane);
  int32_t least = kInfinity;
  const float z = token_depth(source, t, i, j, lane, least);
  if (nearest != nullptr && source.bilinear) least = least_depth(source, t, i, j, lane);
  if (lane != 0) return;
  const LiftedToken p = lift_token(lifts[t], static_cast<int>(i), static_cast<int>(j), z);
  points[token] = make_float4(p.x, p.y, p.z, p.footprint);
  if (depths != nullptr) depths[token] = z;
  if (nearest != nullptr) nearest[token] = bits_float(static_cast<uint32_t>(least));
  verdicts[token] = !still                        ? kMasked
                    : !(z > 0.0f)                 ? kUnknown
                    : !(z >= low && z <= high)    ? kOutOfRange
                    : !is_finite_token(p)         ? kNonFinite
                                                  : kKeep;
}

// A thread a token: neighbours read neighbouring cells of each channel. Counts go out by block, where they are asked for;
// rejections are summed at `rejections[verdict]` with integer atomics, whose order cannot matter.
template <typename In, typename Out>
__global__ void __launch_bounds__(kTokens)
    judge_kernel(const In* __restrict__ latents, index_t tokens, index_t cells, int channels,
                 uint8_t* __restrict__ verdicts, int* __restrict__ block_counts, unsigned long long* rejections) {
  __shared__ int kept;
  __shared__ int rejected[6];
  if (threadIdx.x == 0) kept = 0;
  if (threadIdx.x < 6) rejected[threadIdx.x] = 0;
  __syncthreads();
  const index_t token = static_cast<index_t>(blockIdx.x) * kTokens + threadIdx.x;
  uint8_t verdict = 255;
  if (token < tokens) {
    verdict = verdicts[token];
    if (verdict == kKeep) {
      const In* at = latents + token / cells * channels * cells + token % cells;
      bool bad = false;
      for (int c = 0; c < channels; ++c) bad |= !is_storable<Out>(to_float(at[c * cells]));
      if (bad) {
        verdict = kNonFinite;
        verdicts[token] = verdict;
      }
    }
  }
  const unsigned keep = __ballot_sync(kFullWarp, verdict == kKeep);
  if (threadIdx.x % 32 == 0) atomicAdd(&kept, __popc(keep));
  if (verdict != kKeep && verdict != 255) atomicAdd(&rejected[verdict], 1);
  __syncthreads();
  if (threadIdx.x == 0 && block_counts != nullptr) block_counts[blockIdx.x] = kept;
  if (threadIdx.x >= kMasked && threadIdx.x < 6 && rejected[threadIdx.x] > 0)
    atomicAdd(rejections + threadIdx.x, static_cast<unsigned long long>(rejected[threadIdx.x]));
}

}  // namespace mirage::cuda

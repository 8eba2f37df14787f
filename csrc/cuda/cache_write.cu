// cache_write on CUDA: lift and judge every token, count per block, scan the counts, then move the kept tokens in order.
//
// In: latents (T, C, h, w), depth (T, H, W), cameras, mask. In place: points, features, frame_ids, count, bounds.
// Out: how many tokens were written, refused, masked, of unknown depth, out of range, not finite.
#include "bounds.cuh"
#include "lift.cuh"

namespace mirage::cuda {
namespace {

enum Verdict : uint8_t { kKeep = 0, kMasked = 2, kUnknown = 3, kOutOfRange = 4, kNonFinite = 5 };

constexpr int kTokens = 256;  // tokens of one judging and one moving block
constexpr int kWarps = kTokens / 32;
constexpr int kScanThreads = 1024;
constexpr int kRows = 32;      // tokens turned at a time
constexpr int kChannels = 64;  // channels turned at a time

__global__ void __launch_bounds__(kLiftThreads)
    lift_kernel(DepthSource source, const Lift* __restrict__ lifts, float low, float high,
                float4* __restrict__ points, uint8_t* __restrict__ verdicts) {
  const int lane = threadIdx.x % 32;
  const index_t token = static_cast<index_t>(blockIdx.x) * (kLiftThreads / 32) + threadIdx.x / 32;
  const index_t cells = source.height * source.width;
  if (token >= source.views * cells) return;
  const index_t t = token / cells, i = token % cells / source.width, j = token % source.width;
  const bool still = token_static(source, t, i, j, lane);
  const float z = token_depth(source, t, i, j, lane);
  if (lane != 0) return;
  const LiftedToken p = lift_token(lifts[t], static_cast<int>(i), static_cast<int>(j), z);
  points[token] = make_float4(p.x, p.y, p.z, p.footprint);
  verdicts[token] = !still                        ? kMasked
                    : !(z > 0.0f)                 ? kUnknown
                    : !(z >= low && z <= high)    ? kOutOfRange
                    : !is_finite_token(p)         ? kNonFinite
                                                  : kKeep;
}

// A thread a token: neighbours read neighbouring cells of each channel. Counts go out by block; rejections are summed
// with integer atomics, whose order cannot matter.
template <typename In, typename Out>
__global__ void __launch_bounds__(kTokens)
    judge_kernel(const In* __restrict__ latents, index_t tokens, index_t cells, int channels,
                 uint8_t* __restrict__ verdicts, int* __restrict__ block_counts, unsigned long long* report) {
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
      // As they will be stored: a float32 latent can be too large for float16.
      for (int c = 0; c < channels; ++c) bad |= !is_finite(to_float(from_float<Out>(to_float(at[c * cells]))));
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
  if (threadIdx.x == 0) block_counts[blockIdx.x] = kept;
  if (threadIdx.x >= kMasked && threadIdx.x < 6 && rejected[threadIdx.x] > 0)
    atomicAdd(report + threadIdx.x, static_cast<unsigned long long>(rejected[threadIdx.x]));
}

// One block: where each block's tokens go (place[b], absolute rows), the new count, and the report.
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(const int* __restrict__ block_counts, int blocks, index_t capacity, int64_t* count,
                int64_t* __restrict__ place, int64_t* __restrict__ report) {
  __shared__ int64_t warp_totals[kScanThreads / 32];
  __shared__ int64_t carried;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t start = *count;
  // A count from outside may be anything: then every block is told there is no room, and all is refused.
  const bool sound = start >= 0 && start <= capacity;
  if (threadIdx.x == 0) carried = start;
  __syncthreads();
  for (int first = 0; first < blocks; first += kScanThreads) {
    const int b = first + threadIdx.x;
    const int64_t own = b < blocks ? block_counts[b] : 0;
    int64_t upto = own;
    for (int offset = 1; offset < 32; offset *= 2) {
      const int64_t other = __shfl_up_sync(kFullWarp, upto, offset);
      if (lane >= offset) upto += other;
    }
    if (lane == 31) warp_totals[warp] = upto;
    __syncthreads();
    int64_t before = carried;
    for (int w = 0; w < warp; ++w) before += warp_totals[w];
    if (b < blocks) place[b] = sound ? before + upto - own : capacity;
    __syncthreads();
    if (threadIdx.x == kScanThreads - 1) carried = before + upto;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    const int64_t end = !sound ? start : (carried < capacity ? carried : capacity);
    report[0] = end - start;
    report[1] = carried - end;
    *count = end;
  }
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kTokens)
    move_kernel(const In* __restrict__ latents, const float4* __restrict__ lifted, const uint8_t* __restrict__ verdicts,
                const int64_t* __restrict__ place, index_t tokens, index_t cells, int channels, index_t capacity,
                int first_frame, float4* __restrict__ points, Out* __restrict__ features,
                int32_t* __restrict__ frame_ids) {
  __shared__ int warp_counts[kWarps];
  __shared__ int kept[kTokens];  // tokens of this block, in order
  __shared__ float tile[kChannels][kRows + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const index_t base = static_cast<index_t>(blockIdx.x) * kTokens, token = base + threadIdx.x;
  const bool keep = token < tokens && verdicts[token] == kKeep;
  const unsigned ballot = __ballot_sync(kFullWarp, keep);
  if (lane == 0) warp_counts[warp] = __popc(ballot);
  __syncthreads();
  int rank = __popc(ballot & ((1u << lane) - 1u)), total = 0;
  for (int w = 0; w < kWarps; ++w) {
    rank += w < warp ? warp_counts[w] : 0;
    total += warp_counts[w];
  }
  const index_t begin = place[blockIdx.x];
  if (keep) {
    kept[rank] = threadIdx.x;
    if (begin + rank < capacity) {
      points[begin + rank] = lifted[token];
      frame_ids[begin + rank] = first_frame + static_cast<int32_t>(token / cells);
    }
  }
  const int room = static_cast<int>(min(static_cast<index_t>(total), max(capacity - begin, static_cast<index_t>(0))));
  __syncthreads();
  for (int row = 0; row < room; row += kRows) {
    const int rows = min(kRows, room - row);
    for (int channel = 0; channel < channels; channel += kChannels) {
      const int number = min(kChannels, channels - channel);
      if (lane < rows) {
        const index_t from = base + kept[row + lane];
        const In* at = latents + (from / cells * channels + channel) * cells + from % cells;
        for (int c = warp; c < number; c += kWarps) tile[c][lane] = to_float(at[c * cells]);
      }
      __syncthreads();
      for (int k = threadIdx.x; k < rows * number; k += kTokens) {
        const int r = k / number, c = k % number;
        features[(begin + row + r) * channels + channel + c] = from_float<Out>(tile[c][r]);
      }
      __syncthreads();
    }
  }
}

// The boxes of the blocks appended to: thread block k takes the k-th from the one that the first new token went to.
__global__ void __launch_bounds__(kBlockTokens)
    appended_bounds_kernel(const float4* __restrict__ points, const int64_t* __restrict__ count,
                           const int64_t* __restrict__ report, float* __restrict__ bounds) {
  const index_t end = *count, written = report[0];
  const index_t block = (end - written) / kBlockTokens + blockIdx.x;
  if (written > 0 && block * kBlockTokens < end) write_box(points, end, block, bounds);
}

}  // namespace

Tensor cache_write(Tensor points, Tensor features, Tensor frame_ids, Tensor count, const Tensor& latents_,
                   const Tensor& depth_, const Tensor& intrinsics_, const Tensor& cam2world_,
                   const std::optional<Tensor>& mask_, int64_t first_frame, bool bilinear, double min_depth,
                   double max_depth, const std::optional<Tensor>& bounds) {
  const torch::stable::accelerator::DeviceGuard guard(latents_.get_device_index());
  const Tensor latents = as_contiguous(latents_);
  const Tensor depth = checked(depth_, ScalarType::Float, "depth");
  const Tensor intrinsics = checked(intrinsics_, ScalarType::Double, "intrinsics");
  const Tensor cam2world = checked(cam2world_, ScalarType::Double, "cam2world");
  std::optional<Tensor> mask;
  if (mask_.has_value()) mask = checked(*mask_, ScalarType::Bool, "mask");
  STD_TORCH_CHECK(points.is_contiguous() && features.is_contiguous() && frame_ids.is_contiguous(),
                  "points, features and frame_ids must be contiguous: they are written in place");
  STD_TORCH_CHECK(is_aligned(points), "points must begin at a multiple of 16 bytes: they are written in place");
  if (bounds.has_value()) check_bounds(*bounds, points.size(0));
  const cudaStream_t stream = current_stream(latents);
  const index_t channels = latents.size(1), height = latents.size(2), width = latents.size(3);
  const DepthSource source = make_source(depth, mask, height, width, bilinear);
  const index_t cells = height * width, tokens = source.views * cells, capacity = points.size(0);

  Tensor report = new_tensor(latents, {6}, ScalarType::Long);
  fill_bytes(report, 0, stream);
  if (tokens == 0) return report;
  const index_t blocks = divide_up(tokens, kTokens);
  STD_TORCH_CHECK(divide_up(tokens, kLiftThreads / 32) < (index_t{1} << 31), "latents hold too many tokens for one write");
  const Tensor lifts = make_lifts(intrinsics, cam2world, source, stream);
  Tensor lifted = new_tensor(latents, {tokens, 4}, ScalarType::Float);
  Tensor verdicts = new_tensor(latents, {tokens}, ScalarType::Byte);
  Tensor block_counts = new_tensor(latents, {blocks}, ScalarType::Int);
  Tensor place = new_tensor(latents, {blocks}, ScalarType::Long);

  lift_kernel<<<static_cast<unsigned>(divide_up(tokens, kLiftThreads / 32)), kLiftThreads, 0, stream>>>(
      source, input<Lift>(lifts), static_cast<float>(min_depth), static_cast<float>(max_depth), output<float4>(lifted),
      output<uint8_t>(verdicts));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  for_feature_type(latents.scalar_type(), [&](auto in) {
    using In = decltype(in);
    for_feature_type(features.scalar_type(), [&](auto out) {
      judge_kernel<In, decltype(out)><<<static_cast<unsigned>(blocks), kTokens, 0, stream>>>(
          input<In>(latents), tokens, cells, static_cast<int>(channels), output<uint8_t>(verdicts),
          output<int>(block_counts), output<unsigned long long>(report));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    scan_kernel<<<1, kScanThreads, 0, stream>>>(input<int>(block_counts), static_cast<int>(blocks), capacity,
                                                output<int64_t>(count), output<int64_t>(place),
                                                output<int64_t>(report));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    for_feature_type(features.scalar_type(), [&](auto out) {
      using Out = decltype(out);
      move_kernel<<<static_cast<unsigned>(blocks), kTokens, 0, stream>>>(
          input<In>(latents), input<float4>(lifted), input<uint8_t>(verdicts), input<int64_t>(place), tokens, cells,
          static_cast<int>(channels), capacity, static_cast<int>(first_frame), output<float4>(points),
          output<Out>(features), output<int32_t>(frame_ids));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  if (bounds.has_value()) {
    appended_bounds_kernel<<<static_cast<unsigned>(divide_up(tokens, kBlockTokens) + 1), kBlockTokens, 0, stream>>>(
        input<float4>(points), input<int64_t>(count), input<int64_t>(report), output<float>(*bounds));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return report;
}

}  // namespace mirage::cuda

STABLE_TORCH_LIBRARY_IMPL(mirage, CUDA, m) { m.impl("cache_write_compiled", TORCH_BOX(&mirage::cuda::cache_write)); }

// cache_write on CUDA: lifts and classifies every token, counts per block, scans the counts, then moves the kept tokens
// in order.
//
// In: latents (T, C, h, w), depth (T, H, W), cameras, mask. In place: points, features, frame_ids, count, bounds,
// scales. Out: how many tokens were written, refused, masked, of unknown depth, out of range, not finite.
#include "block_boxes.cuh"
#include "token_status.cuh"

namespace mirage::cuda {
namespace {

constexpr int kWarps = kTokens / 32;
constexpr int kScanThreads = 1024;

// One thread block: where each block's tokens go (place[b], absolute rows), the new count, and the report.
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(const int* __restrict__ block_counts, int blocks, index_t capacity, int64_t* count,
                int64_t* __restrict__ place, int64_t* __restrict__ report) {
  __shared__ int64_t warp_totals[kScanThreads / 32];
  __shared__ int64_t carried;
  const int64_t start = *count;
  // A count from outside may be anything. If it is out of range, every block is told that there is no room, and all is
  // refused.
  const bool valid = start >= 0 && start <= capacity;
  if (threadIdx.x == 0) carried = start;
  __syncthreads();
  for (int first = 0; first < blocks; first += kScanThreads) {
    const int b = first + threadIdx.x;
    const int64_t own = b < blocks ? block_counts[b] : 0;
    int64_t inclusive = sum_up_to<kScanThreads>(own, warp_totals);
    inclusive += carried;
    if (b < blocks) place[b] = valid ? inclusive - own : capacity;
    __syncthreads();
    if (threadIdx.x == kScanThreads - 1) carried = inclusive;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    const int64_t end = !valid ? start : (carried < capacity ? carried : capacity);
    report[0] = end - start;
    report[1] = carried - end;
    *count = end;
  }
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kTokens)
    move_kernel(const In* __restrict__ latents, const float4* __restrict__ lifted, const uint8_t* __restrict__ statuses,
                const int64_t* __restrict__ place, index_t tokens, index_t cells, int channels, index_t capacity,
                int first_frame, float4* __restrict__ points, Out* features, uint8_t* scales,
                int32_t* __restrict__ frame_ids) {
  __shared__ int warp_counts[kWarps];
  __shared__ index_t from[kTokens];  // of the kept tokens, in order
  __shared__ index_t to[kTokens];
  __shared__ Tile tile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const index_t token = static_cast<index_t>(blockIdx.x) * kTokens + threadIdx.x;
  const bool keep = token < tokens && statuses[token] == kKept;
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
    from[rank] = token / cells * channels * cells + token % cells;
    to[rank] = begin + rank;
    if (begin + rank < capacity) {
      points[begin + rank] = lifted[token];
      frame_ids[begin + rank] = first_frame + static_cast<int32_t>(token / cells);
    }
  }
  const int room = static_cast<int>(min(static_cast<index_t>(total), max(capacity - begin, static_cast<index_t>(0))));
  __syncthreads();
  for (int row = 0; row < room; row += kTransposedTokens)
    store_rows<kTokens>(latents, cells, channels, min(kTransposedTokens, room - row), from + row, to + row, features,
                        scales, tile, [](int, float value, index_t) { return value; });
}

// Updates the boxes of the blocks appended to: thread block k takes the k-th one, counted from that of the first new
// token.
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
                   double max_depth, const std::optional<Tensor>& bounds, std::optional<Tensor> scales) {
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
  checked_scales(features, scales);
  STD_TORCH_CHECK(!scales.has_value() || scales->is_contiguous(),
                  "scales must be contiguous: they are written in place");
  if (bounds.has_value()) check_bounds(*bounds, points.size(0));
  const cudaStream_t stream = current_stream(latents);
  const index_t channels = latents.size(1), height = latents.size(2), width = latents.size(3);
  const DepthSource source = make_source(depth, mask, height, width, bilinear);
  const index_t cells = height * width, tokens = source.views * cells, capacity = points.size(0);

  Tensor report = new_tensor(latents, {kAppendReportSize}, ScalarType::Long);
  fill_bytes(report, 0, stream);
  if (tokens == 0) return report;
  const index_t blocks = divide_up(tokens, kTokens);
  STD_TORCH_CHECK(divide_up(tokens, kLiftThreads / 32) < (index_t{1} << 31),
                  "latents hold too many tokens for one write");
  const Tensor lifts = make_lifts(intrinsics, cam2world, source, stream);
  Tensor lifted = new_tensor(latents, {tokens, 4}, ScalarType::Float);
  Tensor statuses = new_tensor(latents, {tokens}, ScalarType::Byte);
  Tensor block_counts = new_tensor(latents, {blocks}, ScalarType::Int);
  Tensor place = new_tensor(latents, {blocks}, ScalarType::Long);

  lift_kernel<<<static_cast<unsigned>(divide_up(tokens, kLiftThreads / 32)), kLiftThreads, 0, stream>>>(
      source, input<Lift>(lifts), static_cast<float>(min_depth), static_cast<float>(max_depth), output<float4>(lifted),
      output<uint8_t>(statuses), nullptr, nullptr);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  for_feature_type(latents.scalar_type(), [&](auto in) {
    using In = decltype(in);
    for_stored_type(features.scalar_type(), [&](auto out) {
      classify_kernel<In, decltype(out)><<<static_cast<unsigned>(blocks), kTokens, 0, stream>>>(
          input<In>(latents), tokens, cells, static_cast<int>(channels), output<uint8_t>(statuses),
          output<int>(block_counts), output<unsigned long long>(report));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    scan_kernel<<<1, kScanThreads, 0, stream>>>(input<int>(block_counts), static_cast<int>(blocks), capacity,
                                                output<int64_t>(count), output<int64_t>(place),
                                                output<int64_t>(report));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    for_stored_type(features.scalar_type(), [&](auto out) {
      using Out = decltype(out);
      move_kernel<<<static_cast<unsigned>(blocks), kTokens, 0, stream>>>(
          input<In>(latents), input<float4>(lifted), input<uint8_t>(statuses), input<int64_t>(place), tokens, cells,
          static_cast<int>(channels), capacity, static_cast<int>(first_frame), output<float4>(points),
          output<Out>(features), scales.has_value() ? output<uint8_t>(*scales) : nullptr, output<int32_t>(frame_ids));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  if (bounds.has_value()) {
    appended_bounds_kernel<<<static_cast<unsigned>(divide_up(tokens, kBlockTokens) + 1), kBlockTokens, 0, stream>>>(
        input<float4>(points), input<int64_t>(count), input<int64_t>(report), output<float>(*bounds));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    tiles_kernel<<<static_cast<unsigned>(divide_up(tokens, kBlockTokens * kTileBlocks) + 1), kTileThreads, 0, stream>>>(
        input<int64_t>(count), nullptr, input<int64_t>(report), capacity, output<float>(*bounds));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return report;
}

}  // namespace mirage::cuda

STABLE_TORCH_LIBRARY_IMPL(mirage, CUDA, m) { m.impl("cache_write_compiled", TORCH_BOX(&mirage::cuda::cache_write)); }

// cache_compact on CUDA: a search digit by digit finds the frame up to which rows must go, kept rows are counted by
// block, the counts are summed up, and kept rows move down, one part of the buffers after the other through a copy of
// bounded size.
//
// In place: points, features, frame_ids, free_space_violations, num_observations, count, bounds, scales. Out: how many
// tokens were evicted.
#include <bit>

#include "../core/bounded_write_rules.h"
#include "block_boxes.cuh"

namespace mirage::cuda {
namespace {

constexpr int kThreads = 1024;  // of the kernels that search and sum
constexpr int kBins = 2 * kThreads;
constexpr int kDigitBits = std::bit_width(unsigned{kBins}) - 1;
constexpr int kDigits = (32 + kDigitBits - 1) / kDigitBits;  // of a frame id, from the top; the last may be shorter
constexpr int kRowThreads = kBlockTokens;
constexpr int kBlockRows = kRowThreads;   // rows that are counted, moved and boxed together
constexpr index_t kCopyBytes = 32 << 20;  // fits into the L2 cache of an A100 or later

// The buffers that decide whether a row is kept.
struct RowFilter {
  const int32_t* frame_ids;
  const uint8_t* free_space_violations;  // or null
};

// Which rows go: invalid ones, those of frames before `frame`, and the first `ties` rows of that frame.
struct Cutoff {
  int64_t live, excess;
  unsigned ties, frame;  // see frame_key
};

// How many rows stay for certain, and how many are tied, of the last frame to go: two counts in one number, summed
// together.
using Counts = unsigned long long;
__device__ __forceinline__ Counts make_counts(unsigned later, unsigned ties) {
  return static_cast<Counts>(later) << 32 | ties;
}

// How many rows are kept, of those counted before a place.
__device__ __forceinline__ index_t num_kept(Counts counts, const Cutoff& cutoff) {
  const index_t ties = static_cast<index_t>(counts & 0xffffffffu);
  return static_cast<index_t>(counts >> 32) + max(ties - cutoff.ties, index_t{0});
}

// Frame ids as unsigned numbers in the same order.
__device__ __forceinline__ unsigned frame_key(int32_t frame) { return static_cast<unsigned>(frame) ^ 0x80000000u; }

__device__ __forceinline__ int digit_shift(int digit) { return max(32 - kDigitBits * (digit + 1), 0); }
__device__ __forceinline__ int digit_of(unsigned key, int digit) {
  const unsigned below = digit == 0 ? key : key & ((1u << digit_shift(digit - 1)) - 1u);
  return static_cast<int>(below >> digit_shift(digit));
}

__device__ __forceinline__ bool is_invalid(const RowFilter& filter, index_t row) {
  return filter.free_space_violations != nullptr && filter.free_space_violations[row] == kInvalid;
}

__device__ __forceinline__ index_t valid_count(const int64_t* count, index_t capacity) {
  return *count >= 0 && *count <= capacity ? *count : 0;
}

// The cutoff that the first `digits` digits determine, from histograms of the living rows: one per digit, of the rows
// that have the digits before. A whole thread block of kThreads calls it, and all threads return it; `frame` has the
// digits known so far, and `ties` is how many of the rows with those digits must go.
__device__ __forceinline__ Cutoff find_cutoff(const unsigned* histograms, int digits, index_t live,
                                              index_t max_tokens) {
  __shared__ int64_t totals[kThreads / 32];
  __shared__ int64_t all;
  __shared__ int64_t below;
  __shared__ int bin;
  Cutoff cutoff{live, 0, 0, 0};
  for (int digit = 0; digit < digits; ++digit) {
    // Two bins per thread.
    const unsigned* counts = histograms + digit * kBins + 2 * threadIdx.x;
    const int64_t first = counts[0], both = first + counts[1];
    const int64_t sum = sum_up_to<kThreads>(both, totals), before = sum - both;
    if (threadIdx.x == kThreads - 1) all = sum;
    __syncthreads();
    if (digit == 0) {
      cutoff.excess = max(all - max_tokens, int64_t{0});
      cutoff.ties = static_cast<unsigned>(cutoff.excess);
    }
    if (cutoff.excess == 0) break;
    // One thread has the last row to go.
    if (before < cutoff.ties && cutoff.ties <= sum) {
      const bool second = cutoff.ties > before + first;
      bin = 2 * threadIdx.x + (second ? 1 : 0);
      below = before + (second ? first : 0);
    }
    __syncthreads();
    cutoff.ties -= static_cast<unsigned>(below);
    cutoff.frame |= static_cast<unsigned>(bin) << digit_shift(digit);
  }
  __syncthreads();
  return cutoff;
}

// Counts the living rows by one digit of their frame, among those that have the digits before.
__global__ void __launch_bounds__(kThreads)
    digit_kernel(RowFilter filter, const int64_t* __restrict__ count, index_t capacity, index_t max_tokens, int digit,
                 unsigned* histograms) {
  __shared__ int bins[kBins];
  const index_t live = valid_count(count, capacity), stride = static_cast<index_t>(gridDim.x) * kThreads;
  const Cutoff cutoff = find_cutoff(histograms, digit, live, max_tokens);
  if (digit > 0 && cutoff.excess == 0) return;
  for (int k = threadIdx.x; k < kBins; k += kThreads) bins[k] = 0;
  __syncthreads();
  const unsigned known = digit == 0 ? 0u : ~0u << digit_shift(digit - 1);
  for (index_t first = static_cast<index_t>(blockIdx.x) * kThreads; first < live; first += stride) {
    const index_t row = first + threadIdx.x;
    int bin = -1;
    if (row < live && !is_invalid(filter, row)) {
      const unsigned key = frame_key(filter.frame_ids[row]);
      if ((key & known) == cutoff.frame) bin = digit_of(key, digit);
    }
    // In most warps all rows are of one frame: those are counted together.
    const bool counts = bin >= 0;
    const int greatest = warp_max(bin), number = __popc(__ballot_sync(kFullWarp, counts));
    if (__all_sync(kFullWarp, bin < 0 || bin == greatest)) {
      if (threadIdx.x % 32 == 0 && number > 0) atomicAdd(&bins[greatest], number);
    } else if (counts) {
      atomicAdd(&bins[bin], 1);
    }
  }
  __syncthreads();
  for (int k = threadIdx.x; k < kBins; k += kThreads)
    if (bins[k] > 0) atomicAdd(histograms + digit * kBins + k, static_cast<unsigned>(bins[k]));
}

enum RowFate { kRemoved, kTied, kStaying };

__device__ __forceinline__ RowFate fate_of(const RowFilter& filter, const Cutoff& cutoff, index_t row) {
  if (row >= cutoff.live || is_invalid(filter, row)) return kRemoved;
  if (cutoff.excess == 0) return kStaying;
  const unsigned key = frame_key(filter.frame_ids[row]);
  return key > cutoff.frame ? kStaying : (key == cutoff.frame ? kTied : kRemoved);
}

// Finds the cutoff, and how many rows of each block are kept.
__global__ void __launch_bounds__(kThreads)
    count_kept_kernel(RowFilter filter, const int64_t* __restrict__ count, index_t capacity, index_t max_tokens,
                      int digits, const unsigned* __restrict__ histograms, Cutoff* __restrict__ cutoff_,
                      Counts* __restrict__ counts) {
  __shared__ int kept[kThreads / kBlockRows];
  __shared__ int ties[kThreads / kBlockRows];
  const index_t live = valid_count(count, capacity), stride = static_cast<index_t>(gridDim.x) * kThreads;
  const Cutoff cutoff = find_cutoff(histograms, digits, live, max_tokens);
  if (blockIdx.x == 0 && threadIdx.x == 0) *cutoff_ = cutoff;
  const int part = threadIdx.x / kBlockRows;
  for (index_t first = static_cast<index_t>(blockIdx.x) * kThreads; first < live; first += stride) {
    if (threadIdx.x % kBlockRows == 0) kept[part] = ties[part] = 0;
    __syncthreads();
    const RowFate fate = fate_of(filter, cutoff, first + threadIdx.x);
    const int kept_here = __popc(__ballot_sync(kFullWarp, fate == kStaying));
    const int tied_here = __popc(__ballot_sync(kFullWarp, fate == kTied));
    if (threadIdx.x % 32 == 0) {
      if (kept_here > 0) atomicAdd(&kept[part], kept_here);
      if (tied_here > 0) atomicAdd(&ties[part], tied_here);
    }
    __syncthreads();
    const index_t block = first / kBlockRows + part;
    if (threadIdx.x % kBlockRows == 0 && block * kBlockRows < live)
      counts[block] = make_counts(static_cast<unsigned>(kept[part]), static_cast<unsigned>(ties[part]));
    __syncthreads();
  }
}

// One thread block: sums the counts, so that counts[b] covers all rows before block b, and the one after the last all
// rows.
__global__ void __launch_bounds__(kThreads) sum_kernel(const Cutoff* __restrict__ cutoff_, Counts* __restrict__ counts,
                                                       int64_t* __restrict__ count, int64_t* __restrict__ evicted) {
  __shared__ Counts totals[kThreads / 32];
  __shared__ Counts carried;
  const Cutoff cutoff = *cutoff_;
  const index_t blocks = (cutoff.live + kBlockRows - 1) / kBlockRows;
  if (threadIdx.x == 0) carried = 0;
  __syncthreads();
  for (index_t first = 0; first < blocks; first += kThreads) {
    const index_t b = first + threadIdx.x;
    const Counts own = b < blocks ? counts[b] : 0;
    Counts inclusive = sum_up_to<kThreads>(own, totals);
    inclusive += carried;
    if (b < blocks) counts[b] = inclusive - own;
    __syncthreads();
    if (threadIdx.x == kThreads - 1) carried = inclusive;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    counts[blocks] = carried;
    if (cutoff.live > 0) *count = num_kept(carried, cutoff);
    *evicted = cutoff.excess;
  }
}

// Rows of the buffers, or of the copy of a part of them.
template <typename Word>
struct Rows {
  float4* points;
  int32_t* frame_ids;
  uint8_t* free_space_violations;  // or null, and so are the next two
  uint8_t* num_observations;
  uint8_t* scales;
  Word* features;
};

// Copies everything except the features of a row.
template <typename Word>
__device__ __forceinline__ void copy_row(const Rows<Word>& from, index_t row, const Rows<Word>& to, index_t place) {
  to.points[place] = from.points[row];
  to.frame_ids[place] = from.frame_ids[row];
  if (to.free_space_violations != nullptr) to.free_space_violations[place] = from.free_space_violations[row];
  if (to.num_observations != nullptr) to.num_observations[place] = from.num_observations[row];
  if (to.scales != nullptr) to.scales[place] = from.scales[row];
}

// Where the kept rows of a block go, and how many there are. `to` is -1 where no row up to the end of the block is
// removed.
struct Destination {
  index_t to;
  int rows;
};

__device__ __forceinline__ Destination destination_of(const Cutoff& cutoff, const Counts* counts, index_t block) {
  const index_t begin = block * kBlockRows;
  if (begin >= cutoff.live) return {-1, 0};
  const index_t to = num_kept(counts[block], cutoff);
  const int rows = static_cast<int>(num_kept(counts[block + 1], cutoff) - to);
  return {to == begin && rows == min(index_t{kBlockRows}, cutoff.live - begin) ? -1 : to, rows};
}

// Copies the kept rows of some blocks, beginning with block `first`. Marks the blocks whose rows change.
template <typename Word>
__global__ void __launch_bounds__(kRowThreads)
    gather_kernel(RowFilter filter, const Cutoff* __restrict__ cutoff_, const Counts* __restrict__ counts,
                  index_t first, Rows<Word> held, Rows<Word> copy, int words, unsigned* __restrict__ touched) {
  __shared__ Counts totals[kRowThreads / 32];
  __shared__ int kept_threads[kBlockRows];
  const Cutoff cutoff = *cutoff_;
  const index_t block = first + blockIdx.x;
  const Destination destination = destination_of(cutoff, counts, block);
  if (destination.to < 0) return;
  if (touched != nullptr && threadIdx.x == 0) touched[block] = 1;
  const index_t row = block * kBlockRows + threadIdx.x, part = num_kept(counts[first], cutoff);
  const RowFate fate = fate_of(filter, cutoff, row);
  const Counts own = make_counts(fate == kStaying, fate == kTied);
  const Counts before = counts[block] + sum_up_to<kRowThreads>(own, totals) - own;
  if (fate == kStaying || (fate == kTied && (before & 0xffffffffu) >= cutoff.ties)) {
    const index_t place = num_kept(before, cutoff);
    kept_threads[place - destination.to] = threadIdx.x;
    copy_row(held, row, copy, place - part);
  }
  __syncthreads();
  const Word* from = held.features + block * kBlockRows * words;
  Word* to = copy.features + (destination.to - part) * words;
  for (int k = threadIdx.x; k < destination.rows * words; k += kRowThreads)
    to[k] = from[static_cast<index_t>(kept_threads[k / words]) * words + k % words];
}

// Moves the copies to their destination.
template <typename Word>
__global__ void __launch_bounds__(kRowThreads)
    place_kernel(const Cutoff* __restrict__ cutoff_, const Counts* __restrict__ counts, index_t first, Rows<Word> held,
                 Rows<Word> copy, int words) {
  const Cutoff cutoff = *cutoff_;
  const Destination destination = destination_of(cutoff, counts, first + blockIdx.x);
  if (destination.to < 0) return;
  const index_t at = destination.to - num_kept(counts[first], cutoff);
  if (threadIdx.x < destination.rows) copy_row(copy, at + threadIdx.x, held, destination.to + threadIdx.x);
  for (int k = threadIdx.x; k < destination.rows * words; k += kRowThreads)
    held.features[destination.to * words + k] = copy.features[at * words + k];
}

// Calls f with a value of the widest type that rows of this size, at this address, consist of.
template <typename F>
void for_word(size_t row_bytes, const void* rows, const F& f) {
  const size_t all = row_bytes | reinterpret_cast<uintptr_t>(rows);
  if (all % 16 == 0) return f(uint4{});
  if (all % 4 == 0) return f(uint32_t{});
  if (all % 2 == 0) return f(uint16_t{});
  f(uint8_t{});
}

}  // namespace

Tensor cache_compact(Tensor points, Tensor features, Tensor frame_ids, std::optional<Tensor> free_space_violations,
                     std::optional<Tensor> num_observations, Tensor count, int64_t max_tokens,
                     std::optional<Tensor> bounds, std::optional<Tensor> scales) {
  const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
  STD_TORCH_CHECK(points.is_contiguous() && features.is_contiguous() && frame_ids.is_contiguous() &&
                      (!free_space_violations.has_value() || free_space_violations->is_contiguous()) &&
                      (!num_observations.has_value() || num_observations->is_contiguous()) &&
                      (!scales.has_value() || scales->is_contiguous()),
                  "points, features, frame_ids, free_space_violations, num_observations and scales must be contiguous: "
                  "they are written in place");
  STD_TORCH_CHECK(is_aligned(points), "points must begin at a multiple of 16 bytes: they are written in place");
  const index_t capacity = points.size(0), blocks = divide_up(capacity, kBlockRows);
  if (bounds.has_value()) check_bounds(*bounds, capacity);
  const cudaStream_t stream = current_stream(points);
  Tensor evicted = new_tensor(points, {}, ScalarType::Long);
  fill_bytes(evicted, 0, stream);
  const bool may_evict = max_tokens < capacity;
  if (capacity == 0 || (!may_evict && !free_space_violations.has_value())) return evicted;

  const int digits = may_evict ? kDigits : 0;
  Tensor histograms = new_tensor(points, {digits, kBins}, ScalarType::Int);
  fill_bytes(histograms, 0, stream);
  static_assert(sizeof(Cutoff) == 24);
  Tensor found = new_tensor(points, {3}, ScalarType::Long);
  Tensor counts = new_tensor(points, {blocks + 1}, ScalarType::Long);
  const RowFilter filter{input<int32_t>(frame_ids),
                         free_space_violations.has_value() ? input<uint8_t>(*free_space_violations) : nullptr};
  const unsigned grid = grid_for(capacity, kThreads, 2);
  for (int digit = 0; digit < digits; ++digit) {
    digit_kernel<<<grid, kThreads, 0, stream>>>(filter, input<int64_t>(count), capacity, max_tokens, digit,
                                                output<unsigned>(histograms));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  count_kept_kernel<<<grid, kThreads, 0, stream>>>(filter, input<int64_t>(count), capacity, max_tokens, digits,
                                                   input<unsigned>(histograms), output<Cutoff>(found),
                                                   output<Counts>(counts));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  sum_kernel<<<1, kThreads, 0, stream>>>(input<Cutoff>(found), output<Counts>(counts), output<int64_t>(count),
                                         output<int64_t>(evicted));
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  const index_t row_bytes = features.size(1) * static_cast<index_t>(features.element_size());
  const index_t part =
      std::clamp<index_t>(kCopyBytes / (kBlockRows * (row_bytes + 23)), 1, blocks);  // blocks at a time
  const index_t rows = part * kBlockRows;
  const auto copy_of = [&](const std::optional<Tensor>& buffer) {
    return new_tensor(points, {buffer.has_value() ? rows : 0}, ScalarType::Byte);
  };
  Tensor copied_points = new_tensor(points, {rows, 4}, ScalarType::Float);
  Tensor copied_ids = new_tensor(points, {rows}, ScalarType::Int);
  Tensor copied_features = new_tensor(points, {rows, features.size(1)}, features.scalar_type());
  Tensor copied_violations = copy_of(free_space_violations), copied_observations = copy_of(num_observations),
         copied_scales = copy_of(scales);
  Tensor touched = new_tensor(points, {bounds.has_value() ? blocks : 0}, ScalarType::Int);
  fill_bytes(touched, 0, stream);
  const auto pointer = [](const std::optional<Tensor>& buffer, const Tensor& tensor) {
    return buffer.has_value() ? output<uint8_t>(tensor) : nullptr;
  };
  for_word(static_cast<size_t>(row_bytes), features.const_data_ptr(), [&](auto word) {
    using Word = decltype(word);
    const int words = static_cast<int>(row_bytes / static_cast<index_t>(sizeof(Word)));
    const Rows<Word> held{output<float4>(points),
                          output<int32_t>(frame_ids),
                          free_space_violations.has_value() ? output<uint8_t>(*free_space_violations) : nullptr,
                          num_observations.has_value() ? output<uint8_t>(*num_observations) : nullptr,
                          scales.has_value() ? output<uint8_t>(*scales) : nullptr,
                          output<Word>(features)};
    const Rows<Word> copy{output<float4>(copied_points),
                          output<int32_t>(copied_ids),
                          pointer(free_space_violations, copied_violations),
                          pointer(num_observations, copied_observations),
                          pointer(scales, copied_scales),
                          output<Word>(copied_features)};
    for (index_t first = 0; first < blocks; first += part) {
      const auto number = static_cast<unsigned>(std::min(part, blocks - first));
      gather_kernel<Word><<<number, kRowThreads, 0, stream>>>(filter, input<Cutoff>(found), input<Counts>(counts),
                                                              first, held, copy, words,
                                                              bounds.has_value() ? output<unsigned>(touched) : nullptr);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      place_kernel<Word>
          <<<number, kRowThreads, 0, stream>>>(input<Cutoff>(found), input<Counts>(counts), first, held, copy, words);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  if (bounds.has_value()) update_bounds(points, input<int64_t>(count), input<unsigned>(touched), *bounds, stream);
  return evicted;
}

}  // namespace mirage::cuda

STABLE_TORCH_LIBRARY_IMPL(mirage, CUDA, m) {
  m.impl("cache_compact_compiled", TORCH_BOX(&mirage::cuda::cache_compact));
}

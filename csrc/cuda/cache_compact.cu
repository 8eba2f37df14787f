// cache_compact on CUDA: the frame up to which rows must go is found digit by digit, the rows that stay are counted by block,
// the counts are summed up, and what stays moves down, part after part of the buffers through a copy of bounded size.
//
// In place: points, features, frame_ids, votes, looks, count, bounds, scales. Out: how many tokens were evicted.
#include <bit>

#include "../core/bounded_write_rules.h"
#include "block_boxes.cuh"

namespace mirage::cuda {
namespace {

constexpr int kThreads = 1024;  // of the kernels that search and sum up
constexpr int kBins = 2 * kThreads;
constexpr int kDigitBits = std::bit_width(unsigned{kBins}) - 1;
constexpr int kDigits = (32 + kDigitBits - 1) / kDigitBits;  // of a frame id, from the top; the last may be shorter
constexpr int kRowThreads = kBlockTokens;
constexpr int kBlockRows = kRowThreads;   // rows that are counted, moved and boxed together
constexpr index_t kCopyBytes = 32 << 20;  // which the cache of an A100 or later holds

// What says whether a row stays.
struct Fates {
  const int32_t* frame_ids;
  const uint8_t* votes;  // or null
};

// What goes: dead rows, rows of a frame before that of `frame`, and so many first rows of that one.
struct Trim {
  int64_t live, excess;
  unsigned ties, frame;  // see frame_key
};

// Rows that stay, and those of them that are of the last frame to go: two counts in one number, to be summed at once.
using Counts = unsigned long long;
__device__ __forceinline__ Counts make_counts(unsigned later, unsigned ties) {
  return static_cast<Counts>(later) << 32 | ties;
}

// Of so many rows before a place, how many stay.
__device__ __forceinline__ index_t staying(Counts counts, const Trim& trim) {
  const index_t ties = static_cast<index_t>(counts & 0xffffffffu);
  return static_cast<index_t>(counts >> 32) + max(ties - trim.ties, index_t{0});
}

// Frame ids as unsigned numbers in the same order.
__device__ __forceinline__ unsigned frame_key(int32_t frame) { return static_cast<unsigned>(frame) ^ 0x80000000u; }

__device__ __forceinline__ int digit_shift(int digit) { return max(32 - kDigitBits * (digit + 1), 0); }
__device__ __forceinline__ int digit_of(unsigned key, int digit) {
  const unsigned below = digit == 0 ? key : key & ((1u << digit_shift(digit - 1)) - 1u);
  return static_cast<int>(below >> digit_shift(digit));
}

__device__ __forceinline__ bool is_dead(const Fates& fates, index_t row) {
  return fates.votes != nullptr && fates.votes[row] == kDead;
}

__device__ __forceinline__ index_t sound_count(const int64_t* count, index_t capacity) {
  return *count >= 0 && *count <= capacity ? *count : 0;
}

// What the first `digits` digits tell, from how many living rows have which, a histogram each of those with the digits
// before. A whole block of kThreads calls it, and all threads return it; `frame` has the digits known so far, and `ties`
// is how many of the rows with those digits must go.
__device__ __forceinline__ Trim find_trim(const unsigned* histograms, int digits, index_t live, index_t max_tokens) {
  __shared__ int64_t totals[kThreads / 32];
  __shared__ int64_t all;
  __shared__ int64_t below;
  __shared__ int bin;
  Trim trim{live, 0, 0, 0};
  for (int digit = 0; digit < digits; ++digit) {
    // Two bins a thread.
    const unsigned* counts = histograms + digit * kBins + 2 * threadIdx.x;
    const int64_t first = counts[0], both = first + counts[1];
    const int64_t sum = sum_up_to<kThreads>(both, totals), before = sum - both;
    if (threadIdx.x == kThreads - 1) all = sum;
    __syncthreads();
    if (digit == 0) {
      trim.excess = max(all - max_tokens, int64_t{0});
      trim.ties = static_cast<unsigned>(trim.excess);
    }
    if (trim.excess == 0) break;
    // One thread has the row that goes last.
    if (before < trim.ties && trim.ties <= sum) {
      const bool second = trim.ties > before + first;
      bin = 2 * threadIdx.x + (second ? 1 : 0);
      below = before + (second ? first : 0);
    }
    __syncthreads();
    trim.ties -= static_cast<unsigned>(below);
    trim.frame |= static_cast<unsigned>(bin) << digit_shift(digit);
  }
  __syncthreads();
  return trim;
}

// Counts the living rows by one digit of their frame, of those that have the digits before.
__global__ void __launch_bounds__(kThreads)
    digit_kernel(Fates fates, const int64_t* __restrict__ count, index_t capacity, index_t max_tokens, int digit,
                 unsigned* histograms) {
  __shared__ int bins[kBins];
  const index_t live = sound_count(count, capacity), stride = static_cast<index_t>(gridDim.x) * kThreads;
  const Trim trim = find_trim(histograms, digit, live, max_tokens);
  if (digit > 0 && trim.excess == 0) return;
  for (int k = threadIdx.x; k < kBins; k += kThreads) bins[k] = 0;
  __syncthreads();
  const unsigned known = digit == 0 ? 0u : ~0u << digit_shift(digit - 1);
  for (index_t first = static_cast<index_t>(blockIdx.x) * kThreads; first < live; first += stride) {
    const index_t row = first + threadIdx.x;
    int bin = -1;
    if (row < live && !is_dead(fates, row)) {
      const unsigned key = frame_key(fates.frame_ids[row]);
      if ((key & known) == trim.frame) bin = digit_of(key, digit);
    }
    // Most warps have rows of one frame: those count them at once.
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

enum Fate { kGoes, kTies, kStays };

__device__ __forceinline__ Fate fate_of(const Fates& fates, const Trim& trim, index_t row) {
  if (row >= trim.live || is_dead(fates, row)) return kGoes;
  if (trim.excess == 0) return kStays;
  const unsigned key = frame_key(fates.frame_ids[row]);
  return key > trim.frame ? kStays : (key == trim.frame ? kTies : kGoes);
}

// What is to be trimmed, and how many rows of each block stay.
__global__ void __launch_bounds__(kThreads)
    stay_kernel(Fates fates, const int64_t* __restrict__ count, index_t capacity, index_t max_tokens, int digits,
                const unsigned* __restrict__ histograms, Trim* __restrict__ trim_, Counts* __restrict__ counts) {
  __shared__ int stays[kThreads / kBlockRows];
  __shared__ int ties[kThreads / kBlockRows];
  const index_t live = sound_count(count, capacity), stride = static_cast<index_t>(gridDim.x) * kThreads;
  const Trim trim = find_trim(histograms, digits, live, max_tokens);
  if (blockIdx.x == 0 && threadIdx.x == 0) *trim_ = trim;
  const int part = threadIdx.x / kBlockRows;
  for (index_t first = static_cast<index_t>(blockIdx.x) * kThreads; first < live; first += stride) {
    if (threadIdx.x % kBlockRows == 0) stays[part] = ties[part] = 0;
    __syncthreads();
    const Fate fate = fate_of(fates, trim, first + threadIdx.x);
    const int staying_here = __popc(__ballot_sync(kFullWarp, fate == kStays));
    const int tied_here = __popc(__ballot_sync(kFullWarp, fate == kTies));
    if (threadIdx.x % 32 == 0) {
      if (staying_here > 0) atomicAdd(&stays[part], staying_here);
      if (tied_here > 0) atomicAdd(&ties[part], tied_here);
    }
    __syncthreads();
    const index_t block = first / kBlockRows + part;
    if (threadIdx.x % kBlockRows == 0 && block * kBlockRows < live)
      counts[block] = make_counts(static_cast<unsigned>(stays[part]), static_cast<unsigned>(ties[part]));
    __syncthreads();
  }
}

// One block: sums the counts up, so that counts[b] is of all rows before block b, and that after the last of all rows.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const Trim* __restrict__ trim_, Counts* __restrict__ counts, int64_t* __restrict__ count,
               int64_t* __restrict__ evicted) {
  __shared__ Counts totals[kThreads / 32];
  __shared__ Counts carried;
  const Trim trim = *trim_;
  const index_t blocks = (trim.live + kBlockRows - 1) / kBlockRows;
  if (threadIdx.x == 0) carried = 0;
  __syncthreads();
  for (index_t first = 0; first < blocks; first += kThreads) {
    const index_t b = first + threadIdx.x;
    const Counts own = b < blocks ? counts[b] : 0;
    Counts upto = sum_up_to<kThreads>(own, totals);
    upto += carried;
    if (b < blocks) counts[b] = upto - own;
    __syncthreads();
    if (threadIdx.x == kThreads - 1) carried = upto;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    counts[blocks] = carried;
    if (trim.live > 0) *count = staying(carried, trim);
    *evicted = trim.excess;
  }
}

// Rows of the buffers, or of the copy of a part of them.
template <typename Word>
struct Rows {
  float4* points;
  int32_t* frame_ids;
  uint8_t* votes;   // or null, and so are these
  uint8_t* looks;
  uint8_t* scales;
  Word* features;
};

// All but the features of a row.
template <typename Word>
__device__ __forceinline__ void copy_row(const Rows<Word>& from, index_t row, const Rows<Word>& to, index_t place) {
  to.points[place] = from.points[row];
  to.frame_ids[place] = from.frame_ids[row];
  if (to.votes != nullptr) to.votes[place] = from.votes[row];
  if (to.looks != nullptr) to.looks[place] = from.looks[row];
  if (to.scales != nullptr) to.scales[place] = from.scales[row];
}

// Where the rows of a block that stay go, and how many they are. `to` is -1 where nothing before them or of them goes.
struct Way {
  index_t to;
  int rows;
};

__device__ __forceinline__ Way way_of(const Trim& trim, const Counts* counts, index_t block) {
  const index_t begin = block * kBlockRows;
  if (begin >= trim.live) return {-1, 0};
  const index_t to = staying(counts[block], trim);
  const int rows = static_cast<int>(staying(counts[block + 1], trim) - to);
  return {to == begin && rows == min(index_t{kBlockRows}, trim.live - begin) ? -1 : to, rows};
}

// Copies what stays of some blocks, from block `first` on. Marks the blocks whose rows change.
template <typename Word>
__global__ void __launch_bounds__(kRowThreads)
    gather_kernel(Fates fates, const Trim* __restrict__ trim_, const Counts* __restrict__ counts, index_t first,
                  Rows<Word> held, Rows<Word> copy, int words, unsigned* __restrict__ touched) {
  __shared__ Counts totals[kRowThreads / 32];
  __shared__ int kept[kBlockRows];
  const Trim trim = *trim_;
  const index_t block = first + blockIdx.x;
  const Way way = way_of(trim, counts, block);
  if (way.to < 0) return;
  if (touched != nullptr && threadIdx.x == 0) touched[block] = 1;
  const index_t row = block * kBlockRows + threadIdx.x, part = staying(counts[first], trim);
  const Fate fate = fate_of(fates, trim, row);
  const Counts own = make_counts(fate == kStays, fate == kTies);
  const Counts before = counts[block] + sum_up_to<kRowThreads>(own, totals) - own;
  if (fate == kStays || (fate == kTies && (before & 0xffffffffu) >= trim.ties)) {
    const index_t place = staying(before, trim);
    kept[place - way.to] = threadIdx.x;
    copy_row(held, row, copy, place - part);
  }
  __syncthreads();
  const Word* from = held.features + block * kBlockRows * words;
  Word* to = copy.features + (way.to - part) * words;
  for (int k = threadIdx.x; k < way.rows * words; k += kRowThreads)
    to[k] = from[static_cast<index_t>(kept[k / words]) * words + k % words];
}

// Puts the copies where they belong.
template <typename Word>
__global__ void __launch_bounds__(kRowThreads)
    place_kernel(const Trim* __restrict__ trim_, const Counts* __restrict__ counts, index_t first, Rows<Word> held,
                 Rows<Word> copy, int words) {
  const Trim trim = *trim_;
  const Way way = way_of(trim, counts, first + blockIdx.x);
  if (way.to < 0) return;
  const index_t at = way.to - staying(counts[first], trim);
  if (threadIdx.x < way.rows) copy_row(copy, at + threadIdx.x, held, way.to + threadIdx.x);
  for (int k = threadIdx.x; k < way.rows * words; k += kRowThreads)
    held.features[way.to * words + k] = copy.features[at * words + k];
}

// Calls f with a value of the widest type that rows of so many bytes, from there on, are made of.
template <typename F>
void for_word(size_t row_bytes, const void* rows, const F& f) {
  const size_t all = row_bytes | reinterpret_cast<uintptr_t>(rows);
  if (all % 16 == 0) return f(uint4{});
  if (all % 4 == 0) return f(uint32_t{});
  if (all % 2 == 0) return f(uint16_t{});
  f(uint8_t{});
}

}  // namespace

Tensor cache_compact(Tensor points, Tensor features, Tensor frame_ids, std::optional<Tensor> votes,
                  std::optional<Tensor> looks, Tensor count, int64_t max_tokens, std::optional<Tensor> bounds,
                  std::optional<Tensor> scales) {
  const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
  STD_TORCH_CHECK(points.is_contiguous() && features.is_contiguous() && frame_ids.is_contiguous() &&
                      (!votes.has_value() || votes->is_contiguous()) && (!looks.has_value() || looks->is_contiguous()) &&
                      (!scales.has_value() || scales->is_contiguous()),
                  "points, features, frame_ids, votes, looks and scales must be contiguous: they are written in place");
  STD_TORCH_CHECK(is_aligned(points), "points must begin at a multiple of 16 bytes: they are written in place");
  const index_t capacity = points.size(0), blocks = divide_up(capacity, kBlockRows);
  if (bounds.has_value()) check_bounds(*bounds, capacity);
  const cudaStream_t stream = current_stream(points);
  Tensor evicted = new_tensor(points, {}, ScalarType::Long);
  fill_bytes(evicted, 0, stream);
  const bool may_evict = max_tokens < capacity;
  if (capacity == 0 || (!may_evict && !votes.has_value())) return evicted;

  const int digits = may_evict ? kDigits : 0;
  Tensor histograms = new_tensor(points, {digits, kBins}, ScalarType::Int);
  fill_bytes(histograms, 0, stream);
  static_assert(sizeof(Trim) == 24);
  Tensor found = new_tensor(points, {3}, ScalarType::Long);
  Tensor counts = new_tensor(points, {blocks + 1}, ScalarType::Long);
  const Fates fates{input<int32_t>(frame_ids), votes.has_value() ? input<uint8_t>(*votes) : nullptr};
  const unsigned grid = grid_for(capacity, kThreads, 2);
  for (int digit = 0; digit < digits; ++digit) {
    digit_kernel<<<grid, kThreads, 0, stream>>>(fates, input<int64_t>(count), capacity, max_tokens, digit,
                                                output<unsigned>(histograms));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  stay_kernel<<<grid, kThreads, 0, stream>>>(fates, input<int64_t>(count), capacity, max_tokens, digits,
                                             input<unsigned>(histograms), output<Trim>(found), output<Counts>(counts));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  sum_kernel<<<1, kThreads, 0, stream>>>(input<Trim>(found), output<Counts>(counts), output<int64_t>(count),
                                         output<int64_t>(evicted));
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  const index_t row_bytes = features.size(1) * static_cast<index_t>(features.element_size());
  const index_t part = std::clamp<index_t>(kCopyBytes / (kBlockRows * (row_bytes + 23)), 1, blocks);  // blocks at a time
  const index_t rows = part * kBlockRows;
  const auto copy_of = [&](const std::optional<Tensor>& buffer) {
    return new_tensor(points, {buffer.has_value() ? rows : 0}, ScalarType::Byte);
  };
  Tensor copied_points = new_tensor(points, {rows, 4}, ScalarType::Float);
  Tensor copied_ids = new_tensor(points, {rows}, ScalarType::Int);
  Tensor copied_features = new_tensor(points, {rows, features.size(1)}, features.scalar_type());
  Tensor copied_votes = copy_of(votes), copied_looks = copy_of(looks), copied_scales = copy_of(scales);
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
                          votes.has_value() ? output<uint8_t>(*votes) : nullptr,
                          looks.has_value() ? output<uint8_t>(*looks) : nullptr,
                          scales.has_value() ? output<uint8_t>(*scales) : nullptr,
                          output<Word>(features)};
    const Rows<Word> copy{output<float4>(copied_points),     output<int32_t>(copied_ids),
                          pointer(votes, copied_votes),      pointer(looks, copied_looks),
                          pointer(scales, copied_scales),    output<Word>(copied_features)};
    for (index_t first = 0; first < blocks; first += part) {
      const auto number = static_cast<unsigned>(std::min(part, blocks - first));
      gather_kernel<Word><<<number, kRowThreads, 0, stream>>>(fates, input<Trim>(found), input<Counts>(counts), first, held,
                                                              copy, words,
                                                              bounds.has_value() ? output<unsigned>(touched) : nullptr);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      place_kernel<Word><<<number, kRowThreads, 0, stream>>>(input<Trim>(found), input<Counts>(counts), first, held, copy,
                                                             words);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  if (bounds.has_value()) update_bounds(points, input<int64_t>(count), input<unsigned>(touched), *bounds, stream);
  return evicted;
}

}  // namespace mirage::cuda

STABLE_TORCH_LIBRARY_IMPL(mirage, CUDA, m) { m.impl("cache_compact_compiled", TORCH_BOX(&mirage::cuda::cache_compact)); }

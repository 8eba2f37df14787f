// cache_compact on the CPU: marks the tokens to remove, then moves the runs of kept ones together, in order.
//
// In place: points, features, frame_ids, free_space_violations, num_observations, count, bounds, scales. Out: how many
// tokens were evicted.
#include "../core/bounded_write_rules.h"

#include <cstring>

#include "culling.h"

namespace mirage::cpu {
namespace {

// Clears the flags of the `excess` oldest tokens: least frame id first, then lowest row.
void evict(const int32_t* frame_ids, index_t excess, std::vector<uint8_t>& kept) {
  std::vector<int32_t> frames;
  for (size_t row = 0; row < kept.size(); ++row)
    if (kept[row]) frames.push_back(frame_ids[row]);
  std::nth_element(frames.begin(), frames.begin() + (excess - 1), frames.end());
  const int32_t last = frames[excess - 1];
  index_t of_last = excess;  // how many tokens of that frame must go
  for (const int32_t frame : frames) of_last -= frame < last;
  for (size_t row = 0; row < kept.size(); ++row) {
    if (!kept[row] || frame_ids[row] > last) continue;
    if (frame_ids[row] == last && of_last-- <= 0) continue;
    kept[row] = 0;
  }
}

void close_gaps(Tensor& buffer, const std::vector<uint8_t>& kept) {
  if (buffer.numel() == 0) return;
  char* data = output<char>(buffer);
  const size_t bytes = static_cast<size_t>(buffer.numel() / buffer.size(0)) * buffer.element_size();
  size_t to = 0;
  for (size_t row = 0; row < kept.size();) {
    size_t end = row;
    while (end < kept.size() && kept[end]) ++end;
    if (end > row && to != row) std::memmove(data + to * bytes, data + row * bytes, (end - row) * bytes);
    to += end - row;
    row = end + 1;
  }
}

}  // namespace

Tensor cache_compact(Tensor points, Tensor features, Tensor frame_ids, std::optional<Tensor> free_space_violations,
                     std::optional<Tensor> num_observations, Tensor count, int64_t max_tokens,
                     std::optional<Tensor> bounds, std::optional<Tensor> scales) {
  if (bounds.has_value()) check_bounds(*bounds, points.size(0));
  const index_t live = *input<int64_t>(count);
  STD_TORCH_CHECK(live >= 0 && live <= points.size(0), "count must be in [0, ", points.size(0), "], got ", live);
  std::vector<uint8_t> kept(live, 1);
  if (free_space_violations.has_value())
    for (index_t row = 0; row < live; ++row) kept[row] = input<uint8_t>(*free_space_violations)[row] != kInvalid;
  const index_t alive = std::count(kept.begin(), kept.end(), 1);
  const index_t excess = std::max<index_t>(alive - max_tokens, 0);
  if (excess > 0) evict(input<int32_t>(frame_ids), excess, kept);
  if (alive - excess < live) {
    for (Tensor* buffer : {&points, &features, &frame_ids}) close_gaps(*buffer, kept);
    for (std::optional<Tensor>* buffer : {&free_space_violations, &num_observations, &scales})
      if (buffer->has_value()) close_gaps(**buffer, kept);
    *output<int64_t>(count) = alive - excess;
    const index_t gap = std::find(kept.begin(), kept.end(), 0) - kept.begin();
    if (bounds.has_value())
      update_bounds(input<float>(points), alive - excess, gap / kBlockTokens, divide_up(live, kBlockTokens), nullptr,
                    points.size(0), output<float>(*bounds));
  }
  Tensor evicted = new_tensor({}, ScalarType::Long);
  *output<int64_t>(evicted) = excess;
  return evicted;
}

}  // namespace mirage::cpu

STABLE_TORCH_LIBRARY_IMPL(mirage, CPU, m) { m.impl("cache_compact_compiled", TORCH_BOX(&mirage::cpu::cache_compact)); }

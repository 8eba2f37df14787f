// Boxes of blocks of tokens and of tiles of blocks, and which of them the views may see.
#pragma once

#include "../core/frustum.h"
#include "common.h"

namespace mirage::cpu {

// Checks bounds that are written in place: they must hold the boxes of all blocks and tiles of `capacity` points.
void check_bounds(const Tensor& bounds, index_t capacity);

// Updates the boxes of blocks first, .., last - 1 of the first `count` points or, given `touched`, of those whose byte
// is not 0; and those of the tiles they are in. No block from `last` on may hold a live point.
void update_bounds(const float* points, index_t count, index_t first, index_t last, const uint8_t* touched,
                   index_t capacity, float* bounds);

// The numbers of the blocks that some view may see, in order; without bounds, of all blocks.
class VisibleBlocks {
 public:
  VisibleBlocks(const std::optional<Tensor>& bounds, index_t capacity, index_t count,
                const std::vector<Frustum>& frusta);

  index_t size() const { return static_cast<index_t>(numbers_.size()); }
  const uint32_t* from(index_t k) const { return numbers_.data() + k; }

  // Whether view t may see a block of the list from the first-th to before the last-th.
  bool by(index_t t, index_t first, index_t last) const {
    if (seen_.empty()) return true;
    for (index_t k = first; k < last; ++k)
      if (seen_[t * tiles_ + numbers_[k] / kTileBlocks] >> (numbers_[k] % kTileBlocks) & 1) return true;
    return false;
  }

 private:
  std::vector<uint32_t> numbers_;
  index_t tiles_ = 0;
  std::vector<uint64_t> seen_;  // (views, tiles), one bit per block; empty without bounds
};

}  // namespace mirage::cpu

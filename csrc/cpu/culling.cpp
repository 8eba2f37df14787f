// Boxes of blocks and tiles, and their tests against frusta, 64 at a time.
//
// In: points (N, 4), or boxes as update_bounds leaves them and frusta of T views. Out: boxes; which blocks which views
// may see.
#include "culling.h"

#include <limits>

namespace mirage::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kTile = kTileBlocks;  // tested at once, one bit each of a word
static_assert(kTile == 64);

typedef float Row __attribute__((vector_size(4 * sizeof(float))));

// `points` holds `count` rows x, y, z, footprint. A point with a coordinate that is not finite is left out.
MIRAGE_SIMD
void bound_rows(const float* points, index_t count, float* box) {
  Row low = Row{} + kInfinity, high = Row{} - kInfinity, zeros = Row{};
  for (index_t i = 0; i < count; ++i) {
    Row row;
    __builtin_memcpy(&row, points + 4 * i, sizeof(row));
    low = row < low ? row : low;
    high = row > high ? row : high;
    zeros += row - row;  // becomes NaN at the first value that is not finite
  }
  if ((zeros[0] + zeros[1]) + zeros[2] != 0.0f) {
    low = Row{} + kInfinity;
    high = Row{} - kInfinity;
    for (index_t i = 0; i < count; ++i) {
      Row row;
      __builtin_memcpy(&row, points + 4 * i, sizeof(row));
      if (!is_finite(row[0]) || !is_finite(row[1]) || !is_finite(row[2])) continue;
      low = row < low ? row : low;
      high = row > high ? row : high;
    }
  }
  for (int j = 0; j < 3; ++j) {
    box[j] = low[j] + 0.0f;  // no -0: whether it or 0 is the least would depend on the order of the points
    box[3 + j] = high[j] + 0.0f;
  }
}

// The boxes of a tile's blocks, or of as many tiles, as one array per side. Empty boxes follow the last one.
struct Tile {
  alignas(64) float side[kBoxSize][kTile], reach[kTile];
};

MIRAGE_SIMD
void load_tile(const float* bounds, int count, Tile& tile) {
  for (int b = 0; b < count; ++b)
    for (int j = 0; j < kBoxSize; ++j) tile.side[j][b] = bounds[kBoxSize * b + j];
  for (int j = 0; j < kBoxSize; ++j)
    std::fill(tile.side[j] + count, tile.side[j] + kTile, j < 3 ? kInfinity : -kInfinity);
  for (int b = 0; b < kTile; ++b) {
    float reach = 0.0f;
    for (int j = 0; j < 3; ++j) {
      const float low = magnitude_of(tile.side[j][b]), high = magnitude_of(tile.side[3 + j][b]);
      reach += low > high ? low : high;
    }
    tile.reach[b] = limited_reach(reach);
  }
}

// The box around `count` boxes.
void bound_boxes(const float* boxes, index_t count, float* around) {
  for (int j = 0; j < 3; ++j) {
    float low = kInfinity, high = -kInfinity;
    for (index_t b = 0; b < count; ++b) {
      low = std::min(low, boxes[kBoxSize * b + j]);
      high = std::max(high, boxes[kBoxSize * b + 3 + j]);
    }
    around[j] = low;
    around[3 + j] = high;
  }
}

// `may_see` for every box of the tile, one bit each.
MIRAGE_SIMD
uint64_t see_tile(const Tile& tile, const Frustum& frustum) {
  typedef int32_t Flags __attribute__((vector_size(sizeof(FloatLanes))));
  constexpr int kVectors = kTile / kLanes;
  Flags outside[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    outside[v] = Flags{};
    for (int j = 0; j < 3; ++j) outside[v] |= load(tile.side[j] + v * kLanes) > load(tile.side[3 + j] + v * kLanes);
  }
  for (int f = 0; f < 5; ++f) {
    const float* corner[3];
    for (int j = 0; j < 3; ++j) corner[j] = tile.side[frustum.normal[f][j] < 0.0f ? j : 3 + j];
    const FloatLanes x = FloatLanes{} + frustum.normal[f][0], y = FloatLanes{} + frustum.normal[f][1];
    const FloatLanes z = FloatLanes{} + frustum.normal[f][2], offset = FloatLanes{} + frustum.offset[f];
    const FloatLanes slack = FloatLanes{} + frustum.slack[f];
    Flags all = Flags{} - 1;
    for (int v = 0; v < kVectors; ++v) {
      const int b = v * kLanes;
      const FloatLanes bound = (offset + slack * load(tile.reach + b)) +
                               (x * load(corner[0] + b) + y * load(corner[1] + b)) + z * load(corner[2] + b);
      outside[v] |= bound < 0.0f;
      all &= outside[v];
    }
    // Neighbouring boxes tend to lie beyond the same plane.
    uint64_t halves[4];
    __builtin_memcpy(halves, &all, sizeof(all));
    if ((halves[0] & halves[1] & halves[2] & halves[3]) == ~uint64_t{0}) return 0;
  }
  alignas(64) int32_t flags[kTile];
  alignas(64) uint8_t seen[kTile];
  __builtin_memcpy(flags, outside, sizeof(flags));
  for (int b = 0; b < kTile; ++b) seen[b] = static_cast<uint8_t>(flags[b] + 1);
  uint64_t bits = 0;
  for (int word = 0; word < kTile / 8; ++word) {
    uint64_t bytes;
    __builtin_memcpy(&bytes, seen + 8 * word, 8);
    bits |= (bytes * 0x0102040810204080ull >> 56) << (8 * word);  // byte i becomes bit i
  }
  return bits;
}

}  // namespace

void check_bounds(const Tensor& bounds, index_t capacity) {
  STD_TORCH_CHECK(bounds.is_cpu() && bounds.scalar_type() == ScalarType::Float && bounds.is_contiguous() &&
                      bounds.numel() == bounds_rows(capacity) * kBoxSize,
                  "bounds must be contiguous float32 with the boxes of ", capacity,
                  " points: they are written in place");
}

void update_bounds(const float* points, index_t count, index_t first, index_t last, const uint8_t* touched,
                   index_t capacity, float* bounds) {
  torch::stable::parallel_for(first, last, 32, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      if (touched != nullptr && touched[b] == 0) continue;
      const index_t row = b * kBlockTokens, here = std::clamp<index_t>(count - row, 0, kBlockTokens);
      bound_rows(points + 4 * row, here, bounds + kBoxSize * b);
    }
  });
  float* tiles = bounds + kBoxSize * divide_up(capacity, kBlockTokens);
  for (index_t k = first / kTile; k * kTile < last; ++k) {
    const index_t begin = k * kTile, end = std::min<index_t>(begin + kTile, last);
    if (touched != nullptr && std::count(touched + begin, touched + end, 0) == end - begin) continue;
    bound_boxes(bounds + kBoxSize * begin, end - begin, tiles + kBoxSize * k);
  }
}

VisibleBlocks::VisibleBlocks(const std::optional<Tensor>& bounds_, index_t capacity, index_t count,
                             const std::vector<Frustum>& frusta) {
  const index_t blocks = divide_up(count, kBlockTokens), views = static_cast<index_t>(frusta.size());
  if (!bounds_.has_value()) {
    numbers_.resize(blocks);
    for (index_t b = 0; b < blocks; ++b) numbers_[b] = static_cast<uint32_t>(b);
    return;
  }
  const Tensor bounds = checked(*bounds_, ScalarType::Float, "bounds");
  STD_TORCH_CHECK(bounds.numel() == bounds_rows(capacity) * kBoxSize, "bounds must hold the boxes of ", capacity,
                  " points");
  const float* boxes = input<float>(bounds);
  const float* around = boxes + kBoxSize * divide_up(capacity, kBlockTokens);
  tiles_ = divide_up(blocks, kTile);
  seen_.resize(std::max<index_t>(1, views * tiles_));
  // First the tiles that some view may see, then the blocks of these: no other box is read.
  std::vector<index_t> listed;
  for (index_t first = 0; first < tiles_; first += kTile) {
    Tile tile;
    load_tile(around + kBoxSize * first, static_cast<int>(std::min<index_t>(kTile, tiles_ - first)), tile);
    uint64_t any = 0;
    for (index_t t = 0; t < views; ++t) {
      uint64_t bits = see_tile(tile, frusta[t]);
      for (any |= bits; bits != 0; bits &= bits - 1) seen_[t * tiles_ + first + __builtin_ctzll(bits)] = 1;
    }
    for (; any != 0; any &= any - 1) listed.push_back(first + __builtin_ctzll(any));
  }
  const index_t grain = 1 + 512 / (views + 4);
  torch::stable::parallel_for(0, static_cast<int64_t>(listed.size()), grain, [&](int64_t begin, int64_t end) {
    Tile tile;
    for (int64_t i = begin; i < end; ++i) {
      const index_t k = listed[i];
      load_tile(boxes + kBoxSize * kTile * k, static_cast<int>(std::min<index_t>(kTile, blocks - k * kTile)), tile);
      for (index_t t = 0; t < views; ++t) {
        uint64_t& seen = seen_[t * tiles_ + k];
        if (seen != 0) seen = see_tile(tile, frusta[t]);
      }
    }
  });
  for (const index_t k : listed) {
    uint64_t bits = 0;
    for (index_t t = 0; t < views; ++t) bits |= seen_[t * tiles_ + k];
    for (; bits != 0; bits &= bits - 1) numbers_.push_back(static_cast<uint32_t>(k * kTile + __builtin_ctzll(bits)));
  }
}

}  // namespace mirage::cpu

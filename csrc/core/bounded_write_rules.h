// What bounded_write decides by: reference.py says what each number is, under the same names.
#pragma once

#include "camera.h"
#include "alignment_score.h"

namespace mirage {

constexpr float kCovered = 0.2f;
constexpr float kSameLook = 0.05f;
constexpr float kFresh = 0.02f;
constexpr float kCloser = 1.25f;
constexpr float kCarveGate = 1.05f;
constexpr int kMostMerged = 16;
constexpr uint8_t kDead = 255;

constexpr int kReport = 11;
enum Count {
  kWritten,
  kReplaced,
  kMerged,
  kCoveredCount,
  kRefused,
  kMaskedCount,
  kUnknownCount,
  kOutOfRangeCount,
  kNonFiniteCount,
  kCarvedCount,
  kEvictedCount
};

constexpr int kLevelBits = 7, kAxisBits = 19;  // the level lies on top; no voxel has all bits set
constexpr int kMostLevel = 62;
constexpr float kAxisLimit = 262144.0f;  // 2^18

// floor(coordinate / edge), counted from the lower border; NaN falls there.
MIRAGE_HD uint64_t token_voxel_axis(float coordinate, float inverse) {
  const float scaled = coordinate * inverse;
  const float low = scaled >= -kAxisLimit ? scaled : -kAxisLimit;
  const float clamped = low <= kAxisLimit - 1.0f ? low : kAxisLimit - 1.0f;
  return static_cast<uint64_t>(floor_cell(clamped) + 262144);
}

// The voxel whose edge is the power of two nearest, as a ratio, to the footprint.
MIRAGE_HD uint64_t token_voxel(float x, float y, float z, float footprint) {
  const uint32_t bits = float_bits(footprint);
  const int exponent = static_cast<int>((bits >> 23) & 0xff) - 127 + ((bits & 0x7fffffu) > 0x3504f3u ? 1 : 0);
  const int high = exponent < kMostLevel ? exponent : kMostLevel;
  const int level = high > -kMostLevel ? high : -kMostLevel;
  const float inverse = bits_float(static_cast<uint32_t>(127 - level) << 23);
  return (static_cast<uint64_t>(level + kMostLevel) << (3 * kAxisBits)) |
         (token_voxel_axis(x, inverse) << (2 * kAxisBits)) | (token_voxel_axis(y, inverse) << kAxisBits) |
         token_voxel_axis(z, inverse);
}

constexpr uint64_t kNoVoxel = ~0ull;

// How far from a coordinate of a token, at most, another token of its voxel lies; infinite where that may be a voxel on
// the border.
MIRAGE_HD float token_voxel_reach(float coordinate, float footprint) {
  const float magnitude = bits_float(float_bits(coordinate) & 0x7fffffffu);
  const bool inside = (footprint > 1e-15f) & (footprint < 1e15f) & (magnitude < 1e5f * footprint);
  return inside ? 2.0f * footprint : bits_float(0x7f800000u);  // an edge is at most 1.42 footprints
}

// On the surface that a view sees at this depth, within the gate of a read-out.
MIRAGE_HD bool on_surface(float depth, float surface) {
  return (surface > 0.0f) & (depth <= kGate * surface) & (surface <= kGate * depth);
}

// What lies farther than this is neither on a surface at `surface` or before nor seen through from there.
MIRAGE_HD float farthest_touched(float surface) { return kGate * 1.00001f * surface; }

MIRAGE_HD bool shows(float score, float lack) { return (score <= kCovered) | (lack <= kSameLook); }

// Whether a new look takes the place of the one that shows it.
MIRAGE_HD bool takes_place(float score, float held_footprint, float new_footprint) {
  return (score <= kFresh) | (held_footprint >= kCloser * new_footprint);
}

// Corner k of the four cells whose centres surround (u, v), held to the grid.
MIRAGE_HD int surrounding_cell(float u, float v, int height, int width, int k) {
  const int column = floor_cell(u - 0.5f) + k % 2, row = floor_cell(v - 0.5f) + k / 2;
  const int j = column < 0 ? 0 : (column < width ? column : width - 1);
  const int i = row < 0 ? 0 : (row < height ? row : height - 1);
  return i * width + j;
}

// Whether something the view shows lies clearly behind a token at this depth.
MIRAGE_HD bool clearly_behind(float shown, float depth) { return depth * kCarveGate < shown; }

// Whether a cell shows nothing at this depth: neither its least depth nor, where that lies clearly before, its surface.
MIRAGE_HD bool shows_nothing_at(float depth, float nearest, float surface) {
  const float shown = nearest * kCarveGate < depth ? surface : nearest;
  return clearly_behind(shown, depth) | (shown * kCarveGate < depth);
}

MIRAGE_HD float mean_with(float held, float looks, float added) { return (held * looks + added) / (looks + 1.0f); }

}  // namespace mirage

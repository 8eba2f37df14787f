// The rules by which bounded_write decides: which held token covers a cell, which one is replaced, what is free space.
// mirage_kernels/constants.py says what each threshold is.
#pragma once

#include "alignment_score.h"
#include "constants.h"

namespace mirage {

constexpr int kLevelBits = 7, kAxisBits = 19;  // the level is on top; no voxel has all bits set
constexpr int kMaxLevel = 62;
constexpr float kAxisLimit = 262144.0f;  // 2^18

// floor(coordinate / edge), counted from the lower border of the grid of voxels; NaN counts as that border.
MIRAGE_HD uint64_t token_voxel_axis(float coordinate, float inverse) {
  const float scaled = coordinate * inverse;
  const float low = scaled >= -kAxisLimit ? scaled : -kAxisLimit;
  const float clamped = low <= kAxisLimit - 1.0f ? low : kAxisLimit - 1.0f;
  return static_cast<uint64_t>(floor_cell(clamped) + 262144);
}

// The voxel of a token. Its edge is the power of two that is nearest to the footprint as a ratio.
MIRAGE_HD uint64_t token_voxel(float x, float y, float z, float footprint) {
  const uint32_t bits = float_bits(footprint);
  const int exponent = static_cast<int>((bits >> 23) & 0xff) - 127 + ((bits & 0x7fffffu) > 0x3504f3u ? 1 : 0);
  const int high = exponent < kMaxLevel ? exponent : kMaxLevel;
  const int level = high > -kMaxLevel ? high : -kMaxLevel;
  const float inverse = bits_float(static_cast<uint32_t>(127 - level) << 23);
  return (static_cast<uint64_t>(level + kMaxLevel) << (3 * kAxisBits)) |
         (token_voxel_axis(x, inverse) << (2 * kAxisBits)) | (token_voxel_axis(y, inverse) << kAxisBits) |
         token_voxel_axis(z, inverse);
}

constexpr uint64_t kNoVoxel = ~0ull;

// The greatest distance, along one axis, between a token and another one of its voxel; infinite where the voxel may be
// one of the border.
MIRAGE_HD float token_voxel_reach(float coordinate, float footprint) {
  const float magnitude = bits_float(float_bits(coordinate) & 0x7fffffffu);
  const bool inside = (footprint > 1e-15f) & (footprint < 1e15f) & (magnitude < 1e5f * footprint);
  return inside ? 2.0f * footprint : bits_float(0x7f800000u);  // an edge is at most 1.42 footprints
}

// True if a token at this depth lies on the surface that the view sees, within the depth tolerance of a readout.
MIRAGE_HD bool on_surface(float depth, float surface) {
  return (surface > 0.0f) & (depth <= kDepthTolerance * surface) & (surface <= kDepthTolerance * depth);
}

// A token beyond this depth is neither on a surface at most `surface` away nor in front of one.
MIRAGE_HD float farthest_relevant(float surface) { return kDepthTolerance * 1.00001f * surface; }

// Whether a held token already shows what the new view sees in a cell.
MIRAGE_HD bool covers(float score, float score_bias) {
  return (score <= kCoverageThreshold) | (score_bias <= kCoverageBias);
}

// Whether a new observation replaces the held one that covers it: as a duplicate of it, or as one of finer resolution.
MIRAGE_HD bool supersedes(float score, float held_footprint, float new_footprint) {
  return (score <= kDuplicateThreshold) | (held_footprint >= kResolutionGain * new_footprint);
}

// The k-th of the four cells whose centres surround (u, v), clamped to the grid.
MIRAGE_HD int surrounding_cell(float u, float v, int height, int width, int k) {
  const int column = floor_cell(u - 0.5f) + k % 2, row = floor_cell(v - 0.5f) + k / 2;
  const int j = column < 0 ? 0 : (column < width ? column : width - 1);
  const int i = row < 0 ? 0 : (row < height ? row : height - 1);
  return i * width + j;
}

// Whether the surface that a view shows lies clearly behind a token at this depth.
MIRAGE_HD bool is_clearly_behind(float shown, float depth) { return depth * kCarveTolerance < shown; }

// Whether a cell shows free space at this depth: neither its least depth is there nor, where that one is clearly
// nearer, its surface.
MIRAGE_HD bool is_free_at(float depth, float nearest, float surface) {
  const float shown = nearest * kCarveTolerance < depth ? surface : nearest;
  return is_clearly_behind(shown, depth) | (shown * kCarveTolerance < depth);
}

// The mean of one observation more.
MIRAGE_HD float running_mean(float held, float num_observations, float added) {
  return (held * num_observations + added) / (num_observations + 1.0f);
}

}  // namespace mirage

// Which blocks of tokens a view may see: boxes against a view's frustum, never wrong towards "not seen".
#pragma once

#include <cmath>

#include "camera.h"

namespace mirage {

constexpr int kBlockTokens = 256;  // consecutive rows of points that share one box
constexpr int kBoxSize = 6;        // least x, y, z, greatest x, y, z; an empty one has +inf, -inf
constexpr int kTileBlocks = 64;    // consecutive blocks that share one box: a tile

// Rows of the bounds of so many points: the boxes of blocks, then those of tiles.
inline int64_t bounds_rows(int64_t points) {
  const int64_t blocks = (points + kBlockTokens - 1) / kBlockTokens;
  return blocks + (blocks + kTileBlocks - 1) / kTileBlocks;
}

// Past this no sum here or in the projection is sure not to overflow, and nothing is culled.
constexpr float kFar = 1e15f;

// A view as five half-spaces: a point that the projection accepts is on the positive side of each, up to rounding.
struct Frustum {
  float normal[5][3], offset[5];
  float length[5], slack[5];  // |normal|, and the share of a point's |x| + |y| + |z| that covers rounding
  float least;  // normal[0] x + least is no more than a point's z, but for its slack
};

// z > near, u >= -margin, u < width + margin, and v likewise, each multiplied by z > 0; `margin` in cells. Float arithmetic
// of the projection and of the tests errs by a few 2^-24 of the terms' magnitudes; a slack of 1e-5 of them (168 x 2^-24)
// covers both. What underflows is covered by 1e-25, and where it is u or v by a share of z.
MIRAGE_HD Frustum make_frustum(const Projection& projection, float near, int width, int height, int margin) {
  const auto& m = projection.m;
  constexpr double kSlack = 1e-5;
  const double w = static_cast<double>(width) + margin, h = static_cast<double>(height) + margin, low = margin;
  Frustum frustum;
  bool within = true;
  for (int f = 0; f < 5; ++f) {
    double normal[4], magnitude[4];
    for (int j = 0; j < 4; ++j) {
      const double a = m[0][j], b = m[1][j], z = m[2][j], size = fabs(z);
      const double value[5] = {z, a + low * z, w * z - a, b + low * z, h * z - b};
      const double share = (low + 1e-3) * size;
      const double total[5] = {size, share + fabs(a), w * size + fabs(a), share + fabs(b), h * size + fabs(b)};
      normal[j] = value[f];
      magnitude[j] = total[f];
      within &= magnitude[j] <= kFar;
    }
    double most = magnitude[0] > magnitude[1] ? magnitude[0] : magnitude[1];
    most = most > magnitude[2] ? most : magnitude[2];
    for (int j = 0; j < 3; ++j) frustum.normal[f][j] = static_cast<float>(normal[j]);
    const double depth = f == 0 ? near : 0.0;
    frustum.offset[f] = static_cast<float>(normal[3] - depth + kSlack * (magnitude[3] + depth) + 1e-25);
    frustum.length[f] = static_cast<float>(
        sqrt(normal[0] * normal[0] + normal[1] * normal[1] + normal[2] * normal[2]) * (1.0 + kSlack));
    frustum.slack[f] = static_cast<float>(kSlack * most + 1e-25);
  }
  const double start = m[2][3];
  frustum.least = static_cast<float>(start - kSlack * fabs(start) - 1e-25);
  if (!within) {  // or NaN
    for (int f = 0; f < 5; ++f) frustum.offset[f] = frustum.length[f] = bits_float(0x7f800000u);
    frustum.least = bits_float(0xff800000u);
  }
  return frustum;
}

MIRAGE_HD float magnitude_of(float value) { return bits_float(float_bits(value) & 0x7fffffffu); }

// A reach that overflowed, or may make a sum overflow, is infinite, and makes every test below fail towards "seen".
MIRAGE_HD float limited_reach(float reach) { return reach <= kFar ? reach : bits_float(0x7f800000u); }

// |x| + |y| + |z| of the points of a box, at most.
MIRAGE_HD float box_reach(const float* box) {
  float reach = 0.0f;
  for (int j = 0; j < 3; ++j) {
    const float low = magnitude_of(box[j]), high = magnitude_of(box[3 + j]);
    reach += low > high ? low : high;
  }
  return limited_reach(reach);
}

// Whether the view may see a point of the box. The corner farthest along a normal decides.
MIRAGE_HD bool may_see(const Frustum& frustum, const float* box) {
  const float reach = box_reach(box);
  bool outside = (box[0] > box[3]) | (box[1] > box[4]) | (box[2] > box[5]);
  for (int f = 0; f < 5; ++f) {
    float bound = frustum.offset[f] + frustum.slack[f] * reach;
    for (int j = 0; j < 3; ++j) bound += frustum.normal[f][j] * (frustum.normal[f][j] < 0.0f ? box[j] : box[3 + j]);
    outside |= bound < 0.0f;
  }
  return !outside;
}

// Whether all points of a box lie farther than `depth` along the view's axis. The corner nearest along it decides.
MIRAGE_HD bool lies_beyond(const Frustum& frustum, float depth, const float* box) {
  float least = frustum.least - frustum.slack[0] * box_reach(box);
  for (int j = 0; j < 3; ++j) least += frustum.normal[0][j] * (frustum.normal[0][j] < 0.0f ? box[3 + j] : box[j]);
  return least > depth;
}

}  // namespace mirage

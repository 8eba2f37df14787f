// Which blocks of tokens a view may see: tests of bounding boxes against the view's frustum. Rounding may make a test
// pass a block that is out of view, but never reject one that is in view.
#pragma once

#include <cmath>

#include "camera.h"
#include "constants.h"

namespace mirage {

constexpr int kBoxSize = 6;  // least x, y, z, greatest x, y, z; an empty box has +inf, -inf

// How many boxes the bounds of so many points hold: those of blocks of kBlockTokens points, then those of tiles of
// kTileBlocks blocks.
inline int64_t bounds_rows(int64_t points) {
  const int64_t blocks = (points + kBlockTokens - 1) / kBlockTokens;
  return blocks + (blocks + kTileBlocks - 1) / kTileBlocks;
}

// A view as five half-spaces: a point that the projection accepts is on the positive side of each, up to rounding.
struct Frustum {
  float normal[5][3], offset[5];
  float length[5], slack[5];  // |normal|, and what to multiply a point's |x| + |y| + |z| by to cover rounding
  float least;                // normal[0] x + least is at most a point's z, up to its slack
};

// The half-spaces are z > near, u >= -margin, u < width + margin, and the same for v, each multiplied by z > 0;
// `margin` is in cells. The projection and the tests in float32 err by a few 2^-24 of the terms' magnitudes:
// kCullSlack, 168 x 2^-24, covers both. kCullTiny covers underflow, and an allowance of z that of u and v. Past
// kCullFar a sum may overflow, and nothing is culled.
MIRAGE_HD Frustum make_frustum(const Projection& projection, float near, int width, int height, int margin) {
  const auto& m = projection.m;
  const double w = static_cast<double>(width) + margin, h = static_cast<double>(height) + margin, low = margin;
  Frustum frustum;
  bool within = true;
  for (int f = 0; f < 5; ++f) {
    double normal[4], magnitude[4];
    for (int j = 0; j < 4; ++j) {
      const double a = m[0][j], b = m[1][j], z = m[2][j], size = fabs(z);
      const double value[5] = {z, a + low * z, w * z - a, b + low * z, h * z - b};
      const double allowance = (low + 1e-3) * size;
      const double total[5] = {size, allowance + fabs(a), w * size + fabs(a), allowance + fabs(b), h * size + fabs(b)};
      normal[j] = value[f];
      magnitude[j] = total[f];
      within &= magnitude[j] <= kCullFar;
    }
    double most = magnitude[0] > magnitude[1] ? magnitude[0] : magnitude[1];
    most = most > magnitude[2] ? most : magnitude[2];
    for (int j = 0; j < 3; ++j) frustum.normal[f][j] = static_cast<float>(normal[j]);
    const double depth = f == 0 ? near : 0.0;
    frustum.offset[f] = static_cast<float>(normal[3] - depth + kCullSlack * (magnitude[3] + depth) + kCullTiny);
    frustum.length[f] = static_cast<float>(sqrt(normal[0] * normal[0] + normal[1] * normal[1] + normal[2] * normal[2]) *
                                           (1.0 + kCullSlack));
    frustum.slack[f] = static_cast<float>(kCullSlack * most + kCullTiny);
  }
  const double start = m[2][3];
  frustum.least = static_cast<float>(start - kCullSlack * fabs(start) - kCullTiny);
  if (!within) {  // or NaN
    for (int f = 0; f < 5; ++f) frustum.offset[f] = frustum.length[f] = bits_float(0x7f800000u);
    frustum.least = bits_float(0xff800000u);
  }
  return frustum;
}

MIRAGE_HD float magnitude_of(float value) { return bits_float(float_bits(value) & 0x7fffffffu); }

// A reach that overflowed, or may make a sum overflow, becomes infinite: then every test below passes the block.
MIRAGE_HD float limited_reach(float reach) { return reach <= kCullFar ? reach : bits_float(0x7f800000u); }

// An upper limit of |x| + |y| + |z| over the points of a box.
MIRAGE_HD float box_reach(const float* box) {
  float reach = 0.0f;
  for (int j = 0; j < 3; ++j) {
    const float low = magnitude_of(box[j]), high = magnitude_of(box[3 + j]);
    reach += low > high ? low : high;
  }
  return limited_reach(reach);
}

// Whether the view may see a point of the box: for each half-space, the corner farthest along its normal decides.
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

// Whether all points of a box lie farther than `depth` along the view's axis: the nearest corner decides.
MIRAGE_HD bool lies_beyond(const Frustum& frustum, float depth, const float* box) {
  float least = frustum.least - frustum.slack[0] * box_reach(box);
  for (int j = 0; j < 3; ++j) least += frustum.normal[0][j] * (frustum.normal[0][j] < 0.0f ? box[3 + j] : box[j]);
  return least > depth;
}

}  // namespace mirage

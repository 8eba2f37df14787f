// How well a token fits a cell, the maths of splat_aligned: reference.py says what each number is, in the same order of
// operations and with the same names.
#pragma once

#include "camera.h"
#include "depth_key.h"

namespace mirage {

constexpr int kFits = 4;  // tokens that a cell blends at most
constexpr float kReach = 0.75f;
constexpr float kWidest = 3.0f;
constexpr float kLargestRatio = 16.0f;
constexpr float kGate = 1.1f;
constexpr float kRayWeight = 16.0f;
constexpr int kHoleReach = 2;  // whole cells that kWidest * kReach spans to either side of a token's own

// The key of a fit is made like that of a depth: float bits of the score above, index below; the least fits best.
// Scores are small and not negative, so as int64 every key is below this one, which one byte repeated makes.
constexpr uint64_t kNoFit = 0x7f7f7f7f7f7f7f7full;

// A reading camera: float32 and nothing else, so that it can lie in a tensor.
struct Reader {
  Projection projection;
  float focal;
  float center[3];
};

struct Fit {
  float u, v, z;
  float radius;  // in cells: within it the token may close a hole
  float lack;    // what it lacks in any cell
};

MIRAGE_HD Reader make_reader(const double* intrinsics, const double* cam2world) {
  Reader reader;
  reader.projection = make_projection(intrinsics, cam2world);
  reader.focal = static_cast<float>(intrinsics[0]);
  for (int i = 0; i < 3; ++i) reader.center[i] = static_cast<float>(cam2world[i * 4 + 3]);
  return reader;
}

MIRAGE_HD float square_root(float value) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(value);
#else
  return __builtin_sqrtf(value);
#endif
}

// Ratio of footprint and cell size, within its limits; NaN falls to the least.
MIRAGE_HD float footprint_ratio(float footprint, float focal, float inverse) {
  const float ratio = (footprint * focal) * inverse;
  constexpr float kLeast = 1.0f / kLargestRatio;
  const float high = ratio < kLargestRatio ? ratio : kLargestRatio;
  return ratio > kLeast ? high : kLeast;
}

MIRAGE_HD float hole_radius(float ratio) {
  const float least = ratio > 1.0f ? ratio : 1.0f;
  return kReach * (least < kWidest ? least : kWidest);
}

MIRAGE_HD float dot(const float* a, const float* b) { return (a[0] * b[0] + a[1] * b[1]) + a[2] * b[2]; }

// 1 - cos of the angle between the rays of the writing and the reading camera; 0 where one of them is unknown.
MIRAGE_HD float ray_turn(const float* written, const float* read) {
  const float lengths = dot(written, written) * dot(read, read);
  const bool known = (lengths > 0.0f) & (lengths <= 3.402823466e+38f);
  const float turn = 1.0f - dot(written, read) / square_root(known ? lengths : 1.0f);
  return (known & (turn > 0.0f)) ? turn : 0.0f;
}

// point: x, y, z, footprint; writer: the writing camera's centre.
MIRAGE_HD Fit fit_token(const Reader& reader, float x, float y, float z, float footprint, const float* writer) {
  const Projection& p = reader.projection;
  const float depth = ((p.m[2][0] * x + p.m[2][1] * y) + p.m[2][2] * z) + p.m[2][3];
  const float a = ((p.m[0][0] * x + p.m[0][1] * y) + p.m[0][2] * z) + p.m[0][3];
  const float b = ((p.m[1][0] * x + p.m[1][1] * y) + p.m[1][2] * z) + p.m[1][3];
  const float inverse = 1.0f / depth;
  const float ratio = footprint_ratio(footprint, reader.focal, inverse);
  const float scale = ((ratio - 1.0f) * (ratio - 1.0f)) / ratio;
  const float written[3] = {x - writer[0], y - writer[1], z - writer[2]};
  const float read[3] = {x - reader.center[0], y - reader.center[1], z - reader.center[2]};
  return {a * inverse, b * inverse, depth, hole_radius(ratio), scale + kRayWeight * ray_turn(written, read)};
}

// Whether a token may reach a cell of the grid at all. False for NaN anywhere.
MIRAGE_HD bool around_view(float u, float v, float z, float near, float width, float height) {
  constexpr float kMargin = kHoleReach;
  return (z > near) & (z <= 3.402823466e+38f) & (u > -kMargin) & (u < width + kMargin) & (v > -kMargin) &
         (v < height + kMargin);
}

MIRAGE_HD float cell_distance(float u, float v, int column, int row) {
  const float dx = u - (static_cast<float>(column) + 0.5f);
  const float dy = v - (static_cast<float>(row) + 0.5f);
  return dx * dx + dy * dy;
}

// floor of a coordinate that around_view accepts.
MIRAGE_HD int floor_cell(float value) {
  const int truncated = static_cast<int>(value);
  return truncated - (static_cast<float>(truncated) > value ? 1 : 0);
}

// What a cell blends: tokens with a share that is not 0, best first. The loops have no exits, so that all of this stays in
// registers, or in one vector.
struct Blend {
  int count;
  uint32_t token[kFits];
  float score[kFits], share[kFits];
};

MIRAGE_HD float fit_base(float score, float best, float sharpness) {
  return 1.0f - (sharpness * (score - best)) * 0.125f;
}

MIRAGE_HD Blend make_blend(const int64_t* keys, float sharpness) {
  Blend blend;
  float weight[kFits], total = 0.0f;
  for (int k = 0; k < kFits; ++k) {
    const uint64_t key = static_cast<uint64_t>(keys[k]);
    const bool held = key != kNoFit;
    blend.token[k] = key_index(key);
    blend.score[k] = held ? key_depth(key) : 0.0f;
    // Infinite sharpness times 0 is NaN, which counts as 0 but for the best itself.
    const float base = k == 0 ? 1.0f : fit_base(blend.score[k], blend.score[0], sharpness);
    const float kept = (held & (base > 0.0f)) ? base : 0.0f;
    const float square = kept * kept, fourth = square * square;
    weight[k] = fourth * fourth;
    total = k == 0 ? weight[k] : total + weight[k];
  }
  const float divisor = total > 0.0f ? total : 1.0f;
  blend.count = 0;
  for (int k = 0; k < kFits; ++k) {
    blend.share[k] = weight[k] / divisor;
    blend.count += blend.share[k] > 0.0f ? 1 : 0;  // shares fall with k, so those come first
  }
  return blend;
}

// The gradients of a loss to the scores of a cell, from those to its shares: dots[k] is the inner product of the latents'
// gradient and the features of token k, 0 where there is no share.
MIRAGE_HD void fit_slopes(const Blend& blend, const float* dots, float sharpness, float* slopes) {
  float mean = 0.0f, best = 0.0f;
  for (int k = 0; k < kFits; ++k) mean += blend.share[k] * dots[k];
  for (int k = 1; k < kFits; ++k) {
    const float base = fit_base(blend.score[k], blend.score[0], sharpness);
    const float square = base * base, seventh = (square * square) * (square * base);
    // The weight of the best is 1, so that its share is one over the total.
    const float slope = -(sharpness * seventh) * ((dots[k] - mean) * blend.share[0]);
    slopes[k] = blend.share[k] > 0.0f ? slope : 0.0f;
    best -= slopes[k];
  }
  slopes[0] = best;
}

// Adds to `grad` (x, y, z, footprint) what a token's point gets in one view, given the sums over its cells of the slope
// times 2 (u - column centre), of the slope times 2 (v - row centre), and of the slope.
MIRAGE_HD void add_fit_gradient(const Reader& reader, const float* point, const float* writer, float slope_u,
                                float slope_v, float slope, float* grad) {
  const auto& m = reader.projection.m;
  const float x = point[0], y = point[1], z = point[2];
  const float depth = ((m[2][0] * x + m[2][1] * y) + m[2][2] * z) + m[2][3];
  const float a = ((m[0][0] * x + m[0][1] * y) + m[0][2] * z) + m[0][3];
  const float b = ((m[1][0] * x + m[1][1] * y) + m[1][2] * z) + m[1][3];
  const float inverse = 1.0f / depth, u = a * inverse, v = b * inverse;
  const float ratio = footprint_ratio(point[3], reader.focal, inverse);
  const bool limited = !(ratio > 1.0f / kLargestRatio) | !(ratio < kLargestRatio);
  const float slope_ratio = limited ? 0.0f : slope * (1.0f - 1.0f / (ratio * ratio));

  const float written[3] = {x - writer[0], y - writer[1], z - writer[2]};
  const float read[3] = {x - reader.center[0], y - reader.center[1], z - reader.center[2]};
  const bool turned = ray_turn(written, read) > 0.0f;
  const float written_2 = dot(written, written), read_2 = dot(read, read);
  const float norm = square_root(turned ? written_2 * read_2 : 1.0f), cosine = dot(written, read) / norm;
  for (int j = 0; j < 3; ++j) {
    grad[j] += (slope_u * (m[0][j] - u * m[2][j]) + slope_v * (m[1][j] - v * m[2][j])) * inverse;
    grad[j] -= slope_ratio * ((ratio * inverse) * m[2][j]);
    if (turned)
      grad[j] -= (slope * kRayWeight) *
                 ((written[j] + read[j]) / norm - cosine * (written[j] / written_2 + read[j] / read_2));
  }
  grad[3] += slope_ratio * (reader.focal * inverse);
}

}  // namespace mirage

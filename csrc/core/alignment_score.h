// How well a token is aligned with a cell of a view: the arithmetic of splat_aligned, in the order of operations of its
// Python definition. mirage_kernels/constants.py says what each number is.
#pragma once

#include "camera.h"
#include "constants.h"
#include "depth_key.h"

namespace mirage {

// A score's key is made like a depth's: float bits of the score above, token index below; the least key is the best
// token. Scores are small and not negative, so as int64 every key is below this one, which memset can write: it repeats
// one byte.
constexpr uint64_t kNoToken = 0x7f7f7f7f7f7f7f7full;

// The camera of a view that tokens are aligned with. It holds float32 only, so that it can lie in a tensor.
struct ViewCamera {
  Projection projection;
  float focal;
  float center[3];
};

struct Alignment {
  float u, v, z;
  float radius;      // in cells: within it the token may close a hole
  float score_bias;  // the part of the score that is the same in every cell: scale mismatch and direction penalty
};

MIRAGE_HD ViewCamera make_view_camera(const double* intrinsics, const double* cam2world) {
  ViewCamera camera;
  camera.projection = make_projection(intrinsics, cam2world);
  camera.focal = static_cast<float>(intrinsics[0]);
  for (int i = 0; i < 3; ++i) camera.center[i] = static_cast<float>(cam2world[i * 4 + 3]);
  return camera;
}

MIRAGE_HD float square_root(float value) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(value);
#else
  return __builtin_sqrtf(value);
#endif
}

// Ratio of footprint and cell size, clamped to its limits; NaN becomes the least.
MIRAGE_HD float footprint_ratio(float footprint, float focal, float inverse) {
  const float ratio = (footprint * focal) * inverse;
  constexpr float kLeast = 1.0f / kMaxFootprintRatio;
  const float high = ratio < kMaxFootprintRatio ? ratio : kMaxFootprintRatio;
  return ratio > kLeast ? high : kLeast;
}

MIRAGE_HD float hole_radius(float ratio) {
  const float least = ratio > 1.0f ? ratio : 1.0f;
  return kTokenReach * (least < kMaxFootprintCells ? least : kMaxFootprintCells);
}

MIRAGE_HD float dot(const float* a, const float* b) { return (a[0] * b[0] + a[1] * b[1]) + a[2] * b[2]; }

// 1 - cos of the angle between the rays from the writing camera and from the view's; 0 where one of them is unknown.
MIRAGE_HD float direction_penalty(const float* writer_ray, const float* view_ray) {
  const float lengths = dot(writer_ray, writer_ray) * dot(view_ray, view_ray);
  const bool known = (lengths > 0.0f) & (lengths <= 3.402823466e+38f);
  const float penalty = 1.0f - dot(writer_ray, view_ray) / square_root(known ? lengths : 1.0f);
  return (known & (penalty > 0.0f)) ? penalty : 0.0f;
}

// Where a token lies in a view and how well it matches the view's scale and direction. `writer_center` is the centre of
// the camera that wrote the token.
MIRAGE_HD Alignment align_token(const ViewCamera& camera, float x, float y, float z, float footprint,
                                const float* writer_center) {
  const Projection& p = camera.projection;
  const float depth = ((p.m[2][0] * x + p.m[2][1] * y) + p.m[2][2] * z) + p.m[2][3];
  const float a = ((p.m[0][0] * x + p.m[0][1] * y) + p.m[0][2] * z) + p.m[0][3];
  const float b = ((p.m[1][0] * x + p.m[1][1] * y) + p.m[1][2] * z) + p.m[1][3];
  const float inverse = 1.0f / depth;
  const float ratio = footprint_ratio(footprint, camera.focal, inverse);
  const float scale = ((ratio - 1.0f) * (ratio - 1.0f)) / ratio;
  const float writer_ray[3] = {x - writer_center[0], y - writer_center[1], z - writer_center[2]};
  const float view_ray[3] = {x - camera.center[0], y - camera.center[1], z - camera.center[2]};
  return {a * inverse, b * inverse, depth, hole_radius(ratio),
          scale + kDirectionWeight * direction_penalty(writer_ray, view_ray)};
}

// True if a token may reach a cell of the grid; false for NaN anywhere.
MIRAGE_HD bool around_view(float u, float v, float z, float near, float width, float height) {
  constexpr float kMargin = kHoleReachCells;
  return (z > near) & (z <= 3.402823466e+38f) & (u > -kMargin) & (u < width + kMargin) & (v > -kMargin) &
         (v < height + kMargin);
}

MIRAGE_HD float cell_distance(float u, float v, int column, int row) {
  const float dx = u - (static_cast<float>(column) + 0.5f);
  const float dy = v - (static_cast<float>(row) + 0.5f);
  return dx * dx + dy * dy;
}

// The floor of a coordinate that around_view accepts.
MIRAGE_HD int floor_cell(float value) {
  const int truncated = static_cast<int>(value);
  return truncated - (static_cast<float>(truncated) > value ? 1 : 0);
}

// The tokens that a cell blends, best first: those whose weight is not 0. The loops below have no early exit, so that a
// Blend stays in registers, or in one vector.
struct Blend {
  int count;
  uint32_t token[kBlendTokens];
  float score[kBlendTokens], weight[kBlendTokens];
};

MIRAGE_HD float weight_base(float score, float best, float sharpness) {
  return 1.0f - (sharpness * (score - best)) * 0.125f;
}

MIRAGE_HD Blend make_blend(const int64_t* keys, float sharpness) {
  Blend blend;
  float unnormalised[kBlendTokens], total = 0.0f;
  for (int k = 0; k < kBlendTokens; ++k) {
    const uint64_t key = static_cast<uint64_t>(keys[k]);
    const bool held = key != kNoToken;
    blend.token[k] = key_index(key);
    blend.score[k] = held ? key_depth(key) : 0.0f;
    // Infinite sharpness times 0 is NaN: such a token weighs 0, except the best one itself, whose base is 1.
    const float base = k == 0 ? 1.0f : weight_base(blend.score[k], blend.score[0], sharpness);
    const float kept = (held & (base > 0.0f)) ? base : 0.0f;
    const float square = kept * kept, fourth = square * square;
    unnormalised[k] = fourth * fourth;
    total = k == 0 ? unnormalised[k] : total + unnormalised[k];
  }
  const float divisor = total > 0.0f ? total : 1.0f;
  blend.count = 0;
  for (int k = 0; k < kBlendTokens; ++k) {
    blend.weight[k] = unnormalised[k] / divisor;
    blend.count += blend.weight[k] > 0.0f ? 1 : 0;  // weights fall with k, so these come first
  }
  return blend;
}

// Gradients of a loss with respect to the scores of a cell, from those with respect to its weights: dots[k] is the
// inner product of the latents' gradient and the features of token k, 0 where the token has no weight.
MIRAGE_HD void score_slopes(const Blend& blend, const float* dots, float sharpness, float* slopes) {
  float mean = 0.0f, best = 0.0f;
  for (int k = 0; k < kBlendTokens; ++k) mean += blend.weight[k] * dots[k];
  for (int k = 1; k < kBlendTokens; ++k) {
    const float base = weight_base(blend.score[k], blend.score[0], sharpness);
    const float square = base * base, seventh = (square * square) * (square * base);
    // Before normalisation the best token weighs 1, so its weight is one over the total.
    const float slope = -(sharpness * seventh) * ((dots[k] - mean) * blend.weight[0]);
    slopes[k] = blend.weight[k] > 0.0f ? slope : 0.0f;
    best -= slopes[k];
  }
  slopes[0] = best;
}

// Adds one view's gradient with respect to a token's point to `grad` (x, y, z, footprint), given the sums over its
// cells of slope * 2 (u - column centre), of slope * 2 (v - row centre), and of the slope.
MIRAGE_HD void add_alignment_gradient(const ViewCamera& camera, const float* point, const float* writer_center,
                                      float slope_u, float slope_v, float slope, float* grad) {
  const auto& m = camera.projection.m;
  const float x = point[0], y = point[1], z = point[2];
  const float depth = ((m[2][0] * x + m[2][1] * y) + m[2][2] * z) + m[2][3];
  const float a = ((m[0][0] * x + m[0][1] * y) + m[0][2] * z) + m[0][3];
  const float b = ((m[1][0] * x + m[1][1] * y) + m[1][2] * z) + m[1][3];
  const float inverse = 1.0f / depth, u = a * inverse, v = b * inverse;
  const float ratio = footprint_ratio(point[3], camera.focal, inverse);
  const bool limited = !(ratio > 1.0f / kMaxFootprintRatio) | !(ratio < kMaxFootprintRatio);
  const float slope_ratio = limited ? 0.0f : slope * (1.0f - 1.0f / (ratio * ratio));

  const float writer_ray[3] = {x - writer_center[0], y - writer_center[1], z - writer_center[2]};
  const float view_ray[3] = {x - camera.center[0], y - camera.center[1], z - camera.center[2]};
  const bool penalised = direction_penalty(writer_ray, view_ray) > 0.0f;
  const float writer_squared = dot(writer_ray, writer_ray), view_squared = dot(view_ray, view_ray);
  const float norm = square_root(penalised ? writer_squared * view_squared : 1.0f),
              cosine = dot(writer_ray, view_ray) / norm;
  for (int j = 0; j < 3; ++j) {
    grad[j] += (slope_u * (m[0][j] - u * m[2][j]) + slope_v * (m[1][j] - v * m[2][j])) * inverse;
    grad[j] -= slope_ratio * ((ratio * inverse) * m[2][j]);
    if (penalised)
      grad[j] -= (slope * kDirectionWeight) * ((writer_ray[j] + view_ray[j]) / norm -
                                               cosine * (writer_ray[j] / writer_squared + view_ray[j] / view_squared));
  }
  grad[3] += slope_ratio * (camera.focal * inverse);
}

}  // namespace mirage

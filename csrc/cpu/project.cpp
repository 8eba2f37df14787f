// Projection of blocks of points into views, shared by splat and view_overlap.
#include <cmath>
#include <limits>

#include "common.h"

namespace mirage::cpu {

namespace {

typedef float Lanes __attribute__((vector_size(8 * sizeof(float))));
constexpr int kLanes = 8;
static_assert(kGroup == 2 * kLanes);

#define MIRAGE_INLINE inline __attribute__((always_inline))

MIRAGE_INLINE Lanes load(const float* from) {
  Lanes lanes;
  __builtin_memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

// Written so that a NaN in `a` is passed over.
MIRAGE_INLINE Lanes lesser(Lanes a, Lanes b) { return a < b ? a : b; }
MIRAGE_INLINE Lanes greater(Lanes a, Lanes b) { return a > b ? a : b; }

template <typename F>
MIRAGE_INLINE float reduce(Lanes lanes, const F& f) {
  lanes = f(lanes, __builtin_shufflevector(lanes, lanes, 4, 5, 6, 7, 0, 1, 2, 3));
  lanes = f(lanes, __builtin_shufflevector(lanes, lanes, 2, 3, 0, 1, 6, 7, 4, 5));
  lanes = f(lanes, __builtin_shufflevector(lanes, lanes, 1, 0, 3, 2, 5, 4, 7, 6));
  return lanes[0];
}

struct Interval {
  float centre, half;
};

MIRAGE_INLINE Interval bounds(const float* values) {
  const Lanes infinity = Lanes{} + std::numeric_limits<float>::infinity();
  const Lanes a = load(values), b = load(values + kLanes);
  const float low = reduce(lesser(b, lesser(a, infinity)), [](Lanes x, Lanes y) { return lesser(x, y); });
  const float high = reduce(greater(b, greater(a, -infinity)), [](Lanes x, Lanes y) { return greater(x, y); });
  return {0.5f * (low + high), 0.5f * (high - low)};
}

// Eight points (x, y, z, footprint) to eight of each coordinate.
MIRAGE_INLINE void split_coordinates(const float* points, float* x, float* y, float* z) {
  const Lanes a = load(points), b = load(points + 8), c = load(points + 16), d = load(points + 24);
  const Lanes xy_ab = __builtin_shufflevector(a, b, 0, 4, 8, 12, 1, 5, 9, 13);
  const Lanes xy_cd = __builtin_shufflevector(c, d, 0, 4, 8, 12, 1, 5, 9, 13);
  const Lanes z_ab = __builtin_shufflevector(a, b, 2, 6, 10, 14, 2, 6, 10, 14);
  const Lanes z_cd = __builtin_shufflevector(c, d, 2, 6, 10, 14, 2, 6, 10, 14);
  const Lanes xs = __builtin_shufflevector(xy_ab, xy_cd, 0, 1, 2, 3, 8, 9, 10, 11);
  const Lanes ys = __builtin_shufflevector(xy_ab, xy_cd, 4, 5, 6, 7, 12, 13, 14, 15);
  const Lanes zs = __builtin_shufflevector(z_ab, z_cd, 0, 1, 2, 3, 8, 9, 10, 11);
  __builtin_memcpy(x, &xs, sizeof(xs));
  __builtin_memcpy(y, &ys, sizeof(ys));
  __builtin_memcpy(z, &zs, sizeof(zs));
}

}  // namespace

MIRAGE_SIMD
void load_block(const float* points, int count, PointBlock& block) {
  block.count = count;
  block.groups = (count + kGroup - 1) / kGroup;
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) split_coordinates(points + 4 * i, block.x + i, block.y + i, block.z + i);
  for (; i < block.groups * kGroup; ++i) {
    const bool real = i < count;
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    block.x[i] = real ? points[4 * i] : kNan;
    block.y[i] = real ? points[4 * i + 1] : kNan;
    block.z[i] = real ? points[4 * i + 2] : kNan;
  }
  // NaN coordinates are passed over. A group of nothing else, or with an infinite coordinate, gets bounds that are NaN
  // or infinite and cull nothing.
  for (int g = 0; g < block.groups; ++g) {
    const Interval x = bounds(block.x + g * kGroup), y = bounds(block.y + g * kGroup), z = bounds(block.z + g * kGroup);
    block.centre_x[g] = x.centre;
    block.centre_y[g] = y.centre;
    block.centre_z[g] = z.centre;
    block.radius[g] = std::sqrt((x.half * x.half + y.half * y.half) + z.half * z.half);
    block.reach[g] = ((std::fabs(x.centre) + std::fabs(y.centre)) + std::fabs(z.centre)) + ((x.half + y.half) + z.half);
  }
}

// z > near, u >= -margin, u < width + margin, and v likewise, each multiplied by z > 0. Float arithmetic of the
// projection and of this test errs by a few 2^-24 of the terms' magnitudes; a slack of 1e-5 of them (168 x 2^-24) covers
// both.
Frustum make_frustum(const Projection& projection, float near, int width, int height, int margin) {
  const auto& m = projection.m;
  const double w = width + margin, h = height + margin, low = margin;
  Frustum frustum;
  for (int f = 0; f < 5; ++f) {
    double normal[4], magnitude[4];
    for (int j = 0; j < 4; ++j) {
      const double a = m[0][j], b = m[1][j], z = m[2][j];
      const double value[5] = {z, a + low * z, w * z - a, b + low * z, h * z - b};
      const double size[5] = {std::fabs(z), low * std::fabs(z) + std::fabs(a), w * std::fabs(z) + std::fabs(a),
                              low * std::fabs(z) + std::fabs(b), h * std::fabs(z) + std::fabs(b)};
      normal[j] = value[f];
      magnitude[j] = size[f];
    }
    constexpr double kSlack = 1e-5;
    for (int j = 0; j < 3; ++j) frustum.normal[f][j] = static_cast<float>(normal[j]);
    const double depth = f == 0 ? near : 0.0;
    frustum.offset[f] = static_cast<float>(normal[3] - depth + kSlack * (magnitude[3] + depth) + 1e-30);
    frustum.length[f] = static_cast<float>(
        std::sqrt(normal[0] * normal[0] + normal[1] * normal[1] + normal[2] * normal[2]) * (1.0 + kSlack));
    frustum.slack[f] = static_cast<float>(kSlack * std::max({magnitude[0], magnitude[1], magnitude[2]}));
  }
  return frustum;
}

MIRAGE_SIMD
int visible_groups(const GroupBounds& block, const Frustum& frustum_, int32_t* groups) {
  const Frustum frustum = frustum_;
  alignas(64) int32_t outside[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    int32_t out = 0;
    for (int f = 0; f < 5; ++f) {
      const float bound = frustum.normal[f][0] * block.centre_x[g] + frustum.normal[f][1] * block.centre_y[g] +
                          frustum.normal[f][2] * block.centre_z[g] + frustum.offset[f] +
                          frustum.length[f] * block.radius[g] + frustum.slack[f] * block.reach[g];
      out |= bound < 0.0f;
    }
    outside[g] = out;
  }
  int count = 0;
  for (int g = 0; g < block.groups; ++g) {
    groups[count] = g;
    count += outside[g] == 0;
  }
  return count;
}

MIRAGE_SIMD
void project_groups(const PointBlock& block, const int32_t* groups, int count, const Projection& projection, float near,
                    int width, int height, int32_t* __restrict__ cell, float* __restrict__ depth) {
  const Projection p = projection;
  const float limit_u = static_cast<float>(width), limit_v = static_cast<float>(height);
  for (int k = 0; k < count; ++k, cell += kGroup, depth += kGroup) {
    const int first = groups[k] * kGroup;
    for (int i = 0; i < kGroup; ++i) {
      const Projected q = project_point(p, block.x[first + i], block.y[first + i], block.z[first + i]);
      const bool visible = in_view(q, near, limit_u, limit_v);
      // Selected before the conversion: a float outside the int range must not be converted.
      const int32_t column = static_cast<int32_t>(visible ? q.u : 0.0f);
      const int32_t row = static_cast<int32_t>(visible ? q.v : 0.0f);
      cell[i] = visible ? row * width + column : -1;
      depth[i] = q.z;
    }
  }
}

}  // namespace mirage::cpu

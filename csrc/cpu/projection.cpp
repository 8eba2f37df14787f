// Groups of points and their bounding spheres; which of them a view may see, and in which cells their points lie.
//
// In: points (N, 4), numbers of blocks, projections. Out: batches of points; listed groups; cells and depths.
#include "projection.h"

#include <cmath>
#include <limits>

namespace mirage::cpu {

namespace {

static_assert(kGroup == 2 * kLanes);

// Written so that a NaN in `a` is ignored.
MIRAGE_INLINE FloatLanes lesser(FloatLanes a, FloatLanes b) { return a < b ? a : b; }
MIRAGE_INLINE FloatLanes greater(FloatLanes a, FloatLanes b) { return a > b ? a : b; }

struct Interval {
  float centre, half;
};

MIRAGE_INLINE Interval bounds(const float* values) {
  const FloatLanes infinity = FloatLanes{} + std::numeric_limits<float>::infinity();
  const FloatLanes a = load(values), b = load(values + kLanes);
  const float low = reduce(lesser(b, lesser(a, infinity)), [](FloatLanes x, FloatLanes y) { return lesser(x, y); });
  const float high =
      reduce(greater(b, greater(a, -infinity)), [](FloatLanes x, FloatLanes y) { return greater(x, y); });
  return {0.5f * (low + high), 0.5f * (high - low)};
}

// Splits eight points (x, y, z, footprint) into eight values of each coordinate.
MIRAGE_INLINE void split_coordinates(const float* points, float* x, float* y, float* z) {
  const FloatLanes a = load(points), b = load(points + 8), c = load(points + 16), d = load(points + 24);
  const FloatLanes xy_ab = __builtin_shufflevector(a, b, 0, 4, 8, 12, 1, 5, 9, 13);
  const FloatLanes xy_cd = __builtin_shufflevector(c, d, 0, 4, 8, 12, 1, 5, 9, 13);
  const FloatLanes z_ab = __builtin_shufflevector(a, b, 2, 6, 10, 14, 2, 6, 10, 14);
  const FloatLanes z_cd = __builtin_shufflevector(c, d, 2, 6, 10, 14, 2, 6, 10, 14);
  const FloatLanes xs = __builtin_shufflevector(xy_ab, xy_cd, 0, 1, 2, 3, 8, 9, 10, 11);
  const FloatLanes ys = __builtin_shufflevector(xy_ab, xy_cd, 4, 5, 6, 7, 12, 13, 14, 15);
  const FloatLanes zs = __builtin_shufflevector(z_ab, z_cd, 0, 1, 2, 3, 8, 9, 10, 11);
  __builtin_memcpy(x, &xs, sizeof(xs));
  __builtin_memcpy(y, &ys, sizeof(ys));
  __builtin_memcpy(z, &zs, sizeof(zs));
}

}  // namespace

MIRAGE_SIMD
void load_blocks(const float* points, index_t count, const uint32_t* blocks, index_t number, PointBatch& batch) {
  batch.groups = 0;
  for (index_t k = 0; k < number; ++k) {
    const index_t first = index_t{blocks[k]} * kBlockTokens;
    const int here = static_cast<int>(std::min<index_t>(kBlockTokens, count - first));
    const int groups = (here + kGroup - 1) / kGroup;
    const float* from = points + 4 * first;
    float *x = batch.x + k * kBlockTokens, *y = batch.y + k * kBlockTokens, *z = batch.z + k * kBlockTokens;
    int i = 0;
    for (; i + kLanes <= here; i += kLanes) split_coordinates(from + 4 * i, x + i, y + i, z + i);
    for (; i < groups * kGroup; ++i) {
      const bool real = i < here;
      constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
      x[i] = real ? from[4 * i] : kNan;
      y[i] = real ? from[4 * i + 1] : kNan;
      z[i] = real ? from[4 * i + 2] : kNan;
    }
    batch.first[k] = static_cast<uint32_t>(first);
    batch.groups += groups;  // all but the last block are full
  }
  // NaN coordinates are ignored. A group of nothing but NaN, or with an infinite coordinate, gets bounds that are NaN
  // or infinite and cull nothing.
  for (int g = 0; g < batch.groups; ++g) {
    const Interval x = bounds(batch.x + g * kGroup), y = bounds(batch.y + g * kGroup), z = bounds(batch.z + g * kGroup);
    batch.centre_x[g] = x.centre;
    batch.centre_y[g] = y.centre;
    batch.centre_z[g] = z.centre;
    batch.radius[g] = std::sqrt((x.half * x.half + y.half * y.half) + z.half * z.half);
    batch.reach[g] = limited_reach(((std::fabs(x.centre) + std::fabs(y.centre)) + std::fabs(z.centre)) +
                                   ((x.half + y.half) + z.half));
  }
}

MIRAGE_SIMD
int visible_groups(const GroupBounds& bounds, const Frustum& frustum_, int32_t* groups) {
  const Frustum frustum = frustum_;
  alignas(64) int32_t outside[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    int32_t out = 0;
    for (int f = 0; f < 5; ++f) {
      const float bound = frustum.normal[f][0] * bounds.centre_x[g] + frustum.normal[f][1] * bounds.centre_y[g] +
                          frustum.normal[f][2] * bounds.centre_z[g] + frustum.offset[f] +
                          frustum.length[f] * bounds.radius[g] + frustum.slack[f] * bounds.reach[g];
      out |= bound < 0.0f;
    }
    outside[g] = out;
  }
  int count = 0;
  for (int g = 0; g < bounds.groups; ++g) {
    groups[count] = g;
    count += outside[g] == 0;
  }
  return count;
}

MIRAGE_SIMD
void project_groups(const PointBatch& batch, const int32_t* groups, int count, const Projection& projection, float near,
                    int width, int height, int32_t* __restrict__ cell, float* __restrict__ depth) {
  const Projection p = projection;
  const float limit_u = static_cast<float>(width), limit_v = static_cast<float>(height);
  for (int k = 0; k < count; ++k, cell += kGroup, depth += kGroup) {
    const int first = groups[k] * kGroup;
    for (int i = 0; i < kGroup; ++i) {
      const Projected q = project_point(p, batch.x[first + i], batch.y[first + i], batch.z[first + i]);
      const bool visible = in_view(q, near, limit_u, limit_v);
      // Selected before the conversion: converting a float outside the range of int is undefined.
      const int32_t column = static_cast<int32_t>(visible ? q.u : 0.0f);
      const int32_t row = static_cast<int32_t>(visible ? q.v : 0.0f);
      cell[i] = visible ? row * width + column : -1;
      depth[i] = q.z;
    }
  }
}

}  // namespace mirage::cpu

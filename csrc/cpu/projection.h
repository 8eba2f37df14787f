// Projects blocks of points into views, for splat and view_overlap; the bounding spheres of their groups also serve
// splat_aligned.
#pragma once

#include "../core/frustum.h"
#include "common.h"

namespace mirage::cpu {

inline std::vector<Projection> make_projections(const Tensor& intrinsics, const Tensor& cam2world) {
  const double* k = input<double>(intrinsics);
  const double* pose = input<double>(cam2world);
  std::vector<Projection> projections(intrinsics.size(0));
  for (size_t t = 0; t < projections.size(); ++t) projections[t] = make_projection(k + t * 9, pose + t * 16);
  return projections;
}

// Points of a few blocks, one array per coordinate, so that the loop over views is pure vector arithmetic; and a
// bounding sphere for every group of consecutive points. Tokens are written row by row of a frame, so a group is a
// short strip of surface: most groups are outside most views, and one test of the sphere saves kGroup projections.
constexpr int kGroup = 16;
constexpr int kBlocks = 4;  // loaded at once
constexpr int kBatch = kBlocks * kBlockTokens;
constexpr int kGroups = kBatch / kGroup;

struct GroupBounds {
  alignas(64) float centre_x[kGroups], centre_y[kGroups], centre_z[kGroups], radius[kGroups], reach[kGroups];
  int groups;
  uint32_t first[kBlocks];  // first rows of the blocks

  uint32_t row(int group) const {
    return first[group / (kBlockTokens / kGroup)] + group % (kBlockTokens / kGroup) * kGroup;
  }
};

struct PointBatch : GroupBounds {
  alignas(64) float x[kBatch], y[kBatch], z[kBatch];
};

// Loads `number` blocks of the first `count` points, in order. Points past `count` are NaN, which no view sees.
void load_blocks(const float* points, index_t count, const uint32_t* blocks, index_t number, PointBatch& batch);

// Lists the groups that the view may see, in order; never leaves out a group with a point in view.
int visible_groups(const GroupBounds& bounds, const Frustum& frustum, int32_t* groups);

// For point i of the k-th listed group: cell[k * kGroup + i] = row * width + column, or -1 if out of view, and its z.
void project_groups(const PointBatch& batch, const int32_t* groups, int count, const Projection& projection, float near,
                    int width, int height, int32_t* cell, float* depth);

}  // namespace mirage::cpu

// Camera maths of every backend: OpenCV axes, pixel coordinates continuous (column j covers [j, j + 1)).
//
// Matrices are composed in float64 and rounded once to float32; per-point work is float32, one operation at a time in
// the order written here. With contraction off (-ffp-contract=off, -fmad=false) this equals mirage_kernels/geometry.py
// bit for bit.
#pragma once

#include "macros.h"

namespace mirage {

// From the world to the grid of a view: (a, b, z) = M (x, y, z, 1), u = a / z, v = b / z in cells.
struct Projection {
  float m[3][4];
};

// From the token grid to the world: x_cam = ((j + 0.5) - cx) / fx * z, world = R x_cam + t.
struct Lift {
  float rotation[3][3];
  float translation[3];
  float fx, fy, cx, cy;
};

struct LiftedToken {
  float x, y, z, footprint;
};

struct Projected {
  float u, v, z;
};

// intrinsics (3, 3), in cells of the grid, and cam2world (4, 4) are row-major float64.
//
// The inverse is that of a general affine matrix, by cofactors: real poses are rotations only up to 4e-4, so a
// transpose would move points.
MIRAGE_HD Projection make_projection(const double* intrinsics, const double* cam2world) {
  const double a00 = cam2world[0], a01 = cam2world[1], a02 = cam2world[2], t0 = cam2world[3];
  const double a10 = cam2world[4], a11 = cam2world[5], a12 = cam2world[6], t1 = cam2world[7];
  const double a20 = cam2world[8], a21 = cam2world[9], a22 = cam2world[10], t2 = cam2world[11];

  const double c00 = a11 * a22 - a12 * a21;
  const double c01 = a02 * a21 - a01 * a22;
  const double c02 = a01 * a12 - a02 * a11;
  const double c10 = a12 * a20 - a10 * a22;
  const double c11 = a00 * a22 - a02 * a20;
  const double c12 = a02 * a10 - a00 * a12;
  const double c20 = a10 * a21 - a11 * a20;
  const double c21 = a01 * a20 - a00 * a21;
  const double c22 = a00 * a11 - a01 * a10;
  const double det = (a00 * c00 + a01 * c10) + a02 * c20;

  const double r[3][3] = {
      {c00 / det, c01 / det, c02 / det}, {c10 / det, c11 / det, c12 / det}, {c20 / det, c21 / det, c22 / det}};
  const double fx = intrinsics[0], cx = intrinsics[2], fy = intrinsics[4], cy = intrinsics[5];

  Projection projection;
  double row[3][4];
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) row[i][j] = r[i][j];
    row[i][3] = -((r[i][0] * t0 + r[i][1] * t1) + r[i][2] * t2);
  }
  for (int j = 0; j < 4; ++j) {
    projection.m[0][j] = static_cast<float>(fx * row[0][j] + cx * row[2][j]);
    projection.m[1][j] = static_cast<float>(fy * row[1][j] + cy * row[2][j]);
    projection.m[2][j] = static_cast<float>(row[2][j]);
  }
  return projection;
}

// intrinsics are in pixels of the depth map (depth_height, depth_width) and are scaled to the token grid (height,
// width).
MIRAGE_HD Lift make_lift(const double* intrinsics, const double* cam2world, index_t depth_height, index_t depth_width,
                         index_t height, index_t width) {
  const double sy = static_cast<double>(height) / static_cast<double>(depth_height);
  const double sx = static_cast<double>(width) / static_cast<double>(depth_width);
  Lift lift;
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) lift.rotation[i][j] = static_cast<float>(cam2world[i * 4 + j]);
    lift.translation[i] = static_cast<float>(cam2world[i * 4 + 3]);
  }
  lift.fx = static_cast<float>(intrinsics[0] * sx);
  lift.fy = static_cast<float>(intrinsics[4] * sy);
  lift.cx = static_cast<float>(intrinsics[2] * sx);
  lift.cy = static_cast<float>(intrinsics[5] * sy);
  return lift;
}

MIRAGE_HD LiftedToken lift_token(const Lift& lift, int row, int column, float depth) {
  const float x = ((static_cast<float>(column) + 0.5f) - lift.cx) / lift.fx * depth;
  const float y = ((static_cast<float>(row) + 0.5f) - lift.cy) / lift.fy * depth;
  LiftedToken token;
  token.x = ((lift.rotation[0][0] * x + lift.rotation[0][1] * y) + lift.rotation[0][2] * depth) + lift.translation[0];
  token.y = ((lift.rotation[1][0] * x + lift.rotation[1][1] * y) + lift.rotation[1][2] * depth) + lift.translation[1];
  token.z = ((lift.rotation[2][0] * x + lift.rotation[2][1] * y) + lift.rotation[2][2] * depth) + lift.translation[2];
  token.footprint = depth / lift.fx;
  return token;
}

// One division per point: u and v share the reciprocal.
MIRAGE_HD Projected project_point(const Projection& p, float x, float y, float z) {
  const float depth = ((p.m[2][0] * x + p.m[2][1] * y) + p.m[2][2] * z) + p.m[2][3];
  const float a = ((p.m[0][0] * x + p.m[0][1] * y) + p.m[0][2] * z) + p.m[0][3];
  const float b = ((p.m[1][0] * x + p.m[1][1] * y) + p.m[1][2] * z) + p.m[1][3];
  const float inverse = 1.0f / depth;
  return {a * inverse, b * inverse, depth};
}

// False for NaN anywhere, as every comparison with NaN fails. Bitwise & has no branch, so a loop of it vectorises.
MIRAGE_HD bool in_view(const Projected& p, float near, float width, float height) {
  return (p.z > near) & (p.z <= 3.402823466e+38f) & (p.u >= 0.0f) & (p.u < width) & (p.v >= 0.0f) & (p.v < height);
}

// First pixel row (column) of token row (column) i: pixel r belongs to floor((r + 0.5) h / H), so r begins at
// ceil(i H / h - 0.5).
MIRAGE_HD index_t cell_begin(index_t i, index_t cells, index_t pixels) {
  return (2 * i * pixels + cells - 1) / (2 * cells);
}

}  // namespace mirage

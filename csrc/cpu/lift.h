// Lifts a depth map to tokens, one token row at a time: shared by back_project, cache_write and bounded_write.
#pragma once

#include "../core/camera.h"
#include "common.h"

namespace mirage::cpu {

struct DepthSource {
  const float* depth;  // (T, H, W)
  index_t depth_height, depth_width;
  const bool* mask;  // (T, H', W') or null
  index_t mask_height, mask_width;
  index_t height, width;  // token grid
  bool bilinear;
};

// Half-pixel source position without antialiasing; the weight is rounded once, as in the Python definition.
struct Tap {
  index_t low, high;
  float weight_low, weight_high;
};

// What every row of tokens needs to know about the columns, made once per call.
struct CellColumns {
  std::vector<index_t> depth_begin, mask_begin;
  std::vector<Tap> taps;
};

CellColumns make_columns(const DepthSource& source);

// Computes the token depths of row i of view t, 0 where unknown.
void token_row_depth(const DepthSource& source, const CellColumns& columns, index_t t, index_t i,
                     std::vector<int32_t>& cell, float* depth);

// Sets is_static[j] if all mask pixels of token (i, j) are set.
void token_row_mask(const DepthSource& source, const CellColumns& columns, index_t t, index_t i, bool* is_static);

// Computes position and footprint of each token of row i.
void lift_row(const Lift& lift, index_t i, index_t width, const float* depth, LiftedToken* tokens);

// Collects the plain pointers and sizes of the arguments.
DepthSource make_source(const Tensor& depth, const std::optional<Tensor>& mask, index_t height, index_t width,
                        bool bilinear);

std::vector<Lift> make_lifts(const Tensor& intrinsics, const Tensor& cam2world, const DepthSource& source);

}  // namespace mirage::cpu

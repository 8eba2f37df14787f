// back_project on the CPU: one pass over the depth map, token row by token row.
//
// In: depth (T, H, W), cameras, mask. Out: points (T, h, w, 4), 0 where not valid, and valid (T, h, w).
#include "lift.h"

namespace mirage::cpu {

std::tuple<Tensor, Tensor> back_project(const Tensor& depth_, const Tensor& intrinsics_, const Tensor& cam2world_,
                                        const std::optional<Tensor>& mask_, int64_t height, int64_t width,
                                        bool bilinear) {
  const Tensor depth = checked(depth_, ScalarType::Float, "depth");
  const Tensor intrinsics = checked(intrinsics_, ScalarType::Double, "intrinsics");
  const Tensor cam2world = checked(cam2world_, ScalarType::Double, "cam2world");
  std::optional<Tensor> mask;
  if (mask_.has_value()) mask = checked(*mask_, ScalarType::Bool, "mask");
  const DepthSource source = make_source(depth, mask, height, width, bilinear);
  const index_t views = depth.size(0);

  Tensor points = new_tensor({views, height, width, 4}, ScalarType::Float);
  Tensor valid = new_tensor({views, height, width}, ScalarType::Bool);
  LiftedToken* tokens = output<LiftedToken>(points);
  bool* keep = output<bool>(valid);
  const std::vector<Lift> lifts = make_lifts(intrinsics, cam2world, source);
  const CellColumns columns = make_columns(source);
  torch::stable::parallel_for(0, views * height, 1, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> cell;
    std::vector<float> z(width);
    for (int64_t row = begin; row < end; ++row) {
      const index_t t = row / height, i = row % height;
      bool* is_static = keep + row * width;
      LiftedToken* lifted = tokens + row * width;
      token_row_depth(source, columns, t, i, cell, z.data());
      token_row_mask(source, columns, t, i, is_static);
      lift_row(lifts[t], i, width, z.data(), lifted);
      for (index_t j = 0; j < width; ++j) {
        const LiftedToken& p = lifted[j];
        is_static[j] =
            is_static[j] && z[j] > 0.0f && is_finite(p.x) && is_finite(p.y) && is_finite(p.z) && is_finite(p.footprint);
        if (!is_static[j]) lifted[j] = {0.0f, 0.0f, 0.0f, 0.0f};
      }
    }
  });
  return {points, valid};
}

}  // namespace mirage::cpu

STABLE_TORCH_LIBRARY_IMPL(mirage, CPU, m) { m.impl("back_project_compiled", TORCH_BOX(&mirage::cpu::back_project)); }

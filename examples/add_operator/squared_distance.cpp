// squared_distance on the CPU.
//
// In: points (N, 4), center (3,). Out: (N,), 0 past the live rows.
#include "cpu/common.h"

namespace mirage::cpu {

Tensor squared_distance(const Tensor& points_, const Tensor& center_, const std::optional<Tensor>& num_points) {
  const Tensor points = checked(points_, ScalarType::Float, "points");
  const Tensor center = checked(center_, ScalarType::Float, "center");
  const index_t total = points.size(0), live = live_points(num_points, total);
  Tensor distances = new_tensor({total}, ScalarType::Float);
  const float *p = input<float>(points), *c = input<float>(center);
  float* out = output<float>(distances);
  torch::stable::parallel_for(0, total, 4096, [&](int64_t begin, int64_t end) {
    for (index_t i = begin; i < end; ++i) {
      const float dx = p[4 * i] - c[0], dy = p[4 * i + 1] - c[1], dz = p[4 * i + 2] - c[2];
      out[i] = i < live ? (dx * dx + dy * dy) + dz * dz : 0.0f;
    }
  });
  return distances;
}

}  // namespace mirage::cpu

STABLE_TORCH_LIBRARY_IMPL(mirage, CPU, m) {
  m.impl("squared_distance_compiled", TORCH_BOX(&mirage::cpu::squared_distance));
}

// block_bounds on the CPU: the boxes of blocks of tokens and of tiles of blocks.
//
// In: points (N, 4). In place: bounds (B + ceil(B / 64), 6) with B = ceil(N / 256), least and greatest x, y, z of the
// live points that are finite.
#include "culling.h"

namespace mirage::cpu {

void block_bounds(const Tensor& points_, const std::optional<Tensor>& num_points, Tensor bounds) {
  const Tensor points = checked(points_, ScalarType::Float, "points");
  check_bounds(bounds, points.size(0));
  update_bounds(input<float>(points), live_points(num_points, points.size(0)), 0,
                divide_up(points.size(0), kBlockTokens), nullptr, points.size(0), output<float>(bounds));
}

}  // namespace mirage::cpu

STABLE_TORCH_LIBRARY_IMPL(mirage, CPU, m) { m.impl("block_bounds_compiled", TORCH_BOX(&mirage::cpu::block_bounds)); }

// block_bounds on CUDA: the boxes of blocks of tokens and of tiles of blocks.
//
// In: points (N, 4). In place: bounds (B + ceil(B / 64), 6) with B = ceil(N / 256), least and greatest x, y, z of
// the live points that are finite.
#include "block_boxes.cuh"

namespace mirage::cuda {

void block_bounds(const Tensor& points_, const std::optional<Tensor>& num_points, Tensor bounds) {
  const torch::stable::accelerator::DeviceGuard guard(points_.get_device_index());
  const Tensor points = checked_points(points_);
  check_bounds(bounds, points.size(0));
  update_bounds(points, count_pointer(num_points), nullptr, bounds, current_stream(points));
}

}  // namespace mirage::cuda

STABLE_TORCH_LIBRARY_IMPL(mirage, CUDA, m) { m.impl("block_bounds_compiled", TORCH_BOX(&mirage::cuda::block_bounds)); }

// splat on the CPU: a private z-buffer per slice of points; the readout merges them.
//
// In: points (N, 4), features (N, C), cameras of T views. Out: latents (T, C, h, w), mask, depth, index (T, h, w).
#include "../core/depth_key.h"
#include "culling.h"
#include "feature_rows.h"
#include "projection.h"
#include "transpose.h"

namespace mirage::cpu {
namespace {

constexpr index_t kMaxKeyBytes = index_t{256} << 20;

struct Grid {
  index_t views, cells;
  int height, width;
};

// Finds the nearest point per cell over blocks [begin, end) for views [first, last); keys is (views, cells) of this
// slice.
void fill_keys(const float* points, index_t count, const VisibleBlocks& blocks, index_t begin, index_t end,
               const Projection* projections, const Frustum* frusta, index_t first, index_t last, const Grid& grid,
               float near, uint64_t* keys) {
  PointBatch batch{};
  int32_t groups[kGroups];
  alignas(64) int32_t cell[kBatch];
  alignas(64) float depth[kBatch];
  std::fill(keys + first * grid.cells, keys + last * grid.cells, kEmptyKey);
  for (index_t b = begin; b < end; b += kBlocks) {
    const index_t number = std::min<index_t>(kBlocks, end - b);
    load_blocks(points, count, blocks.from(b), number, batch);
    for (index_t t = first; t < last; ++t) {
      if (!blocks.by(t, b, b + number)) continue;
      const int visible = visible_groups(batch, frusta[t], groups);
      project_groups(batch, groups, visible, projections[t], near, grid.width, grid.height, cell, depth);
      uint64_t* view = keys + t * grid.cells;
      for (int k = 0; k < visible; ++k) {
        const uint32_t index = batch.row(groups[k]);
        for (int i = 0; i < kGroup; ++i) {
          const int32_t at = cell[k * kGroup + i];
          if (at < 0) continue;
          // Stored in either case: which of two tokens is nearer is random, so a branch would be mispredicted.
          const uint64_t key = make_key(depth[k * kGroup + i], index + i);
          view[at] = std::min(key, view[at]);
        }
      }
    }
  }
}

struct ReadoutTargets {
  const uint64_t* keys;
  index_t slices;
  bool* mask;
  float* depth;
  int64_t* index;
};

// Merges the slices' keys of `count` cells, beginning with `first`, and writes mask, depth and index.
MIRAGE_SIMD
void resolve_cells(const ReadoutTargets& r, index_t all, index_t first, int count) {
  uint64_t nearest[kTile];
  const uint64_t* keys = r.keys + first;
  for (int k = 0; k < count; ++k) nearest[k] = keys[k];
  for (index_t s = 1; s < r.slices; ++s) {
    keys += all;
    for (int k = 0; k < count; ++k) nearest[k] = keys[k] < nearest[k] ? keys[k] : nearest[k];
  }
  bool* __restrict__ mask = r.mask + first;
  float* __restrict__ depth = r.depth + first;
  int64_t* __restrict__ index = r.index + first;
  for (int k = 0; k < count; ++k) {
    const bool seen = nearest[k] != kEmptyKey;
    mask[k] = seen;
    depth[k] = bits_float(seen ? static_cast<uint32_t>(nearest[k] >> 32) : 0u);
    index[k] = seen ? static_cast<int64_t>(nearest[k] & 0xffffffffu) : -1;
  }
}

template <typename In, typename Out>
void write_readout(const ReadoutTargets& r, const Grid& grid, const FeatureRows<In>& features, Out* latents) {
  const index_t tiles = divide_up(grid.cells, kTile), all = grid.views * grid.cells, channels = features.channels;
  const std::vector<In> zeros(channels);
  torch::stable::parallel_for(0, grid.views * tiles, 16, [&](int64_t begin, int64_t end) {
    std::vector<Out> converted(std::is_same_v<In, Out> ? 0 : kTile * channels);
    // Winners are resolved one tile ahead, so that their rows are being prefetched while this tile is transposed.
    const In* rows[2][kTile];
    const auto resolve = [&](int64_t task) {
      const index_t t = task / tiles, first = task % tiles * kTile, at = t * grid.cells + first;
      const int count = static_cast<int>(std::min<index_t>(kTile, grid.cells - first));
      resolve_cells(r, all, at, count);
      const int64_t* winners = r.index + at;
      const In** to = rows[task % 2];
      for (int k = 0; k < count; ++k) {
        to[k] = winners[k] < 0 ? zeros.data() : features.row(winners[k]);
        if (winners[k] >= 0) features.prefetch(winners[k]);
      }
      return count;
    };
    int count = resolve(begin);
    for (int64_t task = begin; task < end; ++task) {
      const int next = task + 1 < end ? resolve(task + 1) : 0;
      const index_t t = task / tiles, first = task % tiles * kTile;
      Out* out = latents + t * channels * grid.cells + first;
      if constexpr (std::is_same_v<In, Out>) {
        transpose_tile(rows[task % 2], count, channels, out, grid.cells);
      } else {
        const Out* converted_rows[kTile];
        const int64_t* winners = r.index + t * grid.cells + first;
        for (int k = 0; k < count; ++k) {
          Out* row = converted.data() + k * channels;
          const uint8_t scale = winners[k] < 0 ? kMinScale : features.scale(winners[k]);
          load_row(rows[task % 2][k], scale, channels, row);
          converted_rows[k] = row;
        }
        transpose_tile(converted_rows, count, channels, out, grid.cells);
      }
      count = next;
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> splat(const Tensor& points_, const Tensor& features_,
                                                 const std::optional<Tensor>& num_points, const Tensor& intrinsics_,
                                                 const Tensor& cam2world_, int64_t height, int64_t width, double near,
                                                 ScalarType dtype, const std::optional<Tensor>& bounds,
                                                 const std::optional<Tensor>& scales) {
  const Tensor points = checked(points_, ScalarType::Float, "points");
  const Tensor features = as_contiguous(features_);
  const Tensor intrinsics = checked(intrinsics_, ScalarType::Double, "intrinsics");
  const Tensor cam2world = checked(cam2world_, ScalarType::Double, "cam2world");
  const index_t channels = features.size(1);
  const Grid grid{cam2world.size(0), height * width, static_cast<int>(height), static_cast<int>(width)};
  const index_t count = live_points(num_points, points.size(0));
  const std::vector<Projection> projections = make_projections(intrinsics, cam2world);
  std::vector<Frustum> frusta;
  for (const Projection& p : projections)
    frusta.push_back(make_frustum(p, static_cast<float>(near), grid.width, grid.height, 0));

  Tensor latents = new_tensor({grid.views, channels, height, width}, dtype);
  Tensor mask = new_tensor({grid.views, height, width}, ScalarType::Bool);
  Tensor depth = new_tensor({grid.views, height, width}, ScalarType::Float);
  Tensor index = new_tensor({grid.views, height, width}, ScalarType::Long);
  const index_t all = grid.views * grid.cells;
  if (all == 0) return {latents, mask, depth, index};

  // Work is divided by blocks first: every slice has keys of its own, merged by minimum. It is divided by views where
  // those keys would take too much memory or there are few points. The minimum is the same however it is divided.
  const VisibleBlocks blocks(bounds, points.size(0), count, frusta);
  const index_t threads = torch::stable::get_num_threads();
  const index_t affordable = std::max<index_t>(1, kMaxKeyBytes / (all * 8));
  const index_t slices = std::clamp<index_t>(divide_up(blocks.size(), 4 * kBlocks), 1, std::min(threads, affordable));
  const index_t groups = std::clamp<index_t>(divide_up(threads, slices), 1, grid.views);
  Tensor keys = new_tensor({slices, all}, ScalarType::Long);
  uint64_t* key_data = output<uint64_t>(keys);
  torch::stable::parallel_for(0, slices * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const index_t s = task / groups, g = task % groups;
      fill_keys(input<float>(points), count, blocks, blocks.size() * s / slices, blocks.size() * (s + 1) / slices,
                projections.data(), frusta.data(), grid.views * g / groups, grid.views * (g + 1) / groups, grid,
                static_cast<float>(near), key_data + s * all);
    }
  });

  const ReadoutTargets r{key_data, slices, output<bool>(mask), output<float>(depth), output<int64_t>(index)};
  for_features(features, scales, [&](const auto& rows) {
    for_feature_type(dtype, [&](auto out) { write_readout(r, grid, rows, output<decltype(out)>(latents)); });
  });
  return {latents, mask, depth, index};
}

// The gradient with respect to features, view after view: within a view a token wins at most one cell, so no two
// threads add to the same row.
Tensor splat_backward(const Tensor& grad_latents_, const Tensor& index_, int64_t num_points, ScalarType dtype) {
  const Tensor grad_latents = as_contiguous(grad_latents_);
  const Tensor index = checked(index_, ScalarType::Long, "index");
  const index_t views = grad_latents.size(0), channels = grad_latents.size(1);
  const index_t cells = grad_latents.size(2) * grad_latents.size(3);
  Tensor total = new_tensor({num_points, channels}, ScalarType::Float);
  total = torch::stable::zero_(total);
  float* sums = output<float>(total);
  const int64_t* winners = input<int64_t>(index);
  for_feature_type(grad_latents.scalar_type(), [&](auto in) {
    const auto* grad = input<decltype(in)>(grad_latents);
    for (index_t t = 0; t < views; ++t) {
      torch::stable::parallel_for(0, cells, 256, [&](int64_t begin, int64_t end) {
        for (int64_t cell = begin; cell < end; ++cell) {
          const int64_t token = winners[t * cells + cell];
          if (token < 0) continue;
          for (index_t c = 0; c < channels; ++c)
            sums[token * channels + c] += static_cast<float>(grad[(t * channels + c) * cells + cell]);
        }
      });
    }
  });
  return dtype == ScalarType::Float ? total : torch::stable::to(total, dtype);
}

}  // namespace mirage::cpu

STABLE_TORCH_LIBRARY_IMPL(mirage, CPU, m) {
  m.impl("splat_compiled", TORCH_BOX(&mirage::cpu::splat));
  m.impl("splat_backward_compiled", TORCH_BOX(&mirage::cpu::splat_backward));
}

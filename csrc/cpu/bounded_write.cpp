// bounded_write on the CPU, view after view: every held token is compared with what the view sees, then each cell is
// decided in order, then the feature rows are written. The comparison takes minima and counts, so its result does not
// depend on how threads divide the work.
//
// In: latents (T, C, h, w), depth (T, H, W), cameras, mask, order (h w,). In place: points, features, frame_ids,
// free_space_violations, num_observations, count, bounds, scales. Out: the counts of WRITE_REPORT.
#include "../core/bounded_write_rules.h"

#include <limits>

#include "culling.h"
#include "feature_rows.h"
#include "projection.h"
#include "token_status.h"

namespace mirage::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Buffers of the cache, except the features.
struct Held {
  LiftedToken* points;
  int32_t* frame_ids;
  uint8_t* free_space_violations;
  uint8_t* num_observations;  // or null
  const float* frame_centers;
  index_t frames, capacity;

  float center(int32_t frame, int axis) const {
    return frame >= 0 && frame < frames ? frame_centers[3 * static_cast<index_t>(frame) + axis]
                                        : std::numeric_limits<float>::quiet_NaN();
  }

  uint64_t voxel(const LiftedToken& p) const { return token_voxel(p.x, p.y, p.z, p.footprint); }
};

struct Grid {
  int height, width;
  index_t cells;
  float near;
};

// What a view sees, by cell.
struct NewView {
  const float* depths;  // 0 where unknown
  const uint8_t* statuses;
  const LiftedToken* tokens;
  const float* nearest;  // least depth, infinite where no depth is valid; null: nothing is carved
};

// The voxels that tokens of one view would enter: a hash table with open addressing, at most half full.
class Voxels {
 public:
  explicit Voxels(index_t cells) {
    index_t size = 2;
    while (size < 2 * cells) size *= 2;
    keys_.resize(size);
    mask_ = static_cast<uint64_t>(size - 1);
  }

  void clear() { std::fill(keys_.begin(), keys_.end(), kNoVoxel); }
  size_t size() const { return keys_.size(); }

  int32_t insert(uint64_t voxel) {
    uint64_t at = first(voxel);
    while (keys_[at] != kNoVoxel && keys_[at] != voxel) at = (at + 1) & mask_;
    keys_[at] = voxel;
    return static_cast<int32_t>(at);
  }

  // The place of the voxel in the table, or -1.
  int32_t find(uint64_t voxel) const {
    uint64_t at = first(voxel);
    while (keys_[at] != voxel) {
      if (keys_[at] == kNoVoxel) return -1;
      at = (at + 1) & mask_;
    }
    return static_cast<int32_t>(at);
  }

 private:
  // The upper bits of a product mix all bits of the key.
  uint64_t first(uint64_t voxel) const { return (voxel * 0x9e3779b97f4a7c15ull >> 40) & mask_; }

  std::vector<uint64_t> keys_;
  uint64_t mask_;
};

// What one thread finds out about one view from its part of the held tokens.
struct Partial {
  std::vector<uint64_t> best;      // of each cell: the key of the token that covers it best
  std::vector<int32_t> occupancy;  // live tokens in each voxel
  index_t carved = 0;

  void start(index_t cells, size_t voxels) {
    best.assign(cells, kEmptyKey);
    occupancy.assign(voxels, 0);
    carved = 0;
  }
};

struct GroupAlignment {
  alignas(64) float u[kGroup], v[kGroup], z[kGroup], score_bias[kGroup];
  alignas(64) int32_t visible[kGroup];
  alignas(64) uint64_t voxel[kGroup];
};

MIRAGE_SIMD
void align_group(const Held& held, index_t first, int count, const ViewCamera& camera_, const Grid& grid,
                 GroupAlignment& g) {
  const ViewCamera camera = camera_;
  alignas(64) float x[kGroup], y[kGroup], z[kGroup], footprint[kGroup], writer_center[3][kGroup];
  for (int i = 0; i < kGroup; ++i) {
    const LiftedToken& p = held.points[first + (i < count ? i : 0)];
    x[i] = p.x;
    y[i] = p.y;
    z[i] = p.z;
    footprint[i] = p.footprint;
  }
  for (int axis = 0; axis < 3; ++axis)
    for (int i = 0; i < kGroup; ++i)
      writer_center[axis][i] = held.center(held.frame_ids[first + (i < count ? i : 0)], axis);
  const float width = static_cast<float>(grid.width), height = static_cast<float>(grid.height);
  for (int i = 0; i < kGroup; ++i) {
    const float from[3] = {writer_center[0][i], writer_center[1][i], writer_center[2][i]};
    const Alignment alignment = align_token(camera, x[i], y[i], z[i], footprint[i], from);
    g.u[i] = alignment.u;
    g.v[i] = alignment.v;
    g.z[i] = alignment.z;
    g.score_bias[i] = alignment.score_bias;
    g.visible[i] = in_view({alignment.u, alignment.v, alignment.z}, grid.near, width, height) ? 1 : 0;
  }
  for (int i = 0; i < kGroup; ++i) g.voxel[i] = token_voxel(x[i], y[i], z[i], footprint[i]);
}

// Updates the free-space violations of a token in view; returns whether the view sees through it.
bool update_violations(const NewView& view, const Grid& grid, float u, float v, float depth, index_t cell,
                       uint8_t* free_space_violations) {
  const float surface = view.depths[cell];
  bool through = is_clearly_behind(surface, depth);
  for (int k = 0; k < 4 && through; ++k) {
    const int around = surrounding_cell(u, v, grid.height, grid.width, k);
    through = is_free_at(depth, view.nearest[around], view.depths[around]);
  }
  if (through) {
    *free_space_violations += 1;
  } else if (on_surface(depth, surface)) {
    *free_space_violations = 0;
  }
  return through;
}

// Compares the view with the held tokens of every `step`-th block of the list, beginning with its `first`.
void observe(const Held& held, index_t live, const std::vector<uint32_t>& blocks, size_t first, size_t step,
             const ViewCamera& camera, const Grid& grid, const NewView& view, int carve_views, const Voxels& voxels,
             Partial& partial) {
  GroupAlignment g;
  for (size_t k = first; k < blocks.size(); k += step) {
    const index_t start = index_t{blocks[k]} * kBlockTokens, stop = std::min<index_t>(live, start + kBlockTokens);
    for (index_t begin = start; begin < stop; begin += kGroup) {
      const int count = static_cast<int>(std::min<index_t>(kGroup, stop - begin));
      align_group(held, begin, count, camera, grid, g);
      for (int i = 0; i < count; ++i) {
        uint8_t* free_space_violations = held.free_space_violations + begin + i;
        if (*free_space_violations == kInvalid) continue;
        const bool visible = g.visible[i] != 0;
        const int column = visible ? static_cast<int>(g.u[i]) : 0, row = visible ? static_cast<int>(g.v[i]) : 0;
        const index_t cell = static_cast<index_t>(row) * grid.width + column;
        if (view.nearest && visible) {
          if (update_violations(view, grid, g.u[i], g.v[i], g.z[i], cell, free_space_violations) &&
              *free_space_violations >= carve_views) {
            *free_space_violations = kInvalid;
            ++partial.carved;
            continue;
          }
        }
        const int32_t voxel = voxels.find(g.voxel[i]);
        if (voxel >= 0) ++partial.occupancy[voxel];
        if (!visible || view.statuses[cell] != kKept || !on_surface(g.z[i], view.depths[cell])) continue;
        const float score = cell_distance(g.u[i], g.v[i], column, row) + g.score_bias[i];
        if (covers(score, g.score_bias[i]))
          partial.best[cell] = std::min(partial.best[cell], make_key(score, static_cast<uint32_t>(begin + i)));
      }
    }
  }
}

// A box around the voxels that tokens of a view would enter.
struct VoxelBox {
  float low[3] = {kInfinity, kInfinity, kInfinity}, high[3] = {-kInfinity, -kInfinity, -kInfinity};

  void add(const LiftedToken& p) {
    const float at[3] = {p.x, p.y, p.z};
    for (int j = 0; j < 3; ++j) {
      const float reach = token_voxel_reach(at[j], p.footprint);
      low[j] = std::min(low[j], at[j] - reach);
      high[j] = std::max(high[j], at[j] + reach);
    }
  }

  bool meets(const float* box) const {
    bool apart = false;
    for (int j = 0; j < 3; ++j) apart |= (box[j] > high[j]) | (box[3 + j] < low[j]);
    return !apart;
  }
};

// Blocks of held tokens that the view may see up to `depth`, or that may share a voxel with what it writes.
void find_blocks(const float* bounds, index_t live, const Frustum& frustum, float depth, const VoxelBox& voxels,
                 std::vector<uint32_t>& blocks) {
  blocks.clear();
  for (index_t b = 0; b < divide_up(live, kBlockTokens); ++b) {
    const float* box = bounds ? bounds + kBoxSize * b : nullptr;
    if (!box || voxels.meets(box) || (may_see(frustum, box) && !lies_beyond(frustum, depth, box)))
      blocks.push_back(static_cast<uint32_t>(b));
  }
}

struct RowWrite {
  int32_t cell;
  index_t row;
  float num_observations;  // averaged in the row so far; -1: the row is overwritten
};

// Decides every cell of a view in order, and writes everything except the features. Returns the new number of rows.
index_t decide(const Held& held, index_t live, const Grid& grid, const NewView& view, const int32_t* order,
               int32_t frame, int views_per_voxel, const std::vector<int32_t>& voxel_of, Partial& partial,
               std::vector<RowWrite>& row_writes, index_t* report) {
  index_t end = live;
  for (index_t k = 0; k < grid.cells; ++k) {
    const int32_t cell = order[k];
    if (view.statuses[cell] != kKept) continue;
    const LiftedToken& token = view.tokens[cell];
    const uint64_t key = partial.best[cell];
    const auto claim_slot = [&] {
      int32_t& occupancy = partial.occupancy[voxel_of[cell]];
      return occupancy < views_per_voxel ? (++occupancy, true) : false;
    };
    if (key == kEmptyKey) {
      // A slot of the voxel is claimed before room in the buffers is: a token that finds no room there still
      // uses up the slot.
      if (!claim_slot() || end == held.capacity) {
        ++report[kReportRefused];
        continue;
      }
      row_writes.push_back({cell, end, -1.0f});
      held.points[end] = token;
      held.frame_ids[end] = frame;
      held.free_space_violations[end] = 0;
      if (held.num_observations) held.num_observations[end] = 1;
      ++end;
      ++report[kReportWritten];
      continue;
    }
    const index_t row = key_index(key);
    LiftedToken& old = held.points[row];
    if (held.num_observations) {
      const float num_observations = static_cast<float>(held.num_observations[row]);
      const LiftedToken mean{running_mean(old.x, num_observations, token.x),
                             running_mean(old.y, num_observations, token.y),
                             running_mean(old.z, num_observations, token.z),
                             running_mean(old.footprint, num_observations, token.footprint)};
      if (held.voxel(mean) == held.voxel(old)) old = mean;
      held.num_observations[row] = static_cast<uint8_t>(std::min(held.num_observations[row] + 1, kMaxObservations));
      row_writes.push_back({cell, row, num_observations});
      ++report[kReportMerged];
    } else {
      const bool replaces = supersedes(key_depth(key), old.footprint, token.footprint) &&
                            (held.voxel(old) == held.voxel(token) || claim_slot());
      ++report[replaces ? kReportReplaced : kReportCovered];
      if (!replaces) continue;
      old = token;
      row_writes.push_back({cell, row, -1.0f});
    }
    held.frame_ids[row] = frame;
    held.free_space_violations[row] = 0;
  }
  return end;
}

// Writes the features of the rows that were decided on; channel c of cell k is at latents + c * cells + k.
template <typename In, typename Out>
void write_rows(const std::vector<RowWrite>& row_writes, const In* latents, index_t cells, index_t channels,
                Out* features, uint8_t* scales) {
  constexpr index_t kRows = 16;  // at a time: neighbouring cells share the cache lines of every channel
  const auto number = static_cast<int64_t>(row_writes.size());
  torch::stable::parallel_for(0, divide_up(number, kRows), 16, [&](int64_t begin, int64_t end) {
    std::vector<In> rows(kRows * channels);
    std::vector<float> mean(channels);
    for (int64_t batch = begin; batch < end; ++batch) {
      const index_t first = batch * kRows, count = std::min<index_t>(kRows, number - first);
      for (index_t c = 0; c < channels; ++c)
        for (index_t k = 0; k < count; ++k) rows[k * channels + c] = latents[c * cells + row_writes[first + k].cell];
      for (index_t k = 0; k < count; ++k) {
        const RowWrite& row_write = row_writes[first + k];
        const In* row = rows.data() + k * channels;
        Out* to = features + row_write.row * channels;
        uint8_t* scale = scales ? scales + row_write.row : nullptr;
        if (row_write.num_observations >= 0.0f) {
          load_row(to, scale ? *scale : uint8_t{0}, channels, mean.data());
          for (index_t c = 0; c < channels; ++c)
            mean[c] = running_mean(mean[c], row_write.num_observations, static_cast<float>(row[c]));
          store_row(mean.data(), channels, to, scale);
        } else {
          store_row(row, channels, to, scale);
        }
      }
    }
  });
}

// The least valid depth of every cell, infinite where no depth is valid.
Tensor nearest_depths(const DepthSource& source, index_t views) {
  Tensor nearest = new_tensor({views, source.height, source.width}, ScalarType::Float);
  const CellColumns columns = make_columns(
      {source.depth, source.depth_height, source.depth_width, nullptr, 0, 0, source.height, source.width, false});
  torch::stable::parallel_for(0, views * source.height, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> least(source.depth_width);
    for (int64_t at = begin; at < end; ++at) {
      const index_t t = at / source.height, i = at % source.height;
      std::fill(least.begin(), least.end(), kInfinity);
      for (index_t r = cell_begin(i, source.height, source.depth_height);
           r < cell_begin(i + 1, source.height, source.depth_height); ++r) {
        const float* row = source.depth + (t * source.depth_height + r) * source.depth_width;
        for (index_t c = 0; c < source.depth_width; ++c)
          least[c] = (row[c] > 0.0f) & (row[c] < least[c]) ? row[c] : least[c];
      }
      for (index_t j = 0; j < source.width; ++j)
        output<float>(nearest)[at * source.width + j] =
            *std::min_element(least.begin() + columns.depth_begin[j], least.begin() + columns.depth_begin[j + 1]);
    }
  });
  return nearest;
}

// Cameras of the token grid, from those of the depth map.
std::vector<ViewCamera> make_view_cameras(const Tensor& intrinsics, const Tensor& cam2world,
                                          const DepthSource& source) {
  const double sx = static_cast<double>(source.width) / static_cast<double>(source.depth_width);
  const double sy = static_cast<double>(source.height) / static_cast<double>(source.depth_height);
  std::vector<ViewCamera> cameras(cam2world.size(0));
  for (size_t t = 0; t < cameras.size(); ++t) {
    double grid[9];
    std::copy_n(input<double>(intrinsics) + t * 9, 9, grid);
    for (int j = 0; j < 3; ++j) {
      grid[j] *= sx;
      grid[3 + j] *= sy;
    }
    cameras[t] = make_view_camera(grid, input<double>(cam2world) + t * 16);
  }
  return cameras;
}

}  // namespace

Tensor bounded_write(Tensor points, Tensor features, Tensor frame_ids, Tensor free_space_violations,
                     std::optional<Tensor> num_observations, Tensor count, const Tensor& frame_centers_,
                     const Tensor& latents_, const Tensor& depth_, const Tensor& intrinsics_, const Tensor& cam2world_,
                     const std::optional<Tensor>& mask_, const Tensor& order_, int64_t first_frame, bool bilinear,
                     double min_depth, double max_depth, double near, int64_t views_per_voxel, int64_t carve_views,
                     std::optional<Tensor> bounds, std::optional<Tensor> scales) {
  const Tensor latents = as_contiguous(latents_);
  const Tensor depth = checked(depth_, ScalarType::Float, "depth");
  const Tensor intrinsics = checked(intrinsics_, ScalarType::Double, "intrinsics");
  const Tensor cam2world = checked(cam2world_, ScalarType::Double, "cam2world");
  const Tensor frame_centers = checked(frame_centers_, ScalarType::Float, "frame_centers");
  const Tensor order = checked(order_, ScalarType::Int, "order");
  std::optional<Tensor> mask;
  if (mask_.has_value()) mask = checked(*mask_, ScalarType::Bool, "mask");
  STD_TORCH_CHECK(points.is_contiguous() && features.is_contiguous() && frame_ids.is_contiguous() &&
                      free_space_violations.is_contiguous() &&
                      (!num_observations.has_value() || num_observations->is_contiguous()),
                  "points, features, frame_ids, free_space_violations and num_observations must be contiguous: they "
                  "are written in place");
  const index_t views = latents.size(0), channels = latents.size(1);
  const Grid grid{static_cast<int>(latents.size(2)), static_cast<int>(latents.size(3)),
                  latents.size(2) * latents.size(3), static_cast<float>(near)};
  const Held held{output<LiftedToken>(points),
                  output<int32_t>(frame_ids),
                  output<uint8_t>(free_space_violations),
                  num_observations.has_value() ? output<uint8_t>(*num_observations) : nullptr,
                  input<float>(frame_centers),
                  frame_centers.size(0),
                  points.size(0)};
  checked_scales(features, scales);
  STD_TORCH_CHECK(!scales.has_value() || scales->is_contiguous(),
                  "scales must be contiguous: they are written in place");
  if (bounds.has_value()) check_bounds(*bounds, held.capacity);
  float* boxes = bounds.has_value() ? output<float>(*bounds) : nullptr;
  index_t live = *input<int64_t>(count);
  STD_TORCH_CHECK(live >= 0 && live <= held.capacity, "count must be in [0, ", held.capacity, "], got ", live);

  const ClassifiedTokens classified =
      classify_tokens(latents, depth, intrinsics, cam2world, mask, bilinear, static_cast<float>(min_depth),
                      static_cast<float>(max_depth), features.scalar_type());
  const DepthSource source = make_source(depth, mask, grid.height, grid.width, bilinear);
  const std::vector<ViewCamera> cameras = make_view_cameras(intrinsics, cam2world, source);
  std::optional<Tensor> nearest;
  if (carve_views > 0) nearest = nearest_depths(source, views);

  Tensor result = new_tensor({kReportSize}, ScalarType::Long);
  int64_t* report = output<int64_t>(result);
  std::fill_n(report, kReportSize, 0);
  for (int k = kMasked; k <= kNonFinite; ++k) report[kReportMasked + k - kMasked] = classified.rejected[k];

  const index_t most = torch::stable::get_num_threads();
  std::vector<Partial> partials(most);
  Voxels voxels(grid.cells);
  std::vector<int32_t> voxel_of(grid.cells);
  std::vector<RowWrite> row_writes;
  std::vector<uint32_t> blocks;
  std::vector<uint8_t> touched(boxes ? divide_up(held.capacity, kBlockTokens) : 0);
  for (index_t t = 0; t < views; ++t) {
    const index_t base = t * grid.cells;
    const NewView view{input<float>(classified.depths) + base, input<uint8_t>(classified.statuses) + base,
                       input<LiftedToken>(classified.lifted) + base,
                       nearest.has_value() ? input<float>(*nearest) + base : nullptr};
    voxels.clear();
    VoxelBox voxel_box;
    for (index_t cell = 0; cell < grid.cells; ++cell) {
      if (view.statuses[cell] != kKept) continue;
      voxel_of[cell] = voxels.insert(held.voxel(view.tokens[cell]));
      voxel_box.add(view.tokens[cell]);
    }
    const float farthest = *std::max_element(view.depths, view.depths + grid.cells);
    find_blocks(boxes, live, make_frustum(cameras[t].projection, grid.near, grid.width, grid.height, 0),
                farthest_relevant(farthest), voxel_box, blocks);

    const index_t number = std::clamp<index_t>(static_cast<index_t>(blocks.size()) / 16, 1, most);
    torch::stable::parallel_for(0, number, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        partials[s].start(grid.cells, voxels.size());
        observe(held, live, blocks, s, number, cameras[t], grid, view, static_cast<int>(carve_views), voxels,
                partials[s]);
      }
    });
    Partial& all = partials[0];
    for (index_t s = 0; s < number; ++s) {
      report[kReportCarved] += partials[s].carved;
      if (s == 0) continue;
      for (index_t cell = 0; cell < grid.cells; ++cell)
        all.best[cell] = std::min(all.best[cell], partials[s].best[cell]);
      for (size_t k = 0; k < voxels.size(); ++k) all.occupancy[k] += partials[s].occupancy[k];
    }

    row_writes.clear();
    live = decide(held, live, grid, view, input<int32_t>(order), static_cast<int32_t>(first_frame + t),
                  static_cast<int>(views_per_voxel), voxel_of, all, row_writes, report);
    if (boxes) {
      std::fill(touched.begin(), touched.end(), 0);
      for (const RowWrite& row_write : row_writes) touched[row_write.row / kBlockTokens] = 1;
      update_bounds(input<float>(points), live, 0, divide_up(live, kBlockTokens), touched.data(), held.capacity, boxes);
    }
    for_feature_type(latents.scalar_type(), [&](auto in) {
      for_stored_type(features.scalar_type(), [&](auto out) {
        write_rows(row_writes, input<decltype(in)>(latents) + t * channels * grid.cells, grid.cells, channels,
                   output<decltype(out)>(features), scales.has_value() ? output<uint8_t>(*scales) : nullptr);
      });
    });
  }
  *output<int64_t>(count) = live;
  return result;
}

}  // namespace mirage::cpu

STABLE_TORCH_LIBRARY_IMPL(mirage, CPU, m) { m.impl("bounded_write_compiled", TORCH_BOX(&mirage::cpu::bounded_write)); }

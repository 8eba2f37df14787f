// bounded_write on the CPU, view after view: what the held tokens show of it, then a decision for every cell, in order,
// then the rows of what is written. The walk over held tokens takes minima and counts, so no schedule shows in them.
//
// In: latents (T, C, h, w), depth (T, H, W), cameras, mask, order (h w,). In place: points, features, frame_ids, votes,
// looks, count, bounds, scales. Out: the counts of reference.py's WRITE_REPORT.
#include "../core/bounded_write_rules.h"

#include <limits>

#include "feature_rows.h"
#include "token_status.h"

namespace mirage::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Buffers of the cache, but for the features.
struct Held {
  LiftedToken* points;
  int32_t* frame_ids;
  uint8_t* votes;
  uint8_t* looks;  // or null
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
struct Seen {
  const float* depths;     // 0 where unknown
  const uint8_t* verdicts;
  const LiftedToken* tokens;
  const float* nearest;    // least depth, infinite where there is none; null: nothing is carved
};

// Voxels that tokens of one view come to: open addressing, at most half full.
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

  // Of the voxel, or -1.
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

// What one thread finds of one view in its share of the held tokens.
struct Share {
  std::vector<uint64_t> best;  // of each cell: the key of the token that shows it best
  std::vector<int32_t> taken;  // live tokens of each voxel
  index_t carved = 0;

  void start(index_t cells, size_t voxels) {
    best.assign(cells, kEmptyKey);
    taken.assign(voxels, 0);
    carved = 0;
  }
};

struct GroupLook {
  alignas(64) float u[kGroup], v[kGroup], z[kGroup], lack[kGroup];
  alignas(64) int32_t visible[kGroup];
  alignas(64) uint64_t voxel[kGroup];
};

MIRAGE_SIMD
void look_at_group(const Held& held, index_t first, int count, const Reader& reader_, const Grid& grid, GroupLook& g) {
  const Reader reader = reader_;
  alignas(64) float x[kGroup], y[kGroup], z[kGroup], footprint[kGroup], writer[3][kGroup];
  for (int i = 0; i < kGroup; ++i) {
    const LiftedToken& p = held.points[first + (i < count ? i : 0)];
    x[i] = p.x;
    y[i] = p.y;
    z[i] = p.z;
    footprint[i] = p.footprint;
  }
  for (int axis = 0; axis < 3; ++axis)
    for (int i = 0; i < kGroup; ++i)
      writer[axis][i] = held.center(held.frame_ids[first + (i < count ? i : 0)], axis);
  const float width = static_cast<float>(grid.width), height = static_cast<float>(grid.height);
  for (int i = 0; i < kGroup; ++i) {
    const float from[3] = {writer[0][i], writer[1][i], writer[2][i]};
    const Fit fit = fit_token(reader, x[i], y[i], z[i], footprint[i], from);
    g.u[i] = fit.u;
    g.v[i] = fit.v;
    g.z[i] = fit.z;
    g.lack[i] = fit.lack;
    g.visible[i] = in_view({fit.u, fit.v, fit.z}, grid.near, width, height) ? 1 : 0;
  }
  for (int i = 0; i < kGroup; ++i) g.voxel[i] = token_voxel(x[i], y[i], z[i], footprint[i]);
}

// The view's vote on a token that lies in it; returns whether it sees through it.
bool vote(const Seen& seen, const Grid& grid, float u, float v, float depth, index_t cell, uint8_t* votes) {
  const float surface = seen.depths[cell];
  bool through = clearly_behind(surface, depth);
  for (int k = 0; k < 4 && through; ++k) {
    const int around = surrounding_cell(u, v, grid.height, grid.width, k);
    through = shows_nothing_at(depth, seen.nearest[around], seen.depths[around]);
  }
  if (through) {
    *votes += 1;
  } else if (on_surface(depth, surface)) {
    *votes = 0;
  }
  return through;
}

// Looks at the held tokens of every `step`-th block of the list from its `first` on.
void look(const Held& held, index_t live, const std::vector<uint32_t>& blocks, size_t first, size_t step,
          const Reader& reader, const Grid& grid, const Seen& seen, int carve_views, const Voxels& voxels, Share& share) {
  GroupLook g;
  for (size_t k = first; k < blocks.size(); k += step) {
    const index_t start = index_t{blocks[k]} * kBlockTokens, stop = std::min<index_t>(live, start + kBlockTokens);
    for (index_t begin = start; begin < stop; begin += kGroup) {
      const int count = static_cast<int>(std::min<index_t>(kGroup, stop - begin));
      look_at_group(held, begin, count, reader, grid, g);
      for (int i = 0; i < count; ++i) {
        uint8_t* votes = held.votes + begin + i;
        if (*votes == kDead) continue;
        const bool visible = g.visible[i] != 0;
        const int column = visible ? static_cast<int>(g.u[i]) : 0, row = visible ? static_cast<int>(g.v[i]) : 0;
        const index_t cell = static_cast<index_t>(row) * grid.width + column;
        if (seen.nearest && visible) {
          if (vote(seen, grid, g.u[i], g.v[i], g.z[i], cell, votes) && *votes >= carve_views) {
            *votes = kDead;
            ++share.carved;
            continue;
          }
        }
        const int32_t voxel = voxels.find(g.voxel[i]);
        if (voxel >= 0) ++share.taken[voxel];
        if (!visible || seen.verdicts[cell] != kKeep || !on_surface(g.z[i], seen.depths[cell])) continue;
        const float score = cell_distance(g.u[i], g.v[i], column, row) + g.lack[i];
        if (shows(score, g.lack[i]))
          share.best[cell] = std::min(share.best[cell], make_key(score, static_cast<uint32_t>(begin + i)));
      }
    }
  }
}

// A box around the voxels that the tokens of a view come to.
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

struct Move {
  int32_t cell;
  index_t row;
  float looks;  // averaged in the row so far; -1: it is overwritten
};

// Decides every cell of a view in order, and writes all but the features. Returns the new number of rows.
index_t decide(const Held& held, index_t live, const Grid& grid, const Seen& seen, const int32_t* order, int32_t frame,
               int views_per_voxel, const std::vector<int32_t>& voxel_of, Share& share, std::vector<Move>& moves,
               index_t* report) {
  index_t end = live;
  for (index_t k = 0; k < grid.cells; ++k) {
    const int32_t cell = order[k];
    if (seen.verdicts[cell] != kKeep) continue;
    const LiftedToken& token = seen.tokens[cell];
    const uint64_t key = share.best[cell];
    const auto enters = [&] {
      int32_t& taken = share.taken[voxel_of[cell]];
      return taken < views_per_voxel ? (++taken, true) : false;
    };
    if (key == kEmptyKey) {
      // Room in the voxel is given away before room in the buffers is asked for.
      if (!enters() || end == held.capacity) {
        ++report[kRefused];
        continue;
      }
      moves.push_back({cell, end, -1.0f});
      held.points[end] = token;
      held.frame_ids[end] = frame;
      held.votes[end] = 0;
      if (held.looks) held.looks[end] = 1;
      ++end;
      ++report[kWritten];
      continue;
    }
    const index_t row = key_index(key);
    LiftedToken& old = held.points[row];
    if (held.looks) {
      const float looks = static_cast<float>(held.looks[row]);
      const LiftedToken mean{mean_with(old.x, looks, token.x), mean_with(old.y, looks, token.y),
                             mean_with(old.z, looks, token.z), mean_with(old.footprint, looks, token.footprint)};
      if (held.voxel(mean) == held.voxel(old)) old = mean;
      held.looks[row] = static_cast<uint8_t>(std::min(held.looks[row] + 1, kMostMerged));
      moves.push_back({cell, row, looks});
      ++report[kMerged];
    } else {
      const bool replaces = takes_place(key_depth(key), old.footprint, token.footprint) &&
                            (held.voxel(old) == held.voxel(token) || enters());
      ++report[replaces ? kReplaced : kCoveredCount];
      if (!replaces) continue;
      old = token;
      moves.push_back({cell, row, -1.0f});
    }
    held.frame_ids[row] = frame;
    held.votes[row] = 0;
  }
  return end;
}

// The features of what was decided; channel c of cell k at latents + c * cells + k.
template <typename In, typename Out>
void move_rows(const std::vector<Move>& moves, const In* latents, index_t cells, index_t channels, Out* features,
               uint8_t* scales) {
  constexpr index_t kRows = 16;  // at a time: they share the lines of every channel
  const auto number = static_cast<int64_t>(moves.size());
  torch::stable::parallel_for(0, divide_up(number, kRows), 16, [&](int64_t begin, int64_t end) {
    std::vector<In> rows(kRows * channels);
    std::vector<float> mean(channels);
    for (int64_t batch = begin; batch < end; ++batch) {
      const index_t first = batch * kRows, count = std::min<index_t>(kRows, number - first);
      for (index_t c = 0; c < channels; ++c)
        for (index_t k = 0; k < count; ++k) rows[k * channels + c] = latents[c * cells + moves[first + k].cell];
      for (index_t k = 0; k < count; ++k) {
        const Move& move = moves[first + k];
        const In* row = rows.data() + k * channels;
        Out* to = features + move.row * channels;
        uint8_t* scale = scales ? scales + move.row : nullptr;
        if (move.looks >= 0.0f) {
          load_row(to, scale ? *scale : uint8_t{0}, channels, mean.data());
          for (index_t c = 0; c < channels; ++c) mean[c] = mean_with(mean[c], move.looks, static_cast<float>(row[c]));
          store_row(mean.data(), channels, to, scale);
        } else {
          store_row(row, channels, to, scale);
        }
      }
    }
  });
}

// Least valid depth of every cell, infinite where there is none.
Tensor nearest_depths(const DepthSource& source, index_t views) {
  Tensor nearest = new_tensor({views, source.height, source.width}, ScalarType::Float);
  const CellColumns columns = make_columns({source.depth, source.depth_height, source.depth_width, nullptr, 0, 0,
                                            source.height, source.width, false});
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
std::vector<Reader> make_readers(const Tensor& intrinsics, const Tensor& cam2world, const DepthSource& source) {
  const double sx = static_cast<double>(source.width) / static_cast<double>(source.depth_width);
  const double sy = static_cast<double>(source.height) / static_cast<double>(source.depth_height);
  std::vector<Reader> readers(cam2world.size(0));
  for (size_t t = 0; t < readers.size(); ++t) {
    double grid[9];
    std::copy_n(input<double>(intrinsics) + t * 9, 9, grid);
    for (int j = 0; j < 3; ++j) {
      grid[j] *= sx;
      grid[3 + j] *= sy;
    }
    readers[t] = make_reader(grid, input<double>(cam2world) + t * 16);
  }
  return readers;
}

}  // namespace

Tensor bounded_write(Tensor points, Tensor features, Tensor frame_ids, Tensor votes, std::optional<Tensor> looks,
                     Tensor count, const Tensor& frame_centers_, const Tensor& latents_, const Tensor& depth_,
                     const Tensor& intrinsics_, const Tensor& cam2world_, const std::optional<Tensor>& mask_,
                     const Tensor& order_, int64_t first_frame, bool bilinear, double min_depth, double max_depth,
                     double near, int64_t views_per_voxel, int64_t carve_views, std::optional<Tensor> bounds,
                     std::optional<Tensor> scales) {
  const Tensor latents = as_contiguous(latents_);
  const Tensor depth = checked(depth_, ScalarType::Float, "depth");
  const Tensor intrinsics = checked(intrinsics_, ScalarType::Double, "intrinsics");
  const Tensor cam2world = checked(cam2world_, ScalarType::Double, "cam2world");
  const Tensor frame_centers = checked(frame_centers_, ScalarType::Float, "frame_centers");
  const Tensor order = checked(order_, ScalarType::Int, "order");
  std::optional<Tensor> mask;
  if (mask_.has_value()) mask = checked(*mask_, ScalarType::Bool, "mask");
  STD_TORCH_CHECK(points.is_contiguous() && features.is_contiguous() && frame_ids.is_contiguous() &&
                      votes.is_contiguous() && (!looks.has_value() || looks->is_contiguous()),
                  "points, features, frame_ids, votes and looks must be contiguous: they are written in place");
  const index_t views = latents.size(0), channels = latents.size(1);
  const Grid grid{static_cast<int>(latents.size(2)), static_cast<int>(latents.size(3)),
                  latents.size(2) * latents.size(3), static_cast<float>(near)};
  const Held held{output<LiftedToken>(points), output<int32_t>(frame_ids), output<uint8_t>(votes),
                  looks.has_value() ? output<uint8_t>(*looks) : nullptr, input<float>(frame_centers),
                  frame_centers.size(0), points.size(0)};
  checked_scales(features, scales);
  STD_TORCH_CHECK(!scales.has_value() || scales->is_contiguous(),
                  "scales must be contiguous: they are written in place");
  if (bounds.has_value()) check_bounds(*bounds, held.capacity);
  float* boxes = bounds.has_value() ? output<float>(*bounds) : nullptr;
  index_t live = *input<int64_t>(count);
  STD_TORCH_CHECK(live >= 0 && live <= held.capacity, "count must be in [0, ", held.capacity, "], got ", live);

  const Judged judged = judge_tokens(latents, depth, intrinsics, cam2world, mask, bilinear, static_cast<float>(min_depth),
                                     static_cast<float>(max_depth), features.scalar_type());
  const DepthSource source = make_source(depth, mask, grid.height, grid.width, bilinear);
  const std::vector<Reader> readers = make_readers(intrinsics, cam2world, source);
  std::optional<Tensor> nearest;
  if (carve_views > 0) nearest = nearest_depths(source, views);

  Tensor result = new_tensor({kReport}, ScalarType::Long);
  int64_t* report = output<int64_t>(result);
  std::fill_n(report, kReport, 0);
  for (int k = kMasked; k <= kNonFinite; ++k) report[kMaskedCount + k - kMasked] = judged.rejected[k];

  const index_t most = torch::stable::get_num_threads();
  std::vector<Share> shares(most);
  Voxels voxels(grid.cells);
  std::vector<int32_t> voxel_of(grid.cells);
  std::vector<Move> moves;
  std::vector<uint32_t> blocks;
  std::vector<uint8_t> touched(boxes ? divide_up(held.capacity, kBlockTokens) : 0);
  for (index_t t = 0; t < views; ++t) {
    const index_t base = t * grid.cells;
    const Seen seen{input<float>(judged.depths) + base, input<uint8_t>(judged.verdicts) + base,
                    input<LiftedToken>(judged.lifted) + base,
                    nearest.has_value() ? input<float>(*nearest) + base : nullptr};
    voxels.clear();
    VoxelBox voxel_box;
    for (index_t cell = 0; cell < grid.cells; ++cell) {
      if (seen.verdicts[cell] != kKeep) continue;
      voxel_of[cell] = voxels.insert(held.voxel(seen.tokens[cell]));
      voxel_box.add(seen.tokens[cell]);
    }
    const float farthest = *std::max_element(seen.depths, seen.depths + grid.cells);
    find_blocks(boxes, live, make_frustum(readers[t].projection, grid.near, grid.width, grid.height, 0),
                farthest_touched(farthest), voxel_box, blocks);

    const index_t number = std::clamp<index_t>(static_cast<index_t>(blocks.size()) / 16, 1, most);
    torch::stable::parallel_for(0, number, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        shares[s].start(grid.cells, voxels.size());
        look(held, live, blocks, s, number, readers[t], grid, seen, static_cast<int>(carve_views), voxels, shares[s]);
      }
    });
    Share& all = shares[0];
    for (index_t s = 0; s < number; ++s) {
      report[kCarvedCount] += shares[s].carved;
      if (s == 0) continue;
      for (index_t cell = 0; cell < grid.cells; ++cell) all.best[cell] = std::min(all.best[cell], shares[s].best[cell]);
      for (size_t k = 0; k < voxels.size(); ++k) all.taken[k] += shares[s].taken[k];
    }

    moves.clear();
    live = decide(held, live, grid, seen, input<int32_t>(order), static_cast<int32_t>(first_frame + t),
                  static_cast<int>(views_per_voxel), voxel_of, all, moves, report);
    if (boxes) {
      std::fill(touched.begin(), touched.end(), 0);
      for (const Move& move : moves) touched[move.row / kBlockTokens] = 1;
      update_bounds(input<float>(points), live, 0, divide_up(live, kBlockTokens), touched.data(), held.capacity, boxes);
    }
    for_feature_type(latents.scalar_type(), [&](auto in) {
      for_stored_type(features.scalar_type(), [&](auto out) {
        move_rows(moves, input<decltype(in)>(latents) + t * channels * grid.cells, grid.cells, channels,
                  output<decltype(out)>(features), scales.has_value() ? output<uint8_t>(*scales) : nullptr);
      });
    });
  }
  *output<int64_t>(count) = live;
  return result;
}

}  // namespace mirage::cpu

STABLE_TORCH_LIBRARY_IMPL(mirage, CPU, m) { m.impl("bounded_write_compiled", TORCH_BOX(&mirage::cpu::bounded_write)); }

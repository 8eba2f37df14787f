// splat_aligned on the CPU: nearest depths, then the best tokens of every cell, view by view; then blending, tile by
// tile. Minima and best-of lists are the same in any order, so the result does not depend on the schedule.
//
// In: points (N, 4), features (N, C), frame_ids (N,), frame_centers (F, 3), cameras of T views.
// Out: latents (T, C, h, w), mask, depth, index (T, h, w), keys (T, h, w, kBlendTokens).
#include "../core/alignment_score.h"

#include <atomic>
#include <limits>

#include "culling.h"
#include "feature_rows.h"
#include "projection.h"
#include "transpose.h"

namespace mirage::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kCorners = 4;  // cells within kTokenReach < 1 of a projection: two columns and two rows at most

typedef int64_t Keys __attribute__((vector_size(kBlendTokens * sizeof(int64_t))));
static_assert(kBlendTokens == 4);

// The kBlendTokens best keys of a cell in ascending order, in one vector register.
struct alignas(sizeof(Keys)) Best {
  Keys keys;

  // Without a branch: each place takes the middle one of itself, its left neighbour and the new key.
  MIRAGE_INLINE void insert(int64_t key) {
    const Keys one = Keys{} + key;
    const Keys left = __builtin_shufflevector(Keys{} - 1, keys, 0, 4, 5, 6);
    const Keys pushed = left > one ? left : one;
    keys = keys < pushed ? keys : pushed;
  }
};

struct Tokens {
  const float* points;
  index_t count;
  const int32_t* frame_ids;
  const float* frame_centers;
  index_t frames;

  // The centre of the camera that wrote a frame; NaN for a frame that is not in the table.
  float center(int32_t frame, int axis) const {
    return frame >= 0 && frame < frames ? frame_centers[3 * static_cast<index_t>(frame) + axis]
                                        : std::numeric_limits<float>::quiet_NaN();
  }
};

struct Grid {
  index_t views, cells;
  int height, width;
};

// A group of tokens in one view. A token out of view is placed where it reaches no cell.
struct GroupAlignment {
  alignas(64) float u[kGroup], v[kGroup], z[kGroup], radius[kGroup], score_bias[kGroup];
  uint32_t first;
  bool wide;  // one of the tokens may close holes
};

// What one thread finds out about one view from its part of the tokens.
struct Partial {
  std::vector<GroupAlignment> groups;
  std::vector<float> narrow;  // nearest depth of the tokens that reach a cell; the last kGroup entries take the misses
  std::vector<float> wide;    // in holes, the nearest depth of the tokens whose footprint reaches the cell
  std::vector<Best> best;     // best keys of each cell
  bool any_wide;

  void start(index_t cells) {
    groups.clear();
    any_wide = false;
    narrow.assign(cells + kGroup, kInfinity);
    wide.clear();
    best.assign(cells, Best{Keys{} + static_cast<int64_t>(kNoToken)});
  }
};

// The four cells whose centres surround each token, and its squared distances to them. A cell that the token does not
// reach is `cells` + lane.
struct Corners {
  alignas(64) int32_t cell[kCorners][kGroup];
  alignas(64) float distance[kCorners][kGroup];
};

MIRAGE_SIMD
void find_corners(const GroupAlignment& g, int height, int width, Corners& corners) {
  const int32_t misses = height * width;
  for (int i = 0; i < kGroup; ++i) {
    const float u = g.u[i], v = g.v[i];
    const int column = floor_cell(u - 0.5f), row = floor_cell(v - 0.5f);
    for (int k = 0; k < kCorners; ++k) {
      const int j = column + k % 2, r = row + k / 2;
      const float distance = cell_distance(u, v, j, r);
      const bool reached = (distance <= kTokenReach * kTokenReach) & (j >= 0) & (j < width) & (r >= 0) & (r < height);
      corners.cell[k][i] = reached ? r * width + j : misses + i;
      corners.distance[k][i] = distance;
    }
  }
}

// Aligns `count` tokens, 1 to kGroup, beginning with `first`, with the camera's view. Returns false if none comes near
// a cell.
MIRAGE_SIMD
bool align_group(const Tokens& tokens, index_t first, int count, const ViewCamera& camera_, float near, float width,
                 float height, GroupAlignment& g) {
  const ViewCamera camera = camera_;
  alignas(64) float x[kGroup], y[kGroup], z[kGroup], footprint[kGroup], writer_center[3][kGroup];
  const float* p = tokens.points + 4 * first;
  for (int i = 0; i < count; ++i) {
    x[i] = p[4 * i];
    y[i] = p[4 * i + 1];
    z[i] = p[4 * i + 2];
    footprint[i] = p[4 * i + 3];
  }
  for (int i = count; i < kGroup; ++i) x[i] = y[i] = z[i] = footprint[i] = std::numeric_limits<float>::quiet_NaN();
  const int32_t* ids = tokens.frame_ids + first;
  bool one_frame = true;
  for (int i = 1; i < count; ++i) one_frame &= ids[i] == ids[0];
  for (int axis = 0; axis < 3; ++axis) {
    const float common = tokens.center(ids[0], axis);
    for (int i = 0; i < kGroup; ++i) writer_center[axis][i] = common;
    if (!one_frame)
      for (int i = 0; i < count; ++i) writer_center[axis][i] = tokens.center(ids[i], axis);
  }
  alignas(64) int32_t near_a_cell[kGroup], closes_holes[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    const float from[3] = {writer_center[0][i], writer_center[1][i], writer_center[2][i]};
    const Alignment alignment = align_token(camera, x[i], y[i], z[i], footprint[i], from);
    const bool around = around_view(alignment.u, alignment.v, alignment.z, near, width, height);
    g.u[i] = around ? alignment.u : -8.0f;
    g.v[i] = around ? alignment.v : -8.0f;
    g.z[i] = around ? alignment.z : kInfinity;
    g.radius[i] = alignment.radius;
    g.score_bias[i] = around ? alignment.score_bias : 0.0f;
    near_a_cell[i] = around ? 1 : 0;
    closes_holes[i] = alignment.radius > kTokenReach ? 1 : 0;
  }
  int32_t seen = 0, wide = 0;
  for (int i = 0; i < kGroup; ++i) {
    seen |= near_a_cell[i];
    wide |= near_a_cell[i] & closes_holes[i];
  }
  g.first = static_cast<uint32_t>(first);
  g.wide = wide != 0;
  return seen != 0;
}

MIRAGE_SIMD
void lower(float* __restrict__ to, const float* __restrict__ from, index_t count) {
  for (index_t i = 0; i < count; ++i) to[i] = from[i] < to[i] ? from[i] : to[i];
}

// Stored in either case: which of two tokens is nearer is random, so a branch would be mispredicted.
void keep_nearest(const GroupAlignment& g, const Corners& corners, float* narrow) {
  for (int k = 0; k < kCorners; ++k) {
    for (int i = 0; i < kGroup; ++i) {
      float& at = narrow[corners.cell[k][i]];
      at = g.z[i] < at ? g.z[i] : at;
    }
  }
}

// Aligns a part of the tokens with view t: every `step`-th batch of blocks, beginning with `first`.
void align_tokens(const Tokens& tokens, const VisibleBlocks& blocks, const std::vector<GroupBounds>& bounds, index_t t,
                  size_t first, size_t step, const ViewCamera& camera, const Frustum& frustum, float near,
                  const Grid& grid, Partial& partial) {
  partial.start(grid.cells);
  int32_t visible[kGroups];
  Corners corners;
  for (size_t b = first; b < bounds.size(); b += step) {
    const index_t block = static_cast<index_t>(b) * kBlocks;
    if (!blocks.by(t, block, std::min(block + kBlocks, blocks.size()))) continue;
    const int number = visible_groups(bounds[b], frustum, visible);
    for (int k = 0; k < number; ++k) {
      const index_t begin = bounds[b].row(visible[k]);
      GroupAlignment& g = partial.groups.emplace_back();
      if (!align_group(tokens, begin, static_cast<int>(std::min<index_t>(kGroup, tokens.count - begin)), camera, near,
                       static_cast<float>(grid.width), static_cast<float>(grid.height), g)) {
        partial.groups.pop_back();
        continue;
      }
      partial.any_wide |= g.wide;
      find_corners(g, grid.height, grid.width, corners);
      keep_nearest(g, corners, partial.narrow.data());
    }
  }
}

// The holes of one view: cells that no token reaches while it counts as one cell large. A larger footprint may close
// them.
class Holes {
 public:
  Holes(const std::vector<float>& surface, const Grid& grid) : surface_(surface), grid_(grid) {
    if (std::find(surface.begin(), surface.end(), kInfinity) == surface.end()) return;
    near_.assign((grid.height + 2 * kBorder) * stride(), 0);
    spread();
  }

  bool none() const { return near_.empty(); }

  // Calls f(lane, cell, distance) for every hole that the footprint of a token of the group reaches.
  template <typename F>
  void for_each(const GroupAlignment& g, const F& f) const {
    if (near_.empty() || !g.wide) return;
    for (int i = 0; i < kGroup; ++i) {
      if (!(g.radius[i] > kTokenReach) || g.u[i] <= -kHoleReachCells) continue;
      const int column = floor_cell(g.u[i]), row = floor_cell(g.v[i]);
      if (!near_[(row + kBorder) * stride() + column + kBorder]) continue;
      for (int r = std::max(row - kHoleReachCells, 0); r <= std::min(row + kHoleReachCells, grid_.height - 1); ++r) {
        for (int c = std::max(column - kHoleReachCells, 0); c <= std::min(column + kHoleReachCells, grid_.width - 1);
             ++c) {
          const int cell = r * grid_.width + c;
          if (surface_[cell] != kInfinity) continue;
          const float distance = cell_distance(g.u[i], g.v[i], c, r);
          if (distance <= g.radius[i] * g.radius[i]) f(i, cell, distance);
        }
      }
    }
  }

 private:
  // A projection may lie kHoleReachCells outside of the grid, and marks reach as far again.
  static constexpr int kBorder = 2 * kHoleReachCells;

  index_t stride() const { return grid_.width + 2 * kBorder; }

  // Marks every cell within kHoleReachCells rows and columns of a hole: first along rows, then along columns.
  void spread() {
    std::vector<uint8_t> rows(near_.size(), 0);
    for (int r = 0; r < grid_.height; ++r) {
      uint8_t* __restrict__ to = rows.data() + (r + kBorder) * stride() + kBorder;
      const float* from = surface_.data() + index_t{r} * grid_.width;
      for (int shift = -kHoleReachCells; shift <= kHoleReachCells; ++shift)
        for (int c = 0; c < grid_.width; ++c) to[c + shift] |= from[c] == kInfinity;
    }
    for (int r = kHoleReachCells; r < grid_.height + 2 * kBorder - kHoleReachCells; ++r) {
      uint8_t* __restrict__ to = near_.data() + r * stride();
      for (int shift = -kHoleReachCells; shift <= kHoleReachCells; ++shift) {
        const uint8_t* from = rows.data() + (r + shift) * stride();
        for (index_t c = 0; c < stride(); ++c) to[c] |= from[c];
      }
    }
  }

  const std::vector<float>& surface_;
  const Grid& grid_;
  std::vector<uint8_t> near_;
};

// Finds the pairs of token and cell to insert, corner by corner, 1 or 0 for each: those up to the depth `limit`, which
// is negative for misses, whose score is no worse than `worst`, the last one on the cell's list.
MIRAGE_SIMD
void choose_pairs(const GroupAlignment& g, const Corners& corners, const float* __restrict__ limit,
                  const float* __restrict__ worst, float* __restrict__ score, uint8_t* __restrict__ keep) {
  for (int k = 0; k < kCorners; ++k) {
    for (int i = 0; i < kGroup; ++i) {
      const int32_t cell = corners.cell[k][i];
      score[k * kGroup + i] = corners.distance[k][i] + g.score_bias[i];
      keep[k * kGroup + i] = (g.z[i] <= limit[cell]) & (score[k * kGroup + i] <= worst[cell]);
    }
  }
}

MIRAGE_SIMD
void merge_best(Best* to, const Best* from, index_t count) {
  for (index_t cell = 0; cell < count; ++cell)
    for (int k = 0; k < kBlendTokens; ++k) to[cell].insert(from[cell].keys[k]);
}

// The nearest depths over all parts of one view.
std::vector<float> merged(const Partial* partials, index_t number, index_t cells,
                          std::vector<float> Partial::* member) {
  std::vector<float> all(cells, kInfinity);
  for (index_t s = 0; s < number; ++s)
    if (!(partials[s].*member).empty()) lower(all.data(), (partials[s].*member).data(), cells);
  return all;
}

MIRAGE_SIMD
void find_best(Partial& partial, const std::vector<float>& narrow, const std::vector<float>& wide, const Grid& grid) {
  const Holes holes(narrow, grid);
  std::vector<float> limit(grid.cells + kGroup, -1.0f), worst(grid.cells + kGroup, kInfinity);
  for (index_t cell = 0; cell < grid.cells; ++cell)
    limit[cell] = kDepthTolerance * (narrow[cell] != kInfinity ? narrow[cell] : wide[cell]);
  Best* best = partial.best.data();
  const auto insert = [&](int32_t cell, float score, uint32_t token) {
    best[cell].insert(static_cast<int64_t>(make_key(score, token)));
    const int64_t last = best[cell].keys[kBlendTokens - 1];
    worst[cell] = last == static_cast<int64_t>(kNoToken) ? kInfinity : key_depth(last);
  };
  Corners corners;
  alignas(64) float score[kCorners * kGroup];
  alignas(64) uint8_t keep[kCorners * kGroup];
  for (const GroupAlignment& g : partial.groups) {
    find_corners(g, grid.height, grid.width, corners);
    choose_pairs(g, corners, limit.data(), worst.data(), score, keep);
    for (int word = 0; word < kCorners * kGroup; word += 8) {
      uint64_t bytes;
      __builtin_memcpy(&bytes, keep + word, 8);
      for (; bytes != 0; bytes &= bytes - 1) {
        const int at = word + __builtin_ctzll(bytes) / 8;
        insert(corners.cell[at / kGroup][at % kGroup], score[at], g.first + at % kGroup);
      }
    }
    holes.for_each(g, [&](int i, int cell, float distance) {
      if (g.z[i] <= limit[cell]) insert(cell, distance + g.score_bias[i], g.first + i);
    });
  }
}

// Finds the depths in the holes that `narrow`, taken over all parts of the view, leaves.
void close_holes(const std::vector<float>& narrow, const Grid& grid, Partial& partial) {
  if (!partial.any_wide) return;
  const Holes holes(narrow, grid);
  if (holes.none()) return;
  partial.wide.assign(grid.cells, kInfinity);
  for (const GroupAlignment& g : partial.groups)
    holes.for_each(g, [&](int i, int cell, float) { partial.wide[cell] = std::min(partial.wide[cell], g.z[i]); });
}

std::vector<GroupBounds> bound_groups(const Tokens& tokens, const VisibleBlocks& blocks) {
  std::vector<GroupBounds> bounds(divide_up(blocks.size(), kBlocks));
  torch::stable::parallel_for(0, static_cast<int64_t>(bounds.size()), 8, [&](int64_t begin, int64_t end) {
    PointBatch batch{};
    for (int64_t b = begin; b < end; ++b) {
      const index_t first = b * kBlocks;
      load_blocks(tokens.points, tokens.count, blocks.from(first), std::min<index_t>(kBlocks, blocks.size() - first),
                  batch);
      bounds[b] = batch;
    }
  });
  return bounds;
}

// Fills keys (T, cells, kBlendTokens) of all views.
void fill_keys(const Tokens& tokens, const std::optional<Tensor>& boxes, index_t capacity,
               const std::vector<ViewCamera>& cameras, const Grid& grid, float near, int64_t* keys) {
  const index_t threads = torch::stable::get_num_threads();
  std::vector<Frustum> frusta;
  for (const ViewCamera& camera : cameras)
    frusta.push_back(make_frustum(camera.projection, near, grid.width, grid.height, kHoleReachCells));
  const VisibleBlocks blocks(boxes, capacity, tokens.count, frusta);
  const std::vector<GroupBounds> bounds = bound_groups(tokens, blocks);
  const auto alignment = [&](index_t t, index_t s, index_t number, Partial& partial) {
    align_tokens(tokens, blocks, bounds, t, s, number, cameras[t], frusta[t], near, grid, partial);
  };
  const auto store = [&](const Best* best, index_t t, index_t cell, index_t count) {
    std::copy_n(reinterpret_cast<const int64_t*>(best + cell), count * kBlendTokens,
                keys + (t * grid.cells + cell) * kBlendTokens);
  };

  if (grid.views >= threads) {  // each thread takes one view after the other until none is left
    std::atomic<index_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      Partial partial;
      for (index_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < grid.views;) {
        alignment(t, 0, 1, partial);
        close_holes(merged(&partial, 1, grid.cells, &Partial::narrow), grid, partial);
        find_best(partial, merged(&partial, 1, grid.cells, &Partial::narrow),
                  merged(&partial, 1, grid.cells, &Partial::wide), grid);
        store(partial.best.data(), t, 0, grid.cells);
      }
    });
    return;
  }

  // There are fewer views than threads, so the tokens of each view are divided into parts.
  const index_t most = std::min<index_t>(divide_up(threads, grid.views), 8);
  const index_t number = std::clamp<index_t>(static_cast<index_t>(bounds.size()) / 4, 1, most);
  std::vector<Partial> partials(number * grid.views);
  const auto for_partials = [&](const auto& f) {
    torch::stable::parallel_for(0, grid.views * number, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        f(k / number, k % number, partials.data() + k / number * number, partials[k]);
    });
  };
  for_partials([&](index_t t, index_t s, const Partial*, Partial& partial) { alignment(t, s, number, partial); });
  for_partials([&](index_t, index_t, const Partial* all, Partial& partial) {
    close_holes(merged(all, number, grid.cells, &Partial::narrow), grid, partial);
  });
  for_partials([&](index_t, index_t, const Partial* all, Partial& partial) {
    find_best(partial, merged(all, number, grid.cells, &Partial::narrow),
              merged(all, number, grid.cells, &Partial::wide), grid);
  });
  torch::stable::parallel_for(0, grid.views * grid.cells, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const index_t t = at / grid.cells, cell = at % grid.cells, n = std::min<index_t>(end - at, grid.cells - cell);
      Partial* all = partials.data() + t * number;
      for (index_t s = 1; s < number; ++s) merge_best(all[0].best.data() + cell, all[s].best.data() + cell, n);
      store(all[0].best.data(), t, cell, n);
      at += n;
    }
  });
}

template <typename In>
MIRAGE_INLINE void blend_rows(const Blend& blend, const FeatureRows<In>& features, float* __restrict__ out) {
  const index_t channels = features.channels;
  const In* __restrict__ row = features.row(blend.token[0]);
  uint8_t scale = features.scale(blend.token[0]);
  for (index_t c = 0; c < channels; ++c) out[c] = blend.weight[0] * feature_value(row[c], scale);
  for (int k = 1; k < blend.count; ++k) {
    row = features.row(blend.token[k]);
    scale = features.scale(blend.token[k]);
    for (index_t c = 0; c < channels; ++c) out[c] = out[c] + blend.weight[k] * feature_value(row[c], scale);
  }
}

MIRAGE_SIMD
void blend_into(const Blend& blend, const FeatureRows<float>& features, float* out) {
  blend_rows(blend, features, out);
}

MIRAGE_SIMD
void blend_into(const Blend& blend, const FeatureRows<Half>& features, float* out) { blend_rows(blend, features, out); }

MIRAGE_SIMD
void blend_into(const Blend& blend, const FeatureRows<BFloat16>& features, float* out) {
  blend_rows(blend, features, out);
}

MIRAGE_SIMD
void blend_into(const Blend& blend, const FeatureRows<Float8>& features, float* out) {
  const index_t channels = features.channels;
  bool regular = channels >= kCodes;
  for (int k = 0; k < blend.count; ++k) regular &= in_cache(features.scale(blend.token[k]));
  if (!regular) return blend_rows(blend, features, out);
  for (index_t c = 0; c < channels; c += kCodes) {
    const index_t at = std::min(c, channels - kCodes);  // the last sixteen may overlap the ones before
    CodeFloats sum[2];
    for (int k = 0; k < blend.count; ++k) {
      const index_t token = blend.token[k];
      const CodeBits bits = decode_codes(features.row(token) + at, features.scale(token));
      for (int half = 0; half < 2; ++half) {
        const CodeFloats part = blend.weight[k] * widen_codes(bits, half);
        sum[half] = k == 0 ? part : sum[half] + part;
      }
    }
    __builtin_memcpy(out + at, sum, sizeof(sum));
  }
}

struct Outputs {
  bool* mask;
  float* depth;
  int64_t* index;
};

template <typename In, typename Out>
void write_readout(const int64_t* keys, const Tokens& tokens, const std::vector<ViewCamera>& cameras,
                   const FeatureRows<In>& features, const Grid& grid, float sharpness, const Outputs& outputs,
                   Out* latents) {
  const index_t tiles = divide_up(grid.cells, kTile), channels = features.channels;
  torch::stable::parallel_for(0, grid.views * tiles, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> blended(kTile * channels);
    std::vector<Out> converted(std::is_same_v<Out, float> ? 0 : kTile * channels);
    const std::vector<Out> zeros(channels, Out(0.0f));
    Blend blends[2][kTile];
    const auto prepare = [&](int64_t task) {
      const index_t t = task / tiles, first = task % tiles * kTile, at = t * grid.cells + first;
      const int count = static_cast<int>(std::min<index_t>(kTile, grid.cells - first));
      for (int k = 0; k < count; ++k) {
        Blend& blend = blends[task % 2][k];
        blend = make_blend(keys + (at + k) * kBlendTokens, sharpness);
        outputs.mask[at + k] = blend.count > 0;
        outputs.index[at + k] = blend.count > 0 ? static_cast<int64_t>(blend.token[0]) : -1;
        if (blend.count > 0) __builtin_prefetch(tokens.points + index_t{4} * blend.token[0]);
        for (int n = 0; n < blend.count; ++n) features.prefetch(blend.token[n]);
      }
      return count;
    };
    // Blends are prepared one tile ahead, so that their rows are being prefetched while this tile is blended.
    int count = prepare(begin);
    for (int64_t task = begin; task < end; ++task) {
      const int next = task + 1 < end ? prepare(task + 1) : 0;
      const index_t t = task / tiles, first = task % tiles * kTile;
      const auto& m = cameras[t].projection.m[2];
      float* depth = outputs.depth + t * grid.cells + first;
      const Out* rows[kTile];
      for (int k = 0; k < count; ++k) {
        const Blend& blend = blends[task % 2][k];
        rows[k] = zeros.data();
        depth[k] = 0.0f;
        if (blend.count == 0) continue;
        const float* p = tokens.points + index_t{4} * blend.token[0];
        depth[k] = ((m[0] * p[0] + m[1] * p[1]) + m[2] * p[2]) + m[3];
        float* row = blended.data() + k * channels;
        blend_into(blend, features, row);
        if constexpr (std::is_same_v<Out, float>) {
          rows[k] = row;
        } else {
          Out* narrow = converted.data() + k * channels;
          for (index_t c = 0; c < channels; ++c) narrow[c] = static_cast<Out>(row[c]);
          rows[k] = narrow;
        }
      }
      transpose_tile(rows, count, channels, latents + t * channels * grid.cells + first, grid.cells);
      count = next;
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> splat_aligned(
    const Tensor& points_, const Tensor& features_, const std::optional<Tensor>& num_points, const Tensor& frame_ids_,
    const Tensor& frame_centers_, const Tensor& intrinsics_, const Tensor& cam2world_, int64_t height, int64_t width,
    double near, double sharpness, ScalarType dtype, const std::optional<Tensor>& bounds,
    const std::optional<Tensor>& scales) {
  const Tensor points = checked(points_, ScalarType::Float, "points");
  const Tensor features = as_contiguous(features_);
  const Tensor frame_ids = checked(frame_ids_, ScalarType::Int, "frame_ids");
  const Tensor frame_centers = checked(frame_centers_, ScalarType::Float, "frame_centers");
  const Tensor intrinsics = checked(intrinsics_, ScalarType::Double, "intrinsics");
  const Tensor cam2world = checked(cam2world_, ScalarType::Double, "cam2world");
  const index_t channels = features.size(1);
  const Grid grid{cam2world.size(0), height * width, static_cast<int>(height), static_cast<int>(width)};
  const Tokens tokens{input<float>(points), live_points(num_points, points.size(0)), input<int32_t>(frame_ids),
                      input<float>(frame_centers), frame_centers.size(0)};
  std::vector<ViewCamera> cameras(grid.views);
  for (index_t t = 0; t < grid.views; ++t)
    cameras[t] = make_view_camera(input<double>(intrinsics) + t * 9, input<double>(cam2world) + t * 16);

  Tensor latents = new_tensor({grid.views, channels, height, width}, dtype);
  Tensor mask = new_tensor({grid.views, height, width}, ScalarType::Bool);
  Tensor depth = new_tensor({grid.views, height, width}, ScalarType::Float);
  Tensor index = new_tensor({grid.views, height, width}, ScalarType::Long);
  Tensor keys = new_tensor({grid.views, height, width, kBlendTokens}, ScalarType::Long);
  if (grid.views * grid.cells == 0) return {latents, mask, depth, index, keys};

  fill_keys(tokens, bounds, points.size(0), cameras, grid, static_cast<float>(near), output<int64_t>(keys));
  const Outputs outputs{output<bool>(mask), output<float>(depth), output<int64_t>(index)};
  for_features(features, scales, [&](const auto& rows) {
    for_feature_type(dtype, [&](auto out) {
      write_readout(input<int64_t>(keys), tokens, cameras, rows, grid, static_cast<float>(sharpness), outputs,
                    output<decltype(out)>(latents));
    });
  });
  return {latents, mask, depth, index, keys};
}

// Gradients with respect to features and, if asked for, points. First cell by cell, for each token it blends; then
// token by token, the sum over its places in the keys, in order of view, cell and rank.
std::tuple<Tensor, Tensor> splat_aligned_backward(const Tensor& grad_latents_, const Tensor& points_,
                                                  const Tensor& features_, const Tensor& frame_ids_,
                                                  const Tensor& frame_centers_, const Tensor& intrinsics_,
                                                  const Tensor& cam2world_, const Tensor& keys_, double sharpness_,
                                                  bool of_points, const std::optional<Tensor>& scales) {
  const Tensor grad_latents = as_contiguous(grad_latents_), features = as_contiguous(features_);
  const Tensor points = checked(points_, ScalarType::Float, "points");
  const Tensor frame_ids = checked(frame_ids_, ScalarType::Int, "frame_ids");
  const Tensor frame_centers = checked(frame_centers_, ScalarType::Float, "frame_centers");
  const Tensor intrinsics = checked(intrinsics_, ScalarType::Double, "intrinsics");
  const Tensor cam2world = checked(cam2world_, ScalarType::Double, "cam2world");
  const Tensor keys = checked(keys_, ScalarType::Long, "keys");
  const index_t views = grad_latents.size(0), channels = grad_latents.size(1), width = grad_latents.size(3);
  const index_t cells = grad_latents.size(2) * width, count = points.size(0), places = views * cells * kBlendTokens;
  const float sharpness = static_cast<float>(sharpness_);
  const Tokens tokens{input<float>(points), count, input<int32_t>(frame_ids), input<float>(frame_centers),
                      frame_centers.size(0)};
  std::vector<ViewCamera> cameras(views);
  for (index_t t = 0; t < views; ++t)
    cameras[t] = make_view_camera(input<double>(intrinsics) + t * 9, input<double>(cam2world) + t * 16);
  const int64_t* key = input<int64_t>(keys);

  std::vector<float> rows(views * cells * channels), weights(places, 0.0f), slopes(of_points ? places : 0, 0.0f);
  for_feature_type(grad_latents.scalar_type(), [&](auto type) {
    const auto* grad = input<decltype(type)>(grad_latents);
    torch::stable::parallel_for(0, views * cells, 64, [&](int64_t begin, int64_t end) {
      // Sixteen cells at a time share the cache lines of every channel.
      for (int64_t start = begin; start < end; start += 16) {
        const int64_t stop = std::min<int64_t>(start + 16, end);
        for (index_t c = 0; c < channels; ++c)
          for (int64_t at = start; at < stop; ++at)
            rows[at * channels + c] = static_cast<float>(grad[(at / cells * channels + c) * cells + at % cells]);
      }
    });
  });
  for_features(features, scales, [&](const auto& held) {
    torch::stable::parallel_for(0, views * cells, 64, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const Blend blend = make_blend(key + at * kBlendTokens, sharpness);
        std::copy_n(blend.weight, blend.count, weights.data() + at * kBlendTokens);
        if (!of_points || blend.count == 0) continue;
        float dots[kBlendTokens] = {};
        for (int k = 0; k < blend.count; ++k) {
          const auto* row = held.row(blend.token[k]);
          const uint8_t scale = held.scale(blend.token[k]);
          for (index_t c = 0; c < channels; ++c) dots[k] += rows[at * channels + c] * feature_value(row[c], scale);
        }
        score_slopes(blend, dots, sharpness, slopes.data() + at * kBlendTokens);
      }
    });
  });

  // Places in the keys, grouped by token with a stable counting sort.
  std::vector<index_t> first(count + 1, 0);
  for (index_t at = 0; at < places; ++at)
    if (weights[at] > 0.0f) ++first[key_index(key[at]) + index_t{1}];
  for (index_t i = 0; i < count; ++i) first[i + 1] += first[i];
  std::vector<index_t> sorted(first[count]);
  std::vector<index_t> next(first.begin(), first.end() - 1);
  for (index_t at = 0; at < places; ++at)
    if (weights[at] > 0.0f) sorted[next[key_index(key[at])]++] = at;

  Tensor grad_features = new_tensor({scales.has_value() ? 0 : count, channels}, features.scalar_type());
  Tensor grad_points = new_tensor({of_points ? count : 0, 4}, ScalarType::Float);
  for_stored_type(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* out = output<T>(grad_features);
    float* out_points = output<float>(grad_points);
    torch::stable::parallel_for(0, count, 256, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(channels);
      for (int64_t i = begin; i < end; ++i) {
        if constexpr (!std::is_same_v<T, Float8>) {  // float8 features have no gradient
          std::fill(sum.begin(), sum.end(), 0.0f);
          for (index_t n = first[i]; n < first[i + 1]; ++n) {
            const float weight = weights[sorted[n]];
            const float* row = rows.data() + sorted[n] / kBlendTokens * channels;
            for (index_t c = 0; c < channels; ++c) sum[c] += weight * row[c];
          }
          for (index_t c = 0; c < channels; ++c) out[i * channels + c] = static_cast<T>(sum[c]);
        }
        if (!of_points) continue;
        const float* point = tokens.points + 4 * i;
        float writer_center[3], total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int axis = 0; axis < 3; ++axis) writer_center[axis] = tokens.center(tokens.frame_ids[i], axis);
        for (index_t n = first[i]; n < first[i + 1];) {
          const index_t t = sorted[n] / kBlendTokens / cells;
          const Alignment alignment = align_token(cameras[t], point[0], point[1], point[2], point[3], writer_center);
          float slope_u = 0.0f, slope_v = 0.0f, slope = 0.0f;
          for (; n < first[i + 1] && sorted[n] / kBlendTokens / cells == t; ++n) {
            const float s = slopes[sorted[n]];
            const index_t cell = sorted[n] / kBlendTokens % cells;
            slope_u += s * (2.0f * (alignment.u - (static_cast<float>(cell % width) + 0.5f)));
            slope_v += s * (2.0f * (alignment.v - (static_cast<float>(cell / width) + 0.5f)));
            slope += s;
          }
          add_alignment_gradient(cameras[t], point, writer_center, slope_u, slope_v, slope, total);
        }
        std::copy_n(total, 4, out_points + 4 * i);
      }
    });
  });
  return {grad_features, grad_points};
}

}  // namespace mirage::cpu

STABLE_TORCH_LIBRARY_IMPL(mirage, CPU, m) {
  m.impl("splat_aligned_compiled", TORCH_BOX(&mirage::cpu::splat_aligned));
  m.impl("splat_aligned_backward_compiled", TORCH_BOX(&mirage::cpu::splat_aligned_backward));
}

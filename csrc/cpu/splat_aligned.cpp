// splat_aligned on the CPU: nearest depths, then the best fits of every cell, view by view; then blending, tile by tile.
// Minima and best-of lists are the same in any order, so no schedule shows in the result.
//
// In: points (N, 4), features (N, C), frame_ids (N,), frame_centers (F, 3), cameras of T views.
// Out: latents (T, C, h, w), mask, depth, index (T, h, w), keys (T, h, w, kFits).
#include "../core/alignment_score.h"

#include <atomic>
#include <limits>

#include "common.h"
#include "feature_rows.h"
#include "transpose.h"

namespace mirage::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kCorners = 4;  // cells within kReach < 1 of a projection: two columns and two rows at most

typedef int64_t Keys __attribute__((vector_size(kFits * sizeof(int64_t))));
static_assert(kFits == 4);

// The kFits best keys of a cell in ascending order, in one vector register.
struct alignas(sizeof(Keys)) Best {
  Keys keys;

  // Without a branch: each place takes the middle of itself, its left neighbour and the new key.
  inline __attribute__((always_inline)) void insert(int64_t key) {
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

  // Of the camera that wrote a frame; NaN for a frame that the table lacks.
  float center(int32_t frame, int axis) const {
    return frame >= 0 && frame < frames ? frame_centers[3 * static_cast<index_t>(frame) + axis]
                                        : std::numeric_limits<float>::quiet_NaN();
  }
};

struct Grid {
  index_t views, cells;
  int height, width;
};

// A group of tokens in one view. A token out of view lies where it reaches no cell.
struct GroupFit {
  alignas(64) float u[kGroup], v[kGroup], z[kGroup], radius[kGroup], lack[kGroup];
  uint32_t first;
  bool wide;  // one of them may close holes
};

// What one thread knows of one view: its share of the tokens, and what it found there.
struct Share {
  std::vector<GroupFit> groups;
  std::vector<float> narrow;  // nearest depth of the tokens that reach a cell; kGroup more where misses go
  std::vector<float> wide;    // in holes, that of the tokens whose footprint reaches
  std::vector<Best> best;     // fits of each cell
  bool any_wide;

  void start(index_t cells) {
    groups.clear();
    any_wide = false;
    narrow.assign(cells + kGroup, kInfinity);
    wide.clear();
    best.assign(cells, Best{Keys{} + static_cast<int64_t>(kNoFit)});
  }
};

// Where the token may be narrow: cells of its four corners, `cells` + lane for one that it does not reach, and its squared
// distances to them.
struct Corners {
  alignas(64) int32_t cell[kCorners][kGroup];
  alignas(64) float distance[kCorners][kGroup];
};

MIRAGE_SIMD
void find_corners(const GroupFit& g, int height, int width, Corners& corners) {
  const int32_t misses = height * width;
  for (int i = 0; i < kGroup; ++i) {
    const float u = g.u[i], v = g.v[i];
    const int column = floor_cell(u - 0.5f), row = floor_cell(v - 0.5f);
    for (int k = 0; k < kCorners; ++k) {
      const int j = column + k % 2, r = row + k / 2;
      const float distance = cell_distance(u, v, j, r);
      const bool reached = (distance <= kReach * kReach) & (j >= 0) & (j < width) & (r >= 0) & (r < height);
      corners.cell[k][i] = reached ? r * width + j : misses + i;
      corners.distance[k][i] = distance;
    }
  }
}

// `count` tokens from `first` on, 1 to kGroup, as the reader sees them. False if none comes near a cell.
MIRAGE_SIMD
bool fit_group(const Tokens& tokens, index_t first, int count, const Reader& reader_, float near, float width,
               float height, GroupFit& g) {
  const Reader reader = reader_;
  alignas(64) float x[kGroup], y[kGroup], z[kGroup], footprint[kGroup], writer[3][kGroup];
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
    for (int i = 0; i < kGroup; ++i) writer[axis][i] = common;
    if (!one_frame)
      for (int i = 0; i < count; ++i) writer[axis][i] = tokens.center(ids[i], axis);
  }
  alignas(64) int32_t near_a_cell[kGroup], closes_holes[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    const float from[3] = {writer[0][i], writer[1][i], writer[2][i]};
    const Fit fit = fit_token(reader, x[i], y[i], z[i], footprint[i], from);
    const bool around = around_view(fit.u, fit.v, fit.z, near, width, height);
    g.u[i] = around ? fit.u : -8.0f;
    g.v[i] = around ? fit.v : -8.0f;
    g.z[i] = around ? fit.z : kInfinity;
    g.radius[i] = fit.radius;
    g.lack[i] = around ? fit.lack : 0.0f;
    near_a_cell[i] = around ? 1 : 0;
    closes_holes[i] = fit.radius > kReach ? 1 : 0;
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

// Stored either way: which of two tokens is nearer is a coin toss that no branch predictor wins.
void keep_nearest(const GroupFit& g, const Corners& corners, float* narrow) {
  for (int k = 0; k < kCorners; ++k) {
    for (int i = 0; i < kGroup; ++i) {
      float& at = narrow[corners.cell[k][i]];
      at = g.z[i] < at ? g.z[i] : at;
    }
  }
}

// Fits one share of the tokens to view t: every `step`-th batch of blocks from `first` on.
void fit_share(const Tokens& tokens, const SeenBlocks& blocks, const std::vector<GroupBounds>& bounds, index_t t,
               size_t first, size_t step, const Reader& reader, const Frustum& frustum, float near, const Grid& grid,
               Share& share) {
  share.start(grid.cells);
  int32_t visible[kGroups];
  Corners corners;
  for (size_t b = first; b < bounds.size(); b += step) {
    const index_t block = static_cast<index_t>(b) * kBlocks;
    if (!blocks.by(t, block, std::min(block + kBlocks, blocks.size()))) continue;
    const int number = visible_groups(bounds[b], frustum, visible);
    for (int k = 0; k < number; ++k) {
      const index_t begin = bounds[b].row(visible[k]);
      GroupFit& g = share.groups.emplace_back();
      if (!fit_group(tokens, begin, static_cast<int>(std::min<index_t>(kGroup, tokens.count - begin)), reader, near,
                     static_cast<float>(grid.width), static_cast<float>(grid.height), g)) {
        share.groups.pop_back();
        continue;
      }
      share.any_wide |= g.wide;
      find_corners(g, grid.height, grid.width, corners);
      keep_nearest(g, corners, share.narrow.data());
    }
  }
}

// The holes of one view, cells that no token reaches, for the tokens whose footprint may close them.
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
  void for_each(const GroupFit& g, const F& f) const {
    if (near_.empty() || !g.wide) return;
    for (int i = 0; i < kGroup; ++i) {
      if (!(g.radius[i] > kReach) || g.u[i] <= -kHoleReach) continue;
      const int column = floor_cell(g.u[i]), row = floor_cell(g.v[i]);
      if (!near_[(row + kBorder) * stride() + column + kBorder]) continue;
      for (int r = std::max(row - kHoleReach, 0); r <= std::min(row + kHoleReach, grid_.height - 1); ++r) {
        for (int c = std::max(column - kHoleReach, 0); c <= std::min(column + kHoleReach, grid_.width - 1); ++c) {
          const int cell = r * grid_.width + c;
          if (surface_[cell] != kInfinity) continue;
          const float distance = cell_distance(g.u[i], g.v[i], c, r);
          if (distance <= g.radius[i] * g.radius[i]) f(i, cell, distance);
        }
      }
    }
  }

 private:
  // A projection may lie kHoleReach outside of the grid, and what is marked reaches as far again.
  static constexpr int kBorder = 2 * kHoleReach;

  index_t stride() const { return grid_.width + 2 * kBorder; }

  // Marks every cell from which a hole is within kHoleReach rows and columns: first along rows, then along columns.
  void spread() {
    std::vector<uint8_t> rows(near_.size(), 0);
    for (int r = 0; r < grid_.height; ++r) {
      uint8_t* __restrict__ to = rows.data() + (r + kBorder) * stride() + kBorder;
      const float* from = surface_.data() + index_t{r} * grid_.width;
      for (int shift = -kHoleReach; shift <= kHoleReach; ++shift)
        for (int c = 0; c < grid_.width; ++c) to[c + shift] |= from[c] == kInfinity;
    }
    for (int r = kHoleReach; r < grid_.height + 2 * kBorder - kHoleReach; ++r) {
      uint8_t* __restrict__ to = near_.data() + r * stride();
      for (int shift = -kHoleReach; shift <= kHoleReach; ++shift) {
        const uint8_t* from = rows.data() + (r + shift) * stride();
        for (index_t c = 0; c < stride(); ++c) to[c] |= from[c];
      }
    }
  }

  const std::vector<float>& surface_;
  const Grid& grid_;
  std::vector<uint8_t> near_;
};

// Which pairs of tokens and cells are in front of `limit`, in which misses are negative, and fit no worse than `worst`, the
// last score of a cell: 1 or 0 a pair, corner by corner.
MIRAGE_SIMD
void choose_pairs(const GroupFit& g, const Corners& corners, const float* __restrict__ limit,
                  const float* __restrict__ worst, float* __restrict__ score, uint8_t* __restrict__ keep) {
  for (int k = 0; k < kCorners; ++k) {
    for (int i = 0; i < kGroup; ++i) {
      const int32_t cell = corners.cell[k][i];
      score[k * kGroup + i] = corners.distance[k][i] + g.lack[i];
      keep[k * kGroup + i] = (g.z[i] <= limit[cell]) & (score[k * kGroup + i] <= worst[cell]);
    }
  }
}

MIRAGE_SIMD
void merge_best(Best* to, const Best* from, index_t count) {
  for (index_t cell = 0; cell < count; ++cell)
    for (int k = 0; k < kFits; ++k) to[cell].insert(from[cell].keys[k]);
}

// Nearest depths over all shares of one view.
std::vector<float> merged(const Share* shares, index_t number, index_t cells, std::vector<float> Share::* member) {
  std::vector<float> all(cells, kInfinity);
  for (index_t s = 0; s < number; ++s)
    if (!(shares[s].*member).empty()) lower(all.data(), (shares[s].*member).data(), cells);
  return all;
}

MIRAGE_SIMD
void find_best(Share& share, const std::vector<float>& narrow, const std::vector<float>& wide, const Grid& grid) {
  const Holes holes(narrow, grid);
  std::vector<float> limit(grid.cells + kGroup, -1.0f), worst(grid.cells + kGroup, kInfinity);
  for (index_t cell = 0; cell < grid.cells; ++cell)
    limit[cell] = kGate * (narrow[cell] != kInfinity ? narrow[cell] : wide[cell]);
  Best* best = share.best.data();
  const auto insert = [&](int32_t cell, float score, uint32_t token) {
    best[cell].insert(static_cast<int64_t>(make_key(score, token)));
    const int64_t last = best[cell].keys[kFits - 1];
    worst[cell] = last == static_cast<int64_t>(kNoFit) ? kInfinity : key_depth(last);
  };
  Corners corners;
  alignas(64) float score[kCorners * kGroup];
  alignas(64) uint8_t keep[kCorners * kGroup];
  for (const GroupFit& g : share.groups) {
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
      if (g.z[i] <= limit[cell]) insert(cell, distance + g.lack[i], g.first + i);
    });
  }
}

// Depths in the holes that `narrow`, over all shares of the view, leaves.
void close_holes(const std::vector<float>& narrow, const Grid& grid, Share& share) {
  if (!share.any_wide) return;
  const Holes holes(narrow, grid);
  if (holes.none()) return;
  share.wide.assign(grid.cells, kInfinity);
  for (const GroupFit& g : share.groups)
    holes.for_each(g, [&](int i, int cell, float) { share.wide[cell] = std::min(share.wide[cell], g.z[i]); });
}

std::vector<GroupBounds> bound_groups(const Tokens& tokens, const SeenBlocks& blocks) {
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

// keys (T, cells, kFits) of all views.
void fill_keys(const Tokens& tokens, const std::optional<Tensor>& boxes, index_t capacity,
               const std::vector<Reader>& readers, const Grid& grid, float near, int64_t* keys) {
  const index_t threads = torch::stable::get_num_threads();
  std::vector<Frustum> frusta;
  for (const Reader& reader : readers)
    frusta.push_back(make_frustum(reader.projection, near, grid.width, grid.height, kHoleReach));
  const SeenBlocks blocks(boxes, capacity, tokens.count, frusta);
  const std::vector<GroupBounds> bounds = bound_groups(tokens, blocks);
  const auto fit = [&](index_t t, index_t s, index_t number, Share& share) {
    fit_share(tokens, blocks, bounds, t, s, number, readers[t], frusta[t], near, grid, share);
  };
  const auto store = [&](const Best* best, index_t t, index_t cell, index_t count) {
    std::copy_n(reinterpret_cast<const int64_t*>(best + cell), count * kFits, keys + (t * grid.cells + cell) * kFits);
  };

  if (grid.views >= threads) {  // a thread takes one view after the other, until none is left
    std::atomic<index_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      Share share;
      for (index_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < grid.views;) {
        fit(t, 0, 1, share);
        close_holes(merged(&share, 1, grid.cells, &Share::narrow), grid, share);
        find_best(share, merged(&share, 1, grid.cells, &Share::narrow), merged(&share, 1, grid.cells, &Share::wide),
                  grid);
        store(share.best.data(), t, 0, grid.cells);
      }
    });
    return;
  }

  // Fewer views than threads: the tokens of each are dealt into shares.
  const index_t most = std::min<index_t>(divide_up(threads, grid.views), 8);
  const index_t number = std::clamp<index_t>(static_cast<index_t>(bounds.size()) / 4, 1, most);
  std::vector<Share> shares(number * grid.views);
  const auto for_shares = [&](const auto& f) {
    torch::stable::parallel_for(0, grid.views * number, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) f(k / number, k % number, shares.data() + k / number * number, shares[k]);
    });
  };
  for_shares([&](index_t t, index_t s, const Share*, Share& share) { fit(t, s, number, share); });
  for_shares([&](index_t, index_t, const Share* all, Share& share) {
    close_holes(merged(all, number, grid.cells, &Share::narrow), grid, share);
  });
  for_shares([&](index_t, index_t, const Share* all, Share& share) {
    find_best(share, merged(all, number, grid.cells, &Share::narrow), merged(all, number, grid.cells, &Share::wide),
              grid);
  });
  torch::stable::parallel_for(0, grid.views * grid.cells, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const index_t t = at / grid.cells, cell = at % grid.cells, n = std::min<index_t>(end - at, grid.cells - cell);
      Share* all = shares.data() + t * number;
      for (index_t s = 1; s < number; ++s) merge_best(all[0].best.data() + cell, all[s].best.data() + cell, n);
      store(all[0].best.data(), t, cell, n);
      at += n;
    }
  });
}

template <typename In>
inline __attribute__((always_inline)) void blend_rows(const Blend& blend, const Features<In>& features,
                                                      float* __restrict__ out) {
  const index_t channels = features.channels;
  const In* __restrict__ row = features.row(blend.token[0]);
  uint8_t scale = features.scale(blend.token[0]);
  for (index_t c = 0; c < channels; ++c) out[c] = blend.share[0] * feature_value(row[c], scale);
  for (int k = 1; k < blend.count; ++k) {
    row = features.row(blend.token[k]);
    scale = features.scale(blend.token[k]);
    for (index_t c = 0; c < channels; ++c) out[c] = out[c] + blend.share[k] * feature_value(row[c], scale);
  }
}

MIRAGE_SIMD
void blend_into(const Blend& blend, const Features<float>& features, float* out) { blend_rows(blend, features, out); }

MIRAGE_SIMD
void blend_into(const Blend& blend, const Features<Half>& features, float* out) { blend_rows(blend, features, out); }

MIRAGE_SIMD
void blend_into(const Blend& blend, const Features<BFloat16>& features, float* out) {
  blend_rows(blend, features, out);
}

MIRAGE_SIMD
void blend_into(const Blend& blend, const Features<Float8>& features, float* out) {
  const index_t channels = features.channels;
  bool regular = channels >= kCodes;
  for (int k = 0; k < blend.count; ++k) regular &= in_cache(features.scale(blend.token[k]));
  if (!regular) return blend_rows(blend, features, out);
  for (index_t c = 0; c < channels; c += kCodes) {
    const index_t at = std::min(c, channels - kCodes);  // the last sixteen may overlap those before
    CodeFloats sum[2];
    for (int k = 0; k < blend.count; ++k) {
      const index_t token = blend.token[k];
      const CodeBits bits = decode_codes(features.row(token) + at, features.scale(token));
      for (int half = 0; half < 2; ++half) {
        const CodeFloats part = blend.share[k] * widen_codes(bits, half);
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
void read_out(const int64_t* keys, const Tokens& tokens, const std::vector<Reader>& readers,
              const Features<In>& features, const Grid& grid, float sharpness, const Outputs& outputs, Out* latents) {
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
        blend = make_blend(keys + (at + k) * kFits, sharpness);
        outputs.mask[at + k] = blend.count > 0;
        outputs.index[at + k] = blend.count > 0 ? static_cast<int64_t>(blend.token[0]) : -1;
        if (blend.count > 0) __builtin_prefetch(tokens.points + index_t{4} * blend.token[0]);
        for (int n = 0; n < blend.count; ++n) features.prefetch(blend.token[n]);
      }
      return count;
    };
    // Prepared one tile ahead, so that the rows are on the way while this tile is blended.
    int count = prepare(begin);
    for (int64_t task = begin; task < end; ++task) {
      const int next = task + 1 < end ? prepare(task + 1) : 0;
      const index_t t = task / tiles, first = task % tiles * kTile;
      const auto& m = readers[t].projection.m[2];
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
  std::vector<Reader> readers(grid.views);
  for (index_t t = 0; t < grid.views; ++t)
    readers[t] = make_reader(input<double>(intrinsics) + t * 9, input<double>(cam2world) + t * 16);

  Tensor latents = new_tensor({grid.views, channels, height, width}, dtype);
  Tensor mask = new_tensor({grid.views, height, width}, ScalarType::Bool);
  Tensor depth = new_tensor({grid.views, height, width}, ScalarType::Float);
  Tensor index = new_tensor({grid.views, height, width}, ScalarType::Long);
  Tensor keys = new_tensor({grid.views, height, width, kFits}, ScalarType::Long);
  if (grid.views * grid.cells == 0) return {latents, mask, depth, index, keys};

  fill_keys(tokens, bounds, points.size(0), readers, grid, static_cast<float>(near), output<int64_t>(keys));
  const Outputs outputs{output<bool>(mask), output<float>(depth), output<int64_t>(index)};
  for_features(features, scales, [&](const auto& rows) {
    for_feature_type(dtype, [&](auto out) {
      read_out(input<int64_t>(keys), tokens, readers, rows, grid, static_cast<float>(sharpness), outputs,
               output<decltype(out)>(latents));
    });
  });
  return {latents, mask, depth, index, keys};
}

// Gradients to features and, if asked for, to points. Cell by cell, what each of its tokens gets; then token by token, the
// sum over the places it has, in order of view, cell and fit.
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
  const index_t cells = grad_latents.size(2) * width, count = points.size(0), places = views * cells * kFits;
  const float sharpness = static_cast<float>(sharpness_);
  const Tokens tokens{input<float>(points), count, input<int32_t>(frame_ids), input<float>(frame_centers),
                      frame_centers.size(0)};
  std::vector<Reader> readers(views);
  for (index_t t = 0; t < views; ++t)
    readers[t] = make_reader(input<double>(intrinsics) + t * 9, input<double>(cam2world) + t * 16);
  const int64_t* key = input<int64_t>(keys);

  std::vector<float> rows(views * cells * channels), shares(places, 0.0f), slopes(of_points ? places : 0, 0.0f);
  for_feature_type(grad_latents.scalar_type(), [&](auto type) {
    const auto* grad = input<decltype(type)>(grad_latents);
    torch::stable::parallel_for(0, views * cells, 64, [&](int64_t begin, int64_t end) {
      // Sixteen cells at a time share the lines of every channel.
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
        const Blend blend = make_blend(key + at * kFits, sharpness);
        std::copy_n(blend.share, blend.count, shares.data() + at * kFits);
        if (!of_points || blend.count == 0) continue;
        float dots[kFits] = {};
        for (int k = 0; k < blend.count; ++k) {
          const auto* row = held.row(blend.token[k]);
          const uint8_t scale = held.scale(blend.token[k]);
          for (index_t c = 0; c < channels; ++c) dots[k] += rows[at * channels + c] * feature_value(row[c], scale);
        }
        fit_slopes(blend, dots, sharpness, slopes.data() + at * kFits);
      }
    });
  });

  // Places by token: a stable counting sort.
  std::vector<index_t> first(count + 1, 0);
  for (index_t at = 0; at < places; ++at)
    if (shares[at] > 0.0f) ++first[key_index(key[at]) + index_t{1}];
  for (index_t i = 0; i < count; ++i) first[i + 1] += first[i];
  std::vector<index_t> sorted(first[count]);
  std::vector<index_t> next(first.begin(), first.end() - 1);
  for (index_t at = 0; at < places; ++at)
    if (shares[at] > 0.0f) sorted[next[key_index(key[at])]++] = at;

  Tensor grad_features = new_tensor({scales.has_value() ? 0 : count, channels}, features.scalar_type());
  Tensor grad_points = new_tensor({of_points ? count : 0, 4}, ScalarType::Float);
  for_stored_type(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* out = output<T>(grad_features);
    float* out_points = output<float>(grad_points);
    torch::stable::parallel_for(0, count, 256, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(channels);
      for (int64_t i = begin; i < end; ++i) {
        if constexpr (!std::is_same_v<T, Float8>) {  // which have no gradient
          std::fill(sum.begin(), sum.end(), 0.0f);
          for (index_t n = first[i]; n < first[i + 1]; ++n) {
            const float share = shares[sorted[n]];
            const float* row = rows.data() + sorted[n] / kFits * channels;
            for (index_t c = 0; c < channels; ++c) sum[c] += share * row[c];
          }
          for (index_t c = 0; c < channels; ++c) out[i * channels + c] = static_cast<T>(sum[c]);
        }
        if (!of_points) continue;
        const float* point = tokens.points + 4 * i;
        float writer[3], total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int axis = 0; axis < 3; ++axis) writer[axis] = tokens.center(tokens.frame_ids[i], axis);
        for (index_t n = first[i]; n < first[i + 1];) {
          const index_t t = sorted[n] / kFits / cells;
          const Fit fit = fit_token(readers[t], point[0], point[1], point[2], point[3], writer);
          float slope_u = 0.0f, slope_v = 0.0f, slope = 0.0f;
          for (; n < first[i + 1] && sorted[n] / kFits / cells == t; ++n) {
            const float s = slopes[sorted[n]];
            const index_t cell = sorted[n] / kFits % cells;
            slope_u += s * (2.0f * (fit.u - (static_cast<float>(cell % width) + 0.5f)));
            slope_v += s * (2.0f * (fit.v - (static_cast<float>(cell / width) + 0.5f)));
            slope += s;
          }
          add_fit_gradient(readers[t], point, writer, slope_u, slope_v, slope, total);
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

// view_overlap on the CPU: points are partitioned by voxel, each part counts its own voxels, and the counts are summed.
//
// In: points (N, 4), cameras of V earlier and T target views. Out: (V, 2), voxels seen by both and by either.
#include "../core/voxel.h"
#include "culling.h"
#include "projection.h"

namespace mirage::cpu {
namespace {

constexpr int kPartBits = 8;
constexpr index_t kParts = index_t{1} << kPartBits;

inline uint64_t mix(uint64_t key) { return key * 0x9e3779b97f4a7c15ull; }

// Sets `bit` for every point of the batch that the view sees; there are `count` points in all.
void mark_seen(const PointBatch& batch, index_t count, const Projection& projection, const Frustum& frustum, float near,
               int width, int height, uint64_t bit, uint64_t* seen) {
  int32_t groups[kGroups];
  alignas(64) int32_t cell[kBatch];
  alignas(64) float depth[kBatch];
  const int visible = visible_groups(batch, frustum, groups);
  project_groups(batch, groups, visible, projection, near, width, height, cell, depth);
  for (int k = 0; k < visible; ++k) {
    const index_t first = batch.row(groups[k]), here = std::min<index_t>(kGroup, count - first);
    for (index_t i = 0; i < here; ++i) seen[first + i] |= cell[k * kGroup + i] >= 0 ? bit : 0;
  }
}

}  // namespace

Tensor view_overlap(const Tensor& points_, const std::optional<Tensor>& num_points, const Tensor& intrinsics_,
                    const Tensor& cam2world_, const Tensor& target_intrinsics_, const Tensor& target_cam2world_,
                    int64_t height, int64_t width, double voxel_size, double near_,
                    const std::optional<Tensor>& bounds) {
  const Tensor points = checked(points_, ScalarType::Float, "points");
  const Tensor intrinsics = checked(intrinsics_, ScalarType::Double, "intrinsics");
  const Tensor cam2world = checked(cam2world_, ScalarType::Double, "cam2world");
  const Tensor target_intrinsics = checked(target_intrinsics_, ScalarType::Double, "target_intrinsics");
  const Tensor target_cam2world = checked(target_cam2world_, ScalarType::Double, "target_cam2world");
  const std::vector<Projection> views = make_projections(intrinsics, cam2world);
  const std::vector<Projection> targets = make_projections(target_intrinsics, target_cam2world);
  const index_t live = live_points(num_points, points.size(0)), num_views = static_cast<index_t>(views.size());
  const float* xyz = input<float>(points);
  const float size = static_cast<float>(voxel_size), near = static_cast<float>(near_);
  const int w = static_cast<int>(width), h = static_cast<int>(height);
  std::vector<Frustum> frusta;  // of the views, then of the targets
  for (const std::vector<Projection>* projections : {&views, &targets})
    for (const Projection& p : *projections) frusta.push_back(make_frustum(p, near, w, h, 0));

  // The points that any view may see, numbered through their blocks: all blocks except the last are full.
  const VisibleBlocks blocks(bounds, points.size(0), live, frusta);
  const auto row = [&](index_t i) { return index_t{*blocks.from(i / kBlockTokens)} * kBlockTokens + i % kBlockTokens; };
  const index_t last = blocks.size() - 1;
  const index_t count =
      last < 0 ? 0 : last * kBlockTokens + std::min<index_t>(kBlockTokens, live - row(last * kBlockTokens));

  // Partition: the keys of all points, then a stable counting sort of the points by the top bits of their mixed key.
  std::vector<uint64_t> keys(count);
  const index_t slices = std::clamp<index_t>(divide_up(count, 8192), 1, torch::stable::get_num_threads());
  std::vector<std::vector<index_t>> place(slices, std::vector<index_t>(kParts, 0));
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      for (index_t i = count * s / slices; i < count * (s + 1) / slices; ++i) {
        const float* p = xyz + 4 * row(i);
        keys[i] = voxel_key(p[0], p[1], p[2], size);
        ++place[s][mix(keys[i]) >> (64 - kPartBits)];
      }
    }
  });
  std::vector<index_t> part_begin(kParts + 1, 0);
  index_t running = 0;
  for (index_t part = 0; part < kParts; ++part) {
    part_begin[part] = running;
    for (index_t s = 0; s < slices; ++s) {
      const index_t n = place[s][part];
      place[s][part] = running;
      running += n;
    }
  }
  part_begin[kParts] = running;
  std::vector<uint32_t> order(count);
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      for (index_t i = count * s / slices; i < count * (s + 1) / slices; ++i)
        order[place[s][mix(keys[i]) >> (64 - kPartBits)]++] = static_cast<uint32_t>(i);
  });

  // Count: each part numbers its voxels in a small table, then takes 64 views at a time, one bit each.
  std::vector<std::vector<int64_t>> counts(kParts, std::vector<int64_t>(2 * num_views, 0));
  torch::stable::parallel_for(0, kParts, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> table_keys;
    std::vector<int32_t> table_ids, voxel;
    std::vector<float> local;
    std::vector<uint64_t> seen, voxel_seen;
    std::vector<uint8_t> target_seen;
    PointBatch batch{};
    for (int64_t part = begin; part < end; ++part) {
      const index_t first = part_begin[part], n = part_begin[part + 1] - first;
      if (n == 0) continue;
      index_t slots = 16;
      int shift = 60;
      while (slots < 2 * n) {
        slots *= 2;
        --shift;
      }
      table_keys.assign(slots, 0);
      table_ids.assign(slots, -1);
      voxel.resize(n);
      local.resize(4 * n);
      int32_t voxels = 0;
      for (index_t k = 0; k < n; ++k) {
        const index_t i = order[first + k];
        std::copy_n(xyz + 4 * row(i), 4, local.begin() + 4 * k);
        const uint64_t key = keys[i];
        index_t slot = static_cast<index_t>((mix(key) << kPartBits) >> shift);
        while (table_ids[slot] >= 0 && table_keys[slot] != key) slot = (slot + 1) & (slots - 1);
        if (table_ids[slot] < 0) {
          table_ids[slot] = voxels++;
          table_keys[slot] = key;
        }
        voxel[k] = table_ids[slot];
      }
      seen.resize(n);
      const VisibleBlocks own(std::nullopt, n, n, {});
      const auto mark_views = [&](const Projection* projections, const Frustum* frusta, index_t number) {
        std::fill(seen.begin(), seen.end(), 0);
        for (index_t b = 0; b < own.size(); b += kBlocks) {
          load_blocks(local.data(), n, own.from(b), std::min<index_t>(kBlocks, own.size() - b), batch);
          for (index_t v = 0; v < number; ++v)
            mark_seen(batch, n, projections[v], frusta[v], near, w, h, uint64_t{1} << (v % 64), seen.data());
        }
      };
      mark_views(targets.data(), frusta.data() + num_views, static_cast<index_t>(targets.size()));
      target_seen.assign(voxels, 0);
      index_t target_count = 0;
      for (index_t k = 0; k < n; ++k) target_seen[voxel[k]] |= seen[k] != 0;
      for (const uint8_t one : target_seen) target_count += one;
      for (index_t first_view = 0; first_view < num_views; first_view += 64) {
        const index_t number = std::min<index_t>(64, num_views - first_view);
        mark_views(views.data() + first_view, frusta.data() + first_view, number);
        voxel_seen.assign(voxels, 0);
        for (index_t k = 0; k < n; ++k) voxel_seen[voxel[k]] |= seen[k];
        int64_t* both = counts[part].data() + 2 * first_view;
        for (index_t v = 0; v < number; ++v) both[2 * v + 1] = target_count;
        for (int32_t m = 0; m < voxels; ++m) {
          for (uint64_t bits = voxel_seen[m]; bits != 0; bits &= bits - 1)
            ++both[2 * __builtin_ctzll(bits) + (target_seen[m] ? 0 : 1)];
        }
      }
    }
  });

  Tensor result = new_tensor({num_views, 2}, ScalarType::Long);
  int64_t* sums = output<int64_t>(result);
  std::fill(sums, sums + 2 * num_views, 0);
  for (const auto& part : counts)
    for (index_t k = 0; k < 2 * num_views; ++k) sums[k] += part[k];
  return result;
}

}  // namespace mirage::cpu

STABLE_TORCH_LIBRARY_IMPL(mirage, CPU, m) { m.impl("view_overlap_compiled", TORCH_BOX(&mirage::cpu::view_overlap)); }

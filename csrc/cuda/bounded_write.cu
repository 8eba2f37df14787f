// bounded_write on CUDA: all views are lifted and classified at once; then, view after view, every held token is
// compared with what the view sees, every cell requests a slot in its voxel or in the place of a held token, and what
// is granted is written.
//
// In: latents (T, C, h, w), depth (T, H, W), cameras, mask, order (h w,). In place: points, features, frame_ids,
// free_space_violations, num_observations, count, bounds, scales. Out: the counts of WRITE_REPORT.
//
// Nothing depends on the order of threads: the token that covers a cell best is a minimum, the tokens of a voxel are
// counted, and a chain of minima keeps the first requests for a voxel, as splat_aligned keeps the best tokens of a
// cell.
#include "../core/bounded_write_rules.h"
#include "block_boxes.cuh"
#include "token_status.cuh"

namespace mirage::cuda {
namespace {

constexpr int kThreads = kBlockTokens;
// Thread blocks per processor in the comparison with held tokens: 48 registers a thread.
constexpr int kObserveBlocks = 5;
// Places in the order that one thread block writes: as many as one pass of store_rows takes.
constexpr int kPlaces = 32;
constexpr unsigned kInvalidRequest = 0xffffffffu;
constexpr unsigned long long kFreeBucket = kNoVoxel;

enum SlotRequest : uint8_t { kNoRequest, kRefuse, kCover, kReplace, kReplaceIfRoom, kMerge, kAddIfRoom };

// Buffers of the cache, except the features.
struct Held {
  float4* points;
  int32_t* frame_ids;
  uint8_t* free_space_violations;
  uint8_t* num_observations;  // or null
  index_t capacity;
  const float* frame_centers;
  int frames;
};

struct Grid {
  int height, width, cells;
  float near;
  int views_per_voxel, carve_views;
};

// Which blocks of held tokens must be compared with a view: those it may see, those that share voxels with its tokens,
// and those this call has written to, whose boxes are out of date.
struct BlockFilter {
  const float* boxes;  // null: all blocks
  unsigned* touched;   // by block, 0 or 1
};

// A view, and what it shows, by cell.
struct NewView {
  const ViewCamera* camera;
  const Frustum* frustum;
  // Around the voxels of its tokens: least x, y, z as ordered integers, the bits of the greatest ones inverted, so that
  // all are minima; then the inverted bits of its greatest depth.
  const unsigned* voxel_box;
  const float4* tokens;
  const float* depths;   // 0 where unknown
  const float* nearest;  // least depth, infinite where no depth is valid
  const uint8_t* statuses;
};

// The voxels that tokens of one view would enter: a hash table with open addressing, at most half full.
struct Voxels {
  const unsigned long long* keys;
  unsigned* occupancy;     // live tokens of each voxel
  unsigned* slot_winners;  // (size, views_per_voxel): behind the occupied slots, the first requests for the others
  const int32_t* buckets;  // of each cell's token, where it is kept
  index_t size;
};

// How many of every kPlaces places add a token, and of every kPlaces^2.
struct AddedTokens {
  int* blocks;
  int* groups;
};

__device__ __forceinline__ uint64_t voxel_of(const float4& p) { return token_voxel(p.x, p.y, p.z, p.w); }

// Where the search for a voxel begins: the upper bits of a product mix all bits of the key.
__device__ __forceinline__ index_t voxel_bucket(unsigned long long voxel, index_t size) {
  return static_cast<index_t>((voxel * 0x9e3779b97f4a7c15ull) >> 34) & (size - 1);
}

// The float that an ordered integer stands for.
__device__ __forceinline__ float from_ordered(unsigned number) {
  return bits_float(static_cast<unsigned>(ordered(static_cast<int>(number ^ 0x80000000u))));
}

// Makes the cameras of the token grid from those of the depth map, and notes the rows in use before the first view, -1
// where the count is out of range.
__global__ void make_view_cameras_kernel(const double* intrinsics, const double* cam2world, DepthSource source,
                                         float near, const int64_t* count, index_t capacity, ViewCamera* cameras,
                                         Frustum* frusta, int64_t* live) {
  const index_t t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t == 0) *live = *count >= 0 && *count <= capacity ? *count : -1;
  if (t >= source.views) return;
  const double sx = static_cast<double>(source.width) / static_cast<double>(source.depth_width);
  const double sy = static_cast<double>(source.height) / static_cast<double>(source.depth_height);
  const double* k = intrinsics + t * 9;
  const double grid[9] = {k[0] * sx, k[1] * sx, k[2] * sx, k[3] * sy, k[4] * sy, k[5] * sy, k[6], k[7], k[8]};
  const ViewCamera camera = make_view_camera(grid, cam2world + t * 16);
  cameras[t] = camera;
  frusta[t] = make_frustum(camera.projection, near, static_cast<int>(source.width), static_cast<int>(source.height), 0);
}

constexpr int kViewBox = kBoxSize + 1;

// Inserts the voxels of all new tokens, each view's into a table of its own, and extends the view's box around them.
// Which bucket a voxel gets may change from run to run; the results depend only on its having one.
__global__ void __launch_bounds__(kThreads)
    insert_voxels_kernel(const float4* __restrict__ tokens, const uint8_t* __restrict__ statuses,
                         const float* __restrict__ depths, index_t cells, index_t size, unsigned long long* keys,
                         unsigned* boxes, int32_t* __restrict__ buckets) {
  const index_t parts = (cells + kThreads - 1) / kThreads, t = blockIdx.x / parts;
  const index_t cell = blockIdx.x % parts * kThreads + threadIdx.x, token = t * cells + cell;
  const bool inserts = cell < cells && statuses[token] == kKept;
  float4 p = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (inserts) {
    p = tokens[token];
    const unsigned long long voxel = voxel_of(p);
    unsigned long long* table = keys + t * size;
    index_t bucket = voxel_bucket(voxel, size);
    for (;; bucket = (bucket + 1) & (size - 1)) {
      const unsigned long long found = __ldcg(table + bucket);
      if (found == voxel) break;
      if (found != kFreeBucket) continue;
      const unsigned long long before = atomicCAS(table + bucket, kFreeBucket, voxel);
      if (before == kFreeBucket || before == voxel) break;
    }
    buckets[token] = static_cast<int32_t>(bucket);
  }
  const float xyz[3] = {p.x, p.y, p.z};
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    const float reach = token_voxel_reach(xyz[j], p.w);
    const int low = warp_min(inserts ? ordered(static_cast<int>(float_bits(xyz[j] - reach))) : 0x7fffffff);
    const int high = warp_max(inserts ? ordered(static_cast<int>(float_bits(xyz[j] + reach))) : ~0x7fffffff);
    if (threadIdx.x % 32 == 0) {
      atomicMin(boxes + t * kViewBox + j, static_cast<unsigned>(low) ^ 0x80000000u);
      atomicMin(boxes + t * kViewBox + 3 + j, ~(static_cast<unsigned>(high) ^ 0x80000000u));
    }
  }
  const int depth = warp_max(cell < cells ? static_cast<int>(float_bits(depths[token])) : 0);
  if (threadIdx.x % 32 == 0) atomicMin(boxes + t * kViewBox + kBoxSize, ~static_cast<unsigned>(depth));
}

// Whether tokens of a block must be compared with the view. Where a view enters no voxel its box is NaN, and shares
// none.
__device__ __forceinline__ bool may_be_observed(const BlockFilter& bounds, index_t block, const NewView& view) {
  if (bounds.boxes == nullptr || bounds.touched[block] != 0) return true;
  float box[kBoxSize];
  bool shares = true;
#pragma unroll
  for (int j = 0; j < kBoxSize; ++j) box[j] = __ldg(bounds.boxes + block * kBoxSize + j);
#pragma unroll
  for (int j = 0; j < 3; ++j)
    shares &= (box[j] <= from_ordered(~__ldg(view.voxel_box + 3 + j))) &
              (box[3 + j] >= from_ordered(__ldg(view.voxel_box + j)));
  const float farthest = farthest_relevant(bits_float(~__ldg(view.voxel_box + kBoxSize)));
  return shares || (may_see(*view.frustum, box) && !lies_beyond(*view.frustum, farthest, box));
}

__device__ __forceinline__ void count_in_voxel(const Voxels& voxels, const float4& p) {
  const unsigned long long voxel = voxel_of(p);
  for (index_t bucket = voxel_bucket(voxel, voxels.size);; bucket = (bucket + 1) & (voxels.size - 1)) {
    const unsigned long long found = __ldg(voxels.keys + bucket);
    if (found == voxel) atomicAdd(voxels.occupancy + bucket, 1u);
    if (found == voxel || found == kFreeBucket) return;
  }
}

// Whether a view sees through a token: the surface in its cell lies behind, and the cells around show free space there.
__device__ __forceinline__ bool sees_through(const NewView& view, const Projected& at, float surface,
                                             const Grid& grid) {
  if (!is_clearly_behind(surface, at.z)) return false;
#pragma unroll 1  // four cells at once spill
  for (int k = 0; k < 4; ++k) {
    const int cell = surrounding_cell(at.u, at.v, grid.height, grid.width, k);
    if (!is_free_at(at.z, __ldg(view.nearest + cell), __ldg(view.depths + cell))) return false;
  }
  return true;
}

// Compares a held token with a view: updates its free-space violations, counts it in its voxel if the view enters that,
// and enters it as the best token of its cell if it covers the cell best. Returns whether it was carved.
__device__ __forceinline__ bool observe(const Held& held, index_t i, const ViewCamera& camera, const NewView& view,
                                        const Grid& grid, const Voxels& voxels, unsigned long long* best) {
  const int violations = held.free_space_violations[i];
  if (violations == kInvalid) return false;
  const float4 p = held.points[i];
  const Projected at = project_point(camera.projection, p.x, p.y, p.z);
  int column = 0, row = 0, cell = 0;
  bool on_held_surface = false;
  if (in_view(at, grid.near, static_cast<float>(grid.width), static_cast<float>(grid.height))) {
    column = static_cast<int>(at.u);
    row = static_cast<int>(at.v);
    cell = row * grid.width + column;
    const float surface = __ldg(view.depths + cell);
    on_held_surface = on_surface(at.z, surface);
    if (grid.carve_views > 0) {
      const bool through = sees_through(view, at, surface, grid);
      int updated = through ? violations + 1 : (on_held_surface ? 0 : violations);
      const bool carved = through && updated >= grid.carve_views;
      if (carved) updated = kInvalid;
      if (updated != violations) held.free_space_violations[i] = static_cast<uint8_t>(updated);
      if (carved) return true;
    }
  }
  count_in_voxel(voxels, p);
  if (!on_held_surface || __ldg(view.statuses + cell) != kKept) return false;
  const int32_t frame = held.frame_ids[i];
  const bool known = frame >= 0 && frame < held.frames;
  float writer_center[3];
#pragma unroll
  for (int axis = 0; axis < 3; ++axis)
    writer_center[axis] = known ? __ldg(held.frame_centers + index_t{3} * frame + axis) : bits_float(0x7fc00000u);
  const Alignment alignment = align_token(camera, p.x, p.y, p.z, p.w, writer_center);
  const float score = cell_distance(alignment.u, alignment.v, column, row) + alignment.score_bias;
  if (!covers(score, alignment.score_bias)) return false;
  const unsigned long long key = make_key(score, static_cast<uint32_t>(i));
  if (key < __ldcg(best + cell)) atomicMin(best + cell, key);
  return false;
}

// Compares every held token that matters with the view. Clears the slot winners on the way.
__global__ void __launch_bounds__(kThreads, kObserveBlocks)
    observe_kernel(Held held, NewView view, Grid grid, Voxels voxels, BlockFilter bounds,
                   const int64_t* __restrict__ live_, unsigned long long* best, unsigned long long* carved_) {
  __shared__ index_t listed[kThreads];
  __shared__ int number;
  for (index_t k = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x; k < voxels.size * grid.views_per_voxel;
       k += static_cast<index_t>(gridDim.x) * kThreads)
    voxels.slot_winners[k] = kInvalidRequest;
  const index_t live = *live_;
  int carved = 0;
  // A thread block tests as many blocks of tokens at a time as it has threads. Consecutive blocks, of which a view
  // often sees all or none, go to different thread blocks.
  for (index_t first = blockIdx.x; first * kBlockTokens < live; first += static_cast<index_t>(gridDim.x) * kThreads) {
    if (threadIdx.x == 0) number = 0;
    __syncthreads();
    const index_t block = first + static_cast<index_t>(threadIdx.x) * gridDim.x;
    if (block * kBlockTokens < live && may_be_observed(bounds, block, view)) listed[atomicAdd(&number, 1)] = block;
    __syncthreads();
    const ViewCamera camera = *view.camera;  // loaded only here: beside the tests above its registers would spill
    for (int k = 0; k < number; ++k) {
      const index_t i = listed[k] * kBlockTokens + threadIdx.x;
      if (i < live) carved += observe(held, i, camera, view, grid, voxels, best);
    }
    __syncthreads();
  }
  carved = warp_sum(carved);
  if (threadIdx.x % 32 == 0 && carved > 0) atomicAdd(carved_, static_cast<unsigned long long>(carved));
}

// What the cell's token requests, given the key of the held token that covers the cell best.
__device__ __forceinline__ SlotRequest request_of(const Held& held, const float4& token, unsigned long long key) {
  if (key == kEmptyKey) return kAddIfRoom;
  if (held.num_observations != nullptr) return kMerge;
  const float4 old = held.points[key_index(key)];
  if (!supersedes(key_depth(key), old.w, token.w)) return kCover;
  return voxel_of(old) == voxel_of(token) ? kReplace : kReplaceIfRoom;
}

// A request as a number: the place in the order, and in the lowest bit whether it adds a row.
__device__ __forceinline__ unsigned request_key(index_t place, SlotRequest request) {
  return static_cast<unsigned>(place) << 1 | (request == kAddIfRoom ? 1u : 0u);
}

// One thread per place in the order. A request enters the winners of its voxel, where earlier ones may displace it, so
// the number of places that add a token is right when the kernel ends. Returns false where no slot was free from the
// start.
__device__ __forceinline__ bool request_slot(const Voxels& voxels, const Grid& grid, index_t bucket, unsigned carried,
                                             const AddedTokens& added) {
  const int room = grid.views_per_voxel;
  const unsigned occupancy = voxels.occupancy[bucket];
  unsigned* slot_winners = voxels.slot_winners + bucket * room;
  // The plain load can only be stale towards "later", so it saves atomics and rejects no one wrongly.
  if (occupancy >= static_cast<unsigned>(room) || __ldcg(slot_winners + room - 1) < carried) return false;
  for (int k = static_cast<int>(occupancy); k < room && carried != kInvalidRequest; ++k)
    carried = max(atomicMin(slot_winners + k, carried), carried);
  if (carried != kInvalidRequest && (carried & 1u) != 0) {
    const unsigned place = carried >> 1;
    atomicAdd(added.blocks + place / kPlaces, -1);
    atomicAdd(added.groups + place / (kPlaces * kPlaces), -1);
  }
  return true;
}

__global__ void __launch_bounds__(kThreads)
    request_kernel(Held held, NewView view, Grid grid, Voxels voxels, const int32_t* __restrict__ order,
                   const unsigned long long* __restrict__ best, AddedTokens added, uint8_t* __restrict__ requests) {
  const index_t place = static_cast<index_t>(blockIdx.x) * kThreads + threadIdx.x;
  SlotRequest request = kNoRequest;
  if (place < grid.cells) {
    const int cell = order[place];
    if (view.statuses[cell] == kKept) request = request_of(held, view.tokens[cell], best[cell]);
    if (request == kAddIfRoom || request == kReplaceIfRoom) {
      if (!request_slot(voxels, grid, voxels.buckets[cell], request_key(place, request), added))
        request = request == kAddIfRoom ? kRefuse : kCover;
    }
    requests[place] = request;
  }
  // A warp makes the requests of one thread block's places.
  static_assert(kPlaces == 32);
  const int number = __popc(__ballot_sync(kFullWarp, request == kAddIfRoom));
  if (threadIdx.x % 32 == 0 && number > 0) {
    atomicAdd(added.blocks + place / kPlaces, number);
    atomicAdd(added.groups + place / (kPlaces * kPlaces), number);
  }
}

// Writes everything except the features of a token to `row`; returns the number of observations that it is averaged
// with, -1 where it is not.
__device__ __forceinline__ float commit_token(const Held& held, index_t row, const float4& token, int frame,
                                              bool merges) {
  float4 point = token;
  float num_observations = -1.0f;
  if (merges) {
    const float4 old = held.points[row];
    num_observations = static_cast<float>(held.num_observations[row]);
    held.num_observations[row] = min(held.num_observations[row] + 1, kMaxObservations);
    point = make_float4(running_mean(old.x, num_observations, token.x), running_mean(old.y, num_observations, token.y),
                        running_mean(old.z, num_observations, token.z), running_mean(old.w, num_observations, token.w));
    if (voxel_of(point) != voxel_of(old)) point = old;
  } else if (held.num_observations != nullptr) {
    held.num_observations[row] = 1;
  }
  held.points[row] = point;
  held.frame_ids[row] = frame;
  held.free_space_violations[row] = 0;
  return num_observations;
}

// A thread block writes what kPlaces places were granted: its first warp decides, all transpose the features.
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads, 4)
    commit_kernel(Held held, NewView view, Grid grid, Voxels voxels, const int32_t* __restrict__ order,
                  unsigned long long* __restrict__ best, AddedTokens added, const uint8_t* __restrict__ requests,
                  BlockFilter bounds, const In* __restrict__ latents, int channels, int frame, Out* features,
                  uint8_t* scales, int64_t* __restrict__ live_, int64_t* __restrict__ count,
                  unsigned long long* report) {
  __shared__ int parts[kThreads / 32];
  __shared__ index_t from[kPlaces];
  __shared__ index_t to[kPlaces];
  __shared__ float num_observations[kPlaces];
  __shared__ float factors[kPlaces];
  __shared__ int rows;
  __shared__ Tile tile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = blockIdx.x;

  // Tokens added by the thread blocks before.
  int before = 0;
  for (int k = threadIdx.x; k < block / kPlaces; k += kThreads) before += added.groups[k];
  if (threadIdx.x < block % kPlaces) before += added.blocks[block / kPlaces * kPlaces + threadIdx.x];
  before = warp_sum(before);
  if (lane == 0) parts[warp] = before;
  __syncthreads();

  if (warp == 0) {
    const index_t place = static_cast<index_t>(block) * kPlaces + lane;
    SlotRequest granted = kNoRequest;
    int cell = 0;
    unsigned long long key = 0;
    if (place < grid.cells) {
      cell = order[place];
      key = best[cell];
      best[cell] = kEmptyKey;  // for the next view
      granted = static_cast<SlotRequest>(requests[place]);
      if (granted == kAddIfRoom || granted == kReplaceIfRoom) {
        const index_t last = (voxels.buckets[cell] + index_t{1}) * grid.views_per_voxel - 1;
        if (voxels.slot_winners[last] < request_key(place, granted)) granted = granted == kAddIfRoom ? kRefuse : kCover;
      }
    }
    before = 0;
    for (int w = 0; w < kThreads / 32; ++w) before += parts[w];
    const unsigned below = (1u << lane) - 1u;
    const unsigned adding = __ballot_sync(kFullWarp, granted == kAddIfRoom);
    const index_t live = live_[0];
    index_t row = key_index(key);
    if (granted == kAddIfRoom) {
      row = live + before + __popc(adding & below);
      if (live < 0 || row >= held.capacity) granted = kRefuse;
    }
    const bool replaces = granted == kReplace || granted == kReplaceIfRoom;
    const bool moves = replaces || granted == kMerge || granted == kAddIfRoom;
    const unsigned moving = __ballot_sync(kFullWarp, moves);
    if (moves) {
      const int rank = __popc(moving & below);
      from[rank] = cell;
      to[rank] = row;
      num_observations[rank] = commit_token(held, row, view.tokens[cell], frame, granted == kMerge);
      factors[rank] = 1.0f;
      if constexpr (std::is_same_v<Out, Float8>) {
        if (granted == kMerge) factors[rank] = scale_factor(scales[row]);
      }
      if (bounds.boxes != nullptr) atomicOr(bounds.touched + row / kBlockTokens, 1u);
    }
    const int written = __popc(__ballot_sync(kFullWarp, granted == kAddIfRoom));
    const int counts[] = {
        written, __popc(__ballot_sync(kFullWarp, replaces)), __popc(__ballot_sync(kFullWarp, granted == kMerge)),
        __popc(__ballot_sync(kFullWarp, granted == kCover)), __popc(__ballot_sync(kFullWarp, granted == kRefuse))};
    static_assert(kReportWritten == 0 && kReportReplaced == 1 && kReportMerged == 2 && kReportCovered == 3 &&
                  kReportRefused == 4);
    if (lane == 0) {
      rows = __popc(moving);
#pragma unroll
      for (int k = 0; k < 5; ++k)
        if (counts[k] > 0) atomicAdd(report + k, static_cast<unsigned long long>(counts[k]));
      if (block == static_cast<int>(gridDim.x) - 1) {
        const index_t end = live < 0 ? live : min(live + before + __popc(adding), held.capacity);
        live_[1] = end;
        if (live >= 0) *count = end;
      }
    }
  }
  __syncthreads();
  store_rows<kThreads>(latents, grid.cells, channels, rows, from, to, features, scales, tile,
                       [&](int r, float value, index_t at) {
                         if (num_observations[r] < 0.0f) return value;
                         return running_mean(feature_value(features[at], factors[r]), num_observations[r], value);
                       });
}

}  // namespace

Tensor bounded_write(Tensor points, Tensor features, Tensor frame_ids, Tensor free_space_violations,
                     std::optional<Tensor> num_observations, Tensor count, const Tensor& frame_centers_,
                     const Tensor& latents_, const Tensor& depth_, const Tensor& intrinsics_, const Tensor& cam2world_,
                     const std::optional<Tensor>& mask_, const Tensor& order_, int64_t first_frame, bool bilinear,
                     double min_depth, double max_depth, double near, int64_t views_per_voxel, int64_t carve_views,
                     std::optional<Tensor> bounds, std::optional<Tensor> scales) {
  const torch::stable::accelerator::DeviceGuard guard(latents_.get_device_index());
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
  STD_TORCH_CHECK(is_aligned(points), "points must begin at a multiple of 16 bytes: they are written in place");
  checked_scales(features, scales);
  STD_TORCH_CHECK(!scales.has_value() || scales->is_contiguous(),
                  "scales must be contiguous: they are written in place");
  if (bounds.has_value()) check_bounds(*bounds, points.size(0));
  const cudaStream_t stream = current_stream(latents);
  const index_t channels = latents.size(1), height = latents.size(2), width = latents.size(3);
  const DepthSource source = make_source(depth, mask, height, width, bilinear);
  const index_t views = source.views, cells = height * width, tokens = views * cells, capacity = points.size(0);

  Tensor report = new_tensor(latents, {kReportSize}, ScalarType::Long);
  fill_bytes(report, 0, stream);
  if (tokens == 0) return report;
  // A voxel's bucket has 32 bits, and so has a place in the order with one bit more.
  STD_TORCH_CHECK(cells <= (index_t{1} << 29) && divide_up(tokens, kLiftThreads / 32) < (index_t{1} << 31),
                  "latents hold too many tokens for one write");
  index_t size = 2;
  while (size < 2 * cells) size *= 2;
  const Tensor lifts = make_lifts(intrinsics, cam2world, source, stream);
  static_assert(sizeof(ViewCamera) == 16 * sizeof(float) && sizeof(Frustum) == 31 * sizeof(float));
  Tensor cameras = new_tensor(latents, {views, 16}, ScalarType::Float);
  Tensor frusta = new_tensor(latents, {views, 31}, ScalarType::Float);
  Tensor live = new_tensor(latents, {views + 1}, ScalarType::Long);
  Tensor lifted = new_tensor(latents, {tokens, 4}, ScalarType::Float);
  Tensor depths = new_tensor(latents, {tokens}, ScalarType::Float);
  Tensor nearest = new_tensor(latents, {carve_views > 0 ? tokens : 0}, ScalarType::Float);
  Tensor statuses = new_tensor(latents, {tokens}, ScalarType::Byte);
  Tensor buckets = new_tensor(latents, {tokens}, ScalarType::Int);
  Tensor slot_winners = new_tensor(latents, {size, views_per_voxel}, ScalarType::Int);
  Tensor requests = new_tensor(latents, {cells}, ScalarType::Byte);
  const index_t blocks = divide_up(cells, kPlaces), groups = divide_up(blocks, kPlaces);
  const index_t held_blocks = bounds.has_value() ? divide_up(capacity, kBlockTokens) : 0;
  // What begins with all bits set, and what begins with none: keys of voxels by view, and the best tokens; live tokens
  // of voxels and numbers of tokens added by view, and which blocks are touched.
  Tensor ones = new_tensor(latents, {views * size + cells}, ScalarType::Long);
  Tensor zeros = new_tensor(latents, {views * (size + blocks + groups) + held_blocks}, ScalarType::Int);
  Tensor voxel_boxes = new_tensor(latents, {views, kViewBox}, ScalarType::Int);
  fill_bytes(ones, 0xff, stream);
  fill_bytes(zeros, 0, stream);
  fill_bytes(voxel_boxes, 0xff, stream);
  const auto keys = output<unsigned long long>(ones), best = keys + views * size;
  int* const numbers = output<int>(zeros);
  const BlockFilter boxes{bounds.has_value() ? input<float>(*bounds) : nullptr,
                          reinterpret_cast<unsigned*>(numbers + views * (size + blocks + groups))};

  make_view_cameras_kernel<<<static_cast<unsigned>(divide_up(views, 64)), 64, 0, stream>>>(
      input<double>(intrinsics), input<double>(cam2world), source, static_cast<float>(near), input<int64_t>(count),
      capacity, output<ViewCamera>(cameras), output<Frustum>(frusta), output<int64_t>(live));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  lift_kernel<<<static_cast<unsigned>(divide_up(tokens, kLiftThreads / 32)), kLiftThreads, 0, stream>>>(
      source, input<Lift>(lifts), static_cast<float>(min_depth), static_cast<float>(max_depth), output<float4>(lifted),
      output<uint8_t>(statuses), output<float>(depths), carve_views > 0 ? output<float>(nearest) : nullptr);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const auto counts = output<unsigned long long>(report);
  for_feature_type(latents.scalar_type(), [&](auto in) {
    using In = decltype(in);
    for_stored_type(features.scalar_type(), [&](auto out) {
      classify_kernel<In, decltype(out)><<<static_cast<unsigned>(divide_up(tokens, kTokens)), kTokens, 0, stream>>>(
          input<In>(latents), tokens, cells, static_cast<int>(channels), output<uint8_t>(statuses), nullptr,
          counts + kReportMasked - kMasked);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  insert_voxels_kernel<<<static_cast<unsigned>(views * divide_up(cells, kThreads)), kThreads, 0, stream>>>(
      input<float4>(lifted), input<uint8_t>(statuses), input<float>(depths), cells, size, keys,
      output<unsigned>(voxel_boxes), output<int32_t>(buckets));
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  const Held held{output<float4>(points),
                  output<int32_t>(frame_ids),
                  output<uint8_t>(free_space_violations),
                  num_observations.has_value() ? output<uint8_t>(*num_observations) : nullptr,
                  capacity,
                  input<float>(frame_centers),
                  static_cast<int>(frame_centers.size(0))};
  const Grid grid{static_cast<int>(height), static_cast<int>(width),           static_cast<int>(cells),
                  static_cast<float>(near), static_cast<int>(views_per_voxel), static_cast<int>(carve_views)};
  for (index_t t = 0; t < views; ++t) {
    const index_t first = t * cells;
    const NewView view{input<ViewCamera>(cameras) + t,
                       input<Frustum>(frusta) + t,
                       input<unsigned>(voxel_boxes) + t * kViewBox,
                       input<float4>(lifted) + first,
                       input<float>(depths) + first,
                       carve_views > 0 ? input<float>(nearest) + first : nullptr,
                       input<uint8_t>(statuses) + first};
    int* const counted = numbers + t * (size + blocks + groups);
    const Voxels voxels{keys + t * size, reinterpret_cast<unsigned*>(counted), output<unsigned>(slot_winners),
                        input<int32_t>(buckets) + first, size};
    const AddedTokens added{counted + size, counted + size + blocks};
    observe_kernel<<<grid_for(capacity, kThreads, 2 * kObserveBlocks), kThreads, 0, stream>>>(
        held, view, grid, voxels, boxes, input<int64_t>(live) + t, best, counts + kReportCarved);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    request_kernel<<<static_cast<unsigned>(divide_up(cells, kThreads)), kThreads, 0, stream>>>(
        held, view, grid, voxels, input<int32_t>(order), best, added, output<uint8_t>(requests));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    for_feature_type(latents.scalar_type(), [&](auto in) {
      using In = decltype(in);
      for_stored_type(features.scalar_type(), [&](auto out) {
        using Out = decltype(out);
        commit_kernel<In, Out><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
            held, view, grid, voxels, input<int32_t>(order), best, added, input<uint8_t>(requests), boxes,
            input<In>(latents) + first * channels, static_cast<int>(channels), static_cast<int>(first_frame + t),
            output<Out>(features), scales.has_value() ? output<uint8_t>(*scales) : nullptr, output<int64_t>(live) + t,
            output<int64_t>(count), counts);
      });
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  if (bounds.has_value()) update_bounds(points, output<int64_t>(count), boxes.touched, *bounds, stream);
  return report;
}

}  // namespace mirage::cuda

STABLE_TORCH_LIBRARY_IMPL(mirage, CUDA, m) {
  m.impl("bounded_write_compiled", TORCH_BOX(&mirage::cuda::bounded_write));
}

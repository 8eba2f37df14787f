// splat_aligned on CUDA: nearest depths, depths in the holes they leave, the best tokens of every cell, and their
// blend.
//
// In: points (N, 4), features (N, C), frame_ids (N,), frame_centers (F, 3), cameras of T views.
// Out: latents (T, C, h, w), mask, depth, index (T, h, w), keys (T, h, w, kBlendTokens). Minima by integer atomics, and
// best-of lists by a chain of them, are the same in any order of the tokens.
#include "../core/alignment_score.h"
#include "feature_rows.cuh"
#include "culling.cuh"

namespace mirage::cuda {
namespace {

constexpr int kCells = 32;     // cells per readout block: a warp's store is one 128-byte line of float32
constexpr int kChannels = 64;  // channels staged at a time
constexpr int kReadThreads = 256;
constexpr int kBlocks = 3;        // thread blocks per processor, of any kernel: 80 registers a thread
constexpr int kLaneChannels = 4;  // channels that a lane sums at a time in the backward pass
constexpr unsigned kNoDepth = 0xffffffffu;
constexpr int kViewCameraWords = sizeof(ViewCamera) / 4;
static_assert(sizeof(ViewCamera) == 64);

struct Tokens : Points {
  const int32_t* frame_ids;
  const float* frame_centers;
  int frames;
};

struct Views {
  const ViewCamera* cameras;
  int count, height, width;
  float near;
};

__global__ void make_view_cameras_kernel(const double* intrinsics, const double* cam2world, int views,
                                         ViewCamera* cameras) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t < views) cameras[t] = make_view_camera(intrinsics + t * 9, cam2world + t * 16);
}

__device__ __forceinline__ Alignment align_point(const Tokens& tokens, index_t i, const float4& p,
                                                 const ViewCamera& camera, float* writer_center) {
  const int32_t id = __ldg(tokens.frame_ids + i);
  const bool known = id >= 0 && id < tokens.frames;
  for (int axis = 0; axis < 3; ++axis)
    writer_center[axis] = known ? __ldg(tokens.frame_centers + index_t{3} * id + axis) : bits_float(0x7fc00000u);
  return align_token(camera, p.x, p.y, p.z, p.w, writer_center);
}

// Calls f(cell, distance) for the cells that the token reaches while it counts as one cell large.
template <typename F>
__device__ __forceinline__ void for_corners(const Alignment& alignment, int height, int width, const F& f) {
  const int column = floor_cell(alignment.u - 0.5f), row = floor_cell(alignment.v - 0.5f);
  for (int r = row; r <= row + 1; ++r) {
    for (int c = column; c <= column + 1; ++c) {
      const float distance = cell_distance(alignment.u, alignment.v, c, r);
      if (distance <= kTokenReach * kTokenReach && r >= 0 && r < height && c >= 0 && c < width)
        f(r * width + c, distance);
    }
  }
}

// Calls f(cell, distance) for the cells that its footprint reaches.
template <typename F>
__device__ __forceinline__ void for_footprint(const Alignment& alignment, int height, int width, const F& f) {
  const int column = floor_cell(alignment.u), row = floor_cell(alignment.v);
  for (int r = max(row - kHoleReachCells, 0); r <= min(row + kHoleReachCells, height - 1); ++r) {
    for (int c = max(column - kHoleReachCells, 0); c <= min(column + kHoleReachCells, width - 1); ++c) {
      const float distance = cell_distance(alignment.u, alignment.v, c, r);
      if (distance <= alignment.radius * alignment.radius) f(r * width + c, distance);
    }
  }
}

// Calls f(i, view, alignment) for every token and view where it comes near a cell.
template <typename F>
__device__ __forceinline__ void for_each_alignment(const Tokens& tokens, const Views& views, ViewCamera* shared,
                                                   const F& f) {
  const float limit_u = static_cast<float>(views.width), limit_v = static_cast<float>(views.height);
  for_each_point(tokens, views.cameras, views.count, shared,
                 [&](index_t i, const float4& p, int t, const ViewCamera& camera) {
                   float writer_center[3];
                   const Alignment alignment = align_point(tokens, i, p, camera, writer_center);
                   if (around_view(alignment.u, alignment.v, alignment.z, views.near, limit_u, limit_v))
                     f(i, t, alignment);
                 });
}

// The plain loads before atomics here can only be stale towards "farther" or "worse": they save atomics and lose no
// token.
__device__ __forceinline__ void lower_depth(unsigned* at, float z) {
  const unsigned bits = float_bits(z);
  if (bits < __ldcg(at)) atomicMin(at, bits);
}

__global__ void __launch_bounds__(kBlockTokens, kBlocks) nearest_kernel(Tokens tokens, Views views, unsigned* narrow) {
  __shared__ ViewCamera shared[kSharedViews];
  const index_t cells = static_cast<index_t>(views.height) * views.width;
  for_each_alignment(tokens, views, shared, [&](index_t, int t, const Alignment& alignment) {
    for_corners(alignment, views.height, views.width,
                [&](int cell, float) { lower_depth(narrow + t * cells + cell, alignment.z); });
  });
}

__global__ void __launch_bounds__(kBlockTokens, kBlocks)
    hole_kernel(Tokens tokens, Views views, const unsigned* __restrict__ narrow, unsigned* wide) {
  __shared__ ViewCamera shared[kSharedViews];
  const index_t cells = static_cast<index_t>(views.height) * views.width;
  for_each_alignment(tokens, views, shared, [&](index_t, int t, const Alignment& alignment) {
    if (!(alignment.radius > kTokenReach)) return;
    for_footprint(alignment, views.height, views.width, [&](int cell, float) {
      if (narrow[t * cells + cell] == kNoDepth) lower_depth(wide + t * cells + cell, alignment.z);
    });
  });
}

// Every place of a list keeps the lesser key and hands on the greater one. So the least keys that were inserted end up
// in the list, in order, however the insertions interleave.
__device__ __forceinline__ void insert_key(unsigned long long* list, unsigned long long key) {
  if (__ldcg(list + kBlendTokens - 1) < key) return;
  for (int k = 0; k < kBlendTokens && key != kNoToken; ++k) {
    if (__ldcg(list + k) < key) continue;
    const unsigned long long held = atomicMin(list + k, key);
    key = held < key ? key : held;
  }
}

__global__ void __launch_bounds__(kBlockTokens, kBlocks)
    best_kernel(Tokens tokens, Views views, const unsigned* __restrict__ narrow, const unsigned* __restrict__ wide,
                unsigned long long* keys) {
  __shared__ ViewCamera shared[kSharedViews];
  const index_t cells = static_cast<index_t>(views.height) * views.width;
  for_each_alignment(tokens, views, shared, [&](index_t i, int t, const Alignment& alignment) {
    const auto insert = [&](index_t at, unsigned surface, float distance) {
      if (alignment.z <= kDepthTolerance * bits_float(surface))
        insert_key(keys + at * kBlendTokens, make_key(distance + alignment.score_bias, static_cast<uint32_t>(i)));
    };
    for_corners(alignment, views.height, views.width, [&](int cell, float distance) {
      const index_t at = t * cells + cell;
      insert(at, narrow[at], distance);
    });
    if (!(alignment.radius > kTokenReach)) return;
    for_footprint(alignment, views.height, views.width, [&](int cell, float distance) {
      const index_t at = t * cells + cell;
      if (narrow[at] == kNoDepth) insert(at, wide[at], distance);
    });
  });
}

// A thread block reads out kCells neighbouring cells of one view: rows are blended along the channels, transposed in
// shared memory, and go out along the cells.
template <typename In, typename Out>
__global__ void __launch_bounds__(kReadThreads, kBlocks)
    readout_kernel(const int64_t* __restrict__ keys, const float4* __restrict__ points,
                   const ViewCamera* __restrict__ cameras, const In* __restrict__ features,
                   const uint8_t* __restrict__ scales, int channels, index_t cells, float sharpness,
                   Out* __restrict__ latents, bool* __restrict__ mask, float* __restrict__ depth,
                   int64_t* __restrict__ index) {
  __shared__ float tile[kCells][kChannels + 1];
  __shared__ Blend blends[kCells];
  __shared__ float factors[kCells][kBlendTokens];
  const index_t tiles = (cells + kCells - 1) / kCells;
  const index_t view = blockIdx.x / tiles, first = blockIdx.x % tiles * kCells;
  const int count = static_cast<int>(min(static_cast<index_t>(kCells), cells - first));
  if (threadIdx.x < count) {
    const index_t at = view * cells + first + threadIdx.x;
    const Blend blend = make_blend(keys + at * kBlendTokens, sharpness);
    Blend& shared = blends[threadIdx.x];
    shared.count = blend.count;
    for (int k = 0; k < kBlendTokens; ++k) {
      shared.token[k] = blend.token[k];
      shared.weight[k] = blend.weight[k];
      factors[threadIdx.x][k] = k < blend.count ? row_factor<In>(scales, blend.token[k]) : 1.0f;
    }
    const bool seen = blend.count > 0;
    mask[at] = seen;
    index[at] = seen ? static_cast<int64_t>(blend.token[0]) : -1;
    float z = 0.0f;
    if (seen) {
      const float4 p = __ldg(points + blend.token[0]);
      z = project_point(cameras[view].projection, p.x, p.y, p.z).z;
    }
    depth[at] = z;
  }
  for (int base = 0; base < channels; base += kChannels) {
    const int number = min(kChannels, channels - base);
    __syncthreads();
    for (int k = threadIdx.x; k < count * number; k += kReadThreads) {
      const int cell = k / number, c = k % number;
      const Blend& blend = blends[cell];
      float value = 0.0f;
      for (int n = 0; n < blend.count; ++n) {
        const In stored = features[blend.token[n] * static_cast<index_t>(channels) + base + c];
        const float part = blend.weight[n] * feature_value(stored, factors[cell][n]);
        value = n == 0 ? part : value + part;
      }
      tile[cell][c] = value;
    }
    __syncthreads();
    const int cell = threadIdx.x % kCells;
    if (cell < count)
      for (int c = threadIdx.x / kCells; c < number; c += kReadThreads / kCells)
        latents[(view * channels + base + c) * cells + first + cell] = from_float<Out>(tile[cell][c]);
  }
}

// Backward, cell by cell: the gradient's rows (T cells, C) and, for each place in the keys, weight and slope.
template <typename In, typename Grad>
__global__ void __launch_bounds__(kReadThreads, kBlocks)
    weight_kernel(const Grad* __restrict__ grad, const int64_t* __restrict__ keys, const In* __restrict__ features,
                  const uint8_t* __restrict__ scales, int channels, index_t cells, float sharpness, bool of_points,
                  float* __restrict__ rows, float* __restrict__ weights, float* __restrict__ slopes) {
  __shared__ float tile[kCells][kChannels + 1];
  __shared__ float dots[kCells][kBlendTokens];
  const index_t tiles = (cells + kCells - 1) / kCells;
  const index_t view = blockIdx.x / tiles, first = blockIdx.x % tiles * kCells;
  const int count = static_cast<int>(min(static_cast<index_t>(kCells), cells - first));
  const int cell = threadIdx.x % kCells, k = threadIdx.x / kCells;
  const index_t at = view * cells + first + cell;
  const Grad* own = grad + view * channels * cells + first + cell;
  if (of_points && cell < count && k < kBlendTokens) {
    float sum = 0.0f;
    if (k < make_blend(keys + at * kBlendTokens, sharpness).count) {
      const index_t token = key_index(keys[at * kBlendTokens + k]);
      const In* row = features + token * channels;
      const float factor = row_factor<In>(scales, token);
      for (int c = 0; c < channels; ++c) sum += to_float(own[c * cells]) * feature_value(row[c], factor);
    }
    dots[cell][k] = sum;
  }
  __syncthreads();
  if (threadIdx.x < count) {
    const Blend blend = make_blend(keys + at * kBlendTokens, sharpness);
    float slope[kBlendTokens] = {};
    if (of_points) score_slopes(blend, dots[cell], sharpness, slope);
    for (int n = 0; n < kBlendTokens; ++n) {
      weights[at * kBlendTokens + n] = blend.weight[n];
      slopes[at * kBlendTokens + n] = slope[n];
    }
  }
  for (int base = 0; base < channels; base += kChannels) {
    const int number = min(kChannels, channels - base);
    __syncthreads();
    if (cell < count)
      for (int c = k; c < number; c += kReadThreads / kCells) tile[cell][c] = to_float(own[(base + c) * cells]);
    __syncthreads();
    for (int n = threadIdx.x; n < count * number; n += kReadThreads)
      rows[(view * cells + first + n / number) * channels + base + n % number] = tile[n / number][n % number];
  }
}

// Backward, token by token: a warp finds the places of its token in the keys, in order of view and cell, and sums
// there.
template <typename Out>
__global__ void __launch_bounds__(kBlockTokens, kBlocks)
    gather_kernel(Tokens tokens, Views views, const int64_t* __restrict__ keys, const float* __restrict__ rows,
                  const float* __restrict__ weights, const float* __restrict__ slopes, int channels,
                  Out* __restrict__ grad_features, float* __restrict__ grad_points) {
  const int lane = threadIdx.x % 32;
  const index_t cells = static_cast<index_t>(views.height) * views.width;
  const index_t stride = static_cast<index_t>(gridDim.x) * (kBlockTokens / 32);
  const float limit_u = static_cast<float>(views.width), limit_v = static_cast<float>(views.height);
  for (index_t i = static_cast<index_t>(blockIdx.x) * (kBlockTokens / 32) + threadIdx.x / 32; i < tokens.capacity;
       i += stride) {
    const float4 p = __ldg(tokens.points + i);
    const float point[4] = {p.x, p.y, p.z, p.w};
    for (int base = 0; base == 0 || base < channels; base += 32 * kLaneChannels) {
      float sum[kLaneChannels] = {}, total[4] = {};
      for (int t = 0; t < views.count; ++t) {
        float writer_center[3];
        const Alignment alignment = align_point(tokens, i, p, views.cameras[t], writer_center);
        if (!around_view(alignment.u, alignment.v, alignment.z, views.near, limit_u, limit_v)) continue;
        float slope_u = 0.0f, slope_v = 0.0f, slope = 0.0f;
        bool found = false;
        for_footprint(alignment, views.height, views.width, [&](int cell, float) {
          const index_t at = t * cells + cell;
          for (int k = 0; k < kBlendTokens; ++k) {
            if (keys[at * kBlendTokens + k] == static_cast<int64_t>(kNoToken)) break;
            if (key_index(keys[at * kBlendTokens + k]) != i) continue;
            const float weight = weights[at * kBlendTokens + k], s = slopes[at * kBlendTokens + k];
            if (!(weight > 0.0f)) break;
            found = true;
            for (int n = 0; n < kLaneChannels; ++n) {
              const int c = base + n * 32 + lane;
              if (c < channels) sum[n] += weight * rows[at * channels + c];
            }
            slope_u += s * (2.0f * (alignment.u - (static_cast<float>(cell % views.width) + 0.5f)));
            slope_v += s * (2.0f * (alignment.v - (static_cast<float>(cell / views.width) + 0.5f)));
            slope += s;
            break;
          }
        });
        if (found && grad_points != nullptr && base == 0)
          add_alignment_gradient(views.cameras[t], point, writer_center, slope_u, slope_v, slope, total);
      }
      for (int n = 0; n < kLaneChannels; ++n) {
        const int c = base + n * 32 + lane;
        if (c < channels) grad_features[i * channels + c] = from_float<Out>(sum[n]);
      }
      if (grad_points != nullptr && base == 0 && lane == 0)
        for (int j = 0; j < 4; ++j) grad_points[4 * i + j] = total[j];
    }
  }
}

Tokens make_tokens(const Tensor& points, const int64_t* num_points, const VisibleBlocks& seen, const Tensor& frame_ids,
                   const Tensor& frame_centers) {
  return {{input<float4>(points), num_points, points.size(0), seen},
          input<int32_t>(frame_ids),
          input<float>(frame_centers),
          static_cast<int>(frame_centers.size(0))};
}

Tensor make_view_cameras(const Tensor& intrinsics, const Tensor& cam2world, cudaStream_t stream) {
  const int views = static_cast<int>(cam2world.size(0));
  Tensor cameras = new_tensor(cam2world, {views, kViewCameraWords}, ScalarType::Float);
  make_view_cameras_kernel<<<(views + 63) / 64, 64, 0, stream>>>(input<double>(intrinsics), input<double>(cam2world),
                                                                 views, output<ViewCamera>(cameras));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return cameras;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> splat_aligned(
    const Tensor& points_, const Tensor& features_, const std::optional<Tensor>& num_points, const Tensor& frame_ids_,
    const Tensor& frame_centers_, const Tensor& intrinsics_, const Tensor& cam2world_, int64_t height, int64_t width,
    double near, double sharpness, ScalarType dtype, const std::optional<Tensor>& bounds,
    const std::optional<Tensor>& scales_) {
  const torch::stable::accelerator::DeviceGuard guard(points_.get_device_index());
  const Tensor points = checked_points(points_);
  const Tensor features = as_contiguous(features_);
  const std::optional<Tensor> scales = checked_scales(features, scales_);
  const Tensor frame_ids = checked(frame_ids_, ScalarType::Int, "frame_ids");
  const Tensor frame_centers = checked(frame_centers_, ScalarType::Float, "frame_centers");
  const Tensor intrinsics = checked(intrinsics_, ScalarType::Double, "intrinsics");
  const Tensor cam2world = checked(cam2world_, ScalarType::Double, "cam2world");
  const cudaStream_t stream = current_stream(points);
  const index_t views = cam2world.size(0), channels = features.size(1), cells = height * width;
  const index_t capacity = points.size(0);

  Tensor latents = new_tensor(points, {views, channels, height, width}, dtype);
  Tensor mask = new_tensor(points, {views, height, width}, ScalarType::Bool);
  Tensor depth = new_tensor(points, {views, height, width}, ScalarType::Float);
  Tensor index = new_tensor(points, {views, height, width}, ScalarType::Long);
  Tensor keys = new_tensor(points, {views, height, width, kBlendTokens}, ScalarType::Long);
  if (views * cells == 0) return {latents, mask, depth, index, keys};

  fill_bytes(keys, static_cast<int>(kNoToken & 0xff), stream);
  const Tensor cameras = make_view_cameras(intrinsics, cam2world, stream);
  if (capacity > 0) {
    Tensor narrow = new_tensor(points, {views, cells}, ScalarType::Int);
    Tensor wide = new_tensor(points, {views, cells}, ScalarType::Int);
    fill_bytes(narrow, 0xff, stream);
    fill_bytes(wide, 0xff, stream);
    const int64_t* count = count_pointer(num_points);
    const CulledBlocks culled(bounds, points, count, cameras, height, width, kHoleReachCells, near, stream);
    const Tokens tokens = make_tokens(points, count, culled.visible, frame_ids, frame_centers);
    const Views seen{input<ViewCamera>(cameras), static_cast<int>(views), static_cast<int>(height),
                     static_cast<int>(width), static_cast<float>(near)};
    const unsigned grid = grid_for(capacity, kBlockTokens, 16);
    nearest_kernel<<<grid, kBlockTokens, 0, stream>>>(tokens, seen, output<unsigned>(narrow));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    hole_kernel<<<grid, kBlockTokens, 0, stream>>>(tokens, seen, input<unsigned>(narrow), output<unsigned>(wide));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    best_kernel<<<grid, kBlockTokens, 0, stream>>>(tokens, seen, input<unsigned>(narrow), input<unsigned>(wide),
                                                   output<unsigned long long>(keys));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  const index_t blocks = views * divide_up(cells, kCells);
  STD_TORCH_CHECK(blocks < (index_t{1} << 31), "size and the number of views must stay below 2^31 blocks of 32 cells");
  for_stored_type(features.scalar_type(), [&](auto in) {
    using In = decltype(in);
    for_feature_type(dtype, [&](auto out) {
      using Out = decltype(out);
      readout_kernel<In, Out><<<static_cast<unsigned>(blocks), kReadThreads, 0, stream>>>(
          input<int64_t>(keys), input<float4>(points), input<ViewCamera>(cameras), input<In>(features),
          scale_pointer(scales), static_cast<int>(channels), cells, static_cast<float>(sharpness), output<Out>(latents),
          output<bool>(mask), output<float>(depth), output<int64_t>(index));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {latents, mask, depth, index, keys};
}

std::tuple<Tensor, Tensor> splat_aligned_backward(const Tensor& grad_latents_, const Tensor& points_,
                                                  const Tensor& features_, const Tensor& frame_ids_,
                                                  const Tensor& frame_centers_, const Tensor& intrinsics_,
                                                  const Tensor& cam2world_, const Tensor& keys_, double sharpness,
                                                  bool of_points, const std::optional<Tensor>& scales_) {
  const torch::stable::accelerator::DeviceGuard guard(points_.get_device_index());
  const Tensor grad_latents = as_contiguous(grad_latents_), features = as_contiguous(features_);
  const std::optional<Tensor> scales = checked_scales(features, scales_);
  const Tensor points = checked_points(points_);
  const Tensor frame_ids = checked(frame_ids_, ScalarType::Int, "frame_ids");
  const Tensor frame_centers = checked(frame_centers_, ScalarType::Float, "frame_centers");
  const Tensor intrinsics = checked(intrinsics_, ScalarType::Double, "intrinsics");
  const Tensor cam2world = checked(cam2world_, ScalarType::Double, "cam2world");
  const Tensor keys = checked(keys_, ScalarType::Long, "keys");
  const cudaStream_t stream = current_stream(points);
  const index_t views = grad_latents.size(0), channels = grad_latents.size(1);
  const index_t height = grad_latents.size(2), width = grad_latents.size(3), cells = height * width;
  const index_t capacity = points.size(0);

  Tensor grad_features = new_tensor(points, {scales.has_value() ? 0 : capacity, channels}, features.scalar_type());
  Tensor grad_points = new_tensor(points, {of_points ? capacity : 0, 4}, ScalarType::Float);
  if (views * cells == 0 || capacity == 0) {
    fill_bytes(grad_features, 0, stream);
    fill_bytes(grad_points, 0, stream);
    return {grad_features, grad_points};
  }
  const Tensor cameras = make_view_cameras(intrinsics, cam2world, stream);
  Tensor rows = new_tensor(points, {views * cells, channels}, ScalarType::Float);
  Tensor weights = new_tensor(points, {views * cells, kBlendTokens}, ScalarType::Float);
  Tensor slopes = new_tensor(points, {views * cells, kBlendTokens}, ScalarType::Float);
  const index_t blocks = views * divide_up(cells, kCells);
  STD_TORCH_CHECK(blocks < (index_t{1} << 31), "size and the number of views must stay below 2^31 blocks of 32 cells");
  for_stored_type(features.scalar_type(), [&](auto in) {
    using In = decltype(in);
    for_feature_type(grad_latents.scalar_type(), [&](auto given) {
      using Grad = decltype(given);
      weight_kernel<In, Grad><<<static_cast<unsigned>(blocks), kReadThreads, 0, stream>>>(
          input<Grad>(grad_latents), input<int64_t>(keys), input<In>(features), scale_pointer(scales),
          static_cast<int>(channels), cells, static_cast<float>(sharpness), of_points, output<float>(rows),
          output<float>(weights), output<float>(slopes));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    // The keys record what the forward pass found beyond `near`; nothing else is looked up here.
    const Tokens tokens = make_tokens(points, nullptr, {}, frame_ids, frame_centers);
    const Views seen{input<ViewCamera>(cameras), static_cast<int>(views), static_cast<int>(height),
                     static_cast<int>(width), 0.0f};
    // Float8 features have no gradient, so none of their channels is summed.
    using Sum = std::conditional_t<std::is_same_v<In, Float8>, float, In>;
    const int summed = scales.has_value() ? 0 : static_cast<int>(channels);
    gather_kernel<Sum><<<grid_for(capacity * 32, kBlockTokens, 16), kBlockTokens, 0, stream>>>(
        tokens, seen, input<int64_t>(keys), input<float>(rows), input<float>(weights), input<float>(slopes), summed,
        output<Sum>(grad_features), of_points ? output<float>(grad_points) : nullptr);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_features, grad_points};
}

}  // namespace mirage::cuda

STABLE_TORCH_LIBRARY_IMPL(mirage, CUDA, m) {
  m.impl("splat_aligned_compiled", TORCH_BOX(&mirage::cuda::splat_aligned));
  m.impl("splat_aligned_backward_compiled", TORCH_BOX(&mirage::cuda::splat_aligned_backward));
}

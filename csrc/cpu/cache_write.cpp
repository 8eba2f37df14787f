// cache_write on the CPU: lifts and classifies every token row, counts, then copies the kept tokens to their rows.
//
// In: latents (T, C, h, w), depth (T, H, W), cameras, mask. In place: points, features, frame_ids, count, bounds,
// scales. Out: how many tokens were written, refused, masked, of unknown depth, out of range, not finite.
#include "culling.h"
#include "feature_rows.h"
#include "token_status.h"
#include "transpose.h"

namespace mirage::cpu {
namespace {

// Writes tokens kept[0..n) of a grid row as rows of `out`; channel c is at latents + c * stride.
template <typename Word>
MIRAGE_INLINE void gather_rows(const Word* latents, index_t channels, index_t stride, const int32_t* kept, index_t n,
                               Word* out) {
  index_t k = 0;
  for (; k + 8 <= n; k += 8) {
    const bool together = kept[k + 7] == kept[k] + 7;  // `kept` ascends, so these are eight neighbours
    index_t c = 0;
    if (together) {
      for (; c + 8 <= channels; c += 8) {
        const Word* rows[8];
        for (int i = 0; i < 8; ++i) rows[i] = latents + (c + i) * stride;
        transpose_8x8(rows, kept[k], out + k * channels + c, channels);
      }
    }
    for (; c < channels; ++c)
      for (int i = 0; i < 8; ++i) out[(k + i) * channels + c] = latents[c * stride + kept[k + i]];
  }
  for (; k < n; ++k)
    for (index_t c = 0; c < channels; ++c) out[k * channels + c] = latents[c * stride + kept[k]];
}

MIRAGE_SIMD
void gather_rows_32(const uint32_t* latents, index_t channels, index_t stride, const int32_t* kept, index_t n,
                    uint32_t* out) {
  gather_rows(latents, channels, stride, kept, n, out);
}

MIRAGE_SIMD
void gather_rows_16(const uint16_t* latents, index_t channels, index_t stride, const int32_t* kept, index_t n,
                    uint16_t* out) {
  gather_rows(latents, channels, stride, kept, n, out);
}

template <typename T>
void gather_features(const T* latents, index_t channels, index_t stride, const int32_t* kept, index_t n, T* out) {
  if constexpr (sizeof(T) == 4) {
    gather_rows_32(reinterpret_cast<const uint32_t*>(latents), channels, stride, kept, n,
                   reinterpret_cast<uint32_t*>(out));
  } else {
    gather_rows_16(reinterpret_cast<const uint16_t*>(latents), channels, stride, kept, n,
                   reinterpret_cast<uint16_t*>(out));
  }
}

}  // namespace

Tensor cache_write(Tensor points, Tensor features, Tensor frame_ids, Tensor count, const Tensor& latents_,
                   const Tensor& depth_, const Tensor& intrinsics_, const Tensor& cam2world_,
                   const std::optional<Tensor>& mask_, int64_t first_frame, bool bilinear, double min_depth,
                   double max_depth, const std::optional<Tensor>& bounds, std::optional<Tensor> scales) {
  const Tensor latents = as_contiguous(latents_);
  const Tensor depth = checked(depth_, ScalarType::Float, "depth");
  const Tensor intrinsics = checked(intrinsics_, ScalarType::Double, "intrinsics");
  const Tensor cam2world = checked(cam2world_, ScalarType::Double, "cam2world");
  std::optional<Tensor> mask;
  if (mask_.has_value()) mask = checked(*mask_, ScalarType::Bool, "mask");
  STD_TORCH_CHECK(points.is_contiguous() && features.is_contiguous() && frame_ids.is_contiguous(),
                  "points, features and frame_ids must be contiguous: they are written in place");
  if (bounds.has_value()) check_bounds(*bounds, points.size(0));
  checked_scales(features, scales);
  STD_TORCH_CHECK(!scales.has_value() || scales->is_contiguous(),
                  "scales must be contiguous: they are written in place");
  const index_t views = latents.size(0), channels = latents.size(1), height = latents.size(2), width = latents.size(3);
  const ClassifiedTokens classified =
      classify_tokens(latents, depth, intrinsics, cam2world, mask, bilinear, static_cast<float>(min_depth),
                      static_cast<float>(max_depth), features.scalar_type());
  const index_t rows = views * height, cells = height * width;

  const index_t capacity = points.size(0), start = *input<int64_t>(count);
  STD_TORCH_CHECK(start >= 0 && start <= capacity, "count must be in [0, ", capacity, "], got ", start);
  std::vector<index_t> place(rows);
  index_t total = 0, report[kAppendReportSize] = {};
  for (index_t row = 0; row < rows; ++row) {
    place[row] = start + total;
    total += classified.kept[row];
  }
  for (int k = kMasked; k <= kNonFinite; ++k) report[k] = classified.rejected[k];
  report[0] = std::min(total, capacity - start);
  report[1] = total - report[0];

  for_feature_type(latents.scalar_type(), [&](auto in) {
    using In = decltype(in);
    for_stored_type(features.scalar_type(), [&](auto out) {
      using Out = decltype(out);
      uint8_t* scale_data = scales.has_value() ? output<uint8_t>(*scales) : nullptr;
      const In* source_latents = input<In>(latents);
      torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        std::vector<int32_t> kept(width);
        std::vector<In> gathered(std::is_same_v<In, Out> ? 0 : channels * width);
        for (int64_t row = begin; row < end; ++row) {
          const index_t t = row / height, i = row % height;
          const LiftedToken* tokens = input<LiftedToken>(classified.lifted) + row * width;
          const uint8_t* status = input<uint8_t>(classified.statuses) + row * width;
          index_t n = 0;
          for (index_t j = 0; j < width; ++j) {
            kept[n] = static_cast<int32_t>(j);
            n += status[j] == kKept;
          }
          n = std::min(n, std::max<index_t>(capacity - place[row], 0));
          LiftedToken* to = output<LiftedToken>(points) + place[row];
          int32_t* frame = output<int32_t>(frame_ids) + place[row];
          Out* rows_out = output<Out>(features) + place[row] * channels;
          const In* from = source_latents + t * channels * cells + i * width;
          for (index_t k = 0; k < n; ++k) {
            to[k] = tokens[kept[k]];
            frame[k] = static_cast<int32_t>(first_frame + t);
          }
          if constexpr (std::is_same_v<In, Out>) {
            gather_features(from, channels, cells, kept.data(), n, rows_out);
          } else {
            gather_features(from, channels, cells, kept.data(), n, gathered.data());
            for (index_t k = 0; k < n; ++k)
              store_row(gathered.data() + k * channels, channels, rows_out + k * channels,
                        scale_data == nullptr ? nullptr : scale_data + place[row] + k);
          }
        }
      });
    });
  });
  *output<int64_t>(count) = start + report[0];
  if (bounds.has_value() && report[0] > 0) {
    const index_t end = start + report[0];
    update_bounds(input<float>(points), end, start / kBlockTokens, divide_up(end, kBlockTokens), nullptr,
                  points.size(0), output<float>(*bounds));
  }

  Tensor result = new_tensor({kAppendReportSize}, ScalarType::Long);
  std::copy(report, report + kAppendReportSize, output<int64_t>(result));
  return result;
}

}  // namespace mirage::cpu

STABLE_TORCH_LIBRARY_IMPL(mirage, CPU, m) { m.impl("cache_write_compiled", TORCH_BOX(&mirage::cpu::cache_write)); }

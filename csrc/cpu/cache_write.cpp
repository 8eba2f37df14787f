// cache_write on the CPU: lift and judge every token row, count, then copy the kept rows to their places.
//
// In: latents (T, C, h, w), depth (T, H, W), cameras, mask. In place: points, features, frame_ids, count, scales.
// Out: how many tokens were written, refused, masked, of unknown depth, out of range, not finite.
#include "features.h"
#include "lift.h"
#include "transpose.h"

namespace mirage::cpu {
namespace {

enum Verdict : uint8_t { kKeep = 0, kMasked = 2, kUnknown = 3, kOutOfRange = 4, kNonFinite = 5 };

// Magnitude bits of a latent from which on it is Inf or NaN once stored: Inf itself, or what rounds to Inf.
template <typename In, typename Out>
constexpr uint32_t non_finite_from() {
  if constexpr (std::is_same_v<Out, Float8>) {
    if constexpr (std::is_same_v<In, float>) return kLargestQuantised + 1;
    return std::is_same_v<In, Half> ? 0x7c00u : (kLargestQuantised >> 16) + 1;
  } else if constexpr (std::is_same_v<In, float>) {
    if constexpr (std::is_same_v<Out, Half>) return 0x477ff000u;      // 65520
    if constexpr (std::is_same_v<Out, BFloat16>) return 0x7f7f8000u;  // halfway past the largest bfloat16
    return 0x7f800000u;
  } else if constexpr (std::is_same_v<In, BFloat16>) {
    return std::is_same_v<Out, Half> ? 0x4780u : 0x7f80u;  // 65536, Inf
  } else {
    return 0x7c00u;
  }
}

// bad[j] = 1 where a channel of token j is not finite once stored; channel c lies at latents + c * stride.
template <typename Word>
inline __attribute__((always_inline)) void find_non_finite(const Word* latents, Word limit, index_t channels,
                                                           index_t stride, index_t width, Word* bad) {
  constexpr Word kMagnitude = static_cast<Word>(~Word{0}) >> 1;
  std::fill(bad, bad + width, Word{0});
  for (index_t c = 0; c < channels; ++c)
    for (index_t j = 0; j < width; ++j) {
      const Word bits = latents[c * stride + j] & kMagnitude;
      bad[j] |= static_cast<Word>(bits >= limit);
    }
}

MIRAGE_SIMD
void find_non_finite_32(const uint32_t* latents, uint32_t limit, index_t channels, index_t stride, index_t width,
                        uint32_t* bad) {
  find_non_finite(latents, limit, channels, stride, width, bad);
}

MIRAGE_SIMD
void find_non_finite_16(const uint16_t* latents, uint16_t limit, index_t channels, index_t stride, index_t width,
                        uint16_t* bad) {
  find_non_finite(latents, limit, channels, stride, width, bad);
}

// Tokens kept[0..n) of a grid row, channel c at latents + c * stride, to rows of `out`.
template <typename Word>
inline __attribute__((always_inline)) void gather_rows(const Word* latents, index_t channels, index_t stride,
                                                       const int32_t* kept, index_t n, Word* out) {
  index_t k = 0;
  for (; k + 8 <= n; k += 8) {
    const bool together = kept[k + 7] == kept[k] + 7;  // kept ascends, so these are eight neighbours
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

struct RowCount {
  index_t keep = 0;
  index_t rejected[6] = {};
};

}  // namespace

Tensor cache_write(Tensor points, Tensor features, Tensor frame_ids, Tensor count, const Tensor& latents_,
                   const Tensor& depth_, const Tensor& intrinsics_, const Tensor& cam2world_,
                   const std::optional<Tensor>& mask_, int64_t first_frame, bool bilinear, double min_depth,
                   double max_depth, std::optional<Tensor> scales) {
  const Tensor latents = as_contiguous(latents_);
  const Tensor depth = checked(depth_, ScalarType::Float, "depth");
  const Tensor intrinsics = checked(intrinsics_, ScalarType::Double, "intrinsics");
  const Tensor cam2world = checked(cam2world_, ScalarType::Double, "cam2world");
  std::optional<Tensor> mask;
  if (mask_.has_value()) mask = checked(*mask_, ScalarType::Bool, "mask");
  STD_TORCH_CHECK(points.is_contiguous() && features.is_contiguous() && frame_ids.is_contiguous(),
                  "points, features and frame_ids must be contiguous: they are written in place");
  checked_scales(features, scales);
  STD_TORCH_CHECK(!scales.has_value() || scales->is_contiguous(),
                  "scales must be contiguous: they are written in place");
  const index_t views = latents.size(0), channels = latents.size(1), height = latents.size(2), width = latents.size(3);
  const DepthSource source = make_source(depth, mask, height, width, bilinear);
  const std::vector<Lift> lifts = make_lifts(intrinsics, cam2world, source);
  const CellColumns columns = make_columns(source);
  const float low = static_cast<float>(min_depth), high = static_cast<float>(max_depth);

  const index_t rows = views * height, cells = height * width;
  Tensor lifted = new_tensor({rows, width, 4}, ScalarType::Float);
  Tensor verdicts = new_tensor({rows, width}, ScalarType::Byte);
  std::vector<RowCount> counts(rows);

  for_feature_type(latents.scalar_type(), [&](auto in) {
    using In = decltype(in);
    const In* source_latents = input<In>(latents);
    uint32_t limit = 0;
    for_stored_type(features.scalar_type(), [&](auto out) { limit = non_finite_from<In, decltype(out)>(); });
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> cell;
      std::vector<float> z(width);
      using Word = std::conditional_t<sizeof(In) == 4, uint32_t, uint16_t>;
      std::vector<Word> bad(width);
      std::vector<uint8_t> still(width);
      for (int64_t row = begin; row < end; ++row) {
        const index_t t = row / height, i = row % height;
        LiftedToken* tokens = output<LiftedToken>(lifted) + row * width;
        uint8_t* verdict = output<uint8_t>(verdicts) + row * width;
        token_row_depth(source, columns, t, i, cell, z.data());
        token_row_mask(source, columns, t, i, reinterpret_cast<bool*>(still.data()));
        lift_row(lifts[t], i, width, z.data(), tokens);
        const auto* words = reinterpret_cast<const Word*>(source_latents + t * channels * cells + i * width);
        if constexpr (sizeof(In) == 4) {
          find_non_finite_32(words, limit, channels, cells, width, bad.data());
        } else {
          find_non_finite_16(words, static_cast<Word>(limit), channels, cells, width, bad.data());
        }
        for (index_t j = 0; j < width; ++j) {
          const LiftedToken& p = tokens[j];
          const bool finite = !bad[j] && is_finite(p.x) && is_finite(p.y) && is_finite(p.z) && is_finite(p.footprint);
          verdict[j] = !still[j]          ? kMasked
                       : !(z[j] > 0.0f)   ? kUnknown
                       : !((z[j] >= low) & (z[j] <= high)) ? kOutOfRange
                       : !finite          ? kNonFinite
                                          : kKeep;
          counts[row].keep += verdict[j] == kKeep;
          counts[row].rejected[verdict[j]] += 1;
        }
      }
    });
  });

  const index_t capacity = points.size(0), start = *input<int64_t>(count);
  STD_TORCH_CHECK(start >= 0 && start <= capacity, "count must be in [0, ", capacity, "], got ", start);
  std::vector<index_t> place(rows);
  index_t total = 0, report[6] = {};
  for (index_t row = 0; row < rows; ++row) {
    place[row] = start + total;
    total += counts[row].keep;
    for (int k = kMasked; k <= kNonFinite; ++k) report[k] += counts[row].rejected[k];
  }
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
          const LiftedToken* tokens = input<LiftedToken>(lifted) + row * width;
          const uint8_t* verdict = input<uint8_t>(verdicts) + row * width;
          index_t n = 0;
          for (index_t j = 0; j < width; ++j) {
            kept[n] = static_cast<int32_t>(j);
            n += verdict[j] == kKeep;
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

  Tensor result = new_tensor({6}, ScalarType::Long);
  std::copy(report, report + 6, output<int64_t>(result));
  return result;
}

}  // namespace mirage::cpu

STABLE_TORCH_LIBRARY_IMPL(mirage, CPU, m) { m.impl("cache_write_compiled", TORCH_BOX(&mirage::cpu::cache_write)); }

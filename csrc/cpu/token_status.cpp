// Lifts and classifies tokens, row by row.
//
// In: latents (T, C, h, w), depth (T, H, W), cameras, mask. Out: lifted tokens, their depths and statuses, counts.
#include "token_status.h"

#include <array>

#include "feature_rows.h"

namespace mirage::cpu {
namespace {

// The least magnitude bits of a latent that is Inf or NaN once stored: those of Inf, or of what rounds to Inf.
template <typename In, typename Out>
constexpr uint32_t non_finite_from() {
  if constexpr (std::is_same_v<Out, Float8>) {
    if constexpr (std::is_same_v<In, float>) return kMaxQuantizedBits + 1;
    return std::is_same_v<In, Half> ? 0x7c00u : (kMaxQuantizedBits >> 16) + 1;
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

// Sets bad[j] = 1 where a channel of token j is not finite once stored; channel c is at latents + c * stride.
template <typename Word>
MIRAGE_INLINE void find_non_finite(const Word* latents, Word limit, index_t channels, index_t stride, index_t width,
                                   Word* bad) {
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

}  // namespace

ClassifiedTokens classify_tokens(const Tensor& latents, const Tensor& depth, const Tensor& intrinsics,
                                 const Tensor& cam2world, const std::optional<Tensor>& mask, bool bilinear, float low,
                                 float high, ScalarType stored) {
  const index_t views = latents.size(0), channels = latents.size(1), height = latents.size(2), width = latents.size(3);
  const DepthSource source = make_source(depth, mask, height, width, bilinear);
  const std::vector<Lift> lifts = make_lifts(intrinsics, cam2world, source);
  const CellColumns columns = make_columns(source);
  const index_t rows = views * height, cells = height * width;
  ClassifiedTokens classified{new_tensor({rows, width, 4}, ScalarType::Float),
                              new_tensor({rows, width}, ScalarType::Float), new_tensor({rows, width}, ScalarType::Byte),
                              std::vector<index_t>(rows)};
  std::vector<std::array<index_t, kAppendReportSize>> rejected(rows);

  for_feature_type(latents.scalar_type(), [&](auto in) {
    using In = decltype(in);
    const In* source_latents = input<In>(latents);
    uint32_t limit = 0;
    for_stored_type(stored, [&](auto out) { limit = non_finite_from<In, decltype(out)>(); });
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> cell;
      using Word = std::conditional_t<sizeof(In) == 4, uint32_t, uint16_t>;
      std::vector<Word> bad(width);
      std::vector<uint8_t> is_static(width);
      for (int64_t row = begin; row < end; ++row) {
        const index_t t = row / height, i = row % height;
        LiftedToken* tokens = output<LiftedToken>(classified.lifted) + row * width;
        uint8_t* status = output<uint8_t>(classified.statuses) + row * width;
        float* z = output<float>(classified.depths) + row * width;
        token_row_depth(source, columns, t, i, cell, z);
        token_row_mask(source, columns, t, i, reinterpret_cast<bool*>(is_static.data()));
        lift_row(lifts[t], i, width, z, tokens);
        const auto* words = reinterpret_cast<const Word*>(source_latents + t * channels * cells + i * width);
        if constexpr (sizeof(In) == 4) {
          find_non_finite_32(words, limit, channels, cells, width, bad.data());
        } else {
          find_non_finite_16(words, static_cast<Word>(limit), channels, cells, width, bad.data());
        }
        for (index_t j = 0; j < width; ++j) {
          const LiftedToken& p = tokens[j];
          const bool finite = !bad[j] && is_finite(p.x) && is_finite(p.y) && is_finite(p.z) && is_finite(p.footprint);
          status[j] = !is_static[j]                       ? kMasked
                      : !(z[j] > 0.0f)                    ? kUnknownDepth
                      : !((z[j] >= low) & (z[j] <= high)) ? kOutOfRange
                      : !finite                           ? kNonFinite
                                                          : kKept;
          classified.kept[row] += status[j] == kKept;
          rejected[row][status[j]] += 1;
        }
      }
    });
  });
  for (const auto& row : rejected)
    for (int k = kMasked; k <= kNonFinite; ++k) classified.rejected[k] += row[k];
  return classified;
}

}  // namespace mirage::cpu

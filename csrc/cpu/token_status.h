// Which tokens of T views are worth writing: shared by cache_write and bounded_write.
#pragma once

#include "lift.h"

namespace mirage::cpu {

enum Verdict : uint8_t { kKeep = 0, kMasked = 2, kUnknown = 3, kOutOfRange = 4, kNonFinite = 5 };

struct Judged {
  Tensor lifted;    // (T * h, w, 4) float32
  Tensor depths;    // (T * h, w) float32, 0 where unknown
  Tensor verdicts;  // (T * h, w) uint8
  std::vector<index_t> kept;  // of each row
  index_t rejected[6] = {};   // by verdict
};

// Lifts and judges every token, for features stored as `stored`; latents are contiguous.
Judged judge_tokens(const Tensor& latents, const Tensor& depth, const Tensor& intrinsics, const Tensor& cam2world,
                    const std::optional<Tensor>& mask, bool bilinear, float low, float high, ScalarType stored);

}  // namespace mirage::cpu

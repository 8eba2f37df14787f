// Classifies the tokens of T views by whether they are worth writing: shared by cache_write and bounded_write.
#pragma once

#include "../core/constants.h"
#include "lift.h"

namespace mirage::cpu {

struct ClassifiedTokens {
  Tensor lifted;                             // (T * h, w, 4) float32
  Tensor depths;                             // (T * h, w) float32, 0 where unknown
  Tensor statuses;                           // (T * h, w) uint8
  std::vector<index_t> kept;                 // of each row
  index_t rejected[kAppendReportSize] = {};  // by status
};

// Lifts and classifies every token, for features that will be stored as `stored`; latents are contiguous.
ClassifiedTokens classify_tokens(const Tensor& latents, const Tensor& depth, const Tensor& intrinsics,
                                 const Tensor& cam2world, const std::optional<Tensor>& mask, bool bilinear, float low,
                                 float high, ScalarType stored);

}  // namespace mirage::cpu

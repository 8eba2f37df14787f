// Eight floats at once, for loops that a compiler does not vectorise as well.
#pragma once

#define MIRAGE_INLINE inline __attribute__((always_inline))

namespace mirage::cpu {

typedef float Lanes __attribute__((vector_size(8 * sizeof(float))));
constexpr int kLanes = 8;

MIRAGE_INLINE Lanes load(const float* from) {
  Lanes lanes;
  __builtin_memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

}  // namespace mirage::cpu

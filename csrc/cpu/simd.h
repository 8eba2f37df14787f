// Vectors of eight floats, for loops that compilers vectorise less well on their own, and clones per instruction set.
#pragma once

#define MIRAGE_INLINE inline __attribute__((always_inline))

// Hot loops are compiled for several instruction sets; the loader chooses when the library is loaded, so one build is
// fast on every machine. The vector width changes no result: each lane is IEEE arithmetic in the same order, without
// contraction. Sanitizers cannot run before the loader has resolved the clones.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(MIRAGE_NO_CLONES)
#define MIRAGE_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MIRAGE_SIMD
#endif

namespace mirage::cpu {

// A vector type of the compiler: each clone lowers it to the registers it has. Comparisons give 0 or -1 per lane.
constexpr int kLanes = 8;
typedef float FloatLanes __attribute__((vector_size(kLanes * sizeof(float))));

MIRAGE_INLINE FloatLanes load(const float* from) {
  FloatLanes lanes;
  __builtin_memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

// Reduces all lanes to one by halving: a few shuffles instead of eight extractions.
template <typename F>
MIRAGE_INLINE float reduce(FloatLanes lanes, const F& f) {
  lanes = f(lanes, __builtin_shufflevector(lanes, lanes, 4, 5, 6, 7, 0, 1, 2, 3));
  lanes = f(lanes, __builtin_shufflevector(lanes, lanes, 2, 3, 0, 1, 6, 7, 4, 5));
  lanes = f(lanes, __builtin_shufflevector(lanes, lanes, 1, 0, 3, 2, 5, 4, 7, 6));
  return lanes[0];
}

}  // namespace mirage::cpu

// The one shuffle that moves latents between channel-major grids (C, h, w) and token rows (N, C).
#pragma once

#include "common.h"

namespace mirage::cpu {

// An 8 x 8 block of elements, rows to columns; Word is an unsigned integer of the element's size.
template <typename Word>
inline __attribute__((always_inline)) void transpose_8x8(const Word* const* rows, index_t column, Word* out,
                                                         index_t stride) {
  typedef Word Vector __attribute__((vector_size(8 * sizeof(Word))));
  Vector a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) __builtin_memcpy(&a[i], rows[i] + column, sizeof(Vector));
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 8
    for (int j = 0; j < 2; ++j) {
      a[i + j] = __builtin_shufflevector(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + j + 2] = __builtin_shufflevector(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < 4; ++j) {
    b[j] = __builtin_shufflevector(a[j], a[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    b[j + 4] = __builtin_shufflevector(a[j], a[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) __builtin_memcpy(out + j * stride, &b[j], sizeof(Vector));
}

}  // namespace mirage::cpu

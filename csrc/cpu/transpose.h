// The shuffle that moves latents between channel-major grids (C, h, w) and token rows (N, C).
#pragma once

#include "common.h"

namespace mirage::cpu {

// Transposes an 8 x 8 block of elements; Word is an unsigned integer of the element's size. Three rounds of eight
// shuffles, each one instruction: interleave elements, then pairs, then quarters, in the order that 4-byte elements
// (two 128-bit halves that do not mix before the last round) and 2-byte elements (one register) allow.
template <typename Word>
MIRAGE_INLINE void transpose_8x8(const Word* const* rows, index_t column, Word* out, index_t stride) {
  typedef Word Vector __attribute__((vector_size(8 * sizeof(Word))));
  Vector r[8], t[8], u[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) __builtin_memcpy(&r[i], rows[i] + column, sizeof(Vector));
  if constexpr (sizeof(Word) == 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
      t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      u[i] = __builtin_shufflevector(t[i], t[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      u[i + 1] = __builtin_shufflevector(t[i], t[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
      u[i + 2] = __builtin_shufflevector(t[i + 1], t[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
      u[i + 3] = __builtin_shufflevector(t[i + 1], t[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = __builtin_shufflevector(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
      r[i + 4] = __builtin_shufflevector(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 2, 10, 3, 11);
      t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 4, 12, 5, 13, 6, 14, 7, 15);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      u[i] = __builtin_shufflevector(t[i], t[i + 2], 0, 1, 8, 9, 2, 3, 10, 11);
      u[i + 1] = __builtin_shufflevector(t[i], t[i + 2], 4, 5, 12, 13, 6, 7, 14, 15);
      u[i + 2] = __builtin_shufflevector(t[i + 1], t[i + 3], 0, 1, 8, 9, 2, 3, 10, 11);
      u[i + 3] = __builtin_shufflevector(t[i + 1], t[i + 3], 4, 5, 12, 13, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[2 * i] = __builtin_shufflevector(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
      r[2 * i + 1] = __builtin_shufflevector(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) __builtin_memcpy(out + j * stride, &r[j], sizeof(Vector));
}

constexpr int kTile = 128;  // cells per readout tile: 32 rows of 48 floats stay in the first-level cache

// Writes rows of features as columns: out[c * stride + k] = rows[k][c], for 4-byte and 2-byte elements.
void transpose_rows_32(const uint32_t* const* rows, int count, index_t channels, uint32_t* out, index_t stride);
void transpose_rows_16(const uint16_t* const* rows, int count, index_t channels, uint16_t* out, index_t stride);

template <typename T>
void transpose_tile(const T* const* rows, int count, index_t channels, T* out, index_t stride) {
  if constexpr (sizeof(T) == 4) {
    transpose_rows_32(reinterpret_cast<const uint32_t* const*>(rows), count, channels, reinterpret_cast<uint32_t*>(out),
                      stride);
  } else {
    transpose_rows_16(reinterpret_cast<const uint16_t* const*>(rows), count, channels, reinterpret_cast<uint16_t*>(out),
                      stride);
  }
}

}  // namespace mirage::cpu

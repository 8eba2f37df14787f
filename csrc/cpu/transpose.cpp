// Transposes token rows to channel planes, a tile of cells at a time: splat and splat_aligned write their latents with
// it.
#include "transpose.h"

namespace mirage::cpu {
namespace {

// Eight channels at a time over the whole tile, so that stores run along a few output lines instead of jumping from
// channel plane to channel plane.
template <typename Word>
MIRAGE_INLINE void transpose_rows(const Word* const* rows, int count, index_t channels, Word* out, index_t stride) {
  const int whole = count / 8 * 8;
  index_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    for (int k = 0; k < whole; k += 8) {
      // The lines that these channels write in the next tile are a plane apart, which hardware prefetchers do not
      // detect.
      if (k % 16 == 0)
        for (index_t i = c; i < c + 8; ++i) __builtin_prefetch(out + i * stride + k + kTile, 1);
      transpose_8x8(rows + k, c, out + c * stride + k, stride);
    }
    for (int k = whole; k < count; ++k)
      for (index_t i = c; i < c + 8; ++i) out[i * stride + k] = rows[k][i];
  }
  for (; c < channels; ++c)
    for (int k = 0; k < count; ++k) out[c * stride + k] = rows[k][c];
}

}  // namespace

MIRAGE_SIMD
void transpose_rows_32(const uint32_t* const* rows, int count, index_t channels, uint32_t* out, index_t stride) {
  transpose_rows(rows, count, channels, out, stride);
}

MIRAGE_SIMD
void transpose_rows_16(const uint16_t* const* rows, int count, index_t channels, uint16_t* out, index_t stride) {
  transpose_rows(rows, count, channels, out, stride);
}

}  // namespace mirage::cpu

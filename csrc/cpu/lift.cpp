// Token depths, token masks and lifted tokens, one token row at a time.
//
// In: depth (T, H, W), mask (T, H', W'), lifts of T cameras. Out: per token row, depths, static flags, tokens.
#include "lift.h"

#include <cmath>

namespace mirage::cpu {
namespace {

constexpr int32_t kInfinity = 0x7f800000;  // bits of +Inf: past every valid depth

// The integer counterparts of what simd.h has for floats.
typedef int32_t IntLanes __attribute__((vector_size(kLanes * sizeof(int32_t))));

MIRAGE_INLINE IntLanes load(const int32_t* from) {
  IntLanes lanes;
  __builtin_memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

template <typename F>
MIRAGE_INLINE int32_t reduce(IntLanes lanes, const F& f) {
  lanes = f(lanes, __builtin_shufflevector(lanes, lanes, 4, 5, 6, 7, 0, 1, 2, 3));
  lanes = f(lanes, __builtin_shufflevector(lanes, lanes, 2, 3, 0, 1, 6, 7, 4, 5));
  lanes = f(lanes, __builtin_shufflevector(lanes, lanes, 1, 0, 3, 2, 5, 4, 7, 6));
  return lanes[0];
}

constexpr auto kAdd = [](IntLanes a, IntLanes b) { return a + b; };
constexpr auto kLesser = [](IntLanes a, IntLanes b) { return a < b ? a : b; };
constexpr auto kGreater = [](IntLanes a, IntLanes b) { return a > b ? a : b; };

struct Cell {
  int32_t count;  // of bits, including padding: a multiple of kLanes
  int32_t valid;
  int32_t least, greatest;
};

// Copies one cell's depths as signed integers, invalid ones as +Inf: bits of positive floats are ordered as the floats
// are, and zero, negative, Inf and NaN all fall outside (0, kInfinity).
MIRAGE_SIMD
Cell load_cell(const float* depth, index_t row_stride, int rows, int columns, int32_t* bits) {
  const int32_t* source = reinterpret_cast<const int32_t*>(depth);
  const int padded = (columns + kLanes - 1) / kLanes * kLanes;
  const IntLanes infinity = IntLanes{} + kInfinity;
  IntLanes valid = {}, least = infinity, greatest = {};
  for (int r = 0; r < rows; ++r, source += row_stride) {
    for (int c = 0; c < columns; c += kLanes, bits += kLanes) {
      IntLanes value = infinity;
      if (c + kLanes <= columns) {
        value = load(source + c);
      } else {
        for (int l = 0; c + l < columns; ++l) value[l] = source[c + l];
      }
      const IntLanes ok = (value > 0) & (value < infinity);
      const IntLanes kept = ok ? value : infinity;
      __builtin_memcpy(bits, &kept, sizeof(kept));
      valid -= ok;
      least = kept < least ? kept : least;
      const IntLanes high = value & ok;
      greatest = high > greatest ? high : greatest;
    }
  }
  return {rows * padded, reduce(valid, kAdd), reduce(least, kLesser), reduce(greatest, kGreater)};
}

// Calls f with every vector of `rows` rows of kVectors vectors each, which are `stride` values apart.
template <int kVectors, typename F>
MIRAGE_INLINE void each(const int32_t* row, index_t stride, int rows, const F& f) {
  for (int r = 0; r < rows; ++r, row += stride) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) f(load(row + v * kLanes));
  }
}

#define MIRAGE_LAMBDA __attribute__((always_inline))

// Finds the element of the given rank (0 = least) among rows of values, padded with +Inf, by counting passes, which
// vectorise. The first pass tries the rank interpolated between least and greatest, as a cell mostly shows one smooth
// surface. Further passes try three pivots: the interpolated rank, and one to either side, about a standard deviation
// of that guess away, so that a bracket of n values shrinks to about sqrt(n). A pass that does not halve the bracket is
// followed by one at its quarters, which limits the number of passes for any cell. A pivot that separates exactly the
// wanted rank ends the search with one more pass.
template <int kVectors>
MIRAGE_INLINE int32_t select_rank(const int32_t* bits, index_t stride, int rows, int rank, int32_t low, int32_t high,
                                  int valid) {
  const int count = rows * kVectors * kLanes;
  const auto greatest_up_to = [&](int32_t pivot) MIRAGE_LAMBDA {
    const IntLanes limit = IntLanes{} + pivot;
    IntLanes greatest = {};
    each<kVectors>(bits, stride, rows,
                   [&](IntLanes value) MIRAGE_LAMBDA { greatest = kGreater(value & ~(value > limit), greatest); });
    return reduce(greatest, kGreater);
  };
  int below_low = 0, up_to_high = valid;
  if (low < high) {
    const float fraction = (static_cast<float>(rank) + 0.5f) / static_cast<float>(valid);
    const int32_t pivot = std::min(low + static_cast<int32_t>(fraction * static_cast<float>(high - low)), high - 1);
    const IntLanes limit = IntLanes{} + pivot;
    IntLanes above = {};
    each<kVectors>(bits, stride, rows, [&](IntLanes value) MIRAGE_LAMBDA { above += value > limit; });
    const int32_t below = count + reduce(above, kAdd);
    if (below == rank + 1) return greatest_up_to(pivot);
    (below > rank ? high : low) = below > rank ? pivot : pivot + 1;
    (below > rank ? up_to_high : below_low) = below;
  }
  bool interpolate = true;
  while (low < high) {
    const int32_t range = high - low;
    int32_t pivot[3] = {low + range / 4, low + range / 2, low + range / 4 * 3};
    if (interpolate) {
      const float number = static_cast<float>(up_to_high - below_low), width = static_cast<float>(range);
      const float guess = (static_cast<float>(rank - below_low) + 0.5f) / number, spread = 0.5f / std::sqrt(number);
      for (int k = 0; k < 3; ++k) {
        const float fraction = std::min(std::max(guess + static_cast<float>(k - 1) * spread, 0.0f), 1.0f);
        pivot[k] = low + static_cast<int32_t>(std::min(fraction * width, static_cast<float>(range - 1)));
      }
    }
    for (int k = 0; k < 3; ++k) pivot[k] = std::min(pivot[k], high - 1);
    const IntLanes first = IntLanes{} + pivot[0], second = IntLanes{} + pivot[1], third = IntLanes{} + pivot[2];
    IntLanes a = {}, b = {}, c = {};
    each<kVectors>(bits, stride, rows, [&](IntLanes value) MIRAGE_LAMBDA {
      a += value > first;
      b += value > second;
      c += value > third;
    });
    // The number of values up to each pivot; padding is above all of them.
    const int32_t counts[3] = {count + reduce(a, kAdd), count + reduce(b, kAdd), count + reduce(c, kAdd)};
    for (int k = 0; k < 3; ++k) {
      if (counts[k] == rank + 1) return greatest_up_to(pivot[k]);
      // Pivots ascend: the last one too low and the first one too high make the bracket.
      if (counts[k] > rank) {
        high = pivot[k];
        up_to_high = counts[k];
        break;
      }
      low = pivot[k] + 1;
      below_low = counts[k];
    }
    interpolate = !interpolate || high - low <= range / 2;
  }
  return low;
}

MIRAGE_SIMD
int32_t median_of_copy(const int32_t* bits, const Cell& cell) {
  return select_rank<1>(bits, kLanes, cell.count / kLanes, (cell.valid - 1) / 2, cell.least, cell.greatest, cell.valid);
}

// The median of the usual cell, which is 16 wide like the VAE's patches and has no hole, read in place; 0 where a value
// is not valid.
MIRAGE_SIMD
int32_t median_of_full_cell(const float* depth, index_t stride, int rows) {
  const int32_t* bits = reinterpret_cast<const int32_t*>(depth);
  IntLanes least = IntLanes{} + kInfinity, greatest = {};
  each<2>(bits, stride, rows, [&](IntLanes value) MIRAGE_LAMBDA {
    least = kLesser(value, least);
    greatest = kGreater(value, greatest);
  });
  const int32_t low = reduce(least, kLesser), high = reduce(greatest, kGreater);
  if (low <= 0 || high >= kInfinity) return 0;
  return select_rank<2>(bits, stride, rows, (16 * rows - 1) / 2, low, high, 16 * rows);
}

Tap make_tap(index_t i, index_t cells, index_t pixels) {
  const double scale = static_cast<double>(pixels) / static_cast<double>(cells);
  const double position = std::max((static_cast<double>(i) + 0.5) * scale - 0.5, 0.0);
  Tap tap;
  tap.low = std::min(static_cast<index_t>(position), pixels - 1);
  tap.high = std::min(tap.low + 1, pixels - 1);
  tap.weight_high = static_cast<float>(position - static_cast<double>(tap.low));
  tap.weight_low = 1.0f - tap.weight_high;
  return tap;
}

}  // namespace

CellColumns make_columns(const DepthSource& source) {
  CellColumns columns;
  if (source.bilinear)
    for (index_t j = 0; j < source.width; ++j) columns.taps.push_back(make_tap(j, source.width, source.depth_width));
  for (index_t j = 0; j <= source.width; ++j) {
    columns.depth_begin.push_back(cell_begin(j, source.width, source.depth_width));
    if (source.mask) columns.mask_begin.push_back(cell_begin(j, source.width, source.mask_width));
  }
  return columns;
}

void token_row_depth(const DepthSource& source, const CellColumns& columns, index_t t, index_t i,
                     std::vector<int32_t>& cell, float* depth) {
  const float* image = source.depth + t * source.depth_height * source.depth_width;
  if (source.bilinear) {
    const Tap row = make_tap(i, source.height, source.depth_height);
    const float* top = image + row.low * source.depth_width;
    const float* bottom = image + row.high * source.depth_width;
    for (index_t j = 0; j < source.width; ++j) {
      const Tap& column = columns.taps[j];
      const float upper = column.weight_low * top[column.low] + column.weight_high * top[column.high];
      const float lower = column.weight_low * bottom[column.low] + column.weight_high * bottom[column.high];
      const float value = row.weight_low * upper + row.weight_high * lower;
      depth[j] = (value > 0.0f) & is_finite(value) ? value : 0.0f;
    }
    return;
  }
  const index_t begin = cell_begin(i, source.height, source.depth_height);
  const index_t rows = cell_begin(i + 1, source.height, source.depth_height) - begin;
  for (index_t j = 0; j < source.width; ++j) {
    const index_t left = columns.depth_begin[j], width = columns.depth_begin[j + 1] - left;
    const float* corner = image + begin * source.depth_width + left;
    int32_t median = width == 16 ? median_of_full_cell(corner, source.depth_width, static_cast<int>(rows)) : 0;
    if (median == 0) {
      cell.resize(rows * divide_up(width, kLanes) * kLanes);
      const Cell loaded =
          load_cell(corner, source.depth_width, static_cast<int>(rows), static_cast<int>(width), cell.data());
      const bool known = loaded.valid > 0 && 2 * index_t{loaded.valid} >= rows * width;
      median = known ? median_of_copy(cell.data(), loaded) : 0;
    }
    depth[j] = bits_float(static_cast<uint32_t>(median));
  }
}

void token_row_mask(const DepthSource& source, const CellColumns& columns, index_t t, index_t i, bool* is_static) {
  if (!source.mask) {
    std::fill(is_static, is_static + source.width, true);
    return;
  }
  const index_t begin = cell_begin(i, source.height, source.mask_height);
  const index_t end = cell_begin(i + 1, source.height, source.mask_height);
  const auto* image = reinterpret_cast<const uint8_t*>(source.mask) + t * source.mask_height * source.mask_width;
  for (index_t j = 0; j < source.width; ++j) {
    uint8_t all = 1;
    for (index_t r = begin; r < end; ++r)
      for (index_t c = columns.mask_begin[j]; c < columns.mask_begin[j + 1]; ++c)
        all &= image[r * source.mask_width + c];
    is_static[j] = all != 0;
  }
}

MIRAGE_SIMD
void lift_row(const Lift& lift_, index_t i, index_t width, const float* depth, LiftedToken* tokens) {
  const Lift lift = lift_;
  for (index_t j = 0; j < width; ++j) tokens[j] = lift_token(lift, static_cast<int>(i), static_cast<int>(j), depth[j]);
}

DepthSource make_source(const Tensor& depth, const std::optional<Tensor>& mask, index_t height, index_t width,
                        bool bilinear) {
  DepthSource source{};
  source.depth = input<float>(depth);
  source.depth_height = depth.size(1);
  source.depth_width = depth.size(2);
  if (mask.has_value()) {
    source.mask = input<bool>(*mask);
    source.mask_height = mask->size(1);
    source.mask_width = mask->size(2);
  }
  source.height = height;
  source.width = width;
  source.bilinear = bilinear;
  return source;
}

std::vector<Lift> make_lifts(const Tensor& intrinsics, const Tensor& cam2world, const DepthSource& source) {
  std::vector<Lift> lifts(cam2world.size(0));
  for (size_t t = 0; t < lifts.size(); ++t)
    lifts[t] = make_lift(input<double>(intrinsics) + t * 9, input<double>(cam2world) + t * 16, source.depth_height,
                         source.depth_width, source.height, source.width);
  return lifts;
}

}  // namespace mirage::cpu

// Z-buffer key: float bits of z above, token index below. For z > 0 float bits order as z does, so the minimum key is
// the nearest token and, at equal depth, the one with the lowest index. A minimum does not depend on order: no number
// of threads and no schedule changes the winner.
#pragma once

#include "macros.h"

namespace mirage {

constexpr uint64_t kEmptyKey = ~0ull;

MIRAGE_HD uint64_t make_key(float z, uint32_t index) { return (static_cast<uint64_t>(float_bits(z)) << 32) | index; }

MIRAGE_HD float key_depth(uint64_t key) { return bits_float(static_cast<uint32_t>(key >> 32)); }

MIRAGE_HD uint32_t key_index(uint64_t key) { return static_cast<uint32_t>(key); }

}  // namespace mirage

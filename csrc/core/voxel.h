// Voxel key: floor(coordinate / voxel_size) per axis, 21 bits each, packed x, y, z from the top. Points past
// kVoxelLimit voxels, 105 km from the origin at 0.1 m, share the border voxels.
#pragma once

#include "constants.h"
#include "macros.h"

namespace mirage {

constexpr int kVoxelBits = 21;

MIRAGE_HD uint64_t voxel_coordinate(float coordinate, float voxel_size) {
  const float scaled = coordinate / voxel_size;
  // Written so that NaN becomes the lower border: converting it would be undefined.
  const float low = scaled >= -kVoxelLimit ? scaled : -kVoxelLimit;
  const float clamped = low <= kVoxelLimit - 1.0f ? low : kVoxelLimit - 1.0f;
  const int32_t truncated = static_cast<int32_t>(clamped);
  const int32_t floored = truncated - (static_cast<float>(truncated) > clamped ? 1 : 0);
  return static_cast<uint64_t>(floored + 1048576);
}

MIRAGE_HD uint64_t voxel_key(float x, float y, float z, float voxel_size) {
  return (voxel_coordinate(x, voxel_size) << (2 * kVoxelBits)) | (voxel_coordinate(y, voxel_size) << kVoxelBits) |
         voxel_coordinate(z, voxel_size);
}

}  // namespace mirage

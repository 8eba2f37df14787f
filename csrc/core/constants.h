// Numbers that decide results, generated from mirage_kernels/constants.py by csrc/generate_constants.py.
// The Python file says what each of them is: change them there.
#pragma once

#include <cstdint>

namespace mirage {

constexpr int kBlockTokens = 256;
constexpr int kTileBlocks = 64;
constexpr double kCullSlack = 1e-05;
constexpr double kCullTiny = 1e-25;
constexpr float kCullFar = 1000000000000000.0f;
constexpr float kVoxelLimit = 1048576.0f;
constexpr int kBlendTokens = 4;
constexpr float kTokenReach = 0.75f;
constexpr float kMaxFootprintCells = 3.0f;
constexpr float kMaxFootprintRatio = 16.0f;
constexpr float kDepthTolerance = 1.1f;
constexpr float kDirectionWeight = 16.0f;
constexpr int kHoleReachCells = 2;
constexpr float kCoverageThreshold = 0.2f;
constexpr float kCoverageBias = 0.05f;
constexpr float kDuplicateThreshold = 0.02f;
constexpr float kResolutionGain = 1.25f;
constexpr float kCarveTolerance = 1.05f;
constexpr int kMaxObservations = 16;
constexpr uint8_t kInvalid = 255;
constexpr int kMinScale = 11;
constexpr int kMaxScale = 246;
constexpr uint32_t kMaxQuantizedBits = 0x7f600000u;

// Places in the report of bounded_write.
enum WriteReport {
  kReportWritten,
  kReportReplaced,
  kReportMerged,
  kReportCovered,
  kReportRefused,
  kReportMasked,
  kReportUnknownDepth,
  kReportOutOfRange,
  kReportNonFinite,
  kReportCarved,
  kReportEvicted,
};
constexpr int kReportSize = 11;

// What becomes of a token. A rejected one is counted in this place of cache_write's report.
enum TokenStatus : uint8_t {
  kKept = 0,
  kMasked = 2,
  kUnknownDepth = 3,
  kOutOfRange = 4,
  kNonFinite = 5,
};
constexpr int kAppendReportSize = 6;

}  // namespace mirage

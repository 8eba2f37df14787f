"""Numbers that decide results, each in one place.

The C++ sources repeat those of the first two sections in ``csrc/core/constants.h``; a test holds the two files equal.
Numbers that only decide how fast a kernel is stand beside that kernel.
"""

from __future__ import annotations

from enum import IntEnum

# Blocks of tokens, by which reads pass over what no camera sees.
BLOCK_TOKENS = 256  # consecutive rows of points that share one box
TILE_BLOCKS = 64  # consecutive blocks that share one box
CULL_SLACK = 1e-5  # of the terms' magnitudes: covers the rounding of a projection and of a test
CULL_TINY = 1e-25  # covers what underflows
CULL_FAR = 1e15  # past this no sum is sure not to overflow, and nothing is culled

# Voxels of `view_overlap`: what lies outside shares the border voxels.
VOXEL_LIMIT = 2**20

# Scores of `splat_aligned`, measured on a real room (benchmarks/fidelity.py).
BLEND_TOKENS = 4  # that a cell blends at most
TOKEN_REACH = 0.75  # how far a token reaches from its centre, in cells: the corners of a cell are at 0.71
MAX_FOOTPRINT_CELLS = 3.0  # that a footprint counts for at most, where it closes holes
MAX_FOOTPRINT_RATIO = 16.0  # between footprint and cell, either way
DEPTH_TOLERANCE = 1.1  # tokens past this multiple of the nearest depth in a cell belong to another surface
DIRECTION_WEIGHT = 16.0  # of 1 - cos of the angle between viewing rays, against squared distances in cells
HOLE_REACH_CELLS = 2  # whole cells that MAX_FOOTPRINT_CELLS * TOKEN_REACH spans to either side of a token's own

# Thresholds of `bounded_write`, measured on the same room.
COVERAGE_THRESHOLD = 0.2  # a token that is aligned with a cell by this score, or a better one, shows what is there
COVERAGE_BIAS = 0.05  # so does one whose score bias is no more than this, wherever in the cell it lies
DUPLICATE_THRESHOLD = 0.02  # up to this score both are the same observation, and the newer one takes its place
RESOLUTION_GAIN = 1.25  # so does one written from this many times as near
CARVE_TOLERANCE = 1.05  # a view sees through what lies before what it shows by more than this
MAX_OBSERVATIONS = 16  # that a mean remembers, so that it can follow a change
INVALID = 255  # in the place of a token's free-space violations: carved away

# Features of one byte: float8 e4m3 (OCP 8-bit floating point, 1.0) and one scale a token, a power of two stored as its
# biased exponent in a byte, like the E8M0 scales of the OCP Microscaling formats, 1.0.
FLOAT8_MAX = 448.0
SCALE_BIAS = 127
MIN_SCALE = 11  # from here up no value is a subnormal float32, and a latent that is one is no more than half a step
MAX_SCALE = 246  # the greatest at which 448 is a finite float32: 2^119
MAX_QUANTIZED = FLOAT8_MAX * 2.0 ** (MAX_SCALE - SCALE_BIAS)


class TokenStatus(IntEnum):
    """What becomes of a token that is offered to a write: the first that applies of masked to non-finite, else kept."""

    KEPT = 0
    MASKED = 1
    UNKNOWN_DEPTH = 2
    OUT_OF_RANGE = 3
    NON_FINITE = 4


# Names of the counts that `bounded_write` returns, in their order, and of those that `cache_write` returns.
WRITE_REPORT = (
    "written",
    "replaced",
    "merged",
    "covered",
    "refused",
    "masked",
    "unknown_depth",
    "out_of_range",
    "non_finite",
    "carved",
    "evicted",
)
APPEND_REPORT = ("written", "refused", "masked", "unknown_depth", "out_of_range", "non_finite")

# Defaults of the public functions, which C++ does not know.
NEAR = 0.05  # least depth that a camera sees, in world units, of the operators; a cache's is of its own scene:
NEAR_FRACTION = 1 / 64  # of the median depth of the first view that is written
SHARPNESS = 30.0  # of the blend of `splat_aligned`
VIEWS_PER_VOXEL = 4
MAX_VIEWS_PER_VOXEL = 64
CARVE_VIEWS = 2

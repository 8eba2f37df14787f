"""Camera maths of the Triton kernels, the twin of ``csrc/core``: device functions only, called by every operator.

Matrices are composed in float64 and rounded once to float32; per-point work is float32, one operation at a time in the
order of the definitions. Triton's ``/`` is IEEE on float64, and an approximation on float32: there it is ``div_rn``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....constants import VOXEL_LIMIT

PROJECTION_SIZE = 12  # float32 a view: (3, 4), row-major
LIFT_SIZE = 16  # float32 a view: (3, 4) of the pose, row-major, then fx, fy, cx, cy

_PROJECTION = tl.constexpr(PROJECTION_SIZE)
_LIFT = tl.constexpr(LIFT_SIZE)
_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
_VOXEL_LIMIT = tl.constexpr(VOXEL_LIMIT)


@triton.jit
def load_pose(cam2world, view, mask):
    """Load the upper three rows of the poses (T, 4, 4) of a vector of views."""
    pose = cam2world + view.to(tl.int64) * 16
    # Views past the last compose an identity, so that no lane divides by zero.
    return (
        tl.load(pose + 0, mask, other=1.0),
        tl.load(pose + 1, mask, other=0.0),
        tl.load(pose + 2, mask, other=0.0),
        tl.load(pose + 3, mask, other=0.0),
        tl.load(pose + 4, mask, other=0.0),
        tl.load(pose + 5, mask, other=1.0),
        tl.load(pose + 6, mask, other=0.0),
        tl.load(pose + 7, mask, other=0.0),
        tl.load(pose + 8, mask, other=0.0),
        tl.load(pose + 9, mask, other=0.0),
        tl.load(pose + 10, mask, other=1.0),
        tl.load(pose + 11, mask, other=0.0),
    )


@triton.jit
def load_intrinsics(intrinsics, view, mask):
    """Load fx, fy, cx, cy of a vector of views."""
    matrix = intrinsics + view.to(tl.int64) * 9
    return (
        tl.load(matrix + 0, mask, other=1.0),
        tl.load(matrix + 4, mask, other=1.0),
        tl.load(matrix + 2, mask, other=0.0),
        tl.load(matrix + 5, mask, other=0.0),
    )


@triton.jit
def make_projection(intrinsics, cam2world, projections, view, mask):
    """Compose world-to-grid matrices of a vector of views: one lane a view, since float64 is scarce on most GPUs.

    The inverse is the general one of an affine matrix, by cofactors: real poses are rotations only to 4e-4.
    """
    a00, a01, a02, t0, a10, a11, a12, t1, a20, a21, a22, t2 = load_pose(cam2world, view, mask)
    fx, fy, cx, cy = load_intrinsics(intrinsics, view, mask)

    c00 = a11 * a22 - a12 * a21
    c01 = a02 * a21 - a01 * a22
    c02 = a01 * a12 - a02 * a11
    c10 = a12 * a20 - a10 * a22
    c11 = a00 * a22 - a02 * a20
    c12 = a02 * a10 - a00 * a12
    c20 = a10 * a21 - a11 * a20
    c21 = a01 * a20 - a00 * a21
    c22 = a00 * a11 - a01 * a10
    determinant = (a00 * c00 + a01 * c10) + a02 * c20

    r00 = c00 / determinant
    r01 = c01 / determinant
    r02 = c02 / determinant
    r03 = -((r00 * t0 + r01 * t1) + r02 * t2)
    r10 = c10 / determinant
    r11 = c11 / determinant
    r12 = c12 / determinant
    r13 = -((r10 * t0 + r11 * t1) + r12 * t2)
    r20 = c20 / determinant
    r21 = c21 / determinant
    r22 = c22 / determinant
    r23 = -((r20 * t0 + r21 * t1) + r22 * t2)

    projection = projections + view.to(tl.int64) * _PROJECTION
    tl.store(projection + 0, (fx * r00 + cx * r20).to(tl.float32), mask)
    tl.store(projection + 1, (fx * r01 + cx * r21).to(tl.float32), mask)
    tl.store(projection + 2, (fx * r02 + cx * r22).to(tl.float32), mask)
    tl.store(projection + 3, (fx * r03 + cx * r23).to(tl.float32), mask)
    tl.store(projection + 4, (fy * r10 + cy * r20).to(tl.float32), mask)
    tl.store(projection + 5, (fy * r11 + cy * r21).to(tl.float32), mask)
    tl.store(projection + 6, (fy * r12 + cy * r22).to(tl.float32), mask)
    tl.store(projection + 7, (fy * r13 + cy * r23).to(tl.float32), mask)
    tl.store(projection + 8, r20.to(tl.float32), mask)
    tl.store(projection + 9, r21.to(tl.float32), mask)
    tl.store(projection + 10, r22.to(tl.float32), mask)
    tl.store(projection + 11, r23.to(tl.float32), mask)


@triton.jit
def make_lift(intrinsics, cam2world, lifts, view, mask, depth_height, depth_width, height, width):
    """Compose grid-to-world parameters of a vector of views; intrinsics, in pixels of depth, are scaled to the grid."""
    sy = tl.cast(height, tl.float64) / tl.cast(depth_height, tl.float64)
    sx = tl.cast(width, tl.float64) / tl.cast(depth_width, tl.float64)
    a00, a01, a02, t0, a10, a11, a12, t1, a20, a21, a22, t2 = load_pose(cam2world, view, mask)
    fx, fy, cx, cy = load_intrinsics(intrinsics, view, mask)

    lift = lifts + view.to(tl.int64) * _LIFT
    tl.store(lift + 0, a00.to(tl.float32), mask)
    tl.store(lift + 1, a01.to(tl.float32), mask)
    tl.store(lift + 2, a02.to(tl.float32), mask)
    tl.store(lift + 3, t0.to(tl.float32), mask)
    tl.store(lift + 4, a10.to(tl.float32), mask)
    tl.store(lift + 5, a11.to(tl.float32), mask)
    tl.store(lift + 6, a12.to(tl.float32), mask)
    tl.store(lift + 7, t1.to(tl.float32), mask)
    tl.store(lift + 8, a20.to(tl.float32), mask)
    tl.store(lift + 9, a21.to(tl.float32), mask)
    tl.store(lift + 10, a22.to(tl.float32), mask)
    tl.store(lift + 11, t2.to(tl.float32), mask)
    tl.store(lift + 12, (fx * sx).to(tl.float32), mask)
    tl.store(lift + 13, (fy * sy).to(tl.float32), mask)
    tl.store(lift + 14, (cx * sx).to(tl.float32), mask)
    tl.store(lift + 15, (cy * sy).to(tl.float32), mask)


@triton.jit
def lift_token(lift, row, column, depth):
    """Lift tokens of one view to x, y, z and footprint in world units."""
    fx, fy, cx, cy = tl.load(lift + 12), tl.load(lift + 13), tl.load(lift + 14), tl.load(lift + 15)
    x = tl.math.div_rn((column.to(tl.float32) + 0.5) - cx, fx) * depth
    y = tl.math.div_rn((row.to(tl.float32) + 0.5) - cy, fy) * depth
    m00, m01, m02, m03 = tl.load(lift + 0), tl.load(lift + 1), tl.load(lift + 2), tl.load(lift + 3)
    m10, m11, m12, m13 = tl.load(lift + 4), tl.load(lift + 5), tl.load(lift + 6), tl.load(lift + 7)
    m20, m21, m22, m23 = tl.load(lift + 8), tl.load(lift + 9), tl.load(lift + 10), tl.load(lift + 11)
    world_x = ((m00 * x + m01 * y) + m02 * depth) + m03
    world_y = ((m10 * x + m11 * y) + m12 * depth) + m13
    world_z = ((m20 * x + m21 * y) + m22 * depth) + m23
    return world_x, world_y, world_z, tl.math.div_rn(depth, fx)


@triton.jit
def project(projection, x, y, z):
    """Project points to columns, rows and depths of one view. One division a point: u and v share the reciprocal."""
    m00, m01, m02, m03 = (
        tl.load(projection + 0),
        tl.load(projection + 1),
        tl.load(projection + 2),
        tl.load(projection + 3),
    )
    m10, m11, m12, m13 = (
        tl.load(projection + 4),
        tl.load(projection + 5),
        tl.load(projection + 6),
        tl.load(projection + 7),
    )
    m20, m21, m22, m23 = (
        tl.load(projection + 8),
        tl.load(projection + 9),
        tl.load(projection + 10),
        tl.load(projection + 11),
    )
    depth = ((m20 * x + m21 * y) + m22 * z) + m23
    a = ((m00 * x + m01 * y) + m02 * z) + m03
    b = ((m10 * x + m11 * y) + m12 * z) + m13
    inverse = tl.math.div_rn(1.0, depth)
    return a * inverse, b * inverse, depth


@triton.jit
def in_view(u, v, z, height, width, near):
    """Return True in a cell of the grid and in front of ``near``; every comparison with NaN fails."""
    inside = (u >= 0) & (u < tl.cast(width, tl.float32)) & (v >= 0) & (v < tl.cast(height, tl.float32))
    return (z > near) & (z <= _FLOAT_MAX) & inside


@triton.jit
def is_finite(value):
    return tl.abs(value) <= _FLOAT_MAX


@triton.jit
def cell_begin(i, cells, pixels):
    """Return the first pixel of cell i, ceil(i pixels / cells - 0.5): r belongs to floor((r + 0.5) cells / pixels)."""
    return (2 * i * pixels + cells - 1) // (2 * cells)


@triton.jit
def load_rows(points, row, mask, BLOCK: tl.constexpr):
    """Load x, y, z and footprint of points (N, 4), by one 16-byte load each."""
    tile = tl.load(points + row[:, None] * 4 + tl.arange(0, 4)[None, :], mask[:, None], other=0.0)
    xz, yf = tl.split(tl.reshape(tile, (BLOCK, 2, 2)))
    x, z = tl.split(xz)
    y, footprint = tl.split(yf)
    return x, y, z, footprint


@triton.jit
def load_points(points, row, mask, BLOCK: tl.constexpr):
    """Load x, y, z of points (N, 4), by one 16-byte load each."""
    x, y, z, _ = load_rows(points, row, mask, BLOCK)
    return x, y, z


@triton.jit
def store_points(points, row, x, y, z, footprint, mask, BLOCK: tl.constexpr):
    """Store rows of points (N, 4), by one 16-byte store each."""
    tile = tl.reshape(tl.join(tl.join(x, z), tl.join(y, footprint)), (BLOCK, 4))
    tl.store(points + row[:, None] * 4 + tl.arange(0, 4)[None, :], tile, mask[:, None])


# bfloat16 is converted by integers: the interpreter's own conversions truncate and lose denormals, while on a GPU these
# kernels wait for memory either way.


@triton.jit
def widen(value):
    """Convert features of any dtype to float32."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def convert(value, dtype: tl.constexpr):
    """Convert features from one float dtype to another, rounded to nearest even."""
    if value.dtype == dtype:
        return value
    elif dtype == tl.bfloat16:
        bits = widen(value).to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(is_nan, 0x7FC0, rounded).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return widen(value).to(dtype)


@triton.jit
def floor_int(value):
    """Return the floor within int32. Not tl.floor: on a GPU it flushes denormals, and -1e-40 lies below 0."""
    truncated = value.to(tl.int32)
    return tl.where(truncated.to(tl.float32) > value, truncated - 1, truncated)


@triton.jit
def voxel_coordinate(coordinate, voxel_size):
    scaled = tl.math.div_rn(coordinate, voxel_size)
    # Written so that NaN falls to the lower border instead of into an undefined conversion.
    low = tl.where(scaled >= -_VOXEL_LIMIT, scaled, -_VOXEL_LIMIT)
    clamped = tl.where(low <= _VOXEL_LIMIT - 1, low, _VOXEL_LIMIT - 1)
    return (floor_int(clamped) + _VOXEL_LIMIT).to(tl.int64)


@triton.jit
def voxel_key(x, y, z, voxel_size):
    """Pack floor(coordinate / voxel_size) per axis, 21 bits each, x, y, z from the top."""
    x_bits = voxel_coordinate(x, voxel_size) << 42
    y_bits = voxel_coordinate(y, voxel_size) << 21
    return x_bits | y_bits | voxel_coordinate(z, voxel_size)

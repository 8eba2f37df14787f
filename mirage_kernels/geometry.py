"""Projection, lifting, pooling and voxels: the geometry that operators and their users share, in plain PyTorch.

Camera matrices are composed in float64 and rounded once; per-point work then runs in the working dtype, one rounded
operation at a time, in the order the kernels use (see ``csrc/core/camera.h``).

Conventions: OpenCV axes (x right, y down, z forward); pixel coordinates are continuous, column j covers [j, j + 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constants import BLOCK_TOKENS, TILE_BLOCKS, VOXEL_LIMIT


def check_size(size: object, name: str = "size") -> tuple[int, int]:
    """Check a grid (height, width) of two positive integers."""
    if not isinstance(size, (tuple, list, torch.Size)) or len(size) != 2:
        raise ValueError(f"{name} must be (height, width), two positive integers, got {size!r}")
    height, width = size
    for side in (height, width):
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)) or side < 1:
            raise ValueError(f"{name} must be (height, width), two positive integers, got {tuple(size)!r}")
    if height * width >= 2**31:
        raise ValueError(f"{name} must have fewer than 2^31 cells, got {tuple(size)!r}")
    return height, width


def make_projection(intrinsics: Tensor, cam2world: Tensor, dtype: torch.dtype) -> Tensor:
    """Compose world-to-grid matrices ``K @ inverse(cam2world)``.

    Args:
        intrinsics: (T, 3, 3) float64, in cells of the target grid.
        cam2world: (T, 4, 4) float64, any invertible affine matrix.
        dtype: dtype of the result; the composition itself is float64.

    Returns:
        (T, 3, 4): ``(a, b, z) = M (x, y, z, 1)``, a point lies at column a / z and row b / z.
    """
    (a00, a01, a02, t0), (a10, a11, a12, t1), (a20, a21, a22, t2) = (
        tuple(cam2world[:, i, j] for j in range(4)) for i in range(3)
    )
    cofactors = (
        (a11 * a22 - a12 * a21, a02 * a21 - a01 * a22, a01 * a12 - a02 * a11),
        (a12 * a20 - a10 * a22, a00 * a22 - a02 * a20, a02 * a10 - a00 * a12),
        (a10 * a21 - a11 * a20, a01 * a20 - a00 * a21, a00 * a11 - a01 * a10),
    )
    determinant = (a00 * cofactors[0][0] + a01 * cofactors[1][0]) + a02 * cofactors[2][0]
    rows = []
    for c0, c1, c2 in cofactors:
        r0, r1, r2 = c0 / determinant, c1 / determinant, c2 / determinant
        rows.append((r0, r1, r2, -((r0 * t0 + r1 * t1) + r2 * t2)))
    fx, cx = intrinsics[:, 0, 0], intrinsics[:, 0, 2]
    fy, cy = intrinsics[:, 1, 1], intrinsics[:, 1, 2]
    projection = (
        tuple(fx * rows[0][j] + cx * rows[2][j] for j in range(4)),
        tuple(fy * rows[1][j] + cy * rows[2][j] for j in range(4)),
        rows[2],
    )
    return torch.stack([torch.stack(row, dim=-1) for row in projection], dim=-2).to(dtype)


def project_points(points: Tensor, projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project points (N, >= 3) by one (3, 4) matrix: columns u, rows v and depths z, (N,) each."""
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    a, b, depth = (((row[0] * x + row[1] * y) + row[2] * z) + row[3] for row in projection)
    inverse = 1.0 / depth
    return a * inverse, b * inverse, depth


def in_view(u: Tensor, v: Tensor, z: Tensor, size: tuple[int, int], near: float) -> Tensor:
    """Return True where a projection falls into a cell of the grid, in front of ``near``. NaN never passes."""
    height, width = size
    finite = z <= torch.finfo(z.dtype).max
    return (z > near) & finite & (u >= 0) & (u < width) & (v >= 0) & (v < height)


def _cell_pixels(cells: int, pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the pixel indices of every cell, padded: (cells, longest) int64, and which of them are real.

    Pixel r belongs to cell floor((r + 0.5) * cells / pixels).
    """
    cell = torch.arange(cells + 1, device=device)
    begin = (2 * cell * pixels + cells - 1) // (2 * cells)
    longest = (pixels + cells - 1) // cells + 1
    index = begin[:-1, None] + torch.arange(longest, device=device)
    return index.clamp(max=pixels - 1), index < begin[1:, None]


def _gather_cells(image: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Gather (T, H, W) to (T, h, w, K): the K pixels of each cell, padded, and (h, w, K) bool marking the real ones."""
    rows, real_rows = _cell_pixels(size[0], image.shape[1], image.device)
    columns, real_columns = _cell_pixels(size[1], image.shape[2], image.device)
    pixels = image[:, rows[:, None, :, None], columns[None, :, None, :]]
    real = real_rows[:, None, :, None] & real_columns[None, :, None, :]
    return pixels.flatten(3), real.flatten(2)


def pool_depth(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Pool to token depths: the lower median of the valid depths in each cell, 0 where under half of them are valid.

    Args:
        depth: (T, H, W) float; 0, negative, NaN and Inf mean unknown.
        size: the token grid (h, w), at most (H, W).
    """
    pixels, real = _gather_cells(depth, size)
    valid = real & (pixels > 0) & torch.isfinite(pixels)
    count = valid.sum(-1)
    ordered = torch.where(valid, pixels, torch.inf).sort(dim=-1).values
    median = ordered.gather(-1, ((count - 1) // 2).clamp(min=0)[..., None])[..., 0]
    known = (2 * count >= real.sum(-1)) & (count > 0)
    return torch.where(known, median, 0.0)


def nearest_depth(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Pool (T, H, W) to (T, h, w): the least valid depth of each cell, infinite where there is none."""
    pixels, real = _gather_cells(depth, size)
    return torch.where(real & (pixels > 0) & torch.isfinite(pixels), pixels, torch.inf).amin(-1)


def resize_depth_bilinear(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize depth bilinearly without antialiasing, as ``F.interpolate(mode="bilinear", align_corners=False)``.

    For parity with the published code: it blends the zeros of unknown pixels into real surfaces.
    """

    def taps(cells: int, pixels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Half-pixel source positions; weights rounded once to the working dtype.
        position = (torch.arange(cells, device=depth.device, dtype=torch.float64) + 0.5) * (pixels / cells) - 0.5
        position = position.clamp(min=0)
        low = position.long().clamp(max=pixels - 1)
        weight = (position - low).to(depth.dtype)
        return low, (low + 1).clamp(max=pixels - 1), 1 - weight, weight

    top, bottom, weight_top, weight_bottom = taps(size[0], depth.shape[1])
    left, right, weight_left, weight_right = taps(size[1], depth.shape[2])
    upper = weight_left * depth[:, top[:, None], left] + weight_right * depth[:, top[:, None], right]
    lower = weight_left * depth[:, bottom[:, None], left] + weight_right * depth[:, bottom[:, None], right]
    return weight_top[:, None] * upper + weight_bottom[:, None] * lower


def sample_depth(depth: Tensor, size: tuple[int, int], bilinear: bool) -> tuple[Tensor, Tensor]:
    """Sample token depths (T, h, w), by the median or bilinearly, and where they are known (T, h, w)."""
    z = resize_depth_bilinear(depth, size) if bilinear else pool_depth(depth, size)
    return z, (z > 0) & torch.isfinite(z)


def pool_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Pool (T, H, W) bool, True = static, to (T, h, w): a token is static only if all its pixels are."""
    pixels, real = _gather_cells(mask, size)
    return (pixels | ~real).all(-1)


def lift_depth(depth: Tensor, z: Tensor, intrinsics: Tensor, cam2world: Tensor) -> Tensor:
    """Lift token depths z (T, h, w) of a depth map (T, H, W) to (T, h, w, 4): x, y, z, footprint."""
    height, width = z.shape[1:]
    sy, sx = height / depth.shape[1], width / depth.shape[2]

    def parameter(values: Tensor) -> Tensor:
        return values.to(z.dtype)[:, None, None]

    fx, cx = parameter(intrinsics[:, 0, 0] * sx), parameter(intrinsics[:, 0, 2] * sx)
    fy, cy = parameter(intrinsics[:, 1, 1] * sy), parameter(intrinsics[:, 1, 2] * sy)
    column = torch.arange(width, device=z.device, dtype=z.dtype) + 0.5
    row = torch.arange(height, device=z.device, dtype=z.dtype)[:, None] + 0.5
    x = (column - cx) / fx * z
    y = (row - cy) / fy * z
    m = [[parameter(cam2world[:, i, j]) for j in range(4)] for i in range(3)]
    world = [((m[i][0] * x + m[i][1] * y) + m[i][2] * z) + m[i][3] for i in range(3)]
    return torch.stack([*world, z / fx], dim=-1)


def z_order(size: tuple[int, int]) -> Tensor:
    """Order the cells of a grid along a Z-order curve, (h w,) int32: neighbours in the order are so in the grid."""
    cell = torch.arange(size[0] * size[1])
    row, column, code = cell // size[1], cell % size[1], torch.zeros_like(cell)
    for bit in range(16):
        code |= ((column >> bit & 1) << 2 * bit) | ((row >> bit & 1) << 2 * bit + 1)
    return code.argsort().int()


def token_voxels(points: Tensor) -> Tensor:
    """Key the voxel of each token (N, 4), (N,) int64.

    Its edge is the power of two nearest, as a ratio, to the footprint: 7 bits of level, held to [-62, 62].
    19 bits an axis: what lies outside shares the border voxels.
    """
    # The exponent, and one more where the rest is past the square root of two.
    bits = points[:, 3].float().view(torch.int32)
    level = ((bits >> 23 & 0xFF) - 127 + ((bits & 0x7FFFFF) > 0x3504F3).int()).clamp(-62, 62)
    inverse = ((127 - level) << 23).view(torch.float32).to(points.dtype)
    scaled = (points[:, :3] * inverse[:, None]).floor().nan_to_num(nan=-(2.0**18)).clamp(-(2**18), 2**18 - 1)
    x, y, z = (scaled.long() + 2**18).unbind(-1)
    return ((level.long() + 62) << 57) | (x << 38) | (y << 19) | z


def voxel_keys(points: Tensor, voxel_size: float) -> Tensor:
    """Key the voxels of points, (N,) int64: floor(coordinate / voxel_size) per axis, 21 bits each.

    What lies outside shares the border voxels.
    """
    size = torch.tensor(voxel_size, dtype=points.dtype, device=points.device)
    scaled = (points[:, :3] / size).nan_to_num(nan=-VOXEL_LIMIT).clamp(-VOXEL_LIMIT, VOXEL_LIMIT - 1)
    x, y, z = (scaled.floor().long() + VOXEL_LIMIT).unbind(-1)
    return (x << 42) | (y << 21) | z


def bounds_rows(points: int) -> int:
    """Count the rows of the bounds of so many points: B = ceil(N / 256) boxes of blocks, then ceil(B / 64) of tiles."""
    blocks = -(-points // BLOCK_TOKENS)
    return blocks + -(-blocks // TILE_BLOCKS)

"""The operators as loops over Python floats (float64), written from the specification alone.

Nothing here is shared with the package: no code, no tensor operation. Slow and plain on purpose; inputs and outputs are
numpy arrays. The arithmetic is float64, so results differ from float32 kernels by rounding: ``comparison.py`` says how
much of that is allowed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

NEAR = 0.05


class Lifted(NamedTuple):
    points: np.ndarray  # (T, h, w, 4) float64: x, y, z, footprint; 0 where not valid
    valid: np.ndarray  # (T, h, w) bool
    depth: np.ndarray  # (T, h, w) float64, the token's depth; 0 where unknown
    sampled: np.ndarray  # (T, h, w) float64, what the sampling gave, whether it is a depth or not
    static: np.ndarray  # (T, h, w) bool
    finite: np.ndarray  # (T, h, w) bool: position and footprint
    magnitude: np.ndarray  # (T, h, w) float64: size of the terms summed into a coordinate, for rounding bounds


class Projected(NamedTuple):
    u: float  # column, in cells; NaN where the camera or the point is degenerate
    v: float
    z: float
    magnitude_u: float  # size of the terms summed into u, v, z, for rounding bounds
    magnitude_v: float
    magnitude_z: float


class Seen(NamedTuple):
    mask: np.ndarray  # (T, h, w) bool
    depth: np.ndarray  # (T, h, w) float64
    index: np.ndarray  # (T, h, w) int64
    projected: list[list[Projected]]  # per view, per live point


class Written(NamedTuple):
    points: np.ndarray  # (M, 4) float64, the tokens kept, room or no room, in order
    latents: np.ndarray  # (M, C) as given
    frame_ids: np.ndarray  # (M,)
    magnitude: np.ndarray  # (M,)
    report: list[int]  # written, refused, masked, unknown_depth, out_of_range, non_finite


def divide(numerator: float, denominator: float) -> float:
    """IEEE division: by zero it is infinite or NaN, not an exception."""
    with np.errstate(all="ignore"):
        return float(np.float64(numerator) / np.float64(denominator))


def known(depth: float) -> bool:
    return math.isfinite(depth) and depth > 0


def cell_of_pixel(pixel: int, pixels: int, cells: int) -> int:
    """Pixel r of H belongs to cell floor((r + 0.5) h / H), in integers: exact."""
    return ((2 * pixel + 1) * cells) // (2 * pixels)


def pixels_of_cell(cell: int, pixels: int, cells: int) -> list[int]:
    return [pixel for pixel in range(pixels) if cell_of_pixel(pixel, pixels, cells) == cell]


def sample_median(depth: np.ndarray, rows: list[int], columns: list[int]) -> float:
    """Lower median of the known depths; 0 where under half of the pixels are known."""
    depths = sorted(float(depth[r, c]) for r in rows for c in columns if known(float(depth[r, c])))
    if not depths or 2 * len(depths) < len(rows) * len(columns):
        return 0.0
    return depths[(len(depths) - 1) // 2]


def sample_bilinear(depth: np.ndarray, row: int, column: int, size: tuple[int, int]) -> float:
    """Blend the four pixels about the cell's centre, as they are (half-pixel centres, edges clamped).

    The published code's own sampling: zeros and negative depths are blended in, NaN and Inf make the token unknown even
    with a weight of zero.
    """
    height, width = depth.shape
    y = max((row + 0.5) * height / size[0] - 0.5, 0.0)
    x = max((column + 0.5) * width / size[1] - 0.5, 0.0)
    top, left = min(math.floor(y), height - 1), min(math.floor(x), width - 1)
    down, right = y - top, x - left
    total = 0.0
    for r, row_weight in ((top, 1 - down), (min(top + 1, height - 1), down)):
        for c, column_weight in ((left, 1 - right), (min(left + 1, width - 1), right)):
            total += row_weight * (column_weight * float(depth[r, c]))
    return total


def back_project(
    depth: np.ndarray,
    intrinsics: np.ndarray,
    cam2world: np.ndarray,
    size: tuple[int, int],
    mask: np.ndarray | None = None,
    depth_sampling: str = "median",
) -> Lifted:
    views, height, width = depth.shape
    shape = (views, *size)
    out = Lifted(
        np.zeros((*shape, 4)),
        np.zeros(shape, bool),
        np.zeros(shape),
        np.zeros(shape),
        np.ones(shape, bool),
        np.zeros(shape, bool),
        np.zeros(shape),
    )
    for t in range(views):
        fx, fy = float(intrinsics[t, 0, 0]) * size[1] / width, float(intrinsics[t, 1, 1]) * size[0] / height
        cx, cy = float(intrinsics[t, 0, 2]) * size[1] / width, float(intrinsics[t, 1, 2]) * size[0] / height
        for i in range(size[0]):
            for j in range(size[1]):
                if depth_sampling == "median":
                    rows, columns = pixels_of_cell(i, height, size[0]), pixels_of_cell(j, width, size[1])
                    z = sample_median(depth[t], rows, columns)
                else:
                    z = sample_bilinear(depth[t], i, j, size)
                out.sampled[t, i, j] = z
                if mask is not None:
                    mask_rows = pixels_of_cell(i, mask.shape[1], size[0])
                    mask_columns = pixels_of_cell(j, mask.shape[2], size[1])
                    out.static[t, i, j] = all(bool(mask[t, r, c]) for r in mask_rows for c in mask_columns)
                if not known(z):
                    continue
                out.depth[t, i, j] = z
                x_camera, y_camera = divide((j + 0.5 - cx) * z, fx), divide((i + 0.5 - cy) * z, fy)
                terms = (
                    abs(divide((j + 0.5 + abs(cx)) * z, fx)),
                    abs(divide((i + 0.5 + abs(cy)) * z, fy)),
                    z,
                )
                point, magnitude = [], 0.0
                for axis in range(3):
                    r0, r1, r2, shift = (float(value) for value in cam2world[t, axis])
                    point.append(r0 * x_camera + r1 * y_camera + r2 * z + shift)
                    size_here = abs(r0) * terms[0] + abs(r1) * terms[1] + abs(r2) * terms[2] + abs(shift)
                    magnitude = max(magnitude, size_here)
                point.append(divide(z, fx))
                out.finite[t, i, j] = all(math.isfinite(value) for value in point)
                out.magnitude[t, i, j] = magnitude
                if out.static[t, i, j] and out.finite[t, i, j]:
                    out.valid[t, i, j] = True
                    out.points[t, i, j] = point
    return out


def world_to_camera(cam2world: np.ndarray) -> tuple[list[list[float]], list[float]] | None:
    """General inverse by cofactors: real rotations are only nearly orthonormal. None where there is none."""
    a, b, c = (float(x) for x in cam2world[0, :3])
    d, e, f = (float(x) for x in cam2world[1, :3])
    g, h, i = (float(x) for x in cam2world[2, :3])
    determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    if not math.isfinite(determinant) or determinant == 0:
        return None
    cofactors = [
        [e * i - f * h, c * h - b * i, b * f - c * e],
        [f * g - d * i, a * i - c * g, c * d - a * f],
        [d * h - e * g, b * g - a * h, a * e - b * d],
    ]
    rotation = [[value / determinant for value in row] for row in cofactors]
    center = [float(cam2world[axis, 3]) for axis in range(3)]
    shift = [-sum(row[axis] * center[axis] for axis in range(3)) for row in rotation]
    return rotation, shift


def project(point: np.ndarray, intrinsics: np.ndarray, cam2world: np.ndarray) -> Projected:
    nothing = Projected(math.nan, math.nan, math.nan, 0.0, 0.0, 0.0)
    inverse = world_to_camera(cam2world)
    xyz = [float(point[axis]) for axis in range(3)]
    if inverse is None or not all(math.isfinite(value) for value in xyz):
        return nothing
    camera, sizes = [], []
    for row, shift in zip(*inverse, strict=True):
        camera.append(sum(row[axis] * xyz[axis] for axis in range(3)) + shift)
        sizes.append(sum(abs(row[axis] * xyz[axis]) for axis in range(3)) + abs(shift))
    x, y, z = camera
    fx, fy = float(intrinsics[0, 0]), float(intrinsics[1, 1])
    cx, cy = float(intrinsics[0, 2]), float(intrinsics[1, 2])
    u, v = divide(fx * x, z) + cx, divide(fy * y, z) + cy
    if not all(math.isfinite(value) for value in (u, v, z)):
        return nothing
    # u = a / z with a = fx x + cx z: du = da / z + u dz / z.
    magnitude_u = (abs(fx) * sizes[0] + (abs(cx) + abs(u)) * sizes[2]) / abs(z)
    magnitude_v = (abs(fy) * sizes[1] + (abs(cy) + abs(v)) * sizes[2]) / abs(z)
    return Projected(u, v, z, magnitude_u, magnitude_v, sizes[2])


def inside(at: Projected, size: tuple[int, int], near: float) -> bool:
    """False for NaN: comparisons with it are."""
    return at.z > near and 0 <= at.u < size[1] and 0 <= at.v < size[0]


def splat(
    points: np.ndarray,
    intrinsics: np.ndarray,
    cam2world: np.ndarray,
    size: tuple[int, int],
    num_points: int | None = None,
    near: float = NEAR,
) -> Seen:
    """Winners only: the latents are the winners' features."""
    views = len(cam2world)
    live = len(points) if num_points is None else max(0, min(num_points, len(points)))
    seen = Seen(np.zeros((views, *size), bool), np.zeros((views, *size)), np.full((views, *size), -1), [])
    for t in range(views):
        seen.projected.append([project(points[k], intrinsics[t], cam2world[t]) for k in range(live)])
        for k, at in enumerate(seen.projected[t]):
            if not inside(at, size, near):
                continue
            cell = t, math.floor(at.v), math.floor(at.u)
            if not seen.mask[cell] or at.z < seen.depth[cell]:  # equal depth: the lower index stays
                seen.mask[cell], seen.depth[cell], seen.index[cell] = True, at.z, k
    return seen


class Blended(NamedTuple):
    tokens: list[int]  # best first
    scores: list[float]
    shares: list[float]
    depth: float  # of the best


def aligned_cells(
    points: np.ndarray,
    frame_ids: np.ndarray,
    frame_centers: np.ndarray,
    intrinsics: np.ndarray,
    cam2world: np.ndarray,
    size: tuple[int, int],
    sharpness: float,
    num_points: int | None = None,
    near: float = NEAR,
) -> dict[tuple[int, int, int], Blended]:
    """What each cell (view, row, column) that is no hole blends, cell by cell over all tokens."""
    live = len(points) if num_points is None else max(0, min(num_points, len(points)))
    blended = {}
    for t in range(len(cam2world)):
        fx, eye = float(intrinsics[t, 0, 0]), [float(cam2world[t, axis, 3]) for axis in range(3)]
        tokens = []
        for k in range(live):
            at = project(points[k], intrinsics[t], cam2world[t])
            if not at.z > near:
                continue
            ratio = float(points[k, 3]) * fx / at.z
            ratio = min(max(ratio, 1 / 16), 16.0) if ratio == ratio else 1 / 16
            turn = 0.0
            if 0 <= frame_ids[k] < len(frame_centers):
                writer = [float(value) for value in frame_centers[frame_ids[k]]]
                one = [float(points[k, axis]) - writer[axis] for axis in range(3)]
                two = [float(points[k, axis]) - eye[axis] for axis in range(3)]
                lengths = math.hypot(*one) * math.hypot(*two)
                if math.isfinite(lengths) and lengths > 0:
                    turn = 1 - sum(a * b for a, b in zip(one, two, strict=True)) / lengths
            tokens.append((k, at, ratio, (ratio - 1) ** 2 / ratio + 16 * max(turn, 0.0)))
        for i in range(size[0]):
            for j in range(size[1]):
                reached = [(*token, (token[1].u - j - 0.5) ** 2 + (token[1].v - i - 0.5) ** 2) for token in tokens]
                candidates = [token for token in reached if token[4] <= 0.75**2]
                if not candidates:
                    candidates = [token for token in reached if token[4] <= (0.75 * min(max(token[2], 1), 3)) ** 2]
                if not candidates:
                    continue
                front = min(token[1].z for token in candidates)
                surface = [token for token in candidates if token[1].z <= 1.1 * front]
                best = sorted((token[4] + token[3], token[0], token[1].z) for token in surface)[:4]
                weights = [1.0]
                for score, _, _ in best[1:]:
                    behind = score - best[0][0]
                    x = (
                        0.0
                        if behind == 0 and math.isfinite(sharpness)
                        else sharpness * behind
                        if behind > 0
                        else math.inf
                    )
                    weights.append(max(0.0, 1 - x / 8) ** 8)
                blended[t, i, j] = Blended(
                    [token for _, token, _ in best],
                    [score for score, _, _ in best],
                    [weight / sum(weights) for weight in weights],
                    best[0][2],
                )
    return blended


def block_bounds(points: np.ndarray, num_points: int | None = None) -> np.ndarray:
    """Least and greatest x, y, z of the live points of each 256, then of each 16,384, whose coordinates are finite."""
    live = len(points) if num_points is None else max(0, min(num_points, len(points)))
    blocks, tiles = -(-len(points) // 256), -(-len(points) // 16384)
    bounds = np.array([[math.inf] * 3 + [-math.inf] * 3] * (blocks + tiles)).reshape(-1, 6)
    for k in range(live):
        x, y, z = (float(value) for value in points[k, :3])
        if math.isfinite(x) and math.isfinite(y) and math.isfinite(z):
            for box in (bounds[k // 256], bounds[blocks + k // 16384]):
                box[:3] = [min(low, value) for low, value in zip(box[:3], (x, y, z), strict=True)]
                box[3:] = [max(high, value) for high, value in zip(box[3:], (x, y, z), strict=True)]
    return bounds + 0.0


def splat_backward(grad_latents: np.ndarray, index: np.ndarray, num_points: int) -> np.ndarray:
    """(N, C): a token's gradient is the sum over the cells it won."""
    views, channels, height, width = grad_latents.shape
    grad = np.zeros((num_points, channels))
    for t in range(views):
        for i in range(height):
            for j in range(width):
                if index[t, i, j] >= 0:
                    for c in range(channels):
                        grad[index[t, i, j], c] += float(grad_latents[t, c, i, j])
    return grad


def cache_write(
    latents: np.ndarray,
    depth: np.ndarray,
    intrinsics: np.ndarray,
    cam2world: np.ndarray,
    room: int,
    mask: np.ndarray | None = None,
    first_frame: int = 0,
    depth_sampling: str = "median",
    min_depth: float = 0.0,
    max_depth: float = math.inf,
) -> Written:
    views, channels, height, width = latents.shape
    lifted = back_project(depth, intrinsics, cam2world, (height, width), mask, depth_sampling)
    points, kept, frames, magnitudes = [], [], [], []
    written = refused = masked = unknown_depth = out_of_range = non_finite = 0
    for t in range(views):
        for i in range(height):
            for j in range(width):
                z = lifted.depth[t, i, j]
                values = latents[t, :, i, j]
                if not lifted.static[t, i, j]:
                    masked += 1
                elif z <= 0:
                    unknown_depth += 1
                elif not min_depth <= z <= max_depth:
                    out_of_range += 1
                elif not lifted.finite[t, i, j] or not all(math.isfinite(float(x)) for x in values):
                    non_finite += 1
                else:
                    points.append(lifted.points[t, i, j])
                    kept.append(values)
                    frames.append(first_frame + t)
                    magnitudes.append(lifted.magnitude[t, i, j])
                    if written < room:
                        written += 1
                    else:
                        refused += 1
    return Written(
        np.array(points).reshape(-1, 4),
        np.array(kept, latents.dtype).reshape(-1, channels),
        np.array(frames, np.int64),
        np.array(magnitudes),
        [written, refused, masked, unknown_depth, out_of_range, non_finite],
    )


def voxel(point: np.ndarray, voxel_size: float) -> tuple[int, int, int]:
    x, y, z = (math.floor(float(point[axis]) / voxel_size) for axis in range(3))
    return x, y, z


def view_overlap(
    points: np.ndarray,
    intrinsics: np.ndarray,
    cam2world: np.ndarray,
    target_intrinsics: np.ndarray,
    target_cam2world: np.ndarray,
    size: tuple[int, int],
    num_points: int | None = None,
    voxel_size: float = 0.1,
    near: float = NEAR,
) -> list[float]:
    live = len(points) if num_points is None else max(0, min(num_points, len(points)))

    def voxels_seen(matrix: np.ndarray, pose: np.ndarray) -> set[tuple[int, int, int]]:
        return {
            voxel(points[k], voxel_size) for k in range(live) if inside(project(points[k], matrix, pose), size, near)
        }

    target: set[tuple[int, int, int]] = set()
    for matrix, pose in zip(target_intrinsics, target_cam2world, strict=True):
        target |= voxels_seen(matrix, pose)
    overlaps = []
    for matrix, pose in zip(intrinsics, cam2world, strict=True):
        seen = voxels_seen(matrix, pose)
        union = seen | target
        overlaps.append(len(seen & target) / len(union) if union else 0.0)
    return overlaps


class Token:
    """A held token of a bounded cache."""

    def __init__(self, point: list[float], latent: list[float], frame: int) -> None:
        self.point, self.latent, self.frame = point, latent, frame
        self.free_space_violations, self.num_observations = 0, 1


def token_voxel(point: list[float]) -> tuple[int, int, int, int]:
    level = math.floor(math.log2(point[3]) + 0.5)
    return level, *(math.floor(value / 2.0**level) for value in point[:3])


def z_code(row: int, column: int) -> int:
    return int("".join(b + a for a, b in zip(f"{column:016b}", f"{row:016b}", strict=True)), 2)


def bounded_write(
    held: list[Token],
    frame_centers: np.ndarray,
    latents: np.ndarray,
    depth: np.ndarray,
    intrinsics: np.ndarray,
    cam2world: np.ndarray,
    capacity: int,
    mask: np.ndarray | None = None,
    first_frame: int = 0,
    min_depth: float = 0.0,
    max_depth: float = math.inf,
    views_per_voxel: int = 4,
    carve_views: int = 2,
    merge: bool = False,
) -> dict[str, int]:
    """Writes into ``held``; carved tokens leave it at the end. Returns the report."""
    of_tokens = ("written", "replaced", "merged", "covered", "refused")
    report = dict.fromkeys(
        (*of_tokens, "masked", "unknown_depth", "out_of_range", "non_finite", "carved", "evicted"), 0
    )
    views, _, height, width = latents.shape
    size = (height, width)
    lifted = back_project(depth, intrinsics, cam2world, size, mask)
    dead: set[Token] = set()
    cells = sorted(((i, j) for i in range(height) for j in range(width)), key=lambda cell: z_code(*cell))
    for t in range(views):
        grid = intrinsics[t].astype(float).copy()
        grid[0] *= width / depth.shape[2]
        grid[1] *= height / depth.shape[1]
        eye = [float(cam2world[t, axis, 3]) for axis in range(3)]
        least = [[math.inf] * width for _ in range(height)]
        for r in range(depth.shape[1]):
            for c in range(depth.shape[2]):
                if known(float(depth[t, r, c])):
                    i, j = cell_of_pixel(r, depth.shape[1], height), cell_of_pixel(c, depth.shape[2], width)
                    least[i][j] = min(least[i][j], float(depth[t, r, c]))

        worth = {}
        for i, j in cells:
            z = lifted.depth[t, i, j]
            if not lifted.static[t, i, j]:
                report["masked"] += 1
            elif z <= 0:
                report["unknown_depth"] += 1
            elif not min_depth <= z <= max_depth:
                report["out_of_range"] += 1
            elif not lifted.finite[t, i, j] or not all(math.isfinite(float(x)) for x in latents[t, :, i, j]):
                report["non_finite"] += 1
            else:
                worth[i, j] = [float(value) for value in lifted.points[t, i, j]]

        best: dict[tuple[int, int], tuple[float, int]] = {}
        taken: dict[tuple[int, int, int, int], int] = {}
        for k, token in enumerate(held):
            if token in dead:
                continue
            at = project(np.array(token.point), grid, cam2world[t])
            visible = inside(at, size, NEAR)
            if visible:
                i, j = math.floor(at.v), math.floor(at.u)
                surface = lifted.depth[t, i, j]
                close = surface > 0 and at.z <= 1.1 * surface and surface <= 1.1 * at.z
                if carve_views > 0:
                    rows = {min(max(math.floor(at.v - 0.5) + a, 0), height - 1) for a in (0, 1)}
                    columns = {min(max(math.floor(at.u - 0.5) + b, 0), width - 1) for b in (0, 1)}
                    around = [(least[r][c], lifted.depth[t, r, c]) for r in rows for c in columns]
                    shown = [own if 1.05 * nearest < at.z else nearest for nearest, own in around]
                    if 1.05 * at.z < surface and all(1.05 * at.z < z or 1.05 * z < at.z for z in shown):
                        token.free_space_violations += 1
                        if token.free_space_violations >= carve_views:
                            dead.add(token)
                            report["carved"] += 1
                            continue
                    elif close:
                        token.free_space_violations = 0
                if close and (i, j) in worth:
                    ratio = min(max(token.point[3] * float(grid[0, 0]) / at.z, 1 / 16), 16.0)
                    writer = [float(value) for value in frame_centers[token.frame]]
                    one, two = ([p - c for p, c in zip(token.point, end, strict=False)] for end in (writer, eye))
                    turn = 1 - sum(a * b for a, b in zip(one, two, strict=True)) / math.hypot(*one) / math.hypot(*two)
                    lack = (ratio - 1) ** 2 / ratio + 16 * max(turn, 0.0)
                    score = (at.u - j - 0.5) ** 2 + (at.v - i - 0.5) ** 2 + lack
                    if score <= 0.2 or lack <= 0.05:
                        best[i, j] = min(best.get((i, j), (math.inf, 0)), (score, k))
            voxel_here = token_voxel(token.point)
            taken[voxel_here] = taken.get(voxel_here, 0) + 1

        def enters(voxel_here: tuple[int, int, int, int], taken: dict[Any, int] = taken) -> bool:
            if taken.get(voxel_here, 0) >= views_per_voxel:
                return False
            taken[voxel_here] = taken.get(voxel_here, 0) + 1
            return True

        added = []
        for cell, point in ((cell, worth[cell]) for cell in cells if cell in worth):
            latent = [float(value) for value in latents[t, :, cell[0], cell[1]]]
            if cell not in best:
                if enters(token_voxel(point)) and len(held) + len(added) < capacity:
                    added.append(Token(point, latent, first_frame + t))
                    report["written"] += 1
                else:
                    report["refused"] += 1
                continue
            score, k = best[cell]
            token = held[k]
            if merge:
                n = token.num_observations
                mean = [(a * n + b) / (n + 1) for a, b in zip(token.point, point, strict=True)]
                if token_voxel(mean) == token_voxel(token.point):
                    token.point = mean
                token.latent = [(a * n + b) / (n + 1) for a, b in zip(token.latent, latent, strict=True)]
                token.num_observations = min(n + 1, 16)
                report["merged"] += 1
            elif (score <= 0.02 or token.point[3] >= 1.25 * point[3]) and (
                token_voxel(token.point) == token_voxel(point) or enters(token_voxel(point))
            ):
                token.point, token.latent = point, latent
                report["replaced"] += 1
            else:
                report["covered"] += 1
                continue
            token.frame, token.free_space_violations = first_frame + t, 0
        held += added
    held[:] = [token for token in held if token not in dead]
    return report


def float8_values() -> np.ndarray:
    """(256,) float64: what each float8 e4m3 code stands for, by the OCP specification; 0x7f and 0xff are NaN."""
    values = []
    for code in range(256):
        exponent, mantissa = (code >> 3) & 15, code & 7
        value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        value = math.nan if code & 127 == 127 else value
        values.append(math.copysign(value, -1 if code & 128 else 1))
    return np.array(values)


def quantise(row: np.ndarray) -> tuple[list[int], int]:
    """float8 codes and scale of a token: the least scale that saturates nothing, then the nearest codes, ties even."""
    values = [float(value) for value in row]
    largest = max((abs(value) for value in values), default=0.0)
    scale = next(s for s in range(11, 247) if largest <= 448 * 2.0 ** (s - 127))
    finite = float8_values()[:127]
    codes = []
    for value in values:
        distance = np.abs(finite - abs(value) * 2.0 ** (127 - scale))
        nearest = np.flatnonzero(distance == distance.min())
        best = next((code for code in nearest if code % 2 == 0), nearest[0])
        codes.append(int(best) + (128 if math.copysign(1, value) < 0 else 0))
    return codes, scale

"""Comparing an operator's results with the brute force, exact but for rounding.

A float32 kernel may decide differently from float64 loops in two places only: a projection that lies on a cell's border
(or on ``near``), and two depths that nearly tie. Every cell that differs from the brute force must be explained by one
of them, within a forward error bound computed point by point from the sizes of the terms summed; the cells so explained
are counted and bounded. All other cells must agree exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import brute_force
import numpy as np
import torch
from torch import Tensor

FLOAT32_ROUNDING = 8 * 2.0**-23
FLOAT64_ROUNDING = 64 * 2.0**-52
BORDER = 1e-3  # cells: no doubt reaches farther than this, but for extreme intrinsics


def as_array(tensor: Tensor | np.ndarray) -> np.ndarray:
    """On the host, exactly: half precisions are widened."""
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


def assert_equal_bits(got: Any, expected: Any) -> None:
    """The same shapes, dtypes and bits; NaN equals itself, 0 does not equal -0."""
    assert len(got) == len(expected)
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, f"{k}: {a.shape} {a.dtype}, not {b.shape} {b.dtype}"
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        ours, theirs = (x.detach().cpu().contiguous().view(bits).numpy() for x in (a, b))
        if not np.array_equal(ours, theirs):
            raise AssertionError(f"{k}: {int((ours != theirs).sum())} of {ours.size} values differ")


def assert_same_view(
    view: Any,
    points: Tensor,
    features: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    size: tuple[int, int],
    *,
    num_points: int | None = None,
    near: float = brute_force.NEAR,
    dtype: torch.dtype | None = None,
    extreme: bool = False,
    most_exceptions: float = 0.01,
    least_covered: int = 1,
) -> int:
    """A splat is what the brute force says. Returns the number of covered cells, at least ``least_covered``.

    ``extreme``: the bound on doubt is not held to a thousandth of a cell, and the exceptions are not counted.
    """
    dtype = features.dtype if dtype is None else dtype
    expected = brute_force.splat(
        as_array(points), as_array(intrinsics), as_array(cam2world), size, num_points=num_points, near=near
    )
    views = expected.index.shape[0]
    assert view.latents.shape == (views, features.shape[1], *size) and view.latents.dtype == dtype
    assert view.mask.shape == view.depth.shape == view.index.shape == (views, *size)
    assert view.mask.dtype == torch.bool and view.index.dtype == torch.int64 and view.depth.dtype.is_floating_point
    mask, depth, index = as_array(view.mask), as_array(view.depth), as_array(view.index)

    assert int(expected.mask.sum()) >= least_covered, "the scene shows nothing: the test would test nothing"
    assert np.array_equal(mask, index >= 0)
    assert not depth[~mask].any()
    # The latents are the features of the winner to the last bit, whoever won; zero in holes.
    winners = features.detach().cpu()[view.index.cpu().clamp(min=0)] if len(features) else None
    if winners is None:
        assert not view.latents.detach().any()
    else:
        winners = (winners * 1).masked_fill(~view.mask.cpu()[..., None], 0).to(dtype).movedim(3, 1)
        assert_equal_bits([view.latents], [winners])

    rounding = FLOAT64_ROUNDING if points.dtype == torch.float64 else FLOAT32_ROUNDING
    exceptions = 0
    for t in range(views):
        projected = np.array(expected.projected[t], np.float64).reshape(-1, 6)
        u, v, z = projected[:, 0], projected[:, 1], projected[:, 2]
        doubt_u, doubt_v, doubt_z = rounding * projected[:, 3], rounding * projected[:, 4], rounding * projected[:, 5]
        if not extreme:
            shown = (z > near) & (u > -1) & (u < size[1] + 1) & (v > -1) & (v < size[0] + 1)
            assert not shown.any() or max(doubt_u[shown].max(), doubt_v[shown].max()) < BORDER
        if mask[t].any():
            won = index[t][mask[t]]
            assert won.max() < len(z)
            assert (np.abs(depth[t][mask[t]] - z[won]) <= doubt_z[won] + 1e-30).all()
        for i, j in zip(*np.nonzero(index[t] != expected.index[t]), strict=True):
            exceptions += 1
            got, best = int(index[t, i, j]), int(expected.index[t, i, j])
            surely = (z > near + doubt_z) & (u >= j + doubt_u) & (u < j + 1 - doubt_u)
            surely &= (v >= i + doubt_v) & (v < i + 1 - doubt_v)
            if got < 0:
                assert not surely.any(), f"view {t}, cell {(i, j)}: a hole, but token {best} falls into it"
                continue
            falls = z[got] > near - doubt_z[got] and j - doubt_u[got] <= u[got] <= j + 1 + doubt_u[got]
            falls = falls and i - doubt_v[got] <= v[got] <= i + 1 + doubt_v[got]
            assert falls, f"view {t}, cell {(i, j)}: token {got} is not there but at {(v[got], u[got])}, z {z[got]}"
            nearest = (z + doubt_z)[surely].min(initial=math.inf)
            assert z[got] - doubt_z[got] <= nearest, f"view {t}, cell {(i, j)}: token {best} is nearer than {got}"
            if best >= 0:
                twins = np.array_equal(as_array(points)[got, :3], as_array(points)[best, :3])
                assert not twins, f"view {t}, cell {(i, j)}: {best} is the lowest index at this depth, not {got}"
    if not extreme:
        allowed = most_exceptions * mask.size
        assert exceptions <= allowed, f"{exceptions} of {mask.size} cells differ, all in doubt, but at most {allowed}"
    return int(mask.sum())


def assert_same_lift(
    got: Any,
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    size: tuple[int, int],
    *,
    mask: Tensor | None = None,
    depth_sampling: str = "median",
    least_valid: int = 1,
) -> int:
    """A back-projection is what the brute force says. Returns the number of valid tokens, at least ``least_valid``."""
    expected = brute_force.back_project(
        as_array(depth),
        as_array(intrinsics),
        as_array(cam2world),
        size,
        None if mask is None else as_array(mask),
        depth_sampling,
    )
    points, valid = as_array(got.points), as_array(got.valid)
    assert points.shape == expected.points.shape and valid.shape == expected.valid.shape
    assert got.valid.dtype == torch.bool
    assert got.points.dtype == (torch.float64 if depth.dtype == torch.float64 else torch.float32)
    assert int(expected.valid.sum()) >= least_valid, "nothing is valid: the test would test nothing"
    if depth_sampling == "median":
        assert np.array_equal(valid, expected.valid), f"{int((valid != expected.valid).sum())} tokens differ"
    else:
        # A blend that is zero but for rounding.
        doubtful = np.abs(expected.sampled) <= 1e-5
        assert np.array_equal(valid[~doubtful], expected.valid[~doubtful])
    assert not points[~valid].any(), "points must be 0 where not valid"
    both = valid & expected.valid
    bound = _lift_bound(expected.magnitude, depth, depth_sampling)[both]
    assert (np.abs(points[both][:, :3] - expected.points[both][:, :3]).max(-1, initial=0) <= bound).all()
    np.testing.assert_allclose(
        points[both][:, 3], expected.points[both][:, 3], rtol=1e-6 + _blend(depth, depth_sampling)
    )
    return int(valid.sum())


def _blend(depth: Tensor, depth_sampling: str) -> float:
    """Relative rounding of a bilinear weight: it is found from a pixel coordinate as large as the depth map is."""
    return 4 * 2.0**-23 * sum(depth.shape[1:]) if depth_sampling == "bilinear" else 0.0


def _lift_bound(magnitude: np.ndarray, depth: Tensor, depth_sampling: str) -> np.ndarray:
    rounding = FLOAT64_ROUNDING if depth.dtype == torch.float64 else FLOAT32_ROUNDING
    if depth_sampling == "bilinear" and len(depth):
        rounding += _blend(depth, depth_sampling)
    return rounding * magnitude + 1e-30


def assert_same_write(
    buffers: Any,
    report: Tensor,
    before: Any,
    latents: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    *,
    mask: Tensor | None = None,
    first_frame: int = 0,
    depth_sampling: str = "median",
    min_depth: float = 0.0,
    max_depth: float = math.inf,
    least_written: int = 1,
) -> int:
    """A write is what the brute force says, and nothing else changed. Returns the number of tokens written.

    ``buffers`` and ``before``: (points, features, frame_ids, count) after and before the write.
    """
    points, features, frame_ids, count = buffers
    held = int(before[3])
    expected = brute_force.cache_write(
        as_array(latents),
        as_array(depth),
        as_array(intrinsics),
        as_array(cam2world),
        max(0, len(points) - held),
        None if mask is None else as_array(mask),
        first_frame,
        depth_sampling,
        min_depth,
        max_depth,
    )
    assert report.shape == (6,) and report.dtype == torch.int64
    assert report.tolist() == expected.report
    assert int(report.sum()) == latents.shape[0] * latents.shape[2] * latents.shape[3], "each token is counted once"
    written = expected.report[0]
    assert written >= least_written, "nothing is written: the test would test nothing"
    assert int(count) == held + written
    end = held + written
    for now, then in zip(buffers[:3], before[:3], strict=True):
        assert_equal_bits([now[:held]], [then[:held]])
        assert_equal_bits([now[end:]], [then[end:]])
    # Latents are copied (and rounded to the buffer's dtype, once), never computed.
    kept = torch.from_numpy(expected.latents[:written]).to(latents.dtype).to(features.dtype)
    assert_equal_bits([features[held:end]], [kept])
    assert frame_ids[held:end].tolist() == expected.frame_ids[:written].tolist()
    difference = np.abs(as_array(points)[held:end, :3] - expected.points[:written, :3]).max(-1, initial=0)
    assert (difference <= _lift_bound(expected.magnitude[:written], depth, depth_sampling)).all()
    np.testing.assert_allclose(
        as_array(points)[held:end, 3], expected.points[:written, 3], rtol=1e-6 + _blend(depth, depth_sampling)
    )
    return written


def assert_same_overlap(
    got: Tensor,
    points: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    target_intrinsics: Tensor,
    target_cam2world: Tensor,
    size: tuple[int, int],
    *,
    num_points: int | None = None,
    voxel_size: float = 0.1,
    near: float = brute_force.NEAR,
) -> list[float]:
    """IoUs are what the brute force says: exactly where no projection is in doubt, else between the two readings."""
    arrays = [as_array(x) for x in (points, intrinsics, cam2world, target_intrinsics, target_cam2world)]
    expected = brute_force.view_overlap(*arrays, size, num_points, voxel_size, near)
    assert got.shape == (len(expected),) and got.dtype == torch.float32
    live = len(points) if num_points is None else max(0, min(num_points, len(points)))

    def voxels(matrix: np.ndarray, pose: np.ndarray, slack: Callable[[float], float]) -> set[Any]:
        found = set()
        for k in range(live):
            at = brute_force.project(arrays[0][k], matrix, pose)
            u, v = slack(at.magnitude_u), slack(at.magnitude_v)
            if at.z > near - slack(at.magnitude_z) and -u <= at.u < size[1] + u and -v <= at.v < size[0] + v:
                found.add(brute_force.voxel(arrays[0][k], voxel_size))
        return found

    rounding = FLOAT64_ROUNDING if points.dtype == torch.float64 else FLOAT32_ROUNDING
    surely, maybe = (lambda magnitude: -rounding * magnitude), (lambda magnitude: rounding * magnitude)
    targets = list(zip(arrays[3], arrays[4], strict=True))
    sure_target = set().union(*(voxels(*target, surely) for target in targets))
    any_target = set().union(*(voxels(*target, maybe) for target in targets))
    in_doubt = 0
    for k, overlap in enumerate(got.tolist()):
        sure, possible = voxels(arrays[1][k], arrays[2][k], surely), voxels(arrays[1][k], arrays[2][k], maybe)
        if sure == possible and sure_target == any_target:
            assert overlap == np.float32(expected[k]), f"view {k}: {overlap}, not {expected[k]}"
        else:
            in_doubt += 1
            least = len(sure & sure_target) / max(1, len(possible | any_target))
            most = min(1.0, len(possible & any_target) / max(1, len(sure | sure_target)))
            assert least - 1e-6 <= overlap <= most + 1e-6, f"view {k}: {overlap} is not in [{least}, {most}]"
            assert abs(overlap - expected[k]) <= 0.05
    assert in_doubt <= max(1, len(expected) // 4)
    return expected

"""The promise: same input, same bits, on every run, at any thread count, on every backend, backward too."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits
from hypothesis import given
from hypothesis import strategies as st

from mirage_kernels import back_project, cache_write, splat, splat_aligned, use_backend, view_overlap

REPEATS = 100
THREADS = (1, 2, 4)
OPERATORS = (
    "back_project",
    "splat",
    "splat_backward",
    "splat_aligned",
    "splat_aligned_backward",
    "cache_write",
    "view_overlap",
)


@cache
def real_size():
    """8 views of 352 x 640 depth on a 22 x 40 grid of 48 channels; 60,000 tokens, one in three a copy of another."""
    rng = np.random.default_rng(0)
    points, features = scenes.cloud(rng, 60_000, 48)
    frames = np.random.default_rng(1)
    points[:, 3] = points[:, 2].abs() / 28 * torch.from_numpy(np.exp(frames.uniform(-1.5, 1.5, 60_000))).float()
    points[40_000:] = points[torch.from_numpy(rng.permutation(40_000)[:20_000])]
    depth = scenes.depth_maps(rng, 8, (352, 640), 0.2)
    depth[:, :40, :40] = 0
    return {
        "depth": depth,
        "mask": scenes.static_masks(rng, 8, (352, 640), 0.002),
        "latents": torch.from_numpy(rng.normal(size=(8, 48, 22, 40))).float(),
        "intrinsics": scenes.intrinsics(rng, 8, (352, 640)),
        "cam2world": scenes.poses(rng, 8),
        "points": points,
        "features": features,
        "frame_ids": torch.from_numpy(frames.integers(-1, 50, 60_000)).int(),
        "frame_centers": torch.from_numpy(frames.normal(size=(50, 3))).float(),
        "grad_latents": torch.from_numpy(rng.normal(size=(8, 48, 22, 40))).float(),
        "grid": (22, 40),
    }


@cache
def small():
    scene = dict(real_size())
    for name in ("depth", "mask"):
        scene[name] = scene[name][:2, :88, :160].contiguous()
    for name in ("intrinsics", "cam2world"):
        scene[name] = scene[name][:2].clone()
    scene["intrinsics"][:, :2] /= 4
    for name in ("latents", "grad_latents"):
        scene[name] = scene[name][:2, :8, :11, :20].contiguous()
    pick = torch.cat([torch.arange(1000), torch.arange(40_000, 41_000)])
    scene["points"] = scene["points"][pick]
    scene["points"][1000:] = scene["points"][:1000]
    scene["features"] = scene["features"][pick, :8].contiguous()
    scene["frame_ids"] = scene["frame_ids"][pick]
    scene["grid"] = (11, 20)
    return scene


def run(operator, scene, put):
    """The operator's results on the host; asserts that they are not trivial."""
    grid, image_size = scene["grid"], scene["depth"].shape[1:]
    scene = {name: put(value) for name, value in scene.items()}
    cameras = scene["intrinsics"], scene["cam2world"]
    cells = scene["intrinsics"].clone()
    cells[:, 0] *= grid[1] / image_size[1]
    cells[:, 1] *= grid[0] / image_size[0]
    if operator == "back_project":
        results = back_project(scene["depth"], *cameras, grid, mask=scene["mask"])
        assert 0.2 < results.valid.float().mean() < 1
    elif operator == "splat":
        results = splat(scene["points"], scene["features"], cells, cameras[1], grid)
        assert 0.5 < results.mask.float().mean()
    elif operator == "splat_backward":
        features = scene["features"].detach().requires_grad_()
        latents = splat(scene["points"], features, cells, cameras[1], grid).latents
        results = torch.autograd.grad(latents, features, scene["grad_latents"])
        assert results[0].count_nonzero() > 1000
    elif operator.startswith("splat_aligned"):
        points, features = (scene[name].detach().requires_grad_() for name in ("points", "features"))
        frames = scene["frame_ids"], scene["frame_centers"]
        view = splat_aligned(points, features, *frames, cells, cameras[1], grid, sharpness=5.0)
        results = view
        if operator == "splat_aligned_backward":
            results = torch.autograd.grad(view.latents, (features, points), scene["grad_latents"])
            assert results[0].count_nonzero() > 1000 and results[1].count_nonzero() > 400
        assert 0.5 < view.mask.float().mean()
    elif operator == "cache_write":
        buffers = [put(x) for x in scenes.buffers(8000, scene["latents"].shape[1])]
        report = cache_write(*buffers, scene["latents"], scene["depth"], *cameras, mask=scene["mask"], max_depth=2.3)
        results = (*buffers, report)
        assert report[0] > 50 and (report[2:5] > 0).all()
    else:
        both = cells[:2], cameras[1][:2]
        results = (view_overlap(scene["points"], cells, cameras[1], *both, grid),)
        assert (results[0] > 0).all() and len(results[0].unique()) > 1
    return [x.detach().cpu() for x in results]


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_hundred_repeats(backend, operator, threads):
    """Two threads where there are two cores, so that a race has a chance to show."""
    threads(max(2, torch.get_num_threads()))
    scene = small() if backend.name == "reference" or backend.slow else real_size()
    first = run(operator, scene, backend.put)
    for _ in range(3 if backend.slow or backend.name == "reference" else REPEATS - 1):
        assert_equal_bits(run(operator, scene, backend.put), first)


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_any_number_of_threads(backend, operator, threads):
    slow = backend.slow or (backend.name == "reference" and operator.startswith("splat_aligned"))
    scene = small() if slow else real_size()
    threads(THREADS[0])
    first = run(operator, scene, backend.put)
    for number in THREADS[1:]:
        threads(number)
        for _ in range(3):
            assert_equal_bits(run(operator, scene, backend.put), first)


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_equal_the_definition_bit_for_bit(kernels, operator):
    scene = small() if kernels.slow else real_size()
    got = run(operator, scene, kernels.put)
    with use_backend("reference"):
        expected = run(operator, scene, lambda x: x)
    if operator == "splat_aligned_backward":  # the definition leaves the gradient to points to autograd
        *got, of_points = got
        *expected, of_points_there = expected
        scale = of_points_there.abs().max()
        torch.testing.assert_close(of_points / scale, of_points_there / scale, rtol=1e-4, atol=1e-5)
    assert_equal_bits(got, expected)


@pytest.mark.parametrize("depth_sampling", ["median", "bilinear"])
@pytest.mark.parametrize("image_size, grid", [((352, 640), (22, 40)), ((361, 643), (22, 40)), ((45, 80), (44, 80))])
def test_lifting_equals_the_definition_at_other_resolutions(kernels, image_size, grid, depth_sampling):
    rng = np.random.default_rng(2)
    if kernels.slow:
        image_size, grid = tuple(n // 4 for n in image_size), tuple(n // 4 for n in grid)
    arguments = (
        scenes.depth_maps(rng, 2, image_size, 0.1 if depth_sampling == "median" else 0.01),
        scenes.intrinsics(rng, 2, image_size),
        scenes.poses(rng, 2),
    )
    got = back_project(*[kernels.put(x) for x in arguments], grid, depth_sampling=depth_sampling)
    with use_backend("reference"):
        expected = back_project(*arguments, grid, depth_sampling=depth_sampling)
    assert expected.valid.float().mean() > 0.5
    assert_equal_bits(got, expected)


@pytest.mark.parametrize("dtype", scenes.DTYPES)
@pytest.mark.parametrize("out", scenes.DTYPES)
def test_every_dtype_equals_the_definition(kernels, dtype, out):
    rng = np.random.default_rng(3)
    points, features = scenes.cloud(rng, 3000, 19, dtype)
    cameras = scenes.intrinsics(rng, 3, (13, 21)), scenes.poses(rng, 3)
    view = splat(*[kernels.put(x) for x in (points, features, *cameras)], (13, 21), dtype=out)
    latents = torch.from_numpy(rng.normal(size=(3, 19, 13, 21)) * 1e3).to(dtype)
    depth, image_cameras = scenes.depth_maps(rng, 3, (39, 44)), scenes.intrinsics(rng, 3, (39, 44))
    buffers = [kernels.put(x) for x in scenes.buffers(900, 19, out)]
    arguments = latents, depth, image_cameras, cameras[1]
    report = cache_write(*buffers, *[kernels.put(x) for x in arguments])
    with use_backend("reference"):
        expected_view = splat(points, features, *cameras, (13, 21), dtype=out)
        expected_buffers = scenes.buffers(900, 19, out)
        expected_report = cache_write(*expected_buffers, *arguments)
    assert expected_view.mask.float().mean() > 0.5 and expected_report[0] > 300
    assert_equal_bits(view, expected_view)
    assert_equal_bits([*buffers, report], [*expected_buffers, expected_report])


@given(
    seed=st.integers(0, 10**6),
    grid=st.tuples(st.integers(1, 24), st.integers(1, 40)),
    zoom=st.sampled_from([0.01, 1.0, 30.0, 1e4]),
    unit=st.sampled_from([1e-3, 1.0, 1e5]),
    angle=st.sampled_from([0.2, 3.1]),
)
def test_smooth_surfaces_equal_the_definition(kernels, seed, grid, zoom, unit, angle):
    """Neighbouring tokens lie together, so that kernels which cull points in groups do cull, at any zoom and unit."""
    if kernels.slow:
        grid = min(grid[0], 3), min(grid[1], 5)
    rng = np.random.default_rng(seed)
    height, width = grid[0] + int(rng.integers(0, 40)), grid[1] + int(rng.integers(0, 40))
    row, column = np.mgrid[0:height, 0:width]
    waves = [np.sin(column / rng.uniform(5, 30) + t) + np.cos(row / rng.uniform(5, 30)) for t in range(3)]
    depth = torch.from_numpy((np.stack(waves) + 3) * unit).float()
    depth[:, height // 2 :, : width // 3] = float(rng.choice(scenes.UNKNOWN))
    cam2world = scenes.poses(rng, 3, angle)
    cam2world[:, :3, 3] *= unit
    frames = depth, scenes.intrinsics(rng, 3, (height, width)), cam2world
    latents = torch.from_numpy(rng.normal(size=(3, 4, *grid))).float()
    readers = scenes.intrinsics(rng, 4, (9, 13)), torch.cat([cam2world[:1], scenes.poses(rng, 3, angle)])
    readers[0][1:, :2, :2] *= zoom
    readers[1][1:, :3, 3] *= unit

    def everything(put):
        buffers = [put(x) for x in scenes.buffers(3 * grid[0] * grid[1] + 5, 4)]
        report = cache_write(*buffers, put(latents), *[put(x) for x in frames])
        points, features, _, count = buffers
        cameras = [put(x) for x in readers]
        live = {"num_points": count, "near": 0.05 * unit}
        view = splat(points, features, *cameras, (9, 13), **live)
        overlap = view_overlap(points, *cameras, *[x[:1] for x in cameras], (9, 13), voxel_size=0.1 * unit, **live)
        return [*buffers, report, *view, overlap]

    got = everything(kernels.put)
    with use_backend("reference"):
        expected = everything(lambda x: x)
    assert expected[4][0] > 0 and expected[6].any() and expected[-1][0] == 1
    assert_equal_bits(got, expected)

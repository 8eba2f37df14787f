"""The promise: same input, same bits, on every run, at any thread count, on every backend, backward too."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits

from mirage_kernels import back_project, cache_write, splat, use_backend, view_overlap

REPEATS = 100
THREADS = (1, 2, 4)
OPERATORS = ("back_project", "splat", "splat_backward", "cache_write", "view_overlap")


@cache
def real_size():
    """8 views of 352 x 640 depth on a 22 x 40 grid of 48 channels; 60,000 tokens, one in three a copy of another."""
    rng = np.random.default_rng(0)
    points, features = scenes.cloud(rng, 60_000, 48)
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


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_hundred_repeats(backend, operator, threads):
    """Two threads where there are two cores, so that a race has a chance to show."""
    threads(max(2, torch.get_num_threads()))
    scene = small() if backend.name == "reference" or backend.device.type == "cpu" != backend.name else real_size()
    first = run(operator, scene, backend.put)
    for _ in range(REPEATS - 1):
        assert_equal_bits(run(operator, scene, backend.put), first)


@pytest.mark.parametrize("operator", OPERATORS)
def test_any_number_of_threads(backend, operator, threads):
    scene = small() if backend.name == "triton" and backend.device.type == "cpu" else real_size()
    threads(THREADS[0])
    first = run(operator, scene, backend.put)
    for number in THREADS[1:]:
        threads(number)
        for _ in range(3):
            assert_equal_bits(run(operator, scene, backend.put), first)


@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_equal_the_definition_bit_for_bit(kernels, operator):
    scene = small() if kernels.name == "triton" and kernels.device.type == "cpu" else real_size()
    got = run(operator, scene, kernels.put)
    with use_backend("reference"):
        expected = run(operator, scene, lambda x: x)
    assert_equal_bits(got, expected)


@pytest.mark.parametrize("depth_sampling", ["median", "bilinear"])
@pytest.mark.parametrize("image_size, grid", [((352, 640), (22, 40)), ((361, 643), (22, 40)), ((45, 80), (44, 80))])
def test_lifting_equals_the_definition_at_other_resolutions(kernels, image_size, grid, depth_sampling):
    rng = np.random.default_rng(2)
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

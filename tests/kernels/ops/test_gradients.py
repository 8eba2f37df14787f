"""Where gradients end: tokens overwritten since a read, what a write takes, and the second derivative."""

from __future__ import annotations

import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits

from mirage_kernels import (
    back_project,
    block_bounds,
    bounded_write,
    cache_compact,
    cache_write,
    splat,
    splat_aligned,
    view_overlap,
)

SIZE, IMAGE, ROWS, CHANNELS = (5, 7), (23, 36), 120, 3


def views(seed=1, number=2, size=SIZE):
    rng = np.random.default_rng(seed)
    return scenes.intrinsics(rng, number, size), scenes.poses(rng, number)


def written(seed=1):
    """Latents, depth and cameras of a write."""
    rng = np.random.default_rng(seed)
    latents = torch.from_numpy(rng.normal(size=(2, CHANNELS, *SIZE))).float()
    return latents, scenes.depth_maps(rng, 2, IMAGE, 0.2), *views(seed, size=IMAGE)


def tokens(seed=1):
    """points, features, frame_ids, frame_centers of a cache whose rows are all live."""
    return scenes.written_cloud(np.random.default_rng(seed), ROWS, CHANNELS, SIZE[1])


def in_place(operator, points, features, ids, centers, put):
    """Call an operator that writes from the first row on; what it has written."""
    count, flags = put(torch.zeros(1, dtype=torch.int64)), put(torch.zeros(ROWS, dtype=torch.uint8))
    scene = [put(x) for x in written()]
    bounds = block_bounds(points)
    held = [points, features, ids]
    if operator is block_bounds:
        block_bounds(points, out=bounds)
        return [bounds]
    if operator is cache_write:
        cache_write(*held, count, *scene, bounds=bounds)
        return [*held, count, bounds]
    if operator is bounded_write:
        bounded_write(*held, flags, count, centers, *scene, bounds=bounds)
        return [*held, flags, count, bounds]
    count.fill_(ROWS)
    cache_compact(*held, count, free_space_violations=flags, bounds=bounds, max_tokens=ROWS - 5)
    return [*held, flags, count, bounds]


@pytest.mark.parametrize("operator", [block_bounds, cache_write, bounded_write, cache_compact])
def test_what_is_written_in_place_counts_as_changed(backend, operator):
    """PyTorch knows by a tensor's version whether what it saved for a backward pass is what it was."""
    points, features, ids, centers = (backend.put(x) for x in tokens())
    changed = in_place(operator, points, features, ids, centers, backend.put)
    assert len(changed) >= 1 and all(x._version > 0 for x in changed)


@pytest.mark.parametrize("operator", [cache_write, bounded_write, cache_compact])
def test_a_backward_through_overwritten_tokens_is_no_other_gradient(backend, operator):
    """It raises; or, by the definition, which keeps copies of what it needs, it is the gradient of what was read."""
    points, features, ids, centers = (backend.put(x) for x in tokens())
    leaves = points.requires_grad_(), features.requires_grad_()

    def loss():
        return (
            splat_aligned(*leaves, ids, centers, *map(backend.put, views()), SIZE, sharpness=2.0).latents ** 2
        ).sum()

    expected = torch.autograd.grad(loss(), leaves)
    assert all(gradient.any() for gradient in expected)
    read = loss()
    in_place(operator, *leaves, ids, centers, backend.put)
    try:
        found = torch.autograd.grad(read, leaves)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert backend.name == "reference"
        assert_equal_bits(found, expected)


@pytest.mark.parametrize("aligned", [False, True])
def test_a_second_derivative_raises(kernels, aligned):
    points, features, ids, centers = (kernels.put(x) for x in tokens())
    features.requires_grad_()
    held = (points, features, ids, centers) if aligned else (points, features)
    latents = (splat_aligned if aligned else splat)(*held, *map(kernels.put, views()), SIZE).latents
    (first,) = torch.autograd.grad((latents**2).sum(), features, create_graph=True)
    (plain,) = torch.autograd.grad((latents**2).sum(), features, retain_graph=True)
    assert_equal_bits([first.detach()], [plain])
    assert first.any()
    with pytest.raises(RuntimeError, match="no second derivative on this backend"):
        torch.autograd.grad((first**2).sum(), features)


def ask(name):
    """Call the operators with one argument that asks for a gradient."""
    latents, depth, intrinsics, cam2world = written()
    points, features, ids, centers = tokens()
    count, flags = torch.zeros(1, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.uint8)
    given = {"latents": latents, "depth": depth, "intrinsics": intrinsics, "cam2world": cam2world, "points": points}
    given[name] = given[name].clone().requires_grad_()
    cameras = given["intrinsics"], given["cam2world"]
    scene = given["latents"], given["depth"], *cameras
    if name != "points":
        yield lambda: cache_write(points, features, ids, count, *scene)
        yield lambda: bounded_write(points, features, ids, flags, count, centers, *scene)
    if name not in ("latents", "points"):
        yield lambda: back_project(given["depth"], *cameras, SIZE)
    if name not in ("latents", "depth"):
        yield lambda: splat(given["points"], features, *cameras, SIZE)
        yield lambda: view_overlap(given["points"], *cameras, intrinsics, cam2world, SIZE)
    if name in ("intrinsics", "cam2world"):
        yield lambda: splat_aligned(points, features, ids, centers, *cameras, SIZE)


@pytest.mark.parametrize("name", ["latents", "depth", "intrinsics", "cam2world", "points"])
def test_a_gradient_that_would_be_lost_is_refused(name):
    """And with gradients turned off, none is asked for."""
    calls = [*ask(name)]
    assert len(calls) >= 2
    for call in calls:
        with pytest.raises(ValueError, match=f"^{name} must not require a gradient"):
            call()
        with torch.no_grad():
            call()

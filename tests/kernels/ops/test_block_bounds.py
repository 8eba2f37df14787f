"""Bounds of blocks of tokens: what they are, who keeps them, and that reads by them are the same reads to the bit."""

from __future__ import annotations

import brute_force
import numpy as np
import pytest
import scenes
import torch
from comparison import as_array, assert_equal_bits
from hypothesis import given
from hypothesis import strategies as st

from mirage_kernels import (
    Cameras,
    LatentCache,
    block_bounds,
    cache_write,
    splat,
    splat_aligned,
    use_backend,
    view_overlap,
)
from mirage_kernels.constants import BLOCK_TOKENS, TILE_BLOCKS
from mirage_kernels.geometry import bounds_rows

GRID = (9, 13)
IMAGE = (36, 52)


def definition(points: torch.Tensor, live: int | None = None) -> torch.Tensor:
    return torch.from_numpy(brute_force.block_bounds(as_array(points), live)).float()


# ---------------------------------------------------------------------------------------------- what they are


@pytest.mark.parametrize(
    "count", [0, 1, 255, 256, 257, 1000, BLOCK_TOKENS * TILE_BLOCKS, BLOCK_TOKENS * TILE_BLOCKS + 1]
)
def test_least_and_greatest_of_each_block(backend, count):
    points, _ = scenes.cloud(np.random.default_rng(count), count, 1)
    bounds, rows = (
        block_bounds(backend.put(points)),
        -(-count // BLOCK_TOKENS) + -(-count // (BLOCK_TOKENS * TILE_BLOCKS)),
    )
    assert bounds.shape == (rows, 6) and bounds.device == backend.put(points).device
    assert_equal_bits([bounds], [definition(points)])


@pytest.mark.parametrize(
    ("count", "live"), [*((700, live) for live in (-3, 0, 1, 256, 700, 2**40)), (17000, 9000), (17000, 16500)]
)
def test_live_points_are_counted_on_the_device(backend, count, live):
    points, _ = scenes.cloud(np.random.default_rng(1), count, 1)
    bounds = torch.full((bounds_rows(count), 6), 7.0)
    out = block_bounds(backend.put(points), num_points=backend.put(torch.tensor(live)), out=backend.put(bounds))
    assert_equal_bits([out], [definition(points, live)])


def test_points_that_no_camera_sees_do_not_count(backend):
    points, _ = scenes.cloud(np.random.default_rng(2), 900, 1)
    points[::7, 0], points[1::7, 1], points[2::7, 2] = torch.nan, torch.inf, -torch.inf
    points[3::7, 3] = torch.nan  # the footprint is no coordinate
    points[256:512, 1] = torch.nan
    bounds = block_bounds(backend.put(points)).cpu()
    assert bounds[1].tolist() == [torch.inf] * 3 + [-torch.inf] * 3
    assert bounds[[0, 2, 3, 4]].isfinite().all()
    assert_equal_bits([bounds], [definition(points)])


def test_extreme_values_and_no_negative_zero(backend):
    points = torch.zeros(600, 4)
    points[:100] = -0.0
    points[300], points[301] = torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max
    points[520:, :3] = torch.tensor([1e-45, -1e-45, 1e-40])
    bounds = block_bounds(backend.put(points)).cpu()
    assert not (bounds.signbit() & (bounds == 0)).any()
    assert_equal_bits([bounds], [definition(points)])


def test_strided_points(backend):
    points, _ = scenes.cloud(np.random.default_rng(3), 300, 1)
    assert_equal_bits([block_bounds(backend.put(scenes.strided(points)))], [definition(points)])


# ---------------------------------------------------------------------------------------------- who keeps them


FIRST = BLOCK_TOKENS * TILE_BLOCKS  # the first row of the second tile


@pytest.mark.parametrize("held", [0, 200, 256, 511, 600, FIRST - 300, FIRST, 2 * FIRST - 1])
def test_a_write_updates_the_blocks_it_wrote_into_and_no_other(backend, held):
    rng = np.random.default_rng(held)
    points, features, frame_ids, count = (backend.put(x) for x in scenes.buffers(held + 1100, 3, held=held))
    blocks = -(-(held + 1100) // BLOCK_TOKENS)
    bounds = backend.put(torch.full((bounds_rows(held + 1100), 6), 7.0))
    # Of a tile that it wrote into, it may take the blocks before it as they are: those are exact.
    tile = held // FIRST
    bounds[tile * TILE_BLOCKS : held // BLOCK_TOKENS] = block_bounds(points, num_points=count)[
        tile * TILE_BLOCKS : held // BLOCK_TOKENS
    ]
    before = bounds.clone()
    latents = torch.from_numpy(rng.normal(size=(2, 3, 18, 26))).float()
    cameras = scenes.intrinsics(rng, 2, IMAGE), scenes.poses(rng, 2)
    arguments = [backend.put(x) for x in (latents, scenes.depth_maps(rng, 2, IMAGE), *cameras)]
    report = cache_write(points, features, frame_ids, count, *arguments, bounds=bounds)
    end = held + int(report[0])
    assert int(count) == end and end > held + 100
    exact = definition(points, end)
    first, last = held // BLOCK_TOKENS, (end - 1) // BLOCK_TOKENS
    tiles = slice(blocks + tile, blocks + (end - 1) // FIRST + 1)
    for rows in (slice(first, last + 1), tiles):
        assert_equal_bits([bounds[rows]], [exact[rows]])
        before[rows] = bounds[rows]
    assert_equal_bits([bounds], [before])  # no other row
    # Without a token written they stay: all is masked, or there is no room.
    arguments[1].zero_()
    bounds.fill_(7)
    assert cache_write(points, features, frame_ids, count, *arguments, bounds=bounds)[0] == 0
    count.fill_(held + 1100)
    arguments[1].fill_(2)
    assert cache_write(points, features, frame_ids, count, *arguments, bounds=bounds)[1] > 0
    assert (bounds == 7).all()


def frames(seed: int, views: int = 3, channels: int = 4):
    """latents, depth, cameras of one write."""
    rng = np.random.default_rng(seed)
    latents = torch.from_numpy(rng.normal(size=(views, channels, *GRID))).float()
    cameras = Cameras(
        scenes.intrinsics(rng, views, IMAGE),
        scenes.poses(rng, views, angle=2.0, rigid=True),
        IMAGE,
        square_pixels=False,
    )
    return latents, scenes.depth_maps(rng, views, IMAGE, 0.1, noise=3.0), cameras


def assert_exact(cache: LatentCache) -> None:
    bounds = cache.buffers.bounds.cpu()
    assert bounds.shape == (bounds_rows(cache.capacity), 6)
    assert_equal_bits([bounds], [definition(cache.buffers.points, len(cache))])


def test_a_cache_keeps_them_exact(backend, tmp_path):
    cache = LatentCache(channels=4, device=backend.device)
    assert_exact(cache)
    marks = []
    for seed in range(5):
        marks.append(cache.checkpoint())
        cache.write(*[backend.put(x) for x in frames(seed)[:2]], frames(seed)[2])
        assert_exact(cache)
    assert len(cache) > 3 * BLOCK_TOKENS and cache.buffer_version > 1
    for mark in reversed(marks[1:4]):
        cache.rollback(mark)
        assert len(cache) == mark[0] > 0
        assert_exact(cache)
    cache.save(tmp_path / "room.safetensors")
    loaded = LatentCache.load(tmp_path / "room.safetensors", device=backend.device)
    assert_exact(loaded)
    loaded.write(*[backend.put(x) for x in frames(7)[:2]], frames(7)[2])
    assert_exact(loaded)
    assert_exact(LatentCache.from_tensors(loaded.tensors(), backend.device, **{**loaded.config, "dtype": loaded.dtype}))
    cache.clear()
    assert (cache.buffers.bounds[:, :3] == torch.inf).all()
    assert_exact(cache)
    cache.write(*[backend.put(x) for x in frames(8)[:2]], frames(8)[2])
    assert_exact(cache)


def test_a_full_cache_keeps_them_exact(backend):
    cache = LatentCache(channels=4, device=backend.device, capacity=700, carve=False)
    for seed in range(4):
        report = cache.write(*[backend.put(x) for x in frames(seed)[:2]], frames(seed)[2])
        assert_exact(cache)
    assert len(cache) == 700 and report.refused > 0


def test_bytes_count_them():
    cache = LatentCache(channels=4, capacity=1000, write_policy="append")
    empty = cache.nbytes_allocated
    cache.write(*frames(0))
    live = len(cache)
    assert BLOCK_TOKENS < live < 2 * BLOCK_TOKENS
    assert cache.nbytes == live * (16 + 16 + 4) + (2 + 1) * 24 + 3 * 12
    assert empty == 1000 * (16 + 16 + 4) + (4 + 1) * 24 + cache.buffers.frame_centers.nbytes + 8


# ---------------------------------------------------------------------------------------------- what reads make of them


def scene(seed: int, blocks: int = 7, views: int = 4, unit: float = 1.0, spread: float = 0.3):
    """Clusters of a block's tokens all round cameras that look everywhere: (tokens, frames, cameras)."""
    rng = np.random.default_rng(seed)
    count = blocks * BLOCK_TOKENS - int(rng.integers(0, BLOCK_TOKENS))
    direction = rng.normal(size=(blocks, 3))
    centre = direction / np.linalg.norm(direction, axis=1, keepdims=True) * rng.uniform(0.5, 6, (blocks, 1))
    points, features, frame_ids, frame_centers = scenes.written_cloud(rng, count, 3, GRID[1])
    where = centre.repeat(BLOCK_TOKENS, 0)[:count] + rng.normal(size=(count, 3)) * spread
    points[:, :3] = torch.from_numpy(where).float()
    points *= unit
    intrinsics, cam2world = scenes.intrinsics(rng, views, GRID), scenes.poses(rng, views, angle=3.1)
    intrinsics[:, :2, :2] *= float(np.exp(rng.uniform(-1, 1)))
    cam2world[:, :3, 3] *= unit
    return (points, features), (frame_ids, frame_centers * unit), (intrinsics, cam2world)


def assert_same_reads(backend, tokens, frames, cameras, live=None, near=0.05, voxel_size=0.5, bounds=None, size=GRID):
    """Every read by bounds is the definition's, which knows none; returns what the views see of the tokens."""
    points, features = (backend.put(x) for x in tokens)
    frame_ids, centers, *cameras = (backend.put(x) for x in (*frames, *cameras))
    count = None if live is None else backend.put(torch.tensor(live))
    bounds = block_bounds(points, num_points=count) if bounds is None else backend.put(bounds)
    results = []
    for name in ("reference", backend.name):
        options = {"num_points": count, "bounds": bounds, "near": near}
        with use_backend(name):
            nearest = splat(points, features, *cameras, size, **options)
            aligned = splat_aligned(points, features, frame_ids, centers, *cameras, size, sharpness=5.0, **options)
            targets = [x[:1] for x in cameras]
            overlap = view_overlap(points, *cameras, *targets, size, voxel_size=voxel_size, **options)
        results.append([*nearest, *aligned, overlap])
    assert_equal_bits(results[1], results[0])
    return results[0][1].cpu(), results[0][5].cpu()


@given(
    seed=st.integers(0, 2**20),
    blocks=st.integers(1, 9),
    unit=st.sampled_from([1.0, 1e-30, 1e-12, 1e-3, 1e4, 1e12, 1e25]),
    near=st.sampled_from([0.0, 0.05, 0.8]),
    spread=st.sampled_from([0.0, 0.02, 0.3, 3.0]),
    live=st.sampled_from([None, 0, 1, 250, 700]),
)
def test_any_scene_reads_the_same(backend, seed, blocks, unit, near, spread, live):
    scene_ = scene(seed, blocks, 1 + seed % 4, unit, spread)
    assert_same_reads(backend, *scene_, live=live, near=near * unit, voxel_size=0.5 * unit)


def test_some_blocks_are_seen_and_some_are_not(backend):
    """What the other tests rest on."""
    tokens, frames, cameras = scene(0, blocks=30)
    masks = assert_same_reads(backend, tokens, frames, cameras)
    assert all(mask.sum() > 20 for mask in masks)
    view = splat(*[backend.put(x) for x in (*tokens, *cameras)], GRID)
    seen = {int(x) // BLOCK_TOKENS for x in view.index[view.mask]}
    assert 3 < len(seen) < 25


def test_kernels_pass_over_blocks_by_their_bounds(cpu_backend):
    """With bounds that say there is nothing, there is nothing: a broken promise shows that they are looked at."""
    tokens, frames, cameras = scene(1, blocks=30)
    nothing = block_bounds(tokens[0], num_points=torch.tensor(0))
    no_tile = block_bounds(tokens[0])
    no_tile[-1] = nothing[-1]
    for bounds in (nothing, no_tile):
        options = {"bounds": bounds}
        assert splat(*tokens, *cameras, GRID).mask.any() and not splat(*tokens, *cameras, GRID, **options).mask.any()
        arguments = *tokens, *frames, *cameras, GRID
        assert splat_aligned(*arguments).mask.any() and not splat_aligned(*arguments, **options).mask.any()
        arguments = tokens[0], *cameras, *cameras, GRID
        assert view_overlap(*arguments).all() and not view_overlap(*arguments, **options).any()


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [3, 66])
def test_tiles_that_no_view_sees_are_passed_over(cpu_backend, tiles):
    """What is stored elsewhere, tile by tile, changes no read; 64 tiles are tested at a time."""
    tokens, frames, cameras = scene(6, blocks=20)
    count, rng = tiles * TILE_BLOCKS * BLOCK_TOKENS, np.random.default_rng(7)
    points = torch.full((count, 4), torch.nan)  # seen by none, but for a token in every tile, behind everything
    points[:: TILE_BLOCKS * BLOCK_TOKENS] = torch.tensor([500.0, 400.0, 1e6, 0.1])
    where = rng.permutation(count)[: len(tokens[0])]  # scattered over the tiles, then in one
    for rows in (np.sort(where), np.arange(len(where)) + (tiles - 1) * TILE_BLOCKS * BLOCK_TOKENS + 77):
        spread = points.clone(), torch.zeros(count, 3), torch.zeros(count, dtype=torch.int32)
        for buffer, held in zip(spread, (*tokens, frames[0]), strict=True):
            buffer[rows] = held
        for name, bounds in (("reference", None), (cpu_backend.name, block_bounds(spread[0]))):
            with use_backend(name):
                views = [
                    splat(*spread[:2], *cameras, GRID, bounds=bounds),
                    splat_aligned(*spread, frames[1], *cameras, GRID, bounds=bounds),
                ]
            if name == "reference":
                expected = views
        assert all(view.mask.any() for view in views)
        for got, wanted in zip(views, expected, strict=True):
            assert_equal_bits(got, wanted)


def test_special_points_and_loose_bounds(backend):
    tokens, frames, cameras = scene(2, blocks=12)
    points = tokens[0]
    points[::9, 0], points[1::9, 1], points[2::9, 2] = torch.nan, torch.inf, -torch.inf
    points[3 * BLOCK_TOKENS : 4 * BLOCK_TOKENS] = torch.nan
    points[5 * BLOCK_TOKENS : 5 * BLOCK_TOKENS + 20] *= 1e30
    points[7 * BLOCK_TOKENS] = torch.tensor([3e38, -3e38, 3e38, 1.0])
    assert_same_reads(backend, tokens, frames, cameras)
    everywhere = torch.tensor([-torch.inf] * 3 + [torch.inf] * 3).repeat(13, 1)
    wide = block_bounds(points) + torch.tensor([-1.0, -2.0, -0.5, 1.0, 0.1, 3.0])
    for bounds in (everywhere, everywhere * torch.nan, wide, everywhere.clamp(-1e38, 1e38)):
        masks = assert_same_reads(backend, tokens, frames, cameras, bounds=bounds)
        assert all(mask.any() for mask in masks)


def test_degenerate_cameras(backend):
    tokens, frames, (intrinsics, cam2world) = scene(3, blocks=12, views=8)
    cam2world[1, :3, :3] = 0
    intrinsics[2, 0, 0] = torch.nan
    intrinsics[3, :2] *= 1e20
    intrinsics[4, :2] *= 1e-30
    cam2world[5, :3, 3] = 1e30
    cam2world[6, :3, :3] *= 1e-25
    masks = assert_same_reads(backend, tokens, frames, (intrinsics, cam2world))
    assert all(mask[0].any() for mask in masks)
    for near in (1e30, 3e38, 1e300):
        assert_same_reads(backend, tokens, frames, (intrinsics, cam2world), near=near)


@pytest.mark.parametrize("unit", [1e-18, 1.0, 1e14])
def test_tokens_on_the_borders_of_the_frustum(backend, unit):
    """A token a block, on the borders up to a few last bits to either side, each where no nearer one hides it."""
    rng = np.random.default_rng(4)
    height, width = size = (40, 60)
    near = float(np.float32(0.7 * unit))
    intrinsics, cam2world = scenes.intrinsics(rng, 1, size), scenes.poses(rng, 1, angle=3.0)
    cam2world[:, :3, 3] *= unit
    # Where `splat` begins to see, then where the widest token begins to reach a cell and where nothing is looked for.
    places = [(u, v + 0.5, 1.0) for u in (0, width) for v in range(height)]
    places += [(u + 0.5, v, 1.0) for v in (0, height) for u in range(2, width - 2)]
    places += [(u + 0.5, v + 0.5, 0.7) for u in range(6, width - 6, 6) for v in range(6, height - 6, 4)]
    for past in (1.75, 2.0):
        places += [(u, v + 0.5, 1.0) for u in (-past, width + past) for v in range(2, height, 5)]
        places += [(u + 0.5, v, 1.0) for v in (-past, height + past) for u in range(4, width - 2, 5)]
    pose, (fx, fy, cx, cy) = cam2world[0].numpy(), (float(intrinsics[0][k]) for k in ((0, 0), (1, 1), (0, 2), (1, 2)))
    points = torch.full((len(places) * BLOCK_TOKENS, 4), torch.nan)
    for k, (u, v, z) in enumerate(places):
        camera = np.array([(u - cx) / fx, (v - cy) / fy, 1.0]) * z * unit
        world = (pose[:3, :3] @ camera + pose[:3, 3]).astype(np.float32)
        nudged = world.view(np.int32) + rng.integers(-4, 5, 3, dtype=np.int32)
        points[k * BLOCK_TOKENS, :3] = torch.from_numpy(nudged.view(np.float32))
        points[k * BLOCK_TOKENS, 3] = 5 * z * unit
    features = torch.from_numpy(rng.uniform(1, 2, (len(points), 2))).float()
    frames = torch.zeros(len(points), dtype=torch.int32), torch.zeros(1, 3)
    masks = assert_same_reads(
        backend, (points, features), frames, (intrinsics, cam2world), near=near, voxel_size=0.1 * unit, size=size
    )
    assert 30 < masks[0].sum() < len(places) - 60 and masks[1].sum() > masks[0].sum()


def test_gradients_do_not_know_of_them(kernels):
    tokens, frames, cameras = ([kernels.put(x) for x in part] for part in scene(5, blocks=8))
    bounds = block_bounds(tokens[0])
    gradients = []
    for options in ({}, {"bounds": bounds}):
        points, features = (x.clone().requires_grad_() for x in tokens)
        (splat(points.detach(), features, *cameras, GRID, **options).latents ** 2).sum().backward()
        read = splat_aligned(points, features, *frames, *cameras, GRID, sharpness=2.0, **options)
        (read.latents**2).sum().backward()
        gradients.append([points.grad, features.grad])
    assert all(bool(x.any()) for x in gradients[0])
    assert_equal_bits(gradients[1], gradients[0])


def test_a_cache_reads_by_its_bounds(cpu_backend, threads):
    """At any number of threads, as the definition reads."""
    cache = LatentCache(channels=4)
    for seed in range(9):
        cache.write(*frames(seed))
    cameras = frames(20, views=5)[2]
    expected = {}
    for name in ("reference", "cpu"):
        for number in (1, 2, 5):
            threads(number)
            with use_backend(name):
                for mode in ("nearest", "aligned"):
                    view = cache.read(cameras, GRID, splat=mode)
                    assert view.mask.sum() > 50
                    assert_equal_bits(view, expected.setdefault(mode, view))
                overlap = cache.view_overlap(cameras, cameras[:2], GRID)
                assert_equal_bits([overlap], [expected.setdefault("overlap", overlap)])

"""`bounded_write` and `cache_compact` on every backend: against the definition, the brute force, and their rules."""

from __future__ import annotations

import math

import brute_force
import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits
from hypothesis import given
from hypothesis import strategies as st

from mirage_kernels import block_bounds, bounded_write, cache_compact, use_backend
from mirage_kernels.constants import BLOCK_TOKENS, INVALID, WRITE_REPORT
from mirage_kernels.geometry import bounds_rows, token_voxels, z_order
from mirage_kernels.quantization import FLOAT8

GRID = (6, 9)
IMAGE = (37, 50)
CHANNELS = 5
FRAMES = 64


def room(seed, views=3, grid=GRID, image_size=IMAGE, unknown=0.1, dtype=torch.float32, box=True, channels=CHANNELS):
    """latents, depth, intrinsics, cam2world of views that look at one wall, with a box before it or without."""
    rng = np.random.default_rng(seed)
    cam2world = scenes.poses(rng, views, angle=0.1)
    cam2world[:, :3, 3] *= 0.6
    intrinsics = scenes.intrinsics(rng, views, image_size)
    row, column = np.meshgrid(np.arange(image_size[0]) + 0.5, np.arange(image_size[1]) + 0.5, indexing="ij")
    depth = np.empty((views, *image_size))
    for t in range(views):
        k, pose = intrinsics[t].numpy(), cam2world[t].numpy()
        rays = np.stack([(column - k[0, 2]) / k[0, 0], (row - k[1, 2]) / k[1, 1], np.ones_like(row)], -1)
        rays = rays @ pose[:3, :3].T
        depth[t] = (4.07 - pose[2, 3]) / rays[..., 2]  # the wall z = 4.07
        at = pose[:3, 3] + rays * ((2.43 - pose[2, 3]) / rays[..., 2])[..., None]
        inside = (np.abs(at[..., 0]) < 1.0) & (np.abs(at[..., 1]) < 0.8)
        if box:
            depth[t] = np.where(inside, (2.43 - pose[2, 3]) / rays[..., 2], depth[t])
    depth *= 1 + rng.normal(scale=0.01, size=depth.shape)
    holes = rng.random(depth.shape) < unknown
    depth[holes] = rng.choice(scenes.UNKNOWN, int(holes.sum()))
    if unknown > 0:
        depth[:, : image_size[0] // 6, : image_size[1] // 6] = 0
    latents = rng.normal(size=(views, channels, *grid))
    latents[rng.random(latents.shape) < 0.01 / channels] = math.nan
    return torch.from_numpy(latents).to(dtype), torch.from_numpy(depth).float(), intrinsics, cam2world


class Held:
    """Buffers of a cache, and writes into them."""

    def __init__(self, capacity=400, dtype=torch.float32, merge=False, channels=CHANNELS, put=lambda x: x, boxes=True):
        points, features, frame_ids, count = scenes.buffers(capacity, channels, dtype)
        num_observations = torch.full((capacity,), 7, dtype=torch.uint8) if merge else None
        free_space_violations = torch.full((capacity,), 9, dtype=torch.uint8)
        self.points, self.features, self.frame_ids, self.count = (
            put(x.clone()) for x in (points, features, frame_ids, count)
        )
        self.free_space_violations, self.num_observations = (
            put(free_space_violations),
            None if num_observations is None else put(num_observations),
        )
        self.scales = put(torch.full((capacity,), 130, dtype=torch.uint8)) if dtype == FLOAT8 else None
        self.bounds = block_bounds(self.points, num_points=self.count) if boxes else None
        self.centers = put(torch.full((FRAMES, 3), math.nan))
        self.frames, self.put = 0, put

    def write(self, latents, depth, intrinsics, cam2world, mask=None, **options):
        views = len(latents)
        self.centers[self.frames : self.frames + views] = self.put(cam2world[:, :3, 3].float())
        report = bounded_write(
            *(self.points, self.features, self.frame_ids, self.free_space_violations, self.count, self.centers),
            *(self.put(x) for x in (latents, depth, intrinsics, cam2world)),
            num_observations=self.num_observations,
            bounds=self.bounds,
            scales=self.scales,
            mask=None if mask is None else self.put(mask),
            first_frame=self.frames,
            **options,
        )
        self.frames += views
        return dict(zip(WRITE_REPORT, report.tolist(), strict=True))

    def trim(self, max_tokens=None):
        options = dict(
            free_space_violations=self.free_space_violations,
            num_observations=self.num_observations,
            bounds=self.bounds,
            scales=self.scales,
            max_tokens=max_tokens,
        )
        return int(cache_compact(self.points, self.features, self.frame_ids, self.count, **options))

    def all(self):
        """Every buffer whole, so that a stray write shows."""
        kept = (
            self.points,
            self.features,
            self.frame_ids,
            self.free_space_violations,
            self.num_observations,
            self.scales,
            self.count,
        )
        return [x.cpu() for x in kept if x is not None]

    def live(self):
        n = int(self.count)
        return (
            self.points[:n].cpu(),
            self.features[:n].cpu(),
            self.frame_ids[:n].cpu(),
            self.free_space_violations[:n].cpu(),
        )


def both(backend, *setup, **options):
    """The same buffers for the backend and for the definition."""
    return Held(*setup, put=backend.put, **options), Held(*setup, **options)


def write_both(held, arguments, **options):
    """One write by the backend and by the definition: the same report and the same bits, bounds included."""
    ours, theirs = held
    report = ours.write(*arguments, **options)
    with use_backend("reference"):
        assert theirs.write(*arguments, **options) == report
    check_both(held)
    return report


def check_both(held):
    ours, theirs = held
    assert_equal_bits(ours.all(), theirs.all())
    if ours.bounds is not None:
        assert_equal_bits([ours.bounds], [block_bounds(theirs.points, num_points=theirs.count)])


# ---------------------------------------------------------------------------------------------- against the definition


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("stored", scenes.STORED)
def test_every_backend_writes_the_bits_of_the_definition(backend, stored, merge):
    held, total = both(backend, 500, dtype=stored, merge=merge), dict.fromkeys(WRITE_REPORT, 0)
    for seed in range(5):
        arguments = room(seed % 4, box=seed < 2, dtype=scenes.DTYPES[seed % 3])
        mask = scenes.static_masks(np.random.default_rng(seed), 3, IMAGE, 0.002) if seed % 2 else None
        report = write_both(held, arguments, mask=mask, views_per_voxel=2, max_depth=4.15)
        assert sum(report.values()) - report["carved"] == 3 * GRID[0] * GRID[1]
        total = {name: total[name] + report[name] for name in total}
    seen = {name for name in total if total[name] > 0}
    assert seen == set(WRITE_REPORT) - {"evicted", *(("replaced", "covered") if merge else ("merged",))}
    assert int((held[0].free_space_violations[: int(held[0].count)] == INVALID).sum()) == total["carved"] > 5


@pytest.mark.parametrize("channels, grid", [(1, (1, 1)), (48, (4, 4)), (65, (3, 17)), (16, (1, 40)), (7, (33, 1))])
def test_sizes(backend, channels, grid):
    image_size = (grid[0] * 5 + 2, grid[1] * 4 + 1)
    held = both(backend, 300, channels=channels)
    for seed in (1, 2):
        report = write_both(held, room(seed, grid=grid, image_size=image_size, channels=channels))
    assert report["covered"] + report["replaced"] > 0


@pytest.mark.parametrize("capacity", [0, 1, 40, 90])
def test_what_does_not_fit_is_refused(backend, capacity):
    held = both(backend, capacity)
    for seed in (1, 2, 1):
        report = write_both(held, room(seed, unknown=0))
    assert int(held[0].count) == capacity and report["refused"] > 0


@pytest.mark.parametrize("views_per_voxel", [1, 2, 64])
def test_voxels_hold_no_more(backend, views_per_voxel):
    held = both(backend, 1500, boxes=False)
    for seed in range(6):
        report = write_both(held, room(seed, unknown=0, views=4), views_per_voxel=views_per_voxel, carve_views=0)
    counts = token_voxels(held[0].live()[0]).unique(return_counts=True)[1]
    assert int(counts.max()) == views_per_voxel or views_per_voxel == 64
    assert (report["refused"] > 0) == (views_per_voxel < 64) and report["carved"] == 0


def test_at_once_or_one_by_one(backend):
    whole, parts = both(backend, 600)
    parts.put = backend.put
    for seed in (1, 2, 3):
        arguments = room(seed)
        report = whole.write(*arguments)
        reports = [parts.write(*(x[t : t + 1] for x in arguments)) for t in range(3)]
        assert report == {name: sum(one[name] for one in reports) for name in report}
    assert report["covered"] > 0
    assert_equal_bits(whole.all(), parts.all())


def test_degenerate_cameras_and_points(backend):
    held = both(backend, 400)
    write_both(held, room(1))
    for name, bad in (("points", math.nan), ("points", math.inf), ("points", 0.0)):
        for side in held:
            rows = getattr(side, name)
            rows[3:60:7] = bad
            side.bounds = block_bounds(side.points, num_points=side.count)
    latents, depth, intrinsics, cam2world = room(2, views=4)
    cam2world[1, :3, :3] = 0
    cam2world[2, :3, 3] = 1e30
    intrinsics[3, 0, 0] = 1e-30
    report = write_both(held, (latents, depth, intrinsics, cam2world))
    assert report["covered"] > 0 and report["non_finite"] > 0


@pytest.mark.slow
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(0, 3), st.booleans())
def test_any_scene(backend, seed, views_per_voxel, carve_views, merge):
    rng = np.random.default_rng(seed)
    held = both(backend, int(rng.integers(20, 300)), merge=merge)
    options = dict(
        views_per_voxel=views_per_voxel, carve_views=carve_views, depth_sampling=["median", "bilinear"][seed % 2]
    )
    for _ in range(3):
        write_both(held, room(int(rng.integers(1000)), views=2, box=rng.random() < 0.5), **options)
        if rng.random() < 0.5:
            most = int(rng.integers(0, 200))
            evicted = held[0].trim(most)
            with use_backend("reference"):
                assert held[1].trim(most) == evicted
            check_both(held)


def test_far_blocks_change_nothing(backend):
    """Thousands of tokens elsewhere, and some in between, with bounds and without."""
    rng = np.random.default_rng(0)
    near, plain = Held(9000, put=backend.put), Held(9000, put=backend.put, boxes=False)
    points, features = scenes.cloud(rng, 6000, CHANNELS)
    points[:5000, 0] += 100
    for held in (near, plain):
        held.points[:6000], held.features[:6000] = backend.put(points), backend.put(features)
        held.frame_ids[:6000], held.free_space_violations[:6000] = 0, 0
        held.count.fill_(6000)
        held.centers[0], held.frames = 0, 1
    near.bounds = block_bounds(near.points, num_points=near.count)
    for seed in range(3):
        arguments = room(seed)
        assert near.write(*arguments) == plain.write(*arguments)
        assert_equal_bits([near.bounds], [block_bounds(near.points, num_points=near.count)])
    assert near.trim() == plain.trim() == 0
    assert_equal_bits(near.all(), plain.all())
    assert_equal_bits([near.bounds], [block_bounds(near.points, num_points=near.count)])


def layers(backend, shift=0.0, unit=1.0):
    """Blocks of held tokens one behind the other along the views of `room`, some on its wall, most behind it."""
    rng = np.random.default_rng(7)
    held = both(backend, 40 * BLOCK_TOKENS + 400)
    depths = np.linspace(3.5, 9.0, 40) + shift
    points = rng.normal(size=(40, BLOCK_TOKENS, 3)) * 0.4 * depths[:, None, None]
    points[..., 2] = depths[:, None] + rng.uniform(-0.01, 0.01, (40, BLOCK_TOKENS))
    rows = torch.from_numpy(np.concatenate([points, points[..., 2:] / 16], 2)).float().flatten(0, 1) * unit
    free_space_violations = torch.from_numpy(
        rng.integers(0, 5, len(rows), dtype=np.uint8)
    )  # some as many as carve, from other writes
    for side in held:
        side.points[: len(rows)] = rows.to(side.points)
        side.features[: len(rows)], side.frame_ids[: len(rows)], side.free_space_violations[: len(rows)] = (
            0,
            0,
            free_space_violations.to(side.free_space_violations),
        )
        side.count.fill_(len(rows))
        side.centers[0], side.frames = 0, 1
        side.bounds = block_bounds(side.points, num_points=side.count)
    return held


@pytest.mark.parametrize("unit", [1e-18, 1.0, 1e14])
def test_blocks_behind_all_that_a_view_shows(backend, unit):
    """A view passes over what lies behind its farthest depth, but not over what is on a surface or seen through."""
    total = dict.fromkeys(WRITE_REPORT, 0)
    for shift in (0.0, 0.013, 0.05):
        held = layers(backend, shift, unit)
        for seed in range(3):
            latents, depth, intrinsics, cam2world = room(seed, box=False)
            cam2world[:, :3, 3] *= unit
            options = dict(min_depth=0.0, near=0.05 * unit, carve_views=3)
            report = write_both(held, (latents, depth * unit, intrinsics, cam2world), **options)
            total = {name: total[name] + report[name] for name in total}
    assert total["carved"] > 100 and total["written"] + total["replaced"] > 100


def test_a_backend_goes_by_the_far_end_of_bounds(cpu_backend):
    """With bounds that say that all lies behind the wall, nothing is carved: a broken promise shows that they count."""
    for behind, carved in ((0.0, True), (7.0, False)):
        side = layers(cpu_backend)[0]
        side.bounds[:, 2::3] += behind
        report = side.write(*room(0, box=False), carve_views=2)
        assert (report["carved"] > 0) == carved


# ---------------------------------------------------------------------------------------------- against the brute force


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_brute_force(backend, seed, merge):
    held, tokens, carved = Held(300, merge=merge, put=backend.put), [], 0
    for k in range(3):
        arguments = room(10 * seed + k, box=k < 1, unknown=0.05)
        mask = scenes.static_masks(np.random.default_rng(k), 3, IMAGE, 0.002)
        options = dict(views_per_voxel=2, min_depth=1.0, max_depth=4.15)
        frame = held.frames
        report = held.write(*arguments, mask=mask, **options)
        held.trim()
        expected = brute_force.bounded_write(
            tokens,
            held.centers.cpu().numpy(),
            *(x.numpy() for x in arguments),
            300,
            mask=mask.numpy(),
            first_frame=frame,
            merge=merge,
            **options,
        )
        assert report == expected
        carved += report["carved"]
        points, features, frame_ids, free_space_violations = held.live()
        assert len(points) == len(tokens) > 30
        assert frame_ids.tolist() == [token.frame for token in tokens]
        assert free_space_violations.tolist() == [token.free_space_violations for token in tokens]
        np.testing.assert_allclose(points.numpy(), np.array([token.point for token in tokens]), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(features.numpy(), np.array([token.latent for token in tokens]), rtol=1e-4, atol=1e-5)
    assert report["merged" if merge else "covered"] > 10 and carved > 0


def test_z_order():
    for size in ((1, 1), (3, 5), (44, 80), (64, 2)):
        cells = sorted(range(size[0] * size[1]), key=lambda cell: brute_force.z_code(*divmod(cell, size[1])))
        assert z_order(size).tolist() == cells


# ---------------------------------------------------------------------------------------------- what users rely on


def test_the_same_views_again_replace_what_they_wrote(backend):
    held = Held(600, put=backend.put)
    latents, depth, *cameras = room(1, views=1, unknown=0)
    latents.nan_to_num_(0.5)
    assert held.write(latents, depth, *cameras)["written"] == 54
    report = held.write(latents + 1, depth, *cameras)
    assert report["replaced"] == 54 and int(held.count) == 54
    assert sorted(held.live()[1].tolist()) == sorted((latents[0] + 1).flatten(1).T.tolist())
    assert held.live()[2].unique().tolist() == [1]


def test_a_closer_look_takes_the_place_of_a_poorer_one(backend):
    held = Held(900, put=backend.put)
    latents, depth, intrinsics, cam2world = room(1, views=1, grid=(12, 17), unknown=0, box=False)
    cam2world[0] = torch.eye(4)
    depth[:] = 4
    held.write(latents, depth, intrinsics, cam2world)
    cam2world[0, 2, 3] = 1  # a third nearer
    depth[:] = 3
    report = held.write(latents, depth, intrinsics, cam2world, carve_views=0)
    assert report["replaced"] > 3
    held.trim()
    closer = held.live()[2] == 1
    again = held.write(latents, depth + 1, intrinsics, torch.eye(4, dtype=torch.float64)[None], carve_views=0)
    assert again["replaced"] > 50 and again["written"] == 0
    assert bool((held.live()[2][closer] == 1).all()), "a poorer look does not take the place of a closer one"


def test_what_views_see_through_is_carved(backend):
    held = Held(600, put=backend.put)
    with_box, without = room(1, views=1, unknown=0), room(1, views=1, unknown=0, box=False)
    held.write(*with_box)
    on_box = int((held.live()[0][:, 2] < 3).sum())
    assert on_box > 5
    assert held.write(*without, carve_views=3)["carved"] == 0
    assert held.write(*with_box, carve_views=3)["carved"] == 0, (
        "seen in its place again: its violations are counted from 0 again"
    )
    assert held.write(*without, carve_views=3)["carved"] == 0
    assert held.write(*without, carve_views=3)["carved"] == 0
    carved = held.write(*without, carve_views=3)["carved"]
    assert carved >= 0.5 * on_box  # the rest lies at the rim, beside depths of the box's surroundings
    held.trim()
    assert int((held.live()[0][:, 2] < 3).sum()) == on_box - carved


def test_unknown_depth_carves_nothing(backend):
    held = Held(600, put=backend.put)
    held.write(*room(1, views=1, unknown=0))
    latents, depth, *cameras = room(1, views=1, unknown=0, box=False)
    for bad in scenes.UNKNOWN:
        report = held.write(latents, torch.full_like(depth, bad), *cameras, carve_views=1)
        assert report["carved"] == 0 and report["unknown_depth"] == 54


def test_threads_change_nothing():
    if not torch.get_num_threads() > 1:
        pytest.skip("one thread here")
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            held = Held(40_000)
            for seed in range(3):
                held.write(*room(seed, grid=(40, 60), image_size=(80, 120)))
            results.append(held.all())
        finally:
            torch.set_num_threads(before)
    for one in results[1:]:
        assert_equal_bits(one, results[0])


# ---------------------------------------------------------------------------------------------- trimming


def compacted(points, features, frame_ids, free_space_violations, num_observations, live, max_tokens):
    """By brute force: rows that stay, and how many were evicted."""
    alive = [row for row in range(live) if free_space_violations is None or free_space_violations[row] != INVALID]
    excess = max(len(alive) - max_tokens, 0)
    gone = set(sorted(alive, key=lambda row: (int(frame_ids[row]), row))[:excess])
    return [row for row in alive if row not in gone], excess


@pytest.mark.parametrize(
    ("live", "share", "dead", "stored"),
    scenes.pairwise(
        [0, 1, 255, 256, 257, 1000, 3000], [0.0, 0.5, 0.99, None], [0.0, 0.05, 1.0], [torch.bfloat16, FLOAT8]
    ),
)
def test_trim(backend, live, dead, share, stored):
    rng = np.random.default_rng(live)
    held = Held(3000, stored, merge=True, put=backend.put)
    held.frame_ids[:] = backend.put(torch.from_numpy(rng.integers(0, 40, 3000)).int())
    held.free_space_violations[:] = backend.put(
        torch.from_numpy(np.where(rng.random(3000) < dead, INVALID, rng.integers(0, 9, 3000))).byte()
    )
    held.num_observations[:] = backend.put(torch.from_numpy(rng.integers(1, 17, 3000)).byte())
    if held.scales is not None:
        held.scales[:] = backend.put(torch.from_numpy(rng.integers(11, 247, 3000)).byte())
    held.count.fill_(live)
    held.bounds = block_bounds(held.points, num_points=held.count)
    before = [x.clone().view(torch.uint8) if x.dtype == FLOAT8 else x.clone() for x in held.all()[:-1]]
    most = None if share is None else int(live * (1 - dead) * share)
    stay, excess = compacted(*before[:5], live, 2**60 if most is None else most)
    assert held.trim(most) == excess
    *after, count = held.all()
    after = [x.view(torch.uint8) if x.dtype == FLOAT8 else x for x in after]
    assert int(count) == len(stay)
    assert_equal_bits([x[: len(stay)] for x in after], [x[stay] for x in before])
    assert_equal_bits([x[live:] for x in after], [x[live:] for x in before])
    assert_equal_bits([held.bounds], [block_bounds(held.points, num_points=held.count)])
    assert held.bounds.shape[0] == bounds_rows(3000)


def test_trim_without_violations(backend):
    held = Held(100, put=backend.put)
    held.frame_ids[:] = backend.put(torch.arange(100).int() // 10)
    held.count.fill_(100)
    evicted = cache_compact(held.points, held.features, held.frame_ids, held.count, max_tokens=35)
    assert int(evicted) == 65 and int(held.count) == 35
    assert held.frame_ids[:35].tolist() == [6] * 5 + [row // 10 for row in range(70, 100)]


# ---------------------------------------------------------------------------------------------- errors


def options_of(**changes):
    held = Held(100)
    latents, depth, intrinsics, cam2world = room(1)
    names = dict(
        points=held.points,
        features=held.features,
        frame_ids=held.frame_ids,
        free_space_violations=held.free_space_violations,
        count=held.count,
        frame_centers=held.centers,
        latents=latents,
        depth=depth,
        intrinsics=intrinsics,
        cam2world=cam2world,
    )
    return {**names, **changes}


WRONG = [
    (
        dict(free_space_violations=None),
        TypeError,
        "free_space_violations must be a tensor, written in place, got NoneType None",
    ),
    (
        dict(free_space_violations=torch.zeros(99, dtype=torch.uint8)),
        ValueError,
        "free_space_violations must be \\(100,\\) uint8, got \\(99,\\) uint8",
    ),
    (
        dict(num_observations=torch.zeros(100)),
        ValueError,
        "num_observations must be \\(100,\\) uint8, got \\(100,\\) float32",
    ),
    (dict(frame_centers=torch.zeros(2, 3)), ValueError, "frame_centers must be \\(F, 3\\) float32, at least 3 rows"),
    (dict(frame_centers=torch.zeros(64, 3).double()), ValueError, "frame_centers must be \\(F, 3\\) float32"),
    (dict(views_per_voxel=0), ValueError, "views_per_voxel must be an int from 1 to 64, got 0"),
    (dict(views_per_voxel=2.5), ValueError, "views_per_voxel must be an int from 1 to 64, got 2.5"),
    (dict(carve_views=255), ValueError, "carve_views must be an int from 0 to 254, got 255"),
    (dict(carve_views=True), ValueError, "carve_views must be an int from 0 to 254, got True"),
    (dict(near=-1), ValueError, "near must be a finite depth"),
    (dict(first_frame=-1), ValueError, "first_frame must be an int >= 0"),
    (dict(bounds=torch.zeros(1, 6)), ValueError, "bounds must be"),
    (dict(features=torch.zeros(100, 4)), ValueError, "features must be \\(100, 5\\)"),
]


@pytest.mark.parametrize("changes, error, message", WRONG)
def test_bad_input_is_named_and_nothing_is_written(changes, error, message):
    arguments = options_of(**changes)
    kept = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(error, match=message):
        bounded_write(**arguments)
    for name, value in kept.items():
        assert_equal_bits([arguments[name]], [value])


@pytest.mark.parametrize("most", [-1, 1.5, "all"])
def test_trim_says_what_it_wants(most):
    held = Held(10)
    with pytest.raises(ValueError, match=f"max_tokens must be an int from 0 to .*, got {most!r}"):
        held.trim(most)

"""`LatentCache`: writing, reading, growing, and its files."""

from __future__ import annotations

import json
import math
import os
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import scenes
import torch
from comparison import as_array, assert_equal_bits, assert_same_view, assert_same_write
from hypothesis import given
from hypothesis import strategies as st

import mirage_kernels.io
from mirage_kernels import Cameras, LatentCache, WriteReport, bounded_write, cache_compact, cache_write, splat_aligned
from mirage_kernels.ops import checks

GRID = (5, 7)
IMAGE = (25, 35)


def append(*args, **options):
    """A cache that keeps every token written; bounded ones have tests of their own below."""
    return LatentCache(*args, **{"write_policy": "append", **options})


def frames(seed=0, views=2, channels=4, unknown=0.2, dtype=torch.float32, grid=GRID, image_size=IMAGE):
    """latents, depth, cameras, mask of a write; one latent in a hundred is NaN."""
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(views, channels, *grid)).astype(np.float32)
    latents[rng.random(latents.shape) < 0.01 / channels] = math.nan
    cameras = Cameras(
        scenes.intrinsics(rng, views, image_size), scenes.poses(rng, views), image_size, square_pixels=False
    )
    return (
        torch.from_numpy(latents).to(dtype),
        scenes.depth_maps(rng, views, image_size, unknown),
        cameras,
        scenes.static_masks(rng, views, image_size, 0.01),
    )


def put(backend, arguments):
    return [x.to(backend.device) if isinstance(x, Cameras) else backend.put(x) for x in arguments]


def contents(cache):
    """All a cache holds, on the host."""
    held = (cache.points, cache.footprints, cache.features, cache.frame_ids, cache.frame_centers)
    return [x.cpu().clone() for x in held]


def state(cache):
    """Contents, and what says where they are."""
    return [*contents(cache), torch.tensor([len(cache), cache.buffer_version, cache.capacity, cache.num_frames])]


def latent_dtype(stored):
    """The dtype of latents for a cache: there are none in float8."""
    return torch.bfloat16 if stored.itemsize == 1 else stored


def filled(dtype=torch.float32, device="cpu", views=2, **options):
    cache = append(channels=4, dtype=dtype, device=device, **options)
    cache.write(*[x.to(device) for x in frames(views=views, dtype=latent_dtype(dtype))])
    assert len(cache) > 20
    return cache


# ---------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("stored", scenes.DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_write_is_cache_write(backend, stored, masked):
    """Two writes into a growing cache hold what the operator writes into buffers of its own, and what it reports."""
    cache = append(channels=4, dtype=stored, device=backend.device)
    buffers = before = scenes.buffers(200, 4, stored)
    for seed, first_frame in ((1, 0), (2, 2)):
        latents, depth, cameras, mask = frames(seed)
        depth[:, :5], depth[:, 5:10] = 0, 3
        mask = mask if masked else None
        options = dict(depth_sampling="median", min_depth=2.05, max_depth=2.45)
        report = cache.write(*put(backend, (latents, depth, cameras, mask)), **options)
        before = [x.clone() for x in buffers]
        arguments = latents, depth, cameras.intrinsics, cameras.cam2world
        counts = cache_write(
            *(own := [backend.put(x) for x in buffers]),
            *[backend.put(x) for x in arguments],
            mask=backend.put(mask),
            first_frame=first_frame,
            **options,
        )
        buffers = [x.cpu() for x in own]
        assert_same_write(buffers, counts.cpu(), before, *arguments, mask=mask, first_frame=first_frame, **options)
        kept = ("written", "refused", "masked", "unknown_depth", "out_of_range", "non_finite")
        assert (
            [getattr(report, name) for name in kept] == counts.tolist()
            and report.written > 0
            and report.unknown_depth > 0
        )
        assert report.as_dict() == {name: getattr(report, name) for name in report.as_dict()}
        assert (report.masked > 0) == masked and report.refused == 0 and report.out_of_range > 0
        assert sum(report.as_dict().values()) == 70 and f"written={report.written}" in repr(report)
    n = int(buffers[3])
    expected = buffers[0][:n, :3], buffers[0][:n, 3], buffers[1][:n], buffers[2][:n]
    assert_equal_bits(contents(cache)[:4], expected)
    assert len(cache) == n > 50 and cache.num_frames == 4
    assert cache.frame_ids.unique().tolist() == [0, 1, 2, 3]


def test_keywords_and_positions():
    latents, depth, cameras, mask = frames(3)
    one, other = append(channels=4), append(4)
    one.write(latents, depth, cameras, mask=mask)
    other.write(latents, depth, cameras, mask)
    assert len(one) > 20
    assert_equal_bits(contents(one), contents(other))


def test_nan_latents_are_never_stored(backend):
    latents, *rest = frames(4, unknown=0.0)
    latents.nan_to_num_(0.5)
    cache = append(channels=4, device=backend.device)
    assert cache.write(*put(backend, (latents, *rest))).non_finite == 0
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = latents.clone()
        spoilt[:, 2, 1:4, 2:] = bad
        assert cache.write(*put(backend, (spoilt, *rest))).non_finite > 10
    assert len(cache) > 100 and torch.isfinite(cache.features).all() and torch.isfinite(cache.points).all()


def test_frame_centers_are_the_camera_centers():
    cache = append(channels=4)
    centers = []
    for seed in range(5):
        arguments = frames(seed, views=30)
        cache.write(*arguments)
        centers.append(arguments[2].centers.float())
    assert cache.num_frames == 150
    assert torch.equal(cache.frame_centers, torch.cat(centers)) and len(cache) > 1000


def test_cameras_of_another_image_size_are_resized_to_the_depth():
    latents, depth, cameras, mask = frames(5)
    one, other = append(channels=4), append(channels=4)
    one.write(latents, depth, cameras, mask)
    other.write(latents, depth, cameras.resized((250, 340)), mask)
    assert len(one) == len(other) > 20
    torch.testing.assert_close(one.points, other.points, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cameras": (35, 25)},
            r"cameras must have the aspect of the latents, 5x7, .* got 35x25 \(height and width exch",
        ),
        ({"cameras": (14, 35)}, r"cameras must have the aspect of the latents, 5x7, within one token, got 14x35$"),
        ({"depth": (24, 45)}, "depth must have the aspect of the latents, 5x7, within one token, got 24x45"),
        ({"mask": (36, 24)}, "mask must have the aspect of the latents, 5x7, within one token, got 36x24"),
        ({"latents": (7, 5)}, "cameras must have the aspect of the latents, 7x5, within one token, got 25x35"),
    ],
)
def test_writes_of_different_aspects_are_refused(change, message):
    """Cameras, depth, mask and latents show the same views: a token more or less is rounding, more is a mistake."""
    cache, (latents, depth, cameras, mask) = filled(), frames(5)
    before, given = contents(cache), {"latents": latents, "depth": depth, "cameras": cameras, "mask": mask}
    for name, size in change.items():
        is_camera = name == "cameras"
        given[name] = cameras.resized(size) if is_camera else given[name].new_ones(*given[name].shape[:-2], *size)
    with pytest.raises(ValueError, match=message):
        cache.write(**given)
    assert_equal_bits(contents(cache), before)


def test_reads_of_another_aspect_are_refused():
    cache, cameras = filled(), frames(5)[2]
    for size in (GRID, (4, 7), (6, 7), (10, 14), (5, 8)):
        assert cache.read(cameras, size).mask.shape[1:] == size
    for call in (cache.read, lambda views, size: cache.view_overlap(cameras, views, size)):
        with pytest.raises(
            ValueError, match=r"must have the aspect of the grid.*, 7x5, .* got 25x35 \(height and width"
        ):
            call(cameras, (7, 5))


def test_a_write_of_no_views():
    cache = filled()
    before = contents(cache)
    latents, depth, cameras, mask = frames(6)
    report = cache.write(latents[:0], depth[:0], cameras[:0], mask[:0])
    assert set(report.as_dict().values()) == {0}
    assert_equal_bits(contents(cache), before)


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("stored", scenes.STORED)
@pytest.mark.parametrize("out", [None, torch.float32, torch.bfloat16])
def test_a_read_is_the_brute_force(backend, stored, out):
    cache = append(channels=4, dtype=stored, device=backend.device)
    for seed in (7, 8):
        cache.write(*put(backend, frames(seed)))
    _, _, cameras, _ = frames(9, views=3)
    view = cache.read(cameras.to(backend.device), size=(6, 9), splat="nearest", dtype=out)
    out = out or latent_dtype(stored)
    assert view.latents.dtype == out and view.latents.device.type == backend.device.type
    points = torch.cat([cache.points, cache.footprints[:, None]], 1).cpu()
    grid = cameras.resized((6, 9))
    assert_same_view(
        type(view)(*(x.cpu() for x in view)),
        points,
        cache.features.cpu(),
        grid.intrinsics,
        grid.cam2world,
        (6, 9),
        dtype=out,
        least_covered=60,
    )


@pytest.mark.parametrize("stored", scenes.STORED)
@pytest.mark.parametrize("options", [{}, {"splat": "aligned"}, {"sharpness": 0.0, "dtype": torch.float32}])
def test_an_aligned_read_is_the_operator(backend, stored, options):
    """By default, with the frames that wrote each token, and no others after clearing."""
    cache = append(channels=4, dtype=stored, device=backend.device)
    cache.write(*put(backend, frames(6)))
    cache.clear()
    for seed in (7, 8):
        cache.write(*put(backend, frames(seed)))
    cameras = frames(9, views=3)[2].to(backend.device)
    view = cache.read(cameras, size=(6, 9), **options)
    grid = cameras.resized((6, 9))
    expected = splat_aligned(
        torch.cat([cache.points, cache.footprints[:, None]], 1),
        cache.features,
        cache.frame_ids,
        cache.frame_centers,
        grid.intrinsics,
        grid.cam2world,
        (6, 9),
        **{"dtype": latent_dtype(stored), **{name: value for name, value in options.items() if name != "splat"}},
    )
    assert view.mask.sum() > 60 and int(cache.frame_ids.max()) == len(cache.frame_centers) - 1
    assert_equal_bits(view, expected)


@pytest.mark.parametrize("splat", ["nearest", "aligned"])
def test_the_table_of_frames_grows(splat):
    """Past its 1,024 rows it moves, which captured reads are told; what was written by then is read as before."""
    cache = append(channels=1, capacity=4000)
    depth = torch.full((600, 1, 1), 2.0)
    camera = Cameras(torch.tensor([[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]), torch.eye(4).repeat(600, 1, 1), (1, 1))
    before = cache.buffer_version
    cache.write(torch.ones(600, 1, 1, 1), depth, camera)
    assert cache.buffer_version == before
    first = cache.read(camera[:1], (1, 1), splat=splat)
    cache.write(torch.ones(600, 1, 1, 1), depth, camera)
    assert cache.buffer_version == before + 1 and cache.frame_centers.shape == (1200, 3)
    assert first.mask.all()
    assert_equal_bits(cache.read(camera[:1], (1, 1), splat=splat), first)


def test_what_was_written_is_read_back(backend):
    """The camera that wrote sees its own latents, exactly, wherever depth was known and the token static."""
    latents, depth, cameras, mask = frames(10, views=1, unknown=0.4)
    latents.nan_to_num_(0.5)
    cache = append(channels=4, device=backend.device)
    report = cache.write(*put(backend, (latents, depth, cameras, mask)))
    view = cache.read(cameras.to(backend.device), size=GRID)
    assert 10 < report.written == int(view.mask.sum()) < 35
    kept = view.mask[0].cpu()
    assert torch.equal(view.latents[0, :, kept.to(backend.device)].cpu(), latents[0][:, kept])


def test_near_is_passed_on():
    cache = filled()
    cameras = frames(0)[2]
    assert cache.read(cameras, GRID).mask.any()
    assert not cache.read(cameras, GRID, near=100.0).mask.any()


@pytest.mark.parametrize("views", [0, 1, 3])
def test_reading_an_empty_cache(backend, views):
    cameras = frames(11, views=3)[2][:views].to(backend.device)
    arguments = put(backend, frames(11))
    for options in ({}, {"capacity": 70}):
        cache = append(channels=4, dtype=torch.float16, device=backend.device, **options)
        assert len(cache) == 0 and cache.nbytes == 0 and cache.points.shape == (0, 3) and cache.features.shape == (0, 4)
        view = cache.read(cameras, size=GRID)
        assert view.latents.shape == (views, 4, *GRID) and view.latents.dtype == torch.float16
        assert not view.latents.any() and not view.mask.any() and (view.index == -1).all()
        cache.write(*arguments)
        assert len(cache) > 20 and cache.read(arguments[2], size=GRID).mask.any()


def test_reading_does_not_write():
    cache = filled()
    before = state(cache)
    view = cache.read(frames(0)[2], GRID)
    assert view.mask.any()
    view.latents.fill_(9.0)
    assert_equal_bits(state(cache), before)


def test_view_overlap(backend):
    cache = append(channels=4, device=backend.device)
    cache.write(*put(backend, frames(12, views=3)))
    cameras = frames(12, views=3)[2].to(backend.device)
    overlap = cache.view_overlap(cameras, cameras[1:2], GRID)
    assert overlap.shape == (3,) and overlap[1] == 1 and (overlap > 0).all() and (overlap[[0, 2]] < 1).all()
    assert append(channels=4, device=backend.device).view_overlap(cameras, cameras, GRID).tolist() == [0, 0, 0]


# ---------------------------------------------------------------------------------------------- growing


def test_growth_is_geometric_and_keeps_everything():
    """Far fewer moves than writes; each bumps the version; nothing written before changes."""
    cache = append(channels=4)
    versions, capacities, parts = [], [], []
    for seed in range(60):
        live = len(cache)
        cache.write(*frames(seed, views=1))
        parts.append([x[live:] for x in contents(cache)[:4]])
        versions.append(cache.buffer_version)
        capacities.append(cache.capacity)
        assert len(cache) <= cache.capacity
    assert 60 * 15 < len(cache) < 60 * 35
    moves = sum(a != b for a, b in pairwise(versions))
    grown = [b for a, b in pairwise(capacities) if a != b]
    assert moves == len(grown) and 3 <= moves <= 14
    assert all(b >= 1.4 * a for a, b in pairwise(grown))
    assert_equal_bits(contents(cache)[:4], [torch.cat(column) for column in zip(*parts, strict=True)])


def test_a_fixed_capacity_never_moves():
    cache, buffers = append(channels=4, capacity=150), []
    total = refused = 0
    for seed in range(6):
        report = cache.write(*frames(seed))
        total, refused = total + report.written, refused + report.refused
        assert len(cache) == total
        buffers.append([x.data_ptr() for x in (cache.points, cache.features, cache.frame_ids)])
    assert all(x == buffers[0] for x in buffers)
    assert total == cache.capacity == 150 and refused > 0 and cache.buffer_version == 0
    # What fitted is what a growing cache holds first.
    growing = append(channels=4)
    reports = [growing.write(*frames(seed)) for seed in range(6)]
    assert sum(report.written for report in reports) == total + refused == len(growing)
    expected = [x[:150] for x in contents(growing)[:4]]
    assert_equal_bits(contents(cache)[:4], expected)
    full = cache.write(*frames(7))
    assert full.written == 0 and full.refused > 20 and len(cache) == 150
    assert_equal_bits(contents(cache)[:4], expected)


def test_no_capacity_at_all():
    cache = append(channels=4, capacity=0)
    report = cache.write(*frames(13))
    assert report.written == 0 and report.refused > 20 and len(cache) == 0
    assert not cache.read(frames(13)[2], GRID).mask.any()


@given(seed=st.integers(0, 10**6), splits=st.lists(st.integers(1, 3), min_size=1, max_size=5))
def test_writes_in_any_portions(seed, splits):
    """However a video is cut into writes, the cache is the same."""
    total = sum(splits)
    latents, depth, cameras, mask = frames(seed, views=total)
    whole, parts = append(channels=4), append(channels=4)
    whole.write(latents, depth, cameras, mask)
    start = 0
    for views in splits:
        portion = slice(start, start + views)
        parts.write(latents[portion], depth[portion], cameras[portion], mask[portion])
        start += views
    assert len(whole) > 0
    assert_equal_bits(contents(parts), contents(whole))
    assert_equal_bits(parts.read(cameras, GRID), whole.read(cameras, GRID))


# ---------------------------------------------------------------------------------------------- what it says of itself


@pytest.mark.parametrize("dtype", scenes.STORED)
def test_sizes_in_bytes(dtype):
    cache = append(channels=4, dtype=dtype, capacity=100)
    per_token = 16 + 4 * dtype.itemsize + 4 + (dtype.itemsize == 1)
    empty = cache.nbytes_allocated
    assert cache.nbytes == 0 and 100 * per_token <= empty <= 100 * per_token + 24 + 1024 * 12 + 64
    cache.write(*frames(14, dtype=latent_dtype(dtype)))
    live = len(cache)
    assert 20 < live < 100
    assert live * per_token <= cache.nbytes <= live * per_token + 2 * 24 + 2 * 12
    assert cache.nbytes <= cache.nbytes_allocated


def test_properties():
    cache = filled(torch.bfloat16)
    assert (cache.channels, cache.dtype, cache.device, cache.write_policy) == (
        4,
        torch.bfloat16,
        torch.device("cpu"),
        "append",
    )
    n = len(cache)
    assert cache.points.shape == (n, 3) and cache.points.dtype == torch.float32
    assert cache.features.shape == (n, 4) and cache.features.dtype == torch.bfloat16
    assert cache.frame_ids.shape == (n,) and cache.frame_ids.dtype == torch.int32
    assert cache.footprints.shape == (n,) and (cache.footprints > 0).all()
    assert cache.frame_centers.shape == (2, 3)
    assert f"{n} tokens of 4 bfloat16 channels from 2 frames" in repr(cache) and "append" in repr(cache)


@pytest.mark.parametrize("old, new", [("generation", "buffer_version"), ("fetch", "onload"), ("settings", "config")])
def test_old_names_say_the_new_one(old, new):
    cache = append(4)
    with pytest.raises(AttributeError, match=rf"^LatentCache\.{old} is called {new} now$"):
        getattr(cache, old)
    assert not hasattr(cache, old) and hasattr(cache, new)
    with pytest.raises(AttributeError, match="'LatentCache' object has no attribute 'anything'"):
        cache.anything  # noqa: B018


CHECKS = [name for name in vars(checks) if name.startswith(("check_", "require"))]


@pytest.mark.parametrize("options", [{"write_policy": "append"}, {"max_tokens": 500}])
def test_arguments_are_checked_once(monkeypatch, options):
    """By the cache: operators are launched on its buffers without the checks of their public functions."""
    cache, (latents, depth, cameras, mask) = LatentCache(4, **options), frames(0)
    cache.write(latents, depth, cameras, mask)
    cache.write(latents, depth, cameras, mask)  # there is room for one more then
    calls = []
    for module in [m for name, m in sys.modules.items() if name.startswith("mirage_kernels.")]:
        for name in CHECKS:
            if hasattr(module, name):
                checked = getattr(module, name)
                monkeypatch.setattr(
                    module, name, lambda *x, name=name, checked=checked, **y: (calls.append(name), checked(*x, **y))[1]
                )
    cache.read(cameras, GRID)
    assert sorted(calls) == ["check_fits_grid", "check_sharpness", "check_size"]
    calls.clear()
    cache.view_overlap(cameras, cameras, GRID)
    assert sorted(calls) == ["check_fits_grid", "check_fits_grid", "check_size"]
    calls.clear()
    assert cache.write(latents, depth, cameras, mask).masked > 0
    once = ("check_write_inputs", "check_depth", "check_cameras", "check_first_frame")
    assert [calls.count(name) for name in once] == [1, 1, 1, 1]
    assert not {"check_buffers", "check_points", "check_features", "check_bounds", "check_scales"} & set(calls)


class Counts:
    """A tensor of counts that counts how often it is read."""

    def __init__(self, is_cuda=False):
        self.is_cuda, self.reads = is_cuda, 0

    def tolist(self):
        self.reads += 1
        return [self.reads, *range(2, 12)]


def test_a_report_waits_once():
    counts = Counts()
    report = WriteReport(counts)
    assert counts.reads == 0
    names = list(report.as_dict())
    assert [getattr(report, name) for name in names] == list(range(1, 12)) == list(report.as_dict().values())
    assert repr(report).startswith("WriteReport(written=1, replaced=2,") and counts.reads == 1


def test_a_report_of_a_captured_write_is_read_after_every_replay(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    counts = Counts(is_cuda=True)
    report = WriteReport(counts)
    monkeypatch.undo()
    assert [report.written, report.written, report.carved] == [1, 2, 10] and counts.reads == 3


def test_tensors_and_back(backend):
    """All that a cache holds, given to another of the same config."""
    cache = LatentCache(4, device=backend.device, merge="mean", max_tokens=60)
    for seed in (1, 2, 1):
        cache.write(*put(backend, frames(seed)))
    names = ("points", "features", "frame_ids", "free_space_violations", "num_observations", "frame_centers")
    assert tuple(cache.tensors()) == names
    again = LatentCache.from_tensors(cache.tensors(), backend.device, **{**cache.config, "dtype": cache.dtype})
    assert again.config == cache.config
    assert_equal_bits(contents(again), contents(cache))
    for one in (cache, again):
        one.write(*put(backend, frames(3)))
    assert_equal_bits(list(again.tensors().values()), list(cache.tensors().values()))


def test_more_rows_than_kernels_can_address():
    with pytest.raises(ValueError, match=r"points must hold fewer than 2\^32 - 1 tokens, got 4294967295"):
        append(1, capacity=2**32 - 1, device="meta")


def test_clear():
    cache = filled()
    version, capacity, arguments = cache.buffer_version, cache.capacity, frames(0)
    first = contents(cache)
    cache.clear()
    assert len(cache) == 0 and cache.nbytes == 0 and cache.num_frames == 0 and len(cache.frame_centers) == 0
    assert not cache.read(arguments[2], GRID).mask.any()
    assert (cache.buffer_version, cache.capacity) == (version, capacity)
    cache.write(*arguments)
    assert_equal_bits(contents(cache), first)
    assert cache.buffer_version == version, "no growth: there was room"


def test_to_the_same_device_is_the_cache_itself():
    cache = filled()
    assert cache.to("cpu") is cache and cache.to(torch.device("cpu")) is cache


def test_to_another_device_is_a_copy():
    cache = filled(capacity=90)
    copy = cache.to("meta") if not torch.cuda.is_available() else cache.to("cuda")
    assert copy is not cache and copy.device.type in ("meta", "cuda") and copy.capacity == 90
    assert (copy.channels, copy.dtype, copy.write_policy) == (cache.channels, cache.dtype, cache.write_policy)


@pytest.mark.cuda
def test_to_a_gpu_and_back():
    cache = filled(torch.float16)
    there = cache.to("cuda")
    assert there.device.type == "cuda" and there.to("cuda") is there and len(there) == len(cache)
    assert_equal_bits(contents(there.to("cpu")), contents(cache))
    cameras = frames(0)[2]
    assert_equal_bits(there.read(cameras.to("cuda"), GRID), cache.read(cameras, GRID))
    more = frames(1)
    there.write(*[x.to("cuda") for x in more])
    cache.write(*more)
    assert_equal_bits(contents(there), contents(cache))


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"channels": -1}, ValueError, "channels must be an int >= 0, got -1"),
        ({"channels": 4.0}, (ValueError, TypeError), r"channels must be an int >= 0, got 4\.0"),
        ({"channels": True}, (ValueError, TypeError), "channels must be an int >= 0, got True"),
        ({"dtype": torch.float64}, TypeError, r"dtype must be float32, .* or float8_e4m3fn, got torch\.float64"),
        ({"dtype": torch.int8}, TypeError, r"dtype must be float32, .* or float8_e4m3fn, got torch\.int8"),
        ({"capacity": -1}, ValueError, "capacity must be None or an int >= 0, got -1"),
        ({"capacity": 1e6}, (ValueError, TypeError), "capacity must be None or an int >= 0, got 1000000"),
        ({"views_per_voxel": 0}, ValueError, "views_per_voxel must be an int from 1 to 64, got 0"),
        ({"carve_views": 0}, ValueError, "carve_views must be an int from 1 to 254, got 0"),
        ({"carve": 1}, TypeError, "carve must be a bool, got 1"),
        ({"merge": "sum"}, ValueError, "merge must be one of keep, mean, got 'sum'"),
        ({"max_tokens": -1}, ValueError, "max_tokens must be an int from 0 to .*, got -1"),
        ({"write_policy": "keep"}, ValueError, "write_policy must be one of bounded, append, got 'keep'"),
    ],
)
def test_refused_settings(options, kind, message):
    with pytest.raises(kind, match=message):
        append(**{"channels": 4, **options})


REFUSED_WRITES = [
    ("latents", lambda x: x[0], ValueError, r"latents must be \(T, C, h, w\).*got \(4, 5, 7\)"),
    ("latents", lambda x: x[:, :3], ValueError, r"latents must be \(T, 4, h, w\), got \(2, 3, 5, 7\)"),
    ("latents", lambda x: x.int(), TypeError, r"latents must be .*float32, float16 or bfloat16, got .*int32"),
    ("latents", lambda x: x.tolist(), TypeError, r"latents must be a tensor"),
    ("latents", lambda x: x[:1], ValueError, r"cameras must be 1 views like latents, got 2"),
    ("depth", lambda x: x[0], ValueError, r"depth must be \(T, H, W\) float, got \(25, 35\)"),
    ("depth", lambda x: x[:1], ValueError, r"mask must be .* with the T of depth, 1"),
    (
        "depth",
        lambda x: x[:, :3],
        ValueError,
        r"depth must be .*at least as fine as the token grid \(5, 7\), got \(2, 3, 35\)",
    ),
    ("depth", lambda x: x[:, :0], ValueError, r"depth must be .*got \(2, 0, 35\)"),
    ("depth", lambda x: x.nan_to_num(0, 0, 0).long(), TypeError, r"depth must be .*got .*int64"),
    ("depth", lambda x: x.to("meta"), ValueError, r"must be on (cpu|meta) like \w+, got (meta|cpu)"),
    ("mask", lambda x: 2 * x.int(), ValueError, r"mask must be bool, or 0 and 1 with 1 = static, got .*int32"),
    ("mask", lambda x: x[:, :3], ValueError, r"mask must be .*at least as fine as the token grid"),
    ("cameras", lambda x: x[:1], ValueError, r"cameras must be 2 views like latents, got 1"),
    ("cameras", lambda x: x.cam2world, TypeError, r"cameras must be mirage_kernels\.Cameras, got Tensor"),
    ("depth_sampling", lambda x: "mode", ValueError, r"depth_sampling must be one of median, bilinear, got 'mode'"),
    ("min_depth", lambda x: -1.0, ValueError, r"min_depth must be in \[0, max_depth\], got min_depth=-1\.0"),
    ("max_depth", lambda x: math.nan, ValueError, r"min_depth must be in \[0, max_depth\], got .*max_depth=nan"),
]


@pytest.mark.parametrize("argument, spoil, kind, message", REFUSED_WRITES)
@pytest.mark.parametrize("capacity", [None, 150])
def test_refused_writes_change_nothing(argument, spoil, kind, message, capacity):
    """Not even room is made: the buffers stay where they were, full as they are."""
    cache = filled(capacity=capacity)
    buffers = [x.data_ptr() for x in (cache.points, cache.features, cache.frame_ids)]
    before, allocated = state(cache), cache.nbytes_allocated
    arguments = dict(zip(("latents", "depth", "cameras", "mask"), frames(15), strict=True))
    with pytest.raises(kind, match=message):
        cache.write(**{**arguments, argument: spoil(arguments.get(argument))})
    assert_equal_bits(state(cache), before)
    assert cache.nbytes_allocated == allocated
    assert [x.data_ptr() for x in (cache.points, cache.features, cache.frame_ids)] == buffers
    cache.write(**arguments)
    assert len(cache) > len(before[0])


@pytest.mark.parametrize(
    "changes, kind, message",
    [
        ({"splat": "bilinear"}, ValueError, "splat must be one of aligned, nearest, got 'bilinear'"),
        ({"size": (0, 7)}, ValueError, r"size must be \(height, width\), two positive integers, got \(0, 7\)"),
        ({"size": 5}, ValueError, r"size must be \(height, width\), two positive integers, got 5"),
        ({"cameras": torch.eye(4)[None]}, TypeError, r"cameras must be mirage_kernels\.Cameras, got Tensor"),
        ({"sharpness": -1.0}, ValueError, r"sharpness must be a number >= 0, infinity included, got -1\.0"),
        ({"near": -1.0}, ValueError, r"near must be a finite depth >= 0 in world units, got -1\.0"),
        ({"dtype": torch.int32}, TypeError, r"dtype must be .*got torch\.int32"),
    ],
)
def test_refused_reads(changes, kind, message):
    cache = filled()
    arguments = {"cameras": frames(0)[2], "size": GRID}
    assert cache.read(**arguments).mask.any()
    with pytest.raises(kind, match=message):
        cache.read(**{**arguments, **changes})


def test_refused_overlap():
    cache, cameras = filled(), frames(0)[2]
    with pytest.raises(TypeError, match=r"targets must be mirage_kernels\.Cameras, got NoneType"):
        cache.view_overlap(cameras, None, GRID)
    with pytest.raises(ValueError, match="voxel_size must be a finite length > 0"):
        cache.view_overlap(cameras, cameras, GRID, voxel_size=0)


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", scenes.STORED)
@pytest.mark.parametrize("capacity", [None, 100])
def test_round_trip(tmp_path, dtype, capacity):
    """Bit for bit, with the settings; a loaded cache goes on as the one it was."""
    cache, path = filled(dtype, capacity=capacity), tmp_path / "room.safetensors"
    cache.save(path)
    again = LatentCache.load(path)
    assert_equal_bits(contents(again), contents(cache))
    assert (again.channels, again.dtype, again.write_policy) == (4, dtype, "append")
    assert len(again) == len(cache) and again.num_frames == cache.num_frames == 2
    cameras = frames(1)[2]
    assert_equal_bits(again.read(cameras, GRID), cache.read(cameras, GRID))
    reports = [one.write(*frames(16, dtype=latent_dtype(dtype))).as_dict() for one in (cache, again)]
    assert reports[0] == reports[1] and (reports[0]["refused"] > 0) == (capacity is not None)
    assert_equal_bits(contents(again), contents(cache))
    assert again.frame_ids.unique().tolist()[:3] == [0, 1, 2]
    assert again.capacity == cache.capacity if capacity else again.capacity >= len(again)


def test_round_trip_of_special_values(tmp_path):
    """Subnormals, negative zero and the extremes survive."""
    latents, depth, cameras, _ = frames(17, unknown=0.0)
    latents.nan_to_num_(0.5)
    info = torch.finfo(torch.float32)
    latents[0, :, 0, 0] = torch.tensor([-0.0, info.tiny / 4, info.max, info.min])
    cache = append(channels=4)
    cache.write(latents, depth, cameras)
    assert cache.features[0].tolist() == latents[0, :, 0, 0].tolist()
    cache.save(tmp_path / "x.safetensors")
    assert_equal_bits(contents(LatentCache.load(tmp_path / "x.safetensors")), contents(cache))


@pytest.mark.parametrize("capacity", [None, 0, 9])
def test_round_trip_of_an_empty_cache(tmp_path, capacity):
    cache = append(channels=4, dtype=torch.float16, capacity=capacity)
    cache.save(tmp_path / "x.safetensors")
    again = LatentCache.load(tmp_path / "x.safetensors")
    assert len(again) == 0 and again.channels == 4 and again.dtype == torch.float16
    report = again.write(*frames(0))
    assert report.written + report.refused > 20 and report.written == (
        min(capacity, 9) if capacity is not None else len(again)
    )


def test_path_may_be_a_string(tmp_path):
    cache, path = filled(), str(tmp_path / "x.safetensors")
    cache.save(path)
    assert_equal_bits(contents(LatentCache.load(path, device="cpu")), contents(cache))


def test_a_saved_file_is_plain_safetensors(tmp_path):
    """Version and settings in the metadata, only live tokens in the tensors: anyone can read it."""
    cache, path = filled(torch.bfloat16, capacity=5000), tmp_path / "room.safetensors"
    cache.save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert metadata["version"] == "3" and 0.01 < float(metadata["near"]) < 0.1
    assert metadata["origin"] == "[0.0, 0.0, 0.0]"
    settings = json.loads(metadata["settings"])
    bounded = {"views_per_voxel": 4, "merge": "keep", "carve": True, "carve_views": 2, "max_tokens": None}
    given = {"channels": 4, "dtype": "bfloat16", "write_policy": "append", "capacity": 5000}
    assert settings == {**given, **bounded, "near": None, "origin": None}
    assert {name: tuple(x.shape) for name, x in tensors.items()} == {
        "points": (len(cache), 4),
        "features": (len(cache), 4),
        "frame_ids": (len(cache),),
        "frame_centers": (2, 3),
    }
    assert_equal_bits([tensors["features"]], [cache.features])
    assert path.stat().st_size < 10_000 and as_array(tensors["points"]).any()


def test_a_saved_float8_file_is_plain_safetensors(tmp_path):
    cache, path = filled(torch.float8_e4m3fn), tmp_path / "room.safetensors"
    cache.save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert json.loads(metadata["settings"])["dtype"] == "float8_e4m3fn"
    assert tensors["features"].dtype == torch.float8_e4m3fn and tensors["scales"].shape == (len(cache),)
    values = tensors["features"].float() * 2.0 ** (tensors["scales"].float() - 127)[:, None]
    assert_equal_bits([values], [cache.features])


def rewrite(path, spoil, dtype=torch.float32):
    """A saved cache with its tensors and metadata changed by ``spoil(tensors, metadata)``."""
    filled(dtype).save(path)
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    metadata = spoil(tensors, metadata) or metadata
    safetensors.torch.save_file(tensors, path, metadata)


def settings_with(**changes):
    def spoil(tensors, metadata):
        return {**metadata, "settings": json.dumps({**json.loads(metadata["settings"]), **changes})}

    return spoil


def of_version_1(**changes):
    return lambda tensors, metadata: {**settings_with(**changes)(tensors, metadata), "version": "1"}


@pytest.mark.parametrize(
    "spoil, message",
    [
        pytest.param(lambda t, m: {**m, "version": "4"}, "version '4' is unknown, it was saved by a newer", id="later"),
        pytest.param(lambda t, m: {**m, "version": "one"}, "version 'one' is unknown", id="no number"),
        pytest.param(lambda t, m: {k: v for k, v in m.items() if k != "version"}, "version None is unknown", id="none"),
        pytest.param(lambda t, m: {"format": "pt"}, "not a saved LatentCache", id="other safetensors"),
        pytest.param(lambda t, m: {**m, "settings": "{"}, "settings", id="broken settings"),
        pytest.param(lambda t, m: {**m, "settings": "[1]"}, "settings", id="settings of another kind"),
        pytest.param(lambda t, m: {k: v for k, v in m.items() if k != "settings"}, "settings", id="no settings"),
        pytest.param(lambda t, m: t.pop("points") is None or None, "missing points", id="no points"),
        pytest.param(lambda t, m: t.pop("features") is None or None, "missing features", id="no features"),
        pytest.param(lambda t, m: t.pop("frame_ids") is None or None, "missing frame_ids", id="no frame_ids"),
        pytest.param(lambda t, m: t.pop("frame_centers") is None or None, "missing frame_centers", id="no centers"),
        pytest.param(lambda t, m: t.update(points=t["points"][:, :3].clone()), "points must be", id="points shape"),
        pytest.param(lambda t, m: t.update(points=t["points"][:5].clone()), r"\w+ must be .*5", id="fewer points"),
        pytest.param(lambda t, m: t.update(points=t["points"].double()), "points must be", id="points dtype"),
        pytest.param(lambda t, m: t.update(points=torch.tensor(1.0)), "points must be", id="points scalar"),
        pytest.param(lambda t, m: t.update(features=t["features"].half()), "features must be", id="features dtype"),
        pytest.param(lambda t, m: t.update(features=t["features"][:, :3].clone()), "features must be", id="channels"),
        pytest.param(lambda t, m: t.update(frame_ids=t["frame_ids"].long()), "frame_ids must be", id="ids dtype"),
        pytest.param(
            lambda t, m: t.update(frame_centers=torch.zeros(2, 4)), "frame_centers must be", id="centers shape"
        ),
        pytest.param(
            lambda t, m: t.update(frame_centers=torch.tensor(0.0)), "frame_centers must be", id="centers scalar"
        ),
        pytest.param(settings_with(channels=5), "must be", id="other channels"),
        pytest.param(settings_with(channels="4"), "channels|features", id="channels no number"),
        pytest.param(settings_with(dtype="float64"), "dtype|features", id="dtype not stored"),
        pytest.param(of_version_1(dtype="float8_e4m3fn"), "one of float32, .* in version 1", id="float8 in 1"),
        pytest.param(of_version_1(write_policy="bounded"), "one of append in version 1", id="bounded in 1"),
        pytest.param(lambda t, m: {**m, "settings": "[" * 100_000}, "settings", id="nested settings"),
        pytest.param(lambda t, m: {**m, "settings": "9" * 5_000}, "settings", id="a long number"),
        pytest.param(settings_with(color="red"), "settings this package does not know", id="unknown setting"),
        pytest.param(settings_with(carve_views=0), "carve_views must be", id="carve_views"),
        pytest.param(settings_with(max_tokens=7), "damaged", id="another setting"),
        pytest.param(lambda t, m: {**m, "near": "NaN"}, "near must be", id="near"),
        pytest.param(lambda t, m: {**m, "near": "null"}, "near must be", id="near alone null"),
        pytest.param(lambda t, m: {**m, "origin": "[0, 1]"}, "origin three coordinates", id="origin"),
        pytest.param(lambda t, m: {**m, "near": "0.5"}, "damaged", id="another near"),
        pytest.param(lambda t, m: {**m, "color": "red"}, "metadata must be among .*, got color", id="other metadata"),
        pytest.param(lambda t, m: t.update(color=torch.ones(3)), "tensors must be among .*, got color", id="other"),
        pytest.param(lambda t, m: t["points"][:1].fill_(math.nan) is None or None, "points must be finite", id="nan"),
        pytest.param(lambda t, m: t["features"][:1].zero_() is None or None, "damaged", id="a feature"),
        pytest.param(
            lambda t, m: t["frame_ids"][:1].fill_(2) is None or None, r"frame_ids must be in \[0, 1\]", id="id"
        ),
        pytest.param(lambda t, m: t.update(frame_poses=torch.ones(3, 4, 4)), "frame_poses must be", id="reserved"),
        pytest.param(settings_with(dtype="nonsense"), "dtype|features", id="no dtype"),
        pytest.param(settings_with(dtype=None), "dtype", id="dtype null"),
        pytest.param(settings_with(capacity=3), "points must fit the saved capacity, 3", id="capacity too small"),
        pytest.param(settings_with(capacity="many"), "capacity", id="capacity no number"),
        pytest.param(settings_with(write_policy="later"), "write_policy", id="unknown policy"),
    ],
)
def test_files_that_are_no_cache(tmp_path, spoil, message):
    path = tmp_path / "room.safetensors"
    rewrite(path, lambda tensors, metadata: None)
    assert len(LatentCache.load(path)) > 20
    rewrite(path, spoil)
    with pytest.raises(ValueError, match=message) as caught:
        LatentCache.load(path)
    assert "room.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t, m: t.pop("scales") is None or None, "must hold points, .*, scales, missing scales"),
        (lambda t, m: t.update(scales=t["scales"][:5].clone()), r"scales must be \(\d+,\) torch.uint8, got \(5,\)"),
        (lambda t, m: t.update(scales=t["scales"].int()), r"scales must be .*uint8, got .*int32"),
        (lambda t, m: t["scales"][-1:].fill_(10) is None or None, r"scales must be in \[11, 246\], got 10 to 1\d\d"),
        (lambda t, m: t["scales"][:1].fill_(247) is None or None, r"scales must be in \[11, 246\], got 1\d\d to 247"),
        (lambda t, m: t.update(features=t["features"].view(torch.uint8)), "features must be .*float8.*, got .*uint8"),
        (settings_with(channels=5), "features must be"),
    ],
)
def test_float8_files_that_are_no_cache(tmp_path, spoil, message):
    path = tmp_path / "room.safetensors"
    rewrite(path, lambda tensors, metadata: None, torch.float8_e4m3fn)
    assert len(LatentCache.load(path)) > 20
    rewrite(path, spoil, torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=message) as caught:
        LatentCache.load(path)
    assert "room.safetensors" in str(caught.value)


def test_a_capacity_that_no_memory_has(tmp_path):
    """Of a file that is whole: nobody can tell before the memory is asked for."""
    path = tmp_path / "room.safetensors"

    def spoil(tensors, metadata):
        metadata = settings_with(capacity=10**15)(tensors, metadata)
        del metadata["sha256"]
        return {**metadata, "sha256": mirage_kernels.cache.storage._digest(tensors, metadata)}

    rewrite(path, spoil)
    with pytest.raises(ValueError, match=r"room\.safetensors: capacity must fit into memory, got 1000000000000000"):
        LatentCache.load(path)


@pytest.mark.parametrize("value", [255, 254])
def test_votes_that_no_cache_has(tmp_path, value):
    path, cache = tmp_path / "room.safetensors", LatentCache(4)
    cache.write(*frames(0))
    cache.buffers.free_space_violations[3] = value
    cache.save(path)
    if value < 255:
        assert len(LatentCache.load(path)) == len(cache)
        return
    with pytest.raises(ValueError, match=r"room\.safetensors: votes must be in \[0, 254\], got 0 to 255"):
        LatentCache.load(path)


def test_reserved_entries_are_checked_and_left_out(tmp_path):
    """What a later release of this version stores: this one reads the tokens without it."""
    path, cache = tmp_path / "room.safetensors", filled()

    def reserve(tensors, metadata):
        frames, tokens = len(tensors["frame_centers"]), len(tensors["points"])
        tensors |= {
            "frame_poses": torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1),
            "frame_intrinsics": torch.eye(3, dtype=torch.float64).repeat(frames, 1, 1),
            "token_flags": torch.ones(tokens, dtype=torch.uint8),
            "phase": torch.ones(tokens, 6),
        }
        metadata = {**metadata, "table": "0" * 64}
        del metadata["sha256"]
        return {**metadata, "sha256": mirage_kernels.cache.storage._digest(tensors, metadata)}

    rewrite(path, reserve)
    again = LatentCache.load(path)
    assert_equal_bits(contents(again), contents(cache))


def test_the_same_cache_saved_twice_is_the_same_file(tmp_path):
    cache = filled()
    for name in ("a", "b"):
        cache.save(tmp_path / name)
    LatentCache.load(tmp_path / "a").save(tmp_path / "c")
    assert len({(tmp_path / name).read_bytes() for name in "abc"}) == 1


@pytest.mark.parametrize("name", [os.fsdecode(b"\xe9.safetensors"), "x" * 252, "a b:#?.safetensors"])
def test_any_name_that_the_system_takes(tmp_path, name):
    path, cache = tmp_path / name, filled()
    cache.save(path)
    cache.save(path)
    assert_equal_bits(contents(LatentCache.load(path)), contents(cache))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "room.safetensors"
    filled().save(path)
    path.chmod(0)
    with pytest.raises(PermissionError, match=r"room\.safetensors"):
        LatentCache.load(path)


def test_a_file_is_opened_once(tmp_path, monkeypatch):
    """So that what another process puts in its place is loaded whole, or not at all."""
    path, other = tmp_path / "room.safetensors", tmp_path / "other.safetensors"
    filled().save(path)
    cache = filled(views=3)
    cache.save(other)
    opened, real = [], Path.open

    def spy(self, *args, **kwargs):
        opened.append(self)
        file = real(self, *args, **kwargs)
        if self == path:
            os.replace(other, path)
        return file

    monkeypatch.setattr(Path, "open", spy)
    loaded = LatentCache.load(path)
    monkeypatch.undo()
    assert opened == [path]
    assert_equal_bits(contents(loaded), contents(filled()))
    assert_equal_bits(contents(LatentCache.load(path)), contents(cache))


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "room.safetensors"
    filled().save(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 61):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << place % 8
        path.write_bytes(spoilt)
        try:
            again = LatentCache.load(path)
        except ValueError as error:
            assert "room.safetensors" in str(error)
        else:  # a blank behind the header
            assert_equal_bits(contents(again), contents(filled()))


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        LatentCache.load(tmp_path / "absent.safetensors")
    with pytest.raises((FileNotFoundError, IsADirectoryError, ValueError), match=tmp_path.name):
        LatentCache.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"x", b"not a safetensors file, but a text", b"\xff" * 64, b"\x00" * 64])
def test_not_a_safetensors_file(tmp_path, content):
    path = tmp_path / "room.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"room\.safetensors: not a whole safetensors file"):
        LatentCache.load(path)


def test_a_pickle_is_not_loaded(tmp_path):
    path = tmp_path / "room.safetensors"
    torch.save({"points": torch.zeros(1, 4)}, path)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        LatentCache.load(path)


def test_files_cut_short_at_any_place(tmp_path):
    path = tmp_path / "room.safetensors"
    filled().save(path)
    whole = path.read_bytes()
    for length in sorted({*range(0, len(whole), 97), 7, 8, 9, len(whole) - 1}):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"room\.safetensors: not a whole safetensors file"):
            LatentCache.load(path)
    path.write_bytes(whole)
    assert len(LatentCache.load(path)) > 20


# ---------------------------------------------------------------------------------------------- crashes


class Crash(BaseException):
    """What no handler expects: like KeyboardInterrupt."""


def crash(*args, **kwargs):
    raise Crash


def write_half(path, tensors, *args, **kwargs):
    with open(path, "wb") as file:
        file.write(b"\x10\x00\x00")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "target, name, fault, kind",
    [
        (os, "replace", crash, Crash),
        (os, "fsync", crash, Crash),
        (mirage_kernels.io, "write_tensors", crash, Crash),
        (mirage_kernels.io, "write_tensors", write_half, OSError),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, target, name, fault, kind, exists):
    path, old, new = tmp_path / "room.safetensors", filled(), filled(views=3)
    if exists:
        old.save(path)
    files = sorted(x.name for x in tmp_path.iterdir())
    monkeypatch.setattr(target, name, fault)
    with pytest.raises(kind):
        new.save(path)
    monkeypatch.undo()
    assert sorted(x.name for x in tmp_path.iterdir()) == files, "no temporary file is left"
    if exists:
        assert_equal_bits(contents(LatentCache.load(path)), contents(old))
    new.save(path)
    assert_equal_bits(contents(LatentCache.load(path)), contents(new))
    assert [x.name for x in tmp_path.iterdir()] == ["room.safetensors"]


def test_a_save_is_whole_before_it_has_the_name(tmp_path, monkeypatch):
    """At the moment of the rename the temporary file, in the same directory, already is a whole cache."""
    cache, path, seen = filled(), tmp_path / "room.safetensors", []
    real = os.replace

    def replace(source, destination):
        assert os.path.dirname(source) == str(tmp_path) and not path.exists()
        seen.append(contents(LatentCache.load(source)))
        real(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    cache.save(path)
    assert_equal_bits(seen[0], contents(cache))
    assert [x.name for x in tmp_path.iterdir()] == ["room.safetensors"]


def test_saved_files_have_ordinary_permissions(tmp_path):
    filled().save(tmp_path / "room.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "room.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_saving_over_the_file_it_was_loaded_from(tmp_path):
    """A loaded cache does not hang on to its file."""
    path = tmp_path / "room.safetensors"
    filled().save(path)
    cache = LatentCache.load(path)
    before = contents(cache)
    cache.write(*frames(18))
    cache.save(path)
    again = contents(LatentCache.load(path))
    assert_equal_bits(again, contents(cache))
    assert_equal_bits([x[: len(before[0])] for x in again[:4]], before[:4])


def test_a_directory_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        filled().save(tmp_path / "absent" / "room.safetensors")


# Going back.


def test_rollback_forgets_what_was_written_since_the_checkpoint(backend):
    rng = np.random.default_rng(5)
    cameras = Cameras(scenes.intrinsics(rng, 2, (32, 48)), scenes.poses(rng, 2), (32, 48), square_pixels=False).to(
        backend.device
    )
    latents = torch.from_numpy(rng.standard_normal((2, 8, 4, 6))).float().to(backend.device)
    depth = torch.full((2, 32, 48), 2.0, device=backend.device)
    cache, never = (append(8, device=backend.device) for _ in range(2))
    cache.write(latents, depth, cameras)
    never.write(latents, depth, cameras)
    mark = cache.checkpoint()
    assert mark[:3] == (48, 2, None)
    cache.write(latents + 1, depth * 2, cameras)  # grows, and moves the buffers
    cache.rollback(mark)
    assert len(cache) == 48 and cache.num_frames == 2 and cache.nbytes == never.nbytes
    seen, expected = cache.read(cameras, (4, 6)), never.read(cameras, (4, 6))
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True)) and seen.mask.any()
    for one in (cache, never):
        one.write(latents * 3, depth, cameras)
    assert torch.equal(cache.features, never.features) and torch.equal(cache.frame_ids, never.frame_ids)
    cache.clear()
    with pytest.raises(
        ValueError, match=r"mark must be of this cache, .* 0 tokens of 0 frames, got one of 48 tokens of 2 frames"
    ):
        cache.rollback(mark)


# ---------------------------------------------------------------------------------------------- bounded writes

BOUNDED = [{}, {"merge": "mean", "views_per_voxel": 1}, {"max_tokens": 40}, {"carve": False, "views_per_voxel": 2}]


def revisit(cache, seeds=(1, 2, 1)):
    return [cache.write(*[x.to(cache.device) for x in frames(seed, unknown=0.1)]) for seed in seeds]


def test_bounded_is_the_default_and_does_not_grow_with_revisit(backend):
    cache = LatentCache(4, device=backend.device)
    assert cache.write_policy == "bounded"
    once = revisit(cache, (1, 2))
    live = len(cache)
    again = [revisit(cache, (1, 2)) for _ in range(4)]
    assert once[0].written > 20 and len(cache) <= 1.1 * live
    for report in once + [one for visit in again for one in visit]:
        counts = report.as_dict()
        assert sum(counts.values()) - counts["carved"] - counts["evicted"] == 70
        assert f"covered={report.covered}" in repr(report)
    assert again[-1][0].replaced > 20
    assert sum(report.written - report.carved for report in (*once, *(one for visit in again for one in visit))) == len(
        cache
    )


@pytest.mark.parametrize("options", BOUNDED)
def test_a_bounded_cache_is_what_the_operators_write(backend, options):
    cache = LatentCache(4, device=backend.device, **options)
    points, features, frame_ids, count = (backend.put(x) for x in scenes.buffers(300, 4))
    violations, centers = (torch.zeros(300, dtype=torch.uint8), torch.zeros(6, 3))
    violations, centers = backend.put(violations), backend.put(centers)
    observations = backend.put(torch.zeros(300, dtype=torch.uint8)) if options.get("merge") == "mean" else None
    chosen = {"views_per_voxel": options.get("views_per_voxel", 4), "carve_views": 2 * options.get("carve", True)}
    for k, seed in enumerate((1, 2, 1)):
        latents, depth, cameras, mask = put(backend, frames(seed, unknown=0.1))
        report = cache.write(latents, depth, cameras, mask)
        centers[2 * k : 2 * k + 2] = cameras.cam2world[:, :3, 3].float()
        buffers = points, features, frame_ids, violations, count, centers
        views = latents, depth, cameras.intrinsics, cameras.cam2world
        counts = bounded_write(*buffers, *views, num_observations=observations, mask=mask, first_frame=2 * k, **chosen)
        most = options.get("max_tokens")
        counts[-1] = cache_compact(
            *(points, features, frame_ids, count),
            free_space_violations=violations,
            num_observations=observations,
            max_tokens=most,
        )
        assert report.counts.tolist() == counts.tolist()
    n = int(count)
    assert_equal_bits(contents(cache)[:4], [points[:n, :3], points[:n, 3], features[:n], frame_ids[:n]])
    assert n == 40 if "max_tokens" in options else n > 20


@pytest.mark.parametrize("dtype", scenes.STORED)
@pytest.mark.parametrize("options", BOUNDED)
def test_bounded_caches_survive_files_and_go_on_alike(tmp_path, options, dtype):
    cache = LatentCache(4, dtype=dtype, **options)
    revisit(cache)
    cache.save(tmp_path / "room.safetensors")
    again = LatentCache.load(tmp_path / "room.safetensors")
    assert again.config == cache.config and (again.merge, again.max_tokens) == (cache.merge, cache.max_tokens)
    assert_equal_bits(contents(again), contents(cache))
    for one in (cache, again):
        revisit(one, (3, 1))
    assert_equal_bits(contents(again), contents(cache))
    assert cache.nbytes == again.nbytes


@pytest.mark.parametrize("options", [*BOUNDED, {"write_policy": "append", "max_tokens": 50}])
def test_rollback_undoes_what_was_changed_in_place(backend, options):
    cache, never = (LatentCache(4, device=backend.device, **options) for _ in range(2))
    for one in (cache, never):
        revisit(one, (1,))
    mark = cache.checkpoint()
    revisit(cache, (2, 1, 3))
    cache.rollback(mark)
    assert_equal_bits(contents(cache), contents(never))
    for one in (cache, never):
        revisit(one, (2, 1))
    assert_equal_bits(contents(cache), contents(never))
    with pytest.raises(ValueError, match="mark must be of this cache"):
        append(4, device=backend.device).rollback(mark)


def test_max_tokens_evicts_the_oldest(backend):
    cache = append(4, device=backend.device, max_tokens=60)
    first, second = revisit(cache, (1, 2))
    assert first.evicted == 0 and second.evicted == first.written + second.written - 60 > 0
    assert len(cache) == 60 and cache.frame_ids.min() > 0
    every = append(4, device=backend.device)
    revisit(every, (1, 2))
    assert_equal_bits(contents(cache)[:4], [x[-60:] for x in contents(every)[:4]])


@pytest.mark.parametrize("dtype", scenes.DTYPES)
def test_files_of_the_first_version_load(tmp_path, dtype):
    """As the first release wrote them: no settings but these four, and tokens that are only appended."""
    cache, path = filled(dtype), tmp_path / "old.safetensors"
    tensors = {
        "points": torch.cat([cache.points, cache.footprints[:, None]], 1),
        "features": cache.features,
        "frame_ids": cache.frame_ids,
        "frame_centers": cache.frame_centers,
    }
    name = str(dtype).removeprefix("torch.")
    settings = {"channels": 4, "dtype": name, "write_policy": "append", "capacity": None}
    metadata = {"format": "mirage-latent-cache", "version": "1", "settings": json.dumps(settings)}
    safetensors.torch.save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata)
    again = LatentCache.load(path)
    assert again.write_policy == "append"
    assert_equal_bits(contents(again), contents(cache))
    for one in (cache, again):
        one.write(*frames(5, dtype=dtype))
    assert_equal_bits(contents(again), contents(cache))

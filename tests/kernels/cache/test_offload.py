"""`LatentCache.offload`: beside a cache that never offloads, nothing tells them apart but where the tokens are."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits

import mirage_kernels.cache.offload
from mirage_kernels import Cameras, LatentCache
from mirage_kernels.cache.offload import FileStore, MemoryStore, may_touch
from mirage_kernels.cache.storage import load_cache
from mirage_kernels.constants import BLOCK_TOKENS
from mirage_kernels.geometry import token_voxels

GRID, IMAGE = (16, 16), (32, 32)
POLICIES = {
    "append": {"write_policy": "append"},
    "append, oldest evicted": {"write_policy": "append", "max_tokens": 3000},
    "bounded": {},
    "mean": {"merge": "mean", "views_per_voxel": 1},
    "oldest evicted": {"max_tokens": 2500},
    "not carved": {"carve": False, "views_per_voxel": 2},
}


def looking(rng, *yaws):
    """Cameras near the origin that look this way and that: a right angle each, of the full circle."""
    cam2world = scenes.poses(rng, len(yaws), angle=0.05)
    for pose, yaw in zip(cam2world, yaws, strict=True):
        turn = torch.eye(4, dtype=torch.float64)
        turn[0, 0] = turn[2, 2] = np.cos(yaw)
        turn[0, 2], turn[2, 0] = np.sin(yaw), -np.sin(yaw)
        pose.copy_(turn @ pose)
    return Cameras(scenes.intrinsics(rng, len(yaws), IMAGE), cam2world, IMAGE, square_pixels=False)


def anywhere(rng, views):
    """Views that follow each other, from any direction on."""
    return looking(rng, *(rng.uniform(0, 2 * np.pi) + 0.2 * np.arange(views)))


def views_of(rng, cameras, dtype=torch.float32, channels=4, grid=GRID):
    """The arguments of a write of these cameras: a room with rough walls, of which some is unknown and some moves."""
    stored = torch.float32 if dtype.itemsize == 1 else dtype
    latents = torch.from_numpy(rng.normal(size=(len(cameras), channels, *grid))).to(stored)
    depth = scenes.depth_maps(rng, len(cameras), IMAGE, 0.02, noise=float(rng.choice([0.05, 2.0])))
    return latents, depth, cameras, scenes.static_masks(rng, len(cameras), IMAGE, 0.01)


def on(device, arguments):
    return [x.to(device) for x in arguments]


def room(seed=0, views=12, device="cpu", **options):
    """Two caches of the same tokens all around, in blocks that are small beside it."""
    pair = [LatentCache(4, device=device, **options) for _ in range(2)]
    rng = np.random.default_rng(seed)
    for yaw in np.linspace(0, 2 * np.pi, views, endpoint=False):
        arguments = on(device, views_of(rng, looking(rng, yaw), options.get("dtype", torch.float32), grid=(32, 32)))
        for cache in pair:
            cache.write(*arguments)
    return pair


def assert_same_contents(cache, twin):
    held, expected = cache.tensors(), twin.tensors()
    assert held.keys() == expected.keys()
    assert_equal_bits(list(held.values()), list(expected.values()))
    assert (len(cache), cache.num_frames, cache.nbytes) == (len(twin), twin.num_frames, twin.nbytes)


def assert_same_read(rng, cache, twin, cameras, size=None):
    size = size or (int(rng.integers(4, 40)), int(rng.integers(4, 40)))
    for splat in ("aligned", "nearest"):
        seen, expected = (one.read(cameras.resized(size), size, splat=splat) for one in (cache, twin))
        assert_equal_bits(seen, expected)
    return expected


def live_together(seed, steps=30, device="cpu", dtype=torch.float32, **options):
    """A cache that is told at random to offload, and its twin, do the same at random; all they say is compared."""
    rng = np.random.default_rng(seed)
    cache, twin = (LatentCache(4, dtype=dtype, device=device, **options) for _ in range(2))
    marks, out_of_it, moved, left = None, 0, 0, 0
    for _ in range(steps):
        cameras = anywhere(rng, int(rng.integers(1, 4)))
        doing = rng.choice(
            ["write"] * 6 + ["read"] * 3 + ["offload"] * 6 + ["overlap", "mark", "back", "back", "onload"]
        )
        before = cache.num_offloaded
        if doing == "write":
            arguments = on(device, views_of(rng, cameras, dtype))
            reports = [one.write(*arguments, min_depth=0.5) for one in (cache, twin)]
            assert reports[0].counts.tolist() == reports[1].counts.tolist()
        elif doing == "read":
            assert_same_read(rng, cache, twin, cameras)
        elif doing == "overlap":
            scores = [one.view_overlap(cameras, anywhere(np.random.default_rng(1), 2), GRID) for one in (cache, twin)]
            assert_equal_bits(scores[:1], scores[1:])
        elif doing == "mark":
            marks = cache.checkpoint(), twin.checkpoint()
        elif doing == "back" and marks is not None:
            cache.rollback(marks[0])
            twin.rollback(marks[1])
            marks = None
            assert_same_contents(cache, twin)
        elif doing == "onload":
            cache.onload()
            assert cache.num_offloaded == 0
        elif doing == "offload":
            cache.offload(cameras if rng.random() < 0.8 else cameras[0:0])
            out_of_it += cache.num_offloaded
        moved += before > cache.num_offloaded > 0
        left += cache.num_offloaded > 0 and doing in ("write", "read", "overlap", "back")
        assert (len(cache), cache.num_frames) == (len(twin), twin.num_frames)
        assert cache.num_offloaded == 0 or cache.nbytes_offloaded * len(cache) == cache.num_offloaded * sum(
            x.nbytes for name, x in twin.tensors().items() if name != "frame_centers"
        )
    assert_same_contents(cache, twin)
    assert_same_read(rng, cache, twin, looking(rng, *np.linspace(0, 2 * np.pi, 8)))
    assert_equal_bits([cache.points, cache.features, cache.frame_ids], [twin.points, twin.features, twin.frame_ids])
    assert cache.num_offloaded == 0
    return out_of_it, moved, left


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_tells_it_from_a_cache_that_never_offloads(policy):
    together = np.sum([live_together(seed, **POLICIES[policy]) for seed in range(4)], axis=0)
    assert (together > (4000, 2, 6)).all(), together  # offloaded, brought back in part, used while some were away


@pytest.mark.parametrize("policy", ["append", "mean"])
@pytest.mark.parametrize("dtype", scenes.STORED[1:])
def test_of_every_dtype(policy, dtype):
    together = np.sum([live_together(10 + seed, dtype=dtype, **POLICIES[policy]) for seed in range(2)], axis=0)
    assert together[0] > 1000


@pytest.mark.parametrize("policy", ["append", "bounded", "oldest evicted"])
def test_of_a_fixed_capacity(policy):
    for seed in range(2):
        assert live_together(20 + seed, capacity=2700, **POLICIES[policy])[0] > 0


def test_on_every_backend(backend):
    steps = 30 if backend.name == "cpu" else 12
    assert live_together(31, steps, device=backend.device)[0] > 0


@pytest.mark.parametrize("policy", ["append", "bounded"])
def test_of_tokens_in_memory(monkeypatch, policy):
    """As beside a GPU, where the memory is pinned."""
    monkeypatch.setattr(
        mirage_kernels.cache.offload, "make_store", lambda nbytes, device: MemoryStore(nbytes, pinned=False)
    )
    monkeypatch.setattr(mirage_kernels.cache.offload, "_SLAB", 4)
    assert live_together(40, **POLICIES[policy])[0] > 0


# ------------------------------------------------------------------------------------------ what is far, and what moves


def test_what_the_cameras_ahead_see_is_there_and_the_rest_is_not():
    cache, twin = room(views_per_voxel=64)
    rng = np.random.default_rng(1)
    version, allocated = cache.buffer_version, cache.nbytes_allocated
    ahead = looking(rng, 0.1, 0.3)
    cache.offload(ahead)
    assert len(cache) // 3 < cache.num_offloaded < len(cache) and cache.num_offloaded % BLOCK_TOKENS == 0
    assert cache.buffer_version == version + 1
    for size in ((32, 32), (40, 72)):
        assert assert_same_read(rng, cache, twin, ahead, size).mask.float().mean() > 0.3
    arguments = views_of(rng, ahead, grid=(32, 32))
    reports = [one.write(*arguments) for one in (cache, twin)]
    assert reports[0].counts.tolist() == reports[1].counts.tolist() and reports[0].written > 0
    cache.offload(ahead)
    there = cache.buffer_version
    for one in (cache, twin):
        one.read(ahead, (32, 32))
    assert cache.buffer_version == there
    assert cache.nbytes_allocated < 0.75 * allocated
    cache.offload(looking(rng, 0.1 + np.pi, 0.3 + np.pi))  # what was there goes, what was not comes
    assert len(cache) // 3 < cache.num_offloaded < len(cache)
    assert_same_contents(cache, twin)


def test_reads_bring_back_no_more_than_they_may_see():
    cache, twin = room(write_policy="append")
    cache.offload(looking(np.random.default_rng(2))[0:0])
    away = cache.num_offloaded
    assert away == len(cache) // BLOCK_TOKENS * BLOCK_TOKENS
    for yaw in (0.0, np.pi):
        assert_same_read(np.random.default_rng(3), cache, twin, looking(np.random.default_rng(2), yaw), GRID)
        assert 0 < cache.num_offloaded < away
        away = cache.num_offloaded


@pytest.mark.parametrize("policy", ["append", "bounded"])
def test_an_overlap_counts_what_is_offloaded_and_leaves_it_there(policy):
    cache, twin = room(**POLICIES[policy])
    for seed in range(4):
        rng = np.random.default_rng(seed)
        cache.offload(looking(rng, 2.0)[seed % 2 :])
        earlier, targets = looking(rng, *rng.uniform(0, 2 * np.pi, 6)), looking(rng, *rng.uniform(0, 2 * np.pi, 2))
        away = cache.num_offloaded
        scores, expected = (one.view_overlap(earlier, targets, GRID) for one in (cache, twin))
        assert_equal_bits([scores], [expected])
        assert 0 < expected.max() and expected.unique().numel() > 1 and cache.num_offloaded == away > 0


def test_appending_brings_back_nothing():
    cache, twin = room(write_policy="append")
    rng = np.random.default_rng(4)
    cache.offload(looking(rng)[0:0])
    away, arguments = cache.num_offloaded, views_of(rng, anywhere(rng, 3))
    for one in (cache, twin):
        one.write(*arguments)
    assert cache.num_offloaded == away
    assert_same_contents(cache, twin)


@pytest.mark.parametrize("seed", range(20))
def test_no_box_that_holds_what_a_view_needs_is_missed(seed):
    """Points that project into a grid or two cells around it; points that share a voxel with a token of the grid."""
    rng = np.random.default_rng(seed)
    size = tuple(int(side) for side in rng.integers(3, 60, 2))
    cameras = Cameras(scenes.intrinsics(rng, 1, size), scenes.poses(rng, 1, angle=3), size, square_pixels=False)
    k, pose = cameras.intrinsics[0], cameras.cam2world[0]
    pose[:3, 3] *= float(10.0 ** rng.uniform(-3, 3))
    number = 20_000

    def lifted(margin):
        u, v = (torch.from_numpy(rng.uniform(-margin, side + margin, number)) for side in size[::-1])
        z = torch.from_numpy(10.0 ** rng.uniform(-1, 3, number))
        at = torch.stack([(u - k[0, 2]) / k[0, 0] * z, (v - k[1, 2]) / k[1, 1] * z, z], -1)
        return at @ pose[:3, :3].T + pose[:3, 3], z / k[0, 0]

    def touched(points):
        return may_touch(points.float().repeat(1, 2), cameras.intrinsics, cameras.cam2world, size)

    assert touched(lifted(2.0)[0]).all()
    points, footprint = lifted(0.0)
    rows = torch.cat([points, footprint[:, None]], 1).float()
    edge = torch.exp2(torch.round(torch.log2(rows[:, 3:].double())))
    mates = (torch.floor(rows[:, :3].double() / edge) + torch.from_numpy(rng.random((number, 3)))) * edge
    mates = torch.cat([mates, footprint[:, None]], 1).float()
    shared = token_voxels(mates) == token_voxels(rows)
    shared &= rows[:, :3].abs().amax(1) < 1e5 * rows[:, 3]
    assert shared.float().mean() > 0.8 and touched(mates[shared, :3]).all()


def test_what_lies_behind_or_beside_is_not_touched():
    rng = np.random.default_rng(5)
    cameras = looking(rng, 0.0).resized((32, 32))

    def touched(x, z, size=0.2):
        box = torch.tensor([[x, -size, z, x + size, size, z + size]])
        return bool(may_touch(box, cameras.intrinsics, cameras.cam2world, (32, 32)))

    assert touched(0, 5) and touched(0, 500) and touched(-50, -50, 100)
    assert not touched(0, -5) and not touched(20, 5) and not touched(-20, 5)
    assert may_touch(torch.full((1, 6), torch.nan), cameras.intrinsics, cameras.cam2world, (32, 32)).all()


def test_blocks_at_the_border_of_all_voxels_stay():
    """There voxels hold all that lies beyond, so that a write anywhere may depend on them."""
    cache = LatentCache(4, origin=(0.0, 0.0, 0.0))
    rng = np.random.default_rng(6)
    cameras = looking(rng, 0.0, 0.5)
    far = cameras.cam2world.clone()
    far[:, 0, 3] += 1e5
    cache.write(*views_of(rng, Cameras(cameras.intrinsics, far, IMAGE, square_pixels=False)))
    cache.offload(cameras[0:0])
    assert len(cache) > BLOCK_TOKENS and cache.num_offloaded == 0


# ------------------------------------------------------------------------------------------ what else becomes of it


@pytest.mark.parametrize("policy", ["append", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_files_and_copies_hold_everything(tmp_path, policy, dtype):
    cache, twin = room(dtype=dtype, **POLICIES[policy])
    rng = np.random.default_rng(7)
    cache.offload(looking(rng, 0.0))
    away = cache.num_offloaded
    assert away > 0
    cache.save(tmp_path / "one.safetensors")
    twin.save(tmp_path / "other.safetensors")
    assert cache.num_offloaded == away
    saved, expected = (load_cache(tmp_path / f"{name}.safetensors") for name in ("one", "other"))
    assert saved[:3] == expected[:3] and saved.tensors.keys() == expected.tensors.keys()
    assert_equal_bits(list(saved.tensors.values()), list(expected.tensors.values()))
    again = LatentCache.load(tmp_path / "one.safetensors")
    assert again.num_offloaded == 0
    assert_same_contents(
        LatentCache.from_tensors(cache.tensors(), **{**cache.config, "dtype": cache.dtype}), twin
    )  # what `to` another device does
    assert cache.to("cpu") is cache and cache.num_offloaded == away
    for duplicate in (copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        copied = duplicate(cache)
        assert cache.num_offloaded == away and copied.num_offloaded == 0
        assert_same_contents(copied, twin)
        copied.clear()
    mark = cache.checkpoint()
    if policy != "append":
        with pytest.raises(TypeError, match=r"call onload\(\) before"):
            pickle.dumps(mark)
    arguments = views_of(rng, looking(rng, 0.0, 3.0), dtype)
    for one in (cache, twin, again):
        one.offload(looking(rng, 1.0))
        one.write(*arguments)
    assert_same_contents(cache, twin)
    assert_same_contents(again, twin)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", [None, 4000])
def test_rollback_over_moves(policy, capacity):
    """Offloaded before the mark or after it, written to in between, gone back twice."""
    for seed in range(2):
        cache, twin = room(seed, 8, capacity=capacity, **POLICIES[policy])
        rng = np.random.default_rng(seed)
        if seed:
            cache.offload(looking(rng, 1.0))
        mark, away = cache.checkpoint(), cache.num_offloaded
        for yaw in (1.0, 4.0):
            cache.offload(looking(rng, yaw))
            cache.write(*views_of(rng, looking(rng, yaw, yaw + 0.5)))
            cache.offload(looking(rng, yaw + 2)[seed:])
            cache.rollback(mark)
            if mark.held is not None:
                assert cache.num_offloaded == away
            assert_same_read(rng, cache, twin, looking(rng, yaw), GRID)
            assert capacity is None or cache.capacity == capacity
        assert_same_contents(cache, twin)


def test_rollback_to_more_than_is_left_of_the_buffers():
    """What carving took away is in the mark, and offloading shrinks the buffers to what is left."""
    cache, twin = room(9, carve_views=1)
    mark = cache.checkpoint()
    rng = np.random.default_rng(9)
    for yaw in (0.0, 1.0, 2.0):
        latents, depth, cameras, mask = views_of(rng, looking(rng, yaw))
        cache.write(latents[:, :, :2, :2], depth * 4, cameras, mask)
    cache.offload(looking(rng)[0:0])
    assert cache.capacity < len(twin)
    cache.rollback(mark)
    assert_same_contents(cache, twin)


@pytest.mark.parametrize("capacity", [None, 4000])
def test_clear(capacity):
    cache, twin = room(capacity=capacity)
    cache.offload(looking(np.random.default_rng(0))[0:0])
    for one in (cache, twin):
        one.clear()
    assert len(cache) == cache.num_offloaded == cache.nbytes_offloaded == 0
    assert capacity is None or cache.capacity == capacity
    rng = np.random.default_rng(8)
    arguments = views_of(rng, anywhere(rng, 3))
    for one in (cache, twin):
        one.write(*arguments)
    assert_same_contents(cache, twin)


def test_what_it_says_of_itself():
    cache, twin = room(dtype=torch.bfloat16)
    assert "offloaded" not in repr(cache)
    rng = np.random.default_rng(0)
    cache.offload(looking(rng, 0.0))
    per_token = 16 + 2 * 4 + 4 + 1
    assert cache.nbytes_offloaded == per_token * cache.num_offloaded > 0
    assert len(cache) == len(twin) and cache.nbytes == twin.nbytes and cache.capacity >= len(cache)
    assert f"{cache.nbytes_offloaded / 2**20:.1f} MiB of them offloaded" in repr(cache)
    cache.onload()
    assert repr(cache) == repr(twin)


def test_few_tokens_none_and_no_views():
    cache = LatentCache(4)
    rng = np.random.default_rng(0)
    cache.offload(anywhere(rng, 2))
    cache.write(*views_of(rng, anywhere(rng, 1)))
    version = cache.buffer_version
    cache.offload(looking(rng)[0:0])
    cache.onload()
    assert 0 < len(cache) <= BLOCK_TOKENS and cache.num_offloaded == 0 and cache.buffer_version == version


# ------------------------------------------------------------------------------------------ memory, files, errors


def open_files():
    return [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if _is_open(number)]


def _is_open(number):
    return os.path.lexists(f"/proc/self/fd/{number}")


def resident_bytes():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")


def offload_and_measure():
    cache = LatentCache(1024, write_policy="append")
    rng = np.random.default_rng(0)
    cameras = looking(rng, *np.linspace(0, 6, 60))
    cache.write(torch.ones(60, 1024, *GRID), torch.full((60, *IMAGE), 2.0), cameras)
    gc.collect()
    held, before = cache.nbytes, resident_bytes()
    assert held > 60 * 2**20
    cache.offload(cameras[0:0])
    assert cache.nbytes_allocated < 2**20 and cache.nbytes == held
    given_back = before - resident_bytes()
    cache.read(cameras[:1], GRID)
    assert 0 < cache.num_offloaded < len(cache) and cache.nbytes_allocated < 0.75 * held
    return given_back, held


@pytest.mark.slow
@linux
def test_memory_is_given_back():
    # In a process of its own: where earlier tests left malloc a free chunk that large, the buffers are cut from it, and
    # what they give back stays with malloc.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        given_back, held = process.submit(offload_and_measure).result()
    assert given_back > 0.9 * held


@pytest.mark.slow
@linux
@pytest.mark.parametrize("end", ["dies", "onload", "clear"])
def test_the_file_goes_with_the_cache(monkeypatch, tmp_path, end):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache, _ = room()
    rng = np.random.default_rng(0)

    def files():
        return [name for name in open_files() if name.startswith(str(tmp_path))]

    cache.offload(looking(rng)[0:0])
    assert len(files()) == 1 and list(tmp_path.iterdir()) == []  # it is there, and has no name
    cache.read(looking(rng, 1.0), GRID)
    assert cache.num_offloaded > 0 and {"deleted" in name for name in files()} == {True}
    if end == "dies":
        del cache
    elif end == "onload":
        cache.onload()
    else:
        cache.clear()
    gc.collect()
    assert files() == [] and list(tmp_path.iterdir()) == []


def test_room_on_disk_is_used_again():
    cache, twin = room()
    rng = np.random.default_rng(0)
    cache.offload(looking(rng, 0.0))
    slots = []
    for yaw in np.linspace(0, 12 * np.pi, 40):
        cache.offload(looking(rng, yaw))
        slots.append(cache._offloaded.store._slots)
    assert slots[-1] <= 3 * len(cache) // BLOCK_TOKENS
    assert_same_contents(cache, twin)


def test_a_full_disk_leaves_the_cache_as_it_was():
    resource = pytest.importorskip("resource")
    cache, twin = room()
    rng = np.random.default_rng(0)
    version, allocated = cache.buffer_version, cache.nbytes_allocated
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def refused(cameras, limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="too large"):
                cache.offload(cameras)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    refused(looking(rng, 0.0), 20_000)  # the first run fits, the third does not
    assert (cache.buffer_version, cache.nbytes_allocated, cache.num_offloaded) == (version, allocated, 0)
    assert_same_contents(cache, twin)
    cache.offload(looking(rng, 0.0))
    some = cache.num_offloaded
    assert some > 0
    refused(looking(rng)[0:0], some * 33 + 10_000)
    assert cache.num_offloaded == some and cache.buffer_version == version + 1
    assert_same_contents(cache, twin)
    cache.offload(looking(rng)[0:0])
    assert cache.num_offloaded > some
    assert_same_contents(cache, twin)


def test_memory_that_runs_out_leaves_the_cache_as_it_was(monkeypatch):
    cache, twin = room()
    rng = np.random.default_rng(0)
    cache.offload(looking(rng, 0.0))
    away, version = cache.num_offloaded, cache.buffer_version

    def fails(*_args, **_options):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(cache.buffers, "allocate", fails)
        for move in (
            cache.onload,
            lambda: cache.offload(looking(rng, 3.0)),
            lambda: cache.read(looking(rng, 3.0), GRID),
        ):
            with pytest.raises(RuntimeError, match="out of memory"):
                move()
    assert (cache.num_offloaded, cache.buffer_version) == (away, version)
    assert_same_contents(cache, twin)
    cache.offload(looking(rng, 3.0))
    assert_same_contents(cache, twin)


def test_a_directory_that_cannot_be_written_to(monkeypatch, tmp_path):
    cache, twin = room(views=4)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="absent"):
        cache.offload(looking(np.random.default_rng(0))[0:0])
    assert cache.num_offloaded == 0
    assert_same_contents(cache, twin)


@pytest.mark.parametrize("bad", [None, torch.eye(4), "ahead"])
def test_bad_cameras_are_named_before_anything_moves(bad):
    cache, twin = room(views=4)
    version = cache.buffer_version
    with pytest.raises(TypeError, match=r"cameras_ahead must be mirage_kernels\.Cameras, got (NoneType|Tensor|str)"):
        cache.offload(bad)
    assert cache.buffer_version == version and cache.num_offloaded == 0
    assert_same_contents(cache, twin)


def test_a_refused_write_or_read_moves_nothing():
    cache, _ = room()
    rng = np.random.default_rng(0)
    cache.offload(looking(rng, 0.0))
    away, (latents, depth, cameras, mask) = cache.num_offloaded, views_of(rng, looking(rng, 3.0))
    with pytest.raises(ValueError, match="latents must be"):
        cache.write(latents[:, :3], depth, cameras, mask)
    with pytest.raises(ValueError, match="size"):
        cache.read(cameras, (0, 4))
    assert cache.num_offloaded == away


@pytest.mark.parametrize("store", [FileStore(64), MemoryStore(64, pinned=False)])
def test_slots(store):
    """Parts come back one after the other; a slot that is free is taken again; others keep what they hold."""
    rng = np.random.default_rng(0)
    held = {}
    for step in range(300):
        if held and rng.random() < 0.4:
            slot = list(held)[int(rng.integers(len(held)))]
            del held[slot]
            store.free(slot)
        parts = [torch.from_numpy(rng.integers(0, 256, int(n), dtype=np.uint8)) for n in rng.integers(0, 22, 3)]
        slot = store.put(parts)
        assert slot not in held
        held[slot] = torch.cat(parts)
        if step % 10 == 0:
            assert all(torch.equal(store.get(k)[: len(kept)], kept) for k, kept in held.items())
    assert max(held) < 300


@pytest.mark.cuda
def test_a_capture_is_refused_while_tokens_are_offloaded():
    cache, _ = room(device="cuda")
    ahead = looking(np.random.default_rng(0), 0.0).to("cuda")
    cache.read(ahead, GRID)
    cache.offload(ahead)
    assert cache.num_offloaded > 0
    with pytest.raises(RuntimeError, match=r"call onload\(\) first"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        cache.read(ahead, GRID)
    cache.onload()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        cache.read(ahead, GRID)


@pytest.mark.cuda
def test_from_a_gpu_to_the_host():
    cache, twin = room(device="cuda")
    cache.offload(looking(np.random.default_rng(0), 0.0))
    assert cache.num_offloaded > 0
    assert_same_contents(cache.to("cpu"), twin.to("cpu"))
    assert cache.num_offloaded > 0

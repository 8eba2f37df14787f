"""Reads of the tokens of some frames, which tokens a view shows, and tokens that come from no depth map."""

from __future__ import annotations

import math

import brute_force
import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits

from mirage_kernels import Cameras, LatentCache
from mirage_kernels.constants import NEAR
from mirage_kernels.geometry import token_voxels

GRID, IMAGE = (5, 7), (25, 35)
KINDS = {
    "append": dict(write_policy="append"),
    "bounded": {},
    "mean": dict(merge="mean", views_per_voxel=1),
    "float8": dict(dtype=torch.float8_e4m3fn),
}


def views(seed: int, number: int = 2, turn: float = 1.0) -> Cameras:
    rng = np.random.default_rng(seed)
    return Cameras(scenes.intrinsics(rng, number, IMAGE), scenes.poses(rng, number), IMAGE, square_pixels=False)


def frames(seed: int, number: int = 2):
    rng = np.random.default_rng(seed + 100)
    latents = torch.from_numpy(rng.normal(size=(number, 4, *GRID))).float()
    return latents, scenes.depth_maps(rng, number, IMAGE, 0.1), views(seed, number)


def filled(backend=None, kind="append", writes=3, **options) -> LatentCache:
    device = "cpu" if backend is None else backend.device
    cache = LatentCache(4, device=device, **KINDS[kind], **options)
    for seed in range(writes):
        latents, depth, cameras = frames(seed)
        if cache.dtype.itemsize == 1:
            latents = latents.bfloat16()
        cache.write(latents.to(device), depth.to(device), cameras)
    assert len(cache) > 60 and cache.num_frames == 2 * writes
    return cache


def only(cache: LatentCache, chosen: list[int]) -> tuple[LatentCache, torch.Tensor]:
    """A cache of its own that holds the tokens of some frames, and which rows of the other these are."""
    rows = torch.isin(cache.frame_ids, torch.tensor(chosen, device=cache.device)).nonzero()[:, 0]
    tokens = {
        name: tensor if name == "frame_centers" else tensor[rows.cpu()]
        for name, tensor in cache.tensors(torch.device("cpu")).items()
    }
    return LatentCache.from_tensors(tokens, cache.device, **{**cache.config, "dtype": cache.dtype}), rows


def assert_reads_as(readout, other, rows):
    """Bit for bit what another cache shows, whose tokens are these rows."""
    assert_equal_bits(readout[:3], other[:3])
    if len(rows):
        other = other._replace(index=torch.where(other.index < 0, -1, rows[other.index.clamp(min=0)]))
    assert torch.equal(readout.index, other.index)


@pytest.mark.parametrize("splat", ["aligned", "nearest"])
@pytest.mark.parametrize("kind", KINDS)
def test_per_frame_is_a_cache_that_holds_that_frame_only(backend, kind, splat):
    cache, cameras = filled(backend, kind), views(1, 3)
    readout = cache.read(cameras, GRID, splat=splat, per_frame=True)
    assert readout.latents.shape == (6, 3, 4, *GRID) and readout.mask.shape == readout.index.shape == (6, 3, *GRID)
    assert readout.mask.flatten(1).any(1).sum() >= 4
    for frame in range(6):
        other, rows = only(cache, [frame])
        assert_reads_as(type(readout)._make(x[frame] for x in readout), other.read(cameras, GRID, splat=splat), rows)


@pytest.mark.parametrize("splat", ["aligned", "nearest"])
@pytest.mark.parametrize("kind", ["append", "bounded"])
def test_some_frames(backend, kind, splat):
    cache, cameras = filled(backend, kind), views(2)
    for chosen in ([1, 4], [5], [], list(range(6))):
        other, rows = only(cache, chosen)
        readout = cache.read(cameras, GRID, splat=splat, frames=chosen)
        assert readout.mask.any() == (len(chosen) > 0)
        assert_reads_as(readout, other.read(cameras, GRID, splat=splat), rows)
    assert_equal_bits(readout, cache.read(cameras, GRID, splat=splat))
    apart = cache.read(cameras, GRID, splat=splat, frames=torch.tensor([4, 1]), per_frame=True)
    every = cache.read(cameras, GRID, splat=splat, per_frame=True)
    assert_equal_bits(apart, [x[[4, 1]] for x in every])


def test_no_frames():
    empty, cameras = LatentCache(4), views(0, 3)
    readout = empty.read(cameras, GRID, per_frame=True)
    assert readout.latents.shape == (0, 3, 4, *GRID) and readout.index.shape == (0, 3, *GRID)
    assert not empty.read(cameras, GRID, frames=[]).mask.any()
    for frames_, kind, message in (
        ([6], ValueError, r"frames must be numbers of the 6 views written, from 0 on, got 6"),
        ([-1], ValueError, r"frames must be numbers of the 6 views .*got -1"),
        ([0.5], TypeError, r"frames must be ints, numbers of written views, got \[0\.5\]"),
        (3, TypeError, r"frames must be ints"),
    ):
        with pytest.raises(kind, match=message):
            filled().read(cameras, GRID, frames=frames_)


def test_frames_offloaded():
    """What is off the device comes back as for any read; rows are those of all tokens."""
    cache, cameras = filled(writes=30), views(2)
    expected = cache.read(cameras, GRID, per_frame=True)
    assert expected.mask.any()
    cache.offload(cameras[:0])
    assert cache.num_offloaded > 0
    assert_equal_bits(cache.read(cameras, GRID, per_frame=True), expected)


# ---------------------------------------------------------------------------------------------- visible


def seen_by_brute_force(cache: LatentCache, cameras: Cameras, tolerance: float) -> list[list[bool]]:
    """Which tokens lie in a cell, within the tolerance of its nearest; without one the nearest, the first of equals."""
    grid, found = cameras.resized(GRID), []
    for k, pose in zip(grid.intrinsics.numpy(), grid.cam2world.numpy(), strict=True):
        at = [brute_force.project(np.array(point), k, pose) for point in cache.points.tolist()]
        cells: dict[tuple[int, int], list[int]] = {}
        for i, p in enumerate(at):
            if brute_force.inside(p, GRID, NEAR):
                cells.setdefault((math.floor(p.v), math.floor(p.u)), []).append(i)
        seen = [False] * len(at)
        for tokens in cells.values():
            first = min(tokens, key=lambda i: (at[i].z, i))
            for i in tokens:
                seen[i] = i == first or (tolerance > 0 and at[i].z <= (1 + tolerance) * at[first].z)
        found.append(seen)
    return found


@pytest.mark.parametrize("tolerance", [0.0, 0.02, 10.0])
def test_visible_by_brute_force(backend, tolerance):
    cache, cameras = filled(backend, "bounded"), views(3, 3)
    seen = cache.visible(cameras, GRID, depth_tolerance=tolerance)
    assert seen.shape == (3, len(cache)) and seen.dtype == torch.bool and seen.device == cache.device
    assert seen.tolist() == seen_by_brute_force(cache.to("cpu"), cameras, tolerance)
    assert 10 < int(seen.sum()) < seen.numel()


def test_visible_offloaded():
    cache, cameras = filled(writes=30), views(2)
    expected = [cache.visible(cameras, GRID, depth_tolerance=tolerance) for tolerance in (0.0, 0.1)]
    assert expected[0].sum() < expected[1].sum()
    cache.offload(cameras[:0])
    for tolerance, seen in zip((0.0, 0.1), expected, strict=True):
        assert torch.equal(cache.visible(cameras, GRID, depth_tolerance=tolerance), seen)


def test_visible_to_no_camera_and_of_no_token():
    cameras = views(0, 3)
    assert LatentCache(4).visible(cameras, GRID, depth_tolerance=0.1).shape == (3, 0)
    assert filled().visible(cameras[:0], GRID).shape[0] == 0
    with pytest.raises(ValueError, match=r"depth_tolerance must be a finite part >= 0 of the depth, got -1"):
        LatentCache(4).visible(cameras, GRID, depth_tolerance=-1)


# ---------------------------------------------------------------------------------------------- positions only


@pytest.mark.parametrize("kind", KINDS)
def test_without_channels(backend, kind, tmp_path):
    """The tokens, and what views show of them, of a cache that holds latents too."""
    full, bare = (LatentCache(channels, device=backend.device, **KINDS[kind], max_tokens=100) for channels in (4, 0))
    for seed in range(3):
        latents, depth, cameras = frames(seed)
        latents, depth = latents.bfloat16().to(full.device), depth.to(full.device)
        reports = full.write(latents, depth, cameras), bare.write(latents[:, :0], depth, cameras)
        assert reports[0].as_dict() == reports[1].as_dict()
    assert bare.features.shape == (100, 0)
    bare.save(tmp_path / "bare.safetensors")
    again = LatentCache.load(tmp_path / "bare.safetensors", device=full.device)
    for splat in ("aligned", "nearest"):
        expected = full.read(views(4), GRID, splat=splat)
        assert expected.mask.any()
        for cache in (bare, again):
            readout = cache.read(views(4), GRID, splat=splat)
            assert readout.latents.shape == (2, 0, *GRID)
            assert_equal_bits(readout[1:], expected[1:])


# ---------------------------------------------------------------------------------------------- points


def cloud(count: int = 60, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 3, generator=random) + torch.tensor([-0.5, -0.5, 2.0])
    return points, torch.randn(count, 4, generator=random), 0.05 + 0.1 * torch.rand(count, generator=random)


@pytest.mark.parametrize("kind", KINDS)
def test_points_are_written_and_read(backend, kind):
    """Each has its own place: all are kept, in their order, and read as operators read them."""
    cache = LatentCache(4, device=backend.device, **KINDS[kind])
    points, features, footprint = cloud()
    points[:, 0] += torch.arange(60)  # no two in one voxel
    report = cache.write_points(points.to(cache.device), features.numpy(), footprint=footprint.tolist()[0])
    assert report.as_dict() == dict.fromkeys(report.as_dict(), 0) | {"written": 60}
    assert torch.equal(cache.points.cpu(), points) and torch.equal(cache.footprints.cpu(), footprint[:1].expand(60))
    stored = 0.07 if kind == "float8" else 0.0
    torch.testing.assert_close(cache.features.cpu(), features, rtol=stored, atol=0)
    assert cache.frame_ids.unique().tolist() == [0] and cache.num_frames == 1
    assert cache.frame_centers.isnan().all()
    # A camera on each of them: it is seen, by both ways to read.
    poses = torch.eye(4).repeat(60, 1, 1)
    poses[:, :3, 3] = points - torch.tensor([0.0, 0.0, 1.0])
    cameras = Cameras(torch.tensor([[9.0, 0, 0.5], [0, 9.0, 0.5], [0, 0, 1.0]]), poses, (1, 1))
    for splat in ("aligned", "nearest"):
        assert cache.read(cameras, (1, 1), splat=splat).index.flatten().tolist() == list(range(60))


def test_points_of_a_written_frame():
    cache = filled()
    tokens, latents, depth, cameras = len(cache), *frames(7)
    cache.write_points(*cloud()[:2], footprint=cloud()[2], frame=3)
    assert cache.num_frames == 6 and cache.frame_ids[tokens:].tolist() == [3] * 60
    cache.write_points(*cloud()[:2], footprint=0.1, center=[1.0, 2.0, 3.0])
    assert cache.num_frames == 7 and cache.frame_centers[6].tolist() == [1, 2, 3]
    cache.write(latents, depth, cameras)
    assert cache.num_frames == 9 and cache.frame_ids.max() == 8


@pytest.mark.parametrize("most", [1, 3])
def test_a_bounded_cache_keeps_what_voxels_hold(backend, most):
    cache, kept = LatentCache(4, device=backend.device, views_per_voxel=most), []
    held: dict[int, int] = {}
    for seed in range(3):
        points, features, _ = cloud(200, seed)
        features[::50] = torch.nan
        report = cache.write_points(points.to(cache.device), features.to(cache.device), footprint=0.15)
        rows = torch.cat([points, torch.full((200, 1), 0.15)], 1)
        before = len(kept)
        for voxel, row, feature in zip(token_voxels(rows).tolist(), rows.tolist(), features.tolist(), strict=True):
            if not math.isnan(feature[0]) and held.get(voxel, 0) < most:
                held[voxel] = held.get(voxel, 0) + 1
                kept.append(row)
        assert report.non_finite == 4 and report.written == len(kept) - before
        assert report.refused == 196 - report.written
    assert 196 < len(kept) + report.refused and report.refused > 0 and len(kept) > 100
    assert torch.equal(torch.cat([cache.points, cache.footprints[:, None]], 1).cpu(), torch.tensor(kept))


def test_points_beyond_a_capacity_or_a_number():
    cache = LatentCache(4, capacity=50, write_policy="append")
    report = cache.write_points(*cloud()[:2], footprint=0.1)
    assert (report.written, report.refused) == (50, 10) and torch.equal(cache.points, cloud()[0][:50])
    assert cache.write_points(*cloud()[:2], footprint=0.1).refused == 60 and cache.num_frames == 2
    cache = LatentCache(4, max_tokens=40, write_policy="append")
    report = cache.write_points(*cloud()[:2], footprint=0.1)
    assert report.evicted == 20 and torch.equal(cache.points, cloud()[0][20:])


def test_points_while_others_are_offloaded():
    one, other = (filled(kind=kind, writes=30) for kind in ("append", "append"))
    other.offload(views(0)[:0])
    assert other.num_offloaded > 0
    for cache in (one, other):
        cache.write_points(*cloud()[:2], footprint=0.1)
    assert_equal_bits(list(other.tensors().values()), list(one.tensors().values()))


REFUSED = {
    "points": (dict(points=torch.rand(60, 4)), ValueError, r"points must be \(N, 3\) float, got \(60, 4\) float32"),
    "int points": (
        dict(points=torch.ones(60, 3).int()),
        TypeError,
        r"points must be \(N, 3\) float, got \(60, 3\) int32",
    ),
    "features": (dict(features=torch.rand(60, 5)), ValueError, r"features must be \(N, 4\) float, got \(60, 5\)"),
    "rows": (dict(features=torch.rand(59, 4)), ValueError, r"features must be \(60, 4\) like points, got \(59, 4\)"),
    "zero": (dict(footprint=0.0), ValueError, r"footprint must be a length > 0 in world units.*got 0\.0"),
    "one zero": (dict(footprint=torch.arange(60.0)), ValueError, r"footprint must be .*got \(60,\) from 0 to 59"),
    "footprints": (dict(footprint=torch.ones(59)), ValueError, r"footprint must be .*one for all points or \(60,\)"),
    "frame": (dict(frame=6), ValueError, r"frame must be None or the number of one of the 6 views written, got 6"),
    "centre": (dict(center=[0.0, 1.0]), ValueError, r"center must be \(3,\) finite world coordinates"),
    "centre of a frame": (
        dict(center=[0.0, 1.0, 2.0], frame=1),
        ValueError,
        r"center must be None where frame is given",
    ),
}


@pytest.mark.parametrize("changes, kind, message", REFUSED.values(), ids=REFUSED)
def test_refused_points_change_nothing(changes, kind, message):
    cache = filled()
    before = [x.clone() for x in cache.tensors().values()]
    arguments = dict(zip(("points", "features", "footprint"), cloud(), strict=True)) | changes
    with pytest.raises(kind, match=message):
        cache.write_points(arguments.pop("points"), arguments.pop("features"), **arguments)
    assert_equal_bits(list(cache.tensors().values()), before)

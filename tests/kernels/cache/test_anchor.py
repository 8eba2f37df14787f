"""One scene in any unit and anywhere in the world is one memory: the least depth and the origin follow the scene."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits
from torch import Tensor

from mirage_kernels import Cameras, LatentCache, Readout, WriteReport

SIZE, IMAGE, CHANNELS = (6, 8), (24, 32), 4
POLICIES = ["append", "bounded"]


class Scene(NamedTuple):
    """A world, given in units of 1 / `scale` and moved by `offset`, in these units."""

    scale: float = 1.0
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def cameras(self, seed: int, views: int = 3) -> Cameras:
        """Views whose centres have few digits, so that moving and scaling by powers of two is exact."""
        rng = np.random.default_rng(seed)
        intrinsics, poses = scenes.intrinsics(rng, views, IMAGE), scenes.poses(rng, views)
        poses[:, :3, 3] = (poses[:, :3, 3] * 2**12).round() / 2**12 * self.scale + torch.tensor(self.offset)
        return Cameras(intrinsics, poses, IMAGE, square_pixels=False)

    def frames(self, seed: int) -> tuple[Tensor, Tensor, Cameras]:
        rng = np.random.default_rng(seed)
        latents = torch.from_numpy(rng.normal(size=(3, CHANNELS, *SIZE))).float()
        depth = scenes.depth_maps(rng, 3, IMAGE, 0.2)
        return latents, depth * self.scale, self.cameras(seed)

    def write(self, cache: LatentCache, seeds: range = range(4)) -> list[WriteReport]:
        return [cache.write(*self.frames(seed)) for seed in seeds]


def remembered(scene: Scene, policy: str, splat: str = "aligned") -> tuple[list[dict[str, int]], Readout, Tensor]:
    """What writes say, what is read between the views written, and how much views share: depth in the units of 1."""
    cache = LatentCache(CHANNELS, write_policy=policy)
    reports = [report.as_dict() for report in scene.write(cache)]
    readout = cache.read(scene.cameras(9), SIZE, splat=splat)
    overlap = cache.view_overlap(scene.cameras(1), scene.cameras(9), SIZE)
    return reports, readout._replace(depth=readout.depth / scene.scale), overlap


@pytest.mark.parametrize("splat", ["aligned", "nearest"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "scene",
    [
        Scene(2.0**-20),
        Scene(2.0**-7),
        Scene(2.0**10),
        Scene(2.0**20),
        Scene(1.0, (500_000.0, 4_649_776.0, 1_024.0)),
        Scene(2.0**10, (2.0**29, -(2.0**32), 0.0)),
        Scene(2.0**-10, (500_000.0, 0.0, -64.0)),
    ],
)
def test_units_and_places_by_powers_of_two_change_no_bit(scene, policy, splat):
    expected, found = remembered(Scene(), policy, splat), remembered(scene, policy, splat)
    assert found[0] == expected[0] and expected[1].mask.float().mean() > 0.5
    assert_equal_bits(found[1], expected[1])
    assert_equal_bits([found[2]], [expected[2]])
    assert 0 < expected[2].max() < 1


@pytest.mark.parametrize("scene", [Scene(0.001), Scene(1000.0), Scene(0.3048, (500_000.3, 4_649_776.7, 312.4))])
def test_other_units_and_places_change_no_more_than_rounding(scene):
    expected, found = remembered(Scene(), "append"), remembered(scene, "append")
    assert found[0] == expected[0]
    readout, reference = found[1], expected[1]
    same = readout.index == reference.index
    assert same.float().mean() > 0.99  # of 144 cells: one may be a tie
    torch.testing.assert_close(readout.depth[same], reference.depth[same], rtol=1e-5, atol=1e-5)
    close = ((readout.latents - reference.latents).abs() < 1e-2).all(1)
    assert close.float().mean() > 0.97


@pytest.mark.parametrize("scene", [Scene(0.001), Scene(1000.0)])
def test_a_bounded_memory_covers_the_same_in_any_unit(scene):
    """Voxels' edges are powers of two of the unit: what is kept varies, what is seen does not."""
    expected, found = remembered(Scene(), "bounded"), remembered(scene, "bounded")
    assert (found[1].mask == expected[1].mask).float().mean() > 0.97
    kept = [sum(report["written"] for report in reports) for reports in (expected[0], found[0])]
    assert 0.8 < kept[0] / kept[1] < 1.25


def test_the_least_depth_is_a_part_of_the_first_known_view():
    latents, depth, cameras = Scene().frames(0)
    depth[0] = 0.0
    cache = LatentCache(CHANNELS)
    assert cache.near is None and not cache.read(cameras, SIZE).mask.any()
    cache.write(latents[:1], depth[:1], cameras[:1])
    assert cache.near is None and len(cache) == 0 and cache.num_frames == 1
    cache.write(latents[1:], depth[1:], cameras[1:])
    known = depth[1][(depth[1] > 0) & torch.isfinite(depth[1])]
    assert cache.near == known.median().item() / 64
    near = cache.near
    Scene(100.0).write(cache)
    assert cache.near == near


@pytest.mark.parametrize("portions", [[3], [1, 2], [1, 1, 1]])
def test_portions_settle_the_same(portions):
    latents, depth, cameras = Scene(1.0, (1e6, 0.0, 0.0)).frames(0)
    depth[0] = torch.nan
    cache, start = LatentCache(CHANNELS), 0
    for views in portions:
        part = slice(start, start + views)
        cache.write(latents[part], depth[part], cameras[part])
        start += views
    expected = LatentCache(CHANNELS)
    expected.write(latents, depth, cameras)
    assert (cache.near, cache.origin) == (expected.near, expected.origin) and cache.origin[0] > 9e5
    held, wanted = cache.tensors(), expected.tensors()
    centers = [one.pop("frame_centers") for one in (held, wanted)]
    assert_equal_bits([*held.values()], [*wanted.values()])
    assert_equal_bits([centers[0][1:]], [centers[1][1:]])
    torch.testing.assert_close(*centers, rtol=0, atol=0.1)  # of a view without a token, before there was an origin


FAR = Scene(2.0**-10, (500_000.0, 0.0, -64.0))


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_settled_stays(tmp_path, policy):
    """Through files, copies, other devices and a rollback; a rollback to before it unsettles it, as `clear` does."""
    cache = LatentCache(CHANNELS, write_policy=policy)
    empty = cache.checkpoint()
    FAR.write(cache, range(2))
    settled, expected = (cache.near, cache.origin), cache.read(FAR.cameras(9), SIZE)
    assert settled[0] < 1e-4 and settled[1][0] > 499_000 and expected.mask.any()
    cache.save(tmp_path / "a.safetensors")
    loaded, copied = LatentCache.load(tmp_path / "a.safetensors"), copy.deepcopy(cache)
    moved = LatentCache.from_tensors(
        cache.tensors(), channels=CHANNELS, write_policy=policy, near=cache.near, origin=cache.origin
    )
    for one in (loaded, copied, moved):
        assert (one.near, one.origin) == settled
        assert_equal_bits(one.read(FAR.cameras(9), SIZE), expected)
    mark = cache.checkpoint()
    FAR.write(cache, range(2, 4))
    FAR.write(loaded, range(2, 4))
    assert_equal_bits([*cache.tensors().values()], [*loaded.tensors().values()])
    cache.rollback(mark)
    assert (cache.near, cache.origin) == settled
    assert_equal_bits(cache.read(FAR.cameras(9), SIZE), expected)
    cache.rollback(empty)
    assert cache.near is None and cache.origin == (0.0, 0.0, 0.0)
    loaded.clear()
    for one in (cache, loaded):
        Scene().write(one, range(1))
        assert one.near > 0.01 and one.origin == (0.0, 0.0, 0.0)


def test_views_without_a_token_keep_their_place(tmp_path):
    """Also where the origin comes after them, and goes again."""
    cache, (latents, depth, cameras) = LatentCache(CHANNELS), FAR.frames(0)
    cache.write(latents, torch.zeros_like(depth), cameras)
    mark = cache.checkpoint()
    expected = cameras.centers
    for _ in range(2):
        torch.testing.assert_close(cache.frame_centers.double(), expected, rtol=0, atol=0.1)
        cache.write(latents, depth, cameras)
        torch.testing.assert_close(cache.frame_centers[:3], expected, rtol=0, atol=0.1)
        torch.testing.assert_close(cache.frame_centers[3:], expected, rtol=0, atol=1e-9)
        cache.save(tmp_path / "a.safetensors")
        assert_equal_bits([LatentCache.load(tmp_path / "a.safetensors").frame_centers], [cache.frame_centers])
        cache.rollback(mark)
    cache.save(tmp_path / "b.safetensors")
    assert LatentCache.load(tmp_path / "b.safetensors").near is None


def test_a_write_that_fails_settles_nothing(monkeypatch):
    cache = LatentCache(CHANNELS)

    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("mirage_kernels.cache.launch.write", fail)
        with pytest.raises(MemoryError):
            FAR.write(cache)
    assert cache.near is None and cache.origin == (0.0, 0.0, 0.0)


def test_positions_are_the_worlds():
    """In float64 where float32 could not hold them."""
    near, far = LatentCache(CHANNELS), LatentCache(CHANNELS)
    Scene().write(near)
    offset = (500_000.0, 4_649_776.0, 1_024.0)
    Scene(1.0, offset).write(far)
    assert near.points.dtype == torch.float32 and far.points.dtype == far.frame_centers.dtype == torch.float64
    assert_equal_bits([far.points], [near.points.double() + torch.tensor(offset)])
    assert_equal_bits([far.frame_centers], [near.frame_centers.double() + torch.tensor(offset)])
    assert far.nbytes == near.nbytes and far.origin == offset


def test_points_from_elsewhere_settle_it_too():
    """Where nothing else was written: footprints say how large things are, positions where they are."""
    rng = np.random.default_rng(3)
    points = torch.from_numpy(rng.uniform((-2, -2, 3), (2, 2, 5), (500, 3)))
    points = (points * 2**10).round() / 2**10
    features, offset = torch.ones(500, CHANNELS), torch.tensor(FAR.offset, dtype=torch.float64)
    near, far = LatentCache(CHANNELS), LatentCache(CHANNELS)
    near.write_points(points, features, footprint=2.0**-4, center=[0.0, 0.0, 0.0])
    far.write_points(points * FAR.scale + offset, features, footprint=2.0**-4 * FAR.scale, center=offset)
    assert near.near == 2.0**-4 and far.near == 2.0**-14
    assert near.origin == (0.0, 0.0, 0.0) and far.origin[0] > 499_990
    expected, found = (one.read(scene.cameras(9), SIZE) for one, scene in ((near, Scene()), (far, FAR)))
    assert expected.mask.float().mean() > 0.5 and len(near) == len(far)
    assert (found.index == expected.index).float().mean() > 0.97
    for tolerance in (0.0, 0.05):
        shown = near.visible(Scene().cameras(9), SIZE, depth_tolerance=tolerance)
        assert (far.visible(FAR.cameras(9), SIZE, depth_tolerance=tolerance) == shown).float().mean() > 0.99
    torch.testing.assert_close(far.points, points * FAR.scale + offset, rtol=0, atol=1e-9)


def test_what_is_given_is_not_settled():
    cache = LatentCache(CHANNELS, near=0.05, origin=(10, 20, 30))
    assert (cache.near, cache.origin) == (0.05, (10.0, 20.0, 30.0))
    Scene(100.0).write(cache)
    cache.clear()
    assert (cache.near, cache.origin) == (0.05, (10.0, 20.0, 30.0))
    for wrong in ({"near": -1.0}, {"near": float("nan")}, {"origin": (1.0, 2.0)}, {"origin": (1.0, 2.0, float("inf"))}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
            LatentCache(CHANNELS, **wrong)


def test_a_read_from_before_counts_as_made_with_other_buffers():
    """A CUDA graph of it holds the least depth of then."""
    cache = LatentCache(CHANNELS, capacity=500)
    cache.read(Scene().cameras(1), SIZE)
    before = cache.buffer_version
    Scene().write(cache)
    assert cache.buffer_version == before + 1
    Scene().write(cache)
    assert cache.buffer_version == before + 1


@pytest.mark.parametrize("policy", POLICIES)
def test_offloading_far_from_the_origin(policy):
    cache, expected = (LatentCache(CHANNELS, write_policy=policy) for _ in range(2))
    for one in (cache, expected):
        FAR.write(one, range(8))
    cache.offload(FAR.cameras(3)[:0])
    assert cache.num_offloaded >= 256
    assert_equal_bits(cache.read(FAR.cameras(9), SIZE), expected.read(FAR.cameras(9), SIZE))
    cache.offload(FAR.cameras(3)[:0])
    for one in (cache, expected):
        FAR.write(one, range(8, 9))
    assert_equal_bits([*cache.tensors().values()], [*expected.tensors().values()])

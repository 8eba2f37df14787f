"""`view_overlap` on every backend, against the brute force (Python sets) and by its own rules."""

from __future__ import annotations

import math

import brute_force
import numpy as np
import pytest
import scenes
import torch
from comparison import as_array, assert_equal_bits, assert_same_overlap
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mirage_kernels import back_project, view_overlap

SIZE = (9, 13)


def off_border(points, voxel_size):
    """The same points, those within a thousandth of a voxel's border moved inwards: rounding cannot decide there."""
    scaled = points[:, :3].double() / voxel_size
    part = scaled - scaled.floor()
    moved = (scaled.floor() + part.clamp(1e-3, 1 - 1e-3)) * voxel_size
    return torch.cat([moved.float(), points[:, 3:]], 1)


def make(seed, count=300, views=3, targets=2, size=SIZE, voxel_size=0.5, angle=0.5):
    """points, intrinsics, cam2world, target_intrinsics, target_cam2world"""
    rng = np.random.default_rng(seed)
    points, _ = scenes.cloud(rng, count, 1)
    return (
        off_border(points, voxel_size),
        scenes.intrinsics(rng, views, size),
        scenes.poses(rng, views, angle),
        scenes.intrinsics(rng, targets, size),
        scenes.poses(rng, targets, angle),
    )


def overlap(backend, arguments, size=SIZE, num_points=None, **options):
    """(V,) float32 on the host. ``num_points`` may be an int."""
    if isinstance(num_points, int):
        num_points = torch.tensor(num_points)
    got = view_overlap(*[backend.put(x) for x in arguments], size, num_points=backend.put(num_points), **options)
    backend.sync()
    assert got.device.type == backend.device.type and got.dtype == torch.float32
    return got.cpu()


def check(backend, arguments, size=SIZE, voxel_size=0.5, **options):
    got = overlap(backend, arguments, size, voxel_size=voxel_size, **options)
    expected = assert_same_overlap(got, *arguments, size, voxel_size=voxel_size, **options)
    assert ((got >= 0) & (got <= 1)).all()
    assert max(expected) > 0, "no view sees anything the targets see: the test would test nothing"
    return got


# ---------------------------------------------------------------------------------------------- against the brute force


@pytest.mark.slow
@pytest.mark.parametrize("voxel_size", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("count", [17, 300, 1500])
def test_voxel_sizes(backend, count, voxel_size):
    got = check(backend, make(1, count, voxel_size=voxel_size), voxel_size=voxel_size)
    assert len(got.unique()) > 1 or voxel_size == 3  # so coarse that every view may see every voxel


@pytest.mark.parametrize("size", [(1, 1), (1, 13), (9, 1), (33, 64)])
def test_grids(backend, size):
    check(backend, make(2, 600, size=size, angle=0.1), size)


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 300),
    views=st.integers(1, 4),
    targets=st.integers(1, 3),
    voxel_size=st.sampled_from([0.1, 0.7, 2.0]),
    near=st.sampled_from([0.0, 0.05, 2.0]),
)
def test_random_scenes(backend, seed, count, views, targets, voxel_size, near):
    arguments = make(seed, count, views, targets, voxel_size=voxel_size, angle=0.1)
    arguments[0][0] = torch.tensor([0.25, 0.15, 3.05, 1.0])  # one is seen by all
    check(backend, arguments, voxel_size=voxel_size, near=near)


@pytest.mark.slow
@given(seed=st.integers(0, 10**6), fx=st.sampled_from([1e-3, 1.0, 1e3, 1e6]), fy=st.sampled_from([1e-3, 1e2, 1e6]))
def test_extreme_intrinsics(backend, seed, fx, fy):
    arguments = make(seed, 150, 2, 1)
    arguments[1][:, 0, 0], arguments[1][:, 1, 1] = fx, fy
    got = overlap(backend, arguments, voxel_size=0.5)
    assert_same_overlap(got, *arguments, SIZE, voxel_size=0.5)
    assert overlap(backend, (arguments[0], *arguments[3:], *arguments[3:])).item() == 1


@pytest.mark.parametrize("views, targets", [(1, 70), (70, 1), (130, 2)])
def test_many_views(backend, views, targets):
    arguments = make(3, 60, views, targets)
    got = overlap(backend, arguments, voxel_size=0.5)
    expected = brute_force.view_overlap(*[as_array(x) for x in arguments], SIZE, voxel_size=0.5)
    assert got.any() and len(got.unique()) >= min(views, 5)
    np.testing.assert_allclose(got, expected, atol=0.05)
    assert (got.numpy() == np.float32(expected)).mean() > 0.95


@pytest.mark.slow
def test_real_room(backend, shared_dir):
    room = load_file(shared_dir / "data/golden/latent_point_cloud.safetensors")
    intrinsics = room["intrinsics"].expand(4, 3, 3)
    lifted = back_project(*[backend.put(x) for x in (room["depth"], intrinsics, room["cam2world"])], (15, 20))
    points = off_border(lifted.points.cpu()[lifted.valid.cpu()], 0.1)
    scaled = (room["intrinsics"].double() / 8).expand(4, 3, 3)
    poses = room["read_cam2world"]
    arguments = points, scaled, poses[:4], scaled[:2], poses[4:6]
    got = check(backend, arguments, (15, 20), voxel_size=0.1)
    assert (got > 0.2).any() and len(got.unique()) > 2


def test_the_definition_in_float64():
    arguments = make(4)
    arguments = arguments[0].double(), *arguments[1:]
    got = view_overlap(*arguments, SIZE, voxel_size=0.5)
    assert max(assert_same_overlap(got, *arguments, SIZE, voxel_size=0.5)) > 0


# ---------------------------------------------------------------------------------------------- the rules, by hand


def line(columns, z=1.0):
    """Points at the given columns of row 0 of a camera with intrinsics 1, at the origin."""
    return torch.tensor([[column * z, 0.5 * z, z, 0.1] for column in columns])


def camera(shift=0.0):
    """Sees columns [shift, shift + width)."""
    intrinsics = torch.eye(3, dtype=torch.float64)[None].clone()
    intrinsics[0, 0, 2] = -shift
    return intrinsics, torch.eye(4, dtype=torch.float64)[None]


def test_by_hand(backend):
    """The target sees voxels 0..3, the view 2..5 of eight: two of six."""
    points = line([0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5])
    got = overlap(backend, (points, *camera(2.0), *camera()), (1, 4), voxel_size=1.0)
    assert got.tolist() == [np.float32(1 / 3)]


def test_voxels_are_counted_and_not_points(backend):
    points = line([0.5, 0.6, 0.7, 1.5, 2.5])
    got = overlap(backend, (points, *camera(1.0), *camera()), (1, 2), voxel_size=1.0)
    assert got.tolist() == [np.float32(1 / 3)]  # {1, 2} and {0, 1}
    coarse = overlap(backend, (points, *camera(1.0), *camera()), (1, 2), voxel_size=10.0)
    assert coarse.tolist() == [1.0]


def test_targets_are_one_set(backend):
    points = line([0.5, 1.5, 2.5, 3.5])
    both = [torch.cat(pair) for pair in zip(camera(0.0), camera(2.0), strict=True)]
    got = overlap(backend, (points, *camera(1.0), *both), (1, 2), voxel_size=1.0)
    assert got.tolist() == [0.5]  # {1, 2} of {0, 1, 2, 3}


def test_occluded_points_count(backend):
    points = torch.cat([line([0.5], z=1.0), line([0.5], z=5.0)])
    got = overlap(backend, (points[:1].repeat(2, 1), *camera(), *camera()), (1, 1), voxel_size=1.0)
    assert got.tolist() == [1.0]
    one, other = camera(), camera(0.4)
    points = torch.cat([line([0.2], z=1.0), line([0.5], z=5.0)])
    got = overlap(backend, (points, *other, *one), (1, 1), voxel_size=1.0)
    assert got.tolist() == [0.5]  # the view misses the near point and sees the far one behind it


def test_negative_coordinates_round_down(backend):
    """-0.5 and 0.5 are in different voxels."""
    points = torch.tensor([[-0.5, 0.5, 1, 0.1], [0.5, 0.5, 1, 0.1], [-1.5, 0.5, 1, 0.1]])
    got = overlap(backend, (points, *camera(-1.0), *camera(0.0)), (1, 2), voxel_size=1.0)
    assert got.tolist() == [0.5]  # {-1, 0} and {0}


def test_nothing_seen_by_either_is_zero(backend):
    points = line([0.5, 1.5])
    assert overlap(backend, (points, *camera(), *camera()), (1, 2)).tolist() == [1.0]
    assert overlap(backend, (points, *camera(50.0), *camera(90.0)), (1, 2)).tolist() == [0.0]
    assert overlap(backend, (points, *camera(50.0), *camera()), (1, 2)).tolist() == [0.0]
    assert overlap(backend, (points, *camera(), *camera(50.0)), (1, 2)).tolist() == [0.0]


def test_a_view_overlaps_itself_fully(backend):
    points, intrinsics, cam2world, *_ = make(5)
    for t in range(3):
        own = intrinsics[t : t + 1], cam2world[t : t + 1]
        assert overlap(backend, (points, *own, *own)).tolist() == [1.0]


def test_overlap_is_symmetric_for_single_views(backend):
    points, intrinsics, cam2world, target_intrinsics, target_cam2world = make(6)
    one, other = (intrinsics[:1], cam2world[:1]), (target_intrinsics[:1], target_cam2world[:1])
    got = overlap(backend, (points, *one, *other), voxel_size=0.5)
    assert 0 < got.item() < 1
    assert_equal_bits([overlap(backend, (points, *other, *one), voxel_size=0.5)], [got])


def test_default_voxel_is_a_tenth(backend):
    arguments = make(7, 2000, voxel_size=0.1)
    got = overlap(backend, arguments)
    assert_equal_bits([got], [overlap(backend, arguments, voxel_size=0.1)])
    assert not torch.equal(got, overlap(backend, arguments, voxel_size=0.3))


@pytest.mark.parametrize("far", [1e9, 1e30])
def test_far_points_share_the_border_voxels(backend, far):
    """Past 2^20 voxels: no overflow, all in one voxel per direction."""
    intrinsics = torch.tensor([[[0.1 / far, 0, 0.5], [0, 0.1, 0.5], [0, 0, 1]]], dtype=torch.float64)
    views = intrinsics, torch.eye(4, dtype=torch.float64)[None]
    points = torch.tensor([[far, 0.5, 1, 0.1], [2 * far, 0.5, 1, 0.1], [-far, 0.5, 1, 0.1], [0.5, 0.5, 1, 0.1]])
    assert overlap(backend, (points, *views, *views), (1, 1), voxel_size=1.0).tolist() == [1.0]
    beyond = intrinsics.clone()
    beyond[0, 0] = torch.tensor([1 / far, 0, -1.5], dtype=torch.float64)  # sees x >= 1.5 far
    got = overlap(backend, (points, beyond, views[1], *views), (1, 1), voxel_size=1.0)
    assert got.tolist() == [np.float32(1 / 3)]  # one of the voxels far right, far left, near
    beyond[0, 0, 0] *= -1  # sees x <= -1.5 far
    assert overlap(backend, (points, beyond, views[1], *views), (1, 1), voxel_size=1.0).tolist() == [0.0]


# ---------------------------------------------------------------------------------------------- invariances


@given(seed=st.integers(0, 10**6), count=st.integers(1, 300))
def test_permutation_and_repetition(backend, seed, count):
    arguments = make(seed, count, angle=0.1)
    arguments[0][0] = torch.tensor([0.25, 0.15, 3.05, 1.0])
    got = overlap(backend, arguments, voxel_size=0.5)
    assert got.all()
    rng = np.random.default_rng(seed)
    points = arguments[0]
    shuffled = points[torch.from_numpy(rng.permutation(count))]
    repeated = points[torch.from_numpy(np.concatenate([rng.permutation(count), rng.integers(0, count, 50)]))]
    for changed in (shuffled, repeated):
        assert_equal_bits([overlap(backend, (changed, *arguments[1:]), voxel_size=0.5)], [got])


@given(seed=st.integers(0, 10**6), padding=st.integers(1, 60), bad=st.sampled_from([math.nan, math.inf, -5.0]))
def test_padding_invariance(backend, seed, padding, bad):
    """Points that are not finite, behind the cameras or past num_points change nothing."""
    arguments = make(seed)
    got = overlap(backend, arguments, voxel_size=0.5)
    assert got.any()
    points = arguments[0]
    more = points[torch.arange(padding) % len(points)].clone()
    more[:, 2] = bad
    for padded in (torch.cat([points, more]), torch.cat([more, points])):
        assert_equal_bits([overlap(backend, (padded, *arguments[1:]), voxel_size=0.5)], [got])
    visible = torch.cat([points, points[:padding] * 1.1])
    for live in (len(points), torch.tensor([len(points)])):
        padded = overlap(backend, (visible, *arguments[1:]), voxel_size=0.5, num_points=live)
        assert_equal_bits([padded], [got])


def test_views_do_not_see_each_other(backend):
    points, intrinsics, cam2world, *targets = make(8, views=5)
    together = overlap(backend, (points, intrinsics, cam2world, *targets), voxel_size=0.5)
    assert len(together.unique()) > 2
    for k in range(5):
        one = overlap(backend, (points, intrinsics[k : k + 1], cam2world[k : k + 1], *targets), voxel_size=0.5)
        assert_equal_bits([one], [together[k : k + 1]])


# ---------------------------------------------------------------------------------------------- nothing to see


def test_empty_cache(backend):
    arguments = make(9)
    assert overlap(backend, arguments).any()
    assert overlap(backend, (arguments[0][:0], *arguments[1:])).tolist() == [0, 0, 0]
    for live in (0, -1, -(2**40)):
        assert overlap(backend, arguments, num_points=live).tolist() == [0, 0, 0]


@pytest.mark.parametrize("live", [300, 301, 2**40])
def test_more_live_points_than_rows(backend, live):
    arguments = make(10)
    got = overlap(backend, arguments)
    assert got.any()
    assert_equal_bits([overlap(backend, arguments, num_points=live)], [got])


def test_no_views(backend):
    points, intrinsics, cam2world, target_intrinsics, target_cam2world = make(11)
    assert overlap(backend, (points, intrinsics, cam2world, target_intrinsics, target_cam2world)).any()
    nothing = overlap(backend, (points, intrinsics[:0], cam2world[:0], target_intrinsics, target_cam2world))
    assert nothing.shape == (0,)
    no_targets = overlap(backend, (points, intrinsics, cam2world, target_intrinsics[:0], target_cam2world[:0]))
    assert no_targets.tolist() == [0, 0, 0]


def test_all_points_behind(backend):
    arguments = make(12)
    assert overlap(backend, arguments).any()
    arguments[0][:, 2] = -arguments[0][:, 2].abs() - 3
    assert overlap(backend, arguments).tolist() == [0, 0, 0]


def test_one_point(backend):
    _, *cameras = make(13)
    assert overlap(backend, (torch.tensor([[0.2, 0.1, 3.0, 1.0]]), *cameras)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [1, 2, 3, 4])
def test_degenerate_cameras_see_nothing(backend, which, bad):
    arguments = make(14)
    good = overlap(backend, arguments, voxel_size=0.5)
    assert good.all()
    arguments[which][0] = bad
    got = overlap(backend, arguments, voxel_size=0.5)
    if which in (1, 2):
        assert got[0] == 0 and torch.equal(got[1:], good[1:])
    else:
        rest = [x[1:] for x in arguments[3:]]
        assert_equal_bits([got], [overlap(backend, (*arguments[:3], *rest), voxel_size=0.5)])


def test_singular_pose_sees_nothing(backend):
    arguments = make(15)
    good = overlap(backend, arguments, voxel_size=0.5)
    arguments[2][0, :3, :3] = 0
    got = overlap(backend, arguments, voxel_size=0.5)
    assert good.all() and got[0] == 0 and torch.equal(got[1:], good[1:])


@given(seed=st.integers(0, 10**6))
def test_random_bits_stay_in_bounds(backend, seed):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (200, 4), dtype=np.uint32).view(np.float32)
    points = torch.from_numpy(np.concatenate([bits, np.float32([[0.5, 0.5, 1, 1]])]))
    cameras = [torch.from_numpy(rng.integers(0, 2**63, (3, n, n)).view(np.float64)) for n in (3, 4, 3, 4)]
    for matrix in cameras:
        matrix[0] = torch.eye(len(matrix[0]))
    got = overlap(backend, (points, *cameras))
    assert ((got >= 0) & (got <= 1)).all() and got[0] > 0


# ---------------------------------------------------------------------------------------------- layouts


def test_strided_and_expanded_inputs(backend):
    arguments = make(16)
    got = check(backend, arguments)
    assert_equal_bits([overlap(backend, [scenes.strided(x) for x in arguments], voxel_size=0.5)], [got])
    assert_equal_bits([overlap(backend, [x.mT.contiguous().mT for x in arguments], voxel_size=0.5)], [got])
    points, intrinsics, cam2world, *targets = arguments
    one = intrinsics[:1].expand(4, 3, 3), cam2world[:1].expand(4, 4, 4)
    assert torch.equal(overlap(backend, (points, *one, *targets), voxel_size=0.5), got[:1].expand(4))


def test_inputs_are_not_written(backend):
    arguments = make(17)
    before = [x.clone() for x in arguments]
    assert overlap(backend, arguments).any()
    assert_equal_bits(arguments, before)

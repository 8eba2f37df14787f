"""`splat` on every backend, against the brute force and by its own rules."""

from __future__ import annotations

import math

import brute_force
import numpy as np
import pytest
import scenes
import torch
from comparison import as_array, assert_equal_bits, assert_same_view
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mirage_kernels import back_project, splat

SIZE = (9, 13)


def make(seed, count=300, channels=5, views=2, size=SIZE, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    points, features = scenes.cloud(rng, count, channels, dtype)
    return points, features, scenes.intrinsics(rng, views, size), scenes.poses(rng, views)


def render(backend, points, features, intrinsics, cam2world, size, num_points=None, **options):
    """The view, on the host. ``num_points`` may be an int."""
    if isinstance(num_points, int):
        num_points = torch.tensor(num_points)
    arguments = [backend.put(x) for x in (points, features, intrinsics, cam2world)]
    view = splat(*arguments, size, num_points=backend.put(num_points), **options)
    backend.sync()
    assert {x.device.type for x in view} == {backend.device.type}
    return type(view)(*(x.cpu() for x in view))


def check(backend, points, features, intrinsics, cam2world, size, *, num_points=None, near=0.05, dtype=None, **limits):
    view = render(backend, points, features, intrinsics, cam2world, size, num_points, near=near, dtype=dtype)
    arguments = points, features, intrinsics, cam2world, size
    assert_same_view(view, *arguments, num_points=num_points, near=near, dtype=dtype, **limits)
    return view


def facing(points, channels=3):
    """Points (N, 3 or 4) before a camera that maps (x, y, 1) to column x, row y, and features that tell them apart."""
    points = torch.as_tensor(points, dtype=torch.float32)
    if points.shape[1] == 3:
        points = torch.cat([points, torch.full((len(points), 1), 0.1)], 1)
    features = torch.arange(1, len(points) * channels + 1, dtype=torch.float32).reshape(-1, channels)
    return points, features, torch.eye(3)[None], torch.eye(4)[None]


def assert_all_holes(view):
    assert not view.mask.any() and not view.latents.any() and not view.depth.any()
    assert (view.index == -1).all()


# ---------------------------------------------------------------------------------------------- against the brute force


@pytest.mark.parametrize("size", [(9, 13), (1, 1), (1, 17), (8, 1), (16, 32), (7, 33)])
def test_grids(backend, size):
    check(backend, *make(1, size=size), size, least_covered=min(20, size[0] * size[1]))


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 63, 257, 1025, 1500])
def test_counts(backend, count):
    points, features, intrinsics, cam2world = make(2, count)
    points[0, :3] = torch.tensor([0.2, 0.1, 3.0])  # one is always seen
    check(backend, points, features, intrinsics, cam2world, SIZE)


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 9, 16, 48, 130])
@pytest.mark.parametrize("dtype", scenes.DTYPES)
def test_channels(backend, channels, dtype):
    check(backend, *make(3, 200, channels, dtype=dtype), SIZE, least_covered=30)


@pytest.mark.parametrize("dtype", scenes.DTYPES)
@pytest.mark.parametrize("out", scenes.DTYPES)
@pytest.mark.parametrize("channels", [3, 48])
def test_dtype_pairs(backend, dtype, out, channels):
    """Rounded once, to nearest even, as PyTorch rounds."""
    points, features, *cameras = make(4, 200, channels, dtype=dtype)
    features[::7] *= 1e4 if dtype != torch.float16 else 1e3
    features[::11] *= 1e-6
    check(backend, points, features, *cameras, SIZE, dtype=out, least_covered=30)


def test_features_that_are_not_finite_are_passed_on(backend):
    points, features, *cameras = facing([[0.5, 0.5, 1], [1.5, 0.5, 1], [2.5, 0.5, 1]])
    features[0], features[1] = math.nan, -math.inf
    for out in scenes.DTYPES:
        view = render(backend, points, features, *cameras, (1, 4), dtype=out)
        assert view.latents[0, :, 0, 0].isnan().all() and (view.latents[0, :, 0, 1] == -math.inf).all()
        assert view.latents[0, :, 0, 2].tolist() == [7, 8, 9] and view.latents[0, :, 0, 3].tolist() == [0, 0, 0]


@pytest.mark.slow
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 400),
    views=st.integers(1, 3),
    size=st.tuples(st.integers(1, 12), st.integers(1, 14)),
    channels=st.integers(1, 9),
    near=st.sampled_from([0.0, 0.05, 2.0]),
)
def test_random_scenes(backend, seed, count, views, size, channels, near):
    points, features, intrinsics, cam2world = make(seed, count, channels, views, size)
    points[0, :3] = torch.tensor([0.2, 0.1, 3.0])
    check(backend, points, features, intrinsics, cam2world, size, near=near)


@pytest.mark.slow
@given(
    seed=st.integers(0, 10**6),
    fx=st.sampled_from([1e-3, 1e-1, 1.0, 1e3, 1e6]),
    fy=st.sampled_from([1e-3, 1.0, 1e3, 1e6]),
    center=st.sampled_from([-1e3, 0.0, 6.5, 1e4]),
)
def test_extreme_intrinsics(backend, seed, fx, fy, center):
    points, features, intrinsics, _ = make(seed, 200)
    intrinsics[:, 0, 0], intrinsics[:, 1, 1], intrinsics[1:, :2, 2] = fx, fy, center
    points[0, :3] = torch.tensor([0.0, 0.0, 0.9])  # on the axis of view 0
    cam2world = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    check(backend, points, features, intrinsics, cam2world, SIZE, extreme=True)


@pytest.mark.parametrize("scale", [1e-2, 1e3, 1e6])
def test_any_unit_of_length(backend, scale):
    points, features, intrinsics, cam2world = make(5)
    cam2world[:, :3, 3] *= scale
    check(backend, points * scale, features, intrinsics, cam2world, SIZE, near=0.05 * scale, least_covered=100)


def test_cameras_all_around(backend):
    """Poses that look back, up and down at a cloud about the origin: half of the points lie behind each camera."""
    rng = np.random.default_rng(6)
    points = torch.from_numpy(rng.uniform(-2, 2, (400, 4))).float()
    features = torch.from_numpy(rng.uniform(0.5, 1, (400, 3))).float()
    cam2world = scenes.poses(rng, 6, angle=math.pi)
    view = check(backend, points, features, scenes.intrinsics(rng, 6, SIZE), cam2world, SIZE, least_covered=100)
    assert view.mask.flatten(1).any(1).all()


def test_real_room(backend, shared_dir):
    """Four real frames lifted and seen from the poses in between."""
    room = load_file(shared_dir / "data/golden/latent_point_cloud.safetensors")
    lifted = back_project(
        *[backend.put(x) for x in (room["depth"], room["intrinsics"].expand(4, 3, 3), room["cam2world"])], (30, 40)
    )
    valid = lifted.valid.cpu()
    points = lifted.points.cpu()[valid]
    features = room["latents"].permute(0, 2, 3, 1)[valid]
    intrinsics = room["intrinsics"].double().clone()
    intrinsics[0] *= 40 / 160
    intrinsics[1] *= 30 / 120
    cam2world = room["read_cam2world"][::2]
    intrinsics = intrinsics.expand(len(cam2world), 3, 3)
    check(backend, points, features, intrinsics, cam2world, (30, 40), least_covered=2000)


@pytest.mark.parametrize("which", ["points", "features", "dtype"])
def test_the_definition_in_float64(which):
    points, features, *cameras = make(7)
    arguments = {"points": points, "features": features, "dtype": None}
    arguments[which] = torch.float64 if which == "dtype" else arguments[which].double()
    points, features, dtype = arguments.values()
    view = splat(points, features, *cameras, SIZE, dtype=dtype)
    assert_same_view(view, points, features, *cameras, SIZE, dtype=dtype, least_covered=50)


# ---------------------------------------------------------------------------------------------- the rules, by hand


def test_one_point_by_hand(backend):
    """At z = 2, (3, 5, 2) falls on column 1.5, row 2.5."""
    view = render(backend, *facing([[3, 5, 2]]), (4, 3))
    assert view.index[0].flatten().tolist().index(0) == 2 * 3 + 1 and int(view.mask.sum()) == 1
    assert view.latents[0, :, 2, 1].tolist() == [1, 2, 3] and view.depth[0, 2, 1] == 2
    assert int((view.latents != 0).sum()) == 3 and int((view.depth != 0).sum()) == 1


def test_cells_are_half_open(backend):
    """Column j covers [j, j + 1): a point on the border belongs to the cell on its right; the last border is out."""
    points = [[0, 0, 1], [1, 1, 1], [2, 0, 1], [0, 2, 1], [-1e-6, 0.5, 1], [0.5, -1e-6, 1]]
    view = render(backend, *facing(points), (2, 2))
    assert view.index[0].tolist() == [[0, -1], [-1, 1]]


def test_nearest_wins_in_any_order(backend):
    for depths in ([3.0, 2.0, 4.0], [2.0, 3.0, 4.0], [4.0, 3.0, 2.0]):
        points = [[0.5 * z, 0.5 * z, z] for z in depths]
        view = render(backend, *facing(points), (1, 1))
        assert view.index.item() == depths.index(2.0) and view.depth.item() == 2.0


def test_neighbouring_floats_are_told_apart(backend):
    z = np.float32(3.0)
    nearer = float(np.nextafter(z, np.float32(0)))
    for depths, winner in (([3.0, nearer], 1), ([nearer, 3.0], 0)):
        view = render(backend, *facing([[1, 1, depth] for depth in depths]), (1, 1))
        assert view.index.item() == winner and view.depth.item() == nearer


@pytest.mark.parametrize("copies", [2, 5, 1100, 9000])
def test_duplicate_points_lowest_index_wins(backend, copies):
    """Copies lie far apart, so that different threads and blocks of the kernels see them."""
    points, features, intrinsics, cam2world = make(8, 40, 3)
    alone = render(backend, points, features, intrinsics, cam2world, SIZE)
    assert int(alone.mask.sum()) > 20
    others = torch.arange(copies * 40 * 3, dtype=torch.float32).reshape(-1, 3) + 100
    others[:40] = features
    again = render(backend, points.repeat(copies, 1), others, intrinsics, cam2world, SIZE)
    assert_equal_bits(again, alone)


def test_indices_past_sixteen_bits(backend):
    points = torch.tensor([[0.5, 0.5, -1.0]]).repeat(70_000, 1)
    points[[65_535, 65_536, 69_999]] = torch.tensor([[0.5, 0.5, 1.0], [1.5, 0.5, 1.0], [2.5, 0.5, 1.0]])
    view = render(backend, *facing(points, channels=1), (1, 3))
    assert view.index.flatten().tolist() == [65_535, 65_536, 69_999]
    assert view.latents.flatten().tolist() == [65_536, 65_537, 70_000]


def test_equal_depth_at_different_places_of_a_cell(backend):
    points = [[0.9, 0.1, 1], [0.1, 0.9, 1], [0.5, 0.5, 1]]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        points_, features, *cameras = facing([points[k] for k in order])
        view = render(backend, points_, features, *cameras, (1, 1))
        assert view.index.item() == 0 and view.latents.flatten().tolist() == [1, 2, 3]


def test_near_is_exclusive(backend):
    points, features, *cameras = facing([[0.25, 0.25, 0.5]])
    assert render(backend, points, features, *cameras, (1, 1), near=0.25).mask.all()
    assert_all_holes(render(backend, points, features, *cameras, (1, 1), near=0.5))
    default = facing([[0.02, 0.02, 0.04], [0.03, 0.03, 0.06]])
    assert render(backend, *default, (1, 1)).index.item() == 1


def test_footprint_does_not_matter(backend):
    points, features, *cameras = make(9)
    view = render(backend, points, features, *cameras, SIZE)
    assert view.mask.any()
    for value in (0.0, -1.0, math.nan, math.inf):
        points[:, 3] = value
        assert_equal_bits(render(backend, points, features, *cameras, SIZE), view)


# ---------------------------------------------------------------------------------------------- invariances


@given(seed=st.integers(0, 10**6), count=st.integers(1, 300))
def test_permutation_invariance(backend, seed, count):
    """The order of the points decides exact ties only, and here there are none."""
    points, features, *cameras = make(seed, count, 3)
    points[0, :3] = torch.tensor([0.2, 0.1, 3.0])
    view = render(backend, points, features, *cameras, SIZE)
    assert view.mask.any()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    shuffled = render(backend, points[order], features[order], *cameras, SIZE)
    assert_equal_bits([shuffled.latents, shuffled.mask, shuffled.depth], [view.latents, view.mask, view.depth])
    back = torch.where(shuffled.index >= 0, order[shuffled.index.clamp(min=0)], -1)
    assert torch.equal(back, view.index)


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 100),
    padding=st.integers(1, 50),
    kind=st.sampled_from(["behind", "nan", "inf", "huge", "one nan"]),
)
def test_padding_invariance(backend, seed, count, padding, kind):
    """Points that no camera sees change nothing, appended or in between."""
    points, features, *cameras = make(seed, count, 3)
    points[0, :3] = torch.tensor([0.2, 0.1, 3.0])
    view = render(backend, points, features, *cameras, SIZE)
    assert view.mask.any()
    rng = np.random.default_rng(seed)
    more = torch.from_numpy(rng.uniform(0.1, 3, (padding, 4))).float()
    if kind == "behind":
        more[:, 2] -= 10
    elif kind == "huge":
        more[:, :2] = 3e38
    elif kind == "one nan":
        more[torch.arange(padding), torch.from_numpy(rng.integers(0, 3, padding))] = math.nan
    else:
        more[:, :3] = math.nan if kind == "nan" else math.inf
    noise = torch.full((padding, 3), math.nan)
    appended = render(backend, torch.cat([points, more]), torch.cat([features, noise]), *cameras, SIZE)
    assert_equal_bits(appended, view)
    in_front = render(backend, torch.cat([more, points]), torch.cat([noise, features]), *cameras, SIZE)
    assert_equal_bits(in_front[:3], view[:3])
    assert torch.equal(in_front.index, torch.where(view.mask, view.index + padding, -1))


@given(seed=st.integers(0, 10**6), live=st.integers(1, 120), rest=st.integers(0, 120))
def test_rows_past_num_points_do_not_exist(backend, seed, live, rest):
    points, features, *cameras = make(seed, live + rest, 3)
    points[0, :3] = torch.tensor([0.2, 0.1, 3.0])
    view = render(backend, points[:live], features[:live], *cameras, SIZE)
    assert view.mask.any()
    points[live:, :3] = torch.tensor([0.0, 0.0, 0.5])  # nearer than anything
    assert_equal_bits(render(backend, points, features, *cameras, SIZE, num_points=live), view)
    shape_one = torch.tensor([live])
    assert_equal_bits(render(backend, points, features, *cameras, SIZE, num_points=shape_one), view)


@pytest.mark.parametrize("live", [0, -1, -(2**40)])
def test_no_live_points(backend, live):
    points, features, *cameras = make(10)
    assert render(backend, points, features, *cameras, SIZE).mask.any()
    assert_all_holes(render(backend, points, features, *cameras, SIZE, num_points=live))


@pytest.mark.parametrize("live", [300, 301, 2**40])
def test_more_live_points_than_rows(backend, live):
    points, features, *cameras = make(11)
    view = render(backend, points, features, *cameras, SIZE)
    assert view.mask.any()
    assert_equal_bits(render(backend, points, features, *cameras, SIZE, num_points=live), view)


def test_views_do_not_see_each_other(backend):
    points, features, intrinsics, cam2world = make(12, views=5)
    together = render(backend, points, features, intrinsics, cam2world, SIZE)
    for t in range(5):
        alone = render(backend, points, features, intrinsics[t : t + 1], cam2world[t : t + 1], SIZE)
        assert alone.mask.any()
        assert_equal_bits(alone, [x[t : t + 1] for x in together])


def test_many_views(backend):
    points, features, intrinsics, cam2world = make(13, 100, 2, views=70)
    together = render(backend, points, features, intrinsics, cam2world, SIZE)
    check(backend, points, features, intrinsics[64:66], cam2world[64:66], SIZE)
    alone = render(backend, points, features, intrinsics[64:66], cam2world[64:66], SIZE)
    assert_equal_bits(alone, [x[64:66] for x in together])


# ---------------------------------------------------------------------------------------------- nothing to see


@pytest.mark.parametrize("views", [0, 1, 3])
def test_empty_cache(backend, views):
    points, features, intrinsics, cam2world = make(14, views=3)
    assert render(backend, points, features, intrinsics, cam2world, SIZE).mask.any()
    view = render(backend, points[:0], features[:0], intrinsics[:views], cam2world[:views], SIZE)
    assert view.latents.shape == (views, 5, *SIZE) and view.index.shape == (views, *SIZE)
    assert_all_holes(view)


@pytest.mark.parametrize("dtype", scenes.DTYPES)
def test_no_views(backend, dtype):
    points, features, intrinsics, cam2world = make(15)
    assert render(backend, points, features, intrinsics, cam2world, SIZE).mask.any()
    view = render(backend, points, features, intrinsics[:0], cam2world[:0], SIZE, dtype=dtype)
    assert view.latents.shape == (0, 5, *SIZE) and view.latents.dtype == dtype
    assert view.mask.shape == view.depth.shape == view.index.shape == (0, *SIZE)


def test_all_points_behind(backend):
    points, features, *cameras = make(16)
    assert render(backend, points, features, *cameras, SIZE).mask.any()
    points[:, 2] = -points[:, 2].abs() - 3
    assert_all_holes(render(backend, points, features, *cameras, SIZE))


def test_no_channels(backend):
    points, _, *cameras = make(17)
    view = render(backend, points, torch.zeros(300, 0), *cameras, SIZE)
    assert view.latents.shape == (2, 0, *SIZE) and int(view.mask.sum()) > 50


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_non_finite_points_are_never_seen(backend, bad, axis):
    points, features, *cameras = make(18)
    view = render(backend, points, features, *cameras, SIZE)
    lost = view.index[view.mask].unique()
    assert len(lost) > 20
    points[lost, axis] = bad
    again = check(backend, points, features, *cameras, SIZE)
    assert not np.isin(again.index.numpy(), lost.numpy()).any()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda k, pose: pose.fill_(math.nan), id="nan pose"),
        pytest.param(lambda k, pose: pose[:3, 3].fill_(math.inf), id="inf translation"),
        pytest.param(lambda k, pose: pose[:3, :3].fill_(math.nan), id="nan rotation"),
        pytest.param(lambda k, pose: pose[:3, :3].zero_(), id="singular rotation"),
        pytest.param(lambda k, pose: pose[:3, :3].fill_(1.0), id="rank one rotation"),
        pytest.param(lambda k, pose: k.fill_(math.nan), id="nan intrinsics"),
        pytest.param(lambda k, pose: k[:2].fill_(math.inf), id="inf intrinsics"),
    ],
)
def test_degenerate_cameras_show_nothing(backend, spoil):
    points, features, intrinsics, cam2world = make(19)
    good = render(backend, points, features, intrinsics[1:], cam2world[1:], SIZE)
    assert good.mask.any()
    spoil(intrinsics[0], cam2world[0])
    view = render(backend, points, features, intrinsics, cam2world, SIZE)
    assert_equal_bits([x[1:] for x in view], good)
    assert_all_holes(type(view)(*(x[:1] for x in view)))


def test_zero_focal_length_reads_in_bounds(backend):
    """Every point falls on the principal point: a legal, if useless, camera."""
    points, features, intrinsics, cam2world = make(20)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = 0
    view = render(backend, points, features, intrinsics, cam2world, SIZE)
    assert view.mask.flatten(1).sum(1).tolist() == [1, 1]


@given(seed=st.integers(0, 10**6))
def test_random_bits_read_in_bounds(backend, seed):
    """Points and cameras of random bit patterns: any float there is, subnormals, NaN and infinities among them."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (200, 4), dtype=np.uint32).view(np.float32)
    points = torch.from_numpy(np.concatenate([bits, np.float32([[0.5, 0.5, 1, 1]])]))
    features = torch.from_numpy(rng.normal(size=(201, 3))).float()
    intrinsics = torch.from_numpy(rng.integers(0, 2**63, (3, 3, 3)).view(np.float64))
    cam2world = torch.from_numpy(rng.integers(0, 2**63, (3, 4, 4)).view(np.float64))
    intrinsics[0], cam2world[0] = torch.eye(3), torch.eye(4)
    view = render(backend, points, features, intrinsics, cam2world, SIZE)
    assert view.mask[0].any() and int(view.index.max()) <= 200 and int(view.index.min()) == -1
    picked = features[view.index.clamp(min=0)].masked_fill(~view.mask[..., None], 0).movedim(3, 1)
    assert_equal_bits([view.latents], [picked])
    assert torch.isfinite(view.depth).all() and (view.depth[view.mask] > 0.05).all()


# ---------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("dtype", scenes.DTYPES)
def test_strided_and_expanded_inputs(backend, dtype):
    arguments = make(21, 300, 9, dtype=dtype)
    plain = check(backend, *arguments, SIZE, least_covered=50)
    assert_equal_bits(render(backend, *[scenes.strided(x) for x in arguments], SIZE), plain)
    assert_equal_bits(render(backend, *[x.mT.contiguous().mT for x in arguments], SIZE), plain)
    points, features, intrinsics, cam2world = arguments
    one_camera = intrinsics[:1].expand(4, 3, 3), cam2world[:1].expand(4, 4, 4)
    expanded = render(backend, points, features, *one_camera, SIZE)
    assert_equal_bits(expanded, [x[:1].expand(4, *x.shape[1:]) for x in plain])
    one_feature = render(backend, points, features[:1].expand(300, 9), intrinsics, cam2world, SIZE)
    assert_equal_bits(one_feature[1:], plain[1:])
    assert torch.equal(one_feature.latents.movedim(1, 3)[plain.mask], features[:1].expand(int(plain.mask.sum()), 9))


def test_an_unaligned_slice_of_a_buffer(backend):
    """Rows of a larger buffer: the first point is not at the start of an allocation."""
    points, features, *cameras = make(22)
    plain = render(backend, points[3:], features[3:].clone(), *cameras, SIZE)
    assert plain.mask.any()
    flat = torch.zeros(300 * 4 + 1)
    flat[1:] = points.flatten()
    assert_equal_bits(render(backend, flat[1:].view(300, 4)[3:], features[3:], *cameras, SIZE), plain)


def test_inputs_are_not_written(backend):
    arguments = make(23)
    before = [x.clone() for x in arguments]
    assert render(backend, *arguments, SIZE).mask.any()
    assert_equal_bits(arguments, before)


def test_outputs_are_contiguous(backend):
    view = render(backend, *make(24), SIZE)
    assert view.mask.any() and all(x.is_contiguous() for x in view)


# ---------------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("dtype", scenes.DTYPES)
@pytest.mark.parametrize("out", scenes.DTYPES)
def test_gradient_is_the_sum_over_the_cells_won(backend, dtype, out):
    points, features, *cameras = make(25, 60, 3, views=3)
    features = features.to(dtype)
    leaf = backend.put(features).requires_grad_()
    view = splat(
        *[backend.put(x) if x is not features else leaf for x in (points, features, *cameras)], SIZE, dtype=out
    )
    assert view.latents.requires_grad
    assert not (view.mask.requires_grad or view.depth.requires_grad or view.index.requires_grad)
    weights = torch.from_numpy(np.random.default_rng(25).uniform(-1, 1, view.latents.shape)).to(out)
    view.latents.backward(backend.put(weights))
    assert leaf.grad.dtype == dtype and leaf.grad.shape == features.shape
    expected = brute_force.splat_backward(as_array(weights), as_array(view.index), 60)
    assert (np.abs(expected).sum(1) > 0).sum() > 20 and view.index.unique().numel() < 62
    # Summed in float32 whatever the dtype of the latents, and rounded once.
    half_step = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
    np.testing.assert_allclose(as_array(leaf.grad), expected, rtol=1.01 * half_step[dtype], atol=1e-6)
    unseen = np.setdiff1d(np.arange(60), as_array(view.index))
    assert len(unseen) > 0 and not as_array(leaf.grad)[unseen].any()


def test_gradient_of_strided_and_expanded_gradients(backend):
    points, features, *cameras = make(26, 60, 3)
    arguments = [backend.put(x) for x in (points, features, *cameras)]
    grads = []
    for loss in (
        lambda x: x.sum(),  # an expanded gradient
        lambda x: (x * torch.ones_like(x)).sum(),
        lambda x: x.movedim(1, 3).reshape(-1).sum(),  # a strided one
    ):
        arguments[1] = arguments[1].detach().requires_grad_()
        loss(splat(*arguments, SIZE).latents).backward()
        grads.append(arguments[1].grad)
    assert grads[0].any()
    assert_equal_bits(grads[1:], [grads[0]] * 2)


def test_gradient_of_nothing(backend):
    points, features, intrinsics, cam2world = make(27, 60, 3)
    leaf = backend.put(features).requires_grad_()
    for count in (60, 0):
        arguments = [backend.put(x[:count]) for x in (points,)] + [backend.put(x) for x in (intrinsics, cam2world)]
        view = splat(arguments[0], leaf[:count], *arguments[1:], SIZE)
        (grad,) = torch.autograd.grad(view.latents.sum(), leaf)
        assert bool(grad.any()) == (count > 0)
    with torch.no_grad():
        assert not splat(backend.put(points), leaf, *arguments[1:], SIZE).latents.requires_grad

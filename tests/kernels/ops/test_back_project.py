"""`back_project` on every backend, against the brute force and by its own rules."""

from __future__ import annotations

import math

import brute_force
import numpy as np
import pytest
import scenes
import torch
from comparison import as_array, assert_equal_bits, assert_same_lift
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mirage_kernels import back_project

SAMPLINGS = ("median", "bilinear")


def make(seed, views=2, image_size=(37, 53), unknown=0.2):
    rng = np.random.default_rng(seed)
    depth = scenes.depth_maps(rng, views, image_size, unknown)
    return depth, scenes.intrinsics(rng, views, image_size), scenes.poses(rng, views)


def lift(backend, depth, intrinsics, cam2world, size, mask=None, **options):
    arguments = [backend.put(x) for x in (depth, intrinsics, cam2world)]
    lifted = back_project(*arguments, size, mask=backend.put(mask), **options)
    backend.sync()
    assert lifted.points.device.type == lifted.valid.device.type == backend.device.type
    return type(lifted)(lifted.points.cpu(), lifted.valid.cpu())


def check(backend, depth, intrinsics, cam2world, size, **options):
    least = options.pop("least_valid", 1)
    lifted = lift(backend, depth, intrinsics, cam2world, size, **options)
    assert_same_lift(lifted, depth, intrinsics, cam2world, size, least_valid=least, **options)
    return lifted


# ---------------------------------------------------------------------------------------------- against the brute force


@pytest.mark.parametrize("depth_sampling", SAMPLINGS)
@pytest.mark.parametrize(
    "image_size, size",
    [
        ((37, 53), (5, 7)),  # no multiple
        ((32, 48), (4, 6)),  # a multiple
        ((6, 9), (6, 9)),  # as fine as the grid
        ((11, 13), (7, 12)),  # cells of one and two pixels
        ((40, 40), (1, 1)),
        ((17, 64), (1, 9)),
        ((5, 16), (5, 1)),
        ((160, 16), (2, 2)),  # cells of many pixels
    ],
)
def test_any_resolution(backend, image_size, size, depth_sampling):
    check(backend, *make(1, image_size=image_size, unknown=0.1), size, depth_sampling=depth_sampling)


@given(
    seed=st.integers(0, 10**6),
    views=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 7)),
    extra=st.tuples(st.integers(0, 25), st.integers(0, 25)),
    unknown=st.sampled_from([0.0, 0.1, 0.4]),
    depth_sampling=st.sampled_from(SAMPLINGS),
)
def test_random_scenes(backend, seed, views, grid, extra, unknown, depth_sampling):
    image_size = grid[0] + extra[0], grid[1] + extra[1]
    depth, *cameras = make(seed, views, image_size, unknown)
    depth[0, : image_size[0] // 2 + 1] = 2.5  # something is always known
    check(backend, depth, *cameras, grid, depth_sampling=depth_sampling)


@given(
    seed=st.integers(0, 10**6),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    mask_extra=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    moving=st.sampled_from([0.0, 0.01, 0.1]),
)
def test_random_masks_of_any_resolution(backend, seed, grid, mask_extra, moving):
    depth, *cameras = make(seed, 2, (grid[0] * 5 + 2, grid[1] * 4 + 3), 0.0)
    mask_size = grid[0] + mask_extra[0], grid[1] + mask_extra[1]
    mask = scenes.static_masks(np.random.default_rng(seed), 2, mask_size, moving)
    mask[0] = True
    lifted = check(backend, depth, *cameras, grid, mask=mask)
    assert lifted.valid[0].all()


@pytest.mark.parametrize("depth_sampling", SAMPLINGS)
def test_real_room(backend, shared_dir, depth_sampling):
    room = load_file(shared_dir / "data/golden/latent_point_cloud.safetensors")
    depth, cam2world = room["depth"][:2], room["cam2world"][:2]
    intrinsics = room["intrinsics"].expand(2, 3, 3)
    mask = room["exclude_masks"][:2] == 0
    valid = assert_same_lift(
        lift(backend, depth, intrinsics, cam2world, (30, 40), mask=mask, depth_sampling=depth_sampling),
        depth,
        intrinsics,
        cam2world,
        (30, 40),
        mask=mask,
        depth_sampling=depth_sampling,
    )
    assert valid > 1000


def test_the_definition_in_float64():
    depth, intrinsics, cam2world = make(3)
    lifted = back_project(depth.double(), intrinsics, cam2world, (5, 7))
    assert lifted.points.dtype == torch.float64
    assert_same_lift(lifted, depth.double(), intrinsics, cam2world, (5, 7), least_valid=30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_depth_is_widened(backend, dtype):
    depth, *cameras = make(4)
    low = lift(backend, depth.to(dtype), *cameras, (5, 7))
    assert low.points.dtype == torch.float32 and low.valid.any()
    assert_equal_bits(low, lift(backend, depth.to(dtype).float(), *cameras, (5, 7)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_camera_dtypes(backend, dtype):
    depth, intrinsics, cam2world = make(5)
    intrinsics, cam2world = intrinsics.to(dtype), cam2world.to(dtype)
    lifted = check(backend, depth, intrinsics, cam2world, (5, 7), least_valid=30)
    assert_equal_bits(lifted, lift(backend, depth, intrinsics.double(), cam2world.double(), (5, 7)))


# ---------------------------------------------------------------------------------------------- geometry


def test_one_pixel_by_hand(backend):
    """fx 2, cx 1 and z 4 in column 0: x = (0.5 - 1) 4 / 2 = -1; a quarter turn about y takes it to +z."""
    depth = torch.full((1, 2, 2), 4.0)
    intrinsics = torch.tensor([[[2.0, 0, 1], [0, 4, 1], [0, 0, 1]]])
    cam2world = torch.tensor([[[0.0, 0, 1, 10], [0, 1, 0, 20], [-1, 0, 0, 30], [0, 0, 0, 1]]])
    lifted = lift(backend, depth, intrinsics, cam2world, (2, 2))
    assert lifted.valid.all()
    assert lifted.points[0, 0, 0].tolist() == [14, 19.5, 31, 2]
    assert lifted.points[0, 1, 1].tolist() == [14, 20.5, 29, 2]


def test_resizing_scales_intrinsics_and_nothing_else(backend):
    """On a wall facing the camera, a token's ray meets the wall at the centre of its cell of pixels."""
    depth = torch.full((1, 12, 20), 3.0)
    intrinsics = torch.tensor([[[10.0, 0, 9], [0, 12, 5], [0, 0, 1]]])
    lifted = lift(backend, depth, intrinsics, torch.eye(4)[None], (3, 4))
    for i in range(3):
        for j in range(4):
            x, y, z, footprint = lifted.points[0, i, j].tolist()
            assert math.isclose(x, ((j + 0.5) * 5 - 9) * 3 / 10, rel_tol=1e-6)
            assert math.isclose(y, ((i + 0.5) * 4 - 5) * 3 / 12, rel_tol=1e-6)
            assert z == 3 and math.isclose(footprint, 3 / (10 * 4 / 20), rel_tol=1e-6)


@pytest.mark.parametrize("focal", [1e-3, 1.0, 1e3, 1e6])
def test_extreme_intrinsics(backend, focal):
    depth, intrinsics, cam2world = make(6)
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = focal, focal * 2
    check(backend, depth, intrinsics, cam2world, (5, 7), least_valid=30)


def test_distant_principal_point(backend):
    depth, intrinsics, cam2world = make(7)
    intrinsics[:, :2, 2] = torch.tensor([[-1e4, 1e4], [3e4, -3e4]])
    check(backend, depth, intrinsics, cam2world, (5, 7), least_valid=30)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_any_unit_of_length(backend, scale):
    depth, intrinsics, cam2world = make(8)
    cam2world[:, :3, 3] *= scale
    check(backend, depth * scale, intrinsics, cam2world, (5, 7), least_valid=30)


# ---------------------------------------------------------------------------------------------- depth sampling


def one_cell(backend, pixels):
    """Token depth of one cell of 2 x n/2 pixels, or None where it is unknown."""
    depth = torch.tensor(pixels, dtype=torch.float32).reshape(1, 2, -1)
    lifted = lift(backend, depth, torch.eye(3)[None], torch.eye(4)[None], (1, 1))
    return lifted.points[0, 0, 0, 2].item() if lifted.valid.item() else None


@pytest.mark.parametrize("unknown", scenes.UNKNOWN)
def test_half_valid_rule_exactly_at_half(backend, unknown):
    assert one_cell(backend, [1, 2, unknown, unknown]) == 1
    assert one_cell(backend, [unknown, 3, unknown, unknown]) is None
    assert one_cell(backend, [unknown, unknown, unknown, 5, 6, 4]) == 5
    assert one_cell(backend, [unknown, unknown, unknown, unknown, 6, 4]) is None
    assert one_cell(backend, [unknown] * 6) is None


def test_half_valid_rule_in_cells_of_an_odd_count(backend):
    depth = torch.tensor([[[1.0, 0, 3, 1, 0, 0]]])  # cells of 3 pixels: two known, then one
    intrinsics = torch.eye(3)[None]
    lifted = lift(backend, depth, intrinsics, torch.eye(4)[None], (1, 2))
    assert lifted.valid[0, 0].tolist() == [True, False]
    assert lifted.points[0, 0, 0, 2] == 1


@pytest.mark.parametrize(
    "pixels, median",
    [([4, 1, 3, 2], 2), ([1, 2], 1), ([2, 2, 2, 9], 2), ([7, 5, 6, 5, 8, 9], 6), ([1, 9, 0, 0], 1), ([3, 1, 2, 0], 2)],
)
def test_lower_median_of_even_counts(backend, pixels, median):
    assert one_cell(backend, pixels) == median


def test_median_of_extreme_depths(backend):
    """From the least subnormal to the largest float32: a depth is known as long as it is positive and finite."""
    assert one_cell(backend, [1e-3, 3e38, 2e-3, 3.4e38]) == np.float32(2e-3)
    assert one_cell(backend, [1e30, 1e30, 1e30, 1e-30]) == np.float32(1e30)
    assert one_cell(backend, [1e-38, 1e-37, 2e-37, 3e-37]) == np.float32(1e-37)


@given(seed=st.integers(0, 10**6), height=st.integers(1, 9), width=st.integers(1, 9))
def test_median_does_not_depend_on_the_order_of_pixels(backend, seed, height, width):
    rng = np.random.default_rng(seed)
    depth, intrinsics, cam2world = make(seed, 1, (height, width), 0.3)
    depth[0, 0, 0] = 1.0
    depth = torch.where(torch.from_numpy(rng.random((1, height, width)) < 0.5), 2.0, depth)  # many ties
    depth.view(-1)[: (height * width + 1) // 2] = 2.0
    shuffled = depth.view(-1)[torch.from_numpy(rng.permutation(height * width))].reshape(depth.shape)
    first = lift(backend, depth, intrinsics, cam2world, (1, 1))
    assert first.valid.all()
    assert_equal_bits(first, lift(backend, shuffled, intrinsics, cam2world, (1, 1)))


def test_bilinear_blends_zeros_into_surfaces(backend):
    depth = torch.tensor([[[4.0, 0.0], [4.0, 0.0]], [[4.0, 4.0], [4.0, math.nan]], [[4.0, 4.0], [math.inf, 4.0]]])
    cameras = torch.eye(3).expand(3, 3, 3), torch.eye(4).expand(3, 4, 4)
    lifted = lift(backend, depth, *cameras, (1, 1), depth_sampling="bilinear")
    assert lifted.valid.flatten().tolist() == [True, False, False]
    assert lifted.points[0, 0, 0, 2] == 2


@pytest.mark.parametrize("size", [(5, 7), (12, 20), (15, 27), (6, 10)])
def test_bilinear_is_torchs_interpolation(backend, size):
    """Half-pixel centres, edges clamped, no antialiasing: `torch.nn.functional.interpolate` is what users know."""
    depth, intrinsics, _ = make(9, 2, (12, 20), 0.0)
    lifted = lift(backend, depth, intrinsics, torch.eye(4).expand(2, 4, 4), size, depth_sampling="bilinear")
    expected = torch.nn.functional.interpolate(depth[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    assert lifted.valid.all() and (expected > 0).all()
    torch.testing.assert_close(lifted.points[..., 2], expected, rtol=1e-5, atol=0)


def test_bilinear_of_nothing_known(backend):
    depth = torch.tensor([[[0.0, -1.0], [float("inf"), float("nan")]], [[1.0, 1], [1, 1]]])
    cameras = torch.eye(3).expand(2, 3, 3), torch.eye(4).expand(2, 4, 4)
    lifted = lift(backend, depth, *cameras, (1, 1), depth_sampling="bilinear")
    assert lifted.valid.flatten().tolist() == [False, True]


# ---------------------------------------------------------------------------------------------- what is never lifted


@pytest.mark.parametrize("depth_sampling", SAMPLINGS)
@pytest.mark.parametrize("unknown", scenes.UNKNOWN)
def test_unknown_depth_is_never_lifted(backend, unknown, depth_sampling):
    depth, *cameras = make(10, 2, (12, 14), 0.0)
    depth[0] = unknown
    lifted = check(backend, depth, *cameras, (3, 7), depth_sampling=depth_sampling)
    assert not lifted.valid[0].any() and not lifted.points[0].any()
    assert lifted.valid[1].all() and torch.isfinite(lifted.points).all()


def test_one_moving_pixel_makes_a_token_moving(backend):
    depth, *cameras = make(11, 1, (12, 20), 0.0)
    for row, column in ((0, 0), (5, 9), (11, 19), (4, 5)):
        mask = torch.ones(1, 12, 20, dtype=torch.bool)
        mask[0, row, column] = False
        lifted = lift(backend, depth, *cameras, (3, 4), mask=mask)
        expected = torch.ones(3, 4, dtype=torch.bool)
        expected[row // 4, column // 5] = False
        assert torch.equal(lifted.valid[0], expected)


def test_mask_on_and_off(backend):
    depth, *cameras = make(12, 2, (12, 20), 0.0)
    mask = torch.ones(2, 12, 20, dtype=torch.bool)
    whole = lift(backend, depth, *cameras, (3, 4), mask=mask)
    assert whole.valid.all()
    assert_equal_bits(whole, lift(backend, depth, *cameras, (3, 4)))
    nothing = lift(backend, depth, *cameras, (3, 4), mask=~mask)
    assert not nothing.valid.any() and not nothing.points.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["rotation", "translation"])
def test_non_finite_poses_show_nothing(backend, which, bad):
    depth, intrinsics, cam2world = make(13, 2, (12, 20), 0.0)
    good = lift(backend, depth[1:], intrinsics[1:], cam2world[1:], (3, 4))
    if which == "rotation":
        cam2world[0, :3, :3] = bad
    else:
        cam2world[0, :3, 3] = bad
    lifted = lift(backend, depth, intrinsics, cam2world, (3, 4))
    assert not lifted.valid[0].any() and not lifted.points[0].any()
    assert good.valid.all()
    assert_equal_bits([lifted.points[1:], lifted.valid[1:]], good)


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_singular_intrinsics_show_nothing(backend, bad):
    depth, intrinsics, cam2world = make(14, 2, (12, 20), 0.0)
    intrinsics[0, 0, 0] = intrinsics[0, 1, 1] = bad
    lifted = lift(backend, depth, intrinsics, cam2world, (3, 4))
    assert not lifted.valid[0].any() and not lifted.points[0].any()
    assert lifted.valid[1].all() and torch.isfinite(lifted.points[1]).all()


# ---------------------------------------------------------------------------------------------- shapes and layouts


@pytest.mark.parametrize("with_mask", [False, True])
def test_no_views(backend, with_mask):
    depth, *cameras = make(15)
    mask = torch.ones(2, 37, 53, dtype=torch.bool) if with_mask else None
    assert lift(backend, depth, *cameras, (5, 7), mask=mask).valid.any()
    none = [x[:0] for x in (depth, *cameras)]
    lifted = lift(backend, *none, (5, 7), mask=mask[:0] if with_mask else None)
    assert lifted.points.shape == (0, 5, 7, 4) and lifted.valid.shape == (0, 5, 7)
    assert lifted.points.dtype == torch.float32 and lifted.valid.dtype == torch.bool


def test_views_do_not_see_each_other(backend):
    depth, *cameras = make(16, 3)
    together = lift(backend, depth, *cameras, (5, 7))
    assert together.valid.any(-1).any(-1).all()
    for t in range(3):
        alone = lift(backend, *[x[t : t + 1] for x in (depth, *cameras)], (5, 7))
        assert_equal_bits(alone, [together.points[t : t + 1], together.valid[t : t + 1]])


@pytest.mark.parametrize("depth_sampling", SAMPLINGS)
def test_strided_and_expanded_inputs(backend, depth_sampling):
    depth, intrinsics, cam2world = make(17)
    mask = scenes.static_masks(np.random.default_rng(17), 2, (37, 53), 0.005)
    plain = check(backend, depth, intrinsics, cam2world, (5, 7), mask=mask, depth_sampling=depth_sampling)
    strided = [scenes.strided(x) for x in (depth, intrinsics, cam2world)]
    assert_equal_bits(lift(backend, *strided, (5, 7), mask=scenes.strided(mask), depth_sampling=depth_sampling), plain)
    transposed = depth.mT.contiguous().mT, intrinsics.mT.contiguous().mT, cam2world.mT.contiguous().mT
    assert_equal_bits(lift(backend, *transposed, (5, 7), mask=mask, depth_sampling=depth_sampling), plain)
    one = [x[:1].expand(3, -1, -1) for x in (depth, intrinsics, cam2world)]
    expanded = lift(backend, *one, (5, 7), mask=mask[:1].expand(3, -1, -1), depth_sampling=depth_sampling)
    assert_equal_bits(expanded, [x[:1].expand(3, *x.shape[1:]) for x in plain])


def test_broadcast_rows_and_columns(backend):
    """Depth and mask that are one value in memory."""
    _, *cameras = make(18, 2, (12, 20))
    depth = torch.tensor(2.5).expand(2, 12, 20)
    mask = torch.tensor(True).expand(2, 12, 20)
    assert check(backend, depth, *cameras, (3, 4), mask=mask).valid.all()


def test_inputs_are_not_written(backend):
    depth, *cameras = make(19)
    before = [x.clone() for x in (depth, *cameras)]
    assert lift(backend, depth, *cameras, (5, 7)).valid.any()
    assert_equal_bits([depth, *cameras], before)


def test_large_maps(backend):
    """Cells of 16 x 16 pixels, as many tokens as a real frame, spot-checked against the brute force."""
    depth, intrinsics, cam2world = make(21, 1, (352, 640), 0.3)
    lifted = lift(backend, depth, intrinsics, cam2world, (22, 40))
    assert int(lifted.valid.sum()) > 800
    world2cam = np.linalg.inv(as_array(cam2world)[0])
    z = as_array(lifted.points)[0, ..., :3] @ world2cam[2, :3] + world2cam[2, 3]
    for i, j in ((0, 0), (3, 39), (21, 39), (11, 20), (21, 0)):
        cell = as_array(depth)[0, i * 16 : i * 16 + 16, j * 16 : j * 16 + 16]
        expected = brute_force.sample_median(cell, list(range(16)), list(range(16)))
        assert bool(lifted.valid[0, i, j]) == (expected > 0)
        assert expected == 0 or math.isclose(z[i, j], expected, rel_tol=1e-5)

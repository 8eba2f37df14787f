"""`cache_write` on every backend, against the brute force and by its own rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits, assert_same_write
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mirage_kernels import back_project, cache_write, splat

GRID = (5, 7)
IMAGE = (23, 36)


def make(seed, views=2, channels=4, grid=GRID, image_size=IMAGE, unknown=0.3, dtype=torch.float32):
    """latents, depth, intrinsics, cam2world; one latent in fifty is NaN or infinite."""
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(views, channels, *grid)).astype(np.float32)
    bad = rng.random((views, channels, *grid)) < 0.02 / channels
    latents[bad] = rng.choice([math.nan, math.inf, -math.inf], int(bad.sum()))
    depth = scenes.depth_maps(rng, views, image_size, unknown)
    return (
        torch.from_numpy(latents).to(dtype),
        depth,
        scenes.intrinsics(rng, views, image_size),
        scenes.poses(rng, views),
    )


def write(backend, buffers, arguments, **options):
    """A write into copies of the buffers: (buffers after, report), on the host."""
    buffers = [backend.put(x).clone() for x in buffers]
    options = {name: backend.put(value) for name, value in options.items()}
    report = cache_write(*buffers, *[backend.put(x) for x in arguments], **options)
    backend.sync()
    assert report.device.type == backend.device.type
    return tuple(x.cpu() for x in buffers), report.cpu()


def check(backend, before, arguments, **options):
    least = options.pop("least_written", 1)
    after, report = write(backend, before, arguments, **options)
    assert_same_write(after, report, before, *arguments, least_written=least, **options)
    return after, report


# ---------------------------------------------------------------------------------------------- against the brute force


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 17, 48, 130])
@pytest.mark.parametrize("held", [0, 5])
def test_channels(backend, channels, held):
    check(backend, scenes.buffers(100, channels, held=held), make(1, channels=channels), least_written=30)


@pytest.mark.parametrize("dtype", scenes.DTYPES)
@pytest.mark.parametrize("stored", scenes.DTYPES)
@pytest.mark.parametrize("channels", [4, 24])
def test_dtype_pairs(backend, dtype, stored, channels):
    arguments = make(2, channels=channels, dtype=dtype, image_size=(40, 56))
    arguments[0][:, :, ::2] *= 1e-3  # rounds to subnormals of float16
    check(backend, scenes.buffers(100, channels, stored, held=3), arguments, least_written=30)


@pytest.mark.parametrize(
    "grid, image_size",
    [
        ((1, 1), (8, 8)),
        ((1, 9), (17, 64)),
        ((6, 1), (6, 16)),
        ((6, 9), (6, 9)),
        ((7, 33), (15, 70)),
        ((3, 16), (9, 80)),
    ],
)
def test_grids(backend, grid, image_size):
    arguments = make(3, 2, 3, grid, image_size, unknown=0.1)
    arguments[0].nan_to_num_(0.5, 0.5, 0.5)
    check(backend, scenes.buffers(500, 3), arguments)


@pytest.mark.parametrize("depth_sampling", ["median", "bilinear"])
@pytest.mark.parametrize("masked", [False, True])
def test_depth_sampling_and_mask(backend, depth_sampling, masked):
    mask = scenes.static_masks(np.random.default_rng(4), 2, (31, 29), 0.03) if masked else None
    arguments = make(4, unknown=0.1)
    _, report = check(backend, scenes.buffers(100, 4), arguments, mask=mask, depth_sampling=depth_sampling)
    assert (report[2] > 0) == masked


@given(
    seed=st.integers(0, 10**6),
    views=st.integers(1, 3),
    channels=st.integers(1, 9),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 8)),
    extra=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    capacity=st.integers(0, 60),
    held=st.integers(0, 8),
    unknown=st.sampled_from([0.0, 0.3, 0.6]),
    moving=st.sampled_from([None, 0.0, 0.05]),
    reach=st.sampled_from([(0.0, math.inf), (2.1, 2.4), (0.0, 2.2), (2.2, math.inf)]),
)
def test_random_writes(backend, seed, views, channels, grid, extra, capacity, held, unknown, moving, reach):
    image_size = grid[0] + extra[0], grid[1] + extra[1]
    arguments = make(seed, views, channels, grid, image_size, unknown)
    mask = None if moving is None else scenes.static_masks(np.random.default_rng(seed), views, image_size, moving)
    options = dict(mask=mask, first_frame=seed % 1000, min_depth=reach[0], max_depth=reach[1])
    # Room or no room and depth or no depth, reports and buffers must agree; then a write that keeps its first token.
    before = scenes.buffers(capacity + held, channels, held=held)
    check(backend, before, arguments, least_written=0, **options)
    arguments[0][0, :, 0, 0], arguments[1][0, :, :] = 1.0, 2.3 if reach[0] > 2.1 else 2.15
    options["mask"] = None
    check(backend, scenes.buffers(capacity + held + 1, channels, held=held), arguments, **options)


def test_real_room(backend, shared_dir):
    room = load_file(shared_dir / "data/golden/latent_point_cloud.safetensors")
    arguments = room["latents"][:2], room["depth"][:2], room["intrinsics"].expand(2, 3, 3), room["cam2world"][:2]
    mask = room["exclude_masks"][:2] == 0
    check(backend, scenes.buffers(3000, 8), arguments, mask=mask, first_frame=7, least_written=1500)


# ---------------------------------------------------------------------------------------------- the rules, by hand


def cell_scene(latents, depth):
    """One camera, one token per pixel, x and y of a token at depth z: (j + 0.5) z, (i + 0.5) z."""
    depth = torch.as_tensor(depth, dtype=torch.float32)[None]
    latents = torch.as_tensor(latents, dtype=torch.float32)[None]
    return latents, depth, torch.eye(3)[None], torch.eye(4)[None]


def test_two_tokens_by_hand(backend):
    arguments = cell_scene([[[1.0, 2.0]], [[3.0, 4.0]]], [[2.0, 4.0]])
    after, report = write(backend, scenes.buffers(4, 2, held=1), arguments, first_frame=9)
    points, features, frame_ids, count = after
    assert report.tolist() == [2, 0, 0, 0, 0, 0] and count.item() == 3
    assert points[1:3].tolist() == [[1, 1, 2, 2], [6, 2, 4, 4]]
    assert features[1:3].tolist() == [[1, 3], [2, 4]] and frame_ids[1:3].tolist() == [9, 9]


def test_each_token_is_counted_once_under_the_first_that_applies(backend):
    """Six tokens with more and more wrong with them."""
    nan = math.nan
    latents = [[[1.0, nan, nan, nan, nan, 1.0]]]
    depth = [[1.0, 1.0, 9.0, 0.0, 0.0, 1.0]]
    mask = torch.tensor([[[True, True, True, True, False, True]]])
    options = dict(mask=mask, min_depth=0.5, max_depth=5.0)
    after, report = write(backend, scenes.buffers(1, 1), cell_scene(latents, depth), **options)
    #        written, refused, masked, unknown_depth, out_of_range, non_finite
    assert report.tolist() == [1, 1, 1, 1, 1, 1] and after[3].item() == 1


def test_range_is_inclusive(backend):
    """Bounds are compared in float32, as depth is: 0.1 holds a depth of 0.1."""
    depth = [[0.1, 0.2, 0.3, 0.7, 0.9]]
    arguments = cell_scene([[[1.0, 2, 3, 4, 5]]], depth)
    for low, high, kept in (
        (0.2, 0.7, [2, 3, 4]),
        (0.1, 0.1, [1]),
        (0.0, 0.9, [1, 2, 3, 4, 5]),
        (0.3, math.inf, [3, 4, 5]),
    ):
        after, report = write(backend, scenes.buffers(9, 1), arguments, min_depth=low, max_depth=high)
        assert after[1][: len(kept), 0].tolist() == kept
        assert report.tolist() == [len(kept), 0, 0, 0, 5 - len(kept), 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels", [1, 3, 16, 48])
@pytest.mark.parametrize("dtype", scenes.DTYPES)
def test_latents_that_are_not_finite_are_never_stored(backend, bad, channels, dtype):
    """One bad value in any channel, at the ends of a row of tokens and inside it."""
    latents, depth, *cameras = make(5, 1, channels, (2, 19), (4, 38), unknown=0.0)
    latents.nan_to_num_(0.5, 0.5, 0.5)
    for spot in (0, 1, 8, 18):
        spoilt = latents.clone().to(dtype)
        spoilt[0, spot % channels, 1, spot] = bad
        after, report = write(backend, scenes.buffers(50, channels, dtype), (spoilt, depth, *cameras))
        assert report.tolist() == [37, 0, 0, 0, 0, 1]
        assert torch.isfinite(after[1]).all() and torch.isfinite(after[0]).all()
        order = [k for k in range(38) if k != 19 + spot]
        assert torch.equal(after[1][:37], spoilt[0].flatten(1).T[order])


@pytest.mark.parametrize("depth_sampling", ["median", "bilinear"])
@pytest.mark.parametrize("unknown", scenes.UNKNOWN)
def test_unknown_depth_is_never_written(backend, unknown, depth_sampling):
    latents, depth, *cameras = make(6, unknown=0.0)
    latents.nan_to_num_(0.5, 0.5, 0.5)
    depth[1] = unknown
    after, report = write(backend, scenes.buffers(100, 4), (latents, depth, *cameras), depth_sampling=depth_sampling)
    assert report.tolist() == [35, 0, 0, 35, 0, 0] and after[3].item() == 35
    depth[0] = unknown
    before = scenes.buffers(100, 4)
    after, report = write(backend, before, (latents, depth, *cameras), depth_sampling=depth_sampling)
    assert report.tolist() == [0, 0, 0, 70, 0, 0]
    assert_equal_bits(after, before)


def test_every_mask_off(backend):
    arguments = make(7)
    before = scenes.buffers(100, 4, held=2)
    on = torch.ones(2, *IMAGE, dtype=torch.bool)
    assert write(backend, before, arguments, mask=on)[1][0] > 30
    after, report = write(backend, before, arguments, mask=~on)
    assert report.tolist() == [0, 0, 70, 0, 0, 0]
    assert_equal_bits(after, before)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda k, pose: pose.fill_(math.nan), id="nan pose"),
        pytest.param(lambda k, pose: pose[:3, 3].fill_(math.inf), id="inf translation"),
        pytest.param(lambda k, pose: pose[1, 3].fill_(math.nan), id="one nan"),
        pytest.param(lambda k, pose: k[:2, :2].zero_(), id="singular intrinsics"),
        pytest.param(lambda k, pose: k.fill_(math.nan), id="nan intrinsics"),
    ],
)
def test_degenerate_cameras_write_nothing(backend, spoil):
    latents, depth, intrinsics, cam2world = make(8, unknown=0.0)
    latents.nan_to_num_(0.5, 0.5, 0.5)
    spoil(intrinsics[0], cam2world[0])
    before = scenes.buffers(100, 4)
    after, report = write(backend, before, (latents, depth, intrinsics, cam2world))
    assert report.tolist() == [35, 0, 0, 0, 0, 35]
    assert after[2][:35].tolist() == [1] * 35 and torch.isfinite(after[0]).all()
    only = write(backend, before, (latents[1:], depth[1:], intrinsics[1:], cam2world[1:]), first_frame=1)
    assert_equal_bits(after, only[0])


# ---------------------------------------------------------------------------------------------- room


@pytest.mark.parametrize("room", [0, 1, 7, 8, 9, 34, 35, 36, 69])
def test_what_does_not_fit_is_refused_and_counted(backend, room):
    arguments = make(9, unknown=0.0)
    arguments[0].nan_to_num_(0.5, 0.5, 0.5)
    whole, _ = check(backend, scenes.buffers(73, 4, held=3), arguments, least_written=70)
    before = scenes.buffers(room + 3, 4, held=3)
    after, report = check(backend, before, arguments, least_written=min(room, 70))
    assert report.tolist() == [room, 70 - room, 0, 0, 0, 0] and after[3].item() == room + 3
    assert_equal_bits([x[3:] for x in after[:3]], [x[3 : room + 3] for x in whole[:3]])
    # Full: nothing changes any more, and everything is refused.
    again, report = write(backend, after, arguments)
    assert report.tolist() == [0, 70, 0, 0, 0, 0]
    assert_equal_bits(again, after)


def test_no_room_at_all(backend):
    arguments = make(10)
    _, full = write(backend, scenes.buffers(100, 4), arguments)
    after, report = write(backend, scenes.buffers(0, 4), arguments)
    assert full[0] > 30 and report[0] == 0 and report[1] == full[0] and after[3].item() == 0


@pytest.mark.parametrize("count", [-1, 101, 2**40])
def test_a_count_outside_the_buffers_writes_nothing(backend, count):
    """The count may be anything when it lives on a GPU: refused with an error or in the report, never out of bounds."""
    arguments = make(11)
    assert write(backend, scenes.buffers(100, 4), arguments)[1][0] > 30
    before = scenes.buffers(100, 4, held=count)
    buffers = [backend.put(x).clone() for x in before]
    try:
        report = cache_write(*buffers, *[backend.put(x) for x in arguments])
        backend.sync()
        assert report[0] == 0
    except (ValueError, RuntimeError) as error:
        assert "count" in str(error)
    assert_equal_bits(buffers, before)


def test_writes_add_up(backend):
    """View by view is the same as all at once."""
    latents, depth, *cameras = make(12, 4)
    before = scenes.buffers(200, 4)
    whole, report = check(backend, before, (latents, depth, *cameras), least_written=60, first_frame=3)
    step, total = before, torch.zeros(6, dtype=torch.int64)
    for t in range(4):
        one = [x[t : t + 1] for x in (latents, depth, *cameras)]
        step, part = write(backend, step, one, first_frame=3 + t)
        total += part
    assert_equal_bits(step, whole)
    assert torch.equal(total, report)


def test_written_tokens_are_back_projected_tokens(backend):
    latents, depth, *cameras = make(13)
    latents.nan_to_num_(0.5, 0.5, 0.5)
    after, report = write(backend, scenes.buffers(100, 4), (latents, depth, *cameras))
    lifted = back_project(*[backend.put(x) for x in (depth, *cameras)], GRID)
    valid = lifted.valid.cpu()
    assert report[0] == valid.sum() > 30
    assert_equal_bits([after[0][: int(report[0])]], [lifted.points.cpu()[valid]])
    assert_equal_bits([after[1][: int(report[0])]], [latents.permute(0, 2, 3, 1)[valid]])


def test_what_is_written_is_what_the_same_camera_sees(backend):
    latents, depth, intrinsics, cam2world = make(14, 1, image_size=(25, 35), unknown=0.0)
    latents.nan_to_num_(0.5, 0.5, 0.5)
    (points, features, _, count), report = write(
        backend, scenes.buffers(50, 4), (latents, depth, intrinsics, cam2world)
    )
    assert report[0] == 35
    intrinsics[:, :2] /= 5
    arguments = [backend.put(x) for x in (points, features, intrinsics, cam2world)]
    view = splat(*arguments, GRID, num_points=backend.put(count))
    assert view.mask.all()
    assert_equal_bits([view.latents], [latents])


# ---------------------------------------------------------------------------------------------- shapes and layouts


def test_no_views(backend):
    arguments = make(15)
    before = scenes.buffers(100, 4, held=4)
    assert write(backend, before, arguments)[1][0] > 30
    after, report = write(backend, before, [x[:0] for x in arguments])
    assert report.tolist() == [0] * 6
    assert_equal_bits(after, before)


def test_no_channels(backend):
    latents, *rest = make(16, channels=1)
    latents.zero_()
    after, report = write(backend, scenes.buffers(100, 0), (latents[:, :0], *rest))
    same, expected = write(backend, scenes.buffers(100, 1), (latents, *rest))
    assert expected[0] > 30 and torch.equal(report, expected)
    assert_equal_bits(after[::2], same[::2])


@pytest.mark.parametrize("dtype", scenes.DTYPES)
@pytest.mark.parametrize("channels", [3, 16])
def test_strided_and_expanded_inputs(backend, dtype, channels):
    arguments = make(17, channels=channels, dtype=dtype)
    mask = scenes.static_masks(np.random.default_rng(17), 2, IMAGE, 0.01)
    before = scenes.buffers(300, channels, dtype)
    plain, _ = check(backend, before, arguments, mask=mask, least_written=20)
    strided = [scenes.strided(x) for x in arguments]
    assert_equal_bits(write(backend, before, strided, mask=scenes.strided(mask))[0], plain)
    channels_last = [arguments[0].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), *arguments[1:]]
    assert_equal_bits(write(backend, before, channels_last, mask=mask)[0], plain)
    once = write(backend, before, [x[:1] for x in arguments], mask=mask[:1])
    many = [x[:1].expand(3, *x.shape[1:]) for x in arguments]
    after, thrice = write(backend, before, many, mask=mask[:1].expand(3, *IMAGE))
    n = int(once[1][0])
    assert n > 10 and torch.equal(thrice, once[1] * 3)
    for k in range(3):
        assert_equal_bits([x[k * n : k * n + n] for x in after[:2]], [x[:n] for x in once[0][:2]])
        assert after[2][k * n : k * n + n].tolist() == [k] * n


def test_a_count_of_any_shape_of_one(backend):
    arguments = make(18)
    points, features, frame_ids, _ = scenes.buffers(100, 4)
    results = [
        write(backend, (points, features, frame_ids, torch.full(s, 2)), arguments)[0] for s in ((), (1,), (1, 1))
    ]
    assert int(results[0][3]) > 30
    for result in results[1:]:
        assert_equal_bits(result[:3], results[0][:3])
        assert result[3].item() == results[0][3].item()


def test_half_precision_depth_is_widened(backend):
    latents, depth, *cameras = make(19)
    before = scenes.buffers(100, 4)
    for dtype in (torch.float16, torch.bfloat16):
        low, report = write(backend, before, (latents, depth.to(dtype), *cameras))
        assert report[0] > 30
        assert_equal_bits(low, write(backend, before, (latents, depth.to(dtype).float(), *cameras))[0])


def test_inputs_are_not_written(backend):
    arguments = make(20)
    mask = scenes.static_masks(np.random.default_rng(20), 2, IMAGE)
    before = [x.clone() for x in (*arguments, mask)]
    assert write(backend, scenes.buffers(100, 4), arguments, mask=mask)[1][0] > 30
    assert_equal_bits([*arguments, mask], before)


def test_largest_frame_number(backend):
    arguments = make(21)
    after, report = write(backend, scenes.buffers(100, 4), arguments, first_frame=2**31 - 3)
    assert report[0] > 30
    assert after[2][: int(report[0])].unique().tolist() == [2**31 - 3, 2**31 - 2]


@pytest.mark.parametrize("dtype", [torch.float16])
def test_latents_too_large_for_the_buffers_dtype(backend, dtype):
    """Finite in float32, infinite in float16: an infinity must never be stored."""
    latents, depth, *cameras = make(23, unknown=0.0)
    latents.nan_to_num_(0.5, 0.5, 0.5)
    latents[0, 1, 2, 3] = 1e6
    after, report = write(backend, scenes.buffers(100, 4, dtype), (latents, depth, *cameras))
    assert report[0] >= 69
    assert torch.isfinite(after[1]).all()

"""`splat_aligned` on every backend: against the brute force, by its own rules, and its gradients."""

from __future__ import annotations

import math

import brute_force
import numpy as np
import pytest
import scenes
import torch
from comparison import as_array, assert_equal_bits
from hypothesis import given
from hypothesis import strategies as st

from mirage_kernels import splat_aligned, use_backend

SIZE = (7, 9)
EMPTY = torch.zeros(0, 3)


def make(seed, count=120, channels=4, views=2, size=SIZE, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    tokens = scenes.written_cloud(rng, count, channels, size[1], dtype)
    tokens[0][0] = torch.tensor([0.2, 0.1, 3.0, 0.3])  # one is always seen
    return *tokens, scenes.intrinsics(rng, views, size), scenes.poses(rng, views)


def render(backend, arguments, size=SIZE, num_points=None, **options):
    """The view, on the host. ``num_points`` may be an int."""
    if isinstance(num_points, int):
        num_points = torch.tensor(num_points)
    view = splat_aligned(*[backend.put(x) for x in arguments], size, num_points=backend.put(num_points), **options)
    backend.sync()
    assert {x.device.type for x in view} == {backend.device.type}
    return type(view)(*(x.cpu() for x in view))


def check(view, arguments, size=SIZE, sharpness=30.0, num_points=None, near=0.05, dtype=None, least_covered=1, slack=1):
    """The view is what the loops say: who is blended exactly, unless rounding decides, and latents up to rounding."""
    points, features, *_ = arguments
    dtype = features.dtype if dtype is None else dtype
    geometry = [as_array(x) for i, x in enumerate(arguments) if i != 1]
    expected = brute_force.aligned_cells(*geometry, size, sharpness, num_points, near)
    views = len(arguments[5])
    assert view.latents.shape == (views, features.shape[1], *size) and view.latents.dtype == dtype
    assert view.mask.shape == view.depth.shape == view.index.shape == (views, *size)
    assert view.mask.dtype == torch.bool and view.index.dtype == torch.int64
    assert len(expected) >= least_covered, "the scene shows nothing: the test would test nothing"
    hole = ~view.mask
    assert torch.equal(view.mask, view.index >= 0) and not view.depth[hole].any()
    assert not view.latents.movedim(1, 3)[hole].any()
    precision = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}
    rounding = 3e-4 if points.dtype == torch.float32 else 1e-9  # of a share: float32 scores, times the sharpness
    different = 0
    rows = as_array(features)
    for t in range(views):
        for i in range(size[0]):
            for j in range(size[1]):
                blend = expected.get((t, i, j))
                if (blend is None) == bool(view.mask[t, i, j]):
                    different += 1
                    continue
                if blend is None:
                    continue
                if int(view.index[t, i, j]) != blend.tokens[0]:
                    different += 1
                    continue
                assert abs(float(view.depth[t, i, j]) - blend.depth) <= 1e-5 * (abs(blend.depth) + 1)
                terms = [share * rows[token] for token, share in zip(blend.tokens, blend.shares, strict=True)]
                got, want = as_array(view.latents[t, :, i, j]), sum(terms)
                allowed = (precision[dtype] + rounding) * sum(np.abs(term) for term in terms) + 1e-6
                allowed = allowed + rounding * max(np.abs(rows[token]).max() for token in blend.tokens)
                different += not (np.abs(got - want) <= allowed).all()
    # A distance, a depth or a score that nearly ties may fall either way: those cells are few.
    assert different <= slack, f"{different} of {view.mask.numel()} cells differ"
    return len(expected)


def facing(points, footprint=1.0, channels=3):
    """Tokens (N, 3) before a camera at the origin that maps (x, y, 1) to column x, row y; written by that camera."""
    points = torch.tensor(points, dtype=torch.float32).reshape(-1, 3)
    footprints = torch.as_tensor(footprint, dtype=torch.float32) * points[:, 2]
    points = torch.cat([points, footprints[:, None]], 1)
    features = torch.arange(1, len(points) * channels + 1, dtype=torch.float32).reshape(-1, channels)
    ids = torch.zeros(len(points), dtype=torch.int32)
    return points, features, ids, torch.zeros(1, 3), torch.eye(3)[None], torch.eye(4)[None]


def assert_all_holes(view):
    assert not view.mask.any() and not view.latents.any() and not view.depth.any()
    assert (view.index == -1).all()


# ---------------------------------------------------------------------------------------------- against the brute force


@pytest.mark.parametrize("size", [(7, 9), (1, 1), (1, 17), (8, 1), (3, 33)])
@pytest.mark.parametrize("sharpness", [0.0, 5.0, 30.0, math.inf])
def test_grids(backend, size, sharpness):
    arguments = make(1, size=size)
    check(render(backend, arguments, size, sharpness=sharpness), arguments, size, sharpness)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 127, 129, 1100])
def test_counts(backend, count):
    arguments = make(2, count)
    check(render(backend, arguments), arguments, slack=2)


@pytest.mark.parametrize("channels", [1, 3, 8, 48, 70])
@pytest.mark.parametrize("dtype", scenes.DTYPES)
def test_channels(backend, channels, dtype):
    arguments = make(3, 100, channels, dtype=dtype)
    check(render(backend, arguments), arguments, least_covered=60)


@pytest.mark.parametrize("dtype", scenes.DTYPES)
@pytest.mark.parametrize("out", scenes.DTYPES)
def test_dtypes(backend, dtype, out):
    """Blended in float32 whatever goes in, and rounded once."""
    arguments = make(4, 100, dtype=dtype)
    view = render(backend, arguments, dtype=out)
    check(view, arguments, dtype=out, least_covered=60)
    with use_backend("reference"):
        assert_equal_bits(view, splat_aligned(*arguments, SIZE, dtype=out))


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 150),
    size=st.tuples(st.integers(1, 8), st.integers(1, 10)),
    near=st.sampled_from([0.0, 0.05, 2.0]),
    sharpness=st.sampled_from([0.0, 1.0, 30.0, math.inf]),
)
def test_random_scenes(backend, seed, count, size, near, sharpness):
    arguments = make(seed, count, 3, 1, size)
    check(render(backend, arguments, size, near=near, sharpness=sharpness), arguments, size, sharpness, near=near)


@given(seed=st.integers(0, 10**6), zoom=st.sampled_from([0.1, 3.0]), unit=st.sampled_from([1e-3, 1e4]))
def test_kernels_are_the_definition(kernels, seed, zoom, unit):
    """Bit for bit at any zoom and in any unit: holes of every size, and groups of tokens that kernels cull."""
    points, features, ids, centers, intrinsics, cam2world = make(seed, 150, 3, 2)
    points, centers = points[points[:, 2].argsort()] * unit, centers * unit
    cam2world[:, :3, 3] *= unit
    intrinsics[:, :2, :2] *= zoom
    arguments = points, features, ids, centers, intrinsics, cam2world
    view = render(kernels, arguments, near=0.05 * unit)
    with use_backend("reference"):
        expected = splat_aligned(*arguments, SIZE, near=0.05 * unit)
    assert expected.mask.any()
    assert_equal_bits(view, expected)


@pytest.mark.parametrize("which", ["points", "features", "dtype"])
def test_the_definition_in_float64(which):
    arguments = list(make(5))
    dtype = torch.float64 if which == "dtype" else None
    if which != "dtype":
        position = ("points", "features").index(which)
        arguments[position] = arguments[position].double()
    view = splat_aligned(*arguments, SIZE, dtype=dtype)
    expected = torch.float64 if which != "points" else torch.float32
    assert view.latents.dtype == expected
    check(view, arguments, dtype=expected, least_covered=60, slack=0 if which == "points" else 1)


# ---------------------------------------------------------------------------------------------- the rules, by hand


def test_what_was_written_comes_back(backend):
    """The camera that wrote: every token lies on its cell's centre, and comes back with its own latent."""
    grid = [[j + 0.5, i + 0.5, 1.0] for i in range(4) for j in range(5)]
    arguments = facing(grid)
    view = render(backend, arguments, (4, 5))
    assert view.index[0].flatten().tolist() == list(range(20)) and view.mask.all() and (view.depth == 1).all()
    assert_equal_bits([view.latents[0].flatten(1).T.contiguous()], [arguments[1]])


def test_the_better_placed_token_counts_more(backend):
    arguments = facing([[0.5, 0.5, 1.0], [0.9, 0.5, 1.0]])
    arguments[1][:] = torch.tensor([0.0, 1.0])[:, None]
    for sharpness in (0.0, 5.0, 20.0):
        share = max(0.0, 1 - sharpness * 0.16 / 8) ** 8
        view = render(backend, arguments, (1, 1), sharpness=sharpness)
        assert view.index.item() == 0
        np.testing.assert_allclose(view.latents.flatten(), share / (1 + share), rtol=1e-4)
    assert_equal_bits([render(backend, arguments, (1, 1), sharpness=math.inf).latents.flatten()], [arguments[1][0]])


def test_scale_decides_between_tokens_at_one_place(backend):
    points, features, ids, centers, k, pose = facing([[0.5, 0.5, 1.0]] * 4, [3.0, 1.2, 1.0, 0.4])
    view = render(backend, (points, features, ids, centers, k, pose), (1, 1), sharpness=math.inf)
    assert view.index.item() == 2
    # Twice as near, a cell is half as large: the token of 0.4 fits now.
    near = points.clone()
    near[:, 2] *= 0.4
    near[:, :2] *= 0.4
    view = render(backend, (near, features, ids, centers, k, pose), (1, 1), sharpness=math.inf)
    assert view.index.item() == 3


def test_the_viewing_ray_decides_between_tokens_at_one_place(backend):
    points, features, ids, _, k, pose = facing([[0.5, 0.5, 1.0]] * 3)
    centers = torch.tensor([[1.0, 0, 0], [0.1, 0, 0], [-0.5, 0.3, 0]])
    for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1]):
        ids = torch.tensor(order, dtype=torch.int32)
        view = render(backend, (points, features, ids, centers, k, pose), (1, 1), sharpness=math.inf)
        assert view.index.item() == order.index(1)


@pytest.mark.parametrize("unknown", [-1, 1, 2**31 - 1, -(2**31)])
def test_a_token_of_an_unknown_frame_has_no_ray(backend, unknown):
    points, features, _, _, k, pose = facing([[0.5, 0.5, 1.0]] * 2)
    ids = torch.tensor([0, unknown], dtype=torch.int32)
    for centers in (torch.tensor([[0.3, 0, 0]]), torch.tensor([[math.nan, 0, 0]]), torch.tensor([[math.inf, 0, 0]])):
        view = render(backend, (points, features, ids, centers, k, pose), (1, 1), sharpness=math.inf)
        assert view.index.item() == (1 if bool(centers.isfinite().all()) else 0)
    both_unknown = points, features, ids.clamp(max=-1), EMPTY, k, pose
    assert render(backend, both_unknown, (1, 1)).index.item() == 0


def test_hidden_tokens_do_not_count(backend):
    """Up to a tenth behind the nearest belongs to the surface; what is farther does not, however well it fits."""
    arguments = facing([[0.9 * z, 0.5 * z, z] for z in (1.0,)] + [[0.5 * z, 0.5 * z, z] for z in (1.09, 1.11)])
    view = render(backend, arguments, (1, 1))
    assert view.index.item() == 1
    assert view.depth.item() == pytest.approx(1.09)
    hidden = facing([[0.9, 0.5, 1.0], [0.5 * 1.11, 0.5 * 1.11, 1.11]])
    view = render(backend, hidden, (1, 1), sharpness=0.0)
    assert view.index.item() == 0
    assert_equal_bits([view.latents.flatten()], [hidden[1][0]])


def test_a_footprint_closes_holes_only(backend):
    """One token three cells large in the middle of a row of seven, and one of one cell beside it."""
    arguments = facing([[3.5, 0.5, 1.0], [4.5, 0.5, 1.0]], [3.0, 1.0])
    view = render(backend, arguments, (1, 7))
    assert view.index[0, 0].tolist() == [-1, 0, 0, 0, 1, 0, -1]
    behind = facing([[3.5, 0.5, 1.0], [4.5 * 9, 0.5 * 9, 9.0]], [3.0, 1.0])
    assert render(backend, behind, (1, 7)).index[0, 0].tolist() == [-1, 0, 0, 0, 1, 0, -1]
    small = facing([[3.5, 0.5, 1.0]], [0.9])
    assert render(backend, small, (1, 7)).index[0, 0].tolist() == [-1, -1, -1, 0, -1, -1, -1]
    huge = facing([[3.5, 0.5, 1.0]], [500.0])
    assert render(backend, huge, (1, 7)).index[0, 0].tolist() == [-1, 0, 0, 0, 0, 0, -1]


def test_tokens_beside_the_grid_reach_in(backend):
    view = render(backend, facing([[-0.2, 0.5, 1.0], [3.2, 0.5, 1.0]]), (1, 3))
    assert view.index[0, 0].tolist() == [0, -1, 1]
    wide = render(backend, facing([[-1.7, 0.5, 1.0]], [3.0]), (1, 3))
    assert wide.index[0, 0].tolist() == [0, -1, -1]
    assert_all_holes(render(backend, facing([[-0.3, 0.5, 1.0], [-1.8, 0.5, 1.0]], [1.0, 3.0]), (1, 3)))


def test_four_tokens_at_most(backend):
    """Six equal fits: the four of the lowest index."""
    arguments = facing([[0.5, 0.5, 1.0]] * 6)
    view = render(backend, arguments, (1, 1))
    assert view.index.item() == 0
    np.testing.assert_allclose(view.latents.flatten(), arguments[1][:4].mean(0), rtol=1e-6)


def test_ties_go_to_the_lowest_index(backend):
    arguments = make(6, 40, 3)
    copies = torch.from_numpy(np.random.default_rng(6).permutation(np.repeat(np.arange(40), 30)))
    points, _, ids, *rest = arguments
    repeated = points[copies], torch.randn(len(copies), 3), ids[copies], *rest
    view = render(backend, repeated, sharpness=math.inf)
    first = {int(token): k for k, token in reversed(list(enumerate(copies)))}
    assert int(view.mask.sum()) > 40 and set(view.index[view.mask].tolist()) <= set(first.values())
    assert_equal_bits([view.latents.movedim(1, 3)[view.mask]], [repeated[1][view.index[view.mask]]])


def test_features_that_are_not_finite(backend):
    """They are passed on by cells that blend them, and by no others."""
    points, features, *rest = facing([[0.5, 0.5, 1.0], [0.55, 0.5, 1.0], [2.5, 0.5, 1.0], [3.1, 0.5, 1.0]])
    features[1], features[3] = math.nan, math.inf
    view = render(backend, (points, features, *rest), (1, 3), sharpness=30.0)
    assert view.latents[0, :, 0, 0].isnan().all()
    assert view.latents[0, :, 0, 2].tolist() == features[2].tolist(), "too far off to count at this sharpness"
    assert (render(backend, (points, features, *rest), (1, 3), sharpness=5.0).latents[0, :, 0, 2] == math.inf).all()


# ---------------------------------------------------------------------------------------------- invariances, degenerate


@pytest.mark.slow
@given(seed=st.integers(0, 10**6), count=st.integers(1, 200))
def test_permutation_invariance(backend, seed, count):
    points, features, ids, *rest = make(seed, count, 3)
    view = render(backend, (points, features, ids, *rest))
    assert view.mask.any()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    shuffled = render(backend, (points[order], features[order], ids[order], *rest))
    assert_equal_bits(shuffled[:3], view[:3])
    assert torch.equal(torch.where(shuffled.mask, order[shuffled.index.clamp(min=0)], -1), view.index)


@given(
    seed=st.integers(0, 10**6),
    padding=st.integers(1, 40),
    kind=st.sampled_from(["behind", "nan", "inf", "huge", "one nan"]),
)
def test_tokens_that_no_camera_sees_change_nothing(backend, seed, padding, kind):
    points, features, ids, *rest = make(seed, 60, 3)
    view = render(backend, (points, features, ids, *rest))
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
    noise, their_ids = torch.full((padding, 3), math.nan), torch.zeros(padding, dtype=torch.int32)
    appended = torch.cat([points, more]), torch.cat([features, noise]), torch.cat([ids, their_ids])
    assert_equal_bits(render(backend, (*appended, *rest)), view)
    live_only = render(backend, (*appended, *rest), num_points=60)
    assert view.mask.any()
    assert_equal_bits(live_only, view)


@pytest.mark.parametrize("live", [0, -1, -(2**40)])
def test_no_live_points(backend, live):
    arguments = make(7)
    assert render(backend, arguments).mask.any()
    assert_all_holes(render(backend, arguments, num_points=live))


@pytest.mark.parametrize("live", [120, 121, 2**40])
def test_more_live_points_than_rows(backend, live):
    arguments = make(8)
    assert_equal_bits(render(backend, arguments, num_points=live), render(backend, arguments))


def test_views_do_not_see_each_other(backend):
    *tokens, intrinsics, cam2world = make(9, 60, 2, views=19)
    together = render(backend, (*tokens, intrinsics, cam2world))
    for t in (0, 15, 16, 18):
        alone = render(backend, (*tokens, intrinsics[t : t + 1], cam2world[t : t + 1]))
        assert alone.mask.any()
        assert_equal_bits(alone, [x[t : t + 1] for x in together])


def test_nothing_to_read(backend):
    points, features, ids, centers, intrinsics, cam2world = make(10)
    assert_all_holes(render(backend, (points[:0], features[:0], ids[:0], centers, intrinsics, cam2world)))
    assert_all_holes(render(backend, (points[:0], features[:0], ids[:0], EMPTY, intrinsics, cam2world)))
    no_channels = render(backend, (points, features[:, :0], ids, centers, intrinsics, cam2world))
    assert no_channels.latents.shape == (2, 0, *SIZE) and no_channels.mask.any()
    no_views = render(backend, (points, features, ids, centers, intrinsics[:0], cam2world[:0]))
    assert no_views.latents.shape == (0, 4, *SIZE) and no_views.index.shape == (0, *SIZE)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda k, pose: pose[:3, :3].zero_(), id="singular"),
        pytest.param(lambda k, pose: pose.fill_(math.nan), id="nan pose"),
        pytest.param(lambda k, pose: k.fill_(math.nan), id="nan intrinsics"),
        pytest.param(lambda k, pose: k[:2].fill_(math.inf), id="inf intrinsics"),
    ],
)
def test_degenerate_cameras_show_nothing(backend, spoil):
    *tokens, intrinsics, cam2world = make(11)
    good = render(backend, (*tokens, intrinsics[1:], cam2world[1:]))
    assert good.mask.any()
    spoil(intrinsics[0], cam2world[0])
    view = render(backend, (*tokens, intrinsics, cam2world))
    assert_equal_bits([x[1:] for x in view], good)
    assert_all_holes(type(view)(*(x[:1] for x in view)))


@pytest.mark.parametrize("footprint", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e38, 1e-40])
def test_any_footprint_is_read(backend, footprint):
    points, *rest = make(12)
    points[:, 3] = footprint
    view = render(backend, (points, *rest))
    check(view, (points, *rest), slack=2)


@given(seed=st.integers(0, 10**6))
def test_random_bits_read_in_bounds(backend, seed):
    """Points, frames and cameras of random bit patterns: subnormals, NaN and infinities among them."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (100, 4), dtype=np.uint32).view(np.float32)
    points = torch.from_numpy(np.concatenate([bits, np.float32([[0.5, 0.5, 1, 1]])]))
    features = torch.from_numpy(rng.normal(size=(101, 3))).float()
    ids = torch.from_numpy(rng.integers(-(2**31), 2**31, 101).astype(np.int32))
    ids[::2] = torch.from_numpy(rng.integers(0, 20, 51)).int()
    centers = torch.from_numpy(rng.integers(0, 2**32, (20, 3), dtype=np.uint32).view(np.float32))
    intrinsics = torch.from_numpy(rng.integers(0, 2**63, (3, 3, 3)).view(np.float64))
    cam2world = torch.from_numpy(rng.integers(0, 2**63, (3, 4, 4)).view(np.float64))
    intrinsics[0], cam2world[0] = torch.eye(3), torch.eye(4)
    arguments = points, features, ids, centers, intrinsics, cam2world
    view = render(backend, arguments)
    assert view.mask[0].any() and int(view.index.max()) <= 100 and int(view.index.min()) == -1
    assert torch.isfinite(view.latents).all() and torch.isfinite(view.depth).all()
    with use_backend("reference"):
        assert_equal_bits(view, splat_aligned(*arguments, SIZE))


@pytest.mark.parametrize("dtype", scenes.DTYPES)
def test_layouts_of_the_inputs(backend, dtype):
    arguments = make(13, 100, 9, dtype=dtype)
    before = [x.clone() for x in arguments]
    plain = render(backend, arguments)
    assert plain.mask.any() and all(x.is_contiguous() for x in plain)
    assert_equal_bits(render(backend, [scenes.strided(x) for x in arguments]), plain)
    assert_equal_bits(arguments, before)
    flat = torch.zeros(100 * 4 + 1)
    flat[1:] = arguments[0].flatten()
    unaligned = [flat[1:].view(100, 4)[3:], *(x[3:] for x in arguments[1:3])]
    expected = render(backend, [*(x[3:].clone() for x in arguments[:3]), *arguments[3:]])
    assert_equal_bits(render(backend, [*unaligned, *arguments[3:]]), expected)


# ---------------------------------------------------------------------------------------------- gradients


def gradients(backend, arguments, sharpness, weights, size=SIZE, dtype=None):
    points, features, *rest = (backend.put(x) for x in arguments)
    leaves = points.clone().requires_grad_(), features.clone().requires_grad_()
    view = splat_aligned(*leaves, *rest, size, sharpness=sharpness, dtype=dtype)
    assert view.latents.requires_grad
    assert not (view.mask.requires_grad or view.depth.requires_grad or view.index.requires_grad)
    return [x.cpu() for x in torch.autograd.grad(view.latents, leaves, backend.put(weights))]


@pytest.mark.parametrize("sharpness", [0.0, 2.0, 30.0, math.inf])
def test_gradient_is_the_sum_over_the_blends(backend, sharpness):
    """To features: against the loops. To points: only where two tokens share a cell, and none at the ends."""
    arguments = make(14, 80, 3, views=3)
    weights = torch.from_numpy(np.random.default_rng(14).uniform(-1, 1, (3, 3, *SIZE))).float()
    of_points, of_features = gradients(backend, arguments, sharpness, weights)
    geometry = [as_array(x) for i, x in enumerate(arguments) if i != 1]
    expected = np.zeros((80, 3))
    for (t, i, j), blend in brute_force.aligned_cells(*geometry, SIZE, sharpness).items():
        for token, share in zip(blend.tokens, blend.shares, strict=True):
            expected[token] += share * as_array(weights[t, :, i, j])
    assert (np.abs(expected).sum(1) > 0).sum() > 30
    np.testing.assert_allclose(as_array(of_features), expected, rtol=2e-3, atol=2e-3)
    assert bool(of_points.any()) == (0 < sharpness < math.inf)


@pytest.mark.parametrize("sharpness", [2.0, 30.0])
@pytest.mark.parametrize("dtype", scenes.DTYPES)
@pytest.mark.parametrize("channels", [1, 5, 70])
def test_gradients_are_those_of_the_definition(kernels, sharpness, dtype, channels):
    arguments = make(15, 90, channels, views=3, dtype=dtype)
    weights = torch.from_numpy(np.random.default_rng(15).normal(size=(3, channels, *SIZE))).to(dtype)
    of_points, of_features = gradients(kernels, arguments, sharpness, weights)
    with use_backend("reference"):
        expected = gradients(type(kernels)("reference", torch.device("cpu")), arguments, sharpness, weights)
    assert expected[0].abs().sum(0).gt(0).all(), "x, y, z and footprint all matter"
    assert_equal_bits([of_features], [expected[1]])
    scale = expected[0].abs().max()
    torch.testing.assert_close(of_points / scale, expected[0] / scale, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_gradcheck_of_the_definition():
    points, features, ids, centers, *cameras = make(16, 60, 3, size=(5, 7))
    points, features = points.double(), features.double()

    def latents(points, features):
        return splat_aligned(points, features, ids, centers, *cameras, (5, 7), sharpness=5.0).latents

    leaves = points.requires_grad_(), features.requires_grad_()
    assert all(grad.any() for grad in torch.autograd.grad(latents(*leaves).sum(), leaves))
    assert torch.autograd.gradcheck(latents, leaves)


def test_gradient_of_nothing(backend):
    points, features, ids, centers, intrinsics, cam2world = [backend.put(x) for x in make(17)]
    for count, views in ((120, 2), (0, 2), (120, 0)):
        leaves = points[:count].clone().requires_grad_(), features[:count].clone().requires_grad_()
        view = splat_aligned(*leaves, ids[:count], centers, intrinsics[:views], cam2world[:views], SIZE, sharpness=2.0)
        grads = torch.autograd.grad((view.latents**2).sum(), leaves)
        assert [bool(x.any()) for x in grads] == [count * views > 0] * 2
    with torch.no_grad():
        view = splat_aligned(points.requires_grad_(), features, ids, centers, intrinsics, cam2world, SIZE)
        assert not view.latents.requires_grad and view.mask.any()


def test_gradient_to_one_of_the_two(backend):
    points, features, *rest = [backend.put(x) for x in make(18)]
    leaf = features.clone().requires_grad_()
    splat_aligned(points, leaf, *rest, SIZE).latents.sum().backward()
    assert leaf.grad.any()
    other = points.clone().requires_grad_()
    (splat_aligned(other, features, *rest, SIZE, sharpness=2.0).latents ** 2).sum().backward()
    assert other.grad.any()


def test_following_the_gradient_improves_the_read_out(backend):
    """What it is for: positions that descend on the error of the read-out against a target."""
    points, features, *rest = [backend.put(x) for x in make(19, 200, 3)]
    target = splat_aligned(points, features, *rest, SIZE, sharpness=2.0).latents.detach()
    moved = points.clone()
    moved[:, :3] += 0.02 * torch.from_numpy(np.random.default_rng(19).normal(size=(200, 3))).float().to(points.device)

    def loss(where):
        return ((splat_aligned(where, features, *rest, SIZE, sharpness=2.0).latents - target) ** 2).sum()

    leaf = moved.requires_grad_()
    before = loss(leaf)
    (grad,) = torch.autograd.grad(before, leaf)
    assert loss((leaf - 1e-3 * grad / grad.norm()).detach()) < before


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("points", torch.zeros(120, 3), ValueError),
        ("features", torch.zeros(119, 4), ValueError),
        ("frame_ids", torch.zeros(120), ValueError),
        ("frame_ids", torch.zeros(119, dtype=torch.int32), ValueError),
        ("frame_ids", [0] * 120, TypeError),
        ("frame_centers", torch.zeros(12, 2), ValueError),
        ("frame_centers", torch.zeros(12, 3, dtype=torch.float64), ValueError),
        ("frame_centers", None, TypeError),
        ("intrinsics", torch.zeros(2, 4, 4), ValueError),
        ("cam2world", torch.zeros(1, 4, 4), ValueError),
        ("size", (0, 3), ValueError),
        ("near", -1.0, ValueError),
        ("near", math.nan, ValueError),
        ("sharpness", -1.0, ValueError),
        ("sharpness", math.nan, ValueError),
        ("sharpness", "high", ValueError),
        ("dtype", torch.int32, TypeError),
        ("num_points", torch.zeros(1), ValueError),
    ],
)
def test_errors_name_the_argument(backend, name, value, error):
    names = ("points", "features", "frame_ids", "frame_centers", "intrinsics", "cam2world")
    arguments = dict(zip(names, make(20), strict=True), size=SIZE)
    arguments[name] = value
    with pytest.raises(error, match=f"^{name} must"):
        splat_aligned(**{key: backend.put(x) for key, x in arguments.items()})

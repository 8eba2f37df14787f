"""Triton kernels against the definition, bit for bit: on a GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported. Without a GPU ``test_comparisons_in_the_interpreter`` runs
the comparisons in a process of its own;
``TRITON_INTERPRET=1 python -m pytest tests/kernels/ops/test_triton.py`` runs only them.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import scenes
import torch

from mirage_kernels import available_backends, splat, splat_aligned, use_backend
from mirage_kernels.constants import BLOCK_TOKENS, WRITE_REPORT
from mirage_kernels.environment import triton_interpreted
from mirage_kernels.geometry import bounds_rows, in_view, make_projection, project_points, z_order
from mirage_kernels.ops.operator import OPERATORS
from mirage_kernels.quantization import quantize_rows

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package `triton` is not installed", allow_module_level=True)

INTERPRETED = triton_interpreted()
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
NO_TOKEN = 0x7F7F7F7F7F7F7F7F  # the key of an empty place
NAMES = tuple(OPERATORS)
# Parts of the comparisons, which test processes share, and how many of each the interpreter has to run and pass.
PARTS = {"bounded_write": 50, "splat_aligned": 40, "not bounded_write and not splat_aligned": 150}


def comparison(test):
    """Collected only where kernels can run in this process."""
    return test if INTERPRETED or GPU else None


def on_gpu(test):
    """Collected only where there is a GPU."""
    return test if GPU else None


def compiles(test):
    """A test of what Triton's compiler makes of the kernels, for which no GPU is needed."""
    return pytest.mark.slow(pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")(test))


# The interpreter computes with numpy, which warns of the divisions by zero and overflows that these inputs ask for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PAIRS = list(itertools.product(FLOATS, FLOATS))
FEW_PAIRS = scenes.each_once(FLOATS[:1] + FLOATS, FLOATS)  # each dtype goes in and comes out
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, signs of zero included; NaN equals NaN, whose payload differs between processors."""
    got = got.cpu()
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if expected.element_size() == 1:
        got, expected = got.view(torch.uint8), expected.view(torch.uint8)
    elif expected.is_floating_point():
        nan = expected.isnan()
        assert torch.equal(got.isnan(), nan)
        integer = INTEGERS[expected.element_size()]
        got, expected = (x.masked_fill(nan, 0).contiguous().view(integer) for x in (got, expected))
    assert torch.equal(got, expected), f"{int((got != expected).sum())} of {expected.numel()} differ"


def triton_operator(name: str, *arguments: object) -> tuple[torch.Tensor, ...]:
    moved = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]
    result = OPERATORS[name].overloads["triton"](*moved)
    return result if isinstance(result, tuple) else (result,)


def definition(name: str, *arguments: object) -> object:
    return OPERATORS[name].reference(*arguments)


def agree(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...] | torch.Tensor) -> None:
    for one, other in zip(got, expected if isinstance(expected, tuple) else (expected,), strict=True):
        same_bits(one, other)


def make_cameras(views: int, size: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cameras near the origin that look about, with rotations only nearly orthonormal; intrinsics in cells of size."""
    random = torch.Generator().manual_seed(seed)
    height, width = size
    intrinsics = torch.eye(3, dtype=torch.float64).repeat(views, 1, 1)
    jitter = 1 + 0.1 * torch.rand(views, 4, generator=random, dtype=torch.float64)
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = 0.6 * width * jitter[:, 0], 0.7 * height * jitter[:, 1]
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = 0.5 * width * jitter[:, 2], 0.5 * height * jitter[:, 3]
    cam2world = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    axis = 0.4 * torch.randn(views, 3, generator=random, dtype=torch.float64)
    skew = torch.zeros(views, 3, 3, dtype=torch.float64)
    skew[:, 0, 1], skew[:, 0, 2], skew[:, 1, 2] = -axis[:, 2], axis[:, 1], -axis[:, 0]
    cam2world[:, :3, :3] = torch.linalg.matrix_exp(skew - skew.mT)
    cam2world[:, :3, :3] += 1e-4 * torch.randn(views, 3, 3, generator=random, dtype=torch.float64)
    cam2world[:, :3, 3] = 0.3 * torch.randn(views, 3, generator=random, dtype=torch.float64)
    return intrinsics, cam2world


def make_points(count: int, seed: int = 0) -> torch.Tensor:
    """Random points, with ties in depth, points behind, and values that no arithmetic survives."""
    random = torch.Generator().manual_seed(seed)
    points = 2 * torch.randn(count, 4, generator=random)
    points[:, 2] += 1
    fifth = count // 5
    points[fifth : 2 * fifth] = points[:fifth]
    specials = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40, -1e-40, 0.0, -0.0])
    for row, (special, column) in enumerate(itertools.product(specials, range(3))):
        if 4 * row < count:
            points[4 * row, column] = special
    return points


def make_depth(views: int, height: int, width: int, unknown: float = 0.3, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    depth = 0.5 + 4 * torch.rand(views, height, width, generator=random)
    depth = (depth * 8).round() / 8 if seed % 2 else depth  # many ties
    specials = torch.tensor([0.0, -1.0, math.nan, math.inf, -math.inf, -0.0])
    chosen = specials[torch.randint(0, len(specials), depth.shape, generator=random)]
    return torch.where(torch.rand(depth.shape, generator=random) < unknown, chosen, depth)


def make_mask(views: int, height: int, width: int, moving: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(views, height, width, generator=torch.Generator().manual_seed(seed)) >= moving


def features_of(count: int, channels: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Features with values that round to even both ways, overflow half precision, or are no number."""
    features = torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))
    specials = [math.nan, math.inf, -math.inf, 1e38, 1e-40, 65520.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 3.3895e38]
    flat = features.view(-1)
    for position, special in enumerate(specials):
        if 7 * position < flat.numel():
            flat[7 * position] = special
    return features.to(dtype)


def float8_of(count: int, channels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Any float8 codes, NaN among them, and scales of all that there are."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (count, channels), generator=random, dtype=torch.uint8)
    scales = torch.randint(100, 150, (count,), generator=random, dtype=torch.uint8)
    scales[::5] = torch.randint(0, 256, (len(scales[::5]),), generator=random, dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn), scales


# ------------------------------------------------------------------------------------------------------------ splat


def check_splat(points, features, num_points, cameras, size, near=0.05, dtype=torch.float32):
    got = triton_operator("splat", points, features, num_points, *cameras, *size, near, dtype)
    expected = definition("splat", points, features, num_points, *cameras, *size, near, dtype)
    agree(got, expected)
    return expected


@comparison
@pytest.mark.parametrize(("given", "asked"), PAIRS)
def test_splat_dtypes(given, asked):
    size = (5, 6)
    _, mask, _, _ = check_splat(
        make_points(500), features_of(500, 3, given), None, make_cameras(2, size), size, dtype=asked
    )
    assert mask.any()


@comparison
@pytest.mark.parametrize(("channels", "asked"), scenes.each_once([0, 1, 48, 65], FLOATS))
def test_splat_float8(channels, asked):
    size, points, cameras = (5, 6), make_points(500), make_cameras(2, (5, 6))
    features, scales = float8_of(500, channels)
    got = triton_operator("splat", points, features, None, *cameras, *size, 0.05, asked, None, scales)
    expected = definition("splat", points, features, None, *cameras, *size, 0.05, asked, None, scales)
    agree(got, expected)
    assert expected[1].any()


@comparison
@pytest.mark.parametrize("channels", [0, 1, 3, 48, 65])
def test_splat_channels(channels):
    size = (7, 9)
    check_splat(make_points(700), features_of(700, channels, torch.float32), None, make_cameras(3, size), size)


@comparison
@pytest.mark.parametrize("size", [(1, 1), (1, 33), (33, 1), (16, 16), (11, 13)])
def test_splat_sizes(size):
    check_splat(make_points(600), features_of(600, 2, torch.float32), None, make_cameras(2, size), size)


@comparison
@pytest.mark.parametrize(("count", "views"), scenes.each_once([0, 1, 255, 256, 257], [2, 1, 0]))
def test_splat_counts(count, views):
    size = (3, 4)
    check_splat(make_points(count), features_of(count, 2, torch.float32), None, make_cameras(views, size), size)


@comparison
def test_splat_more_views_than_one_program_composes():
    size = (3, 4)
    check_splat(make_points(300), features_of(300, 1, torch.float32), None, make_cameras(35, size), size)


@comparison
@pytest.mark.parametrize("live", [-1, 0, 1, 100, 256, 300, 400])
def test_splat_num_points(live):
    size = (4, 5)
    live = torch.tensor(live)
    check_splat(make_points(300), features_of(300, 2, torch.float32), live, make_cameras(2, size), size)


@comparison
def test_splat_ties_go_to_the_lowest_index():
    points = torch.tensor([[0.1, 0.1, 2.0, 0.0]]).repeat(600, 1)
    points[:7, 2] = 3.0
    cameras = torch.eye(3, dtype=torch.float64)[None], torch.eye(4, dtype=torch.float64)[None]
    *_, depth, index = check_splat(points, features_of(600, 2, torch.float32), None, cameras, (1, 1))
    assert index.item() == 7
    assert depth.item() == 2.0


@comparison
@pytest.mark.parametrize("near", [0.0, 0.05, 2.0, 1e-45, 1e300])
def test_splat_borders_of_the_grid(near):
    """Points on cell borders, at near itself, just around both, and past the range of float32 in either matrix."""
    side = torch.tensor([0.0, -0.0, 1.0, 2.0, 3.0, 4.0])
    side = torch.cat([side, side.nextafter(torch.tensor(-math.inf)), side.nextafter(torch.tensor(math.inf))])
    depths = torch.tensor([1e-45, 0.05, 0.05000001, 1.0, 2.0, 3.0])
    x, y, z = (grid.flatten() for grid in torch.meshgrid(side, side, depths, indexing="ij"))
    points = torch.stack([x * z, y * z, z, z], 1)
    cameras = torch.eye(3, dtype=torch.float64)[None], torch.eye(4, dtype=torch.float64)[None]
    check_splat(points, features_of(len(points), 1, torch.float32), None, cameras, (3, 4), near)


@comparison
@pytest.mark.parametrize("flaw", ["singular", "nan", "tiny", "huge"])
def test_splat_degenerate_cameras(flaw):
    size = (3, 4)
    intrinsics, cam2world = make_cameras(2, size)
    cam2world[0, :3, :3] *= {"singular": 0.0, "nan": math.nan, "tiny": 1e-40, "huge": 1e40}[flaw]
    check_splat(make_points(200), features_of(200, 1, torch.float32), None, (intrinsics, cam2world), size)


@comparison
def test_splat_strided_inputs():
    size = (4, 5)
    points, features = make_points(300), features_of(300, 6, torch.float32)
    intrinsics, cam2world = make_cameras(4, size)
    check_splat(
        points.t().contiguous().t(), features[:, ::2], None, (intrinsics[::2], cam2world.mT.contiguous().mT[::2]), size
    )
    check_splat(
        torch.cat([points.new_zeros(1, 4), points]).flatten()[1:-3].view(-1, 4),  # 4 bytes off a 16-byte boundary
        torch.cat([features, features[:1]]).flatten()[1:-5].view(-1, 6),
        None,
        (intrinsics, cam2world),
        size,
    )


@comparison
@pytest.mark.parametrize(("given", "asked"), PAIRS)
def test_splat_backward(given, asked):
    size, count = (6, 7), 40
    *_, index = definition(
        "splat", make_points(count), torch.zeros(count, 1), None, *make_cameras(5, size), *size, 0.05, torch.float32
    )
    assert index[index >= 0].bincount().max() > 2  # some token is seen by several views
    grad = torch.randn(5, 3, *size).to(given)
    agree(
        triton_operator("splat_backward", grad, index, count, asked),
        definition("splat_backward", grad, index, count, asked),
    )


@comparison
@pytest.mark.parametrize(("views", "channels", "count"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (1, 70, 9)])
def test_splat_backward_shapes(views, channels, count):
    index = torch.full((views, 2, 3), -1)
    if count:
        for view in range(views):
            index[view].view(-1)[: min(4, count)] = torch.randperm(count)[:4]
    grad = torch.randn(views, channels, 2, 3)
    agree(
        triton_operator("splat_backward", grad, index, count, torch.float32),
        definition("splat_backward", grad, index, count, torch.float32),
    )


@comparison
def test_gradient_through_the_public_function():
    size = (5, 6)
    points, intrinsics, cam2world = (x.to(DEVICE) for x in (make_points(100), *make_cameras(3, size)))
    features = torch.randn(100, 4)
    weights = torch.randn(3, 4, *size)
    grads = []
    for backend in ("triton", "reference"):
        device = DEVICE if backend == "triton" else "cpu"
        leaf = features.to(device).detach().requires_grad_()
        with use_backend(backend):
            view = splat(points.to(device), leaf, intrinsics.to(device), cam2world.to(device), size)
        (view.latents * weights.to(device)).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0].cpu(), grads[1])  # autograd's own sum has another order


# ----------------------------------------------------------------------------------------------------- back_project


def aligned_arguments(count: int, channels: int, views: int, size: tuple[int, int], given=torch.float32, seed: int = 0):
    """points, features, frame_ids, frame_centers, intrinsics and cam2world; every special value among them."""
    points = make_points(count, seed)
    random = torch.Generator().manual_seed(seed)
    finite = points[:, 3].abs() <= 10
    points[:, 3] = torch.where(finite, points[:, 2].abs() / size[1] * points[:, 3].abs() * 2, points[:, 3])
    frame_ids = torch.randint(-1, 6, (count,), generator=random, dtype=torch.int32)
    centers = torch.randn(5, 3, generator=random)
    centers[3, 1] = math.nan
    return points, features_of(count, channels, given, seed), frame_ids, centers, *make_cameras(views, size, seed)


def check_splat_aligned(arguments, num_points=None, size=(6, 7), near=0.05, sharpness=20.0, dtype=torch.float32):
    points, features, *rest = arguments
    got = triton_operator("splat_aligned", points, features, num_points, *rest, *size, near, sharpness, dtype)
    expected = definition("splat_aligned", points, features, num_points, *rest, *size, near, sharpness, dtype)
    agree(got[:4], expected)
    return expected


@comparison
@pytest.mark.parametrize(("given", "asked"), FEW_PAIRS)
def test_splat_aligned_dtypes(given, asked):
    assert check_splat_aligned(aligned_arguments(150, 5, 2, (6, 7), given), dtype=asked)[1].any()


@comparison
@pytest.mark.parametrize(("channels", "asked"), scenes.each_once([1, 48, 65], FLOATS))
def test_splat_aligned_float8(channels, asked):
    points, _, *rest = aligned_arguments(150, channels, 2, (6, 7))
    features, scales = float8_of(150, channels)
    got = triton_operator("splat_aligned", points, features, None, *rest, 6, 7, 0.05, 20.0, asked, None, scales)
    expected = definition("splat_aligned", points, features, None, *rest, 6, 7, 0.05, 20.0, asked, None, scales)
    agree(got[:4], expected)
    assert expected[1].any()


@comparison
@pytest.mark.parametrize("channels", [5, 70])
def test_splat_aligned_backward_float8(channels):
    if not available_backends()["cpu"]:
        pytest.skip("the CPU operators were not built: nothing to compare with")
    points, features, *rest = aligned_arguments(70, channels, 2, (5, 6), seed=3)
    features, scales = quantize_rows(features.nan_to_num(0.5, 1.0, -1.0).clamp(-4, 4))
    arguments = points, features, None, *rest, 5, 6, 0.05, 5.0, torch.float32, None, scales
    keys = OPERATORS["splat_aligned"].overloads["compiled"](*arguments)[4]
    grad = torch.randn(2, channels, 5, 6, generator=torch.Generator().manual_seed(1))
    arguments = grad, points, features, *rest, keys, 5.0, True, scales
    got = triton_operator("splat_aligned_backward", *arguments)
    expected = OPERATORS["splat_aligned_backward"].overloads["compiled"](*arguments)
    assert got[0].shape == expected[0].shape == (0, channels)
    scale = expected[1].abs().max()
    assert scale > 0
    torch.testing.assert_close(got[1].cpu() / scale, expected[1] / scale, rtol=1e-4, atol=1e-6)


@comparison
@pytest.mark.parametrize(("channels", "sharpness"), scenes.each_once([0, 1, 3, 48, 65], [0.0, math.inf]))
def test_splat_aligned_channels(channels, sharpness):
    assert check_splat_aligned(aligned_arguments(120, channels, 2, (6, 7)), sharpness=sharpness)[1].any()


@comparison
@pytest.mark.parametrize("size", [(1, 1), (1, 33), (33, 1), (11, 13)])
def test_splat_aligned_sizes(size):
    assert check_splat_aligned(aligned_arguments(150, 3, 1, size, seed=1), size=size)[1].any()


@comparison
@pytest.mark.parametrize(("count", "views"), scenes.each_once([0, 1, 127, 128, 129], [1, 3, 0]))
def test_splat_aligned_counts(count, views):
    check_splat_aligned(aligned_arguments(count, 3, views, (6, 7)))


@comparison
@pytest.mark.parametrize("live", [-1, 0, 100, 400])
def test_splat_aligned_num_points(live):
    seen = check_splat_aligned(aligned_arguments(150, 3, 2, (6, 7)), torch.tensor(live))
    assert seen[1].any() == (live > 0)


@comparison
@pytest.mark.parametrize("flaw", ["singular", "nan", "tiny", "huge"])
def test_splat_aligned_degenerate_cameras(flaw):
    *tokens, intrinsics, cam2world = aligned_arguments(150, 3, 3, (6, 7))
    cam2world[1, :3, :3] = {"singular": 0.0, "nan": math.nan, "tiny": 1e-30, "huge": 1e30}[flaw]
    assert check_splat_aligned((*tokens, intrinsics, cam2world))[1].any()


@comparison
@pytest.mark.parametrize(
    ("channels", "count", "views", "given", "of_points"),
    [
        (5, 70, 2, torch.float32, True),
        (5, 70, 2, torch.bfloat16, False),
        (70, 33, 1, torch.float16, True),
        (70, 33, 1, torch.float32, False),
        (0, 5, 1, torch.bfloat16, True),
        (3, 0, 1, torch.float16, True),
        (3, 5, 0, torch.float32, True),
    ],
)
def test_splat_aligned_backward(given, of_points, channels, count, views):
    """Against the compiled CPU operator, which the definition holds: features bit for bit, points up to rounding."""
    if not available_backends()["cpu"]:
        pytest.skip("the CPU operators were not built: nothing to compare with")
    points, features, *rest = aligned_arguments(count, channels, views, (5, 6), given, seed=3)
    features = features.nan_to_num(0.5, 1.0, -1.0).clamp(-4, 4)
    arguments = points, features, None, *rest, 5, 6, 0.05, 5.0, torch.float32
    keys = OPERATORS["splat_aligned"].overloads["compiled"](*arguments)[4]
    grad = torch.randn(views, channels, 5, 6, generator=torch.Generator().manual_seed(1)).to(given)
    arguments = grad, points, features, *rest, keys, 5.0, of_points
    got = triton_operator("splat_aligned_backward", *arguments)
    expected = OPERATORS["splat_aligned_backward"].overloads["compiled"](*arguments)
    same_bits(got[0], expected[0])
    assert expected[0].any() == (channels * count * views > 0)
    assert got[1].shape == expected[1].shape
    if expected[1].any():
        scale = expected[1].abs().max()
        torch.testing.assert_close(got[1].cpu() / scale, expected[1] / scale, rtol=1e-4, atol=1e-6)


def check_back_project(depth, mask, size, bilinear=False, cameras=None):
    cameras = make_cameras(depth.shape[0], depth.shape[1:]) if cameras is None else cameras
    got = triton_operator("back_project", depth, *cameras, mask, *size, bilinear)
    expected = definition("back_project", depth, *cameras, mask, *size, bilinear)
    agree(got, expected)
    return expected


@comparison
@pytest.mark.parametrize(("unknown", "seed"), scenes.each_once([0.0, 0.3, 0.5, 0.9, 1.0, 0.5], [0, 1]))
def test_back_project_unknown_depths(unknown, seed):
    _, valid = check_back_project(make_depth(2, 24, 32, unknown, seed), None, (6, 8))
    if unknown in (0.0, 1.0):
        assert valid.all() == (unknown == 0.0)


@comparison
@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((9, 7), (9, 7)),
        ((37, 53), (7, 9)),
        ((48, 64), (3, 4)),
        ((5, 200), (5, 3)),
        ((1, 1), (1, 1)),
        ((40, 41), (1, 1)),
    ],
)
@pytest.mark.parametrize("bilinear", [False, True])
def test_back_project_resolutions(image, size, bilinear):
    depth = make_depth(2, *image, unknown=0.1)
    check_back_project(depth, make_mask(2, *image, 0.01), size, bilinear)


@comparison
@pytest.mark.parametrize("image", [(6, 8), (7, 11), (48, 64)])
def test_back_project_mask_of_another_resolution(image):
    check_back_project(make_depth(2, 18, 29, 0.1), make_mask(2, *image, 0.02), (6, 8))


@comparison
@pytest.mark.parametrize("size", [(5, 7), (11, 16), (13, 3)])
def test_back_project_bilinear_enlarges(size):
    check_back_project(make_depth(2, 5, 7, 0.1), None, size, bilinear=True)


@comparison
def test_back_project_cells_larger_than_a_tile(monkeypatch):
    from mirage_kernels.ops.common.triton import lift as module

    depth, mask = make_depth(2, 46, 62, 0.4), make_mask(2, 43, 52, 0.001)
    check_back_project(depth, mask, (1, 1))  # 2852 pixels: two chunks
    monkeypatch.setattr(module, "_LARGEST_CELL", 8)
    monkeypatch.setattr(module, "_CHUNK", 16)
    check_back_project(depth, mask, (5, 6))


@comparison
def test_back_project_wide_indices(monkeypatch):
    """2 * 33000 * 33000 passes 2^31."""
    from mirage_kernels.ops.common.triton import lift as module

    monkeypatch.setattr(module, "_MOST_TOKENS", 1024)  # fewer programs, for the interpreter's sake
    check_back_project(make_depth(1, 33000, 1, 0.2), None, (33000, 1))


@comparison
@pytest.mark.parametrize("lowest", [0x00000001, 0x3F800000, 0x7F000000])
def test_back_project_median_of_neighbouring_floats(lowest):
    """Depths from the smallest denormal up, a few units in the last place apart, and some far away."""
    bits = torch.randint(0, 40, (1, 20, 20), generator=torch.Generator().manual_seed(3)) + lowest
    depth = bits.to(torch.int32).view(torch.float32)
    check_back_project(depth, None, (4, 4))
    depth = depth.clone()
    depth[:, ::3] = torch.finfo(torch.float32).max
    check_back_project(depth, None, (4, 4))


@comparison
@pytest.mark.parametrize("views", [0, 1, 35])
def test_back_project_views(views):
    check_back_project(make_depth(views, 6, 8), make_mask(views, 3, 2, 0.1), (3, 2), bilinear=views > 1)


@comparison
def test_back_project_points_that_overflow():
    depth = torch.full((1, 4, 4), 3e38)
    intrinsics, cam2world = make_cameras(1, (4, 4))
    intrinsics[:, 0, 0] = 1e-3
    _, valid = check_back_project(depth, None, (4, 4), cameras=(intrinsics, cam2world))
    assert not valid.all()


@comparison
def test_back_project_strided_inputs():
    depth = make_depth(4, 12, 16)
    mask = make_mask(4, 12, 16, 0.05)
    check_back_project(depth[::2, :, ::2], mask.mT.contiguous().mT[::2, ::2], (3, 4), cameras=make_cameras(2, (12, 8)))


# ------------------------------------------------------------------------------------------------------ cache_write


def check_cache_write(
    latents,
    depth,
    mask=None,
    capacity=1000,
    count=0,
    dtype=torch.float32,
    bilinear=False,
    limits=(0.0, math.inf),
    first_frame=0,
):
    def buffers():
        return (
            torch.full((capacity, 4), -3.0),
            torch.full((capacity, latents.shape[1]), -5.0).to(dtype),
            torch.full((capacity,), -7, dtype=torch.int32),
            torch.tensor(count),
            *([torch.full((capacity,), 9, dtype=torch.uint8)] if dtype.itemsize == 1 else []),  # scales
        )

    cameras = make_cameras(depth.shape[0], depth.shape[1:])
    expected_buffers, got_buffers = buffers(), tuple(x.to(DEVICE) for x in buffers())
    inputs = latents, depth, *cameras, mask, first_frame
    held, scales = expected_buffers[:4], expected_buffers[4:]
    report = definition("cache_write", *held, *inputs, bilinear, *limits, None, *scales)
    held, scales = got_buffers[:4], got_buffers[4:]
    got = triton_operator("cache_write", *held, *inputs, bilinear, *limits, None, *scales)
    agree((*got, *got_buffers), (report, *expected_buffers))
    assert report.sum() == latents[:, :1].numel() or latents.shape[1] == 0
    return report


def make_latents(views: int, channels: int, height: int, width: int, dtype=torch.float32, seed: int = 0):
    """Some tokens with one channel that is no number."""
    random = torch.Generator().manual_seed(seed)
    latents = torch.randn(views, channels, height, width, generator=random)
    latents.view(-1)[:: max(1, latents.numel() // 9)] = 1 + 2**-8
    bad = torch.randint(0, latents.numel(), (8,), generator=random)
    latents.view(-1)[bad] = torch.tensor([math.nan, math.inf, -math.inf, math.nan] * 2)
    return latents.to(dtype)


@comparison
@pytest.mark.parametrize(("given", "kept"), FEW_PAIRS)
def test_cache_write_dtypes(given, kept):
    latents = make_latents(2, 3, 5, 6, given)
    report = check_cache_write(latents, make_depth(2, 10, 12, 0.2), dtype=kept)
    assert report[0] > 0
    assert report[5] > 0


@comparison
@pytest.mark.parametrize(("channels", "given"), scenes.each_once([0, 1, 48, 65], FLOATS))
def test_cache_write_float8(given, channels):
    """Magnitudes from end to end, and what rounds to a tie."""
    latents = make_latents(2, channels, 5, 6, given) if channels else torch.zeros(2, 0, 5, 6, dtype=given)
    random = torch.Generator().manual_seed(channels)
    powers = 2.0 ** torch.randint(-150, 128, (2, 1, 5, 6), generator=random).double()
    steps = torch.randint(-64, 65, latents.shape, generator=random) / 32
    latents = torch.where(latents.isfinite(), (steps * powers).to(given), latents)
    report = check_cache_write(latents, make_depth(2, 10, 12, 0.2), dtype=torch.float8_e4m3fn)
    assert report[0] > 0
    assert report[5] > 0 or channels == 0


@comparison
@pytest.mark.parametrize("channels", [1, 48, 65])
def test_cache_write_channels(channels):
    check_cache_write(make_latents(1, channels, 5, 6), make_depth(1, 10, 12, 0.2))


@comparison
@pytest.mark.parametrize(("capacity", "count"), [(0, 0), (40, 0), (40, 39), (40, 40), (300, 7), (107, 7)])
def test_cache_write_refuses_what_does_not_fit(capacity, count):
    latents = torch.randn(2, 2, 7, 10)
    report = check_cache_write(latents, make_depth(2, 7, 10, 0.0), capacity=capacity, count=count)
    assert report[0] == min(140, capacity - count)


@comparison
@pytest.mark.parametrize(
    ("limits", "bilinear"),
    scenes.each_once([(0.0, math.inf), (0.7, 3.3), (0.7, 3.3), (2.0, 2.0), (0.0, 0.0), (0.0, 1e300)], [False, True]),
)
def test_cache_write_report(bilinear, limits):
    latents, depth = make_latents(3, 2, 5, 7), make_depth(3, 19, 23, 0.3)
    depth[0, 3:9] = 0.7
    check_cache_write(
        latents, depth, make_mask(3, 10, 15, 0.1), bilinear=bilinear, limits=limits, first_frame=2**31 - 8
    )


@comparison
def test_cache_write_scans_more_blocks_than_one_step(monkeypatch):
    from mirage_kernels.ops.cache_write import triton as module

    monkeypatch.setattr(module, "_SCAN", 4)
    check_cache_write(make_latents(5, 2, 9, 15), make_depth(5, 9, 15), capacity=150, count=3)


@comparison
@pytest.mark.parametrize("kept", [False, True])
def test_cache_write_all_or_nothing(kept):
    depth = torch.full((2, 8, 8), 2.0)
    report = check_cache_write(torch.zeros(2, 3, 4, 4), depth, torch.full(depth.shape, kept))
    assert report.tolist() == ([32, 0, 0, 0, 0, 0] if kept else [0, 0, 32, 0, 0, 0])


@comparison
@pytest.mark.parametrize("count", [-1, -50, 41, 2**40])
def test_cache_write_with_a_count_that_is_none_writes_nothing(count):
    buffers = torch.zeros(40, 4), torch.zeros(40, 2), torch.zeros(40, dtype=torch.int32), torch.tensor(count)
    moved = tuple(x.clone().to(DEVICE) for x in buffers)
    cameras = make_cameras(2, (7, 10))
    arguments = torch.randn(2, 2, 7, 10), make_depth(2, 7, 10, 0.0), *cameras, None, 0, False, 0.0, math.inf
    (report,) = triton_operator("cache_write", *moved, *arguments)
    assert report.tolist() == [0, 140, 0, 0, 0, 0]
    agree(moved, buffers)


@comparison
def test_cache_write_of_no_views():
    report = check_cache_write(torch.zeros(0, 3, 4, 5), torch.zeros(0, 8, 10), count=5)
    assert report.tolist() == [0] * 6


@comparison
def test_cache_write_strided_inputs():
    latents, depth = make_latents(4, 6, 5, 7), make_depth(4, 10, 14)
    check_cache_write(latents[::2, ::2], depth[1::2], make_mask(2, 14, 10, 0.1).mT)


# ---------------------------------------------------------------------------------------------------- bounded_write


def look_about(views: int, image: tuple[int, int], seed: int = 0, shift: float = 0.05, unknown: float = 0.3):
    """depth, intrinsics and cam2world of cameras side by side before a rough wall: much of it is seen again."""
    random = torch.Generator().manual_seed(seed)
    intrinsics, cam2world = make_cameras(1, image)
    intrinsics, cam2world = intrinsics.repeat(views, 1, 1), cam2world.repeat(views, 1, 1)
    cam2world[:, :3, 3] += shift * torch.randn(views, 3, generator=random, dtype=torch.float64)
    depth = 2 + 0.3 * torch.rand(views, *image, generator=random)
    depth[:, : image[0] // 3] *= 1 + 0.4 * (seed % 3)  # what stood there is gone, or is back
    specials = make_depth(views, *image, 1.0, seed)
    return torch.where(torch.rand(depth.shape, generator=random) < unknown, specials, depth), intrinsics, cam2world


def held_tokens(capacity: int, count: int, channels: int, dtype: torch.dtype, merge: bool, seed: int = 0):
    """points, features, frame_ids, violations, observations and count, with every special value and invalid tokens."""
    points, features, frame_ids, *_ = aligned_arguments(capacity, channels, 1, (5, 6), dtype, seed)
    random = torch.Generator().manual_seed(seed)
    free_space_violations, taken = (
        torch.tensor(values, dtype=torch.uint8)[torch.randint(0, 5, (capacity,), generator=random)]
        for values in ([0, 0, 1, 254, 255], [0, 1, 3, 16, 255])
    )
    return points, features, frame_ids, free_space_violations, taken if merge else None, torch.tensor([count])


def boxes_of(held) -> torch.Tensor:
    boxes = torch.empty(bounds_rows(held[0].shape[0]), 6)
    definition("block_bounds", held[0], held[-1], boxes)
    return boxes


def check_bounded_write(
    held,
    size=(5, 6),
    image=(10, 12),
    views=2,
    writes=2,
    given=torch.float32,
    moving=None,
    bilinear=False,
    limits=(0.0, math.inf),
    near=0.05,
    views_per_voxel=4,
    carve_views=2,
    change=lambda depth, intrinsics, cam2world: (depth, intrinsics, cam2world),
    scales=None,
):
    """The sum of the reports of a few writes, the same by both; 1000 + t are the frame ids of the views."""
    expected, boxes = [None if x is None else x.clone() for x in held], boxes_of(held)
    got, got_boxes = [None if x is None else x.clone().to(DEVICE) for x in held], boxes.clone().to(DEVICE)
    expected_scales, got_scales = (None if scales is None else scales.clone().to(x) for x in ("cpu", DEVICE))
    centers = torch.randn(1000 + views * writes, 3, generator=torch.Generator().manual_seed(5))
    centers[3, 1] = math.nan
    channels, total = held[1].shape[1], torch.zeros(len(WRITE_REPORT), dtype=torch.int64)
    for write in range(writes):
        depth, intrinsics, cam2world = change(*look_about(views, image, write))
        first_frame = 1000 + write * views
        centers[first_frame : first_frame + views] = cam2world[:, :3, 3].float()
        latents = torch.zeros(views, channels, *size, dtype=given)
        if latents.numel() > 0:
            latents = make_latents(views, channels, *size, given, write)
        mask = None if moving is None else make_mask(views, *image, moving, write)
        arguments = centers, latents, depth, intrinsics, cam2world, mask, z_order(size), first_frame
        rest = *limits, near, views_per_voxel, carve_views
        report = definition("bounded_write", *expected, *arguments, bilinear, *rest, boxes, expected_scales)
        agree(triton_operator("bounded_write", *got, *arguments, bilinear, *rest, got_boxes, got_scales), report)
        ours, theirs = (*got, got_boxes, got_scales), (*expected, boxes, expected_scales)
        agree([x for x in ours if x is not None], tuple(x for x in theirs if x is not None))
        total += report
    assert total[:9].sum() == writes * views * size[0] * size[1]
    return dict(zip(WRITE_REPORT, total.tolist(), strict=True))


def empty_tokens(capacity: int, channels: int = 3, merge: bool = False):
    return held_tokens(capacity, 0, channels, torch.float32, merge)


@comparison
@pytest.mark.parametrize(("given", "kept"), FEW_PAIRS)
def test_bounded_write_dtypes(given, kept):
    for merge in (False, True):
        report = check_bounded_write(held_tokens(160, 40, 3, kept, merge), given=given, moving=0.01)
        assert report["written"] > 0 and report["merged" if merge else "replaced"] > 0
        assert report["masked"] > 0 and report["unknown_depth"] > 0 and report["non_finite"] > 0


@comparison
@pytest.mark.parametrize(("channels", "merge"), scenes.each_once([1, 48, 65, 3], [False, True]))
def test_bounded_write_float8(merge, channels):
    points, features, *rest = held_tokens(160, 40, channels, torch.float32, merge)
    features, scales = quantize_rows(features.nan_to_num(0.5, 1.0, -1.0).clamp(-4, 4))
    report = check_bounded_write((points, features, *rest), moving=0.01, scales=scales)
    assert report["written"] > 0 and report["merged" if merge else "replaced"] > 0


@comparison
@pytest.mark.parametrize(
    ("views_per_voxel", "carve_views", "merge"),
    [(1, 1, False), (1, 2, True), (2, 0, False), (2, 2, False), (64, 1, True)],
)
def test_bounded_write_again_and_again(merge, views_per_voxel, carve_views):
    report = check_bounded_write(
        empty_tokens(400, merge=merge), writes=4, views_per_voxel=views_per_voxel, carve_views=carve_views
    )
    assert report["written"] > 30
    assert (report["merged"] if merge else min(report["replaced"], report["covered"])) > 10
    assert (report["carved"] > 0) == (carve_views > 0)
    assert report["refused"] > 0 or views_per_voxel > 1


@comparison
@pytest.mark.parametrize(("views_per_voxel", "merge"), scenes.each_once([1, 3, 7, 1], [False, True]))
def test_bounded_write_where_many_come_to_one_voxel(merge, views_per_voxel):
    """Cells far wider than high, whose tokens lie within a footprint of each other: the order decides who gets in."""

    def widen(depth, intrinsics, cam2world):
        intrinsics[:, 1] *= 12
        return depth, intrinsics, cam2world

    report = check_bounded_write(
        held_tokens(300, 60, 2, torch.float32, merge), (12, 4), (12, 8), change=widen, views_per_voxel=views_per_voxel
    )
    assert report["written"] > 5 and report["refused"] > 10


@comparison
@pytest.mark.parametrize(("count", "merge"), scenes.each_once([1, 255, 256, 257, 600], [True, False]))
def test_bounded_write_among_held_tokens(merge, count):
    """Invalid ones, counts of any number, points that no arithmetic survives."""
    report = check_bounded_write(held_tokens(700, count, 3, torch.float32, merge), views=1, near=0.5)
    assert report["carved"] > 0 or count == 1


@comparison
@pytest.mark.parametrize(("capacity", "count"), [(0, 0), (20, 0), (40, 39), (40, 40)])
def test_bounded_write_refuses_what_does_not_fit(capacity, count):
    report = check_bounded_write(held_tokens(capacity, count, 2, torch.float32, capacity == 20), writes=1)
    assert report["written"] == capacity - count
    assert report["refused"] > 0


@comparison
@pytest.mark.parametrize("count", [-1, -50, 41, 2**40])
def test_bounded_write_with_a_count_that_is_none_writes_nothing(count):
    held = held_tokens(40, count, 2, torch.float32, True)
    moved = tuple(x.clone().to(DEVICE) for x in held)
    depth, *cameras = look_about(1, (10, 12), unknown=0.0)
    latents, centers = torch.randn(1, 2, 5, 6), torch.randn(4, 3)
    arguments = centers, latents, depth, *cameras, None, z_order((5, 6)), 0, False, 0.0, math.inf, 0.05, 4, 1
    (report,) = triton_operator("bounded_write", *moved, *arguments)
    assert report.tolist() == [0, 0, 0, 0, 30, 0, 0, 0, 0, 0, 0]
    agree(moved, held)


@comparison
@pytest.mark.parametrize(
    ("image", "size", "bilinear"),
    [
        ((9, 7), (1, 1), False),
        ((5, 70), (1, 33), True),
        ((66, 4), (33, 1), False),
        ((13, 22), (7, 11), True),
        ((13, 22), (7, 11), False),
    ],
)
def test_bounded_write_sizes(image, size, bilinear, monkeypatch):
    from mirage_kernels.ops.bounded_write import triton as module

    monkeypatch.setattr(module, "_SCAN", 16)  # more cells than one step
    report = check_bounded_write(empty_tokens(300, merge=bilinear), size, image, bilinear=bilinear, carve_views=1)
    assert report["written"] > 0 or size == (1, 1)


@comparison
def test_bounded_write_of_a_grid_finer_than_the_depth():
    assert check_bounded_write(empty_tokens(300), (6, 9), (4, 5), bilinear=True, carve_views=1)["written"] > 0


@comparison
@pytest.mark.parametrize("limits", [(2.1, 2.2), (0.0, 0.0), (0.0, 1e300)])
def test_bounded_write_limits(limits):
    report = check_bounded_write(held_tokens(200, 40, 2, torch.float32, False), moving=0.02, limits=limits)
    assert report["out_of_range"] > 0 or limits[1] > 1e200


@comparison
@pytest.mark.parametrize(("channels", "merge"), scenes.each_once([0, 1, 48, 65], [False, True]))
def test_bounded_write_channels(channels, merge):
    check_bounded_write(empty_tokens(100, channels, merge), views=1, writes=2)


@comparison
@pytest.mark.parametrize("flaw", ["singular", "nan", "tiny", "huge"])
def test_bounded_write_degenerate_cameras(flaw):
    def spoil(depth, intrinsics, cam2world):
        cam2world[0, :3, :3] *= {"singular": 0.0, "nan": math.nan, "tiny": 1e-30, "huge": 1e30}[flaw]
        return depth, intrinsics, cam2world

    check_bounded_write(held_tokens(200, 60, 2, torch.float32, False), change=spoil)


@comparison
def test_bounded_write_tokens_on_the_borders_of_voxels():
    """Whole coordinates and footprints around the square root of two, where a last bit decides the voxel."""
    held = held_tokens(200, 180, 2, torch.float32, False)
    held[0][:, :3] = held[0][:, :3].nan_to_num(0.0, 1e10, -1e10).round()
    edge = torch.tensor(2.0).sqrt() * 2.0 ** torch.arange(-2, 3)
    edge = torch.cat([edge, edge.nextafter(torch.tensor(0.0)), edge.nextafter(torch.tensor(9.0))])
    held[0][:, 3] = edge.repeat(20)[:200]

    def walls(depth, intrinsics, cam2world):
        cam2world[:] = torch.eye(4, dtype=torch.float64)
        intrinsics[:, :2, :2] = torch.eye(2, dtype=torch.float64) * 2
        return torch.where(depth > 0, depth.nan_to_num(0.0, 0.0, 0.0).round(), depth), intrinsics, cam2world

    check_bounded_write(held, change=walls, views_per_voxel=1)


@comparison
def test_bounded_write_of_no_views():
    report = check_bounded_write(held_tokens(20, 5, 3, torch.float32, True), views=0)
    assert set(report.values()) == {0}


@comparison
def test_bounded_write_strided_inputs():
    def strided(depth, intrinsics, cam2world):
        return depth.mT.contiguous().mT, intrinsics.mT.contiguous().mT, cam2world.mT.contiguous().mT

    check_bounded_write(held_tokens(200, 60, 2, torch.float32, False), moving=0.01, change=strided)


# ------------------------------------------------------------------------------------------------------- cache_compact


def check_cache_compact(held, max_tokens, with_violations=True):
    expected = [None if x is None else x.clone() for x in held]
    if not with_violations:
        expected[3] = None
    got, boxes = [None if x is None else x.clone().to(DEVICE) for x in expected], boxes_of(held)
    got_boxes, scales, got_scales = boxes.clone().to(DEVICE), None, None
    if held[1].element_size() == 1:
        scales = torch.arange(len(held[0])).to(torch.uint8)
        got_scales = scales.clone().to(DEVICE)
    evicted = definition("cache_compact", *expected, max_tokens, boxes, scales)
    agree(triton_operator("cache_compact", *got, max_tokens, got_boxes, got_scales), evicted)
    ours, theirs = (*got, got_boxes, got_scales), (*expected, boxes, scales)
    agree([x for x in ours if x is not None], tuple(x for x in theirs if x is not None))
    return int(evicted), int(expected[5])


@comparison
@pytest.mark.parametrize("max_tokens", [0, 1, 100, 199, 2**62])
@pytest.mark.parametrize("with_violations", [False, True])
def test_cache_compact(max_tokens, with_violations):
    held = held_tokens(300, 280, 5, torch.float16, max_tokens % 2 == 0)
    alive = int((held[3][:280] != 255).sum()) if with_violations else 280
    assert check_cache_compact(held, max_tokens, with_violations) == (
        max(alive - max_tokens, 0),
        min(alive, max_tokens),
    )


@comparison
@pytest.mark.parametrize(("channels", "dtype"), scenes.each_once([0, 1, 48, 65, 5], [*FLOATS, torch.float8_e4m3fn]))
def test_cache_compact_channels(dtype, channels):
    check_cache_compact(held_tokens(150, 140, channels, dtype, True), 2**62)


@comparison
@pytest.mark.parametrize(
    ("count", "free_space_violations"), scenes.each_once([0, 1, 127, 128, 129, 300, 300], [0, 254, 255])
)
def test_cache_compact_where_none_or_all_are_dead(count, free_space_violations):
    held = held_tokens(300, count, 3, torch.float32, True)
    held[3][:] = free_space_violations
    assert check_cache_compact(held, 2**62) == (0, 0 if free_space_violations == 255 else count)
    assert check_cache_compact(held, 100)[1] == (0 if free_space_violations == 255 else min(count, 100))


@comparison
@pytest.mark.parametrize("max_tokens", [3, 350, 2**62])
def test_cache_compact_moves_chunk_after_chunk(max_tokens, monkeypatch):
    from mirage_kernels.ops.cache_compact import triton as module

    monkeypatch.setattr(module, "_CHUNK", 2)
    monkeypatch.setattr(module, "_SCAN", 2)
    held = held_tokens(700, 650, 3, torch.bfloat16, True)
    held[3][:130] = held[3][256:400] = 0  # a block that stays where it is, and one that moves whole
    check_cache_compact(held, max_tokens)


@comparison
@pytest.mark.parametrize("max_tokens", [1, 60, 120])
def test_cache_compact_frame_ids(max_tokens):
    """Of one frame, of every frame, and the extremes of int32."""
    held = held_tokens(140, 130, 2, torch.float32, False)
    random = torch.Generator().manual_seed(2)
    extremes = torch.tensor([-(2**31), -1, 0, 15, 16, 2**31 - 1], dtype=torch.int32)
    for frame_ids in (
        torch.full((140,), 7, dtype=torch.int32),
        torch.randint(-(2**31), 2**31, (140,), generator=random).int(),
        extremes[torch.randint(0, 6, (140,), generator=random)],
    ):
        held[2][:] = frame_ids
        check_cache_compact(held, max_tokens)


@comparison
@pytest.mark.parametrize("count", [-1, 41, 2**40])
def test_cache_compact_with_a_count_that_is_none_changes_nothing(count):
    held = held_tokens(40, count, 2, torch.float32, True)
    moved = tuple(x.clone().to(DEVICE) for x in held)
    (evicted,) = triton_operator("cache_compact", *moved, 3)
    assert evicted == 0
    agree(moved, held)


@comparison
def test_cache_compact_of_no_capacity():
    assert check_cache_compact(held_tokens(0, 0, 2, torch.float32, True), 0) == (0, 0)


# ----------------------------------------------------------------------------------------------------- view_overlap


def check_view_overlap(points, num_points, views, targets, size=(6, 7), voxel_size=0.5, near=0.05):
    cameras = (*make_cameras(views, size, 1), *make_cameras(targets, size, 2))
    got = triton_operator("view_overlap", points, num_points, *cameras, *size, voxel_size, near)
    expected = definition("view_overlap", points, num_points, *cameras, *size, voxel_size, near)
    agree(got, expected)
    return expected


@comparison
@pytest.mark.parametrize(("views", "targets"), [(0, 2), (1, 0), (1, 1), (3, 2), (31, 1), (32, 1), (65, 3), (2, 35)])
def test_view_overlap_views(views, targets):
    counts = check_view_overlap(make_points(300), None, views, targets)
    if views and targets:
        assert (counts[:, 0] > 0).any()


@comparison
@pytest.mark.parametrize("count", [0, 1, 511, 512, 513])
def test_view_overlap_points(count):
    check_view_overlap(make_points(count), None, 2, 2)


@comparison
@pytest.mark.parametrize("live", [-1, 0, 100, 700])
def test_view_overlap_num_points(live):
    check_view_overlap(make_points(600), torch.tensor(live), 2, 2)


@comparison
@pytest.mark.parametrize("voxel_size", [1e-45, 1e-300, 1e-6, 0.1, 3.0, 1e30, 1e300])
def test_view_overlap_voxel_sizes(voxel_size):
    check_view_overlap(make_points(400), None, 3, 2, voxel_size=voxel_size)


@comparison
def test_view_overlap_strided_inputs():
    check_view_overlap(make_points(300).t().contiguous().t(), None, 2, 1)


# ---------------------------------------------------------------------------------------------------------- bounds

READS = ("splat", "splat_aligned", "view_overlap")


def make_blocks(count: int, seed: int = 0) -> torch.Tensor:
    """Clusters all round the cameras, a block each, the last one partial, one dead, all with dead tokens."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(count, 3, generator=random), dim=1)
    centres *= 0.5 + 4 * torch.rand(count, 1, generator=random)
    points = torch.rand(count * BLOCK_TOKENS - 100, 4, generator=random)
    points[:, :3] = centres.repeat_interleave(BLOCK_TOKENS, 0)[: len(points)] + points[:, :3] - 0.5
    points[:-BLOCK_TOKENS, 3] *= 0.05  # only the others may be wide enough to close holes
    for row, special in enumerate((math.nan, math.inf, -math.inf)):
        points[row::9, row] = special
    points[BLOCK_TOKENS : 2 * BLOCK_TOKENS] = math.nan
    return points


def bounds_of(points: torch.Tensor, live: torch.Tensor | None = None) -> torch.Tensor:
    bounds = torch.empty(bounds_rows(len(points)), 6)
    definition("block_bounds", points, live, bounds)
    return bounds


@comparison
@pytest.mark.parametrize("live", [None, 0, 300, 700])
def test_block_bounds_of_points_that_are_not_finite(live):
    points = torch.randn(700, 4, generator=torch.Generator().manual_seed(3))
    for axis, bad in enumerate((math.nan, math.inf, -math.inf)):
        points[axis::7, axis] = bad
    points[256:512:2], points[257:512:2] = math.nan, -0.0
    live = None if live is None else torch.tensor(live)
    got, expected = (torch.full((bounds_rows(700), 6), 7.0) for _ in range(2))
    OPERATORS["block_bounds"].reference(points, live, expected)
    put = [None if x is None else x.to(DEVICE) for x in (points, live, got)]
    OPERATORS["block_bounds"].overloads["triton"](*put)
    same_bits(put[2], expected)


def read(name, triton, points, live, cameras, targets, size, bounds=None, float8=False):
    """By the Triton kernels or, without bounds, by the definition."""
    features, scales = float8_of(len(points), 3) if float8 else (features_of(len(points), 3, torch.float32), None)
    frames = torch.arange(-1, len(points) - 1, dtype=torch.int32) % 4, 0.1 * torch.arange(9.0).view(3, 3)
    if name == "view_overlap":
        given, options, stored = (points, live, *cameras, *targets), (0.5, 0.05), ()
    else:
        aligned = name == "splat_aligned"
        given = points, features, live, *(frames if aligned else ()), *cameras
        options, stored = (0.05, *([20.0] if aligned else []), torch.float32), (scales,)
    if triton:
        return triton_operator(name, *given, *size, *options, bounds, *stored)[:4]
    found = definition(name, *given, *size, *options, None, *stored)
    return found if isinstance(found, tuple) else (found,)


def culled(bounds, live, cameras, size, near=0.05, margin=0):
    """(views, blocks) bool: which view may see which block; the list of blocks is held to it."""
    from mirage_kernels.ops.common.triton.culling import WORD_VIEWS, cull
    from mirage_kernels.ops.common.triton.launching import float32

    projections = make_projection(*cameras, torch.float32).view(-1, 12).to(DEVICE)
    points = torch.empty(len(bounds) * BLOCK_TOKENS, 4, device=DEVICE)
    counted = None if live is None else live.to(DEVICE)
    masks, numbers, listed, blocks = cull(bounds.to(DEVICE), points, counted, projections, *size, float32(near), margin)
    assert blocks == len(bounds)
    views = torch.arange(len(projections))
    seen = (masks.cpu()[views // WORD_VIEWS] >> (views % WORD_VIEWS)[:, None]) & 1 != 0
    assert numbers[: listed.item()].sort().values.tolist() == seen.any(0).nonzero().flatten().tolist()
    return seen


@comparison
@pytest.mark.parametrize(
    ("name", "live"),
    [*((name, None) for name in READS), *scenes.each_once(READS, [1100, 0])],
)
def test_reads_by_bounds_are_the_same_reads(name, live):
    """Blocks before, behind and across the borders of the views; counts short of the capacity; float8 features."""
    size, points = (6, 7), make_blocks(6, seed=26)
    cameras, targets = make_cameras(3, size), make_cameras(2, size, 1)
    cameras[1][2, :3, :3] *= torch.tensor([-1.0, 1.0, -1.0])  # merge back
    live = None if live is None else torch.tensor(live)
    bounds = bounds_of(points, live)
    seen = culled(bounds[:6], live, cameras, size)
    assert not seen[:, 1].any()
    if live is None:
        assert seen.any(1).all() and 2 < seen.any(0).sum() < 6 and 3 < seen.sum() < 2 * seen.any(0).sum()
    options = points, live, cameras, targets, size
    got, expected = (read(name, triton, *options, bounds, live is not None) for triton in (True, False))
    agree(got, expected)
    assert expected[1 if len(expected) > 1 else 0].any() == (live is None or live > 0)


@comparison
@pytest.mark.parametrize("name", ["splat", "view_overlap"])
def test_reads_by_bounds_of_more_views_than_a_word_has(name):
    size, points = (2, 3), make_blocks(2, seed=3)
    points[BLOCK_TOKENS:] = make_blocks(2, seed=4)[: len(points) - BLOCK_TOKENS]
    cameras, targets = make_cameras(33, size), make_cameras(33, size, 1)
    cameras[1][::2, :3, :3] *= torch.tensor([-1.0, 1.0, -1.0])
    bounds = bounds_of(points)
    seen = culled(bounds[:2], None, cameras, size)
    assert seen[31:].any() and not seen[31:].all()
    agree(*(read(name, triton, points, None, cameras, targets, size, bounds) for triton in (True, False)))


@comparison
@pytest.mark.parametrize("name", READS)
def test_reads_look_at_no_token_of_blocks_that_bounds_put_out_of_view(name):
    """Bounds that break their promise hide tokens, from one view, from the other, from both or from none."""
    size = (6, 7)
    intrinsics, cam2world = make_cameras(2, size)
    cam2world[:] = torch.eye(4, dtype=torch.float64)
    cam2world[1, :3, :3] *= torch.tensor([-1.0, 1.0, -1.0])  # the two see nothing in common
    points = torch.randn(5 * BLOCK_TOKENS - 50, 4, generator=torch.Generator().manual_seed(0))
    points[:, 3] = 0.1
    before, behind = [-0.1, -0.1, 1.0, 0.1, 0.1, 2.0], [-0.1, -0.1, -2.0, 0.1, 0.1, -1.0]
    nothing, beside, all_round = [math.inf] * 3 + [-math.inf] * 3, [50.0, -1, -1, 60, 1, 1], [-9.0] * 3 + [9.0] * 3
    bounds = torch.tensor([before, nothing, all_round, beside, behind, all_round])
    block, promised = torch.arange(len(points)) // BLOCK_TOKENS, points.clone()
    promised[(block == 1) | (block == 3)] = math.nan
    promised[(block == 0) & (points[:, 2] < 0) | (block == 4) & (points[:, 2] > 0)] = math.nan
    cameras = intrinsics, cam2world
    options = None, cameras, tuple(x[:1] for x in cameras), size
    expected = read(name, False, promised, *options)
    agree(read(name, True, points, *options, bounds), expected)
    assert not torch.equal(read(name, False, points, *options)[-1], expected[-1])


@comparison
@pytest.mark.parametrize(("distance", "footprint"), [(-0.2, 1e-3), (-1.4, 5.0)])
def test_blocks_beside_the_grid_reach_into_its_border(distance, footprint):
    """By half a cell and a little, or with wide tokens by more; nothing of them is in the view itself."""
    points = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    points[:, 0] = distance - 0.2 * points[:, 0]
    points[:, 2:] = torch.tensor([1.0, footprint])
    cameras = torch.eye(3, dtype=torch.float64)[None], torch.eye(4, dtype=torch.float64)[None]
    options = points, None, cameras, cameras, (1, 2)
    expected = read("splat_aligned", False, *options)
    agree(read("splat_aligned", True, *options, bounds_of(points)), expected)
    assert expected[1].any() and not read("splat", False, *options)[1].any()


@comparison
def test_gradients_by_bounds_are_the_same():
    """Those of splat_aligned, whose backward reads the keys of its fits."""
    if not available_backends()["cpu"]:
        pytest.skip("the CPU operators were not built: nothing to compare with")
    size, points = (6, 7), torch.cat(make_blocks(6, seed=26).split(BLOCK_TOKENS)[:4:2])[: BLOCK_TOKENS + 40]
    points[:, 3] = 1e-3  # closes no holes, which take the interpreter long
    cameras = [x[::2] for x in make_cameras(3, size)]
    cameras[1][1, :3, :3] *= torch.tensor([-1.0, 1.0, -1.0])
    assert culled(bounds_of(points)[:2], None, cameras, size).tolist() == [[True, False], [False, True]]
    features = torch.randn(len(points), 2, generator=torch.Generator().manual_seed(0))
    frames = torch.zeros(len(points), dtype=torch.int32), torch.zeros(1, 3)
    grads = []
    for backend, device, bounds in (("triton", DEVICE, bounds_of(points).to(DEVICE)), ("cpu", "cpu", None)):
        leaves = [x.to(device).detach().requires_grad_() for x in (points, features)]
        rest = [x.to(device) for x in (*frames, *cameras)]
        with use_backend(backend):
            view = splat_aligned(*leaves, *rest, size, sharpness=2.0, bounds=bounds)
            (view.latents * view.latents.detach()).sum().backward()
        grads.append(tuple(x.grad for x in leaves))
    assert all(x.any() for x in grads[1])
    agree(*grads)


@comparison
@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("unit", [1e-30, 1e-18, 1.0, 1e14, 1e30])
def test_no_block_in_view_is_culled(unit, margin):
    """A token a block, on the borders of the frustum up to a few last bits to either side, and well off them."""
    height, width = size = (5, 8)
    near = 0.7 * unit
    intrinsics, cam2world = make_cameras(2, size, 5)
    cam2world[:, :3, 3] *= unit
    random = torch.Generator().manual_seed(0)
    side_u = torch.tensor([-margin, 0, 0.5 * width, width, width + margin, -margin - 0.1, width + margin + 0.1])
    side_v = torch.tensor([-margin, 0, 0.5 * height, height, height + margin, -margin - 0.1, height + margin + 0.1])
    depths = torch.tensor([-1.0, 0.6, 0.7, 1.0, 6.0])
    u, v, z = (grid.flatten().double() for grid in torch.meshgrid(side_u, side_v, depths, indexing="ij"))
    local = torch.stack([u * z, v * z, z]) * unit
    world = cam2world[:, :3, :3] @ torch.linalg.solve(intrinsics, local) + cam2world[:, :3, 3:]
    world = world.mT.reshape(-1, 3).float()
    nudged = world.view(torch.int32) + torch.randint(-4, 5, world.shape, generator=random, dtype=torch.int32)
    points = nudged.view(torch.float32)
    seen = culled(points.repeat(1, 2), None, (intrinsics, cam2world), size, near, margin)
    counts = []
    for view, projection in enumerate(make_projection(intrinsics, cam2world, torch.float32)):
        column, row, depth = project_points(points, projection)
        visible = in_view(column + margin, row + margin, depth, (height + 2 * margin, width + 2 * margin), near)
        assert not (visible & ~seen[view]).any()
        counts.append([int(visible.sum()), int(seen[view].sum())])
    assert all(0 < visible <= kept for visible, kept in counts)
    if unit == 1.0:  # what lies a tenth of a cell off is culled
        own = seen.view(2, 2, -1)[[0, 1], [0, 1]]
        off = (z < 0.65) | (u < -margin - 0.05) | (u > width + margin + 0.05)
        off |= (v < -margin - 0.05) | (v > height + margin + 0.05)
        assert not own[:, off].any() and own[:, ~off].any()


@comparison
def test_nothing_is_culled_by_what_is_no_number():
    size = (4, 5)
    intrinsics, cam2world = make_cameras(5, size)
    cam2world[1], cam2world[2, :3, :3], cam2world[3, :3, 3] = math.nan, 0, 1e30
    cam2world[4, :3, :3] *= 1e-25
    behind = torch.tensor([[-1.0, -1.0, -10.0, 1.0, 1.0, -8.0]])
    assert culled(behind, None, (intrinsics, cam2world), size).flatten().tolist() == [False, True, True, True, True]
    loose = behind.repeat(12, 1)
    loose[range(6), range(6)] = math.nan
    loose[range(6, 12), range(6)] = torch.tensor([-math.inf] * 3 + [math.inf] * 3)
    assert culled(loose, None, (intrinsics, cam2world), size).all()


# ---------------------------------------------------------------------------------------------------- registration


def launch_arguments(device: str) -> dict[str, tuple[object, ...]]:
    """Small but ordinary arguments of every operator, every kernel of which they launch."""
    size = (16, 16)
    intrinsics, cam2world = make_cameras(2, size)
    depth, mask = make_depth(2, 32, 32), make_mask(2, 32, 32, 0.01)
    points, features = make_points(512), features_of(512, 48, torch.float32)
    latents = make_latents(2, 48, *size, torch.bfloat16)
    aligned = aligned_arguments(512, 48, 2, size)
    live, boxes = torch.tensor(500), torch.tensor([[-9.0] * 3 + [9.0] * 3] * 4)
    index = torch.full((2, *size), -1)
    buffers = torch.zeros(600, 4), torch.zeros(600, 48), torch.zeros(600, dtype=torch.int32), torch.tensor(0)
    held = held_tokens(600, 500, 48, torch.bfloat16, True)
    order = z_order(size)
    arguments = {
        "back_project": (depth, intrinsics, cam2world, mask, *size, False),
        "splat": (points, features, live, intrinsics, cam2world, *size, 0.05, torch.bfloat16, boxes[:3]),
        "splat_backward": (latents, index, 512, torch.bfloat16),
        "splat_aligned": (*aligned[:2], live, *aligned[2:], *size, 0.05, 20.0, torch.bfloat16, boxes[:3]),
        "splat_aligned_backward": (latents, *aligned, torch.full((2, *size, 4), NO_TOKEN), 20.0, True),
        "cache_write": (*buffers, latents, depth, intrinsics, cam2world, None, 3, True, 0.0, math.inf, boxes),
        "bounded_write": (
            *held,
            torch.randn(9, 3),
            latents,
            depth,
            intrinsics,
            cam2world,
            mask,
            order,
            3,
            False,
            0.0,
            math.inf,
            0.05,
            4,
            2,
            boxes,
        ),
        "cache_compact": (*held, 300, boxes),
        "block_bounds": (points, live, torch.zeros(bounds_rows(len(points)), 6)),
        "view_overlap": (points, live, intrinsics, cam2world, intrinsics, cam2world, *size, 0.1, 0.05, boxes[:3]),
    }
    return {
        name: tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in values)
        for name, values in arguments.items()
    }


@comparison
@pytest.mark.parametrize("name", NAMES)
def test_registration(name):
    """Schema, fake and autograd agree with what the operator does; writes mutate what they say they do."""
    # Dispatch with dynamic shapes, which runs kernels many times, is checked in test_registration.py: the same fakes.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPERATORS[name].overloads["triton"], launch_arguments(DEVICE)[name], test_utils=checks)


@comparison
def test_backend_is_available_and_can_be_forced():
    assert available_backends()["triton"]
    with use_backend("triton"):
        pass


@on_gpu
@pytest.mark.parametrize("name", NAMES)
def test_cuda_graph(name):
    """Captured once, replayed on new contents of the same tensors."""
    arguments = launch_arguments("cuda")[name]
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    kept = [x.clone() for x in tensors]
    operator = OPERATORS[name].overloads["triton"]

    def renew(scale):
        for tensor, content in zip(tensors, kept, strict=True):
            tensor.copy_(content)
        arguments[0].mul_(scale)

    def copied(result):
        return tuple(x.cpu() for x in ((*result,) if isinstance(result, tuple) else (result,))) + tuple(
            x.cpu() for x in tensors
        )

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        operator(*arguments)  # compiles
    torch.cuda.synchronize()
    renew(1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator(*arguments)
    renew(1.5)
    graph.replay()
    torch.cuda.synchronize()
    captured = copied(captured)
    renew(1.5)
    agree(captured, copied(operator(*arguments)))


# ---------------------------------------------------------------------------------------------------- without a GPU


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("part", PARTS)
def test_comparisons_in_the_interpreter(part):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", part, str(Path(__file__))],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", run.stdout).group(1))
    assert passed >= PARTS[part], run.stdout[-10000:]


def record_launches(
    name: str, monkeypatch: pytest.MonkeyPatch, changes: dict[int, object] | None = None
) -> list[tuple[object, dict, dict]]:
    """The launches of one operator on tensors without data, which proves that no launcher waits for a value."""
    from triton.runtime.jit import JITFunction

    launches = []

    def run(kernel, *arguments, grid, warmup, **options):
        bound = inspect.signature(kernel.fn).bind(
            *arguments, **{k: options.pop(k) for k in list(options) if k in kernel.arg_names}
        )
        assert all(side > 0 for side in grid)
        launches.append((kernel, dict(bound.arguments), options))

    monkeypatch.setattr(JITFunction, "run", run)
    module = importlib.import_module(f"mirage_kernels.ops.{name.removesuffix('_backward')}.triton")
    given = dict(enumerate(launch_arguments("meta")[name])) | (changes or {})
    getattr(module, name)(*given.values())
    return launches


def compile_launch(kernel, arguments: dict, options: dict, capability: int):
    """As the launcher would compile it for these arguments: ones are constants, multiples of 16 are known as such."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and not parameter.do_not_specialize:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@compiles
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("back_project", {"lift_kernel", "tokens_kernel"}),
        ("splat", {"prepare_kernel", "cull_kernel", "nearest_kernel", "resolve_kernel"}),
        ("splat_backward", {"backward_kernel"}),
        ("splat_aligned", {"prepare_kernel", "cull_kernel", "nearest_kernel", "best_kernel", "readout_kernel"}),
        ("splat_aligned_backward", {"prepare_kernel", "weight_kernel", "gather_kernel"}),
        (
            "cache_write",
            {
                "lift_kernel",
                "tokens_kernel",
                "classify_kernel",
                "scan_kernel",
                "append_kernel",
                "appended_bounds_kernel",
                "tiles_kernel",
            },
        ),
        (
            "bounded_write",
            {
                "lift_kernel",
                "tokens_kernel",
                "classify_kernel",
                "prepare_kernel",
                "voxel_kernel",
                "walk_kernel",
                "rank_kernel",
                "slot_kernel",
                "write_kernel",
                "bounds_kernel",
                "tiles_kernel",
            },
        ),
        (
            "cache_compact",
            {"digit_kernel", "count_kernel", "scan_kernel", "move_kernel", "bounds_kernel", "tiles_kernel"},
        ),
        ("block_bounds", {"bounds_kernel", "tiles_kernel"}),
        ("view_overlap", {"prepare_kernel", "cull_kernel", "mark_kernel", "count_kernel"}),
    ],
)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_a_gpu(name, kernels, capability, monkeypatch):
    launches = record_launches(name, monkeypatch)
    assert {kernel.fn.__name__ for kernel, *_ in launches} == kernels
    for kernel, arguments, options in launches:
        compiled = compile_launch(kernel, arguments, options, capability)
        ptx = compiled.asm["ptx"]
        assert len(compiled.asm["cubin"]) > 0
        where = f"{kernel.fn.__name__} for sm_{capability}"
        assert not re.search(r"\bfma\.", ptx), f"{where} contracts into fused multiply-adds"
        assert not re.search(r"\b(div|rcp|sqrt)\.(full|approx)", ptx), f"{where} divides approximately"
        assert ".ftz" not in ptx, f"{where} flushes denormals"
        assert not re.search(r"\b(atom|red)\..*\.f(16|32|64)", ptx), f"{where} has float atomics"
        if kernel.fn.__name__ in ("nearest_kernel", "mark_kernel", "walk_kernel"):
            assert "mul.rn.f32" in ptx and "div.rn.f32" in ptx, where  # the assertions above saw a projection
            assert "ld.global.v4" in ptx or ".v4.b32" in ptx, f"{where} does not load a point at once"


@compiles
def test_compiles_for_large_cells_and_wide_indices(monkeypatch):
    launches = record_launches("back_project", monkeypatch)
    kernel, arguments, options = launches[-1]
    assert not arguments["WIDE"] and arguments["CHUNKS"] == arguments["MASK_CHUNKS"] == 1
    changes = {"WIDE": True, "TOKENS": 1, "PIXELS": 2048, "CHUNKS": 3, "MASK_PIXELS": 2048, "MASK_CHUNKS": 2}
    compile_launch(kernel, arguments | changes, {**options, "num_warps": 4}, 90)


@compiles
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bounded_write", {4: None, 19: 0, 20: None}),
        ("cache_compact", {3: None, 4: None, 6: 2**62, 7: None}),
        ("splat", {2: None, 9: None}),
        ("splat_aligned", {2: None, 12: None}),
        ("view_overlap", {1: None, 10: None}),
        ("view_overlap", {4: torch.empty(0, 3, 3, device="meta"), 5: torch.empty(0, 4, 4, device="meta")}),
    ],
)
def test_compiles_without_what_may_be_left_out(name, changes, monkeypatch):
    """Nor carving, nor eviction, nor counts, nor bounds, nor targets."""
    for kernel, arguments, options in record_launches(name, monkeypatch, changes):
        compile_launch(kernel, arguments, options, 90)


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "name", ["splat", "splat_aligned", "splat_aligned_backward", "cache_write", "bounded_write", "cache_compact"]
)
def test_compiles_float8_features(name, capability, monkeypatch):
    """By integers: sm_80 has no conversions of its own."""
    given = launch_arguments("meta")[name]
    position = 2 if name == "splat_aligned_backward" else 1
    features = given[position].to(torch.float8_e4m3fn)
    changes = {position: features, len(given): torch.empty(len(features), dtype=torch.uint8, device="meta")}
    launches = record_launches(name, monkeypatch, changes)
    assert any(arguments.get("scales") is not None for _, arguments, _ in launches)
    for kernel, arguments, options in launches:
        ptx = compile_launch(kernel, arguments, options, capability).asm["ptx"]
        assert "e4m3" not in ptx and ".ftz" not in ptx and not re.search(r"\bfma\.", ptx), kernel.fn.__name__


@compiles
@pytest.mark.parametrize("name", NAMES)
def test_compiles_where_every_number_is_one(name, monkeypatch):
    """Triton makes constants of arguments that are 1, and constants lack the methods of values."""
    launches = record_launches(name, monkeypatch)
    for kernel, arguments, options in launches:
        ones = {key: 1 if isinstance(value, int) and key.islower() else value for key, value in arguments.items()}
        compile_launch(kernel, ones, options, 90)

"""What only the emulator can check of the CUDA operators: threads in several orders, variants, and its own alarms.

That they compute what the other backends do, the shared tests hold: the emulator is one of their backends. Here the
kernels' own sources meet what CUDA alone can get wrong (barriers, warp collectives, atomics, loops that go round,
tails, loads of 16 bytes), against the CPU operators, bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits
from cuda_emulator.build import VARIANTS, NotSupported
from emulated import ASCENDING, DESCENDING, NAMES, ORDERS, Emulated, Order, choose_order, load_emulated
from torch import Tensor

from mirage_kernels import available_backends, block_bounds
from mirage_kernels.constants import BLOCK_TOKENS
from mirage_kernels.geometry import bounds_rows
from mirage_kernels.ops.operator import OPERATORS

pytestmark = pytest.mark.slow
NEAR = 0.05
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PAIRS = list(itertools.product(DTYPES, DTYPES))
every_order = pytest.mark.parametrize("order", ORDERS, ids=NAMES.__getitem__)


@pytest.fixture
def order(request: pytest.FixtureRequest) -> Order:
    """One order of threads, chosen by the test's name, for tests that have many cases."""
    return choose_order(request.node.name)


@pytest.fixture(scope="module")
def emulated() -> Emulated:
    try:
        return load_emulated()
    except NotSupported as reason:
        pytest.skip(str(reason))


def definition(name: str, *arguments: Any) -> Any:
    """What the operator must give: the compiled CPU operator, or the definition where it was not built."""
    operator = OPERATORS[name]
    return (operator.overloads["compiled"] if available_backends()["cpu"] else operator.reference)(*arguments)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def assert_same(emulated: Emulated, name: str, *arguments: Any, order: Order, variant: str = "") -> tuple[Tensor, ...]:
    """The emulated operator gives the definition's bits; returns them."""
    expected = as_tuple(definition(name, *arguments))
    got = as_tuple(emulated.run(f"{name}_compiled", *arguments, order=order, variant=variant))
    assert_equal_bits(got[: len(expected)], expected)  # the definition of splat_aligned has no keys
    return expected


# The emulator itself.

FAULTS = [
    None,
    None,
    "which nothing has written|a race in __shared__ shared, byte",
    "a race in __shared__ shared, byte .* no barrier between",
    "waits at the __syncthreads of line",
    "no thread can go on: .*__ballot_sync.*__syncthreads",
    "exits while other lanes|names lane 5, which has exited",
    "while other lanes of the warp wait at __(ballot|all)_sync",
    "outside of all tensors|reads past the end",
    "outside of all tensors|writes past the end",
    "past the end of a __shared__ variable",
    "reads __shared__ shared at byte 252, which nothing has written",
    "reads memory that nothing has written",
    "writes to an input",
    "not aligned",
    "__ldg of memory that the same launch writes",
    "a race in global memory, byte .* in another block",
    None,
    "a race in global memory",
    "not launched on the current stream",
    "an invalid launch configuration",
    "the launch before it was not checked",
]


@every_order
@pytest.mark.parametrize("which", range(len(FAULTS)))
def test_emulator_stops_at_faults(emulated: Emulated, which: int, order: Order) -> None:
    values = torch.arange(1, 65, dtype=torch.int32)
    message = FAULTS[which]
    if message is not None:
        with pytest.raises(RuntimeError, match=message):
            emulated.run("run_faulty", values, which, order=order)
        return
    result = emulated.run("run_faulty", values, which, order=order)
    lane = torch.arange(64) % 32
    mirrored = values.flip(0)
    above = torch.where(lane == 0, mirrored, mirrored.roll(1))
    swapped = mirrored.view(-1, 2).flip(1).flatten()
    halves = values.clone()
    halves[:32] += values[32:]
    expected = {0: above + swapped, 1: halves, 17: torch.full((64,), 0x7F7F7F7F, dtype=torch.int32)}[which]
    if which == 17:
        expected[0], expected[1] = 1, 0  # the 64-bit minimum
    assert torch.equal(result, expected.int())


# splat


def splat_scene(
    seed: int, count: int, channels: int, views: int, size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    points, features = scenes.cloud(rng, count, channels, dtype)
    return points, features, scenes.intrinsics(rng, views, size), scenes.poses(rng, views)


@pytest.mark.parametrize("dtype", DTYPES)
def test_splat_reads_unaligned_features(emulated: Emulated, dtype: torch.dtype) -> None:
    # The rows would divide into 16-byte loads, but for where they begin.
    points, features, *cameras = splat_scene(5, 200, 16, 2, (6, 9), dtype)
    shifted = torch.empty(features.numel() + 1, dtype=dtype)[1:].view(features.shape).copy_(features)
    for order in ORDERS[:2]:
        view = assert_same(emulated, "splat", points, shifted, None, *cameras, 6, 9, NEAR, dtype, order=order)
    assert view[1].any()


def shifted_by_a_float(points: Tensor) -> Tensor:
    """The same points, contiguous, where no 16-byte load may begin."""
    return torch.empty(points.numel() + 1)[1:].view(points.shape).copy_(points)


def test_points_may_begin_anywhere(emulated: Emulated) -> None:
    points, features, *cameras = splat_scene(5, 200, 4, 2, (6, 9))
    points = shifted_by_a_float(points)
    view = assert_same(emulated, "splat", points, features, None, *cameras, 6, 9, NEAR, torch.float32, order=ASCENDING)
    assert view[1].any()
    (counts,) = assert_same(
        emulated, "view_overlap", points, None, *cameras, *cameras, 6, 9, 0.5, NEAR, order=ASCENDING
    )
    assert counts.gt(0).all()


@pytest.mark.parametrize("views", [0, 1, 15, 16, 17, 35])
def test_splat_any_number_of_views(emulated: Emulated, views: int, order: Order) -> None:
    points, features, *cameras = splat_scene(views, 150, 3, views, (5, 7))
    view = assert_same(emulated, "splat", points, features, None, *cameras, 5, 7, NEAR, torch.float32, order=order)
    assert view[1].flatten(1).any(1).all()


@every_order
def test_splat_more_points_than_threads(emulated: Emulated, order: Order) -> None:
    # 16 blocks of 256 for one processor: the loop over points goes round.
    points, features, *cameras = splat_scene(1, 4500, 2, 1, (24, 24))
    points[:4096, 2] += 8
    view = assert_same(emulated, "splat", points, features, None, *cameras, 24, 24, NEAR, torch.float32, order=order)
    assert int((view[3] >= 4096).sum()) > 50


@every_order
def test_splat_ties_go_to_the_lowest_index(emulated: Emulated, order: Order) -> None:
    points, features, *cameras = splat_scene(6, 40, 3, 2, (5, 7))
    again = torch.from_numpy(np.random.default_rng(6).permutation(np.repeat(np.arange(40), 9)))
    points, features = points[again], torch.randn(len(again), 3)
    view = assert_same(emulated, "splat", points, features, None, *cameras, 5, 7, NEAR, torch.float32, order=order)
    first = {int(token): k for k, token in reversed(list(enumerate(again)))}
    winners = view[3][view[1]]
    assert len(winners) > 10 and set(winners.tolist()) <= set(first.values())


@every_order
def test_splat_of_points_in_one_cell(emulated: Emulated, order: Order) -> None:
    # Every thread of every warp meets the others at one address.
    rng = np.random.default_rng(7)
    points = torch.zeros(700, 4)
    points[:, 2] = torch.from_numpy(rng.integers(1, 40, 700)).float()
    features = torch.arange(1, 701.0)[:, None]
    intrinsics, cam2world = torch.eye(3, dtype=torch.float64)[None], torch.eye(4, dtype=torch.float64)[None]
    view = assert_same(
        emulated, "splat", points, features, None, intrinsics, cam2world, 1, 1, NEAR, torch.float32, order=order
    )
    assert view[2].item() == 1 and view[3].item() == int((points[:, 2] == 1).nonzero()[0])


def one_each(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points, intrinsics and pose such that point k falls alone into cell k of a row of ``count``."""
    points = torch.zeros(count, 4)
    points[:, 0], points[:, 2] = torch.arange(count) + 0.5, 1
    points[:, 1] = 0.5
    return points, torch.eye(3, dtype=torch.float64)[None], torch.eye(4, dtype=torch.float64)[None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_splat_keeps_every_bit_pattern(emulated: Emulated, dtype: torch.dtype) -> None:
    # NaN too, with its bits: what goes out in the dtype it came in is copied.
    rng = np.random.default_rng(9)
    if dtype == torch.float32:
        bits = torch.from_numpy(rng.integers(-(2**31), 2**31, (300, 64)).astype(np.int32))
    else:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(512, 128)
    features = bits.view(dtype)
    points, *cameras = one_each(len(features))
    view = assert_same(
        emulated, "splat", points, features, None, *cameras, 1, len(features), NEAR, dtype, order=DESCENDING
    )
    assert view[1].all() and features.isnan().any()
    assert_equal_bits([view[0][0, :, 0].t().contiguous()], [features])


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[0] != pair[1]], ids=str)
def test_splat_rounds_as_torch_does(emulated: Emulated, pair: tuple[torch.dtype, torch.dtype]) -> None:
    # Random bits, ties between neighbours, subnormals and what overflows; a NaN's bits are the GPU's own.
    rng = np.random.default_rng(10)
    bits = torch.from_numpy(rng.integers(-(2**31), 2**31, 64 * 192).astype(np.int32))
    halves = torch.from_numpy(rng.integers(-(2**15), 2**15, 64 * 64).astype(np.int16)).view(torch.float16).float()
    neighbours = torch.from_numpy(rng.integers(-1, 2, 64 * 64) * 2.0**-25).float()
    values = torch.cat(
        [bits.view(torch.float32), halves * (1 + 2.0**-11), halves + neighbours, torch.full((64,), 65520.0)]
    )
    features = torch.where(values.isnan(), 1.0, values).view(-1, 64).to(pair[0])
    points, *cameras = one_each(len(features))
    view = assert_same(
        emulated, "splat", points, features, None, *cameras, 1, len(features), NEAR, pair[1], order=ASCENDING
    )
    assert view[1].all() and torch.equal(view[0][0, :, 0].t(), features.to(pair[1]))


# float8 features


FLOAT8 = torch.float8_e4m3fn


def as_float8(features: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes of every kind but NaN in the shape of the features, and scales."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 127, features.shape) + 128 * rng.integers(0, 2, features.shape)
    scales = torch.from_numpy(rng.integers(110, 140, len(features))).to(torch.uint8)
    return torch.from_numpy(codes).to(torch.uint8).view(FLOAT8), scales


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_codes_at_every_scale(emulated: Emulated, dtype: torch.dtype) -> None:
    # Rows that may be loaded 16 bytes at a time, and rows that may not; without NaN, whose bits are the GPU's own.
    features = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    features[(features & 127) == 127] = 0
    scales = torch.arange(256).clamp(max=254).to(torch.uint8)
    points, *cameras = one_each(256)
    shifted = torch.empty(features.numel() + 1, dtype=torch.uint8)[1:].view(features.shape).copy_(features)
    ids, centers = torch.zeros(256, dtype=torch.int32), torch.zeros(1, 3)
    for codes in (features, shifted):
        arguments = (points, codes.view(FLOAT8), None, *cameras, 1, 256, NEAR, dtype, None, scales)
        view = assert_same(emulated, "splat", *arguments, order=ASCENDING)
        arguments = (
            points,
            codes.view(FLOAT8),
            None,
            ids,
            centers,
            *cameras,
            1,
            256,
            NEAR,
            math.inf,
            dtype,
            None,
            scales,
        )
        blended = assert_same(emulated, "splat_aligned", *arguments, order=DESCENDING)
        assert view[1].all() and blended[1].all() and len(view[0].unique()) > 250


def test_float8_needs_scales_and_nothing_else_does(emulated: Emulated) -> None:
    points, features, *cameras = splat_scene(5, 90, 4, 1, (4, 5))
    codes, scales = as_float8(features)
    for stored, given in ((codes, None), (features, scales), (codes, scales[1:]), (codes, scales.int())):
        with pytest.raises(RuntimeError, match="scales"):
            emulated.run("splat_compiled", points, stored, None, *cameras, 4, 5, NEAR, torch.float32, None, given)


# splat_backward


@pytest.mark.parametrize("channels", [0, 1, 48, 65, 130])
def test_splat_backward(emulated: Emulated, channels: int, order: Order) -> None:
    points, features, *cameras = splat_scene(channels, 90, channels, 4, (7, 11))
    index = definition("splat", points, features, None, *cameras, 7, 11, NEAR, torch.float32)[3]
    assert (
        int((index.flatten().bincount(minlength=90) if (index >= 0).all() else index[index >= 0].bincount()).max()) > 1
    )
    for grad_dtype, dtype in PAIRS if channels == 48 else PAIRS[::4]:
        grad = torch.randn(4, channels, 7, 11, generator=torch.Generator().manual_seed(channels)).to(grad_dtype)
        (sums,) = assert_same(emulated, "splat_backward", grad, index, 90, dtype, order=order)
        assert sums.dtype == dtype and sums.abs().gt(0).any() == (channels > 0)


# splat_aligned


def aligned_scene(
    seed: int, count: int, channels: int, views: int, size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """(points, features), and frame_ids, frame_centers and cameras."""
    rng = np.random.default_rng(seed)
    points, features, *frames = scenes.written_cloud(rng, count, channels, size[1], dtype)
    return (points, features), (*frames, scenes.intrinsics(rng, views, size), scenes.poses(rng, views))


def read_aligned(
    emulated: Emulated,
    tokens: tuple[Tensor, Tensor],
    rest: tuple[Tensor, ...],
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    live: int | None = None,
    near: float = NEAR,
    sharpness: float = 20.0,
    *,
    order: Order,
) -> tuple[Tensor, ...]:
    count = None if live is None else torch.tensor([live])
    arguments = (*tokens, count, *rest, *size, near, sharpness, dtype)
    return assert_same(emulated, "splat_aligned", *arguments, order=order)


@pytest.mark.parametrize("views", [0, 1, 16, 17, 35])
def test_splat_aligned_any_number_of_views(emulated: Emulated, views: int, order: Order) -> None:
    scene = aligned_scene(views, 60, 3, views, (4, 5))
    view = read_aligned(emulated, *scene, (4, 5), order=order)
    assert view[1].flatten(1).any(1).all()


@pytest.mark.parametrize("sharpness", [0.0, 5.0, math.inf])
def test_splat_aligned_more_points_than_threads(emulated: Emulated, sharpness: float, order: Order) -> None:
    # 16 blocks of 256 for one processor: the loop over points goes round.
    tokens, rest = aligned_scene(1, 4300, 2, 1, (24, 24))
    tokens[0][:4096, 2] += 8
    view = read_aligned(emulated, tokens, rest, (24, 24), sharpness=sharpness, order=order)
    assert int((view[3] >= 4096).sum()) > 50


@every_order
def test_splat_aligned_of_points_in_one_cell(emulated: Emulated, order: Order) -> None:
    # Every thread of every warp meets the others at the lists of one cell, with many equal scores.
    rng = np.random.default_rng(7)
    points = torch.zeros(600, 4)
    points[:, :2] = torch.from_numpy(rng.integers(0, 16, (600, 2)) / 16).float()
    points[:, 2:] = 1
    features = torch.arange(1, 601.0)[:, None]
    cameras = torch.eye(3, dtype=torch.float64)[None], torch.eye(4, dtype=torch.float64)[None]
    frames = torch.zeros(600, dtype=torch.int32), torch.zeros(1, 3)
    view = read_aligned(emulated, (points, features), (*frames, *cameras), (1, 1), order=order)
    best = ((points[:, :2] - 0.5) ** 2).sum(1)
    assert view[3].item() == int((best == best.min()).nonzero()[0])


@pytest.mark.parametrize("channels", [0, 1, 48, 130])
@pytest.mark.parametrize("of_points", [False, True])
def test_splat_aligned_backward(emulated: Emulated, channels: int, of_points: bool, order: Order) -> None:
    if not available_backends()["cpu"]:
        pytest.skip("the CPU operators were not built: nothing to compare with")
    for grad_dtype, dtype in PAIRS if channels == 48 and of_points else PAIRS[::4]:
        (points, features), rest = aligned_scene(channels, 90, channels, 3, (5, 7), dtype)
        arguments = points, features, None, *rest, 5, 7, NEAR, 5.0, torch.float32
        keys = definition("splat_aligned", *arguments)[4]
        grad = torch.randn(3, channels, 5, 7, generator=torch.Generator().manual_seed(channels)).to(grad_dtype)
        sums = assert_same(
            emulated, "splat_aligned_backward", grad, points, features, *rest, keys, 5.0, of_points, order=order
        )
        assert sums[0].dtype == dtype and sums[0].any() == (channels > 0)
        assert sums[1].shape == (90 if of_points else 0, 4) and sums[1].any() == (of_points and channels > 0)


# back_project

LIFTS = {
    "16 x 16": ((64, 96), (4, 6)),
    "ragged": ((37, 53), (5, 7)),
    "one pixel": ((7, 9), (7, 9)),
    "narrow": ((64, 9), (4, 9)),
    "flat": ((5, 96), (5, 6)),
    "one or two": ((11, 13), (8, 9)),
    "wider than a warp": ((10, 150), (2, 3)),
    "32 wide, held": ((16, 64), (2, 2)),
    "32 wide, past registers": ((18, 64), (2, 2)),
    "17 wide": ((16, 34), (2, 2)),
    "tall": ((260, 10), (2, 2)),
    "one token": ((24, 40), (1, 1)),
}


@pytest.mark.parametrize("variant", VARIANTS, ids=["sm80", "older"])
@pytest.mark.parametrize("case", LIFTS)
def test_back_project_cells_of_any_shape(emulated: Emulated, case: str, variant: str) -> None:
    image, size = LIFTS[case]
    rng = np.random.default_rng(len(case))
    cameras = scenes.intrinsics(rng, 2, image), scenes.poses(rng, 2)
    for noise, order in zip((0.01, 3.0, 1e-6, 0.0), ORDERS, strict=True):
        depth = scenes.depth_maps(rng, 2, image, unknown=0.3, noise=noise)
        mask = scenes.static_masks(rng, 2, image, moving=0.3 * size[0] * size[1] / (image[0] * image[1]))
        lift = assert_same(emulated, "back_project", depth, *cameras, mask, *size, False, order=order, variant=variant)
        assert lift[1].any() and lift[0][lift[1]].abs().gt(0).all()


@pytest.mark.parametrize("case", LIFTS)
def test_back_project_depths_of_any_size(emulated: Emulated, case: str) -> None:
    # The search for the median starts from the least and greatest bits: here from one end of float32 to the other.
    image, size = LIFTS[case]
    rng = np.random.default_rng(20)
    cameras = scenes.intrinsics(rng, 3, image), scenes.poses(rng, 3)
    bits = torch.from_numpy(rng.integers(1, 0x7F800000, (3, *image)).astype(np.int32))
    bits[1] = torch.where(bits[1] % 3 == 0, 1, 0x7F7FFFFF)
    bits[2] = torch.arange(bits[2].numel(), dtype=torch.int32).view(image) + 0x3F800000
    depth = bits.view(torch.float32)
    for order in ORDERS[1:3]:
        lift = assert_same(emulated, "back_project", depth, *cameras, None, *size, False, order=order)
        assert lift[1][2].all()


def test_back_project_needs_half_of_a_cell(emulated: Emulated, order: Order) -> None:
    rng = np.random.default_rng(21)
    image, size = (32, 64), (2, 4)
    for invalid in scenes.UNKNOWN:
        for valid in (0, 1, 127, 128, 129, 256):
            depth = torch.full((1, 2, 4, 256), invalid)
            for i, j in itertools.product(range(2), range(4)):
                depth[0, i, j, rng.permutation(256)[:valid]] = torch.from_numpy(rng.uniform(1, 2, valid)).float()
            depth = depth.view(1, 2, 4, 16, 16).transpose(2, 3).reshape(1, *image)
            cameras = scenes.intrinsics(rng, 1, image), scenes.poses(rng, 1)
            lift = assert_same(emulated, "back_project", depth, *cameras, None, *size, False, order=order)
            assert int(lift[1].sum()) == (8 if valid >= 128 else 0)


def test_back_project_more_views_than_a_block_of_cameras(emulated: Emulated) -> None:
    rng = np.random.default_rng(24)
    depth = scenes.depth_maps(rng, 70, (6, 5))
    cameras = scenes.intrinsics(rng, 70, (6, 5)), scenes.poses(rng, 70)
    cameras[1][3] = math.nan
    lift = assert_same(emulated, "back_project", depth, *cameras, None, 3, 2, False, order=ORDERS[2])
    assert lift[1].flatten(1).any(1).sum() == 69


# cache_write


def write(
    emulated: Emulated,
    channels: int,
    image: tuple[int, int],
    size: tuple[int, int],
    *,
    order: Order,
    views: int = 3,
    pair: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    capacity: int = 1000,
    held: int = 0,
    seed: int = 0,
    mask: float | None = 0.01,
    unknown: float = 0.3,
    bilinear: bool = False,
    low: float = 0.0,
    high: float = math.inf,
    spoil: Callable[[Tensor], object] = lambda latents: None,
    variant: str = "",
) -> list[int]:
    """Both write into equal buffers: every buffer and the report end equal, bit for bit. Returns the report."""
    rng = np.random.default_rng(seed)
    depth = scenes.depth_maps(rng, views, image, unknown=unknown, noise=3.0)
    latents = torch.from_numpy(rng.normal(size=(views, channels, *size))).to(pair[0])
    spoil(latents)
    cameras = scenes.intrinsics(rng, views, image), scenes.poses(rng, views)
    static = None if mask is None else scenes.static_masks(rng, views, image, moving=mask)
    rest = (latents, depth, *cameras, static, 7, bilinear, low, high)
    boxes = [torch.full((bounds_rows(capacity), 6), 7.0) for _ in range(2)]
    buffers, scales = [list(scenes.buffers(capacity, channels, held=held)) for _ in range(2)], [None, None]
    for side in range(2):
        if pair[1] == FLOAT8:
            buffers[side][1] = buffers[side][1].to(torch.uint8).view(FLOAT8)
            scales[side] = torch.arange(capacity).to(torch.uint8)
        else:
            buffers[side][1] = buffers[side][1].to(pair[1])
    report = definition("cache_write", *buffers[0], *rest, boxes[0], scales[0])
    given = (*buffers[1], *rest, boxes[1], scales[1])
    emulated_report = emulated.run("cache_write_compiled", *given, order=order, variant=variant)
    expected, got = ([*buffers[k], boxes[k], *([] if scales[k] is None else [scales[k]])] for k in range(2))
    assert_equal_bits([*got, emulated_report], [*expected, report])
    assert report[0] == 0 or not (boxes[0] == 7).all()
    assert int(report.sum()) == views * size[0] * size[1]
    return report.tolist()


STORED = [*PAIRS, *((dtype, torch.float8_e4m3fn) for dtype in DTYPES)]


@pytest.mark.parametrize(
    ("capacity", "held"), [(0, 0), (1, 0), (1, 1), (100, 0), (400, 300), (300, 300), (290, 33), (256, 0), (257, 1)]
)
def test_cache_write_refuses_what_does_not_fit(emulated: Emulated, capacity: int, held: int, order: Order) -> None:
    room = dict(capacity=capacity, held=held, order=order, views=2, unknown=0.1)
    for channels, stored in ((5, torch.float32), (70, FLOAT8)):
        report = write(emulated, channels, (24, 30), (12, 15), pair=(torch.float32, stored), **room)
        assert report[0] == capacity - held and report[1] > 0


@every_order
def test_cache_write_rejects(emulated: Emulated, order: Order) -> None:
    def spoil(latents: Tensor) -> None:
        latents[0, 1, 2, :3] = torch.tensor([math.nan, math.inf, -math.inf], dtype=latents.dtype)
        latents[1, -1, :, 0] = math.nan

    for pair in ((dtype, stored) for dtype in DTYPES for stored in (dtype, FLOAT8)):
        report = write(emulated, 66, (24, 30), (12, 15), spoil=spoil, low=2.5, high=4.0, pair=pair, order=order)
        assert all(report[k] > 0 for k in (0, 2, 3, 4, 5))


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (1, 255), (257, 1), (16, 33)])
def test_cache_write_blocks_with_tails(emulated: Emulated, size: tuple[int, int]) -> None:
    # 256 tokens a block, 32 a turn: views that end on their borders, before them and behind.
    for views, order in zip((1, 2, 1, 2), ORDERS, strict=True):
        report = write(
            emulated, 7, (2 * size[0], size[1]), size, views=views, mask=None, unknown=0.0, order=order, capacity=2000
        )
        assert report[0] == views * size[0] * size[1]


@pytest.mark.parametrize("held", [0, 300])
def test_cache_write_scans_more_blocks_than_threads(emulated: Emulated, held: int) -> None:
    # The variant scans 64 blocks of 256 tokens at a time.
    for order, capacity in ((ORDERS[0], 12_000), (ORDERS[2], 40_000)):
        report = write(
            emulated, 2, (34, 1000), (34, 1000), views=1, capacity=capacity, held=held, order=order, bilinear=True,
            mask=None, variant="_small",
        )  # fmt: skip
        assert report[0] > 11_000 and (report[1] > 0) == (capacity == 12_000)


@pytest.mark.parametrize("variant", VARIANTS, ids=["sm80", "older"])
def test_cache_write_bilinear(emulated: Emulated, variant: str, order: Order) -> None:
    report = write(emulated, 4, (9, 21), (12, 15), bilinear=True, mask=None, order=order, variant=variant)
    assert report[0] > 100


def test_cache_write_refuses_points_that_begin_anywhere(emulated: Emulated) -> None:
    rng = np.random.default_rng(31)
    depth, latents = scenes.depth_maps(rng, 1, (24, 30)), torch.randn(1, 3, 12, 15)
    cameras = scenes.intrinsics(rng, 1, (24, 30)), scenes.poses(rng, 1)
    points, *buffers = scenes.buffers(100, 3)
    rest = (latents, depth, *cameras, None, 0, False, 0.0, math.inf)
    with pytest.raises(RuntimeError, match="points must begin at a multiple of 16 bytes"):
        emulated.run("cache_write_compiled", shifted_by_a_float(points), *buffers, *rest)


# Bounds of blocks


@pytest.mark.parametrize("live", [None, -1, 0, 1, 255, 256, 700, 2**40])
def test_block_bounds(emulated: Emulated, live: int | None, order: Order) -> None:
    # Three blocks, and eight at a time on the one processor: with 2,500 points the loop goes round.
    for count in (0, 1, 256, 700, 2500, 17000):
        points, _ = scenes.cloud(np.random.default_rng(count), count, 1)
        points[::5, 0], points[1::5, 2], points[2::5, 3] = math.nan, -math.inf, math.nan
        points[3::7, :3] = torch.tensor([-0.0, 0.0, -1e-42])
        points[256:512, 1] = math.nan
        number = None if live is None else torch.tensor([live])
        boxes = [torch.full((bounds_rows(count), 6), 7.0) for _ in range(2)]
        definition("block_bounds", points, number, boxes[0])
        emulated.run("block_bounds_compiled", points, number, boxes[1], order=order)
        assert_equal_bits(boxes[1:], boxes[:1])


def blocky_scene(
    seed: int, blocks: int, views: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Clusters of a block's tokens all round cameras that look everywhere: points, features, the rest of aligned."""
    rng = np.random.default_rng(seed)
    count = blocks * BLOCK_TOKENS - 20
    direction = rng.normal(size=(blocks, 3))
    centre = direction / np.linalg.norm(direction, axis=1, keepdims=True) * rng.uniform(0.5, 6, (blocks, 1))
    points, features, *frames = scenes.written_cloud(rng, count, 3, size[1])
    points[:, :3] = torch.from_numpy(centre.repeat(BLOCK_TOKENS, 0)[:count] + rng.normal(size=(count, 3)) * 0.2).float()
    points[::50, 1] = math.nan
    points[-BLOCK_TOKENS:] *= 1e30
    return points, features, (*frames, scenes.intrinsics(rng, views, size), scenes.poses(rng, views, angle=3.1))


@pytest.mark.parametrize(("blocks", "views"), [(1, 1), (9, 0), (9, 5), (20, 16), (5, 17), (140, 2), (4, 33), (3, 67)])
def test_reads_by_bounds(emulated: Emulated, blocks: int, views: int, order: Order) -> None:
    # 128 blocks are culled at a time, 16 views are held, 32 are a word; 16 blocks of 256 points for one processor.
    size = (7, 11)
    points, features, rest = blocky_scene(views, blocks, views, size)
    if blocks == 140:
        points, features, rest = points[::8], features[::8], (rest[0][::8], *rest[1:])
    points, features, rest = points.contiguous(), features.contiguous(), (rest[0].contiguous(), *rest[1:])
    bounds, live = block_bounds(points), torch.tensor([len(points) - 3])
    cameras = rest[2:]
    targets = [x[:1] for x in cameras]
    tails = {
        "splat": (points, features, live, *cameras, *size, NEAR, torch.float32),
        "splat_aligned": (points, features, live, *rest, *size, NEAR, 20.0, torch.float32),
        "view_overlap": (points, live, *cameras, *targets, *size, 0.5, NEAR),
    }
    nothing = block_bounds(points, num_points=torch.tensor(0))
    for name, arguments in tails.items():
        expected = assert_same(emulated, name, *arguments, order=order)  # without bounds
        got = as_tuple(emulated.run(f"{name}_compiled", *arguments, bounds, order=order))
        assert_equal_bits(got[: len(expected)], expected)
        seen = expected[0] if name == "view_overlap" else expected[1]
        assert seen.any() == (views > 0) or blocks == 1
        # A promise that there is nothing, broken, shows that kernels go by it.
        blind = as_tuple(emulated.run(f"{name}_compiled", *arguments, nothing, order=order))
        assert not blind[0 if name == "view_overlap" else 1].any()


def test_reads_by_bounds_along_the_border(emulated: Emulated) -> None:
    # A block in each cell along the border: a view that culls by a grid smaller than its own loses some.
    size, cameras = (5, 6), (torch.eye(3, dtype=torch.float64)[None], torch.eye(4, dtype=torch.float64)[None])
    cells = [(i, j) for i in range(5) for j in range(6) if i in (0, 4) or j in (0, 5)]
    points = torch.tensor([[j + 0.5, i + 0.5, 1.0, 0.5] for i, j in cells]).repeat_interleave(BLOCK_TOKENS, 0)
    features, bounds = torch.randn(len(points), 3, generator=torch.Generator().manual_seed(2)), block_bounds(points)
    arguments = points, features, None, *cameras, *size, NEAR, torch.float32, bounds
    view = assert_same(emulated, "splat", *arguments, order=ASCENDING)
    assert int(view[1].sum()) == len(cells)
    overlap = points, None, *cameras, *cameras, *size, 0.5, NEAR, bounds
    assert_same(emulated, "view_overlap", *overlap, order=ASCENDING)


def test_reads_refuse_bounds_of_another_size(emulated: Emulated) -> None:
    points, features, *cameras = splat_scene(5, 300, 4, 2, (6, 9))
    with pytest.raises(RuntimeError, match="bounds must hold the boxes of 300 points"):
        emulated.run("splat_compiled", points, features, None, *cameras, 6, 9, NEAR, torch.float32, torch.zeros(1, 6))


# view_overlap


def overlap_scene(seed: int, count: int, views: int, targets: int, size: tuple[int, int]) -> tuple[Tensor, ...]:
    rng = np.random.default_rng(seed)
    points, _ = scenes.cloud(rng, count, 1)
    cameras = scenes.intrinsics(rng, views, size), scenes.poses(rng, views, angle=0.8)
    return points, *cameras, scenes.intrinsics(rng, targets, size), scenes.poses(rng, targets, angle=0.8)


@pytest.mark.parametrize(("views", "targets"), [(1, 1), (31, 2), (32, 1), (33, 32), (3, 33), (70, 0), (0, 2), (2, 70)])
def test_view_overlap(emulated: Emulated, views: int, targets: int, order: Order) -> None:
    points, *cameras = overlap_scene(views, 350, views, targets, (5, 7))
    (counts,) = assert_same(emulated, "view_overlap", points, None, *cameras, 5, 7, 0.5, NEAR, order=order)
    assert counts.shape == (views, 2) and counts[:, 1].gt(0).all()
    assert counts[:, 0].gt(0).all() == (targets > 0) or views == 0


@every_order
def test_view_overlap_more_points_than_threads(emulated: Emulated, order: Order) -> None:
    points, *cameras = overlap_scene(43, 4500, 3, 2, (5, 7))
    points[4096:, :3] += 0.01
    (counts,) = assert_same(emulated, "view_overlap", points, None, *cameras, 5, 7, 0.2, NEAR, order=order)
    assert counts.gt(50).all()

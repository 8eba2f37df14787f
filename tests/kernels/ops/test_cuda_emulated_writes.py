"""What only the emulator can check of ``bounded_write`` and ``cache_compact`` on CUDA: see test_cuda_emulated.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits
from conftest import Target, emulate
from emulated import ORDERS, Order, choose_order
from test_bounded_write import Held, both, compacted, room, write_both
from torch import Tensor

from mirage_kernels import block_bounds
from mirage_kernels.constants import INVALID, WRITE_REPORT
from mirage_kernels.geometry import token_voxels
from mirage_kernels.quantization import FLOAT8

pytestmark = pytest.mark.slow


@pytest.fixture
def emulated() -> Iterator[Callable[..., Target]]:
    """emulated(order, variant): from there on the public functions run the emulated kernels in this order."""
    with ExitStack() as stack:
        yield lambda order, variant="": stack.enter_context(emulate(order, variant))


@pytest.fixture
def order(request: pytest.FixtureRequest) -> Order:
    """One order of threads, chosen by the test's name."""
    return choose_order(request.node.name)


# bounded_write


@pytest.mark.parametrize(("views_per_voxel", "capacity"), [(1, 2000), (3, 70), (40, 70), (64, 2000)])
def test_all_tokens_come_to_one_voxel(emulated: Callable[..., Target], views_per_voxel: int, capacity: int) -> None:
    # Far from the origin the axes end, and all share the voxel in the corner: the first in the order get in, in every
    # order of threads. 2 480 places are three groups of 32 blocks.
    latents, depth, intrinsics, cam2world = room(3, views=2, grid=(40, 62), image_size=(40, 62), unknown=0.02)
    cam2world[:, :3, 3] += 3e7
    intrinsics[1], depth[:] = intrinsics[0], torch.where(depth > 0, 4.0, 0.0)
    for order, merge in zip(ORDERS, (False, True, True, False), strict=True):
        held = both(emulated(order), capacity, merge=merge)
        report = write_both(held, (latents, depth, intrinsics, cam2world), views_per_voxel=views_per_voxel)
        assert token_voxels(held[0].live()[0]).unique().numel() == 1
        assert report["written"] == min(views_per_voxel, capacity) and report["refused"] > 2000


@pytest.mark.parametrize(("order", "merge"), [*zip(ORDERS, (False, True, True, False), strict=True)])
def test_large_grids_over_crowded_buffers(emulated: Callable[..., Target], order: Order, merge: bool) -> None:
    # Several thousand cells; held tokens of any frame, of frames that the table lacks, invalid ones, violations of
    # every count.
    rng = np.random.default_rng(5)
    size = (48, 50)
    held = both(emulated(order), 12_000, merge=merge)
    points, _, frame_ids, _ = scenes.written_cloud(rng, 3000, 1, size[1])
    points[::50] = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    free_space_violations = torch.from_numpy(rng.choice([0, 0, 0, 1, 2, 254, INVALID], 3000)).byte()
    for side in held:
        side.points[:3000], side.frame_ids[:3000], side.free_space_violations[:3000] = (
            points,
            frame_ids,
            free_space_violations,
        )
        side.centers[:12] = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
        side.count.fill_(3000)
        side.frames = 12
        side.bounds = block_bounds(side.points, num_points=side.count)
    total = np.zeros(len(WRITE_REPORT), dtype=int)
    for seed in range(2):
        arguments = room(seed, views=2, grid=size, image_size=(96, 125))
        total += list(write_both(held, arguments, views_per_voxel=2).values())
    report = dict(zip(WRITE_REPORT, total, strict=True))
    assert report["written"] > 100 and report["merged" if merge else "replaced"] > 100 and report["carved"] > 0
    assert report["refused"] > 100


@pytest.mark.parametrize("count", [-5, 401, 2**62, -(2**62)])
def test_a_false_count_writes_nothing(emulated: Callable[..., Target], count: int) -> None:
    # The count lives on the device: an operator that cannot refuse it must at least stay within its buffers.
    held = Held(400, put=emulated(ORDERS[0]).put)
    held.count.fill_(count)
    held.free_space_violations[::3] = INVALID
    held.bounds.fill_(7.0)
    before = [x.clone() for x in (*held.all(), held.bounds)]
    report = held.write(*room(1))
    assert report["refused"] > 100 and report["written"] == report["carved"] == report["covered"] == 0
    assert held.trim(20) == 0 and held.trim() == 0
    assert_equal_bits([*held.all(), held.bounds], before)


def test_points_that_begin_anywhere_are_refused(emulated: Callable[..., Target]) -> None:
    held = Held(400, put=emulated(ORDERS[0]).put)
    held.points = torch.zeros(1601)[1:].view(400, 4)
    for call in (lambda: held.write(*room(1)), lambda: held.trim(3)):
        with pytest.raises(RuntimeError, match="points must begin at a multiple of 16 bytes"):
            call()


# cache_compact


def crowded(
    seed: int, live: int, capacity: int, stored: torch.dtype, channels: int, frames: Tensor, dead: float
) -> Held:
    rng = np.random.default_rng(seed)
    held = Held(capacity, stored, merge=True, channels=channels, boxes=False)
    held.frame_ids[:] = frames
    held.free_space_violations[:] = torch.from_numpy(
        np.where(rng.random(capacity) < dead, INVALID, rng.integers(0, 9, capacity))
    ).byte()
    held.num_observations[:] = torch.from_numpy(rng.integers(1, 17, capacity)).byte()
    if held.scales is not None:
        held.scales[:] = torch.from_numpy(rng.integers(11, 247, capacity)).byte()
    held.points[:, :3] += torch.from_numpy(rng.normal(size=(capacity, 3))).float()
    held.count.fill_(live)
    held.bounds = block_bounds(held.points, num_points=held.count)
    return held


def check_trim(held: Held, most: int | None) -> int:
    bits = lambda x: x.view(torch.uint8) if x.dtype == FLOAT8 else x  # noqa: E731
    live = int(held.count)
    before = [bits(x).clone() for x in held.all()[:-1]]
    buffers = before[0], before[1], before[2].tolist(), before[3].tolist(), before[4]
    stay, excess = compacted(*buffers, live, 2**60 if most is None else most)
    assert held.trim(most) == excess
    after = [bits(x) for x in held.all()[:-1]]
    assert int(held.count) == len(stay)
    assert_equal_bits([x[: len(stay)] for x in after], [x[stay] for x in before])
    assert_equal_bits([x[len(stay) :] for x in after], [x[len(stay) :] for x in before])
    assert_equal_bits([held.bounds], [block_bounds(held.points, num_points=held.count)])
    return excess


FRAME_IDS = {
    "one": lambda rng, n: np.full(n, 7),
    "ascending": lambda rng, n: np.arange(n) // 100,
    "descending": lambda rng, n: 2**31 - 1 - np.arange(n) * 5000,
    "any": lambda rng, n: rng.integers(-(2**31), 2**31, n),
    "thousands": lambda rng, n: rng.integers(0, 100_000, n),
    "few": lambda rng, n: rng.choice([0, 1, 2**11, 2**21, 2**31 - 1, -1], n),
}


@pytest.mark.parametrize("variant", ["", "_small"])
@pytest.mark.parametrize("ids", FRAME_IDS)
def test_trim_evicts_by_any_frame_ids(emulated: Callable[..., Target], ids: str, variant: str) -> None:
    # The variant has 256 threads, four digits instead of three, and copies 512 rows at a time or fewer.
    rng = np.random.default_rng(3)
    frames = torch.from_numpy(FRAME_IDS[ids](rng, 2600)).int()
    cases = (0.0, (0.02,)), (0.3, (0.0, 0.6)), (0.001, (0.6,)), (0.9, (0.02, 1.0))
    for (dead, shares), order in zip(cases, ORDERS, strict=True):
        emulated(order, variant)
        for share in shares:
            held = crowded(1, 2500, 2600, torch.float16, 3, frames, dead)
            most = int(share * (held.free_space_violations[:2500] != INVALID).sum())
            assert (check_trim(held, most) > 0) == (share < 1)
            assert check_trim(held, None) == 0 and int(held.count) == most


@pytest.mark.parametrize(
    ("channels", "stored"),
    [*zip((1, 2, 4, 5, 8, 16, 48), itertools.cycle(scenes.STORED)), (16, torch.float16), (5, scenes.STORED[3])],
)
def test_trim_rows_of_any_size(emulated: Callable[..., Target], stored: torch.dtype, channels: int) -> None:
    # Words of 1, 2, 4 and 16 bytes.
    frames = torch.from_numpy(np.random.default_rng(4).integers(0, 20, 1100)).int()
    for (order, variant), dead in zip(
        itertools.product(ORDERS[1:3], ("", "_small")), (0.1, 0.5, 0.0, 0.9), strict=True
    ):
        emulated(order, variant)
        assert check_trim(crowded(2, 1030, 1100, stored, channels, frames, dead), 600) > 0 or dead >= 0.5


@pytest.mark.parametrize(("gone", "number"), [(0, 1), (255, 256), (256, 256), (1023, 300), (1024, 1), (2047, 300)])
def test_trim_closes_one_gap(emulated: Callable[..., Target], order: Order, gone: int, number: int) -> None:
    for variant in ("", "_small"):
        emulated(order, variant)
        held = crowded(3, 2048, 2048, torch.float32, 2, torch.zeros(2048, dtype=torch.int32), 0.0)
        held.free_space_violations[gone : gone + number] = INVALID
        assert check_trim(held, None) == 0 and int(held.count) == max(2048 - number, gone)


def test_trim_sums_up_more_blocks_than_threads(emulated: Callable[..., Target]) -> None:
    # The variant sums 256 blocks of 256 rows up at a time.
    for dead, order in ((0.0, ORDERS[0]), (0.2, ORDERS[2])):
        emulated(order, "_small")
        frames = torch.from_numpy(np.random.default_rng(6).integers(0, 3000, 70_000)).int()
        assert check_trim(crowded(4, 69_000, 70_000, FLOAT8, 1, frames, dead), 50_000) > 0

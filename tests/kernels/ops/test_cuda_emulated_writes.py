"""``bounded_write`` and ``cache_compact`` on CUDA, run on the CPU by ``cuda_emulator``: every test that the other
backends pass, in several orders of threads, and what only CUDA can get wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits
from conftest import Target, require_target
from test_bounded_write import *  # noqa: F403  # its tests, with the backend below
from test_bounded_write import Held, both, compacted, room, write_both
from test_cuda_emulated import DTYPES, ORDERS, Emulated, Order, emulated, names  # noqa: F401
from torch import Tensor

from mirage_kernels import block_bounds, use_backend
from mirage_kernels.constants import INVALID, WRITE_REPORT
from mirage_kernels.geometry import token_voxels
from mirage_kernels.ops.operator import OPERATORS
from mirage_kernels.quantization import FLOAT8


@pytest.fixture
def emulate(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Target]]:  # noqa: F811
    """emulate(order): from there on the public functions run the emulated kernels where they would run the CPU's."""
    target = require_target("cpu", "cpu")

    def begin(order: Order, variant: str = "") -> Target:
        def operator(name: str) -> Callable[..., Any]:
            suffix = variant if name == "cache_compact" else ""
            return lambda *arguments: emulated.run(f"{name}_compiled", *arguments, order=order, variant=suffix)

        for name in OPERATORS:
            monkeypatch.setitem(OPERATORS[name].overloads, "compiled", operator(name))
        return target

    with use_backend("cpu"):
        yield begin


@pytest.fixture(params=ORDERS[1:3], ids=names.__getitem__)
def backend(request: pytest.FixtureRequest, emulate: Callable[..., Target]) -> Target:
    return emulate(request.param)


# bounded_write


@pytest.mark.parametrize("stored", scenes.STORED)
@pytest.mark.parametrize("given", DTYPES)
def test_bounded_write_every_dtype_and_channel_count(
    emulate: Callable[..., Target], given: torch.dtype, stored: torch.dtype
) -> None:
    for channels, order in zip((1, 3, 48, 64, 65, 130), itertools.cycle(ORDERS), strict=False):
        for merge in (False, True):
            held = both(emulate(order), 200, dtype=stored, merge=merge, channels=channels)
            for seed in range(2):
                report = write_both(held, room(seed, dtype=given, channels=channels))
            assert report["written"] > 0 and report["merged" if merge else "covered"] > 0


@pytest.mark.parametrize("views_per_voxel", [1, 3, 40, 64])
@pytest.mark.parametrize("capacity", [2000, 70])
def test_all_tokens_come_to_one_voxel(emulate: Callable[..., Target], views_per_voxel: int, capacity: int) -> None:
    # Far from the origin the axes end, and all share the voxel in the corner: the first in the order get in, in every
    # order of threads. 2 480 places are three groups of 32 blocks.
    latents, depth, intrinsics, cam2world = room(3, views=2, grid=(40, 62), image_size=(40, 62), unknown=0.02)
    cam2world[:, :3, 3] += 3e7
    intrinsics[1], depth[:] = intrinsics[0], torch.where(depth > 0, 4.0, 0.0)
    for order, merge in itertools.product(ORDERS, (False, True)):
        held = both(emulate(order), capacity, merge=merge)
        report = write_both(held, (latents, depth, intrinsics, cam2world), views_per_voxel=views_per_voxel)
        assert token_voxels(held[0].live()[0]).unique().numel() == 1
        assert report["written"] == min(views_per_voxel, capacity) and report["refused"] > 2000


@pytest.mark.parametrize("order", ORDERS, ids=names.__getitem__)
@pytest.mark.parametrize("merge", [False, True])
def test_large_grids_over_crowded_buffers(emulate: Callable[..., Target], order: Order, merge: bool) -> None:
    # Several thousand cells; held tokens of any frame, of frames that the table lacks, invalid ones, violations of
    # every count.
    rng = np.random.default_rng(5)
    size = (48, 50)
    held = both(emulate(order), 12_000, merge=merge)
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
def test_a_false_count_writes_nothing(emulate: Callable[..., Target], count: int) -> None:
    # The count lives on the device: an operator that cannot refuse it must at least stay within its buffers.
    held = Held(400, put=emulate(ORDERS[0]).put)
    held.count.fill_(count)
    held.free_space_violations[::3] = INVALID
    held.bounds.fill_(7.0)
    before = [x.clone() for x in (*held.all(), held.bounds)]
    report = held.write(*room(1))
    assert report["refused"] > 100 and report["written"] == report["carved"] == report["covered"] == 0
    assert held.trim(20) == 0 and held.trim() == 0
    assert_equal_bits([*held.all(), held.bounds], before)


def test_points_that_begin_anywhere_are_refused(emulate: Callable[..., Target]) -> None:
    held = Held(400, put=emulate(ORDERS[0]).put)
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
def test_trim_evicts_by_any_frame_ids(emulate: Callable[..., Target], ids: str, variant: str) -> None:
    # The variant has 256 threads, four digits instead of three, and copies 512 rows at a time or fewer.
    rng = np.random.default_rng(3)
    frames = torch.from_numpy(FRAME_IDS[ids](rng, 2600)).int()
    for dead, order in zip((0.0, 0.3, 0.001, 0.9), ORDERS, strict=True):
        emulate(order, variant)
        for share in (0.0, 0.02, 0.6, 1.0):
            held = crowded(1, 2500, 2600, torch.float16, 3, frames, dead)
            most = int(share * (held.free_space_violations[:2500] != INVALID).sum())
            assert (check_trim(held, most) > 0) == (share < 1)
            assert check_trim(held, None) == 0 and int(held.count) == most


@pytest.mark.parametrize("stored", scenes.STORED)
@pytest.mark.parametrize("channels", [1, 2, 4, 5, 8, 16, 48])
def test_trim_rows_of_any_size(emulate: Callable[..., Target], stored: torch.dtype, channels: int) -> None:
    # Words of 1, 2, 4 and 16 bytes.
    frames = torch.from_numpy(np.random.default_rng(4).integers(0, 20, 1100)).int()
    for (order, variant), dead in zip(
        itertools.product(ORDERS[1:3], ("", "_small")), (0.1, 0.5, 0.0, 0.9), strict=True
    ):
        emulate(order, variant)
        assert check_trim(crowded(2, 1030, 1100, stored, channels, frames, dead), 600) > 0 or dead >= 0.5


@pytest.mark.parametrize("gone", [0, 255, 256, 1023, 1024, 2047])
@pytest.mark.parametrize("number", [1, 256, 300])
def test_trim_closes_one_gap(emulate: Callable[..., Target], gone: int, number: int) -> None:
    for order, variant in itertools.product(ORDERS, ("", "_small")):
        emulate(order, variant)
        held = crowded(3, 2048, 2048, torch.float32, 2, torch.zeros(2048, dtype=torch.int32), 0.0)
        held.free_space_violations[gone : gone + number] = INVALID
        assert check_trim(held, None) == 0 and int(held.count) == max(2048 - number, gone)


def test_trim_sums_up_more_blocks_than_threads(emulate: Callable[..., Target]) -> None:
    # The variant sums 256 blocks of 256 rows up at a time.
    for dead, order in ((0.0, ORDERS[0]), (0.2, ORDERS[2])):
        emulate(order, "_small")
        frames = torch.from_numpy(np.random.default_rng(6).integers(0, 3000, 70_000)).int()
        assert check_trim(crowded(4, 69_000, 70_000, FLOAT8, 1, frames, dead), 50_000) > 0

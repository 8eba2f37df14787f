"""What crosses to another process, sent or by a fork."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import scenes
import torch
from test_offload import GRID, assert_same_contents, looking, room

from mirage_kernels import Cameras, LatentCache, Readout, WriteReport, splat
from mirage_kernels.cache import launch

LIMIT = 60  # seconds, of what would otherwise wait for ever
SIZE = (16, 24)


def make_cache(**options) -> tuple[LatentCache, Cameras, WriteReport]:
    rng = np.random.default_rng(0)
    cameras = Cameras(scenes.intrinsics(rng, 3, SIZE), scenes.poses(rng, 3), SIZE, square_pixels=False)
    latents = torch.from_numpy(rng.normal(size=(3, 4, *SIZE))).to(torch.float32)
    cache = LatentCache(4, **options)
    return cache, cameras, cache.write(latents, scenes.depth_maps(rng, 3, SIZE, 0.02), cameras)


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def use(cache: LatentCache, cameras: Cameras) -> tuple[Readout, WriteReport, Cameras, LatentCache]:
    """What another process does with a cache, and sends back."""
    readout = cache.read(cameras, SIZE)
    depth = torch.full((len(cameras), *SIZE), 0.5)
    return readout, cache.write(readout.latents, depth, cameras), cameras[1:], cache


CONTEXTS = [pytest.param(name, marks=[pytest.mark.slow] * (name != "fork")) for name in ("fork", "spawn", "forkserver")]


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_crosses_to_a_process_and_back(context):
    cache, cameras, _ = make_cache(capacity=5000)
    cache.offload(cameras[:0])
    with ProcessPoolExecutor(1, multiprocessing.get_context(context)) as pool:
        readout, report, part, sent = pool.submit(use, cache, cameras).result(LIMIT)
    expected = use(cache, cameras)
    assert readout.mask.any() and same(readout, expected[0])
    assert report.as_dict() == expected[1].as_dict() and report.written + report.covered > 0
    assert len(part) == 2 and same((part.intrinsics, part.cam2world), (expected[2].intrinsics, expected[2].cam2world))
    assert sent.config == cache.config and len(sent) == len(cache)
    assert_same_contents(sent, cache)


class Views(torch.utils.data.Dataset):
    def __init__(self, cache: LatentCache, cameras: Cameras) -> None:
        self.cache, self.cameras = cache, cameras

    def __len__(self) -> int:
        return len(self.cameras)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.cache.read(self.cameras[i], SIZE).latents[0]


@pytest.mark.parametrize("context", CONTEXTS[:2])
def test_workers_of_a_data_loader_read_a_cache(context):
    cache, cameras, _ = make_cache()
    expected = cache.read(cameras, SIZE).latents
    loader = torch.utils.data.DataLoader(
        Views(cache, cameras), batch_size=2, num_workers=2, multiprocessing_context=context, timeout=LIMIT
    )
    assert expected.any() and torch.equal(torch.cat(list(loader)), expected)


class Named(LatentCache):
    """A cache with an attribute of its own."""

    name = "none"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_copies_share_nothing_but_what_they_hold(duplicate, dtype):
    rng = np.random.default_rng(0)
    cameras = Cameras(scenes.intrinsics(rng, 1, SIZE), scenes.poses(rng, 1), SIZE, square_pixels=False)
    cache = Named(4, dtype=dtype, merge="mean", max_tokens=300)
    cache.write(torch.ones(1, 4, *SIZE), torch.full((1, *SIZE), 2.0), cameras)
    cache.name = ["mine"]
    copied = duplicate(cache)
    assert type(copied) is Named and copied.name == ["mine"] and copied.config == cache.config
    assert_same_contents(copied, cache)
    before = copied.tensors()["features"].clone()
    cache.clear()
    assert len(copied) == len(before) > 0 and torch.equal(copied.tensors()["features"], before)
    assert (copied.name is cache.name) == (duplicate is copy.copy)


# Forks.


def forked(work: Callable[[], None]) -> int:
    """Run in a copy of this process; returns its id. It ends with 0, or by a signal if it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, wherever there are threads
        pid = os.fork()
    if pid == 0:
        signal.alarm(LIMIT)
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def join(pid: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_fork_waits_for_a_write_and_finds_the_cache_whole(monkeypatch):
    cache, cameras, _ = make_cache(write_policy="append")
    before = len(cache)
    begun, go_on, function = threading.Event(), threading.Event(), launch.write

    def paused(*args, **options):
        begun.set()
        assert go_on.wait(LIMIT)
        return function(*args, **options)

    def check() -> None:
        assert len(cache) == 2 * before and cache.num_frames == 6
        use(cache, cameras)

    monkeypatch.setattr(launch, "write", paused)
    with ThreadPoolExecutor() as pool:
        write = pool.submit(make_write(cache, cameras))
        assert begun.wait(LIMIT)
        fork = pool.submit(forked, check)
        threading.Event().wait(0.05)
        assert not fork.done()
        go_on.set()
        join(fork.result(LIMIT))
        write.result(LIMIT)
    assert len(cache) == 2 * before


def make_write(cache: LatentCache, cameras: Cameras) -> Callable[[], WriteReport]:
    rng = np.random.default_rng(0)
    scenes.intrinsics(rng, 3, SIZE), scenes.poses(rng, 3)
    latents = torch.from_numpy(rng.normal(size=(3, 4, *SIZE))).to(torch.float32)
    depth = scenes.depth_maps(rng, 3, SIZE, 0.02)
    return lambda: cache.write(latents, depth, cameras)


def test_a_fork_while_others_read_lets_the_child_write(monkeypatch):
    cache, cameras, _ = make_cache()
    begun, go_on, function = threading.Event(), threading.Event(), launch.read_aligned

    def paused(*args, **options):
        begun.set()
        assert go_on.wait(LIMIT)
        return function(*args, **options)

    with ThreadPoolExecutor() as pool:
        with monkeypatch.context() as patched:
            patched.setattr(launch, "read_aligned", paused)
            read = pool.submit(cache.read, cameras, SIZE)
            assert begun.wait(LIMIT)
        join(forked(lambda: use(cache, cameras)))
        go_on.set()
        read.result(LIMIT)
    use(cache, cameras)


def test_a_child_goes_on_with_one_thread(threads):
    """OpenMP's threads are not in it: on several, torch would wait for them for ever."""
    cache, cameras, _ = make_cache()
    threads(2)
    large = torch.ones(2_000_000)
    large.sin()  # from now on there is a second thread

    def check() -> None:
        with pytest.warns(RuntimeWarning, match="a fork of one in which torch had several threads"):
            use(cache, cameras)
        assert torch.get_num_threads() == 1
        large.sin()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            use(cache, cameras)

    def as_a_loader_does() -> None:
        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            use(cache, cameras)

    buffers = cache.buffers

    def operator_alone() -> None:
        with pytest.warns(RuntimeWarning, match="spawn or forkserver"):
            splat(buffers.points, buffers.features, cameras.intrinsics, cameras.cam2world, SIZE)

    for work in (check, as_a_loader_does, operator_alone):
        join(forked(work))
    assert torch.get_num_threads() == 2


def test_parent_and_child_keep_their_offloaded_tokens_apart():
    """Both have the file open that the tokens are in: what one puts there would be read by the other."""
    cache, twin = room(views=6)
    rng = np.random.default_rng(0)
    views = [looking(rng, yaw) for yaw in np.linspace(0, 6, 6, endpoint=False)]
    cache.offload(views[0])
    assert cache.num_offloaded > 0
    (child_waits, parent_tells), (parent_waits, child_tells) = os.pipe(), os.pipe()

    def move() -> None:
        for one in (views[3], views[1], views[0][:0], views[4]):
            cache.offload(one)
            assert cache.num_offloaded > 0

    def check() -> None:
        os.read(child_waits, 1)
        cache.read(views[2], GRID)
        move()
        assert_same_contents(cache, twin)
        os.write(child_tells, b".")
        os.read(child_waits, 1)
        assert_same_contents(cache, twin)

    pid = forked(check)
    move()
    os.write(parent_tells, b".")
    os.read(parent_waits, 1)
    assert_same_contents(cache, twin)
    move()
    os.write(parent_tells, b".")
    join(pid)
    assert_same_contents(cache, twin)
    store = cache._offloaded.store
    assert not store.shared
    move()
    assert cache._offloaded.store is store

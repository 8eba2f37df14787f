"""One cache and several threads: reads go side by side, writes alone, and each sees a state between two writes."""

from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_offload import GRID, POLICIES, assert_same_contents, looking, room, views_of

from mirage_kernels import LatentCache
from mirage_kernels.cache import launch
from mirage_kernels.cache.lock import CacheLock

LIMIT = 60  # seconds, of what would otherwise wait for ever
SECONDS = 60 if os.environ.get("MIRAGE_NIGHTLY") else 1


def bits(readout) -> bytes:
    return b"".join(value.numpy().tobytes() for value in readout)


class Paused:
    """Have each call of a function wait, once it has begun, until it is let go on."""

    def __init__(self, monkeypatch, name: str) -> None:
        self.begun, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        function = getattr(launch, name)

        def paused(*args, **options):
            self.begun.release()
            assert self.go_on.acquire(timeout=LIMIT)
            return function(*args, **options)

        monkeypatch.setattr(launch, name, paused)


def still_waits(future: Future) -> bool:
    time.sleep(0.05)
    return not future.done()


@pytest.fixture
def scene():
    rng = np.random.default_rng(0)
    return looking(rng, 0.0, 1.5, 3.0), views_of(rng, looking(rng, 0.0, 3.0))


@pytest.mark.parametrize("policy", ["append", "bounded"])
def test_reads_wait_for_a_write_that_has_begun(monkeypatch, scene, policy):
    (cache, twin), (cameras, arguments) = room(views=4, **POLICIES[policy]), scene
    held = len(cache)
    twin.write(*arguments)
    pause = Paused(monkeypatch, "write")
    with ThreadPoolExecutor() as pool:
        write = pool.submit(cache.write, *arguments)
        assert pause.begun.acquire(timeout=LIMIT)
        doing = [
            pool.submit(cache.read, cameras, GRID),
            pool.submit(len, cache),
            pool.submit(lambda: cache.points.clone()),
            pool.submit(cache.view_overlap, cameras, cameras, GRID),
            pool.submit(lambda: cache.tensors()["features"].clone()),
            pool.submit(cache.checkpoint),
        ]
        assert all(still_waits(future) for future in doing)
        pause.go_on.release()
        write.result(LIMIT)
        readout, tokens, points, overlap, features, mark = (future.result(LIMIT) for future in doing)
    assert held < tokens == len(twin) == mark.tokens
    assert bits(readout) == bits(twin.read(cameras, GRID)) and readout.mask.any()
    assert torch.equal(points, twin.points) and torch.equal(features, twin.features)
    assert torch.equal(overlap, twin.view_overlap(cameras, cameras, GRID))


def test_a_write_waits_for_reads_and_reads_for_nobody_else(monkeypatch, scene):
    (cache, _), (cameras, arguments) = room(views=4), scene
    before = bits(cache.read(cameras, GRID))
    pause = Paused(monkeypatch, "read_aligned")
    with ThreadPoolExecutor() as pool:
        reads = [pool.submit(cache.read, cameras, GRID) for _ in range(3)]
        for _ in reads:
            assert pause.begun.acquire(timeout=LIMIT)  # all at once
        write = pool.submit(cache.write, *arguments)
        assert still_waits(write)
        late = pool.submit(cache.read, cameras, GRID)  # writers come first
        assert still_waits(late) and not pause.begun.acquire(blocking=False)
        pause.go_on.release(3)
        assert [bits(read.result(LIMIT)) for read in reads] == [before] * 3
        write.result(LIMIT)
        pause.go_on.release()
        after = bits(late.result(LIMIT))
    assert after != before


@pytest.mark.parametrize("policy", ["append", "bounded"])
def test_two_writers_take_turns(monkeypatch, scene, policy):
    _, arguments = scene
    cache, twin = (LatentCache(4, **POLICIES[policy]) for _ in range(2))
    ready = threading.Barrier(4)

    def write() -> int:
        ready.wait(LIMIT)
        return sum(cache.write(*arguments).written for _ in range(5))

    with ThreadPoolExecutor() as pool:
        written = sum(future.result(LIMIT) for future in [pool.submit(write) for _ in range(4)])
    for _ in range(20):
        twin.write(*arguments)
    assert len(cache) == written and cache.num_frames == 40
    assert_same_contents(cache, twin)  # the writes were all alike


def test_an_error_lets_go_of_the_cache(monkeypatch, scene):
    (cache, twin), (cameras, arguments) = room(views=2), scene

    def fails(*_arguments, **_options):
        raise MemoryError("none left")

    with monkeypatch.context() as patched:
        for name in ("write", "read_aligned", "view_overlap"):
            patched.setattr(launch, name, fails)
        for call in (
            lambda: cache.write(*arguments),
            lambda: cache.read(cameras, GRID),
            lambda: cache.view_overlap(cameras, cameras, GRID),
        ):
            with pytest.raises(MemoryError, match="none left"):
                call()
    with pytest.raises(ValueError, match="mark must be of this cache"):
        cache.rollback(cache.checkpoint()._replace(frames=10**6))
    for one in (cache, twin):
        with ThreadPoolExecutor() as pool:
            pool.submit(one.write, *arguments).result(LIMIT)
            pool.submit(one.read, cameras, GRID).result(LIMIT)
    assert_same_contents(cache, twin)


def read_beside_a_writer(cache: LatentCache, twin: LatentCache, seconds: float, readers: int, offloads: bool) -> int:
    """Read in threads while this one writes, and hold every read to the states that a twin was in; returns reads."""
    rng = np.random.default_rng(0)
    cameras = looking(rng, 0.0, 2.0, 4.0)
    batches = [views_of(rng, looking(rng, yaw, yaw + 0.2)) for yaw in np.linspace(0, 6, 6, endpoint=False)]
    ahead = [looking(rng, yaw) for yaw in (0.0, 3.0)]
    states = [bits(twin.read(cameras, GRID))]
    for batch in batches:
        twin.write(*batch)
        states.append(bits(twin.read(cameras, GRID)))
    assert len(set(states)) == len(states)
    order = {state: number for number, state in enumerate(states)}
    ready, round_over, stop = threading.Barrier(readers + 1), threading.Barrier(readers + 1), threading.Event()
    written = threading.Event()

    def read() -> int:
        reads = 0
        while True:
            ready.wait(LIMIT)
            if stop.is_set():
                return reads
            last = 0
            while last < len(batches):
                seen = order.get(bits(cache.read(cameras, GRID)))
                assert seen is not None, "a torn read"
                assert seen >= last, "an older state than before"
                last, reads = seen, reads + 1
                if written.is_set():
                    assert order[bits(cache.read(cameras, GRID))] == len(batches)
                    break
            round_over.wait(LIMIT)

    end = time.monotonic() + seconds
    with ThreadPoolExecutor(readers) as pool:
        futures = [pool.submit(read) for _ in range(readers)]
        try:
            while not stop.is_set():
                cache.clear()
                written.clear()
                ready.wait(LIMIT)
                for batch in batches:
                    cache.write(*batch)
                    if offloads:
                        cache.offload(random.choice(ahead))
                written.set()
                round_over.wait(LIMIT)
                assert_same_contents(cache, twin)
                if time.monotonic() > end:
                    stop.set()
            ready.wait(LIMIT)
        except BaseException:
            ready.abort(), round_over.abort()
            raise
        return sum(future.result(LIMIT) for future in futures)


@pytest.mark.slow
@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("policy", ["append", "bounded"])
def test_eight_readers_beside_a_writer(policy, offloads):
    cache, twin = (LatentCache(4, **POLICIES[policy]) for _ in range(2))
    assert read_beside_a_writer(cache, twin, SECONDS, 8, offloads) > 20


def test_readers_beside_a_writer():
    assert read_beside_a_writer(LatentCache(4), LatentCache(4), 0.0, 3, True) > 0


@pytest.mark.parametrize("policy", ["append", "bounded"])
def test_reads_alone_leave_an_offloaded_cache_whole(policy):
    """Each brings back what it needs, while the others read."""
    cache, twin = room(views=6, **POLICIES[policy])
    rng = np.random.default_rng(1)
    views = [looking(rng, yaw) for yaw in np.linspace(0, 6, 8, endpoint=False)]
    expected = [bits(twin.read(one, GRID)) for one in views]
    ready = threading.Barrier(8)

    def read(number: int) -> bytes:
        ready.wait(LIMIT)
        return bits(cache.read(views[number], GRID))

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            cache.offload(views[0][:0])
            assert cache.num_offloaded > 0
            assert list(pool.map(read, range(8))) == expected
            cache.offload(views[3])
            overlaps = list(pool.map(lambda one: cache.view_overlap(one, views[0], GRID), views))
            assert [float(x) for x in overlaps] == [float(twin.view_overlap(x, views[0], GRID)) for x in views]
    assert_same_contents(cache, twin)


# The lock alone.


def test_nobody_starves():
    """A thread that writes again and again lets readers in, and readers that come again and again let a writer in."""
    lock, stop, ready = CacheLock(), threading.Event(), threading.Barrier(4)

    def take(shared: bool) -> int:
        ready.wait(LIMIT)
        taken = 0
        while taken < 200:
            with lock if shared else lock.exclusive():
                taken += 1
        while not stop.is_set():
            with lock if shared else lock.exclusive():
                pass
        return taken

    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(take, False) for _ in range(2)]
        ready_reader = pool.submit(take, True)
        ready.wait(LIMIT)
        for _ in range(200):
            with lock:
                pass
        stop.set()
        assert [future.result(LIMIT) for future in (*writers, ready_reader)] == [200] * 3


def test_a_thread_takes_again_what_it_has():
    lock = CacheLock()

    def write() -> None:
        with lock.exclusive():
            pass

    with lock, lock:
        pass
    with lock.exclusive(), lock.exclusive(), lock, lock:
        pass
    with ThreadPoolExecutor() as pool, lock, lock:
        waiting = pool.submit(write)
        assert still_waits(waiting)
        with lock:  # though a writer waits
            pass
        assert still_waits(waiting)


def test_who_gives_up_waiting_lets_go():
    lock = CacheLock()

    def write() -> None:
        with lock.exclusive():
            pass

    def give_up(_predicate):
        raise KeyboardInterrupt

    with ThreadPoolExecutor() as pool:
        with lock.exclusive():

            def interrupted() -> None:
                lock._changed.wait_for = give_up
                try:
                    with pytest.raises(KeyboardInterrupt), lock:
                        raise AssertionError
                finally:
                    del lock._changed.wait_for

            pool.submit(interrupted).result(LIMIT)
        with lock:
            lock._changed.wait_for = give_up
            future = pool.submit(write)
            assert isinstance(future.exception(LIMIT), KeyboardInterrupt)
            del lock._changed.wait_for
        write()
        pool.submit(write).result(LIMIT)

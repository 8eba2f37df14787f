"""`use_backend`: of its thread or task, and what is compiled follows it."""

from __future__ import annotations

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scenes
import torch

from mirage_kernels import available_backends, splat, use_backend
from mirage_kernels.backends import choose_backend

LIMIT = 60  # seconds, of what would otherwise wait for ever
SIZE = (5, 7)


def chosen() -> str:
    return choose_backend(torch.device("cpu"), torch.float32)


def test_each_thread_has_its_own_backend():
    automatic = chosen()
    with use_backend("reference"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(chosen).result(LIMIT) == automatic and chosen() == "reference"
        assert pool.submit(contextvars.copy_context().run, chosen).result(LIMIT) == "reference"
        pool.submit(use_backend, "reference").result(LIMIT)
        with use_backend(None):
            assert pool.submit(chosen).result(LIMIT) == "reference" and chosen() == automatic
    assert chosen() == automatic


def test_threads_that_take_turns_leave_nothing_forced():
    if not available_backends()["cpu"]:
        pytest.skip(available_backends()["cpu"].reason)
    automatic = chosen()
    with ThreadPoolExecutor(1) as pool:
        one = use_backend("reference")
        other = pool.submit(use_backend, "cpu").result(LIMIT)
        one.__exit__()
        assert (chosen(), pool.submit(chosen).result(LIMIT)) == (automatic, "cpu")
        pool.submit(other.__exit__).result(LIMIT)
        assert (chosen(), pool.submit(chosen).result(LIMIT)) == (automatic, automatic)


def test_tasks_have_their_own_backends():
    async def task(name: str) -> list[str]:
        with use_backend(name):
            seen = [chosen()]
            await asyncio.sleep(0)
            seen.append(await asyncio.to_thread(chosen))
        return [*seen, chosen()]

    async def both() -> list[list[str]]:
        return await asyncio.gather(task("reference"), task(automatic))

    automatic = chosen()
    assert asyncio.run(both()) == [["reference", "reference", automatic], [automatic] * 3]


@pytest.mark.slow
def test_compiled_code_follows_the_backend():
    if not available_backends()["cpu"]:
        pytest.skip(available_backends()["cpu"].reason)
    graphs: list[bool] = []

    def backend(graph, _inputs):
        graphs.append(any("splat" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    rng = np.random.default_rng(0)
    arguments = *scenes.cloud(rng, 100, 4), scenes.intrinsics(rng, 2, SIZE), scenes.poses(rng, 2)
    torch._dynamo.reset()
    read = torch.compile(lambda *args: splat(*args, SIZE).latents + 1, fullgraph=True, backend=backend)
    expected = splat(*arguments, SIZE).latents + 1
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(read(*arguments), expected) and graphs == [True]
        with use_backend("reference"):
            assert torch.equal(read(*arguments), expected) and graphs == [True, False]
            assert torch.equal(pool.submit(read, *arguments).result(LIMIT), expected)
        assert torch.equal(read(*arguments), expected) and graphs == [True, False]
    torch._dynamo.reset()

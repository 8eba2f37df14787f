"""One room, given in other units and elsewhere in the world, is the same video."""

from __future__ import annotations

from typing import Any

import generation
import pytest
import torch

from mirage.pipeline.memory import MemoryConfig
from mirage_kernels import Cameras


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


def film(scale: float, offset: float = 0.0, **changes: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The video, and what is said of its chunks."""
    options = generation.options(17, num_inference_steps=1, static_filter="geometric", **changes)
    poses = options["cameras"].cam2world.clone()
    poses[:, :3, 3] = (poses[:, :3, 3] * 2**20).round() / 2**20 * scale + offset
    cameras = Cameras.trusted(options["cameras"].intrinsics, poses, options["cameras"].image_size)
    told: list[dict[str, Any]] = []
    made = generation.make_pipeline()(
        **options | {"cameras": cameras, "depth": options["depth"] * scale},
        callback_on_chunk_end=lambda _, chunk: told.append(chunk.metrics),
    )
    return made, told


NAMES = ("coverage", "references", "overlaps", "static", "written")


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["aligned", "pixel"])
def test_units_and_places_by_powers_of_two_change_no_bit(memory: str) -> None:
    expected, told = film(1.0, memory=memory)
    assert told[1]["coverage"] > 0.8 and told[1]["references"]
    for scale, offset in ((2.0**-10, 0.0), (2.0**10, 2.0**33), (2.0**-8, 500_000.0)):
        made, other = film(scale, offset, memory=memory)
        assert torch.equal(made.frames, expected.frames), (scale, offset)
        for name in NAMES:
            found, wanted = [one[name] for one in other], [one[name] for one in told]
            if name == "overlaps" and offset:  # voxels count from the cache's origin: elsewhere they lie otherwise
                assert [len(x) for x in found] == [len(x) for x in wanted]
                found, wanted = ([y for x in each for y in x] for each in (found, wanted))
                wanted = pytest.approx(wanted, abs=0.01)
            assert found == wanted, (scale, offset, name)


@pytest.mark.slow
def test_a_scene_in_kilometres_is_remembered() -> None:
    told = film(1.0)[1]
    other = film(0.001)[1]
    for name in ("coverage", "static"):
        assert [one[name] for one in other] == pytest.approx([one[name] for one in told], abs=0.1)
    assert other[1]["references"] == told[1]["references"]


def test_a_near_that_is_given() -> None:
    made, told = film(1.0, memory=MemoryConfig(near=100.0))
    assert made.cache.near == 100.0 and told[1]["coverage"] == 0.0
    with pytest.raises(ValueError, match="near must be None or a finite depth"):
        MemoryConfig(near=-1.0)

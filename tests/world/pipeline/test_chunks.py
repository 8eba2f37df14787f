"""The plan of chunks, against counting by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirage.pipeline.chunks import Chunk, check_num_frames, latent_count, plan_chunks


def test_129_frames_are_four_chunks_of_33() -> None:
    chunks = plan_chunks(129)
    assert [(c.start, c.stop) for c in chunks] == [(0, 33), (33, 65), (65, 97), (97, 129)]
    assert [c.num_latents for c in chunks] == [9, 8, 8, 8]
    assert chunks[0].frames_per_latent == (1, *[4] * 8) and chunks[1].frames_per_latent == (4,) * 8
    assert chunks[0].keyframes == list(range(0, 33, 4)) and chunks[1].keyframes == list(range(36, 65, 4))
    assert chunks[1].latents == list(range(9, 17))


@given(st.integers(1, 60), st.integers(1, 12))
def test_every_plan_covers_each_frame_and_latent_once(n: int, m: int) -> None:
    num_frames, chunk_frames = 4 * n + 1, 4 * m + 1
    chunks = plan_chunks(num_frames, chunk_frames)
    assert [frame for c in chunks for frame in range(c.start, c.stop)] == list(range(num_frames))
    assert [latent for c in chunks for latent in c.latents] == list(range(latent_count(num_frames)))
    assert [frame for c in chunks for frame in c.keyframes] == list(range(0, num_frames, 4))
    for i, chunk in enumerate(chunks):
        assert chunk == Chunk(i, chunk.start, chunk.stop)
        assert sum(chunk.frames_per_latent) == chunk.stop - chunk.start
        # What the model makes, the shared frame included, is 4 n + 1 again.
        assert (chunk.stop - chunk.start + (i > 0)) % 4 == 1
        assert chunk.stop - chunk.start + (i > 0) <= chunk_frames
    assert all(c.stop - c.start == chunk_frames - (i > 0) for i, c in enumerate(chunks[:-1]))


@pytest.mark.parametrize(
    "value, message",
    [
        (0, "got 0; nearest: 5$"),
        (4, "got 4; nearest: 5$"),
        (6, "got 6; nearest: 5 or 9$"),
        (32, "got 32; nearest: 29 or 33$"),
        (-3, "got -3; nearest: 5$"),
        (True, "must be an int, got True"),
        (33.0, "must be an int, got 33.0"),
    ],
)
def test_other_numbers_say_which_are_valid(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_num_frames("num_frames", value)  # type: ignore[arg-type]

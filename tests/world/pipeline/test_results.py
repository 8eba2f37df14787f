"""Models, estimators and filters that give what cannot be used: the step fails, and nothing of it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import generation
import pytest
import torch
from generation import options
from torch import Tensor

from mirage.perception.depth import GivenDepth
from mirage.pipeline.pipeline import MiragePipeline
from mirage.pipeline.session import MirageSession
from mirage_kernels import LatentCache

NAN = float("nan")


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


@pytest.fixture
def pipe() -> MiragePipeline:
    return generation.make_pipeline()


def start(pipe: MiragePipeline, num_frames: int, **changes: Any) -> MirageSession:
    asked = options(num_frames, num_inference_steps=1, **changes)
    for name in ("cameras", "chunk_frames", "output_type"):
        asked.pop(name)
    return pipe.start_session(**asked)


class Spoiled:
    """A function whose result is spoiled from a call on, until it is mended: its last few values, or all."""

    def __init__(self, function: Any, after: int, values: int | None = None, bad: float = NAN) -> None:
        self.function, self.after, self.values, self.bad = function, after, values, bad

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.function(*args, **kwargs)
        self.after -= 1
        if self.after >= 0:
            return result
        for spoiled in result if isinstance(result, tuple) else (result,):
            if isinstance(spoiled, Tensor):
                spoiled.view(-1)[-self.values if self.values else 0 :] = self.bad
        return result

    def mend(self) -> None:
        self.after = 1 << 30


def spoil_transformer(pipe: MiragePipeline) -> Spoiled:
    pipe.transformer.forward = spoiled = Spoiled(pipe.transformer.forward, 1)
    return spoiled


def spoil_scheduler(pipe: MiragePipeline) -> Spoiled:
    pipe.scheduler.convert_model_output = spoiled = Spoiled(pipe.scheduler.convert_model_output, 1, 1, float("inf"))
    return spoiled


def spoil_decoder(pipe: MiragePipeline) -> Spoiled:
    pipe.vae.decoder.conv_out.forward = spoiled = Spoiled(pipe.vae.decoder.conv_out.forward, 3)
    return spoiled


def spoil_latent_depth(pipe: MiragePipeline) -> Spoiled:
    forward = pipe.latent_depth.forward

    def depth(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return type(output)(**dict(output.items()) | {"depth": spoiled(output.depth)})

    spoiled = Spoiled(lambda depth: depth, 2)
    pipe.latent_depth.forward = depth
    return spoiled


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            spoil_transformer,
            r"latents of chunk 1 \(frames 9 to 16\) from MirageTransformer3DModel in float32 \(first in the flow of"
            r" step 1 of 1\) must be finite, got 2304 of 3456 values \(66.7%\) NaN or Inf: nothing of it is kept",
        ),
        (
            spoil_scheduler,
            r"first in what the scheduler made of it in step 1 of 1\) must be finite, got 1 of 3456 values \(0.0%\)",
        ),
        pytest.param(
            spoil_decoder,
            r"frames of chunk 1 \(frames 9 to 16\) from the VAE's decoder must be finite",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            spoil_latent_depth,
            r"depth of chunk 1 \(frames 9 to 16\) from LatentDepth must be finite, got 48 of 48 values",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_step_that_is_not_finite_leaves_nothing_and_can_be_tried_again(
    pipe: MiragePipeline, tmp_path: Path, spoil: Any, message: str
) -> None:
    views = generation.cameras(17)
    with_depth = {} if spoil is not spoil_latent_depth else {"depth": None}
    expected = start(pipe, 17, **with_depth)
    list(expected.run(views, 9))
    spoiled = spoil(pipe)
    session = start(pipe, 17, run_dir=tmp_path, **with_depth)
    session.step(views[:9])
    before = {name: held.clone() for name, held in session.cache.tensors().items()}
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for _ in range(2):  # again with the same model: the same
        with pytest.raises(ValueError, match=message):
            session.step(views[9:])
    assert all(torch.equal(held, before[name]) for name, held in session.cache.tensors().items())
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    spoiled.mend()
    session.step(views[9:])
    assert torch.equal(session.latents(), expected.latents())
    assert torch.equal(session.cache.features, expected.cache.features)


def test_frames_that_are_decoded_at_the_end_are_checked_too(pipe: MiragePipeline, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"decode": "end", "run_dir": tmp_path, "output_type": "np", "num_inference_steps": 1}
    conv_out = pipe.vae.decoder.conv_out
    conv_out.forward = Spoiled(conv_out.forward, 0)
    with pytest.raises(ValueError, match=r"frames of chunk 0 .* from the VAE's decoder .*: its latents are kept"):
        pipe(**options(9, **asked))
    conv_out.forward.mend()
    assert pipe(**options(9, resume=True, **asked)).frames.shape[1] == 9


def test_what_a_session_is_started_with_is_finite(pipe: MiragePipeline) -> None:
    embeds = torch.zeros(1, 4, 32)
    with pytest.raises(ValueError, match="prompt_embeds must be finite"):
        start(pipe, 5, prompt=None, prompt_embeds=embeds + NAN)
    with pytest.raises(ValueError, match="latents must be finite"):
        start(pipe, 5, latents=torch.full((1, 48, 2, 4, 6), NAN))
    encode = pipe.text_encoder.forward
    pipe.text_encoder.forward = lambda *args, **kwargs: _nan_states(encode(*args, **kwargs))
    with pytest.raises(ValueError, match="embeddings of the prompt from the text encoder must be finite"):
        start(pipe, 5)
    pipe.text_encoder.forward = encode
    pipe.vae.encoder.forward = Spoiled(pipe.vae.encoder.forward, 0)
    session = start(pipe, 5)
    with pytest.raises(ValueError, match="latents of the first frame from the VAE's encoder must be finite"):
        session.write_first_frame(generation.cameras(5)[0])
    pipe.vae.encoder.forward.mend()
    session.write_first_frame(generation.cameras(5)[0])


def _nan_states(output: Any) -> Any:
    output.last_hidden_state[:] = NAN
    return output


class Estimator:
    needs_frames = False
    alignment = "none"

    def __init__(self, depth: Tensor, unknown: float, from_frame: int) -> None:
        self.given, self.unknown, self.from_frame = GivenDepth(depth), unknown, from_frame
        self.marks_sky = False

    def __call__(self, frames: Any, views: Any, numbers: list[int]) -> Tensor:
        depth = self.given(None, views, numbers)
        return torch.full_like(depth, self.unknown) if numbers[0] >= self.from_frame else depth


@pytest.mark.parametrize(
    "unknown, why, from_frame, where",
    [
        (NAN, "100.0%. NaN", 9, r"chunk 1 \(frames 9 to 16\)"),
        (0.0, "0.0%. NaN", 9, r"chunk 1 \(frames 9 to 16\)"),
        (-2.0, "100.0%. negative", 0, "the first frame"),
    ],
)
def test_an_estimator_that_knows_nothing_fails_the_step(
    pipe: MiragePipeline, unknown: float, why: str, from_frame: int, where: str
) -> None:
    views, depth = generation.cameras(17), options(17)["depth"]
    estimator = Estimator(depth, unknown, from_frame)
    session = start(pipe, 17, depth=None, depth_estimator=estimator)
    with pytest.raises(ValueError, match=f"depth of {where} from Estimator must be known somewhere, .*{why}"):
        list(session.run(views, 9))
    assert session.num_chunks == (from_frame > 0) and bool(len(session.cache)) == (from_frame > 0)
    estimator.marks_sky = from_frame > 0  # which may be all there is
    estimator.from_frame = from_frame or 1 << 30
    list(session.run(views, 9))
    assert session.num_chunks == 2


class KeepsNothing:
    needs_frames = False

    def __init__(self, given: Any = None) -> None:
        self.given = given

    def __call__(self, views: Any) -> Any:
        return torch.zeros_like(views.depth, dtype=torch.bool) if self.given is None else self.given


def test_a_first_write_that_stores_nothing_says_why(pipe: MiragePipeline) -> None:
    views, depth = generation.cameras(9), options(9)["depth"]
    for changes, why in (
        ({"depth": -depth}, r"24 of 24 tokens \(100.0%\) have unknown depth .*z, positive in front"),
        ({"depth": depth * NAN}, "24 of 24 tokens .* have unknown depth"),
        ({"static_filter": KeepsNothing()}, "24 of 24 tokens .* are not static by the static filter"),
    ):
        session = start(pipe, 9, **changes)
        with pytest.raises(ValueError, match=f"the first frame must leave something in the memory, .*{why}"):
            session.step(views)
        with pytest.raises(ValueError, match="the first frame must leave something in the memory"):
            session.write_first_frame(views[0])
        assert not len(session.cache) and not session.num_chunks
    assert len(pipe(**options(9, depth=-depth, memory="none", num_inference_steps=1)).cache) == 0
    # What a memory shows already is not stored twice: no error.
    cache = LatentCache(48)
    for _ in range(2):
        pipe(**options(9, cache=cache, num_inference_steps=1))


def test_given_depth_that_is_unknown_later_is_said(pipe: MiragePipeline, caplog: pytest.LogCaptureFixture) -> None:
    depth = options(17)["depth"].clone()
    depth[9:] = 0
    with caplog.at_level("WARNING", "mirage"):
        list(start(pipe, 17, depth=depth).run(generation.cameras(17), 9))
    assert "the given depth of chunk 1 (frames 9 to 16) is unknown everywhere" in caplog.text


@pytest.mark.parametrize(
    "given, got", [(torch.ones(1, 64, 96), r"\(1, 64, 96\) float32"), (1, "int"), ([True], "list")]
)
def test_masks_are_masks(pipe: MiragePipeline, given: Any, got: str) -> None:
    session = start(pipe, 9, static_filter=KeepsNothing(given))
    with pytest.raises(ValueError, match=rf"mask from KeepsNothing must be \(1, 64, 96\) bool like depth, got {got}"):
        session.step(generation.cameras(9))

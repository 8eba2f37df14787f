"""Runs that are resumed from their last good chunk: to the same bits, and nothing is deleted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import generation
import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from generation import options
from safetensors.torch import load_file, save_file

from mirage.pipeline.pipeline import MiragePipeline

STATE = ("cache.safetensors", "decoder.safetensors", "random.safetensors")
NAN = float("nan")


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


@pytest.fixture(scope="module")
def pipe() -> MiragePipeline:
    return generation.make_pipeline()


def asked(run: Path, **changes: Any) -> dict[str, Any]:
    return options(25, run_dir=run, num_inference_steps=1, static_filter="geometric", **changes)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def as_of_an_earlier_release(run: Path, spoiled: int | None) -> None:
    """Take away what earlier releases did not keep, and give latents NaN as they did."""
    for index in range(3):
        chunk = run / "chunks" / f"{index:04d}"
        (chunk / "manifest.json").unlink()
        if index < 2:
            for name in STATE:
                (chunk / name).unlink(missing_ok=True)
        if spoiled is not None and index >= spoiled:
            held = load_file(chunk / "latents.safetensors")
            held["latents"][:] = NAN
            save_file(held, chunk / "latents.safetensors")


@pytest.mark.parametrize(
    "spoiled", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_run_with_nan_chunks_continues_from_the_last_good_one(
    pipe: MiragePipeline, tmp_path: Path, spoiled: int
) -> None:
    run = tmp_path / "run"
    whole = pipe(**asked(run))
    as_of_an_earlier_release(run, spoiled)
    before = content(run)
    aside = "chunk 0002" if spoiled == 2 else f"chunks 000{spoiled} to 0002"
    with pytest.raises(
        ValueError,
        match=rf"000{spoiled} holds latents that are not finite.*resume=\"last-good\" .*moves {aside} aside; nothing",
    ):
        pipe(**asked(run, resume=True))
    assert content(run) == before
    resumed = pipe(**asked(run, resume="last-good"))
    assert torch.equal(resumed.frames, whole.frames)
    assert all(torch.equal(held, whole.cache.tensors()[name]) for name, held in resumed.cache.tensors().items())
    kept = content(run / "set-aside-1")
    for name in (f"{index:04d}/latents.safetensors" for index in range(spoiled, 3)):
        assert kept[name] == before[f"chunks/{name}"]
    assert kept["video.mp4"] == before["video.mp4"] and (run / "video.mp4").read_bytes() == before["video.mp4"]
    assert torch.equal(pipe(**asked(run, resume=True)).frames, whole.frames)  # from now on as ever


@pytest.mark.slow
def test_what_a_damaged_run_continues_from_is_made_again(tmp_path: Path) -> None:
    """Memory, decoder and the generator's state, with a scheduler that draws at every step."""
    pipe, run = generation.make_pipeline(), tmp_path / "run"
    pipe.scheduler = FlowMatchLCMScheduler(shift=5.0)
    whole = pipe(**asked(run))
    shutil.rmtree(run / "chunks" / "0002")
    for name in STATE:
        (run / "chunks" / "0001" / name).unlink()
    with pytest.raises(ValueError, match=r'cache.safetensors is missing.*resume="last-good" .*makes it again'):
        pipe(**asked(run, resume=True))
    resumed = pipe(**asked(run, resume="last-good"))
    assert torch.equal(resumed.frames, whole.frames)
    assert all(torch.equal(held, whole.cache.tensors()[name]) for name, held in resumed.cache.tensors().items())
    assert not (run / "set-aside-1").exists()


def test_other_words_are_refused_and_pixels_cannot_be_made_again(pipe: MiragePipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume must be True, False or \"last-good\", got 'last'"):
        pipe(**asked(tmp_path, resume="last"))
    run = tmp_path / "run"
    pixels = {"memory": "pixel", "static_filter": "none", "num_inference_steps": 1}
    pipe(**options(5, run_dir=run, **pixels))
    (run / "chunks" / "0000" / "cache.safetensors").unlink()
    with pytest.raises(ValueError, match="one of pixels cannot be made again"):
        pipe(**options(5, run_dir=run, resume="last-good", **pixels))

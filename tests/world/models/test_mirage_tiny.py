"""The model that comes with the package: it is what its card says, and it remembers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from mirage.evaluation.closed_loop import generate_loop, load_memory, measure
from mirage.evaluation.loops import EvaluateOptions, make_loop
from mirage.evaluation.report import OWN, summarise
from mirage.pipeline.memory import MIRAGE_TINY, MIRAGE_TINY_FOLDER, MIRAGE_TINY_STEPS
from mirage.training import release as card
from mirage.zoo import mirage_tiny_pipeline


def test_it_is_small_and_whole() -> None:
    files = [path for path in MIRAGE_TINY_FOLDER.rglob("*") if path.is_file()]
    assert 1_000_000 < sum(path.stat().st_size for path in files) <= 40_000_000
    pipe = mirage_tiny_pipeline()
    for part in (pipe.vae, pipe.transformer, pipe.memory_adapter, pipe.latent_depth):
        for name, weight in part.state_dict().items():
            assert weight.isfinite().all(), name
            assert torch.equal(weight, weight.bfloat16().to(weight.dtype)), f"{name} is not in bfloat16"
    # Weights are trained, never drawn: what starts at zero has left it.
    assert all(projection.weight.abs().max() > 1e-3 for projection in pipe.memory_adapter.proj_out)


def test_its_card_is_made_of_its_files() -> None:
    facts = json.loads((MIRAGE_TINY_FOLDER / card.FACTS).read_text(encoding="utf-8"))
    assert set(card.STAGES) <= {stage["run"] for stage in facts["stages"]}
    paths = sorted(MIRAGE_TINY_FOLDER.glob(card.EVALUATION.format(frames="*")))
    reports = sorted((json.loads(path.read_text(encoding="utf-8")) for path in paths), key=lambda one: one["frames"])
    assert (MIRAGE_TINY_FOLDER / card.CARD).read_text(encoding="utf-8") == card.format_card(facts, reports)


def test_it_finds_the_room_that_it_left(tmp_path: Path) -> None:
    # The loop of `mirage demo`: out and back. Without a memory it makes up another room.
    options = EvaluateOptions(tmp_path, MIRAGE_TINY, frames=97, steps=MIRAGE_TINY_STEPS)
    room, _, cameras = make_loop(10_000, options.frames, options.size, options.texture)
    true = room.render(cameras)
    figures = {}
    for name in ("none", "ours"):
        pipeline, weights = load_memory(options, name)
        assert (weights == OWN, pipeline.memory_adapter.config.control) == (
            (False, "rays") if name == "none" else (True, "memory")
        )
        frames, cost = generate_loop(options, pipeline, name, "head", room, true)
        figures[name] = summarise([measure(frames, true, options.chunk_frames)])
        assert (cost["tokens"] > 100) == (name == "ours")
        assert frames.std() > 0.05
    assert figures["ours"]["revisit_psnr"] >= figures["none"]["revisit_psnr"] + 4.0
    assert figures["ours"]["novel_psnr"] > figures["none"]["novel_psnr"]

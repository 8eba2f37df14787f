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
from mirage.training.release import CARD, FACTS, RESULTS, STAGES, format_card, load_evaluations
from mirage.zoo import MIRAGE_TINY, MIRAGE_TINY_FOLDER, MIRAGE_TINY_STEPS, mirage_tiny_pipeline


@pytest.mark.slow
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


@pytest.mark.slow
def test_its_card_is_made_of_its_results() -> None:
    results = Path(__file__).parents[3] / RESULTS
    facts = json.loads((results / FACTS).read_text(encoding="utf-8"))
    assert set(STAGES) <= {stage["run"] for stage in facts["stages"]}
    card = (MIRAGE_TINY_FOLDER / CARD).read_text(encoding="utf-8")
    assert card == format_card(facts, load_evaluations(results))


@pytest.mark.slow
def test_it_finds_the_room_that_it_left(tmp_path: Path) -> None:
    # The loop of `mirage demo`: out and back. Without a memory it makes up another room.
    options = EvaluateOptions(out=tmp_path, model=MIRAGE_TINY, frames=97, steps=MIRAGE_TINY_STEPS)
    room, _, cameras = make_loop(10_000, options.frames, options.size, options.texture)
    true = room.render(cameras)
    figures = {}
    for name in ("none", "aligned"):
        pipeline, weights = load_memory(options, name)
        assert (weights == OWN, pipeline.memory_adapter.config.control) == (
            (False, "rays") if name == "none" else (True, "memory")
        )
        frames, cost = generate_loop(options, pipeline, name, "head", room, true)
        figures[name] = summarise([measure(frames, true, options.chunk_frames)])
        assert (cost["tokens"] > 100) == (name == "aligned")
        assert frames.std() > 0.05
    assert figures["aligned"]["revisit_psnr"] >= figures["none"]["revisit_psnr"] + 4.0
    assert figures["aligned"]["novel_psnr"] > figures["none"]["novel_psnr"]

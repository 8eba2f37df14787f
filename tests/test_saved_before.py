"""What was saved at commit 0367533 loads for ever: caches, a pipeline, a run to resume, a training run to resume.

``behaviour/save.py`` made the files. On the processor and torch that they were made with, what comes of models is
the same bits; elsewhere it is close.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from behaviour import caches, names, save
from behaviour.record import machine
from safetensors.torch import load_file

SAVED = Path(__file__).parent / "data" / "v0367533"
EXPECTED: dict[str, Any] = json.loads((SAVED / save.EXPECTED).read_text())
HERE = EXPECTED["machine"] == machine()


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(SAVED, tmp_path / "saved"))


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found, expected) if HERE else torch.allclose(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", save.CACHES)
def test_a_cache_shows_what_it_showed(name: str) -> None:
    cache = names.LatentCache.load(SAVED / f"{name}.safetensors")
    assert {"tokens": len(cache), **caches.readings(cache)} == EXPECTED["caches"][name]


def test_a_pipeline_generates_what_it_generated(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the extra generate is not installed")
    assert same(save.generate(SAVED, tmp_path / "run", 2), load_file(SAVED / save.RESULTS)["latents"])


def test_a_run_is_resumed(folder: Path) -> None:
    pytest.importorskip("diffusers", reason="the extra generate is not installed")
    chunks = folder / save.RUN / "chunks"
    assert [path.name for path in chunks.iterdir()] == ["0000"]
    before = load_file(chunks / "0000" / "latents.safetensors")["latents"]
    latents = save.generate(folder, folder / save.RUN, 2)
    assert sorted(path.name for path in chunks.iterdir()) == ["0000", "0001"]
    assert torch.equal(latents[0, :, : len(before)].movedim(1, 0), before)  # read back, not made again
    assert same(latents, load_file(SAVED / save.RESULTS)["latents"])


def test_a_training_run_is_resumed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers", reason="the extra generate is not installed")
    pytest.importorskip("yaml", reason="the extra train is not installed")
    monkeypatch.chdir(folder)
    assert len((folder / save.TRAINING / "metrics.jsonl").read_text().splitlines()) == 2
    losses = save.train(Path(save.TRAINING), 3)
    assert losses[:2] == EXPECTED["losses"][:2]
    assert losses == EXPECTED["losses"] if HERE else losses == pytest.approx(EXPECTED["losses"], rel=1e-2)

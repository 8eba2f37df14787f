"""The demo's walk: the same room, cameras and noise with a memory and without, on a model of random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra generate is not installed")
pytest.importorskip("PIL", reason="the extra demo is not installed")

import generation
import PIL.Image

from mirage import zoo
from mirage.commands import cli
from mirage.commands.demo import memory, walk
from mirage.commands.demo.walk import WORLD_REPORT, WORLD_SHEET, WORLD_VIDEO, format_walk, run_walk
from mirage.media import load_video
from mirage.optional import MissingExtraError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    generation.make_pipeline(control_channels=49).save_pretrained(folder)
    other = generation.make_pipeline(control_channels=49, seed=5)
    other.memory_adapter.save_pretrained(folder / "memories" / "none" / "memory_adapter")
    return folder


@pytest.mark.slow
def test_a_walk_is_generated_with_a_memory_and_without(model: Path, tmp_path: Path, threads: Any) -> None:
    threads(1)
    report = run_walk(tmp_path, str(model), frames=89, steps=1, progress=False)
    assert json.loads((tmp_path / WORLD_REPORT).read_text()) == report
    assert report["loop"] == "walk-and-back" and report["tokens"] > 60
    assert all(0 < value < 60 for name in ("revisit_psnr", "novel_psnr") for value in report[name].values())
    assert report["revisit_psnr"]["none"] != report["revisit_psnr"]["aligned"]
    video = list(load_video(tmp_path / WORLD_VIDEO))
    assert len(video) == 89 and video[0].shape == (3, 28 + 192, 3 * 320)
    true, without, with_ = video[-1][:, 28:].split(320, 2)
    assert min((true - without).abs().mean(), (with_ - without).abs().mean()) > 0.005
    assert PIL.Image.open(tmp_path / WORLD_SHEET).width == 1600
    text = format_walk(report)
    assert f"{report['revisit_psnr']['aligned']:.1f} dB with its memory" in text and "89 generated frames" in text
    # A path that never comes back within reach has no revisits: it says so.
    assert "not measured" in format_walk(report | {"revisit_psnr": {"none": None, "aligned": None}})


def test_the_command_goes_on_to_it_where_the_model_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "run_demo", lambda *_: {"seconds": 1.0})
    monkeypatch.setattr("mirage.commands.demo.format_report", lambda _: "")
    made = {"model": "mirage-tiny", "loop": "around", "frames": 5, "tokens": 7, "memory_bytes": 1, "seconds": 1.0}
    made |= {name: {"none": 1.0, "aligned": 2.0} for name in ("revisit_psnr", "novel_psnr")}
    monkeypatch.setattr(walk, "run_walk", lambda *_, **__: made)
    monkeypatch.setattr(zoo, "MIRAGE_TINY_FOLDER", tmp_path)
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 0
    assert "`make tiny` and `make tiny-memories` train it" in capsys.readouterr().out
    shutil.copytree(model / "memories", tmp_path / "memories")
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 0
    assert "2.0 dB with its memory, 1.0 dB without" in capsys.readouterr().out

    def missing(*_: Any, **__: Any) -> None:
        raise MissingExtraError("install it")

    monkeypatch.setattr(walk, "run_walk", missing)
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 0
    assert "to see mirage-tiny generate a walk: install it" in capsys.readouterr().out
    assert torch.is_grad_enabled()

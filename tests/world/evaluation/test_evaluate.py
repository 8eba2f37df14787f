"""`mirage evaluate`: metrics against what is known by hand, and the whole command on random weights."""

from __future__ import annotations

import json
import math
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import generation
import numpy as np
import PIL.Image
import pytest
import torch
from skimage.metrics import structural_similarity

from mirage.commands import cli
from mirage.evaluation.closed_loop import measure, run_evaluate
from mirage.evaluation.loops import LOOPS, EvaluateOptions, make_loop
from mirage.evaluation.metrics import (
    LAG,
    MOST_PSNR,
    consistency,
    find_first_visits,
    find_revisits,
    load_lpips,
    psnr,
    ssim,
)
from mirage.evaluation.plots import save_line_chart
from mirage.evaluation.report import OWN, format_goals, goals, summarise
from mirage.media import load_video
from mirage.models.checkpoints import save_lora
from mirage.training.release import add_evaluation, write_card

SIZE = (64, 96)
QUICK = ["--frames", "17", "--chunk-frames", "5", "--size", "32x64", "--steps", "1", "--seeds", "10000:10002"]


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


# Metrics.


def test_psnr_and_ssim_are_those_of_others() -> None:
    generator = torch.Generator().manual_seed(0)
    left, noise = torch.rand(2, 3, 40, 50, generator=generator), torch.randn(2, 3, 40, 50, generator=generator)
    right = (left + torch.tensor([0.01, 0.2]).view(2, 1, 1, 1) * noise).clamp(0, 1)
    for i, value in enumerate(psnr(left, right).tolist()):
        assert value == pytest.approx(-10 * math.log10((left[i] - right[i]).square().mean()), abs=1e-4)
    for i, value in enumerate(ssim(left, right).tolist()):
        options: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        _, full = structural_similarity(
            left[i].numpy(), right[i].numpy(), channel_axis=0, data_range=1.0, full=True, **options
        )
        assert value == pytest.approx(float(np.mean(full[:, 5:-5, 5:-5])), abs=1e-4)
    assert psnr(left, left).tolist() == [MOST_PSNR] * 2 and ssim(left, left).tolist() == pytest.approx([1.0] * 2)


def test_lpips_is_measured_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lpips.py").write_text(
        "import torch\n"
        "class LPIPS(torch.nn.Module):\n"
        "    def __init__(self, net, verbose):\n"
        "        super().__init__()\n"
        "    def forward(self, left, right):\n"
        "        return (left - right).abs().mean((1, 2, 3), keepdim=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    distance = load_lpips()
    monkeypatch.delitem(sys.modules, "lpips")
    assert distance is not None
    left, right = torch.rand(9, 3, 8, 8), torch.rand(9, 3, 8, 8)  # in [0, 1], which it takes in [-1, 1]
    assert torch.allclose(distance(left, right), 2 * (left - right).abs().mean((1, 2, 3)))


def test_revisits_are_the_same_pose_far_enough_apart() -> None:
    _, kind, cameras = make_loop(10_000, 25, SIZE)
    assert kind == "walk-and-back"
    assert find_revisits(cameras, 17) == [(3, 21), (2, 22), (1, 23), (0, 24)][: len(find_revisits(cameras, 17))]
    assert len(find_revisits(cameras, 17)) == 4 and find_first_visits(cameras) == list(range(1, 13))
    _, kind, cameras = make_loop(10_003, 25, SIZE)
    assert kind == "laps" and find_revisits(cameras, 11) == [(i % 12, i) for i in range(12, 25)]
    assert {make_loop(10_000 + i, 5, SIZE)[1] for i in range(4)} == set(LOOPS)


def test_the_truth_agrees_with_its_own_geometry_and_a_shifted_video_does_not() -> None:
    room, _, cameras = make_loop(10_001, 2 * LAG + 1, SIZE)
    true = room.render(cameras)
    exact = consistency(true.images, true.images, true.depth, cameras)
    assert exact["photometric"] is not None and exact["photometric"] < 0.03
    assert exact["reprojection"] is not None and exact["reprojection"] < 0.3
    moved = true.images.clone()
    moved[LAG] = moved[LAG].roll(3, 2)  # three pixels to the right, in one frame of each pair
    wrong = consistency(moved, true.images, true.depth, cameras)
    assert wrong["reprojection"] is not None and 2.0 < wrong["reprojection"] < 4.5
    assert wrong["photometric"] is not None and wrong["photometric"] > 2 * exact["photometric"]
    flat = torch.full_like(true.images, 0.5)
    nothing = consistency(flat, true.images, true.depth, cameras)
    assert nothing["reprojection"] == 0.0 and nothing["photometric"] == pytest.approx(
        0.0, abs=1e-6
    )  # which is why they are read beside the PSNR
    assert consistency(true.images, flat, true.depth, cameras)["reprojection"] is None


def test_a_loop_is_measured_against_the_truth_and_against_itself() -> None:
    room, _, cameras = make_loop(10_000, 25, SIZE)
    true = room.render(cameras)
    frames = true.images.clone()
    frames[21:] = (frames[21:] + 0.1).clamp(0, 1)  # forgotten on the way back
    measured = measure(frames, true, chunk_frames=9)
    assert measured["chunks"] == [[0, 9], [9, 17], [17, 25]]
    assert measured["true"]["psnr"][:21] == [MOST_PSNR] * 21 and measured["true"]["psnr"][24] < 25
    assert all(value < 25 for value in measured["revisit"]["psnr"]) and len(measured["revisit"]["psnr"]) == 4
    figures = summarise([measured, measured])
    assert figures["novel_psnr"] == MOST_PSNR and figures["novel_psnr_stderr"] == 0.0
    assert figures["revisit_psnr"] == pytest.approx(sum(measured["revisit"]["psnr"]) / 4)
    assert figures["revisit_psnr_per_chunk"][:2] == [None, None] and figures["revisit_psnr_per_chunk"][2] < 25
    assert figures["true_psnr_per_chunk"][:2] == [MOST_PSNR] * 2 and figures["drift"] is None  # chunk 2 has no error
    assert figures["revisit_lpips"] is None
    frames[9:17] = (frames[9:17] + 0.1).clamp(0, 1)
    drift = summarise([measure(frames, true, chunk_frames=9)])["drift"]
    assert drift == pytest.approx(0.5, rel=0.2)  # half of the last chunk's frames are off


def test_goals_tell_what_was_met() -> None:
    ours = {"revisit_psnr": 25.0, "novel_psnr": 20.0, "drift": 1.2, "true_mse_per_chunk": [0.0] * 6}
    others = {"revisit_psnr": 20.0, "novel_psnr": 20.5}
    told = goals({"aligned": ours, "none": others, "pixel": others | {"revisit_psnr": 26.0}})
    assert [(goal["value"], goal["met"]) for goal in told] == [
        (5.0, True),
        (-1.0, False),
        (-0.5, False),
        (-0.5, False),
        (1.2, False),
    ]
    assert told[-1]["goal"] == "squared error of chunk 6 over that of chunk 2"
    own = {"aligned": ours, "none": others | {"weights": OWN}, "pixel": others | {"weights": "of its own"}}
    assert [goal["value"] for goal in goals(own)] == [5.0, -0.5, 1.2]
    assert goals({"aligned": ours})[0]["goal"].startswith("squared error") and not goals({"none": others})


@pytest.mark.slow
def test_a_chart_is_a_picture_with_its_names(tmp_path: Path) -> None:
    lines = {"aligned": {1.0: 20.0, 2.0: 21.5}, "none": {1.0: 20.0, 2.0: 20.0}, "": {}}
    for name in ("first.svg", "second.svg"):
        save_line_chart(tmp_path / name, "a < b", lines, "chunk", "dB")
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    root = xml.etree.ElementTree.parse(tmp_path / "first.svg").getroot()
    texts = [(element.text or "").strip() for element in root.iter() if element.tag.endswith("text")]
    assert {"a < b", "chunk", "dB", "aligned", "none"} <= set(texts)
    curves = [e for e in root.iter() if e.tag.endswith("path") and "#d95f02" in e.get("style", "")]
    assert any(" L " in " ".join(e.get("d", "").split()) for e in curves)
    save_line_chart(tmp_path / "empty.svg", "empty", {}, "x", "y")
    xml.etree.ElementTree.parse(tmp_path / "empty.svg")


# The command.


def run(*arguments: str | Path) -> int:
    return cli.main(["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, and weights of its own for the memory of pixels."""
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("model")
    generation.make_pipeline(control_channels=49).save_pretrained(folder / "model")
    other = generation.make_pipeline(control_channels=49, seed=5)
    other.memory_adapter.save_pretrained(folder / "pixel" / "memory_adapter")
    other.latent_depth.save_pretrained(folder / "pixel" / "latent_depth")
    other.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"]))
    save_lora(other.transformer, folder / "pixel" / "lora.safetensors")
    save_lora(other.transformer, folder / "model" / "lora.safetensors")
    return folder


@pytest.mark.slow
def test_the_command_films_measures_reports_and_goes_on(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked = ["--model", model / "model", "--weights", f"pixel={model / 'pixel'}", "--out", out, *QUICK]
    assert run(*asked, "--memory", "none,pixel", "--depth", "true") == 0
    report = json.loads((out / "report.json").read_text())
    assert list(report["memory"]) == ["none", "pixel"] and report["depth"] == "true" and report["rooms"] == 2
    for name, figures in report["memory"].items():
        assert 0 < figures["revisit_psnr"] <= MOST_PSNR and 0 < figures["novel_psnr"] <= MOST_PSNR
        assert len(figures["revisit_psnr_per_chunk"]) == 4 and figures["revisit_psnr_per_chunk"][0] is None
        assert figures["depth"] == ("unused" if name == "none" else "true")
    assert report["memory"]["none"]["tokens"] == 0 and report["memory"]["pixel"]["tokens"] > 8_000
    assert report["memory"]["pixel"]["weights"] == str(model / "pixel")
    assert report["memory"]["none"]["weights"] == "the model's own"
    assert report["ceiling"]["rooms"] == 2 and report["goals"] == {"true": []}
    table = (out / "report.md").read_text()
    assert "| pixel |" in table and "**none: run with the model's own weights" in table
    assert table in capsys.readouterr().out
    for name in ("true_psnr_true", "revisit_psnr_true"):
        xml.etree.ElementTree.parse(out / "plots" / f"{name}.svg")
    assert PIL.Image.open(out / "contact.png").width == 1600
    video = list(load_video(out / "side_by_side.mp4"))
    assert len(video) == 2 * 17 and video[0].shape == (3, 28 + 5 * 32, 3 * 5 * 64)

    # Goes on: what is there stays, what is missing is made, half a file is none.
    kept = out / "rooms" / "true" / "none" / "010000.json"
    before, gone = kept.stat().st_mtime_ns, out / "rooms" / "true" / "none" / "010001.json"
    made = gone.read_bytes()
    gone.unlink()
    assert run(*asked, "--memory", "none,aligned", "--depth", "true,head") == 0
    assert kept.stat().st_mtime_ns == before
    left, right = json.loads(made), json.loads(gone.read_bytes())
    assert left["true"] == right["true"] and left["revisit"] == right["revisit"]  # the same noise again
    report = json.loads((out / "report.json").read_text())
    assert set(report["memory_by_depth"]) == {"true", "head"} and report["memory"] == report["memory_by_depth"]["true"]
    assert report["memory_by_depth"]["head"]["aligned"]["depth"] == "head"
    assert report["memory_by_depth"]["head"]["none"] == report["memory_by_depth"]["true"]["none"]
    # Against weights that were not trained for it, a gain tells nothing.
    assert [goal["goal"] for goal in report["goals"]["head"]] == ["squared error of chunk 4 over that of chunk 2"]
    told = format_goals(report)
    count = len(report["goals"]["true"])
    assert [line.rsplit(" (", 1)[1] for line in told] == ["true depth)"] * count + ["the depth head's)"] * count > []
    assert all(": met" in line or ": missed" in line for line in told)
    (tmp_path / "training.json").write_text(json.dumps({"stages": [], "torch": "", "threads": 1, "machine": ""}))
    add_evaluation(tmp_path, report)
    write_card(tmp_path, tmp_path)
    rows = [line.split(" | ")[:3] for line in (tmp_path / "README.md").read_text().splitlines() if " | " in line]
    ours = f"{report['memory']['aligned']['revisit_psnr']:.2f}"
    names = [row[:2] for row in rows][-4:-1]
    assert names == [["| none (not steered)", "unused"], ["| aligned", "true"], ["| aligned", "head"]]
    assert rows[-3][2].startswith(ours) and rows[-1][0] == "| (the VAE alone)"

    # Not with other settings, nor with other weights.
    capsys.readouterr()
    assert run(*asked, "--steps", "2") == 2
    assert "steps was 1, got 2" in capsys.readouterr().err
    assert run(*asked, "--memory", "none", "--weights", f"none={model / 'pixel'}") == 2
    assert "made with other weights" in capsys.readouterr().err


@pytest.mark.slow
def test_what_the_command_refuses(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (
            ["--memory", "aligned,all"],
            "memory must be different ones of none, nearest, aligned, pixel, got aligned, all",
        ),
        (["--memory", "aligned,aligned"], "memory must be different ones"),
        (["--depth", "guess"], "depth must be different ones of true, head, got guess"),
        (["--seeds", "5:5"], "seeds must be FIRST:STOP"),
        (["--frames", "96"], "frames must be 4 n + 1"),
        (["--size", "60x96"], "size must be multiples of 32, got 60x96"),
        (["--texture", "2"], "texture must be in [0, 1], got 2"),
        (["--weights", f"aligned={tmp_path}"], "must hold memory_adapter, latent_depth or lora.safetensors"),
    ):
        assert (
            run("--model", model / "model", "--out", tmp_path / "out", *QUICK, "--memory", "aligned", *arguments) == 2
        )
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("report*"))
    with pytest.raises(ValueError, match="write-policy must be one of bounded, append, got 'keep'"):
        run_evaluate(EvaluateOptions(out=tmp_path, model=str(model / "model"), write_policy="keep"))
    with pytest.raises(SystemExit):
        run("--model", "tiny-random", "--seeds", "7")
    assert "must be FIRST:STOP such as 10000:10032, got '7'" in capsys.readouterr().err

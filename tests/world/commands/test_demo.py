"""`mirage demo` at its real size, its images, and the command line around it."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mirage_kernels
from mirage import LatentCache
from mirage.commands.cli import main
from mirage.commands.demo.walk import WORLD_REPORT, WORLD_SHEET, WORLD_VIDEO
from mirage.media import contact_sheet, heat_map, paint_holes, save_video
from mirage.scenes.patch_pca import PatchCodec
from mirage.scenes.rgbd import stereo_motorcycle

for module in ("skimage", "PIL", "imageio_ffmpeg", "tqdm"):
    pytest.importorskip(module)

FILES = ("contact.png", "loop.mp4", "cache.safetensors", "report.json")


def read_video(path: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """Frames (T, H, W, 3) float in [0, 255] and what the container says."""
    import imageio_ffmpeg

    meta, *frames = imageio_ffmpeg.read_frames(str(path))
    width, height = meta["size"]
    pixels = [torch.frombuffer(bytearray(frame), dtype=torch.uint8) for frame in frames]
    return torch.stack(pixels).reshape(-1, height, width, 3).float(), meta


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `mirage demo` wrote, run by a user in a process of its own."""
    out = tmp_path_factory.mktemp("demo") / "not" / "there yet"
    command = [sys.executable, "-m", "mirage", "demo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "1,416 tokens" in done.stdout and "its end equals its start" in done.stdout, done.stdout
    assert str(out) in done.stdout and all(name in done.stdout for name in FILES)
    return out


@pytest.fixture(scope="module")
def report(demo: Path) -> dict[str, Any]:
    return json.loads((demo / "report.json").read_text())


@pytest.mark.slow
def test_files_and_no_leftovers(demo: Path):
    generated = (WORLD_REPORT, WORLD_SHEET, WORLD_VIDEO) if importlib.util.find_spec("diffusers") else ()
    assert sorted(path.name for path in demo.iterdir()) == sorted([*FILES, *generated])


@pytest.mark.slow
def test_report_figures(report: dict[str, Any]):
    assert report["written_frames"] == report["held_out_frames"] == 1
    assert report["image_size"] == [496, 736] and report["grid_size"] == [31, 46]
    assert report["tokens"] == 1416 and report["cache_dtype"] == "bfloat16"
    assert report["coverage"] > 0.85
    assert report["readout_error"] < 0.35  # zeros give 1, the wrong half of the tokens more
    assert 16 < report["psnr_db"] < report["codec_psnr_db"] and report["codec_psnr_db"] > 26
    assert report["cloud_bytes"] == 24 * report["cloud_points"] and report["memory_ratio"] > 30
    assert report["memory_ratio_uint8"] == pytest.approx(report["memory_ratio"] * 15 / 24)
    assert 0 < report["read_ms"] < report["rasterise_ms"]
    assert report["loop_closes"] is True and report["loop_coverage_min"] > 0.8
    assert report["torch"] == torch.__version__ and report["device"] == "cpu" and report["seconds"] > 0
    assert report["backend"] in ("cpu", "reference")
    assert report["mirage_kernels"] == mirage_kernels.__version__


@pytest.mark.slow
def test_saved_cache_gives_the_reported_figures(demo: Path, report: dict[str, Any]):
    """Readout error and coverage computed again, from the file, with sums of their own."""
    cache, frames = LatentCache.load(demo / "cache.safetensors"), stereo_motorcycle()
    assert len(cache) == report["tokens"] and cache.nbytes == report["cache_bytes"]
    codec = PatchCodec.fit(frames.images[:1])
    truth = codec.encode(frames.images[1:])[0]
    readout = cache.read(frames.cameras[1], size=(31, 46))
    covered = readout.mask[0]
    error = (readout.latents[0].float() - truth)[:, covered].square().sum() / truth[:, covered].square().sum()
    assert error.item() == pytest.approx(report["readout_error"], rel=1e-4)
    assert covered.float().mean().item() == pytest.approx(report["coverage"], rel=1e-6)

    written = LatentCache(channels=48, dtype=torch.bfloat16)
    written.write(codec.encode(frames.images[:1]), frames.depth[:1], frames.cameras[:1])
    views = [memory.read(frames.cameras, size=(31, 46)) for memory in (written, cache)]
    for mine, theirs in zip(*views, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_loop_video(demo: Path, report: dict[str, Any]):
    frames, meta = read_video(demo / "loop.mp4")
    assert frames.shape == (report["loop_frames"], 496, 736, 3) and report["loop_frames"] == 60
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p") and meta["fps"] == 24
    ends, middle = (frames[0] - frames[-1]).abs().mean(), (frames[0] - frames[30]).abs().mean()
    assert ends < 2.0 < 5.0 < middle  # grey levels; before compression they are equal bit for bit
    shown = stereo_motorcycle().images[0].permute(1, 2, 0) * 255
    assert (frames[0] - shown).abs().mean() < 10  # the loop starts at the view that was written


@pytest.mark.slow
def test_contact_sheet_is_an_image(demo: Path):
    from PIL import Image

    with Image.open(demo / "contact.png") as sheet:
        assert sheet.mode == "RGB" and sheet.width == 1600 and 1000 < sheet.height < 1400
        assert len(sheet.resize((160, 120)).getcolors(160 * 120)) > 1000  # not one flat colour


@pytest.mark.slow
def test_folder_of_frames(tmp_path: Path, shared_dir: Path, capsys: pytest.CaptureFixture[str]):
    """Ten frames of a real room: every other one written, the others held out."""
    room = shared_dir / "data" / "rgbd-room"
    (tmp_path / "room").mkdir()
    for path in [
        room / "intrinsics.txt",
        *(p for p in sorted(room.glob("frame-*")) if p.name < "frame-000050"),
    ]:
        (tmp_path / "room" / path.name).symlink_to(path)
    assert main(["demo", "--rgbd", str(tmp_path / "room"), "--out", str(tmp_path / "out")]) == 0
    assert "5 held-out views" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["written_frames"] == report["held_out_frames"] == 5 and report["loop_frames"] == 10
    assert report["image_size"] == [480, 640] and report["scene"] == "room"
    assert report["coverage"] > 0.6 and report["readout_error"] < 0.9 and report["loop_closes"] is True
    assert read_video(tmp_path / "out" / "loop.mp4")[0].shape == (10, 480, 640, 3)


# --------------------------------------------------------------------------------------------- command line


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with status 2."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert not captured.out and len(lines) == 1 and "Traceback" not in captured.err, captured
    return lines[0]


@pytest.mark.slow
def test_info(demo: Path, report: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    assert main(["info", str(demo / "cache.safetensors"), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["tokens"], info["channels"], info["dtype"], info["frames"]) == (1416, 48, "bfloat16", 1)
    assert info["bytes"] == report["cache_bytes"]
    assert info["file_bytes"] == (demo / "cache.safetensors").stat().st_size
    low, high = info["bounds"]
    assert 2.0 < low[2] < high[2] < 5.1 and all(a < b for a, b in zip(low, high, strict=True))
    assert main(["info", str(demo / "cache.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "1,416" in text and "bfloat16" in text


def test_info_of_an_empty_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    LatentCache(channels=3, dtype=torch.float32).save(tmp_path / "empty.safetensors")
    assert main(["info", str(tmp_path / "empty.safetensors"), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["tokens"] == info["frames"] == 0 and info["bounds"] is None
    assert main(["info", str(tmp_path / "empty.safetensors")]) == 0


def test_info_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "absent.safetensors" in fails(["info", str(tmp_path / "absent.safetensors")], capsys)
    (tmp_path / "note.safetensors").write_text("not a cache")
    assert "note.safetensors" in fails(["info", str(tmp_path / "note.safetensors")], capsys)


def test_demo_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    out = ["--out", str(tmp_path / "out")]
    assert "nowhere: no such folder" in fails(["demo", "--rgbd", str(tmp_path / "nowhere"), *out], capsys)
    (tmp_path / "bare").mkdir()
    assert "found none" in fails(["demo", "--rgbd", str(tmp_path / "bare"), *out], capsys)
    (tmp_path / "file").write_text("")
    assert "file" in fails(["demo", "--out", str(tmp_path / "file")], capsys)
    if not torch.cuda.is_available():
        assert "device cuda is not available" in fails(["demo", "--device", "cuda", *out], capsys)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    line = fails(["demo", *out], capsys)
    assert line.endswith('pip install "mirage-world[demo]"') and "imageio-ffmpeg" in line


@pytest.mark.slow
def test_views_that_share_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Poses that look away from each other, or depth that is all unknown, are told, not turned into NaN."""
    import numpy as np
    from PIL import Image

    def write(folder: Path, millimetres: int, away: bool) -> list[str]:
        folder.mkdir()
        np.savetxt(folder / "intrinsics.txt", [[50, 0, 24], [0, 50, 16], [0, 0, 1]])
        noise = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
        for i in range(2):
            Image.fromarray(noise[i]).save(folder / f"frame-{i:06d}.color.png")
            Image.fromarray(np.full((32, 48), millimetres, np.uint16)).save(folder / f"frame-{i:06d}.depth.png")
            np.savetxt(folder / f"frame-{i:06d}.pose.txt", np.diag([-1, 1, -1, 1]) if i and away else np.eye(4))
        return ["demo", "--rgbd", str(folder), "--out", str(tmp_path / "out")]

    assert "no token has a known depth" in fails_quietly(write(tmp_path / "flat", 0, False), capsys)
    assert "are the poses right?" in fails_quietly(write(tmp_path / "away", 1500, True), capsys)
    assert main(write(tmp_path / "fine", 1500, False)) == 0


def fails_quietly(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, under the remains of a progress bar, of a command that ends with status 2."""
    assert main(arguments) == 2
    return capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]


def test_version_and_usage(capsys: pytest.CaptureFixture[str]):
    for arguments, status in ((["--version"], 0), ([], 2), (["dream"], 2), (["demo", "--device", "tpu"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == status
    assert mirage_kernels.__version__ in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ images


def test_holes_are_painted_where_nothing_is_known():
    image = torch.full((3, 32, 48), 0.9)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    painted = paint_holes(image, mask)
    cells = painted.reshape(3, 2, 16, 3, 16).amax((0, 2, 4))
    assert torch.equal(cells > 0.5, mask)
    assert painted[:, :16, 16:32].unique().numel() == 2  # a checker: no flat colour of a decoded token


def test_heat_map_ends_and_direction():
    values = torch.tensor([[-5.0, 0.0, 10.0, 99.0]])
    up, down = heat_map(values, 0, 10, "inferno"), heat_map(values, 10, 0, "inferno")
    assert torch.equal(up[..., 0], up[..., 1]) and torch.equal(up[..., 2], up[..., 3])
    assert torch.equal(up, down.flip(-1))
    torch.testing.assert_close(up[:, 0, 3] * 255, torch.tensor([252.0, 255.0, 164.0]))
    assert heat_map(values, 3, 3, "viridis").isfinite().all()


def test_video_keeps_the_old_file_when_it_fails(tmp_path: Path):
    path = tmp_path / "loop.mp4"
    path.write_text("old")

    def breaks_off() -> Iterator[torch.Tensor]:
        yield torch.zeros(3, 32, 48)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        save_video(path, breaks_off(), 24)
    with pytest.raises(ValueError, match="at least one frame"):
        save_video(path, [], 24)
    with pytest.raises(ValueError, match=r"even sides, got \(3, 31, 48\)"):
        save_video(path, [torch.zeros(3, 31, 48)], 24)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    save_video(path, [torch.full((3, 32, 48), value) for value in (0.0, 0.5, 1.0)], 24)
    frames, _ = read_video(path)
    assert frames.mean((1, 2, 3)).tolist() == pytest.approx([0, 128, 255], abs=3)
    assert list(tmp_path.iterdir()) == [path]


def test_contact_sheet_of_anything():
    from mirage.media import Panel

    panel = Panel(torch.rand(3, 20, 30), "a", ("viridis", "1 m", "2 m"))
    sheet = contact_sheet("title", [], [[panel], [panel] * 4], width=400)
    assert sheet.width == 400 and math.isclose(sheet.height, 36 + 52 + 2 * 52 + 219 + 46 + 36, abs_tol=6)

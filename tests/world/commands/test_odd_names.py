"""Names of folders that ffmpeg, a listing or a drawing could take for something else, and commands that cannot run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mirage.commands import cli
from mirage.media import Panel, contact_sheet, join_videos, label, load_video, save_video
from mirage.zoo import tiny_random_pipeline

NAMES = [
    "a:b",
    "file:x",
    "http:x",
    "pipe:1",
    "concat:a",
    "data:x",
    "[glob]*?",
    "-y",
    "it's",
    "%d",
    "new\nline",
    "Output Video:",
    "\udcff",
]
ARGUMENTS = ["generate", "--model", "tiny-random", "--frames", "13", "--steps", "1", "--chunk-frames", "9"]
ARGUMENTS += ["--size", "64x96"]


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


def test_videos_in_folders_of_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    frames = [torch.full((3, 32, 48), level) for level in (0.2, 0.6, 0.8)]
    made = []
    for name in ["plain", *NAMES]:
        Path(name).mkdir()
        parts = [Path(name, "one.mp4"), Path(name, f"{name}.mp4")]
        save_video(parts[0], frames[:1], 24)
        save_video(parts[1], frames[1:], 24)
        join_videos(Path(name, "both.mp4"), parts)
        assert len(list(load_video(Path(name, "both.mp4")))) == 3
        assert sorted(path.name for path in Path(name).iterdir()) == sorted(["both.mp4", "one.mp4", f"{name}.mp4"])
        made.append([Path(name, file).read_bytes() for file in ("one.mp4", f"{name}.mp4", "both.mp4")])
    assert all(held == made[0] for held in made[1:])


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.mp4").write_bytes(b"nothing")
    for name in ("cut.mp4", "nowhere.mp4"):
        with pytest.raises(OSError, match=name) as caught:
            list(load_video(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["\n\n", "two\nlines", "half \ud83d", ""])
def test_any_text_can_be_drawn(text: str) -> None:
    image = torch.zeros(3, 32, 32)
    contact_sheet(text, [text], [[Panel(image, text)]], text)
    label(image, text)


@pytest.mark.slow
@pytest.mark.parametrize("relative", [True, False])
def test_runs_in_folders_of_odd_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = []
    for name in ["plain", *NAMES]:
        out = name if relative else str(tmp_path / name)
        assert cli.main([*ARGUMENTS, f"--out={out}"]) == 0, name
        if name.isprintable() or name.isascii():  # "\udcff" cannot be loaded from yet
            assert cli.main([*ARGUMENTS, f"--out={out}", "--resume"]) == 0, name
        files = ("video.mp4", "contact.png", "chunks/0001/latents.safetensors", "chunks/0001/segment.mp4")
        made.append([Path(name, file).read_bytes() for file in files])
    assert all(held == made[0] for held in made[1:])


@pytest.mark.slow
def test_a_prompt_of_two_lines_makes_a_video(tmp_path: Path) -> None:
    for number, prompt in enumerate(["\n\n", "a room\nwith a door"]):
        assert cli.main([*ARGUMENTS, "--out", str(tmp_path / str(number)), f"--prompt={prompt}"]) == 0


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must fail in one line."""
    assert cli.main(list(map(str, arguments))) == 2
    said = capsys.readouterr().err.strip()
    last = said.splitlines()[-1]  # behind what other packages warn of
    assert last.startswith(f"mirage {arguments[0]}: ") and len(last) > 20
    return last


@pytest.mark.parametrize("held", ["null", "[]", "{", "{}", '{"_class_name": 3}'])
def test_a_damaged_model_index_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], held: str
) -> None:
    (tmp_path / "model_index.json").write_text(held)
    assert "model" in refused(capsys, "generate", "--model", tmp_path, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "name, pickled",
    [
        ("text_encoder/model.safetensors", "pytorch_model.bin"),
        ("transformer/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    ],
)
def test_a_pickle_in_a_model_folder_is_not_executed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, pickled: str
) -> None:
    folder, executed = tmp_path / "model", tmp_path / "executed"
    tiny_random_pipeline().save_pretrained(folder)
    (folder / name).unlink()
    path = (folder / name).with_name(pickled)
    torch.save(Payload(executed), path)
    said = [refused(capsys, "generate", "--model", folder, "--out", tmp_path / "out")]
    for content in (pickle.dumps(Payload(executed)), b""):
        path.write_bytes(content)
        said.append(refused(capsys, "generate", "--model", folder, "--out", tmp_path / "out"))
    assert not executed.exists() and all("model" in line for line in said)


@pytest.mark.slow
def test_missing_packages_are_a_line(tmp_path: Path) -> None:
    """Every command without diffusers, and without what reads and writes images and videos."""
    (tmp_path / "file.yaml").write_text("stage: vae")
    commands = [
        ["generate", "--model", "tiny-random"],
        ["train", "file.yaml"],
        ["prepare", "file.yaml", "--out", "out"],
        ["evaluate", "--model", "tiny-random", "--out", "out"],
        ["worldscore", "--model", "tiny-random", "--dataset", "data", "--out", "out"],
    ]
    script = """
import json, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from mirage.commands import cli
for command in json.loads(sys.argv[2]):
    assert cli.main(command) == 2, command
"""
    for absent in ("diffusers,transformers,accelerate,peft", "PIL,imageio_ffmpeg,tqdm"):
        done = subprocess.run(
            [sys.executable, "-c", script, absent, json.dumps(commands)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(cli.__file__).parents[2]), *sys.path])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        lines = done.stderr.strip().splitlines()
        assert len(lines) == len(commands) and all(line.startswith("mirage ") for line in lines)
        assert sum(": pip install" in line for line in lines) >= 3

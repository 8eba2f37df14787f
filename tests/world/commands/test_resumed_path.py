"""The path of a run that `mirage generate` resumes: found beside the run, compared with what it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import generation
import pytest
import torch

from mirage.commands import cli, generate
from mirage.scenes.camera_files import load_npz


class Session:
    """What is asked of a session before a path is made."""

    def write_first_frame(self, camera: Any) -> torch.Tensor:
        return torch.full((64, 96), 3.0)


@pytest.fixture
def options(tmp_path: Path) -> generate.Options:
    """Of a run in whose folder there are a path and a chunk."""
    (tmp_path / "chunks" / "0000").mkdir(parents=True)
    _, options = cli.parse(["generate", "--model", "tiny-random", "--frames", "17", f"--out={tmp_path}", "--resume"])
    view = generation.cameras(1)
    start: Any = type("Start", (), {"camera": view, "image": type("Image", (), {"width": 96, "height": 64})})
    generate._make_cameras(options, start, Session())
    return options


def spoil(path: Path, how: str) -> None:
    held = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "a bit flipped":
        held[len(held) // 2] ^= 1
        path.write_bytes(held)
    else:
        path.write_bytes({"emptied": b"", "cut": held[: len(held) // 2], "junk": b"\xff\x00junk"}[how])


@pytest.mark.parametrize("name", ["trajectory.npz", "trajectory.json"])
@pytest.mark.parametrize("how", ["deleted", "a folder", "a bit flipped", "emptied", "cut", "junk"])
def test_a_damaged_path_is_named_with_what_can_be_done(options: generate.Options, name: str, how: str) -> None:
    assert len(generate._load_path(options)) == 17
    spoil(options.out / name, how)
    with pytest.raises(ValueError, match=rf"{name} is (damaged|missing).*put it back from a copy, or name a file"):
        generate._load_path(options)


def test_a_path_from_before_checksums_is_taken(options: generate.Options) -> None:
    (options.out / "trajectory.json").write_text(
        '{"trajectory": "orbit-and-back", "frames": 17, "fov": 60.0, "distance": null}'
    )
    expected = load_npz(options.out / "trajectory.npz")
    assert torch.equal(generate._load_path(options).cam2world, expected.cam2world)


def test_a_refused_command_says_one_line(
    options: generate.Options, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
    (options.out / "trajectory.npz").write_bytes(b"")
    assert cli.main(["generate", "--model", "tiny-random", "--frames", "17", f"--out={options.out}", "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mirage generate: ") and said.count("\n") == 1 and "trajectory.npz is damaged" in said

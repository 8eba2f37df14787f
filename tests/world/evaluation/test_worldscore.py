"""WorldScore's camera moves and folders, as its scripts read them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import generation
import numpy as np
import PIL.Image
import pytest
import torch

from mirage.commands import cli
from mirage.evaluation.worldscore import MOVES, describe_cameras, instance_folder, move_cameras, write_instance
from mirage.media import load_video
from mirage_kernels import Cameras

SIZE = (64, 96)
STATIC = {
    "visual_movement": "static",
    "visual_style": "photorealistic",
    "scene_type": "indoor",
    "image": "static/images/photorealistic/dining_spaces/007.png",
    "camera_path": ["move_left", "pan_right"],
    "prompt_list": ["a table", "a chair.", "a door"],
    "style": "A photograph.",
    "content_list": ["table"],
}
DYNAMIC = {
    "visual_movement": "dynamic",
    "visual_style": "stylized",
    "motion_type": "rigid",
    "image": "dynamic/images/stylized/000.png",
    "camera_path": ["fixed"],
    "prompt": "a rolling ball",
    "style": "A drawing",
    "masks": [],
    "objects": ["ball"],
}


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


def start() -> Cameras:
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    return Cameras([[500.0, 0.0, 48.0], [0.0, 500.0, 32.0], [0.0, 0.0, 1.0]], pose[None], SIZE)


@pytest.mark.parametrize(
    ("move", "centre", "ahead"),
    [
        ("push_in", (0.0, 2.0), (0.0, 1.0)),
        ("pull_out", (0.0, -2.0), (0.0, 1.0)),
        ("move_left", (-1.0, 0.0), (0.0, 1.0)),
        ("move_right", (1.0, 0.0), (0.0, 1.0)),
        ("pan_left", (0.0, 0.0), (-0.5, math.sqrt(0.75))),
        ("pan_right", (0.0, 0.0), (0.5, math.sqrt(0.75))),
        ("orbit_left", (-1.0, 2.0 - math.sqrt(3.0)), (0.5, math.sqrt(0.75))),
        ("orbit_right", (1.0, 2.0 - math.sqrt(3.0)), (-0.5, math.sqrt(0.75))),
        ("fixed", (0.0, 0.0), (0.0, 1.0)),
    ],
)
def test_where_a_move_ends(move: str, centre: tuple[float, float], ahead: tuple[float, float]) -> None:
    """Right and forward of the start, with moves 2 long."""
    cameras = move_cameras(start(), [move], 5, length=2.0)
    assert len(cameras) == 5 and torch.equal(cameras.cam2world[0], start().cam2world[0])
    moved = (cameras.centers[-1] - start().centers[0]).tolist()
    assert moved == pytest.approx([centre[0], 0.0, centre[1]])
    assert cameras.cam2world[-1, :3, 2].tolist() == pytest.approx([ahead[0], 0.0, ahead[1]])
    back = move_cameras(start(), [move], 9, length=2.0)  # as many frames as asked for, the same way
    assert torch.allclose(back.cam2world[::2], cameras.cam2world)


def test_moves_follow_one_another() -> None:
    cameras = move_cameras(start(), ["pan_right", "push_in"], 5)
    assert len(cameras) == 9
    way = cameras.centers[-1] - cameras.centers[4]
    assert torch.allclose(way, cameras.cam2world[4, :3, 2])  # forward is where it looks by then
    with pytest.raises(ValueError, match="moves must be of push_in, .*, got 'jump'"):
        move_cameras(start(), ["jump"], 5)
    with pytest.raises(ValueError, match="moves must be one or more"):
        move_cameras(start(), [], 5)
    assert len(MOVES) == 9


def test_cameras_are_told_in_the_scripts_axes() -> None:
    """The first is at the origin, with x and z of its own axes turned about; left is positive x."""
    told = describe_cameras(move_cameras(start(), ["move_left", "pan_left"], 5, length=2.0), 5, 2.0)
    assert told["focal_length"] == 500.0 and told["scale"] == 2.0
    assert len(told["cameras"]) == 3 and len(told["cameras_interp"]) == 9
    first, second, third = (np.array(matrix) for matrix in told["cameras"])
    assert np.allclose(first, np.diag([-1.0, 1.0, -1.0, 1.0]))
    assert np.allclose(second[:3, 3], [1.0, 0.0, 0.0]) and np.allclose(third[:3, 3], [1.0, 0.0, 0.0])
    assert np.allclose(-third[:3, 2], [0.5, 0.0, math.sqrt(0.75)])  # its backward axis; it looks ahead and to the left


def test_an_instance_has_what_the_scripts_look_for(tmp_path: Path) -> None:
    folder = tmp_path / instance_folder(STATIC)
    assert folder == tmp_path / "static/photorealistic/indoor/dining_spaces/007"
    assert instance_folder(DYNAMIC) == Path("dynamic/stylized/rigid/000")
    cameras = move_cameras(start(), STATIC["camera_path"], 5)  # type: ignore[arg-type]
    frames, image = torch.rand(9, 3, *SIZE), PIL.Image.new("RGB", (96, 64))
    folder.mkdir(parents=True)
    (folder / "frames").mkdir()
    (folder / "frames" / "999.png").touch()  # of an attempt that did not end
    write_instance(folder, STATIC, frames, cameras, 5, 1.0, image, 1.5)
    assert sorted(path.name for path in (folder / "frames").iterdir()) == [f"{i:03d}.png" for i in range(9)]
    kept = torch.from_numpy(np.array(PIL.Image.open(folder / "frames" / "003.png"))).permute(2, 0, 1) / 255
    assert (kept - frames[3]).abs().max() <= 0.5 / 255 + 1e-6
    assert len(list(load_video(folder / "videos" / "output.mp4"))) == 9
    described = json.loads((folder / "image_data.json").read_text())
    assert described["total_frames"] == 9 and described["num_scenes"] == 2
    assert described["anchor_frame_idx"] == [0, 4, 8] and described["content_list"] == ["table"]
    assert len(json.loads((folder / "camera_data.json").read_text())["cameras_interp"]) == 9
    assert PIL.Image.open(folder / "input_image.png").size == (96, 64) and "1.5" in (folder / "time.txt").read_text()
    with pytest.raises(ValueError, match="frames and cameras must be 9 for 2 moves, got 8 and 9"):
        write_instance(folder, STATIC, frames[:8], cameras, 5, 1.0, image, 1.5)
    with pytest.raises(ValueError, match="an instance must have the key 'motion_type'"):
        instance_folder({"visual_movement": "dynamic", "visual_style": "stylized", "image": "a.png"})


@pytest.mark.slow
def test_the_command_writes_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = tmp_path / "data"
    for instance in (STATIC, DYNAMIC):
        picture = dataset / str(instance["image"])
        picture.parent.mkdir(parents=True)
        pixels = (generation.texture(generation.cameras(9)[0])[0].permute(1, 2, 0) * 255).byte().numpy()
        PIL.Image.fromarray(pixels).save(picture)
        listing = dataset / str(instance["visual_movement"])
        (listing / f"{instance['visual_movement']}.json").write_text(json.dumps([instance]))
    asked = ["worldscore", "--model", "tiny-random", "--dataset", str(dataset), "--out", str(tmp_path / "out")]
    asked += ["--frames", "5", "--size", "64x96", "--steps", "1"]
    assert cli.main(asked) == 0
    folder = tmp_path / "out" / "worldscore_output" / instance_folder(STATIC)
    assert len(list((folder / "frames").iterdir())) == 9 and (folder / "image_data.json").exists()
    assert cli.main(asked) == 0
    assert "0 videos written" in capsys.readouterr().out.splitlines()[-1]
    assert cli.main([*asked, "--movement", "dynamic"]) == 0
    folder = tmp_path / "out" / "worldscore_output" / instance_folder(DYNAMIC)
    assert len(list((folder / "frames").iterdir())) == 5 and not (folder / "camera_data.json").exists()

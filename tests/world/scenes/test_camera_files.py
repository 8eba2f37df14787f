"""Camera files of other systems: the right path or a clear refusal, and no traceback from any content."""

from __future__ import annotations

import json
import logging
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mirage.evaluation.worldscore import describe_cameras
from mirage.scenes.camera_files import FORMATS, load_trajectory, save_npz, save_trajectory
from mirage_kernels import Cameras

NIGHTLY = bool(os.environ.get("MIRAGE_NIGHTLY"))
SIZE, COUNT = (64, 96), 12
LENS = np.array([[80.0, 0, 48], [0, 80, 32], [0, 0, 1]])


def make_poses() -> np.ndarray:
    """A walk along x, 0.1 a frame, that turns and rises."""
    poses = np.tile(np.eye(4), (COUNT, 1, 1))
    for i in range(COUNT):
        c, s = math.cos(0.05 * i), math.sin(0.05 * i)
        poses[i, :3] = [[c, 0, s, 0.1 * i], [0, 1, 0, -0.02 * i], [-s, 0, c, 0.01 * i]]
    return poses


POSES = make_poses()
W2C = np.linalg.inv(POSES)
OPENGL = POSES @ np.diag([1.0, -1, -1, 1])
SHUFFLED = [3, 0, 10, 1, 11, 5, 2, 6, 4, 9, 8, 7]
FOV = 2 * math.degrees(math.atan(48 / 80))
NERFSTUDIO = {"w": 96, "h": 64, "fl_x": 80.0, "fl_y": 80.0, "cx": 48.0, "cy": 32.0, "camera_model": "OPENCV"}


def quaternions(poses: np.ndarray) -> np.ndarray:
    """(N, 4), w first, of rotations about y."""
    angle = np.arctan2(poses[:, 0, 2], poses[:, 0, 0])
    return np.stack([np.cos(angle / 2), 0 * angle, np.sin(angle / 2), 0 * angle], 1)


def join(*numbers: Any) -> str:
    return " ".join(repr(float(x)) for part in numbers for x in np.ravel(part))


def frames(**more: Any) -> list[dict[str, Any]]:
    return [{"file_path": f"images/r_{i}.png", "transform_matrix": OPENGL[i].tolist(), **more} for i in SHUFFLED]


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def write_lines(path: Path, lines: list[str], end: str = "\n") -> Path:
    path.write_bytes((end.join(lines) + end).encode())
    return path


def realestate(i: int) -> str:
    return join(80 / 96, 80 / 64, 0.5, 0.5, 0, 0, W2C[i, :3])


def write_colmap(
    folder: Path, binary: bool = False, model: int = 1, parameters: tuple[float, ...] = (80, 80, 48, 32)
) -> Path:
    folder = folder / "sparse" / "0"
    folder.mkdir(parents=True)
    poses, turns = W2C[:, :3, 3], quaternions(W2C)
    if not binary:
        lines = ["# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME"]
        for number, i in enumerate(SHUFFLED):
            lines += [f"{number} {join(turns[i], poses[i])} 7 r {i}.png", "" if i % 2 else "1.5 2.5 -1 3.5 4.5 12"]
        write_lines(folder / "images.txt", lines)
        name = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "OPENCV_FISHEYE")[model]
        write_lines(folder / "cameras.txt", ["# cameras", f"7 {name} 96 64 {join(parameters)}"])
        return folder
    images = struct.pack("<Q", COUNT)
    for number, i in enumerate(SHUFFLED):
        images += struct.pack("<I7dI", number, *turns[i], *poses[i], 7) + f"r {i}.png".encode() + b"\0"
        images += struct.pack("<Q", i) + bytes(24 * i)
    (folder / "images.bin").write_bytes(images)
    camera = struct.pack("<QIiQQ", 1, 7, model, 96, 64) + struct.pack(f"<{len(parameters)}d", *parameters)
    (folder / "cameras.bin").write_bytes(camera)
    return folder


def write_worldscore(path: Path) -> Path:
    cameras = Cameras(LENS, POSES, SIZE)
    return write_json(path / "camera_data.json", describe_cameras(cameras, 4, 1.0))


def write_recammaster(path: Path) -> Path:
    """Unreal's axes, x forward, y right, z up, in centimetres, and by columns."""
    turn = np.array([[0.0, 0, 1, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    values = {}
    for i in SHUFFLED:
        matrix = turn @ POSES[i] @ np.linalg.inv(turn)
        matrix[:3, 3] *= 100
        values[f"frame{i}"] = {"cam01": "".join(f"[{join(row)}] " for row in matrix.T)}
    return write_json(path / "camera_extrinsics.json", values)


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path / "cameras.npz", **arrays)
    return path / "cameras.npz"


GIVEN: dict[str, Any] = {"image_size": SIZE, "fov": FOV}
SAMPLES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "realestate10k": (
        lambda p: write_lines(p / "a.txt", ["https://x", *(f"{i} {realestate(i)}" for i in range(COUNT))]),
        {"image_size": SIZE},
    ),
    "videox": (
        lambda p: write_lines(p / "a.txt", ["", *(f"{realestate(i)}  " for i in range(COUNT))], "\r\n"),
        {"image_size": SIZE},
    ),
    "no header": (
        lambda p: write_lines(p / "a.txt", [f"0 {realestate(i)}" for i in range(COUNT)]),
        {"image_size": SIZE},
    ),
    "a sentence": (
        lambda p: write_lines(p / "a.txt", ["\ufeffmy camera path", *(f"0 {realestate(i)}" for i in range(COUNT))]),
        {"image_size": SIZE},
    ),
    "commas": (
        lambda p: write_lines(p / "a.txt", [f"0,{realestate(i).replace(' ', ', ')}" for i in range(COUNT)]),
        {"image_size": SIZE},
    ),
    "colmap text": (write_colmap, {}),
    "colmap binary": (lambda p: write_colmap(p, True), {}),
    "colmap folder": (lambda p: write_colmap(p, True, 4, (80, 80, 48, 32, 0, 0, 0, 0)).parents[1], {}),
    "colmap file": (lambda p: write_colmap(p, False, 2, (80, 48, 32, 0)) / "images.txt", {}),
    "tum": (
        lambda p: write_lines(
            p / "a.txt",
            ["# time", *(f"{i}.5 {join(POSES[i, :3, 3], quaternions(POSES)[i, [1, 2, 3, 0]])}" for i in SHUFFLED)],
        ),
        GIVEN,
    ),
    "kitti": (lambda p: write_lines(p / "00.txt", [join(pose[:3]) for pose in POSES]), GIVEN),
    "replica": (lambda p: write_lines(p / "traj.txt", [join(pose) for pose in POSES]), GIVEN),
    "blocks": (lambda p: write_lines(p / "a.txt", [join(row) for pose in POSES for row in pose]), GIVEN),
    "list": (lambda p: write_json(p / "a.json", POSES.tolist()), GIVEN),
    "flat list, w2c, opengl": (
        lambda p: write_json(p / "a.json", np.linalg.inv(OPENGL)[:, :3].reshape(-1, 12).tolist()),
        GIVEN | {"poses": "world2cam", "convention": "opengl"},
    ),
    "npy": (
        lambda p: (np.save(p / "a.npy", POSES), p / "a.npy")[1],
        {"file_size": SIZE, "intrinsics": [80, 80, 47.5, 31.5], "pixel_centers": "integer"},
    ),
    "nerfstudio": (lambda p: write_json(p / "transforms.json", NERFSTUDIO | {"frames": frames()}), {}),
    "nerfstudio folder": (lambda p: write_json(p / "transforms.json", NERFSTUDIO | {"frames": frames()}).parent, {}),
    "nerfstudio, angle": (
        lambda p: write_json(p / "a.json", {"camera_angle_x": math.radians(FOV), "frames": frames(rotation=0.01)}),
        {"image_size": SIZE},
    ),
    "nerfstudio, fov": (lambda p: write_json(p / "a.json", {"x_fov": FOV, "w": 96, "h": 64, "frames": frames()}), {}),
    "nerfstudio, by frame": (lambda p: write_json(p / "a.json", {"frames": frames(**NERFSTUDIO)}), {}),
    "nerfstudio path": (
        lambda p: write_json(
            p / "a.json",
            {
                "camera_path": [
                    {
                        "camera_to_world": m.flatten().tolist(),
                        "fov": 2 * math.degrees(math.atan(32 / 80)),
                        "aspect": 1.5,
                    }
                    for m in OPENGL
                ],
                "render_height": 64,
                "render_width": 96,
            },
        ),
        {},
    ),
    "nerfstudio export": (
        lambda p: write_json(
            p / "a.json", [{"file_path": f"r_{i}", "transform": OPENGL[i, :3].tolist()} for i in SHUFFLED]
        ),
        GIVEN,
    ),
    "3dgs": (
        lambda p: write_json(
            p / "cameras.json",
            [
                {
                    "id": i,
                    "img_name": f"r_{i}",
                    "width": 96,
                    "height": 64,
                    "fx": 80,
                    "fy": 80.0,
                    "rotation": POSES[i, :3, :3].tolist(),
                    "position": POSES[i, :3, 3].tolist(),
                }
                for i in SHUFFLED
            ],
        ),
        {},
    ),
    "recammaster": (write_recammaster, GIVEN),
    "worldplay": (
        lambda p: write_json(
            p / "a.json", {str(i): {"extrinsic": POSES[i].tolist(), "K": LENS.tolist()} for i in SHUFFLED}
        ),
        {},
    ),
    "worldscore": (write_worldscore, {"file_size": SIZE}),
    "vggt": (
        lambda p: write_npz(
            p,
            extrinsic=W2C[:, :3].astype("f4"),
            intrinsic=np.tile(LENS, (COUNT, 1, 1)).astype("f4"),
            depth=np.ones((COUNT, *SIZE, 1), "f4"),
        ),
        {},
    ),
    "gen3c": (lambda p: write_npz(p, w2c=W2C[None], intrinsics=LENS), {"file_size": SIZE}),
    "normalised": (
        lambda p: write_npz(p, c2w=POSES, K=[80 / 96, 80 / 64, 0.5, 0.5], image_size=SIZE),
        {"normalized": True},
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_formats_of_others(tmp_path: Path, name: str) -> None:
    """One path, written in every format: the same cameras come out, in order."""
    write, given = SAMPLES[name]
    cameras = load_trajectory(write(tmp_path), **given)
    assert cameras.image_size == SIZE and len(cameras) == COUNT
    turned = torch.from_numpy(POSES)
    if name in ("worldscore",):  # its world is that of the first camera, which looks along z as ours does
        turned = torch.linalg.inv(turned[0]) @ turned
    torch.testing.assert_close(cameras.cam2world, turned, rtol=0, atol=1e-6 if name == "vggt" else 1e-12)
    torch.testing.assert_close(cameras.intrinsics[3], torch.from_numpy(LENS), rtol=1e-12, atol=1e-12)
    assert load_trajectory(write_again(tmp_path, write), **{**given, "image_size": (32, 48)}).image_size == (32, 48)


def write_again(folder: Path, write: Callable[[Path], Path]) -> Path:
    (folder / "again").mkdir()
    return write(folder / "again")


@pytest.mark.parametrize(
    ("size", "lens"),
    [
        ((720, 1280), (608, 608, 640, 360)),  # the video's own aspect
        ((512, 512), (432.355, 432.355, 256, 256)),  # its height is seen, and the middle of its width
        ((1280, 720), (1080.889, 1080.889, 360, 640)),
        ((480, 1280), (608, 608, 640, 240)),  # its width is seen
    ],
)
def test_realestate10k_images_of_another_aspect_are_centre_crops(tmp_path: Path, caplog, size, lens) -> None:
    row = join(0.475, 0.475 * 16 / 9, 0.5, 0.5, 0, 0, np.eye(4)[:3])
    path = write_lines(tmp_path / "pose.txt", ["https://example.org/watch?v=x ", f"157323991 {row}  "], "\r\n")
    k = load_trajectory(path, size).intrinsics[0]
    assert [k[0, 0].item(), k[1, 1].item(), k[0, 2].item(), k[1, 2].item()] == pytest.approx(lens, rel=1e-5)
    assert ("centre crop" in caplog.text) == (size != (720, 1280))
    stretched = load_trajectory(path, size, square_pixels=False).intrinsics[0]
    assert stretched[0, 0].item() == pytest.approx(0.475 * size[1])
    assert stretched[1, 1].item() == pytest.approx(0.475 * 16 / 9 * size[0])


def test_frames_marked_bad_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed = frames()
    listed[SHUFFLED.index(4)]["is_bad"] = True
    with caplog.at_level(logging.WARNING):
        cameras = load_trajectory(write_json(tmp_path / "a.json", NERFSTUDIO | {"frames": listed}))
    assert cameras.centers[:, 0].tolist() == pytest.approx([0.1 * i for i in range(COUNT) if i != 4])
    assert "1 of 12 frames are marked is_bad" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_fisheye": True}, "expected a pinhole camera .*ignore_lens=True.*, got is_fisheye"),
        (
            {"camera_model": "OPENCV_FISHEYE", "k1": 0.03},
            "expected a pinhole camera .*, got camera_model 'OPENCV_FISHEYE'",
        ),
        ({"k1": -3e-4}, r"expected no distortion .*ignore_lens=True for a path\), got {'k1': -0.0003}"),
    ],
)
def test_lenses_are_refused_unless_ignored(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_json(tmp_path / "a.json", NERFSTUDIO | change | {"frames": frames()})
    with pytest.raises(ValueError, match=message):
        load_trajectory(path)
    expected = torch.from_numpy(POSES)
    torch.testing.assert_close(load_trajectory(path, ignore_lens=True).cam2world, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("binary", [False, True])
def test_colmap_lenses_are_refused_unless_ignored(tmp_path: Path, binary: bool) -> None:
    for i, (model, more, message) in enumerate(
        ((4, (0.1, 0, 0, 0), "no distortion .*OPENCV"), (5, (0, 0, 0, 0), "a pinhole .*FISHEYE"))
    ):
        path = write_colmap(tmp_path / str(i), binary, model, (80, 80, 48, 32, *more))
        with pytest.raises(ValueError, match=rf"cameras.(bin|txt), (camera 0|line 2): expected {message}"):
            load_trajectory(path)
        assert len(load_trajectory(path, ignore_lens=True)) == COUNT


def test_sizes_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    big = np.array([[969.69, 0, 960.0], [0, 969.69, 540.0], [0, 0, 1]])
    for lens, size, message in (
        (big, (1920, 1080), r"view 0: intrinsics\[0\] must be of image_size 1920x1080 .*, not \(width, height\)"),
        (big / [[1920.0], [1080], [1]], (1080, 1920), "must be in pixels .* normalized=True"),
    ):
        with pytest.raises(ValueError, match=message):
            load_trajectory(
                write_npz(tmp_path, cam2world=POSES, intrinsics=np.tile(lens, (COUNT, 1, 1)), image_size=size)
            )
    path = write_npz(tmp_path, cam2world=POSES, intrinsics=big, image_size=(1080, 1920))
    with pytest.raises(
        ValueError, match="image_size must be of the aspect of the file's cameras, 1080x1920 .*got 512x512"
    ):
        load_trajectory(path, (512, 512))
    assert load_trajectory(path, (512, 512), square_pixels=False).image_size == (512, 512)
    mixed = NERFSTUDIO | {
        "frames": [frame | ({"w": 64, "h": 96} if i == 5 else {}) for i, frame in enumerate(frames())]
    }
    with pytest.raises(ValueError, match=r"frames\[5\]: expected images of one aspect, 64x96 as before .*, got 96x64"):
        load_trajectory(write_json(tmp_path / "a.json", mixed))


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_unusual_cameras_are_read_back(tmp_path: Path, suffix: str) -> None:
    """Pixels far from square and crops, where they were accepted once."""
    lens = np.array([[80.0, 0, -20], [0, 120, 32], [0, 0, 1]])
    cameras = Cameras(lens, POSES, SIZE, square_pixels=False, off_center=True)
    save_trajectory(tmp_path / f"a{suffix}", cameras)
    assert torch.equal(load_trajectory(tmp_path / f"a{suffix}").intrinsics, cameras.intrinsics)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("tum", {"image_size": SIZE}, r"fov \(horizontal, in degrees\) or intrinsics must be given"),
        ("kitti", {"fov": 60}, r"image_size must be \(height, width\) as the file has none"),
        ("nerfstudio", {"fov": 60}, "fov and intrinsics must not be given: the file has its own"),
        ("nerfstudio", {"convention": "opengl"}, "nerfstudio: convention must not be given: the format says it"),
        ("gen3c", {}, r"file_size must be the \(height, width\) that intrinsics are in pixels of"),
        ("gen3c", {"poses": "cam2world", "file_size": SIZE}, "poses must not be 'cam2world': w2c says"),
        ("worldscore", {}, r"file_size must be the \(height, width\) of the frames"),
        ("recammaster", GIVEN | {"camera": "cam02"}, "camera must be one of cam01, got 'cam02'"),
        ("kitti", GIVEN | {"format": "tum"}, "no cameras in a format that is known. tum: line 1 has 12 columns, not 8"),
        ("kitti", GIVEN | {"format": "nerf"}, "format must be one of colmap, realestate10k, .*, got 'nerf'"),
    ],
)
def test_what_a_file_needs_is_named(tmp_path: Path, name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_trajectory(SAMPLES[name][0](tmp_path), **given)


@pytest.mark.parametrize(
    ("name", "content", "tried"),
    [
        (
            "a.txt",
            "0 2 3 5 8 10\n0 10 20 30 30 30\n",
            ("realestate10k", "tum", "kitti", "replica", "matrices", "colmap"),
        ),
        (
            "a.json",
            '{"w": 3}',
            ("nerfstudio", "nerfstudio-path", "3dgs", "recammaster", "worldplay", "worldscore", "matrices"),
        ),
    ],
)
def test_an_unknown_file_names_what_was_tried(tmp_path: Path, name: str, content: str, tried: tuple[str, ...]) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: no cameras in a format that is known") as caught:
        load_trajectory(tmp_path / name, **GIVEN)
    assert set(tried) <= set(FORMATS) and all(f"{one}: " in str(caught.value) for one in tried)


def test_declared_sizes_are_checked_before_anything_is_allocated(tmp_path: Path) -> None:
    folder = write_colmap(tmp_path, True)
    for name in ("images.bin", "cameras.bin"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(struct.pack("<Q", 2**60) + whole[8:])
        with pytest.raises(ValueError, match=rf"{name}: expected 1152921504606846976 .*, got \d+ bytes that are left"):
            load_trajectory(folder)
        (folder / name).write_bytes(whole)
    path = tmp_path / "a.npy"
    np.save(path, POSES)
    path.write_bytes(path.read_bytes().replace(b"(12, 4, 4)", b"(9999999, 4, 4)", 1))
    with pytest.raises(ValueError, match="a.npy: expected an .npy of poses, got: "):
        load_trajectory(path, **GIVEN)


def spoil(rng: np.random.Generator, content: bytes) -> bytes:
    """Cut, flip, repeat or exchange bytes, or put a hostile token in the place of a number."""
    tokens = (
        b"NaN",
        b"1e999",
        b"-1",
        b"0",
        b"null",
        b"[]",
        b"{}",
        b'"x"',
        b"9" * 5000,
        b"true",
        b"[" * 3000,
        b"\xff",
        b"",
    )
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(changed) + 1))
        kind = rng.integers(5)
        if kind == 0:
            del changed[at:]
        elif kind == 1:
            changed[at : at + 1] = bytes([int(rng.integers(256))])
        elif kind == 2:
            changed[at:at] = changed[at : at + int(rng.integers(1, 40))]
        elif kind == 3:
            changed[at : at + 8] = struct.pack("<Q", 2 ** int(rng.integers(64)))
        else:
            end = next((i for i in range(at, min(at + 40, len(changed))) if changed[i] in b" ,]}\n"), at)
            begin = next((i for i in range(at, max(at - 40, 0), -1) if changed[i - 1] in b" ,[:\n"), at)
            changed[begin : max(end, begin)] = tokens[int(rng.integers(len(tokens)))]
    return bytes(changed)


@pytest.mark.parametrize("name", SAMPLES)
def test_no_content_gives_a_traceback(tmp_path: Path, name: str) -> None:
    """A ValueError or an OSError with the file's name, or cameras."""
    write, given = SAMPLES[name]
    path = write(tmp_path)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    contents = {file: file.read_bytes() for file in files}
    rng = np.random.default_rng(sorted(SAMPLES).index(name))
    refused = 0
    for _ in range(1000 if NIGHTLY else 12):
        file = files[int(rng.integers(len(files)))]
        file.write_bytes(spoil(rng, contents[file]))
        try:
            assert isinstance(load_trajectory(path, **given), Cameras)
        except (ValueError, OSError) as error:
            refused += 1
            assert any(part.name in str(error) for part in (path, *files)), error
        file.write_bytes(contents[file])
    assert refused
    assert len(load_trajectory(path, **given)) == COUNT


def test_a_folder_of_two_formats_must_be_told(tmp_path: Path) -> None:
    write_colmap(tmp_path)
    write_json(tmp_path / "transforms.json", NERFSTUDIO | {"frames": frames()})
    with pytest.raises(ValueError, match="format must be given: the folder holds transforms.json and a COLMAP model"):
        load_trajectory(tmp_path)
    for name in ("colmap", "nerfstudio"):
        assert len(load_trajectory(tmp_path, format=name)) == COUNT


def test_pickles_are_not_read(tmp_path: Path) -> None:
    objects = np.array([POSES, None], dtype=object)
    path = write_npz(tmp_path, cam2world=objects, intrinsics=LENS, image_size=SIZE)
    with pytest.raises(ValueError, match="expected an .npz of plain arrays, got: Object arrays cannot be loaded"):
        load_trajectory(path)
    save_npz(path, Cameras(LENS, POSES, SIZE))
    assert len(load_trajectory(path)) == COUNT

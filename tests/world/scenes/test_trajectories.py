"""Trajectories: files round-trip and complain clearly, generated paths go where they say and close."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirage.scenes.camera_files import (
    load_nerfstudio,
    load_npz,
    load_realestate10k,
    load_trajectory,
    save_nerfstudio,
    save_npz,
    save_realestate10k,
    save_trajectory,
)
from mirage.scenes.trajectories import TRAJECTORIES, dolly, make_trajectory, orbit, out_and_back, pan, spiral
from mirage_kernels.cameras import Cameras

SIZE = (480, 640)
REAL_FILES = ("0bf152ef84195293", "0c11dbe781b1c11c", "2c80f9eb0d3b2bb4", "4a2d6753676df096")


def make(views: int, seed: int = 0, shared: bool = False) -> Cameras:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(views, 3, 3, dtype=torch.float64, generator=generator))
    intrinsics = torch.eye(3, dtype=torch.float64).repeat(views, 1, 1)
    focal = torch.rand(views, 2, dtype=torch.float64, generator=generator)
    intrinsics[:, 0, 0] = 400 * (1 + focal[:, 0])
    intrinsics[:, 1, 1] = intrinsics[:, 0, 0] * (1 + 0.009 * focal[:, 1])
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = 321.1, 233.3
    if shared:
        intrinsics[:] = intrinsics[:1].clone()
    cam2world = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    cam2world[:, :3, :3] = q * torch.linalg.det(q).sign()[:, None, None]
    cam2world[:, :3, 3] = 5 * torch.randn(views, 3, dtype=torch.float64, generator=generator)
    return Cameras(intrinsics, cam2world, SIZE)


def assert_close(got: Cameras, expected: Cameras, tolerance: float = 1e-12) -> None:
    assert got.image_size == expected.image_size
    torch.testing.assert_close(got.cam2world, expected.cam2world, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.intrinsics, expected.intrinsics, rtol=tolerance, atol=tolerance)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Unlike `torch.equal`, tells -0 from 0."""
    return torch.equal(a.contiguous().view(torch.int64), b.contiguous().view(torch.int64))


def in_start_axes(path: Cameras) -> torch.Tensor:
    """(T, 4, 4) poses relative to the first."""
    return torch.linalg.inv(path.cam2world[0]) @ path.cam2world


# ----------------------------------------------------------------------------------------- files: round trips


@pytest.mark.parametrize("views", [0, 1, 7])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("suffix", [".txt", ".json", ".npz", ".JSON"])
def test_round_trip(tmp_path: Path, suffix: str, shared: bool, views: int) -> None:
    cameras, path = make(views, shared=shared), tmp_path / f"path{suffix}"
    save_trajectory(path, cameras)
    loaded = load_trajectory(str(path), SIZE)
    assert len(loaded) == views
    assert_close(loaded, cameras)
    if suffix != ".txt":
        assert same_bits(load_trajectory(path).cam2world, cameras.cam2world)
        assert same_bits(load_trajectory(path).intrinsics, cameras.intrinsics)
    small = load_trajectory(path, (60, 80))
    assert_close(small, cameras.resized((60, 80)))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # no drafts left behind


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)))
def test_realestate10k_keeps_twelve_digits(
    tmp_path_factory: pytest.TempPathFactory, seed: int, size: tuple[int, int]
) -> None:
    path = tmp_path_factory.mktemp("realestate") / "path.txt"
    cameras = make(3, seed).resized(size)
    save_realestate10k(path, cameras)
    assert_close(load_realestate10k(path, size, square_pixels=False), cameras)


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_files(shared_dir: Path, tmp_path: Path, name: str) -> None:
    source = shared_dir / "data" / "trajectories" / f"{name}.txt"
    table = np.loadtxt(source, skiprows=1)
    cameras = load_trajectory(source, (360, 640))
    assert len(cameras) == len(table) == 16 and cameras.image_size == (360, 640)
    rows = np.tile([0.0, 0.0, 0.0, 1.0], (16, 1, 1))
    world2cam = torch.from_numpy(np.concatenate([table[:, 7:].reshape(16, 3, 4), rows], axis=1))
    eye = torch.eye(4, dtype=torch.float64).expand(16, 4, 4)
    torch.testing.assert_close(cameras.cam2world @ world2cam, eye, rtol=0, atol=1e-12)
    for column, (i, j), scale in ((1, (0, 0), 640), (2, (1, 1), 360), (3, (0, 2), 640), (4, (1, 2), 360)):
        expected = torch.from_numpy(table[:, column]) * scale
        torch.testing.assert_close(cameras.intrinsics[:, i, j], expected, rtol=1e-15, atol=0)

    url = source.read_text().split("\n")[0]
    copy = tmp_path / "copy.txt"
    save_realestate10k(copy, cameras, [int(t) for t in table[:, 0]], url)
    assert copy.read_text().split("\n")[0] == url
    np.testing.assert_allclose(np.loadtxt(copy, skiprows=1), table, rtol=1e-12, atol=1e-12)
    for suffix in (".json", ".npz"):
        save_trajectory(tmp_path / f"copy{suffix}", cameras)
        assert_close(load_trajectory(tmp_path / f"copy{suffix}"), cameras, 0)


def test_realestate10k_layout(tmp_path: Path) -> None:
    """Written out by hand: a camera at (1, 2, 3) that looks along world x, with world z down."""
    path = tmp_path / "path.txt"
    world2cam = ["0", "-1", "0", "2", "0", "0", "-1", "3", "1", "0", "0", "-1"]
    columns = ["17", "0.5", "0.75", "0.25", "0.5", "0", "0", *world2cam]
    path.write_text("https://example.org/video\r\n" + " ".join(columns) + "\r\n\r\n")
    cameras = load_realestate10k(path, (100, 200), square_pixels=False)
    assert cameras.intrinsics.tolist() == [[[100, 0, 50], [0, 75, 50], [0, 0, 1]]]
    expected = [[0, 0, 1, 1], [-1, 0, 0, 2], [0, -1, 0, 3], [0, 0, 0, 1]]
    assert cameras.cam2world.tolist() == [expected]
    save_realestate10k(path, cameras, [17], "https://example.org/video")
    assert path.read_text().startswith("https://example.org/video\n17 0.5 0.75 0.25 0.5 0.0 0.0 ")
    assert [float(x) for x in path.read_text().split()[8:]] == [float(x) for x in world2cam]


def test_nerfstudio_layout(tmp_path: Path) -> None:
    """OpenGL axes: the identity looks along world -z with y up, in OpenCV terms diag(1, -1, -1)."""
    path = tmp_path / "transforms.json"
    matrix = [[1, 0, 0, 4], [0, 1, 0, 5], [0, 0, 1, 6], [0, 0, 0, 1]]
    meta = {
        "camera_model": "OPENCV",
        "fl_x": 50,
        "fl_y": 52,
        "cx": 41,
        "cy": 31,
        "w": 80.0,
        "h": 60,
        "k1": 0.0,
    }
    later = {"fl_x": 50.5, "transform_matrix": matrix, "file_path": "b.png"}
    path.write_text(json.dumps({**meta, "frames": [{"transform_matrix": matrix, "file_path": "a.png"}, later]}))
    cameras = load_nerfstudio(path)
    assert cameras.image_size == (60, 80)
    assert cameras.intrinsics[0].tolist() == [[50, 0, 41], [0, 52, 31], [0, 0, 1]]
    assert cameras.intrinsics[1].tolist() == [[50.5, 0, 41], [0, 52, 31], [0, 0, 1]]
    expected = [[1, 0, 0, 4], [0, -1, 0, 5], [0, 0, -1, 6], [0, 0, 0, 1]]
    assert cameras.cam2world.tolist() == [expected, expected]
    save_nerfstudio(path, cameras)
    saved = json.loads(path.read_text())
    assert [frame["transform_matrix"] for frame in saved["frames"]] == [matrix, matrix]
    assert [frame["fl_x"] for frame in saved["frames"]] == [50, 50.5]
    assert (saved["w"], saved["h"]) == (80, 60)
    assert all("file_path" in frame for frame in saved["frames"])
    save_nerfstudio(path, cameras[0])
    assert json.loads(path.read_text())["fl_x"] == 50


def test_nerfstudio_field_of_view(tmp_path: Path) -> None:
    path = tmp_path / "transforms.json"
    frames = [{"transform_matrix": np.eye(4).tolist()}]
    meta = {"camera_angle_x": math.pi / 2, "w": 80, "h": 60}
    path.write_text(json.dumps({**meta, "frames": frames}))
    expected = torch.tensor([[40, 0, 40], [0, 40, 30], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(load_nerfstudio(path).intrinsics[0], expected, rtol=1e-15, atol=0)
    path.write_text(json.dumps({**meta, "camera_angle_y": 1.25, "frames": frames}))
    assert load_nerfstudio(path).intrinsics[0, 1, 1].item() == pytest.approx(30 / math.tan(0.625), rel=1e-14)
    path.write_text(json.dumps({"camera_angle_x": math.pi / 2, "frames": frames}))
    assert load_trajectory(path, (30, 40)).image_size == (30, 40)
    assert load_trajectory(path, (30, 40)).intrinsics[0, 0, 0].item() == pytest.approx(20, rel=1e-14)


def test_nerfstudio_sorts_frames_by_name(tmp_path: Path) -> None:
    path = tmp_path / "transforms.json"
    save_nerfstudio(path, make(3))
    meta = json.loads(path.read_text())
    meta["frames"].reverse()
    path.write_text(json.dumps(meta))
    assert_close(load_nerfstudio(path), make(3), 0)
    for frame in meta["frames"]:
        del frame["file_path"]
    path.write_text(json.dumps(meta))
    assert_close(load_nerfstudio(path), make(3)[::-1], 0)


def test_npz_layout(tmp_path: Path) -> None:
    path, cameras = tmp_path / "path.npz", make(3)
    save_npz(path, cameras)
    with np.load(path, allow_pickle=False) as archive:
        assert set(archive) == {"intrinsics", "cam2world", "image_size"}
        assert archive["cam2world"].dtype == np.float64
        np.testing.assert_array_equal(archive["intrinsics"], cameras.intrinsics.numpy())
        np.testing.assert_array_equal(archive["cam2world"], cameras.cam2world.numpy())
        assert archive["image_size"].tolist() == [480, 640]


# --------------------------------------------------------------------------------------------- files: crashes


@pytest.mark.parametrize("suffix", [".txt", ".json", ".npz"])
@pytest.mark.parametrize("crash", ["replace", "fsync"])
def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, crash: str) -> None:
    path = tmp_path / f"path{suffix}"
    save_trajectory(path, make(2))
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, crash, fail)
        with pytest.raises(OSError, match="disk full"):
            save_trajectory(path, make(5))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    save_trajectory(path, make(5))
    assert len(load_trajectory(path, SIZE)) == 5


# ------------------------------------------------------------------------------------------ files: complaints


def test_refuses_unknown_suffixes(tmp_path: Path) -> None:
    for name in ("path.csv", "path", "npz"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
            load_trajectory(tmp_path / name)
        with pytest.raises(ValueError, match=rf"path must end in .txt .*, .json .* or .npz, got .*{name}"):
            save_trajectory(tmp_path / name, make(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".txt", ".json", ".npz"])
def test_missing_files_are_missing_files(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(FileNotFoundError, match="path"):
        load_trajectory(tmp_path / f"path{suffix}", SIZE)


def test_realestate10k_needs_an_image_size(tmp_path: Path) -> None:
    save_realestate10k(tmp_path / "path.txt", make(2))
    with pytest.raises(ValueError, match=r"path.txt: image_size must be \(height, width\) as the file has none"):
        load_trajectory(tmp_path / "path.txt")
    with pytest.raises(TypeError, match=r"size must be two ints \(height, width\), got 480"):
        load_trajectory(tmp_path / "path.txt", 480)  # type: ignore[arg-type]


def test_realestate10k_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"timestamps must hold one int per view \(2\), got 3"):
        save_realestate10k(tmp_path / "path.txt", make(2), [0, 1, 2])
    with pytest.raises(ValueError, match="url must be one word, got 'a\\\\nb'"):
        save_realestate10k(tmp_path / "path.txt", make(2), url="a\nb")
    assert not list(tmp_path.iterdir())


GOOD_LINE = "0 0.5 0.8 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": expected a header line and rows of 19 columns: no rows of 19 or 18 numbers"),
        ("a word\n", ": expected a header line and rows of 19 columns: no rows of 19 or 18 numbers"),
        (f"url\n{GOOD_LINE} 7\n", ": expected a header .*: line 2 has 20 columns, not 19 or 18"),
        (f"url\n{GOOD_LINE}\n\n{GOOD_LINE} 7\n", ", line 4: expected 19 columns as in line 2, got 20"),
        (f"url\n{GOOD_LINE}\n{GOOD_LINE[:-2]}\n", ", line 3: expected 19 columns as in line 2, got 18"),
        (f"url\n{GOOD_LINE[:-2]}\n", r", line 2: w2c\[0\] must be a rigid pose"),
        (f"url\n{GOOD_LINE[:-1]}x\n", ", line 2: expected 19 numbers, got '0 0.5"),
        (f"url\n\n{GOOD_LINE}\n{GOOD_LINE[:-1]}nan\n", r", line 4: w2c\[1\] must be finite"),
        (
            f"url\n{GOOD_LINE}\n{GOOD_LINE.replace('0.8', '0')}\n",
            r", line 3: intrinsics\[1\] must have positive focal lengths, got fx=0.5, fy=0",
        ),
        (
            f"url\n{GOOD_LINE.replace('1 0 0 0', '0 0 0 0')}\n",
            r", line 2: w2c\[0\] must be a rigid pose \(rotation within 1e-2 of orthonormal\)",
        ),
        (f"url\n{GOOD_LINE.replace('1 0 0 0', '-1 0 0 0', 1)}\n", r", line 2: w2c\[0\] .* reflection"),
    ],
)
def test_malformed_realestate10k(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "path.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"path.txt{message}"):
        load_realestate10k(path, SIZE)


@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_binary_is_not_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"path{suffix}"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=f"path{suffix}: expected UTF-8 text, got "):
        load_trajectory(path, SIZE)


EYE = np.eye(4).tolist()
NERFSTUDIO = {"fl_x": 50, "cx": 40, "cy": 30, "w": 80, "h": 60}


@pytest.mark.parametrize(
    ("meta", "frame", "message"),
    [
        ({"k1": 0.1}, {}, r": expected no distortion \(undistort the images, or .*\), got {'k1': 0.1}"),
        ({}, {"p2": -1e-3}, r": expected no distortion \(undistort .*\), got {'p2': -0.001}"),
        ({"distortion_params": [0, 0, 1]}, {}, r": expected no distortion .*, got {'distortion_params': "),
        (
            {"camera_model": "OPENCV_FISHEYE"},
            {},
            ": expected a pinhole camera .*, got camera_model 'OPENCV_FISHEYE'",
        ),
        ({"fl_x": None}, {}, ": fl_x must be a number, got None"),
        ({"cx": "40"}, {}, ": cx must be a number, got '40'"),
        ({"h": True}, {}, ": h must be a number, got True"),
        ({"w": 80.5}, {}, ": w and h must be positive integers, got 80.5 and 60"),
        ({"h": 0}, {}, ": w and h must be positive integers, got 80 and 0"),
        ({}, {"w": 81}, ": expected images of one aspect, 60x80 as before .*, got 60x81"),
        ({}, {"transform_matrix": None}, ": transform_matrix must be 4 x 4 or .* numbers, got None"),
        ({}, {"transform_matrix": EYE[:2]}, r": transform_matrix must be 4 x 4 or .* numbers, got \[\[1.0"),
        ({}, {"transform_matrix": [[1.0], [2.0, 3.0]]}, ": transform_matrix must be 4 x 4 or .* numbers, got "),
        ({}, {"transform_matrix": [["1"] * 4] * 4}, ": transform_matrix must be 4 x 4 or .* numbers, got "),
        (
            {},
            {"transform_matrix": np.diag([1, 1, 1, 2]).tolist()},
            r": cam2world\[1\] must have the bottom row",
        ),
        ({}, {"transform_matrix": np.zeros((4, 4)).tolist()}, r": cam2world\[1\] must have the bottom row"),
        ({}, {"transform_matrix": np.diag([1, 1, -1, 1]).tolist()}, r": cam2world\[1\] .* reflection"),
        ({}, {"fl_y": -5}, r": intrinsics\[1\] must have positive focal lengths, got fx=50, fy=-5"),
        ({}, {"cy": math.nan}, r": intrinsics\[1\] must be finite"),
    ],
)
def test_malformed_nerfstudio(tmp_path: Path, meta: dict, frame: dict, message: str) -> None:
    path = tmp_path / "transforms.json"
    frames = [{"transform_matrix": EYE}, {"transform_matrix": EYE, **frame}]
    path.write_text(json.dumps({**NERFSTUDIO, **meta, "frames": frames}))
    with pytest.raises(ValueError, match=rf"transforms.json, frames\[{0 if meta else 1}\]{message}"):
        load_nerfstudio(path)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"w": 80, "h": 60}, ": expected fl_x, camera_angle_x or x_fov, got none"),
        ({"w": 80, "h": 60, "camera_angle_x": 0.0}, r": camera_angle_x must be in \(0, pi\) radians, got 0"),
        (
            {"w": 80, "h": 60, "fl_x": 9, "camera_angle_y": 4},
            r": camera_angle_y must be in \(0, pi\) radians",
        ),
        ({"camera_angle_x": 1.0}, r": expected w and h, got neither, and no image_size \(height, width\)"),
        ({"fl_x": 50, "cx": 3}, ": expected w and h, got only fl_x, cx"),
        ({"w": 80, "camera_angle_x": 1.0}, ": expected w and h, got only w"),
    ],
)
def test_incomplete_nerfstudio(tmp_path: Path, meta: dict, message: str) -> None:
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps({**meta, "frames": [{"transform_matrix": EYE}]}))
    with pytest.raises(ValueError, match=rf"transforms.json, frames\[0\]{message}"):
        load_nerfstudio(path)
    if "only" in message:  # pixels of an unknown size must not be taken for pixels of any size
        with pytest.raises(ValueError, match=rf"transforms.json, frames\[0\]{message}"):
            load_nerfstudio(path, SIZE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"w": 3,\n"h": }', ", line 2: expected JSON, got Expecting value"),
        ("[]", r": expected an object whose 'frames' lists objects, got \[\]"),
        ('{"w": 3}', ": expected an object whose 'frames' lists objects, got {'w': 3}"),
        ('{"frames": [1]}', ": expected an object whose 'frames' lists objects, got "),
        ('{"frames": []}', ": expected w and h, got neither"),
    ],
)
def test_other_json(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "transforms.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"transforms.json{message}"):
        load_nerfstudio(path)


def test_malformed_npz(tmp_path: Path) -> None:
    path = tmp_path / "path.npz"
    good = {"intrinsics": make(1).intrinsics.numpy(), "cam2world": np.eye(4)[None], "image_size": np.array(SIZE)}

    def check(message: str) -> None:
        with pytest.raises(ValueError, match=f"path.npz{message}"):
            load_npz(path)

    np.savez(path, intrinsics=good["intrinsics"])
    check(": expected the arrays intrinsics .* and poses .*, got no cam2world in intrinsics")
    np.savez(path, **{**good, "cam2world": np.array([{"a": 1}], dtype=object)})
    check(": expected an .npz of plain arrays, got: Object arrays cannot be loaded")
    np.savez(path, **{**good, "cam2world": 2 * good["cam2world"]})
    check(r", view 0: cam2world\[0\] must have the bottom row")
    np.savez(path, **{**good, "intrinsics": -good["intrinsics"]})
    check(r", view 0: intrinsics\[0\] must have the bottom row")
    np.savez(path, **{**good, "cam2world": np.eye(4)})
    assert len(load_npz(path)) == 1
    np.savez(path, **{**good, "cam2world": np.array(1.0)})
    check(r": cam2world must be \(..., 3, 4\) or \(..., 4, 4\), got \(\)")
    np.savez(path, **{**good, "cam2world": np.eye(4, dtype=int)[None]})
    check(": c2w must be a float tensor, array or nested lists, got int64")
    np.savez(path, **{**good, "image_size": np.array([480.0, 640.0])})
    check(r": image_size must be two ints \(height, width\), got \[480.0, 640.0\]")
    np.savez(path, **{**good, "image_size": np.array(480)})
    check(": image_size must be two ints")
    with open(path, "wb") as file:
        np.save(file, np.eye(4))
    check(": expected an .npz of plain arrays, got: ")
    np.savez(path, **good)
    whole = path.read_bytes()
    for part in (b"", whole[:40], whole[:-40], b"not an archive"):
        path.write_bytes(part)
        check(": expected an .npz of plain arrays, got: ")


# -------------------------------------------------------------------------------------------- generated paths

PATHS = {
    "orbit": lambda start, n: orbit(start, n, distance=2.5, degrees=75.0),
    "dolly": lambda start, n: dolly(start, n, offset=(0.5, -0.25, 2.0)),
    "pan": lambda start, n: pan(start, n, degrees=-50.0, pitch=20.0),
    "spiral": lambda start, n: spiral(start, n, distance=2.5, radius=0.4, turns=1.5, depth=0.3),
    **{f"make-{name}": lambda start, n, name=name: make_trajectory(name, start, n, 2.5) for name in TRAJECTORIES},
}


@pytest.mark.parametrize("name", PATHS)
@settings(max_examples=15, deadline=None)
@given(num_frames=st.integers(1, 40), seed=st.integers(0, 1000))
def test_every_path(name: str, num_frames: int, seed: int) -> None:
    start = make(1, seed)
    path = PATHS[name](start, num_frames)
    assert len(path) == num_frames and path.image_size == SIZE
    assert same_bits(path[0].cam2world, start.cam2world)
    assert same_bits(path.intrinsics, start.intrinsics.expand(num_frames, 3, 3))
    rotation = path.cam2world[:, :3, :3]
    eye = torch.eye(3, dtype=torch.float64).expand(num_frames, 3, 3)
    torch.testing.assert_close(rotation @ rotation.mT, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(num_frames).double(), rtol=0, atol=1e-12)
    if num_frames >= 4:
        assert not torch.equal(path.cam2world[1], path.cam2world[0])
    assert same_bits(path.cam2world, PATHS[name](start, num_frames).cam2world)


@pytest.mark.parametrize("name", PATHS)
def test_the_start_keeps_its_signs_of_zero(name: str) -> None:
    pose = np.eye(4)
    pose[:3] = np.where(pose[:3] == 0, -0.0, pose[:3])
    start = Cameras(make(1).intrinsics[0], pose[None], SIZE)
    assert start.cam2world.signbit().any()
    path = PATHS[name](start, 5)
    assert same_bits(path[0].cam2world, start.cam2world)
    if name.endswith(("spiral", "-and-back")):  # those close, and here no rounding hides what is almost zero
        assert same_bits(path[-1].cam2world, start.cam2world)


@settings(deadline=None)
@given(
    num_frames=st.integers(2, 40),
    degrees=st.floats(-720, 720),
    distance=st.floats(0.1, 50),
    seed=st.integers(0, 99),
)
def test_orbit_circles_its_target(num_frames: int, degrees: float, distance: float, seed: int) -> None:
    start = make(1, seed)
    path = orbit(start, num_frames, distance=distance, degrees=degrees)
    target = start.cam2world[0] @ torch.tensor([0, 0, distance, 1], dtype=torch.float64)
    expected = torch.tensor([0, 0, distance, 1], dtype=torch.float64).expand(num_frames, 4)
    torch.testing.assert_close(path.world2cam @ target, expected, rtol=1e-12, atol=1e-12 * (distance + 10))
    # It stays level, and the angle between the first and the last viewing direction is the one asked for.
    local = in_start_axes(path)
    torch.testing.assert_close(local[:, 1, 3], torch.zeros(num_frames).double(), rtol=0, atol=1e-12 * distance)
    cosine = math.cos(math.radians(degrees))
    assert local[-1, 2, 2].item() == pytest.approx(cosine, abs=1e-12)


def test_orbit_goes_to_the_right_in_equal_steps() -> None:
    local = in_start_axes(orbit(make(1), 4, distance=2.0, degrees=90.0))
    angles = torch.arange(4, dtype=torch.float64) * math.radians(30)
    torch.testing.assert_close(local[:, 0, 3], 2 * angles.sin(), rtol=0, atol=1e-13)
    torch.testing.assert_close(local[:, 2, 3], 2 - 2 * angles.cos(), rtol=0, atol=1e-13)
    torch.testing.assert_close(local[-1, :3, 2], torch.tensor([-1.0, 0, 0]).double(), rtol=0, atol=1e-13)


@settings(deadline=None)
@given(num_frames=st.integers(2, 40), offset=st.tuples(*[st.floats(-5, 5)] * 3), seed=st.integers(0, 99))
def test_dolly_moves_along_the_camera_axes(num_frames: int, offset: tuple[float, ...], seed: int) -> None:
    start = make(1, seed)
    path = dolly(start, num_frames, offset=offset)
    assert torch.equal(path.cam2world[:, :3, :3], start.cam2world[:, :3, :3].expand(num_frames, 3, 3))
    steps = torch.linspace(0, 1, num_frames, dtype=torch.float64)[:, None]
    right, down, forward = start.cam2world[0, :3, :3].T
    moved = steps * (offset[0] * right + offset[1] * down + offset[2] * forward)
    torch.testing.assert_close(path.centers - start.centers, moved, rtol=0, atol=1e-13)


def test_pan_turns_right_and_pitch_up() -> None:
    start = make(1)
    forward = in_start_axes(pan(start, 4, degrees=90.0))[:, :3, 2]
    angles = torch.arange(4, dtype=torch.float64) * math.radians(30)
    expected = torch.stack([angles.sin(), torch.zeros(4).double(), angles.cos()], 1)
    torch.testing.assert_close(forward, expected, rtol=0, atol=1e-13)
    forward = in_start_axes(pan(start, 3, degrees=0.0, pitch=60.0))[:, :3, 2]
    angles = torch.arange(3, dtype=torch.float64) * math.radians(30)
    expected = torch.stack([torch.zeros(3).double(), -angles.sin(), angles.cos()], 1)
    torch.testing.assert_close(forward, expected, rtol=0, atol=1e-13)
    both = pan(start, 9, degrees=80.0, pitch=40.0)
    assert torch.equal(both.centers, start.centers.expand(9, 3))
    right = in_start_axes(both)[:, :3, 0]
    torch.testing.assert_close(right[:, 1], torch.zeros(9).double(), rtol=0, atol=1e-13)  # no roll


@settings(deadline=None)
@given(num_frames=st.integers(3, 60), turns=st.floats(-4, 4), depth=st.floats(-1, 1.4), seed=st.integers(0, 99))
def test_spiral_looks_at_its_target(num_frames: int, turns: float, depth: float, seed: int) -> None:
    start = make(1, seed)
    path = spiral(start, num_frames, distance=1.5, radius=0.3, turns=turns, depth=depth)
    target = start.cam2world[0] @ torch.tensor([0, 0, 1.5, 1], dtype=torch.float64)
    seen = path.world2cam @ target
    torch.testing.assert_close(seen[:, :2], torch.zeros(num_frames, 2).double(), rtol=0, atol=1e-12)
    assert (seen[:, 2] > 0).all()
    local = in_start_axes(path)
    swell = torch.sin(math.pi * torch.linspace(0, 1, num_frames, dtype=torch.float64)) ** 2
    torch.testing.assert_close(local[:, :2, 3].norm(dim=1), 0.3 * swell, rtol=0, atol=1e-12)
    torch.testing.assert_close(local[:, 2, 3], depth * swell, rtol=0, atol=1e-12)
    torch.testing.assert_close(local[:, 1, 0], torch.zeros(num_frames).double(), rtol=0, atol=1e-12)  # no roll
    assert same_bits(path[-1].cam2world, start.cam2world)


def test_spiral_winds() -> None:
    local = in_start_axes(spiral(make(1), 9, distance=2.0, radius=1.0, turns=2.0))
    # Half a turn every second frame: right, left, right, left; between them down, up, down, up.
    assert local[1:8, 0, 3].sign()[[1, 3, 5]].tolist() == [-1, 1, -1]
    assert local[[1, 3, 5, 7], 1, 3].sign().tolist() == [1, -1, 1, -1]


@pytest.mark.slow
@settings(deadline=None)
@given(num_frames=st.integers(2, 200), turns=st.integers(-3, 3), seed=st.integers(0, 99))
def test_full_turns_close(num_frames: int, turns: int, seed: int) -> None:
    start = make(1, seed)
    for path in (
        orbit(start, num_frames, distance=1.7, degrees=360.0 * turns),
        orbit(start, num_frames, distance=1.7, degrees=360 * turns),
        pan(start, num_frames, degrees=360.0 * turns, pitch=-360.0),
    ):
        assert same_bits(path[-1].cam2world, start.cam2world)
    if turns and num_frames == 4:
        assert not torch.equal(path.cam2world[1], start.cam2world[0])


@pytest.mark.parametrize("name", ["orbit", "dolly", "pan", "spiral"])
@settings(max_examples=15, deadline=None)
@given(num_frames=st.integers(1, 60), seed=st.integers(0, 99))
def test_out_and_back_returns(name: str, num_frames: int, seed: int) -> None:
    start = make(1, seed)
    path = out_and_back(lambda n: PATHS[name](start, n), num_frames)
    assert len(path) == num_frames
    assert same_bits(path[0].cam2world, start.cam2world)
    assert same_bits(path.cam2world, path[::-1].cam2world)
    half = (num_frames + 1) // 2
    assert same_bits(path[:half].cam2world, PATHS[name](start, half).cam2world)


def test_out_and_back_reaches_the_end() -> None:
    start = make(1)
    for num_frames, turn in ((5, [2]), (6, [2, 3])):
        path = out_and_back(lambda n: dolly(start, n, offset=(0, 0, 3)), num_frames)
        away = (path.centers - start.centers).norm(dim=1)
        torch.testing.assert_close(away[turn], torch.full((len(turn),), 3.0).double(), rtol=0, atol=1e-13)
        assert away[1].item() == pytest.approx(1.5)
    assert len(out_and_back(lambda n: dolly(start, n, offset=(0, 0, 3)), 1)) == 1


def test_start_may_be_a_real_pose() -> None:
    """Not quite orthonormal: the path is no worse, and its first view is untouched."""
    pose = make(1).cam2world.clone()
    pose[0, :3, :3] += 1e-4 * torch.arange(9).reshape(3, 3)
    start = Cameras(make(1).intrinsics, pose, SIZE)
    path = orbit(start, 12, distance=2.0, degrees=120.0)
    assert same_bits(path[0].cam2world, pose)
    gram = path.cam2world[:, :3, :3] @ path.cam2world[:, :3, :3].mT
    torch.testing.assert_close(gram, gram[:1].expand(12, 3, 3), rtol=0, atol=1e-12)
    target = pose[0] @ torch.tensor([0.0, 0, 2, 1], dtype=torch.float64)
    expected = torch.tensor([0, 0, 2, 1], dtype=torch.float64).expand(12, 4)
    torch.testing.assert_close(path.world2cam @ target, expected, rtol=0, atol=1e-12)


def test_make_trajectory_scales_with_the_scene() -> None:
    start = make(1)
    near, far = (make_trajectory("dolly", start, 3, distance) for distance in (2.0, 6.0))
    assert (near.centers[-1] - start.centers[0]).norm().item() == pytest.approx(1.0)
    assert (far.centers[-1] - start.centers[0]).norm().item() == pytest.approx(3.0)
    assert_close(make_trajectory("orbit", start, 5, 2.0, degrees=90), orbit(start, 5, distance=2.0, degrees=90), 0)
    assert_close(make_trajectory("pan", start, 5, 2.0), pan(start, 5, degrees=30.0), 0)
    assert_close(make_trajectory("spiral", start, 5, 2.0), spiral(start, 5, distance=2.0, radius=0.4), 0)
    back = make_trajectory("pan-and-back", start, 5, 2.0, degrees=10)
    assert_close(back[:3], pan(start, 3, degrees=10), 0)
    assert same_bits(back[4].cam2world, start.cam2world)


# ---------------------------------------------------------------------------------- generated paths: refusals


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("num_frames", [0, -1, 2.0, True, "3"])
def test_refuses_frame_counts(name: str, num_frames) -> None:
    with pytest.raises(ValueError, match=rf"num_frames must be an int >= 1, got '?{num_frames}"):
        PATHS[name](make(1), num_frames)


@pytest.mark.parametrize("name", PATHS)
def test_refuses_starts(name: str) -> None:
    for start, got in ((make(2), "2 views"), (make(0), "0 views"), (np.eye(4), "ndarray")):
        with pytest.raises(ValueError, match=f"start must be Cameras of one view, got {got}"):
            PATHS[name](start, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: orbit(s, 3, distance=0.0), "distance must be positive and finite, got 0.0"),
        (lambda s: orbit(s, 3, distance=math.nan), "distance must be positive and finite, got nan"),
        (lambda s: orbit(s, 3, distance=1.0, degrees=math.inf), "degrees must be finite, got inf"),
        (
            lambda s: dolly(s, 3, offset=(1, 2)),
            r"offset must be three lengths \(right, down, forward\), got 2",
        ),
        (lambda s: dolly(s, 3, offset=(1, 2, math.nan)), "offset must be finite, got nan"),
        (lambda s: pan(s, 3, degrees=math.nan), "degrees must be finite, got nan"),
        (lambda s: pan(s, 3, degrees=1, pitch=math.inf), "pitch must be finite, got inf"),
        (lambda s: spiral(s, 3, distance=-1, radius=1), "distance must be positive and finite, got -1"),
        (lambda s: spiral(s, 3, distance=1, radius=math.nan), "radius must be finite, got nan"),
        (lambda s: spiral(s, 3, distance=1, radius=1, turns=math.inf), "turns must be finite, got inf"),
        (lambda s: spiral(s, 3, distance=1, radius=1, depth=-math.inf), "depth must be finite, got -inf"),
        (
            lambda s: spiral(s, 3, distance=1, radius=1, depth=1.5),
            r"depth must be less than distance \(1\), got 1.5",
        ),
        (
            lambda s: make_trajectory("circle", s, 3, 1.0),
            "name must be one of orbit, dolly, .*, got 'circle'",
        ),
        (lambda s: make_trajectory("pan", s, 3, 0.0), "distance must be positive and finite, got 0.0"),
        (
            lambda s: out_and_back(lambda n: pan(s, n + 1, degrees=1), 5),
            "make_path must give the 3 views it is asked for, got 4",
        ),
    ],
)
def test_refuses_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(make(1))


def test_refuses_unknown_options() -> None:
    with pytest.raises(TypeError, match="radius"):
        make_trajectory("pan", make(1), 3, 1.0, radius=2.0)

"""Camera files: readers and writers that round-trip.

RealEstate10K text (.txt), nerfstudio `transforms.json` (.json) and plain arrays (.npz). A malformed file is a
ValueError that names the file, the line or key, what was expected and what came. Writers replace the file atomically.
"""

from __future__ import annotations

import io
import json
import math
import operator
import os
import re
import secrets
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirage_kernels import Cameras

PathLike = str | os.PathLike[str]
_ALLOWANCES = ("square_pixels", "off_center")  # of `Cameras`, which files say where they need them


def load_trajectory(path: PathLike, image_size: Sequence[int] | None = None) -> Cameras:
    """Load cameras from a .txt (RealEstate10K), .json (nerfstudio) or .npz file, resized to `image_size` if given.

    Raises:
        ValueError: unknown suffix, a malformed file, or no `image_size` (height, width) where the file states
            none.
    """
    suffix = _suffix(path)
    if suffix == ".npz":
        cameras = load_npz(path)
    elif suffix == ".json":
        cameras = load_nerfstudio(path, image_size)
    elif image_size is None:
        raise ValueError(f"{path}: image_size must be (height, width) as the file has none, got None")
    else:
        cameras = load_realestate10k(path, image_size)
    return cameras if image_size is None else cameras.resized(image_size)


def save_trajectory(path: PathLike, cameras: Cameras) -> None:
    """Write `cameras` as the path's suffix says: .txt (RealEstate10K), .json (nerfstudio) or .npz."""
    {".txt": save_realestate10k, ".json": save_nerfstudio, ".npz": save_npz}[_suffix(path)](path, cameras)


def load_realestate10k(path: PathLike, image_size: Sequence[int]) -> Cameras:
    """Load the cameras of a RealEstate10K text file (Zhou et al., "Stereo Magnification", 2018).

    The first line is the video's URL. Every other line has 19 columns: timestamp in microseconds, fx, fy, cx,
    cy as fractions of width and height, two unused, and the 3x4 world-to-camera matrix by rows. Blank lines
    are skipped.
    """
    text = _read_text(path)
    header, *lines = text.split("\n")
    if not text or len(header.split()) > 1:
        raise ValueError(f"{path}, line 1: expected the URL of the video alone on its line, got {header!r}")
    rows, places = [], []
    for number, line in enumerate(lines, start=2):
        columns = line.split()
        if not columns:
            continue
        place = f"line {number}"
        if len(columns) != 19:
            raise ValueError(f"{path}, {place}: expected 19 columns, got {len(columns)}")
        try:
            rows.append([float(column) for column in columns])
        except ValueError:
            raise ValueError(f"{path}, {place}: expected 19 numbers, got {line.strip()!r}") from None
        places.append(place)
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 19)
    views = len(table)
    intrinsics = torch.eye(3, dtype=torch.float64).repeat(views, 1, 1)
    intrinsics[:, [0, 1, 0, 1], [0, 1, 2, 2]] = table[:, 1:5]
    world2cam = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    world2cam[:, :3] = table[:, 7:].reshape(-1, 3, 4)
    # Fractions of the image are pixels of a 1x1 image; and the inverse of one pose is the other.
    inverse = _cameras(path, places, intrinsics, world2cam, (1, 1), square_pixels=False)
    return _cameras(path, places, inverse.intrinsics, inverse.world2cam, (1, 1), square_pixels=False).resized(
        image_size
    )


def save_realestate10k(
    path: PathLike, cameras: Cameras, timestamps: Sequence[int] | None = None, url: str = ""
) -> None:
    """Write a RealEstate10K text file; reading it back gives `cameras` within 1e-12.

    Args:
        timestamps: one integer per view, in microseconds. Without them, views are numbered from 0.
        url: the first line.
    """
    times = list(range(len(cameras)) if timestamps is None else timestamps)
    if len(times) != len(cameras):
        raise ValueError(f"timestamps must hold one int per view ({len(cameras)}), got {len(times)}")
    if len(url.split()) > 1:
        raise ValueError(f"url must be one word, got {url!r}")
    unit = cameras.resized((1, 1)).to("cpu")
    lines = [url]
    for time, k, pose in zip(times, unit.intrinsics.tolist(), unit.world2cam.tolist(), strict=True):
        numbers = [k[0][0], k[1][1], k[0][2], k[1][2], 0.0, 0.0, *pose[0], *pose[1], *pose[2]]
        lines.append(" ".join([str(operator.index(time)), *map(repr, numbers)]))
    _write(path, ("\n".join(lines) + "\n").encode())


def load_nerfstudio(path: PathLike, image_size: Sequence[int] | None = None) -> Cameras:
    """Load the cameras of a nerfstudio `transforms.json`, in the order of its frames.

    `fl_x`, `fl_y`, `cx`, `cy`, `w`, `h`, `camera_model` and distortion may be given per file or per frame (a
    frame's own wins). Without `fl_x`, `camera_angle_x` (radians) gives it; `fl_y` defaults to
    `camera_angle_y`, then to `fl_x`; the principal point to the image centre. `transform_matrix` is
    camera-to-world in OpenGL axes (x right, y up, z backward) and is converted to OpenCV axes; the world is
    left as it is.

    Args:
        image_size: (height, width), used only where the file states neither `w` and `h` nor anything in
            pixels (files of synthetic scenes that hold `camera_angle_x` alone).

    Raises:
        ValueError: malformed, frames of different sizes, lens distortion (undistort the images first), or a
            camera model other than OPENCV, PINHOLE and SIMPLE_PINHOLE.
    """
    try:
        meta = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: expected JSON, got {error.msg}") from None
    frames = meta.get("frames") if isinstance(meta, dict) else None
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise ValueError(f"{path}: expected an object whose 'frames' lists objects, got {str(meta)[:80]}")
    places = [f"frames[{i}]" for i in range(len(frames))]
    size = None if frames else _nerfstudio_size(str(path), meta, image_size)
    intrinsics = torch.zeros(len(frames), 3, 3, dtype=torch.float64)
    cam2world = torch.zeros(len(frames), 4, 4, dtype=torch.float64)
    for i, frame in enumerate(frames):
        values, place = {**meta, **frame}, f"{path}, {places[i]}"
        frame_size = _nerfstudio_size(place, values, image_size)
        if frame_size != (size or frame_size):
            raise ValueError(f"{place}: expected the (h, w) of the frames before, {size}, got {frame_size}")
        size = frame_size
        intrinsics[i] = torch.tensor(_nerfstudio_intrinsics(place, values, *size), dtype=torch.float64)
        cam2world[i] = torch.tensor(_nerfstudio_pose(place, values), dtype=torch.float64)
    cam2world[:, :, 1:3] *= -1  # OpenGL to OpenCV
    assert size is not None
    allowed = {name: meta[name] for name in _ALLOWANCES if isinstance(meta.get(name), bool)}
    return _cameras(path, places, intrinsics, cam2world, size, **allowed)


def save_nerfstudio(path: PathLike, cameras: Cameras) -> None:
    """Write a nerfstudio `transforms.json`; reading it back gives `cameras` exactly.

    The format wants a `file_path` in every frame: they are called `images/00000.png` and so on.
    """
    height, width = cameras.image_size
    opengl = cameras.cam2world.cpu().clone()
    opengl[:, :, 1:3] *= -1
    lenses = [{"fl_x": k[0][0], "fl_y": k[1][1], "cx": k[0][2], "cy": k[1][2]} for k in cameras.intrinsics.tolist()]
    meta: dict[str, Any] = {"camera_model": "PINHOLE", "w": width, "h": height, **cameras.allowances}
    if lenses and all(lens == lenses[0] for lens in lenses):
        meta |= lenses[0]
        lenses = [{}] * len(lenses)
    meta["frames"] = [
        {"file_path": f"images/{i:05d}.png", **lens, "transform_matrix": pose}
        for i, (lens, pose) in enumerate(zip(lenses, opengl.tolist(), strict=True))
    ]
    _write(path, (json.dumps(meta, indent=2, allow_nan=False) + "\n").encode())


def load_npz(path: PathLike) -> Cameras:
    """Load the cameras of an .npz with `intrinsics` (T, 3, 3), `cam2world` (T, 4, 4) and `image_size` (h, w)."""
    names = ("intrinsics", "cam2world", "image_size")
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            arrays = {name: archive[name] for name in (*names, *_ALLOWANCES) if name in archive}
    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected an .npz of plain arrays, got: {error}") from None
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ValueError(f"{path}: expected the arrays {', '.join(names)}, got no {', '.join(missing)}")
    places = [f"view {i}" for i in range(len(arrays["cam2world"]) if arrays["cam2world"].ndim else 0)]
    allowed = {name: bool(arrays[name]) for name in _ALLOWANCES if name in arrays and arrays[name].shape == ()}
    return _cameras(path, places, arrays["intrinsics"], arrays["cam2world"], arrays["image_size"].tolist(), **allowed)


def save_npz(path: PathLike, cameras: Cameras) -> None:
    """Write an .npz with `intrinsics`, `cam2world` (float64) and `image_size`; reading it back is exact."""
    buffer = io.BytesIO()
    values: dict[str, Any] = {
        "intrinsics": cameras.intrinsics.cpu().numpy(),
        "cam2world": cameras.cam2world.cpu().numpy(),
    }
    np.savez(buffer, **values, image_size=np.array(cameras.image_size), **cameras.allowances)  # type: ignore[arg-type]
    _write(path, buffer.getvalue())


def _suffix(path: PathLike) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".txt", ".json", ".npz"):
        raise ValueError(f"path must end in .txt (RealEstate10K), .json (nerfstudio) or .npz, got {path}")
    return suffix


def _read_text(path: PathLike) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error}") from None


def _write(path: PathLike, data: bytes) -> None:
    """Replace a file atomically."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _cameras(
    path: PathLike, places: Sequence[str], intrinsics: Any, cam2world: Any, size: Sequence[int], **allowed: bool
) -> Cameras:
    """Make `Cameras`; an error about view i names `places[i]` of the file."""
    try:
        return Cameras(intrinsics, cam2world, size, **allowed)
    except (TypeError, ValueError) as error:
        view = re.match(r"\w+\[(\d+)\]", str(error))
        place = f", {places[int(view[1])]}" if view else ""
        raise ValueError(f"{path}{place}: {error}") from None


def _nerfstudio_number(place: str, values: dict[str, Any], key: str) -> float:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{place}: {key} must be a number, got {value!r}")
    return float(value)


def _nerfstudio_size(place: str, values: dict[str, Any], image_size: Sequence[int] | None) -> tuple[int, int]:
    in_pixels = [key for key in ("w", "h", "fl_x", "fl_y", "cx", "cy") if key in values]
    if not in_pixels and image_size is not None:
        return image_size[0], image_size[1]
    if "w" not in values or "h" not in values:
        stated = f"only {', '.join(in_pixels)}" if in_pixels else "neither, and no image_size (height, width)"
        raise ValueError(f"{place}: expected w and h, got {stated}")
    width, height = (_nerfstudio_number(place, values, key) for key in ("w", "h"))
    if not (width.is_integer() and height.is_integer() and width > 0 and height > 0):
        raise ValueError(f"{place}: w and h must be positive integers, got {width:g} and {height:g}")
    return int(height), int(width)


def _nerfstudio_intrinsics(place: str, values: dict[str, Any], height: int, width: int) -> list[list[float]]:
    model = values.get("camera_model", "PINHOLE")
    if model not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE"):
        raise ValueError(f"{place}: camera_model must be OPENCV, PINHOLE or SIMPLE_PINHOLE, got {model!r}")
    coefficients = ("k1", "k2", "k3", "k4", "p1", "p2", "distortion_params")
    distortion = {key: values[key] for key in coefficients if np.any(values.get(key, 0))}
    if distortion:
        raise ValueError(f"{place}: expected no distortion (undistort the images first), got {distortion}")

    def number(key: str, default: float) -> float:
        return _nerfstudio_number(place, values, key) if key in values else default

    def focal(axis: str, size: int) -> float | None:
        if f"fl_{axis}" in values:
            return _nerfstudio_number(place, values, f"fl_{axis}")
        if f"camera_angle_{axis}" not in values:
            return None
        angle = _nerfstudio_number(place, values, f"camera_angle_{axis}")
        if not 0 < angle < math.pi:
            raise ValueError(f"{place}: camera_angle_{axis} must be in (0, pi) radians, got {angle:g}")
        return 0.5 * size / math.tan(0.5 * angle)

    fx, fy = focal("x", width), focal("y", height)
    if fx is None:
        raise ValueError(f"{place}: expected fl_x or camera_angle_x, got neither")
    cx, cy = number("cx", width / 2), number("cy", height / 2)
    return [[fx, 0.0, cx], [0.0, fx if fy is None else fy, cy], [0.0, 0.0, 1.0]]


def _nerfstudio_pose(place: str, values: dict[str, Any]) -> list[list[float]]:
    matrix = values.get("transform_matrix")
    try:
        pose = np.array(matrix)
        if pose.shape == (4, 4) and pose.dtype.kind in "if":
            return pose.astype(np.float64).tolist()
    except ValueError:  # ragged
        pass
    raise ValueError(f"{place}: transform_matrix must be 4 x 4 numbers, got {str(matrix)[:80]}")

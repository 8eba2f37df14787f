"""Camera trajectories: files in, files out, and generated paths.

Files. Each format has a reader and a writer that round-trip: RealEstate10K text (.txt), nerfstudio
`transforms.json` (.json) and plain arrays (.npz). A malformed file is a ValueError that names the file, the
line or key, what was expected and what came. Writers replace the file in one step, so a crash leaves the old
one.

Generated paths. Each starts at a one-view `Cameras`, `start`, which is the first view of the result bit for
bit, and takes any frame count >= 1; frame i of n stands at t = i / (n - 1). Axes are those of the start
camera (OpenCV: x right, y down, z forward), lengths are world units, angles degrees. Poses are as rigid as
the start pose is. The intrinsics are the start's. Results lie on the start's device.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage_kernels.cameras import Cameras

PathLike = str | os.PathLike[str]

# ------------------------------------------------------------------------------------------------------ files


def load_trajectory(path: PathLike, image_size: Sequence[int] | None = None) -> Cameras:
    """Cameras from a .txt (RealEstate10K), .json (nerfstudio) or .npz file, resized to `image_size` if given.

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
    """Cameras of a RealEstate10K text file (Zhou et al., "Stereo Magnification", 2018).

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
    inverse = _cameras(path, places, intrinsics, world2cam, (1, 1))
    return _cameras(path, places, inverse.intrinsics, inverse.world2cam, (1, 1)).resized(image_size)


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
    """Cameras of a nerfstudio `transforms.json`, in the order of its frames.

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
    return _cameras(path, places, intrinsics, cam2world, size)


def save_nerfstudio(path: PathLike, cameras: Cameras) -> None:
    """Write a nerfstudio `transforms.json`; reading it back gives `cameras` exactly.

    The format wants a `file_path` in every frame: they are called `images/00000.png` and so on.
    """
    height, width = cameras.image_size
    opengl = cameras.cam2world.cpu().clone()
    opengl[:, :, 1:3] *= -1
    lenses = [{"fl_x": k[0][0], "fl_y": k[1][1], "cx": k[0][2], "cy": k[1][2]} for k in cameras.intrinsics.tolist()]
    meta: dict[str, Any] = {"camera_model": "PINHOLE", "w": width, "h": height}
    if lenses and all(lens == lenses[0] for lens in lenses):
        meta |= lenses[0]
        lenses = [{}] * len(lenses)
    meta["frames"] = [
        {"file_path": f"images/{i:05d}.png", **lens, "transform_matrix": pose}
        for i, (lens, pose) in enumerate(zip(lenses, opengl.tolist(), strict=True))
    ]
    _write(path, (json.dumps(meta, indent=2, allow_nan=False) + "\n").encode())


def load_npz(path: PathLike) -> Cameras:
    """Cameras of an .npz with `intrinsics` (T, 3, 3), `cam2world` (T, 4, 4) and `image_size` (h, w)."""
    names = ("intrinsics", "cam2world", "image_size")
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            arrays = {name: archive[name] for name in names if name in archive}
    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected an .npz of plain arrays, got: {error}") from None
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ValueError(f"{path}: expected the arrays {', '.join(names)}, got no {', '.join(missing)}")
    places = [f"view {i}" for i in range(len(arrays["cam2world"]) if arrays["cam2world"].ndim else 0)]
    return _cameras(path, places, arrays["intrinsics"], arrays["cam2world"], arrays["image_size"].tolist())


def save_npz(path: PathLike, cameras: Cameras) -> None:
    """Write an .npz with `intrinsics`, `cam2world` (float64) and `image_size`; reading it back is exact."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        intrinsics=cameras.intrinsics.cpu().numpy(),
        cam2world=cameras.cam2world.cpu().numpy(),
        image_size=np.array(cameras.image_size),
    )
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
    """Replace the file in one step: whoever looks, and whatever crashes, finds the old content or the new."""
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


def _cameras(path: PathLike, places: Sequence[str], intrinsics: Any, cam2world: Any, size: Sequence[int]) -> Cameras:
    """`Cameras`, whose complaint about view i is told as one about `places[i]` of the file."""
    try:
        return Cameras(intrinsics, cam2world, size)
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


# -------------------------------------------------------------------------------------------- generated paths


def orbit(start: Cameras, num_frames: int, *, distance: float, degrees: float = 30.0) -> Cameras:
    """Circle about the point `distance` in front of the start camera, around its y axis, looking at it.

    Positive `degrees` move the camera to its right. Multiples of 360 close the circle: the last pose is the
    first, bit for bit.
    """
    _check_positive("distance", distance)
    _check_finite("degrees", degrees)

    def local(t: float) -> Tensor:
        sine, cosine = _sine_cosine(degrees * t)
        return _pose(_yaw(-degrees * t), (distance * sine, 0.0, distance - distance * cosine))

    return _path(start, num_frames, local)


def dolly(start: Cameras, num_frames: int, *, offset: Sequence[float]) -> Cameras:
    """Straight line from the start to `offset` = (right, down, forward), with an unchanged rotation."""
    if len(offset) != 3:
        raise ValueError(f"offset must be three lengths (right, down, forward), got {len(offset)}")
    for value in offset:
        _check_finite("offset", value)
    eye = torch.eye(3, dtype=torch.float64)
    return _path(start, num_frames, lambda t: _pose(eye, [value * t for value in offset]))


def pan(start: Cameras, num_frames: int, *, degrees: float, pitch: float = 0.0) -> Cameras:
    """Turn in place about the y axis by `degrees`, positive to the right, and up by `pitch`.

    Multiples of 360 close: the last pose is the first, bit for bit.
    """
    _check_finite("degrees", degrees)
    _check_finite("pitch", pitch)
    return _path(start, num_frames, lambda t: _pose(_yaw(degrees * t) @ _pitch(pitch * t), (0.0, 0.0, 0.0)))


def spiral(
    start: Cameras, num_frames: int, *, distance: float, radius: float, turns: float = 2.0, depth: float = 0.0
) -> Cameras:
    """Spiral out of the start and back into it, looking at the point `distance` ahead.

    After LLFF (Mildenhall et al. 2019), but from the start pose: at t the camera stands at s (radius cos a,
    radius sin a, depth), with a = 360 turns t degrees and s = sin^2(pi t). So it is farthest, and `depth`
    forward, half-way, and the last pose is the first, bit for bit.
    """
    _check_positive("distance", distance)
    for name, value in (("radius", radius), ("turns", turns), ("depth", depth)):
        _check_finite(name, value)
    if depth >= distance:
        raise ValueError(f"depth must be less than distance ({distance:g}), got {depth:g}")

    def local(t: float) -> Tensor:
        swell = _sine_cosine(180.0 * min(t, 1.0 - t))[0] ** 2  # by the nearer end, so that both are exactly 0
        sine, cosine = _sine_cosine(360.0 * turns * t)
        centre = (swell * radius * cosine, swell * radius * sine, swell * depth)
        return _pose(_facing(-centre[0], -centre[1], distance - centre[2]), centre)

    return _path(start, num_frames, local)


def out_and_back(make_path: Callable[[int], Cameras], num_frames: int) -> Cameras:
    """A path and its reverse: view i and view `num_frames` - 1 - i are the same, bit for bit.

    Args:
        make_path: gives the way out for a frame count, e.g. `lambda n: orbit(start, n, distance=2.0)`. It is
            asked for ceil(num_frames / 2) frames; at an even `num_frames` the turning point is held for two.
    """
    _check_num_frames(num_frames)
    turn = (num_frames + 1) // 2
    way_out = make_path(turn)
    if len(way_out) != turn:
        raise ValueError(f"make_path must give the {turn} views it is asked for, got {len(way_out)}")
    return Cameras.cat([way_out, way_out[: num_frames // 2][::-1]])


def make_trajectory(name: str, start: Cameras, num_frames: int, distance: float, **options: Any) -> Cameras:
    """The path called `name` in `TRAJECTORIES`, sized for a scene about `distance` in front of `start`.

    Without options: orbit and pan by 30 degrees, dolly forward by half the distance, spiral with a fifth of
    the distance as radius.
    """
    if name not in TRAJECTORIES:
        raise ValueError(f"name must be one of {', '.join(TRAJECTORIES)}, got {name!r}")
    _check_positive("distance", distance)
    defaults: dict[str, dict[str, Any]] = {
        "orbit": {"distance": distance},
        "dolly": {"offset": (0.0, 0.0, distance / 2)},
        "pan": {"degrees": 30.0},
        "spiral": {"distance": distance, "radius": distance / 5},
    }
    return TRAJECTORIES[name](start, num_frames, **{**defaults[name.removesuffix("-and-back")], **options})


def _and_back(path: Callable[..., Cameras]) -> Callable[..., Cameras]:
    return lambda start, num_frames, **options: out_and_back(lambda n: path(start, n, **options), num_frames)


TRAJECTORIES: dict[str, Callable[..., Cameras]] = {
    "orbit": orbit,
    "dolly": dolly,
    "pan": pan,
    "spiral": spiral,
    "orbit-and-back": _and_back(orbit),
    "dolly-and-back": _and_back(dolly),
    "pan-and-back": _and_back(pan),
}
"""The generated paths by name, called as `path(start, num_frames, **options)`; "-and-back" ones return."""


def _path(start: Cameras, num_frames: int, local: Callable[[float], Tensor]) -> Cameras:
    """The views at poses `local(t)` (4, 4), t from 0 to 1, given in the axes of the start camera."""
    _check_num_frames(num_frames)
    if not isinstance(start, Cameras) or len(start) != 1:
        got = f"{len(start)} views" if isinstance(start, Cameras) else type(start).__name__
        raise ValueError(f"start must be Cameras of one view, got {got}")
    steps = torch.stack([local(i / max(num_frames - 1, 1)) for i in range(num_frames)])
    origin = start.cam2world.cpu()
    poses = origin @ steps
    at_start = (steps == torch.eye(4, dtype=torch.float64)).all(2).all(1)
    poses[at_start] = origin  # a product with the identity loses the sign of -0
    return Cameras(start.intrinsics[0], poses.to(start.device), start.image_size)


def _pose(rotation: Tensor, centre: Sequence[float]) -> Tensor:
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = rotation
    pose[:3, 3] = torch.tensor(centre, dtype=torch.float64)
    return pose


def _yaw(degrees: float) -> Tensor:
    """Turn right, about y."""
    sine, cosine = _sine_cosine(degrees)
    return torch.tensor([[cosine, 0.0, sine], [0.0, 1.0, 0.0], [-sine, 0.0, cosine]], dtype=torch.float64)


def _pitch(degrees: float) -> Tensor:
    """Tilt up, about x."""
    sine, cosine = _sine_cosine(degrees)
    return torch.tensor([[1.0, 0.0, 0.0], [0.0, cosine, -sine], [0.0, sine, cosine]], dtype=torch.float64)


def _facing(x: float, y: float, z: float) -> Tensor:
    """Look along (x, y, z), z > 0, with the x axis kept level."""
    length, level = math.hypot(x, y, z), math.hypot(x, z)
    forward, right = (x / length, y / length, z / length), (z / level, 0.0, -x / level)
    # down = forward x right
    down = (
        forward[1] * right[2],
        forward[2] * right[0] - forward[0] * right[2],
        -forward[1] * right[0],
    )
    return torch.tensor([right, down, forward], dtype=torch.float64).T


def _sine_cosine(degrees: float) -> tuple[float, float]:
    """Reduced in degrees, where it is exact: multiples of 360 give 0 and 1."""
    angle = math.radians(math.remainder(degrees, 360.0))
    return math.sin(angle), math.cos(angle)


def _check_num_frames(num_frames: int) -> None:
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"num_frames must be an int >= 1, got {num_frames!r}")


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")

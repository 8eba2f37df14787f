"""nerfstudio's files: `transforms.json` in the dialects that people have, camera paths, and what ns-export writes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mirage_kernels import Cameras
from mirage_kernels.io import replace_bytes

from .reading import (
    ALLOWANCES,
    LOGGER,
    CameraFile,
    Given,
    NotThisFormat,
    PathLike,
    as_frames,
    as_image_size,
    as_number,
    as_numbers,
    as_pose,
    focal_length,
    make_cameras,
    make_cameras_of_poses,
    order_by_name,
    unify_sizes,
)

_PINHOLE = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "FULL_OPENCV", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")
_FISHEYE = ("OPENCV_FISHEYE", "FISHEYE", "FISHEYE624", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "THIN_PRISM_FISHEYE")
_COEFFICIENTS = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2", "distortion_params")
_IN_PIXELS = ("w", "h", "fl_x", "fl_y", "cx", "cy")


def load_nerfstudio(path: PathLike, image_size: Sequence[int] | None = None, *, ignore_lens: bool = False) -> Cameras:
    """Load the cameras of a nerfstudio `transforms.json`, in the order of their images' names.

    nerfstudio sorts its frames by `file_path`, as the lists of ns-process-data are in no order; so does this, with
    numbers in names by their value (r_2 before r_10). Frames that are all without a name stay in the file's order.
    Frames with `is_bad` are left out, which is logged.

    `fl_x`, `fl_y`, `cx`, `cy`, `w`, `h`, `camera_model`, `is_fisheye` and distortion may be given per file or per frame
    (a frame's own wins). Without `fl_x`, `camera_angle_x` (radians) or `x_fov` (degrees) gives it; `fl_y` defaults to
    `camera_angle_y` or `y_fov`, then to `fl_x`; the principal point to the image centre. `transform_matrix` is
    camera-to-world in OpenGL axes (x right, y up, z backward) and is converted to OpenCV axes; the world is left as it
    is. Frames of other sizes and the same aspect are brought to the size of the first.

    Args:
        image_size: (height, width), used only where the file states neither `w` and `h` nor anything in
            pixels (files of synthetic scenes that hold `camera_angle_x` alone).
        ignore_lens: take the pinhole part of a camera with distortion, a fisheye's too: for a path, where the
            lens of its source does not matter.

    Raises:
        ValueError: malformed, frames of different aspects, lens distortion or a fisheye lens unless `ignore_lens`, or a
            camera model that has no pinhole part.
    """
    file = CameraFile(Path(path), Given(image_size=image_size, ignore_lens=ignore_lens))
    try:
        return read(file)
    except NotThisFormat:
        raise file.fail(f"expected an object whose 'frames' lists objects, got {str(file.json)[:80]}") from None


def read(file: CameraFile) -> Cameras:
    """Read a `transforms.json`, see :func:`load_nerfstudio`."""
    meta = file.json
    if not isinstance(meta, dict) or "frames" not in meta:
        raise NotThisFormat("no object with 'frames'")
    frames = as_frames(file, meta["frames"], "'frames'")
    kept = [i for i, frame in enumerate(frames) if not frame.get("is_bad")]
    if len(kept) < len(frames):
        LOGGER.warning(
            "%s: %d of %d frames are marked is_bad and left out", file.path, len(frames) - len(kept), len(frames)
        )
    kept = [kept[i] for i in _order(file, [frames[i] for i in kept], kept)]
    places = [f"frames[{i}]" for i in kept]
    lenses, sizes, poses = [], [], []
    for i, place in zip(kept, places, strict=True):
        values = {**meta, **frames[i]}
        sizes.append(_size(file, place, values))
        lenses.append(_lens(file, place, values, *sizes[-1]))
        poses.append(as_pose(file, place, "transform_matrix", values.get("transform_matrix")))
    allowed = {name: meta[name] for name in ALLOWANCES if isinstance(meta.get(name), bool)}
    if not kept:
        size = _size(file, "", meta)
        return make_cameras(file, [], np.zeros((0, 4)), np.zeros((0, 4, 4)), size, **allowed)
    intrinsics, size = unify_sizes(file, places, lenses, sizes)
    return make_cameras(file, places, intrinsics, np.stack(poses), size, convention="opengl", **allowed)


def _order(file: CameraFile, frames: list[dict[str, Any]], numbers: list[int]) -> list[int]:
    """Order frames by name; as they are where none has one."""
    names = [frame.get("file_path") for frame in frames]
    if all(name is None for name in names):
        return list(range(len(frames)))
    for number, name in zip(numbers, names, strict=True):
        if not isinstance(name, str):
            raise file.fail(
                f"file_path must be a name, as of the other frames, got {repr(name)[:80]}", f"frames[{number}]"
            )
    return order_by_name([str(name) for name in names])


def _size(file: CameraFile, place: str, values: dict[str, Any]) -> tuple[int, int]:
    in_pixels = [key for key in _IN_PIXELS if key in values]
    given = file.given.file_size if in_pixels else file.given.size
    if "w" in values and "h" in values:
        return as_image_size(file, place, values["h"], values["w"])
    if given is not None and "w" not in values and "h" not in values:
        return given[0], given[1]
    stated = f"only {', '.join(in_pixels)}" if in_pixels else "neither, and no image_size (height, width)"
    raise file.fail(f"expected w and h, got {stated}", place)


def _lens(file: CameraFile, place: str, values: dict[str, Any], height: int, width: int) -> np.ndarray:
    """Return fx, fy, cx, cy of a frame, once it is known that its lens is a pinhole's or may be ignored."""
    _check_lens(file, place, values)

    def number(key: str, default: float | None = None) -> float | None:
        return as_number(file, place, key, values[key]) if key in values else default

    def focal(axis: str, side: int) -> float | None:
        if f"fl_{axis}" in values:
            return number(f"fl_{axis}")
        for key, degrees, unit in (
            (f"camera_angle_{axis}", 180 / math.pi, "(0, pi) radians"),
            (f"{axis}_fov", 1.0, "(0, 180) degrees"),
        ):
            angle = number(key)
            if angle is not None:
                if not 0 < angle * degrees < 180:
                    raise file.fail(f"{key} must be in {unit}, got {angle:g}", place)
                return 0.5 * side / math.tan(0.5 * angle) if degrees != 1.0 else focal_length(angle, side)
        return None

    fx, fy = focal("x", width), focal("y", height)
    if fx is None:
        raise file.fail("expected fl_x, camera_angle_x or x_fov, got none", place)
    return np.array([fx, fx if fy is None else fy, number("cx", width / 2), number("cy", height / 2)])


def _check_lens(file: CameraFile, place: str, values: dict[str, Any]) -> None:
    model, ignored = values.get("camera_model", "PINHOLE"), file.given.ignore_lens
    known = model.upper() if isinstance(model, str) else model
    if known not in (*_PINHOLE, *_FISHEYE):
        raise file.fail(f"camera_model must be one of {', '.join(_PINHOLE)}, got {repr(model)[:80]}", place)
    if (values.get("is_fisheye") or known in _FISHEYE) and not ignored:
        got = "is_fisheye" if values.get("is_fisheye") else f"camera_model {model!r}"
        raise file.fail(
            f"expected a pinhole camera (ignore_lens=True takes a fisheye's pose and focal length), got {got}", place
        )
    distortion = {key: values[key] for key in _COEFFICIENTS if _is_there(values.get(key, 0))}
    if distortion and not ignored:
        expected = "expected no distortion (undistort the images, or ignore_lens=True for a path)"
        raise file.fail(f"{expected}, got {str(distortion)[:200]}", place)


def _is_there(coefficient: Any) -> bool:
    """Return whether a coefficient, a number or a list of them, is anything but 0 or null."""
    if isinstance(coefficient, list):
        return any(map(_is_there, coefficient))
    return coefficient is not None and coefficient != 0


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
    replace_bytes(path, (json.dumps(meta, indent=1) + "\n").encode())


def read_path(file: CameraFile) -> Cameras:
    """Read a camera path of nerfstudio's viewer: OpenGL axes, vertical fields of view in degrees."""
    meta = file.json
    if not isinstance(meta, dict) or "camera_path" not in meta:
        raise NotThisFormat("no object with 'camera_path'")
    frames = as_frames(file, meta["camera_path"], "'camera_path'")
    kind = meta.get("camera_type", "perspective")
    if not isinstance(kind, str) or kind.lower() != "perspective":
        raise file.fail(f"camera_type must be 'perspective', got {repr(kind)[:80]}")
    height, width = as_image_size(file, "", meta.get("render_height"), meta.get("render_width"))
    places, lenses, poses = [f"camera_path[{i}]" for i in range(len(frames))], [], []
    for place, frame in zip(places, frames, strict=True):
        fov = as_number(file, place, "fov", frame.get("fov"))
        if not 0 < fov < 180:
            raise file.fail(f"fov must be degrees between 0 and 180, got {fov:g}", place)
        focal = focal_length(fov, height)
        lenses.append([focal, focal, width / 2, height / 2])
        poses.append(as_pose(file, place, "camera_to_world", frame.get("camera_to_world")))
    if not frames:
        raise file.fail("'camera_path' must list cameras, got none")
    return make_cameras(file, places, np.array(lenses), np.stack(poses), (height, width), convention="opengl")


def read_export(file: CameraFile) -> Cameras:
    """Read the poses that `ns-export cameras` writes, 3x4 in OpenGL axes; the lens is given beside the file."""
    if not isinstance(file.json, list):
        raise NotThisFormat("no list")
    frames = as_frames(file, file.json, "the file")
    if not frames or not all("transform" in frame for frame in frames):
        raise NotThisFormat("no list of objects with 'transform'")
    order = _order(file, frames, list(range(len(frames))))
    places = [f"frame {i}" for i in order]
    matrices = [
        as_numbers(file, place, "transform", frames[i]["transform"], (3, 4), (4, 4))[:3]
        for i, place in zip(order, places, strict=True)
    ]
    return make_cameras_of_poses(file, places, np.stack(matrices), convention="opengl")

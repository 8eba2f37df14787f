"""What all readers of camera files share: the file, what it does not say itself, and how its numbers become `Cameras`.

A reader raises `NotThisFormat` for the content of another format, and a ValueError that names the file and the place
in it for content that is malformed.
"""

from __future__ import annotations

import json
import logging
import math
import operator
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mirage_kernels import Cameras

PathLike = str | os.PathLike[str]
LOGGER = logging.getLogger("mirage.scenes.camera_files")
ALLOWANCES = ("square_pixels", "off_center")  # of `Cameras`, which files say where they need them
POSES = ("cam2world", "world2cam")
MOST_TEXT = 2**28  # bytes of a text file: a camera file of a million views


class NotThisFormat(ValueError):
    """The content is of another format; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is given beside the file, see `load_trajectory`."""

    image_size: Sequence[int] | None = None
    file_size: Sequence[int] | None = None
    fov: float | None = None
    intrinsics: Any = None
    convention: str | None = None
    poses: str | None = None
    camera: str | None = None
    pixel_centers: str = "half"
    normalized: bool = False
    ignore_lens: bool = False
    square_pixels: bool = True
    off_center: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "file_size"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _as_size(name, getattr(self, name)))
        if self.fov is not None and not 0 < self.fov < 180:
            raise ValueError(f"fov must be degrees between 0 and 180, got {self.fov:g}")
        if self.fov is not None and self.intrinsics is not None:
            raise ValueError("fov and intrinsics must not both be given")
        for name, values in (("poses", POSES), ("convention", ("opencv", "opengl"))):
            if getattr(self, name) not in (None, *values):
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) for what is relative to an image, as an angle is."""
        size = self.file_size or self.image_size
        return None if size is None else (size[0], size[1])


@dataclass(frozen=True)
class CameraFile:
    """A file or folder of cameras, read once however many formats are tried, and what is given beside it."""

    path: Path
    given: Given = field(default_factory=Given)

    @cached_property
    def text(self) -> str:
        """The content, UTF-8 with or without a byte order mark."""
        if self.path.stat().st_size > MOST_TEXT:
            raise ValueError(f"{self.path}: expected a text file of at most {MOST_TEXT >> 20} MiB")
        try:
            return self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: expected UTF-8 text, got {error}") from None

    @cached_property
    def json(self) -> Any:
        try:
            return json.loads(self.text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}, line {error.lineno}: expected JSON, got {error.msg}") from None
        except RecursionError:
            raise ValueError(f"{self.path}: expected JSON of a few levels, got too many") from None
        except ValueError as error:  # a number of thousands of digits
            raise ValueError(f"{self.path}: expected JSON, got: {error}") from None

    @cached_property
    def rows(self) -> list[tuple[int, list[str]]]:
        """Lines that are neither blank nor comments: their numbers from 1, and their columns.

        Columns are separated by blanks, or by commas with or without them.
        """
        found = []
        for number, line in enumerate(self.text.split("\n"), 1):
            line = line.strip()
            if line and not line.startswith("#"):
                commas = "," in line
                columns = line.rstrip(",").split(",") if commas else line.split()
                found.append((number, [column.strip() for column in columns]))
        return found

    def fail(self, message: str, place: str = "") -> ValueError:
        return ValueError(f"{self.path}{f', {place}' if place else ''}: {message}")


def _as_size(name: str, size: Any) -> tuple[int, int]:
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be two ints (height, width), got {size!r}") from None
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be a positive (height, width), got {(height, width)}")
    return height, width


def is_number(text: str) -> bool:
    """Return whether the text is a number; NaN and infinity are, and are refused later."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_table(file: CameraFile, columns: Sequence[int], skip: int = 0) -> tuple[np.ndarray, list[str]]:
    """Read rows of one of these numbers of columns, (N, columns) float64, and the place of each.

    Raises:
        NotThisFormat: the first row has another number of columns, or there is none.
        ValueError: a later row has.
    """
    rows = file.rows[skip:]
    expected = " or ".join(map(str, columns))
    if not rows:
        raise NotThisFormat(f"no rows of {expected} numbers")
    first, width = rows[0][0], len(rows[0][1])
    if width not in columns:
        raise NotThisFormat(f"line {first} has {width} columns, not {expected}")
    for number, row in rows:
        if len(row) != width:
            raise file.fail(f"expected {width} columns as in line {first}, got {len(row)}", f"line {number}")
        if not all(map(is_number, row)):
            raise file.fail(f"expected {width} numbers, got {' '.join(row)[:80]!r}", f"line {number}")
    table = np.array([[float(column) for column in row] for _, row in rows], dtype=np.float64)
    return table, [f"line {number}" for number, _ in rows]


def as_number(file: CameraFile, place: str, name: str, value: Any) -> float:
    """Return a number of a JSON file as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise file.fail(f"{name} must be a number, got {repr(value)[:80]}", place)
    try:
        return float(value)
    except OverflowError:
        raise file.fail(f"{name} must be a number of float64, got one of {len(str(value))} digits", place) from None


def as_numbers(file: CameraFile, place: str, name: str, value: Any, *shapes: tuple[int, ...]) -> np.ndarray:
    """Return nested lists of numbers of a JSON file as float64 of one of these shapes."""
    try:
        array = np.array(value)
        if array.shape in shapes and array.dtype.kind in "if":
            return array.astype(np.float64)
    except (ValueError, OverflowError, RecursionError):  # ragged, or too deep
        pass
    expected = " or ".join(" x ".join(map(str, shape)) for shape in shapes)
    raise file.fail(f"{name} must be {expected} numbers, got {str(value)[:80]}", place)


def as_pose(file: CameraFile, place: str, name: str, value: Any) -> np.ndarray:
    """Return a pose of a JSON file (4, 4), given as 4 x 4, 3 x 4, 16 or 12 numbers."""
    array = as_numbers(file, place, name, value, (4, 4), (3, 4), (16,), (12,)).reshape(-1, 4)
    return array if len(array) == 4 else np.concatenate([array, [[0.0, 0.0, 0.0, 1.0]]])


def as_image_size(file: CameraFile, place: str, height: Any, width: Any) -> tuple[int, int]:
    """Return (height, width) of a JSON file, whole numbers that may be written as floats."""
    rows, columns = as_number(file, place, "h", height), as_number(file, place, "w", width)
    if not (rows.is_integer() and columns.is_integer() and 0 < rows < 2**31 and 0 < columns < 2**31):
        raise file.fail(f"w and h must be positive integers, got {columns:g} and {rows:g}", place)
    return int(rows), int(columns)


def as_frames(file: CameraFile, value: Any, name: str) -> list[dict[str, Any]]:
    """Return a JSON list of objects."""
    if not isinstance(value, list) or not all(isinstance(frame, dict) for frame in value):
        raise NotThisFormat(f"{name} lists no objects")
    return value


def quaternion_to_rotation(file: CameraFile, places: Sequence[str], wxyz: np.ndarray) -> np.ndarray:
    """Turn quaternions (N, 4), w first, of about unit length into rotations (N, 3, 3)."""
    with np.errstate(all="ignore"):
        length = np.sqrt((wxyz * wxyz).sum(1))
        bad = ~(np.abs(length - 1) <= 0.05)
    if bad.any():
        i = int(bad.argmax())
        raise file.fail(f"expected a unit quaternion, got {wxyz[i].tolist()}", places[i])
    w, x, y, z = (wxyz / length[:, None]).T
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, -1) for row in rows], -2)


def join_poses(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """Join (N, 3, 3) and (N, 3) to (N, 4, 4)."""
    poses = np.tile(np.eye(4), (len(rotation), 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = rotation, translation
    return poses


def order_by_name(names: Sequence[str]) -> list[int]:
    """Order by file name, numbers in it by their value: r_2 before r_10."""

    def key(i: int) -> list[Any]:
        parts = re.split("([0-9]+)", names[i])
        parts[1::2] = [f"{len(digits):09}{digits}" for digits in (part.lstrip("0") for part in parts[1::2])]
        return parts

    return sorted(range(len(names)), key=key)


def focal_length(degrees: float, side: float) -> float:
    """Return the focal length in pixels of a field of view across so many pixels."""
    return 0.5 * side / math.tan(math.radians(degrees) / 2)


def make_cameras(
    file: CameraFile,
    places: Sequence[str],
    intrinsics: Any,
    poses: Any,
    size: Sequence[int],
    *,
    world2cam: bool = False,
    convention: str = "opencv",
    **options: Any,
) -> Cameras:
    """Make `Cameras`; an error about view i names `places[i]` of the file."""
    given = file.given
    if given.fov is not None or given.intrinsics is not None:
        raise file.fail("fov and intrinsics must not be given: the file has its own")
    return _make(file, places, intrinsics, poses, size, world2cam, convention, options)


def make_cameras_of_poses(
    file: CameraFile, places: Sequence[str], poses: Any, *, world2cam: bool = False, convention: str = "opencv"
) -> Cameras:
    """Make `Cameras` of a file of poses alone, with the lens that is given beside it."""
    given, size = file.given, file.given.size
    if given.fov is None and given.intrinsics is None:
        raise file.fail("fov (horizontal, in degrees) or intrinsics must be given: the file holds poses alone")
    if size is None:
        raise file.fail("image_size must be (height, width) as the file has none, got None")
    if given.intrinsics is not None:
        return _make(file, places, given.intrinsics, poses, size, world2cam, convention, {})
    assert given.fov is not None
    focal = focal_length(given.fov, size[1])
    lens = np.array([focal, focal, size[1] / 2, size[0] / 2])
    options = {"pixel_centers": "half", "normalized": False}
    return _make(file, places, lens, poses, size, world2cam, convention, options)


def _make(
    file: CameraFile,
    places: Sequence[str],
    intrinsics: Any,
    poses: Any,
    size: Sequence[int],
    world2cam: bool,
    convention: str,
    options: dict[str, Any],
) -> Cameras:
    given = file.given
    named: dict[str, Any] = {name: getattr(given, name) for name in ("pixel_centers", "normalized", *ALLOWANCES)}
    make: Callable[..., Cameras] = Cameras.from_w2c if world2cam else Cameras.from_c2w
    try:
        return make(intrinsics, poses, size, convention=convention, **{**named, **options})
    except (TypeError, ValueError) as error:
        view = re.match(r"\w+\[(\d+)\]", str(error))
        place = f", {places[int(view[1])]}" if view and int(view[1]) < len(places) else ""
        raise ValueError(f"{file.path}{place}: {error}") from None


def unify_sizes(
    file: CameraFile, places: Sequence[str], lenses: list[np.ndarray], sizes: list[tuple[int, int]]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Bring intrinsics [fx, fy, cx, cy] of images of one aspect to the size of the first.

    Raises:
        ValueError: images of different aspects.
    """
    height, width = sizes[0]
    scaled = []
    for place, lens, (rows, columns) in zip(places, lenses, sizes, strict=True):
        if abs(rows * width - height * columns) > 0.01 * height * columns:
            expected = f"images of one aspect, {height}x{width} as before (height x width)"
            raise file.fail(f"expected {expected}, got {rows}x{columns}", place)
        scaled.append(lens * (width / columns, height / rows, width / columns, height / rows))
    return np.stack(scaled), sizes[0]

"""COLMAP's sparse models: `images` and `cameras`, as text or binary, in a folder such as `sparse/0`.

Of `images` the poses are read, of `cameras` the pinhole part; points are skipped. Every count that a binary file
declares is compared with its length before anything is read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mirage_kernels import Cameras

from .reading import (
    CameraFile,
    NotThisFormat,
    is_number,
    join_poses,
    make_cameras,
    order_by_name,
    quaternion_to_rotation,
    unify_sizes,
)


class _Model(NamedTuple):
    """Name a camera model, count its parameters and the focal lengths among them, and say if it is a fisheye's.

    The parameters begin with one or two focal lengths and the principal point; what follows is distortion.
    """

    name: str
    parameters: int
    focals: int
    fisheye: bool = False


_MODELS = (  # by COLMAP's numbers
    _Model("SIMPLE_PINHOLE", 3, 1),
    _Model("PINHOLE", 4, 2),
    _Model("SIMPLE_RADIAL", 4, 1),
    _Model("RADIAL", 5, 1),
    _Model("OPENCV", 8, 2),
    _Model("OPENCV_FISHEYE", 8, 2, True),
    _Model("FULL_OPENCV", 12, 2),
    _Model("FOV", 5, 2),
    _Model("SIMPLE_RADIAL_FISHEYE", 4, 1, True),
    _Model("RADIAL_FISHEYE", 5, 1, True),
    _Model("THIN_PRISM_FISHEYE", 12, 2, True),
    _Model("RAD_TAN_THIN_PRISM_FISHEYE", 16, 2, True),
)
_NAMED = {model.name: model for model in _MODELS}
_FOLDERS = ("", "sparse/0", "sparse", "colmap/sparse/0")  # where a model is looked for in a folder that is given
_LONGEST_NAME = 4096


class _Image(NamedTuple):
    place: str
    name: str
    camera: int
    quaternion: tuple[float, ...]  # w first, world to camera
    translation: tuple[float, ...]


class _Camera(NamedTuple):
    place: str
    model: _Model
    width: int
    height: int
    parameters: tuple[float, ...]


def read(file: CameraFile) -> Cameras:
    """Read a COLMAP model, in the order of its images' names with numbers by their value.

    The path is the folder of the model, one above it as `sparse/0` is looked for, or one of its files. Where both are
    there, binary files are taken, as COLMAP does.
    """
    images_path, cameras_path = _find(file)
    images = [*(_read_images if images_path.suffix == ".bin" else _parse_images)(images_path)]
    lenses = dict((_read_cameras if cameras_path.suffix == ".bin" else _parse_cameras)(cameras_path))
    if not images:
        raise ValueError(f"{images_path}: expected images, got none")
    images = [images[i] for i in order_by_name([image.name for image in images])]
    places = [image.place for image in images]
    source = CameraFile(images_path, file.given)
    intrinsics, sizes = [], []
    for image in images:
        camera = lenses.get(image.camera)
        if camera is None:
            raise source.fail(
                f"camera {image.camera} must be in {cameras_path.name}, got {str(sorted(lenses))[:80]}", image.place
            )
        intrinsics.append(_lens(CameraFile(cameras_path, file.given), camera))
        sizes.append((camera.height, camera.width))
    matrices, size = unify_sizes(source, places, intrinsics, sizes)
    rotation = quaternion_to_rotation(source, places, np.array([image.quaternion for image in images]))
    world2cam = join_poses(rotation, np.array([image.translation for image in images]))
    return make_cameras(source, places, matrices, world2cam, size, world2cam=True)


def _find(file: CameraFile) -> tuple[Path, Path]:
    """Find the files of images and cameras."""
    path = file.path
    if path.is_dir():
        for folder in (path / name for name in _FOLDERS):
            for suffix in (".bin", ".txt"):
                if (folder / f"images{suffix}").is_file() and (folder / f"cameras{suffix}").is_file():
                    return folder / f"images{suffix}", folder / f"cameras{suffix}"
        raise NotThisFormat("no images.bin and cameras.bin, nor .txt, in it or its sparse/0")
    if path.suffix == ".txt" and path.stem not in ("images", "cameras"):
        raise NotThisFormat("a COLMAP model is images.txt and cameras.txt")
    if path.stem not in ("images", "cameras"):
        raise NotThisFormat("a COLMAP model is images.bin and cameras.bin")
    found = []
    for name in ("images", "cameras"):
        suffixes = (path.suffix, ".bin" if path.suffix == ".txt" else ".txt")
        here = [path.with_name(name + suffix) for suffix in suffixes]
        there = [one for one in here if one.is_file()]
        if not there:
            if path.stem == "images" and path.is_file():
                raise NotThisFormat(f"no {here[0].name} beside it")
            raise FileNotFoundError(f"{here[0]}: no such file")
        found.append(there[0])
    return found[0], found[1]


def _lens(file: CameraFile, camera: _Camera) -> np.ndarray:
    """Return fx, fy, cx, cy, once it is known that the lens is a pinhole's or may be ignored."""
    model = camera.model
    distortion = camera.parameters[model.focals + 2 :]
    if not file.given.ignore_lens:
        if model.fisheye:
            expected = "expected a pinhole camera (ignore_lens=True takes a fisheye's pose and focal length)"
            raise file.fail(f"{expected}, got {model.name}", camera.place)
        if any(distortion):
            expected = "expected no distortion (undistort the images, or ignore_lens=True for a path)"
            raise file.fail(f"{expected}, got {model.name} {list(distortion)}", camera.place)
    focal = camera.parameters[: model.focals]
    return np.array([focal[0], focal[-1], *camera.parameters[model.focals : model.focals + 2]])


def _parse_images(path: Path) -> Iterator[_Image]:
    """Read images.txt by lines: of the two of an image, the second lists points and may be very long, or missing."""
    after_pose = False
    for number, line in _lines(path):
        fields = line.split(maxsplit=9)
        if after_pose and (not fields or _lists_points(line)):
            after_pose = False
            continue
        if not fields:
            continue
        after_pose = True
        if len(fields) < 10 or not all(map(is_number, fields[:8])) or not fields[8].isdecimal() or len(fields[8]) > 18:
            expected = "IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME"
            raise ValueError(f"{path}, line {number}: expected {expected}, got {line.strip()[:80]!r}")
        values = tuple(map(float, fields[1:8]))
        yield _Image(f"line {number}", fields[9].strip(), int(fields[8]), values[:4], values[4:])


def _lists_points(line: str) -> bool:
    """Return whether a line is X, Y, POINT3D_ID of any number of points, by its first columns."""
    fields = line[:4096].split()
    whole = len(line) <= 4096
    return (
        (not whole or len(fields) % 3 == 0) and all(map(is_number, fields[:9])) and (not whole or is_number(fields[-1]))
    )


def _parse_cameras(path: Path) -> Iterator[tuple[int, _Camera]]:
    for number, line in _lines(path):
        fields, place = line.split(), f"line {number}"
        if not fields:
            continue
        model = _NAMED.get(fields[1]) if len(fields) > 1 else None
        if len(fields) < 4 or not all(field.isdecimal() and len(field) < 10 for field in (fields[0], *fields[2:4])):
            raise ValueError(
                f"{path}, {place}: expected CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS, got {line.strip()[:80]!r}"
            )
        if model is None:
            raise ValueError(f"{path}, {place}: expected a model of {', '.join(_NAMED)}, got {fields[1][:80]!r}")
        if len(fields) != 4 + model.parameters or not all(map(is_number, fields[4:])):
            expected, got = f"{model.parameters} numbers of {model.name}", " ".join(fields[4:])[:80]
            raise ValueError(f"{path}, {place}: expected {expected}, got {got!r}")
        width, height = int(fields[2]), int(fields[3])
        yield (
            int(fields[0]),
            _Camera(place, model, *_checked(path, place, width, height), tuple(map(float, fields[4:]))),
        )


def _checked(path: Path, place: str, width: int, height: int) -> tuple[int, int]:
    if not (0 < width < 2**31 and 0 < height < 2**31):
        raise ValueError(f"{path}, {place}: expected a positive width and height, got {width} and {height}")
    return width, height


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read lines, without comments, and their numbers from 1."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.lstrip().startswith("#"):
                    yield number, line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error}") from None


class _Binary:
    """A binary file of which nothing is read that is not there."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.left = os.fstat(file.fileno()).st_size

    def unpack(self, layout: str, what: str) -> tuple[float, ...]:
        size = struct.calcsize(f"<{layout}")
        if size > self.left:
            raise self.short(what)
        self.left -= size
        return struct.unpack(f"<{layout}", self.file.read(size))

    def count(self, least: int, what: str) -> int:
        """Read how many of something follow, each of at least so many bytes."""
        count = int(self.unpack("Q", what)[0])
        if count * least > self.left:
            raise ValueError(
                f"{self.path}: expected {count} {what}, got {self.left} bytes that are left: was it cut short?"
            )
        return count

    def name(self, what: str) -> str:
        """Read a name that ends with a zero byte."""
        content = self.file.read(min(_LONGEST_NAME, self.left))
        end = content.find(b"\0")
        if end < 0:
            raise self.short(what)
        self.file.seek(end + 1 - len(content), os.SEEK_CUR)
        self.left -= end + 1
        return content[:end].decode(errors="replace")

    def skip(self, size: int) -> None:
        self.file.seek(size, os.SEEK_CUR)
        self.left -= size

    def short(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: expected {what}, got the end of the file: was it cut short?")


def _read_images(path: Path) -> Iterator[_Image]:
    with open(path, "rb") as opened:
        file = _Binary(path, opened)
        for i in range(file.count(4 + 7 * 8 + 4 + 1 + 8, "images")):
            what = f"image {i}"
            numbers = file.unpack("I7dI", what)
            name = file.name(what)
            yield _Image(what, name, int(numbers[8]), numbers[1:5], numbers[5:8])
            file.skip(24 * file.count(24, f"points of {what}"))


def _read_cameras(path: Path) -> Iterator[tuple[int, _Camera]]:
    with open(path, "rb") as opened:
        file = _Binary(path, opened)
        for i in range(file.count(4 + 4 + 8 + 8 + 3 * 8, "cameras")):
            what = f"camera {i}"
            identity, number, width, height = map(int, file.unpack("IiQQ", what))
            if not 0 <= number < len(_MODELS):
                raise ValueError(f"{path}, {what}: expected a model from 0 to {len(_MODELS) - 1}, got {number}")
            model = _MODELS[number]
            width, height = _checked(path, what, width, height)
            yield identity, _Camera(what, model, width, height, file.unpack(f"{model.parameters}d", what))

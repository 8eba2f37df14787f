"""Arrays of cameras: our own .npz, those of VGGT, GEN3C and others, and .npy of poses.

Headers are read before arrays: only arrays of the right shape are, each at the size that its header declares. Nothing
is unpickled.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mirage_kernels import Cameras
from mirage_kernels.io import replace_bytes

from .reading import ALLOWANCES, CameraFile, PathLike, make_cameras, make_cameras_of_poses

# Names of poses, by what they are; the first that is there is taken.
_WORLD2CAM = ("w2c", "world2cam", "world_to_camera", "extrinsic", "extrinsics", "viewmats")
_CAM2WORLD = ("cam2world", "c2w", "cam_c2w", "camera_to_world", "camera_poses", "pose", "poses")
_INTRINSICS = ("intrinsics", "intrinsic", "K", "Ks")
_IMAGES = {"depth": (1, 2), "images": (-2, -1), "world_points": (1, 2)}  # and where their (height, width) is
_OPENING_BYTES = 2**16  # of a header
_NO_ARCHIVE = (EOFError, OSError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


class _Archive:
    """The arrays of an .npz file, of which headers are read at once and contents when asked for."""

    def __init__(self, file: CameraFile) -> None:
        self.file = file
        try:
            self.zip = zipfile.ZipFile(file.path)
            self.headers = {}
            for name in self.zip.namelist():
                if name.endswith(".npy"):
                    with self.zip.open(name) as stream:
                        self.headers[name[:-4]] = _read_header(io.BytesIO(stream.read(_OPENING_BYTES)))
        except _NO_ARCHIVE as error:
            raise self._no_arrays(error) from None

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def read(self, name: str, fits: Callable[[tuple[int, ...]], bool], expected: str) -> np.ndarray:
        """Read an array whose shape fits."""
        header = self.headers[name]
        if header.dtype.hasobject:
            raise self._no_arrays("Object arrays cannot be loaded: they are pickles")
        if not fits(header.shape):
            raise self.file.fail(f"{name} must be {expected}, got {header.shape}")
        try:
            with self.zip.open(f"{name}.npy") as stream:
                return _read_array(stream)
        except _NO_ARCHIVE as error:
            raise self._no_arrays(error) from None

    def _no_arrays(self, error: object) -> ValueError:
        return self.file.fail(f"expected an .npz of plain arrays, got: {error}")


def _read_header(stream: Any) -> _Header:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return _Header(*read(stream))


def _read_array(stream: Any) -> np.ndarray:
    """Read an array, of which no more is allocated than is there."""
    header = _read_header(stream)
    size = math.prod(header.shape) * header.dtype.itemsize
    content = stream.read(size + 1)
    if len(content) != size:
        raise ValueError(f"an array of {size} bytes by its header, and another number in the file")
    array = np.frombuffer(content, header.dtype)
    return array.reshape(header.shape, order="F" if header.fortran else "C")


def _are_poses(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and shape[-2:] in ((3, 4), (4, 4))


def _are_lenses(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 1 and (shape[-2:] == (3, 3) or shape[-1:] == (4,))


def read(file: CameraFile) -> Cameras:
    """Read an .npz: intrinsics, poses by a name that says which way round they are, and the size of the images.

    The size is `image_size` (height, width); or that of `depth`, `images` or `world_points`, of which only the headers
    are read, as VGGT's predictions hold them; or given beside the file.
    """
    with open(file.path, "rb"):
        pass  # an OSError with the path's name
    archive = _Archive(file)
    try:
        return _read(file, archive)
    finally:
        archive.zip.close()


def _read(file: CameraFile, archive: _Archive) -> Cameras:
    poses_name = next((name for name in (*_CAM2WORLD, *_WORLD2CAM) if name in archive), None)
    lens_name = next((name for name in _INTRINSICS if name in archive), None)
    if poses_name is None or lens_name is None:
        missing = [name for name, found in (("intrinsics", lens_name), ("cam2world", poses_name)) if found is None]
        raise file.fail(
            f"expected the arrays intrinsics (or {', '.join(_INTRINSICS[1:])}) and poses"
            f" ({', '.join(_CAM2WORLD)}; {', '.join(_WORLD2CAM)}), got no {' and no '.join(missing)}"
            f" in {_names(archive)}"
        )
    if file.given.poses not in (None, "world2cam" if poses_name in _WORLD2CAM else "cam2world"):
        raise file.fail(f"poses must not be {file.given.poses!r}: {poses_name} says which way round it is")
    poses = archive.read(poses_name, _are_poses, "(..., 3, 4) or (..., 4, 4)")
    poses = poses[None] if poses.ndim == 2 else poses
    matrices = archive.read(lens_name, _are_lenses, "(..., 3, 3) or (..., 4)")
    views = math.prod(poses.shape[:-2])
    places = [f"view {i}" for i in range(views)]
    allowed = {name: bool(archive.read(name, lambda s: s == (), "one bool")) for name in ALLOWANCES if name in archive}
    convention = file.given.convention or "opencv"
    world2cam = poses_name in _WORLD2CAM
    size: Any = _find_size(file, archive)
    return make_cameras(file, places, matrices, poses, size, world2cam=world2cam, convention=convention, **allowed)


def _names(archive: _Archive) -> str:
    return ", ".join(archive.headers)[:200] or "it"


def _find_size(file: CameraFile, archive: _Archive) -> Any:
    if "image_size" in archive:
        return archive.read("image_size", lambda shape: math.prod(shape) <= 4, "(height, width)").tolist()
    if file.given.file_size is not None:
        return file.given.file_size
    for name, axes in _IMAGES.items():
        shape = archive.headers[name].shape if name in archive else ()
        if len(shape) in (3, 4):
            return [shape[axis] for axis in axes]
    if file.given.normalized and file.given.image_size is not None:
        return file.given.image_size
    expected = "the (height, width) that intrinsics are in pixels of"
    raise file.fail(f"file_size must be {expected}: the file holds no image_size")


def read_poses(file: CameraFile) -> Cameras:
    """Read an .npy of poses (T, 4, 4) or (T, 3, 4), camera-to-world in OpenCV axes unless given otherwise."""
    with open(file.path, "rb") as stream:
        array = _load_npy(file, stream)
    given = file.given
    places = [f"view {i}" for i in range(math.prod(array.shape[:-2]))]
    world2cam, convention = given.poses == "world2cam", given.convention or "opencv"
    return make_cameras_of_poses(file, places, array, world2cam=world2cam, convention=convention)


def _load_npy(file: CameraFile, stream: BinaryIO) -> np.ndarray:
    try:
        header = _read_header(stream)
        if not _are_poses(header.shape):
            raise ValueError(f"poses must be (..., 3, 4) or (..., 4, 4), got {header.shape}")
        if header.dtype.hasobject:
            raise ValueError("Object arrays cannot be loaded: they are pickles")
        stream.seek(0)
        return _read_array(stream)
    except (EOFError, ValueError) as error:
        raise file.fail(f"expected an .npy of poses, got: {error}") from None


def load_npz(path: PathLike) -> Cameras:
    """Load an .npz that states its image size, see `load_trajectory` for those that do not.

    Raises:
        ValueError: no plain arrays `intrinsics`, `cam2world` and `image_size`, or those of other systems.
    """
    return read(CameraFile(Path(path)))


def save_npz(path: PathLike, cameras: Cameras) -> None:
    """Write an .npz with `intrinsics`, `cam2world` (float64) and `image_size`; reading it back is exact."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: getattr(cameras, name).cpu().numpy() for name in ("intrinsics", "cam2world")}
    arrays |= {"image_size": np.array(cameras.image_size), **cameras.allowances}
    np.savez(buffer, **arrays)
    replace_bytes(path, buffer.getvalue())

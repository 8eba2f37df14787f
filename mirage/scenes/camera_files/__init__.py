"""Camera files: readers of the formats that people have, and writers of three that round-trip.

The format is told by the content, never by a guess between two; an error names the formats that were tried and why each
was not it. A malformed file is a ValueError that names the file, the line or key, what was expected and what came.
Conventions that a format does not fix are named arguments. Writers replace the file atomically.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mirage_kernels import Cameras

from . import arrays, colmap, nerfstudio, poses, realestate10k, world_models
from .arrays import load_npz, save_npz
from .nerfstudio import load_nerfstudio, save_nerfstudio
from .reading import CameraFile, Given, NotThisFormat, PathLike
from .realestate10k import load_realestate10k, save_realestate10k

__all__ = [
    "FORMATS",
    "Given",
    "load_nerfstudio",
    "load_npz",
    "load_realestate10k",
    "load_trajectory",
    "read_cameras",
    "save_nerfstudio",
    "save_npz",
    "save_realestate10k",
    "save_trajectory",
]


class _Format(NamedTuple):
    """A reader, the suffixes of its files ("" is a folder), and the conventions that it does not fix."""

    read: Callable[[CameraFile], Cameras]
    suffixes: tuple[str, ...]
    open_to: tuple[str, ...] = ()


_TEXT, _OPEN = (".txt", ".csv", ".tum"), ("poses", "convention")


def _read_matrices(file: CameraFile) -> Cameras:
    """Read matrices in any kind of file."""
    suffix = file.path.suffix.lower()
    read = {".npy": arrays.read_poses, ".json": poses.read_list}.get(suffix, poses.read_blocks)
    return read(file)


FORMATS: dict[str, _Format] = {
    "colmap": _Format(colmap.read, ("", ".txt", ".bin")),
    "realestate10k": _Format(realestate10k.read, _TEXT),
    "tum": _Format(poses.read_tum, _TEXT),
    "kitti": _Format(poses.read_kitti, _TEXT, _OPEN),
    "replica": _Format(poses.read_replica, _TEXT, _OPEN),
    "nerfstudio": _Format(nerfstudio.read, ("", ".json")),
    "nerfstudio-path": _Format(nerfstudio.read_path, (".json",)),
    "nerfstudio-export": _Format(nerfstudio.read_export, (".json",)),
    "3dgs": _Format(world_models.read_splatting, (".json",)),
    "recammaster": _Format(world_models.read_recammaster, (".json",), ("camera",)),
    "worldplay": _Format(world_models.read_worldplay, (".json",)),
    "worldscore": _Format(world_models.read_worldscore, (".json",)),
    "matrices": _Format(_read_matrices, (*_TEXT, ".json", ".npy"), _OPEN),
    "npz": _Format(arrays.read, (".npz",), _OPEN),
}
"""The formats by name: a reader, the suffixes that it is tried for, and which conventions may be given."""


def load_trajectory(
    path: PathLike,
    image_size: Sequence[int] | None = None,
    *,
    format: str | None = None,
    file_size: Sequence[int] | None = None,
    fov: float | None = None,
    intrinsics: Any = None,
    convention: str | None = None,
    poses: str | None = None,
    camera: str | None = None,
    pixel_centers: str = "half",
    normalized: bool = False,
    ignore_lens: bool = False,
    square_pixels: bool = True,
    off_center: bool = False,
) -> Cameras:
    """Load the cameras of a file or a folder in one of the formats of `FORMATS`, for images of `image_size`.

    Args:
        image_size: (height, width) of the images that the cameras are wanted for, of the file's aspect; None leaves
            them at the size that the file states. Where it states none, angles and fractions are of this size.
        format: one of `FORMATS`; None tries those that the suffix suits.
        file_size: (height, width) that a file's pixels refer to, where it does not say so itself.
        fov: horizontal field of view in degrees, for files of poses alone.
        intrinsics: (3, 3), (T, 3, 3) or fx, fy, cx, cy in pixels of `file_size` or `image_size`, for the same.
        convention: axes of the cameras, "opencv" or "opengl", for formats that do not fix them (default "opencv").
        poses: "cam2world" or "world2cam", for lists of matrices (default "cam2world").
        camera: name of the camera, for files that hold several.
        pixel_centers: "half" or "integer", as of :meth:`mirage_kernels.Cameras.from_c2w`, of intrinsics in pixels.
        normalized: intrinsics are fractions of width and height.
        ignore_lens: take the pinhole part of cameras with distortion, and of fisheyes: for a path, where the lens of
            its source does not matter.
        square_pixels, off_center: as of :class:`mirage_kernels.Cameras`. With square_pixels=False, cameras are also
            stretched to an `image_size` of another aspect.

    Raises:
        ValueError: no such format, a malformed file, or something of the above that the file needs and has not.
        OSError: the file cannot be read.
    """
    given = Given(
        image_size=image_size,
        file_size=file_size,
        fov=fov,
        intrinsics=intrinsics,
        convention=convention,
        poses=poses,
        camera=camera,
        pixel_centers=pixel_centers,
        normalized=normalized,
        ignore_lens=ignore_lens,
        square_pixels=square_pixels,
        off_center=off_center,
    )
    cameras = read_cameras(path, given, format)
    if image_size is None:
        return cameras
    resized = cameras.resized(image_size)
    if square_pixels and "square_pixels" in resized.allowances and "square_pixels" not in cameras.allowances:
        (rows, columns), (height, width) = cameras.image_size, resized.image_size
        expected = f"of the aspect of the file's cameras, {rows}x{columns} (square_pixels=False stretches them)"
        raise ValueError(f"{path}: image_size must be {expected}, got {height}x{width}")
    return resized


def read_cameras(path: PathLike, given: Given, format: str | None = None) -> Cameras:
    """Read the cameras of a file or a folder at the size that it states, see :func:`load_trajectory`."""
    file = CameraFile(Path(path), given)
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if file.path.is_dir():
        file, format = _look_into(file, format)
    elif not file.path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    suffix = "" if file.path.is_dir() else file.path.suffix.lower()
    names = [name for name, one in FORMATS.items() if suffix in one.suffixes] if format is None else [format]
    tried: dict[str, str] = {}
    for name in names or [name for name, one in FORMATS.items() if ".txt" in one.suffixes]:
        for option in ("poses", "convention", "camera"):
            if getattr(given, option) is not None and option not in FORMATS[name].open_to:
                tried[name] = f"{option} must not be given: the format says it"
        if name in tried:
            continue
        try:
            return FORMATS[name].read(file)
        except NotThisFormat as error:
            tried[name] = str(error)
    reasons = "; ".join(f"{name}: {why}" for name, why in tried.items())
    raise ValueError(f"{path}: no cameras in a format that is known. {reasons}")


def _look_into(file: CameraFile, format: str | None) -> tuple[CameraFile, str | None]:
    """Find which format a folder is of: a COLMAP model, or one with nerfstudio's transforms.json."""
    transforms = file.path / "transforms.json"
    if format == "nerfstudio" or (format is None and transforms.exists()):
        if format is None and any((file.path / name).is_dir() for name in ("sparse", "colmap")):
            raise file.fail("format must be given: the folder holds transforms.json and a COLMAP model")
        return replace(file, path=transforms), "nerfstudio"
    return file, format or "colmap"


def save_trajectory(path: PathLike, cameras: Cameras) -> None:
    """Write `cameras` as the path's suffix says: .txt (RealEstate10K), .json (nerfstudio) or .npz."""
    suffix = Path(path).suffix.lower()
    writers = {".txt": save_realestate10k, ".json": save_nerfstudio, ".npz": save_npz}
    if suffix not in writers:
        raise ValueError(f"path must end in .txt (RealEstate10K), .json (nerfstudio) or .npz, got {path}")
    writers[suffix](path, cameras)

"""`RGBDFrames`: posed colour images with depth, from a folder or from a stereo pair in scikit-image.

What is loaded is ready for a codec with 16x16 patches: images are cropped about their centre to sides that are
multiples of 16, the depth with them, and the principal point is moved along, see
:class:`~mirage.files.framing.Framing`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mirage_kernels import Cameras

from ..files.depth import DEPTH_SUFFIXES, MILLIMETRES, read_depth
from ..files.framing import Framing, cut_to_multiples
from ..files.images import read_image, to_tensor
from ..optional import import_extra

_MULTIPLE = 16
_MATRIX_CHARACTERS = 10_000  # of a text file with a matrix, which has some hundreds
_ANY_LENS = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])  # of a 1x1 image, to check a pose with
_COLOR_NAME = re.compile(r"frame-\d+\.color\.(?:jpg|jpeg|png)")


@dataclass(frozen=True)
class RGBDFrames:
    """N posed colour images with depth.

    Attributes:
        images: (N, 3, H, W) float32 in [0, 1].
        depth: (N, H, W) float32, z along the optical axis in metres; 0 where it is unknown.
        cameras: N views of image size (H, W).
        names: one per frame, to show to people.
    """

    images: Tensor
    depth: Tensor
    cameras: Cameras
    names: list[str]

    def __post_init__(self) -> None:
        count, (height, width) = len(self.cameras), self.cameras.image_size
        for name, value, expected in (
            ("images", self.images, (count, 3, height, width)),
            ("depth", self.depth, (count, height, width)),
        ):
            if value.dtype != torch.float32 or value.shape != expected:
                got = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
                raise ValueError(f"{name} must be {expected} float32 as cameras say, got {got}")
        if len(self.names) != count:
            raise ValueError(f"names must hold one name per camera ({count}), got {len(self.names)}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: slice | Sequence[int]) -> RGBDFrames:
        """Select frames by a slice or a list of ints."""
        rows = range(len(self))[index] if isinstance(index, slice) else index
        picked = list(rows)
        return RGBDFrames(
            self.images[picked], self.depth[picked], self.cameras[picked], [self.names[i] for i in picked]
        )


def stereo_motorcycle() -> RGBDFrames:
    """Load the Middlebury 2014 "Motorcycle" pair with the true disparity of its left image, at 496x736.

    Scharstein et al., "High-Resolution Stereo Datasets with Subpixel-Accurate Ground Truth", GCPR 2014. The
    files are inside scikit-image's wheel (`skimage.data.stereo_motorcycle`): nothing is downloaded. Two
    frames, "left" and "right"; the left camera is the origin of the world and the right one stands a baseline
    along +x. Only the left view has depth, that of the right one is all unknown.

    Raises:
        MissingExtraError: scikit-image is not installed.
    """
    left, right, disparity = import_extra("skimage.data", "demo").stereo_motorcycle()
    # Calibration: documentation of skimage.data.stereo_motorcycle, for these images, which are the originals
    # averaged over 4x4 pixels. It counts pixels in integers, from 0 at the centre of the original's first
    # pixel, and divides by 4: 311.193 = 1244.772 / 4. That pixel's centre lies at 0.5 / 4 here, so 1/8 is to
    # be added. (Nothing in the pair can tell: adding the same to cx of both cameras leaves every match where
    # it is.)
    focal, cx, cy = 994.978, 311.193 + 0.125, 254.877 + 0.125
    difference, baseline = 31.086, 0.193001  # cx of the right camera minus cx of the left one; metres
    # A point in column u of the left image is in column u - disparity of the right one (the example in that
    # documentation has it the other way round): sampled there, the right image differs from the left by a
    # median of 3.0 grey levels of 255, against 30.0 at u + disparity and 3.3 half a pixel to either side.
    known = np.isfinite(disparity) & (disparity > 0)
    depth = np.where(known, focal * baseline / (np.where(known, disparity, 0.0) + difference), 0.0)
    intrinsics = np.array([[[focal, 0.0, cx], [0.0, focal, cy], [0.0, 0.0, 1.0]]] * 2)
    intrinsics[1, 0, 2] += difference
    cam2world = np.stack([np.eye(4)] * 2)
    cam2world[1, 0, 3] = baseline
    depths = [depth.astype(np.float32), np.zeros_like(depth, np.float32)]
    return _make_frames([left, right], depths, intrinsics, cam2world, ["left", "right"])


def list_rgbd_folder(path: str | os.PathLike[str]) -> list[str]:
    """List the names of the colour images of an RGB-D folder, in order.

    Raises:
        NotADirectoryError: no such folder.
        ValueError: it has no frames.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such folder")
    names = sorted(entry.name for entry in folder.iterdir() if _COLOR_NAME.fullmatch(entry.name))
    if not names:
        raise ValueError(f"{folder}: expected frames called frame-000000.color.jpg, found none")
    return names


def load_rgbd_folder(path: str | os.PathLike[str], frames: slice | None = None, progress: bool = False) -> RGBDFrames:
    """Load posed RGB-D frames from a folder in the layout of the 7-Scenes data set (Shotton et al., CVPR 2013).

    `intrinsics.txt` holds the 3x3 matrix for the images as they are, in continuous pixel coordinates (the
    centre of a 640x480 image is 320, 240). Each frame N (six digits) has `frame-N.color.jpg` (or .png),
    `frame-N.depth.png` of the same size (16 bits, millimetres; 0 and 65535 are unknown) and
    `frame-N.pose.txt`, the 4x4 camera-to-world matrix in metres. Depth may also be a file that
    :func:`~mirage.files.depth.read_depth` reads, `frame-N.depth.tiff`, .exr, .npy or .npz: integers are millimetres,
    floats are metres.

    Args:
        path: the folder.
        frames: which of the frames to load, counted in order of their names; all by default.
        progress: show a progress bar.

    Raises:
        OSError: a file is missing or unreadable.
        ValueError: a file is not what it should be, or `frames` picks none. Either message names the file.
        MissingExtraError: pillow is not installed, or tqdm where `progress` is wanted.
    """
    folder = Path(path)
    names = list_rgbd_folder(folder)[frames or slice(None)]
    if not names:
        raise ValueError(f"frames must pick at least one of the frames of {folder}, got {frames}")
    matrix = _read_matrix(folder / "intrinsics.txt", 3)
    images: list[np.ndarray] = []
    depths: list[np.ndarray] = []
    poses = []
    steps = import_extra("tqdm", "demo").tqdm(names, "read frames", leave=False) if progress else names
    for name in steps:
        stem = name.split(".")[0]
        images.append(read_image(folder / name))
        size = images[0].shape[:2]
        if images[-1].shape[:2] != size:
            raise ValueError(
                f"{folder / name}: expected {_across(size)} as {names[0]}, got {_across(images[-1].shape)}"
            )
        depths.append(_read_depth(folder, f"{stem}.depth", size))
        pose_file = folder / f"{stem}.pose.txt"
        poses.append(_read_matrix(pose_file, 4))
        try:
            Cameras(_ANY_LENS, poses[-1][None], (1, 1))
        except ValueError as error:
            raise ValueError(f"{pose_file}: {error}") from None
    try:
        Cameras(matrix, np.eye(4)[None], images[0].shape[:2])
    except ValueError as error:
        raise ValueError(f"{folder / 'intrinsics.txt'}: {error}") from None
    intrinsics = np.repeat(matrix[None], len(names), 0)
    try:
        return _make_frames(images, depths, intrinsics, np.stack(poses), [name.split(".")[0] for name in names])
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _make_frames(
    images: Sequence[np.ndarray],
    depths: Sequence[np.ndarray],
    intrinsics: np.ndarray,
    cam2world: np.ndarray,
    names: list[str],
) -> RGBDFrames:
    """Make frames from images (H, W, 3), float32 depth (H, W) and intrinsics (N, 3, 3): cropped, converted."""
    height, width = images[0].shape[:2]
    if min(height, width) < _MULTIPLE:
        raise ValueError(f"images must be at least {_MULTIPLE}x{_MULTIPLE} pixels, got {width}x{height}")
    framing = Framing((height, width), cut_to_multiples((height, width), (_MULTIPLE, _MULTIPLE)))
    return RGBDFrames(
        torch.stack([to_tensor(framing.fit_pixels(pixels)) for pixels in images]),
        torch.stack([framing.fit_map(torch.tensor(depth)) for depth in depths]),
        framing.fit_cameras(Cameras(intrinsics, cam2world, (height, width))),
        names,
    )


def _read_depth(folder: Path, stem: str, size: tuple[int, ...]) -> np.ndarray:
    """Read depth (H, W) float32 in metres, 0 where unknown."""
    found = (folder / f"{stem}{suffix}" for suffix in DEPTH_SUFFIXES)
    path = next((path for path in found if path.exists()), folder / f"{stem}.png")
    depth = read_depth(path, integer_scale=MILLIMETRES)
    if depth.shape != size:
        got = _across(depth.shape) if depth.ndim == 2 else f"an array {depth.shape}"
        raise ValueError(f"{path}: expected {_across(size)} pixels as the colour image, got {got}")
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def _across(shape: Sequence[int]) -> str:
    """Write (height, width, ..) as people do: width first."""
    return f"{shape[1]}x{shape[0]}"


def _read_matrix(path: Path, size: int) -> np.ndarray:
    """Read a (size, size) float64 matrix from a text file."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MATRIX_CHARACTERS + 1)
        if len(text) > _MATRIX_CHARACTERS:
            raise ValueError(f"more than {_MATRIX_CHARACTERS} characters")
        numbers = [[float(value) for value in line.split()] for line in text.splitlines() if line.strip()]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected {size}x{size} numbers, got: {error}") from None
    if [len(row) for row in numbers] != [size] * size:
        got = f"{len(numbers)} lines of {'/'.join(map(str, sorted({len(row) for row in numbers})))}"
        raise ValueError(f"{path}: expected {size}x{size} numbers, got {got}")
    return np.array(numbers)

"""RealEstate10K text files, and what CameraCtrl, MotionCtrl's followers and VideoX-Fun write in that layout."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirage_kernels import Cameras
from mirage_kernels.io import replace_bytes

from .reading import LOGGER, CameraFile, Given, NotThisFormat, PathLike, is_number, make_cameras, read_table

_ASPECT_TOLERANCE = 0.01


def load_realestate10k(path: PathLike, image_size: Sequence[int], *, square_pixels: bool = True) -> Cameras:
    """Load the cameras of a RealEstate10K text file (Zhou et al., "Stereo Magnification", 2018).

    The first line is the video's URL, any other words, blank, or missing. Every other line has 19 columns: timestamp in
    microseconds, fx, fy, cx, cy as fractions of width and height, two unused, and the 3x4 world-to-camera matrix by
    rows; or 18, without the timestamp. Blank lines are skipped. Commas may separate the columns.

    The fractions are of the video, whose aspect is fy / fx, as its pixels are square. Images of another aspect are
    taken for the largest crop of the video about its centre, so that their pixels are square too: a narrower image has
    the video's vertical field of view, a wider one its horizontal one, as in CameraCtrl and VideoX-Fun.

    Args:
        image_size: (height, width) of the images.
        square_pixels: False stretches the fractions over any aspect instead.

    Raises:
        ValueError: malformed; the message names the line.
    """
    file = CameraFile(Path(path), Given(image_size=image_size, square_pixels=square_pixels))
    try:
        return read(file)
    except NotThisFormat as error:
        raise file.fail(f"expected a header line and rows of 19 columns: {error}") from None


def read(file: CameraFile) -> Cameras:
    """Read RealEstate10K text, see :func:`load_realestate10k`."""
    rows = file.rows
    first = rows[0][1] if rows else []
    header = len(first) == 1 or (len(first) not in (0, 18, 19) and not all(map(is_number, first)))
    if not rows[header:]:
        if not file.text or (header and "://" not in first[0]):
            raise NotThisFormat("no rows of 19 or 18 numbers")
        places: list[str] = []
        table = np.zeros((0, 19))  # of a path without views, as written by save_realestate10k
    else:
        table, places = read_table(file, (19, 18), int(header))
    size = file.given.image_size
    if size is None:
        raise file.fail("image_size must be (height, width) as the file has none, got None")
    numbers = table[:, -18:]
    world2cam = numbers[:, 6:].reshape(-1, 3, 4)
    options: dict[str, Any] = {"pixel_centers": "half", "normalized": False}
    # Fractions of the image are pixels of a 1x1 image.
    unit = make_cameras(
        file, places, numbers[:, :4], world2cam, (1, 1), world2cam=True, **options, square_pixels=False, off_center=True
    )
    cameras = unit.resized(size)
    intrinsics = cameras.intrinsics
    stretch = intrinsics[:, 1, 1] / intrinsics[:, 0, 0]  # of the video's aspect over the image's
    if file.given.square_pixels and bool(((stretch - 1).abs() > _ASPECT_TOLERANCE).any()):
        intrinsics = _crop(intrinsics, stretch, size)
        aspect, crop = (stretch[0] * size[1] / size[0]).item(), f"{size[0]}x{size[1]}"
        LOGGER.warning(
            "%s: of a video of aspect %.3f; taking images of %s for its centre crop", file.path, aspect, crop
        )
    return make_cameras(file, places, intrinsics, cameras.cam2world, size, **options)


def _crop(intrinsics: torch.Tensor, stretch: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Make pixels square that were stretched over `size` by so much, as of the largest crop about the centre."""
    scale = torch.stack([stretch.clamp(min=1), (1 / stretch).clamp(min=1)], 1)  # across, down
    centre = torch.tensor([size[1] / 2, size[0] / 2], dtype=torch.float64)
    cropped = intrinsics.clone()
    cropped[:, 0, 0] *= scale[:, 0]
    cropped[:, 1, 1] *= scale[:, 1]
    cropped[:, :2, 2] = centre + (intrinsics[:, :2, 2] - centre) * scale
    return cropped


def save_realestate10k(
    path: PathLike, cameras: Cameras, timestamps: Sequence[int] | None = None, url: str = ""
) -> None:
    """Write a RealEstate10K text file; reading it back gives `cameras` within 1e-12 (with `square_pixels` as theirs).

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
    replace_bytes(path, ("\n".join(lines) + "\n").encode())

"""The one rule by which images are fitted to the frames' size: cropped about the centre to its aspect, then resized.

Frames that are only a little smaller than the image on either side, by fewer than 16 pixels or less than a tenth, are
cropped out of it as they are, and no pixel is resampled: where no size is asked for, it is the image's cut to multiples
of the model's step. What belongs to an image follows it: the principal points of its cameras move along, its depth and
masks are cropped alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mirage_kernels import Cameras

from ..optional import import_extra

_ASPECT_TOLERANCE = 0.01
_CUT_PIXELS, _CUT_SHARE = 16, 0.1


def cut_to_multiples(size: Sequence[int], multiples: Sequence[int]) -> tuple[int, int]:
    """Round (height, width) down to multiples, at least one of each."""
    height, width = (max(side // step, 1) * step for side, step in zip(size, multiples, strict=True))
    return height, width


def have_one_aspect(left: Sequence[int], right: Sequence[int]) -> bool:
    """Tell whether two sizes (height, width) are of one aspect, within a pixel of `left`."""
    by_rows = abs(left[0] - left[1] * right[0] / right[1])
    by_columns = abs(left[1] - left[0] * right[1] / right[0])
    return min(by_rows, by_columns) <= 1


@dataclass(frozen=True)
class Framing:
    """How images of one size become frames of another.

    Attributes:
        image_size: (height, width) of the image, upright.
        size: (height, width) of the frames.
    """

    image_size: tuple[int, int]
    size: tuple[int, int]

    @property
    def window(self) -> tuple[float, float, float, float]:
        """(top, left, height, width) of what is kept of the image, in its pixels; whole ones for a crop alone."""
        (rows, columns), (height, width) = self.image_size, self.size
        if rows * width == columns * height:
            return 0.0, 0.0, float(rows), float(columns)
        cuts = (rows - height, columns - width)
        if all(0 <= cut < max(_CUT_PIXELS, _CUT_SHARE * side) for cut, side in zip(cuts, self.image_size, strict=True)):
            return cuts[0] // 2, cuts[1] // 2, height, width
        if rows * width > columns * height:  # too tall
            tall, wide = columns * height / width, float(columns)
        else:
            tall, wide = float(rows), rows * width / height
        return (rows - tall) / 2, (columns - wide) / 2, tall, wide

    @property
    def crops(self) -> bool:
        """Whether anything of the image is cut away."""
        return self.window[2:] != self.image_size

    def fits_cameras(self, cameras: Cameras) -> bool:
        """Tell whether cameras are of the image's aspect, or of exactly the frames' size."""
        rows, columns = cameras.image_size
        ratio = (columns / rows) / (self.image_size[1] / self.image_size[0])
        return cameras.image_size == self.size or abs(ratio - 1.0) <= _ASPECT_TOLERANCE

    def fit_cameras(self, cameras: Cameras) -> Cameras:
        """Return the cameras of the frames, image size :attr:`size`.

        Args:
            cameras: of the image, for any size of its aspect; those of the frames' size are left as they are.
        """
        if cameras.image_size == self.size:
            return cameras
        if not self.crops:
            return cameras.resized(self.size)
        top, left, tall, wide = self.window
        intrinsics = cameras.resized(self.image_size).intrinsics.clone()
        intrinsics[:, 0, 2] -= left
        intrinsics[:, 1, 2] -= top
        intrinsics[:, 0] *= self.size[1] / wide
        intrinsics[:, 1] *= self.size[0] / tall
        return Cameras.trusted(intrinsics, cameras.cam2world, self.size)

    def fit_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Crop and resize an image.

        Args:
            pixels: (H, W, 3) of :attr:`image_size`, uint8 or float32 in [0, 1], see
                :func:`~mirage.files.images.read_image`.

        Returns:
            (height, width, 3) of that dtype, resampled by Lanczos where it is not a crop alone.
        """
        (height, width), (top, left, tall, wide) = self.size, self.window
        if (tall, wide) == self.size:
            return pixels[int(top) : int(top) + height, int(left) : int(left) + width]
        image_module = import_extra("PIL.Image", "demo")
        box = (left, top, left + wide, top + tall)

        def resize(values: np.ndarray) -> np.ndarray:
            image = image_module.fromarray(np.ascontiguousarray(values))
            return np.asarray(image.resize((width, height), image_module.Resampling.LANCZOS, box))

        if pixels.dtype == np.uint8:
            return resize(pixels)
        return np.stack([resize(pixels[..., channel]) for channel in range(3)], -1).clip(0.0, 1.0)

    def fit_map(self, values: Tensor) -> Tensor:
        """Crop a map of the image, such as depth or a mask, to what the frames show of it.

        Args:
            values: (.., H, W) of the image's aspect at any resolution; one of exactly the frames' size is left as is.

        Returns:
            (.., H', W') at that resolution. Nothing is interpolated: where the window's edge cuts a pixel, the nearest
            is taken.
        """
        size = tuple(values.shape[-2:])
        if size == self.size or not self.crops:
            return values
        top, left, tall, wide = self.window
        for axis, start, extent, side in ((-2, top, tall, self.image_size[0]), (-1, left, wide, self.image_size[1])):
            scale = values.shape[axis] / side
            count = max(round(extent * scale), 1)
            place = start * scale + (torch.arange(count, dtype=torch.float64) + 0.5) * (extent * scale / count)
            index = place.floor().long().clamp_(max=values.shape[axis] - 1)
            values = values.index_select(axis, index.to(values.device))
        return values

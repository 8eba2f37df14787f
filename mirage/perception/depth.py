"""Depth of new frames: a `DepthEstimator` turns frames into depth maps, `GivenDepth` hands out the user's own.

Depth is z along the optical axis in world units everywhere; 0, negative, NaN and Inf mean unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mirage_kernels import Cameras


@runtime_checkable
class DepthEstimator(Protocol):
    """What the generation loop asks for the depth of its new frames.

    Attributes:
        needs_frames: whether it looks at `frames`; where False the loop need not decode them.
        alignment: ``"none"``, ``"scale"`` or ``"scale_shift"``: what is to be fitted to the memory, the `mode` of
            `align_depth`.
    """

    needs_frames: bool
    alignment: str

    def __call__(self, frames: Tensor, cameras: Cameras, frame_numbers: Sequence[int]) -> Tensor:
        """Estimate the depth of T frames.

        Args:
            frames: (T, 3, H, W) float32 in [0, 1], one per latent frame.
            cameras: of the T frames, image size (H, W).
            frame_numbers: T positions in the whole video, from 0.

        Returns:
            (T, H', W') float32 on the device of `frames`, z in world units; 0 or NaN where it is unknown. H' x W' is
            H x W for every estimator but `GivenDepth`.
        """
        ...


class GivenDepth:
    """The user's own depth, handed out frame by frame as it is.

    Args:
        depth: (H', W') of frame 0, or (N, H', W') of frames 0..N-1: a float tensor or array on any device (a memory
            map too). Only the frames asked for are read and copied.

    Raises:
        TypeError, ValueError: not floats, or another number of axes.
    """

    needs_frames = False
    alignment = "none"

    def __init__(self, depth: Tensor | np.ndarray) -> None:
        if isinstance(depth, Tensor):
            floats = depth.is_floating_point()
        else:
            floats = isinstance(depth, np.ndarray) and depth.dtype.kind == "f"
        if not floats:
            got = getattr(depth, "dtype", type(depth).__name__)
            raise TypeError(f"depth must be a float tensor or array, (H, W) or (N, H, W), got {got}")
        if depth.ndim not in (2, 3):
            raise ValueError(f"depth must be (H, W) or (N, H, W) float, got {tuple(depth.shape)}")
        self._depth = depth if depth.ndim == 3 else depth[None]

    @property
    def num_frames(self) -> int:
        """Frames it holds, from frame 0 on."""
        return self._depth.shape[0]

    def __call__(self, frames: Tensor | None, cameras: Cameras, frame_numbers: Sequence[int]) -> Tensor:
        """Hand out depth, see `DepthEstimator`; `frames` only say the device, without them it is that of `cameras`.

        Raises:
            ValueError: a frame beyond the given ones, or an aspect other than that of the cameras' images.
        """
        if len(frame_numbers) != len(cameras):
            raise ValueError(f"frame_numbers must be {len(cameras)} ints as cameras, got {len(frame_numbers)}")
        count, *size = self._depth.shape
        for number in frame_numbers:
            if not 0 <= number < count:
                raise ValueError(f"depth must hold frame {number}, got {count} frame{'s' * (count != 1)}, from 0")
        (height, width), (image_height, image_width) = size, cameras.image_size
        off_by_rows = abs(height - width * image_height / image_width)
        off_by_columns = abs(width - height * image_width / image_height)
        if min(off_by_rows, off_by_columns) > 1:
            image = f"{image_height}x{image_width} images of cameras"
            raise ValueError(f"depth must have the aspect of the {image}, got {height}x{width}")
        asked = self._depth[list(frame_numbers)]
        if not isinstance(asked, Tensor):
            asked = torch.from_numpy(asked.astype(np.float32))
        return asked.to(cameras.device if frames is None else frames.device, torch.float32)

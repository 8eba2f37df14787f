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

from ..files.framing import Framing, have_one_aspect


@runtime_checkable
class DepthEstimator(Protocol):
    """What the generation loop asks for the depth of its new frames.

    Attributes:
        needs_frames: whether it looks at `frames`; where False the loop need not decode them.
        alignment: ``"none"``, ``"scale"`` or ``"scale_shift"``: what is to be fitted to the memory, the `mode` of
            `align_depth`.

    One that also has `marks_sky` True may know no depth at all in a chunk, as of sky; of any other, that is an error.
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
        depth: (H', W') of frame 0, or (N, H', W') or (N, 1, H', W') of frames 0..N-1: a float tensor or array on any
            device (a memory map too). Only the frames asked for are read and copied.
        framing: how the image that it is of becomes frames: depth is cropped alike. None where nothing is cropped.

    Raises:
        TypeError, ValueError: not floats, or another number of axes.
    """

    needs_frames = False
    alignment = "none"

    def __init__(self, depth: Tensor | np.ndarray, framing: Framing | None = None) -> None:
        if isinstance(depth, Tensor):
            floats = depth.is_floating_point()
        else:
            floats = isinstance(depth, np.ndarray) and depth.dtype.kind == "f"
        if not floats:
            got = getattr(depth, "dtype", type(depth).__name__)
            hint = ": multiply it by its scale, such as 0.001 for millimetres" if "int" in str(got) else ""
            raise TypeError(f"depth must be a float tensor or array, (H, W) or (N, H, W), got {got}{hint}")
        if depth.ndim == 4 and depth.shape[1] == 1:
            depth = depth[:, 0]
        if depth.ndim not in (2, 3):
            raise ValueError(f"depth must be (H, W) or (N, H, W) float, got {tuple(depth.shape)}")
        self._depth = depth if depth.ndim == 3 else depth[None]
        self._framing = framing

    @property
    def num_frames(self) -> int:
        """Frames it holds, from frame 0 on."""
        return self._depth.shape[0]

    def __call__(self, frames: Tensor | None, cameras: Cameras, frame_numbers: Sequence[int]) -> Tensor:
        """Hand out depth, see `DepthEstimator`; `frames` only say the device, without them it is that of `cameras`.

        Raises:
            ValueError: a frame beyond the given ones, or an aspect other than that of the image, without `framing` the
                cameras' images.
        """
        if len(frame_numbers) != len(cameras):
            raise ValueError(f"frame_numbers must be {len(cameras)} ints as cameras, got {len(frame_numbers)}")
        count, *size = self._depth.shape
        for number in frame_numbers:
            if not 0 <= number < count:
                raise ValueError(f"depth must hold frame {number}, got {count} frame{'s' * (count != 1)}, from 0")
        framing = self._framing
        rows, columns = cameras.image_size if framing is None else framing.image_size
        if not have_one_aspect(size, (rows, columns)) and (framing is None or tuple(size) != framing.size):
            whose = f"{rows}x{columns} images of cameras" if framing is None else f"{rows}x{columns} image"
            raise ValueError(f"depth must have the aspect of the {whose}, got {size[0]}x{size[1]}")
        asked = self._depth[list(frame_numbers)]
        if not isinstance(asked, Tensor):
            asked = torch.from_numpy(asked.astype(np.float32))
        asked = asked.to(cameras.device if frames is None else frames.device, torch.float32)
        return asked if framing is None else framing.fit_map(asked)

"""The real scenes that `mirage demo` remembers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mirage_kernels import Cameras

from ...scenes.rgbd import RGBDFrames, list_rgbd_folder, load_rgbd_folder, stereo_motorcycle
from ...scenes.trajectories import out_and_back, spiral

_LOOP_FRAMES = 60
_MAX_FRAMES = 120  # of a folder: 450 MB of images at 480x640
_MAX_HELD_OUT = 12


@dataclass(frozen=True)
class Scene:
    """Frames to remember, frames that are held out, and a closed path."""

    name: str
    written: RGBDFrames
    held_out: RGBDFrames
    loop: Cameras


def stereo_scene() -> Scene:
    """Load scikit-image's stereo pair: the left view to remember, the right one held out."""
    frames = stereo_motorcycle()
    # A swing about the left camera, nearly a baseline to every side, looking at the middle of the motorcycle.
    loop = spiral(frames.cameras[0], _LOOP_FRAMES, distance=2.7, radius=0.15, turns=2.0)
    return Scene("stereo_motorcycle", frames[[0]], frames[[1]], loop)


def folder_scene(folder: Path, progress: bool) -> Scene:
    """Load an RGB-D folder: every other frame to remember, some of those between held out.

    Raises:
        OSError, ValueError: it cannot be used, or holds fewer than two frames.
    """
    step = -(-len(list_rgbd_folder(folder)) // _MAX_FRAMES)
    frames = load_rgbd_folder(folder, slice(None, None, step), progress)
    if len(frames) < 2:
        raise ValueError(f"{folder}: expected at least two frames, one to write and one to hold out, got one")
    written, between = frames[::2], frames[1::2]
    held_out = between[torch.linspace(0, len(between) - 1, min(_MAX_HELD_OUT, len(between))).round().int().tolist()]
    cameras = written.cameras

    def way_out(count: int) -> Cameras:
        return cameras[torch.linspace(0, len(cameras) - 1, count).round().int().tolist()]

    return Scene(folder.resolve().name, written, held_out, out_and_back(way_out, 2 * len(cameras)))

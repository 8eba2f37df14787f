"""Make the scenes of the benchmarks: a furnished box room, exact depth, one seed, and the sizes to measure at."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from mirage_kernels import Cameras

PATH_SIZE = (704, 1280)  # the image size that the intrinsics of `camera_path` refer to
CHANNELS = 48
CELL = 16  # pixels of a latent cell, either way
CHUNK_FRAMES = 33  # images of one chunk: what the VAE encodes to READ_VIEWS latent frames
READ_VIEWS = 9
WRITE_VIEWS = 8

_ROOM = torch.tensor([[-4.0, -1.5, -3.0], [4.0, 1.5, 3.0]])
_BOXES = torch.tensor(
    [
        [[-3.5, 0.6, -2.0], [-2.0, 1.5, 1.0]],
        [[1.0, 0.3, 1.5], [2.5, 1.5, 2.6]],
        [[2.8, -0.5, -2.6], [3.8, 1.5, -1.4]],
        [[-0.6, 0.8, -0.4], [0.6, 1.5, 0.4]],
    ]
)
_ROOM_LENGTH = 8.5  # from one room to the next of the row of rooms, in world units


class Size(NamedTuple):
    """Say how much is stored: so many frames of one image size."""

    frames: int
    height: int
    width: int

    @property
    def image(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def grid(self) -> tuple[int, int]:
        return self.height // CELL, self.width // CELL

    @property
    def tokens(self) -> int:
        return self.frames * self.grid[0] * self.grid[1]

    @property
    def pixels(self) -> int:
        return self.frames * self.height * self.width

    @property
    def label(self) -> str:
        """Return the name in rows of results, ``20 frames of 352x640``."""
        return f"{self.frames} frames of {self.height}x{self.width}"

    @classmethod
    def parse(cls, label: str) -> Size | None:
        """Return the size that a row's label begins with, or None."""
        found = re.match(r"(\d+) frames of (\d+)x(\d+)", label)
        return cls(*map(int, found.groups())) if found else None


QUICK = Size(5, 96, 160)
GOAL = Size(20, 352, 640)  # the size the CPU goals are stated at
SIZES = (GOAL, Size(9, 704, 1280), Size(81, 704, 1280), Size(401, 704, 1280))
SHORT_SIZES = SIZES[:2]  # those that two cores measure within minutes, pixels included
GPU_SIZES = (*SIZES, Size(3001, 704, 1280))  # the last holds 10.6 million tokens


def camera_path(views: int, laps: float = 1.0, phase: float = 0.0) -> Cameras:
    """Make T cameras of PATH_SIZE on an ellipse through the room, walked while looking around."""
    height, width = PATH_SIZE
    t = (torch.arange(views, dtype=torch.float64) + phase) / max(views, 1) * 2 * math.pi * laps
    yaw = 2.0 * t
    pose = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    pose[:, 0, 0], pose[:, 0, 2] = yaw.cos(), yaw.sin()
    pose[:, 2, 0], pose[:, 2, 2] = -yaw.sin(), yaw.cos()
    pose[:, 0, 3], pose[:, 1, 3], pose[:, 2, 3] = 1.8 * t.cos(), -0.2 + 0.2 * (3 * t).sin(), 1.2 * t.sin()
    focal = 0.7 * width
    k = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=torch.float64)
    return Cameras(k.repeat(views, 1, 1), pose, PATH_SIZE)


def stored_cameras(size: Size) -> Cameras:
    """Make the cameras of the stored frames: a lap through the room; very many frames share a row of four rooms."""
    if size.frames <= 1000:
        return camera_path(size.frames).resized(size.image)
    parts = [size.frames * (k + 1) // 4 - size.frames * k // 4 for k in range(4)]
    return Cameras.cat([moved_room(camera_path(n), k) for k, n in enumerate(parts)]).resized(size.image)


def chunk_cameras(size: Size) -> Cameras:
    """Make the cameras of one chunk's CHUNK_FRAMES images, along a part of the lap; each fourth is a latent frame's."""
    return camera_path(CHUNK_FRAMES, laps=0.15, phase=0.5).resized(size.image)


def latent_views(cameras: Cameras) -> Cameras:
    """Take the cameras of a chunk's latent frames: latent frame t stands for images 4t-3..4t and has the pose of 4t."""
    return cameras[::4]


def moved_room(cameras: Cameras, rooms: int) -> Cameras:
    """Move the cameras so many rooms further along the row of rooms."""
    pose = cameras.cam2world.clone()
    pose[:, 0, 3] += rooms * _ROOM_LENGTH
    return Cameras(cameras.intrinsics, pose, cameras.image_size, square_pixels=False)


def render_depth(cameras: Cameras) -> Tensor:
    """Render exact z depth (T, H, W) float32 of the room, at the cameras' image size; on the CPU."""
    height, width = cameras.image_size
    depths = []
    for k, pose in zip(cameras.intrinsics.cpu().float(), cameras.cam2world.cpu().float(), strict=True):
        x = (torch.arange(width) + 0.5 - k[0, 2]) / k[0, 0]
        y = (torch.arange(height)[:, None] + 0.5 - k[1, 2]) / k[1, 1]
        rays = torch.stack([x.expand(height, width), y.expand(height, width), torch.ones(height, width)], dim=-1)
        direction, origin = rays @ pose[:3, :3].T, pose[:3, 3].clone()
        origin[0] -= torch.round(origin[0] / _ROOM_LENGTH) * _ROOM_LENGTH  # every room of the row is the same
        depth = torch.maximum((_ROOM[0] - origin) / direction, (_ROOM[1] - origin) / direction).amin(-1)
        for low, high in _BOXES:
            a, b = (low - origin) / direction, (high - origin) / direction
            enter, leave = torch.minimum(a, b).amax(-1), torch.maximum(a, b).amin(-1)
            depth = torch.where((enter > 0.05) & (enter < leave), torch.minimum(depth, enter), depth)
        depths.append(depth)
    return torch.stack(depths) if depths else torch.empty(0, height, width)


def latents(views: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """Draw (T, CHANNELS, h, w) float32: normal noise, which costs what real latents cost."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(views, CHANNELS, *grid, generator=generator)


def images(cameras: Cameras, depth: Tensor) -> Tensor:
    """Paint (T, 3, H, W) float32 in [0, 1]: a smooth texture on the world, so that a true render shows it again."""
    height, width = cameras.image_size
    frames = []
    for k, pose, z in zip(cameras.intrinsics.float(), cameras.cam2world.float(), depth, strict=True):
        x = (torch.arange(width) + 0.5 - k[0, 2]) / k[0, 0] * z
        y = (torch.arange(height)[:, None] + 0.5 - k[1, 2]) / k[1, 1] * z
        world = torch.stack([x, y, z], dim=-1) @ pose[:3, :3].T + pose[:3, 3]
        frames.append((0.5 + 0.5 * torch.sin(2.0 * world + world.roll(1, -1))).permute(2, 0, 1))
    return torch.stack(frames) if frames else torch.empty(0, 3, height, width)

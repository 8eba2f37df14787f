"""What the tests of pipeline, session and command share: a tiny pipeline and the room it films."""

from __future__ import annotations

from typing import Any

import room
import torch
from torch import Tensor

from mirage.perception.static_filter import ChunkViews
from mirage.pipeline.pipeline import MiragePipeline
from mirage.scenes.trajectories import out_and_back
from mirage.zoo import tiny_random_pipeline
from mirage_kernels import Cameras

SIZE, LATENT = (64, 96), (4, 6)


def make_pipeline(**options: Any) -> MiragePipeline:
    pipeline = tiny_random_pipeline(**options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def cameras(num_frames: int) -> Cameras:
    """Through the room and back: the last view is the first, bit for bit."""
    return out_and_back(lambda n: room.path(-0.6, n, step=0.08), num_frames).resized(SIZE)


def texture(views: Cameras) -> Tensor:
    """(T, 3, H, W) in [0, 1]: the room, striped along the world's axes."""
    depth = room.render(views)[0].double()
    points = views.centers[:, None, None] + room.rays(views) * depth[..., None]
    return (0.5 + 0.5 * torch.sin(points * torch.tensor([5.0, 7.0, 6.0]))).float().permute(0, 3, 1, 2)


def options(num_frames: int, **changes: Any) -> dict[str, Any]:
    """Arguments of a call that films the room."""
    views = cameras(num_frames)
    values: dict[str, Any] = {
        "image": texture(views[0]),
        "prompt": "a room",
        "cameras": views,
        "depth": room.render(views)[0],
        "static_filter": "none",
        "num_inference_steps": 2,
        "chunk_frames": 9,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
    }
    return values | changes


class Marked:
    """A static filter that knows: `moving` (N, H, W) bool marks pixels of every frame of the video."""

    needs_frames = False

    def __init__(self, moving: Tensor) -> None:
        self.moving = moving
        self.first = 0

    def __call__(self, views: ChunkViews) -> Tensor:
        static = []
        if views.frames_per_latent[0] == 1:  # the image, or the first chunk
            self.first = 0
        for count in views.frames_per_latent:
            static.append(~self.moving[self.first : self.first + count].any(0))
            self.first += count
        return torch.stack(static)

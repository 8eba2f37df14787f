"""The memories that are compared, by name: for generation, for training and for `mirage evaluate`.

"none": nothing is ever remembered, and no reference frame is found; the frames before a chunk are all it knows. A
read-out also tells where the camera goes: an adapter trained without a memory is shown the cameras' rays instead.
"nearest": the published memory, every token kept, the nearest read. "ours": reads aligned, the default; bounded, or
with every token kept as the others keep theirs.
"pixel": RGB points, see :mod:`mirage.pipeline.pixel_memory`. A model shows what a memory is worth only where it was
trained on that memory's read-outs, see `objective.memory` in :mod:`mirage.training.config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage_kernels import LatentCache

from ..perception.static_filter import ChunkViews

MEMORIES = ("none", "nearest", "ours", "pixel")
SPLATS = {"none": "aligned", "nearest": "nearest", "ours": "aligned", "pixel": "aligned"}
"""How each is read."""

WRITE_POLICIES = ("append", "bounded")

STEPS, MIRAGE_TINY_STEPS = 20, 2
"""Of denoising, where nothing else is asked for. Small models gather errors with every step."""

MIRAGE_TINY = "mirage-tiny"
MIRAGE_TINY_FOLDER = Path(__file__).parents[1] / "mirage-tiny"
"""Where the model that comes with the package is. `memories/NAME` in it are what other memories have for weights."""


class KeepNothing:
    """A static filter to which nothing is static: the memory stays empty."""

    needs_frames = False

    def __call__(self, views: ChunkViews) -> Tensor:
        return torch.zeros_like(views.depth, dtype=torch.bool)


def default_steps(model: str) -> int:
    """Of denoising, for a model by its name."""
    return MIRAGE_TINY_STEPS if model == MIRAGE_TINY else STEPS


def memory_options(name: str, pipeline: Any, write_policy: str = "bounded") -> dict[str, Any]:
    """Arguments of :meth:`~mirage.pipeline.pipeline.MiragePipeline.start` with which a session runs on the memory of
    this name.

    Args:
        name: one of :data:`MEMORIES`.
        pipeline: whose session it will be.
        write_policy: of "ours", as of :class:`~mirage_kernels.LatentCache`.

    Raises:
        ValueError: no such memory, or write policy; an adapter that is shown no memory.
    """
    if name not in MEMORIES:
        raise ValueError(f"memory must be one of {', '.join(MEMORIES)}, got {name!r}")
    adapter = pipeline.memory_adapter
    if name != "none" and adapter is not None and adapter.config.control == "rays":
        raise ValueError(f"memory must be none with an adapter of control rays, which is shown no memory, got {name!r}")
    options: dict[str, Any] = {"splat": SPLATS[name]}
    if name == "none":
        options["static_filter"] = KeepNothing()
    if write_policy not in WRITE_POLICIES:
        raise ValueError(f"write_policy must be one of {', '.join(WRITE_POLICIES)}, got {write_policy!r}")
    if name == "nearest" or (name == "ours" and write_policy == "append"):
        options["cache"] = LatentCache(
            pipeline.vae.config.z_dim,
            dtype=pipeline.transformer.dtype,
            device=pipeline._execution_device,
            write_policy="append",
        )
    if name == "pixel":
        options["points"] = "pixels"
    return options

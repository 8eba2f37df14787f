"""Mirage: a video world model around a latent spatial memory. The memory itself is `mirage_kernels`.

What needs diffusers (the extra `generate`) is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from mirage_kernels import Cameras, LatentCache, __version__

from . import _moved
from .pipeline.memory import MemoryConfig

_moved.install()

_LAZY = {
    "LatentDepth": "models.latent_depth",
    "MirageMemoryAdapter": "models.adapter",
    "MiragePipeline": "pipeline.pipeline",
    "MiragePipelineOutput": "pipeline.pipeline",
    "MirageSession": "pipeline.session",
    "MirageTransformer3DModel": "models.transformer",
}

__all__ = ["Cameras", "LatentCache", "MemoryConfig", "__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .optional import import_extra

    import_extra("diffusers", "generate")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

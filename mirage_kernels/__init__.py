"""Latent spatial memory for video world models: operators, cameras, and the cache."""

from __future__ import annotations

from typing import Any

from .backends import available_backends, find_backends, use_backend
from .cache import CacheMark, LatentCache, WriteReport
from .cameras import Cameras
from .ops import (
    BackProjection,
    Readout,
    back_project,
    block_bounds,
    bounded_write,
    cache_compact,
    cache_write,
    splat,
    splat_aligned,
    view_overlap,
)
from .ops.operator import import_triton_kernels
from .version import __version__

find_backends(import_triton_kernels)
del find_backends, import_triton_kernels

_RENAMED = {"View": "Readout", "cache_trim": "cache_compact"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        raise AttributeError(f"mirage_kernels.{name} is now mirage_kernels.{_RENAMED[name]} (docs/renamed.md)")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BackProjection",
    "CacheMark",
    "Cameras",
    "LatentCache",
    "Readout",
    "WriteReport",
    "__version__",
    "available_backends",
    "back_project",
    "block_bounds",
    "bounded_write",
    "cache_compact",
    "cache_write",
    "splat",
    "splat_aligned",
    "use_backend",
    "view_overlap",
]

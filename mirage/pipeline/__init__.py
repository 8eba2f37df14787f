"""Generation chunk by chunk along a camera path, with the memory in the loop.

What needs diffusers is imported when it is first asked for: `mirage.pipeline.chunks` and `MemoryConfig` do not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .denoise import published_sigmas
    from .memory import MEMORIES, MemoryConfig
    from .pipeline import MiragePipeline, MiragePipelineOutput
    from .session import MirageSession
    from .state import MirageChunk

_LAZY = {
    "MEMORIES": "memory",
    "MemoryConfig": "memory",
    "MirageChunk": "state",
    "MiragePipeline": "pipeline",
    "MiragePipelineOutput": "pipeline",
    "MirageSession": "session",
    "published_sigmas": "denoise",
}

__all__ = [
    "MEMORIES",
    "MemoryConfig",
    "MirageChunk",
    "MiragePipeline",
    "MiragePipelineOutput",
    "MirageSession",
    "published_sigmas",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _LAZY[name] != "memory":
        from ..optional import import_extra

        import_extra("diffusers", "generate")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

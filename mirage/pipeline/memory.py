"""Which memory a video is generated with: one `MemoryConfig`, and the presets that are compared, by name.

What the model makes of a memory shows only where it was trained on that memory's readouts, see `objective.memory` in
:mod:`mirage.training.config`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

KINDS = ("latent", "pixel", "none")
READOUTS = ("aligned", "nearest")
WRITE_POLICIES = ("bounded", "append")
MODES = (None, "adapter", "none")


@dataclass(frozen=True)
class MemoryConfig:
    """Which memory to generate with.

    Args:
        kind: what its points hold: "latent", a token of the video's latents each; "pixel", a colour each, rasterised
            and encoded for every chunk, for a comparison, see :mod:`mirage.pipeline.pixel_memory`; "none", nothing is
            ever remembered, and no reference frame is found: the frames before a chunk are all the model knows.
        readout: how it is read: "aligned", blended from the tokens that fit best, or "nearest", the nearest token, as
            the published release was trained on, see :meth:`~mirage_kernels.LatentCache.read`.
        write_policy: "bounded" or "append", of the :class:`~mirage_kernels.LatentCache`.
        mode: how the model uses what is read: "adapter", through its memory adapter, or "none", not at all: the memory
            is written and read, for depth and to choose reference frames, but the model gets no hints. None takes the
            adapter where the pipeline has one.
        near: least depth, world units, that writes and reads see; None: a part of the first view's depth, see
            :class:`~mirage_kernels.LatentCache`, so that any unit will do. Not of a cache that is given.

    Raises:
        ValueError: another value, or values that exclude each other.
    """

    kind: str = "latent"
    readout: str = "aligned"
    write_policy: str = "bounded"
    mode: str | None = None
    near: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("kind", KINDS),
            ("readout", READOUTS),
            ("write_policy", WRITE_POLICIES),
            ("mode", MODES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        if self.near is not None and (isinstance(self.near, bool) or not 0 <= self.near < math.inf):
            raise ValueError(f"near must be None or a finite depth >= 0 in world units, got {self.near!r}")
        if self.kind == "pixel" and (self.readout, self.write_policy) != ("aligned", "append"):
            raise ValueError(
                'readout must be "aligned" and write_policy "append" with kind "pixel", got'
                f" {self.readout!r} and {self.write_policy!r}"
            )


MEMORIES: dict[str, MemoryConfig] = {
    "none": MemoryConfig(kind="none"),
    "nearest": MemoryConfig(readout="nearest", write_policy="append"),
    "aligned": MemoryConfig(),
    "pixel": MemoryConfig(kind="pixel", write_policy="append"),
}
"""Presets: nothing; the published memory, every token kept and the nearest read; the default; colours."""


def resolve_memory(memory: MemoryConfig | str) -> MemoryConfig:
    """Return the preset of this name; a config is returned as it is.

    Raises:
        TypeError, ValueError: neither a config nor the name of one.
    """
    if isinstance(memory, MemoryConfig):
        return memory
    if not isinstance(memory, str):
        raise TypeError(f"memory must be a MemoryConfig or the name of one, got {type(memory).__name__}")
    if memory not in MEMORIES:
        renamed = ', which is now "aligned"' if memory == "ours" else ""
        raise ValueError(f"memory must be one of {', '.join(MEMORIES)}, got {memory!r}{renamed}")
    return MEMORIES[memory]


def fit_memory(
    memory: MemoryConfig | str | None, control: str | None = None, write_policy: str | None = None
) -> MemoryConfig:
    """Fit a memory to a pipeline: what is left open is decided, what contradicts is refused.

    Args:
        memory: a config, or the name of a preset; None takes "aligned", or "none" with an adapter of control rays.
        control: of the pipeline's memory adapter, see :class:`~mirage.models.adapter.MirageMemoryAdapter`; None where
            it has no adapter.
        write_policy: of a cache that is given, if any. Where `memory` is None it follows that.

    Raises:
        TypeError: `memory` is neither a config nor the name of one.
        ValueError: no such preset, or one that contradicts the adapter or the cache.
    """
    if memory is None:
        resolved = MEMORIES["none" if control == "rays" else "aligned"]
        resolved = resolved if write_policy is None else replace(resolved, write_policy=write_policy)
    else:
        resolved = resolve_memory(memory)
    if control == "rays" and resolved.kind != "none":
        raise ValueError(
            f"memory must be none with an adapter of control rays, which is shown no memory, got {memory!r}"
        )
    if control is None and resolved.mode == "adapter":
        raise ValueError('memory must have mode "none" with a pipeline without memory_adapter, got "adapter"')
    if resolved.kind != "none" and write_policy not in (None, resolved.write_policy):
        raise ValueError(f'cache must have write_policy "{resolved.write_policy}" like memory, got "{write_policy}"')
    return replace(resolved, mode=resolved.mode or ("none" if control is None else "adapter"))

"""What a run is started with, as plain JSON values: a run is resumed only with the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ..models.components import fingerprint, tensor_bytes
from ..perception.static_filter import StaticFilter
from .state import DepthSources, SessionConfig


def describe_run(
    config: SessionConfig,
    components: Mapping[str, Any],
    *,
    image: Tensor,
    texts: Mapping[str, str | None],
    tensors: Mapping[str, Tensor | None],
    depth: DepthSources,
    first_depth: Tensor | None,
    static_filter: str | StaticFilter,
    seed: int | None,
) -> dict[str, Any]:
    """Describe a run. Weights are fingerprinted, which takes a while: only a run on disk needs it.

    Args:
        config: of the session.
        components: of the pipeline, by name.
        image: (1, 3, H, W), resized to the frames' size.
        texts: prompts, by the name of their argument.
        tensors: embeddings and noise that were given, by the name of their argument.
        depth: where depth comes from.
        first_depth: (1, H, W), the given depth of frame 0, if any.
        static_filter: as it was given.
        seed: of the generator, if one was given.
    """
    estimator, given = depth.estimator, depth.given
    described_filter = static_filter if isinstance(static_filter, str) else type(static_filter).__name__
    return {
        **asdict(config),
        **texts,
        "image": _digest(image),
        **{name: None if tensor is None else _digest(tensor) for name, tensor in tensors.items()},
        "depth": None if given is None or first_depth is None else f"{given.num_frames} frames {_digest(first_depth)}",
        "depth_estimator": None if estimator is None else type(estimator).__name__,
        "static_filter": None if config.memory.kind == "none" else described_filter,
        "seed": seed,
        **{name: fingerprint(model) for name, model in components.items()},
    }


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()[:16]

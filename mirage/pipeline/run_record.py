"""What a run is started with, as plain JSON values: a run is resumed only with the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files.checked import DamagedFileError, digest_json, read_json
from ..models.components import fingerprint, tensor_bytes
from ..perception.static_filter import StaticFilter
from .state import DepthSources, SessionConfig

FORMAT, VERSION = "mirage-run", 1


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


def format_record(record: dict[str, Any]) -> str:
    """Format run.json."""
    content = {"format": FORMAT, "version": VERSION, "settings": record, "checksum": digest_json(record)}
    return json.dumps(content, indent=2) + "\n"


def check_record(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Check that the run whose run.json is `path` was started with what is in `record`.

    Returns:
        Its settings, as they are in the file.

    Raises:
        DamagedFileError: it is not the record of a run.
        ValueError: the message names each value that differs.
    """
    found = read_json(path)
    known, settings = (found.get("format"), found.get("version")), found.get("settings")
    if known[0] != FORMAT or not isinstance(settings, dict):
        raise DamagedFileError(f"{path} is damaged: it is not the record of a run")
    if known != (FORMAT, VERSION):
        raise ValueError(f"{path}: must be {FORMAT} version {VERSION}, got {known[0]} {known[1]}")
    if found.get("checksum", digest_json(settings)) != digest_json(settings):  # the first runs had none
        raise DamagedFileError(f"{path} is damaged: its settings are not what their checksum says")
    now = json.loads(json.dumps(record))  # tuples become lists, as in the file
    before = _with_scene(_with_memory(settings, now), settings)
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if names:
        differences = "; ".join(f"{name} was {before.get(name)!r}, got {now.get(name)!r}" for name in names)
        raise ValueError(f"{path}: a run can be resumed only with what it was started with: {differences}")
    return settings


def _with_scene(before: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a run from when all lengths were metres under today's names; its cache has the near of then.

    Args:
        before: what :func:`_with_memory` made of `settings`.
        settings: as they were recorded.
    """
    memory = before.get("memory")
    if not isinstance(memory, dict) or "near" in settings.get("memory", {}):
        return before
    size = before.get("reference_voxel_size")
    return before | {"memory": memory | {"near": None}, "reference_voxel_size": None if size == 0.1 else size}


def _with_memory(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a run from before there was a `MemoryConfig` under today's names.

    What such a run did not record (`write_policy`, which its cache holds, and `mode`) is taken from `now`.
    """
    if "memory" in before or "splat" not in before:
        return before
    renamed = {name: value for name, value in before.items() if name not in ("splat", "points")}
    kind = "pixel" if before.get("points") == "pixels" else "latent"
    if before.get("static_filter") == "KeepNothing":  # how a memory was kept empty
        kind, renamed["static_filter"] = "none", None
    return renamed | {"memory": now.get("memory", {}) | {"kind": kind, "readout": before["splat"]}}

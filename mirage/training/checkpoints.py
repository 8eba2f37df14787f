"""A checkpoint of a training run: tensors as safetensors, all else as JSON, and a manifest of their checksums.

    trained.safetensors      what is trained of the models
    optimizer.safetensors    tensors of the optimizer's state
    state.json               the rest of it, schedule, gradient scaler, broken clips, and how far metrics.jsonl was
    manifest.json            checksums of these, the step, and the digest of the run's configuration

Nothing is written as a pickle. Checkpoints of earlier releases were: theirs are read by torch's unpickler of plain
values and tensors, which executes nothing. Random states are not kept, since every draw is a function of the seed and
the step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from mirage_kernels.io import flush_folder, write_tensors

from ..files.checked import (
    MANIFEST,
    DamagedFileError,
    check_file,
    parse_json,
    parse_tensors,
    read_file,
    read_manifest,
    remove,
    write_manifest,
)

TRAINED, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"
# Of checkpoints from before there were manifests.
_OLD_OPTIMIZER, _OLD_SCALER = "optimizer.bin", "scaler.pt"
_OLD_SCHEDULE, _OLD_PROGRESS = "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"

_STEP, _DRAFT = re.compile(r"\d{8}"), re.compile(r"\.\d{8}")


@dataclass(frozen=True)
class Checkpoint:
    """What a run continues from.

    Attributes:
        step: steps taken.
        trained: parameters by name.
        optimizer, schedule: their state dicts.
        scaler: the state dict of the gradient scaler, with fp16 alone.
        broken: {clip: reason}.
        metrics: bytes and sha256 of metrics.jsonl after the step; None where an earlier release did not say.
        config: digest of the configuration; None as `metrics`.
    """

    step: int
    trained: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any] | None = None
    broken: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] | None = None
    config: str | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write a checkpoint into the folder of checkpoints, atomically, and remove all but the newest `keep`."""
    draft, final = (folder / f"{dot}{checkpoint.step:08d}" for dot in (".", ""))
    remove(draft)
    draft.mkdir()
    tensors: dict[str, Tensor] = {}
    state = {
        "optimizer": _pack(checkpoint.optimizer, "optimizer", tensors),
        "schedule": _pack(checkpoint.schedule, "schedule", tensors),
        "scaler": _pack(checkpoint.scaler, "scaler", tensors),
        "broken": checkpoint.broken,
        "metrics": checkpoint.metrics,
    }
    write_tensors(draft / TRAINED, checkpoint.trained)
    write_tensors(draft / OPTIMIZER, tensors)
    (draft / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
    write_manifest(draft, (TRAINED, OPTIMIZER, STATE), {"step": checkpoint.step, "config": checkpoint.config})
    flush_folder(draft, content=True)
    os.replace(draft, final)
    flush_folder(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in their folder, the newest last."""
    return sorted(path for path in folder.glob("[0-9]*") if _STEP.fullmatch(path.name))


def remove_drafts(folder: Path) -> None:
    """Remove the checkpoints that an earlier process began and did not finish."""
    for path in [path for path in folder.glob(".*") if _DRAFT.fullmatch(path.name)]:
        remove(path)


def read_config_digest(folder: Path) -> str | None:
    """Read what the newest checkpoint knows of the configuration; None where there is none that does."""
    found = list_checkpoints(folder)
    try:
        manifest = read_manifest(found[-1]) if found else None
    except (OSError, ValueError):  # it is named when it is read
        return None
    return None if manifest is None else manifest["config"]


def read_newest(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint in the folder of checkpoints; None where there is none.

    Raises:
        DamagedFileError: a file of it is not what was written; the message says what can be done.
    """
    found = list_checkpoints(folder)
    if not found:
        return None
    try:
        return _read(found[-1])
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}; {_advise(folder, found)}") from None


def _advise(folder: Path, found: list[Path]) -> str:
    """Say what can be done where the newest of the checkpoints `found` is damaged."""
    if len(found) > 1:
        try:
            before = _read(found[-2])
            return f"put it back from a copy, or delete {found[-1]}: the run continues from step {before.step}"
        except (OSError, ValueError):
            pass
    return f"put it back from a copy, or delete {folder} and begin again"


def _read(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise DamagedFileError(f"{folder} is damaged: it must be a folder")
    manifest = read_manifest(folder)
    if manifest is None:
        if os.path.lexists(folder / STATE):  # of no earlier release
            raise DamagedFileError(f"{folder / MANIFEST} is missing")
        return _read_old(folder)
    if manifest["step"] != int(folder.name):
        raise DamagedFileError(f"{folder / MANIFEST} is damaged: it is that of step {manifest['step']}")
    for name in (TRAINED, OPTIMIZER, STATE):  # all of it, before any of it is held
        check_file(folder, name, manifest)
    trained, _ = parse_tensors(folder / TRAINED, read_file(folder, TRAINED, manifest))
    tensors, _ = parse_tensors(folder / OPTIMIZER, read_file(folder, OPTIMIZER, manifest))
    state = parse_json(folder / STATE, read_file(folder, STATE, manifest))
    return Checkpoint(
        step=manifest["step"],
        trained=trained,
        optimizer=_unpack(state["optimizer"], tensors),
        schedule=_unpack(state["schedule"], tensors),
        scaler=_unpack(state["scaler"], tensors),
        broken=state["broken"],
        metrics=state["metrics"],
        config=manifest["config"],
    )


# Of earlier releases.


def _read_old(folder: Path) -> Checkpoint:
    """Read a checkpoint of accelerate, as there were before manifests."""
    trained, _ = parse_tensors(folder / TRAINED, read_file(folder, TRAINED))
    progress = _unpickle(folder / _OLD_PROGRESS)
    if progress.get("step") != int(folder.name) or not isinstance(progress.get("broken"), dict):
        raise DamagedFileError(f"{folder / _OLD_PROGRESS} is damaged: it holds no step {int(folder.name)}")
    return Checkpoint(
        step=progress["step"],
        trained=trained,
        optimizer=_unpickle(folder / _OLD_OPTIMIZER),
        schedule=_unpickle(folder / _OLD_SCHEDULE),
        scaler=_unpickle(folder / _OLD_SCALER) if (folder / _OLD_SCALER).exists() else None,
        broken=progress["broken"],
    )


def _unpickle(path: Path) -> dict[str, Any]:
    """Read a dict of plain values and tensors. Anything else in the pickle is refused before it is made."""
    read_file(path.parent, path.name)  # named where it is not a file
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedFileError(
            f"{path} is damaged: it must hold plain values and tensors alone, as an earlier release has written them"
            f" ({type(error).__name__})"
        ) from None
    if not isinstance(values, dict):
        raise DamagedFileError(f"{path} is damaged: it must hold a dict, got {type(values).__name__}")
    return values


# State dicts as JSON and named tensors.


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Turn a state dict into JSON values; its tensors go to `tensors`, named by their place."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):  # keys may be numbers, which JSON has not
        return {"dict": [[key, _pack(held, f"{name}.{key}", tensors)] for key, held in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(held, f"{name}.{i}", tensors) for i, held in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} must be a plain value or a tensor to be saved, got {type(value).__name__}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Make what :func:`_pack` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "dict":
        return {key: _unpack(inner, tensors) for key, inner in held}
    items = [_unpack(inner, tensors) for inner in held]
    return tuple(items) if kind == "tuple" else items

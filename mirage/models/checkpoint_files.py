"""Checkpoint files from elsewhere: finding and reading them, and saying what in them does not fit. Nothing is loaded.

Nothing is read as a pickle: `.pt` and its like go through `weights_only=True`, mapped from the file, so that no size
that a file claims is allocated before the file is known to hold it.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .scaled_weights import restore_weights

Source = Mapping[str, Any] | str | Path | Sequence[str | Path]
"""A state dict, a file of one, the files of its shards, their index, or the folder that holds them."""

# Module names that stand before a weight's own, in any number and order.
_PREFIXES = ("module.", "model.", "pipe.", "dit.", "vace.", "diffusion_model.", "base_model.", "transformer.")
_WRAPPING_MODULES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # anywhere in a name
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "generator", "transformer", "dit")
_PICKLED = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *_PICKLED)
"""Endings of the files that can be read."""
_INDEX = ".index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
_MAX_SHARDS = 1000
_MAX_WRAPPERS = 8  # a file may hold a mapping that is in itself


class Weights(NamedTuple):
    """Tensors under our names, the key each came from, and what to call their source in errors."""

    label: str
    tensors: dict[str, Tensor]
    keys: dict[str, str]


def label_source(part: str, source: Source) -> str:
    """Return what to call a source in errors."""
    if isinstance(source, Mapping):
        return part
    paths = [source] if isinstance(source, (str, Path)) else source
    return f"{part} ({', '.join(str(path) for path in paths)})"


def read_state(part: str, source: Source) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the state dict of one part ("dit", "vace", "lora") out of its wrappers, and the metadata of its files.

    Weights stored in 8 bits come out as what they stand for, see :func:`~mirage.models.scaled_weights.restore_weights`.

    Raises:
        ValueError: a file is no checkpoint, or not all of one, or a key is in two of them.
        FileNotFoundError: no such file.
    """
    label = label_source(part, source)
    metadata: dict[str, str] = {}
    state: dict[str, Any] = {}
    if isinstance(source, Mapping):
        state |= unwrap(source, part)
    else:
        for path in list_files(source):
            tensors, found = read_file(path)
            metadata |= found
            tensors = unwrap(tensors, part)
            twice = sorted(state.keys() & tensors.keys())
            if twice:
                raise ValueError(f"{label}: {list_some(twice)} is in more than one of the files")
            state |= tensors
    if odd := [key for key in state if not isinstance(key, str)]:
        raise ValueError(f"{label}: names must be strings, got {odd[0]!r}")
    return restore_weights(label, state), metadata


def list_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files that a source stands for: itself, all shards of an index, or what a folder holds.

    Raises:
        ValueError: some shards of several, an index that is none, or a folder that holds no single checkpoint.
        FileNotFoundError: no such file.
    """
    given = [Path(source)] if isinstance(source, (str, os.PathLike)) else [Path(path) for path in source]
    if len(given) == 1 and given[0].is_dir():
        return _list_folder(given[0])
    if len(given) == 1 and given[0].name.endswith(_INDEX):
        return _list_shards(given[0])
    _check_all_shards(given)
    return given


def _list_folder(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob(f"*{_INDEX}"))
    if len(indexes) == 1:
        return _list_shards(indexes[0])
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    shards = [match for path in files if (match := _SHARD.fullmatch(path.name))]
    if files and len(shards) == len(files) and len({(match[1], match[3], match[4]) for match in shards}) == 1:
        _check_all_shards(files)
        return files
    if len(files) == 1:
        return files
    if not files and (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: is the folder of a pipeline: give the weights in it, such as {folder}/transformer")
    if not files:
        raise FileNotFoundError(f"no checkpoint file in {folder}: one must end in {', '.join(SUFFIXES)}")
    raise ValueError(f"{folder}: must hold one checkpoint, got {list_some(path.name for path in files)}: name the file")


def _list_shards(index: Path) -> list[Path]:
    if not index.is_file():
        raise FileNotFoundError(f"no checkpoint file at {index}")
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(named))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: must be the index of shards, with a weight_map ({error})") from error
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{index}: its weight_map must name files beside it")
    paths = [index.parent / name for name in names]
    if absent := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{index}: {list_some(absent)} of its {len(names)} shards must lie beside it")
    return paths


def _check_all_shards(paths: list[Path]) -> None:
    """Check that of files named as shards ("NAME-00001-of-00003") all are there."""
    names = {path.name for path in paths}
    for path in paths:
        match = _SHARD.fullmatch(path.name)
        if match is None or not 0 < int(match[3]) <= _MAX_SHARDS:
            continue
        shards = [f"{match[1]}-{number:05d}-of-{match[3]}{match[4]}" for number in range(1, int(match[3]) + 1)]
        if absent := [name for name in shards if name not in names]:
            raise ValueError(
                f"{path}: is one of {len(shards)} shards; missing: {list_some(absent)}; give all of them, their index,"
                " or the folder"
            )


def looks_like_path(name: str) -> bool:
    """Return whether a name can only be a path: it is no OWNER/NAME of the hub, or some of it is on this machine."""
    path = Path(name).expanduser()
    known = (*SUFFIXES, ".gguf", ".json")
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") != 1
        or "\\" in name
        or path.suffix in known
        or path.exists()
        or path.parent.is_dir()
    )


def read_file(path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Read what a file holds, and its metadata.

    Raises:
        ValueError: it is no checkpoint.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(str(path), framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); was it cut short?") from error
    if path.suffix == ".gguf":
        raise ValueError(
            f"{path}: GGUF is not read here: give .safetensors, or MirageTransformer3DModel.from_single_file"
        )
    if path.suffix not in _PICKLED:
        raise ValueError(f"{path}: a checkpoint file must end in .safetensors or one of {', '.join(_PICKLED)}")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip file, as torch.save has written since 1.6")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what torch.load raises for a broken or unsafe file depends on where it breaks
        raise ValueError(f"{path}: cannot be read with weights_only=True ({error})") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: a checkpoint file must hold a mapping of names to tensors, got {type(state)}")
    return state, {}


def unwrap(state: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """Return the innermost state dict of a part: what training scripts wrap theirs in is taken off."""
    for _ in range(_MAX_WRAPPERS):
        inner = next((state[name] for name in (part, *_WRAPPERS) if isinstance(state.get(name), Mapping)), None)
        if inner is None:
            break
        state = inner
    return state


def read_weights(part: str, source: Source, rename: Callable[[str, Any], str]) -> Weights:
    """Read a part's tensors under our names, which a file may have already.

    Raises:
        ValueError, FileNotFoundError: as of :func:`read_state`, or two keys are the same weight.
    """
    state, _ = read_state(part, source)
    weights = Weights(label_source(part, source), {}, {})
    renamed = any("condition_embedder." in key or ".attn1." in key for key in state)
    for key, value in state.items():
        name = strip_prefixes(key)
        name = name if renamed else rename(name, value)
        if name in weights.keys:
            raise ValueError(f"{weights.label}: {weights.keys[name]} and {key} are the same weight, {name}")
        weights.keys[name] = key
        weights.tensors[name] = value
    return weights


def strip_prefixes(key: str) -> str:
    """Return a weight's own name, without the modules that stand before it or wrap others."""
    for wrapping in _WRAPPING_MODULES:
        key = key.replace(wrapping, "")
    while True:
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
        if prefix is None:
            return key
        key = key[len(prefix) :]


def rename_dit(key: str, value: Any = None) -> str:
    """Return diffusers' name of a weight of Wan's; a name it does not know stays."""
    if "motion_encoder" in key or "face_adapter" in key:  # of Wan-Animate, whose weights are cut and reshaped
        return key
    return next(iter(convert_wan_transformer_to_diffusers({key: value})))


def list_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a model."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def describe_shape(value: Any) -> Any:
    """Return a tensor's shape, or what it is instead of a tensor."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def list_some(names: Iterable[str]) -> str:
    """Return the first five names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_weights(weights: Weights, shapes: dict[str, tuple[int, ...]], model: str) -> None:
    """Check that weights are exactly the model's, name by name and shape by shape, and finite numbers.

    Raises:
        ValueError: they are not.
    """
    given = {name: describe_shape(value) for name, value in weights.tensors.items()}
    left_over = [weights.keys[name] for name in given if name not in shapes]
    missing = [name for name in shapes if name not in given]
    reshaped = [
        f"{weights.keys[name]} {shape} where {shapes[name]} is expected"
        for name, shape in given.items()
        if name in shapes and shape != shapes[name]
    ]
    if left_over or missing or reshaped:
        matching = len(given) - len(left_over) - len(reshaped)
        refuse(weights.label, matching, len(given), f"{model}'s {len(shapes)}", left_over, missing, reshaped)
    for name, value in weights.tensors.items():
        check_values(weights.label, weights.keys[name], value)


def check_values(label: str, key: str, value: Tensor) -> None:
    """Check that a tensor is of finite floating point numbers.

    Raises:
        ValueError: it is not.
    """
    if not value.is_floating_point():
        raise ValueError(f"{label}: {key} must be of floating point numbers, got {value.dtype}; nothing loaded")
    if value.numel() and not value.float().isfinite().all():
        raise ValueError(f"{label}: {key} must be finite, got NaN or infinity; nothing loaded")


def refuse(
    label: str, matching: int, given: int, expected: str, left_over: list[str], missing: list[str], reshaped: list[str]
) -> NoReturn:
    """Raise the `ValueError` that names what is left over, missing or of another shape."""
    problems = {"left over": left_over, "missing": missing, "of another shape": reshaped}
    listed = [f"{what}: {list_some(names)}" for what, names in problems.items() if names]
    raise ValueError(
        "; ".join([f"{label}: {matching} of {given} keys match the {expected}", *listed, "nothing loaded"])
    )

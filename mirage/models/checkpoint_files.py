"""Checkpoint files from elsewhere: reading them, and saying what in them does not fit. Nothing is loaded here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

Source = Mapping[str, Any] | str | Path | Sequence[str | Path]
"""A state dict, a file of one, or the files of its shards."""

# Module names that stand before a weight's own, in any number and order.
_PREFIXES = ("module.", "model.", "pipe.", "dit.", "vace.", "diffusion_model.", "base_model.", "transformer.")
_PICKLED = (".pt", ".pth", ".ckpt", ".bin")


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

    Raises:
        ValueError: a file is no checkpoint, or a key is in two of them.
        FileNotFoundError: no such file.
    """
    metadata: dict[str, str] = {}
    if isinstance(source, Mapping):
        state = dict(unwrap(source, part))
    else:
        state = {}
        for path in [source] if isinstance(source, (str, Path)) else source:
            tensors, found = read_file(Path(path))
            metadata |= found
            tensors = unwrap(tensors, part)
            twice = sorted(state.keys() & tensors.keys())
            if twice:
                raise ValueError(f"{label_source(part, source)}: {list_some(twice)} is in more than one of the files")
            state |= tensors
    return state, metadata


def read_file(path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(str(path), framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); was it cut short?") from error
    if path.suffix not in _PICKLED:
        raise ValueError(f"{path}: a checkpoint file must end in .safetensors or one of {', '.join(_PICKLED)}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises for a broken or unsafe file depends on where it breaks
        raise ValueError(f"{path}: cannot be read with weights_only=True ({error})") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: a checkpoint file must hold a mapping of names to tensors, got {type(state)}")
    return state, {}


def unwrap(state: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    for way in ((part,), ("generator", part), ("state_dict",)):
        inner: Any = state
        for name in way:
            inner = inner.get(name) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            return inner
    return state


def read_weights(part: str, source: Source, rename: Callable[[str, Any], str]) -> Weights:
    """Read a part's tensors under our names.

    Raises:
        ValueError, FileNotFoundError: as of :func:`read_state`, or two keys are the same weight.
    """
    state, _ = read_state(part, source)
    weights = Weights(label_source(part, source), {}, {})
    for key, value in state.items():
        name = rename(strip_prefixes(key), value)
        if name in weights.keys:
            raise ValueError(f"{weights.label}: {weights.keys[name]} and {key} are the same weight, {name}")
        weights.keys[name] = key
        weights.tensors[name] = value
    return weights


def strip_prefixes(key: str) -> str:
    """Return a weight's own name, without the modules that stand before it."""
    while True:
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
        if prefix is None:
            return key
        key = key[len(prefix) :]


def rename_dit(key: str, value: Any = None) -> str:
    """Return diffusers' name of a weight of Wan's; a name it does not know stays."""
    return next(iter(convert_wan_transformer_to_diffusers({key: value})))


def list_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a model."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def describe_shape(value: Any) -> Any:
    """Return a tensor's shape, or what it is instead of a tensor."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def list_some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_weights(weights: Weights, shapes: dict[str, tuple[int, ...]], model: str) -> None:
    """Check that weights are exactly the model's, name by name and shape by shape.

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


def refuse(
    label: str, matching: int, given: int, expected: str, left_over: list[str], missing: list[str], reshaped: list[str]
) -> NoReturn:
    """Raise the `ValueError` that names what is left over, missing or of another shape."""
    problems = {"left over": left_over, "missing": missing, "of another shape": reshaped}
    listed = [f"{what}: {list_some(names)}" for what, names in problems.items() if names]
    raise ValueError(
        "; ".join([f"{label}: {matching} of {given} keys match the {expected}", *listed, "nothing loaded"])
    )

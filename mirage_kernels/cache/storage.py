"""A cache on disk: one safetensors file, a format version and the cache's config in its metadata. No pickle.

Tensors: ``points`` (N, 4) float32, ``features`` (N, C), ``frame_ids`` (N,) int32, ``frame_centers`` (F, 3) float32.
Version 1 is that of a cache that appends features of float32, float16 or bfloat16; releases that know nothing else read
it too. Any other is saved as version 2. Features of float8_e4m3fn come with ``scales`` (N,) uint8, each in [11, 246]: a
value is float8 * 2^(scale - 127). With bounded writes there are ``votes`` (N,) uint8 and, where tokens are averaged,
``looks`` (N,) uint8, see :func:`mirage_kernels.bounded_write`.

Files keep the names that they had when the format was fixed, so that any release reads those of any other: the config
is their "settings", ``free_space_violations`` are ``votes``, and ``num_observations`` are ``looks``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..constants import MAX_SCALE, MIN_SCALE
from ..io import replace_tensors

FORMAT = "mirage-latent-cache"
_REQUIRED = ("channels", "dtype", "write_policy", "capacity")  # in the config
_FILE_NAMES = {"free_space_violations": "votes", "num_observations": "looks"}  # of tensors, where they differ
_FLOAT8 = "float8_e4m3fn"
_DTYPES = ("float32", "float16", "bfloat16")
_VERSIONS = {"1": (_DTYPES, ("append",)), "2": ((*_DTYPES, _FLOAT8), ("append", "bounded"))}  # features, policies


def format_version(config: dict[str, Any]) -> str:
    """Return the version of the file that a cache with this config is saved as."""
    dtype, policy = config["dtype"], config["write_policy"]
    return next(version for version, (dtypes, policies) in _VERSIONS.items() if dtype in dtypes and policy in policies)


def _names(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the names, in the file, of the tensors of a cache with this config."""
    names = ["points", "features", "frame_ids", "frame_centers"]
    names += ["scales"] * (config["dtype"] == _FLOAT8)
    if config["write_policy"] == "bounded":
        names += ["votes"] + ["looks"] * (config.get("merge") == "mean")
    return tuple(names)


def save_cache(path: str | Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Save a cache's tensors (on any device) and config."""
    metadata = {"format": FORMAT, "version": format_version(config), "settings": json.dumps(config)}
    named = {_FILE_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
    replace_tensors(path, {name: named[name] for name in _names(config)}, metadata)


def read_metadata(path: str | Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Read the config of a saved cache, and the shape of each tensor by its name in the file, but no tensor.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole safetensors file, not a cache, or of an unknown version.
    """
    with _open(path) as file:
        config = _check_metadata(path, file.metadata())
        held, names = set(file.keys()), _names(config)
        missing = [name for name in names if name not in held]
        if missing:
            raise ValueError(f"{path}: a saved cache must hold {', '.join(names)}, missing {', '.join(missing)}")
        return config, {name: tuple(file.get_slice(name).get_shape()) for name in names}


def load_cache(path: str | Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the tensors of a saved cache onto ``device``, and its config; errors as :func:`read_metadata`."""
    config, shapes = read_metadata(path)
    dtype = getattr(torch, config["dtype"])
    count, channels = shapes["points"][:1], (config["channels"],)
    frames = shapes["frame_centers"][:1]
    expected = {
        "points": ((*count, 4), torch.float32),
        "features": ((*count, *channels), dtype),
        "frame_ids": (count, torch.int32),
        "frame_centers": ((*frames, 3), torch.float32),
        **{name: (count, torch.uint8) for name in ("scales", "votes", "looks")},
    }
    with _open(path, device) as file:
        tensors = {name: file.get_tensor(name) for name in shapes}
    for name, tensor in tensors.items():
        if (tuple(tensor.shape), tensor.dtype) != expected[name]:
            shape, kind = expected[name]
            raise ValueError(f"{path}: {name} must be {shape} {kind}, got {tuple(tensor.shape)} {tensor.dtype}")
    scales = tensors.get("scales")
    if scales is not None and bool(((scales < MIN_SCALE) | (scales > MAX_SCALE)).any()):
        span = f"{int(scales.min())} to {int(scales.max())}"
        raise ValueError(f"{path}: scales must be in [{MIN_SCALE}, {MAX_SCALE}], got {span}")
    names = {old: name for name, old in _FILE_NAMES.items()}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}, config


def _open(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """Open a safetensors file, for a ``with`` block."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no cache file at {path}")
    try:
        return safe_open(str(path), framework="pt", device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); was it cut short?") from error


def _check_metadata(path: str | Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    """Check format and version, and return the config."""
    if not metadata or metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: a safetensors file, but not a saved LatentCache (no format {FORMAT!r} in its metadata)"
        )
    version = metadata.get("version")
    if version not in _VERSIONS:
        raise ValueError(
            f"{path}: cache format version {version!r} is unknown, this package reads versions {', '.join(_VERSIONS)}"
        )
    try:
        config = json.loads(metadata["settings"])
        missing = [name for name in _REQUIRED if name not in config]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: the metadata must hold the cache's settings as JSON, got {metadata!r}") from error
    if missing:
        raise ValueError(f"{path}: the cache's settings must name {', '.join(_REQUIRED)}, missing {', '.join(missing)}")
    dtypes, policies = _VERSIONS[version]
    for name, known in (("dtype", dtypes), ("write_policy", policies)):
        if config[name] not in known:
            raise ValueError(
                f"{path}: the settings' {name} must be one of {', '.join(known)} in version {version},"
                f" got {config[name]!r}"
            )
    return config

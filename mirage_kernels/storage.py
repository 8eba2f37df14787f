"""A cache on disk: one safetensors file, a format version and the cache's settings in its metadata. No pickle.

Tensors: ``points`` (N, 4) float32, ``features`` (N, C), ``frame_ids`` (N,) int32, ``frame_centers`` (F, 3) float32.
Version 1 is that of a cache that appends features of float32, float16 or bfloat16; releases that know nothing else read
it too. Any other is saved as version 2. Features of float8_e4m3fn come with ``scales`` (N,) uint8, each in [11, 246]: a
value is float8 * 2^(scale - 127). With bounded writes there are ``votes`` (N,) uint8 and, where tokens are averaged,
``looks`` (N,) uint8, see :func:`mirage_kernels.bounded_write`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .reference import GREATEST_SCALE, LEAST_SCALE

FORMAT = "mirage-latent-cache"
_SETTINGS = ("channels", "dtype", "write_policy", "capacity")
_FLOAT8 = "float8_e4m3fn"
_DTYPES = ("float32", "float16", "bfloat16")
_VERSIONS = {"1": (_DTYPES, ("append",)), "2": ((*_DTYPES, _FLOAT8), ("append", "bounded"))}  # features, policies


def format_version(settings: dict[str, Any]) -> str:
    """Of the file that a cache with these settings is saved as."""
    dtype, policy = settings["dtype"], settings["write_policy"]
    return next(version for version, (dtypes, policies) in _VERSIONS.items() if dtype in dtypes and policy in policies)


def _names(settings: dict[str, Any]) -> tuple[str, ...]:
    """Of the tensors of a file with these settings."""
    names = ["points", "features", "frame_ids", "frame_centers"]
    names += ["scales"] * (settings["dtype"] == _FLOAT8)
    if settings["write_policy"] == "bounded":
        names += ["votes"] + ["looks"] * (settings.get("merge") == "mean")
    return tuple(names)


def replace_file(path: str | Path, write: Callable[[str], None]) -> None:
    """Write a file under a temporary name beside ``path``, flush it to disk, then rename it onto ``path``.

    A crash at any moment leaves the old file or the new one, whole; a failure leaves no temporary file.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private; a saved file gets the permissions any other new file would.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_cache(path: str | Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Save a cache's tensors (on any device) and settings."""
    metadata = {"format": FORMAT, "version": format_version(settings), "settings": json.dumps(settings)}
    on_host = {name: tensors[name].detach().cpu().contiguous() for name in _names(settings)}
    replace_file(path, lambda temporary: save_file(on_host, temporary, metadata))


def read_metadata(path: str | Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Settings of a saved cache, and the shape of each tensor, without reading the tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole safetensors file, not a cache, or of an unknown version.
    """
    with _open(path) as file:
        settings = _check_metadata(path, file.metadata())
        held, names = set(file.keys()), _names(settings)
        missing = [name for name in names if name not in held]
        if missing:
            raise ValueError(f"{path}: a saved cache must hold {', '.join(names)}, missing {', '.join(missing)}")
        return settings, {name: tuple(file.get_slice(name).get_shape()) for name in names}


def load_cache(path: str | Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a saved cache on ``device``, and its settings; errors as :func:`read_metadata`."""
    settings, shapes = read_metadata(path)
    dtype = getattr(torch, settings["dtype"])
    count, channels = shapes["points"][:1], (settings["channels"],)
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
    if scales is not None and bool(((scales < LEAST_SCALE) | (scales > GREATEST_SCALE)).any()):
        span = f"{int(scales.min())} to {int(scales.max())}"
        raise ValueError(f"{path}: scales must be in [{LEAST_SCALE}, {GREATEST_SCALE}], got {span}")
    return tensors, settings


def _open(path: str | Path, device: torch.device | str = "cpu") -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no cache file at {path}")
    try:
        return safe_open(str(path), framework="pt", device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); was it cut short?") from error


def _check_metadata(path: str | Path, metadata: dict[str, str] | None) -> dict[str, Any]:
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
        settings = json.loads(metadata["settings"])
        missing = [name for name in _SETTINGS if name not in settings]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: the metadata must hold the cache's settings as JSON, got {metadata!r}") from error
    if missing:
        raise ValueError(f"{path}: the cache's settings must name {', '.join(_SETTINGS)}, missing {', '.join(missing)}")
    dtypes, policies = _VERSIONS[version]
    for name, known in (("dtype", dtypes), ("write_policy", policies)):
        if settings[name] not in known:
            raise ValueError(
                f"{path}: the settings' {name} must be one of {', '.join(known)} in version {version},"
                f" got {settings[name]!r}"
            )
    return settings

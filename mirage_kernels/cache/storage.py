"""A cache on disk: one safetensors file, whose metadata hold the format, its version, and what is no tensor. No pickle.

Tensors, by the names that they had when the format was fixed:

- ``points`` (N, 4) float32, ``features`` (N, C) of the config's dtype, ``frame_ids`` (N,) int32, ``frame_centers``
  (F, 3) float32.
- ``scales`` (N,) uint8 with features of float8_e4m3fn, each in [11, 246]: a value is float8 * 2^(scale - 127).
- ``votes`` (N,) uint8 with bounded writes, below 255: ``free_space_violations``. ``looks`` (N,) uint8 where tokens are
  averaged, in [1, 16]: ``num_observations``.

Metadata: ``format``, ``version`` and the config as JSON, called ``settings``. From version 3 on also ``near`` and
``origin``, what the first write settled, as JSON, null where nothing is; x, y, z in ``points`` and ``frame_centers``
count from the origin. And ``sha256``, of everything else in the file.

Version 1 is that of a cache that appends features of float32, float16 or bfloat16, version 2 that of any other, from
before there was an origin: both load, to the same bits. What is saved is version 3. It reserves, for readouts between
the tokens' centres:

- ``frame_poses`` (F, 4, 4) and ``frame_intrinsics`` (F, 3, 3) float64, of the written views, poses from the origin and
  intrinsics in cells of the latents written; ``token_flags`` (N,) uint8, bit 0: the token has such a view.
- ``phase`` (N, M) of the features' dtype or float32: more numbers of a token.
- ``table`` in the metadata: the fingerprint of the table that a read must have.

This release checks them, reads without them, and saves none. Anything else in a file of version 3 is refused.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..constants import INVALID, MAX_OBSERVATIONS, MAX_SCALE, MIN_SCALE
from ..io import replace_tensors
from .anchor import UNSETTLED, Anchor
from .config import CacheConfig

FORMAT, VERSION = "mirage-latent-cache", 3
_FILE_NAMES = {"free_space_violations": "votes", "num_observations": "looks"}  # of tensors, where they differ
_NAMES = {old: name for name, old in _FILE_NAMES.items()}
_REQUIRED = ("channels", "dtype", "write_policy", "capacity")  # in the config
_FLOAT8 = "float8_e4m3fn"
_DTYPES = ("float32", "float16", "bfloat16")
_EARLIER = {1: (_DTYPES, ("append",)), 2: ((*_DTYPES, _FLOAT8), ("append", "bounded"))}  # features, policies
_METADATA = ("format", "version", "settings", "near", "origin", "sha256", "table")  # of version 3, the last reserved
_RANGES = {"scales": (MIN_SCALE, MAX_SCALE), "votes": (0, INVALID - 1), "looks": (1, MAX_OBSERVATIONS)}


class SavedCache(NamedTuple):
    """Hold what a file holds."""

    version: int
    config: CacheConfig
    anchor: Anchor | None
    tensors: dict[str, Tensor]
    """Those of :meth:`LatentCache.tensors`, on the host."""


def save_cache(path: str | Path, tensors: dict[str, Tensor], config: dict[str, Any], anchor: Anchor | None) -> None:
    """Save a cache's tensors (on any device), config and anchor; the same cache gives the same bytes."""
    named = {_FILE_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
    near, origin = anchor or (None, None)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "settings": json.dumps(config, sort_keys=True),
        "near": json.dumps(near),
        "origin": json.dumps(origin),
    }
    replace_tensors(path, named, {**metadata, "sha256": _digest(named, metadata)})


def load_cache(path: str | Path) -> SavedCache:
    """Load a saved cache; the file is opened once, read whole and not mapped, so that nobody can change it meanwhile.

    Raises:
        FileNotFoundError, PermissionError, OSError: it is not there or cannot be read.
        ValueError: not a whole safetensors file, not a cache, of an unknown version, damaged, or with tensors or
            settings that no cache has. The message names the file.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no cache file at {path}") from None
    try:
        return _parse(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(content: bytes) -> SavedCache:
    try:
        tensors = load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__")
    except (SafetensorError, KeyError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"not a whole safetensors file ({error}); was it cut short?") from error
    del content
    if not metadata or metadata.get("format") != FORMAT:
        raise ValueError(f"a safetensors file, but not a saved LatentCache (no format {FORMAT!r} in its metadata)")
    named = metadata.get("version")
    if named not in ("1", "2", "3"):
        newer = " it was saved by a newer release," if str(named).isdecimal() and int(named[:9]) > VERSION else ""
        raise ValueError(f"cache format version {named!r} is unknown,{newer} this package reads versions 1, 2, 3")
    version = int(named)
    config = _parse_config(metadata, version)
    if version < VERSION:
        tensors = {name: tensors[name] for name in _required(config) if name in tensors}
        anchor: Anchor | None = None
    else:
        _refuse_unknown("metadata", metadata, _METADATA)
        anchor = _parse_anchor(metadata)
    _check_tensors(tensors, config)
    if version == VERSION:
        digest = _digest(tensors, {name: text for name, text in metadata.items() if name != "sha256"})
        if metadata.get("sha256") != digest:
            raise ValueError("the file is damaged: its content is not what its checksum says")
    held = {_NAMES.get(name, name): tensors[name] for name in _required(config)}
    if anchor is None and len(tensors["points"]):
        anchor = UNSETTLED
    return SavedCache(version, config, anchor, held)


def _parse_config(metadata: dict[str, str], version: int) -> CacheConfig:
    """Return the config of a file, whose values must be what this package knows."""
    try:
        config = json.loads(metadata["settings"])
        missing = [name for name in _REQUIRED if name not in config]
        config = dict(config)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the metadata must hold the cache's settings as JSON, got {str(metadata)[:200]}") from error
    if missing:
        raise ValueError(f"the cache's settings must name {', '.join(_REQUIRED)}, missing {', '.join(missing)}")
    dtypes, policies = _EARLIER.get(version, _EARLIER[2])
    for name, known in (("dtype", dtypes), ("write_policy", policies)):
        if config[name] not in known:
            raise ValueError(
                f"the settings' {name} must be one of {', '.join(known)} in version {version}, got {config[name]!r}"
            )
    try:
        return CacheConfig(**{**config, "dtype": getattr(torch, config["dtype"])})
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings this package does not know: {error}") from error


def _parse_anchor(metadata: dict[str, str]) -> Anchor | None:
    """Return what the first write settled, if any has."""
    try:
        near, origin = (json.loads(metadata[name]) for name in ("near", "origin"))
        if near is None and origin is None:
            return None
        anchor = CacheConfig(1, near=near, origin=origin).anchor
        if anchor is None:
            raise ValueError("one of the two is null")
        return anchor
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        got = f"{str(metadata.get('near'))[:40]} and {str(metadata.get('origin'))[:80]}"
        raise ValueError(f"near must be a depth >= 0 and origin three coordinates, or both null, got {got}") from error


def _required(config: CacheConfig) -> list[str]:
    """Return the names, in the file, of the tensors of a cache with this config."""
    names = ["points", "features", "frame_ids", "frame_centers"]
    names += ["scales"] * (config.dtype_name == _FLOAT8)
    if config.bounded:
        names += ["votes"] + ["looks"] * (config.merge == "mean")
    return names


def _refuse_unknown(what: str, held: Any, known: tuple[str, ...]) -> None:
    unknown = [name for name in held if name not in known]
    if unknown:
        raise ValueError(f"{what} must be among {', '.join(known)}, got {', '.join(sorted(unknown))[:200]}")


def _check_tensors(tensors: dict[str, Tensor], config: CacheConfig) -> None:
    """Check that a file holds a cache's tensors, and values that a cache may hold."""
    names = _required(config)
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"a saved cache must hold {', '.join(names)}, missing {', '.join(missing)}")
    tokens, frames = tensors["points"].shape[:1], tensors["frame_centers"].shape[:1]
    reserved = tensors.get("phase", torch.empty(0, 0))
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "points": ((*tokens, 4), (torch.float32,)),
        "features": ((*tokens, config.channels), (config.dtype,)),
        "frame_ids": (tokens, (torch.int32,)),
        "frame_centers": ((*frames, 3), (torch.float32,)),
        **{name: (tokens, (torch.uint8,)) for name in ("scales", "votes", "looks") if name in names},
        "frame_poses": ((*frames, 4, 4), (torch.float64,)),
        "frame_intrinsics": ((*frames, 3, 3), (torch.float64,)),
        "token_flags": (tokens, (torch.uint8,)),
        "phase": ((*tokens, *reserved.shape[1:2]), (torch.float32, config.dtype)),
    }
    _refuse_unknown("tensors", tensors, tuple(expected))
    for name, (shape, kinds) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype not in kinds:
            wanted = f"{tuple(shape)} {' or '.join(map(str, dict.fromkeys(kinds)))}"
            raise ValueError(f"{name} must be {wanted}, got {tuple(tensor.shape)} {tensor.dtype}")
    for name, (least, most) in {**_RANGES, "frame_ids": (0, max(frames[0] - 1, 0))}.items():
        values = tensors.get(name)
        if values is not None and values.numel() and not least <= int(values.min()) <= int(values.max()) <= most:
            got = f"{int(values.min())} to {int(values.max())}"
            raise ValueError(f"{name} must be in [{least}, {most}], got {got}")
    if not bool(torch.isfinite(tensors["points"]).all()):
        raise ValueError("points must be finite, got NaN or Inf")
    if config.capacity is not None and tokens[0] > config.capacity:
        raise ValueError(f"points must fit the saved capacity, {config.capacity}, got {tokens[0]}")


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Return the SHA-256 of metadata and tensors, whatever their order in the file."""
    names = sorted(tensors)
    shapes = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps([metadata, shapes], sort_keys=True).encode())
    for name in names:
        content = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(content.view(torch.uint8).numpy().data if content.numel() else b"")
    return digest.hexdigest()

"""Files that say when they are damaged: a manifest of checksums in a folder, and tensors read from whole files.

    manifest.json    format, version, facts of the folder's owner, files ({name: {bytes, sha256}}), checksum

A folder is written under a temporary name, its manifest last, and renamed. Whoever reads it back compares: what is not
there, is cut short, was exchanged or has another bit is a :class:`DamagedFileError` that names the file. The checksum
of the manifest is of its own content. No file is read as a pickle, and none is mapped: what is checked is what is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from mirage_kernels.io import replace_text

MANIFEST = "manifest.json"
FORMAT, VERSION = "mirage-manifest", 1
_BLOCK = 1 << 20


class DamagedFileError(ValueError):
    """A file is not what was written; the message names it and says how it differs."""


# Manifests.


def digest(content: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def digest_json(content: Any) -> str:
    """Return the SHA-256 of plain JSON values, whatever the order of their keys."""
    return digest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def write_manifest(
    folder: Path, names: Iterable[str], facts: Mapping[str, Any], known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the manifest of a folder, in one step.

    Args:
        folder: which holds the files.
        names: of the files in it that the manifest answers for.
        facts: of its owner, plain JSON values.
        known: `files` of an earlier manifest, of which the other files are taken over.

    Returns:
        Its content.
    """
    files = {**(known or {}), **{name: _describe(folder / name) for name in sorted(names)}}
    content = {"format": FORMAT, "version": VERSION, **facts, "files": files}
    content["checksum"] = digest_json(content)
    replace_text(folder / MANIFEST, json.dumps(content, indent=1) + "\n")
    return content


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a folder; None where it has none, as folders of before there were manifests.

    Raises:
        DamagedFileError: it is not what was written.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    content = read_json(path)
    held = {name: value for name, value in content.items() if name != "checksum"}
    if content.get("format") != FORMAT or content.get("checksum") != digest_json(held):
        raise DamagedFileError(f"{path} is damaged: its content is not what its checksum says")
    if content["version"] != VERSION:
        raise ValueError(f"{path}: must be {FORMAT} version {VERSION}, got {content['version']}")
    return content


def check_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Compare a file with the manifest of its folder, without holding it in memory.

    Raises:
        DamagedFileError: it differs, or is not there.
        OSError: it cannot be read.
    """
    _compare(folder / name, manifest["files"].get(name), _describe(folder / name))


def read_file(folder: Path, name: str, manifest: Mapping[str, Any] | None = None) -> bytes:
    """Read a file, compared with the manifest of its folder where there is one.

    Raises:
        DamagedFileError: it differs, or is not there.
        OSError: it cannot be read.
    """
    path = folder / name
    _check_regular(path)
    content = path.read_bytes()
    if manifest is not None:
        _compare(path, manifest["files"].get(name), {"bytes": len(content), "sha256": digest(content)})
    return content


def _compare(path: Path, expected: Any, found: dict[str, Any]) -> None:
    if expected is None:
        raise DamagedFileError(f"{path} is not of this folder: {MANIFEST} does not list it")
    if found["bytes"] != expected["bytes"]:
        raise DamagedFileError(f"{path} is damaged: it has {found['bytes']:,} of {expected['bytes']:,} bytes")
    if found != expected:
        raise DamagedFileError(f"{path} is damaged: its content is not what its checksum in {MANIFEST} says")


def _describe(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file."""
    _check_regular(path)
    summed, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            summed.update(block)
            size += len(block)
    return {"bytes": size, "sha256": summed.hexdigest()}


def _check_regular(path: Path) -> None:
    """Check that a path is a file: no folder, and nothing that a read would wait for."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedFileError(f"{path} is missing") from None
    if not stat.S_ISREG(mode):
        raise DamagedFileError(f"{path} is damaged: it must be a file, got a {_kind(mode)}")


def _kind(mode: int) -> str:
    return "folder" if stat.S_ISDIR(mode) else "device, pipe or socket"


# Content.


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        DamagedFileError: it is not there, or no such file.
        OSError: it cannot be read.
    """
    return parse_json(path, read_file(path.parent, path.name))


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """Parse what was read from `path` as a JSON object; errors as :func:`read_json`."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: it must hold JSON ({error})") from None
    if not isinstance(values, dict):
        raise DamagedFileError(f"{path} is damaged: it must hold a JSON object, got {type(values).__name__}")
    return values


def parse_tensors(path: Path, content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parse what was read from `path` as a safetensors file.

    Returns:
        Its tensors on the CPU, and its metadata.

    Raises:
        DamagedFileError: it is no whole safetensors file.
    """
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DamagedFileError(f"{path}: not a whole safetensors file ({error}); was it cut short?") from None
    return tensors, header.get("__metadata__") or {}


def take_tensor(
    path: Path, tensors: Mapping[str, Tensor], name: str, shape: tuple[int | None, ...], dtype: torch.dtype | None
) -> Tensor:
    """Return a tensor of :func:`parse_tensors` that must have a shape and a dtype (None: any).

    Raises:
        DamagedFileError: it is not there, or another.
    """
    found = tensors.get(name)
    if (
        found is None
        or dtype not in (None, found.dtype)
        or found.ndim != len(shape)
        or any(side not in (None, count) for side, count in zip(shape, found.shape, strict=True))
    ):
        got = "none" if found is None else f"{tuple(found.shape)} {found.dtype}"
        sides = ", ".join("any" if side is None else str(side) for side in shape)
        raise DamagedFileError(f"{path} is damaged: {name} must be ({sides}) {dtype or 'of any dtype'}, got {got}")
    return found


def remove(path: Path) -> None:
    """Remove a file, a link (never what it points to) or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

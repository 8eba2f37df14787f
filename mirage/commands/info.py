"""`mirage info`: what a saved cache holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mirage_kernels import LatentCache
from mirage_kernels.cache.storage import load_cache


@dataclass(frozen=True)
class Options:
    """Describe a saved cache."""

    cache: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="cache.safetensors")]
    """file of `LatentCache.save`"""
    json: bool = False
    """print JSON"""


def run(options: Options) -> int:
    """Describe a saved cache, in words or as JSON."""
    described = describe_cache(options.cache)
    print(json.dumps(described, indent=2) if options.json else format_description(described))
    return 0


def describe_cache(path: Path) -> dict[str, Any]:
    """Describe a saved cache as `mirage info --json` prints it.

    Returns:
        file, file_bytes, version (of the file format), tokens, channels, dtype, frames, bytes (of the live tokens),
        bounds ([least x, y, z], [greatest x, y, z], world units; None when empty), settings.

    Raises:
        OSError, ValueError: no such file, or it is not a whole saved cache of a known version.
    """
    saved = load_cache(path)
    settled = {} if saved.anchor is None else saved.anchor._asdict()
    cache = LatentCache.from_tensors(saved.tensors, **saved.config.__dict__ | settled)
    settings = cache.config
    bounds = [cache.points.amin(0).tolist(), cache.points.amax(0).tolist()] if len(cache) else None
    return {
        "file": str(path),
        "file_bytes": path.stat().st_size,
        "version": saved.version,
        "tokens": len(cache),
        "channels": cache.channels,
        "dtype": settings.pop("dtype"),
        "frames": cache.num_frames,
        "bytes": cache.nbytes,
        "bounds": bounds,
        "settings": {name: value for name, value in settings.items() if name != "channels"},
    }


def format_description(described: dict[str, Any]) -> str:
    """Format what :func:`describe_cache` returns for a terminal."""
    low, high = described["bounds"] or ([], [])
    extent = "  ".join(f"{axis} {a:.3g} to {b:.3g}" for axis, a, b in zip("xyz", low, high, strict=False))
    lines = {
        "file": f"{described['file']}, {described['file_bytes']:,} bytes, format version {described['version']}",
        "tokens": f"{described['tokens']:,} of {described['channels']} {described['dtype']} channels",
        "frames": f"{described['frames']:,}",
        "memory": f"{described['bytes'] / 2**20:.2f} MiB",
        "bounds": extent or "none, it is empty",
        "settings": ", ".join(f"{name}={value}" for name, value in described["settings"].items()),
    }
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())

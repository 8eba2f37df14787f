"""Ways to damage a file of a run, for tests that resume it, and what is in a folder before and after."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def content(folder: Path) -> dict[str, Any]:
    """Read all that is in a folder, by path, but for the lock."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.name != ".lock":
            link = os.readlink(path) if path.is_symlink() else None
            found[str(path.relative_to(folder))] = link or (path.read_bytes() if path.is_file() else None)
    return found


def flip(path: Path, at: float) -> None:
    """Flip a bit at a fraction of the file's length."""
    held = bytearray(path.read_bytes())
    held[min(int(len(held) * at), len(held) - 1)] ^= 16
    path.write_bytes(held)


def exchange(path: Path, folder: str) -> None:
    """Exchange a file with that of its name in a folder beside its own."""
    other = path.parents[1] / folder / path.name
    held = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(held)


def put_folder(path: Path) -> None:
    """Put a folder in a file's place."""
    path.unlink()
    path.mkdir()


def put_link(path: Path) -> None:
    """Put a link to nothing in a file's place."""
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit flipped": lambda path: flip(path, 0.5),
    "a bit flipped near the end": lambda path: flip(path, 0.97),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "junk": lambda path: path.write_bytes(b"\x00junk\xff" * 40),
    "deleted": Path.unlink,
    "a folder": put_folder,
    "a dangling link": put_link,
}

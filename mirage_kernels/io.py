"""Atomic writers of files and folders, for all that the packages save.

In: a path, and the content or a function that writes it. Out: the file or the folder under its name. A crash at any
moment leaves what was there before or what is new, never a part of it; an exception leaves what was there before, and
no temporary file.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: str | os.PathLike[str], write: Callable[[str], Any]) -> None:
    """Write a file under a temporary name beside ``path``, flush it to disk, then rename it onto ``path``.

    Args:
        path: the file to write or to replace; its folder must exist.
        write: writes the content into the file that it is given the name of.

    Raises:
        OSError, or what ``write`` raises: ``path`` is as it was, and no temporary file is left.
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


def replace_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file of bytes as :func:`replace_file` does."""
    replace_file(path, lambda temporary: Path(temporary).write_bytes(content))


def replace_text(path: str | os.PathLike[str], content: str) -> None:
    """Write a UTF-8 text file as :func:`replace_file` does."""
    replace_file(path, lambda temporary: Path(temporary).write_text(content, encoding="utf-8"))


def replace_folder(path: str | os.PathLike[str], write: Callable[[str], Any]) -> None:
    """Write a folder under a temporary name beside ``path``, then rename it onto ``path``.

    A folder that is there already is renamed first and removed last. Where the process ends between the two renames,
    it is whole as ``.NAME.old``, and the next call puts it back before all else.

    Args:
        path: the folder to write or to replace; missing parents are made.
        write: writes the content into the empty folder that it is given the name of.

    Raises:
        OSError, or what ``write`` raises: ``path`` is as it was, and no temporary folder is left.
    """
    path = Path(path)
    draft, old = (path.with_name(f".{path.name}.{word}") for word in ("tmp", "old"))
    _put_back(old, path)
    for left in (draft, old):
        shutil.rmtree(left, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        write(str(draft))
        if path.exists():
            os.replace(path, old)
        os.replace(draft, path)
    except BaseException:
        _put_back(old, path)
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, path: Path) -> None:
    """Give a folder that was moved aside its name again, where nothing has it."""
    if old.exists() and not path.exists():
        os.rename(old, path)


def flush_folder(path: str | os.PathLike[str], content: bool = False) -> None:
    """Flush to disk the names that a folder holds; with ``content``, the files directly in it before that."""
    if content:
        for file in Path(path).iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Atomic writers of files and folders, for all that the packages save.

In: a path, and the content or a function that writes it. Out: the file or the folder under its name. A crash at any
moment leaves what was there before or what is new, never a part of it; an exception leaves what was there before, and
no draft.

A draft is written beside its target, as ``.NAME.0.tmp``, or with the next free number. Its writer holds a lock on it,
which ends with the process: what a killed process left is removed when the same target is written again, and what
another process is writing is left alone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and drafts of killed processes stay
    fcntl = None  # type: ignore[assignment]

_SWEPT = 8  # drafts of one target that are looked for: as many processes may have been killed while they wrote it
_LONGEST_NAME = 100  # of a target that lends its own name to its drafts
_SAFETENSORS_TYPES = {  # in the order in which that package stores them: wide elements first, so that all are aligned
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def replace_file(path: str | os.PathLike[str], write: Callable[[str], Any]) -> None:
    """Write a file as a draft beside ``path``, flush it to disk, then rename it onto ``path``.

    A new file has the permissions that :func:`open` would give it. A file that is replaced passes its permissions on,
    and its owner where the system allows it. A symbolic link stays: the file that it points to is written. (A hard link
    keeps the old content, as with every writer that renames.)

    Args:
        path: the file to write or to replace; its folder must exist.
        write: writes the content into the file that it is given the name of.

    Raises:
        OSError, or what ``write`` raises: ``path`` is as it was, and no draft is left. A full disk is an OSError,
            whatever writes.
    """
    path = Path(path)
    old = _find(path)
    if old is not None and stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    target = Path(os.path.realpath(path))
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    # A new file's permissions are the system's choice, as of any; one that replaces another is private until it does.
    with _drafting(path, lambda draft: os.open(draft, flags, 0o666 if old is None else 0o600)) as draft:
        write(draft)
        with open(draft, "rb") as written:
            os.fsync(written.fileno())
        if old is not None:
            _pass_on(old, draft)
        os.replace(draft, target)


def replace_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file of bytes as :func:`replace_file` does."""
    replace_file(path, lambda draft: Path(draft).write_bytes(content))


def replace_text(path: str | os.PathLike[str], content: str) -> None:
    """Write a UTF-8 text file as :func:`replace_file` does."""
    replace_file(path, lambda draft: Path(draft).write_text(content, encoding="utf-8"))


def replace_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file as :func:`replace_file` does, with the bytes of :func:`write_tensors`."""
    replace_file(path, lambda draft: write_tensors(draft, tensors, metadata))


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file in place: the same tensors and metadata give the same bytes.

    The ``safetensors`` package orders metadata at random, refuses names that are not UTF-8 and has errors of its own
    for a full disk. Without metadata, the bytes are those that it writes.

    Args:
        path: the file.
        tensors: by name, dense, on any device; one after the other is copied to the host.
        metadata: text by name.

    Raises:
        OSError: the disk is full, or anything else that the system refuses.
        TypeError: a dtype that safetensors does not know.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _SAFETENSORS_TYPES:
            raise TypeError(f"{name} must be of a dtype that safetensors knows, got {tensor.dtype}")
    rank = {kind: place for place, kind in enumerate(_SAFETENSORS_TYPES)}
    names = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end = start + tensor.numel() * tensor.element_size()
        kind = _SAFETENSORS_TYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            content = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(content.view(torch.uint8).numpy().data if content.numel() else b"")


def replace_folder(path: str | os.PathLike[str], write: Callable[[str], Any]) -> None:
    """Write a folder as a draft beside ``path``, then rename it onto ``path``.

    A folder that is there already is renamed first and removed last. Where the process ends between the two renames,
    it is whole as ``.NAME.old``, and the next call puts it back before all else. Permissions and symbolic links are
    kept as by :func:`replace_file`.

    Args:
        path: the folder to write or to replace; missing parents are made.
        write: writes the content into the empty folder that it is given the name of.

    Raises:
        OSError, or what ``write`` raises: ``path`` is as it was, and no draft is left.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{_stem(target.name)}.old")
    with _locked_folder(target.parent):
        _put_back(aside, target)
        shutil.rmtree(aside, ignore_errors=True)
    old = _find(path)
    if old is not None and not stat.S_ISDIR(old.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    with _drafting(path, _make_folder) as draft:
        write(draft)
        if old is not None:
            _pass_on(old, draft)
        with _locked_folder(target.parent):
            try:
                if target.exists():
                    os.replace(target, aside)
                os.replace(draft, target)
            finally:
                _put_back(aside, target)
                shutil.rmtree(aside, ignore_errors=True)


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


# What is replaced.


def _find(path: Path) -> os.stat_result | None:
    """Return what is at a path, or at the end of a link there; None where nothing is."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _pass_on(old: os.stat_result, draft: str) -> None:
    """Give a draft owner and permissions of what it replaces."""
    new = os.stat(draft)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with suppress(PermissionError):
            os.chown(draft, old.st_uid, old.st_gid)
    os.chmod(draft, stat.S_IMODE(old.st_mode))


def _put_back(aside: Path, target: Path) -> None:
    """Give a folder that was moved aside its name again, where nothing has it."""
    if aside.exists() and not target.exists():
        os.rename(aside, target)


# Drafts.


@contextmanager
def _drafting(path: Path, make: Callable[[str], int]) -> Iterator[str]:
    """Make a draft for a path, and remove it when the block fails; what fails to write it names the path.

    ``make`` makes the file or folder that it is given the name of, and opens it.
    """
    draft, handle = _make_draft(path, make)
    try:
        yield draft
    except BaseException as error:
        with suppress(OSError):
            # Not the next writer's, which may have the name already if this one has been renamed.
            if handle is None or _is_at(draft, handle) or os.fstat(handle).st_nlink == 0:
                _remove(draft)
        named = _name_path(error, path, draft)
        if named is None:
            raise
        raise named from error
    finally:
        if handle is not None:
            os.close(handle)


def _make_draft(path: Path, make: Callable[[str], int]) -> tuple[str, int | None]:
    """Make a draft for a path and lock it, where the system has locks; remove those of processes that were killed."""
    target = Path(os.path.realpath(path))
    drafts = (str(target.with_name(f".{_stem(target.name)}.{number}.tmp")) for number in count())
    first = [next(drafts) for _ in range(_SWEPT)]
    for draft in first:
        _sweep(draft)
    for draft in chain(first, drafts):
        try:
            handle = make(draft)
        except FileExistsError:
            continue
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        if fcntl is None:
            os.close(handle)
            return draft, None
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if _is_at(draft, handle):
            return draft, handle
        os.close(handle)  # another process swept it, in the moment before it was locked
    raise AssertionError  # there is always another name


def _make_folder(draft: str) -> int:
    os.mkdir(draft)
    try:
        return os.open(draft, os.O_RDONLY)
    except FileNotFoundError:  # another process swept it
        raise FileExistsError from None


def _sweep(draft: str) -> None:
    """Remove a draft unless its writer is alive, or cannot be known to be dead."""
    try:
        mode = os.lstat(draft).st_mode
        if fcntl is None or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return
        handle = os.open(draft, (os.O_RDONLY if stat.S_ISDIR(mode) else os.O_RDWR) | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(draft, handle):
            _remove(draft)
    except OSError:
        pass  # it is being written
    finally:
        os.close(handle)


def _stem(name: str) -> str:
    """Return what drafts of a name are called by: the name, or where it is long or no ASCII, a digest of it."""
    if name.isascii() and len(name) <= _LONGEST_NAME:
        return name
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def _is_at(path: str, handle: int) -> bool:
    """Return whether an open file is what has this name."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove(draft: str) -> None:
    if os.path.isdir(draft):
        shutil.rmtree(draft, ignore_errors=True)
    else:
        os.unlink(draft)


def _name_path(error: BaseException, path: Path, draft: str) -> OSError | None:
    """Say that a path could not be written, by an error that names its draft or nothing; None of any other error."""
    if isinstance(error, SafetensorError):
        code = re.search(r"\(os error (\d+)\)", str(error))
        return OSError(int(code[1]), os.strerror(int(code[1])), str(path)) if code else None
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__  # `torch.save` fails once more while it closes what it could not write
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.filename is not None and not str(error.filename).startswith(draft):
        return None
    return OSError(error.errno, error.strerror, str(path))


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Have other processes wait that rename folders in this one, where the system has locks."""
    handle = None
    with suppress(OSError):
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)

"""Atomic writers: what is under a name is what was there before, or what is new, whatever fails in between."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mirage_kernels.io import flush_folder, replace_bytes, replace_file, replace_folder, replace_text


class Crash(BaseException):
    """Stand for what no handler expects, like KeyboardInterrupt."""


def crash(*_: object) -> None:
    raise Crash


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WRITERS = [
    lambda path: replace_file(path, lambda temporary: Path(temporary).write_bytes("été\n".encode())),
    lambda path: replace_bytes(path, "été\n".encode()),
    lambda path: replace_text(path, "été\n"),
]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("as_given", [Path, str])
def test_writes_a_new_file_and_replaces_an_old_one(tmp_path: Path, write, as_given) -> None:
    path = tmp_path / "one.txt"
    for _ in range(2):
        write(as_given(path))
        assert path.read_bytes() == b"\xc3\xa9t\xc3\xa9\n" and names(tmp_path) == ["one.txt"]
        path.write_text("old")


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("fault", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch, write, fault: str, exists: bool) -> None:
    path = tmp_path / "one.txt"
    if exists:
        path.write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(os, fault, crash)
        with pytest.raises(Crash):
            write(path)
    assert names(tmp_path) == ["one.txt"] * exists
    assert not exists or path.read_text() == "old"


def test_a_writer_that_fails_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("old")

    def half(temporary: str) -> None:
        Path(temporary).write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_file(path, half)
    assert path.read_text() == "old" and names(tmp_path) == ["one.txt"]


def test_the_file_is_whole_and_flushed_before_it_has_the_name(tmp_path: Path, monkeypatch) -> None:
    path, events = tmp_path / "one.txt", []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("flush"), fsync(handle)))

    def seen(source: str, target: Path) -> None:
        events.append(Path(source).read_text())
        assert Path(source).parent == tmp_path and not path.exists()
        replace(source, target)

    monkeypatch.setattr(os, "replace", seen)
    replace_text(path, "new")
    assert events == ["flush", "new"] and path.read_text() == "new"


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        replace_text(tmp_path / "one.txt", "new")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "one.txt").stat().st_mode) == 0o640


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        replace_text(tmp_path / "absent" / "one.txt", "new")


def fill(content: str):
    return lambda draft: (Path(draft) / "one.txt").write_text(content)


def test_replaces_a_folder_with_all_that_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "model"
    replace_folder(folder, fill("first"))
    (folder / "two.txt").write_text("of the first")
    replace_folder(str(folder), fill("second"))
    assert names(folder) == ["one.txt"] and (folder / "one.txt").read_text() == "second"
    assert names(folder.parent) == ["model"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch, failing: int) -> None:
    folder, replace, calls = tmp_path / "model", os.replace, []
    replace_folder(folder, fill("first"))
    with pytest.raises(Crash):
        replace_folder(folder, crash)
    assert (folder / "one.txt").read_text() == "first" and names(tmp_path) == ["model"]

    def fails(source: object, target: object) -> None:
        calls.append(target)
        if len(calls) == failing:
            raise Crash
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fails)
        with pytest.raises(Crash):
            replace_folder(folder, fill("second"))
    assert (folder / "one.txt").read_text() == "first" and names(tmp_path) == ["model"]


def test_a_process_that_ends_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    replace_folder(folder, fill("first"))
    os.rename(folder, tmp_path / ".model.old")
    (tmp_path / ".model.tmp").mkdir()
    with pytest.raises(Crash):
        replace_folder(folder, crash)
    assert (folder / "one.txt").read_text() == "first" and names(tmp_path) == ["model"]
    replace_folder(folder, fill("second"))
    assert (folder / "one.txt").read_text() == "second" and names(tmp_path) == ["model"]


def test_flushes_a_folder_and_its_files(tmp_path: Path, monkeypatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (flushed.append(handle), fsync(handle)))
    flush_folder(tmp_path)
    assert len(flushed) == 1
    flush_folder(str(tmp_path), content=True)
    assert len(flushed) == 4

"""Atomic writers: what is under a name is what was there before, or what is new, whatever fails in between."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from mirage_kernels.io import (
    flush_folder,
    replace_bytes,
    replace_file,
    replace_folder,
    replace_tensors,
    replace_text,
    write_tensors,
)


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
@pytest.mark.parametrize(
    ("fault", "exists"), [("replace", False), ("replace", True), ("fsync", False), ("fsync", True), ("chmod", True)]
)
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
    with pytest.raises(FileNotFoundError, match="absent/one.txt'$"):
        replace_text(tmp_path / "absent" / "one.txt", "new")


# ---------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_a_replaced_file_passes_its_permissions_on(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "one.txt"
    path.write_text("old")
    path.chmod(mode)

    def write(draft: str) -> None:
        assert stat.S_IMODE(os.stat(draft).st_mode) == 0o600, "private until it has the name"
        Path(draft).write_text("new")

    replace_file(path, write)
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_replaced_file_passes_its_owner_on(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("old")
    os.chown(path, 1234, 2345)
    replace_text(path, "new")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)


def test_the_umask_of_the_process_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "umask", crash)
    replace_text(tmp_path / "one.txt", "new")
    replace_text(tmp_path / "one.txt", "newer")


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_is_followed_and_kept(tmp_path: Path, exists: bool) -> None:
    target, link, far = tmp_path / "data" / "one.txt", tmp_path / "link", tmp_path / "far"
    target.parent.mkdir()
    if exists:
        target.write_text("old")
    link.symlink_to(Path("data") / "one.txt")
    far.symlink_to(link)
    replace_text(far, "new")
    assert target.read_text() == "new" and not target.is_symlink()
    assert os.readlink(link) == "data/one.txt" and os.readlink(far) == str(link)
    assert names(target.parent) == ["one.txt"] and names(tmp_path) == ["data", "far", "link"]


def test_a_link_to_itself_and_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    before = names(tmp_path)
    for name, code in (("loop", errno.ELOOP), ("pipe", errno.EINVAL), ("folder", errno.EISDIR)):
        with pytest.raises(OSError, match=name) as caught:
            replace_file(tmp_path / name, crash)
        assert caught.value.errno == code
    with pytest.raises(OSError, match="/dev/null"):
        replace_text("/dev/null", "new")
    assert names(tmp_path) == before and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_replaced_folder_keeps_permissions_and_links(tmp_path: Path) -> None:
    folder, link = tmp_path / "model", tmp_path / "link"
    folder.mkdir()
    folder.chmod(0o700)
    link.symlink_to("model")
    replace_folder(link, fill("new"))
    assert (folder / "one.txt").read_text() == "new" and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert names(tmp_path) == ["link", "model"] and os.readlink(link) == "model"
    with pytest.raises(NotADirectoryError, match="one.txt"):
        replace_folder(folder / "one.txt", crash)


@pytest.mark.parametrize("name", ["x" * 240 + ".safetensors", "é" * 100, "\udce9.safetensors", "a\nb", ".hidden"])
def test_every_name_that_the_system_allows(tmp_path: Path, name: str) -> None:
    for content in ("old", "new"):
        replace_text(tmp_path / name, content)
        replace_folder(tmp_path / "folder" / name, fill(content))
    replace_tensors(tmp_path / name, {"a": torch.ones(1)})
    assert sorted(map(os.fsencode, names(tmp_path))) == sorted(map(os.fsencode, ["folder", name]))
    assert names(tmp_path / "folder") == [name] and (tmp_path / "folder" / name / "one.txt").read_text() == "new"


# ---------------------------------------------------------------------------------------------- drafts of the killed


class Child:
    """A process that runs a function in a copy of this one, with two pipes to tell it when to go on."""

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        (self._told, tell), (wait, self._go) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._go)

            def pause() -> None:
                os.write(tell, b".")
                os.read(wait, 1)

            try:
                work(pause)
            finally:
                os._exit(0)
        os.close(tell), os.close(wait)
        os.read(self._told, 1)  # it has come to its first pause

    def end(self, how: int = 0) -> None:
        """Let it go on to its end, or kill it."""
        if how:
            os.kill(self.pid, how)
        os.close(self._go)
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == -how
        os.close(self._told)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_drafts_of_killed_processes_are_swept_and_those_of_living_ones_are_not(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model"

    def replace(content: str, pause: Callable[[], None] = lambda: None) -> None:
        def write(draft: str) -> None:
            Path(draft, *["one.txt"] * (kind == "folder")).write_text(content)
            pause()

        (replace_file if kind == "file" else replace_folder)(path, write)

    def read() -> str:
        return Path(path, *["one.txt"] * (kind == "folder")).read_text()

    killed, living = (Child(partial(replace, content)) for content in ("killed", "living"))
    assert names(tmp_path) == [".model.0.tmp", ".model.1.tmp"]
    killed.end(signal.SIGKILL)
    for content in ("new", "newer"):
        replace(content)
        assert read() == content and names(tmp_path) == [".model.1.tmp", "model"]
    living.end()
    assert read() == "living" and names(tmp_path) == ["model"]


def test_only_drafts_of_the_same_file_are_swept(tmp_path: Path) -> None:
    kept = [".other.txt.0.tmp", ".one.txt.tmp", ".one.txt.backup", ".one.txt.0.tmp.txt"]
    for name in [*kept, ".one.txt.0.tmp", ".one.txt.7.tmp"]:
        (tmp_path / name).write_text("half")
    (tmp_path / ".one.txt.3.tmp").symlink_to(".other.txt.0.tmp")
    replace_text(tmp_path / "one.txt", "new")
    assert names(tmp_path) == sorted([*kept, ".one.txt.3.tmp", "one.txt"])


def test_threads_that_write_one_file_never_mix(tmp_path: Path) -> None:
    path, failures = tmp_path / "one.txt", []
    contents = [letter * 10_000 for letter in "abcd"]
    ready = threading.Barrier(5)

    def write(content: str) -> None:
        ready.wait()
        try:
            for _ in range(20):
                replace_text(path, content)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    ready.wait()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_text() in contents
    assert not failures and names(tmp_path) == ["one.txt"]


@pytest.mark.parametrize("times", [1000 if os.environ.get("MIRAGE_NIGHTLY") else 20])
def test_a_process_killed_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path, times: int) -> None:
    path, rng = tmp_path / "room.safetensors", random.Random(0)
    versions = [{name: torch.full((100, 100), float(i)) for name in "ab"} for i in range(1, 4)]

    def save_again_and_again(pause: Callable[[], None]) -> None:
        replace_tensors(path, versions[0])
        pause()
        for tensors in cycle(versions):
            replace_tensors(path, tensors)

    for _ in range(times):
        child = Child(save_again_and_again)
        os.write(child._go, b".")
        time.sleep(rng.random() * 0.01)
        child.end(signal.SIGKILL)
        tensors = load_file(path)
        assert all((tensors[name] == tensors["a"][0, 0]).all() for name in "ab") and tensors["a"][0, 0] > 0
    replace_text(path, "")
    assert names(tmp_path) == ["room.safetensors"]


# ---------------------------------------------------------------------------------------------- full disks


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Have the system refuse larger files, with EFBIG: Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def with_safetensors(draft: str) -> None:
    save_file({"a": torch.zeros(10_000)}, draft)


def with_torch(draft: str) -> None:
    with open(draft, "wb") as file:
        torch.save(torch.zeros(10_000), file)


FILLING = {
    "bytes": lambda path: replace_bytes(path, bytes(10_000)),
    "tensors": lambda path: replace_tensors(path, {"a": torch.zeros(10_000)}),
    "safetensors": lambda path: replace_file(path, with_safetensors),
    "torch": lambda path: replace_file(path, with_torch),
}


@pytest.mark.parametrize("writer", FILLING)
@pytest.mark.parametrize("nbytes", [0, 100, 5000])
def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path: Path, writer: str, nbytes: int) -> None:
    path = tmp_path / "one.txt"
    path.write_text("old")
    with largest_file(nbytes), pytest.raises(OSError) as caught:
        FILLING[writer](path)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert path.read_text() == "old" and names(tmp_path) == ["one.txt"]


def test_a_full_disk_while_a_folder_is_written(tmp_path: Path) -> None:
    replace_folder(tmp_path / "model", fill("old"))
    with largest_file(100), pytest.raises(OSError, match="model'$") as caught:
        replace_folder(tmp_path / "model", lambda draft: with_safetensors(f"{draft}/a.safetensors"))
    assert caught.value.errno == errno.EFBIG and names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["one.txt"]


def test_errors_of_other_files_and_kinds_stay_as_they_are(tmp_path: Path) -> None:
    for error in (FileNotFoundError(2, "no", "other"), OSError("ffmpeg said no"), SafetensorError("header")):

        def fail(draft: str, error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            replace_file(tmp_path / "one.txt", fail)
        assert caught.value is error and names(tmp_path) == []


# ---------------------------------------------------------------------------------------------- tensors


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.float8_e4m3fn, torch.bool, torch.int64, torch.bfloat16, torch.float32, torch.uint8, torch.float64)
    made = {f"x{i}": (torch.randn(3, 5, generator=generator) * 3).to(kind) for i, kind in enumerate(kinds)}
    return {**made, "scalar": torch.tensor(3), "none": torch.empty(0, 4), "turned": torch.arange(6.0).view(2, 3).T}


def test_a_file_of_tensors_is_that_of_safetensors(tmp_path: Path) -> None:
    tensors, path = some_tensors(), tmp_path / "one.safetensors"
    replace_tensors(path, tensors)
    assert path.read_bytes() == save({name: tensor.contiguous() for name, tensor in tensors.items()})
    metadata = {"b": 'été\n\u007f"', "a": json.dumps({"x": [1]}), "": ""}
    write_tensors(path, tensors, metadata)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata
        for name, tensor in tensors.items():
            got = file.get_tensor(name)
            assert got.dtype == tensor.dtype and got.shape == tensor.shape
            assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    metadata, path = {f"key {i}": str(i) for i in range(20)}, tmp_path / "one.safetensors"
    written = set()
    for i in range(5):
        names = list(metadata)[i:] + list(metadata)[:i]
        write_tensors(path, dict(list(some_tensors().items())[:: (-1) ** i]), {name: metadata[name] for name in names})
        written.add(path.read_bytes())
    assert len(written) == 1


def test_tensors_that_a_file_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="z must be of a dtype that safetensors knows, got torch.complex64"):
        replace_tensors(tmp_path / "one", {"z": torch.zeros(1, dtype=torch.complex64)})
    assert names(tmp_path) == []


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
    (tmp_path / ".model.0.tmp").mkdir()
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

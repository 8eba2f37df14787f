"""`RunStore`: a generation run on disk, one folder per chunk, written atomically.

    run.json               what the run was started with
    chunks/0000/           latents.safetensors (latents, readouts and cameras of its latent frames), metrics.json,
                           segment.mp4 (its frames, where they are decoded chunk by chunk)
    chunks/0004/           the newest one also holds what the next chunk continues from: cache.safetensors,
                           decoder.safetensors, random.safetensors

A chunk is written into `chunks/.0004` and renamed, which is the moment from which it counts: a process killed at any
moment leaves the chunks it finished. Latents are read back from there and not kept in memory, so that a run of any
length takes the same memory.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mirage_kernels import Cameras
from mirage_kernels.io import replace_file

from .chunks import Chunk

FORMAT, VERSION = "mirage-run", 1
RUN, LOCK, CHUNKS = "run.json", ".lock", "chunks"
LATENTS, METRICS, SEGMENT = "latents.safetensors", "metrics.json", "segment.mp4"
CACHE, DECODER, RANDOM = "cache.safetensors", "decoder.safetensors", "random.safetensors"


class RunStore:
    """The chunks of one run. One process at a time holds a folder, until :meth:`close` or its end.

    Args:
        folder: of the run; None keeps only the latents, in a temporary folder that goes with this object.
        record: what the run is started with, plain JSON values.
        resume: whether to continue a run that is there already. A run without a chunk is none.

    Attributes:
        chunks: of the run, in order.
        cameras: of the new latent frames of each.

    Raises:
        FileExistsError: there is a run with chunks in `folder`, and `resume` is False.
        BlockingIOError: another process, or another session of this one, is using `folder`.
        ValueError: the run there was started with something else; the message names each value that differs.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, record: dict[str, Any], resume: bool = False) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="mirage-") if folder is None else None
        self.folder = Path(self._temporary.name if self._temporary else folder)  # type: ignore[arg-type]
        self.chunks: list[Chunk] = []
        self.cameras: list[Cameras] = []
        (self.folder / CHUNKS).mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        try:
            self._open(record, resume)
        except BaseException:
            self.close()
            raise

    def _open(self, record: dict[str, Any], resume: bool) -> None:
        path = self.folder / RUN
        if self._path(0).is_dir():
            if not resume:
                raise FileExistsError(f"run_dir {self.folder} holds a run already: resume it, or name another folder")
            _check_record(path, record)
        else:
            content = json.dumps({"format": FORMAT, "version": VERSION, "settings": record}, indent=2) + "\n"
            replace_file(path, lambda draft: _write_text(Path(draft), content))
            _flush_folder(self.folder)
        while self._path(index := len(self.chunks)).is_dir():
            self.chunks.append(Chunk(index, *self.metrics(index)["frames"]))
            self.cameras.append(self._load_cameras(index))
        # What a kill may have left.
        for unfinished in (self.folder / CHUNKS).glob(".[0-9]*"):
            shutil.rmtree(unfinished)
        for draft in (*self.folder.glob(".*.tmp"), *self.folder.glob(f"{CHUNKS}/*/.*.tmp")):
            draft.unlink()
        self._tidy()

    def close(self) -> None:
        """Let others use the folder. The temporary one is removed."""
        self._lock.release()
        if self._temporary is not None:
            self._temporary.cleanup()

    @property
    def keeps_all(self) -> bool:
        """Whether everything is kept that the run needs to continue after this process; else only latents are."""
        return self._temporary is None

    @property
    def num_latents(self) -> int:
        """Latent frames so far."""
        return self.chunks[-1].latent_start + self.chunks[-1].num_latents if self.chunks else 0

    def _path(self, index: int) -> Path:
        return self.folder / CHUNKS / f"{index:04d}"

    @contextmanager
    def new_chunk(
        self, chunk: Chunk, latents: Tensor, readout: Tensor, visible: Tensor, cameras: Cameras
    ) -> Iterator[Path]:
        """Open a folder to write the rest of a chunk into. It goes when the block ends, except after
        :meth:`finish_chunk`.

        Args:
            chunk: the next one.
            latents: (F, C, h, w) of its new latent frames.
            readout: (F, C, h, w), what the memory showed there.
            visible: (F, h, w) bool, where it showed something.
            cameras: of these F frames.
        """
        draft = self.folder / CHUNKS / f".{chunk.index:04d}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            named = {
                "latents": latents,
                "readout": readout,
                "visible": visible,
                "intrinsics": cameras.intrinsics,
                "cam2world": cameras.cam2world,
                "image_size": torch.tensor(cameras.image_size),
            }
            save_file({name: value.cpu().contiguous() for name, value in named.items()}, draft / LATENTS)
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def finish_chunk(self, chunk: Chunk, draft: Path, metrics: dict[str, Any]) -> None:
        """Turn the folder that :meth:`new_chunk` gave into the chunk. From the rename on, it is part of the run."""
        _write_text(draft / METRICS, json.dumps(metrics) + "\n")
        if self.keeps_all:
            _flush(draft)
        os.replace(draft, self._path(chunk.index))

    def count_chunk(self, chunk: Chunk, cameras: Cameras) -> bool:
        """Return whether a chunk is part of the run; it is counted then, which must happen whatever else fails."""
        if not self._path(chunk.index).is_dir():
            return False
        if len(self.chunks) == chunk.index:
            self.chunks.append(chunk)
            self.cameras.append(cameras)
        with suppress(OSError):  # it is there; that it survives a power cut, or that others go, is the lesser matter
            if self.keeps_all:
                _flush_folder(self.folder / CHUNKS)
            self._tidy()
        return True

    def _tidy(self) -> None:
        """Remove what only the newest chunk needs, for the next one to continue from."""
        for chunk in self.chunks[-3:-1]:
            for name in (CACHE, DECODER, RANDOM):
                (self._path(chunk.index) / name).unlink(missing_ok=True)

    def newest(self, name: str) -> Path:
        """Return the path of a file of the newest chunk."""
        return self._path(len(self.chunks) - 1) / name

    def segments(self) -> list[Path]:
        """Return the paths of the chunks' videos, in order."""
        return [self._path(chunk.index) / SEGMENT for chunk in self.chunks]

    def metrics(self, index: int) -> dict[str, Any]:
        """Read the figures of one chunk."""
        content: dict[str, Any] = json.loads((self._path(index) / METRICS).read_text(encoding="utf-8"))
        return content

    def latents(self, frames: list[int], name: str = "latents") -> Tensor:
        """Read (len(frames), C, h, w) of these latent frames of the video, from 0.

        Args:
            frames: their numbers.
            name: "latents", or "readout" or "visible", what the memory showed there.
        """
        found = []
        for frame in frames:
            chunk = next(c for c in self.chunks if c.latent_start <= frame < c.latent_start + c.num_latents)
            with safe_open(self._path(chunk.index) / LATENTS, framework="pt") as file:
                found.append(file.get_slice(name)[frame - chunk.latent_start][None])
        return torch.cat(found)

    def _load_cameras(self, index: int) -> Cameras:
        with safe_open(self._path(index) / LATENTS, framework="pt") as file:
            intrinsics, cam2world, size = map(file.get_tensor, ("intrinsics", "cam2world", "image_size"))
        return Cameras(intrinsics, cam2world, size.tolist())

    def save_random(self, draft: Path, generator: torch.Generator) -> None:
        """Write the generator's state into the folder that :meth:`new_chunk` gives."""
        save_file({"state": generator.get_state()}, draft / RANDOM, {"device": generator.device.type})

    def load_random(self, generator: torch.Generator) -> None:
        """Set the generator to its state after the newest chunk.

        Raises:
            ValueError: the run's generator was on another kind of device.
        """
        with safe_open(self.newest(RANDOM), framework="pt") as file:
            device = file.metadata()["device"]
            if device != generator.device.type:
                raise ValueError(f"generator must be on {device} as in the run, got {generator.device}")
            generator.set_state(file.get_tensor("state"))


def _lock(folder: Path) -> FileLock:
    """Hold the folder's lock file until it is released: the system lets go of it when a process dies."""
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(
            f"run_dir {folder} is in use: by another process, or by a session that has not been closed"
        ) from error
    return lock


def _check_record(path: Path, record: dict[str, Any]) -> None:
    """Check that the run at `path` was started with what is in `record`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = (found["format"], found["version"]) == (FORMAT, VERSION)
        before: dict[str, Any] = found["settings"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not the record of a run ({error!r}), though there are chunks of one") from error
    if not known:
        raise ValueError(f"{path}: must be {FORMAT} version {VERSION}, got {found['format']} {found['version']}")
    now = json.loads(json.dumps(record))  # tuples become lists, as in the file
    before = _with_memory(before, now)
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if names:
        differences = "; ".join(f"{name} was {before.get(name)!r}, got {now.get(name)!r}" for name in names)
        raise ValueError(f"{path}: a run can be resumed only with what it was started with: {differences}")


def _with_memory(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a run from before there was a `MemoryConfig` under today's names.

    What such a run did not record (`write_policy`, which its cache holds, and `mode`) is taken from `now`.
    """
    if "memory" in before or "splat" not in before:
        return before
    renamed = {name: value for name, value in before.items() if name not in ("splat", "points")}
    kind = "pixel" if before.get("points") == "pixels" else "latent"
    if before.get("static_filter") == "KeepNothing":  # how a memory was kept empty
        kind, renamed["static_filter"] = "none", None
    return renamed | {"memory": now.get("memory", {}) | {"kind": kind, "readout": before["splat"]}}


def _write_text(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")


def _flush(folder: Path) -> None:
    """Flush every file of a folder, and the folder, to disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

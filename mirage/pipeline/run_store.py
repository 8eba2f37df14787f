"""`RunStore`: a generation run on disk, one folder per chunk, written atomically.

    run.json               what the run was started with
    chunks/0000/           latents.safetensors (latents, readouts and cameras of its latent frames), metrics.json,
                           segment.mp4 (its frames, where they are decoded chunk by chunk), manifest.json
    chunks/0004/           the newest two also hold what a next chunk continues from: cache.safetensors,
                           decoder.safetensors, random.safetensors

A chunk is written into `chunks/.0004` and renamed, which is the moment from which it counts: a process killed at any
moment leaves the chunks it finished. Latents are read back from there and not kept in memory, so that a run of any
length takes the same memory.

The manifest has the checksum of every file, the chunk's number, and what it follows: the settings of the run, or the
latents and metrics of the chunk before. All of it is compared when a run is opened, which changes nothing on disk:
whatever an earlier process left is removed by the first write. Runs from before there were manifests are resumed too.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count as count_up
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from mirage_kernels import Cameras
from mirage_kernels.io import flush_folder, replace_text

from ..files.checked import MANIFEST, DamagedFileError, digest_json, read_manifest, remove
from .chunk_folder import CACHE, CHUNKS, METRICS, STATE, ChunkFolder
from .chunks import Chunk
from .run_record import check_record, format_record

RUN, LOCK = "run.json", ".lock"
VIDEO, METRICS_LINES = "video.mp4", "metrics.jsonl"
LAST_GOOD = "last-good"
_FINISHED = (VIDEO, METRICS_LINES, CACHE)
_CHUNK, _DRAFT = re.compile(r"\d{4,}"), re.compile(r"\.\d{4,}")

logger = logging.getLogger(__name__)


class NonFiniteChunkError(ValueError):
    """A chunk of a run holds NaN or Inf, as chunks of earlier releases may; the message says which."""


class RunStore:
    """The chunks of one run. One process at a time holds a folder, until :meth:`close` or its end.

    Args:
        folder: of the run; None keeps only the latents, in a temporary folder that goes with this object.
        record: what the run is started with, plain JSON values.
        resume: whether to continue a run that is there already. A run without a chunk is none. "last-good" continues
            after the last chunk up to which nothing is damaged and all latents are finite; the chunks after it, and
            what was made of them, are moved to the folder `set-aside-1`, or another number, by the first write.

    Attributes:
        chunks: of the run, in order.
        cameras: of the new latent frames of each.

    Raises:
        FileExistsError: there is a run with chunks in `folder`, and `resume` is False.
        BlockingIOError: another process, or another session of this one, is using `folder`.
        DamagedFileError: a file of the run there is not what was written; the message says what can be done.
        ValueError: the run there was started with something else; the message names each value that differs. Or a
            chunk of it is not finite.
        In all cases the folder is as it was.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, record: dict[str, Any], resume: bool | str = False
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="mirage-") if folder is None else None
        self.folder = Path(self._temporary.name if self._temporary else folder)  # type: ignore[arg-type]
        self.chunks: list[Chunk] = []
        self.cameras: list[Cameras] = []
        self._folders: list[ChunkFolder] = []  # of the chunks
        self._new_folder: ChunkFolder | None = None  # of a chunk that is about to be one
        self._lost_record: str | None = None  # run.json, where it is to be written again
        self._settled = False
        self._spoiled: list[int] = []  # numbers of the chunks to be set aside
        self.has_state = True
        """Whether what the next chunk continues from is there, with the newest chunk."""
        (self.folder / CHUNKS).mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        try:
            self._open(record, resume)
        except BaseException:
            self.close()
            raise

    def _open(self, record: dict[str, Any], resume: bool | str) -> None:
        path, count = self.folder / RUN, self._count_chunks()
        if not count:
            replace_text(path, format_record(record))
            flush_folder(self.folder)
            self._settings = digest_json(record)
            return
        if not resume:
            raise FileExistsError(f"run_dir {self.folder} holds a run already: resume it, or name another folder")
        self._open_record(path, record)
        for index in range(count):
            try:
                self._adopt(index)
            except DamagedFileError as error:
                if resume != LAST_GOOD:
                    raise DamagedFileError(f"{error}; {self._advise(index, count)}") from None
                logger.warning("%s", error)
            except NonFiniteChunkError as error:
                if resume != LAST_GOOD:
                    raise ValueError(f"{error}; {self._offer(index, count)}") from None
                logger.warning("%s", error)
            if len(self.chunks) == index:
                self._spoiled = list(range(index, count))
                break
        if self.chunks:
            try:
                self._folders[-1].check_state()
            except DamagedFileError as error:
                if resume != LAST_GOOD:
                    raise DamagedFileError(f"{error}; {self._advise(count - 1, count, state=True)}") from None
                logger.warning("%s", error)
                self.has_state = False
        unchecked = [folder.path.name for folder in self._folders if not folder.has_manifest]
        if unchecked:
            logger.warning(
                "%s: no %s in %s, whose files are taken as they are", self.folder, MANIFEST, ", ".join(unchecked)
            )

    def _open_record(self, path: Path, record: dict[str, Any]) -> None:
        """Compare run.json with what the run is resumed with. Where it is lost, the first chunk knows what it held."""
        self._settings = digest_json(record)
        try:
            self._settings = digest_json(check_record(path, record))
        except DamagedFileError as error:
            with suppress(ValueError):
                first = read_manifest(self._path(0))
                if first is not None and first["follows"] == self._settings and not path.is_dir():
                    logger.warning("%s: it is written again, with the settings that the chunks were made with", error)
                    self._lost_record = format_record(record)
                    return
            hint = "put it back from a copy, or begin again in another folder"
            raise DamagedFileError(f"{error}, though there are chunks of a run; {hint}") from None

    def _count_chunks(self) -> int:
        """Count the chunks, which must be folders numbered from 0 without a gap."""
        found = {path.name: path for path in (self.folder / CHUNKS).iterdir() if _CHUNK.fullmatch(path.name)}
        for index in range(len(found)):
            path = self._path(index)
            if path.name not in found:
                later = ", ".join(sorted(name for name in found if int(name) > index))
                raise DamagedFileError(
                    f"{path} is missing, though there is {later}: put it back from a copy, or delete {later}"
                )
            if not path.is_dir():
                raise DamagedFileError(f"{path} is damaged: it must be a folder; remove it, or put it back from a copy")
        return len(found)

    def _adopt(self, index: int) -> None:
        """Take a chunk that is on disk into the run, all of it compared with its manifest but its video and state."""
        folder = ChunkFolder.open(self._path(index), index, self._last_identity())
        chunk = folder.load_chunk(index, self.chunks[-1].stop if self.chunks else 0)
        cameras = folder.load_cameras(chunk)
        finite = folder.load_latents(chunk)["latents"].isfinite()
        if not finite.all():
            bad = finite.numel() - int(finite.sum())
            raise NonFiniteChunkError(
                f"{folder.path} holds latents that are not finite, {bad} of {finite.numel()} values: an earlier release"
                " kept what a model had spoiled"
            )
        self.chunks.append(chunk)
        self.cameras.append(cameras)
        self._folders.append(folder)

    def _offer(self, index: int, count: int) -> str:
        """Say what "last-good" does about chunk `index` of `count`."""
        after = f"continues after chunk {index - 1:04d}" if index else "begins again"
        later = f"chunk {index:04d}" if index == count - 1 else f"chunks {index:04d} to {count - 1:04d}"
        return f'resume="{LAST_GOOD}" (--resume-last-good) {after}, and moves {later} aside; nothing is deleted'

    def _last_identity(self) -> str:
        """Return what the next chunk follows: the chunk before, or the run's settings."""
        return self._folders[-1].identity() if self._folders else self._settings

    def _advise(self, index: int, count: int, state: bool = False) -> str:
        """Say what can be done where a file of chunk `index` of `count` is damaged, or one that it continues from."""
        offer = self._offer(index, count)
        if state:
            offer = f'resume="{LAST_GOOD}" (--resume-last-good) makes it again from the latents of the chunks'
        copy = f"{offer}. Or put it back from a copy"
        if not index:
            return f"{copy}, or delete {self.folder / CHUNKS} and begin again"
        try:
            self._folders[index - 1].check_state()
            held = True
        except (OSError, ValueError):
            held = False
        if not held:
            return f"{copy}, or begin again in another folder: only the newest two chunks can be continued from"
        later = " and ".join(str(self._path(number)) for number in range(index, count))
        return f"{copy}, or delete {later} and resume: the run continues from chunk {index - 1:04d}"

    def settle(self) -> None:
        """Remove what an earlier process left behind, before the first write. Opening a run removes nothing, so that
        one that is refused after all is as it was."""
        if self._settled:
            return
        if self._lost_record is not None:
            replace_text(self.folder / RUN, self._lost_record)
        chunks = self.folder / CHUNKS
        for draft in [path for path in chunks.iterdir() if _DRAFT.fullmatch(path.name)]:
            remove(draft)
        for draft in (*self.folder.glob(".*.tmp"), *chunks.glob("*/.*.tmp")):
            remove(draft)
        self._set_aside()
        self._tidy(len(self.chunks))
        self._settled = True

    def _set_aside(self) -> None:
        """Move the chunks that the run does not continue from, and what was made of them, into a folder of their own.

        The newest one goes first: a process killed in between leaves a run without gaps.
        """
        if not self._spoiled:
            return
        aside = next(path for n in count_up(1) if not (path := self.folder / f"set-aside-{n}").exists())
        aside.mkdir()
        for path in (*(self._path(index) for index in reversed(self._spoiled)), *map(self.folder.joinpath, _FINISHED)):
            if path.exists():
                os.replace(path, aside / path.name)
        flush_folder(self.folder / CHUNKS)
        logger.warning("%s: chunks from %04d on are in %s now", self.folder, self._spoiled[0], aside.name)

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
    def rewound(self, count: int) -> Iterator[None]:
        """Within the block, be as after the first `count` chunks."""
        held = self.chunks, self.cameras, self._folders
        try:
            self.chunks, self.cameras, self._folders = (part[:count] for part in held)  # type: ignore[assignment]
            yield
        finally:
            self.chunks, self.cameras, self._folders = held

    @contextmanager
    def new_chunk(
        self, chunk: Chunk, latents: Tensor, readout: Tensor, visible: Tensor, cameras: Cameras
    ) -> Iterator[ChunkFolder]:
        """Open a folder to write the rest of a chunk into. It goes when the block ends, except after
        :meth:`finish_chunk`.

        Args:
            chunk: the next one.
            latents: (F, C, h, w) of its new latent frames.
            readout: (F, C, h, w), what the memory showed there.
            visible: (F, h, w) bool, where it showed something.
            cameras: of these F frames.
        """
        self.settle()
        draft = self.folder / CHUNKS / f".{chunk.index:04d}"
        remove(draft)
        draft.mkdir()
        try:
            folder = ChunkFolder(draft, None)
            folder.save_latents(latents, readout, visible, cameras)
            yield folder
        except OSError as error:
            if error.filename is None and error.errno is not None:  # such as of a full disk
                raise OSError(error.errno, os.strerror(error.errno), str(draft)) from error
            raise
        finally:
            with suppress(OSError):
                remove(draft)

    def finish_chunk(self, chunk: Chunk, folder: ChunkFolder, metrics: dict[str, Any]) -> None:
        """Turn the folder that :meth:`new_chunk` gave into the chunk. From the rename on, it is part of the run."""
        draft, final = folder.path, self._path(chunk.index)
        (draft / METRICS).write_text(json.dumps(metrics) + "\n", encoding="utf-8")
        if self.keeps_all:
            folder.write_manifest(chunk.index, self._last_identity())
            flush_folder(draft, content=True)
        self._new_folder = folder
        os.replace(draft, final)

    def count_chunk(self, chunk: Chunk, cameras: Cameras) -> bool:
        """Return whether a chunk is part of the run; it is counted then, which must happen whatever else fails."""
        folder, path = self._new_folder, self._path(chunk.index)
        if folder is None or not path.is_dir():
            return False
        if len(self.chunks) == chunk.index:
            folder.path = path
            self.chunks.append(chunk)
            self.cameras.append(cameras)
            self._folders.append(folder)
        with suppress(OSError):  # it is there; that it survives a power cut is the lesser matter
            if self.keeps_all:
                flush_folder(self.folder / CHUNKS)
        self._tidy(4)
        return True

    def _tidy(self, count: int) -> None:
        """Remove what only the newest two of the last `count` chunks need, for a next one to continue from."""
        for chunk in self.chunks[-count:-2]:
            for name in STATE:
                with suppress(OSError):
                    (self._path(chunk.index) / name).unlink(missing_ok=True)

    def newest(self, name: str) -> Path:
        """Return the path of a file of the newest chunk."""
        return self._path(len(self.chunks) - 1) / name

    @property
    def folders(self) -> tuple[ChunkFolder, ...]:
        """Of the chunks, in order."""
        return tuple(self._folders)

    def metrics(self, index: int) -> dict[str, Any]:
        """Read the figures of one chunk."""
        return self._folders[index].metrics()

    def latents(self, frames: list[int], name: str = "latents") -> Tensor:
        """Read (len(frames), C, h, w) of these latent frames of the video, from 0.

        Args:
            frames: their numbers.
            name: "latents", or "readout" or "visible", what the memory showed there.
        """
        found: dict[int, Tensor] = {}
        for chunk in self.chunks:
            wanted = [frame for frame in frames if chunk.latent_start <= frame < chunk.latent_start + chunk.num_latents]
            if wanted:
                held = self._folders[chunk.index].load_latents(chunk)[name]
                found |= {frame: held[frame - chunk.latent_start].clone() for frame in wanted}
        return torch.stack([found[frame] for frame in frames])

    def load_random(self, generator: torch.Generator) -> None:
        """Set the generator to its state after the newest chunk.

        Raises:
            ValueError: the run's generator was on another kind of device.
        """
        self._folders[-1].load_random(generator)


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

"""`RunStore`: a generation run on disk, one folder per chunk, each there whole or not at all.

    run.json               what the run was started with
    seed.safetensors       the memory before the first chunk, while that one is being made
    chunks/0000/           latents.safetensors (latents, read-outs and cameras of its latent frames), metrics.json,
                           segment.mp4 (its frames, where they are decoded chunk by chunk)
    chunks/0004/           the newest one also holds what the next chunk goes on from: cache.safetensors,
                           decoder.safetensors, random.safetensors

A chunk is written into `chunks/.0004` and renamed: a process killed at any moment leaves the chunks it finished.
Latents are read back from there and not kept in memory, so that a run of any length takes the same memory.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mirage_kernels import Cameras
from mirage_kernels.storage import replace_file

from .chunks import Chunk

FORMAT, VERSION = "mirage-run", 1
RUN, CHUNKS = "run.json", "chunks"
LATENTS, METRICS, SEGMENT = "latents.safetensors", "metrics.json", "segment.mp4"
CACHE, DECODER, RANDOM = "cache.safetensors", "decoder.safetensors", "random.safetensors"
SEED = "seed.safetensors"


class RunStore:
    """The chunks of one run.

    Args:
        folder: of the run; None keeps only the latents, in a temporary folder that goes with this object.
        settings: what the run is started with, plain JSON values.
        resume: whether to go on with a run that is there already.

    Raises:
        FileExistsError: there is a run in `folder`, and `resume` is False.
        ValueError: the run there was started with other settings; the message names each that differs.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: dict[str, Any], resume: bool = False) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="mirage-") if folder is None else None
        self.folder = Path(self._temporary.name if self._temporary else folder)  # type: ignore[arg-type]
        self.chunks: list[Chunk] = []
        record = json.loads(json.dumps(settings))  # as it will be read back
        path = self.folder / RUN
        if path.exists():
            if not resume:
                raise FileExistsError(f"run_dir {self.folder} holds a run already: resume it, or name another folder")
            _check_settings(path, record)
        else:
            (self.folder / CHUNKS).mkdir(parents=True, exist_ok=True)
            content = json.dumps({"format": FORMAT, "version": VERSION, "settings": record}, indent=2) + "\n"
            replace_file(path, lambda draft: _write_text(Path(draft), content))
        for unfinished in (self.folder / CHUNKS).glob(".[0-9]*"):
            shutil.rmtree(unfinished)
        while self._path(index := len(self.chunks)).is_dir():
            self.chunks.append(Chunk(index, *self.metrics(index)["frames"]))

    @property
    def keeps_all(self) -> bool:
        """Whether everything is kept that the run needs to go on after this process; else only latents are."""
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
        """A folder to write the rest of a chunk into. It goes when the block ends, but for :meth:`finish_chunk`.

        Args:
            chunk: the next one.
            latents: (F, C, h, w) of its new latent frames.
            readout: (F, C, h, w), what the memory showed there.
            visible: (F, h, w) bool, where it showed something.
            cameras: of these F frames.
        """
        draft = self.folder / CHUNKS / f".{chunk.index:04d}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
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
        """Make the folder that :meth:`new_chunk` gave the chunk: from here on it is part of the run."""
        _write_text(draft / METRICS, json.dumps(metrics) + "\n")
        if self.keeps_all:
            _flush(draft)
        os.replace(draft, self._path(chunk.index))
        self.chunks.append(chunk)
        if self.keeps_all:
            _flush_folder(self.folder / CHUNKS)
        if chunk.index:
            for name in (CACHE, DECODER, RANDOM):
                (self._path(chunk.index - 1) / name).unlink(missing_ok=True)
        (self.folder / SEED).unlink(missing_ok=True)

    def newest(self, name: str) -> Path:
        """A file of the newest chunk."""
        return self._path(len(self.chunks) - 1) / name

    def segments(self) -> list[Path]:
        """The video of each chunk, in order."""
        return [self._path(chunk.index) / SEGMENT for chunk in self.chunks]

    def metrics(self, index: int) -> dict[str, Any]:
        """Of one chunk."""
        content: dict[str, Any] = json.loads((self._path(index) / METRICS).read_text(encoding="utf-8"))
        return content

    def latents(self, frames: list[int], name: str = "latents") -> Tensor:
        """(len(frames), C, h, w) of these latent frames of the video, from 0; `name` may be "readout" or "visible"."""
        found = []
        for frame in frames:
            chunk = next(c for c in self.chunks if c.latent_start <= frame < c.latent_start + c.num_latents)
            with safe_open(self._path(chunk.index) / LATENTS, framework="pt") as file:
                found.append(file.get_slice(name)[frame - chunk.latent_start][None])
        return torch.cat(found)

    def cameras(self) -> list[Cameras]:
        """Of the new latent frames of each chunk."""
        found = []
        for chunk in self.chunks:
            with safe_open(self._path(chunk.index) / LATENTS, framework="pt") as file:
                intrinsics, cam2world, size = map(file.get_tensor, ("intrinsics", "cam2world", "image_size"))
            found.append(Cameras(intrinsics, cam2world, size.tolist()))
        return found

    def save_random(self, draft: Path, generator: torch.Generator) -> None:
        """The generator's state, into the folder that :meth:`new_chunk` gives."""
        save_file({"state": generator.get_state()}, draft / RANDOM, {"device": generator.device.type})

    def load_random(self, generator: torch.Generator) -> None:
        """The state after the newest chunk.

        Raises:
            ValueError: the run's generator was on another kind of device.
        """
        with safe_open(self.newest(RANDOM), framework="pt") as file:
            device = file.metadata()["device"]
            if device != generator.device.type:
                raise ValueError(f"generator must be on {device} as in the run, got {generator.device}")
            generator.set_state(file.get_tensor("state"))


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """That the run at `path` was started with `settings`."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = (record["format"], record["version"]) == (FORMAT, VERSION)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not the record of a run ({error})") from error
    if not known:
        raise ValueError(f"{path}: must be {FORMAT} version {VERSION}, got {record['format']} {record['version']}")
    before = record["settings"]
    names = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
    if names:
        differences = "; ".join(f"{name} was {before.get(name)!r}, got {settings.get(name)!r}" for name in names)
        raise ValueError(f"{path}: a run can be resumed only with the settings it was started with: {differences}")


def _write_text(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")


def _flush(folder: Path) -> None:
    """Every file of a folder, and the folder, to disk."""
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

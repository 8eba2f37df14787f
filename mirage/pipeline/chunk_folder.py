"""`ChunkFolder`: the files of one chunk of a run, read back and compared with their checksums.

Runs from before there were manifests have chunks without one: their files are taken as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage_kernels import Cameras
from mirage_kernels.io import write_tensors

from ..files.checked import (
    MANIFEST,
    DamagedFileError,
    check_file,
    digest,
    digest_json,
    parse_json,
    parse_tensors,
    read_file,
    read_manifest,
    take_tensor,
    write_manifest,
)
from .chunks import Chunk

CHUNKS = "chunks"
"""The folder, in a run's, of the chunks' folders."""
LATENTS, METRICS, SEGMENT = "latents.safetensors", "metrics.json", "segment.mp4"
CACHE, DECODER, RANDOM = "cache.safetensors", "decoder.safetensors", "random.safetensors"
STATE = (CACHE, DECODER, RANDOM)
"""What a next chunk continues from."""


class ChunkFolder:
    """A chunk on disk.

    Args:
        path: of the folder.
        manifest: of the folder; None: its files are not checked.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any] | None) -> None:
        self.path = path
        self._manifest = manifest

    @classmethod
    def open(cls, path: Path, index: int, follows: str) -> ChunkFolder:
        """Open the folder of chunk `index`.

        Raises:
            DamagedFileError: its manifest is damaged, or it is another chunk, or does not follow `follows`: the
                digest of the run's settings, or :meth:`identity` of the chunk before.
        """
        manifest = read_manifest(path)
        if manifest is not None and (manifest["chunk"], manifest["follows"]) != (index, follows):
            before = f"chunk {index - 1:04d} of this run" if index else "the settings of this run"
            raise DamagedFileError(f"{path} is another chunk than was written there: it does not follow {before}")
        return cls(path, manifest)

    @property
    def has_manifest(self) -> bool:
        """Whether its files are checked."""
        return self._manifest is not None

    def identity(self) -> str:
        """Return the digest of the chunk's latents and metrics, which no other chunk has."""
        names = (LATENTS, METRICS)
        if self._manifest is not None:
            return digest_json([self._manifest["files"][name]["sha256"] for name in names])
        return digest_json([digest(self.read(name)) for name in names])

    # Reading.

    def read(self, name: str) -> bytes:
        """Read a file, compared with the manifest.

        Raises:
            DamagedFileError: it is not what was written.
        """
        return read_file(self.path, name, self._manifest)

    def check_state(self) -> None:
        """Compare what the next chunk continues from with the manifest.

        Raises:
            DamagedFileError: a file of it is not what was written, or not there.
        """
        for name in STATE:
            if self._manifest is None:
                if name != DECODER:  # of a run that decodes at the end there is none
                    self.read(name)
            elif name in self._manifest["files"]:
                check_file(self.path, name, self._manifest)

    def check_segment(self) -> None:
        """Compare the chunk's video with the manifest.

        Raises:
            DamagedFileError: it is not what was written, or not there.
        """
        if self._manifest is None or SEGMENT not in self._manifest["files"]:
            self.read(SEGMENT)
        else:
            check_file(self.path, SEGMENT, self._manifest)

    def metrics(self) -> dict[str, Any]:
        """Read the figures of the chunk."""
        return parse_json(self.path / METRICS, self.read(METRICS))

    def load_chunk(self, index: int, start: int) -> Chunk:
        """Read which frames the chunk holds; the first must be `start`."""
        frames = self.metrics().get("frames")
        if not (
            isinstance(frames, list)
            and len(frames) == 2
            and all(type(frame) is int for frame in frames)
            and frames[0] == start < frames[1]
        ):
            raise DamagedFileError(f"{self.path / METRICS} is damaged: frames must be [{start}, later], got {frames!r}")
        return Chunk(index, *frames)

    def load_latents(self, chunk: Chunk) -> dict[str, Tensor]:
        """Read latents, readout and visible (F, ..), intrinsics, cam2world and image_size of the chunk."""
        path = self.path / LATENTS
        tensors, _ = parse_tensors(path, self.read(LATENTS))
        count = chunk.num_latents
        for name, shape, dtype in (
            ("latents", (count, None, None, None), torch.float32),
            ("readout", (count, None, None, None), None),
            ("visible", (count, None, None), torch.bool),
            ("intrinsics", (count, 3, 3), torch.float64),
            ("cam2world", (count, 4, 4), torch.float64),
            ("image_size", (2,), torch.int64),
        ):
            take_tensor(path, tensors, name, shape, dtype)
        return tensors

    def load_cameras(self, chunk: Chunk) -> Cameras:
        """Read the cameras of the chunk's new latent frames."""
        held = self.load_latents(chunk)
        try:
            size = held["image_size"].tolist()
            return Cameras(held["intrinsics"], held["cam2world"], size, square_pixels=False, off_center=True)
        except ValueError as error:
            raise DamagedFileError(f"{self.path / LATENTS} is damaged: {error}") from None

    def load_random(self, generator: torch.Generator) -> None:
        """Set the generator to its state after the chunk.

        Raises:
            ValueError: the run's generator was on another kind of device.
        """
        path = self.path / RANDOM
        tensors, metadata = parse_tensors(path, self.read(RANDOM))
        device = metadata.get("device")
        if device != generator.device.type:
            raise ValueError(f"generator must be on {device} as in the run, got {generator.device}")
        state = take_tensor(path, tensors, "state", (None,), torch.uint8)
        try:
            generator.set_state(state)
        except RuntimeError as error:
            raise DamagedFileError(f"{path} is damaged: it holds no state of a generator ({error})") from None

    # Writing.

    def save_latents(self, latents: Tensor, readout: Tensor, visible: Tensor, cameras: Cameras) -> None:
        """Write latents.safetensors."""
        named = {
            "latents": latents,
            "readout": readout,
            "visible": visible,
            "intrinsics": cameras.intrinsics,
            "cam2world": cameras.cam2world,
            "image_size": torch.tensor(cameras.image_size),
        }
        write_tensors(self.path / LATENTS, named)

    def save_random(self, generator: torch.Generator) -> None:
        """Write random.safetensors."""
        write_tensors(self.path / RANDOM, {"state": generator.get_state()}, {"device": generator.device.type})

    def write_manifest(self, index: int, follows: str) -> None:
        """Write the manifest, when all else is there."""
        names = [path.name for path in self.path.iterdir() if path.name != MANIFEST]
        self._manifest = write_manifest(self.path, names, {"chunk": index, "follows": follows})

    def record_segment(self) -> None:
        """Put the checksum of the chunk's video, which was made again, into the manifest, where there is one."""
        if self._manifest is not None and SEGMENT in self._manifest["files"]:
            facts = {name: self._manifest[name] for name in ("chunk", "follows")}
            self._manifest = write_manifest(self.path, [SEGMENT], facts, self._manifest["files"])

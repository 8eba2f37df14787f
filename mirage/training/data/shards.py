"""Packed clips, in a folder of files or in tar shards that are read where they lie."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

from ...pipeline.chunks import latent_count
from ..config import DataConfig, SourceConfig
from .clips import Clip
from .files import load_clip

Place = tuple[int, int]
PackedClip = tuple[Path, str, Place | None, Place | None]


class PackedSource:
    """Hold packed clips, in files and in shards.

    A clip is (path, key, place, prompt's place); a place is (offset, bytes), None for a whole file and where there is
    no prompt.
    """

    def __init__(self, config: SourceConfig, data: DataConfig) -> None:
        assert config.path is not None
        root, self.data = Path(config.path), data
        if not root.exists():
            raise FileNotFoundError(f"{root}: no such file or folder")
        self.clips: list[PackedClip] = []
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            if path.suffix == ".safetensors":
                self.clips.append((path, path.stem, None, None))
            elif path.suffix == ".tar":
                self.clips += index_shard(path)

    def __len__(self) -> int:
        return len(self.clips)

    def name(self, index: int) -> str:
        path, key, place, _ = self.clips[index]
        return str(path) if place is None else f"{path}, {key}"

    def load(self, index: int) -> Clip:
        path, _, place, prompt = self.clips[index]
        clip = load_clip(self.name(index), path.read_bytes() if place is None else read_part(path, place))
        if len(clip.cameras) < latent_count(self.data.frames):
            expected, got = latent_count(self.data.frames), len(clip.cameras)
            raise ValueError(f"{clip.name}: must have {expected} latent frames or more for data.frames, got {got}")
        if prompt is None:
            return clip
        return replace(clip, prompt=read_part(path, prompt).decode(errors="replace").strip())


def index_shard(path: Path) -> list[PackedClip]:
    """List where the clips of a shard lie, grouped as WebDataset does: by the name up to its first dot.

    Raises:
        ValueError: no plain .tar file.
    """
    parts: dict[str, dict[str, Place]] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.isfile():
                    folder, _, file = member.name.rpartition("/")
                    key, _, kind = file.partition(".")
                    parts.setdefault(f"{folder}/{key}" if folder else key, {})[kind] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: must be a plain .tar shard, got: {error}") from None
    return [
        (path, key, found["safetensors"], found.get("txt")) for key, found in parts.items() if "safetensors" in found
    ]


def read_part(path: Path, place: Place) -> bytes:
    """Read some bytes of a file."""
    with path.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])

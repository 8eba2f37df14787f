"""Clips to train on: from synthetic rooms, folders and tar shards, in an order that a number tells.

A clip is 4 n + 1 frames with poses, depth and masks of what stands still, held as the memory takes it: depth and masks
are those of the latent frames' tokens. It has frames, or latents that `mirage prepare` has encoded.

Layouts on disk:

- "rgbd": a folder in the layout of 7-Scenes (:func:`~mirage.scenes.rgbd.load_rgbd_folder`), or a folder of such
  folders. A
  `static/frame-000000.png` beside a frame marks what stands still by non-zero pixels, `prompt.txt` says what there is.
- "realestate10k": `cameras/CLIP.txt` in RealEstate10K's own format, and for each of its lines
  `frames/CLIP/TIMESTAMP.jpg` (or .png) and `depth/CLIP/TIMESTAMP.png` (16 bits, millimetres) or `.npy` (metres); if
  there, `static/CLIP/TIMESTAMP.png` (non-zero: stands still) and `prompts/CLIP.txt`.
- "packed": `CLIP.safetensors` of :func:`save_clip`, in a folder or in tar shards as WebDataset has them, where a
  `CLIP.txt` beside it is the prompt. Shards must be plain .tar: clips are read where they lie, so that a run can go on
  from any of them.

The number k of a clip in a run says which it is: epochs are shuffled by the seed and the epoch alone. So a resumed run
sees what it would have seen.
"""

from __future__ import annotations

import hashlib
import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.utils.data import Dataset

from mirage_kernels import Cameras
from mirage_kernels.geometry import pool_depth, pool_mask
from mirage_kernels.io import replace_file

from ..optional import import_extra
from ..pipeline.chunks import STRIDE, latent_count
from ..scenes.camera_files import load_realestate10k
from ..scenes.rgbd import list_rgbd_folder, load_rgbd_folder
from ..scenes.synthetic import SyntheticRoom
from .config import DataConfig, SourceConfig

FORMAT, VERSION = "mirage-clip", 2
RATIO = 16
"""Pixels along a side of a token."""

_HEADER_BYTES = 8


@dataclass(frozen=True)
class Clip:
    """4 n + 1 frames of one scene; F = n + 1 latent frames.

    Attributes:
        name: to show to people.
        prompt: what there is to see.
        depth: (F, h, w) float32, z of each token in world units; 0 where unknown.
        static: (F, h, w) bool, False where anything in a token moves in any of its frames.
        cameras: of the F latent frames, image size of the frames.
        frames: (N, 3, H, W) float32 in [0, 1]; None where there are latents.
        latents: (F, C, h, w) float32, normalised; None where there are frames.
        still: (C, h, w) float32, beside latents: of the first frame, see :func:`~mirage.models.vae.encode_still`.
        prompt_embeds: (L, D), where they were encoded.
        vae: fingerprint of the VAE that has encoded the latents.
    """

    name: str
    prompt: str
    depth: Tensor
    static: Tensor
    cameras: Cameras
    frames: Tensor | None = None
    latents: Tensor | None = None
    still: Tensor | None = None
    prompt_embeds: Tensor | None = None
    vae: str | None = None


@dataclass(frozen=True)
class Drawn:
    """What number `number` of a run gave: a clip, and what was broken on the way to it, {name: reason}."""

    number: int
    clip: Clip
    broken: dict[str, str]


class Source(Protocol):
    """Clips by index. :meth:`load` raises OSError or ValueError for a broken one."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def load(self, index: int) -> Clip: ...


def mix(*parts: int | str) -> int:
    """A seed in [0, 2^63) that changes with every part."""
    text = " ".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


class Clips(Dataset):
    """All sources of a run, shuffled anew in every epoch.

    Args:
        config: what to load.
        seed: of the order.

    Raises:
        OSError, ValueError: a source is not there, or holds nothing.
    """

    def __init__(self, config: DataConfig, seed: int = 0) -> None:
        self.sources = [_make_source(source, config) for source in config.sources]
        self.where = [(s, i) for s, source in enumerate(self.sources) for i in range(len(source))]
        self.seed = seed
        self._kept: dict[tuple[int, int], Clip] | None = {} if config.cache else None
        self._epoch: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, number: int) -> Drawn:
        """The clip of a number >= 0, or the next one that is not broken.

        Raises:
            ValueError: all of them are broken.
        """
        broken: dict[str, str] = {}
        for shift in range(len(self)):
            source, index = self.where[self._position(number, shift)]
            try:
                return Drawn(number, self._load(source, index), broken)
            except (OSError, ValueError) as error:
                broken[self.sources[source].name(index)] = str(error)
        raise ValueError(f"all {len(self)} clips are broken: {list_broken(broken)}")

    def _load(self, source: int, index: int) -> Clip:
        if self._kept is None:
            return self.sources[source].load(index)
        if (source, index) not in self._kept:
            clip = self.sources[source].load(index)
            small = None if clip.frames is None else (clip.frames * 255.0).round().byte()
            self._kept[source, index] = replace(clip, frames=small)
        kept = self._kept[source, index]
        return kept if kept.frames is None else replace(kept, frames=kept.frames / 255.0)

    def _position(self, number: int, shift: int) -> int:
        epoch, place = divmod(number, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, "epoch", epoch))
            self._epoch = epoch, torch.randperm(len(self), generator=generator).tolist()
        return self._epoch[1][(place + shift) % len(self)]


class Numbers:
    """The numbers that one process draws, a batch at a time, from a step on."""

    def __init__(self, first: int, last: int, batch_size: int, rank: int, world: int) -> None:
        self.passes, self.batch_size, self.rank, self.world = range(first, last), batch_size, rank, world

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.passes:
            begin = (number * self.world + self.rank) * self.batch_size
            yield list(range(begin, begin + self.batch_size))


def make_clip(
    name: str, prompt: str, frames: Tensor, depth: Tensor, static: Tensor, cameras: Cameras, size: Sequence[int]
) -> Clip:
    """A clip of N = 4 n + 1 frames, resized to cover `size` (height, width) and cropped to it about the centre.

    Args:
        frames, depth, static: (N, 3, H, W) in [0, 1], (N, H, W), (N, H, W) bool.
        cameras: of the N frames.

    Raises:
        ValueError: another number of frames, or not finite.
    """
    count = len(frames)
    if count % STRIDE != 1 or not count == len(depth) == len(static) == len(cameras):
        got = f"{count}, {len(depth)}, {len(static)} and {len(cameras)}"
        raise ValueError(f"{name}: frames, depth, static and cameras must be 4 n + 1 of one number, got {got}")
    if not frames.isfinite().all():
        raise ValueError(f"{name}: frames must be finite")
    height, width = size
    rows, columns = cameras.image_size
    scale = max(height / rows, width / columns)
    grown = (max(round(rows * scale), height), max(round(columns * scale), width))
    top, left = (grown[0] - height) // 2, (grown[1] - width) // 2
    if grown != (rows, columns):
        frames = F.interpolate(frames, grown, mode="bilinear", antialias=True).clamp(0, 1)
        depth = F.interpolate(depth[:, None], grown, mode="nearest-exact")[:, 0]
        static = F.interpolate(static[:, None].float(), grown, mode="nearest-exact")[:, 0] > 0
        cameras = cameras.resized(grown)
    window = (slice(None), slice(top, top + height), slice(left, left + width))
    intrinsics = cameras.intrinsics.clone()
    intrinsics[:, 0, 2] -= left
    intrinsics[:, 1, 2] -= top
    cameras = Cameras(intrinsics, cameras.cam2world, (height, width))
    tokens = (height // RATIO, width // RATIO)
    stands = pool_mask(static[window], tokens)
    stands = torch.cat([stands[:1], stands[1:].unflatten(0, (-1, STRIDE)).all(1)])
    return Clip(
        name,
        prompt,
        depth=pool_depth(depth[window][::STRIDE].float(), tokens),
        static=stands,
        cameras=cameras[::STRIDE],
        frames=frames[:, :, window[1], window[2]].contiguous(),
    )


def save_clip(path: Path, clip: Clip) -> None:
    """Write a clip with latents to a safetensors file, atomically: latents float16, everything else as it is."""
    assert clip.latents is not None and clip.still is not None
    tensors = {
        "latents": clip.latents.half(),
        "still": clip.still.half(),
        "depth": clip.depth,
        "static": clip.static,
        "intrinsics": clip.cameras.intrinsics,
        "cam2world": clip.cameras.cam2world,
        "image_size": torch.tensor(clip.cameras.image_size),
    }
    if clip.prompt_embeds is not None:
        tensors["prompt_embeds"] = clip.prompt_embeds
    metadata = {"format": FORMAT, "version": str(VERSION)}
    metadata |= {"name": clip.name, "prompt": clip.prompt, "vae": clip.vae or ""}
    content = save_tensors({name: value.cpu().contiguous() for name, value in tensors.items()}, metadata)
    write_bytes(path, content)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""

    def write(draft: str) -> None:
        Path(draft).write_bytes(content)

    replace_file(path, write)


def load_clip(name: str, content: bytes) -> Clip:
    """A clip from the bytes of :func:`save_clip`.

    Raises:
        ValueError: they are no such file, or not whole.
    """
    try:
        tensors = load_tensors(content)
        length = int.from_bytes(content[:_HEADER_BYTES], "little")
        metadata = json.loads(content[_HEADER_BYTES : _HEADER_BYTES + length]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{name}: not a whole safetensors file ({error}); was it cut short?") from None
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
        got = f"{metadata.get('format')!r} {metadata.get('version')!r}"
        raise ValueError(f"{name}: must be {FORMAT} version {VERSION}, which `mirage prepare` writes, got {got}")
    try:
        latents, depth, static = tensors["latents"].float(), tensors["depth"], tensors["static"]
        still = tensors["still"].float()
        cameras = Cameras(tensors["intrinsics"], tensors["cam2world"], tensors["image_size"].tolist())
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name}: a clip must hold its tensors: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    grid = (latents.shape[0], *latents.shape[2:])
    if latents.ndim != 4 or depth.shape != grid or static.shape != grid or len(cameras) != grid[0]:
        shapes = f"{tuple(latents.shape)}, {tuple(depth.shape)}, {tuple(static.shape)} and {len(cameras)} cameras"
        raise ValueError(f"{name}: latents, depth and static must be of the same tokens, got {shapes}")
    if still.shape != latents.shape[1:]:
        raise ValueError(f"{name}: still must be a latent frame {tuple(latents.shape[1:])}, got {tuple(still.shape)}")
    if not (latents.isfinite().all() and still.isfinite().all()):
        raise ValueError(f"{name}: latents and still must be finite")
    return Clip(
        name,
        metadata.get("prompt", ""),
        depth=depth,
        static=static,
        cameras=cameras,
        latents=latents,
        still=still,
        prompt_embeds=tensors.get("prompt_embeds"),
        vae=metadata.get("vae") or None,
    )


def read_origin(path: Path) -> tuple[str | None, str | None]:
    """Of the clip in a file of :func:`save_clip`, from its header alone: the fingerprint of the VAE that encoded it,
    and the name that it had in the data it was made of. None where the file does not say.

    Raises:
        OSError, ValueError: it cannot be read, is no safetensors file, or of an earlier version.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_BYTES), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path}: not a whole safetensors file; was it cut short?")
        try:
            metadata = json.loads(file.read(length)).get("__metadata__", {})
        except ValueError as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from None
    if metadata.get("format") == FORMAT and metadata.get("version") != str(VERSION):
        what = "name another folder, or remove what is in this one"
        raise ValueError(f"{path}: {FORMAT} must be of version {VERSION}, got {metadata.get('version')}: {what}")
    return metadata.get("vae") or None, metadata.get("name") or None


# Sources


def _make_source(config: SourceConfig, data: DataConfig) -> Source:
    kinds: dict[str, Any] = {"synthetic": _Rooms, "rgbd": _RGBD, "realestate10k": _RealEstate, "packed": _Packed}
    source: Source = kinds[config.kind](config, data)
    if not len(source):
        raise ValueError(f"{config.path}: expected clips of {data.frames} frames of kind {config.kind!r}, found none")
    return source


class _Rooms:
    """A room a clip."""

    def __init__(self, config: SourceConfig, data: DataConfig) -> None:
        self.config, self.data = config, data

    def __len__(self) -> int:
        return self.config.rooms

    def name(self, index: int) -> str:
        return f"room {self.config.first_seed + index}"

    def load(self, index: int) -> Clip:
        seed = self.config.first_seed + index
        room = SyntheticRoom(seed, self.config.moving, self.config.texture)
        kind = self.config.paths[int(random.Random(seed).random() * len(self.config.paths))]
        cameras = room.path(kind, self.data.frames, self.data.size, pace=self.config.pace)
        made = room.render(cameras)
        return make_clip(self.name(index), room.prompt, made.images, made.depth, made.static, cameras, self.data.size)


class _RGBD:
    def __init__(self, config: SourceConfig, data: DataConfig) -> None:
        assert config.path is not None
        root, self.data = Path(config.path), data
        if not root.is_dir():
            raise NotADirectoryError(f"{root}: no such folder")
        folders = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]
        step = config.stride or data.frames
        self.clips: list[tuple[Path, list[str], int]] = []
        for folder in folders:
            if any(folder.glob("frame-*.color.*")):
                names = list_rgbd_folder(folder)
                self.clips += [(folder, names, i) for i in range(0, len(names) - data.frames + 1, step)]

    def __len__(self) -> int:
        return len(self.clips)

    def name(self, index: int) -> str:
        folder, names, begin = self.clips[index]
        return f"{folder}/{names[begin].split('.')[0]}"

    def load(self, index: int) -> Clip:
        folder, _, begin = self.clips[index]
        found = load_rgbd_folder(folder, slice(begin, begin + self.data.frames))
        static = torch.ones_like(found.depth, dtype=torch.bool)
        for i, name in enumerate(found.names):
            path = folder / "static" / f"{name}.png"
            if path.exists():
                rows, columns = static.shape[1:]
                mask = _read_mask(path)
                top, left = (mask.shape[0] - rows) // 2, (mask.shape[1] - columns) // 2  # as the images are cropped
                if top < 0 or left < 0:
                    raise ValueError(f"{path}: must be of the size of the colour image, got {tuple(mask.shape)}")
                static[i] = mask[top : top + rows, left : left + columns]
        prompt = _read_prompt(folder / "prompt.txt")
        return make_clip(self.name(index), prompt, found.images, found.depth, static, found.cameras, self.data.size)


class _RealEstate:
    def __init__(self, config: SourceConfig, data: DataConfig) -> None:
        assert config.path is not None
        self.root, self.data = Path(config.path), data
        files = sorted((self.root / "cameras").glob("*.txt"))
        if not files:
            raise FileNotFoundError(f"{self.root}: expected cameras/CLIP.txt, found none")
        step = config.stride or data.frames
        self.clips: list[tuple[Path, int]] = []
        for path in files:
            count = sum(bool(line.strip()) for line in path.read_text(errors="replace").split("\n")[1:])
            self.clips += [(path, i) for i in range(0, count - data.frames + 1, step)]

    def __len__(self) -> int:
        return len(self.clips)

    def name(self, index: int) -> str:
        path, begin = self.clips[index]
        return f"{path}, frame {begin}"

    def load(self, index: int) -> Clip:
        path, begin = self.clips[index]
        lines = [line for line in path.read_text(encoding="utf-8").split("\n")[1:] if line.strip()]
        times = [line.split()[0] for line in lines[begin : begin + self.data.frames]]
        images, depths, masks = [], [], []
        for time in times:
            images.append(_read_colours(_first(self.root / "frames" / path.stem, time, (".jpg", ".png"))))
            depths.append(_read_depth(_first(self.root / "depth" / path.stem, time, (".npy", ".png"))))
            mask = self.root / "static" / path.stem / f"{time}.png"
            masks.append(_read_mask(mask) if mask.exists() else torch.ones(depths[-1].shape, dtype=torch.bool))
        for name, parts in (("frames", images), ("depth", depths), ("static", masks)):
            if len({part.shape for part in parts}) > 1:
                raise ValueError(f"{self.root / name / path.stem}: must be of one size, got several")
        frames, size = torch.stack(images), images[0].shape[1:]
        cameras = load_realestate10k(path, size)[begin : begin + self.data.frames]
        depth, static = (
            F.interpolate(torch.stack(parts)[:, None].float(), size, mode="nearest-exact")[:, 0]
            for parts in (depths, masks)
        )
        prompt = _read_prompt(self.root / "prompts" / f"{path.stem}.txt")
        return make_clip(self.name(index), prompt, frames, depth, static > 0, cameras, self.data.size)


class _Packed:
    """Files and shards; a clip is (file, offset, bytes, prompt's offset, its bytes), whole files have no offset."""

    def __init__(self, config: SourceConfig, data: DataConfig) -> None:
        assert config.path is not None
        root, self.data = Path(config.path), data
        if not root.exists():
            raise FileNotFoundError(f"{root}: no such file or folder")
        self.clips: list[tuple[Path, str, tuple[int, int] | None, tuple[int, int] | None]] = []
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            if path.suffix == ".safetensors":
                self.clips.append((path, path.stem, None, None))
            elif path.suffix == ".tar":
                self.clips += _index_shard(path)

    def __len__(self) -> int:
        return len(self.clips)

    def name(self, index: int) -> str:
        path, key, place, _ = self.clips[index]
        return str(path) if place is None else f"{path}, {key}"

    def load(self, index: int) -> Clip:
        path, _, place, words = self.clips[index]
        clip = load_clip(self.name(index), path.read_bytes() if place is None else _read_at(path, place))
        if len(clip.cameras) < latent_count(self.data.frames):
            expected, got = latent_count(self.data.frames), len(clip.cameras)
            raise ValueError(f"{clip.name}: must have {expected} latent frames or more for data.frames, got {got}")
        if words is None:
            return clip
        return replace(clip, prompt=_read_at(path, words).decode(errors="replace").strip())


def _index_shard(path: Path) -> list[tuple[Path, str, tuple[int, int] | None, tuple[int, int] | None]]:
    """Where the clips of a shard lie, grouped as WebDataset does: by the name up to its first dot."""
    parts: dict[str, dict[str, tuple[int, int]]] = {}
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


def _read_at(path: Path, place: tuple[int, int]) -> bytes:
    with path.open("rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def _first(folder: Path, stem: str, suffixes: Sequence[str]) -> Path:
    found = next((path for suffix in suffixes if (path := folder / f"{stem}{suffix}").exists()), None)
    if found is None:
        raise FileNotFoundError(f"{folder / stem}: expected a file ending in {' or '.join(suffixes)}, found none")
    return found


def _open_image(path: Path) -> Any:
    try:
        image = import_extra("PIL.Image", "train").open(path)
        image.load()
        return image
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: expected an image, got: {error}") from None


def _read_colours(path: Path) -> Tensor:
    """(3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(_open_image(path).convert("RGB"))).permute(2, 0, 1).float() / 255.0


def _read_depth(path: Path) -> Tensor:
    """(H, W) float32; 0 where unknown."""
    if path.suffix == ".npy":
        values = np.load(path, allow_pickle=False)
        unit = 1.0
    else:
        values, unit = np.array(_open_image(path)), 1000.0
        values = np.where(values == 65535, 0, values)
    if values.ndim != 2 or values.dtype.kind not in "uif" or values.dtype == np.uint8:
        raise ValueError(f"{path}: expected (H, W) metres, or 16-bit millimetres, got {values.shape} {values.dtype}")
    depth = torch.from_numpy(values.astype(np.float32)) / unit
    return torch.where(depth.isfinite() & (depth > 0), depth, 0.0)


def _read_mask(path: Path) -> Tensor:
    return torch.from_numpy(np.array(_open_image(path).convert("L"))) > 0


def _read_prompt(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def list_broken(broken: dict[str, str]) -> str:
    """The first five of broken clips and their reasons, in words."""
    listed = [reason if name in reason else f"{name}: {reason}" for name, reason in broken.items()]
    return "; ".join(listed[:5]) + (f"; and {len(listed) - 5} more" if len(listed) > 5 else "")

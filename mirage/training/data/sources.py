"""Where clips come from: synthetic rooms, RGB-D folders, RealEstate10K with depth, packed clips.

Layouts on disk:

- "rgbd": a folder in the layout of 7-Scenes (:func:`~mirage.scenes.rgbd.load_rgbd_folder`), or a folder of such
  folders. A `static/frame-000000.png` beside a frame marks by non-zero pixels what is static, `prompt.txt` says what
  there is.
- "realestate10k": `cameras/CLIP.txt` in RealEstate10K's own format, and for each of its lines
  `frames/CLIP/TIMESTAMP.jpg` (.jpeg, .png, .webp) and `depth/CLIP/TIMESTAMP.png` (16 bits, millimetres), `.npy`
  (metres) or another file that :func:`~mirage.files.depth.read_depth` reads; if there, `static/CLIP/TIMESTAMP.png`
  (non-zero: static) and `prompts/CLIP.txt`. Depth and masks may be of another size than the frames, of their aspect.
- "packed": `CLIP.safetensors` of :func:`~mirage.training.data.save_clip`, in a folder or in tar shards as WebDataset
  has them, where a `CLIP.txt` beside it is the prompt. Shards must be plain .tar: clips are read where they lie, so
  that a run can resume at any of them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ...files.depth import DEPTH_SUFFIXES
from ...files.framing import have_one_aspect
from ...files.images import read_image, read_mask, to_tensor
from ...scenes.camera_files import load_realestate10k
from ...scenes.rgbd import list_rgbd_folder, load_rgbd_folder
from ...scenes.synthetic import SyntheticRoom
from ..config import DataConfig, SourceConfig
from .clips import TOKEN_PIXELS, Clip, make_clip
from .images import find_file, read_metres, read_prompt
from .shards import PackedSource


class Source(Protocol):
    """Clips by index; :meth:`load` raises OSError or ValueError for a broken one."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def load(self, index: int) -> Clip: ...


def make_source(config: SourceConfig, data: DataConfig) -> Source:
    """Make the source that a configuration asks for.

    Raises:
        OSError, ValueError: it is not there, or holds nothing.
    """
    kinds: dict[str, Any] = {
        "synthetic": SyntheticSource,
        "rgbd": RGBDSource,
        "realestate10k": RealEstateSource,
        "packed": PackedSource,
    }
    source: Source = kinds[config.kind](config, data)
    if not len(source):
        raise ValueError(f"{config.path}: expected clips of {data.frames} frames of kind {config.kind!r}, found none")
    return source


class SyntheticSource:
    """Clips of synthetic rooms, one each, made when they are loaded."""

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


class RGBDSource:
    """Clips of RGB-D frames in folders as 7-Scenes has them."""

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
                mask = torch.from_numpy(read_mask(path))
                above, beside = mask.shape[0] - rows, mask.shape[1] - columns  # which the images are cropped by
                top, left = above // 2, beside // 2
                if not (0 <= above < TOKEN_PIXELS and 0 <= beside < TOKEN_PIXELS):
                    raise ValueError(f"{path}: must be of the size of the colour image, got {tuple(mask.shape)}")
                static[i] = mask[top : top + rows, left : left + columns]
        prompt = read_prompt(folder / "prompt.txt")
        return make_clip(self.name(index), prompt, found.images, found.depth, static, found.cameras, self.data.size)


class RealEstateSource:
    """Clips of RealEstate10K, with depth."""

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
            frame = find_file(self.root / "frames" / path.stem, time, (".jpg", ".jpeg", ".png", ".webp"))
            images.append(to_tensor(read_image(frame)))
            depths.append(read_metres(find_file(self.root / "depth" / path.stem, time, (".npy", *DEPTH_SUFFIXES))))
            mask = self.root / "static" / path.stem / f"{time}.png"
            every = torch.ones(depths[-1].shape, dtype=torch.bool)
            masks.append(torch.from_numpy(read_mask(mask)) if mask.exists() else every)
        for name, parts in (("frames", images), ("depth", depths), ("static", masks)):
            if len({part.shape for part in parts}) > 1:
                raise ValueError(f"{self.root / name / path.stem}: must be of one size, got several")
            got, expected = parts[0].shape[-2:], images[0].shape[-2:]
            if not have_one_aspect(got, expected):
                sizes = f"{expected[0]}x{expected[1]}, got {got[0]}x{got[1]}"
                raise ValueError(f"{self.root / name / path.stem}: must have the aspect of the frames, {sizes}")
        frames, size = torch.stack(images), images[0].shape[1:]
        cameras = load_realestate10k(path, size)[begin : begin + self.data.frames]
        depth, static = (
            F.interpolate(torch.stack(parts)[:, None].float(), size, mode="nearest-exact")[:, 0]
            for parts in (depths, masks)
        )
        prompt = read_prompt(self.root / "prompts" / f"{path.stem}.txt")
        return make_clip(self.name(index), prompt, frames, depth, static > 0, cameras, self.data.size)

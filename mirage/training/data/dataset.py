"""All clips of a run, in an order that a number tells.

The number k of a clip in a run says which it is: epochs are shuffled by the seed and the epoch alone. So a resumed run
sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Dataset

from ..config import DataConfig
from ..seeds import derive_seed
from .clips import Clip
from .sources import Source, make_source


@dataclass(frozen=True)
class Sample:
    """Clip number `number` of a run, and what was broken on the way to it, {name: reason}."""

    number: int
    clip: Clip
    broken: dict[str, str]


class ClipDataset(Dataset):
    """All clips of a run, shuffled again in every epoch.

    Args:
        config: what to load.
        seed: of the order.

    Raises:
        OSError, ValueError: a source is not there, or holds nothing.
    """

    def __init__(self, config: DataConfig, seed: int = 0) -> None:
        self.sources = [make_source(source, config) for source in config.sources]
        self.where = [(s, i) for s, source in enumerate(self.sources) for i in range(len(source))]
        self.seed = seed
        self._kept: dict[tuple[int, int], Clip] | None = {} if config.cache else None
        self._epoch: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, number: int) -> Sample:
        """Return the clip of a number >= 0, or the next one that is not broken.

        Raises:
            ValueError: all of them are broken.
        """
        broken: dict[str, str] = {}
        for shift in range(len(self)):
            source, index = self.where[self._position(number, shift)]
            try:
                return Sample(number, self._load(source, index), broken)
            except (OSError, ValueError) as error:
                broken[self.sources[source].name(index)] = str(error)
        raise ValueError(f"all {len(self)} clips are broken: {list_broken(broken)}")

    def _load(self, source: int, index: int) -> Clip:
        if self._kept is None:
            return load_clip_of(self.sources[source], index)
        if (source, index) not in self._kept:
            clip = load_clip_of(self.sources[source], index)
            small = None if clip.frames is None else (clip.frames * 255.0).round().byte()
            self._kept[source, index] = replace(clip, frames=small)
        kept = self._kept[source, index]
        return kept if kept.frames is None else replace(kept, frames=kept.frames / 255.0)

    def _position(self, number: int, shift: int) -> int:
        epoch, place = divmod(number, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
            self._epoch = epoch, torch.randperm(len(self), generator=generator).tolist()
        return self._epoch[1][(place + shift) % len(self)]


def load_clip_of(source: Source, index: int) -> Clip:
    """Load a clip, whose files may hold anything.

    Raises:
        OSError, ValueError: the clip is broken, whatever the libraries that read it raise.
    """
    try:
        return source.load(index)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{source.name(index)}: cannot be read ({type(error).__name__}: {error})") from error


class BatchSampler:
    """Give one process the numbers of its clips, a batch at a time.

    Args:
        first, last: passes, from 0 in a run; `last` is not taken.
        batch_size: clips of a pass and process.
        rank, world: which process of how many.
    """

    def __init__(self, first: int, last: int, batch_size: int, rank: int, world: int) -> None:
        self.passes, self.batch_size, self.rank, self.world = range(first, last), batch_size, rank, world

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.passes:
            begin = (number * self.world + self.rank) * self.batch_size
            yield list(range(begin, begin + self.batch_size))


def list_broken(broken: dict[str, str]) -> str:
    """List the first five of broken clips and their reasons, in words."""
    listed = [reason if name in reason else f"{name}: {reason}" for name, reason in broken.items()]
    return "; ".join(listed[:5]) + (f"; and {len(listed) - 5} more" if len(listed) > 5 else "")

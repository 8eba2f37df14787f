"""`CacheMark`: a state of a cache to go back to."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .anchor import Anchor
from .buffers import TokenBuffers
from .config import CacheConfig
from .offload import Offloaded


class CacheMark(NamedTuple):
    """Mark a state to go back to, as :meth:`LatentCache.checkpoint` returns it."""

    tokens: int
    frames: int
    held: tuple[dict[str, Tensor], Offloaded | None] | None
    """Copies of what a write may change in place, and what was offloaded; None where it only appends."""
    anchor: Anchor | None = None

    def fits(self, buffers: TokenBuffers, config: CacheConfig, tokens: int) -> bool:
        """Return whether a cache that holds so many tokens may have been marked like this, and not cleared since."""
        if self.frames > buffers.num_frames:
            return False
        if self.held is None:
            return self.tokens <= tokens
        capacity = self.tokens if config.capacity is None else config.capacity
        return self.held[0].keys() == buffers.tensors().keys() and self.tokens <= capacity

    def restore(self, buffers: TokenBuffers, config: CacheConfig, offloaded: Offloaded | None) -> Offloaded | None:
        """Put the tokens back of a mark that fits; `offloaded` is what is off the device now. Returns what is then."""
        if self.held is None:
            live = self.tokens - (offloaded.tokens if offloaded is not None else 0)
        else:
            copies, offloaded = self.held
            live = len(copies["points"])
            if config.capacity is not None:
                buffers.resize_empty(config.capacity - (self.tokens - live))
            elif live > buffers.rows:
                buffers.resize_empty(live)
            for name, tensor in buffers.tensors().items():
                tensor[:live] = copies[name]
        buffers.set_live(live)
        buffers.num_frames = self.frames
        buffers.settle(self.anchor)
        return offloaded

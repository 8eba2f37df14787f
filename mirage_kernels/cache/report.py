"""`WriteReport`: what became of the tokens of one write."""

from __future__ import annotations

import torch
from torch import Tensor

from ..constants import WRITE_REPORT


class WriteReport:
    """Count what became of the T x h x w tokens of one write; each is counted once.

    ``written``; ``replaced`` (took the place of an older one), ``merged`` (averaged with it) or ``covered`` (it shows
    as much already, and stays); ``refused`` (its voxel is full, or a fixed capacity is); ``masked`` (not static);
    ``unknown_depth``; ``out_of_range`` (outside [min_depth, max_depth]); ``non_finite`` (NaN or Inf in position or
    latents). And of the tokens held before: ``carved`` (seen through) and ``evicted`` (too many).

    The counts stay on the device until one of them is read. That waits for the device and brings all of them at once;
    what is read later waits no more.
    """

    __slots__ = ("_captured", "_values", "counts")

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts
        """(11,) int64 on the cache's device, in the order of the properties."""
        self._values: list[int] | None = None
        # Every replay of a CUDA graph writes these counts again: they are not kept.
        self._captured = counts.is_cuda and torch.cuda.is_current_stream_capturing()

    def _read(self) -> list[int]:
        if self._values is not None:
            return self._values
        values: list[int] = self.counts.tolist()
        if not self._captured:
            self._values = values
        return values

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return dict(zip(WRITE_REPORT, self._read(), strict=True))

    @property
    def written(self) -> int:
        return self._read()[0]

    @property
    def replaced(self) -> int:
        return self._read()[1]

    @property
    def merged(self) -> int:
        return self._read()[2]

    @property
    def covered(self) -> int:
        return self._read()[3]

    @property
    def refused(self) -> int:
        return self._read()[4]

    @property
    def masked(self) -> int:
        return self._read()[5]

    @property
    def unknown_depth(self) -> int:
        return self._read()[6]

    @property
    def out_of_range(self) -> int:
        return self._read()[7]

    @property
    def non_finite(self) -> int:
        return self._read()[8]

    @property
    def carved(self) -> int:
        return self._read()[9]

    @property
    def evicted(self) -> int:
        return self._read()[10]

    def __repr__(self) -> str:
        return f"WriteReport({', '.join(f'{name}={count}' for name, count in self.as_dict().items())})"

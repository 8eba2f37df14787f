"""`CacheConfig`: the arguments of a cache, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..constants import CARVE_VIEWS, INVALID, MAX_VIEWS_PER_VOXEL, VIEWS_PER_VOXEL
from ..ops.checks import FEATURE_DTYPES, STORED_DTYPES, check_count, check_near
from .anchor import Anchor

WRITE_POLICIES = ("bounded", "append")
MERGES = ("keep", "mean")
READOUT_DTYPES = (torch.float64, *FEATURE_DTYPES)  # that a read may be asked for


@dataclass(frozen=True)
class CacheConfig:
    """Hold the arguments of a :class:`~mirage_kernels.LatentCache`, which says what they mean; all but the device.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    channels: int
    dtype: torch.dtype = torch.float32
    write_policy: str = "bounded"
    capacity: int | None = None
    views_per_voxel: int = VIEWS_PER_VOXEL
    merge: str = "keep"
    carve: bool = True
    carve_views: int = CARVE_VIEWS
    max_tokens: int | None = None
    voxel_size: float | None = None
    near: float | None = None
    origin: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        channels, capacity = self.channels, self.capacity
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 0:
            raise ValueError(f"channels must be an int >= 0, got {channels!r}")
        if self.dtype not in STORED_DTYPES:
            raise TypeError(f"dtype must be float32, float16, bfloat16 or float8_e4m3fn, got {self.dtype}")
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0):
            raise ValueError(f"capacity must be None or an int >= 0, got {capacity!r}")
        if self.write_policy not in WRITE_POLICIES:
            raise ValueError(f"write_policy must be one of {', '.join(WRITE_POLICIES)}, got {self.write_policy!r}")
        check_count("views_per_voxel", self.views_per_voxel, 1, MAX_VIEWS_PER_VOXEL)
        check_count("carve_views", self.carve_views, 1, INVALID - 1)
        if self.merge not in MERGES:
            raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {self.merge!r}")
        if not isinstance(self.carve, bool):
            raise TypeError(f"carve must be a bool, got {self.carve!r}")
        if self.max_tokens is not None:
            check_count("max_tokens", self.max_tokens, 0, 2**62)
        edge = self.voxel_size
        number = isinstance(edge, (int, float)) and not isinstance(edge, bool)
        if edge is not None and not (number and 0 < edge < math.inf):
            raise ValueError(f"voxel_size must be None or a finite length > 0 in world units, got {edge!r}")
        if self.near is not None:
            check_near(self.near)
        if self.origin is not None:
            object.__setattr__(self, "origin", _as_origin(self.origin))

    @property
    def anchor(self) -> Anchor | None:
        """The anchor that is given, if all of it is."""
        return None if self.near is None or self.origin is None else Anchor(self.near, self.origin)

    @property
    def bounded(self) -> bool:
        """Whether writes are bounded."""
        return self.write_policy == "bounded"

    @property
    def changes_in_place(self) -> bool:
        """Whether writes change tokens held before, or remove some."""
        return self.bounded or self.max_tokens is not None

    @property
    def dtype_name(self) -> str:
        """The dtype without its package."""
        return str(self.dtype).removeprefix("torch.")

    def as_dict(self) -> dict[str, Any]:
        """Return the arguments by name, in plain types, as a saved file keeps them."""
        arguments = {**self.__dict__, "dtype": self.dtype_name}
        if self.voxel_size is None:  # as in files from before there was one
            del arguments["voxel_size"]
        return arguments


def _as_origin(value: Any) -> tuple[float, float, float]:
    sides = tuple(value) if isinstance(value, (tuple, list)) else ()
    numbers = all(isinstance(side, (int, float)) and not isinstance(side, bool) for side in sides)
    if len(sides) != 3 or not numbers or not all(abs(side) < math.inf for side in sides):
        raise ValueError(f"origin must be None or three finite world coordinates, got {value!r}")
    x, y, z = map(float, sides)
    return x, y, z

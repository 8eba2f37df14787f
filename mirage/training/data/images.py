"""Read the files of one frame: depth, and a clip's prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...files.depth import MILLIMETRES, read_depth


def find_file(folder: Path, stem: str, suffixes: Sequence[str]) -> Path:
    """Return the file of this stem with the first of the suffixes that there is.

    Raises:
        FileNotFoundError: there is none.
    """
    found = next((path for suffix in suffixes if (path := folder / f"{stem}{suffix}").exists()), None)
    if found is None:
        raise FileNotFoundError(f"{folder / stem}: expected a file ending in {' or '.join(suffixes)}, found none")
    return found


def read_metres(path: Path) -> Tensor:
    """Read depth of one frame, metres in floats or millimetres in integers: (H, W) float32 in metres, 0 where unknown.

    Raises:
        OSError, ValueError: it is no such depth, see :func:`~mirage.files.depth.read_depth`.
    """
    values = read_depth(path, integer_scale=MILLIMETRES)
    if values.ndim != 2:
        raise ValueError(f"{path}: expected (H, W) metres, or 16-bit millimetres, got {values.shape}")
    depth = torch.tensor(values)
    return torch.where(depth.isfinite() & (depth > 0), depth, 0.0)


def read_prompt(path: Path) -> str:
    """Read a prompt, empty without a file."""
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""

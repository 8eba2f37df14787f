"""Read the files of one frame: colour, depth, mask; and a clip's prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...optional import import_extra


def find_file(folder: Path, stem: str, suffixes: Sequence[str]) -> Path:
    """Return the file of this stem with the first of the suffixes that there is.

    Raises:
        FileNotFoundError: there is none.
    """
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


def read_frame(path: Path) -> Tensor:
    """Read a colour image: (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(_open_image(path).convert("RGB"))).permute(2, 0, 1).float() / 255.0


def read_depth(path: Path) -> Tensor:
    """Read depth: (H, W) float32 in metres, 0 where unknown.

    Raises:
        ValueError: neither metres in a .npy file nor 16-bit millimetres.
    """
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


def read_mask(path: Path) -> Tensor:
    """Read a mask: (H, W) bool, True where the image is not zero."""
    return torch.from_numpy(np.array(_open_image(path).convert("L"))) > 0


def read_prompt(path: Path) -> str:
    """Read a prompt, empty without a file."""
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""

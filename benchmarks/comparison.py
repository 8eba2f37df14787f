"""Format the comparison that a run ends with: latent memory, reference algorithm and pixel memory side by side."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from .report import NOT_MEASURED, Row, bytes_text, ratio_text, seconds_text
from .scenes import CHUNK_FRAMES, Size

ENCODER_NEEDS = "the VAE encoder needs diffusers: pip install 'mirage-world[bench]'"

_SIDES = ("latent", "reference", "pixel, PyTorch", "pixel, kernels")
_GPU = ", eager, warm"  # which of a GPU's times are compared
_WIDTHS = (28, 10, 18, 20, 20)

# What is compared: its group, and the row's name and the variant's beginning of each side that has one.
_TIMES = (
    (
        "read one chunk, nearest",
        "read",
        (
            ("9 latent views", "latent, bf16"),
            ("9 latent views", "reference"),
            (f"{CHUNK_FRAMES} images", "pixel, plain"),
            (f"{CHUNK_FRAMES} images", "pixel, kernels nearest"),
        ),
    ),
    ("read one chunk, aligned", "read", (("9 latent views", "latent, bf16, aligned"),)),
    (
        "write 8 frames",
        "write",
        (
            ("8 frames", "latent, bf16"),
            ("8 frames", "reference"),
            ("8 frames", "pixel, plain"),
            ("8 frames", "pixel, kernels"),
        ),
    ),
    (
        "condition one chunk",
        "condition",
        (
            ("one chunk", "latent, bf16, no reference frames"),
            ("one chunk", "reference, no reference frames"),
            ("one chunk", "pixel, plain, encoder"),
            ("one chunk", "pixel, kernels nearest, encoder"),
        ),
    ),
)
_BYTES = (
    (
        "bytes held",
        (("held", "latent, bf16"), ("held", "reference"), ("held", "pixel, plain"), ("held", "pixel, kernels")),
    ),
    (
        "bytes that a read takes",
        (
            ("peak of one chunk's read", "latent, bf16"),
            ("peak of one chunk's read", "reference"),
            ("peak of one chunk's images", "pixel, plain"),
            ("peak of one chunk's images", "pixel, kernels nearest"),
        ),
    ),
)
_FRACTIONS = ("cells wrong", "cells that change")


def compare(rows: Sequence[Row]) -> list[str]:
    """Format a line for each thing compared, size by size; ratios are against the latent memory.

    Pixels are those of the fastest rasteriser of each kind. Where only some of a chunk's images were encoded, that time
    stands alone: the least that a pixel memory adds to its read.
    """
    lines = []
    for size in dict.fromkeys(row["size"] for row in rows if Size.parse(row["size"]) == _whole(row["size"])):
        here = [row for row in rows if row["size"] == size]
        table = _lines(here)
        if table:
            lines += [_line([f"{size}, {_whole(size).tokens:,} tokens"[:60]]), _line(["", *_SIDES]), *table, ""]
    if lines and not any(row["name"].startswith("encoding") for row in rows):
        why = ENCODER_NEEDS if importlib.util.find_spec("diffusers") is None else f"encoding: {NOT_MEASURED}"
        lines.append(why)
    return lines


def _whole(label: str) -> Any:
    """Parse a label that is a size and nothing more, or return a size that equals none."""
    size = Size.parse(label)
    return size if size is not None and size.label == label else Size(0, 0, 0)


def _lines(rows: list[Row]) -> list[str]:
    lines = []
    for what, group, sides in _TIMES:
        cells = _against([_find(rows, group, name, variant, "median_s") for name, variant in sides], seconds_text)
        lines += [_line([what, *cells])] if any(cells) else []
    for row in rows:
        if row["name"].startswith("encoding") and row["median_s"] is not None:
            images = row["name"].removeprefix("encoding ").replace("alone", f"{CHUNK_FRAMES} images")
            seconds = seconds_text(row["median_s"])
            lines.append(_line([f"encode {images}", "none", "none", seconds, seconds]))
    for what, held in _BYTES:
        cells = _against([_find(rows, "memory", name, variant, "bytes") for name, variant in held], bytes_text)
        lines += [_line([what, *cells])] if any(cells) else []
    for what in _FRACTIONS:
        wrong = _find(rows, "read", what, "reference", "value")
        latent = _find(rows, "read", what, "latent, f32", "value")
        if wrong is not None:
            lines.append(_line([what, f"{100 * (latent or 0):.1f} %", f"{100 * wrong:.1f} %"]))
    return lines


def _find(rows: list[Row], group: str, name: str, variant: str, key: str) -> float | None:
    """Return the value of the row of this variant, whatever its encoder, of eager and warm times on a GPU."""
    for row in rows:
        if (row["group"], row["name"]) == (group, name) and row.get(key) is not None:
            found = row["variant"].removesuffix(_GPU)
            if found == variant or (variant.endswith("encoder") and found.startswith(variant)):
                value: float = row[key]
                return value
    return None


def _against(values: list[float | None], text: Any) -> list[str]:
    """Format values, each with its ratio to the first."""
    first = values[0]
    cells = ["" if first is None else text(first)]
    for value in values[1:]:
        ratio = "" if first is None or value is None else f", {ratio_text(value / first)}"
        cells.append("" if value is None else f"{text(value)}{ratio}")
    return cells


def _line(cells: list[str]) -> str:
    head, *rest = cells
    return (head.ljust(_WIDTHS[0]) + "".join(c.rjust(w) for c, w in zip(rest, _WIDTHS[1:], strict=False))).rstrip()

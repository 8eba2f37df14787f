"""Write ``csrc/core/constants.h`` from ``mirage_kernels/constants.py``: ``python csrc/generate_constants.py``.

A number that decides results has one source, the Python file. Numbers that only decide how fast a C++ or CUDA kernel is
(tiles, threads) stand beside that kernel and are not generated. ``tests/kernels/test_constants.py`` runs this again and
compares.
"""

from __future__ import annotations

import runpy
import struct
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "mirage_kernels" / "constants.py"
HEADER = ROOT / "csrc" / "core" / "constants.h"

# Python name: C++ type. `bits` is the pattern of a float32, which kernels compare as an integer.
TYPES = {
    "BLOCK_TOKENS": "int",
    "TILE_BLOCKS": "int",
    "CULL_SLACK": "double",
    "CULL_TINY": "double",
    "CULL_FAR": "float",
    "VOXEL_LIMIT": "float",
    "BLEND_TOKENS": "int",
    "TOKEN_REACH": "float",
    "MAX_FOOTPRINT_CELLS": "float",
    "MAX_FOOTPRINT_RATIO": "float",
    "DEPTH_TOLERANCE": "float",
    "DIRECTION_WEIGHT": "float",
    "HOLE_REACH_CELLS": "int",
    "COVERAGE_THRESHOLD": "float",
    "COVERAGE_BIAS": "float",
    "DUPLICATE_THRESHOLD": "float",
    "RESOLUTION_GAIN": "float",
    "CARVE_TOLERANCE": "float",
    "MAX_OBSERVATIONS": "int",
    "INVALID": "uint8_t",
    "MIN_SCALE": "int",
    "MAX_SCALE": "int",
    "MAX_QUANTIZED": "bits",
}


def camel(name: str) -> str:
    """Return the C++ name of a constant: ``kBlockTokens`` of ``BLOCK_TOKENS``."""
    return "k" + "".join(part.capitalize() for part in name.split("_"))


def literal(value: float, kind: str) -> str:
    """Return a value as a C++ literal of its type; decimals are those of Python, so both round them alike."""
    if kind == "double":
        return repr(float(value))
    if kind == "float":
        return f"{float(value)!r}f"
    if kind == "bits":
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        return f"0x{bits:08x}u"
    if value != int(value):
        raise ValueError(f"{value} is no integer.")
    return str(int(value))


def render(constants: dict[str, Any]) -> str:
    """Return the header, from the names of ``mirage_kernels.constants``."""
    lines = [
        "// Numbers that decide results, generated from mirage_kernels/constants.py by csrc/generate_constants.py.",
        "// The Python file says what each of them is: change them there.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        "namespace mirage {",
        "",
    ]
    for name, kind in TYPES.items():
        suffix, declared = ("Bits", "uint32_t") if kind == "bits" else ("", kind)
        lines.append(f"constexpr {declared} {camel(name)}{suffix} = {literal(constants[name], kind)};")
    report, append = constants["WRITE_REPORT"], constants["APPEND_REPORT"]
    lines += ["", "// Places in the report of bounded_write.", "enum WriteReport {"]
    lines += [f"  {camel('REPORT_' + name.upper())}," for name in report]
    lines += ["};", f"constexpr int kReportSize = {len(report)};"]
    lines += ["", "// What becomes of a token. A rejected one is counted in this place of cache_write's report."]
    lines += ["enum TokenStatus : uint8_t {"]
    for status in constants["TokenStatus"]:
        place = append.index(status.name.lower()) if status.name.lower() in append else 0
        lines.append(f"  {camel(status.name)} = {place},")
    lines += ["};", f"constexpr int kAppendReportSize = {len(append)};", "", "}  // namespace mirage", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    HEADER.write_text(render(runpy.run_path(str(SOURCE))))

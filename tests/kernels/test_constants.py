"""Numbers that decide results are the same in C++ and in Python."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from mirage_kernels import constants

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "csrc" / "generate_constants.py"


@pytest.fixture(scope="module")
def generator() -> dict[str, Any]:
    if not SCRIPT.exists():
        pytest.skip(f"no sources here: {SCRIPT} is missing")
    return runpy.run_path(str(SCRIPT))


def test_the_header_is_what_the_script_generates(generator: dict[str, Any]) -> None:
    assert generator["HEADER"].read_text() == generator["render"](vars(constants)), (
        "run `python csrc/generate_constants.py`"
    )


def test_no_other_file_defines_a_generated_constant(generator: dict[str, Any]) -> None:
    names = re.findall(r"constexpr \w+ (k\w+) = ", generator["HEADER"].read_text())
    assert len(names) == len(generator["TYPES"]) + 2  # and the sizes of the two reports
    defined = re.compile(rf"constexpr [\w ]+ (?:\w+ = [^;,]+, )*({'|'.join(names)}) =")
    for path in sorted((ROOT / "csrc").glob("*/*")):
        if path != generator["HEADER"]:
            assert not defined.findall(path.read_text()), path


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (4, "int", "4"),
        (2**20, "float", "1048576.0f"),
        (0.1, "float", "0.1f"),
        (1e-25, "double", "1e-25"),
        (448.0 * 2.0**119, "bits", "0x7f600000u"),
    ],
)
def test_literals(generator: dict[str, Any], value: float, kind: str, text: str) -> None:
    assert generator["literal"](value, kind) == text


def test_a_fraction_is_no_integer(generator: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=re.escape("0.5 is no integer.")):
        generator["literal"](0.5, "int")

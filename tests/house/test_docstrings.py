"""Docstrings of functions begin with a verb, and nothing is said in words that the field does not use."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for package in ("mirage", "mirage_kernels") for path in (ROOT / package).rglob("*.py"))

# First words that are no verbs in the imperative; a noun or a number that opens a docstring is caught by its shape.
NOT_VERBS = [
    "a",
    "all",
    "an",
    "and",
    "any",
    "as",
    "at",
    "both",
    "by",
    "cameras",
    "depth",
    "each",
    "every",
    "features",
    "figures",
    "for",
    "frames",
    "from",
    "how",
    "images",
    "in",
    "it",
    "its",
    "latents",
    "least",
    "lines",
    "many",
    "most",
    "names",
    "of",
    "on",
    "one",
    "only",
    "pixels",
    "points",
    "see",
    "shapes",
    "some",
    "such",
    "that",
    "the",
    "their",
    "these",
    "this",
    "those",
    "to",
    "tokens",
    "two",
    "values",
    "views",
    "what",
    "when",
    "where",
    "whether",
    "which",
    "with",
    "without",
]

PRIVATE_WORDS = (
    r"\bread-out\b|\bread out of\b|\bverdict|\bjudge|\bticket\b|\bwishes\b|\banew\b|\bbut for\b|\bgoes on\b|\bgo on\b"
    r"|\bwhole or not at all\b|\bfilmed\b|\bfilms\b|\blooks? averaged\b|\bof no account\b|\bpicture"
)

# A key of random numbers, and the text of an error, stay as they are.
KEPT = r"derive_seed\(|must be None but for float8"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb(path: Path) -> None:
    wrong = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if any(name.endswith(("property", ".setter")) for name in decorators):
            continue
        docstring = ast.get_docstring(node)
        if docstring:
            first = docstring.split()[0]
            if not re.fullmatch(r"[A-Z][a-z]+(-[a-z]+)?[,:;.]?", first) or first.strip(",:;.").lower() in NOT_VERBS:
                wrong.append(f"{path.name}:{node.lineno} {node.name}: {docstring.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_fields_words(path: Path) -> None:
    found = [
        f"{path.name}:{number} {line.strip()}"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(PRIVATE_WORDS, line, re.IGNORECASE) and not re.search(KEPT, line)
    ]
    assert not found, "\n".join(found)

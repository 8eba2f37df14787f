"""How values are written on the command line: a size as HxW, seeds as FIRST:STOP, names joined by commas."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo


def parse_size(text: str) -> tuple[int, int]:
    """Parse HxW."""
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError:
        raise ValueError(f"must be HEIGHTxWIDTH such as 704x1280, got {text!r}") from None
    return height, width


def parse_seeds(text: str) -> range:
    """Parse FIRST:STOP."""
    try:
        first, stop = map(int, text.split(":"))
    except ValueError:
        raise ValueError(f"must be FIRST:STOP such as 10000:10032, got {text!r}") from None
    return range(first, stop)


def parse_names(text: str) -> tuple[str, ...]:
    """Parse NAME,NAME."""
    return tuple(name.strip() for name in text.split(","))


def parse_folder(text: str) -> dict[str, Path]:
    """Parse NAME=DIR."""
    name, equals, folder = text.partition("=")
    if not equals or not folder:
        raise ValueError(f"must be NAME=DIR, got {text!r}")
    return {name: Path(folder)}


REGISTRY = ConstructorRegistry()
"""Rules of these kinds of values, for `tyro.cli`."""


@REGISTRY.primitive_rule
def _rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    kind = typing.get_origin(info.type) or info.type, typing.get_args(info.type)
    if kind == (tuple, (int, int)):
        return _spec("HxW", parse_size, lambda size: f"{size[0]}x{size[1]}", tuple)
    if kind == (range, ()):
        return _spec("FIRST:STOP", parse_seeds, lambda seeds: f"{seeds.start}:{seeds.stop}", range)
    if kind == (tuple, (str, ...)):
        return _spec("NAME,..", parse_names, ",".join, tuple)
    if kind == (dict, (str, Path)):
        spec = _spec("NAME=DIR", parse_folder, lambda folders: " ".join(map(str, folders)), dict)
        return replace(spec, _action="append")  # may come several times
    return None


def _spec(
    metavar: str, parse: Callable[[str], Any], show: Callable[[Any], str], kind: type
) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda texts: parse(texts[0]),
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [show(value)],
    )

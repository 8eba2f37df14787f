"""Public names and signatures, against a snapshot: a change of the interface is a decision, not an accident.

After a deliberate change: ``python tests/house/test_public_names.py`` writes the snapshot again.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

SNAPSHOT = Path(__file__).with_name("public_names.txt")
MODULES = (
    "mirage_kernels",
    "mirage_kernels.compat",
    "mirage",
    "mirage.scenes.trajectories",
    "mirage.scenes.camera_files",
    "mirage.scenes.synthetic",
    "mirage.perception.depth",
    "mirage.perception.static_filter",
    "mirage.zoo",
)


def signature(value: Any) -> str:
    try:
        text = str(inspect.signature(value)).replace(str(SNAPSHOT.parents[2]), "")
        return re.sub(r" at 0x[0-9a-f]+", "", text)
    except (TypeError, ValueError):
        return ""


def names_of(module: Any) -> list[str]:
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__]
    return sorted(name for name in own if not name.startswith("_"))


def describe() -> str:
    lines = []
    for name in MODULES:
        module = importlib.import_module(name)
        for public in names_of(module):
            value = getattr(module, public)
            lines.append(f"{name}.{public}{signature(value) if callable(value) else ''}")
            if inspect.isclass(value):
                for member, inner in sorted(vars(value).items()):
                    if member.startswith("_"):
                        continue
                    inner = getattr(inner, "__func__", inner)
                    kind = " (property)" if isinstance(inner, property) else ""
                    lines.append(f"    {member}{kind or (signature(inner) if callable(inner) else '')}")
    return "\n".join(lines) + "\n"


def test_public_names_are_those_of_the_snapshot() -> None:
    assert describe() == SNAPSHOT.read_text(encoding="utf-8")


if __name__ == "__main__":
    SNAPSHOT.write_text(describe(), encoding="utf-8")

"""Who may import whom: one way, without circles, and nothing private of another module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import mirage_kernels

ROOT = Path(__file__).parents[2]

# A module may import from the layers before its own, and from its own top-level name.
LAYERS = {
    "mirage_kernels": (
        ("version", "constants", "environment"),
        ("geometry", "quantization", "io", "cameras", "backends"),
        ("ops",),
        ("cache",),
        ("compat",),
    ),
    "mirage": (
        ("optional", "media"),
        ("files",),
        ("models", "scenes", "perception"),
        ("pipeline",),
        ("zoo",),
        ("evaluation",),
        ("training",),
        ("commands",),
    ),
}
# What a file holds, and which backend ran, is what these two are there to say.
REPORTS = {
    ("mirage.commands.info", "mirage_kernels.cache.storage"),
    ("mirage.commands.demo.memory", "mirage_kernels.backends"),
}
FREE = {"__init__", "__main__"}  # a package's front door, which may import anything of it


class Import(NamedTuple):
    module: str  # which imports
    target: str  # a module, or a package
    name: str | None  # of it; None for `import target`
    line: int


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {package: modules(package) for package in LAYERS}
ALL = {name: path for package in MODULES.values() for name, path in package.items()}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs, imports inside functions included, those for type checkers excluded."""
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield child
            yield from statements(child)


def imports_of(module: str) -> Iterator[Import]:
    path = ALL[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, None, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                inner = f"{target}.{alias.name}"
                yield (
                    Import(module, inner, None, node.lineno)
                    if inner in ALL
                    else Import(module, target, alias.name, node.lineno)
                )


IMPORTS = [one for module in ALL for one in imports_of(module) if one.target.split(".")[0] in LAYERS]


def place(one: Import) -> str:
    return f"{ALL[one.module].relative_to(ROOT)}:{one.line}: {one.target}{f'.{one.name}' if one.name else ''}"


def layer_of(module: str) -> int | None:
    package, _, rest = module.partition(".")
    top = rest.split(".")[0]
    return next((i for i, names in enumerate(LAYERS[package]) if top in names), None)


def test_every_module_has_a_layer() -> None:
    unknown = [
        m for m in ALL if "." in m and layer_of(m) is None and m.split(".")[1] not in FREE | {"_moved", "_build_info"}
    ]
    assert not unknown, "say in LAYERS where it belongs"


def test_imports_go_one_way() -> None:
    wrong = []
    for one in IMPORTS:
        package, other = one.module.split(".")[0], one.target.split(".")[0]
        if package == "mirage_kernels" and other == "mirage":
            wrong.append(place(one))
        mine, its = layer_of(one.module), layer_of(one.target)
        if package == other and mine is not None and its is not None:
            same = one.module.split(".")[1] == one.target.split(".")[1]
            if its > mine or (its == mine and not same and package == "mirage" and mine > 0):
                wrong.append(place(one))
    assert not wrong, "\n".join(wrong)


def test_no_circles() -> None:
    graph: dict[str, set[str]] = {module: set() for module in ALL}
    for one in IMPORTS:
        # A package's __init__ that gathers what lies in it is its front door, not a circle.
        if one.target in ALL and not f"{one.module}.".startswith(f"{one.target}."):
            graph[one.module].add(one.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_no_private_name_crosses_modules() -> None:
    wrong = [
        place(one)
        for one in IMPORTS
        for part in [*one.target.split("."), one.name or ""]
        if part.startswith("_") and not part.startswith("__") and part not in ("_moved", "_build_info")
    ]
    assert not wrong, "\n".join(wrong)


def test_operator_folders_do_not_know_each_other() -> None:
    operators = {m.split(".")[2] for m in MODULES["mirage_kernels"] if m.count(".") > 1 and m.split(".")[1] == "ops"}
    operators -= {"common", "operator", "checks", "readout"}
    assert {"splat", "splat_aligned", "cache_write", "bounded_write", "view_overlap"} <= operators
    wrong = []
    for one in IMPORTS:
        mine, its = one.module.split("."), one.target.split(".")
        if mine[:2] == its[:2] == ["mirage_kernels", "ops"] and len(mine) > 2 and len(its) > 2:
            if mine[2] in operators and its[2] in operators and mine[2] != its[2]:
                wrong.append(place(one))
            if mine[2] == "common" and its[2] in operators:
                wrong.append(place(one))
    assert not wrong, "\n".join(wrong)


def test_the_world_model_uses_public_names_of_the_kernels() -> None:
    public = set(mirage_kernels.__all__)
    wrong = []
    for one in IMPORTS:
        if one.module.split(".")[0] != "mirage" or one.target.split(".")[0] != "mirage_kernels":
            continue
        if (one.module, one.target) in REPORTS:
            continue
        if one.target in ("mirage_kernels.constants", "mirage_kernels.geometry", "mirage_kernels.io"):
            continue
        if one.target != "mirage_kernels" or (one.name is not None and one.name not in public):
            wrong.append(place(one))
    assert not wrong, "\n".join(wrong)

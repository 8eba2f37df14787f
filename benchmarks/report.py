"""Make rows of results, gather the facts of the machine beside them, and format both.

The file is ``{machine, cpu, gpu: {name, driver} or null, torch, cuda, commit, command, rows: [{group, name, variant,
size, median_s, p20_s, p80_s, bytes, floor_s}]}``. ``bytes`` is the least that a timed variant must move, ``floor_s``
those bytes over the copy bandwidth measured in the same run. Rows that are no times have null there: in ``growth`` and
``memory`` their ``bytes`` are what is held, and a fraction stands under the further key ``value``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured yet"
GROUPS = ("read", "write", "condition", "growth", "memory", "chunk", "drop_in")
BESIDE = ("read beside", "first chunk beside")
"""Of ``growth``: the memory and one of its first chunk alone, read in turns."""


def make_row(
    group: str,
    name: str,
    variant: str,
    size: str,
    *,
    times: tuple[float, float, float] | None = None,
    nbytes: int | None = None,
    bandwidth: float | None = None,
    value: float | None = None,
) -> Row:
    """Make a row; ``times`` are median, p20 and p80 in seconds."""
    median, p20, p80 = times if times is not None else (None, None, None)
    floor = None if times is None or nbytes is None or bandwidth is None else nbytes / bandwidth
    row: Row = {"group": group, "name": name, "variant": variant, "size": size}
    row.update(median_s=median, p20_s=p20, p80_s=p80, bytes=nbytes, floor_s=floor)
    if value is not None:
        row["value"] = value
    return row


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else platform.processor()
    except OSError:
        name = platform.processor()
    return f"{name}, {torch.get_num_threads()} threads"


def machine_facts(device: torch.device) -> dict[str, Any]:
    gpu = None
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
        gpu = {"name": torch.cuda.get_device_name(device), "driver": driver}
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS.parent
    )
    machine = re.sub(r"[^a-z0-9]+", "-", (gpu["name"] if gpu else f"cpu-{platform.machine()}").lower()).strip("-")
    return {
        "machine": f"{machine}-{torch.get_num_threads()}threads" if gpu is None else machine,
        "cpu": _cpu_name(),
        "gpu": gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": head.stdout.strip() or None,
        "command": " ".join(["pytest", *sys.argv[1:]]),
    }


def write_results(folder: Path, facts: dict[str, Any], rows: list[Row]) -> Path:
    """Write ``results.json`` and ``results.md`` in ``folder``; each replaces the old one atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    # Tests run size by size, so that a scene is built once; a reader wants group by group.
    results = {**facts, "rows": sorted(rows, key=lambda row: (GROUPS.index(row["group"]), row["name"]))}
    for name, text in (("results.json", to_json(results)), ("results.md", to_markdown(results))):
        temporary = folder / f"{name}.tmp"
        temporary.write_text(text)
        os.replace(temporary, folder / name)
    return folder / "results.json"


def to_json(results: dict[str, Any]) -> str:
    """Format one row a line, so that a difference between two runs can be read."""
    head = json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in results["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def load_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Load every machine's results, GPUs first."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))]
    return sorted(found, key=lambda results: results["gpu"] is None)


def find_row(rows: Iterable[Row], group: str, name: str, variant: str, size: str) -> Row | None:
    wanted = (group, name, variant, size)
    return next((row for row in rows if (row["group"], row["name"], row["variant"], row["size"]) == wanted), None)


def seconds_text(seconds: float | None) -> str:
    """Format three digits in the unit that suits: 26.1 us, 1.44 ms, 9.03 s, 612 s."""
    if seconds is None:
        return NOT_MEASURED
    for limit, scale, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (float("inf"), 1.0, "s")):
        if seconds < limit:
            return f"{_three_digits(seconds * scale)} {unit}"
    raise AssertionError


def bytes_text(count: float | None) -> str:
    if count is None:
        return NOT_MEASURED
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{_three_digits(count)} {unit}"
        count /= 1000
    return f"{_three_digits(count)} GB"


def ratio_text(ratio: float) -> str:
    return f"{_three_digits(ratio)}x"


def _three_digits(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def row_text(row: Row) -> list[str]:
    """Format the cells of one row: time with its spread, bytes, floor, how many times the floor; or the value."""
    if row["median_s"] is None:
        value = f"{100 * row['value']:.1f} %" if "value" in row else ""
        return [value, "", bytes_text(row["bytes"]) if row["bytes"] is not None else "", "", ""]
    spread = f"{seconds_text(row['p20_s'])} to {seconds_text(row['p80_s'])}"
    if row["floor_s"] is None:
        return [seconds_text(row["median_s"]), spread, "", "", ""]
    ratio = f"{row['median_s'] / row['floor_s']:.1f}"
    return [
        seconds_text(row["median_s"]), spread, bytes_text(row["bytes"]), seconds_text(row["floor_s"]), ratio
    ]  # fmt: skip


def to_markdown(results: dict[str, Any]) -> str:
    """Format every row of one machine's results, a table a group."""
    gpu = results["gpu"]
    where = f"{gpu['name']}, driver {gpu['driver']}" if gpu else results["cpu"]
    cuda = f", CUDA {results['cuda']}" if results["cuda"] else ""
    lines = [
        f"# {results['machine']}",
        "",
        f"{where}; torch {results['torch']}{cuda}; commit {results['commit']}; `{results['command']}`.",
        "",
        "Median of the rounds, p20 to p80; bytes are the least that must move, or what is held; the floor is those",
        "bytes over the copy bandwidth of the same run.",
    ]
    groups: dict[str, list[Row]] = {}
    for row in results["rows"]:
        groups.setdefault(row["group"], []).append(row)
    for group, rows in groups.items():
        lines += ["", f"## {group}", ""]
        lines += ["| | size | variant | median | p20 to p80 | bytes | floor | times the floor |"]
        lines += ["|---|---|---|---:|---:|---:|---:|---:|"]
        for row in rows:
            lines.append("| " + " | ".join([row["name"], row["size"], row["variant"], *row_text(row)]) + " |")
    return "\n".join(lines) + "\n"

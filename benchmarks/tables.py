"""Make the tables of README.md and docs/ from the results: ``python -m benchmarks.tables --write``.

A table stands between ``<!-- bench:NAME -->`` and ``<!-- /bench -->``. ``--check`` fails where a file does not say what
the results say. Nothing here is computed from anything but ``benchmarks/results/*/results.json``, the
``fidelity/fidelity.json`` beside one of them, and the reports of `mirage evaluate` in ``results/mirage-tiny``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mirage.evaluation.report import format_goals, format_table

from .fidelity import find
from .goals import ENCODER, Outcome, outcomes
from .report import (
    BESIDE,
    NOT_MEASURED,
    RESULTS,
    Row,
    bytes_text,
    find_row,
    load_results,
    ratio_text,
    seconds_text,
)
from .scenes import GOAL, Size

ROOT = Path(__file__).parent.parent
FILES = tuple(ROOT / name for name in ("README.md", "docs/benchmarks.md", "docs/memory.md", "docs/evaluation.md"))
EVALUATIONS = RESULTS / "mirage-tiny"
"""Where the reports of `mirage evaluate` lie, ``evaluation-FRAMES.json``."""
_BLOCK = re.compile(r"(<!-- bench:([a-z-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)

Results = list[dict[str, Any]]


def _cpu(results: Results) -> dict[str, Any] | None:
    return next((one for one in results if one["gpu"] is None), None)


def _sizes(rows: list[Row], group: str, name: str, variant: str) -> list[str]:
    return [r["size"] for r in rows if (r["group"], r["name"], r["variant"]) == (group, name, variant)]


def _table(head: list[str], lines: list[list[str]]) -> str:
    rules = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rules, *lines))


def _median(rows: list[Row], group: str, name: str, variant: str, size: str) -> float | None:
    row = find_row(rows, group, name, variant, size)
    return None if row is None else row["median_s"]


def _against(seconds: float | None, other: float | None) -> str:
    """Format a time, and how many times as long as ``other`` it is."""
    if seconds is None:
        return NOT_MEASURED
    return seconds_text(seconds) if other is None else f"{seconds_text(seconds)}, {ratio_text(seconds / other)}"


def _tokens(label: str) -> str:
    size = Size.parse(label)
    return label if size is None else f"{label} ({size.tokens:,} tokens)"


def machine(results: Results) -> str:
    lines = []
    for one in results:
        where = f"{one['gpu']['name']}, driver {one['gpu']['driver']}" if one["gpu"] else one["cpu"]
        lines.append(
            f"`{one['machine']}`: {where}; torch {one['torch']}; commit {one['commit']}. Medians of one `make bench`."
        )
    if not any(one["gpu"] for one in results):
        lines.append(f"GPU: {NOT_MEASURED}.")
    return "\n".join(lines)


def read(results: Results) -> str:
    one = _cpu(results)
    rows = one["rows"] if one else []
    head = ["one chunk's read, CPU", "Mirage, nearest, bf16", "nearest, f32", "aligned, bf16", "reference"]
    head += ["pixels, our kernels", "pixels, PyTorch"]
    lines = []
    for size in _sizes(rows, "read", "9 latent views", "latent, bf16"):
        best = _median(rows, "read", "9 latent views", "latent, bf16", size)
        others = [
            _median(rows, "read", "9 latent views", "latent, f32", size),
            _median(rows, "read", "9 latent views", "latent, bf16, aligned", size),
            _median(rows, "read", "9 latent views", "reference", size),
            _median(rows, "read", "33 images", "pixel, kernels nearest", size),
            _median(rows, "read", "33 images", "pixel, plain", size),
        ]
        lines.append([_tokens(size), seconds_text(best), *[_against(other, best) for other in others]])
    return _table(head, lines) if lines else NOT_MEASURED


def read_short(results: Results) -> str:
    """Format the reads of README: the goal's size, where pixels were measured, and the sizes of long memories."""
    one = _cpu(results)
    rows = one["rows"] if one else []
    head = ["one chunk's read, CPU", "Mirage, nearest", "Mirage, aligned", "reference", "pixels", "pixels, encoded"]
    lines = []
    for size in _sizes(rows, "read", "9 latent views", "latent, bf16"):
        if size != GOAL.label and find_row(rows, "read", "33 images", "pixel, kernels nearest", size):
            continue
        best = _median(rows, "read", "9 latent views", "latent, bf16", size)
        encoded = f"pixel, kernels nearest, {ENCODER}"
        others = [
            _median(rows, "read", "9 latent views", "latent, bf16, aligned", size),
            _median(rows, "read", "9 latent views", "reference", size),
            _median(rows, "read", "33 images", "pixel, kernels nearest", size),
            _median(rows, "condition", "one chunk", encoded, size),
        ]
        lines.append([_tokens(size), seconds_text(best), *[_against(other, best) for other in others]])
    return _table(head, lines) if lines else NOT_MEASURED


def condition(results: Results) -> str:
    one = _cpu(results)
    rows = one["rows"] if one else []
    found = [r for r in rows if r["group"] == "condition" and r["name"] == "one chunk"]
    sizes = list(dict.fromkeys(r["size"] for r in found))
    lines = []
    for size in sizes:
        base = _median(rows, "condition", "one chunk", "latent, bf16, no reference frames", size)
        for r in found:
            if r["size"] == size and (Size.parse(size) is not None):
                lines.append([_tokens(size), r["variant"], _against(r["median_s"], base)])
    return _table(["one chunk's conditioning, CPU", "memory", "time"], lines) if lines else NOT_MEASURED


def write(results: Results) -> str:
    one = _cpu(results)
    rows = one["rows"] if one else []
    variants = {
        "Mirage, bf16": "latent, bf16",
        "1 % depth noise": "latent, bf16, 1 % depth noise",
        "bilinear depth": "latent, bf16, bilinear depth",
        "reference (bilinear)": "reference",
        "pixels, our kernels": "pixel, kernels",
        "pixels, PyTorch": "pixel, plain",
    }
    lines = []
    for size in _sizes(rows, "write", "8 frames", "latent, bf16"):
        base = _median(rows, "write", "8 frames", "latent, bf16", size)
        cells = [_median(rows, "write", "8 frames", variant, size) for variant in list(variants.values())[1:]]
        lines.append([_tokens(size), seconds_text(base), *[_against(cell, base) for cell in cells]])
    return _table(["8 frames written into, CPU", *variants], lines) if lines else NOT_MEASURED


def memory(results: Results) -> str:
    one = _cpu(results)
    rows = one["rows"] if one else []
    variants = ["latent, bf16", "latent, f32", "reference", "pixel, plain, 8-bit colours", "pixel, kernels"]
    variants.append("pixel, plain")
    lines = []
    for size in _sizes(rows, "memory", "held", "pixel, plain"):
        base = find_row(rows, "memory", "held", "latent, bf16", size)
        for variant in variants:
            row = find_row(rows, "memory", "held", variant, size)
            if row is None or base is None:
                continue
            reads = [find_row(rows, "memory", f"peak of one chunk's {x}", variant, size) for x in ("read", "images")]
            if variant == "pixel, kernels":
                reads = [find_row(rows, "memory", "peak of one chunk's images", f"{variant} nearest", size)]
            peak = next((bytes_text(r["bytes"]) for r in reads if r is not None), "")
            held = f"{bytes_text(row['bytes'])}, {ratio_text(row['bytes'] / base['bytes'])}"
            lines.append([_tokens(size), variant, held, peak])
    head = ["memory, CPU", "side", "held", "one chunk's read takes, beyond that"]
    return _table(head, lines) if lines else NOT_MEASURED


def exactness(results: Results) -> str:
    lines = []
    for one in results:
        rows = one["rows"]
        for size in _sizes(rows, "read", "cells wrong", "reference"):
            wrong = find_row(rows, "read", "cells wrong", "reference", size)
            changed = find_row(rows, "read", "cells that change", "reference", size)
            latent = find_row(rows, "read", "cells that change", "latent, f32", size)
            cells = [f"{100 * row['value']:.1f} %" if row else NOT_MEASURED for row in (wrong, changed, latent)]
            lines.append([f"{one['machine']}, {_tokens(size)}", *cells])
    head = ["seen cells", "reference: a farther token", "reference: change from run to run", "Mirage: change"]
    return _table(head, lines) if lines else NOT_MEASURED


def growth(results: Results) -> str:
    one = _cpu(results)
    rows = one["rows"] if one else []
    names = [r["name"] for r in rows if r["group"] == "growth" and r["name"].endswith(": read")]
    lines = []
    for name in dict.fromkeys(names):
        walk = name.removesuffix(": read")
        found = [r for r in rows if r["name"] == name]
        for variant, place in dict.fromkeys((r["variant"], r["size"].split(" of ")[1]) for r in found):
            reads = [r for r in found if r["variant"] == variant and r["size"].endswith(f" of {place}")]
            held = [find_row(rows, "growth", f"{walk}: held", variant, r["size"]) for r in (reads[0], reads[-1])]
            views = [find_row(rows, "growth", f"{walk}: in view", variant, r["size"]) for r in (reads[0], reads[-1])]
            writes = [find_row(rows, "growth", f"{walk}: write", variant, r["size"]) for r in (reads[0], reads[-1])]
            turns = [find_row(rows, "growth", f"{walk}: {beside}", variant, reads[-1]["size"]) for beside in BESIDE]
            lines.append(
                [
                    f"{walk}, {place}",
                    variant,
                    *[
                        f"{seconds_text(a['median_s'])} to {seconds_text(b['median_s'])}" if a and b else ""
                        for a, b in ((reads[0], reads[-1]), writes)
                    ],
                    *[
                        f"{bytes_text(a['bytes'])} to {bytes_text(b['bytes'])}" if a and b else ""
                        for a, b in (held, views)
                    ],
                    ratio_text(turns[0]["median_s"] / turns[1]["median_s"]) if turns[0] and turns[1] else "",
                ]
            )
    head = ["from chunk 1 to 50, CPU", "side", "read", "write, once", "held", "in view", "reads in turns"]
    return _table(head, lines) if lines else NOT_MEASURED


def drop_in(results: Results) -> str:
    lines = []
    for one in results:
        rows = [r for r in one["rows"] if r["group"] == "drop_in"]
        for name, size in dict.fromkeys((r["name"], r["size"]) for r in rows):
            compat = _median(rows, "drop_in", name, "latent, f32", size)
            reference = _median(rows, "drop_in", name, "reference", size)
            lines.append([f"{name}, {size}", one["machine"], seconds_text(compat), _against(reference, compat)])
    head = ["the release's own loop", "machine", "`compat.LatentPointCloud`", "reference"]
    return _table(head, lines) if lines else NOT_MEASURED


_KERNELS = (
    ("`splat` (read)", "read", "9 latent views", "latent, bf16"),
    ("`splat`, cold caches", "read", "9 latent views", "latent, bf16, cold caches"),
    ("`cache_write`, median depth", "write", "8 frames", "latent, bf16"),
    ("`cache_write`, 1 % depth noise", "write", "8 frames", "latent, bf16, 1 % depth noise"),
    ("`cache_write`, bilinear depth", "write", "8 frames", "latent, bf16, bilinear depth"),
    ("`view_overlap`", "condition", "overlap of", "latent, bf16"),
)
_GPU_KERNELS = ("graph, warm", "graph, cold", "eager, warm")


def kernels(results: Results) -> str:
    lines = []
    for one in results:
        hows = ("",) if one["gpu"] is None else tuple(f", {how}" for how in _GPU_KERNELS)
        for kernel, group, name, variant in _KERNELS:
            for how in hows:
                found = [r for r in one["rows"] if r["group"] == group and r["name"].startswith(name)]
                for r in found:
                    if r["variant"] == f"{variant}{how}" and r["floor_s"]:
                        ratio = f"{r['median_s'] / r['floor_s']:.1f}"
                        times = [seconds_text(r["floor_s"]), seconds_text(r["median_s"]), ratio]
                        lines.append([f"{kernel}{how}, {_tokens(r['size'])}", one["machine"], *times])
    if not any(one["gpu"] for one in results):
        lines.append(["every kernel", "GPU", NOT_MEASURED, NOT_MEASURED, ""])
    return _table(["kernel", "machine", "floor", "reached", "times the floor"], lines)


def goals(results: Results) -> str:
    cpu, gpu, cpu_machine, gpu_machine = outcomes(results)

    def lines(found: list[Outcome], where: str | None, what: str) -> list[list[str]]:
        marks = {True: "yes", False: "no", None: ""}
        return [
            [f"{what}: {o.goal}", o.figure, marks[o.met], (where or "") if o.met is not None else ""] for o in found
        ]

    all_lines = lines(cpu, cpu_machine, "CPU") + lines(gpu, gpu_machine, "H200")
    return _table(["goal", "figure", "met", "run"], all_lines)


def load_fidelity() -> dict[str, list[dict[str, Any]]]:
    """Load what `benchmarks.fidelity` measured, of the first machine that has it; empty where none has."""
    path = next(iter(sorted(RESULTS.glob("*/fidelity/fidelity.json"))), None)
    found: dict[str, list[dict[str, Any]]] = {} if path is None else json.loads(path.read_text())
    return found


_READS = {
    "published (`mirage_kernels.compat`)": ("published", "nearest"),
    "nearest": ("append", "nearest"),
    "aligned, sharpness 0": ("append", "aligned, sharpness 0"),
    "aligned, sharpness 15": ("append", "aligned, sharpness 15"),
    "aligned, sharpness 30 (the default)": ("append", "aligned"),
    "aligned, sharpness 40": ("append", "aligned, sharpness 40"),
}
_POLICIES = {
    "append (published policy)": ("append", "aligned"),
    "bounded (the default)": ("bounded", "aligned"),
    "bounded, float8": ("bounded, float8", "aligned"),
    '`views_per_voxel=1, merge="mean"`': ("mean, 1 a voxel", "aligned"),
}


def _fidelity(chosen: dict[str, tuple[str, str]], first: str) -> str:
    rows = load_fidelity().get("fidelity")
    if not rows:
        return NOT_MEASURED
    head = [first, "tokens", "held-out error", "energy", "written-pose error", "energy", "coverage"]
    lines = []
    for name, (memory, way) in chosen.items():
        row = find(rows, memory, way)
        scores = [
            f"{row[poses][key]:{form}}"
            for poses in ("held-out", "written")
            for key, form in (("error", ".3f"), ("energy", ".2f"))
        ]
        lines.append([name, f"{row['tokens']:,}", *scores, f"{row['held-out']['coverage']:.3f}"])
    return _table(head, lines)


def fidelity_reads(results: Results) -> str:
    return _fidelity(_READS, "readout")


def fidelity_policies(results: Results) -> str:
    return _fidelity(_POLICIES, "memory")


def fidelity_laps(results: Results) -> str:
    laps = load_fidelity().get("laps")
    if not laps:
        return NOT_MEASURED
    head = ["after lap", "tokens", "error at written poses"]
    return _table(
        head, [[str(row["lap"]), f"{row['tokens']:,}", f"{row['error']:.3f}"] for row in (laps[0], laps[4], laps[-1])]
    )


def fidelity_time(results: Results) -> str:
    times = load_fidelity().get("speed")
    if not times:
        return NOT_MEASURED
    slow = min(row["read_ms"] for row in times if row["memory"].startswith("reference"))
    lines = [
        [row["memory"], f"{row['tokens']:,}", f"{row['read_ms']:.2f} ms", ratio_text(slow / row["read_ms"])]
        for row in times
    ]
    return _table(["9 views of 120 frames", "tokens", "read", "against the faster reference"], lines)


def load_evaluations() -> list[dict[str, Any]]:
    """Load the reports of `mirage evaluate`, the shortest loops first.

    Reports made before the memory was renamed call it "ours".
    """
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in EVALUATIONS.glob("evaluation-*.json")]
    for report in reports:
        report["memory"] = _rename(report["memory"])
        report["memory_by_depth"] = {depth: _rename(found) for depth, found in report["memory_by_depth"].items()}
    return sorted(reports, key=lambda report: report["frames"])


def _rename(memories: dict[str, Any]) -> dict[str, Any]:
    return {"aligned" if name == "ours" else name: figures for name, figures in memories.items()}


def closed_loop(results: Results) -> str:
    parts = []
    for report in load_evaluations():
        seeds = ":".join(map(str, report["seeds"]))
        parts += [
            f"Loops of {report['frames']} frames, {report['rooms']} rooms (seeds {seeds}), {report['steps']} steps.",
            "",
            *format_table(report),
            "",
            *format_goals(report),
            "",
        ]
    return "\n".join(parts) if parts else NOT_MEASURED


def closed_loop_short(results: Results) -> str:
    """Format what README says of the shortest loops: the four memories, with true depth and with the depth head's."""
    report = next(iter(load_evaluations()), None)
    if report is None:
        return NOT_MEASURED
    depths = {"true": "true depth", "head": "depth head"}
    head = [f"{depth}: {what}" for depth in depths.values() for what in ("revisit", "new view")]
    lines = []
    for name, figures in report["memory"].items():
        cells = [
            f"{found[name][key]:.2f}" if name in (found := report["memory_by_depth"].get(depth, {})) else NOT_MEASURED
            for depth in depths
            for key in ("revisit_psnr", "novel_psnr")
        ]
        lines.append([name, *cells, f"{(figures['memory_bytes'] or 0) / 2**20:.2f}"])
    return _table(["memory", *head, "memory, MiB"], lines)


BLOCKS: dict[str, Callable[[Results], str]] = {
    "closed-loop": closed_loop,
    "closed-loop-short": closed_loop_short,
    "fidelity-reads": fidelity_reads,
    "fidelity-policies": fidelity_policies,
    "fidelity-laps": fidelity_laps,
    "fidelity-time": fidelity_time,
    "machine": machine,
    "read": read,
    "read-short": read_short,
    "condition": condition,
    "write": write,
    "memory": memory,
    "exactness": exactness,
    "growth": growth,
    "drop-in": drop_in,
    "kernels": kernels,
    "goals": goals,
}


def render(text: str, results: Results) -> str:
    """Make every marked table of ``text`` again.

    Raises:
        ValueError: a marker names no table.
    """

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"bench marker must be one of {', '.join(BLOCKS)}, got {match[2]!r}")
        return f"{match[1]}{BLOCKS[match[2]](results)}\n{match[3]}"

    return _BLOCK.sub(block, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="bring the files up to date")
    what.add_argument("--check", action="store_true", help="fail where a file is out of date")
    a = parser.parse_args(arguments)
    results, stale = load_results(), []
    for path in FILES:
        text = path.read_text()
        fresh = render(text, results)
        if fresh != text:
            stale.append(path.relative_to(ROOT))
            if a.write:
                path.write_text(fresh)
    for path in stale:
        print(
            f"{path}: {'brought up to date' if a.write else 'out of date, run `python -m benchmarks.tables --write`'}"
        )
    return 1 if stale and a.check else 0


if __name__ == "__main__":
    sys.exit(main())

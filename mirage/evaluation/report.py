"""What `mirage evaluate` reports: figures over rooms, whether goals are met, and the tables of report.md."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from .metrics import LAG, REACH

OWN = "the model's own"
"""What the report says of a memory that has no weights of its own."""


def summarise(rooms: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarise one memory from what :func:`measure` gives of each room.

    Returns:
        revisit_*: a revisit against its first visit; revisit_true_*: against the true image; novel_*: frames of new
        poses against the true images. Each {psnr, ssim, lpips}, with revisit_psnr_stderr and novel_psnr_stderr.
        revisit_psnr_per_chunk, true_psnr_per_chunk, true_mse_per_chunk: None where no room has such a frame.
        drift: mean squared error against the truth of the last chunk over that of the second; None with fewer than 3.
        true_psnr_per_frame. photometric, reprojection: see :func:`~mirage.evaluation.metrics.consistency`. rooms, and,
        where a memory was run, memory_bytes, tokens, read_seconds (of a chunk).
    """
    chunks = rooms[0]["chunks"]
    figures: dict[str, Any] = {"rooms": len(rooms)}

    def over(values: Callable[[dict[str, Any]], list[float] | None]) -> list[float]:
        """Take one mean a room, of those that have any."""
        return [statistics.fmean(found) for room in rooms if (found := values(room))]

    def at(frames: Callable[[dict[str, Any]], Sequence[int]], metric: str) -> Callable[[dict[str, Any]], list[float]]:
        return lambda room: [room["true"][metric][i] for i in frames(room)] if room["true"][metric] is not None else []

    for metric in ("psnr", "ssim", "lpips"):
        for name, found in (
            ("revisit", over(lambda room, m=metric: room["revisit"][m])),  # type: ignore[misc]
            ("revisit_true", over(at(lambda room: [pair[1] for pair in room["revisits"]], metric))),
            ("novel", over(at(lambda room: room["first_visits"], metric))),
        ):
            figures[f"{name}_{metric}"] = _mean(found)
            if metric == "psnr" and name != "revisit_true":
                figures[f"{name}_{metric}_stderr"] = _standard_error(found)
    per_chunk: dict[str, list[float | None]] = {"revisit_psnr": [], "true_psnr": [], "true_mse": []}
    for start, stop in chunks:
        inside = range(max(start, 1), stop)
        per_chunk["revisit_psnr"].append(_mean(over(lambda room, s=inside: _revisits_in(room, s))))  # type: ignore[misc]
        for metric in ("psnr", "mse"):
            per_chunk[f"true_{metric}"].append(_mean(over(at(lambda _, s=inside: s, metric))))  # type: ignore[misc]
    figures |= {f"{name}_per_chunk": values for name, values in per_chunk.items()}
    errors = per_chunk["true_mse"]
    figures["drift"] = errors[-1] / errors[1] if len(errors) > 2 and errors[-1] and errors[1] else None
    frames = range(len(rooms[0]["true"]["psnr"]))
    figures["true_psnr_per_frame"] = [statistics.fmean(room["true"]["psnr"][i] for room in rooms) for i in frames]
    for name in ("photometric", "reprojection", "memory_bytes", "tokens", "read_seconds"):
        figures[name] = _mean([room[name] for room in rooms if room.get(name) is not None])
    return figures


def goals(figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Check the goals of the aligned memory: {goal, value, asked, bound, met}, of those that can be told."""

    def gain(metric: str, other: str) -> float | None:
        if figures.get(other, {}).get("weights") == OWN:  # not trained for it: that tells nothing
            return None
        ours, theirs = (figures.get(name, {}).get(metric) for name in ("aligned", other))
        return None if ours is None or theirs is None else ours - theirs

    ours = figures.get("aligned", {})
    last = len(ours.get("true_mse_per_chunk", []))
    wanted: list[tuple[str, float | None, str, float]] = [
        ("revisit PSNR less that of no memory, dB", gain("revisit_psnr", "none"), "at least", 4.0),
        ("revisit PSNR less that of the pixel memory, dB", gain("revisit_psnr", "pixel"), "at least", 0.0),
        ("novel-view PSNR less that of no memory, dB", gain("novel_psnr", "none"), "above", 0.0),
        ("novel-view PSNR less that of the pixel memory, dB", gain("novel_psnr", "pixel"), "above", 0.0),
        (f"squared error of chunk {last} over that of chunk 2", ours.get("drift"), "at most", 1.1),
    ]
    holds: dict[str, Callable[[float, float], bool]] = {
        "at least": operator.ge,
        "above": operator.gt,
        "at most": operator.le,
    }
    return [
        {"goal": name, "value": value, "asked": asked, "bound": bound, "met": holds[asked](value, bound)}
        for name, value, asked, bound in wanted
        if value is not None
    ]


def _revisits_in(room: dict[str, Any], frames: range) -> list[float]:
    return [
        value for (_, again), value in zip(room["revisits"], room["revisit"]["psnr"], strict=True) if again in frames
    ]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


# For people.

_COLUMNS = {
    "revisit PSNR": "revisit_psnr",
    "SSIM": "revisit_ssim",
    "LPIPS": "revisit_lpips",
    "revisit against the truth": "revisit_true_psnr",
    "novel PSNR": "novel_psnr",
    "SSIM ": "novel_ssim",
    "LPIPS ": "novel_lpips",
    "photometric": "photometric",
    "reprojection, px": "reprojection",
    "drift": "drift",
    "memory, MiB": "memory_bytes",
    "a chunk's read, s": "read_seconds",
}


def format_report(report: dict[str, Any]) -> str:
    """Format report.md: tables, goals, and what the columns mean."""
    height, width = report["size"]
    first, stop = report["seeds"]
    lines = [
        "# Closed loops in synthetic rooms",
        "",
        f"`{report['model']}`, {report['rooms']} rooms ({first}:{stop}; patterns of {report['texture']:g} of their"
        f" contrast, nothing moves), loops of {report['frames']} frames of {height}x{width}"
        f" ({', '.join(report['loops'])}), chunks of {report['chunk_frames']}, {report['steps']} steps, guidance"
        f" {report['guidance']:g}, our memory's write policy {report['write_policy']}; torch {report['torch']},"
        f" {report['device']}.",
    ]
    ceiling = report["ceiling"]
    for depth, memories in report["memory_by_depth"].items():
        lines += ["", f"## {'True depth' if depth == 'true' else 'Depth of the depth head'}", ""]
        lines += [
            "| memory | " + " | ".join(_COLUMNS) + " | weights |",
            "| --- |" + " ---: |" * len(_COLUMNS) + " --- |",
        ]
        for name, figures in [*memories.items(), ("(true images through the VAE)", ceiling | {"weights": ""})]:
            cells = [_cell(figures, key) for key in _COLUMNS.values()]
            lines.append(f"| {_row(name, figures)} | {' | '.join(cells)} | {figures['weights']} |")
        lines += ["", "| revisit PSNR by chunk | " + " | ".join(map(str, _numbers(ceiling))) + " |"]
        lines += ["| --- |" + " ---: |" * len(_numbers(ceiling))]
        lines += [
            f"| {name} | " + " | ".join(_number(value) for value in figures["revisit_psnr_per_chunk"]) + " |"
            for name, figures in memories.items()
        ]
        lines += ["", *map(_goal, report["goals"][depth])]
    lines += [
        "",
        "Revisit: a frame against the first frame of the same pose, where that is further back than a chunk and the"
        " frames that precede it; novel: frames of poses not seen before against the true images. PSNR in dB (at most"
        " 60), ± the standard error over rooms. Photometric: mean absolute difference of colours of what two frames,"
        f" {LAG} apart, both see; reprojection: pixels between where geometry puts a patch and where it matches best"
        f" (at most {REACH} to either side). Both are low for a video without content: read them beside the PSNR."
        " Drift: squared error against the truth of the last chunk over that of chunk 2. Without a memory nothing is"
        " written, and depth does not matter.",
    ]
    if not report["lpips"]:
        lines.append("LPIPS was not measured: the package `lpips` is not installed.")
    return "\n".join([*lines, *_unfair(report)]) + "\n"


def _unfair(report: dict[str, Any]) -> list[str]:
    """Say what makes a row no fair comparison."""
    memories = report["memory"].items()
    shared = [name for name, figures in memories if name not in ("aligned", "ours") and figures["weights"] == OWN]
    if not shared:
        return []
    said = f"**{', '.join(shared)}: run with the model's own weights, which were not trained on that memory: no fair"
    return ["", f"{said} comparison.**"]


def _row(name: str, figures: dict[str, Any]) -> str:
    """Name a memory in a table; without one, say what steers the model."""
    if name != "none":
        return name
    return "none (steered by camera rays)" if figures.get("control") == "rays" else "none (not steered)"


_SHORT = {
    "revisit PSNR": "revisit_psnr",
    "revisit SSIM": "revisit_ssim",
    "novel PSNR": "novel_psnr",
    "novel SSIM": "novel_ssim",
    "drift": "drift",
    "memory, MiB": "memory_bytes",
}


def format_table(report: dict[str, Any]) -> list[str]:
    """Format lines of a short table, for a model card or a README: each memory with true depth and with the head's."""
    lines = ["| memory | depth | " + " | ".join(_SHORT) + " |", "| --- | --- |" + " ---: |" * len(_SHORT)]
    for depth, memories in report["memory_by_depth"].items():
        for name, figures in memories.items():
            if name == "none" and depth != report["depth"]:
                continue  # the same videos
            cells = [_cell(figures, key) for key in _SHORT.values()]
            lines.append(f"| {_row(name, figures)} | {figures['depth']} | {' | '.join(cells)} |")
    cells = [_cell(report["ceiling"], key) for key in _SHORT.values()]
    return [*lines, f"| (the VAE alone) | | {' | '.join(cells)} |", *_unfair(report)]


def format_goals(report: dict[str, Any]) -> list[str]:
    """Format lines that say of each goal whether it is met, with each depth."""
    names = {"true": "true depth", "head": "the depth head's"}
    return [f"{_goal(goal)} ({names[depth]})" for depth, found in report["goals"].items() for goal in found]


def _numbers(figures: dict[str, Any]) -> range:
    return range(1, 1 + len(figures["true_psnr_per_chunk"]))


def _cell(figures: dict[str, Any], key: str) -> str:
    value = figures.get(key)
    if value is None:
        return ""
    if key == "memory_bytes":
        return f"{value / 2**20:.2f}"
    error = figures.get(f"{key}_stderr")
    return _number(value, 2 if "psnr" in key or key in ("reprojection", "drift") else 3) + (
        f" ± {error:.2f}" if error is not None else ""
    )


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _goal(goal: dict[str, Any]) -> str:
    met = "met" if goal["met"] else "missed"
    return f"- {goal['goal']}: {goal['value']:.2f}, {goal['asked']} {goal['bound']:g} is asked: {met}"

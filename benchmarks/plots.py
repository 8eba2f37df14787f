"""Plot one machine's results beside them: ``python -m benchmarks.plots benchmarks/results/<machine>``.

``time.svg``: read times over stored tokens, both axes logarithmic. ``growth.svg``: time and bytes over chunks.
``roofline.svg``: the rate at which each timed row moves its least bytes, over those bytes, under the copy bandwidth.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from .report import Row
from .scenes import Size

_COLOURS = {"latent": "#1b7837", "reference": "#d95f02", "pixel": "#7570b3"}
_STYLES = ("-", "--", ":", "-.")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(f"plots need matplotlib: pip install 'mirage-world[bench]' ({error})") from error
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "mirage", "svg.fonttype": "none", "font.size": 9, "axes.grid": True})
    from matplotlib import pyplot

    return pyplot


def _plot(axes: Any, series: dict[str, list[tuple[float, float]]]) -> None:
    used: dict[str, int] = {}
    for name, points in series.items():
        side = name.split(",")[0].split(" ")[0]
        style = _STYLES[used.setdefault(side, 0) % len(_STYLES)]
        used[side] += 1
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, style, marker="o", markersize=3, label=name, color=_COLOURS.get(side, "#444444"))


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def fidelity_over_tokens(rows: list[dict[str, Any]], folder: Path) -> None:
    """Draw ``fidelity.svg``: errors, energy, coverage and time of `benchmarks.fidelity`'s memories, by tokens."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(2, 4, figsize=(15, 7))
    shown = [
        ("held-out", "error"),
        ("held-out", "detail"),
        ("held-out", "energy"),
        ("held-out", "coverage"),
        ("written", "error"),
        ("written", "detail"),
        ("written", "energy"),
        (None, "read_ms"),
    ]
    families = {
        "published": "#7570b3",
        "baseline": "#d95f02",
        "append": "#1b7837",
        "bounded": "#2166ac",
        "mean": "#b2182b",
    }
    for axes, (poses, name) in zip(panels.flat, shown, strict=True):
        for family, colour in families.items():
            for read, marker in (("nearest", "x"), ("aligned", "o")):
                chosen = [row for row in rows if row["memory"].split(",")[0] == family and row["read"] == read]
                points = sorted((row["tokens"], row[poses][name] if poses else row[name]) for row in chosen)
                if points:
                    axes.plot(*zip(*points, strict=True), ":", marker=marker, color=colour, label=f"{family}, {read}")
        axes.set(xscale="log", xlabel="tokens", title=f"{poses}, {name}" if poses else "9 views, ms")
        if poses is None:
            axes.set(yscale="log")
    panels.flat[0].legend(fontsize=7)
    _save(figure, folder / "fidelity.svg")
    pyplot.close(figure)


def time_over_tokens(rows: list[Row], folder: Path) -> None:
    """Draw ``time.svg``: read times over stored tokens."""
    pyplot = _pyplot()
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        size = Size.parse(row["size"])
        if row["group"] == "read" and row["median_s"] is not None and size is not None:
            series.setdefault(row["variant"], []).append((size.tokens, row["median_s"]))
    figure, axes = pyplot.subplots(figsize=(6, 4))
    _plot(axes, series)
    axes.set(xscale="log", yscale="log", xlabel="stored tokens (or the pixels they stand for)", ylabel="seconds")
    axes.set_title("one chunk's read: 9 latent views, or 33 images", fontsize=9)
    axes.legend(fontsize=7)
    _save(figure, folder / "time.svg")


def growth(rows: list[Row], folder: Path) -> None:
    """Draw ``growth.svg``: time and bytes over chunks."""
    pyplot = _pyplot()
    found = [row for row in rows if row["group"] == "growth"]
    places = list(dict.fromkeys(row["size"].split(" of ")[1] for row in found))
    if not places:
        return
    walks = ("new rooms", "closed loop")
    figure, grid = pyplot.subplots(2, len(walks), figsize=(8, 6), squeeze=False)
    for column, walk in enumerate(walks):
        for line, (name, key) in enumerate((("read", "median_s"), ("held", "bytes"))):
            series: dict[str, list[tuple[float, float]]] = {}
            for row in found:
                if row["name"] == f"{walk}: {name}":
                    chunk = int(re.findall(r"\d+", row["size"])[0])
                    label = f"{row['variant']}, {row['size'].split(' of ')[1]}"
                    series.setdefault(label, []).append((chunk, row[key]))
            axes = grid[line][column]
            _plot(axes, series)
            axes.set(yscale="log", xlabel="chunks written", ylabel="read, seconds" if name == "read" else "bytes held")
            axes.set_title(walk, fontsize=9)
    grid[0][0].legend(fontsize=6)
    _save(figure, folder / "growth.svg")


def roofline(rows: list[Row], folder: Path) -> None:
    """Draw ``roofline.svg``: rates under the copy bandwidth."""
    pyplot = _pyplot()
    timed = [row for row in rows if row["floor_s"]]
    if not timed:
        return
    bandwidth = timed[0]["bytes"] / timed[0]["floor_s"]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    marks = {"read": "o", "write": "s", "condition": "^"}
    seen = set()
    for row in timed:
        side = row["variant"].split(",")[0]
        label = f"{row['group']}, {side}"
        axes.plot(
            row["bytes"], row["bytes"] / row["median_s"], marks.get(row["group"], "x"), markersize=4,
            color=_COLOURS.get(side, "#444444"), label=None if label in seen else label,
        )  # fmt: skip
        seen.add(label)
    axes.axhline(bandwidth, color="black", linewidth=1)
    axes.text(0.02, bandwidth * 1.1, "copy bandwidth", fontsize=7, transform=axes.get_yaxis_transform())
    axes.set(xscale="log", yscale="log", xlabel="bytes that must move", ylabel="of them a second")
    axes.legend(fontsize=7)
    _save(figure, folder / "roofline.svg")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders with a results.json")
    for folder in parser.parse_args(arguments).folders:
        rows = json.loads((folder / "results.json").read_text())["rows"]
        for plot in (time_over_tokens, growth, roofline):
            plot(rows, folder)


if __name__ == "__main__":
    main()

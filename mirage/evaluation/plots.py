"""Plots, the contact sheet and the side-by-side video of `mirage evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage_kernels.io import replace_file

from ..media import Panel, contact_sheet, label, load_video, save_video
from ..optional import import_extra
from .loops import CONTACT, PLOTS, VIDEO, EvaluateOptions, make_loop, room_path

_SHOWN = 4  # rooms in the video
_COLORS = ("#444444", "#d95f02", "#1b7837", "#7570b3", "#999999", "#b2182b")


def draw(options: EvaluateOptions, report: dict[str, Any]) -> None:
    """Draw plots, the contact sheet and the video."""
    folder = options.out / PLOTS
    folder.mkdir(exist_ok=True)
    for depth, memories in report["memory_by_depth"].items():
        frames = {name: dict(enumerate(one["true_psnr_per_frame"])) for name, one in memories.items()}
        frames["VAE"] = dict(enumerate(report["ceiling"]["true_psnr_per_frame"]))
        chunks = {
            name: {i: v for i, v in enumerate(one["revisit_psnr_per_chunk"], 1) if v is not None}
            for name, one in memories.items()
        }
        what = "true depth" if depth == "true" else "the head's depth"
        for name, series, title, axis in (
            ("true_psnr", frames, f"against the true images, {what}", "frame"),
            ("revisit_psnr", chunks, f"revisits against first visits, {what}", "chunk"),
        ):
            drawn = {label_: {float(x): y for x, y in points.items() if x} for label_, points in series.items()}
            save_line_chart(folder / f"{name}_{depth}.svg", title, drawn, axis, "PSNR, dB")
    shown = {name: _rooms_shown(options, name) for name in options.memory}
    replace_file(options.out / CONTACT, lambda draft: _sheet(options, report).save(draft, "PNG"))
    save_video(options.out / VIDEO, _side_by_side(options, report, shown), fps=24.0)


def _rooms_shown(options: EvaluateOptions, name: str) -> list[Path]:
    depth = options.depth[0]
    return [room_path(options, depth, name, seed).with_suffix(".mp4") for seed in list(options.seeds)[:_SHOWN]]


def _caption(report: dict[str, Any], name: str) -> str:
    value = report["memory"][name]["revisit_psnr"]
    return name if value is None else f"{name}, revisits {value:.1f} dB"


def _side_by_side(options: EvaluateOptions, report: dict[str, Any], shown: dict[str, list[Path]]) -> Iterator[Tensor]:
    """Show the first rooms one after the other: the truth, and what each memory made of it."""
    for number, seed in enumerate(list(options.seeds)[:_SHOWN]):
        room, _, cameras = make_loop(seed, options.frames, options.size, options.texture)
        true = room.render(cameras).images
        videos = [load_video(paths[number]) for paths in shown.values()]
        for row in zip(true, *videos, strict=False):
            captions = ["true", *(_caption(report, name) for name in shown)]
            tiles = [label(image, caption) for image, caption in zip(row, captions, strict=True)]
            columns = (len(tiles) + 1) // 2 if len(tiles) > 3 else len(tiles)
            tiles += [torch.zeros_like(tiles[0])] * (-len(tiles) % columns)
            rows = [torch.cat(tiles[i : i + columns], 2) for i in range(0, len(tiles), columns)]
            yield torch.cat(rows, 1)


def _sheet(options: EvaluateOptions, report: dict[str, Any]) -> Any:
    """Show the first room's way out, turn and way back: a row for each memory."""
    seed = options.seeds[0]
    room, kind, cameras = make_loop(seed, options.frames, options.size, options.texture)
    last = options.frames - 1
    numbers = sorted({0, last // 4, last // 2, last - last // 4, last})
    rows = {"true": room.render(cameras[numbers], [0.0] * len(numbers)).images}
    for name in options.memory:
        video = load_video(_rooms_shown(options, name)[0])
        rows[name] = torch.stack([frame for i, frame in enumerate(video) if i in numbers])
    panels = [
        [
            Panel(image, f"{name}: frame {number}" if i == 0 else f"frame {number}")
            for i, (image, number) in enumerate(zip(images, numbers, strict=True))
        ]
        for name, images in rows.items()
    ]
    lines = [f"{options.model}, room {seed}, {kind}, {report['depth']} depth"]
    return contact_sheet("Out, around and back", lines, panels)


def save_line_chart(path: Path, title: str, series: dict[str, dict[float, float]], x_axis: str, y_axis: str) -> None:
    """Write an SVG of lines through points {x: y}, the same bytes for the same values.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = import_extra("matplotlib", "evaluate")
    with matplotlib.rc_context({"svg.hashsalt": "mirage", "svg.fonttype": "none", "font.size": 9}):
        figure = import_extra("matplotlib.figure", "evaluate").Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.add_subplot(title=title, xlabel=x_axis, ylabel=y_axis)
        axes.grid(axis="y", color="#dddddd")
        for number, (name, line) in enumerate(series.items()):
            if line:
                marker = "o" if len(line) < 20 else None
                color = _COLORS[number % len(_COLORS)]
                xs, ys = zip(*sorted(line.items()), strict=True)
                axes.plot(xs, ys, color=color, marker=marker, markersize=4, label=name)
        if axes.lines:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        replace_file(path, lambda draft: figure.savefig(draft, format="svg", metadata={"Date": None}))

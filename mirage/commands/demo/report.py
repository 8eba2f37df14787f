"""What `mirage demo` shows of a remembered scene: a table for a terminal, and the contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...media import Panel, contact_sheet, heat_map, paint_holes, upsample
from .measure import Comparison, pool
from .scene import Scene

_ERROR_SCALE = 0.4  # last colour of the error map; the range of colours is 1
_MISSING = (0.95, 0.45, 0.12)  # tint of what the memory does not cover


def format_report(report: dict[str, Any]) -> str:
    """Format the report of :func:`~mirage.commands.demo.memory.run_demo` as a table for a terminal."""

    def mib(key: str) -> str:
        return f"{report[key] / 2**20:.2f} MiB"

    (height, width), (h, w) = report["image_size"], report["grid_size"]
    rows = [
        (report["scene"], "latent memory", "RGB point cloud", ""),
        ("held", f"{report['tokens']:,} tokens", f"{report['cloud_points']:,} points", ""),
        ("size", mib("cache_bytes"), mib("cloud_bytes"), f"{report['memory_ratio']:.0f}x smaller"),
        (
            "  with uint8 colours",
            "",
            mib("cloud_bytes_uint8"),
            f"{report['memory_ratio_uint8']:.0f}x smaller",
        ),
        ("one read", f"{h}x{w}x{report['channels']}", f"{height}x{width}x3", ""),
        (
            f"  on {report['device']} ({report['backend']})",
            f"{report['read_ms']:.3f} ms",
            f"{report['rasterise_ms']:.3f} ms",
            f"{report['speed_ratio']:.0f}x faster",
        ),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows]
    lines.insert(1, "-" * (sum(widths) + 6))
    held_out = _count(report["held_out_frames"], "held-out view")
    lines += [
        "",
        f"{held_out}: {report['coverage']:.1%} covered, readout error {report['readout_error']:.3f}"
        " (0 perfect, 1 nothing remembered)",
        f"decoded: {report['psnr_db']:.1f} dB, of at most {report['codec_psnr_db']:.1f} dB with this codec",
        f"loop: {report['loop_frames']} frames, {report['loop_coverage']:.1%} covered"
        f" (least {report['loop_coverage_min']:.1%}),"
        f" its end {'equals' if report['loop_closes'] else 'DIFFERS FROM'} its start",
    ]
    return "\n".join(lines)


def draw_sheet(
    scene: Scene,
    report: dict[str, Any],
    comparisons: Sequence[Comparison],
    strip: Sequence[tuple[int, Tensor]],
) -> Any:
    """Draw the contact sheet, with the held-out view whose readout error is the median one."""
    seen = [i for i, view in enumerate(comparisons) if view.mask.any()]
    shown = sorted(seen, key=lambda i: comparisons[i].error)[(len(seen) - 1) // 2]
    view, name, written = comparisons[shown], scene.held_out.names[shown], scene.written
    size = scene.held_out.cameras.image_size
    figures = pool([view])

    centre = scene.held_out.cameras.centers[shown]
    beside = int((written.cameras.centers - centre).norm(dim=1).argmin())
    among = f", one of {len(written)}" if len(written) > 1 else ""
    difference = heat_map((view.decoded - view.truth).abs().mean(0), 0.0, _ERROR_SCALE, "inferno")
    near, far = (view.depth[view.mask].quantile(q).item() for q in (0.02, 0.98))
    depth = heat_map(upsample(view.depth, size), far, near, "viridis")
    grey = view.truth.mean(0).expand(3, *size)
    missing = torch.tensor(_MISSING)[:, None, None] * (0.45 + 0.55 * grey)
    coverage = torch.where(upsample(view.mask, size), 0.15 + 0.75 * grey, missing)
    rows = [
        [
            Panel(written.images[beside], f"written: {written.names[beside]}{among}"),
            Panel(paint_holes(view.decoded, view.mask), f"read at: {name}, decoded"),
            Panel(view.truth, f"truth: {name}, held out"),
        ],
        [
            Panel(
                paint_holes(difference, view.mask),
                f"error: PSNR {figures['psnr_db']:.1f} dB",
                ("inferno", "0", f"{_ERROR_SCALE:g}"),
            ),
            Panel(coverage, f"coverage: {figures['coverage']:.1%}, the rest orange"),
            Panel(
                paint_holes(depth, view.mask),
                "depth of the readout",
                ("viridis", f"{far:.1f} m", f"{near:.1f} m"),
            ),
        ],
        [Panel(image, f"loop: {i + 1} / {len(scene.loop)}") for i, image in strip],
    ]
    lines = [
        f"{scene.name}: {_count(len(written), 'view')} kept as {report['tokens']:,} latent tokens,"
        f" {report['cache_bytes'] / 2**20:.2f} MiB: {report['memory_ratio']:.0f}x less than"
        f" {report['cloud_points']:,} coloured points of the same pixels"
    ]
    footer = (
        "Each cell shows the tokens that fit it best, decoded alone by a linear patch codec that stands in for"
        " the VAE: hence the blocks. Dark checker: nothing known."
    )
    return contact_sheet("Mirage: latent spatial memory", lines, rows, footer)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")

"""Pictures for people: holes painted as holes, heat maps, labelled contact sheets, videos.

Images are tensors (3, H, W) float in [0, 1], on any device. Writers replace their file in one step.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage_kernels.storage import replace_file

from .extras import import_extra

# Nine evenly spaced colours of matplotlib's maps of these names, so that a picture needs no plotting library.
PALETTES = {
    "inferno": "000004 210c4a 57106e 8a226a bc3754 e45a31 f98e09 f9cb35 fcffa4",
    "viridis": "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725",
}

_BACKGROUND, _TEXT, _FAINT = (17, 19, 23), (236, 239, 244), (148, 155, 166)
_MARGIN, _GAP, _CAPTION = 36, 18, 34
_CHECKER = (0.13, 0.17)  # greys no photograph mistakes for its own
_CHECKER_PIXELS = 8


def upsample(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Values of a grid (..., h, w) as pixels (..., H, W), `size` = (H, W) a multiple of it: nearest."""
    rows, columns = size[0] // cells.shape[-2], size[1] // cells.shape[-1]
    return cells.repeat_interleave(rows, -2).repeat_interleave(columns, -1)


def paint_holes(image: Tensor, mask: Tensor) -> Tensor:
    """`image` (3, H, W) with a dark checker where `mask` (h, w) bool is False: nothing is known there."""
    height, width = image.shape[1:]
    row = torch.arange(height, device=image.device)[:, None] // _CHECKER_PIXELS
    column = torch.arange(width, device=image.device) // _CHECKER_PIXELS
    checker = torch.where((row + column) % 2 == 0, *_CHECKER).to(image.dtype)
    return torch.where(upsample(mask, (height, width)), image, checker)


def heat_map(values: Tensor, low: float, high: float, palette: str) -> Tensor:
    """(H, W) float to (3, H, W): `low` and beyond takes the first colour of `palette`, `high` the last.

    `low` may be the larger of the two; equal, everything takes the first colour.
    """
    colours = _palette(palette).to(values.device)
    scale = 1.0 / (high - low) if high != low else 0.0
    position = ((values - low) * scale).clamp(0.0, 1.0) * (len(colours) - 1)
    index = position.long().clamp(max=len(colours) - 2)
    weight = (position - index)[..., None]
    return torch.lerp(colours[index], colours[index + 1], weight).permute(2, 0, 1)


@dataclass(frozen=True)
class Panel:
    """A picture of a contact sheet: `image` (3, H, W) float in [0, 1], its caption, what its colours mean.

    `legend` is (palette, what the first colour stands for, what the last one stands for).
    """

    image: Tensor
    caption: str
    legend: tuple[str, str, str] | None = None


def contact_sheet(
    title: str, lines: Sequence[str], rows: Sequence[Sequence[Panel]], footer: str = "", width: int = 1600
) -> Any:
    """A `PIL.Image` of `width` pixels: title, lines under it, rows of panels of one size each, footer.

    Raises:
        MissingExtraError: pillow is not installed.
    """
    image_module = import_extra("PIL.Image", "demo")
    draw_module = import_extra("PIL.ImageDraw", "demo")
    font = import_extra("PIL.ImageFont", "demo").load_default

    def panel_size(row: Sequence[Panel]) -> tuple[int, int]:
        """(height, width) of the pictures of a row, by its first."""
        columns = (width - 2 * _MARGIN - (len(row) - 1) * _GAP) // len(row)
        return round(columns * row[0].image.shape[1] / row[0].image.shape[2]), columns

    head = _MARGIN + 52 + 30 * len(lines)
    height = head + sum(_GAP + _CAPTION + panel_size(row)[0] for row in rows)
    height += (_GAP + 26 if footer else 0) + _MARGIN
    sheet = image_module.new("RGB", (width, height), _BACKGROUND)
    draw = draw_module.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, _TEXT, font(38), anchor="lt")
    for i, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + 52 + 30 * i), line, _FAINT, font(23), anchor="lt")
    top = head
    for row in rows:
        rows_high, columns = panel_size(row)
        top += _GAP
        for i, panel in enumerate(row):
            left = _MARGIN + i * (columns + _GAP)
            baseline = top + _CAPTION - 11
            draw.text((left, baseline), panel.caption, _TEXT, font(21), anchor="ls")
            if panel.legend is not None:
                palette, first, last = panel.legend
                end = left + columns - draw.textlength(last, font(19))
                bar = heat_map(torch.linspace(0.0, 1.0, 90).expand(14, 90), 0.0, 1.0, palette)
                draw.text((end, baseline), last, _FAINT, font(19), anchor="ls")
                sheet.paste(_to_pil(bar), (int(end) - 98, baseline - 14))
                draw.text((end - 106, baseline), first, _FAINT, font(19), anchor="rs")
            picture = _to_pil(panel.image).resize((columns, rows_high), image_module.Resampling.LANCZOS)
            sheet.paste(picture, (left, top + _CAPTION))
        top += _CAPTION + rows_high
    if footer:
        draw.text((_MARGIN, top + _GAP), footer, _FAINT, font(19), anchor="lt")
    return sheet


def save_video(path: str | os.PathLike[str], frames: Iterable[Tensor], fps: float) -> None:
    """Write `frames`, each (3, H, W) float in [0, 1] with even H and W, as an MP4 that browsers play (H.264).

    Raises:
        MissingExtraError: imageio-ffmpeg is not installed.
        ValueError: no frames, or an odd side, which H.264's colour format cannot hold.
    """
    ffmpeg = import_extra("imageio_ffmpeg", "demo")

    def write(draft: str) -> None:
        writer = None
        try:
            for frame in frames:
                height, width = frame.shape[1:]
                if height % 2 or width % 2:
                    raise ValueError(f"frames must have even sides, got {tuple(frame.shape)}")
                if writer is None:
                    writer = ffmpeg.write_frames(
                        draft,
                        (width, height),
                        fps=fps,
                        codec="libx264",
                        pix_fmt_out="yuv420p",
                        macro_block_size=2,
                        quality=None,  # by -crf
                        ffmpeg_log_level="error",
                        # faststart: the index comes first, so that it plays while it loads.
                        output_params=["-crf", "18", "-movflags", "+faststart", "-f", "mp4"],
                    )
                    writer.send(None)
                writer.send(_to_bytes(frame))
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            raise ValueError("frames must hold at least one frame, got none")

    replace_file(Path(path), write)


def join_videos(path: str | os.PathLike[str], parts: Sequence[str | os.PathLike[str]]) -> None:
    """Write the videos `parts`, made by :func:`save_video` with one size and rate, as one, without encoding them again.

    Raises:
        MissingExtraError: imageio-ffmpeg is not installed.
        ValueError: no parts, or one that is not such a video.
    """
    ffmpeg = import_extra("imageio_ffmpeg", "demo").get_ffmpeg_exe()
    if not parts:
        raise ValueError("parts must hold at least one video, got none")
    quoted = (str(Path(part).resolve()).replace("'", "'\\''") for part in parts)
    playlist = "".join(f"file '{part}'\n" for part in quoted)

    def write(draft: str) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as listing:
            listing.write(playlist)
            listing.flush()
            command = [ffmpeg, "-y", "-loglevel", "error", "-f", "concat", "-safe", "0", "-i", listing.name]
            command += ["-c", "copy", "-movflags", "+faststart", "-f", "mp4", draft]
            done = subprocess.run(command, text=True, capture_output=True)
        if done.returncode:
            raise ValueError(f"parts must be videos of one size and rate: {done.stderr.strip()}")

    replace_file(Path(path), write)


def load_video(path: str | os.PathLike[str]) -> Iterator[Tensor]:
    """The frames of a video, each (3, H, W) float32 in [0, 1].

    Raises:
        MissingExtraError: imageio-ffmpeg is not installed.
        OSError: no such video.
    """
    reader = import_extra("imageio_ffmpeg", "demo").read_frames(str(path))
    width, height = next(reader)["size"]
    for content in reader:
        pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(height, width, 3)
        yield pixels.permute(2, 0, 1).float() / 255.0


def _to_bytes(image: Tensor) -> Any:
    """`image` (3, H, W) float in [0, 1] as a uint8 numpy array (H, W, 3)."""
    return (image.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()


def _to_pil(image: Tensor) -> Any:
    return import_extra("PIL.Image", "demo").fromarray(_to_bytes(image))


def _palette(name: str) -> Tensor:
    """(colours, 3) float in [0, 1]."""
    codes = [bytes.fromhex(code) for code in PALETTES[name].split()]
    return torch.tensor([list(code) for code in codes], dtype=torch.float32) / 255.0

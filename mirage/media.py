"""Images and videos for people: holes painted as holes, heat maps, labelled contact sheets, videos.

Images are tensors (3, H, W) float in [0, 1], on any device. Writers replace their file in one step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage_kernels.io import replace_file

from .optional import import_extra

# Nine evenly spaced colours of matplotlib's maps of these names, so that an image needs no plotting library.
PALETTES = {
    "inferno": "000004 210c4a 57106e 8a226a bc3754 e45a31 f98e09 f9cb35 fcffa4",
    "viridis": "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725",
}

_BACKGROUND, _TEXT, _FAINT = (17, 19, 23), (236, 239, 244), (148, 155, 166)
_MARGIN, _GAP, _CAPTION = 36, 18, 34
_STRIP = 28
_CHECKER = (0.13, 0.17)  # greys no photograph mistakes for its own
_CHECKER_PIXELS = 8


def upsample(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample values of a grid (..., h, w) to pixels (..., H, W), `size` = (H, W) a multiple of it: nearest."""
    rows, columns = size[0] // cells.shape[-2], size[1] // cells.shape[-1]
    return cells.repeat_interleave(rows, -2).repeat_interleave(columns, -1)


def paint_holes(image: Tensor, mask: Tensor) -> Tensor:
    """Paint `image` (3, H, W) with a dark checker where `mask` (h, w) bool is False: nothing is known there."""
    height, width = image.shape[1:]
    row = torch.arange(height, device=image.device)[:, None] // _CHECKER_PIXELS
    column = torch.arange(width, device=image.device) // _CHECKER_PIXELS
    checker = torch.where((row + column) % 2 == 0, *_CHECKER).to(image.dtype)
    return torch.where(upsample(mask, (height, width)), image, checker)


def heat_map(values: Tensor, low: float, high: float, palette: str) -> Tensor:
    """Color (H, W) float as (3, H, W): `low` and beyond takes the first colour of `palette`, `high` the last.

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
    """An image of a contact sheet: `image` (3, H, W) float in [0, 1], its caption, what its colours mean.

    `legend` is (palette, what the first colour stands for, what the last one stands for).
    """

    image: Tensor
    caption: str
    legend: tuple[str, str, str] | None = None


def contact_sheet(
    title: str, lines: Sequence[str], rows: Sequence[Sequence[Panel]], footer: str = "", width: int = 1600
) -> Any:
    """Compose a `PIL.Image` of `width` pixels: title, lines under it, rows of panels of one size each, footer.

    Raises:
        MissingExtraError: pillow is not installed.
    """
    image_module = import_extra("PIL.Image", "demo")
    draw_module = import_extra("PIL.ImageDraw", "demo")
    font = import_extra("PIL.ImageFont", "demo").load_default

    def panel_size(row: Sequence[Panel]) -> tuple[int, int]:
        """Compute (height, width) of the images of a row from its first."""
        columns = (width - 2 * _MARGIN - (len(row) - 1) * _GAP) // len(row)
        return round(columns * row[0].image.shape[1] / row[0].image.shape[2]), columns

    title, lines, footer = _one_line(title), [_one_line(line) for line in lines], _one_line(footer)
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
            draw.text((left, baseline), _one_line(panel.caption), _TEXT, font(21), anchor="ls")
            if panel.legend is not None:
                palette, first, last = panel.legend
                end = left + columns - draw.textlength(last, font(19))
                bar = heat_map(torch.linspace(0.0, 1.0, 90).expand(14, 90), 0.0, 1.0, palette)
                draw.text((end, baseline), last, _FAINT, font(19), anchor="ls")
                sheet.paste(_to_pil(bar), (int(end) - 98, baseline - 14))
                draw.text((end - 106, baseline), first, _FAINT, font(19), anchor="rs")
            drawn = _to_pil(panel.image).resize((columns, rows_high), image_module.Resampling.LANCZOS)
            sheet.paste(drawn, (left, top + _CAPTION))
        top += _CAPTION + rows_high
    if footer:
        draw.text((_MARGIN, top + _GAP), footer, _FAINT, font(19), anchor="lt")
    return sheet


def label(image: Tensor, caption: str, width: int = 320) -> Tensor:
    """Label `image` (3, H, W), enlarged by a whole number to about `width` columns, under a strip with `caption`.

    Raises:
        MissingExtraError: pillow is not installed.
    """
    factor = max(round(width / image.shape[2]), 1)
    large = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    strip = import_extra("PIL.Image", "demo").new("RGB", (large.shape[2], _STRIP), _BACKGROUND)
    font = import_extra("PIL.ImageFont", "demo").load_default(17)
    import_extra("PIL.ImageDraw", "demo").Draw(strip).text(
        (8, _STRIP // 2), _one_line(caption), _TEXT, font, anchor="lm"
    )
    pixels = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8).view(_STRIP, large.shape[2], 3)
    return torch.cat([pixels.permute(2, 0, 1).float().to(large.device) / 255.0, large], 1)


def _one_line(text: str) -> str:
    """Return text as it can be drawn: in one line, without halves of characters, as file names may have them."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def save_video(path: str | os.PathLike[str], frames: Iterable[Tensor], fps: float) -> None:
    """Write `frames`, each (3, H, W) float in [0, 1] with even H and W, as an MP4 that browsers play (H.264).

    Raises:
        MissingExtraError: imageio-ffmpeg is not installed.
        ValueError: no frames, or an odd side, which H.264's colour format cannot hold.
        OSError: the encoder failed, or its file could not be written.
    """
    ffmpeg = import_extra("imageio_ffmpeg", "demo").get_ffmpeg_exe()
    rest = iter(frames)
    first = next(rest, None)
    if first is None:
        raise ValueError("frames must hold at least one frame, got none")
    height, width = first.shape[1:]
    if height % 2 or width % 2:
        raise ValueError(f"frames must have even sides, got {tuple(first.shape)}")

    def pixels() -> Iterator[bytes]:
        for frame in chain([first], rest):
            if frame.shape != first.shape:
                raise ValueError(f"frames must all be {tuple(first.shape)}, got {tuple(frame.shape)}")
            yield _to_bytes(frame).tobytes()

    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-"]
    # No B-frames: frames are stored in the order they are shown, so that joined videos need no new timestamps.
    target = ["-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "18", "-bf", "0", *_PLAYABLE]
    replace_file(Path(path), lambda draft: _run_ffmpeg(ffmpeg, [*source, *target, _file_url(draft)], pixels()))


def join_videos(path: str | os.PathLike[str], parts: Sequence[str | os.PathLike[str]]) -> None:
    """Write the videos `parts`, made by :func:`save_video` with one size and rate, as one, without encoding them again.

    Raises:
        MissingExtraError: imageio-ffmpeg is not installed.
        ValueError: no parts.
        OSError: a part is missing or broken, or the file could not be written.
    """
    ffmpeg = import_extra("imageio_ffmpeg", "demo").get_ffmpeg_exe()
    if not parts:
        raise ValueError("parts must hold at least one video, got none")
    with _plain_names(parts) as (folder, names):
        quoted = (name.replace("'", "'\\''") for name in names)
        listing = Path(folder, "list.txt")
        listing.write_text("".join(f"file '{name}'\n" for name in quoted), encoding="utf-8", errors="surrogateescape")
        source = ["-f", "concat", "-safe", "0", "-i", _file_url(listing), "-c", "copy"]
        replace_file(Path(path), lambda draft: _run_ffmpeg(ffmpeg, [*source, *_PLAYABLE, _file_url(draft)]))


# faststart: the index comes first, so that it plays while it loads
_PLAYABLE = ["-movflags", "+faststart", "-f", "mp4"]


def _file_url(path: str | os.PathLike[str]) -> str:
    """Return a file's name as ffmpeg takes it for a file, which it may not with "a:b" or "pipe:1"."""
    return f"file:{os.path.abspath(path)}"


@contextmanager
def _plain_names(paths: Sequence[str | os.PathLike[str]]) -> Iterator[tuple[str, list[str]]]:
    """Link files under plain names in a temporary folder: a line break in a name would break a listing.

    Yields:
        The folder, and a name for each: relative to the folder, or absolute where the system makes no links.
    """
    with tempfile.TemporaryDirectory(prefix="mirage-") as folder:
        names = []
        for i, path in enumerate(paths):
            target, name = os.path.realpath(path), f"{i}.mp4"
            try:
                os.symlink(target, os.path.join(folder, name))
            except OSError:  # Windows, where not everyone may; names have no line breaks there
                name = target
            names.append(name)
        yield folder, names


def _run_ffmpeg(ffmpeg: str, arguments: list[str], content: Iterable[bytes] = ()) -> None:
    """Run ffmpeg with `content` on its standard input; anything it prints is an OSError, whatever it exits with."""
    command = [ffmpeg, "-y", "-xerror", "-loglevel", "error", *arguments]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=complaints)
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):  # it has ended early, and says below why
                for piece in content:
                    process.stdin.write(piece)
                process.stdin.close()
        except BaseException:
            process.kill()
            raise
        finally:
            status = process.wait()
        complaints.seek(0)
        text = complaints.read().decode(errors="replace").strip()
    if status or text:
        with suppress(ValueError):  # killed, such as by SIGXFSZ where files may not grow further
            text = text or f"it was ended by {signal.Signals(-status).name}"
        raise OSError(f"ffmpeg could not write the video (exit status {status}): {text or 'it gave no reason'}")


def load_video(path: str | os.PathLike[str]) -> Iterator[Tensor]:
    """Load the frames of a video, each (3, H, W) float32 in [0, 1].

    Raises:
        MissingExtraError: imageio-ffmpeg is not installed.
        OSError: no such video, or no whole one.
    """
    read_frames = import_extra("imageio_ffmpeg", "demo").read_frames
    if not Path(path).is_file():
        raise FileNotFoundError(f"no video at {path}")
    with _plain_names([path]) as (folder, [name]):
        try:
            reader = read_frames(_file_url(Path(folder, name)))
            width, height = next(reader)["size"]
            for content in reader:
                pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(height, width, 3)
                yield pixels.permute(2, 0, 1).float() / 255.0
        except (OSError, RuntimeError, LookupError, StopIteration) as error:
            said = str(error).strip().splitlines() or ["nothing in it"]
            raise OSError(f"{path}: ffmpeg cannot read it as a video: {said[-1]}") from error


def _to_bytes(image: Tensor) -> Any:
    """Convert `image` (3, H, W) float in [0, 1] to a uint8 numpy array (H, W, 3)."""
    return (image.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()


def _to_pil(image: Tensor) -> Any:
    return import_extra("PIL.Image", "demo").fromarray(_to_bytes(image))


def _palette(name: str) -> Tensor:
    """Parse a palette: (colours, 3) float in [0, 1]."""
    codes = [bytes.fromhex(code) for code in PALETTES[name].split()]
    return torch.tensor([list(code) for code in codes], dtype=torch.float32) / 255.0

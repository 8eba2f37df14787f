"""The second part of `mirage demo`: mirage-tiny generates a walk through a room and back, with its memory and without.

Both videos have the same first frame, cameras and noise; depth is that of the depth head, so that nothing but the first
frame is known of the room. "Without" is the same backbone, trained as long without a memory: it is shown the cameras'
rays instead.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

import torch

from mirage_kernels.io import replace_file, replace_text

from ...evaluation.closed_loop import generate_loop, load_memory, measure
from ...evaluation.loops import EvaluateOptions, make_loop
from ...evaluation.report import OWN, summarise
from ...media import Panel, contact_sheet, label, save_video
from ...optional import import_extra
from ...zoo import MIRAGE_TINY, default_steps

WORLD_VIDEO, WORLD_SHEET, WORLD_REPORT = "world.mp4", "world.png", "world.json"
SEED = 10_000  # the first room of `mirage evaluate`, never trained on
CAPTIONS = {"none": "without a memory", "aligned": "with its memory"}

_FPS = 24.0


def run_walk(
    out: Path,
    model: str = MIRAGE_TINY,
    device: Literal["cpu", "cuda"] = "cpu",
    frames: int = 97,
    seed: int = SEED,
    steps: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Generate one loop twice, and put both beside the true frames.

    Args:
        out: folder for world.mp4 (the truth, without and with the memory), world.png and world.json.
        model: as of `mirage evaluate`; the weights for no memory are those of its folder memories/none.
        device: "cpu" or "cuda".
        frames: 4 n + 1 frames of the loop.
        seed: of the room; its kind of loop is that of `mirage evaluate`.
        steps: of denoising; default 2 of mirage-tiny, 20 of others, as `mirage evaluate`.
        progress: show a progress bar, on stderr.

    Returns:
        The content of world.json: model, seed, loop, frames, revisit_psnr and novel_psnr {none, aligned} in dB (see
        `mirage evaluate`), tokens and memory_bytes of the memory, seconds.

    Raises:
        MissingExtraError: a package of the extra `generate` is not installed.
        OSError, ValueError: naming what cannot be used.
    """
    for module in ("diffusers", "transformers", "accelerate", "peft", "ftfy", "tqdm", "PIL", "imageio_ffmpeg"):
        import_extra(module, "generate")
    began = time.perf_counter()
    steps = default_steps(model) if steps is None else steps
    options = EvaluateOptions(out=out, model=model, frames=frames, steps=steps, device=device)
    room, kind, cameras = make_loop(seed, frames, options.size, options.texture)
    true = room.render(cameras)
    videos, measured, costs = {}, {}, {}
    names = import_extra("tqdm", "generate").tqdm(CAPTIONS, disable=not progress, leave=False, desc="generate")
    for name in names:
        pipeline, weights = load_memory(options, name)
        if name == "none" and weights == OWN:
            raise FileNotFoundError(f"{model}: must hold memories/none, weights that were trained without a memory")
        videos[name], costs[name] = generate_loop(options, pipeline, name, "head", room, true)
        measured[name] = measure(videos[name], true, options.chunk_frames)
        del pipeline
    figures = {name: summarise([one]) for name, one in measured.items()}
    report = {
        "model": model,
        "seed": seed,
        "loop": kind,
        "frames": frames,
        **{metric: {name: one[metric] for name, one in figures.items()} for metric in ("revisit_psnr", "novel_psnr")},
        "tokens": costs["aligned"]["tokens"],
        "memory_bytes": costs["aligned"]["memory_bytes"],
    }
    columns = {"the true room": true.images, **{CAPTIONS[name]: made for name, made in videos.items()}}
    out.mkdir(parents=True, exist_ok=True)
    save_video(
        out / WORLD_VIDEO,
        (torch.cat([label(column[i], caption) for caption, column in columns.items()], 2) for i in range(frames)),
        _FPS,
    )
    last = frames - 1
    shown = sorted({0, last // 4, last // 2, last - last // 4, last})
    rows = [
        [Panel(column[i], f"{caption}, frame {i}" if i == 0 else f"frame {i}") for i in shown]
        for caption, column in columns.items()
    ]
    sheet = contact_sheet("A walk out and back", _lines(report), rows)
    replace_file(out / WORLD_SHEET, lambda draft: sheet.save(draft, "PNG"))
    report["seconds"] = time.perf_counter() - began
    replace_text(out / WORLD_REPORT, json.dumps(report, indent=2) + "\n")
    return report


def format_walk(report: dict[str, Any]) -> str:
    """Format the report of :func:`run_walk` for a terminal."""
    return "\n".join([f"{report['model']} in a room it has never seen", *(f"  {line}" for line in _lines(report))])


def _lines(report: dict[str, Any]) -> list[str]:
    def pair(name: str) -> str:
        without, with_ = (report[name][key] for key in ("none", "aligned"))
        return "not measured" if with_ is None else f"{with_:.1f} dB with its memory, {without:.1f} dB without"

    return [
        f"{report['frames']} generated frames ({report['loop']}), {report['tokens']:,} tokens remembered,"
        f" {report['memory_bytes'] / 2**20:.2f} MiB",
        f"a frame against its first visit: {pair('revisit_psnr')}",
        f"new views against the true room: {pair('novel_psnr')}",
    ]

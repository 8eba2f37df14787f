"""`mirage evaluate`: what a memory is worth. Loops through synthetic rooms, where every true image is known.

A loop starts from a room's true first image and its depth; everything after is generated. When the camera comes back,
the frame is compared with its first visit ("revisit") and with the true image; frames of poses that are new are
compared with the true images ("novel"). Every memory generates the same rooms from the same noise. Rooms are static.

    rooms/<depth>/<memory>/001000.json, .mp4    one room: written atomically, so that a run can be resumed
    report.json report.md plots/*.svg contact.png side_by_side.mp4    all rooms
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirage_kernels.io import replace_text

from ..media import save_video
from ..optional import import_extra
from ..pipeline.chunks import TEMPORAL_COMPRESSION, check_num_frames, plan_chunks
from ..pipeline.memory import MEMORIES, WRITE_POLICIES
from ..scenes.synthetic import SyntheticFrames, SyntheticRoom
from ..zoo import default_steps, load_pipeline, memory_weights, take_weights
from .loops import CEILING, DEPTHS, LOOPS, REPORT, TABLE, EvaluateOptions, make_loop, room_path
from .metrics import consistency, find_first_visits, find_revisits, load_lpips, psnr, ssim
from .plots import draw
from .report import OWN, format_report, goals, summarise

_VERSION = 5
_PRECEDING = 2  # latent frames before a chunk that the model sees anyway


def run_evaluate(options: EvaluateOptions, progress: bool = True) -> dict[str, Any]:
    """Generate every room with every memory, measure, and write the report into `options.out`.

    Rooms that are there already are not generated again. Each memory is run with its own weights, `options.weights` or
    `MODEL/memories/NAME` (what `mirage train` leaves: memory_adapter/, lora.safetensors, latent_depth/), or, where
    there are none, with the model's own; the report says which.

    Returns:
        The report: `memory` {name: figures} with the first of `options.depth`, `memory_by_depth` {depth: {name:
        figures}}, `ceiling`, `goals`, and how it was made. Figures are means over rooms of means over a room's frames;
        `*_stderr` is the standard error over rooms.

    Raises:
        MissingExtraError: a package of the extra `generate` is not installed.
        OSError, ValueError: naming what cannot be used; what is in `out` was made with other settings or weights.
    """
    began = time.perf_counter()
    for module in ("diffusers", "transformers", "accelerate", "peft", "ftfy", "tqdm", "PIL", "imageio_ffmpeg"):
        import_extra(module, "generate")
    if options.steps is None:
        options = replace(options, steps=default_steps(options.model))
    _check(options)
    lpips = load_lpips(options.device)
    _record(options)
    total = len(options.seeds) * (1 + len(options.memory) * len(options.depth))
    with import_extra("tqdm", "generate").tqdm(total=total, disable=not progress, leave=False) as bar:
        measured: dict[str, dict[str, list[dict[str, Any]]]] = {depth: {} for depth in options.depth}
        used: dict[str, str] = {}
        controls: dict[str, str | None] = {}
        for name in options.memory:
            pipeline, used[name] = load_memory(options, name)
            controls[name] = None if pipeline.memory_adapter is None else pipeline.memory_adapter.config.control
            if CEILING not in used:
                used[CEILING] = "the VAE alone"
                ceiling = _all_rooms(options, pipeline, CEILING, "true", lpips, bar)
            for depth in options.depth:
                if depth == "head" and pipeline.latent_depth is None:
                    raise ValueError(f"depth must be true: {used[name]} of memory {name} has no latent_depth")
                source = options.depth[0] if name == "none" else depth  # nothing is written: depth does not matter
                measured[depth][name] = _all_rooms(options, pipeline, name, source, lpips, bar)
            del pipeline
    report = _report(options, measured, ceiling, used, controls, lpips is not None)
    report["seconds"] = time.perf_counter() - began
    replace_text(options.out / REPORT, json.dumps(report, indent=2) + "\n")
    replace_text(options.out / TABLE, format_report(report))
    draw(options, report)
    return report


# One room.


def _all_rooms(
    options: EvaluateOptions, pipeline: Any, name: str, depth: str, lpips: Callable[..., Tensor] | None, bar: Any
) -> list[dict[str, Any]]:
    made = []
    for seed in options.seeds:
        bar.set_description(f"{name}, {depth} depth, room {seed}")
        made.append(_one_room(options, pipeline, name, depth, seed, lpips))
        bar.update()
    return made


def _one_room(
    options: EvaluateOptions, pipeline: Any, name: str, depth: str, seed: int, lpips: Callable[..., Tensor] | None
) -> dict[str, Any]:
    """Get the measurements of a room: from its file, or generated and measured now."""
    path = room_path(options, depth, name, seed)
    weights = _fingerprints(pipeline, name)
    if path.exists():
        done: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if done["weights"] != weights:
            raise ValueError(f"{path}: made with other weights than those of memory {name} now: name another --out")
        return done
    room, kind, cameras = make_loop(seed, options.frames, options.size, options.texture)
    true = room.render(cameras)
    began = time.perf_counter()
    frames, cost = (
        _recode(pipeline, true) if name == CEILING else generate_loop(options, pipeline, name, depth, room, true)
    )
    measured = {
        "version": _VERSION,
        "seed": seed,
        "loop": kind,
        "depth": depth,
        "weights": weights,
        **measure(frames, true, options.chunk_frames, lpips),
        **cost,
        "seconds": time.perf_counter() - began,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_video(path.with_suffix(".mp4"), frames, fps=24.0)
    replace_text(path, json.dumps(measured) + "\n")  # the last act: from now on the room is done
    return measured


def generate_loop(
    options: EvaluateOptions, pipeline: Any, name: str, depth: str, room: SyntheticRoom, true: SyntheticFrames
) -> tuple[Tensor, dict[str, Any]]:
    """Generate a loop with a memory: frames (N, 3, H, W) in [0, 1], and what they cost.

    Args:
        pipeline: of :func:`load_memory`.
        name: of the memory.
        depth: "true", or "head".
        true: of the loop's cameras; its first image is where generation starts.
    """
    with pipeline.start_session(
        true.images[0],
        room.prompt,
        depth=true.depth if depth == "true" else None,
        num_frames=options.frames,
        height=options.size[0],
        width=options.size[1],
        num_inference_steps=default_steps(options.model) if options.steps is None else options.steps,
        guidance_scale=options.guidance,
        preceding_frames=_PRECEDING,
        generator=torch.Generator().manual_seed(room.seed),
        static_filter="none",
        memory=replace(MEMORIES[name], write_policy=options.write_policy) if name == "aligned" else name,
    ) as session:
        chunks = list(session.run(true.cameras, options.chunk_frames))
    frames = torch.cat([chunk.frames.cpu() for chunk in chunks])
    cost = {
        "memory_bytes": chunks[-1].metrics["cache_bytes"],
        "tokens": chunks[-1].metrics["tokens"],
        "coverage": [chunk.metrics["coverage"] for chunk in chunks],
        "read_seconds": sum(chunk.metrics["seconds"]["read"] for chunk in chunks) / len(chunks),
    }
    return frames, cost


@torch.no_grad()
def _recode(pipeline: Any, true: SyntheticFrames) -> tuple[Tensor, dict[str, Any]]:
    from ..models.vae import StreamingDecoder, encode_frames

    latents = encode_frames(pipeline.vae, true.images.movedim(0, 1)[None] * 2.0 - 1.0)
    video = StreamingDecoder(pipeline.vae).decode(latents)[0].movedim(1, 0)
    return (video.float() * 0.5 + 0.5).clamp(0, 1).cpu(), {}


def measure(
    frames: Tensor, true: SyntheticFrames, chunk_frames: int = 33, lpips: Callable[..., Tensor] | None = None
) -> dict[str, Any]:
    """Compare a generated loop with the true one, and with itself where it comes back.

    Args:
        frames: (N, 3, H, W) float32 in [0, 1].
        true: the N true frames.
        chunk_frames: as generated. A revisit counts where its first visit is so far back that the model cannot have
            seen it but through a memory: a chunk and the latent frames that precede it.
        lpips: of :func:`~mirage.evaluation.metrics.load_lpips`.

    Returns:
        Plain values: chunks [[start, stop], ..]; true {psnr, ssim, mse, lpips: one value a frame}; revisits [[first
        visit, revisit], ..]; revisit {psnr, ssim, lpips: one value a revisit}; first_visits, photometric, reprojection.
    """
    apart = chunk_frames + TEMPORAL_COMPRESSION * _PRECEDING
    revisits = find_revisits(true.cameras, apart)
    before, after = ([pair[i] for pair in revisits] for i in (0, 1))

    def compare(left: Tensor, right: Tensor) -> dict[str, Any]:
        if not len(left):
            return {"psnr": [], "ssim": [], "lpips": None if lpips is None else []}
        return {
            "psnr": psnr(left, right).tolist(),
            "ssim": ssim(left, right).tolist(),
            "lpips": None if lpips is None else lpips(left, right).tolist(),
        }

    return {
        "chunks": [[chunk.start, chunk.stop] for chunk in plan_chunks(len(frames), chunk_frames)],
        "true": compare(frames, true.images) | {"mse": (frames - true.images).square().flatten(1).mean(1).tolist()},
        "revisits": [list(pair) for pair in revisits],
        "revisit": compare(frames[after], frames[before]),
        "first_visits": find_first_visits(true.cameras),
        **consistency(frames, true.images, true.depth, true.cameras),
    }


# Weights.


def load_memory(options: EvaluateOptions, name: str) -> tuple[Any, str]:
    """Load the pipeline with the weights of a memory; also return where they are from.

    Raises:
        OSError, ValueError: naming what cannot be used.
    """
    pipeline = load_pipeline(
        options.model, adapter=options.adapter, lora=options.lora, device=options.device, dtype=options.dtype
    )
    folder = _weights_of(options, name)
    if folder is None:
        return pipeline, OWN
    take_weights(pipeline, folder)
    return pipeline, str(folder if name in options.weights else Path(options.model, "memories", name))


def _weights_of(options: EvaluateOptions, name: str) -> Path | None:
    if name in options.weights:
        return options.weights[name]
    return memory_weights(options.model, name)


def _fingerprints(pipeline: Any, name: str) -> dict[str, str | None]:
    from ..models.components import fingerprint

    parts = ("vae",) if name == CEILING else ("vae", "transformer", "memory_adapter", "latent_depth")
    return {part: fingerprint(getattr(pipeline, part)) for part in parts}


# All rooms.


def _report(
    options: EvaluateOptions,
    measured: dict[str, dict[str, list[dict[str, Any]]]],
    ceiling: list[dict[str, Any]],
    used: dict[str, str],
    controls: dict[str, str | None],
    has_lpips: bool,
) -> dict[str, Any]:
    by_depth = {
        depth: {
            name: {"depth": "unused" if name == "none" else depth, "weights": used[name], "control": controls[name]}
            | summarise(rooms)
            for name, rooms in memories.items()
        }
        for depth, memories in measured.items()
    }
    primary = by_depth[options.depth[0]]
    return {
        "version": _VERSION,
        "model": options.model,
        "seeds": [options.seeds.start, options.seeds.stop],
        "rooms": len(options.seeds),
        "loops": list(LOOPS),
        "frames": options.frames,
        "size": list(options.size),
        "steps": options.steps,
        "guidance": options.guidance,
        "chunk_frames": options.chunk_frames,
        "write_policy": options.write_policy,
        "texture": options.texture,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "lpips": has_lpips,
        "depth": options.depth[0],
        "memory": primary,
        "memory_by_depth": by_depth,
        "ceiling": summarise(ceiling),
        "goals": {depth: goals(figures) for depth, figures in by_depth.items()},
    }


# Files.


def _record(options: EvaluateOptions) -> None:
    """Record what rooms are generated with, or check that it has not changed."""
    path = options.out / "settings.json"
    names = ("frames", "size", "steps", "guidance", "chunk_frames", "dtype", "write_policy", "texture")
    now = json.loads(json.dumps({"version": _VERSION} | {name: getattr(options, name) for name in names}))
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        differences = [
            f"{name} was {before.get(name)!r}, got {now[name]!r}" for name in now if before.get(name) != now[name]
        ]
        if differences:
            raise ValueError(f"{options.out} resumes only with what it was started with: {'; '.join(differences)}")
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(now, indent=2) + "\n")


def _check(options: EvaluateOptions) -> None:
    check_num_frames("frames", options.frames)
    check_num_frames("chunk-frames", options.chunk_frames)
    if not len(options.seeds) or options.seeds.start < 0:
        raise ValueError(
            f"seeds must be FIRST:STOP with 0 <= FIRST < STOP, got {options.seeds.start}:{options.seeds.stop}"
        )
    for name, values, allowed in (
        ("memory", options.memory, tuple(MEMORIES)),
        ("depth", options.depth, DEPTHS),
        ("weights", tuple(options.weights), tuple(MEMORIES)),
    ):
        wrong = [value for value in values if value not in allowed]
        if wrong or len(set(values)) < len(values) or (not values and name != "weights"):
            raise ValueError(
                f"{name} must be different ones of {', '.join(allowed)}, got {', '.join(values) or 'none'}"
            )
    if options.write_policy not in WRITE_POLICIES:
        raise ValueError(f"write-policy must be one of {', '.join(WRITE_POLICIES)}, got {options.write_policy!r}")
    if not 0.0 <= options.texture <= 1.0:
        raise ValueError(f"texture must be in [0, 1], got {options.texture}")
    if min(options.size) < 32 or any(side % 32 for side in options.size):
        raise ValueError(f"size must be multiples of 32, got {options.size[0]}x{options.size[1]}")
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"steps must be at least 1, got {options.steps}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device cuda is not available: torch {torch.__version__} sees no GPU")

"""`mirage generate`: a video along a camera path from one image, with its memory, metrics and a contact sheet."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage_kernels import Cameras
from mirage_kernels.io import replace_file

from ..media import Panel, contact_sheet, load_video
from ..optional import import_extra
from ..pipeline.memory import MIRAGE_TINY, MIRAGE_TINY_FOLDER, STEPS, memory_options
from ..pipeline.run_store import CACHE
from ..pipeline.session import METRICS_LINES, VIDEO
from ..scenes.camera_files import load_npz, load_trajectory, save_npz
from ..scenes.rgbd import stereo_motorcycle
from ..scenes.trajectories import TRAJECTORIES, make_trajectory

CONTACT, TRAJECTORY, PATH = "contact.png", "trajectory.npz", "trajectory.json"
LORA = "lora.safetensors"
TINY_RANDOM = "tiny-random"

_PICTURES = 12
_TINY_ROWS = {TINY_RANDOM: 4, MIRAGE_TINY: 3}  # times 32: a few seconds a chunk on a laptop, or as it was trained
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class GenerateOptions:
    """What `mirage generate` is asked for; :func:`mirage.commands.cli.make_parser` says what each is."""

    out: Path
    model: str
    adapter: str | None = None
    lora: str | None = None
    image: Path | None = None
    prompt: str | None = None
    trajectory: str = "orbit-and-back"
    frames: int = 129
    size: tuple[int, int] | None = None
    fov: float = 60.0
    distance: float | None = None
    depth: Path | None = None
    depth_estimator: str | None = None
    static_filter: str = "geometric"
    memory: str = "ours"
    write_policy: str = "bounded"
    steps: int = STEPS
    guidance: float = 1.0
    chunk_frames: int = 33
    decode: str = "chunk"
    seed: int = 0
    fps: float = 24.0
    device: str = "cpu"
    dtype: str | None = None
    offload: bool = False
    resume: bool = False


@dataclass(frozen=True)
class _Start:
    """The first frame: a PIL image, its camera where it is known, its depth where it is known."""

    image: Any
    prompt: str
    camera: Cameras | None
    depth: Tensor | np.ndarray | None


def run_generate(options: GenerateOptions, progress: bool = True) -> dict[str, Any]:
    """Generate a video and write video.mp4, cache.safetensors, metrics.jsonl and contact.png into `options.out`.

    Beside them trajectory.npz and .json, run.json and the folder chunks/, from which a run that was stopped goes on
    with `resume`.

    Returns:
        frames, size ([H, W]), chunks, tokens and cache_bytes (of the memory at the end), coverage (mean over chunks
        after the first), seconds.

    Raises:
        MissingExtraError: a package of the extra `generate` is not installed.
        OSError, ValueError: naming what cannot be used; nothing heavy has been done then.
    """
    began = time.perf_counter()
    for module in ("diffusers", "transformers", "accelerate", "peft", "ftfy", "tqdm", "PIL", "imageio_ffmpeg"):
        import_extra(module, "generate")
    _check(options)
    start = _load_start(options)
    cameras = _load_cameras(options, start)
    pipeline = load_pipeline(options)
    height, width = options.size or (None, None)
    if options.size is None and options.model in _TINY_ROWS:
        rows = _TINY_ROWS[options.model]
        height, width = 32 * rows, 32 * max(round(rows * start.image.width / start.image.height), 1)
    total = math.ceil((options.frames - 1) / (options.chunk_frames - 1)) * options.steps
    with import_extra("tqdm", "generate").tqdm(total=total, disable=not progress, leave=False) as bar:

        def step_done(_pipeline: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            bar.update()
            return {}

        session = pipeline.start(
            start.image,
            start.prompt,
            depth=start.depth,
            depth_estimator=options.depth_estimator,
            num_frames=options.frames,
            height=height,
            width=width,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            decode=options.decode,
            generator=torch.Generator().manual_seed(options.seed),
            run_dir=options.out,
            resume=options.resume,
            fps=options.fps,
            callback_on_step_end=step_done,
            **{"static_filter": options.static_filter} | memory_options(options.memory, pipeline, options.write_policy),
        )
        bar.update(session.num_chunks * options.steps)
        if cameras is None:
            cameras = _make_cameras(options, start, session)
        for chunk in session.run(cameras, options.chunk_frames):
            bar.set_description(f"frames {chunk.start}-{chunk.stop - 1}, {chunk.metrics['tokens']:,} tokens")
        session.finish()
        session.close()
        pipeline.maybe_free_model_hooks()
    metrics = [json.loads(line) for line in (options.out / METRICS_LINES).read_text(encoding="utf-8").splitlines()]
    later = [entry["coverage"] for entry in metrics[1:]] or [metrics[0]["coverage"]]
    report = {
        "frames": session.num_frames,
        "size": list(session.image_size),
        "chunks": len(metrics),
        "tokens": metrics[-1]["tokens"],
        "cache_bytes": metrics[-1]["cache_bytes"],
        "coverage": sum(later) / len(later),
        "seconds": time.perf_counter() - began,
    }
    sheet = _draw_sheet(options, start, metrics, report)
    replace_file(options.out / CONTACT, lambda draft: sheet.save(draft, "PNG"))
    return report


def format_report(options: GenerateOptions, report: dict[str, Any]) -> str:
    """The report of :func:`run_generate` for a terminal."""
    height, width = report["size"]
    return (
        f"{report['frames']} frames of {height}x{width} in {report['chunks']} chunks, {report['seconds']:.1f} s\n"
        f"memory: {report['tokens']:,} tokens, {report['cache_bytes'] / 2**20:.2f} MiB,"
        f" {report['coverage']:.1%} of what the later chunks saw was remembered\n"
        f"written to {options.out}: {VIDEO} {CACHE} {METRICS_LINES} {CONTACT}"
    )


def load_pipeline(options: GenerateOptions) -> Any:
    """The :class:`~mirage.pipeline.pipeline.MiragePipeline` of `model`, `adapter` and `lora`, on its device.

    Without `adapter` and `lora` it has the weights that come with the model for `memory`, where there are any.

    Raises:
        OSError, ValueError: no such model, or files that do not belong together.
    """
    from ..models.adapter import MirageMemoryAdapter
    from ..models.checkpoints import load_lora, load_published
    from ..pipeline.pipeline import MiragePipeline, check_models

    dtype = _DTYPES[options.dtype or ("bfloat16" if options.device == "cuda" else "float32")]
    if options.model == TINY_RANDOM:
        from ..zoo import tiny_random_pipeline

        pipeline = tiny_random_pipeline()
        if dtype != torch.float32:
            pipeline.to(dtype)
    elif options.model == MIRAGE_TINY:
        from ..zoo import mirage_tiny_pipeline

        pipeline = mirage_tiny_pipeline(dtype)
    else:
        pipeline = MiragePipeline.from_pretrained(options.model, dtype=dtype)
        if options.lora is None and (beside := Path(options.model) / LORA).is_file():
            load_lora(pipeline.transformer, beside)
    if options.adapter is not None:
        if Path(options.adapter).is_file():  # of the published release
            adapter = MirageMemoryAdapter.from_transformer(pipeline.transformer)
            load_published(adapter=adapter, vace=options.adapter)
        else:
            adapter = MirageMemoryAdapter.from_pretrained(options.adapter, dtype=dtype)
        check_models(pipeline.vae, pipeline.transformer, adapter)
        pipeline.register_modules(memory_adapter=adapter)
    beside_memory = memory_weights(options.model, options.memory)
    if options.lora is not None:
        if getattr(pipeline.transformer, "peft_config", None):  # the model's own, which this one is in the place of
            pipeline.transformer.unload_lora()
        load_lora(pipeline.transformer, options.lora)
    elif options.adapter is None and beside_memory is not None:
        take_weights(pipeline, beside_memory)
    pipeline.set_progress_bar_config(disable=True)
    if options.offload:
        pipeline.enable_model_cpu_offload(device=options.device)
    else:
        pipeline.to(options.device)
    return pipeline


def memory_weights(model: str, memory: str) -> Path | None:
    """The folder in a model's own in which the weights for this memory are, `memories/NAME`, if it is there."""
    folder = (MIRAGE_TINY_FOLDER if model == MIRAGE_TINY else Path(model)) / "memories" / memory
    return folder if folder.is_dir() else None


def take_weights(pipeline: Any, folder: Path) -> None:
    """Give a pipeline what `mirage train` leaves: memory_adapter/, latent_depth/ and lora.safetensors, those there are.

    A LoRA that it has is taken off.

    Raises:
        OSError, ValueError: none of them is there, or they do not fit.
    """
    from ..models.adapter import MirageMemoryAdapter
    from ..models.checkpoints import load_lora
    from ..models.latent_depth import LatentDepth
    from ..pipeline.pipeline import check_models

    parts = {"memory_adapter": MirageMemoryAdapter, "latent_depth": LatentDepth}
    if not any((folder / part).exists() for part in (*parts, LORA)):
        raise FileNotFoundError(f"{folder}: must hold {', '.join(parts)} or {LORA}, as `mirage train` leaves them")
    transformer = pipeline.transformer
    for part, cls in parts.items():
        if (folder / part).is_dir():
            model = cls.from_pretrained(folder / part, torch_dtype=transformer.dtype).to(transformer.device)
            pipeline.register_modules(**{part: model.eval()})
    check_models(pipeline.vae, transformer, pipeline.memory_adapter, pipeline.latent_depth)
    if getattr(transformer, "peft_config", None):
        transformer.unload_lora()
    if (folder / LORA).is_file():
        load_lora(transformer, folder / LORA)
        transformer.to(transformer.device)


def _check(options: GenerateOptions) -> None:
    """What can be seen before anything is loaded."""
    from ..perception.depth_models import DEPTH_ESTIMATORS
    from ..perception.static_filter_models import STATIC_FILTERS
    from ..pipeline.chunks import check_num_frames
    from ..pipeline.run_store import CHUNKS

    check_num_frames("frames", options.frames)
    check_num_frames("chunk-frames", options.chunk_frames)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device cuda is not available: torch {torch.__version__} sees no GPU")
    if not 0 < options.fov < 180:
        raise ValueError(f"fov must be degrees between 0 and 180, got {options.fov:g}")
    if options.distance is not None and not 0 < options.distance < math.inf:
        raise ValueError(f"distance must be positive and finite, got {options.distance:g}")
    if options.size is not None and (min(options.size) < 32 or any(side % 32 for side in options.size)):
        raise ValueError(f"size must be multiples of 32, got {options.size[0]}x{options.size[1]}")
    if options.steps < 1:
        raise ValueError(f"steps must be at least 1, got {options.steps}")
    for part in options.static_filter.split("+"):
        if part.strip() not in STATIC_FILTERS:
            raise ValueError(f"static-filter must be of {', '.join(STATIC_FILTERS)}, joined by +, got {part!r}")
    if options.depth_estimator not in (None, *DEPTH_ESTIMATORS):
        raise ValueError(f"depth-estimator must be of {', '.join(DEPTH_ESTIMATORS)}, got {options.depth_estimator!r}")
    if not options.resume and (options.out / CHUNKS / "0000").exists():
        raise FileExistsError(
            f"{options.out} holds a run already: add --resume to go on with it, or name another --out"
        )


def _load_start(options: GenerateOptions) -> _Start:
    depth: Any = None if options.depth is None else np.load(options.depth, mmap_mode="r")
    image_module = import_extra("PIL.Image", "generate")
    if options.image is not None:
        image = image_module.open(options.image).convert("RGB")
        return _Start(image, options.prompt or "", None, depth)
    # A real image with a true depth and a known camera, for a first try.
    frames = stereo_motorcycle()
    pixels = (frames.images[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    prompt = "a motorcycle in a workshop" if options.prompt is None else options.prompt
    known = frames.depth[0] if depth is None and options.depth_estimator is None else depth
    return _Start(image_module.fromarray(pixels), prompt, frames.cameras[0], known)


def _load_cameras(options: GenerateOptions, start: _Start) -> Cameras | None:
    """The path where it is known before anything has been generated: from a file, or of the run that is resumed."""
    begun = options.out / TRAJECTORY
    size = (start.image.height, start.image.width)
    if options.resume and begun.exists() and options.trajectory in TRAJECTORIES:
        was = json.loads((options.out / PATH).read_text(encoding="utf-8"))
        now = _path_options(options)
        differences = [f"{name} was {was[name]}, got {now[name]}" for name in now if was.get(name) != now[name]]
        if differences:
            raise ValueError(f"{options.out} can be resumed only along its path: {'; '.join(differences)}")
        cameras = load_npz(begun)
    elif options.trajectory in TRAJECTORIES:
        return None
    elif Path(options.trajectory).exists():
        cameras = load_trajectory(options.trajectory, size if options.trajectory.endswith(".txt") else None)
    else:
        raise ValueError(f"trajectory must be a file, or one of {', '.join(TRAJECTORIES)}, got {options.trajectory!r}")
    if len(cameras) < options.frames:
        raise ValueError(f"trajectory must have at least frames={options.frames} cameras, got {len(cameras)}")
    return cameras[: options.frames]


def _make_cameras(options: GenerateOptions, start: _Start, session: Any) -> Cameras:
    """The path of that name about what the image shows, saved beside the run."""
    camera = start.camera
    if camera is None:
        height, width = start.image.height, start.image.width
        focal = 0.5 * width / math.tan(math.radians(options.fov) / 2)
        intrinsics = [[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]]
        camera = Cameras(torch.tensor(intrinsics), torch.eye(4)[None], (height, width))
    depth = session.seed(camera)
    known = depth[depth.isfinite() & (depth > 0)]
    if options.distance is None and not known.numel():
        raise ValueError("distance must be given: the image's depth is not known anywhere")
    distance = known.median().item() if options.distance is None else options.distance
    cameras = make_trajectory(options.trajectory, camera, options.frames, distance)
    described = json.dumps(_path_options(options)) + "\n"

    def write(draft: str) -> None:
        Path(draft).write_text(described, encoding="utf-8")

    replace_file(options.out / PATH, write)
    save_npz(options.out / TRAJECTORY, cameras)
    return cameras


def _path_options(options: GenerateOptions) -> dict[str, Any]:
    """What a path by name was made from."""
    return {name: getattr(options, name) for name in ("trajectory", "frames", "fov", "distance")}


def _draw_sheet(options: GenerateOptions, start: _Start, metrics: list[dict[str, Any]], report: dict[str, Any]) -> Any:
    last = report["frames"] - 1
    wanted = sorted({round(i * last / (_PICTURES - 1)) for i in range(_PICTURES)})

    def coverage(frame: int) -> float:
        return next(entry["coverage"] for entry in metrics if frame < entry["frames"][1])

    def pictures() -> Iterator[Panel]:
        for number, frame in enumerate(load_video(options.out / VIDEO)):
            if number in wanted:
                yield Panel(frame, f"frame {number} ({coverage(number):.0%} remembered)")

    panels = list(pictures())
    rows = [panels[i : i + 4] for i in range(0, len(panels), 4)]
    rows[-1] += [Panel(torch.zeros_like(panels[0].image), "")] * (len(rows[0]) - len(rows[-1]))
    lines = [
        f"{options.model}: {report['frames']} frames of {report['size'][0]}x{report['size'][1]} along"
        f" {options.trajectory}, {report['chunks']} chunks",
        f"memory: {report['tokens']:,} tokens, {report['cache_bytes'] / 2**20:.2f} MiB",
    ]
    return contact_sheet(start.prompt or "mirage generate", lines, rows)

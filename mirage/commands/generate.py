"""`mirage generate`: a video along a camera path from one image, with its memory, metrics and a contact sheet."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from mirage_kernels import Cameras
from mirage_kernels.io import replace_file, replace_text

from ..files.checked import DamagedFileError, digest, digest_json, read_file, read_json
from ..files.depth import read_depth
from ..files.images import read_image
from ..media import Panel, contact_sheet, load_video
from ..optional import import_extra
from ..pipeline.chunk_folder import CACHE, CHUNKS
from ..pipeline.memory import MemoryConfig, resolve_memory
from ..scenes.camera_files import Given, load_npz, read_cameras, save_npz
from ..scenes.rgbd import stereo_motorcycle
from ..scenes.trajectories import TRAJECTORIES, make_trajectory
from ..zoo import MIRAGE_TINY, TINY_RANDOM, default_steps, load_pipeline

CONTACT, TRAJECTORY, PATH = "contact.png", "trajectory.npz", "trajectory.json"

_SHEET_FRAMES = 12
_TINY_ROWS = {TINY_RANDOM: 4, MIRAGE_TINY: 3}  # times 32: a few seconds a chunk on a laptop, or as it was trained


@dataclass(frozen=True, kw_only=True)
class Options:
    """Generate a video along a camera path, with the memory in the loop.

    Without an image, the left view of scikit-image's stereo pair with its true depth is taken.
    """

    model: str
    """folder or hub id of a Wan2.2 or Mirage pipeline, mirage-tiny, or tiny-random"""
    adapter: Annotated[str | None, tyro.conf.arg(metavar="DIR_OR_ID_OR_FILE")] = None
    """memory adapter; a file is one of the published release"""
    lora: Annotated[str | None, tyro.conf.arg(metavar="FILE_OR_DIR_OR_ID")] = None
    """LoRA of the transformer, of any trainer"""
    image: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """the first frame; cropped about its centre to the aspect of --size"""
    prompt: str | None = None
    """what the video shows"""
    trajectory: str = "orbit-and-back"
    """a path's name (orbit, dolly, pan, spiral, ..), or a file or folder of cameras"""
    format: str | None = None
    """of the cameras' file, as docs/cameras.md names them; default what its content is"""
    image_size: tuple[int, int] | None = None
    """that the pixels of the cameras' file refer to, where it does not say so"""
    ignore_lens: bool = False
    """take the path of cameras with distortion or a fisheye lens"""
    camera: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """of a file that holds several"""
    poses: Literal["cam2world", "world2cam"] | None = None
    """which way round a list of matrices is; default cam2world"""
    convention: Literal["opencv", "opengl"] | None = None
    """axes of the cameras of a list of matrices; default opencv"""
    frames: int = 129
    """4 n + 1"""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("mirage-out")
    """where to write"""
    size: tuple[int, int] | None = None
    """of the frames, multiples of 32; default the image's, rounded down"""
    fov: float | None = None
    """horizontal field of view of the image in degrees, for paths by name (default 60) and files of poses alone"""
    distance: float | None = None
    """of the point that paths by name go about, world units; default the image's median depth"""
    depth: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """depth of the image (H, W), or of every frame (N, H, W): .npy, .npz, .exr, .tiff or 16-bit .png"""
    depth_scale: float | None = None
    """world units per step of integer depth (0.001: millimetres), or per unit of float depth; default 1 for floats"""
    depth_offset: float = 0.0
    """world units added to depth from a file"""
    depth_estimator: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """depth-anything-v2, depth-pro, map-anything or depth-anything-3; default the model's depth head"""
    static_filter: str = "geometric"
    """none, or names joined by +: geometric, sky, sam2, sam3, confidence"""
    memory: str = "aligned"
    """what remembers, and the model must be trained on it: none, nearest, aligned or pixel"""
    write_policy: Literal["bounded", "append"] | None = None
    """of the memory; default its own: bounded for aligned, append for the others"""
    steps: int | None = None
    """denoising steps; default 20, with mirage-tiny 2"""
    guidance: float = 1.0
    """guidance scale; 1 is none"""
    chunk_frames: int = 33
    """frames at a time, 4 n + 1"""
    decode: Literal["chunk", "end"] = "chunk"
    """decode every chunk, or nothing until the end"""
    seed: int = 0
    """of the noise"""
    fps: float = 24.0
    """frames a second of the video"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to generate"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of the models; default bfloat16 on cuda, float32 on cpu"""
    offload: bool = False
    """move models to the GPU only while they are used"""
    resume: bool = False
    """resume the run in DIR"""
    resume_last_good: bool = False
    """resume it after its last chunk that is finite and undamaged, and move the later ones aside"""


def run(options: Options) -> int:
    """Generate a video, print a summary and where the files are."""
    print(format_report(options, run_generate(options)))
    return 0


@dataclass(frozen=True)
class _FirstFrame:
    """The first frame: pixels (H, W, 3), their camera and depth where they are known."""

    image: np.ndarray
    prompt: str
    camera: Cameras | None
    depth: Tensor | np.ndarray | None


def run_generate(options: Options, progress: bool = True) -> dict[str, Any]:
    """Generate a video and write video.mp4, cache.safetensors, metrics.jsonl and contact.png into `options.out`.

    Beside them trajectory.npz and .json, run.json and the folder chunks/, from which a run that was stopped is resumed
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
    from ..pipeline.session import METRICS_LINES

    _check(options)
    steps = default_steps(options.model) if options.steps is None else options.steps
    start = _load_first_frame(options)
    cameras = _load_cameras(options, start)
    pipeline = load_pipeline(
        options.model,
        adapter=options.adapter,
        lora=options.lora,
        memory=options.memory,
        device=options.device,
        dtype=options.dtype,
        offload=options.offload,
    )
    height, width = options.size or (None, None)
    if options.size is None and options.model in _TINY_ROWS:
        rows = _TINY_ROWS[options.model]
        height, width = 32 * rows, 32 * max(round(rows * start.image.shape[1] / start.image.shape[0]), 1)
    total = math.ceil((options.frames - 1) / (options.chunk_frames - 1)) * steps
    with import_extra("tqdm", "generate").tqdm(total=total, disable=not progress, leave=False) as bar:

        def step_done(_pipeline: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            bar.update()
            return {}

        session = pipeline.start_session(
            start.image,
            start.prompt,
            depth=start.depth,
            depth_estimator=options.depth_estimator,
            num_frames=options.frames,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=options.guidance,
            decode=options.decode,
            generator=torch.Generator().manual_seed(options.seed),
            run_dir=options.out,
            resume="last-good" if options.resume_last_good else options.resume,
            fps=options.fps,
            callback_on_step_end=step_done,
            static_filter=options.static_filter,
            memory=_memory(options),
        )
        bar.update(session.num_chunks * steps)
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


def format_report(options: Options, report: dict[str, Any]) -> str:
    """Format the report of :func:`run_generate` for a terminal."""
    from ..pipeline.session import METRICS_LINES, VIDEO

    height, width = report["size"]
    return (
        f"{report['frames']} frames of {height}x{width} in {report['chunks']} chunks, {report['seconds']:.1f} s\n"
        f"memory: {report['tokens']:,} tokens, {report['cache_bytes'] / 2**20:.2f} MiB,"
        f" {report['coverage']:.1%} of what the later chunks saw was remembered\n"
        f"written to {options.out}: {VIDEO} {CACHE} {METRICS_LINES} {CONTACT}"
    )


def _check(options: Options) -> None:
    """Check what can be checked before anything is loaded."""
    from ..perception.depth_models import DEPTH_ESTIMATORS
    from ..perception.static_filter_models import STATIC_FILTERS
    from ..pipeline.chunks import check_num_frames

    _memory(options)
    check_num_frames("frames", options.frames)
    check_num_frames("chunk-frames", options.chunk_frames)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device cuda is not available: torch {torch.__version__} sees no GPU")
    if options.fov is not None and not 0 < options.fov < 180:
        raise ValueError(f"fov must be degrees between 0 and 180, got {options.fov:g}")
    if options.distance is not None and not 0 < options.distance < math.inf:
        raise ValueError(f"distance must be positive and finite, got {options.distance:g}")
    if options.depth is None and (options.depth_scale is not None or options.depth_offset):
        raise ValueError("depth-scale and depth-offset need --depth, got none")
    if options.size is not None and (min(options.size) < 32 or any(side % 32 for side in options.size)):
        raise ValueError(f"size must be multiples of 32, got {options.size[0]}x{options.size[1]}")
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"steps must be at least 1, got {options.steps}")
    for part in options.static_filter.split("+"):
        if part.strip() not in STATIC_FILTERS:
            raise ValueError(f"static-filter must be of {', '.join(STATIC_FILTERS)}, joined by +, got {part!r}")
    if options.depth_estimator not in (None, *DEPTH_ESTIMATORS):
        raise ValueError(f"depth-estimator must be of {', '.join(DEPTH_ESTIMATORS)}, got {options.depth_estimator!r}")
    if not (options.resume or options.resume_last_good) and _has_chunks(options):
        raise FileExistsError(f"{options.out} holds a run already: add --resume to resume it, or name another --out")


def _memory(options: Options) -> MemoryConfig:
    memory = resolve_memory(options.memory)
    return memory if options.write_policy is None else replace(memory, write_policy=options.write_policy)


def _load_first_frame(options: Options) -> _FirstFrame:
    depth: Any = None
    if options.depth is not None:
        depth = read_depth(options.depth, options.depth_scale, options.depth_offset)
    if options.image is not None:
        return _FirstFrame(read_image(options.image), options.prompt or "", None, depth)
    # A real image with a true depth and a known camera, for a first try.
    frames = stereo_motorcycle()
    pixels = (frames.images[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    prompt = "a motorcycle in a workshop" if options.prompt is None else options.prompt
    known = frames.depth[0] if depth is None and options.depth_estimator is None else depth
    return _FirstFrame(pixels, prompt, frames.cameras[0], known)


def _load_cameras(options: Options, start: _FirstFrame) -> Cameras | None:
    """Load the path where it is known before anything is generated: from a file, or of the run that is resumed."""
    size = start.image.shape[:2]
    if (options.resume or options.resume_last_good) and _has_chunks(options) and options.trajectory in TRAJECTORIES:
        cameras = _load_path(options)
    elif options.trajectory in TRAJECTORIES:
        return None
    elif Path(options.trajectory).exists():
        given = Given(
            image_size=size,
            file_size=options.image_size,
            fov=options.fov,
            ignore_lens=options.ignore_lens,
            camera=options.camera,
            poses=options.poses,
            convention=options.convention,
        )
        cameras = read_cameras(options.trajectory, given, options.format)
    else:
        raise ValueError(f"trajectory must be a file, or one of {', '.join(TRAJECTORIES)}, got {options.trajectory!r}")
    if len(cameras) < options.frames:
        raise ValueError(f"trajectory must have at least frames={options.frames} cameras, got {len(cameras)}")
    return cameras[: options.frames]


def _make_cameras(options: Options, start: _FirstFrame, session: Any) -> Cameras:
    """Make the path of that name about what the image shows, and save it beside the run."""
    camera = start.camera
    if camera is None:
        height, width = start.image.shape[:2]
        focal = 0.5 * width / math.tan(math.radians(_fov(options)) / 2)
        intrinsics = [[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]]
        camera = Cameras(torch.tensor(intrinsics), torch.eye(4)[None], (height, width))
    depth = session.write_first_frame(camera)
    known = depth[depth.isfinite() & (depth > 0)]
    if options.distance is None and not known.numel():
        raise ValueError("distance must be given: the image's depth is not known anywhere")
    distance = known.median().item() if options.distance is None else options.distance
    cameras = make_trajectory(options.trajectory, camera, options.frames, distance)
    saved = options.out / TRAJECTORY
    save_npz(saved, cameras)
    record = _path_config(options) | {"cameras_sha256": digest(saved.read_bytes())}
    replace_text(options.out / PATH, json.dumps(record | {"checksum": digest_json(record)}) + "\n")
    return cameras


def _has_chunks(options: Options) -> bool:
    """Return whether there are chunks of a run in the folder to write to."""
    return any((options.out / CHUNKS).glob("[0-9]*"))


def _load_path(options: Options) -> Cameras:
    """Load the path by name along which the run to resume went, as :func:`_make_cameras` has saved it."""
    saved = options.out / TRAJECTORY
    try:
        was = read_json(options.out / PATH)
        held = {name: value for name, value in was.items() if name != "checksum"}
        if was.get("checksum", digest_json(held)) != digest_json(held):  # the first runs had none
            raise DamagedFileError(f"{options.out / PATH} is damaged: its content is not what its checksum says")
        now = _path_config(options)
        differences = [f"{name} was {was.get(name)}, got {now[name]}" for name in now if was.get(name) != now[name]]
        if differences:
            raise ValueError(f"{options.out} can be resumed only along its path: {'; '.join(differences)}")
        if was.get("cameras_sha256", "") not in ("", digest(read_file(options.out, TRAJECTORY))):
            raise DamagedFileError(f"{saved} is damaged: its content is not what its checksum in {PATH} says")
    except DamagedFileError as error:
        raise DamagedFileError(
            f"{error}; put it back from a copy, or name a file with the cameras of the run with --trajectory"
        ) from None
    return load_npz(saved)


def _path_config(options: Options) -> dict[str, Any]:
    """Return what a path by name is made from."""
    config = {name: getattr(options, name) for name in ("trajectory", "frames", "fov", "distance")}
    return config | {"fov": _fov(options)}


def _fov(options: Options) -> float:
    """Return the field of view of paths by name."""
    return 60.0 if options.fov is None else options.fov


def _draw_sheet(options: Options, start: _FirstFrame, metrics: list[dict[str, Any]], report: dict[str, Any]) -> Any:
    from ..pipeline.session import VIDEO

    last = report["frames"] - 1
    wanted = sorted({round(i * last / (_SHEET_FRAMES - 1)) for i in range(_SHEET_FRAMES)})

    def coverage(frame: int) -> float:
        return next(entry["coverage"] for entry in metrics if frame < entry["frames"][1])

    def shown() -> Iterator[Panel]:
        for number, frame in enumerate(load_video(options.out / VIDEO)):
            if number in wanted:
                yield Panel(frame, f"frame {number} ({coverage(number):.0%} remembered)")

    panels = list(shown())
    rows = [panels[i : i + 4] for i in range(0, len(panels), 4)]
    rows[-1] += [Panel(torch.zeros_like(panels[0].image), "")] * (len(rows[0]) - len(rows[-1]))
    lines = [
        f"{options.model}: {report['frames']} frames of {report['size'][0]}x{report['size'][1]} along"
        f" {options.trajectory}, {report['chunks']} chunks",
        f"memory: {report['tokens']:,} tokens, {report['cache_bytes'] / 2**20:.2f} MiB",
    ]
    return contact_sheet(start.prompt.strip() or "mirage generate", lines, rows)

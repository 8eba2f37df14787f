"""Videos for WorldScore (arXiv 2504.00983): its camera moves, and the folder layout that its scripts read.

    worldscore_output/static/<visual style>/<scene type>/<category>/<name>/
    worldscore_output/dynamic/<visual style>/<motion type>/<name>/
        frames/000.png ..   videos/output.mp4   input_image.png   image_data.json   camera_data.json (static)   time.txt

An instance is an entry of the data set's `static/static.json` or `dynamic/dynamic.json`. Its `camera_path` names moves,
each from where the one before ended: every move takes the same number of frames, and consecutive ones share one. The
scripts call a folder complete that has all of these and `total_frames` frames. image_data.json is written last.

`camera_data.json` holds camera-to-world matrices `cameras_interp` of every frame and `cameras` of the moves' ends, in a
world of x left, y up, z forward with the first camera at its origin; a camera's own axes are x right, y up, z backward.
Its `scale` is the length of a move, by which the scripts divide. Lengths are then in moves; see :func:`move_cameras`.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mirage_kernels import Cameras
from mirage_kernels.io import replace_file

from ..files.framing import Framing
from ..files.images import read_image, to_pil
from ..media import save_video
from ..optional import import_extra
from ..pipeline.chunks import check_num_frames
from ..zoo import default_steps, load_pipeline

OUTPUT = "worldscore_output"
FOCAL = 500.0
"""Focal length in pixels that the scripts take a video's frames to have."""

DEGREES = 30.0
"""Of a pan and of an orbit."""

_STRAIGHT: dict[str, tuple[float, float, float]] = {  # right, down, forward, in lengths of a move
    "push_in": (0.0, 0.0, 1.0),
    "pull_out": (0.0, 0.0, -1.0),
    "move_left": (-0.5, 0.0, 0.0),
    "move_right": (0.5, 0.0, 0.0),
    "fixed": (0.0, 0.0, 0.0),
}
_TURNS = {"pan_left": -1.0, "pan_right": 1.0, "orbit_left": -1.0, "orbit_right": 1.0}
MOVES = (*_STRAIGHT, *_TURNS)


@dataclass(frozen=True, kw_only=True)
class WorldScoreOptions:
    """Generate WorldScore's videos, in the folders that its scripts read.

    Writes DIR/worldscore_output. Resumes what is there.
    """

    model: str
    """folder or hub id of a Wan2.2 or Mirage pipeline, mirage-tiny, or tiny-random"""
    dataset: Path
    """WorldScore-Dataset, a folder"""
    out: Path = Path("mirage-worldscore")
    """where to write"""
    adapter: str | None = None
    """memory adapter: folder, hub id, or a file of the published release"""
    lora: str | None = None
    """LoRA of the transformer, a file"""
    movement: Literal["static", "dynamic"] = "static"
    """which half of the data set"""
    limit: int | None = None
    """the first so many instances alone"""
    frames: int = 49
    """of a camera move, 4 n + 1"""
    size: tuple[int, int] = (704, 1280)
    """of the frames, multiples of 32"""
    memory: str = "aligned"
    """what remembers, and the model must be trained on it: none, nearest, aligned or pixel"""
    depth_estimator: str | None = None
    """as of `mirage generate`; default the model's depth head"""
    static_filter: str = "geometric"
    """as of `mirage generate`"""
    steps: int | None = None
    """denoising steps; default 20, with mirage-tiny 2"""
    guidance: float = 1.0
    """guidance scale; 1 is none"""
    seed: int = 0
    """of the noise"""
    fps: float = 24.0
    """frames a second of the videos"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to generate"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of the models; default bfloat16 on cuda, float32 on cpu"""


def run_worldscore(options: WorldScoreOptions, progress: bool = True) -> dict[str, int]:
    """Generate the videos of the data set that are not there yet.

    A move of :func:`move_cameras` is half as long as the median of the image's depth, whatever the depth's unit is. A
    session has one prompt: those of an instance's scenes, joined.

    Returns:
        written, present (were there already).

    Raises:
        OSError, ValueError: naming what cannot be used.
    """
    for module in ("diffusers", "transformers", "accelerate", "peft", "ftfy", "tqdm", "PIL", "imageio_ffmpeg"):
        import_extra(module, "generate")
    check_num_frames("frames", options.frames)
    listing = options.dataset / options.movement / f"{options.movement}.json"
    instances = json.loads(listing.read_text(encoding="utf-8"))[: options.limit]
    report = {"written": 0, "present": 0}
    pipeline: Any = None
    for instance in import_extra("tqdm", "generate").tqdm(instances, disable=not progress):
        folder = options.out / OUTPUT / instance_folder(instance)
        if is_complete(folder):
            report["present"] += 1
            continue
        if pipeline is None:
            pipeline = load_pipeline(
                options.model, adapter=options.adapter, lora=options.lora, device=options.device, dtype=options.dtype
            )
        _generate(options, pipeline, instance, folder)
        report["written"] += 1
    return report


def _generate(options: WorldScoreOptions, pipeline: Any, instance: dict[str, Any], folder: Path) -> None:
    began = time.perf_counter()
    height, width = options.size
    pixels = read_image(options.dataset / instance["image"])
    image = to_pil(Framing(pixels.shape[:2], options.size).fit_pixels(pixels))
    moves = instance["camera_path"]
    total = len(moves) * (options.frames - 1) + 1
    with pipeline.start_session(
        image,
        _prompt(instance),
        depth_estimator=options.depth_estimator,
        num_frames=total,
        height=height,
        width=width,
        num_inference_steps=default_steps(options.model) if options.steps is None else options.steps,
        guidance_scale=options.guidance,
        generator=torch.Generator().manual_seed(options.seed),
        static_filter=options.static_filter,
        memory=options.memory,
    ) as session:
        matrix = [[FOCAL, 0.0, width / 2], [0.0, FOCAL, height / 2], [0.0, 0.0, 1.0]]
        start = Cameras(torch.tensor(matrix), torch.eye(4)[None], options.size)
        depth = session.write_first_frame(start)
        known = depth[depth.isfinite() & (depth > 0)]
        length = known.median().item() / 2 if known.numel() else 1.0
        cameras = move_cameras(start, moves, options.frames, length)
        frames = torch.cat([chunk.frames.cpu() for chunk in session.run(cameras)])
    write_instance(
        folder, instance, frames, cameras, options.frames, length, image, time.perf_counter() - began, options.fps
    )


def _prompt(instance: dict[str, Any]) -> str:
    texts = instance["prompt_list"] if instance["visual_movement"] == "static" else [instance["prompt"]]
    return " ".join(text.rstrip(".") + "." for text in [*texts, instance.get("style", "")] if text)


def instance_folder(instance: dict[str, Any]) -> Path:
    """Find where an instance's video lies under `worldscore_output`.

    Raises:
        ValueError: a key is missing, or it is neither static nor dynamic.
    """
    try:
        movement, image = instance["visual_movement"], Path(instance["image"])
        if movement == "static":
            kind = Path(instance["scene_type"]) / image.parent.name
        elif movement == "dynamic":
            kind = Path(instance["motion_type"])
        else:
            raise ValueError(f'visual_movement must be "static" or "dynamic", got {movement!r}')
        return Path(movement) / instance["visual_style"] / kind / image.stem
    except KeyError as error:
        raise ValueError(f"an instance must have the key {error}, got {', '.join(instance)}") from None


def move_cameras(start: Cameras, moves: Sequence[str], frames: int, length: float = 1.0) -> Cameras:
    """Make the cameras of a path of WorldScore's moves, as its scripts have them.

    push_in and pull_out go `length` forward and back, move_left and move_right half of it aside; a pan turns by 30
    degrees in place, an orbit about the point `length` ahead. Between a move's ends, the rotation of world-to-camera
    matrices turns evenly and their translation is linear.

    Args:
        start: one view.
        moves: of :data:`MOVES`.
        frames: of each move, the one it shares with the next included.
        length: of a move in world units.

    Returns:
        len(moves) (frames - 1) + 1 views.

    Raises:
        ValueError: no moves, or an unknown one.
    """
    if not moves:
        raise ValueError("moves must be one or more, got none")
    before = torch.eye(4, dtype=torch.float64)  # world to camera; the world's axes are those of the start
    views = [before]
    for move in moves:
        if move not in MOVES:
            raise ValueError(f"moves must be of {', '.join(MOVES)}, got {move!r}")
        # A pan to the right turns the world to the left; an orbit to the right looks back to the left.
        degrees = _TURNS.get(move, 0.0) * DEGREES * (-1.0 if move.startswith("pan") else 1.0)
        step = _yaw(degrees)
        if move in _STRAIGHT:
            step[:3, 3] = -length * torch.tensor(_STRAIGHT[move], dtype=torch.float64)
        elif move.startswith("orbit"):
            step[:3, 3] = length * (torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) - step[:3, 2])
        after = step @ before
        for i in range(1, frames):
            share = i / (frames - 1)
            view = _yaw(share * degrees) @ before
            view[:3, 3] = torch.lerp(before[:3, 3], after[:3, 3], share)
            views.append(view)
        before = after
    poses = start.cam2world[0].cpu() @ torch.linalg.inv(torch.stack(views))
    return start.with_cam2world(poses)


def _yaw(degrees: float) -> Tensor:
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    rows = [[cosine, 0.0, sine, 0.0], [0.0, 1.0, 0.0, 0.0], [-sine, 0.0, cosine, 0.0], [0.0, 0.0, 0.0, 1.0]]
    return torch.tensor(rows, dtype=torch.float64)


def describe_cameras(cameras: Cameras, frames: int, length: float) -> dict[str, Any]:
    """Describe cameras as camera_data.json of :func:`move_cameras`: focal_length, scale, cameras, cameras_interp."""
    to_first = cameras.world2cam[0] @ cameras.cam2world
    left_up = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64))
    up_backward = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
    matrices = (left_up @ to_first.cpu() @ up_backward).tolist()
    focal = cameras.intrinsics[0, 0, 0].item()
    return {
        "focal_length": focal,
        "scale": length,
        "cameras": matrices[:: frames - 1],
        "cameras_interp": matrices,
    }


def write_instance(
    folder: Path,
    instance: dict[str, Any],
    frames: Tensor,
    cameras: Cameras,
    frames_per_move: int,
    length: float,
    image: Any,
    seconds: float,
    fps: float = 24.0,
) -> None:
    """Write one instance; what an earlier, unfinished attempt has left goes.

    Args:
        folder: of :func:`instance_folder`.
        instance: as of the data set.
        frames: (N, 3, H, W) float in [0, 1].
        cameras: of :func:`move_cameras`, N views.
        frames_per_move, length: as of it.
        image: the first frame as given, a PIL image of the frames' size.
        seconds: that generating took.

    Raises:
        ValueError: another number of cameras or frames than the moves have.
    """
    moves = len(instance["camera_path"])
    total = moves * (frames_per_move - 1) + 1
    if not len(frames) == len(cameras) == total:
        raise ValueError(f"frames and cameras must be {total} for {moves} moves, got {len(frames)} and {len(cameras)}")
    image_module = import_extra("PIL.Image", "generate")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "frames").mkdir(parents=True)
    (folder / "videos").mkdir()
    for i, frame in enumerate(frames):
        pixels = (frame.clamp(0, 1) * 255.0).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
        image_module.fromarray(pixels).save(folder / "frames" / f"{i:03d}.png")
    save_video(folder / "videos" / "output.mp4", frames, fps)
    image.save(folder / "input_image.png")
    described = dict(instance) | {"num_scenes": moves, "total_frames": total}
    if instance["visual_movement"] == "static":
        described["anchor_frame_idx"] = list(range(0, total, frames_per_move - 1))
        _write(folder / "camera_data.json", describe_cameras(cameras, frames_per_move, length))
    (folder / "time.txt").write_text(f"generate_time: {seconds}\n", encoding="utf-8")
    _write(folder / "image_data.json", described)  # the last: see is_complete()


def is_complete(folder: Path) -> bool:
    """Check whether an instance is complete: image_data.json is written last."""
    return (folder / "image_data.json").is_file()


def _write(path: Path, values: dict[str, Any]) -> None:
    content = json.dumps(values, indent=4) + "\n"

    def write(draft: str) -> None:
        Path(draft).write_text(content, encoding="utf-8")

    replace_file(path, write)

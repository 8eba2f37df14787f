"""What the models generate and how they train. The hashes hold for one processor and one torch: see ``record.py``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import names
from .caches import saved_bytes
from .operators import digest

SIZE, TINY_SIZE = (96, 160), (64, 96)
RESUMED_FRAMES, RESUMED_CHUNK = 25, 9


def _generated(pipeline: Any, room: dict[str, Any], memory: str, depth: str, chunk_frames: int, **options: Any) -> str:
    options = {"num_frames": len(room["cameras"]), "num_inference_steps": 2, "seed": 3} | options
    with names.start_session(pipeline, room, memory, depth, **options) as session:
        made = list(names.run_chunks(session, room["cameras"], chunk_frames))
        tokens = [count for _, count in made]
        frames = [frames for frames, _ in made]
        return digest(names.session_latents(session), tokens, *frames, *names.contents(names.session_cache(session)))


def generation() -> dict[str, str]:
    """mirage-tiny and tiny-random, two or three chunks each."""
    found = {}
    pipeline, room = names.mirage_tiny(), names.film_room(20_000, 33, SIZE)
    for memory, depth in (("bounded", "true"), ("append", "head"), ("pixel", "true")):
        found[f"mirage-tiny {memory}, {depth} depth"] = _generated(pipeline, room, memory, depth, 17, **_size(SIZE))
    pipeline, room = names.tiny_random(), names.film_room(20_001, 25, TINY_SIZE)
    for memory, options in (
        ("bounded", {"static_filter": "geometric"}),
        ("nearest", {}),
        ("none", {}),
    ):
        found[f"tiny-random {memory}"] = _generated(pipeline, room, memory, "true", 9, **_size(TINY_SIZE), **options)
    found["tiny-random guided"] = _generated(
        pipeline, room, "bounded", "head", 13, **_size(TINY_SIZE), guidance_scale=3.0, negative_prompt="fog"
    )
    call = names.call_pipeline(pipeline, room, 5, num_frames=9, num_inference_steps=2, chunk_frames=9)
    found["tiny-random, called"] = digest(call)
    return found


def _size(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}


def resumed_run(folder: Path, on_step: Callable[..., Any] | None = None, pipeline: Any = None) -> Any:
    """A session in `folder`, gone on with where there is one, to its end."""
    pipeline = names.tiny_random() if pipeline is None else pipeline
    room = names.film_room(20_002, RESUMED_FRAMES, TINY_SIZE)
    options: dict[str, Any] = {"num_frames": RESUMED_FRAMES, "num_inference_steps": 2, "seed": 4, **_size(TINY_SIZE)}
    session = names.start_session(
        pipeline, room, "bounded", "true", run_dir=folder, resume=True, on_step=on_step, **options
    )
    with session:
        frames = [frames for frames, _ in names.run_chunks(session, room["cameras"], RESUMED_CHUNK)]
        session.finish()
        return names.session_latents(session), frames


def run_until_killed(folder: Path) -> None:
    """Kills this process in the last step of the second chunk."""
    steps = [0]

    def die(_pipeline: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        steps[0] += 1
        if steps[0] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    resumed_run(folder, die)


def resumption() -> dict[str, str]:
    """A run that is never stopped; and one that is killed in its second chunk and gone on with."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for kind in ("whole", "killed"):
            folder = Path(name, kind)
            if kind == "killed":
                call = "import torch; from tests.behaviour.models import *; torch.set_num_threads(1);"
                command = [sys.executable, "-c", f"{call} run_until_killed(Path({str(folder)!r}))"]
                done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
                if done.returncode != -signal.SIGKILL:
                    raise RuntimeError(f"the run that should be killed ended with {done.returncode}:\n{done.stderr}")
            latents, frames = resumed_run(folder)
            found[f"{kind}, latents"] = digest(latents)
            found[f"{kind}, last frames"] = digest(frames[-1])
            found[f"{kind}, cache"] = saved_bytes(folder / "cache.safetensors")
            lines = (folder / "metrics.jsonl").read_text()
            found[f"{kind}, frames"] = " ".join(part[:64] for part in lines.split('"frames_sha256": "')[1:])
    return found


def training() -> dict[str, Any]:
    """Loss and gradient norm of three steps of every stage."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for stage in names.STAGES:
            found[stage] = names.train(names.training_values(stage, Path(name, stage)))
        out = Path(name, "resumed")
        values = names.training_values("lora", out, lora={"rank": 4, "alpha": 8.0, "dropout": 0.2}, schedule="constant")
        names.train(values | {"steps": 2})
        found["lora, resumed"] = names.train(values)
    return found


def measure(section: str) -> dict[str, Any]:
    torch.set_num_threads(1)  # of more threads results depend
    return {"generation": generation, "resumption": resumption, "training": training}[section]()

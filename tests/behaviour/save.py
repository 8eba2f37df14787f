"""Save what later versions must load: ``python -m tests.behaviour.save FOLDER``, as it made ``tests/data/v0367533``.

Caches, the folder of a pipeline of a few thousand random weights, a generation that was stopped after its first chunk,
a training run that was stopped after its second step, and what comes of each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import caches, names
from .record import machine

FRAMES, CHUNK, SIZE = 17, 9, (64, 96)
CACHES = {
    "bounded": (torch.float32, "bounded", {}),
    "append": (torch.bfloat16, "append", {}),
    "float8": (names.FLOAT8, "bounded", {"merge": "mean", "max_tokens": 80}),
}
PIPELINE, RUN, TRAINING = "pipeline", "run", "training"
EXPECTED, INPUTS, RESULTS = "expected.json", "inputs.safetensors", "results.safetensors"


def room_of(folder: Path) -> dict[str, Any]:
    """The image, its prompt and the cameras that the run goes along; depth is that of the pipeline's head."""
    saved = load_file(folder / INPUTS)
    cameras = names.Cameras(saved["intrinsics"], saved["cam2world"], SIZE)
    return {"image": saved["image"].float() / 255, "prompt": "a room", "cameras": cameras, "depth": None}


def generate(folder: Path, run: Path, chunks: int) -> Tensor:
    """Latents of a run in `run`, gone on with if it is there, until it has so many chunks."""
    torch.set_num_threads(1)
    pipeline, room = names.load_pipeline(folder / PIPELINE), room_of(folder)
    options: dict[str, Any] = {"num_frames": FRAMES, "num_inference_steps": 2, "seed": 6}
    options |= {"height": SIZE[0], "width": SIZE[1], "run_dir": run, "resume": True}
    with names.start_session(pipeline, room, "bounded", "head", **options) as session:
        for _, _ in names.run_chunks(session, room["cameras"][: chunks * (CHUNK - 1) + 1], CHUNK):
            pass
        return names.session_latents(session)


def train(out: Path, steps: int) -> list[float]:
    """Losses of a run in `out`. The pipeline is named from the working directory, as the run's record has it."""
    torch.set_num_threads(1)
    models = {"pipeline": PIPELINE, "text_length": 32}
    lora = {"rank": 1, "alpha": 2.0, "targets": ["q", "o"]}
    changes: dict[str, Any] = {"models": models, "lora": lora, "train_adapter": False, "steps": steps, "save_every": 2}
    values = names.training_values("lora", out, schedule="constant", keep=1, **changes)
    return [line["loss"] for line in names.train(values)]


def save(folder: Path) -> None:
    folder.mkdir(parents=True)
    expected: dict[str, Any] = {"machine": machine(), "caches": {}}
    for name, (dtype, policy, options) in CACHES.items():
        cache = names.make_cache(caches.CHANNELS, dtype, policy, **options)
        caches.fill(cache)
        cache.save(folder / f"{name}.safetensors")
        expected["caches"][name] = {"tokens": len(cache), **caches.readings(cache)}
    names.make_small_pipeline(7).save_pretrained(folder / PIPELINE)
    room = names.film_room(20_003, FRAMES, SIZE)
    cameras = room["cameras"]
    image = (room["image"] * 255).round().to(torch.uint8)
    save_file(
        {"image": image, "intrinsics": cameras.intrinsics, "cam2world": cameras.cam2world.contiguous()},
        folder / INPUTS,
    )
    generate(folder, folder / RUN, 1)
    whole = generate(folder, folder.with_name("whole"), 2)
    save_file({"latents": whole.contiguous()}, folder / RESULTS)
    os.chdir(folder)
    expected["losses"] = train(Path("..", "whole-training"), 3)
    train(Path(TRAINING), 2)
    (folder / RUN / ".lock").unlink()
    (folder / EXPECTED).write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    save(Path(sys.argv[1]).resolve())

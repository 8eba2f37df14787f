"""Small configurations, clips and models, which the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mirage.training import TrainConfig, make_config
from mirage.training.data import ClipDataset, Sample
from mirage.training.models import Models, load_models, mark_trained

SIZE, TOKENS = [64, 96], (4, 6)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for name, value in changes.items():
        both[name] = merged(both[name], value) if isinstance(value, dict) and name in both else value
    return both


def values(stage: str, out: Path | str = "nowhere", **changes: Any) -> dict[str, Any]:
    """Return a three-step run of a stage, as a file would say it."""
    base = {
        "stage": stage,
        "out": str(out),
        "steps": 3,
        "learning_rate": 1e-3,
        "save_every": 2,
        "tensorboard": False,
        "data": {"frames": 17, "size": SIZE, "sources": [{"kind": "synthetic", "rooms": 4}]},
        "objective": {"chunk_frames": 9},
        "vae": {"frames": 5, "statistics": 2},
        "lora": {"rank": 4, "alpha": 8.0},
        "models": {"latent_depth": {"width": 16}, "text_length": 32},
    }
    return merged(base, changes)


def config(stage: str, out: Path | str = "nowhere", **changes: Any) -> TrainConfig:
    return make_config(values(stage, out, **changes))


def models_of(asked: TrainConfig) -> Models:
    """Load a run's models, with what the stage trains marked."""
    torch.manual_seed(asked.seed)
    models = load_models(asked, torch.device("cpu"))
    mark_trained(asked, models)
    return models


def draw(asked: TrainConfig, *numbers: int) -> list[Sample]:
    clips = ClipDataset(asked.data, asked.seed)
    return [clips[number] for number in numbers]

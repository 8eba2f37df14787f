"""Modules that have moved since 0367533: importing one by its old name raises an error that says the new one.

Saved pipelines name the module of each model in `model_index.json`; those saved before the move load by this table.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

OLD_MODULES = {
    "mirage.adapter": "mirage.models.adapter",
    "mirage.checkpoints": "mirage.models.checkpoints",
    "mirage.chunks": "mirage.pipeline.chunks",
    "mirage.cli": "mirage.commands.cli",
    "mirage.codec": "mirage.scenes.patch_pca",
    "mirage.conditioning": "mirage.pipeline.conditioning",
    "mirage.demo": "mirage.commands.demo",
    "mirage.depth": "mirage.perception.depth",
    "mirage.evaluate": "mirage.evaluation.closed_loop",
    "mirage.evaluation_report": "mirage.evaluation.report",
    "mirage.extras": "mirage.optional",
    "mirage.figures": "mirage.media",
    "mirage.generate": "mirage.commands.generate",
    "mirage.latent_depth": "mirage.models.latent_depth",
    "mirage.memories": "mirage.pipeline.memory",
    "mirage.metrics": "mirage.evaluation.metrics",
    "mirage.pixel_memory": "mirage.pipeline.pixel_memory",
    "mirage.rgbd": "mirage.scenes.rgbd",
    "mirage.run_store": "mirage.pipeline.run_store",
    "mirage.session": "mirage.pipeline.session",
    "mirage.static_filter": "mirage.perception.static_filter",
    "mirage.streaming": "mirage.models.vae",
    "mirage.synthetic": "mirage.scenes.synthetic",
    "mirage.tiny": "mirage.zoo",
    "mirage.training.card": "mirage.training.release",
    "mirage.trajectories": "mirage.scenes.trajectories",
    "mirage.transformer": "mirage.models.transformer",
    "mirage.world_demo": "mirage.commands.demo.walk",
    "mirage.worldscore": "mirage.evaluation.worldscore",
}


class _MovedFinder(importlib.abc.MetaPathFinder):
    """Raise `ModuleNotFoundError` for a module that has moved. Asked last, when nobody else has found the module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in OLD_MODULES:
            raise ModuleNotFoundError(f"{fullname} is now {OLD_MODULES[fullname]} (docs/renamed)", name=fullname)
        return None


def install() -> None:
    """Let imports of old names say the new ones, once a process."""
    if not any(type(finder).__name__ == _MovedFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_MovedFinder())

"""Training: the memory adapter (stage 1), LoRA on the backbone beside it (stage 2), and small models from scratch.

`mirage train config.yaml` is :func:`~mirage.training.loop.train` of a :class:`~mirage.training.config.TrainConfig`.
"""

from __future__ import annotations

from .config import TrainConfig, load_config, make_config

__all__ = ["TrainConfig", "load_config", "make_config"]

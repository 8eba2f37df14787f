"""CPU offloading for models that call each other, and for chunks that need all of them again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import UserCpuOffloadHook


class _OffloadTogether(UserCpuOffloadHook):
    """Models that leave the GPU together, those of them that are there."""

    def __init__(self, hooks: list[UserCpuOffloadHook]) -> None:
        self.hooks = hooks

    @property
    def model(self) -> torch.nn.Module:  # type: ignore[override]
        """One that is on the GPU, if any is: accelerate looks at it to see whether there is anything to do."""
        models = [hook.model for hook in self.hooks]
        return next((m for m in models if next(m.parameters()).device.type != "cpu"), models[0])

    def offload(self) -> None:
        for hook in self.hooks:
            hook.offload()


def take_turns(hooks: Sequence[UserCpuOffloadHook], *groups: Sequence[torch.nn.Module | None]) -> None:
    """Let two groups of models make room for each other: when one is called, the whole other one leaves the GPU.

    Args:
        hooks: of `DiffusionPipeline.enable_model_cpu_offload`; models without one, quantised ones, are left alone.
        groups: two of them; None stands for a model that a pipeline does not have.
    """
    known: dict[int, Any] = {id(hook.model): hook for hook in hooks}
    first, second = ([known[id(model)] for model in group if id(model) in known] for group in groups)
    for before, after in ((first, second), (second, first)):
        for hook in after:
            hook.hook.prev_module_hook = _OffloadTogether(before) if before else None

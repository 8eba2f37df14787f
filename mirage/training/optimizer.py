"""The optimizers of `mirage train`: torch's AdamW, or its Muon for matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig


def make_optimizer(config: TrainConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Make the optimizer that a run asks for."""
    kinds = {"adamw": torch.optim.AdamW, "muon": MuonAdamW}
    return kinds[config.optimizer](list(parameters), lr=config.learning_rate, weight_decay=config.weight_decay)


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for matrices, to which a convolution's weight counts as (out, in x kernel), AdamW for vectors.

    Muon's steps are scaled to the size of AdamW's, so that one learning rate serves both
    (https://arxiv.org/abs/2502.16982). Small models that are trained for minutes get further with it.

    Args:
        parameters: contiguous tensors.
        lr, weight_decay: of both.
    """

    def __init__(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self._weights = [weight for weight in parameters if weight.ndim > 1]
        self._matrices = [nn.Parameter(weight.detach().view(weight.shape[0], -1)) for weight in self._weights]
        vectors = [weight for weight in parameters if weight.ndim <= 1]
        self._parts: list[torch.optim.Optimizer] = []
        if self._matrices:
            self._parts.append(
                torch.optim.Muon(self._matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        if vectors:
            self._parts.append(torch.optim.AdamW(vectors, lr=lr, weight_decay=weight_decay))

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step of both, with the learning rate that the first group has now."""
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.view_as(matrix)
        for part in self._parts:
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both, and the groups."""
        return super().state_dict() | {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returns, of as many parameters."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})

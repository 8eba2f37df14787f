"""The loss of a diffusion step: flow matching, and the depth head's."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..models.latent_depth import latent_depth_loss
from .batches import DiffusionBatch
from .config import ObjectiveConfig, TrainConfig
from .models import Models, trained

TIMESTEPS = 1000.0
"""A noise level of 1 as the transformer's time step."""


class DiffusionObjective(nn.Module):
    """Flow matching on the target frames of chunks, and the depth head's loss. Holds what is trained as submodules."""

    def __init__(self, config: TrainConfig, models: Models) -> None:
        super().__init__()
        self.config: ObjectiveConfig = config.objective
        assert models.transformer is not None
        frozen: dict[str, Any] = {}
        for name in ("transformer", "memory_adapter", "latent_depth"):
            model = getattr(models, name)
            if model is not None and trained(model):
                self.add_module(name, model)
            else:
                frozen[name] = model
        self._frozen = frozen  # a plain dict: neither saved, nor handed to DistributedDataParallel

    def _part(self, name: str) -> Any:
        return self._frozen[name] if name in self._frozen else getattr(self, name)

    def predict(self, batch: DiffusionBatch, with_memory: bool = True) -> Tensor:
        """Predict the flow of the target frames, (B, C, T, h, w)."""
        length = batch.noisy.shape[2]
        adapter = self._part("memory_adapter") if with_memory else None
        clean, levels = (
            batch.clean,
            F.pad(batch.levels, (batch.clean.references.shape[2], batch.clean.preceding.shape[2])),
        )
        flow = self._part("transformer")(
            hidden_states=clean.around(batch.noisy),
            timestep=clean.denoised(length) * levels * TIMESTEPS,
            encoder_hidden_states=batch.prompt_embeds,
            num_reference_frames=clean.references.shape[2],
            memory_adapter=adapter,
            memory_context=None if adapter is None else batch.memory_context,
            return_dict=False,
        )[0]
        return clean.target(flow, length)

    def forward(self, batch: DiffusionBatch) -> dict[str, Tensor]:
        """Compute `loss`, and its parts."""
        flow = self.predict(batch)
        losses = {"flow": F.mse_loss(flow[:, :, 1:].float(), batch.flow[:, :, 1:])}
        loss = losses["flow"]
        if batch.depth is not None:
            depth = batch.depth
            output = self._part("latent_depth")(depth.latents, depth.rays, depth.memory_depth, depth.memory_mask)
            losses["depth"] = latent_depth_loss(output, depth.true, depth.true > 0)
            loss = loss + self.config.depth_weight * losses["depth"]
        return {"loss": loss, **losses}

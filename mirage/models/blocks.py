"""What the transformer and the memory adapter are made of: Wan's blocks with one modulation a frame."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from torch import Tensor, nn


class MirageRotaryPosEmbed(WanRotaryPosEmbed):
    """Wan's rotary embedding, with reference frames at negative times and in rows of their own."""

    def forward(self, hidden_states: Tensor, num_reference_frames: int = 0) -> tuple[Tensor, Tensor]:
        """Return cos and sin (1, tokens, 1, head_dim) for `hidden_states` (B, C, F, h, w), references first along F."""
        _, _, frames, height, width = hidden_states.shape
        frames, rows, columns = (
            size // patch for size, patch in zip((frames, height, width), self.patch_size, strict=True)
        )
        references = num_reference_frames // self.patch_size[0]
        time = torch.arange(frames, device=self.freqs_cos.device) - references
        row = torch.arange(rows, device=self.freqs_cos.device).expand(frames, rows)
        row = row + rows * (time < 0)[:, None]
        shape = (frames, rows, columns)

        def spread(table: Tensor, is_sine: bool) -> Tensor:
            of_time, of_row, of_column = table.split([self.t_dim, self.h_dim, self.w_dim], dim=1)
            along_time = of_time[time.abs()]
            if is_sine:  # sin(-x) = -sin(x), exactly
                along_time = torch.where((time < 0)[:, None], -along_time, along_time)
            parts = (along_time[:, None, None], of_row[row][:, :, None], of_column[None, None, :columns])
            spread_parts = [part.expand(*shape, part.shape[-1]) for part in parts]
            return torch.cat(spread_parts, dim=-1).reshape(1, math.prod(shape), 1, -1)

        return spread(self.freqs_cos, False), spread(self.freqs_sin, True)


class FrameIndex(nn.Module):
    """Which frame each token belongs to, (1, F tokens) int64. A module, so that context parallelism can split it."""

    def forward(self, num_frames: int, tokens: int, device: torch.device) -> Tensor:
        """Number `num_frames` frames of `tokens` tokens each."""
        return torch.arange(num_frames, device=device).repeat_interleave(tokens)[None]


def modulate(hidden_states: Tensor, scale: Tensor, shift: Tensor | None, frame_index: Tensor | None) -> Tensor:
    """Return `hidden_states` (B, L, D) times `scale` plus `shift` (B, F, D), each token by its frame's.

    Without `frame_index` (1, L) the tokens are F whole frames in order, and nothing is materialised per token.
    """
    if frame_index is not None:
        scaled = hidden_states * scale[:, frame_index[0]]
        return scaled if shift is None else scaled + shift[:, frame_index[0]]
    framed = hidden_states.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]
    return (framed if shift is None else framed + shift[:, :, None]).flatten(1, 2)


class MirageTransformerBlock(WanTransformerBlock):
    """Wan's block with one modulation a frame; bit for bit what the stock block gives with it repeated per token."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
        frame_index: Tensor | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            hidden_states: (B, L, D).
            encoder_hidden_states: (B, text length, D).
            temb: (B, F, 6, D), one modulation a frame.
            rotary_emb: cos and sin (1, L, 1, head_dim).
            frame_index: (1, L) int64; None where L is F whole frames in order.

        Returns:
            (B, L, D).
        """
        table = self.scale_shift_table.unsqueeze(0) + temb.float()
        shift_msa, scale_msa, gate_msa, c_shift_msa, c_scale_msa, c_gate_msa = table.unbind(2)

        normed = modulate(self.norm1(hidden_states.float()), 1 + scale_msa, shift_msa, frame_index)
        attended = self.attn1(normed.type_as(hidden_states), None, None, rotary_emb)
        hidden_states = (hidden_states.float() + modulate(attended, gate_msa, None, frame_index)).type_as(hidden_states)

        normed = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, None, None)

        normed = modulate(self.norm3(hidden_states.float()), 1 + c_scale_msa, c_shift_msa, frame_index)
        fed = self.ffn(normed.type_as(hidden_states)).float()
        return (hidden_states.float() + modulate(fed, c_gate_msa, None, frame_index)).type_as(hidden_states)


def is_context_parallel(model: Any) -> bool:
    """Return whether diffusers' context parallelism splits this model's sequence."""
    return getattr(model._parallel_config, "context_parallel_config", None) is not None

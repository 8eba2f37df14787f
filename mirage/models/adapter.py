"""`MirageMemoryAdapter`: the side branch through which the transformer sees the memory, a model of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from .blocks import FrameIndex, MirageRotaryPosEmbed, MirageTransformerBlock, is_context_parallel


class MirageMemoryAdapter(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    """Blocks like the backbone's that turn what the memory shows into hints for it, after VACE (arXiv 2503.07598).

    What the memory shows ("memory context") is C readout channels and either C score channels (`control_channels` =
    2 C, 96 for Wan2.2, as published) or one visibility channel (`control_channels` = C + 1 = 49). One that steers a
    model without a memory, for a comparison, is shown the cameras' rays in the readout's place: `control="rays"`, see
    :func:`~mirage.pipeline.conditioning.show_rays`.

    Args:
        control_channels: of the memory context.
        memory_layers: the backbone's blocks after which a hint is added, ascending; one adapter block each. Default
            every second block of Wan2.2-TI2V-5B.
        num_attention_heads, attention_head_dim, ffn_dim, cross_attn_norm, qk_norm, eps, patch_size, rope_max_seq_len:
            the backbone's.
        control: "memory", or "rays".

    Raises:
        ValueError: no memory layers, or not ascending; another control.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MirageTransformerBlock"]
    _repeated_blocks = ["MirageTransformerBlock"]
    _skip_layerwise_casting_patterns = ["patch_embedding", "norm"]
    _keep_in_fp32_modules = ["rope", "scale_shift_table", "norm1", "norm2", "norm3"]
    _cp_plan = {
        "rope": {
            0: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
            1: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
        },
        "frame_index": {0: ContextParallelInput(split_dim=1, expected_dims=2, split_output=True)},
        "blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)},
        "proj_out.*": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(
        self,
        control_channels: int = 96,
        memory_layers: tuple[int, ...] = tuple(range(0, 30, 2)),
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        ffn_dim: int = 14336,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        rope_max_seq_len: int = 1024,
        control: str = "memory",
    ) -> None:
        super().__init__()
        if control not in ("memory", "rays"):
            raise ValueError(f'control must be "memory" or "rays", got {control!r}')
        layers = list(memory_layers)
        if not layers or layers[0] < 0 or any(a >= b for a, b in pairwise(layers)):
            raise ValueError(f"memory_layers must be one or more ascending block numbers, got {layers}")
        dim = num_attention_heads * attention_head_dim
        self.rope = MirageRotaryPosEmbed(attention_head_dim, patch_size, rope_max_seq_len)
        self.frame_index = FrameIndex()
        self.patch_embedding = nn.Conv3d(control_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.proj_in = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(
            MirageTransformerBlock(dim, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps) for _ in layers
        )
        self.proj_out = nn.ModuleList(nn.Linear(dim, dim) for _ in layers)
        self._zero_outputs()
        self.gradient_checkpointing = False

    def _zero_outputs(self) -> None:
        for parameter in self.proj_out.parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def from_transformer(
        cls,
        transformer: WanTransformer3DModel,
        control_channels: int = 96,
        memory_layers: Sequence[int] | None = None,
        control: str = "memory",
    ) -> MirageMemoryAdapter:
        """Make an adapter to train: its blocks are copies of the backbone's at `memory_layers` (default every second).

        It starts where the backbone is: readout channels are embedded as the backbone embeds latents, the other
        channels and `proj_in` are zero, so that the first block sees what the backbone's sees; `proj_out` is zero, so
        that at first the hints are exactly 0.

        Args:
            transformer: the backbone; its device and dtype are taken over.
            control_channels: 2 C (scores) or C + 1 (visibility) for a backbone of C channels.
            memory_layers: block numbers, ascending.
            control: "memory", or "rays".

        Raises:
            ValueError: other channels, layers that the backbone does not have, or another control.
        """
        config = transformer.config
        allowed = (2 * config.in_channels, config.in_channels + 1)
        if control_channels not in allowed:
            raise ValueError(
                f"control_channels must be {allowed[0]} (scores) or {allowed[1]} (visibility) for a backbone of"
                f" {config.in_channels} channels, got {control_channels}"
            )
        layers = list(range(0, config.num_layers, 2)) if memory_layers is None else list(memory_layers)
        if any(not 0 <= layer < config.num_layers for layer in layers):
            raise ValueError(f"memory_layers must be blocks 0 to {config.num_layers - 1}, got {layers}")
        adapter = cls(
            control_channels=control_channels,
            memory_layers=layers,
            patch_size=config.patch_size,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            ffn_dim=config.ffn_dim,
            cross_attn_norm=config.cross_attn_norm,
            qk_norm=config.qk_norm,
            eps=config.eps,
            rope_max_seq_len=config.rope_max_seq_len,
            control=control,
        ).to(transformer.device)
        with torch.no_grad():
            for block, layer in zip(adapter.blocks, layers, strict=True):
                weights = transformer.blocks[layer].state_dict()
                # Assigned, so that what the backbone keeps in float32 stays so.
                block.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
            for module in (adapter.patch_embedding, adapter.proj_in, adapter.proj_out):
                module.to(transformer.dtype)
            nn.init.zeros_(adapter.patch_embedding.weight)
            adapter.patch_embedding.weight[:, : config.in_channels] = transformer.patch_embedding.weight
            adapter.patch_embedding.bias.copy_(transformer.patch_embedding.bias)
            nn.init.zeros_(adapter.proj_in.weight)
            nn.init.zeros_(adapter.proj_in.bias)
        return adapter

    @property
    def conditioning(self) -> str:
        """What follows the readout channels: "mask", one visibility channel, or "scores", as many as of the readout."""
        return "mask" if self.config.control_channels % 2 else "scores"

    @property
    def latent_channels(self) -> int:
        """C, readout channels of the memory context."""
        channels = self.config.control_channels
        return channels - 1 if self.conditioning == "mask" else channels // 2

    def forward(
        self, hidden_states: Tensor, memory_context: Tensor, encoder_hidden_states: Tensor, temb: Tensor
    ) -> tuple[Tensor, ...]:
        """Turn what the memory shows into hints.

        Args:
            hidden_states: (B, L, D), the backbone's embedded tokens without those of reference frames.
            memory_context: (B, control_channels, F, h, w), of the same frames.
            encoder_hidden_states: (B, text length, D), embedded by the backbone.
            temb: (B, F, 6, D), the backbone's modulation of these frames.

        Returns:
            A hint (B, L, D) for each of `memory_layers`.

        Raises:
            ValueError: other channels, frames or size.
        """
        if memory_context.ndim != 5 or memory_context.shape[1] != self.config.control_channels:
            raise ValueError(
                f"memory_context must be (B, {self.config.control_channels}, F, h, w) for this adapter,"
                f" got {tuple(memory_context.shape)}"
            )
        if hidden_states.shape[-1] != self.proj_in.in_features:
            raise ValueError(
                f"hidden_states must be {self.proj_in.in_features} wide: this memory adapter was made for another"
                f" backbone, got {hidden_states.shape[-1]}"
            )
        control = self.patch_embedding(memory_context.to(self.patch_embedding.weight.dtype))
        frames, tokens = control.shape[2], control.shape[3] * control.shape[4]
        if (control.shape[0], frames * tokens, frames) != (*hidden_states.shape[:2], temb.shape[1]):
            raise ValueError(
                "memory_context must have the batch, frames and size of the target and preceding frames"
                f" ({hidden_states.shape[0]} x {temb.shape[1]} frames, {hidden_states.shape[1]} tokens),"
                f" got {control.shape[0]} x {frames} frames, {frames * tokens} tokens"
            )
        control = control.flatten(2).transpose(1, 2).to(hidden_states.dtype)
        rotary_emb = self.rope(memory_context)
        parallel = is_context_parallel(self)
        frame_index = self.frame_index(frames, tokens, hidden_states.device) if parallel else None
        control = self.proj_in(control) + hidden_states

        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        hints = []
        for block, projection in zip(self.blocks, self.proj_out, strict=True):
            arguments = (control, encoder_hidden_states, temb, rotary_emb, frame_index)
            control = self._gradient_checkpointing_func(block, *arguments) if checkpointing else block(*arguments)
            hints.append(projection(control))
        return tuple(hints)

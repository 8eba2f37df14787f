"""`MirageTransformer3DModel`: Wan2.2's video transformer with reference frames, preceding frames and a memory.

Same weights and configuration as diffusers' `WanTransformer3DModel`: it loads the `transformer` folder of
`Wan-AI/Wan2.2-TI2V-5B-Diffusers` unchanged. Three things are new:

- The frames along time are [references | target | preceding]. References stand at time positions -R..-1 and at rows
  h..2h-1 of the rotary tables, so that they look like no frame of the video; everything else counts from 0.
- Time steps are per frame, and so is the modulation of the blocks: one vector a frame instead of one a token, which
  gives the same bits in a thousandth of the memory.
- A memory adapter adds its hints to all but the reference tokens, after the blocks that it names.

It also stands in for the stock class in diffusers' own Wan pipelines, without references; :meth:`set_memory` gives it a
memory there.
"""

from __future__ import annotations

import os
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  # diffusers asks this module for it when it loads
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from .adapter import MirageMemoryAdapter
from .blocks import FrameIndex, MirageRotaryPosEmbed, MirageTransformerBlock, is_context_parallel, modulate
from .lora_folder import ENTRY, plain_names, remove_stale, restore_loras, save_loras
from .scaled_weights import is_scaled, restore_weights

if TYPE_CHECKING:
    from typing_extensions import Self

_SKIPPING_CACHES = (FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig)
_SKIPPING_HOOKS = ("fbc_", "mag_cache", "sea_cache")
_DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class MirageTransformer3DModel(WanTransformer3DModel):
    """Wan2.2's transformer (5 B parameters at full size) with references, preceding frames and memory hints.

    Configuration and weights are those of `diffusers.WanTransformer3DModel`; `from_pretrained` loads the `transformer`
    folder of Wan2.2-TI2V-5B as it is. Only models without image conditioning inside the transformer (`image_dim` and
    `added_kv_proj_dim` None, as Wan2.2's) are supported.
    """

    _no_split_modules = ["MirageTransformerBlock"]
    _repeated_blocks = ["MirageTransformerBlock"]
    _skip_keys = ["memory_adapter"]  # an argument that offloading must not move: the adapter has hooks of its own
    _cp_plan = {
        "rope": {
            0: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
            1: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
        },
        "frame_index": {0: ContextParallelInput(split_dim=1, expected_dims=2, split_output=True)},
        "hint": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        in_channels: int = 48,
        out_channels: int = 48,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 14336,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
    ) -> None:
        if image_dim is not None or added_kv_proj_dim is not None:
            raise ValueError(
                "image_dim and added_kv_proj_dim must be None: the first frame is conditioned by its latents, as in"
                f" Wan2.2-TI2V, got {image_dim} and {added_kv_proj_dim}"
            )
        # Built by the parent and then given blocks of our own: its keys, shapes and initialisation are the contract.
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=0,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            rope_max_seq_len=rope_max_seq_len,
        )
        self.register_to_config(num_layers=num_layers)
        dim = num_attention_heads * attention_head_dim
        self.rope = MirageRotaryPosEmbed(attention_head_dim, patch_size, rope_max_seq_len)
        self.blocks = nn.ModuleList(
            MirageTransformerBlock(dim, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps)
            for _ in range(num_layers)
        )
        # Both have no weights; context parallelism splits what passes through them.
        self.frame_index = FrameIndex()
        self.hint = nn.Identity()
        self._memory: tuple[MirageMemoryAdapter, Tensor, float] | None = None  # in a tuple, so as to be no submodule

    # Files.

    @wraps(WanTransformer3DModel.save_pretrained, assigned=())  # a pipeline looks up which arguments there are
    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save to a folder as diffusers' models do, LoRA apart: see :mod:`mirage.models.lora_folder`.

        :meth:`from_pretrained` loads the same outputs; diffusers' own class loads the weights without LoRA. Fused LoRA
        is part of the weights.

        Args:
            save_directory: folder; made where it is not there.
            kwargs: as of `ModelMixin.save_pretrained`.
        """
        folder = Path(save_directory)
        if not kwargs.get("is_main_process", True):
            return
        folder.mkdir(parents=True, exist_ok=True)
        entry = save_loras(self, folder)
        config = self.config
        if entry is not None:
            self.register_to_config(**{ENTRY: entry})
        try:
            with plain_names(self):
                super().save_pretrained(folder, **kwargs)
        finally:
            self._internal_dict = config
        remove_stale(folder, entry)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a folder or a model of the hub as diffusers' models do, with the LoRA that was saved with it.

        Raises:
            ValueError: weights are missing, or a LoRA that its configuration names does not fit.
            FileNotFoundError: a LoRA that its configuration names is not there.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model: Self = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        if kwargs.get("device_map") is None:
            model._refuse_missing(f"{pretrained_model_name_or_path}")
        options = {name: kwargs[name] for name in (*_DOWNLOAD_OPTIONS, "subfolder") if name in kwargs}
        entry = cls.load_config(pretrained_model_name_or_path, **options).get(ENTRY)
        if entry is not None:
            restore_loras(model, entry, Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or ""))
            model.eval()
        return loaded  # type: ignore[no-any-return]

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return super().extract_init_dict({name: v for name, v in config_dict.items() if name != ENTRY}, **kwargs)

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict: Any = None, **kwargs: Any) -> Self:
        """Load a single file as diffusers' models do; weights in fp8 are multiplied by their scales, if there are any.

        Raises:
            ValueError: a quantised format that is not known, or missing weights.
        """
        source = pretrained_model_link_or_path_or_dict
        if not isinstance(source, dict) and not str(source).endswith(".gguf"):
            options = {name: kwargs[name] for name in (*_DOWNLOAD_OPTIONS, "disable_mmap") if name in kwargs}
            source = load_single_file_checkpoint(source, **options)
        if isinstance(source, dict) and is_scaled(source):
            source = restore_weights(f"{pretrained_model_link_or_path_or_dict}", source)
        try:
            model: Self = super().from_single_file(source, **kwargs)
        except NotImplementedError as error:  # what moving a weight that no file had raises
            raise ValueError("weights are missing in the file, or it is of another model") from error
        return model

    def _refuse_missing(self, label: str) -> None:
        """Refuse a model some of whose weights no file had."""
        if absent := [name for name, value in self.state_dict().items() if value.is_meta]:
            raise ValueError(
                f"{label}: {len(absent)} weights are missing: {', '.join(absent[:5])}; was it saved with a LoRA on, by"
                " another version? Its names are those of peft's layers then"
            )

    def enable_cache(self, config: Any) -> None:
        """Enable a cache as diffusers' models do, except those that skip whole blocks, which the memory's hints would
        corrupt.

        Raises:
            ValueError: `config` is of FirstBlockCache, MagCache or SeaCache.
        """
        if isinstance(config, _SKIPPING_CACHES):
            raise ValueError(_skipping_reason(type(config).__name__))
        super().enable_cache(config)

    def set_memory(
        self,
        memory_adapter: MirageMemoryAdapter | None,
        memory_context: Tensor | None = None,
        memory_scale: float = 1.0,
    ) -> None:
        """Set what calls without a memory of their own are given, as those of diffusers' pipelines are.

        Args:
            memory_adapter, memory_context, memory_scale: as of :meth:`forward`; the adapter is neither moved nor saved
                with the transformer. None and None for no memory again.

        Raises:
            ValueError: one of adapter and context is given, and not the other.
        """
        _check_together(memory_adapter, memory_context)
        self._memory = None
        if memory_adapter is not None and memory_context is not None:
            self._memory = (memory_adapter, memory_context, memory_scale)

    @property
    def has_memory(self) -> bool:
        """Whether :meth:`set_memory` has set one."""
        return self._memory is not None

    def _refuse_skipping_hooks(self) -> None:
        """Refuse such caches put on without :meth:`enable_cache`."""
        for block in self.blocks:
            registry = getattr(block, "_diffusers_hook", None)
            for name in registry.hooks if registry is not None else ():
                if name.startswith(_SKIPPING_HOOKS):
                    raise ValueError(_skipping_reason(f"the hook {name}"))

    @apply_lora_scale("attention_kwargs")
    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        num_reference_frames: int = 0,
        memory_adapter: MirageMemoryAdapter | None = None,
        memory_context: Tensor | None = None,
        memory_scale: float = 1.0,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        encoder_hidden_states_image: None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the flow of all frames; what is predicted for references and preceding frames means nothing.

        Args:
            hidden_states: (B, C, F, h, w) latents, along time [references | target | preceding]; h and w are multiples
                of the patch.
            timestep: (B, F), one per frame: 0 for frames that are clean (references, preceding, the first frame). As
                diffusers' pipelines give it, (B,), one for all frames, or (B, tokens), the same for all of a frame.
            encoder_hidden_states: (B, L, D) text embeddings.
            num_reference_frames: R, how many of the F are references.
            memory_adapter: adds its hints to all but the reference tokens.
            memory_context: (B, control channels, F - R, h, w), what the memory shows at the target and preceding
                frames' cameras, see :class:`~mirage.models.adapter.MirageMemoryAdapter`. Given if and only if the
                adapter is.
            memory_scale: factor of the hints.
            attention_kwargs: `{"scale": s}` scales loaded LoRA.
            encoder_hidden_states_image: None, as diffusers' pipelines give it without an image encoder.

        Returns:
            `Transformer2DModelOutput` with `sample` (B, C, F, h, w), or a tuple of it.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        batch, channels, frames, height, width = _check_video("hidden_states", hidden_states)
        patch_time, patch_height, patch_width = self.config.patch_size
        if channels != self.config.in_channels:
            raise ValueError(f"hidden_states must have {self.config.in_channels} channels, got {channels}")
        if frames % patch_time or height % patch_height or width % patch_width:
            raise ValueError(
                f"hidden_states must have frames, rows and columns that are multiples of {self.config.patch_size},"
                f" got {(frames, height, width)}"
            )
        if encoder_hidden_states_image is not None:
            raise ValueError(
                "encoder_hidden_states_image must be None: the first frame is conditioned by its latents, as in"
                f" Wan2.2-TI2V, got {tuple(encoder_hidden_states_image.shape)}"
            )
        tokens = (height // patch_height) * (width // patch_width)
        timestep = _timestep_per_frame(timestep, batch, frames, patch_time, tokens)
        if not 0 <= num_reference_frames < frames or num_reference_frames % patch_time:
            raise ValueError(
                f"num_reference_frames must be in [0, {frames}), a multiple of {patch_time}, got {num_reference_frames}"
            )
        _check_together(memory_adapter, memory_context)
        if memory_adapter is None and self._memory is not None:
            memory_adapter, memory_context, memory_scale = self._memory
        if memory_adapter is not None:
            self._refuse_skipping_hooks()

        post_frames = frames // patch_time
        references = num_reference_frames // patch_time * tokens
        rotary_emb = self.rope(hidden_states, num_reference_frames)
        parallel = is_context_parallel(self)
        frame_index = self.frame_index(post_frames, tokens, hidden_states.device) if parallel else None

        hidden_states = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        timestep = timestep[:, ::patch_time]
        temb, timestep_proj, encoder_hidden_states, _ = self.condition_embedder(
            timestep.flatten(), encoder_hidden_states, None, timestep_seq_len=post_frames
        )
        timestep_proj = timestep_proj.unflatten(2, (6, -1))

        hints: dict[int, Tensor] = {}
        if memory_adapter is not None:
            found = memory_adapter(
                hidden_states[:, references:],
                memory_context,
                encoder_hidden_states,
                timestep_proj[:, num_reference_frames // patch_time :],
            )
            hints = dict(zip(memory_adapter.config.memory_layers, found, strict=True))
            if hints and max(hints) >= len(self.blocks):
                raise ValueError(
                    f"memory_adapter must name blocks of this transformer, 0 to {len(self.blocks) - 1} in its"
                    f" memory_layers, got {max(hints)}"
                )

        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        for number, block in enumerate(self.blocks):
            arguments = (hidden_states, encoder_hidden_states, timestep_proj, rotary_emb, frame_index)
            run = partial(self._gradient_checkpointing_func, block) if checkpointing else block
            hidden_states = run(*arguments)
            hint = hints.pop(number, None)
            if hint is None:
                continue
            hint = hint.to(hidden_states.device) * memory_scale
            if parallel:  # a rank's part of the sequence is cut elsewhere in hints without reference tokens
                hidden_states = hidden_states + self.hint(nn.functional.pad(hint, (0, 0, references, 0)))
            elif references:
                with_hint = hidden_states[:, references:] + hint
                hidden_states = torch.cat([hidden_states[:, :references], with_hint], dim=1)
            else:
                hidden_states = hidden_states + hint

        table = self.scale_shift_table.unsqueeze(0).to(temb.device) + temb.unsqueeze(2)
        shift, scale = (part.to(hidden_states.device) for part in table.unbind(2))
        hidden_states = modulate(self.norm_out(hidden_states.float()), 1 + scale, shift, frame_index).type_as(
            hidden_states
        )
        hidden_states = self.proj_out(hidden_states)
        patches = hidden_states.reshape(
            batch, post_frames, height // patch_height, width // patch_width, patch_time, patch_height, patch_width, -1
        )
        output = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, -1, frames, height, width)
        if not return_dict:
            return (output,)
        return Transformer2DModelOutput(sample=output)


def _check_together(memory_adapter: object, memory_context: object) -> None:
    if (memory_adapter is None) != (memory_context is None):
        given, missing = ("memory_context", "memory_adapter")[:: 1 if memory_adapter is None else -1]
        raise ValueError(f"{missing} must be given with {given}, got None")


def _timestep_per_frame(timestep: Tensor, batch: int, frames: int, patch_time: int, tokens: int) -> Tensor:
    """Return time steps (B, F) of those of frames (B, F), of videos (B,), or of tokens (B, F / patch_time * tokens)."""
    shape = tuple(timestep.shape)
    if shape == (batch, frames):
        return timestep
    if shape == (batch,):
        return timestep[:, None].expand(batch, frames)
    if shape != (batch, frames // patch_time * tokens):
        raise ValueError(f"timestep must be (B, F) = {(batch, frames)}, one per frame, got {shape}")
    of_tokens = timestep.unflatten(1, (-1, tokens))
    if not bool((of_tokens == of_tokens[..., :1]).all()):
        raise ValueError("timestep must be the same for all tokens of a frame, got different ones")
    return of_tokens[..., 0].repeat_interleave(patch_time, dim=1)


def _check_video(name: str, value: Tensor) -> tuple[int, ...]:
    if value.ndim != 5:
        raise ValueError(f"{name} must be (B, C, F, h, w), got {tuple(value.shape)}")
    return tuple(value.shape)


def _skipping_reason(what: str) -> str:
    return (
        f"{what} skips whole blocks and replays what they added, memory hints included, to which the hints of this step"
        " would be added again: a silent error of about 30 % (measured). Use PyramidAttentionBroadcastConfig or"
        " FasterCacheConfig, which cache inside the blocks."
    )

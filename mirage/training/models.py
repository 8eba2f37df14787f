"""The models of a training run: loaded part by part, or new; and saved part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
from peft import LoraConfig as PeftLoraConfig
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5EncoderModel

from mirage_kernels.io import replace_folder

from ..models.adapter import MirageMemoryAdapter
from ..models.components import check_models, fingerprint
from ..models.latent_depth import LatentDepth
from ..models.lora import load_lora, save_lora
from ..models.transformer import MirageTransformer3DModel
from ..zoo import CHANNELS, LORA, TINY_RANDOM, tiny_random_pipeline
from .config import LoraConfig, ModelsConfig, TrainConfig
from .seeds import derive_seed

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SCALE = ("latents_mean", "latents_std")
_LORA_TARGETS = {
    "q": ["to_q"],
    "k": ["to_k"],
    "v": ["to_v"],
    "o": ["to_out.0"],
    "ffn": ["ffn.net.0.proj", "ffn.net.2"],
}


class PromptEncoder:
    """Embed prompts as the pipeline does; the text encoder is loaded when a prompt is new."""

    _get_t5_prompt_embeds = WanImageToVideoPipeline._get_t5_prompt_embeds

    def __init__(self, load: Callable[[], tuple[Any, Any]], device: torch.device, length: int | None) -> None:
        self._load, self._execution_device, self._length = load, device, length
        self._known: dict[str, Tensor] = {}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        tokenizer, encoder = self._load()
        return tokenizer, encoder.to(self._execution_device).eval().requires_grad_(False)

    @property
    def tokenizer(self) -> Any:
        return self._loaded[0]

    @property
    def text_encoder(self) -> Any:
        return self._loaded[1]

    @property
    def length(self) -> int:
        """Return the tokens of an embedding: the pipeline's `max_sequence_length`."""
        return min(512, self.tokenizer.model_max_length) if self._length is None else self._length

    @torch.no_grad()
    def __call__(self, prompt: str) -> Tensor:
        """Embed a prompt: (L, D) in the encoder's dtype, on the CPU; rows of padding are zeros."""
        if prompt not in self._known:
            self._known[prompt] = self._get_t5_prompt_embeds(prompt, max_sequence_length=self.length)[0].cpu()
        return self._known[prompt]


@dataclass
class Models:
    """What a run holds; parts that its stage has no use for are None."""

    vae: AutoencoderKLWan
    text: PromptEncoder
    transformer: MirageTransformer3DModel | None = None
    memory_adapter: MirageMemoryAdapter | None = None
    latent_depth: LatentDepth | None = None

    def vae_fingerprint(self) -> str:
        """Return a fingerprint of the VAE's weights and of the scale of its latents."""
        scale = [self.vae.config[name] for name in _SCALE]
        return f"{derive_seed(str(fingerprint(self.vae)), str(scale)):016x}"


def load_models(config: TrainConfig, device: torch.device) -> Models:
    """Load the models of a run onto `device`, nothing trainable yet. New ones draw weights from the global generator.

    Raises:
        OSError, ValueError: no such model, or models that do not belong together.
    """
    wanted = config.models
    half = HALF.get(config.mixed_precision, torch.float32)
    parts = _Parts(wanted)
    vae = parts.get("vae", AutoencoderKLWan, torch.float32)
    models = Models(vae, PromptEncoder(parts.text, device, wanted.text_length))
    if config.stage == "vae":
        return _settle(models, device)
    # What is trained is held in float32, what is frozen in the precision that it is computed in.
    frozen = config.stage != "backbone"
    transformer = parts.get("transformer", MirageTransformer3DModel, half if frozen else torch.float32)
    assert transformer is not None
    models.transformer = transformer
    if frozen:
        models.memory_adapter = parts.adapter(transformer, config)
        adapter, memory = models.memory_adapter, config.objective.memory
        if adapter is not None and adapter.config.control == "rays" and memory != "none":
            raise ValueError(
                f"objective.memory must be none for an adapter of control rays, which is shown no memory, got {memory}"
            )
    if wanted.latent_depth is not None:
        models.latent_depth = parts.get("latent_depth", LatentDepth, torch.float32)
    check_models(vae, transformer, models.memory_adapter, models.latent_depth)
    return _settle(models, device)


def _settle(models: Models, device: torch.device) -> Models:
    for model in (models.vae, models.transformer, models.memory_adapter, models.latent_depth):
        if model is not None:
            model.to(device).eval().requires_grad_(False)
    return models


class _Parts:
    def __init__(self, wanted: ModelsConfig) -> None:
        self.wanted = wanted

    @cached_property
    def tiny(self) -> Any:
        return tiny_random_pipeline()

    def get(self, name: str, cls: Any, dtype: torch.dtype) -> Any:
        """Return one part: named by the configuration, new, or the pipeline's."""
        named = getattr(self.wanted, name)
        if isinstance(named, str):
            try:
                return cls.from_pretrained(named, torch_dtype=dtype)
            except OSError as error:
                if Path(named).is_dir():
                    raise
                raise OSError(f"models.{name}: no folder {named}, and no such model could be had: {error}") from None
        if isinstance(named, dict):
            return _new(name, cls, named)
        if self.wanted.pipeline == TINY_RANDOM:
            return getattr(self.tiny, name)
        return cls.from_pretrained(self.wanted.pipeline, subfolder=name, torch_dtype=dtype)

    def adapter(self, transformer: MirageTransformer3DModel, config: TrainConfig) -> MirageMemoryAdapter:
        named = self.wanted.memory_adapter
        if named is None and config.stage == "adapter":
            named = {}
        if isinstance(named, dict):
            named = {"control": "rays" if config.objective.memory == "none" else "memory"} | named
            try:
                # Its float32 weights are copies of the backbone's.
                return MirageMemoryAdapter.from_transformer(transformer, **named).float()
            except TypeError as error:
                raise ValueError(f"models.memory_adapter: {error}") from None
        adapter: MirageMemoryAdapter = self.get("memory_adapter", MirageMemoryAdapter, torch.float32)
        return adapter

    def text(self) -> tuple[Any, Any]:
        base = self.wanted.pipeline
        if base == TINY_RANDOM:
            return self.tiny.tokenizer, self.tiny.text_encoder
        tokenizer = AutoTokenizer.from_pretrained(base, subfolder="tokenizer")
        return tokenizer, UMT5EncoderModel.from_pretrained(base, subfolder="text_encoder", torch_dtype=torch.bfloat16)


def _new(name: str, cls: Any, options: dict[str, Any]) -> Any:
    """Make a new part; a VAE, transformer or depth head has the form of Wan2.2 where its options say nothing else."""
    defaults: dict[str, dict[str, Any]] = {
        "vae": {
            "z_dim": CHANNELS,
            "temperal_downsample": [False, True, True],
            "latents_mean": [0.0] * options.get("z_dim", CHANNELS),
            "latents_std": [1.0] * options.get("z_dim", CHANNELS),
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "scale_factor_temporal": 4,
        },
    }
    try:
        return cls(**{**defaults.get(name, {}), **options})
    except TypeError as error:
        raise ValueError(f"models.{name}: {error}") from None


def add_lora(transformer: MirageTransformer3DModel, config: LoraConfig, source: str | None = None) -> None:
    """Add a LoRA to train, float32: a new one whose second matrices are zero, or that of a file."""
    if source is not None:
        load_lora(transformer, source)
    else:
        targets = [target for name in config.targets for target in _LORA_TARGETS[name]]
        transformer.add_adapter(
            PeftLoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets)
        )
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def mark_trained(config: TrainConfig, models: Models) -> None:
    """Mark the parameters that the stage trains, a new LoRA included."""
    if config.stage == "vae":
        models.vae.requires_grad_(True)
        return
    assert models.transformer is not None
    if models.latent_depth is not None:
        models.latent_depth.requires_grad_(True)
    if config.stage == "backbone":
        models.transformer.requires_grad_(True)
    elif config.stage == "lora":
        add_lora(models.transformer, config.lora, config.models.lora)
    if models.memory_adapter is not None and (config.stage == "adapter" or config.train_adapter):
        models.memory_adapter.requires_grad_(True)
    if config.gradient_checkpointing:
        for model in (models.transformer, models.memory_adapter):
            if model is not None:
                model.enable_gradient_checkpointing()


def trained(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def save_models(out: Path, models: Models, stage: str, train_adapter: bool, dtype: torch.dtype) -> list[str]:
    """Save what a stage has trained, each part atomically; the models become `dtype`.

    Returns:
        Their names in `out`.
    """
    saved: list[str] = []
    parts: dict[str, Sequence[str]] = {
        "vae": ["vae"],
        "backbone": ["transformer", "latent_depth"],
        "adapter": ["memory_adapter", "latent_depth"],
        "lora": [*(["memory_adapter"] if train_adapter else []), "latent_depth"],
    }
    for name in parts[stage]:
        model = getattr(models, name)
        if model is not None:
            replace_folder(out / name, model.to(dtype).save_pretrained)
            saved.append(name)
    if stage == "lora":
        assert models.transformer is not None
        for parameter in trained(models.transformer).values():
            parameter.data = parameter.data.to(dtype)
        save_lora(models.transformer, out / LORA)
        saved.append(LORA)
    return saved

"""Loading a pipeline: saved ones, Wan's folders, memory adapters and LoRA from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from diffusers.loaders import WanLoraLoaderMixin

from .._moved import OLD_MODULES
from ..models.adapter import MirageMemoryAdapter
from ..models.lora import load_lora
from ..models.transformer import MirageTransformer3DModel

if TYPE_CHECKING:
    from typing_extensions import Self

# What a Wan pipeline records and this one has no use for.
_FOREIGN_COMPONENTS = ("transformer_2", "boundary_ratio", "expand_timesteps", "image_encoder", "image_processor")
_LOADING_OPTIONS = ("dtype", "torch_dtype", "cache_dir", "force_download", "local_files_only", "token")


class LoadablePipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """A diffusers pipeline that loads Wan2.2's folders with our transformer in place of theirs."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        memory_adapter: MirageMemoryAdapter | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a saved pipeline of this class, or a Wan2.2 pipeline such as `Wan-AI/Wan2.2-TI2V-5B-Diffusers`.

        Args:
            pretrained_model_name_or_path: folder, or id on the hub.
            memory_adapter: the model, or its folder or id; None takes the pipeline's own, if it has one.
            kwargs: as of `DiffusionPipeline.from_pretrained`: `dtype`, `vae=...`, and so on.
        """
        if isinstance(memory_adapter, (str, os.PathLike)):
            loading = {name: kwargs[name] for name in _LOADING_OPTIONS if name in kwargs}
            for name in {"dtype", "torch_dtype"} & set(loading):
                if isinstance(loading[name], dict):  # per component, as diffusers takes it
                    loading[name] = loading[name].get("memory_adapter", loading[name].get("default"))
            memory_adapter = MirageMemoryAdapter.from_pretrained(memory_adapter, **loading)
        if memory_adapter is not None:
            kwargs["memory_adapter"] = memory_adapter
        pipeline: Self = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return pipeline

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # A Wan pipeline names the stock class for the same weights, and records what this one has no use for.
        second = config_dict.get("transformer_2")
        if second is not None and second[0] is not None:
            raise ValueError("a Wan pipeline with one transformer is needed, such as Wan2.2-TI2V-5B; got one with two")
        known = {name: value for name, value in config_dict.items() if name not in _FOREIGN_COMPONENTS}
        for name, value in known.items():  # saved before models moved to their folder
            if isinstance(value, (list, tuple)) and value and value[0] in OLD_MODULES:
                known[name] = [OLD_MODULES[value[0]], *value[1:]]
        known["transformer"] = [MirageTransformer3DModel.__module__, MirageTransformer3DModel.__name__]
        return super().extract_init_dict(known, **kwargs)

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, adapter_name: str | None = None, **kwargs: Any
    ) -> None:
        """Load a LoRA as diffusers' Wan pipelines do, and files of the published release too; a misfit is an error.

        Args:
            pretrained_model_name_or_path_or_dict: a file or a state dict, see
                :func:`~mirage.models.lora.load_lora`; or a folder or an id on the hub.
            adapter_name: default "default".
            kwargs: for folders and ids, as of diffusers: `weight_name`, `subfolder`, and so on.

        Raises:
            ValueError: nothing in it fits the transformer, or not everything does.
        """
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, Mapping) or Path(source).is_file():
            return load_lora(self.transformer, source, adapter_name or "default")
        before = set(getattr(self.transformer, "peft_config", {}))
        super().load_lora_weights(source, adapter_name=adapter_name or "default", **kwargs)
        if before == set(getattr(self.transformer, "peft_config", {})):
            raise ValueError(
                f"pretrained_model_name_or_path_or_dict must hold a LoRA of this transformer, nothing in {source} fits"
            )

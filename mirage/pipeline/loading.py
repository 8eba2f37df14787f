"""Loading a pipeline: saved ones, Wan's folders, memory adapters and LoRA from elsewhere."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import unwrap_module
from safetensors import SafetensorError

from .._moved import OLD_MODULES
from ..models.adapter import MirageMemoryAdapter
from ..models.checkpoint_files import looks_like_path
from ..models.lora import inject_lora, read_lora, replace_lora
from ..models.lora_source import HUB_OPTIONS, find_lora
from ..models.transformer import MirageTransformer3DModel

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.get_logger(__name__)

# What a Wan pipeline records and this one has no use for.
_FOREIGN_COMPONENTS = ("transformer_2", "boundary_ratio", "expand_timesteps", "image_encoder", "image_processor")
_LOADING_OPTIONS = ("dtype", "torch_dtype", "cache_dir", "force_download", "local_files_only", "token")
_INDEX = "model_index.json"
# What diffusers' loading of LoRA takes too, and has no meaning here.
_IGNORED_OPTIONS = ("low_cpu_mem_usage", "use_safetensors")


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

        Raises:
            ValueError: not the folder of a pipeline, or a file in it is damaged or no checkpoint.
            FileNotFoundError: no such folder.
        """
        _check_folder(pretrained_model_name_or_path)
        if isinstance(memory_adapter, (str, os.PathLike)):
            loading = {name: kwargs[name] for name in _LOADING_OPTIONS if name in kwargs}
            for name in {"dtype", "torch_dtype"} & set(loading):
                if isinstance(loading[name], dict):  # per component, as diffusers takes it
                    loading[name] = loading[name].get("memory_adapter", loading[name].get("default"))
            memory_adapter = MirageMemoryAdapter.from_pretrained(memory_adapter, **loading)
        if memory_adapter is not None:
            kwargs["memory_adapter"] = memory_adapter
        try:
            pipeline: Self = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{pretrained_model_name_or_path}: a file of weights cannot be read ({reason})") from error
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
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA of any of the forms in docs/lora.md, with the effect that its file says; a misfit is an error.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a state dict, a folder with a LoRA, or an id on the hub.
            adapter_name: default "default_0", or the next number that is free.
            hotswap: whether to put the weights in the place of the LoRA `adapter_name`, which has the same layers,
                ranks and settings.
            kwargs: `weight_name` and `subfolder` for folders and ids; `cache_dir`, `force_download`,
                `local_files_only`, `revision` and `token` for ids.

        Raises:
            ValueError: not everything in it fits the transformer, or it is of a form that is not supported. The
                transformer is as it was then.
            FileNotFoundError: no such file, folder or id.
            TypeError: an argument that is not known.
        """
        source = pretrained_model_name_or_path_or_dict
        unknown = sorted(kwargs.keys() - {"weight_name", "subfolder", *HUB_OPTIONS, *_IGNORED_OPTIONS})
        if unknown:
            raise TypeError(f"load_lora_weights got an unexpected keyword argument {unknown[0]!r}")
        located = {name: value for name, value in kwargs.items() if name not in _IGNORED_OPTIONS}
        if isinstance(source, (str, os.PathLike)):
            source = find_lora(source, **located)
        elif given := [name for name, value in located.items() if value is not None]:
            raise ValueError(f"{given[0]} must be None beside a state dict, got {located[given[0]]!r}")
        elif not isinstance(source, Mapping):
            raise TypeError(
                "pretrained_model_name_or_path_or_dict must be a path, an id or a state dict, got"
                f" {type(source).__name__}"
            )
        transformer = unwrap_module(self.transformer)
        present = getattr(transformer, "peft_config", {})
        if hotswap:
            replace_lora(transformer, source, adapter_name or next(iter(present), "default_0"))
            return
        if adapter_name is None:
            adapter_name = next(name for i in range(len(present) + 1) if (name := f"default_{i}") not in present)
        lora = read_lora("source", source, transformer, adapter_name)
        active = transformer.active_adapters() if present else []
        with self._without_offloading():
            inject_lora(transformer, lora, adapter_name)
        if active:
            logger.warning(
                "the LoRA %s is active now and %s no longer is: set_adapters takes several names and their weights",
                adapter_name,
                ", ".join(active),
            )

    @contextmanager
    def _without_offloading(self) -> Iterator[None]:
        """Take the hooks of offloading off for as long as layers change, and put them on again."""
        whole, sequential, _ = unwrap_module(self.transformer)._optionally_disable_offloading(self)
        try:
            yield
        finally:
            if whole:
                self.enable_model_cpu_offload()
            elif sequential:
                self.enable_sequential_cpu_offload()


def _on_plain_transformer(method: Callable[..., Any]) -> Any:
    """Make a method of diffusers' that looks at the transformer's class see the one that `torch.compile` was given."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = self.transformer
        if unwrap_module(given) is given:
            return method(self, *args, **kwargs)
        self.transformer = unwrap_module(given)
        try:
            return method(self, *args, **kwargs)
        finally:
            self.transformer = given

    return call


for _name in (
    *("set_adapters", "get_active_adapters", "get_list_adapters", "delete_adapters", "disable_lora", "enable_lora"),
    *("fuse_lora", "unfuse_lora", "unload_lora_weights"),
):
    setattr(LoadablePipeline, _name, _on_plain_transformer(getattr(WanLoraLoaderMixin, _name)))


def _check_folder(source: str | os.PathLike[str]) -> None:
    """Check that what is on this machine under a name is a pipeline's folder; a name of the hub passes.

    Raises:
        ValueError: it is something else, and what to do with it.
        FileNotFoundError: nothing is there, and it is no name of the hub.
    """
    path = Path(source).expanduser()
    load = "mirage.models.checkpoints.load_published(pipe.transformer, dit=...) loads its weights into a pipeline"
    wanted = "pretrained_model_name_or_path must be the folder of a pipeline or an id on the hub"
    if path.is_file():
        raise ValueError(f"{wanted}, got the file {source}: {load} such as Wan-AI/Wan2.2-TI2V-5B-Diffusers")
    if not path.is_dir():
        if looks_like_path(str(source)):
            raise FileNotFoundError(f"no such folder: {source}")
        return
    if not (path / _INDEX).is_file():
        config = _read_json(path / "config.json") if (path / "config.json").is_file() else {}
        kind = config.get("_class_name") if isinstance(config, dict) else None
        if kind == "WanModel" or any(path.glob("*.safetensors")) or any(path.glob("*.index.json")):
            raise ValueError(
                f"{wanted}, got {source}, which holds the weights of one model ({kind or 'no class named'}) and no"
                f" {_INDEX}: {load} such as Wan-AI/Wan2.2-TI2V-5B-Diffusers"
            )
        raise ValueError(f"{wanted}, got {source}, which holds no {_INDEX}")
    index = _read_json(path / _INDEX)
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ValueError(f"{path / _INDEX}: must name the pipeline's class and its parts")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON ({error})") from error

"""LoRA of the transformer: loaded in every common form, all or nothing, and saved as diffusers does.

Every key is checked against the transformer's linear layers before the first weight is written, so that a failed load
leaves it as it was.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from torch import Tensor

from mirage_kernels.io import replace_tensors

from .checkpoint_files import (
    Source,
    describe_shape,
    label_source,
    list_shapes,
    read_state,
    refuse,
    rename_dit,
    strip_prefixes,
)
from .transformer import MirageTransformer3DModel

_LORA_KEY = re.compile(r"(.+)\.(?:lora_(A|B|down|up)(?:\.default)?\.weight|(alpha))")
_MUSUBI_KEY = re.compile(r"lora_unet_blocks_(\d+)_(self_attn|cross_attn|ffn)_(\w+)")


class ReadLora(NamedTuple):
    """Matrices under peft's names, and the values of the `LoraConfig` that scales them as their file says."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def load_lora(transformer: MirageTransformer3DModel, source: Source, adapter_name: str = "default") -> None:
    """Add a LoRA to the transformer: ours, diffusers', peft's, kohya's and musubi's, ComfyUI's, or the published one.

    Its scale is what its file says: `lora_adapter_metadata` as diffusers writes it, `.alpha` keys, else 1.

    Args:
        transformer: to add it to.
        source: as in :func:`~mirage.models.checkpoints.load_published`.
        adapter_name: peft's name for it, of `transformer.set_adapters` and the like.

    Raises:
        ValueError: a key that is no LoRA matrix of this transformer's linear layers, a matrix without its other half,
            another shape, nothing at all, or `adapter_name` is taken. The transformer is as it was then.
        FileNotFoundError: no such file.
    """
    inject_lora(transformer, read_lora("source", source, transformer, adapter_name), adapter_name)


def save_lora(transformer: MirageTransformer3DModel, path: str | Path, adapter_name: str = "default") -> None:
    """Write one LoRA to a safetensors file, atomically, as diffusers does: scale and ranks are in the metadata.

    `WanImageToVideoPipeline.load_lora_weights(path)` and :func:`load_lora` load it with the same effect. Weights given
    to `set_adapters` belong to the run and are not saved.

    Raises:
        ValueError: no such LoRA on the transformer, or `path` does not end in `.safetensors`.
    """
    names = list(getattr(transformer, "peft_config", {}))
    if adapter_name not in names:
        raise ValueError(f"adapter_name must be a LoRA of this transformer, one of {names}, got {adapter_name!r}")
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    config = transformer.peft_config[adapter_name].to_dict()
    described = {
        f"transformer.{name}": sorted(value) if isinstance(value, set) else value for name, value in config.items()
    }
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(described, sort_keys=True)}
    matrices = get_peft_model_state_dict(transformer, adapter_name=adapter_name)
    replace_tensors(path, {f"transformer.{name}": value for name, value in matrices.items()}, metadata)


def read_lora(
    part: str, source: Source, transformer: MirageTransformer3DModel, adapter_name: str, factor: float = 1.0
) -> ReadLora:
    """Read a LoRA and check it against the transformer; `factor` scales it on top of what its file says.

    Raises:
        ValueError, FileNotFoundError: as of :func:`load_lora`.
    """
    if adapter_name in getattr(transformer, "peft_config", {}):
        raise ValueError(f"adapter_name must be new, but the transformer has a LoRA {adapter_name!r} already")
    state, metadata = read_state("lora", source)
    label = label_source(part, source)
    found = _matched_lora(label, state, transformer)
    described = _described(label, metadata)
    ranks = {module: int(of["A"].shape[0]) for module, of in found.items()}
    alphas = {module: factor * _alpha(of, module, ranks[module], described) for module, of in found.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{module}": value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{module}": value for module, value in alphas.items() if value != alpha},
        "target_modules": sorted(found),
    }
    tensors = {f"{module}.lora_{kind}.weight": of[kind] for module, of in found.items() for kind in "AB"}
    return ReadLora(tensors, config)


def _matched_lora(
    label: str, state: dict[str, Any], transformer: MirageTransformer3DModel
) -> dict[str, dict[str, Tensor]]:
    """Return {linear layer: {"A": (rank, in), "B": (out, rank) and perhaps "alpha"}}; raise unless everything fits."""
    linear = {
        name.removesuffix(".weight").removesuffix(".base_layer"): shape
        for name, shape in list_shapes(transformer).items()
        if name.endswith(".weight") and len(shape) == 2 and ".lora_" not in name
    }
    found: dict[str, dict[str, Tensor]] = {}
    keys: dict[tuple[str, str], str] = {}
    left_over = []
    for key, value in state.items():
        match = _LORA_KEY.fullmatch(strip_prefixes(key))
        module = _linear_name(match[1]) if match else ""
        if match is None or module not in linear:
            left_over.append(key)
            continue
        kind = {"down": "A", "up": "B", None: "alpha"}.get(match[2], match[2])
        if (module, kind) in keys:
            raise ValueError(f"{label}: {keys[module, kind]} and {key} are the same weight")
        keys[module, kind] = key
        found.setdefault(module, {})[kind] = value

    missing = [f"lora_{kind} of {module}" for module, of in found.items() for kind in "AB" if kind not in of]
    reshaped = []
    for module, of in found.items():
        down, up, (rows, columns) = describe_shape(of.get("A")), describe_shape(of.get("B")), linear[module]
        fits = down[1:] == (columns,) and down[0] > 0 and up == (rows, down[0])
        if "A" in of and "B" in of and not fits:
            reshaped.append(f"{module} {down} and {up} where (rank, {columns}) and ({rows}, rank) are expected")
    if left_over or missing or reshaped or not found:
        refuse(label, len(keys), len(state), "transformer's linear layers", left_over, missing, reshaped)
    return found


def _linear_name(name: str) -> str:
    """Return diffusers' name of a linear layer, from its own, Wan's or musubi's."""
    if match := _MUSUBI_KEY.fullmatch(name):
        name = f"blocks.{match[1]}.{match[2]}.{match[3]}"
    return rename_dit(f"{name}.weight").removesuffix(".weight")


def _described(label: str, metadata: dict[str, str]) -> LoraConfig | None:
    """Return the `LoraConfig` in a file's metadata, where diffusers puts it."""
    if LORA_ADAPTER_METADATA_KEY not in metadata:
        return None
    try:
        described = json.loads(metadata[LORA_ADAPTER_METADATA_KEY])
        return LoraConfig(**{name.removeprefix("transformer."): value for name, value in described.items()})
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{label}: its {LORA_ADAPTER_METADATA_KEY} must be a LoraConfig's values ({error})") from error


def _alpha(found: dict[str, Any], module: str, rank: int, described: LoraConfig | None) -> float:
    """Return the alpha of a module: its LoRA adds alpha / rank times B A."""
    if "alpha" in found:
        return float(found["alpha"])
    if described is None:
        return rank
    alpha = described.alpha_pattern.get(get_pattern_key(described.alpha_pattern, module), described.lora_alpha)
    return alpha * math.sqrt(rank) if described.use_rslora else alpha


def inject_lora(transformer: MirageTransformer3DModel, lora: ReadLora, adapter_name: str) -> None:
    """Put a LoRA that was read on the transformer."""
    transformer.load_lora_adapter(lora.tensors, prefix=None, adapter_name=adapter_name, metadata=lora.config)

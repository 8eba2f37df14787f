"""LoRA of the transformer: loaded in every common form, all or nothing, and saved as diffusers does.

Every key is checked against the transformer's layers before the first weight is written, so that a failed load leaves
it as it was.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.peft_utils import _create_lokr_config
from diffusers.utils.torch_utils import unwrap_module
from peft import LoHaConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor, nn

from mirage_kernels.io import replace_tensors

from .checkpoint_files import Source, label_source, read_state
from .lora_keys import Part, Targets, is_lycoris, list_targets, match_keys
from .lora_layers import LoraNorm, make_lycoris, make_matrices
from .lora_source import find_config, find_lora
from .lora_strength import Strength, read_strength

if TYPE_CHECKING:
    from .transformer import MirageTransformer3DModel


class ReadLora(NamedTuple):
    """Matrices under peft's names, and the configuration that scales them as their file says."""

    tensors: dict[str, Tensor]
    config: PeftConfig


def load_lora(transformer: MirageTransformer3DModel, source: Source, adapter_name: str = "default") -> None:
    """Add a LoRA to the transformer, of any of the forms in docs/lora.md, with the effect that its file says.

    Args:
        transformer: to add it to; compiled or not.
        source: as in :func:`~mirage.models.checkpoints.load_published`.
        adapter_name: peft's name for it, of `transformer.set_adapters` and the like.

    Raises:
        ValueError: a key that belongs to no layer of this transformer, a matrix without its other half, another shape
            or width, a form that is not supported, nothing at all, or `adapter_name` is taken. The transformer is as it
            was then.
        FileNotFoundError: no such file.
    """
    plain = unwrap_module(transformer)
    inject_lora(plain, read_lora("source", source, plain, adapter_name), adapter_name)


def save_lora(transformer: MirageTransformer3DModel, path: str | Path, adapter_name: str = "default") -> None:
    """Write one LoRA to a safetensors file, atomically, as diffusers does: scale and ranks are in the metadata.

    `WanImageToVideoPipeline.load_lora_weights(path)` and :func:`load_lora` load it with the same effect. Differences of
    norms, which diffusers does not know, have ComfyUI's names. Weights given to `set_adapters` belong to the run and
    are not saved.

    Raises:
        ValueError: no such LoRA on the transformer, or `path` does not end in `.safetensors`.
    """
    transformer = unwrap_module(transformer)
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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have invalid shape", UserWarning)  # peft's, of biases
        matrices = get_peft_model_state_dict(transformer, adapter_name=adapter_name)
    for name, module in transformer.named_modules():
        if isinstance(module, LoraNorm) and adapter_name in module.lora_A:
            scale = config["alpha_pattern"].get(f"^{name}", config["lora_alpha"])  # its rank is 1
            matrices[f"{name}.diff"] = (matrices.pop(f"{name}.lora_B.weight") @ matrices.pop(f"{name}.lora_A.weight"))[
                :, 0
            ] * scale
            if f"{name}.lora_B.bias" in matrices:
                matrices[f"{name}.diff_b"] = matrices.pop(f"{name}.lora_B.bias") * scale
    replace_tensors(path, {f"transformer.{name}": value for name, value in matrices.items()}, metadata)


def replace_lora(transformer: MirageTransformer3DModel, source: Source, adapter_name: str) -> None:
    """Put the weights of a LoRA in the place of another's, whose layers and ranks have room for it.

    Nothing is compiled again. Layers that the new one leaves alone get zeros; weights of `set_adapters` are 1 again.

    Raises:
        ValueError: as of :func:`load_lora`, or there is no such LoRA, or no room in it. The transformer is as it was
            then.
    """
    present = getattr(transformer, "peft_config", {})
    if adapter_name not in present:
        raise ValueError(f"adapter_name must be a LoRA to replace, one of {list(present)}, got {adapter_name!r}")
    lora = read_lora("source", source, transformer, adapter_name, new=False)
    label = label_source("source", source)
    config, held = lora.config, present[adapter_name]
    if not isinstance(config, LoraConfig) or config.use_dora != held.use_dora:
        raise ValueError(f"hotswap must be False: {label} is of another kind than the LoRA {adapter_name!r}")
    room = get_peft_model_state_dict(transformer, adapter_name=adapter_name)
    for name, value in lora.tensors.items():
        if name not in room or any(a > b for a, b in zip(value.shape, room[name].shape, strict=True)):
            got = tuple(room[name].shape) if name in room else "none"
            raise ValueError(
                f"hotswap must be False: {label} needs room for {name} {tuple(value.shape)}, and the LoRA"
                f" {adapter_name!r} has {got}"
            )
    with torch.no_grad():
        for name, value in room.items():  # views of the weights themselves
            value.zero_()
            if name in lora.tensors:
                new = lora.tensors[name]
                value[tuple(slice(side) for side in new.shape)] = new.to(value)
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.scaling:
            module.r[adapter_name] = config.rank_pattern.get(f"^{name}", config.r)
            module.lora_alpha[adapter_name] = config.alpha_pattern.get(f"^{name}", config.lora_alpha)
            module.use_rslora[adapter_name] = False
            scale = module.lora_alpha[adapter_name] / module.r[adapter_name]
            if isinstance(module.scaling[adapter_name], Tensor):  # as `enable_lora_hotswap` makes it
                module.scaling[adapter_name].fill_(scale)
            else:
                module.scaling[adapter_name] = scale
    config.target_modules, config.lora_bias = held.target_modules, held.lora_bias
    transformer.peft_config[adapter_name] = config


def read_lora(
    part: str,
    source: Source,
    transformer: MirageTransformer3DModel,
    adapter_name: str,
    factor: float = 1.0,
    new: bool = True,
) -> ReadLora:
    """Read a LoRA and check it against the transformer; `factor` scales it on top of what its file says.

    Raises:
        ValueError, FileNotFoundError: as of :func:`load_lora`; a name that is taken is an error only for a `new` one.
    """
    present = getattr(transformer, "peft_config", {})
    if adapter_name in present and new:
        raise ValueError(f"adapter_name must be new, but the transformer has a LoRA {adapter_name!r} already")
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name must be a name without dots, got {adapter_name!r}")
    if isinstance(source, (str, Path)):
        source = find_lora(source)
    label = label_source(part, source)
    state, metadata = read_state("lora", source)
    strength = read_strength(label, metadata, find_config(source) if isinstance(source, Path) else None)
    targets = list_targets(transformer)
    found = match_keys(label, state, targets)
    strength.check_patterns([(name, part.spelled) for name, part in found.items()])
    if any(is_lycoris(part.tensors) for part in found.values()):
        lora = _read_lycoris(label, found, strength, factor)
    else:
        lora = _read_matrices(label, found, strength, targets, factor)
    others = {str(config.peft_type) for config in present.values()} - {str(lora.config.peft_type)}
    if others:
        raise ValueError(f"{label}: a LoRA and LoKr or LoHa cannot be on a transformer at once: unload the other first")
    return lora


def _read_matrices(label: str, found: dict[str, Part], strength: Strength, targets: Targets, factor: float) -> ReadLora:
    if strength.peft_type != "LORA":
        raise ValueError(f"{label}: holds a LoRA, but {strength.where} says {strength.peft_type}")
    matrices: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    ranks: dict[str, int] = {}
    for name, (tensors, spelled) in found.items():
        if name in targets.norms:
            size = targets.norms[name][0]
            given = tensors.get("diff", torch.zeros(size)).float()
            matrices[name] = {"A": torch.ones(1, 1), "B": given[:, None]}
            alphas[name], ranks[name] = factor, 1
            if "diff_b" in tensors:
                matrices[name]["bias"] = tensors["diff_b"].float()
            continue
        alpha = 1.0
        if "A" in tensors:
            alpha = _layer_alpha(label, name, tensors, spelled, strength)
        matrices[name], alpha, ranks[name] = make_matrices(tensors, alpha, targets.layers[name])
        alphas[name] = factor * alpha
    dora = {name for name, part in found.items() if "magnitude" in part.tensors}
    with_bias = any("bias" in of for of in matrices.values())
    linear = {name for name in found if len(targets.layers.get(name, ())) == 2}
    if dora or strength.dora:
        without = sorted(found.keys() - dora)
        if without or with_bias or dora - linear:
            raise ValueError(
                f"{label}: a DoRA must have matrices and a magnitude of linear layers alone, missing: "
                f"{', '.join(without[:5]) or 'none'}"
            )
        for name in dora:
            matrices[name]["magnitude"] = found[name].tensors["magnitude"].flatten()
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={f"^{name}": value for name, value in ranks.items() if value != rank},
        alpha_pattern={f"^{name}": value for name, value in alphas.items() if value != alpha},
        target_modules=sorted(found),
        use_dora=bool(dora),
        lora_bias=with_bias,
    )
    tensors = {}
    for name, of in matrices.items():
        tensors |= {f"{name}.lora_{kind}.weight": of[kind] for kind in "AB"}
        if "magnitude" in of:
            tensors[f"{name}.lora_magnitude_vector"] = of["magnitude"]
        if with_bias and (name not in targets.norms or targets.norms[name][1]):
            rows = of["B"].shape[0]
            tensors[f"{name}.lora_B.bias"] = of.get("bias", torch.zeros(rows, dtype=of["B"].dtype))
    return ReadLora(tensors, config)


def _layer_alpha(label: str, name: str, tensors: dict[str, Any], spelled: str, strength: Strength) -> float:
    rank = int(tensors["A"].shape[0])
    if "alpha" in tensors:
        alpha = float(tensors["alpha"])
        if not abs(alpha) < float("inf"):
            raise ValueError(f"{label}: alpha of {name} must be finite, got {alpha}")
        return alpha
    said = strength.rank_of((name, spelled))
    if said is not None and said != rank:
        raise ValueError(f"{label}: the matrices of {name} have rank {rank}, but {strength.where} says {said}")
    return strength.alpha_of((name, spelled), rank)


def _read_lycoris(label: str, found: dict[str, Part], strength: Strength, factor: float) -> ReadLora:
    kinds = {kind.split("_")[0] for part in found.values() for kind in part.tensors} - {"alpha"}
    if len(kinds) > 1:
        raise ValueError(f"{label}: must hold a LoRA, a LoKr or a LoHa, got {' and '.join(sorted(kinds))}")
    tensors: dict[str, Tensor] = {}
    ranks = {}
    for name, (of, spelled) in found.items():
        names = (name, spelled)
        alpha = rank = None
        if strength.peft_type != "LORA":  # peft's own divides by the rank that it was given, whatever the factors are
            rank = strength.rank_of(names)
            alpha = strength.alpha_of(names, rank or 1)
        if "alpha" in of:
            alpha, rank = float(of["alpha"]), None
        elif strength.alpha is not None and strength.peft_type == "LORA":
            raise ValueError(f"{label}: holds LoKr or LoHa, but {strength.where} is of a LoRA")
        factors, ranks[name] = make_lycoris(of, alpha, rank)
        first = next(kind for kind in ("lokr_w1", "lokr_w1_a", "hada_w1_a") if kind in factors)
        factors[first] = factors[first] * factor
        tensors |= {f"{name}.{kind}": value for kind, value in factors.items()}
    if kinds == {"hada"}:
        rank = Counter(ranks.values()).most_common(1)[0][0]
        pattern = {f"^{name}": value for name, value in ranks.items() if value != rank}
        config: PeftConfig = LoHaConfig(
            r=rank, alpha=rank, rank_pattern=pattern, alpha_pattern=dict(pattern), target_modules=sorted(found)
        )
        return ReadLora(tensors, config)
    try:
        return ReadLora(tensors, _create_lokr_config(tensors, None))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{label}: a LoKr that peft has no layers for ({error})") from error


def inject_lora(transformer: MirageTransformer3DModel, lora: ReadLora, adapter_name: str) -> None:
    """Put a LoRA that was read on the transformer.

    Raises:
        ValueError: peft's layers do not take it. The transformer is as it was then.
    """
    config = lora.config
    if isinstance(config, LoraConfig):
        config._register_custom_module({nn.LayerNorm: LoraNorm, nn.RMSNorm: LoraNorm})
    active = transformer.active_adapters() if getattr(transformer, "peft_config", None) else None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Already found a `peft_config`", UserWarning
            )  # a second LoRA is no mistake
            inject_adapter_in_model(config, transformer, adapter_name)
        result = set_peft_model_state_dict(transformer, lora.tensors, adapter_name)
        missing = [
            name for name in result.missing_keys if name.endswith((f".{adapter_name}", f".{adapter_name}.weight"))
        ]
        if result.unexpected_keys or missing:
            raise ValueError(f"peft has no layers for this LoRA: {(result.unexpected_keys or missing)[0]}")
    except BaseException:
        if active is None:
            transformer.unload_lora()
        else:
            transformer.delete_adapters(adapter_name)
            transformer.set_adapter(active)
        raise
    transformer._hf_peft_config_loaded = True
    if transformer._prepare_lora_hotswap_kwargs is not None:  # asked for by `enable_lora_hotswap`, of the first LoRA
        prepare_model_for_compiled_hotswap(transformer, config=config, **transformer._prepare_lora_hotswap_kwargs)
        transformer._prepare_lora_hotswap_kwargs = None

"""Weights from elsewhere: the published release's own files, and LoRA in every common form. All or nothing.

A weight that finds no place is an error here and never a warning: every key of every file is checked against the
models' names and shapes before the first weight is written, so that a failed load leaves the models as they were.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import init_empty_weights
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mirage_kernels.io import replace_file

from .adapter import MirageMemoryAdapter
from .transformer import MirageTransformer3DModel

# A state dict, a file of one, or the files of its shards.
Source = Mapping[str, Any] | str | Path | Sequence[str | Path]

# Module names that stand before a weight's own, in any number and order.
_PREFIXES = ("module.", "model.", "pipe.", "dit.", "vace.", "diffusion_model.", "base_model.", "transformer.")
_PICKLED = (".pt", ".pth", ".ckpt", ".bin")
_HEAD_DIM = 128  # of every Wan model; shapes do not tell it
_LORA_KEY = re.compile(r"(.+)\.(?:lora_(A|B|down|up)(?:\.default)?\.weight|(alpha))")
_MUSUBI_KEY = re.compile(r"lora_unet_blocks_(\d+)_(self_attn|cross_attn|ffn)_(\w+)")


class PublishedModels(NamedTuple):
    """What :func:`load_published` filled: the models given or built, None for one neither given nor in the files."""

    transformer: MirageTransformer3DModel | None
    adapter: MirageMemoryAdapter | None


class _Weights(NamedTuple):
    """Tensors under our names, the key each came from, and what to call their source in errors."""

    label: str
    tensors: dict[str, Tensor]
    keys: dict[str, str]


class _Lora(NamedTuple):
    """Matrices under peft's names, and the values of the `LoraConfig` that scales them as their file says."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def load_published(
    transformer: MirageTransformer3DModel | None = None,
    adapter: MirageMemoryAdapter | None = None,
    *,
    dit: Source | None = None,
    vace: Source | None = None,
    lora: Source | None = None,
    alpha: float = 1.0,
) -> PublishedModels:
    """Load weights of the published release (microsoft/LatentSpatialMemory), under its key names, into our models.

    A source is a state dict; a `.safetensors`, `.pt`, `.pth`, `.ckpt` or `.bin` file of one (read with
    `weights_only=True`); or a sequence of such files, the shards of one. It may be wrapped, as
    `{"vace": ...}`, `{"generator": {"vace": ...}}` or `{"state_dict": ...}`, and its keys may carry the usual prefixes.

    A model that is not given is built from the state dict's shapes, in its dtypes, on the CPU, with 128 channels a head
    as every Wan model has. Shapes do not say where the adapter's N blocks belong: they are spread evenly over the
    transformer's, every second one of 30 as published.

    Args:
        transformer: takes `dit` and `lora`; keeps its device and dtype.
        adapter: takes `vace`; keeps its device and dtype.
        dit: the backbone, "blocks.0.self_attn.q.weight".
        vace: the memory branch, "vace_blocks.0.self_attn.q.weight".
        lora: of the backbone, "pipe.dit.blocks.0.self_attn.q.lora_A.weight"; becomes the peft adapter "default".
        alpha: the published code's: the LoRA adds alpha B A (times alpha / rank of the file, where it has one).

    Returns:
        The models.

    Raises:
        ValueError: a key left over or missing, or another shape; a file that is no checkpoint; a model that cannot be
            built, or has a LoRA already. Nothing is loaded into any model then.
        FileNotFoundError: no such file.
    """
    if dit is None and vace is None and lora is None:
        raise ValueError("one of dit, vace and lora must be given, got None")
    if transformer is not None and getattr(transformer, "peft_config", None) and dit is not None:
        raise ValueError(f"transformer must have no LoRA when dit is loaded, got {list(transformer.peft_config)}")
    if vace is not None and adapter is not None and adapter.config.control != "memory":
        raise ValueError(f'adapter must be of control "memory" with vace, got {adapter.config.control!r}')

    backbone = branch = parsed = None
    if dit is not None:
        backbone = _read_weights("dit", dit, _dit_name)
        transformer = _build_transformer(backbone) if transformer is None else transformer
        _check(backbone, _shapes(transformer), "transformer")
    if vace is not None:
        branch = _read_weights("vace", vace, _vace_name)
        adapter = _build_adapter(branch, transformer) if adapter is None else adapter
        _check(branch, _shapes(adapter), "adapter")
    if lora is not None:
        if transformer is None:
            raise ValueError("transformer or dit must be given with lora, got None")
        parsed = _read_lora("lora", lora, transformer, "default", alpha)

    if transformer is not None and backbone is not None:
        _fill(transformer, backbone.tensors)
    if adapter is not None and branch is not None:
        _fill(adapter, branch.tensors)
    if transformer is not None and parsed is not None:
        _inject(transformer, parsed, "default")
    return PublishedModels(transformer, adapter)


def load_lora(transformer: MirageTransformer3DModel, source: Source, adapter_name: str = "default") -> None:
    """Add a LoRA to the transformer: ours, diffusers', peft's, kohya's and musubi's, ComfyUI's, or the published one.

    Its scale is what its file says: `lora_adapter_metadata` as diffusers writes it, `.alpha` keys, else 1.

    Args:
        transformer: to add it to.
        source: as in :func:`load_published`.
        adapter_name: peft's name for it, of `transformer.set_adapters` and the like.

    Raises:
        ValueError: a key that is no LoRA matrix of this transformer's linear layers, a matrix without its other half,
            another shape, nothing at all, or `adapter_name` is taken. The transformer is as it was then.
        FileNotFoundError: no such file.
    """
    _inject(transformer, _read_lora("source", source, transformer, adapter_name), adapter_name)


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
    tensors = {f"transformer.{name}": value.detach().cpu().contiguous() for name, value in matrices.items()}
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata))


# Reading


def _label(part: str, source: Source) -> str:
    if isinstance(source, Mapping):
        return part
    paths = [source] if isinstance(source, (str, Path)) else source
    return f"{part} ({', '.join(str(path) for path in paths)})"


def _read(part: str, source: Source) -> tuple[dict[str, Any], dict[str, str]]:
    """The state dict of one part ("dit", "vace", "lora") out of its wrappers, and the metadata of its files."""
    metadata: dict[str, str] = {}
    if isinstance(source, Mapping):
        state = dict(_unwrapped(source, part))
    else:
        state = {}
        for path in [source] if isinstance(source, (str, Path)) else source:
            tensors, found = _read_file(Path(path))
            metadata |= found
            tensors = _unwrapped(tensors, part)
            twice = sorted(state.keys() & tensors.keys())
            if twice:
                raise ValueError(f"{_label(part, source)}: {_some(twice)} is in more than one of the files")
            state |= tensors
    return state, metadata


def _read_file(path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(str(path), framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); was it cut short?") from error
    if path.suffix not in _PICKLED:
        raise ValueError(f"{path}: a checkpoint file must end in .safetensors or one of {', '.join(_PICKLED)}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises for a broken or unsafe file depends on where it breaks
        raise ValueError(f"{path}: cannot be read with weights_only=True ({error})") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: a checkpoint file must hold a mapping of names to tensors, got {type(state)}")
    return state, {}


def _unwrapped(state: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    for way in ((part,), ("generator", part), ("state_dict",)):
        inner: Any = state
        for name in way:
            inner = inner.get(name) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            return inner
    return state


def _read_weights(part: str, source: Source, rename: Callable[[str, Any], str]) -> _Weights:
    state, _ = _read(part, source)
    weights = _Weights(_label(part, source), {}, {})
    for key, value in state.items():
        name = rename(_without_prefixes(key), value)
        if name in weights.keys:
            raise ValueError(f"{weights.label}: {weights.keys[name]} and {key} are the same weight, {name}")
        weights.keys[name] = key
        weights.tensors[name] = value
    return weights


def _without_prefixes(key: str) -> str:
    while True:
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
        if prefix is None:
            return key
        key = key[len(prefix) :]


def _dit_name(key: str, value: Any = None) -> str:
    """diffusers' name of a weight of Wan's; a name it does not know stays."""
    return next(iter(convert_wan_transformer_to_diffusers({key: value})))


def _vace_name(key: str, value: Any) -> str:
    """Our adapter's name of a weight of the published memory branch; a name it does not know stays."""
    if key.startswith("vace_patch_embedding."):
        return key.removeprefix("vace_")
    if match := re.fullmatch(r"vace_blocks\.0\.before_proj\.(.+)", key):
        return f"proj_in.{match[1]}"
    if match := re.fullmatch(r"vace_blocks\.(\d+)\.after_proj\.(.+)", key):
        return f"proj_out.{match[1]}.{match[2]}"
    if key.startswith("vace_blocks."):
        return _dit_name(key.removeprefix("vace_"), value)
    return key


# Checking


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check(weights: _Weights, shapes: dict[str, tuple[int, ...]], model: str) -> None:
    """Raise unless the weights are exactly the model's, name by name and shape by shape."""
    given = {name: _shape(value) for name, value in weights.tensors.items()}
    left_over = [weights.keys[name] for name in given if name not in shapes]
    missing = [name for name in shapes if name not in given]
    reshaped = [
        f"{weights.keys[name]} {shape} where {shapes[name]} is expected"
        for name, shape in given.items()
        if name in shapes and shape != shapes[name]
    ]
    if left_over or missing or reshaped:
        matching = len(given) - len(left_over) - len(reshaped)
        _refuse(weights.label, matching, len(given), f"{model}'s {len(shapes)}", left_over, missing, reshaped)


def _refuse(
    label: str, matching: int, given: int, expected: str, left_over: list[str], missing: list[str], reshaped: list[str]
) -> NoReturn:
    problems = {"left over": left_over, "missing": missing, "of another shape": reshaped}
    listed = [f"{what}: {_some(names)}" for what, names in problems.items() if names]
    raise ValueError(
        "; ".join([f"{label}: {matching} of {given} keys match the {expected}", *listed, "nothing loaded"])
    )


# Building and filling


def _build_transformer(weights: _Weights) -> MirageTransformer3DModel:
    dim, in_channels, *patch_size = _needed_shape(weights, "patch_embedding.weight")
    if dim % _HEAD_DIM:
        raise ValueError(
            f"transformer must be given, got None: {weights.label} is {dim} wide, which is no multiple of {_HEAD_DIM},"
            " the channels of a head in every Wan model, and its shapes do not say how many heads there are"
        )
    return _empty(
        MirageTransformer3DModel,
        patch_size=tuple(patch_size),
        num_attention_heads=dim // _HEAD_DIM,
        attention_head_dim=_HEAD_DIM,
        in_channels=in_channels,
        out_channels=_needed_shape(weights, "proj_out.weight")[0] // math.prod(patch_size),
        text_dim=_needed_shape(weights, "condition_embedder.text_embedder.linear_1.weight")[1],
        freq_dim=_needed_shape(weights, "condition_embedder.time_embedder.linear_1.weight")[1],
        **_block_config(weights),
        num_layers=_count_blocks(weights),
    )


def _build_adapter(weights: _Weights, transformer: MirageTransformer3DModel | None) -> MirageMemoryAdapter:
    if transformer is None:
        raise ValueError(
            "adapter must be given with vace, or transformer or dit, to say where its blocks belong, got None"
        )
    dim, control_channels, *patch_size = _needed_shape(weights, "patch_embedding.weight")
    block_config = _block_config(weights)
    blocks, layers = _count_blocks(weights), transformer.config.num_layers
    if layers % blocks:
        raise ValueError(
            f"adapter must be given: the {blocks} blocks of {weights.label} do not spread evenly over the transformer's"
            f" {layers}, got None"
        )
    head_dim = transformer.config.attention_head_dim
    if dim != head_dim * transformer.config.num_attention_heads:
        raise ValueError(
            f"{weights.label}: must be as wide as the transformer, {head_dim * transformer.config.num_attention_heads},"
            f" got {dim}"
        )
    return _empty(
        MirageMemoryAdapter,
        control_channels=control_channels,
        memory_layers=list(range(0, layers, layers // blocks)),
        patch_size=tuple(patch_size),
        num_attention_heads=transformer.config.num_attention_heads,
        attention_head_dim=head_dim,
        eps=transformer.config.eps,
        rope_max_seq_len=transformer.config.rope_max_seq_len,
        **block_config,
    )


def _needed_shape(weights: _Weights, name: str) -> tuple[int, ...]:
    if not isinstance(weights.tensors.get(name), Tensor):
        raise ValueError(
            f"{weights.label}: no model can be built without {name} in it; 0 of {len(weights.tensors)} keys are used,"
            f" which are {_some(weights.keys.values())}"
        )
    return tuple(weights.tensors[name].shape)


def _count_blocks(weights: _Weights) -> int:
    return 1 + max(int(match[1]) for name in weights.tensors if (match := re.match(r"blocks\.(\d+)\.", name)))


def _block_config(weights: _Weights) -> dict[str, Any]:
    return {
        "ffn_dim": _needed_shape(weights, "blocks.0.ffn.net.0.proj.weight")[0],
        "cross_attn_norm": "blocks.0.norm2.weight" in weights.tensors,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in weights.tensors else None,
    }


def _empty(cls: Any, **config: Any) -> Any:
    """A model whose parameters have no storage yet; its buffers, the rotary tables, are real."""
    with init_empty_weights(include_buffers=False):
        return cls(**config).eval()


def _fill(model: Any, tensors: dict[str, Tensor]) -> None:
    """Copy checked weights into a model; one made by :func:`_empty` gets storage, in their dtype or float32."""
    if any(parameter.is_meta for parameter in model.parameters()):
        tensors = {
            name: value.to(torch.float32 if _keeps_float32(model, name) else value.dtype, copy=True)
            for name, value in tensors.items()
        }
        model.load_state_dict(tensors, assign=True)
    else:
        model.load_state_dict(tensors)


def _keeps_float32(model: Any, name: str) -> bool:
    return any(module in name.split(".") for module in model._keep_in_fp32_modules)


# LoRA


def _read_lora(
    part: str, source: Source, transformer: MirageTransformer3DModel, adapter_name: str, factor: float = 1.0
) -> _Lora:
    """A LoRA checked against the transformer; `factor` scales it on top of what its file says."""
    if adapter_name in getattr(transformer, "peft_config", {}):
        raise ValueError(f"adapter_name must be new, but the transformer has a LoRA {adapter_name!r} already")
    state, metadata = _read("lora", source)
    label = _label(part, source)
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
    return _Lora(tensors, config)


def _matched_lora(
    label: str, state: dict[str, Any], transformer: MirageTransformer3DModel
) -> dict[str, dict[str, Tensor]]:
    """{linear layer: {"A": (rank, in), "B": (out, rank) and perhaps "alpha"}}; raises unless everything fits."""
    linear = {
        name.removesuffix(".weight").removesuffix(".base_layer"): shape
        for name, shape in _shapes(transformer).items()
        if name.endswith(".weight") and len(shape) == 2 and ".lora_" not in name
    }
    found: dict[str, dict[str, Tensor]] = {}
    keys: dict[tuple[str, str], str] = {}
    left_over = []
    for key, value in state.items():
        match = _LORA_KEY.fullmatch(_without_prefixes(key))
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
        down, up, (rows, columns) = _shape(of.get("A")), _shape(of.get("B")), linear[module]
        fits = down[1:] == (columns,) and down[0] > 0 and up == (rows, down[0])
        if "A" in of and "B" in of and not fits:
            reshaped.append(f"{module} {down} and {up} where (rank, {columns}) and ({rows}, rank) are expected")
    if left_over or missing or reshaped or not found:
        _refuse(label, len(keys), len(state), "transformer's linear layers", left_over, missing, reshaped)
    return found


def _linear_name(name: str) -> str:
    """diffusers' name of a linear layer, from its own, Wan's or musubi's."""
    if match := _MUSUBI_KEY.fullmatch(name):
        name = f"blocks.{match[1]}.{match[2]}.{match[3]}"
    return _dit_name(f"{name}.weight").removesuffix(".weight")


def _described(label: str, metadata: dict[str, str]) -> LoraConfig | None:
    """The `LoraConfig` in a file's metadata, where diffusers puts it."""
    if LORA_ADAPTER_METADATA_KEY not in metadata:
        return None
    try:
        described = json.loads(metadata[LORA_ADAPTER_METADATA_KEY])
        return LoraConfig(**{name.removeprefix("transformer."): value for name, value in described.items()})
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{label}: its {LORA_ADAPTER_METADATA_KEY} must be a LoraConfig's values ({error})") from error


def _alpha(found: dict[str, Any], module: str, rank: int, described: LoraConfig | None) -> float:
    """The alpha of a module: its LoRA adds alpha / rank times B A."""
    if "alpha" in found:
        return float(found["alpha"])
    if described is None:
        return rank
    alpha = described.alpha_pattern.get(get_pattern_key(described.alpha_pattern, module), described.lora_alpha)
    return alpha * math.sqrt(rank) if described.use_rslora else alpha


def _inject(transformer: MirageTransformer3DModel, lora: _Lora, adapter_name: str) -> None:
    transformer.load_lora_adapter(lora.tensors, prefix=None, adapter_name=adapter_name, metadata=lora.config)

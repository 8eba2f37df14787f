"""Weights of the published release, under its own names, in our models. All or nothing.

A weight that finds no place is an error here and never a warning: every key of every file is checked against the
models' names and shapes before the first weight is written, so that a failed load leaves the models as they were.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor

from .adapter import MirageMemoryAdapter
from .checkpoint_files import Source, Weights, check_weights, list_shapes, list_some, read_weights, rename_dit
from .lora import inject_lora, read_lora
from .lora import load_lora as load_lora
from .lora import save_lora as save_lora
from .transformer import MirageTransformer3DModel

_HEAD_DIM = 128  # of every Wan model; shapes do not tell it


class PublishedModels(NamedTuple):
    """What :func:`load_published` filled: the models given or built, None for one neither given nor in the files."""

    transformer: MirageTransformer3DModel | None
    adapter: MirageMemoryAdapter | None


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
    `weights_only=True`); or the shards of one: a sequence of files, their index, or the folder. It may be wrapped, as
    `{"vace": ...}`, `{"generator": {"vace": ...}}`, `{"state_dict": ...}`, `{"model": ...}` or `{"module": ...}`, and
    its keys may carry the usual prefixes, ComfyUI's, `torch.compile`'s and FSDP's among them. `dit` may have diffusers'
    names as well. Weights in fp8 are multiplied by their scales, where the file has some.

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
        backbone = read_weights("dit", dit, rename_dit)
        transformer = _build_transformer(backbone) if transformer is None else transformer
        check_weights(backbone, list_shapes(transformer), "transformer")
    if vace is not None:
        branch = read_weights("vace", vace, _rename_vace)
        adapter = _build_adapter(branch, transformer) if adapter is None else adapter
        check_weights(branch, list_shapes(adapter), "adapter")
    if lora is not None:
        if transformer is None:
            raise ValueError("transformer or dit must be given with lora, got None")
        parsed = read_lora("lora", lora, transformer, "default", alpha)

    if transformer is not None and backbone is not None:
        _fill(transformer, backbone.tensors)
    if adapter is not None and branch is not None:
        _fill(adapter, branch.tensors)
    if transformer is not None and parsed is not None:
        inject_lora(transformer, parsed, "default")
    return PublishedModels(transformer, adapter)


def _rename_vace(key: str, value: Any) -> str:
    """Return our adapter's name of a weight of the published memory branch; a name it does not know stays."""
    if key.startswith("vace_patch_embedding."):
        return key.removeprefix("vace_")
    if match := re.fullmatch(r"vace_blocks\.0\.before_proj\.(.+)", key):
        return f"proj_in.{match[1]}"
    if match := re.fullmatch(r"vace_blocks\.(\d+)\.after_proj\.(.+)", key):
        return f"proj_out.{match[1]}.{match[2]}"
    if key.startswith("vace_blocks."):
        return rename_dit(key.removeprefix("vace_"), value)
    return key


def _build_transformer(weights: Weights) -> MirageTransformer3DModel:
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


def _build_adapter(weights: Weights, transformer: MirageTransformer3DModel | None) -> MirageMemoryAdapter:
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


def _needed_shape(weights: Weights, name: str) -> tuple[int, ...]:
    if not isinstance(weights.tensors.get(name), Tensor):
        raise ValueError(
            f"{weights.label}: no model can be built without {name} in it; 0 of {len(weights.tensors)} keys are used,"
            f" which are {list_some(weights.keys.values())}"
        )
    return tuple(weights.tensors[name].shape)


def _count_blocks(weights: Weights) -> int:
    return 1 + max(int(match[1]) for name in weights.tensors if (match := re.match(r"blocks\.(\d+)\.", name)))


def _block_config(weights: Weights) -> dict[str, Any]:
    return {
        "ffn_dim": _needed_shape(weights, "blocks.0.ffn.net.0.proj.weight")[0],
        "cross_attn_norm": "blocks.0.norm2.weight" in weights.tensors,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in weights.tensors else None,
    }


def _empty(cls: Any, **config: Any) -> Any:
    """Make a model whose parameters have no storage yet; its buffers, the rotary tables, are real."""
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

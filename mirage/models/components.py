"""The components of a pipeline: whether they belong together, and fingerprints that tell one from another."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor

from . import TEMPORAL_COMPRESSION
from .adapter import MirageMemoryAdapter
from .latent_depth import LatentDepth
from .lora_folder import describe_weights
from .transformer import MirageTransformer3DModel

_SAMPLED_WEIGHTS = 64


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's values, in order."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def fingerprint(component: Any) -> str | None:
    """Return a string that changes with a component's class, dtype, shapes, weights (the first few of each tensor) and
    the weights of its LoRA, wherever it was loaded from and whether or not it is compiled; None for None."""
    if component is None:
        return None
    component = unwrap_module(component)
    digest = hashlib.sha256()
    if isinstance(component, torch.nn.Module):
        for name, weight in sorted(component.state_dict().items()):
            digest.update(f"{name.replace('_orig_mod.', '')} {tuple(weight.shape)} {weight.dtype}".encode())
            if not weight.is_meta:  # as under sequential offloading
                digest.update(tensor_bytes(weight.flatten()[:_SAMPLED_WEIGHTS]))
        control = getattr(getattr(component, "config", None), "control", "memory")
        if control != "memory":  # the same weights are another model then
            digest.update(control.encode())
        digest.update(describe_weights(component).encode())
    elif hasattr(component, "config"):
        known = {name: value for name, value in component.config.items() if not name.startswith("_")}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    return f"{type(component).__name__} {digest.hexdigest()[:16]}"


def check_models(
    vae: AutoencoderKLWan | None,
    transformer: MirageTransformer3DModel | None,
    memory_adapter: MirageMemoryAdapter | None = None,
    latent_depth: LatentDepth | None = None,
) -> None:
    """Check that models belong together. None stands for one that is not there, which nothing is checked against.

    Raises:
        TypeError, ValueError: they do not; the message says which and why.
    """
    if vae is not None:
        _check_against_vae(vae, transformer, memory_adapter, latent_depth)
    if transformer is None or memory_adapter is None:
        return
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    if memory_adapter.proj_in.in_features != width:
        raise ValueError(
            f"memory_adapter must be {width} wide like the transformer, got {memory_adapter.proj_in.in_features}"
        )
    last = max(memory_adapter.config.memory_layers)
    if last >= config.num_layers:
        raise ValueError(f"memory_adapter must name blocks 0 to {config.num_layers - 1} of the transformer, got {last}")


def check_dtypes(transformer: MirageTransformer3DModel, memory_adapter: MirageMemoryAdapter | None) -> None:
    """Check that the transformer and the adapter that it calls compute in one dtype, unless autocast sees to it.

    Quantised models, and those that store another dtype than they compute in, count by what they compute in. All other
    models are given tensors of their own dtype.

    Raises:
        ValueError: they do not; the message names both dtypes, and what to do.
    """
    if memory_adapter is None or torch.is_autocast_enabled(transformer.device.type):
        return
    ours, theirs = transformer.dtype, memory_adapter.dtype
    if ours != theirs and ours.is_floating_point and theirs.is_floating_point:
        name = str(ours).removeprefix("torch.")
        raise ValueError(
            f"memory_adapter must be {name} like the transformer, which calls it, got"
            f" {str(theirs).removeprefix('torch.')}: load both with dtype=torch.{name}, or call"
            f" pipe.memory_adapter.to(torch.{name})"
        )


def _check_against_vae(
    vae: AutoencoderKLWan,
    transformer: MirageTransformer3DModel | None,
    memory_adapter: MirageMemoryAdapter | None,
    latent_depth: LatentDepth | None,
) -> None:
    channels = vae.config.z_dim
    if vae.config.scale_factor_temporal != TEMPORAL_COMPRESSION:
        raise ValueError(
            f"vae must pack {TEMPORAL_COMPRESSION} frames in a latent one, got {vae.config.scale_factor_temporal}"
        )
    if transformer is not None and not isinstance(unwrap_module(transformer), MirageTransformer3DModel):
        raise TypeError(f"transformer must be MirageTransformer3DModel, got {type(transformer).__name__}")
    if transformer is not None and {transformer.config.in_channels, transformer.config.out_channels} != {channels}:
        raise ValueError(
            f"transformer must take and give {channels} channels like the VAE, got {transformer.config.in_channels} and"
            f" {transformer.config.out_channels}"
        )
    if memory_adapter is not None and memory_adapter.latent_channels != channels:
        raise ValueError(
            f"memory_adapter must take {channels} readout channels like the VAE, got"
            f" {memory_adapter.latent_channels} ({memory_adapter.config.control_channels} control channels)"
        )
    if latent_depth is not None and latent_depth.config.latent_channels != channels:
        raise ValueError(
            f"latent_depth must take {channels} channels like the VAE, got {latent_depth.config.latent_channels}"
        )

"""Files of packed clips: safetensors with latents, which `mirage prepare` writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from mirage_kernels import Cameras
from mirage_kernels.io import replace_tensors

from .clips import Clip

FORMAT, VERSION = "mirage-clip", 2

_HEADER_BYTES = 8


def save_clip(path: Path, clip: Clip) -> None:
    """Write a clip with latents to a safetensors file, atomically: latents float16, everything else as it is."""
    assert clip.latents is not None and clip.static_latent is not None
    tensors = {
        "latents": clip.latents.half(),
        "still": clip.static_latent.half(),
        "depth": clip.depth,
        "static": clip.static,
        "intrinsics": clip.cameras.intrinsics,
        "cam2world": clip.cameras.cam2world,
        "image_size": torch.tensor(clip.cameras.image_size),
    }
    if clip.prompt_embeds is not None:
        tensors["prompt_embeds"] = clip.prompt_embeds
    metadata = {"format": FORMAT, "version": str(VERSION)}
    metadata |= {"name": clip.name, "prompt": clip.prompt, "vae": clip.vae or ""}
    replace_tensors(path, tensors, metadata)


def load_clip(name: str, content: bytes) -> Clip:
    """Read a clip from the bytes of :func:`save_clip`.

    Raises:
        ValueError: they are no such file, or not whole.
    """
    try:
        tensors = load_tensors(content)
        length = int.from_bytes(content[:_HEADER_BYTES], "little")
        metadata = json.loads(content[_HEADER_BYTES : _HEADER_BYTES + length]).get("__metadata__", {})
    except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name}: not a whole safetensors file ({error}); was it cut short?") from None
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
        got = f"{metadata.get('format')!r} {metadata.get('version')!r}"
        raise ValueError(f"{name}: must be {FORMAT} version {VERSION}, which `mirage prepare` writes, got {got}")
    try:
        latents, depth, static = tensors["latents"].float(), tensors["depth"], tensors["static"]
        static_latent = tensors["still"].float()
        size = tensors["image_size"].tolist()
        cameras = Cameras(tensors["intrinsics"], tensors["cam2world"], size, square_pixels=False, off_center=True)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name}: a clip must hold its tensors: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    grid = (latents.shape[0], *latents.shape[2:])
    if latents.ndim != 4 or depth.shape != grid or static.shape != grid or len(cameras) != grid[0]:
        shapes = f"{tuple(latents.shape)}, {tuple(depth.shape)}, {tuple(static.shape)} and {len(cameras)} cameras"
        raise ValueError(f"{name}: latents, depth and static must be of the same tokens, got {shapes}")
    if static_latent.shape != latents.shape[1:]:
        shapes = f"{tuple(latents.shape[1:])}, got {tuple(static_latent.shape)}"
        raise ValueError(f"{name}: still must be a latent frame {shapes}")
    if not (latents.isfinite().all() and static_latent.isfinite().all()):
        raise ValueError(f"{name}: latents and still must be finite")
    if not depth.is_floating_point() or static.dtype != torch.bool or not depth.isfinite().all():
        raise ValueError(f"{name}: depth must be finite floats and static bool, got {depth.dtype} and {static.dtype}")
    embeds = tensors.get("prompt_embeds")
    if embeds is not None and not (embeds.ndim == 2 and embeds.is_floating_point() and embeds.isfinite().all()):
        raise ValueError(f"{name}: prompt_embeds must be (L, D), finite floats, got {tuple(embeds.shape)}")
    return Clip(
        name,
        metadata.get("prompt", ""),
        depth=depth,
        static=static,
        cameras=cameras,
        latents=latents,
        static_latent=static_latent,
        prompt_embeds=embeds,
        vae=metadata.get("vae") or None,
    )


def read_origin(path: Path) -> tuple[str | None, str | None]:
    """Read from the header of a file of :func:`save_clip` which VAE encoded the clip, and what it was made of.

    Returns:
        The VAE's fingerprint, and the clip's name in the data it was made of; None where the file does not say.

    Raises:
        OSError, ValueError: it cannot be read, is no safetensors file, or of an earlier version.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_BYTES), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path}: not a whole safetensors file; was it cut short?")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from None
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: not a safetensors file")
    if metadata.get("format") == FORMAT and metadata.get("version") != str(VERSION):
        what = "name another folder, or remove what is in this one"
        raise ValueError(f"{path}: {FORMAT} must be of version {VERSION}, got {metadata.get('version')}: {what}")
    return metadata.get("vae") or None, metadata.get("name") or None

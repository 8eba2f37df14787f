"""`mirage prepare`: encode clips once, so that training reads latents and needs neither frames nor the VAE."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.vae import encode_frames, encode_static_frame
from ..optional import import_extra
from .config import TrainConfig
from .data import ClipDataset, read_origin, save_clip
from .data.dataset import load_clip_of
from .models import load_models


@torch.no_grad()
def prepare(config: TrainConfig, out: Path, device: str = "cpu", progress: bool = True) -> dict[str, Any]:
    """Encode every clip of a run's data with its VAE, and its prompt, into `out`, one file each.

    Clips that are there already are left alone, so that a run that was stopped can be resumed; a folder that holds
    other clips than these is refused. Point a source of kind "packed" at the folder, or at tar shards of its files.

    Args:
        config: whose data and models are taken.
        out: folder to write into.
        device: where to encode.
        progress: show a progress bar.

    Returns:
        written, present (were there already), broken ({clip: reason}).

    Raises:
        OSError, ValueError: naming what cannot be used, such as a clip in `out` of other data, or that another VAE has
            encoded.
    """
    for i, source in enumerate(config.data.sources):
        if source.kind == "packed":
            raise ValueError(f"data.sources[{i}].kind must be one of frames, these clips are packed already")
    clips = ClipDataset(config.data, config.seed)
    models = load_models(dataclasses.replace(config, stage="vae"), torch.device(device))
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"written": 0, "present": 0, "broken": {}}
    fingerprint = models.vae_fingerprint()
    names = {f"{i:06d}.safetensors": clips.sources[source].name(at) for i, (source, at) in enumerate(clips.where)}
    for path in sorted(out.glob("*.safetensors")):
        vae, held = read_origin(path)
        wanted = f"clip {names[path.name]}" if path.name in names else "no clip of these data"
        if vae != fingerprint:
            raise ValueError(f"{path}: encoded by another VAE: name another folder, or remove what is in this one")
        if wanted != f"clip {held}":
            raise ValueError(
                f"{path}: must be {wanted}, got {held}: name another folder, or remove what is in this one"
            )
    tqdm = import_extra("tqdm", "train").tqdm
    for number, (source, index) in enumerate(tqdm(clips.where, desc="prepare", disable=not progress)):
        path = out / f"{number:06d}.safetensors"
        if path.exists():
            report["present"] += 1
            continue
        try:
            clip = load_clip_of(clips.sources[source], index)
        except (OSError, ValueError) as error:
            report["broken"][clips.sources[source].name(index)] = str(error)
            continue
        assert clip.frames is not None
        frames = clip.frames * 2.0 - 1.0
        packed = dataclasses.replace(
            clip,
            frames=None,
            latents=encode_frames(models.vae, frames.movedim(0, 1)[None])[0].movedim(1, 0),
            static_latent=encode_static_frame(models.vae, frames[:1])[0, :, 0],
            prompt_embeds=_without_padding(models.text(clip.prompt)),
            vae=fingerprint,
        )
        save_clip(path, packed)
        report["written"] += 1
    return report


def _without_padding(embeds: Tensor) -> Tensor:
    used = embeds.any(dim=1).nonzero()
    return embeds[: int(used[-1]) + 1 if len(used) else 1].clone()

"""Clips to train on: what one holds, where they come from, and in which order a run takes them.

A clip is 4 n + 1 frames with poses, depth and masks of what is static, held as the memory takes it: depth and masks
are those of the latent frames' tokens. It has frames, or latents that `mirage prepare` has encoded.
"""

from __future__ import annotations

from .clips import TOKEN_PIXELS, Clip, make_clip
from .dataset import BatchSampler, ClipDataset, Sample, list_broken
from .files import load_clip, read_origin, save_clip
from .sources import Source, make_source

__all__ = [
    "TOKEN_PIXELS",
    "BatchSampler",
    "Clip",
    "ClipDataset",
    "Sample",
    "Source",
    "list_broken",
    "load_clip",
    "make_clip",
    "make_source",
    "read_origin",
    "save_clip",
]

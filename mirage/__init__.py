"""Mirage: a video world model around a latent spatial memory. The memory itself is `mirage_kernels`."""

from __future__ import annotations

from mirage_kernels import Cameras, LatentCache, __version__

__all__ = ["Cameras", "LatentCache", "__version__"]

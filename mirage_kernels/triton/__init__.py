"""The operators as Triton kernels: what runs on an NVIDIA GPU where no CUDA module was compiled.

Importing this package registers ``mirage::{operator}_triton`` for CUDA tensors and, under ``TRITON_INTERPRET=1``, for
CPU tensors. Every kernel equals ``mirage_kernels.reference`` bit for bit in float32. Nothing here waits for the device,
and no shape, allocation or number of launches depends on data, so all of it can be captured in a CUDA graph.
"""

from . import back_project, block_bounds, bounded_write, cache_compact, cache_write, splat, splat_aligned, view_overlap

__all__ = [
    "back_project",
    "block_bounds",
    "bounded_write",
    "cache_compact",
    "cache_write",
    "splat",
    "splat_aligned",
    "view_overlap",
]

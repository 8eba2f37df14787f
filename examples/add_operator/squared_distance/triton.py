"""`squared_distance` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirage_kernels.ops.common.triton.launching import EXACT, cdiv, device_of
from mirage_kernels.ops.operator import implements


@triton.jit
def squared_distance_kernel(points, center, num_points, distances, total, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = total
    if num_points is not None:
        live = tl.minimum(tl.maximum(tl.load(num_points), 0), total)
    alive = row < live
    offset = row.to(tl.int64) * 4
    dx = tl.load(points + offset, alive, 0.0) - tl.load(center)
    dy = tl.load(points + offset + 1, alive, 0.0) - tl.load(center + 1)
    dz = tl.load(points + offset + 2, alive, 0.0) - tl.load(center + 2)
    tl.store(distances + row, tl.where(alive, (dx * dx + dy * dy) + dz * dz, 0.0), row < total)


@implements("squared_distance")
def squared_distance(points: Tensor, center: Tensor, num_points: Tensor | None) -> Tensor:
    total = points.shape[0]
    distances = points.new_empty(total, dtype=torch.float32)
    if total > 0:
        with device_of(points):
            squared_distance_kernel[(cdiv(total, 256),)](
                points.contiguous(), center.contiguous(), num_points, distances, total, BLOCK=256, **EXACT
            )
    return distances

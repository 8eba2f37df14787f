"""Fakes (shapes and dtypes without data) and autograd of the private operators, alike for every family of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .reference import FITS, WRITE_REPORT
from .schemas import FAMILIES, NAMESPACE, private_operator


def _fake_back_project(
    depth: Tensor, intrinsics: Tensor, cam2world: Tensor, mask: Tensor | None, height: int, width: int, bilinear: bool
) -> tuple[Tensor, Tensor]:
    views = depth.shape[0]
    return (
        depth.new_empty((views, height, width, 4), dtype=torch.float32),
        depth.new_empty((views, height, width), dtype=torch.bool),
    )


def _fake_splat(
    points: Tensor,
    features: Tensor,
    num_points: Tensor | None,
    intrinsics: Tensor,
    cam2world: Tensor,
    height: int,
    width: int,
    near: float,
    dtype: torch.dtype,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (cam2world.shape[0], height, width)
    return (
        features.new_empty((shape[0], features.shape[1], height, width), dtype=dtype),
        features.new_empty(shape, dtype=torch.bool),
        features.new_empty(shape, dtype=torch.float32),
        features.new_empty(shape, dtype=torch.int64),
    )


def _fake_splat_backward(grad_latents: Tensor, index: Tensor, num_points: int, dtype: torch.dtype) -> Tensor:
    return grad_latents.new_empty((num_points, grad_latents.shape[1]), dtype=dtype)


def _fake_splat_aligned(
    points: Tensor,
    features: Tensor,
    num_points: Tensor | None,
    frame_ids: Tensor,
    frame_centers: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    height: int,
    width: int,
    near: float,
    sharpness: float,
    dtype: torch.dtype,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, ...]:
    seen = _fake_splat(points, features, num_points, intrinsics, cam2world, height, width, near, dtype)
    return (*seen, features.new_empty((cam2world.shape[0], height, width, FITS), dtype=torch.int64))


def _fake_splat_aligned_backward(
    grad_latents: Tensor,
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    frame_centers: Tensor,
    intrinsics: Tensor,
    cam2world: Tensor,
    keys: Tensor,
    sharpness: float,
    of_points: bool,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    count = points.shape[0]
    return (
        # Features with scales have no gradient.
        features.new_empty((count if scales is None else 0, features.shape[1])),
        points.new_empty((count if of_points else 0, 4), dtype=torch.float32),
    )


def _fake_cache_write(points: Tensor, *args: Any) -> Tensor:
    return points.new_empty((6,), dtype=torch.int64)


def _fake_bounded_write(points: Tensor, *args: Any) -> Tensor:
    return points.new_empty((len(WRITE_REPORT),), dtype=torch.int64)


def _fake_cache_compact(points: Tensor, *args: Any) -> Tensor:
    return points.new_empty((), dtype=torch.int64)


def _fake_block_bounds(*args: Any) -> None:
    return None


def _fake_view_overlap(
    points: Tensor, num_points: Tensor | None, intrinsics: Tensor, cam2world: Tensor, *args: Any
) -> Tensor:
    return points.new_empty((cam2world.shape[0], 2), dtype=torch.int64)


def _setup_splat_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features = inputs[1]
    _, mask, depth, index = output
    ctx.save_for_backward(index)
    ctx.num_points, ctx.dtype = features.shape[0], features.dtype
    ctx.mark_non_differentiable(mask, depth, index)


def _splat_backward(family: str) -> Any:
    def backward(ctx: Any, grad_latents: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        grad = None
        if ctx.needs_input_grad[1]:
            operator = private_operator("splat_backward", family)
            grad = operator(grad_latents.contiguous(), index, ctx.num_points, ctx.dtype)
        return (None, grad, *([None] * (len(ctx.needs_input_grad) - 2)))

    return backward


def _setup_splat_aligned_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    points, features, _, frame_ids, frame_centers, intrinsics, cam2world, _, _, _, ctx.sharpness, _, _, scales = inputs
    _, mask, depth, index, keys = output
    ctx.save_for_backward(points, features, frame_ids, frame_centers, intrinsics, cam2world, keys, scales)
    ctx.mark_non_differentiable(mask, depth, index, keys)


def _splat_aligned_backward(family: str) -> Any:
    def backward(ctx: Any, grad_latents: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        of_points, of_features = ctx.needs_input_grad[:2]
        grad_points = grad_features = None
        if of_points or of_features:
            operator = private_operator("splat_aligned_backward", family)
            *tensors, scales = ctx.saved_tensors
            gradients = operator(grad_latents.contiguous(), *tensors, ctx.sharpness, of_points, scales)
            grad_features, grad_points = (
                gradient if needed else None
                for gradient, needed in zip(gradients, (of_features, of_points), strict=True)
            )
        return (grad_points, grad_features, *([None] * (len(ctx.needs_input_grad) - 2)))

    return backward


_FAKES: dict[str, Callable[..., Any]] = {
    "back_project": _fake_back_project,
    "splat": _fake_splat,
    "splat_backward": _fake_splat_backward,
    "splat_aligned": _fake_splat_aligned,
    "splat_aligned_backward": _fake_splat_aligned_backward,
    "cache_write": _fake_cache_write,
    "bounded_write": _fake_bounded_write,
    "cache_compact": _fake_cache_compact,
    "block_bounds": _fake_block_bounds,
    "view_overlap": _fake_view_overlap,
}

for _family in FAMILIES:
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"{NAMESPACE}::{_name}_{_family}", _fake)
    torch.library.register_autograd(
        f"{NAMESPACE}::splat_{_family}", _splat_backward(_family), setup_context=_setup_splat_context
    )
    torch.library.register_autograd(
        f"{NAMESPACE}::splat_aligned_{_family}",
        _splat_aligned_backward(_family),
        setup_context=_setup_splat_aligned_context,
    )

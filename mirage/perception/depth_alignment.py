"""Alignment of new depth to what the memory shows at the same views.

`align_depth` fits scale and shift of each new map to the depth that the cache shows, so that a chunk lands on the
surfaces that were written before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mirage_kernels import back_project

# Alignment. Fewer common cells than these tell nothing about a view.
MIN_CELLS = 32

MIN_SHARE = 0.01  # of the cells of the grid

MIN_INLIERS = 0.5  # of the common cells: what the start of the fit withstands

SCALE_RANGE = (0.01, 100.0)

MIN_DEPTH_RATIO = 1.3  # 90th over 10th percentile of depth, under which a shift cannot be told from a scale

_SIGMA_RANGE = (0.002, 0.05)  # spread of the inliers' relative residuals

_CUT = 3.0  # in sigmas, where an inlier ends

_STEPS = 10

_LINES = 128  # pairs of cells that are tried as a start

_VOTERS = 1024  # cells that choose among them


@dataclass(frozen=True)
class DepthAlignment:
    """New depth, made to agree with the memory.

    Attributes:
        depth: (T, H, W) float32 on the device of the depth given: scale * depth + shift, 0 where it is unknown.
        scale: (T,) float64 on the CPU, within [0.01, 100].
        shift: (T,) float64 on the CPU, world units.
        inlier_fraction: (T,) float64 on the CPU: the share of the cells of `overlap` that the fit explains.
        overlap: (T,) int64 on the CPU: cells whose depth is known to both sides, which the fit was made from: of the
            view itself, or of the pool; 0 where there was no fit.
        source: T of ``"own"``; ``"pooled"``: the view shares too little with the memory, or no fit explains half of
            what it shares, and takes that of the chunk; ``"none"``: neither was to be had, scale 1 and shift 0.
    """

    depth: Tensor
    scale: Tensor
    shift: Tensor
    inlier_fraction: Tensor
    overlap: Tensor
    source: tuple[str, ...]


@dataclass(frozen=True)
class _Fit:
    scale: float
    shift: float
    inliers: np.ndarray  # (n,) bool


def align_depth(depth: Tensor, memory_depth: Tensor, memory_mask: Tensor, mode: str = "scale_shift") -> DepthAlignment:
    """Fit scale and shift of each new depth map to what the memory shows at its view, and apply them.

    New token depth (the lower median of a cell's valid pixels, unknown where under half are valid: what the cache
    would store) is compared with the memory's in every cell where both are known. Up to 40 % of these may be anything:
    moving things, new occluders, far surfaces seen through gaps. The fit minimises Refine by Tukey's biweight of the
    relative
    residual (scale * new + shift - memory) / memory by reweighted least squares, from a least-median-of-squares start
    (Rousseeuw, JASA 1984); without shift that is the middle of the shortest half of the log ratios. The same bits on
    every run and at any thread count.

    A view is fitted by itself when it has at least 32 common cells, 1 % of the grid, and the fit explains half of them
    with a scale in [0.01, 100]. Otherwise it takes the one fit of all cells of the views that are (of all views where
    none is). Where the 90th percentile of the inliers' memory depth is under 1.3 times the 10th, scale alone is fitted.

    Args:
        depth: (T, H, W) float, z; 0, negative, NaN and Inf mean unknown.
        memory_depth: (T, h, w) float, `LatentCache.read(...).depth` at the cameras of `depth`, h <= H, w <= W.
        memory_mask: (T, h, w) bool, `LatentCache.read(...).mask`.
        mode: ``"scale_shift"`` or ``"scale"``.

    Returns:
        `DepthAlignment`. Pixels that a shift would put at or behind the camera become unknown.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if mode not in ("scale", "scale_shift"):
        raise ValueError(f"mode must be one of scale, scale_shift, got {mode!r}")
    if memory_depth.ndim != 3 or memory_depth.shape[0] != depth.shape[0]:
        raise ValueError(f"memory_depth must be ({depth.shape[0]}, h, w) as depth, got {tuple(memory_depth.shape)}")
    if memory_mask.shape != memory_depth.shape or memory_mask.dtype != torch.bool:
        got = f"{tuple(memory_mask.shape)} {str(memory_mask.dtype).removeprefix('torch.')}"
        raise ValueError(f"memory_mask must be {tuple(memory_depth.shape)} bool as memory_depth, got {got}")
    depth = depth.float()
    views, (height, width) = depth.shape[0], memory_depth.shape[1:]
    new = _token_depth(depth, (height, width)).cpu().double().numpy()
    memory = memory_depth.cpu().double().numpy()
    common = memory_mask.cpu().numpy() & (new > 0) & (memory > 0) & np.isfinite(memory)
    cells = [(new[t][common[t]], memory[t][common[t]]) for t in range(views)]
    least = max(MIN_CELLS, MIN_SHARE * height * width)

    own = [_fit(*pair, mode, least) for pair in cells]
    good = [pair for pair, fit in zip(cells, own, strict=True) if fit]
    pooled = None
    if len(good) < views:
        new_pool, memory_pool = (np.concatenate(side) for side in zip(*(good or cells), strict=True))
        pooled = _fit(new_pool, memory_pool, mode, least)
    fits = [fit or pooled for fit in own]

    scale = torch.tensor([fit.scale if fit else 1.0 for fit in fits], dtype=torch.float64)
    shift = torch.tensor([fit.shift if fit else 0.0 for fit in fits], dtype=torch.float64)
    factor, term = (value.to(depth)[:, None, None] for value in (scale, shift))
    aligned = (depth * factor).add_(term).nan_to_num_(0.0, 0.0, 0.0)
    aligned.masked_fill_(aligned <= term.clamp(min=0.0), 0.0)  # an unknown 0 has become the shift
    return DepthAlignment(
        depth=aligned,
        scale=scale,
        shift=shift,
        inlier_fraction=torch.tensor([fit.inliers.mean() if fit else 0.0 for fit in fits], dtype=torch.float64),
        overlap=torch.tensor([len(fit.inliers) if fit else 0 for fit in fits], dtype=torch.int64),
        source=tuple("own" if mine else "pooled" if fit else "none" for mine, fit in zip(own, fits, strict=True)),
    )


def _token_depth(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute the token depth (T, h, w) that `LatentCache.write` would store, by the same kernel; 0 where unknown."""
    eye = torch.eye(4, dtype=torch.float64, device=depth.device).expand(len(depth), 4, 4)
    return back_project(depth, eye[:, :3, :3], eye, size).points[..., 2]


def _fit(new: np.ndarray, memory: np.ndarray, mode: str, least: float) -> _Fit | None:
    """Fit memory = scale * new + shift over n cells, (n,) float64 each; None where they do not determine it."""
    if len(new) < least:
        return None
    if mode == "scale_shift":
        start = _least_median_line(new, memory)
        fit = _reweighted(new, memory, *start, with_shift=True) if start else None
        if fit:
            near, far = np.percentile(memory[fit.inliers], (10, 90))
            if far >= MIN_DEPTH_RATIO * near:
                return fit
    return _reweighted(new, memory, _shortest_half_ratio(new, memory), 0.0, with_shift=False)


def _shortest_half_ratio(new: np.ndarray, memory: np.ndarray) -> float:
    """Find the least median of squares of log(memory / new): the middle of the shortest interval with half of them."""
    ratio = np.sort(np.log(memory / new))
    half = len(ratio) // 2
    begin = int(np.argmin(ratio[half:] - ratio[: len(ratio) - half]))
    return float(np.exp((ratio[begin] + ratio[begin + half]) / 2))


def _least_median_line(new: np.ndarray, memory: np.ndarray) -> tuple[float, float] | None:
    """Find scale and shift of the line, among those through pairs of cells, whose median relative residual is least."""
    order = np.argsort(new, kind="stable")
    x, y = new[order], memory[order]
    half = len(x) // 2
    first = np.linspace(0, half - 1, min(half, _LINES)).astype(int)
    second = first + len(x) - half  # half the cells apart in depth: steep noise is rare, and any inliers form pairs
    far_enough = x[second] > x[first] * (1 + 1e-6)
    first, second = first[far_enough], second[far_enough]
    scale = (y[second] - y[first]) / (x[second] - x[first])
    sane = (scale >= SCALE_RANGE[0]) & (scale <= SCALE_RANGE[1])
    if not sane.any():
        return None
    scale = scale[sane]
    shift = y[first][sane] - scale * x[first][sane]
    voters = np.linspace(0, len(x) - 1, min(len(x), _VOTERS)).astype(int)
    x, y = x[voters], y[voters]
    residual = np.abs(scale[:, None] * x + shift[:, None] - y) / y
    best = int(np.argmin(np.median(residual, axis=1)))
    return float(scale[best]), float(shift[best])


def _reweighted(new: np.ndarray, memory: np.ndarray, scale: float, shift: float, with_shift: bool) -> _Fit | None:
    """Refine a start near the answer by Tukey's biweight of the relative residual; None where it explains little."""
    x, one = new / memory, 1 / memory  # residual = scale * x + shift * one - 1
    residual = np.abs(scale * x + shift * one - 1)
    sigma = np.median(residual) * 1.4826
    for _ in range(_STEPS):
        sigma = np.clip(sigma, *_SIGMA_RANGE)
        weight = np.clip(1 - (residual / (_CUT * sigma)) ** 2, 0, None) ** 2
        # Sums, not matrix products: theirs depend on the number of threads.
        xx, xo, oo = (weight * x * x).sum(), (weight * x * one).sum(), (weight * one * one).sum()
        bx, bo = (weight * x).sum(), (weight * one).sum()
        determinant = xx * oo - xo * xo
        if with_shift and determinant > 1e-12 * xx * oo:
            scale, shift = (bx * oo - bo * xo) / determinant, (bo * xx - bx * xo) / determinant
        elif xx > 0:
            scale, shift = bx / xx, 0.0
        residual = np.abs(scale * x + shift * one - 1)
        inliers = residual <= _CUT * sigma
        if inliers.mean() < MIN_INLIERS or not SCALE_RANGE[0] <= scale <= SCALE_RANGE[1]:
            return None
        sigma = np.median(residual[inliers]) * 1.4826
    return _Fit(float(scale), float(shift), inliers)

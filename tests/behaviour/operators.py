"""What every operator gives on fixed inputs: one hash a case, which every backend on every machine must give."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import inputs, names

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8": names.FLOAT8,
}
CHANNELS, SIZE, TOKENS = 5, (5, 7), 600
IMAGE = (20, 28)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

INTERPRETED = (
    "back_project median mask=(11, 13)",
    "back_project bilinear mask=None",
    "splat float32 live",
    "splat bfloat16",
    "splat float8",
    "splat_backward float32",
    "small splat_aligned bfloat16",
    "small splat_aligned float8",
    "small splat_aligned_backward float32",
    "cache_write bfloat16",
    "cache_write float8",
    "cache_write full",
    "bounded_write mean float8",
    "bounded_write evicting",
    "cache_trim dead float8 most=100",
    "block_bounds 700 live=257",
    "view_overlap live=411 voxel=0.5",
)

Case = Callable[[], Any]


def digest(*values: Any) -> str:
    """SHA-256 of dtype, shape and bytes of tensors, and of the text of anything else. Every NaN counts as the same."""
    total = hashlib.sha256()
    for value in values:
        if not isinstance(value, Tensor):
            total.update(repr(value).encode())
            continue
        value = value.detach().contiguous()
        total.update(f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)};".encode())
        if value.is_floating_point() and value.element_size() > 1:
            value = value.masked_fill(value.isnan(), torch.nan).view(INTEGERS[value.element_size()])
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _cameras(seed: int, views: int, size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    return inputs.intrinsics(rng, views, size), inputs.poses(rng, views)


def _back_project(mask: tuple[int, int] | None, sampling: str, dtype: torch.dtype) -> Any:
    depth = inputs.depth_maps(np.random.default_rng(1), 2, IMAGE, 0.3)
    depth[0, :8, :8] = 0  # whole cells unknown
    kept = None if mask is None else inputs.masks(2, 2, mask)
    return names.back_project(depth.to(dtype), *_cameras(3, 2, IMAGE), SIZE, mask=kept, depth_sampling=sampling)


def _live(held: dict[str, Tensor], live: int | None) -> dict[str, Any]:
    """Options of a read that passes over what no camera sees."""
    if live is None:
        return {}
    count = torch.tensor([live])
    return {"num_points": count, "bounds": names.block_bounds(held["points"], count)}


def _splat(stored: torch.dtype, live: int | None, **options: Any) -> Any:
    held, _ = inputs.tokens(4, TOKENS, CHANNELS, SIZE[1], stored)
    return names.splat(held, *_cameras(5, 2), SIZE, **_live(held, live), **options)


def _splat_aligned(stored: torch.dtype, live: int | None, **options: Any) -> Any:
    held, centers = inputs.tokens(6, TOKENS, CHANNELS, SIZE[1], stored)
    return names.splat_aligned(held, centers, *_cameras(7, 2), SIZE, **_live(held, live), **options)


def _splat_aligned_small(stored: torch.dtype, live: int | None, backward: bool) -> Any:
    """Few enough tokens and cells for Triton's interpreter."""
    held, centers = inputs.tokens(14, 64, 3, 4, stored)
    for name in ("features", "points") if backward else ():
        held[name].requires_grad_()
    seen = names.splat_aligned(held, centers, *_cameras(15, 1, (3, 4)), (3, 4), **_live(held, live))
    if not backward:
        return seen
    seen[0].backward(inputs.latents(16, 1, 3, (3, 4), stored))
    return held["features"].grad, held["points"].grad


def _splat_backward(dtype: torch.dtype) -> Any:
    held, _ = inputs.tokens(8, TOKENS, CHANNELS, SIZE[1], dtype)
    held["features"].requires_grad_()
    latents = names.splat(held, *_cameras(9, 2), SIZE)[0]
    latents.backward(inputs.latents(10, 2, CHANNELS, SIZE, dtype))
    return (held["features"].grad,)


def _splat_aligned_backward(dtype: torch.dtype, sharpness: float, of_points: bool) -> Any:
    held, centers = inputs.tokens(11, TOKENS, CHANNELS, SIZE[1], dtype)
    held["features"].requires_grad_()
    held["points"].requires_grad_(of_points)
    latents = names.splat_aligned(held, centers, *_cameras(12, 2), SIZE, sharpness=sharpness)[0]
    latents.backward(inputs.latents(13, 2, CHANNELS, SIZE, dtype))
    return held["features"].grad, held["points"].grad


def _state(held: dict[str, Tensor]) -> Iterator[Any]:
    """All that is live, and that nothing else was touched."""
    for name in sorted(held):
        yield name
        yield held[name]


def _cache_write(dtype: torch.dtype, latents: torch.dtype, capacity: int, with_bounds: bool, **options: Any) -> Any:
    held = inputs.buffers(capacity, CHANNELS, dtype)
    if with_bounds:
        held["bounds"] = names.block_bounds(held["points"], held["count"])
    counts = []
    for step in range(2):
        depth, *cameras = inputs.scene(20 + step, 2, IMAGE, box=True)
        new = inputs.latents(22 + step, 2, CHANNELS, SIZE, latents)
        new[0, 0, 0, 0] = torch.inf
        mask = inputs.masks(24 + step, 2, IMAGE) if step else None
        counts.append(names.cache_write(held, new, depth, *cameras, mask=mask, first_frame=2 * step, **options))
    return *counts, *_state(held)


def _bounded_write(
    dtype: torch.dtype,
    latents: torch.dtype = torch.float32,
    looks: bool = False,
    capacity: int = 400,
    with_bounds: bool = True,
    max_tokens: int | None = None,
    **options: Any,
) -> Any:
    """Four writes: a box before a wall, seen twice; then it is gone; then from nearer."""
    held = inputs.buffers(capacity, CHANNELS, dtype, "votes", *(["looks"] if looks else []))
    if with_bounds:
        held["bounds"] = names.block_bounds(held["points"], held["count"])
    centers = torch.zeros(8, 3)
    results = []
    for step, (box, shift) in enumerate(((True, 0.0), (True, 0.2), (False, 0.0), (False, -0.4))):
        depth, matrix, cam2world = inputs.scene(30 + step, 2, IMAGE, box, shift)
        if step == 3:
            cam2world[:, 2, 3] += 0.8
            depth = depth - 0.8
        centers[2 * step : 2 * step + 2] = cam2world[:, :3, 3]
        new = inputs.latents(34 + step, 2, CHANNELS, SIZE, latents)
        mask = inputs.masks(38, 2, IMAGE) if step == 1 else None
        results.append(
            names.bounded_write(
                held, centers, new, depth, matrix, cam2world, mask=mask, first_frame=2 * step, **options
            )
        )
        results.append(digest(*_state(held)))
        results.append(names.cache_trim(held, max_tokens))
    return *results, *_state(held)


def _cache_trim(dtype: torch.dtype, dead: bool, max_tokens: int | None) -> Any:
    held, _ = inputs.tokens(50, TOKENS, CHANNELS, SIZE[1], dtype)
    rng = np.random.default_rng(51)
    held["count"] = torch.tensor([TOKENS - 20])
    if dead:
        held["votes"] = torch.from_numpy(np.where(rng.random(TOKENS) < 0.2, 255, 1)).to(torch.uint8)
        held["looks"] = torch.from_numpy(rng.integers(1, 17, TOKENS)).to(torch.uint8)
    held["bounds"] = names.block_bounds(held["points"], held["count"])
    evicted = names.cache_trim(held, max_tokens)
    live = int(held["count"])  # what is behind is nobody's
    kept = {name: value if name in ("bounds", "count") else value[:live] for name, value in held.items()}
    return evicted, *_state(kept)


def _view_overlap(live: int | None, voxel_size: float) -> Any:
    held, _ = inputs.tokens(60, TOKENS, CHANNELS, SIZE[1], torch.float32)
    options = _live(held, live)
    return (
        names.view_overlap(held["points"], _cameras(61, 4), _cameras(62, 2), SIZE, voxel_size=voxel_size, **options),
    )


def _block_bounds(count: int, live: int | None) -> Any:
    held, _ = inputs.tokens(70, count, 1, SIZE[1], torch.float32)
    return (names.block_bounds(held["points"], None if live is None else torch.tensor([live])),)


def cases() -> dict[str, Case]:
    """Every case by its name."""
    made: dict[str, Case] = {}

    def add(name: str, case: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        assert name not in made
        made[name] = lambda: case(*arguments, **options)

    for sampling in ("median", "bilinear"):
        for mask in (None, IMAGE, (11, 13)):
            add(f"back_project {sampling} mask={mask}", _back_project, mask, sampling, torch.float32)
    add("back_project float16", _back_project, None, "median", torch.float16)
    for name, dtype in DTYPES.items():
        add(f"splat {name}", _splat, dtype, None)
        add(f"splat {name} live", _splat, dtype, 411)
        add(f"splat_aligned {name}", _splat_aligned, dtype, None)
        add(f"splat_aligned {name} live", _splat_aligned, dtype, 411, sharpness=12.0)
    add("splat float32 near", _splat, torch.float32, None, near=2.5)
    add("splat float8 as float32", _splat, names.FLOAT8, 512, dtype=torch.float32)
    add("splat float32 as bfloat16", _splat, torch.float32, None, dtype=torch.bfloat16)
    add("splat none live", _splat, torch.float32, 0)
    for sharpness in (0.0, float("inf")):
        add(f"splat_aligned sharpness={sharpness}", _splat_aligned, torch.float32, None, sharpness=sharpness)
    add("splat_aligned near", _splat_aligned, torch.float32, None, near=2.5)
    add("splat_aligned float8 as float32", _splat_aligned, names.FLOAT8, 512, dtype=torch.float32)
    add("splat_aligned bfloat16 as float32", _splat_aligned, torch.bfloat16, None, dtype=torch.float32)
    for name in ("bfloat16", "float8"):
        add(f"small splat_aligned {name}", _splat_aligned_small, DTYPES[name], 50, False)
    add("small splat_aligned_backward float32", _splat_aligned_small, torch.float32, None, True)
    for name in ("float32", "bfloat16"):
        add(f"splat_backward {name}", _splat_backward, DTYPES[name])
        add(f"splat_aligned_backward {name}", _splat_aligned_backward, DTYPES[name], 30.0, False)
    add("splat_aligned_backward points", _splat_aligned_backward, torch.float32, 30.0, True)
    add("splat_aligned_backward points sharpness=0", _splat_aligned_backward, torch.float32, 0.0, True)
    for name, dtype in DTYPES.items():
        add(f"cache_write {name}", _cache_write, dtype, torch.float32, 200, False)
    add("cache_write bfloat16 of bfloat16", _cache_write, torch.bfloat16, torch.bfloat16, 200, False)
    add("cache_write bilinear", _cache_write, torch.float32, torch.float32, 200, True, depth_sampling="bilinear")
    add("cache_write range", _cache_write, torch.float32, torch.float32, 200, True, min_depth=2.5, max_depth=3.15)
    add("cache_write full", _cache_write, torch.float32, torch.float32, 90, True)
    for name, dtype in DTYPES.items():
        add(f"bounded_write {name}", _bounded_write, dtype)
    add("bounded_write bfloat16 of bfloat16", _bounded_write, torch.bfloat16, torch.bfloat16)
    add("bounded_write without bounds", _bounded_write, torch.float32, with_bounds=False)
    for looks in (False, True):
        merge = "mean" if looks else "keep"
        add(f"bounded_write {merge} 1 a voxel", _bounded_write, torch.float32, looks=looks, views_per_voxel=1)
    add("bounded_write mean float8", _bounded_write, names.FLOAT8, looks=True)
    add("bounded_write mean bfloat16", _bounded_write, torch.bfloat16, looks=True)
    for views in (0, 1, 4):
        add(f"bounded_write carve_views={views}", _bounded_write, torch.float32, carve_views=views)
    add("bounded_write bilinear", _bounded_write, torch.float32, depth_sampling="bilinear")
    add("bounded_write range", _bounded_write, torch.float32, min_depth=2.1, max_depth=3.15, near=2.5)
    add("bounded_write full", _bounded_write, torch.float32, capacity=60)
    add("bounded_write evicting", _bounded_write, torch.bfloat16, max_tokens=50)
    for name in ("float32", "float8"):
        add(f"cache_trim dead {name}", _cache_trim, DTYPES[name], True, None)
        add(f"cache_trim dead {name} most=100", _cache_trim, DTYPES[name], True, 100)
    add("cache_trim most=100", _cache_trim, torch.bfloat16, False, 100)
    add("cache_trim most=0", _cache_trim, torch.float32, False, 0)
    for count, live in ((0, None), (1, None), (700, None), (700, 257), (700, 0), (17000, None)):
        add(f"block_bounds {count} live={live}", _block_bounds, count, live)
    for live, voxel_size in ((None, 0.1), (None, 1.0), (411, 0.5)):
        add(f"view_overlap live={live} voxel={voxel_size}", _view_overlap, live, voxel_size)
    return made


def measure(backend: str) -> dict[str, str]:
    """The hash of every case on one backend; of Triton's interpreter, which is slow, of :data:`INTERPRETED`."""
    chosen = cases()
    if backend == "triton":
        chosen = {name: chosen[name] for name in INTERPRETED}
    with names.use(backend):
        return {name: digest(*case()) for name, case in chosen.items()}

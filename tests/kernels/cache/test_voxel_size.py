"""`voxel_size=`: a bounded cache whose voxels have a fixed edge in world units."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits
from safetensors import safe_open

from mirage_kernels import Cameras, LatentCache

GRID, IMAGE = (8, 10), (32, 40)
KINDS = {"keep": {}, "mean": dict(merge="mean"), "float8": dict(dtype=torch.float8_e4m3fn)}


def frames(seed: int, number: int = 3):
    rng = np.random.default_rng(seed)
    cameras = Cameras(scenes.intrinsics(rng, number, IMAGE), scenes.poses(rng, number), IMAGE, square_pixels=False)
    latents = torch.from_numpy(rng.normal(size=(number, 4, *GRID))).float().bfloat16()
    return latents, scenes.depth_maps(rng, number, IMAGE, 0.1), cameras


def voxels(rows: torch.Tensor, edge: float) -> list[tuple[int, ...]]:
    """Of points (N, 3), counted by hand; in float32 as the cache counts."""
    return [tuple(math.floor(x) for x in row) for row in (rows[:, :3] / torch.tensor(edge)).tolist()]


def contents(cache: LatentCache) -> list[torch.Tensor]:
    return [x.cpu().clone() for x in cache.tensors().values()]


@pytest.mark.parametrize("kind, edge, most", [("keep", 0.4, 1), ("mean", 0.6, 3), ("float8", 0.6, 2)])
def test_by_hand(backend, kind, edge, most):
    """View by view: what a cache of full voxels writes, less what comes to a voxel of this edge that is full."""
    options = dict(device=backend.device, **KINDS[kind])
    cache = LatentCache(4, voxel_size=edge, views_per_voxel=most, **options)
    held, refused, dropped_old = None, 0, 0
    for seed in range(3):
        latents, depth, cameras = (x.to(backend.device) for x in frames(seed))
        report = cache.write(latents, depth, cameras)
        for t in range(3):
            wide = LatentCache(4, views_per_voxel=64, **options)
            if held is not None:
                wide = LatentCache.from_tensors(held, **{**wide.config, "dtype": wide.dtype, "device": backend.device})
            known = len(wide)
            wide.write(latents[t : t + 1], depth[t : t + 1], cameras[t : t + 1])
            tokens, frame = wide.tensors(torch.device("cpu")), wide.num_frames - 1
            own = voxels(tokens["points"], edge)
            new = (tokens["frame_ids"] == frame).tolist()
            full = Counter(voxel for voxel, is_new in zip(own, new, strict=True) if not is_new)
            kept = []
            for row, voxel in enumerate(own):
                if new[row]:
                    full[voxel] += 1
                    if full[voxel] > most:
                        refused += 1
                        dropped_old += row < known
                        continue
                kept.append(row)
            held = {name: x if name == "frame_centers" else x[kept] for name, x in tokens.items()}
        assert sum(report.as_dict().values()) - report.carved == 3 * math.prod(GRID)
        assert_equal_bits(contents(cache), list(held.values()))
        assert max(Counter(voxels(cache.points.cpu(), edge)).values()) <= most
    assert refused > 30 and len(cache) > 20


def test_views_at_once_or_one_by_one():
    latents, depth, cameras = frames(0, 5)
    once, each = (LatentCache(4, voxel_size=0.5, views_per_voxel=2) for _ in range(2))
    counts = once.write(latents, depth, cameras).counts
    one_by_one = [each.write(latents[t : t + 1], depth[t : t + 1], cameras[t]).counts for t in range(5)]
    assert torch.equal(counts, torch.stack(one_by_one).sum(0))
    assert_equal_bits(contents(once), contents(each))


def test_what_is_offloaded_counts():
    expected, cache = (LatentCache(4, voxel_size=0.1) for _ in range(2))
    for seed in range(12):
        for one in (expected, cache):
            one.write(*frames(seed))
        cache.offload(frames(0)[2][:0])
    assert cache.num_offloaded > 0
    assert_equal_bits(contents(cache), contents(expected))


def test_points_come_to_the_same_voxels():
    cache = LatentCache(4, voxel_size=0.25, views_per_voxel=2)
    points = torch.rand(300, 3)
    report = cache.write_points(points, torch.rand(300, 4), footprint=0.003)
    counted = Counter(voxels(points, 0.25))
    assert report.written == sum(min(number, 2) for number in counted.values()) < 300
    assert report.refused == 300 - report.written


def test_kept_in_the_file_and_absent_where_there_is_none(tmp_path):
    cache = LatentCache(4, voxel_size=0.5, views_per_voxel=2)
    cache.write(*frames(0))
    cache.save(tmp_path / "cache.safetensors")
    again = LatentCache.load(tmp_path / "cache.safetensors")
    assert again.config["voxel_size"] == 0.5
    for one in (cache, again):
        one.write(*frames(1))
    assert_equal_bits(contents(again), contents(cache))
    LatentCache(4).save(tmp_path / "plain.safetensors")
    with safe_open(tmp_path / "plain.safetensors", "pt") as file:
        assert "voxel_size" not in json.loads(file.metadata()["settings"])
    assert LatentCache.load(tmp_path / "plain.safetensors")._config.voxel_size is None


@pytest.mark.parametrize("edge", [0, -1.0, math.inf, math.nan, True, "1 cm"])
def test_edges_that_are_none(edge):
    with pytest.raises(ValueError, match="voxel_size must be None or a finite length > 0 in world units, got"):
        LatentCache(4, voxel_size=edge)

"""What a LatentCache and the published release's point cloud hold, show and save: the same hashes on every machine."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import inputs, names
from .operators import digest

CHANNELS, GRID, IMAGE = 6, (6, 8), (24, 32)
CACHES: dict[str, tuple[torch.dtype, str, dict[str, Any]]] = {
    "bounded": (torch.float32, "bounded", {}),
    "bounded bfloat16": (torch.bfloat16, "bounded", {"views_per_voxel": 2, "carve_views": 1}),
    "bounded mean": (torch.float32, "bounded", {"merge": "mean", "views_per_voxel": 1}),
    "bounded float8": (names.FLOAT8, "bounded", {"max_tokens": 100}),
    "bounded no carving": (torch.float16, "bounded", {"carve": False, "capacity": 90}),
    "append": (torch.float32, "append", {}),
    "append float8": (names.FLOAT8, "append", {"max_tokens": 150}),
    "append bfloat16": (torch.bfloat16, "append", {"capacity": 170}),
}


def views_of(step: int) -> tuple[Tensor, Tensor, names.Cameras, Tensor]:
    """Latents, depth, cameras and mask of a write: a box, seen twice, then gone."""
    depth, matrix, cam2world = inputs.scene(80 + step, 2, IMAGE, box=step < 2, shift=0.15 * step)
    latents = inputs.latents(84 + step, 2, CHANNELS, GRID, torch.float32)
    return latents, depth, names.Cameras(matrix, cam2world, IMAGE), inputs.masks(88 + step, 2, IMAGE)


def fill(cache: Any, steps: int = 3) -> list[list[int]]:
    written = []
    for step in range(steps):
        latents, depth, cameras, mask = views_of(step)
        options: dict[str, Any] = {"mask": mask} if step else {"depth_sampling": "bilinear", "max_depth": 3.5}
        written.append(names.write(cache, latents, depth, cameras, **options))
    return written


def readings(cache: Any) -> dict[str, str]:
    """What the cache shows from where it was written, in each way."""
    cameras = views_of(1)[2]
    return {
        "aligned": digest(*names.read(cache, cameras, GRID, "aligned")),
        "aligned finer": digest(*names.read(cache, cameras, (9, 12), "aligned", sharpness=4.0, dtype=torch.float32)),
        "nearest": digest(*names.read(cache, cameras, GRID, "nearest", near=1.0)),
    }


def saved_bytes(path: Path) -> str:
    """Hash of a safetensors file; its metadata come in no fixed order there, so in a fixed one here."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return digest(json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True), content[8 + length :])


def _point_cloud(folder: Path) -> dict[str, str]:
    cloud_class = names.LatentPointCloud
    latents, depth, _, mask = views_of(0)
    matrix, cam2world = inputs.scene(80, 2, IMAGE, box=True)[1:]
    cloud = cloud_class.from_geometry(
        depth[0].nan_to_num(0, 0, 0), matrix[0], cam2world[0], latents[0][:, None], mask=~mask[0], device="cpu"
    )
    found = {"first": digest(*cloud.project(cam2world[0]))}
    more, further, _, moving = views_of(1)
    cloud.update(further.nan_to_num(0, 0, 0), matrix, inputs.scene(81, 2, IMAGE, True, 0.15)[2], more, masks=~moving)
    state = (cloud.points_world, cloud.features, cloud.valid_mask, cloud.intrinsics_latent, tuple(cloud.latent_hw))
    found["state"] = digest(*state)
    found["project"] = digest(*cloud.project(cam2world[1]), *cloud.project(cam2world[1], matrix[0] * 0.25))
    cloud.save(folder / "cloud.pt")
    found["loaded"] = digest(*cloud_class.from_file(folder / "cloud.pt").project(cam2world[1]))
    return found


def measure(backend: str) -> dict[str, str]:
    found: dict[str, str] = {}
    with names.use(backend), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, (dtype, policy, options) in CACHES.items():
            cache = names.make_cache(CHANNELS, dtype, policy, **options)
            found[f"{kind}, written"] = digest(fill(cache))
            found[f"{kind}, contents"] = digest(*names.contents(cache))
            cache.save(folder / "cache.safetensors")
            found[f"{kind}, file"] = saved_bytes(folder / "cache.safetensors")
            loaded = names.LatentCache.load(folder / "cache.safetensors")
            for way, value in readings(cache).items():
                found[f"{kind}, {way}"] = value
                if readings(loaded)[way] != value:
                    found[f"{kind}, {way}"] += " but loaded it shows something else"
            found[f"{kind}, written on"] = digest(fill(loaded, 1), *names.contents(loaded))
        away = names.make_cache(CHANNELS, torch.float32, "append")
        for _ in range(4):
            fill(away)
        before = readings(away)
        names.offload(away, views_of(0)[2][:0])
        found["offloaded"] = digest(before, away.num_offloaded, readings(away), away.num_offloaded)
        found |= {f"point cloud, {name}": value for name, value in _point_cloud(folder).items()}
    return found

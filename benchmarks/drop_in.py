"""Run the published release's loop around its memory or ``compat``'s: ``python -m benchmarks.drop_in --help``.

Runs in a process of its own, as a user's program would after changing one import: build from the first frame; then, a
chunk at a time, project view by view for the denoiser, and update with the chunk's frames. Prints JSON: the seconds
that each chunk spent in `project` and in `update`, the tokens held, and a checksum.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor

from mirage_kernels.compat import LatentPointCloud

from . import scenes
from .reference_memory import ReferenceMemory
from .scenes import Size
from .timing import synchronize


class _Reference:
    """Put ReferenceMemory behind the two calls of the loop."""

    def __init__(self, depth: Tensor, k: Tensor, pose: Tensor, latent: Tensor) -> None:
        self._memory = ReferenceMemory(latent.shape[0], depth.device)
        self._size = (latent.shape[2], latent.shape[3])
        self._intrinsics_latent = k.clone()
        self._intrinsics_latent[0] *= self._size[1] / depth.shape[1]
        self._intrinsics_latent[1] *= self._size[0] / depth.shape[0]
        self.update(depth[None], k[None], pose[None], latent.permute(1, 0, 2, 3))

    def update(self, depths: Tensor, intrinsics: Tensor, cam2worlds: Tensor, latents: Tensor) -> None:
        self._memory.write(latents, depths, intrinsics, cam2worlds)

    def project(self, cam2world: Tensor) -> tuple[Tensor, Tensor]:
        latents, mask = self._memory.read(self._intrinsics_latent[None], cam2world[None], self._size)
        return latents[0], mask[0]

    @property
    def points_world(self) -> Tensor:
        return self._memory.points


def run(memory: str, device: torch.device, size: Size, chunks: int) -> dict[str, Any]:
    """Walk one lap in so many chunks of ``size.frames`` frames."""
    cameras = scenes.camera_path(chunks * size.frames + 1).resized(size.image)
    depth = scenes.render_depth(cameras).to(device)
    latents = scenes.latents(size.frames, size.grid).to(device)
    k, poses = cameras.intrinsics.float().to(device), cameras.cam2world.float().to(device)
    first = latents[:1].permute(1, 0, 2, 3)
    if memory == "reference":
        cloud: Any = _Reference(depth[0], k[0], poses[0], first)
    else:
        cloud = LatentPointCloud.from_geometry(depth[0], k[0], poses[0], first, device=device)
    times: dict[str, list[float]] = {"project_s": [], "update_s": []}
    total = 0.0
    for chunk in range(chunks):
        part = slice(1 + chunk * size.frames, 1 + (chunk + 1) * size.frames)
        synchronize(device)
        start = time.perf_counter()
        views = [cloud.project(pose) for pose in poses[part]]
        control, masks = torch.stack([view for view, _ in views]), torch.stack([mask for _, mask in views])
        synchronize(device)
        projected = time.perf_counter()
        cloud.update(depth[part], k[part], poses[part], latents)
        synchronize(device)
        times["project_s"].append(projected - start)
        times["update_s"].append(time.perf_counter() - projected)
        total += float(control.double().abs().sum()) + float(masks.sum())
    return {"memory": memory, "tokens": cloud.points_world.shape[0], "checksum": total, **times}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", choices=("compat", "reference"), required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=scenes.READ_VIEWS)
    parser.add_argument("--height", type=int, default=704)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--chunks", type=int, default=10)
    a = parser.parse_args(arguments)
    print(json.dumps(run(a.memory, torch.device(a.device), Size(a.frames, a.height, a.width), a.chunks)))


if __name__ == "__main__":
    main()

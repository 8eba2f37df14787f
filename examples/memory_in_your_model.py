"""Put the memory into a world model of your own: one line before the loop, two per chunk.

The stand-in model below "generates" the latents of a wall; replace it by yours. Runs on a CPU in seconds:

    python examples/memory_in_your_model.py
"""

import torch

from mirage_kernels import Cameras, LatentCache

GRID, IMAGE = (6, 10), (96, 160)


def world_model(cameras: Cameras, memory) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stand in for a world model: keep what the memory shows, invent the rest of a wall two metres ahead."""
    invented = torch.randn(len(cameras), 48, *GRID)
    latents = torch.where(memory.mask[:, None], memory.latents, invented)
    return latents, torch.full((len(cameras), *IMAGE), 2.0), torch.ones(len(cameras), *IMAGE, dtype=torch.bool)


def make_cameras(chunk: int) -> Cameras:
    """Make nine views that slide along the wall: to the right in even chunks, back in odd ones."""
    cam2world = torch.eye(4).repeat(9, 1, 1)
    cam2world[:, 0, 3] = torch.linspace(0.0, 0.4, 9) if chunk % 2 == 0 else torch.linspace(0.4, 0.0, 9)
    intrinsics = torch.tensor([[100.0, 0.0, 80.0], [0.0, 100.0, 48.0], [0.0, 0.0, 1.0]])
    return Cameras(intrinsics, cam2world, image_size=IMAGE)


def main() -> None:
    torch.manual_seed(0)
    cache = LatentCache(channels=48)
    for chunk in range(4):
        cameras = make_cameras(chunk)
        memory = cache.read(cameras, size=GRID)
        latents, depth, static = world_model(cameras, memory)
        report = cache.write(latents, depth, cameras, mask=static)
        print(f"chunk {chunk}: {memory.mask.float().mean():4.0%} remembered, {report.written} tokens written")
    assert cache.read(make_cameras(1), size=GRID).mask.all(), "the way back must be remembered"


if __name__ == "__main__":
    main()

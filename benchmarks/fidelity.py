"""How true a read-out is: `python -m benchmarks.fidelity --rgbd FOLDER` (the layout of the 7-Scenes data set).

Every frame whose number is a multiple of 10 is written; the memory is read at 12 held-out poses (5, 55, ..) and at 12
written ones (0, 50, ..), and compared with the latents of the pictures taken there. Latents are those of `PatchCodec`:
48 PCA coefficients of 16x16 patches, fitted on the written frames.

- error: |read - true|^2 / |true|^2 over the covered cells: 0 is perfect, 1 is what zeros would give.
- detail: the same over channels 8 and up. 97 % of the energy sits below, so that an error alone rewards blur.
- energy: |read|^2 / |true|^2 over those channels: 1 is as much texture as there is, 0 is a blur.
- coverage: part of the cells that are no holes.

The cache is held in float32 and, in rows that say so, in float8_e4m3fn: what that costs is the difference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mirage.codec import PatchCodec
from mirage.rgbd import RGBDFrames, load_rgbd_folder
from mirage_kernels import Cameras, LatentCache
from mirage_kernels.compat import LatentPointCloud

from .reference_memory import ReferenceMemory

WRITTEN_EVERY, READ_EVERY, HELD_OUT = 10, 50, 5  # in frame numbers
DETAIL = 8  # first channel that counts as detail
CHANNELS, PATCH = 48, 16

Reader: TypeAlias = Callable[[Cameras], tuple[Tensor, Tensor]]


class Room(NamedTuple):
    """The written frames, their latents, and the true latents and cameras of both sets of poses."""

    written: RGBDFrames
    latents: Tensor
    truths: dict[str, tuple[Cameras, Tensor]]


class Score(NamedTuple):
    error: float
    detail: float
    energy: float
    coverage: float


def load_room(folder: str | Path) -> Room:
    """Frames of a folder, dealt by their numbers as the protocol says.

    Raises:
        OSError, ValueError: as :func:`mirage.rgbd.load_rgbd_folder`; or the folder lacks frames the protocol needs.
    """
    frames = load_rgbd_folder(folder)
    numbers = [int(name.split("-")[1]) for name in frames.names]

    def pick(step: int, start: int) -> list[int]:
        return [i for i, number in enumerate(numbers) if number % step == start]

    written, held_out, revisited = pick(WRITTEN_EVERY, 0), pick(READ_EVERY, HELD_OUT), pick(READ_EVERY, 0)
    if not (written and held_out and revisited):
        raise ValueError(f"{folder}: expected frames numbered 0, 5, 10, .., got {frames.names[:3]}..")
    codec = PatchCodec.fit(frames[written].images, CHANNELS, PATCH)
    latents = codec.encode(frames.images)
    truths = {
        name: (frames.cameras[rows], latents[rows]) for name, rows in (("held-out", held_out), ("written", revisited))
    }
    return Room(frames[written], latents[written], truths)


def score(read: Tensor, mask: Tensor, true: Tensor) -> Score:
    """Latents (T, C, h, w) read, where they are no holes (T, h, w), against the true ones."""
    seen = mask[:, None]

    def energy(values: Tensor) -> float:
        return float((values.double() ** 2 * seen).sum())

    fine = true[:, DETAIL:]
    return Score(
        energy(read - true) / energy(true),
        energy(read[:, DETAIL:] - fine) / energy(fine),
        energy(read[:, DETAIL:]) / energy(fine),
        float(mask.double().mean()),
    )


def median_ms(function: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1e3


def measure(room: Room, rounds: int = 5) -> list[dict[str, Any]]:
    """A row for the published memory (`mirage_kernels.compat`), the baseline, and every way to read the cache.

    Milliseconds are those of 9 held-out views.
    """
    size = (room.latents.shape[2], room.latents.shape[3])
    caches = {"": LatentCache(CHANNELS), ", float8": LatentCache(CHANNELS, dtype=torch.float8_e4m3fn)}
    for cache in caches.values():
        cache.write(room.latents, room.written.depth, room.written.cameras)
    baseline = ReferenceMemory(CHANNELS)
    for i in range(len(room.written)):
        camera = room.written.cameras[[i]]
        baseline.write(room.latents[[i]], room.written.depth[[i]], camera.intrinsics, camera.cam2world)

    def read_baseline(cameras: Cameras) -> tuple[Tensor, Tensor]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # on more, cells keep a farther surface by chance
        try:
            grid = cameras.resized(size)
            return baseline.read(grid.intrinsics, grid.cam2world, size)
        finally:
            torch.set_num_threads(threads)

    frames, matrix = room.written, room.written.cameras.intrinsics[0]
    release = LatentPointCloud.from_geometry(
        frames.depth[0], matrix, frames.cameras.cam2world[0], room.latents[0][:, None], device="cpu"
    )
    rest = len(frames) - 1
    release.update(frames.depth[1:], matrix.expand(rest, 3, 3), frames.cameras.cam2world[1:].float(), room.latents[1:])

    def read_release(cameras: Cameras) -> tuple[Tensor, Tensor]:
        views = [release.project(pose) for pose in cameras.cam2world]
        return torch.stack([latents for latents, _ in views]), torch.stack([mask for _, mask in views])

    def nine_views(function: Reader) -> Callable[[], Any]:
        return lambda: function(room.truths["held-out"][0][:9])

    def read(cache: LatentCache, **options: Any) -> Reader:
        return lambda cameras: cache.read(cameras, size, **options)[:2]

    points = baseline.points
    memories: dict[str, tuple[int, int, Reader]] = {
        "published": (
            int(release.valid_mask.sum()),
            release.points_world.nbytes + release.features.nbytes,
            read_release,
        ),
        "baseline": (len(points), points.nbytes + baseline.features.nbytes, read_baseline),
    }
    for stored, cache in caches.items():
        held = len(cache), cache.nbytes
        memories[f"nearest{stored}"] = (*held, read(cache, splat="nearest"))
        for sharpness in (0.0, 15.0, 30.0, 40.0, float("inf")):
            way = read(cache, splat="aligned", sharpness=sharpness)
            memories[f"aligned, sharpness {sharpness:g}{stored}"] = (*held, way)
    rows = []
    for name, (tokens, nbytes, function) in memories.items():
        row: dict[str, Any] = {"memory": name, "tokens": tokens, "bytes": nbytes}
        for poses, (cameras, true) in room.truths.items():
            row[poses] = score(*function(cameras), true)._asdict()
        row["read_ms"] = median_ms(nine_views(function), rounds)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = "| memory | tokens | MiB | bytes a token | held-out error | detail | energy | coverage |"
    lines = [f"{head} written-pose error | detail | energy | coverage | 9 views, ms |", "|---|" + "---:|" * 12]
    for row in rows:
        figures = [
            f"{row[poses][name]:.3f}" if name in ("error", "coverage") else f"{row[poses][name]:.2f}"
            for poses in ("held-out", "written")
            for name in Score._fields
        ]
        tokens, nbytes = row["tokens"], row["bytes"]
        start = [row["memory"], f"{tokens:,}", f"{nbytes / 2**20:.1f}", f"{nbytes / tokens:.1f}"]
        lines.append(f"| {' | '.join([*start, *figures, format(row['read_ms'], '.2f')])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rgbd", required=True, help="RGB-D folder: frame-NNNNNN.color.jpg, .depth.png, .pose.txt")
    parser.add_argument("--out", help="also write the rows to this JSON file")
    arguments = parser.parse_args()
    rows = measure(load_room(arguments.rgbd))
    print(table(rows))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

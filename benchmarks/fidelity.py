"""Measure how true a readout is: `python -m benchmarks.fidelity --rgbd FOLDER` (the layout of the 7-Scenes data set).

Every frame whose number is a multiple of 10 is written; the memory is read at 12 held-out poses (5, 55, ..) and at 12
written ones (0, 50, ..), and compared with the latents of the images taken there. Latents are those of `PatchCodec`:
48 PCA coefficients of 16x16 patches, fitted on the written frames.

- error: |read - true|^2 / |true|^2 over the covered cells: 0 is perfect, 1 is what zeros would give.
- detail: the same over channels 8 and up. 97 % of the energy sits below, so that an error alone rewards blur.
- energy: |read|^2 / |true|^2 over those channels: 1 is as much texture as there is, 0 is a blur.
- coverage: part of the cells that are no holes.

Side by side: the published memory, its algorithm in our words, and `LatentCache` under every policy and way to read.
Then what bounded writes promise: ten laps with noise, an object that is taken away, the time of a read. `--out FOLDER`
writes fidelity.json, report.md and plots.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mirage.scenes.patch_pca import PatchCodec
from mirage.scenes.rgbd import RGBDFrames, load_rgbd_folder
from mirage_kernels import Cameras, LatentCache
from mirage_kernels.compat import LatentPointCloud
from mirage_kernels.constants import NEAR
from mirage_kernels.geometry import in_view, make_projection, project_points

from .plots import fidelity_over_tokens
from .reference_memory import ReferenceMemory

WRITTEN_EVERY, READ_EVERY, HELD_OUT = 10, 50, 5  # in frame numbers
DETAIL = 8  # first channel that counts as detail
CHANNELS, PATCH = 48, 16

Reader: TypeAlias = Callable[[Cameras], tuple[Tensor, Tensor]]


class Room(NamedTuple):
    """Hold the written frames, their latents, and the true latents and cameras of both sets of poses."""

    written: RGBDFrames
    latents: Tensor
    truths: dict[str, tuple[Cameras, Tensor]]


class Score(NamedTuple):
    error: float
    detail: float
    energy: float
    coverage: float


def load_room(folder: str | Path) -> Room:
    """Load the frames of a folder, dealt by their numbers as the protocol says.

    Raises:
        OSError, ValueError: as :func:`mirage.scenes.rgbd.load_rgbd_folder`; or the folder lacks frames the protocol
        needs.
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
    """Compare the latents (T, C, h, w) read, where they are no holes (T, h, w), with the true ones."""
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


def _frames(room: Room, rows: Any) -> tuple[Tensor, Tensor, Cameras]:
    return room.latents[rows], room.written.depth[rows], room.written.cameras[rows]


def _baseline(latents: Tensor, depth: Tensor, cameras: Cameras) -> ReferenceMemory:
    memory = ReferenceMemory(CHANNELS)
    for i in range(len(latents)):
        memory.write(latents[[i]], depth[[i]], cameras.intrinsics[[i]], cameras.cam2world[[i]])
    return memory


def _read_baseline(
    memory: ReferenceMemory, cameras: Cameras, size: tuple[int, int], threads: int
) -> tuple[Tensor, Tensor]:
    """Read on so many threads: on one it is right; on all it is fast, but cells keep a farther surface by chance."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        grid = cameras.resized(size)
        return memory.read(grid.intrinsics, grid.cam2world, size)
    finally:
        torch.set_num_threads(before)


POLICIES: dict[str, dict[str, Any]] = {
    "append": {"write_policy": "append"},
    "append, float8": {"write_policy": "append", "dtype": torch.float8_e4m3fn},
    "bounded": {},
    "bounded, float8": {"dtype": torch.float8_e4m3fn},
    **{f"bounded, {views} a voxel": {"views_per_voxel": views} for views in (1, 2, 3, 6, 8, 16)},
    "bounded, no carving": {"carve": False},
    **{f"mean, {views} a voxel": {"views_per_voxel": views, "merge": "mean"} for views in (1, 2, 4)},
}
READS: dict[str, dict[str, Any]] = {
    "nearest": {"splat": "nearest"},
    "aligned": {},
    **{f"aligned, sharpness {value:g}": {"sharpness": value} for value in (0.0, 15.0, 40.0, float("inf"))},
}
_EVERY_READ = ("append", "bounded", "mean, 1 a voxel")  # of other policies, the first two ways


def measure(room: Room, rounds: int = 5) -> list[dict[str, Any]]:
    """Measure a row for the published memory (`mirage_kernels.compat`), the baseline, and each policy and way to read.

    Milliseconds are those of 9 held-out views.
    """
    size = (room.latents.shape[2], room.latents.shape[3])
    frames, matrix = room.written, room.written.cameras.intrinsics[0]
    release = LatentPointCloud.from_geometry(
        frames.depth[0], matrix, frames.cameras.cam2world[0], room.latents[0][:, None], device="cpu"
    )
    rest = len(frames) - 1
    release.update(frames.depth[1:], matrix.expand(rest, 3, 3), frames.cameras.cam2world[1:].float(), room.latents[1:])
    baseline = _baseline(*_frames(room, slice(None)))

    def read_release(cameras: Cameras) -> tuple[Tensor, Tensor]:
        views = [release.project(pose) for pose in cameras.cam2world]
        return torch.stack([latents for latents, _ in views]), torch.stack([mask for _, mask in views])

    def read_baseline(cameras: Cameras) -> tuple[Tensor, Tensor]:
        return _read_baseline(baseline, cameras, size, 1)

    def read(cache: LatentCache, **options: Any) -> Reader:
        return lambda cameras: cache.read(cameras, size, dtype=torch.float32, **options)[:2]

    points = baseline.points
    bytes_of_release = release.points_world.nbytes + release.features.nbytes
    memories: list[tuple[str, str, int, int, Reader]] = [
        ("published", "nearest", int(release.valid_mask.sum()), bytes_of_release, read_release),
        (
            "baseline",
            "nearest",
            len(points),
            points.nbytes + baseline.features.nbytes,
            read_baseline,
        ),
    ]
    for name, options in POLICIES.items():
        cache = LatentCache(CHANNELS, **options)
        cache.write(*_frames(room, slice(None)))
        ways = READS if name in _EVERY_READ else ("nearest", "aligned")
        memories += [(name, way, len(cache), cache.nbytes, read(cache, **READS[way])) for way in ways]

    rows = []
    for name, way, tokens, nbytes, function in memories:
        row: dict[str, Any] = {"memory": name, "read": way, "tokens": tokens, "bytes": nbytes}
        for poses, (cameras, true) in room.truths.items():
            latents, mask = function(cameras)
            row[poses] = score(latents, mask, true)._asdict()
            latents[:, DETAIL:] = 0
            row[poses]["error_without_detail"] = score(latents, mask, true).error
        nine = room.truths["held-out"][0][:9]
        row["read_ms"] = median_ms(functools.partial(function, nine), rounds)
        rows.append(row)
    return rows


def laps(
    room: Room, number: int = 10, noise: float = 0.01, jitter: float = 0.005, seed: int = 0
) -> list[dict[str, Any]]:
    """Write lap after lap over every second written frame, and score each: tokens, and the error at the poses written.

    Each pixel's depth is off by `noise` of it and each pose by `jitter` metres (standard deviations).
    """
    size = (room.latents.shape[2], room.latents.shape[3])
    every = range(0, len(room.written), 2)
    latents, depth, cameras = _frames(room, list(every))
    generator, cache, rows = torch.Generator().manual_seed(seed), LatentCache(CHANNELS), []
    for lap in range(1, number + 1):
        seen = depth * (1 + noise * torch.randn(depth.shape, generator=generator))
        poses = cameras.cam2world.clone()
        poses[:, :3, 3] += jitter * torch.randn((len(poses), 3), generator=generator).to(poses)
        report = cache.write(latents, seen, Cameras(cameras.intrinsics, poses, cameras.image_size, square_pixels=False))
        view = cache.read(cameras, size)
        rows.append({"lap": lap, "tokens": len(cache), **score(view.latents, view.mask, latents)._asdict()})
        rows[-1]["report"] = report.as_dict()
    return rows


def add_box(depth: Tensor, cameras: Cameras, low: Tensor, high: Tensor, step: int = 1) -> Tensor:
    """Put an opaque box, two corners (3,), into depth maps (T, h, w) of every `step`-th row and column."""
    row, column = (torch.arange(size) * step + 0.5 for size in depth.shape[1:])
    row = row[:, None]
    k, pose = cameras.intrinsics.float(), cameras.cam2world.float()
    x = (column - k[:, 0, 2, None, None]) / k[:, 0, 0, None, None]
    y = (row - k[:, 1, 2, None, None]) / k[:, 1, 1, None, None]
    rays = torch.stack(torch.broadcast_tensors(x, y, torch.ones_like(depth)), -1) @ pose[:, None, :3, :3].transpose(
        -1, -2
    )
    starts = pose[:, None, None, :3, 3]
    ends = torch.stack([(low - starts) / rays, (high - starts) / rays])
    near, far = ends.amin(0).amax(-1), ends.amax(0).amin(-1)
    known = (depth > 0) & torch.isfinite(depth)
    return torch.where((near < far) & (near > 0) & (~known | (near < depth)), near, depth)


def removal(
    room: Room, objects: int = 8, edge: float = 0.35, gap: float = 0.1, tries: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Count the tokens that are left of a box of this edge (metres) after it is gone.

    It hangs in views of the room, at least `gap` of their depth before all that is behind it; then the last three of
    these views are written again without it.
    """
    latents, depth, cameras = _frames(room, slice(None))
    projections = make_projection(cameras.intrinsics, cameras.cam2world, torch.float32)
    generator, rows = torch.Generator().manual_seed(seed), list[dict[str, Any]]()
    for _ in range(tries):
        if len(rows) == objects:
            break
        t, where = int(torch.randint(len(depth), (), generator=generator)), torch.rand(3, generator=generator)
        z = 0.9 + float(where[2])
        pixel = torch.tensor([float(where[0]) * depth.shape[2], float(where[1]) * depth.shape[1], 1.0])
        ray = torch.linalg.inv(cameras.intrinsics[t].float()) @ pixel
        centre = cameras.cam2world[t, :3, :3].float() @ (ray * z) + cameras.cam2world[t, :3, 3].float()
        low, high = centre - edge / 2, centre + edge / 2
        corners = torch.stack(torch.meshgrid(*torch.stack([low, high], 1), indexing="ij"), -1).view(8, 3)
        inside = [
            view
            for view, projection in enumerate(projections)
            if in_view(*project_points(corners, projection), (depth.shape[1], depth.shape[2]), NEAR).all()
        ]
        # A few pixels first: most places are blocked, and most of those at once.
        for step, fewest in ((8, 10), (1, 1500)):
            if len(inside) < 3:
                break
            behind = depth[:, ::step, ::step][inside]
            with_box = add_box(behind, cameras[inside], low, high, step)
            changed = with_box != behind
            known = (behind > 0) & torch.isfinite(behind)
            blocked = changed & known & (behind < (1 + gap) * (with_box + edge))
            hidden = changed.flatten(1).sum(1)
            unknown = (changed & ~known).flatten(1).sum(1)
            usable = (hidden > fewest) & ((unknown < 0.02 * hidden) | (step > 1)) & ~blocked.flatten(1).any(1)
            inside = [view for view, fits in zip(inside, usable.tolist(), strict=True) if fits]
        views = inside
        if len(views) < 3:
            continue
        with_box = with_box[usable]
        cache = LatentCache(CHANNELS)
        cache.write(latents[views], with_box, cameras[views])

        def of_box(cache: LatentCache, low: Tensor = low, high: Tensor = high, frames: int = len(views)) -> int:
            reach = cache.footprints[:, None]
            inside = ((cache.points > low - reach) & (cache.points < high + reach)).all(1)
            return int((inside & (cache.frame_ids < frames)).sum())  # what is written there later is the room

        held = of_box(cache)
        for view in views[-3:]:
            cache.write(latents[[view]], depth[[view]], cameras[[view]])
        rows.append({"views": len(views), "held": held, "left": of_box(cache)})
    return rows


def static_loss(room: Room) -> dict[str, Any]:
    """Count what is carved of the room itself, in which nothing moves, while all its frames are written."""
    written = LatentCache(CHANNELS).write(*_frames(room, slice(None)))
    return {"written": written.written, "carved": written.carved}


def speed(folder: str | Path, rounds: int = 9) -> list[dict[str, Any]]:
    """Measure the milliseconds of 9 views of every frame of the folder: the reference algorithm, and `LatentCache`.

    The reference runs on one thread, where it is right, and on all, where it is not; rounds take turns.
    """
    frames = load_rgbd_folder(folder)
    latents = PatchCodec.fit(frames.images, CHANNELS, PATCH).encode(frames.images)
    size = (latents.shape[2], latents.shape[3])
    baseline = _baseline(latents, frames.depth, frames.cameras)
    cache = LatentCache(CHANNELS)
    cache.write(latents, frames.depth, frames.cameras)
    nine = frames.cameras[list(range(0, len(frames), max(len(frames) // 9, 1)))[:9]]
    threads = torch.get_num_threads()
    ways: dict[str, tuple[int, Callable[[], Any]]] = {
        "reference, 1 thread": (len(baseline.points), lambda: _read_baseline(baseline, nine, size, 1)),
        f"reference, {threads} threads": (len(baseline.points), lambda: _read_baseline(baseline, nine, size, threads)),
        "bounded, nearest": (len(cache), lambda: cache.read(nine, size, splat="nearest")),
        "bounded, aligned": (len(cache), lambda: cache.read(nine, size)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, (_, function) in ways.items():
            times[name].append(median_ms(function, 3))
    return [
        {"memory": name, "tokens": tokens, "read_ms": statistics.median(times[name][1:])}
        for name, (tokens, _) in ways.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows of :func:`measure` in Markdown."""
    head = "| memory | read | tokens | x baseline | MiB | bytes a token | held-out error | detail | energy | coverage |"
    lines = [f"{head} written-pose error | detail | energy | coverage | 9 views, ms |", "|---|---|" + "---:|" * 13]
    base = next(row["tokens"] for row in rows if row["memory"] == "baseline")
    for row in rows:
        figures = [
            f"{row[poses][name]:.3f}" if name in ("error", "coverage") else f"{row[poses][name]:.2f}"
            for poses in ("held-out", "written")
            for name in Score._fields
        ]
        tokens, nbytes = row["tokens"], row["bytes"]
        start = [row["memory"], row["read"], f"{tokens:,}", f"{tokens / base:.3f}"]
        start += [f"{nbytes / 2**20:.1f}", f"{nbytes / tokens:.1f}"]
        lines.append(f"| {' | '.join([*start, *figures, format(row['read_ms'], '.2f')])} |")
    return "\n".join(lines)


def find(rows: list[dict[str, Any]], memory: str, read: str = "aligned") -> dict[str, Any]:
    """Return the row of :func:`measure` of this memory, read this way."""
    return next(row for row in rows if (row["memory"], row["read"]) == (memory, read))


def why(rows: list[dict[str, Any]], removed: float, static: float) -> str:
    """Say what the defaults of `LatentCache` are chosen by, in Markdown."""
    four, append = find(rows, "bounded"), find(rows, "append")

    def between(memory: str, read: str = "aligned") -> str:
        row = find(rows, memory, read)
        errors = f"{row['held-out']['error']:.3f} held out, {row['written']['error']:.3f} at written poses"
        return f"{row['tokens'] / four['tokens']:.2f} x the tokens, errors of {errors}"

    def energies(read: str) -> str:
        row = find(rows, "bounded", read)
        return " and ".join(f"{row[poses]['energy']:.2f}" for poses in ("held-out", "written"))

    return "\n".join(
        [
            "## Why the defaults",
            "",
            f'- `write_policy="bounded"`: {four["tokens"] / append["tokens"]:.2f} x the tokens of appending all, and'
            f" hardly more with every lap. It costs sharpness: errors of {four['held-out']['error']:.3f} held out and"
            f" {four['written']['error']:.3f} at written poses, against {append['held-out']['error']:.3f} and"
            f" {append['written']['error']:.3f}. Who has the memory and no loops may append.",
            f"- `views_per_voxel=4`: 2 give {between('bounded, 2 a voxel')}; 8 give {between('bounded, 8 a voxel')}.",
            f'- `merge="keep"`: the mean of one a voxel takes {between("mean, 1 a voxel")}, but blurs: energies of'
            f" {find(rows, 'mean, 1 a voxel')['held-out']['energy']:.2f} and"
            f" {find(rows, 'mean, 1 a voxel')['written']['energy']:.2f}, and 1 is as much texture as there is.",
            f'- `splat="aligned"`: the nearest token of the same memory gives {between("bounded", "nearest")}.',
            "- `sharpness=30`: at 0, 15, 30 and 40 the energies held out and at written poses are"
            f" {energies('aligned, sharpness 0')}; {energies('aligned, sharpness 15')}; {energies('aligned')};"
            f" {energies('aligned, sharpness 40')}. 30 is the least at which nine tenths of the texture are there.",
            f"- `carve=True`: {removed:.1%} of what was taken away goes, and {static:.2%} of what never moved. Without:"
            f" {between('bounded, no carving')}.",
            "",
            "An error alone rewards blur. With the detail channels of what was read zeroed, the written-pose error is"
            f" {append['written']['error_without_detail']:.3f} instead of {append['written']['error']:.3f} for all"
            f" appended, but {four['written']['error_without_detail']:.3f} instead of {four['written']['error']:.3f}"
            " for the default memory: its texture is right in kind, seldom in place.",
        ]
    )


def report(results: dict[str, list[dict[str, Any]]]) -> str:
    """Format all that was measured, in Markdown."""
    first, fifth, tenth = (results["laps"][k] for k in (0, len(results["laps"]) // 2 - 1, -1))
    static = results["static"][0]
    gone = [1 - row["left"] / row["held"] for row in results["removal"]]
    removed = 1 - sum(row["left"] for row in results["removal"]) / sum(row["held"] for row in results["removal"])
    lost = static["carved"] / static["written"]
    slow = min(row["read_ms"] for row in results["speed"][:2])
    lines = [
        "# Fidelity",
        "",
        "Made by `python -m benchmarks.fidelity`; what the columns are is said there.",
        "",
        table(results["fidelity"]),
        "",
        "![errors, energy, coverage and time over tokens](fidelity.svg)",
        "",
        why(results["fidelity"], removed, lost),
        "",
        "## Over time",
        "",
        f"**Laps.** {len(results['laps'])} noisy laps over every second written frame: {first['tokens']:,} tokens"
        f" after the first, {fifth['tokens']:,} after the middle one, {tenth['tokens']:,} after the last"
        f" ({tenth['tokens'] / fifth['tokens']:.3f} x and {tenth['tokens'] / first['tokens']:.3f} x);"
        f" written-pose error {first['error']:.3f} after the first, {tenth['error']:.3f} after the last.",
        "",
        f"**Removal.** {len(gone)} boxes taken away, three views of each place later: of all their tokens {removed:.1%}"
        f" are gone, of each box's {', '.join(f'{part:.1%}' for part in gone)}. Of the room itself, {lost:.2%}.",
        "",
        "**Time** of 9 views, every frame of the folder written:",
        "",
        "| memory | tokens | ms | faster than the faster reference |",
        "|---|---:|---:|---:|",
        *(
            f"| {row['memory']} | {row['tokens']:,} | {row['read_ms']:.2f} | {slow / row['read_ms']:.1f} x |"
            for row in results["speed"]
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rgbd", required=True, help="RGB-D folder: frame-NNNNNN.color.jpg, .depth.png, .pose.txt")
    parser.add_argument("--out", help="also write fidelity.json, report.md and plots into this folder")
    arguments = parser.parse_args()
    room = load_room(arguments.rgbd)
    results = {
        "fidelity": measure(room),
        "laps": laps(room),
        "removal": removal(room),
        "static": [static_loss(room)],
        "speed": speed(arguments.rgbd),
    }
    text = report(results)
    print(text)
    if arguments.out:
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fidelity.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "report.md").write_text(text)
        fidelity_over_tokens(results["fidelity"], folder)


if __name__ == "__main__":
    main()

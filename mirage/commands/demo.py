"""`mirage demo`: a real scene written into the memory, read where nobody stood, and measured.

An RGB-D scene is encoded with :class:`~mirage.scenes.patch_pca.PatchCodec`, written into a
:class:`~mirage_kernels.LatentCache` and read at held-out cameras and along a closed loop. Figures, pictures
and the cache go into one folder.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import mirage_kernels
from mirage_kernels import Cameras, LatentCache, back_project, splat
from mirage_kernels.backends import choose_backend
from mirage_kernels.io import replace_file

from ..media import Panel, contact_sheet, heat_map, paint_holes, save_video, upsample
from ..optional import import_extra
from ..scenes.patch_pca import PatchCodec
from ..scenes.rgbd import RGBDFrames, list_rgbd_folder, load_rgbd_folder, stereo_motorcycle
from ..scenes.trajectories import out_and_back, spiral

CONTACT, LOOP, CACHE, REPORT = "contact.png", "loop.mp4", "cache.safetensors", "report.json"

_CHANNELS, _PATCH = 48, 16
_LOOP_FRAMES = 60
_STRIP = 6  # frames of the loop on the contact sheet
_FPS = 24
_MAX_FRAMES = 120  # of a folder: 450 MB of images at 480x640
_MAX_HELD_OUT = 12
_ERROR_SCALE = 0.4  # last colour of the error map; the range of colours is 1
_MISSING = (0.95, 0.45, 0.12)  # tint of what the memory does not cover
_CLOUD_BYTES, _CLOUD_BYTES_UINT8 = 24, 15  # a point: float32 xyz, and rgb as float32 or as uint8


@dataclass(frozen=True)
class _Scene:
    """What is remembered, what is held out, and the closed path to look along."""

    name: str
    written: RGBDFrames
    held_out: RGBDFrames
    loop: Cameras


def run_demo(
    out: str | os.PathLike[str],
    rgbd: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Remember a scene and show what is remembered.

    Without `rgbd`, the left view of scikit-image's stereo pair is written and the right one held out; the
    loop is a spiral about the left camera. With `rgbd`, frames of that folder are taken (see
    :func:`~mirage.scenes.rgbd.load_rgbd_folder`; at most 120, evenly spaced): every other one is written, up to 12
    of those between are held out, and the loop goes along the written cameras and back.

    Args:
        out: folder for contact.png, loop.mp4, cache.safetensors and report.json; made if need be. A file of
            these names is replaced only when its new content is complete.
        rgbd: RGB-D folder.
        device: "cpu" or "cuda", for codec, memory and timings.
        progress: show progress bars, on stderr.

    Returns:
        The content of report.json, flat:

        - scene, written_frames, held_out_frames, loop_frames (counts), image_size and grid_size ([h, w]),
          channels;
        - tokens, cache_dtype, cache_bytes: what the memory holds;
        - cloud_points, cloud_bytes, cloud_bytes_uint8: an RGB point cloud with a point per pixel of known
          depth of the same frames, float32 coordinates, colours float32 (24 bytes a point) or uint8 (15);
          memory_ratio and memory_ratio_uint8: those over cache_bytes;
        - read_ms: median time to read one held-out camera at the latent grid, all channels; rasterise_ms:
          median time to splat the cloud's 3 channels into the same camera at full resolution, nearest point
          only; speed_ratio. Encoding that picture, which a memory of pixels needs next, is not counted;
        - coverage: part of the held-out views' cells that the memory fills. Over these cells: readout_error,
          |read - true|^2 / |true|^2 with true = encode(held-out view), 0 is perfect and 1 is what zeros would
          give; psnr_db of the decoded read-out against the held-out pixels; codec_psnr_db, the same for
          decode(encode(held-out view)): the most this codec could show;
        - loop_coverage, loop_coverage_min: mean and least over the loop; loop_closes: its last frame is its
          first, bit for bit;
        - device, backend, threads, torch, mirage_kernels, seconds (total).

    Raises:
        MissingExtraError: a package of the extra `demo` is not installed.
        OSError, ValueError: a folder or file cannot be used, the scene has too few frames or no depth, or
            there is no such device. The message says which.
    """
    began = time.perf_counter()
    target = _check_device(device)
    for module in ("tqdm", "PIL", "imageio_ffmpeg"):
        import_extra(module, "demo")  # now rather than after a minute
    scene = _stereo_scene() if rgbd is None else _folder_scene(Path(rgbd), progress)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written, held_out = scene.written, scene.held_out
    size = written.cameras.image_size
    grid = (size[0] // _PATCH, size[1] // _PATCH)

    with _progress(2 + 2 * len(written) + len(held_out) + len(scene.loop), progress) as step:
        step("fit the codec")
        codec = PatchCodec.fit(written.images, _CHANNELS, _PATCH).to(target)
        cache = LatentCache(channels=_CHANNELS, dtype=torch.bfloat16, device=target)
        for i in range(len(written)):
            step("write")
            frame = written[[i]]
            latents = codec.encode(frame.images.to(target))
            cache.write(latents, frame.depth.to(target), frame.cameras.to(target))
        if not len(cache):
            raise ValueError(f"{scene.name}: expected frames with depth, but no token has a known depth")
        report: dict[str, Any] = {
            "scene": scene.name,
            "written_frames": len(written),
            "held_out_frames": len(held_out),
            "loop_frames": len(scene.loop),
            "image_size": list(size),
            "grid_size": list(grid),
            "channels": _CHANNELS,
            "tokens": len(cache),
            "cache_dtype": str(cache.dtype).removeprefix("torch."),
            "cache_bytes": cache.nbytes,
            **_against_point_cloud(cache, written, held_out.cameras[0].to(target), grid, step),
        }

        comparisons = []
        for i in range(len(held_out)):
            step("compare")
            comparisons.append(_compare(cache, codec, held_out[[i]], grid))
        if not any(comparison.mask.any() for comparison in comparisons):
            raise ValueError(f"{scene.name}: held-out views see nothing of the written ones; are the poses right?")
        report |= _pool(comparisons)

        loop = cache.read(scene.loop.to(target), size=grid)

        def loop_frame(i: int) -> Tensor:
            return paint_holes(codec.decode(loop.latents[i][None].float())[0], loop.mask[i]).cpu()

        def loop_frames() -> Iterator[Tensor]:
            for i in range(len(scene.loop)):
                step("loop")
                yield loop_frame(i)

        save_video(out / LOOP, loop_frames(), _FPS)
        coverage = loop.mask.float().mean((1, 2))
        report["loop_coverage"] = coverage.mean().item()
        report["loop_coverage_min"] = coverage.min().item()
        report["loop_closes"] = torch.equal(loop_frame(0), loop_frame(len(scene.loop) - 1))

        step("draw")
        strip = torch.linspace(0, len(scene.loop) - 1, _STRIP).round().int().tolist()
        sheet = _draw_sheet(scene, report, comparisons, [(i, loop_frame(i)) for i in strip])
        replace_file(out / CONTACT, lambda draft: sheet.save(draft, "PNG"))
        cache.save(out / CACHE)

    report |= {
        "device": device,
        "backend": choose_backend(target, torch.float32),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mirage_kernels": mirage_kernels.__version__,
        "seconds": time.perf_counter() - began,
    }

    def write(draft: str) -> None:
        Path(draft).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    replace_file(out / REPORT, write)
    return report


def format_report(report: dict[str, Any]) -> str:
    """The report of :func:`run_demo` as a table for a terminal."""

    def mib(key: str) -> str:
        return f"{report[key] / 2**20:.2f} MiB"

    (height, width), (h, w) = report["image_size"], report["grid_size"]
    rows = [
        (report["scene"], "latent memory", "RGB point cloud", ""),
        ("held", f"{report['tokens']:,} tokens", f"{report['cloud_points']:,} points", ""),
        ("size", mib("cache_bytes"), mib("cloud_bytes"), f"{report['memory_ratio']:.0f}x smaller"),
        (
            "  with uint8 colours",
            "",
            mib("cloud_bytes_uint8"),
            f"{report['memory_ratio_uint8']:.0f}x smaller",
        ),
        ("one read", f"{h}x{w}x{report['channels']}", f"{height}x{width}x3", ""),
        (
            f"  on {report['device']} ({report['backend']})",
            f"{report['read_ms']:.3f} ms",
            f"{report['rasterise_ms']:.3f} ms",
            f"{report['speed_ratio']:.0f}x faster",
        ),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows]
    lines.insert(1, "-" * (sum(widths) + 6))
    held_out = _count(report["held_out_frames"], "held-out view")
    lines += [
        "",
        f"{held_out}: {report['coverage']:.1%} covered, read-out error {report['readout_error']:.3f}"
        " (0 perfect, 1 nothing remembered)",
        f"decoded: {report['psnr_db']:.1f} dB, of at most {report['codec_psnr_db']:.1f} dB with this codec",
        f"loop: {report['loop_frames']} frames, {report['loop_coverage']:.1%} covered"
        f" (least {report['loop_coverage_min']:.1%}),"
        f" its end {'equals' if report['loop_closes'] else 'DIFFERS FROM'} its start",
    ]
    return "\n".join(lines)


def _check_device(device: str) -> torch.device:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device cuda is not available: torch {torch.__version__} sees no GPU")
    return torch.device(device)


@contextmanager
def _progress(steps: int, show: bool) -> Iterator[Callable[[str], None]]:
    """A bar over so many steps, as a function to call with the name of each when it begins."""
    with import_extra("tqdm", "demo").tqdm(total=steps, disable=not show, leave=False) as bar:

        def step(name: str) -> None:
            bar.set_description_str(name)
            bar.update()

        yield step


def _stereo_scene() -> _Scene:
    frames = stereo_motorcycle()
    # A swing about the left camera, nearly a baseline to every side, looking at the middle of the motorcycle.
    loop = spiral(frames.cameras[0], _LOOP_FRAMES, distance=2.7, radius=0.15, turns=2.0)
    return _Scene("stereo_motorcycle", frames[[0]], frames[[1]], loop)


def _folder_scene(folder: Path, progress: bool) -> _Scene:
    step = -(-len(list_rgbd_folder(folder)) // _MAX_FRAMES)
    frames = load_rgbd_folder(folder, slice(None, None, step), progress)
    if len(frames) < 2:
        raise ValueError(f"{folder}: expected at least two frames, one to write and one to hold out, got one")
    written, between = frames[::2], frames[1::2]
    held_out = between[torch.linspace(0, len(between) - 1, min(_MAX_HELD_OUT, len(between))).round().int().tolist()]
    cameras = written.cameras

    def way_out(count: int) -> Cameras:
        return cameras[torch.linspace(0, len(cameras) - 1, count).round().int().tolist()]

    return _Scene(folder.resolve().name, written, held_out, out_and_back(way_out, 2 * len(cameras)))


def _against_point_cloud(
    cache: LatentCache,
    frames: RGBDFrames,
    camera: Cameras,
    grid: tuple[int, int],
    step: Callable[[str], None],
) -> dict[str, float]:
    """What a memory of pixels takes for the same frames, in bytes and time to show `camera`, beside ours."""
    points, colours = [], []
    for i in range(len(frames)):
        step("make the point cloud")
        frame, views = frames[[i]], frames.cameras[i].to(camera.device)
        depth = frame.depth.to(camera.device)
        lifted = back_project(depth, views.intrinsics, views.cam2world, views.image_size)
        points.append(lifted.points[lifted.valid])
        colours.append(frame.images.to(camera.device).permute(0, 2, 3, 1)[lifted.valid])
    xyz, rgb = torch.cat(points), torch.cat(colours)
    del points, colours
    read_ms = _milliseconds(lambda: cache.read(camera, size=grid), camera.device)
    rasterise_ms = _milliseconds(
        lambda: splat(xyz, rgb, camera.intrinsics, camera.cam2world, camera.image_size), camera.device
    )
    return {
        "cloud_points": len(xyz),
        "cloud_bytes": len(xyz) * _CLOUD_BYTES,
        "cloud_bytes_uint8": len(xyz) * _CLOUD_BYTES_UINT8,
        "memory_ratio": len(xyz) * _CLOUD_BYTES / cache.nbytes,
        "memory_ratio_uint8": len(xyz) * _CLOUD_BYTES_UINT8 / cache.nbytes,
        "read_ms": read_ms,
        "rasterise_ms": rasterise_ms,
        "speed_ratio": rasterise_ms / read_ms,
    }


def _milliseconds(function: Callable[[], object], device: torch.device) -> float:
    """Median of up to 50 calls in up to two seconds, at least three, after one to warm up."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    function()
    times: list[float] = []
    while len(times) < 3 or (len(times) < 50 and sum(times) < 2.0):
        began = now()
        function()
        times.append(now() - began)
    return 1e3 * median(times)


@dataclass(frozen=True)
class _Comparison:
    """One held-out view beside what the memory shows there, on the CPU, and sums that can be pooled."""

    truth: Tensor  # (3, H, W) in [0, 1]
    decoded: Tensor  # (3, H, W) in [0, 1]
    mask: Tensor  # (h, w) bool
    depth: Tensor  # (h, w) metres
    latent_error: float  # squared, over covered cells
    latent_energy: float  # of the truth, over covered cells
    pixel_error: float  # squared, over covered pixels
    codec_error: float  # the same, of the truth encoded and decoded

    @property
    def error(self) -> float:
        """Relative error of the read-out; infinite where it says nothing."""
        return self.latent_error / self.latent_energy if self.latent_energy else math.inf


def _compare(cache: LatentCache, codec: PatchCodec, frame: RGBDFrames, grid: tuple[int, int]) -> _Comparison:
    device = codec.mean.device
    truth = frame.images.to(device)
    true_latents = codec.encode(truth)
    view = cache.read(frame.cameras.to(device), size=grid)
    latents = view.latents.float()
    decoded = codec.decode(latents)
    cells = view.mask[:, None]
    pixels = upsample(cells, frame.cameras.image_size)

    def energy(values: Tensor, where: Tensor) -> float:
        return (values.double().square() * where).sum().item()

    return _Comparison(
        truth=truth[0].cpu(),
        decoded=decoded[0].cpu(),
        mask=view.mask[0].cpu(),
        depth=view.depth[0].cpu(),
        latent_error=energy(latents - true_latents, cells),
        latent_energy=energy(true_latents, cells),
        pixel_error=energy(decoded - truth, pixels),
        codec_error=energy(codec.decode(true_latents) - truth, pixels),
    )


def _pool(comparisons: Sequence[_Comparison]) -> dict[str, float]:
    """Figures over all cells of these views; at least one is covered."""
    covered = sum(int(view.mask.sum()) for view in comparisons)

    def decibels(squared_error: float) -> float:
        return -10.0 * math.log10(squared_error / (covered * 3 * _PATCH**2))

    energy = sum(view.latent_energy for view in comparisons)
    return {
        "coverage": covered / sum(view.mask.numel() for view in comparisons),
        "readout_error": sum(view.latent_error for view in comparisons) / energy,
        "psnr_db": decibels(sum(view.pixel_error for view in comparisons)),
        "codec_psnr_db": decibels(sum(view.codec_error for view in comparisons)),
    }


def _draw_sheet(
    scene: _Scene,
    report: dict[str, Any],
    comparisons: Sequence[_Comparison],
    strip: Sequence[tuple[int, Tensor]],
) -> Any:
    """The contact sheet, with the held-out view whose read-out error is the median one."""
    seen = [i for i, view in enumerate(comparisons) if view.mask.any()]
    shown = sorted(seen, key=lambda i: comparisons[i].error)[(len(seen) - 1) // 2]
    view, name, written = comparisons[shown], scene.held_out.names[shown], scene.written
    size = scene.held_out.cameras.image_size
    figures = _pool([view])

    centre = scene.held_out.cameras.centers[shown]
    beside = int((written.cameras.centers - centre).norm(dim=1).argmin())
    among = f", one of {len(written)}" if len(written) > 1 else ""
    difference = heat_map((view.decoded - view.truth).abs().mean(0), 0.0, _ERROR_SCALE, "inferno")
    near, far = (view.depth[view.mask].quantile(q).item() for q in (0.02, 0.98))
    depth = heat_map(upsample(view.depth, size), far, near, "viridis")
    grey = view.truth.mean(0).expand(3, *size)
    missing = torch.tensor(_MISSING)[:, None, None] * (0.45 + 0.55 * grey)
    coverage = torch.where(upsample(view.mask, size), 0.15 + 0.75 * grey, missing)
    rows = [
        [
            Panel(written.images[beside], f"written: {written.names[beside]}{among}"),
            Panel(paint_holes(view.decoded, view.mask), f"read at: {name}, decoded"),
            Panel(view.truth, f"truth: {name}, held out"),
        ],
        [
            Panel(
                paint_holes(difference, view.mask),
                f"error: PSNR {figures['psnr_db']:.1f} dB",
                ("inferno", "0", f"{_ERROR_SCALE:g}"),
            ),
            Panel(coverage, f"coverage: {figures['coverage']:.1%}, the rest orange"),
            Panel(
                paint_holes(depth, view.mask),
                "depth of the read-out",
                ("viridis", f"{far:.1f} m", f"{near:.1f} m"),
            ),
        ],
        [Panel(image, f"loop: {i + 1} / {len(scene.loop)}") for i, image in strip],
    ]
    lines = [
        f"{scene.name}: {_count(len(written), 'view')} kept as {report['tokens']:,} latent tokens,"
        f" {report['cache_bytes'] / 2**20:.2f} MiB: {report['memory_ratio']:.0f}x less than"
        f" {report['cloud_points']:,} coloured points of the same pixels"
    ]
    footer = (
        "Each cell shows the tokens that fit it best, decoded alone by a linear patch codec that stands in for"
        " the VAE: hence the blocks. Dark checker: nothing known."
    )
    return contact_sheet("Mirage: latent spatial memory", lines, rows, footer)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")

"""The first part of `mirage demo`: a real scene is written into the memory, read where nobody stood, and measured.

An RGB-D scene is encoded with :class:`~mirage.scenes.patch_pca.PatchCodec`, written into a
:class:`~mirage_kernels.LatentCache` and read at held-out cameras and along a closed loop. Figures, images and the cache
go into one folder.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mirage_kernels
from mirage_kernels import LatentCache
from mirage_kernels.backends import choose_backend
from mirage_kernels.io import replace_file, replace_text

from ...media import paint_holes, save_video
from ...optional import import_extra
from ...scenes.patch_pca import PatchCodec
from .measure import PATCH, compare, compare_with_point_cloud, pool
from .report import draw_sheet
from .scene import folder_scene, stereo_scene

CONTACT, LOOP, CACHE, REPORT = "contact.png", "loop.mp4", "cache.safetensors", "report.json"

_CHANNELS = 48
_STRIP = 6  # frames of the loop on the contact sheet
_FPS = 24


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
          only; speed_ratio. Encoding that image, which a memory of pixels needs next, is not counted;
        - coverage: part of the held-out views' cells that the memory fills. Over these cells: readout_error,
          |read - true|^2 / |true|^2 with true = encode(held-out view), 0 is perfect and 1 is what zeros would
          give; psnr_db of the decoded readout against the held-out pixels; codec_psnr_db, the same for
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
    scene = stereo_scene() if rgbd is None else folder_scene(Path(rgbd), progress)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written, held_out = scene.written, scene.held_out
    size = written.cameras.image_size
    grid = (size[0] // PATCH, size[1] // PATCH)

    with _progress(2 + 2 * len(written) + len(held_out) + len(scene.loop), progress) as step:
        step("fit the codec")
        codec = PatchCodec.fit(written.images, _CHANNELS, PATCH).to(target)
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
            **compare_with_point_cloud(cache, written, held_out.cameras[0].to(target), grid, step),
        }

        comparisons = []
        for i in range(len(held_out)):
            step("compare")
            comparisons.append(compare(cache, codec, held_out[[i]], grid))
        if not any(comparison.mask.any() for comparison in comparisons):
            raise ValueError(f"{scene.name}: held-out views see nothing of the written ones; are the poses right?")
        report |= pool(comparisons)

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
        sheet = draw_sheet(scene, report, comparisons, [(i, loop_frame(i)) for i in strip])
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

    replace_text(out / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def _check_device(device: str) -> torch.device:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device cuda is not available: torch {torch.__version__} sees no GPU")
    return torch.device(device)


@contextmanager
def _progress(steps: int, show: bool) -> Iterator[Callable[[str], None]]:
    """Show a bar over so many steps: a function to call with the name of each when it begins."""
    with import_extra("tqdm", "demo").tqdm(total=steps, disable=not show, leave=False) as bar:

        def step(name: str) -> None:
            bar.set_description_str(name)
            bar.update()

        yield step

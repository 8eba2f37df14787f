"""`MirageSession`: one scene being generated, chunk by chunk, with its memory.

A step reads the memory at the chunk's cameras, denoises, decodes, estimates depth, filters what moves, and writes the
new tokens back. It happens whole or not at all: until its last act nothing but scratch has changed, so a step that
fails can be tried again, and a run on disk can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mirage_kernels import Cameras, LatentCache, Readout
from mirage_kernels.cache import CacheMark, WriteReport
from mirage_kernels.io import replace_file

from ..media import join_videos, save_video
from ..models.latent_depth import LatentDepth
from ..models.vae import StreamingDecoder
from ..perception.depth import DepthEstimator, GivenDepth
from ..perception.depth_alignment import align_depth
from ..perception.static_filter import ChunkViews, StaticFilter
from .chunks import CHUNK_FRAMES, STRIDE, Chunk, check_num_frames, plan_chunks
from .conditioning import choose_references, show_rays
from .pixel_memory import read_pixels, write_pixels
from .run_store import CACHE, DECODER, SEGMENT, RunStore

if TYPE_CHECKING:
    from .pipeline import MiragePipeline

VIDEO, METRICS_LINES = "video.mp4", "metrics.jsonl"


@dataclass(frozen=True)
class Settings:
    """What stays the same for every chunk of a session; :meth:`MiragePipeline.start` says what each is."""

    height: int
    width: int
    num_inference_steps: int
    sigmas: tuple[float, ...] | None
    guidance_scale: float
    memory_scale: float
    splat: str
    max_reference_frames: int
    reference_threshold: float
    reference_voxel_size: float
    preceding_frames: int
    decode: str
    fps: float
    points: str = "latents"


@dataclass(frozen=True)
class Prompt:
    """Text embeddings (1, L, D) in the transformer's dtype; `negative` is None without guidance."""

    positive: Tensor
    negative: Tensor | None


@dataclass(frozen=True)
class DepthSources:
    """`given` is the user's own depth, `estimator` gives what that does not hold. At least one is not None."""

    given: GivenDepth | None
    estimator: DepthEstimator | LatentDepth | None

    def source(self, numbers: list[int]) -> DepthEstimator | LatentDepth:
        """Who gives the depth of these frames of the video."""
        if self.given is not None and (self.estimator is None or max(numbers) < self.given.num_frames):
            return self.given
        assert self.estimator is not None
        return self.estimator

    def check(self, numbers: list[int]) -> None:
        """
        Raises:
            ValueError: nobody gives the depth of these frames.
        """
        if self.estimator is None and (self.given is None or max(numbers) >= self.given.num_frames):
            held = 0 if self.given is None else self.given.num_frames
            raise ValueError(
                f"depth is given of {held} frames, frame {max(numbers)} is needed, and there is nobody to ask: pass"
                ' depth=(N, H, W) for all, or depth_estimator="depth-anything-v2" or another, or load a pipeline with'
                " latent_depth"
            )


@dataclass(frozen=True)
class MirageChunk:
    """What a step made. Tensors are on the device where the pipeline computes.

    Attributes:
        index: of the chunk, from 0.
        start, stop: its new pixel frames are [start, stop) of the video.
        frames: (N, 3, H, W) float32 in [0, 1], the new pixel frames; None with `decode="end"`.
        latents: (F, C, h, w) float32, its new latent frames, normalised.
        cameras: of the F latent frames, image size (H, W).
        view: what the memory showed at these cameras before the chunk.
        depth: (F, H', W') float32, world units, as written.
        static: (F, H', W') bool, what the static filter kept.
        metrics: figures of the chunk, plain JSON values; `tokens` and `cache_bytes` are of the memory after it,
            `written` is what became of the chunk's tokens, see :class:`~mirage_kernels.cache.WriteReport`.
    """

    index: int
    start: int
    stop: int
    frames: Tensor | None
    latents: Tensor
    cameras: Cameras
    view: Readout
    depth: Tensor
    static: Tensor
    metrics: dict[str, Any]


@dataclass(frozen=True)
class _Seed:
    """Frame 0: its camera, and its latent (1, C, h, w)."""

    camera: Cameras
    latent: Tensor


class MirageSession:
    """A scene in the making: :meth:`step` generates its next chunk. Made by :meth:`MiragePipeline.start`.

    Attributes:
        cache: the memory. Read it, save it, pass it to the next session.
    """

    def __init__(
        self,
        pipeline: MiragePipeline,
        image: Tensor,
        image_size: tuple[int, int],
        prompt: Prompt,
        settings: Settings,
        cache: LatentCache,
        depth: DepthSources,
        static_filter: StaticFilter,
        generator: torch.Generator,
        store: RunStore,
        callbacks: dict[str, Any],
    ) -> None:
        self.cache = cache
        self._pipeline = pipeline
        self._image = image  # (1, 3, H, W) in [-1, 1], resized to the frames' size
        self._given_image_size = image_size
        self._prompt = prompt
        self._settings = settings
        self._depth = depth
        self._static_filter = static_filter
        self._generator = generator
        self._store = store
        self._callbacks = callbacks
        self._decoder = StreamingDecoder(pipeline.vae)
        self._seeded_with: _Seed | None = None
        self._mark: CacheMark | None = None  # of the memory, before what a step under way writes
        if store.chunks:
            self.cache = LatentCache.load(store.newest(CACHE), device=cache.device)
            store.load_random(generator)
            if settings.decode == "chunk":
                self._decoder.load(store.newest(DECODER))

    # What it is.

    @property
    def num_frames(self) -> int:
        """Pixel frames generated so far."""
        return self._store.chunks[-1].stop if self._store.chunks else 0

    @property
    def num_chunks(self) -> int:
        """Chunks generated so far."""
        return len(self._store.chunks)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the frames."""
        return self._settings.height, self._settings.width

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of the latents."""
        ratio = self._pipeline.vae_scale_factor_spatial
        return self._settings.height // ratio, self._settings.width // ratio

    # What it does.

    def __enter__(self) -> MirageSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others use `run_dir`; the session can then only be looked at. Also at the end of a `with` block."""
        self._store.close()

    @torch.no_grad()
    def seed(self, camera: Cameras) -> Tensor:
        """Write the image into the memory, as seen by `camera`. The first :meth:`step` does it if nobody has.

        Args:
            camera: one view of the image's aspect. The world's axes and unit are whatever it is given in.

        Returns:
            (H', W') float32, the image's depth in world units, 0 or NaN where unknown.

        Raises:
            ValueError: no such camera, or the image is in the memory already.
        """
        if self._seeded_with is not None or self.num_chunks:
            raise ValueError("the image is in the memory already: seed() comes once, before the first step")
        camera = self._fit(camera)
        if len(camera) != 1:
            raise ValueError(f"camera must be one view, got {len(camera)}")
        latent = self._pipeline.encode_image(self._image)[0].movedim(1, 0)
        frames = (self._image * 0.5 + 0.5).clamp(0, 1)
        depth, confidence, _ = self._estimate_depth([0], frames, latent, camera, None)
        static = self._find_static((1,), frames, depth, confidence, camera)
        kept = latent
        if self._settings.points == "latents":
            kept = self._pipeline.encode_still(self._image)[0].movedim(1, 0)
        self._write(kept, frames, depth, camera, static)
        self._seeded_with = _Seed(camera, latent)
        return depth[0]

    @torch.no_grad()
    def step(self, cameras: Cameras) -> MirageChunk | None:
        """Generate the next chunk.

        Args:
            cameras: one per new frame: 4 n + 1 in the first step, the image's own camera first (n >= 1); 4 n later.
                33 and 32 is what the model is made for.

        Returns:
            :class:`MirageChunk`; None where a callback set `pipe.interrupt`: nothing of the chunk is kept then.

        Raises:
            ValueError: cameras of another number or aspect, or what a depth estimator or filter gave is unusable.
            Whatever is raised, the session and its run on disk are as before, and the step can be tried again; only an
            interrupt that comes when the chunk is on disk already leaves it counted.
        """
        self._pipeline.interrupt = False
        return self._step(cameras)

    def _step(self, cameras: Cameras) -> MirageChunk | None:
        cameras = self._fit(cameras)
        chunk = self._next_chunk(len(cameras))
        new_views = cameras[[frame - chunk.start for frame in chunk.keyframes]]
        self._depth.check(chunk.keyframes)
        if chunk.index == 0 and self._seeded_with is not None and not _same(self._seeded.camera, cameras[0]):
            raise ValueError("cameras[0] must be the camera that seed() was given, got another")
        seeded, self._mark = self._seeded_with, None
        random, decoder = self._generator.get_state(), self._decoder.snapshot()
        made = None
        try:
            if chunk.index == 0 and self._seeded_with is None:
                self._mark_memory()
                self.seed(cameras[0])
            made = self._generate(chunk, cameras, new_views)
        finally:
            # Whatever has happened: the chunk is there and counts, or nothing of it is.
            if not self._store.count_chunk(chunk, new_views):
                self._generator.set_state(random)
                self._decoder.restore(decoder)
                if self._mark is not None:
                    self.cache.rollback(self._mark)
                self._seeded_with = seeded
            self._mark = None
        return made

    @torch.no_grad()
    def run(self, cameras: Cameras, chunk_frames: int = CHUNK_FRAMES) -> Iterator[MirageChunk]:
        """Generate a video along `cameras`, chunk by chunk, but for the chunks that a resumed run has already.

        Args:
            cameras: one per frame, 4 n + 1 of them.
            chunk_frames: 4 n + 1, frames per chunk, the shared one included.

        Raises:
            ValueError: other numbers, or the run so far went along other cameras or was cut otherwise.
        """
        plan = plan_chunks(len(cameras), chunk_frames)
        self._check_same_run(plan, self._fit(cameras))
        for chunk in plan[self.num_chunks :]:
            made = None if self._pipeline.interrupt else self._step(cameras[chunk.start : chunk.stop])
            if made is None:
                return
            yield made

    def latents(self) -> Tensor:
        """(1, C, F, h, w) float32 on the CPU: all latent frames so far, normalised."""
        return self._store.latents(list(range(self._store.num_latents))).movedim(0, 1)[None]

    @torch.no_grad()
    def decode(self) -> Iterator[Tensor]:
        """Frames (N, 3, H, W) float32 in [0, 1] of each chunk so far, decoded from the latents on the spot."""
        decoder = StreamingDecoder(self._pipeline.vae)
        for chunk in self._store.chunks:
            yield self._decode(decoder, self._store.latents(chunk.latents))

    def finish(self, frames: Iterable[Tensor] | None = None) -> Path:
        """Write video.mp4, metrics.jsonl and cache.safetensors into the run's folder.

        Args:
            frames: what :meth:`decode` gives, where the caller has it already.

        Returns:
            The video's path.

        Raises:
            ValueError: the session has no `run_dir`, or no chunk yet.
        """
        if not self._store.keeps_all or not self.num_chunks:
            raise ValueError("finish() needs a session with a run_dir and at least one chunk")
        folder, segments = self._store.folder, self._store.segments()
        if self._settings.decode == "end" or not all(segment.exists() for segment in segments):
            for segment, piece in zip(segments, self.decode() if frames is None else frames, strict=True):
                save_video(segment, piece, self._settings.fps)
        join_videos(folder / VIDEO, segments)
        lines = "".join(json.dumps(self._store.metrics(index)) + "\n" for index in range(self.num_chunks))

        def write_lines(draft: str) -> None:
            Path(draft).write_text(lines, encoding="utf-8")

        replace_file(folder / METRICS_LINES, write_lines)
        self.cache.save(folder / CACHE)
        return folder / VIDEO

    # How a chunk is made.

    def _generate(self, chunk: Chunk, new_cameras: Cameras, new_views: Cameras) -> MirageChunk | None:
        """The chunk, on disk and in the memory; None when interrupted.

        `new_cameras` are of its new pixel frames, `new_views` of its new latent frames.
        """
        settings, store = self._settings, self._store
        seconds: dict[str, float] = {}
        # The first target is there already: the image, or the last latent frame of the chunk before.
        shared = 1 if chunk.index else 0
        targets = Cameras.cat([self._past()[-1], new_views]) if shared else new_views
        last = store.num_latents - 1
        preceding = list(range(max(last - settings.preceding_frames, 0), last)) if shared else []

        with self._timed(seconds, "read"):
            if settings.points == "pixels":
                every = Cameras.cat([targets[0], new_cameras]) if shared else new_cameras
                view = read_pixels(self.cache, self._pipeline.vae, every)
            else:
                view = self.cache.read(targets, size=self.latent_size, splat=settings.splat)
            adapter = self._pipeline.memory_adapter
            if adapter is not None and adapter.config.control == "rays":
                every = Cameras.cat([targets, self._past()[preceding]]) if preceding else targets
                readout, visible = show_rays(every, self.latent_size, view.latents.shape[1])
            else:
                readout = self._with_preceding(view.latents, preceding, "readout")
                visible = self._with_preceding(view.mask, preceding, "visible")
            references, overlaps = self._choose_references(targets)
        with self._timed(seconds, "denoise"):
            latents = self._pipeline.denoise(
                first_latent=store.latents([last]) if shared else self._seeded.latent,
                num_latents=len(targets),
                prompt=self._prompt,
                references=store.latents(references) if references else None,
                preceding=store.latents(preceding) if preceding else None,
                readout=readout,
                visible=visible,
                settings=settings,
                generator=self._generator,
                **self._callbacks,
            )
        if latents is None:
            return None
        latents = latents[shared:]
        view = Readout(*(part[shared:] for part in view))
        frames = None
        if settings.decode == "chunk":
            with self._timed(seconds, "decode"):
                frames = self._decode(self._decoder, latents)
        with self._timed(seconds, "depth"):
            depth, confidence, alignment = self._estimate_depth(chunk.keyframes, frames, latents, new_views, view)
        with self._timed(seconds, "filter"):
            static = self._find_static(chunk.frames_per_latent, frames, depth, confidence, new_views)
        metrics = {
            "chunk": chunk.index,
            "frames": [chunk.start, chunk.stop],
            "coverage": view.mask.float().mean().item(),
            "references": references,
            "overlaps": overlaps,
            "preceding": preceding,
            "static": static.float().mean().item(),
            **alignment,
        }
        made = MirageChunk(
            chunk.index, chunk.start, chunk.stop, frames, latents, new_views, view, depth, static, metrics
        )
        self._commit(chunk, made, seconds)
        return made

    def _commit(self, chunk: Chunk, made: MirageChunk, seconds: dict[str, float]) -> None:
        """Write the chunk's tokens and save it; what is done when it fails half-way, :meth:`step` undoes."""
        store, metrics, began = self._store, made.metrics, time.perf_counter()
        with store.new_chunk(chunk, made.latents, made.view.latents, made.view.mask, made.cameras) as draft:
            if store.keeps_all:
                if made.frames is not None:
                    save_video(draft / SEGMENT, made.frames, self._settings.fps)
                    self._decoder.save(draft / DECODER)
                    metrics["frames_sha256"] = _digest(made.frames)
                store.save_random(draft, self._generator)
            first = 1 if chunk.index == 0 else 0  # frame 0 was written by seed()
            self._mark_memory()
            with self._timed(seconds, "write"):
                keyframes = None
                if made.frames is not None:
                    keyframes = made.frames[[frame - chunk.start for frame in chunk.keyframes[first:]]]
                report = self._write(
                    made.latents[first:], keyframes, made.depth[first:], made.cameras[first:], made.static[first:]
                )
            metrics |= {
                "written": report.as_dict(),
                "tokens": len(self.cache),
                "cache_bytes": self.cache.nbytes,
                "peak_host_bytes": _peak_host_bytes(),
            }
            if self.cache.device.type == "cuda":
                metrics["peak_device_bytes"] = torch.cuda.max_memory_allocated(self.cache.device)
            if store.keeps_all:
                self.cache.save(draft / CACHE)
            metrics["seconds"] = seconds | {"save": time.perf_counter() - began - seconds["write"]}
            store.finish_chunk(chunk, draft, metrics)

    def _write(
        self, latents: Tensor, frames: Tensor | None, depth: Tensor, cameras: Cameras, static: Tensor
    ) -> WriteReport:
        """Latents into the memory, or the frames (F, 3, H, W) that they are."""
        device = self.cache.device
        if self._settings.points == "pixels":
            assert frames is not None  # start() has seen to it
            return write_pixels(self.cache, frames, depth.to(device), cameras, static.to(device))
        return self.cache.write(latents.to(device), depth.to(device), cameras, static.to(device))

    def _mark_memory(self) -> None:
        """Before the first write of a step, and no sooner: a mark may hold a copy of the memory."""
        if self._mark is None:
            self._mark = self.cache.checkpoint()

    # The parts of it.

    @property
    def _seeded(self) -> _Seed:
        assert self._seeded_with is not None  # step() has seen to it
        return self._seeded_with

    def _past(self) -> Cameras:
        """Of the latent frames written so far: at first, of the image alone."""
        written = [cameras.to(self.cache.device) for cameras in self._store.cameras]
        return Cameras.cat(written or [self._seeded.camera])

    def _choose_references(self, targets: Cameras) -> tuple[list[int], list[float]]:
        """Latent frames that see most of what the targets see, best first, and their overlaps (IoU of voxel sets)."""
        settings = self._settings
        if not self.num_chunks:
            return [], []
        return choose_references(
            self.cache,
            self._past(),
            targets,
            self.latent_size,
            settings.max_reference_frames,
            settings.reference_threshold,
            settings.reference_voxel_size,
        )

    def _with_preceding(self, shown: Tensor, preceding: list[int], name: str) -> Tensor:
        """What the memory shows at the targets, and after it what it showed at the preceding frames."""
        if not preceding:
            return shown
        return torch.cat([shown, self._store.latents(preceding, name).to(shown.device)])

    def _decode(self, decoder: StreamingDecoder, latents: Tensor) -> Tensor:
        """(N, 3, H, W) float32 in [0, 1] of the next (F, C, h, w) latents."""
        pieces = decoder.iterate(latents.movedim(0, 1)[None])
        return torch.cat([(piece[0].movedim(1, 0).float() * 0.5 + 0.5).clamp(0, 1) for piece in pieces])

    def _estimate_depth(
        self, numbers: list[int], frames: Tensor | None, latents: Tensor, cameras: Cameras, view: Readout | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Depth (F, H', W') of these frames of the video, its confidence where there is one, and how it was aligned.

        `frames` (N, 3, H, W) are all pixel frames up to the last of `numbers`, `latents` (F, C, h, w) theirs.
        """
        source = self._depth.source(numbers)
        if isinstance(source, LatentDepth):
            output = source.predict(latents, cameras, view)
            return output.depth, output.confidence, {}
        if isinstance(source, GivenDepth):  # of the image's own aspect, which the frames' size may have rounded
            return source(None, cameras.resized(self._given_image_size), numbers), None, {}
        keyframes = None if frames is None else frames[[number - numbers[-1] - 1 for number in numbers]]
        depth = source(keyframes, cameras, numbers)  # type: ignore[arg-type]  # None only where it needs none
        if not isinstance(depth, Tensor) or depth.ndim != 3 or len(depth) != len(numbers):
            got = tuple(depth.shape) if isinstance(depth, Tensor) else type(depth).__name__
            raise ValueError(f"depth from {type(source).__name__} must be ({len(numbers)}, H, W) float, got {got}")
        depth = depth.to(cameras.device, torch.float32)
        if source.alignment == "none" or view is None:
            return depth, None, {}
        aligned = align_depth(depth, view.depth, view.mask, source.alignment)
        report = {"depth_scale": aligned.scale.tolist(), "depth_shift": aligned.shift.tolist()}
        return aligned.depth, None, report | {"depth_fit": list(aligned.source)}

    def _find_static(
        self,
        frames_per_latent: tuple[int, ...],
        frames: Tensor | None,
        depth: Tensor,
        confidence: Tensor | None,
        cameras: Cameras,
    ) -> Tensor:
        """(F, H', W') bool for depth of that shape."""
        views = ChunkViews(
            frames=frames,
            frames_per_latent=frames_per_latent,
            depth=depth,
            cameras=cameras,
            cache=self.cache,
            past=self._past() if self.num_chunks or self._seeded_with else None,
            latent_size=self.latent_size,
            confidence=confidence,
        )
        static = self._static_filter(views)
        if static.shape != depth.shape or static.dtype != torch.bool:
            got = f"{tuple(static.shape)} {str(static.dtype).removeprefix('torch.')}"
            name = type(self._static_filter).__name__
            raise ValueError(f"mask from {name} must be {tuple(depth.shape)} bool like depth, got {got}")
        return static

    # Checks.

    def _fit(self, cameras: Cameras) -> Cameras:
        """Cameras of the image's aspect, for frames of this session's size."""
        self._pipeline.check_cameras(cameras, self._given_image_size)
        return cameras.resized(self.image_size).to(self.cache.device)

    def _next_chunk(self, count: int) -> Chunk:
        if self.num_chunks == 0:
            check_num_frames("the number of cameras of a first step", count)
        elif count < STRIDE or count % STRIDE:
            raise ValueError(f"cameras of a later step must be 4 n new ones (4, 8, 12, ..), got {count}")
        return Chunk(self.num_chunks, self.num_frames, self.num_frames + count)

    def _check_same_run(self, plan: list[Chunk], cameras: Cameras) -> None:
        done = self._store.chunks
        if done != plan[: len(done)]:
            was, would = (", ".join(f"{c.start}-{c.stop - 1}" for c in chunks) for chunks in (done, plan))
            raise ValueError(f"num_frames and chunk_frames must continue the run's chunks, {was}, got {would}")
        if done and not _same(cameras[[frame for chunk in done for frame in chunk.keyframes]], self._past()):
            raise ValueError("cameras must be those of the run so far, got others")

    @contextmanager
    def _timed(self, seconds: dict[str, float], part: str) -> Iterator[None]:
        """Wall-clock time of a block, the device's work included."""
        began = time.perf_counter()
        yield
        if self.cache.device.type == "cuda":
            torch.cuda.synchronize(self.cache.device)
        seconds[part] = time.perf_counter() - began


def _same(left: Cameras, right: Cameras) -> bool:
    return torch.equal(left.cam2world, right.cam2world) and torch.equal(left.intrinsics, right.intrinsics)


def _peak_host_bytes() -> int:
    """Most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _digest(frames: Tensor) -> str:
    """SHA-256 of the frames as 8-bit pixels: equal runs have equal ones."""
    digest = hashlib.sha256()
    for frame in frames:
        digest.update((frame * 255.0).round().to(torch.uint8).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

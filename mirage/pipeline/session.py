"""`MirageSession`: one scene being generated, chunk by chunk, with its memory.

A step is atomic: until its last act nothing but scratch has changed, so a step that fails can be tried again, and a run
on disk can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mirage_kernels import CacheMark, Cameras, LatentCache
from mirage_kernels.io import replace_text

from ..files.checked import DamagedFileError
from ..media import join_videos, save_video
from ..models.vae import StreamingDecoder, encode_frames, encode_static_frame
from .checks import fit_cameras
from .chunk_folder import CACHE, DECODER, SEGMENT
from .chunks import CHUNK_FRAMES, TEMPORAL_COMPRESSION, Chunk, check_num_frames, plan_chunks
from .replay import replay
from .results import FIRST_FRAME, check_finite, check_first_write, describe_chunk
from .run_store import METRICS_LINES as METRICS_LINES
from .run_store import VIDEO as VIDEO
from .run_store import RunStore
from .state import ChunkState, FirstFrame, MirageChunk
from .steps import ChunkSteps, decode_frames

logger = logging.getLogger(__name__)


class MirageSession:
    """A scene in the making: :meth:`step` generates its next chunk.

    Made by :meth:`~mirage.pipeline.pipeline.MiragePipeline.start_session`.

    Args:
        steps: how a chunk is made, and with what.
        image: (1, 3, H, W) float32 in [-1, 1], of the frames' size.
        generator: of the noise.
        store: of the run. What it holds already, the session continues.

    Raises:
        ValueError: the run in `store` cannot be continued with these.
    """

    def __init__(self, steps: ChunkSteps, image: Tensor, generator: torch.Generator, store: RunStore) -> None:
        self._steps = steps
        self._config = steps.config
        self._denoiser = steps.denoiser
        self._image = image
        self._generator = generator
        self._store = store
        self._mark: CacheMark | None = None  # of the memory, before what a step under way writes
        if store.chunks and store.has_state:
            self._load_newest()
        elif store.chunks:
            logger.warning("%s: memory and decoder are made again from the latents of the chunks", store.folder)
            with torch.no_grad():
                replay(steps, store, generator, self._write_first_frame, self._begin)

    def _load_newest(self) -> None:
        """Take memory, generator and decoder from the run's newest chunk."""
        steps, store, memory = self._steps, self._store, self._config.memory
        steps.cache = LatentCache.load(store.newest(CACHE), device=steps.cache.device)
        if memory.kind != "none" and steps.cache.write_policy != memory.write_policy:
            raise ValueError(
                f'memory must have write_policy "{steps.cache.write_policy}" like the run, got "{memory.write_policy}"'
            )
        store.load_random(self._generator)
        if self._config.decode == "chunk":
            steps.decoder.load(store.newest(DECODER))

    # What it is.

    @property
    def cache(self) -> LatentCache:
        """The memory. Read it, save it, pass it to the next session."""
        return self._steps.cache

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
        return self._config.height, self._config.width

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of the latents."""
        return self._steps.latent_size

    # What it does.

    def __enter__(self) -> MirageSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others use `run_dir`; the session can then only be looked at. Also at the end of a `with` block."""
        self._store.close()

    @torch.no_grad()
    def write_first_frame(self, camera: Cameras) -> Tensor:
        """Write the image into the memory, as seen by `camera`. The first :meth:`step` does it otherwise.

        Args:
            camera: one view of the image's aspect, or of exactly the frames' size. The world's axes and unit are
                whatever it is given in.

        Returns:
            (H', W') float32, the image's depth in world units, 0 or NaN where unknown.

        Raises:
            ValueError: no such camera, the image is in the memory already, or nothing of it could be remembered. The
            session is as before then.
        """
        if self._steps.first_frame is not None or self.num_chunks:
            raise ValueError(
                "the image is in the memory already: write_first_frame() comes once, before the first step"
            )
        camera = self._fit(camera)
        if len(camera) != 1:
            raise ValueError(f"camera must be one view, got {len(camera)}")
        self._mark_memory()
        try:
            return self._write_first_frame(camera)
        except BaseException:
            assert self._mark is not None
            self.cache.rollback(self._mark)
            raise
        finally:
            self._mark = None

    def _write_first_frame(self, camera: Cameras) -> Tensor:
        """Write the image into the memory, as seen by a camera of the frames; return its depth (H', W')."""
        steps = self._steps
        latent = encode_frames(steps.vae, self._image[:, :, None]).to(self._denoiser.device)[0].movedim(1, 0)
        check_finite(latent, "the VAE's encoder", "latents", FIRST_FRAME)
        frames = (self._image * 0.5 + 0.5).clamp(0, 1)
        depth, confidence, _ = steps.depth_of([0], frames, latent, camera, None)
        static = steps.static_of((1,), frames, depth, confidence, camera)
        kept = latent
        if self._config.memory.kind != "pixel":
            kept = encode_static_frame(steps.vae, self._image).to(self._denoiser.device)[0].movedim(1, 0)
            check_finite(kept, "the VAE's encoder", "latents", FIRST_FRAME)
        report = steps.write(kept, frames, depth, camera, static)
        if self._config.memory.kind != "none":
            check_first_write(report)
        steps.first_frame = FirstFrame(camera, latent)
        return depth[0]

    @torch.no_grad()
    def step(self, cameras: Cameras) -> MirageChunk | None:
        """Generate the next chunk.

        Args:
            cameras: one per new frame: 4 n + 1 in the first step, the image's own camera first (n >= 1); 4 n later.
                33 and 32 is what the model is made for.

        Returns:
            :class:`~mirage.pipeline.state.MirageChunk`; None where a callback set `pipe.interrupt`: nothing of the
            chunk is kept then.

        Raises:
            ValueError: cameras of another number or aspect, or what a model, estimator or filter gave cannot be used:
            not finite, of another shape, or unknown everywhere.
            Whatever is raised, the session and its run on disk are as before, and the step can be tried again; only an
            interrupt that comes when the chunk is on disk already leaves it counted.
        """
        self._denoiser.pipeline.interrupt = False
        return self._step(cameras)

    @torch.no_grad()
    def run(self, cameras: Cameras, chunk_frames: int = CHUNK_FRAMES) -> Iterator[MirageChunk]:
        """Generate a video along `cameras`, chunk by chunk, except the chunks that a resumed run has already.

        Args:
            cameras: one per frame, 4 n + 1 of them.
            chunk_frames: 4 n + 1, frames per chunk, the shared one included.

        Raises:
            ValueError: other numbers, or the run so far went along other cameras or was cut otherwise.
        """
        plan = plan_chunks(len(cameras), chunk_frames)
        self._check_same_run(plan, self._fit(cameras))
        for chunk in plan[self.num_chunks :]:
            made = None if self._denoiser.pipeline.interrupt else self._step(cameras[chunk.start : chunk.stop])
            if made is None:
                return
            yield made

    def latents(self) -> Tensor:
        """Return all latent frames so far, (1, C, F, h, w) float32 on the CPU, normalised."""
        return self._store.latents(list(range(self._store.num_latents))).movedim(0, 1)[None]

    @torch.no_grad()
    def decode(self) -> Iterator[Tensor]:
        """Decode the latents of each chunk so far to frames (N, 3, H, W) float32 in [0, 1], one chunk at a time.

        Raises:
            ValueError: the VAE gives frames that are not finite.
        """
        decoder = StreamingDecoder(self._steps.vae)
        for chunk in self._store.chunks:
            frames = decode_frames(decoder, self._store.latents(chunk.latents))
            then = "its latents are kept, and can be decoded again with a repaired VAE"
            check_finite(frames, "the VAE's decoder", "frames", describe_chunk(chunk), then)
            yield frames

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
        store = self._store
        store.settle()
        self._restore_segments(frames)
        join_videos(store.folder / VIDEO, [folder.path / SEGMENT for folder in store.folders])
        lines = "".join(json.dumps(store.metrics(index)) + "\n" for index in range(self.num_chunks))
        replace_text(store.folder / METRICS_LINES, lines)
        self.cache.save(store.folder / CACHE)
        return store.folder / VIDEO

    def _restore_segments(self, frames: Iterable[Tensor] | None) -> None:
        """Make the chunks' videos that are not there or damaged, from the latents."""
        missing = []
        for index, folder in enumerate(self._store.folders):
            try:
                if self._config.decode == "chunk":
                    folder.check_segment()
                    continue
            except DamagedFileError as error:
                logger.warning("%s: it is made again from the latents", error)
            missing.append(index)
        if missing:
            pieces = self.decode() if frames is None else frames
            for index, (folder, piece) in enumerate(zip(self._store.folders, pieces, strict=True)):
                if index in missing:
                    save_video(folder.path / SEGMENT, piece, self._config.fps)
                    folder.record_segment()

    # How a chunk is made.

    def _generate(self, state: ChunkState) -> MirageChunk | None:
        """Make one chunk and save it; None when interrupted."""
        steps = self._steps
        with self._timed(state, "read"):
            steps.read_memory(state)
            steps.select_references(state)
        with self._timed(state, "denoise"):
            steps.denoise(state)
        if state.latents is None:
            return None
        if self._config.decode == "chunk":
            with self._timed(state, "decode"):
                steps.decode(state)
        with self._timed(state, "depth"):
            steps.estimate_depth(state)
        with self._timed(state, "filter"):
            steps.filter_dynamic(state)
        self._mark_memory()
        with self._timed(state, "write"):
            steps.write_memory(state)
        return self._save(state)

    def _step(self, cameras: Cameras) -> MirageChunk | None:
        """Generate the next chunk, or leave everything as it was."""
        steps, store = self._steps, self._store
        cameras = self._fit(cameras)
        chunk = self._next_chunk(len(cameras))
        new_views = cameras[[frame - chunk.start for frame in chunk.keyframes]]
        steps.depth.check(chunk.keyframes)
        store.settle()
        first_frame, self._mark = steps.first_frame, None
        if chunk.index == 0 and first_frame is not None and not _same(first_frame.camera, cameras[0]):
            raise ValueError("cameras[0] must be the camera that write_first_frame() was given, got another")
        random, decoder = self._generator.get_state(), steps.decoder.snapshot()
        made = None
        try:
            if chunk.index == 0 and first_frame is None:
                self._mark_memory()
                self._write_first_frame(cameras[0])
            made = self._generate(self._begin(chunk, cameras, new_views))
        finally:
            # Whatever has happened: the chunk is there and counts, or nothing of it is.
            if not store.count_chunk(chunk, new_views):
                self._generator.set_state(random)
                steps.decoder.restore(decoder)
                if self._mark is not None:
                    self.cache.rollback(self._mark)
                steps.first_frame = first_frame
            self._mark = None
        return made

    def _begin(self, chunk: Chunk, new_cameras: Cameras, new_views: Cameras) -> ChunkState:
        """Return the state that a chunk's steps start from."""
        if not chunk.index:
            return ChunkState(chunk, new_cameras, new_views, new_views, [])
        # The first target is there already: the last latent frame of the chunk before.
        last = self._store.num_latents - 1
        preceding = list(range(max(last - self._config.preceding_frames, 0), last))
        targets = Cameras.cat([self._steps.past()[-1], new_views])
        return ChunkState(chunk, new_cameras, new_views, targets, preceding)

    def _save(self, state: ChunkState) -> MirageChunk:
        """Save a chunk that is in the memory; what is done when it fails half-way, :meth:`_step` undoes."""
        store, chunk, began = self._store, state.chunk, time.perf_counter()
        assert state.latents is not None and state.readout is not None and state.written is not None
        assert state.depth is not None and state.static is not None
        metrics = {
            "chunk": chunk.index,
            "frames": [chunk.start, chunk.stop],
            "coverage": state.readout.mask.float().mean().item(),
            "references": state.references,
            "overlaps": state.overlaps,
            "preceding": state.preceding,
            "static": state.static.float().mean().item(),
            **state.alignment,
        }
        readout = state.readout
        with store.new_chunk(chunk, state.latents, readout.latents, readout.mask, state.cameras) as folder:
            draft = folder.path
            if store.keeps_all:
                if state.frames is not None:
                    save_video(draft / SEGMENT, state.frames, self._config.fps)
                    self._steps.decoder.save(draft / DECODER)
                    metrics["frames_sha256"] = _digest(state.frames)
                folder.save_random(self._generator)
            metrics |= {
                "written": state.written.as_dict(),
                "tokens": len(self.cache),
                "cache_bytes": self.cache.nbytes,
                "peak_host_bytes": _peak_host_bytes(),
            }
            if self.cache.device.type == "cuda":
                metrics["peak_device_bytes"] = torch.cuda.max_memory_allocated(self.cache.device)
            if store.keeps_all:
                self.cache.save(draft / CACHE)
            metrics["seconds"] = state.seconds | {"save": time.perf_counter() - began}
            store.finish_chunk(chunk, folder, metrics)
        return MirageChunk(
            index=chunk.index,
            start=chunk.start,
            stop=chunk.stop,
            frames=state.frames,
            latents=state.latents,
            cameras=state.cameras,
            readout=readout,
            depth=state.depth,
            static=state.static,
            metrics=metrics,
        )

    def _mark_memory(self) -> None:
        """Mark the memory before the first write of a step, and no sooner: a mark may hold a copy of it."""
        if self._mark is None:
            self._mark = self.cache.checkpoint()

    @contextmanager
    def _timed(self, state: ChunkState, part: str) -> Iterator[None]:
        """Measure the wall-clock time of a block, the device's work included."""
        began = time.perf_counter()
        yield
        if self.cache.device.type == "cuda":
            torch.cuda.synchronize(self.cache.device)
        state.seconds[part] = time.perf_counter() - began

    # Checks.

    def _fit(self, cameras: Cameras) -> Cameras:
        """Return the cameras of this session's frames, out of those of the image."""
        return fit_cameras(cameras, self._steps.framing).to(self.cache.device)

    def _next_chunk(self, count: int) -> Chunk:
        if self.num_chunks == 0:
            check_num_frames("the number of cameras of a first step", count)
        elif count < TEMPORAL_COMPRESSION or count % TEMPORAL_COMPRESSION:
            raise ValueError(f"cameras of a later step must be 4 n new ones (4, 8, 12, ..), got {count}")
        return Chunk(self.num_chunks, self.num_frames, self.num_frames + count)

    def _check_same_run(self, plan: list[Chunk], cameras: Cameras) -> None:
        done = self._store.chunks
        if done != plan[: len(done)]:
            was, would = (", ".join(f"{c.start}-{c.stop - 1}" for c in chunks) for chunks in (done, plan))
            raise ValueError(f"num_frames and chunk_frames must continue the run's chunks, {was}, got {would}")
        if done and not _same(cameras[[frame for chunk in done for frame in chunk.keyframes]], self._steps.past()):
            raise ValueError("cameras must be those of the run so far, got others")


def _same(left: Cameras, right: Cameras) -> bool:
    return torch.equal(left.cam2world, right.cam2world) and torch.equal(left.intrinsics, right.intrinsics)


def _peak_host_bytes() -> int | None:
    """Return the most memory that this process has held so far; None where the system does not say, as on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _digest(frames: Tensor) -> str:
    """Return the SHA-256 of the frames as 8-bit pixels: equal runs have equal ones."""
    digest = hashlib.sha256()
    for frame in frames:
        digest.update((frame * 255.0).round().to(torch.uint8).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

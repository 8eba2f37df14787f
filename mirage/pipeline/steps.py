"""`ChunkSteps`: how a chunk is made, as seven steps over one :class:`~mirage.pipeline.state.ChunkState`.

In order: read_memory, select_references, denoise, decode, estimate_depth, filter_dynamic, write_memory. Until the last
one the memory is as it was; what a step has done to decoder and generator, the session undoes when a later one fails.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.utils import logging
from torch import Tensor

from mirage_kernels import Cameras, LatentCache, Readout, WriteReport

from ..files.framing import Framing
from ..models.latent_depth import LatentDepth
from ..models.vae import StreamingDecoder
from ..perception.depth import GivenDepth
from ..perception.depth_alignment import align_depth
from ..perception.static_filter import ChunkViews, StaticFilter
from .conditioning import choose_references, show_rays
from .denoise import ChunkDenoiser
from .pixel_memory import read_pixels, write_pixels
from .results import FIRST_FRAME, check_finite, check_known, describe_chunk, is_known
from .run_store import RunStore
from .state import ChunkState, DepthSources, FirstFrame, SessionConfig

logger = logging.get_logger(__name__)


class ChunkSteps:
    """The steps of one session's chunks, and what they work on.

    Args:
        config: of the session.
        cache: the memory.
        denoiser: makes target latents.
        vae: encodes a memory of pixels, decodes latents.
        depth: where depth comes from.
        framing: how the given image becomes frames.
        static_filter: says what belongs in the memory.
        store: holds the latents, readouts and cameras of the chunks so far.

    Attributes:
        decoder: decodes the video piece by piece.
        first_frame: frame 0, once it is in the memory.
    """

    def __init__(
        self,
        config: SessionConfig,
        cache: LatentCache,
        denoiser: ChunkDenoiser,
        vae: AutoencoderKLWan,
        depth: DepthSources,
        framing: Framing,
        static_filter: StaticFilter,
        store: RunStore,
    ) -> None:
        self.config = config
        self.cache = cache
        self.denoiser = denoiser
        self.vae = vae
        self.depth = depth
        self.framing = framing
        self.static_filter = static_filter
        self.store = store
        self.decoder = StreamingDecoder(vae)
        self.first_frame: FirstFrame | None = None

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of the latents."""
        ratio = self.vae.config.scale_factor_spatial
        return self.config.height // ratio, self.config.width // ratio

    def past(self) -> Cameras:
        """Return the cameras of the latent frames written so far: at first, of the image alone."""
        written = [cameras.to(self.cache.device) for cameras in self.store.cameras]
        if not written:
            assert self.first_frame is not None  # a step writes it before anything else
            return self.first_frame.camera
        return Cameras.cat(written)

    # The seven steps.

    def read_memory(self, state: ChunkState) -> None:
        """Read what the memory shows at the target's cameras, and what of it the model is shown."""
        targets, preceding = state.targets, state.preceding
        if self.config.memory.kind == "pixel":
            every = Cameras.cat([targets[0], state.new_cameras]) if state.num_shared else state.new_cameras
            readout = read_pixels(self.cache, self.vae, every)
        else:
            readout = self.cache.read(targets, size=self.latent_size, splat=self.config.memory.readout)
        state.readout = Readout(*(part[state.num_shared :] for part in readout))
        if self.denoiser.is_shown_rays:
            every = Cameras.cat([targets, self.past()[preceding]]) if preceding else targets
            state.shown = show_rays(every, self.latent_size, readout.latents.shape[1])
        else:
            state.shown = (
                self._with_preceding(readout.latents, preceding, "readout"),
                self._with_preceding(readout.mask, preceding, "visible"),
            )

    def select_references(self, state: ChunkState) -> None:
        """Choose earlier latent frames that see most of what the targets will see."""
        if state.chunk.index:
            state.references, state.overlaps = choose_references(
                self.cache,
                self.past(),
                state.targets,
                self.latent_size,
                self.config.max_reference_frames,
                self.config.reference_threshold,
                self.config.reference_voxel_size,
            )

    def denoise(self, state: ChunkState) -> None:
        """Generate the new latent frames; they stay None where a callback interrupts."""
        assert state.shown is not None
        store = self.store
        latents = self.denoiser(
            first_latent=self._first_latent(state),
            num_latents=len(state.targets),
            references=store.latents(state.references) if state.references else None,
            preceding=store.latents(state.preceding) if state.preceding else None,
            readout=state.shown[0],
            visible=state.shown[1],
            start=state.chunk.latent_start - state.num_shared,
            where=describe_chunk(state.chunk),
        )
        state.shown = None
        state.latents = None if latents is None else latents[state.num_shared :]

    def skip_denoising(self, state: ChunkState) -> None:
        """Draw what :meth:`denoise` draws, and leave it at that."""
        start = state.chunk.latent_start - state.num_shared
        self.denoiser.draw(self._first_latent(state), len(state.targets), start)
        state.shown = None

    def _first_latent(self, state: ChunkState) -> Tensor:
        """Return the target's first frame (1, C, h, w), which is there already."""
        if state.num_shared:
            return self.store.latents([self.store.num_latents - 1])
        assert self.first_frame is not None
        return self.first_frame.latent

    def decode(self, state: ChunkState) -> None:
        """Decode the new latent frames, where frames are wanted before the end."""
        assert state.latents is not None
        if self.config.decode == "chunk":
            state.frames = decode_frames(self.decoder, state.latents)
            check_finite(state.frames, "the VAE's decoder", "frames", describe_chunk(state.chunk))

    def estimate_depth(self, state: ChunkState) -> None:
        """Estimate depth at the new latent frames, and align it with the memory's."""
        assert state.latents is not None
        state.depth, state.confidence, state.alignment = self.depth_of(
            state.chunk.keyframes,
            state.frames,
            state.latents,
            state.cameras,
            state.readout,
            where=describe_chunk(state.chunk),
        )

    def filter_dynamic(self, state: ChunkState) -> None:
        """Keep what moves, and what the filter rejects otherwise, out of the memory."""
        assert state.depth is not None
        state.static = self.static_of(
            state.chunk.frames_per_latent,
            state.frames,
            state.depth,
            state.confidence,
            state.cameras,
            where=describe_chunk(state.chunk),
        )

    def write_memory(self, state: ChunkState) -> None:
        """Write the new tokens; frame 0 is in the memory already."""
        assert state.latents is not None and state.depth is not None and state.static is not None
        first = 1 if state.chunk.index == 0 else 0
        keyframes = None
        if state.frames is not None:
            keyframes = state.frames[[frame - state.chunk.start for frame in state.chunk.keyframes[first:]]]
        state.written = self.write(
            state.latents[first:], keyframes, state.depth[first:], state.cameras[first:], state.static[first:]
        )

    # What the first frame goes through too.

    def depth_of(
        self,
        numbers: list[int],
        frames: Tensor | None,
        latents: Tensor,
        cameras: Cameras,
        readout: Readout | None,
        where: str = FIRST_FRAME,
    ) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Estimate the depth of these frames of the video.

        Args:
            numbers: of F frames of the video.
            frames: (N, 3, H, W), all pixel frames up to the last of `numbers`; None where they are not decoded.
            latents: (F, C, h, w), theirs.
            cameras: of the F frames.
            readout: what the memory shows of them; None where it is empty.
            where: how messages call the frames.

        Returns:
            Depth (F, H', W') float32; its confidence, or None where there is none; how it was aligned.

        Raises:
            ValueError: an estimator gives another shape, or depth that is known nowhere.
        """
        source = self.depth.source(numbers)
        name = type(source).__name__
        if isinstance(source, LatentDepth):
            output = source.predict(latents, cameras, readout)
            check_finite(output.depth, name, "depth", where)
            check_finite(output.confidence, name, "confidence of depth", where)
            return output.depth, output.confidence, {}
        if isinstance(source, GivenDepth):
            given = source(None, cameras, numbers)
            if self.config.memory.kind != "none" and not is_known(given):
                logger.warning("the given depth of %s is unknown everywhere: nothing of it is remembered", where)
            return given, None, {}
        keyframes = None if frames is None else frames[[number - numbers[-1] - 1 for number in numbers]]
        depth = source(keyframes, cameras, numbers)  # type: ignore[arg-type]  # None only where it needs none
        if not isinstance(depth, Tensor) or depth.ndim != 3 or len(depth) != len(numbers):
            got = tuple(depth.shape) if isinstance(depth, Tensor) else type(depth).__name__
            raise ValueError(f"depth from {name} must be ({len(numbers)}, H, W) float, got {got}")
        depth = depth.to(cameras.device, torch.float32)
        if not getattr(source, "marks_sky", False):
            check_known(depth, name, where)
        elif not is_known(depth):
            logger.warning("%s knows no depth in %s, as of sky: nothing of it is remembered", name, where)
        if source.alignment == "none" or readout is None:
            return depth, None, {}
        aligned = align_depth(depth, readout.depth, readout.mask, source.alignment)
        report = {"depth_scale": aligned.scale.tolist(), "depth_shift": aligned.shift.tolist()}
        return aligned.depth, None, report | {"depth_fit": list(aligned.source)}

    def static_of(
        self,
        frames_per_latent: tuple[int, ...],
        frames: Tensor | None,
        depth: Tensor,
        confidence: Tensor | None,
        cameras: Cameras,
        where: str = FIRST_FRAME,
    ) -> Tensor:
        """Ask the static filter what belongs in the memory, (F, H', W') bool for depth of that shape.

        Raises:
            ValueError: the filter gives another shape or dtype.
        """
        if self.config.memory.kind == "none":
            return torch.zeros_like(depth, dtype=torch.bool)
        views = ChunkViews(
            frames=frames,
            frames_per_latent=frames_per_latent,
            depth=depth,
            cameras=cameras,
            cache=self.cache,
            past=self.past() if self.store.chunks or self.first_frame else None,
            latent_size=self.latent_size,
            confidence=confidence,
        )
        static = self.static_filter(views)
        name = type(self.static_filter).__name__
        if not isinstance(static, Tensor) or static.shape != depth.shape or static.dtype != torch.bool:
            got = type(static).__name__
            if isinstance(static, Tensor):
                got = f"{tuple(static.shape)} {str(static.dtype).removeprefix('torch.')}"
            raise ValueError(f"mask from {name} must be {tuple(depth.shape)} bool like depth, got {got}")
        if not bool(static.any()):
            logger.warning("%s finds nothing static in %s: nothing of it is remembered", name, where)
        return static

    def write(
        self, latents: Tensor, frames: Tensor | None, depth: Tensor, cameras: Cameras, static: Tensor
    ) -> WriteReport:
        """Write latents (F, C, h, w) into the memory, or the frames (F, 3, H, W) that they are."""
        device = self.cache.device
        if self.config.memory.kind == "pixel":
            assert frames is not None  # start_session() has seen to it
            return write_pixels(self.cache, frames, depth.to(device), cameras, static.to(device))
        return self.cache.write(latents.to(device), depth.to(device), cameras, static.to(device))

    def _with_preceding(self, shown: Tensor, preceding: list[int], name: str) -> Tensor:
        """Return what the memory shows at the targets, and after it what it showed at the preceding frames."""
        if not preceding:
            return shown
        return torch.cat([shown, self.store.latents(preceding, name).to(shown.device)])


def decode_frames(decoder: StreamingDecoder, latents: Tensor) -> Tensor:
    """Decode the next (F, C, h, w) latents to frames (N, 3, H, W) float32 in [0, 1]."""
    pieces = decoder.iterate(latents.movedim(0, 1)[None])
    return torch.cat([(piece[0].movedim(1, 0).float() * 0.5 + 0.5).clamp(0, 1) for piece in pieces])

"""The data that a session and the steps of a chunk share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mirage_kernels import Cameras, Readout, WriteReport

from ..models.latent_depth import LatentDepth
from ..perception.depth import DepthEstimator, GivenDepth
from .chunks import Chunk
from .memory import MemoryConfig


@dataclass(frozen=True)
class SessionConfig:
    """What stays the same for every chunk of a session.

    :meth:`~mirage.pipeline.pipeline.MiragePipeline.__call__` says what each is. A run records all of them, by these
    names.
    """

    height: int
    width: int
    num_inference_steps: int
    sigmas: tuple[float, ...] | None
    guidance_scale: float
    memory_scale: float
    memory: MemoryConfig
    max_reference_frames: int
    reference_threshold: float
    reference_voxel_size: float | None
    preceding_frames: int
    decode: str
    fps: float
    attention_kwargs: dict[str, Any] | None = None


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
        """Return what gives the depth of these frames of the video."""
        if self.given is not None and (self.estimator is None or max(numbers) < self.given.num_frames):
            return self.given
        assert self.estimator is not None
        return self.estimator

    def check(self, numbers: list[int]) -> None:
        """Check that the depth of these frames can be had.

        Raises:
            ValueError: it is neither given nor is there an estimator.
        """
        if self.estimator is None and (self.given is None or max(numbers) >= self.given.num_frames):
            held = 0 if self.given is None else self.given.num_frames
            raise ValueError(
                f"depth is given of {held} frames, frame {max(numbers)} is needed, and there is nobody to ask: pass"
                ' depth=(N, H, W) for all, or depth_estimator="depth-anything-v2" or another, or load a pipeline with'
                " latent_depth"
            )


@dataclass(frozen=True)
class FirstFrame:
    """The image as frame 0 of the video: its camera, and its latent (1, C, h, w)."""

    camera: Cameras
    latent: Tensor


@dataclass
class ChunkState:
    """A chunk in the making: every step of :class:`~mirage.pipeline.steps.ChunkSteps` reads and fills it.

    F are the chunk's new latent frames, T the target's: one more where the chunk shares its first with the chunk
    before. P are preceding frames.

    Attributes:
        chunk: its place in the video.
        new_cameras: of its new pixel frames.
        cameras: of its F new latent frames.
        targets: of the T target frames.
        preceding: latent frames before the target that the model sees too.
        readout: what the memory shows of the F frames; depth is aligned with it.
        shown: what the model sees of the memory, (T + P, C, h, w) latents and (T + P, h, w) bool visibility.
        references: latent frames that see most of what the targets see, best first.
        overlaps: theirs with the targets, IoU of voxel sets.
        latents: (F, C, h, w) float32; None where a callback has interrupted the denoising.
        frames: (N, 3, H, W) float32 in [0, 1], the new pixel frames; None where they are decoded at the end.
        depth: (F, H', W') float32, world units.
        confidence: of that shape; None where the source of depth gives none.
        alignment: how depth was aligned with the memory's, plain JSON values.
        static: (F, H', W') bool, what belongs in the memory.
        written: what became of the tokens.
        seconds: wall-clock time of each part.
    """

    chunk: Chunk
    new_cameras: Cameras
    cameras: Cameras
    targets: Cameras
    preceding: list[int]
    readout: Readout | None = None
    shown: tuple[Tensor, Tensor] | None = None
    references: list[int] = field(default_factory=list)
    overlaps: list[float] = field(default_factory=list)
    latents: Tensor | None = None
    frames: Tensor | None = None
    depth: Tensor | None = None
    confidence: Tensor | None = None
    alignment: dict[str, Any] = field(default_factory=dict)
    static: Tensor | None = None
    written: WriteReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def num_shared(self) -> int:
        """1 where the target's first frame is the last one of the chunk before, 0 in the first chunk."""
        return 1 if self.chunk.index else 0


@dataclass(frozen=True)
class MirageChunk:
    """A finished chunk. Tensors are on the device where the pipeline computes.

    Attributes:
        index: of the chunk, from 0.
        start, stop: its new pixel frames are [start, stop) of the video.
        frames: (N, 3, H, W) float32 in [0, 1], the new pixel frames; None with `decode="end"`.
        latents: (F, C, h, w) float32, its new latent frames, normalised.
        cameras: of the F latent frames, image size (H, W).
        readout: what the memory showed at these cameras before the chunk.
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
    readout: Readout
    depth: Tensor
    static: Tensor
    metrics: dict[str, Any]

"""How a video is cut into chunks, and which pixel frames a latent frame stands for.

Latent frame t of a video stands for pixel frames 4t-3..4t (the first one for frame 0 alone): its pose and depth are
those of frame 4t. A chunk generates its new latent frames behind one that it shares with the chunk before.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..models import TEMPORAL_COMPRESSION as TEMPORAL_COMPRESSION

CHUNK_FRAMES = 33
"""Frames the model makes at a time, the shared one included: 9 latent frames."""


@dataclass(frozen=True)
class Chunk:
    """Pixel frames [start, stop) of a video are new in this chunk; `index` counts chunks from 0."""

    index: int
    start: int
    stop: int

    @property
    def latent_start(self) -> int:
        """First new latent frame."""
        return latent_count(self.start) if self.start else 0

    @property
    def num_latents(self) -> int:
        """New latent frames."""
        return latent_count(self.stop) - self.latent_start

    @property
    def latents(self) -> list[int]:
        """The new latent frames, from 0 in the whole video."""
        return list(range(self.latent_start, self.latent_start + self.num_latents))

    @property
    def frames_per_latent(self) -> tuple[int, ...]:
        """Pixel frames of each new latent frame: (1, 4, 4, ...) in the first chunk, (4, 4, ...) later."""
        return tuple(1 if self.start == 0 and i == 0 else TEMPORAL_COMPRESSION for i in range(self.num_latents))

    @property
    def keyframes(self) -> list[int]:
        """The pixel frame of each new latent frame whose pose and depth stand for it, from 0 in the whole video."""
        return [TEMPORAL_COMPRESSION * latent for latent in self.latents]


def latent_count(num_frames: int) -> int:
    """Count the latent frames of a video of `num_frames` = 4 n + 1 frames."""
    return (num_frames - 1) // TEMPORAL_COMPRESSION + 1


def check_num_frames(name: str, num_frames: int) -> None:
    """Check that a number of frames is 4 n + 1.

    Raises:
        ValueError: not 4 n + 1 with n >= 1; the message says which are nearest.
    """
    if isinstance(num_frames, bool) or not isinstance(num_frames, int):
        raise ValueError(f"{name} must be an int, got {num_frames!r}")
    if num_frames < TEMPORAL_COMPRESSION + 1 or num_frames % TEMPORAL_COMPRESSION != 1:
        below = max((num_frames - 1) // TEMPORAL_COMPRESSION, 1) * TEMPORAL_COMPRESSION + 1
        nearest = f"{below}" if num_frames < below else f"{below} or {below + TEMPORAL_COMPRESSION}"
        raise ValueError(f"{name} must be 4 n + 1 (5, 9, 13, ..), got {num_frames}; nearest: {nearest}")


def plan_chunks(num_frames: int, chunk_frames: int = CHUNK_FRAMES) -> list[Chunk]:
    """Cut a video into chunks: the first makes `chunk_frames` new frames, every other one fewer by the shared one.

    Args:
        num_frames, chunk_frames: 4 n + 1 with n >= 1.

    Raises:
        ValueError: they are not.
    """
    check_num_frames("num_frames", num_frames)
    check_num_frames("chunk_frames", chunk_frames)
    stops = [*range(chunk_frames, num_frames, chunk_frames - 1), num_frames]
    return [Chunk(i, start, stop) for i, (start, stop) in enumerate(zip([0, *stops], stops, strict=False))]

"""What a memory shows of a clip, made while training by the kernels.

Other frames of the clip are written with depth and poses that are a little wrong, tokens are missing, and the chunk's
cameras read what is left. So the model learns to be robust against what a memory gets wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from mirage_kernels import Cameras, LatentCache, Readout

from ..models.vae import StreamingDecoder, encode_static_frame
from ..pipeline.conditioning import choose_references, show_rays
from ..pipeline.memory import MEMORIES
from ..pipeline.pixel_memory import between, make_pixel_cache, read_pixels, write_pixels
from .config import TrainConfig
from .data import Clip
from .models import HALF, Models
from .randomness import draw_below, draw_patches, happens, perturb_cameras
from .seeds import derive_seed


@dataclass(frozen=True)
class ChunkReadouts:
    """What a memory shows at the T target and P preceding frames of one clip, and which frames may be references."""

    target: Readout
    preceding: Readout
    references: list[int]

    def trimmed(self, preceding: int, references: int) -> ChunkReadouts:
        """Keep the last preceding frames, so many, and the best references, at most so many."""
        first = len(self.preceding.mask) - preceding
        return ChunkReadouts(
            self.target, Readout(*(part[first:] for part in self.preceding)), self.references[:references]
        )

    def without_memory(self) -> ChunkReadouts:
        """Empty the readouts; references stay."""
        nothing = [
            Readout(*(torch.full_like(part, -1 if name == "index" else 0) for name, part in readout._asdict().items()))
            for readout in (self.target, self.preceding)
        ]
        return ChunkReadouts(nothing[0], nothing[1], self.references)


class LatentMemory:
    """Remember a clip's latent frames, the first as its static latent. All of it is kept: what is written is a draw."""

    def __init__(self, latents: Tensor, static_latent: Tensor, splat: str) -> None:
        self.latents, self.splat = torch.cat([static_latent[None], latents[1:]]), splat
        self.cache = LatentCache(latents.shape[1], device=latents.device, write_policy="append")

    def write(self, frames: list[int], depth: Tensor, cameras: Cameras, static: Tensor) -> None:
        """Write frames of the clip, with depth, cameras and mask of their tokens."""
        self.cache.write(self.latents[frames], depth, cameras, static)

    def read(self, cameras: Cameras, begin: int, start: int, stop: int, size: tuple[int, int]) -> Readout:
        """Read at latent frames [start, stop) of the clip with these F cameras, in a chunk that begins at `begin`."""
        return self.cache.read(cameras[start:stop], size, splat=self.splat)


class PixelMemory:
    """Remember a clip's keyframes (F, 3, H, W) in [0, 1], encoded in half precision where the run has one."""

    def __init__(
        self, keyframes: Tensor, vae: AutoencoderKLWan, device: torch.device, half: torch.dtype | None
    ) -> None:
        self.keyframes, self.vae, self.half, self.cache = keyframes, vae, half, make_pixel_cache(device)

    def write(self, frames: list[int], depth: Tensor, cameras: Cameras, static: Tensor) -> None:
        """Write frames of the clip, with depth, cameras and mask of their tokens."""
        write_pixels(self.cache, self.keyframes[frames], depth, cameras, static)

    def read(self, cameras: Cameras, begin: int, start: int, stop: int, size: tuple[int, int]) -> Readout:
        """Read as :meth:`LatentMemory.read` does; the chunk's images are encoded as one video."""
        if start == stop:
            return LatentCache(self.vae.config.z_dim, device=self.cache.device).read(cameras[:0], size)
        with autocast(self.cache.device, self.half):
            readout = read_pixels(self.cache, self.vae, between(cameras[begin:stop]))
        return Readout(*(part[start - begin :] for part in readout))


class ReadoutMaker:
    """Make readouts of clips. Every draw is a function of the generator that is given, or of seed, clip and number."""

    def __init__(self, config: TrainConfig, models: Models, device: torch.device) -> None:
        self.seed, self.config = config.seed, config.objective
        self.models, self.device = models, device
        self._half = HALF.get(config.mixed_precision)
        self._keeps_keyframes = config.data.cache
        self._keyframes_of: dict[tuple[str, float], Tensor] = {}
        self._readouts: dict[tuple[str, float, int], ChunkReadouts] = {}

    def start_of(self, clip: Clip, number: int, last: int) -> int:
        """Return the latent frame in [1, last] at which the chunk of a clip's readout begins, one that is kept."""
        return 1 + draw_below(torch.Generator().manual_seed(derive_seed(self.seed, "place", clip.name, number)), last)

    def make_once(self, clip: Clip, latents: Tensor, start: int, length: int, number: int) -> ChunkReadouts:
        """Make a clip's readout of this number, or return it, with all references and preceding frames there may be."""
        key = clip.name, latents.double().sum().item(), number  # clips of two sources may be of one name
        if key not in self._readouts:
            rng = torch.Generator().manual_seed(derive_seed(self.seed, "read-out", clip.name, number))
            preceding = min(self.config.preceding_frames, start)
            self._readouts[key] = self.make(rng, clip, latents, start, length, preceding, self.config.max_references)
        return self._readouts[key]

    def make(
        self,
        rng: torch.Generator,
        clip: Clip,
        latents: Tensor,
        start: int,
        length: int,
        preceding: int,
        references: int,
    ) -> ChunkReadouts:
        """Write a memory as generation would have it at this chunk, and read it.

        It holds the frames up to the chunk's first, or some of them; at times frames that come after the chunk, which
        see the same places from elsewhere. What it shows at the preceding frames is from before they were made.

        Args:
            rng: of every draw.
            latents: (F, C, h, w) of the clip.
            start, length: latent frames of the chunk.
            preceding: latent frames before it that the model is given.
            references: at most so many.
        """
        config, cameras = self.config, clip.cameras.to(self.device)
        size = (int(latents.shape[2]), int(latents.shape[3]))
        targets, ahead = cameras[start : start + length], cameras[start - preceding : start]
        empty = LatentCache(latents.shape[1], device=self.device)
        nothing = [empty.read(views, size) for views in (targets, ahead)]
        if config.memory == "none":
            adapter = self.models.memory_adapter
            if adapter is not None and adapter.config.control == "rays":
                rays, _ = show_rays(Cameras.cat([targets, ahead]), size, latents.shape[1])
                nothing = [nothing[0]._replace(latents=rays[:length]), nothing[1]._replace(latents=rays[length:])]
            return ChunkReadouts(nothing[0], nothing[1], [])
        memory = self.new_memory(clip, latents)
        kept = 0.3 + 0.7 * float(torch.rand((), generator=rng))
        others = list(range(start))
        if happens(rng, 0.5):
            others += range(start + length, latents.shape[0])
        others = [frame for frame in others if happens(rng, kept)]
        before = [frame for frame in others if frame <= max(start - length + 1, 0)]
        since = [frame for frame in others if frame not in before]
        self._write(rng, memory, clip, before)
        at_preceding = memory.read(cameras, max(start - preceding - 1, 0), start - preceding, start, size)
        self._write(rng, memory, clip, [*since, start])
        at_target = memory.read(cameras, start, start, start + length, size)
        past = [*before, *since, start]
        chosen, _ = choose_references(
            memory.cache,
            cameras[past],
            targets,
            size,
            references,
            config.reference_threshold,
            config.reference_voxel_size,
        )
        return ChunkReadouts(at_target, at_preceding, [past[i] for i in chosen])

    def new_memory(self, clip: Clip, latents: Tensor) -> LatentMemory | PixelMemory:
        """Make the memory of a clip, empty."""
        if self.config.memory == "pixel":
            return PixelMemory(self._keyframes(clip, latents), self.models.vae, self.device, self._half)
        return LatentMemory(latents, self._static_latent(clip), MEMORIES[self.config.memory].readout)

    def _keyframes(self, clip: Clip, latents: Tensor) -> Tensor:
        """Decode a clip's keyframes as generation would have them, (F, 3, H, W) in [0, 1]."""
        key = clip.name, latents.double().sum().item()  # clips of two sources may be of one name
        known = self._keyframes_of.get(key)
        if known is None:
            with autocast(self.device, self._half):
                pieces = StreamingDecoder(self.models.vae).iterate(latents.movedim(0, 1)[None])
                keyframes = torch.cat([piece[:, :, -1] for piece in pieces]).float() * 0.5 + 0.5
            known = (keyframes.clamp(0, 1) * 255.0).round().byte().cpu()
            if self._keeps_keyframes:
                self._keyframes_of[key] = known
        return known.to(self.device) / 255.0

    def _write(self, rng: torch.Generator, memory: LatentMemory | PixelMemory, clip: Clip, frames: list[int]) -> None:
        """Write frames with depth and poses that are a little wrong, and without some of their tokens."""
        if not frames:
            return
        config = self.config
        count, (rows, columns) = len(frames), clip.depth.shape[1:]
        drift = torch.randn(count, 1, 1, generator=rng) + draw_patches(rng, torch.randn, count, rows, columns)
        depth = clip.depth[frames] * (config.depth_noise * drift).exp()
        missing = config.drop_tokens * float(torch.rand((), generator=rng))
        present = draw_patches(rng, torch.rand, count, rows, columns) >= missing
        cameras = perturb_cameras(rng, clip.cameras[frames], config.pose_noise)
        memory.write(
            frames,
            depth.to(self.device),
            cameras.to(self.device),
            (clip.static[frames] & present).to(self.device),
        )

    def _static_latent(self, clip: Clip) -> Tensor:
        """Return what a memory keeps of a clip's first frame, (C, h, w) float32; its latents have been checked."""
        if clip.static_latent is not None:
            return clip.static_latent.to(self.device)
        assert clip.frames is not None
        return encode_static_frame(self.models.vae, clip.frames[:1].to(self.device) * 2.0 - 1.0)[0, :, 0]


def autocast(device: torch.device, half: torch.dtype | None) -> torch.autocast:
    """Compute in half precision where there is one."""
    return torch.autocast(device.type, half, enabled=half is not None)

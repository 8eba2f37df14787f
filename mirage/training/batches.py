"""Batches to train a diffusion model on: chunks of clips, as generation would have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_kernels import Readout

from ..models.latent_depth import pluecker_rays
from ..models.vae import encode_frames
from ..pipeline.chunks import latent_count
from ..pipeline.conditioning import CleanFrames, make_memory_context, make_scores
from .config import TrainConfig
from .data import Clip, Sample
from .models import Models
from .randomness import draw_below, happens
from .readouts import ChunkReadouts, ReadoutMaker
from .seeds import derive_seed


@dataclass(frozen=True)
class DiffusionBatch:
    """B chunks to denoise; R references, T target and P preceding frames.

    Attributes:
        clean: the frames that are given.
        noisy: (B, C, T, h, w), latents with noise.
        flow: (B, C, T, h, w), noise minus latents: what the model predicts.
        levels: (B, T), noise levels in [0, 1]; that of the first frame, which has no noise, means nothing.
        prompt_embeds: (B, L, D).
        memory_context: (B, control channels, T + P, h, w); None without an adapter.
        depth: what the depth head is given and held to; None without one.
    """

    clean: CleanFrames
    noisy: Tensor
    flow: Tensor
    levels: Tensor
    prompt_embeds: Tensor
    memory_context: Tensor | None
    depth: DepthBatch | None


@dataclass(frozen=True)
class DepthBatch:
    """Arguments of `LatentDepth`, and (B, F, h, w) true depth, 0 where unknown."""

    latents: Tensor
    rays: Tensor
    memory_depth: Tensor
    memory_mask: Tensor
    true: Tensor


class DiffusionBatchMaker:
    """Make chunks of clips, as generation would have them. Every draw is a function of the run's seed and the clip's
    number."""

    def __init__(self, config: TrainConfig, models: Models, device: torch.device) -> None:
        self.seed, self.config = config.seed, config.objective
        self.models, self.device = models, device
        self.has_depth = models.latent_depth is not None
        self.readouts = ReadoutMaker(config, models, device)
        self._vae = models.vae_fingerprint()
        self._scores: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> DiffusionBatch:
        """Make one chunk of each clip.

        Raises:
            ValueError: clips of different size or length.
        """
        config = self.config
        rng = torch.Generator().manual_seed(derive_seed(self.seed, "chunk", samples[0].number))
        clips = [sample.clip for sample in samples]
        latents = [self.latents(clip) for clip in clips]
        shapes = {tuple(one.shape) for one in latents}
        if len(shapes) > 1:
            raise ValueError(f"clips of a batch must be of one shape, got latents {sorted(shapes)}")
        frames = latents[0].shape[0]
        length = latent_count(config.chunk_frames)

        # The first chunk of a video has nothing before it. A batch begins there as a whole, or nowhere there.
        last = frames - length
        starts, numbers = [0] * len(clips), [0] * len(clips)
        if config.first_chunks is None:
            first = draw_below(rng, last + 1) == 0
        else:
            first = last == 0 or happens(rng, config.first_chunks)
        if not first:
            if config.readouts is None:
                starts = [1 + draw_below(rng, last) for _ in clips]
            else:
                numbers = [1 + draw_below(rng, config.readouts) for _ in clips]
                starts = [
                    self.readouts.start_of(clip, number, last) for clip, number in zip(clips, numbers, strict=True)
                ]
        preceding = min(config.preceding_frames, *starts)
        if happens(rng, config.drop_preceding):
            preceding = 0
        references = 1 + draw_below(rng, config.max_references) if config.max_references else 0
        if happens(rng, config.drop_references) or max(starts) == 0:
            references = 0
        readouts = []
        for clip, one, start, number in zip(clips, latents, starts, numbers, strict=True):
            if config.readouts is None:
                readout = self.readouts.make(rng, clip, one, start, length, preceding, references)
            else:
                readout = self.readouts.make_once(clip, one, start, length, number)
                readout = readout.trimmed(preceding, references)
            if config.memory != "none" and happens(rng, config.drop_memory):
                readout = readout.without_memory()
            readouts.append(readout)
        references = min(references, *(len(one.references) for one in readouts))

        def gather(rows: Sequence[Sequence[int]]) -> Tensor:
            """Stack these frames of each clip, (B, C, F, h, w)."""
            return torch.stack([one[list(row)].movedim(0, 1) for one, row in zip(latents, rows, strict=True)])

        target = gather([range(start, start + length) for start in starts])
        clean = CleanFrames(
            first=target[:, :, :1],
            references=gather([one.references[:references] for one in readouts]),
            preceding=gather([range(start - preceding, start) for start in starts]),
        )
        levels = self._levels(rng, len(clips), length)
        noise = torch.randn(target.shape, generator=rng).to(target)
        weight = levels.view(len(clips), 1, length, 1, 1)
        return DiffusionBatch(
            clean=clean,
            noisy=(1.0 - weight) * target + weight * noise,
            flow=noise - target,
            levels=levels,
            prompt_embeds=self._prompts(rng, clips),
            memory_context=self._context(readouts),
            depth=self._depth(rng, clips, target, starts, readouts) if self.has_depth else None,
        )

    def latents(self, clip: Clip) -> Tensor:
        """Return a clip's latents, (F, C, h, w) float32, encoded where it has frames.

        Raises:
            ValueError: latents of another VAE.
        """
        if clip.latents is not None:
            if clip.vae not in (None, self._vae):
                raise ValueError(f"{clip.name}: its latents were encoded by another VAE: prepare the clips again")
            return clip.latents.to(self.device)
        assert clip.frames is not None
        video = clip.frames.movedim(0, 1)[None].to(self.device) * 2.0 - 1.0
        return encode_frames(self.models.vae, video)[0].movedim(1, 0)

    def _levels(self, rng: torch.Generator, batch: int, length: int) -> Tensor:
        """Draw (B, T) levels, uniform before the scheduler's shift: one for a chunk or, at times, for every frame."""
        drawn = torch.rand(batch, length, generator=rng)
        apart = torch.rand(batch, 1, generator=rng) < self.config.independent_noise
        drawn = torch.where(apart, drawn, drawn[:, :1])
        shift = self.config.flow_shift
        return (shift * drawn / (1.0 + (shift - 1.0) * drawn)).to(self.device)

    def _prompts(self, rng: torch.Generator, clips: Sequence[Clip]) -> Tensor:
        embeds = []
        for clip in clips:
            dropped = happens(rng, self.config.drop_prompt)
            if clip.prompt_embeds is None or dropped:
                embeds.append(self.models.text("" if dropped else clip.prompt))
            else:
                padding = self.models.text.length - len(clip.prompt_embeds)
                embeds.append(F.pad(clip.prompt_embeds, (0, 0, 0, padding)))
        return torch.stack([one.float() for one in embeds]).to(self.device)

    def _context(self, readouts: Sequence[ChunkReadouts]) -> Tensor | None:
        adapter = self.models.memory_adapter
        if adapter is None:
            return None
        latents = torch.stack(
            [torch.cat([one.target.latents, one.preceding.latents]).movedim(0, 1) for one in readouts]
        )
        visible = torch.stack([torch.cat([one.target.mask, one.preceding.mask]) for one in readouts])
        scores = None
        if adapter.conditioning == "scores":
            frames, *size = latents.shape[2:]
            known = self._scores.get(tuple(size))
            if known is None or known.shape[2] < frames:
                known = self._scores[tuple(size)] = make_scores(self.models.vae, frames, *size)
            scores = known[:, :, :frames]
        return make_memory_context(latents, visible, scores)

    def _depth(
        self,
        rng: torch.Generator,
        clips: Sequence[Clip],
        target: Tensor,
        starts: Sequence[int],
        readouts: Sequence[ChunkReadouts],
    ) -> DepthBatch:
        """Ask for depth as generation does: of the new frames, or of the image alone, of which nothing is known."""
        length = target.shape[2]
        alone = max(starts) == 0 and happens(rng, 0.5)
        frames = slice(0, 1) if alone else slice(0 if max(starts) == 0 else 1, length)
        shown = [Readout(*(part[frames] for part in one.target)) for one in readouts]
        level = self.config.depth_latent_noise * torch.rand(len(clips), 1, 1, 1, 1, generator=rng).to(target)
        noise = torch.randn(target[:, :, frames].shape, generator=rng).to(target)
        size = (int(target.shape[3]), int(target.shape[4]))
        cameras = [clip.cameras[start : start + length][frames] for clip, start in zip(clips, starts, strict=True)]
        true = [clip.depth[start : start + length][frames] for clip, start in zip(clips, starts, strict=True)]
        masks = torch.stack([readout.mask for readout in shown])
        return DepthBatch(
            latents=(1.0 - level) * target[:, :, frames] + level * noise,
            rays=torch.stack([pluecker_rays(one, size) for one in cameras]).to(self.device),
            memory_depth=torch.stack([readout.depth for readout in shown]),
            memory_mask=masks & (not alone),
            true=torch.stack(true).to(self.device),
        )

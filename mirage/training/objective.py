"""What a step of training is: a chunk of a clip, as generation would make it, and the losses on it.

The memory's read-outs are made here, on the fly, by the kernels: other frames of the clip are written with depth and
poses that are a little wrong, tokens are missing, and the chunk's cameras read what is left. So the model learns to
forgive what a memory gets wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn

from mirage_kernels import Cameras, LatentCache, Readout

from ..models.latent_depth import latent_depth_loss, pluecker_rays
from ..models.vae import StreamingDecoder, encode_frames, encode_still
from ..pipeline.chunks import STRIDE, latent_count
from ..pipeline.conditioning import CleanFrames, choose_references, make_memory_context, make_scores, show_rays
from ..pipeline.memory import SPLATS
from ..pipeline.pixel_memory import between, make_pixel_cache, read_pixels, write_pixels
from .config import ObjectiveConfig, TrainConfig
from .data import Clip, Drawn, mix
from .models import HALF, Models, trained

TIMESTEPS = 1000.0
"""A noise level of 1 as the transformer's time step."""


@dataclass(frozen=True)
class Chunk:
    """B chunks to denoise; R references, T target and P preceding frames.

    Attributes:
        clean: the frames that are given.
        noisy: (B, C, T, h, w), latents with noise.
        flow: (B, C, T, h, w), noise minus latents: what is to be predicted.
        levels: (B, T), noise levels in [0, 1]; of the first frame, which carries none, without meaning.
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
    depth: DepthChunk | None


@dataclass(frozen=True)
class DepthChunk:
    """Arguments of `LatentDepth`, and (B, F, h, w) true depth, 0 where unknown."""

    latents: Tensor
    rays: Tensor
    memory_depth: Tensor
    memory_mask: Tensor
    true: Tensor


@dataclass(frozen=True)
class _Seen:
    """What the memory shows at the T target and P preceding frames of one clip, and which frames may be references."""

    target: Readout
    preceding: Readout
    references: list[int]

    def part(self, preceding: int, references: int) -> _Seen:
        """With so many preceding frames, the last ones, and at most so many references, the best."""
        first = len(self.preceding.mask) - preceding
        return _Seen(self.target, Readout(*(part[first:] for part in self.preceding)), self.references[:references])

    def without_memory(self) -> _Seen:
        """Where nothing is remembered, and frames are references all the same."""
        nothing = [
            Readout(*(torch.full_like(part, -1 if name == "index" else 0) for name, part in view._asdict().items()))
            for view in (self.target, self.preceding)
        ]
        return _Seen(nothing[0], nothing[1], self.references)


class _LatentMemory:
    """Of a clip's latent frames, the first a still one. Everything is kept: chance has thinned out what is written."""

    def __init__(self, latents: Tensor, still: Tensor, splat: str) -> None:
        self.latents, self.splat = torch.cat([still[None], latents[1:]]), splat
        self.cache = LatentCache(latents.shape[1], device=latents.device, write_policy="append")

    def write(self, frames: list[int], depth: Tensor, cameras: Cameras, static: Tensor) -> None:
        self.cache.write(self.latents[frames], depth, cameras, static)

    def read(self, cameras: Cameras, begin: int, start: int, stop: int, size: tuple[int, int]) -> Readout:
        """At latent frames [start, stop) of the clip, whose F cameras these are, in a chunk that begins at `begin`."""
        return self.cache.read(cameras[start:stop], size, splat=self.splat)


class _PixelMemory:
    """Of a clip's pictures (F, 3, H, W), encoded in half precision where the run has one."""

    def __init__(self, pictures: Tensor, vae: AutoencoderKLWan, device: torch.device, half: torch.dtype | None) -> None:
        self.pictures, self.vae, self.half, self.cache = pictures, vae, half, make_pixel_cache(device)

    def write(self, frames: list[int], depth: Tensor, cameras: Cameras, static: Tensor) -> None:
        write_pixels(self.cache, self.pictures[frames], depth, cameras, static)

    def read(self, cameras: Cameras, begin: int, start: int, stop: int, size: tuple[int, int]) -> Readout:
        """As of :class:`_LatentMemory`; the chunk's pictures are encoded as one video."""
        if start == stop:
            return LatentCache(self.vae.config.z_dim, device=self.cache.device).read(cameras[:0], size)
        with _autocast(self.cache.device, self.half):
            view = read_pixels(self.cache, self.vae, between(cameras[begin:stop]))
        return Readout(*(part[start - begin :] for part in view))


class ChunkMaker:
    """Clips to chunks. Every draw of chance is a function of the run's seed and the clip's number."""

    def __init__(self, config: TrainConfig, models: Models, device: torch.device) -> None:
        self.seed, self.config = config.seed, config.objective
        self.models, self.device = models, device
        self.has_depth = models.latent_depth is not None
        self._vae_word = models.vae_word()
        self._scores: dict[tuple[int, ...], Tensor] = {}
        self._keeps_pictures = config.data.cache
        self._half = HALF.get(config.mixed_precision)
        self._pictures_of: dict[tuple[str, float], Tensor] = {}
        self._readouts: dict[tuple[str, float, int], _Seen] = {}

    @torch.no_grad()
    def __call__(self, drawn: Sequence[Drawn]) -> Chunk:
        """One chunk of each clip, together.

        Raises:
            ValueError: clips of different size or length.
        """
        config = self.config
        chance = torch.Generator().manual_seed(mix(self.seed, "chunk", drawn[0].number))
        clips = [draw.clip for draw in drawn]
        latents = [self.latents(clip) for clip in clips]
        shapes = {tuple(one.shape) for one in latents}
        if len(shapes) > 1:
            raise ValueError(f"clips of a batch must be of one shape, got latents {sorted(shapes)}")
        frames = latents[0].shape[0]
        length = latent_count(config.chunk_frames)

        # The first chunk of a video has nothing before it. A batch begins there as a whole, or nowhere there.
        last = frames - length
        starts, kept = [0] * len(clips), [0] * len(clips)
        if config.first_chunks is None:
            first = _below(chance, last + 1) == 0
        else:
            first = last == 0 or _happens(chance, config.first_chunks)
        if not first:
            if config.readouts is None:
                starts = [1 + _below(chance, last) for _ in clips]
            else:
                kept = [1 + _below(chance, config.readouts) for _ in clips]
                starts = [self._place(clip, which, last) for clip, which in zip(clips, kept, strict=True)]
        preceding = min(config.preceding_frames, *starts)
        if _happens(chance, config.drop_preceding):
            preceding = 0
        references = 1 + _below(chance, config.max_references) if config.max_references else 0
        if _happens(chance, config.drop_references) or max(starts) == 0:
            references = 0
        seen = []
        for clip, one, start, which in zip(clips, latents, starts, kept, strict=True):
            if config.readouts is None:
                shown = self._remember(chance, clip, one, start, length, preceding, references)
            else:
                shown = self._remember_once(clip, one, start, length, which).part(preceding, references)
            if config.memory != "none" and _happens(chance, config.drop_memory):
                shown = shown.without_memory()
            seen.append(shown)
        references = min(references, *(len(one.references) for one in seen))

        def gather(rows: Sequence[Sequence[int]]) -> Tensor:
            """(B, C, F, h, w) of these frames of each clip."""
            return torch.stack([one[list(row)].movedim(0, 1) for one, row in zip(latents, rows, strict=True)])

        target = gather([range(start, start + length) for start in starts])
        clean = CleanFrames(
            first=target[:, :, :1],
            references=gather([one.references[:references] for one in seen]),
            preceding=gather([range(start - preceding, start) for start in starts]),
        )
        levels = self._levels(chance, len(clips), length)
        noise = torch.randn(target.shape, generator=chance).to(target)
        share = levels.view(len(clips), 1, length, 1, 1)
        return Chunk(
            clean=clean,
            noisy=(1.0 - share) * target + share * noise,
            flow=noise - target,
            levels=levels,
            prompt_embeds=self._prompts(chance, clips),
            memory_context=self._context(seen),
            depth=self._depth(chance, clips, target, starts, seen) if self.has_depth else None,
        )

    def latents(self, clip: Clip) -> Tensor:
        """(F, C, h, w) float32 of a clip, encoded where it has frames."""
        if clip.latents is not None:
            if clip.vae not in (None, self._vae_word):
                raise ValueError(f"{clip.name}: its latents were encoded by another VAE: prepare the clips anew")
            return clip.latents.to(self.device)
        assert clip.frames is not None
        video = clip.frames.movedim(0, 1)[None].to(self.device) * 2.0 - 1.0
        return encode_frames(self.models.vae, video)[0].movedim(1, 0)

    def _still(self, clip: Clip) -> Tensor:
        """(C, h, w) float32, what a memory keeps of a clip's first frame; its latents have been looked at."""
        if clip.still is not None:
            return clip.still.to(self.device)
        assert clip.frames is not None
        return encode_still(self.models.vae, clip.frames[:1].to(self.device) * 2.0 - 1.0)[0, :, 0]

    def _levels(self, chance: torch.Generator, batch: int, length: int) -> Tensor:
        """(B, T): uniform before the scheduler's shift, alike in a chunk or, at times, drawn for every frame."""
        drawn = torch.rand(batch, length, generator=chance)
        apart = torch.rand(batch, 1, generator=chance) < self.config.independent_noise
        drawn = torch.where(apart, drawn, drawn[:, :1])
        shift = self.config.flow_shift
        return (shift * drawn / (1.0 + (shift - 1.0) * drawn)).to(self.device)

    def _prompts(self, chance: torch.Generator, clips: Sequence[Clip]) -> Tensor:
        embeds = []
        for clip in clips:
            dropped = _happens(chance, self.config.drop_prompt)
            if clip.prompt_embeds is None or dropped:
                embeds.append(self.models.text("" if dropped else clip.prompt))
            else:
                padding = self.models.text.length - len(clip.prompt_embeds)
                embeds.append(F.pad(clip.prompt_embeds, (0, 0, 0, padding)))
        return torch.stack([one.float() for one in embeds]).to(self.device)

    def _place(self, clip: Clip, which: int, last: int) -> int:
        """The latent frame in [1, last] at which the chunk of a clip's read-out begins."""
        return 1 + _below(torch.Generator().manual_seed(mix(self.seed, "place", clip.name, which)), last)

    def _remember_once(self, clip: Clip, latents: Tensor, start: int, length: int, which: int) -> _Seen:
        """A clip's read-out of this number, with all the references and preceding frames that there may be."""
        key = clip.name, latents.double().sum().item(), which  # clips of two sources may be of one name
        if key not in self._readouts:
            chance = torch.Generator().manual_seed(mix(self.seed, "read-out", clip.name, which))
            preceding = min(self.config.preceding_frames, start)
            self._readouts[key] = self._remember(
                chance, clip, latents, start, length, preceding, self.config.max_references
            )
        return self._readouts[key]

    def _remember(
        self,
        chance: torch.Generator,
        clip: Clip,
        latents: Tensor,
        start: int,
        length: int,
        preceding: int,
        references: int,
    ) -> _Seen:
        """Write a memory as generation would have it at this chunk, and read it.

        It holds the frames up to the chunk's first, or some of them; at times frames that come after the chunk, which
        look at the same places from elsewhere. What it showed at the preceding frames is from before they were made.
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
            return _Seen(nothing[0], nothing[1], [])
        memory = self._new_memory(clip, latents)
        kept = 0.3 + 0.7 * float(torch.rand((), generator=chance))
        others = list(range(start))
        if _happens(chance, 0.5):
            others += range(start + length, latents.shape[0])
        others = [frame for frame in others if _happens(chance, kept)]
        before = [frame for frame in others if frame <= max(start - length + 1, 0)]
        since = [frame for frame in others if frame not in before]
        self._write(chance, memory, clip, before)
        at_preceding = memory.read(cameras, max(start - preceding - 1, 0), start - preceding, start, size)
        self._write(chance, memory, clip, [*since, start])
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
        return _Seen(at_target, at_preceding, [past[i] for i in chosen])

    def _new_memory(self, clip: Clip, latents: Tensor) -> _LatentMemory | _PixelMemory:
        if self.config.memory == "pixel":
            return _PixelMemory(self._pictures(clip, latents), self.models.vae, self.device, self._half)
        return _LatentMemory(latents, self._still(clip), SPLATS[self.config.memory])

    def _pictures(self, clip: Clip, latents: Tensor) -> Tensor:
        """(F, 3, H, W) in [0, 1]: the clip's keyframes as generation would have them, decoded."""
        which = clip.name, latents.double().sum().item()  # clips of two sources may be of one name
        known = self._pictures_of.get(which)
        if known is None:
            with _autocast(self.device, self._half):
                pieces = StreamingDecoder(self.models.vae).iterate(latents.movedim(0, 1)[None])
                keyframes = torch.cat([piece[:, :, -1] for piece in pieces]).float() * 0.5 + 0.5
            known = (keyframes.clamp(0, 1) * 255.0).round().byte().cpu()
            if self._keeps_pictures:
                self._pictures_of[which] = known
        return known.to(self.device) / 255.0

    def _write(
        self, chance: torch.Generator, memory: _LatentMemory | _PixelMemory, clip: Clip, frames: list[int]
    ) -> None:
        """Write frames with depth and poses that are a little wrong, and without some of their tokens."""
        if not frames:
            return
        config = self.config
        count, (rows, columns) = len(frames), clip.depth.shape[1:]
        drift = torch.randn(count, 1, 1, generator=chance) + _patches(chance, torch.randn, count, rows, columns)
        depth = clip.depth[frames] * (config.depth_noise * drift).exp()
        missing = config.drop_tokens * float(torch.rand((), generator=chance))
        present = _patches(chance, torch.rand, count, rows, columns) >= missing
        cameras = _shaken(chance, clip.cameras[frames], config.pose_noise)
        memory.write(
            frames,
            depth.to(self.device),
            cameras.to(self.device),
            (clip.static[frames] & present).to(self.device),
        )

    def _context(self, seen: Sequence[_Seen]) -> Tensor | None:
        adapter = self.models.memory_adapter
        if adapter is None:
            return None
        readout = torch.stack([torch.cat([one.target.latents, one.preceding.latents]).movedim(0, 1) for one in seen])
        visible = torch.stack([torch.cat([one.target.mask, one.preceding.mask]) for one in seen])
        scores = None
        if adapter.conditioning == "scores":
            frames, *size = readout.shape[2:]
            known = self._scores.get(tuple(size))
            if known is None or known.shape[2] < frames:
                known = self._scores[tuple(size)] = make_scores(self.models.vae, frames, *size)
            scores = known[:, :, :frames]
        return make_memory_context(readout, visible, scores)

    def _depth(
        self,
        chance: torch.Generator,
        clips: Sequence[Clip],
        target: Tensor,
        starts: Sequence[int],
        seen: Sequence[_Seen],
    ) -> DepthChunk:
        """As generation asks for it: of the new frames, or of the image alone, of which nothing is known."""
        length = target.shape[2]
        alone = max(starts) == 0 and _happens(chance, 0.5)
        frames = slice(0, 1) if alone else slice(0 if max(starts) == 0 else 1, length)
        views = [Readout(*(part[frames] for part in one.target)) for one in seen]
        level = self.config.depth_latent_noise * torch.rand(len(clips), 1, 1, 1, 1, generator=chance).to(target)
        noise = torch.randn(target[:, :, frames].shape, generator=chance).to(target)
        size = (int(target.shape[3]), int(target.shape[4]))
        cameras = [clip.cameras[start : start + length][frames] for clip, start in zip(clips, starts, strict=True)]
        true = [clip.depth[start : start + length][frames] for clip, start in zip(clips, starts, strict=True)]
        masks = torch.stack([view.mask for view in views])
        return DepthChunk(
            latents=(1.0 - level) * target[:, :, frames] + level * noise,
            rays=torch.stack([pluecker_rays(one, size) for one in cameras]).to(self.device),
            memory_depth=torch.stack([view.depth for view in views]),
            memory_mask=masks & (not alone),
            true=torch.stack(true).to(self.device),
        )


class DiffusionObjective(nn.Module):
    """Flow matching on a chunk's target frames, and the depth head's loss. Holds what is trained as submodules."""

    def __init__(self, config: TrainConfig, models: Models) -> None:
        super().__init__()
        self.config: ObjectiveConfig = config.objective
        assert models.transformer is not None
        frozen: dict[str, Any] = {}
        for name in ("transformer", "memory_adapter", "latent_depth"):
            model = getattr(models, name)
            if model is not None and trained(model):
                self.add_module(name, model)
            else:
                frozen[name] = model
        self._frozen = frozen  # a plain dict: neither saved, nor handed to DistributedDataParallel

    def _part(self, name: str) -> Any:
        return self._frozen[name] if name in self._frozen else getattr(self, name)

    def predict(self, chunk: Chunk, with_memory: bool = True) -> Tensor:
        """(B, C, T, h, w), the flow of the target frames."""
        length = chunk.noisy.shape[2]
        adapter = self._part("memory_adapter") if with_memory else None
        clean, levels = (
            chunk.clean,
            F.pad(chunk.levels, (chunk.clean.references.shape[2], chunk.clean.preceding.shape[2])),
        )
        flow = self._part("transformer")(
            hidden_states=clean.around(chunk.noisy),
            timestep=clean.denoised(length) * levels * TIMESTEPS,
            encoder_hidden_states=chunk.prompt_embeds,
            num_reference_frames=clean.references.shape[2],
            memory_adapter=adapter,
            memory_context=None if adapter is None else chunk.memory_context,
            return_dict=False,
        )[0]
        return clean.target(flow, length)

    def forward(self, chunk: Chunk) -> dict[str, Tensor]:
        """`loss`, and its parts."""
        flow = self.predict(chunk)
        losses = {"flow": F.mse_loss(flow[:, :, 1:].float(), chunk.flow[:, :, 1:])}
        loss = losses["flow"]
        if chunk.depth is not None:
            depth = chunk.depth
            output = self._part("latent_depth")(depth.latents, depth.rays, depth.memory_depth, depth.memory_mask)
            losses["depth"] = latent_depth_loss(output, depth.true, depth.true > 0)
            loss = loss + self.config.depth_weight * losses["depth"]
        return {"loss": loss, **losses}


class VideoMaker:
    """Clips to short videos (B, 3, N, H, W) in [-1, 1] and the noise of the posterior, for the VAE."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.seed, self.frames, self.device = config.seed, config.vae.frames, device

    def __call__(self, drawn: Sequence[Drawn]) -> tuple[Tensor, int]:
        chance = torch.Generator().manual_seed(mix(self.seed, "video", drawn[0].number))
        videos = []
        for draw in drawn:
            if draw.clip.frames is None:
                raise ValueError(f"{draw.clip.name}: the VAE is trained on frames, and this clip has latents")
            begin = _below(chance, len(draw.clip.frames) - self.frames + 1)
            videos.append(draw.clip.frames[begin : begin + self.frames].movedim(0, 1))
        return torch.stack(videos).to(self.device) * 2.0 - 1.0, mix(self.seed, "posterior", drawn[0].number)


class VaeObjective(nn.Module):
    """Absolute and squared error of the reconstruction, and a little divergence from a standard normal.

    In some of the steps the latents are moved by a part of a token before they are decoded, by bilinear interpolation,
    and the pictures by as many pixels: what a memory does that is read from another place than it was written at. A
    decoder and latents that agree with it are also easier to generate (EQ-VAE, arXiv 2502.09509, which scales and turns
    them). And where it is asked for, latents are drawn towards those of a camera that stands still: what a memory shows
    was seen in another motion than it is read in.
    """

    def __init__(self, config: TrainConfig, models: Models) -> None:
        super().__init__()
        self.vae, self.kl_weight, self.shifted = models.vae, config.vae.kl_weight, config.vae.shifted
        self.steady = config.vae.steady
        if config.vae.frames == 1:
            _convolve_pictures(self.vae)

    def forward(self, videos: tuple[Tensor, int]) -> dict[str, Tensor]:
        """`loss`, and its parts; `psnr` in dB of pixels in [0, 1]."""
        video, seed = videos
        chance = torch.Generator().manual_seed(seed)
        posterior = self.vae.encode(video).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=chance)
        latents = posterior.mean + posterior.std * noise.to(posterior.mean)
        if self.shifted and _happens(chance, self.shifted):
            side = video.shape[-1] // latents.shape[-1]
            down, right = _below(chance, side), _below(chance, side)
            latents = between_tokens(latents, down / side, right / side)
            rows, columns = (side * count for count in latents.shape[-2:])
            video = video[..., down : down + rows, right : right + columns]
        again = self.vae.decode(latents).sample.float()
        squared = F.mse_loss(again, video)
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).float().mean()
        loss = F.l1_loss(again, video) + squared + self.kl_weight * divergence
        parts = {"divergence": divergence, "psnr": -10.0 * (0.25 * squared.detach()).log10()}
        if self.steady:
            parts["unsteady"] = self._unsteady(videos[0], posterior.mean)
            loss = loss + self.steady * parts["unsteady"]
        return {"loss": loss, **parts}

    def _unsteady(self, video: Tensor, latents: Tensor) -> Tensor:
        """What the latents of a moving camera have of the motion: their squared distance from those of stills, over
        the variance of these."""
        keyframes = video[:, :, ::STRIDE][:, :, 1:].movedim(2, 1).flatten(0, 1)
        stills = self.vae.encode(keyframes[:, :, None].expand(-1, -1, 1 + STRIDE, -1, -1)).latent_dist.mean[:, :, 1]
        stills = stills.unflatten(0, (len(video), -1)).movedim(1, 2).float()
        return F.mse_loss(latents[:, :, 1:].float(), stills) / stills.detach().var()


def between_tokens(latents: Tensor, down: float, right: float) -> Tensor:
    """(..., h, w) latents at places [0, 1) of a token further down and to the right: (..., h - 1, w - 1), bilinear."""
    upper = torch.lerp(latents[..., :-1, :-1], latents[..., :-1, 1:], right)
    lower = torch.lerp(latents[..., 1:, :-1], latents[..., 1:, 1:], right)
    return torch.lerp(upper, lower, down)


def _convolve_pictures(vae: AutoencoderKLWan) -> None:
    """Have a VAE's causal convolutions of a single picture leave out their taps on the zeros before it, two of three.

    The same sums but for those zeros.
    """

    def convolve(self: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if cache_x is not None or x.shape[2] != 1 or self.stride != (1, 1, 1):
            return type(self).forward(self, x, cache_x)
        columns, _, rows, _, *_ = self._padding
        weight, picture = self.weight[:, :, -1], x[:, :, 0]
        return F.conv2d(picture, weight, self.bias, padding=(rows, columns))[:, :, None]

    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            module.forward = MethodType(convolve, module)  # type: ignore[method-assign]


@torch.no_grad()
def measure_latents(models: Models, clips: Sequence[Clip], device: torch.device) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of the VAE's latents, not normalised."""
    total: Any = 0.0
    squares: Any = 0.0
    count = 0
    for clip in clips:
        assert clip.frames is not None
        video = clip.frames.movedim(0, 1)[None].to(device) * 2.0 - 1.0
        values = models.vae.encode(video.to(models.vae.dtype)).latent_dist.mode()[0].double().flatten(1).cpu()
        total, squares, count = total + values.sum(1), squares + values.square().sum(1), count + values.shape[1]
    mean = total / count
    return mean.tolist(), (squares / count - mean.square()).clamp(min=1e-12).sqrt().tolist()


def _autocast(device: torch.device, half: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, half, enabled=half is not None)


def _below(chance: torch.Generator, count: int) -> int:
    """A whole number in [0, count), 0 for count <= 1."""
    return int(torch.randint(max(count, 1), (), generator=chance))


def _happens(chance: torch.Generator, share: float) -> bool:
    return bool(torch.rand((), generator=chance) < share)


def _patches(chance: torch.Generator, draw: Any, count: int, rows: int, columns: int) -> Tensor:
    """(count, rows, columns) of values that are alike in patches of 2 x 2."""
    coarse = draw(count, (rows + 1) // 2, (columns + 1) // 2, generator=chance)
    return coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :rows, :columns]


def _shaken(chance: torch.Generator, cameras: Cameras, metres: float) -> Cameras:
    """Cameras a little moved and turned."""
    count = len(cameras)
    turn, step = torch.randn(2, count, 3, generator=chance, dtype=torch.float64) * metres
    turn = 0.1 * turn
    skew = torch.zeros(count, 3, 3, dtype=torch.float64)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        skew[:, i, j], skew[:, j, i] = -turn[:, k], turn[:, k]
    poses = cameras.cam2world.cpu().clone()
    poses[:, :3, :3] = poses[:, :3, :3] @ torch.linalg.matrix_exp(skew)
    poses[:, :3, 3] += step
    return Cameras(cameras.intrinsics.cpu(), poses, cameras.image_size)

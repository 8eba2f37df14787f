"""`ChunkDenoiser`: the target latents of one chunk, from noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor

from ..models.adapter import MirageMemoryAdapter
from .chunks import TEMPORAL_COMPRESSION
from .conditioning import CleanFrames
from .results import FiniteTrace, check_finite
from .scheduling import set_timesteps, take_step
from .state import Prompt, SessionConfig

Callback: TypeAlias = Callable[..., dict[str, Any] | None] | PipelineCallback | MultiPipelineCallbacks


def published_sigmas(num_inference_steps: int) -> list[float]:
    """Return the published release's noise levels before the scheduler's shift.

    They are the first n of n + 1 even steps from 0.999 to 0.
    """
    return np.linspace(0.999, 0.0, num_inference_steps + 1)[:-1].tolist()


class DenoisingPipeline(Protocol):
    """What of :class:`~mirage.pipeline.pipeline.MiragePipeline` a denoiser uses: models, and what callbacks look at."""

    transformer: Any
    memory_adapter: MirageMemoryAdapter | None
    scheduler: UniPCMultistepScheduler
    interrupt: bool
    vae_scale_factor_spatial: int
    _execution_device: torch.device
    _guidance_scale: float
    _num_timesteps: int
    _current_timestep: Tensor | None
    _attention_kwargs: dict[str, Any] | None

    @property
    def do_classifier_free_guidance(self) -> bool: ...

    def make_memory_context(self, readout: Tensor, visible: Tensor) -> Tensor: ...

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        num_frames: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
    ) -> Tensor: ...

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any: ...


class ChunkDenoiser:
    """Denoise the chunks of one session.

    Args:
        pipeline: whose models are run; its `current_timestep`, `num_timesteps` and the like are kept up to date, and
            its `interrupt` is heeded.
        prompt: embeddings.
        config: of the session.
        generator: of the noise, and of what the scheduler draws.
        latents: (1, C, F, h, w), noise of the whole video, taken instead of the generator's; None draws.
        callback_on_step_end, callback_on_step_end_tensor_inputs: as of diffusers.
    """

    def __init__(
        self,
        pipeline: DenoisingPipeline,
        prompt: Prompt,
        config: SessionConfig,
        generator: torch.Generator,
        latents: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> None:
        self.pipeline = pipeline
        self.prompt = prompt
        self.config = config
        self.generator = generator
        self._latents = latents
        self._callback = callback_on_step_end
        self._callback_tensor_inputs = tuple(callback_on_step_end_tensor_inputs)

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        return self.pipeline._execution_device

    @property
    def is_shown_rays(self) -> bool:
        """Whether the adapter is shown the cameras' rays in a memory's place."""
        adapter = self.pipeline.memory_adapter
        return adapter is not None and adapter.config.control == "rays"

    def __call__(
        self,
        *,
        first_latent: Tensor,
        num_latents: int,
        references: Tensor | None,
        preceding: Tensor | None,
        readout: Tensor,
        visible: Tensor,
        start: int = 0,
        where: str = "the chunk",
    ) -> Tensor | None:
        """Generate one chunk's target latents.

        Args:
            first_latent: (1, C, h, w), the target's first frame, which stays as it is.
            num_latents: T, latent frames of the target.
            references, preceding: (R, C, h, w), (P, C, h, w) clean latents, or None.
            readout, visible: (T + P, C, h, w) and (T + P, h, w) bool, what the memory shows at target and preceding
                frames.
            start: the target's first frame in the whole video, from 0.
            where: how messages call the chunk.

        Returns:
            (T, C, h, w) float32, finite; None where a callback set `interrupt`.

        Raises:
            ValueError: the models gave what is not finite; the message says which of them, and at which step.
        """
        pipeline, config = self.pipeline, self.config
        device, dtype = self.device, pipeline.transformer.dtype
        pipeline.transformer._reset_stateful_cache()  # diffusers' caches hold tensors of the chunk before

        def as_video(frames: Tensor | None) -> Tensor:
            """Return (1, C, F, h, w) float32, without frames for None."""
            frames = first_latent[:0] if frames is None else frames
            return frames.movedim(0, 1)[None].to(device, torch.float32)

        first = as_video(first_latent)
        clean = CleanFrames(first, as_video(references), as_video(preceding))
        memory_context = None
        if config.memory.mode == "adapter":
            memory_context = pipeline.make_memory_context(readout, visible).to(dtype)
        timesteps = self._set_timesteps()
        latents = self._draw_noise(num_latents, start, first)
        denoised = clean.denoised(num_latents)
        trace = FiniteTrace()
        trace.watch("the clean frames it was given", clean.around(latents[:, :, :1]))
        if memory_context is not None:
            trace.watch("memory_context", memory_context)

        tensors: dict[str, Tensor | None] = {
            "prompt_embeds": self.prompt.positive,
            "negative_prompt_embeds": self.prompt.negative,
            "memory_context": memory_context,
        }
        with pipeline.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if pipeline.interrupt:
                    break
                pipeline._current_timestep = t
                predict = partial(
                    pipeline.transformer,
                    hidden_states=clean.around(latents).to(dtype),
                    timestep=(denoised * t)[None],
                    num_reference_frames=clean.references.shape[2],
                    memory_adapter=None if tensors["memory_context"] is None else pipeline.memory_adapter,
                    memory_context=tensors["memory_context"],
                    memory_scale=config.memory_scale,
                    return_dict=False,
                    attention_kwargs=config.attention_kwargs,
                )
                flow = clean.target(self._guide(predict, tensors), num_latents)
                trace.watch(f"the flow of step {i + 1} of {len(timesteps)}", flow)
                latents = take_step(pipeline.scheduler, flow, t, latents, self.generator)
                trace.watch(f"what the scheduler made of it in step {i + 1} of {len(timesteps)}", latents)
                if self._callback is not None:
                    latents, tensors = self._call_back(i, t, latents, tensors)
                progress_bar.update()
        pipeline._current_timestep = None
        if pipeline.interrupt:
            return None
        generated = torch.cat([first, latents[:, :, 1:]], dim=2)[0].movedim(1, 0)
        if not bool(generated.isfinite().all()):
            began = trace.first() or "what callback_on_step_end gave"
            model = f"{type(unwrap_module(pipeline.transformer)).__name__} in {str(dtype).removeprefix('torch.')}"
            check_finite(generated, f"{model} (first in {began})", "latents", where)
        return generated

    def draw(self, first_latent: Tensor, num_latents: int, start: int) -> None:
        """Draw the random numbers of a chunk, and generate nothing. Arguments are those of the call."""
        first = first_latent.movedim(0, 1)[None].to(self.device, torch.float32)
        timesteps = self._set_timesteps()
        latents = self._draw_noise(num_latents, start, first)
        for t in timesteps:  # what a stochastic scheduler draws depends on no values
            latents = take_step(self.pipeline.scheduler, torch.zeros_like(latents), t, latents, self.generator)

    def _call_back(
        self, step: int, timestep: Tensor, latents: Tensor, tensors: dict[str, Tensor | None]
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return latents and the other tensors after the callback has seen them; its None changes nothing."""
        assert self._callback is not None
        held = {"latents": latents, **tensors}
        changed = self._callback(
            self.pipeline, step, timestep, {name: held[name] for name in self._callback_tensor_inputs}
        )
        if changed is None:
            return latents, tensors
        if not isinstance(changed, Mapping):
            raise TypeError(
                "callback_on_step_end must return a dict of the tensors that it changes, or None, got"
                f" {type(changed).__name__}"
            )
        given = changed.get("latents", latents)
        if not isinstance(given, Tensor) or given.shape != latents.shape:
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"callback_on_step_end must return latents of shape {tuple(latents.shape)}, got {got}")
        return given, {name: changed.get(name, tensor) for name, tensor in tensors.items()}

    def _set_timesteps(self) -> Tensor:
        pipeline, config = self.pipeline, self.config
        timesteps = set_timesteps(pipeline.scheduler, config.sigmas, config.num_inference_steps, self.device)
        pipeline._num_timesteps = len(timesteps)
        pipeline._guidance_scale = config.guidance_scale
        pipeline._attention_kwargs = config.attention_kwargs
        return timesteps

    def _draw_noise(self, num_latents: int, start: int, first: Tensor) -> Tensor:
        """Return noise (1, C, T, h, w) of the target, drawn or cut from what was given."""
        given = self._latents
        if given is not None:
            if start + num_latents > given.shape[2]:
                raise ValueError(f"latents must hold {start + num_latents} frames by now, got {given.shape[2]}")
            given = given[:, :, start : start + num_latents]
        ratio = self.pipeline.vae_scale_factor_spatial
        return self.pipeline.prepare_latents(
            1,
            first.shape[1],
            first.shape[3] * ratio,
            first.shape[4] * ratio,
            TEMPORAL_COMPRESSION * (num_latents - 1) + 1,
            torch.float32,
            self.device,
            self.generator,
            given,
        )

    def _guide(self, predict: Callable[..., tuple[Tensor]], tensors: dict[str, Tensor | None]) -> Tensor:
        """Return the flow of all frames, under classifier-free guidance where it is asked for."""
        pipeline = self.pipeline
        with pipeline.transformer.cache_context("cond"):
            flow = predict(encoder_hidden_states=tensors["prompt_embeds"])[0]
        if tensors["negative_prompt_embeds"] is not None and pipeline.do_classifier_free_guidance:
            with pipeline.transformer.cache_context("uncond"):
                unconditional = predict(encoder_hidden_states=tensors["negative_prompt_embeds"])[0]
            flow = unconditional + self.config.guidance_scale * (flow - unconditional)
        return flow

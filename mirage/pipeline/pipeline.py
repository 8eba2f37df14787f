"""`MiragePipeline`: Wan2.2 image-to-video along a camera path, with a latent spatial memory in the loop.

The pipeline holds the models; :class:`~mirage.pipeline.session.MirageSession` holds a scene, and
:class:`~mirage.pipeline.steps.ChunkSteps` say how one chunk of it is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import BaseOutput, logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor, unwrap_module
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from mirage_kernels import Cameras, LatentCache

from ..files.framing import Framing, cut_to_multiples
from ..files.images import to_tensor
from ..models.adapter import MirageMemoryAdapter
from ..models.components import check_dtypes, check_models
from ..models.latent_depth import LatentDepth
from ..models.transformer import MirageTransformer3DModel
from ..optional import import_extra
from ..perception.depth import DepthEstimator, GivenDepth
from ..perception.depth_models import make_depth_estimator
from ..perception.static_filter import StaticFilter
from ..perception.static_filter_models import make_static_filter
from .checks import (
    OUTPUT_TYPES,
    check_config,
    check_generator,
    check_given_depth,
    check_image,
    check_latents,
    check_prompts,
    check_undecoded,
    fit_cameras,
)
from .chunks import CHUNK_FRAMES, TEMPORAL_COMPRESSION, check_num_frames, latent_count
from .conditioning import make_memory_context, make_scores
from .denoise import Callback, ChunkDenoiser, published_sigmas
from .loading import LoadablePipeline
from .memory import MemoryConfig, fit_memory
from .offload import take_turns
from .pixel_memory import CHANNELS, make_pixel_cache
from .results import check_finite
from .run_record import describe_run
from .run_store import LAST_GOOD, RunStore
from .scheduling import check_noise_levels, check_scheduler
from .session import MirageSession
from .state import DepthSources, MirageChunk, Prompt, SessionConfig
from .steps import ChunkSteps

logger = logging.get_logger(__name__)

EXAMPLE_DOC_STRING = """
        Examples:
            ```python
            >>> import torch
            >>> from diffusers.utils import export_to_video, load_image
            >>> from mirage import Cameras, MiragePipeline
            >>> from mirage.scenes.trajectories import orbit

            >>> pipe = MiragePipeline.from_pretrained("my-pipeline", dtype=torch.bfloat16).to("cuda")
            >>> image = load_image("room.png")

            >>> # The image's camera is the world's origin: x right, y down, z forward.
            >>> height, width, focal = image.height, image.width, 0.8 * image.width
            >>> intrinsics = [[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]]
            >>> start = Cameras(intrinsics, torch.eye(4)[None], (height, width))
            >>> cameras = orbit(start, 97, distance=3.0, degrees=30.0)

            >>> generator = torch.Generator().manual_seed(0)
            >>> output = pipe(image, "a bright room", generator=generator, cameras=cameras, memory="aligned")
            >>> export_to_video(output.frames[0], "orbit.mp4", fps=24)
            ```
"""


@dataclass
class MiragePipelineOutput(BaseOutput):
    """
    Attributes:
        frames: the video in the form of `output_type`, as of diffusers' video pipelines: "np" (1, N, H, W, 3) float in
            [0, 1], "pt" (1, N, 3, H, W), "pil" a list of one list of images, "latent" (1, C, F, h, w); None for None.
        cache: the memory after the last chunk.
        video: the video's file, where there was a `run_dir`.
    """

    frames: Any
    cache: LatentCache
    video: Path | None


class MiragePipeline(LoadablePipeline):
    """Image-to-video generation along a camera path, in chunks that share one spatial memory.

    Args:
        tokenizer, text_encoder: umT5, as of the Wan pipelines.
        vae: `AutoencoderKLWan` in Wan2.2's form.
        scheduler: `UniPCMultistepScheduler` with flow sigmas, as of Wan2.2-TI2V-5B.
        transformer: the backbone.
        memory_adapter: through which it sees the memory; None generates without one.
        latent_depth: gives depth from latents; None asks for a depth estimator, or the user's own depth.

    Raises:
        ValueError: models that do not belong together; the message says which and why.
    """

    model_cpu_offload_seq = "text_encoder->memory_adapter->transformer->vae"
    _optional_components = ["memory_adapter", "latent_depth"]
    _exclude_from_cpu_offload = ["latent_depth"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "memory_context"]

    # The very functions of diffusers' pipeline: the same prompt gives the same embeddings.
    _get_t5_prompt_embeds = WanImageToVideoPipeline._get_t5_prompt_embeds
    encode_prompt = WanImageToVideoPipeline.encode_prompt

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: UniPCMultistepScheduler,
        transformer: MirageTransformer3DModel,
        memory_adapter: MirageMemoryAdapter | None = None,
        latent_depth: LatentDepth | None = None,
    ) -> None:
        super().__init__()
        check_models(vae, transformer, memory_adapter, latent_depth)
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=transformer,
            memory_adapter=memory_adapter,
            latent_depth=latent_depth,
        )
        # Models may be left out, as of diffusers' pipelines: to encode prompts, say, no other one is needed.
        self.vae_scale_factor_temporal = TEMPORAL_COMPRESSION if vae is None else vae.config.scale_factor_temporal
        self.vae_scale_factor_spatial = 16 if vae is None else vae.config.scale_factor_spatial
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)
        self._scores: dict[tuple[int, int], Tensor] = {}
        self._guidance_scale = 1.0
        self._attention_kwargs: dict[str, Any] | None = None
        self._num_timesteps = 0
        self._current_timestep: Tensor | None = None
        self._interrupt = False

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Offload as `DiffusionPipeline` does, the adapter staying beside the transformer, which calls it, and with
        the models of one part of a chunk making room for those of the next."""
        super().enable_model_cpu_offload(gpu_id, device)
        take_turns(self._all_hooks, (self.transformer, self.memory_adapter), (self.text_encoder, self.vae))

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Offload as `DiffusionPipeline` does; the transformer's hook leaves the adapter, an argument, to its own."""
        super().enable_sequential_cpu_offload(gpu_id, device)
        hook = self.transformer._hf_hook
        for one in getattr(hook, "hooks", [hook]):
            if hasattr(one, "skip_keys"):
                one.skip_keys = ["memory_adapter"]

    # diffusers' properties.

    @property
    def text_length(self) -> int:
        """Tokens of a prompt's embedding: 512 as of the Wan pipelines, or fewer where the tokenizer says so."""
        return 512 if self.tokenizer is None else min(512, self.tokenizer.model_max_length)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether to stop: set it in a callback, or from another thread; chunks that are whole are kept."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    # Generation.

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: PipelineImageInput | str | os.PathLike[str],
        prompt: str | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        *,
        cameras: Cameras,
        depth: Tensor | np.ndarray | None = None,
        depth_estimator: str | DepthEstimator | None = None,
        static_filter: str | StaticFilter = "geometric",
        memory: MemoryConfig | str | None = None,
        cache: LatentCache | None = None,
        memory_scale: float = 1.0,
        sigmas: Sequence[float] | Callable[[int], Sequence[float]] | None = published_sigmas,
        max_reference_frames: int = 4,
        reference_threshold: float = 0.04,
        reference_voxel_size: float | None = None,
        preceding_frames: int = 2,
        chunk_frames: int = CHUNK_FRAMES,
        decode: str = "chunk",
        run_dir: str | os.PathLike[str] | None = None,
        resume: bool | str = False,
        fps: float = 24.0,
        callback_on_chunk_end: Callable[[MiragePipeline, MirageChunk], None] | None = None,
    ) -> MiragePipelineOutput | tuple[Any]:
        """Generate a video along `cameras`.

        Args:
            image: the first frame: a path, a PIL image, or an array or tensor as diffusers takes them, see
                :mod:`mirage.files.images`.
            prompt: what the video shows.
            negative_prompt: what it does not show, with `guidance_scale` above 1.
            height, width: of the frames, multiples of 32; default the image's, rounded down. The image is cropped about
                its centre to their aspect, then resized; cameras and given depth follow, see
                :class:`~mirage.files.framing.Framing`.
            num_frames: 4 n + 1; default as many as `cameras`.
            num_inference_steps: denoising steps of a chunk.
            guidance_scale: above 1, classifier-free guidance.
            generator: of the noise, and of what a stochastic scheduler draws; its state is saved with a run.
            latents: (1, C, F, h, w) float, noise of all latent frames, F = (num_frames + 3) / 4; None draws it.
            prompt_embeds, negative_prompt_embeds: (1, L, D), instead of the texts.
            output_type: "np", "pt", "pil" or "latent"; None keeps no frames: they go to `run_dir` and the callback
                only, and memory stays flat however long the video is.
            return_dict: False returns a tuple of the frames.
            attention_kwargs: of the transformer: `{"scale": s}` scales loaded LoRA.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as of diffusers, at every denoising step; one that
                returns None changes nothing.
            max_sequence_length: tokens of a prompt's embedding; default :attr:`text_length`.
            cameras: one per frame, at least `num_frames`, for the image as it is given, at any size of its aspect, or
                for exactly the frames' size; the first is the image's. World axes and unit are the caller's own.
            depth: z in world units, of the image (H, W), or of every frame (N, H, W), of sizes as of `cameras`. Without
                it, and for frames beyond it, `depth_estimator` or the pipeline's `latent_depth` is asked.
            depth_estimator: for frames whose depth is not given: a name ("depth-anything-v2", "depth-pro",
                "map-anything", "depth-anything-3") or a :class:`~mirage.perception.depth.DepthEstimator`; None takes
                the pipeline's `latent_depth`.
            static_filter: what is kept out of the memory: names joined by "+" ("none", "geometric", "sky", "sam2",
                "sam3", "confidence"), see :func:`~mirage.perception.static_filter.make_static_filter`, or a filter.
            memory: which memory: a :class:`~mirage.pipeline.memory.MemoryConfig`, or the name of a preset of
                :data:`~mirage.pipeline.memory.MEMORIES`; an adapter of the published release was trained on "nearest".
                Default "aligned", written by the policy of `cache` where that is given; "none" with an adapter that is
                shown no memory.
            cache: the memory to use, which may hold a scene already, in whose world `cameras` are then. Default a new
                one as `memory` says, in the transformer's dtype.
            memory_scale: factor of the memory's hints.
            sigmas: noise levels before the scheduler's shift, descending in (0, 1] (a final 0 is the scheduler's to
                add, and may be there), or a function that gives them for a number of steps; None takes the scheduler's
                own, as diffusers' Wan pipelines do.
            max_reference_frames: earlier latent frames, at most, that see what the chunk will see, by `view_overlap`.
            reference_threshold: least overlap (IoU of voxel sets) of a reference frame.
            reference_voxel_size: edge of these voxels in world units; None: about 1/32 of the first frame's depth.
            preceding_frames: latent frames before the shared one that the chunk sees.
            chunk_frames: 4 n + 1, frames that the model makes at a time.
            decode: "chunk" decodes every chunk (streaming: the frames are those of decoding all at once); "end" decodes
                nothing until the end, which needs depth and filters that look at no frames.
            run_dir: folder where every chunk is saved, so that a killed run can be resumed; None saves nothing.
            resume: continue the run in `run_dir`, if there is one. Pass what it was started with. "last-good" continues
                after the last chunk up to which all is finite and undamaged, moves the others aside, and makes what is
                missing again from the chunks' latents.
            fps: of the video in `run_dir`.
            callback_on_chunk_end: called with the pipeline and each :class:`~mirage.pipeline.state.MirageChunk`.

        Examples:

        Returns:
            :class:`MiragePipelineOutput`. After an interrupt it holds the chunks that were whole.

        Raises:
            ValueError, TypeError, MissingExtraError: before any heavy work, naming the argument.
        """
        if not isinstance(cameras, Cameras):
            raise TypeError(f"cameras must be mirage_kernels.Cameras, one per frame, got {type(cameras).__name__}")
        num_frames = len(cameras) if num_frames is None else num_frames
        check_num_frames("num_frames", num_frames)
        check_num_frames("chunk_frames", chunk_frames)
        if len(cameras) < num_frames:
            raise ValueError(f"cameras must be at least num_frames, {num_frames}, got {len(cameras)}")
        pixels = check_image(image)
        fit_cameras(cameras, self._frame(pixels, height, width))
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f'output_type must be "np", "pt", "pil", "latent" or None, got {output_type!r}')
        if output_type is None and run_dir is None and callback_on_chunk_end is None:
            raise ValueError("output_type None needs a run_dir or a callback_on_chunk_end for the frames to go to")
        session = self.start_session(
            pixels,
            prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            depth=depth,
            depth_estimator=depth_estimator,
            static_filter=static_filter,
            memory=memory,
            cache=cache,
            memory_scale=memory_scale,
            sigmas=sigmas,
            max_reference_frames=max_reference_frames,
            reference_threshold=reference_threshold,
            reference_voxel_size=reference_voxel_size,
            preceding_frames=preceding_frames,
            decode=decode,
            run_dir=run_dir,
            resume=resume,
            fps=fps,
        )
        keeps_frames = output_type not in ("latent", None)
        frames: Any = None
        video = None
        with session:
            kept: list[Tensor] = []
            whole = session.num_chunks == 0  # a resumed run has frames that are on disk only
            for chunk in session.run(cameras[:num_frames], chunk_frames):
                if keeps_frames and chunk.frames is not None and whole:
                    kept.append(chunk.frames.cpu())
                if callback_on_chunk_end is not None:
                    callback_on_chunk_end(self, chunk)
            if session.num_chunks and keeps_frames:
                kept = kept or [piece.cpu() for piece in session.decode()]
                video_frames = torch.cat(kept).movedim(0, 1)[None] * 2.0 - 1.0  # postprocess_video takes [-1, 1]
                frames = self.video_processor.postprocess_video(video_frames, output_type=output_type)
            if session.num_chunks and output_type == "latent":
                frames = session.latents()
            if session.num_chunks and run_dir is not None:
                video = session.finish(kept or None)
        self.maybe_free_model_hooks()
        return MiragePipelineOutput(frames=frames, cache=session.cache, video=video) if return_dict else (frames,)

    def start(self, *arguments: Any, **options: Any) -> MirageSession:
        """Raise: this method is now :meth:`start_session`.

        Raises:
            AttributeError: always; it says the new name.
        """
        raise AttributeError("MiragePipeline.start is now start_session (docs/renamed.md)")

    @torch.no_grad()
    def start_session(
        self,
        image: PipelineImageInput | str | os.PathLike[str],
        prompt: str | None = None,
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        depth: Tensor | np.ndarray | None = None,
        depth_estimator: str | DepthEstimator | None = None,
        static_filter: str | StaticFilter = "geometric",
        memory: MemoryConfig | str | None = None,
        cache: LatentCache | None = None,
        memory_scale: float = 1.0,
        sigmas: Sequence[float] | Callable[[int], Sequence[float]] | None = published_sigmas,
        max_reference_frames: int = 4,
        reference_threshold: float = 0.04,
        reference_voxel_size: float | None = None,
        preceding_frames: int = 2,
        decode: str = "chunk",
        run_dir: str | os.PathLike[str] | None = None,
        resume: bool | str = False,
        fps: float = 24.0,
    ) -> MirageSession:
        """Start a session for interactive use: its `step(cameras)` generates one chunk.

        Args:
            num_frames: of the whole video, where it is known: to check `depth`, `depth_estimator` and `latents`
                against.
            run_dir: as of :meth:`__call__`; the session holds it until it is closed.

        All other arguments are those of :meth:`__call__`.

        Raises:
            ValueError, TypeError, MissingExtraError: before any heavy work, naming the argument.
        """
        if resume not in (True, False, LAST_GOOD):
            raise ValueError(f'resume must be True, False or "{LAST_GOOD}", got {resume!r}')
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        given = check_image(image)
        framing = self._frame(given, height, width)
        height, width = framing.size
        if framing.crops:
            _, _, tall, wide = framing.window
            level = logging.WARNING if tall * wide < 0.9 * given.shape[0] * given.shape[1] else logging.INFO
            words = "the image of %dx%d is cropped to %.0fx%.0f about its centre for frames of %dx%d"
            logger.log(level, words, *framing.image_size, tall, wide, height, width)
        self.check_inputs(
            prompt,
            negative_prompt,
            height,
            width,
            num_frames,
            generator,
            latents,
            prompt_embeds,
            negative_prompt_embeds,
            callback_on_step_end_tensor_inputs,
        )
        config = SessionConfig(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=check_noise_levels(sigmas, num_inference_steps, self.scheduler),
            guidance_scale=guidance_scale,
            memory_scale=memory_scale,
            memory=self._fit_memory(memory, cache),
            max_reference_frames=max_reference_frames,
            reference_threshold=reference_threshold,
            reference_voxel_size=reference_voxel_size,
            preceding_frames=preceding_frames,
            decode=decode,
            fps=fps,
            attention_kwargs=attention_kwargs,
        )
        check_config(config)
        if unwrap_module(self.transformer).has_memory:
            raise ValueError("transformer must have no memory of set_memory(), which is for diffusers' own pipelines")
        check_dtypes(self.transformer, self.memory_adapter if config.memory.mode == "adapter" else None)
        check_scheduler(self.scheduler, config.sigmas, num_inference_steps)
        if negative_prompt is not None and guidance_scale <= 1:
            logger.warning("negative_prompt is ignored: guidance_scale is %s, not above 1", guidance_scale)
        device = self._execution_device
        cache = self._open_cache(cache, config.memory)
        filter_ = make_static_filter(static_filter, device) if isinstance(static_filter, str) else static_filter
        if not isinstance(filter_, StaticFilter):
            raise TypeError(f"static_filter must be a name or a StaticFilter, got {type(filter_).__name__}")
        sources = self._depth_sources(depth, depth_estimator, num_frames, framing)
        check_undecoded(decode, sources, filter_)
        first_depth = check_given_depth(sources, framing)
        if run_dir is not None:
            import_extra("imageio_ffmpeg", "generate")
        seed = None if generator is None else generator.initial_seed()
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**31, ()).item()))
        pixels = 2.0 * to_tensor(framing.fit_pixels(given))[None] - 1.0

        record: dict[str, Any] = {}
        if run_dir is not None:
            record = describe_run(
                config,
                self.components,
                image=pixels,
                texts={"prompt": prompt, "negative_prompt": negative_prompt},
                tensors={
                    "prompt_embeds": prompt_embeds,
                    "negative_prompt_embeds": negative_prompt_embeds,
                    "latents": latents,
                },
                depth=sources,
                first_depth=first_depth,
                static_filter=static_filter,
                seed=seed,
            )
        store = RunStore(run_dir, record, resume)
        try:
            self._guidance_scale = guidance_scale
            self._attention_kwargs = attention_kwargs
            self._interrupt = False
            self._current_timestep = None
            denoiser = ChunkDenoiser(
                self,
                self._embed(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, max_sequence_length),
                config,
                generator,
                latents,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
            )
            steps = ChunkSteps(config, cache, denoiser, self.vae, sources, framing, filter_, store)
            session = MirageSession(steps, pixels.to(device), generator, store)
            if session.num_chunks:
                logger.info("resuming %s after %d chunks", run_dir, session.num_chunks)
            return session
        except BaseException:
            store.close()
            raise

    def _embed(
        self,
        prompt: str | None,
        negative_prompt: str | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        max_sequence_length: int | None,
    ) -> Prompt:
        """Encode prompts in the transformer's dtype."""
        embeds, negative_embeds = self.encode_prompt(
            prompt=prompt,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            max_sequence_length=self.text_length if max_sequence_length is None else max_sequence_length,
            device=self._execution_device,
        )
        for given in (embeds, negative_embeds):
            if given is not None:
                check_finite(given, "the text encoder", "embeddings", "the prompt")
        dtype = self.transformer.dtype
        return Prompt(embeds.to(dtype), None if negative_embeds is None else negative_embeds.to(dtype))

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
    ) -> Tensor:
        """Draw noise (B, C, F, h, w) of a chunk, or take what is given.

        Args:
            batch_size, num_channels_latents: B and C.
            height, width, num_frames: of the chunk's pixel frames, the shared one included.
            dtype, device: of the noise.
            generator: to draw from.
            latents: the noise, where it is given.
        """
        if latents is not None:
            return latents.to(device=device, dtype=dtype)
        shape = (
            batch_size,
            num_channels_latents,
            latent_count(num_frames),
            height // self.vae_scale_factor_spatial,
            width // self.vae_scale_factor_spatial,
        )
        noise: Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return noise

    def make_memory_context(self, readout: Tensor, visible: Tensor) -> Tensor:
        """Return what the adapter is given, (1, control channels, F, h, w), from what the memory shows.

        Args:
            readout: (F, C, h, w) latents.
            visible: (F, h, w) bool.
        """
        latents = readout.movedim(0, 1)[None].to(self._execution_device, torch.float32)
        scores = self._score_latents(*latents.shape[2:]) if self.memory_adapter.conditioning == "scores" else None
        return make_memory_context(latents, visible[None], scores)

    def _score_latents(self, frames: int, height: int, width: int) -> Tensor:
        known = self._scores.get((height, width))
        if known is None or known.shape[2] < frames:
            known = make_scores(self.vae, frames, height, width)
            self._scores = {(height, width): known}
        return known[:, :, :frames]

    # Checks.

    def check_inputs(
        self,
        prompt: str | None,
        negative_prompt: str | None,
        height: int,
        width: int,
        num_frames: int | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
    ) -> None:
        """Check what diffusers' pipelines take too. Arguments are those of :meth:`__call__`.

        Raises:
            ValueError, TypeError, MissingExtraError: naming the argument.
        """
        patch = self.transformer.config.patch_size
        rows, columns = (self.vae_scale_factor_spatial * side for side in patch[1:])
        if height < 1 or width < 1 or height % rows or width % columns:
            raise ValueError(
                f"height and width must be positive multiples of {rows} and {columns}, got {height} and {width}"
            )
        unknown = set(callback_on_step_end_tensor_inputs or ()) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {', '.join(self._callback_tensor_inputs)},"
                f" got {', '.join(sorted(unknown))}"
            )
        check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, self.transformer.config.text_dim)
        check_generator(generator)
        ratio = self.vae_scale_factor_spatial
        num_latents = None if num_frames is None else latent_count(num_frames)
        check_latents(latents, self.vae.config.z_dim, num_latents, (height // ratio, width // ratio))

    def _fit_memory(self, memory: MemoryConfig | str | None, cache: LatentCache | None) -> MemoryConfig:
        adapter = self.memory_adapter
        return fit_memory(
            memory,
            control=None if adapter is None else adapter.config.control,
            write_policy=None if cache is None else cache.write_policy,
        )

    def _open_cache(self, cache: LatentCache | None, memory: MemoryConfig) -> LatentCache:
        """Return the memory that is given, or an empty one."""
        pixels, device = memory.kind == "pixel", self._execution_device
        channels = CHANNELS if pixels else self.vae.config.z_dim
        if cache is None and pixels:
            return make_pixel_cache(device, memory.near)
        if cache is None:
            dtype, policy = self.transformer.dtype, memory.write_policy
            dtype = torch.float32 if dtype == torch.float64 else dtype  # which memories have not
            return LatentCache(channels, dtype=dtype, device=device, write_policy=policy, near=memory.near)
        if cache.channels != channels:
            whose = "a cloud of pixels" if pixels else "the VAE"
            raise ValueError(f"cache must have {channels} channels like {whose}, got {cache.channels}")
        return cache

    def _frame(self, pixels: np.ndarray, height: int | None, width: int | None) -> Framing:
        """Return how an image (H, W, 3) becomes frames of the size asked for, or of its own cut to multiples."""
        if (height is None) != (width is None):
            raise ValueError(f"height and width must be given together, got {height} and {width}")
        rows, columns = pixels.shape[:2]
        if height is None or width is None:
            patch = self.transformer.config.patch_size
            multiples = [self.vae_scale_factor_spatial * side for side in patch[1:]]
            height, width = cut_to_multiples((rows, columns), multiples)
        elif height < 1 or width < 1:
            raise ValueError(f"height and width must be positive, got {height} and {width}")
        return Framing((rows, columns), (height, width))

    def _depth_sources(
        self,
        depth: Any,
        depth_estimator: str | DepthEstimator | None,
        num_frames: int | None,
        framing: Framing,
    ) -> DepthSources:
        """Say where depth comes from, and check that it can be had of the whole video."""
        given = None if depth is None else GivenDepth(depth, framing)
        estimator: DepthEstimator | LatentDepth | None = self.latent_depth
        if isinstance(depth_estimator, str):
            estimator = make_depth_estimator(depth_estimator, device=self._execution_device)
        elif depth_estimator is not None:
            if not isinstance(depth_estimator, DepthEstimator):
                got = type(depth_estimator).__name__
                raise TypeError(f"depth_estimator must be a name or a DepthEstimator, got {got}")
            estimator = depth_estimator
        sources = DepthSources(given, estimator)
        sources.check([0 if num_frames is None else num_frames - 1])
        return sources


# `DiffusionPipeline.from_pretrained` looks a folder's class up here, by name.
diffusers.MiragePipeline = MiragePipeline

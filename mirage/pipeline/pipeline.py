"""`MiragePipeline`: Wan2.2 image-to-video along a camera path, with a latent spatial memory in the loop.

The pipeline holds the models and knows how one chunk is conditioned and denoised;
:class:`~mirage.pipeline.session.MirageSession` holds a scene and knows what happens around that.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch
from accelerate.hooks import UserCpuOffloadHook
from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanImageToVideoPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from mirage_kernels import Cameras, LatentCache
from mirage_kernels.cache import SPLATS

from ..models.adapter import MirageMemoryAdapter
from ..models.checkpoints import load_lora
from ..models.latent_depth import LatentDepth
from ..models.transformer import MirageTransformer3DModel
from ..models.vae import encode_frames, encode_still
from ..optional import import_extra
from ..perception.depth import DepthEstimator, GivenDepth
from ..perception.depth_models import make_depth_estimator
from ..perception.static_filter import StaticFilter
from ..perception.static_filter_models import make_static_filter
from .chunks import CHUNK_FRAMES, STRIDE, check_num_frames
from .conditioning import CleanFrames, make_memory_context, make_scores
from .pixel_memory import CHANNELS, make_pixel_cache
from .run_store import RunStore
from .session import DepthSources, MirageChunk, MirageSession, Prompt, Settings

Callback: TypeAlias = Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks

_ASPECT_TOLERANCE = 0.01
_SAMPLED_WEIGHTS = 64
_FOREIGN_COMPONENTS = ("transformer_2", "boundary_ratio", "expand_timesteps", "image_encoder", "image_processor")


def published_sigmas(num_inference_steps: int) -> list[float]:
    """Noise levels of the published release before the scheduler's shift: n of n + 1 even steps from 0.999 to 0."""
    return np.linspace(0.999, 0.0, num_inference_steps + 1)[:-1].tolist()


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


class MiragePipeline(DiffusionPipeline, WanLoraLoaderMixin):
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
        self.vae_scale_factor_temporal = vae.config.scale_factor_temporal
        self.vae_scale_factor_spatial = vae.config.scale_factor_spatial
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)
        self._scores: dict[tuple[int, int], Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        memory_adapter: MirageMemoryAdapter | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> MiragePipeline:
        """Load a saved :class:`MiragePipeline`, or a Wan2.2 pipeline such as `Wan-AI/Wan2.2-TI2V-5B-Diffusers`.

        Args:
            pretrained_model_name_or_path: folder, or id on the hub.
            memory_adapter: the model, or its folder or id; None takes the pipeline's own, if it has one.
            kwargs: as of `DiffusionPipeline.from_pretrained`: `dtype`, `vae=...`, and so on.
        """
        if isinstance(memory_adapter, (str, os.PathLike)):
            loading = {name: kwargs[name] for name in _LOADING_OPTIONS if name in kwargs}
            for name in {"dtype", "torch_dtype"} & set(loading):
                if isinstance(loading[name], dict):  # per component, as diffusers takes it
                    loading[name] = loading[name].get("memory_adapter", loading[name].get("default"))
            memory_adapter = MirageMemoryAdapter.from_pretrained(memory_adapter, **loading)
        if memory_adapter is not None:
            kwargs["memory_adapter"] = memory_adapter
        pipeline: MiragePipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return pipeline

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # A Wan pipeline names the stock class for the same weights, and records what this one has no use for.
        second = config_dict.get("transformer_2")
        if second is not None and second[0] is not None:
            raise ValueError("a Wan pipeline with one transformer is needed, such as Wan2.2-TI2V-5B; got one with two")
        known = {name: value for name, value in config_dict.items() if name not in _FOREIGN_COMPONENTS}
        known["transformer"] = [MirageTransformer3DModel.__module__, MirageTransformer3DModel.__name__]
        return super().extract_init_dict(known, **kwargs)

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """As of `DiffusionPipeline`, with the adapter staying beside the transformer, which calls it, and with the
        models of one chunk making room for those of the next."""
        super().enable_model_cpu_offload(gpu_id, device)
        hooks = {id(hook.model): hook for hook in self._all_hooks}  # quantised models have none
        denoisers = [hooks[id(m)] for m in (self.transformer, self.memory_adapter) if id(m) in hooks]
        others = [hooks[id(m)] for m in (self.text_encoder, self.vae) if id(m) in hooks]
        for before, after in ((denoisers, others), (others, denoisers)):
            for hook in after:
                hook.hook.prev_module_hook = _OffloadTogether(before) if before else None

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """As of `DiffusionPipeline`; the transformer's hook leaves the adapter that it is called with to its own."""
        super().enable_sequential_cpu_offload(gpu_id, device)
        hook = self.transformer._hf_hook
        for one in getattr(hook, "hooks", [hook]):
            if hasattr(one, "skip_keys"):
                one.skip_keys = ["memory_adapter"]

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **kwargs: Any) -> None:
        """As of diffusers' Wan pipelines, and for files of the published release too; what does not fit is an error.

        Args:
            source: a file or a state dict, see :func:`~mirage.models.checkpoints.load_lora`; or a folder or an id on
            the hub. adapter_name: default "default".
            kwargs: for folders and ids, as of diffusers: `weight_name`, `subfolder`, and so on.

        Raises:
            ValueError: nothing in it fits the transformer, or not everything does.
        """
        if isinstance(source, Mapping) or Path(source).is_file():
            return load_lora(self.transformer, source, adapter_name or "default")
        before = set(getattr(self.transformer, "peft_config", {}))
        super().load_lora_weights(source, adapter_name=adapter_name or "default", **kwargs)
        if before == set(getattr(self.transformer, "peft_config", {})):
            raise ValueError(f"source must hold a LoRA of this transformer, nothing in {source} fits")

    # diffusers' properties.

    @property
    def text_length(self) -> int:
        """Tokens of a prompt's embedding: 512 as of the Wan pipelines, or fewer where the tokenizer says so."""
        return min(512, self.tokenizer.model_max_length)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set it in a callback, or from another thread, and generation stops; chunks that are whole are kept."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    # Generation.

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        prompt: str | None = None,
        cameras: Cameras | None = None,
        depth: Tensor | np.ndarray | None = None,
        num_frames: int | None = None,
        *,
        chunk_frames: int = CHUNK_FRAMES,
        output_type: str | None = "np",
        return_dict: bool = True,
        callback_on_chunk_end: Callable[[MiragePipeline, MirageChunk], None] | None = None,
        **options: Any,
    ) -> MiragePipelineOutput | tuple[Any]:
        """Generate a video along `cameras`.

        Args:
            image: the first frame: a PIL image, or an array or tensor as diffusers takes them.
            prompt: what the video shows.
            cameras: one per frame, at least `num_frames`, of the image's aspect; the first is the image's. World axes
                and unit are the caller's own.
            depth: z in world units, of the image (H, W), or of every frame (N, H, W). Without it, and for frames beyond
                it, `depth_estimator` or the pipeline's `latent_depth` is asked.
            num_frames: 4 n + 1; default as many as `cameras`.
            chunk_frames: 4 n + 1, frames that the model makes at a time.
            output_type: "np", "pt", "pil" or "latent"; None keeps no frames: they go to `run_dir` and the callback
                only, and memory stays flat however long the video is.
            return_dict: False returns a tuple of the frames.
            callback_on_chunk_end: called with the pipeline and each :class:`~mirage.pipeline.session.MirageChunk`.
            options: of :meth:`start`: `height`, `width`, `num_inference_steps`, `generator`, `run_dir`, `resume`, ...

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
        self.check_cameras(cameras, _image_size(image))
        if output_type not in ("np", "pt", "pil", "latent", None):
            raise ValueError(f'output_type must be "np", "pt", "pil", "latent" or None, got {output_type!r}')
        if output_type is None and options.get("run_dir") is None and callback_on_chunk_end is None:
            raise ValueError("output_type None needs a run_dir or a callback_on_chunk_end for the frames to go to")
        frames: Any = None
        video = None
        with self.start(image, prompt, depth=depth, num_frames=num_frames, **options) as session:
            kept: list[Tensor] = []
            whole = session.num_chunks == 0  # a run that is gone on with has frames that are on disk only
            for chunk in session.run(cameras[:num_frames], chunk_frames):
                if output_type not in ("latent", None) and chunk.frames is not None and whole:
                    kept.append(chunk.frames.cpu())
                if callback_on_chunk_end is not None:
                    callback_on_chunk_end(self, chunk)
            if session.num_chunks and output_type not in ("latent", None):
                kept = kept or [piece.cpu() for piece in session.decode()]
                pixels = torch.cat(kept).movedim(0, 1)[None] * 2.0 - 1.0  # postprocess_video takes [-1, 1]
                frames = self.video_processor.postprocess_video(pixels, output_type=output_type)
            if session.num_chunks and output_type == "latent":
                frames = session.latents()
            if session.num_chunks and options.get("run_dir") is not None:
                video = session.finish(kept or None)
        self.maybe_free_model_hooks()
        return MiragePipelineOutput(frames=frames, cache=session.cache, video=video) if return_dict else (frames,)

    @torch.no_grad()
    def start(
        self,
        image: Any,
        prompt: str | None = None,
        *,
        depth: Tensor | np.ndarray | None = None,
        depth_estimator: str | DepthEstimator | None = None,
        static_filter: str | StaticFilter = "geometric",
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
        num_inference_steps: int = 20,
        sigmas: Sequence[float] | str | None = "published",
        guidance_scale: float = 1.0,
        memory_scale: float = 1.0,
        splat: str = "aligned",
        max_reference_frames: int = 4,
        reference_threshold: float = 0.04,
        reference_voxel_size: float = 0.1,
        preceding_frames: int = 2,
        decode: str = "chunk",
        points: str = "latents",
        cache: LatentCache | None = None,
        generator: torch.Generator | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
        fps: float = 24.0,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> MirageSession:
        """A session for interactive use: its `step(cameras)` generates one chunk.

        Args:
            image, prompt, depth: see :meth:`__call__`.
            depth_estimator: for frames whose depth is not given: a name ("depth-anything-v2", "depth-pro",
                "map-anything", "depth-anything-3") or a :class:`~mirage.perception.depth.DepthEstimator`; None takes
                the pipeline's `latent_depth`.
            static_filter: what is kept out of the memory: names joined by "+" ("none", "geometric", "sky", "sam2",
                "sam3", "confidence"), see :func:`~mirage.perception.static_filter.make_static_filter`, or a filter.
            num_frames: of the whole video, where it is known: to check `depth` and `depth_estimator` against.
            height, width: of the frames, multiples of 32; default the image's, rounded down.
            negative_prompt, prompt_embeds, negative_prompt_embeds, max_sequence_length: as of the Wan pipelines;
                embeddings are (1, L, D). L is by default :attr:`text_length`.
            num_inference_steps: denoising steps of a chunk.
            sigmas: noise levels before the scheduler's shift; "published" are :func:`published_sigmas`; None are the
                scheduler's own, as in diffusers' Wan pipelines.
            guidance_scale: above 1, classifier-free guidance.
            memory_scale: factor of the memory's hints.
            splat: how the memory is read, see :meth:`~mirage_kernels.LatentCache.read`; an adapter of the published
                release was trained on "nearest".
            max_reference_frames: earlier latent frames, at most, that see what the chunk will see, by `view_overlap`.
            reference_threshold: least overlap (IoU of voxel sets) of a reference frame.
            reference_voxel_size: edge of these voxels in world units.
            preceding_frames: latent frames before the shared one that the chunk sees.
            decode: "chunk" decodes every chunk (streaming: the frames are those of decoding all at once); "end" decodes
                nothing until the end, which needs depth and filters that look at no frames.
            points: what the memory's points are: "latents", or "pixels", for a comparison: RGB points, which are
                rasterised and encoded for every chunk, see :mod:`mirage.pipeline.pixel_memory`.
            cache: the memory to use, which may hold a scene already, in whose world `cameras` are then. Default a new
                one in the transformer's dtype, or one of :func:`~mirage.pipeline.pixel_memory.make_pixel_cache`.
            generator: of the noise; its state is saved with a run.
            run_dir: folder where every chunk is saved, so that a killed run can be resumed; None saves nothing. The
                session holds it until it is closed.
            resume: go on with the run in `run_dir`, if there is one. Pass what it was started with.
            fps: of the video in `run_dir`.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as of diffusers, at every denoising step.

        Raises:
            ValueError, TypeError, MissingExtraError: before any heavy work, naming the argument.
        """
        image, size = _check_image(image), _image_size(image)
        height, width = self._frame_size(size, height, width)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {', '.join(self._callback_tensor_inputs)},"
                f" got {', '.join(sorted(unknown))}"
            )
        self._check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        if isinstance(generator, (list, tuple)):
            raise TypeError("generator must be one torch.Generator: a session has one scene, got a list")
        if decode not in ("chunk", "end"):
            raise ValueError(f'decode must be "chunk" or "end", got {decode!r}')
        if sigmas is not None and not isinstance(sigmas, str):
            levels: tuple[float, ...] | None = tuple(float(level) for level in sigmas)
        elif sigmas == "published":
            levels = tuple(published_sigmas(num_inference_steps))
        elif sigmas is None:
            levels = None
        else:
            raise ValueError(f'sigmas must be numbers, "published" or None, got {sigmas!r}')
        if levels is not None:
            if "sigmas" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(f"sigmas must be None with {type(self.scheduler).__name__}, which takes none")
            if not self.scheduler.config.get("use_flow_sigmas", True):
                raise ValueError("sigmas must be None: the scheduler has use_flow_sigmas=False and takes none")
        settings = Settings(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=levels,
            guidance_scale=guidance_scale,
            memory_scale=memory_scale,
            splat=splat,
            max_reference_frames=max_reference_frames,
            reference_threshold=reference_threshold,
            reference_voxel_size=reference_voxel_size,
            preceding_frames=preceding_frames,
            decode=decode,
            fps=fps,
            points=points,
        )
        _check_settings(settings)
        device = self._execution_device
        channels = CHANNELS if points == "pixels" else self.vae.config.z_dim
        if cache is None and points == "pixels":
            cache = make_pixel_cache(device)
        elif cache is None:
            cache = LatentCache(channels, dtype=self.transformer.dtype, device=device)
        elif cache.channels != channels:
            whose = "a cloud of pixels" if points == "pixels" else "the VAE"
            raise ValueError(f"cache must have {channels} channels like {whose}, got {cache.channels}")
        filter_ = make_static_filter(static_filter, device) if isinstance(static_filter, str) else static_filter
        for name, part in (("static_filter", filter_), ("depth_estimator", depth_estimator)):
            protocol = StaticFilter if name == "static_filter" else DepthEstimator
            if part is not None and not isinstance(part, str) and not isinstance(part, protocol):
                raise TypeError(f"{name} must be a name or a {protocol.__name__}, got {type(part).__name__}")
        sources = self._depth_sources(depth, depth_estimator, num_frames)
        _check_undecoded(decode, sources, filter_)
        if run_dir is not None:
            import_extra("imageio_ffmpeg", "generate")
        seeded = generator is not None
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**31, ()).item()))

        pixels = self.video_processor.preprocess(image, height=height, width=width).to("cpu", torch.float32)
        record = asdict(settings) | {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "image": _digest(pixels.numpy().tobytes()),
            "prompt_embeds": None if prompt_embeds is None else _digest(_bytes(prompt_embeds)),
            "negative_prompt_embeds": None
            if negative_prompt_embeds is None
            else _digest(_bytes(negative_prompt_embeds)),
            "depth": None if sources.given is None else _describe_depth(sources.given, size),
            "depth_estimator": None if sources.estimator is None else type(sources.estimator).__name__,
            "static_filter": static_filter if isinstance(static_filter, str) else type(static_filter).__name__,
            "seed": generator.initial_seed() if seeded else None,
            **{name: fingerprint(model) for name, model in self.components.items()},
        }
        store = RunStore(run_dir, record, resume)
        try:
            self._guidance_scale = guidance_scale
            self._interrupt = False
            self._current_timestep = None
            embeds, negative_embeds = self.encode_prompt(
                prompt=prompt,
                negative_prompt=negative_prompt,
                do_classifier_free_guidance=self.do_classifier_free_guidance,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                max_sequence_length=self.text_length if max_sequence_length is None else max_sequence_length,
                device=device,
            )
            dtype = self.transformer.dtype
            return MirageSession(
                pipeline=self,
                image=pixels.to(device),
                image_size=size,
                prompt=Prompt(embeds.to(dtype), None if negative_embeds is None else negative_embeds.to(dtype)),
                settings=settings,
                cache=cache,
                depth=sources,
                static_filter=filter_,
                generator=generator,
                store=store,
                callbacks={
                    "callback_on_step_end": callback_on_step_end,
                    "callback_on_step_end_tensor_inputs": tuple(callback_on_step_end_tensor_inputs),
                },
            )
        except BaseException:
            store.close()
            raise

    # What a session calls.

    def encode_image(self, image: Tensor) -> Tensor:
        """Normalised latents (1, C, 1, h, w) float32 of an image (1, 3, H, W) in [-1, 1]."""
        return encode_frames(self.vae, image[:, :, None]).to(self._execution_device)

    def encode_still(self, image: Tensor) -> Tensor:
        """What the memory keeps of an image, likewise, see :func:`~mirage.models.vae.encode_still`."""
        return encode_still(self.vae, image).to(self._execution_device)

    def make_memory_context(self, readout: Tensor, visible: Tensor) -> Tensor:
        """What the adapter is given, (1, control channels, F, h, w), from what the memory shows.

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

    def denoise(
        self,
        *,
        first_latent: Tensor,
        num_latents: int,
        prompt: Prompt,
        references: Tensor | None,
        preceding: Tensor | None,
        readout: Tensor,
        visible: Tensor,
        settings: Settings,
        generator: torch.Generator,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Tensor | None:
        """One chunk's target latents.

        Args:
            first_latent: (1, C, h, w), the target's first frame, which stays as it is.
            num_latents: T, latent frames of the target.
            prompt: embeddings.
            references, preceding: (R, C, h, w), (P, C, h, w) clean latents, or None.
            readout, visible: (T + P, C, h, w) and (T + P, h, w) bool, what the memory shows at target and preceding
                frames.
            settings: of the session.
            generator: of the noise.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as of diffusers.

        Returns:
            (T, C, h, w) float32; None where a callback set `interrupt`.
        """
        device, dtype = self._execution_device, self.transformer.dtype
        self.transformer._reset_stateful_cache()  # diffusers' caches hold tensors of the chunk before

        def as_video(frames: Tensor | None) -> Tensor:
            """(1, C, F, h, w) float32, without frames for None."""
            frames = first_latent[:0] if frames is None else frames
            return frames.movedim(0, 1)[None].to(device, torch.float32)

        first = as_video(first_latent)
        clean = CleanFrames(first, as_video(references), as_video(preceding))
        memory_context = None
        if self.memory_adapter is not None:
            memory_context = self.make_memory_context(readout, visible).to(dtype)

        arguments = {} if settings.sigmas is None else {"sigmas": np.array(settings.sigmas)}
        steps = {} if arguments else {"num_inference_steps": settings.num_inference_steps}
        self.scheduler.set_timesteps(device=device, **steps, **arguments)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        self._guidance_scale = settings.guidance_scale
        prompt_embeds, negative_prompt_embeds = prompt.positive, prompt.negative

        shape = (1, first.shape[1], num_latents, *first.shape[3:])
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        denoised = clean.denoised(num_latents)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    break
                self._current_timestep = t
                predict = partial(
                    self.transformer,
                    hidden_states=clean.around(latents).to(dtype),
                    timestep=(denoised * t)[None],
                    num_reference_frames=clean.references.shape[2],
                    memory_adapter=self.memory_adapter,
                    memory_context=memory_context,
                    memory_scale=settings.memory_scale,
                    return_dict=False,
                )
                with self.transformer.cache_context("cond"):
                    flow = predict(encoder_hidden_states=prompt_embeds)[0]
                if negative_prompt_embeds is not None and self.do_classifier_free_guidance:
                    with self.transformer.cache_context("uncond"):
                        unconditional = predict(encoder_hidden_states=negative_prompt_embeds)[0]
                    flow = unconditional + settings.guidance_scale * (flow - unconditional)
                flow = clean.target(flow, num_latents)
                latents = self.scheduler.step(flow, t, latents, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                        "memory_context": memory_context,
                    }
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, i, t, given)
                    latents = returned.pop("latents", latents)
                    prompt_embeds = returned.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = returned.pop("negative_prompt_embeds", negative_prompt_embeds)
                    memory_context = returned.pop("memory_context", memory_context)
                progress_bar.update()
        self._current_timestep = None
        if self.interrupt:
            return None
        return torch.cat([first, latents[:, :, 1:]], dim=2)[0].movedim(1, 0)

    # Checks.

    def check_cameras(self, cameras: Cameras, image_size: tuple[int, int]) -> None:
        """That cameras are of the aspect of an image of `image_size` (height, width).

        Raises:
            TypeError, ValueError: they are not.
        """
        if not isinstance(cameras, Cameras):
            raise TypeError(f"cameras must be mirage_kernels.Cameras, got {type(cameras).__name__}")
        rows, columns = cameras.image_size
        ratio = (columns / rows) / (image_size[1] / image_size[0])
        if abs(ratio - 1.0) > _ASPECT_TOLERANCE:
            raise ValueError(
                f"cameras must have the aspect of the image, {image_size[0]}x{image_size[1]}, got image_size"
                f" {rows}x{columns}: crop the image, and move the principal point along"
            )

    def _frame_size(self, image_size: tuple[int, int], height: int | None, width: int | None) -> tuple[int, int]:
        if (height is None) != (width is None):
            raise ValueError(f"height and width must be given together, got {height} and {width}")
        patch = self.transformer.config.patch_size
        multiples = [self.vae_scale_factor_spatial * side for side in patch[1:]]
        if height is None or width is None:
            height, width = (max(s // m, 1) * m for s, m in zip(image_size, multiples, strict=True))
        if height < 1 or width < 1 or height % multiples[0] or width % multiples[1]:
            raise ValueError(
                f"height and width must be positive multiples of {multiples[0]} and {multiples[1]},"
                f" got {height} and {width}"
            )
        return height, width

    def _check_prompts(
        self,
        prompt: str | None,
        negative_prompt: str | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
    ) -> None:
        for name, text, embeds in (
            ("prompt", prompt, prompt_embeds),
            ("negative_prompt", negative_prompt, negative_prompt_embeds),
        ):
            if text is not None and embeds is not None:
                raise ValueError(f"{name} and {name}_embeds must not both be given")
            if text is not None and not isinstance(text, str):
                raise TypeError(f"{name} must be one str: a session has one scene, got {type(text).__name__}")
            width = self.transformer.config.text_dim
            if embeds is not None and (embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[2] != width):
                raise ValueError(f"{name}_embeds must be (1, L, {width}), got {tuple(embeds.shape)}")
        if prompt is None and prompt_embeds is None:
            raise ValueError("prompt or prompt_embeds must be given, got neither")
        if prompt_embeds is None or negative_prompt_embeds is None:
            import_extra("ftfy", "generate")  # with which diffusers cleans prompts

    def _depth_sources(
        self,
        depth: Any,
        depth_estimator: str | DepthEstimator | None,
        num_frames: int | None,
    ) -> DepthSources:
        given = None if depth is None else GivenDepth(depth)
        estimator: DepthEstimator | LatentDepth | None = self.latent_depth
        if isinstance(depth_estimator, str):
            estimator = make_depth_estimator(depth_estimator, device=self._execution_device)
        elif depth_estimator is not None:
            estimator = depth_estimator
        sources = DepthSources(given, estimator)
        sources.check([0 if num_frames is None else num_frames - 1])
        return sources


_LOADING_OPTIONS = ("dtype", "torch_dtype", "cache_dir", "force_download", "local_files_only", "token")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _describe_depth(depth: GivenDepth, image_size: tuple[int, int]) -> str:
    """How many frames it has, and a word that changes with that of frame 0; its aspect is checked on the way."""
    camera = Cameras(torch.eye(3), torch.eye(4)[None], image_size)
    return f"{depth.num_frames} frames {_digest(_bytes(depth(None, camera, [0])))}"


def fingerprint(component: Any) -> str | None:
    """A word that changes with a component's class, dtype, shapes and weights (the first few of each tensor), wherever
    it was loaded from."""
    if component is None:
        return None
    digest = hashlib.sha256()
    if isinstance(component, torch.nn.Module):
        for name, weight in sorted(component.state_dict().items()):
            digest.update(f"{name.replace('_orig_mod.', '')} {tuple(weight.shape)} {weight.dtype}".encode())
            if not weight.is_meta:  # as under sequential offloading
                digest.update(_bytes(weight.flatten()[:_SAMPLED_WEIGHTS]))
        control = getattr(getattr(component, "config", None), "control", "memory")
        if control != "memory":  # the same weights are another model then
            digest.update(control.encode())
    elif hasattr(component, "config"):
        known = {name: value for name, value in component.config.items() if not name.startswith("_")}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    return f"{type(component).__name__} {digest.hexdigest()[:16]}"


class _OffloadTogether(UserCpuOffloadHook):
    """Models that leave the GPU together, those of them that are there."""

    def __init__(self, hooks: list[UserCpuOffloadHook]) -> None:
        self.hooks = hooks

    @property
    def model(self) -> torch.nn.Module:  # type: ignore[override]
        """One that is on the GPU, if any is: accelerate looks at it to see whether there is anything to do."""
        models = [hook.model for hook in self.hooks]
        return next((m for m in models if next(m.parameters()).device.type != "cpu"), models[0])

    def offload(self) -> None:
        for hook in self.hooks:
            hook.offload()


def check_models(
    vae: AutoencoderKLWan,
    transformer: MirageTransformer3DModel,
    memory_adapter: MirageMemoryAdapter | None = None,
    latent_depth: LatentDepth | None = None,
) -> None:
    """That models belong together.

    Raises:
        TypeError, ValueError: they do not; the message says which and why.
    """
    channels = vae.config.z_dim
    if vae.config.scale_factor_temporal != STRIDE:
        raise ValueError(f"vae must pack {STRIDE} frames in a latent one, got {vae.config.scale_factor_temporal}")
    if not isinstance(transformer, MirageTransformer3DModel):
        raise TypeError(f"transformer must be MirageTransformer3DModel, got {type(transformer).__name__}")
    config = transformer.config
    if (config.in_channels, config.out_channels) != (channels, channels):
        raise ValueError(
            f"transformer must take and give {channels} channels like the VAE, got {config.in_channels} and"
            f" {config.out_channels}"
        )
    if memory_adapter is not None:
        if memory_adapter.latent_channels != channels:
            raise ValueError(
                f"memory_adapter must take {channels} read-out channels like the VAE, got"
                f" {memory_adapter.latent_channels} ({memory_adapter.config.control_channels} control channels)"
            )
        width = config.num_attention_heads * config.attention_head_dim
        if memory_adapter.proj_in.in_features != width:
            raise ValueError(
                f"memory_adapter must be {width} wide like the transformer, got {memory_adapter.proj_in.in_features}"
            )
        last = max(memory_adapter.config.memory_layers)
        if last >= config.num_layers:
            raise ValueError(
                f"memory_adapter must name blocks 0 to {config.num_layers - 1} of the transformer, got {last}"
            )
    if latent_depth is not None and latent_depth.config.latent_channels != channels:
        raise ValueError(
            f"latent_depth must take {channels} channels like the VAE, got {latent_depth.config.latent_channels}"
        )


def _check_settings(settings: Settings) -> None:
    if settings.points not in ("latents", "pixels"):
        raise ValueError(f'points must be "latents" or "pixels", got {settings.points!r}')
    if settings.points == "pixels" and settings.decode != "chunk":
        raise ValueError(f'decode must be "chunk" with points="pixels", which are of frames, got {settings.decode!r}')
    if settings.splat not in SPLATS:
        raise ValueError(f"splat must be one of {', '.join(SPLATS)}, got {settings.splat!r}")
    for name, least in (("num_inference_steps", 1), ("max_reference_frames", 0), ("preceding_frames", 0)):
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    for name in ("guidance_scale", "memory_scale", "reference_threshold", "reference_voxel_size", "fps"):
        value = getattr(settings, name)
        if not np.isfinite(value) or (name in ("reference_voxel_size", "fps") and value <= 0):
            raise ValueError(f"{name} must be finite, sizes and rates positive, got {value!r}")


def _check_undecoded(decode: str, depth: DepthSources, static_filter: StaticFilter) -> None:
    """That nothing needs the frames that `decode="end"` does not give."""
    if decode == "chunk":
        return
    estimator = depth.estimator
    if estimator is not None and not isinstance(estimator, LatentDepth) and estimator.needs_frames:
        raise ValueError(
            f'decode must be "chunk" with {type(estimator).__name__}, which looks at frames; "end" needs latent_depth'
            " or depth given for every frame"
        )
    if static_filter.needs_frames:
        raise ValueError(
            f'decode must be "chunk" with {type(static_filter).__name__}, which looks at frames; "end" goes with'
            ' static_filter "geometric", "confidence" or "none"'
        )


def _check_image(image: Any) -> Any:
    """What diffusers takes as one image, in three colours."""
    if isinstance(image, (list, tuple)):
        if len(image) != 1:
            raise ValueError(f"image must be one image: a session has one scene, got {len(image)}")
        image = image[0]
    if isinstance(image, PIL.Image.Image):
        return image.convert("RGB")
    if not isinstance(image, (Tensor, np.ndarray)):
        raise TypeError(f"image must be a PIL image, an array or a tensor, got {type(image).__name__}")
    shape, colours = tuple(image.shape), -3 if isinstance(image, Tensor) else -1
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[0] != 1) or shape[colours] != 3:
        expected = "(3, H, W) or (1, 3, H, W)" if isinstance(image, Tensor) else "(H, W, 3) or (1, H, W, 3)"
        raise ValueError(f"image must be {expected} as one {type(image).__name__}, got {shape}")
    return image


def _image_size(image: Any) -> tuple[int, int]:
    """(height, width) of one image."""
    image = _check_image(image)
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    rows, columns = image.shape[-2:] if isinstance(image, Tensor) else image.shape[-3:-1]
    return int(rows), int(columns)

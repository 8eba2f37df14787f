"""Every name of the project that the record uses, behind an interface of its own.

When a module, argument or option is renamed, this file follows, and nothing else of the record does: what it measures
and the hashes in ``record.json`` stay as they are. Imports of ``mirage`` are inside functions, so that the operators'
part runs without diffusers.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mirage_kernels
from mirage_kernels import Cameras, LatentCache
from mirage_kernels.compat import LatentPointCloud
from mirage_kernels.ops.operator import OPERATORS

__all__ = ["Cameras", "LatentCache", "LatentPointCloud"]

FLOAT8 = torch.float8_e4m3fn
WRITTEN = ("points", "features", "frame_ids")
REGISTERED: list[Any] = []  # a torch library is gone when its object is


# Backends.


def is_available(backend: str) -> bool:
    """Whether one of cpu, reference, triton can be used in this process."""
    return bool(mirage_kernels.available_backends()[backend])


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force a backend: cpu, reference, triton, or emulated, the CUDA sources on the CPU."""
    if backend != "emulated":
        with mirage_kernels.use_backend(backend):
            yield
        return
    emulated = _emulated_operators()
    before = {name: operator.overloads["compiled"] for name, operator in OPERATORS.items()}
    for name, operator in OPERATORS.items():
        operator.overloads["compiled"] = emulated(name)
    try:
        with mirage_kernels.use_backend("cpu"):
            yield
    finally:
        for name, operator in OPERATORS.items():
            operator.overloads["compiled"] = before[name]


def _emulated_operators() -> Callable[[str], Any]:
    build = importlib.import_module("tests.cuda_emulator.build")
    namespace = build.NAMESPACE
    if not REGISTERED:
        path = str(build.build())
        for suffix in build.VARIANTS:
            library = torch.library.Library(namespace + suffix, "DEF")
            for name, operator in OPERATORS.items():
                library.define(f"{name}_compiled{operator.schema}")
            REGISTERED.append(library)
        REGISTERED[0].define("run_faulty(Tensor input, int which) -> Tensor")
        torch.ops.load_library(path)
        for name, operator in OPERATORS.items():
            operator.register_autograd(f"{namespace}::{name}_compiled", "compiled")
    return lambda name: getattr(getattr(torch.ops, namespace), f"{name}_compiled").default


# Operators. `buffers` holds points, features, frame_ids, count, and where there are any scales, votes, looks, bounds.


def back_project(depth: Tensor, intrinsics: Tensor, cam2world: Tensor, size: Any, **options: Any) -> Any:
    """Options: mask, depth_sampling."""
    return mirage_kernels.back_project(depth, intrinsics, cam2world, size, **options)


def splat(buffers: dict[str, Tensor], intrinsics: Tensor, cam2world: Tensor, size: Any, **options: Any) -> Any:
    """Latents, mask, depth, index. Options: num_points, bounds, near, dtype."""
    return tuple(
        mirage_kernels.splat(
            buffers["points"],
            buffers["features"],
            intrinsics,
            cam2world,
            size,
            scales=buffers.get("scales"),
            **options,
        )
    )


def splat_aligned(
    buffers: dict[str, Tensor], centers: Tensor, intrinsics: Tensor, cam2world: Tensor, size: Any, **options: Any
) -> Any:
    """Latents, mask, depth, index. Options: num_points, bounds, near, sharpness, dtype."""
    return tuple(
        mirage_kernels.splat_aligned(
            buffers["points"],
            buffers["features"],
            buffers["frame_ids"],
            centers,
            intrinsics,
            cam2world,
            size,
            scales=buffers.get("scales"),
            **options,
        )
    )


def cache_write(buffers: dict[str, Tensor], *views: Tensor, **options: Any) -> Tensor:
    """`views`: latents, depth, intrinsics, cam2world. Options: mask, first_frame, depth_sampling, min_, max_depth."""
    return mirage_kernels.cache_write(
        *(buffers[name] for name in WRITTEN),
        buffers["count"],
        *views,
        scales=buffers.get("scales"),
        bounds=buffers.get("bounds"),
        **options,
    )


def bounded_write(buffers: dict[str, Tensor], centers: Tensor, *views: Tensor, **options: Any) -> Tensor:
    """As :func:`cache_write`; options also near, views_per_voxel, carve_views."""
    return mirage_kernels.bounded_write(
        *(buffers[name] for name in WRITTEN),
        buffers["votes"],
        buffers["count"],
        centers,
        *views,
        num_observations=buffers.get("looks"),
        scales=buffers.get("scales"),
        bounds=buffers.get("bounds"),
        **options,
    )


def cache_trim(buffers: dict[str, Tensor], max_tokens: int | None) -> Tensor:
    return mirage_kernels.cache_compact(
        *(buffers[name] for name in WRITTEN),
        buffers["count"],
        free_space_violations=buffers.get("votes"),
        num_observations=buffers.get("looks"),
        scales=buffers.get("scales"),
        bounds=buffers.get("bounds"),
        max_tokens=max_tokens,
    )


def block_bounds(points: Tensor, num_points: Tensor | None = None) -> Tensor:
    return mirage_kernels.block_bounds(points, num_points=num_points)


def view_overlap(points: Tensor, views: Any, targets: Any, size: Any, **options: Any) -> Tensor:
    """`views` and `targets`: intrinsics and cam2world. Options: num_points, bounds, voxel_size, near."""
    return mirage_kernels.view_overlap(points, *views, *targets, size, **options)


# The cache.


def make_cache(channels: int, dtype: torch.dtype, policy: str, **options: Any) -> LatentCache:
    """`policy`: bounded or append. Options: capacity, views_per_voxel, merge, carve, carve_views, max_tokens."""
    return LatentCache(channels, dtype=dtype, write_policy=policy, **options)


def write(cache: LatentCache, latents: Tensor, depth: Tensor, cameras: Cameras, **options: Any) -> list[int]:
    """What became of the tokens: written, replaced, merged, covered, refused, masked, and so on."""
    return list(cache.write(latents, depth, cameras, **options).as_dict().values())


def read(cache: LatentCache, cameras: Cameras, size: Any, kind: str, **options: Any) -> tuple[Tensor, ...]:
    """`kind`: aligned or nearest. Latents, mask, depth, index."""
    return tuple(cache.read(cameras, size, splat=kind, **options))


def contents(cache: LatentCache) -> tuple[Tensor, ...]:
    return cache.points, cache.footprints, cache.features, cache.frame_ids, cache.frame_centers


def offload(cache: LatentCache, cameras: Cameras) -> None:
    cache.offload(cameras)


# Models.


def tiny_random(**options: Any) -> Any:
    from mirage.zoo import tiny_random_pipeline

    return _silent(tiny_random_pipeline(**options))


def mirage_tiny() -> Any:
    from mirage.zoo import mirage_tiny_pipeline

    return _silent(mirage_tiny_pipeline())


def load_pipeline(folder: Path) -> Any:
    from mirage.pipeline.pipeline import MiragePipeline

    return _silent(MiragePipeline.from_pretrained(folder))


def make_small_pipeline(seed: int) -> Any:
    """A pipeline of a few thousand weights, to be saved in the repository."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    from mirage.models.adapter import MirageMemoryAdapter
    from mirage.models.latent_depth import LatentDepth
    from mirage.models.transformer import MirageTransformer3DModel
    from mirage.pipeline.pipeline import MiragePipeline

    base, channels = tiny_random(), 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            scale_factor_temporal=4,
        )
        transformer = MirageTransformer3DModel(
            num_attention_heads=1,
            attention_head_dim=24,
            in_channels=channels,
            out_channels=channels,
            text_dim=16,
            freq_dim=16,
            ffn_dim=24,
            num_layers=2,
        )
        adapter = MirageMemoryAdapter.from_transformer(transformer, 2 * channels)
        for projection in adapter.proj_out:
            torch.nn.init.normal_(projection.weight, std=0.02)
        encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=259, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=1, is_encoder_decoder=False)
        )
        depth = LatentDepth(latent_channels=channels, width=16)
    return _silent(
        MiragePipeline(
            tokenizer=base.tokenizer,
            text_encoder=encoder.eval(),
            vae=vae.eval(),
            scheduler=base.scheduler,
            transformer=transformer.eval(),
            memory_adapter=adapter.eval(),
            latent_depth=depth.eval(),
        )
    )


def _silent(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def film_room(seed: int, frames: int, size: tuple[int, int]) -> dict[str, Any]:
    """Image, prompt, cameras and depth (N, H, W) of a loop through a synthetic room."""
    from mirage.scenes.synthetic import SyntheticRoom

    room = SyntheticRoom(seed, moving=0, texture=0.25)
    cameras = room.path("pan-and-back", frames, size)
    true = room.render(cameras)
    return {"image": true.images[0], "prompt": room.prompt, "cameras": cameras, "depth": true.depth}


def start_session(pipeline: Any, room: dict[str, Any], memory: str, depth: str, **options: Any) -> Any:
    """A session with a context manager of its own.

    Args:
        memory: bounded, append, nearest, none or pixel.
        depth: true or head.
        options: num_frames, num_inference_steps, guidance_scale, negative_prompt, height, width, run_dir, resume, seed,
            on_step, static_filter.
    """
    from mirage import MemoryConfig

    chosen = {"bounded": MemoryConfig(), "append": MemoryConfig(write_policy="append")}.get(memory, memory)
    return pipeline.start_session(
        room["image"],
        room["prompt"],
        depth=room["depth"] if depth == "true" else None,
        memory=chosen,
        static_filter=options.pop("static_filter", "none"),
        generator=torch.Generator().manual_seed(options.pop("seed")),
        callback_on_step_end=options.pop("on_step", None),
        **options,
    )


def run_chunks(session: Any, cameras: Cameras, chunk_frames: int) -> Iterator[tuple[Tensor, int]]:
    """Frames (N, 3, H, W) and the number of tokens after each chunk."""
    for chunk in session.run(cameras, chunk_frames):
        yield chunk.frames, chunk.metrics["tokens"]


def session_latents(session: Any) -> Tensor:
    return session.latents()


def session_cache(session: Any) -> LatentCache:
    return session.cache


def call_pipeline(pipeline: Any, room: dict[str, Any], seed: int, **options: Any) -> Any:
    """Latents of the pipeline's own call. Options: num_frames, chunk_frames, num_inference_steps."""
    return pipeline(
        room["image"],
        room["prompt"],
        cameras=room["cameras"],
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **options,
    ).frames


# Training.

VAE, BACKBONE = {"stage": "vae"}, {"stage": "backbone"}
ADAPTER, LORA = {"stage": "adapter"}, {"stage": "lora", "lora": {"rank": 4, "alpha": 8.0}}
STAGES: dict[str, dict[str, Any]] = {
    "vae": VAE | {"vae": {"frames": 1, "statistics": 0}, "optimizer": "muon"},
    "vae-video": VAE | {"vae": {"frames": 5, "statistics": 2}},
    "vae-shifted": VAE | {"vae": {"frames": 5, "shifted": 1.0, "statistics": 2}},
    "vae-steady": VAE | {"vae": {"frames": 5, "shifted": 0.5, "steady": 0.3, "statistics": 2}},
    "backbone": BACKBONE | {"batch_size": 2, "mixed_precision": "bf16"},
    "adapter": ADAPTER,
    "adapter-none": ADAPTER | {"objective": {"memory": "none"}},
    "lora": LORA,
    "lora-nearest": LORA | {"objective": {"memory": "nearest"}},
    "lora-pixel": LORA | {"objective": {"memory": "pixel", "readouts": 1}},
}
CHANCES = {"drop_references": 0.1, "drop_preceding": 0.1, "drop_memory": 0.0, "drop_prompt": 0.0}


def training_values(stage: str, out: Path, **changes: Any) -> dict[str, Any]:
    """Three steps of a stage, as a training file says it."""
    values = {
        "out": str(out),
        "steps": 3,
        "learning_rate": 1e-3,
        "save_every": 100,
        "tensorboard": False,
        "data": {"frames": 17, "size": [64, 96], "sources": [{"kind": "synthetic", "rooms": 4}]},
        "models": {"latent_depth": {"width": 16}, "text_length": 32},
        **STAGES[stage],
        **changes,
    }
    if values["stage"] != "vae":
        values["objective"] = {"chunk_frames": 9, **CHANCES, **STAGES[stage].get("objective", {})}
    return values


def train(values: dict[str, Any]) -> list[dict[str, float]]:
    """Run it, or go on with it; what the lines of its log say of each step, but for its duration."""
    from accelerate.state import AcceleratorState

    from mirage.training import make_config
    from mirage.training.loop import METRICS
    from mirage.training.loop import train as run

    AcceleratorState._reset_state(reset_partial_state=True)  # else the process keeps its first run's precision
    run(make_config(values), progress=False)
    lines = (Path(values["out"]) / METRICS).read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]

"""MiragePipeline: what it equals, what it loads and saves, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import generation
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from generation import LATENT, SIZE, options
from torch import Tensor

from mirage.models.adapter import MirageMemoryAdapter
from mirage.models.latent_depth import LatentDepth
from mirage.models.vae import encode_frames
from mirage.optional import MissingExtraError
from mirage.perception.depth import GivenDepth
from mirage.pipeline.denoise import published_sigmas
from mirage.pipeline.memory import MemoryConfig
from mirage.pipeline.pipeline import MiragePipeline
from mirage.pipeline.state import MirageChunk
from mirage.zoo import tiny_random_pipeline
from mirage_kernels import CacheMark, Cameras, LatentCache


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)  # models this small are many times slower on several


@pytest.fixture(scope="module")
def pipe() -> MiragePipeline:
    return generation.make_pipeline()


@pytest.fixture
def bare() -> MiragePipeline:
    """Without adapter and depth head, to be changed by a test."""
    return generation.make_pipeline(with_memory=False, with_depth=False)


def stock_of(pipe: MiragePipeline) -> WanImageToVideoPipeline:
    """diffusers' own pipeline with the same weights."""
    transformer = WanTransformer3DModel.from_config(dict(pipe.transformer.config)).eval()
    transformer.load_state_dict(pipe.transformer.state_dict())
    stock = WanImageToVideoPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        vae=pipe.vae,
        scheduler=UniPCMultistepScheduler.from_config(pipe.scheduler.config),
        transformer=transformer,
        expand_timesteps=True,
    )
    stock.set_progress_bar_config(disable=True)
    return stock


def latents(pipe: MiragePipeline, num_frames: int, **changes: Any) -> Tensor:
    return pipe(**options(num_frames, **changes)).frames


# What it equals.


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_stock_pipeline_is_the_case_of_one_chunk_without_memory(bare: MiragePipeline, guidance_scale: float) -> None:
    stock = stock_of(bare)
    asked = options(13, chunk_frames=13, sigmas=None, guidance_scale=guidance_scale, output_type="pt")
    ours = bare(**asked).frames
    theirs = stock(
        image=asked["image"],
        prompt="a room",
        height=SIZE[0],
        width=SIZE[1],
        num_frames=13,
        num_inference_steps=2,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).frames
    assert ours.shape == theirs.shape == (1, 13, 3, *SIZE)
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_denoising_is_a_direct_unipc_run_with_the_published_schedule(pipe: MiragePipeline) -> None:
    """Of the second chunk, which has everything: references, preceding frames, and the memory."""
    seen: list[dict[str, Any]] = []
    forward = type(pipe.transformer).forward

    def spy(self: Any, **kwargs: Any) -> Any:
        output = forward(self, **kwargs)
        seen.append(kwargs | {"flow": output[0]})
        return output

    steps, size = 4, 3
    pipe.transformer.forward = spy.__get__(pipe.transformer)
    try:
        found = latents(pipe, 17, num_inference_steps=steps)[:, :, 3:]
    finally:
        del pipe.transformer.forward
    second = seen[steps:]
    assert len(second) == steps
    references = second[0]["num_reference_frames"]
    assert references > 0
    target = slice(references, references + size)
    assert second[0]["hidden_states"].shape[2] == references + size + 2

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    sigmas = np.linspace(0.999, 0.0, steps + 1)[:-1]
    assert np.allclose(published_sigmas(steps), sigmas)
    scheduler.set_timesteps(steps, sigmas=sigmas)
    assert torch.equal(torch.stack([call["timestep"].max() for call in second]), scheduler.timesteps.float())
    expected = second[0]["hidden_states"][:, :, target]
    for call, t in zip(second, scheduler.timesteps, strict=True):
        torch.testing.assert_close(call["hidden_states"][:, :, target][:, :, 1:], expected[:, :, 1:])
        clean = torch.ones(call["timestep"].shape[1], dtype=torch.bool)
        clean[references + 1 : references + size] = False
        assert (call["timestep"][0, clean] == 0).all() and (call["timestep"][0, ~clean] == t).all()
        expected = scheduler.step(call["flow"][:, :, target], t, expected, return_dict=False)[0]
    torch.testing.assert_close(found, expected[:, :, 1:])


def test_memory_context_is_readout_and_score_or_visibility(pipe: MiragePipeline) -> None:
    readout = torch.randn(5, 48, *LATENT)
    visible = torch.rand(5, *LATENT) > 0.5
    context = pipe.make_memory_context(readout, visible)
    ones = encode_frames(pipe.vae, torch.ones(1, 3, 17, *SIZE))
    assert context.shape == (1, 96, 5, *LATENT)
    assert torch.equal(context[0, :48], readout.movedim(0, 1))
    torch.testing.assert_close(context[:, 48:], ones)
    # Of fewer frames, the first ones; and they are computed once.
    shorter = pipe.make_memory_context(readout[:3], visible[:3])
    torch.testing.assert_close(shorter[:, 48:], encode_frames(pipe.vae, torch.ones(1, 3, 9, *SIZE)))

    masked = generation.make_pipeline(control_channels=49).make_memory_context(readout, visible)
    assert masked.shape == (1, 49, 5, *LATENT)
    assert torch.equal(masked[0, 48], visible.float())


def test_memory_changes_what_is_generated(pipe: MiragePipeline) -> None:
    with_memory, without = latents(pipe, 9), latents(pipe, 9, memory_scale=0.0)
    assert torch.equal(with_memory[:, :, 0], without[:, :, 0])
    assert (with_memory - without)[:, :, 1:].abs().amax() > 1e-4
    assert torch.equal(latents(pipe, 9), with_memory)  # the same bits in every run


@pytest.mark.parametrize("policy", ["bounded", "append"])
def test_the_memory_is_read_as_asked(pipe: MiragePipeline, policy: str) -> None:
    shown: dict[str, Tensor] = {}
    for splat in ("aligned", "nearest"):
        cache, kept, marks = LatentCache(48, write_policy=policy), list[MirageChunk](), list[CacheMark]()

        def keep(_: Any, chunk: MirageChunk, cache=cache, kept=kept, marks=marks) -> None:
            kept.append(chunk)
            marks.append(cache.checkpoint())

        memory = MemoryConfig(readout=splat, write_policy=policy)
        pipe(**options(13, memory=memory, cache=cache, callback_on_chunk_end=keep))
        shown[splat] = kept[1].readout.latents
        cache.rollback(marks[0])  # the first chunk, as the second one saw it
        again = cache.read(kept[1].cameras, LATENT, splat=splat)
        assert torch.equal(again.latents, shown[splat])
    if policy == "append":  # back at the start, a bounded memory of so few frames leaves a cell no choice
        assert not torch.equal(shown["aligned"], shown["nearest"])


@pytest.mark.slow
def test_frames_are_those_of_decoding_everything_at_once(pipe: MiragePipeline) -> None:
    frames = pipe(**options(25, output_type="pt")).frames
    video = latents(pipe, 25)
    mean = torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
    decoded = pipe.vae.decode(video * std + mean).sample
    assert torch.equal(frames[0], (decoded[0].movedim(1, 0) * 0.5 + 0.5).clamp(0, 1))
    at_end = pipe(**options(25, output_type="pt", decode="end")).frames
    assert torch.equal(at_end, frames)


@pytest.mark.slow
@pytest.mark.parametrize("num_frames, chunk_frames", [(5, 33), (13, 9), (33, 33), (21, 5)])
def test_every_length_of_4n_plus_1_works(pipe: MiragePipeline, num_frames: int, chunk_frames: int) -> None:
    output = pipe(**options(num_frames, chunk_frames=chunk_frames, output_type="np"))
    assert output.frames.shape == (1, num_frames, *SIZE, 3)
    assert output.cache.num_frames == (num_frames + 3) // 4
    assert output.video is None


# What it loads and saves.


def test_save_and_load_give_the_same_bits(pipe: MiragePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = MiragePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.memory_adapter, MirageMemoryAdapter) and isinstance(loaded.latent_depth, LatentDepth)
    assert torch.equal(latents(loaded, 9), latents(pipe, 9))


def test_loads_a_stock_wan_folder_and_an_adapter(
    bare: MiragePipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stock_of(bare).save_pretrained(tmp_path / "wan")
    MirageMemoryAdapter.from_transformer(bare.transformer, 49).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "wan" / "model_index.json").read_text())["transformer"][1] == "WanTransformer3DModel"
    capfd.readouterr()
    loaded = MiragePipeline.from_pretrained(tmp_path / "wan", memory_adapter=tmp_path / "adapter")
    assert "not expected" not in capfd.readouterr().err
    loaded.set_progress_bar_config(disable=True)
    assert loaded.memory_adapter.conditioning == "mask" and loaded.latent_depth is None
    assert torch.equal(latents(loaded, 9), latents(bare, 9))  # a new adapter's outputs are zero
    dtypes = {"transformer": torch.bfloat16, "default": torch.float32}
    mixed = MiragePipeline.from_pretrained(tmp_path / "wan", memory_adapter=tmp_path / "adapter", dtype=dtypes)
    assert (mixed.transformer.dtype, mixed.memory_adapter.dtype) == (torch.bfloat16, torch.float32)
    half = MiragePipeline.from_pretrained(tmp_path / "wan", memory_adapter=tmp_path / "adapter", dtype=torch.bfloat16)
    assert half.transformer.dtype == half.memory_adapter.dtype == torch.bfloat16
    half.set_progress_bar_config(disable=True)
    assert half(**options(9)).cache.dtype == torch.bfloat16


def test_wan_pipelines_with_two_transformers_are_refused(bare: MiragePipeline, tmp_path: Path) -> None:
    stock = stock_of(bare)
    stock.register_modules(transformer_2=stock.transformer)
    stock.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one transformer"):
        MiragePipeline.from_pretrained(tmp_path)


# diffusers' habits.


@pytest.mark.slow
def test_output_types(pipe: MiragePipeline) -> None:
    (frames,) = pipe(**options(5, output_type="np", return_dict=False))
    assert frames.shape == (1, 5, *SIZE, 3) and 0 <= frames.min() and frames.max() <= 1
    images = pipe(**options(5, output_type="pil")).frames
    assert [image.size for image in images[0]] == [SIZE[::-1]] * 5
    assert np.array_equal(np.asarray(images[0][3]), (frames[0, 3] * 255).round().astype(np.uint8))
    kept: list[MirageChunk] = []
    nothing = pipe(**options(13, output_type=None, callback_on_chunk_end=lambda _, chunk: kept.append(chunk)))
    assert nothing.frames is None and [(chunk.start, chunk.stop) for chunk in kept] == [(0, 9), (9, 13)]
    assert kept[1].frames is not None and kept[1].frames.shape == (4, 3, *SIZE)


@pytest.mark.slow
def test_image_may_be_anything_diffusers_takes(pipe: MiragePipeline) -> None:
    pixels = (options(5)["image"][0] * 255).round()
    image = PIL.Image.fromarray(pixels.byte().permute(1, 2, 0).numpy())
    with_alpha = image.convert("RGBA")
    results = [
        latents(pipe, 5, image=given)
        for given in (
            image,
            [with_alpha],
            pixels.byte(),
            pixels[None] / 255,
            (pixels / 255).permute(1, 2, 0)[None].numpy(),
        )
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=2e-2)


def test_step_callbacks_see_and_replace_tensors(pipe: MiragePipeline) -> None:
    calls: list[tuple[int, int]] = []

    def silence(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert pipeline is pipe and set(tensors) == {"latents", "memory_context"}
        assert pipeline.current_timestep == timestep and pipeline.num_timesteps == 2
        assert tensors["memory_context"].shape[1] == 96
        calls.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = ["latents", "memory_context"]
    found = latents(
        pipe, 9, callback_on_step_end=silence, callback_on_step_end_tensor_inputs=names, num_inference_steps=2
    )
    assert [step for step, _ in calls] == [0, 1]
    assert found[:, :, 0].abs().amax() > 0 and (found[:, :, 1:] == 0).all()


@pytest.mark.slow
def test_interrupt_keeps_whole_chunks(pipe: MiragePipeline) -> None:
    def stop_in_second_chunk(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if tensors["latents"].shape[2] == 2:
            pipeline.interrupt = True
        return {}

    found = latents(pipe, 13, callback_on_step_end=stop_in_second_chunk)
    assert torch.equal(found, latents(pipe, 13)[:, :, :3])
    at_once = pipe(**options(9, output_type="np", callback_on_step_end=_interrupt))
    assert at_once.frames is None


def _interrupt(pipeline: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Tensor]:
    pipeline.interrupt = True
    return {}


@pytest.mark.slow
def test_guidance_uses_the_negative_prompt(pipe: MiragePipeline) -> None:
    plain = latents(pipe, 5)
    guided = [latents(pipe, 5, guidance_scale=5.0, negative_prompt=text) for text in ("blur", "rain and snow")]
    assert not torch.equal(guided[0], plain) and not torch.equal(guided[0], guided[1])
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt("a room", do_classifier_free_guidance=False, max_sequence_length=512)
    assert torch.equal(latents(pipe, 5, prompt=None, prompt_embeds=embeds), plain)


# Faster, smaller: each against plain float32.


@pytest.mark.slow
def test_model_offload_gives_the_same_bits(pipe: MiragePipeline) -> None:
    offloaded = generation.make_pipeline()
    offloaded.enable_model_cpu_offload(device="cpu")
    expected = latents(pipe, 17)
    assert torch.equal(latents(offloaded, 17), expected)
    assert torch.equal(latents(offloaded, 17), expected)  # its hooks are there again after a call


def test_model_offload_moves_transformer_and_adapter_together() -> None:
    pipe = generation.make_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    hook = {name: getattr(pipe, name)._hf_hook for name in ("text_encoder", "transformer", "memory_adapter", "vae")}
    offloaded: list[torch.nn.Module] = []
    for name in ("text_encoder", "transformer", "memory_adapter", "vae"):
        model = getattr(pipe, name)
        for other in pipe._all_hooks:
            if other.model is model:
                other.offload = lambda model=model: offloaded.append(model)
    # On the CPU nothing has to leave, so ask the hooks themselves.
    hook["vae"].prev_module_hook.offload()
    assert offloaded == [pipe.transformer, pipe.memory_adapter]
    offloaded.clear()
    hook["transformer"].prev_module_hook.offload()
    assert offloaded == [pipe.text_encoder, pipe.vae]
    offloaded.clear()
    hook["memory_adapter"].prev_module_hook.offload()
    assert offloaded == [pipe.text_encoder, pipe.vae]


@pytest.mark.slow
def test_group_offload_gives_the_same_bits(pipe: MiragePipeline) -> None:
    offloaded = generation.make_pipeline()
    for model in (offloaded.transformer, offloaded.memory_adapter, offloaded.vae):
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )
    assert torch.equal(latents(offloaded, 9), latents(pipe, 9))


@pytest.mark.slow
def test_compiled_blocks_give_the_same_video(pipe: MiragePipeline) -> None:
    compiled = generation.make_pipeline()
    for model in (compiled.transformer, compiled.memory_adapter):
        model.compile_repeated_blocks(backend="aot_eager")
    torch.testing.assert_close(latents(compiled, 17), latents(pipe, 17), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_bfloat16_is_close(pipe: MiragePipeline) -> None:
    half = generation.make_pipeline().to(torch.bfloat16)
    found, expected = latents(half, 9), latents(pipe, 9)
    assert found.dtype == torch.float32  # noise and latents stay so
    assert (found - expected).norm() / expected.norm() < 0.03


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_bits(pipe: MiragePipeline) -> None:
    checkpointed = generation.make_pipeline()
    for model in (checkpointed.transformer, checkpointed.memory_adapter):
        model.enable_gradient_checkpointing()
    assert torch.equal(latents(checkpointed, 9), latents(pipe, 9))


def test_attention_caches_run_over_chunks_of_other_shapes(bare: MiragePipeline) -> None:
    config = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(0, 1000),
        cross_attention_block_identifiers=["blocks"],
        current_timestep_callback=lambda: bare.current_timestep,
    )
    bare.transformer.enable_cache(config)
    assert latents(bare, 13).isfinite().all()
    bare.transformer.disable_cache()
    with pytest.raises(ValueError, match="skips whole blocks"):
        bare.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))


# What it refuses, before anything heavy.


class _Heavy:
    """Anything heavy fails the test."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        pytest.fail("work was done before the arguments were checked")


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> MiragePipeline:
    pipe = generation.make_pipeline(with_depth=False)
    for model in (pipe.transformer, pipe.vae.encoder, pipe.vae.decoder, pipe.text_encoder, pipe.memory_adapter):
        monkeypatch.setattr(model, "forward", _Heavy())
    return pipe


BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_frames": 8}, r"num_frames must be 4 n \+ 1 \(5, 9, 13, ..\), got 8; nearest: 5 or 9"),
    ({"num_frames": 1}, r"num_frames must be 4 n \+ 1 .*got 1; nearest: 5$"),
    ({"num_frames": 9.0}, "num_frames must be an int, got 9.0"),
    ({"chunk_frames": 32}, "chunk_frames must be .*got 32; nearest: 29 or 33"),
    ({"num_frames": 13}, "cameras must be at least num_frames, 13, got 9"),
    ({"cameras": generation.cameras(9).resized((64, 64))}, "cameras must have the aspect of the image, 64x96"),
    ({"depth": None}, "depth is given of 0 frames, frame 8 is needed, and there is nobody to ask"),
    ({"depth": torch.ones(2, *SIZE)}, "depth is given of 2 frames, frame 8 is needed"),
    ({"depth": torch.ones(9, 64, 64)}, "depth must have the aspect of the 64x96 image, got 64x64"),
    ({"depth": torch.ones(9, *SIZE, dtype=torch.int32)}, "depth must be"),
    ({"depth_estimator": "crystal-ball"}, "depth-anything-v2"),
    ({"static_filter": "gometric"}, "geometric"),
    ({"decode": "never"}, 'decode must be "chunk" or "end"'),
    ({"prompt": None}, "prompt or prompt_embeds must be given"),
    ({"prompt": ["a", "b"]}, "prompt must be one str"),
    ({"prompt_embeds": torch.zeros(1, 4, 32)}, "must not both be given"),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 31)}, r"prompt_embeds must be \(1, L, 32\)"),
    ({"image": torch.zeros(2, 3, *SIZE)}, r"image must be \(3, H, W\) or \(1, 3, H, W\) as one Tensor, got \(2, 3"),
    ({"image": np.zeros((*SIZE, 5))}, r"image must be \(H, W, 3\) or \(1, H, W, 3\) as one ndarray"),
    ({"image": np.zeros((3, *SIZE), np.float32)}, r"image must be \(H, W, 3\) .* got \(3, 64, 96\)"),
    ({"image": options(5)["image"] * 255}, r"image must hold floats in \[0, 1\], .*convert it to uint8"),
    ({"image": options(5)["image"] * float("nan")}, "image must be finite"),
    ({"static_filter": lambda views: None}, "static_filter must be a name or a StaticFilter, got function"),
    ({"depth_estimator": lambda frames: None}, "depth_estimator must be a name or a DepthEstimator, got function"),
    ({"image": 3}, "image must be a path, a PIL image, an array or a tensor, got int"),
    ({"image": "room.png"}, "room.png: no such file"),
    ({"height": 64}, "height and width must be given together"),
    ({"height": 64, "width": 100}, "multiples of 32 and 32, got 64 and 100"),
    ({"output_type": "gif"}, "output_type must be"),
    ({"output_type": None}, "output_type None needs a run_dir or a callback_on_chunk_end"),
    ({"generator": [torch.Generator()]}, "generator must be one torch.Generator"),
    ({"sigmas": "published"}, "sigmas must be numbers, a function such as published_sigmas or None, got 'published'"),
    ({"memory": "ours"}, "memory must be one of none, nearest, aligned, pixel, got 'ours', which is now \"aligned\""),
    ({"memory": 3}, "memory must be a MemoryConfig or the name of one, got int"),
    (
        {"memory": "nearest", "cache": LatentCache(48, write_policy="bounded")},
        'cache must have write_policy "append" like memory, got "bounded"',
    ),
    ({"num_inference_steps": 0}, "num_inference_steps must be an int >= 1, got 0"),
    ({"max_reference_frames": -1}, "max_reference_frames must be an int >= 0"),
    ({"reference_voxel_size": 0.0}, "reference_voxel_size must be finite"),
    ({"cache": LatentCache(16)}, "cache must have 48 channels like the VAE, got 16"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs must be among"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_bad_arguments_are_named_before_any_work(idle: MiragePipeline, changes: dict[str, Any], message: str) -> None:
    asked = options(9) | {"chunk_frames": 9} | changes
    with pytest.raises((ValueError, TypeError, MissingExtraError, FileNotFoundError), match=message):
        idle(**asked)


def test_frames_are_refused_to_nobody(idle: MiragePipeline) -> None:
    """A filter or estimator that looks at frames, where none are decoded."""

    class Looks:
        needs_frames = True
        alignment = "none"

        def __call__(self, *args: Any) -> Any:
            pytest.fail("called")

    with pytest.raises(ValueError, match='decode must be "chunk" with Looks, which looks at frames'):
        idle(**options(9, static_filter=Looks(), decode="end"))
    with pytest.raises(ValueError, match='decode must be "chunk" with Looks, which looks at frames'):
        idle(**options(9, depth=None, depth_estimator=Looks(), decode="end"))


def test_models_that_do_not_belong_together_are_refused() -> None:
    parts = dict(tiny_random_pipeline().components)
    other = tiny_random_pipeline(control_channels=49)

    def build(**changes: Any) -> MiragePipeline:
        return MiragePipeline(**(parts | changes))

    def adapter(**changes: Any) -> MirageMemoryAdapter:
        return MirageMemoryAdapter(
            **{"memory_layers": (0, 2), "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96} | changes
        )

    assert build(memory_adapter=other.memory_adapter).memory_adapter.conditioning == "mask"
    with pytest.raises(ValueError, match="memory_adapter must be 48 wide like the transformer, got 96"):
        build(memory_adapter=adapter(num_attention_heads=4))
    with pytest.raises(ValueError, match="memory_adapter must take 48 readout channels like the VAE, got 16"):
        build(memory_adapter=adapter(control_channels=32))
    with pytest.raises(ValueError, match="memory_adapter must name blocks 0 to 3 of the transformer, got 4"):
        build(memory_adapter=adapter(memory_layers=(0, 4)))
    with pytest.raises(ValueError, match="latent_depth must take 48 channels like the VAE, got 16"):
        build(latent_depth=LatentDepth(latent_channels=16, width=8))
    with pytest.raises(TypeError, match="transformer must be MirageTransformer3DModel"):
        build(transformer=WanTransformer3DModel.from_config(dict(parts["transformer"].config)))
    narrow = type(parts["transformer"]).from_config(
        dict(parts["transformer"].config) | {"in_channels": 16, "out_channels": 16}
    )
    with pytest.raises(ValueError, match="transformer must take and give 48 channels like the VAE, got 16 and 16"):
        build(transformer=narrow, memory_adapter=None)


@pytest.mark.slow
def test_given_depth_and_estimator_share_the_work(pipe: MiragePipeline) -> None:
    """Depth of the image alone, and an estimator for the rest."""
    asked: list[list[int]] = []
    depth = options(13)["depth"]

    class Estimator:
        needs_frames = True
        alignment = "scale"

        def __call__(self, frames: Tensor, views: Cameras, numbers: list[int]) -> Tensor:
            assert frames.shape == (len(numbers), 3, 128, 192) and views.image_size == (128, 192)
            asked.append(numbers)
            return GivenDepth(depth)(frames, views, numbers) * 2.0  # of another unit, which the memory corrects

    size = {"height": 128, "width": 192}
    found = pipe(**options(13, depth=depth[0], depth_estimator=Estimator(), **size))
    assert asked == [[0, 4, 8], [12]]
    truth = pipe(**options(13, **size))
    radius = [cache.points[cache.frame_ids > 0].norm(dim=1).median() for cache in (found.cache, truth.cache)]
    assert abs(radius[0] / radius[1] - 1) < 0.02

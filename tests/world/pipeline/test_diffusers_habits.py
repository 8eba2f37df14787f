"""MiragePipeline behaves as diffusers' own tests ask of a pipeline: arguments, saving, callbacks, LoRA, parts of it."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import generation
import pytest
import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline
from generation import LATENT, SIZE, options
from peft import LoraConfig
from PIL import Image
from torch import Tensor

import mirage.pipeline.pipeline
from mirage.models.lora import save_lora
from mirage.pipeline import MEMORIES, MemoryConfig, MiragePipeline
from mirage.pipeline.memory import fit_memory, resolve_memory


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


@pytest.fixture(scope="module")
def pipe() -> MiragePipeline:
    return generation.make_pipeline()


def latents(pipe: MiragePipeline, num_frames: int = 5, **changes: Any) -> Tensor:
    return pipe(**options(num_frames, **changes)).frames


# Arguments.


def test_the_call_names_every_option_in_diffusers_order() -> None:
    ours = inspect.signature(MiragePipeline.__call__).parameters
    theirs = inspect.signature(WanImageToVideoPipeline.__call__).parameters
    unsupported = {"guidance_scale_2", "num_videos_per_prompt", "image_embeds", "last_image"}
    positional = [name for name, one in ours.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert positional == [name for name in theirs if name not in unsupported]
    assert not any(one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL) for one in ours.values())
    # A session takes the same, but for what only a whole video has, with the same defaults.
    session = inspect.signature(MiragePipeline.start_session).parameters
    whole = {"output_type", "return_dict", "cameras", "chunk_frames", "callback_on_chunk_end"}
    assert set(session) == set(ours) - whole
    assert all(ours[name].default == one.default for name, one in session.items())
    documented = MiragePipeline.__call__.__doc__ or ""
    assert all(f"{name}" in documented for name in ours if name != "self")


def test_the_example_of_the_docstring_runs(
    pipe: MiragePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("my-pipeline")
    Image.new("RGB", SIZE[::-1], (90, 120, 60)).save("room.png")
    lines = [line.strip() for line in (MiragePipeline.__call__.__doc__ or "").splitlines()]
    code = "\n".join(line.removeprefix(">>>").strip() for line in lines if line.startswith(">>>"))
    for long, short in (
        ('.to("cuda")', ""),
        ("bfloat16", "float32"),
        ("97", "5"),
        ("cameras=", "num_inference_steps=1, cameras="),
    ):
        assert long in code
        code = code.replace(long, short)
    names: dict[str, Any] = {}
    exec(compile(code, "example", "exec"), names)
    assert len(names["output"].frames[0]) == 5 and Path("orbit.mp4").stat().st_size > 0


@pytest.mark.slow
def test_latents_that_are_given_are_the_noise(pipe: MiragePipeline) -> None:
    """The noise that a generator draws chunk by chunk, given as one tensor, makes the same video."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(1, 48, count, *LATENT, generator=generator) for count in (3, 3)]
    noise = torch.cat([drawn[0], drawn[1][:, :, 1:]], dim=2)  # the shared frame of a later chunk carries none
    expected = latents(pipe, 17)
    assert torch.equal(latents(pipe, 17, latents=noise, generator=None), expected)
    assert not torch.equal(latents(pipe, 17, latents=noise.flip(2)), expected)
    for wrong, message in (
        (noise[:, :, :4], r"latents must be \(1, 48, 5, 4, 6\) float, got \(1, 48, 4, 4, 6\)"),
        (noise[:, :47], "got \\(1, 47, 5, 4, 6\\)"),
        (noise.long(), r"latents must be \(1, 48, 5, 4, 6\) float, got Tensor"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            latents(pipe, 17, latents=wrong)
    session = pipe.start_session(**_session_options(17), latents=noise[:, :, :3])
    views = generation.cameras(17)
    session.step(views[:9])
    with pytest.raises(ValueError, match="latents must hold 5 frames by now, got 3"):
        session.step(views[9:])
    prepared = pipe.prepare_latents(
        1, 48, *SIZE, 9, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(1)
    )
    assert torch.equal(prepared, drawn[0])


def _session_options(num_frames: int) -> dict[str, Any]:
    return {
        name: value
        for name, value in options(num_frames).items()
        if name not in ("cameras", "chunk_frames", "output_type")
    }


def test_inputs_are_checked_by_name(pipe: MiragePipeline) -> None:
    pipe.check_inputs("a room", None, *SIZE)
    with pytest.raises(ValueError, match="height and width must be positive multiples of 32 and 32, got 65 and 96"):
        pipe.check_inputs("a room", None, 65, 96)
    with pytest.raises(TypeError, match='attention_kwargs must be a dict such as {"scale": 0.5} or None, got float'):
        latents(pipe, attention_kwargs=0.5)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'cameras'"):
        pipe(options(5)["image"], "a room")


def test_what_is_ignored_is_said(pipe: MiragePipeline, caplog: pytest.LogCaptureFixture) -> None:
    assert mirage.pipeline.pipeline.logger.name == "mirage.pipeline.pipeline"
    with caplog.at_level(logging.INFO, "mirage.pipeline.pipeline"):
        pipe.start_session(**_session_options(5), negative_prompt="rain").close()
        assert "negative_prompt is ignored: guidance_scale is 1.0, not above 1" in caplog.text
        image = torch.zeros(3, 67, 99)
        pipe.start_session(
            **_session_options(5) | {"image": image, "depth": torch.ones(67, 99), "num_frames": None}
        ).close()
        assert "the image of 67x99 is cropped to 64x96 about its centre for frames of 64x96" in caplog.text


# Which memory.


def test_memory_configs_refuse_what_does_not_exist() -> None:
    for values, message in (
        ({"kind": "voxel"}, "kind must be one of latent, pixel, none, got 'voxel'"),
        ({"readout": "soft"}, "readout must be one of aligned, nearest, got 'soft'"),
        ({"write_policy": "all"}, "write_policy must be one of bounded, append, got 'all'"),
        ({"mode": "guide"}, "mode must be one of None, adapter, none, got 'guide'"),
        ({"kind": "pixel"}, 'readout must be "aligned" and write_policy "append" with kind "pixel"'),
    ):
        with pytest.raises(ValueError, match=message):
            MemoryConfig(**values)
    assert list(MEMORIES) == ["none", "nearest", "aligned", "pixel"]
    assert resolve_memory("aligned") == MemoryConfig() and resolve_memory(MEMORIES["pixel"]) is MEMORIES["pixel"]


def test_memories_are_fitted_to_adapter_and_cache() -> None:
    assert fit_memory(None, "memory") == MemoryConfig(mode="adapter")
    assert fit_memory(None) == MemoryConfig(mode="none")
    assert fit_memory(None, "rays") == MemoryConfig(kind="none", mode="adapter")
    assert fit_memory(None, "memory", "append").write_policy == "append"
    assert fit_memory(MemoryConfig(mode="none"), "memory").mode == "none"
    with pytest.raises(ValueError, match="memory must be none with an adapter of control rays, .*, got 'nearest'"):
        fit_memory("nearest", "rays")
    with pytest.raises(ValueError, match='memory must have mode "none" with a pipeline without memory_adapter'):
        fit_memory(MemoryConfig(mode="adapter"))
    with pytest.raises(ValueError, match='cache must have write_policy "bounded" like memory, got "append"'):
        fit_memory("aligned", "memory", "append")


@pytest.mark.slow
def test_a_memory_of_mode_none_is_written_and_not_used(pipe: MiragePipeline) -> None:
    used, unused = (pipe(**options(9, memory=MemoryConfig(mode=mode))) for mode in ("adapter", "none"))
    assert not torch.equal(used.frames, unused.frames) and len(unused.cache) > 24
    assert torch.equal(unused.frames, latents(pipe, 9, memory_scale=0.0))


# Saving, and parts of a pipeline.


def test_dict_and_tuple_outputs_are_equal(pipe: MiragePipeline) -> None:
    (frames,) = pipe(**options(5, return_dict=False))
    assert torch.equal(frames, latents(pipe))


def test_generator_decides(pipe: MiragePipeline) -> None:
    one, again, other = (latents(pipe, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_number_of_steps_is_kept(pipe: MiragePipeline) -> None:
    for steps in (1, 3):
        latents(pipe, num_inference_steps=steps)
        assert pipe.num_timesteps == steps


def test_components_make_another_pipeline(pipe: MiragePipeline) -> None:
    parts = pipe.components
    named = {name for name in inspect.signature(MiragePipeline.__init__).parameters if name != "self"}
    assert set(parts) == named
    other = MiragePipeline(**parts)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(latents(other), latents(pipe))


def test_parts_can_be_used_alone(pipe: MiragePipeline) -> None:
    """Prompts encoded by one pipeline, and video made by another one that has no text encoder."""
    parts = pipe.components
    texts = {name: parts[name] if name in ("tokenizer", "text_encoder") else None for name in parts}
    others = {name: None if name in ("tokenizer", "text_encoder") else part for name, part in parts.items()}
    with torch.no_grad():
        embeds, negative = MiragePipeline(**texts).encode_prompt("a room", "rain", max_sequence_length=64)
    alone = MiragePipeline(**others)
    alone.set_progress_bar_config(disable=True)
    found = latents(alone, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative, guidance_scale=3.0)
    expected = latents(pipe, negative_prompt="rain", guidance_scale=3.0, max_sequence_length=64)
    assert torch.equal(found, expected)


def test_optional_components_may_be_left_out_and_saved(pipe: MiragePipeline, tmp_path: Path) -> None:
    parts = pipe.components | {"memory_adapter": None, "latent_depth": None}
    bare = MiragePipeline(**parts)
    bare.save_pretrained(tmp_path)
    loaded = MiragePipeline.from_pretrained(tmp_path)
    assert loaded.memory_adapter is None and loaded.latent_depth is None
    for one in (bare, loaded):
        one.set_progress_bar_config(disable=True)
    assert torch.equal(latents(loaded), latents(bare))


def test_dtype_and_variants(tmp_path: Path) -> None:
    pipe = generation.make_pipeline()
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert list(tmp_path.glob("transformer/*fp16*"))
    loaded = MiragePipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.bfloat16)
    models = [part for part in loaded.components.values() if isinstance(part, torch.nn.Module)]
    assert {model.dtype for model in models} == {torch.bfloat16}
    assert loaded.to(torch.float32).transformer.dtype == loaded.dtype == torch.float32
    with pytest.raises(ValueError, match="variant"):
        MiragePipeline.from_pretrained(tmp_path, variant="no-such")


def test_dtypes_that_do_not_go_together_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = generation.make_pipeline()
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda *_, **__: pytest.fail("worked"))
    pipe.transformer.to(torch.bfloat16)
    with pytest.raises(
        ValueError,
        match="memory_adapter must be bfloat16 like the transformer, which calls it, got float32: load both with"
        r" dtype=torch.bfloat16, or call pipe.memory_adapter.to\(torch.bfloat16\)",
    ):
        latents(pipe)
    monkeypatch.undo()
    assert latents(pipe, memory=MemoryConfig(mode="none")).isfinite().all()  # which calls no adapter
    with torch.autocast("cpu", torch.bfloat16):
        assert latents(pipe).isfinite().all()
    for model in (pipe.transformer, pipe.memory_adapter, pipe.latent_depth):  # beside VAE and text encoder in float32
        model.to(torch.bfloat16)
    assert latents(pipe, depth=None).isfinite().all()
    double = generation.make_pipeline()
    for model in (double.transformer, double.memory_adapter):
        model.to(torch.float64)
    torch.testing.assert_close(latents(double), latents(generation.make_pipeline()), rtol=0, atol=1e-4)


def test_compiled_models_are_the_models_that_they_were(pipe: MiragePipeline, tmp_path: Path) -> None:
    """A run begun with compiled models is resumed with plain ones."""
    compiled = generation.make_pipeline()
    for name in ("transformer", "memory_adapter", "vae"):
        setattr(compiled, name, torch.compile(getattr(compiled, name), backend="eager"))
    begun = latents(compiled, run_dir=tmp_path, num_inference_steps=1)
    assert torch.equal(latents(pipe, run_dir=tmp_path, num_inference_steps=1, resume=True), begun)
    assert MiragePipeline(**compiled.components).transformer is compiled.transformer


def test_diffusion_pipeline_finds_the_class(pipe: MiragePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is MiragePipeline
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents(loaded), latents(pipe))


# Callbacks and progress.


def test_callbacks_may_return_nothing_and_no_nonsense(pipe: MiragePipeline) -> None:
    seen: list[int] = []
    assert torch.equal(latents(pipe, callback_on_step_end=lambda _, i, *__: seen.append(i)), latents(pipe))
    assert seen == [0, 1]
    for given, message in (
        (torch.zeros(1), "callback_on_step_end must return a dict of the tensors that it changes, or None, got Tensor"),
        ({"latents": torch.zeros(1)}, r"must return latents of shape \(1, 48, 2, 4, 6\), got \(1,\)"),
        ({"latents": None}, r"must return latents of shape \(1, 48, 2, 4, 6\), got NoneType"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            latents(pipe, callback_on_step_end=lambda *_, given=given: given)
    spoil = {"latents": torch.full((1, 48, 2, *LATENT), float("nan"))}
    with pytest.raises(ValueError, match="first in what callback_on_step_end gave"):
        latents(pipe, num_inference_steps=1, callback_on_step_end=lambda *_: spoil)


@pytest.mark.parametrize("given, got", [(1, r"1: pass torch.Generator\(\).manual_seed\(1\)"), ("seed", "str")])
def test_generators_are_generators(pipe: MiragePipeline, given: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"generator must be one torch.Generator, got {got}"):
        latents(pipe, generator=given)


def test_callbacks_may_see_every_tensor_and_change_guidance(pipe: MiragePipeline) -> None:
    seen: list[set[str]] = []

    def look(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(set(tensors))
        pipeline._guidance_scale += 1.0
        return tensors

    names = pipe._callback_tensor_inputs
    latents(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names, guidance_scale=2.0)
    assert seen == [set(names)] * 2 and pipe.guidance_scale == 2.0 + pipe.num_timesteps


def test_progress_bars_can_be_shown_and_hidden(pipe: MiragePipeline, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        pipe.set_progress_bar_config(disable=False)
        latents(pipe)
        assert "2/2" in capfd.readouterr().err
    finally:
        pipe.set_progress_bar_config(disable=True)
    latents(pipe)
    assert "2/2" not in capfd.readouterr().err


# LoRA.


@pytest.mark.slow
def test_attention_kwargs_scale_a_lora_at_call(tmp_path: Path) -> None:
    pipe = generation.make_pipeline()
    plain = latents(pipe)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    trained = generation.make_pipeline()
    torch.manual_seed(0)
    trained.transformer.add_adapter(config)
    path = tmp_path / "lora.safetensors"
    save_lora(trained.transformer, path)
    pipe.load_lora_weights(pretrained_model_name_or_path_or_dict=path)
    whole = latents(pipe)
    assert not torch.equal(whole, plain)
    assert torch.equal(latents(pipe, attention_kwargs={"scale": 1.0}), whole)
    torch.testing.assert_close(latents(pipe, attention_kwargs={"scale": 0.0}), plain, rtol=0, atol=1e-5)
    half = latents(pipe, attention_kwargs={"scale": 0.5})
    assert not torch.equal(half, whole) and pipe.attention_kwargs == {"scale": 0.5}
    pipe.set_adapters("default_0", 0.5)
    torch.testing.assert_close(latents(pipe), half, rtol=0, atol=1e-5)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), plain)
    with pytest.raises(ValueError, match="nothing loaded"):
        pipe.load_lora_weights({"nothing.of.this": torch.zeros(1)})


# What is imported.


@pytest.mark.slow
def test_plans_and_memories_need_no_diffusers() -> None:
    code = """
import sys
import mirage.pipeline.chunks
from mirage.pipeline import MEMORIES, MemoryConfig
assert MEMORIES["aligned"] == MemoryConfig()
assert not {"diffusers", "transformers"} & set(sys.modules)
from mirage.pipeline import MiragePipeline
assert MiragePipeline.__module__ == "mirage.pipeline.pipeline" and "MiragePipeline" in dir(mirage.pipeline)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

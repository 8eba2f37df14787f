"""`MirageMemoryAdapter`: what it computes, how it starts, and that it is saved and loaded whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from test_transformer import (
    KEPT_IN_FLOAT32,
    Golden,
    assert_same_weights,
    memory_context,
    public_config,
    read_golden,
    relative_error,
    run,
    tiny_adapter,
    tiny_transformer,
    video_inputs,
    with_memory,
)
from torch import Tensor, nn

from mirage.models.adapter import MirageMemoryAdapter
from mirage.models.checkpoints import load_published
from mirage.models.transformer import MirageTransformer3DModel


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)  # of models so small, more threads only wait for one another


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> Golden:
    return read_golden(shared_dir)


def adapter_inputs(frames: int = 4, batch: int = 1, channels: int = 96) -> dict[str, Tensor]:
    """Arguments of a forward pass for 4 x 6 latents, 2 x 3 tokens a frame."""
    generator = torch.Generator().manual_seed(4)
    return {
        "hidden_states": torch.randn(batch, frames * 6, 48, generator=generator),
        "memory_context": torch.randn(batch, channels, frames, 4, 6, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 7, 48, generator=generator),
        "temb": torch.randn(batch, frames, 6, 48, generator=generator),
    }


# What it computes


@torch.no_grad()
def by_hand(adapter: MirageMemoryAdapter, inputs: dict[str, Tensor]) -> list[Tensor]:
    """VACE, from stock blocks: embed, project, add the backbone's tokens; after each block a projection is the hint."""
    state = adapter.state_dict()
    per_token = inputs["temb"].repeat_interleave(inputs["hidden_states"].shape[1] // inputs["temb"].shape[1], dim=1)
    rotary_emb = WanRotaryPosEmbed(24, (1, 2, 2), 1024)(inputs["memory_context"])
    embedded = nn.functional.conv3d(
        inputs["memory_context"], state["patch_embedding.weight"], state["patch_embedding.bias"], stride=(1, 2, 2)
    )
    tokens = embedded.flatten(2).transpose(1, 2)
    tokens = nn.functional.linear(tokens, state["proj_in.weight"], state["proj_in.bias"]) + inputs["hidden_states"]
    hints = []
    for number in range(len(adapter.config.memory_layers)):
        block = WanTransformerBlock(48, 96, 2, "rms_norm_across_heads", True)
        start = f"blocks.{number}."
        block.load_state_dict({name[len(start) :]: value for name, value in state.items() if name.startswith(start)})
        tokens = block(tokens, inputs["encoder_hidden_states"], per_token, rotary_emb)
        hints.append(nn.functional.linear(tokens, state[f"proj_out.{number}.weight"], state[f"proj_out.{number}.bias"]))
    return hints


@pytest.mark.parametrize(("control_channels", "batch"), [(96, 1), (49, 2)])
def test_hints_are_those_of_vace(control_channels: int, batch: int) -> None:
    adapter = tiny_adapter(tiny_transformer(), control_channels=control_channels, memory_layers=(0, 1, 3))
    inputs = adapter_inputs(batch=batch, channels=control_channels)
    with torch.no_grad():
        hints = adapter(**inputs)
    assert [hint.shape for hint in hints] == [(batch, 24, 48)] * 3
    torch.testing.assert_close(list(hints), by_hand(adapter, inputs), atol=1e-6, rtol=0)


def test_published_hints_make_the_published_output(golden: Golden, tmp_path: Path) -> None:
    """Through an adapter saved and loaded, so that nothing of it lives outside its files."""
    transformer, adapter = load_published(golden.transformer(), dit=golden.base(), vace=golden.part("vace"))
    adapter.save_pretrained(tmp_path)
    loaded = MirageMemoryAdapter.from_pretrained(tmp_path)
    for case in range(3):
        output = run(transformer, golden.inputs(case), **golden.memory(case, loaded))
        torch.testing.assert_close(output, golden.tensors[f"case{case}.output"], atol=1e-5, rtol=0)


# How it starts


def test_from_transformer_starts_where_the_backbone_is() -> None:
    """The first adapter block sees what the backbone's first block sees, so that their outputs are the same bits."""
    transformer = tiny_transformer()
    adapter = MirageMemoryAdapter.from_transformer(transformer)
    outputs: dict[str, Tensor] = {}
    for name, model in (("backbone", transformer), ("adapter", adapter)):
        model.blocks[0].register_forward_hook(lambda *call, name=name: outputs.update({name: call[2]}))
    inputs = video_inputs(references=0)
    run(transformer, with_memory(inputs, adapter))
    assert torch.equal(outputs["adapter"], outputs["backbone"])
    with torch.no_grad():
        assert not any(hint.any() for hint in adapter(**adapter_inputs()))


@pytest.mark.parametrize("control_channels", [96, 49])
@pytest.mark.parametrize(("memory_layers", "expected"), [(None, [0, 2]), ((1, 2, 3), [1, 2, 3])])
def test_from_transformer_copies(control_channels: int, memory_layers: Any, expected: list[int]) -> None:
    transformer = tiny_transformer()
    adapter = MirageMemoryAdapter.from_transformer(transformer, control_channels, memory_layers)
    assert adapter.config.memory_layers == expected
    for name in ("patch_size", "num_attention_heads", "attention_head_dim", "ffn_dim", "eps", "qk_norm"):
        assert adapter.config[name] == transformer.config[name]
    for block, layer in zip(adapter.blocks, expected, strict=True):
        assert_same_weights(block, transformer.blocks[layer])
        assert all(parameter.requires_grad for parameter in block.parameters())
    assert torch.equal(adapter.patch_embedding.weight[:, :48], transformer.patch_embedding.weight)
    assert torch.equal(adapter.patch_embedding.bias, transformer.patch_embedding.bias)
    assert not adapter.patch_embedding.weight[:, 48:].any()
    assert adapter.patch_embedding.weight.shape[1] == control_channels
    with torch.no_grad():  # copies: training one leaves the other as it is
        for parameter in adapter.parameters():
            parameter.add_(1)
    assert_same_weights(transformer, tiny_transformer())


def test_from_transformer_takes_over_the_dtypes(tmp_path: Path) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    transformer = MirageTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    adapter = MirageMemoryAdapter.from_transformer(transformer)
    for name, parameter in adapter.named_parameters():
        kept = any(part in KEPT_IN_FLOAT32 for part in name.split("."))
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    assert adapter.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control_channels": 48}, r"control_channels must be 96 \(scores\) or 49 \(visibility\).*48 channels, got 48"),
        ({"memory_layers": (0, 4)}, r"memory_layers must be blocks 0 to 3, got \[0, 4\]"),
        ({"memory_layers": (-1, 2)}, r"memory_layers must be blocks 0 to 3, got \[-1, 2\]"),
        ({"memory_layers": ()}, r"memory_layers must be one or more ascending block numbers, got \[\]"),
        ({"memory_layers": (2, 1)}, r"memory_layers must be one or more ascending block numbers, got \[2, 1\]"),
        ({"memory_layers": (1, 1)}, r"memory_layers must be one or more ascending block numbers, got \[1, 1\]"),
    ],
)
def test_adapters_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MirageMemoryAdapter.from_transformer(tiny_transformer(), **options)


@pytest.mark.parametrize(
    ("control_channels", "conditioning", "latent_channels"), [(96, "scores", 48), (49, "mask", 48), (17, "mask", 16)]
)
def test_what_follows_the_read_out(control_channels: int, conditioning: str, latent_channels: int) -> None:
    adapter = MirageMemoryAdapter(control_channels, (0,), num_attention_heads=2, attention_head_dim=24, ffn_dim=96)
    assert (adapter.conditioning, adapter.latent_channels) == (conditioning, latent_channels)


def test_a_new_adapter_gives_zero_hints() -> None:
    adapter = MirageMemoryAdapter(96, (0, 1), num_attention_heads=2, attention_head_dim=24, ffn_dim=96)
    with torch.no_grad():
        assert not any(hint.any() for hint in adapter(**adapter_inputs()))


def test_training_starts_at_the_output_projections() -> None:
    """From zero outputs and a zero `proj_in`, gradients reach one step further back each step."""
    transformer = tiny_transformer().requires_grad_(False)
    adapter = MirageMemoryAdapter.from_transformer(transformer)
    inputs = with_memory(video_inputs(references=1), adapter)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    everything = {name for name, _ in adapter.named_parameters()}
    outputs, embedding = ({name for name in everything if name.startswith(part)} for part in ("proj_out.", "patch_emb"))
    for expected in (outputs, everything - embedding, everything):
        optimizer.zero_grad()
        transformer(**inputs).sample.square().mean().backward()
        assert {name for name, parameter in adapter.named_parameters() if parameter.grad.any()} == expected
        optimizer.step()


# Saving, loading, precision


def test_saved_and_loaded_to_the_same_bits(tmp_path: Path) -> None:
    transformer = tiny_transformer()
    adapter = tiny_adapter(transformer, control_channels=49, memory_layers=(1, 3))
    adapter.save_pretrained(tmp_path)
    loaded = MirageMemoryAdapter.from_pretrained(tmp_path)
    assert_same_weights(loaded, adapter)
    assert public_config(loaded) == {**public_config(adapter), "patch_size": [1, 2, 2]}
    inputs = video_inputs(references=1)
    context = memory_context(inputs, 49)
    outputs = [run(transformer, inputs, memory_adapter=one, memory_context=context) for one in (adapter, loaded)]
    assert torch.equal(*outputs)


def test_bfloat16_is_close_and_keeps_the_modulation_in_float32(tmp_path: Path) -> None:
    adapter = tiny_adapter(tiny_transformer())
    inputs = adapter_inputs()
    with torch.no_grad():
        expected = adapter(**inputs)
    adapter.save_pretrained(tmp_path)
    low = MirageMemoryAdapter.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for name, parameter in low.named_parameters():
        kept = any(part in KEPT_IN_FLOAT32 for part in name.split("."))
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    with torch.no_grad():
        hints = low(**{name: value.bfloat16() for name, value in inputs.items()})
    for hint, exact in zip(hints, expected, strict=True):
        assert hint.dtype == torch.bfloat16
        assert relative_error(hint, exact) < 0.02  # measured 0.006


def test_memory_context_may_have_another_dtype() -> None:
    """The cache stores bfloat16 or float32, whatever the model runs in."""
    adapter = tiny_adapter(tiny_transformer())
    inputs = adapter_inputs()
    inputs["memory_context"] = inputs["memory_context"].bfloat16()
    with torch.no_grad():
        hints = adapter(**inputs)
        same = adapter(**{**inputs, "memory_context": inputs["memory_context"].float()})
    assert all(torch.equal(one, other) for one, other in zip(hints, same, strict=True))


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_context": torch.zeros(1, 49, 4, 4, 6)}, r"memory_context must be \(B, 96, F, h, w\).*got \(1, 49, 4"),
        (
            {"memory_context": torch.zeros(96, 4, 4, 6)},
            r"memory_context must be \(B, 96, F, h, w\).*got \(96, 4, 4, 6\)",
        ),
        ({"hidden_states": torch.zeros(1, 24, 64)}, "hidden_states must be 48 wide.*another backbone, got 64"),
        ({"memory_context": torch.zeros(1, 96, 3, 4, 6)}, r"1 x 4 frames, 24 tokens\), got 1 x 3 frames, 18 tokens"),
        ({"memory_context": torch.zeros(1, 96, 4, 4, 8)}, r"1 x 4 frames, 24 tokens\), got 1 x 4 frames, 32 tokens"),
        ({"memory_context": torch.zeros(2, 96, 4, 4, 6)}, r"1 x 4 frames, 24 tokens\), got 2 x 4 frames, 24 tokens"),
        ({"memory_context": torch.zeros(1, 96, 2, 8, 6)}, r"1 x 4 frames, 24 tokens\), got 1 x 2 frames, 24 tokens"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_adapter(tiny_transformer())(**{**adapter_inputs(), **change})


def test_references_are_not_in_the_memory_context() -> None:
    transformer = tiny_transformer()
    inputs = video_inputs(frames=5, references=2)
    context = torch.zeros(1, 96, 5, 4, 6)
    with pytest.raises(ValueError, match=r"target and preceding frames.*1 x 3 frames.*got 1 x 5 frames"):
        run(transformer, inputs, memory_adapter=tiny_adapter(transformer), memory_context=context)

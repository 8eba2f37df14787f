"""`MirageTransformer3DModel`: held to the published code's outputs, to diffusers' own blocks, and to formulas.

The tiny models made here also serve the tests of the adapter and of the checkpoints.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    ContextParallelConfig,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    WanTransformer3DModel,
)
from diffusers.hooks import SeaCacheConfig, apply_first_block_cache, apply_mag_cache, apply_sea_cache
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn

from mirage.models.adapter import MirageMemoryAdapter
from mirage.models.blocks import FrameIndex, MirageRotaryPosEmbed, MirageTransformerBlock
from mirage.models.checkpoints import PublishedModels, load_published
from mirage.models.transformer import MirageTransformer3DModel

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 4,
}
# What keeps the modulation, and so the output, exact in bfloat16.
KEPT_IN_FLOAT32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")


def roughen(model: Any, seed: int = 0) -> Any:
    """The model in evaluation mode with no weight left at 0 or 1, where a mistake would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tiny_transformer(seed: int = 0, **changes: Any) -> MirageTransformer3DModel:
    torch.manual_seed(seed)
    return roughen(MirageTransformer3DModel(**{**TINY, **changes}), seed)


def tiny_adapter(transformer: MirageTransformer3DModel, seed: int = 1, **options: Any) -> MirageMemoryAdapter:
    """An adapter as if trained: none of its hints are zero."""
    return roughen(MirageMemoryAdapter.from_transformer(transformer, **options), seed)


def video_inputs(
    frames: int = 5,
    references: int = 0,
    size: tuple[int, int] = (4, 6),
    batch: int = 1,
    channels: int = 48,
    seed: int = 2,
) -> dict[str, Tensor | int]:
    """Arguments of a forward pass: clean references and first frame, noise behind it."""
    generator = torch.Generator().manual_seed(seed)
    timestep = torch.full((batch, frames), 700.0)
    timestep[:, : references + 1] = 0
    return {
        "hidden_states": torch.randn(batch, channels, frames, *size, generator=generator),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(batch, 7, 32, generator=generator),
        "num_reference_frames": references,
    }


def memory_context(inputs: dict[str, Any], channels: int = 96, seed: int = 3) -> Tensor:
    batch, _, frames, *size = inputs["hidden_states"].shape
    shape = (batch, channels, frames - inputs["num_reference_frames"], *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_memory(inputs: dict[str, Any], adapter: Any) -> dict[str, Any]:
    return {**inputs, "memory_adapter": adapter, "memory_context": memory_context(inputs)}


@torch.no_grad()
def run(transformer: nn.Module, inputs: dict[str, Any], **changes: Any) -> Tensor:
    return transformer(**{**inputs, **changes}, return_dict=False)[0]


class Golden(NamedTuple):
    """A tiny model of the published code: weights under its names, and inputs and outputs of three cases.

    The stored backbone has the LoRA merged into it (base + B A). `output` and `output_without_memory` were made without
    the LoRA and case 0's `output_with_lora` with it, so that the base weights are the stored ones less B A.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """Weights of "dit" (with the LoRA merged), "vace" or "lora"."""
        return {
            key.removeprefix(f"{name}."): value for key, value in self.tensors.items() if key.startswith(f"{name}.")
        }

    def base(self) -> dict[str, Tensor]:
        """The backbone's weights with the LoRA taken out."""
        weights, lora = self.part("dit"), self.part("lora")
        for key, down in lora.items():
            if ".lora_A." in key:
                name = key.removeprefix("pipe.dit.").replace("lora_A.", "")
                weights[name] = weights[name] - lora[key.replace("lora_A", "lora_B")] @ down
        return weights

    def transformer(self) -> MirageTransformer3DModel:
        """A model of its shape, not yet with its weights."""
        named = {"num_attention_heads": "num_heads", "attention_head_dim": "head_dim"}
        return MirageTransformer3DModel(**{**TINY, **{key: self.config[named.get(key, key)] for key in SHAPE_KEYS}})

    def inputs(self, case: int) -> dict[str, Any]:
        tensors = self.tensors
        return {
            "hidden_states": tensors[f"case{case}.latents"],
            "timestep": tensors[f"case{case}.timestep"][None],
            "encoder_hidden_states": tensors[f"case{case}.context"],
            "num_reference_frames": self.config["cases"][case]["reference_frames"],
        }

    def memory(self, case: int, adapter: MirageMemoryAdapter | None) -> dict[str, Any]:
        return {"memory_adapter": adapter, "memory_context": self.tensors[f"case{case}.vace_context"]}


SHAPE_KEYS = ("num_attention_heads", "attention_head_dim", "text_dim", "freq_dim", "ffn_dim", "num_layers")


def read_golden(shared_dir: Path) -> Golden:
    path = shared_dir / "data" / "golden" / "transformer.safetensors"
    if not path.is_file():
        pytest.skip(f"shared data absent: no file {path}")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Golden(tensors, json.loads(file.metadata()["config"]))


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)  # of models so small, more threads only wait for one another


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> Golden:
    return read_golden(shared_dir)


@pytest.fixture(scope="module")
def published(golden: Golden) -> PublishedModels:
    return load_published(golden.transformer(), dit=golden.base(), vace=golden.part("vace"))


# Against the published code


@pytest.mark.parametrize("case", range(3))
def test_equals_the_published_model(golden: Golden, published: PublishedModels, case: int) -> None:
    transformer, adapter = published
    inputs = golden.inputs(case)
    with_it = run(transformer, inputs, **golden.memory(case, adapter))
    torch.testing.assert_close(with_it, golden.tensors[f"case{case}.output"], atol=1e-5, rtol=0)
    without = golden.tensors[f"case{case}.output_without_memory"]
    torch.testing.assert_close(run(transformer, inputs), without, atol=1e-5, rtol=0)
    assert (with_it - without).abs().max() > 0.1  # far from a difference that the tolerance could hide


def test_golden_backbone_has_the_lora_merged(golden: Golden) -> None:
    """The claim that `Golden.base` rests on: as stored, the weights give the output with the LoRA."""
    merged = load_published(golden.transformer(), dit=golden.part("dit"), vace=golden.part("vace"))
    output = run(merged.transformer, golden.inputs(0), **golden.memory(0, merged.adapter))
    torch.testing.assert_close(output, golden.tensors["case0.output_with_lora"], atol=1e-5, rtol=0)
    assert (output - golden.tensors["case0.output"]).abs().max() > 0.01


def test_lora_on_the_base_equals_the_published_model(golden: Golden) -> None:
    models = load_published(golden.transformer(), dit=golden.base(), vace=golden.part("vace"), lora=golden.part("lora"))
    output = run(models.transformer, golden.inputs(0), **golden.memory(0, models.adapter))
    torch.testing.assert_close(output, golden.tensors["case0.output_with_lora"], atol=1e-5, rtol=0)


# Against diffusers


def block_pair() -> tuple[MirageTransformerBlock, WanTransformerBlock]:
    torch.manual_seed(0)
    stock = roughen(WanTransformerBlock(48, 96, 2, "rms_norm_across_heads", True))
    ours = MirageTransformerBlock(48, 96, 2, "rms_norm_across_heads", True)
    ours.load_state_dict(stock.state_dict())
    return ours.eval(), stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "frames", "tokens"), [(1, 1, 7), (2, 3, 6), (1, 5, 15)])
def test_one_modulation_a_frame_gives_the_stock_bits(dtype: torch.dtype, batch: int, frames: int, tokens: int) -> None:
    ours, stock = block_pair()
    for block in (ours, stock):
        for name, parameter in block.named_parameters():
            if not any(kept in name for kept in KEPT_IN_FLOAT32):
                parameter.data = parameter.data.to(dtype)
    hidden = torch.randn(batch, frames * tokens, 48).to(dtype)
    text = torch.randn(batch, 7, 48).to(dtype)
    temb = torch.randn(batch, frames, 6, 48).to(dtype)
    rope = tuple(torch.randn(2, 1, frames * tokens, 1, 24))
    with torch.no_grad():
        expected = stock(hidden, text, temb.repeat_interleave(tokens, dim=1), rope)
        assert torch.equal(ours(hidden, text, temb, rope), expected)
        index = FrameIndex()(frames, tokens, hidden.device)
        assert torch.equal(ours(hidden, text, temb, rope, index), expected)


def test_a_part_of_the_sequence_is_modulated_by_its_own_frames() -> None:
    """As context parallelism cuts it: in the middle of a frame. Attention is left out, as it sees the whole."""
    ours, _ = block_pair()
    for attention in (ours.attn1, ours.attn2):
        attention.forward = lambda hidden_states, *_: hidden_states
    hidden, text, temb = torch.randn(1, 18, 48), torch.randn(1, 7, 48), torch.randn(1, 3, 6, 48)
    rope = tuple(torch.randn(2, 1, 18, 1, 24))
    index = FrameIndex()(3, 6, hidden.device)
    assert index.tolist() == [[0] * 6 + [1] * 6 + [2] * 6]
    with torch.no_grad():
        whole = ours(hidden, text, temb, rope)
        parts = [ours(hidden[:, part], text, temb, rope, index[:, part]) for part in (slice(0, 9), slice(9, 18))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 2, 2), (1, 1, 1)])
def test_without_references_equals_the_stock_transformer(patch_size: tuple[int, int, int]) -> None:
    ours = tiny_transformer(patch_size=patch_size)
    stock = WanTransformer3DModel(**TINY, patch_size=patch_size).eval()
    stock.load_state_dict(ours.state_dict())
    inputs = video_inputs(frames=6, size=(6, 10), batch=2)
    tokens = 6 // patch_size[1] * 10 // patch_size[2]
    per_token = inputs["timestep"][:, :: patch_size[0]].repeat_interleave(tokens, dim=1)
    with torch.no_grad():
        expected = stock(inputs["hidden_states"], per_token, inputs["encoder_hidden_states"], return_dict=False)[0]
    # Not the same bits: the time embedding's matrix products have F rows here and one a token there.
    torch.testing.assert_close(run(ours, inputs), expected, atol=5e-6, rtol=0)


def test_loads_a_stock_folder_and_stock_loads_ours(tmp_path: Path) -> None:
    stock = roughen(WanTransformer3DModel(**TINY))
    stock.save_pretrained(tmp_path / "stock")
    ours = MirageTransformer3DModel.from_pretrained(tmp_path / "stock")
    assert_same_weights(ours, stock)
    reloaded = WanTransformer3DModel.from_pretrained(tmp_path / "stock")
    assert public_config(ours) == public_config(reloaded)
    ours.save_pretrained(tmp_path / "ours")
    assert_same_weights(WanTransformer3DModel.from_pretrained(tmp_path / "ours"), stock)
    inputs = video_inputs(references=2)
    assert torch.equal(run(MirageTransformer3DModel.from_pretrained(tmp_path / "ours"), inputs), run(ours, inputs))


def public_config(model: Any) -> dict[str, Any]:
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_config_round_trip() -> None:
    model = tiny_transformer(num_layers=3, patch_size=(1, 1, 1), cross_attn_norm=False)
    again = MirageTransformer3DModel.from_config(model.config)
    assert (len(again.blocks), again.config.num_layers, model.config.num_layers) == (3, 3, 3)
    assert dict(again.config) == dict(model.config)


@pytest.mark.parametrize("name", ["image_dim", "added_kv_proj_dim"])
def test_image_conditioning_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="image_dim and added_kv_proj_dim must be None.*got .*48"):
        MirageTransformer3DModel(**TINY, **{name: 48})


# Rotary embedding


@pytest.mark.parametrize(
    ("patch_size", "size", "references"),
    [((1, 2, 2), (7, 6, 10), 3), ((1, 1, 1), (4, 3, 5), 1), ((2, 2, 2), (8, 6, 2), 4), ((1, 2, 2), (3, 2, 2), 2)],
)
def test_references_have_negative_times_and_rows_below(
    patch_size: tuple[int, int, int], size: tuple[int, int, int], references: int
) -> None:
    """Against the formula, token by token: angle = position / 10000^(2k / d) of time, row and column in turn."""
    rope = MirageRotaryPosEmbed(24, patch_size, max_seq_len=64)
    cos, sin = rope(torch.empty(1, 48, *size), references)
    frames, rows, columns = (length // patch for length, patch in zip(size, patch_size, strict=True))
    assert cos.shape == sin.shape == (1, frames * rows * columns, 1, 24)
    expected = []
    for frame in range(frames):
        time = frame - references // patch_size[0]
        for row in range(rows):
            for column in range(columns):
                place = (time, row + rows if time < 0 else row, column)
                expected.append(np.concatenate([turns(at, 8) for at in place]))
    found = cos[0, :, 0].numpy() + 1j * sin[0, :, 0].numpy()
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-6)


def turns(position: int, dim: int) -> np.ndarray:
    """exp(i angle) of each channel pair, twice, complex128."""
    return np.exp(1j * position / 10000.0 ** (np.arange(0, dim, 2) / dim)).repeat(2)


@pytest.mark.parametrize(("patch_size", "size"), [((1, 2, 2), (5, 6, 10)), ((2, 1, 3), (4, 5, 9))])
def test_without_references_the_rotary_embedding_is_the_stock_one(
    patch_size: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    hidden = torch.empty(1, 48, *size)
    ours = MirageRotaryPosEmbed(24, patch_size, 64)(hidden)
    stock = WanRotaryPosEmbed(24, patch_size, 64)(hidden)
    assert all(torch.equal(one, other) for one, other in zip(ours, stock, strict=True))


# Hints


class FixedHints(nn.Module):
    """Stands in for an adapter: the hint of the n-th of its layers is n + 1 everywhere."""

    def __init__(self, memory_layers: tuple[int, ...]) -> None:
        super().__init__()
        self.config = type("Config", (), {"memory_layers": memory_layers})

    def forward(self, hidden_states: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.full_like(hidden_states, n + 1.0) for n in range(len(self.config.memory_layers)))


def added_after_blocks(transformer: MirageTransformer3DModel, inputs: dict[str, Any], **memory: Any) -> list[Tensor]:
    """What is added to the tokens between each block and what comes next, (B, L, D) a block."""
    entering: list[Tensor] = []
    leaving: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *call: leaving.append(call[2])) for block in transformer.blocks]
    handles += [
        module.register_forward_pre_hook(lambda _, call: entering.append(call[0]))
        for module in [*transformer.blocks[1:], transformer.norm_out]
    ]
    run(transformer, inputs, **memory)
    for handle in handles:
        handle.remove()
    return [after - before for before, after in zip(leaving, entering, strict=True)]


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("layers", [(0,), (3,), (1, 2), (0, 1, 2, 3)])
def test_hints_are_added_after_their_blocks_and_never_to_references(references: int, layers: tuple[int, ...]) -> None:
    transformer = tiny_transformer()
    inputs = video_inputs(references=references)
    added = added_after_blocks(transformer, inputs, **with_memory(inputs, FixedHints(layers)), memory_scale=0.5)
    reference_tokens = references * 6
    for number, difference in enumerate(added):
        expected = torch.zeros_like(difference)
        if number in layers:
            expected[:, reference_tokens:] = 0.5 * (layers.index(number) + 1)
        torch.testing.assert_close(difference, expected, atol=1e-5, rtol=0)
        assert torch.equal(difference[:, :reference_tokens], expected[:, :reference_tokens])


def test_the_first_hint_is_linear_in_the_scale() -> None:
    transformer = tiny_transformer()
    inputs = video_inputs(references=1)
    memory = with_memory(inputs, tiny_adapter(transformer))
    once, thrice = (added_after_blocks(transformer, inputs, **memory, memory_scale=scale)[0] for scale in (1.0, 3.0))
    assert once.abs().max() > 0.1
    torch.testing.assert_close(3 * once, thrice, atol=1e-5, rtol=1e-5)


def test_no_memory_zero_scale_and_a_new_adapter_are_the_same() -> None:
    transformer = tiny_transformer()
    inputs = video_inputs(references=2, batch=2)
    plain = run(transformer, inputs)
    fresh = MirageMemoryAdapter.from_transformer(transformer)
    assert torch.equal(run(transformer, with_memory(inputs, fresh)), plain)
    trained = tiny_adapter(transformer)
    assert torch.equal(run(transformer, with_memory(inputs, trained), memory_scale=0.0), plain)
    assert (run(transformer, with_memory(inputs, trained)) - plain).abs().max() > 0.1


def test_return_types() -> None:
    transformer, inputs = tiny_transformer(), video_inputs()
    with torch.no_grad():
        assert torch.equal(transformer(**inputs).sample, transformer(**inputs, return_dict=False)[0])


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(1, 48, 4, 6)}, r"hidden_states must be \(B, C, F, h, w\), got \(1, 48, 4, 6\)"),
        ({"hidden_states": torch.zeros(1, 16, 5, 4, 6)}, "hidden_states must have 48 channels, got 16"),
        ({"hidden_states": torch.zeros(1, 48, 5, 3, 6)}, r"multiples of .*1, 2, 2.*got \(5, 3, 6\)"),
        ({"hidden_states": torch.zeros(1, 48, 5, 4, 5)}, r"multiples of .*1, 2, 2.*got \(5, 4, 5\)"),
        ({"timestep": torch.zeros(1, 4)}, r"timestep must be \(B, F\) = \(1, 5\), one per frame, got \(1, 4\)"),
        ({"timestep": torch.zeros(3)}, r"timestep must be \(B, F\) = \(1, 5\), one per frame, got \(3,\)"),
        ({"num_reference_frames": 5}, r"num_reference_frames must be in \[0, 5\), a multiple of 1, got 5"),
        ({"num_reference_frames": -1}, r"num_reference_frames must be in \[0, 5\), a multiple of 1, got -1"),
        ({"memory_adapter": FixedHints((0,))}, "memory_context must be given with memory_adapter, got None"),
        ({"memory_context": torch.zeros(1)}, "memory_adapter must be given with memory_context, got None"),
        (
            {"memory_adapter": FixedHints((1, 4)), "memory_context": torch.zeros(1)},
            "memory_adapter must name blocks of this transformer, 0 to 3 in its memory_layers, got 4",
        ),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_transformer(), video_inputs(), **change)


def test_frames_and_references_are_multiples_of_the_patch() -> None:
    transformer = tiny_transformer(patch_size=(2, 2, 2))
    with pytest.raises(ValueError, match=r"multiples of .*2, 2, 2.*got \(5, 4, 6\)"):
        run(transformer, video_inputs(frames=5))
    with pytest.raises(ValueError, match="num_reference_frames must be .*multiple of 2.*got 1"):
        run(transformer, video_inputs(frames=6), num_reference_frames=1)


# Training


def test_gradient_checkpointing_changes_nothing() -> None:
    outcomes = []
    for checkpointing in (False, True):
        transformer = tiny_transformer()
        adapter = tiny_adapter(transformer)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
            adapter.enable_gradient_checkpointing()
        inputs = video_inputs(references=1)
        output = transformer(**with_memory(inputs, adapter)).sample
        output.square().mean().backward()
        gradients = [parameter.grad for model in (transformer, adapter) for parameter in model.parameters()]
        outcomes.append([output.detach(), *gradients])
    assert all(gradient is not None and gradient.any() for gradient in outcomes[0])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_lora_is_added_trained_and_scaled() -> None:
    transformer = tiny_transformer()
    inputs = video_inputs(references=1)
    plain = run(transformer, inputs)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "net.2"]))
    assert torch.equal(run(transformer, inputs), plain)  # B starts at zero
    trained = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4 * 5 * 2 and all(".lora_" in name for name in trained)
    transformer(**inputs).sample.square().mean().backward()
    assert transformer.blocks[0].attn1.to_q.lora_B["default"].weight.grad.any()
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    full = run(transformer, inputs)
    assert (full - plain).abs().max() > 0.05
    half = run(transformer, inputs, attention_kwargs={"scale": 0.5})
    assert min((half - full).abs().max(), (half - plain).abs().max()) > 0.01
    assert torch.equal(run(transformer, inputs, attention_kwargs={"scale": 0.0}), plain)
    assert torch.equal(run(transformer, inputs), full)  # the scale was for one call


# Precision and memory


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def test_bfloat16_is_close_and_keeps_the_modulation_in_float32(tmp_path: Path) -> None:
    transformer = tiny_transformer()
    inputs = video_inputs(references=2)
    memory = with_memory(inputs, tiny_adapter(transformer))
    expected = run(transformer, memory)
    transformer.save_pretrained(tmp_path)
    low = MirageTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for name, parameter in low.named_parameters():
        kept = any(part in KEPT_IN_FLOAT32 for part in name.split("."))
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    halved = {
        name: value.bfloat16() if name in ("hidden_states", "encoder_hidden_states") else value
        for name, value in inputs.items()
    }
    adapter = tiny_adapter(transformer).to(torch.bfloat16)
    output = run(low, halved, memory_adapter=adapter, memory_context=memory["memory_context"])
    assert output.dtype == torch.bfloat16
    assert relative_error(output, expected) < 0.02  # measured 0.007


def test_layerwise_casting_to_float8() -> None:
    transformer = tiny_transformer()
    adapter = tiny_adapter(transformer)
    inputs = with_memory(video_inputs(references=2), adapter)
    expected = run(transformer, inputs)
    for model in (transformer, adapter):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert model.blocks[0].ffn.net[2].weight.dtype == torch.float8_e4m3fn
        assert model.blocks[0].scale_shift_table.dtype == torch.float32
    assert 0 < relative_error(run(transformer, inputs), expected) < 0.04  # measured 0.012


@pytest.mark.parametrize(
    "how", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offloading_changes_nothing(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = tiny_transformer()
    adapter = tiny_adapter(transformer)
    inputs = with_memory(video_inputs(references=2), adapter)
    expected = run(transformer, inputs)
    for model in (transformer, adapter):
        model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **how)
    monkeypatch.setattr(adapter, "to", lambda *_, **__: pytest.fail("the transformer's hooks moved the adapter"))
    assert torch.equal(run(transformer, inputs), expected)


# Caches


SKIPPING = [
    (FirstBlockCacheConfig(), apply_first_block_cache),
    (MagCacheConfig(num_inference_steps=4, calibrate=True), apply_mag_cache),
    (SeaCacheConfig(), apply_sea_cache),
]


@pytest.mark.parametrize(("config", "apply"), SKIPPING, ids=lambda value: type(value).__name__)
def test_caches_that_skip_blocks_are_refused(config: Any, apply: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = tiny_transformer()
    with pytest.raises(ValueError, match=f"{type(config).__name__} skips whole blocks.*memory hints"):
        transformer.enable_cache(config)
    assert not transformer.is_cache_enabled
    with pytest.raises(ValueError, match="MirageTransformerBlock.* not registered"):
        apply(transformer, config)
    # Registered by hand, as diffusers' documentation tells, the cache can be put on: then the memory is refused.
    blocks = dict(TransformerBlockRegistry._registry)
    monkeypatch.setattr(TransformerBlockRegistry, "_registry", blocks)
    TransformerBlockRegistry.register(
        MirageTransformerBlock, replace(TransformerBlockRegistry.get(WanTransformerBlock))
    )
    transformer = tiny_transformer()
    apply(transformer, config)
    with pytest.raises(ValueError, match="the hook (fbc_|mag_cache|sea_cache).* skips whole blocks"):
        run(transformer, with_memory(video_inputs(), tiny_adapter(tiny_transformer())))


@pytest.mark.parametrize("cache", ["pyramid", "faster"])
def test_caches_inside_blocks_work_with_the_memory(cache: str) -> None:
    transformer = tiny_transformer()
    adapter = tiny_adapter(transformer)
    time = 900.0
    common = {"spatial_attention_block_skip_range": 2, "current_timestep_callback": lambda: time}
    config = (
        PyramidAttentionBroadcastConfig(**common)
        if cache == "pyramid"
        else FasterCacheConfig(**common, is_guidance_distilled=True, attention_weight_callback=lambda _: 0.5)
    )
    steps = [with_memory(video_inputs(references=1, seed=seed), adapter) for seed in (1, 2, 3, 4)]
    first = steps[0]["hidden_states"]
    for number, step in enumerate(steps):  # as denoising does, slowly elsewhere
        step["hidden_states"] = torch.lerp(first, step["hidden_states"], 0.02 * number)
    exact = [run(transformer, step) for step in steps]

    computed = {"backbone": 0, "adapter": 0}
    for name, model in (("backbone", transformer), ("adapter", adapter)):
        model.blocks[0].attn1.to_q.register_forward_hook(lambda *_, of=name: computed.update({of: computed[of] + 1}))
    transformer.enable_cache(config)
    for number, (step, expected) in enumerate(zip(steps, exact, strict=True)):
        time = 900.0 if number < 2 else 500.0  # both caches skip within (100, 800) and (-1, 681)
        with transformer.cache_context("cond"):
            assert relative_error(run(transformer, step), expected) < 0.02
    assert computed == {"backbone": 3, "adapter": 4}
    transformer.disable_cache()
    assert torch.equal(run(transformer, steps[0]), exact[0])


# Compilation
# With `aot_eager`, which traces and lowers as inductor does but generates no code: inductor took a minute for one tiny
# block on two busy cores. Measured with it once, the largest difference to eager was 7e-7.


@pytest.fixture
def compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_whole_without_graph_breaks(compiler: None) -> None:
    transformer = tiny_transformer(num_layers=2)
    inputs = with_memory(video_inputs(references=1), tiny_adapter(transformer))
    expected = run(transformer, inputs)
    compiled = torch.compile(transformer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, inputs), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_repeated_blocks_compile_once(compiler: None) -> None:
    transformer = tiny_transformer()
    adapter = tiny_adapter(transformer)
    inputs = with_memory(video_inputs(references=1), adapter)
    expected = run(transformer, inputs)
    for model in (transformer, adapter):
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        # Twice for all six blocks: the adapter's have fewer tokens, and then the count is a symbol.
        torch.testing.assert_close(run(transformer, inputs), expected, atol=1e-5, rtol=0)


# Context parallelism: Ulysses on two processes. Not here: ring attention, for which diffusers has no attention backend
# on CPUs (it needs log-sum-exps), and uneven sequences, as gloo gathers equal parts only. Our part in them is the same.


# Each cuts the sequence in the middle of a frame: 3 frames of 6 tokens in 9 + 9, 5 of 12 in 30 + 30.
PARALLEL_VIDEOS = [{"frames": 3}, {"frames": 5, "references": 2, "size": (4, 12)}]


def parallel_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.accelerator.device_count = lambda: 2  # diffusers numbers devices by it, and on a CPU it is 0
    transformer = tiny_transformer()
    adapter = tiny_adapter(transformer)
    lengths: list[int] = []
    for model in (transformer, adapter):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        for block in model.blocks:
            block.register_forward_hook(lambda *call: lengths.append(call[2].shape[1]))
    outputs = [
        [run(transformer, inputs), run(transformer, with_memory(inputs, adapter))]
        for inputs in (video_inputs(**video) for video in PARALLEL_VIDEOS)
    ]
    torch.save({"outputs": outputs, "lengths": lengths}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_context_parallel_equals_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(parallel_worker, args=(str(tmp_path),), nprocs=2)
    transformer = tiny_transformer()
    adapter = tiny_adapter(transformer)
    expected = [
        [run(transformer, inputs), run(transformer, with_memory(inputs, adapter))]
        for inputs in (video_inputs(**video) for video in PARALLEL_VIDEOS)
    ]
    # Blocks of the backbone alone, then of the adapter, which sees no references, and of the backbone.
    lengths = [9] * 4 + [9] * 2 + [9] * 4 + [30] * 4 + [18] * 2 + [30] * 4
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["outputs"], expected, atol=1e-5, rtol=0)
        assert found["lengths"] == lengths

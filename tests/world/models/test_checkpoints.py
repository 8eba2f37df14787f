"""Loading the published release's weights and LoRA of every form: everything finds its place, or nothing is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import save_file
from test_transformer import (
    TINY,
    Golden,
    public_config,
    read_golden,
    run,
    tiny_adapter,
    tiny_transformer,
    video_inputs,
)
from torch import Tensor, nn

from mirage.models.checkpoints import load_published
from mirage.models.lora import load_lora, save_lora
from mirage.models.transformer import MirageTransformer3DModel
from mirage_kernels import io

State = dict[str, Any]


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)  # of models so small, more threads only wait for one another


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> Golden:
    return read_golden(shared_dir)


def frozen(*models: nn.Module) -> Callable[[], None]:
    """A check that the models have the names and weights that they have now."""
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]

    def check() -> None:
        for model, weights in zip(models, before, strict=True):
            now = model.state_dict()
            assert now.keys() == weights.keys()
            assert all(torch.equal(now[name], weights[name]) for name in now)

    return check


# Published names of our tiny models' weights, so that these tests need no data: the inverse of what is tested, by hand.


def wan_name(name: str) -> str:
    for ours, theirs in {
        "attn1.": "self_attn.",
        "attn2.": "cross_attn.",
        "to_out.0": "o",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        "norm2": "norm3",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
    }.items():
        name = name.replace(ours, theirs)
    if name.startswith("blocks."):
        return name.replace("scale_shift_table", "modulation")
    return name.replace("proj_out", "head.head").replace("scale_shift_table", "head.modulation")


def vace_name(name: str) -> str:
    if name.startswith("proj_in."):
        return f"vace_blocks.0.before_proj.{name.removeprefix('proj_in.')}"
    if name.startswith("proj_out."):
        _, number, kind = name.split(".")
        return f"vace_blocks.{number}.after_proj.{kind}"
    return f"vace_{wan_name(name)}"


def dit_state(transformer: nn.Module) -> State:
    return {wan_name(name): value.clone() for name, value in transformer.state_dict().items()}


def vace_state(adapter: nn.Module) -> State:
    return {vace_name(name): value.clone() for name, value in adapter.state_dict().items()}


LORA_MODULES = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "ffn.0", "ffn.2")


def lora_matrices(rank: int = 4, modules: tuple[str, ...] = LORA_MODULES) -> State:
    """{"blocks.0.self_attn.q": (A, B)} for all blocks of the tiny transformer, its rows and columns 48 or 96."""
    generator = torch.Generator().manual_seed(5)
    matrices = {}
    for block in range(4):
        for module in modules:
            columns, rows = {"ffn.0": (48, 96), "ffn.2": (96, 48)}.get(module, (48, 48))
            down = torch.randn(rank, columns, generator=generator) / 8
            matrices[f"blocks.{block}.{module}"] = (down, torch.randn(rows, rank, generator=generator) / 8)
    return matrices


def lora_state(matrices: State | None = None) -> State:
    """As the published training writes it."""
    state = {}
    for module, (down, up) in (matrices or lora_matrices()).items():
        state[f"pipe.dit.{module}.lora_A.weight"] = down
        state[f"pipe.dit.{module}.lora_B.weight"] = up
    return state


def merged(transformer: nn.Module, matrices: State, scale: float = 1.0) -> MirageTransformer3DModel:
    """What a LoRA means: a model with scale B A added to its weights."""
    state = dit_state(transformer)
    for module, (down, up) in matrices.items():
        state[f"{module}.weight"] += scale * up @ down
    return load_published(MirageTransformer3DModel(**TINY).eval(), dit=state).transformer


def assert_same_output(one: nn.Module, other: nn.Module) -> None:
    inputs = video_inputs(references=1)
    torch.testing.assert_close(run(one, inputs), run(other, inputs), atol=1e-5, rtol=0)


# What is loaded


def test_published_weights_give_the_published_output(golden: Golden) -> None:
    models = load_published(golden.transformer(), dit=golden.base(), vace=golden.part("vace"), lora=golden.part("lora"))
    output = run(models.transformer, golden.inputs(0), **golden.memory(0, models.adapter))
    torch.testing.assert_close(output, golden.tensors["case0.output_with_lora"], atol=1e-5, rtol=0)
    models.transformer.disable_adapters()
    output = run(models.transformer, golden.inputs(0), **golden.memory(0, models.adapter))
    torch.testing.assert_close(output, golden.tensors["case0.output"], atol=1e-5, rtol=0)


def test_every_weight_finds_its_place() -> None:
    transformer, adapter = tiny_transformer(seed=3), tiny_adapter(tiny_transformer(seed=4))
    dit, vace = dit_state(transformer), vace_state(adapter)
    before = {name: value.clone() for name, value in (dit | vace).items()}
    new = tiny_transformer(seed=5)
    models = load_published(new, tiny_adapter(new, seed=6), dit=dit, vace=vace)
    assert models.transformer is new
    for loaded, source in zip(models, (transformer, adapter), strict=True):
        frozen(source)()
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in source.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in (dit | vace).items())  # nor are the sources changed
    with torch.no_grad():
        new.proj_out.weight.zero_()
    assert torch.equal(dit["head.head.weight"], before["head.head.weight"])


def wrap_generator(part: str, state: State) -> State:
    return {"generator": {part: state, "other": {}}, "step": 7}


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        lambda part, state: {part: state, "optimizer": {}},
        wrap_generator,
        lambda part, state: {"state_dict": state, "epoch": 2},
        lambda part, state: {f"module.{key}": value for key, value in state.items()},
        lambda part, state: {f"model.pipe.{key}": value for key, value in state.items()},
        lambda part, state: {f"model.diffusion_model.{key}": value for key, value in state.items()},
        lambda part, state: (
            {"vace": {f"pipe.vace.{key}": value for key, value in state.items()}} if part == "vace" else state
        ),
        lambda part, state: (
            {
                f"base_model.model.{key.removeprefix('pipe.dit.')}".replace("_A.", "_A.default.").replace(
                    "_B.", "_B.default."
                ): value
                for key, value in state.items()
            }
            if part == "lora"
            else {f"dit.{key}": value for key, value in state.items()}
        ),
    ],
)
def test_wrappers_and_prefixes(wrap: Callable[[str, State], State]) -> None:
    source = tiny_transformer(seed=3)
    adapter = tiny_adapter(source)
    states = {"dit": dit_state(source), "vace": vace_state(adapter), "lora": lora_state()}
    models = load_published(
        MirageTransformer3DModel(**TINY), **{part: wrap(part, state) for part, state in states.items()}
    )
    assert_same_output(models.transformer.eval(), merged(source, lora_matrices()))
    assert all(torch.equal(value, adapter.state_dict()[name]) for name, value in models.adapter.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt", ".bin", "shards"])
def test_files(suffix: str, tmp_path: Path) -> None:
    source = tiny_transformer(seed=3)
    state = dit_state(source)
    if suffix == "shards":
        names = sorted(state)
        paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
        for path, part in zip(paths, (names[:40], names[40:]), strict=True):
            save_file({name: state[name] for name in part}, path)
        dit: Any = paths
    else:
        dit = str(tmp_path / f"dit{suffix}")
        save_file(state, dit) if suffix == ".safetensors" else torch.save({"state_dict": state}, dit)
    loaded = load_published(tiny_transformer(seed=5), dit=dit).transformer
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in loaded.state_dict().items())


# Models built from shapes


def test_models_are_built_from_shapes() -> None:
    shape = {**TINY, "num_attention_heads": 1, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16}
    shape |= {"patch_size": (2, 2, 2), "text_dim": 24, "freq_dim": 16}
    source = MirageTransformer3DModel(**shape)
    memory = tiny_adapter(source, control_channels=17)
    dit, vace = (
        {name: value.bfloat16() for name, value in state(model).items()}
        for state, model in ((dit_state, source), (vace_state, memory))
    )
    transformer, adapter = load_published(dit=dit, vace=vace)
    assert not transformer.training and not adapter.training
    for built, like in ((transformer, source), (adapter, memory)):
        assert public_config(built) == public_config(like)
        for (name, value), kept in zip(built.named_parameters(), like.parameters(), strict=True):
            in_float32 = any(module in name.split(".") for module in built._keep_in_fp32_modules)
            assert value.dtype == (torch.float32 if in_float32 else torch.bfloat16), name
            assert torch.equal(value.bfloat16(), kept.bfloat16())
        assert built.rope.freqs_cos.device.type == "cpu" and torch.equal(built.rope.freqs_cos, like.rope.freqs_cos)
    with torch.no_grad():
        transformer.proj_out.weight.zero_()
    assert dit["head.head.weight"].any()  # built models share no memory with the state dict
    inputs = video_inputs(frames=4, channels=16)
    inputs["encoder_hidden_states"] = torch.randn(1, 7, 24)
    halved = {
        name: value.bfloat16() if name != "timestep" and isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    assert run(transformer, halved).isfinite().all()


@pytest.mark.slow
def test_built_adapters_follow_the_transformer() -> None:
    """Head counts cannot be read from the shapes, but the transformer given has them; so have its layers."""
    transformer = tiny_transformer()
    built = load_published(transformer, vace=vace_state(tiny_adapter(transformer))).adapter
    assert built.config.memory_layers == [0, 2] and built.config.num_attention_heads == 2
    every = load_published(transformer, vace=vace_state(tiny_adapter(transformer, memory_layers=(0, 1, 2, 3)))).adapter
    assert every.config.memory_layers == [0, 1, 2, 3]


def test_models_that_shapes_do_not_tell_must_be_given() -> None:
    transformer = tiny_transformer()
    vace = vace_state(tiny_adapter(transformer, memory_layers=(0, 1, 2)))
    with pytest.raises(ValueError, match="transformer must be given, got None: dit is 48 wide.*multiple of 128"):
        load_published(dit=dit_state(transformer))
    with pytest.raises(ValueError, match="adapter must be given with vace, or transformer or dit.*got None"):
        load_published(vace=vace)
    with pytest.raises(ValueError, match="adapter must be given: the 3 blocks of vace do not spread evenly over.* 4"):
        load_published(transformer, vace=vace)
    with pytest.raises(ValueError, match="vace: must be as wide as the transformer, 96, got 48"):
        load_published(tiny_transformer(num_attention_heads=4), vace=vace_state(tiny_adapter(transformer)))
    with pytest.raises(
        ValueError, match="dit: no model can be built without patch_embedding.weight.*; 0 of .*vace_blocks.* more"
    ):
        load_published(dit=vace)
    with pytest.raises(
        ValueError, match="vace: no model can be built without blocks.0.ffn.*; 0 of 1 .*patch_embedding"
    ):
        load_published(transformer, vace={"vace_patch_embedding.weight": vace["vace_patch_embedding.weight"]})
    with pytest.raises(ValueError, match="transformer or dit must be given with lora, got None"):
        load_published(lora=lora_state())
    with pytest.raises(ValueError, match="one of dit, vace and lora must be given"):
        load_published(transformer)


# What is refused


def dropped(state: State) -> State:
    return {key: value for key, value in state.items() if key != list(state)[5]}


def added(state: State) -> State:
    return {**state, "blocks.0.extra.weight": torch.zeros(1)}


def reshaped(state: State) -> State:
    key = list(state)[5]
    return {**state, key: torch.zeros(3, 5)}


def not_a_tensor(state: State) -> State:
    return {**state, list(state)[5]: 1.5}


def foreign(state: State) -> State:
    return {"encoder.layer.0.weight": torch.zeros(1), "encoder.layer.1.weight": torch.zeros(1)}


def doubled(state: State) -> State:
    key = list(state)[5]
    return {**state, f"module.{key}": state[key]}


@pytest.mark.parametrize("part", ["dit", "vace", "lora"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dropped, r"{part}: {n} of {n} keys match.*; missing: [^;]+; nothing loaded"),
        (added, r"{part}: {n} of {m} keys match.*; left over: blocks\.0\.extra\.weight; nothing loaded"),
        (reshaped, r"{part}: .* keys match.*; of another shape: .*\(3, 5\).*expected; nothing loaded"),
        (not_a_tensor, r"{part}: .* keys match.*; of another shape: .*float.*expected; nothing loaded"),
        (foreign, r"{part}: 0 of 2 keys match.*; left over: encoder\.layer\.0\.weight, encoder\.layer\.1\.weight"),
        (doubled, r"{part}: (?P<key>\S+) and module\.(?P=key) are the same weight"),
        (lambda state: {}, r"{part}: 0 of 0 keys match"),
    ],
)
def test_nothing_is_loaded_unless_everything_fits(part: str, change: Callable[[State], State], message: str) -> None:
    transformer = tiny_transformer(seed=5)
    adapter = tiny_adapter(transformer, seed=6)
    source = tiny_transformer(seed=3)
    states = {"dit": dit_state(source), "vace": vace_state(tiny_adapter(source)), "lora": lora_state()}
    states[part] = change(states[part])
    count = len(states[part])
    message = message.replace("{part}", part).replace("{n}", str(count - (change is added))).replace("{m}", str(count))
    untouched = frozen(transformer, adapter)
    with pytest.raises(ValueError, match=message):
        load_published(transformer, adapter, **states)
    untouched()
    assert not getattr(transformer, "peft_config", None)


def test_the_message_names_the_file_and_no_more_than_five_keys(tmp_path: Path) -> None:
    path = tmp_path / "vace.safetensors"
    save_file(vace_state(tiny_adapter(tiny_transformer())), path)
    with pytest.raises(ValueError) as caught:
        load_published(tiny_transformer(), dit=path)
    message = str(caught.value)
    assert message.startswith(f"dit ({path}): 0 of ") and "left over: vace_blocks.0" in message
    assert " more; missing: " in message and message.endswith(" more; nothing loaded")
    assert message.count("vace_blocks") == 5


def test_a_transformer_with_a_lora_takes_no_backbone() -> None:
    transformer = tiny_transformer()
    load_lora(transformer, lora_state())
    with pytest.raises(ValueError, match=r"transformer must have no LoRA when dit is loaded, got \['default'\]"):
        load_published(transformer, dit=dit_state(tiny_transformer()))
    with pytest.raises(ValueError, match="adapter_name must be new, but the transformer has a LoRA 'default' already"):
        load_published(transformer, lora=lora_state())


class Unsafe:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    def refused(name: str, message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            load_published(tiny_transformer(), dit=tmp_path / name)

    refused("absent.pt", "no checkpoint file at .*absent.pt", FileNotFoundError)
    (tmp_path / "weights.zip").touch()
    refused("weights.zip", r"weights.zip: a checkpoint file must end in .safetensors or one of \.pt, ")
    save_file({"a": torch.zeros(100)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-50])
    refused("cut.safetensors", "cut.safetensors: not a whole safetensors file .*; was it cut short")
    torch.save({"a": Unsafe()}, tmp_path / "unsafe.pt")
    refused("unsafe.pt", "unsafe.pt: cannot be read with weights_only=True")
    (tmp_path / "broken.ckpt").write_bytes(b"not a checkpoint")
    refused("broken.ckpt", "broken.ckpt: cannot be read with weights_only=True")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    refused("list.pth", "list.pth: a checkpoint file must hold a mapping of names to tensors, got .*list")
    paths = [tmp_path / "1.pt", tmp_path / "2.pt"]
    for path in paths:
        torch.save({"blocks.0.modulation": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError, match=r"dit \(.*1.pt, .*2.pt\): blocks.0.modulation is in more than one of the files"
    ):
        load_published(tiny_transformer(), dit=paths)


# LoRA


@pytest.mark.parametrize("alpha", [1.0, 0.25, -2.0])
def test_published_alpha_is_the_factor_of_the_lora(alpha: float) -> None:
    transformer = tiny_transformer()
    expected = merged(transformer, lora_matrices(), alpha)
    load_published(transformer, lora=lora_state(), alpha=alpha)
    assert_same_output(transformer, expected)
    inputs = video_inputs(references=1)
    assert (run(transformer, inputs) - run(tiny_transformer(), inputs)).abs().max() > 0.05


def diffusers_style(matrices: State) -> State:
    names = {
        "self_attn": "attn1",
        "cross_attn": "attn2",
        ".q": ".to_q",
        ".k": ".to_k",
        ".v": ".to_v",
        ".o": ".to_out.0",
    }
    names |= {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    state = {}
    for module, pair in matrices.items():
        for wan, ours in names.items():
            module = module.replace(wan, ours)
        state |= {f"transformer.{module}.lora_{kind}.weight": value for kind, value in zip("AB", pair, strict=True)}
    return state


def comfy_style(matrices: State) -> State:
    state = {}
    for module, (down, up) in matrices.items():
        state[f"diffusion_model.{module}.lora_down.weight"] = down
        state[f"diffusion_model.{module}.lora_up.weight"] = up
        state[f"diffusion_model.{module}.alpha"] = torch.tensor(3.0)
    return state


def musubi_style(matrices: State) -> State:
    state = {}
    for module, (down, up) in matrices.items():
        name = f"lora_unet_{module.replace('.', '_')}"
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(3.0)}
    return state


@pytest.mark.parametrize(
    ("style", "scale"),
    [(diffusers_style, 1.0), (comfy_style, 0.75), (musubi_style, 0.75), (lora_state, 1.0)],
)
def test_lora_of_every_style(style: Callable[[State], State], scale: float, tmp_path: Path) -> None:
    transformer = tiny_transformer()
    expected = merged(transformer, lora_matrices(), scale)
    save_file(style(lora_matrices()), tmp_path / "lora.safetensors")
    load_lora(transformer, tmp_path / "lora.safetensors")
    assert_same_output(transformer, expected)


def test_lora_of_mixed_ranks_and_alphas() -> None:
    """Modules without an alpha have scale 1, whatever the rank of the others."""
    matrices = {**lora_matrices(4, ("self_attn.q", "ffn.0")), **lora_matrices(2, ("self_attn.v",))}
    state = diffusers_style(matrices)
    state["transformer.blocks.2.attn1.to_v.alpha"] = torch.tensor(5.0)
    transformer = tiny_transformer()
    (down, up) = matrices["blocks.2.self_attn.v"]
    expected = merged(transformer, {**matrices, "blocks.2.self_attn.v": (down, up * 2.5)})
    load_lora(transformer, state, "mixed")
    assert_same_output(transformer, expected)
    transformer.set_adapters("mixed", 0.0)
    assert_same_output(transformer, tiny_transformer())


def test_a_second_lora_beside_the_first() -> None:
    transformer = tiny_transformer()
    load_lora(transformer, lora_state(), "one")
    load_lora(transformer, lora_state(lora_matrices(2, ("self_attn.q",))), "two")
    transformer.set_adapters(["one", "two"], [1.0, 0.5])
    both = merged(merged(tiny_transformer(), lora_matrices()), lora_matrices(2, ("self_attn.q",)), 0.5)
    assert_same_output(transformer, both)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"transformer.blocks.0.attn1.to_q.weight": torch.zeros(48, 48)}, "0 of 1 keys match.*left over"),
        (lambda state: {**state, "text_encoder.lora_A.weight": torch.zeros(4, 48)}, "left over: text_encoder.lora_A"),
        (lambda state: {**state, "blocks.9.attn1.to_q.lora_A.weight": torch.zeros(4, 48)}, "left over: blocks.9.attn1"),
        (lambda state: {**state, "blocks.0.norm2.lora_A.weight": torch.zeros(4, 48)}, "left over: blocks.0.norm2"),
        (
            lambda state: {**state, "transformer.blocks.0.attn1.to_q.lora_A.bias": torch.zeros(48)},
            "56 of 57 keys match the transformer's linear layers; left over: .*0.attn1.to_q.lora_A.bias; nothing",
        ),
        (
            lambda state: {
                key: value for key, value in state.items() if key != "transformer.blocks.1.attn1.to_k.lora_B.weight"
            },
            "55 of 55 keys match.*; missing: lora_B of blocks.1.attn1.to_k; nothing loaded",
        ),
        (
            lambda state: {**state, "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(3, 48)},
            r"of another shape: blocks.0.attn1.to_q \(3, 48\) and \(48, 4\) where \(rank, 48\) and \(48, rank\) are",
        ),
        (
            lambda state: {key: value[:0] if "lora_A" in key else value[:, :0] for key, value in state.items()},
            r"of another shape: blocks.0.attn1.to_q \(0, 48\) and \(48, 0\) where",
        ),
    ],
)
def test_lora_that_does_not_fit(change: Callable[[State], State], message: str) -> None:
    transformer = tiny_transformer()
    untouched = frozen(transformer)
    with pytest.raises(ValueError, match=message):
        load_lora(transformer, change(diffusers_style(lora_matrices())))
    untouched()


def trained_lora(config: LoraConfig, name: str = "default") -> MirageTransformer3DModel:
    transformer = tiny_transformer()
    transformer.add_adapter(config, name)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in transformer.named_parameters():
            if ".lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return transformer


SAVED = [
    LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]),
    LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "net.2"]),
    LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"], use_rslora=True),
    LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_v", "net.0.proj"],
        rank_pattern={"to_v": 2, "blocks.1.attn1.to_q": 3},
        alpha_pattern={"net.0.proj": 1, r"blocks\.1\..*to_q": 5},
    ),
]


@pytest.mark.parametrize("config", SAVED, ids=["alpha is rank", "alpha", "rslora", "patterns"])
def test_a_saved_lora_has_the_same_effect_everywhere(config: LoraConfig, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    trained = trained_lora(config)
    save_lora(trained, path)

    loaded = tiny_transformer()
    load_lora(loaded, path, "again")
    assert_same_output(loaded, trained)
    save_lora(loaded, path, "again")  # and once more, with the config that loading made of them
    loaded = tiny_transformer()
    load_lora(loaded, path)
    assert_same_output(loaded, trained)

    inputs = video_inputs()
    stock = WanTransformer3DModel(**TINY).eval()
    stock.load_state_dict(tiny_transformer().state_dict())
    pipeline = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, image_processor=None, transformer=stock
    )
    pipeline.load_lora_weights(path)
    per_token = inputs["timestep"].repeat_interleave(6, dim=1)
    with torch.no_grad():
        output = stock(inputs["hidden_states"], per_token, inputs["encoder_hidden_states"], return_dict=False)[0]
    torch.testing.assert_close(output, run(trained, inputs), atol=1e-5, rtol=0)
    assert (output - run(tiny_transformer(), inputs)).abs().max() > 0.01


def test_a_saved_lora_is_one_file_as_diffusers_writes_it(tmp_path: Path) -> None:
    save_lora(trained_lora(SAVED[3], "mine"), tmp_path / "lora.safetensors", "mine")
    assert list(tmp_path.iterdir()) == [tmp_path / "lora.safetensors"]
    weights, config = WanImageToVideoPipeline.lora_state_dict(tmp_path / "lora.safetensors", return_lora_metadata=True)
    assert len(weights) == 4 * 5 * 2
    assert weights["transformer.blocks.0.attn1.to_q.lora_A.weight"].shape == (4, 48)
    assert weights["transformer.blocks.1.attn1.to_q.lora_A.weight"].shape == (3, 48)
    assert config["transformer.target_modules"] == [
        "net.0.proj",
        "to_q",
        "to_v",
    ]  # a set, in the same order each time
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (4, 6)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lora.safetensors"
    trained = trained_lora(SAVED[1])
    save_lora(trained, path)
    before = path.read_bytes()

    def fail(where: str, tensors: State, metadata: dict[str, str]) -> None:
        Path(where).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(io, "write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save_lora(trained, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"adapter_name must be a LoRA of this transformer, one of \[\], got 'default'"
    ):
        save_lora(tiny_transformer(), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"one of \['default'\], got 'other'"):
        save_lora(trained_lora(SAVED[0]), tmp_path / "lora.safetensors", "other")
    with pytest.raises(ValueError, match="path must end in .safetensors, got .*lora.bin"):
        save_lora(trained_lora(SAVED[0]), tmp_path / "lora.bin")


@pytest.mark.parametrize("described", ["not JSON", "[1]", '{"transformer.no_such_setting": 1}'])
def test_metadata_that_is_no_lora_config(described: str, tmp_path: Path) -> None:
    save_file(lora_state(), tmp_path / "lora.safetensors", {"lora_adapter_metadata": described})
    with pytest.raises(
        ValueError, match=r"source \(.*lora.safetensors\): its lora_adapter_metadata must be a LoraConfig"
    ):
        load_lora(tiny_transformer(), tmp_path / "lora.safetensors")

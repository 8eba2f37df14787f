"""LoRA of every dialect that trainers write: each has the effect of weights changed by hand, or an error names it.

The files are made here, in the layouts of kohya, musubi-tuner, ComfyUI, diffusion-pipe, LightX2V, DiffSynth, peft,
LyCORIS and diffusers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_checkpoints import frozen, lora_matrices, wan_name
from test_transformer import run, tiny_transformer, video_inputs
from torch import Tensor, nn

from mirage.models.lora import load_lora, save_lora
from mirage.models.transformer import MirageTransformer3DModel

State = dict[str, Any]
D, U, A, B = ".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight"
COMFY = "diffusion_model."


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


WAN_NAMES = {
    wan_name(name).removesuffix(".weight"): name.removesuffix(".weight") for name in tiny_transformer().state_dict()
}


def ours(module: str) -> str:
    """Our name of one of Wan's layers."""
    return WAN_NAMES[module]


NAMES = {module: ours(module) for module in lora_matrices()}
OTHERS = {  # the layers outside the blocks: (out, in)
    "time_embedding.0": (48, 32),
    "time_embedding.2": (48, 48),
    "time_projection.1": (288, 48),
    "text_embedding.0": (48, 32),
    "text_embedding.2": (48, 48),
    "head.head": (192, 48),
}


def changed(deltas: dict[str, Tensor]) -> MirageTransformer3DModel:
    """The transformer with deltas, by our names of the weights, added by hand."""
    transformer = tiny_transformer()
    state = transformer.state_dict()
    with torch.no_grad():
        for name, delta in deltas.items():
            state[name] += delta.float().reshape(state[name].shape)
    return transformer


def products(matrices: State, scale: float | Callable[[str], float] = 1.0) -> dict[str, Tensor]:
    return {
        f"{NAMES[module]}.weight": (scale(module) if callable(scale) else scale) * up.float() @ down.float()
        for module, (down, up) in matrices.items()
    }


def assert_effect(loaded: nn.Module, deltas: dict[str, Tensor]) -> None:
    """The output moved as it does where the weights are changed by hand, to 1e-6 of its size, and did move."""
    inputs = video_inputs(references=1)
    before, expected, found = (run(model, inputs) for model in (tiny_transformer(), changed(deltas), loaded))
    size = expected.abs().max().item()
    assert (expected - before).abs().max() > 1e-3 * size
    torch.testing.assert_close(found, expected, atol=1e-6 * max(size, 1.0), rtol=0)


def written(matrices: State, name: Callable[[str], str], down: str, up: str, alpha: float | None = None) -> State:
    state = {}
    for module, pair in matrices.items():
        state[name(module) + down], state[name(module) + up] = pair
        if alpha is not None:
            state[f"{name(module)}.alpha"] = torch.tensor(alpha)
    return state


def underscored(module: str) -> str:
    return module.replace(".", "_")


DIALECTS: dict[str, tuple[Callable[[str], str], str, str, float | None]] = {
    "musubi-tuner": (lambda m: f"lora_unet_{underscored(m)}", D, U, 2.0),
    "musubi-tuner, dots": (lambda m: f"lora_unet_blocks_{m.removeprefix('blocks.')}", D, U, 2.0),
    "kohya, two underscores": (lambda m: f"lora_unet__{underscored(m)}", D, U, 2.0),
    "kohya, diffusers' names": (lambda m: f"lora_transformer_{underscored(NAMES[m])}", D, U, 4.0),
    "LyCORIS": (lambda m: f"lycoris_{underscored(NAMES[m])}", D, U, 8.0),
    "diffusion-pipe": (lambda m: COMFY + m, A, B, None),
    "ComfyUI": (lambda m: f"model.diffusion_model.{m}", D, U, 3.0),
    "ai-toolkit": (lambda m: COMFY + NAMES[m], A, B, None),
    "DiffSynth": (lambda m: m, ".lora_A.default.weight", ".lora_B.default.weight", None),
    "DiffSynth, pipe": (lambda m: f"pipe.dit.{m}", ".lora_A.default.weight", ".lora_B.default.weight", None),
    "peft, a name": (
        lambda m: f"base_model.model.{NAMES[m]}",
        ".lora_A.my_style.weight",
        ".lora_B.my_style.weight",
        None,
    ),
    "diffusers, alphas": (lambda m: f"transformer.{NAMES[m]}", A, B, 2.0),
    "diffusers, old": (lambda m: f"transformer.{NAMES[m]}", ".lora.down.weight", ".lora.up.weight", None),
    "transformers, old": (lambda m: NAMES[m], ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", None),
    "no weight": (lambda m: f"transformer.{NAMES[m]}", ".lora_down", ".lora_up", None),
    "compiled": (lambda m: f"transformer._orig_mod.{NAMES[m]}", A, B, None),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_spelling(dialect: str, tmp_path: Path) -> None:
    name, down, up, alpha = DIALECTS[dialect]
    matrices = lora_matrices()
    save_file(written(matrices, name, down, up, alpha), tmp_path / "lora.safetensors")
    transformer = tiny_transformer()
    load_lora(transformer, tmp_path / "lora.safetensors")
    assert_effect(transformer, products(matrices, 1.0 if alpha is None else alpha / 4))


def randn(*shape: int, scale: float = 0.05, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def few_step() -> tuple[State, dict[str, Tensor]]:
    """A few-step LoRA as extracted from a distilled checkpoint, and the deltas that it stands for."""
    matrices = lora_matrices()
    state = written(matrices, lambda m: COMFY + m, D, U)
    deltas = products(matrices)
    for number, module in enumerate(matrices):
        bias = randn(96 if module.endswith("ffn.0") else 48, seed=number)
        state[f"{COMFY}{module}.diff_b"], deltas[f"{NAMES[module]}.bias"] = bias, bias
    for number, (module, (rows, columns)) in enumerate(OTHERS.items()):
        down, up = randn(4, columns, seed=number), randn(rows, 4, seed=number + 50)
        bias = randn(rows, seed=number + 90)
        state |= {COMFY + module + D: down, COMFY + module + U: up, f"{COMFY}{module}.diff_b": bias}
        deltas |= {f"{ours(module)}.weight": up @ down, f"{ours(module)}.bias": bias}
    embedding, bias = randn(48, 48, 1, 2, 2, scale=0.02), randn(48)
    state |= {f"{COMFY}patch_embedding.diff": embedding, f"{COMFY}patch_embedding.diff_b": bias}
    deltas |= {"patch_embedding.weight": embedding, "patch_embedding.bias": bias}
    for block in range(4):
        for attention in ("self_attn", "cross_attn"):
            norm = randn(48, scale=0.3, seed=block)
            state[f"{COMFY}blocks.{block}.{attention}.norm_q.diff"] = norm
            state[f"{COMFY}blocks.{block}.{attention}.norm_k.diff"] = torch.zeros(48)
            name = "attn1" if attention == "self_attn" else "attn2"
            deltas[f"blocks.{block}.{name}.norm_q.weight"] = norm
        weight, bias = randn(48, scale=0.3, seed=block + 9), randn(48, seed=block + 19)
        state |= {f"{COMFY}blocks.{block}.norm3.diff": weight, f"{COMFY}blocks.{block}.norm3.diff_b": bias}
        deltas |= {f"blocks.{block}.norm2.weight": weight, f"blocks.{block}.norm2.bias": bias}
        state[f"{COMFY}blocks.{block}.diff_m"] = torch.zeros(1, 6, 48)
    state[f"{COMFY}img_emb.proj.0.diff"] = torch.zeros(7)  # zeros change nothing, wherever they belong
    return state, deltas


def test_differences_of_biases_norms_and_embedders(tmp_path: Path) -> None:
    state, deltas = few_step()
    transformer = tiny_transformer()
    load_lora(transformer, state, "fast")
    assert_effect(transformer, deltas)

    save_lora(transformer, tmp_path / "again.safetensors", "fast")
    again = tiny_transformer()
    load_lora(again, tmp_path / "again.safetensors")
    assert_effect(again, deltas)

    # As any LoRA of peft: halved, blended with another, switched off, merged and taken out again, removed.
    transformer.set_adapters("fast", 0.5)
    assert_effect(transformer, {name: 0.5 * delta for name, delta in deltas.items()})
    other = lora_matrices(2, ("self_attn.q",))
    load_lora(transformer, written(other, lambda m: COMFY + m, A, B), "other")
    transformer.set_adapters(["fast", "other"], [1.0, 2.0])
    both = dict(deltas)
    for name, delta in products(other, 2.0).items():
        both[name] = both[name] + delta
    assert_effect(transformer, both)
    transformer.fuse_lora()
    assert_effect(transformer, both)
    transformer.unfuse_lora()
    assert_effect(transformer, both)
    transformer.disable_lora()
    inputs = video_inputs(references=1)
    torch.testing.assert_close(run(transformer, inputs), run(tiny_transformer(), inputs), atol=1e-5, rtol=0)
    transformer.unload_lora()
    assert transformer.state_dict().keys() == tiny_transformer().state_dict().keys()


def test_a_difference_beside_matrices_adds_to_them() -> None:
    down, up, difference = randn(4, 48), randn(192, 4, seed=2), randn(192, 48, seed=3)
    state = {
        f"head.head{D}": down,
        f"head.head{U}": up,
        "head.head.alpha": torch.tensor(8.0),
        "head.head.diff": difference,
    }
    transformer = tiny_transformer()
    load_lora(transformer, state)
    assert_effect(transformer, {"proj_out.weight": 2.0 * up @ down + difference})


@pytest.mark.parametrize("style", ["kohya", "peft"])
def test_dora(style: str, tmp_path: Path) -> None:
    matrices = lora_matrices(4, ("self_attn.q", "ffn.0"))
    weights = tiny_transformer().state_dict()
    deltas, state = {}, {}
    for module, (down, up) in matrices.items():
        name = NAMES[module]
        whole = weights[f"{name}.weight"] + up @ down
        magnitude = whole.norm(dim=1) * (1 + randn(len(whole), scale=0.3))
        deltas[f"{name}.weight"] = (
            whole / whole.norm(dim=1, keepdim=True) * magnitude[:, None] - weights[f"{name}.weight"]
        )
        if style == "kohya":
            state |= {f"lora_unet_{underscored(module)}{D}": down, f"lora_unet_{underscored(module)}{U}": up}
            state[f"lora_unet_{underscored(module)}.dora_scale"] = magnitude[:, None]
        else:
            state |= {f"base_model.model.{name}{A}": down, f"base_model.model.{name}{B}": up}
            state[f"base_model.model.{name}.lora_magnitude_vector"] = magnitude
    transformer = tiny_transformer()
    load_lora(transformer, state)
    assert_effect(transformer, deltas)
    save_lora(transformer, tmp_path / "dora.safetensors")
    again = tiny_transformer()
    load_lora(again, tmp_path / "dora.safetensors")
    assert_effect(again, deltas)


def lycoris(kind: str) -> tuple[State, dict[str, Tensor]]:
    """LoKr or LoHa as LyCORIS writes them, alpha among the tensors, and the deltas they stand for."""
    state, deltas = {}, {}
    for number, module in enumerate(lora_matrices(1, ("self_attn.q", "ffn.0"))):
        rows = 96 if module.endswith("ffn.0") else 48
        key = f"lycoris_{underscored(NAMES[module])}"
        if kind == "lokr":
            first, up, down = (
                randn(4, 4, seed=number, scale=0.3),
                randn(rows // 4, 2, seed=7, scale=0.5),
                randn(2, 12, seed=8),
            )
            state |= {f"{key}.lokr_w1": first, f"{key}.lokr_w2_a": up, f"{key}.lokr_w2_b": down}
            delta = torch.kron(first, up @ down)
        elif kind == "lokr, whole":
            first, second = randn(4, 4, seed=number, scale=0.3), randn(rows // 4, 12, seed=7)
            state |= {f"{key}.lokr_w1": first, f"{key}.lokr_w2": second}
            delta = 2.0 * torch.kron(first, second)  # whose alpha does not count
        else:
            pairs = [
                (randn(rows, 2, seed=s, scale=0.4), randn(2, 48, seed=s + 1, scale=0.4)) for s in (number, number + 9)
            ]
            for factor, (up, down) in zip(("hada_w1", "hada_w2"), pairs, strict=True):
                state |= {f"{key}.{factor}_a": up, f"{key}.{factor}_b": down}
            delta = (pairs[0][0] @ pairs[0][1]) * (pairs[1][0] @ pairs[1][1])
        state[f"{key}.alpha"] = torch.tensor(1.0)
        deltas[f"{NAMES[module]}.weight"] = delta / 2
    return state, deltas


@pytest.mark.parametrize("kind", ["lokr", "lokr, whole", "loha"])
def test_lokr_and_loha(kind: str, tmp_path: Path) -> None:
    state, deltas = lycoris(kind)
    transformer = tiny_transformer()
    load_lora(transformer, state)
    assert_effect(transformer, deltas)
    transformer.set_adapters("default", 0.5)
    assert_effect(transformer, {name: delta / 2 for name, delta in deltas.items()})
    save_lora(transformer, tmp_path / "lycoris.safetensors")
    again = tiny_transformer()
    load_lora(again, tmp_path / "lycoris.safetensors")
    assert_effect(again, deltas)
    with pytest.raises(ValueError, match="cannot be on a transformer at once"):
        load_lora(again, written(lora_matrices(), lambda m: m, A, B), "other")


# Strength that the tensors do not say


PEFT = {
    "alpha 32": LoraConfig(r=16, lora_alpha=32, target_modules=["to_q", "to_out.0"]),
    "alpha 8": LoraConfig(r=16, lora_alpha=8, target_modules=["to_q", "to_out.0"]),
    "rslora": LoraConfig(r=16, lora_alpha=16, use_rslora=True, target_modules=["to_q"]),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_v", "net.2"],
        rank_pattern={"to_v": 2, r"blocks\.1\.attn1\.to_q": 3},
        alpha_pattern={"net.2": 1, "to_v": 9},
    ),
    "bias": LoraConfig(r=4, lora_alpha=12, lora_bias=True, target_modules=["to_q"]),
    "dora": LoraConfig(r=4, lora_alpha=12, use_dora=True, target_modules=["to_q"]),
    "lokr": LoKrConfig(r=2, alpha=6, target_modules=["to_q", "net.2"]),
    "loha": LoHaConfig(r=2, alpha=6, target_modules=["to_q", "net.2"]),
}


@pytest.mark.parametrize("name", PEFT)
def test_what_peft_saves_has_the_same_effect(name: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_transformer(), PEFT[name])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(word in key for word in ("lora_A", "lora_B", "lokr_", "hada_")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    model.eval().save_pretrained(tmp_path / "saved")
    expected = run(model.base_model.model, video_inputs())
    for source in ("saved", "saved/adapter_model.safetensors"):
        transformer = tiny_transformer()
        load_lora(transformer, tmp_path / source)
        torch.testing.assert_close(run(transformer, video_inputs()), expected, atol=2e-6, rtol=0)
    assert (expected - run(tiny_transformer(), video_inputs())).abs().max() > 0.01


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"lora_alpha": "8", "lora_rank": "16"}, 0.5),
        ({"transformer.lora_alpha": "32", "transformer.r": "16"}, 2.0),
        ({"ss_network_alpha": "8", "ss_network_dim": "16", "ss_network_module": "networks.lora_wan"}, 1.0),
    ],
)
def test_alpha_in_the_metadata(metadata: dict[str, str], scale: float, tmp_path: Path) -> None:
    matrices = lora_matrices(16, ("self_attn.q",))
    save_file(written(matrices, lambda m: COMFY + m, A, B), tmp_path / "lora.safetensors", metadata)
    transformer = tiny_transformer()
    load_lora(transformer, tmp_path / "lora.safetensors")
    assert_effect(transformer, products(matrices, scale))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"r": 4, "lora_alpha": 8, "alpha_pattern": {"no_such": 2}},
            "alpha_pattern names 'no_such', which is no layer",
        ),
        ({"r": 8, "lora_alpha": 8}, "matrices of .* have rank 4, but .*adapter_config.json says 8"),
        ({"r": 4, "lora_alpha": float("inf")}, "alpha must be a finite number, got inf"),
        ({"r": 4, "lora_alpha": "8"}, "alpha must be a finite number, got '8'"),
        ({"peft_type": "IA3"}, "must be of a LoRA, LoHa or LoKr, got peft_type 'IA3'"),
        (
            {"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa_niter_4"},
            "says init_lora_weights 'pissa_niter_4', which",
        ),
        ({"r": 4, "lora_alpha": 4, "new_thing": True}, "got new_thing = True"),
        ({"r": 4, "lora_alpha": 4, "use_dora": True}, "a DoRA must have matrices and a magnitude"),
        ([1], "must be a LoraConfig's values, got list"),
    ],
)
def test_a_config_that_is_wrong_or_unknown(config: Any, message: str, tmp_path: Path) -> None:
    save_file(written(lora_matrices(), lambda m: NAMES[m], A, B), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    transformer = tiny_transformer()
    untouched = frozen(transformer)
    with pytest.raises(ValueError, match=message):
        load_lora(transformer, tmp_path)
    untouched()


def test_alphas_that_contradict_each_other(tmp_path: Path) -> None:
    state = written(lora_matrices(), lambda m: NAMES[m], A, B)
    save_file(state, tmp_path / "adapter_model.safetensors", {"lora_alpha": "8"})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4}))
    with pytest.raises(ValueError, match=r"adapter_config.json says alpha 4.0, but .*lora_alpha says 8.0"):
        load_lora(tiny_transformer(), tmp_path)


# What is refused


def style(change: State) -> State:
    return {**written(lora_matrices(), lambda m: COMFY + m, D, U), **change}


REFUSED: dict[str, tuple[State, str]] = {
    "modulation": (style({f"{COMFY}blocks.0.diff_m": torch.ones(1, 6, 48)}), r"modulation \(diff_m\), as LightX2V"),
    "tucker": (style({"lycoris_blocks_0_attn1_to_q.lokr_t2": torch.ones(2, 2)}), "Tucker decompositions, as LyCORIS"),
    "oft": (style({"lora_unet_blocks_0_self_attn_q.oft_blocks": torch.ones(2, 2)}), "OFT, cannot be loaded"),
    "set_weight": (style({f"{COMFY}blocks.0.self_attn.q.set_weight": torch.ones(2)}), "set_weight.* ComfyUI"),
    "text encoder": (
        style({"lora_te_text_model_q.lora_down.weight": torch.ones(4, 8)}),
        "left over: lora_te_text_model_q",
    ),
    "image keys": (
        style({f"{COMFY}blocks.0.cross_attn.k_img{D}": torch.ones(4, 48)}),
        r"left over: .*k_img.*nothing loaded \(keys as of ComfyUI, diffusion-pipe or LightX2V\)",
    ),
    "second expert": (
        style({"transformer_2.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 48)}),
        "left over: transf",
    ),
    "another width": (
        {
            f"{COMFY}blocks.{i}.self_attn.q{kind}": torch.zeros(*shape)
            for i in range(40)
            for kind, shape in ((A, (4, 5120)), (B, (5120, 4)))
        },
        r"^source: is for a transformer 5120 wide \(the 14B models of Wan2.1 and Wan2.2\), this one is 48 wide",
    ),
    "two adapters": (
        {f"blocks.0.attn1.to_q.lora_{kind}.{name}.weight": torch.ones(4, 48) for kind in "AB" for name in ("a", "b")},
        "must hold one LoRA, got a and b",
    ),
    "NaN": (style({f"{COMFY}blocks.0.self_attn.q{U}": torch.full((48, 4), float("nan"))}), "must be finite, got NaN"),
    "alpha": (style({f"{COMFY}blocks.0.self_attn.q.alpha": torch.ones(3)}), "alpha of .* where a number is expected"),
    "infinite alpha": (style({f"{COMFY}blocks.0.self_attn.q.alpha": float("inf")}), "must be finite"),
    "no matrices": (style({f"{COMFY}blocks.0.cross_attn.k.alpha": torch.ones(())}), "missing: lora_A of .*, lora_B of"),
    "a norm's shape": (
        style({f"{COMFY}blocks.0.norm3.diff": torch.ones(7)}),
        r"norm2 \(7,\) where \(48,\) is expected",
    ),
    "only zeros": ({f"{COMFY}blocks.0.norm3.diff": torch.zeros(48)}, "1 of 1 keys match"),
    "some DoRA": (
        style({f"{COMFY}blocks.0.self_attn.q.dora_scale": torch.ones(48, 1)}),
        "a DoRA must have .* missing: bl",
    ),
    "LoKr and LoRA": (style({f"{COMFY}blocks.0.cross_attn.k.lokr_w1": torch.ones(48, 48)}), "missing: lokr_w2_a of"),
    "integers": (style({f"{COMFY}blocks.0.self_attn.q{D}": torch.ones(4, 48).int()}), "floating point numbers, got"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_loaded_is_named(name: str) -> None:
    state, message = REFUSED[name]
    transformer = tiny_transformer()
    untouched = frozen(transformer)
    with pytest.raises(ValueError, match=message):
        load_lora(transformer, state)
    untouched()
    assert not getattr(transformer, "peft_config", None)


def test_a_lora_in_fp8(tmp_path: Path) -> None:
    matrices = lora_matrices()
    state = written(matrices, lambda m: COMFY + m, A, B)
    plain = {key: value.to(torch.float8_e4m3fn) for key, value in state.items()}
    scaled: State = {}
    for key, value in state.items():
        scale = value.abs().max() / 448
        scaled |= {key: (value / scale).to(torch.float8_e4m3fn), f"{key.removesuffix('weight')}scale_weight": scale}
    stored = {key: scaled[key].float() * scaled[f"{key.removesuffix('weight')}scale_weight"] for key in state}
    for given, values in ((plain, plain), (scaled, stored)):
        save_file(given, tmp_path / "lora.safetensors")
        transformer = tiny_transformer()
        load_lora(transformer, tmp_path / "lora.safetensors")
        pairs = {m: (values[f"{COMFY}{m}{A}"], values[f"{COMFY}{m}{B}"]) for m in matrices}
        assert_effect(transformer, products(pairs))


def test_a_failed_injection_leaves_the_transformer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from mirage.models import lora

    transformer = tiny_transformer()
    load_lora(transformer, written(lora_matrices(), lambda m: m, A, B), "first")
    before = run(transformer, video_inputs())

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(lora, "set_peft_model_state_dict", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        load_lora(transformer, few_step()[0], "second")
    assert list(transformer.peft_config) == ["first"]
    assert torch.equal(run(transformer, video_inputs()), before)


def test_a_compiled_transformer() -> None:
    matrices = lora_matrices()
    transformer = tiny_transformer()
    load_lora(torch.compile(transformer, backend="eager"), written(matrices, lambda m: m, A, B))
    assert_effect(transformer, products(matrices))


def test_names_of_the_files_in_the_repository_are_strings(tmp_path: Path) -> None:
    """A file that this version saves has names that any version of it loads: peft's, after `transformer.`."""
    transformer = tiny_transformer()
    load_lora(transformer, few_step()[0])
    save_lora(transformer, tmp_path / "lora.safetensors")
    kinds = {re.sub(r".*\.(?=lora_|diff)", "", key) for key in load_file(tmp_path / "lora.safetensors")}
    assert kinds == {"lora_A.weight", "lora_B.weight", "lora_B.bias", "diff", "diff_b"}

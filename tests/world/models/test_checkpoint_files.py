"""Checkpoint files as people have them: repackaged, in 8 bits, sharded, wrapped, damaged or hostile."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import dit_state, frozen, lora_matrices, lora_state
from test_transformer import tiny_transformer

from mirage.models.checkpoints import load_published
from mirage.models.lora import load_lora
from mirage.models.transformer import MirageTransformer3DModel

State = dict[str, Any]
COMFY = "model.diffusion_model."
FUZZED = 250 if os.environ.get("MIRAGE_NIGHTLY") else 8  # of each of four kinds, for each of two parsers


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


def assert_loads(source: Any, expected: State) -> None:
    """Every weight is exactly the expected one, by Wan's names."""
    loaded = load_published(tiny_transformer(seed=5), dit=source).transformer
    for name, value in dit_state(loaded).items():
        assert torch.equal(value, expected[name].float()), name


def fp8_scaled(layout: str) -> tuple[State, State]:
    """A file whose matrices are in fp8 with scales, and the weights that it stands for."""
    state, expected = {}, {}
    for name, value in dit_state(tiny_transformer(seed=3)).items():
        if value.ndim != 2:
            state[COMFY + name] = expected[name] = value
            continue
        stem = COMFY + name.removesuffix("weight")
        rows = layout == "LightX2V"
        scale = value.abs().amax(1, keepdim=True) / 448 if rows else value.abs().max() / 448
        state[COMFY + name] = (value / scale).to(torch.float8_e4m3fn)
        expected[name] = state[COMFY + name].float() * scale
        if layout == "ComfyUI, first":
            state[f"{stem}scale_weight"], state[f"{stem}scale_input"] = scale, torch.ones(())
        else:
            state[f"{stem}weight_scale"] = scale
        if layout == "ComfyUI, second":
            described = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()
            state[f"{stem}comfy_quant"] = torch.tensor(list(described), dtype=torch.uint8)
    if layout == "ComfyUI, first":
        state[f"{COMFY}scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    return state, expected


@pytest.mark.parametrize("layout", ["ComfyUI, first", "ComfyUI, second", "LightX2V"])
def test_fp8_is_multiplied_by_its_scales(layout: str, tmp_path: Path) -> None:
    state, expected = fp8_scaled(layout)
    save_file(state, tmp_path / "model.safetensors")
    assert_loads(tmp_path / "model.safetensors", expected)

    tiny_transformer().save_pretrained(tmp_path / "pipe" / "transformer")
    single = MirageTransformer3DModel.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "pipe"), subfolder="transformer"
    )
    for name, value in dit_state(single).items():
        assert torch.equal(value, expected[name]), name


def test_a_single_file_without_some_weights_is_refused(tmp_path: Path) -> None:
    state = {COMFY + name: value for name, value in dit_state(tiny_transformer(seed=3)).items() if "ffn.0" not in name}
    save_file(state, tmp_path / "model.safetensors")
    tiny_transformer().save_pretrained(tmp_path / "pipe" / "transformer")
    with pytest.raises(ValueError, match="weights are missing in the file"):
        MirageTransformer3DModel.from_single_file(
            str(tmp_path / "model.safetensors"), config=str(tmp_path / "pipe"), subfolder="transformer"
        )


def test_fp8_and_half_without_scales(tmp_path: Path) -> None:
    state = dit_state(tiny_transformer(seed=3))
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16):
        given = {name: value.to(dtype) if value.ndim == 2 else value for name, value in state.items()}
        save_file({COMFY + name: value for name, value in given.items()}, tmp_path / "model.safetensors")
        assert_loads(tmp_path / "model.safetensors", given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.ffn.0.weight_scale_2": torch.ones(())}, "weight_scale_2 belongs to a quantised format"),
        ({"blocks.0.ffn.0.weight.absmax": torch.ones(())}, "absmax belongs to a quantised format"),
        ({"blocks.9.ffn.0.weight_scale": torch.ones(())}, "must scale a tensor .*blocks.9.ffn.0.weight, which is not"),
        ({"blocks.0.ffn.0.weight_scale": torch.ones(7)}, r"one scale or one a row of .*, got \(7,\)"),
        ({"blocks.0.ffn.0.weight_scale": torch.full((), float("nan"))}, "weight_scale must be finite"),
        ({"blocks.0.ffn.0.weight": torch.zeros(96, 48).to(torch.float8_e4m3fn)}, "weight must have a scale, as other"),
        (
            {"blocks.0.ffn.0.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)},
            "must name one of the formats float8_e4m3fn, float8_e5m2, got 'nvfp4'",
        ),
        ({"blocks.0.ffn.0.comfy_quant": torch.tensor([255], dtype=torch.uint8)}, "must be a description in JSON"),
    ],
)
def test_quantised_files_that_are_not_known(change: State, message: str) -> None:
    state, _ = fp8_scaled("LightX2V")
    if "blocks.0.ffn.0.weight" in change:
        state.pop(f"{COMFY}blocks.0.ffn.0.weight_scale")
    transformer = tiny_transformer(seed=5)
    untouched = frozen(transformer)
    with pytest.raises(ValueError, match=message):
        load_published(transformer, dit=state | {COMFY + name: value for name, value in change.items()})
    untouched()


def shards(folder: Path, index: bool) -> State:
    state = dit_state(tiny_transformer(seed=3))
    names = sorted(state)
    folder.mkdir()
    where = {}
    for number, part in enumerate((names[:40], names[40:80], names[80:]), 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00003.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    if index:
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return state


def test_shards(tmp_path: Path) -> None:
    state = shards(tmp_path / "with", True)
    shards(tmp_path / "without", False)
    assert_loads(tmp_path / "with", state)
    assert_loads(tmp_path / "with" / "diffusion_pytorch_model.safetensors.index.json", state)
    assert_loads(str(tmp_path / "without"), state)
    files = sorted((tmp_path / "without").iterdir())
    assert_loads(files[::-1], state)
    for given in (files[0], files[:1]):
        with pytest.raises(
            ValueError, match=r"is one of 3 shards; missing: .*-00002-of-00003.safetensors, .*-00003-of-"
        ):
            load_published(tiny_transformer(), dit=given)
    files[2].unlink()
    with pytest.raises(ValueError, match="missing: diffusion_pytorch_model-00003-of-00003.safetensors; give all of"):
        load_published(tiny_transformer(), dit=tmp_path / "without")
    next((tmp_path / "with").glob("*-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match="-00002-of-00003.safetensors of its 3 shards must lie beside it"):
        load_published(tiny_transformer(), dit=tmp_path / "with")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x.safetensors"}}'],
)
def test_an_index_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json: (must be the index|its weight_map must name)"):
        load_published(tiny_transformer(), dit=tmp_path)


def test_folders(tmp_path: Path) -> None:
    state = dit_state(tiny_transformer(seed=3))
    with pytest.raises(FileNotFoundError, match="no checkpoint file in "):
        load_published(tiny_transformer(), dit=tmp_path)
    save_file(state, tmp_path / "one.safetensors")
    assert_loads(tmp_path, state)
    save_file(state, tmp_path / "two.safetensors")
    with pytest.raises(
        ValueError, match="must hold one checkpoint, got one.safetensors, two.safetensors: name the file"
    ):
        load_published(tiny_transformer(), dit=tmp_path)
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="is the folder of a pipeline: give the weights in it, such as .*transformer"):
        load_published(tiny_transformer(), dit=tmp_path / "pipe")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match="GGUF is not read here"):
        load_published(tiny_transformer(), dit=tmp_path / "model.gguf")


def inside(key: str) -> str:
    """FSDP's and torch.compile's modules in the middle of a name."""
    return key.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._orig_mod.")


WRAPPED: dict[str, Callable[[State], State]] = {
    "model": lambda state: {"model": state, "epoch": 1},
    "module": lambda state: {"module": state, "ds_version": "0.1"},
    "twice": lambda state: {"state_dict": {"model": state}},
    "compiled": lambda state: {"state_dict": {f"_orig_mod.{key}": value for key, value in state.items()}},
    "FSDP": lambda state: {f"_fsdp_wrapped_module.{key}": value for key, value in state.items()},
    "blocks": lambda state: {inside(key): value for key, value in state.items()},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers(name: str, tmp_path: Path) -> None:
    state = dit_state(tiny_transformer(seed=3))
    torch.save(WRAPPED[name](state), tmp_path / "model.pt")
    assert_loads(tmp_path / "model.pt", state)


def test_diffusers_own_file(tmp_path: Path) -> None:
    transformer = tiny_transformer(seed=3)
    transformer.save_pretrained(tmp_path, max_shard_size="100KB")
    assert_loads(tmp_path, dit_state(transformer))


def test_files_of_old_and_strange_kinds(tmp_path: Path) -> None:
    state = dit_state(tiny_transformer(seed=3))
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="cannot be read with weights_only=True .*no zip file"):
        load_published(tiny_transformer(), dit=tmp_path / "old.pt")
    itself: State = {}
    itself["model"] = itself
    torch.save(itself, tmp_path / "itself.pt")
    torch.save({1: torch.zeros(1)}, tmp_path / "numbers.pt")
    for name, message in (("itself", "0 of 1 keys match"), ("numbers", "names must be strings, got 1")):
        with pytest.raises(ValueError, match=message):
            load_published(tiny_transformer(), dit=tmp_path / f"{name}.pt")


# Damage. Whatever is in a file, it loads, or raises an error of ours, and the transformer is as it was.


def damage(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat or overwrite bytes, most often in the header."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        place = rng.randrange(len(found)) if rng.random() < 0.3 else rng.randrange(min(len(found), 2000))
        kind = rng.randrange(6)
        if kind == 0:
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[place:]
        elif kind == 2:
            found[place:place] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 3:
            del found[place : place + rng.randrange(1, 64)]
        elif kind == 4:
            found[place : place + 8] = rng.choice((b"\xff" * 8, b"\x00" * 8, b"99999999", b'"shape":', b"1e308,[["))
        else:
            found[place:place] = found[rng.randrange(len(found)) :][:200]
        if not found:
            break
    return bytes(found)


def renamed(state: State, rng: random.Random) -> State:
    """Change names, shapes and values of a few entries of a state dict."""
    changed = dict(state)
    for _ in range(rng.randrange(1, 4)):
        key = rng.choice(list(changed))
        value = changed.pop(key)
        kind = rng.randrange(6)
        if kind == 0:
            key = key.replace(*rng.choice(((".", "_"), ("lora_A", "lokr_w1"), ("weight", "alpha"), ("blocks", ""))))
        elif kind == 1:
            key = (
                rng.choice(("", ".", "lora_unet_", "_", "motion_encoder.enc.net_app.convs.0.bias", "x.hada_w1_a")) + key
            )
        elif kind == 2:
            key = "".join(rng.sample(key, len(key)))
        elif kind == 3:
            value = value.reshape(-1)[: rng.randrange(3)]
        elif kind == 4:
            value = torch.full_like(value, rng.choice((float("nan"), float("inf"), 0.0)))
        else:
            value = value.to(rng.choice((torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64)))
        changed[key] = value
    return changed


def attempt(load: Callable[[], Any], transformer: MirageTransformer3DModel, what: str) -> bool:
    """Whether it loads; fails the test with anything but an error of ours, which does not leak another library's."""
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    try:
        load()
    except (ValueError, FileNotFoundError) as error:
        assert str(error) and type(error) in (ValueError, FileNotFoundError), what
        now = transformer.state_dict()
        assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now), what
        return False
    except Exception as error:
        raise AssertionError(what) from error
    if getattr(transformer, "peft_config", None):
        transformer.unload_lora()
    else:
        transformer.load_state_dict(before)
    return True


def write_good(kind: str, folder: Path) -> Path:
    """Write what is damaged afterwards: a LoRA or a backbone, and what lies beside it; return the file to damage."""
    folder.mkdir()
    state = dit_state(tiny_transformer(seed=3)) if "dit" in kind else lora_state(lora_matrices(2, ("self_attn.q",)))
    if kind == "dit.index.json":
        save_file(state, folder / "x-00001-of-00001.safetensors")
        index = {"weight_map": dict.fromkeys(list(state)[:3], "x-00001-of-00001.safetensors")}
        (folder / kind).write_text(json.dumps(index))
        return folder / kind
    path = folder / (kind if kind.endswith(".pt") else "adapter_model.safetensors")
    if path.suffix == ".pt":
        torch.save({"model": state}, path)
    else:
        save_file(state, path, {"lora_alpha": "4"} if kind == "lora.safetensors" else None)
    if kind == "lora config":
        config = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"self_attn.q": 8}, "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder / "adapter_config.json"
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "lora.safetensors",
        "lora.pt",
        "lora names",
        "lora config",
        "dit.safetensors",
        "dit.pt",
        "dit names",
        "dit.index.json",
    ],
)
def test_damaged_files(kind: str, tmp_path: Path) -> None:
    rng = random.Random(kind)
    transformer = tiny_transformer(seed=5)
    good = write_good(kind, tmp_path / "good")
    loaded = 0
    for number in range(FUZZED):
        bad = tmp_path / "bad"
        shutil.copytree(good.parent, bad)
        target = bad / good.name
        if kind.endswith("names"):
            save_file(renamed(load_file(good), rng), target)
        else:
            target.write_bytes(damage(good.read_bytes(), rng))

        def load(target: Path = target) -> None:
            if kind.startswith("dit"):
                load_published(transformer, dit=target)
            else:
                load_lora(transformer, target.parent)

        loaded += attempt(load, transformer, f"{kind} {number}")
        shutil.rmtree(bad)
    assert loaded < FUZZED

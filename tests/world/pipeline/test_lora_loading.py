"""LoRA on a pipeline: files, folders and ids of the hub by the same rules, diffusers' habits, and folders that load."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mirage.models.components import fingerprint
from mirage.models.lora import load_lora
from mirage.pipeline.pipeline import MiragePipeline
from mirage.zoo import load_pipeline, tiny_random_pipeline

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


@pytest.fixture(scope="module")
def base() -> MiragePipeline:
    return tiny_random_pipeline()


@pytest.fixture
def pipe(base: MiragePipeline) -> Any:
    """A pipeline without LoRA, the same one each time: making it takes longer than these tests."""
    transformer = base.transformer
    yield base
    base.transformer = transformer
    if getattr(transformer, "peft_config", None):
        transformer.unload_lora()


def lora(seed: int, rank: int = 4, modules: tuple[str, ...] = ("self_attn.q", "cross_attn.o")) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for block in range(4):
        for module in modules:
            state[f"diffusion_model.blocks.{block}.{module}.lora_A.weight"] = (
                torch.randn(rank, 48, generator=generator) / 4
            )
            state[f"diffusion_model.blocks.{block}.{module}.lora_B.weight"] = (
                torch.randn(48, rank, generator=generator) / 4
            )
    return state


@torch.no_grad()
def output(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    transformer = pipe.transformer
    dtype = transformer.dtype
    latents = torch.randn(1, 48, 3, 4, 6, generator=generator).to(dtype)
    text = torch.randn(1, 7, 32, generator=generator).to(dtype)
    result: torch.Tensor = transformer(latents, torch.full((1, 3), 500.0), text, return_dict=False)[0]
    return result


def test_a_file_and_a_folder_go_the_same_way(pipe: MiragePipeline, tmp_path: Path) -> None:
    before = output(pipe)
    save_file(lora(1), tmp_path / "style.safetensors")
    (tmp_path / "inner").mkdir()
    save_file(lora(1), tmp_path / "inner" / "adapter_model.safetensors")
    (tmp_path / "inner" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    found = []
    for source, options in (
        (tmp_path / "style.safetensors", {}),
        (str(tmp_path), {"weight_name": "style.safetensors"}),
        (tmp_path, {}),
        (tmp_path / "inner", {}),
        (tmp_path / "inner" / "adapter_model.safetensors", {}),
        (tmp_path, {"subfolder": "inner"}),
    ):
        pipe.load_lora_weights(source, **options)
        found.append(output(pipe))
        pipe.unload_lora_weights()
    assert all(torch.equal(one, found[0]) for one in found[:3]) and not torch.equal(found[0], before)
    assert all(torch.equal(one, found[3]) for one in found[3:]) and not torch.equal(found[0], found[3])

    broken = {key: value for key, value in lora(1).items() if "blocks.1.self_attn.q.lora_B" not in key}
    save_file(broken, tmp_path / "broken.safetensors")
    for source, options in ((tmp_path / "broken.safetensors", {}), (tmp_path, {"weight_name": "broken.safetensors"})):
        with pytest.raises(ValueError, match="missing: lora_B of blocks.1.attn1.to_q"):
            pipe.load_lora_weights(source, **options)
    with pytest.raises(
        ValueError, match="weight_name must say which file of .*, one of broken.safetensors, style.safet"
    ):
        pipe.load_lora_weights(tmp_path)
    assert torch.equal(output(pipe), before)


def test_an_id_of_the_hub(pipe: MiragePipeline, tmp_path: Path) -> None:
    """From the cache, as the network would fill it."""
    repository = tmp_path / "models--somebody--style"
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file(lora(1), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    save_file(lora(1), folder / "other.safetensors")
    pipe.load_lora_weights("somebody/style", cache_dir=tmp_path, local_files_only=True)
    pipe.load_lora_weights("somebody/style", weight_name="other.safetensors", cache_dir=tmp_path, local_files_only=True)
    assert [pipe.transformer.peft_config[f"default_{i}"].lora_alpha for i in range(2)] == [8, 4]
    with pytest.raises(FileNotFoundError, match="somebody/other; nor can it be had from the hub"):
        pipe.load_lora_weights("somebody/other", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    "source", ["nowhere/c.safetensors", "./style", "/no/such/folder", "style", "~/style.pt", "a/b/c"]
)
def test_a_mistyped_path_is_no_look_up(source: str, pipe: MiragePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from mirage.models import lora_source

    monkeypatch.setattr(lora_source, "hf_hub_download", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(FileNotFoundError, match="no such file or folder: "):
        pipe.load_lora_weights(source)


def test_arguments_that_mean_nothing_are_refused(pipe: MiragePipeline, tmp_path: Path) -> None:
    save_file(lora(1), tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match="weight_name and subfolder must be None beside a file, got b.safetensors"):
        pipe.load_lora_weights(tmp_path / "style.safetensors", weight_name="b.safetensors")
    with pytest.raises(ValueError, match="weight_name must be None beside a state dict, got 'b'"):
        pipe.load_lora_weights(lora(1), weight_name="b")
    with pytest.raises(TypeError, match="unexpected keyword argument 'lora_scale'"):
        pipe.load_lora_weights(tmp_path / "style.safetensors", lora_scale=0.3)
    with pytest.raises(TypeError, match="must be a path, an id or a state dict, got list"):
        pipe.load_lora_weights([1])
    assert not getattr(pipe.transformer, "peft_config", None)


def test_names_that_are_not_given(pipe: MiragePipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipe.load_lora_weights(lora(1))
    first = output(pipe)
    monitor = logging.getLogger("mirage.pipeline.loading")
    monitor.addHandler(caplog.handler)
    pipe.load_lora_weights(lora(2))
    monitor.removeHandler(caplog.handler)
    assert "the LoRA default_1 is active now and default_0 no longer is" in caplog.text
    assert pipe.get_list_adapters() == {"transformer": ["default_0", "default_1"]}
    pipe.set_adapters("default_0")
    assert torch.equal(output(pipe), first)
    pipe.delete_adapters("default_0")
    pipe.load_lora_weights(lora(1))
    assert pipe.get_list_adapters() == {"transformer": ["default_1", "default_0"]}


def test_hotswap(pipe: MiragePipeline) -> None:
    pipe.load_lora_weights(lora(2), adapter_name="style")
    expected = output(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora(1), adapter_name="style")
    first = output(pipe)
    pipe.load_lora_weights(lora(2), adapter_name="style", hotswap=True)
    assert torch.equal(output(pipe), expected)
    pipe.load_lora_weights(lora(1), adapter_name="style", hotswap=True)
    assert torch.equal(output(pipe), first)
    for other in (lora(2, rank=8), lora(2, modules=("self_attn.q", "self_attn.v"))):
        with pytest.raises(ValueError, match="hotswap must be False: source needs room for blocks.0.attn1.to"):
            pipe.load_lora_weights(other, adapter_name="style", hotswap=True)
        assert torch.equal(output(pipe), first)
    smaller = lora(2, rank=2, modules=("self_attn.q",)) | {"blocks.1.self_attn.q.alpha": torch.tensor(8.0)}
    pipe.load_lora_weights(smaller, adapter_name="style", hotswap=True)
    found = output(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(smaller, adapter_name="style")
    torch.testing.assert_close(found, output(pipe), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"adapter_name must be a LoRA to replace, one of \['style'\], got 'other'"):
        pipe.load_lora_weights(lora(2), adapter_name="other", hotswap=True)


@pytest.mark.slow
def test_a_compiled_transformer_takes_lora(pipe: MiragePipeline) -> None:
    pipe.load_lora_weights(lora(1), adapter_name="style")
    pipe.set_adapters("style", 0.5)
    half = output(pipe)
    pipe.unload_lora_weights()
    compiled = torch.compile(pipe.transformer, backend="eager")
    pipe.transformer = compiled
    pipe.load_lora_weights(lora(1), adapter_name="style")
    pipe.set_adapters("style", 0.5)
    assert pipe.transformer is compiled and pipe.get_active_adapters() == ["style"]
    assert pipe.get_list_adapters() == {"transformer": ["style"]}
    torch.testing.assert_close(output(pipe), half, atol=1e-5, rtol=0)


def test_a_run_is_another_with_a_lora_at_another_weight(pipe: MiragePipeline) -> None:
    pipe.load_lora_weights(lora(1), adapter_name="style")
    seen = [fingerprint(pipe.transformer)]
    for weight in (0.5, 0.25, 1.0):
        pipe.set_adapters("style", weight)
        seen.append(fingerprint(pipe.transformer))
    pipe.disable_lora()
    seen.append(fingerprint(pipe.transformer))
    assert len(set(seen)) == 4 and seen[0] == seen[3]


# Folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_pipeline_gives_the_same_outputs(dtype: torch.dtype, pipe: MiragePipeline, tmp_path: Path) -> None:
    transformer = pipe.transformer
    if dtype != torch.float32:  # as from_pretrained casts it, which keeps norms in float32
        transformer.save_pretrained(tmp_path / "plain")
        transformer = pipe.transformer = type(transformer).from_pretrained(tmp_path / "plain", torch_dtype=dtype)
    plain = output(pipe)
    extra = {f"diffusion_model.blocks.{i}.norm3.diff": torch.full((48,), 0.3) for i in range(4)}
    pipe.load_lora_weights(lora(1) | extra, adapter_name="a")
    pipe.load_lora_weights(lora(2), adapter_name="b/2")
    pipe.load_lora_weights(lora(3), adapter_name="idle")
    pipe.set_adapters(["a", "b/2"], [0.7, -0.3])
    expected = output(pipe)
    transformer.save_pretrained(tmp_path / "transformer")
    names = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not any("base_layer" in name or "lora" in name for name in names)
    assert "lora" not in transformer.config

    loaded = type(transformer).from_pretrained(tmp_path / "transformer", torch_dtype=dtype)
    pipe.transformer = loaded
    assert torch.equal(output(pipe), expected) and not torch.equal(plain, expected)
    assert list(loaded.peft_config) == ["a", "b/2", "idle"] and "lora" not in loaded.config
    pipe.set_adapters("idle")
    pipe.disable_lora()
    assert torch.equal(output(pipe), plain)

    # Switched off, and fused: the folder says so, and has no files that it does not need.
    loaded.save_pretrained(tmp_path / "transformer")
    pipe.transformer = type(transformer).from_pretrained(tmp_path / "transformer", torch_dtype=dtype)
    assert torch.equal(output(pipe), plain)
    pipe.transformer = transformer
    pipe.fuse_lora()
    fused = output(pipe)
    transformer.save_pretrained(tmp_path / "transformer")
    assert not list((tmp_path / "transformer").glob("lora*"))
    pipe.transformer = type(transformer).from_pretrained(tmp_path / "transformer", torch_dtype=dtype)
    assert torch.equal(output(pipe), fused) and not getattr(pipe.transformer, "peft_config", None)
    pipe.transformer = transformer
    pipe.unfuse_lora()


def test_a_whole_pipeline_with_a_lora_is_saved_and_loaded(pipe: MiragePipeline, tmp_path: Path) -> None:
    pipe.load_lora_weights(lora(1), adapter_name="style")
    pipe.set_adapters("style", 0.5)
    expected = output(pipe)
    pipe.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    assert len(list((tmp_path / "saved" / "transformer").glob("diffusion_pytorch_model-*"))) > 1
    loaded = MiragePipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(output(loaded), expected)
    assert torch.equal(output(load_pipeline(str(tmp_path / "saved"))), expected)
    (tmp_path / "saved" / "transformer" / "lora_0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="says that it has a LoRA in lora_0.safetensors"):
        MiragePipeline.from_pretrained(tmp_path / "saved")


@pytest.mark.slow
def test_mirage_tiny_is_saved_and_loaded(tmp_path: Path) -> None:
    pipe = load_pipeline("mirage-tiny")
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    loaded = type(pipe.transformer).from_pretrained(tmp_path / "transformer")
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.peft_config["default"].lora_alpha == pipe.transformer.peft_config["default"].lora_alpha


def test_weights_that_are_missing_are_said(pipe: MiragePipeline, tmp_path: Path) -> None:
    pipe.transformer.save_pretrained(tmp_path / "t")
    path = tmp_path / "t" / "diffusion_pytorch_model.safetensors"
    state = {name.replace("to_q.", "to_q.base_layer."): value for name, value in load_file(path).items()}
    save_file(state, path)
    with pytest.raises(ValueError, match=r"16 weights are missing: blocks.0.attn1.to_q.weight, .*saved with a LoRA on"):
        type(pipe.transformer).from_pretrained(tmp_path / "t")


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"files": []},
        {"enabled": True, "files": [{"file": "../x.safetensors", "name": "a", "active": True, "weight": 1}]},
        {"enabled": True, "files": [{"file": "x.safetensors", "name": "a", "active": True, "weight": float("nan")}]},
    ],
)
def test_an_entry_that_was_changed(entry: Any, pipe: MiragePipeline, tmp_path: Path) -> None:
    pipe.transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"lora": entry}))
    with pytest.raises(ValueError, match="the entry lora of its config.json is not as it was saved"):
        type(pipe.transformer).from_pretrained(tmp_path)


def test_what_is_no_folder_of_a_pipeline(pipe: MiragePipeline, tmp_path: Path) -> None:
    load = MiragePipeline.from_pretrained
    with pytest.raises(FileNotFoundError, match="no such folder: "):
        load(tmp_path / "nowhere")
    pipe.transformer.save_pretrained(tmp_path / "native")
    (tmp_path / "native" / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 48}))
    with pytest.raises(ValueError, match=r"one model \(WanModel\) and no model_index.json: .*load_published"):
        load(tmp_path / "native")
    with pytest.raises(ValueError, match="got the file .*load_published"):
        load(tmp_path / "native" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no model_index.json"):
        load(tmp_path / "empty")
    for text, message in (("null", "must name the pipeline's class"), ("{", "must be JSON")):
        (tmp_path / "empty" / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "empty")


class Payload:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('a pickle ran')",)


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_no_pickle_in_a_folder_runs(part: str, pipe: MiragePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    for path in (tmp_path / part).glob("*.safetensors"):
        name = {"text_encoder": "pytorch_model.bin", "transformer": "diffusion_pytorch_model.bin"}[part]
        torch.save({"weight": Payload()}, path.with_name(name))
        path.unlink()
    with pytest.raises((ValueError, OSError)):
        MiragePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_a_damaged_file_is_an_error_in_words(part: str, pipe: MiragePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    path = next((tmp_path / part).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises((ValueError, OSError)):
        MiragePipeline.from_pretrained(tmp_path)


def test_load_lora_takes_folders_too(pipe: MiragePipeline, tmp_path: Path) -> None:
    save_file(lora(1), tmp_path / "pytorch_lora_weights.safetensors")
    load_lora(pipe.transformer, tmp_path)
    assert list(pipe.transformer.peft_config) == ["default"]


def test_a_folder_of_a_model_with_both_kinds_of_lora(pipe: MiragePipeline, tmp_path: Path) -> None:
    """What the transformer was saved with counts; a lora.safetensors beside it is what it was made of."""
    pipe.load_lora_weights(lora(1), adapter_name="default")
    expected = output(pipe)
    pipe.save_pretrained(tmp_path)
    save_file(lora(2), tmp_path / "lora.safetensors")
    assert torch.equal(output(load_pipeline(str(tmp_path))), expected)
    replaced = load_pipeline(str(tmp_path), lora=str(tmp_path / "lora.safetensors"))
    assert list(replaced.transformer.peft_config) == ["default"] and not torch.equal(output(replaced), expected)

"""Training: every stage takes its steps, resumes exactly after a kill, and trains what generation runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import generation
import pytest
import torch
import yaml
from torch import Tensor

pytest.importorskip("diffusers", reason="the extra generate is not installed")
pytest.importorskip("yaml", reason="the extra train is not installed")

from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from training_runs import TOKENS, config, draw, models_of, values

import mirage.training.loop as loop
from mirage import LatentDepth, MirageMemoryAdapter, MirageTransformer3DModel
from mirage.commands.cli import main
from mirage.models.components import check_models
from mirage.models.lora import load_lora
from mirage.models.vae import encode_static_frame
from mirage.pipeline.conditioning import CleanFrames
from mirage.pipeline.denoise import ChunkDenoiser
from mirage.pipeline.memory import MemoryConfig
from mirage.pipeline.state import Prompt, SessionConfig
from mirage.training.batches import DiffusionBatchMaker
from mirage.training.loop import METRICS, train
from mirage.training.models import trained
from mirage.training.objective import DiffusionObjective
from mirage.training.release import assemble_mirage_tiny
from mirage.zoo import mirage_tiny_pipeline, tiny_random_pipeline


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)  # operations this small only wait for a second one


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# Every stage.


@pytest.mark.slow
def test_three_steps_of_every_stage_chained(tmp_path: Path) -> None:
    """VAE, backbone, adapter, LoRA, each on what the one before has left."""
    parts: dict[str, Any] = {}
    expected = {
        "vae": ["vae"],
        "backbone": ["transformer", "latent_depth"],
        "adapter": ["memory_adapter", "latent_depth"],
        "lora": ["memory_adapter", "latent_depth", "lora.safetensors"],
    }
    for stage, names in expected.items():
        out = tmp_path / stage
        report = train(config(stage, out, models=parts, tensorboard=stage == "vae"), progress=False)
        assert report["steps"] == 3 and report["saved"] == names and not report["broken"]
        steps = lines(out)
        assert [line["step"] for line in steps] == [1, 2, 3]
        assert all(line["loss"] > 0 and line["gradient_norm"] > 0 for line in steps)
        assert [round(line["learning_rate"] / 1e-3, 6) for line in steps] == [1.0, 0.75, 0.25]
        summary = json.loads((out / "summary.json").read_text())
        assert (
            summary["steps"] == 3 and summary["loss"] == steps[-1]["loss"] and ("psnr" in summary) == (stage == "vae")
        )
        assert summary["seconds"] == pytest.approx(sum(line["seconds"] for line in steps))
        parts |= {name: str(out / name) for name in names if name != "lora.safetensors"}
    assert list((tmp_path / "vae" / "tensorboard").glob("events*"))
    vae = AutoencoderKLWan.from_pretrained(parts["vae"])
    assert min(vae.config.latents_std) > 0 and vae.config.latents_std != [1.0] * 48
    transformer = MirageTransformer3DModel.from_pretrained(parts["transformer"])
    adapter = MirageMemoryAdapter.from_pretrained(parts["memory_adapter"])
    depth = LatentDepth.from_pretrained(parts["latent_depth"])
    check_models(vae, transformer, adapter, depth)
    assert all(projection.weight.any() for projection in adapter.proj_out) and depth.conv_out.weight.any()
    load_lora(transformer, tmp_path / "lora" / "lora.safetensors")
    found = {name: p for name, p in transformer.named_parameters() if ".lora_B." in name}
    for part in ("attn1.to_q", "attn1.to_k", "attn2.to_v", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"):
        assert any(part in name and parameter.any() for name, parameter in found.items())
    # As `make tiny` puts them together, and as `--model mirage-tiny` loads them.
    for name, run in (
        ("vae-video", "vae"),
        ("vae-shifted", "vae"),
        ("vae-steady", "vae"),
        ("adapter-none", "adapter"),
        ("lora-none", "lora"),
        ("lora-nearest", "lora"),
    ):
        (tmp_path / name).symlink_to(tmp_path / run)
    assert 0 < assemble_mirage_tiny(tmp_path, tmp_path / "model", tmp_path / "results") < 40e6
    written = {str(path.relative_to(tmp_path / "model" / "memories")) for path in tmp_path.glob("model/memories/*/*")}
    assert written == {f"none/{name}" for name in expected["lora"]}  # of nearest there is the card's line
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| lora-none | as lora, the cameras' rays instead of a memory | 3 | 1 | adamw, 0.001 | 0 |" in card
    assert "| lora-nearest | lora continued, memory: nearest | 3 |" in card and "Not measured yet" in card
    pipe = mirage_tiny_pipeline(folder=tmp_path / "model")
    assert pipe.text_length == 96 and pipe.dtype == torch.float32
    assert torch.allclose(pipe.memory_adapter.proj_out[0].weight, adapter.proj_out[0].weight, rtol=0.01, atol=1e-4)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(**generation.options(9, num_inference_steps=1)).frames
    assert frames.shape == (1, 48, 3, 4, 6) and frames.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["backbone", "adapter", "lora"])
def test_a_stage_trains_its_part_alone(stage: str) -> None:
    asked = config(stage, train_adapter=False)
    models = models_of(asked)
    objective = DiffusionObjective(asked, models)
    names = trained(objective)
    belongs = {"backbone": "transformer.", "adapter": "memory_adapter.", "lora": "transformer."}[stage]
    assert names and all(name.startswith((belongs, "latent_depth.")) for name in names)
    if stage == "lora":
        assert all(".lora_" in name for name in names if name.startswith("transformer."))
    objective(DiffusionBatchMaker(asked, models, torch.device("cpu"))(draw(asked, 0, 1)))["loss"].backward()
    assert all(parameter.grad is not None for name, parameter in names.items() if "lora_A" not in name)
    for model in (models.vae, models.transformer, models.memory_adapter):
        for parameter in () if model is None else model.parameters():
            assert parameter.requires_grad or parameter.grad is None


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    """One clip, again and again: the depth head fits it, and the backbone's loss falls."""
    data = {"sources": [{"kind": "synthetic", "rooms": 1}]}
    changes = {"steps": 30, "learning_rate": 3e-3, "save_every": 100, "schedule": "constant"}
    train(config("backbone", tmp_path, data=data, **changes), progress=False)
    losses = lines(tmp_path)
    for name in ("flow", "depth"):
        early, late = (sum(line[name] for line in part) / 8 for part in (losses[:8], losses[-8:]))
        assert late < 0.9 * early, name


@pytest.mark.slow
def test_mirage_tiny_is_trained_first(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="mirage-tiny is not in this installation: `make tiny` trains it"):
        mirage_tiny_pipeline(folder=tmp_path)


# The same curve after a stop.


@pytest.mark.slow
def test_a_run_that_stops_anywhere_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {
        "steps": 7,
        "save_every": 2,
        "gradient_accumulation": 2,
        "lora": {"dropout": 0.2},
        "warmup": 2,
        "keep": 1,
    }
    train(config("lora", tmp_path / "whole", **changes), progress=False)
    out = tmp_path / "stopped"
    forward, save_checkpoint, replace = DiffusionObjective.forward, loop.save_checkpoint, os.replace
    calls = {"forward": 0, "save_checkpoint": 0, "replace": 0}

    def counted(name: str, call: Any, stop: int) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if name == "replace" and Path(arguments[1]).parent.name != "checkpoints":
                return call(*arguments, **options)
            calls[name] += 1
            if calls[name] == stop:
                raise KeyboardInterrupt
            return call(*arguments, **options)

        return wrapped

    # In the middle of a step; before a checkpoint; when it is written but not in its place.
    for owner, name, call, stop in (
        (DiffusionObjective, "forward", forward, 6),
        (loop, "save_checkpoint", save_checkpoint, 1),
        (os, "replace", replace, 2),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, counted(name, call, stop))
            with pytest.raises(KeyboardInterrupt):
                train(config("lora", out, **changes), progress=False)
        torch.manual_seed(12345)  # the process's other draws do not matter
    assert 0 < len(lines(out)) < 7
    train(config("lora", out, **changes), progress=False)
    curves = [[line["loss"] for line in lines(folder)] for folder in (tmp_path / "whole", out)]
    assert len(curves[1]) == 7 and curves[0] == pytest.approx(curves[1], abs=1e-6)
    assert curves[0] == curves[1]  # on the CPU, to the bit
    whole, again = (load_file(folder / "lora.safetensors") for folder in (tmp_path / "whole", out))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["00000007"]


@pytest.mark.slow
def test_a_killed_process_resumes_exactly(tmp_path: Path) -> None:
    files = {}
    for name in ("whole", "killed"):
        changes = {"steps": 8, "save_every": 2, "data": {"frames": 9, "sources": [{"kind": "synthetic", "rooms": 2}]}}
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(values("adapter", tmp_path / name, **changes)))
    command = [sys.executable, "-m", "mirage", "train", str(files["killed"])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    began = time.monotonic()
    while not (tmp_path / "killed" / METRICS).exists() or len(lines(tmp_path / "killed")) < 3:
        assert process.poll() is None and time.monotonic() - began < 120, process.stderr
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 3 <= len(lines(tmp_path / "killed")) < 8
    for name in ("killed", "whole"):
        assert main(["train", str(files[name])]) == 0
    curves = [[line["loss"] for line in lines(tmp_path / name)] for name in ("whole", "killed")]
    assert len(curves[0]) == 8 and curves[0] == pytest.approx(curves[1], abs=1e-6)


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values("adapter", tmp_path / "out", save_every=3)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "-m",
        "mirage",
        "train",
        str(file),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 steps, loss") == 1 and [line["step"] for line in lines(tmp_path / "out")] == [1, 2, 3]
    names = {path.name for path in (tmp_path / "out" / "checkpoints" / "00000003").iterdir()}
    assert names == {"trained.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    # The first step's loss is the mean of what each process makes of its own clip.
    asked = config("adapter", tmp_path / "out", save_every=3)
    models = models_of(asked)
    objective, maker = DiffusionObjective(asked, models), DiffusionBatchMaker(asked, models, torch.device("cpu"))
    with torch.no_grad():
        alone = [float(objective(maker(draw(asked, number)))["loss"]) for number in (0, 1)]
    assert lines(tmp_path / "out")[0]["loss"] == pytest.approx(sum(alone) / 2, rel=1e-5)


@pytest.mark.slow
def test_what_a_run_may_be_resumed_with(tmp_path: Path) -> None:
    train(config("adapter", tmp_path, steps=2), progress=False)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(config("adapter", tmp_path, resume=False), progress=False)
    with pytest.raises(
        ValueError, match=r"can be resumed only with what it was started with: learning_rate was 0.001, got 0.5"
    ):
        train(config("adapter", tmp_path, learning_rate=0.5), progress=False)
    assert len(lines(tmp_path)) == 2
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["objective"]["memory"] == "aligned" and record.pop("checksum")
    record["objective"]["memory"] = "ours"  # its old name
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert train(config("adapter", tmp_path, steps=3), progress=False)["steps"] == 3
    assert len(lines(tmp_path)) == 3
    done = train(config("adapter", tmp_path, steps=3), progress=False)  # there is nothing left to do
    assert done["steps"] == 3 and done["loss"] is None and done["saved"] == ["memory_adapter", "latent_depth"]


@pytest.mark.slow
def test_a_run_that_could_not_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    mistyped = config("adapter", out, models={"transformer": str(tmp_path / "trnasformer")})
    with pytest.raises(OSError, match=r"models\.transformer: no folder .*trnasformer, and no such model could be had"):
        train(mistyped, progress=False)
    assert not (out / "config.json").exists()
    assert train(config("adapter", out, steps=1), progress=False)["steps"] == 1


# What is trained is what generation runs.


@pytest.mark.slow
@pytest.mark.parametrize("channels", [96, 49])
def test_an_adapter_to_train_leaves_the_backbone_as_it_is(channels: int) -> None:
    asked = config("adapter", models={"memory_adapter": {"control_channels": channels}})
    models = models_of(asked)
    objective = DiffusionObjective(asked, models).train()
    for numbers in ((0,), (1, 2)):
        chunk = DiffusionBatchMaker(asked, models, torch.device("cpu"))(draw(asked, *numbers))
        assert chunk.memory_context is not None and chunk.memory_context.shape[1] == channels
        assert torch.equal(objective.predict(chunk), objective.predict(chunk, with_memory=False))
        assert models.memory_adapter is not None
    torch.nn.init.normal_(models.memory_adapter.proj_out[0].weight, std=0.02)
    assert not torch.equal(objective.predict(chunk), objective.predict(chunk, with_memory=False))


@pytest.mark.slow
def test_the_transformer_gets_in_training_what_it_gets_in_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(
        "adapter",
        data={"frames": 33},
        objective={"drop_references": 0.0, "drop_preceding": 0.0, "drop_memory": 0.0, "independent_noise": 0.0},
    )
    models = models_of(asked)
    maker = DiffusionBatchMaker(asked, models, torch.device("cpu"))
    number = next(
        n for n in range(20) if (c := maker(draw(asked, n)).clean).references.shape[2] and c.preceding.shape[2]
    )
    chunk = maker(draw(asked, number))
    given: list[dict[str, Any]] = []
    forward = MirageTransformer3DModel.forward

    def spy(self: Any, **arguments: Any) -> Any:
        given.append(arguments)
        return forward(self, **arguments)

    pipe = tiny_random_pipeline()
    pipe.vae, pipe.transformer, pipe.memory_adapter = models.vae, models.transformer, models.memory_adapter
    pipe.set_progress_bar_config(disable=True)
    pipe._interrupt = False
    monkeypatch.setattr(MirageTransformer3DModel, "forward", spy)
    DiffusionObjective(asked, models)(chunk)
    frames = chunk.noisy.shape[2]
    context = chunk.memory_context
    assert context is not None

    def rows(video: Tensor) -> Tensor:
        return video[0].movedim(1, 0)

    settings = SessionConfig(
        64, 96, 1, (0.999,), 1.0, 1.0, MemoryConfig(mode="adapter"), 4, 0.04, 0.1, 2, "chunk", 24.0
    )
    denoise = ChunkDenoiser(pipe, Prompt(chunk.prompt_embeds, None), settings, torch.Generator().manual_seed(0))
    denoise(
        first_latent=rows(chunk.clean.first),
        num_latents=frames,
        references=rows(chunk.clean.references),
        preceding=rows(chunk.clean.preceding),
        readout=rows(context[:, :48]),
        visible=rows(context[:, 48:]).any(1),
    )
    in_training, in_generation = given
    assert (
        in_training["num_reference_frames"] == in_generation["num_reference_frames"] == chunk.clean.references.shape[2]
    )
    assert torch.equal(in_training["memory_context"], in_generation["memory_context"])
    clean = in_generation["timestep"][0] == 0
    assert torch.equal(in_training["timestep"][0] == 0, clean) and clean.sum() == clean.numel() - (frames - 1)
    assert torch.equal(in_training["hidden_states"][:, :, clean], in_generation["hidden_states"][:, :, clean])
    assert in_training["hidden_states"].shape == in_generation["hidden_states"].shape
    assert len(set(in_training["timestep"][0][~clean].tolist())) == 1  # one level for all, as in generation


@pytest.mark.slow
def test_clean_frames_are_laid_out_as_the_transformer_wants() -> None:
    part = torch.arange(2 * 3 * 9, dtype=torch.float32).view(2, 3, 9, 1, 1)
    clean = CleanFrames(part[:, :, 4:5], part[:, :, :2], part[:, :, 2:4])
    around = clean.around(part[:, :, 5:9])
    assert around[0, 0, :, 0, 0].tolist() == [0, 1, 4, 6, 7, 8, 2, 3]
    assert clean.denoised(4).tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert clean.target(around, 4)[0, 0, :, 0, 0].tolist() == [4, 6, 7, 8]


# Chunks.


def quiet(**changes: Any) -> dict[str, Any]:
    """Return an objective that draws nothing in the memory."""
    return {
        "drop_references": 0.0,
        "drop_preceding": 0.0,
        "drop_memory": 0.0,
        "drop_prompt": 0.0,
        "drop_tokens": 0.0,
        "depth_noise": 0.0,
        "pose_noise": 0.0,
    } | changes


def make(numbers: tuple[int, ...] = (0, 1), **changes: Any) -> Any:
    asked = config("adapter", data={"frames": 33}, objective=changes)
    return DiffusionBatchMaker(asked, models_of(asked), torch.device("cpu"))(draw(asked, *numbers))


@pytest.mark.slow
def test_a_chunk_is_a_function_of_its_number() -> None:
    first, again, other = make((0, 1)), make((0, 1)), make((2, 3))
    for name in ("noisy", "flow", "levels", "prompt_embeds", "memory_context"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.levels, other.levels)


@pytest.mark.slow
def test_noise_is_between_latents_and_noise() -> None:
    chunk = make((3, 4), independent_noise=1.0)
    weight = chunk.levels[:, None, :, None, None]
    latents, noise = chunk.noisy - weight * chunk.flow, chunk.noisy + (1 - weight) * chunk.flow
    assert torch.allclose(latents[:, :, :1], chunk.clean.first, atol=1e-5)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert all(len(set(row.tolist())) == row.numel() for row in chunk.levels)
    shared = make((3, 4), independent_noise=0.0)
    assert all(len(set(row.tolist())) == 1 for row in shared.levels) and len(set(shared.levels[:, 0].tolist())) == 2


@pytest.mark.slow
def test_the_memory_shows_what_was_written() -> None:
    with_references = 0
    for number in range(4):
        chunk = make((number,), **quiet())
        context = chunk.memory_context
        target = chunk.noisy - chunk.levels[:, None, :, None, None] * chunk.flow
        visible = context[:, :48, :5].abs().sum(1) > 0
        at_first = visible[:, 0]
        assert at_first.float().mean() > 0.5  # the first frame is in the memory
        error = (context[:, :48, 0] - target[:, :, 0]).square().sum(1)[at_first].mean()
        assert error < 0.5 * target[:, :, 0].square().sum(1)[at_first].mean()
        assert (context[:, :48].abs().sum(1) == 0).any() or visible.all()
        with_references += int(chunk.clean.references.shape[2] > 0)
    assert with_references


@pytest.mark.slow
def test_how_often_a_chunk_is_the_first() -> None:
    def preceding(number: int, **changes: Any) -> int:
        return make((number,), **quiet(**changes)).clean.preceding.shape[2]

    assert not any(preceding(number, first_chunks=1.0) for number in range(4))
    assert all(preceding(number, first_chunks=0.0) for number in range(8))
    mixed = [preceding(number, first_chunks=0.5) > 0 for number in range(12)]
    assert 2 < sum(mixed) < 10


@pytest.mark.slow
def test_what_is_dropped_is_not_there() -> None:
    assert not make((0, 1), drop_memory=1.0).memory_context[:, :48].any()
    for number in range(0, 6, 2):
        chunk = make((number, number + 1), drop_references=1.0, drop_preceding=1.0)
        assert chunk.clean.references.shape[2] == chunk.clean.preceding.shape[2] == 0
    asked = config("adapter", objective={"drop_prompt": 1.0})
    models = models_of(asked)
    dropped = DiffusionBatchMaker(asked, models, torch.device("cpu"))(draw(asked, 0)).prompt_embeds
    assert torch.equal(dropped[0], models.text("").float()) and not torch.equal(dropped, make((0,)).prompt_embeds)
    fewer = [
        make((n,), **quiet(drop_tokens=fraction)).memory_context[:, :48].any(1).sum()
        for n in (1, 2)
        for fraction in (0, 1)
    ]
    assert fewer[1] < fewer[0] or fewer[3] < fewer[2]


@pytest.mark.slow
def test_what_moves_is_not_remembered() -> None:
    asked = config("adapter", objective=quiet())
    maker = DiffusionBatchMaker(asked, models_of(asked), torch.device("cpu"))
    (sample,) = draw(asked, 0)
    sample.clip.static[:] = False
    chunk = maker([sample])
    assert chunk.memory_context is not None and not chunk.memory_context[:, :48].any()


@pytest.mark.slow
def test_depth_is_asked_for_as_in_generation() -> None:
    counts = []
    for number in range(6):
        for frames in (9, 33):
            asked = config("adapter", data={"frames": frames})
            depth = DiffusionBatchMaker(asked, models_of(asked), torch.device("cpu"))(draw(asked, number)).depth
            assert depth is not None
            count = depth.true.shape[1]
            assert depth.latents.shape[2] == depth.rays.shape[2] == depth.memory_depth.shape[1] == count
            assert depth.true.shape[2:] == TOKENS
            counts.append(count)
            assert count > 1 or not depth.memory_mask.any()
            known = depth.memory_mask & (depth.true > 0)
            if known.any():
                assert (depth.memory_depth / depth.true - 1).abs()[known].median() < 0.3
    assert set(counts) == {1, 2, 3}  # the image alone; the new frames of a later chunk; those of the first


@pytest.mark.slow
def test_clips_of_a_batch_are_of_one_shape() -> None:
    asked = config("adapter")
    one, other = draw(asked, 0), draw(config("adapter", data={"frames": 33}), 0)
    with pytest.raises(ValueError, match=r"clips of a batch must be of one shape, got latents \[\(5, 48, 4, 6\)"):
        DiffusionBatchMaker(asked, models_of(asked), torch.device("cpu"))([*one, *other])


# The command.


@pytest.mark.slow
def test_prepare_then_train_on_what_it_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values("adapter", tmp_path / "out")))
    for written, present in ((4, 0), (0, 4)):
        assert main(["prepare", str(file), "--out", str(tmp_path / "packed")]) == 0
        assert f"{written} clips written" in (said := capsys.readouterr().out) and f"{present} were there" in said
    again = [f"data.sources=[{{kind: packed, path: {tmp_path / 'packed'}}}]", "steps=1"]
    assert main(["train", str(file), *again]) == 0
    assert "1 steps, loss" in (said := capsys.readouterr().out) and "memory_adapter" in said
    assert main(["train", str(file), "stage=fly"]) == 2
    assert "stage must be one of vae, backbone, adapter, lora, got 'fly'" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 2


@pytest.mark.slow
def test_a_memory_keeps_the_static_latent_of_a_clips_first_frame(tmp_path: Path) -> None:
    from mirage.training.prepare import prepare

    asked = config("adapter")
    prepare(asked, tmp_path / "packed", progress=False)
    data = {"sources": [{"kind": "packed", "path": str(tmp_path / "packed")}]}
    models = models_of(asked)
    maker = DiffusionBatchMaker(asked, models, torch.device("cpu"))
    (clip,), packed = ([one.clip for one in draw(a, 0)] for a in (asked, config("adapter", data=data)))
    assert clip.frames is not None
    static_latent = encode_static_frame(models.vae, clip.frames[:1] * 2.0 - 1.0)[0, :, 0]
    for one in (clip, *packed):
        latents = maker.latents(one)
        memory = maker.readouts.new_memory(one, latents)
        memory.write([0, 1], one.depth[:2], one.cameras[:2], one.static[:2])
        rows = static_latent, latents[1]
        for frame, row in enumerate(rows):
            held = memory.cache.features[memory.cache.frame_ids == frame]
            assert len(held) > 5
            torch.testing.assert_close(held, row[:, one.static[frame] & (one.depth[frame] > 0)].T, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_latents_of_another_vae_are_named(tmp_path: Path) -> None:
    from mirage.training.prepare import prepare

    prepare(config("adapter"), tmp_path / "packed", progress=False)
    data = {"sources": [{"kind": "packed", "path": str(tmp_path / "packed")}]}
    other = {"vae": {"base_dim": 8, "decoder_base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}}
    with pytest.raises(ValueError, match="were encoded by another VAE"):
        train(config("adapter", tmp_path / "out", data=data, models=other, seed=7), progress=False)
    (tmp_path / "packed" / "000003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"000000.safetensors: encoded by another VAE: name another folder, or remove"):
        prepare(config("adapter", models=other, seed=7), tmp_path / "packed", progress=False)
    assert len(list((tmp_path / "packed").iterdir())) == 3  # nothing was written beside them
    path = tmp_path / "packed" / "000001.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"version":"2"', b'"version":"1"'))
    with pytest.raises(ValueError, match=r"000001.safetensors: mirage-clip must be of version 2, got 1: name another"):
        prepare(config("adapter"), tmp_path / "packed", progress=False)
    path.write_bytes(path.read_bytes().replace(b'"version":"1"', b'"version":"2"'))
    (tmp_path / "packed" / "000000.safetensors").write_bytes(b"\xff" * 9)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        prepare(config("adapter"), tmp_path / "packed", progress=False)
    prepared = tmp_path / "packed" / "000000.safetensors"
    prepared.unlink()
    path.replace(prepared)
    with pytest.raises(
        ValueError, match=r"000000.safetensors: must be clip room \d+, got room \d+: name another folder"
    ):
        prepare(config("adapter"), tmp_path / "packed", progress=False)
    prepared.replace(path)
    more = tmp_path / "packed" / "000004.safetensors"
    more.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"000004.safetensors: must be no clip of these data, got room"):
        prepare(config("adapter"), tmp_path / "packed", progress=False)
    more.unlink()
    assert prepare(config("adapter"), tmp_path / "packed", progress=False)["written"] == 2
    with pytest.raises(ValueError, match="the VAE is trained on frames"):
        train(config("vae", tmp_path / "vae", data=data), progress=False)


@pytest.mark.slow
def test_broken_clips_are_skipped_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mirage.training.prepare import prepare

    prepare(config("adapter"), tmp_path / "packed", progress=False)
    broken = tmp_path / "packed" / "000001.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    data = {"sources": [{"kind": "packed", "path": str(tmp_path / "packed")}]}
    report = train(config("adapter", tmp_path / "out", steps=4, data=data), progress=False)
    assert list(report["broken"]) == [str(broken)] and "cut short" in report["broken"][str(broken)]
    assert lines(tmp_path / "out")[-1]["broken"] == 1
    assert "skipped, 1 so far" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"1 of 4 clips are broken, more than data.max_broken allows: .*000001"):
        train(config("adapter", tmp_path / "less", steps=4, data=data | {"max_broken": 0.1}), progress=False)


@pytest.mark.slow
def test_loop_refuses_a_loss_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = DiffusionObjective.forward
    monkeypatch.setattr(
        loop.DiffusionObjective,
        "forward",
        lambda self, chunk: {name: value * float("nan") for name, value in forward(self, chunk).items()},
    )
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        train(config("adapter", tmp_path), progress=False)

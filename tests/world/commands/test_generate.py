"""`mirage generate`: the whole path by command, its files, and what it refuses."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import generation
import numpy as np
import PIL.Image
import pytest
import room
import torch
from generation import SIZE

from mirage.commands import cli, generate
from mirage.media import join_videos, load_video, save_video
from mirage.models.adapter import MirageMemoryAdapter
from mirage.models.lora import save_lora
from mirage.scenes.camera_files import load_npz, save_npz
from mirage.zoo import default_steps, load_pipeline
from mirage_kernels import LatentCache

FILES = ("video.mp4", "cache.safetensors", "metrics.jsonl", "contact.png")
QUICK = ["--steps", "2", "--chunk-frames", "9", "--size", "64x96"]


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    """The room's first frame, in a file."""
    pixels = (generation.texture(generation.cameras(9)[0])[0].permute(1, 2, 0) * 255).byte().numpy()
    path = tmp_path / "room.png"
    PIL.Image.fromarray(pixels).convert("RGBA").save(path)
    return path


def run(*arguments: str | Path) -> int:
    return cli.main(["generate", *map(str, arguments)])


@pytest.mark.slow
def test_tiny_random_generates_without_anything_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("--model", "tiny-random", "--frames", "17", "--out", out, *QUICK) == 0
    assert all((out / name).stat().st_size for name in FILES)
    frames = list(load_video(out / "video.mp4"))
    assert len(frames) == 17 and frames[0].shape == (3, *SIZE)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["frames"] for entry in metrics] == [[0, 9], [9, 17]]
    cache = LatentCache.load(out / "cache.safetensors")
    assert len(cache) == metrics[-1]["tokens"] > 50
    assert PIL.Image.open(out / "contact.png").width == 1600
    cameras = load_npz(out / "trajectory.npz")
    assert len(cameras) == 17 and torch.equal(cameras.cam2world[0], cameras.cam2world[16])  # orbit and back
    printed = capsys.readouterr().out
    assert "17 frames of 64x96 in 2 chunks" in printed and f"{len(cache):,} tokens" in printed

    # The same again is refused, unless resumed; which changes nothing.
    assert run("--model", "tiny-random", "--frames", "17", "--out", out, *QUICK) == 2
    assert "add --resume" in capsys.readouterr().err
    before = (out / "video.mp4").read_bytes()
    assert run("--model", "tiny-random", "--frames", "17", "--out", out, "--resume", *QUICK) == 0
    assert (out / "video.mp4").read_bytes() == before
    for other, message in (
        (["--trajectory", "dolly"], "trajectory was orbit-and-back, got dolly"),
        (["--fov", "50"], "fov was 60.0, got 50.0"),
        (["--seed", "3"], "seed was 0, got 3"),
    ):
        assert run("--model", "tiny-random", "--frames", "17", "--out", out, "--resume", *QUICK, *other) == 2
        assert message in capsys.readouterr().err
    assert run("--model", "tiny-random", "--frames", "21", "--out", out, "--resume", *QUICK) == 2
    assert "frames was 17, got 21" in capsys.readouterr().err


@pytest.mark.slow
def test_own_model_adapter_lora_image_depth_and_path(tmp_path: Path, image_file: Path) -> None:
    """Everything from files, and the result is that of the pipeline called with the same."""
    views = generation.cameras(9)
    pipe = generation.make_pipeline(with_memory=False, with_depth=False)
    pipe.save_pretrained(tmp_path / "model")
    adapter = generation.make_pipeline(seed=5, control_channels=49).memory_adapter
    adapter.save_pretrained(tmp_path / "adapter")
    lora = _save_lora(tmp_path / "lora.safetensors")
    depth = room.render(views)[0]
    np.save(tmp_path / "depth.npy", depth.numpy())
    save_npz(tmp_path / "path.npz", views)
    given = ["--model", tmp_path / "model", "--adapter", tmp_path / "adapter", "--lora", lora, "--image", image_file]
    given += ["--depth", tmp_path / "depth.npy", "--trajectory", tmp_path / "path.npz", "--prompt", "a room"]
    given += ["--frames", "9", "--seed", "7", "--static-filter", "none"]
    assert run(*given, "--out", tmp_path / "out", *QUICK) == 0

    pipe.register_modules(memory_adapter=adapter)
    pipe.load_lora_weights(lora)
    asked = generation.options(9, generator=torch.Generator().manual_seed(7), output_type="latent")
    asked["image"] = PIL.Image.open(image_file).convert("RGB")
    expected = pipe(**asked).cache
    found = LatentCache.load(tmp_path / "out" / "cache.safetensors")
    assert torch.equal(found.features, expected.features) and torch.equal(found.points, expected.points)
    assert not (tmp_path / "out" / "trajectory.npz").exists()


def _save_lora(path: Path) -> Path:
    from peft import LoraConfig

    transformer = generation.make_pipeline(with_memory=False).transformer
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    save_lora(transformer, path)
    return path


def test_published_files_are_adapters_too(tmp_path: Path) -> None:
    """The release's own key names: `vace_blocks.0.after_proj` and so on."""
    adapter = generation.make_pipeline(seed=3).memory_adapter
    names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
    state = {}
    for key, value in adapter.state_dict().items():
        if key.startswith("patch_embedding"):
            key = f"vace_{key}"
        elif key.startswith("proj_in"):
            key = key.replace("proj_in", "vace_blocks.0.before_proj")
        elif key.startswith("proj_out"):
            key = f"vace_blocks.{key.split('.')[1]}.after_proj.{key.split('.')[2]}"
        else:
            key = "vace_" + key.replace("attn1", "self_attn").replace("attn2", "cross_attn")
            for ours, theirs in names.items():
                key = key.replace(f".{ours}.", f".{theirs}.")
            key = key.replace("ffn.net.0.proj", "ffn.0").replace("ffn.net.2", "ffn.2")
            key = key.replace("scale_shift_table", "modulation").replace("norm2", "norm3")
        state[key] = value
    torch.save(state, tmp_path / "vace.pt")
    loaded = load_pipeline("tiny-random", adapter=str(tmp_path / "vace.pt")).memory_adapter
    assert all(torch.equal(value, adapter.state_dict()[name]) for name, value in loaded.state_dict().items())
    torch.save({"nothing": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt"):
        load_pipeline("tiny-random", adapter=str(tmp_path / "other.pt"))


BAD: list[tuple[list[str], str]] = [
    (["--frames", "10"], "frames must be 4 n + 1"),
    (["--chunk-frames", "8"], "chunk-frames must be 4 n + 1"),
    (["--size", "60x96"], "size must be multiples of 32, got 60x96"),
    (["--steps", "0"], "steps must be at least 1, got 0"),
    (["--fov", "180"], "fov must be degrees between 0 and 180, got 180"),
    (["--distance", "-1"], "distance must be positive"),
    (["--static-filter", "sky+nope"], "static-filter must be of"),
    (["--depth-estimator", "nope"], "depth-estimator must be of"),
    (["--trajectory", "loop-the-loop"], "trajectory must be a file, or one of orbit"),
    (["--image", "nowhere.png"], "nowhere.png"),
    (["--depth", "nowhere.npy"], "nowhere.npy"),
    (["--depth", "/dev/null"], "/dev/null: expected depth, got an empty file"),
    (["--depth-scale", "0.001"], "depth-scale and depth-offset need --depth"),
    (["--image", "/dev/null"], "/dev/null: expected an image"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_mistakes_are_named_before_a_model_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(generate, "load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
    assert run("--model", "somewhere/else", "--out", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", tmp_path / "nothing", "--out", tmp_path / "out") == 2
    assert "nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--model", "tiny-random", "--size", "big")
    assert "must be HEIGHTxWIDTH such as 704x1280, got 'big'" in capsys.readouterr().err


def test_adapter_of_another_width_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = MirageMemoryAdapter(96, (0, 2), num_attention_heads=4, attention_head_dim=24, ffn_dim=96)
    wide.save_pretrained(tmp_path / "wide")
    assert run("--model", "tiny-random", "--adapter", tmp_path / "wide", "--out", tmp_path / "out", *QUICK) == 2
    assert "memory_adapter must be 48 wide like the transformer, got 96" in capsys.readouterr().err


# Videos.


def test_videos_are_joined_frame_by_frame(tmp_path: Path) -> None:
    grey = [torch.full((3, 32, 48), level) for level in (0.1, 0.3, 0.5, 0.7, 0.9)]
    save_video(tmp_path / "a.mp4", grey[:2], 24)
    save_video(tmp_path / "it's b.mp4", grey[2:], 24)
    join_videos(tmp_path / "both.mp4", [tmp_path / "a.mp4", tmp_path / "it's b.mp4"])
    levels = [frame.mean().item() for frame in load_video(tmp_path / "both.mp4")]
    assert np.allclose(levels, [0.1, 0.3, 0.5, 0.7, 0.9], atol=0.02)


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_broken_part_is_an_error_and_the_old_video_stays(tmp_path: Path, damage: str) -> None:
    parts = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for part in parts:
        save_video(part, [torch.rand(3, 64, 64) for _ in range(8)], 24)
    join_videos(tmp_path / "both.mp4", parts)
    before = (tmp_path / "both.mp4").read_bytes()
    content = parts[1].read_bytes()
    parts[1].unlink()
    if damage != "missing":
        parts[1].write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(OSError, match="ffmpeg could not write the video"):
        join_videos(tmp_path / "both.mp4", parts)
    assert (tmp_path / "both.mp4").read_bytes() == before
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".mp4"] * (2 if damage == "missing" else 3)


def test_an_encoder_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import imageio_ffmpeg

    script = tmp_path / "ffmpeg"
    script.write_text("#!/bin/sh\ncat > /dev/null\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(script))
    with pytest.raises(OSError, match="exit status 1"):
        save_video(tmp_path / "video.mp4", [torch.zeros(3, 32, 32)] * 3, 24)
    script.write_text("#!/bin/sh\nexec 0<&-\necho 'no such encoder' >&2\nexit 1\n")
    with pytest.raises(OSError, match="no such encoder"):
        save_video(tmp_path / "video.mp4", [torch.zeros(3, 512, 512)] * 20, 24)
    with pytest.raises(ValueError, match=r"frames must all be \(3, 32, 32\), got \(3, 32, 34\)"):
        save_video(tmp_path / "video.mp4", [torch.zeros(3, 32, 32), torch.zeros(3, 32, 34)], 24)
    assert not (tmp_path / "video.mp4").exists()


@pytest.mark.parametrize(("asked", "steps"), [([], None), (["--steps=7"], 7)])
def test_steps_that_are_left_open_are_the_models(asked: list[str], steps: int | None) -> None:
    for command in ("generate", "evaluate"):
        name, options = cli.parse([command, "--model", "mirage-tiny", *asked])
        assert (name, options.model, options.steps) == (command, "mirage-tiny", steps)
    assert (default_steps("mirage-tiny"), default_steps("folder")) == (2, 20)


def test_options_are_written_as_people_write_them() -> None:
    given = "--model x --seeds 5:9 --memory none,aligned --size 64x96 --weights none=a --weights pixel=b/c --depth head"
    _, options = cli.parse(["evaluate", *given.split()])
    assert options.seeds == range(5, 9) and options.memory == ("none", "aligned") and options.size == (64, 96)
    assert options.weights == {"none": Path("a"), "pixel": Path("b/c")} and options.depth == ("head",)
    _, options = cli.parse(["prepare", "file.yaml", "steps=3", "data.size=[64,96]", "--out", "dir"])
    assert options.config == Path("file.yaml") and options.overrides == ["steps=3", "data.size=[64,96]"]
    assert options.out == Path("dir") and options.device == "cpu"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse([command, "--help"])
    assert stop.value.code == 0
    options = cli.COMMANDS[command].Options
    shown, fields = capsys.readouterr().out, [field.name for field in dataclasses.fields(options)]
    assert options.__doc__.splitlines()[0] in " ".join(shown.split())
    source = inspect.getsource(options)
    for name in fields:
        assert re.search(rf"^    {name}: .*?\n    \"\"\"\w", source, re.DOTALL | re.MULTILINE), name


def test_a_memory_is_a_preset_and_its_write_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (
            ["--memory", "ours"],
            "memory must be one of none, nearest, aligned, pixel, got 'ours', which is now \"aligned\"",
        ),
        (["--memory", "pixel", "--write-policy", "bounded"], 'write_policy "append" with kind "pixel"'),
    ):
        assert run("--model", "tiny-random", "--out", tmp_path / "out", *arguments) == 2
        assert message in capsys.readouterr().err

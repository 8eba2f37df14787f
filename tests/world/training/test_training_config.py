"""Training's configuration: what is wrong with a file is told by key, before anything is loaded."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml", reason="the extra train is not installed")

import yaml

from mirage.pipeline.memory import MEMORIES
from mirage.training import load_config, make_config

LEAST: dict[str, Any] = {"stage": "adapter", "out": "runs/a", "data": {"sources": [{"kind": "synthetic"}]}}


def changed(key: str, value: Any) -> dict[str, Any]:
    given: dict[str, Any] = yaml.safe_load(yaml.safe_dump(LEAST))
    *parents, last = key.split(".")
    place: Any = given
    for parent in parents:
        place = place[int(parent)] if parent.isdigit() else place.setdefault(parent, {})
    place[last] = value
    return given


def test_defaults_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(LEAST))
    config = load_config(
        file, ["steps=7", "data.size=[64, 96]", "objective.drop_memory=0", "models.pipeline=some/where"]
    )
    assert config.steps == 7 and config.data.size == [64, 96] and config.models.pipeline == "some/where"
    assert config.objective.drop_memory == 0.0 and config.objective.chunk_frames == 33
    assert config.lora.targets == ["q", "k", "v", "o", "ffn"]
    assert load_config(file) == make_config(LEAST)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stage", "fly", "stage must be one of vae, backbone, adapter, lora, got 'fly'"),
        ("stage", 3, "stage must be str, got 3"),
        ("stpes", 3, "stpes is not a known key; did you mean steps?"),
        ("data.sources.0.room", 3, r"data.sources\[0\].room is not a known key; did you mean rooms?"),
        ("steps", "many", "steps must be int, got 'many'"),
        ("steps", True, "steps must be int, got True"),
        ("steps", 0, "steps must be at least 1, got 0"),
        ("resume", 1, "resume must be bool, got 1"),
        (
            "learning_rate",
            "1e-4",
            "learning_rate must be float, got '1e-4' .YAML 1.1 takes 1e-4 for text: write 1.0e-4",
        ),
        ("learning_rate", 0, "learning_rate must be positive and finite, got 0.0"),
        ("schedule", "step", "schedule must be one of constant, linear, cosine, got 'step'"),
        ("mixed_precision", "fp8", "mixed_precision must be one of no, bf16, fp16, got 'fp8'"),
        ("objective", [], r"objective must be a mapping, got \[\]"),
        ("objective.drop_memory", 1.5, r"objective.drop_memory must be in \[0, 1\], got 1.5"),
        ("objective.first_chunks", -0.5, r"objective.first_chunks must be in \[0, 1\], got -0.5"),
        ("objective.chunk_frames", 32, "objective.chunk_frames must be 4 n . 1 .*, got 32; nearest: 29 or 33"),
        ("objective.chunk_frames", 97, "objective.chunk_frames must be at most data.frames, 65, got 97"),
        ("objective.memory", "soft", "objective.memory must be one of none, nearest, aligned, pixel, got 'soft'"),
        ("objective.depth_noise", -1, "objective.depth_noise must be at least 0, got -1.0"),
        ("lora.targets", ["q", "z"], "lora.targets must be one of q, k, v, o, ffn, got 'z'"),
        ("lora.rank", 0, "lora.rank must be positive and finite, got 0"),
        ("data.frames", 64, "data.frames must be 4 n . 1 .*, got 64; nearest: 61 or 65"),
        ("data.size", [100, 160], r"data.size must be \[height, width\], multiples of 32, got \[100, 160\]"),
        ("data.size", 96, "data.size must be a list, got 96"),
        ("data.sources", [], "data.sources must list one source or more, got none"),
        ("data.sources", [{"rooms": 3}], r"data.sources\[0\].kind must be given"),
        ("data.sources", ["rooms"], r"data.sources\[0\] must be a mapping, got 'rooms'"),
        ("data.sources.0.kind", "youtube", r"data.sources\[0\].kind must be one of synthetic, .*, got 'youtube'"),
        ("data.sources.0.kind", "packed", r"data.sources\[0\].path must be the folder of the clips with kind 'packed'"),
        ("data.sources.0.path", "x", r"data.sources\[0\].path must be absent with kind 'synthetic', got 'x'"),
        ("data.sources.0.paths", ["fly"], r"data.sources\[0\].paths must be one of walk, .*, got 'fly'"),
        ("data.sources.0.paths", [], r"data.sources\[0\].paths must name one kind of camera path or more, got none"),
        ("data.sources.0.moving", -1, r"data.sources\[0\].moving must be at least 0, got -1"),
        ("models.vae", 3, "models.vae must be str or a mapping or null, got 3"),
        ("models.text_length", "x", "models.text_length must be int or null, got 'x'"),
        ("vae.kl_weight", True, "vae.kl_weight must be float, got True"),
        ("data.max_broken", float("nan"), r"data.max_broken must be in \[0, 1\], got nan"),
        ("objective.memory", "ours", 'got .ours., which is now "aligned"'),
        ("vae.frames", 4, None),
    ],
)
def test_what_is_wrong_is_told_by_key(key: str, value: Any, message: str | None) -> None:
    given = changed(key, value)
    if message is None:  # of a stage that does not look at it
        make_config(given)
        given["stage"], message = "vae", "vae.frames must be 4 n . 1"
    with pytest.raises(ValueError, match=message):
        make_config(given)


CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_files_of_the_repository(file: Path) -> None:
    config = load_config(file)
    assert config.out == f"runs/{'tiny' if file.parent.name == 'tiny' else 'wan'}/{file.stem}"
    if file.parent.name == "tiny":
        # Each takes what one before it has written.
        order = ["vae", "vae-video", "vae-shifted", "vae-steady", "clips", "clips-more", "backbone", "adapter", "lora"]
        needed = [*(getattr(config.models, name) for name in ("vae", "transformer", "memory_adapter", "latent_depth"))]
        needed += [source.path for source in config.data.sources]
        for path in needed:
            if isinstance(path, str):
                assert path.split("/")[:2] == ["runs", "tiny"]
                before, own = path.split("/")[2], file.stem
                stage, _, memory = own.partition("-")
                if (
                    memory in MEMORIES
                ):  # behind its own adapter, what all have in common, or that stage of the aligned memory
                    assert config.objective.memory == memory
                    assert before != "adapter"
                    if before == stage and memory != "none":  # which goes its own way from the adapter on
                        continue
                    before, own = before.removesuffix(f"-{memory}"), stage
                assert order.index(before) < order.index(own)
        assert config.models.text_length == (None if file.stem.startswith("vae") else 96)


def test_what_is_missing_is_told() -> None:
    for key in ("stage", "out", "data"):
        with pytest.raises(ValueError, match=f"{key} must be given"):
            make_config({name: value for name, value in LEAST.items() if name != key})


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("a: [", [], "run.yaml: must be YAML, got"),
        ("- a", [], "run.yaml: must be a mapping of keys, got list"),
        (yaml.safe_dump(changed("steps", -1)), [], "run.yaml: steps must be at least 1, got -1"),
        (yaml.safe_dump(LEAST), ["steps"], "an override must be key=value, got 'steps'"),
        (yaml.safe_dump(LEAST), ["out.a=3"], "out.a: out must be a mapping to set a key of, got 'runs/a'"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "run.yaml", overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 2000, "must be YAML"),
        ("a: 2024-13-45", "must be YAML"),
        ("? [a, [b]]\n: 1", "must be YAML"),
        ("a: !!python/object/apply:os.mkdir [executed]", "must be YAML"),
        ("a: &a [1, 2]\nb: !!int x", "must be YAML"),
        (
            "x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"x{i}: &x{i} [{f'*x{i - 1}, ' * 9}]\n" for i in range(1, 9)),
            "values",
        ),
        ("a: &a [*a]", "values"),
        ("1: 2", "stage must be given"),
        ("null", "must be a mapping of keys, got NoneType"),
    ],
)
def test_files_that_hold_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"run\.yaml: .*{message}"):
        load_config(file)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_overrides_and_parts_that_hold_anything(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(LEAST))
    with pytest.raises(ValueError, match=r"data\.frames must be YAML, got"):
        load_config(file, ["data.frames=[1, 2"])
    with pytest.raises(ValueError, match=r"models\.vae must hold plain values"):
        load_config(file, ["models.vae={a: 2024-01-01}"])


def test_fuzzed_files_are_read_or_refused(tmp_path: Path) -> None:
    """Bytes of a file changed, dropped and doubled at random: a configuration, or a ValueError in one sentence."""
    count = 1000 if os.environ.get("MIRAGE_NIGHTLY") == "1" else 60
    draw, file = random.Random(0), tmp_path / "run.yaml"
    content = yaml.safe_dump(changed("models.vae", {"base_dim": 8})).encode()
    for _ in range(count):
        held = bytearray(content)
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(len(held))
            held[at : at + draw.randint(0, 3)] = draw.choice(
                [
                    b"",
                    b"\x00",
                    b"[",
                    b"{",
                    b"&a ",
                    b"*a",
                    b": ",
                    b"\n",
                    b"!!",
                    b"\xff",
                    b"1e999",
                    b"- ",
                    b"'",
                    held[at : at + 9],
                ]
            )
        file.write_bytes(held)
        with suppress(ValueError):
            load_config(file)

"""What `mirage train` is asked for: a YAML file, checked key by key before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..optional import import_extra
from ..pipeline.chunks import CHUNK_FRAMES, check_num_frames
from ..pipeline.memory import MEMORIES

STAGES = ("vae", "backbone", "adapter", "lora")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")
OPTIMIZERS = ("adamw", "muon")
SAVED = ("float32", "bfloat16")


@dataclass(frozen=True)
class ModelsConfig:
    """Where the models come from. Each part is a folder or hub id, or the keyword arguments of a new one.

    Attributes:
        pipeline: a Wan2.2 or Mirage pipeline, folder or hub id, or "tiny-random": gives every part that is not named.
        vae, transformer, memory_adapter, latent_depth: a folder or id of the part, or a mapping: a new one. A memory
            adapter's mapping is that of `MirageMemoryAdapter.from_transformer`: control_channels, memory_layers, and
            control, which is "rays" where `objective.memory` is "none" and "memory" elsewhere.
        lora: a file to go on from, in stage "lora".
        text_length: tokens of a prompt's embedding; default as the pipeline: 512, or less if its tokenizer says so.
    """

    pipeline: str = "tiny-random"
    vae: str | dict | None = None
    transformer: str | dict | None = None
    memory_adapter: str | dict | None = None
    latent_depth: str | dict | None = None
    lora: str | None = None
    text_length: int | None = None


@dataclass(frozen=True)
class SourceConfig:
    """Clips.

    Attributes:
        kind: "synthetic" (rooms made on the fly), "rgbd" (a folder in the layout of 7-Scenes, or a folder of such
            folders), "realestate10k" (with depth, see :mod:`mirage.training.data`) or "packed" (files or tar shards of
            `mirage prepare`).
        path: a folder; of "packed" also one .tar file.
        rooms, first_seed, moving, paths, pace, texture: of "synthetic": how many clips, the seed of the first, how many
            things move (None leaves it to the seed), which kinds of camera path, how fast (1: up to 2 degrees a frame),
            contrast of the patterns in [0, 1].
        stride: of "rgbd" and "realestate10k": every how many frames a clip starts; default the clip's length.
    """

    kind: str
    path: str | None = None
    rooms: int = 1000
    first_seed: int = 0
    moving: int | None = None
    paths: list[str] = field(default_factory=lambda: ["walk", "walk-and-back", "pan-and-back", "orbit-and-back"])
    pace: float = 1.0
    texture: float = 1.0
    stride: int | None = None


@dataclass(frozen=True)
class DataConfig:
    """
    Attributes:
        sources: :class:`SourceConfig`, one after the other, shuffled together.
        frames: 4 n + 1 frames of a clip.
        size: height and width to which clips are resized and cropped, multiples of 32. Packed clips keep theirs.
        cache: keep clips in memory once they are loaded, frames in 8 bits: rooms take longer to render than a step.
            Each worker keeps its own.
        workers: processes that load clips.
        max_broken: share of the clips that may be broken before training stops.
    """

    sources: list[SourceConfig]
    frames: int = 65
    size: list[int] = field(default_factory=lambda: [96, 160])
    cache: bool = False
    workers: int = 0
    max_broken: float = 0.5


@dataclass(frozen=True)
class ObjectiveConfig:
    """How a clip becomes a step. Chances are in [0, 1].

    Attributes:
        chunk_frames: 4 n + 1 frames that the model makes at a time.
        flow_shift: of the noise levels; 5 as the scheduler of Wan2.2-TI2V-5B.
        independent_noise: chance that every frame of the target draws a noise level of its own; else they share one, as
            in generation.
        first_chunks: chance that a step's chunks are the first of their clips, of which a memory knows the image alone,
            as in one chunk of three when three are generated. None: as often as any other place.
        max_references, preceding_frames: as in generation, at most; how many are drawn anew.
        drop_references, drop_preceding, drop_memory, drop_prompt: chance that a step goes without.
        reference_threshold, reference_voxel_size: as in generation.
        memory: on whose read-outs the model is trained, one of :data:`~mirage.pipeline.memory.MEMORIES`. "none" trains
            without any and without reference frames, steered by the cameras' rays in every step; "pixel" decodes the
            clips.
        readouts: how many read-outs of a clip are made and kept, to be drawn again, as the published code, which
            precomputes them; for the memories that a read of which costs more than a step. None: each step's is new.
        drop_tokens: share of the memory's tokens that is missing, at most, in patches.
        depth_noise: standard deviation of ln depth, of a written frame and of patches of it.
        pose_noise: of the writing cameras: metres, and a tenth of it in radians.
        depth_weight: of `latent_depth`'s loss, where one is trained along.
        depth_latent_noise: noise on the latents it sees, at most, as a noise level.
    """

    chunk_frames: int = CHUNK_FRAMES
    flow_shift: float = 5.0
    independent_noise: float = 0.3
    first_chunks: float | None = None
    max_references: int = 4
    preceding_frames: int = 2
    drop_references: float = 0.3
    drop_preceding: float = 0.3
    drop_memory: float = 0.1
    drop_prompt: float = 0.1
    reference_threshold: float = 0.04
    reference_voxel_size: float = 0.1
    memory: str = "ours"
    readouts: int | None = None
    drop_tokens: float = 0.3
    depth_noise: float = 0.02
    pose_noise: float = 0.01
    depth_weight: float = 1.0
    depth_latent_noise: float = 0.1


@dataclass(frozen=True)
class LoraConfig:
    """
    Attributes:
        rank, alpha, dropout: of every matrix; alpha / rank is its scale.
        targets: parts of a block: "q", "k", "v", "o" (self-attention and text attention) and "ffn".
    """

    rank: int = 64
    alpha: float = 64.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "o", "ffn"])


@dataclass(frozen=True)
class VaeConfig:
    """
    Attributes:
        frames: 4 n + 1 frames of a clip that a step sees; 1 trains on pictures.
        kl_weight: of the divergence from a standard normal, per latent value.
        shifted: chance that a step decodes latents that are interpolated between the tokens, and compares with the
            pictures there. It teaches the VAE latents that a memory can read from another place.
        steady: weight of the distance of latents from those of a camera that stands still, 0 for none. It teaches the
            VAE latents that a memory can read in another motion. For frames > 1.
        statistics: clips from which `latents_mean` and `latents_std` are taken when training ends.
    """

    frames: int = 5
    kl_weight: float = 1e-6
    shifted: float = 0.0
    steady: float = 0.0
    statistics: int = 32


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        stage: "vae" and "backbone" train a model from nothing; "adapter" is the paper's first stage, the memory adapter
            on a frozen backbone; "lora" its second, LoRA on the backbone beside the adapter.
        out: folder of the run.
        steps: optimiser steps.
        batch_size, gradient_accumulation: clips per process and forward pass; passes per step.
        optimizer: "adamw", or "muon": Muon for matrices, AdamW for the rest, at one learning rate.
        train_adapter: in stage "lora", whether the adapter is trained on.
        resume: whether to go on with the run in `out`, if there is one.
        save_every, keep: steps between checkpoints, and how many are kept.
        save_dtype: of the models that are left when training ends, "float32" or "bfloat16".
        tensorboard: whether to write TensorBoard's files beside metrics.jsonl.
    """

    stage: str
    out: str
    data: DataConfig
    models: ModelsConfig = field(default_factory=ModelsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    steps: int = 1000
    batch_size: int = 1
    gradient_accumulation: int = 1
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    warmup: int = 0
    schedule: str = "cosine"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    train_adapter: bool = True
    save_every: int = 500
    keep: int = 2
    save_dtype: str = "float32"
    resume: bool = True
    tensorboard: bool = True
    seed: int = 0


def load_config(path: str | os.PathLike[str], overrides: typing.Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file.

    Args:
        path: of the file.
        overrides: "key=value" with dotted keys, such as "steps=3" or "data.frames=33".

    Raises:
        OSError: no such file.
        ValueError: naming the key, what was expected and what came.
        MissingExtraError: pyyaml is not installed.
    """
    yaml = import_extra("yaml", "train")
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be YAML, got: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path}: must be a mapping of keys, got {type(given).__name__}")
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"an override must be key=value, got {override!r}")
        *parents, last = name.split(".")
        place = given
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{name}: {parent} must be a mapping to set a key of, got {place!r}")
        place[last] = yaml.safe_load(value)
    try:
        return make_config(given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def make_config(given: dict[str, Any]) -> TrainConfig:
    """A checked :class:`TrainConfig` of plain values.

    Raises:
        ValueError: naming the key, what was expected and what came.
    """
    config: TrainConfig = _build(TrainConfig, given, "")
    _one_of("stage", config.stage, STAGES)
    _one_of("schedule", config.schedule, SCHEDULES)
    _one_of("mixed_precision", config.mixed_precision, PRECISIONS)
    _one_of("optimizer", config.optimizer, OPTIMIZERS)
    _one_of("save_dtype", config.save_dtype, SAVED)
    _one_of("objective.memory", config.objective.memory, MEMORIES)
    for name, least in (("steps", 1), ("batch_size", 1), ("gradient_accumulation", 1), ("save_every", 1), ("keep", 1)):
        _at_least(name, getattr(config, name), least)
    for name, number in (
        ("warmup", config.warmup),
        ("seed", config.seed),
        ("weight_decay", config.weight_decay),
        ("data.workers", config.data.workers),
        ("objective.max_references", config.objective.max_references),
        ("objective.preceding_frames", config.objective.preceding_frames),
        ("objective.depth_noise", config.objective.depth_noise),
        ("objective.pose_noise", config.objective.pose_noise),
        ("objective.depth_weight", config.objective.depth_weight),
        ("vae.kl_weight", config.vae.kl_weight),
        ("vae.steady", config.vae.steady),
        ("vae.statistics", config.vae.statistics),
    ):
        _at_least(name, number, 0)
    if config.objective.readouts is not None:
        _at_least("objective.readouts", config.objective.readouts, 1)
    for name, positive in (
        ("learning_rate", config.learning_rate),
        ("max_grad_norm", config.max_grad_norm),
        ("objective.flow_shift", config.objective.flow_shift),
        ("objective.reference_voxel_size", config.objective.reference_voxel_size),
        ("lora.rank", config.lora.rank),
        ("lora.alpha", config.lora.alpha),
    ):
        if not (math.isfinite(positive) and positive > 0):
            raise ValueError(f"{name} must be positive and finite, got {positive}")
    for owner, part, names in (
        (
            "objective",
            config.objective,
            (
                "independent_noise",
                *(() if config.objective.first_chunks is None else ("first_chunks",)),
                "drop_references",
                "drop_preceding",
                "drop_memory",
                "drop_prompt",
                "drop_tokens",
                "depth_latent_noise",
            ),
        ),
        ("lora", config.lora, ("dropout",)),
        ("vae", config.vae, ("shifted",)),
        ("data", config.data, ("max_broken",)),
    ):
        for name in names:
            if not 0.0 <= getattr(part, name) <= 1.0:
                raise ValueError(f"{owner}.{name} must be in [0, 1], got {getattr(part, name)}")
    for target in config.lora.targets:
        _one_of("lora.targets", target, ("q", "k", "v", "o", "ffn"))
    _check_data(config)
    return config


def _check_data(config: TrainConfig) -> None:
    from ..scenes.synthetic import PATHS

    data = config.data
    check_num_frames("data.frames", data.frames)
    if config.stage == "vae":
        if config.vae.frames != 1:
            check_num_frames("vae.frames", config.vae.frames)
        if config.vae.frames == 1 and config.vae.steady:
            raise ValueError(f"vae.steady must be 0 with vae.frames of 1, got {config.vae.steady}: nothing moves there")
        if config.vae.frames > data.frames:
            raise ValueError(f"vae.frames must be at most data.frames, {data.frames}, got {config.vae.frames}")
    else:
        check_num_frames("objective.chunk_frames", config.objective.chunk_frames)
        if config.objective.chunk_frames > data.frames:
            got = config.objective.chunk_frames
            raise ValueError(f"objective.chunk_frames must be at most data.frames, {data.frames}, got {got}")
    if len(data.size) != 2 or any(side < 32 or side % 32 for side in data.size):
        raise ValueError(f"data.size must be [height, width], multiples of 32, got {data.size}")
    if not data.sources:
        raise ValueError("data.sources must list one source or more, got none")
    for i, source in enumerate(data.sources):
        name = f"data.sources[{i}]"
        _one_of(f"{name}.kind", source.kind, ("synthetic", "rgbd", "realestate10k", "packed"))
        if (source.kind == "synthetic") == (source.path is not None):
            expected = "absent" if source.kind == "synthetic" else "the folder of the clips"
            raise ValueError(f"{name}.path must be {expected} with kind {source.kind!r}, got {source.path!r}")
        _at_least(f"{name}.rooms", source.rooms, 1)
        _at_least(f"{name}.first_seed", source.first_seed, 0)
        if source.moving is not None:
            _at_least(f"{name}.moving", source.moving, 0)
        if source.stride is not None:
            _at_least(f"{name}.stride", source.stride, 1)
        if not source.paths:
            raise ValueError(f"{name}.paths must name one kind of camera path or more, got none")
        if not (math.isfinite(source.pace) and source.pace > 0):
            raise ValueError(f"{name}.pace must be positive and finite, got {source.pace}")
        if not 0.0 <= source.texture <= 1.0:
            raise ValueError(f"{name}.texture must be in [0, 1], got {source.texture}")
        for kind in source.paths:
            _one_of(f"{name}.paths", kind, PATHS)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _build(cls: Any, given: Any, place: str) -> Any:
    """A dataclass of plain values, each checked against its annotation; `place` is its key."""
    if not isinstance(given, dict):
        raise ValueError(f"{place} must be a mapping, got {given!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{place}." if place else ""
    for key in given:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(fields)}"
            raise ValueError(f"{prefix}{key} is not a known key{hint}")
    for name, known in fields.items():
        required = known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise ValueError(f"{prefix}{name} must be given")
    return cls(**{key: _checked(hints[key], value, prefix + key) for key, value in given.items()})


def _checked(kind: Any, value: Any, place: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, place)
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{place} must be a list, got {value!r}")
        (item,) = typing.get_args(kind)
        return [_checked(item, one, f"{place}[{i}]") for i, one in enumerate(value)]
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for choice in choices:
        if isinstance(value, bool) and choice is not bool:
            continue
        if choice is float and isinstance(value, int):
            return float(value)
        if isinstance(value, choice):
            return value
    names = " or ".join({"NoneType": "null", "dict": "a mapping"}.get(c.__name__, c.__name__) for c in choices)
    hint = " (YAML 1.1 takes 1e-4 for text: write 1.0e-4)" if float in choices and isinstance(value, str) else ""
    raise ValueError(f"{place} must be {names}, got {value!r}{hint}")

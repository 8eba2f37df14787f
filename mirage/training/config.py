"""What `mirage train` is asked for: a YAML file, checked key by key before anything is loaded."""

from __future__ import annotations

import difflib
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from ..optional import import_extra
from ..pipeline.chunks import CHUNK_FRAMES, check_num_frames
from ..pipeline.memory import MEMORIES

# Kinds of values. Nothing is converted but a whole number where a float is asked for.


def _checked(is_allowed: Callable[[Any], bool], expected: str) -> AfterValidator:
    """Hold a value to a condition, in words "must be `expected`"."""

    def check(value: Any) -> Any:
        if not is_allowed(value):
            raise PydanticCustomError(
                "bound", "must be {expected}, got {got}", {"expected": expected, "got": str(value)}
            )
        return value

    return AfterValidator(check)


def _all_of(allowed: Iterable[str]) -> AfterValidator:
    """Hold a list's items to names."""
    names = tuple(allowed)

    def check(values: list[str]) -> list[str]:
        for value in values:
            if value not in names:
                context = {"names": ", ".join(names), "got": repr(value)}
                raise PydanticCustomError("bound", "must be one of {names}, got {got}", context)
        return values

    return AfterValidator(check)


def _memory(name: str) -> str:
    if name not in MEMORIES:
        renamed = ', which is now "aligned"' if name == "ours" else ""
        context = {"names": ", ".join(MEMORIES), "got": f"{name!r}{renamed}"}
        raise PydanticCustomError("bound", "must be one of {names}, got {got}", context)
    return name


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


Text = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict()]
Count = Annotated[Whole, _checked(lambda value: value >= 1, "at least 1")]
Index = Annotated[Whole, _checked(lambda value: value >= 0, "at least 0")]
PositiveWhole = Annotated[Whole, _checked(_is_positive, "positive and finite")]
Real = Annotated[float, Strict()]
Amount = Annotated[Real, _checked(lambda value: value >= 0, "at least 0")]
Positive = Annotated[Real, _checked(_is_positive, "positive and finite")]
Fraction = Annotated[Real, _checked(lambda value: 0.0 <= value <= 1.0, "in [0, 1]")]
ImageSize = Annotated[
    list[Whole],
    Strict(),
    _checked(
        lambda sides: len(sides) == 2 and all(side >= 32 and side % 32 == 0 for side in sides),
        "[height, width], multiples of 32",
    ),
]
Part = Annotated[str, Strict()] | Annotated[dict, Strict()] | None
"""A folder or hub id; a mapping: the keyword arguments of a new one; None: the pipeline's."""

_MAX_VALUES = 100_000  # of a file, aliases followed

LORA_TARGETS = ("q", "k", "v", "o", "ffn")
_KEYS = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_KEYS)
class ModelsConfig:
    """Where the models come from. Each part is a folder or hub id, or the keyword arguments of a new one.

    Attributes:
        pipeline: a Wan2.2 or Mirage pipeline, folder or hub id, or "tiny-random": gives every part that is not named.
        vae, transformer, memory_adapter, latent_depth: a folder or id of the part, or a mapping: a new one. A memory
            adapter's mapping is that of `MirageMemoryAdapter.from_transformer`: control_channels, memory_layers, and
            control, which is "rays" where `objective.memory` is "none" and "memory" elsewhere.
        lora: a file to start from, in stage "lora".
        text_length: tokens of a prompt's embedding; default as the pipeline: 512, or less if its tokenizer says so.
    """

    pipeline: Text = "tiny-random"
    vae: Part = None
    transformer: Part = None
    memory_adapter: Part = None
    latent_depth: Part = None
    lora: Text | None = None
    text_length: Whole | None = None


@dataclass(frozen=True, config=_KEYS)
class SourceConfig:
    """Where clips come from.

    Attributes:
        kind: "synthetic" (rooms made on the fly), "rgbd" (a folder in the layout of 7-Scenes, or a folder of such
            folders), "realestate10k" (with depth) or "packed" (files or tar shards of `mirage prepare`), see
            :mod:`mirage.training.data`.
        path: a folder; of "packed" also one .tar file.
        rooms, first_seed, moving, paths, pace, texture: of "synthetic": how many clips, the seed of the first, how many
            objects move (None leaves it to the seed), which kinds of camera path, how fast (1: up to 2 degrees a
            frame), contrast of the patterns in [0, 1].
        stride: of "rgbd" and "realestate10k": every how many frames a clip starts; default the clip's length.
    """

    kind: Literal["synthetic", "rgbd", "realestate10k", "packed"]
    path: Text | None = None
    rooms: Count = 1000
    first_seed: Index = 0
    moving: Index | None = None
    paths: Annotated[list[Text], Strict()] = field(
        default_factory=lambda: ["walk", "walk-and-back", "pan-and-back", "orbit-and-back"]
    )
    pace: Positive = 1.0
    texture: Fraction = 1.0
    stride: Count | None = None


@dataclass(frozen=True, config=_KEYS)
class DataConfig:
    """What a run trains on.

    Attributes:
        sources: :class:`SourceConfig`, one after the other, shuffled together.
        frames: 4 n + 1 frames of a clip.
        size: height and width to which clips are resized and cropped, multiples of 32. Packed clips keep theirs.
        cache: keep clips in memory once they are loaded, frames in 8 bits: rooms take longer to render than a step.
            Each worker keeps its own.
        workers: processes that load clips.
        max_broken: fraction of the clips that may be broken before training stops.
    """

    sources: Annotated[list[SourceConfig], Strict()]
    frames: Whole = 65
    size: ImageSize = field(default_factory=lambda: [96, 160])
    cache: Flag = False
    workers: Index = 0
    max_broken: Fraction = 0.5


@dataclass(frozen=True, config=_KEYS)
class ObjectiveConfig:
    """How a clip becomes a step. Probabilities are in [0, 1].

    Attributes:
        chunk_frames: 4 n + 1 frames that the model makes at a time.
        flow_shift: of the noise levels; 5 as the scheduler of Wan2.2-TI2V-5B.
        independent_noise: probability that every frame of the target draws a noise level of its own; else they share
            one, as in generation.
        first_chunks: probability that a step's chunks are the first of their clips, of which a memory knows the image
            alone, as in one chunk of three when three are generated. None: as often as any other place.
        max_references, preceding_frames: as in generation, at most; how many is drawn for every step.
        drop_references, drop_preceding, drop_memory, drop_prompt: probability that a step goes without.
        reference_threshold, reference_voxel_size: as in generation.
        memory: on whose readouts the model is trained, one of :data:`~mirage.pipeline.memory.MEMORIES`. "none" trains
            without any and without reference frames, steered by the cameras' rays in every step; "pixel" decodes the
            clips.
        readouts: how many readouts of a clip are made and kept, to be drawn again, as the published code, which
            precomputes them; for the memories of which a read costs more than a step. None: each step's is new.
        drop_tokens: fraction of the memory's tokens that is missing, at most, in patches.
        depth_noise: standard deviation of ln depth, of a written frame and of patches of it.
        pose_noise: of the writing cameras: metres, and a tenth of it in radians.
        depth_weight: of `latent_depth`'s loss, where one is trained along.
        depth_latent_noise: noise on the latents it sees, at most, as a noise level.
    """

    chunk_frames: Whole = CHUNK_FRAMES
    flow_shift: Positive = 5.0
    independent_noise: Fraction = 0.3
    first_chunks: Fraction | None = None
    max_references: Index = 4
    preceding_frames: Index = 2
    drop_references: Fraction = 0.3
    drop_preceding: Fraction = 0.3
    drop_memory: Fraction = 0.1
    drop_prompt: Fraction = 0.1
    reference_threshold: Real = 0.04
    reference_voxel_size: Positive = 0.1
    memory: Annotated[Text, AfterValidator(_memory)] = "aligned"
    readouts: Count | None = None
    drop_tokens: Fraction = 0.3
    depth_noise: Amount = 0.02
    pose_noise: Amount = 0.01
    depth_weight: Amount = 1.0
    depth_latent_noise: Fraction = 0.1


@dataclass(frozen=True, config=_KEYS)
class LoraConfig:
    """What a new LoRA is.

    Attributes:
        rank, alpha, dropout: of every matrix; alpha / rank is its scale.
        targets: parts of a block: "q", "k", "v", "o" (self-attention and text attention) and "ffn".
    """

    rank: PositiveWhole = 64
    alpha: Positive = 64.0
    dropout: Fraction = 0.0
    targets: Annotated[list[Text], Strict(), _all_of(LORA_TARGETS)] = field(default_factory=lambda: list(LORA_TARGETS))


@dataclass(frozen=True, config=_KEYS)
class VaeConfig:
    """How a VAE is trained.

    Attributes:
        frames: 4 n + 1 frames of a clip that a step sees; 1 trains on single frames.
        kl_weight: of the divergence from a standard normal, per latent value.
        shifted: probability of a sub-token shift: a step decodes latents that are interpolated between the tokens, and
            compares with the frames there. It teaches the VAE latents that a memory can read from another place.
        steady: weight of motion invariance: the distance of latents from those of a static camera, 0 for none. It
            teaches the VAE latents that a memory can read in another motion. For frames > 1.
        statistics: clips from which `latents_mean` and `latents_std` are taken when training ends.
    """

    frames: Whole = 5
    kl_weight: Amount = 1e-6
    shifted: Fraction = 0.0
    steady: Amount = 0.0
    statistics: Index = 32


@dataclass(frozen=True, config=_KEYS)
class TrainConfig:
    """A training run.

    Attributes:
        stage: "vae" and "backbone" train a model from scratch; "adapter" is the paper's first stage, the memory adapter
            on a frozen backbone; "lora" its second, LoRA on the backbone beside the adapter.
        out: folder of the run.
        steps: optimizer steps.
        batch_size, gradient_accumulation: clips per process and forward pass; passes per step.
        optimizer: "adamw", or "muon": Muon for matrices, AdamW for the rest, at one learning rate.
        train_adapter: in stage "lora", whether the adapter is trained on.
        resume: whether to resume the run in `out`, if there is one.
        save_every, keep: steps between checkpoints, and how many are kept.
        save_dtype: of the models that are left when training ends, "float32" or "bfloat16".
        tensorboard: whether to write TensorBoard's files beside metrics.jsonl.
    """

    stage: Literal["vae", "backbone", "adapter", "lora"]
    out: Text
    data: DataConfig
    models: ModelsConfig = field(default_factory=ModelsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    steps: Count = 1000
    batch_size: Count = 1
    gradient_accumulation: Count = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: Flag = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive = 1e-4
    warmup: Index = 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: Amount = 0.01
    max_grad_norm: Positive = 1.0
    train_adapter: Flag = True
    save_every: Count = 500
    keep: Count = 2
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    resume: Flag = True
    tensorboard: Flag = True
    seed: Index = 0


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file.

    Args:
        path: of the file.
        overrides: "key=value" with dotted keys, such as "steps=3" or "data.frames=33".

    Raises:
        OSError: no such file.
        ValueError: naming the key, what was expected and what came.
        MissingExtraError: pyyaml is not installed.
    """
    try:
        given = _parse_yaml(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # what is no text included
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
        try:
            place[last] = _parse_yaml(value)
        except ValueError as error:
            raise ValueError(f"{name} must be YAML, got: {error}") from None
    try:
        return make_config(given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse_yaml(text: str) -> Any:
    """Parse YAML to plain values.

    Raises:
        ValueError: it is none, or so large when its aliases are followed that it is no configuration.
    """
    yaml = import_extra("yaml", "train")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(str(error) or type(error).__name__) from None
    left, count = [values], 0
    while left:
        count += 1
        if count > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES:,} values")
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple, set)):
            left += value
    return values


def make_config(given: dict[str, Any]) -> TrainConfig:
    """Make a checked :class:`TrainConfig` of plain values.

    Raises:
        ValueError: naming the key, what was expected and what came.
    """
    try:
        config = TypeAdapter(TrainConfig).validate_python(given)
    except ValidationError as error:
        raise ValueError(_describe_error(error.errors()[0])) from None
    _check_frames(config)
    _check_sources(config.data.sources)
    for name, part in vars(config.models).items():
        try:
            json.dumps(part)  # as a run records it
        except (TypeError, ValueError) as error:
            raise ValueError(f"models.{name} must hold plain values: {error}") from None
    return config


def _check_frames(config: TrainConfig) -> None:
    data, vae, objective = config.data, config.vae, config.objective
    check_num_frames("data.frames", data.frames)
    if config.stage == "vae":
        if vae.frames != 1:
            check_num_frames("vae.frames", vae.frames)
        if vae.frames == 1 and vae.steady:
            raise ValueError(f"vae.steady must be 0 with vae.frames of 1, got {vae.steady}: nothing moves there")
        if vae.frames > data.frames:
            raise ValueError(f"vae.frames must be at most data.frames, {data.frames}, got {vae.frames}")
    else:
        check_num_frames("objective.chunk_frames", objective.chunk_frames)
        if objective.chunk_frames > data.frames:
            got = objective.chunk_frames
            raise ValueError(f"objective.chunk_frames must be at most data.frames, {data.frames}, got {got}")


def _check_sources(sources: Sequence[SourceConfig]) -> None:
    from ..scenes.synthetic import PATHS

    if not sources:
        raise ValueError("data.sources must list one source or more, got none")
    for i, source in enumerate(sources):
        name = f"data.sources[{i}]"
        if (source.kind == "synthetic") == (source.path is not None):
            expected = "absent" if source.kind == "synthetic" else "the folder of the clips"
            raise ValueError(f"{name}.path must be {expected} with kind {source.kind!r}, got {source.path!r}")
        if not source.paths:
            raise ValueError(f"{name}.paths must name one kind of camera path or more, got none")
        for kind in source.paths:
            if kind not in PATHS:
                raise ValueError(f"{name}.paths must be one of {', '.join(PATHS)}, got {kind!r}")


# Errors in our words.


def _describe_error(error: Any) -> str:
    """Say in a sentence which key is wrong, what was expected and what came."""
    key, owner, hint = _locate(error["loc"])
    got, kind = error["input"], error["type"]
    if kind == "missing":
        return f"{key} must be given"
    if hint is None:
        known = [one.name for one in fields(owner)]
        near = difflib.get_close_matches(str(error["loc"][-1]), known, 1)
        return f"{key} is not a known key; " + (
            f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        )
    if kind == "bound":
        return f"{key} {error['msg']}"
    plain = _strip(hint)
    if is_dataclass(plain):
        return f"{key} must be a mapping, got {got!r}"
    if typing.get_origin(plain) is list:
        return f"{key} must be a list, got {got!r}"
    if typing.get_origin(plain) is Literal and isinstance(got, str):
        return f"{key} must be one of {', '.join(typing.get_args(plain))}, got {got!r}"
    kinds = _kinds(plain)
    note = " (YAML 1.1 takes 1e-4 for text: write 1.0e-4)" if "float" in kinds and isinstance(got, str) else ""
    return f"{key} must be {' or '.join(kinds)}, got {got!r}{note}"


def _locate(place: Sequence[str | int]) -> tuple[str, Any, Any]:
    """Follow an error's place through the dataclasses: its key, the class that holds it, its annotation or None."""
    key = ""
    owner: Any = TrainConfig
    hint: Any = TrainConfig
    for part in place:
        plain = _strip(hint)
        if is_dataclass(plain):
            owner = plain
            key = f"{key}.{part}" if key else str(part)
            hint = typing.get_type_hints(owner, include_extras=True).get(str(part))
        elif typing.get_origin(plain) is list and isinstance(part, int):
            key, hint = f"{key}[{part}]", typing.get_args(plain)[0]
        else:  # one of the kinds that a value may be of
            break
    return key, owner, hint


def _strip(hint: Any) -> Any:
    """Take the conditions off an annotation."""
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    return hint


def _kinds(hint: Any) -> list[str]:
    """Name the kinds of values of an annotation, as a person who writes YAML calls them."""
    hint = _strip(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return [name for choice in typing.get_args(hint) for name in _kinds(choice)]
    if typing.get_origin(hint) is Literal:
        return ["str"]
    return [{"NoneType": "null", "dict": "a mapping"}.get(hint.__name__, hint.__name__)]

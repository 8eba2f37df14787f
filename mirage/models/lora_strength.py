"""How strong a LoRA is, where its tensors do not say: `adapter_config.json`, and the metadata of a safetensors file.

A LoRA adds alpha / rank times B A, or alpha / sqrt(rank) with rslora. Per layer, an alpha among the tensors counts
first; then what is said here, which must not contradict itself; else alpha is the rank. `ss_network_alpha` does not
count: kohya's files have their alphas among the tensors, and converters that keep it have multiplied it in.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoHaConfig, LoKrConfig, LoraConfig
from peft.utils.other import get_pattern_key

ADAPTER_CONFIG = "adapter_config.json"
_CONFIGS: dict[str, Any] = {"LORA": LoraConfig, "LOHA": LoHaConfig, "LOKR": LoKrConfig}
_ALPHAS = ("lora_alpha", "network_alpha", "alpha")
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_UNSUPPORTED = ("layer_replication", "target_parameters", "use_qalora", "megatron_config")


class Strength(NamedTuple):
    """What is said of a LoRA's scale, and where.

    Attributes:
        where: the file or the metadata that says it.
        alpha: of every layer that `alpha_pattern` does not name; None where alpha is the rank.
        rank: of every layer that `rank_pattern` does not name; None where the tensors alone say it.
        rank_pattern, alpha_pattern: as of peft.
        rslora: whether alpha is divided by the root of the rank.
        dora: whether every layer has a magnitude too.
        peft_type: "LORA", "LOHA" or "LOKR".
    """

    where: str
    alpha: float | None = None
    rank: int | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    rslora: bool = False
    dora: bool = False
    peft_type: str = "LORA"

    def alpha_of(self, names: tuple[str, ...], rank: int) -> float:
        """Return the alpha of a layer that is called any of `names`, so that alpha / rank is its scale."""
        alpha = _look_up(self.alpha_pattern, names, self.alpha)
        if alpha is None:
            return float(rank)
        return float(alpha) * math.sqrt(rank) if self.rslora else float(alpha)

    def rank_of(self, names: tuple[str, ...]) -> int | None:
        """Return the rank of a layer that is called any of `names`, None where it is not said."""
        return _look_up(self.rank_pattern, names, self.rank)

    def check_patterns(self, layers: list[tuple[str, ...]]) -> None:
        """Check that every pattern names a layer.

        Raises:
            ValueError: one does not, so that what it says would be dropped.
        """
        for pattern in self.alpha_pattern:
            if not any(_matches(pattern, name) for names in layers for name in names):
                raise ValueError(f"{self.where}: alpha_pattern names {pattern!r}, which is no layer of this LoRA")


def read_strength(label: str, metadata: Mapping[str, str], config: Path | None = None) -> Strength:
    """Read what a file's metadata and the `adapter_config.json` beside it say.

    Args:
        label: what to call the source in errors.
        metadata: of a safetensors file.
        config: the `adapter_config.json`, where there is one.

    Raises:
        ValueError: it is not what peft or diffusers write, asks for what is not supported, or contradicts itself.
    """
    said = []
    if LORA_ADAPTER_METADATA_KEY in metadata:
        where = f"{label}: its {LORA_ADAPTER_METADATA_KEY}"
        values = _parse(where, metadata[LORA_ADAPTER_METADATA_KEY])
        said.append(_read_config(where, {str(name).removeprefix("transformer."): v for name, v in values.items()}))
    if config is not None:
        try:
            text = config.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{config}: must be JSON ({error})") from error
        said.append(_read_config(str(config), _parse(str(config), text)))
    for key in (prefix + name for prefix in ("", "transformer.") for name in _ALPHAS):
        if key in metadata:
            where = f"{label}: its metadata's {key}"
            try:
                said.append(Strength(where, alpha=_number(where, float(metadata[key]))))
            except (TypeError, ValueError):
                raise ValueError(f"{where} must be a finite number, got {metadata[key]!r}") from None
    for other in said[1:]:
        if other.alpha != said[0].alpha:
            raise ValueError(f"{said[0].where} says alpha {said[0].alpha}, but {other.where} says {other.alpha}")
    return said[0] if said else Strength(label)


def _parse(where: str, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be a LoraConfig's values ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a LoraConfig's values, got {type(values).__name__}")
    return values


def _read_config(where: str, values: dict[str, Any]) -> Strength:
    kind = values.get("peft_type") or "LORA"
    if kind not in _CONFIGS:
        raise ValueError(f"{where} must be of a LoRA, LoHa or LoKr, got peft_type {kind!r}")
    known = {field.name: field for field in fields(_CONFIGS[kind])}
    for name, value in values.items():
        variant = name in known and known[name].metadata.get("is_lora_variant") and name != "use_dora"
        if value and (name not in known or variant or name in _UNSUPPORTED):
            raise ValueError(f"{where} must be a LoraConfig's values that are known here, got {name} = {value!r}")
    init = str(values.get("init_lora_weights", "")).lower()
    if init.startswith(_CHANGED_BASE):
        raise ValueError(
            f"{where} says init_lora_weights {init!r}, which changed the weights that the LoRA is of: convert it with"
            " peft's path_initial_model_for_weight_conversion"
        )
    patterns = {name: values.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise ValueError(f"{where}: {name} must be a mapping, got {pattern!r}")
        for key, value in pattern.items():
            _number(f"{where}: {name}", value)
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{where}: {name} must have regular expressions for keys ({error})") from error
    alpha = values.get("lora_alpha" if kind == "LORA" else "alpha")
    rank = values.get("r")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"{where}: r must be a positive whole number, got {rank!r}")
    default = 8  # peft's, of alpha and rank, which its files leave out only where they are written by hand
    return Strength(
        where,
        alpha=_number(f"{where}: alpha", default if alpha is None else alpha),
        rank=rank,
        rank_pattern=patterns["rank_pattern"],
        alpha_pattern=patterns["alpha_pattern"],
        rslora=bool(values.get("use_rslora")),
        dora=bool(values.get("use_dora")),
        peft_type=kind,
    )


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value!r}")
    return float(value)


def _matches(pattern: str, name: str) -> bool:
    return bool(get_pattern_key([pattern], name) == pattern)


def _look_up(patterns: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    for name in names:
        for pattern, value in patterns.items():
            if _matches(pattern, name):
                return value
    return default

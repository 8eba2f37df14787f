"""Names of LoRA files: every spelling that trainers use of a weight, matched to the transformer's layers.

A key is a layer's name, with any prefix, in Wan's or diffusers' words, with dots, underscores or both, and an ending
that says which matrix it is. Every key is matched, or zero and without effect, or named in an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .checkpoint_files import check_values, describe_shape, refuse, strip_prefixes

if TYPE_CHECKING:
    from .transformer import MirageTransformer3DModel

# diffusers' words and Wan's, in this order.
_WAN_WORDS = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("to_out.0", "o"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("net.0.proj", "0"),
    ("net.2", "2"),
    ("norm2", "norm3"),
)
_PREFIXES = (
    *("module_", "model_", "pipe_", "dit_", "diffusion_model_", "base_model_", "transformer_", "unet_"),
    *("lora_unet_", "lora_transformer_", "lycoris_", "orig_mod_", "fsdp_wrapped_module_", "_"),
)
_ENDINGS = (
    re.compile(r"(.+)\.lora_([AB])(?:\.(?!weight$|bias$)([^.]+))?(?:\.(weight|bias))?"),
    re.compile(r"(.+)\.lora_(down|up)(?:\.weight)?"),
    re.compile(r"(.+?)[._]lora(?:_linear_layer)?\.(down|up)\.weight"),
    re.compile(r"(.+)\.(lora_magnitude_vector)(?:\.(?!weight$)([^.]+))?(?:\.weight)?"),
    re.compile(r"(.+)\.(alpha|dora_scale|diff|diff_b|diff_m|w_norm|b_norm)"),
    re.compile(r"(.+)\.((?:lokr_w[12]|hada_w[12])(?:_[ab])?)"),
)
_KINDS = {
    "down": "A",
    "up": "B",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "w_norm": "diff",
    "b_norm": "diff_b",
}
_DIFFERENCES = ("diff", "diff_b", "diff_m")
_UNSUPPORTED = (
    (re.compile(r"(.+\.)?diff_m"), "differences of the modulation (diff_m), as LightX2V writes them"),
    (re.compile(r".+\.(lokr_t[12]|hada_t[12]|lora_mid\.weight)"), "Tucker decompositions, as LyCORIS writes them"),
    (re.compile(r".+\.(oft_.+|boft_.+)"), "OFT"),
    (re.compile(r".+\.[ab][12]\.weight"), "GLoRA"),
    (re.compile(r".+\.(set_weight|reshape_weight)"), "replaced weights (set_weight), as ComfyUI writes them"),
    (re.compile(r".+\.(on_input|ia3_l.*)"), "(IA)3"),
)
_DIALECTS = (
    ("lora_unet_", "kohya or musubi-tuner"),
    ("lora_transformer_", "kohya with diffusers' names"),
    ("lycoris_", "LyCORIS"),
    ("base_model.", "peft"),
    ("diffusion_model.", "ComfyUI, diffusion-pipe or LightX2V"),
    ("model.diffusion_model.", "ComfyUI"),
    ("transformer.", "diffusers"),
    ("pipe.", "DiffSynth or the published release"),
    ("lora_te", "kohya's text encoders"),
)
_WIDTHS = {1536: "Wan2.1 1.3B", 3072: "Wan2.2 TI2V-5B", 5120: "the 14B models of Wan2.1 and Wan2.2"}


class Targets(NamedTuple):
    """What a LoRA can change in a transformer.

    Attributes:
        layers: shape of the weight of every linear layer and of the patch embedding, by name.
        norms: size of every norm with a weight, and whether it has a bias too, by name.
        names: our name of a layer or a norm, by any spelling of it with underscores.
        width: channels of the tokens.
    """

    layers: dict[str, tuple[int, ...]]
    norms: dict[str, tuple[int, bool]]
    names: dict[str, str]
    width: int


class Part(NamedTuple):
    """What a file holds for one layer: tensors by their kind, and the layer's name in the file."""

    tensors: dict[str, Any]
    spelled: str


def list_targets(transformer: MirageTransformer3DModel) -> Targets:
    """List what a LoRA can change. Layers that a LoRA is on already, or that are quantised, have their own shape."""
    layers: dict[str, tuple[int, ...]] = {}
    norms: dict[str, tuple[int, bool]] = {}
    for name, module in transformer.named_modules():
        if ".base_layer" in name or ".lora_" in name:
            continue
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        if isinstance(module, nn.Linear):
            layers[name] = (module.out_features, module.in_features)
        elif isinstance(module, nn.Conv3d):
            layers[name] = (module.out_channels, module.in_channels, *module.kernel_size)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
            norms[name] = (module.weight.numel(), getattr(module, "bias", None) is not None)
    names: dict[str, str] = {}
    for name in (*layers, *norms):
        wan = name
        for ours, theirs in _WAN_WORDS:
            wan = re.sub(rf"(^|\.){re.escape(ours)}(?=\.|$)", rf"\g<1>{theirs}", wan)
        names |= {name.replace(".", "_"): name, wan.replace(".", "_"): name}
    config = transformer.config
    return Targets(layers, norms, names, config.num_attention_heads * config.attention_head_dim)


def match_keys(label: str, state: Mapping[str, Any], targets: Targets) -> dict[str, Part]:
    """Sort the tensors of a LoRA by the layers that they change, and check that each fits.

    Differences that are zero, which change nothing, are left out.

    Args:
        label: what to call the source in errors.
        state: as read.
        targets: of the transformer.

    Returns:
        Parts by the layer's or norm's name. Their kinds are A, B, bias, alpha, magnitude, diff, diff_b, lokr_* or
        hada_*.

    Raises:
        ValueError: a key that is of no layer, is doubled, has no other half or another shape, is of a dialect that is
            not supported, or nothing at all.
    """
    found: dict[str, Part] = {}
    keys: dict[tuple[str, str], str] = {}
    adapters: set[str] = set()
    left_over = []
    for key, value in state.items():
        spelled, kind, adapter = _split_key(key)
        if kind in _DIFFERENCES and isinstance(value, Tensor) and not value.float().any():
            keys[key, kind] = key
            continue
        _check_supported(label, key, value)
        name = _find_name(spelled, targets)
        if not _may_have(name, kind, targets):
            left_over.append(key)
            continue
        adapters |= {adapter} if adapter else set()
        if len(adapters) > 1:
            raise ValueError(f"{label}: must hold one LoRA, got {' and '.join(sorted(adapters))}")
        if (name, kind) in keys:
            raise ValueError(f"{label}: {keys[name, kind]} and {key} are the same weight")
        keys[name, kind] = key
        found.setdefault(name, Part({}, spelled)).tensors[kind] = value

    _check_width(label, found, targets)
    missing, reshaped = [], []
    for name, part in found.items():
        absent = _list_missing(name, part.tensors)
        missing += absent
        reshaped += [] if absent and is_lycoris(part.tensors) else _list_reshaped(name, part.tensors, targets)
    if left_over or missing or reshaped or not found:
        _refuse(label, len(keys), state, left_over, missing, reshaped)
    for (name, kind), key in keys.items():
        if name in found and isinstance(found[name].tensors[kind], Tensor):
            check_values(label, key, found[name].tensors[kind])
    return found


def _split_key(key: str) -> tuple[str, str, str | None]:
    """Return the layer's name in a key, without prefixes, the kind ("" where it is none) and the adapter's name."""
    for pattern in _ENDINGS:
        match = pattern.fullmatch(key)
        if match is None:
            continue
        groups = (*match.groups(), None, None)
        kind = _KINDS.get(match[2], match[2])
        if groups[3] == "bias":
            kind = "bias" if kind == "B" else ""
        return strip_prefixes(match[1]), kind, groups[2]
    return key, "", None


def _find_name(spelled: str, targets: Targets) -> str:
    """Return our name of a layer, "" for none."""
    name = spelled.replace(".", "_")
    while name and name not in targets.names:
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return ""
        name = name[len(prefix) :]
    return targets.names.get(name, "")


def _may_have(name: str, kind: str, targets: Targets) -> bool:
    if name in targets.norms:
        return kind == "diff" or (kind == "diff_b" and targets.norms[name][1])
    return bool(kind) and name in targets.layers


def _check_supported(label: str, key: str, value: Any) -> None:
    for pattern, what in _UNSUPPORTED:
        if pattern.fullmatch(key):
            raise ValueError(f"{label}: {what}, cannot be loaded ({key} {describe_shape(value)}); nothing loaded")


def _check_width(label: str, found: Mapping[str, Part], targets: Targets) -> None:
    """Check that a LoRA is of a model as wide as this one; else nearly every key would be in the error."""
    widths: Counter[int] = Counter()
    for name, part in found.items():
        down = part.tensors.get("A")
        if isinstance(down, Tensor) and down.ndim > 1 and targets.layers[name][1] == targets.width:
            widths[int(down.shape[1])] += 1
    if not widths or targets.width in widths:
        return
    width = widths.most_common(1)[0][0]
    if width < 1 or widths[width] < 2:
        return  # one matrix of another shape says nothing of the model's
    known = f" ({_WIDTHS[width]})" if width in _WIDTHS else ""
    raise ValueError(
        f"{label}: is for a transformer {width} wide{known}, this one is {targets.width} wide; nothing loaded"
    )


def is_lycoris(tensors: Mapping[str, Any]) -> bool:
    """Return whether a layer's tensors are of LoKr or LoHa."""
    return any(kind.startswith(("lokr_", "hada_")) for kind in tensors)


def _list_missing(name: str, tensors: Mapping[str, Any]) -> list[str]:
    kinds = set(tensors)
    if is_lycoris(tensors):
        if any(kind.startswith("hada_") for kind in kinds):
            needed = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
        else:
            factors = ({f"{w}"} if w in kinds else {f"{w}_a", f"{w}_b"} for w in ("lokr_w1", "lokr_w2"))
            needed = set.union(*factors)
        return [f"{kind} of {name}" for kind in sorted(needed - kinds)]
    if kinds <= {"diff", "diff_b"}:
        return []
    return [f"lora_{kind} of {name}" for kind in "AB" if kind not in kinds]


def _list_reshaped(name: str, tensors: Mapping[str, Any], targets: Targets) -> list[str]:
    shapes = {kind: describe_shape(value) for kind, value in tensors.items()}
    expected: dict[str, tuple[int, ...]]
    reshaped = []
    if name in targets.norms:
        expected = dict.fromkeys(("diff", "diff_b"), (targets.norms[name][0],))
    else:
        rows, columns, *kernel = targets.layers[name]
        expected = {"diff": (rows, columns, *kernel), "diff_b": (rows,), "bias": (rows,), "magnitude": (rows,)}
        if shapes.get("magnitude") == (rows, 1):
            shapes["magnitude"] = (rows,)
        if "A" in shapes and "B" in shapes:
            down, up = shapes["A"], shapes["B"]
            if down[1:] != (columns, *kernel) or down[0] < 1 or up != (rows, down[0], *[1] * len(kernel)):
                reshaped.append(f"{name} {down} and {up} where {_pair_shape(rows, columns, kernel)} are expected")
        if is_lycoris(tensors) and not _fits_lycoris(shapes, targets.layers[name]):
            sizes = ", ".join(f"{kind} {shape}" for kind, shape in shapes.items())
            reshaped.append(f"{name} {sizes} for a layer of {targets.layers[name]}")
    alpha = tensors.get("alpha", 1.0)
    if not (alpha.numel() == 1 if isinstance(alpha, Tensor) else isinstance(alpha, (int, float))):
        reshaped.append(f"alpha of {name} {shapes['alpha']} where a number is expected")
    for kind, shape in expected.items():
        if kind in shapes and shapes[kind] != shape:
            reshaped.append(f"{kind} of {name} {shapes[kind]} where {shape} is expected")
    return reshaped


def _fits_lycoris(shapes: dict[str, Any], layer: tuple[int, ...]) -> bool:
    """Return whether the factors of LoKr or LoHa, none of which is missing, are those of a linear layer."""
    if len(layer) != 2 or not all(
        len(shape) == 2 and 0 not in shape for kind, shape in shapes.items() if kind.startswith(("lokr_", "hada_"))
    ):
        return False
    if "hada_w1_a" in shapes:
        rank = shapes["hada_w1_a"][1]
        down, up = (rank, layer[1]), (layer[0], rank)
        return all(
            shapes[f"hada_w{number}_{kind}"] == size for number in "12" for kind, size in (("a", up), ("b", down))
        )
    sizes = []
    for factor in ("lokr_w1", "lokr_w2"):
        if factor in shapes:
            sizes.append(shapes[factor])
        elif shapes[f"{factor}_a"][1] == shapes[f"{factor}_b"][0]:
            sizes.append((shapes[f"{factor}_a"][0], shapes[f"{factor}_b"][1]))
        else:
            return False
    return (sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1]) == layer


def _pair_shape(rows: int, columns: int, kernel: list[int]) -> str:
    down = ", ".join(map(str, (columns, *kernel)))
    return f"(rank, {down}) and ({', '.join(map(str, (rows, 'rank', *[1] * len(kernel))))})"


def _refuse(
    label: str, matched: int, state: Mapping[str, Any], left_over: list[str], missing: list[str], reshaped: list[str]
) -> NoReturn:
    whose = "transformer's linear layers"
    try:
        refuse(label, matched, len(state), whose, left_over, missing, reshaped)
    except ValueError as error:
        key = next(iter(state), "")
        dialect = next((what for prefix, what in _DIALECTS if key.startswith(prefix)), None)
        if dialect is None:
            raise
        raise ValueError(f"{error} (keys as of {dialect})") from None

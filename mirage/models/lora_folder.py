"""A transformer with LoRA in a folder of its own: plain weights, each LoRA in a file beside them, and how they are set.

diffusers writes such a transformer's weights under the names of peft's layers, of which no model can be loaded. Here
`diffusion_pytorch_model.safetensors` has the names of a transformer without LoRA, and the entry `lora` of `config.json`
says which LoRA files there are and which are active with what weight, so that a folder without them is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer

from .lora import inject_lora, read_lora, save_lora

if TYPE_CHECKING:
    from .transformer import MirageTransformer3DModel

ENTRY = "lora"
"""Of `config.json`."""
_FILE = "lora_{}.safetensors"


def save_loras(transformer: MirageTransformer3DModel, folder: Path) -> dict[str, Any] | None:
    """Write every LoRA of a transformer to a folder, and return the entry that says how they are set.

    Returns:
        The entry; None where there is no LoRA, or where they are fused, so that the weights have them already.
    """
    names = list(getattr(transformer, "peft_config", {}))
    layers = _list_layers(transformer)
    if not names or any(layer.merged for layer in layers.values()):
        return None
    active = set(transformer.active_adapters())
    entry: dict[str, Any] = {"enabled": not any(layer.disable_adapters for layer in layers.values()), "files": []}
    for number, name in enumerate(names):
        file = _FILE.format(number)
        save_lora(transformer, folder / file, name)
        weights = {layer: _weight(module, name) for layer, module in layers.items() if name in module.scaling}
        same = len(set(weights.values())) == 1
        entry["files"].append(
            {
                "file": file,
                "name": name,
                "active": name in active,
                "weight": next(iter(weights.values())) if same else weights,
            }
        )
    return entry


def restore_loras(transformer: MirageTransformer3DModel, entry: Any, folder: Path) -> None:
    """Load the LoRA files that :func:`save_loras` wrote, and set them as they were.

    Raises:
        ValueError: the entry is not what it wrote, or a file does not fit.
        FileNotFoundError: a file is not there.
    """
    try:
        files = [(str(one["file"]), str(one["name"]), bool(one["active"]), one["weight"]) for one in entry["files"]]
        enabled = bool(entry["enabled"])
        weights = [weight if isinstance(weight, dict) else {"": weight} for *_, weight in files]
        bad = [value for of in weights for value in of.values() if not math.isfinite(value)]
        if bad or not files or any(Path(file).name != file for file, *_ in files):
            raise ValueError("its values are not finite, or its files not beside it")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: the entry {ENTRY} of its config.json is not as it was saved ({error})") from error
    for file, name, _, _ in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder}: its config.json says that it has a LoRA in {file}, which must lie beside it: copy or"
                " download the whole folder (huggingface_hub.snapshot_download)"
            )
        inject_lora(transformer, read_lora("source", folder / file, transformer, name), name)
    for layer, module in _list_layers(transformer).items():
        for (_, name, _, _), of in zip(files, weights, strict=True):
            module.set_scale(name, of.get(layer, of.get("", 1.0)))
    transformer.set_adapter([name for _, name, active, _ in files if active])
    if not enabled:
        transformer.disable_lora()


@contextmanager
def plain_names(transformer: MirageTransformer3DModel) -> Iterator[None]:
    """Make `state_dict` that of the transformer without its LoRA layers, for as long as this lasts."""

    def rename(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in list(state):
            value = state.pop(name)
            if ".base_layer." in name:
                state[name.replace(".base_layer.", ".")] = value
            elif not any(kind in name for kind in (".lora_", ".lokr_", ".hada_")):
                state[name] = value

    handle = transformer.register_state_dict_post_hook(rename)
    try:
        yield
    finally:
        handle.remove()


def remove_stale(folder: Path, entry: dict[str, Any] | None) -> None:
    """Remove LoRA files of an earlier save that the entry does not name."""
    kept = {one["file"] for one in entry["files"]} if entry else set()
    for path in folder.glob(_FILE.format("[0-9]*")):
        if path.name not in kept:
            path.unlink()


def describe_weights(model: Any) -> str:
    """Return the weights that the LoRA of a model are set to, where one is not simply on; "" else.

    Tensors do not say them, but two models that differ in them are not the same.
    """
    said = []
    for layer, module in _list_layers(model).items():
        for name in module.scaling:
            off = module.disable_adapters or module.merged or name not in module.active_adapters
            weight = 0.0 if off else _weight(module, name)
            if abs(weight - 1.0) > 1e-9:
                said.append(f"{layer} {name} {weight:.9g}")
    return "\n".join(sorted(said))


def _list_layers(transformer: Any) -> dict[str, Any]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}


def _weight(layer: Any, name: str) -> float:
    """Return the weight that `set_adapters` gave a LoRA in a layer."""
    alpha = layer.lora_alpha[name] if hasattr(layer, "lora_alpha") else layer.alpha[name]
    rslora = getattr(layer, "use_rslora", {}).get(name, False)
    unit = alpha / (math.sqrt(layer.r[name]) if rslora else layer.r[name])
    return float(layer.scaling[name] / unit) if unit else 1.0

"""Where a LoRA's file is: a path, a folder with one in it, or a model on the hub. One file comes out of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, list_repo_files
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from .checkpoint_files import SUFFIXES, list_some, looks_like_path
from .lora_strength import ADAPTER_CONFIG

_PEFT = "adapter_model"
_USUAL = tuple(stem + suffix for suffix in (".safetensors", ".bin") for stem in (_PEFT, "pytorch_lora_weights", "lora"))
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def find_lora(
    source: str | os.PathLike[str], weight_name: str | None = None, subfolder: str | None = None, **hub: Any
) -> Path:
    """Return the file of a LoRA.

    Args:
        source: a file; a folder; or OWNER/NAME on the hub.
        weight_name: which file of a folder or of the hub; None takes the one that there is, peft's and diffusers' usual
            names first.
        subfolder: where in them.
        hub: as of `huggingface_hub.hf_hub_download`.

    Raises:
        ValueError: `weight_name` or `subfolder` beside a file, or several files to choose from.
        FileNotFoundError: no such file, folder or model.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if weight_name is not None or subfolder is not None:
            raise ValueError(f"weight_name and subfolder must be None beside a file, got {weight_name} and {subfolder}")
        return path
    if path.is_dir():
        folder = path / (subfolder or "")
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder: {folder}")
        name = weight_name or _choose(str(folder), [entry.name for entry in folder.iterdir() if entry.is_file()])
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no such file: {folder / name}")
        return folder / name
    if looks_like_path(str(source)):
        raise FileNotFoundError(
            f"no such file or folder: {source} (a file of the hub is OWNER/NAME with weight_name=FILE)"
        )
    return _download(str(source), weight_name, subfolder, hub)


def find_config(path: Path) -> Path | None:
    """Return the `adapter_config.json` that belongs to a file: peft's own, or the only checkpoint beside it."""
    config = path.parent / ADAPTER_CONFIG
    if not config.is_file():
        return None
    only = [entry for entry in path.parent.iterdir() if entry.suffix in SUFFIXES] == [path]
    return config if only or path.stem == _PEFT else None


def _choose(where: str, names: list[str]) -> str:
    usual = [name for name in _USUAL if name in names]
    found = usual or sorted(name for name in names if Path(name).suffix in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"no LoRA in {where}: a file must end in {', '.join(SUFFIXES)}")
    if len(found) > 1:
        raise ValueError(f"weight_name must say which file of {where}, one of {list_some(found)}, got None")
    return found[0]


def _download(repository: str, weight_name: str | None, subfolder: str | None, hub: dict[str, Any]) -> Path:
    """Return the cached copy of a file of the hub, and get peft's configuration beside it."""

    def get(name: str) -> Path:
        return Path(hf_hub_download(repository, name, subfolder=subfolder, **hub))

    listing = {name: hub[name] for name in ("revision", "token") if name in hub}
    try:
        if weight_name is None and not (hub.get("local_files_only") or constants.HF_HUB_OFFLINE):
            start = f"{subfolder}/" if subfolder else ""
            inside = [name for name in list_repo_files(repository, **listing) if name.startswith(start)]
            names = [name.removeprefix(start) for name in inside]
            weight_name = _choose(repository, [name for name in names if "/" not in name])
        elif weight_name is None:
            weight_name = _choose_cached(repository, get)
        path = get(weight_name)
        if path.stem == _PEFT:
            _get_config(repository, get)
        return path
    except (OSError, HFValidationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"no such file or folder: {repository}; nor can it be had from the hub: {reason}"
        ) from error


def _get_config(repository: str, get: Callable[[str], Path]) -> None:
    """Get peft's configuration, which says how strong a LoRA is, unless the hub says that there is none."""
    try:
        get(ADAPTER_CONFIG)
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{ADAPTER_CONFIG} of {repository} must be in the cache too") from error
    except EntryNotFoundError:
        return


def _choose_cached(repository: str, get: Callable[[str], Path]) -> str:
    for name in _USUAL:
        try:
            get(name)
        except EntryNotFoundError:
            continue
        return name
    raise FileNotFoundError(f"weight_name must be given offline, none of {', '.join(_USUAL)} of {repository} is cached")

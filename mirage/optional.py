"""Optional dependencies: imported where they are used, and one clear sentence where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

_PACKAGES = {"PIL": "pillow", "skimage": "scikit-image", "imageio_ffmpeg": "imageio-ffmpeg", "yaml": "pyyaml"}


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message says how to install it."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module from a package of the extra `extra` of this distribution.

    Raises:
        MissingExtraError: it is not installed.
    """
    top = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package, absent = _PACKAGES.get(top, top), (error.name or top).split(".")[0]
        if absent != top:
            needed = _PACKAGES.get(absent, absent)
            raise MissingExtraError(
                f'{package} is installed, but {needed}, which it needs, is not: pip install "mirage-world[{extra}]"'
            ) from error
        raise MissingExtraError(f'{package} is needed and not installed: pip install "mirage-world[{extra}]"') from None

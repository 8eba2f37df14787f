"""Environment variables that the package reads."""

from __future__ import annotations

import os


def triton_interpreted() -> bool:
    """Return whether Triton kernels run in its interpreter (``TRITON_INTERPRET=1``), on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

"""Seeds of a run's draws: each a function of the run's seed and of what is drawn, so that a run resumes exactly."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2^63) that changes with every part."""
    text = " ".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1

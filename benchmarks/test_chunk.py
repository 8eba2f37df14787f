"""A whole chunk: condition, denoise, decode, depth, write."""

from __future__ import annotations

import pytest


def test_chunk() -> None:
    pytest.importorskip("mirage.pipeline", reason="the pipeline is not part of this package yet")
    pytest.skip("not written yet")

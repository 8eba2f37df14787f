"""The record of behaviour, as far as it holds on every machine; ``behaviour/record.py`` checks the rest."""

from __future__ import annotations

import json

import pytest
from behaviour import names, record


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("section", ["operators", "caches"])
def test_nothing_has_changed(section: str, backend: str) -> None:
    if not names.is_available(backend):
        pytest.skip(f"backend {backend!r} was not built")
    differences = record.check_portable(json.loads(record.RECORD.read_text()), section, backend)
    assert not differences, "\n".join(differences)

"""Old names of modules: an error that says the new one, and saved pipelines that name them load."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import generation
import pytest
import torch

import mirage
from mirage._moved import OLD_MODULES
from mirage.pipeline.pipeline import MiragePipeline


def test_old_modules_say_where_they_are() -> None:
    for old, new in OLD_MODULES.items():
        with pytest.raises(ModuleNotFoundError, match=f"^{old} is now {new} \\(docs/renamed\\)$"):
            importlib.import_module(old)
        assert importlib.util.find_spec(new) is not None
    with pytest.raises(ModuleNotFoundError, match="No module named 'mirage.nothing'"):
        importlib.import_module("mirage.nothing")
    assert mirage.__version__


def test_pipelines_saved_before_the_move_load(tmp_path: Path) -> None:
    pipe = generation.make_pipeline()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for name, (module, _) in ((name, value) for name, value in index.items() if isinstance(value, list)):
        if module.startswith("mirage.models."):
            index[name][0] = module.replace("mirage.models.", "mirage.")
    assert index["latent_depth"] == ["mirage.latent_depth", "LatentDepth"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = MiragePipeline.from_pretrained(tmp_path)
    for name in ("memory_adapter", "latent_depth", "transformer"):
        held, expected = (getattr(one, name).state_dict() for one in (loaded, pipe))
        assert all(torch.equal(held[key], expected[key]) for key in expected)


def test_old_names_of_the_readme_say_the_new_ones() -> None:
    pytest.importorskip("diffusers", reason="the extra generate is not installed")
    import mirage_kernels
    from mirage import MiragePipeline

    with pytest.raises(AttributeError, match="start is now start_session"):
        MiragePipeline.start(None)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="View is now mirage_kernels.Readout"):
        mirage_kernels.View  # noqa: B018
    cache = mirage_kernels.LatentCache(4)
    for old, new in (("generation", "buffer_version"), ("fetch", "onload"), ("settings", "config")):
        with pytest.raises(AttributeError, match=new):
            getattr(cache, old)

"""Training runs whose files are damaged or hostile: the same losses and weights, or a line that says which file it is.

One run is made per session and copied. Nothing that is refused may have changed a byte on disk.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from damaging import DAMAGES as COMMON_DAMAGES
from damaging import content, exchange

pytest.importorskip("diffusers", reason="the extra generate is not installed")
pytest.importorskip("yaml", reason="the extra train is not installed")

from safetensors.torch import load_file
from training_runs import config

from mirage.training.checkpoints import Checkpoint, list_checkpoints, read_newest, save_checkpoint
from mirage.training.loop import METRICS, train

CHECKPOINT = "checkpoints/00000002"
FILES = ["config.json", METRICS] + [
    f"{CHECKPOINT}/{name}" for name in ("trained.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
]
SAVED = Path(__file__).parents[2] / "data" / "v0367533"


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


def asked(out: Path, steps: int = 3, **changes: Any) -> Any:
    data = {"frames": 9, "sources": [{"kind": "synthetic", "rooms": 2}]}
    return config("adapter", out, steps=steps, save_every=1, schedule="constant", data=data, **changes)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of three steps, and one that was stopped after two."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("training")
    train(asked(folder / "stopped", 2), progress=False)
    shutil.copytree(folder / "stopped", folder / "whole")
    train(asked(folder / "whole"), progress=False)
    return folder / "whole", folder / "stopped"


@pytest.fixture
def copy(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs[1], tmp_path / "run", ignore=shutil.ignore_patterns(".lock")))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / METRICS).read_text().splitlines()]


def assert_same_run(folder: Path, whole: Path) -> None:
    name = "memory_adapter/diffusion_pytorch_model.safetensors"
    left, right = load_file(folder / name), load_file(whole / name)
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert losses(folder)[-1] == losses(whole)[-1]


DAMAGES = COMMON_DAMAGES | {"exchanged": lambda path: exchange(path, "00000001")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, damage",
    [(name, damage) for name in FILES for damage in DAMAGES if damage != "exchanged" or name.startswith(CHECKPOINT)],
)
def test_a_damaged_file_is_named_or_made_again(runs: tuple[Path, Path], copy: Path, name: str, damage: str) -> None:
    DAMAGES[damage](copy / name)
    before = content(copy)
    try:
        train(asked(copy), progress=False)
    except (OSError, ValueError) as error:
        message = str(error)
        assert str(copy / name) in message and "\n" not in message
        assert content(copy) == before
        # As the message says.
        if name == METRICS and damage not in ("a folder", "a dangling link"):
            (copy / name).unlink()
        elif name.startswith(CHECKPOINT) and damage != "exchanged":  # which damages both
            assert "00000002: the run continues from step 1" in message
            shutil.rmtree(copy / CHECKPOINT)
        else:
            return
        train(asked(copy), progress=False)
    else:
        assert name == "config.json" or (name, damage) == (METRICS, "deleted")
    assert_same_run(copy, runs[0])


@pytest.mark.slow
def test_a_lost_configuration_does_not_let_another_one_in(copy: Path) -> None:
    (copy / "config.json").unlink()
    before = content(copy)
    with pytest.raises(ValueError, match=r"config\.json is missing; .* not what it is now resumed with"):
        train(asked(copy, learning_rate=0.5), progress=False)
    assert content(copy) == before


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "optimizer.bin"])
@pytest.mark.parametrize("how", ["torch.save", "pickle", "empty"])
def test_no_pickle_of_an_old_checkpoint_is_executed(tmp_path: Path, name: str, how: str) -> None:
    folder, executed = tmp_path / "checkpoints", tmp_path / "executed"
    shutil.copytree(SAVED / "training" / "checkpoints", folder)
    found = read_newest(folder)
    assert found is not None and found.step == 2 and found.schedule["last_epoch"] == 2 and found.broken == {}
    path = folder / "00000002" / name
    if how == "torch.save":
        torch.save({"step": 2, "broken": {}, "more": Payload(executed)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(executed)) if how == "pickle" else b"")
    with pytest.raises(ValueError, match=rf"{name} is damaged: .*; put it back from a copy, or delete .*checkpoints"):
        read_newest(folder)
    assert not executed.exists()


def test_a_checkpoint_is_what_was_saved_and_no_pickle(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    optimizer = torch.optim.AdamW([weight, torch.nn.Parameter(torch.randn(2))], betas=(0.9, 0.95))
    weight.grad = torch.randn(3, 4)
    optimizer.step()
    for step in (1, 2, 3):
        schedule = {"last_epoch": step, "base_lrs": [1e-4, 0.1], "lr_lambdas": [None]}
        saved = Checkpoint(
            step, {"weight": weight}, optimizer.state_dict(), schedule, {"scale": 65536.0, "growth_factor": 2.0}
        )
        save_checkpoint(tmp_path, saved, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["00000002", "00000003"]
    found = read_newest(tmp_path)
    assert found is not None and found.step == 3 and torch.equal(found.trained["weight"], weight)
    assert found.schedule == saved.schedule and found.scaler == saved.scaler
    state = optimizer.state_dict()
    assert found.optimizer["param_groups"] == state["param_groups"]  # tuples and numbers as they were
    for name, value in state["state"][0].items():
        held = found.optimizer["state"][0][name]
        assert torch.equal(held, value) and held.dtype == value.dtype
    for path in tmp_path.rglob("*"):
        assert path.suffix in ("", ".json", ".safetensors")


@pytest.mark.slow
def test_a_folder_is_held_by_one_training(copy: Path) -> None:
    """The lock is held by another process, and is gone with it."""
    holder = f"""
import time
from pathlib import Path
from mirage.training.record import locked
with locked(Path({str(copy)!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        before = content(copy)
        with pytest.raises(BlockingIOError, match="is in use: another training runs there"):
            train(asked(copy), progress=False)
        assert content(copy) == before
    finally:
        process.kill()
        process.communicate()
    assert train(asked(copy), progress=False)["steps"] == 3

"""Runs whose files are damaged, exchanged or gone, and runs that are killed: the same bits, or a line that says which.

One short run is made per session and copied. Nothing that is refused may have changed a byte on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generation
import pytest
import torch
from damaging import DAMAGES as COMMON_DAMAGES
from damaging import content, exchange, flip
from generation import options

from mirage.pipeline.pipeline import MiragePipeline
from mirage_kernels import LatentCache

FRAMES = 25  # chunks of 9, 8 and 8
CHUNK_FILES = ("latents", "cache", "decoder", "random")
FILES = ["run.json"] + [
    f"chunks/{chunk}/{name}"
    for chunk in ("0000", "0001")
    for name in (*(f"{stem}.safetensors" for stem in CHUNK_FILES), "metrics.json", "segment.mp4", "manifest.json")
]
UNUSED = [f"chunks/0000/{name}.safetensors" for name in ("cache", "decoder", "random")]
"""What only a resumption without chunk 0001 would need."""
REMADE = ["run.json", "chunks/0000/segment.mp4", "chunks/0001/segment.mp4"]


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


@pytest.fixture(scope="session")
def pipe() -> MiragePipeline:
    return generation.make_pipeline()


@pytest.fixture(scope="session")
def runs(pipe: MiragePipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that was not disturbed, and one that was stopped after its second chunk."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")

    def chunk_done(_: Any, chunk: Any) -> None:
        if chunk.index == 1:
            shutil.copytree(folder / "whole", folder / "stopped", ignore=shutil.ignore_patterns(".lock"))

    pipe(**options(FRAMES, run_dir=folder / "whole", callback_on_chunk_end=chunk_done, output_type=None))
    return folder / "whole", folder / "stopped"


@pytest.fixture
def copy(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs[1], tmp_path / "run"))


def resume(pipe: MiragePipeline, folder: Path, **changes: Any) -> None:
    pipe(**options(FRAMES, run_dir=folder, resume=True, output_type=None, **changes))


def assert_same_run(folder: Path, whole: Path) -> None:
    assert (folder / "video.mp4").read_bytes() == (whole / "video.mp4").read_bytes()
    left, right = (LatentCache.load(run / "cache.safetensors").tensors() for run in (folder, whole))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    for chunk in ("0000", "0001", "0002"):
        name = f"chunks/{chunk}/latents.safetensors"
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


DAMAGES = COMMON_DAMAGES | {
    "exchanged": lambda path: exchange(path, {"0000": "0001", "0001": "0000"}[path.parent.name])
}
FAST = {
    ("chunks/0000/latents.safetensors", "a bit flipped near the end"),
    ("chunks/0001/cache.safetensors", "exchanged"),
    ("chunks/0001/manifest.json", "a folder"),
}
CASES = [
    pytest.param(name, damage, marks=[] if (name, damage) in FAST else [pytest.mark.slow])
    for name in FILES
    for damage in DAMAGES
    if (name, damage) != ("run.json", "exchanged")
]


@pytest.mark.parametrize("name, damage", CASES)
def test_a_damaged_file_is_named_or_made_again(
    pipe: MiragePipeline, runs: tuple[Path, Path], copy: Path, name: str, damage: str
) -> None:
    """The same bits in the end, or a refusal in one line that names the file, with nothing changed on disk."""
    DAMAGES[damage](copy / name)
    before = content(copy)
    try:
        resume(pipe, copy)
    except (OSError, ValueError) as error:
        message = str(error)
        assert "\n" not in message
        # An exchange damages two files, of which the first is named.
        twin = name.replace("0001", "0002").replace("0000", "0001").replace("0002", "0000")
        names = {name, twin} if damage == "exchanged" else {name}
        assert any(str(copy / one) in message for one in names) or "is another chunk" in message, message
        assert content(copy) == before or damage == "a folder"
        assert damage == "exchanged" or (name not in UNUSED and (name not in REMADE or damage == "a folder"))
    else:
        assert name in REMADE + UNUSED or (name.endswith("manifest.json") and damage == "deleted")
        assert_same_run(copy, runs[0])


def test_a_damaged_newest_chunk_is_deleted_as_the_message_says(
    pipe: MiragePipeline, runs: tuple[Path, Path], copy: Path
) -> None:
    flip(copy / "chunks" / "0001" / "cache.safetensors", 0.5)
    with pytest.raises(ValueError, match=r"or delete .*0001 and resume: the run continues from chunk 0000"):
        resume(pipe, copy)
    shutil.rmtree(copy / "chunks" / "0001")
    resume(pipe, copy)
    assert_same_run(copy, runs[0])


def _exchange_chunks(chunks: Path) -> None:
    (chunks / "0000").rename(chunks / "x")
    (chunks / "0001").rename(chunks / "0000")
    (chunks / "x").rename(chunks / "0001")


def _file_for_chunk(chunks: Path) -> None:
    shutil.rmtree(chunks / "0001")
    (chunks / "0001").write_text("")


@pytest.mark.parametrize(
    "spoil, changes, message",
    [
        (lambda chunks: shutil.rmtree(chunks / "0000"), {}, "0000 is missing, though there is 0001"),
        (lambda chunks: (chunks / "0001").rename(chunks / "0002"), {}, "0001 is missing, though there is 0002"),
        (_exchange_chunks, {}, "0000 is another chunk than was written there"),
        (_file_for_chunk, {}, "0001 is damaged: it must be a folder"),
        (lambda chunks: None, {"chunk_frames": 13}, "must continue the run's chunks"),
        (lambda chunks: (chunks / ".0002").symlink_to("/"), {"chunk_frames": 13}, "must continue the run's chunks"),
    ],
)
def test_a_refused_resumption_changes_nothing(
    pipe: MiragePipeline, copy: Path, spoil: Callable[[Path], Any], changes: dict[str, Any], message: str
) -> None:
    spoil(copy / "chunks")
    before = content(copy)
    with pytest.raises(ValueError, match=message):
        resume(pipe, copy, **changes)
    assert content(copy) == before


@pytest.mark.slow
def test_a_chunk_of_another_run_is_not_adopted(pipe: MiragePipeline, runs: tuple[Path, Path], copy: Path) -> None:
    """Of the same scene and settings, made again: what differs is the time that it took."""
    other = copy.parent / "other"
    pipe(**options(17, run_dir=other, output_type=None))
    shutil.rmtree(copy / "chunks" / "0001")
    shutil.copytree(other / "chunks" / "0001", copy / "chunks" / "0001")
    with pytest.raises(ValueError, match="0001 is another chunk than was written there: it does not follow chunk 0000"):
        resume(pipe, copy)
    with pytest.raises(FileExistsError, match="holds a run already"):
        pipe(**options(FRAMES, run_dir=copy, output_type=None))


def test_a_manifest_lists_every_file(runs: tuple[Path, Path]) -> None:
    for folder in (runs[1] / "chunks").iterdir():
        listed = json.loads((folder / "manifest.json").read_text())["files"]
        assert {*listed, "manifest.json"} == {path.name for path in folder.iterdir()}


# Kills. Children are forked from a process that has loaded everything, so that a kill costs seconds.

KILLS = """
import os, random, shutil, signal, sys, time
sys.path.insert(0, {tests!r})
import generation, torch
from pathlib import Path

torch.set_num_threads(1)
pipe = generation.make_pipeline()
run, kills = Path({run!r}), {kills}

def start(folder):
    child = os.fork()
    if not child:
        try:
            pipe(**generation.options(25, run_dir=folder, resume=True, output_type=None))
            os._exit(0)
        finally:
            os._exit(1)
    return child

began = time.monotonic()
assert os.waitpid(start(run / "whole"), 0)[1] == 0
took = time.monotonic() - began
draw = random.Random(0)
for number in range(kills):
    folder = run / str(number)
    while True:
        child = start(folder)
        time.sleep(draw.uniform(0, 1.2 * took))
        os.kill(child, signal.SIGKILL)  # a child that has ended waits for its parent, and its number is no other's
        if os.WIFEXITED(status := os.waitpid(child, 0)[1]):
            assert status == 0, number
            break
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_at_random_moments_resumes_to_the_same_bits(tmp_path: Path) -> None:
    kills = 100 if os.environ.get("MIRAGE_NIGHTLY") == "1" else 3
    script = KILLS.format(tests=str(Path(__file__).parents[2]), run=str(tmp_path), kills=kills)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number in range(kills):
        assert_same_run(tmp_path / str(number), tmp_path / "whole")
        assert not [path for path in (tmp_path / str(number)).rglob(".*") if path.name != ".lock"]


LIMITED = """
import os, resource, sys
sys.path.insert(0, {tests!r})
import generation, torch

torch.set_num_threads(1)
pipe = generation.make_pipeline()
for number, limit in enumerate({limits}):
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            pipe(**generation.options(25, run_dir={run!r} + str(number), resume=True, output_type=None))
        except OSError:
            os._exit(3)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 3, (limit, status)
"""


@pytest.mark.slow
def test_a_file_that_may_not_grow_is_an_os_error_and_the_run_is_resumed(
    pipe: MiragePipeline, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    limits = [0, 3_000, 10_000, 20_000, 40_000]
    script = LIMITED.format(tests=str(Path(__file__).parents[2]), run=str(tmp_path / "run"), limits=limits)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number in range(len(limits)):
        folder = tmp_path / f"run{number}"
        assert not [path for path in folder.rglob(".*") if path.name != ".lock"], limits[number]
        resume(pipe, folder)
        assert_same_run(folder, runs[0])

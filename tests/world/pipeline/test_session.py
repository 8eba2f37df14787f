"""MirageSession: the memory through a whole video, steps that fail, runs that are killed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import generation
import pytest
import room
import torch
from generation import LATENT, SIZE, Marked, options
from torch import Tensor

import mirage.pipeline.run_record
import mirage.pipeline.session
import mirage.pipeline.steps
from mirage.media import load_video
from mirage.models.vae import encode_static_frame
from mirage.perception.depth import GivenDepth
from mirage.pipeline import chunk_folder, run_store
from mirage.pipeline.denoise import ChunkDenoiser
from mirage.pipeline.memory import MemoryConfig
from mirage.pipeline.pipeline import MiragePipeline
from mirage.pipeline.session import MirageSession
from mirage_kernels import Cameras, LatentCache
from mirage_kernels.geometry import pool_mask


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


@pytest.fixture(scope="module")
def pipe() -> MiragePipeline:
    return generation.make_pipeline()


def start(pipe: MiragePipeline, num_frames: int, **changes: Any) -> MirageSession:
    asked = options(num_frames, **changes)
    for name in ("cameras", "chunk_frames", "output_type"):
        asked.pop(name)
    return pipe.start_session(**asked)


def same_tokens(left: LatentCache, right: LatentCache) -> bool:
    return same_state(left, state(right))


def state(cache: LatentCache) -> dict[str, Tensor]:
    """Copies of all that the memory holds, the votes for carving included."""
    return {name: held.clone() for name, held in cache.tensors().items()}


def same_state(cache: LatentCache, expected: dict[str, Tensor]) -> bool:
    held = cache.tensors()
    return held.keys() == expected.keys() and all(torch.equal(held[name], expected[name]) for name in held)


def accepted(written: dict[str, int]) -> int:
    """Of the tokens of a write, those that no check kept from the memory: static, of a known depth within range."""
    return sum(written[name] for name in ("written", "replaced", "merged", "covered", "refused"))


# The memory through a whole video.


@pytest.mark.parametrize("policy", ["bounded", "append"])
def test_what_was_written_is_read_when_the_camera_returns(pipe: MiragePipeline, policy: str) -> None:
    views, cells = generation.cameras(25), LATENT[0] * LATENT[1]
    true_depth = room.render(views[::4])[0]
    assert torch.equal(views[24].cam2world, views[0].cam2world)
    session = start(pipe, 25, cache=LatentCache(48, write_policy=policy))
    cache = session.cache
    session.write_first_frame(views[0])
    alone = cache.read(views[24], size=LATENT)
    written = [session.step(views[first:last]).metrics["written"] for first, last in ((0, 9), (9, 17))]
    before = cache.read(views[24], size=LATENT)
    returning = torch.isin(cache.frame_ids[before.index[0]], torch.tensor([0]))
    last = session.step(views[17:25])
    written.append(last.metrics["written"])
    latents = session.latents()[0].movedim(1, 0)
    rows = latents.permute(0, 2, 3, 1).flatten(1, 2)  # (frames, cells, C)

    # With the image's tokens alone, the camera that returns sees exactly what the memory keeps of an image: the
    # static-frame latent, not that of a single image.
    static_frame = encode_static_frame(pipe.vae, session._image)[0, :, 0]
    assert torch.equal(alone.latents[0], static_frame) and not torch.allclose(static_frame, latents[0], atol=0.1)
    rows[0] = static_frame.flatten(1).T
    # So long as nothing newer was seen from there, most of what it sees is of them; the last step continued from that.
    assert before.mask.all() and returning.float().mean() > 0.5
    assert torch.equal(last.readout.latents[-1], before.latents[0])

    # Every token holds the latent of a cell of its frame, and no cell has two.
    assert cache.num_frames == 7 and sum(map(accepted, written)) == 6 * cells
    if policy == "append":  # all of them, in order of frame, row, column
        assert torch.equal(cache.frame_ids.long(), torch.arange(7).repeat_interleave(cells))
        assert torch.equal(cache.features, rows.flatten(0, 1))
    else:  # what the memory shows already is not in it twice
        same = (rows[cache.frame_ids.long()] == cache.features[:, None]).all(-1)
        assert (same.sum(1) == 1).all()
        assert len((cache.frame_ids * cells + same.int().argmax(1)).unique()) == len(cache)
        assert len(cache) == cells + sum(report["written"] - report["carved"] for report in written) < 0.5 * 7 * cells

    # Back at the start the camera sees the room where it is, in the latents that were generated for it.
    view = cache.read(views[24], size=LATENT, splat="nearest")
    assert view.mask.all()
    assert torch.equal(view.latents[0].permute(1, 2, 0), cache.features[view.index[0]])
    lowest = -torch.nn.functional.max_pool2d(-true_depth[:1], (16, 16))[0]
    highest = torch.nn.functional.max_pool2d(true_depth[:1], (16, 16))[0]
    margin = 0.1 * highest
    assert ((view.depth[0] > lowest - margin) & (view.depth[0] < highest + margin)).float().mean() > 0.95
    # Aligned, a token of the first or the last frame fits best, but where another one stands well before it.
    aligned = cache.read(views[24], size=LATENT)
    assert torch.isin(cache.frame_ids[aligned.index[0]], torch.tensor([0, 6])).float().mean() > 0.5


@pytest.mark.parametrize("policy", ["bounded", "append"])
def test_nothing_moving_and_no_sky_is_ever_in_the_memory(pipe: MiragePipeline, policy: str) -> None:
    """A box flies through the room, and its far wall is a window: 0 depth is what an honest estimator says of sky."""
    views = generation.cameras(25)
    box = torch.zeros(25, 2, 3, dtype=torch.float64)
    box[:, 0], box[:, 1] = torch.tensor([-0.3, -0.5, -0.6]), torch.tensor([0.3, 0.1, 0.0])
    box[..., 0] += torch.linspace(-1.0, 1.0, 25)[:, None]
    depth, moving = room.render(views, box)
    points = views.centers[:, None, None] + room.rays(views) * depth[..., None]
    sky = (points[..., 2] > 2.99) & ~moving
    assert moving.flatten(1).any(1).all() and sky.flatten(1).any(1).all()
    marked = Marked(moving | sky)

    written: list[dict[str, int]] = []
    asked = options(25, depth=depth, static_filter=marked, cache=LatentCache(48, write_policy=policy))
    cache = pipe(**asked, callback_on_chunk_end=lambda _, chunk: written.append(chunk.metrics["written"])).cache
    position = cache.points.double()
    assert len(cache) > (20 if policy == "append" else 5)
    assert not (position[:, 2] > 2.9).any()  # nothing on the far wall
    low, high = box[:, 0].amin(0) - 0.02, box[:, 1].amax(0) + 0.02
    assert not ((position > low) & (position < high)).all(1).any()  # nothing where the box flew
    # And all that is neither is there: a token goes only if one of its frames' pixels is marked.
    groups = (1, 4, 4, 4, 4, 4, 4)
    kept = torch.stack([~group.any(0) for group in (moving | sky).split(groups)])
    kept = pool_mask(kept, LATENT)
    assert sum(map(accepted, written)) == kept[1:].sum()
    if policy == "append":
        assert len(cache) == kept.sum()
    assert cache.read(views[::4], LATENT).mask[kept].all()
    assert marked.first == 25


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["bounded", "append"])
def test_memory_is_flat_but_for_the_cache(tmp_path: Path, policy: str) -> None:
    """Most bytes of live tensors in chunk 12 against chunk 3, in a process of its own: sampled in every part of a chunk
    that calls back (each denoising step, the estimator, the filter, its end)."""
    script = """
import gc, sys, torch
sys.path.insert(0, {tests!r})
import generation
from mirage.perception.static_filter import AllStatic
from mirage_kernels import LatentCache

torch.set_num_threads(1)
peaks, live = [0], []

def sample():
    gc.collect()
    storages = (x.untyped_storage() for x in gc.get_objects() if torch.is_tensor(x))
    held = sum({{storage.data_ptr(): storage.nbytes() for storage in storages}}.values())
    peaks[-1] = max(peaks[-1], held)

def step_done(pipe, step, timestep, tensors):
    sample()
    return {{}}

def chunk_done(pipe, chunk):
    sample()
    peaks.append(0)
    live.append(chunk.metrics["cache_bytes"])

class Filter(AllStatic):
    def __call__(self, views):
        sample()
        return super().__call__(views)

asked = generation.options(9 + 8 * 12, output_type=None, run_dir={run!r}, callback_on_chunk_end=chunk_done)
cache = LatentCache(48, capacity=4000, write_policy={policy!r})
asked |= {{"callback_on_step_end": step_done, "static_filter": Filter(), "cache": cache}}
generation.make_pipeline()(**asked)
print(peaks[3], peaks[12], live[3], live[12])
"""
    content = script.format(tests=str(Path(__file__).parents[2]), run=str(tmp_path / "run"), policy=policy)
    done = subprocess.run([sys.executable, "-c", content], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    third, twelfth, *live = map(int, done.stdout.split())
    # The memory itself grew, within buffers of fixed capacity; the bounded one but little on a path to and fro.
    grown = live[1] - live[0]
    assert grown > live[0] if policy == "append" else 0 < grown < live[0]
    one_frame_of_pixels = 3 * SIZE[0] * SIZE[1] * 4
    assert abs(twelfth - third) < one_frame_of_pixels  # camera poses and their copies are what is left


def test_session_steps_are_the_call(pipe: MiragePipeline) -> None:
    views = generation.cameras(25)
    session = start(pipe, 25)
    chunks = [session.step(views[:9]), session.step(views[9:17]), session.step(views[17:25])]
    assert [(chunk.start, chunk.stop) for chunk in chunks] == [(0, 9), (9, 17), (17, 25)]
    assert [len(chunk.frames) for chunk in chunks] == [9, 8, 8]
    assert [len(chunk.latents) for chunk in chunks] == [3, 2, 2]
    assert session.num_frames == 25 and session.num_chunks == 3
    expected = pipe(**options(25))
    assert torch.equal(session.latents(), expected.frames) and same_tokens(session.cache, expected.cache)
    assert torch.equal(torch.cat(list(session.decode())), torch.cat([chunk.frames for chunk in chunks]))
    later = chunks[2].metrics
    assert later["references"] and later["preceding"] == [2, 3] and later["coverage"] > 0.9
    assert later["tokens"] == len(session.cache) and accepted(later["written"]) == 2 * LATENT[0] * LATENT[1]


@pytest.mark.slow
def test_references_are_the_views_that_overlap_most(pipe: MiragePipeline) -> None:
    views = generation.cameras(25)
    session = start(pipe, 25, max_reference_frames=2, reference_voxel_size=0.3)
    for first, last in ((0, 9), (9, 17)):
        session.step(views[first:last])
    targets = views[[16, 20, 24]]
    overlaps = session.cache.view_overlap(views[:17:4], targets, LATENT, voxel_size=0.3)
    expected = sorted(range(5), key=lambda frame: -overlaps[frame])[:2]
    chunk = session.step(views[17:25])
    assert chunk.metrics["references"] == expected
    assert chunk.metrics["overlaps"] == [overlaps[frame].item() for frame in expected]
    none = start(pipe, 25, reference_threshold=2.0)
    none.step(views[:9])
    assert none.step(views[9:17]).metrics["references"] == []


def test_a_cache_with_a_scene_in_it_is_continued(pipe: MiragePipeline) -> None:
    first = pipe(**options(9)).cache
    before = first.features.clone()
    second = pipe(**options(9, cache=first)).cache
    assert second is first and second.num_frames == 6
    assert torch.equal(second.features[: len(before)], before)


def test_bad_steps_change_nothing(pipe: MiragePipeline) -> None:
    views = generation.cameras(25)
    session = start(pipe, 25)
    with pytest.raises(ValueError, match="number of cameras of a first step must be 4 n"):
        session.step(views[:8])
    session.step(views[:9])
    for count in (0, 3, 9):
        with pytest.raises(ValueError, match=f"cameras of a later step must be 4 n new ones.*got {count}"):
            session.step(views[9 : 9 + count])
    with pytest.raises(ValueError, match="aspect"):
        session.step(views[9:17].resized((64, 64)))
    with pytest.raises(TypeError, match="cameras must be mirage_kernels.Cameras"):
        session.step(views[9:17].cam2world)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the image is in the memory already"):
        session.write_first_frame(views[0])
    with pytest.raises(ValueError, match="cameras must be those of the run so far"):
        next(session.run(views[[1, *range(1, 25)]], 9))
    with pytest.raises(ValueError, match="must continue the run's chunks, 0-8, got 0-4"):
        next(session.run(views, 5))
    with pytest.raises(ValueError, match=r"finish\(\) needs a session with a run_dir"):
        session.finish()
    session.step(views[9:17])
    assert torch.equal(session.latents(), pipe(**options(17)).frames)
    other = start(pipe, 25)
    other.write_first_frame(views[0])
    with pytest.raises(ValueError, match=r"cameras\[0\] must be the camera that write_first_frame\(\) was given"):
        other.step(views[1:10])


# Steps that fail.


class Fails:
    """Depth that goes wrong in one way the second time it is asked for a chunk."""

    needs_frames = False
    alignment = "none"

    def __init__(self, depth: Tensor, what: Any) -> None:
        self.given, self.what, self.calls = GivenDepth(depth), what, 0

    def __call__(self, frames: Tensor | None, views: Cameras, numbers: list[int]) -> Any:
        self.calls += 1
        if self.calls == 3:
            return self.what()
        return self.given(frames, views, numbers)


def _out_of_memory() -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def _interrupted() -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "what, error, message",
    [
        (_out_of_memory, torch.OutOfMemoryError, "out of memory"),
        (_interrupted, KeyboardInterrupt, "^$"),
        (lambda: torch.ones(3, 3), ValueError, r"depth from Fails must be \(2, H, W\) float, got \(3, 3\)"),
        (lambda: None, ValueError, r"depth from Fails must be \(2, H, W\) float, got NoneType"),
        (lambda: torch.ones(2, 1, 1), ValueError, "depth must be at least as fine"),
    ],
)
@pytest.mark.slow
def test_a_failed_step_can_be_tried_again(
    pipe: MiragePipeline, tmp_path: Path, what: Any, error: type[BaseException], message: str
) -> None:
    views, depth = generation.cameras(25), options(25)["depth"]
    session = start(pipe, 25, depth=None, depth_estimator=Fails(depth, what), run_dir=tmp_path / "run")
    session.step(views[:9])
    before = state(session.cache)
    with pytest.raises(error, match=message):
        session.step(views[9:17])
    assert session.num_frames == 9 and session.cache.num_frames == 3 and same_state(session.cache, before)
    assert sorted(path.name for path in (tmp_path / "run" / "chunks").iterdir()) == ["0000"]
    # At once, and by another process from the run on disk.
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy)
    expected = pipe(**options(25))
    list(session.run(views, 9))
    assert torch.equal(session.latents(), expected.frames) and same_tokens(session.cache, expected.cache)
    spent = torch.Generator().manual_seed(1)
    torch.rand(100, generator=spent)  # its state comes from the run
    again = Fails(depth, what)
    again.calls = 10
    resumed = start(pipe, 25, depth=None, depth_estimator=again, run_dir=copy, resume=True, generator=spent)
    list(resumed.run(views, 9))
    assert torch.equal(resumed.latents(), expected.frames) and same_tokens(resumed.cache, expected.cache)


def test_the_memory_is_copied_when_it_is_written_and_no_sooner(
    pipe: MiragePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mark of a bounded memory is a copy of it, which must not lie about while a chunk is denoised."""
    events, checkpoint, denoise = [], LatentCache.checkpoint, ChunkDenoiser.__call__
    views, session = generation.cameras(17), start(pipe, 17)

    def marked(cache: LatentCache) -> Any:
        events.append(("mark", len(cache)))
        return checkpoint(cache)

    def denoised(*args: Any, **kwargs: Any) -> Any:
        events.append(("denoise", session._mark is None or session._mark.tokens))
        return denoise(*args, **kwargs)

    monkeypatch.setattr(LatentCache, "checkpoint", marked)
    monkeypatch.setattr(ChunkDenoiser, "__call__", denoised)
    session.step(views[:9])
    held = len(session.cache)
    session.step(views[9:])
    # The first step marks an empty memory, before the image's tokens.
    assert events == [("mark", 0), ("denoise", 0), ("denoise", True), ("mark", held)] and held > 0
    assert session._mark is None


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("name", ["save_video", "write_tensors", "write_manifest", "replace"])
def test_a_full_disk_leaves_session_and_run_as_they_were(
    pipe: MiragePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, name: str
) -> None:
    views = generation.cameras(17)
    session = start(pipe, 17, run_dir=tmp_path)
    if chunk:
        session.step(views[:9])
    new, before = views[9:17] if chunk else views[:9], state(session.cache)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    place = {"save_video": "mirage.pipeline.session.save_video", "replace": "mirage.pipeline.run_store.os.replace"}
    with monkeypatch.context() as patch:
        patch.setattr(place.get(name, f"mirage.pipeline.chunk_folder.{name}"), full)
        with pytest.raises(OSError, match="No space left"):
            session.step(new)
    assert session.num_chunks == chunk and same_state(session.cache, before)  # though it was written to in place
    assert not list((tmp_path / "chunks").glob(".*"))
    list(session.run(views, 9))
    expected = pipe(**options(17))
    assert torch.equal(session.latents(), expected.frames) and same_tokens(session.cache, expected.cache)


# Runs on disk.


@pytest.mark.slow
def test_run_holds_video_metrics_and_cache(pipe: MiragePipeline, tmp_path: Path) -> None:
    output = pipe(**options(21, run_dir=tmp_path, output_type="pt"))
    assert output.video == tmp_path / "video.mp4"
    frames = list(load_video(output.video))
    assert len(frames) == 21 and frames[0].shape == (3, *SIZE)
    error = (torch.stack(frames) - output.frames[0]).abs().mean()
    assert error < 0.15  # noise does not compress well; but in the right order:
    shuffled = (torch.stack(frames) - output.frames[0].flip(0)).abs().mean()
    assert error < 0.7 * shuffled
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["frames"] for line in lines] == [[0, 9], [9, 17], [17, 21]]
    assert set(lines[0]["seconds"]) == {"read", "denoise", "decode", "depth", "filter", "write", "save"}
    assert same_tokens(LatentCache.load(tmp_path / "cache.safetensors"), output.cache)
    # Only the newest two chunks hold what a next one would continue from.
    kept = {path.parent.name for path in (tmp_path / "chunks").glob("*/cache.safetensors")}
    assert (
        kept == {"0001", "0002"} == {path.parent.name for path in (tmp_path / "chunks").glob("*/decoder.safetensors")}
    )

    with pytest.raises(FileExistsError, match="holds a run already"):
        pipe(**options(21, run_dir=tmp_path))
    again = pipe(**options(21, run_dir=tmp_path, resume=True, output_type="pt"))
    assert torch.equal(again.frames, output.frames)


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
import generation
torch.set_num_threads(1)
pipe = generation.make_pipeline()
chunks = [0]
def die(pipe, step, timestep, tensors):
    if step == 0:
        chunks[0] += 1
    if chunks[0] == 3 and step == 1 and {kill}:
        os.kill(os.getpid(), signal.SIGKILL)
    return {{}}
pipe(**generation.options(29, run_dir={run!r}, resume=True, output_type=None, callback_on_step_end=die))
"""


def run_script(kill: bool, run: Path) -> subprocess.CompletedProcess[str]:
    content = KILLED.format(tests=str(Path(__file__).parents[2]), kill=kill, run=str(run))
    return subprocess.run([sys.executable, "-c", content], capture_output=True, text=True)


@pytest.mark.slow
def test_a_run_killed_in_chunk_3_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_script(False, whole)
    assert done.returncode == 0, done.stderr
    assert run_script(True, killed).returncode == -signal.SIGKILL
    assert sorted(path.name for path in (killed / "chunks").glob("[0-9]*")) == ["0000", "0001"]
    done = run_script(False, killed)
    assert done.returncode == 0, done.stderr
    assert (whole / "video.mp4").read_bytes() == (killed / "video.mp4").read_bytes()
    assert same_tokens(*(LatentCache.load(run / "cache.safetensors") for run in (whole, killed)))
    digests = [
        [json.loads(line)["frames_sha256"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, killed)
    ]
    assert digests[0] == digests[1] and len(set(digests[0])) == 4


@pytest.mark.slow
@pytest.mark.parametrize("stop", range(4))
def test_a_run_stopped_at_any_file_of_a_commit_resumes_to_the_same_bits(
    pipe: MiragePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """What a kill leaves: everything written before, nothing cleaned up."""
    views, folder, left = generation.cameras(17), tmp_path / "run", tmp_path / "left"
    session = start(pipe, 17, run_dir=folder)
    session.step(views[:9])
    writes = 0

    def watch(function: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal writes
            if writes == stop:
                shutil.copytree(folder, left)
            writes += 1
            return function(*args, **kwargs)

        return watched

    with monkeypatch.context() as patch:
        for module, name in (
            (mirage.pipeline.session, "save_video"),
            (chunk_folder, "write_tensors"),
            (run_store.os, "replace"),
        ):
            patch.setattr(module, name, watch(getattr(module, name)))
        session.step(views[9:17])
    assert writes > stop
    resumed = start(pipe, 17, run_dir=left, resume=True)
    list(resumed.run(views, 9))
    expected = pipe(**options(17))
    assert torch.equal(resumed.latents(), expected.frames) and same_tokens(resumed.cache, expected.cache)


@pytest.mark.slow
def test_a_run_is_resumed_only_as_what_it_was(pipe: MiragePipeline, tmp_path: Path) -> None:
    pipe(**options(9, run_dir=tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"num_inference_steps": 3}, "num_inference_steps was 2, got 3"),
        ({"prompt": "a garden"}, "prompt was 'a room', got 'a garden'"),
        ({"image": torch.zeros(3, *SIZE)}, "image was"),
        ({"height": 128, "width": 192}, "height was 64, got 128"),
        ({"decode": "end"}, "decode was 'chunk', got 'end'"),
        ({"depth": options(9)["depth"] * 2}, "depth was"),
        ({"generator": torch.Generator().manual_seed(2)}, "seed was 1, got 2"),
        ({"static_filter": "geometric"}, "static_filter was 'none', got 'geometric'"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            pipe(**options(9, run_dir=tmp_path, resume=True, **change))
    for spoil, message in (
        (lambda path: path.write_text("{}"), "run.json is damaged: it is not the record of a run"),
        (Path.unlink, "run.json is missing, though there are chunks of a run"),
    ):
        spoil(tmp_path / "run.json")
        with pytest.raises(ValueError, match=message):  # the first chunk knows that it was started with another prompt
            pipe(**options(9, run_dir=tmp_path, resume=True, prompt="a garden"))
        pipe(**options(9, run_dir=tmp_path, resume=True))
        assert (tmp_path / "run.json").read_bytes() == before[tmp_path / "run.json"]
    other = generation.make_pipeline(seed=1)
    with pytest.raises(ValueError, match="transformer was 'MirageTransformer3DModel"):
        other(**options(9, run_dir=tmp_path, resume=True))
    pipe.save_pretrained(tmp_path / "saved")
    loaded = MiragePipeline.from_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved")
    assert torch.equal(loaded(**options(9, run_dir=tmp_path, resume=True)).frames, pipe(**options(9)).frames)
    before |= {path: path.read_bytes() for path in before if path.parent == tmp_path and path.suffix != ".json"}
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["none", "nearest", "aligned", "pixel"])
def test_a_run_from_before_memory_configs_is_resumed(pipe: MiragePipeline, tmp_path: Path, name: str) -> None:
    """What was `splat`, `points` and a filter that keeps nothing is read as the config that it was."""
    made = pipe(**options(5, memory=name, run_dir=tmp_path))
    path = tmp_path / "run.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    (tmp_path / "chunks" / "0000" / "manifest.json").unlink()
    settings = content["settings"]
    memory = settings.pop("memory")
    del settings["attention_kwargs"], settings["latents"]
    settings |= {"splat": memory["readout"], "points": "pixels" if name == "pixel" else "latents"}
    if name == "none":
        settings["static_filter"] = "KeepNothing"
    path.write_text(json.dumps(content))
    assert torch.equal(pipe(**options(5, memory=name, run_dir=tmp_path, resume=True)).frames, made.frames)
    other = {"none": "aligned", "nearest": "aligned", "aligned": "nearest", "pixel": "none"}[name]
    with pytest.raises(ValueError, match="a run can be resumed only with what it was started with: memory was"):
        pipe(**options(5, memory=other, run_dir=tmp_path, resume=True))
    if name == "aligned":  # such a run did not record how its memory is written, but its cache does
        append = MemoryConfig(write_policy="append")
        with pytest.raises(ValueError, match='memory must have write_policy "bounded" like the run, got "append"'):
            pipe(**options(5, memory=append, run_dir=tmp_path, resume=True))


def test_weights_are_fingerprinted_for_runs_on_disk_alone(
    pipe: MiragePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    fingerprint = mirage.pipeline.run_record.fingerprint
    monkeypatch.setattr(
        mirage.pipeline.run_record, "fingerprint", lambda part: (seen.append(part), fingerprint(part))[1]
    )
    start(pipe, 5).close()
    assert not seen
    start(pipe, 5, run_dir=tmp_path).close()
    assert len(seen) == len(pipe.components)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["rename", "bookkeeping"])
@pytest.mark.parametrize("chunk", [0, 1])
def test_an_interrupt_after_the_rename_leaves_the_chunk_counted(
    pipe: MiragePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, where: str
) -> None:
    views = generation.cameras(17)
    session = start(pipe, 17, run_dir=tmp_path)
    if chunk:
        session.step(views[:9])
    replace, flush = run_store.os.replace, run_store.flush_folder

    def interrupted(*args: Any, **kwargs: Any) -> None:
        (replace if where == "rename" else flush)(*args, **kwargs)
        if where == "rename" or Path(args[0]).name == "chunks":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        target = (run_store.os, "replace") if where == "rename" else (run_store, "flush_folder")
        patch.setattr(*target, interrupted)
        # The commit of the first file that is replaced, the memory's, goes through.
        patch.setattr("mirage_kernels.io.os.replace", replace)
        if where == "rename":
            patch.setattr(run_store.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.step(views[9:17] if chunk else views[:9])
    expected = pipe(**options(17))
    list(session.run(views, 9))
    assert torch.equal(session.latents(), expected.frames) and same_tokens(session.cache, expected.cache)
    session.close()
    resumed = start(pipe, 17, run_dir=tmp_path, resume=True)
    assert torch.equal(resumed.latents(), expected.frames) and same_tokens(resumed.cache, expected.cache)


def test_a_folder_is_held_by_one_session(pipe: MiragePipeline, tmp_path: Path) -> None:
    views = generation.cameras(9)
    with start(pipe, 9, run_dir=tmp_path) as session:
        with pytest.raises(BlockingIOError, match="is in use"):
            start(pipe, 9, run_dir=tmp_path, resume=True)
        session.step(views)
    assert start(pipe, 9, run_dir=tmp_path, resume=True).num_chunks == 1


def test_a_session_that_made_no_chunk_blocks_nobody(pipe: MiragePipeline, tmp_path: Path) -> None:
    session = start(pipe, 9, run_dir=tmp_path, static_filter=Wrong())
    with pytest.raises(ValueError, match=r"mask from Wrong must be \(1, 64, 96\) bool like depth"):
        session.step(generation.cameras(9))
    assert len(session.cache) == 0  # the image is not in it either
    session.close()
    assert pipe(**options(9, run_dir=tmp_path, prompt="another room")).video is not None


class Wrong:
    needs_frames = False

    def __call__(self, views: Any) -> Tensor:
        return torch.ones(1, 2, 3, dtype=torch.bool)


@pytest.mark.slow
def test_what_a_kill_leaves_is_cleaned_up(pipe: MiragePipeline, tmp_path: Path) -> None:
    pipe(**options(25, run_dir=tmp_path))
    left = [tmp_path / ".video.mp4.x.tmp", tmp_path / "chunks" / "0001" / ".cache.safetensors.x.tmp"]
    left += [tmp_path / "chunks" / "0000" / name for name in ("cache.safetensors", "decoder.safetensors")]
    for path in left:
        path.write_bytes(b"left")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("kept")
    (tmp_path / "chunks" / ".0003").mkdir()
    (tmp_path / "chunks" / ".0004").symlink_to(elsewhere)
    pipe(**options(25, run_dir=tmp_path, resume=True))
    assert not any(path.exists() for path in left) and not list((tmp_path / "chunks").glob(".*"))
    assert (elsewhere / "precious").read_text() == "kept"


def test_a_lost_segment_is_made_again(pipe: MiragePipeline, tmp_path: Path) -> None:
    video = pipe(**options(17, run_dir=tmp_path)).video.read_bytes()
    (tmp_path / "chunks" / "0001" / "segment.mp4").unlink()
    assert pipe(**options(17, run_dir=tmp_path, resume=True)).video.read_bytes() == video


def test_interrupt_between_chunks_stops_the_run(pipe: MiragePipeline) -> None:
    seen: list[int] = []

    def stop(pipeline: Any, chunk: Any) -> None:
        seen.append(chunk.index)
        pipeline.interrupt = True

    assert pipe(**options(25, callback_on_chunk_end=stop)).frames.shape[2] == 3
    assert seen == [0]


def test_depth_that_is_missing_is_told_before_the_step(pipe: MiragePipeline) -> None:
    bare = generation.make_pipeline(with_depth=False)
    session = start(bare, 9, depth=options(9)["depth"][0])
    bare.transformer.forward = lambda *args, **kwargs: pytest.fail("denoised")
    with pytest.raises(ValueError, match="depth is given of 1 frames, frame 8 is needed, and there is nobody to ask"):
        session.step(generation.cameras(9))


@pytest.mark.slow
def test_nothing_is_decoded_before_the_end(
    pipe: MiragePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the depth head, generation runs on latents alone, and ends in the same kind of run."""
    decodes = 0
    original = mirage.pipeline.steps.decode_frames

    def count(*args: Any) -> Tensor:
        nonlocal decodes
        decodes += 1
        return original(*args)

    monkeypatch.setattr(mirage.pipeline.steps, "decode_frames", count)
    monkeypatch.setattr(mirage.pipeline.session, "decode_frames", count)
    seen: list[int] = []
    output = pipe(
        **options(
            17,
            depth=options(17)["depth"][0],
            decode="end",
            run_dir=tmp_path,
            output_type=None,
            static_filter="geometric",
            callback_on_chunk_end=lambda _, chunk: seen.append(decodes),
        )
    )
    assert seen == [0, 0] and decodes == 2
    assert len(list(load_video(output.video))) == 17
    assert len(output.cache) > 24
    assert not (tmp_path / "chunks" / "0001" / "decoder.safetensors").exists()

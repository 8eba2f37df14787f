"""The memories that are compared: pixels rasterised and encoded, one that stays empty, and training on each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import generation
import pytest
import torch
from training_runs import config, draw, models_of

from mirage.models.adapter import MirageMemoryAdapter
from mirage.models.checkpoints import load_published
from mirage.models.components import fingerprint
from mirage.models.latent_depth import pluecker_rays
from mirage.models.vae import encode_frames
from mirage.pipeline.conditioning import show_rays
from mirage.pipeline.memory import MEMORIES
from mirage.pipeline.pixel_memory import between, make_pixel_cache, read_pixels, refine_depth, write_pixels
from mirage.scenes.synthetic import SyntheticRoom
from mirage.training.batches import DiffusionBatchMaker
from mirage.training.loop import train
from mirage.training.readouts import ReadoutMaker
from mirage.zoo import load_pipeline, tiny_random_pipeline
from mirage_kernels import Cameras, LatentCache
from mirage_kernels.geometry import pool_depth

SIZE = (64, 96)


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


def test_pixels_come_back_where_they_were_written() -> None:
    room = SyntheticRoom(3, moving=0)
    cameras = room.path("walk", 9, SIZE)
    made = room.render(cameras)
    vae = tiny_random_pipeline().vae
    cache = make_pixel_cache()
    empty = read_pixels(cache, vae, cameras)
    assert not empty.mask.any() and not empty.depth.any() and empty.latents.shape == (3, 48, 4, 6)

    report = write_pixels(cache, made.images, made.depth, cameras)
    assert report.written == len(cache) == int((made.depth > 0).sum())
    pictures = cache.read(cameras, SIZE)
    seen = pictures.mask[:, None].expand(-1, 3, -1, -1)
    assert seen.float().mean() > 0.9 and (pictures.latents[:, :3] - made.images)[seen].abs().mean() < 0.02
    view = read_pixels(cache, vae, cameras)
    assert view.mask.float().mean() > 0.9 and (view.index == -1).all()
    true = pool_depth(made.depth[::4], (4, 6))
    assert ((view.depth - true).abs() / true)[view.mask & (true > 0)].median() < 0.02
    pictures_of = torch.where(seen, pictures.latents[:, :3], 0.0)
    encoded = encode_frames(vae, pictures_of.movedim(0, 1)[None] * 2 - 1)[0].movedim(1, 0)
    assert torch.equal(view.latents, encoded)
    with pytest.raises(ValueError, match="cameras must be 4 n \\+ 1 views, got 8"):
        read_pixels(cache, vae, cameras[:8])


def test_static_pixels_alone_are_written() -> None:
    camera = Cameras([[48.0, 0.0, 48.0], [0.0, 48.0, 32.0], [0.0, 0.0, 1.0]], torch.eye(4)[None], SIZE)
    frames, static = torch.rand(1, 3, *SIZE), torch.zeros(1, 4, 6, dtype=torch.bool)
    static[0, 1, 2] = True
    cache = make_pixel_cache()
    write_pixels(cache, frames, torch.full((1, 4, 6), 2.0), camera, static)
    assert len(cache) == 16 * 16 and torch.equal(cache.features[0, :3], frames[0, :, 16, 32])


def test_token_depth_of_a_plane_is_exact_at_pixels_and_edges_stay_edges() -> None:
    """A plane's inverse depth is linear in the picture."""
    v, u = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    plane = 1.0 / (0.3 + 0.0006 * u + 0.0003 * v)
    tokens = 1.0 / (1.0 / plane).view(4, 16, 6, 16).mean((1, 3))
    fine = refine_depth(tokens[None], SIZE)[0]
    inside = (slice(8, -8), slice(8, -8))
    assert torch.allclose(fine[inside], plane[inside], rtol=1e-5)
    step = torch.full((4, 6), 1.0)
    step[:, 3:] = 3.0
    step[0, 0] = 0.0
    fine = refine_depth(step[None], SIZE)[0]
    assert set(fine.unique().tolist()) == {0.0, 1.0, 3.0} and (fine[:, 48:] == 3.0).all() and not fine[:16, :16].any()


def test_views_between_keyframes() -> None:
    cameras = SyntheticRoom(4, moving=0).path("walk", 17, SIZE)
    found = between(cameras[::4])
    assert len(found) == 17 and torch.equal(found.cam2world[::4], cameras[::4].cam2world)
    assert (found.centers - cameras.centers).norm(dim=1).max() < 0.02
    turn = found.cam2world[:, :3, :3].transpose(1, 2) @ cameras.cam2world[:, :3, :3]
    assert turn.diagonal(dim1=1, dim2=2).sum(1).min() > 3.0 - 2e-3
    assert len(between(cameras[:1])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMORIES)
def test_a_session_runs_on_each_memory(name: str, tmp_path: Path) -> None:
    def run(folder: Path, frames: int, **more: Any) -> Any:
        pipe = generation.make_pipeline(control_channels=49)
        asked = generation.options(17) | {"num_frames": frames, "run_dir": folder} | more
        return pipe(**asked | {"memory": name})

    output = run(tmp_path / "whole", 17)
    tokens, channels = len(output.cache), output.cache.channels
    assert channels == (4 if name == "pixel" else 48)
    counts = {"none": [0], "nearest": [120], "aligned": range(1, 121), "pixel": [5 * 64 * 96]}
    assert tokens in counts[name]
    metrics = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert ('"coverage": 0.0' in metrics) == (name == "none")
    # The same bits where it stopped half-way and went on.
    run(tmp_path / "halves", 9)
    again = run(tmp_path / "halves", 17, resume=True)
    assert torch.equal(again.frames, output.frames) and torch.equal(again.cache.features, output.cache.features)


@pytest.mark.slow
def test_no_memory_is_steered_by_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of target and preceding frames, seen from the chunk's first; in training and in generation alike."""
    pipe = generation.make_pipeline(control_channels=49)
    pipe.memory_adapter.register_to_config(control="rays")
    shown: list[tuple[torch.Tensor, torch.Tensor]] = []
    make_context = pipe.make_memory_context
    monkeypatch.setattr(pipe, "make_memory_context", lambda *given: (shown.append(given), make_context(*given))[1])
    asked = generation.options(17) | {"chunk_frames": 9}
    pipe(**asked | {"memory": "none"})
    views = asked["cameras"][::4]
    size = generation.LATENT
    frames = [[0, 1, 2], [2, 3, 4, 0, 1]]  # behind the second chunk's targets, the frames before it
    assert len(shown) == 2
    for order, (readout, visible) in zip(frames, shown, strict=True):
        rays = pluecker_rays(Cameras.cat([views[i] for i in order]), size)
        assert torch.allclose(readout[:, :6], rays.movedim(1, 0), atol=1e-5) and not readout[:, 6:].any()
        assert readout[:, 3:6].any() and not visible.any()

    objective = {"memory": "none", "chunk_frames": 9, "first_chunks": 0.0, "drop_preceding": 0.0}
    models = {"memory_adapter": {"control_channels": 49}}
    config_ = config("adapter", models=models, objective=objective, data={"frames": 21})
    drawn = draw(config_, 0)
    chunk = DiffusionBatchMaker(config_, models_of(config_), torch.device("cpu"))(drawn)
    context, preceding = chunk.memory_context, chunk.clean.preceding.shape[2]
    assert context is not None and preceding > 0 and context.shape[2] == 3 + preceding
    found = []
    for start in range(preceding, 4):
        order = [*range(start, start + 3), *range(start - preceding, start)]
        rays, _ = show_rays(Cameras.cat([drawn[0].clip.cameras[i] for i in order]), tuple(context.shape[-2:]), 48)
        found.append(torch.equal(context[0, :48].movedim(1, 0), rays))
    assert sum(found) == 1 and not context[:, 48:].any()
    with pytest.raises(ValueError, match="channels must be at least 6 to hold a ray, got 5"):
        show_rays(views, (4, 6), 5)
    with pytest.raises(ValueError, match="objective.memory must be none for an adapter of control rays"):
        models_of(config("adapter", models={"memory_adapter": {"control_channels": 49, "control": "rays"}}))
    with pytest.raises(ValueError, match='control must be "memory" or "rays", got \'wheel\''):
        MirageMemoryAdapter.from_transformer(pipe.transformer, 49, control="wheel")


def test_weights_for_no_memory_come_with_the_model(tmp_path: Path) -> None:
    pipe = generation.make_pipeline(control_channels=49)
    pipe.save_pretrained(tmp_path)
    MirageMemoryAdapter.from_transformer(pipe.transformer, 49, control="rays").save_pretrained(
        tmp_path / "memories" / "none" / "memory_adapter"
    )
    loaded = {name: load_pipeline(str(tmp_path), memory=name) for name in ("none", "aligned")}
    adapters = {name: one.memory_adapter for name, one in loaded.items()}
    assert {name: one.config.control for name, one in adapters.items()} == {"none": "rays", "aligned": "memory"}
    with pytest.raises(ValueError, match="memory must be none with an adapter of control rays, .* got 'aligned'"):
        loaded["none"](**generation.options(9), memory="aligned")
    before = fingerprint(adapters["aligned"])
    adapters["aligned"].register_to_config(control="rays")
    assert fingerprint(adapters["aligned"]) != before == fingerprint(pipe.memory_adapter)
    with pytest.raises(ValueError, match="adapter must be of control \"memory\" with vace, got 'rays'"):
        load_published(adapter=adapters["aligned"], vace={"vace.before_proj.weight": torch.zeros(1)})


def test_what_pixels_refuse() -> None:
    pipe = generation.make_pipeline()
    views = generation.options(9)
    for changes, message in (
        ({"memory": "pixel", "decode": "end"}, 'decode must be "chunk" with a memory of pixels'),
        ({"memory": "pixel", "cache": LatentCache(48, write_policy="append")}, "must have 4 channels like a cloud"),
        ({"cache": make_pixel_cache()}, "must have 48 channels like the VAE, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**views | changes)


@pytest.mark.slow
def test_training_reads_the_memory_it_is_asked_for() -> None:
    contexts = {}
    drawn = [draw(config("adapter"), number) for number in (0, 1)]
    for name in MEMORIES:
        asked = config(
            "adapter",
            models={"memory_adapter": {"control_channels": 49}},
            objective={"memory": name, "drop_memory": 0.0, "drop_references": 0.0},
        )
        maker = DiffusionBatchMaker(asked, models_of(asked), torch.device("cpu"))
        chunks = [maker(clips) for clips in drawn]
        contexts[name] = torch.cat([chunk.memory_context for chunk in chunks], 2)  # type: ignore[misc]
        if name == "none":
            assert not contexts[name][:, 6:].any() and not any(chunk.clean.references.shape[2] for chunk in chunks)
    seen = {name: context[:, -1] > 0 for name, context in contexts.items()}
    assert all(seen[name].float().mean() > 0.3 for name in ("nearest", "aligned", "pixel"))
    assert (seen["pixel"] == seen["aligned"]).float().mean() > 0.8
    assert not torch.equal(contexts["nearest"], contexts["aligned"])


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["aligned", "pixel"])
def test_pixels_are_encoded_in_the_precision_of_the_run(memory: str) -> None:
    contexts = []
    for precision in ("no", "bf16"):
        asked = config(
            "adapter",
            mixed_precision=precision,
            models={"memory_adapter": {"control_channels": 49}},
            objective={"memory": memory, "drop_memory": 0.0},
        )
        context = DiffusionBatchMaker(asked, models_of(asked), torch.device("cpu"))(draw(asked, 0)).memory_context
        assert context is not None and context.dtype == torch.float32 and context.abs().sum() > 0
        contexts.append(context)
    assert torch.equal(*contexts) == (memory == "aligned")
    assert (contexts[0] - contexts[1]).norm() < 0.05 * contexts[0].norm()


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["aligned", "pixel"])
def test_read_outs_that_are_kept(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of each clip are made, once; a step's is a function of its number all the same, in any process."""
    objective = {"memory": memory, "readouts": 2, "drop_memory": 0.0, "preceding_frames": 1}
    models = {"memory_adapter": {"control_channels": 49}}
    asked = config("adapter", models=models, objective=objective, data={"frames": 17})
    made: list[Any] = []
    make = ReadoutMaker.make
    monkeypatch.setattr(ReadoutMaker, "make", lambda *given: (made.append(1), make(*given))[1])
    maker = DiffusionBatchMaker(asked, models_of(asked), torch.device("cpu"))
    drawn = [draw(asked, number)[0] for number in range(40)]
    chunks = [maker([one]) for one in drawn]
    assert len({one.clip.name for one in drawn}) == 4 and 8 < len(made) <= 12  # at the first frame, and two others
    contexts: dict[str, set[int]] = {}
    for one, chunk in zip(drawn, chunks, strict=True):
        assert chunk.memory_context is not None
        target = chunk.memory_context[:, :, :3]  # behind it come preceding frames, or none
        contexts.setdefault(one.clip.name, set()).add(hash(target.numpy().tobytes()))
    assert {len(found) for found in contexts.values()} <= {2, 3}
    assert len({chunk.clean.references.shape[2] for chunk in chunks}) > 2
    assert {chunk.clean.preceding.shape[2] for chunk in chunks} == {0, 1}
    fresh = DiffusionBatchMaker(asked, models_of(asked), torch.device("cpu"))
    for number in (31, 2):
        again = fresh([drawn[number]])
        for name in ("noisy", "memory_context", "levels"):
            assert torch.equal(getattr(again, name), getattr(chunks[number], name))
        assert torch.equal(again.clean.references, chunks[number].clean.references)
    dropped = config("adapter", models=models, objective=objective | {"drop_memory": 1.0}, data={"frames": 17})
    context = DiffusionBatchMaker(dropped, models_of(dropped), torch.device("cpu"))([drawn[0]]).memory_context
    assert context is not None and not context.any()


@pytest.mark.slow
def test_a_run_from_before_there_were_other_memories_goes_on(tmp_path: Path) -> None:
    train(config("adapter", tmp_path, steps=1), progress=False)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["objective"].pop("memory") == "aligned"
    del record["objective"]["first_chunks"], record["objective"]["readouts"], record["optimizer"]
    del record["vae"]["shifted"], record["vae"]["steady"]
    for name in ("pace", "texture"):
        del record["data"]["sources"][0][name]
    record["objective"]["splat"] = "aligned"
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert train(config("adapter", tmp_path, steps=2), progress=False)["steps"] == 2
    with pytest.raises(ValueError, match="only with what it was started with: objective was"):
        train(config("adapter", tmp_path, objective={"memory": "nearest"}), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), [("pixel", "adapter"), ("none", "lora")])
def test_three_steps_on_another_memory(name: str, stage: str, tmp_path: Path) -> None:
    report = train(config(stage, tmp_path, objective={"memory": name}, data={"cache": True}), progress=False)
    assert report["steps"] == 3 and "memory_adapter" in report["saved"]

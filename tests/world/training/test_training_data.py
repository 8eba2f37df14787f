"""Clips from rooms, folders and shards: what they hold, their order, and what is broken."""

from __future__ import annotations

import io
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from mirage.scenes.camera_files import save_realestate10k
from mirage.scenes.rgbd import load_rgbd_folder
from mirage.scenes.synthetic import SyntheticFrames, SyntheticRoom
from mirage.training.config import DataConfig, SourceConfig
from mirage.training.data import BatchSampler, Clip, ClipDataset, load_clip, make_clip, read_origin, save_clip
from mirage.training.data.shards import PackedSource
from mirage.training.seeds import derive_seed
from mirage_kernels import Cameras, LatentCache
from mirage_kernels.geometry import pool_depth

SIZE, FRAMES = [64, 96], 9


def render_room(seed: int = 3, frames: int = FRAMES, size: tuple[int, int] = (64, 96)) -> SyntheticFrames:
    room = SyntheticRoom(seed, moving=1)
    return room.render(room.path("walk", frames, size))


def data(*sources: SourceConfig, frames: int = FRAMES, size: list[int] = SIZE) -> DataConfig:
    return DataConfig(list(sources), frames=frames, size=size)


def packed(name: str = "clip", channels: int = 48, seed: int = 0) -> Clip:
    made = render_room(seed)
    clip = make_clip(name, "a room", made.images, made.depth, made.static, made.cameras, SIZE)
    latents = torch.randn(3, channels, 4, 6, generator=torch.Generator().manual_seed(seed)).half().float()
    static_latent, embeds = (latents[1] + 1.0).half().float(), torch.randn(7, 16)
    return Clip(name, "a room", clip.depth, clip.static, clip.cameras, None, latents, static_latent, embeds, "some vae")


def save_png(path: Path, values: Tensor, mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"RGB": np.uint8, "L": np.uint8, "I;16": np.uint16}
    array = values.numpy().astype(kinds[mode])
    PIL.Image.fromarray(array).save(path)


def colours(image: Tensor) -> Tensor:
    return (image * 255).round().permute(1, 2, 0)


def write_rgbd(folder: Path, made: SyntheticFrames) -> None:
    folder.mkdir(parents=True)
    for i in range(len(made.cameras)):
        save_png(folder / f"frame-{i:06d}.color.png", colours(made.images[i]), "RGB")
        save_png(folder / f"frame-{i:06d}.depth.png", (made.depth[i] * 1000).round(), "I;16")
        save_png(folder / "static" / f"frame-{i:06d}.png", made.static[i] * 255, "L")
        np.savetxt(folder / f"frame-{i:06d}.pose.txt", made.cameras.cam2world[i].numpy())
    np.savetxt(folder / "intrinsics.txt", made.cameras.intrinsics[0].numpy())
    (folder / "prompt.txt").write_text("a made-up room\n")


def write_realestate(root: Path, name: str, made: SyntheticFrames, depth: str = ".npy") -> None:
    (root / "cameras").mkdir(parents=True, exist_ok=True)
    times = [1000 + 33 * i for i in range(len(made.cameras))]
    save_realestate10k(root / "cameras" / f"{name}.txt", made.cameras, times, "https://example.org/video")
    for i, time in enumerate(times):
        save_png(root / "frames" / name / f"{time}.png", colours(made.images[i]), "RGB")
        save_png(root / "static" / name / f"{time}.png", made.static[i] * 255, "L")
        if depth == ".png":
            save_png(root / "depth" / name / f"{time}.png", (made.depth[i] * 1000).round(), "I;16")
        else:
            (root / "depth" / name).mkdir(parents=True, exist_ok=True)
            np.save(root / "depth" / name / f"{time}.npy", made.depth[i].numpy())


def assert_shows(clip: Clip, made: SyntheticFrames, colour: float = 0.003, depth: float = 0.002) -> None:
    """The clip is of these frames, at their size."""
    assert clip.frames is not None and clip.frames.dtype == torch.float32
    assert (clip.frames - made.images).abs().max() < colour
    assert torch.allclose(clip.cameras.cam2world, made.cameras.cam2world[::4], atol=1e-6)
    assert torch.allclose(clip.cameras.intrinsics, made.cameras.intrinsics[::4], atol=1e-4)
    tokens = pool_depth(made.depth[::4], (4, 6))
    assert torch.allclose(clip.depth, tokens, atol=depth)
    static = made.static.unfold(1, 16, 16).unfold(2, 16, 16).all(-1).all(-1)
    assert torch.equal(clip.static, torch.stack([static[0], static[1:5].all(0), static[5:9].all(0)]))


@pytest.mark.slow
def test_rooms_are_clips_of_their_seed() -> None:
    clips = ClipDataset(data(SourceConfig("synthetic", rooms=3, first_seed=5, paths=["walk"])))
    names = {clips[i].clip.name: clips[i].clip for i in range(3)}
    assert sorted(names) == ["room 5", "room 6", "room 7"]
    room = SyntheticRoom(6)
    assert_shows(names["room 6"], room.render(room.path("walk", FRAMES, (64, 96))))
    assert names["room 6"].prompt == room.prompt


def test_a_clip_writes_the_memory_as_its_frames_would() -> None:
    """Depth and masks of tokens are what the write makes of pixels anyway."""
    made = render_room()
    clip = make_clip("clip", "", made.images, made.depth, made.static, made.cameras, SIZE)
    latents = torch.randn(3, 8, 4, 6)
    tokens, pixels = (LatentCache(8, write_policy="append") for _ in range(2))
    tokens.write(latents, clip.depth, clip.cameras, clip.static)
    grouped = torch.stack([made.static[0], made.static[1:5].all(0), made.static[5:9].all(0)])
    pixels.write(latents, made.depth[::4], made.cameras[::4], grouped)
    assert len(tokens) == len(pixels) > 0
    assert torch.allclose(tokens.points, pixels.points, atol=1e-6) and torch.equal(tokens.features, pixels.features)


def test_resizing_and_cropping_move_the_cameras_along() -> None:
    made = render_room(size=(96, 224))
    clip = make_clip("clip", "", made.images, made.depth, made.static, made.cameras, SIZE)
    assert clip.frames is not None and clip.frames.shape == (FRAMES, 3, 64, 96)
    room = SyntheticRoom(3, moving=1)
    again = room.render(clip.cameras, [0.0, 4 / 24, 8 / 24])
    assert (again.images - clip.frames[::4]).abs().mean() < 0.02
    assert ((again.depth / made.depth[::4].mean()).isfinite()).all()
    both = (pool_depth(again.depth, (4, 6)) > 0) & (clip.depth > 0)
    error = (pool_depth(again.depth, (4, 6)) / clip.depth - 1).abs()[both]
    assert both.float().mean() > 0.8 and error.median() < 0.01


def test_rgbd_folders(tmp_path: Path) -> None:
    made = render_room(frames=20)
    write_rgbd(tmp_path / "scenes" / "one", made)
    clips = ClipDataset(data(SourceConfig("rgbd", str(tmp_path / "scenes"))))
    assert len(clips) == 2
    first = next(clips[i].clip for i in range(2) if clips[i].clip.name.endswith("000000"))
    assert first.prompt == "a made-up room"
    part = slice(0, FRAMES)
    assert_shows(
        first,
        SyntheticFrames(made.images[part], made.depth[part], made.static[part], made.sky[part], made.cameras[part]),
    )
    assert len(ClipDataset(data(SourceConfig("rgbd", str(tmp_path / "scenes" / "one"), stride=4)))) == 3


def test_the_real_room(shared_dir: Path) -> None:
    path = shared_dir / "rgbd-room" if (shared_dir / "rgbd-room").exists() else shared_dir / "data" / "rgbd-room"
    clips = ClipDataset(data(SourceConfig("rgbd", str(path)), frames=17, size=[96, 128]))
    assert len(clips) == 7
    clip = clips[0].clip
    assert clip.frames is not None and clip.frames.shape == (17, 3, 96, 128) and clip.static.all()
    assert clip.depth.shape == (5, 6, 8) and (clip.depth > 0).float().mean() > 0.7
    number = int(clip.name[-6:]) // 5
    plain = load_rgbd_folder(path, slice(number, number + 1))
    assert torch.allclose(clip.cameras.cam2world[0], plain.cameras.cam2world[0])
    assert torch.allclose(clip.cameras.intrinsics[0], plain.cameras.intrinsics[0] * torch.tensor([[0.2], [0.2], [1.0]]))


@pytest.mark.parametrize("depth", [".npy", ".png"])
def test_realestate10k_with_depth(tmp_path: Path, depth: str) -> None:
    made = render_room()
    write_realestate(tmp_path, "abc", made, depth)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "abc.txt").write_text("a kitchen")
    clips = ClipDataset(data(SourceConfig("realestate10k", str(tmp_path))))
    assert len(clips) == 1 and clips[0].clip.prompt == "a kitchen"
    assert_shows(clips[0].clip, made)


def test_packed_clips_round_trip(tmp_path: Path) -> None:
    clip = packed()
    save_clip(tmp_path / "clip.safetensors", clip)
    (got,) = (ClipDataset(data(SourceConfig("packed", str(tmp_path))))[0].clip,)
    for name in ("latents", "static_latent", "depth", "static", "prompt_embeds"):
        assert torch.equal(getattr(got, name), getattr(clip, name)), name
    assert torch.equal(got.cameras.cam2world, clip.cameras.cam2world) and got.cameras.image_size == (64, 96)
    assert (got.prompt, got.vae, got.frames) == ("a room", "some vae", None)


@pytest.mark.slow
def test_shards_that_webdataset_writes(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard:06d}.tar")) as writer:
            for i in range(3):
                save_clip(tmp_path / "one", packed(seed=3 * shard + i))
                sample = {"__key__": f"clip{3 * shard + i}", "safetensors": (tmp_path / "one").read_bytes()}
                writer.write(sample | ({"txt": f"prompt {i}"} if i else {}))
    clips = ClipDataset(data(SourceConfig("packed", str(tmp_path))))
    assert len(clips) == 6
    for i, name in ((0, "clip0"), (4, "clip4")):
        source, index = clips.where[i]
        got = clips.sources[source].load(index)
        assert got.latents is not None and torch.equal(got.latents, packed(seed=i).latents)
        assert got.name.endswith(name) and got.prompt == ("prompt 1" if i else "a room")
    assert len(ClipDataset(data(SourceConfig("packed", str(tmp_path / "000001.tar"))))) == 3


def test_order_is_a_function_of_the_seed() -> None:
    def order(seed: int) -> list[str]:
        clips = ClipDataset(data(SourceConfig("synthetic", rooms=40)), seed)
        return [clips.sources[0].name(clips.where[clips._position(i, 0)][1]) for i in range(80)]

    first = order(0)
    assert first == order(0) != order(1)
    assert sorted(first[:40]) == sorted(first[40:]) and first[:40] != first[40:]
    assert derive_seed(1, "a") == derive_seed(1, "a") != derive_seed(1, "b") and 0 <= derive_seed("x") < 2**63


def test_clips_are_kept_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, keeping = (
        ClipDataset(DataConfig([SourceConfig("synthetic", rooms=2)], frames=FRAMES, size=SIZE, cache=cache))
        for cache in (False, True)
    )
    first = keeping[0].clip
    monkeypatch.setattr(SyntheticRoom, "render", None)
    again = keeping[0].clip
    monkeypatch.undo()
    exact = plain[0].clip
    assert again.frames is not None and first.frames is not None and exact.frames is not None
    assert torch.equal(again.frames, first.frames) and torch.equal(again.depth, exact.depth)
    assert (again.frames - exact.frames).abs().max() <= 0.5 / 255 + 1e-6


def test_processes_share_the_numbers() -> None:
    batches_of = [list(BatchSampler(2, 5, 2, rank, 3)) for rank in range(3)]
    assert sorted(n for batches in batches_of for batch in batches for n in batch) == list(range(12, 30))
    assert all(len(batches) == 3 for batches in batches_of)
    assert list(BatchSampler(0, 5, 2, 1, 3))[2:] == batches_of[1]


def test_broken_clips_are_named_and_the_next_one_is_taken(tmp_path: Path) -> None:
    made = render_room(frames=18)
    write_realestate(tmp_path, "abc", made)
    source = SourceConfig("realestate10k", str(tmp_path))
    whole = ClipDataset(data(source))
    second = next(i for i in range(2) if whole[i].clip.name.endswith("frame 9"))

    def broken_by(change: Any) -> str:
        change()
        sample = ClipDataset(data(source))[second]
        assert sample.clip.name.endswith("frame 0") and sample.number == second
        (name,) = sample.broken
        assert name.endswith("abc.txt, frame 9")
        return sample.broken[name]

    frame, depth = tmp_path / "frames" / "abc" / "1330.png", tmp_path / "depth" / "abc" / "1330.npy"
    content = frame.read_bytes()
    assert "1330.png: expected an image" in broken_by(lambda: frame.write_bytes(content[:200]))
    assert "1330: expected a file ending in .jpg or .jpeg or .png or .webp, found none" in broken_by(frame.unlink)
    frame.write_bytes(content)
    assert "1330.npy: expected (H, W) metres" in broken_by(lambda: np.save(depth, np.zeros((2, 3, 4))))
    assert "1330.npy: expected depth in floats" in broken_by(lambda: np.save(depth, np.zeros((3, 4), np.uint8)))

    later = [path for path in depth.parent.iterdir() if int(path.stem) > 1290]  # of frame 9 and on
    flat = np.ones((32, 96), np.float32)
    message = broken_by(lambda: [np.save(path, flat) for path in later])
    assert "depth/abc: must have the aspect of the frames, 64x96, got 32x96" in message
    np.save(depth, np.zeros((5, 5), np.float32))
    assert "depth/abc: must be of one size, got several" in broken_by(lambda: None)
    depth.unlink()
    (tmp_path / "frames" / "abc" / "1000.png").unlink()
    with pytest.raises(ValueError, match=r"all 2 clips are broken: .*1330.*; .*1000"):
        ClipDataset(data(source))[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-100], "not a whole safetensors file .*; was it cut short?"),
        (lambda content: b"nothing", "not a whole safetensors file"),
        (lambda content: content.replace(b"mirage-clip", b"mirage-clap"), "must be mirage-clip version 2"),
    ],
)
def test_packed_clips_that_are_none(tmp_path: Path, change: Any, message: str) -> None:
    save_clip(tmp_path / "clip", packed())
    with pytest.raises(ValueError, match=f"that one: {message}"):
        load_clip("that one", change((tmp_path / "clip").read_bytes()))


def test_packed_values_are_checked(tmp_path: Path) -> None:
    clip = packed()
    assert clip.latents is not None
    for change, message in (
        ({"latents": clip.latents * float("nan")}, "latents and still must be finite"),
        ({"static_latent": clip.latents[0] * float("inf")}, "latents and still must be finite"),
        ({"static_latent": clip.latents}, r"still must be a latent frame \(48, 4, 6\), got \(3, 48, 4, 6\)"),
        ({"depth": clip.depth[:2]}, r"must be of the same tokens, got \(3, 48, 4, 6\), \(2, 4, 6\)"),
        ({"depth": clip.depth.long()}, "depth must be finite floats and static bool, got torch.int64"),
        ({"depth": clip.depth * float("nan")}, "depth must be finite floats"),
        ({"static": clip.static.float()}, "depth must be finite floats and static bool"),
        ({"prompt_embeds": torch.ones(3)}, r"prompt_embeds must be \(L, D\), finite floats, got \(3,\)"),
    ):
        save_clip(tmp_path / "clip", Clip(**{**vars(clip), **change}))
        with pytest.raises(ValueError, match=message):
            load_clip("one", (tmp_path / "clip").read_bytes())
    save_clip(tmp_path / "clip.safetensors", clip)
    with pytest.raises(ValueError, match="must have 9 latent frames or more for data.frames, got 3"):
        ClipDataset(data(SourceConfig("packed", str(tmp_path)), frames=33))[0]


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for kind, error, message in (
        ("rgbd", NotADirectoryError, "no such folder"),
        ("realestate10k", FileNotFoundError, "expected cameras/CLIP.txt, found none"),
        ("packed", FileNotFoundError, "no such file or folder"),
    ):
        with pytest.raises(error, match=message):
            ClipDataset(data(SourceConfig(kind, str(tmp_path / "none"))))
    for kind in ("rgbd", "packed"):
        with pytest.raises(ValueError, match=f"expected clips of 9 frames of kind '{kind}', found none"):
            ClipDataset(data(SourceConfig(kind, str(tmp_path))))
    (tmp_path / "x.tar").write_bytes(io.BytesIO(b"no tar at all" * 100).getvalue())
    with pytest.raises(ValueError, match=r"x.tar: must be a plain .tar shard"):
        ClipDataset(data(SourceConfig("packed", str(tmp_path))))


def test_frames_that_are_no_clip() -> None:
    made = render_room()
    with pytest.raises(
        ValueError, match=r"x: frames, depth, static and cameras must be 4 n \+ 1 .*, got 8, 9, 9 and 9"
    ):
        make_clip("x", "", made.images[:8], made.depth, made.static, made.cameras, SIZE)
    with pytest.raises(ValueError, match="x: frames must be finite"):
        make_clip("x", "", made.images * float("inf"), made.depth, made.static, made.cameras, SIZE)
    assert isinstance(made.cameras, Cameras)


def test_fuzzed_clips_are_broken_and_never_more(tmp_path: Path) -> None:
    """Bytes of a packed clip's header and content changed at random: a clip, or an error that the run counts."""
    count = 1000 if os.environ.get("MIRAGE_NIGHTLY") == "1" else 100
    path = tmp_path / "clip.safetensors"
    save_clip(path, packed())
    content, draw = path.read_bytes(), random.Random(0)
    header = int.from_bytes(content[:8], "little") + 8
    dataset = ClipDataset(data(SourceConfig("packed", str(tmp_path))))
    read = 0
    for _ in range(count):
        held = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            held[draw.randrange(header)] = draw.choice(b'0123456789"[]{},:FIUBO ')
        path.write_bytes(held if draw.random() < 0.8 else held[: draw.randrange(len(held))])
        with suppress(ValueError):
            dataset[0]
            read += 1
        with suppress(ValueError):
            read_origin(path)
    assert read < count


def test_whatever_a_library_raises_breaks_the_clip_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        save_clip(tmp_path / f"{name}.safetensors", packed())
    dataset = ClipDataset(data(SourceConfig("packed", str(tmp_path))))
    load = PackedSource.load

    def failing(self: Any, index: int) -> Any:
        if index == 0:
            raise RuntimeError("an operator failed")
        return load(self, index)

    monkeypatch.setattr(PackedSource, "load", failing)
    broken = [dataset[number].broken for number in range(4)]
    assert any(broken) and not all(broken)
    assert "one.safetensors: cannot be read (RuntimeError: an operator failed)" in str(broken)

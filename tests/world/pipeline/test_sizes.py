"""Images whose aspect or sides are not those of the frames: one rule, cameras and depth along, however runs begin."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import generation
import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from mirage.commands import cli
from mirage.files.framing import Framing
from mirage.files.images import to_tensor
from mirage.pipeline.pipeline import MiragePipeline
from mirage.pipeline.session import MirageSession
from mirage.scenes.trajectories import make_trajectory
from mirage_kernels import Cameras, LatentCache


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


@pytest.fixture(scope="module")
def pipe() -> MiragePipeline:
    return generation.make_pipeline()


def make_scene(size: tuple[int, int]) -> tuple[np.ndarray, Tensor, Cameras]:
    """A photo of noise, its depth at half its resolution, and five cameras for it at twice."""
    height, width = size
    rng = np.random.default_rng(0)
    depth = torch.from_numpy(rng.random((height // 2, width // 2)) + 2).float()
    focal = 0.5 * width / math.tan(0.5)
    matrix = [[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]]
    start = Cameras(torch.tensor(matrix), torch.eye(4)[None], size)
    cameras = make_trajectory("orbit", start, 5, 2.5).resized((2 * height, 2 * width))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), depth, cameras


def arguments(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    values = {"prompt": "a room", "static_filter": "none", "num_inference_steps": 1, "generator": generator}
    return values | changes


@pytest.mark.parametrize(
    ("image_size", "asked", "size"),
    [
        ((108, 192), None, (96, 192)),
        ((108, 192), (64, 96), (64, 96)),
        ((192, 128), (64, 96), (64, 96)),
        ((50, 31), None, (32, 32)),
    ],
)
def test_it_is_as_if_the_photo_had_been_cropped_before(
    pipe: MiragePipeline, image_size: tuple[int, int], asked: tuple[int, int] | None, size: tuple[int, int]
) -> None:
    image, depth, cameras = make_scene(image_size)
    height, width = asked or (None, None)
    common = {"chunk_frames": 5, "output_type": "latent"}
    found = pipe(image, cameras=cameras, depth=depth, height=height, width=width, **arguments(**common))
    framing = Framing(image_size, size)
    expected = pipe(
        framing.fit_pixels(image),
        cameras=framing.fit_cameras(cameras),
        depth=framing.fit_map(depth),
        **arguments(**common),
    )
    assert found.frames.shape[-2:] == (size[0] // 16, size[1] // 16)
    assert torch.equal(found.frames, expected.frames) and len(found.cache)
    assert torch.equal(found.cache.points, expected.cache.points)


def test_the_first_frame_may_be_written_first(pipe: MiragePipeline) -> None:
    image, depth, cameras = make_scene((108, 192))
    points = []
    for first in (True, False):
        with pipe.start_session(image, depth=depth, **arguments(height=64, width=96)) as session:
            if first:
                assert session.write_first_frame(cameras[0]).shape == (54, 81)  # as much of the depth as is seen
            assert session.step(cameras) is not None
            points.append(session.cache.points)
    assert torch.equal(*points)


def test_a_circle_stays_round(pipe: MiragePipeline) -> None:
    rows, columns = np.mgrid[:192, :128]
    disc = np.where(((rows - 96) ** 2 + (columns - 64) ** 2 < 30**2)[..., None], 255, 0).astype(np.uint8)
    image = PIL.Image.fromarray(disc.repeat(3, -1))
    with pipe.start_session(image, depth=torch.ones(192, 128), **arguments(height=96, width=160)) as session:
        seen = session._image[0].mean(0) > 0
    assert abs(int(seen.any(0).sum()) - 75) <= 2 and abs(int(seen.any(1).sum()) - 75) <= 2  # 60 of 128 columns


def test_16_bits_reach_the_model(pipe: MiragePipeline) -> None:
    levels = np.linspace(20000, 20100, 64 * 96).reshape(64, 96).astype(np.uint16)
    with pipe.start_session(PIL.Image.fromarray(levels), depth=torch.ones(64, 96), **arguments()) as session:
        expected = 2.0 * to_tensor(np.repeat((levels / 65535)[..., None], 3, -1)) - 1.0
        assert torch.allclose(session._image[0], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["64x96", None])
def test_a_run_killed_before_its_first_chunk_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str | None
) -> None:
    """After the path is saved, before anything of a chunk is: with the image's aspect rounded away."""
    image, depth, _ = make_scene((75, 110))
    PIL.Image.fromarray(image).save(tmp_path / "room.png")
    PIL.Image.fromarray((depth.numpy() * 1000).round().astype(np.uint16)).save(tmp_path / "depth.png")

    def run(out: str, *more: str) -> int:
        given = ["generate", "--model", "tiny-random", "--image", str(tmp_path / "room.png"), "--frames", "5"]
        given += ["--depth", str(tmp_path / "depth.png"), "--depth-scale", "0.001", "--static-filter", "none"]
        given += [
            "--steps",
            "1",
            "--chunk-frames",
            "5",
            "--out",
            str(tmp_path / out),
            *(["--size", size] if size else []),
        ]
        return cli.main([*given, *more])

    assert run("whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(MirageSession, "_generate", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        assert run("killed") == 2
    assert (tmp_path / "killed" / "trajectory.npz").exists() and not (tmp_path / "killed" / "video.mp4").exists()
    assert run("killed", "--resume") == 0
    whole, killed = (LatentCache.load(tmp_path / out / "cache.safetensors") for out in ("whole", "killed"))
    assert torch.equal(whole.points, killed.points) and torch.equal(whole.features, killed.features) and len(whole)
    assert (tmp_path / "whole" / "video.mp4").read_bytes() == (tmp_path / "killed" / "video.mp4").read_bytes()

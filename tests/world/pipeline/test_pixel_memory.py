"""The pixel memory that the benchmarks compare with is a true one: brute force, agreement, and the stored picture."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scenes
import torch
from torch import Tensor

from benchmarks import scenes as rooms
from benchmarks.pixel_memory import (
    DEPTH_TOLERANCE,
    MARGIN,
    KernelPixelMemory,
    PlainPixelMemory,
    encode,
    make_encoder,
)
from mirage_kernels import Cameras

SIZE = (12, 17)


def stored(views: int = 2) -> tuple[Tensor, Tensor, Cameras]:
    """Random colours on rough random depth with unknown pixels: rgb, depth, cameras."""
    rng = np.random.default_rng(3)
    cameras = Cameras(scenes.intrinsics(rng, views, SIZE), scenes.poses(rng, views), SIZE, square_pixels=False)
    depth = torch.from_numpy(rng.uniform(2, 4, (views, *SIZE))).float()
    depth[torch.from_numpy(rng.random(depth.shape) < 0.1)] = 0
    depth[0, 0, :3] = torch.tensor([math.nan, math.inf, -1.0])
    return torch.from_numpy(rng.random((views, 3, *SIZE))).float(), depth, cameras


def targets(views: int = 3) -> Cameras:
    rng = np.random.default_rng(4)
    return Cameras(scenes.intrinsics(rng, views, SIZE), scenes.poses(rng, views), SIZE, square_pixels=False)


def brute_force(rgb: Tensor, depth: Tensor, cameras: Cameras, read: Cameras) -> tuple[np.ndarray, np.ndarray]:
    """The bilinear picture point by point, in float64 Python."""
    points = []
    for t in range(len(cameras)):
        k, pose = cameras.intrinsics[t].numpy(), cameras.cam2world[t].numpy()
        for i in range(SIZE[0]):
            for j in range(SIZE[1]):
                z = float(depth[t, i, j])
                if not (z > 0 and math.isfinite(z)):
                    continue
                camera = np.array([(j + 0.5 - k[0, 2]) / k[0, 0] * z, (i + 0.5 - k[1, 2]) / k[1, 1] * z, z])
                points.append((pose[:3, :3] @ camera + pose[:3, 3], rgb[t, :, i, j].numpy()))
    picture, seen = np.zeros((len(read), 3, *SIZE)), np.zeros((len(read), *SIZE), bool)
    for t in range(len(read)):
        k, world2cam = read.intrinsics[t].numpy(), np.linalg.inv(read.cam2world[t].numpy())
        winners: dict[tuple[int, int], dict[tuple[int, int], tuple[float, float, Any]]] = {}
        for point, colour in points:
            x, y, z = world2cam[:3, :3] @ point + world2cam[:3, 3]
            if z <= 0.05:
                continue
            u, v = x * k[0, 0] / z + k[0, 2] - 0.5, y * k[1, 1] / z + k[1, 2] - 0.5
            for down in (0, 1):
                for right in (0, 1):
                    i = math.floor(v - MARGIN) + 1 if down else math.floor(v + MARGIN)
                    j = math.floor(u - MARGIN) + 1 if right else math.floor(u + MARGIN)
                    if 0 <= i < SIZE[0] and 0 <= j < SIZE[1]:
                        quadrants = winners.setdefault((i, j), {})
                        if z < quadrants.get((down, right), (math.inf,))[0]:
                            quadrants[down, right] = (z, (1 - abs(u - j)) * (1 - abs(v - i)), colour)
        for (i, j), quadrants in winners.items():
            limit = min(z for z, _, _ in quadrants.values()) * (1 + DEPTH_TOLERANCE)
            kept = [(weight, colour) for z, weight, colour in quadrants.values() if z <= limit]
            total = sum(weight for weight, _ in kept)
            picture[t, :, i, j] = sum(weight * colour for weight, colour in kept) / total
            seen[t, i, j] = True
    return picture, seen


def memories() -> list[Any]:
    return [PlainPixelMemory(), KernelPixelMemory("bilinear")]


@pytest.mark.parametrize("version", [0, 1], ids=["plain", "kernels"])
def test_bilinear_equals_brute_force(version: int) -> None:
    memory = memories()[version]
    rgb, depth, cameras = stored()
    memory.write(rgb[:1], depth[:1], cameras[:1])
    memory.write(rgb[1:], depth[1:], cameras[1:])
    rendered = memory.render(targets(), SIZE)
    picture, seen = brute_force(rgb, depth, cameras, targets())
    assert 0.3 < seen.mean() < 1
    assert np.array_equal(rendered.seen.numpy(), seen)
    np.testing.assert_allclose(rendered.rgb.numpy(), picture, atol=2e-4)


def test_two_versions_agree_on_a_room() -> None:
    size = rooms.Size(4, 64, 96)
    cameras = rooms.stored_cameras(size)
    depth = rooms.render_depth(cameras)
    plain, kernels = memories()
    for memory in (plain, kernels):
        memory.write(rooms.images(cameras, depth), depth, cameras)
        assert len(memory) == size.pixels
    first, second = (memory.render(rooms.chunk_cameras(size)[::8], size.image) for memory in (plain, kernels))
    assert float(first.seen.float().mean()) > 0.3
    # Projections differ in their last bits, which moves a point to the next pixel here and there.
    assert float((first.seen != second.seen).float().mean()) < 1e-3
    assert float(((first.rgb - second.rgb).abs() > 2e-3).float().mean()) < 2e-3


@pytest.mark.parametrize("splat", ["nearest", "bilinear", "plain"])
def test_the_camera_that_stored_a_picture_sees_it_again(splat: str) -> None:
    size = rooms.Size(1, 48, 80)
    cameras = rooms.stored_cameras(size)
    depth = rooms.render_depth(cameras)
    picture = rooms.images(cameras, depth)
    memory: Any = PlainPixelMemory() if splat == "plain" else KernelPixelMemory(splat)
    memory.write(picture, depth, cameras)
    rendered = memory.render(cameras, size.image)
    assert bool(rendered.seen.all())
    torch.testing.assert_close(rendered.rgb, picture, atol=1e-3, rtol=0)


@pytest.mark.parametrize("version", [0, 1], ids=["plain", "kernels"])
def test_half_a_pixel_aside_the_picture_is_its_bilinear_interpolation(version: int) -> None:
    size = rooms.Size(1, 24, 32)
    cameras = rooms.stored_cameras(size)
    depth = torch.full((1, *size.image), 2.0)
    picture = torch.from_numpy(np.random.default_rng(0).random((1, 3, *size.image))).float()
    memory = memories()[version]
    memory.write(picture, depth, cameras)
    moved = cameras.intrinsics.clone()
    moved[:, 0, 2] += 0.5
    moved[:, 1, 2] += 0.25
    rendered = memory.render(Cameras(moved, cameras.cam2world, size.image, square_pixels=False), size.image)
    # Pixel (i, j) lies between stored rows i-1, i (a quarter from i) and columns j-1, j (halfway).
    columns = (picture[..., :-1] + picture[..., 1:]) / 2
    expected = 0.25 * columns[:, :, :-1] + 0.75 * columns[:, :, 1:]
    torch.testing.assert_close(rendered.rgb[:, :, 1:, 1:], expected, atol=1e-3, rtol=0)


def test_another_camera_sees_the_painted_world() -> None:
    size = rooms.Size(12, 64, 96)
    cameras = rooms.stored_cameras(size)
    depth = rooms.render_depth(cameras)
    read = rooms.chunk_cameras(size)[16]
    truth = rooms.images(read, rooms.render_depth(read))
    for memory in (*memories(), KernelPixelMemory("nearest")):
        memory.write(rooms.images(cameras, depth), depth, cameras)
        rendered = memory.render(read, size.image)
        error = (rendered.rgb - truth).abs().amax(1)[rendered.seen]
        assert float(rendered.seen.float().mean()) > 0.9
        assert float(error.median()) < 0.03


def test_an_empty_memory_and_a_camera_that_sees_nothing() -> None:
    for memory in (*memories(), KernelPixelMemory("nearest")):
        rendered = memory.render(targets(), SIZE)
        assert rendered.rgb.shape == (3, 3, *SIZE) and not rendered.rgb.any() and not rendered.seen.any()
        rgb, depth, cameras = stored()
        memory.write(rgb, depth, cameras)
        turned = targets().cam2world.clone()
        turned[:, :3, [0, 2]] *= -1
        rendered = memory.render(targets().with_cam2world(turned), SIZE)
        assert not rendered.seen.any() and not rendered.rgb.any()


def test_bytes_are_those_of_float32_points() -> None:
    rgb, depth, cameras = stored()
    memory = PlainPixelMemory()
    memory.write(rgb, depth, cameras)
    known = int(((depth > 0) & torch.isfinite(depth)).sum())
    assert len(memory) == known and memory.nbytes == 24 * known
    assert memory._positions.element_size() * 3 + memory._colours.element_size() * 3 == 24


def test_encoder_gives_the_latent_grid() -> None:
    pytest.importorskip("diffusers", reason="the VAE encoder needs diffusers")
    size = rooms.Size(1, 32, 48)
    cameras = rooms.stored_cameras(size)
    depth = rooms.render_depth(cameras)
    memory = KernelPixelMemory("nearest")
    memory.write(rooms.images(cameras, depth), depth, cameras)
    latents, mask = encode(make_encoder(8), memory.render(rooms.chunk_cameras(size), size.image))
    assert latents.shape == (rooms.READ_VIEWS, 48, 2, 3) and mask.shape == (rooms.READ_VIEWS, 2, 3)
    assert bool(torch.isfinite(latents).all()) and mask.dtype == torch.bool

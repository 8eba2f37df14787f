"""The one rule of sizes: images, cameras and depth are cropped about the centre and resized alike."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from mirage.files.framing import Framing, cut_to_multiples, have_one_aspect
from mirage_kernels import Cameras

SIZES = [
    ((108, 192), (96, 192)),
    ((108, 192), (64, 96)),
    ((192, 128), (96, 160)),
    ((135, 240), (128, 224)),
    ((31, 64), (32, 64)),
    ((64, 96), (64, 96)),
    ((128, 192), (64, 96)),
    ((1080, 1920), (704, 1280)),
    ((40, 1000), (32, 992)),
    ((496, 741), (480, 736)),
    ((63, 63), (32, 32)),
    ((100, 150), (96, 128)),
]


def make_cameras(size: tuple[int, int]) -> Cameras:
    height, width = size
    matrix = [[0.8 * width, 0.0, 0.47 * width], [0.0, 0.8 * width, 0.53 * height], [0.0, 0.0, 1.0]]
    return Cameras(torch.tensor(matrix, dtype=torch.float64), torch.eye(4)[None], size)


@pytest.mark.parametrize(("image_size", "size"), SIZES)
def test_a_point_stays_under_its_pixel(image_size: tuple[int, int], size: tuple[int, int]) -> None:
    """Two ramps tell where a frame's pixel comes from; the frame's camera must look there."""
    rows, columns = image_size
    v, u = np.meshgrid(np.arange(rows) + 0.5, np.arange(columns) + 0.5, indexing="ij")
    image = np.stack([u / columns, v / rows, 0 * u], -1).astype(np.float32)
    framing, cameras = Framing(image_size, size), make_cameras(image_size)
    frame, fitted = framing.fit_pixels(image), framing.fit_cameras(cameras)
    assert frame.shape == (*size, 3) and fitted.image_size == size
    y, x = size[0] // 2, size[1] // 3  # away from the edges, where Lanczos bends a ramp
    source = np.array([frame[y, x, 0] * columns, frame[y, x, 1] * rows, 1.0])
    ray = torch.linalg.inv(fitted.intrinsics[0]) @ torch.tensor([x + 0.5, y + 0.5, 1.0], dtype=torch.float64)
    expected = torch.linalg.inv(cameras.intrinsics[0]) @ torch.from_numpy(source)
    assert (ray - expected).abs().max() < 1e-3
    matrix = fitted.intrinsics[0]
    assert abs(matrix[0, 0] / matrix[1, 1] - 1) < 1e-9  # pixels stay square
    # Depth at another resolution follows, to half of its pixel.
    depth = torch.from_numpy(image[::2, ::2, 1].copy())
    kept = framing.fit_map(depth)
    top, _, tall, _ = framing.window
    middle = kept[kept.shape[0] // 2, 0] * rows
    assert abs(middle - (top + tall * (kept.shape[0] // 2 + 0.5) / kept.shape[0])) < 2.1
    assert kept.shape == (round(tall * depth.shape[0] / rows), kept.shape[1])


def test_a_crop_alone_resamples_nothing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (41, 53, 3), dtype=np.uint8)
    framing = Framing((41, 53), cut_to_multiples((41, 53), (16, 16)))
    assert framing.size == (32, 48) and framing.window == (4, 2, 32, 48) and framing.crops
    assert np.array_equal(framing.fit_pixels(pixels), pixels[4:36, 2:50])
    assert torch.equal(framing.fit_map(torch.from_numpy(pixels[..., 0])), torch.from_numpy(pixels[4:36, 2:50, 0]))
    cameras = framing.fit_cameras(make_cameras((41, 53)))
    assert cameras.intrinsics[0, 0, 2] == pytest.approx(0.47 * 53 - 2) and cameras.image_size == (32, 48)
    assert framing.fit_cameras(cameras) is cameras  # of the frames already


def test_the_same_aspect_is_resized_as_diffusers_does() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    expected = PIL.Image.fromarray(pixels).resize((96, 64), PIL.Image.Resampling.LANCZOS)
    framing, cameras = Framing((128, 192), (64, 96)), make_cameras((128, 192))
    assert not framing.crops and np.array_equal(framing.fit_pixels(pixels), np.asarray(expected))
    floats = framing.fit_pixels((pixels / 255).astype(np.float32))
    assert np.abs(floats * 255 - np.asarray(expected)).mean() < 0.5  # the other rounds in between
    assert torch.equal(framing.fit_cameras(cameras).intrinsics, cameras.resized((64, 96)).intrinsics)
    depth = torch.rand(3, 64, 96)
    assert framing.fit_map(depth) is depth


def test_aspects() -> None:
    framing = Framing((108, 192), (96, 192))
    assert all(framing.fits_cameras(make_cameras(size)) for size in ((108, 192), (540, 960), (96, 192)))
    assert not framing.fits_cameras(make_cameras((192, 108))) and not framing.fits_cameras(make_cameras((480, 960)))
    assert have_one_aspect((54, 96), (108, 192)) and have_one_aspect((55, 96), (108, 192))
    assert not have_one_aspect((48, 96), (108, 192)) and not have_one_aspect((96, 54), (108, 192))
    assert cut_to_multiples((31, 95), (32, 32)) == (32, 64)

"""Damaged and hostile images, depth and RGB-D folders: read, or refused in our words, in bounded memory."""

from __future__ import annotations

import importlib.util
import io
import os
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from mirage.files.depth import read_depth
from mirage.files.images import read_image, read_mask
from mirage.optional import MissingExtraError
from mirage.scenes.rgbd import load_rgbd_folder

TRIES = 1000 if os.environ.get("MIRAGE_NIGHTLY") else 60  # inputs a parser
SLACK = 64 * 2**20
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (33, 40, 3), dtype=np.uint8)
STEPS = RNG.integers(500, 4000, (33, 40), dtype=np.uint16)


def encode(array: np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image = PIL.Image.fromarray(array)
    (image.quantize(16) if kind == "GIF" else image).save(file, kind, **options)
    return file.getvalue()


def encode_array(save: Callable[..., Any], *arrays: np.ndarray, **named: np.ndarray) -> bytes:
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


def images() -> list[bytes]:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return [
        encode(COLOURS, "PNG", exif=exif),
        encode(COLOURS, "JPEG", exif=exif),
        encode(COLOURS, "JPEG", progressive=True),
        encode(STEPS, "PNG"),
        encode(np.dstack([COLOURS, COLOURS[..., 0]]), "PNG"),
        encode(COLOURS, "GIF"),
        encode(COLOURS, "BMP"),
        encode(COLOURS, "PPM"),
        encode(COLOURS, "WEBP", lossless=True),
        encode(COLOURS, "TIFF", compression="tiff_lzw"),
        encode(STEPS / np.float32(4000), "TIFF"),
    ]


def depths(folder: Path) -> list[bytes]:
    metres = STEPS / np.float32(1000)
    exr = []
    if importlib.util.find_spec("OpenEXR"):
        openexr, path = importlib.import_module("OpenEXR"), folder / "d.exr"
        for compression in (openexr.ZIP_COMPRESSION, openexr.PIZ_COMPRESSION, openexr.NO_COMPRESSION):
            with openexr.File({"compression": compression, "type": openexr.scanlineimage}, {"Z": metres}) as file:
                file.write(str(path))
            exr.append(path.read_bytes())
    return [
        *exr,
        encode(STEPS, "PNG"),
        encode(metres, "TIFF"),
        encode(metres, "TIFF", compression="tiff_deflate"),
        encode_array(np.save, metres),
        encode_array(np.save, STEPS[None]),
        encode_array(np.savez, metres, depth=STEPS),
        encode_array(np.savez_compressed, depth=metres),
    ]


def spoil(content: bytes, rng: random.Random) -> bytes:
    """Damage a file as disks, networks and people do."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        head = rng.random() < 0.6  # where sizes and offsets are
        place = rng.randrange(max(min(len(data), 200) if head else len(data), 1))
        kind = rng.randrange(6)
        if kind == 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            del data[place : place + rng.randrange(1, 40)]
        elif kind == 3:
            data[place:place] = rng.randbytes(rng.randrange(1, 40))
        elif kind == 4:
            order = rng.choice("<>")
            data[place : place + 4] = struct.pack(f"{order}I", rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 20_000, 12_000)))
        else:
            data[place : place + 8] = struct.pack("<Q", rng.choice((0, 2**63 - 1, 2**40)))
    return bytes(data)


def peak_bytes(reset: bool = False) -> int | None:
    """The most memory held since the last reset; None where the system does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return 1024 * int(text.split("VmHWM:")[1].split()[0])


def check(read: Callable[[], np.ndarray], what: str, held: int = 0) -> bool:
    """Read, or be refused, in bounded memory; tell whether it was read. `held`: bytes that the file decodes to."""
    before = peak_bytes(reset=True)
    try:
        found = read()
        held = max(held, found.nbytes)
        assert found.ndim in (2, 3) and found.size, what
        result = True
    except (OSError, ValueError, MissingExtraError) as error:
        assert str(error), what
        result = False
    after = peak_bytes()
    if before is not None and after is not None:
        assert after - before <= 3 * held + SLACK, f"{what}: {(after - before) / 2**20:.0f} MiB for {held / 2**20:.1f}"
    return result


@pytest.mark.parametrize("parser", [read_image, read_mask, lambda path: read_depth(path, 0.001)], ids=["i", "m", "d"])
def test_fuzzed_files(tmp_path: Path, parser: Callable[[Path], np.ndarray], request: pytest.FixtureRequest) -> None:
    depth = "[d]" in request.node.name
    whole = depths(tmp_path) if depth else images()
    rng, path, read = random.Random(request.node.name), tmp_path / "file", 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about what it repairs
        for content in whole:
            path.write_bytes(content)
            assert check(lambda: parser(path), "whole")
        for i in range(TRIES):
            path.write_bytes(spoil(rng.choice(whole), rng))
            read += check(lambda: parser(path), f"input {i}")
    assert 0 < read < TRIES  # the damage was neither fatal nor harmless


def test_fuzzed_rgbd_folders(tmp_path: Path) -> None:
    rng, read = random.Random("rgbd"), 0
    files = {
        "intrinsics.txt": b"40 0 20\n0 40 16\n0 0 1\n",
        "frame-000000.color.png": encode(COLOURS, "PNG"),
        "frame-000000.depth.png": encode(STEPS, "PNG"),
        "frame-000000.pose.txt": b"1 0 0 0.5\n0 1 0 0\n0 0 1 0\n0 0 0 1\n",
    }
    for i in range(TRIES):
        spoilt = rng.choice(list(files))
        for name, content in files.items():
            (tmp_path / name).write_bytes(spoil(content, rng) if name == spoilt else content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read += check(lambda: load_rgbd_folder(tmp_path).depth.numpy(), f"input {i}, {spoilt}")
    assert 0 < read < TRIES


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["rgb.bmp", "rgba.tiff", "grey16.png", "depth16.png", "depth.npz", "depth.tiff", "int.npy"]
)
def test_memory_of_large_files(tmp_path: Path, kind: str) -> None:
    """At most 3 times the decoded array and 64 MiB: 24 megapixels, as of a camera."""
    shape, path = (4000, 6000), tmp_path / kind
    depth = np.broadcast_to(np.arange(shape[1], dtype=np.uint16) + 1, shape)
    if kind == "rgb.bmp":
        PIL.Image.new("RGB", shape[::-1], "red").save(path)
    elif kind == "rgba.tiff":
        PIL.Image.new("RGBA", shape[::-1], (255, 0, 0, 128)).save(path)
    elif kind == "depth.npz":
        np.savez(path, depth=depth.astype(np.float32))
    elif kind == "int.npy":
        np.save(path, depth.astype(np.int32))
    else:
        array = depth.astype(np.float32) if kind == "depth.tiff" else depth
        PIL.Image.fromarray(array).save(path, **({"compress_level": 1} if kind.endswith("png") else {}))
    read = read_image if kind[0] in "rg" else lambda path: read_depth(path, 0.001)
    assert check(lambda: read(path), kind, held=4 * shape[0] * shape[1])  # of RGBA four channels are decoded


def test_masks_and_depth_of_hostile_names(tmp_path: Path) -> None:
    for name in ("a\nb.png", "%s {0}.png", "-x.png", "é" * 100 + ".png"):
        encoded = encode(STEPS, "PNG")
        (tmp_path / name).write_bytes(encoded)
        assert read_depth(tmp_path / name, 0.001).shape == STEPS.shape
        assert torch.from_numpy(read_mask(tmp_path / name)).all()

"""Images of every kind come to one form: upright, in three colours, in [0, 1] or 8 bits."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from mirage.files.images import read_image, read_mask, to_pil, to_tensor

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
RED_OVER_BLUE = np.zeros((64, 48, 3), np.uint8)
RED_OVER_BLUE[:32, :, 0] = RED_OVER_BLUE[32:, :, 2] = 255


def saved(image: PIL.Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["phone.jpg", "phone.png", "phone.webp", "phone.tiff"])
def test_exif_turns_an_image_upright(tmp_path: Path, name: str, orientation: int) -> None:
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # how a phone stores what is upright
    image = PIL.Image.fromarray(RED_OVER_BLUE)
    if stored is not None:
        image = image.transpose(PIL.Image.Transpose(stored))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = saved(image, tmp_path / name, exif=exif, quality=95)
    with PIL.Image.open(path) as opened:
        for pixels in (read_image(path), read_image(opened)):
            assert pixels.shape == (64, 48, 3)
            assert np.abs(pixels.astype(int) - RED_OVER_BLUE).mean() < 4


def test_a_stored_orientation_that_is_none_changes_nothing(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 77
    assert np.array_equal(read_image(saved(PIL.Image.fromarray(COLOURS), tmp_path / "a.png", exif=exif)), COLOURS)
    broken = PIL.Image.fromarray(COLOURS)
    broken.info["exif"] = b"Exif\0\0not a TIFF header"
    assert np.array_equal(read_image(broken), COLOURS)


def test_grey_of_16_bits_keeps_them(tmp_path: Path) -> None:
    levels = np.array([[0, 1, 256, 32768], [65534, 65535, 255, 4096]], np.uint16)
    expected = np.broadcast_to((levels / 65535.0)[..., None], (2, 4, 3)).astype(np.float32)
    for name in ("a.png", "a.tiff"):
        pixels = read_image(saved(PIL.Image.fromarray(levels), tmp_path / name))
        assert pixels.dtype == np.float32 and np.abs(pixels - expected).max() < 1e-7
    pgm = tmp_path / "a.pgm"
    pgm.write_bytes(b"P5 4 2 65535\n" + levels.astype(">u2").tobytes())
    for source in (pgm, PIL.Image.fromarray(levels), levels, torch.from_numpy(levels)):
        assert np.abs(read_image(source) - expected).max() < 1e-7
    assert to_pil(expected).getpixel((3, 0)) == (128, 128, 128)
    with pytest.raises(ValueError, match="image must have 8 or 16 bits or be float, got 32-bit integers"):
        read_image(PIL.Image.fromarray(levels.astype(np.int32)))


def test_16_bits_a_colour(tmp_path: Path) -> None:
    """Pillow reads the upper 8, which is right to half a step of them."""
    colours = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    (tmp_path / "a.png").write_bytes(content)
    assert np.abs(to_tensor(read_image(tmp_path / "a.png")).permute(1, 2, 0).numpy() - colours / 65535).max() < 1 / 255


def test_modes_of_pillow(tmp_path: Path) -> None:
    image = PIL.Image.fromarray(COLOURS)
    grey = image.convert("L")
    expected = np.asarray(grey.convert("RGB"))
    assert all(np.array_equal(read_image(grey.convert(mode)), expected) for mode in ("L", "LA", "RGBX"))
    palette = image.quantize(256)
    assert np.array_equal(read_image(saved(palette, tmp_path / "p.png")), np.asarray(palette.convert("RGB")))
    bits = grey.point(lambda level: 255 * (level > 99)).convert("1")
    assert set(np.unique(read_image(bits))) == {0, 255}
    cmyk = saved(image.convert("CMYK"), tmp_path / "c.tiff")
    assert np.abs(read_image(cmyk).astype(int) - COLOURS).max() <= 1
    animated = tmp_path / "a.gif"
    image.save(animated, save_all=True, append_images=[PIL.Image.new("RGB", image.size)], optimize=False)
    assert read_image(animated).mean() > 50  # the first frame
    floats = PIL.Image.fromarray(np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8))
    assert np.array_equal(read_image(saved(floats, tmp_path / "f.tiff"))[..., 1], np.asarray(floats))


def test_transparent_pixels_lie_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[..., 1] = 200
    pixels[:, 0, 3], pixels[:, 1, 3] = 255, 51
    expected = np.array([[[0, 200, 0], [204, 244, 204], [255, 255, 255]]] * 2)
    path = saved(PIL.Image.fromarray(pixels), tmp_path / "a.png")
    floats = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    for source in (path, PIL.Image.fromarray(pixels), pixels, torch.from_numpy(pixels).permute(2, 0, 1), floats):
        found = read_image(source)
        assert found.shape == (2, 3, 3)
        assert np.abs(found * (1 if found.dtype == np.uint8 else 255.0) - expected).max() <= 1
    palette = PIL.Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    path = saved(palette, tmp_path / "p.png", transparency=1)
    assert read_image(path).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    opaque = np.dstack([COLOURS, np.full((6, 8), 255, np.uint8)])
    assert np.array_equal(read_image(PIL.Image.fromarray(opaque)), COLOURS)


def test_arrays_and_tensors_of_one_image_agree() -> None:
    floats = (COLOURS / 255.0).astype(np.float32)
    tensor = torch.from_numpy(floats).permute(2, 0, 1)
    assert read_image(COLOURS) is COLOURS or np.array_equal(read_image(COLOURS), COLOURS)
    for source in (
        COLOURS[None],
        torch.from_numpy(COLOURS).permute(2, 0, 1),
        floats,
        floats.astype(np.float64)[None],
        tensor,
        tensor[None],
        tensor * 2 - 1,
        tensor.double().requires_grad_(),
        tensor + 1e-4,
    ):
        assert (to_tensor(read_image(source)) - tensor).abs().max() < 3e-4
    assert (to_tensor(read_image(tensor.bfloat16())) - tensor).abs().max() < 1 / 255
    for grey in (floats[..., 0], floats[..., :1], tensor[0], tensor[:1], tensor[None, :1], COLOURS[..., 0]):
        assert (to_tensor(read_image(grey)) - tensor[:1]).abs().max() < 1e-6
    assert read_image(np.eye(3, dtype=bool)).max() == 255


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.full((4, 4, 3), np.nan), "finite, got NaN or Inf"),
        (torch.full((3, 4, 4), float("inf")), "finite, got NaN or Inf"),
        (COLOURS.astype(np.float32), r"floats in \[0, 1\], or in \[-1, 1\], got 0 to 2\d\d: convert it to uint8"),
        (COLOURS / 255 * 4 - 2, r"floats in \[0, 1\], or in \[-1, 1\], got -2 to"),
        (COLOURS / 255 * 1.1 - 0.05, r"floats in \[0, 1\], or in \[-1, 1\], got -0.05 to 1.0.*: clamp it"),
        (COLOURS.astype(np.int64), "uint8 or uint16, or float in .0, 1., got int64"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "uint8 or uint16, or float in .0, 1., got int32"),
        (np.zeros((3, 4, 5)), r"\(H, W, 3\) or \(1, H, W, 3\) as one ndarray, got \(3, 4, 5\)"),
        (torch.zeros(5, 4, 3), r"\(3, H, W\) or \(1, 3, H, W\) as one Tensor, got \(5, 4, 3\)"),
        (np.zeros((0, 4, 3)), r"got \(0, 4, 3\)"),
        (torch.zeros(2, 3, 4, 4), r"got \(2, 3, 4, 4\)"),
        (object(), "a path, a PIL image, an array or a tensor, got object"),
    ],
)
def test_what_is_no_image_is_refused(source: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        read_image(source)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    whole = io.BytesIO()
    PIL.Image.fromarray(RED_OVER_BLUE).save(whole, "JPEG")
    for name, content in (
        ("empty.jpg", b""),
        ("text.png", b"not an image"),
        ("cut.jpg", whole.getvalue()[:300]),
        ("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"),  # Pillow would have Ghostscript run it
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: expected an image, got: "):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png: no such file"):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises(IsADirectoryError):
        read_image(tmp_path)
    with pytest.raises(ValueError, match="expected an image"):
        read_image("/dev/null")
    noise = saved(PIL.Image.fromarray(RNG.integers(0, 256, (99, 99, 3), dtype=np.uint8)), tmp_path / "cut.png")
    noise.write_bytes(noise.read_bytes()[:9000])
    lazy = PIL.Image.open(noise)
    with pytest.raises(ValueError, match="image must be a whole image, got: "):
        read_image(lazy)


def test_a_size_that_no_bytes_back_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    rows = zlib.compress(b"\0" * 100)
    data = struct.pack(">I", len(rows)) + b"IDAT" + rows + struct.pack(">I", zlib.crc32(b"IDAT" + rows))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + data)
    monkeypatch.setattr(PIL.Image.Image, "load", lambda _: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda _: pytest.fail("decoded"), raising=False)
    with (
        pytest.warns(PIL.Image.DecompressionBombWarning),
        pytest.raises(ValueError, match="12000x12000 pixels in .* cut"),
    ):
        read_image(tmp_path / "huge.png")


def test_masks_are_of_any_mode(tmp_path: Path) -> None:
    mask = RNG.random((6, 8)) > 0.5
    faint = np.zeros((6, 8, 3), np.uint8)
    faint[..., 2] = mask  # a blue of 1 of 255, which would round to a grey of 0
    palette = PIL.Image.fromarray((~mask).astype(np.uint8), "P")
    palette.putpalette([255, 255, 255, 0, 0, 0])
    for image in (
        PIL.Image.fromarray(mask),
        PIL.Image.fromarray(mask.astype(np.uint8) * 255),
        PIL.Image.fromarray(mask.astype(np.uint16) * 256),
        PIL.Image.fromarray(faint),
        PIL.Image.fromarray(np.dstack([faint, np.full((6, 8), 255, np.uint8)])),
        palette,
    ):
        assert np.array_equal(read_mask(saved(image, tmp_path / "mask.png")), mask)

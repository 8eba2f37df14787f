"""Depth from PNG, TIFF, EXR, NPY and NPZ: the right unit, or a line that says what is missing."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mirage.files.depth import read_depth
from mirage.optional import MissingExtraError

METRES = (np.random.default_rng(0).random((6, 8)) * 5 + 0.5).astype(np.float32)
STEPS = (METRES * 1000).round().astype(np.uint16)


def save_png(path: Path, values: np.ndarray) -> Path:
    PIL.Image.fromarray(values).save(path)
    return path


def test_integers_have_the_scale_that_is_given(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", STEPS)
    np.save(tmp_path / "big.npy", STEPS.astype(">u2"))
    np.save(tmp_path / "long.npy", STEPS.astype(np.int64))
    np.savez_compressed(tmp_path / "d.npz", STEPS)
    files = [save_png(tmp_path / name, STEPS) for name in ("d.png", "d.tiff")]
    files += [tmp_path / name for name in ("d.npy", "big.npy", "long.npy", "d.npz")]
    save_png(tmp_path / "d.png", STEPS).rename(tmp_path / "named_otherwise")
    files[0] = tmp_path / "named_otherwise"
    for path in files:
        assert np.abs(read_depth(path, 0.001) - STEPS / 1000).max() < 1e-6, path
        assert np.abs(read_depth(path, 1 / 256, offset=0.25) - (STEPS / 256 + 0.25)).max() < 1e-5
        assert np.array_equal(read_depth(path, integer_scale=0.001), read_depth(path, 0.001))
        with pytest.raises(ValueError, match="expected a scale for depth in integers .*: --depth-scale, or"):
            read_depth(path)


def test_every_millimetre_is_what_dividing_gives(tmp_path: Path) -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    depth = read_depth(save_png(tmp_path / "d.png", every), 0.001)
    assert np.array_equal(depth.ravel()[:-1], np.arange(65535, dtype=np.float32) / np.float32(1000))
    assert depth[0, 0] == depth[-1, -1] == 0  # 0 and 65535 are unknown
    shifted = read_depth(tmp_path / "d.png", 0.001, offset=1.0)
    assert shifted[0, 0] == shifted[-1, -1] == 0 and shifted[0, 1] == np.float32(1.001)


def test_floats_are_as_they_are(tmp_path: Path) -> None:
    known = METRES.copy()
    known[0, :3] = 0, np.nan, -1
    np.save(tmp_path / "d.npy", known)
    np.save(tmp_path / "d64.npy", np.asfortranarray(known.astype(np.float64)))
    np.savez(tmp_path / "d.npz", depth=known, intrinsics=np.eye(3))
    save_png(tmp_path / "d.tiff", known)
    for name in ("d.npy", "d64.npy", "d.npz", "d.tiff"):
        depth = read_depth(tmp_path / name)
        assert depth.dtype == np.float32 and np.array_equal(depth, known, equal_nan=True)
    assert isinstance(read_depth(tmp_path / "d.npy"), np.memmap)  # long videos are read a frame at a time
    scaled = read_depth(tmp_path / "d.npy", 0.01, offset=2.0)
    assert (scaled[0, :3] == 0).all() and np.allclose(scaled[1:], METRES[1:] * 0.01 + 2)
    for shape in ((3, 1, 6, 8), (3, 6, 8, 1)):
        np.save(tmp_path / "video.npy", np.broadcast_to(METRES, (3, 6, 8)).reshape(shape))
        assert read_depth(tmp_path / "video.npy").shape == (3, 6, 8)


def pages(path: Path) -> None:
    image = PIL.Image.fromarray(METRES)
    image.save(path, save_all=True, append_images=[image])


def header_only(path: Path) -> None:
    """An array of 40 GB in 150 bytes, and the same compressed in an archive."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**5, 10**5)})
    if path.suffix == ".npy":
        path.write_bytes(file.getvalue() + b"\0" * 20)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("depth.npy", file.getvalue() + b"\0" * 2000)


BAD: list[tuple[str, Any, str]] = [
    ("empty.npy", lambda path: path.touch(), "expected depth, got an empty file"),
    ("text.png", lambda path: path.write_text("no"), "expected an image, got: "),
    ("grey.png", lambda path: save_png(path, STEPS.astype(np.uint8)), r"got an image of 8 bits \(mode L\)"),
    ("colours.png", lambda path: save_png(path, np.zeros((6, 8, 3), np.uint8)), r"got colours \(mode RGB\)"),
    ("pages.tiff", pages, "expected an image, got: 2 images in one file"),
    ("bytes.npy", lambda path: np.save(path, STEPS.astype(np.uint8)), "integers of 16 bits or more, got uint8"),
    ("words.npy", lambda path: np.save(path, np.array([["a", "b"]])), "got <U1"),
    ("pickle.npy", lambda path: np.save(path, np.array([[None]]), allow_pickle=True), "expected an array of depth"),
    ("flat.npy", lambda path: np.save(path, METRES[0]), r"expected depth \(H, W\) or \(N, H, W\), got \(8,\)"),
    ("none.npy", lambda path: np.save(path, METRES[:0]), r"got \(0, 8\)"),
    ("huge.npy", header_only, "expected an array of depth, got: .*"),
    ("huge.npz", header_only, "depth.npy of 40000000000 bytes in .*; was it cut short"),
    ("two.npz", lambda path: np.savez(path, a=METRES, b=METRES), r"no array called depth, .*: a \(6, 8\), b \(6, 8\)"),
    ("zip.npz", lambda path: path.write_bytes(b"PK\3\4" + b"x" * 50), "expected an array of depth, got: "),
]


@pytest.mark.parametrize(("name", "write", "message"), BAD, ids=[name for name, _, _ in BAD])
def test_what_is_no_depth_is_refused(tmp_path: Path, name: str, write: Any, message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        read_depth(tmp_path / name, 0.001)


def test_scales_and_places_that_cannot_be() -> None:
    for scale in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="scale of depth must be finite and positive, got"):
            read_depth("d.npy", scale)
    with pytest.raises(ValueError, match="offset of depth must be finite, got inf"):
        read_depth("d.npy", 1.0, float("inf"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npy: no such file"):
        read_depth("nowhere.npy")
    with pytest.raises(ValueError, match="/dev/null: expected depth, got an empty file"):
        read_depth("/dev/null")


def test_exr_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "OpenEXR", None)
    (tmp_path / "d.exr").write_bytes(b"\x76\x2f\x31\x01")
    with pytest.raises(
        MissingExtraError, match=r'OpenEXR is needed and not installed: pip install "mirage-world\[exr\]"'
    ):
        read_depth(tmp_path / "d.exr")


@pytest.fixture
def save_exr(tmp_path: Path) -> Any:
    openexr = pytest.importorskip("OpenEXR")

    def save(channels: dict[str, np.ndarray], **header: Any) -> Path:
        path = tmp_path / "d.exr"
        given = {"compression": openexr.PIZ_COMPRESSION, "type": openexr.scanlineimage} | header
        with openexr.File(given, channels) as file:
            file.write(str(path))
        return path

    return save


def test_exr(save_exr: Any) -> None:
    other = METRES + 1
    for channels in (
        {"Z": METRES},
        {"V": METRES},
        {"R": METRES},
        {"View.Depth.Z": METRES, "R": other, "G": other, "B": other, "A": other},
        {"ViewLayer.Depth.V": METRES, "Y": other},
        {"R": METRES, "G": METRES, "B": METRES, "A": other},
    ):
        assert np.array_equal(read_depth(save_exr(channels)), METRES), channels
    half = METRES.astype(np.float16)
    assert np.array_equal(read_depth(save_exr({"Z": half})), half.astype(np.float32))
    sky = METRES.copy()
    sky[0] = 1e10
    assert (read_depth(save_exr({"Z": sky}))[0] == 0).all()
    with pytest.raises(ValueError, match=r"d\.exr: expected one channel of depth called Z or depth, got B, G, R"):
        read_depth(save_exr({"R": METRES, "G": other, "B": other}))
    path = save_exr({"Z": METRES})
    content = path.read_bytes()
    for cut in (4, 20, 200, len(content) - 20):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"d\.exr: expected an EXR image with depth, got: "):
            read_depth(path)

"""Depth from the files that people have: PNG, TIFF, EXR, NPY and NPZ.

What a file is, its first bytes say and not its name. Depth is z along the optical axis; 0, negative, NaN and Inf mean
unknown. Integers are depth only with a scale, which says what one step is worth: 0.001 for millimetres, 1/5000 for TUM,
1/256 for KITTI. Among them 0 is unknown, and so is 65535 of 16 bits.
"""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..optional import import_extra
from .images import open_image

DEPTH_SUFFIXES = (".png", ".tiff", ".tif", ".exr", ".npy", ".npz")
MILLIMETRES = 0.001

_NUMPY, _ZIP, _EXR = b"\x93NUMPY", b"PK\x03\x04", b"\x76\x2f\x31\x01"
_BYTES_PER_BYTE = 1100  # a byte of a deflated file is at most 1032 of what it holds
_EXR_BACKGROUND = 1e10  # Blender's depth of nothing


def read_depth(
    path: str | os.PathLike[str], scale: float | None = None, offset: float = 0.0, integer_scale: float | None = None
) -> np.ndarray:
    """Read depth: offset + scale times what the file holds.

    Args:
        path: a 16-bit or float image (PNG, TIFF), EXR (the channel Z or depth, or the only one), NPY, or NPZ (the array
            `depth`, or the only one).
        scale: world units per step of integers, or per unit of floats. None is 1 for floats.
        offset: in world units, of known depth.
        integer_scale: scale of integers where `scale` is None; None refuses them.

    Returns:
        (H, W) or (N, H, W) float32, 0 where integers are unknown. A read-only memory map where the file is an NPY of
        float32 that nothing is done to.

    Raises:
        OSError: no such file, or it cannot be read.
        ValueError: it holds no depth, integers without a scale, or says to be larger than its bytes can hold.
        MissingExtraError: pillow or OpenEXR is not installed. All messages but this one name the file.
    """
    for name, value, least in (("scale", scale, 0.0), ("offset", offset, -math.inf)):
        if value is not None and not (math.isfinite(value) and value > least):
            raise ValueError(f"{name} of depth must be finite{' and positive' * (least == 0)}, got {value}")
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    if not start:
        raise ValueError(f"{path}: expected depth, got an empty file")
    if start.startswith(_NUMPY):
        values = _read_npy(path)
    elif start.startswith(_ZIP):
        values = _read_npz(path)
    elif start.startswith(_EXR):
        values = _read_exr(path)
    else:
        values = _read_image(path)
    return _to_units(_check(values, path), scale, offset, integer_scale, path)


def _check(values: np.ndarray, path: Path) -> np.ndarray:
    shape = values.shape
    if values.ndim == 4 and 1 in (shape[1], shape[3]):  # (N, 1, H, W) and (N, H, W, 1)
        values = values[:, 0] if shape[1] == 1 else values[..., 0]
    if values.ndim not in (2, 3) or not values.size:
        raise ValueError(f"{path}: expected depth (H, W) or (N, H, W), got {shape}")
    if values.dtype.kind not in "uif" or values.dtype.itemsize == 1:
        raise ValueError(f"{path}: expected depth in floats, or in integers of 16 bits or more, got {values.dtype}")
    return values


def _to_units(
    values: np.ndarray, scale: float | None, offset: float, integer_scale: float | None, path: Path
) -> np.ndarray:
    """Convert to float32 world units."""
    integers = values.dtype.kind in "ui"
    if scale is None:
        scale = integer_scale if integers else 1.0
    if scale is None:
        raise ValueError(
            f"{path}: expected a scale for depth in integers ({values.dtype}): --depth-scale, or scale=, such as 0.001"
            " for millimetres"
        )
    if not integers and scale == 1.0 and offset == 0.0:
        return values if values.dtype == np.float32 else values.astype(np.float32)
    depth = np.empty(values.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        # In float64, a buffer at a time: no temporary array of the whole.
        np.multiply(values, np.float64(scale), out=depth, casting="unsafe", dtype=np.float64)
        if offset:
            depth += np.float32(offset)
    if integers:
        depth[values <= 0] = 0.0
        if (values.dtype.kind, values.dtype.itemsize) == ("u", 2):
            depth[values == 65535] = 0.0
    elif offset:
        depth[~(values > 0)] = 0.0
    return depth


def _read_image(path: Path) -> np.ndarray:
    image = open_image(path, single=True)
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        what = "an image of 8 bits" if image.mode in ("L", "1") else "colours"
        raise ValueError(f"{path}: expected depth, one channel of 16 bits or float, got {what} (mode {image.mode})")
    return np.asarray(image)


def _read_npy(path: Path) -> np.ndarray:
    try:
        # Mapped: numpy looks whether the file is as long as its header says before anything is allocated.
        values: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return values
    except OSError:
        raise
    except Exception as error:  # numpy's header parser raises all kinds
        raise ValueError(f"{path}: expected an array of depth, got: {error}") from None


def _read_npz(path: Path) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as archive:
            shapes = {}
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    with archive.open(info) as member:
                        shapes[info.filename] = _declared_shape(member, info)
            name = _choose(shapes)
            with archive.open(name) as member:
                return np.lib.format.read_array(member, allow_pickle=False)
    except Exception as error:  # zipfile's, zlib's and numpy's
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: expected an array of depth, got: {error}") from None


def _declared_shape(member: IO[bytes], info: zipfile.ZipInfo) -> tuple[int, ...]:
    """Read the shape of an array in an archive; check that its bytes are there."""
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{info.filename} of version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    if any(side < 0 for side in shape):
        raise ValueError(f"{info.filename} of shape {shape}")
    declared = math.prod(shape) * dtype.itemsize
    if declared > info.file_size or info.file_size > _BYTES_PER_BYTE * (info.compress_size + 64):
        raise ValueError(f"{info.filename} of {declared} bytes in {info.compress_size}; was it cut short?")
    return tuple(shape)


def _choose(shapes: dict[str, tuple[int, ...]]) -> str:
    """Choose the array of depth by its name, or because there is no other map."""
    maps = [name for name, shape in shapes.items() if len(shape) >= 2]
    for name in ("depth.npy", "depths.npy"):
        if name in maps:
            return name
    if len(maps) != 1:
        held = ", ".join(f"{name.removesuffix('.npy')} {shape}" for name, shape in shapes.items())
        raise ValueError(f"no array called depth, and not one map alone: {held or 'nothing'}")
    return maps[0]


def _read_exr(path: Path) -> np.ndarray:
    openexr = import_extra("OpenEXR", "exr")
    try:
        with openexr.File(str(path), header_only=True) as file:
            if len(file.parts) != 1:
                raise ValueError(f"{len(file.parts)} parts")
            header = file.header()
            low, high = header["dataWindow"]
            pixels = math.prod(int(b) - int(a) + 1 for a, b in zip(low, high, strict=True))
            names = [channel.name for channel in header["channels"]]
            if any((a != b).any() for a, b in zip(header["dataWindow"], header["displayWindow"], strict=True)):
                raise ValueError(f"pixels {low} to {high} alone of the image {header['displayWindow']}")
        length = path.stat().st_size
        if pixels * 2 * len(names) > _BYTES_PER_BYTE * length:
            raise ValueError(f"{pixels} pixels in {length} bytes; was it cut short?")
        with openexr.File(str(path), separate_channels=True) as file:
            channels = {name: channel.pixels for name, channel in file.channels().items()}
    except Exception as error:
        raise ValueError(f"{path}: expected an EXR image with depth, got: {error}") from None
    values = np.asarray(_choose_channel(channels, path), np.float32)
    return np.where(values >= _EXR_BACKGROUND, np.float32(0), values)


def _choose_channel(channels: dict[str, Any], path: Path) -> Any:
    """Choose the channel of depth: by its name, the only one, or grey in R, G and B."""
    named = [name for name in channels if name.split(".")[-1].lower() in ("z", "depth")]
    named = named or [name for name in channels if ".depth." in f".{name.lower()}."]  # Blender's View.Depth.V
    if len(named) == 1:
        return channels[named[0]]
    colours = [values for name, values in channels.items() if name != "A"]
    is_grey = not named and set(channels) <= {"R", "G", "B", "A"}
    if len(colours) == 1 or (is_grey and all(np.array_equal(colours[0], c, equal_nan=True) for c in colours[1:])):
        return colours[0]
    raise ValueError(f"{path}: expected one channel of depth called Z or depth, got {', '.join(channels)}")

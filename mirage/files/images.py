"""Images as people have them, read to one form: upright, in three colours, their values of a known range.

The form is an array (H, W, 3): uint8, or float32 in [0, 1] where the source holds more than 8 bits. The rules:

- Images are turned upright as their EXIF orientation says; of an animation the first frame is taken.
- Grey, palettes and CMYK become RGB. Transparent pixels are laid over white.
- 16-bit grey keeps its 16 bits: 65535 is white. PNG files of 16-bit colours come with the upper 8, as Pillow has them.
- Arrays and tensors: uint8, uint16 (65535 is white), bool, or floats in [0, 1]; floats whose lowest value is negative
  are in [-1, 1], as diffusers has it. Other ranges, NaN and Inf are refused.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..optional import import_extra

_ROUNDING = 1 / 512  # of values at the ends of their range: less than half a step of 8 bits
_CLEARLY_NEGATIVE = -0.1  # between this and 0, an overshoot of resizing in [0, 1] is as likely as values in [-1, 1]
# A byte of a file becomes 1032 bytes at most by deflate, 2730 by LZW: so many pixels, or 8 times as many of one bit.
# The others have no such limit.
_PIXELS_PER_BYTE = 3000
_UNLIMITED = {"WEBP", "AVIF", "JPEG2000"}
_ORIENTATION = 0x0112  # the EXIF tag
_RUNS_PROGRAMS = {"EPS"}  # Pillow has Ghostscript draw these


def read_image(source: Any, name: str = "image") -> np.ndarray:
    """Read an image from a file, a PIL image, an array or a tensor.

    Args:
        source: a path, a PIL image, an array (H, W), (H, W, C) or (1, H, W, C), or a tensor (H, W), (C, H, W) or
            (1, C, H, W), C of 1 (grey), 3 or 4 (with alpha). See the module for what becomes of the values.
        name: the argument's, for messages. A file's is its path.

    Returns:
        (H, W, 3) uint8, or float32 in [0, 1]; not to be written to, as it may be the source's own.

    Raises:
        OSError, TypeError, ValueError: it is no image, or one whose values cannot be understood.
        MissingExtraError: pillow is not installed, and the source is a file.
    """
    if isinstance(source, (str, os.PathLike)):
        return _read_pil(open_image(source), str(source))
    if isinstance(source, Tensor):
        return _read_array(_channels_last(source.detach().cpu(), name), name)
    if isinstance(source, np.ndarray):
        shape = source.shape
        if source.ndim == 4 and shape[0] == 1:
            source = source[0]
        if source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (1, 3, 4)) or not source.size:
            raise ValueError(f"{name} must be (H, W, 3) or (1, H, W, 3) as one ndarray, got {shape}")
        return _read_array(source, name)
    if hasattr(source, "convert") and hasattr(source, "getexif"):
        try:
            source.load()
            upright = _turn_upright(source)
        except Exception as error:  # whatever a broken file that was opened lazily makes of it
            raise ValueError(f"{name} must be a whole image, got: {error}") from None
        return _read_pil(upright, name)
    raise TypeError(f"{name} must be a path, a PIL image, an array or a tensor, got {type(source).__name__}")


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert pixels of :func:`read_image` to a tensor (3, H, W) float32 in [0, 1]."""
    values = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1).contiguous()
    return values.div_(255.0) if pixels.dtype == np.uint8 else values


def to_pil(pixels: np.ndarray) -> Any:
    """Convert pixels of :func:`read_image` to a PIL image of 8 bits."""
    if pixels.dtype != np.uint8:
        pixels = (pixels * 255.0).round().astype(np.uint8)
    return import_extra("PIL.Image", "demo").fromarray(np.ascontiguousarray(pixels))


def read_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a mask from an image file: (H, W) bool, True where any colour is not zero; alpha is not looked at."""
    image = open_image(path)
    if image.mode in ("P", "PA"):
        image = image.convert("RGB")
    values = np.asarray(image)
    if values.ndim == 2:
        return values != 0
    colours = len([band for band in image.getbands() if band not in ("A", "a", "X")])
    mask: np.ndarray = (values[..., :colours] != 0).any(-1)
    return mask


def open_image(path: str | os.PathLike[str], single: bool = False) -> Any:
    """Open and decode an image file; return a PIL image, turned upright as its EXIF says.

    Args:
        path: of the file.
        single: refuse a file of several images; else the first is taken.

    Raises:
        OSError: no such file, or it cannot be read.
        ValueError: it is no whole image, or says to be larger than its bytes can hold. Either message names the file.
        MissingExtraError: pillow is not installed.
    """
    image_module = import_extra("PIL.Image", "demo")
    image_module.init()
    formats = [name for name in image_module.OPEN if name not in _RUNS_PROGRAMS]
    path = Path(path)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    with file:
        try:
            image = image_module.open(file, formats=formats)
            length = os.fstat(file.fileno()).st_size
            most = _PIXELS_PER_BYTE * length * (8 if image.mode in ("1", "L", "P") else 1)
            if image.width * image.height > most and image.format not in _UNLIMITED:
                raise ValueError(f"{image.width}x{image.height} pixels in {length} bytes; was it cut short?")
            if single and getattr(image, "n_frames", 1) != 1:
                raise ValueError(f"{image.n_frames} images in one file")
            image.load()
            return _turn_upright(image)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise all kinds: SyntaxError, KeyError, struct.error, ..
            unknown = isinstance(error, image_module.UnidentifiedImageError)
            reason = "no format that Pillow knows" if unknown else str(error) or type(error).__name__
            raise ValueError(f"{path}: expected an image, got: {reason}") from None


def _turn_upright(image: Any) -> Any:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # EXIF that cannot be read says nothing of the orientation
        return image
    if orientation in (None, 1):
        return image
    upright = import_extra("PIL.ImageOps", "demo").exif_transpose(image)
    upright.format = image.format
    return upright


def _read_pil(image: Any, name: str) -> np.ndarray:
    """Convert an upright PIL image."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "I" and (image.format is None or values.min() < 0 or values.max() > 65535):
            raise ValueError(f"{name} must have 8 or 16 bits or be float, got 32-bit integers in mode I")
        return _read_array(values.astype(np.uint16), name)
    if image.mode == "F":
        return _read_array(np.asarray(image), name)
    try:
        if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
            image = image if image.mode == "RGBA" else image.convert("RGBA")
            white = import_extra("PIL.Image", "demo").new("RGB", image.size, "white")
            white.paste(image, (0, 0), image)
            image = white
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:
        raise ValueError(f"{name} must be convertible to RGB: {error}") from None


def _channels_last(image: Tensor, name: str) -> np.ndarray:
    shape = tuple(image.shape)
    if image.ndim == 4 and shape[0] == 1:
        image = image[0]
    if image.ndim == 3:
        image = image.permute(1, 2, 0)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)) or not image.numel():
        raise ValueError(f"{name} must be (3, H, W) or (1, 3, H, W) as one Tensor, got {shape}")
    return (image.float() if image.is_floating_point() else image).numpy()


def _read_array(values: np.ndarray, name: str) -> np.ndarray:
    """Convert an array (H, W) or (H, W, C)."""
    if values.ndim == 2:
        values = values[..., None]
    alpha = values.shape[2] == 4
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * np.uint8(255)
    elif values.dtype == np.uint16 or (values.dtype == np.uint8 and alpha):
        values = values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)
    elif values.dtype.kind == "f":
        values = _check_range(values.astype(np.float32), name, alpha)
    elif values.dtype != np.uint8:
        raise TypeError(f"{name} must be uint8 or uint16, or float in [0, 1], got {values.dtype}")
    if alpha:
        opacity = values[..., 3:]
        values = values[..., :3] * opacity + (1.0 - opacity)
    return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3)))


def _check_range(values: np.ndarray, name: str, alpha: bool) -> np.ndarray:
    """Return floats in [0, 1], which they are already or in [-1, 1]."""
    least, most = float(values.min()), float(values.max())
    if not np.isfinite([least, most]).all():
        raise ValueError(f"{name} must be finite, got NaN or Inf")
    if least >= -_ROUNDING and most <= 1 + _ROUNDING:
        return values.clip(0.0, 1.0)
    if -1 - _ROUNDING <= least <= _CLEARLY_NEGATIVE and most <= 1 + _ROUNDING and not alpha:
        return (values / 2 + 0.5).clip(0.0, 1.0)
    is_near, is_bytes = least >= -1.1 and most <= 1.1, least >= 0 and most <= 255 + _ROUNDING
    hint = ": clamp it" if is_near else ": convert it to uint8" if is_bytes else ""
    raise ValueError(f"{name} must hold floats in [0, 1], or in [-1, 1], got {least:.4g} to {most:.4g}{hint}")

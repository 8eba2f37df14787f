"""Checks of what a session is started with, all before any heavy work, each naming the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirage_kernels import Cameras

from ..files.framing import Framing
from ..files.images import read_image
from ..models.latent_depth import LatentDepth
from ..optional import import_extra
from ..perception.static_filter import StaticFilter
from .state import DepthSources, SessionConfig

OUTPUT_TYPES = ("np", "pt", "pil", "latent", None)


def check_image(image: Any) -> np.ndarray:
    """Return the pixels of one image, (H, W, 3), out of a path and all that diffusers takes as one image.

    Raises:
        OSError, TypeError, ValueError: it is none, or more than one, see :func:`~mirage.files.images.read_image`.
    """
    if isinstance(image, (list, tuple)):
        if len(image) != 1:
            raise ValueError(f"image must be one image: a session has one scene, got {len(image)}")
        image = image[0]
    return read_image(image)


def fit_cameras(cameras: Cameras, framing: Framing) -> Cameras:
    """Return the cameras of the frames, out of those of the image.

    Raises:
        TypeError, ValueError: they are neither of the image's aspect nor of the frames' size.
    """
    if not isinstance(cameras, Cameras):
        raise TypeError(f"cameras must be mirage_kernels.Cameras, got {type(cameras).__name__}")
    if not framing.fits_cameras(cameras):
        (rows, columns), (height, width), got = framing.image_size, framing.size, cameras.image_size
        raise ValueError(
            f"cameras must have the aspect of the image, {rows}x{columns}, or the frames' size, {height}x{width}, got"
            f" image_size {got[0]}x{got[1]}: crop the image, and move the principal point along"
        )
    return framing.fit_cameras(cameras)


def check_prompts(
    prompt: str | None,
    negative_prompt: str | None,
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    width: int,
) -> None:
    """Check that there is one prompt, as text or as embeddings (1, L, `width`).

    Raises:
        TypeError, ValueError: there is none, or two, or of another shape, or not finite.
        MissingExtraError: a package that text needs is not installed.
    """
    for name, text, embeds in (
        ("prompt", prompt, prompt_embeds),
        ("negative_prompt", negative_prompt, negative_prompt_embeds),
    ):
        if text is not None and embeds is not None:
            raise ValueError(f"{name} and {name}_embeds must not both be given")
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{name} must be one str: a session has one scene, got {type(text).__name__}")
        if embeds is not None and (embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[2] != width):
            raise ValueError(f"{name}_embeds must be (1, L, {width}), got {tuple(embeds.shape)}")
        if embeds is not None and not embeds.isfinite().all():
            raise ValueError(f"{name}_embeds must be finite, got NaN or Inf")
    if prompt is None and prompt_embeds is None:
        raise ValueError("prompt or prompt_embeds must be given, got neither")
    if prompt_embeds is None or negative_prompt_embeds is None:
        import_extra("ftfy", "generate")  # with which diffusers cleans prompts


def check_count(name: str, value: Any, least: int) -> None:
    """Check that a value is an int of at least `least`.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value!r}")


def check_config(config: SessionConfig) -> None:
    """Check the values of a session.

    Raises:
        ValueError: one is out of range.
    """
    if config.decode not in ("chunk", "end"):
        raise ValueError(f'decode must be "chunk" or "end", got {config.decode!r}')
    if config.memory.kind == "pixel" and config.decode != "chunk":
        raise ValueError(f'decode must be "chunk" with a memory of pixels, which are of frames, got {config.decode!r}')
    for name, least in (("num_inference_steps", 1), ("max_reference_frames", 0), ("preceding_frames", 0)):
        check_count(name, getattr(config, name), least)
    for name in ("guidance_scale", "memory_scale", "reference_threshold", "reference_voxel_size", "fps"):
        value = getattr(config, name)
        if name == "reference_voxel_size" and value is None:
            continue
        if not np.isfinite(value) or (name in ("reference_voxel_size", "fps") and value <= 0):
            raise ValueError(f"{name} must be finite, sizes and rates positive, got {value!r}")
    if not isinstance(config.attention_kwargs, (dict, type(None))):
        got = type(config.attention_kwargs).__name__
        raise TypeError(f'attention_kwargs must be a dict such as {{"scale": 0.5}} or None, got {got}')


def check_latents(latents: Tensor | None, channels: int, num_latents: int | None, size: tuple[int, int]) -> None:
    """Check noise that is given: (1, `channels`, F, h, w), F at least `num_latents` where that is known.

    Raises:
        TypeError, ValueError: it is none, of another shape, or not finite.
    """
    if latents is None:
        return
    frames = "F" if num_latents is None else str(num_latents)
    expected = f"(1, {channels}, {frames}, {size[0]}, {size[1]}) float"
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        raise TypeError(f"latents must be {expected}, got {type(latents).__name__}")
    shape = tuple(latents.shape)
    if latents.ndim != 5 or shape[:2] != (1, channels) or shape[3:] != size or num_latents not in (None, shape[2]):
        raise ValueError(f"latents must be {expected}, got {shape}")
    if not latents.isfinite().all():
        raise ValueError("latents must be finite, got NaN or Inf")


def check_generator(generator: Any) -> None:
    """Check that a generator is one, or None.

    Raises:
        TypeError: it is a seed, a list, or anything else.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        why = ": a session has one scene" if isinstance(generator, (list, tuple)) else ""
        got = f"{generator}: pass torch.Generator().manual_seed({generator})"
        got = got if isinstance(generator, int) else type(generator).__name__
        raise TypeError(f"generator must be one torch.Generator{why}, got {got}")


def check_undecoded(decode: str, depth: DepthSources, static_filter: StaticFilter) -> None:
    """Check that nothing needs the frames that `decode="end"` does not give.

    Raises:
        ValueError: an estimator or a filter does.
    """
    if decode == "chunk":
        return
    estimator = depth.estimator
    if estimator is not None and not isinstance(estimator, LatentDepth) and estimator.needs_frames:
        raise ValueError(
            f'decode must be "chunk" with {type(estimator).__name__}, which looks at frames; "end" needs latent_depth'
            " or depth given for every frame"
        )
    if static_filter.needs_frames:
        raise ValueError(
            f'decode must be "chunk" with {type(static_filter).__name__}, which looks at frames; "end" goes with'
            ' static_filter "geometric", "confidence" or "none"'
        )


def check_given_depth(depth: DepthSources, framing: Framing) -> Tensor | None:
    """Return the given depth of frame 0, (1, H, W), as the frame shows it; None where none is given.

    Raises:
        ValueError: it is of another aspect.
    """
    if depth.given is None:
        return None
    return depth.given(None, Cameras.trusted(torch.eye(3)[None], torch.eye(4)[None], framing.size), [0])

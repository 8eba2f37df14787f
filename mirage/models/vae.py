"""Wan VAE latents and frames: the scale the pipelines hold latents in, and `StreamingDecoder`, which decodes a video
piece by piece to the same bits as all at once.

The decoder of `AutoencoderKLWan` is causal: it takes one latent frame at a time and keeps, for each convolution along
time, the last two inputs. `vae.decode` forgets them when it returns, so that pieces decoded by themselves show a seam;
here they are kept from piece to piece, and outside the vae.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, unpatchify
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import get_module_execution_device, unwrap_module
from torch import Tensor

from mirage_kernels.io import replace_tensors

from ..files.checked import parse_tensors

FORMAT = "mirage-streaming-decoder"
VERSION = 1

_REPEAT = "Rep"  # the vae's mark in the cache of a temporal upsampler that has seen the first latent frame only


def normalise_latents(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return (latents - mean) / std per channel, with the bits of the Wan pipelines.

    That is times the reciprocal, in latents' dtype.

    Args:
        vae: whose config holds `latents_mean` and `latents_std`.
        latents: (B, z_dim, F, h, w) float, as the vae encodes them.

    Raises:
        TypeError, ValueError: not such latents.
    """
    mean, reciprocal_std = _latent_scale(vae, latents)
    return (latents - mean) * reciprocal_std


def denormalise_latents(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return latents * std + mean per channel, with the bits of the Wan pipelines.

    They are cast to the vae's dtype, on the device where it computes, then divided by the reciprocal.

    Args:
        vae: whose config holds `latents_mean` and `latents_std`.
        latents: (B, z_dim, F, h, w) float, normalised.

    Raises:
        TypeError, ValueError: not such latents.
    """
    _check_latents(vae, latents)
    latents = latents.to(device=get_module_execution_device(vae), dtype=vae.dtype)
    mean, reciprocal_std = _latent_scale(vae, latents)
    return latents / reciprocal_std + mean


@torch.no_grad()
def encode_frames(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """Encode `frames` to normalised latents (1, z_dim, (N + 3) / 4, h, w) float32: the mode, as the Wan pipelines do.

    Args:
        vae: which encodes in its own dtype, on the device where it computes; the latents are there too.
        frames: (1, 3, N, H, W) float in [-1, 1], N = 4 k + 1, H and W multiples of 8 (Wan 2.1) or 16 (Wan 2.2).

    Raises:
        TypeError, ValueError: not such frames.
    """
    side = vae.spatial_compression_ratio
    expected = f"(1, 3, N, H, W) float with N = 4 k + 1, H and W multiples of {side}"
    _check_float("frames", frames, expected)
    shape = frames.shape
    if len(shape) != 5 or shape[:2] != (1, 3) or shape[2] % 4 != 1 or any(n == 0 or n % side for n in shape[3:]):
        raise ValueError(f"frames must be {expected}, got {tuple(shape)}")
    encoded = vae.encode(frames.to(device=get_module_execution_device(vae), dtype=vae.dtype))
    return normalise_latents(vae, encoded.latent_dist.mode().float())


def encode_static_frame(vae: AutoencoderKLWan, image: Tensor) -> Tensor:
    """Encode what a memory keeps of an image, its static-frame latent (1, z_dim, 1, h, w) float32.

    That is the latent of a video in which nothing moves.

    The VAE is causal, and its first latent frame is of a single image: on the small VAE of configs/tiny another code
    than that of the four frames of every later one; on Wan2.2's own that has not been measured. Of five frames
    alike, the second latent frame is taken.

    Args:
        image: (1, 3, H, W) float in [-1, 1], as of :func:`encode_frames`.
    """
    return encode_frames(vae, image[:, :, None].expand(-1, -1, 5, -1, -1))[:, :, 1:]


@dataclass(frozen=True)
class DecoderState:
    """What a decoder carries from piece to piece. The vae puts new tensors into its caches and writes into none, so
    that a state is never modified and needs no copies.

    Attributes:
        position: latent frames decoded so far.
        size: (h, w) of the latents, (0, 0) at position 0.
        tiling: the vae's tile height and width and their strides in pixels; () where it decodes without tiles.
        features: per tile, row by row, one entry per causal convolution in order of execution: its last inputs
            (1, C, 1 or 2, h', w') in the vae's dtype, None before the first frame, or the vae's mark "Rep".
    """

    position: int = 0
    size: tuple[int, int] = (0, 0)
    tiling: tuple[int, ...] = ()
    features: tuple[tuple[Tensor | str | None, ...], ...] = ()


class StreamingDecoder:
    """Decodes a video's latents in pieces of any length; the frames are those of one `vae.decode` of all of them.

    The bits are those of `vae.decode`. One step needs a word: without tiles the vae applies its 1x1x1 convolution to
    all latent frames at once, and so does this to a piece. A video decoded as one piece is exact always; in several
    pieces it is exact where that convolution rounds alike for any number of frames, which on the CPU it does except
    for grids of a few tokens (2x3), where the last bit may differ. With tiles the vae goes frame by frame:
    always exact.

    The state is the decoder's own: several decoders share one vae, and `vae.encode` and `vae.decode` in between do no
    harm. `vae.enable_tiling()` is honoured, with a state per tile, and so are offloading hooks. Nothing is recorded
    for autograd.

    While a piece is decoded the state before it is kept as well, so that a failure leaves the decoder as it was. With
    Wan 2.2 at 704x1280 in bfloat16 a state takes 3.0 GiB, in tiles of the default size 5.0 GiB; so does its file.

    Args:
        vae: an `AutoencoderKLWan` of either form, 2.1 or 2.2. Its weights must not change within a video.

    Raises:
        TypeError: not an `AutoencoderKLWan`.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        vae = unwrap_module(vae)  # what it calls is inside, where a compiled module is not
        if not isinstance(vae, AutoencoderKLWan):
            raise TypeError(f"vae must be AutoencoderKLWan, got {type(vae).__name__}")
        self.vae = vae
        self._state = DecoderState()

    @property
    def position(self) -> int:
        """Latent frames decoded since the last reset."""
        return self._state.position

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next piece.

        Args:
            latents: (1, z_dim, F, h, w) float, F >= 1, normalised; h and w as in the video's first piece.

        Returns:
            (1, 3, N, H, W) in [-1, 1], in the vae's dtype, where the vae computes. N = 4 F - 3 for the first piece of
            a video, whose first latent frame is one frame; 4 F for any other.

        Raises:
            TypeError, ValueError: not such latents, or the vae's tiling changed within a video. After these and any
                other failure the decoder is as it was.
        """
        before = self._state
        try:
            return torch.cat(list(self.iterate(latents)), dim=2)
        except BaseException:
            self._state = before
            raise

    def iterate(self, latents: Tensor) -> Iterator[Tensor]:
        """Do as :meth:`decode`, one latent frame at a time: its 1 or 4 frames. Memory does not grow with F.

        The arguments are checked at once. The position moves on with each item, so a consumer that stops early may
        continue from there. Meanwhile nothing else may move this decoder: the next item is then a RuntimeError.
        """
        return self._iterate(latents, self._state, self._start(latents))

    def _start(self, latents: Tensor) -> DecoderState:
        """Return the current state, made ready for a video like `latents` if there is none; nothing is touched."""
        _check_latents(self.vae, latents)
        channels, state, size = self.vae.config.z_dim, self._state, (latents.shape[3], latents.shape[4])
        if len(latents) != 1:
            raise ValueError(f"latents must be (1, {channels}, F, h, w), one video, got {tuple(latents.shape)}")
        tiling = _tiling(self.vae, size)
        if not state.position:
            empty = (None,) * len(_causal_convolutions(self.vae))
            return DecoderState(0, size, tiling, (empty,) * len(_tiles(self.vae, size, tiling)))
        if size != state.size:
            expected = f"(1, {channels}, F, {state.size[0]}, {state.size[1]})"
            raise ValueError(f"latents must be {expected} as the video so far, got {tuple(latents.shape)}; or reset()")
        if tiling != state.tiling:
            raise ValueError(f"vae must keep its tiling within a video, {state.tiling}, got {tiling}; or reset()")
        return state

    def _iterate(self, latents: Tensor, expected: DecoderState, state: DecoderState) -> Iterator[Tensor]:
        latents = _prepare(self.vae, latents, state)
        for frame in latents.split(1, dim=2):
            if self._state is not expected:
                raise RuntimeError("the decoder was moved by another call while iterate() was under way")
            frames, state = _decode_frame(self.vae, frame, state)
            self._state = expected = state
            yield frames

    # ----------------------------------------------------------------------------------------------------- its state

    def reset(self) -> None:
        """Forget the video: the next piece is a first one."""
        self._state = DecoderState()

    def snapshot(self) -> DecoderState:
        """Return the state, for :meth:`restore`. Takes no time, and keeps its tensors alive as long as it is held."""
        return self._state

    def restore(self, snapshot: DecoderState) -> None:
        """Go back to a :meth:`snapshot` of this decoder, or of another one with the same vae."""
        if not isinstance(snapshot, DecoderState):
            raise TypeError(f"snapshot must be DecoderState, got {type(snapshot).__name__}")
        self._state = snapshot

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as named tensors.

        They are `layout` (7,) int64, which is position, size and tiling (zeros for none), and
        `tile{i}.convolution{j}`, where an empty tensor stands for the vae's mark "Rep".

        The tensors are the state's own, not copies: do not write into them.
        """
        state = self._state
        named = {"layout": torch.tensor((state.position, *state.size, *(state.tiling or (0, 0, 0, 0))))}
        for i, tile in enumerate(state.features):
            for j, feature in enumerate(tile):
                named[f"tile{i}.convolution{j}"] = feature if isinstance(feature, Tensor) else torch.empty(0)
        return named

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Continue from a :meth:`state_dict`, of any device; the vae moves the tensors when it needs them.

        Raises:
            ValueError: not the state of a decoder whose vae is like this one, with its dtype and tiling. The decoder
                is as it was.
        """
        self._state = _state_from(self.vae, state_dict)

    def save(self, path: str | Path) -> None:
        """Write the state as a safetensors file, in one step: a crash leaves the old file or the new one."""
        metadata = {"format": FORMAT, "version": str(VERSION)}
        replace_tensors(path, self.state_dict(), metadata)

    def load(self, path: str | Path) -> None:
        """Continue from a saved state: the frames that follow are the same bits as without the break.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a whole file, of another format or version, or refused by :meth:`load_state_dict`; the
                message names the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no decoder state at {path}")
        tensors, metadata = parse_tensors(path, path.read_bytes())
        try:
            found = metadata.get("format"), metadata.get("version")
            if found != (FORMAT, str(VERSION)):
                raise ValueError(f"must be of format {FORMAT!r}, version '{VERSION}', got {found[0]!r}, {found[1]!r}")
            self.load_state_dict(tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


# ---------------------------------------------------------------------------------------------- the vae's own steps


@torch.no_grad()
@apply_forward_hook  # an offloaded vae is moved to its device, as by vae.decode
def _prepare(vae: AutoencoderKLWan, latents: Tensor, state: DecoderState) -> Tensor:
    """Return the decoder's input of a piece; with tiles, that of :func:`_decode_frame`, which continues per tile."""
    latents = denormalise_latents(vae, latents)
    return latents if state.tiling else vae.post_quant_conv(latents)


@torch.no_grad()
@apply_forward_hook  # again: between two frames another model may have taken its place
def _decode_frame(vae: AutoencoderKLWan, latent: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
    """Decode one latent frame (1, z_dim, 1, h, w) to frames (1, 3, 1 or 4, H, W), and return the state after it."""
    tiles, features = [], []
    for (rows, columns), cached in zip(_tiles(vae, state.size, state.tiling), state.features, strict=True):
        tile, cache = latent[..., rows, columns], list(cached)
        if state.tiling:
            tile = vae.post_quant_conv(tile)
        tiles.append(vae.decoder(tile, feat_cache=cache, feat_idx=[0], first_chunk=state.position == 0))
        features.append(tuple(cache))
    frames = _blend(vae, tiles, state) if state.tiling else tiles[0]
    frames = unpatchify(frames, vae.config.patch_size or 1).clamp(-1.0, 1.0)
    return frames, replace(state, position=state.position + 1, features=tuple(features))


def _blend(vae: AutoencoderKLWan, tiles: list[Tensor], state: DecoderState) -> Tensor:
    """Blend overlapping tiles to one image, step by step as `vae.tiled_decode` does it, on one latent frame."""
    patch = vae.config.patch_size or 1
    least_height, least_width, stride_height, stride_width = (side // patch for side in state.tiling)
    ratio = vae.spatial_compression_ratio
    height, width = (side * ratio // patch for side in state.size)
    across = len(range(0, state.size[1], state.tiling[3] // ratio))
    rows = [tiles[i : i + across] for i in range(0, len(tiles), across)]
    strips = []
    for i, row in enumerate(rows):
        strip = []
        for j, tile in enumerate(row):
            if i > 0:  # both blends write into the tile, so that its neighbours see it blended
                tile = vae.blend_v(rows[i - 1][j], tile, least_height - stride_height)
            if j > 0:
                tile = vae.blend_h(row[j - 1], tile, least_width - stride_width)
            strip.append(tile[..., :stride_height, :stride_width])
        strips.append(torch.cat(strip, dim=-1))
    return torch.cat(strips, dim=-2)[..., :height, :width]


def _tiling(vae: AutoencoderKLWan, size: tuple[int, int]) -> tuple[int, ...]:
    """Return `DecoderState.tiling` of this vae for latents of `size`."""
    least = vae.tile_sample_min_height, vae.tile_sample_min_width
    ratio = vae.spatial_compression_ratio
    if not vae.use_tiling or all(side <= tile // ratio for side, tile in zip(size, least, strict=True)):
        return ()
    return (*least, vae.tile_sample_stride_height, vae.tile_sample_stride_width)


def _tiles(vae: AutoencoderKLWan, size: tuple[int, int], tiling: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """Return the rows and columns of the latents that each tile covers, in the order of `DecoderState.features`."""
    if not tiling:
        return [(slice(None), slice(None))]
    height, width, step_down, step_right = (side // vae.spatial_compression_ratio for side in tiling)
    tops, lefts = range(0, size[0], step_down), range(0, size[1], step_right)
    return [(slice(top, top + height), slice(left, left + width)) for top in tops for left in lefts]


def _causal_convolutions(vae: AutoencoderKLWan) -> list[WanCausalConv3d]:
    """List the decoder's convolutions along time, in order of execution: each has one entry in the feature cache."""
    return [m for m in vae.decoder.modules() if isinstance(m, WanCausalConv3d) and m.kernel_size[0] > 1]


def _latent_scale(vae: AutoencoderKLWan, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and reciprocal standard deviation, the latter divided in latents' dtype, as the pipelines do."""
    _check_latents(vae, latents)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, 1.0 / std


# ------------------------------------------------------------------------------------------------------------ checks


def _check_float(name: str, value: object, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be {expected}, got {value.dtype}")


def _check_latents(vae: AutoencoderKLWan, latents: Tensor) -> None:
    expected = f"(B, {vae.config.z_dim}, F, h, w) float"
    _check_float("latents", latents, expected)
    if latents.ndim != 5 or latents.shape[1] != vae.config.z_dim or 0 in latents.shape:
        raise ValueError(f"latents must be {expected}, none of them 0, got {tuple(latents.shape)}")


def _state_from(vae: AutoencoderKLWan, named: Mapping[str, Tensor]) -> DecoderState:
    """Return the state that :meth:`StreamingDecoder.state_dict` named, every tensor checked against the vae."""
    layout = named.get("layout")
    if layout is None or layout.shape != (7,) or layout.dtype != torch.int64 or (layout < 0).any():
        raise ValueError(f"layout must be (7,) int64, none negative, got {_describe(layout)}")
    position, height, width, *tiling = layout.tolist()
    state = DecoderState(position, (height, width), tuple(tiling) if any(tiling) else ())
    features = {name: tensor for name, tensor in named.items() if name != "layout"}
    if not position and not features:
        return DecoderState()
    if state.tiling != _tiling(vae, state.size):
        raise ValueError(f"vae must have the tiling of the state, {state.tiling}, got {_tiling(vae, state.size)}")
    convolutions = _causal_convolutions(vae)
    tiles = len(_tiles(vae, state.size, state.tiling))
    names = [[f"tile{i}.convolution{j}" for j in range(len(convolutions))] for i in range(tiles)]
    if set(features) != {name for tile in names for name in tile}:
        expected = f"{tiles} tiles of {len(convolutions)} convolutions as the vae"
        raise ValueError(
            f"the state must hold {expected}, got {len(features)} tensors: {', '.join(sorted(features)[:3])} .."
        )

    def feature(name: str, convolution: WanCausalConv3d) -> Tensor | str:
        tensor = features[name]
        if position == 1 and convolution.kernel_size[1] == 1 and not tensor.numel():  # a temporal upsampler
            return _REPEAT
        channels = convolution.in_channels
        if tensor.ndim != 5 or tensor.shape[:2] != (1, channels) or tensor.dtype != vae.dtype:
            raise ValueError(f"{name} must be (1, {channels}, 1 or 2, h, w) {vae.dtype}, got {_describe(tensor)}")
        return tensor

    loaded = (tuple(feature(*pair) for pair in zip(tile, convolutions, strict=True)) for tile in names)
    return replace(state, features=tuple(loaded))


def _describe(value: Tensor | None) -> str:
    return "nothing" if value is None else f"{tuple(value.shape)} {value.dtype}"

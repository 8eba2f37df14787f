"""`PatchCodec`: images to latents and back without a trained network, so that the demo runs on any laptop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Patches are cropped as densely as this budget allows. On the stereo pair, fitted to the left view alone, the
# right view comes back with 26.85 dB from crops every 16 pixels (the written tokens themselves), 27.08 dB
# every 8, 27.14 dB every 4 and 27.15 dB every 2; on 60 views of a room 16 and 8 give the same, 36.65 dB.
_MAX_PATCHES = 32_768
_STRIDES = (4, 8, 16)


@dataclass(frozen=True)
class PatchCodec:
    """A linear stand-in for the video VAE: the leading PCA coefficients of square RGB patches.

    It makes the shapes of the real thing (48 channels, 16x smaller per side) so that a memory of latents can
    be tried, seen and measured without a GPU or weights to download. Nothing is learned beyond the principal
    components of the views it is fitted to; it has no notion of time, and it decodes every token by itself,
    so that a token read off by half a cell shows as a block moved by half a patch, which a VAE would smooth
    over.

    The basis is orthonormal and not whitened: squared distances between latents are squared distances between
    the images they decode to (before clamping), and a relative latent error is a relative image error.

    Attributes:
        mean: (3 patch^2,) float32, the mean patch; channel, row, column order.
        basis: (C, 3 patch^2) float32, orthonormal rows, largest variance first.
        patch: side of a patch in pixels.
    """

    mean: Tensor
    basis: Tensor
    patch: int

    @classmethod
    def fit(cls, images: Tensor, channels: int = 48, patch: int = 16) -> PatchCodec:
        """Fit the principal components of the patches of `images`: the eigenvectors of their covariance.

        Overlapping patches are used, because a memory shows its tokens shifted against the grid they were
        written on. In float64, each component signed so that its largest entry is positive: on one machine,
        the same images give the same bits at any thread count.

        Args:
            images: (N, 3, H, W) float, in [0, 1].
            channels: coefficients kept per patch, at most 3 patch^2.
            patch: side of a patch in pixels, at most H and W.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        _check_images(images)
        height, width = images.shape[2:]
        if patch < 1 or patch > min(height, width):
            raise ValueError(f"patch must be in [1, {min(height, width)}] for images {height}x{width}, got {patch}")
        size = 3 * patch * patch
        if not 1 <= channels <= size:
            raise ValueError(f"channels must be in [1, {size}] for patches of {patch}x{patch}, got {channels}")
        if len(images) == 0:
            raise ValueError("images must hold at least one image, got none")

        def patches_per_image(stride: int) -> int:
            return ((height - patch) // stride + 1) * ((width - patch) // stride + 1)

        stride = next((s for s in _STRIDES if len(images) * patches_per_image(s) <= _MAX_PATCHES), _STRIDES[-1])
        views = -(-len(images) * patches_per_image(stride) // _MAX_PATCHES)
        with one_thread():
            total = torch.zeros(size, dtype=torch.float64, device=images.device)
            moment = torch.zeros(size, size, dtype=torch.float64, device=images.device)
            count = 0
            for image in images[::views]:  # one at a time: a patch takes 6 KB
                patches = F.unfold(image[None].double(), patch, stride=stride)[0]
                total += patches.sum(1)
                moment += patches @ patches.T
                count += patches.shape[1]
            mean = total / count
            vectors = torch.linalg.eigh(moment / count - mean.outer(mean)).eigenvectors
        components = vectors.T.flip(0)[:channels]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        basis = (components * largest.sign()).float().contiguous()
        return cls(mean.float(), basis, patch)

    @property
    def channels(self) -> int:
        """Coefficients per patch."""
        return self.basis.shape[0]

    def to(self, device: torch.device | str) -> PatchCodec:
        """Move the codec to `device`."""
        return PatchCodec(self.mean.to(device), self.basis.to(device), self.patch)

    def encode(self, images: Tensor) -> Tensor:
        """Encode `images` (N, 3, H, W) float in [0, 1] to latents (N, C, H / patch, W / patch) float32.

        Raises:
            TypeError, ValueError: not such images, or sides that are no multiples of `patch`: cropping moves
                the principal point of their camera, so it is left to whoever holds both.
        """
        _check_images(images)
        p, (count, _, height, width) = self.patch, images.shape
        if height % p or width % p:
            raise ValueError(f"images must have sides that are multiples of {p}, got {height}x{width}")
        patches = images.float().reshape(count, 3, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        latents = (patches.reshape(count, height // p, width // p, -1) - self.mean) @ self.basis.T
        return latents.permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode `latents` (N, C, h, w) float to images (N, 3, h patch, w patch) float32 in [0, 1].

        A latent of zeros, such as a hole of the memory, decodes to the mean patch.

        Raises:
            TypeError, ValueError: not such latents.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"latents must be (N, {self.channels}, h, w) float, got {tuple(latents.shape)}")
        if not latents.is_floating_point():
            raise TypeError(f"latents must be (N, {self.channels}, h, w) float, got {latents.dtype}")
        p, (count, _, height, width) = self.patch, latents.shape
        patches = latents.float().permute(0, 2, 3, 1) @ self.basis + self.mean
        images = patches.reshape(count, height, width, 3, p, p).permute(0, 3, 1, 4, 2, 5)
        return images.reshape(count, 3, height * p, width * p).clamp(0.0, 1.0)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (N, 3, H, W) float in [0, 1], got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be (N, 3, H, W) float in [0, 1], got {images.dtype}")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run what runs on the CPU on one thread: the same bits at any thread count, and no slower.

    The eigenvectors of a 768x768 matrix take thousands of steps too short to share: 0.15 s with one thread,
    0.2 s with two, but 20 s with two on cores that other programs use as well.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

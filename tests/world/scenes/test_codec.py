"""`PatchCodec`: an orthonormal, deterministic PCA of patches that generalises to a view it has not seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mirage.scenes.patch_pca import PatchCodec


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_all_coefficients_are_a_rotation():
    """With as many channels as pixels nothing is lost, and distances between latents are those of images."""
    images = noise(3, 3, 40, 56)
    codec = PatchCodec.fit(images, channels=192, patch=8)
    latents = codec.encode(images)
    assert latents.shape == (3, 192, 5, 7) and latents.dtype == torch.float32
    torch.testing.assert_close(codec.decode(latents), images, atol=1e-5, rtol=0)
    between = (latents[0] - latents[1]).square().sum()
    torch.testing.assert_close(between, (images[0] - images[1]).square().sum(), rtol=1e-4, atol=0)


def test_basis_is_the_leading_eigenvectors():
    images = noise(1, 3, 64, 64).square()
    codec = PatchCodec.fit(images, channels=5, patch=4)
    assert codec.channels == 5
    torch.testing.assert_close(codec.basis @ codec.basis.T, torch.eye(5), atol=1e-6, rtol=0)
    # Independently: every 4x4 crop at stride 4, by slicing, and a singular value decomposition.
    crops = [images[0, :, i : i + 4, j : j + 4].flatten() for i in range(0, 61, 4) for j in range(0, 61, 4)]
    rows = torch.stack(crops).double()
    torch.testing.assert_close(codec.mean, rows.mean(0).float(), atol=1e-6, rtol=0)
    expected = torch.linalg.svd(rows - rows.mean(0)).Vh[:5]
    along = (codec.basis.double() * expected).sum(1)
    torch.testing.assert_close(along.abs(), torch.ones(5, dtype=torch.float64), atol=1e-5, rtol=0)
    assert (codec.basis.gather(1, codec.basis.abs().argmax(1, keepdim=True)) > 0).all()


def test_same_images_same_bits_at_any_thread_count(threads):
    images, codecs = noise(2, 3, 64, 80), []
    for count in (1, 2, 1):
        threads(count)
        codecs.append(PatchCodec.fit(images))
        assert torch.get_num_threads() == count
    for codec in codecs[1:]:
        assert torch.equal(codec.basis, codecs[0].basis) and torch.equal(codec.mean, codecs[0].mean)


def test_fewer_patches_than_values():
    """One patch of 768 values, and nine: no NaN, and what was fitted comes back."""
    for side in (16, 24):
        images = noise(1, 3, side, side)
        codec = PatchCodec.fit(images)
        assert codec.basis.shape == (48, 768) and codec.basis.isfinite().all()
        crop = images[..., :16, :16]
        torch.testing.assert_close(codec.decode(codec.encode(crop)), crop, atol=1e-5, rtol=0)


def test_many_images_are_thinned(monkeypatch: pytest.MonkeyPatch):
    """Past the budget of patches it fits to fewer of them, and still sees every part of the sequence."""
    monkeypatch.setattr("mirage.scenes.patch_pca._MAX_PATCHES", 40)
    images = torch.linspace(0, 1, 20)[:, None, None, None] * noise(20, 3, 32, 64)
    codec = PatchCodec.fit(images, channels=48)
    assert 0.2 < codec.mean.mean() < 0.3  # the mean of ramp x noise is a quarter


def test_zeros_decode_to_the_mean_patch_and_values_are_clamped():
    codec = PatchCodec.fit(noise(1, 3, 48, 48), patch=16)
    image = codec.decode(torch.zeros(1, 48, 1, 2))
    assert torch.equal(image[0, :, :, 16:].flatten(), codec.mean)
    extreme = codec.decode(torch.full((1, 48, 2, 2), 100.0, dtype=torch.bfloat16))
    assert extreme.dtype == torch.float32 and extreme.min() == 0 and extreme.max() == 1


@pytest.mark.slow
def test_generalises_to_the_held_out_view():
    pytest.importorskip("skimage")
    from mirage.scenes.rgbd import stereo_motorcycle

    images = stereo_motorcycle().images
    codec = PatchCodec.fit(images[:1])
    error = (codec.decode(codec.encode(images)) - images).square().mean((1, 2, 3))
    left, right = (-10 * error.log10()).tolist()
    assert left > 27.0 and right > 27.0, (left, right)  # 26.85 dB with the patches of the grid alone


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: PatchCodec.fit(noise(3, 32, 32)),
            ValueError,
            r"images must be \(N, 3, H, W\) float .* got \(3, 32, 32\)",
        ),
        (
            lambda: PatchCodec.fit(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
            TypeError,
            "images must be .* got torch.uint8",
        ),
        (
            lambda: PatchCodec.fit(noise(0, 3, 32, 32)),
            ValueError,
            "images must hold at least one image, got none",
        ),
        (
            lambda: PatchCodec.fit(noise(1, 3, 8, 32)),
            ValueError,
            r"patch must be in \[1, 8\] for images 8x32, got 16",
        ),
        (
            lambda: PatchCodec.fit(noise(1, 3, 32, 32), channels=769),
            ValueError,
            r"channels must be in \[1, 768\] .* 769",
        ),
        (
            lambda: fitted().encode(noise(1, 3, 40, 32)),
            ValueError,
            "images must have sides .* multiples of 16, got 40x32",
        ),
        (lambda: fitted().encode(noise(1, 1, 32, 32)), ValueError, r"images must be .* got \(1, 1, 32, 32\)"),
        (
            lambda: fitted().decode(noise(1, 3, 2, 2)),
            ValueError,
            r"latents must be \(N, 48, h, w\) float, got \(1, 3, 2, 2\)",
        ),
        (
            lambda: fitted().decode(torch.zeros(1, 48, 2, 2, dtype=torch.int64)),
            TypeError,
            "latents must be .* got torch.int64",
        ),
    ],
)
def test_refusals_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def fitted() -> PatchCodec:
    return PatchCodec.fit(noise(1, 3, 32, 32))

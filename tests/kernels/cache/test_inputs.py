"""What a write takes: arrays as people have them, and what it refuses because it may mean two things."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comparison import assert_equal_bits

from mirage_kernels import Cameras, LatentCache

T, C, GRID, IMAGE = 2, 4, (5, 7), (20, 28)


def good(views: int = T, channels: int = C):
    """Latents, depth, cameras and mask of a wall that moves by."""
    random = torch.Generator().manual_seed(0)
    intrinsics = torch.tensor([[20.0, 0.0, 14.0], [0.0, 20.0, 10.0], [0.0, 0.0, 1.0]])
    poses = torch.eye(4).repeat(views, 1, 1)
    poses[:, 0, 3] = torch.arange(views) * 0.7
    depth = 2 + torch.rand(views, *IMAGE, generator=random)
    mask = torch.rand(views, *GRID, generator=random) > 0.2
    mask = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)
    latents = torch.randn(views, channels, *GRID, generator=random)
    return latents, depth, Cameras(intrinsics, poses, IMAGE), mask


def written(latents, depth, cameras, mask):
    cache = LatentCache(latents.shape[1] if latents.ndim == 4 else C, write_policy="append")
    report = cache.write(latents, depth, cameras, mask=mask)
    assert report.written == len(cache) > 30 and report.masked > 5
    return [cache.points, cache.footprints, cache.features, cache.frame_ids]


def frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


SAME = {
    "numpy": lambda latents, depth, mask: (latents.numpy(), depth.numpy(), mask.numpy()),
    "read-only, reversed and of the other byte order": lambda latents, depth, mask: (
        frozen(latents.numpy().copy()),
        depth.numpy()[:, ::-1].copy()[:, ::-1],
        mask.numpy().astype(">f4"),
    ),
    "float64": lambda latents, depth, mask: (latents.double(), depth.double(), mask.double()),
    "numpy float64": lambda latents, depth, mask: (
        latents.numpy() * np.float64(1),
        depth.numpy() * np.float64(1),
        mask,
    ),
    "a channel axis": lambda latents, depth, mask: (latents, depth[:, None], mask[:, None]),
    "numpy with a channel axis": lambda latents, depth, mask: (latents, depth[:, None].numpy(), mask[:, None].numpy()),
    "mask of ints": lambda latents, depth, mask: (latents, depth, mask.long()),
    "mask of bytes": lambda latents, depth, mask: (latents, depth, mask.byte().numpy()),
    "mask of floats": lambda latents, depth, mask: (latents, depth, mask.half()),
    "a pipeline's latents": lambda latents, depth, mask: (latents.transpose(0, 1)[None], depth, mask),
    "a pipeline's latents, contiguous": lambda latents, depth, mask: (
        latents.transpose(0, 1)[None].contiguous(),
        depth,
        mask,
    ),
}


@pytest.mark.parametrize("layout", SAME.values(), ids=SAME)
def test_the_same_in_another_layout(layout):
    latents, depth, cameras, mask = good()
    other = layout(latents, depth, mask)
    assert_equal_bits(written(other[0], other[1], cameras, other[2]), written(latents, depth, cameras, mask))


REFUSED = {
    "batch": (
        lambda x: (x[0].transpose(0, 1)[None].expand(2, C, T, *GRID), *x[1:]),
        ValueError,
        r"latents .*got \(2, 4, 2, 5, 7\).*one sc",
    ),
    "batch, frames first": (
        lambda x: (x[0][None], *x[1:]),
        ValueError,
        r"latents .*\(1, C, T, h, w\).*C = 4 and T = 2",
    ),
    "channels first": (
        lambda x: (x[0].transpose(0, 1), *x[1:]),
        ValueError,
        r"cameras must be 4 views like latents, got 2",
    ),
    "object": (lambda x: (x[0].numpy().astype(object), *x[1:]), TypeError, r"latents must be of numbers, got .*object"),
    "sparse mask": (lambda x: (*x[:3], x[3].to_sparse()), TypeError, r"mask must be a dense tensor, .*sparse_coo"),
    "list": (lambda x: (x[0].tolist(), *x[1:]), TypeError, r"latents must be a tensor"),
    "integer depth": (
        lambda x: (x[0], (x[1] * 1000).short(), x[2], x[3]),
        TypeError,
        r"depth .*int16: integers come in a u",
    ),
    "numpy millimetres": (
        lambda x: (x[0], (x[1] * 1000).numpy().astype(np.uint16), x[2], x[3]),
        TypeError,
        r"depth must be .*float in world units, got .*uint16",
    ),
    "depth, batch kept": (lambda x: (x[0], x[1][None], x[2], x[3]), ValueError, r"depth must be \(T, H, W\)"),
    "depth, channel last": (lambda x: (x[0], x[1][..., None], x[2], x[3]), ValueError, r"depth must be \(T, H, W\)"),
    "mask of 255": (lambda x: (*x[:3], x[3].byte() * 255), ValueError, r"mask must be bool, or 0 and 1.*from 0 to 255"),
    "soft mask": (lambda x: (*x[:3], x[3] * 0.5), ValueError, r"mask must be bool, or 0 and 1 .*from 0 to 0\.5"),
    "mask of NaN": (lambda x: (*x[:3], x[3] * torch.nan), ValueError, r"mask must be bool, or 0 and 1"),
    "mask of another size": (lambda x: (*x[:3], x[3][:1].int()), ValueError, r"mask must be .*with the T of depth, 2"),
}


@pytest.mark.parametrize("spoil, kind, message", REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_written(spoil, kind, message):
    cache = LatentCache(C)
    with pytest.raises(kind, match=message):
        cache.write(*spoil(good()))
    assert len(cache) == cache.num_frames == cache.buffer_version == 0


def test_as_many_frames_as_channels():
    """(1, 3, 3, h, w) may be either: only what says which is which is taken."""
    latents, depth, cameras, mask = good(3, 3)
    for either in (latents[None], latents.transpose(0, 1)[None]):
        with pytest.raises(
            ValueError, match=r"where T and C are equal, .*pass latents\[0\]\.transpose\(0, 1\) or latents\[0\]"
        ):
            LatentCache(3).write(either, depth, cameras, mask)
    assert LatentCache(3).write(latents, depth, cameras, mask).written > 0

"""A cache and autograd: it is no part of a graph, whichever mode it was made in."""

from __future__ import annotations

import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits

from mirage_kernels import Cameras, LatentCache

SIZE, IMAGE, CHANNELS = (5, 7), (25, 35), 4


def frames(seed, views=2):
    rng = np.random.default_rng(seed)
    latents = torch.from_numpy(rng.normal(size=(views, CHANNELS, *SIZE))).float()
    cameras = Cameras(scenes.intrinsics(rng, views, IMAGE), scenes.poses(rng, views), IMAGE, square_pixels=False)
    return latents, scenes.depth_maps(rng, views, IMAGE, 0.2), cameras


def live(cache):
    return [x.clone() for x in cache.tensors().values()]


OPTIONS = [
    {"write_policy": "append"},
    {"merge": "mean", "dtype": torch.float8_e4m3fn, "max_tokens": 40},
    {"capacity": 200},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_cache_of_inference_mode_goes_on_outside_it(tmp_path, options):
    """It is written, grown, offloaded, rolled back, loaded and cleared outside, as one that was never in that mode."""
    expected = LatentCache(CHANNELS, **options)
    with torch.inference_mode():
        cache = LatentCache(CHANNELS, **options)
        cache.write(*frames(1))
        mark = cache.checkpoint()
        cache.save(tmp_path / "cache.safetensors")
        loaded = LatentCache.load(tmp_path / "cache.safetensors")
        cache.offload(frames(1)[2][:0])
    expected.write(*frames(1))
    for one in (cache, loaded):
        one.write(*frames(2))
    cache.rollback(mark)
    for seed in range(2, 20):
        for one in (cache, expected):
            one.write(*frames(seed, 3))
    assert_equal_bits(live(cache), live(expected))
    assert not any(x.is_inference() for x in (*cache.buffers.tensors().values(), cache.buffers.bounds))
    cache.clear()
    cache.write(*frames(1))
    loaded.clear()
    assert len(cache) > 20 and not len(loaded)


@pytest.mark.parametrize("place", [0, 1])
def test_a_gradient_that_a_write_would_lose_is_refused(place):
    cache, arguments = LatentCache(CHANNELS), [*frames(1)]
    arguments[place].requires_grad_()
    with pytest.raises(ValueError, match=f"^{('latents', 'depth')[place]} must not require a gradient"):
        cache.write(*arguments)
    assert len(cache) == 0 and cache.num_frames == 0
    with torch.no_grad():
        assert cache.write(*arguments).written > 0
    assert not cache.read(arguments[2], SIZE).latents.requires_grad

"""float8 features with a scale a token: what is stored, what is read, and that every backend has the same bits."""

from __future__ import annotations

import math

import brute_force
import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits
from hypothesis import given
from hypothesis import strategies as st

from mirage_kernels import (
    Cameras,
    LatentCache,
    bounded_write,
    cache_write,
    splat,
    splat_aligned,
    use_backend,
)
from mirage_kernels.geometry import bounds_rows
from mirage_kernels.quantization import dequantize_rows, quantize_rows

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448 * 2.0**119
VALUES = torch.from_numpy(brute_force.float8_values()).float()
SIZE = (6, 9)


def raw(features):
    return features.cpu().view(torch.uint8)


def float8_cloud(seed, count=200, channels=5, aligned=False):
    """Points, float8 features of any code but NaN, scales, and for splat_aligned the frames."""
    rng = np.random.default_rng(seed)
    points, _, *frames = scenes.written_cloud(rng, count, channels, SIZE[1])
    codes = torch.from_numpy(rng.integers(0, 127, (count, channels)) + 128 * rng.integers(0, 2, (count, channels)))
    scales = torch.from_numpy(rng.integers(115, 130, count)).to(torch.uint8)
    cameras = scenes.intrinsics(rng, 2, SIZE), scenes.poses(rng, 2)
    features = codes.to(torch.uint8).view(FLOAT8)
    return points, features, scales, (*frames, *cameras) if aligned else cameras


def row_of_tokens(rows):
    """latents (1, C, 1, N), depth and cameras such that every row (N, C) is one token, and they come in order."""
    latents = rows.t()[None, :, None].contiguous()
    return latents, torch.ones(1, 1, len(rows)), torch.eye(3)[None], torch.eye(4)[None]


def store(backend, rows):
    """Rows as the backend writes them: codes and scales, and the report."""
    buffers = [backend.put(x) for x in scenes.buffers(len(rows), rows.shape[1])]
    buffers[1] = backend.put(torch.full(rows.shape, 0x55, dtype=torch.uint8).view(FLOAT8))
    scales = backend.put(torch.full((len(rows),), 1, dtype=torch.uint8))
    report = cache_write(*buffers, *[backend.put(x) for x in row_of_tokens(rows)], scales=scales)
    backend.sync()
    return raw(buffers[1]), scales.cpu(), report.cpu()


def show(backend, features, scales, dtype, aligned=False):
    """Each row of features read alone, by a camera that sees token k in cell k: (N, C)."""
    count = len(features)
    points = torch.ones(count, 4)
    points[:, 0], points[:, 1] = torch.arange(count) + 0.5, 0.5
    frames = (torch.zeros(count, dtype=torch.int32), torch.zeros(1, 3)) if aligned else ()
    arguments = [backend.put(x) for x in (points, features, *frames, torch.eye(3)[None], torch.eye(4)[None])]
    options = {"scales": backend.put(scales), "dtype": dtype, **({"sharpness": math.inf} if aligned else {})}
    view = (splat_aligned if aligned else splat)(*arguments, (1, count), **options)
    backend.sync()
    assert view.mask.all() and view.index.flatten().tolist() == list(range(count))
    return view.latents.cpu()[0, :, 0].t().contiguous()


def hard_rows():
    """Rows of 9 float32: every code, what lies halfway between two and around it, at scales from end to end."""
    codes = VALUES[:127].double()
    middle = (codes[1:] + codes[:-1]) / 2
    around = [middle, middle * (1 + 2.0**-23), middle * (1 - 2.0**-24), codes, codes * (1 + 2.0**-22)]
    values = torch.cat(around)
    values = torch.cat([values, values[: -len(values) % 7]]).view(-1, 7).clamp(max=448)
    values[:, ::2] *= -1
    rows = torch.cat([values, values.new_tensor([[448.0, -0.0]]).expand(len(values), 2)], 1)
    return torch.cat([(rows * 2.0**k).float() for k in (-116, -115, -30, -7, -1, 0, 1, 8, 119)])


def leading_rows():
    """Rows that differ in the largest magnitude: around 448 * 2^k for every k, zero, subnormal, and at the end."""
    powers = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)
    largest = torch.cat([powers * factor for factor in (1.0, 1.5, 1.75, 1.75 * (1 + 2.0**-23), 1.8125, 2 - 2.0**-23)])
    largest = torch.cat([largest, torch.tensor([0.0, 2.0**-149 * 3, 2.0**-126 * (1 - 2.0**-23)])]).float()
    largest = largest[largest <= LARGEST]
    parts = (1, -1, 1 / 3, -1e-4, 2.0**-14.5, 0)
    return torch.stack([largest * part for part in parts], 1)


@pytest.mark.parametrize("rows", [hard_rows, leading_rows])
def test_the_definition_is_the_brute_force(rows):
    rows = rows()
    features, scales = quantize_rows(rows)
    expected = [brute_force.quantise(row) for row in rows.numpy()]
    assert features.dtype == FLOAT8 and scales.dtype == torch.uint8 and len(rows) > 700
    assert scales.tolist() == [scale for _, scale in expected]
    assert raw(features).tolist() == [codes for codes, _ in expected]
    values = dequantize_rows(features, scales)
    exact = VALUES.double()[raw(features).long()] * 2.0 ** (scales.double()[:, None] - 127)
    assert values.dtype == torch.float32 and torch.equal(values.double(), exact)
    assert torch.equal(values.bfloat16().float(), values), "exact in bfloat16 too"
    assert not ((values != 0) & (values.abs() < torch.finfo(torch.float32).tiny)).any()


def test_how_far_a_value_is_off():
    rows = torch.from_numpy(np.random.default_rng(0).standard_t(2, (2000, 48))).float()
    features, scales = quantize_rows(rows)
    off = (dequantize_rows(features, scales) - rows).abs()
    step = 2.0 ** (scales.double() - 127 - 9)
    largest = rows.abs().amax(1)
    assert (off <= torch.maximum(rows.abs().double() / 16, step[:, None] / 2)).all()
    assert ((224 < largest / step / 512) & (largest / step / 512 <= 448)).all()
    assert 0.0003 < float((off**2).sum() / (rows**2).sum()) < 0.001


def test_rows_too_large_become_nan():
    """No write stores them, but a mean of two tokens may be one."""
    rows = torch.tensor([[math.inf, 1e30, 3.4e38], [-3e38, -math.inf, 2.98e38], [math.nan, 0.0, 1.0]])
    features, scales = quantize_rows(rows)
    assert scales.tolist() == [246] * 3
    assert raw(features).tolist() == [[0x7F, 0x00, 0x7F], [0xFE, 0xFF, 0x7E], [0x7F, 0x00, 0x00]]


def test_means_past_the_range(kernels):
    """Halfway to the next merge the sum overflows: the same bits as the definition's even then."""
    rows = torch.tensor([[2.9e38, 1.0, -2.9e38, 1e37]])
    results = []
    for backend, put in ((kernels.name, kernels.put), ("reference", lambda x: x)):
        latents, depth, *cameras = row_of_tokens(rows)
        points, _, ids, count = scenes.buffers(5, 4)
        features, scales = torch.zeros(5, 4, dtype=torch.uint8).view(FLOAT8), torch.zeros(5, dtype=torch.uint8)
        free_space_violations, num_observations = torch.zeros(2, 5, dtype=torch.uint8)
        held = [put(x) for x in (points, features, ids, free_space_violations, count)]
        options = {"scales": put(scales), "num_observations": put(num_observations)}
        with use_backend(backend):
            for frame in range(3):
                inputs = [put(x) for x in (torch.zeros(9, 3), latents, depth, *cameras)]
                report = bounded_write(*held, *inputs, first_frame=frame, **options)
                assert report[0 if frame == 0 else 2] == 1
        results.append([raw(held[1]), options["scales"].cpu(), options["num_observations"].cpu()])
    assert_equal_bits(*results)
    assert results[0][0][0].tolist()[::2] == [0x7F, 0xFF]


def test_rows_of_no_channels():
    features, scales = quantize_rows(torch.zeros(3, 0))
    assert features.shape == (3, 0) and scales.tolist() == [11] * 3


@pytest.mark.parametrize("dtype", scenes.DTYPES)
@pytest.mark.parametrize("rows", [hard_rows, leading_rows])
def test_every_backend_stores_what_the_definition_says(kernels, rows, dtype):
    rows = rows().to(dtype)
    rows = rows[(rows.float().abs() <= LARGEST).all(1)]
    codes, scales, report = store(kernels, rows)
    expected, expected_scales = quantize_rows(rows)
    assert report.tolist() == [len(rows), 0, 0, 0, 0, 0] and len(scales.unique()) > 4
    assert_equal_bits([codes, scales], [raw(expected), expected_scales])


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 15, 16, 17, 48, 63, 65, 130])
@pytest.mark.parametrize("dtype", scenes.DTYPES)
def test_rows_of_any_length(kernels, channels, dtype):
    rows = torch.from_numpy(np.random.default_rng(channels).standard_t(1, (45, channels)).clip(-6e4, 6e4)).to(dtype)
    codes, scales, report = store(kernels, rows)
    expected = quantize_rows(rows)
    assert report[0] == 45
    assert_equal_bits([codes, scales], [raw(expected[0]), expected[1]])


@pytest.mark.parametrize("dtype", scenes.DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_latents_too_large_or_not_finite_are_refused(backend, dtype, sign):
    largest = torch.tensor(min(LARGEST, torch.finfo(dtype).max)).to(dtype)
    above = torch.nextafter(largest, torch.tensor(math.inf, dtype=dtype))
    rows = torch.ones(8, 5).to(dtype)
    for k, value in enumerate((largest, above, torch.tensor(math.inf), torch.tensor(math.nan), torch.finfo(dtype).max)):
        rows[k, k] = sign * value
    if dtype == torch.float32:  # every NaN
        rows[5, 4] = torch.tensor(-1 if sign < 0 else 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
        rows[6, 4] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
    fits = rows.float().abs().le(LARGEST).all(1)
    codes, scales, report = store(backend, rows)
    assert fits[0] and not fits[1:4].any() and fits[7]
    kept = int(fits.sum())
    assert report.tolist() == [kept, 0, 0, 0, 0, 8 - kept]
    expected = quantize_rows(rows[fits])
    assert_equal_bits([codes[:kept], scales[:kept]], [raw(expected[0]), expected[1]])


@pytest.mark.parametrize("room", [0, 1, 8, 34, 35, 70])
def test_a_write_leaves_the_other_rows(backend, room):
    """In order, no more than there is room for, and nothing before or behind."""
    rng = np.random.default_rng(3)
    latents = torch.from_numpy(rng.normal(size=(2, 6, 5, 7))).float()
    depth, cameras = torch.full((2, 20, 28), 2.0), (scenes.intrinsics(rng, 2, (20, 28)), scenes.poses(rng, 2))
    points, _, frame_ids, count = (backend.put(x) for x in scenes.buffers(room + 5, 6, held=3))
    features = backend.put((torch.arange((room + 5) * 6) % 119).to(torch.uint8).view(room + 5, 6).view(FLOAT8))
    scales = backend.put(torch.arange(room + 5).to(torch.uint8))
    before = raw(features.clone()), scales.cpu().clone()
    arguments = [backend.put(x) for x in (latents, depth, *cameras)]
    report = cache_write(points, features, frame_ids, count, *arguments, scales=scales)
    backend.sync()
    written = min(room + 2, 70)
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 6)[:written]
    expected = quantize_rows(rows)
    assert report.tolist() == [written, 70 - written, 0, 0, 0, 0] and int(count) == 3 + written
    end = 3 + written
    assert_equal_bits([raw(features)[3:end], scales.cpu()[3:end]], [raw(expected[0]), expected[1]])
    for now, then in zip((raw(features), scales.cpu()), before, strict=True):
        assert_equal_bits([now[:3], now[end:]], [then[:3], then[end:]])


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("out", scenes.DTYPES)
def test_every_code_at_every_scale(backend, out, aligned):
    """One float32 product, whatever the scale, and rounded once more where the latents are narrower."""
    features = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(FLOAT8)
    scales = torch.arange(256).to(torch.uint8)
    got = show(backend, features, scales, out, aligned)
    factors = (torch.arange(256, dtype=torch.int32) << 23).view(torch.float32)
    expected = (VALUES * factors[:, None]).to(out)
    assert torch.equal(got.isnan(), expected.isnan()) and int(expected.isnan().sum()) == 2 * 256 + 2
    assert_equal_bits([got.masked_fill(got.isnan(), 7)], [expected.masked_fill(expected.isnan(), 7)])


@pytest.mark.slow
@given(seed=st.integers(0, 10**6), channels=st.integers(1, 70))
@pytest.mark.parametrize("out", [None, *scenes.DTYPES])
def test_a_read_is_that_of_the_values(backend, out, seed, channels):
    """As of float32 features, bit for bit, and bfloat16 unless said otherwise."""
    dtype = torch.bfloat16 if out is None else out
    for aligned, operator in ((False, splat), (True, splat_aligned)):
        points, features, scales, rest = float8_cloud(seed, channels=channels, aligned=aligned)
        values = dequantize_rows(features, scales)
        arguments = [backend.put(x) for x in rest]
        live = backend.put(torch.tensor(190))
        put = [backend.put(x) for x in (points, features, values, scales)]
        view = operator(put[0], put[1], *arguments, SIZE, scales=put[3], num_points=live, dtype=out)
        expected = operator(put[0], put[2], *arguments, SIZE, num_points=live, dtype=dtype)
        assert view.mask.any() and view.latents.dtype == dtype
        assert_equal_bits(view, expected)


def test_scales_may_be_strided(backend):
    points, features, scales, rest = float8_cloud(4, aligned=True)
    arguments = [backend.put(x) for x in rest]
    views = [
        splat_aligned(
            backend.put(points), backend.put(wide(features)), *arguments, SIZE, scales=backend.put(wide(scales))
        )
        for wide in (lambda x: x, lambda x: torch.stack([x, x], -1)[..., 0])
    ]
    assert views[0].mask.any()
    assert_equal_bits(*views)


def test_float64_points_are_read_by_the_definition():
    points, features, scales, rest = float8_cloud(5)
    view = splat(points.double(), features, *rest, SIZE, scales=scales, dtype=torch.float64)
    values = dequantize_rows(features, scales)
    assert view.mask.any()
    assert_equal_bits(view, splat(points.double(), values, *rest, SIZE, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_the_gradient_to_points_is_that_of_the_values(backend, out):
    points, features, scales, rest = float8_cloud(6, aligned=True)
    values = dequantize_rows(features, scales)
    weights = torch.from_numpy(np.random.default_rng(6).normal(size=(2, 5, *SIZE))).to(out)
    grads = []
    for stored, options in ((features, {"scales": backend.put(scales)}), (values, {})):
        leaf = backend.put(points.clone()).requires_grad_()
        arguments = [backend.put(x) for x in (stored, *rest)]
        view = splat_aligned(leaf, *arguments, SIZE, sharpness=5.0, dtype=out, **options)
        view.latents.backward(backend.put(weights))
        grads.append(leaf.grad.cpu())
    assert int(grads[0].ne(0).any(1).sum()) > 20
    assert_equal_bits([grads[0]], [grads[1]])


@pytest.mark.parametrize("operator", [splat, splat_aligned])
def test_features_may_not_ask_for_a_gradient(operator):
    points, features, scales, rest = float8_cloud(7, aligned=operator is splat_aligned)
    features.requires_grad_()
    with pytest.raises(ValueError, match="features must not require a gradient in float8_e4m3fn"):
        operator(points, features, *rest, SIZE, scales=scales)
    with torch.no_grad():
        assert operator(points, features, *rest, SIZE, scales=scales).mask.any()


# ---------------------------------------------------------------------------------------------- refusals

SPOILT_SCALES = [
    (lambda x: None, TypeError, r"scales must be a tensor, \({n},\) uint8, one for each row of float8_e4m3fn features"),
    (lambda x: x.tolist(), TypeError, r"scales must be a tensor, .*got list"),
    (lambda x: x.int(), ValueError, r"scales must be \({n},\) uint8, .*got \({n},\) int32"),
    (lambda x: x[:-1], ValueError, r"scales must be \({n},\) uint8, .*got \({m},\) uint8"),
    (lambda x: x[:, None], ValueError, r"scales must be \({n},\) uint8, .*got \({n}, 1\) uint8"),
    (lambda x: x.to("meta"), ValueError, r"scales must be on cpu like (points|latents), got meta"),
]


@pytest.mark.parametrize("operator", [splat, splat_aligned, cache_write])
@pytest.mark.parametrize("spoil, kind, message", SPOILT_SCALES)
def test_refused_scales(operator, spoil, kind, message):
    if operator is cache_write:
        count, scales = 60, torch.zeros(60, dtype=torch.uint8)
        points, _, ids, held = scenes.buffers(60, 4)
        features = torch.zeros(60, 4, dtype=torch.uint8).view(FLOAT8)
        arguments = points, features, ids, held, *row_of_tokens(torch.ones(9, 4))
        options, before = {}, [x.clone() for x in (points, ids, held)]
    else:
        points, features, scales, rest = float8_cloud(8, aligned=operator is splat_aligned)
        count, arguments, options = len(points), (points, features, *rest, SIZE), {}
    with pytest.raises(kind, match=message.replace("{n}", str(count)).replace("{m}", str(count - 1))):
        operator(*arguments, scales=spoil(scales), **options)
    if operator is cache_write:
        assert_equal_bits([points, ids, held], before)
        assert not raw(features).any() and not scales.any()
        assert cache_write(*arguments, scales=scales)[0] == 9 and scales[:9].all()
    else:
        assert operator(*arguments, scales=scales).mask.any()
    other = arguments[0], arguments[1].float(), *arguments[2:]
    with pytest.raises(ValueError, match=rf"scales must be None but for float8_e4m3fn features, got \({count},\)"):
        operator(*other, scales=scales)


def test_scales_are_written_in_place():
    points, _, ids, held = scenes.buffers(60, 4)
    features = torch.zeros(60, 4, dtype=torch.uint8).view(FLOAT8)
    arguments = points, features, ids, held, *row_of_tokens(torch.ones(9, 4))
    with pytest.raises(ValueError, match=r"scales must be contiguous, it is written in place, got strides \(2,\)"):
        cache_write(*arguments, scales=torch.zeros(120, dtype=torch.uint8)[::2])
    assert held.item() == 0


@pytest.mark.parametrize("operator", [splat, splat_aligned])
def test_latents_are_never_float8(operator):
    points, features, scales, rest = float8_cloud(9, aligned=operator is splat_aligned)
    with pytest.raises(TypeError, match=r"dtype must be float32, .* or float64, got torch\.float8_e4m3fn"):
        operator(points, features, *rest, SIZE, scales=scales, dtype=FLOAT8)
    latents, *rest = row_of_tokens(torch.ones(9, 4))
    with pytest.raises(TypeError, match=r"latents must be .*float32, float16 or bfloat16, got .* float8_e4m3fn"):
        cache_write(*scenes.buffers(9, 4), latents.to(FLOAT8), *rest)


# ---------------------------------------------------------------------------------------------- the cache


def write_room(dtype, device="cpu", **options):
    cache = LatentCache(48, dtype=dtype, device=device, **{"write_policy": "append", **options})
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        latents = torch.from_numpy(rng.normal(size=(2, 48, 5, 7))).float()
        cameras = Cameras(scenes.intrinsics(rng, 2, (25, 35)), scenes.poses(rng, 2), (25, 35), square_pixels=False)
        depth = scenes.depth_maps(rng, 2, (25, 35))
        cache.write(latents.to(device), depth.to(device), cameras)
    return cache, cameras.to(device)


def test_a_cache_holds_what_the_operator_writes(backend):
    cache, cameras = write_room(FLOAT8, backend.device)
    exact, _ = write_room(torch.float32, backend.device)
    features, scales = quantize_rows(exact.features.cpu())
    n = len(cache)
    assert n == len(exact) > 100 and cache.features.dtype == torch.float32
    assert_equal_bits([raw(cache.buffers.features[:n]), cache.buffers.scales[:n].cpu()], [raw(features), scales])
    assert_equal_bits([cache.features.cpu()], [dequantize_rows(features, scales)])
    assert_equal_bits([cache.points.cpu(), cache.frame_ids.cpu()], [exact.points.cpu(), exact.frame_ids.cpu()])
    for options in ({"splat": "nearest"}, {"splat": "aligned"}):
        got, expected = cache.read(cameras, SIZE, **options), exact.read(cameras, SIZE, **options)
        assert got.latents.dtype == torch.bfloat16 and got.mask.any()
        assert_equal_bits([x.cpu() for x in got[1:]], [x.cpu() for x in expected[1:]])
        error = (got.latents.float() - expected.latents) ** 2
        assert 0 < float(error.sum() / (expected.latents**2).sum()) < 2e-3


def test_bytes_of_a_token():
    cache, _ = write_room(FLOAT8, capacity=500)
    rows = bounds_rows(len(cache))
    assert cache.nbytes - cache.frame_centers.nbytes == len(cache) * (16 + 4 + 48 + 1) + 24 * rows
    assert cache.nbytes_allocated - 500 * 69 <= 1024 * 12 + 8 + 24 * (2 + 1)
    assert "48 float8_e4m3fn channels" in repr(cache)
    cache.clear()
    assert cache.nbytes == 0


def test_rollback_and_growth():
    """Buffers that move take their scales along."""
    cache, _ = write_room(FLOAT8)
    whole, _ = write_room(FLOAT8, capacity=2000)
    mark, features = cache.checkpoint(), cache.features
    version = cache.buffer_version
    for seed in range(3, 9):
        rng = np.random.default_rng(seed)
        latents = torch.from_numpy(rng.normal(size=(2, 48, 5, 7)) * 2.0**seed).float()
        cameras = Cameras(scenes.intrinsics(rng, 2, (25, 35)), scenes.poses(rng, 2), (25, 35), square_pixels=False)
        for one in (cache, whole):
            one.write(latents, torch.full((2, 25, 35), 2.0), cameras)
    assert cache.buffer_version > version and len(cache.buffers.scales[: len(cache)].unique()) > 6
    assert_equal_bits([cache.features], [whole.features])
    cache.rollback(mark)
    assert_equal_bits([cache.features], [features])


def test_to_another_device():
    cache, _ = write_room(FLOAT8)
    copy = cache.to("meta")
    assert copy.dtype == FLOAT8 and copy.device.type == "meta"


@pytest.mark.cuda
def test_to_a_gpu_and_back():
    cache, cameras = write_room(FLOAT8)
    there = cache.to("cuda")
    assert_equal_bits([there.features.cpu(), there.to("cpu").features], [cache.features] * 2)
    assert_equal_bits(there.read(cameras.to("cuda"), SIZE), cache.read(cameras, SIZE))


# ---------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("name", ["write", "splat", "splat_aligned"])
def test_any_number_of_threads(cpu_backend, name, threads):
    rng = np.random.default_rng(11)
    latents = torch.from_numpy(rng.normal(size=(6, 48, 22, 40))).float()
    depth = scenes.depth_maps(rng, 6, (88, 160), 0.05)
    cameras = Cameras(scenes.intrinsics(rng, 6, (88, 160)), scenes.poses(rng, 6), (88, 160), square_pixels=False)

    def run(backend="cpu"):
        with use_backend(backend):
            cache = LatentCache(48, dtype=FLOAT8)
            report = cache.write(latents, depth, cameras)
            if name == "write":
                return [raw(cache.buffers.features[: len(cache)]), cache.buffers.scales[: len(cache)], report.counts]
            return cache.read(cameras, (22, 40), splat=name.replace("splat_", "").replace("splat", "nearest"))

    threads(1)
    first = run()
    assert (first[2] if name == "write" else first[1]).sum() > 1000
    for number in (2, 4):
        threads(number)
        for _ in range(5):
            assert_equal_bits(run(), first)
    assert_equal_bits(run("reference"), first)

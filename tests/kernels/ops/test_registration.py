"""What PyTorch is told about the operators: schemas, fakes, autograd, and that `torch.compile` takes them whole."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import shutil

import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits

from mirage_kernels import (
    back_project,
    block_bounds,
    cache_write,
    splat,
    splat_aligned,
    use_backend,
    view_overlap,
)
from mirage_kernels.constants import INVALID
from mirage_kernels.geometry import bounds_rows, z_order
from mirage_kernels.ops.operator import FAMILIES, OPERATORS

SIZE = (5, 7)
IMAGE = (23, 36)
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
FLOAT8 = torch.float8_e4m3fn
WITH_SCALES = ("splat", "splat_aligned", "splat_aligned_backward", "cache_write", "bounded_write", "cache_compact")


def operator_arguments(name, seed=0, count=200, views=2, dtype=torch.float32, masked=True):
    """Arguments of a private operator, in the order of its schema; they give non-trivial results."""
    rng = np.random.default_rng(seed)
    depth = scenes.depth_maps(rng, views, IMAGE, 0.1)
    mask = scenes.static_masks(rng, views, IMAGE, 0.01) if masked else None
    points, features = scenes.cloud(rng, count, 6, dtype)
    image_cameras = scenes.intrinsics(rng, views, IMAGE), scenes.poses(rng, views)
    cameras = scenes.intrinsics(rng, views, SIZE), image_cameras[1]
    live = torch.tensor(count - 3) if masked else None
    if name == "back_project":
        return depth, *image_cameras, mask, *SIZE, False
    bounds = block_bounds(points) if masked else None
    if name == "splat":
        return points, features, live, *cameras, *SIZE, 0.05, torch.bfloat16 if masked else dtype, bounds
    if name == "splat_backward":
        index = torch.from_numpy(rng.integers(-1, count, (views, *SIZE)))
        for t in range(views):  # a token wins one cell of a view at most
            index[t].view(-1)[1:] = torch.from_numpy(rng.permutation(count)[: SIZE[0] * SIZE[1] - 1])
        return torch.from_numpy(rng.normal(size=(views, 6, *SIZE))).to(dtype), index, count, dtype
    if name.startswith("splat_aligned"):
        points, features, *frames = scenes.written_cloud(rng, count, 6, SIZE[1], dtype)
        if name == "splat_aligned":
            out = torch.bfloat16 if masked else dtype
            bounds = block_bounds(points) if masked else None
            return points, features, live, *frames, *cameras, *SIZE, 0.05, 20.0, out, bounds
        arguments = points, features, live, *frames, *cameras, *SIZE, 0.05, 20.0, torch.float32
        keys = OPERATORS["splat_aligned"].overloads["compiled"](*arguments)[4]
        grad = torch.from_numpy(rng.normal(size=(views, 6, *SIZE))).to(dtype)
        return grad, points, features, *frames, *cameras, keys, 20.0, masked
    if name == "cache_write":
        latents = torch.from_numpy(rng.normal(size=(views, 6, *SIZE))).to(dtype)
        buffers = scenes.buffers(60, 6, dtype, held=2)
        bounds = torch.zeros(2, 6) if masked else None
        return *buffers, latents, depth, *image_cameras, mask, 5, False, 0.1, 2.4, bounds
    if name in ("bounded_write", "cache_compact"):
        points, features, frame_ids, count = scenes.buffers(60, 6, dtype, held=40)
        free_space_violations = torch.from_numpy(rng.choice([0, 1, INVALID], 60)).byte()
        num_observations = torch.ones(60, dtype=torch.uint8) if masked else None
        bounds = block_bounds(points, num_points=count) if masked else None
        held = points, features, frame_ids.abs(), free_space_violations, num_observations, count
        if name == "cache_compact":
            return *held, 15, bounds
        latents = torch.from_numpy(rng.normal(size=(views, 6, *SIZE))).to(dtype)
        views_of = latents, depth, *image_cameras, mask, z_order(SIZE), 61
        return *held, torch.zeros(63, 3), *views_of, False, 0.1, 2.4, 0.05, 2, 2, bounds
    if name == "block_bounds":
        return points, live, torch.zeros(bounds_rows(count), 6)
    return points, live, *cameras, cameras[0][:1], cameras[1][:1], *SIZE, 0.5, 0.05, bounds


def float8_arguments(name):
    """Those of a private operator with float8 features and their scales."""
    arguments = list(operator_arguments(name))
    position = 2 if name == "splat_aligned_backward" else 1
    arguments[position] = arguments[position].to(FLOAT8)
    scales = torch.from_numpy(np.random.default_rng(3).integers(120, 130, len(arguments[position]))).to(torch.uint8)
    return *arguments, scales


def family(kernels):
    return "triton" if kernels.name == "triton" else "compiled"


def non_trivial(name, results):
    if results is None:  # what is written in place has tests of its own
        return True
    results = results if isinstance(results, (tuple, list)) else [results]
    return all(bool(x.any()) or x.numel() == 0 for x in results) and (
        name not in ("splat", "splat_aligned") or int(results[1].sum()) > 5
    )


# ---------------------------------------------------------------------------------------------- schemas and fakes


def test_every_operator_has_a_schema_per_family():
    """Without any compiled module: the operators' folders alone define them."""
    for family in FAMILIES:
        for name, declared in OPERATORS.items():
            operator = declared.overloads[family]
            assert str(operator._schema).startswith(f"mirage::{name}_{family}(")
            assert str(operator._schema).count("Tensor") >= declared.schema.count("Tensor")
            assert torch.Tag.pt2_compliant_tag in operator.tags


@pytest.mark.parametrize("name", OPERATORS)
def test_definition_and_triton_kernels_take_the_arguments_of_the_schema(name):
    operator = OPERATORS[name]
    functions = [operator.reference] if operator.reference else []
    folder = name.removesuffix("_backward")
    if importlib.util.find_spec("triton") is not None:
        functions.append(getattr(importlib.import_module(f"mirage_kernels.ops.{folder}.triton"), name))
    for function in functions:
        assert tuple(inspect.signature(function).parameters) == operator.arguments


@pytest.mark.parametrize("name", OPERATORS)
def test_fakes_give_the_shapes_and_dtypes_of_the_real_results(native_kernels, name):
    operator = OPERATORS[name].overloads[family(native_kernels)]
    for masked in (False, True):
        arguments = [native_kernels.put(x) for x in operator_arguments(name, masked=masked)]
        real = operator(*arguments)
        assert non_trivial(name, real)
        fake = operator(*[x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments])
        if real is None:
            assert fake is None
            continue
        pairs = zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (real, fake)), strict=True)
        for ours, theirs in pairs:
            assert theirs.device.type == "meta"
            assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("masked", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_opcheck(native_kernels, name, masked, dtype):
    """Schema, autograd registration, fake tensors, and AOT dispatch with dynamic shapes."""
    operator = OPERATORS[name].overloads[family(native_kernels)]
    arguments = [native_kernels.put(x) for x in operator_arguments(name, dtype=dtype, masked=masked)]
    assert non_trivial(name, operator(*[x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]))
    if name in ("splat", "splat_aligned") and dtype == torch.float32:
        arguments[1] = arguments[1].requires_grad_()
    if name == "splat_aligned" and dtype == torch.float32 and masked:
        arguments[0] = arguments[0].requires_grad_()
    torch.library.opcheck(operator, tuple(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_SCALES)
def test_float8_features(native_kernels, name):
    """The same of operators with scales, and that they change what their schemas say, on which PyTorch's own check of
    schemas fails: it multiplies."""
    operator = OPERATORS[name].overloads[family(native_kernels)]
    arguments = [native_kernels.put(x) for x in float8_arguments(name)]
    real = operator(*[x.clone() if isinstance(x, torch.Tensor) else x for x in arguments])
    fake = operator(*[x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments])
    for ours, theirs in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (real, fake)), strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
    if name == "splat_aligned":
        arguments[0] = arguments[0].requires_grad_()
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, tuple(arguments), test_utils=checks)
    before = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    operator(*arguments)
    for now, then, given in zip(arguments, before, operator._schema.arguments, strict=True):
        if isinstance(now, torch.Tensor):
            same = torch.equal(*(x.detach().flatten().view(torch.uint8) for x in (now, then)))
            written = given.alias_info is not None and given.alias_info.is_write
            # What bounded writes change in place depends on what is held: they may leave some of it as it was.
            assert same or written, given.name
            assert not same or not written or name in ("bounded_write", "cache_compact"), given.name


# ---------------------------------------------------------------------------------------------- gradients


@pytest.mark.slow
def test_gradcheck_of_the_definition():
    rng = np.random.default_rng(1)
    points, features = scenes.cloud(rng, 40, 3)
    cameras = scenes.intrinsics(rng, 2, SIZE), scenes.poses(rng, 2)
    features = features.double().requires_grad_()
    assert splat(points, features, *cameras, SIZE).mask.sum() > 10

    def latents(values):
        return splat(points, values, *cameras, SIZE).latents

    assert torch.autograd.gradcheck(latents, (features,))
    assert torch.autograd.gradgradcheck(latents, (features,))


@pytest.mark.parametrize("dtype", scenes.DTYPES)
@pytest.mark.parametrize("out", scenes.DTYPES)
def test_backward_is_that_of_the_definition(kernels, dtype, out):
    rng = np.random.default_rng(2)
    points, features = scenes.cloud(rng, 300, 11, dtype)
    cameras = scenes.intrinsics(rng, 4, SIZE), scenes.poses(rng, 4)
    weights = torch.from_numpy(rng.normal(size=(4, 11, *SIZE))).to(out)

    def gradient(put):
        leaf = put(features.clone()).requires_grad_()
        view = splat(put(points), leaf, *[put(x) for x in cameras], SIZE, dtype=out)
        view.latents.backward(put(weights))
        return leaf.grad.cpu()

    got = gradient(kernels.put)
    with use_backend("reference"):
        expected = gradient(lambda x: x)
    assert (expected != 0).any(1).sum() > 50
    assert_equal_bits([got], [expected])


def test_backward_operator_is_the_definition(kernels):
    for dtype in scenes.DTYPES:
        arguments = operator_arguments("splat_backward", dtype=dtype)
        got = OPERATORS["splat_backward"].overloads[family(kernels)](*[kernels.put(x) for x in arguments])
        assert got.any()
        assert_equal_bits([got], [OPERATORS["splat_backward"].reference(*arguments)])


def test_float64_latents_backward(cpu_backend):
    """float64 belongs to the definition: with no backend forced the gradient of float64 latents flows all the same."""
    rng = np.random.default_rng(3)
    points, features = scenes.cloud(rng, 40, 3)
    cameras = scenes.intrinsics(rng, 2, SIZE), scenes.poses(rng, 2)
    features.requires_grad_()
    with use_backend(None):
        splat(points, features, *cameras, SIZE, dtype=torch.float64).latents.sum().backward()
    assert features.grad.dtype == torch.float32 and features.grad.any()


# ---------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture(params=COMPILERS)
def compiler(request):
    """A `torch.compile` backend, with fresh caches."""
    if request.param == "inductor" and shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler for inductor")
    torch._dynamo.reset()
    yield request.param
    torch._dynamo.reset()


def scene(seed, count, views, size):
    rng = np.random.default_rng(seed)
    points, features = scenes.cloud(rng, count, 6)
    return points, features, scenes.intrinsics(rng, views, size), scenes.poses(rng, views)


SIZES = [(200, 2, (5, 7)), (333, 3, (4, 9)), (101, 4, (6, 6))]


@pytest.mark.slow
def test_compile_splat(native_kernels, compiler):
    """One graph for every number of tokens, views and cells, and the same bits as without."""

    def read(points, features, intrinsics, cam2world, height, width):
        bounds = block_bounds(points * 1.0)
        view = splat(
            points * 1.0, features, intrinsics, cam2world, (height, width), dtype=torch.bfloat16, bounds=bounds
        )
        return view.latents + 1, view.mask, view.depth, view.index

    compiled = torch.compile(read, fullgraph=True, dynamic=True, backend=compiler)
    for k, (count, views, size) in enumerate(SIZES):
        arguments = [native_kernels.put(x) for x in scene(k, count, views, size)]
        expected = read(*arguments, *size)
        assert expected[1].sum() > 5
        assert_equal_bits(compiled(*arguments, *size), expected)


@pytest.mark.slow
def test_compile_splat_backward(native_kernels, compiler):
    def loss(points, features, intrinsics, cam2world, height, width):
        return (splat(points, features, intrinsics, cam2world, (height, width)).latents ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=compiler)
    for k, (count, views, size) in enumerate(SIZES[:2]):
        points, features, *cameras = [native_kernels.put(x) for x in scene(k, count, views, size)]
        grads = []
        for function in (loss, compiled):
            leaf = features.clone().requires_grad_()
            function(points, leaf, *cameras, *size).backward()
            grads.append(leaf.grad)
        assert grads[0].any()
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_compile_splat_aligned(native_kernels, compiler):
    """One graph for every number of tokens, views and cells; the bits, and the gradients, of the plain call."""

    def read(points, features, frame_ids, frame_centers, intrinsics, cam2world, height, width):
        bounds = block_bounds(points)
        view = splat_aligned(
            points, features, frame_ids, frame_centers, intrinsics, cam2world, (height, width), bounds=bounds
        )
        return view.latents * 1.0, view.mask, view.depth, view.index

    compiled = torch.compile(read, fullgraph=True, dynamic=True, backend=compiler)
    for k, (count, views, size) in enumerate(SIZES):
        rng = np.random.default_rng(k)
        tokens = scenes.written_cloud(rng, count, 6, size[1])
        cameras = scenes.intrinsics(rng, views, size), scenes.poses(rng, views)
        results = []
        for function in (read, compiled):
            arguments = [native_kernels.put(x.clone()) for x in (*tokens, *cameras)]
            leaves = [x.requires_grad_() for x in arguments[:2]]
            seen = function(*arguments, *size)
            results.append([*seen, *torch.autograd.grad((seen[0] ** 2).sum(), leaves)])
        assert results[0][1].sum() > 5 and results[0][4].any() and results[0][5].any()
        assert_equal_bits(results[1][:4], results[0][:4])
        for got, expected in zip(results[1][4:], results[0][4:], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compile_float8(native_kernels, compiler):
    """A write and reads of what it wrote, with scales, in one graph."""

    def write_and_read(points, features, scales, frame_ids, count, latents, depth, intrinsics, cam2world):
        report = cache_write(
            points, features, frame_ids, count, latents * 1.0, depth, intrinsics, cam2world, scales=scales
        )
        live = {"scales": scales, "num_points": count}
        nearest = splat(points, features, intrinsics, cam2world, SIZE, **live)
        aligned = splat_aligned(points, features, frame_ids, points[:9, :3], intrinsics, cam2world, SIZE, **live)
        return report + 1, nearest.latents * 1.0, aligned.latents * 1.0, aligned.mask

    compiled = torch.compile(write_and_read, fullgraph=True, dynamic=True, backend=compiler)
    for k, views in enumerate((2, 3)):
        rng = np.random.default_rng(k)
        latents = torch.from_numpy(rng.normal(size=(views, 6, *SIZE))).float()
        cameras = scenes.intrinsics(rng, views, SIZE), scenes.poses(rng, views)
        arguments = [native_kernels.put(x) for x in (latents, scenes.depth_maps(rng, views, SIZE, 0.1), *cameras)]
        results = []
        for function in (write_and_read, compiled):
            points, features, frame_ids, count = scenes.buffers(150, 6)
            features, scales = (features.to(torch.uint8) % 100).view(FLOAT8), torch.full((150,), 127, dtype=torch.uint8)
            buffers = [native_kernels.put(x) for x in (points, features, scales, frame_ids, count)]
            results.append([*function(*buffers, *arguments), *buffers])
        assert results[0][0][0] > 20 and results[0][3].sum() > 20 and results[0][2].any()
        assert_equal_bits(results[1], results[0])


@pytest.mark.slow
def test_compile_back_project(native_kernels, compiler):
    def lift(depth, intrinsics, cam2world, mask, height, width):
        lifted = back_project(depth * 1.0, intrinsics, cam2world, (height, width), mask=mask)
        return lifted.points * 2, lifted.valid

    compiled = torch.compile(lift, fullgraph=True, dynamic=True, backend=compiler)
    rng = np.random.default_rng(4)
    for views, image_size, size in ((2, (23, 36), (5, 7)), (3, (31, 22), (4, 6)), (4, (40, 40), (8, 5))):
        arguments = scenes.depth_maps(rng, views, image_size), scenes.intrinsics(rng, views, image_size)
        arguments += scenes.poses(rng, views), scenes.static_masks(rng, views, image_size, 0.01)
        arguments = [native_kernels.put(x) for x in arguments]
        expected = lift(*arguments, *size)
        assert expected[1].any()
        assert_equal_bits(compiled(*arguments, *size), expected)


@pytest.mark.slow
def test_compile_view_overlap(native_kernels, compiler):
    def overlap(points, intrinsics, cam2world, height, width):
        targets = intrinsics[:1], cam2world[:1]
        return view_overlap(points, intrinsics, cam2world, *targets, (height, width), voxel_size=0.5) * 2

    compiled = torch.compile(overlap, fullgraph=True, dynamic=True, backend=compiler)
    for k, (count, views, size) in enumerate(SIZES):
        points, _, *cameras = [native_kernels.put(x) for x in scene(k, count, views, size)]
        expected = overlap(points, *cameras, *size)
        assert (expected > 0).all()
        assert_equal_bits([compiled(points, *cameras, *size)], [expected])


@pytest.mark.slow
def test_compile_cache_write(native_kernels, compiler):
    """The in-place buffers are written in the compiled graph too, and only they."""

    def write(points, features, frame_ids, count, bounds, latents, depth, intrinsics, cam2world):
        buffers = points, features, frame_ids, count
        report = cache_write(*buffers, latents * 1.0, depth, intrinsics, cam2world, first_frame=3, bounds=bounds)
        return report + 1

    compiled = torch.compile(write, fullgraph=True, dynamic=True, backend=compiler)
    rng = np.random.default_rng(5)
    for views, image_size, size in ((2, (23, 36), (5, 7)), (3, (31, 22), (4, 6)), (4, (40, 40), (8, 5))):
        arguments = [
            torch.from_numpy(rng.normal(size=(views, 6, *size))).float(),
            scenes.depth_maps(rng, views, image_size),
            scenes.intrinsics(rng, views, image_size),
            scenes.poses(rng, views),
        ]
        arguments = [native_kernels.put(x) for x in arguments]
        buffers = [
            [native_kernels.put(x) for x in (*scenes.buffers(200, 6, held=4), torch.zeros(2, 6))] for _ in range(2)
        ]
        expected, got = write(*buffers[0], *arguments), compiled(*buffers[1], *arguments)
        assert expected[0] > 20
        assert_equal_bits([got, *buffers[1]], [expected, *buffers[0]])

"""Every refusal names the argument, what was expected and what came; what would be written in place is untouched."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scenes
import torch
from comparison import assert_equal_bits

from mirage_kernels import Cameras, available_backends, back_project, cache_write, splat, use_backend, view_overlap

GRID = (5, 7)
IMAGE = (23, 36)


def good(operator):
    """Keyword arguments of a call that succeeds."""
    rng = np.random.default_rng(0)
    depth, mask = scenes.depth_maps(rng, 2, IMAGE), scenes.static_masks(rng, 2, IMAGE)
    cameras = {"intrinsics": scenes.intrinsics(rng, 2, IMAGE), "cam2world": scenes.poses(rng, 2)}
    cells = {**cameras, "intrinsics": scenes.intrinsics(rng, 2, GRID)}
    points, features = scenes.cloud(rng, 60, 4)
    if operator is back_project:
        return {"depth": depth, **cameras, "size": GRID, "mask": mask}
    if operator is splat:
        return {"points": points, "features": features, **cells, "size": GRID, "num_points": torch.tensor(50)}
    if operator is cache_write:
        names = ("points", "features", "frame_ids", "count")
        latents = torch.from_numpy(rng.normal(size=(2, 4, *GRID))).float()
        buffers = dict(zip(names, scenes.buffers(100, 4, held=3), strict=True))
        return {**buffers, "latents": latents, "depth": depth, **cameras, "mask": mask}
    targets = {f"target_{name}": value[:1].clone() for name, value in cells.items()}
    return {"points": points, **cells, **targets, "size": GRID, "num_points": torch.tensor([50]), "voxel_size": 1.0}


def meta(x):
    return x.to("meta")


COMMON_CAMERAS = [
    ("intrinsics", lambda x: x[0], ValueError, r"intrinsics must be \(T, 3, 3\) float, got \(3, 3\) float64"),
    ("intrinsics", lambda x: x[:, :2], ValueError, r"intrinsics must be \(T, 3, 3\) float, got \(2, 2, 3\) float64"),
    ("intrinsics", lambda x: x.int(), TypeError, r"intrinsics must be \(T, 3, 3\) float, got \(2, 3, 3\) int32"),
    ("intrinsics", lambda x: x.tolist(), TypeError, r"intrinsics must be a tensor, \(T, 3, 3\) float, got list"),
    ("intrinsics", meta, ValueError, r"intrinsics must be on cpu like {like}, got meta"),
    ("cam2world", lambda x: x[:, :3], ValueError, r"cam2world must be \(T, 4, 4\) float, got \(2, 3, 4\) float64"),
    ("cam2world", lambda x: x[None], ValueError, r"cam2world must be \(T, 4, 4\) float, got \(1, 2, 4, 4\) float64"),
    ("cam2world", lambda x: x.bool(), TypeError, r"cam2world must be \(T, 4, 4\) float, got \(2, 4, 4\) bool"),
    ("cam2world", lambda x: None, TypeError, r"cam2world must be a tensor, \(T, 4, 4\) float, got NoneType"),
    ("cam2world", meta, ValueError, r"cam2world must be on cpu like {like}, got meta"),
    (
        "cam2world",
        lambda x: x[:1],
        ValueError,
        r"cam2world must be \(T, 4, 4\) with the T of intrinsics, 2, got \(1, 4, 4\)",
    ),
]
COMMON_SIZE = [
    ("size", lambda x: 5, ValueError, r"size must be \(height, width\), two positive integers, got 5"),
    (
        "size",
        lambda x: (5, 7, 3),
        ValueError,
        r"size must be \(height, width\), two positive integers, got \(5, 7, 3\)",
    ),
    ("size", lambda x: (0, 7), ValueError, r"size must be \(height, width\), two positive integers, got \(0, 7\)"),
    ("size", lambda x: (5, -7), ValueError, r"size must be \(height, width\), two positive integers, got \(5, -7\)"),
    ("size", lambda x: (5.0, 7.0), ValueError, r"size must be \(height, width\), two positive .*got \(5\.0, 7\.0\)"),
    ("size", lambda x: (True, 7), ValueError, r"size must be \(height, width\), two positive .*got \(True, 7\)"),
    (
        "size",
        lambda x: ("5", "7"),
        (TypeError, ValueError),
        r"size must be \(height, width\), two positive .*got \('5', '7'\)",
    ),
    (
        "size",
        lambda x: (None, 7),
        (TypeError, ValueError),
        r"size must be \(height, width\), two positive .*got \(None, 7\)",
    ),
]
HUGE_SIZE = [
    ("size", lambda x: (2**16, 2**16), ValueError, r"size must have fewer than 2\^31 cells, got \(65536, 65536\)"),
]
COMMON_POINTS = [
    ("points", lambda x: x[:, :3], ValueError, r"points must be \(N, 4\) float32: x, y, z, footprint, got \(60, 3\)"),
    ("points", lambda x: x[0], ValueError, r"points must be \(N, 4\) float32: x, y, z, footprint, got \(4,\)"),
    ("points", lambda x: x.half(), TypeError, r"points must be \(N, 4\) float32.*got \(60, 4\) float16"),
    ("points", lambda x: x.numpy(), TypeError, r"points must be a tensor, \(N, 4\) float32.*got ndarray"),
    ("num_points", lambda x: 50, TypeError, r"num_points must be a tensor, one int64.*got int 50"),
    ("num_points", lambda x: x.int(), ValueError, r"num_points must be one int64, got .*int32"),
    ("num_points", lambda x: torch.tensor([1, 2]), ValueError, r"num_points must be one int64, got \(2,\) int64"),
    ("num_points", meta, ValueError, r"num_points must be on cpu like points, got meta"),
    ("near", lambda x: -0.1, ValueError, r"near must be a finite depth >= 0 in world units, got -0\.1"),
    ("near", lambda x: math.nan, ValueError, r"near must be a finite depth >= 0 in world units, got nan"),
    ("near", lambda x: math.inf, ValueError, r"near must be a finite depth >= 0 in world units, got inf"),
]
COMMON_DEPTH = [
    ("depth", lambda x: x[0], ValueError, r"depth must be \(T, H, W\) float, got \(23, 36\) float32"),
    ("depth", lambda x: x[:, None], ValueError, r"depth must be \(T, H, W\) float, got \(2, 1, 23, 36\) float32"),
    ("depth", lambda x: x.nan_to_num(0, 0, 0).int(), TypeError, r"depth must be \(T, H, W\).*got \(2, 23, 36\) int32"),
    ("depth", lambda x: [1.0], TypeError, r"depth must be a tensor, \(T, H, W\) float, got list \[1\.0\]"),
    (
        "depth",
        lambda x: x[:, :4],
        ValueError,
        r"depth must be .*at least as fine as the token grid \(5, 7\), got \(2, 4, 36\)",
    ),
    (
        "depth",
        lambda x: x[:, :, :6],
        ValueError,
        r"depth must be .*at least as fine as the .* \(5, 7\), got \(2, 23, 6\)",
    ),
    ("depth_sampling", lambda x: "mean", ValueError, r"depth_sampling must be one of median, bilinear, got 'mean'"),
    ("depth_sampling", lambda x: None, ValueError, r"depth_sampling must be one of median, bilinear, got None"),
    (
        "mask",
        lambda x: x.float(),
        TypeError,
        r"mask must be \(T, H, W\) bool, True = static, got \(2, 23, 36\) float32",
    ),
    ("mask", lambda x: x.numpy(), TypeError, r"mask must be a tensor, \(T, H, W\) bool, True = static, got ndarray"),
    ("mask", lambda x: x[0], ValueError, r"mask must be \(T, H, W\) bool, True = static, got \(23, 36\) bool"),
    ("mask", lambda x: x[:1], ValueError, r"mask must be \(T, H, W\) with the T of depth, 2, got \(1, 23, 36\) bool"),
    (
        "mask",
        lambda x: x[:, :4],
        ValueError,
        r"mask must be .*at least as fine as the token grid \(5, 7\), got \(2, 4, 36\)",
    ),
    ("mask", meta, ValueError, r"mask must be on cpu like depth, got meta"),
]


def like(cases, name):
    return [(argument, spoil, kind, message.replace("{like}", name)) for argument, spoil, kind, message in cases]


CASES = {
    back_project: [
        *COMMON_DEPTH,
        *COMMON_SIZE,
        *like(COMMON_CAMERAS, "depth"),
        ("depth", lambda x: x[:1], ValueError, r"mask must be \(T, H, W\) with the T of depth, 1, got \(2, 23, 36\)"),
    ],
    splat: [
        *COMMON_POINTS,
        *COMMON_SIZE,
        *HUGE_SIZE,
        *like(COMMON_CAMERAS, "points"),
        ("features", lambda x: x[0], ValueError, r"features must be \(N, C\) float, got \(4,\) float32"),
        (
            "features",
            lambda x: x[:59],
            ValueError,
            r"features must be \(N, C\) with the N of points, 60, got \(59, 4\)",
        ),
        ("features", lambda x: x.int(), TypeError, r"features must be \(N, C\) float, got \(60, 4\) int32"),
        ("features", lambda x: x.to(torch.complex64), TypeError, r"features must be \(N, C\) float, got .*complex64"),
        ("features", lambda x: None, TypeError, r"features must be a tensor, \(N, C\) float, got NoneType None"),
        ("features", meta, ValueError, r"features must be on cpu like points, got meta"),
        (
            "dtype",
            lambda x: torch.int32,
            TypeError,
            r"dtype must be float32, float16, bfloat16 or float64, got torch\.int32",
        ),
        ("dtype", lambda x: "float16", TypeError, r"dtype must be float32, float16, bfloat16 or float64, got float16"),
    ],
    cache_write: [
        *COMMON_DEPTH,
        *like(COMMON_CAMERAS, "latents"),
        ("depth", lambda x: x.double(), TypeError, r"depth must be .*float32, float16 or bfloat16, got .*float64"),
        (
            "depth",
            lambda x: x.expand(2, *IMAGE)[:1],
            ValueError,
            r"mask must be .* with the T of depth, 1, got \(2, 23, 36\)",
        ),
        ("latents", lambda x: x[0], ValueError, r"latents must be \(T, C, h, w\) float, got \(4, 5, 7\) float32"),
        (
            "latents",
            lambda x: x.double(),
            TypeError,
            r"latents must be \(T, C, h, w\) float32.*got \(2, 4, 5, 7\) float64",
        ),
        ("latents", lambda x: x.int(), TypeError, r"latents must be \(T, C, h, w\) float32.*got \(2, 4, 5, 7\) int32"),
        ("latents", lambda x: [x], TypeError, r"latents must be a tensor, \(T, C, h, w\) float, got list"),
        ("latents", lambda x: x[:, :, :0], ValueError, r"latents.*two positive integers, got \(0, 7\)"),
        (
            "latents",
            lambda x: x[:1],
            ValueError,
            r"depth must be \(T, H, W\) with the T of latents, 1, got \(2, 23, 36\)",
        ),
        ("latents", meta, ValueError, r"depth must be on meta like latents, got cpu"),
        ("latents", lambda x: x[:, :3], ValueError, r"features must be \(100, 3\) float32.*got \(100, 4\) float32"),
        (
            "points",
            lambda x: x[:, :3].contiguous(),
            ValueError,
            r"points must be \(N, 4\) float32.*got \(100, 3\) float32",
        ),
        ("points", lambda x: x.double(), ValueError, r"points must be \(100, 4\) float32, got \(100, 4\) float64"),
        ("points", meta, ValueError, r"points must be on cpu like latents, got meta"),
        ("points", scenes.strided, ValueError, r"points must be contiguous.*got strides \(18, 2\)"),
        ("points", lambda x: x[:99], ValueError, r"features must be \(99, 4\) float32.*got \(100, 4\) float32"),
        ("features", lambda x: x[:, :3], ValueError, r"features must be \(100, 4\) float32 or.*got \(100, 3\) float32"),
        (
            "features",
            lambda x: x.double(),
            ValueError,
            r"features must be \(100, 4\) float32 or.*got \(100, 4\) float64",
        ),
        ("features", lambda x: x.int(), ValueError, r"features must be \(100, 4\) float32 or.*got \(100, 4\) int32"),
        ("features", lambda x: x.T.contiguous().T, ValueError, r"features must be contiguous.*got strides \(1, 100\)"),
        ("features", meta, ValueError, r"features must be on cpu like latents, got meta"),
        ("features", lambda x: None, TypeError, r"features must be a tensor.*got NoneType None"),
        ("frame_ids", lambda x: x[:99], ValueError, r"frame_ids must be \(100,\) int32, got \(99,\) int32"),
        ("frame_ids", lambda x: x.long(), ValueError, r"frame_ids must be \(100,\) int32, got \(100,\) int64"),
        ("frame_ids", lambda x: x.repeat(2)[::2], ValueError, r"frame_ids must be contiguous.*got strides \(2,\)"),
        ("frame_ids", meta, ValueError, r"frame_ids must be on cpu like latents, got meta"),
        ("count", lambda x: x.int(), ValueError, r"count must be \(1,\) int64, got \(1,\) int32"),
        ("count", lambda x: torch.tensor([1, 2]), ValueError, r"count must be one int64, got \(2,\) int64"),
        ("count", lambda x: 3, TypeError, r"count must be a tensor.*got int 3"),
        ("count", meta, ValueError, r"count must be on cpu like latents, got meta"),
        (
            "min_depth",
            lambda x: -1.0,
            ValueError,
            r"min_depth must be in \[0, max_depth\], got min_depth=-1\.0, max_depth=inf",
        ),
        ("min_depth", lambda x: math.nan, ValueError, r"min_depth must be in \[0, max_depth\], got min_depth=nan"),
        ("max_depth", lambda x: -2.0, ValueError, r"min_depth must be in \[0, max_depth\], got .*max_depth=-2\.0"),
        ("max_depth", lambda x: math.nan, ValueError, r"min_depth must be in \[0, max_depth\], got .*max_depth=nan"),
        (
            "first_frame",
            lambda x: -1,
            ValueError,
            r"first_frame must be an int >= 0 with room for 2 frames in int32, got -1",
        ),
        (
            "first_frame",
            lambda x: 2**31 - 2,
            ValueError,
            r"first_frame must be .* room for 2 frames in int32, got 2147483646",
        ),
    ],
    view_overlap: [
        *COMMON_POINTS,
        *COMMON_SIZE,
        *HUGE_SIZE,
        *like(COMMON_CAMERAS, "points"),
        ("target_intrinsics", lambda x: x[0], ValueError, r"target_intrinsics must be \(T, 3, 3\) float, got \(3, 3\)"),
        (
            "target_intrinsics",
            lambda x: x.int(),
            TypeError,
            r"target_intrinsics must be \(T, 3, 3\) float, got .*int32",
        ),
        ("target_intrinsics", meta, ValueError, r"target_intrinsics must be on cpu like points, got meta"),
        ("target_cam2world", lambda x: x[0], ValueError, r"target_cam2world must be \(T, 4, 4\) float, got \(4, 4\)"),
        (
            "target_cam2world",
            lambda x: x.repeat(3, 1, 1),
            ValueError,
            r"target_cam2world must be \(T, 4, 4\) with the T of target_intrinsics, 1, got \(3, 4, 4\)",
        ),
        ("voxel_size", lambda x: 0.0, ValueError, r"voxel_size must be a finite length > 0 in world units, got 0\.0"),
        ("voxel_size", lambda x: -0.1, ValueError, r"voxel_size must be a finite length > 0 in world units, got -0\.1"),
        (
            "voxel_size",
            lambda x: math.nan,
            ValueError,
            r"voxel_size must be a finite length > 0 in world units, got nan",
        ),
        (
            "voxel_size",
            lambda x: math.inf,
            ValueError,
            r"voxel_size must be a finite length > 0 in world units, got inf",
        ),
    ],
}
PARAMETERS = [
    pytest.param(operator, *case, id=f"{operator.__name__}-{case[0]}-{k}")
    for operator, cases in CASES.items()
    for k, case in enumerate(cases)
]


def some_result(result):
    return bool((result if isinstance(result, torch.Tensor) else result[1]).any())


@pytest.mark.parametrize("operator", CASES)
def test_the_good_calls_are_good(backend, operator):
    """What the cases below spoil one argument of."""
    arguments = {name: backend.put(value) for name, value in good(operator).items()}
    assert some_result(operator(**arguments))


@pytest.mark.parametrize("operator, argument, spoil, kind, message", PARAMETERS)
def test_message(operator, argument, spoil, kind, message):
    """Checks come before the choice of a backend, so they are the same for all."""
    arguments = good(operator)
    before = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    spoilt = {**arguments, argument: spoil(arguments.get(argument))}
    given = spoilt[argument].clone() if isinstance(spoilt[argument], torch.Tensor) else None
    with pytest.raises(kind, match=message) as caught:
        operator(**spoilt)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    unchanged = [(x, before[name]) for name, x in arguments.items() if isinstance(x, torch.Tensor)]
    assert_equal_bits(*zip(*unchanged, strict=True))
    if given is not None and not given.is_meta:
        assert_equal_bits([spoilt[argument]], [given])
    # Nothing is left behind either: the same call with the argument put right succeeds.
    assert some_result(operator(**arguments))


@pytest.mark.parametrize("cls", [splat, view_overlap])
@pytest.mark.parametrize("near", [None, "near"])
def test_near_of_another_type(cls, near):
    with pytest.raises((TypeError, ValueError), match="near must be"):
        cls(**{**good(cls), "near": near})


def test_views_that_do_not_match_the_depth():
    arguments = good(back_project)
    arguments["intrinsics"], arguments["cam2world"] = arguments["intrinsics"][:1], arguments["cam2world"][:1]
    with pytest.raises(ValueError, match=r"intrinsics must be \(T, 3, 3\) with the T of depth, 2, got \(1, 3, 3\)"):
        back_project(**arguments)
    arguments = good(cache_write)
    before = [arguments[name].clone() for name in ("points", "features", "frame_ids", "count")]
    arguments["intrinsics"], arguments["cam2world"] = arguments["intrinsics"][:1], arguments["cam2world"][:1]
    with pytest.raises(ValueError, match=r"intrinsics must be \(T, 3, 3\) with the T of latents, 2, got \(1, 3, 3\)"):
        cache_write(**arguments)
    assert_equal_bits([arguments[name] for name in ("points", "features", "frame_ids", "count")], before)


def test_depth_without_pixels():
    arguments = {**good(back_project), "mask": None, "depth_sampling": "bilinear"}
    arguments["depth"] = arguments["depth"][:, :0]
    with pytest.raises(
        ValueError, match=r"depth must be \(T, H, W\) with at least one pixel, got \(2, 0, 36\) float32"
    ):
        back_project(**arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("operator", CASES)
def test_tensors_on_another_device(operator):
    arguments = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in good(operator).items()}
    assert some_result(operator(**arguments))
    with pytest.raises(ValueError, match=r"cam2world must be on cuda:0 like \w+, got cpu"):
        operator(**{**arguments, "cam2world": arguments["cam2world"].cpu()})


# ---------------------------------------------------------------------------------------------- backends


OTHER_LAYOUTS = {
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.reshape(1, -1).to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors)")
@pytest.mark.parametrize("operator", CASES, ids=lambda operator: operator.__name__)
@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_tensors_of_another_layout(operator, layout):
    arguments = good(operator)
    tensors = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 4
    for name in tensors:
        spoilt = {**arguments, name: OTHER_LAYOUTS[layout](arguments[name])}
        with pytest.raises(TypeError, match=f"^{name} must be a dense tensor, .*got one of layout {layout}"):
            operator(**spoilt)


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors)")
@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_cameras_of_another_layout(layout):
    good_ones = {"intrinsics": torch.eye(3), "cam2world": torch.eye(4)[None]}
    for name, value in good_ones.items():
        with pytest.raises(TypeError, match=f"^{name} must be a dense float tensor, .*got (a )?{layout}"):
            Cameras(**{**good_ones, name: OTHER_LAYOUTS[layout](value)}, image_size=(4, 4))


def test_a_read_that_does_not_fit(cpu_backend):
    """As torch says it: an error that speaks of memory, whatever the operator allocates first."""
    points, features = scenes.cloud(np.random.default_rng(0), 5, 4)
    cameras = (
        torch.eye(3, dtype=torch.float64).repeat(2**16, 1, 1),
        torch.eye(4, dtype=torch.float64).repeat(2**16, 1, 1),
    )
    with pytest.raises(RuntimeError, match=r"out of memory: could not allocate a tensor of \(65536, .*32768"):
        splat(points, features, *cameras, (2**15, 2**15))


def test_every_backend_says_why():
    status = available_backends()
    assert list(status) == ["cuda", "triton", "cpu", "reference"]
    assert status["reference"] and status["reference"].available is True
    for name, backend in status.items():
        assert backend.reason and backend.available == bool(backend), name
    status["reference"] = None
    assert available_backends()["reference"], "a copy, not the registry itself"


def test_forcing_a_missing_backend():
    missing = [(name, status.reason) for name, status in available_backends().items() if not status]
    if not missing:
        pytest.skip("every backend is available here")
    for name, reason in missing:
        with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: ") as caught:
            use_backend(name)
        assert reason in str(caught.value)
    assert some_result(splat(**good(splat)))


@pytest.mark.parametrize("name", ["", "Reference", "opencl", 3])
def test_forcing_an_unknown_backend(name):
    with pytest.raises(ValueError, match="backend must be one of cuda, triton, cpu, reference or None, got") as caught:
        use_backend(name)
    assert repr(name) in str(caught.value)


def test_float64_with_a_forced_kernel_backend(kernels):
    for operator, name in ((splat, "points"), (splat, "features"), (back_project, "depth"), (view_overlap, "points")):
        arguments = {key: kernels.put(value) for key, value in good(operator).items()}
        assert some_result(operator(**arguments))
        arguments[name] = arguments[name].double()
        message = f"backend '{kernels.name}' works in float32, got float64: only 'reference' computes in float64"
        with pytest.raises(RuntimeError, match=message):
            operator(**arguments)
    with pytest.raises(RuntimeError, match="works in float32, got float64"):
        splat(**{key: kernels.put(value) for key, value in good(splat).items()}, dtype=torch.float64)


@pytest.mark.parametrize("operator", CASES)
def test_a_forced_backend_on_tensors_it_cannot_take(kernels, operator):
    if kernels.device.type == "cuda":
        arguments, device = good(operator), "cpu"
        if kernels.name == "triton":
            pytest.skip("Triton takes CPU tensors under its interpreter")
    else:
        arguments = {key: meta(x) if isinstance(x, torch.Tensor) else x for key, x in good(operator).items()}
        device = "meta"
    with pytest.raises(RuntimeError, match=f"backend '{kernels.name}' runs on .* tensors, got {device}"):
        operator(**arguments)


def test_use_backend_nests_and_undoes():
    double = {**good(splat), "points": good(splat)["points"].double()}
    if not available_backends()["cpu"]:
        pytest.skip(available_backends()["cpu"].reason)
    with use_backend("cpu"):
        with use_backend("reference"):
            assert some_result(splat(**double))
        with pytest.raises(RuntimeError, match="works in float32"):
            splat(**double)
        with pytest.raises(ZeroDivisionError), use_backend(None):
            assert some_result(splat(**double))
            raise ZeroDivisionError
        with pytest.raises(RuntimeError, match="works in float32"):
            splat(**double)
    assert some_result(splat(**double))

"""`Cameras`: what it holds, what it refuses, and what indexing, resizing and copying keep."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mirage_kernels.cameras import Cameras

SIZE = (480, 640)


def rotations(views: int, seed: int = 0) -> torch.Tensor:
    """(views, 3, 3) float64, random and right-handed."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(views, 3, 3, dtype=torch.float64, generator=generator))
    return q * torch.linalg.det(q).sign()[:, None, None]


def arrays(views: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    intrinsics = torch.zeros(views, 3, 3, dtype=torch.float64)
    intrinsics[:, 0, 0] = 500 + torch.arange(views)
    intrinsics[:, 1, 1] = 510 + torch.arange(views)
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = 321.25, 237.75, 1
    cam2world = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    cam2world[:, :3, :3] = rotations(views, seed)
    cam2world[:, :3, 3] = torch.randn(views, 3, dtype=torch.float64, generator=generator)
    return intrinsics, cam2world


def make(views: int, seed: int = 0) -> Cameras:
    return Cameras(*arrays(views, seed), SIZE)


def assert_same(got: Cameras, expected: Cameras) -> None:
    assert got.image_size == expected.image_size
    for name in ("intrinsics", "cam2world"):
        a, b = getattr(got, name), getattr(expected, name)
        assert a.dtype == torch.float64 and a.is_contiguous()
        assert torch.equal(a, b), name


def project(cameras: Cameras, points: torch.Tensor) -> torch.Tensor:
    """(T, N, 2) pixel coordinates of world points (N, 3), written out independently of the library."""
    world2cam = torch.linalg.inv(cameras.cam2world)
    camera = torch.einsum("tij,nj->tni", world2cam[:, :3, :3], points) + world2cam[:, None, :3, 3]
    pixels = torch.einsum("tij,tnj->tni", cameras.intrinsics, camera)
    return pixels[..., :2] / pixels[..., 2:]


# ---------------------------------------------------------------------------------------------- what it holds


def test_holds_what_it_was_given() -> None:
    intrinsics, cam2world = arrays(3)
    cameras = Cameras(intrinsics, cam2world, list(SIZE))
    assert len(cameras) == 3
    assert cameras.image_size == SIZE and isinstance(cameras.image_size, tuple)
    assert torch.equal(cameras.intrinsics, intrinsics)
    assert torch.equal(cameras.cam2world, cam2world)
    assert torch.equal(cameras.centers, cam2world[:, :3, 3]) and cameras.centers.is_contiguous()
    assert cameras.device == torch.device("cpu")
    assert repr(cameras) == "Cameras(3 views, image_size=(480, 640), device='cpu')"


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.float(),
        lambda x: x.float().numpy(),
        lambda x: x.float().numpy().astype(np.longdouble),
        lambda x: x.float().numpy().astype(">f4"),
        lambda x: x.float().tolist(),
        lambda x: list(x.float()),
        lambda x: tuple(x.float().numpy()),
        lambda x: x.float().transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.float().flip(0).numpy()[::-1],
        lambda x: x.float().requires_grad_(),
    ],
)
def test_takes_arrays_of_any_kind(convert) -> None:
    intrinsics, cam2world = arrays(3)
    cameras = Cameras(convert(intrinsics), convert(cam2world), SIZE)
    assert_same(cameras, Cameras(intrinsics.float(), cam2world.float(), SIZE))
    assert not cameras.cam2world.requires_grad


def test_low_precision_is_widened() -> None:
    intrinsics, cam2world = arrays(2)
    cameras = Cameras(intrinsics.to(torch.bfloat16), cam2world.half(), SIZE)
    assert torch.equal(cameras.intrinsics, intrinsics.to(torch.bfloat16).double())
    assert torch.equal(cameras.cam2world, cam2world.half().double())


@pytest.mark.parametrize("convert", [lambda x: x, lambda x: x.numpy()])
def test_copies_its_input(convert) -> None:
    intrinsics, cam2world = arrays(2)
    cameras = Cameras(convert(intrinsics), convert(cam2world), SIZE)
    intrinsics.zero_()
    cam2world.zero_()
    assert_same(cameras, make(2))


def test_one_intrinsics_matrix_serves_all_views() -> None:
    intrinsics, cam2world = arrays(3)
    shared = Cameras(intrinsics[1], cam2world, SIZE)
    assert_same(shared, Cameras(intrinsics[1].expand(3, 3, 3), cam2world, SIZE))


def test_no_views() -> None:
    for empty in (make(0), make(2)[:0], make(2)[[]], Cameras(arrays(1)[0][0], np.zeros((0, 4, 4)), SIZE)):
        assert len(empty) == 0 and list(empty) == []
        assert empty.intrinsics.shape == (0, 3, 3) and empty.cam2world.shape == (0, 4, 4)
        assert empty.world2cam.shape == (0, 4, 4) and empty.centers.shape == (0, 3)
        assert empty.resized((2, 3)).image_size == (2, 3)


def test_bottom_row_is_made_exact() -> None:
    intrinsics, cam2world = arrays(2)
    cam2world[1, 3] = torch.tensor([9e-7, -9e-7, -0.0, 1 - 9e-7])
    bottom = Cameras(intrinsics, cam2world, SIZE).cam2world[:, 3]
    assert bottom.tolist() == [[0, 0, 0, 1]] * 2
    assert not bottom.signbit().any()


def test_world2cam_is_the_general_inverse() -> None:
    intrinsics, cam2world = arrays(5)
    cam2world[:, 0, 0] += 4e-3  # as far from orthonormal as a real pose, and farther
    cameras = Cameras(intrinsics, cam2world, SIZE)
    eye = torch.eye(4, dtype=torch.float64).expand(5, 4, 4)
    torch.testing.assert_close(cameras.world2cam @ cam2world, eye, rtol=0, atol=1e-14)
    assert cameras.world2cam[:, 3].tolist() == [[0, 0, 0, 1]] * 5


def test_is_immutable() -> None:
    cameras = make(2)
    for name in ("intrinsics", "cam2world", "image_size", "world2cam", "centers", "device", "anything"):
        with pytest.raises(AttributeError):
            setattr(cameras, name, None)


# -------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("intrinsics", "cam2world", "message"),
    [
        (np.eye(3)[None], np.eye(4), r"cam2world must be \(T, 4, 4\), got \(4, 4\)"),
        (np.eye(3), np.eye(4), r"cam2world must be \(T, 4, 4\), got \(4, 4\)"),
        (np.eye(3), np.zeros((2, 3, 4)), r"cam2world must be \(T, 4, 4\), got \(2, 3, 4\)"),
        (
            np.zeros((3, 3, 3)),
            np.zeros((2, 4, 4)),
            r"intrinsics must be \(T, 3, 3\) with T = 2 as in cam2world, or \(3, 3\) .*, got \(3, 3, 3\)",
        ),
        (np.zeros((1, 3, 4)), np.zeros((1, 4, 4)), r"intrinsics must be \(T, 3, 3\) .*, got \(1, 3, 4\)"),
        (
            np.eye(3),
            [np.eye(4), np.eye(3)],
            r"cam2world\[1\] must be \(4, 4\) on cpu as cam2world\[0\], got \(3, 3\) on cpu",
        ),
        (
            torch.eye(3, device="meta"),
            np.eye(4)[None],
            "intrinsics and cam2world must be on the same device, got meta and cpu",
        ),
    ],
)
def test_refuses_shapes_and_devices(intrinsics, cam2world, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cameras(intrinsics, cam2world, SIZE)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.eye(4, dtype=torch.int64)[None], "got int64"),
        (torch.eye(4, dtype=torch.complex64)[None], "got complex64"),
        (np.eye(4, dtype=np.int32)[None], "got int32"),
        ([np.eye(4, dtype=bool)], "got bool"),
        ("poses", "got str"),
        (None, "got NoneType"),
        ([[[1.0, 2.0], [3.0]]], "got: expected sequence of length 2"),
        ([["a"]], "got: "),
    ],
)
def test_refuses_other_types(value, got: str) -> None:
    with pytest.raises(TypeError, match=rf"cam2world(\[0\])? must be a float tensor, array or nested lists, {got}"):
        Cameras(np.eye(3), value, SIZE)
    with pytest.raises(TypeError, match=rf"intrinsics(\[0\])? must be a float tensor, array or nested lists, {got}"):
        Cameras(value, np.eye(4)[None], SIZE)


@pytest.mark.parametrize("size", [(480,), (480, 640, 3), (480.0, 640), 480, None, "48", (True, 640)])
def test_refuses_sizes_that_are_not_two_ints(size) -> None:
    with pytest.raises(TypeError, match=r"image_size must be two ints \(height, width\), got "):
        Cameras(*arrays(1), size)
    with pytest.raises(TypeError, match=r"^size must be two ints \(height, width\), got "):
        make(1).resized(size)


@pytest.mark.parametrize("size", [(0, 640), (480, -1)])
def test_refuses_sizes_that_are_not_positive(size) -> None:
    with pytest.raises(ValueError, match=r"image_size must be a positive \(height, width\), got \("):
        Cameras(*arrays(1), size)
    with pytest.raises(ValueError, match=r"^size must be a positive \(height, width\), got \("):
        make(1).resized(size)


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (0, 0, 0.0, "must have positive focal lengths, got fx=0, fy=512"),
        (1, 1, -3.0, "must have positive focal lengths, got fx=502, fy=-3"),
        (0, 2, float("nan"), "must be finite, got "),
        (1, 1, float("inf"), "must be finite, got "),
        (0, 1, 0.5, r"must have no skew \(K\[0, 1\] = K\[1, 0\] = 0\), got 0.5 and 0"),
        (1, 0, -1e-3, r"must have no skew .*, got 0 and -0.001"),
        (2, 2, 2.0, r"must have the bottom row \(0, 0, 1\), got \(0.0, 0.0, 2.0\)"),
        (2, 0, 2e-6, r"must have the bottom row \(0, 0, 1\), got \(2e-06, 0.0, 1.0\)"),
    ],
)
def test_refuses_intrinsics(row: int, column: int, value: float, message: str) -> None:
    intrinsics, cam2world = arrays(4)
    intrinsics[2:, row, column] = value
    with pytest.raises(ValueError, match=rf"^intrinsics\[2\] {message}"):
        Cameras(intrinsics, cam2world, SIZE)
    with pytest.raises(ValueError, match=rf"^intrinsics {message}"):
        Cameras(intrinsics[2], cam2world, SIZE)


def test_accepts_what_arithmetic_leaves_in_intrinsics() -> None:
    """A skew and corners at the size of float32's rounding are taken for what they were meant to be."""
    intrinsics, cam2world = arrays(2)
    expected = Cameras(intrinsics, cam2world, SIZE)
    intrinsics[0, 0, 1], intrinsics[1, 1, 0] = 1e-9, -1e-5
    intrinsics[:, 2, 2] = 1 + 1.2e-7
    assert_same(Cameras(intrinsics, cam2world, SIZE), expected)


def lens(fx: float, fy: float, cx: float, cy: float) -> torch.Tensor:
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("values", "size", "message"),
    [
        ((0.6, 1.1, 0.5, 0.5), (176, 320), "be in pixels of image_size 176x320 .*: normalized=True of .*got fx=0.6"),
        (
            (200, 200, 160, 88),
            (320, 176),
            r"be of image_size 320x176 \(height x width\), not \(width, height\), got .*",
        ),
        ((500, 500, 320, 240), (640, 480), r"be of image_size 640x480 .*, not \(width, height\), got .* 480x640"),
        ((969, 969, 960, 540), (720, 1280), "be of image_size 720x1280 .*, not of another size .* about 1080x1920"),
        ((500, 500, 320, 240), (720, 960), "be of image_size 720x960 .*, not of another size .* about 480x640"),
        ((200, 200, 0, 0), (176, 320), "be of image_size 176x320 .*, not of another size"),
        ((200, 200, 400, 88), (176, 320), r"have the principal point inside the image, .* got \(400, 88\)"),
        ((200, 200, 160, -1), (176, 320), r"have the principal point inside the image, .* got \(160, -1\)"),
        ((243, 432, 256, 256), (512, 512), "have nearly square pixels .*, got fx=243 and fy=432 of image_size 512x512"),
        ((432, 243, 256, 256), (512, 512), "have nearly square pixels .*, got fx=432 and fy=243"),
    ],
)
def test_refuses_intrinsics_of_other_sizes(values: tuple[float, ...], size: tuple[int, int], message: str) -> None:
    intrinsics, poses = lens(*values), torch.eye(4).expand(2, 4, 4)
    with pytest.raises(ValueError, match=f"^intrinsics must {message}"):
        Cameras(intrinsics, poses, size)
    good = lens(100, 100, size[1] / 2, size[0] / 2)
    with pytest.raises(ValueError, match=rf"^intrinsics\[1\] must {message}"):
        Cameras(torch.stack([good, intrinsics]), poses, size)
    if "pixels of image_size" in message:
        return
    allowed = {"square_pixels": False} if "square" in message else {"off_center": True}
    made = Cameras(intrinsics, poses, size, **allowed)
    assert torch.equal(made.intrinsics[0], intrinsics)
    assert made.allowances == allowed


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(3, 4000), st.integers(3, 4000)),
    field=st.floats(10, 150),
    stretch=st.floats(0.92, 1.08),
    off=st.tuples(st.floats(-0.1, 0.1), st.floats(-0.1, 0.1)),
)
def test_accepts_every_ordinary_camera(
    size: tuple[int, int], field: float, stretch: float, off: tuple[float, float]
) -> None:
    """Any size and field of view, pixels nearly square, the principal point within a tenth of the centre."""
    height, width = size
    fx = width / 2 / math.tan(math.radians(field) / 2)
    intrinsics = lens(fx, fx * stretch, width * (0.5 + off[0]), height * (0.5 + off[1]))
    cameras = Cameras(intrinsics, torch.eye(4)[None], size)
    assert cameras.allowances == {}


def stretched(pose: torch.Tensor) -> None:
    pose[:3, 0] *= 1.31**0.5
    pose[:3, :3] = torch.diag(pose[:3, :3].norm(dim=0))


def reflected(pose: torch.Tensor) -> None:
    pose[:3, 1] *= -1


def overflowing(pose: torch.Tensor) -> None:
    pose[:3, :3] = 1e200


def set_to(row: int, column: int, value: float):
    return lambda pose: pose[row, column].fill_(value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (stretched, r"must be a rigid pose \(rotation within 1e-2 of orthonormal\), got deviation 0.31$"),
        (reflected, r"must be a rigid pose \(right-handed, .*\), got a reflection, determinant -1$"),
        (lambda pose: pose[:3, :3].zero_(), "must be a rigid pose .*, got deviation 1$"),
        (overflowing, "must be a rigid pose .*, got deviation inf$"),
        (set_to(1, 3, float("nan")), "must be finite, got "),
        (set_to(0, 0, float("-inf")), "must be finite, got "),
        (set_to(3, 3, 1.1), r"must have the bottom row \(0, 0, 0, 1\), got \(0.0, 0.0, 0.0, 1.1\)$"),
        (set_to(3, 0, 2e-6), r"must have the bottom row \(0, 0, 0, 1\), got \(2e-06, 0.0, 0.0, 1.0\)$"),
    ],
)
def test_refuses_cam2world(spoil, message: str) -> None:
    intrinsics, cam2world = arrays(5)
    spoil(cam2world[3])
    spoil(cam2world[4])
    with pytest.raises(ValueError, match=rf"^cam2world\[3\] {message}"):
        Cameras(intrinsics, cam2world, SIZE)


def test_rotation_tolerance() -> None:
    intrinsics, cam2world = arrays(1)
    for deviation, accepted in ((4e-4, True), (0.0099, True), (0.0101, False)):
        pose = cam2world.clone()
        pose[0, :3, :3] *= (1 + deviation) ** 0.5
        if accepted:
            assert torch.equal(Cameras(intrinsics, pose, SIZE).cam2world, pose)  # and is not orthonormalised
        else:
            with pytest.raises(ValueError, match=r"cam2world\[0\] must be a rigid pose .* got deviation 0.0101"):
                Cameras(intrinsics, pose, SIZE)


# --------------------------------------------------------------------------------------------------- indexing


@pytest.mark.parametrize(
    "index",
    [
        slice(None),
        slice(1, 4),
        slice(-2, None),
        slice(4, 1),
        slice(None, None, -1),
        slice(4, 0, -2),
        slice(0, 5, 2),
        [3, 0, 0],
        [-1],
        [],
    ],
)
def test_index_by_many(index) -> None:
    intrinsics, cam2world = arrays(5)
    rows = np.arange(5)[index].copy()
    expected = Cameras(intrinsics[rows], cam2world[rows], SIZE)
    cameras = make(5)
    assert_same(cameras[index], expected)
    assert_same(cameras[torch.from_numpy(rows)], expected)
    assert_same(cameras[rows], expected)


@pytest.mark.parametrize("i", [0, 4, -1, -5, np.int64(2), torch.tensor(3)])
def test_index_by_one_keeps_the_axis(i) -> None:
    intrinsics, cam2world = arrays(5)
    j = int(i) % 5
    assert_same(make(5)[i], Cameras(intrinsics[j : j + 1], cam2world[j : j + 1], SIZE))


def test_iterates_over_views() -> None:
    cameras = make(3)
    views = list(cameras)
    assert [len(view) for view in views] == [1, 1, 1]
    assert_same(Cameras.cat(views), cameras)


@pytest.mark.parametrize("index", [5, -6, [0, 5], torch.tensor([-6])])
def test_refuses_an_index_out_of_range(index) -> None:
    with pytest.raises(IndexError, match=r"index must be in \[-5, 5\), got (5|-6)"):
        make(5)[index]


@pytest.mark.parametrize(
    "index",
    [1.0, "1", None, (0, 1), [0.0], [True, False], True, torch.tensor([True]), torch.tensor([[1]]), [[1]]],
)
def test_refuses_an_index_of_other_types(index) -> None:
    with pytest.raises(TypeError, match="index must be an int, a slice, or a list or 1-D tensor of ints, got "):
        make(5)[index]


# ---------------------------------------------------------------------------------- resizing, moving, copying


@settings(deadline=None)
@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    point=st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.1, 10)),
)
def test_resized_scales_pixel_coordinates(height: int, width: int, point: tuple[float, float, float]) -> None:
    """Whatever point in front of the camera."""
    cameras = make(3)[1]
    resized = cameras.resized((height, width))
    assert resized.image_size == (height, width)
    points = torch.tensor([[*point, 1.0]], dtype=torch.float64) @ cameras.cam2world[0, :3].T
    scale = torch.tensor([width / SIZE[1], height / SIZE[0]], dtype=torch.float64)
    expected = project(cameras, points) * scale
    torch.testing.assert_close(project(resized, points), expected, rtol=1e-11, atol=1e-8)


def test_resized_changes_the_four_numbers_only() -> None:
    cameras = make(2)
    resized = cameras.resized((44, 80))
    before, after = cameras.intrinsics, resized.intrinsics
    assert torch.equal(after[:, 0, 0], before[:, 0, 0] * (80 / 640))
    assert torch.equal(after[:, 0, 2], before[:, 0, 2] * (80 / 640))
    assert torch.equal(after[:, 1, 1], before[:, 1, 1] * (44 / 480))
    assert torch.equal(after[:, 1, 2], before[:, 1, 2] * (44 / 480))
    assert torch.equal(after[:, 2], before[:, 2])
    assert not after[:, 0, 1].any() and not after[:, 1, 0].any()
    assert torch.equal(resized.cam2world, cameras.cam2world)
    assert_same(cameras, make(2))  # and not in place


@pytest.mark.parametrize("size", [(44, 80), (240, 320), (481, 640), SIZE])
def test_intrinsics_alone_are_those_of_resized(size) -> None:
    """The same bits each time, from any thread, and in inference mode; tensors of another kind likewise."""
    cameras = make(3)
    expected = cameras.intrinsics.clone()
    expected[:, 0] *= size[1] / SIZE[1]
    expected[:, 1] *= size[0] / SIZE[0]
    with torch.inference_mode():
        assert torch.equal(cameras.intrinsics_at(size), expected)
    for _ in range(2):
        assert torch.equal(cameras.intrinsics_at(size), expected)
    assert torch.equal(cameras.resized(size).intrinsics, expected)
    assert cameras.to("meta").intrinsics_at(size).shape == (3, 3, 3)
    assert_same(cameras, make(3))


def test_intrinsics_that_are_kept_follow_changes_in_place() -> None:
    """As static inputs of captured graphs are changed; they are read-only otherwise."""
    cameras = make(3)
    first = cameras.intrinsics_at((44, 80))
    assert cameras.intrinsics_at((44, 80)) is first
    cameras.intrinsics[1, 0, 0] = 700
    assert cameras.intrinsics_at((44, 80))[1, 0, 0] == 700 * (80 / 640)
    cameras.intrinsics_at((44, 80)).zero_()
    assert cameras.intrinsics_at((44, 80))[1, 0, 0] == 700 * (80 / 640)
    assert cameras[1:2].intrinsics_at((44, 80))[0, 0, 0] == 700 * (80 / 640)
    with torch.inference_mode():
        inference = make(2)
    for _ in range(2):
        assert torch.equal(inference.intrinsics_at((44, 80)), make(2).intrinsics_at((44, 80)))


def test_factors_made_while_tracing_are_not_kept() -> None:
    cameras = make(1)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert mode.from_tensor(cameras.intrinsics).shape == (1, 3, 3)
        cameras.intrinsics_at((7, 11))
    assert type(cameras.intrinsics_at((7, 11))) is torch.Tensor


def test_many_sizes() -> None:
    cameras = make(1)
    for width in range(1, 200):
        assert cameras.intrinsics_at((1, width))[0, 0, 2] == cameras.intrinsics[0, 0, 2] * (width / 640)


def test_other_poses_with_the_same_lens() -> None:
    cameras, (_, poses) = make(1).resized((100, 640)), arrays(4, seed=3)  # pixels far from square were accepted before
    moved = cameras.with_cam2world(poses.float().numpy())
    assert_same(moved, Cameras.trusted(cameras.intrinsics.expand(4, 3, 3), poses.float().double(), (100, 640)))
    assert_same(make(3).with_cam2world(arrays(3, 5)[1]), Cameras(arrays(3)[0], arrays(3, 5)[1], SIZE))
    with pytest.raises(ValueError, match=r"cam2world must be \(3, 4, 4\) as the cameras, got \(4, 4, 4\)"):
        make(3).with_cam2world(poses)
    with pytest.raises(ValueError, match=r"cam2world\[2\] must have the bottom row"):
        cameras.with_cam2world(poses * torch.tensor([1.0, 1, 2, 1])[:, None, None])


def test_trusted_converts_but_does_not_validate() -> None:
    intrinsics, cam2world = arrays(2)
    strided = cam2world.mT.contiguous().mT.float().requires_grad_()
    cameras = Cameras.trusted(intrinsics.float(), strided, SIZE)
    assert_same(cameras, Cameras(intrinsics.float(), cam2world.float(), SIZE))
    assert not cameras.cam2world.requires_grad
    assert Cameras.trusted(intrinsics * 0, cam2world, SIZE).intrinsics.sum() == 0
    with pytest.raises(ValueError, match=r"must be \(T, 3, 3\) and \(T, 4, 4\), got \(2, 3, 3\) and \(1, 4, 4\)"):
        Cameras.trusted(intrinsics, cam2world[:1], SIZE)
    with pytest.raises(ValueError, match="must be on the same device, got meta and cpu"):
        Cameras.trusted(intrinsics.to("meta"), cam2world, SIZE)


# ------------------------------------------------------------------------------------------- other conventions


@pytest.mark.parametrize("convention", ["opencv", "opengl"])
@pytest.mark.parametrize("rows", [3, 4])
@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 2)])
def test_poses_of_other_systems(convention: str, rows: int, leading: tuple[int, ...]) -> None:
    """Both ways round, with and without the last row, with any leading axes, as arrays of any kind."""
    intrinsics, cam2world = arrays(math.prod(leading))
    expected = Cameras(intrinsics, cam2world, SIZE)
    axes = torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)) if convention == "opengl" else torch.eye(4)
    c2w = cam2world @ axes.double()
    for make_cameras, poses in ((Cameras.from_c2w, c2w), (Cameras.from_w2c, torch.linalg.inv(c2w))):
        made = make_cameras(
            intrinsics.reshape(*leading, 3, 3),
            poses.reshape(*leading, 4, 4)[..., :rows, :],
            SIZE,
            convention=convention,
        )
        torch.testing.assert_close(made.cam2world, expected.cam2world, rtol=0, atol=1e-13)
        assert torch.equal(made.intrinsics, expected.intrinsics)
        again = make_cameras(intrinsics[0].numpy(), poses.reshape(*leading, 4, 4).numpy(), SIZE, convention=convention)
        assert torch.equal(again.intrinsics, intrinsics[:1].expand(len(made), 3, 3))


def test_intrinsics_of_other_systems() -> None:
    """Four numbers, fractions of the size, pixel centres at whole numbers: the same rays."""
    cam2world = arrays(2)[1]
    expected = Cameras(lens(500, 510, 321.5, 237.5), cam2world, SIZE)
    four = torch.tensor([500, 510, 321.5, 237.5], dtype=torch.float64)
    assert_same(Cameras.from_c2w(four, cam2world, SIZE), expected)
    assert_same(Cameras.from_c2w(four.expand(2, 4), cam2world, SIZE), expected)
    assert_same(Cameras.from_c2w([500, 510, 321, 237], cam2world, SIZE, pixel_centers="integer"), expected)
    fractions = four / torch.tensor([640, 480, 640, 480])
    made = Cameras.from_c2w(fractions, cam2world, SIZE, normalized=True)
    torch.testing.assert_close(made.intrinsics, expected.intrinsics, rtol=1e-15, atol=0)
    a_batch = Cameras.from_c2w(four.expand(2, 1, 4), cam2world[:, None].expand(2, 3, 4, 4), SIZE)  # one lens a scene
    assert len(a_batch) == 6 and torch.equal(a_batch.cam2world[:3], cam2world[:1].expand(3, 4, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"convention": "OpenGL"}, "convention must be one of opencv, opengl, got 'OpenGL'"),
        ({"pixel_centers": 0.5}, "pixel_centers must be one of half, integer, got 0.5"),
        ({"w2c": np.eye(3)}, r"w2c must be \(..., 3, 4\) or \(..., 4, 4\), got \(3, 3\)"),
        ({"w2c": 2 * np.eye(4)[None, :3]}, r"w2c\[0\] must be a rigid pose"),
        ({"intrinsics": np.eye(4)[:, :2]}, r"intrinsics must be \(..., 3, 3\) or \(..., 4\): .*, got \(4, 2\)"),
        (
            {"intrinsics": np.ones((3, 4))},
            r"intrinsics must be of one view, or of leading axes \(2,\) .*, got \(3, 4\)",
        ),
        ({"intrinsics": [0.8, 1.0, 0.5, 0.5]}, "intrinsics.* must be in pixels .* normalized=True"),
        ({"image_size": (480.0, 640)}, "image_size must be two ints"),
    ],
)
def test_refuses_other_systems_arguments(change: dict, message: str) -> None:
    arguments = {"intrinsics": arrays(1)[0][0], "w2c": arrays(2)[1], "image_size": SIZE} | change
    with pytest.raises((TypeError, ValueError), match=message):
        Cameras.from_w2c(arguments.pop("intrinsics"), arguments.pop("w2c"), arguments.pop("image_size"), **arguments)


def test_trusted_holds_tensors_as_they_are() -> None:
    intrinsics, cam2world = arrays(2)
    cameras = Cameras.trusted(intrinsics, cam2world, SIZE)
    assert cameras.intrinsics is intrinsics and cameras.cam2world is cam2world
    assert_same(cameras, Cameras(intrinsics, cam2world, SIZE))


def test_nothing_to_do_returns_self() -> None:
    cameras = make(2)
    assert cameras.resized(list(SIZE)) is cameras
    assert cameras.to("cpu") is cameras
    assert cameras.to(torch.device("cpu")) is cameras


def test_to_moves_both() -> None:
    moved = make(2).to("meta")
    assert moved.device.type == "meta" and moved.intrinsics.device.type == "meta"
    assert moved.image_size == SIZE and len(moved) == 2


def test_cat() -> None:
    a, b = make(2), make(3, seed=7)
    both = Cameras.cat([a, b])
    assert_same(both[:2], a)
    assert_same(both[2:], b)
    with pytest.raises(ValueError, match="cameras must hold at least one Cameras, got none"):
        Cameras.cat([])
    with pytest.raises(TypeError, match=r"cameras\[1\] must be Cameras, got Tensor"):
        Cameras.cat([a, a.cam2world])
    with pytest.raises(ValueError, match=r"cameras\[1\] must have image_size \(480, 640\) .* got \(1, 2\)"):
        Cameras.cat([a, b.resized((1, 2))])
    with pytest.raises(ValueError, match=r"cameras\[2\] must have device cpu .* got meta"):
        Cameras.cat([a, b, b.to("meta")])


def test_pickle_and_copies() -> None:
    cameras = make(100)[3:5]
    data = pickle.dumps(cameras)
    assert len(data) < 2000  # not the other 98 views
    for twin in (pickle.loads(data), copy.deepcopy(cameras), copy.copy(cameras)):
        assert_same(twin, cameras)
        assert twin.cam2world.data_ptr() != cameras.cam2world.data_ptr()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    intrinsics, cam2world = (x.cuda() for x in arrays(4))
    cameras = Cameras(intrinsics, cam2world, SIZE)
    assert cameras.device == cam2world.device
    assert_same(cameras.to("cpu"), make(4))
    assert_same(cameras[torch.tensor([2, 0], device="cuda")].to("cpu"), make(4)[[2, 0]])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cameras[1:3].resized((44, 80))
    graph.replay()
    assert_same(captured.to("cpu"), make(4)[1:3].resized((44, 80)))

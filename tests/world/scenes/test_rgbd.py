"""RGB-D input: the stereo pair's calibration holds photometrically, folders load exactly or say why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mirage.scenes.rgbd import RGBDFrames, load_rgbd_folder, stereo_motorcycle
from mirage_kernels import Cameras

image_module = pytest.importorskip("PIL.Image")


def warp_error(frames: RGBDFrames, source: int, target: int) -> tuple[Tensor, Tensor]:
    """Lift the pixels of `source` by depth, look them up in `target`: difference and motion of those in view.

    Written with plain matrices rather than with the operators, which have tests of their own.
    """
    height, width = frames.cameras.image_size
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], -1).double()
    depth = frames.depth[source].double()[..., None]
    rays = pixels @ torch.linalg.inv(frames.cameras.intrinsics[source]).T
    points = torch.cat([rays * depth, torch.ones_like(depth)], -1)
    moved = points @ (frames.cameras.world2cam[target] @ frames.cameras.cam2world[source]).T
    projected = moved[..., :3] @ frames.cameras.intrinsics[target].T
    where = projected[..., :2] / projected[..., 2:]
    inside = (depth[..., 0] > 0) & (projected[..., 2] > 0)
    inside &= (where >= 0.5).all(-1) & (where[..., 0] <= width - 0.5) & (where[..., 1] <= height - 0.5)
    normalised = 2 * where / torch.tensor([width, height]) - 1
    seen = F.grid_sample(frames.images[target][None].double(), normalised[None], align_corners=False)[0]
    difference = (seen - frames.images[source]).abs().mean(0)
    return difference[inside], (where - pixels[..., :2])[inside]


# ------------------------------------------------------------------------------------------- the stereo pair


@pytest.fixture(scope="module")
def pair() -> RGBDFrames:
    pytest.importorskip("skimage")
    return stereo_motorcycle()


def test_pair_shapes_and_units(pair: RGBDFrames):
    assert pair.images.shape == (2, 3, 496, 736) and pair.depth.shape == (2, 496, 736)
    assert pair.names == ["left", "right"] and len(pair) == 2
    assert 0 <= pair.images.min() and pair.images.max() <= 1
    left = pair.depth[0]
    assert left.isfinite().all() and (left >= 0).all()
    assert 0.92 < (left > 0).float().mean() < 0.94  # the rest has no true disparity
    assert 2.0 < left[left > 0].min() and left.max() < 5.1  # metres
    assert (pair.depth[1] == 0).all()  # nothing known of the right view
    assert torch.equal(pair.cameras.cam2world[0], torch.eye(4, dtype=torch.float64))
    assert pair.cameras.centers[1].tolist() == [0.193001, 0.0, 0.0]


def test_pair_calibration_holds_photometrically(pair: RGBDFrames):
    """Warped by depth and pose, the right image matches the left; half a pixel off, or mirrored, less."""

    def median_error(baseline: float, shift: float) -> float:
        intrinsics, cam2world = pair.cameras.intrinsics.clone(), pair.cameras.cam2world.clone()
        cam2world[1, 0, 3] *= baseline
        intrinsics[1, 0, 2] += shift
        cameras = Cameras(intrinsics, cam2world, pair.cameras.image_size)
        return warp_error(RGBDFrames(pair.images, pair.depth, cameras, pair.names), 0, 1)[0].median().item()

    right = median_error(1.0, 0.0)
    assert right < 4.5 / 255
    assert median_error(-1.0, 0.0) > 3 * right
    assert all(median_error(1.0, shift) > 1.05 * right for shift in (-0.5, 0.5))


def test_pair_is_rectified(pair: RGBDFrames):
    moved = warp_error(pair, 0, 1)[1]
    assert moved[:, 1].abs().max() < 1e-9  # along rows
    assert -60 < moved[:, 0].min() and moved[:, 0].max() < -7  # by the true disparities, 7.2 to 59.9 pixels


def test_pair_needs_no_network(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("skimage")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert len(stereo_motorcycle()) == 2


def test_frames_are_sliced_and_checked(pair: RGBDFrames):
    assert pair[1:].names == ["right"] and len(pair[[1, 0]]) == 2
    assert torch.equal(pair[[1, 0]].images[1], pair.images[0])
    with pytest.raises(ValueError, match=r"depth must be \(2, 496, 736\) float32 as cameras say, got \(1, 496, 736\)"):
        RGBDFrames(pair.images, pair.depth[:1], pair.cameras, pair.names)
    with pytest.raises(ValueError, match=r"names must hold one name per camera \(2\), got 1"):
        RGBDFrames(pair.images, pair.depth, pair.cameras, ["left"])


# ------------------------------------------------------------------------------------------------- folders


def write_folder(folder: Path, count: int = 3, height: int = 41, width: int = 53) -> tuple[np.ndarray, np.ndarray]:
    """A folder of noise; returns its colours (N, H, W, 3) uint8 and depths (N, H, W) uint16, millimetres."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    depths = generator.integers(500, 4000, (count, height, width), dtype=np.uint16)
    depths[:, 10, 10:20] = 0
    depths[:, 12, 10:20] = 65535
    folder.mkdir()
    np.savetxt(folder / "intrinsics.txt", np.array([[50, 0, width / 2], [0, 52, height / 2], [0, 0, 1]]))
    for i in range(count):
        stem = folder / f"frame-{5 * i:06d}"
        image_module.fromarray(colours[i]).save(f"{stem}.color.png")
        image_module.fromarray(depths[i]).save(f"{stem}.depth.png")
        pose = np.eye(4)
        pose[0, 3] = i
        np.savetxt(f"{stem}.pose.txt", pose)
    return colours, depths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "room")
    return tmp_path / "room"


def test_folder_is_cropped_about_its_centre(tmp_path: Path):
    colours, depths = write_folder(tmp_path / "room")
    frames = load_rgbd_folder(tmp_path / "room")
    top, left = 4, 2  # 41x53 becomes 32x48
    assert frames.cameras.image_size == (32, 48) and frames.names == [f"frame-{5 * i:06d}" for i in range(3)]
    expected = torch.from_numpy(colours[:, top : top + 32, left : left + 48]).permute(0, 3, 1, 2) / 255.0
    torch.testing.assert_close(frames.images, expected, atol=1e-7, rtol=0)
    millimetres = depths[:, top : top + 32, left : left + 48].astype(np.float64)
    millimetres[millimetres == 65535] = 0
    torch.testing.assert_close(frames.depth.double(), torch.from_numpy(millimetres / 1000), atol=1e-6, rtol=0)
    assert frames.cameras.intrinsics[2].tolist() == [[50, 0, 26.5 - left], [0, 52, 20.5 - top], [0, 0, 1]]
    assert frames.cameras.centers[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("suffix", [".tiff", ".npy", ".npz"])
def test_depth_may_be_another_file(folder: Path, suffix: str):
    """Integers are millimetres, floats metres, unknown depth is 0; a grey colour image keeps its 16 bits."""
    expected = load_rgbd_folder(folder).depth
    for path in folder.glob("*.depth.png"):
        millimetres = np.asarray(image_module.open(path))
        path.unlink()
        metres = np.where(millimetres == 65535, np.nan, millimetres / np.float32(1000)).astype(np.float32)
        if suffix == ".tiff":
            image_module.fromarray(metres).save(path.with_suffix(suffix))
        else:
            (np.save if suffix == ".npy" else np.savez)(path.with_suffix(suffix), metres)
    colour = np.full((41, 53), 257, np.uint16)
    resave(folder / "frame-000005.color.png", colour)
    frames = load_rgbd_folder(folder)
    assert torch.equal(frames.depth, expected)
    assert (frames.images[1] - 257 / 65535).abs().max() < 1e-7


def test_folder_slices(folder: Path):
    assert load_rgbd_folder(folder, slice(None, None, 2), progress=True).names == [
        "frame-000000",
        "frame-000010",
    ]
    assert load_rgbd_folder(folder, slice(1, None)).cameras.centers[:, 0].tolist() == [1, 2]
    with pytest.raises(ValueError, match="frames must pick at least one of the frames of .*room, got slice"):
        load_rgbd_folder(folder, slice(7, None))


def resave(path: Path, array: np.ndarray) -> None:
    image_module.fromarray(array).save(path)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "intrinsics.txt").unlink(), FileNotFoundError, "intrinsics.txt: no such file"),
        (
            lambda f: (f / "intrinsics.txt").write_text("525 525\n"),
            ValueError,
            "intrinsics.txt: expected 3x3 numbers, got 1 lines of 2",
        ),
        (
            lambda f: (f / "intrinsics.txt").write_text("0 0 1\n0 9 1\n0 0 1\n"),
            ValueError,
            "intrinsics.txt: intrinsics must have positive focal",
        ),
        (
            lambda f: (f / "frame-000005.pose.txt").unlink(),
            FileNotFoundError,
            "frame-000005.pose.txt: no such file",
        ),
        (
            lambda f: (f / "frame-000005.pose.txt").write_text("a b\n"),
            ValueError,
            "frame-000005.pose.txt: expected 4x4 numbers, got: .*'a'",
        ),
        (
            lambda f: (f / "frame-000005.pose.txt").write_bytes(b"\xff\xfe"),
            ValueError,
            "frame-000005.pose.txt: expected 4x4 numbers",
        ),
        (
            lambda f: np.savetxt(f / "frame-000005.pose.txt", np.full((4, 4), np.nan)),
            ValueError,
            "frame-000005.pose.txt: cam2world.* must be finite",
        ),
        (
            lambda f: np.savetxt(f / "frame-000005.pose.txt", 2 * np.eye(4)),
            ValueError,
            "frame-000005.pose.txt: cam2world.* must have the bottom row",
        ),
        (
            lambda f: (f / "frame-000010.depth.png").unlink(),
            FileNotFoundError,
            "frame-000010.depth.png: no such file",
        ),
        (
            lambda f: (f / "frame-000010.depth.png").write_bytes(b"\x89PNG\r\n"),
            ValueError,
            "frame-000010.depth.png: expected an image",
        ),
        (
            lambda f: truncate(f / "frame-000010.color.png"),
            ValueError,
            "frame-000010.color.png: expected an image",
        ),
        (
            lambda f: resave(f / "frame-000010.depth.png", np.ones((32, 48), np.uint16)),
            ValueError,
            "depth.png: expected 53x41 pixels as the colour image, got 48x32",
        ),
        (
            lambda f: resave(f / "frame-000010.depth.png", np.ones((41, 53), np.uint8)),
            ValueError,
            "depth.png: expected depth, one channel of 16 bits or float, got an image of 8 bits",
        ),
        (
            lambda f: resave(f / "frame-000010.color.png", np.ones((32, 48, 3), np.uint8)),
            ValueError,
            "frame-000010.color.png: expected 53x41 as frame-000000.color.png, got 48x32",
        ),
        (
            lambda f: [p.unlink() for p in f.glob("*.color.png")],
            ValueError,
            "room: expected frames called frame-000000.color.jpg, found none",
        ),
    ],
)
def test_folder_errors_name_the_file(folder: Path, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        load_rgbd_folder(folder)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def test_folder_too_small_or_absent(tmp_path: Path):
    write_folder(tmp_path / "tiny", height=15, width=40)
    with pytest.raises(ValueError, match="tiny: images must be at least 16x16 pixels, got 40x15"):
        load_rgbd_folder(tmp_path / "tiny")
    with pytest.raises(NotADirectoryError, match="nowhere: no such folder"):
        load_rgbd_folder(tmp_path / "nowhere")


def test_real_room(shared_dir: Path):
    """Depth, poses and intrinsics agree: warping by them beats leaving the pixels where they are."""
    frames = load_rgbd_folder(shared_dir / "data" / "rgbd-room", slice(0, 20, 4))
    assert frames.images.shape == (5, 3, 480, 640) and frames.cameras.intrinsics[0, 0, 2] == 320
    assert 0.3 < frames.depth[frames.depth > 0].min() and frames.depth.max() < 10
    warped = warp_error(frames, 0, 1)[0].mean()
    assert warped < 0.8 * (frames.images[0] - frames.images[1]).abs().mean()

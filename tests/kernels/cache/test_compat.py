"""`compat.LatentPointCloud` in scripts that edit it: plain attributes, and the other two ways to make one."""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from comparison import assert_equal_bits

from mirage_kernels import use_backend
from mirage_kernels.compat import LatentPointCloud

GRID, IMAGE = (6, 8), (48, 64)
K = torch.tensor([[50.0, 0.0, 31.0], [0.0, 50.0, 23.0], [0.0, 0.0, 1.0]])


def frame(seed: int, views: int = 1):
    """depths, intrinsics, cam2worlds and latents of views that look at a rough wall from beside each other."""
    random = torch.Generator().manual_seed(seed)
    depths = 2 + torch.rand(views, *IMAGE, generator=random)
    depths[:, :, : IMAGE[1] // 8] = 0  # the first column of tokens
    poses = torch.eye(4).repeat(views, 1, 1)
    poses[:, 0, 3] = 0.3 * torch.rand(views, generator=random)
    return depths, K.expand(views, 3, 3), poses, torch.randn(views, 5, *GRID, generator=random)


def make(views: int = 3, device="cpu"):
    depths, intrinsics, poses, latents = frame(0)
    hidden = torch.zeros(IMAGE)
    hidden[:, 40:] = 1
    cloud = LatentPointCloud.from_geometry(depths[0], intrinsics[0], poses[0], latents[0][:, None], hidden, device)
    if views > 1:
        cloud.update(*frame(1, views - 1))
    return cloud


def attributes(cloud):
    return [cloud.points_world, cloud.features, cloud.valid_mask]


def looks(cloud):
    """What the cloud shows from two poses."""
    pose = torch.eye(4)
    pose[0, 3] = 0.2
    return [*cloud.project(torch.eye(4)), *cloud.project(pose)]


def assert_shows_its_attributes(cloud):
    """The same as a cloud made anew of copies of the attributes, by the definition; and something at all."""
    with use_backend("reference"):
        made = LatentPointCloud(*(x.clone() for x in attributes(cloud)), cloud.intrinsics_latent, cloud.latent_hw)
        expected = looks(made)
    assert expected[1].any()
    assert_equal_bits(looks(cloud), expected)


EDITS = {
    "mask in place": lambda cloud: cloud.valid_mask.__iand__(cloud.points_world[:, 0] > 0),
    "mask of one token": lambda cloud: cloud.valid_mask.__setitem__(slice(10, 20), False),
    "mask on again": lambda cloud: cloud.valid_mask.copy_(cloud.points_world[:, 2] > 0),
    "mask set": lambda cloud: setattr(cloud, "valid_mask", cloud.points_world[:, 1] > 0),
    "features in place": lambda cloud: cloud.features.__setitem__(slice(0, 40), 7.0),
    "features set": lambda cloud: setattr(cloud, "features", cloud.features * 2),
    "points in place": lambda cloud: cloud.points_world.add_(torch.tensor([0.3, 0.0, 0.1])),
    "points of a view of them": lambda cloud: cloud.points_world[5:60, 2].mul_(0.7),
    "points set": lambda cloud: setattr(cloud, "points_world", cloud.points_world + 0.1),
    "pruned": lambda cloud: [
        setattr(cloud, name, getattr(cloud, name)[::2]) for name in ("points_world", "features", "valid_mask")
    ],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_attributes_are_plain_ones(backend, edit):
    """Edits take effect, before and after more was appended, and go on with what is appended next."""
    cloud = make(device=backend.device)
    for seed in (2, 3):
        before = [x.clone() for x in looks(cloud)]
        edit(cloud)
        assert any(not torch.equal(old, new) for old, new in zip(before, looks(cloud), strict=True)) or seed == 3
        assert_shows_its_attributes(cloud)
        kept = [x.clone() for x in attributes(cloud)]
        cloud.update(*frame(seed, 2))
        assert len(cloud.points_world) > len(kept[0])
        assert_equal_bits([x[: len(y)] for x, y in zip(attributes(cloud), kept, strict=True)], kept)
        assert cloud.valid_mask[len(kept[0]) :].all()
        assert_shows_its_attributes(cloud)


def test_reading_attributes_copies_nothing():
    cloud = make()
    for _ in range(2):
        assert all(one is other for one, other in zip(attributes(cloud), attributes(cloud), strict=True))
        assert all(x.is_contiguous() for x in attributes(cloud))
        cloud.update(*frame(4))
    points, features = torch.rand(9, 3), torch.rand(9, 2)
    given = LatentPointCloud(points, features, torch.ones(9, dtype=torch.bool), torch.eye(3), (2, 2))
    assert given.points_world is points and given.features is features


def test_appending_moves_what_is_held_seldom():
    cloud, places = make(), set()
    for seed in range(40):
        cloud.update(*frame(seed))
        places.add(cloud.features.data_ptr())
    assert len(places) < 12


def test_attributes_that_do_not_belong_together():
    cloud = make()
    pose = torch.eye(4)
    cloud.valid_mask = cloud.valid_mask[:-1]
    for use in (lambda: cloud.project(pose), lambda: cloud.update(*frame(5)), lambda: cloud.save("unwritten.pt")):
        with pytest.raises(ValueError, match=r"valid_mask must be \(\d+,\) like points_world, got \(\d+,\)"):
            use()
    cloud = make()
    cloud.points_world = cloud.points_world[:, :2]
    with pytest.raises(ValueError, match=r"points_world must be \(N, 3\), got \(\d+, 2\)"):
        cloud.project(pose)


def test_a_copy_is_of_its_own():
    cloud = make()
    before = looks(cloud)
    other = copy.deepcopy(cloud)
    assert_equal_bits(looks(other), before)
    other.features.zero_()
    other.update(*frame(6))
    assert_equal_bits(looks(cloud), before)
    assert_shows_its_attributes(other)


def test_made_in_inference_mode():
    with torch.inference_mode():
        cloud = make()
        cloud.valid_mask &= cloud.points_world[:, 0] > 0
        assert_shows_its_attributes(cloud)
    cloud.update(*frame(7))
    assert_shows_its_attributes(cloud)


def test_gradients_reach_the_features():
    cloud = make()
    features = cloud.features.clone().requires_grad_()
    cloud.features = features
    latents, mask = cloud.project(torch.eye(4))
    latents.sum().backward()
    assert features.grad.sum() == 5 * mask.sum() > 0


def test_saved_without_the_room_to_grow(tmp_path):
    cloud = make()
    cloud.save(tmp_path / "cloud.pt")
    tokens = len(cloud.points_world)
    assert (tmp_path / "cloud.pt").stat().st_size < tokens * (4 * (3 + 5) + 1) + 4096


# ---------------------------------------------------------------------------------------------- other ways to make one


def test_from_video_geometry():
    depths, intrinsics, poses, latents = frame(0, 3)
    geometry = SimpleNamespace(depths=depths.numpy(), intrinsics=intrinsics.numpy(), poses_c2w=poses.numpy())
    mask = np.zeros(IMAGE, dtype=bool)
    mask[:, 32:] = True
    got = LatentPointCloud.from_video_geometry(geometry, 2, latents[2][:, None], mask=mask, device="cpu")
    expected = LatentPointCloud.from_geometry(depths[2], K, poses[2], latents[2][:, None], mask, "cpu")
    assert 0 < int(expected.valid_mask.sum()) < 24
    assert_equal_bits(attributes(got), attributes(expected))


class Estimator:
    """Stand in for MapAnything: a depth map, the camera given or one of its own."""

    def __init__(self) -> None:
        self.calls = []

    def infer(self, views, **options):
        self.calls.append((views, options))
        depths, intrinsics, poses, _ = frame(0)
        return [{"depth_z": depths[..., None], "intrinsics": intrinsics, "camera_poses": poses}]


@pytest.fixture
def estimator(monkeypatch: pytest.MonkeyPatch) -> Estimator:
    """A package `mapanything` of stand-ins, whose loader gives the estimator returned."""
    estimator = Estimator()
    image = ModuleType("mapanything.utils.image")
    image.load_images = lambda paths: [{"path": path} for path in paths]
    image.preprocess_inputs = lambda views: views
    models = ModuleType("mapanything.models")
    models.MapAnything = SimpleNamespace(
        from_pretrained=lambda name: SimpleNamespace(to=lambda device: estimator) if "map-anything" in name else None
    )
    for name in ("mapanything", "mapanything.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "mapanything.utils.image", image)
    monkeypatch.setitem(sys.modules, "mapanything.models", models)
    return estimator


class Encoder:
    def encode(self, videos):
        assert [tuple(video.shape) for video in videos] == [(3, 1, 96, 128)]
        assert videos[0].min() == -1 and videos[0].max() == 1
        return [frame(0)[3][0][:, None]]


def photograph(path, **options):
    image = pytest.importorskip("PIL.Image", reason="the package pillow is not installed")
    pixels = np.zeros((96, 128, 3), dtype=np.uint8)
    pixels[20:] = 255
    image.fromarray(pixels).save(path, **options)
    return path


def test_from_image_path(estimator, tmp_path):
    path = photograph(tmp_path / "room.png")
    mask = torch.zeros(IMAGE)
    mask[:8] = 1
    got = LatentPointCloud.from_image_path(str(path), Encoder(), mask=mask, device="cpu")
    depths, _, poses, latents = frame(0)
    expected = LatentPointCloud.from_geometry(depths[0], K, poses[0], latents[0][:, None], mask, "cpu")
    assert 0 < int(expected.valid_mask.sum()) < 48
    assert_equal_bits(attributes(got), attributes(expected))
    ((views, options),) = estimator.calls
    assert views == [{"path": str(path)}] and options["apply_mask"] and options["mask_edges"]
    # A camera that is known is handed on with the image, and a model that was loaded is used.
    other = Estimator()
    LatentPointCloud.from_image_path(path, Encoder(), K, torch.eye(4), device="cpu", mapanything_model=other)
    ((views, _),) = other.calls
    assert views[0]["img"].shape == (96, 128, 3) and views[0]["img"].dtype == np.uint8
    assert np.array_equal(views[0]["intrinsics"], K.numpy()) and views[0]["camera_poses"].shape == (4, 4)
    assert len(estimator.calls) == 1


def test_refused_photographs(estimator, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="the package pillow is not installed")
    turned = image.Exif()
    turned[0x0112] = 6
    path = photograph(tmp_path / "turned.jpg", exif=turned)
    with pytest.raises(ValueError, match=r"turned\.jpg must be stored upright"):
        LatentPointCloud.from_image_path(path, Encoder(), device="cpu")
    assert not estimator.calls


def test_without_mapanything(tmp_path):
    with pytest.raises(ImportError, match=r"needs the packages mapanything and pillow .*call from_geometry"):
        LatentPointCloud.from_image_path(tmp_path / "room.png", Encoder(), device="cpu")

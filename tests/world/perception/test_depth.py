"""Depth of frames: each estimator keeps its package's conventions, and alignment finds the memory's scale and shift."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brute_force import pixels_of_cell, sample_median
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mirage.files.framing import Framing
from mirage.optional import MissingExtraError
from mirage.perception.depth import DepthEstimator, GivenDepth
from mirage.perception.depth_alignment import align_depth
from mirage.perception.depth_models import (
    DEPTH_ESTIMATORS,
    DepthAnything3,
    DepthAnythingV2,
    DepthPro,
    MapAnything,
    make_depth_estimator,
)
from mirage_kernels import Cameras, LatentCache


def make_cameras(views: int, size: tuple[int, int], focal: float = 0.8, step: float = 0.1) -> Cameras:
    """Views that turn and move sideways; the principal point is off-centre, fx differs from fy."""
    height, width = size
    matrix = np.array([[focal * width, 0, 0.45 * width], [0, 0.9 * focal * width, 0.55 * height], [0, 0, 1]])
    poses = np.stack([np.eye(4)] * views)
    for t in range(views):
        angle = 0.1 * t
        poses[t, :3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        poses[t, :3, 3] = [step * t, -0.5 * step * t, 0.3 * step * t]
    return Cameras(matrix, poses, size, square_pixels=False)


def plane_depth(cameras: Cameras, pixel_centre: float = 0.5) -> Tensor:
    """(T, H, W) float64: z of the world plane 0.2 x + 0.5 y + z = 4 at every pixel."""
    height, width = cameras.image_size
    v, u = torch.meshgrid(torch.arange(height) + pixel_centre, torch.arange(width) + pixel_centre, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], -1).double()
    normal = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    maps = []
    for matrix, pose in zip(cameras.intrinsics, cameras.cam2world, strict=True):
        rays = pixels @ torch.linalg.inv(matrix).T @ pose[:3, :3].T
        maps.append((4 - normal @ pose[:3, 3]) / (rays @ normal))
    return torch.stack(maps)


def random_frames(views: int, size: tuple[int, int]) -> Tensor:
    return torch.rand(views, 3, *size, generator=torch.Generator().manual_seed(0))


class TestGivenDepth:
    def test_hands_out_the_frames_asked_for(self) -> None:
        depth = torch.arange(5 * 4 * 6, dtype=torch.float64).reshape(5, 4, 6)
        given_depth = GivenDepth(depth)
        assert isinstance(given_depth, DepthEstimator)
        assert (given_depth.needs_frames, given_depth.alignment) == (False, "none")
        got = given_depth(random_frames(2, (8, 12)), make_cameras(2, (8, 12)), [4, 1])
        assert got.dtype == torch.float32
        assert torch.equal(got, depth[[4, 1]].float())

    @pytest.mark.parametrize("dtype", ["float16", "float32", ">f8"])
    def test_arrays_of_any_float(self, dtype: str) -> None:
        depth = np.linspace(1, 2, 24).reshape(4, 6).astype(dtype)
        got = GivenDepth(depth)(None, make_cameras(1, (4, 6)), [0])
        assert torch.equal(got, torch.from_numpy(depth.astype(np.float32))[None])

    def test_memory_map_is_read_by_the_frame(self, tmp_path: Any) -> None:
        np.save(tmp_path / "depth.npy", np.full((3, 4, 6), 2.0))
        got = GivenDepth(np.load(tmp_path / "depth.npy", mmap_mode="r"))(None, make_cameras(1, (4, 6)), [2])
        assert torch.equal(got, torch.full((1, 4, 6), 2.0))

    def test_unknown_stays_unknown(self) -> None:
        depth = torch.tensor([[0.0, float("nan")], [1.0, 2.0]])
        got = GivenDepth(depth)(None, make_cameras(1, (2, 2)), [0])
        assert torch.equal(got.isnan(), depth[None].isnan())
        assert got[0, 0, 0] == 0

    def test_frame_it_does_not_have(self) -> None:
        cameras = make_cameras(1, (4, 6))
        with pytest.raises(ValueError, match="depth must hold frame 1, got 1 frame, from 0"):
            GivenDepth(torch.ones(4, 6))(None, cameras, [1])
        with pytest.raises(ValueError, match="depth must hold frame 3, got 3 frames, from 0"):
            GivenDepth(torch.ones(3, 4, 6))(None, cameras, [3])
        with pytest.raises(ValueError, match="depth must hold frame -1"):
            GivenDepth(torch.ones(3, 4, 6))(None, cameras, [-1])

    @pytest.mark.parametrize("size", [(240, 427), (240, 426), (480, 853)])
    def test_other_size_of_the_same_aspect(self, size: tuple[int, int]) -> None:
        assert GivenDepth(torch.ones(size))(None, make_cameras(1, (720, 1280)), [0]).shape == (1, *size)

    def test_a_channel_axis_and_a_crop(self) -> None:
        """As estimators give it, (N, 1, H, W); and of an image that frames are cropped out of."""
        depth = torch.rand(2, 1, 54, 96)
        assert torch.equal(GivenDepth(depth)(None, make_cameras(2, (108, 192)), [0, 1]), depth[:, 0])
        given = GivenDepth(depth.numpy(), Framing((108, 192), (96, 192)))
        assert torch.equal(given(None, make_cameras(1, (96, 192)), [1])[0], depth[1, 0, 3:51])
        frame = torch.rand(96, 192)  # of the frames' size already
        given = GivenDepth(frame, Framing((108, 192), (96, 192)))
        assert torch.equal(given(None, make_cameras(1, (96, 192)), [0])[0], frame)
        with pytest.raises(ValueError, match="depth must have the aspect of the 108x192 image, got 96x96"):
            GivenDepth(frame[:, :96], Framing((108, 192), (96, 192)))(None, make_cameras(1, (96, 192)), [0])

    def test_other_aspect(self) -> None:
        message = "depth must have the aspect of the 720x1280 images of cameras, got 480x640"
        with pytest.raises(ValueError, match=message):
            GivenDepth(torch.ones(480, 640))(None, make_cameras(1, (720, 1280)), [0])

    def test_other_errors(self) -> None:
        with pytest.raises(TypeError, match="depth must be a float tensor or array, .*, got list"):
            GivenDepth([[1.0]])
        with pytest.raises(TypeError, match="depth must be .* float .*, got torch.int32"):
            GivenDepth(torch.ones(4, 6, dtype=torch.int32))
        with pytest.raises(TypeError, match="depth must be .* float .*, got uint16"):
            GivenDepth(np.ones((4, 6), np.uint16))
        with pytest.raises(TypeError, match="got uint16: multiply it by its scale, such as 0.001 for millimetres"):
            GivenDepth(np.ones((4, 6), np.uint16))
        with pytest.raises(ValueError, match=r"depth must be .*, got \(1, 2, 4, 6\)"):
            GivenDepth(torch.ones(1, 2, 4, 6))
        with pytest.raises(ValueError, match="frame_numbers must be 1 ints as cameras, got 2"):
            GivenDepth(torch.ones(4, 6))(None, make_cameras(1, (4, 6)), [0, 0])


DINO = {
    "model_type": "dinov2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 1,
}


def save_depth_anything(folder: Any, kind: str = "metric", size: tuple[int, int] = (28, 42)) -> None:
    """A tiny checkpoint with random weights whose processor scales to `size`."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("PIL")
    torch.manual_seed(0)
    backbone = {**DINO, "image_size": 28, "patch_size": 14, "out_indices": [1, 2], "reshape_hidden_states": False}
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        reassemble_factors=[1, 0.5],
        neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
        depth_estimation_type=kind,
        max_depth=20,
    )
    transformers.DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    processor = transformers.DPTImageProcessor(
        size={"height": size[0], "width": size[1]},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor.save_pretrained(folder)


class TestDepthAnythingV2:
    def test_is_the_metric_output_of_the_normalised_frames(self, tmp_path: Any) -> None:
        save_depth_anything(tmp_path)
        estimator = make_depth_estimator("depth-anything-v2", model=str(tmp_path), batch_size=2)
        assert isinstance(estimator, DepthAnythingV2)
        assert isinstance(estimator, DepthEstimator)
        assert (estimator.needs_frames, estimator.alignment) == (True, "scale_shift")
        frames = (random_frames(3, (28, 42)) * 255).round() / 255
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        with torch.no_grad():
            expected = estimator.model(pixel_values=(frames - mean) / std).predicted_depth
        got = estimator(frames, make_cameras(3, (28, 42)), [0, 4, 8])
        assert got.shape == (3, 28, 42)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert got.std() > 0

    def test_larger_is_farther_and_frames_keep_their_size(self, tmp_path: Any) -> None:
        save_depth_anything(tmp_path)
        estimator = DepthAnythingV2(tmp_path)
        last = estimator.model.head.conv3
        nn.init.zeros_(last.weight)
        for bias in (-1.0, 1.0):  # the head is max_depth * sigmoid: metres
            nn.init.constant_(last.bias, bias)
            got = estimator(random_frames(1, (40, 66)), make_cameras(1, (40, 66)), [0])
            torch.testing.assert_close(got, torch.full((1, 40, 66), 20 * torch.sigmoid(torch.tensor(bias)).item()))

    def test_loaded_model_and_half_precision(self, tmp_path: Any) -> None:
        transformers = pytest.importorskip("transformers")
        save_depth_anything(tmp_path)
        frames, cameras = random_frames(2, (28, 42)), make_cameras(2, (28, 42))
        expected = DepthAnythingV2(tmp_path)(frames, cameras, [0, 1])
        model = transformers.AutoModelForDepthEstimation.from_pretrained(tmp_path)
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        got = DepthAnythingV2(model, processor, dtype=torch.bfloat16).to("cpu")(frames, cameras, [0, 1])
        assert next(model.parameters()).dtype == torch.bfloat16
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
        with pytest.raises(ValueError, match="processor must be the image processor of the loaded model, got None"):
            DepthAnythingV2(model)

    def test_relative_is_refused_before_weights_are_read(self, tmp_path: Any) -> None:
        save_depth_anything(tmp_path, kind="relative")
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="model must be a metric checkpoint .*, got 'relative'.* disparity"):
            DepthAnythingV2(tmp_path)

    def test_shapes_that_do_not_belong_together(self, tmp_path: Any) -> None:
        save_depth_anything(tmp_path)
        estimator = DepthAnythingV2(tmp_path)
        cameras = make_cameras(2, (28, 42))
        with pytest.raises(ValueError, match=r"frames must be \(2, 3, 28, 42\) float32 .*, got \(1, 3, 28, 42\)"):
            estimator(random_frames(1, (28, 42)), cameras, [0, 1])
        with pytest.raises(ValueError, match="frames must be .* float32 as cameras say, got .* float64"):
            estimator(random_frames(2, (28, 42)).double(), cameras, [0, 1])
        with pytest.raises(ValueError, match="frame_numbers must be 2 ints as cameras, got 1"):
            estimator(random_frames(2, (28, 42)), cameras, [0])
        with pytest.raises(ValueError, match="batch_size must be a positive int, got 0"):
            DepthAnythingV2(tmp_path, batch_size=0)


def save_depth_pro(folder: Any) -> None:
    """A tiny checkpoint with random weights, its field-of-view network included; it sees 32x32 pixels."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    encoder = {**DINO, "image_size": 16, "patch_size": 8, "intermediate_size": 16}
    config = transformers.DepthProConfig(
        patch_size=16,
        fusion_hidden_size=8,
        intermediate_hook_ids=[1, 0],
        intermediate_feature_dims=[8, 8],
        scaled_images_ratios=[0.5, 1.0],
        scaled_images_overlap_ratios=[0.0, 0.2],
        scaled_images_feature_dims=[8, 8],
        merge_padding_value=0,
        use_fov_model=True,
        num_fov_head_layers=0,
        image_model_config=dict(encoder),
        patch_model_config=dict(encoder),
        fov_model_config=dict(encoder),
    )
    model = transformers.DepthProForDepthEstimation(config)
    last = model.head.layers[-2]  # before its ReLU: positive everywhere, so that no limit hides anything
    nn.init.constant_(last.bias, 1.5)
    last.weight.data *= 0.01
    model.save_pretrained(folder)


class TestDepthPro:
    def test_canonical_inverse_depth_with_our_focal_length(self, tmp_path: Any) -> None:
        save_depth_pro(tmp_path)
        estimator = make_depth_estimator("depth-pro", model=tmp_path)
        assert isinstance(estimator, DepthPro)
        assert (estimator.needs_frames, estimator.alignment) == (True, "scale")
        assert estimator.model.fov_model is None
        frames, cameras = random_frames(3, (32, 32)), make_cameras(3, (32, 32))
        with torch.no_grad():
            canonical = estimator.model(pixel_values=2 * frames - 1).predicted_depth
        assert canonical.min() > 0.01
        inverse = F.interpolate(canonical[:, None], (32, 32), mode="bilinear")[:, 0]
        expected = cameras.intrinsics[:, 0, 0].float()[:, None, None] / (32 * inverse)
        torch.testing.assert_close(estimator(frames, cameras, [0, 1, 2]), expected, rtol=1e-5, atol=1e-5)

    def test_a_longer_lens_sees_farther(self, tmp_path: Any) -> None:
        save_depth_pro(tmp_path)
        estimator = DepthPro(tmp_path)
        frames = random_frames(1, (24, 40))
        near = estimator(frames, make_cameras(1, (24, 40), focal=0.6), [0])
        far = estimator(frames, make_cameras(1, (24, 40), focal=1.2), [0])
        assert near.shape == (1, 24, 40)
        torch.testing.assert_close(far, 2 * near)

    def test_equals_the_processor_of_transformers(self, tmp_path: Any) -> None:
        pytest.importorskip("torchvision", reason="transformers' processor of Depth Pro needs torchvision")
        transformers = pytest.importorskip("transformers")
        save_depth_pro(tmp_path)
        estimator = DepthPro(tmp_path)
        frames, cameras = random_frames(2, (24, 40)), make_cameras(2, (24, 40))
        processor = transformers.DepthProImageProcessor(size={"height": 32, "width": 32})
        with torch.no_grad():
            output = estimator.model(**processor(images=list(frames), do_rescale=False, return_tensors="pt"))
        output.field_of_view = torch.rad2deg(2 * torch.atan(20 / cameras.intrinsics[:, 0, 0].float()))
        expected = processor.post_process_depth_estimation(output, target_sizes=[(24, 40)] * 2)
        got = estimator(frames, cameras, [0, 1])
        torch.testing.assert_close(got, torch.stack([item["predicted_depth"] for item in expected]))


class FakeMapAnything(nn.Module):
    """Sees the plane of `plane_depth` through the views it is given, by the conventions of mapanything.

    `get_rays_in_camera_frame` there: the ray of pixel (i, j) is ((j - cx) / fx, (i - cy) / fy, 1); camera_poses are
    camera to world; depth_z is (1, h, w, 1), 0 where masked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.views_at_a_time: list[int] = []

    @classmethod
    def from_pretrained(cls, name: str) -> FakeMapAnything:
        assert name == "facebook/map-anything"
        return cls()

    def infer(self, views: list[dict[str, Any]], *, apply_mask: bool, **options: Any) -> list[dict[str, Tensor]]:
        assert apply_mask
        assert not torch.is_grad_enabled()
        self.views_at_a_time.append(len(views))
        predictions = []
        for view in views:
            assert set(view) == {"img", "intrinsics", "camera_poses", "is_metric_scale"}
            assert view["is_metric_scale"].tolist() == [True]
            assert view["intrinsics"].dtype == view["camera_poses"].dtype == np.float32
            size, poses = view["img"].shape[:2], view["camera_poses"][None]
            cameras = Cameras(view["intrinsics"], poses, size, square_pixels=False)
            depth = plane_depth(cameras, pixel_centre=0.0).float()
            depth[:, 0, 0] = 0
            predictions.append({"depth_z": depth[..., None]})
        return predictions


@pytest.fixture
def fake_mapanything(monkeypatch: pytest.MonkeyPatch) -> None:
    def preprocess_inputs(views: list[dict[str, Any]], *, resize_mode: str, size: tuple[int, int]) -> list[Any]:
        # Images of the size asked for are not cut; anything else would be.
        assert resize_mode == "fixed_size"
        for view in views:
            assert view["img"].dtype == np.uint8
            assert view["img"].shape == (size[1], size[0], 3)
            assert size[0] % 14 == 0 and size[1] % 14 == 0 and max(size) == 518
        return views

    package, models, utils, image = (
        ModuleType(name)
        for name in ("mapanything", "mapanything.models", "mapanything.utils", "mapanything.utils.image")
    )
    models.MapAnything = FakeMapAnything  # type: ignore[attr-defined]
    image.preprocess_inputs = preprocess_inputs  # type: ignore[attr-defined]
    for module in (package, models, utils, image):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("fake_mapanything")
class TestMapAnything:
    def test_sees_what_the_cameras_see(self) -> None:
        estimator = make_depth_estimator("map-anything", batch_size=2)
        assert isinstance(estimator, MapAnything)
        assert (estimator.needs_frames, estimator.alignment) == (True, "scale")
        cameras = make_cameras(3, (70, 128))
        got = estimator(random_frames(3, (70, 128)), cameras, [0, 4, 8])
        expected = plane_depth(cameras.resized((280, 518))).float()
        expected[:, 0, 0] = 0
        expected = F.interpolate(expected[:, None], (70, 128), mode="nearest-exact")[:, 0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert estimator.model.views_at_a_time == [2, 1]

    def test_masked_pixels_are_unknown_and_not_blended(self) -> None:
        got = MapAnything(FakeMapAnything())(random_frames(1, (280, 518)), make_cameras(1, (280, 518)), [0])
        assert got[0, 0, 0] == 0
        assert (got == 0).sum() == 1


class FakeDepthAnything3(nn.Module):
    """Depth 300 everywhere at 28x56 pixels, sky in the top row."""

    def __init__(self, model_name: str = "da3metric-large") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.model_name = model_name
        self.device: torch.device | None = None

    @classmethod
    def from_pretrained(cls, name: str) -> FakeDepthAnything3:
        assert name == "depth-anything/DA3METRIC-LARGE"
        return cls()

    def inference(self, image: list[np.ndarray]) -> SimpleNamespace:
        assert self.device == self.weight.device
        assert not torch.is_grad_enabled()
        for frame in image:
            assert frame.dtype == np.uint8 and frame.shape == (40, 80, 3)
        sky = np.zeros((len(image), 28, 56), np.float32)
        sky[:, 0] = 0.9
        return SimpleNamespace(depth=np.full((len(image), 28, 56), 300, np.float32), sky=sky)


@pytest.fixture
def fake_depth_anything_3(monkeypatch: pytest.MonkeyPatch) -> None:
    api = ModuleType("depth_anything_3.api")
    api.DepthAnything3 = FakeDepthAnything3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "depth_anything_3", ModuleType("depth_anything_3"))
    monkeypatch.setitem(sys.modules, "depth_anything_3.api", api)


@pytest.mark.usefixtures("fake_depth_anything_3")
class TestDepthAnything3:
    def test_metres_by_the_focal_length_at_the_size_of_the_network(self) -> None:
        estimator = make_depth_estimator("depth-anything-3")
        assert isinstance(estimator, DepthAnything3)
        assert (estimator.needs_frames, estimator.alignment) == (True, "scale")
        got = estimator(random_frames(5, (40, 80)), make_cameras(5, (40, 80)), range(5))
        assert (got[:, 0] == 0).all()
        # fx = 0.8 * 80 and fy = 0.9 * fx in pixels of the frames; 56 of 80 and 28 of 40 remain.
        torch.testing.assert_close(got[:, 2:], torch.full((5, 38, 80), 0.7 * 64 * (1 + 0.9) / 2))

    def test_frames_arrive_as_they_are(self) -> None:
        seen = []

        class Watching(FakeDepthAnything3):
            def inference(self, image: list[np.ndarray]) -> SimpleNamespace:
                seen.extend(image)
                return super().inference(image)

        frames = random_frames(2, (40, 80))
        DepthAnything3(Watching(), batch_size=1)(frames, make_cameras(2, (40, 80)), [0, 1])
        expected = (frames * 255).round().permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(np.stack(seen), expected)

    def test_any_view_models_are_refused(self) -> None:
        with pytest.raises(ValueError, match="model must be a monocular metric checkpoint, .*, got da3-large"):
            DepthAnything3(FakeDepthAnything3("da3-large"))


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("depth-anything-v2", "transformers", 'pip install "mirage-world[generate]"'),
        ("depth-pro", "transformers", 'pip install "mirage-world[generate]"'),
        ("map-anything", "mapanything", 'pip install "mapanything @ git+https://github.com/facebookresearch/'),
        ("depth-anything-3", "depth_anything_3", 'pip install "depth-anything-3 @ git+https://github.com/ByteDance-'),
    ],
)
def test_a_missing_package_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, install: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError) as error:
        make_depth_estimator(name)
    assert str(error.value).startswith(f"{package} is needed and not installed: {install}")


def test_a_package_that_lacks_something_says_what(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, *_: Any) -> ModuleType:
        raise ModuleNotFoundError("No module named 'uniception'", name="uniception")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="uniception"):
        make_depth_estimator("map-anything")


def test_an_unknown_name_lists_the_known_ones() -> None:
    names = "depth-anything-v2, depth-pro, map-anything, depth-anything-3"
    assert ", ".join(DEPTH_ESTIMATORS) == names
    with pytest.raises(ValueError, match=f"name must be one of {names}, got 'midas'"):
        make_depth_estimator("midas")


GRID = (12, 20)
PIXELS = (50, 83)  # no multiple of the grid: cells differ in size


def token_medians(depth: np.ndarray, size: tuple[int, int] = GRID) -> np.ndarray:
    """(T, h, w) float64 by the loops of brute_force."""
    rows = [pixels_of_cell(i, depth.shape[1], size[0]) for i in range(size[0])]
    columns = [pixels_of_cell(j, depth.shape[2], size[1]) for j in range(size[1])]
    return np.array([[[sample_median(view, r, c) for c in columns] for r in rows] for view in depth])


def make_scene(views: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """New depth (T, H, W) float32, 2 to 8 units, a tenth of it unknown, and its token depth (T, h, w)."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[0 : PIXELS[0], 0 : PIXELS[1]] / PIXELS[0]
    depth = np.stack([4 + 2 * v + np.sin(4 * u + t) for t in range(views)]).astype(np.float32)
    depth[:, :8, :10] = 0  # a patch with no depth at all
    holes = rng.random(depth.shape) < 0.1
    depth[holes] = rng.choice([0, np.nan, -1, np.inf], int(holes.sum()))
    return depth, token_medians(depth)


def as_memory(values: np.ndarray, mask: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
    seen = torch.from_numpy(values > 0 if mask is None else mask & (values > 0))
    return torch.from_numpy(values).float() * seen, seen


class TestAlignDepth:
    @pytest.mark.parametrize("mode", ["scale", "scale_shift"])
    @pytest.mark.parametrize("outliers", ["farther surface", "new occluder", "anything", "far wall"])
    def test_finds_scale_and_shift_among_outliers(self, mode: str, outliers: str) -> None:
        rng = np.random.default_rng(1)
        scale, shift = 0.6, 0.8 if mode == "scale_shift" else 0.0
        depth, tokens = make_scene()
        truth = scale * depth + shift
        memory = (scale * tokens + shift) * (1 + 0.002 * rng.standard_normal(tokens.shape))
        wrong = rng.random(tokens.shape) < 0.4
        if outliers == "farther surface":
            memory = np.where(wrong, memory * rng.uniform(1.1, 3, tokens.shape), memory)
        elif outliers == "new occluder":
            rows = round(0.37 * PIXELS[0])
            depth[:, :rows] = 1.2 + 0.1 * rng.random((2, rows, PIXELS[1]))
            truth = scale * depth + shift
        elif outliers == "anything":
            memory = np.where(wrong, rng.uniform(0.5, 20, tokens.shape), memory)
        else:
            memory = np.where(wrong, 15.0, memory)
        memory[tokens == 0] = 5  # the memory knows what the new depth does not
        got = align_depth(torch.from_numpy(depth), *as_memory(memory, rng.random(tokens.shape) < 0.8), mode)

        assert got.source == ("own", "own")
        known = np.isfinite(depth) & (depth > 0)
        error = np.abs(got.depth.numpy()[known] / truth[known] - 1)
        assert error.max() < 0.01
        assert np.abs(depth[known] / truth[known] - 1).min() > 0.05  # its input would not do
        assert (got.depth.numpy()[~known] == 0).all()
        assert 0.55 < got.inlier_fraction.min() and got.inlier_fraction.max() < 0.7

    def test_cells_are_the_lower_medians_that_a_cache_stores(self) -> None:
        depth, tokens = make_scene(seed=3)
        rng = np.random.default_rng(3)
        # Every pixel a value of its own and cells half unknown: mean, upper median or a wrong cell would not fit.
        depth *= rng.uniform(0.5, 1.5, depth.shape).astype(np.float32)
        depth[rng.random(depth.shape) < 0.4] = 0
        tokens = token_medians(depth)
        assert 0.1 < (tokens == 0).mean() < 0.6
        memory, mask = torch.from_numpy(1.7 * tokens - 0.25).float(), torch.ones(tokens.shape, dtype=torch.bool)
        got = align_depth(torch.from_numpy(depth), memory, mask)
        torch.testing.assert_close(got.scale, torch.full((2,), 1.7, dtype=torch.float64), rtol=1e-5, atol=0)
        torch.testing.assert_close(got.shift, torch.full((2,), -0.25, dtype=torch.float64), rtol=0, atol=1e-5)
        assert got.overlap.tolist() == ((1.7 * tokens - 0.25 > 0) & (tokens > 0)).sum((1, 2)).tolist()
        assert got.inlier_fraction.tolist() == [1, 1]

    def test_agrees_with_what_a_cache_shows(self) -> None:
        cameras = make_cameras(4, (96, 160))
        truth = plane_depth(cameras).float()
        cache = LatentCache(channels=1)
        cache.write(torch.zeros(2, 1, 24, 40), truth[:2], cameras[:2])
        view = cache.read(cameras[2:], (24, 40))
        assert 0.3 < view.mask.float().mean() < 1
        got = align_depth((truth[2:] - 0.5) / 1.3, view.depth, view.mask)
        assert got.source == ("own", "own")
        torch.testing.assert_close(got.depth, truth[2:], rtol=0.01, atol=0)

    def test_a_view_with_too_little_takes_the_fit_of_the_others(self) -> None:
        depth, tokens = make_scene(views=3)
        memory = 0.5 * tokens + 1
        seen = tokens > 0
        seen[1] = False
        seen[1, 6, :20] = True
        memory[1, 6] = 40  # 20 cells are too few, whatever they say
        got = align_depth(torch.from_numpy(depth), *as_memory(memory, seen))
        assert got.source == ("own", "pooled", "own")
        torch.testing.assert_close(got.scale, torch.full((3,), 0.5, dtype=torch.float64), rtol=1e-4, atol=0)
        torch.testing.assert_close(got.shift, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-3)
        assert got.overlap[1] == got.overlap[0] + got.overlap[2]

    def test_a_view_that_contradicts_itself_takes_the_fit_of_the_others(self) -> None:
        depth, tokens = make_scene()
        memory = 0.5 * tokens + 1
        memory[1] = np.random.default_rng(5).uniform(0.5, 50, GRID)
        got = align_depth(torch.from_numpy(depth), *as_memory(memory))
        assert got.source == ("own", "pooled")
        assert got.scale[1] == pytest.approx(0.5, rel=1e-4)

    def test_little_in_every_view_is_enough_together(self) -> None:
        depth, tokens = make_scene(views=3)
        seen = np.zeros(tokens.shape, dtype=bool)
        seen[:, 5:11:5, 8:18] = True
        got = align_depth(torch.from_numpy(depth), *as_memory(0.5 * tokens + 1, seen))
        assert got.source == ("pooled",) * 3
        assert got.overlap.tolist() == [60] * 3
        torch.testing.assert_close(got.scale, torch.full((3,), 0.5, dtype=torch.float64), rtol=1e-3, atol=0)

    @pytest.mark.parametrize("nothing", ["unseen", "absurd scale", "unknown depth"])
    def test_without_any_fit_depth_is_as_it_was(self, nothing: str) -> None:
        depth, tokens = make_scene()
        if nothing == "unknown depth":
            depth[:] = np.nan
        memory, mask = as_memory(1000 * tokens if nothing == "absurd scale" else tokens)
        got = align_depth(torch.from_numpy(depth), memory, mask & (nothing != "unseen"))
        assert got.source == ("none", "none")
        assert (got.scale.tolist(), got.shift.tolist()) == ([1, 1], [0, 0])
        assert (got.overlap.tolist(), got.inlier_fraction.tolist()) == ([0, 0], [0, 0])
        known = np.isfinite(depth) & (depth > 0)
        np.testing.assert_array_equal(got.depth.numpy(), np.where(known, depth, 0))

    def test_narrow_depth_has_a_scale_and_no_shift(self) -> None:
        rng = np.random.default_rng(7)
        depth = (3 + 0.2 * rng.random((1, *PIXELS))).astype(np.float32)
        tokens = token_medians(depth)
        memory = 2 * tokens * (1 + 0.01 * rng.standard_normal(tokens.shape))
        memory[:, ::3] = rng.uniform(1, 20, memory[:, ::3].shape)  # the outliers' range does not count
        got = align_depth(torch.from_numpy(depth), *as_memory(memory))
        assert got.source == ("own",)
        assert got.shift.tolist() == [0]
        assert got.scale[0] == pytest.approx(2, rel=0.01)

    def test_nothing_is_pushed_behind_the_camera(self) -> None:
        depth, tokens = make_scene(views=1)
        depth[0, 30:34, 40:44] = 0.2
        got = align_depth(torch.from_numpy(depth), *as_memory(tokens - 1.5))
        assert got.shift[0] == pytest.approx(-1.5, abs=1e-3)
        assert (got.depth[0, 30:34, 40:44] == 0).all()
        assert (got.depth >= 0).all()

    def test_scale_mode_has_no_shift(self) -> None:
        depth, tokens = make_scene()
        got = align_depth(torch.from_numpy(depth), *as_memory(0.5 * tokens + 0.01), "scale")
        assert got.shift.tolist() == [0, 0]

    def test_same_bits_at_any_thread_count(self, threads: Any) -> None:
        depth, tokens = make_scene(views=4)
        rng = np.random.default_rng(9)
        memory = as_memory((0.5 * tokens + 1) * (1 + 0.02 * rng.standard_normal(tokens.shape)))
        results = []
        for count in (1, 2):
            threads(count)
            results.append(align_depth(torch.from_numpy(depth), *memory))
        assert torch.equal(results[0].depth, results[1].depth)
        assert torch.equal(results[0].scale, results[1].scale)
        assert results[0].depth.dtype == torch.float32

    @given(
        seed=st.integers(0, 2**32 - 1),
        mode=st.sampled_from(["scale", "scale_shift"]),
        spread=st.sampled_from([0.0, 0.1, 5.0, 40.0]),
        share=st.sampled_from([0.05, 0.5, 1.0]),
    )
    def test_never_nan_never_negative(self, seed: int, mode: str, spread: float, share: float) -> None:
        rng = np.random.default_rng(seed)
        special = np.array([0, -1, np.nan, np.inf, -np.inf, 1e-38, 3e38])

        def garbage(*shape: int) -> np.ndarray:
            values = np.exp(spread * rng.standard_normal(shape))
            odd = rng.random(shape) < 0.1
            values[odd] = rng.choice(special, int(odd.sum()))
            with np.errstate(over="ignore"):
                return values.astype(np.float32)

        mask = torch.from_numpy(rng.random((3, 8, 10)) < share)
        got = align_depth(torch.from_numpy(garbage(3, 24, 30)), torch.from_numpy(garbage(3, 8, 10)), mask, mode)
        assert got.depth.isfinite().all() and (got.depth >= 0).all()
        assert ((got.scale >= 0.01) & (got.scale <= 100)).all()
        assert got.shift.isfinite().all()
        assert ((got.inlier_fraction >= 0) & (got.inlier_fraction <= 1)).all()

    def test_errors_name_the_argument(self) -> None:
        depth, memory, mask = torch.ones(2, 8, 12), torch.ones(2, 4, 6), torch.ones(2, 4, 6, dtype=torch.bool)
        with pytest.raises(ValueError, match="mode must be one of scale, scale_shift, got 'none'"):
            align_depth(depth, memory, mask, "none")
        with pytest.raises(ValueError, match=r"memory_depth must be \(2, h, w\) as depth, got \(1, 4, 6\)"):
            align_depth(depth, memory[:1], mask[:1])
        with pytest.raises(ValueError, match=r"memory_mask must be \(2, 4, 6\) bool .*, got \(2, 4, 6\) float32"):
            align_depth(depth, memory, memory)
        with pytest.raises(ValueError, match=r"depth must be \(T, H, W\) at least as fine as the token grid \(4, 6\)"):
            align_depth(depth[:, :2], memory, mask)

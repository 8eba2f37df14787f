"""Static filters: sky and moving boxes in ray-cast scenes with exact depth, a real room, and tiny random networks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from room import FURNITURE, SIZE, cast, path, render
from torch import Tensor, nn

from mirage.optional import MissingExtraError
from mirage.perception import static_filter_models
from mirage.perception.static_filter import (
    AllOf,
    AllStatic,
    ChunkViews,
    ConfidenceFilter,
    GeometricFilter,
    StaticFilter,
)
from mirage.perception.static_filter_models import STATIC_FILTERS, Sam2Filter, Sam3Filter, SkyFilter, make_static_filter
from mirage.scenes.rgbd import load_rgbd_folder
from mirage_kernels import Cameras, LatentCache, back_project
from mirage_kernels.geometry import pool_mask

LATENT = (22, 40)


# Scenes.


def moving_box(views: int, start: float = -1.2, step: float = 0.7, side: float = 0.5) -> Tensor:
    """(T, 2, 3): a cube in the air before the furniture, which by default moves by more than its size a view."""
    center = torch.tensor([[start + step * k, -0.4, 0.0] for k in range(views)], dtype=torch.float64)
    return torch.stack([center - side / 2, center + side / 2], dim=1)


def chunk(depth: Tensor, cameras: Cameras, cache: LatentCache | None = None, **changes: Any) -> ChunkViews:
    values: dict[str, Any] = {
        "frames": None,
        "frames_per_latent": (4,) * len(depth),
        "depth": depth,
        "cameras": cameras,
        "cache": LatentCache(2) if cache is None else cache,
        "past": None,
        "latent_size": LATENT,
    }
    return ChunkViews(**(values | changes))


def remember(cameras: Cameras, depth: Tensor, mask: Tensor | None = None) -> LatentCache:
    cache = LatentCache(2)
    cache.write(torch.zeros(len(cameras), 2, *LATENT), depth, cameras, mask)
    return cache


def tokens(static: Tensor) -> Tensor:
    return pool_mask(static, LATENT)


def mostly(shows: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(shows[:, None].float(), LATENT)[:, 0] >= 0.5


# The geometric filter.


def test_moving_box_is_caught_at_first_sight() -> None:
    cameras, box = path(-0.3, 4), moving_box(4)
    depth, shows = render(cameras, box)
    static = GeometricFilter()(chunk(depth, cameras))
    assert static.shape == depth.shape and static.dtype == torch.bool
    covered, touched = mostly(shows), ~tokens(~shows)
    assert covered.sum() > 100
    assert (~tokens(static))[covered].float().mean() >= 0.95
    # What is marked beyond the box: tokens beside it, and those it has just left.
    left = render(cameras, box[[0, 0, 1, 2]])[1]
    near = F.max_pool2d((touched | ~tokens(~left))[:, None].float(), 3, 1, 1)[:, 0] > 0
    assert tokens(static)[~near].float().mean() >= 0.995


def test_the_place_a_thing_comes_from_is_marked_too() -> None:
    cameras, box = path(0.0, 4, step=0.0), moving_box(4)
    static = GeometricFilter()(chunk(render(cameras, box)[0], cameras))
    left = mostly(render(cameras, box[[0, 0, 1, 2]])[1])
    assert left[1:].sum() > 50
    assert (~tokens(static))[1:][left[1:]].float().mean() >= 0.95


def test_thing_that_was_not_there_is_caught_against_the_memory() -> None:
    past, cameras = path(-0.6, 10), path(0.0, 3)
    cache = remember(past, render(past)[0])
    standing = moving_box(3, start=0.0, step=0.0)
    depth, shows = render(cameras, standing)
    covered = mostly(shows)
    static = tokens(GeometricFilter()(chunk(depth, cameras, cache, past=past)))
    assert covered.sum() > 100
    assert (~static)[covered].float().mean() >= 0.95
    # Within the chunk the thing stands still: nothing speaks against it without the memory.
    assert tokens(GeometricFilter()(chunk(depth, cameras))).float().mean() >= 0.995
    assert tokens(GeometricFilter(max_past_views=0)(chunk(depth, cameras, cache, past=past))).float().mean() >= 0.995


def test_static_room_is_left_alone() -> None:
    past, cameras = path(-0.9, 8), path(0.3, 8)
    cache = remember(past, render(past)[0])
    noisy = render(cameras)[0] * (1 + 0.01 * torch.randn(8, *SIZE, generator=torch.Generator().manual_seed(0)))
    for depth in (render(cameras)[0], noisy):
        for views in (chunk(depth, cameras, cache, past=past), chunk(depth, cameras)):
            assert tokens(GeometricFilter()(views)).float().mean() >= 0.995


def test_what_was_hidden_is_static_when_it_comes_into_view() -> None:
    # A cube behind a screen, which alone the past saw: the new views look behind it.
    screen, cube = ((-1.0, -1.5, 0.0), (1.0, 1.5, 0.2)), ((0.3, 0.0, 1.0), (1.1, 1.5, 1.6))
    past, cameras = path(-0.2, 8, step=0.05), path(2.0, 4, target=(0.6, 0.2, 1.3))
    cache = remember(past, render(past, furniture=[screen, cube])[0])
    depth, revealed = render(cameras, torch.tensor(cube).expand(4, 2, 3), furniture=[screen])
    assert not render(past, torch.tensor(cube).expand(8, 2, 3), furniture=[screen])[1].any()
    assert mostly(revealed).sum() > 100
    static = GeometricFilter()(chunk(depth, cameras, cache, past=past))
    assert tokens(static)[mostly(revealed)].all()
    assert tokens(static).float().mean() >= 0.99


def test_empty_memory_and_one_view_leave_everything() -> None:
    cameras = path(0.0, 1)
    assert GeometricFilter()(chunk(render(cameras, moving_box(1))[0], cameras)).all()


def test_one_vote_is_not_enough() -> None:
    cameras, box = path(0.0, 2, step=0.0), moving_box(2)
    views = chunk(render(cameras, box)[0], cameras)
    assert GeometricFilter()(views).all()
    assert not GeometricFilter(min_views=1)(views).all()


def test_unknown_depth_neither_votes_nor_is_marked() -> None:
    cameras, box = path(-0.3, 4), moving_box(4)
    depth, shows = render(cameras, box)
    blind = torch.full_like(depth, float("nan"))
    blind[0] = depth[0]
    assert GeometricFilter()(chunk(blind, cameras)).all()
    assert GeometricFilter()(chunk(torch.zeros_like(depth), cameras)).all()
    holes = torch.where(torch.arange(SIZE[1]) % 7 == 0, 0.0, depth)
    assert (~tokens(GeometricFilter()(chunk(holes, cameras))))[mostly(shows)].float().mean() >= 0.95


def test_depth_of_the_latents_size() -> None:
    cameras, box = path(-0.3, 4), moving_box(4)
    depth, shows = render(cameras.resized(LATENT), box)
    static = GeometricFilter()(chunk(depth, cameras))
    assert static.shape == (4, *LATENT)
    assert (~static)[shows].float().mean() >= 0.95
    assert static.float().mean() > 0.7


def test_same_bits_at_any_thread_count(threads: Any) -> None:
    past, cameras = path(-0.6, 10), path(0.0, 4)
    cache = remember(past, render(past)[0])
    views = chunk(render(cameras, moving_box(4))[0], cameras, cache, past=past)
    threads(1)
    one = GeometricFilter()(views)
    threads(2)
    assert torch.equal(GeometricFilter()(views), one)


def test_past_views_are_spread_in_time_and_see_the_points() -> None:
    away = path(0.0, 6, step=0.0, target=(0.0, 0.0, -10.0))
    past = Cameras.cat([path(0.0, 6, step=0.0), away, path(0.0, 6, step=0.0)])
    points = back_project(render(path(0.0, 1))[0], path(0.0, 1).intrinsics, path(0.0, 1).cam2world, LATENT).points
    chosen = GeometricFilter(max_past_views=3)._choose_past(past, points.flatten(0, 2))
    assert chosen is not None and torch.equal(chosen.cam2world, past[[0, 12]].cam2world)
    assert GeometricFilter()._choose_past(away, points.flatten(0, 2)) is None


@pytest.mark.slow
def test_real_static_room_and_a_box_in_it(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "rgbd-room"
    if not folder.is_dir():
        pytest.skip(f"shared data absent: no directory {folder}")
    room, latent = load_rgbd_folder(folder, slice(0, 48)), (30, 40)
    # Depth of the box is at 60 % of the scene's; it moves along x of the chunk's middle camera.
    for side, step in ((None, 0.0), (0.35, 0.5)):
        cache, counts = LatentCache(2), torch.zeros(4)
        for begin in range(0, 48, 8):
            cameras, depth = room.cameras[begin : begin + 8], room.depth[begin : begin + 8].clone()
            shows = left = torch.zeros_like(depth, dtype=torch.bool)
            if side is not None:
                pose = cameras.cam2world[4]
                middle = pose[:3, 3] + pose[:3, 2] * 0.6 * depth[4][depth[4] > 0].median()
                centers = middle + torch.arange(-4, 4)[:, None] * step * pose[:3, 0]
                box = torch.stack([centers - side / 2, centers + side / 2], dim=1)
                (enter, leave), scene = cast(cameras, box), torch.where(depth > 0, depth, torch.inf)
                shows = (enter < leave) & (enter < scene)
                depth = torch.where(shows, enter.float(), depth)
                enter, leave = cast(cameras, box[[0, *range(7)]])
                left = (enter < leave) & (enter < scene)
            past = room.cameras[:begin] if begin else None
            static = GeometricFilter()(chunk(depth, cameras, cache, past=past, latent_size=latent))
            cache.write(torch.zeros(8, 2, *latent), depth, cameras, static)
            marked = ~pool_mask(static, latent)
            known = back_project(depth, cameras.intrinsics, cameras.cam2world, latent).valid
            clean = known & pool_mask(~shows & ~left, latent)
            covered = known & (F.adaptive_avg_pool2d(shows[:, None].float(), latent)[:, 0] >= 0.5)
            counts += torch.tensor([(marked & clean).sum(), clean.sum(), (marked & covered).sum(), covered.sum()])
        assert counts[0] / counts[1] <= 0.02
        if side is not None:
            assert counts[3] > 1000 and counts[2] / counts[3] >= 0.95


# Sky.


class ByColour(nn.Module):
    """Segmentation by colour, at a quarter of the size: blue is sky, green is water, else wall."""

    def __init__(self, id2label: dict[int, str] | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.config = SimpleNamespace(id2label=id2label or {0: "wall", 1: "sky", 2: "sea, water"})
        self.batches: list[int] = []

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        assert not torch.is_grad_enabled()
        self.batches.append(len(pixel_values))
        small = F.interpolate(pixel_values, scale_factor=0.25, mode="area")
        red, green, blue = small.unbind(1)
        return SimpleNamespace(logits=torch.stack([red, blue, green], 1) * self.scale)


def to_pixels(images: list[Any], **_: Any) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images]).float() / 255}


def painted(count: int, sky: dict[int, tuple[slice, slice]], colour: int = 2) -> Tensor:
    """Red frames, with a patch of another colour in some."""
    frames = torch.zeros(count, 3, *SIZE)
    frames[:, 0] = 1.0
    for frame, (rows, columns) in sky.items():
        frames[frame, :, rows, columns] = 0.0
        frames[frame, colour, rows, columns] = 1.0
    return frames


def sky_chunk(frames: Tensor, depth_size: tuple[int, int] = SIZE) -> ChunkViews:
    return chunk(torch.ones(3, *depth_size), path(0.0, 3), frames=frames, frames_per_latent=(1, 4, 4))


def test_sky_in_any_frame_of_the_group_is_dropped() -> None:
    patch = (slice(0, 40), slice(80, 200))
    frames = painted(9, {1: patch, 8: (slice(0, 16), slice(0, 16))})
    model = ByColour()
    static = SkyFilter(model, to_pixels, batch_size=2)(sky_chunk(frames))
    expected = torch.ones(3, *SIZE, dtype=torch.bool)
    expected[1, :40, 80:200] = False
    expected[2, :16, :16] = False
    assert (static != expected).float().mean() < 0.01 and static[0].all()
    assert torch.equal(tokens(static), tokens(expected))
    assert max(model.batches) == 2


def test_sky_at_the_latents_size_takes_every_cell_it_touches() -> None:
    frames = painted(9, {2: (slice(0, 44), slice(0, 320))})  # ends in the middle of the sixth row of tokens
    static = SkyFilter(ByColour(), to_pixels)(sky_chunk(frames, LATENT))
    assert static.shape == (3, *LATENT)
    assert not static[1, :6].any() and static[1, 6:].all() and static[0].all() and static[2].all()


@pytest.mark.parametrize("size", [(352, 640), (66, 400), (100, 170)])
def test_sky_at_the_size_of_given_depth(size: tuple[int, int]) -> None:
    patch = (slice(0, 88), slice(0, 320))
    static = SkyFilter(ByColour(), to_pixels)(sky_chunk(painted(9, {2: patch}), size))
    assert static.shape == (3, *size)
    assert not static[1, : size[0] // 2].any() and static[1, size[0] // 2 :].all() and static[0].all()


def test_sky_labels() -> None:
    water = sky_chunk(painted(9, {0: (slice(0, 80), slice(0, 80))}, colour=1))
    assert SkyFilter(ByColour(), to_pixels)(water).all()
    assert not SkyFilter(ByColour(), to_pixels, labels=("Water", "sky"))(water)[0, :72, :72].any()
    with pytest.raises(ValueError, match=r"labels must be classes of the model \(wall, floor, ...\), got 'sky'"):
        SkyFilter(ByColour({0: "wall", 1: "floor"}), to_pixels)
    with pytest.raises(ValueError, match="labels must be a sequence of class names, got 'sky'"):
        SkyFilter(ByColour(), to_pixels, labels="sky")
    with pytest.raises(ValueError, match="labels must leave at least one class"):
        SkyFilter(ByColour({0: "sky"}), to_pixels)
    with pytest.raises(ValueError, match="processor must be the image processor of the loaded model, got None"):
        SkyFilter(ByColour())


@pytest.mark.slow
def test_sky_filter_loads_a_checkpoint(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("PIL")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        depths=[1] * 4,
        hidden_sizes=[8] * 4,
        num_attention_heads=[1] * 4,
        decoder_hidden_size=8,
        id2label={0: "wall", 1: "sky"},
    )
    model = transformers.SegformerForSemanticSegmentation(config)
    processor = {"image_processor_type": "SegformerImageProcessor", "size": {"height": 64, "width": 64}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    frames = torch.rand(9, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    for bias, sky in ((100.0, True), (-100.0, False)):
        with torch.no_grad():
            model.decode_head.classifier.bias[1] = bias
        model.save_pretrained(tmp_path)
        static = SkyFilter(tmp_path)(sky_chunk(frames))
        assert static.shape == (3, *SIZE)
        assert static.all() if not sky else not static.any()


# End to end.


def test_neither_sky_nor_moving_box_reaches_the_cache() -> None:
    """A street: ground and furniture under a sky, to which the depth estimator gives a wall at 12 m."""
    cameras, box = path(-0.3, 4), moving_box(4)
    enter, leave = cast(cameras, ((-50.0, 1.5, -50.0), (50.0, 2.0, 50.0)))
    ground = torch.where((enter < leave) & (enter > 0), enter, 1e9)
    depth = ground
    for one in FURNITURE:
        enter, leave = cast(cameras, one)
        depth = torch.where((enter < leave) & (enter > 0), torch.minimum(depth, enter), depth)
    enter, leave = cast(cameras, box)
    shows = (enter < leave) & (enter < depth)
    depth = torch.where(shows, enter, depth)
    sky = depth > 12
    depth = depth.clamp(max=12).float()
    frames = torch.zeros(4, 3, *SIZE)
    frames[:, 0], frames[:, 2] = (~sky).float(), sky.float()
    assert sky.any() and shows.any()

    cache = LatentCache(2)
    views = chunk(depth, cameras, cache, frames=frames, frames_per_latent=(1, 1, 1, 1))
    mask = AllOf([SkyFilter(ByColour(), to_pixels), GeometricFilter()])(views)
    report = cache.write(torch.zeros(4, 2, *LATENT), depth, cameras, mask)

    def held(memory: LatentCache) -> tuple[int, int]:
        """Tokens inside the moving box of their view, and tokens of the sky."""
        corners, points = box[memory.frame_ids.long()], memory.points.double()
        inside = ((points > corners[:, 0] - 0.02) & (points < corners[:, 1] + 0.02)).all(1)
        in_camera = torch.einsum("nij,nj->ni", cameras.world2cam[memory.frame_ids.long(), :3, :3], points)
        z = in_camera[:, 2] + cameras.world2cam[memory.frame_ids.long(), 2, 3]
        return int(inside.sum()), int((z > 11.9).sum())

    unfiltered = held(remember(cameras, depth))
    assert min(unfiltered) > 100
    assert held(cache) == (0, 0)
    left = render(cameras, box[[0, 0, 1, 2]])[1]
    clean = tokens(~(sky | shows | left))
    passed = report.written + report.replaced + report.covered + report.refused
    assert report.masked > 0 and passed >= 0.9 * clean.sum()
    assert cache.read(cameras, LATENT).mask[clean].float().mean() > 0.9  # and what they show is in the memory


# SAM.


class Segments(nn.Module):
    """A SAM 2 whose segments are given: (P, 3, m, m) logits and (P, 3) scores of every prompt alike."""

    def __init__(self, logits: Tensor, scores: Tensor) -> None:
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(prompt_encoder_config=SimpleNamespace(image_size=64))
        self.logits, self.scores, self.prompts = logits, scores, []

    def forward(self, pixel_values: Tensor, input_points: Tensor, multimask_output: bool) -> SimpleNamespace:
        assert pixel_values.shape == (1, 3, 64, 64) and multimask_output
        self.prompts.append(input_points)
        count = input_points.shape[1]
        return SimpleNamespace(
            pred_masks=self.logits.expand(1, count, *self.logits.shape),
            iou_scores=self.scores.expand(1, count, -1),
        )


class Fixed:
    needs_frames = False

    def __init__(self, static: Tensor) -> None:
        self.static = static

    def __call__(self, views: ChunkViews) -> Tensor:
        return self.static.clone()


def test_sam2_drops_the_whole_thing_of_which_most_moved() -> None:
    found = torch.ones(3, *SIZE, dtype=torch.bool)
    found[1, 44:88, 80:150] = False  # most of a thing at rows 44-88, columns 80-160
    logits = torch.full((3, 64, 64), -10.0)
    logits[0, 16:32, 16:32] = 10.0  # that thing: 4/16 of 176 rows and 4/16 of 320 columns
    logits[1, 16:32, 16:64] = 10.0  # of this under half moved
    logits[2, :, 16:32] = 10.0  # this one the network doubts
    model = Segments(logits, torch.tensor([0.9, 0.9, 0.1]))
    views = chunk(torch.ones(3, *SIZE), path(0.0, 3), frames=torch.rand(9, 3, *SIZE), frames_per_latent=(1, 4, 4))
    static = Sam2Filter(model, Fixed(found), max_prompts=5)(views)
    assert len(model.prompts) == 1 and 1 <= model.prompts[0].shape[1] <= 5  # the network runs where something failed
    x, y = model.prompts[0][0, :, 0].unbind(1)
    assert ((x >= 16) & (x <= 30) & (y >= 16) & (y <= 32)).all()
    expected = found.clone()
    expected[1, 44:88, 80:160] = False
    assert static[0].all() and static[2].all() and not (static & ~found).any()
    assert (static != expected).float().mean() < 0.005
    assert torch.equal(Sam2Filter(model, Fixed(found), least_part=0.9)(views), found)


def test_sam2_loads_a_checkpoint(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "num_attention_heads": 1,
        "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [8, 4, 4, 4],
        "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [2, 2],
    }
    vision = {
        "backbone_config": backbone,
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 16,
    }
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    config = transformers.Sam2Config(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "mask_input_channels": 4},
        mask_decoder_config=decoder,
    )
    model = transformers.Sam2Model(config).eval()
    model.save_pretrained(tmp_path)
    found = torch.ones(3, *SIZE, dtype=torch.bool)
    found[2, 44:88, 80:150] = False
    frames = torch.rand(9, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    views = chunk(torch.ones(3, *SIZE), path(0.0, 3), frames=frames, frames_per_latent=(1, 4, 4))

    # The same by hand, for one prompt: the first pixel that failed, in the network's own pixels.
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (F.interpolate(frames[8:], (64, 64), mode="bilinear", antialias=True) - mean) / std
    point = torch.tensor([[[[80.5 * 64 / SIZE[1], 44.5 * 64 / SIZE[0]]]]])
    with torch.no_grad():
        segments = F.interpolate(model(pixel_values=pixels, input_points=point).pred_masks[0], SIZE, mode="bilinear")[0]
    touching = [segment for segment in segments > 0 if (segment & ~found[2]).any()]
    expected = found.clone()
    expected[2] &= ~torch.stack(touching).any(0)
    assert 0.05 < expected[2].float().mean() < 0.85

    static = Sam2Filter(tmp_path, Fixed(found), least_part=0.0, least_iou=0.0, max_prompts=1)(views)
    assert torch.equal(static[:2], found[:2])
    assert (static[2] != expected[2]).float().mean() < 0.001
    assert torch.equal(Sam2Filter(tmp_path, Fixed(found), least_iou=1.0)(views), found)


def tiny_sam3(transformers: Any) -> Any:
    small = {"hidden_size": 16, "num_attention_heads": 2}
    layers = {**small, "num_layers": 1, "intermediate_size": 16}
    backbone = {
        **small,
        "model_type": "sam3_vit_model",
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "image_size": 56,
        "patch_size": 14,
        "window_size": 2,
        "global_attn_indexes": [1],
        "pretrain_image_size": 28,
    }
    sizes = [[16, 16], [8, 8], [4, 4]]
    text = {
        **small,
        "model_type": "clip_text_model",
        "vocab_size": 64,
        "intermediate_size": 16,
        "projection_dim": 16,
        "num_hidden_layers": 1,
        "max_position_embeddings": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.Sam3Config(
        vision_config={"backbone_config": backbone, "fpn_hidden_size": 16, "backbone_feature_sizes": sizes},
        text_config=text,
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config={**layers, "num_queries": 2},
        mask_decoder_config=small,
    )
    return transformers.Sam3Model(config).eval()


def to_ids(prompts: list[str], max_length: int, **_: Any) -> dict[str, Tensor]:
    ids = torch.zeros(len(prompts), max_length, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[:3] = torch.tensor([1, {"person": 3, "cat": 4}[prompt], 2])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.mark.slow
def test_sam3_loads_its_tokenizer_too(tmp_path: Path) -> None:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    tiny_sam3(transformers).save_pretrained(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "person": 3, "cat": 4}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(tmp_path)
    views = sky_chunk(torch.rand(9, 3, *SIZE, generator=torch.Generator().manual_seed(0)))
    static = Sam3Filter(tmp_path, prompts=("person", "cat"), threshold=0.2)(views)
    by_hand = Sam3Filter(tmp_path, to_ids, prompts=("person", "cat"), threshold=0.2)(views)
    assert torch.equal(static, by_hand) and not static.all()


@pytest.mark.slow
def test_sam3_drops_every_instance_of_every_prompt(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tiny_sam3(transformers).save_pretrained(tmp_path)
    frames = torch.rand(4, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    views = chunk(torch.ones(3, *SIZE), path(0.0, 3), frames=frames, frames_per_latent=(1, 1, 2))
    model, prompts = transformers.Sam3Model.from_pretrained(tmp_path).eval(), ("person", "cat")

    # The same by hand: frame by frame, prompt by prompt and instance by instance, as its processor does.
    pixels = F.interpolate(frames, (56, 56), mode="bilinear", antialias=True) * 2 - 1
    text, marked, scores = to_ids(list(prompts), 8), torch.zeros(4, *SIZE, dtype=torch.bool), []
    with torch.no_grad():
        for frame in range(4):
            for prompt in range(2):
                ids, attention = (text[key][prompt : prompt + 1] for key in ("input_ids", "attention_mask"))
                found = model(pixel_values=pixels[frame : frame + 1], input_ids=ids, attention_mask=attention)
                scores += (found.pred_logits.sigmoid() * found.presence_logits.sigmoid())[0].tolist()
                masks = F.interpolate(found.pred_masks.sigmoid(), SIZE, mode="bilinear")[0]
                marked[frame] |= (masks > 0.5).any(0)
    expected = torch.stack([~group.any(0) for group in marked.split([1, 1, 2])])
    assert min(scores) > 0.2 and max(scores) < 0.3 and 0.05 < expected.float().mean() < 0.95

    static = Sam3Filter(tmp_path, to_ids, prompts=prompts, threshold=0.2, batch_size=3)(views)
    assert (static != expected).float().mean() < 0.001
    assert Sam3Filter(model, to_ids, prompts=prompts, threshold=0.3)(views).all()
    for wrong in ("person", ()):
        with pytest.raises(ValueError, match="prompts must be a sequence of noun phrases"):
            Sam3Filter(model, to_ids, prompts=wrong)
    with pytest.raises(ValueError, match="tokenizer must be the tokenizer of the loaded model, got None"):
        Sam3Filter(model)


# Combination, names, errors.


def test_all_of_is_the_intersection() -> None:
    views = chunk(torch.ones(2, *SIZE), path(0.0, 2))
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2, *SIZE, generator=generator) > 0.5 for _ in range(2))
    both = AllOf([Fixed(a), Fixed(b)])
    assert torch.equal(both(views), a & b) and not both.needs_frames
    assert AllOf([Fixed(a), SkyFilter(ByColour(), to_pixels)]).needs_frames
    with pytest.raises(ValueError, match="filters must hold at least one filter"):
        AllOf([])


def test_confidence() -> None:
    confidence = torch.linspace(0, 1, 2 * 22 * 40).view(2, *LATENT)
    views = chunk(torch.ones(2, *LATENT), path(0.0, 2), confidence=confidence)
    assert torch.equal(ConfidenceFilter(0.25)(views), confidence >= 0.25)
    with pytest.raises(ValueError, match="confidence must be given to ConfidenceFilter"):
        ConfidenceFilter()(chunk(torch.ones(2, *LATENT), path(0.0, 2)))
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 2"):
        ConfidenceFilter(2)


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    views = chunk(torch.ones(2, *SIZE), path(0.0, 2))
    assert isinstance(make_static_filter("none"), AllStatic) and make_static_filter("none")(views).all()
    assert isinstance(make_static_filter("geometric"), GeometricFilter)
    assert isinstance(make_static_filter("confidence"), ConfidenceFilter)
    made: list[tuple[str, Any]] = []
    for name, kind in (("sky", "SkyFilter"), ("sam2", "Sam2Filter"), ("sam3", "Sam3Filter")):
        monkeypatch.setattr(
            static_filter_models, kind, lambda device, name=name: made.append((name, device)) or AllStatic()
        )
    joined = make_static_filter("sky + geometric+sam2+sam3", device="cuda:1")
    assert isinstance(joined, AllOf) and len(joined.filters) == 4 and isinstance(joined, StaticFilter)
    assert made == [("sky", "cuda:1"), ("sam2", "cuda:1"), ("sam3", "cuda:1")]


@pytest.mark.parametrize("names", ["", "+", "motion", "sky+", "Geometric"])
def test_unknown_names(names: str) -> None:
    with pytest.raises(ValueError, match="names must be of none, geometric, .*, sky, sam2, sam3"):
        make_static_filter(names)


@pytest.mark.parametrize("names", ["geometric+geometric", "none+geometric"])
def test_names_that_do_not_go_together(names: str) -> None:
    with pytest.raises(ValueError, match='names must be different, and "none" alone'):
        make_static_filter(names)


@pytest.mark.parametrize("name", ["sky", "sam2", "sam3", "geometric+sky"])
def test_missing_transformers_fails_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r'transformers is needed .* pip install "mirage-world\[generate\]"'):
        make_static_filter(name)


@pytest.mark.parametrize(("name", "version"), [("sam2", "4.56"), ("sam3", "5.0")])
def test_transformers_too_old(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.50.0"))
    with pytest.raises(
        MissingExtraError, match=f'newer transformers than 4.50.0: pip install "transformers>={version}"'
    ):
        make_static_filter(name)


def test_filters_that_look_at_frames_say_so() -> None:
    views = chunk(torch.ones(2, *SIZE), path(0.0, 2))
    sam2 = Sam2Filter(Segments(torch.zeros(3, 64, 64), torch.ones(3)))
    for one in (SkyFilter(ByColour(), to_pixels), sam2, AllOf([AllStatic(), sam2])):
        assert one.needs_frames and isinstance(one, StaticFilter)
        with pytest.raises(ValueError, match=r"frames must be given to (Sky|Sam2)Filter, .*, got None"):
            one(views)
    assert not any(one.needs_frames for one in (AllStatic(), GeometricFilter(), ConfidenceFilter()))
    assert set(STATIC_FILTERS) == {"none", "geometric", "confidence", "sky", "sam2", "sam3"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GeometricFilter(tolerance=1.0), r"tolerance must be in \[0, 1\), got 1.0"),
        (lambda: GeometricFilter(min_views=0), "min_views must be a positive int, got 0"),
        (lambda: GeometricFilter(max_past_views=-1), "max_past_views must be an int >= 0, got -1"),
        (lambda: SkyFilter(ByColour(), to_pixels, batch_size=0), "batch_size must be a positive int, got 0"),
        (lambda: Sam2Filter(ByColour(), least_part=1.0), r"least_part must be in \[0, 1\), got 1.0"),
        (lambda: Sam2Filter(ByColour(), max_prompts=0), "max_prompts must be a positive int, got 0"),
    ],
)
def test_options_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cameras": None}, TypeError, "cameras must be Cameras, got NoneType"),
        ({"cache": "room"}, TypeError, "cache must be LatentCache, got str"),
        ({"past": []}, TypeError, "past must be Cameras or None, got list"),
        ({"latent_size": (22,)}, ValueError, "latent_size must be"),
        ({"frames_per_latent": (1, 4)}, ValueError, "frames_per_latent must be 3 positive ints, one per view"),
        ({"frames_per_latent": (0, 4, 4)}, ValueError, "frames_per_latent must be 3 positive ints"),
        ({"frames": torch.zeros(8, 3, *SIZE)}, ValueError, r"frames must be \(9, 3, H, W\) float32 .* got \(8, 3,"),
        ({"frames": torch.zeros(9, 3, *SIZE, dtype=torch.uint8)}, ValueError, "frames must be .* got .* uint8"),
        ({"frames": torch.zeros(9, 3, 11, 20)}, ValueError, r"frames must be at least as fine as latent_size"),
        ({"depth": torch.ones(2, *SIZE)}, ValueError, r"depth must be \(3, H', W'\) float32 as cameras say"),
        ({"depth": torch.ones(3, *SIZE).double()}, ValueError, r"depth must be .* float64"),
        ({"depth": torch.ones(3, 11, 20), "frames": None}, ValueError, "depth must be at least as fine as latent_size"),
        ({"cache": LatentCache(2, device="meta")}, ValueError, "depth must be on meta like cache, got cpu"),
        ({"confidence": torch.ones(3, *LATENT)}, ValueError, r"confidence must be \(3, 176, 320\) float32 like depth"),
    ],
)
def test_chunk_views_are_checked(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    values = {"frames": torch.zeros(9, 3, *SIZE), "frames_per_latent": (1, 4, 4)} | changes
    with pytest.raises(error, match=message):
        chunk(values.pop("depth", torch.ones(3, *SIZE)), values.pop("cameras", path(0.0, 3)), **values)

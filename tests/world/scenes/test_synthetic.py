"""`SyntheticRoom`: depth, masks and pictures against a ray march that shares no code with it; paths keep clear."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mirage.scenes.synthetic import CLEARANCE, FPS, PATHS, SyntheticRoom
from mirage_kernels import Cameras

SIZE = (48, 80)


def offset(thing: Any, time: float) -> Tensor:
    swing = math.sin(2 * math.pi * (time / thing.period + thing.phase))
    return torch.tensor(thing.centre, dtype=torch.float64) + swing * torch.tensor(thing.travel, dtype=torch.float64)


def thing_distance(points: Tensor, thing: Any, centre: Tensor) -> Tensor:
    """Signed distance of points (N, 3) from a thing that stands at `centre`."""
    p = points - centre
    half = torch.tensor(thing.half, dtype=torch.float64)
    if thing.shape == "sphere":
        return p.norm(dim=1) - half[0]
    if thing.shape == "cylinder":
        q = torch.stack([torch.hypot(p[:, 0], p[:, 2]) - half[0], p[:, 1].abs() - half[1]], 1)
    else:
        a = math.radians(thing.yaw)
        turn = torch.tensor([[math.cos(a), 0, -math.sin(a)], [0, 1, 0], [math.sin(a), 0, math.cos(a)]]).double()
        q = (p @ turn.T).abs() - half
    return q.clamp(min=0).norm(dim=1) + q.amax(1).clamp(max=0)


def wall_distance(points: Tensor, room: SyntheticRoom) -> Tensor:
    x, y, z = room.size
    low, high = torch.tensor([-x / 2, -y, -z / 2]).double(), torch.tensor([x / 2, 0, z / 2]).double()
    return torch.minimum(points - low, high - points).amin(1)


def march(room: SyntheticRoom, camera: Cameras, time: float) -> tuple[Tensor, Tensor]:
    """z depth of every pixel centre, and which thing it shows (-1: the room), by walking along the ray."""
    height, width = camera.image_size
    v, u = torch.meshgrid(torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5, indexing="ij")
    local = torch.stack([u, v, torch.ones_like(u)], -1).view(-1, 3) @ torch.linalg.inv(camera.intrinsics[0]).T
    rays = local @ camera.cam2world[0, :3, :3].T
    length = rays.norm(dim=1)
    directions, z = rays / length[:, None], torch.zeros(len(rays), dtype=torch.float64)
    centres = [offset(thing, time) for thing in room.objects]
    for _ in range(300):
        points = camera.centers + z[:, None] * directions
        distances = torch.stack(
            [
                wall_distance(points, room),
                *(thing_distance(points, t, c) for t, c in zip(room.objects, centres, strict=True)),
            ]
        )
        z = z + distances.amin(0)
    return (z / length).view(height, width), (distances.argmin(0) - 1).view(height, width)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 6, 9])
def test_depth_and_what_is_seen_are_those_of_a_ray_march(seed: int) -> None:
    room = SyntheticRoom(seed, moving=2)
    views, times = room.path("walk", 40, SIZE)[[0, 39]], [0.3, 1.7]
    frames = room.render(views, times)
    for i, time in enumerate(times):
        depth, thing = march(room, views[i], time)
        solid = ~frames.sky[i]
        error = ((frames.depth[i] - depth).abs() / depth)[solid]
        # A ray that grazes something crawls, and does not arrive.
        assert (error < 1e-5).float().mean() > 0.995
        assert (frames.depth[i][frames.sky[i]] == 0).all()
        moving = torch.tensor([t.moves for t in room.objects] + [False])[thing]
        assert (frames.static[i] & moving)[depth > 0].float().mean() < 0.002
    assert frames.depth.dtype == torch.float32 and frames.images.shape == (2, 3, *SIZE)


def test_the_same_surface_looks_the_same_from_elsewhere() -> None:
    for seed in (0, 2, 5):
        room = SyntheticRoom(seed, moving=0)
        views = room.path("walk", 12, (96, 160), seed=1)[[0, 11]]
        frames = room.render(views)
        v, u = torch.meshgrid(torch.arange(96).double() + 0.5, torch.arange(160).double() + 0.5, indexing="ij")
        pixels = torch.stack([u, v, torch.ones_like(u)], -1).view(-1, 3)
        local = pixels @ torch.linalg.inv(views.intrinsics[0]).T * frames.depth[0].double().view(-1, 1)
        world = local @ views.cam2world[0, :3, :3].T + views.centers[0]
        seen = (world - views.centers[1]) @ views.world2cam[1, :3, :3].T
        at = (seen / seen[:, 2:]) @ views.intrinsics[1].T
        grid = (at[:, :2] / torch.tensor([80.0, 48.0]) - 1).float().view(1, 96, 160, 2)
        other_depth = F.grid_sample(frames.depth[1][None, None], grid, align_corners=False)[0, 0]
        other = F.grid_sample(frames.images[1][None], grid, align_corners=False)[0]
        same = (grid[0].abs() < 0.99).all(-1) & (seen[:, 2].view(96, 160) > 0) & (frames.depth[0] > 0)
        same &= (other_depth / seen[:, 2].view(96, 160).float() - 1).abs() < 0.005
        assert same.float().mean() > 0.3
        error = (other - frames.images[0]).abs().mean(0)[same].mean()
        unrelated = (frames.images[1] - frames.images[0]).abs().mean(0)[same].mean()
        assert error < 0.02 and unrelated > 2 * error


@pytest.mark.slow
def test_masks_of_moving_things_are_exact() -> None:
    for seed in range(40):
        with_moving, without = SyntheticRoom(seed, moving=2), SyntheticRoom(seed, moving=0)
        assert with_moving.objects[:-2] == without.objects and not any(t.moves for t in without.objects)
        views = with_moving.path("pan", 8, SIZE)
        times = [0.1 * i for i in range(8)]
        shown, empty = with_moving.render(views, times), without.render(views, times)
        moving = ~shown.static
        if moving.float().mean() < 0.01:
            continue
        same = (shown.images == empty.images).all(1) & (shown.depth == empty.depth)
        # A pixel is refined if its neighbours show something else, so that a few beside the thing are finer here.
        assert (same | moving)[shown.static].float().mean() > 0.99
        assert (shown.images - empty.images).abs().amax(1)[shown.static].max() < 0.2
        assert same[moving].float().mean() < 0.02  # and what is marked does look different
        nearer = (shown.depth < empty.depth) | (empty.sky & ~shown.sky)
        assert nearer[moving].float().mean() > 0.7 and not nearer[shown.static].any()
        assert (shown.static != shown.static[:1]).any() and empty.static.all()
        return
    pytest.fail("no moving thing came into view in 40 rooms")


def test_times_default_to_frames_and_things_swing() -> None:
    room = SyntheticRoom(1, moving=1)
    views = room.start(SIZE)[[0, 0, 0]]
    by_default = room.render(views)
    given = room.render(views, [0.0, 1 / FPS, 2 / FPS])
    assert torch.equal(by_default.images, given.images) and torch.equal(by_default.static, given.static)
    ball = room.objects[-1]
    assert torch.allclose(torch.tensor(ball.at(0.7).centre).double(), offset(ball, 0.7), atol=1e-6)


@pytest.mark.slow
def test_pictures_are_filtered() -> None:
    """One of 48x80 is what 64 times as many pixels average to, so that nothing shimmers when the camera moves."""
    errors, coarse = [], []
    for seed in range(4):
        room = SyntheticRoom(seed, moving=0)
        view = room.start(SIZE, seed=3)
        fine = room.render(view.resized((8 * SIZE[0], 8 * SIZE[1]))).images
        errors.append((room.render(view).images - F.avg_pool2d(fine, 8)).square().mean())
        coarse.append((fine[:, :, 4::8, 4::8] - F.avg_pool2d(fine, 8)).square().mean())
    assert torch.stack(errors).mean() < 1e-3 and torch.stack(errors).mean() < 0.35 * torch.stack(coarse).mean()


@pytest.mark.slow
@pytest.mark.parametrize("kind", PATHS)
def test_paths_keep_clear(kind: str) -> None:
    for seed in range(6):
        room = SyntheticRoom(seed, moving=seed % 3)
        cameras = room.path(kind, 49, SIZE, seed=seed)
        assert len(cameras) == 49 and cameras.image_size == SIZE
        centres = cameras.centers
        distances = [wall_distance(centres, room)]
        for thing in room.objects:
            for swing in torch.linspace(-1, 1, 9 if thing.moves else 1).tolist():
                where = torch.tensor(thing.centre) + (swing * torch.tensor(thing.travel) if thing.moves else 0.0)
                distances.append(thing_distance(centres, thing, where.double()))
        assert torch.stack(distances).amin() >= CLEARANCE
        assert (room.clearance(centres) <= torch.stack(distances).amin(0) + 1e-6).all()
        if kind.endswith("-and-back"):
            assert torch.equal(cameras.cam2world, cameras.cam2world.flip(0))
        elif kind == "laps":
            assert torch.equal(cameras.cam2world[24:], cameras.cam2world[:25])
            assert torch.pdist(centres[:24]).amin() > 1e-3
        else:
            assert not torch.equal(cameras.cam2world[0], cameras.cam2world[-2])
        if kind == "around":
            assert torch.equal(cameras.cam2world[0], cameras.cam2world[-1])
        if kind == "walk":
            assert centres.diff(dim=0).norm(dim=1).max() < 0.0401
            cosines = (cameras.cam2world[1:, :3, 2] * cameras.cam2world[:-1, :3, 2]).sum(1)
            assert torch.rad2deg(cosines.clamp(max=1).acos()).max() < 3.0
            assert (centres[-1] - centres[0]).norm() > 0.1


def turned(cameras: Cameras) -> Tensor:
    """Degrees from view to view."""
    cosines = (cameras.cam2world[1:, :3, 2] * cameras.cam2world[:-1, :3, 2]).sum(1)
    return torch.rad2deg(cosines.clamp(max=1).acos())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in PATHS if kind != "around"])
def test_a_pace_is_a_share_of_the_speed(kind: str) -> None:
    for seed in range(3):
        room = SyntheticRoom(seed, moving=0)
        fast, slow = (room.path(kind, 49, SIZE, seed=seed, pace=pace) for pace in (1.0, 0.25))
        assert torch.equal(fast.cam2world, room.path(kind, 49, SIZE, seed=seed).cam2world)
        assert (slow.cam2world[0] - fast.cam2world[0]).abs().max() <= (0.05 if "walk" in kind else 0.0)
        assert (room.clearance(slow.centers) >= CLEARANCE).all()
        assert turned(slow).max() <= max(0.5 * turned(fast).max(), 0.6)
        steps = [cameras.centers.diff(dim=0).norm(dim=1) for cameras in (slow, fast)]
        assert steps[0].max() <= 0.011 if "walk" in kind else steps[0].max() <= max(steps[1].max(), 1e-9)
        assert turned(slow).max() > 0.05 or steps[0].max() > 1e-3


@pytest.mark.slow
def test_a_seed_is_a_room(threads: Any) -> None:
    rooms = [SyntheticRoom(seed) for seed in range(8)]
    assert len({room.size for room in rooms}) == 8
    assert {any(t.moves for t in room.objects) for room in rooms} == {False, True}
    assert {t.shape for room in rooms for t in room.objects} == {"box", "cylinder", "sphere"}
    made = []
    for count in (1, 2):
        threads(count)
        room = SyntheticRoom(4)
        assert room.objects == rooms[4].objects and room.size == rooms[4].size and room.prompt == rooms[4].prompt
        cameras = room.path("walk", 5, SIZE, seed=2)
        made.append((cameras.cam2world, *vars(room.render(cameras)).values()))
    for one, other in zip(made[0][:-1], made[1][:-1], strict=True):
        assert torch.equal(one, other)
    first, second = (SyntheticRoom(s).render(SyntheticRoom(s).start(SIZE)).images for s in (4, 5))
    assert (first - second).abs().mean() > 0.03
    assert not torch.equal(room.path("walk", 5, SIZE, seed=3).cam2world, room.path("walk", 5, SIZE, seed=2).cam2world)
    assert "room with" in rooms[0].prompt


@pytest.mark.slow
def test_texture_is_the_contrast_of_patterns() -> None:
    # The same room, things, depth and paths; patterns of less and less contrast about the same colours.
    rooms = [SyntheticRoom(5, texture=texture) for texture in (1.0, 0.25, 0.0)]
    cameras = rooms[0].path("walk", 5, SIZE)
    made = [room.render(cameras) for room in rooms]
    for room, frames in zip(rooms, made, strict=True):
        assert room.objects == rooms[0].objects and torch.equal(frames.depth, made[0].depth)
        assert torch.equal(room.path("walk", 5, SIZE).cam2world, cameras.cam2world)
    steps = [(frames.images[..., 1:] - frames.images[..., :-1]).abs().mean().item() for frames in made]
    assert steps[0] > 1.5 * steps[1] > 1.5 * steps[2] > 0
    assert (made[0].images.mean((2, 3)) - made[2].images.mean((2, 3))).abs().max() < 0.1
    assert torch.equal(made[0].images, SyntheticRoom(5).render(cameras).images)


@pytest.mark.slow
def test_windows_show_the_sky() -> None:
    shown = []
    for seed in range(6):
        room = SyntheticRoom(seed, moving=0)
        frames = room.render(room.path("pan", 6, SIZE))
        assert torch.equal(frames.sky, frames.depth == 0) and frames.static.all()
        assert frames.images.min() >= 0 and frames.images.max() <= 1
        if frames.sky.any():
            shown.append(frames.images.movedim(1, -1)[frames.sky].mean(0))
    assert len(shown) >= 3
    assert all(colour[2] > colour[0] and colour.mean() > 0.6 for colour in shown)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SyntheticRoom(-1), "seed must be an int >= 0, got -1"),
        (lambda: SyntheticRoom(True), "seed must be an int >= 0, got True"),
        (lambda: SyntheticRoom(1.5), "seed must be an int >= 0, got 1.5"),  # type: ignore[arg-type]
        (lambda: SyntheticRoom(0, moving=-2), "moving must be an int >= 0, got -2"),
        (lambda: SyntheticRoom(0, texture=1.5), r"texture must be in \[0, 1\], got 1.5"),
        (lambda: SyntheticRoom(0).path("fly", 5, SIZE), "kind must be one of walk, around, .*, got 'fly'"),
        (lambda: SyntheticRoom(0).path("walk", 5, SIZE, pace=0.0), "pace must be positive and finite, got 0.0"),
        (lambda: SyntheticRoom(0).path("walk", 0, SIZE), "num_frames must be an int >= 1, got 0"),
        (lambda: SyntheticRoom(0).path("pan", 0, SIZE), "num_frames must be an int >= 1, got 0"),
        (lambda: SyntheticRoom(0).start(SIZE, fov=180), r"fov must be in \(0, 180\) degrees, got 180"),
        (
            lambda: SyntheticRoom(0).render(SyntheticRoom(0).start(SIZE), [0.0, 1.0]),
            "times must be 1 like cameras, got 2",
        ),
        (
            lambda: SyntheticRoom(0).render(SyntheticRoom(0).start(SIZE)[:0]),
            "cameras must be one view or more, got none",
        ),
        (
            lambda: SyntheticRoom(0).render(SyntheticRoom(0).start(SIZE).with_cam2world(torch.eye(4)[None] + 0)),
            r"cameras\[0\] must be inside the room",
        ),
    ],
)
def test_errors_name_the_argument(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

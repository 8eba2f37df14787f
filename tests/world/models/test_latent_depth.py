"""`LatentDepth`: corrects the memory's depth, free of scale and of the world's axes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="the extra generate is not installed")

from mirage.models.latent_depth import LatentDepth, LatentDepthOutput, latent_depth_loss, pluecker_rays
from mirage_kernels import Cameras, LatentCache, Readout

CHANNELS = 6


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)  # operations this small only wait for a second one


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_model(width: int = 16, trained: bool = True, channels: int = CHANNELS) -> LatentDepth:
    """With random weights; `trained` makes the last layer answer, too."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = LatentDepth(latent_channels=channels, width=width)
        if trained:
            torch.nn.init.normal_(model.conv_out.weight, std=0.05)
            torch.nn.init.normal_(model.conv_out.bias, std=0.1)
    return model


def rotation(axis: tuple[float, float, float], degrees: float) -> Tensor:
    x, y, z = (math.radians(degrees) * torch.tensor(axis) / torch.tensor(axis).norm()).tolist()
    skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(skew)


def make_cameras(frames: int, unit: float = 1.0, size: tuple[int, int] = (70, 110)) -> Cameras:
    """A walk to the right that turns, lengths multiplied by `unit`."""
    poses = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    for t in range(frames):
        poses[t, :3, :3] = rotation((0.1, 1.0, 0.0), 4.0 * t + 10)
        poses[t, :3, 3] = unit * torch.tensor([0.3 * t - 1, 0.05 * t, 2.0])
    height, width = size
    return Cameras(
        [[0.9 * width, 0, width / 2], [0, 0.9 * width, height / 2], [0, 0, 1]], poses, size, square_pixels=False
    )


def make_chunk(frames: int = 3, size: tuple[int, int] = (7, 11)) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (F, C, h, w), the memory's depth and mask (F, h, w), the left part known."""
    depth = 3 + noise(frames, *size, seed=1).abs()
    mask = torch.arange(size[1]).expand_as(depth) < 0.7 * size[1]
    return noise(frames, CHANNELS, *size), torch.where(mask, depth, 0.0), mask


def view_of(depth: Tensor, mask: Tensor) -> Readout:
    return Readout(torch.zeros(len(depth), CHANNELS, *depth.shape[1:]), mask, depth, torch.where(mask, 0, -1))


# --------------------------------------------------------------------------------------------------------- geometry


def test_rays_by_hand():
    """Independently: each token's ray, one by one; points on it give the same moment."""
    cameras, size = make_cameras(3), (2, 3)
    rays = pluecker_rays(cameras, size)
    assert rays.shape == (6, 3, *size) and rays.dtype == torch.float32
    world_to_first = torch.linalg.inv(cameras.cam2world[0])
    for t in range(3):
        k = cameras.intrinsics[t]
        for i in range(2):
            for j in range(3):
                column, row = (j + 0.5) * 110 / 3, (i + 0.5) * 70 / 2
                x, y = (column - k[0, 2]) / k[0, 0], (row - k[1, 2]) / k[1, 1]
                near, far = (
                    (world_to_first @ cameras.cam2world[t] @ torch.tensor([x * z, y * z, z, 1], dtype=torch.float64))[
                        :3
                    ]
                    for z in (0.5, 2.0)
                )
                direction = (far - near) / (far - near).norm()
                for point in (near, far):
                    expected = torch.cat([direction, torch.linalg.cross(point, direction)])
                    torch.testing.assert_close(rays[:, t, i, j].double(), expected, atol=1e-6, rtol=0)
    assert rays[3:, 0].abs().max() < 1e-6  # the first camera is the origin


def test_result_is_free_of_scale():
    latents, depth, mask = make_chunk()
    model = make_model()
    one = model.predict(latents, make_cameras(3), view_of(depth, mask))
    assert (one.depth / torch.where(mask, depth, one.depth) - 1).abs().max() > 0.01  # the network does answer
    for s in (0.25, 1024.0):
        scaled = model.predict(latents, make_cameras(3, s), view_of(depth * s, mask))
        torch.testing.assert_close(scaled.depth, one.depth * s, rtol=1e-5, atol=0)
    for s in (1e-3, 3.7, 1e4):
        scaled = model.predict(latents, make_cameras(3, s), view_of(depth * s, mask))
        torch.testing.assert_close(scaled.depth, one.depth * s, rtol=1e-4, atol=0)
        torch.testing.assert_close(scaled.confidence, one.confidence, rtol=1e-4, atol=1e-5)


def test_powers_of_two_scale_to_the_bit():
    latents, depth, mask = make_chunk()
    model, rays = make_model().eval(), pluecker_rays(make_cameras(3), (7, 11))
    factors = torch.ones(6, 1, 1, 1)
    factors[3:] = 8.0
    with torch.no_grad():
        one = model(latents.transpose(0, 1)[None], rays[None], depth[None], mask[None])
        eight = model(latents.transpose(0, 1)[None], (rays * factors)[None], 8 * depth[None], mask[None])
    assert torch.equal(eight.depth, 8 * one.depth)


def test_world_axes_do_not_matter_but_motion_does():
    latents, depth, mask = make_chunk()
    model, cameras, view = make_model(), make_cameras(3), view_of(depth, mask)
    one = model.predict(latents, cameras, view).depth
    world = torch.eye(4, dtype=torch.float64)
    world[:3, :3], world[:3, 3] = rotation((1.0, -2.0, 0.5), 130), torch.tensor([4.0, -7.0, 1.0])
    moved = cameras.with_cam2world(world @ cameras.cam2world)
    torch.testing.assert_close(model.predict(latents, moved, view).depth, one, rtol=1e-5, atol=1e-5)
    resized = cameras.resized((700, 1100))
    torch.testing.assert_close(model.predict(latents, resized, view).depth, one, rtol=1e-5, atol=1e-5)
    poses = cameras.cam2world.clone()
    poses[2, 0, 3] += 1.0
    elsewhere = cameras.with_cam2world(poses)
    assert (model.predict(latents, elsewhere, view).depth - one).abs().max() > 1e-3
    twice = cameras.intrinsics * torch.tensor([[2.0], [2.0], [1.0]])
    zoomed = Cameras.trusted(twice, cameras.cam2world, cameras.image_size)  # the principal point in the corner
    assert (model.predict(latents, zoomed, view).depth - one).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------- results


def test_untrained_is_the_memory():
    latents, depth, mask = make_chunk()
    output = make_model(trained=False).predict(latents, make_cameras(3), view_of(depth, mask))
    assert torch.equal(output.depth[mask], depth[mask])
    assert (output.depth[~mask] == depth[mask].median()).all()
    assert (output.confidence == 0.5).all()


def test_what_is_not_known_is_not_looked_at():
    """Values outside the mask, and NaN, Inf, 0 and negative ones inside it, change nothing."""
    latents, depth, mask = make_chunk()
    model, cameras = make_model(), make_cameras(3)
    bad = torch.tensor([math.nan, math.inf, 0.0, -2.0])
    smaller, claimed, dirty = mask.clone(), mask.clone(), torch.where(mask, depth, math.nan)
    smaller[0, 0, :4] = False
    dirty[0, 0, :4] = bad
    expected = model.predict(latents, cameras, view_of(depth, smaller))
    output = model.predict(latents, cameras, view_of(dirty, claimed))
    assert torch.equal(output.depth, expected.depth)
    assert output.depth.isfinite().all() and (output.depth > 0).all()


def test_without_a_memory_the_unit_is_one():
    latents, depth, mask = make_chunk()
    cameras, model = make_cameras(3), make_model()
    nothing = model.predict(latents, cameras)
    assert torch.equal(nothing.depth, model.predict(latents, cameras, view_of(depth, torch.zeros_like(mask))).depth)
    assert (make_model(trained=False).predict(latents, cameras).depth == 1).all()
    # One empty sample of a batch leaves the other alone.
    rays = pluecker_rays(cameras, (7, 11)).expand(2, -1, -1, -1, -1)
    with torch.no_grad():
        both = model(
            latents.transpose(0, 1).expand(2, -1, -1, -1, -1),
            rays,
            depth.expand(2, -1, -1, -1),
            torch.stack([torch.zeros_like(mask), mask]),
        )
    torch.testing.assert_close(both.depth[0], nothing.depth, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("frames", "size"), [(1, (1, 1)), (1, (5, 3)), (2, (9, 2)), (5, (6, 13))])
def test_any_grid(frames, size):
    latents, depth, mask = make_chunk(frames, size)
    output = make_model().predict(latents, make_cameras(frames), view_of(depth, mask))
    for value in output.values():
        assert value.shape == (frames, *size) and value.dtype == torch.float32 and value.isfinite().all()
    assert (output.depth > 0).all() and ((output.confidence > 0) & (output.confidence < 1)).all()


def test_wild_weights_give_positive_finite_depth():
    latents, depth, mask = make_chunk()
    model = make_model()
    for sign in (1, -1):
        torch.nn.init.constant_(model.conv_out.bias, sign * 1e4)
        output = model.predict(latents, make_cameras(3), view_of(depth, mask))
        assert output.depth.isfinite().all() and (output.depth > 0).all()


def test_half_precision_weights_keep_depth_exact():
    """Untrained, depth is the memory's to the last bit: float32 beside bfloat16 weights."""
    latents, depth, mask = make_chunk()
    model = make_model(trained=False).to(torch.bfloat16)
    output = model.predict(latents, make_cameras(3), view_of(depth, mask))
    assert output.depth.dtype == torch.float32 and torch.equal(output.depth[mask], depth[mask])
    trained = make_model()
    expected = trained.predict(latents, make_cameras(3), view_of(depth, mask)).depth
    half = trained.to(torch.bfloat16).predict(latents, make_cameras(3), view_of(depth, mask)).depth
    torch.testing.assert_close(half, expected, rtol=0.03, atol=0)


def test_far_tokens_are_seen():
    """The receptive field: a change in the left of a 44x80 grid reaches the token 35 columns on."""
    model = make_model()
    latents, depth, mask = make_chunk(1, (44, 80))
    x = latents.transpose(0, 1)[None].requires_grad_()
    rays = pluecker_rays(make_cameras(1), (44, 80))
    for block in [*model.down, *model.up]:  # GroupNorm sees everything: set it aside
        block.norm1, block.norm2 = torch.nn.Identity(), torch.nn.Identity()
    model.norm_out = torch.nn.Identity()
    model(x, rays[None], depth[None], mask[None]).depth[0, 0, 22, 40].backward()
    seen = x.grad[0].abs().sum((0, 1)).nonzero()
    assert seen[:, 1].min() <= 5 and seen[:, 1].max() >= 74
    assert seen[:, 0].min() == 0 and seen[:, 0].max() == 43


def test_number_of_parameters():
    for width, least, most in ((64, 1e6, 2e6), (16, 0.8e5, 1.5e5)):
        with torch.device("meta"):
            model = LatentDepth(width=width)
        assert least < sum(p.numel() for p in model.parameters()) < most


def test_it_feeds_the_cache():
    """The loop without pixels: read, predict, write."""
    latents, depth, mask = make_chunk()
    cameras, model = make_cameras(3), make_model(trained=False)
    cache = LatentCache(CHANNELS)
    cache.write(latents[:1], depth[:1] + ~mask[:1] * 4.0, cameras[:1])
    view = cache.read(cameras, (7, 11))
    assert 0 < view.mask[1:].sum() < view.mask[1:].numel()
    output = model.predict(latents, cameras, view)
    report = cache.write(latents, output.depth, cameras, mask=output.confidence > 0.4)
    counts = report.as_dict()
    assert sum(counts[name] for name in ("written", "replaced", "covered", "refused")) == 3 * 7 * 11
    assert report.written > 0 and cache.read(cameras, (7, 11)).mask.all()


# --------------------------------------------------------------------------------------------------------- training


def make_example() -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A depth that shows in the latents; the memory knows the left part of it, 20 % too far."""
    latents, _, mask = make_chunk(2, (8, 10))
    truth = (1.0 + 0.4 * latents[:, 0] + 0.2 * latents[:, 1]).exp()
    rays = pluecker_rays(make_cameras(2), (8, 10))
    return (latents.transpose(0, 1)[None], rays[None], 1.2 * truth[None], mask[None]), truth[None]


def test_gradient_reaches_every_parameter():
    inputs, truth = make_example()
    model = make_model()
    latent_depth_loss(model(*inputs), truth, torch.ones_like(truth, dtype=torch.bool)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.slow
def test_it_learns_an_example():
    inputs, truth = make_example()
    model, valid = make_model(trained=False), torch.ones_like(truth, dtype=torch.bool)

    def error() -> float:
        with torch.no_grad():
            return float((model(*inputs).depth / truth).log().abs().mean())

    before = error()
    assert before > 0.15
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=120)
    for _ in range(120):
        loss = latent_depth_loss(model(*inputs), truth, valid)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert error() < 0.15 * before
    output = model(*inputs)
    right = (output.depth / truth - 1).abs() < 0.05
    assert right.float().mean() > 0.7
    assert output.confidence[right].mean() > 0.5 + 0.3


def test_loss_counts_valid_tokens_only():
    inputs, truth = make_example()
    output = make_model()(*inputs)
    valid = torch.arange(10).expand_as(truth) < 6
    dirty = torch.where(valid, truth, math.nan)
    loss = latent_depth_loss(output, dirty, valid)
    # By hand, token by token.
    terms = []
    for depth, true, logit in zip(output.depth[valid], truth[valid], output.confidence_logits[valid], strict=True):
        p = torch.sigmoid(logit)
        right = abs(depth / true - 1) < 0.05
        terms.append(abs(torch.log(depth / true)) - torch.log(p if right else 1 - p))
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)
    loss.backward()
    model = make_model()
    nothing = latent_depth_loss(model(*inputs), dirty, torch.zeros_like(valid))
    assert nothing == 0
    nothing.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_confidence_does_not_pull_at_depth():
    depth, logits = torch.full((1, 1, 1, 2), 2.0, requires_grad=True), torch.zeros(1, 1, 1, 2, requires_grad=True)
    output = LatentDepthOutput(depth=depth, confidence=logits.sigmoid(), confidence_logits=logits)
    truth = torch.tensor([[[[2.05, 4.0]]]])
    latent_depth_loss(output, truth, torch.ones_like(truth, dtype=torch.bool)).backward()
    torch.testing.assert_close(depth.grad.flatten(), torch.tensor([-0.25, -0.25]))  # of the mean of |log depth| alone
    torch.testing.assert_close(logits.grad.flatten(), torch.tensor([-0.25, 0.25]))  # up where right, down where wrong


# ------------------------------------------------------------------------------------------------ files and refusals


def test_saved_and_loaded_it_is_the_same(tmp_path):
    latents, depth, mask = make_chunk()
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = LatentDepth.from_pretrained(tmp_path)
    assert loaded.config.width == 16 and loaded.config.latent_channels == CHANNELS
    one, two = (m.predict(latents, make_cameras(3), view_of(depth, mask)) for m in (model, loaded))
    assert all(torch.equal(one[name], two[name]) for name in ("depth", "confidence", "confidence_logits"))
    half = LatentDepth.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_bad_inputs_are_refused():
    latents, depth, mask = make_chunk()
    model, cameras, view = make_model(), make_cameras(3), view_of(depth, mask)
    for arguments, message in (
        ((latents[:2], cameras, view), r"latents must be \(F, 6, h, w\) with the F of cameras, 3, got \(2, 6, 7, 11\)"),
        ((latents[:, :5], cameras, view), r"latents must be .* got \(3, 5, 7, 11\)"),
        ((latents, cameras, view_of(depth[:, 1:], mask[:, 1:])), r"readout must be .* \(3, 7, 11\), got \(3, 6, 11\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(*arguments)
    good = [latents.transpose(0, 1)[None], pluecker_rays(cameras, (7, 11))[None], depth[None], mask[None]]
    for index, value, error, message in (
        (0, good[0][0], ValueError, r"latents must be \(B, 6, F, h, w\), none of them 0, got \(6, 3, 7, 11\)"),
        (0, good[0].long(), TypeError, "latents must be float, got torch.int64"),
        (1, good[1][:, :3], ValueError, r"rays must be \(1, 6, 3, 7, 11\) as latents, got \(1, 3, 3, 7, 11\)"),
        (2, good[2][:, :1], ValueError, r"memory_depth must be \(1, 3, 7, 11\) as latents, got \(1, 1, 7, 11\)"),
        (3, good[3].float(), TypeError, "memory_mask must be bool, got torch.float32"),
    ):
        with pytest.raises(error, match=message):
            model(*good[:index], value, *good[index + 1 :])
    with pytest.raises(ValueError, match="width must be a positive multiple of 8, got 12"):
        LatentDepth(width=12)

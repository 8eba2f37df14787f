"""Muon for matrices and AdamW for vectors, as one optimizer that resumes exactly; and what a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="the extra generate is not installed")
pytest.importorskip("yaml", reason="the extra train is not installed")

from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file
from training_runs import config, models_of

from mirage.training.loop import METRICS, train
from mirage.training.optimizer import MuonAdamW
from mirage.training.vae_objective import VaeObjective, between_tokens


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


def parameters(seed: int = 0) -> list[nn.Parameter]:
    """Of a convolution, a matrix, a vector and a number."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 3, 1, 3, 3), (4, 7), (5,), ())]


def take_steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        for k, weight in enumerate(weights):
            generator = torch.Generator().manual_seed(100 * step + k)
            weight.grad = torch.randn(weight.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()


def test_each_kind_takes_the_steps_of_its_optimizer() -> None:
    together, apart = parameters(), parameters()
    take_steps(MuonAdamW(together, lr=1.0, weight_decay=0.1), together, 0, 4)
    matrix = nn.Parameter(apart[0].detach().flatten(1))
    muon = torch.optim.Muon([matrix, apart[1]], lr=1.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(apart[2:], lr=1.0, weight_decay=0.1)
    before = parameters()
    for step in range(4):
        for k, weight in enumerate([matrix, *apart[1:]]):
            shape = before[k].shape
            generator = torch.Generator().manual_seed(100 * step + k)
            weight.grad = torch.randn(shape, generator=generator).view_as(weight)
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
    assert torch.equal(together[0].flatten(1), matrix)
    for ours, theirs, start in zip(together[1:], apart[1:], before[1:], strict=True):
        assert torch.equal(ours, theirs) and not torch.equal(ours, start)


@pytest.mark.parametrize("kept", [slice(0, 4), slice(0, 2), slice(2, 4)])
def test_state_is_saved_whole(kept: slice) -> None:
    whole, parts = parameters()[kept], parameters()[kept]
    take_steps(MuonAdamW(whole, lr=1.0, weight_decay=0.0), whole, 0, 5)
    first = MuonAdamW(parts, lr=1.0, weight_decay=0.0)
    take_steps(first, parts, 0, 2)
    second = MuonAdamW(parts, lr=1.0, weight_decay=0.0)
    second.load_state_dict(first.state_dict())
    take_steps(second, parts, 2, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_weights_without_a_gradient_stay() -> None:
    weights = parameters()
    optimizer = MuonAdamW(weights, lr=1e-2, weight_decay=0.5)
    weights[1].grad, weights[2].grad = torch.ones(4, 7), torch.ones(5)
    optimizer.step()
    changed = [not torch.equal(now, then) for now, then in zip(weights, parameters(), strict=True)]
    assert changed == [False, True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "backbone"])
def test_a_run_resumes_exactly(tmp_path: Path, stage: str) -> None:
    changes = {"optimizer": "muon", "save_every": 2, "vae": {"frames": 1}}
    curves = []
    for name, stops in (("whole", [4]), ("stopped", [2, 4])):
        for steps in stops:
            train(config(stage, tmp_path / name, steps=steps, schedule="constant", **changes), progress=False)
        written = (tmp_path / name / METRICS).read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in written])
    assert len(curves[0]) == 4 and curves[0] == curves[1]


@pytest.mark.slow
def test_models_are_left_in_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    """And measured in it: what the next stage reads is what the latents' scale belongs to."""
    for dtype in ("float32", "bfloat16"):
        train(config("vae", tmp_path / dtype, save_dtype=dtype), progress=False)
    exact, rounded = (
        load_file(tmp_path / dtype / "vae" / "diffusion_pytorch_model.safetensors") for dtype in ("float32", "bfloat16")
    )
    assert exact.keys() == rounded.keys()
    for name, value in exact.items():
        assert value.dtype == torch.float32 and torch.equal(rounded[name], value.bfloat16())
    train(config("lora", tmp_path / "lora", save_dtype="bfloat16"), progress=False)
    parts = ["lora.safetensors"]
    parts += [f"{part}/diffusion_pytorch_model.safetensors" for part in ("memory_adapter", "latent_depth")]
    for part in parts:
        assert {value.dtype for value in load_file(tmp_path / "lora" / part).values()} == {torch.bfloat16}


def test_single_frames_are_encoded_without_the_zeros_before_them() -> None:
    asked = config("vae", vae={"frames": 5})
    models = models_of(asked)
    generator = torch.Generator().manual_seed(0)
    single, video = (torch.rand(2, 3, frames, 64, 96, generator=generator) * 2 - 1 for frames in (1, 5))
    stock = [VaeObjective(asked, models)((x, 0))["loss"].item() for x in (single, video)]
    quick, first = VaeObjective(config("vae", vae={"frames": 1}), models), models.vae.encoder.conv_in
    calls, convolve = [], first._conv_forward  # what a stock convolution ends in

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return convolve(*arguments)

    first._conv_forward = counted
    for x, expected, number in zip((single, video), stock, (0, 1), strict=True):
        assert quick((x, 0))["loss"].item() == pytest.approx(expected, rel=1e-5)
        assert len(calls) == number  # of five frames the first comes alone


class Blocks:
    """A stand-in for a VAE whose latents are the means of blocks of 16 pixels, and which draws them as ramps."""

    def encode(self, video: torch.Tensor) -> Any:
        means = nn.functional.avg_pool3d(video, (1, 16, 16))
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(torch.cat([means, means - 60.0], 1)))

    def decode(self, latents: torch.Tensor) -> Any:
        right, down = (torch.arange(n * 16, dtype=latents.dtype) % 16 - 7.5 for n in latents.shape[:2:-1])
        drawn = latents.repeat_interleave(16, -2).repeat_interleave(16, -1)
        return SimpleNamespace(sample=drawn + 0.01 * right + 0.02 * down[:, None])


def test_latents_between_the_tokens_are_held_to_the_frames_there() -> None:
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    video = (0.02 * rows + 0.01 * columns).expand(1, 3, 5, 64, 96)
    asked = config("vae", vae={"shifted": 1.0})
    objective = VaeObjective(asked, SimpleNamespace(vae=Blocks()))  # type: ignore[arg-type]
    for seed in range(8):
        # A plane: what is between two tokens is the mean of both, and every shift is drawn as well as none.
        losses = objective((video, seed))
        assert losses["loss"].item() == pytest.approx(1e-6 * losses["divergence"].item(), abs=2e-5)
    bent = video + 0.001 * (rows - 32).square()
    bent_losses = {round(objective((bent, seed))["psnr"].item(), 3) for seed in range(8)}
    assert len(bent_losses) > 4  # of other shifts
    plain = VaeObjective(config("vae"), SimpleNamespace(vae=Blocks()))  # type: ignore[arg-type]
    assert len({plain((bent, seed))["psnr"].item() for seed in range(4)}) == 1
    places = between_tokens(torch.arange(12.0).reshape(3, 4), 0.25, 0.5)
    assert torch.equal(places, torch.tensor([[1.5, 2.5, 3.5], [5.5, 6.5, 7.5]]))


def test_motion_invariant_latents_are_those_of_a_static_camera() -> None:
    asked = config("vae", vae={"frames": 5, "steady": 2.0})
    models = models_of(asked)
    objective, plain = VaeObjective(asked, models), VaeObjective(config("vae", vae={"frames": 5}), models)
    generator = torch.Generator().manual_seed(0)
    moving = torch.rand(2, 3, 5, 64, 96, generator=generator) * 2 - 1
    static = moving[:, :, :1].expand_as(moving)
    assert objective((static, 0))["unsteady"].item() == pytest.approx(0.0, abs=1e-9)
    losses = objective((moving, 0))
    latents, static_latents = (
        models.vae.encode(x).latent_dist.mean[:, :, 1] for x in (moving, moving[:, :, 4:].expand_as(moving))
    )
    expected = ((latents - static_latents).square().mean() / static_latents.var()).item()
    assert losses["unsteady"].item() == pytest.approx(expected, rel=1e-4) and expected > 0.01
    assert losses["loss"].item() == pytest.approx(plain((moving, 0))["loss"].item() + 2.0 * expected, rel=1e-4)
    losses["unsteady"].backward()
    assert models.vae.encoder.conv_in.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="vae.steady must be 0 with vae.frames of 1"):
        config("vae", vae={"frames": 1, "steady": 1.0})

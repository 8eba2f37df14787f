"""Schedulers: which are refused before any work, and that all their random numbers are the generator's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import generation
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from generation import options
from torch import Tensor

from mirage.pipeline.denoise import published_sigmas
from mirage.pipeline.pipeline import MiragePipeline
from mirage.pipeline.scheduling import check_noise_levels, check_scheduler

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


@pytest.fixture
def pipe() -> MiragePipeline:
    return generation.make_pipeline()


def latents(pipe: MiragePipeline, num_frames: int = 5, **changes: Any) -> Tensor:
    return pipe(**options(num_frames, **changes)).frames


STOCHASTIC = {
    "lcm": FlowMatchLCMScheduler(shift=5.0),
    "euler": FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True),
    "dpm": DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW),
}


def test_a_stochastic_scheduler_draws_from_the_generator(pipe: MiragePipeline) -> None:
    pipe.scheduler = STOCHASTIC["lcm"]
    torch.manual_seed(1)
    once = latents(pipe)
    torch.manual_seed(2)
    assert torch.equal(latents(pipe), once)


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_schedulers_draw_from_the_generator_and_resume(
    pipe: MiragePipeline, tmp_path: Path, name: str
) -> None:
    """The global random state decides nothing, and what the generator's is after a chunk is part of the run."""
    pipe.scheduler = STOCHASTIC[name]
    asked: dict[str, Any] = {"num_inference_steps": 2, "chunk_frames": 5}
    if name == "dpm":
        asked["sigmas"] = None

    def run(num_frames: int, seed: int = 1, **changes: Any) -> Tensor:
        torch.manual_seed(torch.seed())
        generator = torch.Generator().manual_seed(seed)
        return latents(pipe, num_frames, generator=generator, **asked, **changes)

    whole = run(13)
    assert torch.equal(run(13), whole) and not torch.equal(run(13, seed=2), whole)
    session_options = options(13, **asked, run_dir=tmp_path / "run")
    views = session_options.pop("cameras")
    for other in ("chunk_frames", "output_type"):
        session_options.pop(other)
    with pipe.start_session(**session_options) as session:
        session.step(views[:5])
        session.step(views[5:9])
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    assert torch.equal(run(13, run_dir=tmp_path / "killed", resume=True), whole)


@pytest.mark.parametrize(
    "scheduler, sigmas",
    [
        (UniPCMultistepScheduler(**FLOW), published_sigmas),
        (FlowMatchEulerDiscreteScheduler(shift=5.0), published_sigmas),
        (FlowMatchHeunDiscreteScheduler(shift=5.0), None),
        (DPMSolverMultistepScheduler(**FLOW), None),
        *((scheduler, None) for scheduler in STOCHASTIC.values()),
    ],
)
def test_flow_schedulers_pass_and_nothing_is_changed(scheduler: Any, sigmas: Any) -> None:
    before, timesteps = torch.get_rng_state(), scheduler.timesteps.clone()
    for steps in (1, 4, 20):
        check_scheduler(scheduler, check_noise_levels(sigmas, steps, scheduler), steps)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(scheduler.timesteps, timesteps)


class DrawsGlobally(FlowMatchEulerDiscreteScheduler):
    """As older schedulers do: noise that no generator decides."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        (moved,) = super().step(model_output, timestep, sample, return_dict=False)
        return (moved + 0.0 * torch.randn_like(sample),)


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (DrawsGlobally(), "DrawsGlobally draws from the global random state"),
        (UniPCMultistepScheduler(), "scheduler must denoise flow matching.*'use_flow_sigmas': False.*157"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "scheduler must denoise flow matching.*'epsilon'"),
        (DDIMScheduler(), "scheduler must denoise flow matching.*got DDIMScheduler"),
        (EulerDiscreteScheduler(), "scheduler must denoise flow matching.*got EulerDiscreteScheduler"),
        (FlowMatchEulerDiscreteScheduler(num_train_timesteps=100), "scheduler must denoise flow matching"),
        (
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "scheduler must take these noise levels, FlowMatchEulerDiscreteScheduler fails: .*mu",
        ),
    ],
)
def test_other_schedulers_are_refused(scheduler: Any, message: str) -> None:
    for steps in (4, 20):
        with pytest.raises(ValueError, match=message):
            check_scheduler(scheduler, None, steps)


def test_schedulers_are_refused_before_any_work(pipe: MiragePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.scheduler = UniPCMultistepScheduler()
    for model in (pipe.transformer, pipe.vae, pipe.text_encoder):
        monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(ValueError, match="sigmas must be None: the scheduler has use_flow_sigmas=False"):
        latents(pipe)
    with pytest.raises(ValueError, match="scheduler must denoise flow matching"):
        latents(pipe, sigmas=None)


def test_noise_levels_are_levels() -> None:
    euler = FlowMatchEulerDiscreteScheduler()
    assert check_noise_levels([1.0, 0.5, 0.0], 2, euler) == check_noise_levels(torch.tensor([1.0, 0.5]), 2, euler)
    assert check_noise_levels(None, 2, euler) is None
    for wrong, message in (
        ([], "sigmas must hold at least one noise level, got none"),
        ([1000, 750, 500], "if these are time steps, divide by 1000"),
        ([0.2, 0.9], r"each below the one before, got \(0.2, 0.9\)"),
        ([0.5, 0.5], "each below the one before"),
        ([0.0], r"noise levels in \(0, 1\]"),
        ([0.5, -0.1], r"noise levels in \(0, 1\]"),
        ([float("nan")], r"noise levels in \(0, 1\]"),
        ("published", "sigmas must be numbers, a function such as published_sigmas or None, got 'published'"),
        (0.5, "sigmas must be numbers, a function that gives them or None, got 0.5"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            check_noise_levels(wrong, 2, euler)


def test_a_final_zero_is_no_step(pipe: MiragePipeline) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    assert torch.equal(latents(pipe, sigmas=[1.0, 0.8, 0.0]), latents(pipe, sigmas=[1.0, 0.8]))
    assert pipe.num_timesteps == 2

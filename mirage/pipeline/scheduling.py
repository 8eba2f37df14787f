"""Schedulers: which noise levels one is given, whether it denoises Wan's flow, and where its random numbers come from.

A scheduler is rehearsed before anything heavy: one of the same configuration denoises a few numbers with a flow that is
known. That finds what no list of names would: samplers of other kinds of model, levels that one cannot take, and random
numbers that no generator decides.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import check_count

_TRAIN_TIMESTEPS = 1000  # time step of noise level 1, as Wan's transformers are trained
_TARGET, _END_TOLERANCE = 0.25, 0.05  # what the rehearsal denoises to, and how far from it a solver may end
_LEVEL_TOLERANCE = 0.002  # between a noise level and its time step, which may be rounded down to an int
_SHAPE = (1, 1, 2, 2, 2)


def check_noise_levels(
    sigmas: Sequence[float] | Callable[[int], Sequence[float]] | None, num_inference_steps: int, scheduler: Any
) -> tuple[float, ...] | None:
    """Return the noise levels that are asked for, without a final 0, which schedulers add; None for the scheduler's.

    Raises:
        TypeError, ValueError: not descending numbers in (0, 1], or the scheduler takes none; or no number of steps.
    """
    check_count("num_inference_steps", num_inference_steps, 1)
    if sigmas is None:
        return None
    if isinstance(sigmas, str):
        raise ValueError(f"sigmas must be numbers, a function such as published_sigmas or None, got {sigmas!r}")
    if callable(sigmas):
        sigmas = sigmas(num_inference_steps)
    try:
        levels = tuple(float(level) for level in sigmas)
    except TypeError:
        raise TypeError(f"sigmas must be numbers, a function that gives them or None, got {sigmas!r}") from None
    if levels[1:] and levels[-1] == 0:
        levels = levels[:-1]
    if not levels:
        raise ValueError("sigmas must hold at least one noise level, got none")
    if max(levels) > 1 and all(0 <= level <= _TRAIN_TIMESTEPS for level in levels):
        why = f"if these are time steps, divide by {_TRAIN_TIMESTEPS}"
        raise ValueError(f"sigmas must be noise levels in (0, 1], got {levels}: {why}")
    if not all(0 < level <= 1 for level in levels) or any(a <= b for a, b in pairwise(levels)):
        raise ValueError(f"sigmas must be noise levels in (0, 1], each below the one before, got {levels}")
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"sigmas must be None with {type(scheduler).__name__}, which takes none")
    if not scheduler.config.get("use_flow_sigmas", True):
        raise ValueError("sigmas must be None: the scheduler has use_flow_sigmas=False and takes none")
    return levels


def set_timesteps(
    scheduler: Any, sigmas: Sequence[float] | None, num_inference_steps: int, device: torch.device | str
) -> Tensor:
    """Set a scheduler to noise levels, or to its own ones where `sigmas` is None; return its time steps."""
    if sigmas is None:
        scheduler.set_timesteps(num_inference_steps, device=device)
    else:
        scheduler.set_timesteps(sigmas=np.array(sigmas), device=device)
    timesteps: Tensor = scheduler.timesteps
    return timesteps


def take_step(scheduler: Any, flow: Tensor, timestep: Tensor, sample: Tensor, generator: torch.Generator) -> Tensor:
    """Take one denoising step; what a stochastic scheduler draws, it draws from `generator`."""
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    denoised: Tensor = scheduler.step(flow, timestep, sample, return_dict=False, **options)[0]
    return denoised


def check_scheduler(scheduler: Any, sigmas: Sequence[float] | None, num_inference_steps: int) -> None:
    """Check that a scheduler denoises Wan's flow over these noise levels, with random numbers of a generator alone.

    Args:
        scheduler: as of diffusers; neither it nor the global random state is changed.
        sigmas: of :func:`check_noise_levels`.
        num_inference_steps: where `sigmas` is None.

    Raises:
        ValueError: it fails, ends elsewhere than the flow does, or draws from the global random state.
    """
    kind = type(scheduler).__name__
    before = torch.get_rng_state()
    try:
        rehearsed = type(scheduler).from_config(scheduler.config)
        end = _rehearse(rehearsed, sigmas, num_inference_steps)
        draws = not torch.equal(before, torch.get_rng_state())
    except Exception as error:
        raise ValueError(f"scheduler must take these noise levels, {kind} fails: {error!r}") from error
    finally:
        torch.set_rng_state(before)
    if draws:
        raise ValueError(
            f"scheduler must draw from a generator alone, so that runs can be repeated and resumed: {kind} draws from"
            " the global random state"
        )
    if not _is_flow(rehearsed) or not math.isfinite(end) or abs(end - _TARGET) > _END_TOLERANCE:
        known = {
            key: scheduler.config[key] for key in ("prediction_type", "use_flow_sigmas") if key in scheduler.config
        }
        raise ValueError(
            "scheduler must denoise flow matching, as FlowMatchEulerDiscreteScheduler does, or UniPCMultistepScheduler"
            f' with prediction_type="flow_prediction" and use_flow_sigmas=True, got {kind} with {known}: its noise'
            f" levels are {_describe_levels(rehearsed)}, and it ends at {end:.3g} where the flow ends at {_TARGET}"
        )


def _is_flow(scheduler: Any) -> bool:
    """Return whether the noise levels of a scheduler are what its time steps tell the transformer."""
    levels = getattr(scheduler, "sigmas", None)
    told = scheduler.timesteps.double().cpu() / _TRAIN_TIMESTEPS
    if levels is None or len(levels) < len(told):
        return False
    return bool(((levels[: len(told)].double().cpu() - told).abs() <= _LEVEL_TOLERANCE).all())


def _describe_levels(scheduler: Any) -> str:
    levels = getattr(scheduler, "sigmas", None)
    return "unknown" if levels is None else f"{float(levels.max()):.3g} to {float(levels.min()):.3g}"


def _rehearse(scheduler: Any, sigmas: Sequence[float] | None, num_inference_steps: int) -> float:
    """Denoise a few numbers along the straight flow to `_TARGET`, and return where they end, the farthest of them."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.ones(_SHAPE)
    for timestep in set_timesteps(scheduler, sigmas, num_inference_steps, "cpu"):
        level = float(timestep) / _TRAIN_TIMESTEPS
        flow = (sample - _TARGET) / level if level else torch.zeros_like(sample)
        sample = take_step(scheduler, flow, timestep, sample, generator)
        if sample.shape != _SHAPE:
            raise ValueError(f"the sample must keep its shape, {_SHAPE}, got {tuple(sample.shape)}")
    ends = sample.flatten()
    return float(ends[(ends - _TARGET).abs().nan_to_num(math.inf).argmax()])

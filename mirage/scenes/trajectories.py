"""Generated camera paths: orbit, dolly, pan, spiral, and there-and-back loops.

Each path starts at a one-view `Cameras`, `start`, which is the first view of the result bit for bit, and takes any
frame count >= 1; frame i of n stands at t = i / (n - 1). Axes are those of the start camera (OpenCV: x right, y down,
z forward), lengths are world units, angles degrees. Poses are as rigid as the start pose is. The intrinsics are the
start's. Results lie on the start's device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mirage_kernels import Cameras

from . import rotations


def orbit(start: Cameras, num_frames: int, *, distance: float, degrees: float = 30.0) -> Cameras:
    """Circle around the point `distance` in front of the start camera, around its y axis, looking at it.

    Positive `degrees` move the camera to its right. Multiples of 360 close the circle: the last pose is the
    first, bit for bit.
    """
    _check_positive("distance", distance)
    _check_finite("degrees", degrees)

    def local(t: float) -> Tensor:
        sine, cosine = rotations.sine_cosine(degrees * t)
        return rotations.pose(rotations.yaw(-degrees * t), (distance * sine, 0.0, distance - distance * cosine))

    return _path(start, num_frames, local)


def dolly(start: Cameras, num_frames: int, *, offset: Sequence[float]) -> Cameras:
    """Move in a straight line from the start to `offset` = (right, down, forward), with an unchanged rotation."""
    if len(offset) != 3:
        raise ValueError(f"offset must be three lengths (right, down, forward), got {len(offset)}")
    for value in offset:
        _check_finite("offset", value)
    eye = torch.eye(3, dtype=torch.float64)
    return _path(start, num_frames, lambda t: rotations.pose(eye, [value * t for value in offset]))


def pan(start: Cameras, num_frames: int, *, degrees: float, pitch: float = 0.0) -> Cameras:
    """Turn in place about the y axis by `degrees`, positive to the right, and up by `pitch`.

    Multiples of 360 close: the last pose is the first, bit for bit.
    """
    _check_finite("degrees", degrees)
    _check_finite("pitch", pitch)
    return _path(
        start,
        num_frames,
        lambda t: rotations.pose(rotations.yaw(degrees * t) @ rotations.pitch(pitch * t), (0.0, 0.0, 0.0)),
    )


def spiral(
    start: Cameras, num_frames: int, *, distance: float, radius: float, turns: float = 2.0, depth: float = 0.0
) -> Cameras:
    """Spiral out of the start and back into it, looking at the point `distance` ahead.

    After LLFF (Mildenhall et al. 2019), but from the start pose: at t the camera stands at s (radius cos a,
    radius sin a, depth), with a = 360 turns t degrees and s = sin^2(pi t). So it is farthest, and `depth`
    forward, half-way, and the last pose is the first, bit for bit.
    """
    _check_positive("distance", distance)
    for name, value in (("radius", radius), ("turns", turns), ("depth", depth)):
        _check_finite(name, value)
    if depth >= distance:
        raise ValueError(f"depth must be less than distance ({distance:g}), got {depth:g}")

    def local(t: float) -> Tensor:
        swell = rotations.sine_cosine(180.0 * min(t, 1.0 - t))[0] ** 2  # by the nearer end, so that both are exactly 0
        sine, cosine = rotations.sine_cosine(360.0 * turns * t)
        centre = (swell * radius * cosine, swell * radius * sine, swell * depth)
        return rotations.pose(rotations.facing(-centre[0], -centre[1], distance - centre[2]), centre)

    return _path(start, num_frames, local)


def out_and_back(make_path: Callable[[int], Cameras], num_frames: int) -> Cameras:
    """Make a path and its reverse: view i and view `num_frames` - 1 - i are the same, bit for bit.

    Args:
        make_path: gives the way out for a frame count, e.g. `lambda n: orbit(start, n, distance=2.0)`. It is
            asked for ceil(num_frames / 2) frames; at an even `num_frames` the turning point is held for two.
    """
    _check_num_frames(num_frames)
    turn = (num_frames + 1) // 2
    way_out = make_path(turn)
    if len(way_out) != turn:
        raise ValueError(f"make_path must give the {turn} views it is asked for, got {len(way_out)}")
    return Cameras.cat([way_out, way_out[: num_frames // 2][::-1]])


def make_trajectory(name: str, start: Cameras, num_frames: int, distance: float, **options: Any) -> Cameras:
    """Make the path called `name` in `TRAJECTORIES`, sized for a scene about `distance` in front of `start`.

    Without options: orbit and pan by 30 degrees, dolly forward by half the distance, spiral with a fifth of
    the distance as radius.
    """
    if name not in TRAJECTORIES:
        raise ValueError(f"name must be one of {', '.join(TRAJECTORIES)}, got {name!r}")
    _check_positive("distance", distance)
    defaults: dict[str, dict[str, Any]] = {
        "orbit": {"distance": distance},
        "dolly": {"offset": (0.0, 0.0, distance / 2)},
        "pan": {"degrees": 30.0},
        "spiral": {"distance": distance, "radius": distance / 5},
    }
    return TRAJECTORIES[name](start, num_frames, **{**defaults[name.removesuffix("-and-back")], **options})


def _and_back(path: Callable[..., Cameras]) -> Callable[..., Cameras]:
    return lambda start, num_frames, **options: out_and_back(lambda n: path(start, n, **options), num_frames)


TRAJECTORIES: dict[str, Callable[..., Cameras]] = {
    "orbit": orbit,
    "dolly": dolly,
    "pan": pan,
    "spiral": spiral,
    "orbit-and-back": _and_back(orbit),
    "dolly-and-back": _and_back(dolly),
    "pan-and-back": _and_back(pan),
}
"""The generated paths by name, called as `path(start, num_frames, **options)`; "-and-back" ones return."""


def _path(start: Cameras, num_frames: int, local: Callable[[float], Tensor]) -> Cameras:
    """Make the views at poses `local(t)` (4, 4), t from 0 to 1, given in the axes of the start camera."""
    _check_num_frames(num_frames)
    if not isinstance(start, Cameras) or len(start) != 1:
        got = f"{len(start)} views" if isinstance(start, Cameras) else type(start).__name__
        raise ValueError(f"start must be Cameras of one view, got {got}")
    steps = torch.stack([local(i / max(num_frames - 1, 1)) for i in range(num_frames)])
    origin = start.cam2world.cpu()
    poses = origin @ steps
    at_start = (steps == torch.eye(4, dtype=torch.float64)).all(2).all(1)
    poses[at_start] = origin  # a product with the identity loses the sign of -0
    return start.with_cam2world(poses)


def _check_num_frames(num_frames: int) -> None:
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"num_frames must be an int >= 1, got {num_frames!r}")


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")

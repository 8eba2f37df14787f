"""Camera paths through a room that keep clear of everything."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mirage_kernels import Cameras

from ..rotations import sine_cosine
from ..trajectories import dolly, orbit, out_and_back, pan
from .textures import pick

if TYPE_CHECKING:
    from .room import SyntheticRoom

CLEARANCE = 0.25
"""Metres that a path keeps, at least, from walls, furniture and wherever moving objects come."""

PATHS = (
    "walk",
    "around",
    "laps",
    "pan",
    "orbit",
    "dolly",
    "walk-and-back",
    "pan-and-back",
    "orbit-and-back",
    "dolly-and-back",
)
"""Kinds of :meth:`SyntheticRoom.path`."""

_SIGHT = 0.6  # metres of free sight that a camera starts with, at least
_SPEED, _TURN = 0.04, 2.0  # of a walk: metres and degrees a frame, at most
_SMOOTH = 2  # frames to either side over which a walk is averaged


def make_path(
    room: SyntheticRoom, kind: str, num_frames: int, image_size: Sequence[int], *, fov: float, seed: int, pace: float
) -> Cameras:
    """Make the path of :meth:`SyntheticRoom.path`, which says what the arguments are."""
    if kind not in PATHS:
        raise ValueError(f"kind must be one of {', '.join(PATHS)}, got {kind!r}")
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"num_frames must be an int >= 1, got {num_frames!r}")
    if not (math.isfinite(pace) and pace > 0):
        raise ValueError(f"pace must be positive and finite, got {pace}")
    rng = random.Random(f"{room.seed} {kind} {seed}")
    start = find_start(room, image_size, fov, rng, 2 * CLEARANCE)
    name = kind.removesuffix("-and-back")
    degrees, distance = pick(rng, (-1.0, 1.0)) * rng.uniform(30.0, 80.0), rng.uniform(1.0, 2.0)

    def make(frames: int) -> Cameras:
        if name == "walk":
            return walk(room, start, frames, rng, pace)
        if name == "around":
            return around(room, start, frames, rng)
        if name == "pan":
            return pan(start, frames, degrees=1.5 * degrees * pace)
        # As far as there is room: the full size, or a fraction of it. (The start itself is free.)
        for part in (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05):
            if name == "orbit":
                made = orbit(start, frames, distance=distance, degrees=part * degrees * pace)
            elif name == "laps":
                made = laps(start, frames, radius=0.3 * part * distance * pace, degrees=0.3 * degrees * pace)
            else:
                made = dolly(start, frames, offset=(0.0, 0.0, part * distance * pace))
            if (room.clearance(made.centers) >= CLEARANCE).all():
                return made
        return pan(start, frames, degrees=degrees * pace)

    return out_and_back(make, num_frames) if kind.endswith("-and-back") else make(num_frames)


def find_start(
    room: SyntheticRoom, image_size: Sequence[int], fov: float, rng: random.Random, margin: float
) -> Cameras:
    if not 0.0 < fov < 180.0:
        raise ValueError(f"fov must be in (0, 180) degrees, got {fov}")
    x, y, z = room.size
    spots = torch.tensor(
        [[rng.uniform(-0.5, 0.5) * x, -rng.uniform(1.1, 1.7), rng.uniform(-0.5, 0.5) * z] for _ in range(256)],
        dtype=torch.float64,
    )
    spots[:, 1].clamp_(min=0.3 - y)
    free_space = room.clearance(spots)
    free = (free_space >= margin).nonzero()[:, 0].tolist()
    spot = spots[free[0] if free else int(free_space.argmax())]
    # Of some directions, the one with the freest view.
    headings = [rng.uniform(-180.0, 180.0) for _ in range(6)]
    ahead = [room.clearance(spot + k * torch.tensor([forward_axis(h)])) for h in headings for k in (1.0, 2.5)]
    views = torch.stack(ahead).view(6, 2).clamp(max=_SIGHT).sum(1)
    heading = headings[int(views.argmax())]
    focal = 0.5 * image_size[1] / math.tan(math.radians(0.5 * fov))
    matrix = [[focal, 0.0, image_size[1] / 2], [0.0, focal, image_size[0] / 2], [0.0, 0.0, 1.0]]
    return Cameras(matrix, make_poses(spot[None], [heading], [0.0]), image_size)


def walk(room: SyntheticRoom, start: Cameras, frames: int, rng: random.Random, pace: float) -> Cameras:
    """Walk in small steps in a direction that drifts, and turns away from what is near; the view follows it slowly."""
    forward = start.cam2world[0, :3, 2]
    heading = math.degrees(math.atan2(forward[0], forward[2]))
    yaw, pitch, drift = heading, 0.0, 0.0
    speed, turn = _SPEED * pace, _TURN * pace
    spot, margin = start.centers, CLEARANCE + _SMOOTH * speed
    turns = torch.tensor([0.0, *(sign * a for a in range(10, 181, 10) for sign in (1, -1))], dtype=torch.float64)
    spots, yaws, pitches = [spot], [yaw], [pitch]
    for _ in range(frames - 1):
        drift = 0.9 * drift + rng.uniform(-pace, pace)
        heading += drift
        radians = torch.deg2rad(heading + turns)
        steps = torch.stack([radians.sin(), torch.zeros_like(radians), radians.cos()], 1) * speed
        # Ahead of the step as well, so that it turns before it must.
        free = (room.clearance(spot + steps) >= margin) & (room.clearance(spot + (8 / pace) * steps) >= margin)
        choices = (free if free.any() else room.clearance(spot + steps) >= margin).nonzero()[:, 0]
        if len(choices):
            heading += float(turns[choices[0]])
            spot = spot + steps[choices[0]]
        towards = math.remainder(heading - yaw, 360.0)
        yaw += max(-turn, min(turn, 0.1 * towards))
        pitch = 0.95 * pitch + rng.uniform(-0.3 * pace, 0.3 * pace)
        spots.append(spot)
        yaws.append(yaw)
        pitches.append(pitch)
    track = torch.cat(spots)
    padded = torch.cat([track[:1].expand(_SMOOTH, 3), track, track[-1:].expand(_SMOOTH, 3)])
    smooth = torch.stack([padded[i : i + frames] for i in range(2 * _SMOOTH + 1)]).mean(0)
    return start.with_cam2world(make_poses(smooth, yaws, pitches))


def around(room: SyntheticRoom, start: Cameras, frames: int, rng: random.Random) -> Cameras:
    """Follow the largest free ellipse of some, looking outward, inward or ahead; a turn in place if none is."""
    x, _, z = room.size
    height, begin, look = rng.uniform(-1.7, -1.1), rng.uniform(0.0, 360.0), pick(rng, (0.0, 90.0, 180.0))
    sense = pick(rng, (-1.0, 1.0))
    angles = [begin + sense * (360.0 * i / max(frames - 1, 1) % 360.0) for i in range(frames)]
    for up in (0.0, -0.2, -0.4, -0.6):
        for part in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
            dense = torch.linspace(0.0, 360.0, 181, dtype=torch.float64).tolist()
            level = max(height + up, 0.4 - room.size[1])
            places = [
                [[0.5 * part * x * sine_cosine(a)[0], level, 0.5 * part * z * sine_cosine(a)[1]] for a in where]
                for where in (dense, angles)
            ]
            on_ellipse, track = (torch.tensor(p, dtype=torch.float64) for p in places)
            # 181 places: what lies between two is at most a few centimetres nearer.
            if (room.clearance(on_ellipse) >= CLEARANCE + 0.05).all():
                poses = make_poses(track, [a + sense * look for a in angles], [0.0] * frames)
                return start.with_cam2world(poses)
    return pan(start, frames, degrees=360.0)


def laps(start: Cameras, frames: int, radius: float, degrees: float) -> Cameras:
    """Go twice around the circle that touches the start camera's image plane from the front, looking left and right."""
    once = max(frames // 2, 1)
    locals_ = torch.eye(4, dtype=torch.float64).repeat(once, 1, 1)
    for i in range(once):
        sine, cosine = sine_cosine(360.0 * i / once)
        locals_[i, :3, 3] = torch.tensor([radius * sine, 0.0, radius * (1.0 - cosine)], dtype=torch.float64)
        sway, straight = sine_cosine(degrees * sine)
        locals_[i, 0, 0] = locals_[i, 2, 2] = straight
        locals_[i, 0, 2], locals_[i, 2, 0] = sway, -sway
    lap = start.cam2world[0] @ locals_
    lap[0] = start.cam2world[0]
    return start.with_cam2world(lap[torch.arange(frames) % once])


def make_poses(centres: Tensor, yaws: Sequence[float], pitches: Sequence[float]) -> Tensor:
    """Make poses (N, 4, 4) float64, turned right by yaw, then up by pitch, in degrees."""
    poses = torch.eye(4, dtype=torch.float64).repeat(len(centres), 1, 1)
    poses[:, :3, 3] = centres
    for pose, yaw, pitch in zip(poses, yaws, pitches, strict=True):
        (sy, cy), (sp, cp) = sine_cosine(yaw), sine_cosine(pitch)
        rows = [[cy, sy * sp, sy * cp], [0.0, cp, -sp], [-sy, cy * sp, cy * cp]]
        pose[:3, :3] = torch.tensor(rows, dtype=torch.float64)
    return poses


def forward_axis(yaw: float) -> tuple[float, float, float]:
    """Give the unit vector that a level camera of this yaw looks along."""
    sine, cosine = sine_cosine(yaw)
    return (sine, 0.0, cosine)

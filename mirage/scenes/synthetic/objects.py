"""`SceneObject`: a piece of furniture, or an object that moves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..rotations import sine_cosine

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class SceneObject:
    """A piece of furniture, or an object that moves.

    Attributes:
        shape: "box", "cylinder" (upright) or "sphere".
        centre: in world metres, at rest.
        half: half its size along x, y and z before it is turned; radii for the round ones.
        yaw: degrees about y.
        travel: how far it swings from `centre`, to either side; zeros stand still.
        period, phase: of the swing, seconds and turns.
    """

    shape: str
    centre: Vector
    half: Vector
    yaw: float = 0.0
    travel: Vector = (0.0, 0.0, 0.0)
    period: float = 1.0
    phase: float = 0.0

    @property
    def moves(self) -> bool:
        return any(self.travel)

    def at(self, time: float) -> SceneObject:
        """Move the object to where it is at `time` in seconds."""
        swing = math.sin(2.0 * math.pi * (time / self.period + self.phase))
        (x, y, z), (a, b, c) = self.centre, self.travel
        return replace(self, centre=(x + swing * a, y + swing * b, z + swing * c))

    def distance(self, points: Tensor) -> Tensor:
        """Measure the distance (N,) of `points` (N, 3) float64 from its surface, negative inside; at most that for
        moving objects, of the box of all places they come to."""
        local = points - torch.tensor(self.centre, dtype=torch.float64)
        half = torch.tensor(self.half, dtype=torch.float64)
        if self.moves:
            excess = local.abs() - half - torch.tensor(self.travel, dtype=torch.float64).abs()
        elif self.shape == "sphere":
            return local.norm(dim=1) - self.half[0]
        elif self.shape == "cylinder":
            around = local[:, ::2].norm(dim=1) - self.half[0]
            excess = torch.stack([around, local[:, 1].abs() - self.half[1]], 1)
        else:
            sine, cosine = sine_cosine(self.yaw)
            x, y, z = local.unbind(1)
            excess = torch.stack([cosine * x - sine * z, y, sine * x + cosine * z], 1).abs() - half
        return excess.clamp(min=0).norm(dim=1) + excess.amax(1).clamp(max=0)

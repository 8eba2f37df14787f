"""Textures: 128 x 128 texels that repeat, with all their mip levels, in one list of texels."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rotations import sine_cosine

TEXTURE_SIDE = 128
"""Texels along a texture."""

MIP_LEVELS = 8  # 128, 64, .., 1

_T = TypeVar("_T")


def pick(rng: random.Random, choices: Sequence[_T]) -> _T:
    """Choose one of `choices` with one draw of `rng`."""
    return choices[int(rng.random() * len(choices))]


def pack_textures(textures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pack all levels of all textures into (texels, 3); also return where each level starts."""
    levels = [torch.stack(list(textures))]
    for _ in range(MIP_LEVELS - 1):
        fine = levels[-1]
        levels.append((fine[:, ::2, ::2] + fine[:, 1::2, ::2] + fine[:, ::2, 1::2] + fine[:, 1::2, 1::2]) / 4)
    counts = [0, *(level.shape[0] * level.shape[1] ** 2 for level in levels)]
    starts = torch.tensor(counts[:-1]).cumsum(0).int()
    return torch.cat([level.reshape(-1, 3) for level in levels]), starts


def sample_textures(atlas: Tensor, starts: Tensor, texture: Tensor, u: Tensor, v: Tensor, texels: Tensor) -> Tensor:
    """Sample (R, 3) colours at texture coordinates in tiles, over areas `texels` wide: trilinear."""
    level = texels.clamp(min=1.0).log2().clamp(max=MIP_LEVELS - 1.001)
    finer = level.int()
    share = level - finer
    levels = torch.stack([finer, finer + 1])
    side = TEXTURE_SIDE >> levels
    x, y = (u - u.floor()) * side - 0.5, (v - v.floor()) * side - 0.5
    left, top = x.floor(), y.floor()
    right_share, low_share = x - left, y - top
    left, top, last = left.int(), top.int(), side - 1
    base = starts[levels] + texture * side * side
    columns = [left & last, (left + 1) & last]
    rows = [base + (top & last) * side, base + ((top + 1) & last) * side]
    of_level = torch.stack([1.0 - share, share])
    of_row = [of_level * (1.0 - low_share), of_level * low_share]
    texel = torch.stack([row + column for row in rows for column in columns]).flatten(0, 1)
    weight = torch.stack([w * s for w in of_row for s in (1.0 - right_share, right_share)]).flatten(0, 1)
    # One fused gather and weighted sum of 8 texels.
    return F.embedding_bag(texel.T.contiguous(), atlas, mode="sum", per_sample_weights=weight.T.contiguous())


def make_texture(kind: str, rng: random.Random) -> Tensor:
    """Make a texture (128, 128, 3) float32 in [0, 1]."""
    steps = (torch.arange(TEXTURE_SIDE, dtype=torch.float32) + 0.5) / TEXTURE_SIDE
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    first, second = _random_color(rng), _random_color(rng)

    def mix(share: Tensor) -> Tensor:
        return torch.lerp(first.expand(TEXTURE_SIDE, TEXTURE_SIDE, 3), second, share[..., None])

    if kind == "plain":
        return torch.full((TEXTURE_SIDE, TEXTURE_SIDE, 3), 0.9) * (0.95 + 0.05 * _noise(rng, 8))[..., None]
    if kind == "plaster":
        return (first * (0.7 + 0.45 * (0.6 * _noise(rng, 4) + 0.4 * _noise(rng, 32)))[..., None]).clamp(0, 1)
    if kind == "stripes":
        count = pick(rng, (2, 3, 4, 6))
        return mix((((u * count) % 1.0) < rng.uniform(0.3, 0.7)).float()) * (0.9 + 0.1 * _noise(rng, 16))[..., None]
    if kind == "checker":
        count = pick(rng, (2, 4, 6))
        odd = ((u * count).floor() + (v * count).floor()) % 2
        return mix(odd) * (0.8 + 0.2 * _noise(rng, 16))[..., None]
    if kind == "dots":
        count = pick(rng, (2, 3, 4))
        x, y = (u * count) % 1.0 - 0.5, (v * count) % 1.0 - 0.5
        return mix((x * x + y * y < rng.uniform(0.05, 0.12)).float()) * (0.85 + 0.15 * _noise(rng, 8))[..., None]
    if kind in ("brick", "tiles"):
        rows, columns = (8, 4) if kind == "brick" else pick(rng, ((3, 3), (4, 4), (6, 6)))
        row = (v * rows).floor()
        x = u * columns + (0.5 * (row % 2) if kind == "brick" else 0.0)
        one = _random_table(rng, rows, columns)[row.long(), x.floor().long() % columns]
        joint = (((x % 1.0) < 0.06) | (((v * rows) % 1.0) < 0.1)).float()
        body = mix(one * 0.5) * (0.75 + 0.25 * one * _noise(rng, 32) + 0.1 * _noise(rng, 4))[..., None]
        return torch.lerp(body, torch.full((3,), rng.uniform(0.6, 0.9)).expand_as(body), joint[..., None]).clamp(0, 1)
    if kind == "wood":
        planks = pick(rng, (4, 6, 8))
        plank = (u * planks).floor()
        shift = _random_table(rng, 1, planks)[0][plank.long()]
        grain = torch.sin(2 * math.pi * (u * planks * 2 + shift * 7 + 1.5 * _noise(rng, 4, (2, 1)) + shift * v.sin()))
        warm = torch.tensor([rng.uniform(0.5, 0.85), rng.uniform(0.35, 0.55), rng.uniform(0.15, 0.35)])
        gap = ((u * planks) % 1.0 < 0.04).float()
        return (warm * (0.65 + 0.25 * shift + 0.12 * grain - 0.4 * gap)[..., None]).clamp(0, 1)
    if kind == "poster":
        poster = first.expand(TEXTURE_SIDE, TEXTURE_SIDE, 3)
        for _ in range(5 + pick(rng, (0, 2, 4))):
            left, top, r = rng.random(), rng.random(), rng.uniform(0.08, 0.3)
            shape, angle = pick(rng, ("disc", "bar", "square")), rng.uniform(0.0, 360.0)
            sine, cosine = sine_cosine(angle)
            a, b = cosine * (u - left) + sine * (v - top), cosine * (v - top) - sine * (u - left)
            if shape == "disc":
                inside = a * a + b * b < r * r
            else:
                inside = (a.abs() < r) & (b.abs() < (0.25 * r if shape == "bar" else r))
            poster = torch.where(inside[..., None], _random_color(rng), poster)
        border = ((u - 0.5).abs() > 0.47) | ((v - 0.5).abs() > 0.47)
        return torch.where(border[..., None], torch.full((3,), rng.uniform(0.05, 0.95)), poster)
    assert kind == "sky"
    blue = torch.lerp(torch.tensor([0.35, 0.6, 0.95]), torch.tensor([0.85, 0.92, 1.0]), v[..., None])
    clouds = (2.5 * (0.6 * _noise(rng, 8) + 0.4 * _noise(rng, 16)) - rng.uniform(0.9, 1.4)).clamp(0, 1)
    return torch.lerp(blue, torch.ones(3).expand_as(blue), clouds[..., None])


def _noise(rng: random.Random, cells: int, stretch: tuple[int, int] = (1, 1)) -> Tensor:
    """Make noise (128, 128) in [0, 1]: random values at `cells` x `cells` knots, smooth between them, repeating; fewer
    of them along v and u by `stretch`."""
    values = _random_table(rng, cells // stretch[0], cells // stretch[1])
    parts = []
    for count in values.shape:
        at = (torch.arange(TEXTURE_SIDE, dtype=torch.float32) + 0.5) * count / TEXTURE_SIDE
        knot = at.floor()
        share = at - knot
        parts.append((knot.long(), (knot.long() + 1) % count, share * share * (3.0 - 2.0 * share)))
    (top, low, down), (left, right, across) = parts
    upper, lower = (
        torch.lerp(values[r][:, left], values[r][:, right], across.expand(TEXTURE_SIDE, TEXTURE_SIDE))
        for r in (top, low)
    )
    return torch.lerp(upper, lower, down[:, None].expand(TEXTURE_SIDE, TEXTURE_SIDE))


def _random_table(rng: random.Random, rows: int, columns: int) -> Tensor:
    return torch.tensor([[rng.random() for _ in range(columns)] for _ in range(rows)])


def _random_color(rng: random.Random) -> Tensor:
    """Draw a random colour (3,), neither dark nor grey."""
    hue, saturation, value = 6.0 * rng.random(), rng.uniform(0.3, 0.8), rng.uniform(0.55, 0.95)
    wheel = [value * (1.0 - saturation * max(0.0, min(1.0, abs((hue + k) % 6.0 - 3.0) - 1.0))) for k in (3, 1, 5)]
    return torch.tensor(wheel)

"""`SyntheticRoom`: procedural rooms, any number, each from a seed, with exact depth, poses and masks.

A room has textured walls, floor and ceiling, posters, windows that show the sky, furniture, and sometimes things that
move. It is rendered in plain PyTorch by casting rays at analytic surfaces: depth is that of each pixel centre's ray,
colours are filtered (textures by their mip levels, edges by 3x3 rays a pixel), and brightness does not depend on where
the camera stands, so that a surface looks the same from everywhere.

World: metres, x right, y down, z forward; the floor is y = 0, its centre the origin. What a room holds comes from
Python's own generator and is the same everywhere; pictures are the same bits on one machine, at any thread count.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mirage_kernels import Cameras

from .patch_pca import one_thread
from .trajectories import dolly, orbit, out_and_back, pan

FPS = 24.0
"""Frames per second where no times are given."""

CLEARANCE = 0.25
"""Metres that :meth:`SyntheticRoom.path` keeps, at least, from walls, furniture and wherever moving things come."""

_SIDE = 128  # texels along a texture
_LEVELS = 8  # 128, 64, .., 1
_AROUND = 3  # rays along a side of a pixel on an edge
_DOME = 20.0  # the sky's radius, which only says how large clouds look
_AMBIENT, _FALLOFF = 0.5, 14.0  # of the lamp; square metres
_SIGHT = 0.6  # metres of free sight that a camera starts with, at least
_SPEED, _TURN = 0.04, 2.0  # of a walk: metres and degrees a frame, at most
_SMOOTH = 2  # frames to either side over which a walk is averaged

_WALLS = ("plaster", "stripes", "brick", "tiles", "checker", "dots")
_FLOORS = ("wood", "checker", "tiles", "plaster")
_FURNITURE = ("wood", "stripes", "checker", "plaster", "dots", "brick")

Vector = tuple[float, float, float]
_T = TypeVar("_T")


@dataclass(frozen=True)
class SyntheticFrames:
    """N views of a room.

    Attributes:
        images: (N, 3, H, W) float32 in [0, 1].
        depth: (N, H, W) float32, z along the optical axis in metres, of the ray through each pixel's centre; 0 where
            it sees the sky.
        static: (N, H, W) bool, False where any part of the pixel shows a thing that moves.
        sky: (N, H, W) bool, True where the pixel's centre shows the sky.
        cameras: N views of image size (H, W).
    """

    images: Tensor
    depth: Tensor
    static: Tensor
    sky: Tensor
    cameras: Cameras


@dataclass(frozen=True)
class Thing:
    """A piece of furniture, or a thing that moves.

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

    def at(self, time: float) -> Thing:
        """Where it is at `time` in seconds."""
        swing = math.sin(2.0 * math.pi * (time / self.period + self.phase))
        (x, y, z), (a, b, c) = self.centre, self.travel
        return replace(self, centre=(x + swing * a, y + swing * b, z + swing * c))

    def distance(self, points: Tensor) -> Tensor:
        """(N,) distance of `points` (N, 3) float64 from its surface, negative inside; at most that for moving things,
        of the box of all places they come to."""
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
            sine, cosine = _sine_cosine(self.yaw)
            x, y, z = local.unbind(1)
            excess = torch.stack([cosine * x - sine * z, y, sine * x + cosine * z], 1).abs() - half
        return excess.clamp(min=0).norm(dim=1) + excess.amax(1).clamp(max=0)


@dataclass(frozen=True)
class _Decal:
    """A rectangle on a wall: its middle along the wall and y, half its size, and its face."""

    wall: int
    middle: tuple[float, float]
    half: tuple[float, float]
    face: int


class SyntheticRoom:
    """The room of a seed.

    Args:
        seed: an int >= 0; every seed is another room.
        moving: how many things move; None leaves it to the seed (none in half of the rooms, else one or two).
        texture: contrast in [0, 1] of the patterns on walls, floor, ceiling and furniture; 0 leaves each its mean
            colour. Posters and the sky stay as they are.

    Attributes:
        size: (x, y, z) of the room in metres.
        things: :class:`Thing` of the furniture, then of what moves.
        prompt: what there is to see, in words.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(self, seed: int, moving: int | None = None, texture: float = 1.0) -> None:
        for name, value in (("seed", seed), ("moving", moving)):
            if (value is not None or name == "seed") and (
                isinstance(value, bool) or not isinstance(value, int) or value < 0
            ):
                raise ValueError(f"{name} must be an int >= 0, got {value!r}")
        if isinstance(texture, bool) or not isinstance(texture, (int, float)) or not 0.0 <= texture <= 1.0:
            raise ValueError(f"texture must be in [0, 1], got {texture!r}")
        self.seed, self._contrast = seed, float(texture)
        rng = random.Random(seed)
        self.size: Vector = (rng.uniform(4.0, 7.0), rng.uniform(2.4, 3.1), rng.uniform(4.0, 7.0))
        self._lamp = (rng.uniform(-0.2, 0.2) * self.size[0], -0.9 * self.size[1], rng.uniform(-0.2, 0.2) * self.size[2])
        self._textures: list[Tensor] = []
        self._faces: list[list[float]] = []  # u axis and offset, v axis and offset, normal, texels per metre
        self._kinds: list[tuple[int, int, bool, bool]] = []  # texture, thing, round, sky
        self._decals: list[_Decal] = []
        self.things: list[Thing] = []
        looks = self._build_shell(rng)
        self._build_furniture(rng)
        count = (0 if rng.random() < 0.5 else 1 + _pick(rng, (0, 1))) if moving is None else moving
        self._build_moving(rng, count)
        self._first_face: list[int] = [
            next(i for i, kind in enumerate(self._kinds) if kind[1] == thing) for thing in range(len(self.things))
        ]
        self.prompt = self._describe(*looks)
        self._atlas, self._level_starts = _pack(self._textures)
        self._table = torch.tensor(self._faces, dtype=torch.float64).T.contiguous()  # (12, faces)
        textures, thing, is_round, is_sky = zip(*self._kinds, strict=True)
        self._texture = torch.tensor(textures, dtype=torch.int32)
        self._thing = torch.tensor(thing)
        self._round, self._sky = torch.tensor(is_round), torch.tensor(is_sky)
        self._moving = torch.tensor([t >= 0 and self.things[t].moves for t in thing])

    # What is in it.

    def _build_shell(self, rng: random.Random) -> tuple[str, str]:
        """Walls, ceiling, floor, posters and windows; what walls and floor are made of."""
        walls, floor = _pick(rng, _WALLS), _pick(rng, _FLOORS)
        wall = self._add_texture(walls, rng)
        other = self._add_texture(_pick(rng, _WALLS), rng) if rng.random() < 0.5 else wall
        ceiling, ground = self._add_texture("plaster", rng), self._add_texture(floor, rng)
        width, height, length = self.size
        period, plank = rng.uniform(1.2, 2.4), rng.uniform(1.2, 2.4)
        for i, (axis, sign) in enumerate(((0, -1), (0, 1), (1, -1), (1, 1), (2, -1), (2, 1))):
            normal = [0.0, 0.0, 0.0]
            normal[axis] = -float(sign)
            if axis == 1:
                texture, tile, first, second = (ceiling, 2.0, 0, 2) if sign < 0 else (ground, plank, 0, 2)
            else:
                texture, tile, first, second = (other if i == 5 else wall), period, 2 - axis, 1
            self._add_face(_axis(first), _axis(second), (0.0, 0.0, 0.0), normal, texture, (tile, tile))
        walls_of = {0: length, 1: length, 4: width, 5: width}
        frame, sky = self._add_texture("plain", rng), self._add_texture("sky", rng)
        for number, (i, room) in enumerate(walls_of.items()):
            axis, sign = i // 2, 1 if i % 2 else -1
            normal = [0.0, 0.0, 0.0]
            normal[axis] = -float(sign)
            taken: list[tuple[float, float]] = []
            windows = 1 if number == 0 or rng.random() < 0.4 else 0
            for k in range(windows + _pick(rng, (1, 2, 2, 3))):
                is_window = k < windows
                wide = rng.uniform(0.5, 0.9) if is_window else rng.uniform(0.25, 0.6)
                high = rng.uniform(0.4, 0.6) if is_window else rng.uniform(0.25, 0.45)
                places = [rng.uniform(-0.5 * room + wide + 0.2, 0.5 * room - wide - 0.2) for _ in range(8)]
                middle_y = -rng.uniform(high + 0.8, height - high - 0.15)
                free = [p for p in places if all(abs(p - q) > wide + w + 0.2 for q, w in taken)]
                if not free:
                    continue
                taken.append((free[0], wide))
                middle, across = (free[0], middle_y), _axis(2 - axis)
                # The picture's top left corner, from which its texture spreads once.
                corner = [0.0, middle_y - high, 0.0]
                corner[2 - axis] = free[0] - wide
                texture = frame if is_window else self._add_texture("poster", rng)
                face = self._add_face(across, _axis(1), corner, normal, texture, (2 * wide, 2 * high))
                self._decals.append(_Decal(i, middle, (wide, high), face))
                if is_window:
                    view = self._add_face(
                        across, _axis(1), (0.0, -0.98 * _DOME, 0.0), normal, sky, (2 * _DOME, 2 * _DOME), sky=True
                    )
                    self._decals.append(_Decal(i, middle, (wide - 0.06, high - 0.06), view))
        return walls, floor

    def _build_furniture(self, rng: random.Random) -> None:
        """Along the walls, and in some rooms in the middle."""
        x, _, z = self.size
        wanted = _pick(rng, (4, 5, 6, 7))
        middle = rng.random() < 0.4
        for attempt in range(60):
            if len(self.things) == wanted:
                break
            shape = _pick(rng, ("box", "box", "box", "cylinder", "sphere"))
            size = [rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.45), rng.uniform(0.2, 0.5)]
            if shape == "box" and rng.random() < 0.4:
                size[1] = rng.uniform(0.5, 0.95)  # a cupboard
            if shape != "box":
                size = [size[0] * 0.8, size[1], size[0] * 0.8]
            if shape == "sphere":
                size = [size[0]] * 3
            yaw = _pick(rng, (0.0, 0.0, rng.uniform(-45.0, 45.0))) if shape == "box" else 0.0
            reach = math.hypot(size[0], size[2]) if yaw else max(size[0], size[2])
            if attempt == 0 and middle:
                size[1] = min(size[1], 0.45)
                place = [rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3)]
            else:
                place = [rng.uniform(-1.0, 1.0) * (0.5 * side - reach - 0.05) for side in (x, z)]
                axis = _pick(rng, (0, 1))
                place[axis] = _pick(rng, (-1.0, 1.0)) * (0.5 * (x, z)[axis] - reach - rng.uniform(0.05, 0.3))
            others = [(t.centre[0], t.centre[2], math.hypot(t.half[0], t.half[2])) for t in self.things]
            if any(math.hypot(place[0] - a, place[1] - b) < reach + r + 0.1 for a, b, r in others):
                continue
            self._add_thing(Thing(shape, (place[0], -size[1], place[1]), (size[0], size[1], size[2]), yaw), rng)

    def _build_moving(self, rng: random.Random, count: int) -> None:
        """Each swings along a wall, over the furniture or before it."""
        for _ in range(count):
            radius, axis = rng.uniform(0.15, 0.28), _pick(rng, (0, 2))
            shape = _pick(rng, ("sphere", "box"))
            centre = [0.0, -rng.uniform(radius, self.size[1] - radius - 0.1), 0.0]
            centre[2 - axis] = _pick(rng, (-1.0, 1.0)) * (0.5 * self.size[2 - axis] - radius - rng.uniform(0.1, 0.5))
            travel = [0.0, 0.0, 0.0]
            travel[axis] = rng.uniform(0.3, 0.8) * (0.5 * self.size[axis] - radius - 0.1)
            thing = Thing(
                shape,
                (centre[0], centre[1], centre[2]),
                (radius, radius, radius),
                travel=(travel[0], travel[1], travel[2]),
                period=rng.uniform(1.5, 4.0),
                phase=rng.random(),
            )
            self._add_thing(thing, rng)

    def _describe(self, walls: str, floor: str) -> str:
        names = {"box": "box", "cylinder": "column", "sphere": "ball"}
        counts: dict[str, int] = {}
        for thing in self.things:
            name = ("moving " if thing.moves else "") + names[thing.shape]
            counts[name] = counts.get(name, 0) + 1
        plurals = {name: name + ("es" if name.endswith("x") else "s") for name in counts}
        listed = [f"a {name}" if n == 1 else f"{n} {plurals[name]}" for name, n in counts.items()]
        return f"a room with {walls} walls and a {floor} floor, " + ", ".join(listed)

    def _add_texture(self, kind: str, rng: random.Random) -> int:
        made = _make_texture(kind, rng)
        if kind not in ("plain", "poster", "sky") and self._contrast < 1.0:
            made = torch.lerp(made.mean((0, 1)).expand_as(made), made, self._contrast)
        self._textures.append(made)
        return len(self._textures) - 1

    def _add_face(
        self,
        across: Sequence[float],
        along: Sequence[float],
        corner: Sequence[float],
        normal: Sequence[float],
        texture: int,
        size: tuple[float, float],
        thing: int = -1,
        is_round: bool = False,
        sky: bool = False,
    ) -> int:
        """A face whose texture spreads from `corner` along unit vectors, `size` metres a tile."""
        row: list[float] = []
        for axis, extent in ((across, size[0]), (along, size[1])):
            scaled = [a / extent for a in axis]
            row += [*scaled, -sum(a * b for a, b in zip(scaled, corner, strict=True))]
        self._faces.append([*row, *normal, _SIDE / min(size)])
        self._kinds.append((texture, thing, is_round, sky))
        return len(self._faces) - 1

    def _add_thing(self, thing: Thing, rng: random.Random) -> None:
        """Its faces, in the order in which :func:`_cast_thing` counts them."""
        number, texture = len(self.things), self._add_texture(_pick(rng, _FURNITURE), rng)
        self.things.append(thing)
        (x, y, _), sides = thing.half, rng.uniform(0.5, 1.0)
        corner = (thing.centre[0], thing.centre[1] - y, thing.centre[2])
        if thing.shape == "box":
            sine, cosine = _sine_cosine(thing.yaw)
            right, down, ahead = (cosine, 0.0, -sine), (0.0, 1.0, 0.0), (sine, 0.0, cosine)
            axes = ((right, ahead, down), (down, right, ahead), (ahead, right, down))
            for normal, across, along in axes:
                for sign in (-1.0, 1.0):
                    outward = [sign * a for a in normal]
                    self._add_face(across, along, corner, outward, texture, (sides, sides), number)
            return
        # Around, a whole number of tiles; down the side in metres.
        tiles = max(1, round(2.0 * math.pi * x / sides))
        around = 2.0 * math.pi * x / tiles
        flat = (0.0, 0.0, 0.0)
        self._add_face(flat, _axis(1), corner, flat, texture, (around, around), number, is_round=True)
        self._faces[-1][3] = float(tiles)
        if thing.shape == "cylinder":
            for sign in (-1.0, 1.0):
                self._add_face(_axis(0), _axis(2), corner, (0.0, sign, 0.0), texture, (sides, sides), number)

    # What it looks like.

    @torch.no_grad()
    def render(self, cameras: Cameras, times: Sequence[float] | Tensor | None = None) -> SyntheticFrames:
        """Pictures, depth and masks.

        Args:
            cameras: N >= 1 views from inside the room, outside of things. On the CPU.
            times: N times in seconds, of what moves; default 0, 1/24, 2/24, ..

        Returns:
            :class:`SyntheticFrames`.

        Raises:
            ValueError: no cameras, another number of times, or a camera outside the room.
        """
        views = len(cameras)
        if not views:
            raise ValueError("cameras must be one view or more, got none")
        moments = [i / FPS for i in range(views)] if times is None else [float(time) for time in times]
        if len(moments) != views:
            raise ValueError(f"times must be {views} like cameras, got {len(moments)}")
        outside = self._wall_distance(cameras.centers) <= 0
        if outside.any():
            i = int(outside.nonzero()[0])
            raise ValueError(f"cameras[{i}] must be inside the room, {self.size} metres, got {cameras.centers[i]}")
        height, width = cameras.image_size
        with one_thread():  # a picture's operations are too short to share
            made = [_View(self, camera, moment).render() for camera, moment in zip(cameras, moments, strict=True)]
        images, depth, static, sky = map(torch.stack, zip(*made, strict=True))
        return SyntheticFrames(
            images=images.view(views, height, width, 3).permute(0, 3, 1, 2).contiguous(),
            depth=depth.view(views, height, width),
            static=static.view(views, height, width),
            sky=sky.view(views, height, width),
            cameras=cameras,
        )

    # Where a camera can be.

    def _wall_distance(self, points: Tensor) -> Tensor:
        x, y, z = points.unbind(1)
        return torch.stack([0.5 * self.size[0] - x.abs(), -y, y + self.size[1], 0.5 * self.size[2] - z.abs()]).amin(0)

    def clearance(self, points: Tensor) -> Tensor:
        """(N,) float64 metres from `points` (N, 3) to the nearest wall or thing, negative inside one.

        Of things that move, the box of all places they come to counts.
        """
        points = points.double()
        return torch.stack([self._wall_distance(points), *(thing.distance(points) for thing in self.things)]).amin(0)

    def start(self, image_size: Sequence[int], fov: float = 70.0, seed: int = 0) -> Cameras:
        """A camera (one view) that stands free and looks level into the room.

        Args:
            image_size: (height, width) in pixels.
            fov: horizontal field of view in degrees.
            seed: which of many.
        """
        return self._start(image_size, fov, random.Random(f"{self.seed} start {seed}"), 2 * CLEARANCE)

    def _start(self, image_size: Sequence[int], fov: float, rng: random.Random, margin: float) -> Cameras:
        if not 0.0 < fov < 180.0:
            raise ValueError(f"fov must be in (0, 180) degrees, got {fov}")
        x, y, z = self.size
        spots = torch.tensor(
            [[rng.uniform(-0.5, 0.5) * x, -rng.uniform(1.1, 1.7), rng.uniform(-0.5, 0.5) * z] for _ in range(256)],
            dtype=torch.float64,
        )
        spots[:, 1].clamp_(min=0.3 - y)
        room = self.clearance(spots)
        free = (room >= margin).nonzero()[:, 0].tolist()
        spot = spots[free[0] if free else int(room.argmax())]
        # Of some directions, the one with the freest view.
        headings = [rng.uniform(-180.0, 180.0) for _ in range(6)]
        ahead = [self.clearance(spot + k * torch.tensor([_forward(h)])) for h in headings for k in (1.0, 2.5)]
        views = torch.stack(ahead).view(6, 2).clamp(max=_SIGHT).sum(1)
        heading = headings[int(views.argmax())]
        focal = 0.5 * image_size[1] / math.tan(math.radians(0.5 * fov))
        matrix = [[focal, 0.0, image_size[1] / 2], [0.0, focal, image_size[0] / 2], [0.0, 0.0, 1.0]]
        return Cameras(matrix, _poses(spot[None], [heading], [0.0]), image_size)

    def path(
        self,
        kind: str,
        num_frames: int,
        image_size: Sequence[int],
        *,
        fov: float = 70.0,
        seed: int = 0,
        pace: float = 1.0,
    ) -> Cameras:
        """A camera path that keeps :data:`CLEARANCE` from everything.

        Args:
            kind: one of :data:`PATHS`. "walk" strolls and looks around, at most 4 cm and 2 degrees a frame; "around"
                goes around the room once and ends where it began; "laps" rides a small circle twice, the second lap the
                first's views bit for bit, and looks left and right; "orbit", "dolly" and "pan" are those of
                :mod:`mirage.scenes.trajectories`, as large as there is room. "-and-back" ones return: their second
                half is their first reversed, bit for bit.
            num_frames: >= 1.
            image_size: (height, width) in pixels.
            fov: horizontal field of view in degrees.
            seed: which of many.
            pace: scales the speed of a walk, how far a dolly goes and how wide a circle is, and the angles of all three
                turns; "around" is as long as ever.

        Raises:
            ValueError: naming the argument.
        """
        if kind not in PATHS:
            raise ValueError(f"kind must be one of {', '.join(PATHS)}, got {kind!r}")
        if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
            raise ValueError(f"num_frames must be an int >= 1, got {num_frames!r}")
        if not (math.isfinite(pace) and pace > 0):
            raise ValueError(f"pace must be positive and finite, got {pace}")
        rng = random.Random(f"{self.seed} {kind} {seed}")
        start = self._start(image_size, fov, rng, 2 * CLEARANCE)
        name = kind.removesuffix("-and-back")
        degrees, distance = _pick(rng, (-1.0, 1.0)) * rng.uniform(30.0, 80.0), rng.uniform(1.0, 2.0)

        def make(frames: int) -> Cameras:
            if name == "walk":
                return self._walk(start, frames, rng, pace)
            if name == "around":
                return self._around(start, frames, rng)
            if name == "pan":
                return pan(start, frames, degrees=1.5 * degrees * pace)
            # As far as there is room: the full size, or a fraction of it. (The start itself is free.)
            for part in (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05):
                if name == "orbit":
                    made = orbit(start, frames, distance=distance, degrees=part * degrees * pace)
                elif name == "laps":
                    made = _laps(start, frames, radius=0.3 * part * distance * pace, degrees=0.3 * degrees * pace)
                else:
                    made = dolly(start, frames, offset=(0.0, 0.0, part * distance * pace))
                if (self.clearance(made.centers) >= CLEARANCE).all():
                    return made
            return pan(start, frames, degrees=degrees * pace)

        return out_and_back(make, num_frames) if kind.endswith("-and-back") else make(num_frames)

    def _walk(self, start: Cameras, frames: int, rng: random.Random, pace: float) -> Cameras:
        """Small steps in a direction that drifts, and turns away from what is near; the view follows it slowly."""
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
            free = (self.clearance(spot + steps) >= margin) & (self.clearance(spot + (8 / pace) * steps) >= margin)
            choices = (free if free.any() else self.clearance(spot + steps) >= margin).nonzero()[:, 0]
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
        return Cameras(start.intrinsics[0], _poses(smooth, yaws, pitches), start.image_size)

    def _around(self, start: Cameras, frames: int, rng: random.Random) -> Cameras:
        """The largest ellipse of some that is free, looking outward, inward or ahead; a turn in place if none is."""
        x, _, z = self.size
        height, begin, look = rng.uniform(-1.7, -1.1), rng.uniform(0.0, 360.0), _pick(rng, (0.0, 90.0, 180.0))
        sense = _pick(rng, (-1.0, 1.0))
        angles = [begin + sense * (360.0 * i / max(frames - 1, 1) % 360.0) for i in range(frames)]
        for up in (0.0, -0.2, -0.4, -0.6):
            for part in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
                dense = torch.linspace(0.0, 360.0, 181, dtype=torch.float64).tolist()
                level = max(height + up, 0.4 - self.size[1])
                places = [
                    [[0.5 * part * x * _sine_cosine(a)[0], level, 0.5 * part * z * _sine_cosine(a)[1]] for a in where]
                    for where in (dense, angles)
                ]
                on_ellipse, track = (torch.tensor(p, dtype=torch.float64) for p in places)
                # 181 places: what lies between two is at most a few centimetres nearer.
                if (self.clearance(on_ellipse) >= CLEARANCE + 0.05).all():
                    poses = _poses(track, [a + sense * look for a in angles], [0.0] * frames)
                    return Cameras(start.intrinsics[0], poses, start.image_size)
        return pan(start, frames, degrees=360.0)

    def __repr__(self) -> str:
        return f"SyntheticRoom(seed={self.seed}: {self.prompt})"


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
"""The kinds of :meth:`SyntheticRoom.path`."""


class _View:
    """One picture in the making. Rays are (3, R): with directions whose component along the optical axis is 1, the
    distance along a ray is z depth."""

    def __init__(self, room: SyntheticRoom, camera: Cameras, time: float) -> None:
        self.room = room
        self.height, self.width = camera.image_size
        self.matrix, self.pose = camera.intrinsics[0], camera.cam2world[0]
        self.origin = self.pose[:3, 3].tolist()
        self.pixel = 1.0 / float(self.matrix[0, 0])
        self.things = [thing.at(time) for thing in room.things]
        table = room._table.clone()
        for i, thing in enumerate(self.things):
            if thing.moves:  # its texture moves along
                moved = torch.tensor(thing.centre, dtype=torch.float64) - torch.tensor(room.things[i].centre).double()
                of_thing = room._thing == i
                table[3, of_thing & ~room._round] -= moved @ table[0:3, of_thing & ~room._round]
                table[7, of_thing] -= moved @ table[4:7, of_thing]
        self.table = table.float()
        self.centres = torch.tensor([thing.centre for thing in self.things]).view(-1, 3).T
        self.upright = torch.tensor([thing.shape == "cylinder" for thing in self.things])
        self.seen = [i for i, thing in enumerate(self.things) if self._may_see(thing)]

    def render(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Colours (H W, 3), depth, static and sky (H W,)."""
        room, width = self.room, self.width
        rows, columns = torch.meshgrid(
            torch.arange(self.height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
        )
        rays = self._rays(columns.flatten() + 0.5, rows.flatten() + 0.5)
        z, face = self._cast(rays)
        colours = self._shade(rays, z, face)
        static = ~room._moving[face]

        grid, edge = face.view(self.height, width), torch.zeros(self.height, width, dtype=torch.bool)
        across, along = grid[:, 1:] != grid[:, :-1], grid[1:] != grid[:-1]
        edge[:, 1:] |= across
        edge[:, :-1] |= across
        edge[1:] |= along
        edge[:-1] |= along
        pixels = edge.flatten().nonzero()[:, 0]
        if len(pixels):
            steps = (torch.arange(_AROUND, dtype=torch.float64) + 0.5) / _AROUND
            u = (pixels % width)[:, None, None] + steps
            v = (pixels // width)[:, None, None] + steps[:, None]
            u, v = torch.broadcast_tensors(u, v)
            rays = self._rays(u.flatten(), v.flatten())
            z_around, around = self._cast(rays)
            around = around.view(len(pixels), -1)
            static[pixels] &= ~room._moving[around].any(1)
            mixed = (around != around[:, :1]).any(1)
            pixels, count = pixels[mixed], around.shape[1]
            keep = mixed.repeat_interleave(count)
            shaded = self._shade(rays[:, keep], z_around[keep], around[mixed].flatten())
            colours[pixels] = shaded.view(-1, count, 3).mean(1)
        sky = room._sky[face]
        return colours, torch.where(sky, 0.0, z), static, sky

    def _rays(self, u: Tensor, v: Tensor) -> Tensor:
        """(3, R) float32 directions through pixel coordinates (R,)."""
        x = (u - self.matrix[0, 2]) / self.matrix[0, 0]
        y = (v - self.matrix[1, 2]) / self.matrix[1, 1]
        rotation = self.pose[:3, :3]
        rays = rotation[:, 0, None] * x + rotation[:, 1, None] * y + rotation[:, 2, None]
        tiny = 1e-9  # a ray along a wall meets it nowhere, rather than at NaN
        return torch.where(rays.abs() < tiny, tiny, rays).float()

    def _cast(self, rays: Tensor) -> tuple[Tensor, Tensor]:
        """z (R,) float32 and face (R,) int64 of what each ray meets first."""
        room, (x, y, z) = self.room, rays
        sizes = (
            (-0.5 * room.size[0], 0.5 * room.size[0]),
            (-room.size[1], 0.0),
            (-0.5 * room.size[2], 0.5 * room.size[2]),
        )
        exits = [
            torch.where(d > 0, high - o, low - o) / d
            for d, o, (low, high) in zip((x, y, z), self.origin, sizes, strict=True)
        ]
        nearest = torch.minimum(torch.minimum(exits[0], exits[1]), exits[2])
        face = torch.where(exits[1] <= nearest, (y > 0) + 2, (z > 0) + 4)
        face = torch.where(exits[0] <= nearest, (x > 0).long(), face)
        wall = face
        down = self.origin[1] + nearest * y
        sideways = {axis: self.origin[2 - axis] + nearest * rays[2 - axis] for axis in (0, 2)}
        seen = wall.bincount(minlength=6).tolist()
        for decal in room._decals:
            if not seen[decal.wall]:
                continue
            (a, b), (wide, high) = decal.middle, decal.half
            inside = (wall == decal.wall) & ((sideways[decal.wall // 2] - a).abs() < wide) & ((down - b).abs() < high)
            face = torch.where(inside, decal.face, face)
        for i in self.seen:
            hit, part = _cast_thing(self.things[i], self.origin, rays)
            nearer = hit < nearest
            nearest = torch.where(nearer, hit, nearest)
            face = torch.where(nearer, part + room._first_face[i], face)
        return nearest, face

    def _may_see(self, thing: Thing) -> bool:
        """False where its bounding ball is outside the picture."""
        reach = math.sqrt(sum(h * h for h in thing.half))
        offset = torch.tensor(thing.centre, dtype=torch.float64) - self.pose[:3, 3]
        x, y, z = (self.pose[:3, :3].T @ offset).tolist()
        (fx, _, cx), (_, fy, cy), _ = self.matrix.tolist()
        for low, high, at in ((-cx / fx, (self.width - cx) / fx, x), (-cy / fy, (self.height - cy) / fy, y)):
            if at - high * z > reach * math.hypot(1.0, high) or low * z - at > reach * math.hypot(1.0, low):
                return False
        return z > -reach

    def _shade(self, rays: Tensor, z: Tensor, face: Tensor) -> Tensor:
        """(R, 3) colours."""
        room = self.room
        table = self.table.index_select(1, face)
        points = torch.tensor(self.origin)[:, None] + z * rays
        length = (rays * rays).sum(0).sqrt()
        sky = room._sky[face]
        on_sky = sky.nonzero()[:, 0]
        points[:, on_sky] = rays[:, on_sky] * (_DOME / length[on_sky])
        size = z.clone()
        size[on_sky] = _DOME / length[on_sky]
        u, v = ((table[i : i + 3] * points).sum(0) + table[i + 3] for i in (0, 4))
        normal = table[8:11]
        on_round = room._round[face].nonzero()[:, 0]
        if len(on_round):
            thing = room._thing[face[on_round]]
            out = points[:, on_round] - self.centres[:, thing]
            u[on_round] = torch.atan2(out[0], out[2]) * (table[3, on_round] / (2.0 * math.pi))
            out[1] = torch.where(self.upright[thing], 0.0, out[1])
            normal[:, on_round] = out / (out * out).sum(0).sqrt()
        facing = ((normal * rays).sum(0) / length).abs().clamp(min=0.1)
        facing[on_sky] = 1.0
        texels = size * self.pixel * table[11] / facing
        to_lamp = torch.tensor(room._lamp)[:, None] - points
        squared = (to_lamp * to_lamp).sum(0)
        lit = (normal * to_lamp).sum(0).clamp(min=0) / squared.sqrt() / (1.0 + squared / _FALLOFF)
        light = _AMBIENT + (1.2 - _AMBIENT) * lit
        light[on_sky] = 1.0
        colours = _sample(room._atlas, room._level_starts, room._texture[face], u, v, texels)
        return (colours * light[:, None]).clamp(0.0, 1.0)


def _cast_thing(thing: Thing, origin: Sequence[float], rays: Tensor) -> tuple[Tensor, Tensor]:
    """Distance along each ray, infinite where it misses, and which of the thing's faces it meets."""
    x, y, z = rays
    a, b, c = (o - p for o, p in zip(origin, thing.centre, strict=True))
    if thing.shape == "box":
        sine, cosine = _sine_cosine(thing.yaw)
        local = (cosine * x - sine * z, y, sine * x + cosine * z) if thing.yaw else (x, y, z)
        enter: Tensor | None = None
        for k, (d, o, half) in enumerate(
            zip(local, (cosine * a - sine * c, b, sine * a + cosine * c), thing.half, strict=True)
        ):
            inverse = d.reciprocal()
            middle, reach = inverse * -o, inverse.abs() * half
            if enter is None:
                enter, leave, face = middle - reach, middle + reach, (d < 0).long()
            else:
                later = middle - reach
                face = torch.where(later > enter, (d < 0) + 2 * k, face)
                enter, leave = torch.maximum(enter, later), torch.minimum(leave, middle + reach)
        assert enter is not None
        return torch.where((enter < leave) & (enter > 0), enter, math.inf), face
    radius = thing.half[0]
    tall = 0.0 if thing.shape == "cylinder" else 1.0
    square = x * x + z * z + tall * y * y
    along = x * a + z * c + tall * b * y
    rest = a * a + c * c + tall * b * b - radius * radius
    root = along * along - square * rest
    hit = torch.where(root > 0, (-along - root.clamp(min=0).sqrt()) / square, math.inf)
    hit = torch.where(hit > 0, hit, math.inf)
    if thing.shape == "sphere":
        return hit, torch.zeros((), dtype=torch.int64)
    hit = torch.where((b + hit * y).abs() < thing.half[1], hit, math.inf)
    cap = torch.where(y > 0, -thing.half[1] - b, thing.half[1] - b) / y
    at_x, at_z = a + cap * x, c + cap * z
    capped = (cap > 0) & (at_x * at_x + at_z * at_z < radius * radius) & (cap < hit)
    return torch.where(capped, cap, hit), torch.where(capped, (y < 0) + 1, 0)


# Textures: 128 x 128 texels that repeat, with all their mip levels, in one list of texels.


def _pack(textures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All levels of all textures (texels, 3), and where each level starts."""
    levels = [torch.stack(list(textures))]
    for _ in range(_LEVELS - 1):
        fine = levels[-1]
        levels.append((fine[:, ::2, ::2] + fine[:, 1::2, ::2] + fine[:, ::2, 1::2] + fine[:, 1::2, 1::2]) / 4)
    counts = [0, *(level.shape[0] * level.shape[1] ** 2 for level in levels)]
    starts = torch.tensor(counts[:-1]).cumsum(0).int()
    return torch.cat([level.reshape(-1, 3) for level in levels]), starts


def _sample(atlas: Tensor, starts: Tensor, texture: Tensor, u: Tensor, v: Tensor, texels: Tensor) -> Tensor:
    """(R, 3) colours at texture coordinates in tiles, of areas `texels` wide: trilinear."""
    level = texels.clamp(min=1.0).log2().clamp(max=_LEVELS - 1.001)
    finer = level.int()
    share = level - finer
    levels = torch.stack([finer, finer + 1])
    side = _SIDE >> levels
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


def _make_texture(kind: str, rng: random.Random) -> Tensor:
    """(128, 128, 3) float32 in [0, 1]."""
    steps = (torch.arange(_SIDE, dtype=torch.float32) + 0.5) / _SIDE
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    first, second = _colour(rng), _colour(rng)

    def mix(share: Tensor) -> Tensor:
        return torch.lerp(first.expand(_SIDE, _SIDE, 3), second, share[..., None])

    if kind == "plain":
        return torch.full((_SIDE, _SIDE, 3), 0.9) * (0.95 + 0.05 * _noise(rng, 8))[..., None]
    if kind == "plaster":
        return (first * (0.7 + 0.45 * (0.6 * _noise(rng, 4) + 0.4 * _noise(rng, 32)))[..., None]).clamp(0, 1)
    if kind == "stripes":
        count = _pick(rng, (2, 3, 4, 6))
        return mix((((u * count) % 1.0) < rng.uniform(0.3, 0.7)).float()) * (0.9 + 0.1 * _noise(rng, 16))[..., None]
    if kind == "checker":
        count = _pick(rng, (2, 4, 6))
        odd = ((u * count).floor() + (v * count).floor()) % 2
        return mix(odd) * (0.8 + 0.2 * _noise(rng, 16))[..., None]
    if kind == "dots":
        count = _pick(rng, (2, 3, 4))
        x, y = (u * count) % 1.0 - 0.5, (v * count) % 1.0 - 0.5
        return mix((x * x + y * y < rng.uniform(0.05, 0.12)).float()) * (0.85 + 0.15 * _noise(rng, 8))[..., None]
    if kind in ("brick", "tiles"):
        rows, columns = (8, 4) if kind == "brick" else _pick(rng, ((3, 3), (4, 4), (6, 6)))
        row = (v * rows).floor()
        x = u * columns + (0.5 * (row % 2) if kind == "brick" else 0.0)
        one = _table(rng, rows, columns)[row.long(), x.floor().long() % columns]
        joint = (((x % 1.0) < 0.06) | (((v * rows) % 1.0) < 0.1)).float()
        body = mix(one * 0.5) * (0.75 + 0.25 * one * _noise(rng, 32) + 0.1 * _noise(rng, 4))[..., None]
        return torch.lerp(body, torch.full((3,), rng.uniform(0.6, 0.9)).expand_as(body), joint[..., None]).clamp(0, 1)
    if kind == "wood":
        planks = _pick(rng, (4, 6, 8))
        plank = (u * planks).floor()
        shift = _table(rng, 1, planks)[0][plank.long()]
        grain = torch.sin(2 * math.pi * (u * planks * 2 + shift * 7 + 1.5 * _noise(rng, 4, (2, 1)) + shift * v.sin()))
        warm = torch.tensor([rng.uniform(0.5, 0.85), rng.uniform(0.35, 0.55), rng.uniform(0.15, 0.35)])
        gap = ((u * planks) % 1.0 < 0.04).float()
        return (warm * (0.65 + 0.25 * shift + 0.12 * grain - 0.4 * gap)[..., None]).clamp(0, 1)
    if kind == "poster":
        picture = first.expand(_SIDE, _SIDE, 3)
        for _ in range(5 + _pick(rng, (0, 2, 4))):
            left, top, r = rng.random(), rng.random(), rng.uniform(0.08, 0.3)
            shape, angle = _pick(rng, ("disc", "bar", "square")), rng.uniform(0.0, 360.0)
            sine, cosine = _sine_cosine(angle)
            a, b = cosine * (u - left) + sine * (v - top), cosine * (v - top) - sine * (u - left)
            if shape == "disc":
                inside = a * a + b * b < r * r
            else:
                inside = (a.abs() < r) & (b.abs() < (0.25 * r if shape == "bar" else r))
            picture = torch.where(inside[..., None], _colour(rng), picture)
        border = ((u - 0.5).abs() > 0.47) | ((v - 0.5).abs() > 0.47)
        return torch.where(border[..., None], torch.full((3,), rng.uniform(0.05, 0.95)), picture)
    assert kind == "sky"
    blue = torch.lerp(torch.tensor([0.35, 0.6, 0.95]), torch.tensor([0.85, 0.92, 1.0]), v[..., None])
    clouds = (2.5 * (0.6 * _noise(rng, 8) + 0.4 * _noise(rng, 16)) - rng.uniform(0.9, 1.4)).clamp(0, 1)
    return torch.lerp(blue, torch.ones(3).expand_as(blue), clouds[..., None])


def _noise(rng: random.Random, cells: int, stretch: tuple[int, int] = (1, 1)) -> Tensor:
    """(128, 128) in [0, 1]: random values at `cells` x `cells` knots, smooth between them, repeating; fewer of them
    along v and u by `stretch`."""
    values = _table(rng, cells // stretch[0], cells // stretch[1])
    parts = []
    for count in values.shape:
        at = (torch.arange(_SIDE, dtype=torch.float32) + 0.5) * count / _SIDE
        knot = at.floor()
        share = at - knot
        parts.append((knot.long(), (knot.long() + 1) % count, share * share * (3.0 - 2.0 * share)))
    (top, low, down), (left, right, across) = parts
    upper, lower = (
        torch.lerp(values[r][:, left], values[r][:, right], across.expand(_SIDE, _SIDE)) for r in (top, low)
    )
    return torch.lerp(upper, lower, down[:, None].expand(_SIDE, _SIDE))


def _table(rng: random.Random, rows: int, columns: int) -> Tensor:
    return torch.tensor([[rng.random() for _ in range(columns)] for _ in range(rows)])


def _colour(rng: random.Random) -> Tensor:
    """A random colour (3,), neither dark nor grey."""
    hue, saturation, value = 6.0 * rng.random(), rng.uniform(0.3, 0.8), rng.uniform(0.55, 0.95)
    wheel = [value * (1.0 - saturation * max(0.0, min(1.0, abs((hue + k) % 6.0 - 3.0) - 1.0))) for k in (3, 1, 5)]
    return torch.tensor(wheel)


def _pick(rng: random.Random, choices: Sequence[_T]) -> _T:
    return choices[int(rng.random() * len(choices))]


def _axis(k: int) -> Vector:
    return (float(k == 0), float(k == 1), float(k == 2))


def _sine_cosine(degrees: float) -> tuple[float, float]:
    angle = math.radians(math.remainder(degrees, 360.0))
    return math.sin(angle), math.cos(angle)


def _forward(yaw: float) -> Vector:
    sine, cosine = _sine_cosine(yaw)
    return (sine, 0.0, cosine)


def _laps(start: Cameras, frames: int, radius: float, degrees: float) -> Cameras:
    """Twice around the circle that touches the start camera's image plane from the front, looking left and right."""
    once = max(frames // 2, 1)
    locals_ = torch.eye(4, dtype=torch.float64).repeat(once, 1, 1)
    for i in range(once):
        sine, cosine = _sine_cosine(360.0 * i / once)
        locals_[i, :3, 3] = torch.tensor([radius * sine, 0.0, radius * (1.0 - cosine)], dtype=torch.float64)
        sway, straight = _sine_cosine(degrees * sine)
        locals_[i, 0, 0] = locals_[i, 2, 2] = straight
        locals_[i, 0, 2], locals_[i, 2, 0] = sway, -sway
    lap = start.cam2world[0] @ locals_
    lap[0] = start.cam2world[0]
    return Cameras(start.intrinsics[0], lap[torch.arange(frames) % once], start.image_size)


def _poses(centres: Tensor, yaws: Sequence[float], pitches: Sequence[float]) -> Tensor:
    """(N, 4, 4) float64: turned right by yaw, then up by pitch, in degrees."""
    poses = torch.eye(4, dtype=torch.float64).repeat(len(centres), 1, 1)
    poses[:, :3, 3] = centres
    for pose, yaw, pitch in zip(poses, yaws, pitches, strict=True):
        (sy, cy), (sp, cp) = _sine_cosine(yaw), _sine_cosine(pitch)
        rows = [[cy, sy * sp, sy * cp], [0.0, cp, -sp], [-sy, cy * sp, cy * cp]]
        pose[:3, :3] = torch.tensor(rows, dtype=torch.float64)
    return poses

"""`SyntheticRoom`: procedural rooms, any number, each from a seed, with exact depth, poses and masks.

A room has textured walls, floor and ceiling, posters, windows that show the sky, furniture, and sometimes objects that
move. It is rendered in plain PyTorch by casting rays at analytic surfaces, and brightness does not depend on where the
camera stands, so that a surface looks the same from everywhere.

World: metres, x right, y down, z forward; the floor is y = 0, its centre the origin. What a room holds comes from
Python's own generator and is the same everywhere; images are the same bits on one machine, at any thread count.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from mirage_kernels import Cameras

from ..rotations import sine_cosine
from .objects import SceneObject, Vector
from .paths import CLEARANCE, find_start, make_path
from .render import SKY_RADIUS, Decal, Surfaces, SyntheticFrames, render_views
from .textures import TEXTURE_SIDE, make_texture, pack_textures, pick

FPS = 24.0
"""Frames per second where no times are given."""

_WALLS = ("plaster", "stripes", "brick", "tiles", "checker", "dots")
_FLOORS = ("wood", "checker", "tiles", "plaster")
_FURNITURE = ("wood", "stripes", "checker", "plaster", "dots", "brick")


class SyntheticRoom:
    """Build the room of a seed.

    Args:
        seed: an int >= 0; every seed is another room.
        moving: how many objects move; None leaves it to the seed (none in half of the rooms, else one or two).
        texture: contrast in [0, 1] of the patterns on walls, floor, ceiling and furniture; 0 leaves each its mean
            colour. Posters and the sky stay as they are.

    Attributes:
        size: (x, y, z) of the room in metres.
        objects: :class:`SceneObject` of the furniture, then of what moves.
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
        self._kinds: list[tuple[int, int, bool, bool]] = []  # texture, object, round, sky
        self._decals: list[Decal] = []
        self.objects: list[SceneObject] = []
        materials = self._build_shell(rng)
        self._build_furniture(rng)
        count = (0 if rng.random() < 0.5 else 1 + pick(rng, (0, 1))) if moving is None else moving
        self._build_moving(rng, count)
        self.prompt = self._describe(*materials)
        self._surfaces = self._make_surfaces()

    def _make_surfaces(self) -> Surfaces:
        atlas, level_starts = pack_textures(self._textures)
        texture, owner, is_round, is_sky = zip(*self._kinds, strict=True)
        return Surfaces(
            size=self.size,
            lamp=self._lamp,
            decals=tuple(self._decals),
            atlas=atlas,
            level_starts=level_starts,
            table=torch.tensor(self._faces, dtype=torch.float64).T.contiguous(),
            texture=torch.tensor(texture, dtype=torch.int32),
            object_index=torch.tensor(owner),
            is_round=torch.tensor(is_round),
            is_sky=torch.tensor(is_sky),
            is_moving=torch.tensor([index >= 0 and self.objects[index].moves for index in owner]),
            first_face=tuple(owner.index(index) for index in range(len(self.objects))),
        )

    # What is in it.

    def _build_shell(self, rng: random.Random) -> tuple[str, str]:
        """Build walls, ceiling, floor, posters and windows; return what walls and floor are made of."""
        walls, floor = pick(rng, _WALLS), pick(rng, _FLOORS)
        wall = self._add_texture(walls, rng)
        other = self._add_texture(pick(rng, _WALLS), rng) if rng.random() < 0.5 else wall
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
            self._add_face(unit_axis(first), unit_axis(second), (0.0, 0.0, 0.0), normal, texture, (tile, tile))
        walls_of = {0: length, 1: length, 4: width, 5: width}
        frame, sky = self._add_texture("plain", rng), self._add_texture("sky", rng)
        for number, (i, room) in enumerate(walls_of.items()):
            axis, sign = i // 2, 1 if i % 2 else -1
            normal = [0.0, 0.0, 0.0]
            normal[axis] = -float(sign)
            taken: list[tuple[float, float]] = []
            windows = 1 if number == 0 or rng.random() < 0.4 else 0
            for k in range(windows + pick(rng, (1, 2, 2, 3))):
                is_window = k < windows
                wide = rng.uniform(0.5, 0.9) if is_window else rng.uniform(0.25, 0.6)
                high = rng.uniform(0.4, 0.6) if is_window else rng.uniform(0.25, 0.45)
                places = [rng.uniform(-0.5 * room + wide + 0.2, 0.5 * room - wide - 0.2) for _ in range(8)]
                middle_y = -rng.uniform(high + 0.8, height - high - 0.15)
                free = [p for p in places if all(abs(p - q) > wide + w + 0.2 for q, w in taken)]
                if not free:
                    continue
                taken.append((free[0], wide))
                middle, across = (free[0], middle_y), unit_axis(2 - axis)
                # The image's top left corner, from which its texture spreads once.
                corner = [0.0, middle_y - high, 0.0]
                corner[2 - axis] = free[0] - wide
                texture = frame if is_window else self._add_texture("poster", rng)
                face = self._add_face(across, unit_axis(1), corner, normal, texture, (2 * wide, 2 * high))
                self._decals.append(Decal(i, middle, (wide, high), face))
                if is_window:
                    view = self._add_face(
                        across,
                        unit_axis(1),
                        (0.0, -0.98 * SKY_RADIUS, 0.0),
                        normal,
                        sky,
                        (2 * SKY_RADIUS, 2 * SKY_RADIUS),
                        sky=True,
                    )
                    self._decals.append(Decal(i, middle, (wide - 0.06, high - 0.06), view))
        return walls, floor

    def _build_furniture(self, rng: random.Random) -> None:
        """Put furniture along the walls, and in some rooms in the middle."""
        x, _, z = self.size
        wanted = pick(rng, (4, 5, 6, 7))
        middle = rng.random() < 0.4
        for attempt in range(60):
            if len(self.objects) == wanted:
                break
            shape = pick(rng, ("box", "box", "box", "cylinder", "sphere"))
            size = [rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.45), rng.uniform(0.2, 0.5)]
            if shape == "box" and rng.random() < 0.4:
                size[1] = rng.uniform(0.5, 0.95)  # a cupboard
            if shape != "box":
                size = [size[0] * 0.8, size[1], size[0] * 0.8]
            if shape == "sphere":
                size = [size[0]] * 3
            yaw = pick(rng, (0.0, 0.0, rng.uniform(-45.0, 45.0))) if shape == "box" else 0.0
            reach = math.hypot(size[0], size[2]) if yaw else max(size[0], size[2])
            if attempt == 0 and middle:
                size[1] = min(size[1], 0.45)
                place = [rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3)]
            else:
                place = [rng.uniform(-1.0, 1.0) * (0.5 * side - reach - 0.05) for side in (x, z)]
                axis = pick(rng, (0, 1))
                place[axis] = pick(rng, (-1.0, 1.0)) * (0.5 * (x, z)[axis] - reach - rng.uniform(0.05, 0.3))
            others = [(t.centre[0], t.centre[2], math.hypot(t.half[0], t.half[2])) for t in self.objects]
            if any(math.hypot(place[0] - a, place[1] - b) < reach + r + 0.1 for a, b, r in others):
                continue
            self._add_object(SceneObject(shape, (place[0], -size[1], place[1]), (size[0], size[1], size[2]), yaw), rng)

    def _build_moving(self, rng: random.Random, count: int) -> None:
        """Add objects that swing along a wall, over the furniture or before it."""
        for _ in range(count):
            radius, axis = rng.uniform(0.15, 0.28), pick(rng, (0, 2))
            shape = pick(rng, ("sphere", "box"))
            centre = [0.0, -rng.uniform(radius, self.size[1] - radius - 0.1), 0.0]
            centre[2 - axis] = pick(rng, (-1.0, 1.0)) * (0.5 * self.size[2 - axis] - radius - rng.uniform(0.1, 0.5))
            travel = [0.0, 0.0, 0.0]
            travel[axis] = rng.uniform(0.3, 0.8) * (0.5 * self.size[axis] - radius - 0.1)
            item = SceneObject(
                shape,
                (centre[0], centre[1], centre[2]),
                (radius, radius, radius),
                travel=(travel[0], travel[1], travel[2]),
                period=rng.uniform(1.5, 4.0),
                phase=rng.random(),
            )
            self._add_object(item, rng)

    def _describe(self, walls: str, floor: str) -> str:
        names = {"box": "box", "cylinder": "column", "sphere": "ball"}
        counts: dict[str, int] = {}
        for item in self.objects:
            name = ("moving " if item.moves else "") + names[item.shape]
            counts[name] = counts.get(name, 0) + 1
        plurals = {name: name + ("es" if name.endswith("x") else "s") for name in counts}
        listed = [f"a {name}" if n == 1 else f"{n} {plurals[name]}" for name, n in counts.items()]
        return f"a room with {walls} walls and a {floor} floor, " + ", ".join(listed)

    def _add_texture(self, kind: str, rng: random.Random) -> int:
        made = make_texture(kind, rng)
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
        item: int = -1,
        is_round: bool = False,
        sky: bool = False,
    ) -> int:
        """Add a face whose texture spreads from `corner` along unit vectors, `size` metres a tile."""
        row: list[float] = []
        for axis, extent in ((across, size[0]), (along, size[1])):
            scaled = [a / extent for a in axis]
            row += [*scaled, -sum(a * b for a, b in zip(scaled, corner, strict=True))]
        self._faces.append([*row, *normal, TEXTURE_SIDE / min(size)])
        self._kinds.append((texture, item, is_round, sky))
        return len(self._faces) - 1

    def _add_object(self, item: SceneObject, rng: random.Random) -> None:
        """Add an object's faces, in the order that :func:`~mirage.scenes.synthetic.render.cast_object` counts."""
        number, texture = len(self.objects), self._add_texture(pick(rng, _FURNITURE), rng)
        self.objects.append(item)
        (x, y, _), sides = item.half, rng.uniform(0.5, 1.0)
        corner = (item.centre[0], item.centre[1] - y, item.centre[2])
        if item.shape == "box":
            sine, cosine = sine_cosine(item.yaw)
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
        self._add_face(flat, unit_axis(1), corner, flat, texture, (around, around), number, is_round=True)
        self._faces[-1][3] = float(tiles)
        if item.shape == "cylinder":
            for sign in (-1.0, 1.0):
                self._add_face(unit_axis(0), unit_axis(2), corner, (0.0, sign, 0.0), texture, (sides, sides), number)

    # What it looks like.

    @torch.no_grad()
    def render(self, cameras: Cameras, times: Sequence[float] | Tensor | None = None) -> SyntheticFrames:
        """Render images, depth and masks.

        Args:
            cameras: N >= 1 views from inside the room, outside of objects. On the CPU.
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
        return render_views(self._surfaces, self.objects, cameras, moments)

    # Where a camera can be.

    def _wall_distance(self, points: Tensor) -> Tensor:
        x, y, z = points.unbind(1)
        return torch.stack([0.5 * self.size[0] - x.abs(), -y, y + self.size[1], 0.5 * self.size[2] - z.abs()]).amin(0)

    def clearance(self, points: Tensor) -> Tensor:
        """Measure the metres (N,) float64 from `points` (N, 3) to the nearest wall or object, negative inside one.

        Of objects that move, the box of all places they come to counts.
        """
        points = points.double()
        return torch.stack([self._wall_distance(points), *(item.distance(points) for item in self.objects)]).amin(0)

    def start(self, image_size: Sequence[int], fov: float = 70.0, seed: int = 0) -> Cameras:
        """Find a camera (one view) that stands free and looks level into the room.

        Args:
            image_size: (height, width) in pixels.
            fov: horizontal field of view in degrees.
            seed: which of many.
        """
        return find_start(self, image_size, fov, random.Random(f"{self.seed} start {seed}"), 2 * CLEARANCE)

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
        """Make a camera path that keeps :data:`CLEARANCE` from everything.

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
        return make_path(self, kind, num_frames, image_size, fov=fov, seed=seed, pace=pace)

    def __repr__(self) -> str:
        return f"SyntheticRoom(seed={self.seed}: {self.prompt})"


def unit_axis(k: int) -> Vector:
    """Give the unit vector of axis `k`."""
    return (float(k == 0), float(k == 1), float(k == 2))

"""Rendering of a room by casting rays at analytic surfaces, in plain PyTorch.

Depth is that of each pixel centre's ray; colours are filtered: textures by their mip levels, edges by 3x3 rays a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirage_kernels import Cameras

from ..patch_pca import one_thread
from ..rotations import sine_cosine
from .objects import SceneObject, Vector
from .textures import sample_textures

SKY_RADIUS = 20.0  # which only says how large clouds look
_AROUND = 3  # rays along a side of a pixel on an edge
_AMBIENT, _FALLOFF = 0.5, 14.0  # of the lamp; square metres


@dataclass(frozen=True)
class SyntheticFrames:
    """N views of a room.

    Attributes:
        images: (N, 3, H, W) float32 in [0, 1].
        depth: (N, H, W) float32, z along the optical axis in metres, of the ray through each pixel's centre; 0 where
            it sees the sky.
        static: (N, H, W) bool, False where any part of the pixel shows a item that moves.
        sky: (N, H, W) bool, True where the pixel's centre shows the sky.
        cameras: N views of image size (H, W).
    """

    images: Tensor
    depth: Tensor
    static: Tensor
    sky: Tensor
    cameras: Cameras


@dataclass(frozen=True)
class Decal:
    """A rectangle on a wall: its middle along the wall and y, half its size, and its face."""

    wall: int
    middle: tuple[float, float]
    half: tuple[float, float]
    face: int


@dataclass(frozen=True)
class Surfaces:
    """What rays can meet in a room, as tables over its faces.

    Attributes:
        size: (x, y, z) of the room in metres.
        lamp: where the light is.
        decals: posters and windows on the walls.
        atlas, level_starts: of :func:`~mirage.scenes.synthetic.textures.pack_textures`.
        table: (12, faces) float64: u axis and offset, v axis and offset, normal, texels per metre.
        texture: (faces,) int32, which texture.
        object_index: (faces,) int64, the object that it belongs to; -1 for the room.
        is_round, is_sky, is_moving: (faces,) bool.
        first_face: of each object.
    """

    size: Vector
    lamp: Vector
    decals: tuple[Decal, ...]
    atlas: Tensor
    level_starts: Tensor
    table: Tensor
    texture: Tensor
    object_index: Tensor
    is_round: Tensor
    is_sky: Tensor
    is_moving: Tensor
    first_face: tuple[int, ...]


def render_views(
    surfaces: Surfaces, objects: Sequence[SceneObject], cameras: Cameras, times: Sequence[float]
) -> SyntheticFrames:
    """Render N views, each at its time in seconds."""
    views, (height, width) = len(cameras), cameras.image_size
    with one_thread():  # an image's operations are too short to share
        made = [
            _ViewRenderer(surfaces, objects, camera, time).render() for camera, time in zip(cameras, times, strict=True)
        ]
    images, depth, static, sky = map(torch.stack, zip(*made, strict=True))
    return SyntheticFrames(
        images=images.view(views, height, width, 3).permute(0, 3, 1, 2).contiguous(),
        depth=depth.view(views, height, width),
        static=static.view(views, height, width),
        sky=sky.view(views, height, width),
        cameras=cameras,
    )


class _ViewRenderer:
    """Render one image. Rays are (3, R): with directions whose component along the optical axis is 1, the
    distance along a ray is z depth."""

    def __init__(self, surfaces: Surfaces, objects: Sequence[SceneObject], camera: Cameras, time: float) -> None:
        self.surfaces = surfaces
        self.height, self.width = camera.image_size
        self.matrix, self.pose = camera.intrinsics[0], camera.cam2world[0]
        self.origin = self.pose[:3, 3].tolist()
        self.pixel = 1.0 / float(self.matrix[0, 0])
        self.objects = [item.at(time) for item in objects]
        table = surfaces.table.clone()
        for i, item in enumerate(self.objects):
            if item.moves:  # its texture moves along
                moved = torch.tensor(item.centre, dtype=torch.float64) - torch.tensor(objects[i].centre).double()
                of_item = surfaces.object_index == i
                table[3, of_item & ~surfaces.is_round] -= moved @ table[0:3, of_item & ~surfaces.is_round]
                table[7, of_item] -= moved @ table[4:7, of_item]
        self.table = table.float()
        self.centres = torch.tensor([item.centre for item in self.objects]).view(-1, 3).T
        self.upright = torch.tensor([item.shape == "cylinder" for item in self.objects])
        self.seen = [i for i, item in enumerate(self.objects) if self._may_see(item)]

    def render(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Render colours (H W, 3), depth, static and sky (H W,)."""
        surfaces, width = self.surfaces, self.width
        rows, columns = torch.meshgrid(
            torch.arange(self.height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
        )
        rays = self._rays(columns.flatten() + 0.5, rows.flatten() + 0.5)
        z, face = self._cast(rays)
        colours = self._shade(rays, z, face)
        static = ~surfaces.is_moving[face]

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
            static[pixels] &= ~surfaces.is_moving[around].any(1)
            mixed = (around != around[:, :1]).any(1)
            pixels, count = pixels[mixed], around.shape[1]
            keep = mixed.repeat_interleave(count)
            shaded = self._shade(rays[:, keep], z_around[keep], around[mixed].flatten())
            colours[pixels] = shaded.view(-1, count, 3).mean(1)
        sky = surfaces.is_sky[face]
        return colours, torch.where(sky, 0.0, z), static, sky

    def _rays(self, u: Tensor, v: Tensor) -> Tensor:
        """Make (3, R) float32 ray directions through pixel coordinates (R,)."""
        x = (u - self.matrix[0, 2]) / self.matrix[0, 0]
        y = (v - self.matrix[1, 2]) / self.matrix[1, 1]
        rotation = self.pose[:3, :3]
        rays = rotation[:, 0, None] * x + rotation[:, 1, None] * y + rotation[:, 2, None]
        tiny = 1e-9  # a ray along a wall meets it nowhere, rather than at NaN
        return torch.where(rays.abs() < tiny, tiny, rays).float()

    def _cast(self, rays: Tensor) -> tuple[Tensor, Tensor]:
        """Find z (R,) float32 and face (R,) int64 of what each ray meets first."""
        surfaces, (x, y, z) = self.surfaces, rays
        sizes = (
            (-0.5 * surfaces.size[0], 0.5 * surfaces.size[0]),
            (-surfaces.size[1], 0.0),
            (-0.5 * surfaces.size[2], 0.5 * surfaces.size[2]),
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
        for decal in surfaces.decals:
            if not seen[decal.wall]:
                continue
            (a, b), (wide, high) = decal.middle, decal.half
            inside = (wall == decal.wall) & ((sideways[decal.wall // 2] - a).abs() < wide) & ((down - b).abs() < high)
            face = torch.where(inside, decal.face, face)
        for i in self.seen:
            hit, part = cast_object(self.objects[i], self.origin, rays)
            nearer = hit < nearest
            nearest = torch.where(nearer, hit, nearest)
            face = torch.where(nearer, part + surfaces.first_face[i], face)
        return nearest, face

    def _may_see(self, item: SceneObject) -> bool:
        """Test whether its bounding ball reaches into the image."""
        reach = math.sqrt(sum(h * h for h in item.half))
        offset = torch.tensor(item.centre, dtype=torch.float64) - self.pose[:3, 3]
        x, y, z = (self.pose[:3, :3].T @ offset).tolist()
        (fx, _, cx), (_, fy, cy), _ = self.matrix.tolist()
        for low, high, at in ((-cx / fx, (self.width - cx) / fx, x), (-cy / fy, (self.height - cy) / fy, y)):
            if at - high * z > reach * math.hypot(1.0, high) or low * z - at > reach * math.hypot(1.0, low):
                return False
        return z > -reach

    def _shade(self, rays: Tensor, z: Tensor, face: Tensor) -> Tensor:
        """Shade hits: (R, 3) colours."""
        surfaces = self.surfaces
        table = self.table.index_select(1, face)
        points = torch.tensor(self.origin)[:, None] + z * rays
        length = (rays * rays).sum(0).sqrt()
        sky = surfaces.is_sky[face]
        on_sky = sky.nonzero()[:, 0]
        points[:, on_sky] = rays[:, on_sky] * (SKY_RADIUS / length[on_sky])
        size = z.clone()
        size[on_sky] = SKY_RADIUS / length[on_sky]
        u, v = ((table[i : i + 3] * points).sum(0) + table[i + 3] for i in (0, 4))
        normal = table[8:11]
        on_round = surfaces.is_round[face].nonzero()[:, 0]
        if len(on_round):
            item = surfaces.object_index[face[on_round]]
            out = points[:, on_round] - self.centres[:, item]
            u[on_round] = torch.atan2(out[0], out[2]) * (table[3, on_round] / (2.0 * math.pi))
            out[1] = torch.where(self.upright[item], 0.0, out[1])
            normal[:, on_round] = out / (out * out).sum(0).sqrt()
        facing = ((normal * rays).sum(0) / length).abs().clamp(min=0.1)
        facing[on_sky] = 1.0
        texels = size * self.pixel * table[11] / facing
        to_lamp = torch.tensor(surfaces.lamp)[:, None] - points
        squared = (to_lamp * to_lamp).sum(0)
        lit = (normal * to_lamp).sum(0).clamp(min=0) / squared.sqrt() / (1.0 + squared / _FALLOFF)
        light = _AMBIENT + (1.2 - _AMBIENT) * lit
        light[on_sky] = 1.0
        colours = sample_textures(surfaces.atlas, surfaces.level_starts, surfaces.texture[face], u, v, texels)
        return (colours * light[:, None]).clamp(0.0, 1.0)


def cast_object(item: SceneObject, origin: Sequence[float], rays: Tensor) -> tuple[Tensor, Tensor]:
    """Intersect rays with an object: distance along each, infinite where it misses, and the index of the face."""
    x, y, z = rays
    a, b, c = (o - p for o, p in zip(origin, item.centre, strict=True))
    if item.shape == "box":
        sine, cosine = sine_cosine(item.yaw)
        local = (cosine * x - sine * z, y, sine * x + cosine * z) if item.yaw else (x, y, z)
        enter: Tensor | None = None
        for k, (d, o, half) in enumerate(
            zip(local, (cosine * a - sine * c, b, sine * a + cosine * c), item.half, strict=True)
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
    radius = item.half[0]
    tall = 0.0 if item.shape == "cylinder" else 1.0
    square = x * x + z * z + tall * y * y
    along = x * a + z * c + tall * b * y
    rest = a * a + c * c + tall * b * b - radius * radius
    root = along * along - square * rest
    hit = torch.where(root > 0, (-along - root.clamp(min=0).sqrt()) / square, math.inf)
    hit = torch.where(hit > 0, hit, math.inf)
    if item.shape == "sphere":
        return hit, torch.zeros((), dtype=torch.int64)
    hit = torch.where((b + hit * y).abs() < item.half[1], hit, math.inf)
    cap = torch.where(y > 0, -item.half[1] - b, item.half[1] - b) / y
    at_x, at_z = a + cap * x, c + cap * z
    capped = (cap > 0) & (at_x * at_x + at_z * at_z < radius * radius) & (cap < hit)
    return torch.where(capped, cap, hit), torch.where(capped, (y < 0) + 1, 0)

"""`Cameras`: intrinsics and poses of T views, validated once when they are made.

Everything here is float64 and stays on the device it was given on. Conventions: OpenCV axes (x right, y down,
z forward), continuous pixel coordinates (column j covers [j, j + 1), its centre is j + 0.5).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ROTATION_TOLERANCE = 1e-2  # real poses deviate by 4e-4
_BOTTOM_ROW_TOLERANCE = 1e-6
_kept_factors: dict[tuple[float, float], Tensor] = {}  # of `_row_factors`


class _Scaled(NamedTuple):
    """Keep the intrinsics of one size, and the versions of both tensors: any change in place makes it worthless."""

    size: tuple[int, int]
    intrinsics: Tensor
    version: int
    source_version: int


class Cameras:
    """Hold T pinhole cameras that share one image size. Immutable; treat the tensors it hands out as read-only.

    Args:
        intrinsics: (T, 3, 3) float, in pixels of `image_size`: fx, fy, cx, cy and nothing else (no skew). One
            (3, 3) matrix is shared by all T views.
        cam2world: (T, 4, 4) float, rigid poses in world units, OpenCV axes.
        image_size: (height, width) in pixels, to which the intrinsics refer.

    Both arrays may be tensors, numpy arrays or nested lists; they are copied, detached from autograd and held
    as contiguous float64 on the device they came on. T = 0 is allowed. Values are validated here and nowhere
    else, which waits for the device; :meth:`trusted` skips that.

    Raises:
        TypeError: not a floating-point array, or `image_size` is not two ints.
        ValueError: wrong shape, different devices, or values that are no camera: not finite, focal length not
            positive, skew, bottom rows other than (0, 0, 1) and (0, 0, 0, 1), a rotation farther than 1e-2
            from orthonormal, a reflection. The message names the first bad view.
    """

    __slots__ = ("_cam2world", "_image_size", "_intrinsics", "_scaled")

    _intrinsics: Tensor
    _cam2world: Tensor
    _image_size: tuple[int, int]
    _scaled: _Scaled | None

    def __init__(self, intrinsics: Any, cam2world: Any, image_size: Sequence[int]) -> None:
        poses = _as_float64("cam2world", cam2world)
        if poses.ndim != 3 or poses.shape[1:] != (4, 4):
            raise ValueError(f"cam2world must be (T, 4, 4), got {tuple(poses.shape)}")
        views = len(poses)
        matrices = _as_float64("intrinsics", intrinsics)
        if matrices.shape not in ((3, 3), (views, 3, 3)):
            expected = f"(T, 3, 3) with T = {views} as in cam2world, or (3, 3) for all views"
            raise ValueError(f"intrinsics must be {expected}, got {tuple(matrices.shape)}")
        if matrices.device != poses.device:
            got = f"{matrices.device} and {poses.device}"
            raise ValueError(f"intrinsics and cam2world must be on the same device, got {got}")
        self._image_size = _as_size("image_size", image_size)
        _check_intrinsics(matrices.cpu())
        _check_cam2world(poses.cpu())
        poses[:, 3, :3] = 0.0
        poses[:, 3, 3] = 1.0
        self._intrinsics = matrices.expand(views, 3, 3).contiguous()
        self._cam2world = poses
        self._scaled = None

    @classmethod
    def trusted(cls, intrinsics: Tensor, cam2world: Tensor, image_size: tuple[int, int]) -> Cameras:
        """Hold tensors that have been validated already, as they are: nothing is checked and nothing is copied.

        For code that rearranges the tensors of other cameras, and on paths that must not wait for the device.

        Args:
            intrinsics: (T, 3, 3) float64, contiguous, in pixels of `image_size`.
            cam2world: (T, 4, 4) float64, contiguous, on the same device.
            image_size: (height, width) in pixels, two positive ints.
        """
        cameras = cls.__new__(cls)
        cameras._intrinsics, cameras._cam2world, cameras._image_size = intrinsics, cam2world, image_size
        cameras._scaled = None
        return cameras

    @property
    def intrinsics(self) -> Tensor:
        """(T, 3, 3) float64, pixels of `image_size`."""
        return self._intrinsics

    @property
    def cam2world(self) -> Tensor:
        """(T, 4, 4) float64, world units."""
        return self._cam2world

    @property
    def world2cam(self) -> Tensor:
        """(T, 4, 4) float64, the general inverse of `cam2world`: real rotations are only nearly orthonormal.

        Computed at each call; on a GPU that waits for the device.
        """
        rotation = torch.linalg.inv(self._cam2world[:, :3, :3])
        world2cam = self._cam2world.clone()
        world2cam[:, :3, :3] = rotation
        world2cam[:, :3, 3:] = rotation @ -self._cam2world[:, :3, 3:]
        return world2cam

    @property
    def centers(self) -> Tensor:
        """(T, 3) float64, camera centres in world units."""
        return self._cam2world[:, :3, 3].contiguous()

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self._image_size

    @property
    def device(self) -> torch.device:
        """Where both tensors are."""
        return self._cam2world.device

    def __len__(self) -> int:
        return self._cam2world.shape[0]

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Cameras:
        """Pick views by an int (the leading axis stays), a slice, or a list or 1-D tensor of ints.

        One view or a slice of step 1 shares memory, anything else copies. A tensor on a GPU is read back, so
        that an index out of range is an IndexError here and not a crash there.
        """
        views = range(len(self))
        if isinstance(index, slice):
            picked = views[index]
            if picked.step == 1:
                return self._map(lambda x: x[picked.start : picked.stop])
            rows = list(picked)
        else:
            # tolist: tensors and arrays of any rank, numpy's integers.
            values = index.tolist() if hasattr(index, "tolist") else index
            rows = [self._row(i, index) for i in (values if isinstance(values, list) else [values])]
        if len(rows) == 1:  # without a copy to the device
            return self._map(lambda x: x[rows[0] : rows[0] + 1])
        wanted = torch.tensor(rows, dtype=torch.int64, device=self.device)
        return self._map(lambda x: x.index_select(0, wanted))

    def __iter__(self) -> Iterator[Cameras]:
        return (self[i] for i in range(len(self)))

    def resized(self, size: Sequence[int]) -> Cameras:
        """Give the same cameras for images of `size` = (height, width); self where that is their size.

        fx and cx are multiplied by the ratio of widths, fy and cy by the ratio of heights, and nothing else
        changes: continuous pixel coordinates need no half-pixel shift. Does not wait for the device and can
        be captured in a CUDA graph.
        """
        size = _as_size("size", size)
        if size == self._image_size:
            return self
        return self.trusted(self.intrinsics_at(size), self._cam2world, size)

    def intrinsics_at(self, size: tuple[int, int]) -> Tensor:
        """Give the intrinsics of :meth:`resized` alone, (T, 3, 3) float64; `size` must have been validated already."""
        if size == self._image_size:
            return self._intrinsics
        source, kept = self._intrinsics, self._scaled
        if (
            kept is not None
            and kept.size == size
            and not torch.compiler.is_compiling()
            and kept.source_version == source._version
            and kept.version == kept.intrinsics._version
        ):
            return kept.intrinsics
        across, down = size[1] / self._image_size[1], size[0] / self._image_size[0]
        if type(source) is not Tensor or not source.is_cpu or torch.compiler.is_compiling():
            # By scalars: a tensor of factors would have to be copied to the device. Nothing is kept there, where a CUDA
            # graph may compute it again at every replay.
            intrinsics = source.clone()
            intrinsics[:, 0].mul_(across)
            intrinsics[:, 1].mul_(down)
            return intrinsics
        intrinsics = source * _row_factors(across, down)  # a third of the time of the above
        # None of a tracing mode, which are of no use outside it; none of inference mode, which have no version.
        if type(intrinsics) is Tensor and not intrinsics.is_inference() and not source.is_inference():
            self._scaled = _Scaled(size, intrinsics, intrinsics._version, source._version)
        return intrinsics

    def to(self, device: torch.device | str) -> Cameras:
        """Give the same cameras on `device`; self when they are there already."""
        if self._cam2world.device == device:
            return self
        moved = self._map(lambda x: x.to(device))
        return self if moved._cam2world is self._cam2world else moved

    @classmethod
    def cat(cls, cameras: Sequence[Cameras]) -> Cameras:
        """Join the views of `cameras`, one after the other. They must share `image_size` and device."""
        parts = list(cameras)
        if not parts:
            raise ValueError("cameras must hold at least one Cameras, got none")
        for i, part in enumerate(parts):
            if not isinstance(part, Cameras):
                raise TypeError(f"cameras[{i}] must be Cameras, got {type(part).__name__}")
            for name in ("image_size", "device"):
                expected, got = getattr(parts[0], name), getattr(part, name)
                if expected != got:
                    raise ValueError(f"cameras[{i}] must have {name} {expected} as cameras[0], got {got}")
        intrinsics = torch.cat([part._intrinsics for part in parts])
        return cls.trusted(intrinsics, torch.cat([part._cam2world for part in parts]), parts[0]._image_size)

    def __repr__(self) -> str:
        return f"Cameras({len(self)} views, image_size={self._image_size}, device={str(self.device)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Clones: a slice would otherwise drag the storage of all its views along.
        return self.trusted, (self._intrinsics.clone(), self._cam2world.clone(), self._image_size)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Cameras:
        return self.trusted(function(self._intrinsics), function(self._cam2world), self._image_size)

    def _row(self, i: Any, index: Any) -> int:
        """Find the view that the int `i` of `index` names, counted from 0."""
        if isinstance(i, bool) or not hasattr(i, "__index__"):
            got = f"{type(index).__name__} {index!r}"
            raise TypeError(f"index must be an int, a slice, or a list or 1-D tensor of ints, got {got}")
        i, views = operator.index(i), len(self)
        if not -views <= i < views:
            raise IndexError(f"index must be in [{-views}, {views}), got {i}")
        return i % views


def _row_factors(across: float, down: float) -> Tensor:
    """Give the (3, 1) float64 factors of the rows of intrinsics, on the host, kept from one call to the next."""
    factors = _kept_factors.get((across, down))
    if factors is None:
        factors = torch.tensor([[across], [down], [1.0]], dtype=torch.float64, device="cpu")
        if type(factors) is Tensor:  # one that a tracing mode made is of no use outside it
            if len(_kept_factors) >= 64:
                _kept_factors.clear()
            _kept_factors[across, down] = factors
    return factors


def _as_float64(name: str, value: Any) -> Tensor:
    """Make a contiguous float64 copy of `value`, on its device."""
    if isinstance(value, (list, tuple)):
        if any(hasattr(item, "shape") for item in value):  # one array per view
            views = [_as_float64(f"{name}[{i}]", item) for i, item in enumerate(value)]
            for i, view in enumerate(views):
                if view.shape != views[0].shape or view.device != views[0].device:
                    like = f"{tuple(views[0].shape)} on {views[0].device} as {name}[0]"
                    raise ValueError(f"{name}[{i}] must be {like}, got {tuple(view.shape)} on {view.device}")
            return torch.stack(views)
        try:
            return torch.tensor(value, dtype=torch.float64)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{name} must be a float tensor, array or nested lists, got: {error}") from None
    if not isinstance(value, Tensor):
        dtype = getattr(value, "dtype", None)
        if getattr(dtype, "kind", None) != "f":
            got = type(value).__name__ if dtype is None else str(dtype)
            raise TypeError(f"{name} must be a float tensor, array or nested lists, got {got}")
        # By numpy's own cast: torch takes no negative strides, foreign byte orders or long doubles.
        return torch.from_numpy(value.astype("float64", order="C"))
    if not value.is_floating_point():
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be a float tensor, array or nested lists, got {got}")
    return torch.empty(value.shape, dtype=torch.float64, device=value.device).copy_(value.detach())


def _as_size(name: str, size: Any) -> tuple[int, int]:
    """Validate a (height, width) of two positive ints."""
    try:
        height, width = size
        if isinstance(height, bool) or isinstance(width, bool):
            raise TypeError
        height, width = operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be two ints (height, width), got {size!r}") from None
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be a positive (height, width), got {(height, width)}")
    return height, width


def _refuse(bad: Tensor, name: str, expected: str, got: Callable[[int], str]) -> None:
    """Raise a ValueError for the first view that `bad` (T,) marks."""
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(f"{name}[{i}] must {expected}, got {got(i)}")


def _check_intrinsics(intrinsics: Tensor) -> None:
    """Refuse values that are no intrinsics: (T, 3, 3) or (3, 3) float64 on the host."""
    if intrinsics.ndim == 2:  # shared: the message should not speak of an intrinsics[0]
        try:
            return _check_intrinsics(intrinsics[None])
        except ValueError as error:
            raise ValueError(str(error).replace("intrinsics[0]", "intrinsics", 1)) from None
    name, row = "intrinsics", torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    bottom = intrinsics[:, 2]
    skew = torch.stack([intrinsics[:, 0, 1], intrinsics[:, 1, 0]], 1)
    focal = torch.stack([intrinsics[:, 0, 0], intrinsics[:, 1, 1]], 1)

    bad = ~intrinsics.isfinite().flatten(1).all(1)
    _refuse(bad, name, "be finite", lambda i: str(intrinsics[i].tolist()))
    bad = (bottom != row).any(1)
    _refuse(bad, name, "have the bottom row (0, 0, 1)", lambda i: str(tuple(bottom[i].tolist())))
    bad = (skew != 0).any(1)
    _refuse(bad, name, "have no skew (K[0, 1] = K[1, 0] = 0)", lambda i: "{:g} and {:g}".format(*skew[i]))
    bad = (focal <= 0).any(1)
    _refuse(bad, name, "have positive focal lengths", lambda i: "fx={:g}, fy={:g}".format(*focal[i]))


def _check_cam2world(cam2world: Tensor) -> None:
    """Refuse values that are no rigid poses: (T, 4, 4) float64 on the host."""
    name, row = "cam2world", torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    bottom, rotation = cam2world[:, 3], cam2world[:, :3, :3]
    gram = rotation @ rotation.mT
    deviation = (gram - torch.eye(3, dtype=torch.float64)).abs().flatten(1).amax(1)
    determinant = torch.linalg.det(rotation)

    bad = ~cam2world.isfinite().flatten(1).all(1)
    _refuse(bad, name, "be finite", lambda i: str(cam2world[i].tolist()))
    bad = ((bottom - row).abs() > _BOTTOM_ROW_TOLERANCE).any(1)
    _refuse(bad, name, "have the bottom row (0, 0, 0, 1)", lambda i: str(tuple(bottom[i].tolist())))
    bad = ~(deviation <= _ROTATION_TOLERANCE)  # written so that NaN, from an overflow, is bad
    expected = "be a rigid pose (rotation within 1e-2 of orthonormal)"
    _refuse(bad, name, expected, lambda i: f"deviation {deviation[i]:.3g}")
    expected = "be a rigid pose (right-handed, determinant 1)"
    _refuse(determinant <= 0, name, expected, lambda i: f"a reflection, determinant {determinant[i]:.3g}")

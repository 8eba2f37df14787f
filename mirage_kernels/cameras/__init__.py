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

from .checks import check_image_size, check_intrinsics, check_poses, find_allowances
from .conventions import as_float64, as_matrices, as_poses, as_views, invert, is_opengl, with_bottom_row

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
        square_pixels: refuse fx and fy that differ by more than a tenth, which are mostly those of an image of another
            aspect. False accepts any, as of stretched images.
        off_center: accept any principal point, as of a crop. False refuses one outside the image, and one that is the
            centre of (width, height) or of an image of another scale.

    Both arrays may be tensors, numpy arrays or nested lists; they are copied, detached from autograd and held
    as contiguous float64 on the device they came on. T = 0 is allowed. Values are validated here and nowhere
    else, which waits for the device; :meth:`trusted` skips that. Other conventions are those of :meth:`from_w2c`
    and :meth:`from_c2w`.

    Raises:
        TypeError: not a floating-point array, or `image_size` is not two ints.
        ValueError: wrong shape, different devices, or values that are no camera: not finite, focal length not
            positive, skew, bottom rows other than (0, 0, 1) and (0, 0, 0, 1), a rotation farther than 1e-2
            from orthonormal, a reflection; or no camera of images of that size, as fractions of it. The message names
            the first bad view.
    """

    __slots__ = ("_cam2world", "_image_size", "_intrinsics", "_scaled")

    _intrinsics: Tensor
    _cam2world: Tensor
    _image_size: tuple[int, int]
    _scaled: _Scaled | None

    def __init__(
        self,
        intrinsics: Any,
        cam2world: Any,
        image_size: Sequence[int],
        *,
        square_pixels: bool = True,
        off_center: bool = False,
    ) -> None:
        poses = as_poses(cam2world)
        views = len(poses)
        matrices = as_float64("intrinsics", intrinsics)
        if matrices.shape not in ((3, 3), (views, 3, 3)):
            expected = f"(T, 3, 3) with T = {views} as in cam2world, or (3, 3) for all views"
            raise ValueError(f"intrinsics must be {expected}, got {tuple(matrices.shape)}")
        if matrices.device != poses.device:
            got = f"{matrices.device} and {poses.device}"
            raise ValueError(f"intrinsics and cam2world must be on the same device, got {got}")
        self._image_size = check_image_size("image_size", image_size)
        check_intrinsics(matrices.cpu(), self._image_size, square_pixels, off_center)
        check_poses("cam2world", poses.cpu())
        matrices[..., 0, 1] = 0.0  # exact, where the tolerances of the checks let something through
        matrices[..., 1, 0] = 0.0
        matrices[..., 2, :2] = 0.0
        matrices[..., 2, 2] = 1.0
        self._intrinsics = matrices.expand(views, 3, 3).contiguous()
        self._cam2world = with_bottom_row(poses)
        self._scaled = None

    @classmethod
    def from_c2w(
        cls,
        intrinsics: Any,
        c2w: Any,
        image_size: Sequence[int],
        *,
        convention: str = "opencv",
        pixel_centers: str = "half",
        normalized: bool = False,
        square_pixels: bool = True,
        off_center: bool = False,
    ) -> Cameras:
        """Make cameras of camera-to-world poses in other systems' shapes and conventions, each named and none guessed.

        Args:
            intrinsics: (..., 3, 3) matrices or (..., 4) of fx, fy, cx, cy, whose leading axes broadcast against those
                of the poses; one of either is shared by all views.
            c2w: (..., 3, 4) or (..., 4, 4). Leading axes, as of a batch, are flattened in order to T views.
            image_size: (height, width) in pixels.
            convention: axes of the cameras: "opencv" (x right, y down, z forward) or "opengl" (x right, y up, z
                backward; nerfstudio's and Blender's too). The world is left as it is.
            pixel_centers: where the pixel of column j has its centre: at j + 0.5 ("half") or at j ("integer").
            normalized: intrinsics are fractions of width and height.
            square_pixels, off_center: as of the constructor.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        views, leading = as_views("c2w", c2w)
        size = check_image_size("image_size", image_size)
        matrices = as_matrices(intrinsics, leading, size, pixel_centers, normalized)
        if is_opengl(convention):
            views[:, :, 1:3] *= -1
        return cls(matrices, views, size, square_pixels=square_pixels, off_center=off_center)

    @classmethod
    def from_w2c(
        cls,
        intrinsics: Any,
        w2c: Any,
        image_size: Sequence[int],
        *,
        convention: str = "opencv",
        pixel_centers: str = "half",
        normalized: bool = False,
        square_pixels: bool = True,
        off_center: bool = False,
    ) -> Cameras:
        """Make cameras of world-to-camera matrices ("extrinsics"), (..., 3, 4) or (..., 4, 4).

        They are inverted in float64, by the general inverse. All else is as of :meth:`from_c2w`.
        """
        views, leading = as_views("w2c", w2c)
        size = check_image_size("image_size", image_size)
        matrices = as_matrices(intrinsics, leading, size, pixel_centers, normalized)
        if is_opengl(convention):
            views[:, 1:3] *= -1
        check_poses("w2c", views.cpu())
        return cls(matrices, invert(views), size, square_pixels=square_pixels, off_center=off_center)

    @classmethod
    def trusted(cls, intrinsics: Tensor, cam2world: Tensor, image_size: tuple[int, int]) -> Cameras:
        """Hold tensors whose values are known to be good: nothing is validated, which never waits for the device.

        For code that makes cameras in a loop, as one a step of a simulator, and for tensors of other cameras. Float64
        that is contiguous is held as it is, without a copy; anything else is converted.

        Args:
            intrinsics: (T, 3, 3) float, in pixels of `image_size`.
            cam2world: (T, 4, 4) float, on the same device.
            image_size: (height, width) in pixels, two positive ints.

        Raises:
            ValueError: another shape, or different devices.
        """
        if intrinsics.shape[1:] != (3, 3) or cam2world.shape != (len(intrinsics), 4, 4):
            got = f"{tuple(intrinsics.shape)} and {tuple(cam2world.shape)}"
            raise ValueError(f"intrinsics and cam2world must be (T, 3, 3) and (T, 4, 4), got {got}")
        if intrinsics.device != cam2world.device:
            got = f"{intrinsics.device} and {cam2world.device}"
            raise ValueError(f"intrinsics and cam2world must be on the same device, got {got}")
        if intrinsics.requires_grad or cam2world.requires_grad:
            intrinsics, cam2world = intrinsics.detach(), cam2world.detach()
        intrinsics, cam2world = (x.to(torch.float64).contiguous() for x in (intrinsics, cam2world))
        return cls._hold(intrinsics, cam2world, (image_size[0], image_size[1]))

    @classmethod
    def _hold(cls, intrinsics: Tensor, cam2world: Tensor, image_size: tuple[int, int]) -> Cameras:
        """Hold tensors as they are, which are contiguous and float64."""
        cameras = cls.__new__(cls)
        cameras._intrinsics, cameras._cam2world, cameras._image_size = intrinsics, cam2world, image_size
        cameras._scaled = None
        return cameras

    def with_cam2world(self, cam2world: Any) -> Cameras:
        """Give the same lenses at other poses.

        Args:
            cam2world: (T, 4, 4) float, as of the constructor, on any device; brought to these cameras' own. T is their
                number, or any where they are one view.
        """
        poses = as_poses(cam2world)
        if len(self) not in (1, len(poses)):
            raise ValueError(f"cam2world must be ({len(self)}, 4, 4) as the cameras, got {tuple(poses.shape)}")
        check_poses("cam2world", poses.cpu())
        intrinsics = self._intrinsics.expand(len(poses), 3, 3).contiguous()
        return self._hold(intrinsics, with_bottom_row(poses).to(self.device), self._image_size)

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
        return invert(self._cam2world)

    @property
    def centers(self) -> Tensor:
        """(T, 3) float64, camera centres in world units."""
        return self._cam2world[:, :3, 3].contiguous()

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self._image_size

    @property
    def allowances(self) -> dict[str, bool]:
        """The arguments `square_pixels` and `off_center` that the constructor needs to accept these; {} for most.

        Computed at each call; on a GPU that waits for the device.
        """
        return find_allowances(self._intrinsics.cpu(), self._image_size)

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
        size = check_image_size("size", size)
        if size == self._image_size:
            return self
        return self._hold(self.intrinsics_at(size), self._cam2world, size)

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
        return cls._hold(intrinsics, torch.cat([part._cam2world for part in parts]), parts[0]._image_size)

    def __repr__(self) -> str:
        return f"Cameras({len(self)} views, image_size={self._image_size}, device={str(self.device)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Arrays, not tensors: a slice would drag the storage of all its views along, and a clone in shared memory would
        # be gone before a process that is started by spawn can open it.
        arrays = (tensor.numpy(force=True).copy() for tensor in (self._intrinsics, self._cam2world))
        return self._from_arrays, (*arrays, self._image_size, str(self.device))

    @classmethod
    def _from_arrays(cls, intrinsics: Any, cam2world: Any, image_size: tuple[int, int], device: str) -> Cameras:
        """Hold what :meth:`__reduce__` gives."""
        return cls.trusted(torch.from_numpy(intrinsics).to(device), torch.from_numpy(cam2world).to(device), image_size)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Cameras:
        return self._hold(function(self._intrinsics), function(self._cam2world), self._image_size)

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

"""Files of poses alone: TUM, KITTI, Replica, and lists of matrices. The lens is given beside the file."""

from __future__ import annotations

import numpy as np

from mirage_kernels import Cameras

from .reading import (
    LOGGER,
    CameraFile,
    NotThisFormat,
    as_pose,
    join_poses,
    make_cameras_of_poses,
    quaternion_to_rotation,
    read_table,
)


def read_tum(file: CameraFile) -> Cameras:
    """Read TUM's trajectories: timestamp, tx, ty, tz, qx, qy, qz, qw, camera to world, by timestamp."""
    table, places = read_table(file, (8,))
    times = table[:, 0]
    if not np.isfinite(times).all():
        raise file.fail("expected finite timestamps", places[int((~np.isfinite(times)).argmax())])
    if (np.diff(times) < 0).any():
        LOGGER.warning("%s: the lines are not in the order of their timestamps; taken in that order", file.path)
        order = times.argsort(kind="stable")
        table, places = table[order], [places[i] for i in order]
    rotation = quaternion_to_rotation(file, places, table[:, [7, 4, 5, 6]])
    return make_cameras_of_poses(file, places, join_poses(rotation, table[:, 1:4]))


def read_kitti(file: CameraFile) -> Cameras:
    """Read KITTI's odometry poses: 12 numbers a line, the 3x4 camera-to-world matrix by rows."""
    table, places = read_table(file, (12,))
    return _of_matrices(file, places, table.reshape(-1, 3, 4))


def read_replica(file: CameraFile) -> Cameras:
    """Read `traj.txt` of Replica as NICE-SLAM has it: 16 numbers a line, the 4x4 camera-to-world matrix by rows."""
    table, places = read_table(file, (16,))
    return _of_matrices(file, places, table.reshape(-1, 4, 4))


def read_blocks(file: CameraFile) -> Cameras:
    """Read 4x4 matrices below each other, four lines of four numbers each."""
    table, places = read_table(file, (4,))
    if len(table) % 4:
        raise file.fail(f"expected matrices of 4 lines each, got {len(table)} lines")
    return _of_matrices(file, places[::4], table.reshape(-1, 4, 4))


def read_list(file: CameraFile) -> Cameras:
    """Read a JSON list of matrices: each 4x4, 3x4, or their 16 or 12 numbers by rows."""
    values = file.json
    if not isinstance(values, list) or not values or not all(isinstance(value, list) for value in values):
        raise NotThisFormat("no list of matrices")
    places = [f"matrix {i}" for i in range(len(values))]
    poses = [as_pose(file, place, "the matrix", value) for place, value in zip(places, values, strict=True)]
    return _of_matrices(file, places, np.stack(poses))


def _of_matrices(file: CameraFile, places: list[str], matrices: np.ndarray) -> Cameras:
    """Make cameras of matrices, camera-to-world in OpenCV axes unless `poses` and `convention` say otherwise."""
    given = file.given
    world2cam, convention = given.poses == "world2cam", given.convention or "opencv"
    return make_cameras_of_poses(file, places, matrices, world2cam=world2cam, convention=convention)

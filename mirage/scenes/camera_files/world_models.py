"""Camera files of world models and splatting: ReCamMaster, HY-WorldPlay, WorldScore, 3D Gaussian Splatting."""

from __future__ import annotations

from typing import Any

import numpy as np

from mirage_kernels import Cameras

from .reading import (
    LOGGER,
    CameraFile,
    NotThisFormat,
    as_frames,
    as_image_size,
    as_number,
    as_numbers,
    as_pose,
    is_number,
    join_poses,
    make_cameras,
    make_cameras_of_poses,
    order_by_name,
    unify_sizes,
)

# From Unreal's axes (x forward, y right, z up, left-handed) to ours (x right, y down, z forward).
_FROM_UNREAL = np.array([[0.0, 1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
_CENTIMETRE = 0.01


def read_recammaster(file: CameraFile) -> Cameras:
    """Read ReCamMaster's camera_extrinsics.json: of every frame the 4x4 matrices of several cameras, as text.

    They are camera-to-world by columns, in Unreal's axes and centimetres: the world is turned to right-handed axes and
    metres. `camera` names the one to take where there are several.
    """
    frames = file.json
    if not isinstance(frames, dict) or not frames or not all(key.startswith("frame") for key in frames):
        raise NotThisFormat("no object with frame0, frame1, ..")
    names = [*frames]
    places = [names[i] for i in order_by_name(names)]
    poses = []
    for place in places:
        cameras = frames[place]
        if not isinstance(cameras, dict) or not cameras:
            raise file.fail(f"expected the matrices of cameras by name, got {str(cameras)[:80]}", place)
        if file.given.camera is None and len(cameras) > 1:
            raise file.fail(f"camera must name one of {', '.join(cameras)[:200]}")
        name = file.given.camera or next(iter(cameras))
        text = cameras.get(name)
        if text is None:
            raise file.fail(f"camera must be one of {', '.join(cameras)[:200]}, got {name!r}", place)
        numbers = text.replace("[", " ").replace("]", " ").split() if isinstance(text, str) else []
        if len(numbers) != 16 or not all(map(is_number, numbers)):
            raise file.fail(f"{name} must be four rows of four numbers in brackets, got {str(text)[:80]}", place)
        poses.append(np.array([float(number) for number in numbers]).reshape(4, 4).T)
    matrices = np.stack(poses)
    with np.errstate(all="ignore"):
        turned = _FROM_UNREAL @ matrices @ np.linalg.inv(_FROM_UNREAL)
    turned[:, :3, 3] *= _CENTIMETRE
    return make_cameras_of_poses(file, places, turned)


def read_worldplay(file: CameraFile) -> Cameras:
    """Read HY-WorldPlay's poses: an object by number, each with `extrinsic` (camera to world) and `K`, or `w2c` and
    `intrinsic`.

    Where no size is given, the image's centre is the principal point, as WorldPlay has it. Its files hold a pose for
    each latent frame, which is every fourth frame of its videos; they are read as they are.
    """
    entries = file.json
    if not isinstance(entries, dict) or not entries or not all(isinstance(entry, dict) for entry in entries.values()):
        raise NotThisFormat("no object of poses by number")
    first = next(iter(entries.values()))
    pairs = (("extrinsic", "K", False), ("w2c", "intrinsic", True))
    pair = next((pair for pair in pairs if pair[0] in first and pair[1] in first), None)
    if pair is None:
        raise NotThisFormat("no poses with extrinsic and K, or w2c and intrinsic")
    places = [[*entries][i] for i in order_by_name([*entries])]
    poses = np.stack([as_pose(file, place, pair[0], entries[place].get(pair[0])) for place in places])
    matrices = np.stack([as_numbers(file, place, pair[1], entries[place].get(pair[1]), (3, 3)) for place in places])
    size = file.given.file_size
    if size is None:
        size = as_image_size(file, places[0], *(round(float(2 * x), 6) for x in (matrices[0, 1, 2], matrices[0, 0, 2])))
    LOGGER.warning(
        "%s: WorldPlay's files hold a pose for every fourth frame; its %d are taken as they are", file.path, len(poses)
    )
    return make_cameras(file, places, matrices, poses, size, world2cam=pair[2])


def read_worldscore(file: CameraFile) -> Cameras:
    """Read WorldScore's camera_data.json, as `mirage worldscore` writes it too: the cameras of every frame.

    The focal length is in pixels of the generated frames, whose size is given beside the file.
    """
    values = file.json
    if not isinstance(values, dict) or not {"focal_length", "cameras_interp"} <= set(values):
        raise NotThisFormat("no object with 'focal_length' and 'cameras_interp'")
    if not isinstance(values["cameras_interp"], list) or not values["cameras_interp"]:
        raise file.fail("cameras_interp must list matrices")
    places = [f"cameras_interp[{i}]" for i in range(len(values["cameras_interp"]))]
    poses = np.stack(
        [as_pose(file, place, "the matrix", pose) for place, pose in zip(places, values["cameras_interp"], strict=True)]
    )
    size = file.given.file_size
    if size is None:
        raise file.fail(
            "file_size must be the (height, width) of the frames, whose pixels focal_length is in, got None"
        )
    focal = as_number(file, "", "focal_length", values["focal_length"])
    lens = np.array([focal, focal, size[1] / 2, size[0] / 2])
    # From x left, y up, z forward for the world and x right, y up, z backward for cameras.
    turned = np.diag([-1.0, -1.0, 1.0, 1.0]) @ poses @ np.diag([1.0, -1.0, -1.0, 1.0])
    return make_cameras(file, places, lens, turned, size, pixel_centers="half", normalized=False)


def read_splatting(file: CameraFile) -> Cameras:
    """Read `cameras.json` of 3D Gaussian Splatting: rotation and position, camera to world, by `img_name`."""
    if not isinstance(file.json, list):
        raise NotThisFormat("no list")
    entries = as_frames(file, file.json, "the file")
    if not entries or not all({"rotation", "position"} <= set(entry) for entry in entries):
        raise NotThisFormat("no list of objects with 'rotation' and 'position'")
    names = [entry.get("img_name") for entry in entries]
    order = (
        [*range(len(names))]
        if any(not isinstance(name, str) for name in names)
        else order_by_name([str(n) for n in names])
    )
    places, lenses, sizes, rotations, positions = [f"camera {i}" for i in order], [], [], [], []
    for place, i in zip(places, order, strict=True):
        entry: dict[str, Any] = entries[i]
        sizes.append(as_image_size(file, place, entry.get("height"), entry.get("width")))
        focal = [as_number(file, place, name, entry.get(name)) for name in ("fx", "fy")]
        lenses.append(np.array([*focal, sizes[-1][1] / 2, sizes[-1][0] / 2]))
        rotations.append(as_numbers(file, place, "rotation", entry["rotation"], (3, 3)))
        positions.append(as_numbers(file, place, "position", entry["position"], (3,)))
    intrinsics, size = unify_sizes(file, places, lenses, sizes)
    return make_cameras(file, places, intrinsics, join_poses(np.stack(rotations), np.stack(positions)), size)

"""Procedural rooms: build them (`room`), render them (`render`), walk through them (`paths`)."""

from .objects import SceneObject
from .paths import CLEARANCE, PATHS
from .render import SyntheticFrames
from .room import FPS, SyntheticRoom

__all__ = ["CLEARANCE", "FPS", "PATHS", "SceneObject", "SyntheticFrames", "SyntheticRoom"]

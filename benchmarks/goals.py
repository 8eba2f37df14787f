"""Hold the goals against what a run measured, or say "not measured yet"."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import scenes
from .pixel_memory import FULL_WIDTH
from .report import BESIDE, NOT_MEASURED, Row, bytes_text, find_row, ratio_text, seconds_text

_GOAL = scenes.GOAL.label
_GPU_MANY = scenes.GPU_SIZES[-1].label
_GPU_READ = scenes.SIZES[-1].label  # 1.4 million tokens
ENCODER = f"encoder of width {FULL_WIDTH}"
_RASTERISERS = ("pixel, plain", "pixel, kernels bilinear", "pixel, kernels nearest")


class Outcome(NamedTuple):
    """Say of one goal what was measured; ``met`` is None where nothing was."""

    goal: str
    figure: str
    met: bool | None


def _least(rows: list[Row], group: str, name: str, variants: list[str], size: str) -> float | None:
    found = [row["median_s"] for v in variants if (row := find_row(rows, group, name, v, size)) is not None]
    return min(found) if found else None


def _ratio(goal: str, slow: float | None, fast: float | None, least: float) -> Outcome:
    if slow is None or fast is None:
        return Outcome(goal, NOT_MEASURED, None)
    text = f"{ratio_text(slow / fast)}: {seconds_text(fast)} against {seconds_text(slow)}"
    return Outcome(goal, text, slow / fast >= least)


def _at_most(goal: str, seconds: float | None, most: float) -> Outcome:
    return Outcome(goal, seconds_text(seconds), None if seconds is None else seconds <= most)


def _held(rows: list[Row], variant: str) -> int | None:
    row = find_row(rows, "memory", "held", variant, _GOAL)
    return None if row is None else row["bytes"]


def _bytes_goal(rows: list[Row]) -> Outcome:
    goal = "bytes held, append, bf16: at least 50x less than float32 positions and colours"
    latent, pixel = _held(rows, "latent, bf16"), _held(rows, "pixel, plain")
    small = _held(rows, "pixel, plain, 8-bit colours")
    if latent is None or pixel is None or small is None:
        return Outcome(goal, NOT_MEASURED, None)
    text = f"{ratio_text(pixel / latent)}: {bytes_text(latent)} against {bytes_text(pixel)}"
    return Outcome(goal, f"{text} ({ratio_text(small / latent)} against 8-bit colours)", pixel / latent >= 50)


def growth(rows: list[Row], walk: str, variant: str = "latent, bf16") -> tuple[float, float] | None:
    """Return how many times a read's time and the bytes in view grew, from the first to the last chunk, full size."""
    reads = [row for row in rows if row["name"] == f"{walk}: read" and row["variant"] == variant]
    reads = [row for row in reads if row["size"].endswith(f"of {scenes.PATH_SIZE[0]}x{scenes.PATH_SIZE[1]}")]
    if len(reads) < 2:
        return None
    first, last = (find_row(rows, "growth", f"{walk}: in view", variant, row["size"]) for row in (reads[0], reads[-1]))
    if first is None or last is None:
        return None
    beside = [find_row(rows, "growth", f"{walk}: {name}", variant, last["size"]) for name in BESIDE]
    if beside[0] is not None and beside[1] is not None:  # read in turns, see test_growth.py
        return beside[0]["median_s"] / beside[1]["median_s"], last["bytes"] / first["bytes"]
    return reads[-1]["median_s"] / reads[0]["median_s"], last["bytes"] / first["bytes"]


def _growth_goal(rows: list[Row], walk: str, policy: str = "append") -> Outcome:
    side = "" if policy == "append" else f", {policy}"
    goal = f"{walk}, 50 chunks: the latent read grows no faster than the bytes in view{side}"
    grown = growth(rows, walk, f"latent, bf16{side}")
    if grown is None:
        return Outcome(goal, NOT_MEASURED, None)
    text = f"read {ratio_text(grown[0])}, bytes in view {ratio_text(grown[1])}"
    return Outcome(goal, text, grown[0] <= grown[1])


def cpu_goals(rows: list[Row]) -> list[Outcome]:
    """List those for 20 frames stored and one chunk of 33 images at 352x640, on 2 cores."""
    latent = ["latent, bf16", "latent, f32"]
    read = _least(rows, "read", "9 latent views", latent, _GOAL)
    cold = _least(rows, "read", "9 latent views", ["latent, bf16, cold caches"], _GOAL)
    raster = _least(rows, "read", "33 images", list(_RASTERISERS), _GOAL)
    whole = _least(rows, "condition", "one chunk", [f"{name}, {ENCODER}" for name in _RASTERISERS], _GOAL)
    return [
        _ratio("read: at least 300x less time than the fastest rasterising alone", raster, read, 300),
        _ratio("the same, read with cold caches", raster, cold, 300),
        _ratio("read: at least 100,000x less than rasterising and encoding", whole, read, 100_000),
        _bytes_goal(rows),
        *(
            _growth_goal(rows, walk, policy)
            for policy in ("append", "bounded")
            for walk in ("new rooms", "new rooms, looking back", "closed loop")
        ),
    ]


def gpu_goals(rows: list[Row]) -> list[Outcome]:
    """List those for an H200: 704x1280, 9 views of 44x80x48, bf16."""

    def latent(group: str, name: str, how: str, size: str, variant: str = "latent, bf16") -> float | None:
        return _least(rows, group, name, [f"{variant}, {how}"], size)

    many = find_row(rows, "read", "9 latent views", "latent, bf16, graph, cold", _GPU_MANY)
    part = None if many is None or not many["floor_s"] else many["floor_s"] / many["median_s"]
    goal = f"read of {scenes.GPU_SIZES[-1].tokens / 1e6:.1f} M tokens: at least 40 % of the copy bandwidth's floor"
    condition = latent("condition", "one chunk", "eager, warm", _GPU_READ)
    reference = _least(rows, "condition", "one chunk", ["reference, eager, warm"], _GPU_READ)
    variants = [f"{name}, {ENCODER}" for name in _RASTERISERS]
    pixel = _least(rows, "condition", "one chunk", variants, _GPU_READ)
    read = "read of 1.4 M tokens, CUDA graph: at most 25 us"
    eager = "read of 1.4 M tokens, eager: at most 60 us"
    return [
        _at_most(read, latent("read", "9 latent views", "graph, warm", _GPU_READ), 25e-6),
        _at_most(eager, latent("read", "9 latent views", "eager, warm", _GPU_READ), 60e-6),
        Outcome(goal, NOT_MEASURED, None) if part is None else Outcome(goal, f"{100 * part:.0f} %", part >= 0.4),
        _at_most("write of 8 frames: at most 60 us", latent("write", "8 frames", "graph, warm", _GPU_READ), 60e-6),
        _ratio("condition: at least 100x the reference algorithm", reference, condition, 100),
        _ratio("condition: at least 1,000x the fastest pixel memory", pixel, condition, 1000),
        _growth_goal(rows, "new rooms"),
    ]


def outcomes(results: list[dict[str, Any]]) -> tuple[list[Outcome], list[Outcome], str | None, str | None]:
    """Return CPU and GPU outcomes, and the machines they come from."""
    cpu = next((one for one in results if one["gpu"] is None), None)
    gpu = next((one for one in results if one["gpu"] is not None), None)
    return (
        cpu_goals(cpu["rows"] if cpu else []),
        gpu_goals(gpu["rows"] if gpu else []),
        cpu["machine"] if cpu else None,
        gpu["machine"] if gpu else None,
    )

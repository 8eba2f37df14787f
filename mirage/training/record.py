"""What a training run keeps beside its checkpoints: a lock, its configuration, a line of metrics for each step."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from mirage_kernels.io import replace_bytes, replace_text

from ..files.checked import DamagedFileError, digest, digest_json, read_file, read_json
from .config import TrainConfig, make_config

METRICS, CONFIG, LOCK = "metrics.jsonl", "config.json", ".lock"

# What may change when a run is resumed.
_FREE = ("out", "steps", "save_every", "keep", "save_dtype", "resume", "tensorboard")

logger = logging.getLogger(__name__)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the run's folder while a block runs: the system lets go of it when the process dies.

    Raises:
        BlockingIOError: another training runs there.
    """
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(f"{out} is in use: another training runs there") from error
    try:
        yield
    finally:
        lock.release()
        if made and {path.name for path in out.iterdir()} <= {LOCK}:  # it could not start
            with suppress(OSError):
                (out / LOCK).unlink(missing_ok=True)
                out.rmdir()


# Its configuration.


def check_config(config: TrainConfig, out: Path, known: str | None) -> None:
    """Check that a run which is there was started with the same configuration.

    Args:
        config: of now.
        out: folder of the run.
        known: :func:`digest_config` of the run's configuration, as its newest checkpoint has it.

    Raises:
        DamagedFileError: config.json is not what was written, and the run was started with another configuration.
        ValueError: the message names each value that differs.
    """
    path = out / CONFIG
    if known is None and not os.path.lexists(path):
        return
    try:
        held = read_json(path)
        checksum = held.pop("checksum", None)  # the first runs had none
        if checksum not in (None, digest_json(held)):
            raise DamagedFileError(f"{path} is damaged: its content is not what its checksum says")
        before = _upgrade(path, held)
    except DamagedFileError as error:
        if path.is_dir() or known != digest_config(config):
            raise DamagedFileError(
                f"{error}; put it back from a copy, or begin again in another folder: it says what the run was started"
                " with, which is not what it is now resumed with"
            ) from None
        logger.warning("%s: it is written again, with the configuration that the run was started with", error)
        return
    was, now = _fixed(before), _fixed(config)
    names = sorted(name for name in {*was, *now} if was.get(name) != now.get(name))
    if names:
        listed = "; ".join(f"{name} was {was.get(name)!r}, got {now.get(name)!r}" for name in names)
        raise ValueError(f"{path}: a run can be resumed only with what it was started with: {listed}")


def _upgrade(path: Path, before: dict[str, Any]) -> TrainConfig:
    """Make a configuration of a record, with today's names. A key that it lacks had no choice yet: the default's."""
    try:
        objective = before["objective"]
        splat = objective.pop("splat", None)  # of runs from before there were other memories
        memory = objective.setdefault("memory", "nearest" if splat == "nearest" else "aligned")
        if memory == "ours":  # what "aligned" was called
            objective["memory"] = "aligned"
        return make_config(before)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged: it holds no configuration ({error})") from None


def _fixed(config: TrainConfig) -> dict[str, Any]:
    """Return what must stay, as plain JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    for name in _FREE:
        values.pop(name)
    values["data"].pop("workers")
    return values


def digest_config(config: TrainConfig) -> str:
    """Return a digest of what must stay of a configuration when the run is resumed."""
    return digest_json(_fixed(config))


def record_config(config: TrainConfig, out: Path) -> None:
    """Write config.json, where there is none or a damaged one that :func:`check_config` has let pass."""
    values = json.loads(json.dumps(asdict(config)))
    with suppress(ValueError):
        held = read_json(out / CONFIG)
        if held.pop("checksum", digest_json(held)) == digest_json(held) and "stage" in held:
            return
    replace_text(out / CONFIG, json.dumps(values | {"checksum": digest_json(values)}, indent=2) + "\n")


# Its lines.


class Metrics:
    """metrics.jsonl, of which a checkpoint knows the bytes that it had.

    Args:
        out: folder of the run.
        step: steps taken.
        known: bytes and sha256 of the file after them; None: an earlier release did not say.

    Raises:
        DamagedFileError: the file is not what was written.
    """

    def __init__(self, out: Path, step: int, known: dict[str, Any] | None) -> None:
        self._path = out / METRICS
        self._kept = self._read(step, known)
        self._summed, self._size = hashlib.sha256(self._kept), len(self._kept)
        self._file: TextIO | None = None

    def _read(self, step: int, known: dict[str, Any] | None) -> bytes:
        """Read the lines of the steps that were taken."""
        if not os.path.lexists(self._path):
            if step:
                logger.warning("%s is missing: it continues with step %d", self._path, step + 1)
            return b""
        hint = f"put it back from a copy, or delete it: it then continues with step {step + 1}"
        try:
            content = read_file(self._path.parent, self._path.name)
            if known is not None:
                kept = content[: known["bytes"]]
                if digest(kept) != known["sha256"]:
                    raise DamagedFileError(f"{self._path} is damaged: the lines of the first {step} steps are others")
                return kept
            lines = content.splitlines(keepends=True)[:step]
            steps = [_step_of(line) for line in lines]
            if steps != list(range(1, step + 1)):
                raise DamagedFileError(f"{self._path} is damaged: it must hold a line for each of {step} steps")
        except DamagedFileError as error:
            raise DamagedFileError(f"{error}; {hint}") from None
        return b"".join(lines)

    def open(self) -> None:
        """Drop the lines of steps that are taken again, and open the file to write."""
        if self._path.exists() and self._path.stat().st_size != self._size:
            replace_bytes(self._path, self._kept)
        self._kept = b""
        self._file = self._path.open("a", encoding="utf-8", newline="\n")

    def write(self, values: dict[str, Any]) -> None:
        """Write a line."""
        assert self._file is not None
        line = json.dumps(values) + "\n"
        self._file.write(line)
        self._file.flush()
        self._summed.update(line.encode())
        self._size += len(line.encode())

    def position(self) -> dict[str, Any]:
        """Flush the file to disk, and return its bytes and their sha256."""
        assert self._file is not None
        os.fsync(self._file.fileno())
        return {"bytes": self._size, "sha256": self._summed.hexdigest()}

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _step_of(line: bytes) -> Any:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values.get("step") if isinstance(values, dict) else None

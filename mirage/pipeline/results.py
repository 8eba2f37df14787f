"""Checks of what models give for a chunk, made before any of it is kept.

A result that is not finite, or of which nothing can be used, is an error: the chunk is not kept, and the step can be
tried again with a repaired model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mirage_kernels import WriteReport

from .chunks import Chunk

FIRST_FRAME = "the first frame"

_NOTHING_KEPT = "nothing of it is kept, and it can be tried again with a repaired model"
_UNUSED = {
    "masked": "are not static by the static filter",
    "unknown_depth": "have unknown depth (0, negative, NaN or Inf; depth is z, positive in front of the camera)",
    "out_of_range": "lie outside the depths that the memory takes",
    "non_finite": "are NaN or Inf in position or latents",
}


def describe_chunk(chunk: Chunk) -> str:
    """Return how messages call a chunk."""
    return f"chunk {chunk.index} (frames {chunk.start} to {chunk.stop - 1})"


def check_finite(values: Tensor, component: str, result: str, where: str, then: str = _NOTHING_KEPT) -> None:
    """Check that a model's result is finite; waits for the device.

    Args:
        values: the result, floating point.
        component: what gave it.
        result: what it is, in the plural: "latents", "frames".
        where: of what: :data:`FIRST_FRAME`, or :func:`describe_chunk`.
        then: how matters stand now, and what can be done.

    Raises:
        ValueError: naming the component, the chunk, and the share of values that are NaN or Inf.
    """
    if not bool(values.isfinite().all()):
        bad = values.numel() - int(values.isfinite().sum())
        raise ValueError(
            f"{result} of {where} from {component} must be finite, got {_share(bad, values.numel())} NaN or Inf: {then}"
        )


def check_known(depth: Tensor, component: str, where: str) -> None:
    """Check that an estimator knows the depth of something; waits for the device.

    Raises:
        ValueError: it is 0, negative, NaN or Inf everywhere; the message says how much is which.
    """
    if is_known(depth):
        return
    total, infinite = depth.numel(), depth.numel() - int(depth.isfinite().sum())
    negative = int((depth.isfinite() & (depth < 0)).sum())
    raise ValueError(
        f"depth of {where} from {component} must be known somewhere, got {_share(infinite, total)} NaN or Inf,"
        f" {_share(negative, total)} negative and the rest 0: {_NOTHING_KEPT}"
    )


def is_known(depth: Tensor) -> bool:
    """Return whether depth is known anywhere; waits for the device."""
    return bool((depth.isfinite() & (depth > 0)).any())


def check_first_write(report: WriteReport) -> None:
    """Check that the first frame left something in the memory, or is in it already; waits for the device.

    Args:
        report: of writing the first frame.

    Raises:
        ValueError: no token of it could be used; the message says why.
    """
    counts = report.as_dict()
    usable = sum(counts[name] for name in ("written", "replaced", "merged", "covered", "refused"))
    if usable:
        return
    total = sum(counts[name] for name in _UNUSED)
    reasons = "; ".join(
        f"{_share(counts[name], total, 'tokens')} {why}" for name, why in _UNUSED.items() if counts[name]
    )
    raise ValueError(f"{FIRST_FRAME} must leave something in the memory, got no token that can be used: {reasons}")


class FiniteTrace:
    """Which value of a computation was the first that is not finite: watching waits for no device, asking does."""

    def __init__(self) -> None:
        self._labels: list[str] = []
        self._finite: list[Tensor] = []

    def watch(self, label: str, values: Tensor) -> None:
        """Note whether `values` are finite, under a name for messages."""
        self._labels.append(label)
        self._finite.append(values.isfinite().all())

    def first(self) -> str | None:
        """Return the name of the first values that were not finite; None where all were."""
        finite = torch.stack(self._finite).tolist() if self._finite else []
        return next((label for label, good in zip(self._labels, finite, strict=True) if not good), None)


def _share(count: int, total: int, what: str = "values") -> str:
    return f"{count} of {total} {what} ({count / max(total, 1):.1%})"

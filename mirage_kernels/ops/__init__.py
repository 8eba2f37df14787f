"""The operators, each in a folder of its own.

In ``__init__`` lie its schema, public function, fake and derivative, in ``reference`` its definition, in ``triton`` its
Triton kernels. What a definition computes is what is true, for float32 and float64, one rounded operation at a time:
the C++, CUDA and Triton kernels are held to it bit for bit in float32.

Every public function checks metadata (shapes, dtypes, devices) on the host before anything is computed or written; none
waits for a GPU. Values are validated once by :class:`~mirage_kernels.Cameras`; an operator given a degenerate camera or
a NaN depth writes or shows nothing there, and never reads or writes out of bounds. ``launch`` in each folder is the
function behind the checks.
"""

from __future__ import annotations

from .back_project import BackProjection, back_project
from .block_bounds import block_bounds
from .bounded_write import bounded_write
from .cache_compact import cache_compact
from .cache_write import cache_write
from .readout import Readout
from .splat import splat
from .splat_aligned import splat_aligned
from .view_overlap import view_overlap

__all__ = [
    "BackProjection",
    "Readout",
    "back_project",
    "block_bounds",
    "bounded_write",
    "cache_compact",
    "cache_write",
    "splat",
    "splat_aligned",
    "view_overlap",
]

"""`cache_compact`: the frame up to which tokens go, by four bits at a time; counts by blocks, their prefix sums; moves.

Rows move towards the front, chunk after chunk through a buffer of bounded size, since programs read what others
overwrite. Nothing but that buffer and a few numbers a block is allocated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...constants import INVALID
from ..common.triton.block_boxes import update_bounds
from ..common.triton.feature_rows import raw
from ..common.triton.launching import EXACT, cdiv, device_of, power_of_2
from ..operator import implements

_INVALID = tl.constexpr(INVALID)
_SIGN = tl.constexpr(0x80000000)

_ROWS = 128
_SCAN = 1024
_DIGITS = 8  # of four bits, in a frame id
_CHUNK = 1024  # blocks whose rows move at a time: 16 MB of 48 half-precision channels
_CHANNELS = 64


@triton.jit
def load_live(count, capacity):
    """Load the number of rows in use; 0 where the count is none, which the host never checks."""
    live = tl.load(count)
    return tl.where((live >= 0) & (live <= capacity), live, 0)


@triton.jit
def load_valid(frame_ids, free_space_violations, row, live):
    """Load which rows hold a valid token, and frame ids as numbers from 0, in the same order."""
    valid = row < live
    if free_space_violations is not None:
        valid = valid & (tl.load(free_space_violations + row, valid, other=_INVALID) != _INVALID)
    return valid, tl.load(frame_ids + row, valid, other=0).to(tl.int64) + _SIGN


@triton.jit
def too_many(digits, most, FOUND: tl.constexpr):
    """Count the tokens that have to go: those of all first digits, less those that may stay."""
    excess = tl.cast(0, tl.int64)
    if FOUND > 0:
        excess = tl.maximum(tl.sum(tl.load(digits + tl.arange(0, 16)), axis=0) - most, 0)
    return excess


@triton.jit
def oldest_frames(digits, most, FOUND: tl.constexpr):
    """Find the upper FOUND digits of the frame up to which tokens go, and how many of those that share them go."""
    bins = tl.arange(0, 16)
    prefix = tl.cast(0, tl.int64)
    excess = too_many(digits, most, FOUND)
    for k in tl.static_range(FOUND):
        tokens = tl.load(digits + 16 * k + bins)
        less = tl.cumsum(tokens, axis=0) < excess
        prefix = prefix * 16 + tl.sum(less.to(tl.int64), axis=0)
        excess -= tl.sum(tl.where(less, tokens, 0), axis=0)
    return prefix, excess


@triton.jit(do_not_specialize=["capacity", "most"])
def digit_kernel(
    frame_ids, free_space_violations, count, digits, capacity, most, FOUND: tl.constexpr, ROWS: tl.constexpr
):
    """Count tokens by the next digit of their frame, of those that share the digits found."""
    live = load_live(count, capacity)
    begin = tl.program_id(0).to(tl.int64) * ROWS
    if begin < live:
        prefix, _ = oldest_frames(digits, most, FOUND)
        valid, frame = load_valid(frame_ids, free_space_violations, begin + tl.arange(0, ROWS), live)
        digit = tl.where(valid & ((frame >> (32 - 4 * FOUND)) == prefix), (frame >> (28 - 4 * FOUND)) & 15, 16)
        bins = tl.arange(0, 16)
        tokens = tl.sum((digit[:, None] == bins[None, :]).to(tl.int64), axis=0)
        tl.atomic_add(digits + 16 * FOUND + bins, tokens, tokens > 0, sem="relaxed")


@triton.jit(do_not_specialize=["capacity", "most"])
def count_kernel(
    frame_ids,
    free_space_violations,
    count,
    digits,
    younger,
    same_age,
    capacity,
    most,
    FOUND: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Count tokens of each block that stay for sure, and those of the frame of which some go."""
    live = load_live(count, capacity)
    block = tl.program_id(0).to(tl.int64)
    prefix, _ = oldest_frames(digits, most, FOUND)
    valid, frame = load_valid(frame_ids, free_space_violations, block * ROWS + tl.arange(0, ROWS), live)
    tl.store(younger + block, tl.sum((valid & (frame > prefix)).to(tl.int32), axis=0))
    tl.store(same_age + block, tl.sum((valid & (frame == prefix)).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["capacity", "most", "blocks"])
def scan_kernel(
    count,
    digits,
    younger,
    same_age,
    leaving,
    offsets,
    remaining,
    evicted,
    capacity,
    most,
    blocks,
    FOUND: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Find how many of each block's tokens of that frame go, and where the others move. One program: one order."""
    _, excess = oldest_frames(digits, most, FOUND)
    blocks = tl.cast(blocks, tl.int64)
    gone, kept = blocks - blocks, blocks - blocks
    for first in range(0, blocks, SCAN):
        block = first + tl.arange(0, SCAN)
        inside = block < blocks
        same = tl.load(same_age + block, inside, other=0).to(tl.int64)
        left = excess - (gone + tl.cumsum(same, axis=0) - same)
        leave = tl.minimum(tl.maximum(left, 0), same)
        stay = tl.load(younger + block, inside, other=0) + same - leave
        tl.store(leaving + block, leave.to(tl.int32), inside)
        tl.store(offsets + block, kept + tl.cumsum(stay, axis=0) - stay, inside)
        gone += tl.sum(same, axis=0)
        kept += tl.sum(stay, axis=0)
    tl.store(offsets + blocks, kept)
    tl.store(remaining, tl.load(count) - (load_live(count, capacity) - kept))
    tl.store(evicted, too_many(digits, most, FOUND))


@triton.jit
def copy_rows(source, source_row, target, target_row, mask, channels, CHANNELS: tl.constexpr):
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)[None, :]
        real = mask[:, None] & (channel < channels)
        value = tl.load(source + source_row[:, None] * channels + channel, real)
        tl.store(target + target_row[:, None] * channels + channel, value, real)


@triton.jit
def copy_numbers(source, source_row, target, target_row, mask):
    tl.store(target + target_row, tl.load(source + source_row, mask), mask)


@triton.jit(do_not_specialize=["capacity", "most", "first_block"])
def move_kernel(
    points,
    features,
    frame_ids,
    free_space_violations,
    num_observations,
    scales,
    held_points,
    held_features,
    held_frame_ids,
    held_violations,
    held_observations,
    held_scales,
    count,
    digits,
    leaving,
    offsets,
    capacity,
    most,
    channels,
    first_block,
    BACK: tl.constexpr,
    FOUND: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Move rows of a chunk that stay into the held buffers, side by side; or BACK from there to their places."""
    block = tl.cast(first_block, tl.int64) + tl.program_id(0)
    offset = tl.load(offsets + block)
    stay = (tl.load(offsets + block + 1) - offset).to(tl.int32)
    # Up to the first row that goes, blocks stay where they are.
    if (stay > 0) & ((offset < block * ROWS) | (stay < ROWS)):
        place = offset - tl.load(offsets + first_block)
        if BACK:
            rank = tl.arange(0, ROWS)
            mask = rank < stay
            row = offset + rank
            place += rank
            copy_rows(held_points, place, points, row, mask, 4, 4)
            copy_rows(held_features, place, features, row, mask, channels, CHANNELS)
            copy_numbers(held_frame_ids, place, frame_ids, row, mask)
            if free_space_violations is not None:
                copy_numbers(held_violations, place, free_space_violations, row, mask)
            if num_observations is not None:
                copy_numbers(held_observations, place, num_observations, row, mask)
            if scales is not None:
                copy_numbers(held_scales, place, scales, row, mask)
        else:
            row = block * ROWS + tl.arange(0, ROWS)
            prefix, _ = oldest_frames(digits, most, FOUND)
            valid, frame = load_valid(frame_ids, free_space_violations, row, load_live(count, capacity))
            same = (valid & (frame == prefix)).to(tl.int32)
            mask = valid & (frame >= prefix) & ((same == 0) | (tl.cumsum(same, axis=0) > tl.load(leaving + block)))
            place += tl.cumsum(mask.to(tl.int32), axis=0) - 1
            copy_rows(points, row, held_points, place, mask, 4, 4)
            copy_rows(features, row, held_features, place, mask, channels, CHANNELS)
            copy_numbers(frame_ids, row, held_frame_ids, place, mask)
            if free_space_violations is not None:
                copy_numbers(free_space_violations, row, held_violations, place, mask)
            if num_observations is not None:
                copy_numbers(num_observations, row, held_observations, place, mask)
            if scales is not None:
                copy_numbers(scales, row, held_scales, place, mask)


@implements("cache_compact")
def cache_compact(
    points: Tensor,
    features: Tensor,
    frame_ids: Tensor,
    free_space_violations: Tensor | None,
    num_observations: Tensor | None,
    count: Tensor,
    max_tokens: int,
    bounds: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    capacity, channels = features.shape
    evicted = torch.zeros((), dtype=torch.int64, device=points.device)
    blocks, buffers = (
        cdiv(capacity, _ROWS),
        (points, raw(features), frame_ids, free_space_violations, num_observations, scales),
    )
    if blocks == 0:
        return evicted
    digits = torch.zeros((_DIGITS, 16), dtype=torch.int64, device=points.device)
    younger, same_age, leaving = (torch.empty(blocks, dtype=torch.int32, device=points.device) for _ in range(3))
    offsets = torch.empty(blocks + 1, dtype=torch.int64, device=points.device)
    remaining = torch.empty_like(count)
    chunk = min(_CHUNK, blocks) * _ROWS
    held = [None if buffer is None else buffer.new_empty((chunk, *buffer.shape[1:])) for buffer in buffers]
    # Where all may stay, no frame needs to be found.
    found = _DIGITS if max_tokens < capacity else 0
    options = {"ROWS": _ROWS, "num_warps": 4, **EXACT}
    tokens, limits = (frame_ids, free_space_violations, count, digits), (capacity, max_tokens)
    with device_of(points):
        for digit in range(found):
            digit_kernel[(blocks,)](*tokens, *limits, FOUND=digit, **options)
        count_kernel[(blocks,)](*tokens, younger, same_age, *limits, FOUND=found, **options)
        scan_kernel[(1,)](
            count,
            digits,
            younger,
            same_age,
            leaving,
            offsets,
            remaining,
            evicted,
            *limits,
            blocks,
            FOUND=found,
            SCAN=_SCAN,
            num_warps=4,
            **EXACT,
        )
        for first in range(0, blocks, _CHUNK):
            for back in (False, True):
                move_kernel[(min(_CHUNK, blocks - first),)](
                    *buffers,
                    *held,
                    count,
                    digits,
                    leaving,
                    offsets,
                    *limits,
                    channels,
                    first,
                    BACK=back,
                    FOUND=found,
                    CHANNELS=min(_CHANNELS, power_of_2(max(channels, 1))),
                    **options,
                )
    count.copy_(remaining)
    if bounds is not None:
        update_bounds(points, count, None, bounds)
    return evicted

"""Keys in 8 bits: a key k is rounded to `unit * rounded`, with unit = max |k| / 127 of its own.

A block of keys keeps the largest of

    |k - unit * rounded| + rounding_share |k|

By Cauchy and Schwarz, |query| times this bounds how far a score by the 8 bits is from the score by the key. The second
term is for the rounding of the query and of float32. Each program has a block of its own, so no two of them write to
one number.

A block that is full may have a centre c, which is close to the mean of its keys, and two bounds. The first is on
|k - c|, the second on |mean - c|. Both are computed from the keys in 8 bits, which are near.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...core import call
from ...core.call import Problem, RoundedKeys, ScoreOptions, VisibilityArgs
from ...core.tensors import ceil_div
from . import schedule
from .bound import NORM_ROUNDING, norm
from .call_launches import CallLaunches
from .tile import UNSPECIALIZED, aligned, device_of, head_of

BLOCK = tl.constexpr(call.SUMMARY_BLOCK)
LARGEST_ROUNDED = tl.constexpr(call.LARGEST_ROUNDED)
SMALLEST_ROUNDED = tl.constexpr(call.SMALLEST_ROUNDED)
rounding_share = triton.constexpr_function(call.rounding_share)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def append_kernel(
    key, lengths, rounded, unit, error, centre, radius, centre_error, heads, key_length, capacity, slots,
    C: tl.constexpr,
):  # fmt: skip
    """Round the new keys of one block of one key head. They stand at positions lengths[batch] + 0, 1, ..."""
    key_unit = tl.cast(tl.program_id(0) // slots, tl.int64)
    batch = key_unit // heads
    before = tl.load(lengths + batch)
    block = before // BLOCK + tl.program_id(0) % slots
    position = block * BLOCK + tl.arange(0, BLOCK)
    number = position - before  # of the new keys
    inside = (number >= 0) & (number < key_length) & (position >= 0) & (position < capacity)
    column = tl.arange(0, C.HEAD_PADDED)[None, :]
    mask = inside[:, None] & (column < C.HEAD)
    head = head_of(key, batch, key_unit % heads)
    pointers = head.data + (tl.cast(number, tl.int64) * head.row_stride)[:, None] + column
    k = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    numbers, key_units, key_errors = rounded_of(k, C)
    place = key_unit * capacity + position
    tl.store(rounded + place[:, None] * C.HEAD + column, numbers, mask=mask)
    tl.store(unit + place, key_units, mask=inside)
    blocks = tl.cdiv(capacity, BLOCK)
    exists = (block >= 0) & (block < blocks)
    largest = tl.load(error + key_unit * blocks + block, mask=exists, other=0.0)
    largest = tl.maximum(largest, tl.max(tl.where(inside, key_errors, 0.0), 0))
    tl.store(error + key_unit * blocks + block, largest, mask=exists)
    if centre is not None:
        kept = (number < 0) & (position >= 0) & (position < capacity)
        kept_numbers = tl.load(
            rounded + place[:, None] * C.HEAD + column, mask=kept[:, None] & (column < C.HEAD), other=0
        )
        kept_units = tl.load(unit + place, mask=kept, other=0.0)
        block_units = tl.where(inside, key_units, kept_units)
        x = tl.where(inside[:, None], numbers, kept_numbers).to(tl.float32) * block_units[:, None]
        is_full = exists & (block * BLOCK + BLOCK <= tl.minimum(before + key_length, capacity))
        is_full = is_full & (tl.sum(block_units, 0) >= 0)  # no unit is NaN
        c, block_radius, missed = bounds_of(x, largest, centre.dtype.element_ty, C)
        pointers = centre + (key_unit * blocks + block) * C.HEAD + tl.arange(0, C.HEAD_PADDED)
        tl.store(pointers, tl.where(is_full, c, 0.0), mask=tl.arange(0, C.HEAD_PADDED) < tl.where(exists, C.HEAD, 0))
        tl.store(radius + key_unit * blocks + block, tl.where(is_full, block_radius, float("inf")), mask=exists)
        tl.store(centre_error + key_unit * blocks + block, tl.where(is_full, missed, float("inf")), mask=exists)


@triton.jit
def bounds_of(x, error, dtype: tl.constexpr, C: tl.constexpr):
    """(centre, radius, centre_error) of a full block of keys that are within `error` of x."""
    mean = tl.sum(x, 0) / BLOCK
    centre = mean.to(dtype)
    c = centre.to(tl.float32)
    radius = tl.max(norm(x - c[None, :], 1), 0)
    missed = tl.max(norm((mean - c)[None, :], 1), 0)
    spare = error + 2.0 * rounding_share(C.HEAD) * (tl.max(norm(c[None, :], 1), 0) + radius)
    return centre, (radius + spare) * NORM_ROUNDING, (missed + spare) * NORM_ROUNDING


@triton.jit
def rounded_of(k, C: tl.constexpr):
    """(rounded, unit, error) of keys in float32. The unit is NaN if a component of the key is not finite."""
    largest = tl.max(tl.where(k == k, tl.abs(k), float("inf")), 1)
    is_finite = largest < float("inf")
    k = tl.where(is_finite[:, None], k, 0.0)
    is_rounded = is_finite & (largest >= SMALLEST_ROUNDED)
    unit = tl.where(is_rounded, largest * (1.0 / LARGEST_ROUNDED), 0.0)
    inverse = tl.where(is_rounded, tl.div_rn(LARGEST_ROUNDED, tl.where(is_rounded, largest, 1.0)), 0.0)
    numbers = tl.floor(k * inverse[:, None] + 0.5)
    error = norm(k - unit[:, None] * numbers, 1) + rounding_share(C.HEAD) * norm(k, 1)
    return numbers.to(tl.int8), tl.where(is_finite, unit, float("nan")), error * NORM_ROUNDING


def append_keys(rounded_keys: RoundedKeys, key: Tensor, lengths: Tensor) -> None:
    """See backends.Backend."""
    batch, key_heads, length, _ = key.shape
    capacity = rounded_keys.rounded.shape[2]
    if not (key.numel() and capacity):
        return
    slots = ceil_div(length - 1, call.SUMMARY_BLOCK) + 1  # blocks that so many keys may touch
    unmasked = VisibilityArgs(None, None, None, False, length)
    problem = Problem.of(key.shape, key.shape, ScoreOptions(1.5, 1.0), unmasked)
    with device_of(key):
        launches = CallLaunches.of(problem, key.dtype)
        opened, arguments, _ = launches.open((append_kernel,), (aligned(key), lengths, *rounded_keys), None, key.device)
        opened.launch(
            append_kernel, batch * key_heads * slots, schedule.append_settings, *arguments, key_heads, length, capacity,
            slots,
        )  # fmt: skip

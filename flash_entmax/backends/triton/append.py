"""Keys in 8 bits: a key k is rounded to `unit * rounded`, with unit = max |k| / 127 of its own.

A block of keys keeps the largest of

    |k - unit * rounded| + rounding_share |k|

By Cauchy and Schwarz, |query| times this bounds how far a score by the 8 bits is from the score by the key. The second
term is for the rounding of the query and of float32. Each program has a block of its own, so no two of them write to
one number.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...core import call
from ...core.call import Problem, RoundedKeys, ScoreOptions, VisibilityArgs
from ...core.tensors import ceil_div
from . import schedule
from .attention import CallLaunches
from .bound import NORM_ROUNDING, norm
from .tile import UNSPECIALIZED, aligned, device_of, head_of

BLOCK = tl.constexpr(call.SUMMARY_BLOCK)
LARGEST_ROUNDED = tl.constexpr(call.LARGEST_ROUNDED)
SMALLEST_ROUNDED = tl.constexpr(call.SMALLEST_ROUNDED)
rounding_share = triton.constexpr_function(call.rounding_share)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def append_kernel(key, lengths, rounded, unit, error, heads, key_length, capacity, slots, C: tl.constexpr):
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

"""One row of a matrix, and the threshold of its entmax.

A row is read whole once. The maxima of its segments, of SEGMENT entries each, stay on the chip. They are a subset of
the row, so Newton's steps on them certify an offset at or above the true one, and the segments that hold no support.
The steps to the exact threshold, and the output, read the other segments only.

One program takes one row at a time. A row that fits is resident: it stays in the program's registers. Of a longer row
the program keeps the maxima, in its own line of `maxima`. In the names of ../torch/rows.py:

    z_scale = alpha - 1 = 1 / exponent      d = [z_scale (x - maximum) + offset]_+      p = u [d + last_step]_+
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.tensors import ceil_div
from ...core.threshold import power_of_alpha
from .alpha import certified_step, newton_step, probability, probability_and_weight, support_weight

LONGEST_SEGMENT = 64
MOST_SEGMENTS = 128  # that a program reads at a time: 8,192 entries, the longest row that is resident
MOST_PLACES = 2048  # maxima that a program reads at a time
WARPS_PER_MULTIPROCESSOR = 64  # of all programs together, where each needs a line of maxima

CERTIFY_STEPS = tl.constexpr(3)
MAX_STEPS = tl.constexpr(40)


@dataclass(frozen=True)
class RowConfig:
    """Everything that the kernels are compiled for."""

    SEGMENT: int
    SEGMENTS: int
    PLACES: int
    POWER: int  # 1 / (alpha - 1) where that is a whole number up to 16, else 0
    PER_ROW: bool  # the exponent 1 / (alpha - 1) is a tensor (rows,)
    TOLERANCE: float  # the largest F - 1 at which the last step is made on the output itself
    RESIDENT: bool  # SEGMENTS hold the whole row, which stays in registers
    TARGET: int = 0  # CLASSES (rows,), or PROBABILITIES (rows, n)
    SMOOTHED: bool = False
    NEEDS_GRAD_ALPHA: bool = False

    @property
    def warps(self) -> int:
        return max(1, min(16, self.SEGMENT * self.SEGMENTS // (1024 if self.RESIDENT else 512)))


class Row(NamedTuple):
    """One row: a pointer to it, its length, the maxima of its segments, and its entries.

    If the row is not resident, `maxima` and `entries` are both the pointer to the program's line of maxima.
    """

    data: Tensor
    n: int
    maxima: Tensor
    entries: Tensor


@triton.jit
def exponent_of(exponent, row, C: tl.constexpr):
    return tl.load(exponent + row) if C.PER_ROW else exponent


@triton.jit
def columns_of(first, C: tl.constexpr):
    """(SEGMENTS, SEGMENT): the columns of a span, which starts at column `first`."""
    return first + tl.arange(0, C.SEGMENTS)[:, None] * C.SEGMENT + tl.arange(0, C.SEGMENT)[None, :]


@triton.jit
def filled(value, C: tl.constexpr):
    """(SEGMENTS, SEGMENT) of one value."""
    SEGMENTS: tl.constexpr = C.SEGMENTS
    SEGMENT: tl.constexpr = C.SEGMENT
    return tl.full((SEGMENTS, SEGMENT), value, tl.float32)


@triton.jit
def segments_of(row, first, C: tl.constexpr):
    """(pointers, mask) of the maxima of a span's segments."""
    column = first + tl.arange(0, C.SEGMENTS) * C.SEGMENT
    return row.maxima + column // C.SEGMENT, column < row.n


@triton.jit
def load_span(data, first, n, C: tl.constexpr):
    """The entries of a span; -inf beyond the row."""
    columns = columns_of(first, C)
    return tl.load(data + columns, mask=columns < n, other=float("-inf")).to(tl.float32)


@triton.jit
def scan_row(row, C: tl.constexpr):
    """Store the maxima of the segments. Return the row's maximum: NaN where an entry is NaN or +inf; +inf where every
    entry is -inf."""
    if C.RESIDENT:
        highest = row.entries
    else:
        highest = filled(float("-inf"), C)
        for first in range(0, row.n, C.SEGMENTS * C.SEGMENT):
            x = load_span(row.data, first, row.n, C)
            pointers, inside = segments_of(row, first, C)
            tl.store(pointers, tl.max(x, 1), mask=inside)
            highest = tl.maximum(highest, x, propagate_nan=tl.PropagateNan.ALL)
        tl.debug_barrier()  # every thread sees the maxima from here on
    invalid = tl.sum(tl.where(highest < float("inf"), 0, 1))
    maximum = tl.max(highest)
    maximum = tl.where(maximum == float("-inf"), float("inf"), maximum)
    return tl.where(invalid > 0, float("nan"), maximum)


@triton.jit
def maxima_from(row, first, segments, C: tl.constexpr):
    """(PLACES,) maxima, from that of segment number `first` on."""
    if C.RESIDENT:
        maxima = row.maxima
    else:
        place = first + tl.arange(0, C.PLACES)
        maxima = tl.load(row.maxima + place, mask=place < segments, other=float("-inf")).to(tl.float32)
    return maxima


@triton.jit
def certify_row(row, maximum, z_scale, exponent, C: tl.constexpr):
    """An offset at or above the true one, by Newton's steps on the maxima of segments."""
    PLACES: tl.constexpr = C.PLACES
    offset = 1.0
    segments = tl.cdiv(row.n, C.SEGMENT)
    for _ in range(CERTIFY_STEPS):
        total = tl.zeros((PLACES,), tl.float32)
        weight = tl.zeros((PLACES,), tl.float32)
        for first in range(0, segments, PLACES):
            d = tl.maximum((maxima_from(row, first, segments, C) - maximum) * z_scale + offset, 0.0)
            total += probability(d, exponent, C.POWER)
            weight += support_weight(d, exponent, C.POWER)
        offset = certified_step(offset, tl.sum(total, 0), tl.sum(weight, 0), exponent, tl.cdiv(segments, PLACES))
    return offset


@triton.jit
def load_live(row, first, maximum, z_scale, offset, C: tl.constexpr):
    """(x, d) of a span. Segments that hold no support are not read: -inf and 0. NaN counts as support."""
    if C.RESIDENT:
        x = row.entries
    else:
        columns = columns_of(first, C)
        pointers, inside = segments_of(row, first, C)
        maxima = tl.load(pointers, mask=inside, other=float("-inf")).to(tl.float32)
        live = tl.where((maxima - maximum) * z_scale + offset <= 0, 0, 1)[:, None] > 0
        x = tl.load(row.data + columns, mask=live & (columns < row.n), other=float("-inf")).to(tl.float32)
    return x, tl.maximum((x - maximum) * z_scale + offset, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sum_row(row, maximum, z_scale, offset, exponent, C: tl.constexpr):
    """(F, sum u) at an offset."""
    total = filled(0.0, C)
    weight = filled(0.0, C)
    for first in range(0, row.n, C.SEGMENTS * C.SEGMENT):
        _, d = load_live(row, first, maximum, z_scale, offset, C)
        p, u = probability_and_weight(d, exponent, C.POWER, False)
        total += p
        weight += u
    return tl.sum(total), tl.sum(weight)


@triton.jit
def solve_row(row, z_scale, exponent, C: tl.constexpr):
    """(maximum, offset, last_step) of a row. Each step ends at or above the true offset, so no support is lost."""
    maximum = scan_row(row, C)
    offset = certify_row(row, maximum, z_scale, exponent, C)
    total, weight = sum_row(row, maximum, z_scale, offset, exponent, C)
    stepped = newton_step(offset, total, weight, exponent)
    steps = 0
    while (total > 1.0 + C.TOLERANCE) & (stepped < offset) & (steps < MAX_STEPS):
        offset = stepped
        total, weight = sum_row(row, maximum, z_scale, offset, exponent, C)
        stepped = newton_step(offset, total, weight, exponent)
        steps += 1
    return maximum, offset, tl.where(weight == 0, 0.0, (1.0 - total) / weight)


@triton.jit
def final_probability(d, last_step, exponent, C: tl.constexpr):
    """p = u [d + last_step]_+, with u = d^(r - 1)."""
    return support_weight(d, exponent, C.POWER) * tl.maximum(d + last_step, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def open_row(x, maxima, index, n, C: tl.constexpr):
    """The row with its entries, or with this program's line of maxima, which the program's last row needs no more."""
    data = x + tl.cast(index, tl.int64) * n
    if C.RESIDENT:
        entries = load_span(data, 0, n, C)
        row = Row(data, n, tl.max(entries, 1), entries)
    else:
        tl.debug_barrier()
        line = maxima + tl.cast(tl.program_id(0), tl.int64) * tl.cdiv(n, C.SEGMENT)
        row = Row(data, n, line, line)
    return row


def config_of(x: Tensor, alphas: Tensor | None, alpha: float, **options: bool) -> RowConfig:
    segment = min(LONGEST_SEGMENT, triton.next_power_of_2(x.shape[1]))
    segments = triton.next_power_of_2(ceil_div(x.shape[1], segment))
    return RowConfig(
        SEGMENT=segment,
        SEGMENTS=min(MOST_SEGMENTS, segments),
        PLACES=min(MOST_PLACES, segments),
        RESIDENT=segments <= MOST_SEGMENTS,
        POWER=power_of_alpha(alpha if alphas is None else None),
        PER_ROW=alphas is not None,
        TOLERANCE=1e-6 if x.dtype == torch.float32 else 1e-4,
        **options,
    )


def exponents_of(alphas: Tensor | None, alpha: float) -> Tensor | float:
    return 1.0 / (alpha - 1.0) if alphas is None else 1.0 / (alphas - 1.0)


def programs_with_maxima(x: Tensor, config: RowConfig) -> tuple[int, Tensor]:
    """(how many programs share the rows, a line of maxima for each program). Resident rows need no lines."""
    if config.RESIDENT:
        return x.shape[0], x.new_empty(0)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = min(x.shape[0], WARPS_PER_MULTIPROCESSOR // config.warps * processors)
    return programs, x.new_empty(programs, ceil_div(x.shape[1], config.SEGMENT))

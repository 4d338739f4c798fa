"""One row of a matrix, and the threshold of its entmax.

A row is read whole once. Its maxima over segments of SEGMENT entries stay on the chip; being a subset of the row, they
certify by Newton's steps an offset at or above the true one, and with it the segments that hold no support. The steps
to the exact threshold, and the output, then read the other segments only. One program takes one row at a time. A row
that fits stays in its registers; of a longer one it keeps the maxima, in its own line of `maxima`.

In the names of ../rows.py:  d = [slope (x - top) + offset]_+,  p = u (d + lift),  slope = alpha - 1,  r = 1 / slope.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.tensors import ceil_div
from .alpha import newton_step, probability, probability_and_weight, support_weight

LONGEST_SEGMENT = 64
MOST_SEGMENTS = 128  # that a program looks at together: 8,192 entries, the longest row that stays in registers
MOST_PLACES = 2048  # maxima that it looks at together
WARPS = 64  # of the programs that share a multiprocessor, where each needs a line of maxima

CERTIFY_STEPS = tl.constexpr(3)
MAX_STEPS = tl.constexpr(40)


@dataclass(frozen=True)
class RowShape:
    """Everything that the kernels are compiled for."""

    SEGMENT: int
    SEGMENTS: int
    PLACES: int
    POWER: int  # 1 / (alpha - 1) where it is 1 or 2, else 0
    PER_ROW: bool  # the exponent 1 / (alpha - 1) is a tensor of one number for each row
    SOLVED: float  # F - 1 up to which one more step is made on the output itself
    RESIDENT: bool  # the segments are all that there are, and stay in registers
    TARGET: int = 0  # CLASSES (rows,), or PROBABILITIES (rows, n)
    SMOOTHED: bool = False
    OF_ALPHA: bool = False  # the gradient of alpha is asked for

    @property
    def warps(self) -> int:
        return max(1, min(16, self.SEGMENT * self.SEGMENTS // (1024 if self.RESIDENT else 512)))


class Row(NamedTuple):
    """One row: where it stands, its length, its maxima by segment, and its entries.

    Of a row that is not resident, the maxima are a pointer to the program's line for them, and so is `held`.
    """

    data: Tensor
    n: int
    maxima: Tensor
    held: Tensor


@triton.jit
def exponent_of(exponent, row, S: tl.constexpr):
    return tl.load(exponent + row) if S.PER_ROW else exponent


@triton.jit
def columns_of(first, S: tl.constexpr):
    """(SEGMENTS, SEGMENT): the columns of the segments from column `first` on."""
    return first + tl.arange(0, S.SEGMENTS)[:, None] * S.SEGMENT + tl.arange(0, S.SEGMENT)[None, :]


@triton.jit
def filled(value, S: tl.constexpr):
    SEGMENTS: tl.constexpr = S.SEGMENTS
    SEGMENT: tl.constexpr = S.SEGMENT
    return tl.full((SEGMENTS, SEGMENT), value, tl.float32)


@triton.jit
def segments_of(row, first, S: tl.constexpr):
    """(pointers, mask): where the maxima of the segments from column `first` on stand."""
    column = first + tl.arange(0, S.SEGMENTS) * S.SEGMENT
    return row.maxima + column // S.SEGMENT, column < row.n


@triton.jit
def load_span(data, first, n, S: tl.constexpr):
    """The entries of the segments from column `first` on; -inf beyond the row."""
    columns = columns_of(first, S)
    return tl.load(data + columns, mask=columns < n, other=float("-inf")).to(tl.float32)


@triton.jit
def scan_row(row, S: tl.constexpr):
    """The row's maximum, after its segments' are stored: NaN where an entry is NaN or +inf; +inf where all are -inf."""
    if S.RESIDENT:
        peak = row.held
    else:
        peak = filled(float("-inf"), S)
        for first in range(0, row.n, S.SEGMENTS * S.SEGMENT):
            x = load_span(row.data, first, row.n, S)
            pointers, inside = segments_of(row, first, S)
            tl.store(pointers, tl.max(x, 1), mask=inside)
            peak = tl.maximum(peak, x, propagate_nan=tl.PropagateNan.ALL)
        tl.debug_barrier()  # the maxima are there for all
    odd = tl.sum(tl.where(peak < float("inf"), 0, 1))
    top = tl.max(peak)
    top = tl.where(top == float("-inf"), float("inf"), top)
    return tl.where(odd > 0, float("nan"), top)


@triton.jit
def maxima_from(row, first, segments, S: tl.constexpr):
    """(PLACES,) from the segment number `first` on."""
    if S.RESIDENT:
        maxima = row.maxima
    else:
        place = first + tl.arange(0, S.PLACES)
        maxima = tl.load(row.maxima + place, mask=place < segments, other=float("-inf")).to(tl.float32)
    return maxima


@triton.jit
def certify_row(row, top, slope, exponent, S: tl.constexpr):
    """An offset at or above the true one, by steps on the maxima of segments."""
    PLACES: tl.constexpr = S.PLACES
    offset = 1.0
    segments = tl.cdiv(row.n, S.SEGMENT)
    # A step is rounded relative to the offset that it starts from: by 2^-24 for each span of maxima, added one after
    # the other, and by less than 2^-17 for the powers and the sum over a span.
    rounding = (tl.cdiv(segments, PLACES) + 64) * 2.0**-22
    for _ in range(CERTIFY_STEPS):
        total = tl.zeros((PLACES,), tl.float32)
        weight = tl.zeros((PLACES,), tl.float32)
        for first in range(0, segments, PLACES):
            d = tl.maximum((maxima_from(row, first, segments, S) - top) * slope + offset, 0.0)
            total += probability(d, exponent, S.POWER)
            weight += support_weight(d, exponent, S.POWER)
        stepped = newton_step(offset, tl.sum(total, 0), tl.sum(weight, 0), exponent) + offset * rounding
        offset = tl.where(stepped < offset, stepped, offset)
    return offset


@triton.jit
def load_live(row, first, top, slope, offset, S: tl.constexpr):
    """(x, d) of the segments that may hold support, NaN included; of the others -inf and 0, without a look at them."""
    if S.RESIDENT:
        x = row.held
    else:
        columns = columns_of(first, S)
        pointers, inside = segments_of(row, first, S)
        maxima = tl.load(pointers, mask=inside, other=float("-inf")).to(tl.float32)
        live = tl.where((maxima - top) * slope + offset <= 0, 0, 1)[:, None] > 0
        x = tl.load(row.data + columns, mask=live & (columns < row.n), other=float("-inf")).to(tl.float32)
    return x, tl.maximum((x - top) * slope + offset, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sum_row(row, top, slope, offset, exponent, S: tl.constexpr):
    """(F, sum u) at an offset."""
    total = filled(0.0, S)
    weight = filled(0.0, S)
    for first in range(0, row.n, S.SEGMENTS * S.SEGMENT):
        _, d = load_live(row, first, top, slope, offset, S)
        p, u = probability_and_weight(d, exponent, S.POWER, False)
        total += p
        weight += u
    return tl.sum(total), tl.sum(weight)


@triton.jit
def solve_row(row, slope, exponent, S: tl.constexpr):
    """(top, offset, lift) of a row; each step ends at or above the true offset, so that no segment is lost."""
    top = scan_row(row, S)
    offset = certify_row(row, top, slope, exponent, S)
    total, weight = sum_row(row, top, slope, offset, exponent, S)
    stepped = newton_step(offset, total, weight, exponent)
    steps = 0
    while (total > 1.0 + S.SOLVED) & (stepped < offset) & (steps < MAX_STEPS):
        offset = stepped
        total, weight = sum_row(row, top, slope, offset, exponent, S)
        stepped = newton_step(offset, total, weight, exponent)
        steps += 1
    return top, offset, tl.where(weight == 0, 0.0, (1.0 - total) / weight)


@triton.jit
def lifted(d, lift, exponent, S: tl.constexpr):
    return support_weight(d, exponent, S.POWER) * tl.maximum(d + lift, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def open_row(x, maxima, index, n, S: tl.constexpr):
    """The row, with its entries, or with this program's line for its maxima, which its last row is done with."""
    data = x + tl.cast(index, tl.int64) * n
    if S.RESIDENT:
        held = load_span(data, 0, n, S)
        row = Row(data, n, tl.max(held, 1), held)
    else:
        tl.debug_barrier()
        line = maxima + tl.cast(tl.program_id(0), tl.int64) * tl.cdiv(n, S.SEGMENT)
        row = Row(data, n, line, line)
    return row


def shape_of(x: Tensor, alphas: Tensor | None, alpha: float, **options: bool) -> RowShape:
    segment = min(LONGEST_SEGMENT, triton.next_power_of_2(x.shape[1]))
    segments = triton.next_power_of_2(ceil_div(x.shape[1], segment))
    return RowShape(
        SEGMENT=segment,
        SEGMENTS=min(MOST_SEGMENTS, segments),
        PLACES=min(MOST_PLACES, segments),
        RESIDENT=segments <= MOST_SEGMENTS,
        POWER=0 if alphas is not None else {2.0: 1, 1.5: 2}.get(alpha, 0),
        PER_ROW=alphas is not None,
        SOLVED=1e-6 if x.dtype == torch.float32 else 1e-4,
        **options,
    )


def exponents_of(alphas: Tensor | None, alpha: float) -> Tensor | float:
    return 1.0 / (alpha - 1.0) if alphas is None else 1.0 / (alphas - 1.0)


def programs_with_maxima(x: Tensor, shape: RowShape) -> tuple[int, Tensor]:
    """How many programs share the rows, and a line for each of them; resident rows need none."""
    if shape.RESIDENT:
        return x.shape[0], x.new_empty(0)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = min(x.shape[0], WARPS // shape.warps * processors)
    return programs, x.new_empty(programs, ceil_div(x.shape[1], shape.SEGMENT))

"""Entmax along the rows of a matrix: probabilities, Fenchel-Young losses, and the gradients of both.

A row is read whole once. Its maxima over segments of SEGMENT entries stay on the chip; being a subset of the row, they
certify by Newton's steps an offset at or above the true one, and with it the segments that hold no support. The steps
to the exact threshold, and the output, then read the other segments only. One program takes one row at a time. A row
that fits stays in its registers; of a longer one it keeps the maxima, in its own line of `maxima`.

In the names of rows.py:  d = [slope (x - top) + offset]_+,  p = u (d + lift),  slope = alpha - 1,  r = 1 / slope.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import ceil_div
from ..rows import Target, smoothed_entropy
from .alpha import newton_step, probability, probability_and_weight, support_weight, weight_of_probability
from .tile import device_of

LONGEST_SEGMENT = 64
MOST_SEGMENTS = 128  # that a program looks at together: 8,192 entries, the longest row that stays in registers
MOST_PLACES = 2048  # maxima that it looks at together
WARPS = 64  # of the programs that share a multiprocessor, where each needs a line of maxima
CLASSES, PROBABILITIES = tl.constexpr(1), tl.constexpr(2)  # what the target of a loss may be

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
def sum_of(entries):
    return tl.sum(entries)


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
    odd = sum_of(tl.where(peak < float("inf"), 0, 1))
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
        p, u = probability_and_weight(d, exponent, S.POWER)
        total += p
        weight += u
    return sum_of(total), sum_of(weight)


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


@triton.jit(do_not_specialize=["rows"])
def entmax_kernel(x, out, maxima, exponents, rows, n, S: tl.constexpr):
    """p, row by row."""
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = open_row(x, maxima, index, n, S)
        exponent = exponent_of(exponents, index, S)
        slope = 1.0 / exponent
        top, offset, lift = solve_row(row, slope, exponent, S)
        result = out + tl.cast(index, tl.int64) * n
        for first in range(0, n, S.SEGMENTS * S.SEGMENT):
            _, d = load_live(row, first, top, slope, offset, S)
            columns = columns_of(first, S)
            tl.store(result + columns, lifted(d, lift, exponent, S).to(out.dtype.element_ty), mask=columns < n)


@triton.jit(do_not_specialize=["rows"])
def entmax_backward_kernel(grad, p, grad_x, grad_alpha, exponents, rows, n, S: tl.constexpr):
    """dx = u (g - mean), mean = sum u g / sum u;  d alpha = r^2 sum p (g - mean)(1 - ln(p) / r)."""
    index = tl.program_id(0)
    start = tl.cast(index, tl.int64) * n
    exponent = exponent_of(exponents, index, S)
    weight = filled(0.0, S)
    moment = filled(0.0, S)
    held = load_gradient(grad + start, p + start, 0, n, exponent, S)
    for first in range(0, n, S.SEGMENTS * S.SEGMENT):
        _, g, u = held if S.RESIDENT else load_gradient(grad + start, p + start, first, n, exponent, S)
        weight += u
        moment += u * g
    whole = sum_of(weight)
    mean = tl.where(whole == 0, 0.0, sum_of(moment) / whole)
    bend = filled(0.0, S)
    for first in range(0, n, S.SEGMENTS * S.SEGMENT):
        of_p, g, u = held if S.RESIDENT else load_gradient(grad + start, p + start, first, n, exponent, S)
        columns = columns_of(first, S)
        tl.store(grad_x + start + columns, (u * (g - mean)).to(grad_x.dtype.element_ty), mask=columns < n)
        if S.OF_ALPHA:
            bend += tl.where(of_p == 0, 0.0, of_p * (g - mean) * (1.0 - tl.log(of_p) / exponent))
    if S.OF_ALPHA:
        tl.store(grad_alpha + index, sum_of(bend) * exponent * exponent)


@triton.jit
def load_gradient(grad, p, first, n, exponent, S: tl.constexpr):
    """(p, g, u); the gradient of what has probability 0 is not looked at."""
    columns = columns_of(first, S)
    of_p = tl.load(p + columns, mask=columns < n, other=0.0).to(tl.float32)
    g = tl.load(grad + columns, mask=(columns < n) & (of_p != 0), other=0.0).to(tl.float32)
    return of_p, g, weight_of_probability(of_p, exponent, S.POWER)


@triton.jit(do_not_specialize=["rows", "ignored"])
def loss_kernel(x, losses, state, maxima, aim, ignored, smoothing, entropy, exponents, rows, n, S: tl.constexpr):
    """Loss of each row and (3, rows) what it was solved to. See `loss` in rows.py for the formula."""
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        own, kept = class_of(aim, index, ignored, S)
        if kept:
            row = open_row(x, maxima, index, n, S)
            exponent = exponent_of(exponents, index, S)
            slope = 1.0 / exponent
            top, offset, lift = solve_row(row, slope, exponent, S)
            energy = filled(0.0, S)
            for first in range(0, n, S.SEGMENTS * S.SEGMENT):
                of_x, d = load_live(row, first, top, slope, offset, S)
                p = lifted(d, lift, exponent, S)
                energy += tl.where(p == 0, 0.0, p * (of_x - top))
            alpha = 1.0 + slope
            loss = sum_of(energy) * (1.0 - 1.0 / alpha)
            loss += (1.0 - offset - lift * slope) / (alpha * slope)
            if S.TARGET == CLASSES:
                loss += entropy - (1.0 - smoothing) * (tl.load(row.data + own).to(tl.float32) - top)
            else:
                loss -= (1.0 - smoothing) * expected(row, aim + tl.cast(index, tl.int64) * n, top, S)
            if S.SMOOTHED:
                loss -= smoothing * mean_of(row, top, S)
            tl.store(losses + index, loss)
            tl.store(state + index, top)
            tl.store(state + rows + index, offset)
            tl.store(state + 2 * tl.cast(rows, tl.int64) + index, lift)
        else:
            tl.store(losses + index, 0.0)


@triton.jit
def class_of(aim, row, ignored, S: tl.constexpr):
    """(class, whether the row counts); where the target is probabilities, all rows do."""
    own = tl.load(aim + row) if S.TARGET == CLASSES else tl.full((), -1, tl.int64)
    kept = (own != ignored) if S.TARGET == CLASSES else (own == own)
    return own, kept


@triton.jit
def expected(row, aim, top, S: tl.constexpr):
    """q . (x - top); what has no probability costs nothing, even at -inf."""
    total = filled(0.0, S)
    for first in range(0, row.n, S.SEGMENTS * S.SEGMENT):
        columns = columns_of(first, S)
        q = tl.load(aim + columns, mask=columns < row.n, other=0.0).to(tl.float32)
        x = tl.load(row.data + columns, mask=(columns < row.n) & (q != 0), other=0.0).to(tl.float32)
        total += tl.where(q == 0, 0.0, q * (x - top))
    return sum_of(total)


@triton.jit
def mean_of(row, top, S: tl.constexpr):
    """The mean of x - top."""
    total = filled(0.0, S)
    for first in range(0, row.n, S.SEGMENTS * S.SEGMENT):
        x = row.held if S.RESIDENT else load_span(row.data, first, row.n, S)
        total += tl.where(columns_of(first, S) < row.n, x - top, 0.0)
    return sum_of(total) / row.n


@triton.jit(do_not_specialize=["rows", "ignored"])
def loss_backward_kernel(
    grad, x, grad_x, state, aim, ignored, smoothing, exponents, rows, n, S: tl.constexpr
):  # fmt: skip
    """dx = g (p - q), with p from x again."""
    index = tl.program_id(0)
    start = tl.cast(index, tl.int64) * n
    own, kept = class_of(aim, index, ignored, S)
    exponent = exponent_of(exponents, index, S)
    slope = 1.0 / exponent
    g = tl.where(kept, tl.load(grad + index), 0.0)
    seen = tl.where(kept, n, 0)
    top = tl.load(state + index)
    offset = tl.load(state + rows + index)
    lift = tl.load(state + 2 * tl.cast(rows, tl.int64) + index)
    for first in range(0, n, S.SEGMENTS * S.SEGMENT):
        columns = columns_of(first, S)
        of_x = tl.load(x + start + columns, mask=columns < seen, other=float("-inf")).to(tl.float32)
        d = tl.maximum((of_x - top) * slope + offset, 0.0, propagate_nan=tl.PropagateNan.ALL)
        difference = lifted(d, lift, exponent, S)
        if S.TARGET == CLASSES:
            difference -= tl.where(columns == own, 1.0 - smoothing, 0.0)
        else:
            q = tl.load(aim + start + columns, mask=columns < n, other=0.0).to(tl.float32)
            difference -= (1.0 - smoothing) * q
        if S.SMOOTHED:
            difference -= smoothing / n
        dx = tl.where(kept, g * difference, 0.0)
        tl.store(grad_x + start + columns, dx.to(grad_x.dtype.element_ty), mask=columns < n)


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


def launch(kernel, programs: int, shape: RowShape, *arguments) -> None:
    with device_of(arguments[0]):
        kernel[(programs,)](*arguments, S=shape, num_warps=shape.warps)


def entmax(x: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    """Arguments and results of this function, and of those below, are those of their namesakes in rows.py."""
    shape, out = shape_of(x, alphas, alpha), torch.empty_like(x)
    programs, maxima = programs_with_maxima(x, shape)
    launch(entmax_kernel, programs, shape, x, out, maxima, exponents_of(alphas, alpha), *x.shape)
    return out


def entmax_backward(
    grad: Tensor, p: Tensor, alphas: Tensor | None, alpha: float, of_alpha: bool
) -> tuple[Tensor, Tensor]:
    shape = shape_of(p, alphas, alpha, OF_ALPHA=of_alpha)
    grad_x, grad_alpha = torch.empty_like(p), p.new_empty(p.shape[0] if of_alpha else 0, dtype=torch.float32)
    arguments = grad, p, grad_x, grad_alpha, exponents_of(alphas, alpha), *p.shape
    launch(entmax_backward_kernel, p.shape[0], shape, *arguments)
    return grad_x, grad_alpha


def loss(x: Tensor, target: Target, alpha: float) -> tuple[Tensor, Tensor]:
    shape = loss_shape(x, target, alpha)
    losses, state = x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(3, x.shape[0], dtype=torch.float32)
    programs, maxima = programs_with_maxima(x, shape)
    entropy = smoothed_entropy(target.smoothing, x.shape[1], alpha)
    arguments = x, losses, state, maxima, *target, entropy, exponents_of(None, alpha), *x.shape
    launch(loss_kernel, programs, shape, *arguments)
    return losses, state


def loss_backward(grad: Tensor, x: Tensor, target: Target, state: Tensor, alpha: float) -> Tensor:
    shape, grad_x = loss_shape(x, target, alpha), torch.empty_like(x)
    arguments = grad, x, grad_x, state, *target, exponents_of(None, alpha), *x.shape
    launch(loss_backward_kernel, x.shape[0], shape, *arguments)
    return grad_x


def loss_shape(x: Tensor, target: Target, alpha: float) -> RowShape:
    kind = CLASSES if target.is_class else PROBABILITIES
    return shape_of(x, None, alpha, TARGET=kind.value, SMOOTHED=target.smoothing > 0)

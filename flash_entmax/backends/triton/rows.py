"""Entmax along the rows of a matrix: probabilities, Fenchel-Young losses, and the gradients of both.

One program takes one row at a time; how a row is read and solved, row.py has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch.rows import Target, smoothed_entropy
from .alpha import weight_of_probability
from .row_solve import (
    RowShape,
    columns_of,
    exponent_of,
    exponents_of,
    filled,
    lifted,
    load_live,
    load_span,
    open_row,
    programs_with_maxima,
    shape_of,
    solve_row,
)
from .tile import device_of

CLASSES, PROBABILITIES = tl.constexpr(1), tl.constexpr(2)  # what the target of a loss may be


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
    whole = tl.sum(weight)
    mean = tl.where(whole == 0, 0.0, tl.sum(moment) / whole)
    bend = filled(0.0, S)
    for first in range(0, n, S.SEGMENTS * S.SEGMENT):
        of_p, g, u = held if S.RESIDENT else load_gradient(grad + start, p + start, first, n, exponent, S)
        columns = columns_of(first, S)
        dx = tl.where(u == 0, 0.0, u * (g - mean))  # 0 also where the mean is NaN
        tl.store(grad_x + start + columns, dx.to(grad_x.dtype.element_ty), mask=columns < n)
        if S.OF_ALPHA:
            bend += tl.where(of_p == 0, 0.0, of_p * (g - mean) * (1.0 - tl.log(of_p) / exponent))
    if S.OF_ALPHA:
        tl.store(grad_alpha + index, tl.sum(bend) * exponent * exponent)


@triton.jit
def load_gradient(grad, p, first, n, exponent, S: tl.constexpr):
    """(p, g, u); the gradient of what has probability 0 is not looked at."""
    columns = columns_of(first, S)
    of_p = tl.load(p + columns, mask=columns < n, other=0.0).to(tl.float32)
    g = tl.load(grad + columns, mask=(columns < n) & (of_p != 0), other=0.0).to(tl.float32)
    return of_p, g, weight_of_probability(of_p, exponent, S.POWER)


@triton.jit(do_not_specialize=["rows", "ignored"])
def loss_kernel(x, losses, state, maxima, aim, ignored, smoothing, entropy, exponents, rows, n, S: tl.constexpr):
    """Loss of each row and (3, rows) what it was solved to. See `loss` in ../rows.py for the formula."""
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
            loss = tl.sum(energy) * (1.0 - 1.0 / alpha)
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
    return tl.sum(total)


@triton.jit
def mean_of(row, top, S: tl.constexpr):
    """The mean of x - top."""
    total = filled(0.0, S)
    for first in range(0, row.n, S.SEGMENTS * S.SEGMENT):
        x = row.held if S.RESIDENT else load_span(row.data, first, row.n, S)
        total += tl.where(columns_of(first, S) < row.n, x - top, 0.0)
    return tl.sum(total) / row.n


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
        counts = kept & ((of_x != float("-inf")) | (difference != 0))
        dx = tl.where(counts, g * difference, 0.0)
        tl.store(grad_x + start + columns, dx.to(grad_x.dtype.element_ty), mask=columns < n)


def launch(kernel, programs: int, shape: RowShape, *arguments) -> None:
    with device_of(arguments[0]):
        kernel[(programs,)](*arguments, S=shape, num_warps=shape.warps)


def entmax(x: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    """Arguments and results of this function, and of those below, are those of their namesakes in ../rows.py."""
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

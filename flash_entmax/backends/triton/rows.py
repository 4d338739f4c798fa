"""Entmax along the rows of a matrix: probabilities, Fenchel-Young losses, and the gradients of both.

One program takes one row at a time. row_solve.py reads a row and solves it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.loss import LossOptions, holds_classes, smoothed_entropy
from .alpha import weight_of_probability
from .row_solve import (
    RowConfig,
    columns_of,
    config_of,
    exponent_of,
    exponents_of,
    filled,
    final_probability,
    load_live,
    load_span,
    open_row,
    programs_with_maxima,
    solve_row,
)
from .tile import device_of

CLASSES, PROBABILITIES = tl.constexpr(1), tl.constexpr(2)  # what the target of a loss may hold


@triton.jit(do_not_specialize=["rows"])
def entmax_kernel(x, result, maxima, exponents, rows, n, C: tl.constexpr):
    """p, row by row."""
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = open_row(x, maxima, index, n, C)
        exponent = exponent_of(exponents, index, C)
        z_scale = 1.0 / exponent
        maximum, offset, last_step = solve_row(row, z_scale, exponent, C)
        row_result = result + tl.cast(index, tl.int64) * n
        for first in range(0, n, C.SEGMENTS * C.SEGMENT):
            _, d = load_live(row, first, maximum, z_scale, offset, C)
            columns = columns_of(first, C)
            inside, pointers = columns < n, row_result + columns
            p = final_probability(d, last_step, exponent, C)
            tl.store(pointers, p.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def entmax_backward_kernel(grad, probabilities, grad_x, grad_alpha, exponents, rows, n, C: tl.constexpr):
    """dx = u (g - mean), mean = sum u g / sum u;  d alpha = r^2 sum p (g - mean)(1 - ln(p) / r)."""
    index = tl.program_id(0)
    start = tl.cast(index, tl.int64) * n
    exponent = exponent_of(exponents, index, C)
    weight = filled(0.0, C)
    moment = filled(0.0, C)
    resident = load_gradient(grad + start, probabilities + start, 0, n, exponent, C)
    for first in range(0, n, C.SEGMENTS * C.SEGMENT):
        _, g, u = resident if C.RESIDENT else load_gradient(grad + start, probabilities + start, first, n, exponent, C)
        weight += u
        moment += u * g
    total_weight = tl.sum(weight)
    mean = tl.where(total_weight == 0, 0.0, tl.sum(moment) / total_weight)
    alpha_terms = filled(0.0, C)
    for first in range(0, n, C.SEGMENTS * C.SEGMENT):
        p, g, u = resident if C.RESIDENT else load_gradient(grad + start, probabilities + start, first, n, exponent, C)
        columns = columns_of(first, C)
        dx = tl.where(u == 0, 0.0, u * (g - mean))  # 0 also where the mean is NaN
        tl.store(grad_x + start + columns, dx.to(grad_x.dtype.element_ty), mask=columns < n)
        if C.NEEDS_GRAD_ALPHA:
            alpha_terms += tl.where(p == 0, 0.0, p * (g - mean) * (1.0 - tl.log(p) / exponent))
    if C.NEEDS_GRAD_ALPHA:
        tl.store(grad_alpha + index, tl.sum(alpha_terms) * exponent * exponent)


@triton.jit
def load_gradient(grad, probabilities, first, n, exponent, C: tl.constexpr):
    """(p, g, u). Where the probability is 0, the gradient is not read."""
    columns = columns_of(first, C)
    p = tl.load(probabilities + columns, mask=columns < n, other=0.0).to(tl.float32)
    g = tl.load(grad + columns, mask=(columns < n) & (p != 0), other=0.0).to(tl.float32)
    return p, g, weight_of_probability(p, exponent, C.POWER)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def loss_kernel(
    x, losses, state, maxima, target, ignore_index, smoothing, entropy, exponents, rows, n, C: tl.constexpr
):  # fmt: skip
    """The loss of each row, and its state (3, rows). `loss` in ../torch/rows.py has the formula."""
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        target_class, counts = class_of(target, index, ignore_index, C)
        if counts:
            row = open_row(x, maxima, index, n, C)
            exponent = exponent_of(exponents, index, C)
            z_scale = 1.0 / exponent
            maximum, offset, last_step = solve_row(row, z_scale, exponent, C)
            energy = filled(0.0, C)
            for first in range(0, n, C.SEGMENTS * C.SEGMENT):
                entries, d = load_live(row, first, maximum, z_scale, offset, C)
                p = final_probability(d, last_step, exponent, C)
                energy += tl.where(p == 0, 0.0, p * (entries - maximum))
            alpha = 1.0 + z_scale
            loss = tl.sum(energy) * (1.0 - 1.0 / alpha)
            loss += (1.0 - offset - last_step * z_scale) / (alpha * z_scale)
            if C.TARGET == CLASSES:
                target_score = tl.load(row.data + target_class).to(tl.float32) - maximum
                loss += entropy - (1.0 - smoothing) * target_score
            else:
                loss -= (1.0 - smoothing) * expected_score(row, target + tl.cast(index, tl.int64) * n, maximum, C)
            if C.SMOOTHED:
                loss -= smoothing * mean_score(row, maximum, C)
            tl.store(losses + index, loss)
            tl.store(state + index, maximum)
            tl.store(state + rows + index, offset)
            tl.store(state + 2 * tl.cast(rows, tl.int64) + index, last_step)
        else:
            tl.store(losses + index, 0.0)


@triton.jit
def class_of(target, row, ignore_index, C: tl.constexpr):
    """(class, whether the row counts). With a target of probabilities, every row counts."""
    target_class = tl.load(target + row) if C.TARGET == CLASSES else tl.full((), -1, tl.int64)
    counts = (target_class != ignore_index) if C.TARGET == CLASSES else (target_class == target_class)
    return target_class, counts


@triton.jit
def expected_score(row, target, maximum, C: tl.constexpr):
    """q . (x - maximum). Where q is 0, the term is 0, even at x = -inf."""
    total = filled(0.0, C)
    for first in range(0, row.n, C.SEGMENTS * C.SEGMENT):
        columns = columns_of(first, C)
        q = tl.load(target + columns, mask=columns < row.n, other=0.0).to(tl.float32)
        x = tl.load(row.data + columns, mask=(columns < row.n) & (q != 0), other=0.0).to(tl.float32)
        total += tl.where(q == 0, 0.0, q * (x - maximum))
    return tl.sum(total)


@triton.jit
def mean_score(row, maximum, C: tl.constexpr):
    """The mean of x - maximum."""
    total = filled(0.0, C)
    for first in range(0, row.n, C.SEGMENTS * C.SEGMENT):
        x = row.entries if C.RESIDENT else load_span(row.data, first, row.n, C)
        total += tl.where(columns_of(first, C) < row.n, x - maximum, 0.0)
    return tl.sum(total) / row.n


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def loss_backward_kernel(
    grad, x, grad_x, state, target, ignore_index, smoothing, exponents, rows, n, C: tl.constexpr
):  # fmt: skip
    """dx = g (p - q). p is computed again, from x and the row's state."""
    index = tl.program_id(0)
    start = tl.cast(index, tl.int64) * n
    target_class, row_counts = class_of(target, index, ignore_index, C)
    exponent = exponent_of(exponents, index, C)
    z_scale = 1.0 / exponent
    g = tl.where(row_counts, tl.load(grad + index), 0.0)
    length = tl.where(row_counts, n, 0)  # a row that does not count is not read
    maximum = tl.load(state + index)
    offset = tl.load(state + rows + index)
    last_step = tl.load(state + 2 * tl.cast(rows, tl.int64) + index)
    for first in range(0, n, C.SEGMENTS * C.SEGMENT):
        columns = columns_of(first, C)
        entries = tl.load(x + start + columns, mask=columns < length, other=float("-inf")).to(tl.float32)
        d = tl.maximum((entries - maximum) * z_scale + offset, 0.0, propagate_nan=tl.PropagateNan.ALL)
        difference = final_probability(d, last_step, exponent, C)
        if C.TARGET == CLASSES:
            difference -= tl.where(columns == target_class, 1.0 - smoothing, 0.0)
        else:
            q = tl.load(target + start + columns, mask=columns < n, other=0.0).to(tl.float32)
            difference -= (1.0 - smoothing) * q
        if C.SMOOTHED:
            difference -= smoothing / n
        counts = row_counts & ((entries != float("-inf")) | (difference != 0))
        dx = tl.where(counts, g * difference, 0.0)
        tl.store(grad_x + start + columns, dx.to(grad_x.dtype.element_ty), mask=columns < n)


def launch(kernel, programs: int, config: RowConfig, *arguments) -> None:
    with device_of(arguments[0]):
        kernel[(programs,)](*arguments, C=config, num_warps=config.warps)


def entmax(x: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    """This function and those below take and return what their namesakes in ../torch/rows.py do."""
    config, result = config_of(x, alphas, alpha), torch.empty_like(x)
    programs, maxima = programs_with_maxima(x, config)
    launch(entmax_kernel, programs, config, x, result, maxima, exponents_of(alphas, alpha), *x.shape)
    return result


def entmax_backward(
    grad: Tensor, p: Tensor, alphas: Tensor | None, alpha: float, needs_grad_alpha: bool
) -> tuple[Tensor, Tensor]:
    config = config_of(p, alphas, alpha, NEEDS_GRAD_ALPHA=needs_grad_alpha)
    grad_x, grad_alpha = torch.empty_like(p), p.new_empty(p.shape[0] if needs_grad_alpha else 0, dtype=torch.float32)
    arguments = grad, p, grad_x, grad_alpha, exponents_of(alphas, alpha), *p.shape
    launch(entmax_backward_kernel, p.shape[0], config, *arguments)
    return grad_x, grad_alpha


def loss(x: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    config = loss_config(x, target, options)
    losses, state = x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(3, x.shape[0], dtype=torch.float32)
    programs, maxima = programs_with_maxima(x, config)
    entropy = smoothed_entropy(options.smoothing, x.shape[1], options.alpha)
    numbers = options.ignore_index, options.smoothing, entropy, exponents_of(None, options.alpha)
    launch(loss_kernel, programs, config, x, losses, state, maxima, target, *numbers, *x.shape)
    return losses, state


def loss_backward(grad: Tensor, x: Tensor, target: Tensor, state: Tensor, options: LossOptions) -> Tensor:
    config, grad_x = loss_config(x, target, options), torch.empty_like(x)
    numbers = options.ignore_index, options.smoothing, exponents_of(None, options.alpha)
    launch(loss_backward_kernel, x.shape[0], config, grad, x, grad_x, state, target, *numbers, *x.shape)
    return grad_x


def loss_config(x: Tensor, target: Tensor, options: LossOptions) -> RowConfig:
    kind = CLASSES if holds_classes(target) else PROBABILITIES
    return config_of(x, None, options.alpha, TARGET=kind.value, SMOOTHED=options.smoothing > 0)

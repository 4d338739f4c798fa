"""Entmax along the rows of a matrix, in plain PyTorch: for CPU tensors, float64, and any device without Triton.

Rows are (rows, n) and contiguous. Arithmetic is in float32 (float64 for float64 inputs). It takes some rows at a time,
so that no temporary holds more than CHUNK numbers, or one row. With r = 1 / (alpha - 1):

    d_j = [(alpha - 1)(x_j - maximum) + offset]_+      u_j = d_j^(r - 1)      p_j = u_j [d_j + last_step]_+

`maximum` is the row's maximum. `last_step` is Newton's last step, (1 - F) / sum u, next to zero. It is made on the
probabilities themselves, because the offset's rounding exceeds small probabilities. docs/math.md derives all of it.

That is for alpha in [1.01, 2]. any_alpha.py has the others, and rows of many alphas: alpha then is (rows, 1), and the
other two numbers of the state are (ln P, -ln F).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.call import ALPHAS
from ...core.loss import LossOptions, holds_classes, smoothed_entropy
from ...core.tensors import row_dtype
from ...core.threshold import (
    MAX_STEPS,
    certified_offset,
    newton_step,
    probability,
    support_weight,
    tolerance,
    weight_along_alpha,
)
from . import any_alpha

CHUNK = 2**22
SEGMENT = 64
MOST_ALPHAS = 8  # rows of more alphas are solved together


class RowState(NamedTuple):
    """What decides the probabilities of rows: three tensors (rows,)."""

    maximum: Tensor
    offset: Tensor
    last_step: Tensor


def has_offset(alpha: float | Tensor) -> bool:
    """Whether the formulas of this file are for this alpha."""
    return not isinstance(alpha, Tensor) and ALPHAS[0] <= alpha <= ALPHAS[1]


def solve(x: Tensor, alpha: float | Tensor) -> RowState:
    """The state of rows in the dtype of the arithmetic. NaN and +inf make a row NaN. A row of -inf alone gets p = 0.

    Maxima of segments certify a start at or above the true offset. Newton's steps stay at or above it.
    """
    maximum = x.amax(-1)
    maximum = torch.where(maximum == torch.inf, torch.nan, maximum)
    maximum = torch.where(maximum == -torch.inf, torch.inf, maximum)
    if not has_offset(alpha):
        return RowState(maximum, *any_alpha.solve(x, alpha, maximum))
    z = relative(x, maximum, alpha)
    segments = pad(z, (0, -z.shape[-1] % SEGMENT), value=-torch.inf).unflatten(-1, (-1, SEGMENT))
    offset = certified_offset(segments.amax(-1), torch.zeros_like(maximum), alpha)
    for _ in range(MAX_STEPS):
        distance = (z + offset.unsqueeze(-1)).clamp_min_(0)
        total, weight = probability(distance, alpha).sum(-1), support_weight(distance, alpha).sum(-1)
        stepped = newton_step(offset, total, weight, alpha)
        falls = (total > 1 + tolerance(offset)) & (stepped < offset)
        if not falls.any():
            break
        offset = torch.where(falls, stepped, offset)
    return RowState(maximum, offset, torch.where(weight == 0, 0.0, (1.0 - total) / weight))


def relative(x: Tensor, maximum: Tensor, alpha: float) -> Tensor:
    """z - maximum of z, with z = (alpha - 1) x."""
    return (x - maximum.unsqueeze(-1)).mul_(alpha - 1.0)


def probabilities(x: Tensor, state: RowState, alpha: float | Tensor) -> Tensor:
    if not has_offset(alpha):
        return any_alpha.probabilities(x, alpha, *state)
    distance = relative(x, state.maximum, alpha).add_(state.offset.unsqueeze(-1)).clamp_min_(0)
    return support_weight(distance, alpha) * (distance + state.last_step.unsqueeze(-1)).clamp_min_(0)


def weight_of_probability(p: Tensor, alpha: float | Tensor) -> Tensor:
    """u = p^(2 - alpha) on the support, 0 elsewhere."""
    if has_offset(alpha) and alpha == 1.5:
        return p.sqrt()
    if has_offset(alpha) and alpha == 2.0:
        return torch.where(p > 0, 1.0, p)
    return torch.where(p == 0, 0.0, p.pow(2.0 - alpha))


def parts(rows: int, n: int, alphas: Tensor | None, alpha: float) -> Iterator[tuple[slice | Tensor, float | Tensor]]:
    """(indices of rows, their alpha), with at most CHUNK numbers, or one row: rows that share an alpha in [1.01, 2], or
    rows of any alphas, which then are (rows, 1)."""
    most = max(1, CHUNK // max(1, n))
    if alphas is None:
        for first in range(0, rows, most):
            yield slice(first, first + most), alpha
        return
    together = torch.ones_like(alphas, dtype=torch.bool)
    values = alphas.unique()
    if values.numel() <= MOST_ALPHAS:
        for value in filter(has_offset, values.tolist()):
            own = alphas == value
            together &= ~own
            for index in own.nonzero().squeeze(-1).split(most):
                yield index, value
    for index in together.nonzero().squeeze(-1).split(most):
        yield index, alphas[index].unsqueeze(-1)


def entmax(x: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    """(rows, n) probabilities in the dtype of x. `alphas` are (rows,); if there are none, every row has `alpha`."""
    result = torch.empty_like(x)
    for index, value in parts(*x.shape, alphas, alpha):
        part = x[index].to(row_dtype(x))
        result[index] = probabilities(part, solve(part, value), value).to(x.dtype)
    return result


def entmax_backward(
    grad: Tensor, p: Tensor, alphas: Tensor | None, alpha: float, needs_grad_alpha: bool
) -> tuple[Tensor, Tensor]:
    """dx = u (g - mean) with mean = sum u g / sum u, and d alpha = -sum u phi (g - mean)."""
    dtype = row_dtype(p)
    grad_x, grad_alpha = torch.empty_like(p), p.new_empty(p.shape[0] if needs_grad_alpha else 0, dtype=dtype)
    for index, value in parts(*p.shape, alphas, alpha):
        part = p[index].to(dtype)
        g = torch.where(part == 0, 0.0, grad[index].to(dtype))
        weight = weight_of_probability(part, value)
        total = weight.sum(-1, keepdim=True)
        mean = torch.where(total == 0, 0.0, (weight * g).sum(-1, keepdim=True) / total)
        dx = torch.where(weight == 0, 0.0, weight * (g - mean))  # 0 also where the mean is NaN
        grad_x[index] = dx.to(p.dtype)
        if needs_grad_alpha:
            grad_alpha[index] = -(weight_along_alpha(part, value) * (g - mean)).sum(-1)
    return grad_x, grad_alpha


def loss(x: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(rows,) losses, and (3, rows) the RowState.

    With E = sum p (x - maximum), and Omega(p) = (sum p^alpha - 1) / (alpha (alpha - 1)), whose conjugate at x is

        Omega*(x) = maximum + E - Omega(p) = maximum + E (1 - 1/alpha) + (1 - offset) / (alpha (alpha - 1))

    since sum p^alpha = sum p d = (alpha - 1) E + offset, the loss of the target q is Omega*(x) - q . x + Omega(q).
    Omega(q) does not depend on x; where the target is probabilities, the caller adds it.
    """
    dtype, (ignore_index, smoothing, alpha) = row_dtype(x), options
    losses, states = x.new_empty(x.shape[0], dtype=dtype), x.new_empty(3, x.shape[0], dtype=dtype)
    entropy = smoothed_entropy(smoothing, x.shape[-1], alpha) if holds_classes(target) else 0.0
    for index, _ in parts(*x.shape, None, alpha):
        part = x[index].to(dtype)
        state = solve(part, alpha)
        states[:, index] = torch.stack(state)
        p = probabilities(part, state, alpha)
        centred = part - state.maximum.unsqueeze(-1)
        energy = torch.where(p == 0, 0.0, p * centred).sum(-1)
        if has_offset(alpha):
            offset = state.offset + state.last_step * (alpha - 1.0)
            conjugate = energy * (1.0 - 1.0 / alpha) + (1.0 - offset) / (alpha * (alpha - 1.0))
        else:
            conjugate = any_alpha.conjugate(energy, p, alpha)
        value = conjugate - (1.0 - smoothing) * expected_score(centred, target[index], ignore_index) + entropy
        if smoothing:
            value -= smoothing * centred.mean(-1)
        losses[index] = value.where(target[index] != ignore_index, 0.0) if holds_classes(target) else value
    return losses, states


def expected_score(centred: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """target . (x - maximum). Where a probability is 0, the term is 0, even at x = -inf."""
    if holds_classes(target):
        classes = target.where(target != ignore_index, 0)
        return centred.gather(-1, classes.unsqueeze(-1)).squeeze(-1)
    return torch.where(target == 0, 0.0, target.to(centred.dtype) * centred).sum(-1)


def loss_backward(grad: Tensor, x: Tensor, target: Tensor, state: Tensor, options: LossOptions) -> Tensor:
    """dx = grad (p - q). p is computed again from x: the forward pass keeps nothing of the size of x."""
    ignore_index, smoothing, alpha = options
    grad_x = torch.empty_like(x)
    for index, _ in parts(*x.shape, None, alpha):
        part = x[index].to(row_dtype(x))
        difference = probabilities(part, RowState(*state[:, index]), alpha).sub_(smoothing / x.shape[-1])
        g, q = grad[index].unsqueeze(-1), target[index]
        if holds_classes(target):
            counts = (q != ignore_index).unsqueeze(-1)
            classes = q.unsqueeze(-1).where(counts, 0)
            difference.scatter_add_(-1, classes, torch.full_like(g, smoothing - 1.0))
            g = g.where(counts, 0.0)
            difference.masked_fill_(~counts, 0.0)
        else:
            difference -= (1.0 - smoothing) * q.to(difference.dtype)
        masked = (part == -torch.inf) & (difference == 0)
        grad_x[index] = (g * difference).masked_fill_(masked, 0.0).to(x.dtype)
    return grad_x

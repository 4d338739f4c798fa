"""Entmax along the rows of a matrix, in plain PyTorch: for CPU tensors, float64, and any device without Triton.

Rows are (rows, n) and contiguous; arithmetic is in float32 (float64 for float64 inputs), on so many rows at a time that
no temporary holds more than CHUNK numbers, or one row. With r = 1 / (alpha - 1):

    d_j = [(alpha - 1)(x_j - top) + offset]_+      u_j = d_j^(r - 1)      p_j = u_j [d_j + lift]_+

`top` is the row's maximum and `lift` Newton's last step, made on the probabilities themselves, since a rounding of the
offset is more than some of them; it is (1 - F) / sum u, next to zero. docs/math.md derives all of it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.tensors import row_dtype
from ...core.threshold import MAX_STEPS, certified_offset, newton_step, probability, support_weight, tolerance

CHUNK = 2**22
SEGMENT = 64


class Solved(NamedTuple):
    """What decides a row's probabilities, (rows,) each."""

    top: Tensor
    offset: Tensor
    lift: Tensor


class Target(NamedTuple):
    """Where the probability should be: 1 - smoothing as `aim` says, the rest everywhere alike.

    aim: classes (rows,) int64, or probabilities (rows, n). Rows whose class is `ignored` have loss 0.
    """

    aim: Tensor
    ignored: int
    smoothing: float

    @property
    def is_class(self) -> bool:
        return self.aim.dim() == 1


def check_classes(target: Target, count: int) -> None:
    """The classes' values: read on the CPU; on a GPU, where that would wait for the device, asserted there."""
    if not target.is_class:
        return
    classes = target.aim
    valid = ((classes >= 0) & (classes < count)) | (classes == target.ignored)
    message = f"target must hold classes from 0 to {count - 1}, or ignore_index {target.ignored}"
    if classes.is_cuda:
        torch._assert_async(valid.all(), message)
    elif not classes.is_meta and not valid.all():
        raise ValueError(f"{message}, got {classes[~valid][0].item()}")


def solve(x: Tensor, alpha: float) -> Solved:
    """Of rows in the arithmetic's dtype. NaN and +inf make a row NaN; one of nothing but -inf gets p = 0.

    Maxima of segments certify a start at or above the true offset, and Newton's steps stay there.
    """
    top = x.amax(-1)
    top = torch.where(top == torch.inf, torch.nan, top)
    top = torch.where(top == -torch.inf, torch.inf, top)
    z = relative(x, top, alpha)
    segments = pad(z, (0, -z.shape[-1] % SEGMENT), value=-torch.inf).unflatten(-1, (-1, SEGMENT))
    offset = certified_offset(segments.amax(-1), torch.zeros_like(top), alpha)
    for _ in range(MAX_STEPS):
        distance = (z + offset.unsqueeze(-1)).clamp_min_(0)
        total, weight = probability(distance, alpha).sum(-1), support_weight(distance, alpha).sum(-1)
        stepped = newton_step(offset, total, weight, alpha)
        falls = (total > 1 + tolerance(offset)) & (stepped < offset)
        if not falls.any():
            break
        offset = torch.where(falls, stepped, offset)
    return Solved(top, offset, torch.where(weight == 0, 0.0, (1.0 - total) / weight))


def relative(x: Tensor, top: Tensor, alpha: float) -> Tensor:
    return (x - top.unsqueeze(-1)).mul_(alpha - 1.0)


def probabilities(x: Tensor, solved: Solved, alpha: float) -> Tensor:
    distance = relative(x, solved.top, alpha).add_(solved.offset.unsqueeze(-1)).clamp_min_(0)
    return support_weight(distance, alpha) * (distance + solved.lift.unsqueeze(-1)).clamp_min_(0)


def weight_of_probability(p: Tensor, alpha: float) -> Tensor:
    """u = p^(2 - alpha) on the support, 0 elsewhere."""
    if alpha == 1.5:
        return p.sqrt()
    if alpha == 2.0:
        return torch.where(p > 0, 1.0, p)
    return torch.where(p == 0, 0.0, p.pow(2.0 - alpha))


def parts(rows: int, n: int, alphas: Tensor | None, alpha: float) -> Iterator[tuple[slice | Tensor, float]]:
    """Indices of rows of one alpha, few enough for the memory, with that alpha."""
    room = max(1, CHUNK // max(1, n))
    if alphas is None:
        for first in range(0, rows, room):
            yield slice(first, first + room), alpha
        return
    for value in alphas.unique().tolist():
        of_value = (alphas == value).nonzero().squeeze(-1)
        for index in of_value.split(room):
            yield index, value
    if (wrong := alphas.isnan()).any():
        yield wrong.nonzero().squeeze(-1), torch.nan


def entmax(x: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    """(rows, n) probabilities in the dtype of x; alphas are (rows,), or alpha serves all rows."""
    result = torch.empty_like(x)
    for index, value in parts(*x.shape, alphas, alpha):
        part = x[index].to(row_dtype(x))
        result[index] = probabilities(part, solve(part, value), value).to(x.dtype) if value == value else torch.nan
    return result


def entmax_backward(
    grad: Tensor, p: Tensor, alphas: Tensor | None, alpha: float, of_alpha: bool
) -> tuple[Tensor, Tensor]:
    """dx = u (g - mean) with mean = sum u g / sum u, and d alpha = r^2 sum p (g - mean)(1 - (alpha - 1) ln p)."""
    dtype = row_dtype(p)
    result, grad_alpha = torch.empty_like(p), p.new_empty(p.shape[0] if of_alpha else 0, dtype=dtype)
    for index, value in parts(*p.shape, alphas, alpha):
        part = p[index].to(dtype)
        of_part = torch.where(part == 0, 0.0, grad[index].to(dtype))
        weight = weight_of_probability(part, value)
        total = weight.sum(-1, keepdim=True)
        mean = torch.where(total == 0, 0.0, (weight * of_part).sum(-1, keepdim=True) / total)
        of_x = torch.where(weight == 0, 0.0, weight * (of_part - mean))  # 0 also where the mean is NaN
        result[index] = of_x.to(p.dtype)
        if of_alpha:
            bend = torch.where(part == 0, 0.0, part * (1.0 - (value - 1.0) * part.log()))
            grad_alpha[index] = (bend * (of_part - mean)).sum(-1) / (value - 1.0) ** 2
    return result, grad_alpha


def loss(x: Tensor, target: Target, alpha: float) -> tuple[Tensor, Tensor]:
    """(rows,) losses, and (3, rows): what `Solved` holds.

    With E = sum p (x - top), and Omega(p) = (sum p^alpha - 1) / (alpha (alpha - 1)), whose conjugate at x is

        Omega*(x) = top + E - Omega(p) = top + E (1 - 1/alpha) + (1 - offset) / (alpha (alpha - 1))

    since sum p^alpha = sum p d = (alpha - 1) E + offset, the loss of the target q is Omega*(x) - q . x + Omega(q).
    Of probabilities, the caller adds Omega(q), which does not depend on x.
    """
    dtype = row_dtype(x)
    result, state = x.new_empty(x.shape[0], dtype=dtype), x.new_empty(3, x.shape[0], dtype=dtype)
    entropy = smoothed_entropy(target.smoothing, x.shape[-1], alpha) if target.is_class else 0.0
    for index, _ in parts(*x.shape, None, alpha):
        part = x[index].to(dtype)
        solved = solve(part, alpha)
        state[:, index] = torch.stack(solved)
        p = probabilities(part, solved, alpha)
        below = part - solved.top.unsqueeze(-1)
        energy = torch.where(p == 0, 0.0, p * below).sum(-1)
        offset = solved.offset + solved.lift * (alpha - 1.0)
        conjugate = energy * (1.0 - 1.0 / alpha) + (1.0 - offset) / (alpha * (alpha - 1.0))
        value = conjugate - (1.0 - target.smoothing) * expected(below, target, index) + entropy
        if target.smoothing:
            value -= target.smoothing * below.mean(-1)
        result[index] = value.where(target.aim[index] != target.ignored, 0.0) if target.is_class else value
    return result, state


def expected(below: Tensor, target: Target, index: slice) -> Tensor:
    """q . (x - top) of the target without smoothing; what has no probability costs nothing, even at -inf."""
    aim = target.aim[index]
    if target.is_class:
        classes = aim.where(aim != target.ignored, 0)
        return below.gather(-1, classes.unsqueeze(-1)).squeeze(-1)
    return torch.where(aim == 0, 0.0, aim.to(below.dtype) * below).sum(-1)


def smoothed_entropy(smoothing: float, n: int, alpha: float) -> float:
    """Omega of the target that has smoothing / n everywhere and 1 - smoothing more at one class."""
    if not smoothing:
        return 0.0
    rest = smoothing / n
    total = (n - 1) * rest**alpha + (1.0 - smoothing + rest) ** alpha
    return (total - 1.0) / (alpha * (alpha - 1.0))


def loss_backward(grad: Tensor, x: Tensor, target: Target, state: Tensor, alpha: float) -> Tensor:
    """dx = grad (p - q), with p from x again: nothing of the size of x is kept from the forward pass."""
    result = torch.empty_like(x)
    share = target.smoothing / x.shape[-1]
    for index, _ in parts(*x.shape, None, alpha):
        part = x[index].to(row_dtype(x))
        difference = probabilities(part, Solved(*state[:, index]), alpha).sub_(share)
        scale, aim = grad[index].unsqueeze(-1), target.aim[index]
        if target.is_class:
            kept = (aim != target.ignored).unsqueeze(-1)
            classes = aim.unsqueeze(-1).where(kept, 0)
            difference.scatter_add_(-1, classes, torch.full_like(scale, target.smoothing - 1.0))
            scale = scale.where(kept, 0.0)
            difference.masked_fill_(~kept, 0.0)
        else:
            difference -= (1.0 - target.smoothing) * aim.to(difference.dtype)
        masked = (part == -torch.inf) & (difference == 0)
        result[index] = (scale * difference).masked_fill_(masked, 0.0).to(x.dtype)
    return result

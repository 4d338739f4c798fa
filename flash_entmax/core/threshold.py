"""Solvers for the threshold tau in plain PyTorch, independent of each other so that they can check each other.

Every solver takes z of shape (..., n), with -inf where a key is masked, and returns two tensors of shape (...): the
row's maximum and the offset of tau below it, tau = maximum - offset. The offset is the one root of

    F(offset) = sum_j [z_j - maximum + offset]_+^r = 1        r = 1 / (alpha - 1)

and lies in [n^(1 - alpha), 1]. A row without a visible key gets maximum +inf, so that none of its keys is above tau.
docs/math.md derives the steps.
"""

import math

import torch
from torch import Tensor

MAX_STEPS = 64
LARGEST_POWER = 16  # the largest exponent whose powers are products


def tolerance(like: Tensor) -> float:
    """How far from 1 a row's probabilities may sum: a few roundings of the dtype that computes them."""
    return 1e-6 if like.dtype == torch.float32 else 1e-13


def row_maximum(z: Tensor) -> Tensor:
    """The largest entry of each row; +inf where every entry is masked."""
    if z.shape[-1] == 0:
        return z.new_full(z.shape[:-1], torch.inf)
    maximum = z.amax(-1)
    return torch.where(maximum == -torch.inf, torch.inf, maximum)


def whole_power(exponent: float) -> int:
    """The whole number from 1 to LARGEST_POWER that an exponent is, up to the rounding of alpha - 1; else 0."""
    if not 0.5 < exponent < LARGEST_POWER + 0.5:  # NaN as well
        return 0
    whole = round(exponent)
    return whole if abs(exponent - whole) <= 4e-15 * whole else 0


def power_of_alpha(alpha: float | None) -> int:
    """1 / (alpha - 1) where that is a whole number up to LARGEST_POWER; 0 for other numbers, and None: for tensors."""
    return 0 if alpha is None else whole_power(1.0 / (alpha - 1.0))


def power(distance: Tensor, exponent: float | Tensor) -> Tensor:
    """distance^exponent for distance >= 0. Whole exponents take squares and products, which are faster than a power."""
    whole = 0 if isinstance(exponent, Tensor) else whole_power(exponent)
    if not whole:
        return distance.pow(exponent)
    result = distance
    for place in (3, 2, 1, 0):  # of LARGEST_POWER's binary digits after the first
        if whole >> place > 1:
            # In place where nothing else needs the factor: memory for another large tensor costs more than the product.
            result = result * result if result is distance or result.requires_grad else result.mul_(result)
            if (whole >> place) % 2 == 1:
                result = result * distance if result.requires_grad else result.mul_(distance)
    return result


def probability(distance: Tensor, alpha: float | Tensor) -> Tensor:
    """p = d^(1 / (alpha - 1)), with d = [z - tau]_+."""
    return power(distance, 1.0 / (alpha - 1.0))


def support_weight(distance: Tensor, alpha: float) -> Tensor:
    """u = p^(2 - alpha) = d^(1 / (alpha - 1) - 1) on the support, 0 elsewhere."""
    if alpha == 2.0:
        return torch.where(distance > 0, 1.0, distance)
    return power(distance, 1.0 / (alpha - 1.0) - 1.0)


def weight_along_alpha(p: Tensor, alpha: float | Tensor) -> Tensor:
    """u phi on the support, 0 elsewhere: dp / d alpha = u (mean of phi by u) - u phi, for every alpha above 0.

    ln p = l solves (e^(y) - 1) / (alpha - 1) = x - constant with y = (alpha - 1) l. phi is the derivative of the left
    side by alpha at this l, so u phi = p l^2 (y - 1 + e^-y) / y^2. The last factor is a series in y next to 0: 1/2 at
    alpha = 1.
    """
    log_p = torch.where(p > 0, p, 1.0).log()
    y = (alpha - 1.0) * log_p
    is_small = y.abs() < 0.1
    near = torch.where(is_small, y, 0.0)
    series = torch.zeros_like(y)
    for k in range(9, 1, -1):  # sum over k from 2 of (-y)^(k - 2) / k!
        series = 1.0 / math.factorial(k) - near * series
    far = torch.where(is_small, 1.0, y)
    return p * log_p * log_p * torch.where(is_small, series, (far + torch.expm1(-far)) / (far * far))


def newton_step(offset: Tensor, total: Tensor, weight: Tensor, alpha: float | Tensor) -> Tensor:
    """Newton's step on the norm F^(alpha - 1) - 1, from total = F and weight = sum u at this offset.

    The norm of [z - maximum + offset]_+ is convex in the offset, so its tangent lies below it: from any offset the step
    lands at or above the root, that is, at a certified lower bound of tau.
    """
    return offset - (total - total.pow(2.0 - alpha)) / weight


def quadratic_step(offset: Tensor, total: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """The exact step for alpha = 1.5 while the support stands still: the root of count t^2 - 2 weight t + total - 1.

    NaN where the parabola has no root; the caller's bracket rejects it.
    """
    return offset - (weight - (weight * weight - count * (total - 1.0)).sqrt()) / count


def certified_offset(maxima: Tensor, maximum: Tensor, alpha: float, steps: int = 3) -> Tensor:
    """An offset at or above the root, from a subset of each row's scores (here: maxima of blocks of keys).

    A subset has a smaller F, hence a larger root, and Newton's steps on it end at or above that root. A step from an
    offset is rounded relative to that offset (F / weight is at most the offset), so each is lifted by 2^-16 of it: more
    than F, its power and the weight can be off in float32.
    """
    offset = torch.ones_like(maximum)
    for _ in range(steps):
        distance = (maxima - maximum.unsqueeze(-1) + offset.unsqueeze(-1)).clamp_min(0)
        stepped = newton_step(
            offset, probability(distance, alpha).sum(-1), support_weight(distance, alpha).sum(-1), alpha
        )
        stepped = stepped + 2.0**-16 * offset
        offset = torch.where(stepped < offset, stepped, offset)
    return offset


class Bracket:
    """The interval that holds each row's offset, and the safeguarded step inside it."""

    def __init__(self, low: Tensor, high: Tensor, alpha: float) -> None:
        self.low, self.high, self.alpha = low, high, alpha

    def step(self, offset: Tensor, total: Tensor, weight: Tensor, count: Tensor | None) -> Tensor:
        """Tighten the interval by F at this offset, then step; the midpoint where the step leaves the interval.

        Its ends were tried already: a step back to one could go on for ever between two neighbouring numbers. Only
        alpha 1.5 reads `count`.
        """
        is_low = total < 1
        self.low = torch.where(is_low, offset, self.low)
        self.high = torch.where(is_low, self.high, offset)
        if self.alpha == 1.5:
            assert count is not None
            candidate = quadratic_step(offset, total, weight, count)
        else:
            candidate = newton_step(offset, total, weight, self.alpha)
        inside = (candidate > self.low) & (candidate < self.high) | (candidate == offset)
        return torch.where(inside, candidate, (self.low + self.high) / 2)

    def keep(self, active: Tensor, offset: Tensor) -> None:
        """Close the interval of the rows that are not active on their offset, which then no step can move."""
        self.low = torch.where(active, self.low, offset)
        self.high = torch.where(active, self.high, offset)


def smallest_offset(visible: Tensor, alpha: float | Tensor) -> Tensor:
    """n^(1 - alpha), the offset of n equal scores, just below its rounding."""
    return visible.clamp_min(1).pow(1.0 - alpha) * (1 - 1e-6)


def solve(alpha: float, relative: Tensor, pending: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The offset of every row, from z - maximum over its live tiles, starting from the certified `high`.

    A tile of rows leaves once all its pending rows have converged.
    """
    result, offset = high.clone(), high
    bracket = Bracket(low, high, alpha)
    active = torch.arange(high.shape[0], device=high.device)
    for _ in range(MAX_STEPS):
        distance = (relative + offset.unsqueeze(-1)).clamp_min_(0)
        total = probability(distance, alpha).sum(-1)
        pending = pending & ((total - 1).abs() > tolerance(offset))
        if not pending.any():
            break
        weight = support_weight(distance, alpha).sum(-1)
        count = distance.sign().sum(-1) if alpha == 1.5 else None
        stepped = torch.where(pending, bracket.step(offset, total, weight, count), offset)
        pending, offset = pending & (stepped != offset), stepped
        result[active] = offset
        keep = pending.any(-1)
        if not keep.all():
            relative, offset, pending, active = relative[keep], offset[keep], pending[keep], active[keep]
            bracket.low, bracket.high = bracket.low[keep], bracket.high[keep]
    return result


def threshold_by_steps(z: Tensor, alpha: float, start: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """Safeguarded steps from a start (default 1, the largest offset). Also returns how many passes over z they took."""
    maximum = row_maximum(z)
    relative = z - maximum.unsqueeze(-1)
    low = smallest_offset((z > -torch.inf).sum(-1).to(z.dtype), alpha)
    bracket = Bracket(low, torch.ones_like(maximum), alpha)
    offset = torch.ones_like(maximum) if start is None else start
    empty = maximum == torch.inf
    passes = 0
    while passes < MAX_STEPS:
        passes += 1
        distance = (relative + offset.unsqueeze(-1)).clamp_min(0)
        total, weight = probability(distance, alpha).sum(-1), support_weight(distance, alpha).sum(-1)
        if not ((total - 1).abs() > tolerance(z)).logical_and(~empty).any():
            break
        count = (distance > 0).sum(-1).to(z.dtype)
        stepped = torch.where(empty, offset, bracket.step(offset, total, weight, count))
        if torch.equal(stepped, offset):
            break
        offset = stepped
    return maximum, offset, passes


def threshold_by_histogram(z: Tensor, alpha: float, bins: int = 8) -> tuple[Tensor, Tensor, int]:
    """AdaSplash-2's idea (arXiv 2604.15180): a histogram of the distances to the maximum starts near the root."""
    return threshold_by_steps(z, alpha, histogram_offset(z, alpha, bins))


def histogram_offset(z: Tensor, alpha: float, bins: int = 8) -> Tensor:
    """Near the root, from one pass that counts scores in bins.

    The bins are geometric, with edges 1, 1/2, 1/4, ..., since the offset lies in [n^(1 - alpha), 1]: the bin of a score
    is the floating-point exponent of its distance. The start solves F with every score at the middle of its bin.
    """
    maximum = row_maximum(z)
    gap = maximum.unsqueeze(-1) - z
    bin_of = (-torch.frexp(gap.clamp(2.0**-bins, 2.0)).exponent).clamp(0, bins - 1)
    reached = (gap < 1).to(z.dtype)
    counts = z.new_zeros(*z.shape[:-1], bins).scatter_add_(-1, bin_of.long(), reached)
    middles = 0.75 * 2.0 ** -torch.arange(bins, device=z.device, dtype=z.dtype)
    offset = torch.ones_like(maximum)
    for _ in range(4):
        distance = (offset.unsqueeze(-1) - middles).clamp_min(0)
        total = (counts * probability(distance, alpha)).sum(-1)
        weight = (counts * support_weight(distance, alpha)).sum(-1)
        stepped = newton_step(offset, total, weight, alpha)
        offset = torch.where((stepped > 0) & (stepped < 1), stepped, offset)
    return offset.clamp_min(smallest_offset((z > -torch.inf).sum(-1).to(z.dtype), alpha))


def threshold_by_bisection(z: Tensor, alpha: float | Tensor, steps: int = 60) -> tuple[Tensor, Tensor]:
    """Halve [n^(1 - alpha), 1] until the digits end. Slow, and with nothing that could go wrong."""
    maximum = row_maximum(z)
    relative = z - maximum.unsqueeze(-1)
    low = smallest_offset((z > -torch.inf).sum(-1).to(z.dtype), alpha)
    high = torch.ones_like(low)
    for _ in range(steps):
        middle = (low + high) / 2
        total = probability((relative + middle.unsqueeze(-1)).clamp_min(0), alpha).sum(-1)
        low, high = torch.where(total < 1, middle, low), torch.where(total < 1, high, middle)
    return maximum, (low + high) / 2


def threshold_by_sort(z: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Exact for alpha 1.5 and 2 (Martins and Astudillo 2016; Peters et al. 2019): the k largest scores are the support.

    With the k largest taken as the support, F = 1 is linear (2) or quadratic (1.5) in the offset; the right k is the
    largest whose k-th score is still above the threshold that the k largest give.
    """
    if alpha not in (1.5, 2.0):
        raise ValueError(f"threshold_by_sort solves alpha 1.5 and 2, got {alpha}")
    maximum = row_maximum(z)
    below_reach = -2.0
    relative = (torch.sort(z, dim=-1, descending=True).values - maximum.unsqueeze(-1)).clamp_min(below_reach)
    k = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    mean = relative.cumsum(-1) / k
    if alpha == 2.0:
        offsets = 1.0 / k - mean
    else:
        spread = (relative * relative).cumsum(-1) - k * mean * mean
        offsets = ((1.0 - spread).clamp_min(0) / k).sqrt() - mean
    size = (relative + offsets > 0).sum(-1, keepdim=True)
    return maximum, offsets.gather(-1, (size - 1).clamp_min(0)).squeeze(-1)

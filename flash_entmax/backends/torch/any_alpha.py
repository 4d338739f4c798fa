"""Entmax of rows for every alpha above 0, one for all rows or one for each: the map is dense up to 1, sparse above.

With e = alpha - 1, the gap g_j = maximum - x_j, and P the probability of the maximum,

    p_j = P (1 - e g_j P^-e)_+ ^ (1 / e)        P exp(-g_j) at e = 0

so one unknown, ln P in [-ln n, 0], decides a row. Taken as a logarithm over e, p is accurate on both sides of e = 0,
and the probabilities of long flat rows lose no digits. With F = sum_j p_j,

    dF / d ln P = W = sum_j p_j / (1 - e g_j P^-e)

The steps are Newton's on the norm F^e, as for alpha above 1 (docs/math.md). Up to alpha 2 each lands between the root
and where it started. Above, p grows infinitely fast where it leaves 0, so a step that does not help is a bisection.
"""

import torch
from torch import Tensor

from ...core.threshold import tolerance

MAX_STEPS = 150


def solve(x: Tensor, alpha: float | Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    """(ln P, -ln F) of rows (rows, n) with these maxima. alpha is a number, or (rows, 1)."""
    excess = excess_of(alpha, x)
    gap = maximum.unsqueeze(-1) - x
    low = -(gap < torch.inf).sum(-1).clamp_min(1).to(x.dtype).log()
    high, log_top = torch.zeros_like(low), torch.zeros_like(low)
    error = torch.full_like(low, torch.inf)
    for _ in range(MAX_STEPS):
        p, ratio = relative_probability(gap, log_top, excess)
        total, weight = p.sum(-1), torch.where(p == 0, 0.0, p / ratio).sum(-1)
        before, error = error, (total - 1.0).abs()
        pending = (error > tolerance(x)) & (total > 0)
        if not pending.any():
            break
        low, high = torch.where(total < 1, log_top, low), torch.where(total < 1, high, log_top)
        stepped = log_top + step(total, weight, excess.squeeze(-1))
        helps = (stepped > low) & (stepped < high) & (error < before / 2)
        stepped = torch.where(pending, torch.where(helps, stepped, (low + high) / 2), log_top)
        if torch.equal(stepped, log_top):
            break
        log_top = stepped
    return log_top, torch.where(total > 0, -total.log(), total)


def step(total: Tensor, weight: Tensor, excess: Tensor) -> Tensor:
    """What Newton's step on F^e adds to ln P: ln(1 - (F - F^(1 - e)) / W) / e, and -F ln F / W at e = 0."""
    log_total = total.log()
    change = torch.log1p(total * torch.expm1(-excess * log_total) / weight) / nonzero(excess)
    return torch.where(excess == 0, -log_total * total / weight, change)


def relative_probability(gap: Tensor, log_top: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
    """(p, 1 - e g P^-e) of entries at these gaps, both 0 outside of the support. A gap of inf has p = 0."""
    log_top = log_top.unsqueeze(-1)
    change = torch.where(gap == 0, 0.0, -excess * gap * (-excess * log_top).exp()).clamp_min(-1.0)
    log_ratio = torch.where(excess == 0, -gap, change.log1p() / nonzero(excess))
    return (log_top + log_ratio).exp(), torch.where(excess == 0, 1.0, 1.0 + change)


def nonzero(excess: Tensor) -> Tensor:
    return torch.where(excess == 0, 1.0, excess)


def probabilities(x: Tensor, alpha: float | Tensor, maximum: Tensor, log_top: Tensor, log_scale: Tensor) -> Tensor:
    """p / F: what the last step leaves is shared out in proportion."""
    p, _ = relative_probability(maximum.unsqueeze(-1) - x, log_top, excess_of(alpha, x))
    return p * log_scale.exp().unsqueeze(-1)


def conjugate(energy: Tensor, p: Tensor, alpha: float) -> Tensor:
    """(rows,) Omega*(x) - maximum = E - Omega(p), with E = sum p (x - maximum); Omega(p) = sum p ln p at alpha 1."""
    log_p = torch.where(p > 0, p, 1.0).log()
    excess = alpha - 1.0
    power = log_p if excess == 0 else torch.expm1(excess * log_p) / (alpha * excess)
    return energy - (p * power).sum(-1)


def excess_of(alpha: float | Tensor, x: Tensor) -> Tensor:
    """e = alpha - 1, of the dtype of x: (1, 1) or (rows, 1)."""
    if isinstance(alpha, Tensor):
        return alpha.to(x.dtype) - 1.0
    return torch.full((1, 1), alpha - 1.0, dtype=x.dtype, device=x.device)

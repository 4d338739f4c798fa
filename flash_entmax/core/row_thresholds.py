"""Thresholds of normmax and of sparsemax with a budget, row by row, in plain PyTorch.

Rows are (rows, n) gaps, g_j = reference - x_j, inf where an entry is masked. A threshold lies `offset` below the
reference: the maximum, or for a budget of k the ceil(k)-th largest entry.
"""

import torch
from torch import Tensor

from .threshold import MAX_STEPS, tolerance

MAX_SAFEGUARDED_STEPS = 150


def gaps_of(x: Tensor) -> Tensor:
    """(rows, n): NaN in a row with NaN or +inf, inf in a row of -inf alone."""
    maximum = x.detach().amax(-1, keepdim=True)
    maximum = torch.where(maximum == torch.inf, torch.nan, maximum)
    return torch.where(maximum == -torch.inf, torch.inf, maximum) - x


def gaps_at_budget(x: Tensor, budgets: Tensor) -> Tensor:
    """As `gaps_of`, but below the ceil(k)-th largest entry: far larger ones take no digits from the others.

    budgets: of the shape of x with size 1 at the last dimension, or one that broadcasts to it.
    """
    ordered = x.detach().sort(-1, descending=True).values
    seen = (ordered > -torch.inf).sum(-1, keepdim=True).clamp_min(1)
    rank = torch.minimum(budgets.detach().nan_to_num().ceil().clamp(1, x.shape[-1]).long(), seen)
    reference = ordered.gather(-1, rank - 1).masked_fill(ordered[..., :1] == torch.inf, torch.nan)
    return reference.masked_fill(reference == -torch.inf, torch.inf) - x


def normmax_offset(gap: Tensor, alphas: Tensor) -> Tensor:
    """(rows,): where the norm of d = [offset - g]_+ of the order b = alpha / (alpha - 1) is 1.

    The norm is convex in the offset, so Newton's steps from 1, where it is 1 at least, never pass the root. For equal
    scores the first step is exact.
    """
    order = (alphas / (alphas - 1.0)).unsqueeze(-1)
    offset = torch.ones_like(alphas)
    for _ in range(MAX_STEPS):
        distance = (offset.unsqueeze(-1) - gap).clamp_min(0)
        norm = distance.pow(order).sum(-1).pow(1.0 / order.squeeze(-1))
        slope = distance.pow(order - 1.0).sum(-1) * norm.pow(1.0 - order.squeeze(-1))
        stepped = offset - (norm - 1.0) / slope
        falls = (norm > 1.0 + tolerance(offset)) & (stepped < offset)
        if not falls.any():
            break
        offset = torch.where(falls, stepped, offset)
    return offset


def budget_offset(gap: Tensor, budgets: Tensor) -> Tensor:
    """(rows,): where d = offset - g, cut off at 0 and 1, sums to the budget; at most what the entries can sum to.

    The gaps are those of `gaps_at_budget`: at 0 fewer than k entries are positive, and at 1 at least k are 1. The sum
    rises by the number of entries strictly between 0 and 1. A step that does not help is a bisection.
    """
    seen = gap < torch.inf
    low, high = torch.zeros_like(budgets), torch.ones_like(budgets)
    target = torch.minimum(budgets, seen.sum(-1).to(gap.dtype))
    offset, error = high, torch.full_like(low, torch.inf)
    for _ in range(MAX_SAFEGUARDED_STEPS):
        distance = offset.unsqueeze(-1) - gap
        total = distance.clamp(0, 1).sum(-1)
        active = ((distance > 0) & (distance < 1)).sum(-1)
        before, error = error, (total - target).abs()
        pending = error > tolerance(gap) * target.clamp_min(1.0)
        if not pending.any():
            break
        low, high = torch.where(total < target, offset, low), torch.where(total < target, high, offset)
        stepped = offset + (target - total) / active
        helps = (stepped > low) & (stepped < high) & (error < before / 2)
        stepped = torch.where(pending, torch.where(helps, stepped, (low + high) / 2), offset)
        if torch.equal(stepped, offset):
            break
        offset = stepped
    return offset

"""The specification: entmax attention by its definition, dense, in plain autograd. Slow on purpose; best in float64."""

import torch
from torch import Tensor

from .problem import Problem, Support
from .threshold import threshold_by_bisection, threshold_by_sort


def entmax_rows(z: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities p = [z - tau]_+^(1 / (alpha - 1)) over the last dimension, with the row's maximum and offset.

    Differentiable in z, and in alpha where it is a tensor. tau is found without autograd; one Newton step, next to zero
    in value, then gives it the gradient of the implicit function: d tau / d z_j = u_j / sum u.
    """
    if z.shape[-1] == 0:
        return z, torch.full_like(z.sum(-1), torch.inf), torch.ones_like(z.sum(-1))
    r = 1.0 / (alpha - 1.0)
    with torch.no_grad():
        value = float(alpha)
        solve = threshold_by_sort if value in (1.5, 2.0) else threshold_by_bisection
        maximum, offset = solve(z, value)
    distance = positive(z - maximum.unsqueeze(-1) + offset.unsqueeze(-1))
    slope = r * torch.where(distance > 0, distance.detach() ** (r - 1.0), 0.0).sum(-1)
    total = (distance**r).sum(-1)
    correction = torch.where(slope > 0, (total - 1.0) / slope.clamp_min(torch.finfo(z.dtype).tiny), 0.0)
    distance = positive(z - maximum.unsqueeze(-1) + (offset - correction).unsqueeze(-1))
    return distance**r, maximum, offset


def positive(x: Tensor) -> Tensor:
    """x where it is positive, else 0; NaN stays NaN, and masked entries pass no gradient."""
    return torch.where(x <= 0, 0.0, x)


def visible_mask(problem: Problem, device: torch.device) -> Tensor:
    """(query length, key length) bool, True where the query sees the key."""
    keys = torch.arange(problem.key_length, device=device)
    return keys < problem.visible(device).unsqueeze(-1)


def attention(problem: Problem, query: Tensor, key: Tensor, value: Tensor, tile: int = 64) -> tuple[Tensor, Support]:
    """Output and support of entmax attention; softmax where alpha is exactly 1, which attends to every visible key."""
    key = key.repeat_interleave(problem.group, dim=1)
    value = value.repeat_interleave(problem.group, dim=1)
    visible = visible_mask(problem, query.device)
    if problem.alpha == 1.0:
        scores = problem.scale * (query @ key.mT).masked_fill(~visible, -torch.inf)
        probability = scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
        maximum, offset = scores.amax(-1), torch.full_like(scores[..., 0], torch.inf)
    else:
        z = (problem.slope * (query @ key.mT)).masked_fill(~visible, -torch.inf)
        probability, maximum, offset = entmax_rows(z, problem.alpha)
    return probability @ value, support_of(probability, maximum, offset, tile)


def support_of(probability: Tensor, maximum: Tensor, offset: Tensor, tile: int) -> Support:
    live = probability.detach() > 0
    rows, keys = live.shape[-2:]
    padded = torch.nn.functional.pad(live, (0, -keys % tile, 0, -rows % tile))
    tiles = padded.unflatten(-1, (-1, tile)).unflatten(-3, (-1, tile)).any(-1).any(-2)
    return Support(maximum.detach(), offset.detach(), live.sum(-1, dtype=torch.int32), tiles, (tile, tile))

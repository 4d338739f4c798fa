"""Operators of normmax: its threshold, without a derivative, since a differentiable step follows; and its loss.

flash_entmax::normmax_offset  gaps (rows, n), alphas (rows,)  -> offsets (rows,)
flash_entmax::known_classes   classes (rows,)                 -> classes (rows,), 0 where a row is ignored
flash_entmax::normmax_losses  x, p, q (rows, n)               -> losses (rows,)
"""

from typing import Any

import torch
from torch import Tensor

from ..core import row_thresholds
from ..core.alphas import refuse_where
from ..core.loss import check_classes
from ..core.modes import as_given
from ..core.registration import batch_into, below_autograd, differentiate, fake, operator


@operator("Tensor gap, Tensor alphas", results=1)
def normmax_offset(gap: Tensor, alphas: Tensor) -> Tensor:
    refuse_where((alphas <= 1) | (alphas == torch.inf), alphas, "alpha of normmax must be finite and above 1")
    with as_given(gap):
        return row_thresholds.normmax_offset(gap, alphas)


@fake("normmax_offset")
def _(gap: Tensor, alphas: Tensor) -> Tensor:
    return torch.empty_like(alphas)


@operator("Tensor target, int ignore_index, int count", results=1)
def known_classes(target: Tensor, ignore_index: int, count: int) -> Tensor:
    check_classes(target, ignore_index, count)
    return target.where(target != ignore_index, 0)


@fake("known_classes")
def _(target: Tensor, *_: int) -> Tensor:
    return torch.empty_like(target)


@operator("Tensor x, Tensor p, Tensor q, float alpha", results=1)
def normmax_losses(x: Tensor, p: Tensor, q: Tensor, alpha: float) -> Tensor:
    """(p - q) . x - ||p||_alpha + ||q||_alpha."""
    with as_given(x):
        return torch.where(p == q, 0.0, (p - q) * x).sum(-1) - norm(p, alpha) + norm(q, alpha)


@fake("normmax_losses")
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0])


def norm(p: Tensor, alpha: float) -> Tensor:
    """Of each row, relative to the largest entry, so that a large order loses nothing."""
    largest = p.amax(-1)
    safe = torch.where(largest > 0, largest, 1.0)
    return largest * (p / safe.unsqueeze(-1)).pow(alpha).sum(-1).pow(1.0 / alpha)


class NormmaxLosses(torch.autograd.Function):
    """The derivative by x is p - q: p is the maximiser, so what p itself changes counts for nothing.

    p is an argument, so that this derivative has the derivatives of p.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, q: Tensor, alpha: float) -> Tensor:
        with below_autograd():
            losses = normmax_losses(x, p, q, alpha)
        ctx.save_for_backward(p, q)
        ctx.save_for_forward(p, q)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        p, q = ctx.saved_tensors
        return grad.unsqueeze(-1) * (p - q), None, None, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor, *_: object) -> Tensor:
        p, q = ctx.saved_tensors
        return torch.where(p == q, 0.0, (p - q) * x_tangent).sum(-1)


differentiate(normmax_losses, NormmaxLosses)

batch_into(normmax_offset, (0, 0), (0,))
batch_into(known_classes, (0,), (0,))
batch_into(normmax_losses, (0, 0, 0), (0,))

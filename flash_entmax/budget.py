"""Sparsemax with a budget: entries in [0, 1] that sum to k, instead of probabilities that sum to 1."""

from typing import Literal, overload

import torch
from torch import Tensor

from .activations import by_last, check_by_row, check_scores, support_size
from .core.checks import check_flag, is_number, typed
from .core.modes import as_given
from .core.row_thresholds import gaps_at_budget
from .core.tensors import row_dtype, spoiled
from .operators.budget import budget_offset


@overload
def budget_sparsemax(
    x: Tensor, budget: float | Tensor = ..., dim: int = ..., *, return_support_size: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def budget_sparsemax(
    x: Tensor, budget: float | Tensor = ..., dim: int = ..., *, return_support_size: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def budget_sparsemax(
    x: Tensor, budget: float | Tensor = ..., dim: int = ..., *, return_support_size: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def budget_sparsemax(
    x: Tensor, budget: float | Tensor = 2.0, dim: int = -1, *, return_support_size: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The nearest point whose entries are in [0, 1] and sum to a budget: a soft choice of k entries.

    ::

        argmin over p of ||p - x||^2,  0 <= p_j <= 1,  sum_j p_j = k        p_j = min(1, [x_j - tau]_+)

    This is the projection onto the marginal polytope of subsets of k entries (Niculae et al. 2018, arXiv 1802.04223,
    have such polytopes in general). With a budget of 1 it is sparsemax.

    Args:
        x: scores of any shape; float16, bfloat16, float32 or float64. -inf masks an entry: its value and gradient are
            0. NaN and +inf make their row NaN, and so does a budget of NaN.
        budget: k, from 0 to the size of ``x`` at ``dim``, not only integers; or a tensor, with gradient, that
            broadcasts to the shape of ``x`` with size 1 at ``dim``. In a row with fewer entries that are not masked,
            each of these is 1.
        dim: the dimension that sums to the budget.
        return_support_size: also return how many entries are positive.

    Returns:
        Values in the shape and dtype of ``x``. Arithmetic is in float32 (float64 for float64). Their gradient is that
        of the entries strictly between 0 and 1. With ``return_support_size``, a pair of them and the sizes, int64, of
        the shape of ``x`` with size 1 at ``dim``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, ``budget`` neither a number nor a floating-point tensor.
        ValueError: ``budget`` or ``dim`` out of range, or shapes and devices that do not fit.
    """
    check_flag("return_support_size", return_support_size)
    check_scores(x, dim)
    check_budget(budget, x, dim)
    if x.numel() == 0:
        p = x.clone()
    else:
        with as_given(x):
            p = projected(x.movedim(dim, -1).to(row_dtype(x)), by_last(budget, x, dim)).to(x.dtype).movedim(-1, dim)
    return (p, support_size(p, dim)) if return_support_size else p


def projected(x: Tensor, budget: Tensor) -> Tensor:
    """Along the last dimension. The offset is found without autograd; the step after it has the derivatives."""
    gap = gaps_at_budget(x, budget)
    rows = gap.detach().reshape(-1, gap.shape[-1]), budget.detach().expand(*x.shape[:-1], 1).reshape(-1)
    offset = budget_offset(*(tensor.contiguous() for tensor in rows)).view(*x.shape[:-1], 1)
    active = ((offset - gap > 0) & (offset - gap < 1)).sum(-1, keepdim=True)
    missing = budget - cut(offset - gap).sum(-1, keepdim=True)
    offset = offset + torch.where(active > 0, missing, 0.0) / active.clamp_min(1)
    return spoiled(cut(offset - gap), x, gap.isnan().any(-1, keepdim=True) | budget.isnan())


def cut(distance: Tensor) -> Tensor:
    """Cut off at 0 and 1, with derivatives of 0 on both."""
    return torch.where(distance >= 1, 1.0, torch.where(distance > 0, distance, 0.0))


def check_budget(budget: float | Tensor, x: Tensor, dim: int) -> None:
    """A tensor is read by the operator that finds the offset."""
    if isinstance(budget, Tensor):
        check_by_row("budget", budget, x, dim)
    elif not is_number(budget):
        raise TypeError(f"budget must be a number or a tensor, got {typed(budget)}")
    elif not 0.0 <= budget <= x.shape[dim]:
        raise ValueError(f"budget must be from 0 to {x.shape[dim]}, the entries of a row, got {budget}")

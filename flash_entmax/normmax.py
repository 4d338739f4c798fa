"""Normmax, and its Fenchel-Young loss (Blondel, Martins, Niculae 2020, arXiv 1901.02324): plain PyTorch, any device.

    normmax(x) = argmax over probabilities p of  p . x - ||p||_alpha

It attends to few entries, and evenly: the larger alpha, the more the probabilities of the support are alike.
"""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from .activations import by_last, check_by_row, check_scores, support_size
from .core.checks import check_flag, is_number, typed
from .core.modes import as_given
from .core.row_thresholds import gaps_of
from .core.tensors import row_dtype, spoiled
from .losses import check_loss_options, check_target, divide_by_count, refuse_ignored
from .operators.normmax import known_classes, normmax_losses, normmax_offset


@overload
def normmax(
    x: Tensor, alpha: float | Tensor = ..., dim: int = ..., *, return_support_size: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def normmax(
    x: Tensor, alpha: float | Tensor = ..., dim: int = ..., *, return_support_size: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def normmax(
    x: Tensor, alpha: float | Tensor = ..., dim: int = ..., *, return_support_size: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def normmax(
    x: Tensor, alpha: float | Tensor = 2.0, dim: int = -1, *, return_support_size: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Probabilities along a dimension, sparse and even: alpha-normmax (Blondel et al. 2020, arXiv 1901.02324).

    ::

        p_j = d_j^s / sum_i d_i^s    d_j = [x_j - tau]_+    s = 1 / (alpha - 1)    with tau such that ||d||_(s + 1) = 1

    Args:
        x: scores of any shape; float16, bfloat16, float32 or float64. -inf masks an entry: its probability and gradient
            are 0. Where all entries are masked, all probabilities are 0. NaN and +inf make their row NaN.
        alpha: the order of the norm, a number above 1; or a tensor, with gradient, that broadcasts to the shape of
            ``x`` with size 1 at ``dim``.
        dim: the dimension that sums to 1.
        return_support_size: also return how many entries have a positive probability.

    Returns:
        Probabilities in the shape and dtype of ``x``, twice differentiable inside of a support. Arithmetic is in
        float32 (float64 for float64). With ``return_support_size``, a pair of them and the sizes, int64, of the shape
        of ``x`` with size 1 at ``dim``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, ``alpha`` neither a number nor a floating-point tensor.
        ValueError: ``alpha`` or ``dim`` out of range, or shapes and devices that do not fit.
    """
    check_flag("return_support_size", return_support_size)
    check_scores(x, dim)
    check_order(alpha, x, dim)
    if x.numel() == 0:
        p = x.clone()
        return (p, support_size(p, dim)) if return_support_size else p
    with as_given(x):
        p = probabilities(x.movedim(dim, -1).to(row_dtype(x)), by_last(alpha, x, dim))
    p = p.to(x.dtype).movedim(-1, dim)
    return (p, support_size(p, dim)) if return_support_size else p


def probabilities(x: Tensor, alpha: Tensor) -> Tensor:
    """Along the last dimension; alpha has size 1 there.

    The offset is found without autograd. A Newton step, next to zero in value, gives it its first derivative, and
    another one the second.
    """
    gap = gaps_of(x)
    rows = gap.detach().reshape(-1, gap.shape[-1]), alpha.detach().expand(*x.shape[:-1], 1).reshape(-1)
    offset = normmax_offset(*(tensor.contiguous() for tensor in rows)).view(*x.shape[:-1], 1)
    order, power = alpha / (alpha - 1.0), 1.0 / (alpha - 1.0)
    for _ in range(2):
        total = powers(offset - gap, order).sum(-1, keepdim=True)
        slope = powers(offset - gap, power).sum(-1, keepdim=True) * order
        offset = offset - torch.where(slope > 0, total - 1.0, 0.0) / torch.where(slope > 0, slope, 1.0)
    p = powers(offset - gap, power)
    total = p.sum(-1, keepdim=True)
    return spoiled(p / torch.where(total > 0, total, 1.0), x, gap.isnan().any(-1, keepdim=True))


def powers(distance: Tensor, exponent: Tensor) -> Tensor:
    """[distance]_+ ^ exponent, with derivatives of 0 where the distance is not positive."""
    inside = distance > 0
    return torch.where(inside, torch.where(inside, distance, 1.0).pow(exponent), 0.0)


def normmax_loss(
    input: Tensor,
    target: Tensor,
    alpha: float = 2.0,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss whose prediction is normmax, in place of ``torch.nn.functional.cross_entropy``.

    ::

        L(x; q) = p . x - ||p||_alpha + ||q||_alpha - q . x        p = normmax(x)

    Its gradient in x is p - q. It is 0 exactly where p equals the target q.

    Args:
        input: scores, (classes,), (N, classes) or (N, classes, d1, ...), as for :func:`flash_entmax.entmax_loss`.
        target: int64 classes, or probabilities, as for ``entmax_loss``.
        alpha: the order of the norm, above 1.
        ignore_index, reduction, label_smoothing: as for ``entmax_loss``.

    Returns:
        float32 (float64 for float64): a scalar, or the shape of class indices for ``"none"``.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options that do not fit; ValueError for a class out of
            range. On CUDA, where reading the target would wait for the device, that is a device-side assertion.
    """
    class_dim = 0 if isinstance(input, Tensor) and input.dim() == 1 else 1
    check_scores(input, class_dim if isinstance(input, Tensor) and input.dim() > class_dim else 0, "input")
    check_order_number(alpha)
    check_loss_options(ignore_index, reduction, label_smoothing)
    check_target(input, target, class_dim)
    with as_given(input):
        x = input.movedim(class_dim, -1).to(row_dtype(input))
        counts = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        if target.is_floating_point():
            refuse_ignored(ignore_index)
            q = target.detach().movedim(class_dim, -1).to(x.dtype)
        else:
            counts = target != ignore_index
            classes = known_classes(target.reshape(-1), ignore_index, x.shape[-1]).view(target.shape)
            q = (classes.unsqueeze(-1) == torch.arange(x.shape[-1], device=x.device)).to(x.dtype)
        q = (1.0 - label_smoothing) * q + label_smoothing / x.shape[-1]
        x = torch.where(counts.unsqueeze(-1), x, 0.0)
        rows = (tensor.reshape(-1, x.shape[-1]) for tensor in (x, normmax(x, alpha), q))
        losses = normmax_losses(*rows, float(alpha)).view(x.shape[:-1]).where(counts, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else divide_by_count(losses.sum(), counts.sum())


def check_order(alpha: float | Tensor, x: Tensor, dim: int) -> None:
    """A tensor is read by the operator that finds the offset."""
    if isinstance(alpha, Tensor):
        check_by_row("alpha", alpha, x, dim)
    else:
        check_order_number(alpha, "a number or a tensor")


def check_order_number(alpha: object, accepted: str = "a number") -> None:
    if not is_number(alpha):
        raise TypeError(f"alpha must be {accepted}, got {typed(alpha)}")
    if not 1.0 < alpha < math.inf:
        raise ValueError(f"alpha of normmax must be finite and above 1, got {alpha}")

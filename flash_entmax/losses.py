"""Fenchel-Young losses of entmax: what cross entropy is to softmax (Blondel, Martins, Niculae 2020, arXiv 1901.02324).

    L(x; q) = Omega*(x) + Omega(q) - q . x        Omega(p) = (sum p^alpha - 1) / (alpha (alpha - 1))

It is 0 exactly where entmax(x) equals the target q, and its gradient in x is entmax(x) - q: zero for all classes that
have no probability. A class can win for good: once it is ahead by 1 / (alpha - 1), the loss is exactly 0.
"""

import torch
from torch import Tensor

from . import row_ops
from .activations import check_alpha_number, check_scores, choose_rows
from .problem import Impl, refuse_nested

REDUCTIONS = "mean", "sum", "none"


def entmax_loss(
    input: Tensor,
    target: Tensor,
    alpha: float = 1.5,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """The loss whose prediction is entmax, in place of ``torch.nn.functional.cross_entropy``.

    Beside ``input``, ``target`` and the gradient, nothing of their size is kept: the forward pass keeps three numbers
    for each row, from which the backward pass computes the probabilities again.

    Args:
        input: scores, (classes,), (N, classes) or (N, classes, d1, ...); float16, bfloat16, float32 or float64. -inf
            masks a class; as a target it costs inf. With further dimensions, or strides, it is copied to rows first.
        target: class indices, int64, of the shape of ``input`` without the classes; or probabilities, of its shape and
            a floating-point type, each summing to 1, not differentiated.
        alpha: above 1, up to 2. 2 is the sparsemax loss. (1 is ``torch.nn.functional.cross_entropy``.) In float32 the
            relative rounding of a probability is about 2^-24 / (alpha - 1), so alpha below 1.01 loses digits.
        ignore_index: rows with this target count for nothing, whatever their scores are, and get gradient 0, whatever
            the incoming gradient is. Not for probabilities.
        reduction: ``"mean"`` over the rows that are not ignored (NaN, with gradient 0, if there are none), ``"sum"`` or
            ``"none"``.
        label_smoothing: from 0 to 1: the target becomes ``(1 - s) * target + s / classes``. The loss stays that of
            this mixed target, and is 0 where entmax equals it; ``cross_entropy`` would add the mixture's entropy.
        impl: as for :func:`flash_entmax.entmax`.

    Returns:
        float32 (float64 for float64): a scalar, or the shape of class indices for ``"none"``. Second derivatives are
        refused.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options that do not fit; ValueError for a class out of
            range. On CUDA, where reading the target would wait for the device, that is a device-side assertion.
    """
    class_dim = 0 if isinstance(input, Tensor) and input.dim() == 1 else 1
    check_scores(input, class_dim if isinstance(input, Tensor) and input.dim() > class_dim else 0, "input")
    check_options(alpha, ignore_index, reduction, label_smoothing)
    check_target(input, target, class_dim)
    impl = choose_rows(input, impl)
    rows = input.movedim(class_dim, -1)
    shape, rows = rows.shape[:-1], rows.reshape(-1, rows.shape[-1]).contiguous()
    count = rows.shape[0]
    if target.is_floating_point():
        aim = target.detach().movedim(class_dim, -1).reshape(rows.shape).contiguous()
    else:
        aim = target.reshape(-1).contiguous()
        count = (aim != ignore_index).sum()
    losses, _ = row_ops.loss(rows, aim, ignore_index, float(label_smoothing), float(alpha), impl)
    if target.is_floating_point():
        losses = losses + entropy_of(aim, float(alpha), label_smoothing, losses.dtype)
    if reduction == "none":
        return losses.view(shape)
    return losses.sum() if reduction == "sum" else mean_of(losses.sum(), count)


def sparsemax_loss(input: Tensor, target: Tensor, **options) -> Tensor:
    """:func:`entmax_loss` with alpha 2 (Martins and Astudillo 2016, arXiv 1602.02068)."""
    return entmax_loss(input, target, 2.0, **options)


def entmax15_loss(input: Tensor, target: Tensor, **options) -> Tensor:
    """:func:`entmax_loss` with alpha 1.5."""
    return entmax_loss(input, target, 1.5, **options)


def mean_of(total: Tensor, count: int | Tensor) -> Tensor:
    """NaN over no rows, with derivatives of 0."""
    if isinstance(count, Tensor):
        return torch.where(count == 0, torch.nan, total / count.clamp_min(1))
    return total / count if count else total * 0.0 + torch.nan


@torch.no_grad()
def entropy_of(aim: Tensor, alpha: float, smoothing: float, dtype: torch.dtype) -> Tensor:
    """(rows,) Omega of probabilities, mixed with the uniform distribution."""
    mixed = aim.to(dtype)
    if smoothing:
        mixed = (1.0 - smoothing) * mixed + smoothing / aim.shape[1]
    return (mixed.pow(alpha).sum(-1) - 1.0) / (alpha * (alpha - 1.0))


def check_options(alpha: float, ignore_index: int, reduction: str, label_smoothing: float) -> None:
    check_alpha_number(alpha)
    if alpha == 1.0:
        raise ValueError("alpha must be above 1, got 1.0: that loss is torch.nn.functional.cross_entropy")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if not isinstance(label_smoothing, (int, float)) or isinstance(label_smoothing, bool):
        raise TypeError(f"label_smoothing must be a number, got {label_smoothing!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def check_target(input: Tensor, target: Tensor, class_dim: int) -> None:
    if input.shape[class_dim] == 0:
        raise ValueError(f"input must have at least one class, got shape {tuple(input.shape)}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
    refuse_nested("target", target)
    if target.device != input.device:
        raise ValueError(f"target must be on the device of the input, {input.device}, got {target.device}")
    if target.is_floating_point():
        if target.shape != input.shape:
            shapes = f"{tuple(input.shape)}, got {tuple(target.shape)}"
            raise ValueError(f"a target of probabilities must have the shape of the input, {shapes}")
        return
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 classes or floating-point probabilities, got {target.dtype}")
    shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    if target.shape != shape:
        shapes = f"{tuple(shape)} for input {tuple(input.shape)}, got {tuple(target.shape)}"
        raise ValueError(f"a target of classes must have shape {shapes}; scores have their classes in dimension 1")

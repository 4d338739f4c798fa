"""Fenchel-Young losses of entmax: what cross entropy is to softmax (Blondel, Martins, Niculae 2020, arXiv 1901.02324).

    L(x; q) = Omega*(x) + Omega(q) - q . x        Omega(p) = (sum p^alpha - 1) / (alpha (alpha - 1))

It is 0 exactly where entmax(x) equals the target q. Its gradient in x is entmax(x) - q: zero for every class that has
no probability. Above alpha 1 a class can win for good: once it is ahead by 1 / (alpha - 1), the loss is exactly 0.
"""

from typing import NoReturn

import torch
from torch import Tensor

from .activations import DTYPES, check_alpha_number, check_scores, choose_for
from .backends import Impl
from .core.checks import require_dense
from .core.keywords import SOLVED, check_keywords
from .core.modes import as_autocast
from .operators import rows as row_ops
from .operators.linear_loss import linear_loss

REDUCTIONS = "mean", "sum", "none"
OF_LOSSES = {
    "weight": "there are no weights of classes",
    **dict.fromkeys(("size_average", "reduce"), "it is reduction"),
    "k": SOLVED,
}


def entmax_loss(
    input: Tensor,
    target: Tensor,
    alpha: float = 1.5,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    impl: Impl = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """The loss whose prediction is entmax, in place of ``torch.nn.functional.cross_entropy``.

    Beside ``input``, ``target`` and the gradient, nothing of their size is kept. The forward pass keeps three numbers
    for each row. From them the backward pass computes the probabilities again.

    Args:
        input: scores, (classes,), (N, classes) or (N, classes, d1, ...); float16, bfloat16, float32 or float64. -inf
            masks a class; as a target it costs inf. With further dimensions, or strides, it is copied to rows first.
        target: class indices, int64, of the shape of ``input`` without the classes; or probabilities, of its shape and
            a floating-point type, each summing to 1, not differentiated. That they do is not checked: of other numbers
            the result is no loss, or NaN.
        alpha: any number above 0 but 1, which is refused: call ``torch.nn.functional.cross_entropy`` there. 2 is the
            sparsemax loss. The kernels take those from 1.01 to 2, plain PyTorch all.
        ignore_index: rows with this target count for nothing, whatever their scores are. They get gradient 0, whatever
            the incoming gradient is. Not for probabilities.
        reduction: ``"mean"`` over the rows that are not ignored (NaN, with gradient 0, if there are none), ``"sum"`` or
            ``"none"``.
        label_smoothing: from 0 to 1: the target becomes ``(1 - s) * target + s / classes``. The loss is that of this
            mixed target, and is 0 where entmax equals it. ``cross_entropy`` would add the mixture's entropy.
        impl: as for :func:`flash_entmax.entmax`.

    Returns:
        float32 (float64 for float64): a scalar, or the shape of class indices for ``"none"``. Second derivatives are
        refused.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options that do not fit; ValueError for a class out of
            range. On CUDA, where reading the target would wait for the device, that is a device-side assertion.
    """
    check_keywords(entmax_loss, unknown, OF_LOSSES)
    class_dim = 0 if isinstance(input, Tensor) and input.dim() == 1 else 1
    check_scores(input, class_dim if isinstance(input, Tensor) and input.dim() > class_dim else 0, "input")
    check_options(alpha, ignore_index, reduction, label_smoothing)
    check_target(input, target, class_dim)
    backend = choose_for(alpha, input, impl)
    rows = input.movedim(class_dim, -1)
    shape, rows = rows.shape[:-1], rows.reshape(-1, rows.shape[-1]).contiguous()
    count: int | Tensor = rows.shape[0]
    if target.is_floating_point():
        refuse_ignored(ignore_index)
        row_target = target.detach().movedim(class_dim, -1).reshape(rows.shape).contiguous()
    else:
        row_target = target.reshape(-1).contiguous()
        count = (row_target != ignore_index).sum()
    losses, _ = row_ops.loss(rows, row_target, ignore_index, float(label_smoothing), float(alpha), backend)
    if target.is_floating_point():
        losses = losses + entropy_of(row_target, float(alpha), label_smoothing, losses.dtype)
    if reduction == "none":
        return losses.view(shape)
    return losses.sum() if reduction == "sum" else divide_by_count(losses.sum(), count)


def sparsemax_loss(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """:func:`entmax_loss` with alpha 2 (Martins and Astudillo 2016, arXiv 1602.02068)."""
    return entmax_loss(
        input, target, 2.0, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing, impl=impl
    )


def entmax15_loss(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """:func:`entmax_loss` with alpha 1.5."""
    return entmax_loss(
        input, target, 1.5, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing, impl=impl
    )


def linear_entmax_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    alpha: float = 1.5,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """``entmax_loss(linear(hidden, weight, bias), target)`` with the logits of only some tokens at a time.

    For 16,384 tokens and 131,072 classes, bfloat16 logits and their gradient would take 8 GiB. Here they take up to
    256 MiB, beside the weight's gradient in float32. Gradients are computed along with the loss, chunk by chunk, so
    each chunk's logits are computed once. Rows that are ignored count for nothing, whatever their ``hidden`` holds.
    They get gradient 0, whatever the incoming gradient is. Where every row is ignored, ``weight`` and ``bias`` get
    gradient 0 too.

    Args:
        hidden: (..., size); float16, bfloat16, float32 or float64.
        weight: (classes, size), of the dtype of ``hidden``.
        target: int64 classes, of the shape of ``hidden`` without its last dimension.
        bias: (classes,), of the dtype of ``hidden``.
        alpha, ignore_index, label_smoothing, impl: as for :func:`flash_entmax.entmax_loss`.
        reduction: ``"mean"`` (NaN, with gradient 0, if all rows are ignored) or ``"sum"``.

    Returns:
        A float32 scalar (float64 for float64). Second derivatives are refused.

    Raises:
        TypeError, ValueError: as for :func:`flash_entmax.entmax_loss`.
    """
    if bias is None:
        hidden, weight = as_autocast(hidden, weight)
    else:
        hidden, weight, bias = as_autocast(hidden, weight, bias)
    check_linear(hidden, weight, target, bias)
    check_options(alpha, ignore_index, reduction, label_smoothing)
    if reduction == "none":
        raise ValueError("reduction must be 'mean' or 'sum', got 'none': use entmax_loss for the loss of each token")
    rows, classes = hidden.flatten(0, -2), target.reshape(-1).contiguous()
    backend = choose_for(alpha, hidden, impl)
    scalars = ignore_index, float(label_smoothing), float(alpha), backend
    total, *_ = linear_loss(rows, weight, bias, classes, False, False, False, *scalars)
    return total if reduction == "sum" else divide_by_count(total, (classes != ignore_index).sum())


def divide_by_count(total: Tensor, count: int | Tensor) -> Tensor:
    """total / count; NaN with derivatives of 0 where count is 0."""
    if isinstance(count, Tensor):
        return torch.where(count == 0, torch.nan, total / count.clamp_min(1))
    return total / count if count else total * 0.0 + torch.nan


@torch.no_grad()
def entropy_of(target: Tensor, alpha: float, smoothing: float, dtype: torch.dtype) -> Tensor:
    """(rows,) Omega of probabilities (rows, classes), mixed with the uniform distribution: sum (q^alpha - q) / (alpha
    (alpha - 1)), in which next to alpha 1 no digits cancel."""
    q = target.to(dtype)
    if smoothing:
        q = (1.0 - smoothing) * q + smoothing / target.shape[1]
    log_q = torch.where(q == 0, 1.0, q).log()
    return (q * torch.expm1((alpha - 1.0) * log_q)).sum(-1) / (alpha * (alpha - 1.0))


def check_options(alpha: float, ignore_index: int, reduction: str, label_smoothing: float) -> None:
    check_alpha_number(alpha)
    if alpha == 1.0:
        raise ValueError("alpha must not be 1: that loss is torch.nn.functional.cross_entropy")
    check_loss_options(ignore_index, reduction, label_smoothing)


def check_loss_options(ignore_index: int, reduction: str, label_smoothing: float) -> None:
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be an int64, got {ignore_index}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if not isinstance(label_smoothing, (int, float)) or isinstance(label_smoothing, bool):
        raise TypeError(f"label_smoothing must be a number, got {label_smoothing!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def refuse_ignored(ignore_index: int) -> None:
    """Beside probabilities, which have no index."""
    if ignore_index != -100:
        raise ValueError(f"ignore_index is for a target of classes, got {ignore_index} beside probabilities")


def check_target(input: Tensor, target: Tensor, class_dim: int) -> None:
    if input.shape[class_dim] == 0:
        raise ValueError(f"input must have at least one class, got shape {tuple(input.shape)}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
    require_dense("target", target)
    if target.device != input.device:
        raise ValueError(f"target must be on the device of the input, {input.device}, got {target.device}")
    if target.is_floating_point():
        if target.shape != input.shape:
            shapes = f"{tuple(input.shape)}, got {tuple(target.shape)}"
            raise ValueError(
                f"a target of {target.dtype} holds probabilities, and must have the shape of the input, {shapes};"
                " classes are int64"
            )
        return
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 classes or floating-point probabilities, got {target.dtype}")
    shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    if target.shape != shape:
        shapes = f"{tuple(shape)} for input {tuple(input.shape)}, got {tuple(target.shape)}"
        raise ValueError(f"a target of classes must have shape {shapes}; scores have their classes in dimension 1")


def check_linear(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    tensors = {"hidden": hidden, "weight": weight, "target": target} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        require_dense(name, tensor)
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 classes, got {target.dtype}")
    if hidden.dim() < 2 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden and weight must have shapes (..., size) and (classes, size), got {shapes}")
    floating = {name: tensor.dtype for name, tensor in tensors.items() if name != "target"}
    if len(set(floating.values())) > 1:
        dtypes = ", ".join(map(str, floating.values()))
        raise TypeError(f"{' and '.join(floating)} must have one dtype, got {dtypes}")
    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden must be float16, bfloat16, float32 or float64, got {hidden.dtype}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"target must have shape {tuple(hidden.shape[:-1])}, got {tuple(target.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")

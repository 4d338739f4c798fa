"""The entmax loss of a linear layer's outputs, without the logits of all tokens at once."""

import torch
from torch import Tensor

from . import row_ops
from .activations import DTYPES, choose_rows
from .functional import as_autocast
from .losses import check_options
from .problem import Impl, ceil_div, row_dtype

CHUNK_LOGITS = 2**26


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

    For 16,384 tokens and 131,072 classes, bfloat16 logits and their gradient would take 8 GiB; here they take up to
    256 MiB, beside the weight's gradient in float32. Gradients are computed along with the loss, chunk by chunk: each
    chunk's logits are made once. Rows that are ignored count for nothing, whatever their ``hidden`` holds, and get
    gradient 0, whatever the incoming gradient is; where no row counts, so do ``weight`` and ``bias``.

    Args:
        hidden: (..., size); float16, bfloat16, float32 or float64.
        weight: (classes, size), of the dtype of ``hidden``.
        target: int64 classes, of the shape of ``hidden`` without its last dimension.
        bias: (classes,), of the dtype of ``hidden``.
        alpha, ignore_index, label_smoothing, impl: as for :func:`flash_entmax.entmax_loss`.
        reduction: ``"mean"`` (NaN, with gradient 0, if all rows are ignored) or ``"sum"``.

    Returns:
        A float32 scalar (float64 for float64). ``create_graph=True`` is refused: there is no second derivative.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options that do not fit.
    """
    if bias is None:
        hidden, weight = as_autocast(hidden, weight)
    else:
        hidden, weight, bias = as_autocast(hidden, weight, bias)
    check_linear(hidden, weight, target, bias)
    check_options(alpha, ignore_index, reduction, label_smoothing)
    if reduction == "none":
        raise ValueError("reduction must be 'mean' or 'sum', got 'none': use entmax_loss for the loss of each token")
    rows, classes = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1).contiguous()
    impl = choose_rows(hidden, impl)
    scalars = ignore_index, float(label_smoothing), float(alpha), impl
    total = LinearLoss.apply(rows, weight, bias, classes, torch.is_grad_enabled(), *scalars)
    return total if reduction == "sum" else total / (classes != ignore_index).sum()


class LinearLoss(torch.autograd.Function):
    """Sum of the losses, and its gradients, in one pass over the tokens; the backward pass only scales what is there.

    The weight's gradient stays in float32 until it is scaled: neither a mean over many tokens nor a loss scaled up for
    float16 leaves the range of 16 bits before. What counts for nothing is selected, not multiplied by 0: the incoming
    gradient of a mean over no rows is inf.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, classes, is_training, *scalars):
        dtype, ignored = row_dtype(hidden), (classes == scalars[0]).unsqueeze(-1)
        total = hidden.new_zeros((), dtype=dtype)
        needed = [is_training and is_needed for is_needed in ctx.needs_input_grad[:3]]
        of_hidden = torch.empty_like(hidden) if needed[0] else None
        of_weight = torch.zeros_like(weight, dtype=dtype) if needed[1] else None
        of_bias = torch.zeros_like(bias, dtype=dtype) if needed[2] else None
        with row_ops.as_given(hidden):
            for part in chunks(hidden.shape[0], weight.shape[0]):
                logits = torch.nn.functional.linear(hidden[part], weight, bias)
                losses, state = row_ops.loss(logits, classes[part], *scalars)
                total += losses.sum()
                if not any(needed):
                    continue
                of_logits = row_ops.loss_backward(torch.ones_like(losses), logits, classes[part], state, *scalars)
                if of_hidden is not None:
                    of_hidden[part] = (of_logits @ weight).masked_fill_(ignored[part], 0.0)
                if of_weight is not None:
                    of_weight += product(of_logits.mT, hidden[part].masked_fill(ignored[part], 0.0), dtype)
                if of_bias is not None:
                    of_bias += of_logits.sum(0, dtype=dtype)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(of_hidden, of_weight, of_bias, ignored)
        return total

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("linear_entmax_loss has no second derivative: create_graph=True is refused")
        *gradients, ignored = ctx.saved_tensors
        of_rows, of_all = grad.where(~ignored, 0.0), grad.where(~ignored.all(), 0.0)
        parts = zip(gradients, (of_rows, of_all, of_all), ctx.dtypes, strict=True)
        return *(None if g is None else (g.to(grad.dtype) * by).to(dtype) for g, by, dtype in parts), *(None,) * 6


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, added up and returned in a wider dtype."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def chunks(tokens: int, classes: int) -> list[slice]:
    """Equal parts of the tokens whose logits are at most CHUNK_LOGITS numbers, or one token's."""
    parts = max(1, min(tokens, ceil_div(tokens * classes, CHUNK_LOGITS)))
    size = max(1, ceil_div(tokens, parts))
    return [slice(first, first + size) for first in range(0, tokens, size)]


def check_linear(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    tensors = {"hidden": hidden, "weight": weight, "target": target} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
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

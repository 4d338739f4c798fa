"""The entmax loss of a linear layer's outputs, without the logits of all tokens at once."""

import torch
from torch import Tensor

from ..core.modes import as_given
from ..core.tensors import ceil_div, row_dtype
from . import rows as row_ops
from .registration import below_autograd, call_one_by_one, differentiate, fake, operator, refuse_second_derivative

CHUNK_LOGITS = 2**26


_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor classes"
_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"


@operator(
    f"{_INPUTS}, bool of_hidden, bool of_weight, bool of_bias, int ignored, float smoothing, float alpha, str impl",
    results=4,
)
def linear_loss(hidden, weight, bias, classes, of_hidden, of_weight, of_bias, *scalars):
    """Sum of the losses, and those of its gradients that are asked for, in one pass over the tokens.

    The gradients of weight and bias are in float32: neither a mean over many tokens nor a loss scaled up for float16
    leaves the range of 16 bits before the backward pass has scaled them.
    """
    dtype, ignored = row_dtype(hidden), (classes == scalars[0]).unsqueeze(-1)
    total = hidden.new_zeros((), dtype=dtype)
    gradients = new_gradients(hidden, weight, bias, of_hidden, of_weight, of_bias)
    grad_hidden, grad_weight, grad_bias = (gradient.zero_() for gradient in gradients)
    with as_given(hidden):
        for part in chunks(hidden.shape[0], weight.shape[0]):
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            losses, state = row_ops.loss(logits, classes[part], *scalars)
            total += losses.sum()
            if not (of_hidden or of_weight or of_bias):
                continue
            grad_logits = row_ops.loss_backward(torch.ones_like(losses), logits, classes[part], state, *scalars)
            if of_hidden:
                grad_hidden[part] = (grad_logits @ weight).masked_fill_(ignored[part], 0.0)
            if of_weight:
                grad_weight += product(grad_logits.mT, hidden[part].masked_fill(ignored[part], 0.0), dtype)
            if of_bias:
                grad_bias += grad_logits.sum(0, dtype=dtype)
    return total, grad_hidden, grad_weight, grad_bias


@fake("linear_loss")
def _(hidden, weight, bias, classes, of_hidden, of_weight, of_bias, *_):
    total = hidden.new_empty((), dtype=row_dtype(hidden))
    return total, *new_gradients(hidden, weight, bias, of_hidden, of_weight, of_bias)


def new_gradients(hidden, weight, bias, *asked: bool) -> list[Tensor]:
    """Tensors for the gradients, without any element for those that are not asked for."""
    wide = row_dtype(hidden)
    shapes = ((hidden.shape, hidden.dtype), (weight.shape, wide), (weight.shape[:1], wide))
    return [
        hidden.new_empty(shape if is_asked else (0,), dtype=dtype)
        for (shape, dtype), is_asked in zip(shapes, asked, strict=True)
    ]


@operator(f"Tensor grad, {_INPUTS}, {_GRADIENTS}, int ignored", results=3)
def linear_loss_backward(grad, hidden, weight, bias, classes, grad_hidden, grad_weight, grad_bias, ignored):
    """What there is, scaled. What counts for nothing is selected, not multiplied by 0: the incoming gradient of a mean
    over no rows is inf."""
    counts = (classes != ignored).unsqueeze(-1)
    of_rows, of_all = grad.where(counts, 0.0), grad.where(counts.any(), 0.0)
    return (
        (grad_hidden.to(grad.dtype) * (of_rows if grad_hidden.dim() > 1 else of_all)).to(hidden.dtype),
        (grad_weight * of_all).to(weight.dtype),
        (grad_bias * of_all).to(weight.dtype),
    )


@fake("linear_loss_backward")
def _(grad, hidden, weight, bias, classes, *gradients_and_ignored):
    gradients, dtypes = gradients_and_ignored[:3], (hidden.dtype, weight.dtype, weight.dtype)
    return tuple(torch.empty_like(own, dtype=dtype) for own, dtype in zip(gradients, dtypes, strict=True))


@operator(
    f"{_INPUTS}, Tensor? hidden_tangent, Tensor? weight_tangent, Tensor? bias_tangent, int ignored, float smoothing, "
    "float alpha, str impl",
    results=1,
)
def linear_loss_tangent(hidden, weight, bias, classes, hidden_tangent, weight_tangent, bias_tangent, *scalars):
    """How the sum changes along the tangents: the products of these with its gradients."""
    tangents = hidden_tangent, weight_tangent, bias_tangent
    moved = [tangent is not None for tangent in tangents]
    total, *gradients = linear_loss(hidden, weight, bias, classes, *moved, *scalars)
    change = torch.zeros_like(total)
    for gradient, tangent in zip(gradients, tangents, strict=True):
        if tangent is not None:
            change += torch.where(gradient == 0, 0.0, gradient.to(total.dtype) * tangent).sum()
    return change


@fake("linear_loss_tangent")
def _(hidden, *_):
    return hidden.new_empty((), dtype=row_dtype(hidden))


class LinearLoss(torch.autograd.Function):
    """Asks the operator for those gradients that its inputs need, and keeps them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, classes, *rest):
        asked, scalars = rest[:3], rest[3:]
        needed = (one or other for one, other in zip(asked, ctx.needs_input_grad, strict=False))
        with below_autograd():
            results = linear_loss(hidden, weight, bias, classes, *needed, *scalars)
        ctx.scalars = scalars
        ctx.save_for_backward(hidden, weight, bias, classes, *results[1:])
        ctx.save_for_forward(hidden, weight, bias, classes)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 11
        gradients = linear_loss_backward(grad, *ctx.saved_tensors, ctx.scalars[0])
        kept = (own if needed else None for own, needed in zip(gradients, ctx.needs_input_grad, strict=False))
        return *kept, *(None,) * 8

    @staticmethod
    def jvp(ctx, *tangents):
        return linear_loss_tangent(*ctx.saved_tensors, *tangents[:3], *ctx.scalars), None, None, None


differentiate(linear_loss, LinearLoss)
refuse_second_derivative(linear_loss_backward)
refuse_second_derivative(linear_loss_tangent)
call_one_by_one(linear_loss)
call_one_by_one(linear_loss_tangent)
call_one_by_one(linear_loss_backward)


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

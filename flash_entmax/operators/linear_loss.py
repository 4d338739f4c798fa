"""The entmax loss of a linear layer's outputs. The logits of only one chunk of tokens exist at a time."""

from typing import Any

import torch
from torch import Tensor

from ..core.modes import as_given
from ..core.registration import below_autograd, call_one_by_one, differentiate, fake, operator, refuse_second_derivative
from ..core.tensors import ceil_div, row_dtype
from . import rows as row_ops

CHUNK_LOGITS = 2**26

_SCALARS = "int ignore_index, float smoothing, float alpha, str impl"
_TANGENTS = "Tensor? hidden_tangent, Tensor? weight_tangent, Tensor? bias_tangent"
_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor classes"
_NEEDS = "bool needs_grad_hidden, bool needs_grad_weight, bool needs_grad_bias"
_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"


@operator(f"{_INPUTS}, {_NEEDS}, {_SCALARS}", results=4)
def linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor, needs_grad_hidden: bool,
    needs_grad_weight: bool, needs_grad_bias: bool, *scalars: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The sum of the losses, and the gradients that are needed, in one pass over the tokens.

    The gradients of weight and bias are in float32. A mean over many tokens, or a loss scaled up for float16, would
    leave the range of 16 bits before the backward pass scales the gradients.
    """
    dtype, ignored = row_dtype(hidden), (classes == scalars[0]).unsqueeze(-1)
    needs_grad = needs_grad_hidden, needs_grad_weight, needs_grad_bias
    total = hidden.new_zeros((), dtype=dtype)
    gradients = new_gradients(hidden, weight, *needs_grad)
    grad_hidden, grad_weight, grad_bias = (gradient.zero_() for gradient in gradients)
    with as_given(hidden):
        for part in chunks(hidden.shape[0], weight.shape[0]):
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            losses, state = row_ops.loss(logits, classes[part], *scalars)
            total += losses.sum()
            if not any(needs_grad):
                continue
            grad_logits = row_ops.loss_backward(torch.ones_like(losses), logits, classes[part], state, *scalars)
            if needs_grad_hidden:
                grad_hidden[part] = (grad_logits @ weight).masked_fill_(ignored[part], 0.0)
            if needs_grad_weight:
                grad_weight += product(grad_logits.mT, hidden[part].masked_fill(ignored[part], 0.0), dtype)
            if needs_grad_bias:
                grad_bias += grad_logits.sum(0, dtype=dtype)
    return total, grad_hidden, grad_weight, grad_bias


@fake("linear_loss")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor, needs_grad_hidden: bool,
    needs_grad_weight: bool, needs_grad_bias: bool, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    total = hidden.new_empty((), dtype=row_dtype(hidden))
    return total, *new_gradients(hidden, weight, needs_grad_hidden, needs_grad_weight, needs_grad_bias)


def new_gradients(hidden: Tensor, weight: Tensor, *needs_grad: bool) -> list[Tensor]:
    """Tensors for the gradients of hidden, weight and bias. A gradient that is not needed has no element."""
    wide = row_dtype(hidden)
    kinds = ((hidden.shape, hidden.dtype), (weight.shape, wide), (weight.shape[:1], wide))
    return [
        hidden.new_empty(shape if is_needed else (0,), dtype=dtype)
        for (shape, dtype), is_needed in zip(kinds, needs_grad, strict=True)
    ]


@operator(f"Tensor grad, {_INPUTS}, {_GRADIENTS}, int ignore_index", results=3)
def linear_loss_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor, grad_hidden: Tensor,
    grad_weight: Tensor, grad_bias: Tensor, ignore_index: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients, scaled by `grad`.

    Rows that do not count are selected, not multiplied by 0: the incoming gradient of a mean over no rows is inf.
    """
    counts = (classes != ignore_index).unsqueeze(-1)
    row_factor, factor = grad.where(counts, 0.0), grad.where(counts.any(), 0.0)
    return (
        (grad_hidden.to(grad.dtype) * (row_factor if grad_hidden.dim() > 1 else factor)).to(hidden.dtype),
        (grad_weight * factor).to(weight.dtype),
        (grad_bias * factor).to(weight.dtype),
    )


@fake("linear_loss_backward")
def _(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor, grad_hidden: Tensor,
    grad_weight: Tensor, grad_bias: Tensor, ignore_index: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    kinds = (grad_hidden, hidden.dtype), (grad_weight, weight.dtype), (grad_bias, weight.dtype)
    return tuple(torch.empty_like(gradient, dtype=dtype) for gradient, dtype in kinds)


@operator(f"{_INPUTS}, {_TANGENTS}, {_SCALARS}", results=1)
def linear_loss_tangent(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor, hidden_tangent: Tensor | None,
    weight_tangent: Tensor | None, bias_tangent: Tensor | None, *scalars: Any,
) -> Tensor:  # fmt: skip
    """The sum's derivative along the tangents: their products with the sum's gradients."""
    tangents = hidden_tangent, weight_tangent, bias_tangent
    needs_grad = [tangent is not None for tangent in tangents]
    total, *gradients = linear_loss(hidden, weight, bias, classes, *needs_grad, *scalars)
    result = torch.zeros_like(total)
    for gradient, tangent in zip(gradients, tangents, strict=True):
        if tangent is not None:
            result += torch.where(gradient == 0, 0.0, gradient.to(total.dtype) * tangent).sum()
    return result


@fake("linear_loss_tangent")
def _(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty((), dtype=row_dtype(hidden))


class LinearLoss(torch.autograd.Function):
    """Computes the gradients that autograd needs along with the loss, and keeps them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor, needs_grad_hidden: bool,
        needs_grad_weight: bool, needs_grad_bias: bool, *scalars: Any,
    ) -> tuple:  # fmt: skip
        needs_grad = (
            needs_grad_hidden or ctx.needs_input_grad[0],
            needs_grad_weight or ctx.needs_input_grad[1],
            needs_grad_bias or ctx.needs_input_grad[2],
        )
        with below_autograd():
            results = linear_loss(hidden, weight, bias, classes, *needs_grad, *scalars)
        ctx.scalars = scalars
        ctx.save_for_backward(hidden, weight, bias, classes, *results[1:])
        ctx.save_for_forward(hidden, weight, bias, classes)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        if grad is None:
            return (None,) * 11
        gradients = linear_loss_backward(grad, *ctx.saved_tensors, ctx.scalars[0])
        pairs = zip(gradients, ctx.needs_input_grad[:3], strict=True)
        return *(gradient if is_needed else None for gradient, is_needed in pairs), *(None,) * 8

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple:
        return linear_loss_tangent(*ctx.saved_tensors, *tangents[:3], *ctx.scalars), None, None, None


differentiate(linear_loss, LinearLoss)
refuse_second_derivative(linear_loss_backward)
refuse_second_derivative(linear_loss_tangent)
call_one_by_one(linear_loss)
call_one_by_one(linear_loss_tangent)
call_one_by_one(linear_loss_backward)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed and returned in a wider dtype."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def chunks(tokens: int, classes: int) -> list[slice]:
    """Equal parts of the tokens. The logits of a part are at most CHUNK_LOGITS numbers, or those of one token."""
    parts = max(1, min(tokens, ceil_div(tokens * classes, CHUNK_LOGITS)))
    size = max(1, ceil_div(tokens, parts))
    return [slice(first, first + size) for first in range(0, tokens, size)]

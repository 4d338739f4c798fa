"""Operators of entmax along rows, as attention.py has those of attention. The backends compute them.

    flash_entmax::entmax           x (rows, n)              -> probabilities
    flash_entmax::entmax_backward                           -> grad_x, grad_alphas (rows,)
    flash_entmax::loss             x, target                -> losses (rows,), state (3, rows)
    flash_entmax::loss_backward                             -> grad_x

All tensors are contiguous. `alphas` is (rows,), in place of the number `alpha`. `target` is classes (rows,), or
probabilities (rows, n). `state` is (maximum, offset, last_step) of each row: the loss's gradient computes the
probabilities again from x and `state`, so nothing of the size of x is kept.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..core.alphas import check_alphas, check_positive
from ..core.loss import LossOptions, check_classes
from ..core.modes import as_given
from ..core.registration import batch_into, below_autograd, differentiate, fake, operator, refuse_second_derivative
from ..core.tensors import row_dtype
from ..core.threshold import weight_along_alpha


@operator("Tensor x, Tensor? alphas, float alpha, str impl", results=1)
def entmax(x: Tensor, alphas: Tensor | None, alpha: float, impl: str) -> Tensor:
    if alphas is not None and impl == "triton":
        check_alphas(alphas, "; impl='torch' takes any above 0, and alpha_range clamps")
    elif alphas is not None:
        check_positive(alphas)
    with as_given(x):
        return BACKENDS[impl].entmax(x, alphas, alpha)


@fake("entmax")
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@operator("Tensor grad, Tensor p, Tensor? alphas, float alpha, bool needs_grad_alpha, str impl", results=2)
def entmax_backward(
    grad: Tensor, p: Tensor, alphas: Tensor | None, alpha: float, needs_grad_alpha: bool, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    with as_given(p):
        return BACKENDS[impl].entmax_backward(grad.contiguous(), p, alphas, alpha, needs_grad_alpha)


@fake("entmax_backward")
def _(
    grad: Tensor, p: Tensor, alphas: Tensor | None, alpha: float, needs_grad_alpha: bool, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    return torch.empty_like(p), p.new_empty(p.shape[0] if needs_grad_alpha else 0, dtype=row_dtype(p))


@operator("Tensor x, Tensor target, int ignore_index, float smoothing, float alpha, str impl", results=2)
def loss(x: Tensor, target: Tensor, ignore_index: int, smoothing: float, alpha: float, impl: str) -> tuple[Tensor, ...]:
    check_classes(target, ignore_index, x.shape[1])
    with as_given(x):
        return BACKENDS[impl].loss(x, target, LossOptions(ignore_index, smoothing, alpha))


@fake("loss")
def _(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    losses = x.new_empty(x.shape[0], dtype=row_dtype(x))
    return losses, losses.new_empty(3, x.shape[0])


@operator(
    "Tensor grad, Tensor x, Tensor target, Tensor state, int ignore_index, float smoothing, float alpha, str impl",
    results=1,
)
def loss_backward(
    grad: Tensor, x: Tensor, target: Tensor, state: Tensor, ignore_index: int, smoothing: float, alpha: float,
    impl: str,
) -> Tensor:  # fmt: skip
    options = LossOptions(ignore_index, smoothing, alpha)
    with as_given(x):
        return BACKENDS[impl].loss_backward(grad.contiguous(), x, target, state, options)


@fake("loss_backward")
def _(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


class Entmax(torch.autograd.Function):
    """Keeps the probabilities, as a softmax does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alphas: Tensor | None, alpha: float, impl: str) -> Tensor:
        with below_autograd():
            p = entmax(x, alphas, alpha, impl)
        ctx.save_for_backward(p, alphas)
        ctx.save_for_forward(p, alphas)
        ctx.scalars = alpha, impl
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        needs_grad_alpha, (alpha, impl) = ctx.needs_input_grad[1], ctx.scalars
        grad_x, grad_alphas = entmax_backward(grad, *ctx.saved_tensors, alpha, needs_grad_alpha, impl)
        return grad_x, grad_alphas if needs_grad_alpha else None, None, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, alphas_tangent: Tensor | None, *_: Any) -> Tensor | None:
        """dp / dx = diag(u) - u u^T / sum u is symmetric, so the backward operator gives the tangent too."""
        p, alphas = ctx.saved_tensors
        alpha, impl = ctx.scalars
        tangent = None if x_tangent is None else entmax_backward(x_tangent, p, alphas, alpha, False, impl)[0]
        if alphas_tangent is None:
            return tangent
        along_alpha = tangent_along_alpha(p, alphas, alphas_tangent)
        return along_alpha if tangent is None else tangent + along_alpha


def tangent_along_alpha(p: Tensor, alphas: Tensor, alphas_tangent: Tensor) -> Tensor:
    """d alpha (u sum u phi / sum u - u phi) of each row: `weight_along_alpha` says what phi is."""
    wide_p, alphas = p.to(alphas.dtype), alphas.unsqueeze(-1)
    u = torch.where(p == 0, 0.0, wide_p ** (2.0 - alphas))
    weight = u.sum(-1, keepdim=True)
    fall = weight_along_alpha(wide_p, alphas)
    dp_dalpha = u * (fall.sum(-1, keepdim=True) / torch.where(weight == 0, 1.0, weight)) - fall
    return (dp_dalpha * alphas_tangent.unsqueeze(-1)).to(p.dtype)


class Loss(torch.autograd.Function):
    """Keeps x and the target, which the caller has anyway, and three numbers of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, *scalars: Any) -> tuple:
        with below_autograd():
            losses, state = loss(x, target, *scalars)
        ctx.save_for_backward(x, target, state)
        ctx.save_for_forward(x, target, state)
        ctx.scalars = scalars
        ctx.mark_non_differentiable(state)
        ctx.set_materialize_grads(False)
        return losses, state

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple:
        if grad is None:
            return (None,) * 6
        return loss_backward(grad, *ctx.saved_tensors, *ctx.scalars), *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, *_: Any) -> tuple:
        x, target, state = ctx.saved_tensors
        grad_x = loss_backward(torch.ones_like(state[0]), x, target, state, *ctx.scalars)
        return torch.where(grad_x == 0, 0.0, grad_x.to(state.dtype) * x_tangent).sum(-1), None


differentiate(entmax, Entmax)
differentiate(loss, Loss)
refuse_second_derivative(entmax_backward)
refuse_second_derivative(loss_backward)

batch_into(entmax, (0, 0), (0,))
batch_into(entmax_backward, (0, 0, 0), (0, 0))
batch_into(loss, (0, 0), (0, 1))
batch_into(loss_backward, (0, 0, 0, 1), (0,))

"""Operator contracts of entmax along rows, as ops.py has those of attention. Imports no Triton.

    flash_entmax::entmax           x (rows, n)              -> probabilities
    flash_entmax::entmax_backward                           -> grad_x, grad_alphas (rows,)
    flash_entmax::loss             x, aim                   -> losses (rows,), state (3, rows)
    flash_entmax::loss_backward                             -> grad_x

All tensors are contiguous. `alphas` is (rows,), in place of the number `alpha`; `aim` is classes (rows,), or
probabilities (rows, n); `state` is what each row was solved to, from which the loss's gradient has the probabilities
again, so that nothing of the size of x is kept.
"""

import torch

from .problem import row_dtype
from .registration import as_given, below_autograd, differentiate, fake, operator, refuse_second_derivative
from .rows import Target


def stages(impl: str):
    """The module that computes; Triton is imported by the first call that needs it."""
    if impl == "triton":
        from .kernels import rows as module
    else:
        from . import rows as module
    return module


@operator("Tensor x, Tensor? alphas, float alpha, str impl", results=1)
def entmax(x, alphas, alpha, impl):
    with as_given(x):
        return stages(impl).entmax(x, alphas, alpha)


@fake("entmax")
def _(x, *_):
    return torch.empty_like(x)


@operator("Tensor grad, Tensor p, Tensor? alphas, float alpha, bool of_alpha, str impl", results=2)
def entmax_backward(grad, p, alphas, alpha, of_alpha, impl):
    with as_given(p):
        return stages(impl).entmax_backward(grad.contiguous(), p, alphas, alpha, of_alpha)


@fake("entmax_backward")
def _(grad, p, alphas, alpha, of_alpha, impl):
    return torch.empty_like(p), p.new_empty(p.shape[0] if of_alpha else 0, dtype=row_dtype(p))


@operator("Tensor x, Tensor aim, int ignored, float smoothing, float alpha, str impl", results=2)
def loss(x, aim, ignored, smoothing, alpha, impl):
    with as_given(x):
        return stages(impl).loss(x, Target(aim, ignored, smoothing), alpha)


@fake("loss")
def _(x, *_):
    losses = x.new_empty(x.shape[0], dtype=row_dtype(x))
    return losses, losses.new_empty(3, x.shape[0])


@operator(
    "Tensor grad, Tensor x, Tensor aim, Tensor state, int ignored, float smoothing, float alpha, str impl",
    results=1,
)
def loss_backward(grad, x, aim, state, ignored, smoothing, alpha, impl):
    with as_given(x):
        return stages(impl).loss_backward(grad.contiguous(), x, Target(aim, ignored, smoothing), state, alpha)


@fake("loss_backward")
def _(grad, x, *_):
    return torch.empty_like(x)


class Entmax(torch.autograd.Function):
    """Keeps the probabilities, as a softmax does."""

    @staticmethod
    def forward(ctx, x, alphas, alpha, impl):
        with below_autograd():
            p = entmax(x, alphas, alpha, impl)
        ctx.save_for_backward(p, *(() if alphas is None else (alphas,)))
        ctx.scalars = alpha, impl
        return p

    @staticmethod
    def backward(ctx, grad):
        p, *alphas = ctx.saved_tensors
        alpha, impl = ctx.scalars
        of_alpha = ctx.needs_input_grad[1]
        grad_x, grad_alphas = entmax_backward(grad, p, alphas[0] if alphas else None, alpha, of_alpha, impl)
        return grad_x, grad_alphas if of_alpha else None, None, None


class Loss(torch.autograd.Function):
    """Keeps x and the target, which are there anyway, and three numbers of each row."""

    @staticmethod
    def forward(ctx, x, aim, *scalars):
        with below_autograd():
            losses, state = loss(x, aim, *scalars)
        ctx.save_for_backward(x, aim, state)
        ctx.scalars = scalars
        ctx.mark_non_differentiable(state)
        ctx.set_materialize_grads(False)
        return losses, state

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 6
        return loss_backward(grad, *ctx.saved_tensors, *ctx.scalars), *(None,) * 5


differentiate(entmax, Entmax)
differentiate(loss, Loss)
refuse_second_derivative(entmax_backward)
refuse_second_derivative(loss_backward)

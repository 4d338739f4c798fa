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
from torch import Tensor

from ..backends.torch.rows import Target, check_classes
from ..core.modes import as_given
from ..core.tensors import row_dtype
from .registration import batch_into, below_autograd, differentiate, fake, operator, refuse_second_derivative


def stages(impl: str):
    """The module that computes; Triton is imported by the first call that needs it."""
    if impl == "triton":
        from ..backends.triton import rows as module
    else:
        from ..backends.torch import rows as module
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
    target = Target(aim, ignored, smoothing)
    check_classes(target, x.shape[1])
    with as_given(x):
        return stages(impl).loss(x, target, alpha)


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
        ctx.save_for_backward(p, alphas)
        ctx.save_for_forward(p, alphas)
        ctx.scalars = alpha, impl
        return p

    @staticmethod
    def backward(ctx, grad):
        of_alpha = ctx.needs_input_grad[1]
        grad_x, grad_alphas = entmax_backward(grad, *ctx.saved_tensors, ctx.scalars[0], of_alpha, ctx.scalars[1])
        return grad_x, grad_alphas if of_alpha else None, None, None

    @staticmethod
    def jvp(ctx, x, alphas, *_):
        """The derivative by x is a symmetric matrix, diag(u) - u u^T / sum u: its tangent is its gradient."""
        p, own_alphas = ctx.saved_tensors
        alpha, impl = ctx.scalars
        change = 0.0 if x is None else entmax_backward(x, p, own_alphas, alpha, False, impl)[0]
        return change if alphas is None else change + along_alpha(p, own_alphas, alphas)


def along_alpha(p: Tensor, alphas: Tensor, tangent: Tensor) -> Tensor:
    """d alpha r^2 (s - u sum s / sum u) of each row, with s = p (1 - ln d), ln d = ln p / r and r = 1 / (alpha - 1)."""
    wide, ratio = p.to(alphas.dtype), (alphas - 1.0).unsqueeze(-1)
    s = torch.where(p == 0, 0.0, wide * (1.0 - ratio * wide.log()))
    u = torch.where(p == 0, 0.0, wide ** (1.0 - ratio))
    total = u.sum(-1, keepdim=True)
    centred = s - u * (s.sum(-1, keepdim=True) / torch.where(total == 0, 1.0, total))
    return (centred * (tangent.unsqueeze(-1) / ratio**2)).to(p.dtype)


class Loss(torch.autograd.Function):
    """Keeps x and the target, which are there anyway, and three numbers of each row."""

    @staticmethod
    def forward(ctx, x, aim, *scalars):
        with below_autograd():
            losses, state = loss(x, aim, *scalars)
        ctx.save_for_backward(x, aim, state)
        ctx.save_for_forward(x, aim, state)
        ctx.scalars = scalars
        ctx.mark_non_differentiable(state)
        ctx.set_materialize_grads(False)
        return losses, state

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 6
        return loss_backward(grad, *ctx.saved_tensors, *ctx.scalars), *(None,) * 5

    @staticmethod
    def jvp(ctx, tangent, *_):
        x, aim, state = ctx.saved_tensors
        gradient = loss_backward(torch.ones_like(state[0]), x, aim, state, *ctx.scalars)
        return torch.where(gradient == 0, 0.0, gradient.to(state.dtype) * tangent).sum(-1), None


differentiate(entmax, Entmax)
differentiate(loss, Loss)
refuse_second_derivative(entmax_backward)
refuse_second_derivative(loss_backward)

batch_into(entmax, (0, 0), (0,))
batch_into(entmax_backward, (0, 0, 0), (0, 0))
batch_into(loss, (0, 0), (0, 1))
batch_into(loss_backward, (0, 0, 0, 1), (0,))

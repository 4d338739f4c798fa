"""Training steps like one before: what their backend has prepared, as a step of autograd.

It saves what `Attention` saves, in the same order: a checkpoint may find the other way when it computes a call again.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import PreparedStep
from .attention import OptionNumbers, OptionTensors, attention_backward
from .eager import is_eager, unrecorded

NO_TENSORS = OptionTensors(*[None] * 6)


def attend_by(
    step: PreparedStep, numbers: OptionNumbers, query: Tensor, key: Tensor, value: Tensor, intervals: Tensor | None
) -> Tensor | None:
    """The output, which autograd records; None where the operator has to compute it."""
    results = step.forward(query, key, value, intervals)
    if results is None:
        return None
    return KeptAttention.apply(query, key, value, intervals, results, step, numbers)


class KeptAttention(torch.autograd.Function):
    """The derivatives of results that are computed before."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, intervals: Tensor | None, results: tuple[Tensor, ...],
        step: PreparedStep, numbers: OptionNumbers,
    ) -> Tensor:  # fmt: skip
        output, *state = results
        ctx.save_for_backward(query, key, value, *state, intervals)
        ctx.step, ctx.numbers = step, numbers
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple:
        if grad_output is None:
            return (None,) * 7
        saved = ctx.saved_tensors  # read once: a checkpoint gives them once
        gradients = None
        if not torch.is_grad_enabled() and is_eager((grad_output,)):
            gradients = ctx.step.backward(grad_output, *saved)
        if gradients is None:
            gradients = by_operator(grad_output, saved, ctx.numbers)
        return *gradients, None, None, None, None


def by_operator(grad_output: Tensor, saved: tuple[Tensor, ...], numbers: OptionNumbers) -> tuple[Tensor, ...]:
    """The gradients where nothing is prepared for them. A second derivative finds the operator, which refuses it."""
    *tensors, intervals = saved
    compute = unrecorded(attention_backward, (grad_output, *saved))
    options = NO_TENSORS._replace(intervals=intervals)
    return compute(grad_output, *tensors, False, *options, *numbers)[:3]

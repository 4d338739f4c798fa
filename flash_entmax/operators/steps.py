"""Training steps like one before: what their backend has prepared, as a step of autograd.

It saves what `Attention` saves, in the same order: a checkpoint may find the other way when it computes a call again.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import PreparedStep
from ..core.call import OwnOptions
from .attention import SAVED, OptionNumbers, OptionTensors, attention_backward
from .eager import is_eager, unrecorded

NO_TENSORS = OptionTensors()


def attend_by(
    step: PreparedStep, numbers: OptionNumbers, query: Tensor, key: Tensor, value: Tensor, own: OwnOptions
) -> Tensor | None:
    """The output, which autograd records; None where the operator has to compute it."""
    results = step.forward(query, key, value, own)
    if results is None:
        return None
    return KeptAttention.apply(query, key, value, own, results, step, numbers)


class KeptAttention(torch.autograd.Function):
    """The derivatives of results that are computed before."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, own: OwnOptions, results: tuple[Tensor, ...],
        step: PreparedStep, numbers: OptionNumbers,
    ) -> Tensor:  # fmt: skip
        output, *state = results
        ctx.save_for_backward(query, key, value, *state, *own)
        ctx.step, ctx.numbers = step, numbers
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple:
        if grad_output is None:
            return (None,) * 7
        saved = ctx.saved_tensors  # read once: a checkpoint gives them once
        saved, own, gradients = saved[:SAVED], OwnOptions(*saved[SAVED:]), None
        if not torch.is_grad_enabled() and is_eager((grad_output,)):
            gradients = ctx.step.backward(grad_output, *saved, own)
        if gradients is None:
            gradients = by_operator(grad_output, saved, own, ctx.numbers)
        return *gradients, None, None, None, None


def by_operator(
    grad_output: Tensor, saved: tuple[Tensor, ...], own: OwnOptions, numbers: OptionNumbers
) -> tuple[Tensor, ...]:
    """The gradients where nothing is prepared for them. A second derivative finds the operator, which refuses it."""
    compute = unrecorded(attention_backward, (grad_output, *saved, *own))
    return compute(grad_output, *saved, False, *NO_TENSORS._replace(**own._asdict()), *numbers)[:3]

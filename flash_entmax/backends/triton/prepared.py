"""What is prepared for calls like one before: the choice by their shape."""

from typing import NamedTuple

from torch import Tensor

from ...core.call import Problem
from ...core.tensors import ROW_ALIGNMENT
from . import launch
from .config import Outline, is_decoded
from .decoding import launches_of
from .plan import plan_of
from .prepared_backward import PreparedBackward
from .prepared_decode import PreparedDecode
from .prepared_forward import PreparedForward, PreparedOutput
from .tile import device_of, is_aligned, matrix


class PreparedStep(NamedTuple):
    """See backends.PreparedStep."""

    forward: PreparedForward
    backward: PreparedBackward


def prepare(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> PreparedDecode | PreparedOutput | None:
    """See backends.Backend."""
    if not can_be_prepared(problem, query, key, value):
        return None
    if not is_decoded(problem, False):
        plan = plan_of(Outline.of(problem, query.dtype, needs_backward=False))
        return PreparedOutput(plan, problem.score, query, value)
    with device_of(query):
        return PreparedDecode(launches_of(problem, query).plan, problem.score, query, value)


def prepare_step(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> PreparedStep | None:
    """See backends.Backend."""
    if not can_be_prepared(problem, query, key, value):
        return None
    plan = plan_of(Outline.of(problem, query.dtype))
    backward = PreparedBackward(plan, problem.score, problem.may_hide_all_keys)
    return PreparedStep(PreparedForward(plan, problem.score, query, value), backward)


def can_be_prepared(problem: Problem, *inputs: Tensor) -> bool:
    """Launches may be direct, and the kernels read and write the tensors themselves, no copies in aligned rows."""
    if not launch.CAN_BE_DIRECT or problem.is_empty or problem.value_size % ROW_ALIGNMENT:
        return False
    return all(is_aligned(matrix(tensor)) for tensor in inputs)

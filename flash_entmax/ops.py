"""Operator contracts: schemas, shapes for tracing, autograd, lazy dispatch to the implementations. Imports no Triton.

    flash_entmax::intervals           -> first key, one past the last, and position of each query
    flash_entmax::attention           -> output, value_mean, maximum, offset, live
    flash_entmax::attention_backward  -> grad_query, grad_key, grad_value, grad_parameters
    flash_entmax::attention_support   -> maximum in units of z, support size of each row, map of live tiles

`value_mean` is O1 = sum u v / sum u, so that the backward has delta = dO . O1 without another pass; `maximum` and
`offset` are the threshold (the kernels' maximum is that of query . key, which slope turns into z; the torch path's is
that of z); `live` is the packed map of the tiles that may hold support. `grad_parameters` is (3, batch, heads): of
alpha, scale and ALiBi slopes; without any element where no parameter needs a gradient.
"""

import torch
from torch import Tensor

from . import sight
from .problem import Modifiers, Problem, ceil_div, empty_stored_as, row_dtype
from .registration import as_given, below_autograd, differentiate, fake, operator, refuse_second_derivative
from .tiles import TILE

_INPUTS = "Tensor query, Tensor key, Tensor value"
_MODIFIERS = ", ".join(f"Tensor? {name}s" for name in ("alpha", "scale", "slope", "interval", "kind", "bit"))
_SCALARS = "float alpha, float scale, float softcap, bool is_causal, SymInt reach, str impl"
_STATE = "Tensor maximum, Tensor offset, Tensor live"
MODIFIERS, SCALARS = len(Modifiers._fields), _SCALARS.count(",") + 1


def _posed(query, key, value, arguments) -> tuple[Problem, Modifiers, str]:
    """What the arguments after the value pose: modifiers, then scalars."""
    alpha, scale, softcap, is_causal, reach, impl = arguments[MODIFIERS:]
    problem = Problem.of(query, key, value, alpha, is_causal, scale, softcap, reach)
    return problem, Modifiers(*arguments[:MODIFIERS]), impl


@operator(
    "Tensor query, Tensor? query_positions, Tensor? key_lengths, Tensor? cu_seq_q, Tensor? cu_seq_k, "
    "SymInt key_length, SymInt first_position, SymInt left, SymInt right",
    results=1,
)
def intervals(
    query, query_positions, key_lengths, cu_seq_q, cu_seq_k, key_length, first_position, left, right
):  # fmt: skip
    extents = query.shape[0], query.shape[2], key_length
    limits = query_positions, key_lengths, cu_seq_q, cu_seq_k
    return sight.intervals(*limits, extents, first_position, (left, right), query.device)


@fake("intervals")
def _(query, *_):
    return query.new_empty(query.shape[0], 3, query.shape[2], dtype=torch.int32)


@operator(f"{_INPUTS}, {_MODIFIERS}, {_SCALARS}", results=5)
def attention(query, key, value, *arguments):
    problem, modifiers, impl = _posed(query, key, value, arguments)
    with as_given(query):
        return stages(impl).attention(problem, modifiers, query, key, value)


@fake("attention")
def _(query, key, value, *arguments):
    problem, _, impl = _posed(query, key, value, arguments)
    output = empty_stored_as(query, problem.value_size)
    row = query.new_empty(problem.batch, problem.heads, problem.query_length, dtype=row_dtype(query))
    live = query.new_empty(problem.live_shape(tile(impl, query)), dtype=torch.int32)
    return output, torch.empty_like(output), row, torch.empty_like(row), live


@operator(
    f"Tensor grad_output, {_INPUTS}, Tensor value_mean, {_STATE}, bool parameters, {_MODIFIERS}, {_SCALARS}", results=4
)
def attention_backward(
    grad_output, query, key, value, value_mean, maximum, offset, live, parameters, *arguments
):  # fmt: skip
    problem, modifiers, impl = _posed(query, key, value, arguments)
    tensors = grad_output, query, key, value, value_mean, maximum, offset, live
    with as_given(query):
        return stages(impl).attention_backward(problem, modifiers, *tensors, parameters)


@fake("attention_backward")
def _(grad_output, query, key, value, value_mean, maximum, offset, live, parameters, *arguments):
    of_parameters = maximum.new_empty(3 if parameters else 0, *maximum.shape[:2])
    return *(empty_stored_as(tensor, tensor.shape[-1]) for tensor in (query, key, value)), of_parameters


@operator(f"{_INPUTS}, {_MODIFIERS}, {_STATE}, {_SCALARS}", results=3)
def attention_support(query, key, value, *arguments):
    maximum, offset, live = arguments[MODIFIERS : MODIFIERS + 3]
    problem, modifiers, impl = _posed(query, key, value, arguments[:MODIFIERS] + arguments[MODIFIERS + 3 :])
    with as_given(query):
        return stages(impl).support(problem, modifiers, query, key, maximum, offset, live)


@fake("attention_support")
def _(query, key, value, *arguments):
    maximum, _, live = arguments[MODIFIERS : MODIFIERS + 3]
    key_tiles = ceil_div(key.shape[2], tile(arguments[-1], query))
    size = torch.empty_like(maximum, dtype=torch.int32)
    return torch.empty_like(maximum), size, live.new_empty(*live.shape[:3], key_tiles, dtype=torch.bool)


def stages(impl: str):
    """The module that computes the stages; Triton is imported by the first call that needs it."""
    if impl == "triton":
        from .kernels import attention as module
    else:
        from . import tiled as module
    return module


def tile(impl: str, query: Tensor) -> int:
    """Queries and keys of one tile of the live map."""
    if impl == "triton":
        from .kernels.schedule import tile_size

        return tile_size(query.dtype)
    return TILE


class Attention(torch.autograd.Function):
    """The gradient of flash_entmax::attention through its output, by query, key, value, alpha, scale and slopes."""

    @staticmethod
    def forward(ctx, query, key, value, *arguments):
        with below_autograd():
            results = attention(query, key, value, *arguments)
        ctx.modifiers, ctx.scalars = (
            tuple(tensor is not None for tensor in arguments[:MODIFIERS]),
            arguments[MODIFIERS:],
        )
        given = (tensor for tensor in arguments[:MODIFIERS] if tensor is not None)
        ctx.save_for_backward(query, key, value, *results[1:], *given)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, grad_output, *_):
        absent = (None,) * (MODIFIERS + SCALARS)
        if grad_output is None:
            return None, None, None, *absent
        saved = ctx.saved_tensors  # read once: a checkpoint gives them once
        saved, given = saved[:7], iter(saved[7:])
        modifiers = tuple(next(given) if is_given else None for is_given in ctx.modifiers)
        needed = ctx.needs_input_grad[3:6]
        *gradients, of_parameters = attention_backward(grad_output, *saved, any(needed), *modifiers, *ctx.scalars)
        if not any(needed):
            return *gradients, *absent
        of_alpha, of_scale, of_slopes = of_parameters
        of_parameters = of_alpha.sum(0), of_scale.sum(0), of_slopes
        kept = (gradient if is_needed else None for gradient, is_needed in zip(of_parameters, needed, strict=True))
        return *gradients, *kept, *absent[3:]


differentiate(attention, Attention)
refuse_second_derivative(attention_backward)

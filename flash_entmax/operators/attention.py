"""Operator contracts: schemas, shapes for tracing, autograd, torch.vmap, lazy dispatch to the implementations.

    flash_entmax::intervals           -> first key, one past the last, and position of each query
    flash_entmax::key_filter          -> kinds, bits: a key mask as a filter by tiles
    flash_entmax::attention           -> output, value_mean, maximum, offset, live
    flash_entmax::attention_backward  -> grad_query, grad_key, grad_value, grad_parameters
    flash_entmax::attention_tangent   -> the output's derivative along tangents of the inputs
    flash_entmax::attention_support   -> maximum in units of z, support size of each row, map of live tiles

`value_mean` is O1 = sum u v / sum u, so that the backward has delta = dO . O1 without another pass; `maximum` and
`offset` are the threshold (the kernels' maximum is that of query . key, which slope turns into z; the torch path's is
that of z); `live` is the packed map of the tiles that may hold support. `grad_parameters` is (3, batch, heads): of
alpha, scale and ALiBi slopes; without any element where no parameter needs a gradient. Imports no Triton.
"""

import torch
from torch import Tensor

from ..backends.torch.tiles import TILE
from ..core import visibility as sight
from ..core.call import WORD_BITS, Modifiers, Problem, Tangents, ceil_div, empty_stored_as, row_dtype
from ..core.checks import check_packing
from ..core.modes import as_given
from .registration import (
    batch_into,
    below_autograd,
    call_one_by_one,
    differentiate,
    fake,
    operator,
    refuse_second_derivative,
)

_INPUTS = "Tensor query, Tensor key, Tensor value"
_MODIFIERS = ", ".join(f"Tensor? {name}s" for name in ("alpha", "scale", "slope", "interval", "kind", "bit"))
_SCALARS = "float alpha, float scale, float softcap, bool is_causal, SymInt reach, str impl"
_STATE = "Tensor maximum, Tensor offset, Tensor live"
_TANGENTS = ", ".join(f"Tensor? {name}_tangent" for name in ("query", "key", "value", "alphas", "scales", "slopes"))
MODIFIERS, TANGENTS, SCALARS = len(Modifiers._fields), len(Tangents._fields), _SCALARS.count(",") + 1

# The dimension of the batch, for torch.vmap, in the arguments and results above.
_OF_INPUTS, _OF_STATE = (0, 0, 0), (0, 0, 0)
_OF_MODIFIERS = Modifiers(alpha=None, scale=None, slopes=0, intervals=0, kinds=0, bits=None)
_OF_TANGENTS = Tangents(query=0, key=0, value=0, alpha=None, scale=None, slopes=0)


def _posed(query, key, value, arguments) -> tuple[Problem, Modifiers, str]:
    """What the arguments after the value pose: modifiers, then scalars."""
    alpha, scale, softcap, is_causal, reach, impl = arguments[MODIFIERS:]
    problem = Problem.of(query, key, value, alpha, is_causal, scale, softcap, reach)
    return problem, Modifiers(*arguments[:MODIFIERS]), impl


@operator(
    "Tensor query, Tensor? query_positions, Tensor? key_lengths, Tensor? cu_seq_q, Tensor? cu_seq_k, "
    "SymInt key_length, SymInt first_position, SymInt left, SymInt right, SymInt max_q, SymInt max_k",
    results=1,
)
def intervals(
    query, query_positions, key_lengths, cu_seq_q, cu_seq_k, key_length, first_position, left, right, max_q, max_k
):  # fmt: skip
    extents = query.shape[0], query.shape[2], key_length
    if cu_seq_q is not None:
        check_packing(cu_seq_q, cu_seq_k, *extents[1:], max_q, max_k)
    limits = query_positions, key_lengths, cu_seq_q, cu_seq_k
    return sight.intervals(*limits, extents, first_position, (left, right), query.device)


@fake("intervals")
def _(query, *_):
    return query.new_empty(query.shape[0], 3, query.shape[2], dtype=torch.int32)


@operator("Tensor key_mask, int tile", results=2)
def key_filter(key_mask, tile):
    return tuple(sight.filter_of_keys(key_mask, tile))


@fake("key_filter")
def _(key_mask, tile):
    batch, tiles = key_mask.shape[0], ceil_div(key_mask.shape[1], tile) + 1
    shapes = (batch, 1, 1, tiles), (batch * tiles, 1, ceil_div(tile, WORD_BITS))
    return tuple(key_mask.new_empty(shape, dtype=torch.int32) for shape in shapes)


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
    live = query.new_empty(problem.live_shape(tile(impl, query, value)), dtype=torch.int32)
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


@operator(f"{_INPUTS}, Tensor value_mean, {_STATE}, {_TANGENTS}, {_MODIFIERS}, {_SCALARS}", results=1)
def attention_tangent(query, key, value, value_mean, maximum, offset, live, *arguments):
    tangents, arguments = Tangents(*arguments[:TANGENTS]), arguments[TANGENTS:]
    problem, modifiers, impl = _posed(query, key, value, arguments)
    with as_given(query):
        return stages(impl).attention_tangent(
            problem, modifiers, query, key, value, value_mean, maximum, offset, live, tangents
        )


@fake("attention_tangent")
def _(query, key, value, value_mean, *_):
    return torch.empty_like(value_mean)


@operator(f"{_INPUTS}, {_MODIFIERS}, {_STATE}, {_SCALARS}", results=3)
def attention_support(query, key, value, *arguments):
    maximum, offset, live = arguments[MODIFIERS : MODIFIERS + 3]
    problem, modifiers, impl = _posed(query, key, value, arguments[:MODIFIERS] + arguments[MODIFIERS + 3 :])
    with as_given(query):
        return stages(impl).support(problem, modifiers, query, key, maximum, offset, live)


@fake("attention_support")
def _(query, key, value, *arguments):
    maximum = arguments[MODIFIERS]
    extent = tile(arguments[-1], query, value)
    query_tiles, key_tiles = (ceil_div(tensor.shape[2], extent) for tensor in (query, key))
    size = torch.empty_like(maximum, dtype=torch.int32)
    return torch.empty_like(maximum), size, query.new_empty(*query.shape[:2], query_tiles, key_tiles, dtype=torch.bool)


def stages(impl: str):
    """The module that computes the stages; Triton is imported by the first call that needs it."""
    if impl == "triton":
        from ..backends.triton import attention as module
    else:
        from ..backends.torch import attention as module
    return module


def tile(impl: str, query: Tensor, value: Tensor) -> int:
    """Queries and keys of one tile of the live map."""
    if impl == "triton":
        from ..backends.triton.schedule import tile_size

        return tile_size(query.dtype, max(query.shape[-1], value.shape[-1]))
    return TILE


class Attention(torch.autograd.Function):
    """The derivatives of flash_entmax::attention's output by query, key, value, alpha, scale and slopes."""

    @staticmethod
    def forward(ctx, query, key, value, *arguments):
        with below_autograd():
            results = attention(query, key, value, *arguments)
        ctx.scalars = arguments[MODIFIERS:]
        ctx.save_for_backward(query, key, value, *results[1:], *arguments[:MODIFIERS])
        ctx.save_for_forward(query, key, value, *results[1:], *arguments[:MODIFIERS])
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, grad_output, *_):
        absent = (None,) * (MODIFIERS + SCALARS)
        if grad_output is None:
            return None, None, None, *absent
        saved = ctx.saved_tensors  # read once: a checkpoint gives them once
        needed = ctx.needs_input_grad[3:6]
        *gradients, of_parameters = attention_backward(grad_output, *saved[:7], any(needed), *saved[7:], *ctx.scalars)
        if not any(needed):
            return *gradients, *absent
        of_alpha, of_scale, of_slopes = of_parameters
        of_parameters = of_alpha.sum(0), of_scale.sum(0), of_slopes
        kept = (gradient if is_needed else None for gradient, is_needed in zip(of_parameters, needed, strict=True))
        return *gradients, *kept, *absent[3:]

    @staticmethod
    def jvp(ctx, *tangents):
        saved = ctx.saved_tensors
        for tensor, own in zip(saved[:3], tangents[:3], strict=True):
            if own is not None and own.dtype != tensor.dtype:
                raise TypeError(f"tangents must have the dtype of their tensors, {tensor.dtype}, got {own.dtype}")
        tangent = attention_tangent(*saved[:7], *tangents[:TANGENTS], *saved[7:], *ctx.scalars)
        return tangent, None, None, None, None


differentiate(attention, Attention)
refuse_second_derivative(attention_backward)
refuse_second_derivative(attention_tangent)

batch_into(intervals, (0, None, 0), (0,))
call_one_by_one(key_filter)
batch_into(attention, (*_OF_INPUTS, *_OF_MODIFIERS), (0,) * 5)
batch_into(attention_backward, (0, *_OF_INPUTS, 0, *_OF_STATE, None, *_OF_MODIFIERS), (0, 0, 0, 1))
batch_into(attention_tangent, (*_OF_INPUTS, 0, *_OF_STATE, *_OF_TANGENTS, *_OF_MODIFIERS), (0,))
batch_into(attention_support, (*_OF_INPUTS, *_OF_MODIFIERS, *_OF_STATE), (0, 0, 0))

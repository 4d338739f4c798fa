"""Operator contracts: schemas, shapes for tracing, autograd, lazy dispatch to the implementations. Imports no Triton.

    flash_entmax::attention           -> output, value_mean, maximum, offset, live
    flash_entmax::attention_backward  -> grad_query, grad_key, grad_value
    flash_entmax::attention_support   -> maximum in units of z, support size of each row, map of live tiles

`value_mean` is O1 = sum u v / sum u, so that the backward has delta = dO . O1 without another pass; `maximum` and
`offset` are the threshold (the kernels' maximum is that of query . key, which slope turns into z; the torch path's is
that of z); `live` is the packed map of the tiles that may hold support.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from .problem import Problem, ceil_div
from .tiled import TILE

# The decorator custom_op takes fewer lines, and 0.3 ms more of a step's Python: see docs/design.md.
_library = torch.library.Library("flash_entmax", "DEF")
_SCALARS = "float alpha, bool is_causal, float scale, str impl"
_INPUTS = "Tensor query, Tensor key, Tensor value"
_STATE = "Tensor maximum, Tensor offset, Tensor live"


def _operator(arguments: str, results: int):
    """Define an operator of the decorated function's name, computed by it on any device."""

    def define(function):
        schema = f"{function.__name__}({arguments}, {_SCALARS}) -> ({', '.join(['Tensor'] * results)})"
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(function.__name__, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.flash_entmax, function.__name__).default

    return define


@_operator(_INPUTS, results=5)
def attention(query, key, value, alpha, is_causal, scale, impl):
    problem = Problem.of(query, key, value, alpha, is_causal, scale)
    with as_given(query):
        return stages(impl).attention(problem, query, key, value)


@torch.library.register_fake("flash_entmax::attention", lib=_library)
def _(query, key, value, alpha, is_causal, scale, impl):
    problem = Problem.of(query, key, value, alpha, is_causal, scale)
    output = query.new_empty(problem.batch, problem.heads, problem.query_length, problem.value_size)
    row_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    row = query.new_empty(problem.batch, problem.heads, problem.query_length, dtype=row_dtype)
    live = query.new_empty(problem.live_shape(tile(impl, query)), dtype=torch.int32)
    return output, torch.empty_like(output), row, torch.empty_like(row), live


@_operator(f"Tensor grad_output, {_INPUTS}, Tensor value_mean, {_STATE}", results=3)
def attention_backward(
    grad_output, query, key, value, value_mean, maximum, offset, live, alpha, is_causal, scale, impl
):  # fmt: skip
    problem = Problem.of(query, key, value, alpha, is_causal, scale)
    tensors = grad_output, query, key, value, value_mean, maximum, offset, live
    with as_given(query):
        return stages(impl).attention_backward(problem, *tensors)


@torch.library.register_fake("flash_entmax::attention_backward", lib=_library)
def _(grad_output, query, key, value, value_mean, maximum, offset, live, alpha, is_causal, scale, impl):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


@_operator(f"{_INPUTS}, {_STATE}", results=3)
def attention_support(query, key, value, maximum, offset, live, alpha, is_causal, scale, impl):
    problem = Problem.of(query, key, value, alpha, is_causal, scale)
    with as_given(query):
        return stages(impl).support(problem, query, key, maximum, offset, live)


@torch.library.register_fake("flash_entmax::attention_support", lib=_library)
def _(query, key, value, maximum, offset, live, alpha, is_causal, scale, impl):
    key_tiles = ceil_div(key.shape[2], tile(impl, query))
    size = torch.empty_like(maximum, dtype=torch.int32)
    return torch.empty_like(maximum), size, live.new_empty(*live.shape[:3], key_tiles, dtype=torch.bool)


def as_given(tensor: Tensor):
    """Autocast must not cast inside an operator."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


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


def _differentiate(operator, function) -> None:
    """Let autograd take `function` for the operator, where it records anything."""

    def call(*arguments):
        if torch.is_grad_enabled():
            return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    _library.impl(operator.name().partition("::")[2], call, "Autograd")


class Attention(torch.autograd.Function):
    """The gradient of flash_entmax::attention, by its query, key and value, through its output alone."""

    @staticmethod
    def forward(ctx, query, key, value, *scalars):
        with torch._C._AutoDispatchBelowAutograd():
            results = attention(query, key, value, *scalars)
        ctx.scalars = scalars
        ctx.save_for_backward(query, key, value, *results[1:])
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 7
        return *attention_backward(grad_output, *ctx.saved_tensors, *ctx.scalars), None, None, None, None


class AttentionBackward(torch.autograd.Function):
    """The gradient has none of its own: a second derivative is refused, not left out."""

    @staticmethod
    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return attention_backward(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("flash_entmax::attention has no second derivative")


_differentiate(attention, Attention)
_differentiate(attention_backward, AttentionBackward)

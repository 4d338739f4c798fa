"""Operator contracts: schemas, shapes for tracing, autograd, lazy dispatch to the implementations. Imports no Triton.

    flash_entmax::attention           -> output, value_mean, maximum, offset, live
    flash_entmax::attention_backward  -> grad_query, grad_key, grad_value
    flash_entmax::attention_support   -> maximum in units of z, support size of each row, map of live tiles

`value_mean` is O1 = sum u v / sum u, so that the backward has delta = dO . O1 without another pass; `maximum` and
`offset` are the threshold (the kernels' maximum is that of query . key, which slope turns into z; the torch path's is
that of z); `live` is the packed map of the tiles that may hold support.
"""

import torch
from torch import Tensor

from .problem import Problem, ceil_div
from .tiled import TILE


@torch.library.custom_op("flash_entmax::attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, alpha: float, is_causal: bool, scale: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = Problem.of(query, key, value, alpha, is_causal, scale)
    return tuple(stages(impl).attention(problem, query, key, value))


@attention.register_fake
def _(query, key, value, alpha, is_causal, scale, impl):
    problem = Problem.of(query, key, value, alpha, is_causal, scale)
    output = query.new_empty(problem.batch, problem.heads, problem.query_length, problem.value_size)
    row_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    row = query.new_empty(problem.batch, problem.heads, problem.query_length, dtype=row_dtype)
    live = query.new_empty(problem.live_shape(tile(impl, query)), dtype=torch.int32)
    return output, torch.empty_like(output), row, torch.empty_like(row), live


@torch.library.custom_op("flash_entmax::attention_backward", mutates_args=())
def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    value_mean: Tensor,
    maximum: Tensor,
    offset: Tensor,
    live: Tensor,
    alpha: float,
    is_causal: bool,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem.of(query, key, value, alpha, is_causal, scale)
    return tuple(
        stages(impl).attention_backward(problem, grad_output, query, key, value, value_mean, maximum, offset, live)
    )


@attention_backward.register_fake
def _(grad_output, query, key, value, value_mean, maximum, offset, live, alpha, is_causal, scale, impl):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


@torch.library.custom_op("flash_entmax::attention_support", mutates_args=())
def attention_support(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    maximum: Tensor,
    offset: Tensor,
    live: Tensor,
    alpha: float,
    is_causal: bool,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem.of(query, key, value, alpha, is_causal, scale)
    return stages(impl).support(problem, query, key, maximum, offset, live)


@attention_support.register_fake
def _(query, key, value, maximum, offset, live, alpha, is_causal, scale, impl):
    key_tiles = ceil_div(key.shape[2], tile(impl, query))
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


def _save(ctx, inputs, output) -> None:
    query, key, value, ctx.alpha, ctx.is_causal, ctx.scale, ctx.impl = inputs
    _, value_mean, maximum, offset, live = output
    ctx.save_for_backward(query, key, value, value_mean, maximum, offset, live)
    ctx.mark_non_differentiable(value_mean, maximum, offset, live)


def _differentiate(ctx, grad_output, *_):
    gradients = attention_backward(grad_output, *ctx.saved_tensors, ctx.alpha, ctx.is_causal, ctx.scale, ctx.impl)
    return *gradients, None, None, None, None


attention.register_autograd(_differentiate, setup_context=_save)

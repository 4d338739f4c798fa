"""The calls of attention on a GPU: what each allocates, and the stages that it launches."""

from functools import cache

import torch
from torch import Tensor

from ...core.call import KeySummary, Problem, ScoreOptions, Tangents, VisibilityArgs
from ...core.pages import Pages, attend_gathered
from ...core.tensors import aligned_size, ceil_div, empty_stored_as
from . import schedule
from .bound import KernelKeySummary, summary_kernel
from .call_launches import CallLaunches
from .config import is_decoded, tile_size
from .decoding import decoded, decoded_in_pages
from .output import support_kernel
from .reach import reach_shapes
from .stages import backward_stages, forward_stages
from .tangent import Directions, tangent_kernel
from .tile import aligned, device_of, is_aligned, matrix, trimmed

STATE_DTYPES = torch.float32, torch.int32


def summarise(key: Tensor, value_size: int) -> KeySummary:
    """The summary of blocks of keys; see backends.Backend."""
    batch, key_heads, length, size = key.shape
    blocks = ceil_div(length, tile_size(key.dtype, max(size, value_size)))
    centre = key.new_empty(batch, key_heads, blocks, aligned_size(size))
    numbers = [key.new_empty(batch, key_heads, blocks, dtype=torch.float32) for _ in range(3)]
    if centre.numel():
        unmasked = VisibilityArgs(None, None, None, False, length)
        value = torch.Size((batch, key_heads, length, value_size))
        problem = Problem.of(key.shape, value, ScoreOptions(1.5, 1.0), unmasked)
        with device_of(key):
            launches = CallLaunches.of(problem, key.dtype)
            arguments = aligned(key), KernelKeySummary(matrix(centre), *numbers)
            opened, arguments, _ = launches.open((summary_kernel,), arguments, None, key.device)
            opened.launch(
                summary_kernel, launches.plan.blocks, schedule.summary_settings, *arguments, *launches.plan.sizes
            )  # fmt: skip
    return KeySummary(trimmed(centre, size), *numbers)


def attention_forward(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, needs_backward: bool
) -> tuple[Tensor, ...]:
    """(output, value_mean, maximum, offset, reached_keys, reaching_queries); see backends.Backend."""
    with device_of(query):
        if is_decoded(problem, needs_backward):
            return decoded(problem, query, key, value), query.new_empty(0), *no_state(query.device)
        launches = None if problem.is_empty else CallLaunches.of(problem, query.dtype, needs_backward)
        shapes = ((0,), (0,)) if launches is None else launches.plan.reach_shapes
        if launches is None and needs_backward:
            shapes = reach_shapes(problem, query.dtype)
        output = empty_stored_as(query, aligned_size(problem.value_size))
        value_mean = torch.empty_like(output) if needs_backward else output.new_empty(0)
        rows = output.shape[:3] if needs_backward else (0,)
        maximum, offset = (query.new_empty(rows, dtype=torch.float32) for _ in range(2))
        reached_keys, words = (query.new_zeros(shape, dtype=torch.int32) for shape in shapes)
        results = output, value_mean, maximum, offset, reached_keys, words
        if launches is None:
            for tensor, number in zip(results, (0, 0, torch.inf, 1), strict=False):
                tensor.fill_(number)
        else:
            forward_stages(launches, problem.summary, (query, key, value), results)
    output = trimmed(output, problem.value_size)
    if needs_backward:
        value_mean = trimmed(value_mean, problem.value_size)
    return output, value_mean, *results[2:]


def attention_paged(problem: Problem, pages: Pages, query: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
    """The output; see backends.Backend. Few queries read aligned pages in place."""
    caches = [cache.transpose(1, 2) for cache in (key_cache, value_cache)]
    if not (is_decoded(problem, False) and all(is_aligned(matrix(cache)) for cache in caches)):
        return attend_gathered(attention_forward, problem, pages, query, key_cache, value_cache)
    with device_of(query):
        return decoded_in_pages(problem, pages, query, *caches)


@cache
def no_state(device: torch.device) -> tuple[Tensor, ...]:
    """Maximum, offset, reached keys and reaching queries of a call that keeps none of them."""
    with torch.inference_mode(False):
        rows, words = ([torch.empty(0, dtype=dtype, device=device) for _ in range(2)] for dtype in STATE_DTYPES)
    return *rows, *words


def attention_backward(
    problem: Problem, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, value_mean: Tensor,
    maximum: Tensor, offset: Tensor, reached_keys: Tensor, reaching_queries: Tensor, needs_parameters: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(grad_query, grad_key, grad_value, grad_parameters); see backends.Backend."""
    if problem.is_empty:
        nothing = maximum.new_zeros(3 if needs_parameters else 0, problem.batch, problem.heads)
        return *(empty_stored_as(tensor, tensor.shape[-1]).zero_() for tensor in (query, key, value)), nothing
    sizes = query.shape[-1], key.shape[-1], value.shape[-1]
    with device_of(query):
        launches = CallLaunches.of(problem, query.dtype, needs_parameters=needs_parameters)
        gradients = [matrix(empty_stored_as(tensor, aligned_size(tensor.shape[-1]))) for tensor in (query, key, value)]
        inputs = aligned(query), aligned(key), aligned(value), aligned(value_mean), aligned(grad_output)
        selected = matrix(torch.empty_like(inputs[-1].data)) if problem.may_hide_all_keys else None
        parameter_parts = None
        if needs_parameters:
            parameter_parts = maximum.new_empty(problem.batch, problem.heads, launches.plan.query_tiles, 3)
        state = maximum, offset, reached_keys, reaching_queries
        backward_stages(launches, (*inputs, selected, *gradients, *state, parameter_parts), query.device)
    gradients = (trimmed(gradient.data, size) for gradient, size in zip(gradients, sizes, strict=True))
    if not needs_parameters:
        return *gradients, maximum.new_empty(0, problem.batch, problem.heads)
    return *gradients, parameter_parts.sum(2).permute(2, 0, 1).contiguous()


def attention_tangent(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, value_mean: Tensor, maximum: Tensor, offset: Tensor,
    reached_keys: Tensor, reaching_queries: Tensor, tangents: Tangents,
) -> Tensor:  # fmt: skip
    """The output's derivative along the tangents."""
    result = empty_stored_as(query, aligned_size(problem.value_size))
    if problem.is_empty:
        return trimmed(result.zero_(), problem.value_size)
    with device_of(query):
        directions = directions_of(tangents, (query, key, value), maximum)
        launches = CallLaunches.of(problem, query.dtype, needs_parameters=directions.alpha is not None)
        inputs = aligned(query), aligned(key), aligned(value), directions, maximum, offset, reached_keys
        launches.over_tiles_of_queries(
            tangent_kernel, schedule.tangent_settings, inputs, (matrix(result),), query.device
        )
    return trimmed(result, problem.value_size)


def directions_of(tangents: Tangents, tensors: tuple[Tensor, ...], maximum: Tensor) -> Directions:
    """Zeros where a tensor has no tangent; no parameters where none of them has one."""
    batch, heads, _ = maximum.shape
    like = *tensors, *(maximum.new_empty(shape) for shape in ((heads,), (heads,), (batch, heads)))
    given = [torch.zeros_like(other) if own is None else own for own, other in zip(tangents, like, strict=True)]
    parameters = tuple(tensor.to(maximum.dtype).contiguous() for tensor in given[3:])
    has_parameters = any(tangent is not None for tangent in tangents[3:])
    return Directions(*map(aligned, given[:3]), *(parameters if has_parameters else (None, None, None)))


def attention_support(
    problem: Problem, query: Tensor, key: Tensor, maximum: Tensor, offset: Tensor, reached_keys: Tensor,
    reaching_queries: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(maximum in units of z, support size, exact map of live tiles, keys of each tile of queries)."""
    size = torch.zeros(maximum.shape, dtype=torch.int32, device=query.device)
    tile = tile_size(query.dtype, problem.widest)
    grid = (ceil_div(length, tile) for length in (problem.query_length, problem.key_length))
    marks = torch.zeros(problem.batch, problem.heads, *grid, dtype=torch.bool, device=query.device)
    keys = torch.zeros(marks.shape[:3], dtype=torch.int32, device=query.device)
    if problem.is_empty:
        return maximum.clone(), size, marks, keys
    with device_of(query):
        launches = CallLaunches.of(problem, query.dtype)
        inputs = aligned(query), aligned(key), maximum, offset, reached_keys
        results = size, marks, keys
        launches.over_tiles_of_queries(support_kernel, schedule.solve_settings, inputs, results, query.device)
    z_scale = problem.z_scale
    return maximum * (z_scale.view(-1, 1) if isinstance(z_scale, Tensor) else z_scale), size, marks, keys

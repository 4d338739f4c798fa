"""Stages over a part of the keys, each by itself: row maxima, F and sum u at an offset, the output at an offset.

Maxima of several parts combine by max, over the parts in which a row sees a key. Everything else combines by addition:
see docs/math.md. The keys of a part stand at positions of their own: the intervals of the problem count from its first
key.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.call import Problem
from ...core.tensors import aligned_size
from . import schedule
from .alpha import probability
from .call_launches import CallLaunches
from .output import output_at as output_of_blocks
from .program import ChunkSizes, open_program
from .queries import open_threshold
from .scan import maxima_of_blocks
from .sums import sums_at as sums_of_blocks
from .tile import (
    UNSPECIALIZED,
    Sizes,
    aligned,
    device_of,
    key_head,
    matrix,
    query_head,
    store_row,
    store_tile,
    trimmed,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def row_maxima_kernel(
    query, key, lists, maximum, score_options, visibility, heads, group, query_length, key_length, first_unit, units,
    first_tile, capacity, C: tl.constexpr,
):  # fmt: skip
    """Each row's maximum of the scores over the keys that it sees; +inf where it sees none."""
    sizes = Sizes(heads, group, query_length, key_length)
    chunk = ChunkSizes(first_unit, units, first_tile, capacity)
    queries, blocks = open_program(query, None, lists, score_options, visibility, sizes, chunk, C)
    row_maximum = maxima_of_blocks(queries, key_head(key, queries.unit, sizes), blocks, C)
    store_row(maximum, queries.unit, queries.row, sizes, row_maximum)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sums_kernel(
    query, key, maximum, offset, lists, total, weight, score_options, visibility, heads, group, query_length,
    key_length, first_unit, units, first_tile, capacity, C: tl.constexpr,
):  # fmt: skip
    """F and sum u of each row over the keys that it sees."""
    sizes = Sizes(heads, group, query_length, key_length)
    chunk = ChunkSizes(first_unit, units, first_tile, capacity)
    queries, blocks = open_program(query, None, lists, score_options, visibility, sizes, chunk, C)
    threshold = open_threshold(maximum, offset, queries)
    row_total, row_weight = sums_of_blocks(queries, threshold, blocks, key_head(key, queries.unit, sizes), C)
    store_row(total, queries.unit, queries.row, sizes, row_total)
    store_row(weight, queries.unit, queries.row, sizes, row_weight)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def output_at_kernel(
    query, key, value, maximum, offset, lists, output, score_options, visibility, heads, group, query_length,
    key_length, first_unit, units, first_tile, capacity, C: tl.constexpr,
):  # fmt: skip
    """sum p v of each row over the keys that it sees."""
    sizes = Sizes(heads, group, query_length, key_length)
    chunk = ChunkSizes(first_unit, units, first_tile, capacity)
    queries, blocks = open_program(query, None, lists, score_options, visibility, sizes, chunk, C)
    threshold = open_threshold(maximum, offset, queries)
    key, value = key_head(key, queries.unit, sizes), key_head(value, queries.unit, sizes)
    sums = output_of_blocks(queries, threshold, blocks, key, value, C)
    total = sums.weighted * probability(threshold.offset, queries.options.exponent, C.POWER)[:, None]
    head = query_head(output, queries.unit, sizes)
    store_tile(head, queries.tile * C.TILE, query_length, total, C.TILE, C.VALUE, C.VALUE_PADDED)


def row_maxima(problem: Problem, query: Tensor, key: Tensor) -> Tensor:
    """Each row's maximum of the scores; see backends.Backend."""
    maximum = query.new_full(query.shape[:3], torch.inf, dtype=torch.float32)
    if not problem.is_empty:
        run_over_keys(row_maxima_kernel, problem, query, (aligned(query), aligned(key)), (maximum,))
    return maximum


def sums_at(problem: Problem, query: Tensor, key: Tensor, maximum: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """(F, sum u) of each row; see backends.Backend."""
    maximum, offset = maximum.contiguous(), offset.contiguous()
    total, weight = (maximum.new_zeros(maximum.shape) for _ in range(2))
    if not problem.is_empty:
        inputs = aligned(query), aligned(key), maximum, offset
        run_over_keys(sums_kernel, problem, query, inputs, (total, weight))
    return total, weight


def output_at(problem: Problem, query: Tensor, key: Tensor, value: Tensor, maximum: Tensor, offset: Tensor) -> Tensor:
    """sum p v; see backends.Backend."""
    shape = *query.shape[:3], aligned_size(problem.value_size)
    maximum, offset = maximum.contiguous(), offset.contiguous()
    output = maximum.new_zeros(shape)
    if not problem.is_empty:
        inputs = aligned(query), aligned(key), aligned(value), maximum, offset
        run_over_keys(output_at_kernel, problem, query, inputs, (matrix(output),))
    return trimmed(output, problem.value_size)


def run_over_keys(kernel, problem: Problem, query: Tensor, inputs: tuple, results: tuple) -> None:
    with device_of(query):
        launches = CallLaunches.of(problem, query.dtype, needs_backward=False)
        launches.over_tiles_of_queries(kernel, schedule.output_settings, inputs, results, query.device)

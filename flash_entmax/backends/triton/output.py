"""The output over the listed keys: O = sum p v, and for the backward O1 = sum u v / sum u; the support on request."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .alpha import mass_tolerance, newton_step, probability, probability_and_weight, support_weight
from .keys import open_keys
from .lists import BlockList, list_place, load_tile_list, row_block_count, walk
from .program import ChunkSizes, open_program
from .queries import Queries, Threshold, open_options, open_queries, open_threshold
from .reach import open_record, record_index
from .score import relative_distance
from .tile import (
    UNSPECIALIZED,
    Matrix,
    Sizes,
    add_compensated,
    heaviest_first,
    key_head,
    load_block,
    no_sums,
    open_tile,
    query_head,
    store_row,
    store_tile,
    sum_keys,
)

MAX_PASSES = tl.constexpr(40)


class OutputContext(NamedTuple):
    """What each block of keys is added with."""

    queries: Queries
    threshold: Threshold
    key: Matrix
    value: Matrix


class OutputSums(NamedTuple):
    """Sums over keys, relative to the offset; what compensation holds back of the first; sums along rows in parts."""

    weighted: Tensor  # sum x^r v
    error: Tensor
    mean: Tensor  # sum x^(r - 1) v
    mass: Tensor  # sum x^r
    weight: Tensor  # sum x^(r - 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def output_kernel(
    query, key, value, maximum, offset, reached_keys, lists, counts, output, value_mean, score_options, visibility,
    heads, group, query_length, key_length, first_unit, units, first_tile, capacity, C: tl.constexpr,
):  # fmt: skip
    """O, and O1 where a backward may follow. In rare tiles a row's F is above the tolerance: these take a step and
    another pass."""
    TILE: tl.constexpr = C.TILE
    VALUE_PADDED: tl.constexpr = C.VALUE_PADDED
    sizes = Sizes(heads, group, query_length, key_length)
    unit, tile = heaviest_first(units, first_unit, first_tile)
    options = open_options(score_options, unit, sizes, C)
    exponent = options.exponent
    index, places = list_place(lists, unit, tile, units, first_unit, first_tile, capacity)
    whole = load_tile_list(places, counts, index)
    record = open_record(reached_keys, record_index(index, unit, tile, sizes, C), sizes, C)
    blocks = BlockList(whole, record.rows, tl.load(row_block_count(counts, index)))
    block = open_tile(tile, C)
    queries = open_queries(query_head(query, unit, sizes), unit, block, options, sizes, visibility, True, C)
    start = open_threshold(maximum, offset, queries)
    row_maximum, row_offset = start.maximum, start.offset

    key, value = key_head(key, unit, sizes), key_head(value, unit, sizes)
    # Triton tells by identity what a loop carries: none of these names may start as another's value.
    total = tl.zeros((TILE, VALUE_PADDED), tl.float32)
    mean = tl.zeros((TILE, VALUE_PADDED), tl.float32)
    mass = tl.zeros((TILE,), tl.float32)
    weight = tl.zeros((TILE,), tl.float32)
    largest_probability = tl.zeros((TILE,), tl.float32)
    accepted = mass_tolerance(exponent, C.MEAN)
    passes = 0
    unfinished = 1
    while (unfinished > 0) & (passes < MAX_PASSES):
        threshold = Threshold(row_maximum, row_offset, options.z_scale / row_offset)
        sums = output_at(queries, threshold, blocks, key, value, C)
        total, mean = sums.weighted, sums.mean
        largest_probability = probability(row_offset, exponent, C.POWER)
        mass = tl.sum(sums.mass[0], 1) * largest_probability
        weight = tl.sum(sums.weight[0], 1)
        stepped = newton_step(row_offset, mass, weight * support_weight(row_offset, exponent, C.POWER), exponent)
        falls = (mass > 1.0) & (stepped < row_offset)
        unfinished = tl.max(tl.where(falls & (mass > 1.0 + accepted), 1, 0), 0)
        row_offset = tl.where(falls, stepped, row_offset)
        passes += 1

    first = tile * TILE
    total *= largest_probability[:, None]  # p = offset^r x^r
    if C.MEAN:
        # The last step of tau, on the output itself: dO / d offset = r sum u v, so the step (1 - sum p) / (r sum u)
        # adds (1 - sum p) O1. Without it, long crowded rows feel the last bit of the offset.
        mean /= tl.where(weight == 0, 1.0, weight)[:, None]
        total += (1.0 - mass)[:, None] * mean
    else:
        total /= tl.where(mass == 0, 1.0, mass)[:, None]
    store_tile(query_head(output, unit, sizes), first, query_length, total, TILE, C.VALUE, VALUE_PADDED)
    if C.NEEDS_BACKWARD:
        store_row(offset, unit, queries.row, sizes, row_offset)
        store_tile(query_head(value_mean, unit, sizes), first, query_length, mean, TILE, C.VALUE, VALUE_PADDED)


@triton.jit
def output_at(queries, threshold, blocks, key, value, C: tl.constexpr):
    """OutputSums over the listed keys, at the threshold's maximum and offset.

    They are sums over keys: those of several parts add up to those of all keys.
    """
    TILE: tl.constexpr = C.TILE
    VALUE_PADDED: tl.constexpr = C.VALUE_PADDED
    context = OutputContext(queries, threshold, key, value)
    nothing = tl.zeros((TILE, VALUE_PADDED), tl.float32)
    return walk(add_output, OutputSums(nothing, nothing, nothing, no_sums(C), no_sums(C)), context, blocks, C)


@triton.jit
def add_output(sums, context, block, MASKED: tl.constexpr, C: tl.constexpr):
    queries = context.queries
    keys = open_keys(context.key, block, queries.sizes, MASKED, C)
    x, _ = relative_distance(queries, context.threshold, keys, MASKED, C)
    v = load_block(context.value, block, queries.sizes.key_length, MASKED, C.VALUE, C.VALUE_PADDED)
    p, u = probability_and_weight(x, queries.options.exponent, C.POWER, C.FAST_LOG2)
    weighted, error = sums.weighted, sums.error
    if C.COMPENSATED:
        weighted, error = add_compensated(weighted, error, tl.dot(p.to(v.dtype), v, input_precision=C.PRECISION))
    else:
        weighted = tl.dot(p.to(v.dtype), v, weighted, input_precision=C.PRECISION)
    mean = sums.mean
    if C.MEAN:
        mean = tl.dot(u.to(v.dtype), v, mean, input_precision=C.PRECISION)
    return OutputSums(weighted, error, mean, sum_keys(sums.mass, p, C), sum_keys(sums.weight, u, C))


class SupportContext(NamedTuple):
    """What each block of keys is counted with: marks of the row of tiles."""

    queries: Queries
    threshold: Threshold
    key: Matrix
    row_marks: Tensor


@triton.jit(do_not_specialize=UNSPECIALIZED)
def support_kernel(
    query, key, maximum, offset, reached_keys, lists, size, marks, reached, score_options, visibility, heads, group,
    query_length, key_length, first_unit, units, first_tile, capacity, C: tl.constexpr,
):  # fmt: skip
    """Support size of each row, a mark on each tile that holds a positive probability, and how many keys of each tile
    of queries do."""
    TILE: tl.constexpr = C.TILE
    sizes = Sizes(heads, group, query_length, key_length)
    chunk = ChunkSizes(first_unit, units, first_tile, capacity)
    queries, blocks = open_program(query, reached_keys, lists, score_options, visibility, sizes, chunk, C)
    threshold = open_threshold(maximum, offset, queries)

    query_tiles = (query_length + TILE - 1) // TILE
    index = tl.cast(queries.unit, tl.int64) * query_tiles + queries.tile
    row_marks = marks + index * tl.cdiv(key_length, TILE)
    context = SupportContext(queries, threshold, key_head(key, queries.unit, sizes), row_marks)
    count, keys = walk(count_block, (tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int32)), context, blocks, C)
    store_row(size, queries.unit, queries.row, sizes, count)
    tl.store(reached + index, tl.sum(keys, 0))


@triton.jit
def count_block(state, context, block, MASKED: tl.constexpr, C: tl.constexpr):
    """Of each query, how many keys it reaches; of each place in a block, how many keys were reached there."""
    count, reached = state
    keys = open_keys(context.key, block, context.queries.sizes, MASKED, C)
    x, _ = relative_distance(context.queries, context.threshold, keys, MASKED, C)
    positive = tl.where(x > 0, 1, 0)
    is_reached = tl.max(positive, 0)
    tl.store(context.row_marks + (block.first + block.column) // C.TILE, is_reached > 0, mask=is_reached > 0)
    return count + tl.sum(positive, 1), reached + is_reached

"""The gradient over the listed keys and queries: dS = u (dP - delta) with dP = dO V^T and delta = dO . O1.

dQ = scale dS K walks the keys of each tile of queries. dK = scale dS^T Q and dV = P^T dO walk the queries of each tile
of keys. There are no atomics: every number is added in one order, so that repeated runs agree bit for bit. The
gradients of alpha, scale and ALiBi slopes come with dQ where they are needed.

Between the two, what dK and dV need of each query is stored in pairs, (maximum, offset) and (-delta, -delta): every
thread that needs a part of a narrower load would repeat it.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .alpha import probability, probability_and_weight, share_logarithm, support_weight
from .keys import Keys, open_keys
from .lists import walk
from .program import ChunkSizes, open_program
from .queries import KernelScoreOptions, Queries, Threshold, open_options, open_queries, open_threshold
from .query_lists import block_counts, listed_queries, store_floors
from .reach import are_kept
from .score import distance_to_threshold, relative_distance, transposed_scores
from .share import blocks_between, part_pointers, share_of, store_gradients
from .tile import (
    UNSPECIALIZED,
    Matrix,
    Sizes,
    head_of,
    key_head,
    load_block,
    load_tile,
    open_tile,
    query_head,
    store_tile,
)
from .visibility import KernelVisibility


class QueryContext(NamedTuple):
    """What each block of keys is added to dQ with."""

    queries: Queries
    threshold: Threshold
    do: Tensor
    delta: Tensor
    key: Matrix
    value: Matrix


class QuerySums(NamedTuple):
    """Sums over keys, relative to the offset: of dQ, and where they are needed of the parameters' gradients."""

    dq: Tensor
    weight: Tensor  # sum u
    ds: Tensor  # sum u (dP - delta)
    share: Tensor  # sum e with e = p (1 - ln d)
    share_dp: Tensor  # sum e (dP - delta)
    alibi_slope: Tensor


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_query_kernel(
    query, key, value, value_mean, grad_output, selected, maximum, offset, row_pairs, floors, reached_keys, lists,
    grad_query, grad_parameters, score_options, visibility, heads, group, query_length, key_length, first_unit, units,
    first_tile, capacity, C: tl.constexpr,
):  # fmt: skip
    """dQ, and for the other gradients the pairs of numbers of each query, and its floor where words are not kept.

    A query that sees no key has maximum +inf. Whatever comes in for its output, NaN included, goes nowhere: where there
    may be such queries, `selected` gets grad_output without their rows, for the other gradients.
    """
    TILE: tl.constexpr = C.TILE
    HEAD_PADDED: tl.constexpr = C.HEAD_PADDED
    sizes = Sizes(heads, group, query_length, key_length)
    chunk = ChunkSizes(first_unit, units, first_tile, capacity)
    queries, blocks = open_program(query, reached_keys, lists, score_options, visibility, sizes, chunk, C)
    unit, tile, options, exponent = queries.unit, queries.tile, queries.options, queries.options.exponent
    threshold = open_threshold(maximum, offset, queries)
    row_offset = threshold.offset
    first = tile * TILE
    do = load_tile(query_head(grad_output, unit, sizes), first, query_length, TILE, C.VALUE, C.VALUE_PADDED)
    if selected is not None:
        do = tl.where((threshold.maximum == float("inf"))[:, None], 0.0, do).to(do.dtype)
        store_tile(query_head(selected, unit, sizes), first, query_length, do, TILE, C.VALUE, C.VALUE_PADDED)
    mean = load_tile(query_head(value_mean, unit, sizes), first, query_length, TILE, C.VALUE, C.VALUE_PADDED)
    delta = tl.sum(do.to(tl.float32) * mean.to(tl.float32), 1)
    store_row_pairs(row_pairs, queries, threshold, delta, C)
    if are_kept(key_length, C) == 0:
        store_floors(floors, queries, threshold, C)

    context = QueryContext(queries, threshold, do, delta, key_head(key, unit, sizes), key_head(value, unit, sizes))
    dq = tl.zeros((TILE, HEAD_PADDED), tl.float32)
    nothing = tl.zeros((TILE,), tl.float32)
    sums = walk(add_to_query, QuerySums(dq, nothing, nothing, nothing, nothing, nothing), context, blocks, C)
    u_of_offset = support_weight(row_offset, exponent, C.POWER)
    dq = sums.dq * (u_of_offset * options.scale)[:, None]
    store_tile(query_head(grad_query, unit, sizes), first, query_length, dq, TILE, C.HEAD, HEAD_PADDED)
    if C.NEEDS_PARAMETERS:
        # d alpha = r^2 sum_j e_j (dP_j - delta), and sum_j u_j (dP_j - delta) = 0 but for what 16 bits took from delta.
        # With e_j - u_j sum e / sum u in place of e_j, that rounding cancels.
        grad_alpha = sums.share_dp - sums.ds * sums.share / tl.where(sums.weight == 0, 1.0, sums.weight)
        grad_alpha *= probability(row_offset, exponent, C.POWER) * exponent * exponent
        grad_scale = tl.sum(dq * queries.q.to(tl.float32), 1) / options.scale  # sum_j dS_j (q . k_j) = q . dQ / scale
        place = grad_parameters + (tl.cast(unit, tl.int64) * tl.cdiv(query_length, TILE) + tile) * 3
        tl.store(place, tl.sum(grad_alpha, 0))
        tl.store(place + 1, tl.sum(grad_scale, 0))
        tl.store(place + 2, tl.sum(sums.alibi_slope * u_of_offset, 0))


@triton.jit
def row_pair_pointers(row_pairs, unit, row, sizes, C: tl.constexpr):
    """The first number of each query's first pair, and of its second pair."""
    rows = (sizes.query_length + C.TILE - 1) // C.TILE * C.TILE
    first = row_pairs + tl.cast(unit, tl.int64) * rows * 4 + row * 2
    return first, first + rows * 2


@triton.jit
def store_row_pairs(row_pairs, queries, threshold, delta, C: tl.constexpr):
    first, second = row_pair_pointers(row_pairs, queries.unit, queries.row, queries.sizes, C)
    tl.store(first, threshold.maximum)
    tl.store(first + 1, threshold.offset)
    tl.store(second, -delta)
    tl.store(second + 1, -delta)


@triton.jit
def add_to_query(sums, context, block, MASKED: tl.constexpr, C: tl.constexpr):
    """dQ and the parameters' sums, by one block of keys."""
    queries, threshold, do = context.queries, context.threshold, context.do
    keys = open_keys(context.key, block, queries.sizes, MASKED, C)
    x, softcap_slope = relative_distance(queries, threshold, keys, MASKED, C)
    v = load_block(context.value, block, queries.sizes.key_length, MASKED, C.VALUE, C.VALUE_PADDED)
    dp = tl.dot(do, tl.trans(v), input_precision=C.PRECISION) - context.delta[:, None]
    p, u = probability_and_weight(x, queries.options.exponent, C.POWER, C.FAST_LOG2)
    ds = u * dp
    dq = tl.dot((ds * softcap_slope).to(keys.k.dtype), keys.k, sums.dq, input_precision=C.PRECISION)
    weight, sum_ds, share, share_dp, alibi_slope = sums.weight, sums.ds, sums.share, sums.share_dp, sums.alibi_slope
    if C.NEEDS_PARAMETERS:
        e = p * share_logarithm(x, threshold.offset, C.FAST_LOG2)
        if C.ALIBI:
            distance = tl.abs(queries.position[:, None] - (keys.first + keys.column)[None, :])
            alibi_slope -= tl.sum(ds * distance.to(tl.float32), 1)
        weight += tl.sum(u, 1)
        sum_ds += tl.sum(ds, 1)
        share += tl.sum(e, 1)
        share_dp += tl.sum(e * dp, 1)
    return QuerySums(dq, weight, sum_ds, share, share_dp, alibi_slope)


class KeyContext(NamedTuple):
    """What each block of queries is added to dK and dV with: matrices of one query head, and a tile of keys."""

    keys: Keys
    v: Tensor
    query: Matrix
    grad_output: Matrix
    row_pairs: Tensor
    unit: int
    options: KernelScoreOptions
    sizes: Sizes
    visibility: KernelVisibility


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_key_value_kernel(
    query, key, value, grad_output, row_pairs, lists, shares, parts, grad_key, grad_value, score_options, visibility,
    heads, group, query_length, key_length, first_unit, units, first_key, tile_capacity, row_capacity, slots,
    C: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys: the sum over the query heads of the group and over the queries that reach it.

    Here a unit is a key head of a batch row. The first programs of each unit are for its slots.
    """
    TILE: tl.constexpr = C.TILE
    HEAD_PADDED: tl.constexpr = C.HEAD_PADDED
    VALUE_PADDED: tl.constexpr = C.VALUE_PADDED
    sizes = Sizes(heads, group, query_length, key_length)
    own_unit, number = tl.program_id(0) % units, tl.program_id(0) // units
    unit = first_unit + own_unit
    tiles = tl.num_programs(0) // units - slots
    own_tile, part, count = number - slots, 0, 1
    if slots > 0:
        slot = tl.where(number < slots, number, -1)
        own_tile, part, count = share_of(shares, own_unit, slot, own_tile, slots, tiles)
    if own_tile >= 0:
        tile = first_key + own_tile
        key_heads = heads // group
        batch, head = unit // key_heads, unit % key_heads
        keys = open_keys(head_of(key, batch, head), open_tile(tile, C), sizes, True, C)
        v = load_tile(head_of(value, batch, head), tile * TILE, key_length, TILE, C.VALUE, VALUE_PADDED)

        total = 0
        for member in range(group):
            index = (own_unit * group + member) * tiles + own_tile
            total += tl.load(block_counts(lists, index, tile_capacity, row_capacity))
        low, high = part * total // count, (part + 1) * total // count  # of the blocks, one query head after the other
        passed = 0  # blocks of the heads before: Triton 3.6 would take two bounds that fall alike for one
        state = tl.zeros((TILE, HEAD_PADDED), tl.float32), tl.zeros((TILE, VALUE_PADDED), tl.float32)
        for member in range(group):
            query_unit = unit * group + member  # the heads of a key head follow each other
            index = (own_unit * group + member) * tiles + own_tile
            blocks = listed_queries(lists, index, tile_capacity, row_capacity)
            context = KeyContext(
                keys, v, query_head(query, query_unit, sizes), query_head(grad_output, query_unit, sizes), row_pairs,
                query_unit, open_options(score_options, query_unit, sizes, C), sizes, visibility,
            )  # fmt: skip
            blocks = blocks_between(blocks, low - passed, high - passed, C)
            state = walk(add_to_key_and_value, state, context, blocks, C)
            passed += tl.load(block_counts(lists, index, tile_capacity, row_capacity))
        dk, dv = state
        if count == 1:
            store_gradients(grad_key, grad_value, dk, dv, unit, tile * TILE, TILE, score_options.scale, sizes, C)
        else:
            tl.store(part_pointers(parts, tl.program_id(0), HEAD_PADDED, 0, C), dk)
            tl.store(part_pointers(parts, tl.program_id(0), VALUE_PADDED, TILE * HEAD_PADDED, C), dv)


@triton.jit
def add_to_key_and_value(state, context, block, MASKED: tl.constexpr, C: tl.constexpr):
    """dK and dV, by a block of queries. Keys are the rows here, so that P^T and dS^T come out ready to multiply."""
    TILE: tl.constexpr = C.TILE
    unit, options, sizes = context.unit, context.options, context.sizes
    dk, dv = state
    queries = open_queries(context.query, unit, block, options, sizes, context.visibility, MASKED, C)
    do = load_block(context.grad_output, block, sizes.query_length, MASKED, C.VALUE, C.VALUE_PADDED)
    thresholds, deltas = row_pair_pointers(context.row_pairs, unit, queries.row, sizes, C)
    maximum, offset = tl.split(tl.load(thresholds[:, None] + tl.arange(0, 2)[None, :]))

    score, softcap_slope = transposed_scores(queries, context.keys, MASKED, C)
    d = distance_to_threshold(score, maximum[None, :], options.z_scale, offset[None, :])
    p, u = probability_and_weight(d, options.exponent, C.POWER, C.FAST_LOG2)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=C.PRECISION)
    negative_delta, _ = tl.split(tl.load(deltas[:, None] + tl.arange(0, 2)[None, :]))
    start = tl.broadcast_to(negative_delta[None, :], (TILE, TILE))  # the product starts from -delta
    dp = tl.dot(context.v, tl.trans(do), start, input_precision=C.PRECISION)
    ds = u * dp * softcap_slope
    if C.PER_HEAD:
        ds *= options.scale
    dk = tl.dot(ds.to(queries.q.dtype), queries.q, dk, input_precision=C.PRECISION)
    return dk, dv

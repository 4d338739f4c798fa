"""The gradient over the live tiles: dS = u (dP - delta) with dP = dO V^T and delta = dO . O1.

dQ = scale dS K walks each tile of queries. dK = scale dS^T Q and dV = P^T dO walk the transposed lists. There are no
atomics: every number is added in one order, so that repeated runs agree bit for bit. The gradients of alpha, scale and
ALiBi slopes come with dQ where they are needed.

Between the two, what dK and dV need of each query is stored in pairs, (maximum, offset) and (-delta, -delta): every
thread that needs a part of a narrower load would repeat it.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .alpha import probability, probability_and_weight, share_logarithm, support_weight
from .keys import Keys, open_keys
from .lists import list_place, listed_tiles, walk
from .program import ChunkSizes, open_program
from .queries import KernelScoreOptions, Queries, Threshold, open_options, open_queries, open_threshold
from .score import distance_to_threshold, relative_distance, transposed_scores
from .tile import (
    UNSPECIALIZED,
    Matrix,
    Sizes,
    head_of,
    key_head,
    load_keys,
    load_tile,
    query_head,
    store_tile,
)
from .visibility import KernelVisibility


class QueryContext(NamedTuple):
    """What each tile of keys is added to dQ with."""

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
    query, key, value, value_mean, grad_output, selected, maximum, offset, row_pairs, live, lists, grad_query,
    grad_parameters, score_options, visibility, heads, group, query_length, key_length, first_unit, units, first_tile,
    words, capacity, C: tl.constexpr,
):  # fmt: skip
    """dQ, and for the other gradients the pairs of numbers of each query.

    A query that sees no key has maximum +inf. Whatever comes in for its output, NaN included, goes nowhere: where there
    may be such queries, `selected` gets grad_output without their rows, for the other gradients.
    """
    TILE: tl.constexpr = C.TILE
    HEAD_PADDED: tl.constexpr = C.HEAD_PADDED
    sizes = Sizes(heads, group, query_length, key_length)
    chunk = ChunkSizes(first_unit, units, first_tile, words, capacity)
    queries, tiles = open_program(query, live, lists, score_options, visibility, sizes, chunk, C)
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

    context = QueryContext(queries, threshold, do, delta, key_head(key, unit, sizes), key_head(value, unit, sizes))
    dq = tl.zeros((TILE, HEAD_PADDED), tl.float32)
    nothing = tl.zeros((TILE,), tl.float32)
    sums = walk(add_to_query, QuerySums(dq, nothing, nothing, nothing, nothing, nothing), context, tiles, C)
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
def row_pair_pointers(row_pairs, unit, tile, sizes, C: tl.constexpr):
    """The first number of each query's first pair; that of its second pair is 2 TILE further on."""
    tiles = (sizes.query_length + C.TILE - 1) // C.TILE
    return row_pairs + (tl.cast(unit, tl.int64) * tiles + tile) * (C.TILE * 4) + tl.arange(0, C.TILE) * 2


@triton.jit
def store_row_pairs(row_pairs, queries, threshold, delta, C: tl.constexpr):
    pointers = row_pair_pointers(row_pairs, queries.unit, queries.tile, queries.sizes, C)
    tl.store(pointers, threshold.maximum)
    tl.store(pointers + 1, threshold.offset)
    tl.store(pointers + 2 * C.TILE, -delta)
    tl.store(pointers + 2 * C.TILE + 1, -delta)


@triton.jit
def add_to_query(sums, context, key_tile, MASKED: tl.constexpr, C: tl.constexpr):
    """dQ and the parameters' sums, by one tile of keys."""
    queries, threshold, do = context.queries, context.threshold, context.do
    keys = open_keys(context.key, key_tile, queries.sizes, MASKED, C)
    x, softcap_slope = relative_distance(queries, threshold, keys, MASKED, C)
    v = load_keys(context.value, key_tile, queries.sizes, MASKED, C.TILE, C.VALUE, C.VALUE_PADDED)
    dp = tl.dot(do, tl.trans(v), input_precision=C.PRECISION) - context.delta[:, None]
    p, u = probability_and_weight(x, queries.options.exponent, C.POWER, C.FAST_LOG2)
    ds = u * dp
    k = load_keys(context.key, key_tile, queries.sizes, MASKED, C.TILE, C.HEAD, C.HEAD_PADDED)
    dq = tl.dot((ds * softcap_slope).to(k.dtype), k, sums.dq, input_precision=C.PRECISION)
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
    """What each tile of queries is added to dK and dV with: matrices of one query head, and a tile of keys."""

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
    query, key, value, grad_output, row_pairs, live, lists, grad_key, grad_value, score_options, visibility, heads,
    group, query_length, key_length, first_unit, units, first_tile, words, capacity, C: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys: the sum over the query heads of the group and over their live tiles of queries.

    Here a unit is a key head of a batch row.
    """
    TILE: tl.constexpr = C.TILE
    HEAD_PADDED: tl.constexpr = C.HEAD_PADDED
    VALUE_PADDED: tl.constexpr = C.VALUE_PADDED
    sizes = Sizes(heads, group, query_length, key_length)
    unit = first_unit + tl.program_id(0) % units
    tile = first_tile + tl.program_id(0) // units
    _, places = list_place(lists, unit, tile, units, first_unit, first_tile, capacity)
    key_heads = heads // group
    batch, head = unit // key_heads, unit % key_heads
    first = tile * TILE
    keys = open_keys(head_of(key, batch, head), tile, sizes, True, C)
    v = load_tile(head_of(value, batch, head), first, key_length, TILE, C.VALUE, VALUE_PADDED)

    state = tl.zeros((TILE, HEAD_PADDED), tl.float32), tl.zeros((TILE, VALUE_PADDED), tl.float32)
    for member in range(group):
        query_unit = batch * heads + head * group + member
        tiles = listed_tiles(places, capacity, live, query_unit, tile, words, sizes, visibility, True, C)
        context = KeyContext(
            keys, v, query_head(query, query_unit, sizes), query_head(grad_output, query_unit, sizes), row_pairs,
            query_unit, open_options(score_options, query_unit, sizes, C), sizes, visibility,
        )  # fmt: skip
        state = walk(add_to_key_and_value, state, context, tiles, C)
    dk, dv = state
    if not C.PER_HEAD:
        dk *= score_options.scale
    store_tile(head_of(grad_key, batch, head), first, key_length, dk, TILE, C.HEAD, HEAD_PADDED)
    store_tile(head_of(grad_value, batch, head), first, key_length, dv, TILE, C.VALUE, VALUE_PADDED)


@triton.jit
def add_to_key_and_value(state, context, query_tile, MASKED: tl.constexpr, C: tl.constexpr):
    """dK and dV, by one tile of queries. Keys are the rows here, so that P^T and dS^T come out ready to multiply."""
    TILE: tl.constexpr = C.TILE
    unit, options, sizes = context.unit, context.options, context.sizes
    dk, dv = state
    queries = open_queries(context.query, unit, query_tile, options, sizes, context.visibility, C)
    do = load_tile(context.grad_output, query_tile * TILE, sizes.query_length, TILE, C.VALUE, C.VALUE_PADDED)
    pairs = row_pair_pointers(context.row_pairs, unit, query_tile, sizes, C)[:, None] + tl.arange(0, 2)[None, :]
    maximum, offset = tl.split(tl.load(pairs))

    score, softcap_slope = transposed_scores(queries, context.keys, MASKED, C)
    d = distance_to_threshold(score, maximum[None, :], options.z_scale, offset[None, :])
    p, u = probability_and_weight(d, options.exponent, C.POWER, C.FAST_LOG2)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=C.PRECISION)
    negative_delta, _ = tl.split(tl.load(pairs + 2 * TILE))
    start = tl.broadcast_to(negative_delta[None, :], (TILE, TILE))  # the product starts from -delta
    dp = tl.dot(context.v, tl.trans(do), start, input_precision=C.PRECISION)
    ds = u * dp * softcap_slope
    if C.PER_HEAD:
        ds *= options.scale
    dk = tl.dot(ds.to(queries.q.dtype), queries.q, dk, input_precision=C.PRECISION)
    return dk, dv

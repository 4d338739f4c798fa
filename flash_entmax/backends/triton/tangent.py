"""The output's derivative along tangents of the inputs, over the listed keys: dO = sum dp v + sum p dv.

Scores change by ds. With t = u ds + r^2 d alpha p (1 - ln d), dp = t - u sum t / sum u, so that sum p stays 1. A first
pass over a row's keys computes the two sums, a second one the products with the values.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .alpha import probability, probability_and_weight, share_logarithm, support_weight
from .keys import open_keys
from .lists import walk
from .program import ChunkSizes, open_program
from .queries import Queries, Threshold, open_threshold
from .score import relative_distance
from .tile import (
    UNSPECIALIZED,
    Matrix,
    Sizes,
    key_head,
    load_block,
    load_tile,
    query_head,
    store_tile,
)


class Directions(NamedTuple):
    """Tangents of the tensors, and of alpha (heads,), scale (heads,) and ALiBi slopes (batch, heads), or None."""

    query: Matrix
    key: Matrix
    value: Matrix
    alpha: Tensor | None
    scale: Tensor | None
    alibi_slopes: Tensor | None


class TangentContext(NamedTuple):
    """What each block of keys is added with. `mean` is sum t / sum u; the last three are tangents of one head."""

    queries: Queries
    threshold: Threshold
    dq: Tensor
    key: Matrix
    key_tangent: Matrix
    value: Matrix
    value_tangent: Matrix
    mean: Tensor
    alpha: float  # r^2 d alpha
    scale: float
    alibi_slope: float


@triton.jit(do_not_specialize=UNSPECIALIZED)
def tangent_kernel(
    query, key, value, directions, maximum, offset, reached_keys, lists, result, score_options, visibility, heads,
    group, query_length, key_length, first_unit, units, first_tile, capacity, C: tl.constexpr,
):  # fmt: skip
    """dO of one tile of queries."""
    TILE: tl.constexpr = C.TILE
    VALUE_PADDED: tl.constexpr = C.VALUE_PADDED
    sizes = Sizes(heads, group, query_length, key_length)
    chunk = ChunkSizes(first_unit, units, first_tile, capacity)
    queries, blocks = open_program(query, reached_keys, lists, score_options, visibility, sizes, chunk, C)
    unit, tile, exponent = queries.unit, queries.tile, queries.options.exponent
    threshold = open_threshold(maximum, offset, queries)
    first = tile * TILE
    dq = load_tile(query_head(directions.query, unit, sizes), first, query_length, TILE, C.HEAD, C.HEAD_PADDED)

    d_alpha, d_scale, d_slope = 0.0, 0.0, 0.0
    if C.NEEDS_PARAMETERS:
        d_alpha = tl.load(directions.alpha + unit % heads) * exponent * exponent
        d_scale = tl.load(directions.scale + unit % heads)
        d_slope = tl.load(directions.alibi_slopes + unit)
    key, key_tangent = key_head(key, unit, sizes), key_head(directions.key, unit, sizes)
    value, value_tangent = key_head(value, unit, sizes), key_head(directions.value, unit, sizes)
    nothing = tl.zeros((TILE,), tl.float32)
    context = TangentContext(
        queries, threshold, dq, key, key_tangent, value, value_tangent, nothing, d_alpha, d_scale, d_slope
    )
    change, weight = walk(add_sums, (nothing, nothing), context, blocks, C)
    mean = change / tl.where(weight == 0, 1.0, weight)
    context = TangentContext(
        queries, threshold, dq, key, key_tangent, value, value_tangent, mean, d_alpha, d_scale, d_slope
    )
    none = tl.zeros((TILE, VALUE_PADDED), tl.float32)
    by_weights, by_values = walk(add_products, (none, none), context, blocks, C)
    total = by_weights * support_weight(threshold.offset, exponent, C.POWER)[:, None]
    total += by_values * probability(threshold.offset, exponent, C.POWER)[:, None]
    store_tile(query_head(result, unit, sizes), first, query_length, total, TILE, C.VALUE, VALUE_PADDED)


@triton.jit
def add_sums(state, context, block, MASKED: tl.constexpr, C: tl.constexpr):
    """sum t and sum u, both over offset^(r - 1)."""
    change, weight = state
    _, u, t = changes(context, block, MASKED, C)
    return change + tl.sum(t, 1), weight + tl.sum(u, 1)


@triton.jit
def add_products(state, context, block, MASKED: tl.constexpr, C: tl.constexpr):
    """sum dp v and sum p dv."""
    sizes = context.queries.sizes
    by_weights, by_values = state
    p, u, t = changes(context, block, MASKED, C)
    v = load_block(context.value, block, sizes.key_length, MASKED, C.VALUE, C.VALUE_PADDED)
    dp = t - u * context.mean[:, None]
    by_weights = tl.dot(dp.to(v.dtype), v, by_weights, input_precision=C.PRECISION)
    dv = load_block(context.value_tangent, block, sizes.key_length, MASKED, C.VALUE, C.VALUE_PADDED)
    by_values = tl.dot(p.to(dv.dtype), dv, by_values, input_precision=C.PRECISION)
    return by_weights, by_values


@triton.jit
def changes(context, block, MASKED: tl.constexpr, C: tl.constexpr):
    """(p / offset^r, u / offset^(r - 1), t / offset^(r - 1)) of one tile of keys."""
    queries, threshold = context.queries, context.threshold
    keys = open_keys(context.key, block, queries.sizes, MASKED, C)
    x, softcap_slope = relative_distance(queries, threshold, keys, MASKED, C)
    p, u = probability_and_weight(x, queries.options.exponent, C.POWER, C.FAST_LOG2)
    dk = load_block(context.key_tangent, block, queries.sizes.key_length, MASKED, C.HEAD, C.HEAD_PADDED)
    ds = tl.dot(context.dq, tl.trans(keys.k), input_precision=C.PRECISION)
    ds = tl.dot(queries.q, tl.trans(dk), ds, input_precision=C.PRECISION) * queries.options.scale
    if C.NEEDS_PARAMETERS:
        ds += context.scale * tl.dot(queries.q, tl.trans(keys.k), input_precision=C.PRECISION)
    ds *= softcap_slope
    if C.NEEDS_PARAMETERS:
        distance = tl.abs(queries.position[:, None] - (keys.first + keys.column)[None, :])
        ds -= context.alibi_slope * distance.to(tl.float32)
    t = tl.where(u == 0, 0.0, u * ds)  # a hidden key's score may change by anything
    if C.NEEDS_PARAMETERS:
        e = p * share_logarithm(x, threshold.offset, C.FAST_LOG2)
        t += context.alpha * threshold.offset[:, None] * e
    return p, u, t

"""The output's derivative along tangents of the inputs, over the live tiles: dO = sum dp v + sum p dv.

Scores change by ds. With t = u ds + r^2 d alpha p (1 - ln d), dp = t - u sum t / sum u, so that sum p stays 1.
A first pass over a row's tiles has the two sums, a second one the products with the values.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .alpha import binary_logarithm, probability, probability_and_weight, support_weight
from .lists import listed_tiles
from .score import of_head, open_queries, relative_distance
from .tile import (
    SIZES,
    Extent,
    Matrix,
    heaviest_first,
    key_head,
    list_of,
    load_keys,
    load_row,
    load_tile,
    query_head,
    store_tile,
    walk,
)

LN_2 = tl.constexpr(0.6931471805599453)


class Directions(NamedTuple):
    """Tangents of the tensors, and of the parameters: alpha and scale (heads,), slopes (batch, heads), or None."""

    query: Matrix
    key: Matrix
    value: Matrix
    alpha: Tensor | None
    scale: Tensor | None
    slopes: Tensor | None


@triton.jit(do_not_specialize=SIZES)
def tangent_kernel(
    query, key, value, directions, maximum, offset, live, lists, result, view, scale, slope, exponent, heads, group,
    query_length, key_length, first_unit, units, first_tile, words, capacity, S: tl.constexpr,
):  # fmt: skip
    """dO of one tile of queries."""
    TILE: tl.constexpr = S.TILE
    VALUE_PADDED: tl.constexpr = S.VALUE_PADDED
    extent = Extent(heads, group, query_length, key_length)
    unit, tile = heaviest_first(units, first_unit, first_tile)
    scale, slope = of_head(scale, unit, extent, S), of_head(slope, unit, extent, S)
    exponent = of_head(exponent, unit, extent, S)
    _, places = list_of(lists, unit, tile, units, first_unit, first_tile, capacity)
    tiles = listed_tiles(places, capacity, live, unit, tile, words, extent, view, False, S)
    queries = open_queries(query, unit, tile, extent, view, S)
    top = load_row(maximum, unit, queries.row, extent, float("inf"))
    reach = load_row(offset, unit, queries.row, extent, 1.0)
    first = tile * TILE
    dq = load_tile(query_head(directions.query, unit, extent), first, query_length, TILE, S.HEAD, S.HEAD_PADDED)

    of_alpha, of_scale, of_slope = 0.0, 0.0, 0.0
    if S.PARAMETERS:
        of_alpha = tl.load(directions.alpha + unit % heads) * exponent * exponent
        of_scale = tl.load(directions.scale + unit % heads)
        of_slope = tl.load(directions.slopes + unit)
    numbers = scale, exponent, of_alpha, of_scale, of_slope
    keys = key_head(key, unit, extent), key_head(directions.key, unit, extent)
    values = key_head(value, unit, extent), key_head(directions.value, unit, extent)
    nothing = tl.zeros((TILE,), tl.float32)
    context = queries, dq, keys, values, top, slope / reach, reach, nothing, numbers, extent, view
    change, weight = walk(accumulate_sums, (nothing, nothing), context, tiles, S)
    mean = change / tl.where(weight == 0, 1.0, weight)
    context = queries, dq, keys, values, top, slope / reach, reach, mean, numbers, extent, view
    none = tl.zeros((TILE, VALUE_PADDED), tl.float32)
    by_weights, by_values = walk(accumulate_products, (none, none), context, tiles, S)
    total = by_weights * support_weight(reach, exponent, S.POWER)[:, None]
    total += by_values * probability(reach, exponent, S.POWER)[:, None]
    store_tile(query_head(result, unit, extent), first, query_length, total, TILE, S.VALUE, VALUE_PADDED)


@triton.jit
def accumulate_sums(state, context, key_tile, MASKED: tl.constexpr, S: tl.constexpr):
    """sum t and sum u, both over offset^(r - 1)."""
    change, weight = state
    _, u, t = changes(context, key_tile, MASKED, S)
    return change + tl.sum(t, 1), weight + tl.sum(u, 1)


@triton.jit
def accumulate_products(state, context, key_tile, MASKED: tl.constexpr, S: tl.constexpr):
    """sum dp v and sum p dv."""
    _, _, _, values, _, _, _, mean, _, extent, _ = context
    by_weights, by_values = state
    p, u, t = changes(context, key_tile, MASKED, S)
    value, value_tangent = values
    v = load_keys(value, key_tile, extent, MASKED, S.TILE, S.VALUE, S.VALUE_PADDED)
    dp = t - u * mean[:, None]
    by_weights = tl.dot(dp.to(v.dtype), v, by_weights, input_precision=S.PRECISION)
    dv = load_keys(value_tangent, key_tile, extent, MASKED, S.TILE, S.VALUE, S.VALUE_PADDED)
    by_values = tl.dot(p.to(dv.dtype), dv, by_values, input_precision=S.PRECISION)
    return by_weights, by_values


@triton.jit
def changes(context, key_tile, MASKED: tl.constexpr, S: tl.constexpr):
    """(p / offset^r, u / offset^(r - 1), t / offset^(r - 1)) of one tile of keys."""
    queries, dq, keys, _, top, slope, reach, _, numbers, extent, view = context
    scale, exponent, of_alpha, of_scale, of_slope = numbers
    key, key_tangent = keys
    x, steepness = relative_distance(queries, top, slope, key, key_tile, extent, view, MASKED, S)
    p, u = probability_and_weight(x, exponent, S.POWER, S.HARDWARE)
    k = load_keys(key, key_tile, extent, MASKED, S.TILE, S.HEAD, S.HEAD_PADDED)
    dk = load_keys(key_tangent, key_tile, extent, MASKED, S.TILE, S.HEAD, S.HEAD_PADDED)
    ds = tl.dot(dq, tl.trans(k), input_precision=S.PRECISION)
    ds = tl.dot(queries.q, tl.trans(dk), ds, input_precision=S.PRECISION) * scale
    if S.PARAMETERS:
        ds += of_scale * tl.dot(queries.q, tl.trans(k), input_precision=S.PRECISION)
    ds *= steepness
    if S.PARAMETERS:
        key_position = key_tile * S.TILE + tl.arange(0, S.TILE)
        far = tl.abs(queries.position[:, None] - key_position[None, :])
        ds -= of_slope * far.to(tl.float32)
    t = tl.where(u == 0, 0.0, u * ds)  # a hidden key's score may change by anything
    if S.PARAMETERS:
        logarithm = tl.where(x > 0, LN_2 * binary_logarithm(x, S.HARDWARE), 0.0)
        t += of_alpha * reach[:, None] * p * (1.0 - tl.log(reach)[:, None] - logarithm)
    return p, u, t

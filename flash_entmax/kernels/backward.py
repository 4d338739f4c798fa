"""The gradient over the live tiles: dS = u (dP - delta) with dP = dO V^T and delta = dO . O1.

dQ = scale dS K walks each tile of queries; dK = scale dS^T Q and dV = P^T dO walk the transposed lists. No atomics:
every number is added in one order, so repeated runs agree bit for bit.
"""

import triton
import triton.language as tl

from .alpha import probability, support_weight
from .tile import (
    SIZES,
    Extent,
    distance,
    head_of,
    hide,
    key_head,
    load_row,
    load_tile,
    open_list,
    open_rows,
    query_head,
    relative_distance,
    store_row,
    store_tile,
    visible_keys,
    walk,
)


@triton.jit(do_not_specialize=SIZES)
def gradient_query_kernel(
    query, key, value, value_mean, grad_output, maximum, offset, delta, lists, counts, grad_query,
    scale, slope, exponent, heads, group, query_length, key_length, first_unit, units, first_tile, capacity,
    S: tl.constexpr,
):  # fmt: skip
    """dQ, and delta for the other gradients."""
    TILE: tl.constexpr = S.TILE
    HEAD_PADDED: tl.constexpr = S.HEAD_PADDED
    extent = Extent(heads, group, query_length, key_length)
    rows = open_rows(query, maximum, offset, lists, counts, extent, first_unit, units, first_tile, capacity, S)
    unit, first = rows.unit, rows.tile * TILE
    do = load_tile(query_head(grad_output, unit, extent), first, query_length, TILE, S.VALUE, S.VALUE_PADDED)
    mean = load_tile(query_head(value_mean, unit, extent), first, query_length, TILE, S.VALUE, S.VALUE_PADDED)
    shift = tl.sum(do.to(tl.float32) * mean.to(tl.float32), 1)
    store_row(delta, unit, rows.row, extent, shift)

    key, value = key_head(key, unit, extent), key_head(value, unit, extent)
    context = rows, slope / rows.reach, do, key, value, shift, exponent, extent
    dq = walk(accumulate_query, tl.zeros((TILE, HEAD_PADDED), tl.float32), context, rows.tiles, False, S)
    dq *= (support_weight(rows.reach, exponent, S.POWER) * scale)[:, None]
    store_tile(query_head(grad_query, unit, extent), first, query_length, dq, TILE, S.HEAD, HEAD_PADDED)


@triton.jit
def accumulate_query(dq, context, key_tile, MASKED: tl.constexpr, S: tl.constexpr):
    rows, slope, do, key, value, shift, exponent, extent = context
    x = relative_distance(rows, slope, key, extent, key_tile, MASKED, S)
    v = load_tile(value, key_tile * S.TILE, extent.key_length, S.TILE, S.VALUE, S.VALUE_PADDED)
    dp = tl.dot(do, tl.trans(v), input_precision=S.PRECISION)
    ds = support_weight(x, exponent, S.POWER) * (dp - shift[:, None])
    k = load_tile(key, key_tile * S.TILE, extent.key_length, S.TILE, S.HEAD, S.HEAD_PADDED)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=S.PRECISION)


@triton.jit(do_not_specialize=SIZES)
def gradient_key_value_kernel(
    query, key, value, grad_output, maximum, offset, delta, lists, counts, grad_key, grad_value,
    scale, slope, exponent, heads, group, query_length, key_length, first_unit, units, first_tile, capacity,
    S: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys: the sum over the query heads of the group and over their live tiles of queries.

    Here units count key heads, and lists are those of the group's query heads, one after the other.
    """
    TILE: tl.constexpr = S.TILE
    HEAD_PADDED: tl.constexpr = S.HEAD_PADDED
    VALUE_PADDED: tl.constexpr = S.VALUE_PADDED
    extent = Extent(heads, group, query_length, key_length)
    tiles_of_unit = tl.num_programs(0) // units
    unit = first_unit + tl.program_id(0) % units
    tile = first_tile + tl.program_id(0) // units
    key_heads = heads // group
    batch, head = unit // key_heads, unit % key_heads
    first = tile * TILE
    k = load_tile(head_of(key, batch, head), first, key_length, TILE, S.HEAD, HEAD_PADDED)
    v = load_tile(head_of(value, batch, head), first, key_length, TILE, S.VALUE, VALUE_PADDED)

    state = tl.zeros((TILE, HEAD_PADDED), tl.float32), tl.zeros((TILE, VALUE_PADDED), tl.float32)
    for member in range(group):
        query_unit = batch * heads + head * group + member
        index = ((unit - first_unit) * group + member) * tiles_of_unit + tile - first_tile
        tiles = open_list(lists, counts, index, capacity)
        context = (
            k, v, query_head(query, query_unit, extent), query_head(grad_output, query_unit, extent),
            maximum, offset, delta, query_unit, first, slope, exponent, extent,
        )  # fmt: skip
        state = walk(accumulate_key_value, state, context, tiles, True, S)
    dk, dv = state
    store_tile(head_of(grad_key, batch, head), first, key_length, dk * scale, TILE, S.HEAD, HEAD_PADDED)
    store_tile(head_of(grad_value, batch, head), first, key_length, dv, TILE, S.VALUE, VALUE_PADDED)


@triton.jit
def accumulate_key_value(state, context, query_tile, MASKED: tl.constexpr, S: tl.constexpr):
    """One tile of queries, transposed: keys are the rows here, so that P^T and dS^T come out ready to multiply."""
    k, v, query, grad_output, maximum, offset, delta, unit, first_key, slope, exponent, extent = context
    dk, dv = state
    TILE: tl.constexpr = S.TILE
    first = query_tile * TILE
    row = first + tl.arange(0, TILE)
    q = load_tile(query, first, extent.query_length, TILE, S.HEAD, S.HEAD_PADDED)
    do = load_tile(grad_output, first, extent.query_length, TILE, S.VALUE, S.VALUE_PADDED)
    top = load_row(maximum, unit, row, extent, float("inf"))
    reach = load_row(offset, unit, row, extent, 1.0)
    shift = load_row(delta, unit, row, extent, 0.0)

    score = tl.dot(k, tl.trans(q), input_precision=S.PRECISION)
    if MASKED:
        limit = visible_keys(row, extent, S.CAUSAL)
        score = hide(score, tl.arange(0, TILE)[:, None], (limit - first_key)[None, :])
    d = distance(score, top[None, :], slope, reach[None, :])
    dv = tl.dot(probability(d, exponent, S.POWER).to(do.dtype), do, dv, input_precision=S.PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=S.PRECISION)
    ds = support_weight(d, exponent, S.POWER) * (dp - shift[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=S.PRECISION)
    return dk, dv

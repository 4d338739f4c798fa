"""The gradient over the live tiles: dS = u (dP - delta) with dP = dO V^T and delta = dO . O1.

dQ = scale dS K walks each tile of queries; dK = scale dS^T Q and dV = P^T dO walk the transposed lists. No atomics:
every number is added in one order, so repeated runs agree bit for bit.

Between the two, what dK and dV need of each tile of queries is packed into pairs, (maximum, offset) and
(-delta, -delta): a load narrower than the program would be repeated by every thread that needs a part of it.
"""

import triton
import triton.language as tl

from .alpha import probability, support_weight
from .lists import listed_tiles
from .tile import (
    SIZES,
    Extent,
    distance,
    head_of,
    heaviest_first,
    hide,
    key_head,
    list_of,
    load_keys,
    load_tile,
    open_rows,
    query_head,
    relative_distance,
    store_tile,
    visible_keys,
    walk,
)


@triton.jit(do_not_specialize=SIZES)
def gradient_query_kernel(
    query, key, value, value_mean, grad_output, maximum, offset, packed, live, lists, grad_query,
    scale, slope, exponent, heads, group, query_length, key_length, first_unit, units, first_tile, words, capacity,
    S: tl.constexpr,
):  # fmt: skip
    """dQ, and the packed numbers of each query for the other gradients."""
    TILE: tl.constexpr = S.TILE
    HEAD_PADDED: tl.constexpr = S.HEAD_PADDED
    extent = Extent(heads, group, query_length, key_length)
    unit, tile = heaviest_first(units, first_unit, first_tile)
    _, places = list_of(lists, unit, tile, units, first_unit, first_tile, capacity)
    tiles = listed_tiles(places, live, unit, tile, words, extent, False, S)
    rows = open_rows(query, maximum, offset, unit, tile, tiles, extent, S)
    first = tile * TILE
    do = load_tile(query_head(grad_output, unit, extent), first, query_length, TILE, S.VALUE, S.VALUE_PADDED)
    mean = load_tile(query_head(value_mean, unit, extent), first, query_length, TILE, S.VALUE, S.VALUE_PADDED)
    shift = tl.sum(do.to(tl.float32) * mean.to(tl.float32), 1)
    pointers = packed_rows(packed, unit, tile, extent, S)
    tl.store(pointers, rows.top)
    tl.store(pointers + 1, rows.reach)
    tl.store(pointers + 2 * TILE, -shift)
    tl.store(pointers + 2 * TILE + 1, -shift)

    key, value = key_head(key, unit, extent), key_head(value, unit, extent)
    context = rows, slope / rows.reach, do, key, value, shift, exponent, extent
    dq = walk(accumulate_query, tl.zeros((TILE, HEAD_PADDED), tl.float32), context, rows.tiles, False, S)
    dq *= (support_weight(rows.reach, exponent, S.POWER) * scale)[:, None]
    store_tile(query_head(grad_query, unit, extent), first, query_length, dq, TILE, S.HEAD, HEAD_PADDED)


@triton.jit
def packed_rows(packed, unit, tile, extent, S: tl.constexpr):
    tiles = (extent.query_length + S.TILE - 1) // S.TILE
    return packed + (tl.cast(unit, tl.int64) * tiles + tile) * (S.TILE * 4) + tl.arange(0, S.TILE) * 2


@triton.jit
def accumulate_query(dq, context, key_tile, MASKED: tl.constexpr, S: tl.constexpr):
    rows, slope, do, key, value, shift, exponent, extent = context
    x = relative_distance(rows, slope, key, extent, key_tile, MASKED, S)
    v = load_keys(value, key_tile, extent, MASKED, S.TILE, S.VALUE, S.VALUE_PADDED)
    dp = tl.dot(do, tl.trans(v), input_precision=S.PRECISION)
    ds = support_weight(x, exponent, S.POWER) * (dp - shift[:, None])
    k = load_keys(key, key_tile, extent, MASKED, S.TILE, S.HEAD, S.HEAD_PADDED)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=S.PRECISION)


@triton.jit(do_not_specialize=SIZES)
def gradient_key_value_kernel(
    query, key, value, grad_output, packed, live, lists, grad_key, grad_value,
    scale, slope, exponent, heads, group, query_length, key_length, first_unit, units, first_tile, words, capacity,
    S: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys: the sum over the query heads of the group and over their live tiles of queries.

    Here units count key heads.
    """
    TILE: tl.constexpr = S.TILE
    HEAD_PADDED: tl.constexpr = S.HEAD_PADDED
    VALUE_PADDED: tl.constexpr = S.VALUE_PADDED
    extent = Extent(heads, group, query_length, key_length)
    unit = first_unit + tl.program_id(0) % units
    tile = first_tile + tl.program_id(0) // units
    _, places = list_of(lists, unit, tile, units, first_unit, first_tile, capacity)
    key_heads = heads // group
    batch, head = unit // key_heads, unit % key_heads
    first = tile * TILE
    k = load_tile(head_of(key, batch, head), first, key_length, TILE, S.HEAD, HEAD_PADDED)
    v = load_tile(head_of(value, batch, head), first, key_length, TILE, S.VALUE, VALUE_PADDED)

    state = tl.zeros((TILE, HEAD_PADDED), tl.float32), tl.zeros((TILE, VALUE_PADDED), tl.float32)
    for member in range(group):
        query_unit = batch * heads + head * group + member
        tiles = listed_tiles(places, live, query_unit, tile, words, extent, True, S)
        context = (
            k, v, query_head(query, query_unit, extent), query_head(grad_output, query_unit, extent),
            packed, query_unit, first, slope, exponent, extent,
        )  # fmt: skip
        state = walk(accumulate_key_value, state, context, tiles, True, S)
    dk, dv = state
    store_tile(head_of(grad_key, batch, head), first, key_length, dk * scale, TILE, S.HEAD, HEAD_PADDED)
    store_tile(head_of(grad_value, batch, head), first, key_length, dv, TILE, S.VALUE, VALUE_PADDED)


@triton.jit
def accumulate_key_value(state, context, query_tile, MASKED: tl.constexpr, S: tl.constexpr):
    """One tile of queries, transposed: keys are the rows here, so that P^T and dS^T come out ready to multiply."""
    k, v, query, grad_output, packed, unit, first_key, slope, exponent, extent = context
    dk, dv = state
    TILE: tl.constexpr = S.TILE
    first = query_tile * TILE
    q = load_tile(query, first, extent.query_length, TILE, S.HEAD, S.HEAD_PADDED)
    do = load_tile(grad_output, first, extent.query_length, TILE, S.VALUE, S.VALUE_PADDED)
    pairs = packed_rows(packed, unit, query_tile, extent, S)[:, None] + tl.arange(0, 2)[None, :]
    top, reach = tl.split(tl.load(pairs))

    score = tl.dot(k, tl.trans(q), input_precision=S.PRECISION)
    if MASKED:
        limit = visible_keys(first + tl.arange(0, TILE), extent, S.CAUSAL)
        score = hide(score, tl.arange(0, TILE)[:, None], (limit - first_key)[None, :])
    d = distance(score, top[None, :], slope, reach[None, :])
    dv = tl.dot(probability(d, exponent, S.POWER).to(do.dtype), do, dv, input_precision=S.PRECISION)
    shift, _ = tl.split(tl.load(pairs + 2 * TILE))
    shifted = tl.broadcast_to(shift[None, :], (TILE, TILE))  # the product starts from -delta
    dp = tl.dot(v, tl.trans(do), shifted, input_precision=S.PRECISION)
    ds = support_weight(d, exponent, S.POWER) * dp
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=S.PRECISION)
    return dk, dv

"""The gradient over the live tiles: dS = u (dP - delta) with dP = dO V^T and delta = dO . O1.

dQ = scale dS K walks each tile of queries; dK = scale dS^T Q and dV = P^T dO walk the transposed lists. No atomics:
every number is added in one order, so repeated runs agree bit for bit. With dQ go the gradients of alpha, scale and
ALiBi slopes, where they are asked for.

Between the two, what dK and dV need of each tile of queries is packed into pairs, (maximum, offset) and
(-delta, -delta): a load narrower than the program would be repeated by every thread that needs a part of it.
"""

import triton
import triton.language as tl

from .alpha import binary_logarithm, probability, probability_and_weight, support_weight
from .lists import listed_tiles
from .score import bends_of, distance, finish, of_head, open_queries, relative_distance
from .tile import (
    SIZES,
    Extent,
    head_of,
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
from .visibility import visible_interval

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=SIZES)
def gradient_query_kernel(
    query, key, value, value_mean, grad_output, selected, maximum, offset, packed, live, lists, grad_query,
    grad_parameters, view, scale, slope, exponent, heads, group, query_length, key_length, first_unit, units,
    first_tile, words, capacity, S: tl.constexpr,
):  # fmt: skip
    """dQ, and the packed numbers of each query for the other gradients.

    Where queries may see no key, these have maximum +inf, and whatever comes in for their output, NaN included, goes
    nowhere: `selected` is grad_output without it, for the other gradients.
    """
    TILE: tl.constexpr = S.TILE
    HEAD_PADDED: tl.constexpr = S.HEAD_PADDED
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
    do = load_tile(query_head(grad_output, unit, extent), first, query_length, TILE, S.VALUE, S.VALUE_PADDED)
    if selected is not None:
        do = tl.where((top == float("inf"))[:, None], 0.0, do).to(do.dtype)
        store_tile(query_head(selected, unit, extent), first, query_length, do, TILE, S.VALUE, S.VALUE_PADDED)
    mean = load_tile(query_head(value_mean, unit, extent), first, query_length, TILE, S.VALUE, S.VALUE_PADDED)
    delta = tl.sum(do.to(tl.float32) * mean.to(tl.float32), 1)
    pointers = packed_rows(packed, unit, tile, extent, S)
    tl.store(pointers, top)
    tl.store(pointers + 1, reach)
    tl.store(pointers + 2 * TILE, -delta)
    tl.store(pointers + 2 * TILE + 1, -delta)

    key, value = key_head(key, unit, extent), key_head(value, unit, extent)
    context = queries, top, slope / reach, reach, do, key, value, delta, exponent, extent, view
    dq = tl.zeros((TILE, HEAD_PADDED), tl.float32)
    nothing = tl.zeros((TILE,), tl.float32)
    if S.PARAMETERS:
        state = dq, nothing, nothing, nothing, nothing, nothing
        dq, weights, weighted, shares, shared, of_slope = walk(accumulate_query, state, context, tiles, S)
    else:
        (dq,) = walk(accumulate_query, (dq,), context, tiles, S)
    weight = support_weight(reach, exponent, S.POWER)
    dq *= (weight * scale)[:, None]
    store_tile(query_head(grad_query, unit, extent), first, query_length, dq, TILE, S.HEAD, HEAD_PADDED)
    if S.PARAMETERS:
        # d alpha = r^2 sum_j s_j (dP_j - delta) with s = p (1 - ln d), and sum_j u_j (dP_j - delta) = 0 but for what
        # 16 bits took from delta: with s_j - u_j sum s / sum u in place of s_j that cancels.
        of_alpha = shared - weighted * shares / tl.where(weights == 0, 1.0, weights)
        of_alpha *= probability(reach, exponent, S.POWER) * exponent * exponent
        of_scale = tl.sum(dq * queries.q.to(tl.float32), 1) / scale  # sum_j dS_j (q . k_j) = q . dQ / scale
        place = grad_parameters + (tl.cast(unit, tl.int64) * tl.cdiv(query_length, TILE) + tile) * 3
        tl.store(place, tl.sum(of_alpha, 0))
        tl.store(place + 1, tl.sum(of_scale, 0))
        tl.store(place + 2, tl.sum(of_slope * weight, 0))


@triton.jit
def packed_rows(packed, unit, tile, extent, S: tl.constexpr):
    tiles = (extent.query_length + S.TILE - 1) // S.TILE
    return packed + (tl.cast(unit, tl.int64) * tiles + tile) * (S.TILE * 4) + tl.arange(0, S.TILE) * 2


@triton.jit
def accumulate_query(state, context, key_tile, MASKED: tl.constexpr, S: tl.constexpr):
    queries, top, slope, reach, do, key, value, delta, exponent, extent, view = context
    x, steepness = relative_distance(queries, top, slope, key, key_tile, extent, view, MASKED, S)
    v = load_keys(value, key_tile, extent, MASKED, S.TILE, S.VALUE, S.VALUE_PADDED)
    change = tl.dot(do, tl.trans(v), input_precision=S.PRECISION) - delta[:, None]
    p, u = probability_and_weight(x, exponent, S.POWER, S.HARDWARE)
    ds = u * change
    k = load_keys(key, key_tile, extent, MASKED, S.TILE, S.HEAD, S.HEAD_PADDED)
    dq = tl.dot((ds * steepness).to(k.dtype), k, state[0], input_precision=S.PRECISION)
    if S.PARAMETERS:
        _, weights, weighted, shares, shared, of_slope = state
        logarithm = tl.where(x > 0, LN_2 * binary_logarithm(x, S.HARDWARE), 0.0)
        share = p * (1.0 - tl.log(reach)[:, None] - logarithm)
        if S.ALIBI:
            key_position = key_tile * S.TILE + tl.arange(0, S.TILE)
            far = tl.abs(queries.position[:, None] - key_position[None, :])
            of_slope -= tl.sum(ds * far.to(tl.float32), 1)
        result = (
            dq, weights + tl.sum(u, 1), weighted + tl.sum(ds, 1), shares + tl.sum(share, 1),
            shared + tl.sum(share * change, 1), of_slope,
        )  # fmt: skip
    else:
        result = (dq,)
    return result


@triton.jit(do_not_specialize=SIZES)
def gradient_key_value_kernel(
    query, key, value, grad_output, packed, live, lists, grad_key, grad_value, view,
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
        tiles = listed_tiles(places, capacity, live, query_unit, tile, words, extent, view, True, S)
        numbers = (
            of_head(scale, query_unit, extent, S),
            of_head(slope, query_unit, extent, S),
            of_head(exponent, query_unit, extent, S),
        )
        context = (
            k, v, query_head(query, query_unit, extent), query_head(grad_output, query_unit, extent),
            packed, query_unit, tile, numbers, bends_of(query_unit, extent, view, S), extent, view,
        )  # fmt: skip
        state = walk(accumulate_key_value, state, context, tiles, S)
    dk, dv = state
    if not S.PER_HEAD:
        dk *= scale
    store_tile(head_of(grad_key, batch, head), first, key_length, dk, TILE, S.HEAD, HEAD_PADDED)
    store_tile(head_of(grad_value, batch, head), first, key_length, dv, TILE, S.VALUE, VALUE_PADDED)


@triton.jit
def accumulate_key_value(state, context, query_tile, MASKED: tl.constexpr, S: tl.constexpr):
    """One tile of queries, transposed: keys are the rows here, so that P^T and dS^T come out ready to multiply."""
    k, v, query, grad_output, packed, unit, key_tile, numbers, bends, extent, view = context
    scale, slope, exponent = numbers
    dk, dv = state
    TILE: tl.constexpr = S.TILE
    first = query_tile * TILE
    q = load_tile(query, first, extent.query_length, TILE, S.HEAD, S.HEAD_PADDED)
    do = load_tile(grad_output, first, extent.query_length, TILE, S.VALUE, S.VALUE_PADDED)
    pairs = packed_rows(packed, unit, query_tile, extent, S)[:, None] + tl.arange(0, 2)[None, :]
    top, reach = tl.split(tl.load(pairs))

    product = tl.dot(k, tl.trans(q), input_precision=S.PRECISION)
    start, stop, position = visible_interval(first + tl.arange(0, TILE), unit, extent, view, S)
    first_key = key_tile * TILE
    sight = (start - first_key)[None, :], (stop - first_key)[None, :], (position - first_key)[None, :]
    row, column, where = tl.arange(0, TILE)[None, :], tl.arange(0, TILE)[:, None], (unit, query_tile, key_tile)
    score, steepness = finish(product, row, column, sight, bends, where, extent, view, MASKED, S)
    d = distance(score, top[None, :], slope, reach[None, :])
    p, u = probability_and_weight(d, exponent, S.POWER, S.HARDWARE)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=S.PRECISION)
    shift, _ = tl.split(tl.load(pairs + 2 * TILE))
    shifted = tl.broadcast_to(shift[None, :], (TILE, TILE))  # the product starts from -delta
    dp = tl.dot(v, tl.trans(do), shifted, input_precision=S.PRECISION)
    ds = u * dp * steepness
    if S.PER_HEAD:
        ds *= scale
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=S.PRECISION)
    return dk, dv

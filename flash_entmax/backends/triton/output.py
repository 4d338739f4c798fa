"""The output over the live tiles: O = sum p v, and for training O1 = sum u v / sum u; the support on request."""

import triton
import triton.language as tl

from .alpha import newton_step, probability, probability_and_weight, support_weight, tolerance
from .lists import listed_tiles
from .score import of_head, open_queries, relative_distance
from .tile import (
    SIZES,
    Extent,
    TileList,
    add_compensated,
    heaviest_first,
    key_head,
    list_of,
    load_keys,
    load_row,
    no_sums,
    query_head,
    store_row,
    store_tile,
    sum_keys,
    walk,
)

MAX_PASSES = tl.constexpr(40)


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    query, key, value, maximum, offset, lists, counts, output, value_mean, view, slope, exponent, heads, group,
    query_length, key_length, first_unit, units, first_tile, capacity, S: tl.constexpr,
):  # fmt: skip
    """O and O1. Where some row's F is still above what is accepted, the tile takes a step and another pass: rare."""
    TILE: tl.constexpr = S.TILE
    VALUE_PADDED: tl.constexpr = S.VALUE_PADDED
    extent = Extent(heads, group, query_length, key_length)
    unit, tile = heaviest_first(units, first_unit, first_tile)
    slope, exponent = of_head(slope, unit, extent, S), of_head(exponent, unit, extent, S)
    index, places = list_of(lists, unit, tile, units, first_unit, first_tile, capacity)
    tiles = TileList(places, tl.load(counts + 2 * index), tl.load(counts + 2 * index + 1))
    queries = open_queries(query, unit, tile, extent, view, S)
    top = load_row(maximum, unit, queries.row, extent, float("inf"))
    reach = load_row(offset, unit, queries.row, extent, 1.0)
    first = tile * TILE

    key, value = key_head(key, unit, extent), key_head(value, unit, extent)
    # Triton tells by identity what a loop carries: none of these names may start as another's value.
    total = tl.zeros((TILE, VALUE_PADDED), tl.float32)
    mean = tl.zeros((TILE, VALUE_PADDED), tl.float32)
    mass = tl.zeros((TILE,), tl.float32)
    weight = tl.zeros((TILE,), tl.float32)
    power = tl.zeros((TILE,), tl.float32)
    accepted = tolerance(exponent)
    passes = 0
    unfinished = 1
    while (unfinished > 0) & (passes < MAX_PASSES):
        context = queries, top, slope / reach, key, value, exponent, extent, view
        nothing = tl.zeros((TILE, VALUE_PADDED), tl.float32)
        state = nothing, nothing, nothing, no_sums(S), no_sums(S)
        total, _, mean, masses, weights = walk(accumulate, state, context, tiles, S)
        power = probability(reach, exponent, S.POWER)
        mass = tl.sum(masses[0], 1) * power
        weight = tl.sum(weights[0], 1)
        stepped = newton_step(reach, mass, weight * support_weight(reach, exponent, S.POWER), exponent)
        falls = (mass > 1.0) & (stepped < reach)
        unfinished = tl.max(tl.where(falls & (mass > 1.0 + accepted), 1, 0), 0)
        reach = tl.where(falls, stepped, reach)
        passes += 1
    store_row(offset, unit, queries.row, extent, reach)

    # p = offset^r x^r. Then the last step of tau, on the output itself: dO / d offset = r sum u v, so the step
    # (1 - sum p) / (r sum u) adds (1 - sum p) O1. Long crowded rows feel the last bit of the offset without it.
    mean /= tl.where(weight == 0, 1.0, weight)[:, None]
    total = total * power[:, None] + (1.0 - mass)[:, None] * mean
    store_tile(query_head(output, unit, extent), first, query_length, total, TILE, S.VALUE, VALUE_PADDED)
    store_tile(query_head(value_mean, unit, extent), first, query_length, mean, TILE, S.VALUE, VALUE_PADDED)


@triton.jit
def accumulate(state, context, key_tile, MASKED: tl.constexpr, S: tl.constexpr):
    queries, top, slope, key, value, exponent, extent, view = context
    total, error, mean, mass, weight = state
    x, _ = relative_distance(queries, top, slope, key, key_tile, extent, view, MASKED, S)
    v = load_keys(value, key_tile, extent, MASKED, S.TILE, S.VALUE, S.VALUE_PADDED)
    p, u = probability_and_weight(x, exponent, S.POWER, S.HARDWARE)
    if S.COMPENSATED:
        total, error = add_compensated(total, error, tl.dot(p.to(v.dtype), v, input_precision=S.PRECISION))
    else:
        total = tl.dot(p.to(v.dtype), v, total, input_precision=S.PRECISION)
    mean = tl.dot(u.to(v.dtype), v, mean, input_precision=S.PRECISION)
    return total, error, mean, sum_keys(mass, p, S), sum_keys(weight, u, S)


@triton.jit(do_not_specialize=SIZES)
def support_kernel(
    query, key, maximum, offset, live, lists, size, marks, view, slope, heads, group,
    query_length, key_length, first_unit, units, first_tile, words, capacity, S: tl.constexpr,
):  # fmt: skip
    """Support size of each row, and a mark on each tile that holds a positive probability."""
    TILE: tl.constexpr = S.TILE
    extent = Extent(heads, group, query_length, key_length)
    unit, tile = heaviest_first(units, first_unit, first_tile)
    slope = of_head(slope, unit, extent, S)
    _, places = list_of(lists, unit, tile, units, first_unit, first_tile, capacity)
    tiles = listed_tiles(places, capacity, live, unit, tile, words, extent, view, False, S)
    queries = open_queries(query, unit, tile, extent, view, S)
    top = load_row(maximum, unit, queries.row, extent, float("inf"))
    reach = load_row(offset, unit, queries.row, extent, 1.0)

    query_tiles = (query_length + TILE - 1) // TILE
    row_of_marks = marks + (tl.cast(unit, tl.int64) * query_tiles + tile) * tl.cdiv(key_length, TILE)
    context = queries, top, slope / reach, key_head(key, unit, extent), row_of_marks, extent, view
    count = walk(count_tile, tl.zeros((TILE,), tl.int32), context, tiles, S)
    store_row(size, unit, queries.row, extent, count)


@triton.jit
def count_tile(count, context, key_tile, MASKED: tl.constexpr, S: tl.constexpr):
    queries, top, slope, key, row_of_marks, extent, view = context
    x, _ = relative_distance(queries, top, slope, key, key_tile, extent, view, MASKED, S)
    reached = tl.sum(tl.where(x > 0, 1, 0), 1)
    tl.store(row_of_marks + key_tile, tl.max(reached, 0) > 0)
    return count + reached

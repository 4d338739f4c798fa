"""The output over the live tiles: O = sum p v, and for training O1 = sum u v / sum u; the support on request."""

import triton
import triton.language as tl

from .alpha import probability, support_weight
from .tile import (
    SIZES,
    Extent,
    add_compensated,
    key_head,
    load_tile,
    open_rows,
    query_head,
    relative_distance,
    store_row,
    store_tile,
    walk,
)


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    query, key, value, maximum, offset, lists, counts, output, value_mean, slope, exponent, heads, group,
    query_length, key_length, first_unit, units, first_tile, capacity, S: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = S.TILE
    VALUE_PADDED: tl.constexpr = S.VALUE_PADDED
    extent = Extent(heads, group, query_length, key_length)
    rows = open_rows(query, maximum, offset, lists, counts, extent, first_unit, units, first_tile, capacity, S)
    unit, first = rows.unit, rows.tile * TILE

    context = rows, slope / rows.reach, key_head(key, unit, extent), key_head(value, unit, extent), exponent, extent
    nothing = tl.zeros((TILE, VALUE_PADDED), tl.float32)
    zero = tl.zeros((TILE,), tl.float32)
    state = nothing, nothing, nothing, zero, zero, zero
    total, _, mean, mass, _, weight = walk(accumulate, state, context, rows.tiles, False, S)

    mean /= tl.where(weight == 0, 1.0, weight)[:, None]
    # p = offset^r x^r. Then one more step of tau, on the output itself: dO / d offset = r sum u v, so the step
    # (1 - sum p) / (r sum u) adds (1 - sum p) O1. Long crowded rows feel the last bit of the offset without it.
    power = probability(rows.reach, exponent, S.POWER)
    total = total * power[:, None] + (1.0 - mass * power)[:, None] * mean
    store_tile(query_head(output, unit, extent), first, query_length, total, TILE, S.VALUE, VALUE_PADDED)
    store_tile(query_head(value_mean, unit, extent), first, query_length, mean, TILE, S.VALUE, VALUE_PADDED)


@triton.jit
def accumulate(state, context, key_tile, MASKED: tl.constexpr, S: tl.constexpr):
    rows, slope, key, value, exponent, extent = context
    total, error, mean, mass, mass_error, weight = state
    x = relative_distance(rows, slope, key, extent, key_tile, MASKED, S)
    v = load_tile(value, key_tile * S.TILE, extent.key_length, S.TILE, S.VALUE, S.VALUE_PADDED)
    p = probability(x, exponent, S.POWER)
    u = support_weight(x, exponent, S.POWER)
    if S.COMPENSATED:
        total, error = add_compensated(total, error, tl.dot(p.to(v.dtype), v, input_precision=S.PRECISION))
    else:
        total = tl.dot(p.to(v.dtype), v, total, input_precision=S.PRECISION)
    mean = tl.dot(u.to(v.dtype), v, mean, input_precision=S.PRECISION)
    mass, mass_error = add_compensated(mass, mass_error, tl.sum(p, 1))
    return total, error, mean, mass, mass_error, weight + tl.sum(u, 1)


@triton.jit(do_not_specialize=SIZES)
def support_kernel(
    query, key, maximum, offset, lists, counts, size, marks, slope, heads, group,
    query_length, key_length, first_unit, units, first_tile, key_tiles, capacity, S: tl.constexpr,
):  # fmt: skip
    """Support size of each row, and a mark on each tile that holds a positive probability."""
    TILE: tl.constexpr = S.TILE
    extent = Extent(heads, group, query_length, key_length)
    rows = open_rows(query, maximum, offset, lists, counts, extent, first_unit, units, first_tile, capacity, S)

    query_tiles = (query_length + TILE - 1) // TILE
    row_of_marks = marks + (tl.cast(rows.unit, tl.int64) * query_tiles + rows.tile) * key_tiles
    context = rows, slope / rows.reach, key_head(key, rows.unit, extent), row_of_marks, extent
    count = walk(count_tile, tl.zeros((TILE,), tl.int32), context, rows.tiles, False, S)
    store_row(size, rows.unit, rows.row, extent, count)


@triton.jit
def count_tile(count, context, key_tile, MASKED: tl.constexpr, S: tl.constexpr):
    rows, slope, key, row_of_marks, extent = context
    x = relative_distance(rows, slope, key, extent, key_tile, MASKED, S)
    reached = tl.sum(tl.where(x > 0, 1, 0), 1)
    tl.store(row_of_marks + key_tile, tl.max(reached, 0) > 0)
    return count + reached

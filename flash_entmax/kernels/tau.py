"""The threshold: certify which tiles can hold support from the block maxima, then solve exactly on those tiles.

Both store the row's offset, tau = slope * maximum - offset in units of z, and mark the tiles that may hold support.
"""

import triton
import triton.language as tl

from .alpha import newton_step, probability, smallest_offset, step, support_weight
from .tile import (
    SIZES,
    WORD,
    Extent,
    add_compensated,
    distance,
    heaviest_first,
    key_head,
    load_row,
    maxima_column,
    open_rows,
    relative_distance,
    store_row,
    visible_tiles,
    walk,
)

CERTIFY_STEPS = tl.constexpr(3)
MAX_STEPS = tl.constexpr(40)
TOLERANCE = tl.constexpr(1e-6)


@triton.jit(do_not_specialize=SIZES)
def certify_kernel(
    maxima, maximum, slack, offset, live, slope, exponent, heads, group, query_length, key_length,
    first_unit, units, first_tile, rows, blocks, words, S: tl.constexpr,
):  # fmt: skip
    """An offset at or above the true one: maxima are a subset of the scores, and Newton's steps end above the root."""
    TILE: tl.constexpr = S.TILE
    extent = Extent(heads, group, query_length, key_length)
    unit, tile = heaviest_first(units, first_unit, first_tile)
    row = tile * TILE + tl.arange(0, TILE)
    top = load_row(maximum, unit, row, extent, float("inf"))
    noise, doubt = load_noise(slack, unit, row, extent)
    column = maxima_column(maxima, unit - first_unit, row - first_tile * TILE, blocks, rows)
    _, some = visible_tiles(tile, extent, S.CAUSAL, TILE, TILE)
    spans = tl.cdiv(some, WORD)
    # A step is rounded relative to the offset that it starts from: by 2^-24 for each span of maxima, added one after
    # the other, and by less than 2^-17 for the powers and the sums within a span.
    rounding = (spans + 64) * 2.0**-22

    reach = tl.full((TILE,), 1.0, tl.float32)
    for _ in range(CERTIFY_STEPS):
        total = tl.zeros((TILE,), tl.float32)
        weight = tl.zeros((TILE,), tl.float32)
        for word in range(spans):
            d = distance(load_maxima(column, word, some, rows, S), top[:, None], slope, reach[:, None])
            total += tl.sum(probability(d, exponent, S.POWER), 1)
            weight += tl.sum(support_weight(d, exponent, S.POWER), 1)
        stepped = newton_step(reach, total, weight, exponent) + rounding * reach
        reach = tl.where(stepped < reach, stepped, reach)
    reach += noise
    store_row(offset, unit, row, extent, reach)
    mark_tiles(column, top, reach + doubt, live, unit, tile, slope, some, rows, words, extent, S)


@triton.jit
def load_noise(slack, unit, row, extent):
    """(noise, doubt): how far rounding may move a z, cut off at 1; the same, but NaN where it is not below 1.

    A bound of 1 or more, or NaN (something in the head is not finite), certifies nothing: then every tile survives.
    """
    bound = load_row(slack, unit, row, extent, 0.0)
    return tl.minimum(bound, 1.0), tl.where(bound < 1.0, bound, float("nan"))


@triton.jit
def load_maxima(column, word, some, rows, S: tl.constexpr):
    """(TILE, 32): maxima over 32 tiles of keys; -inf past the last tile that some query sees."""
    block = tl.arange(0, WORD) + word * WORD
    return tl.load(
        column[:, None] + tl.cast(block, tl.int64)[None, :] * tl.multiple_of(rows, 32),
        mask=(block < some)[None, :],
        other=float("-inf"),
    )


@triton.jit
def mark_tiles(column, top, reach, live, unit, tile, slope, some, rows, words, extent, S: tl.constexpr):
    """Set the bit of every tile of keys of which some row has a maximum above its threshold. NaN sets it too."""
    tiles = (extent.query_length + S.TILE - 1) // S.TILE
    row_of_words = live + (tl.cast(unit, tl.int64) * tiles + tile) * words
    bit = tl.arange(0, WORD)
    for word in range(tl.cdiv(some, WORD)):
        score = load_maxima(column, word, some, rows, S)
        dead = (score - top[:, None]) * slope + reach[:, None] <= 0
        alive = tl.max(tl.where(dead, 0, 1), 0)
        alive = tl.where(bit + word * WORD < some, alive, 0)
        tl.store(row_of_words + word, tl.sum(alive << bit, 0))


@triton.jit(do_not_specialize=SIZES)
def solve_kernel(
    query, key, maxima, maximum, slack, offset, live, lists, counts, slope, exponent, heads, group, query_length,
    key_length, first_unit, units, first_tile, rows, blocks, words, capacity, S: tl.constexpr,
):  # fmt: skip
    """Safeguarded steps over the listed tiles until every row of the tile sums to 1, then a tighter map."""
    TILE: tl.constexpr = S.TILE
    extent = Extent(heads, group, query_length, key_length)
    listed = open_rows(query, maximum, offset, lists, counts, extent, first_unit, units, first_tile, capacity, S)
    unit, tile, limit, reach = listed.unit, listed.tile, listed.limit, listed.reach
    noise, doubt = load_noise(slack, unit, listed.row, extent)

    key = key_head(key, unit, extent)
    high = reach
    low = tl.maximum(smallest_offset(limit, exponent) - noise, 1e-30)
    zero = tl.zeros((TILE,), tl.float32)
    passes = 0
    unfinished = listed.tiles.count
    while (unfinished > 0) & (passes < MAX_STEPS):
        context = listed, slope / reach, key, exponent, extent
        total, _, weight, count = walk(accumulate, (zero, zero, zero, zero), context, listed.tiles, False, S)
        total = total * probability(reach, exponent, S.POWER)
        weight = weight * support_weight(reach, exponent, S.POWER)
        pending = (limit > 0) & (tl.abs(total - 1.0) > TOLERANCE)
        low = tl.where(total < 1.0, reach, low)
        high = tl.where(total < 1.0, high, reach)
        stepped = step(reach, total, weight, count, exponent, S.POWER)
        # The ends were tried already: a step back to one could go on for ever between two neighbouring numbers.
        inside = (stepped > low) & (stepped < high) | (stepped == reach)
        stepped = tl.where(inside, stepped, 0.5 * (low + high))
        stepped = tl.where(pending, stepped, reach)
        unfinished = tl.max(tl.where(pending & (stepped != reach), 1, 0), 0)
        reach = stepped
        passes += 1
    store_row(offset, unit, listed.row, extent, tl.where(limit > 0, reach, 1.0))

    column = maxima_column(maxima, unit - first_unit, listed.row - first_tile * TILE, blocks, rows)
    _, some = visible_tiles(tile, extent, S.CAUSAL, TILE, TILE)
    # 2^-20 covers the rounding of slope / offset in the relative distances that the output sees.
    mark_tiles(
        column, listed.top, reach * (1.0 + 2.0**-20) + doubt, live, unit, tile, slope, some, rows, words, extent, S
    )


@triton.jit
def accumulate(state, context, key_tile, MASKED: tl.constexpr, S: tl.constexpr):
    """Add one tile to F (with the rounding error that the additions left), sum u and the support size of each row."""
    rows, slope, key, exponent, extent = context
    total, error, weight, count = state
    x = relative_distance(rows, slope, key, extent, key_tile, MASKED, S)
    total, error = add_compensated(total, error, tl.sum(probability(x, exponent, S.POWER), 1))
    weight += tl.sum(support_weight(x, exponent, S.POWER), 1)
    if S.POWER == 2:
        count += tl.sum(tl.where(x > 0, 1.0, 0.0), 1)
    return total, error, weight, count

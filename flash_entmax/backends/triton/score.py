"""Words for scores: query . key of a tile, bent by softcap and ALiBi, masked; and its distance to the threshold.

Scores are in units of query . key: `slope` turns them into z. Softcap and ALiBi are divided by the scale to match.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .tile import load_columns, load_keys, load_tile, load_whole_tile, query_head, tile_pointers
from .visibility import hide, hide_filtered, visible_interval


class Queries(NamedTuple):
    """A tile of queries: where it is, which keys each query sees, and how its scores are bent."""

    unit: int
    tile: int
    row: Tensor
    start: Tensor
    stop: Tensor
    position: Tensor
    cap: float
    tilt: float
    q: Tensor


@triton.jit
def open_queries(query, unit, tile, extent, view, S: tl.constexpr):
    row = tile * S.TILE + tl.arange(0, S.TILE)
    start, stop, position = visible_interval(row, unit, extent, view, S)
    cap, tilt = bends_of(unit, extent, view, S)
    q = load_tile(query_head(query, unit, extent), tile * S.TILE, extent.query_length, S.TILE, S.HEAD, S.HEAD_PADDED)
    return Queries(unit, tile, row, start, stop, position, cap, tilt, q)


@triton.jit
def bends_of(unit, extent, view, S: tl.constexpr):
    """(cap, tilt) of a query head; 0 where there is none."""
    cap, tilt = 0.0, 0.0
    if S.SOFTCAP:
        cap = of_head(view.cap, unit, extent, S)
    if S.ALIBI:
        tilt = tl.load(view.tilts + unit)
    return cap, tilt


@triton.jit
def of_head(number, unit, extent, S: tl.constexpr):
    """A number of the call, or of the query head."""
    if S.PER_HEAD:
        number = tl.load(number + unit % extent.heads)
    return number


@triton.jit
def tanh(x, ACCURATE: tl.constexpr):
    """Off by at most 2^-21; if ACCURATE, of itself: by its series near 0, where the quotient cancels."""
    result = 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * x) + 1.0)  # e^(2 x)
    if ACCURATE:
        square = x * x
        series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        result = tl.where(square < 0.0625, x * series, result)
    return result


@triton.jit
def capped(score, cap, S: tl.constexpr):
    """(cap tanh(score / cap), its derivative), or the score itself."""
    steepness = 1.0
    if S.SOFTCAP:
        share = tanh(score * (1.0 / cap), S.COMPENSATED)
        score = share * cap
        steepness = 1.0 - share * share
    return score, steepness


@triton.jit
def lean(distance, tilt):
    """What ALiBi takes from a score: nothing at distance 0, be the slope infinite."""
    return tl.where(distance == 0, 0.0, tilt * distance.to(tl.float32))


@triton.jit
def finish(score, row, key, sight, bends, where, extent, view, MASKED: tl.constexpr, S: tl.constexpr):
    """(scores, derivative by the product) from a product of queries and keys, or of keys and queries.

    `row` and `key` count inside the tile and `sight` is (start, stop, position) of the queries, counted from the first
    key; all broadcast to the shape of the product. `bends` is (cap, tilt) and `where` (unit, query tile, key tile).
    """
    start, stop, position = sight
    cap, tilt = bends
    score, steepness = capped(score, cap, S)
    if S.ALIBI:
        score -= lean(tl.abs(position - key), tilt)
    if MASKED:
        score = hide(score, key, start, stop, S)
        if S.FILTERED:
            unit, query_tile, key_tile = where
            score = hide_filtered(score, row, key, unit, query_tile, key_tile, extent, view, S)
    return score, steepness


@triton.jit
def scores(queries, key, key_tile, extent, view, MASKED: tl.constexpr, S: tl.constexpr):
    """(scores of one tile of keys, derivative by query . key); -inf where a query does not see the key."""
    TILE: tl.constexpr = S.TILE
    k = load_keys(key, key_tile, extent, MASKED, TILE, S.HEAD, S.HEAD_PADDED)
    product = tl.dot(queries.q, tl.trans(k), input_precision=S.PRECISION)
    row, column, first = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :], key_tile * TILE
    sight = (queries.start - first)[:, None], (queries.stop - first)[:, None], (queries.position - first)[:, None]
    bends, where = (queries.cap, queries.tilt), (queries.unit, queries.tile, key_tile)
    return finish(product, row, column, sight, bends, where, extent, view, MASKED, S)


@triton.jit
def listed_scores(queries, key, tiles, place, extent, view, S: tl.constexpr):
    """Scores of S.ABREAST listed tiles without a mask."""
    if S.ALIBI:
        score, _ = scores(queries, key, tl.load(tiles.tiles + place), extent, view, False, S)
    else:
        score, _ = capped(listed_products(queries, key, tiles, place, S), queries.cap, S)
    return score


@triton.jit
def listed_maxima(queries, key, tiles, place, extent, view, S: tl.constexpr):
    """(TILE, S.ABREAST): each row's maximum over each of these tiles. As tanh rises, it is taken of maxima only."""
    if S.ALIBI:
        highest = tl.max(listed_scores(queries, key, tiles, place, extent, view, S), 1, keep_dims=True)
    else:
        product = tl.reshape(listed_products(queries, key, tiles, place, S), (S.TILE, S.ABREAST, S.TILE))
        highest, _ = capped(tl.max(product, 2), queries.cap, S)
    return highest


@triton.jit
def listed_products(queries, key, tiles, place, S: tl.constexpr):
    """query . key of S.ABREAST listed tiles: two share the loop's overhead and make wider products."""
    TILE: tl.constexpr = S.TILE
    first = tl.load(tiles.tiles + place)
    if S.ABREAST == 2:
        row = tl.arange(0, 2 * TILE)
        apart = tl.cast(tl.load(tiles.tiles + place + 1) - first - 1, tl.int64) * TILE * key.row_stride
        second = tl.where(row < TILE, 0, apart)[:, None]
        k = load_columns(tile_pointers(key, first * TILE, 2 * TILE, S.HEAD_PADDED) + second, S.HEAD, S.HEAD_PADDED)
    else:
        k = load_whole_tile(key, first * TILE, TILE, S.HEAD, S.HEAD_PADDED)
    return tl.dot(queries.q, tl.trans(k), input_precision=S.PRECISION)


@triton.jit
def distance(score, maximum, slope, intercept):
    """d = [slope (score - maximum) + intercept]_+; NaN stays NaN.

    With (slope, offset) it is [z - tau]_+ itself; with (slope / offset, 1) it is relative to the offset, so that its
    powers neither underflow nor overflow in 16 bits. The subtraction comes first: it is exact where it matters.
    """
    return tl.maximum((score - maximum) * slope + intercept, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relative_distance(queries, top, slope, key, key_tile, extent, view, MASKED: tl.constexpr, S: tl.constexpr):
    """x = [z - tau]_+ / offset of one tile of queries and keys, from the row's slope / offset; and the derivative of
    the score by query . key."""
    score, steepness = scores(queries, key, key_tile, extent, view, MASKED, S)
    return distance(score, top[:, None], slope[:, None], 1.0), steepness

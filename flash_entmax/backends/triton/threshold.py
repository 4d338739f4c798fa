"""The threshold of each row, and the tiles that hold support: bound, scan, certify, solve, one after the other.

One program takes one tile of queries through all four. The row's offset, tau = slope * maximum - offset in units of z,
is at or above the true one whenever the list of tiles gets shorter, so that each list holds all support, and a sublist
of the solve all that of the rows that it is for.
"""

import triton
import triton.language as tl

from .alpha import is_settled, newton_step, probability, probability_and_weight, support_weight
from .bound import bound_tiles
from .certify import PLACES, certify_offset, shorten, tiles_within
from .scan import scan_tiles
from .score import distance, listed_scores, of_head, open_queries, scores
from .tile import SIZES, WORD, Extent, TileList, heaviest_first, key_head, list_of, no_sums, store_row, sum_keys

MAX_STEPS = tl.constexpr(40)
# 2^-20 of the offset covers the rounding of slope / offset in relative distances, 2^-21 what the processor's logarithm
# may be off by; the solve's plain sums are covered by what the rounding of a stored maximum has to spare.
SAFETY = tl.constexpr(1.0 + 2.0**-18)


@triton.jit(do_not_specialize=SIZES)
def threshold_kernel(
    query, key, centre, radius, error, largest, maxima, maximum, offset, live, lists, sublists, counts, view, slope,
    exponent, heads, group, query_length, key_length, first_unit, units, first_tile, words, capacity, S: tl.constexpr,
):  # fmt: skip
    """Stores each row's `maximum` (of the scores; +inf where no key is visible) and `offset`, the list of tiles that
    may hold support, and their bits in `live`."""
    TILE: tl.constexpr = S.TILE
    extent = Extent(heads, group, query_length, key_length)
    unit, tile = heaviest_first(units, first_unit, first_tile)
    slope, exponent = of_head(slope, unit, extent, S), of_head(exponent, unit, extent, S)
    queries = open_queries(query, unit, tile, extent, view, S)
    index, places = list_of(lists, unit, tile, units, first_unit, first_tile, capacity)
    column = maxima + tl.cast(index, tl.int64) * capacity * TILE + tl.arange(0, TILE)

    summary = centre, radius, error, largest
    tiles, below, noise = bound_tiles(places, capacity, queries, summary, slope, extent, view, S)

    key = key_head(key, unit, extent)
    top, shift, stored = scan_tiles(queries, key, below, tiles, column, slope, extent, view, S)
    tl.debug_barrier()  # the maxima are there for all

    # A slack of 1 or more, or NaN (something in the head is not finite), certifies nothing: the offset stays at 1, its
    # largest value, and every tile survives.
    slack = noise + stored
    doubt = tl.where(slack < 1.0, slack, float("nan"))
    reach = tl.where(slack < 1.0, certify_offset(column, tiles.count, shift, exponent, S) + slack, 1.0)
    margin = shift + doubt
    tiles = shorten(tiles, column, margin + reach, S)

    sublist = sublists + tl.cast(index, tl.int64) * capacity
    reach = solve(queries, top, reach, tiles, (column, margin), sublist, key, slope, exponent, extent, view, S)
    tiles = shorten(tiles, column, margin + reach * SAFETY, S)

    store_row(maximum, unit, queries.row, extent, top)
    store_row(offset, unit, queries.row, extent, tl.where(top < float("inf"), reach, 1.0))
    tl.store(counts + 2 * index, tiles.split)
    tl.store(counts + 2 * index + 1, tiles.count)
    query_tiles = (query_length + TILE - 1) // TILE
    mark_tiles(tiles, live + (tl.cast(unit, tl.int64) * query_tiles + tile) * words, words)


@triton.jit
def solve(queries, top, reach, tiles, maxima, sublist, key, slope, exponent, extent, view, S: tl.constexpr):
    """Newton's steps until the last one has settled every row of the tile: the first over all listed tiles, each
    further one over those within reach of the rows that are not settled yet.

    Each step ends at or above the true offset, so any of them may be the last.
    """
    column, margin = maxima
    places, split, count = tiles.tiles, tiles.split, tiles.count
    # The offset of the pass before, and its sum u: before the first, nothing is known of how sum u falls. Triton 3.6
    # finds what a loop carries by place, and loses count after a name that only the condition reads: that one is last.
    before = reach + 1.0
    heavier = tl.full((S.TILE,), float("inf"), tl.float32)
    rest = tl.full((S.TILE,), 1, tl.int32)  # rows that are not settled
    passes = 0
    unfinished = tiles.count
    while (unfinished > 0) & (passes < MAX_STEPS):
        relative = slope / reach
        context = top, relative, 1.0 - top * relative, exponent
        total, weight = no_sums(S), no_sums(S)
        unmasked = split // S.ABREAST * S.ABREAST
        listed = TileList(places, split, count)
        for place in range(0, unmasked, S.ABREAST):
            score = listed_scores(queries, key, listed, place, extent, view, S)
            total, weight = accumulate(total, weight, score, context, S)
        for place in range(unmasked, count):
            score, _ = scores(queries, key, tl.load(places + place), extent, view, True, S)
            total, weight = accumulate(total, weight, score, context, S)
        total = tl.sum(total[0], 1) * probability(reach, exponent, S.POWER)
        weight = tl.sum(weight[0], 1) * support_weight(reach, exponent, S.POWER)
        stepped = newton_step(reach, total, weight, exponent)
        falls = (rest > 0) & (total > 1.0) & (stepped < reach)
        settled = is_settled(total, weight, (heavier - weight) / (before - reach), exponent, S.SETTLED)
        before = tl.where(falls, reach, before)
        heavier = tl.where(falls, weight, heavier)
        reach = tl.where(falls, stepped, reach)
        rest = tl.where(falls & ~settled, 1, 0)
        passes += 1
        unfinished = tl.max(rest, 0)
        if unfinished > 0:
            within = tl.where(rest > 0, margin + reach * SAFETY, float("-inf"))
            shorter = tiles_within(sublist, tiles, column, within, S)
            places, split, count = sublist, shorter.split, shorter.count
    if not S.COMPENSATED:  # what the multiply-add may have lost
        lost = tl.where(top < float("inf"), tl.abs(top * slope) * 2.0**-22, 0.0)
        reach = tl.minimum(reach + lost, 1.0)
    return reach


@triton.jit
def accumulate(total, weight, score, context, S: tl.constexpr):
    """Add scores to F and to sum u of each row, both relative to the offset.

    In 16-bit types one multiply-add gives the distance, off by at most 2^-23 of the largest z.
    """
    top, slope, intercept, exponent = context
    if S.COMPENSATED:
        x = distance(score, top[:, None], slope[:, None], 1.0)
    else:
        x = tl.maximum(score * slope[:, None] + intercept[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
    p, u = probability_and_weight(x, exponent, S.POWER, S.HARDWARE)
    return sum_keys(total, p, S), sum_keys(weight, u, S)


@triton.jit
def mark_tiles(tiles, row_of_words, words):
    """Write the row's words of the map: the bits of the listed tiles, and no others."""
    for first in range(0, words, PLACES):
        word = first + tl.arange(0, PLACES)
        tl.store(row_of_words + word, tl.zeros((PLACES,), tl.int32), mask=word < words)
    tl.debug_barrier()
    for first in range(0, tiles.count, PLACES):
        place = first + tl.arange(0, PLACES)
        tile = tl.load(tiles.tiles + place, mask=place < tiles.count, other=0)
        bit = tl.full((PLACES,), 1, tl.int32) << (tile % WORD)
        tl.atomic_or(row_of_words + tile // WORD, bit, mask=place < tiles.count, sem="relaxed")

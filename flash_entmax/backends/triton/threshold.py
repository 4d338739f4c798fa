"""The threshold of each row, and the tiles that hold support: bound, scan, certify, solve, one after the other.

One program takes one tile of queries through all four. tau = z_scale * maximum - offset, in units of z. Whenever a list
gets shorter, the offset is at or above the true one. So every list holds all support, and a sublist of the solve holds
all support of the rows that it is for.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .alpha import is_settled, newton_step
from .bound import bound_tiles
from .certify import PLACES, certify_offset, shorten, sublist
from .lists import TileList, list_place
from .queries import Threshold, open_options, open_queries
from .scan import scan_tiles
from .sums import sums_at
from .tile import UNSPECIALIZED, WORD, Sizes, heaviest_first, key_head, query_head, store_row

MAX_STEPS = tl.constexpr(40)
# Of the offset: 2^-20 for the rounding of z_scale / offset in relative distances, 2^-21 for the processor's logarithm.
# What the solve's plain sums lose is within what the storage error of a maximum has to spare.
SAFETY = tl.constexpr(1.0 + 2.0**-18)


class StoredMaxima(NamedTuple):
    """Pointers to each row's stored maxima, by place in the list; what must be added to an offset to compare them with
    it; and places for a sublist."""

    column: Tensor
    margin: Tensor
    spare_places: Tensor


@triton.jit(do_not_specialize=UNSPECIALIZED)
def threshold_kernel(
    query, key, summary, maxima, maximum, offset, live, lists, sublists, counts, score_options, visibility, heads,
    group, query_length, key_length, first_unit, units, first_tile, words, capacity, C: tl.constexpr,
):  # fmt: skip
    """Stores each row's `maximum` (of the scores; +inf where no key is visible) and `offset`, the list of the tiles
    that may hold support, and their bits in `live`."""
    TILE: tl.constexpr = C.TILE
    sizes = Sizes(heads, group, query_length, key_length)
    unit, tile = heaviest_first(units, first_unit, first_tile)
    options = open_options(score_options, unit, sizes, C)
    queries = open_queries(query_head(query, unit, sizes), unit, tile, options, sizes, visibility, C)
    index, places = list_place(lists, unit, tile, units, first_unit, first_tile, capacity)
    column = maxima + tl.cast(index, tl.int64) * capacity * TILE + tl.arange(0, TILE)

    tiles, maximum_bound, score_error = bound_tiles(places, capacity, queries, summary, C)

    key = key_head(key, unit, sizes)
    row_maximum, bound_gap, storage_error = scan_tiles(queries, key, maximum_bound, tiles, column, C)
    tl.debug_barrier()  # the maxima are there for all

    # An allowance of 1 or more, or NaN (a number of the head is not finite), certifies nothing: the offset stays at 1,
    # its largest value, and every tile survives.
    allowance = score_error + storage_error
    allowance_or_nan = tl.where(allowance < 1.0, allowance, float("nan"))
    certified = certify_offset(column, tiles.count, bound_gap, options.exponent, C) + allowance
    row_offset = tl.where(allowance < 1.0, certified, 1.0)
    margin = bound_gap + allowance_or_nan
    tiles = shorten(tiles, column, margin + row_offset, C)

    stored = StoredMaxima(column, margin, sublists + tl.cast(index, tl.int64) * capacity)
    row_offset = solve(queries, row_maximum, row_offset, tiles, stored, key, C)
    tiles = shorten(tiles, column, margin + row_offset * SAFETY, C)

    store_row(maximum, unit, queries.row, sizes, row_maximum)
    store_row(offset, unit, queries.row, sizes, tl.where(row_maximum < float("inf"), row_offset, 1.0))
    tl.store(counts + 2 * index, tiles.split)
    tl.store(counts + 2 * index + 1, tiles.count)
    if C.NEEDS_BACKWARD:
        query_tiles = (query_length + TILE - 1) // TILE
        mark_tiles(tiles, live + (tl.cast(unit, tl.int64) * query_tiles + tile) * words, words)


@triton.jit
def solve(queries, maximum, offset, tiles, stored, key, C: tl.constexpr):
    """Newton's steps until the last one has settled every row of the tile.

    The first step is over all listed tiles. Each further one is over the tiles that hold support of rows that are not
    settled. A step ends at or above the true offset, so any of them may be the last.
    """
    z_scale, exponent = queries.options.z_scale, queries.options.exponent
    places, split, count = tiles.tiles, tiles.split, tiles.count
    # The offset of the pass before, and its sum u: before the first pass, nothing is known of how sum u falls.
    # Triton 3.6 finds what a loop carries by place, and miscounts after a name that only the condition reads: that
    # name comes last.
    last_offset = offset + 1.0
    last_weight = tl.full((C.TILE,), float("inf"), tl.float32)
    unsettled = tl.full((C.TILE,), 1, tl.int32)
    passes = 0
    unfinished = tiles.count
    while (unfinished > 0) & (passes < MAX_STEPS):
        threshold = Threshold(maximum, offset, z_scale / offset)
        total, weight = sums_at(queries, threshold, TileList(places, split, count), key, C)
        stepped = newton_step(offset, total, weight, exponent)
        falls = (unsettled > 0) & (total > 1.0) & (stepped < offset)
        weight_fall_rate = (last_weight - weight) / (last_offset - offset)
        settled = is_settled(total, weight, weight_fall_rate, exponent, C.SETTLE_TOLERANCE)
        last_offset = tl.where(falls, offset, last_offset)
        last_weight = tl.where(falls, weight, last_weight)
        offset = tl.where(falls, stepped, offset)
        unsettled = tl.where(falls & ~settled, 1, 0)
        passes += 1
        unfinished = tl.max(unsettled, 0)
        if unfinished > 0:
            depth = tl.where(unsettled > 0, stored.margin + offset * SAFETY, float("-inf"))
            shorter = sublist(stored.spare_places, tiles, stored.column, depth, C)
            places, split, count = stored.spare_places, shorter.split, shorter.count
    if not C.COMPENSATED:  # what the multiply-add may have lost
        lost = tl.where(maximum < float("inf"), tl.abs(maximum * z_scale) * 2.0**-22, 0.0)
        offset = tl.minimum(offset + lost, 1.0)
    return offset


@triton.jit
def mark_tiles(tiles, row_words, words):
    """Write a row of words of the map: the bits of the listed tiles, and no others."""
    for first in range(0, words, PLACES):
        word = first + tl.arange(0, PLACES)
        tl.store(row_words + word, tl.zeros((PLACES,), tl.int32), mask=word < words)
    tl.debug_barrier()
    for first in range(0, tiles.count, PLACES):
        place = first + tl.arange(0, PLACES)
        tile = tl.load(tiles.tiles + place, mask=place < tiles.count, other=0)
        bit = tl.full((PLACES,), 1, tl.int32) << (tile % WORD)
        tl.atomic_or(row_words + tile // WORD, bit, mask=place < tiles.count, sem="relaxed")

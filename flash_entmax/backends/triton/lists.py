"""Compact lists of live tiles: appended to by the stages, and made again from the packed map."""

import triton
import triton.language as tl

from .tile import WORD, TileList
from .visibility import are_whole, bounds_of, seen_tiles

SPAN = tl.constexpr(128)


@triton.jit
def append(places, count, tile, alive):
    """Append the tiles that are alive; how many there are then."""
    tl.store(places + count + tl.cumsum(alive, 0) - 1, tile, mask=alive > 0)
    return count + tl.sum(alive, 0)


@triton.jit
def append_tiles(places, capacity, counts, tile, alive, whole):
    """Append the tiles that are alive, those without a mask from the front and the others from the back."""
    front, back = counts
    unmasked = tl.where(whole, alive, 0)
    masked = alive - unmasked
    tl.store(places + capacity - back - tl.cumsum(masked, 0), tile, mask=masked > 0)
    return append(places, front, tile, unmasked), back + tl.sum(masked, 0)


@triton.jit
def close_list(places, capacity, counts):
    """The list, with the tiles from the back moved next to the others; it is there for all threads."""
    front, back = counts
    tl.debug_barrier()
    for first in range(0, back, SPAN):
        place = first + tl.arange(0, SPAN)
        tile = tl.load(places + capacity - back + place, mask=place < back)
        tl.debug_barrier()  # places may overlap: never those that are still to be read
        tl.store(places + front + place, tile, mask=place < back)
    tl.debug_barrier()
    return TileList(places, front, front + back)


@triton.jit
def listed_tiles(
    places, capacity, live, unit, tile, words, extent, view, TRANSPOSED: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """The list of live tiles: of keys for a tile of queries, or (TRANSPOSED) of queries for a tile of keys."""
    query_tiles = (extent.query_length + S.TILE - 1) // S.TILE
    words_of_unit = live + tl.cast(unit, tl.int64) * query_tiles * words
    if TRANSPOSED:
        begin, end = 0, query_tiles
    else:
        begin, end = seen_tiles(unit, tile, extent, view, S)
    tl.debug_barrier()  # all are done with what was listed in these places before
    front = 0
    back = 0
    for first in range(begin, end, SPAN):
        candidate = first + tl.arange(0, SPAN)
        valid = candidate < end
        if TRANSPOSED:
            row, column = candidate, tile
            if S.INTERVALS:  # words far apart are read only where there may be a bit
                bounds = bounds_of(unit, row, extent, view, S)
                valid = valid & (tl.load(bounds) <= tile) & (tile < tl.load(bounds + 1))
        else:
            row, column = tile, candidate
        word = tl.load(words_of_unit + tl.cast(row, tl.int64) * words + column // WORD, mask=valid, other=0)
        whole = are_whole(unit, row, column, extent, view, S)
        counts = append_tiles(places, capacity, (front, back), candidate, (word >> (column % WORD)) & 1, whole)
        front, back = counts
    return close_list(places, capacity, (front, back))

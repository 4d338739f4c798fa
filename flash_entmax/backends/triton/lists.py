"""Compact lists of live tiles: the stages append to them, the gradient makes them again from the packed map.

Tiles that need no mask stand at the front of a list, the others behind them.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .tile import WORD
from .visibility import HIDDEN, are_whole, bounds_of, kinds_of, seen_tiles

SPAN = tl.constexpr(128)


class TileList(NamedTuple):
    """Numbers of tiles. The first `split` need no mask, the others up to `count` do."""

    tiles: Tensor
    split: int
    count: int


@triton.jit
def list_place(lists, unit, tile, units, first_unit, first_tile, capacity):
    """(index, places): the index of a tile's list among those of its chunk, and the list's first place."""
    index = (unit - first_unit) * (tl.num_programs(0) // units) + tile - first_tile
    return index, lists + tl.cast(index, tl.int64) * capacity


@triton.jit
def walk(body: tl.constexpr, state, context, tiles, C: tl.constexpr):
    """Fold `body` over a list of tiles. Only the tiles that need a mask get one."""
    for n in range(tiles.split):
        state = body(state, context, tl.load(tiles.tiles + n), False, C)
    for n in range(tiles.split, tiles.count):
        state = body(state, context, tl.load(tiles.tiles + n), True, C)
    return state


@triton.jit
def append(places, count, tile, alive):
    """Append the tiles that are alive. Returns the new number of tiles."""
    tl.store(places + count + tl.cumsum(alive, 0) - 1, tile, mask=alive > 0)
    return count + tl.sum(alive, 0)


@triton.jit
def append_tiles(places, capacity, counts, tile, alive, whole):
    """Append the tiles that are alive: those without a mask from the front, the others from the back."""
    front, back = counts
    unmasked = tl.where(whole, alive, 0)
    masked = alive - unmasked
    tl.store(places + capacity - back - tl.cumsum(masked, 0), tile, mask=masked > 0)
    return append(places, front, tile, unmasked), back + tl.sum(masked, 0)


@triton.jit
def close_list(places, capacity, counts):
    """The list, after the tiles from the back have moved next to the others. All threads see it."""
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
    places, capacity, live, unit, tile, words, sizes, visibility, TRANSPOSED: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """The list of live tiles: of keys for a tile of queries, or (TRANSPOSED) of queries for a tile of keys.

    Without a map of live tiles, all that are seen are listed.
    """
    query_tiles = (sizes.query_length + C.TILE - 1) // C.TILE
    if live is not None:
        unit_words = live + tl.cast(unit, tl.int64) * query_tiles * words
    if TRANSPOSED:
        begin, end = 0, query_tiles
    else:
        begin, end = seen_tiles(unit, tile, sizes, visibility, C)
    tl.debug_barrier()  # all are done with what was listed in these places before
    front = 0
    back = 0
    for first in range(begin, end, SPAN):
        candidate = first + tl.arange(0, SPAN)
        valid = candidate < end
        if TRANSPOSED:
            row, column = candidate, tile
            if C.INTERVALS:  # words far apart are read only where there may be a bit
                bounds = bounds_of(unit, row, sizes, visibility, C)
                valid = valid & (tl.load(bounds) <= tile) & (tile < tl.load(bounds + 1))
        else:
            row, column = tile, candidate
        if live is None:
            if C.FILTERED:
                valid = valid & (kinds_of(unit, row, column, sizes, visibility, C) != HIDDEN)
            alive = tl.where(valid, 1, 0)
        else:
            word = tl.load(unit_words + tl.cast(row, tl.int64) * words + column // WORD, mask=valid, other=0)
            alive = (word >> (column % WORD)) & 1
        whole = are_whole(unit, row, column, sizes, visibility, C)
        counts = append_tiles(places, capacity, (front, back), candidate, alive, whole)
        front, back = counts
    return close_list(places, capacity, (front, back))

"""Compact lists of what a tile is multiplied with: whole tiles, and single rows that are gathered from other tiles.

Tiles that need no mask stand at the front of a list of tiles, the others behind them. Single rows come from tiles that
need no mask. All are rows of keys for a tile of queries, and rows of queries for a tile of keys.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .tile import WORD, launch_index, open_rows, open_tile
from .visibility import HIDDEN, are_whole, kinds_of, seen_tiles

SPAN = tl.constexpr(128)
COUNTS = tl.constexpr(4)  # of a list: of a TileList, and of its blocks of single keys, and one that is unused


class TileList(NamedTuple):
    """Numbers of tiles. The first `split` need no mask, the others up to `count` do.

    In the list that the solve starts from, a tile whose keys are listed one by one stands as ~tile.
    """

    tiles: Tensor
    split: int
    count: int


class BlockList(NamedTuple):
    """Whole tiles, and the numbers of single rows: so many blocks of as many rows as a tile has."""

    whole: TileList
    rows: Tensor
    row_blocks: int


@triton.jit
def list_place(lists, unit, tile, units, first_unit, first_tile, capacity):
    """(index, places): the index of a tile's list among those of its chunk, and the list's first place."""
    index = launch_index(unit, tile, units, first_unit, first_tile)
    return index, lists + tl.cast(index, tl.int64) * capacity


@triton.jit
def load_tile_list(places, counts, index):
    """The list at some places, whose numbers `store_counts` has written."""
    return TileList(places, tl.load(counts + COUNTS * index), tl.load(counts + COUNTS * index + 1))


@triton.jit
def store_counts(counts, index, tiles):
    tl.store(counts + COUNTS * index, tiles.split)
    tl.store(counts + COUNTS * index + 1, tiles.count)


@triton.jit
def row_block_count(counts, index):
    """Pointer to the number of blocks of single keys."""
    return counts + COUNTS * index + 2


@triton.jit
def walk(body: tl.constexpr, state, context, blocks, C: tl.constexpr):
    """Fold `body` over a list of blocks. Only the tiles that need a mask get one."""
    tiles, rows = blocks.whole, blocks.rows
    for n in range(tiles.split):
        state = body(state, context, open_tile(tl.load(tiles.tiles + n), C), False, C)
    for n in range(blocks.row_blocks):
        state = body(state, context, open_rows(rows + n * C.TILE, C), False, C)
    for n in range(tiles.split, tiles.count):
        state = body(state, context, open_tile(tl.load(tiles.tiles + n), C), True, C)
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
def listed_tiles(places, capacity, words, unit, tile, sizes, visibility, C: tl.constexpr):
    """The list of the tiles of keys whose bits are set in `words`, or without words, of all that some query sees."""
    begin, end = seen_tiles(unit, tile, sizes, visibility, C)
    front = 0
    back = 0
    for first in range(begin, end, SPAN):
        candidate = first + tl.arange(0, SPAN)
        valid = candidate < end
        if words is None:
            if C.FILTERED:
                valid = valid & (kinds_of(unit, tile, candidate, sizes, visibility, C) != HIDDEN)
            alive = tl.where(valid, 1, 0)
        else:
            word = tl.load(words + candidate // WORD, mask=valid, other=0)
            alive = (word >> (candidate % WORD)) & 1
        whole = are_whole(unit, tile, candidate, sizes, visibility, C)
        counts = append_tiles(places, capacity, (front, back), candidate, alive, whole)
        front, back = counts
    return close_list(places, capacity, (front, back))


@triton.jit
def copy_list(places, tiles):
    """Write the same list to other places."""
    for first in range(0, tiles.count, SPAN):
        place = first + tl.arange(0, SPAN)
        tile = tl.load(tiles.tiles + place, mask=place < tiles.count, other=0)
        tl.store(places + place, tile, mask=place < tiles.count)

"""Compact lists of live tiles: appended to by the stages, and made again from the packed map."""

import triton
import triton.language as tl

from .tile import WORD, TileList, visible_tiles

SPAN = tl.constexpr(128)


@triton.jit
def append_tiles(places, count, split, tile, alive, full):
    """Append the tiles that are alive; (count, split) of the longer list, split at the first tile from `full` on."""
    tl.store(places + count + tl.cumsum(alive, 0) - 1, tile, mask=alive > 0)
    return count + tl.sum(alive, 0), split + tl.sum(tl.where(tile < full, alive, 0), 0)


@triton.jit
def listed_tiles(places, live, unit, tile, words, extent, TRANSPOSED: tl.constexpr, S: tl.constexpr):
    """The list of live tiles in ascending order: of keys for a tile of queries, or of queries for a tile of keys.

    For a tile of queries the last tiles of keys need the mask; for a tile of keys (TRANSPOSED) the first tiles of
    queries do.
    """
    query_tiles = (extent.query_length + S.TILE - 1) // S.TILE
    words_of_unit = live + tl.cast(unit, tl.int64) * query_tiles * words
    if TRANSPOSED:
        last = query_tiles
        full = 0
        if S.CAUSAL:  # the first tile of queries that sees all of this tile of keys
            needed = tl.minimum((tile + 1) * S.TILE, extent.key_length) - (extent.key_length - extent.query_length) - 1
            full = tl.maximum((needed + S.TILE - 1) // S.TILE, 0)
    else:
        full, last = visible_tiles(tile, extent, S.CAUSAL, S.TILE, S.TILE)
    tl.debug_barrier()  # all are done with what was listed in these places before
    count = 0
    split = 0
    for first in range(0, last, SPAN):
        candidate = first + tl.arange(0, SPAN)
        if TRANSPOSED:
            row, column = candidate, tile
        else:
            row, column = tile, candidate
        word = tl.load(words_of_unit + tl.cast(row, tl.int64) * words + column // WORD, mask=candidate < last, other=0)
        count, split = append_tiles(places, count, split, candidate, (word >> (column % WORD)) & 1, full)
    tl.debug_barrier()  # the list is there for all
    return TileList(places, split, count)

"""Which single keys a tile of queries can reach: one more product of the live tiles, at an offset that is certified.

docs/math.md proves that no key of the support is left out. Only tiles without a mask are looked at, and only where few
queries reach each tile: all other tiles stay whole.
"""

import triton
import triton.language as tl

from .certify import PLACES, tile_of, tiles_above
from .gather import SPAN_TILES, RowCount, append_rows, fill_last_block, load_flags
from .keys import open_listed_keys
from .score import transposed_scores

# Of the offset: 2^-20 for the rounding of z_scale / offset in relative distances, 2^-21 for the processor's logarithm.
# What the solve's plain sums lose is within what the storage error of a maximum has to spare.
SAFETY = tl.constexpr(1.0 + 2.0**-18)
MOST_PAIRS = tl.constexpr(32)  # (query, tile) pairs for each live tile: with more of them, whole tiles cost less
FEWEST_TILES = tl.constexpr(4)


@triton.jit
def tiles_to_mark(tiles, pairs, is_certain, C: tl.constexpr):
    """How many tiles from the front of the list are worth a mark."""
    is_sparse = (pairs <= MOST_PAIRS * tiles.count) & (tiles.split >= FEWEST_TILES)
    return tl.where(is_sparse & is_certain, tiles.split // C.TILES_PER_STEP * C.TILES_PER_STEP, 0)


@triton.jit
def lowest_reaching_score(maximum, offset, score_error, z_scale):
    """The score that a key must exceed to be in the support, with what rounding may move; +inf for no key.

    One `score_error` is for the score, which is computed again and again in other ways. The other is for the rounding
    of this number.
    """
    lowest = maximum - (offset * SAFETY + 2.0 * score_error) / z_scale
    return tl.where(maximum < float("inf"), lowest, float("inf"))


@triton.jit
def mark_keys(queries, key, tiles, marked, lowest, flags, C: tl.constexpr):
    """Write the flags of the first `marked` tiles of the list: 1 for each key that some query reaches.

    Keys are the rows here, so that the largest score of a key lies within few threads.
    """
    for place in range(0, marked, C.TILES_PER_STEP):
        keys = open_listed_keys(key, tiles, place, C)
        score, _ = transposed_scores(queries, keys, False, C)
        is_reached = tl.max(score - lowest[None, :], 1) > 0
        tl.store(flags + place * C.TILE + tl.arange(0, C.TILES_PER_STEP * C.TILE), is_reached.to(tl.int8))
    tl.debug_barrier()


@triton.jit
def list_keys(record, tiles, marked, flags, C: tl.constexpr):
    """List the single keys of marked tiles. A tile that is so listed gets the number ~tile in the list of tiles.

    Returns the number of blocks of single keys.
    """
    rows, last, before = 0, -1, -1
    for first in range(0, marked, SPAN_TILES):
        place = first + tl.arange(0, SPAN_TILES)
        inside = place < marked
        tile = tl.load(tiles.tiles + place, mask=inside, other=0)
        own_flags = load_flags(flags, place, inside, C)
        count = RowCount(rows, last, before)
        count, taken = append_rows(record.rows, count, record.quota, place, tile, own_flags, inside, C)
        tl.store(tiles.tiles + place, ~tile, mask=taken)
        rows, last, before = count
    tl.debug_barrier()
    index = tl.where(tl.arange(0, 2) == 0, last, before)
    exists = index >= 0
    tile = ~tl.load(tiles.tiles + index, mask=exists, other=0)
    return fill_last_block(record.rows, RowCount(rows, last, before), tile, load_flags(flags, index, exists, C), C)


@triton.jit
def store_reaching_queries(words, tiles, column, depth, queries, C: tl.constexpr):
    """For each listed tile of keys, the word of the queries whose stored maximum is above -depth, or NaN."""
    WORDS: tl.constexpr = C.WORDS
    BITS: tl.constexpr = C.BITS
    sizes = queries.sizes
    query_tiles = (sizes.query_length + C.TILE - 1) // C.TILE
    key_tiles = (sizes.key_length + C.TILE - 1) // C.TILE
    exists = queries.row < sizes.query_length
    head = words + (tl.cast(queries.unit, tl.int64) * key_tiles * query_tiles + queries.tile) * WORDS
    for first in range(0, tiles.count, PLACES):
        number, _, reaching, _ = tiles_above(tiles, column, first, depth, C)
        reaching = tl.where(exists[:, None], reaching, 0)
        bits = tl.reshape(reaching, (WORDS, BITS, PLACES)) << tl.arange(0, BITS)[None, :, None]
        tile = tl.cast(tile_of(number), tl.int64) * query_tiles * WORDS
        pointers = head + tile[None, :] + tl.arange(0, WORDS)[:, None]
        tl.store(pointers, tl.sum(bits, 1), mask=(first + tl.arange(0, PLACES) < tiles.count)[None, :])

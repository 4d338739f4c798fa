"""From the packed map of live tiles to compact lists: the tiles of keys of each tile of queries, or the transpose."""

import triton
import triton.language as tl

from .tile import SIZES, WORD, Extent, visible_keys, visible_tiles

SPAN = tl.constexpr(128)


@triton.jit(do_not_specialize=SIZES)
def list_kernel(
    live, lists, counts, heads, group, query_length, key_length,
    first_unit, units, first_tile, words, candidates, capacity, TRANSPOSED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Lists this program's live tiles in ascending order, and stores where the masked ones begin or end.

    For a tile of queries the last tiles of keys need the mask; for a tile of keys (TRANSPOSED) the first tiles of
    queries do.
    """
    extent = Extent(heads, group, query_length, key_length)
    tiles = tl.num_programs(0) // units
    index = tl.program_id(0)
    unit = first_unit + index // tiles
    tile = first_tile + index % tiles
    query_tiles = (query_length + S.TILE - 1) // S.TILE
    base = live + tl.cast(unit, tl.int64) * query_tiles * words
    out = lists + tl.cast(index, tl.int64) * capacity

    count = 0
    split = 0
    if TRANSPOSED:
        last = candidates
    else:
        full, last = visible_tiles(tile, extent, S.CAUSAL, S.TILE, S.TILE)
    for first in range(0, last, SPAN):
        candidate = first + tl.arange(0, SPAN)
        inside = candidate < last
        if TRANSPOSED:
            word = tl.load(base + tl.cast(candidate, tl.int64) * words + tile // WORD, mask=inside, other=0)
            alive = (word >> (tile % WORD)) & 1
            seen = visible_keys(candidate * S.TILE, extent, S.CAUSAL)
            early = seen < tl.minimum((tile + 1) * S.TILE, key_length)
        else:
            word = tl.load(base + tl.cast(tile, tl.int64) * words + candidate // WORD, mask=inside, other=0)
            alive = (word >> (candidate % WORD)) & 1
            early = candidate < full
        position = count + tl.cumsum(alive, 0) - 1
        tl.store(out + position, candidate, mask=alive > 0)
        count += tl.sum(alive, 0)
        split += tl.sum(tl.where(early, alive, 0), 0)
    tl.store(counts + 2 * index, split)
    tl.store(counts + 2 * index + 1, count)

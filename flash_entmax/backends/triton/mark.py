"""Which single keys a tile of queries can reach: one product of each tile of keys with the single queries of its list.

docs/math.md proves that no key of the support is left out: a key that some query can reach, at an offset that is
certified, gets the flag 1. Many threads may write the same 1.
"""

import triton
import triton.language as tl

from .keys import open_keys
from .queries import open_options, open_queries
from .query_lists import listed_queries, pair_flags
from .score import transposed_scores
from .tile import UNSPECIALIZED, Sizes, key_head, launch_index, open_rows, open_tile, query_head, row_pointers


@triton.jit(do_not_specialize=UNSPECIALIZED)
def mark_kernel(
    query, key, lowest, flags, lists, score_options, visibility, heads, group, query_length, key_length, first_unit,
    units, first_tile, tiles, capacity, tile_capacity, row_capacity, C: tl.constexpr,
):  # fmt: skip
    """The flags of one tile of keys, for one query head and the pairs of tiles that are listed by single queries."""
    sizes = Sizes(heads, group, query_length, key_length)
    unit, tile = first_unit + tl.program_id(0) % units, tl.program_id(0) // units
    index = launch_index(unit, tile, units, first_unit, 0)
    blocks = listed_queries(lists, index, tile_capacity, row_capacity)
    if blocks.row_blocks > 0:  # many programs have nothing to do
        options = open_options(score_options, unit, sizes, C)
        keys = open_keys(key_head(key, unit, sizes), open_tile(tile, C), sizes, True, C)
        head = query_head(query, unit, sizes)
        flags = pair_flags(flags, unit - first_unit, 0, tile, tiles, capacity, C)
        for n in range(blocks.row_blocks):
            block = open_rows(blocks.rows + n * C.TILE, C)
            queries = open_queries(head, unit, block, options, sizes, visibility, False, C)
            score, _ = transposed_scores(queries, keys, False, C)
            row_lowest = tl.load(row_pointers(lowest, unit, block.column, sizes))
            is_reached = (score <= row_lowest[None, :]) == 0  # NaN reaches all
            place = (block.column.to(tl.int32) // C.TILE - first_tile) * (capacity * C.TILE)
            one = tl.full((C.TILE, C.TILE), 1, tl.int8)
            tl.store(flags + (place[None, :] + keys.column[:, None]), one, mask=is_reached)

"""What one program works on: a tile of queries of one head, and its list of keys."""

from typing import NamedTuple

import triton
import triton.language as tl

from .lists import BlockList, list_place, listed_tiles
from .queries import open_options, open_queries
from .reach import open_record
from .tile import heaviest_first, open_tile, query_head


class ChunkSizes(NamedTuple):
    """The units and tiles of one launch, and the places of each list of tiles."""

    first_unit: int
    units: int
    first_tile: int
    capacity: int


@triton.jit
def open_program(query, reached_keys, lists, score_options, visibility, sizes, chunk, C: tl.constexpr):
    """(queries, blocks): the tile of queries of this program, and the list of the keys that it may reach.

    Without the records of these keys, all tiles that some query sees are listed.
    """
    unit, tile = heaviest_first(chunk.units, chunk.first_unit, chunk.first_tile)
    options = open_options(score_options, unit, sizes, C)
    _, places = list_place(lists, unit, tile, chunk.units, chunk.first_unit, chunk.first_tile, chunk.capacity)
    if reached_keys is None:
        whole = listed_tiles(places, chunk.capacity, None, unit, tile, sizes, visibility, C)
        blocks = BlockList(whole, places, 0)
    else:
        query_tiles = (sizes.query_length + C.TILE - 1) // C.TILE
        record = open_record(reached_keys, unit * query_tiles + tile, sizes, C)
        whole = listed_tiles(places, chunk.capacity, record.whole, unit, tile, sizes, visibility, C)
        blocks = BlockList(whole, record.rows, tl.load(record.row_blocks))
    block = open_tile(tile, C)
    return open_queries(query_head(query, unit, sizes), unit, block, options, sizes, visibility, True, C), blocks

"""What one program works on: a tile of queries of one head, and its list of live tiles of keys."""

from typing import NamedTuple

import triton
import triton.language as tl

from .lists import list_place, listed_tiles
from .queries import open_options, open_queries
from .tile import heaviest_first, query_head


class ChunkSizes(NamedTuple):
    """The units and tiles of one launch, the words of a row of the live map, and the places of each list."""

    first_unit: int
    units: int
    first_tile: int
    words: int
    capacity: int


@triton.jit
def open_program(query, live, lists, score_options, visibility, sizes, chunk, C: tl.constexpr):
    """(queries, tiles): the tile of queries of this program, and the list of its live tiles.

    Without a map of live tiles, all tiles that some query sees are listed.
    """
    unit, tile = heaviest_first(chunk.units, chunk.first_unit, chunk.first_tile)
    options = open_options(score_options, unit, sizes, C)
    _, places = list_place(lists, unit, tile, chunk.units, chunk.first_unit, chunk.first_tile, chunk.capacity)
    tiles = listed_tiles(places, chunk.capacity, live, unit, tile, chunk.words, sizes, visibility, False, C)
    return open_queries(query_head(query, unit, sizes), unit, tile, options, sizes, visibility, C), tiles

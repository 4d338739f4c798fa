"""Which keys a query sees: an interval of keys for each query, and a filter by tiles for masks that are no intervals.

Without intervals, every query sees all keys, or the causal ones. Nothing is loaded for that.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...core import tile_filter
from .tile import UNSPECIALIZED, WORD

HIDDEN = tl.constexpr(tile_filter.HIDDEN)
WHOLE = tl.constexpr(tile_filter.WHOLE)
FIRST_PARTIAL = tl.constexpr(tile_filter.FIRST_PARTIAL)
NOWHERE = tl.constexpr(2**30)


class KernelVisibility(NamedTuple):
    """core.call.VisibilityArgs as a launch takes them; 0 where a call does not use one, since a function of Triton
    returns no None.

    intervals: (batch, 3, query length); bounds: (batch, query tiles, 4), see `bounds_kernel`; tile_kinds and tile_bits:
    see core.tile_filter.TileFilter.
    """

    intervals: Tensor | int = 0
    bounds: Tensor | int = 0
    tile_kinds: Tensor | int = 0
    tile_bits: Tensor | int = 0


@triton.jit
def visible_keys(row, sizes, CAUSAL: tl.constexpr):
    """How many keys a query sees, from key 0 on; 0 past the last query."""
    limit = sizes.key_length
    if CAUSAL:
        limit = tl.minimum(tl.maximum(row + (sizes.key_length - sizes.query_length) + 1, 0), limit)
    return tl.where(row < sizes.query_length, limit, 0)


@triton.jit
def visible_interval(row, unit, sizes, visibility, C: tl.constexpr):
    """(start, stop, position) of queries: each sees the keys start <= key < stop; none past the last query."""
    if C.INTERVALS:
        inside = row < sizes.query_length
        numbers = visibility.intervals + tl.cast(unit // sizes.heads, tl.int64) * 3 * sizes.query_length + row
        start = tl.load(numbers, mask=inside, other=0)
        stop = tl.load(numbers + sizes.query_length, mask=inside, other=0)
        position = tl.load(numbers + 2 * sizes.query_length, mask=inside, other=0)
    else:
        start = tl.zeros_like(row)
        stop = visible_keys(row, sizes, C.CAUSAL)
        position = row + (sizes.key_length - sizes.query_length)
    return start, stop, position


@triton.jit(do_not_specialize=UNSPECIALIZED)
def bounds_kernel(intervals, bounds, query_length, capacity, C: tl.constexpr):
    """Four numbers for each tile of queries.

    Some query sees keys of the tiles from the first number up to the second, at most `capacity` of them. Every query
    sees all keys of the tiles from the third up to the fourth.
    """
    TILE: tl.constexpr = C.TILE
    tiles = (query_length + TILE - 1) // TILE
    batch, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = tile * TILE + tl.arange(0, TILE)
    inside = row < query_length
    numbers = intervals + tl.cast(batch, tl.int64) * 3 * query_length + row
    start = tl.load(numbers, mask=inside, other=0)
    stop = tl.load(numbers + query_length, mask=inside, other=NOWHERE)
    sees = inside & (start < stop)
    end = (tl.max(tl.where(sees, stop, 0), 0) + TILE - 1) // TILE
    begin = tl.minimum(tl.min(tl.where(sees, start, NOWHERE), 0) // TILE, end)
    place = bounds + tl.cast(tl.program_id(0), tl.int64) * 4
    tl.store(place, begin)
    tl.store(place + 1, tl.minimum(end, begin + capacity))
    tl.store(place + 2, (tl.max(start, 0) + TILE - 1) // TILE)
    tl.store(place + 3, tl.min(stop, 0) // TILE)


@triton.jit
def bounds_of(unit, query_tile, sizes, visibility, C: tl.constexpr):
    tiles = (sizes.query_length + C.TILE - 1) // C.TILE
    tile = tl.minimum(query_tile, tiles - 1)
    return visibility.bounds + (tl.cast(unit // sizes.heads, tl.int64) * tiles + tile) * 4


@triton.jit
def seen_tiles(unit, query_tile, sizes, visibility, C: tl.constexpr):
    """(begin, end): a query of the tile sees a key of these tiles only."""
    if C.INTERVALS:
        bounds = bounds_of(unit, query_tile, sizes, visibility, C)
        begin, end = tl.load(bounds), tl.load(bounds + 1)
    else:
        last = tl.minimum((query_tile + 1) * C.TILE, sizes.query_length) - 1
        begin, end = 0, (visible_keys(last, sizes, C.CAUSAL) + C.TILE - 1) // C.TILE
    return begin, end


@triton.jit
def are_whole(unit, query_tile, key_tile, sizes, visibility, C: tl.constexpr):
    """Whether every query of a tile sees every key of another tile, which then needs no mask. Either may be many."""
    if C.INTERVALS:
        bounds = bounds_of(unit, query_tile, sizes, visibility, C)
        whole = (key_tile >= tl.load(bounds + 2)) & (key_tile < tl.load(bounds + 3))
    else:
        whole = key_tile < visible_keys(query_tile * C.TILE, sizes, C.CAUSAL) // C.TILE
    if C.FILTERED:
        whole = whole & (kinds_of(unit, query_tile, key_tile, sizes, visibility, C) == WHOLE)
    return whole


@triton.jit
def kinds_of(unit, query_tile, key_tile, sizes, visibility, C: tl.constexpr):
    """The filter's kinds of tiles. Either may be many, and may lie past the last one."""
    query_tiles = (sizes.query_length + C.TILE - 1) // C.TILE
    key_tiles = (sizes.key_length + C.TILE - 1) // C.TILE
    index = tl.cast(0, tl.int64)
    if C.FILTER_BY_BATCH:
        index += unit // sizes.heads
    if C.FILTER_BY_HEAD:
        index = index * sizes.heads + unit % sizes.heads
    if C.FILTER_BY_QUERY:
        index = index * query_tiles + tl.minimum(query_tile, query_tiles - 1)
    return tl.load(visibility.tile_kinds + index * (key_tiles + 1) + tl.minimum(key_tile, key_tiles - 1))


@triton.jit
def hide(score, column, start, stop, C: tl.constexpr):
    """-inf where the query does not see the key. All arguments broadcast to the shape of the scores.

    Keys, start and stop count from the first of the keys. So the keys of a tile are constants of the compiled loop, and
    take no registers.
    """
    seen = column < stop
    if C.INTERVALS:
        seen = seen & (column >= start)
    return tl.where(seen, score, float("-inf"))


@triton.jit
def hide_filtered(score, row, column, queries, key_tile, C: tl.constexpr):
    """-inf where the filter's bits say so. Row and column count inside the tile."""
    kind = kinds_of(queries.unit, queries.tile, key_tile, queries.sizes, queries.visibility, C)
    place = tl.cast(tl.maximum(kind - FIRST_PARTIAL, 0), tl.int64)  # the bits of a whole tile are not looked at
    if C.FILTER_BY_QUERY:
        place = place * C.TILE + row
    words = queries.visibility.tile_bits + place * ((C.TILE + WORD - 1) // WORD)
    word = tl.load(words)
    if C.TILE > WORD:
        word = tl.where(column < WORD, word, tl.load(words + 1))
    seen = ((word >> (column % WORD)) & 1) | tl.where(kind == WHOLE, 1, 0)
    if C.ROWS:  # decoding visits hidden tiles as well: they have no bits
        seen = tl.where(kind == HIDDEN, 0, seen)
    return tl.where(seen != 0, score, float("-inf"))

"""Which keys a query sees: an interval of keys for each query, and a filter by tiles for masks that are none.

Without intervals, every query sees all keys, or the causal ones; nothing is loaded for that.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...core.visibility import FIRST_PARTIAL as FIRST
from ...core.visibility import HIDDEN, WHOLE
from .tile import SIZES, WORD

NONE = tl.constexpr(HIDDEN)
ALL = tl.constexpr(WHOLE)
FIRST_PARTIAL = tl.constexpr(FIRST)
BY_BATCH, BY_HEAD, BY_QUERY = 1, 2, 4  # what the kinds of a filter's tiles, and so its bits, are told apart by
NOWHERE = tl.constexpr(2**30)


class View(NamedTuple):
    """What a launch needs to mask and to bend scores; None where a call does not use it.

    intervals: (batch, 3, query length); bounds: (batch, query tiles, 4), see `bounds_kernel`; kinds and bits: see
    sight.TileFilter. tilts: (batch, heads), ALiBi slope / scale; cap: softcap / scale, or (heads,) of it.
    """

    intervals: Tensor | None = None
    bounds: Tensor | None = None
    kinds: Tensor | None = None
    bits: Tensor | None = None
    tilts: Tensor | None = None
    cap: float | Tensor | None = None


@triton.jit
def visible_keys(row, extent, CAUSAL: tl.constexpr):
    """How many keys a query sees, from key 0 on; 0 past the last query."""
    limit = extent.key_length
    if CAUSAL:
        limit = tl.minimum(tl.maximum(row + (extent.key_length - extent.query_length) + 1, 0), limit)
    return tl.where(row < extent.query_length, limit, 0)


@triton.jit
def visible_interval(row, unit, extent, view, S: tl.constexpr):
    """(start, stop, position) of queries: each sees the keys start <= key < stop; none past the last query."""
    if S.INTERVALS:
        inside = row < extent.query_length
        numbers = view.intervals + tl.cast(unit // extent.heads, tl.int64) * 3 * extent.query_length + row
        start = tl.load(numbers, mask=inside, other=0)
        stop = tl.load(numbers + extent.query_length, mask=inside, other=0)
        position = tl.load(numbers + 2 * extent.query_length, mask=inside, other=0)
    else:
        start = tl.zeros_like(row)
        stop = visible_keys(row, extent, S.CAUSAL)
        position = row + (extent.key_length - extent.query_length)
    return start, stop, position


@triton.jit(do_not_specialize=SIZES)
def bounds_kernel(intervals, bounds, query_length, capacity, S: tl.constexpr):
    """Of each tile of queries: the first tile of keys that some query sees and one past the last, at most `capacity`
    on; the first tile that every query sees whole and one past the last."""
    TILE: tl.constexpr = S.TILE
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
def bounds_of(unit, query_tile, extent, view, S: tl.constexpr):
    tiles = (extent.query_length + S.TILE - 1) // S.TILE
    tile = tl.minimum(query_tile, tiles - 1)
    return view.bounds + (tl.cast(unit // extent.heads, tl.int64) * tiles + tile) * 4


@triton.jit
def seen_tiles(unit, query_tile, extent, view, S: tl.constexpr):
    """(begin, end): the tiles of keys of which some query of a tile sees a key."""
    if S.INTERVALS:
        bounds = bounds_of(unit, query_tile, extent, view, S)
        begin, end = tl.load(bounds), tl.load(bounds + 1)
    else:
        last = tl.minimum((query_tile + 1) * S.TILE, extent.query_length) - 1
        begin, end = 0, (visible_keys(last, extent, S.CAUSAL) + S.TILE - 1) // S.TILE
    return begin, end


@triton.jit
def are_whole(unit, query_tile, key_tile, extent, view, S: tl.constexpr):
    """Whether every query of a tile sees every key of another, which then needs no mask; either may be many."""
    if S.INTERVALS:
        bounds = bounds_of(unit, query_tile, extent, view, S)
        whole = (key_tile >= tl.load(bounds + 2)) & (key_tile < tl.load(bounds + 3))
    else:
        whole = key_tile < visible_keys(query_tile * S.TILE, extent, S.CAUSAL) // S.TILE
    if S.FILTERED:
        whole = whole & (kinds_of(unit, query_tile, key_tile, extent, view, S) == ALL)
    return whole


@triton.jit
def kinds_of(unit, query_tile, key_tile, extent, view, S: tl.constexpr):
    """The filter's kinds of tiles; either may be many, and past the last."""
    query_tiles = (extent.query_length + S.TILE - 1) // S.TILE
    key_tiles = (extent.key_length + S.TILE - 1) // S.TILE
    index = tl.cast(0, tl.int64)
    if S.FILTER_BY_BATCH:
        index += unit // extent.heads
    if S.FILTER_BY_HEAD:
        index = index * extent.heads + unit % extent.heads
    if S.FILTER_BY_QUERY:
        index = index * query_tiles + tl.minimum(query_tile, query_tiles - 1)
    return tl.load(view.kinds + index * (key_tiles + 1) + tl.minimum(key_tile, key_tiles - 1))


@triton.jit
def hide(score, key, start, stop, S: tl.constexpr):
    """-inf where the query does not see the key; key, start and stop broadcast to the shape of the scores.

    All count from the tile's first key, so that the keys are constants of the compiled loop and cost no registers.
    """
    seen = key < stop
    if S.INTERVALS:
        seen = seen & (key >= start)
    return tl.where(seen, score, float("-inf"))


@triton.jit
def hide_filtered(score, row, key, unit, query_tile, key_tile, extent, view, S: tl.constexpr):
    """-inf where the filter's bits say so; row and key count inside the tile."""
    kind = kinds_of(unit, query_tile, key_tile, extent, view, S)
    place = tl.cast(tl.maximum(kind - FIRST_PARTIAL, 0), tl.int64)  # the bits of a whole tile are not looked at
    if S.FILTER_BY_QUERY:
        place = place * S.TILE + row
    words = view.bits + place * ((S.TILE + WORD - 1) // WORD)
    word = tl.load(words)
    if S.TILE > WORD:
        word = tl.where(key < WORD, word, tl.load(words + 1))
    seen = ((word >> (key % WORD)) & 1) | tl.where(kind == ALL, 1, 0)
    return tl.where(seen != 0, score, float("-inf"))

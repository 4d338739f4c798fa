"""Which tiles can hold support, by their maxima alone: an offset at or above the true one, and a shorter list."""

import triton
import triton.language as tl

from .alpha import newton_step, probability, support_weight
from .lists import append
from .tile import TileList

STEPS = tl.constexpr(3)
PLACES = tl.constexpr(64)  # places of a list that one step looks at


@triton.jit
def certify_offset(column, count, shift, exponent, S: tl.constexpr):
    """An offset at or above the true one: maxima are a subset of the scores, and Newton's steps end above the root."""
    TILE: tl.constexpr = S.TILE
    # A step is rounded relative to the offset that it starts from: by 2^-24 for each span of maxima, added one after
    # the other, and by less than 2^-17 for the powers and the sum over a span.
    rounding = (tl.cdiv(count, PLACES) + 64) * 2.0**-22
    reach = tl.full((TILE,), 1.0, tl.float32)
    for _ in range(STEPS):
        total = tl.zeros((TILE, PLACES), tl.float32)
        weight = tl.zeros((TILE, PLACES), tl.float32)
        for first in range(0, count, PLACES):
            d = tl.maximum(load_maxima(column, first, count, S) + (shift + reach)[:, None], 0.0)
            total += probability(d, exponent, S.POWER)
            weight += support_weight(d, exponent, S.POWER)
        stepped = newton_step(reach, tl.sum(total, 1), tl.sum(weight, 1), exponent) + rounding * reach
        reach = tl.where(stepped < reach, stepped, reach)
    return reach


@triton.jit
def load_maxima(column, first, count, S: tl.constexpr):
    """(TILE, PLACES): the maxima of some places of the list; -inf past its end."""
    place = first + tl.arange(0, PLACES)
    pointers = column[:, None] + tl.cast(place, tl.int64)[None, :] * S.TILE
    return tl.load(pointers, mask=(place < count)[None, :], other=float("-inf")).to(tl.float32)


@triton.jit
def within_reach(tiles, column, first, reach, S: tl.constexpr):
    """(tiles, maxima, alive) of some places of the list: alive are those of which some row has a maximum within reach
    (NaN is)."""
    place = first + tl.arange(0, PLACES)
    tile = tl.load(tiles.tiles + place, mask=place < tiles.count, other=0)
    maxima = load_maxima(column, first, tiles.count, S)
    alive = tl.where(place < tiles.count, tl.max(tl.where(maxima + reach[:, None] <= 0, 0, 1), 0), 0)
    return tile, maxima, alive


@triton.jit
def shorten(tiles, column, reach, S: tl.constexpr):
    """Keep the tiles of which some row has a maximum within reach, in place, and their maxima with them."""
    count = 0
    split = 0
    for first in range(0, tiles.count, PLACES):
        tile, maxima, alive = within_reach(tiles, column, first, reach, S)
        tl.debug_barrier()  # all have read this span before it is written over
        target = tl.cast(count + tl.cumsum(alive, 0) - 1, tl.int64) * S.TILE
        tl.store(column[:, None] + target[None, :], maxima.to(tl.float16), mask=(alive > 0)[None, :])
        count = append(tiles.tiles, count, tile, alive)
        split += tl.sum(tl.where(first + tl.arange(0, PLACES) < tiles.split, alive, 0), 0)
    tl.debug_barrier()
    return TileList(tiles.tiles, split, count)


@triton.jit
def tiles_within(places, tiles, column, reach, S: tl.constexpr):
    """The tiles that `shorten` would keep, as a list at other places; nothing else is written."""
    count = 0
    split = 0
    tl.debug_barrier()  # all are done with what was listed in these places before
    for first in range(0, tiles.count, PLACES):
        tile, _, alive = within_reach(tiles, column, first, reach, S)
        count = append(places, count, tile, alive)
        split += tl.sum(tl.where(first + tl.arange(0, PLACES) < tiles.split, alive, 0), 0)
    tl.debug_barrier()
    return TileList(places, split, count)

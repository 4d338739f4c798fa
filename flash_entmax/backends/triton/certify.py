"""Which tiles can hold support, by their maxima alone: an offset at or above the true one, and a shorter list."""

import triton
import triton.language as tl

from .alpha import newton_step, probability, support_weight
from .lists import TileList, append

STEPS = tl.constexpr(3)
PLACES = tl.constexpr(64)  # places of a list that one step looks at


@triton.jit
def certify_offset(column, count, bound_gap, exponent, C: tl.constexpr):
    """An offset at or above the true one: maxima are a subset of the scores, and Newton's steps end above the root."""
    TILE: tl.constexpr = C.TILE
    # A step's rounding is relative to the offset that it starts from. It is 2^-24 for each span of maxima, which are
    # added one after the other, and less than 2^-17 for the powers and the sum over a span.
    rounding = (tl.cdiv(count, PLACES) + 64) * 2.0**-22
    offset = tl.full((TILE,), 1.0, tl.float32)
    for _ in range(STEPS):
        total = tl.zeros((TILE, PLACES), tl.float32)
        weight = tl.zeros((TILE, PLACES), tl.float32)
        for first in range(0, count, PLACES):
            d = tl.maximum(load_maxima(column, first, count, C) + (bound_gap + offset)[:, None], 0.0)
            total += probability(d, exponent, C.POWER)
            weight += support_weight(d, exponent, C.POWER)
        stepped = newton_step(offset, tl.sum(total, 1), tl.sum(weight, 1), exponent) + rounding * offset
        offset = tl.where(stepped < offset, stepped, offset)
    return offset


@triton.jit
def load_maxima(column, first, count, C: tl.constexpr):
    """(TILE, PLACES): the maxima of some places of the list; -inf past its end."""
    place = first + tl.arange(0, PLACES)
    pointers = column[:, None] + tl.cast(place, tl.int64)[None, :] * C.TILE
    return tl.load(pointers, mask=(place < count)[None, :], other=float("-inf")).to(tl.float32)


@triton.jit
def tiles_above(tiles, column, first, depth, C: tl.constexpr):
    """(numbers, maxima, reaching, alive) of some places of the list.

    A row reaches a tile if its stored maximum is above -depth, or NaN. A tile is alive if a row reaches it.
    """
    place = first + tl.arange(0, PLACES)
    number = tl.load(tiles.tiles + place, mask=place < tiles.count, other=0)
    maxima = load_maxima(column, first, tiles.count, C)
    reaching = tl.where((maxima + depth[:, None] <= 0) | (place >= tiles.count)[None, :], 0, 1)
    return number, maxima, reaching, tl.max(reaching, 0)


@triton.jit
def shorten(tiles, column, depth, C: tl.constexpr):
    """(the list of the tiles that are alive at this depth, in place, with their maxima; how many pairs of a row and a
    tile that it reaches)."""
    count = 0
    split = 0
    pairs = 0
    for first in range(0, tiles.count, PLACES):
        number, maxima, reaching, alive = tiles_above(tiles, column, first, depth, C)
        tl.debug_barrier()  # all have read this span before it is written over
        target = tl.cast(count + tl.cumsum(alive, 0) - 1, tl.int64) * C.TILE
        tl.store(column[:, None] + target[None, :], maxima.to(tl.float16), mask=(alive > 0)[None, :])
        count = append(tiles.tiles, count, number, alive)
        split += tl.sum(tl.where(first + tl.arange(0, PLACES) < tiles.split, alive, 0), 0)
        pairs += tl.sum(tl.sum(reaching, 1), 0)
    tl.debug_barrier()
    return TileList(tiles.tiles, split, count), pairs


@triton.jit
def sublist(places, tiles, column, depth, C: tl.constexpr):
    """The list of the whole tiles that `shorten` would leave, at other places. Nothing else is written."""
    count = 0
    split = 0
    tl.debug_barrier()  # all are done with what was listed in these places before
    for first in range(0, tiles.count, PLACES):
        number, _, _, alive = tiles_above(tiles, column, first, depth, C)
        alive = tl.where(number >= 0, alive, 0)
        count = append(places, count, number, alive)
        split += tl.sum(tl.where(first + tl.arange(0, PLACES) < tiles.split, alive, 0), 0)
    tl.debug_barrier()
    return TileList(places, split, count)


@triton.jit
def whole_tiles(places, tiles):
    """The list of the tiles that are not listed by single keys, at other places."""
    count = 0
    split = 0
    tl.debug_barrier()  # all are done with what was listed in these places before
    for first in range(0, tiles.count, PLACES):
        place = first + tl.arange(0, PLACES)
        number = tl.load(tiles.tiles + place, mask=place < tiles.count, other=-1)
        whole = tl.where(number >= 0, 1, 0)
        count = append(places, count, number, whole)
        split += tl.sum(tl.where(place < tiles.split, whole, 0), 0)
    tl.debug_barrier()
    return TileList(places, split, count)


@triton.jit
def tile_of(number):
    """The tile of a number in a list: ~tile where single keys are listed in its place."""
    return tl.where(number < 0, ~number, number)

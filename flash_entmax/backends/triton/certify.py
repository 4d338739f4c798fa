"""What can hold support, by the maxima of tiles alone: an offset at or above the true one, and a shorter list of tiles.

The maxima also say which queries reach a tile of keys: each of these pairs sets a bit.
"""

import triton
import triton.language as tl

from .alpha import certified_step, probability, support_weight
from .lists import TileList, append, list_place, load_tile_list, store_counts
from .queries import open_options
from .reach import query_words
from .tile import UNSPECIALIZED, WORD, Sizes, heaviest_first, load_row, store_row

ROUNDING = tl.constexpr(2.0**-10)  # of a stored maximum: twice the rounding of its 11 bits
# Of the offset: 2^-20 for the rounding of z_scale / offset in relative distances, 2^-21 for the processor's logarithm.
# What the solve's plain sums lose is within what the storage error of a maximum has to spare.
SAFETY = tl.constexpr(1.0 + 2.0**-18)
STEPS = tl.constexpr(3)
PLACES = tl.constexpr(64)  # places of a list that one step looks at


@triton.jit(do_not_specialize=UNSPECIALIZED)
def certify_kernel(
    maxima, maximum, offset, bound_gap, score_error, margin, lowest, lists, counts, words, score_options, visibility,
    heads, group, query_length, key_length, first_unit, units, first_tile, capacity, C: tl.constexpr,
):  # fmt: skip
    """Of each row an `offset` at or above the true one, the `margin` that makes its stored maxima comparable with an
    offset, and the `lowest` score that no key of its support is below. The list of tiles gets shorter.

    Too large an allowance, or NaN (a number of the head is not finite), certifies nothing: the offset is 1, its largest
    value, every tile survives, and so does every key.
    """
    TILE: tl.constexpr = C.TILE
    sizes = Sizes(heads, group, query_length, key_length)
    unit, tile = heaviest_first(units, first_unit, first_tile)
    options = open_options(score_options, unit, sizes, C)
    row = tile * TILE + tl.arange(0, TILE)
    index, places = list_place(lists, unit, tile, units, first_unit, first_tile, capacity)
    column = maxima + tl.cast(index, tl.int64) * capacity * TILE + tl.arange(0, TILE)
    tiles = load_tile_list(places, counts, index)
    row_maximum = load_row(maximum, unit, row, sizes, float("inf"))
    row_gap = load_row(bound_gap, unit, row, sizes, 0.0)
    row_error = load_row(score_error, unit, row, sizes, 0.0)

    storage_error = ROUNDING * (1.0 + tl.abs(row_gap))
    allowance = row_error + storage_error
    # At 1 the maximum's own key has F >= 1 already, so no offset need be above 1 + row_error. The second condition
    # keeps F's power (1 + row_error)^r below e^64.
    is_certain = (allowance < 1.0) & (row_error * options.exponent < 64.0)
    certified = certify_offset(column, tiles.count, row_gap, options.exponent, C) + allowance
    row_offset = tl.where(is_certain, tl.minimum(certified, 1.0 + row_error), 1.0)
    row_margin = row_gap + tl.where(is_certain, allowance, float("nan"))
    depth = row_margin + row_offset
    tiles = shorten(tiles, column, depth, C)
    row_lowest = lowest_reaching_score(row_maximum, row_offset, row_error, options.z_scale)

    store_row(offset, unit, row, sizes, row_offset)
    store_row(margin, unit, row, sizes, row_margin)
    store_row(lowest, unit, row, sizes, tl.where(is_certain, row_lowest, float("nan")))
    store_counts(counts, index, tiles)
    word, stride = query_words(words, unit, tile, first_unit, first_tile, tl.num_programs(0) // units, sizes, C)
    store_reaching_queries(word, stride, tiles, column, depth, row, sizes, C)


@triton.jit
def lowest_reaching_score(maximum, offset, score_error, z_scale):
    """The score that a key must exceed to be in the support, with what rounding may move; +inf for no key.

    One `score_error` is for the score, which is computed again and again in other ways. The other is for the rounding
    of this number.
    """
    lowest = maximum - (offset * SAFETY + 2.0 * score_error) / z_scale
    return tl.where(maximum < float("inf"), lowest, float("inf"))


@triton.jit
def certify_offset(column, count, bound_gap, exponent, C: tl.constexpr):
    """An offset at or above the true one: maxima are a subset of the scores, and Newton's steps end above the root."""
    TILE: tl.constexpr = C.TILE
    offset = tl.full((TILE,), 1.0, tl.float32)
    for _ in range(STEPS):
        total = tl.zeros((TILE, PLACES), tl.float32)
        weight = tl.zeros((TILE, PLACES), tl.float32)
        for first in range(0, count, PLACES):
            d = tl.maximum(load_maxima(column, first, count, C) + (bound_gap + offset)[:, None], 0.0)
            total += probability(d, exponent, C.POWER)
            weight += support_weight(d, exponent, C.POWER)
        offset = certified_step(offset, tl.sum(total, 1), tl.sum(weight, 1), exponent, tl.cdiv(count, PLACES))
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
    """The list of the tiles that are alive at this depth, in place. Their maxima move along."""
    count = 0
    split = 0
    for first in range(0, tiles.count, PLACES):
        number, maxima, _, alive = tiles_above(tiles, column, first, depth, C)
        tl.debug_barrier()  # all have read this span before it is written over
        target = tl.cast(count + tl.cumsum(alive, 0) - 1, tl.int64) * C.TILE
        tl.store(column[:, None] + target[None, :], maxima.to(tl.float16), mask=(alive > 0)[None, :])
        count = append(tiles.tiles, count, number, alive)
        split += tl.sum(tl.where(first + tl.arange(0, PLACES) < tiles.split, alive, 0), 0)
    tl.debug_barrier()
    return TileList(tiles.tiles, split, count)


@triton.jit
def sublist(places, tiles, column, depth, live, C: tl.constexpr):
    """The list of the whole tiles that `shorten` would leave, at other places.

    With `live`, words that are 0 before, each tile that is alive sets its bit there, also where its keys are listed.
    """
    count = 0
    split = 0
    tl.debug_barrier()  # all are done with what was listed in these places before
    for first in range(0, tiles.count, PLACES):
        number, _, _, alive = tiles_above(tiles, column, first, depth, C)
        if live is not None:
            set_bits(live, tl.where(number < 0, ~number, number), alive)
        alive = tl.where(number >= 0, alive, 0)  # tiles whose keys are listed one by one stay out
        count = append(places, count, number, alive)
        split += tl.sum(tl.where(first + tl.arange(0, PLACES) < tiles.split, alive, 0), 0)
    tl.debug_barrier()
    return TileList(places, split, count)


@triton.jit
def set_bits(words, tile, alive):
    """Set the bits of the tiles that are alive. Several of them may share a word, hence the atomic."""
    bit = tl.full(tile.shape, 1, tl.int32) << (tile % WORD)
    tl.atomic_or(words + tile // WORD, bit, mask=alive > 0, sem="relaxed")


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
def store_reaching_queries(words, stride, tiles, column, depth, row, sizes, C: tl.constexpr):
    """For each listed tile of keys, the words of the queries whose stored maximum is above -depth, or NaN.

    `words` are those of this tile of queries and the first tile of keys, and `stride` leads to the next tile of keys.
    """
    WORDS: tl.constexpr = C.WORDS
    BITS: tl.constexpr = C.BITS
    exists = row < sizes.query_length
    for first in range(0, tiles.count, PLACES):
        number, _, reaching, _ = tiles_above(tiles, column, first, depth, C)
        reaching = tl.where(exists[:, None], reaching, 0)
        bits = tl.reshape(reaching, (WORDS, BITS, PLACES)) << tl.arange(0, BITS)[None, :, None]
        pointers = words + (tl.cast(number, tl.int64) * stride)[None, :] + tl.arange(0, WORDS)[:, None]
        tl.store(pointers, tl.sum(bits, 1), mask=(first + tl.arange(0, PLACES) < tiles.count)[None, :])

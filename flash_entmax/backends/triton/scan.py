"""One pass over Q K^T on the listed tiles: the maximum of each row over each tile of keys, and nothing else.

Maxima are stored in 16 bits by place in the list: in units of z, relative to a bound from below on the row's maximum.
A difference that 16 bits cannot hold becomes inf. +inf certifies nothing and kills no tile. -inf is below any
threshold. Tiles that a bound rules out are not listed.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .bound import bound_tiles
from .keys import open_keys, open_listed_keys
from .lists import copy_list, store_counts, walk
from .queries import Queries, open_options, open_queries
from .score import as_computed, scores, sees_a_key, tile_maxima
from .tile import UNSPECIALIZED, Matrix, Sizes, key_head, open_tile, open_tiles, query_head, store_row


@triton.jit(do_not_specialize=UNSPECIALIZED)
def scan_kernel(
    query, key, summary, maxima, maximum, bound_gap, score_error, lists, counts, score_options, visibility, heads,
    group, query_length, key_length, first_unit, units, first_tile, capacity, tiles, C: tl.constexpr,
):  # fmt: skip
    """Bound and scan: the list of tiles that may hold support, their maxima, and three numbers of each row: `maximum`
    (of the scores; +inf where it sees no key), `bound_gap` and `score_error`.

    C.SCANNED tiles of queries are scanned at once, for larger products. Each of them gets a list of its own. Where the
    last of them is not of this launch, what it gives goes to a list that nobody reads.
    """
    SCANNED: tl.constexpr = C.SCANNED
    sizes = Sizes(heads, group, query_length, key_length)
    steps = tl.num_programs(0) // units
    program = tl.program_id(0)
    unit, start = first_unit + program % units, (steps - 1 - program // units) * SCANNED  # the heaviest first
    tile = first_tile + start
    present = tl.minimum(tiles - start, SCANNED)  # tiles of queries
    options = open_options(score_options, unit, sizes, C)
    block = open_tiles(tile, SCANNED, C)
    queries = open_queries(query_head(query, unit, sizes), unit, block, options, sizes, visibility, True, C)
    index = (unit - first_unit) * tiles + start
    places = lists + tl.cast(index, tl.int64) * capacity
    listed, maximum_bound, row_error = bound_tiles(places, capacity, queries, tile + present - 1, summary, C)

    own_tile = tl.arange(0, SCANNED * C.TILE) // C.TILE
    own_index = tl.where(own_tile < present, index + own_tile, units * tiles)
    column = maxima + tl.cast(own_index, tl.int64) * capacity * C.TILE + tl.arange(0, SCANNED * C.TILE) % C.TILE
    row_maximum, row_gap = scan_tiles(queries, key_head(key, unit, sizes), maximum_bound, listed, column, C)
    row = tl.where(own_tile < present, queries.row, query_length)  # no row
    store_row(maximum, unit, row, sizes, row_maximum)
    store_row(bound_gap, unit, row, sizes, row_gap)
    store_row(score_error, unit, row, sizes, row_error)
    for number in range(present):
        store_counts(counts, index + number, listed)
    for number in range(1, present):
        copy_list(places + tl.cast(number, tl.int64) * capacity, listed)


@triton.jit
def scan_tiles(queries, key, maximum_bound, tiles, column, C: tl.constexpr):
    """(maximum, bound_gap): each row's maximum of the scores, +inf where it sees no key; what makes the stored maxima
    relative to this maximum."""
    TILE: tl.constexpr = C.TILE
    SCAN_TILES: tl.constexpr = C.SCAN_TILES
    z_scale = queries.options.z_scale
    maximum = tl.full(maximum_bound.shape, float("-inf"), tl.float32)
    sees = queries.stop > queries.start
    maximum_bound = tl.where(sees, maximum_bound, float("inf"))  # rows past the last query keep no tile alive
    unmasked = tiles.split // SCAN_TILES * SCAN_TILES
    for place in range(0, unmasked, SCAN_TILES):
        keys = open_listed_keys(key, tiles, place, SCAN_TILES, C)
        maxima = tile_maxima(queries, keys, C)
        pointers = column[:, None] + tl.cast(place + tl.arange(0, SCAN_TILES), tl.int64)[None, :] * TILE
        tl.store(pointers, ((maxima - maximum_bound[:, None]) * z_scale).to(tl.float16))
        maximum = tl.maximum(maximum, tl.max(maxima, 1))
    for place in range(unmasked, tiles.count):
        keys = open_keys(key, open_tile(tl.load(tiles.tiles + place), C), queries.sizes, True, C)
        score, _ = scores(queries, keys, True, C)
        maxima = tl.max(score, 1)
        tl.store(column + tl.cast(place, tl.int64) * TILE, ((maxima - maximum_bound) * z_scale).to(tl.float16))
        maximum = tl.maximum(maximum, maxima)
    sees = sees_a_key(maximum, sees, C)  # where all scores are NaN it says no: they stay NaN against any maximum
    maximum = as_computed(maximum, C)
    bound_gap = tl.where(sees, (maximum_bound - maximum) * z_scale, 0.0)
    return tl.where(sees, maximum, float("inf")), bound_gap


class MaximaContext(NamedTuple):
    """What each block of keys is looked at with."""

    queries: Queries
    key: Matrix


@triton.jit
def maxima_of_blocks(queries, key, blocks, C: tl.constexpr):
    """Each row's maximum of the scores over the listed keys; +inf where it sees none of them."""
    TILE: tl.constexpr = C.TILE
    maximum = tl.full((TILE,), float("-inf"), tl.float32)
    maximum = walk(add_maximum, maximum, MaximaContext(queries, key), blocks, C)
    is_given = sees_a_key(maximum, queries.stop > queries.start, C) | (maximum != maximum)
    return tl.where(is_given, as_computed(maximum, C), float("inf"))


@triton.jit
def add_maximum(maximum, context, block, MASKED: tl.constexpr, C: tl.constexpr):
    keys = open_keys(context.key, block, context.queries.sizes, MASKED, C)
    score, _ = scores(context.queries, keys, MASKED, C)
    return tl.maximum(maximum, tl.max(score, 1), propagate_nan=tl.PropagateNan.ALL)

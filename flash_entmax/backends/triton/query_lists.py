"""Which queries may reach a tile of keys: their list, from a bit for each pair; and these bits, where none are kept.

The list of a tile of keys and a query head is a row of int32 numbers:

    the numbers of its BlockList, and how many blocks it has      4
    its tiles of queries                                          tile_capacity
    tiles that may have a bit, before they are told apart         tile_capacity
    its single queries                                            row_capacity
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .bound import rounding_of_options, rounding_of_product
from .certify import lowest_reaching_score
from .gather import RowCount, append_rows, fill_last_block, load_bits
from .keys import Keys, open_keys
from .lists import BlockList, TileList, append, append_tiles, close_list
from .queries import KernelScoreOptions, open_options, open_queries
from .reach import are_kept, key_words, open_record
from .score import scores
from .tile import UNSPECIALIZED, WORD, Matrix, Sizes, key_head, launch_index, open_tile, query_head
from .visibility import KernelVisibility, are_whole

SPAN = tl.constexpr(128)
# A product overflows from |q|_1 max |k| >= 2^128 on. That is a fall of at least 2 * 16 * 2^-22 * 2^128, see
# `rounding_of_product`.
LARGEST_FALL = tl.constexpr(2.0**110)
SPAN_TILES = tl.constexpr(16)  # tiles of queries that one step lists: one warp runs a program
HEADER = tl.constexpr(4)


class QueryList(NamedTuple):
    """Pointers to the parts of the list of one tile of keys."""

    header: Tensor
    tiles: Tensor
    candidates: Tensor
    rows: Tensor


@triton.jit
def open_query_list(lists, index, tile_capacity, row_capacity):
    """The list at some index."""
    header = lists + tl.cast(index, tl.int64) * (HEADER + 2 * tile_capacity + row_capacity)
    tiles = header + HEADER
    return QueryList(header, tiles, tiles + tile_capacity, tiles + 2 * tile_capacity)


@triton.jit
def listed_queries(lists, index, tile_capacity, row_capacity):
    """The BlockList at some index."""
    own = open_query_list(lists, index, tile_capacity, row_capacity)
    whole = TileList(own.tiles, tl.load(own.header), tl.load(own.header + 1))
    return BlockList(whole, own.rows, tl.load(own.header + 2))


@triton.jit
def block_counts(lists, index, tile_capacity, row_capacity):
    """Pointers to how many blocks the lists at some indices have."""
    return open_query_list(lists, index, tile_capacity, row_capacity).header + 3


@triton.jit
def first_reaching_tile(tile, sizes, C: tl.constexpr):
    """No tile of queries before this one sees a tile of keys."""
    first = 0
    if C.CAUSAL:
        first = tl.maximum(tile * C.TILE - (sizes.key_length - sizes.query_length), 0) // C.TILE
    return first


@triton.jit(do_not_specialize=UNSPECIALIZED)
def list_queries_kernel(
    words, flags, lists, score_options, visibility, heads, group, query_length, key_length, first_unit, units,
    first_key, first_tile, tiles, capacity, tile_capacity, row_capacity, C: tl.constexpr,
):  # fmt: skip
    """The list of one tile of keys and one query head, over so many tiles of queries from `first_tile` on.

    Tiles that need no mask, and of which few queries reach the keys, are listed by single queries. In the forward pass
    these pairs of tiles are marked next. So their flags become 0 here, and those of other pairs without a mask 1: all
    keys are reached. The backward has no flags.
    """
    sizes = Sizes(heads, group, query_length, key_length)
    unit = first_unit + tl.program_id(0) % units
    tile = first_key + tl.program_id(0) // units
    index = launch_index(unit, tile, units, first_unit, first_key)
    own = open_query_list(lists, index, tile_capacity, row_capacity)
    words = key_words(words, unit, tile, index, first_tile, tiles, sizes, C)
    begin = tl.maximum(first_tile, first_reaching_tile(tile, sizes, C))
    alive_tiles = tiles_with_bits(own.candidates, words, begin, first_tile + tiles, C)
    front, back = 0, 0
    count, last, before = 0, -1, -1
    for first in range(0, alive_tiles, SPAN_TILES):
        place = first + tl.arange(0, SPAN_TILES)
        inside = place < alive_tiles
        candidate = tl.load(own.candidates + place, mask=inside, other=0)
        own_tile = tl.full((SPAN_TILES,), 0, tl.int32) + tile  # Triton's interpreter would miscount a filter's one kind
        unmasked = are_whole(unit, candidate, own_tile, sizes, visibility, C)
        if flags is None:  # whoever walks the list loads no query past the last
            unmasked = unmasked & ((candidate + 1) * C.TILE <= query_length)
        bits = load_bits(words, candidate, inside, C)
        counted, taken = append_rows(
            own.rows, RowCount(count, last, before), row_capacity, candidate, candidate, bits, inside & unmasked, C
        )
        count, last, before = counted
        if flags is not None:
            pair = pair_flags(flags, unit - first_unit, candidate - first_tile, tile, tiles, capacity, C)
            flag = tl.where(taken, 0, 1).to(tl.int8)[:, None]
            pointers = pair[:, None] + tl.arange(0, C.TILE)[None, :]
            tl.store(pointers, tl.broadcast_to(flag, pointers.shape), mask=(inside & unmasked)[:, None])
        left = tl.where(inside & ~taken, 1, 0)
        ends = append_tiles(own.tiles, tile_capacity, (front, back), candidate, left, unmasked)
        front, back = ends
    listed = close_list(own.tiles, tile_capacity, (front, back))
    pair = tl.where(tl.arange(0, 2) == 0, last, before)
    bits = load_bits(words, pair, pair >= 0, C)
    blocks = fill_last_block(own.rows, RowCount(count, last, before), pair, bits, query_length, C)
    tl.store(own.header, listed.split)
    tl.store(own.header + 1, listed.count)
    tl.store(own.header + 2, blocks)
    tl.store(own.header + 3, listed.count + blocks)
    if are_kept(key_length, C) == 0:  # the next chunk starts from 0
        clear_words(words, own.candidates, alive_tiles, C)


@triton.jit
def tiles_with_bits(candidates, words, begin, end, C: tl.constexpr):
    """Write the numbers of the tiles of queries in a range that have some bit. Returns how many there are."""
    WORDS: tl.constexpr = C.WORDS
    count = 0
    for first in range(begin, end, SPAN):
        tile = first + tl.arange(0, SPAN)
        alive = tl.zeros((SPAN,), tl.int32)
        for number in tl.static_range(WORDS):
            word = tl.load(words + tile * WORDS + number, mask=tile < end, other=0)
            alive = tl.where(word != 0, 1, alive)
        count = append(candidates, count, tile, alive)
    tl.debug_barrier()
    return count


@triton.jit
def clear_words(words, candidates, count, C: tl.constexpr):
    """Write zeros over the words of the listed tiles of queries."""
    WORDS: tl.constexpr = C.WORDS
    for first in range(0, count, SPAN):
        place = first + tl.arange(0, SPAN)
        tile = tl.load(candidates + place, mask=place < count, other=0)
        for number in tl.static_range(WORDS):
            tl.store(words + tile * WORDS + number, tl.zeros((SPAN,), tl.int32), mask=place < count)


@triton.jit
def pair_flags(flags, unit, query_tile, key_tile, tiles, capacity, C: tl.constexpr):
    """The flags of a tile of queries of a chunk for a tile of keys. No tile of queries sees more than `capacity`."""
    place = (tl.cast(unit, tl.int64) * tiles + query_tile) * capacity + key_tile % capacity
    return flags + place * C.TILE


@triton.jit
def floor_pointers(floors, unit, row, sizes, C: tl.constexpr):
    """The first of two numbers of each query, rows in whole tiles."""
    rows = (sizes.query_length + C.TILE - 1) // C.TILE * C.TILE
    return floors + (tl.cast(unit, tl.int64) * rows + row) * 2


@triton.jit
def store_floors(floors, queries, threshold, C: tl.constexpr):
    """The floor of each query is its `lowest_reaching_score` for keys of 0. The second number is what this falls by for
    keys whose largest |component| is 1."""
    z_scale, error = queries.options.z_scale, rounding_of_options(queries, C)
    lowest = lowest_reaching_score(threshold.maximum, threshold.offset, error, z_scale)
    pointers = floor_pointers(floors, queries.unit, queries.row, queries.sizes, C)
    tl.store(pointers, lowest)
    # A row whose scores are all NaN may have a maximum of +inf, and so may its floor: NaN shows in the second number.
    tl.store(pointers + 1, (2.0 * rounding_of_product(queries, C) + 0.0 * error) / z_scale)


class FloorContext(NamedTuple):
    """What the queries of a head are compared with: a tile of keys, and the largest |component| of these."""

    keys: Keys
    largest: Tensor
    query: Matrix
    floors: Tensor
    unit: int
    options: KernelScoreOptions
    sizes: Sizes
    visibility: KernelVisibility


@triton.jit(do_not_specialize=UNSPECIALIZED)
def reaching_kernel(
    query, key, floors, reached_keys, lists, words, score_options, visibility, heads, group, query_length, key_length,
    first_unit, units, first_key, tile_capacity, row_capacity, C: tl.constexpr,
):  # fmt: skip
    """The words of one tile of keys and one query head, from the first tile of queries that sees it on, by one more
    product.

    A query is counted in as `lowest_reaching_score` says: so every positive probability is.
    """
    sizes = Sizes(heads, group, query_length, key_length)
    unit = first_unit + tl.program_id(0) % units
    tile = first_key + tl.program_id(0) // units
    index = launch_index(unit, tile, units, first_unit, first_key)
    row = words + tl.cast(index, tl.int64) * ((query_length + C.TILE - 1) // C.TILE) * C.WORDS
    places = open_query_list(lists, index, tile_capacity, row_capacity).candidates
    listed = tiles_that_reach(places, tile_capacity, row, reached_keys, unit, tile, sizes, visibility, C)
    keys = open_keys(key_head(key, unit, sizes), open_tile(tile, C), sizes, True, C)
    components = keys.k.to(tl.float32)
    # Not finite if any component is not: a sum sees what a maximum overlooks.
    largest = tl.max(tl.max(tl.abs(components), 1), 0) + 0.0 * tl.sum(tl.sum(components, 0), 0)
    options = open_options(score_options, unit, sizes, C)
    head = query_head(query, unit, sizes)
    context = FloorContext(keys, largest, head, floors, unit, options, sizes, visibility)
    store_words(row, places, 0, listed.split, context, False, C)
    store_words(row, places, listed.split, listed.count, context, True, C)


@triton.jit
def tiles_that_reach(places, capacity, row, reached_keys, unit, tile, sizes, visibility, C: tl.constexpr):
    """The list of the tiles of queries whose records name a tile of keys. The words of all that see it become 0."""
    WORDS: tl.constexpr = C.WORDS
    query_tiles = (sizes.query_length + C.TILE - 1) // C.TILE
    front, back = 0, 0
    for first in range(first_reaching_tile(tile, sizes, C), query_tiles, SPAN):
        candidate = first + tl.arange(0, SPAN)
        inside = candidate < query_tiles
        record = open_record(reached_keys, unit * query_tiles + tl.minimum(candidate, query_tiles - 1), sizes, C)
        word = tl.load(record.live + tile // WORD, mask=inside, other=0)
        for number in tl.static_range(WORDS):
            tl.store(row + candidate * WORDS + number, tl.zeros((SPAN,), tl.int32), mask=inside)
        own_tile = tl.full((SPAN,), 0, tl.int32) + tile  # Triton's interpreter would miscount a filter's one kind
        unmasked = are_whole(unit, candidate, own_tile, sizes, visibility, C)
        unmasked = unmasked & ((candidate + 1) * C.TILE <= sizes.query_length)
        counts = append_tiles(places, capacity, (front, back), candidate, (word >> (tile % WORD)) & 1, unmasked)
        front, back = counts
    return close_list(places, capacity, (front, back))


@triton.jit
def store_words(row, places, begin, end, context, MASKED: tl.constexpr, C: tl.constexpr):
    """The words of the tiles of queries at some places of a list.

    The queries at one place of WORD tiles have a bit each in one number. Numbers are turned into words at the end of
    these tiles: with each tile, all warps would wait for one another.
    """
    TILE: tl.constexpr = C.TILE
    WORDS: tl.constexpr = C.WORDS
    BITS: tl.constexpr = C.BITS
    for first in range(begin, end, WORD):
        reached = tl.zeros((TILE,), tl.int32)
        for n in range(first, tl.minimum(first + WORD, end)):
            block = open_tile(tl.load(places + n), C)
            reached |= is_reaching(block, context, MASKED, C) << (n - first)
        place = first + tl.arange(0, WORD)
        tile = tl.load(places + place, mask=place < end, other=0)
        bits = (tl.reshape(reached, (WORDS, BITS))[:, :, None] >> tl.arange(0, WORD)[None, None, :]) & 1
        pointers = row + tile[None, :] * WORDS + tl.arange(0, WORDS)[:, None]
        tl.store(pointers, tl.sum(bits << tl.arange(0, BITS)[None, :, None], 1), mask=(place < end)[None, :])


@triton.jit
def is_reaching(block, context, MASKED: tl.constexpr, C: tl.constexpr):
    """1 for each query of a tile that may reach a key, else 0. A query with a score that may be NaN does.

    A maximum overlooks NaN. It comes of components that are not finite, which `fall` shows, or of an overflow.
    """
    sizes = context.sizes
    queries = open_queries(context.query, context.unit, block, context.options, sizes, context.visibility, MASKED, C)
    score, _ = scores(queries, context.keys, MASKED, C)
    highest = tl.max(score, 1)
    pointers = floor_pointers(context.floors, context.unit, queries.row, sizes, C)
    floor, slope = tl.split(tl.load(pointers[:, None] + tl.arange(0, 2)[None, :]))
    fall = slope * context.largest
    lowest = tl.where(floor == float("inf"), float("inf"), floor - fall)
    # A product of finite numbers may be +inf, and so may its maximum: such a score reaches all the same.
    is_below = (highest <= lowest) & (highest < float("inf")) & (lowest > float("-inf"))
    reaching = tl.where(is_below & (fall < LARGEST_FALL), 0, 1)
    if MASKED:
        reaching = tl.where(queries.row < sizes.query_length, reaching, 0)
    return reaching

"""Which queries reach a tile of keys: their words by one more product, where the forward pass kept none; their list."""

import triton
import triton.language as tl

from .bound import rounding_of_z
from .gather import SPAN_TILES, RowCount, append_rows, fill_last_block, load_bits
from .keys import open_keys
from .lists import BlockList, append, append_tiles, close_list
from .mark import lowest_reaching_score
from .queries import open_options, open_queries, open_threshold
from .reach import open_record, row_quota
from .score import transposed_scores
from .tile import UNSPECIALIZED, WORD, Sizes, key_head, open_tile, query_head
from .visibility import are_whole

SPAN = tl.constexpr(64)


@triton.jit
def first_reaching_tile(tile, sizes, C: tl.constexpr):
    """No tile of queries before this one sees a tile of keys."""
    first = 0
    if C.CAUSAL:
        first = tl.maximum(tile * C.TILE - (sizes.key_length - sizes.query_length), 0) // C.TILE
    return tl.minimum(first, (sizes.query_length + C.TILE - 1) // C.TILE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def reaching_kernel(
    query, key, maximum, offset, reached_keys, lists, words, score_options, visibility, heads, group, query_length,
    key_length, first_unit, units, first_tile, capacity, C: tl.constexpr,
):  # fmt: skip
    """The words of one tile of keys and one query head, for every tile of queries. Here a unit is a query head.

    A query is counted in as `lowest_reaching_score` says: so every positive probability is.
    """
    WORDS: tl.constexpr = C.WORDS
    sizes = Sizes(heads, group, query_length, key_length)
    unit = first_unit + tl.program_id(0) % units
    tile = first_tile + tl.program_id(0) // units
    index = (unit - first_unit) * (tl.num_programs(0) // units) + tile - first_tile
    query_tiles = (query_length + C.TILE - 1) // C.TILE
    places = lists + tl.cast(index, tl.int64) * capacity
    row = words + tl.cast(index, tl.int64) * query_tiles * WORDS
    count = 0
    for first in range(0, query_tiles, SPAN):
        candidate = first + tl.arange(0, SPAN)
        inside = candidate < query_tiles
        record = open_record(reached_keys, unit * query_tiles + tl.minimum(candidate, query_tiles - 1), sizes, C)
        word = tl.load(record.live + tile // WORD, mask=inside, other=0)
        for number in tl.static_range(WORDS):
            tl.store(row + candidate * WORDS + number, tl.zeros((SPAN,), tl.int32), mask=inside)
        count = append(places, count, candidate, (word >> (tile % WORD)) & 1)
    tl.debug_barrier()
    options = open_options(score_options, unit, sizes, C)
    keys = open_keys(key_head(key, unit, sizes), open_tile(tile, C), sizes, True, C)
    largest = tl.max(tl.max(tl.abs(keys.k.to(tl.float32)), 1), 0)
    for n in range(count):
        block = open_tile(tl.load(places + n), C)
        queries = open_queries(query_head(query, unit, sizes), unit, block, options, sizes, visibility, True, C)
        threshold = open_threshold(maximum, offset, queries)
        error = rounding_of_z(queries, largest, C)
        lowest = lowest_reaching_score(threshold.maximum, threshold.offset, error, options.z_scale)
        score, _ = transposed_scores(queries, keys, True, C)
        reaching = tl.max(tl.where(score <= lowest[None, :], 0, 1), 0)
        bits = tl.reshape(tl.where(queries.row < query_length, reaching, 0), (WORDS, C.BITS))
        bits = tl.sum(bits << tl.arange(0, C.BITS)[None, :], 1)
        tl.store(row + block.tile * WORDS + tl.arange(0, WORDS), bits)


@triton.jit
def list_queries(places, capacity, words, unit, tile, begin, end, sizes, visibility, C: tl.constexpr):
    """The queries, from some tiles of one head, that may reach a tile of keys. `words` are those of its tiles.

    There are `capacity` places for the list of tiles, as many for tiles with some bit, and places for single queries.
    """
    candidates, rows = places + capacity, places + 2 * capacity
    WORDS: tl.constexpr = C.WORDS
    quota = row_quota(sizes.query_length, C)
    front, back = 0, 0
    count, last, before = 0, -1, -1
    tl.debug_barrier()  # all are done with what was listed in these places before
    alive_tiles = 0
    for first in range(begin, end, SPAN):
        candidate = first + tl.arange(0, SPAN)
        place = candidate[:, None] * C.WORDS + tl.arange(0, WORDS)[None, :]
        own_words = tl.load(words + place, mask=(candidate < end)[:, None], other=0)
        alive_tiles = append(candidates, alive_tiles, candidate, tl.max(tl.where(own_words != 0, 1, 0), 1))
    tl.debug_barrier()
    for first in range(0, alive_tiles, SPAN_TILES):
        place = first + tl.arange(0, SPAN_TILES)
        inside = place < alive_tiles
        candidate = tl.load(candidates + place, mask=inside, other=0)
        whole = are_whole(unit, candidate, tile, sizes, visibility, C)
        whole = whole & ((candidate + 1) * C.TILE <= sizes.query_length)
        flags = load_bits(words, candidate, inside, C)
        counted = RowCount(count, last, before)
        counted, taken = append_rows(rows, counted, quota, candidate, candidate, flags, inside & whole, C)
        count, last, before = counted
        tiles = append_tiles(places, capacity, (front, back), candidate, tl.where(inside & (taken == 0), 1, 0), whole)
        front, back = tiles
    listed = close_list(places, capacity, (front, back))
    pair = tl.where(tl.arange(0, 2) == 0, last, before)
    flags = load_bits(words, pair, pair >= 0, C)
    return BlockList(listed, rows, fill_last_block(rows, RowCount(count, last, before), pair, flags, C))

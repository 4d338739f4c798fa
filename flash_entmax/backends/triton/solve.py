"""The threshold of each row: single keys are listed, and Newton's steps go over them and the whole tiles.

tau = z_scale * maximum - offset, in units of z. Whenever a list gets shorter, the offset is at or above the true one.
So every list holds all support, and a sublist of the solve holds all support of the rows that it is for.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .alpha import is_settled, newton_step
from .certify import PLACES, SAFETY, set_bits, sublist, whole_tiles
from .gather import RowCount, append_rows, fill_last_block, load_flags
from .lists import BlockList, TileList, list_place, load_tile_list, row_block_count, store_counts
from .queries import Threshold, open_options, open_queries
from .query_lists import pair_flags
from .reach import open_record, record_index
from .sums import sums_at
from .tile import UNSPECIALIZED, Sizes, heaviest_first, key_head, load_row, open_tile, query_head, store_row

MAX_STEPS = tl.constexpr(40)
SPAN_TILES = tl.constexpr(32)  # tiles of keys that one step lists


class StoredMaxima(NamedTuple):
    """Pointers to each row's stored maxima, by place in the list; the margin: a tile is ruled out if maximum + margin +
    offset <= 0 for every row; places for a sublist."""

    column: Tensor
    margin: Tensor
    spare_places: Tensor


@triton.jit(do_not_specialize=UNSPECIALIZED)
def solve_kernel(
    query, key, maxima, maximum, offset, margin, flags, lists, sublists, counts, reached_keys, score_options,
    visibility, heads, group, query_length, key_length, first_unit, units, first_tile, capacity, is_marked,
    C: tl.constexpr,
):  # fmt: skip
    """Stores the `offset` of each row, and the lists of what may hold support: whole tiles in `sublists`, single keys
    in a record; for the backward, the rest of the record, which is 0 at first."""
    TILE: tl.constexpr = C.TILE
    sizes = Sizes(heads, group, query_length, key_length)
    unit, tile = heaviest_first(units, first_unit, first_tile)
    options = open_options(score_options, unit, sizes, C)
    block = open_tile(tile, C)
    queries = open_queries(query_head(query, unit, sizes), unit, block, options, sizes, visibility, True, C)
    index, places = list_place(lists, unit, tile, units, first_unit, first_tile, capacity)
    first_place = tl.cast(index, tl.int64) * capacity
    tiles = load_tile_list(places, counts, index)
    record = open_record(reached_keys, record_index(index, unit, tile, sizes, C), sizes, C)
    own_flags = pair_flags(flags, 0, index, 0, 0, capacity, C)
    row_blocks = list_keys(record, tiles, tiles.split * is_marked, own_flags, capacity, sizes, C)

    row_margin = load_row(margin, unit, queries.row, sizes, 0.0)
    row_maximum = load_row(maximum, unit, queries.row, sizes, float("inf"))
    certified = load_row(offset, unit, queries.row, sizes, 1.0)
    column = maxima + first_place * TILE + tl.arange(0, TILE)
    stored = StoredMaxima(column, row_margin, sublists + first_place)
    blocks = BlockList(whole_tiles(stored.spare_places, tiles), record.rows, row_blocks)
    row_offset = solve(queries, row_maximum, certified, tiles, blocks, stored, key_head(key, unit, sizes), C)
    row_offset = tl.minimum(row_offset, certified)  # what was left out was left out by this one
    depth = row_margin + row_offset * SAFETY
    if C.NEEDS_BACKWARD:
        whole = sublist(stored.spare_places, tiles, column, depth, record.live, C)
    else:
        whole = sublist(stored.spare_places, tiles, column, depth, None, C)

    store_row(offset, unit, queries.row, sizes, tl.where(row_maximum < float("inf"), row_offset, 1.0))
    store_counts(counts, index, whole)
    tl.store(row_block_count(counts, index), row_blocks)
    if C.NEEDS_BACKWARD:
        for first in range(0, whole.count, PLACES):
            place = first + tl.arange(0, PLACES)
            own = tl.load(whole.tiles + place, mask=place < whole.count, other=0)
            set_bits(record.whole, own, tl.where(place < whole.count, 1, 0))
        tl.store(record.row_blocks, row_blocks)


@triton.jit
def list_keys(record, tiles, marked, flags, capacity, sizes, C: tl.constexpr):
    """List the single keys of the first `marked` tiles. A tile that is so listed gets the number ~tile in its list.

    Returns the number of blocks of single keys.
    """
    rows, last, before = 0, -1, -1
    for first in range(0, marked, SPAN_TILES):
        place = first + tl.arange(0, SPAN_TILES)
        inside = place < marked
        tile = tl.load(tiles.tiles + place, mask=inside, other=0)
        own_flags = load_flags(flags, tile % capacity, inside, C)
        count = RowCount(rows, last, before)
        count, taken = append_rows(record.rows, count, record.quota, place, tile, own_flags, inside, C)
        tl.debug_barrier()  # all have read these numbers
        tl.store(tiles.tiles + place, ~tile, mask=taken)
        rows, last, before = count
    tl.debug_barrier()
    index = tl.where(tl.arange(0, 2) == 0, last, before)
    exists = index >= 0
    tile = ~tl.load(tiles.tiles + index, mask=exists, other=0)
    own_flags = load_flags(flags, tl.where(exists, tile, 0) % capacity, exists, C)
    return fill_last_block(record.rows, RowCount(rows, last, before), tile, own_flags, sizes.key_length, C)


@triton.jit
def solve(queries, maximum, offset, tiles, blocks, stored, key, C: tl.constexpr):
    """Newton's steps until the last one has settled every row of the tile.

    The first step is over all listed keys. Each further one is over the single keys, and the whole tiles that hold
    support of rows that are not settled. A step ends at or above the true offset, so any of them may be the last.
    """
    z_scale, exponent = queries.options.z_scale, queries.options.exponent
    places, split, count = blocks.whole
    # The offset of the pass before, and its sum u: before the first pass, nothing is known of how sum u falls.
    # Triton 3.6 finds what a loop carries by place, and miscounts after a name that only the condition reads: that
    # name comes last.
    last_offset = offset + 1.0
    last_weight = tl.full((C.TILE,), float("inf"), tl.float32)
    unsettled = tl.full((C.TILE,), 1, tl.int32)
    passes = 0
    unfinished = tiles.count
    while (unfinished > 0) & (passes < MAX_STEPS):
        threshold = Threshold(maximum, offset, z_scale / offset)
        listed = BlockList(TileList(places, split, count), blocks.rows, blocks.row_blocks)
        total, weight = sums_at(queries, threshold, listed, key, C)
        stepped = newton_step(offset, total, weight, exponent)
        falls = (unsettled > 0) & (total > 1.0) & (stepped < offset)
        weight_fall_rate = (last_weight - weight) / (last_offset - offset)
        settled = is_settled(total, weight, weight_fall_rate, exponent, C.SETTLE_TOLERANCE)
        last_offset = tl.where(falls, offset, last_offset)
        last_weight = tl.where(falls, weight, last_weight)
        offset = tl.where(falls, stepped, offset)
        unsettled = tl.where(falls & ~settled, 1, 0)
        passes += 1
        unfinished = tl.max(unsettled, 0)
        if unfinished > 0:
            depth = tl.where(unsettled > 0, stored.margin + offset * SAFETY, float("-inf"))
            shorter = sublist(stored.spare_places, tiles, stored.column, depth, None, C)
            places, split, count = stored.spare_places, shorter.split, shorter.count
    if not C.COMPENSATED:  # what the multiply-add may have lost
        lost = tl.where(maximum < float("inf"), tl.abs(maximum * z_scale) * 2.0**-22, 0.0)
        offset = tl.minimum(offset + lost, 1.0)
    return offset

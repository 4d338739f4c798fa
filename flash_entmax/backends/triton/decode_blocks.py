"""Decoding that leaves blocks of keys unread: their centre and radius bound the scores of all their keys.

    q . k <= q . c + |q| radius                      for every key of a block with centre c
    max_k q . k >= q . c - |q| centre_error          over the keys of a block that the row sees whole

The largest second line is a number that the row's maximum is not below. tau is at most 1 below this maximum, in units
of z. A block whose first line stays below tau for every row of a tile is not read. append.py says what both numbers
hold beside the distances: what the 8 bits, float32 and 16 bits left out.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...core import call
from .bound import block_alibi_penalty, largest_penalty, norm
from .decode import open_queries_of_group, tiles_of_split
from .lists import append
from .score import apply_softcap, products_by_key
from .tile import UNSPECIALIZED, Matrix, Sizes, head_of
from .visibility import HIDDEN, WHOLE, kinds_of

SUMMARY_BLOCK = tl.constexpr(call.SUMMARY_BLOCK)
NORM_ROUNDING = tl.constexpr(call.NORM_ROUNDING)
SMALLEST_ROUNDED = tl.constexpr(call.SMALLEST_ROUNDED)
TILES = tl.constexpr(64)  # tiles of keys that one step looks at


class KernelBlocks(NamedTuple):
    """The bounds of core.call.RoundedKeys as a launch takes them. The numbers are contiguous."""

    centre: Matrix
    radius: Tensor
    centre_error: Tensor


class Margin(NamedTuple):
    """Numbers of each row. A score is within `length * error + rest`, (1, rows), of one by rounded queries and keys.

    `largest` is the largest |component| of the query; where not `is_rounded`, its margin is infinite or NaN: (rows,).
    """

    length: Tensor
    rest: Tensor
    largest: Tensor
    is_rounded: Tensor


class GroupRows(NamedTuple):
    """What one of `splits` programs works on: rows of a key head `unit`, and their places in this launch."""

    unit: int
    split: int
    place: Tensor
    exists: Tensor
    first_place: int


@triton.jit
def rows_of_program(first_unit, rows, splits, C: tl.constexpr):
    """(GroupRows, the numbers of the rows among those of this launch)."""
    program, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    row_tiles = tl.cdiv(rows, C.ROWS)
    first = program % row_tiles * C.ROWS
    inner = first + tl.arange(0, C.ROWS)
    unit_place = tl.cast(program // row_tiles, tl.int64) * rows
    unit = first_unit + program // row_tiles
    return GroupRows(unit, split, unit_place + inner, inner < rows, unit_place + first), inner


@triton.jit
def margin_of(queries, C: tl.constexpr):
    """A softcap rises by at most what its score does, and its tanh, computed twice, is off by less than 2^-20. ALiBi
    takes the same from both scores, but for the roundings of both: 2^-20 of its largest penalty."""
    options = queries.options
    q = queries.q.to(tl.float32)
    largest = tl.max(tl.where(q == q, tl.abs(q), float("inf")), 1)
    is_rounded = (largest >= SMALLEST_ROUNDED) & (largest < float("inf"))
    length = tl.where(is_rounded | (largest == 0), norm(q, 1) * NORM_ROUNDING, float("inf"))[None, :]
    rest = tl.zeros_like(length)
    if C.SOFTCAP:
        rest += options.softcap * 2.0**-20
    if C.ALIBI:
        rest += largest_penalty(queries) * 2.0**-20
    return Margin(length, rest, largest, is_rounded)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def block_bounds_kernel(
    query, blocks, highest_of_tiles, least, bounds, score_options, visibility, heads, group, query_length, key_length,
    capacity, first_unit, first_row, rows, line, splits, C: tl.constexpr,
):  # fmt: skip
    """Of each row and tile of keys, a number that no score is above, -inf where the row sees no key of it; and of each
    row and split, a number that the row's maximum is not below."""
    sizes = Sizes(heads, group, query_length, key_length)
    own, inner = rows_of_program(first_unit, rows, splits, C)
    queries = open_queries_of_group(query, own.unit, first_row + inner, own.exists, score_options, sizes, visibility, C)
    margin = margin_of(queries, C)
    tiles = tiles_of_split(queries, own.exists, bounds + 2 * own.place, own.split, splits, C)
    key_heads = heads // group
    centre = head_of(blocks.centre, own.unit // key_heads, own.unit % key_heads)
    first_block = tl.cast(own.unit, tl.int64) * tl.cdiv(capacity, SUMMARY_BLOCK)
    line_of_tiles = own.place * (line // C.TILE)
    row_least = tl.full(inner.shape, float("-inf"), tl.float32)
    for first in range(tiles.begin, tiles.end, TILES):
        tile = first + tl.arange(0, TILES)
        block = tile * C.TILE // SUMMARY_BLOCK
        inside = tile < tiles.end
        score = centre_products(queries.q, centre, block, inside, C)
        radius = tl.load(blocks.radius + first_block + block, mask=inside, other=0.0)
        error = tl.load(blocks.centre_error + first_block + block, mask=inside, other=0.0)
        upper, _ = apply_softcap(score + margin.length * radius[:, None], queries.options.softcap, C)
        lower, _ = apply_softcap(score - margin.length * error[:, None], queries.options.softcap, C)
        if C.ALIBI:
            upper -= block_alibi_penalty(queries, tile, False, True, C)
            lower -= largest_alibi_penalty(queries, block, C)
        some, whole = seen_by_rows(queries, tile, block, C)
        # A softcap makes a finite bound of an infinite one, so the radius is asked as well.
        is_known = (upper == upper) & (radius < float("inf"))[:, None]
        upper = tl.where(is_known, upper + margin.rest, float("inf"))
        upper = tl.where(some, upper, float("-inf"))
        tl.store(
            highest_of_tiles + line_of_tiles[None, :] + tile[:, None], upper, mask=own.exists[None, :] & inside[:, None]
        )
        is_known = whole & inside[:, None] & (lower < float("inf"))
        row_least = tl.maximum(row_least, tl.max(tl.where(is_known, lower - margin.rest, float("-inf")), 0))
    tl.store(least + line_of_tiles + own.split, row_least, mask=own.exists)


@triton.jit
def centre_products(q, centre, block, inside, C: tl.constexpr):
    """(TILES, rows): query . centre of the blocks of some tiles."""
    column = tl.arange(0, C.HEAD_PADDED)[None, :]
    pointers = centre.data + (tl.cast(block, tl.int64) * centre.row_stride)[:, None] + column
    c = tl.load(pointers, mask=inside[:, None] & (column < C.HEAD), other=0.0)
    return products_by_key(q, c, False, C)


@triton.jit
def largest_alibi_penalty(queries, block, C: tl.constexpr):
    """(TILES, rows): over the keys of a whole block, which may be several tiles."""
    PER_BLOCK: tl.constexpr = SUMMARY_BLOCK // C.TILE
    penalty = block_alibi_penalty(queries, block * PER_BLOCK, True, True, C)
    for number in tl.static_range(1, PER_BLOCK):
        penalty = tl.maximum(penalty, block_alibi_penalty(queries, block * PER_BLOCK + number, True, True, C))
    return penalty


@triton.jit
def seen_by_rows(queries, tile, block, C: tl.constexpr):
    """(some, whole), (TILES, rows): whether a row may see a key of a tile, and whether it sees its block whole."""
    start, stop = queries.start[None, :], queries.stop[None, :]
    first, first_of_block = (tile * C.TILE)[:, None], (block * SUMMARY_BLOCK)[:, None]
    some = (start < stop) & (first < stop) & (first + C.TILE > start)
    whole = (first_of_block >= start) & (first_of_block + SUMMARY_BLOCK <= stop)
    if C.FILTERED:
        kinds = kinds_of(queries.unit, 0, tile[:, None], queries.sizes, queries.visibility, C)
        some = some & (kinds != HIDDEN)
        whole = whole & (kinds == WHOLE) & (C.TILE == SUMMARY_BLOCK)
    return some, whole


@triton.jit
def load_least(least, exists, splits):
    """(1, rows): the largest of what all splits found. `least` points to the first split of each row."""
    row_least = tl.full(least.shape, float("-inf"), tl.float32)
    for first in range(0, splits, TILES):
        split = first + tl.arange(0, TILES)
        inside = exists[None, :] & (split < splits)[:, None]
        numbers = tl.load(least[None, :] + split[:, None], mask=inside, other=float("-inf"))
        row_least = tl.maximum(row_least, tl.max(numbers, 0))
    return row_least[None, :]


@triton.jit
def list_reached_tiles(listed, places, least, z_scale, begin, end):
    """How many of these tiles some row may reach. Their numbers stand at `listed`. All others get no upper bound to
    look at: -inf."""
    count = 0
    for first in range(begin, end, TILES):
        tile = first + tl.arange(0, TILES)
        inside = places.exists[None, :] & (tile < end)[:, None]
        pointers = places.highest[None, :] + tile[:, None]
        upper = tl.load(pointers, mask=inside, other=float("-inf"))
        dead = ((upper - least) * z_scale <= -1.0 - 2.0**-20) | (upper == float("-inf"))
        alive = tl.max(tl.where(dead, 0, 1), 1)
        unread = inside & (alive == 0)[:, None]
        tl.store(pointers, tl.full(upper.shape, float("-inf"), tl.float32), mask=unread)
        tl.store(places.lowest[None, :] + tile[:, None], tl.full(upper.shape, float("-inf"), tl.float32), mask=unread)
        count = append(listed, count, tile, alive)
    tl.debug_barrier()
    return count

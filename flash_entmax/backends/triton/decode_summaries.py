"""Decoding that reads keys in 8 bits, and single keys as they are: exact, for half of the bytes.

Two kernels stand in for decode_scores and decode_solve:

    rounded_scores    keys in 8 bits -> a bound from above on each score, and by tile of keys bounds on its largest
    rounded_solve     one program a row: the keys that may have support, their scores, and all that decode_solve does

A query is rounded to two numbers of 8 bits, 256 high + low, so that its products with the keys are sums of integers,
without any rounding. A score by these is within the margin |q| error of the score, with the error of the key's block,
and the largest score of a tile is too. The lower bounds on the largest scores of tiles certify a threshold at or below
the true one. A key whose upper bound is not above it has no support. docs/math.md has the proof.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...core import call
from .decode import (
    PART,
    certified_offset,
    head_of_row,
    highest,
    is_spoiled,
    keep_support,
    open_queries_of_group,
    solve_offset,
    spoil,
    start_next,
    tiles_of_split,
    wait_for_previous,
)
from .decode_blocks import list_reached_tiles, load_least, margin_of, rows_of_program
from .decode_lists import RowScores, list_crowded, list_live_tiles
from .decode_values import store_output, weighted_values
from .keys import Keys
from .pages import open_batch_row
from .queries import open_options
from .score import alibi_penalty, apply_score_options, apply_softcap, sees_a_key
from .tile import UNSPECIALIZED, Matrix, Sizes, head_of, load_block, open_tile
from .visibility import visible_interval

SUMMARY_BLOCK = tl.constexpr(call.SUMMARY_BLOCK)
LARGEST_QUERY = tl.constexpr(call.LARGEST_ROUNDED_QUERY)
NO_TILE = tl.constexpr(2**24)
GATHERED = tl.constexpr(2**13)  # numbers of the keys that a row's program loads at a time


class KernelRoundedKeys(NamedTuple):
    """core.call.RoundedKeys as a launch takes them. unit and error are contiguous, or those of one key head."""

    rounded: Matrix
    unit: Tensor
    error: Tensor


class BoundPlaces(NamedTuple):
    """Pointers to the bounds on the scores of the rows of a program, and on the largest of a tile of keys."""

    highest_scores: Tensor
    highest: Tensor
    lowest: Tensor
    exists: Tensor


class RoundedQueries(NamedTuple):
    """Queries as unit * (256 high + low), the last two int8; and the two numbers of their margins.

    A score is within `length * error + rest` of that by the rounded query and key. high and low are (rows,
    HEAD_PADDED), the others (1, rows).
    """

    high: Tensor
    low: Tensor
    unit: Tensor
    length: Tensor
    rest: Tensor


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rounded_scores_kernel(
    query, rounded_keys, least, listed, highest_scores, highest_of_tiles, lowest_of_tiles, bounds, score_options,
    visibility, heads, group, query_length, key_length, capacity, first_unit, first_row, rows, line, splits,
    C: tl.constexpr,
):  # fmt: skip
    """A number that the score of each row and key is not above, -inf where the row does not see the key; and of each
    tile, numbers that its largest score is not above, and not below. `bounds` as of decode_scores_kernel.

    With `least`, decode_blocks.py has bounded all tiles. Those that no row may reach are not read, and the others are
    listed at `listed`.
    """
    start_next(C)
    sizes = Sizes(heads, group, query_length, key_length)
    own, inner = rows_of_program(first_unit, rows, splits, C)
    queries = open_queries_of_group(query, own.unit, first_row + inner, own.exists, score_options, sizes, visibility, C)
    rounded_queries = round_queries(queries, C)
    tiles = tiles_of_split(queries, own.exists, bounds + 2 * own.place, own.split, splits, C)
    keys = rounded_head(rounded_keys, own.unit, capacity, sizes)
    line_of_tiles = own.place * (line // C.TILE)
    places = BoundPlaces(
        highest_scores + own.place * line, highest_of_tiles + line_of_tiles, lowest_of_tiles + line_of_tiles, own.exists
    )
    if least is not None:
        least = load_least(least + line_of_tiles, own.exists, splits)
        listed += own.first_place * (line // C.TILE)
    first_end, last_begin = tl.minimum(tiles.first_whole, tiles.end), tl.maximum(tiles.last_whole, tiles.begin)
    bound_tiles(queries, rounded_queries, keys, places, least, listed, tiles.begin, first_end, True, C)
    bound_tiles(queries, rounded_queries, keys, places, least, listed, tiles.first_whole, tiles.last_whole, False, C)
    bound_tiles(queries, rounded_queries, keys, places, least, listed, last_begin, tiles.end, True, C)


@triton.jit
def bound_tiles(
    queries, rounded_queries, keys, places, least, listed, begin, end, MASKED: tl.constexpr, C: tl.constexpr
):
    """Store the bounds of some tiles of keys."""
    if least is None:
        bound_scores(queries, rounded_queries, keys, places, None, begin, end, MASKED, C)
    else:
        listed += begin
        count = list_reached_tiles(listed, places, least, queries.options.z_scale, begin, end)
        bound_scores(queries, rounded_queries, keys, places, listed, 0, count, MASKED, C)


@triton.jit
def rounded_head(keys, unit, capacity, sizes):
    """The keys of one key head."""
    key_heads = sizes.heads // sizes.group
    unit = tl.cast(unit, tl.int64)
    rounded = head_of(keys.rounded, unit // key_heads, unit % key_heads)
    return KernelRoundedKeys(rounded, keys.unit + unit * capacity, keys.error + unit * tl.cdiv(capacity, SUMMARY_BLOCK))


@triton.jit
def round_queries(queries, C: tl.constexpr):
    """Each component is off by half a unit, or little more. A query that is not finite, or so small that its unit is
    not, is replaced by 0; its margin is infinite or NaN."""
    margin = margin_of(queries, C)
    divisor = tl.where(margin.is_rounded, margin.largest, 1.0)
    unit = tl.where(margin.is_rounded, margin.largest * (1.0 / LARGEST_QUERY), 0.0)
    inverse = tl.where(margin.is_rounded, tl.div_rn(LARGEST_QUERY, divisor), 0.0)
    q = tl.where(margin.is_rounded[:, None], queries.q.to(tl.float32), 0.0)
    number = tl.floor(q * inverse[:, None] + 0.5).to(tl.int32)
    low = ((number + 128) & 255) - 128
    high = ((number - low) >> 8).to(tl.int8)
    return RoundedQueries(high, low.to(tl.int8), unit[None, :], margin.length, margin.rest)


@triton.jit
def bound_scores(queries, rounded_queries, keys, places, listed, begin, end, MASKED: tl.constexpr, C: tl.constexpr):
    """Store the bounds of the tiles of keys from `begin` up to `end`, or of those at these places of a list.

    A score that is not known is bounded by inf; its tile has no lower bound. A key without a unit makes its scores NaN,
    and so does a margin that is no number. The units and the error of a tile are loaded while the tile before it is
    multiplied.
    """
    exists = places.exists
    pointers = places.highest_scores[None, :] + tl.arange(0, C.TILE)[:, None]
    unit, error = load_units(keys, tile_at(listed, begin, end), queries.sizes.key_length, C)
    for number in range(begin, end):
        tile = tile_at(listed, number, end)
        next_unit, next_error = load_units(keys, tile_at(listed, number + 1, end), queries.sizes.key_length, C)
        block = open_tile(tile, C)
        rounded = load_block(keys.rounded, block, queries.sizes.key_length, MASKED, C.HEAD, C.HEAD_PADDED)
        product = product_of_integers(rounded_queries, rounded).to(tl.float32)
        # Integers and units of keys may be large where those of queries are small: by steps that stay in between.
        product = product * 2.0**-15 * unit[:, None] * (rounded_queries.unit * 2.0**15)
        tile_keys = Keys(tile, block.first, block.column, rounded)
        score, _ = apply_score_options(product, queries, tile_keys, MASKED, True, C)
        margin = rounded_queries.length * error + rounded_queries.rest
        upper = score + margin
        upper = tl.where(upper == upper, upper, float("inf"))
        if MASKED or C.ALIBI:
            upper = tl.where(score == float("-inf"), score, upper)  # hidden, also where the margin is infinite
        tl.store(pointers + tile * C.TILE, upper, mask=exists[None, :])
        largest = tl.max(upper, 0)
        lower = tl.where(largest < float("inf"), largest - 2.0 * tl.max(margin, 0), float("-inf"))
        tl.store(places.highest + tile, largest, mask=exists)
        tl.store(places.lowest + tile, lower, mask=exists)
        unit = next_unit
        error = next_error


@triton.jit
def tile_at(listed, number, end):
    """The tile at a place of a list, or of this number; one past all keys from `end` on."""
    if listed is None:
        tile = tl.where(number < end, number, NO_TILE)
    else:
        tile = tl.load(listed + number, mask=number < end, other=NO_TILE)
    return tile


@triton.jit
def load_units(keys, tile, key_length, C: tl.constexpr):
    """(units of the keys of a tile, error of its block); 0 past the last key."""
    number = tile * C.TILE + tl.arange(0, C.TILE)
    unit = tl.load(keys.unit + number, mask=number < key_length, other=0.0)
    return unit, tl.load(keys.error + tile * C.TILE // SUMMARY_BLOCK, mask=tile * C.TILE < key_length, other=0.0)


@triton.jit
def product_of_integers(queries, keys):
    """(keys, rows): (256 high + low) . rounded, below 2^31 for heads of 512."""
    product = tl.dot(keys, tl.trans(queries.high), out_dtype=tl.int32) * 256
    return tl.dot(keys, tl.trans(queries.low), acc=product, out_dtype=tl.int32)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rounded_solve_kernel(
    query, key, value, highest_scores, highest_of_tiles, lowest_of_tiles, bounds, live_tiles, support, counts, finished,
    output, score_options, visibility, heads, group, query_length, key_length, first_unit, first_row, rows, line,
    C: tl.constexpr,
):  # fmt: skip
    """As decode_solve_kernel, from bounds on the scores: of the keys that may have support, the scores are computed."""
    start_next(C)
    sizes = Sizes(heads, group, query_length, key_length)
    place = tl.cast(tl.program_id(0), tl.int64)
    batch, key_head, head, number = head_of_row(place, first_unit, first_row, rows, sizes)
    unit = batch * heads + head
    options = open_options(score_options, unit, sizes, C)
    wait_for_previous(C)
    begin, end = tl.load(bounds + 2 * place), tl.load(bounds + 2 * place + 1)
    tile_place = place * (line // C.TILE)
    weights, keys = highest_scores + place * line, support + place * line

    least = highest(lowest_of_tiles + tile_place, begin, end)
    lower = RowScores(lowest_of_tiles + tile_place, least, options.z_scale, options.exponent)
    offset = certified_offset(lower, begin, tl.where(least > float("-inf"), end, begin), C)
    z_scale = tl.where(options.z_scale == options.z_scale, options.z_scale, 0.0)  # where NaN, all keys are candidates
    upper = RowScores(highest_of_tiles + tile_place, least, z_scale, options.exponent)
    places = live_tiles + tile_place
    listed, _ = list_live_tiles(upper, upper.numbers, None, places, places, begin, end, offset)
    upper = RowScores(weights, least, z_scale, options.exponent)
    count = list_crowded(upper, keys, places, listed, offset, C)

    _, _, position = visible_interval(number + tl.arange(0, 1), unit, sizes, visibility, C)
    q = load_query(head_of(query, batch, head), number, C)
    score_candidates(q, position, head_of(key, batch, key_head), weights, keys, count, options, C)
    maximum = highest(weights, 0, count)
    row = RowScores(weights, maximum, options.z_scale, options.exponent)
    known = tl.where((maximum > float("-inf")) & (maximum < float("inf")), count, 0)
    offset, last_step = solve_offset(row, known, moved_offset(offset, least, row), C)
    count = keep_support(row, keys, known, offset, last_step, C)
    sees = sees_a_key(highest(highest_of_tiles + tile_place, begin, end), begin < end, C)
    count = spoil(weights, keys, count, is_spoiled(row, sees), begin, C)
    tl.store(counts + place, count)
    tl.store(finished + place, 0)
    if count <= PART:
        batch_row = open_batch_row(None, batch, 0, 0, sizes, C)
        total = weighted_values(head_of(value, batch, key_head), batch_row.table, keys, weights, 0, count, C)
        store_output(output, batch, head, number, batch_row, 0, total, C)


@triton.jit
def load_query(query, number, C: tl.constexpr):
    """(1, HEAD_PADDED) in float32."""
    column = tl.arange(0, C.HEAD_PADDED)
    pointers = query.data + tl.cast(number, tl.int64) * query.row_stride + column
    return tl.load(pointers, mask=column < C.HEAD, other=0.0).to(tl.float32)[None, :]


@triton.jit
def score_candidates(q, position, key, numbers, keys, count, options, C: tl.constexpr):
    """The scores of the listed keys, in place of their bounds. NaN counts as infinite: see `score_tiles` of decode.py.

    The row sees all of them: a hidden key's bound is -inf.
    """
    PADDED: tl.constexpr = C.HEAD_PADDED
    BLOCK: tl.constexpr = max(GATHERED // PADDED, 16)
    column = tl.arange(0, PADDED)[None, :]
    tl.debug_barrier()
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < count
        number = tl.load(keys + place, mask=inside, other=0)
        pointers = key.data + (tl.cast(number, tl.int64) * key.row_stride)[:, None] + column
        k = tl.load(pointers, mask=inside[:, None] & (column < C.HEAD), other=0.0)
        score, _ = apply_softcap(tl.sum(q * k.to(tl.float32), 1), options.softcap, C)
        if C.ALIBI:
            score -= alibi_penalty(tl.abs(position - number), options.alibi_slopes)
        tl.store(numbers + place, tl.where(score == score, score, float("inf")), mask=inside)
    tl.debug_barrier()


@triton.jit
def moved_offset(offset, least, row):
    """An offset below the row's maximum for one below the lower bound `least` on it: tau stays, up to its rounding."""
    moved = (offset + (row.maximum - least) * row.z_scale) * (1.0 + 2.0**-20)
    return tl.where(moved < 1.0, moved, 1.0)

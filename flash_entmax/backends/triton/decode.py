"""Few queries, many keys: every key is read once, and values only where there is support.

The queries of all heads that share a key head are multiplied by its keys at once, so that keys are read once. Three
kernels follow one another:

    decode_scores    keys split over programs -> the scores of all rows, and their maxima by tile of keys
    decode_solve     one program a row: the threshold, the list of its support, and the output of a short list
    decode_parts     the output of long lists, whose parts are split over programs and added in order

tau is final before any value is read, so the sums of parts add up as they are. A row's bits depend on its own query and
keys only: neither how the keys are split nor what else is in the batch changes the order of an addition.

A row, here and below, is one query of one query head. Products are (keys, rows): matrix units multiply 16 keys or more
by 8 rows or more, and a group of heads has few rows.

A launch takes `rows` rows, from `first_row` on, of each of some key heads, from number `first_unit` on. Row r of a key
head is query r % query_length of the head's query head r // query_length. `line` is how many numbers lie between the
scores of one row and those of the next: those of all tiles of keys. `table_stride`, `left` and `tokens` are for keys in
pages, see pages.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .alpha import certified_step, newton_step, probability_and_weight, support_weight
from .decode_lists import PLACES, RowScores, TileMaxima, append_keys, distances, list_candidates, load_numbers
from .decode_values import store_output, sum_of_parts, weighted_values
from .pages import interval_of_row, keys_of_batch_row, open_batch_row, open_keys_of_row
from .queries import Queries, open_options
from .score import LOWEST, apply_score_options, products_by_key, sees_a_key
from .tile import UNSPECIALIZED, Sizes, add_compensated, open_tile

PART = tl.constexpr(128)  # keys of a support whose values one program adds up
CERTIFY_STEPS = tl.constexpr(3)
MOST_STEPS = tl.constexpr(100)
TOLERANCE = tl.constexpr(1e-6)  # of F - 1; one last step, taken on the probabilities themselves, mends what it leaves


class ScorePlaces(NamedTuple):
    """Pointers to the scores and the maxima of the rows of a program, and which of these rows exist."""

    scores: Tensor
    maxima: TileMaxima
    exists: Tensor


class TileRange(NamedTuple):
    """Tiles of keys from `begin` up to `end`. Every row sees every key of those from `first_whole` up to `last_whole`,
    which need no mask."""

    begin: int
    first_whole: int
    last_whole: int
    end: int


@triton.jit(do_not_specialize=UNSPECIALIZED)
def decode_scores_kernel(
    query, key, row_scores, largest, second, largest_key, bounds, score_options, visibility, pages, heads, group,
    query_length, key_length, first_unit, first_row, rows, line, table_stride, left, tokens, splits, C: tl.constexpr,
):  # fmt: skip
    """Scores of each row and key that any row of its program sees, -inf where the row does not see the key; their
    maxima by tile of keys, see TileMaxima; and the tiles of keys that a row sees, from bounds[row, 0] up to
    bounds[row, 1]."""
    start_next(C)
    sizes = Sizes(heads, group, query_length, key_length)
    program, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    tiles = tl.cdiv(rows, C.ROWS)
    unit = first_unit + program // tiles
    inner = program % tiles * C.ROWS + tl.arange(0, C.ROWS)  # of the rows of this launch
    exists, row = inner < rows, first_row + inner
    key_heads = heads // group
    batch_row = open_batch_row(pages, unit // key_heads, table_stride, tokens, sizes, C)
    sizes = Sizes(heads, group, query_length, batch_row.key_length)
    queries = open_group(query, unit, row, exists, batch_row, left, score_options, sizes, visibility, C)
    place = tl.cast(program // tiles, tl.int64) * rows + inner
    tiles = tiles_of_split(queries, exists, bounds + 2 * place, split, splits, C)
    head = keys_of_batch_row(key, unit // key_heads, unit % key_heads, C)
    exists = queries.row < query_length
    maxima = maxima_of_rows(largest, second, largest_key, place * (line // C.TILE))
    places = ScorePlaces(row_scores + place * line, maxima, exists)
    first_end, last_begin = tl.minimum(tiles.first_whole, tiles.end), tl.maximum(tiles.last_whole, tiles.begin)
    score_tiles(queries, head, batch_row.table, places, tiles.begin, first_end, True, C)
    score_tiles(queries, head, batch_row.table, places, tiles.first_whole, tiles.last_whole, False, C)
    score_tiles(queries, head, batch_row.table, places, last_begin, tiles.end, True, C)


@triton.jit
def maxima_of_rows(largest, second, key, place):
    return TileMaxima(largest + place, second + place, key + place)


@triton.jit
def tiles_of_split(queries, exists, bounds, split, splits, C: tl.constexpr):
    """The tiles of keys of one of `splits` programs. The first of these stores which tiles a row sees."""
    sees = queries.start < queries.stop
    first_tile = tl.where(sees, queries.start // C.TILE, 0)
    last_tile = tl.where(sees, tl.cdiv(queries.stop, C.TILE), 0)
    if split == 0:
        tl.store(bounds, first_tile, mask=exists)
        tl.store(bounds + 1, last_tile, mask=exists)
    begin = tl.min(tl.where(sees, first_tile, queries.sizes.key_length), 0)
    end = tl.max(last_tile, 0)
    steps = tl.cdiv(tl.maximum(end - begin, 0), splits)
    begin += split * steps
    end = tl.minimum(begin + steps, end)
    exists = queries.row < queries.sizes.query_length
    first_whole = tl.maximum(tl.max(tl.where(exists, tl.cdiv(queries.start, C.TILE), 0), 0), begin)
    last_whole = tl.minimum(tl.min(tl.where(exists, queries.stop // C.TILE, queries.sizes.key_length), 0), end)
    if C.FILTERED:
        last_whole = first_whole
    return TileRange(begin, first_whole, tl.maximum(last_whole, first_whole), end)


@triton.jit
def score_tiles(queries, key, table, places, begin, end, MASKED: tl.constexpr, C: tl.constexpr):
    """Store the scores of some tiles of keys, and their maxima.

    NaN counts as infinite in a maximum: that of the row then says that a score is not finite.
    """
    exists = places.exists
    pointers = places.scores[None, :] + tl.arange(0, C.TILE)[:, None]
    for tile in range(begin, end):
        keys = open_keys_of_row(key, table, open_tile(tile, C), queries.sizes, MASKED, C)
        product = products_by_key(queries.q, keys.k, True, C)
        score, _ = apply_score_options(product, queries, keys, MASKED, True, C)
        tl.store(pointers + tile * C.TILE, score, mask=exists[None, :])
        store_maxima(places.maxima, tile, tl.where(score == score, score, float("inf")), exists, C)


@triton.jit
def store_maxima(maxima, tile, score, exists, C: tl.constexpr):
    """The two largest scores of a tile of keys, which may be equal, and the key of the first."""
    largest, first = tl.max(score, 0, return_indices=True)
    others = tl.where(tl.arange(0, C.TILE)[:, None] == first[None, :], float("-inf"), score)
    tl.store(maxima.largest + tile, largest, mask=exists)
    tl.store(maxima.second + tile, tl.max(others, 0), mask=exists)
    tl.store(maxima.key + tile, tile * C.TILE + first, mask=exists)


@triton.jit
def start_next(C: tl.constexpr):
    """From here on, the next kernel may start where there is room. It waits before it reads what this one writes."""
    if C.OVERLAPPED:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(C: tl.constexpr):
    """All that the kernels before have written is there."""
    if C.OVERLAPPED:
        gdc_wait()


@triton.jit
def open_queries_of_group(query, unit, row, exists, score_options, sizes, visibility, C: tl.constexpr):
    """`open_group` where keys are not in pages."""
    batch_row = open_batch_row(None, unit // (sizes.heads // sizes.group), 0, 0, sizes, C)
    return open_group(query, unit, row, exists, batch_row, 0, score_options, sizes, visibility, C)


@triton.jit
def open_group(
    query, unit, row, exists, batch_row, left, score_options, sizes, visibility, C: tl.constexpr
):  # fmt: skip
    """Rows of one key head as queries. Each has the numbers of its own query head, (1, rows)."""
    key_heads = sizes.heads // sizes.group
    batch, first_head = unit // key_heads, unit % key_heads * sizes.group
    head = first_head + tl.minimum(row // sizes.query_length, sizes.group - 1)
    number = tl.where(exists, row % sizes.query_length, sizes.query_length)
    if C.PACKED:
        number = tl.where((number >= batch_row.absent) & batch_row.fits, number, sizes.query_length)
        exists = number < sizes.query_length
    start, stop, position = interval_of_row(number, batch, left, sizes, visibility, C)
    head_unit = (batch * sizes.heads + head)[None, :]
    column = tl.arange(0, C.HEAD_PADDED)[None, :]
    query_row = batch_row.first + number
    places = tl.cast(head, tl.int64) * query.head_stride + tl.cast(query_row, tl.int64) * query.row_stride
    pointers = query.data + tl.cast(batch, tl.int64) * query.batch_stride + places[:, None] + column
    q = tl.load(pointers, mask=exists[:, None] & (column < C.HEAD), other=0.0)
    options = open_options(score_options, head_unit, sizes, C)
    return Queries(head_unit, 0, number, start, stop, position, q, options, sizes, visibility)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def decode_solve_kernel(
    value, row_scores, largest, second, largest_key, bounds, live_tiles, support, counts, finished, output,
    score_options, pages, heads, group, query_length, key_length, first_unit, first_row, rows, line, table_stride, left,
    tokens, C: tl.constexpr,
):  # fmt: skip
    """The support of one row: how many keys, their numbers in `support`, and their probabilities in place of the row's
    scores. If they are at most PART, the output as well."""
    start_next(C)
    sizes = Sizes(heads, group, query_length, key_length)
    place = tl.cast(tl.program_id(0), tl.int64)
    batch, key_head, head, number = head_of_row(place, first_unit, first_row, rows, sizes)
    batch_row = open_batch_row(pages, batch, table_stride, tokens, sizes, C)
    options = open_options(score_options, batch * heads + head, sizes, C)
    wait_for_previous(C)
    begin, end = tl.load(bounds + 2 * place), tl.load(bounds + 2 * place + 1)
    tiles = line // C.TILE
    maxima = maxima_of_rows(largest, second, largest_key, place * tiles)
    weights, keys = row_scores + place * line, support + place * line

    maximum = highest(maxima.largest, begin, end)
    last = tl.where((maximum > float("-inf")) & (maximum < float("inf")), end, begin)
    row = RowScores(maxima.largest, maximum, options.z_scale, options.exponent)
    offset = certified_offset(row, begin, last, C)
    row = RowScores(weights, maximum, options.z_scale, options.exponent)
    count = list_candidates(row, keys, maxima, live_tiles + place * tiles, tiles, begin, last, offset, C)
    offset, last_step = solve_offset(row, count, offset, C)
    count = keep_support(row, keys, count, offset, last_step, C)
    count = spoil(weights, keys, count, is_spoiled(row, sees_a_key(maximum, begin < end, C)), begin, C)
    tl.store(counts + place, count)
    tl.store(finished + place, 0)
    if count <= PART:
        total = weighted_values(
            keys_of_batch_row(value, batch, key_head, C), batch_row.table, keys, weights, 0, count, C
        )  # fmt: skip
        if C.PAGE:
            total = tl.where(batch_row.fits, total, float("nan"))
        store_output(output, batch, head, number, batch_row, tokens, total, C)


@triton.jit
def head_of_row(place, first_unit, first_row, rows, sizes):
    """(batch, key head, query head, query) of a row of a launch."""
    unit, row = first_unit + (place // rows).to(tl.int32), first_row + (place % rows).to(tl.int32)
    key_heads = sizes.heads // sizes.group
    batch, key_head = unit // key_heads, unit % key_heads
    return batch, key_head, key_head * sizes.group + row // sizes.query_length, row % sizes.query_length


@triton.jit
def highest(numbers, begin, end):
    """The largest of numbers[begin:end]; -inf of none."""
    maxima = tl.full((PLACES,), float("-inf"), tl.float32)
    for first in range(begin, end, PLACES):
        maxima = tl.maximum(maxima, load_numbers(numbers, first, end))
    return tl.max(maxima, 0)


@triton.jit
def sums_at(row, begin, end, offset, C: tl.constexpr):
    """(F, sum u) over numbers[begin:end] at an offset. Thousands of equal parts lose no digits.

    The numbers of a step are loaded while the step before it is added up.
    """
    total = tl.zeros((PLACES,), tl.float32)
    error = tl.zeros((PLACES,), tl.float32)
    weight = tl.zeros((PLACES,), tl.float32)
    number = load_numbers(row.numbers, begin, end)
    for first in range(begin, end, PLACES):
        next_number = load_numbers(row.numbers, first + PLACES, end)
        p, u = probability_and_weight(distances(row, number, offset), row.exponent, C.POWER, False)
        total, error = add_compensated(total, error, p)
        weight += u
        number = next_number
    return tl.sum(total, 0), tl.sum(weight, 0)


@triton.jit
def certified_offset(row, begin, end, C: tl.constexpr):
    """An offset at or above the true one: maxima are a subset of the scores, and Newton's steps end above the root."""
    offset = 1.0
    for _ in range(CERTIFY_STEPS):
        total, weight = sums_at(row, begin, end, offset, C)
        offset = certified_step(offset, total, weight, row.exponent, tl.cdiv(end - begin, PLACES))
    return offset


@triton.jit
def solve_offset(row, count, offset, C: tl.constexpr):
    """(offset, last_step): the offset of a row from the scores of its candidates. Each step ends at or above the true
    one. The last is for the probabilities, see `keep_support`."""
    total, weight = sums_at(row, 0, count, offset, C)
    stepped = newton_step(offset, total, weight, row.exponent)
    steps = 0
    while (total > 1.0 + TOLERANCE) & (stepped < offset) & (steps < MOST_STEPS):
        offset = stepped
        total, weight = sums_at(row, 0, count, offset, C)
        stepped = newton_step(offset, total, weight, row.exponent)
        steps += 1
    return offset, tl.where(weight == 0, 0.0, (1.0 - total) / weight)


@triton.jit
def keep_support(row, keys, count, offset, last_step, C: tl.constexpr):
    """How many keys have a positive probability p = u [d + last_step]_+. It stands in place of their score.

    dF / d offset = r sum u and p = d^r, so this step brings sum p to 1 up to the square of what was left.
    """
    kept = 0
    for first in range(0, count, PLACES):
        d = distances(row, load_numbers(row.numbers, first, count), offset)
        p = support_weight(d, row.exponent, C.POWER) * tl.maximum(d + last_step, 0.0)
        place = first + tl.arange(0, PLACES)
        key = tl.load(keys + place, mask=place < count, other=0)
        kept = append_keys(row.numbers, keys, kept, p, key, tl.where(p > 0, 1, 0))
    return kept


@triton.jit
def is_spoiled(row, sees):
    """Whether the maximum of a row that sees keys says that a score is NaN or inf, or that all of them are -inf, or
    whether its alpha or scale is NaN."""
    maximum = row.maximum
    return sees & ((maximum == float("inf")) | (maximum <= LOWEST) | (row.z_scale != row.z_scale))


@triton.jit
def spoil(weights, keys, count, spoiled, first_tile, C: tl.constexpr):
    """A row with a score that is not finite attends to a key with probability NaN."""
    tl.store(weights, float("nan"), mask=spoiled)
    tl.store(keys, first_tile * C.TILE, mask=spoiled)
    tl.debug_barrier()
    return tl.where(spoiled, 1, count)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def decode_parts_kernel(
    value, weights, support, counts, finished, parts, output, pages, heads, group, query_length, key_length,
    first_unit, first_row, rows, line, table_stride, left, tokens, splits, C: tl.constexpr,
):  # fmt: skip
    """The output of a row whose support has more than PART keys. Each program adds up some parts of it. The one that
    finishes last adds the parts, in order."""
    sizes = Sizes(heads, group, query_length, key_length)
    place, split = tl.cast(tl.program_id(0) // splits, tl.int64), tl.program_id(0) % splits
    wait_for_previous(C)
    count = tl.load(counts + place)
    part_count = tl.where(count > PART, tl.cdiv(count, PART), 0)
    if split < part_count:
        batch, key_head, head, number = head_of_row(place, first_unit, first_row, rows, sizes)
        batch_row = open_batch_row(pages, batch, table_stride, tokens, sizes, C)
        row_parts = parts + place * tl.cdiv(line, PART) * C.VALUE_PADDED + tl.arange(0, C.VALUE_PADDED)
        keys, row_weights = support + place * line, weights + place * line
        for part in range(split, part_count, splits):
            end = tl.minimum(part * PART + PART, count)
            total = weighted_values(
                keys_of_batch_row(value, batch, key_head, C), batch_row.table, keys, row_weights, part * PART, end, C
            )  # fmt: skip
            tl.store(row_parts + part * C.VALUE_PADDED, total)
        tl.debug_barrier()
        if tl.atomic_add(finished + place, 1) == tl.minimum(splits, part_count) - 1:
            tl.debug_barrier()
            total = sum_of_parts(row_parts, part_count, C)
            store_output(output, batch, head, number, batch_row, tokens, total, C)

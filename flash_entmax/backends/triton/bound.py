"""Before any score: a bound on whole blocks of keys rules out tiles, with one sixty-fourth of the scan's products.

A block is the keys of one tile. Its centre c is close to the mean of these keys. For each key k of the block and any
query q

    q . k <= q . c + |q| radius        radius = max_k |k - c|
    max_k q . k >= q . mean >= q . c - |q| error        error = |mean - c|, what rounding took from c

The second line bounds the row's maximum from below. tau is at most 1 below this maximum, in units of z. A block whose
first line stays below tau for every query of a tile holds no support. So blocks of similar keys far from the queries
are never scanned. Wide blocks are not ruled out, and cost little time. A softcap rises with its score, and is applied
to both lines. The first line takes ALiBi's least penalty over the block, the second its largest.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...core import call
from .lists import append_tiles, close_list
from .score import alibi_penalty, apply_softcap, by_key, by_query
from .tile import UNSPECIALIZED, Matrix, head_of, key_head, load_tile
from .visibility import HIDDEN, WHOLE, are_whole, kinds_of, seen_tiles

BLOCKS = tl.constexpr(64)  # blocks of keys that one step looks at
NORM_ROUNDING = tl.constexpr(call.NORM_ROUNDING)


class KernelKeySummary(NamedTuple):
    """core.call.KeySummary as a launch takes it. The numbers are contiguous."""

    centre: Matrix
    radius: Tensor
    error: Tensor
    largest: Tensor


@triton.jit(do_not_specialize=UNSPECIALIZED)
def summary_kernel(key, summary, heads, group, query_length, key_length, C: tl.constexpr):
    """The summary of each block of keys."""
    TILE: tl.constexpr = C.TILE
    blocks = (key_length + TILE - 1) // TILE
    unit, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    key_heads = heads // group
    first = block * TILE
    head = head_of(key, unit // key_heads, unit % key_heads)
    k = load_tile(head, first, key_length, TILE, C.HEAD, C.HEAD_PADDED).to(tl.float32)
    inside = tl.arange(0, TILE) < key_length - first
    mean = tl.sum(k, 0) / tl.minimum(key_length - first, TILE)
    rounded = mean.to(summary.centre.data.dtype.element_ty)
    column = tl.arange(0, C.HEAD_PADDED)
    centre = head_of(summary.centre, unit // key_heads, unit % key_heads)
    tl.store(centre.data + tl.cast(block, tl.int64) * centre.row_stride + column, rounded, mask=column < C.HEAD)
    away = k - rounded.to(tl.float32)[None, :]
    distance = norm(away, 1)
    distance = tl.where(distance == distance, distance, float("inf"))  # a maximum leaves NaN out
    distance = tl.where(inside, distance, 0.0)
    missed = mean - rounded.to(tl.float32)
    index = tl.program_id(0)
    tl.store(summary.radius + index, tl.max(distance, 0) * NORM_ROUNDING)
    tl.store(summary.error + index, tl.max(norm(missed[None, :], 1), 0) * NORM_ROUNDING)
    # Not finite if any component of the block is not: a sum sees what a maximum overlooks.
    tl.store(summary.largest + index, tl.max(tl.max(tl.abs(k), 1), 0) + 0.0 * tl.sum(tl.sum(k, 0), 0))


@triton.jit
def bound_tiles(places, capacity, queries, last_tile, summary, C: tl.constexpr):
    """(tiles, maximum_bound, score_error): the list of the tiles that the bounds leave; a number that each row's
    maximum of the scores is not below, 0 where there is none; how far rounding may move a z.

    The queries are those of queries.tile, or up to those of `last_tile`, which see no fewer keys.
    """
    options, sizes, visibility = queries.options, queries.sizes, queries.visibility
    unit, tile = queries.unit, queries.tile
    query_norm = norm(queries.q.to(tl.float32), 1) * NORM_ROUNDING
    begin, end = seen_tiles(unit, last_tile, sizes, visibility, C)
    blocks = (sizes.key_length + C.TILE - 1) // C.TILE
    group = sizes.group
    first_block = (unit // sizes.heads * (sizes.heads // group) + unit % sizes.heads // group) * blocks
    centre = key_head(summary.centre, unit, sizes)

    # Blocks that a query sees whole bound its maximum from below.
    maximum_bound = tl.full(query_norm.shape, float("-inf"), tl.float32)
    largest = 0.0
    for first in range(begin, end, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        score = centre_scores(queries.q, centre, first, blocks, C)
        error = tl.load(summary.error + first_block + block, mask=block < end, other=0.0)
        lowest, _ = apply_softcap(score - query_norm[:, None] * error[None, :], options.softcap, C)
        if C.ALIBI:
            lowest -= block_alibi_penalty(queries, block, True, False, C)
        _, whole = seen_blocks(queries, block, end, C)
        maximum_bound = tl.maximum(maximum_bound, tl.max(tl.where(whole, lowest, float("-inf")), 1))
        components = tl.load(summary.largest + first_block + block, mask=block < end, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.where(components == components, components, float("inf")), 0))
    score_error = rounding_of_z(queries, largest, C)

    # A NaN, an error without limit, or no bound at all keeps every tile. A row that sees no key keeps none.
    depth = tl.where(queries.stop > queries.start, -1.0 - 4.0 * score_error, float("inf"))
    front = 0
    back = 0
    for first in range(begin, end, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        radius = tl.load(summary.radius + first_block + block, mask=block < end, other=0.0)
        score = centre_scores(queries.q, centre, first, blocks, C)
        highest, _ = apply_softcap(score + query_norm[:, None] * radius[None, :], options.softcap, C)
        if C.ALIBI:
            highest -= block_alibi_penalty(queries, block, False, False, C)
        some, _ = seen_blocks(queries, block, end, C)
        dead = (highest - maximum_bound[:, None]) * options.z_scale <= depth[:, None]
        alive = tl.max(tl.where(some & (dead == 0), 1, 0), 0)
        whole = are_whole(unit, tile, block, sizes, visibility, C)
        front, back = append_tiles(places, capacity, (front, back), block, alive, whole)
    tiles = close_list(places, capacity, (front, back))
    return tiles, tl.where(maximum_bound > float("-inf"), maximum_bound, 0.0), score_error


@triton.jit
def rounding_of_z(queries, largest, C: tl.constexpr):
    """How far z may move when a score is computed in another way. `largest` is the largest |component| of any key.

    Two ways to add the same products differ by at most 2^-22 HEAD sum_i |q_i k_i| <= 2^-22 HEAD |q|_1 max |k|. The
    tanh of a softcap, computed twice, is off by less than 2^-20, and an ALiBi penalty by 2^-22 of the largest one. An
    infinite slope hides its keys, and adds no error.
    """
    return rounding_of_product(queries, C) * largest + rounding_of_options(queries, C)


@triton.jit
def rounding_of_product(queries, C: tl.constexpr):
    """What the product adds to `rounding_of_z`, for keys whose largest |component| is 1."""
    return queries.options.z_scale * C.HEAD * 2.0**-22 * tl.sum(tl.abs(queries.q.to(tl.float32)), 1)


@triton.jit
def rounding_of_options(queries, C: tl.constexpr):
    """What softcap and ALiBi add to `rounding_of_z`."""
    options = queries.options
    error = tl.zeros(queries.row.shape, tl.float32)
    if C.SOFTCAP:
        error += options.z_scale * options.softcap * 2.0**-20
    if C.ALIBI:
        error += options.z_scale * largest_penalty(queries) * 2.0**-22
    return error


@triton.jit
def largest_penalty(queries):
    """The most that ALiBi takes from a score of each query. An infinite slope hides its keys, and counts as 0."""
    slopes = queries.options.alibi_slopes
    furthest = tl.maximum(tl.abs(queries.position - queries.start), tl.abs(queries.position - queries.stop))
    return tl.where(slopes == float("inf"), 0.0, tl.abs(slopes)) * furthest.to(tl.float32)


@triton.jit
def seen_blocks(queries, block, end, C: tl.constexpr):
    """(some, whole), each (queries or 1, BLOCKS): whether a query may see a key of a block, and whether it sees all."""
    sizes, visibility = queries.sizes, queries.visibility
    some = (block < end)[None, :]
    if C.INTERVALS:
        first = (block * C.TILE)[None, :]
        start, stop = queries.start[:, None], queries.stop[:, None]
        some = some & (start < stop) & (first < stop) & (first + C.TILE > start)
        whole = (first >= start) & (first + C.TILE <= stop)
        if C.FILTERED:
            kinds = kinds_of(queries.unit, queries.tile, block, sizes, visibility, C)[None, :]
            some, whole = some & (kinds != HIDDEN), whole & (kinds == WHOLE)
    else:
        whole = are_whole(queries.unit, queries.tile, block, sizes, visibility, C)[None, :]
        if C.FILTERED:
            some = some & (kinds_of(queries.unit, queries.tile, block, sizes, visibility, C) != HIDDEN)[None, :]
    return some, whole & some


@triton.jit
def block_alibi_penalty(queries, block, LARGEST: tl.constexpr, TRANSPOSED: tl.constexpr, C: tl.constexpr):
    """(queries, BLOCKS), or the transpose: the largest, or the least, ALiBi penalty of a block's keys."""
    first = by_key(block * C.TILE, TRANSPOSED)
    last = tl.minimum(first + C.TILE, queries.sizes.key_length) - 1
    position = by_query(queries.position, TRANSPOSED)
    nearest = tl.maximum(tl.maximum(first - position, position - last), 0)
    furthest = tl.maximum(tl.abs(position - first), tl.abs(position - last))
    near = alibi_penalty(nearest, queries.options.alibi_slopes)
    far = alibi_penalty(furthest, queries.options.alibi_slopes)
    return tl.maximum(near, far) if LARGEST else tl.minimum(near, far)


@triton.jit
def norm(x, AXIS: tl.constexpr):
    """Euclidean lengths. No square under- or overflows."""
    largest = tl.max(tl.abs(x), AXIS)
    ratio = x / tl.expand_dims(tl.where(largest > 0, largest, 1.0), AXIS)
    return largest * tl.sqrt(tl.sum(ratio * ratio, AXIS))


@triton.jit
def centre_scores(q, centre, first, blocks, C: tl.constexpr):
    """(queries, BLOCKS): query . centre."""
    c = load_tile(centre, first, blocks, BLOCKS, C.HEAD, C.HEAD_PADDED)
    return tl.dot(q, tl.trans(c), input_precision=C.PRECISION)

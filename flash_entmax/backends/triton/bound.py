"""Before any score: tiles that a bound on whole blocks of keys rules out, at one sixty-fourth of the scan's products.

A block (the keys of one tile) has a centre c close to its mean. For each of its keys k and any query q

    q . k <= q . c + |q| radius        radius = max_k |k - c|
    max_k q . k >= q . mean >= q . c - |q| error        error = |mean - c|, what rounding c left

The second line bounds the row's maximum from below, tau is at most 1 below that maximum (in units of z), and a block
whose first line stays below tau for every query of a tile holds no support. Tight blocks far from the queries are
never scanned; where blocks are wide nothing is ruled out, and little time is lost. A softcap grows with its score, so
it is taken of both lines; ALiBi takes its least over the block from the first and its most from the second.
"""

import triton
import triton.language as tl

from .lists import append_tiles, close_list
from .score import capped, lean
from .tile import SIZES, head_of, key_head, load_tile
from .visibility import ALL, NONE, are_whole, kinds_of, seen_tiles

BLOCKS = tl.constexpr(64)  # blocks of keys that one step looks at
NORM_ROUNDING = tl.constexpr(1.0 + 2.0**-10)  # lifts lengths above what float32 sums, and 16 bits, may take from them


@triton.jit(do_not_specialize=SIZES)
def summary_kernel(key, centre, radius, error, largest, heads, group, query_length, key_length, S: tl.constexpr):
    """Each block's centre in the keys' dtype, its radius, the error of its centre, and its largest |component|."""
    TILE: tl.constexpr = S.TILE
    blocks = (key_length + TILE - 1) // TILE
    unit, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    key_heads = heads // group
    first = block * TILE
    k = load_tile(head_of(key, unit // key_heads, unit % key_heads), first, key_length, TILE, S.HEAD, S.HEAD_PADDED).to(
        tl.float32
    )
    inside = tl.arange(0, TILE) < key_length - first
    mean = tl.sum(k, 0) / tl.minimum(key_length - first, TILE)
    rounded = mean.to(centre.data.dtype.element_ty)
    column = tl.arange(0, S.HEAD_PADDED)
    row = head_of(centre, unit // key_heads, unit % key_heads)
    tl.store(row.data + tl.cast(block, tl.int64) * row.row_stride + column, rounded, mask=column < S.HEAD)
    away = k - rounded.to(tl.float32)[None, :]
    length = tl.where(inside, norm(away, 1), 0.0)
    missed = mean - rounded.to(tl.float32)
    index = tl.program_id(0)
    tl.store(radius + index, tl.max(length, 0) * NORM_ROUNDING)
    tl.store(error + index, tl.max(norm(missed[None, :], 1), 0) * NORM_ROUNDING)
    # Not finite if anything in the block is not: a sum sees what a maximum overlooks.
    tl.store(largest + index, tl.max(tl.max(tl.abs(k), 1), 0) + 0.0 * tl.sum(tl.sum(k, 0), 0))


@triton.jit
def bound_tiles(places, capacity, queries, summary, slope, extent, view, S: tl.constexpr):
    """(tiles, below, noise): the list of the tiles that the bounds leave; each row's bound from below on its maximum of
    the scores, 0 where there is none; how far rounding may move a z."""
    TILE: tl.constexpr = S.TILE
    centre, radius, error, largest = summary
    unit, tile = queries.unit, queries.tile
    length = norm(queries.q.to(tl.float32), 1) * NORM_ROUNDING
    begin, end = seen_tiles(unit, tile, extent, view, S)
    blocks = (extent.key_length + TILE - 1) // TILE
    group = extent.group
    first_block = (unit // extent.heads * (extent.heads // group) + unit % extent.heads // group) * blocks
    centre = key_head(centre, unit, extent)

    # The bound from below takes blocks that a query sees whole.
    below = tl.full((TILE,), float("-inf"), tl.float32)
    bound = 0.0
    for first in range(begin, end, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        score = centre_scores(queries.q, centre, first, blocks, S)
        lost = tl.load(error + first_block + block, mask=block < end, other=0.0)
        lowest, _ = capped(score - length[:, None] * lost[None, :], queries.cap, S)
        if S.ALIBI:
            lowest -= block_lean(queries, block, extent, True, S)
        _, whole = seen_blocks(queries, block, end, extent, view, S)
        below = tl.maximum(below, tl.max(tl.where(whole, lowest, float("-inf")), 1))
        components = tl.load(largest + first_block + block, mask=block < end, other=0.0)
        bound = tl.maximum(bound, tl.max(tl.where(components == components, components, float("inf")), 0))
    noise = score_noise(queries, bound, slope, S)

    # NaN, or noise without end, leaves every tile, and so does the lack of a bound; a row without keys leaves none.
    depth = tl.where(queries.stop > queries.start, -1.0 - 4.0 * noise, float("inf"))
    front = 0
    back = 0
    for first in range(begin, end, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        reach = tl.load(radius + first_block + block, mask=block < end, other=0.0)
        score = centre_scores(queries.q, centre, first, blocks, S)
        above, _ = capped(score + length[:, None] * reach[None, :], queries.cap, S)
        if S.ALIBI:
            above -= block_lean(queries, block, extent, False, S)
        some, _ = seen_blocks(queries, block, end, extent, view, S)
        dead = (above - below[:, None]) * slope <= depth[:, None]
        alive = tl.max(tl.where(some & (dead == 0), 1, 0), 0)
        whole = are_whole(unit, tile, block, extent, view, S)
        front, back = append_tiles(places, capacity, (front, back), block, alive, whole)
    tiles = close_list(places, capacity, (front, back))
    return tiles, tl.where(below > float("-inf"), below, 0.0), noise


@triton.jit
def score_noise(queries, bound, slope, S: tl.constexpr):
    """How far z may move when a score is computed in another way; `bound` is the largest component of any key.

    Two ways to add the same products differ by at most 2^-22 HEAD sum_i |q_i k_i| <= 2^-22 HEAD |q|_1 max |k|. The
    softcap's tanh, taken twice, is off by less than 2^-20, a bias by 2^-22 of the largest; one of an infinite slope
    hides its key.
    """
    noise = slope * S.HEAD * 2.0**-22 * tl.sum(tl.abs(queries.q.to(tl.float32)), 1) * bound
    if S.SOFTCAP:
        noise += slope * queries.cap * 2.0**-20
    if S.ALIBI:
        furthest = tl.maximum(tl.abs(queries.position - queries.start), tl.abs(queries.position - queries.stop))
        finite = tl.where(queries.tilt == float("inf"), 0.0, tl.abs(queries.tilt))
        noise += slope * finite * furthest.to(tl.float32) * 2.0**-22
    return noise


@triton.jit
def seen_blocks(queries, block, end, extent, view, S: tl.constexpr):
    """(some, whole), each (TILE or 1, BLOCKS): whether a query may see a key of a block, and whether it sees all."""
    some = (block < end)[None, :]
    if S.INTERVALS:
        first = (block * S.TILE)[None, :]
        start, stop = queries.start[:, None], queries.stop[:, None]
        some = some & (start < stop) & (first < stop) & (first + S.TILE > start)
        whole = (first >= start) & (first + S.TILE <= stop)
        if S.FILTERED:
            kinds = kinds_of(queries.unit, queries.tile, block, extent, view, S)[None, :]
            some, whole = some & (kinds != NONE), whole & (kinds == ALL)
    else:
        whole = are_whole(queries.unit, queries.tile, block, extent, view, S)[None, :]
        if S.FILTERED:
            some = some & (kinds_of(queries.unit, queries.tile, block, extent, view, S) != NONE)[None, :]
    return some, whole & some


@triton.jit
def block_lean(queries, block, extent, MOST: tl.constexpr, S: tl.constexpr):
    """(TILE, BLOCKS): the most, or the least, that ALiBi takes from the scores of a block's keys."""
    first = (block * S.TILE)[None, :]
    last = tl.minimum(first + S.TILE, extent.key_length) - 1
    position = queries.position[:, None]
    nearest = tl.maximum(tl.maximum(first - position, position - last), 0)
    furthest = tl.maximum(tl.abs(position - first), tl.abs(position - last))
    near, far = lean(nearest, queries.tilt), lean(furthest, queries.tilt)
    return tl.maximum(near, far) if MOST else tl.minimum(near, far)


@triton.jit
def norm(x, AXIS: tl.constexpr):
    """Euclidean lengths; no square under- or overflows."""
    largest = tl.max(tl.abs(x), AXIS)
    ratio = x / tl.expand_dims(tl.where(largest > 0, largest, 1.0), AXIS)
    return largest * tl.sqrt(tl.sum(ratio * ratio, AXIS))


@triton.jit
def centre_scores(q, centre, first, blocks, S: tl.constexpr):
    c = load_tile(centre, first, blocks, BLOCKS, S.HEAD, S.HEAD_PADDED)
    return tl.dot(q, tl.trans(c), input_precision=S.PRECISION)

"""Before any score: tiles that a bound on whole blocks of keys rules out, at one sixty-fourth of the scan's products.

A block (the keys of one tile) has a centre c close to its mean. For each of its keys k and any query q

    q . k <= q . c + |q| radius        radius = max_k |k - c|
    max_k q . k >= q . mean >= q . c - |q| error        error = |mean - c|, what rounding c left

The second line bounds the row's maximum from below, tau is at most 1 below that maximum (in units of z), and a block
whose first line stays below tau for every query of a tile holds no support. Tight blocks far from the queries are
never scanned; where blocks are wide nothing is ruled out, and little time is lost.
"""

import triton
import triton.language as tl

from .lists import append_tiles
from .tile import SIZES, TileList, head_of, key_head, load_tile, visible_tiles

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
def bound_tiles(places, q, unit, tile, limit, summary, slope, rounding, extent, S: tl.constexpr):
    """(tiles, below, noise): the list of the tiles that the bounds leave; each row's bound from below on its maximum of
    query . key, 0 where there is none; how far rounding may move a z."""
    TILE: tl.constexpr = S.TILE
    centre, radius, error, largest = summary
    wide = q.to(tl.float32)
    length = norm(wide, 1) * NORM_ROUNDING
    full, some = visible_tiles(tile, extent, S.CAUSAL, TILE, TILE)
    blocks = (extent.key_length + TILE - 1) // TILE
    group = extent.group
    first_block = (unit // extent.heads * (extent.heads // group) + unit % extent.heads // group) * blocks
    centre = key_head(centre, unit, extent)

    # The bound from below takes blocks that every query of the tile sees whole.
    below = tl.full((TILE,), float("-inf"), tl.float32)
    bound = 0.0
    for first in range(0, some, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        score = centre_scores(q, centre, first, blocks, S)
        lost = tl.load(error + first_block + block, mask=block < full, other=0.0)
        lowest = tl.where((block < full)[None, :], score - length[:, None] * lost[None, :], float("-inf"))
        below = tl.maximum(below, tl.max(lowest, 1))
        components = tl.load(largest + first_block + block, mask=block < some, other=0.0)
        bound = tl.maximum(bound, tl.max(tl.where(components == components, components, float("inf")), 0))
    # Two ways to add the same products differ by at most rounding * sum_i |q_i k_i| <= rounding * |q|_1 * max |k|.
    noise = rounding * tl.sum(tl.abs(wide), 1) * bound

    # NaN, or noise without end, leaves every tile, and so does the lack of a bound; a row without keys leaves none.
    depth = tl.where(limit > 0, -1.0 - 4.0 * noise, float("inf"))
    count = 0
    split = 0
    for first in range(0, some, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        reach = tl.load(radius + first_block + block, mask=block < some, other=0.0)
        above = centre_scores(q, centre, first, blocks, S) + length[:, None] * reach[None, :]
        alive = tl.max(tl.where((above - below[:, None]) * slope <= depth[:, None], 0, 1), 0)
        alive = tl.where(block < full, alive, tl.where(block < some, 1, 0))
        count, split = append_tiles(places, count, split, block, alive, full)
    return TileList(places, split, count), tl.where(below > float("-inf"), below, 0.0), noise


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

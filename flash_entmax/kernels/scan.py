"""The one dense pass over Q K^T: the maximum of each row over each block of keys (a tile's), and nothing else.

Maxima are stored for a chunk of units and rows as (unit, block of keys, row): neighbouring rows are neighbours in
memory.
"""

import triton
import triton.language as tl

from .tile import (
    SIZES,
    Extent,
    heaviest_first,
    hide,
    key_head,
    load_tile,
    maxima_column,
    query_head,
    store_row,
    visible_keys,
    visible_tiles,
)


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    query, key, key_bound, maxima, maximum, slack, rounding, heads, group, query_length, key_length,
    first_unit, units, first_tile, rows, blocks, S: tl.constexpr,
):  # fmt: skip
    """Stores `maxima` of the raw products, the row's `maximum` (+inf where no key is visible) and its `slack`."""
    SCAN: tl.constexpr = S.SCAN
    extent = Extent(heads, group, query_length, key_length)
    unit, tile = heaviest_first(units, first_unit, first_tile)
    row = tile * SCAN + tl.arange(0, SCAN)
    limit = visible_keys(row, extent, S.CAUSAL)
    q = load_tile(query_head(query, unit, extent), tile * SCAN, query_length, SCAN, S.HEAD, S.HEAD_PADDED)
    # Two ways to add the same products differ by at most rounding * sum_i |q_i k_i| <= rounding * |q|_1 * max |k|.
    size = tl.sum(tl.abs(q.to(tl.float32)), 1)
    bound = tl.load(key_bound + unit // heads * (heads // group) + unit % heads // group)
    store_row(slack, unit, row, extent, size * bound * rounding)

    column = maxima_column(maxima, unit - first_unit, row - first_tile * SCAN, blocks, rows)
    context = q, key_head(key, unit, extent), limit, column, rows, extent
    best = tl.full((SCAN,), float("-inf"), tl.float32)
    full, some = visible_tiles(tile, extent, S.CAUSAL, SCAN, SCAN)
    for key_tile in range(full):
        best = scan_tile(best, context, key_tile, False, S)
    for key_tile in range(full, some):
        best = scan_tile(best, context, key_tile, True, S)

    store_row(maximum, unit, row, extent, tl.where(limit > 0, best, float("inf")))


@triton.jit
def scan_tile(best, context, key_tile, MASKED: tl.constexpr, S: tl.constexpr):
    q, key, limit, column, rows, extent = context
    SCAN: tl.constexpr = S.SCAN
    BLOCKS: tl.constexpr = S.SCAN // S.TILE
    BLOCK: tl.constexpr = S.TILE
    k = load_tile(key, key_tile * SCAN, extent.key_length, SCAN, S.HEAD, S.HEAD_PADDED)
    score = tl.dot(q, tl.trans(k), input_precision=S.PRECISION)
    if MASKED:
        score = hide(score, tl.arange(0, SCAN)[None, :], (limit - key_tile * SCAN)[:, None])
    block_maxima = tl.max(tl.reshape(score, (SCAN, BLOCKS, BLOCK)), 2)
    block = tl.cast(key_tile * BLOCKS + tl.arange(0, BLOCKS), tl.int64)
    tl.store(column[:, None] + block[None, :] * tl.multiple_of(rows, 32), block_maxima)
    return tl.maximum(best, tl.max(block_maxima, 1))

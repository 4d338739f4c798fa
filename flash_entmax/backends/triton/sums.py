"""F and sum u of a part of the keys, at a given offset.

Both are sums over keys: those of several parts add up to those of all keys.
"""

import triton
import triton.language as tl

from .alpha import probability, probability_and_weight, support_weight
from .keys import open_keys, open_listed_keys
from .score import distance_to_threshold, scores
from .tile import no_sums, open_rows, open_tile, sum_keys


@triton.jit
def sums_at(queries, threshold, blocks, key, C: tl.constexpr):
    """(F, sum u) of each query over the listed keys, with the threshold's maximum and offset."""
    exponent, relative_scale = queries.options.exponent, threshold.relative_scale
    intercept = 1.0 - threshold.maximum * relative_scale
    total, weight = no_sums(C), no_sums(C)
    tiles = blocks.whole
    unmasked = tiles.split // C.SOLVE_TILES * C.SOLVE_TILES
    for place in range(0, unmasked, C.SOLVE_TILES):
        keys = open_listed_keys(key, tiles, place, C.SOLVE_TILES, C)
        score, _ = scores(queries, keys, False, C)
        total, weight = accumulate(total, weight, score, threshold, intercept, exponent, C)
    for n in range(blocks.row_blocks):
        keys = open_keys(key, open_rows(blocks.rows + n * C.TILE, C), queries.sizes, False, C)
        score, _ = scores(queries, keys, False, C)
        total, weight = accumulate(total, weight, score, threshold, intercept, exponent, C)
    for place in range(unmasked, tiles.count):
        keys = open_keys(key, open_tile(tl.load(tiles.tiles + place), C), queries.sizes, True, C)
        score, _ = scores(queries, keys, True, C)
        total, weight = accumulate(total, weight, score, threshold, intercept, exponent, C)
    total = tl.sum(total[0], 1) * probability(threshold.offset, exponent, C.POWER)
    weight = tl.sum(weight[0], 1) * support_weight(threshold.offset, exponent, C.POWER)
    return total, weight


@triton.jit
def accumulate(total, weight, score, threshold, intercept, exponent, C: tl.constexpr):
    """Add scores to F and to sum u of each row, both relative to the offset.

    In 16-bit types one multiply-add gives the distance. It is off by at most 2^-23 of the largest z.
    """
    relative_scale = threshold.relative_scale[:, None]
    if C.COMPENSATED:
        x = distance_to_threshold(score, threshold.maximum[:, None], relative_scale, 1.0)
    else:
        x = tl.maximum(score * relative_scale + intercept[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
    p, u = probability_and_weight(x, exponent, C.POWER, C.FAST_LOG2)
    return sum_keys(total, p, C), sum_keys(weight, u, C)

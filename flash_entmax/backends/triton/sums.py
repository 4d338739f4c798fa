"""F and sum u of a part of the keys, at a given offset.

Both are sums over keys: those of several parts add up to those of all keys.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .alpha import probability, probability_and_weight, support_weight
from .keys import open_keys
from .lists import walk
from .queries import Queries, Threshold
from .score import distance_to_threshold, scores
from .tile import Matrix, no_sums, sum_keys


class SumsContext(NamedTuple):
    """What each block of keys is added with; `intercept` is 1 - maximum * relative_scale."""

    queries: Queries
    threshold: Threshold
    intercept: Tensor
    key: Matrix


@triton.jit
def sums_at(queries, threshold, blocks, key, C: tl.constexpr):
    """(F, sum u) of each query over the listed keys, with the threshold's maximum and offset."""
    exponent = queries.options.exponent
    context = SumsContext(queries, threshold, 1.0 - threshold.maximum * threshold.relative_scale, key)
    total, weight = walk(add_sums, (no_sums(C), no_sums(C)), context, blocks, C)
    total = tl.sum(total[0], 1) * probability(threshold.offset, exponent, C.POWER)
    weight = tl.sum(weight[0], 1) * support_weight(threshold.offset, exponent, C.POWER)
    return total, weight


@triton.jit
def add_sums(sums, context, block, MASKED: tl.constexpr, C: tl.constexpr):
    """Add a block of keys to F and to sum u of each row, both relative to the offset.

    In 16-bit types one multiply-add gives the distance. It is off by at most 2^-23 of the largest z.
    """
    total, weight = sums
    queries, threshold = context.queries, context.threshold
    keys = open_keys(context.key, block, queries.sizes, MASKED, C)
    score, _ = scores(queries, keys, MASKED, C)
    relative_scale = threshold.relative_scale[:, None]
    if C.COMPENSATED:
        x = distance_to_threshold(score, threshold.maximum[:, None], relative_scale, 1.0)
    else:
        x = tl.maximum(score * relative_scale + context.intercept[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
    p, u = probability_and_weight(x, queries.options.exponent, C.POWER, C.FAST_LOG2)
    return sum_keys(total, p, C), sum_keys(weight, u, C)

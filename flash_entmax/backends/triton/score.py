"""Scores of queries and keys: their product, softcap, ALiBi, mask; and the distance of a score to the threshold.

Scores are in units of query . key. Multiplied by z_scale they are z.
"""

import triton
import triton.language as tl

from .visibility import hide, hide_filtered

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32: a visible score of -inf, where hidden ones are -inf


@triton.jit
def scores(queries, keys, MASKED: tl.constexpr, C: tl.constexpr):
    """(queries, keys): the scores, -inf where a query does not see the key; and their derivative by query . key.

    Beside a filter or ALiBi, which may hide every key, a score of -inf that is seen is LOWEST.
    """
    return apply_score_options(products(queries.q, keys.k, True, C), queries, keys, MASKED, False, C)


@triton.jit
def transposed_scores(queries, keys, MASKED: tl.constexpr, C: tl.constexpr):
    """`scores` with a row for each key: (keys, queries). No threshold is computed from them."""
    product = products(keys.k, queries.q, False, C)
    return apply_score_options(product, queries, keys, MASKED, True, C)


@triton.jit
def products_by_key(q, k, HALVED: tl.constexpr, C: tl.constexpr):
    """(keys, queries). Without matrix units, few queries by many keys take fewer registers than keys by queries."""
    return tl.trans(products(q, k, HALVED, C)) if C.COMPENSATED else products(k, q, HALVED, C)


@triton.jit
def products(left, right, HALVED: tl.constexpr, C: tl.constexpr):
    """(rows of left, rows of right): the product of each two rows.

    Matrix units cut off digits with each 16 numbers that they add, so that the error grows with the row. Where a
    threshold is computed from them, rows of more than 256 are multiplied in two halves (HALVED), which float32 adds.
    """
    if HALVED and left.shape[1] > 256 and not C.COMPENSATED:
        is_first = (tl.arange(0, left.shape[1]) < left.shape[1] // 2)[None, :]
        first = tl.dot(tl.where(is_first, left, 0.0), tl.trans(right), input_precision=C.PRECISION)
        remaining = tl.where(is_first, 0.0, left)
        # The limit keeps Triton from starting the second product with the first, which would make one of the two.
        second = tl.dot(remaining, tl.trans(right), max_num_imprecise_acc=1, input_precision=C.PRECISION)
        # Where an infinite number is in one half, the product of the other half, zero times it, is NaN.
        product = tl.where(is_infinite(first) & (second != second), first, first + second)
        product = tl.where(is_infinite(second) & (first != first), second, product)
    else:
        product = tl.dot(left, tl.trans(right), input_precision=C.PRECISION)
    return product


@triton.jit
def is_infinite(number):
    return tl.abs(number) == float("inf")


@triton.jit
def apply_score_options(product, queries, keys, MASKED: tl.constexpr, TRANSPOSED: tl.constexpr, C: tl.constexpr):
    """(scores, derivative by the product) from products of queries and keys, or (TRANSPOSED) of keys and queries."""
    options = queries.options
    score, softcap_slope = apply_softcap(product, options.softcap, C)
    column = by_key(keys.column, TRANSPOSED)
    if C.ALIBI:
        position = by_query(queries.position - keys.first, TRANSPOSED)
        penalty = alibi_penalty(tl.abs(position - column), options.alibi_slopes)
        score = tl.where(penalty == float("inf"), float("-inf"), told_apart(score - penalty, C))  # hides NaN too
    else:
        score = told_apart(score, C)
    if MASKED:
        start, stop = queries.start - keys.first, queries.stop - keys.first
        score = hide(score, column, by_query(start, TRANSPOSED), by_query(stop, TRANSPOSED), C)
        if C.FILTERED:
            row = tl.minimum(queries.row - queries.tile * C.TILE, C.TILE - 1)  # also where there is no query
            score = hide_filtered(score, by_query(row, TRANSPOSED), column, queries, keys.tile, C)
    return score, softcap_slope


@triton.jit
def told_apart(score, C: tl.constexpr):
    """Visible scores that no hidden one equals. NaN stays NaN."""
    if C.FILTERED or C.ALIBI:
        score = tl.maximum(score, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    return score


@triton.jit
def sees_a_key(maximum, has_interval, C: tl.constexpr):
    """Whether a row of this largest score sees a key. A filter or ALiBi may hide all keys of its interval."""
    if C.FILTERED or C.ALIBI:
        has_interval = has_interval & (maximum > float("-inf"))
    return has_interval


@triton.jit
def as_computed(maximum, C: tl.constexpr):
    """The largest visible score, -inf where it was told apart from hidden ones."""
    if C.FILTERED or C.ALIBI:
        maximum = tl.where(maximum <= LOWEST, float("-inf"), maximum)
    return maximum


@triton.jit
def by_query(numbers, TRANSPOSED: tl.constexpr):
    """One number for each query, to be broadcast along the keys."""
    return numbers[None, :] if TRANSPOSED else numbers[:, None]


@triton.jit
def by_key(numbers, TRANSPOSED: tl.constexpr):
    """One number for each key, to be broadcast along the queries."""
    return numbers[:, None] if TRANSPOSED else numbers[None, :]


@triton.jit
def tile_maxima(queries, keys, C: tl.constexpr):
    """(queries, C.SCAN_TILES): each query's maximum over each of the tiles side by side, none of which needs a mask.

    The softcap rises with its score, so it is taken of the maxima only.
    """
    if C.ALIBI:
        score, _ = scores(queries, keys, False, C)
        maxima = tl.max(score, 1, keep_dims=True)
    else:
        product = products(queries.q, keys.k, True, C)
        maxima = tl.max(tl.reshape(product, (product.shape[0], C.SCAN_TILES, C.TILE)), 2)
        maxima, _ = apply_softcap(maxima, queries.options.softcap, C)
        maxima = told_apart(maxima, C)
    return maxima


@triton.jit
def apply_softcap(score, softcap, C: tl.constexpr):
    """(softcap tanh(score / softcap), its derivative); without a softcap, the score itself and 1."""
    softcap_slope = 1.0
    if C.SOFTCAP:
        ratio = tanh(score * (1.0 / softcap), C.COMPENSATED)
        score = ratio * softcap
        softcap_slope = 1.0 - ratio * ratio
    return score, softcap_slope


@triton.jit
def tanh(x, ACCURATE: tl.constexpr):
    """tanh, off by at most 2^-21. If ACCURATE, that is relative: near 0, where the quotient cancels, by its series."""
    result = 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * x) + 1.0)  # e^(2 x)
    if ACCURATE:
        square = x * x
        series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        result = tl.where(square < 0.0625, x * series, result)
    return result


@triton.jit
def alibi_penalty(distance, alibi_slope):
    """What ALiBi takes from a score. At distance 0 it is 0, even if the slope is infinite."""
    return tl.where(distance == 0, 0.0, alibi_slope * distance.to(tl.float32))


@triton.jit
def distance_to_threshold(score, maximum, scale, offset):
    """d = [scale (score - maximum) + offset]_+; NaN stays NaN.

    With z_scale and the offset it is [z - tau]_+. With z_scale / offset and 1 it is relative to the offset: none of its
    powers overflows in 16 bits, and one that underflows is negligible beside the largest. The subtraction comes first,
    since it is exact where it matters.
    """
    return tl.maximum((score - maximum) * scale + offset, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relative_distance(queries, threshold, keys, MASKED: tl.constexpr, C: tl.constexpr):
    """(x, softcap_slope): x = [z - tau]_+ / offset of each query and key, and its score's derivative by query . key."""
    score, softcap_slope = scores(queries, keys, MASKED, C)
    x = distance_to_threshold(score, threshold.maximum[:, None], threshold.relative_scale[:, None], 1.0)
    return x, softcap_slope

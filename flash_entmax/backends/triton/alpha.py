"""The only kernel file that knows alpha: probabilities, their weights, and the steps towards the threshold.

POWER is 1 / (alpha - 1) where that is a whole number up to 16: 1 for sparsemax, 2 for entmax-1.5, 4 for alpha 1.25. A
power is then a few products. 0 stands for any other alpha, whose exponent 1 / (alpha - 1) is a run-time number.
docs/math.md derives the steps; core/threshold.py has them in PyTorch.
"""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def product(d, FACTORS: tl.constexpr):
    """d^FACTORS for 1 to 31 factors, by squares: a square for each binary digit after the first, and d for each 1."""
    result = d
    for place in tl.static_range(3, -1, -1):
        if FACTORS >> place > 1:
            result = result * result
            if (FACTORS >> place) % 2 == 1:
                result = result * d
    return result


@triton.jit
def probability(d, exponent, POWER: tl.constexpr):
    """p = d^(1 / (alpha - 1)) of distances d >= 0; NaN stays NaN."""
    return product(d, POWER) if POWER else tl.where(d <= 0, 0.0, tl.exp2(exponent * tl.log2(d)))


@triton.jit
def support_weight(d, exponent, POWER: tl.constexpr):
    """u = p^(2 - alpha) = d^(1 / (alpha - 1) - 1) where d > 0, else 0; NaN stays NaN."""
    if POWER == 1:
        u = tl.where(d > 0, 1.0, d)
    elif POWER:
        u = product(d, POWER - 1)
    else:
        u = tl.where(d <= 0, 0.0, tl.exp2((exponent - 1.0) * tl.log2(d)))
    return u


@triton.jit
def weight_of_probability(p, exponent, POWER: tl.constexpr):
    """u = p^(2 - alpha) where p > 0, else 0; NaN stays NaN. 2 - alpha = 1 - 1 / exponent."""
    if POWER == 1:
        u = tl.where(p > 0, 1.0, p)
    elif POWER == 2:
        u = tl.sqrt(p)
    else:
        u = tl.where(p == 0, 0.0, tl.exp2((1.0 - 1.0 / exponent) * tl.log2(p)))
    return u


@triton.jit
def newton_step(offset, total, weight, exponent):
    """Newton's step on F^(alpha - 1) = 1, a convex function, from F = total and sum u = weight at an offset.

    It ends at or above the root from wherever it starts, so tau is at or above what it gives. 2 - alpha = 1 - 1 / r
    with the exponent r.
    """
    return offset - (total - tl.exp2((1.0 - 1.0 / exponent) * tl.log2(total))) / weight


@triton.jit
def certified_step(offset, total, weight, exponent, spans):
    """The lesser of an offset and Newton's step from it, rounded up: from F and sum u over some of the scores.

    The rounding of a step is relative to the offset that it starts from. It is 2^-24 for each of the spans of numbers
    that are added one after the other, and less than 2^-17 for the powers and the sum within a span.
    """
    stepped = newton_step(offset, total, weight, exponent) + (spans + 64) * 2.0**-22 * offset
    return tl.where(stepped < offset, stepped, offset)


@triton.jit
def probability_and_weight(d, exponent, POWER: tl.constexpr, FAST_LOG2: tl.constexpr):
    """(p, u) with p = u d: a general alpha takes one logarithm and one power for both."""
    if POWER:
        u = support_weight(d, exponent, POWER)
    else:
        u = tl.where(d <= 0, 0.0, tl.exp2((exponent - 1.0) * binary_logarithm(d, FAST_LOG2)))
    p = d if POWER == 1 else u * d
    return p, u


@triton.jit
def binary_logarithm(d, FAST_LOG2: tl.constexpr):
    """log2(d). FAST_LOG2 takes the processor's own: one instruction instead of twenty.

    That one is off by 2^-22, absolutely next to 1 and relatively elsewhere (PTX ISA, lg2.approx). For p = d^r with
    d <= 1, this error is that of a d off by less than 2^-21.
    """
    if FAST_LOG2:
        result = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.log2(d)
    return result


@triton.jit
def share_logarithm(x, offset, FAST_LOG2: tl.constexpr):
    """1 - ln d where d = offset x > 0: the derivative of p by alpha is r^2 p times this, at a fixed tau."""
    logarithm = tl.where(x > 0, LN_2 * binary_logarithm(x, FAST_LOG2), 0.0)
    return 1.0 - tl.log(offset)[:, None] - logarithm


@triton.jit
def is_settled(total, weight, weight_fall_rate, exponent, limit):
    """Whether sum u is within `limit` (relative) of its value at the root, after Newton's step from F and sum u here.

    `weight_fall_rate` is how fast sum u fell on the way here. Up to alpha = 1.5 it falls ever slower, so that at most
    the share `fall` of sum u is left to fall. `straight` is this share if F^(alpha - 1) is a straight line; the step
    then ends at the root. Above alpha = 1.5, u is steep at the threshold, and F itself must be near 1.
    """
    fall = weight_fall_rate * (total - 1.0) / (exponent * weight * weight)
    straight = (1.0 - 1.0 / exponent) * (1.0 - 1.0 / total)
    left = fall * tl.maximum(fall - straight, fall / 8.0)
    return (left <= limit) & (total - 1.0 <= tl.where(exponent < 2.0, 1e-4, float("inf")))


@triton.jit
def mass_tolerance(exponent, MEAN: tl.constexpr):
    """The largest F - 1 that the output mends: by the last step (MEAN), else by division by F.

    The step leaves an error of the order of (F - 1)^2, the division of F - 1. Above alpha = 1.5, u is steep at the
    threshold, and the tolerance is smaller.
    """
    return tl.where(exponent < 2.0, 1e-5, 1e-3 if MEAN else 4e-4)

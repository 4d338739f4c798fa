"""The only kernel file that knows alpha: probabilities, their weights, and the steps towards the threshold.

POWER is 1 / (alpha - 1) where that is 1 (sparsemax) or 2 (entmax-1.5); 0 stands for any other alpha, whose exponent
1 / (alpha - 1) is then a run-time number. docs/math.md derives the steps; threshold.py has them in PyTorch.
"""

import triton
import triton.language as tl


@triton.jit
def probability(d, exponent, POWER: tl.constexpr):
    """p = d^(1 / (alpha - 1)) of distances d >= 0; NaN stays NaN."""
    if POWER == 1:
        p = d
    elif POWER == 2:
        p = d * d
    else:
        p = tl.where(d <= 0, 0.0, tl.exp2(exponent * tl.log2(d)))
    return p


@triton.jit
def support_weight(d, exponent, POWER: tl.constexpr):
    """u = p^(2 - alpha) = d^(1 / (alpha - 1) - 1) where d > 0, else 0; NaN stays NaN."""
    if POWER == 1:
        u = tl.where(d > 0, 1.0, d)
    elif POWER == 2:
        u = d
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
    """From F = total and sum u = weight at an offset, Newton's step on F^(alpha - 1) = 1, a convex function.

    It ends at or above the root from wherever it starts: a certified lower bound of tau. 2 - alpha = 1 - 1 / exponent.
    """
    return offset - (total - tl.exp2((1.0 - 1.0 / exponent) * tl.log2(total))) / weight


@triton.jit
def probability_and_weight(d, exponent, POWER: tl.constexpr, HARDWARE: tl.constexpr):
    """(p, u): p = u d, so that a general alpha takes one logarithm and one power for both."""
    if POWER:
        p, u = probability(d, exponent, POWER), support_weight(d, exponent, POWER)
    else:
        u = tl.where(d <= 0, 0.0, tl.exp2((exponent - 1.0) * binary_logarithm(d, HARDWARE)))
        p = u * d
    return p, u


@triton.jit
def binary_logarithm(d, HARDWARE: tl.constexpr):
    """log2(d). The processor's own takes one instruction instead of twenty, and is off by 2^-22: absolutely next to 1,
    else of itself (PTX ISA, lg2.approx). For p = d^r, d <= 1, it is as if d were off by less than 2^-21.
    """
    if HARDWARE:
        result = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.log2(d)
    return result


@triton.jit
def is_settled(total, weight, slope, exponent, limit):
    """Whether Newton's step from F = total and sum u = weight leaves at most `limit` of sum u above that of the root.

    `slope` is how fast sum u fell on the way here, and up to alpha = 1.5 it falls ever slower. So it has at most `fall`
    of itself left to fall; were F^(alpha - 1) a straight line, `straight`, and the step would end at the root. Above
    1.5 u is steep at the threshold, and F itself must be near 1.
    """
    fall = slope * (total - 1.0) / (exponent * weight * weight)
    straight = (1.0 - 1.0 / exponent) * (1.0 - 1.0 / total)
    left = fall * tl.maximum(fall - straight, fall / 8.0)
    return (left <= limit) & (total - 1.0 <= tl.where(exponent < 2.0, 1e-4, float("inf")))


@triton.jit
def tolerance(exponent):
    """Up to which F - 1 the output makes the last step on itself: above alpha = 1.5, where u is steep at the threshold,
    less."""
    return tl.where(exponent < 2.0, 1e-5, 1e-3)

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
def probability_and_weight(d, exponent, POWER: tl.constexpr):
    """(p, u): p = u d, so that a general alpha takes one logarithm and one power for both."""
    u = support_weight(d, exponent, POWER)
    p = probability(d, exponent, POWER) if POWER else u * d
    return p, u

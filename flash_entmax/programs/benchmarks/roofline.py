"""How fast a step could be if only its matrix products took time, at the rate measured in the same run.

One product over all visible pairs of a causal call multiplies about length^2 / 2 pairs per head, 2 d flop each:

    product = batch * heads * (length^2 / 2) * 2 * d

One product is dense: Q K^T, as if every pair were scanned. (Bounds on blocks spare us some of it, so that very sparse
steps may come close to this floor.) All other products touch live tiles only, the share ``live`` of the visible tiles:

    forward   3   Q K^T, P V, and U V, which saves the backward its pass for delta
    dQ        3   Q K^T, dO V^T, dS K
    dK, dV    4   Q K^T, dO V^T, P^T dO, dS^T Q

    floor of the forward = (1 + 3 live) * product / rate
    floor of the step    = (1 + 10 live) * product / rate

The floor leaves out the solve, which computes the scores of the surviving tiles again in each of its steps.
"""

from typing import NamedTuple

from .cases import BenchCase

SCAN_PRODUCTS = 1
FORWARD_PRODUCTS = 3
QUERY_GRADIENT_PRODUCTS = 3
KEY_VALUE_GRADIENT_PRODUCTS = 4
FORMULA = (
    "floor = (1 + 10 live) * batch * heads * length^2 * d flop / rate: one dense Q K^T, and on the live tiles 3 "
    "products in the forward, 3 for dQ, 4 for dK and dV"
)


class Floor(NamedTuple):
    """Milliseconds."""

    forward_ms: float
    step_ms: float


def product_flop(case: BenchCase) -> float:
    """Floating-point operations of one matrix product over all visible pairs of a causal call."""
    return float(case.batch * case.heads) * case.length**2 * case.head_size


def floor(case: BenchCase, live: float, flop_per_second: float) -> Floor:
    """The time of the products alone, if the share ``live`` of the visible tiles holds support."""
    product_ms = 1e3 * product_flop(case) / flop_per_second
    forward = SCAN_PRODUCTS + FORWARD_PRODUCTS * live
    backward = (QUERY_GRADIENT_PRODUCTS + KEY_VALUE_GRADIENT_PRODUCTS) * live
    return Floor(forward * product_ms, (forward + backward) * product_ms)

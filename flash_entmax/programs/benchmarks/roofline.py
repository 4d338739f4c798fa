"""How fast a step could be if only its matrix products took time, at the rate measured in the same run.

One product over all visible pairs of a causal call multiplies about length^2 / 2 pairs per head, 2 d flop each:

    product = batch * heads * (length^2 / 2) * 2 * d

One product is dense: Q K^T, as if every pair were scanned. (Bounds on blocks spare us some of it, so that very sparse
steps may come close to this floor.) One more product, Q K^T on the live tiles, finds the keys that are reached. Live
tiles are the share ``live`` of the visible tiles. All other products need only the keys that the queries of a tile
reach together, the share ``reached`` of the keys that they see:

    forward   3   Q K^T, P V, and U V, which saves the backward its pass for delta
    dQ        3   Q K^T, dO V^T, dS K
    dK, dV    4   Q K^T, dO V^T, P^T dO, dS^T Q

    floor of the forward = (1 + live + 3 reached) * product / rate
    floor of the step    = (1 + live + 10 reached) * product / rate

dK and dV need the queries that reach a tile of keys. Their share is not measured, but taken to be ``reached`` as well.
It is larger where all queries attend to one key. The floor leaves out the solve, which computes the scores of reached
keys again in each of its steps. It also leaves out keys that no query reaches, in tiles that are computed whole.
"""

from typing import NamedTuple

from .cases import BenchCase

SCAN_PRODUCTS = 1
MARK_PRODUCTS = 1
FORWARD_PRODUCTS = 3
QUERY_GRADIENT_PRODUCTS = 3
KEY_VALUE_GRADIENT_PRODUCTS = 4
FORMULA = (
    "floor = (1 + live + 10 reached) * batch * heads * length^2 * d flop / rate: Q K^T of all pairs, Q K^T on the live "
    "tiles, and on the keys reached 3 products in the forward, 3 for dQ, 4 for dK and dV"
)


class Floor(NamedTuple):
    """Milliseconds."""

    forward_ms: float
    step_ms: float


def product_flop(case: BenchCase) -> float:
    """Floating-point operations of one matrix product over all visible pairs of a causal call."""
    return float(case.batch * case.heads) * case.length**2 * case.head_size


def floor(case: BenchCase, live: float, reached: float, flop_per_second: float) -> Floor:
    """The time of the products alone.

    ``live`` is the share of the visible tiles that hold support, ``reached`` the share of the keys that a tile of
    queries sees to which one of them attends.
    """
    product_ms = 1e3 * product_flop(case) / flop_per_second
    forward = SCAN_PRODUCTS + MARK_PRODUCTS * live + FORWARD_PRODUCTS * reached
    backward = (QUERY_GRADIENT_PRODUCTS + KEY_VALUE_GRADIENT_PRODUCTS) * reached
    return Floor(forward * product_ms, (forward + backward) * product_ms)

"""One pass over Q K^T on the listed tiles: the maximum of each row over each tile of keys, and nothing else.

Maxima are stored in 16 bits, in units of z and relative to a bound from below on the row's maximum, by place in the
list. A difference that 16 bits cannot hold becomes +inf, which certifies nothing and kills nothing, or -inf, which is
out of reach of any threshold.
"""

import triton
import triton.language as tl

from .tile import listed_scores, scores

ROUNDING = tl.constexpr(2.0**-10)  # of a stored maximum, twice that of its 11 bits


@triton.jit
def scan_tiles(q, key, limit, below, tiles, column, slope, extent, S: tl.constexpr):
    """(maximum, shift, noise): each row's maximum of query . key (+inf where no key is visible), what makes the stored
    maxima relative to it, and how far storing them may move a z."""
    TILE: tl.constexpr = S.TILE
    ABREAST: tl.constexpr = S.ABREAST
    best = tl.full((TILE,), float("-inf"), tl.float32)
    below = tl.where(limit > 0, below, float("inf"))  # rows past the last query keep no tile alive
    unmasked = tiles.split // ABREAST * ABREAST
    for place in range(0, unmasked, ABREAST):
        score = listed_scores(q, key, tiles, place, S)
        highest = tl.max(tl.reshape(score, (TILE, ABREAST, TILE)), 2)
        pointers = column[:, None] + tl.cast(place + tl.arange(0, ABREAST), tl.int64)[None, :] * TILE
        tl.store(pointers, ((highest - below[:, None]) * slope).to(tl.float16))
        best = tl.maximum(best, tl.max(highest, 1))
    for place in range(unmasked, tiles.count):
        score = scores(q, key, limit, tl.load(tiles.tiles + place), extent, True, S)
        highest = tl.max(score, 1)
        tl.store(column + tl.cast(place, tl.int64) * TILE, ((highest - below) * slope).to(tl.float16))
        best = tl.maximum(best, highest)
    shift = tl.where(limit > 0, (below - best) * slope, 0.0)
    return tl.where(limit > 0, best, float("inf")), shift, ROUNDING * (1.0 + tl.abs(shift))

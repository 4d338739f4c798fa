"""One pass over Q K^T on the listed tiles: the maximum of each row over each tile of keys, and nothing else.

Maxima are stored in 16 bits, in units of z and relative to a bound from below on the row's maximum, by place in the
list. A difference that 16 bits cannot hold becomes +inf, which certifies nothing and kills nothing, or -inf, which is
out of reach of any threshold.
"""

import triton
import triton.language as tl

from .score import listed_maxima, scores

ROUNDING = tl.constexpr(2.0**-10)  # of a stored maximum, twice that of its 11 bits


@triton.jit
def scan_tiles(queries, key, below, tiles, column, slope, extent, view, S: tl.constexpr):
    """(maximum, shift, stored): each row's maximum of the scores (+inf where it sees no key), what makes the stored
    maxima relative to it, and how far storing them may move a z."""
    TILE: tl.constexpr = S.TILE
    ABREAST: tl.constexpr = S.ABREAST
    best = tl.full((TILE,), float("-inf"), tl.float32)
    sees = queries.stop > queries.start
    below = tl.where(sees, below, float("inf"))  # rows past the last query keep no tile alive
    unmasked = tiles.split // ABREAST * ABREAST
    for place in range(0, unmasked, ABREAST):
        highest = listed_maxima(queries, key, tiles, place, extent, view, S)
        pointers = column[:, None] + tl.cast(place + tl.arange(0, ABREAST), tl.int64)[None, :] * TILE
        tl.store(pointers, ((highest - below[:, None]) * slope).to(tl.float16))
        best = tl.maximum(best, tl.max(highest, 1))
    for place in range(unmasked, tiles.count):
        score, _ = scores(queries, key, tl.load(tiles.tiles + place), extent, view, True, S)
        highest = tl.max(score, 1)
        tl.store(column + tl.cast(place, tl.int64) * TILE, ((highest - below) * slope).to(tl.float16))
        best = tl.maximum(best, highest)
    if S.FILTERED or S.ALIBI:  # either may hide a whole interval; a NaN score stays NaN against any maximum
        sees = sees & (best > float("-inf"))
    shift = tl.where(sees, (below - best) * slope, 0.0)
    return tl.where(sees, best, float("inf")), shift, ROUNDING * (1.0 + tl.abs(shift))

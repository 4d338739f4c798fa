"""One pass over Q K^T on the listed tiles: the maximum of each row over each tile of keys, and nothing else.

Maxima are stored in 16 bits by place in the list: in units of z, relative to a bound from below on the row's maximum.
A difference that 16 bits cannot hold becomes inf. +inf certifies nothing and kills no tile. -inf is below any
threshold.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .keys import open_keys, open_listed_keys
from .lists import walk
from .queries import Queries
from .score import scores, tile_maxima
from .tile import Matrix, open_tile

ROUNDING = tl.constexpr(2.0**-10)  # of a stored maximum: twice the rounding of its 11 bits


@triton.jit
def scan_tiles(queries, key, maximum_bound, tiles, column, C: tl.constexpr):
    """(maximum, bound_gap, storage_error): each row's maximum of the scores, +inf where it sees no key; what makes the
    stored maxima relative to this maximum; how far storing them may move a z."""
    TILE: tl.constexpr = C.TILE
    TILES_PER_STEP: tl.constexpr = C.TILES_PER_STEP
    z_scale = queries.options.z_scale
    maximum = tl.full((TILE,), float("-inf"), tl.float32)
    sees = queries.stop > queries.start
    maximum_bound = tl.where(sees, maximum_bound, float("inf"))  # rows past the last query keep no tile alive
    unmasked = tiles.split // TILES_PER_STEP * TILES_PER_STEP
    for place in range(0, unmasked, TILES_PER_STEP):
        keys = open_listed_keys(key, tiles, place, C)
        maxima = tile_maxima(queries, keys, C)
        pointers = column[:, None] + tl.cast(place + tl.arange(0, TILES_PER_STEP), tl.int64)[None, :] * TILE
        tl.store(pointers, ((maxima - maximum_bound[:, None]) * z_scale).to(tl.float16))
        maximum = tl.maximum(maximum, tl.max(maxima, 1))
    for place in range(unmasked, tiles.count):
        keys = open_keys(key, open_tile(tl.load(tiles.tiles + place), C), queries.sizes, True, C)
        score, _ = scores(queries, keys, True, C)
        maxima = tl.max(score, 1)
        tl.store(column + tl.cast(place, tl.int64) * TILE, ((maxima - maximum_bound) * z_scale).to(tl.float16))
        maximum = tl.maximum(maximum, maxima)
    if C.FILTERED or C.ALIBI:  # either may hide a whole interval; a NaN score stays NaN against any maximum
        sees = sees & (maximum > float("-inf"))
    bound_gap = tl.where(sees, (maximum_bound - maximum) * z_scale, 0.0)
    return tl.where(sees, maximum, float("inf")), bound_gap, ROUNDING * (1.0 + tl.abs(bound_gap))


class MaximaContext(NamedTuple):
    """What each block of keys is looked at with."""

    queries: Queries
    key: Matrix


@triton.jit
def maxima_of_blocks(queries, key, blocks, C: tl.constexpr):
    """Each row's maximum of the scores over the listed keys; +inf where it sees none of them."""
    TILE: tl.constexpr = C.TILE
    maximum = tl.full((TILE,), float("-inf"), tl.float32)
    maximum = walk(add_maximum, maximum, MaximaContext(queries, key), blocks, C)
    return tl.where(maximum == float("-inf"), float("inf"), maximum)


@triton.jit
def add_maximum(maximum, context, block, MASKED: tl.constexpr, C: tl.constexpr):
    keys = open_keys(context.key, block, context.queries.sizes, MASKED, C)
    score, _ = scores(context.queries, keys, MASKED, C)
    return tl.maximum(maximum, tl.max(score, 1), propagate_nan=tl.PropagateNan.ALL)

"""The list of the keys of a row that may have support, for decode.py and decode_summaries.py.

Scores stand in a line, and of each tile of keys there is the largest. Tiles are listed first, and then the keys of
these tiles. As a rule a tile has one such key, which its largest scores tell without a look at the others.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .score import distance_to_threshold

PLACES = tl.constexpr(256)  # numbers that one step of a row's program looks at
SINGLES = tl.constexpr(2**16)  # counts two things in one number, at most PLACES of each
LISTED = tl.constexpr(1024)  # scores that one step of its list of keys looks at: the steps wait for one another


class TileMaxima(NamedTuple):
    """Pointers to three numbers of each tile of keys, of one row or of several: its largest score, the largest of its
    other scores, and the key of the largest."""

    largest: Tensor
    second: Tensor
    key: Tensor


class RowScores(NamedTuple):
    """Scores of one row, or maxima of them, and what turns them into distances to the threshold."""

    numbers: Tensor
    maximum: Tensor
    z_scale: Tensor
    exponent: Tensor


@triton.jit
def list_candidates(row, keys, maxima, places, capacity, begin, end, offset, C: tl.constexpr):
    """How many keys of the tiles from `begin` up to `end` have a score above the threshold. Their scores move to the
    front of the row, their numbers to `keys`. `places` has room for `capacity` tiles."""
    last_place = places + capacity - 1
    crowded, single = list_live_tiles(row, maxima.largest, maxima.second, places, last_place, begin, end, offset)
    count = list_crowded(row, keys, places, crowded, offset, C)
    return append_singles(row, keys, maxima, last_place, single, count)


@triton.jit
def list_live_tiles(row, largest, second, places, last_place, begin, end, offset):
    """(crowded, single): how many tiles have several scores above the threshold, and how many have one.

    The numbers of the first stand from `places` on, rising; those of the others from `last_place` back. Where the
    second largest scores are not known, every tile with one score above the threshold may have several.
    """
    crowded = 0
    single = 0
    for first in range(begin, end, PLACES):
        number = first + tl.arange(0, PLACES)
        alive = above_threshold(row, load_numbers(largest, first, end), offset)
        several = alive
        if second is not None:
            several = alive & above_threshold(row, load_numbers(second, first, end), offset)
        alone = alive & (several == 0)
        kind = tl.where(several, 1, tl.where(alone, SINGLES, 0))
        rank = tl.cumsum(kind, 0)
        tl.store(places + (crowded + rank % SINGLES - 1), number, mask=several)
        tl.store(last_place - (single + rank // SINGLES - 1), number, mask=alone)
        total = tl.sum(kind, 0)
        crowded += total % SINGLES
        single += total // SINGLES
    tl.debug_barrier()
    return crowded, single


@triton.jit
def load_numbers(numbers, first, end):
    """(PLACES,): numbers[first : first + PLACES]; -inf from `end` on."""
    place = first + tl.arange(0, PLACES)
    return tl.load(numbers + place, mask=place < end, other=float("-inf"))


@triton.jit
def distances(row, numbers, offset):
    """Of numbers of the row to the threshold at an offset; of -inf, 0."""
    return distance_to_threshold(numbers, row.maximum, row.z_scale, offset)


@triton.jit
def above_threshold(row, numbers, offset):
    return distances(row, numbers, offset) > 0


@triton.jit
def list_crowded(row, keys, places, tiles, offset, C: tl.constexpr):
    """How many keys of the listed tiles have a score above the threshold.

    The scores of the n-th listed tile lie behind n tiles of scores or more. So a step writes before what any
    later step loads, and its scores can be loaded while the step before it is appended.
    """
    count = 0
    end = tiles * C.TILE
    key, score = listed_scores(row, places, 0, end, C)
    for first in range(0, end, LISTED):
        next_key, next_score = listed_scores(row, places, first + LISTED, end, C)
        alive = tl.where(above_threshold(row, score, offset), 1, 0)
        count = append_keys(row.numbers, keys, count, score, key, alive)
        key = next_key
        score = next_score
    return count


@triton.jit
def listed_scores(row, places, first, end, C: tl.constexpr):
    """(keys, their scores), (LISTED,), from number `first` on of all keys of the listed tiles; -inf from `end` on."""
    number = first + tl.arange(0, LISTED)
    inside = number < end
    key = tl.load(places + number // C.TILE, mask=inside, other=0) * C.TILE + number % C.TILE
    return key, tl.load(row.numbers + key, mask=inside, other=float("-inf"))


@triton.jit
def append_singles(row, keys, maxima, last_place, tiles, count):
    """Append the largest score of each tile that is listed from `last_place` back. Returns the new number of keys."""
    for first in range(0, tiles, PLACES):
        place = first + tl.arange(0, PLACES)
        inside = place < tiles
        tile = tl.load(last_place - place, mask=inside, other=0)
        score = tl.load(maxima.largest + tile, mask=inside, other=0.0)
        key = tl.load(maxima.key + tile, mask=inside, other=0)
        tl.store(row.numbers + count + place, score, mask=inside)
        tl.store(keys + count + place, key, mask=inside)
    tl.debug_barrier()
    return count + tiles


@triton.jit
def append_keys(numbers, keys, count, number, key, alive):
    """Append those that are alive to both lists. Returns the new number of them."""
    place = count + tl.cumsum(alive, 0) - 1
    tl.debug_barrier()  # all have read what is written over
    tl.store(numbers + place, number, mask=alive > 0)
    tl.store(keys + place, key, mask=alive > 0)
    tl.debug_barrier()
    return count + tl.sum(alive, 0)

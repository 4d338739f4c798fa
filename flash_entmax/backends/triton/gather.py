"""Lists of single rows, from a flag for each row of some tiles. Rows come in ascending order.

A list is filled up to whole blocks with rows of the last listed tiles that have no flag. They are visible to whoever
walks the list, and their probability there is 0. So no block needs a mask.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class RowCount(NamedTuple):
    """How many rows are listed; the index of the last tile that was taken, and of the one before it, or -1."""

    rows: int
    last: int
    before: int


@triton.jit
def load_bits(words, index, inside, C: tl.constexpr):
    """(tiles, TILE) flags from the words at some indices, a bit for each row; 0 where that is not inside."""
    row = tl.arange(0, C.TILE)[None, :]
    pointers = words + (tl.cast(index, tl.int64) * C.WORDS)[:, None] + row // C.BITS
    return (tl.load(pointers, mask=inside[:, None], other=0) >> (row % C.BITS)) & 1


@triton.jit
def load_flags(flags, index, inside, C: tl.constexpr):
    """(tiles, TILE) flags from bytes; 0 where the index is not inside."""
    pointers = flags + (tl.cast(index, tl.int64) * C.TILE)[:, None] + tl.arange(0, C.TILE)[None, :]
    return tl.load(pointers, mask=inside[:, None], other=0).to(tl.int32)


@triton.jit
def append_rows(rows, count, quota, index, tile, flags, candidate, C: tl.constexpr):
    """(count, taken): append the rows of the candidates, except of tiles that have too many or exceed the quota.

    `index` tells the flags of a tile from those of others, and ascends. A tile without any flag counts as taken.
    """
    number = tl.sum(flags, 1)
    few = candidate & (number < C.WHOLE_FROM)
    taken = few & (count.rows + tl.cumsum(tl.where(few, number, 0), 0) <= quota)
    number = tl.where(taken, number, 0)
    first = count.rows + tl.cumsum(number, 0) - number
    place = first[:, None] + tl.cumsum(flags, 1) - 1
    row = tile[:, None] * C.TILE + tl.arange(0, C.TILE)[None, :]
    tl.store(rows + place, row, mask=(flags > 0) & taken[:, None])
    newest = tl.max(tl.where(taken, index, -1), 0)
    second = tl.max(tl.where(taken & (index < newest), index, -1), 0)
    before = tl.where(second >= 0, second, tl.where(newest >= 0, count.last, count.before))
    return RowCount(count.rows + tl.sum(number, 0), tl.where(newest >= 0, newest, count.last), before), taken


@triton.jit
def fill_last_block(rows, count, tile, flags, length, C: tl.constexpr):
    """How many blocks the list has, after it was filled up from two tiles: those at count.last and count.before.

    One tile alone has as many other rows as its block lacks. Two tiles have more than a block. The last of `length`
    rows stands for all behind it.
    """
    missing = (C.TILE - count.rows % C.TILE) % C.TILE
    others = tl.where((tile >= 0)[:, None], 1 - flags, 0)
    number = tl.sum(others, 1)
    place = (tl.cumsum(number, 0) - number)[:, None] + tl.cumsum(others, 1) - 1
    row = tl.minimum(tile[:, None] * C.TILE + tl.arange(0, C.TILE)[None, :], length - 1)
    tl.store(rows + count.rows + place, row, mask=(others > 0) & (place < missing))
    tl.debug_barrier()
    return (count.rows + missing) // C.TILE

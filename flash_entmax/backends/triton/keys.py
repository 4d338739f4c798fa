"""Some keys of one head, the mirror of some queries."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .tile import load_block, load_columns, load_whole_tile, tile_pointers


class Keys(NamedTuple):
    """Keys and their places: key number n of the head is at n = first + column. Single keys have no tile: -1."""

    tile: int
    first: int
    column: Tensor
    k: Tensor


@triton.jit
def open_keys(key, block, sizes, MASKED: tl.constexpr, C: tl.constexpr):
    """A block of the keys of a head's matrix."""
    k = load_block(key, block, sizes.key_length, MASKED, C.HEAD, C.HEAD_PADDED)
    return Keys(block.tile, block.first, block.column, k)


@triton.jit
def open_listed_keys(key, tiles, place, TILES: tl.constexpr, C: tl.constexpr):
    """One tile, or two side by side, from a place of a list of tiles without a mask.

    Two tiles share the overhead of a loop and make wider matrix products. Their distance is a product: of a choice
    between it and 0, Triton 3.8 and 3.9 do not see that 16 divides it, and load each number by itself.
    """
    TILE: tl.constexpr = C.TILE
    tile = tl.load(tiles.tiles + place)
    if TILES == 2:
        row = tl.arange(0, 2 * TILE)
        apart = tl.load(tiles.tiles + place + 1) - tile - 1
        shift = ((row >= TILE).to(tl.int64) * (tl.cast(apart, tl.int64) * TILE * key.row_stride))[:, None]
        column = tl.where(row < TILE, row, row + apart * TILE)
        k = load_columns(tile_pointers(key, tile * TILE, 2 * TILE, C.HEAD_PADDED) + shift, C.HEAD, C.HEAD_PADDED)
    else:
        column = tl.arange(0, TILE)
        k = load_whole_tile(key, tile * TILE, TILE, C.HEAD, C.HEAD_PADDED)
    return Keys(tile, tile * TILE, column, k)

"""What the forward pass keeps for the gradient: the keys that each tile of queries may reach, and the other way round.

`reached_keys` has one record of int32 numbers for each tile of queries:

    a bit for each tile of keys: some query may reach a key of it        live_words
    a bit for each tile of keys: it is listed whole                      live_words
    how many blocks of single keys are listed                            1, and up to 3 that are unused
    the single keys                                                      key_quota

`reaching_queries` has one bit for each query of a tile of queries, in C.WORDS words, for every batch row, query head,
tile of keys and tile of queries in this order: the query may reach one of the keys. Beyond Config.STORED_TILES tiles of
keys it has none of these, and the backward computes them again, some tiles of keys at a time. SPARE tiles of keys are
added that nobody reads: PyTorch compiles a dimension of no or one element by itself.

Together with the output's mean and the numbers of each row this is at most 512 bytes for each query of a head of 128
numbers in 16 bits, whatever the length.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.call import Problem, live_words
from ...core.tensors import ceil_div, unpack_tiles
from . import config
from .tile import WORD

SPARE = tl.constexpr(2)


class Record(NamedTuple):
    """Pointers to the parts of one record, and how many single keys it holds at most."""

    live: Tensor
    whole: Tensor
    row_blocks: Tensor
    rows: Tensor
    quota: int


def reach_shapes(problem: Problem, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `reached_keys` and `reaching_queries`; see backends.Backend. Lengths may be symbols."""
    tile = config.tile_size(dtype, problem.widest)
    sizes = problem.batch, problem.heads, problem.query_length, problem.key_length
    return shapes_of(sizes, tile, *config.reach_limits(dtype, problem.value_size, tile))


def shapes_of(sizes: tuple, tile: int, quota: int, stored_tiles: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`reach_shapes` for (batch, heads, query length, key length)."""
    batch, heads, query_length, key_length = sizes
    query_tiles, key_tiles = ceil_div(query_length, tile), ceil_div(key_length, tile)
    is_stored = torch.sym_min(1, stored_tiles // torch.sym_max(1, key_tiles))
    words = query_tiles * (key_tiles * is_stored + SPARE.value) * config.words_per_tile(tile)
    return (batch, heads, query_tiles * record_size(key_length, tile, quota)), (batch, heads, words)


def record_size(key_length: int, tile: int, quota: int) -> int:
    return header_size(live_words(key_length, tile)) + torch.sym_min(quota, tile * ceil_div(key_length, 2 * tile))


def header_size(words: int) -> int:
    """The single keys start at a multiple of 16 bytes."""
    return ceil_div(2 * words + 1, 4) * 4


def reached_tiles(problem: Problem, dtype: torch.dtype, reached_keys: Tensor) -> Tensor:
    """(batch, heads, query tiles, key tiles) bool: see backends.Backend."""
    tile = config.tile_size(dtype, problem.widest)
    quota, _ = config.reach_limits(dtype, problem.value_size, tile)
    size = record_size(problem.key_length, tile, quota)
    records = reached_keys.unflatten(-1, (ceil_div(problem.query_length, tile), size))
    return unpack_tiles(records[..., : live_words(problem.key_length, tile)], ceil_div(problem.key_length, tile))


@triton.jit
def open_record(records, index, sizes, C: tl.constexpr):
    """The record at some index. `live_words`, `header_size` and `record_size` say where its parts are."""
    key_tiles = (sizes.key_length + C.TILE - 1) // C.TILE
    words = (key_tiles + WORD - 1) // WORD + 1
    header = (2 * words + 1 + 3) // 4 * 4
    quota = row_quota(sizes.key_length, C)
    live = records + tl.cast(index, tl.int64) * (header + quota)
    return Record(live, live + words, live + 2 * words, live + header, quota)


@triton.jit
def record_index(index, unit, tile, sizes, C: tl.constexpr):
    """Records are kept for the backward, or for one chunk only."""
    if C.NEEDS_BACKWARD:
        index = unit * ((sizes.query_length + C.TILE - 1) // C.TILE) + tile
    return index


@triton.jit
def row_quota(length, C: tl.constexpr):
    """Single rows that a list may hold. A tile that has as many as half of its rows is listed whole."""
    return tl.minimum(C.QUOTA, (length + 2 * C.TILE - 1) // (2 * C.TILE) * C.TILE)


@triton.jit
def are_kept(key_length, C: tl.constexpr):
    """Whether the words are those of all heads and tiles, and stay for the backward."""
    kept = key_length < 0
    if C.NEEDS_BACKWARD:
        kept = (key_length + C.TILE - 1) // C.TILE <= C.STORED_TILES
    return kept


@triton.jit
def query_words(words, unit, tile, first_unit, first_tile, tiles, sizes, C: tl.constexpr):
    """(pointer, stride): the first word of a tile of queries and the first tile of keys; how far the next tile is.

    The words are all that are kept, or those of one chunk: of so many tiles of queries, from `first_tile` on.
    """
    key_tiles = (sizes.key_length + C.TILE - 1) // C.TILE
    if are_kept(sizes.key_length, C):
        first_unit, first_tile, tiles = 0, 0, (sizes.query_length + C.TILE - 1) // C.TILE
        key_tiles += SPARE
    place = tl.cast(unit - first_unit, tl.int64) * key_tiles * tiles + tile - first_tile
    return words + place * C.WORDS, tiles * C.WORDS


@triton.jit
def key_words(words, unit, tile, index, first_tile, tiles, sizes, C: tl.constexpr):
    """Where the words of a tile of keys would start if they started with those of tile 0 of queries.

    They are among all that are kept, or are number `index` of one launch: of so many tiles of queries, from
    `first_tile` on. A launch of several units is for all tiles of keys: its words lie as `query_words` has them.
    """
    if are_kept(sizes.key_length, C):
        index = unit * ((sizes.key_length + C.TILE - 1) // C.TILE + SPARE) + tile
        first_tile, tiles = 0, (sizes.query_length + C.TILE - 1) // C.TILE
    return words + (tl.cast(index, tl.int64) * tiles - first_tile) * C.WORDS

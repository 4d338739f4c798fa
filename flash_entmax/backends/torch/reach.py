"""Which keys each tile of rows reaches: the packed map that the backward pass goes by, and groups of tiles from it.

A bit stands for `keys_of_a_bit` keys side by side: for one key up to 65,535 keys. So the map takes at most 128 bytes
for each query of each head.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.call import Problem, live_words
from ...core.tensors import ceil_div, pack_tiles, unpack_tiles
from .tiles import CHUNK_SCORES, TILE, Group, groups, tile_rows

MAX_BITS = 2**16  # for a tile of rows
WHOLE_TILES = 2 / 3  # from this share of reached keys in the reached tiles on, whole tiles cost less


def keys_of_a_bit(key_length: int) -> int:
    return 1 + key_length // MAX_BITS


def words_of(key_length: int) -> int:
    """The int32 words of a tile of rows. One more than elsewhere: so that PyTorch can prove, where it exports a call of
    any length, that those of all tiles together are more than one."""
    return live_words(key_length, keys_of_a_bit(key_length)) + 1


def reach_shapes(problem: Problem, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The packed map of reached keys, by which both gradients go; see backends.Backend."""
    units = problem.batch, problem.heads
    return (*units, ceil_div(problem.query_length, TILE) * words_of(problem.key_length)), (*units, 0)


def pack_keys(reached: Tensor, key_length: int) -> Tensor:
    """(units, query tiles, keys of whole tiles) bool -> (units, query tiles, words) int32."""
    span = keys_of_a_bit(key_length)
    bits = ceil_div(key_length, span)
    marks = pad(reached[..., :key_length], (0, bits * span - key_length)).unflatten(-1, (bits, span)).any(-1)
    words = pack_tiles(marks)
    return pad(words, (0, words_of(key_length) - words.shape[-1]))


def unpack_keys(words: Tensor, key_length: int) -> Tensor:
    """The inverse of `pack_keys`, up to the keys that share a bit."""
    span = keys_of_a_bit(key_length)
    reached = unpack_tiles(words, ceil_div(key_length, span)).repeat_interleave(span, -1)[..., :key_length]
    return pad(reached, (0, -key_length % tile_rows(key_length)))


def bands(problem: Problem) -> Iterator[slice]:
    """Query tiles whose map of reached keys holds at most CHUNK_SCORES marks, or one query tile of each unit."""
    step = max(1, CHUNK_SCORES // max(1, problem.batch * problem.heads * problem.key_length))
    for start in range(0, max(1, ceil_div(problem.query_length, TILE)), step):
        yield slice(start, start + step)


def unpacked_bands(problem: Problem, reached_keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Bands, and (units, query tiles, keys of whole tiles) bool, what these reach."""
    shape = ceil_div(problem.query_length, TILE), words_of(problem.key_length)
    words = reached_keys.flatten(0, 1).unflatten(-1, shape)
    for band in bands(problem):
        yield band, unpack_keys(words[:, band], problem.key_length)


def reached_groups(problem: Problem, reached_keys: Tensor) -> Iterator[Group]:
    """Groups of all tiles of rows and of what they reach."""
    for band, reached in unpacked_bands(problem, reached_keys):
        for group in groups_by_share(reached, tile_rows(problem.key_length)):
            yield group._replace(query_tile=group.query_tile + band.start)


def groups_by_share(reached: Tensor, width: int) -> Iterator[Group]:
    """Groups of the tiles of rows of a (units, query tiles, keys) map: by whole tiles of keys, or by single keys."""
    tiles = marked_tiles(reached, width)
    whole = (reached.sum(-1) >= WHOLE_TILES * width * tiles.sum(-1)).unsqueeze(-1)
    yield from groups(tiles & whole, width)
    yield from groups(reached & ~whole, 1)


def reached_tiles(problem: Problem, dtype: torch.dtype, reached_keys: Tensor) -> Tensor:
    """Tiles with a reached key; see backends.Backend."""
    width = tile_rows(problem.key_length)
    tiles = [marked_tiles(reached, width) for _, reached in unpacked_bands(problem, reached_keys)]
    return torch.cat(tiles, 1).unflatten(0, (problem.batch, problem.heads))


def marked_tiles(reached: Tensor, width: int) -> Tensor:
    """(units, query tiles, keys) -> (units, query tiles, key tiles)."""
    return reached.unflatten(-1, (reached.shape[-1] // width, width)).any(-1)

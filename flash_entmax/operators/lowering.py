"""From the public call to the operators: the backend is chosen, and the options become tensors and numbers.

flash_entmax::intervals     first key, one past the last, and position of each query
flash_entmax::key_filter    a key mask as a filter by tiles
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..core import visibility as masks
from ..core.call import ScoreOptions, VisibilityArgs
from ..core.checks import check_packing
from ..core.tensors import WORD_BITS, ceil_div
from ..core.visibility import Visibility
from .registration import batch_into, call_one_by_one, fake, operator


class Lowered(NamedTuple):
    """A call as the operators take it. `backend` is a name. tile is that of the live map, 0 where no operator computes
    the call: those of the specification and of softmax read the caller's masks."""

    backend: str
    tile: int
    score: ScoreOptions
    visibility: VisibilityArgs


def lowered(
    query: Tensor, key: Tensor, value: Tensor, score: ScoreOptions, visibility: Visibility, impl: str
) -> Lowered:
    """Choose the backend, and lower the options to what it takes."""
    backend = backends.choose(query, impl, others=("reference",))
    score = score.lowered(query)
    key_length, tile, kinds, bits = key.shape[2], 0, None, None
    if backend in backends.BACKENDS and (isinstance(score.alpha, Tensor) or score.alpha != 1.0):
        tile = backends.BACKENDS[backend].tile_size(query.dtype, max(query.shape[-1], value.shape[-1]))
        kinds, bits = filter_by_tiles(query, key_length, visibility, tile)
    is_plain = visibility.is_plain
    intervals = None if is_plain else intervals_of(query, key_length, visibility)
    is_causal = is_plain and visibility.window[1] == 0
    span = visibility.max_span(key_length)
    return Lowered(backend, tile, score, VisibilityArgs(intervals, kinds, bits, is_causal, span))


def filter_by_tiles(
    query: Tensor, key_length: int, visibility: Visibility, tile: int
) -> tuple[Tensor | None, Tensor | None]:
    """(tile_kinds, tile_bits), or None where no mask needs a filter."""
    if visibility.key_mask is not None:
        return key_filter(visibility.key_mask, tile)
    if visibility.block_mask is not None:
        return masks.filter_of_blocks(visibility.block_mask, (query.shape[2], key_length), tile)
    return None, None


def intervals_of(query: Tensor, key_length: int, visibility: Visibility) -> Tensor:
    """VisibilityArgs.intervals."""
    given = visibility.query_positions
    positions, first = (given, 0) if isinstance(given, Tensor) else (None, given)
    if first is None:  # the last query stands at the last key
        first = key_length - query.shape[2]
    limits = positions, visibility.key_lengths, visibility.cu_seq_q, visibility.cu_seq_k
    longest = visibility.max_q, visibility.max_k
    return intervals(query.detach(), *limits, key_length, first, *visibility.window, *longest)


@operator(
    "Tensor query, Tensor? query_positions, Tensor? key_lengths, Tensor? cu_seq_q, Tensor? cu_seq_k, "
    "SymInt key_length, SymInt first_position, SymInt left, SymInt right, SymInt max_q, SymInt max_k",
    results=1,
)
def intervals(
    query, query_positions, key_lengths, cu_seq_q, cu_seq_k, key_length, first_position, left, right, max_q, max_k
):  # fmt: skip
    sizes = query.shape[0], query.shape[2], key_length
    if cu_seq_q is not None:
        check_packing(cu_seq_q, cu_seq_k, *sizes[1:], max_q, max_k)
    limits = query_positions, key_lengths, cu_seq_q, cu_seq_k
    return masks.intervals(*limits, sizes, first_position, (left, right), query.device)


@fake("intervals")
def _(query, *_):
    return query.new_empty(query.shape[0], 3, query.shape[2], dtype=torch.int32)


@operator("Tensor key_mask, int tile", results=2)
def key_filter(key_mask, tile):
    return tuple(masks.filter_of_keys(key_mask, tile))


@fake("key_filter")
def _(key_mask, tile):
    batch, tiles = key_mask.shape[0], ceil_div(key_mask.shape[1], tile) + 1
    shapes = (batch, 1, 1, tiles), (batch * tiles, 1, ceil_div(tile, WORD_BITS))
    return tuple(key_mask.new_empty(shape, dtype=torch.int32) for shape in shapes)


batch_into(intervals, (0, None, 0), (0,))
call_one_by_one(key_filter)

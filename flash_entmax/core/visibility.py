"""Which keys a query may see: the caller's options, and what they are lowered to.

`Visibility` holds the options. The backends know two things only. Each query has an interval of keys: causality,
windows, positions, padding and packed sequences are all intervals. A `TileFilter` holds any other mask.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from .closure import state_of
from .tensors import WORD_BITS, ceil_div, pack_tiles

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

UNLIMITED = -1
HIDDEN, WHOLE, FIRST_PARTIAL = 0, 1, 2
LISTS = "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"  # of a BlockMask
FURTHEST = 2**30  # a position beyond is taken for this one, so that differences fit 32 bits


@dataclass(frozen=True)
class Visibility:
    """The options that decide which keys a query may see: a key must pass all of them."""

    is_causal: bool = False
    window_size: tuple[int, int] = (UNLIMITED, UNLIMITED)
    query_positions: int | Tensor | None = None
    key_lengths: Tensor | None = None
    key_mask: Tensor | None = None
    block_mask: "BlockMask | None" = None
    cu_seq_q: Tensor | None = None
    cu_seq_k: Tensor | None = None
    max_q: int = 0  # the longest packed sequence, of queries and of keys
    max_k: int = 0

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) with causality as the window that ends at the query itself."""
        left, right = self.window_size
        return min(left, 2 * FURTHEST), 0 if self.is_causal else min(right, 2 * FURTHEST)

    @property
    def is_plain(self) -> bool:
        """There is no mask, or the causal one of the whole rectangle: no intervals are needed for it."""
        left, right = self.window
        is_whole = self.query_positions is None and self.key_lengths is None and self.cu_seq_q is None
        return left == UNLIMITED and right in (UNLIMITED, 0) and is_whole

    def max_span(self, key_length: int) -> int:
        """No 64 consecutive queries see more keys than this from the first to the last.

        It is not clamped to the keys that exist: a number that no length enters lets a compiler keep one graph for all
        lengths.
        """
        left, right = self.window
        if isinstance(self.query_positions, Tensor) or self.cu_seq_q is not self.cu_seq_k:
            return key_length
        if self.cu_seq_q is not None:  # queries and keys of a sequence are in the same places
            longest = max(self.max_q, self.max_k)
            left = longest if left == UNLIMITED else min(left, longest)
            right = longest if right == UNLIMITED else min(right, longest)
        if UNLIMITED in (left, right):
            return key_length
        return left + right + 64


class TileFilter(NamedTuple):
    """A mask by tiles. A kind is HIDDEN, WHOLE, or FIRST_PARTIAL + the row of bits that says which keys are seen.

    tile_kinds: (batch or 1, heads or 1, query tiles or 1, key tiles + 1) int32. tile_bits: (partial tiles, queries or
    1, words) int32, where bit b of word w is key 32 w + b of the tile. The tile past the last one decides nothing:
    PyTorch compiles a dimension of one element by itself.
    """

    tile_kinds: Tensor
    tile_bits: Tensor


def intervals(
    query_positions: Tensor | None,
    key_lengths: Tensor | None,
    cu_seq_q: Tensor | None,
    cu_seq_k: Tensor | None,
    sizes: tuple[int, int, int],
    first_position: int,
    window: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """(batch, 3, query length) int32: the first key that a query sees, one past the last, and the query's position.

    Keys count from 0 in the whole key tensor, in packed sequences too. `sizes` are (batch, query length, key length).
    Without positions, queries stand at `first_position` and on; the last query of a packed sequence stands at its last
    key.
    """
    batch, query_length, key_length = sizes
    if query_positions is not None:
        position = query_positions.to(torch.int64).clamp(-FURTHEST, FURTHEST)
    else:
        position = torch.arange(query_length, device=device)
    first, end = 0, key_length
    if cu_seq_q is not None:
        to_last, first, end = packed_rows(query_length, cu_seq_q.to(torch.int64), cu_seq_k.to(torch.int64))
        position = end - to_last if query_positions is None else first + position
    elif query_positions is None:
        position = position + first_position
    if key_lengths is not None:
        end = key_lengths.clamp(0, end).unsqueeze(-1)
    left, right = window
    start = position * 0 + first if left == UNLIMITED else (position - left).clamp_min(first)
    stop = position * 0 + end if right == UNLIMITED else (position + (right + 1)).clamp_max(end)
    rows = torch.broadcast_tensors(start.clamp(0, key_length), stop.clamp(0, key_length), position)
    return torch.stack(rows, -2).to(torch.int32).expand(batch, -1, -1).contiguous()


def packed_rows(query_length: int, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each query token: how far it is from the end of its queries; its sequence's first key, and one past the last.

    Tokens past the last boundary get no key.
    """
    row = torch.arange(query_length, device=cu_q.device)
    if cu_q.shape[0] == 1:
        return row, row * 0, row * 0
    sequence = torch.searchsorted(cu_q, row, right=True) - 1
    inside = sequence < cu_q.shape[0] - 1
    sequence = sequence.clamp(0, cu_q.shape[0] - 2)
    first, end = cu_k[sequence], cu_k[sequence + 1]
    return cu_q[sequence + 1] - row, first, torch.where(inside, end, first)


def filter_of_blocks(block_mask: "BlockMask", lengths: tuple[int, int], tile: int) -> TileFilter:
    """The filter of a block mask for so many queries and keys, in tiles of `tile` queries and keys."""
    read = _kept_filter_of_blocks
    if "torch._dynamo" in sys.modules:  # which goes on inside where it could not compile the call
        read = torch.compiler.disable(read)
    return read(block_mask, lengths, tile)


_filters: WeakKeyDictionary = WeakKeyDictionary()  # evaluating a mask_mod takes longer than the attention


def _kept_filter_of_blocks(block_mask: "BlockMask", lengths: tuple[int, int], tile: int) -> TileFilter:
    """The filter that was made last time, unless the mask or anything that its mask_mod reads has changed."""
    lists = tuple(getattr(block_mask, name) for name in LISTS)
    state = state_of((block_mask.mask_mod, lists, block_mask.BLOCK_SIZE, *lengths))
    by_tile = _filters.setdefault(block_mask, {})
    before, kept = by_tile.get(tile, (None, None))
    if before is not None and state is not None and before.key == state.key:
        return kept
    with torch.inference_mode(False), torch.no_grad():  # kept for training, wherever it is first used
        made = _filter_of_blocks(block_mask, lengths, tile)
    by_tile[tile] = state, made
    return made


def filter_of_keys(mask: Tensor, tile: int) -> TileFilter:
    """The filter of a key mask, (batch, key length) bool, for tiles of `tile` queries and keys."""
    batch, keys = mask.shape
    # Keys past the last one count as seen: the interval hides them, and a whole tile needs no bits.
    seen = pad(mask, (0, -keys % tile + tile), value=True).view(-1, 1, tile)
    index = torch.arange(seen.shape[0], dtype=torch.int32, device=mask.device)
    return TileFilter(_kinds(seen, index).view(batch, 1, 1, ceil_div(keys, tile) + 1), pack_tiles(seen))


def _kinds(seen: Tensor, index: Tensor) -> Tensor:
    """(n,) int32 from (n, rows, keys) bool: tiles seen in part point at their row of bits."""
    partial = torch.where(seen.flatten(1).any(-1), index + FIRST_PARTIAL, HIDDEN)
    return torch.where(seen.flatten(1).all(-1), WHOLE, partial).to(torch.int32)


def _filter_of_blocks(block_mask: "BlockMask", lengths: tuple[int, int], tile: int) -> TileFilter:
    """FlexAttention's lists say which blocks are whole. In the others its mask_mod decides for each query and key."""
    from torch.nn.attention.flex_attention import create_mask

    query_tiles, key_tiles = (ceil_div(length, tile) for length in lengths)
    kinds = torch.full(block_mask.kv_indices.shape, HIDDEN, dtype=torch.int32, device=block_mask.kv_indices.device)
    kinds = _mark(kinds, block_mask.kv_num_blocks, block_mask.kv_indices, FIRST_PARTIAL)
    if block_mask.full_kv_num_blocks is not None:
        kinds = _mark(kinds, block_mask.full_kv_num_blocks, block_mask.full_kv_indices, WHOLE)
    for dim, size in zip((-2, -1), block_mask.BLOCK_SIZE, strict=True):
        kinds = kinds.repeat_interleave(size // tile, dim)
    kinds = kinds[..., :query_tiles, :key_tiles].contiguous()
    batch, head, query_tile, key_tile = (kinds == FIRST_PARTIAL).nonzero(as_tuple=True)
    inside = torch.arange(tile, device=kinds.device)
    query = (query_tile.unsqueeze(-1) * tile + inside).clamp_max(lengths[0] - 1)
    key = (key_tile.unsqueeze(-1) * tile + inside).clamp_max(lengths[1] - 1)
    if batch.numel() == 0:
        return TileFilter(pad(kinds, (0, 1)), kinds.new_zeros(1, tile, ceil_div(tile, WORD_BITS)))

    def sees(place: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return block_mask.mask_mod(batch[place], head[place], query[place, i], key[place, j])

    seen = create_mask(sees, batch.numel(), 1, tile, tile, device=kinds.device).squeeze(1)
    index = torch.arange(batch.numel(), dtype=torch.int32, device=kinds.device)
    kinds[batch, head, query_tile, key_tile] = _kinds(seen, index)
    return TileFilter(pad(kinds, (0, 1)), pack_tiles(seen))


def _mark(kinds: Tensor, counts: Tensor, indices: Tensor, kind: int) -> Tensor:
    """Write `kind` to the first `counts` of the listed columns of each row."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    marked = torch.zeros_like(kinds).scatter_add_(-1, indices.to(torch.int64), listed.to(torch.int32))
    return torch.where(marked > 0, kind, kinds)

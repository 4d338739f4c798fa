"""A filter by tiles: what a mask is lowered to that is no interval.

flash_entmax::key_filter    a key mask as a filter
"""

import sys
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from .closure import state_of
from .registration import call_one_by_one, fake, operator
from .tensors import WORD_BITS, ceil_div, pack_tiles

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

HIDDEN, WHOLE, FIRST_PARTIAL = 0, 1, 2
LISTS = "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"  # of a BlockMask


class TileFilter(NamedTuple):
    """A mask by tiles. A kind is HIDDEN, WHOLE, or FIRST_PARTIAL + the row of bits that says which keys are seen.

    tile_kinds: (batch or 1, heads or 1, query tiles or 1, key tiles + 1) int32. tile_bits: (partial tiles, queries or
    1, words) int32, where bit b of word w is key 32 w + b of the tile. The tile past the last one decides nothing:
    PyTorch compiles a dimension of one element by itself.
    """

    tile_kinds: Tensor
    tile_bits: Tensor


@operator("Tensor key_mask, int tile", results=2)
def key_filter(key_mask: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    kinds, bits = filter_of_keys(key_mask, tile)
    return kinds, bits


@fake("key_filter")
def _(key_mask: Tensor, tile: int) -> tuple[Tensor, ...]:
    batch, tiles = key_mask.shape[0], ceil_div(key_mask.shape[1], tile) + 1
    shapes = (batch, 1, 1, tiles), (batch * tiles, 1, ceil_div(tile, WORD_BITS))
    return tuple(key_mask.new_empty(shape, dtype=torch.int32) for shape in shapes)


call_one_by_one(key_filter)


def filter_of_keys(mask: Tensor, tile: int) -> TileFilter:
    """The filter of a key mask, (batch, key length) bool, for tiles of `tile` queries and keys."""
    batch, keys = mask.shape
    # Keys past the last one count as seen: the interval hides them, and a whole tile needs no bits.
    seen = pad(mask, (0, -keys % tile + tile), value=True).view(-1, 1, tile)
    index = torch.arange(seen.shape[0], dtype=torch.int32, device=mask.device)
    return TileFilter(_kinds(seen, index).view(batch, 1, 1, ceil_div(keys, tile) + 1), pack_tiles(seen))


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


def _filter_of_blocks(block_mask: "BlockMask", lengths: tuple[int, int], tile: int) -> TileFilter:
    """FlexAttention's lists say which blocks are whole. In the others its mask_mod decides for each query and key."""
    from torch.nn.attention.flex_attention import create_mask

    query_tiles, key_tiles = (ceil_div(length, tile) for length in lengths)
    kinds = torch.full(block_mask.kv_indices.shape, HIDDEN, dtype=torch.int32, device=block_mask.kv_indices.device)
    kinds = _mark(kinds, block_mask.kv_num_blocks, block_mask.kv_indices, FIRST_PARTIAL)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
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


def _kinds(seen: Tensor, index: Tensor) -> Tensor:
    """(n,) int32 from (n, rows, keys) bool: tiles seen in part point at their row of bits."""
    partial = torch.where(seen.flatten(1).any(-1), index + FIRST_PARTIAL, HIDDEN)
    return torch.where(seen.flatten(1).all(-1), WHOLE, partial).to(torch.int32)


def _mark(kinds: Tensor, counts: Tensor, indices: Tensor, kind: int) -> Tensor:
    """Write `kind` to the first `counts` of the listed columns of each row."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    marked = torch.zeros_like(kinds).scatter_add_(-1, indices.to(torch.int64), listed.to(torch.int32))
    return torch.where(marked > 0, kind, kinds)

"""How tensors lie in memory: dtypes of rows, storage orders, packed bits, nested tensors."""

from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nested._internal.nested_tensor import NestedTensor

WORD_BITS = 32
ROW_ALIGNMENT = 16  # elements; Triton takes a stride for aligned when 16 divides it


def empty_stored_as(tensor: Tensor, size: int) -> Tensor:
    """(batch, heads, length, size) in the tensor's order: heads first, or rows first, as a layer's projections are."""
    batch, heads, length, _ = tensor.shape
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty(batch, length, heads, size).transpose(1, 2)
    return tensor.new_empty(batch, heads, length, size)


def row_dtype(query: Tensor) -> torch.dtype:
    """The dtype of everything that a row has one of."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def pack_tiles(tiles: Tensor) -> Tensor:
    """(..., key tiles) bool -> (..., words) int32: bit b of word w is key tile 32 w + b."""
    words = ceil_div(tiles.shape[-1], WORD_BITS)
    padded = torch.nn.functional.pad(tiles, (0, words * WORD_BITS - tiles.shape[-1]))
    bits = padded.unflatten(-1, (words, WORD_BITS)).to(torch.int64)
    weights = 1 << torch.arange(WORD_BITS, device=tiles.device, dtype=torch.int64)
    unsigned = (bits * weights).sum(-1)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def unpack_tiles(words: Tensor, key_tiles: int) -> Tensor:
    """(..., words) int32 -> (..., key tiles) bool, the inverse of pack_tiles."""
    bits = torch.arange(WORD_BITS, device=words.device, dtype=torch.int32)
    return (words.unsqueeze(-1) >> bits & 1).flatten(-2)[..., :key_tiles].bool()


def is_nested(tensor: object) -> "TypeGuard[Tensor]":
    return isinstance(tensor, Tensor) and tensor.is_nested


def is_jagged(tensor: object, ragged: int = 1) -> "TypeGuard[NestedTensor]":
    """A nested tensor whose ragged dimension is this one, without holes: all that its values and offsets can say."""
    if not is_nested(tensor) or tensor.layout != torch.jagged:
        return False
    jagged = cast("NestedTensor", tensor)
    return jagged._ragged_idx == ragged and jagged.lengths() is None


def longest_sequence(jagged: "NestedTensor") -> int:
    """Of a nested tensor that may know it; all tokens are a bound as well."""
    return getattr(jagged, "_maybe_max_seqlen", None) or jagged.values().shape[jagged._ragged_idx - 1]


def jagged_like(jagged: "NestedTensor", values: Tensor) -> Tensor:
    """A nested tensor of the same sequences, which knows the same of their lengths."""
    lengths = {name: getattr(jagged, f"_maybe_{name}", None) for name in ("min_seqlen", "max_seqlen")}
    place = jagged._ragged_idx
    return torch.nested.nested_tensor_from_jagged(values, jagged.offsets(), jagged_dim=place, **lengths)


def clamped(number: Tensor, limits: tuple[float, float]) -> Tensor:
    """With gradient 0 outside of the limits and not on them, where `clamp` of torch 2.14 has 0 as well."""
    lowest, highest = limits
    return torch.where(number < lowest, lowest, torch.where(number > highest, highest, number))


def spoiled(rows: Tensor, x: Tensor, is_bad: Tensor) -> Tensor:
    """NaN in bad rows, with a gradient of NaN in x; elsewhere the rows, with their own."""
    factor = torch.ones_like(is_bad, dtype=x.dtype).masked_fill(is_bad, torch.nan)
    return torch.where(is_bad, torch.where(is_bad, x, 0.0) * factor, rows)


def aligned_size(size: int) -> int:
    """The next multiple of ROW_ALIGNMENT."""
    return ceil_div(size, ROW_ALIGNMENT) * ROW_ALIGNMENT

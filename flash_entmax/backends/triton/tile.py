"""Words shared by all kernels: which tile a program has, load and store a tile, sum along it, walk a list.

A unit is one query head of one batch row, numbered batch * heads + head. Every row statistic (maximum, offset, ...) is
a contiguous (batch, heads, query length) float32 tensor.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.call import WORD_BITS, ceil_div

WORD = tl.constexpr(WORD_BITS)
ROW_ALIGNMENT = 16  # elements; Triton takes a stride for aligned when 16 divides it
LONGEST_ROW = 2**24  # elements from row to row, so that offsets inside a tile fit 32 bits

# Names of the kernels' sizes that may change from call to call: a new value of one compiles nothing.
SIZES = (
    "heads", "group", "query_length", "key_length", "first_unit", "units", "first_tile",
    "words", "capacity",
)  # fmt: skip


class Matrix(NamedTuple):
    """A (batch, heads, length, dim) tensor with contiguous rows."""

    data: Tensor
    batch_stride: int
    head_stride: int
    row_stride: int


class Extent(NamedTuple):
    """The sizes that may change from call to call."""

    heads: int
    group: int
    query_length: int
    key_length: int


class TileList(NamedTuple):
    """Indices of live tiles: the first `split` need no mask, the others do."""

    tiles: Tensor
    split: int
    count: int


def matrix(tensor: Tensor) -> Matrix:
    """Dimensions of extent 1 get stride 0: whatever stride a view left there, it decides nothing."""
    batch, heads, length, _ = tensor.shape
    strides = tensor.stride()
    return Matrix(
        tensor, strides[0] if batch > 1 else 0, strides[1] if heads > 1 else 0, strides[2] if length > 1 else 0
    )


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Inside, kernels are launched where the tensor is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def aligned_size(size: int) -> int:
    return ceil_div(size, ROW_ALIGNMENT) * ROW_ALIGNMENT


def aligned(tensor: Tensor) -> Matrix:
    """The tensor itself, if 16 divides its head size and its rows start at multiples of 16 elements and 16 bytes.

    Else a copy of which that is true, with zeros in the columns that it adds: only such rows are copied into shared
    memory asynchronously; see docs/design.md for what went wrong without.
    """
    size, m = tensor.shape[-1], matrix(tensor)
    steps = size | m.batch_stride | m.head_stride | m.row_stride  # 16 divides this if it divides each of them
    contiguous = tensor.stride(-1) == 1 and m.row_stride <= LONGEST_ROW
    if contiguous and steps % ROW_ALIGNMENT == 0 and tensor.data_ptr() % 16 == 0:
        return m
    copy = tensor.new_zeros(*tensor.shape[:-1], aligned_size(size))
    copy[..., :size] = tensor
    return matrix(copy)


def trimmed(tensor: Tensor, size: int) -> Tensor:
    """Without the columns that `aligned` added."""
    return tensor if tensor.shape[-1] == size else tensor[..., :size].clone()


@triton.jit
def heaviest_first(units, first_unit, first_tile):
    """(unit, tile) of this program: the last tiles, which see the most keys under a causal mask, start first."""
    tiles = tl.num_programs(0) // units
    program = tl.program_id(0)
    return first_unit + program % units, first_tile + tiles - 1 - program // units


@triton.jit
def query_head(m, unit, extent):
    """The matrix of one query head, its data pointer at the head's first row."""
    return head_of(m, unit // extent.heads, unit % extent.heads)


@triton.jit
def key_head(m, unit, extent):
    """The matrix of the key head that a query head reads."""
    return head_of(m, unit // extent.heads, unit % extent.heads // extent.group)


@triton.jit
def head_of(m, batch, head):
    data = m.data + tl.cast(batch, tl.int64) * m.batch_stride + tl.cast(head, tl.int64) * m.head_stride
    return Matrix(data, m.batch_stride, m.head_stride, m.row_stride)


@triton.jit
def row_pointers(rows, unit, row, extent):
    return rows + tl.cast(unit, tl.int64) * extent.query_length + row


@triton.jit
def load_row(rows, unit, row, extent, other):
    return tl.load(row_pointers(rows, unit, row, extent), mask=row < extent.query_length, other=other)


@triton.jit
def store_row(rows, unit, row, extent, value):
    tl.store(row_pointers(rows, unit, row, extent), value, mask=row < extent.query_length)


@triton.jit
def tile_pointers(m, first, TILE: tl.constexpr, PADDED: tl.constexpr):
    """64-bit to the tile, 32-bit inside it: the offsets stay in registers while the tile moves."""
    inside = tl.arange(0, TILE)[:, None] * m.row_stride + tl.arange(0, PADDED)[None, :]
    return m.data + tl.cast(first, tl.int64) * m.row_stride + inside


@triton.jit
def tile_mask(first, rows, TILE: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    inside = (tl.arange(0, TILE) < rows - first)[:, None]
    if SIZE != PADDED:
        inside = inside & (tl.arange(0, PADDED) < SIZE)[None, :]
    return inside


@triton.jit
def load_tile(m, first, rows, TILE: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """(TILE, PADDED) of the rows from `first` on; zeros past the last row and past the head size."""
    return tl.load(tile_pointers(m, first, TILE, PADDED), mask=tile_mask(first, rows, TILE, SIZE, PADDED), other=0.0)


@triton.jit
def load_whole_tile(m, first, TILE: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """The same where all rows are there: nothing is compared."""
    return load_columns(tile_pointers(m, first, TILE, PADDED), SIZE, PADDED)


@triton.jit
def load_columns(pointers, SIZE: tl.constexpr, PADDED: tl.constexpr):
    if SIZE == PADDED:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(tl.arange(0, PADDED) < SIZE)[None, :], other=0.0)
    return tile


@triton.jit
def load_keys(m, tile, extent, MASKED: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """A tile of keys or values; one that needs no mask is seen whole, and so it is whole."""
    if MASKED:
        keys = load_tile(m, tile * TILE, extent.key_length, TILE, SIZE, PADDED)
    else:
        keys = load_whole_tile(m, tile * TILE, TILE, SIZE, PADDED)
    return keys


@triton.jit
def store_tile(m, first, rows, tile, TILE: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    tile = tile.to(m.data.dtype.element_ty)
    tl.store(tile_pointers(m, first, TILE, PADDED), tile, mask=tile_mask(first, rows, TILE, SIZE, PADDED))


@triton.jit
def add_compensated(total, error, part):
    """(total + part, what rounding made of it), by Kahan (1965): thousands of equal parts lose no digits."""
    part -= error
    raised = total + part
    return raised, (raised - total) - part


@triton.jit
def no_sums(S: tl.constexpr):
    """The start of a running `sum_keys`."""
    TILE: tl.constexpr = S.TILE
    LANES: tl.constexpr = S.LANES
    nothing = tl.zeros((TILE, LANES), tl.float32)
    return nothing, nothing


@triton.jit
def sum_keys(sums, addends, S: tl.constexpr):
    """Add one or more (TILE, TILE) tiles along their keys to running sums of each row, kept in LANES parts and, in
    float32, exactly.

    Columns that are LANES apart lie in one thread, so no tile waits for an exchange between threads.
    """
    TILE: tl.constexpr = S.TILE
    LANES: tl.constexpr = S.LANES
    total, error = sums
    part = tl.sum(tl.reshape(addends, (TILE, addends.shape[1] // LANES, LANES)), 1)
    if S.COMPENSATED:
        total, error = add_compensated(total, error, part)
    else:
        total += part
    return total, error


@triton.jit
def list_of(lists, unit, tile, units, first_unit, first_tile, capacity):
    """(number of a tile's list among those of its chunk, its first place)."""
    index = (unit - first_unit) * (tl.num_programs(0) // units) + tile - first_tile
    return index, lists + tl.cast(index, tl.int64) * capacity


@triton.jit
def walk(body: tl.constexpr, state, context, tiles, S: tl.constexpr):
    """Fold `body` over a list of tiles, with the mask only on those that need it."""
    for n in range(tiles.split):
        state = body(state, context, tl.load(tiles.tiles + n), False, S)
    for n in range(tiles.split, tiles.count):
        state = body(state, context, tl.load(tiles.tiles + n), True, S)
    return state

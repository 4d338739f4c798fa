"""Words for memory: which tile a program has, where a head and a row are, load and store a tile, sum along it.

A unit is one query head of one batch row. Its number is batch * heads + head. Every row statistic (maximum, offset) is
a contiguous (batch, heads, query length) float32 tensor.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.tensors import ROW_ALIGNMENT, WORD_BITS, aligned_size

WORD = tl.constexpr(WORD_BITS)
LONGEST_ROW = 2**24  # elements from row to row, so that offsets inside a tile fit 32 bits

# Names of kernel arguments whose values Triton must not compile into a kernel.
UNSPECIALIZED = (
    "heads", "group", "query_length", "key_length", "first_unit", "units", "first_tile", "capacity", "tiles",
    "first_key", "tile_capacity", "row_capacity", "slots", "is_marked", "first_row", "rows", "line", "splits",
    "table_stride", "left", "tokens", "wanted",
)  # fmt: skip


class Matrix(NamedTuple):
    """A (batch, heads, length, dim) tensor with contiguous rows."""

    data: Tensor
    batch_stride: int
    head_stride: int
    row_stride: int


class RowBlock(NamedTuple):
    """Rows of a head that are multiplied at once, at first + column: a tile, or single rows, which have no tile: -1."""

    tile: int
    first: int
    column: Tensor


class Sizes(NamedTuple):
    """The sizes of a call. A new value compiles nothing."""

    heads: int
    group: int
    query_length: int
    key_length: int


def matrix(tensor: Tensor) -> Matrix:
    """A dimension of one element gets stride 0, whatever stride a view left there."""
    batch, heads, length, _ = tensor.shape
    of_batch, of_heads, of_rows, _ = tensor.stride()
    return Matrix(tensor, of_batch if batch > 1 else 0, of_heads if heads > 1 else 0, of_rows if length > 1 else 0)


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Inside, kernels are launched where the tensor is."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def aligned(tensor: Tensor) -> Matrix:
    """The tensor itself if 16 divides its head size and its rows start at multiples of 16 elements and 16 bytes.

    Any other tensor is copied into such rows, with zeros in the columns that are added. Only such rows reach shared
    memory asynchronously. docs/design.md says what went wrong with others.
    """
    size, m = tensor.shape[-1], matrix(tensor)
    if is_aligned(m):
        return m
    copy = tensor.new_zeros(*tensor.shape[:-1], aligned_size(size))
    copy[..., :size] = tensor
    return matrix(copy)


def is_aligned(m: Matrix) -> bool:
    """16 divides the head size, and rows start at multiples of 16 elements and 16 bytes."""
    data, batch_stride, head_stride, row_stride = m
    steps = data.shape[-1] | batch_stride | head_stride | row_stride  # 16 divides this if it divides each of them
    contiguous = data.stride(-1) == 1 and row_stride <= LONGEST_ROW
    return contiguous and steps % ROW_ALIGNMENT == 0 and data.data_ptr() % 16 == 0


def trimmed(tensor: Tensor, size: int) -> Tensor:
    """Without the columns that `aligned` added."""
    return tensor if tensor.shape[-1] == size else tensor[..., :size].clone()


@triton.jit
def heaviest_first(units, first_unit, first_tile):
    """(unit, tile) of this program. The last tiles start first: under a causal mask they see the most keys."""
    tiles = tl.num_programs(0) // units
    program = tl.program_id(0)
    return first_unit + program % units, first_tile + tiles - 1 - program // units


@triton.jit
def launch_index(unit, tile, units, first_unit, first_tile):
    """The number of a tile of a unit among all of this launch: the tiles of a unit stand together."""
    return (unit - first_unit) * (tl.num_programs(0) // units) + tile - first_tile


@triton.jit
def query_head(m, unit, sizes):
    """The matrix of one query head. Its data pointer is at the head's first row."""
    return head_of(m, unit // sizes.heads, unit % sizes.heads)


@triton.jit
def key_head(m, unit, sizes):
    """The matrix of the key head that a query head reads."""
    return head_of(m, unit // sizes.heads, unit % sizes.heads // sizes.group)


@triton.jit
def head_of(m, batch, head):
    data = m.data + tl.cast(batch, tl.int64) * m.batch_stride + tl.cast(head, tl.int64) * m.head_stride
    return Matrix(data, m.batch_stride, m.head_stride, m.row_stride)


@triton.jit
def row_pointers(rows, unit, row, sizes):
    return rows + tl.cast(unit, tl.int64) * sizes.query_length + row


@triton.jit
def load_row(rows, unit, row, sizes, other):
    return tl.load(row_pointers(rows, unit, row, sizes), mask=row < sizes.query_length, other=other)


@triton.jit
def store_row(rows, unit, row, sizes, value):
    tl.store(row_pointers(rows, unit, row, sizes), value, mask=row < sizes.query_length)


@triton.jit
def tile_pointers(m, first, TILE: tl.constexpr, PADDED: tl.constexpr):
    """64 bits point to the tile, 32 bits inside it: these offsets stay in registers while the tile moves."""
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
    """`load_tile` where no row is past the last one: nothing is compared."""
    return load_columns(tile_pointers(m, first, TILE, PADDED), SIZE, PADDED)


@triton.jit
def load_columns(pointers, SIZE: tl.constexpr, PADDED: tl.constexpr):
    if SIZE == PADDED:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(tl.arange(0, PADDED) < SIZE)[None, :], other=0.0)
    return tile


@triton.jit
def open_tile(tile, C: tl.constexpr):
    """A tile as a block. Its columns are constants of the compiled loop."""
    return RowBlock(tile, tile * C.TILE, tl.arange(0, C.TILE))


@triton.jit
def open_tiles(tile, TILES: tl.constexpr, C: tl.constexpr):
    """So many tiles in a row as one block, with the number of the first."""
    return RowBlock(tile, tile * C.TILE, tl.arange(0, TILES * C.TILE))


@triton.jit
def open_rows(places, C: tl.constexpr):
    """The rows whose numbers stand at some places. Their offsets in memory may need 64 bits."""
    return RowBlock(-1, 0, tl.load(places + tl.arange(0, C.TILE)).to(tl.int64))


@triton.jit
def load_block(m, block, rows, MASKED: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """The rows of a block of a head's matrix. Without a mask, none of them is past the last of its `rows`."""
    inside = block.column[:, None] * m.row_stride + tl.arange(0, PADDED)[None, :]
    pointers = m.data + tl.cast(block.first, tl.int64) * m.row_stride + inside
    if MASKED:
        mask = (block.column < rows - block.first)[:, None]
        if SIZE != PADDED:
            mask = mask & (tl.arange(0, PADDED) < SIZE)[None, :]
        loaded = tl.load(pointers, mask=mask, other=0.0)
    else:
        loaded = load_columns(pointers, SIZE, PADDED)
    return loaded


@triton.jit
def store_tile(m, first, rows, tile, TILE: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    tile = tile.to(m.data.dtype.element_ty)
    tl.store(tile_pointers(m, first, TILE, PADDED), tile, mask=tile_mask(first, rows, TILE, SIZE, PADDED))


@triton.jit
def add_compensated(total, error, part):
    """(total + part, the rounding error of this sum), by Kahan (1965). Thousands of equal parts lose no digits."""
    part -= error
    raised = total + part
    return raised, (raised - total) - part


@triton.jit
def no_sums(C: tl.constexpr):
    """The start of a running `sum_keys`."""
    TILE: tl.constexpr = C.TILE
    LANES: tl.constexpr = C.LANES
    nothing = tl.zeros((TILE, LANES), tl.float32)
    return nothing, nothing


@triton.jit
def sum_keys(sums, addends, C: tl.constexpr):
    """Add (TILE, keys) numbers along the keys to the running sums of each row.

    A row's sum is kept in LANES parts. Columns that are LANES apart lie in one thread, so that no tile waits for an
    exchange between threads. float32 sums are compensated.
    """
    TILE: tl.constexpr = C.TILE
    LANES: tl.constexpr = C.LANES
    total, error = sums
    part = tl.sum(tl.reshape(addends, (TILE, addends.shape[1] // LANES, LANES)), 1)
    if C.COMPENSATED:
        total, error = add_compensated(total, error, part)
    else:
        total += part
    return total, error

"""Keys in pages, and queries that are the last tokens of their batch row: where they are, and which keys they see.

Without pages (C.PAGE is 0) a batch row has all keys of its head in one piece. Nothing is loaded for that.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...core.pages import Pages
from .keys import Keys, open_keys
from .tile import Matrix, RowBlock, head_of, load_block, load_columns
from .visibility import visible_interval, visible_keys


class KernelPages(NamedTuple):
    """The tensors of core.pages.Pages as a launch takes them."""

    block_table: Tensor
    key_lengths: Tensor
    cu_seq_q: Tensor | None


def kernel_pages(pages: Pages) -> KernelPages:
    """Lengths, boundaries and the page numbers of each row contiguous, as a rule without a copy."""
    table, boundaries = pages.block_table, pages.cu_seq_q
    table = table if table.stride(1) == 1 else table.contiguous()
    return KernelPages(table, pages.key_lengths.contiguous(), None if boundaries is None else boundaries.contiguous())


class BatchRow(NamedTuple):
    """One batch row of a call. Query q of it is row first + q of the query matrix, from q = absent on.

    Attributes:
        table: pointer at the number of its first page.
        key_length: how many keys it has.
        fits: its keys fit its pages, and its queries fit the launch. What does not fit gets NaN, and reads no key.
    """

    table: Tensor | int
    first: int
    absent: int
    key_length: int
    fits: bool


@triton.jit
def open_batch_row(pages, batch, table_stride, tokens, sizes, C: tl.constexpr):
    table, first, absent, key_length, fits = 0, 0, 0, sizes.key_length, True
    if C.PAGE:
        table = pages.block_table + tl.cast(batch, tl.int64) * table_stride
        length = tl.load(pages.key_lengths + batch)
        fits = (length >= 0) & (length <= sizes.key_length)
        if C.PACKED:
            begin, end = tl.load(pages.cu_seq_q + batch), tl.load(pages.cu_seq_q + batch + 1)
            fits = fits & (begin >= 0) & (begin <= end) & (end <= tokens) & (end - begin <= sizes.query_length)
            first = tl.where(fits, end - sizes.query_length, tl.minimum(tl.maximum(begin, 0), tokens)).to(tl.int32)
            absent = tl.where(fits, begin - first, 0).to(tl.int32)
        key_length = tl.where(fits, length, 0).to(tl.int32)
    return BatchRow(table, first, absent, key_length, fits)


@triton.jit
def keys_of_batch_row(m, batch, key_head, C: tl.constexpr):
    """The matrix of a key head: of one batch row, or of the first page."""
    return head_of(m, 0 if C.PAGE else batch, key_head)


@triton.jit
def interval_of_row(number, batch, left, sizes, visibility, C: tl.constexpr):
    """(start, stop, position) of queries of a batch row; see visibility.visible_interval. Of a row in pages, `sizes`
    has its own number of keys; INTERVALS says that no query sees more than `left` keys before its own."""
    if C.PAGE:
        start = tl.zeros_like(number)
        stop = visible_keys(number, sizes, True)
        position = number + (sizes.key_length - sizes.query_length)
        if C.INTERVALS:
            start = tl.minimum(tl.maximum(position - left, 0), stop)
    else:
        start, stop, position = visible_interval(number, batch * sizes.heads, sizes, visibility, C)
    return start, stop, position


@triton.jit
def offsets_of_keys(m, table, key, inside, C: tl.constexpr):
    """How far keys are from the first row of their head's matrix, in 64 bits. Those outside read no page number."""
    if C.PAGE:
        page = tl.load(table + key // C.PAGE, mask=inside, other=0)
        offset = tl.cast(page, tl.int64) * m.batch_stride + tl.cast(key % C.PAGE, tl.int64) * m.row_stride
    else:
        offset = tl.cast(key, tl.int64) * m.row_stride
    return offset


@triton.jit
def open_keys_of_row(key, table, block, sizes, MASKED: tl.constexpr, C: tl.constexpr):
    """A tile of the keys of a batch row; see keys.open_keys. A tile that lies in one page needs one page number."""
    if C.PAGE == 0:
        keys = open_keys(key, block, sizes, MASKED, C)
    elif C.PAGE % C.TILE == 0:
        page = tl.cast(tl.load(table + block.first // C.PAGE), tl.int64)
        data = key.data + page * key.batch_stride + tl.cast(block.first % C.PAGE, tl.int64) * key.row_stride
        rows = Matrix(data, key.batch_stride, key.head_stride, key.row_stride)
        block_of_page = RowBlock(block.tile, 0, block.column)
        k = load_block(rows, block_of_page, sizes.key_length - block.first, MASKED, C.HEAD, C.HEAD_PADDED)
        keys = Keys(block.tile, block.first, block.column, k)
    else:
        number = block.first + block.column
        inside = number < sizes.key_length
        column = tl.arange(0, C.HEAD_PADDED)[None, :]
        pointers = key.data + offsets_of_keys(key, table, number, inside, C)[:, None] + column
        if MASKED:
            k = tl.load(pointers, mask=inside[:, None] & (column < C.HEAD), other=0.0)
        else:
            k = load_columns(pointers, C.HEAD, C.HEAD_PADDED)
        keys = Keys(block.tile, block.first, block.column, k)
    return keys

"""The output of a decoded row: sums of the values of its support, and of the parts of a long one."""

import triton
import triton.language as tl

from .pages import offsets_of_keys
from .tile import add_compensated, head_of


@triton.jit
def weighted_values(value, table, keys, weights, begin, end, C: tl.constexpr):
    """(VALUE_PADDED,): the sum of the listed values from place `begin` to `end`, each times its weight."""
    PADDED: tl.constexpr = C.VALUE_PADDED
    BLOCK: tl.constexpr = max(8192 // PADDED, 16)
    column = tl.arange(0, PADDED)[None, :]
    total = tl.zeros((BLOCK, PADDED), tl.float32)
    for first in range(begin, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < end
        key = tl.load(keys + place, mask=inside, other=0)
        weight = tl.load(weights + place, mask=inside, other=0.0)
        pointers = value.data + offsets_of_keys(value, table, key, inside, C)[:, None] + column
        rows = tl.load(pointers, mask=inside[:, None] & (column < C.VALUE), other=0.0)
        total += weight[:, None] * rows.to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def store_output(output, batch, head, number, batch_row, tokens, total, C: tl.constexpr):
    """Write the output of a query. Of packed queries, `output` has one batch row, and a number may have no query."""
    column = tl.arange(0, C.VALUE_PADDED)
    rows = head_of(output, batch, head)
    row, size = batch_row.first + number, C.VALUE
    if C.PACKED:
        size = tl.where((number >= batch_row.absent) & (row < tokens), C.VALUE, 0)
    pointers = rows.data + tl.cast(row, tl.int64) * rows.row_stride + column
    tl.store(pointers, total.to(output.data.dtype.element_ty), mask=column < size)


@triton.jit
def sum_of_parts(row_parts, part_count, C: tl.constexpr):
    total = tl.zeros(row_parts.shape, tl.float32)
    error = tl.zeros(row_parts.shape, tl.float32)
    for part in range(part_count):
        total, error = add_compensated(total, error, tl.load(row_parts + part * C.VALUE_PADDED))
    return total

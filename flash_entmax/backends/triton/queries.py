"""A tile of queries, and the numbers that turn their scores into probabilities."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .tile import Sizes, load_block, load_row
from .visibility import KernelVisibility, visible_interval


class KernelScoreOptions(NamedTuple):
    """core.call.ScoreOptions as a launch takes them: a number of the call, or a tensor with one for each query head.

    `open_options` turns all of them into the numbers of one head. Scores are in units of query . key, so softcap and
    ALiBi slopes are divided by the scale: softcap is (heads,) where it is a tensor, alibi_slopes are (batch, heads).
    """

    scale: float | Tensor
    z_scale: float | Tensor  # z = z_scale * score
    exponent: float | Tensor  # 1 / (alpha - 1)
    softcap: float | Tensor | None = None
    alibi_slopes: Tensor | None = None


class Queries(NamedTuple):
    """Some queries of one head, which keys each of them sees (start <= key < stop), and what their scores take."""

    unit: int
    tile: int
    row: Tensor
    start: Tensor
    stop: Tensor
    position: Tensor
    q: Tensor
    options: KernelScoreOptions
    sizes: Sizes
    visibility: KernelVisibility


class Threshold(NamedTuple):
    """tau = z_scale * maximum - offset of each query; relative_scale is z_scale / offset."""

    maximum: Tensor
    offset: Tensor
    relative_scale: Tensor


@triton.jit
def open_options(options, unit, sizes, C: tl.constexpr):
    """The numbers of one query head; 0 where a call does not use one."""
    softcap, alibi_slope = 0.0, 0.0
    if C.SOFTCAP:
        softcap = number_of_head(options.softcap, unit, sizes, C)
    if C.ALIBI:
        alibi_slope = tl.load(options.alibi_slopes + unit)
    scale = number_of_head(options.scale, unit, sizes, C)
    z_scale = number_of_head(options.z_scale, unit, sizes, C)
    exponent = number_of_head(options.exponent, unit, sizes, C)
    return KernelScoreOptions(scale, z_scale, exponent, softcap, alibi_slope)


@triton.jit
def number_of_head(number, unit, sizes, C: tl.constexpr):
    """A number of the call, or of the query head."""
    if C.PER_HEAD:
        number = tl.load(number + unit % sizes.heads)
    return number


@triton.jit
def open_queries(query, unit, block, options, sizes, visibility, MASKED: tl.constexpr, C: tl.constexpr):
    """A block of the queries of a head's matrix, with the options of that head."""
    row = block.first + block.column
    start, stop, position = visible_interval(row, unit, sizes, visibility, C)
    q = load_block(query, block, sizes.query_length, MASKED, C.HEAD, C.HEAD_PADDED)
    return Queries(unit, block.tile, row, start, stop, position, q, options, sizes, visibility)


@triton.jit
def open_threshold(maximum, offset, queries):
    """The stored threshold of each query; past the last query no key is above it."""
    row_maximum = load_row(maximum, queries.unit, queries.row, queries.sizes, float("inf"))
    row_offset = load_row(offset, queries.unit, queries.row, queries.sizes, 1.0)
    return Threshold(row_maximum, row_offset, queries.options.z_scale / row_offset)
